"""
Serving certificates of kube-controller-manager and kube-scheduler: on, renewed, off; half done, killed, and hostile.

kubeadm's manifests, the CA and the files are real; `openssl s_server` is started in the place of each component, by a
command that reads the manifest. The components themselves and the cluster are in `tests/e2e/test_changes_node.py`.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from bridge.cli.options import utc_now
from bridge.cluster.api import Api, NoAnswerError, Reply
from bridge.node import inventory, kubelet
from bridge.node.inventory import Item, Node
from bridge.node.manifest_flags import edited
from bridge.node.manifests import TLS_CERTIFICATE, TLS_KEY, path_of
from bridge.node.yamltree import document
from bridge.pki.certificates import load_pem_certificates, san_entries
from bridge.renewal import serving
from bridge.renewal.transaction import put_back_and_retire
from bridge.settings import load
from bridge.specs import SPECS, Component
from bridge.state import install, static_pods
from tests.kit.cas import Bridge, add_openssl
from tests.kit.loopback import free_port
from tests.kit.pki import KubeadmPki, kubeadm_pki
from tests.kit.renewing import Quiet

MANAGER, SCHEDULER = Component.CONTROLLER_MANAGER, Component.SCHEDULER
NAMES = ["controller-manager-server", "scheduler-server"]

PROGRAM = """
import sys
from pathlib import Path
from bridge.node import kubelet
kubelet.KUBELET_CONFIG = Path(sys.argv.pop(1))
from bridge.entry import main
sys.argv[0] = "ca-bridge"
sys.exit(main())
"""

#: Reads the manifest, and serves as it says.
RESTART = """\
#!/bin/sh
set -eu
name=$CA_BRIDGE_COMPONENT; root={root}
manifest=$root/etc/kubernetes/manifests/$name.yaml
[ ! -e {site}/$name.pid ] || kill "$(cat {site}/$name.pid)" 2>/dev/null || true
flag() {{ sed -n "s/^ *- --$1=//p" "$manifest"; }}
cert=$(flag tls-cert-file); key=$(flag tls-private-key-file)
while openssl s_client -connect 127.0.0.1:"$(flag secure-port)" </dev/null >/dev/null 2>&1; do sleep 0.05; done
[ ! -e {site}/breaks ] || exit 1
setsid openssl s_server -quiet -www -accept 127.0.0.1:"$(flag secure-port)" \\
  -cert "${{cert:-{site}/own.crt}}" -key "${{key:-{site}/own.key}}" >{site}/$name.log 2>&1 </dev/null &
echo $! >{site}/$name.pid
until openssl s_client -connect 127.0.0.1:"$(flag secure-port)" </dev/null >/dev/null 2>&1; do
  kill -0 $! 2>/dev/null || break
  sleep 0.05
done
"""


APISERVER = """\
spec:
  containers:
  - command:
    - kube-apiserver
    - --advertise-address=127.0.0.1
    - --bind-address=127.0.0.1
    - --secure-port={port}
    - --tls-cert-file={pki}/apiserver.crt
    - --tls-private-key-file={pki}/apiserver.key
"""


@dataclass(kw_only=True)
class Site:
    """A control-plane node's files with ca-bridge, and two servers in the place of its components."""

    pki: KubeadmPki
    bridge: Bridge
    directory: Path
    before: dict[Component, bytes] = field(default_factory=dict)

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Run the installed program; no kubelet is here, whose health would count."""
        paths = [str(self.directory / "kubelet.yaml"), *args, "--config", str(self.bridge.config)]
        words = [sys.executable, "-c", PROGRAM, *paths]
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=400)

    @property
    def node(self) -> Node:
        """As the inventory sees it now."""
        return inventory.read(self.pki.pki_dir, self.pki.kubeconfig_dir)

    def item(self, name: str) -> Item:
        """One certificate of it."""
        [found] = [one for one in self.node.items if one.spec.name == name]
        return found

    def pair(self, name: str) -> tuple[Path, Path]:
        """Our own place of certificate and key."""
        return self.pki.pki_dir / f"{SPECS[name].base}.crt", self.pki.pki_dir / f"{SPECS[name].base}.key"

    def manifest(self, component: Component) -> bytes:
        """A manifest's text now."""
        return path_of(component, self.pki.kubeconfig_dir).read_bytes()

    def edit(self, component: Component, **flags: str | None) -> None:
        """Other flags of a component."""
        named = {f"--{name.replace('_', '-')}": value for name, value in flags.items()}
        path_of(component, self.pki.kubeconfig_dir).write_bytes(edited(self.manifest(component), component, named))

    def start(self, component: Component) -> None:
        """Start a component anew, as its manifest says."""
        environment = {**os.environ, "CA_BRIDGE_COMPONENT": component.value}
        subprocess.run([self.directory / "restart"], env=environment, check=True)

    def findings(self, name: str) -> list[tuple[str, str, str]]:
        """Level, check and text of what `doctor` says of a certificate."""
        found = json.loads(self.run("doctor", "-o", "json").stdout)["findings"]
        return [(one["level"], one["check"], one["text"]) for one in found if name in one["about"]]

    def served(self) -> dict[str, str]:
        """By certificate, the states of the two ports."""
        findings = json.loads(self.run("prove", "-o", "json").stdout)["findings"]
        return {one["certificate"]: one["state"] for one in findings
                if one["component"] in (MANAGER.value, SCHEDULER.value) and one["what"].startswith("serves")}  # fmt: skip

    def serial(self, name: str) -> int:
        """The certificate's that is on disk."""
        return load_pem_certificates(self.pair(name)[0].read_bytes())[0].serial_number


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> KubeadmPki:
    """Certificates and manifests by kubeadm."""
    pki = kubeadm_pki(tmp_path_factory.mktemp("serving") / "node", algorithm="ECDSA-P256")
    pki.run_kubeadm("init", "phase", "control-plane", "all")
    return pki


@pytest.fixture
def site(made: KubeadmPki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A copy of it, whose two components serve certificates of their own making."""
    shutil.copytree(made.root, tmp_path / "node", symlinks=True)
    pki = KubeadmPki(root=tmp_path / "node", external=True, version="1.37")
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    add_openssl(bridge, "ca")
    site = Site(pki=pki, bridge=bridge, directory=tmp_path)
    (tmp_path / "kubelet.yaml").write_text("healthzPort: 0\n")
    monkeypatch.setattr(kubelet, "KUBELET_CONFIG", tmp_path / "kubelet.yaml")
    restart = tmp_path / "restart"
    restart.write_text(RESTART.format(root=pki.root, site=tmp_path))
    restart.chmod(0o755)
    pair = ["-keyout", str(tmp_path / "own.key"), "-out", str(tmp_path / "own.crt"), "-subj", "/CN=own", "-days", "9"]
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    subprocess.run(["openssl", "req", "-x509", *curve, "-nodes", *pair], check=True, capture_output=True)
    bridge.add("restart", {"method": "command", "min_interval": "1s", "prove_for": "1s", "timeout": "3m"})
    bridge.add("restart.commands", {one.value: str(restart) for one in (MANAGER, SCHEDULER)})
    bridge.add("cluster", {"lease": False, "neighbours": "ignore"})
    for component in (MANAGER, SCHEDULER):
        site.edit(component, secure_port=str(free_port()))
        site.before[component] = site.manifest(component)
        site.start(component)
    apiserver = APISERVER.format(port=free_port(), pki=pki.pki_dir)
    path_of(Component.APISERVER, pki.kubeconfig_dir).write_text(apiserver)
    site.start(Component.APISERVER)
    yield site
    for found in tmp_path.glob("*.pid"):
        subprocess.run(["kill", found.read_text().strip()], check=False, capture_output=True)


pytestmark = pytest.mark.kube


def test_a_node_without_them_is_as_before(site: Site) -> None:
    """No row, nothing due, nothing in `all`; `doctor` says whose certificates are served."""
    assert [(site.item(name).state, site.item(name).named) for name in NAMES] == [("missing", False)] * 2
    for args in (("check-expiration",), ("plan", "all")):
        assert not any(name in (site.run(*args).stdout) for name in NAMES)
    for name in NAMES:
        [(level, _, text)] = site.findings(name)
        assert (level, "made itself" in text) == ("ok", True)
    assert site.served() == {"(its own)": "not-ours"}
    more, plain = (site.run("setup", "vault", "--authority=ca", *args).stdout for args in (["--serving-certs"], []))
    assert "scheduler-server" in more
    assert "scheduler-server" not in plain


def test_on_renewed_and_off_again(site: Site) -> None:
    """Made, named, served and proven; renewed in place; then everything is as it was, byte by byte."""
    run = site.run("serving-certs", "on")
    assert "no answer from the cluster's API" in run.stderr  # kubeadm-config comes last
    assert site.served() == dict.fromkeys(NAMES, "current")
    for name in NAMES:
        item = site.item(name)
        assert (item.named, item.spec.optional, item.key_trouble) == (True, False, None)
        assert {("DNS", "cp-1"), ("DNS", "localhost"), ("IP", "127.0.0.1")} <= san_entries(item.certificates[0])
        assert (item.key_path or Path()).stat().st_mode & 0o777 == 0o600
        assert item.certificate_path.parent.stat().st_mode & 0o777 == 0o755
    pod = yaml.safe_load(site.manifest(SCHEDULER))["spec"]
    mounted = [one["mountPath"] for one in pod["containers"][0]["volumeMounts"]]
    assert str(site.pair("scheduler-server")[0].parent) in mounted
    old = {name: site.serial(name) for name in NAMES}
    assert "scheduler-server" in site.run("check-expiration").stdout
    renewed = site.run("renew", *NAMES)
    assert renewed.returncode == 0, renewed.stderr
    assert not old.items() & {name: site.serial(name) for name in NAMES}.items()
    assert site.served() == dict.fromkeys(NAMES, "current")
    more = site.run("renew", "--add-san", "scheduler-server=metrics.example.com")
    assert more.returncode == 0, more.stderr
    assert ("DNS", "metrics.example.com") in san_entries(site.item("scheduler-server").certificates[0])

    done = serving.take_out(load.load(site.bridge.config), timedelta())
    assert (done.exit_code, len(done.done)) == (0, 2)
    assert {component: site.manifest(component) for component in site.before} == site.before
    assert site.served() == {"(its own)": "not-ours"}
    assert not any(path.parent.exists() for name in NAMES for path in site.pair(name))
    assert serving.take_out(load.load(site.bridge.config), timedelta()).done == ()


# --- half done ---------------------------------------------------------------------------------------------------------


def test_a_run_that_ended_before_the_restart_is_gone_on_with(site: Site) -> None:
    """The pair is there and the manifest does not name it: `prove` and `doctor` say so, and `on` goes on."""
    assert site.run("renew", "scheduler-server", "--no-restart").returncode == 0
    item, old = site.item("scheduler-server"), site.serial("scheduler-server")
    assert (item.state, item.named, item.spec.reloaded) == ("present", False, False)
    assert site.served() == {"(its own)": "not-ours", "scheduler-server": "stale"}
    assert ("warning", "serving-certificate") in [found[:2] for found in site.findings("scheduler-server")]
    site.run("serving-certs", "on")
    assert site.served() == dict.fromkeys(NAMES, "current")
    assert site.serial("scheduler-server") == old  # no CA was asked again


def test_half_a_pair_on_disk_is_never_named(site: Site) -> None:
    """With another's key the component would not start: `on` has a new pair made."""
    assert site.run("renew", "scheduler-server", "--no-restart").returncode == 0
    shutil.copy2(site.directory / "own.key", site.pair("scheduler-server")[1])
    site.run("restart", "kube-scheduler")
    assert site.manifest(SCHEDULER) == site.before[SCHEDULER]
    old = site.serial("scheduler-server")
    site.run("serving-certs", "on")
    site.run("serving-certs", "on")
    assert site.serial("scheduler-server") != old
    assert site.served() == dict.fromkeys(NAMES, "current")


def test_a_component_that_does_not_come_back_with_a_pair_that_was_there_goes_on_without(site: Site) -> None:
    """Its manifest is as it was; the pair stays for the next try."""
    assert site.run("renew", "scheduler-server", "--no-restart").returncode == 0
    (site.directory / "breaks").touch()
    assert site.run("serving-certs", "on").returncode != 0
    assert site.manifest(SCHEDULER) == site.before[SCHEDULER]
    assert site.pair("scheduler-server")[0].exists()


def test_a_component_that_does_not_come_back_gets_its_own_certificate_back(site: Site) -> None:
    """The flags leave the manifest before the files go: a manifest never names a file that is not there."""
    (site.directory / "breaks").touch()
    run = site.run("serving-certs", "on")
    assert run.returncode not in (0, 1, 2), run.stderr
    assert {component: site.manifest(component) for component in site.before} == site.before
    assert not any(path.exists() for name in NAMES for path in site.pair(name))


def test_a_rollback_of_the_first_one_takes_the_flags_out(site: Site) -> None:
    """Also a rollback by hand removes them; and its own rollback brings the pair back, which a restart names again."""
    site.run("serving-certs", "on")
    run = site.run("rollback")
    assert run.returncode == 0, run.stderr
    assert site.manifest(SCHEDULER) == site.before[SCHEDULER]
    assert not site.pair("scheduler-server")[0].exists()
    assert site.run("rollback").returncode == 0
    assert (site.item("scheduler-server").state, site.item("scheduler-server").named) == ("present", False)
    restarted = site.run("restart", "kube-scheduler", "--force")
    assert restarted.returncode == 0, restarted.stderr
    assert site.served() == dict.fromkeys(NAMES, "current")


def test_a_rollback_that_fails_leaves_the_flags(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was replaced, as it says: the components go on with their pairs; the same rollback then takes one away."""
    site.run("serving-certs", "on")
    before, names = {one: site.manifest(one) for one in (MANAGER, SCHEDULER)}, TLS_CERTIFICATE.encode()
    settings = load.load(site.bridge.config)

    def read_only(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(site.pki.pki_dir))

    for module, name in ((install, "_stage"), (static_pods, "exchange")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, read_only)
            with pytest.raises(install.InstallError, match=r"nothing was replaced: .*: Read-only file system"):
                put_back_and_retire(settings, None, utc_now, Quiet(), force=False, wait=timedelta())
        assert {one: site.manifest(one) for one in before} == before
        assert all(names in text for text in before.values())
    put_back_and_retire(settings, None, utc_now, Quiet(), force=False, wait=timedelta())
    assert names not in site.manifest(SCHEDULER)  # the newest installation's


# --- hostile and odd ---------------------------------------------------------------------------------------------------


def test_a_manifest_that_names_no_file_that_is_there(site: Site) -> None:
    """The component would not start: an error each night, and its name makes the pair anew, where the flags say."""
    pair = site.directory / "gone"
    pair.mkdir()
    site.edit(SCHEDULER, tls_cert_file=str(pair / "a.crt"), tls_private_key_file=str(pair / "a.key"))
    assert (site.item("scheduler-server").state, site.item("scheduler-server").spec.optional) == ("missing", False)
    night = site.run("renew")
    assert night.returncode == 1
    assert "`ca-bridge renew scheduler-server` makes it anew" in night.stderr
    assert ("error", "certificate-missing") in [found[:2] for found in site.findings("scheduler-server")]
    run = site.run("renew", "scheduler-server", "--no-restart")
    assert run.returncode == 0, run.stderr
    assert load_pem_certificates((pair / "a.crt").read_bytes())
    refused = site.run("serving-certs", "on")
    assert refused.returncode == 2
    assert "an operator put it there" in refused.stderr


def test_an_operators_own_certificate_stays(site: Site) -> None:
    """One that another CA signed is shown, and neither renewed nor replaced, by whatever name."""
    own = {"tls_cert_file": str(site.directory / "own.crt"), "tls_private_key_file": str(site.directory / "own.key")}
    site.edit(SCHEDULER, **own)
    before = (site.directory / "own.crt").read_bytes()
    assert site.item("scheduler-server").foreign
    assert site.run("renew").returncode == 0
    named = site.run("renew", "scheduler-server")
    assert "it stays" in named.stderr
    for verb in ("on", "off"):
        assert site.run("serving-certs", verb).returncode == 2
    assert (site.directory / "own.crt").read_bytes() == before
    assert [found[1] for found in site.findings("scheduler-server")] == ["serving-certificate"]


@pytest.mark.parametrize("base", ["apiserver", "controller-manager/server"])
def test_a_pair_of_another_certificate_is_that_ones_alone(site: Site, base: str) -> None:
    """It has one name, is renewed under it, and nothing hinders that; the other component's port is shown by its file."""
    site.run("serving-certs", "on")
    certificate, key = (f"{site.pki.pki_dir / base}.{suffix}" for suffix in ("crt", "key"))
    site.edit(SCHEDULER, tls_cert_file=certificate, tls_private_key_file=key)
    site.start(SCHEDULER)
    assert [
        one.spec.name for one in site.node.items if one.obstacle is not None or one.spec.name == "scheduler-server"
    ] == []
    assert site.served()[certificate] == "current"


def test_half_a_pair_is_an_error(site: Site) -> None:
    """A certificate's flag without the key's."""
    site.edit(SCHEDULER, tls_cert_file="/etc/kubernetes/pki/scheduler/server.crt")
    assert f"the manifest has {TLS_CERTIFICATE}, and no {TLS_KEY}" in (site.item("scheduler-server").trouble or "")
    assert site.run("renew").returncode == 1


def test_a_manifest_that_can_not_be_edited_costs_nothing(site: Site) -> None:
    """No CA is asked, no file is made; nor with restarts that people make."""
    path = path_of(SCHEDULER, site.pki.kubeconfig_dir)
    path.write_bytes(path.read_bytes().replace(b"    - kube-scheduler\n", b"    - >-\n      kube-scheduler\n"))
    path.write_bytes(path.read_bytes().replace(b"  volumes:\n", b"  moved:\n"))
    run = site.run("serving-certs", "on")
    assert run.returncode == 2, run.stderr
    assert "can't change its flags" in run.stderr
    assert not any(path.exists() for name in NAMES for path in site.pair(name))
    text = site.bridge.config.read_text().replace('method = "command"', 'method = "none"')
    site.bridge.config.write_text(text)
    by_hand = site.run("serving-certs", "on")
    assert (by_hand.returncode, "restart.method" in by_hand.stderr) == (2, True)
    assert site.run("renew", "scheduler-server").returncode == 1


# --- kubeadm-config ----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Cluster:
    """An API with kubeadm-config, and pods of which only some have flags."""

    text: str = "apiVersion: kubeadm.k8s.io/v1beta4\nkind: ClusterConfiguration\nscheduler: {}\n"
    without: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()  #: Nodes without a pod.
    unlabelled: bool = False  #: No node is a control plane by its label.
    writes: int = 0

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Reply:
        """As `Api.ask`."""
        if "/pods" in path:
            pods = [{"spec": {"nodeName": name, "containers": [{"command": ["x"]}]}} for name in self.without]
            pods.append({"spec": {"nodeName": "cp-9", "containers": [{"command": ["x", "--tls-cert-file=/a"]}]}})
            return Reply(status=200, body=json.dumps({"items": pods}).encode())
        if "/nodes" in path:
            nodes = [
                {"metadata": {"name": name}} for name in (*self.without, *self.gone, "cp-9") if not self.unlabelled
            ]
            return Reply(status=200, body=json.dumps({"items": nodes}).encode())
        if method == "PUT":
            self.writes, self.text = self.writes + 1, (body or {})["data"]["ClusterConfiguration"]
        data = {"metadata": {"resourceVersion": "1"}, "data": {"ClusterConfiguration": self.text}}
        return Reply(status=200, body=json.dumps(data).encode())

    def get(self, path: str) -> Mapping[str, Any]:
        """As `Api.get`."""
        return self.ask("GET", path).found(path)


def test_kubeadm_config_names_the_pairs_when_every_node_has_them(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier one would write manifests that name files that are not there, at the next upgrade or join."""
    cluster, settings = Cluster(without=("cp-1", "cp-2"), gone=("cp-3",)), load.load(site.bridge.config)
    monkeypatch.setattr(Api, "of_node", lambda *_: cluster)
    before, both = cluster.text, (MANAGER, SCHEDULER)
    settings = dataclasses.replace(settings, node=dataclasses.replace(settings.node, name="cp-1"))
    assert "has run on cp-2, cp-3" in serving.keep(settings, both, timedelta())
    assert cluster.text == before
    cluster.unlabelled = True  # which says nothing of what all nodes have
    with pytest.raises(NoAnswerError, match=r"there are no /api/v1/nodes.* to be seen"):
        serving.keep(settings, both, timedelta())
    assert cluster.text == before
    cluster.unlabelled, cluster.without, cluster.gone = False, ("cp-1",), ()
    assert "kubeadm-config names them:" in serving.keep(settings, both, timedelta())
    assert "names them already" in serving.keep(settings, both, timedelta())
    assert cluster.writes == 1
    found = document(cluster.text).plain()
    assert found["scheduler"]["extraVolumes"][0]["mountPath"] == str(site.pki.pki_dir / "scheduler")
    assert "extraVolumes" not in found["controllerManager"]
    assert serving.forget(settings, both, timedelta())
    assert not serving.forget(settings, both, timedelta())
    audit = (site.bridge.directory / "state/audit.jsonl").read_text().splitlines()
    assert [one["event"] for line in audit if (one := json.loads(line)).get("name") == "kubeadm-config"] == [
        "configured"
    ] * 2
    left = document(cluster.text).plain()
    assert {key: value for key, value in left.items() if value} == {
        key: value for key, value in document(before).plain().items() if value
    }
