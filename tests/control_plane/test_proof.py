"""`prove` judges what it sees: certificates that are shown, answers to clients, the age of what runs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from cryptography.x509 import Name
from typer.testing import CliRunner

from bridge.cli.app import app
from bridge.contract import SignRequest
from bridge.control_plane import proof
from bridge.control_plane.probes import ProofState
from bridge.control_plane.proof import ProofFinding, ProofReport
from bridge.node import inventory, sample_pki
from bridge.node.kubeconfig import with_credentials
from bridge.node.processes import Written
from bridge.pki import certificates, csr
from bridge.pki.csr import Naming
from bridge.settings.load import overridden, parse
from bridge.settings.tables import Settings, Version
from bridge.specs import SPECS, Component
from bridge.state import Store
from bridge.state.install import written_file
from tests.kit.issuing import Signer
from tests.kit.loopback import LoopbackServer

MANIFEST = """\
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  containers:
  - name: {name}
    image: registry.k8s.io/{name}:{tag}
    command: {command}
"""


@dataclass(kw_only=True)
class Site:
    """A node's files, and what its API server answers."""

    directory: Path  #: /etc/kubernetes.
    now: datetime
    status: int = 200
    body: bytes = b"{}"
    port: int = 0
    asked: list[tuple[str, Mapping[str, str]]] = field(default_factory=list)
    version: str = "v1.37.2"
    kubernetes_version: Version | None = None
    flags: dict[str, str] = field(default_factory=dict)

    @property
    def pki(self) -> Path:
        """The PKI of the node."""
        return self.directory / "pki"

    def write(self, component: Component, flags: Mapping[str, str], tag: str) -> Path:
        """A static-pod manifest."""
        path = self.directory / "manifests" / f"{component.value}.yaml"
        path.parent.mkdir(exist_ok=True)
        command = json.dumps([component.value, *(f"{flag}={value}" for flag, value in flags.items())])
        path.write_text(MANIFEST.format(name=component.value, tag=tag, command=command))
        return path

    def api_flags(self) -> dict[str, str]:
        """An API server that serves, and is a client of no other component."""
        return {
            "--advertise-address": "127.0.0.1",
            "--bind-address": "127.0.0.1",
            "--secure-port": str(self.port),
            "--tls-cert-file": f"{self.pki}/apiserver.crt",
            "--tls-private-key-file": f"{self.pki}/apiserver.key",
            **self.flags,
        }

    def look(self) -> ProofReport:
        """With the API server's manifest alone, unless others were written."""
        self.write(Component.APISERVER, self.api_flags(), self.version)
        settings = overridden(parse(""), self.pki, self.directory, self.directory / "state")
        if self.kubernetes_version:
            node = type(settings.node)(
                pki_dir=self.pki, kubeconfig_dir=self.directory, kubernetes_version=self.kubernetes_version
            )
            settings = Settings(source=settings.source, node=node)
        return proof.look(
            inventory.read(self.pki, self.directory),
            settings,
            self.now,
            proc=self.directory / "proc",
            kubelet_config=self.directory / "config.yaml",
            kubelet_copy=self.directory / "kubelet-client-current.pem",
        )

    def finding(self, certificate: str, what: str = "") -> ProofFinding:
        """The one finding about a certificate."""
        findings = self.look().findings
        (found,) = (f for f in findings if f.certificate == certificate and f.what.startswith(what))
        return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files as kubeadm makes them; each test gets its own copy."""
    directory, now = tmp_path_factory.mktemp("made"), datetime.now(UTC)
    cluster = sample_pki.Cluster(node="cp-1", address="127.0.0.1", endpoint="api.example.com:6443")
    cas = sample_pki.make(directory, now=now, not_after=now + timedelta(days=1), key="ecdsa-p256", cluster=cluster)
    (directory / "elsewhere.key").write_bytes(csr.key_pem(cas["ca"].key))
    return directory


@pytest.fixture
def site(made: Path, tmp_path: Path) -> Iterator[Site]:
    """An API server on loopback that takes certificates of the cluster's CAs, and no manifest but its own."""
    directory = tmp_path / "kubernetes"
    shutil.copytree(made, directory)
    network = directory / "proc/self/ns/net"  # a process table without processes
    network.parent.mkdir(parents=True)
    network.symlink_to("net:[1]")
    site = Site(directory=directory, now=datetime.now(UTC))
    with serving(site, made / "pki") as port:
        site.port = port
        yield site


@contextlib.contextmanager
def serving(site: Site, pki: Path) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Answer as the test says."""
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            site.asked.append((self.path, dict(self.headers)))
            self.send_response(site.status)
            self.send_header("Content-Length", str(len(site.body)))
            self.end_headers()
            self.wfile.write(site.body)

        do_POST = do_GET  # noqa: N815 (http.server's spelling)

        def log_message(self, *args: object) -> None:
            """Nothing."""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki / "apiserver.crt", pki / "apiserver.key")
    for anchor in ("ca.crt", "front-proxy-ca.crt"):
        context.load_verify_locations(pki / anchor)
    context.verify_mode = ssl.CERT_OPTIONAL
    with LoopbackServer(("127.0.0.1", 0), Handler) as listening:
        listening.socket = context.wrap_socket(listening.socket, server_side=True, do_handshake_on_connect=False)
        listening.handle_error = lambda *_: None  # type: ignore[method-assign]  # bare handshakes are its job
        thread = threading.Thread(target=listening.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield listening.server_port
        finally:
            listening.shutdown()
            thread.join()


def replace_pair(site: Site, base: str, other: str) -> None:
    for suffix in (".crt", ".key"):
        (site.pki / f"{base}{suffix}").write_bytes((site.pki / f"{other}{suffix}").read_bytes())


# --- what is served --------------------------------------------------------------------------------------------------


def test_a_server_that_shows_its_file_is_current(site: Site) -> None:
    """The twin of all that follows."""
    assert site.finding("apiserver").state == "current"


@pytest.mark.rotation("a server that goes on with its old certificate")
def test_a_server_that_shows_another_certificate_is_stale(site: Site) -> None:
    """A server that shows another certificate than its file is stale and has to be restarted."""
    replace_pair(site, "apiserver", "etcd/server")
    report = site.look()
    assert [(f.certificate, f.state) for f in report.findings if f.state == "stale"] == [("apiserver", "stale")]
    assert report.stale == [Component.APISERVER]
    assert report.exit_code == 7


def test_a_pair_that_does_not_match_is_refused(site: Site) -> None:
    """A server goes on with its old pair, and a restart would be its end."""
    (site.pki / "apiserver.key").write_bytes((site.pki / "front-proxy-client.key").read_bytes())
    found = site.finding("apiserver")
    assert (found.state, site.look().stale) == ("refused", [])
    assert str(site.pki / "apiserver.key") in found.detail


def test_a_server_whose_certificate_has_expired_is_refused(site: Site) -> None:
    """An expired certificate is refused, though it is the one in the server's file."""
    site.now += timedelta(days=2)
    assert site.finding("apiserver").state == "refused"
    site.now -= timedelta(days=10)
    assert site.finding("apiserver").state == "refused"


def test_a_server_of_another_ca_is_refused(site: Site) -> None:
    """Its clients trust `ca.crt`."""
    (site.pki / "ca.crt").write_bytes((site.pki / "etcd/ca.crt").read_bytes())
    assert site.finding("apiserver").state == "refused"


def test_a_server_with_the_wrong_name_is_refused(site: Site) -> None:
    """The address that it advertises has to be in its certificate."""
    site.flags = {"--advertise-address": "192.0.2.99"}
    assert site.finding("apiserver").state == "refused"


def test_no_server_there(site: Site) -> None:
    """A component that does not answer is named, with every certificate that it was asked about."""
    site.flags = {"--secure-port": "1"}
    report = site.look()
    asked = [f for f in report.findings if f.what.startswith(("serves", "is accepted"))]
    assert {f.certificate for f in asked} == {"apiserver", "admin.conf", "super-admin.conf", "kubelet.conf"}
    assert {f.state for f in asked} == {"no-answer"}
    assert report.exit_code == 7


def test_a_file_that_is_not_there_is_unknown(site: Site) -> None:
    """Without the file the state is unknown, and the report says so."""
    (site.pki / "apiserver.crt").unlink()
    found = site.finding("apiserver", "serves")
    assert (found.state, found.detail) == ("unknown", f"{site.pki}/apiserver.crt: there is no such file")


# --- clients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "state"),
    [(200, "current"), (404, "current"), (401, "refused"), (403, "refused"), (429, "no-answer"), (503, "no-answer")],
)
def test_what_an_answer_says_about_a_client(site: Site, status: int, state: str) -> None:
    """A 404 proves that the client is accepted; the answer of a server in trouble proves nothing about the client."""
    site.status, site.body = status, b'{"kind": "Status", "message": "why \\u001b[31m"}'
    found = site.finding("admin.conf")
    assert found.state == state
    assert ("why" in found.detail) == (status in (403, 429, 503))


def test_a_kubeconfig_is_good_for_the_name_that_its_users_have(site: Site) -> None:
    """The local API server is asked, and its certificate has to name the server of the kubeconfig."""
    assert site.finding("admin.conf").state == "current"
    text = (site.directory / "admin.conf").read_text()
    (site.directory / "admin.conf").write_text(text.replace("api.example.com", "other.example.com"))
    found = site.finding("admin.conf")
    assert found.state == "refused"
    assert "not trusted" in found.detail


def test_each_client_asks_for_what_it_needs(site: Site) -> None:
    """Its own lease and what it works on; people the namespace of the control plane."""
    for component in (Component.CONTROLLER_MANAGER, Component.SCHEDULER):
        resource = {"--leader-elect-resource-name": "mine"} if component is Component.SCHEDULER else {}
        site.write(component, {"--secure-port": "0", **resource}, "v1.37.2")
    site.look()
    leases = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases"
    assert {path for path, _ in site.asked} == {
        "/api/v1/namespaces/kube-system",
        f"{leases}/kube-controller-manager",
        f"{leases}/mine",
        "/api/v1/nodes?limit=1",
        "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/cp-1",
        "/api/v1/nodes/cp-1",
    }


def test_a_kubelet_with_two_cns_is_the_user_that_go_takes(site: Site) -> None:
    """The last one, as the API server reads its subject."""
    ca = Signer.load((site.pki / "ca.crt").read_bytes(), (site.directory / "elsewhere.key").read_bytes())
    names = Naming(subject=Name.from_rfc4514_string("CN=system:node:cp-1,CN=system:node:cp-2"))  # the last one first
    key, day = csr.generate_key("ecdsa-p256"), timedelta(days=1)
    request = SignRequest(spec=SPECS["kubelet.conf"], csr_pem=csr.build_for(names, key), validity=day)
    leaf = ca.issue(request, begin=site.now - day, end=site.now + day).leaf
    path = site.directory / "kubelet.conf"
    path.write_bytes(with_credentials(path.read_bytes(), certificates.pem(leaf), csr.key_pem(key)))
    site.look()
    assert "/api/v1/nodes/cp-1" in {asked for asked, _ in site.asked}


@pytest.mark.parametrize(
    ("status", "body", "state"),
    [
        (201, {"status": {"userInfo": {"username": "ca-bridge-prove"}}}, "taken"),
        (403, {"message": 'User "ca-bridge-prove" cannot create resource'}, "taken"),
        (403, {"message": 'User "system:anonymous" cannot create resource'}, "refused"),
        (401, {"message": "Unauthorized"}, "refused"),
        (503, {"message": "ca-bridge-prove"}, "no-answer"),
    ],
    ids=["review", "old version", "anonymous", "unknown", "in trouble"],
)
def test_a_front_proxy_is_taken_for_the_user_that_it_names(
    site: Site, status: int, body: dict[str, Any], state: str
) -> None:
    """The API server's answer names the user that it takes us for, even if it refuses that user."""
    site.status, site.body = status, json.dumps(body).encode()
    site.flags = {
        "--proxy-client-cert-file": f"{site.pki}/front-proxy-client.crt",
        "--proxy-client-key-file": f"{site.pki}/front-proxy-client.key",
        "--requestheader-username-headers": "X-Site-User,X-Remote-User",
    }
    found = site.finding("front-proxy-client")
    assert found.state == {"taken": "next-connection"}.get(state, state)
    headers = next(headers for path, headers in site.asked if path.endswith("/selfsubjectreviews"))
    assert headers["X-Site-User"] == "ca-bridge-prove"


@pytest.mark.parametrize(
    ("version", "setting", "state"),
    [
        ("v1.37.2", None, "next-connection"),
        ("v1.38.0", None, "next-connection"),
        ("v1.34.0", None, "next-connection"),
        ("v1.33.9", None, "unknown"),
        ("latest", None, "unknown"),
        ("v1.37.2", Version(1, 33), "unknown"),
        ("latest", Version(1, 37), "next-connection"),
    ],
)
def test_reading_again_is_believed_of_versions_that_were_measured(
    site: Site, version: str, setting: Version | None, state: str
) -> None:
    """A version that was not measured is judged by the age of its process; here there is none, so the state is unknown."""
    site.version, site.kubernetes_version = version, setting
    site.flags = {
        "--kubelet-client-certificate": f"{site.pki}/apiserver-kubelet-client.crt",
        "--kubelet-client-key": f"{site.pki}/apiserver-kubelet-client.key",
    }
    (site.directory / "config.yaml").write_text(f"kind: KubeletConfiguration\nport: {site.port}\naddress: 127.0.0.1\n")
    found = site.finding("apiserver-kubelet-client")
    assert found.state == state
    assert found.detail.startswith(f"accepted by https://127.0.0.1:{site.port}")


@pytest.mark.parametrize(("written", "state"), [(1.0, "next-connection"), (None, "stale")])
def test_a_process_that_is_older_than_its_manifest_is_not_of_the_version_there(
    site: Site, written: float | None, state: str
) -> None:
    """After an upgrade of the manifest the old process may go on, which does not read its files again."""
    site.flags = {
        "--proxy-client-cert-file": f"{site.pki}/front-proxy-client.crt",
        "--proxy-client-key-file": f"{site.pki}/front-proxy-client.key",
    }
    site.body = b"ca-bridge-prove"
    run_since_boot(site, Component.APISERVER, *(f"{flag}={value}" for flag, value in site.api_flags().items()))
    write = site.write

    def written_then(component: Component, flags: Mapping[str, str], tag: str) -> Path:
        path = write(component, flags, tag)
        if written is not None:
            os.utime(path, (written, written))
        return path

    site.write = written_then  # type: ignore[method-assign]
    assert site.finding("front-proxy-client").state == state


def test_etcds_answer_counts_where_one_of_its_members_gives_it(site: Site) -> None:
    """An API server needs one of them; which one was silent is no reason to restart anything."""
    site.flags = {
        "--etcd-certfile": f"{site.pki}/apiserver-kubelet-client.crt",
        "--etcd-keyfile": f"{site.pki}/apiserver-kubelet-client.key",
        "--etcd-cafile": f"{site.pki}/ca.crt",
        "--etcd-servers": f"https://127.0.0.1:1,https://127.0.0.1:{site.port}",
    }
    assert site.finding("apiserver-etcd-client", "is accepted").state == "next-connection"
    site.flags["--etcd-servers"] = "https://127.0.0.1:1"
    assert site.finding("apiserver-etcd-client", "is accepted").state == "no-answer"


# --- kubelets --------------------------------------------------------------------------------------------------------


_SECOND = str(os.sysconf("SC_CLK_TCK"))


def run_since_boot(site: Site, component: Component, *arguments: str) -> None:
    """An entry of the process table: a second younger than the machine, and so older than every file of a test."""
    entry = site.directory / "proc/4711"
    (entry / "ns").mkdir(parents=True, exist_ok=True)
    (entry / "cmdline").write_bytes(b"\0".join(word.encode() for word in (component.value, *arguments)) + b"\0")
    (entry / "stat").write_text(f"4711 ({component.value}) S {' '.join([*['0'] * 18, _SECOND, *['0'] * 21])}\n")
    (entry / "status").write_text(f"Name:\t{component.value}\nUid:\t0\t0\t0\t0\n")
    for name, target in (("ns/net", "net:[1]"), ("root", "/")):
        (entry / name).unlink(missing_ok=True)
        (entry / name).symlink_to(target)


@pytest.mark.attack("N16")
@pytest.mark.parametrize(
    ("kubeconfig", "state"), [("scheduler.conf", "stale"), ("another.conf", "unknown"), ("", "unknown")]
)
def test_a_scheduler_with_a_configuration_file_alone_is_looked_at(site: Site, kubeconfig: str, state: str) -> None:
    """Without --kubeconfig its configuration says whether it is ours that it has read; else nothing can be said."""
    config = site.directory / "scheduler-config.yaml"
    connection = f"clientConnection:\n  kubeconfig: {site.directory / kubeconfig}\n" if kubeconfig else ""
    config.write_text(f"kind: KubeSchedulerConfiguration\n{connection}")
    site.write(Component.SCHEDULER, {"--config": str(config), "--secure-port": "0"}, site.version)
    run_since_boot(site, Component.SCHEDULER, f"--config={config}")
    assert site.finding("scheduler.conf", "has read").state == state


@pytest.mark.attack("N26")
def test_another_kubelet_than_ours_is_unknown(site: Site) -> None:
    """One with another kubeconfig has not read this one, however young it is."""
    what = f"has read {site.directory / 'kubelet.conf'}"
    run_since_boot(site, Component.KUBELET, "--kubeconfig=/etc/other/kubelet.conf")
    assert site.finding("kubelet.conf", what).state == "unknown"
    run_since_boot(site, Component.KUBELET, f"--kubeconfig={site.directory / 'kubelet.conf'}")
    assert site.finding("kubelet.conf", what).state == "stale"


def test_a_kubelets_copy_counts_more_than_its_kubeconfig(site: Site) -> None:
    """With another certificate in it the kubelet is stale, unless the kubelet got it later, from the cluster."""
    path, copied = site.directory / "kubelet.conf", site.directory / "kubelet-client-current.pem"
    what = f"has read {path}"
    assert site.finding("kubelet.conf", what).state == "unknown"  # no kubelet here, and no copy
    copied.write_bytes((site.pki / "apiserver-kubelet-client.crt").read_bytes())
    found = site.finding("kubelet.conf", what)
    assert found.state == "stale"
    assert str(copied) in found.detail
    assert site.look().stale == [Component.KUBELET]


@pytest.mark.parametrize("late_seconds", [0, 30])
def test_a_kubelet_that_rotates_by_itself_is_left_alone(site: Site, late_seconds: int) -> None:
    """Its kubeconfig refers to the file that it rotates, and that a busy disk has let it write after it had named it."""
    written = datetime.now() - timedelta(hours=1)  # noqa: DTZ005 (a kubelet names its files by local time)
    path, pem = site.directory / "kubelet.conf", site.directory / f"kubelet-client-{written:%Y-%m-%d-%H-%M-%S}.pem"
    lines = path.read_text().splitlines()
    rotated = [line for line in lines if "client-" not in line]
    path.write_text("\n".join([*rotated, f"    client-certificate: {pem}", f"    client-key: {pem}", ""]))
    pair = [(site.pki / f"apiserver-kubelet-client{suffix}").read_bytes() for suffix in (".crt", ".key")]
    pem.write_bytes(b"".join(pair))
    os.utime(pem, (written.timestamp(), written.timestamp() + late_seconds))
    findings = [f for f in site.look().findings if f.certificate == "kubelet.conf"]
    assert [f.state for f in findings] == ["current", "not-ours"]
    pem.touch()  # another program has written to it
    assert site.finding("kubelet.conf", f"has read {pem}").state == "unknown"  # no kubelet here


# --- the report ------------------------------------------------------------------------------------------------------


def test_a_component_whose_manifest_is_away_is_named(site: Site) -> None:
    """The component is named while others have their manifests; an unreadable manifest counts as missing."""
    assert site.finding("scheduler.conf").state == "no-answer"
    site.write(Component.SCHEDULER, {"--secure-port": "0"}, "v1.37.2")
    assert site.finding("scheduler.conf", "is accepted").state == "current"
    (site.directory / "manifests/kube-scheduler.yaml").write_text("- no\n- pod\n")
    assert "wanted a mapping" in site.finding("scheduler.conf").detail


@pytest.mark.parametrize("name", ["admin.conf", "kubelet.conf", "pki/etcd/healthcheck-client.crt"])
def test_a_file_that_cannot_be_used_is_named(site: Site, name: str) -> None:
    """A check that could not be made is no success."""
    (site.directory / name).write_bytes(b"something else")
    found = [f for f in site.look().findings if f.what == "can be read"]
    assert [f.state for f in found] == ["unknown"]
    assert name in found[0].detail


def test_an_unusable_flag_hides_no_other_component(site: Site) -> None:
    """The scheduler's port is no number; the API server is looked at all the same."""
    site.write(Component.SCHEDULER, {"--secure-port": "many"}, "v1.37.2")
    report = site.look()
    found = [f for f in report.findings if f.component is Component.SCHEDULER]
    assert [f.state for f in found] == ["unknown"]
    assert next(f for f in report.findings if f.certificate == "apiserver").state == "current"


def test_another_file_in_the_manifest_proves_nothing_about_ours(site: Site) -> None:
    """The API server shows what its flags name, which no renewal replaces; a link to the same file is that file."""
    other = site.directory / "other"
    other.mkdir()
    for suffix in ("crt", "key"):
        shutil.copy(site.pki / f"apiserver.{suffix}", other)
    flags = {"--tls-cert-file": "apiserver.crt", "--tls-private-key-file": "apiserver.key"}
    site.flags = {flag: str(other / name) for flag, name in flags.items()}

    def states() -> list[str]:
        return [one.state for one in site.look().findings if one.certificate == "apiserver"]

    assert states() == ["current", "unknown"]
    (other / "apiserver.crt").unlink()
    (other / "apiserver.crt").symlink_to(site.pki / "apiserver.crt")
    assert states() == ["current"]


@pytest.mark.parametrize(("tag", "state"), [("3.5.21-0", "stale"), ("3.6.4-0", "next-connection")])
def test_an_etcd_with_a_configuration_file_is_judged_by_its_age(site: Site, tag: str, state: str) -> None:
    """Its flags name no certificate, and no check leaves it out; one with flags is asked."""
    names = ("etcd-server", "etcd-peer")
    files = [f"{site.pki}/etcd/{base}.crt" for base in ("server", "peer")]
    site.write(Component.ETCD, {"--config-file": "/etc/etcd.yaml"}, tag)
    run_since_boot(site, Component.ETCD, *files)
    assert [site.finding(name, "has read").state for name in names] == [state, state]
    run_since_boot(site, Component.ETCD, "--config-file=/etc/etcd.yaml")
    assert {site.finding(name).state for name in names} == {"unknown" if state == "stale" else state}


def test_a_component_in_a_shell_is_judged_by_its_age(site: Site) -> None:
    """Its manifest has no flags of its own, and what runs has read the file of before."""
    site.write(Component.SCHEDULER, {}, site.version)
    run_since_boot(site, Component.SCHEDULER, f"--kubeconfig={site.directory / 'scheduler.conf'}")
    assert site.finding("scheduler.conf").state == "stale"
    assert site.look().stale == [Component.SCHEDULER]


def test_a_kubelets_configuration_that_can_not_be_read_is_a_finding(site: Site) -> None:
    """It says where the kubelet answers: the finding names it, and all else is looked at."""
    kubelet, config = site.directory / "kubelet", site.directory / "config.yaml"
    (kubelet / "pki").mkdir(parents=True)
    for suffix in ("crt", "key"):
        shutil.copy(site.pki / f"apiserver.{suffix}", kubelet / f"pki/kubelet.{suffix}")
    site.write(Component.APISERVER, site.api_flags(), site.version)
    settings = overridden(parse(""), site.pki, site.directory, site.directory / "state")
    proc, files = site.directory / "proc", (site.pki, site.directory, kubelet)

    def look() -> dict[str, ProofFinding]:
        found = proof.look(inventory.read(*files), settings, site.now, proc=proc, kubelet_config=config)
        return {one.what: one for one in found.findings}

    config.symlink_to(config.name)
    broken = look()
    assert (broken["is configured"].state, "its configuration" in broken["is configured"].detail) == ("unknown", True)
    assert broken[f"serves 127.0.0.1:{site.port}"].state == "current"
    config.unlink()
    config.write_text("port: 1\n")
    assert look()["serves 127.0.0.1:1"].state == "no-answer"


def test_without_static_pods_there_is_nothing_to_prove(site: Site) -> None:
    """The error says so, and the exit code is not 0."""
    arguments = ["--pki-dir", str(site.pki), "--kubeconfig-dir", str(site.directory)]
    run = CliRunner().invoke(app, ["prove", *arguments])
    assert run.exit_code == 1
    assert run.stdout == ""
    assert "nothing could be proven" in run.stderr
    with tempfile.TemporaryDirectory() as closed:
        Path(closed, "pki").mkdir()
        Path(closed, "manifests").mkdir(mode=0)
        Path(closed).chmod(0o755)
        os.seteuid(65534 if os.geteuid() == 0 else os.geteuid())
        try:
            run = CliRunner().invoke(app, ["prove", "--pki-dir", f"{closed}/pki", "--kubeconfig-dir", closed])
        finally:
            os.seteuid(os.getuid())
    assert f"in {closed}/manifests, found: Permission denied" in run.stderr
    assert "hint: run it as root (sudo)" in run.stderr


def finding(state: ProofState, component: Component | None = Component.ETCD) -> ProofFinding:
    return ProofFinding(component=component, certificate="a", what="b", state=state, detail="c\x1b[31m")


@pytest.mark.parametrize(
    ("states", "code"),
    [
        ((), 1),
        (("current", "next-connection", "not-ours"), 0),
        (("current", "unknown"), 1),
        (("unknown", "stale"), 7),
        (("refused",), 7),
        (("no-answer",), 7),
    ],
)
def test_exit_codes(states: tuple[ProofState, ...], code: int) -> None:
    """7 for what keeps a component from working on its new certificate, 1 for what could not be seen."""
    assert ProofReport(findings=tuple(map(finding, states))).exit_code == code


def test_stale_components_are_in_the_order_of_their_restart() -> None:
    """etcd comes first and the kubelet last, each once."""
    report = ProofReport(findings=tuple(finding("stale", component) for component in (*reversed(Component), None)))
    assert report.stale == list(Component)
    assert ProofReport(findings=(finding("refused"),)).stale == []


def test_looks_again_until_all_is_well_or_the_time_is_over(site: Site) -> None:
    """A component takes a moment to answer."""
    site.write(Component.ETCD, {}, "3.7.0-0")
    (site.directory / "kubelet.conf").unlink()
    for name in ("controller-manager", "scheduler"):
        (site.directory / f"{name}.conf").unlink()
    site.write(Component.APISERVER, site.api_flags(), site.version)
    settings = overridden(parse(""), site.pki, site.directory, site.directory / "state")
    site.status = 503

    def read() -> inventory.Node:
        if len(site.asked) > 3:
            site.status = 200
        return inventory.read(site.pki, site.directory)

    def within(seconds: float, *, counts: Callable[[ProofFinding], bool] = lambda _: True) -> ProofReport:
        return proof.within(read, settings, lambda: site.now, timedelta(seconds=seconds), counts=counts)

    assert within(0).exit_code == 7
    assert within(60, counts=lambda finding: finding.certificate == "apiserver").exit_code == 7
    assert within(180).exit_code == 0


def test_reads_keys_into_memory_alone(site: Site) -> None:
    """Reading keys writes no file."""
    site.write(Component.APISERVER, site.api_flags(), site.version)
    before = sorted(os.walk(site.directory))
    site.look()
    assert sorted(os.walk(site.directory)) == before


# --- CAs that were replaced -------------------------------------------------------------------------------------------


def test_an_api_server_that_is_older_than_the_ca_file_that_we_wrote_is_stale(site: Site) -> None:
    """It reads etcd's CA at its start alone; a file that another program wrote has no such check."""
    path = site.pki / "etcd/ca.crt"
    site.flags = {"--etcd-cafile": str(path)}
    run_since_boot(site, Component.APISERVER, f"--etcd-cafile={path}", f"--tls-cert-file={site.pki}/apiserver.crt")
    what = f"has read the CAs of {path}"
    assert not [one for one in site.look().findings if one.what == what]
    store = Store(site.directory / "state")
    store.prepare()
    written_file(store).put({str(path): Written.of(path)})
    assert site.finding("apiserver-etcd-client", what).state == "stale"
    written_file(store).put({str(path): Written.of(path).since(None)})  # the same CAs in another order
    assert site.finding("apiserver-etcd-client", what).state != "stale"


@pytest.mark.parametrize(
    ("version", "reads_once"),
    [("v1.34.4", True), ("v1.35.9", True), ("v1.36.0", False), ("v1.37.2", False), ("of-our-own", True)],
)
def test_an_api_server_reads_the_ca_of_kubelets_again_from_1_36_on(site: Site, version: str, reads_once: bool) -> None:
    """An older one, and one whose version is not known, is stale once we have replaced the file; without the flag none is."""
    path = site.pki / "ca.crt"
    own = f"--tls-cert-file={site.pki}/apiserver.crt"
    run_since_boot(site, Component.APISERVER, own, f"--kubelet-certificate-authority={path}")
    store = Store(site.directory / "state")
    store.prepare()
    written_file(store).put({str(path): Written.of(path)})
    site.version = version
    for flags, is_stale in (({}, False), ({"--kubelet-certificate-authority": str(path)}, reads_once)):
        site.flags = flags
        found = [one.state for one in site.look().findings if one.what == f"has read the CAs of {path}"]
        assert found == (["stale"] if is_stale else [])
