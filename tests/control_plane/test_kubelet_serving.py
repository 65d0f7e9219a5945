"""Turning `serverTLSBootstrap` on and off, with a real API server and kubelets that stand in; real nodes are in `tests/e2e`."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

from bridge.cli.app import app
from bridge.cluster.api import Api
from bridge.cluster.kubeadm import CLUSTER, KUBELETS
from bridge.control_plane import kubelet_serving
from bridge.control_plane.kubelet_serving import NotHereError, PutBackError, Report
from bridge.diagnosis.examination import of_kubelets
from bridge.errors import BridgeError, Exit, SettingsError, WaitingError
from bridge.node import kubelet
from bridge.pki.certificates import pem
from bridge.pki.csr import key_pem
from bridge.settings.load import parse
from bridge.settings.tables import Settings
from tests.kit import cluster_api
from tests.kit.cluster_api import ClusterApi
from tests.kit.issuing import Signer, name
from tests.kit.kubelet import StandInKubelet
from tests.kit.loopback import alone, free_port
from tests.kit.static_pod import attempt
from tests.kit.tripwire import kill

FLAG = "--kubelet-certificate-authority"
CONFIG = "apiVersion: kubelet.config.k8s.io/v1beta1\nhealthzPort: 0\nkind: KubeletConfiguration\n"
MANIFEST = """\
apiVersion: v1
kind: Pod
metadata:
  name: kube-apiserver
spec:
  containers:
  - command:
    - kube-apiserver
    - --advertise-address=127.0.0.1
    - --client-ca-file={pki}/ca.crt
    - --secure-port={port}
    image: registry.k8s.io/kube-apiserver:v1.37.2
    name: kube-apiserver
"""
MAPS = "/api/v1/namespaces/kube-system/configmaps"


@dataclass(kw_only=True)
class Site:
    """A cluster with two nodes: an API server, and two kubelets on this machine."""

    cluster: ClusterApi
    directory: Path
    kubelets: dict[str, StandInKubelet] = field(default_factory=dict)

    @property
    def manifest(self) -> Path:
        """The API server's, which nothing follows here."""
        return self.cluster.directory / "kubernetes/manifests/kube-apiserver.yaml"

    @property
    def ca_file(self) -> Path:
        """The cluster's CA certificate."""
        return self.cluster.pki_dir / "ca.crt"

    def signer(self) -> Signer:
        """The cluster's CA."""
        return Signer(certificate=self.cluster.ca.certificate, key=self.cluster.ca.key)

    def begin(self) -> None:
        """The cluster as kubeadm leaves it; kubelets serve what they made, and a signer would answer."""
        admin = self.cluster.client()
        for place, text in ((CLUSTER, "apiVersion: kubeadm.k8s.io/v1beta4\nkind: ClusterConfiguration\n"), (KUBELETS, CONFIG)):  # fmt: skip
            admin.ask("DELETE", place.path)
            admin.create(MAPS, {"metadata": {"name": place.name}, "data": {place.key: text}})
        self.manifest.parent.mkdir(exist_ok=True)
        self.manifest.write_text(MANIFEST.format(pki=self.cluster.pki_dir, port=self.cluster.port))
        for one in self.kubelets.values():
            one.stop()
            one.config.write_text(CONFIG)
            one.signed.write_bytes(pair(self.signer(), "127.0.0.1"))
            one.start()

    def settings(self, node: str, **more: str) -> Settings:
        """ca-bridge on a node."""
        return parse(self.text_of_settings(node, **more))

    def run(self, node: str, *arguments: str) -> Any:
        """The program on a node."""
        file = self.directory / f"{node}.toml"
        file.write_text(self.text_of_settings(node))
        return CliRunner(env={"COLUMNS": "100"}).invoke(app, [*arguments, "--force", "--config", str(file)])

    def text_of_settings(self, node: str, **more: str) -> str:
        """A settings file."""
        place = self.directory / node
        config = self.cluster.directory / "kubernetes"
        if node == "w1":
            config = place / "kubernetes"
            config.mkdir(exist_ok=True)
            conf = self.cluster.kubeconfig("system:node:w1", "system:nodes")
            (config / "kubelet.conf").write_bytes(conf.read_bytes())
        restart = {"method": '"command"', "min_interval": '"1s"', "timeout": '"3m"', **more}
        return "\n".join([
                "[node]", f'name = "{node}"', f'kubeconfig_dir = "{config}"', f'state_dir = "{place / "state"}"',
                f'pki_dir = "{self.cluster.pki_dir if node == "cp1" else self.worker_pki()}"',
                f'kubelet_dir = "{self.kubelets[node].directory}"',
                "[cluster]", 'neighbours = "ignore"', "lease = false",
                "[restart]", *(f"{key} = {value}" for key, value in restart.items()),
                "[restart.commands]", f"kubelet = {json.dumps(self.kubelets[node].command())}",
                'kube-apiserver = "true"',
            ])  # fmt: skip

    def worker_pki(self) -> Path:
        """A worker has the CA's certificate alone."""
        directory = self.directory / "w1/pki"
        directory.mkdir(exist_ok=True)
        (directory / "ca.crt").write_bytes(self.ca_file.read_bytes())
        return directory

    def switch(self, node: str, *, on: bool, seconds: float = 180, **more: str) -> Report:
        """As `ca-bridge kubelets on` or `off`."""
        return kubelet_serving.switch(
            self.settings(node, **more), on=on, force=True, wait=timedelta(seconds=seconds), tell=lambda _: None
        )

    def text(self, place: object) -> str:
        """The text of a ConfigMap."""
        return str(self.cluster.client().ask("GET", place.path).document["data"][place.key])  # type: ignore[attr-defined]

    def levels(self) -> dict[str, list[str]]:
        """By check, the levels of `doctor --kubelets`."""
        out: dict[str, list[str]] = {}
        for one in of_kubelets(self.settings("cp1"), datetime.now(UTC)):
            out.setdefault(one.check, []).append(one.level)
        return out


def pair(signer: Signer | None, address: str) -> bytes:
    """A serving certificate for an address, with its key; without a signer one that signs itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    subject = name((x509.NameOID.COMMON_NAME, "system:node:n"))
    issuer = signer.certificate.subject if signer is not None else subject
    builder = x509.CertificateBuilder(
        issuer,
        subject,
        key.public_key(),
        x509.random_serial_number(),
        now - timedelta(hours=1),
        now + timedelta(days=9),
    ).add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), critical=False)
    return pem(builder.sign(signer.key if signer is not None else key, hashes.SHA256())) + key_pem(key)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The API server and the kubelets for all tests of the file; tests beside them see no kubelet."""
    directory = tmp_path_factory.mktemp("serving")
    (directory / "api").mkdir()
    with alone(), contextlib.ExitStack() as stack:
        cluster = stack.enter_context(cluster_api.running(directory / "api"))
        site = Site(cluster=cluster, directory=directory)
        admin = cluster.client()
        kubeconfig = cluster.kubeconfig("kubernetes-super-admin", "system:masters")
        (cluster.directory / "kubernetes/admin.conf").write_bytes(kubeconfig.read_bytes())
        for node in ("cp1", "w1"):
            one = StandInKubelet(directory=directory / node / "kubelet", port=free_port())
            one.directory.mkdir(parents=True)
            one.made.write_bytes(pair(None, "127.0.0.1"))
            site.kubelets[node] = one
            stack.callback(one.stop)
            admin.create("/api/v1/nodes", {"metadata": {"name": node}})
            status = {
                "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
                "daemonEndpoints": {"kubeletEndpoint": {"Port": one.port}},
            }
            assert admin.patch(f"/api/v1/nodes/{node}/status", {"status": status}).ok
        rules = [{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get"]}]
        roles = "/apis/rbac.authorization.k8s.io/v1/namespaces/kube-system"
        meta = {"name": "kubeadm:kubelet-config", "namespace": "kube-system"}
        group = {"kind": "Group", "name": "system:nodes", "apiGroup": "rbac.authorization.k8s.io"}
        ref = {"kind": "Role", "name": meta["name"], "apiGroup": "rbac.authorization.k8s.io"}
        admin.create(f"{roles}/roles", {"metadata": meta, "rules": rules})
        admin.create(f"{roles}/rolebindings", {"metadata": meta, "subjects": [group], "roleRef": ref})
        yield site


@pytest.fixture
def site(shared: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """The cluster as kubeadm leaves it."""
    monkeypatch.setattr(kubelet, "KUBELET_CONFIG", shared.kubelets["cp1"].config)
    shared.begin()
    return shared


def test_on_and_off_node_by_node(site: Site) -> None:
    """Each waits for the others where it must; a second run has nothing to do; off leaves every text as it was."""
    manifest = site.manifest.read_text()
    assert site.levels()["kubelet-serving"] == ["warning", "warning"]
    with pytest.raises(WaitingError, match="with serverTLSBootstrap, found it without"):
        site.switch("w1", on=True)
    report = site.switch("cp1", on=True)
    assert report.exit_code == Exit.WAITING
    [left] = report.left
    assert left.startswith("w1: ")
    assert FLAG not in site.manifest.read_text()
    assert "serverTLSBootstrap: true" in site.text(KUBELETS)
    assert len(site.switch("w1", on=True).done) == 1
    report = site.switch("cp1", on=True)
    assert (report.exit_code, report.left) == (0, ())
    assert f"    - {FLAG}={site.ca_file}\n" in site.manifest.read_text()
    wanted = [{"name": FLAG.removeprefix("--"), "value": str(site.ca_file)}]
    assert yaml.safe_load(site.text(CLUSTER))["apiServer"]["extraArgs"] == wanted
    assert site.switch("cp1", on=True).done == site.switch("w1", on=True).done == ()
    # the API server is the node's own, and has no mirror pod
    one_each = {"kubelet-authority": ["ok"], "kubelet-config": ["ok"]}
    assert site.levels() == {"kubelet-serving": ["ok", "ok"], **one_each}
    with pytest.raises(WaitingError, match="without serverTLSBootstrap, found it with"):
        site.switch("w1", on=False)
    for node in ("cp1", "w1"):
        assert site.switch(node, on=False).exit_code == 0
        assert site.kubelets[node].config.read_text() == CONFIG
    assert site.manifest.read_text() == manifest
    assert site.text(KUBELETS) == CONFIG
    assert "apiServer" not in {k: v for k, v in yaml.safe_load(site.text(CLUSTER)).items() if v}


def test_the_program_says_what_it_did_and_what_comes_next(site: Site) -> None:
    """For people sentence by sentence, for programs as JSON; the exit code says whether other nodes come first."""
    run = site.run("w1", "kubelets", "on")
    assert run.exit_code == 4
    assert "hint: `ca-bridge kubelets on` on a control-plane node comes first" in run.stderr
    run = site.run("cp1", "kubelets", "on")
    assert run.exit_code == 4
    assert "the kubelet of cp1 serves 127.0.0.1:" in run.stdout
    assert "Other nodes come first:\n  w1: " in run.stdout
    run = site.run("w1", "kubelets", "on", "-o", "json")
    found = json.loads(run.stdout)
    assert (found["exitCode"], found["left"], len(found["done"])) == (0, [], 1)
    assert site.run("cp1", "kubelets", "on").exit_code == 0
    run = site.run("cp1", "kubelets", "on")
    assert (run.exit_code, run.stdout) == (0, "Nothing to do: this node and the cluster are already set.\n")
    lines = [json.loads(line) for line in (site.directory / "cp1/state/audit.jsonl").read_text().splitlines()]
    names = [one["name"] for one in lines if one["event"] == "configured"]
    assert names[-4:] == ["kubelet", "kubelet-config", "kubeadm-config", "kube-apiserver"]


def test_a_reader_who_is_gone_takes_nothing_from_the_audit_log(site: Site) -> None:
    """With a pipe that nothing reads any more the run ends at its first sentence; the next one goes on."""

    def configured() -> list[str]:
        log = site.directory / "cp1/state/audit.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [one["name"] for one in lines if one["event"] == "configured"]

    def gone(_: str) -> None:
        raise BrokenPipeError

    before = configured()
    with pytest.raises(BrokenPipeError):
        kubelet_serving.switch(site.settings("cp1"), on=True, force=True, wait=timedelta(minutes=3), tell=gone)
    assert configured() == [*before, "kubelet"]
    assert site.switch("cp1", on=True).exit_code == Exit.WAITING
    assert configured() == [*before, "kubelet", "kubelet-config"]


def test_without_a_signer_the_old_configuration_comes_back(site: Site) -> None:
    """After the wait; the cluster's own is not touched, and another certificate than the CA's is as good as none."""
    one = site.kubelets["cp1"]
    for wrong in (None, pair(None, "127.0.0.1"), pair(site.signer(), "127.0.0.2")):
        one.signed.unlink(missing_ok=True)
        if wrong is not None:
            one.signed.write_bytes(wrong)
        with pytest.raises(PutBackError, match="its old configuration again") as e:
            site.switch("cp1", on=True, seconds=0.5)
        assert e.value.exit_code == Exit.ROLLED_BACK
        assert "it has not asked for one" in str(e.value)
        assert one.config.read_text() == site.text(KUBELETS) == CONFIG


def test_a_configuration_that_the_kubelet_refuses_is_never_started_with(site: Site) -> None:
    """Neither the new one, nor one that an earlier run had written."""
    one = site.kubelets["cp1"]
    pid = one.pid
    for text in (f"{CONFIG}bad: true\n", f"{CONFIG}bad: true\nserverTLSBootstrap: true\n"):
        one.config.write_text(text)
        with pytest.raises(NotHereError, match="failed to validate kubelet configuration: bad"):
            site.switch("cp1", on=True)
        assert one.config.read_text() == text
        assert one.pid == pid
    assert site.text(KUBELETS) == CONFIG


#: What changes the node or asks the cluster; reading makes no difference to what a killed run leaves.
STEPS = ((os, "rename"), (os, "unlink"), (os, "fsync"), (Api, "ask"))


@pytest.mark.parametrize(
    ("at", "says"), [("_write", "nothing was replaced"), ("served", "was changed"), ("all_served", "was changed")]
)
def test_an_interruption_says_whether_a_file_was_changed(
    site: Site, monkeypatch: pytest.MonkeyPatch, at: str, says: str
) -> None:
    """Before the kubelet's configuration is another one nothing was replaced; after it the same command goes on."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kubelet_serving, at, interrupted)
        run = site.run("cp1", "kubelets", "on")
    config = site.kubelets["cp1"].config
    assert (run.exit_code, says in run.stderr) == (130, True), run.stderr
    assert (f"interrupted after {config}" in run.stderr) is ("serverTLSBootstrap" in config.read_text())


def killed(site: Site, at: int, *, on: bool) -> int:
    """The exit code of a run that is killed just before this step; 0: it did not come so far."""

    def work() -> None:
        count = 0

        def stepping(call: Callable[..., Any]) -> Callable[..., Any]:
            def step(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count == at:
                    kill()
                return call(*args, **kwargs)

            return step

        for owner, call in STEPS:
            setattr(owner, call, stepping(getattr(owner, call)))
        site.switch("cp1", on=on)
        (site.directory / "steps").write_text(str(count))

    return attempt(work, 0, kill)[0]


def test_a_kill_at_any_step(site: Site) -> None:
    """The next run finishes it, on and off, whatever was done by then."""
    for node in ("cp1", "w1", "cp1"):
        site.switch(node, on=True)
    ended = site.manifest.read_text()
    for on in (False, True):
        assert killed(site, 0, on=on) == 0
        steps, kills = int((site.directory / "steps").read_text()), 0
        for at in range(1 + on, steps, steps // 8):
            site.switch("cp1", on=not on)
            code = killed(site, at, on=on)
            assert code in (0, -signal.SIGKILL), at
            kills += code != 0
            yaml.safe_load(site.manifest.read_text())
            assert site.switch("cp1", on=on).exit_code == 0
            assert (site.manifest.read_text() == ended) is on, at
            assert ("serverTLSBootstrap" in site.kubelets["cp1"].config.read_text()) is on, at
            assert ("serverTLSBootstrap" in site.text(KUBELETS)) is on, at
        assert kills > 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda site: site.kubelets["cp1"].stop(), "no kubelet has"),
        (lambda site: write(site.kubelets["cp1"].config, "tlsCertFile: /a\ntlsPrivateKeyFile: /b\n"), "without tlsCertFile"),
        (lambda site: site.kubelets["cp1"].config.write_text("{kind: x}\n"), "one key a line"),
        (lambda site: site.kubelets["cp1"].config.write_text("- x\n"), "wanted a mapping"),
    ],
)  # fmt: skip
def test_a_node_on_which_it_can_not_be_done(site: Site, change: object, words: str) -> None:
    """The error says what is in the way, and nothing is changed."""
    change(site)  # type: ignore[operator]
    before = site.kubelets["cp1"].config.read_text()
    with pytest.raises(BridgeError, match=words):
        site.switch("cp1", on=True)
    assert site.kubelets["cp1"].config.read_text() == before
    assert site.text(KUBELETS) == CONFIG


def test_a_kubelet_without_its_configuration_is_no_bug(tmp_path: Path) -> None:
    """The error names the file that was wanted, or the kubelet that should have it; nothing else is done."""
    directory, config = tmp_path / "kubernetes", tmp_path / "kubelet/config.yaml"
    manifest = directory / "manifests/kube-apiserver.yaml"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(MANIFEST.format(pki=directory / "pki", port=1))
    places = f'kubeconfig_dir = "{directory}"\nkubelet_dir = "{config.parent}"\nstate_dir = "{tmp_path / "state"}"\n'
    settings = parse(f'[node]\n{places}pki_dir = "{directory / "pki"}"\n[restart]\nmethod = "static-pods"\n')

    def found() -> str:
        with pytest.raises(NotHereError) as e:
            kubelet_serving.switch(settings, on=True, force=False, wait=timedelta(), tell=lambda _: None)
        return str(e.value)

    assert found() == f"{config}: there is no such file"
    config.parent.mkdir()
    config.write_text(CONFIG)
    assert found() == f"no kubelet has {config} among its arguments"


def write(path: Path, more: str) -> None:
    """More lines in a file."""
    path.write_text(path.read_text() + more)


@pytest.mark.parametrize("on", [True, False])
def test_another_ca_file_of_the_api_server_is_not_ours_to_change(site: Site, on: bool) -> None:
    """An administrator has decided otherwise; neither kubeadm-config nor the manifest gets another value."""
    site.switch("cp1", on=True)
    site.switch("w1", on=True)
    text = site.manifest.read_text().replace("    - --client-ca", f"    - {FLAG}=/other.crt\n    - --client-ca")
    site.manifest.write_text(text)
    with pytest.raises(NotHereError, match=r"found /other\.crt"):
        site.switch("cp1", on=on)
    assert site.manifest.read_text() == text
    assert "extraArgs" not in site.text(CLUSTER)


@pytest.fixture
def second(site: Site) -> Iterator[Callable[[str], None]]:
    """Gives the API server of another control plane, by its mirror pod, these flags."""
    admin, path = site.cluster.client(), "/api/v1/namespaces/kube-system"
    admin.ask("POST", f"{path}/serviceaccounts", {"metadata": {"name": "default"}})

    def make(flag: str) -> None:
        delete()
        for node in ("cp1", "cp2"):
            made = {
                "metadata": {"name": f"kube-apiserver-{node}", "labels": {"component": "kube-apiserver"}},
                "spec": {
                    "nodeName": node,
                    "automountServiceAccountToken": False,
                    "containers": [{"name": "kube-apiserver", "image": "x", "command": ["kube-apiserver", flag]}],
                },
            }
            admin.create(f"{path}/pods", made)

    def delete() -> None:
        for node in ("cp1", "cp2"):
            admin.ask("DELETE", f"{path}/pods/kube-apiserver-{node}?gracePeriodSeconds=0")

    yield make
    delete()


def test_other_api_servers_count(site: Site, second: Callable[[str], None]) -> None:
    """While another API server verifies kubelets, as its mirror pod shows, none stops asking; this node's own manifest counts, too."""
    second("--v=2")
    assert site.levels()["kubelet-authority"] == ["note", "note"]
    for node in ("cp1", "w1", "cp1"):
        site.switch(node, on=True)
    assert site.levels()["kubelet-authority"] == ["ok", "warning"]
    second(f"{FLAG}={site.ca_file}")
    assert site.levels()["kubelet-authority"] == ["ok", "ok"]
    report = site.switch("cp1", on=False)
    assert (report.exit_code, report.left) == (4, (f"cp2: its API server still has {FLAG}",))
    assert FLAG not in site.manifest.read_text()
    assert "serverTLSBootstrap: true" in site.text(KUBELETS)
    assert sorted(site.levels()["kubelet-authority"]) == ["note", "warning"]
    site.kubelets["w1"].stop()
    assert [one.level for one in of_kubelets(site.settings("cp1"), datetime.now(UTC)) if one.about == "w1"] == ["error"]
    second("--v=2")
    assert site.switch("cp1", on=False).exit_code == 0
    assert site.text(KUBELETS) == CONFIG


def test_where_kubelets_are_verified_a_late_signer_is_waited_for(site: Site) -> None:
    """A pair of the kubelet's own making would be of no use there: it goes on asking."""
    for node in ("cp1", "w1", "cp1"):
        site.switch(node, on=True)
    site.kubelets["cp1"].signed.unlink()
    site.kubelets["cp1"].stop()
    site.kubelets["cp1"].start()
    with pytest.raises(BridgeError, match="wanted it to serve a certificate") as e:
        site.switch("cp1", on=True, seconds=0.2)
    assert not isinstance(e.value, PutBackError)
    assert "serverTLSBootstrap: true" in site.kubelets["cp1"].config.read_text()


def test_without_a_way_to_restart_nothing_begins(site: Site) -> None:
    """It is a settings error, and no half-way house."""
    with pytest.raises(SettingsError, match=r"restart\.method"):
        site.switch("cp1", on=True, method='"none"')
    assert site.kubelets["cp1"].config.read_text() == CONFIG


def test_a_kubelet_that_is_down_is_missed(site: Site) -> None:
    """A node that can't be seen does not count as right: the API server verifies no kubelet yet."""
    site.switch("cp1", on=True)
    site.switch("w1", on=True)
    site.kubelets["w1"].stop()
    report = site.switch("cp1", on=True)
    assert [text.partition(":")[0] for text in report.left] == ["w1"]
    assert FLAG not in site.manifest.read_text()
    assert sorted(site.levels()["kubelet-serving"]) == ["ok", "warning"]
