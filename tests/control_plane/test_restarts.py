"""Which components are restarted, when, in which order, by which command; and which message a failure gets."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import ssl
import stat
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from bridge import control_plane
from bridge.cli import components
from bridge.cli.options import Output
from bridge.control_plane import probes, restarts
from bridge.control_plane.restarts import (
    ImpossibleError,
    Restarted,
    RestartPostponedError,
    Restarts,
    restart_stale,
    take_copy,
)
from bridge.errors import Exit, SettingsError
from bridge.node import inventory, kubelet, processes
from bridge.node.inventory import Node
from bridge.node.reading import read_node
from bridge.settings.load import parse
from bridge.settings.tables import Components, NodeSettings, Settings, Version
from bridge.specs import SPECS, Component
from bridge.state import Store, audit
from bridge.state.static_pods import RestartError
from bridge.system.state_file import sealed
from bridge.system.waiting import wait_until
from tests.kit import cfssl
from tests.kit.cas import Bridge
from tests.kit.loopback import LoopbackServer
from tests.kit.measured import is_running
from tests.kit.nodes import wait_for
from tests.kit.pki import Pki, handmade_pki
from tests.kit.static_pod import interrupted

_PEM = Encoding.PEM

ETCD, APISERVER, MANAGER, SCHEDULER, KUBELET = control_plane.ORDER
HEALTHY = {ETCD: b'{"health":"true","reason":""}'}


@dataclass(kw_only=True)
class Plane:
    """Four components and a kubelet, as far as they say how they are, and commands that restart them."""

    directory: Path
    pki: Pki
    status: dict[Component, int] = field(default_factory=lambda: dict.fromkeys(Component, 200))
    body: dict[Component, bytes] = field(default_factory=dict)
    asked: list[tuple[Component, str]] = field(default_factory=list)

    def commands(self, **changed: str) -> dict[str, str]:
        """Each writes its name into a file, unless it is another one."""
        log = self.directory / "log"
        usual = f"sh -c 'echo $CA_BRIDGE_COMPONENT >>{log}'"
        return {c.value: changed.get(c.name.lower(), usual) for c in Component}

    def settings(self, *, timeout: str = "3m", **commands: str) -> Settings:
        """The settings of a node that looks at no other node; the time limit is for a command, and for health after it."""
        lines = [f'"{name}" = {json.dumps(text)}' for name, text in self.commands(**commands).items()]
        return parse(
            "\n".join(
                [
                    "[node]",
                    f'pki_dir = "{self.pki.pki_dir}"',
                    f'kubeconfig_dir = "{self.pki.kubeconfig_dir}"',
                    f'state_dir = "{self.directory / "state"}"',
                    "[cluster]",
                    'neighbours = "ignore"',
                    "lease = false",
                    "[restart]",
                    'method = "command"',
                    f'timeout = "{timeout}"',
                    "[restart.commands]",
                    *lines,
                ]
            )
        )

    @property
    def node(self) -> Node:
        """As read from files."""
        return inventory.read(self.pki.pki_dir, self.pki.kubeconfig_dir)

    @property
    def ran(self) -> list[str]:
        """Whose commands ran."""
        log = self.directory / "log"
        return log.read_text().split() if log.exists() else []

    def restart(self, *components: Component, settings: Settings | None = None, force: bool = False) -> list[Restarted]:
        """As the program does it."""
        settings = settings or self.settings()
        store = Store(settings.node.state_dir)
        store.prepare()
        with audit.Record(store, settings.audit) as record:
            given = Restarts(node=self.node, settings=settings, store=store, record=record, force=force)
            return given.all(components)

    def trouble(self, component: Component) -> str | None:
        """What the program sees."""
        return probes.trouble(component, self.node, self.pki.kubeconfig_dir)


FLAGS = {
    ETCD: "--listen-client-urls=http://127.0.0.1:{port},http://192.0.2.10:2379",
    APISERVER: "--secure-port={port}",
    MANAGER: "--bind-address=127.0.0.1\n    - --secure-port={port}",
    SCHEDULER: "--bind-address=0.0.0.0\n    - --secure-port={port}",
}
MANIFEST = """\
apiVersion: v1
kind: Pod
spec:
  containers:
  - name: {name}
    image: registry.k8s.io/{name}:{tag}
    command:
    - {name}
    - {flags}
"""


@contextlib.contextmanager
def serving(plane: Plane, component: Component, tls: ssl.SSLContext | None) -> Iterator[int]:
    """A component's health, on a port of its own."""

    class Handler(BaseHTTPRequestHandler):
        """Says what the plane says."""

        def do_GET(self) -> None:
            """Health."""
            plane.asked.append((component, self.path))
            body = plane.body.get(component, HEALTHY.get(component, b"ok"))
            self.send_response(plane.status[component])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Nothing."""

    with LoopbackServer(("127.0.0.1", 0), Handler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plane]:
    """All of it is well."""
    plane = Plane(directory=tmp_path, pki=handmade_pki(tmp_path / "node"))
    files = cfssl.make_tls(tmp_path / "tls")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(files.server_cert, files.server_key)
    directory = plane.pki.kubeconfig_dir / "manifests"
    directory.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        for component, flags in FLAGS.items():
            port = stack.enter_context(serving(plane, component, None if component is ETCD else tls))
            tag = "3.7.3-0" if component is ETCD else "v1.37.2"
            text = MANIFEST.format(name=component.value, tag=tag, flags=flags.format(port=port))
            (directory / f"{component.value}.yaml").write_text(text)
        port = stack.enter_context(serving(plane, KUBELET, None))
        config = tmp_path / "kubelet.yaml"
        config.write_text(f"kind: KubeletConfiguration\nhealthzPort: {port}\n")
        monkeypatch.setattr(kubelet, "KUBELET_CONFIG", config)
        monkeypatch.setattr(control_plane, "KUBELET_COPY", tmp_path / "kubelet-client-current.pem")
        yield plane


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Health is looked at once, as if the time was over then; commands have theirs."""
    monkeypatch.setattr(restarts, "wait_until", lambda look, *_, **__: look())


# --- settings and choice ---------------------------------------------------------------------------------------------


def test_settings() -> None:
    """Components are given by word or by name, and commands are split as a shell does."""
    settings = parse(
        '[restart]\nmethod = "command"\ncomponents = ["kube-scheduler", "etcd"]\n'
        "[restart.commands]\nkube-scheduler = \"rc-service 'kube scheduler' restart\"\n"
    ).restart
    assert settings.components == Components("listed", (SCHEDULER, ETCD))
    assert settings.command(SCHEDULER) == ["rc-service", "kube scheduler", "restart"]
    assert settings.command(ETCD) == []
    assert parse('[restart]\ncomponents = "all"\n').restart.components == Components("all")
    assert parse("").restart.components == Components("needed")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('components = "some"', "components"),
        ("components = []", "components"),
        ('components = ["kube-proxy"]', "components"),
        ("components = [3]", "components"),
        ('method = "command"', "commands"),
        ('method = "crictl"', "method"),
        ('on_failure = "panic"', "on_failure"),
        ('commands.kube-schedule = "true"', "commands.kube-schedule"),
        ('commands.etcd = "\'unbalanced"', "commands.etcd"),
        ('commands.etcd = " "', "commands.etcd"),
        ('commands.etcd = ["true"]', "commands.etcd"),
    ],
)
def test_settings_that_make_no_sense(text: str, key: str) -> None:
    """Each is one problem, at its key."""
    with pytest.raises(SettingsError) as e:
        parse(f"[restart]\n{text}\n")
    assert [problem.key for problem in e.value.problems] == [f"restart.{key}"]


@pytest.mark.parametrize(
    ("components", "reloads", "wanted"),
    [
        (Components("needed"), {ETCD, APISERVER}, [MANAGER, SCHEDULER, KUBELET]),
        (Components("needed"), {APISERVER}, [ETCD, MANAGER, SCHEDULER, KUBELET]),
        (Components("needed"), {ETCD}, [APISERVER, MANAGER, SCHEDULER, KUBELET]),
        (Components("needed"), set(), list(control_plane.ORDER)),
        (Components("all"), {ETCD, APISERVER}, list(control_plane.ORDER)),
        (Components("listed", (SCHEDULER, ETCD)), {ETCD, APISERVER}, [ETCD, SCHEDULER]),
    ],
)
def test_who_still_runs_on_old_files(components: Components, reloads: set[Component], wanted: list[Component]) -> None:
    """After a renewal of everything the list has all components, in the order of restarts."""
    assert control_plane.stale(SPECS.values(), reloads, components) == wanted


@pytest.mark.parametrize(
    ("apiserver", "setting", "apiserver_reloads"),
    [
        ("v1.33.9", None, False),
        ("v1.34.0", None, True),
        ("v1.37.2", None, True),
        ("v2.0.0", None, True),
        ("latest", None, False),
        (None, None, False),
        ("v1.33.9", Version(1, 34), True),
        ("v1.37.2", Version(1, 33), False),
        ("latest", Version(1, 37), True),
        (None, Version(1, 34), True),
    ],
)
@pytest.mark.parametrize(
    ("etcd", "etcd_reloads"),
    [("3.5.24-0", False), ("3.6.5-0", True), ("3.7.3-0", True), ("latest", False), (None, False)],
)
def test_each_is_trusted_to_reload_by_its_own_version(
    tmp_path: Path,
    apiserver: str | None,
    setting: Version | None,
    apiserver_reloads: bool,
    etcd: str | None,
    etcd_reloads: bool,
) -> None:
    """A component's own image tag decides, and for the API server the setting first; no other component's version counts."""
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    for component, tag in ((APISERVER, apiserver), (ETCD, etcd), (MANAGER, "v1.37.2"), (SCHEDULER, "v1.37.2")):
        if tag is not None:
            text = MANIFEST.format(name=component.value, tag=tag, flags="--v=2")
            (manifests / f"{component.value}.yaml").write_text(text)
    settings = NodeSettings(pki_dir=tmp_path / "pki", kubeconfig_dir=tmp_path, kubernetes_version=setting)
    found = control_plane.reloading(read_node(settings), settings)
    assert found == {one for one, reloads in ((APISERVER, apiserver_reloads), (ETCD, etcd_reloads)) if reloads}


# --- health ----------------------------------------------------------------------------------------------------------


@pytest.mark.rotation("an API server before /readyz")
def test_each_is_asked_where_its_manifest_says(plane: Plane) -> None:
    """Its own path, on its own port; a wildcard address is asked on loopback."""
    assert [plane.trouble(component) for component in control_plane.ORDER] == [None] * 5
    paths = {ETCD: "/health", APISERVER: "/readyz", MANAGER: "/healthz", SCHEDULER: "/healthz", KUBELET: "/healthz"}
    assert plane.asked == list(paths.items())


@pytest.mark.parametrize(
    ("component", "status", "body", "found"),
    [
        (APISERVER, 500, b"[+]ping ok\n[-]etcd failed: reason withheld\nreadyz check failed\n", "500: [-]etcd failed"),
        (MANAGER, 500, b"not now\nmore", "HTTP status 500: not now"),
        (KUBELET, 503, b"", "HTTP status 503"),
        (ETCD, 503, b'{"health":"false","reason":"ALARM NOSPACE"}', "ALARM NOSPACE"),
        (ETCD, 503, b'{"health":"false","reason":"RAFT NO LEADER"}', "RAFT NO LEADER"),
        (ETCD, 200, b'{"health":"false"}', "not healthy"),
        (ETCD, 200, b"ok", "something else"),
        (ETCD, 200, b"[]", "something else"),
        (ETCD, 404, b"404 page not found", "HTTP status 404"),
    ],
)
def test_each_fault_is_reported_in_their_words(
    plane: Plane, component: Component, status: int, body: bytes, found: str
) -> None:
    """The message has etcd's alarms and missing leader, and the failed checks of the others."""
    plane.status[component], plane.body[component] = status, body
    assert found in (plane.trouble(component) or "")


def test_an_etcd_that_gives_grpc_a_port_of_its_own_is_asked_on_the_other(plane: Plane) -> None:
    """The first one has no HTTP then (etcd-io/etcd#15402)."""
    manifest = plane.pki.kubeconfig_dir / "manifests/etcd.yaml"
    text = manifest.read_text()
    url = text.partition("--listen-client-urls=")[2].partition(",")[0]
    grpc = f"--listen-client-urls=https://127.0.0.1:1\n    - --listen-client-http-urls=http://192.0.2.10:2382,{url}"
    manifest.write_text(text.replace(f"--listen-client-urls={url},http://192.0.2.10:2379", grpc))
    assert plane.trouble(ETCD) is None
    assert plane.asked == [(ETCD, "/health")]


@pytest.mark.parametrize("names", [("admin.conf",), ("super-admin.conf",), ("admin.conf", "super-admin.conf")])
def test_an_api_server_that_knows_no_strangers_is_asked_with_a_certificate(
    plane: Plane, names: tuple[str, ...]
) -> None:
    """Any kubeconfig that is there serves; without one, the server's refusal is all there is."""
    for name in {"admin.conf", "super-admin.conf"} - set(names):
        (plane.pki.kubeconfig_dir / name).unlink()
    plane.status[APISERVER] = 401
    assert "HTTP status 401" in (plane.trouble(APISERVER) or "")
    assert len(plane.asked) == 1 + len(names)


def test_who_is_away_is_not_healthy(plane: Plane) -> None:
    """No connection is an answer, too."""
    manifest = plane.pki.kubeconfig_dir / "manifests/kube-scheduler.yaml"
    manifest.write_text(MANIFEST.format(name="kube-scheduler", tag="v1.37.2", flags="--secure-port=1"))
    assert "connection refused" in (plane.trouble(SCHEDULER) or "")


@pytest.mark.usefixtures("impatient")
def test_a_component_that_serves_nothing_holds_up_no_restart(plane: Plane) -> None:
    """Without a port it has no health to ask for; another port is asked."""
    manifest = plane.pki.kubeconfig_dir / "manifests/kube-scheduler.yaml"
    manifest.write_text(MANIFEST.format(name="kube-scheduler", tag="v1.37.2", flags="--secure-port=0"))
    [one] = plane.restart(MANAGER)
    assert one.error is None
    manifest.write_text(MANIFEST.format(name="kube-scheduler", tag="v1.37.2", flags="--secure-port=1"))
    [one] = plane.restart(APISERVER)
    assert isinstance(one.error, RestartPostponedError)


@pytest.mark.parametrize("text", ["healthzPort: 0\n", "", "- list", "\0", "healthzPort: {a: b}"])
def test_a_kubelet_without_health_is_taken_as_healthy(plane: Plane, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Switched off; and a configuration that can't be read means the kubelet's defaults."""
    config = plane.directory / "other.yaml"
    config.write_text(text)
    monkeypatch.setattr(kubelet, "KUBELET_CONFIG", config)
    assert kubelet.health_url() == (None if "Port: 0" in text else "http://127.0.0.1:10248/healthz")


# --- one by one ------------------------------------------------------------------------------------------------------


def test_one_at_a_time_in_order(plane: Plane) -> None:
    """Components restart in the fixed order, however they were named; each has its line in the audit log."""
    done = plane.restart(SCHEDULER, KUBELET, ETCD, MANAGER, APISERVER)
    assert [one.component for one in done] == list(control_plane.ORDER)
    assert [one.exit_code for one in done] == [Exit.DONE] * 5
    assert plane.ran == [component.value for component in control_plane.ORDER]
    events = list(audit.events(Store(plane.directory / "state"), None, None))
    assert [(e["event"], e["name"]) for e in events] == [(audit.RESTARTED, c.value) for c in control_plane.ORDER]


def test_never_twice_within_the_interval_unless_forced(plane: Plane) -> None:
    """Each component has its own time; a clock that was set back is no reason to wait."""
    assert plane.restart(SCHEDULER)[0].error is None
    held, done = plane.restart(SCHEDULER, MANAGER)
    assert (held.component, held.exit_code, held.seconds) == (SCHEDULER, Exit.UNAVAILABLE, None)
    assert held.error is not None
    assert held.error.hint.endswith("or `ca-bridge restart kube-scheduler --force` does it at once")
    assert (done.component, done.exit_code) == (MANAGER, Exit.DONE)
    assert plane.ran == ["kube-scheduler", "kube-controller-manager"]
    assert plane.restart(SCHEDULER, force=True)[0].error is None
    later = datetime.now(UTC) + timedelta(days=1)
    last = {"kube-scheduler": {"at": later.isoformat(), "installation": 0}}
    (plane.directory / "state/restarted.json").write_bytes(sealed(last))
    assert plane.restart(SCHEDULER)[0].error is None


@pytest.mark.parametrize("text", ["", "[]", '{"kube-scheduler": "soon"}', '{"kube-scheduler": 3}', "\0"])
def test_times_that_can_not_be_read_hold_nothing_up(plane: Plane, text: str) -> None:
    """Such times are written anew."""
    plane.restart(MANAGER)
    (plane.directory / "state/restarted.json").write_text(text)
    assert plane.restart(SCHEDULER)[0].error is None


@pytest.mark.usefixtures("impatient")
def test_not_with_an_unhealthy_neighbour_unless_forced(plane: Plane) -> None:
    """Nothing is restarted, and the message names the neighbour and its fault."""
    plane.status[APISERVER] = 500
    plane.body[APISERVER] = b"[-]etcd failed"
    first, second = plane.restart(MANAGER, SCHEDULER)
    assert isinstance(first.error, RestartPostponedError)
    assert "kube-apiserver: https://127.0.0.1" in str(first.error)
    assert "[-]etcd failed" in str(first.error)
    assert isinstance(second.error, RestartPostponedError)
    assert plane.ran == []
    forced = plane.restart(MANAGER, force=True)
    assert [(one.component, one.exit_code) for one in forced] == [(MANAGER, 0), (APISERVER, Exit.NOT_LIVE)]
    assert plane.ran == ["kube-controller-manager"]


def test_a_neighbour_that_comes_back_is_waited_for(plane: Plane, caplog: pytest.LogCaptureFixture) -> None:
    """A component that lost its lease needs a moment."""
    caplog.set_level("INFO", "ca-bridge")
    plane.status[SCHEDULER], waits = 500, "waits for its neighbours: kube-scheduler"

    def heal() -> None:
        wait_until(lambda: waits in caplog.text, bool, timedelta(minutes=3), pause_seconds=0.02)
        plane.status[SCHEDULER] = 200

    healer = threading.Thread(target=heal)
    healer.start()
    assert plane.restart(MANAGER, settings=plane.settings())[0].error is None
    healer.join()
    assert waits in caplog.text


def test_a_neighbour_whose_turn_comes_is_no_obstacle(plane: Plane) -> None:
    """Both may be down because both their certificates have expired."""
    plane.status.update({MANAGER: 500, SCHEDULER: 500})
    over = threading.Event()

    def heal() -> None:
        while not over.wait(0.05):
            plane.status.update({Component(name): 200 for name in plane.ran})

    healer = threading.Thread(target=heal)
    healer.start()
    try:
        done = plane.restart(MANAGER, SCHEDULER, settings=plane.settings())
    finally:
        over.set()
        healer.join()
    assert [one.exit_code for one in done] == [Exit.DONE, Exit.DONE]


@pytest.mark.usefixtures("impatient")
def test_what_does_not_come_back_ends_it(plane: Plane) -> None:
    """The next one would be the second one down."""
    plane.status[MANAGER] = 500
    first, second = plane.restart(MANAGER, SCHEDULER)
    assert (first.component, first.exit_code) == (MANAGER, Exit.NOT_LIVE)
    assert "wanted it to be healthy within 3m" in str(first.error)
    assert (second.component, second.exit_code) == (SCHEDULER, Exit.NOT_LIVE)
    assert plane.ran == ["kube-controller-manager"]


@pytest.mark.usefixtures("impatient")
def test_who_was_harmed_is_reported(plane: Plane) -> None:
    """A component that was not restarted, and is not well any more."""
    begun, harmed = plane.directory / "begun", plane.directory / "harmed"

    def harm() -> None:
        wait_until(begun.exists, bool, timedelta(minutes=3), pause_seconds=0.01)
        plane.status[SCHEDULER] = 500
        harmed.touch()

    harmer = threading.Thread(target=harm)
    harmer.start()
    command = f"sh -c 'touch {begun}; until [ -e {harmed} ]; do sleep 0.01; done'"
    done = plane.restart(APISERVER, settings=plane.settings(apiserver=command))
    harmer.join()
    assert [(one.component, one.exit_code) for one in done] == [(APISERVER, 0), (SCHEDULER, Exit.NOT_LIVE)]


# --- commands --------------------------------------------------------------------------------------------------------


def test_a_command_that_fails_is_reported_with_its_words(plane: Plane, caplog: pytest.LogCaptureFixture) -> None:
    """Its exit code in the error, its output in the log."""
    caplog.set_level("INFO", "ca-bridge")
    [one] = plane.restart(SCHEDULER, settings=plane.settings(scheduler="sh -c 'echo no such unit; exit 5'"))
    assert isinstance(one.error, RestartError)
    assert "ended with code 5" in str(one.error)
    assert "kube-scheduler: no such unit" in caplog.messages


def test_a_command_that_does_not_end_is_killed_with_its_children(plane: Plane) -> None:
    """The command and its children are killed at the time limit."""
    pid = plane.directory / "pid"
    command = f"sh -c 'sleep 300 & echo $! >{pid}; wait'"
    for seconds in (1, 10, 60):  # the machine may stall before the command has begun
        settings = plane.settings(scheduler=command, timeout=f"{seconds}s")
        [one] = plane.restart(SCHEDULER, settings=settings, force=True)
        assert f"after {seconds} s, and was killed" in str(one.error)
        if pid.exists() and (number := pid.read_text().strip()):
            break
    wait_for("the end of its child", lambda: not is_running(number))


def test_a_program_that_is_not_there_is_reported(plane: Plane) -> None:
    """The error names the missing program."""
    [one] = plane.restart(SCHEDULER, settings=plane.settings(scheduler="/no/such/program now"))
    assert "/no/such/program" in str(one.error)
    assert one.exit_code == Exit.NOT_LIVE


def test_without_a_command_the_message_says_how_to_do_it_by_hand(plane: Plane) -> None:
    """The message says how to restart by hand, and the next run need not wait."""
    settings = plane.settings()
    del settings.restart.commands["kube-scheduler"]
    [one] = plane.restart(SCHEDULER, settings=settings)
    assert one.error is not None
    assert "move it back" in one.error.hint
    assert plane.restart(SCHEDULER)[0].error is None


# --- the kubelet -----------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(plane: Plane) -> Path:
    """A kubelet's copy of another certificate, as the kubelet makes it."""
    other = handmade_pki(plane.directory / "other")
    [item] = [i for i in inventory.read(other.pki_dir, other.kubeconfig_dir).items if i.spec.name == "scheduler.conf"]
    dated = plane.directory / "kubelet-client-2026-11-25-09-10-40.pem"
    dated.write_bytes(b"".join(c.public_bytes(_PEM) for c in item.certificates))
    os.utime(dated, (0, 0))
    control_plane.KUBELET_COPY.symlink_to(dated)
    return control_plane.KUBELET_COPY


def test_a_kubelets_copy_of_an_old_certificate_is_taken_and_kept(
    plane: Plane, copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It would count more than the new kubelet.conf; the kubelet's own older files stay where they are."""
    caplog.set_level("INFO", "ca-bridge")
    content, target = copy.read_bytes(), copy.readlink()
    assert plane.restart(KUBELET)[0].error is None
    assert not copy.is_symlink()
    assert target.read_bytes() == content
    kept = Store(plane.directory / "state").kubelet_copy
    assert kept.read_bytes() == content
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert str(kept) in caplog.text
    assert plane.ran == ["kubelet"]


def test_a_copy_of_the_same_certificate_stays(plane: Plane, copy: Path) -> None:
    """Removing such a copy would change nothing."""
    [item] = [i for i in plane.node.items if i.spec.name == "kubelet.conf"]
    copy.readlink().write_bytes(b"".join(c.public_bytes(_PEM) for c in item.certificates))
    plane.restart(KUBELET)
    assert copy.is_symlink()


def test_a_younger_copy_is_the_kubelets_own(plane: Plane, copy: Path) -> None:
    """A signer in the cluster has made it, while kubelet.conf goes on embedding the first one."""
    [item] = [i for i in plane.node.items if i.spec.name == "kubelet.conf"]
    later = handmade_pki(plane.directory / "later", now=item.certificates[0].not_valid_before_utc + timedelta(hours=2))
    [rotated] = [i for i in inventory.read(later.pki_dir, later.kubeconfig_dir).items if i.spec.name == "kubelet.conf"]
    copy.readlink().write_bytes(b"".join(c.public_bytes(_PEM) for c in rotated.certificates))
    plane.restart(KUBELET)
    assert copy.is_symlink()
    os.utime(copy, (0, 0))  # but not one that was there before kubelet.conf
    plane.restart(KUBELET, force=True)
    assert not copy.is_symlink()


def test_a_kubelet_that_rotates_by_itself_keeps_its_files(plane: Plane, copy: Path) -> None:
    """Its kubelet.conf refers to the very file."""
    path = plane.pki.kubeconfig_dir / "kubelet.conf"
    lines = [
        f"    {key.replace('-data', '')}: {copy}" if (key := line.strip().partition(":")[0]) in _DATA else line
        for line in path.read_text().splitlines()
    ]
    path.write_text("\n".join(lines) + "\n")
    plane.restart(KUBELET)
    assert copy.is_symlink()


_DATA = ("client-certificate-data", "client-key-data")


def test_a_kubeconfig_that_is_none_stops_before_anything_is_taken(plane: Plane, copy: Path) -> None:
    """It is unknown what the kubelet would do without its copy."""
    (plane.pki.kubeconfig_dir / "kubelet.conf").write_text("kind: Config\n")
    store = Store(plane.directory / "state")
    with pytest.raises(RestartError, match="wanted the kubelet's kubeconfig"):
        take_copy(plane.pki.kubeconfig_dir, copy, store)
    assert copy.is_symlink()


# --- what runs of a pod ----------------------------------------------------------------------------------------------

_POD = {
    "id": "10be69b955f1369c85c5",
    "metadata": {"name": "kube-scheduler-cp-1", "namespace": "kube-system"},
    "labels": {"component": "kube-scheduler"},
    "annotations": {"kubernetes.io/config.source": "file"},
}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, {"pod 10be69b955f13"}),
        ({"labels": {}}, {"pod 10be69b955f13"}),
        ({"labels": {"component": "kube-scheduler-backup"}}, set()),
        ({"annotations": {"kubernetes.io/config.source": "api"}}, set()),
        ({"annotations": {}}, set()),
        ({"metadata": {"name": "kube-apiserver-cp-1"}}, set()),
    ],
)
def test_only_the_kubelets_own_pod_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], found: set[str]
) -> None:
    """Other pods may have the same name."""
    monkeypatch.setattr(processes, "running", lambda *_: [])  # other tests start components in our network
    crictl(tmp_path, monkeypatch, json.dumps({"items": [{**_POD, **change}]}))
    instances, settle = processes.instances(SCHEDULER)
    assert instances() == found
    assert settle == processes.SANDBOX_SETTLES


def test_a_pod_that_is_only_called_alike_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator's static pod without kubeadm's label never ends; kubeadm's tells that it is another one."""
    other = {**_POD, "id": "ffffffffffffffffffff", "metadata": {"name": "kube-scheduler-x-cp-1"}, "labels": {}}
    crictl(tmp_path, monkeypatch, json.dumps({"items": [other, _POD]}))
    instances, _ = processes.instances(SCHEDULER)
    assert instances() == {"pod 10be69b955f13"}
    crictl(tmp_path, monkeypatch, json.dumps({"items": [other]}))
    assert instances() == set()


@pytest.mark.parametrize("output", ["", "no", "[]", '{"items": [3]}', '{"items": [{}]}', None])
def test_without_a_crictl_that_answers_the_process_table_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str | None
) -> None:
    """It has to know no socket."""
    crictl(tmp_path, monkeypatch, output)
    with component_process(tmp_path, SCHEDULER) as process:
        instances, settle = processes.instances(SCHEDULER)
        assert f"process {process.pid}" in instances()
    assert settle == processes.PROCESS_SETTLES


def test_a_crictl_that_falls_silent_ends_no_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last answer counts."""
    crictl(tmp_path, monkeypatch, json.dumps({"items": [_POD]}))
    instances, _ = processes.instances(SCHEDULER)
    crictl(tmp_path, monkeypatch, None)
    assert instances() == {"pod 10be69b955f13"}


def crictl(directory: Path, monkeypatch: pytest.MonkeyPatch, output: str | None) -> None:
    """One that answers so, or fails."""
    program = directory / "crictl"
    (directory / "output").write_text(output or "")
    program.write_text(f"#!/bin/sh\n{'exit 1' if output is None else f'cat {directory}/output'}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")


@pytest.mark.attack("N27")
def test_a_crictl_that_lists_nothing_is_believed_only_where_no_process_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have asked another runtime than the kubelet's; then the process table shows the component."""
    crictl(tmp_path, monkeypatch, json.dumps({"items": []}))
    with monkeypatch.context() as patch:
        patch.setattr(processes, "running", lambda *_: [])  # other tests start components in our network
        instances, settle = processes.instances(SCHEDULER)
        assert (instances(), settle) == (frozenset(), processes.SANDBOX_SETTLES)
    with component_process(tmp_path, SCHEDULER) as process:
        instances, settle = processes.instances(SCHEDULER)
        assert (f"process {process.pid}" in instances(), settle) == (True, processes.PROCESS_SETTLES)


@contextlib.contextmanager
def component_process(directory: Path, component: Component, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program of the component's name, which only waits."""
    program = directory / component.value
    shutil.copy("/usr/bin/sleep", program)
    with subprocess.Popen([program, "300", *arguments]) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.attack("N27")
@pytest.mark.parametrize("ends", [True, False])
def test_a_pod_that_only_its_answers_show_has_to_be_seen_to_end(
    plane: Plane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    """A wrapper is the container's program, and there is no crictl: without a look at its end a restart proves nothing."""
    crictl(tmp_path, monkeypatch, None)
    monkeypatch.setattr(processes, "running", lambda *_: [])  # as if the program had another name
    manifest = plane.pki.kubeconfig_dir / "manifests/kube-scheduler.yaml"
    over = threading.Event()

    def kubelet() -> None:
        while ends and not over.wait(0.01):
            plane.status[SCHEDULER] = 200 if manifest.exists() else 500

    settings = plane.settings(timeout="3m" if ends else "2s")
    settings = dataclasses.replace(settings, restart=dataclasses.replace(settings.restart, method="static-pods"))
    monkeypatch.setattr(processes, "PROCESS_SETTLES", timedelta())
    thread = threading.Thread(target=kubelet)
    thread.start()
    try:
        [one] = plane.restart(SCHEDULER, settings=settings)
    finally:
        over.set()
        thread.join()
    assert manifest.exists()
    if ends:
        assert one.error is None
    else:
        assert isinstance(one.error, ImpossibleError)
        assert "can't see it end" in str(one.error)


# --- the program -----------------------------------------------------------------------------------------------------


def test_with_no_method_it_prints_what_to_do(tmp_path: Path) -> None:
    """The command prints what to do, and never says that all is well."""
    bridge = Bridge(pki=handmade_pki(tmp_path / "node"), directory=tmp_path / "bridge")
    run = bridge.run("restart", "kube-scheduler", "kubelet")
    assert run.returncode == Exit.NOT_LIVE
    assert re.findall(r"^  (\S+):", run.stdout, re.MULTILINE) == ["kube-scheduler", "kubelet"]
    as_json = bridge.run("restart", "all", "-o", "json")
    assert list(json.loads(as_json.stdout)["advice"]) == [c.value for c in control_plane.ORDER[:4]]


def test_all_leaves_out_an_etcd_that_is_elsewhere(plane: Plane) -> None:
    """Nothing of it is here to be restarted, unless the settings name a command; a local one whose manifest is away counts."""
    (plane.pki.kubeconfig_dir / "manifests/etcd.yaml").unlink()

    def components_of(settings: Settings) -> tuple[Component, ...]:
        return restart_stale(settings, ["all"], lambda: datetime.now(UTC), force=True, wait=timedelta()).components

    without = dataclasses.replace(plane.settings().restart, method="none", commands={})
    by_hand = dataclasses.replace(plane.settings(), restart=without)
    every = (ETCD, APISERVER, MANAGER, SCHEDULER)
    assert components_of(by_hand) == every
    shutil.rmtree(plane.pki.pki_dir / "etcd")
    assert components_of(by_hand) == every[1:]
    assert components_of(plane.settings()) == every


def test_a_name_of_no_component_is_a_usage_error(tmp_path: Path) -> None:
    """The error comes before anything is done."""
    bridge = Bridge(pki=handmade_pki(tmp_path / "node"), directory=tmp_path / "bridge")
    run = bridge.run("restart", "scheduler")
    assert run.returncode == Exit.USAGE
    assert "kube-scheduler" in run.stderr
    assert not (tmp_path / "bridge/state").exists()


@pytest.mark.parametrize("command", [("recover",), ("restart", "kube-scheduler")])
def test_what_a_crash_left_away_comes_back(tmp_path: Path, command: tuple[str, ...]) -> None:
    """`recover`, which a unit calls at boot, puts it back, and so does the next command that writes; the audit log records it."""
    site = interrupted(tmp_path / "site")
    bridge = Bridge(pki=handmade_pki(tmp_path / "node"), directory=site.root)
    run = bridge.run(*command)
    assert f"{site.manifest} is back" in run.stdout + run.stderr
    assert site.names() == ["etcd.yaml", "kube-scheduler.yaml"]
    assert not site.store.is_interrupted
    [event] = audit.events(site.store, None, None)
    assert event["event"] == audit.RECOVERED


def test_the_program_restarts_and_says_so(plane: Plane, capsys: pytest.CaptureFixture[str]) -> None:
    """The result is a table or JSON, and a component that was not restarted is an error."""

    def run(output: Output) -> int:
        report = restart_stale(
            plane.settings(), ["kube-scheduler"], lambda: datetime.now(UTC), force=False, wait=timedelta()
        )
        components.print_restarts(report, plane.settings(), output)
        return report.exit_code

    assert run(Output.TEXT) == Exit.DONE
    assert capsys.readouterr().out.startswith("kube-scheduler  restarted, healthy after ")
    code = run(Output.JSON)
    said = json.loads(capsys.readouterr().out)
    assert code == said["exitCode"] == Exit.UNAVAILABLE
    assert [(one["component"], one["seconds"]) for one in said["restarted"]] == [("kube-scheduler", None)]
