"""Certificates that are missing are made: from the real kubeadm's configuration, and never by guess."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from bridge.contract import SignRequest
from bridge.node import kubeconfig
from bridge.pki.certificates import attributes, load_pem_certificates, pem, san_entries
from bridge.pki.csr import key_block
from bridge.specs import SPECS
from tests.kit import apiserver, approval
from tests.kit.cas import Bridge, add_openssl, live_certificates
from tests.kit.issuing import Signer
from tests.kit.members import Place
from tests.kit.pki import NODE, KubeadmPki, kubeadm_pki

pytestmark = pytest.mark.kube

KUBELET_CLIENT = "apiserver-kubelet-client"
LISTED = [name for name, spec in SPECS.items() if spec.listed]
BINDINGS = {
    "kubeadm:apiserver-kubelet-client": ("system:kubelet-api-admin", "User", "kube-apiserver-kubelet-client"),
    "kubeadm:cluster-admins": ("cluster-admin", "Group", "kubeadm:cluster-admins"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> KubeadmPki:
    """A control plane of the real kubeadm 1.37: certificates, kubeconfigs, manifests."""
    pki = kubeadm_pki(tmp_path_factory.mktemp("made"), algorithm="ECDSA-P256")
    pki.run_kubeadm("init", "phase", "control-plane", "all")
    pki.run_kubeadm("init", "phase", "etcd", "local")
    return pki


@dataclass(kw_only=True)
class Site:
    """A copy of it, with `openssl ca` directories."""

    pki: KubeadmPki
    bridge: Bridge

    def path(self, name: str) -> Path:
        """The file that holds the certificate."""
        spec = SPECS[name]
        return self.pki.kubeconfig_dir / spec.base if spec.kubeconfig else self.pki.pki_dir / f"{spec.base}.crt"

    def remove(self, *names: str) -> None:
        """Certificate and key."""
        for name in names:
            self.path(name).unlink()
            self.path(name).with_suffix(".key").unlink(missing_ok=True)

    def renew(self, *args: str | Path) -> subprocess.CompletedProcess[str]:
        """The installed program."""
        return self.bridge.run("renew", *map(str, args))

    @property
    def config(self) -> list[str]:
        """kubeadm's own configuration."""
        return ["--kubeadm-config", str(self.pki.config_file)]

    def cluster_configuration(self) -> str:
        """As the ConfigMap has it: one document, without the node's part."""
        return self.pki.config_file.read_text().partition("---\n")[2]

    def write_config(self, name: str, change: Callable[[str], str]) -> list[str]:
        """Another configuration."""
        path = self.bridge.directory / name
        path.write_text(change(self.pki.config_file.read_text()))
        return ["--kubeadm-config", str(path)]


@pytest.fixture
def site(made: KubeadmPki, tmp_path: Path) -> Site:
    root = tmp_path / "node"
    shutil.copytree(made.root, root, symlinks=True)
    pki = KubeadmPki(root=root, external=True, version="1.37")
    for path in pki.kubeconfig_dir.glob("manifests/*.yaml"):
        path.write_text(path.read_text().replace("/etc/kubernetes", str(pki.kubeconfig_dir)))
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    bridge.add("audit", {"syslog": False})
    for authority in ("ca", "etcd-ca", "front-proxy-ca"):
        add_openssl(bridge, authority)
    return Site(pki=pki, bridge=bridge)


def says(certificate: x509.Certificate) -> tuple[list[tuple[str, str]], set[tuple[str, str]]]:
    return sorted(attributes(certificate.subject)), san_entries(certificate)


def without_data(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if "client-" not in line]


def assert_private(path: Path, certificate: x509.Certificate) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    key = kubeconfig.key_data(path.read_bytes()) if path.suffix == ".conf" else path.read_bytes()
    assert load_pem_private_key(key or b"", None).public_key() == certificate.public_key()


def test_every_certificate_is_made_as_kubeadm_had_made_it(site: Site) -> None:
    """All eleven at once: names, usages, key, modes, kubeconfigs byte by byte; and the real kubeadm takes them."""
    before = live_certificates(site.pki)
    texts = {name: without_data(site.path(name)) for name in LISTED if name.endswith(".conf")}
    site.remove(*LISTED)
    run = site.renew(*LISTED, *site.config)
    assert run.returncode == 0, run.stderr
    after = live_certificates(site.pki)
    assert {name: says(after[name]) for name in LISTED} == {name: says(before[name]) for name in LISTED}
    for name in LISTED:
        path = site.path(name)
        assert after[name] != before[name]
        assert type(after[name].public_key()) is type(before[name].public_key())
        if name in texts:
            assert without_data(path) == texts[name]
            assert_private(path, after[name])
        else:
            assert stat.S_IMODE(path.stat().st_mode) == 0o644
            assert_private(path.with_suffix(".key"), after[name])
    table = site.pki.run_kubeadm("certs", "check-expiration").stdout
    assert table.count("364d") == len(LISTED)
    assert "MISSING" not in table


def test_the_operator_reads_where_each_name_comes_from(site: Site) -> None:
    """The plan says so before anything is done, and so does the run; a rollback takes the file away again."""
    site.remove("apiserver")
    plan = site.bridge.run("plan", "apiserver", *site.config)
    assert plan.returncode == 3
    for text in (str(site.pki.config_file), "DNS:zz.example.com", "v1.37.2", "kube-apiserver.yaml"):
        assert text in plan.stderr
    assert "make" in plan.stdout
    run = site.renew("apiserver", *site.config)
    assert run.returncode == 0
    assert "made anew from" in run.stderr
    assert site.bridge.run("rollback").returncode == 0
    assert not site.path("apiserver").exists()
    assert not site.path("apiserver").with_suffix(".key").exists()


@pytest.mark.parametrize("bound", [True, False])
def test_the_cluster_itself_tells(site: Site, bound: bool) -> None:
    """kubeadm-config by the API server that still runs; and whether the new certificate would have any rights."""
    before = live_certificates(site.pki)[KUBELET_CLIENT]
    site.remove(KUBELET_CLIENT)
    place = Place(name=NODE, address="127.0.0.1", directory=site.pki.root / "etc", cas={})
    state = apiserver.State(config=site.cluster_configuration(), bindings=BINDINGS if bound else {})
    with local_apiserver(site, place, state):
        run = site.renew(KUBELET_CLIENT)
    if not bound:
        assert (run.returncode, site.path(KUBELET_CLIENT).exists()) == (5, False)
        assert "kubectl create clusterrolebinding kubeadm:apiserver-kubelet-client" in run.stderr
        return
    assert run.returncode == 0, run.stderr
    assert "ConfigMap kube-system/kubeadm-config" in run.stderr
    assert says(live_certificates(site.pki)[KUBELET_CLIENT]) == says(before)


@contextlib.contextmanager
def local_apiserver(site: Site, place: Place, state: apiserver.State) -> Iterator[None]:
    """The double on loopback, where admin.conf leads for the time being: its certificate has that address."""
    add = site.renew("apiserver", "--add-san", "apiserver=127.0.0.1")
    assert add.returncode == 0, add.stderr
    with apiserver.serving(place, state):
        path = site.path("admin.conf")
        path.write_text(path.read_text().replace("https://api.example.com:6443", f"https://127.0.0.1:{state.port}"))
        yield


def stable(text: str) -> str:
    return text.replace("kubernetesVersion: v1.37.2", "kubernetesVersion: stable-1")


def test_never_by_guess(site: Site) -> None:
    """A request without a source, with a source for another node, or without a fact is neither sent nor written."""
    site.remove(KUBELET_CLIENT, "apiserver")
    cases = [
        (1, [], "--kubeadm-config FILE"),
        (2, ["--kubeadm-config", "/nowhere/kubeadm.yaml"], "found: no file"),
        (1, site.write_config("name.yaml", lambda text: text.replace("cp-1", "cp-9")), "is for node cp-9"),
        (1, site.write_config("other.yaml", lambda text: text.replace("192.0.2.10", "192.0.2.9")), "advertise address"),
        (2, site.write_config("half.yaml", lambda text: text.partition("---")[0]), "no ClusterConfiguration"),
        (2, site.write_config("broken.yaml", lambda text: text + "\n\t{"), "can't be used"),
        (1, site.write_config("bad.yaml", lambda text: text.replace("zz.example.com", "bad name!")), "bad name!"),
    ]
    for code, arguments, text in cases:
        run = site.renew("apiserver", *arguments)
        assert (run.returncode, text in run.stderr) == (code, True), run.stderr
        assert "hint:" in run.stderr
    for manifest in site.pki.kubeconfig_dir.glob("manifests/*.yaml"):
        manifest.unlink()
    run = site.renew(KUBELET_CLIENT, *site.write_config("stable.yaml", stable))
    assert (run.returncode, "Kubernetes' version" in run.stderr) == (1, True), run.stderr
    assert not site.path(KUBELET_CLIENT).exists()
    assert not site.path("apiserver").exists()
    assert site.renew(KUBELET_CLIENT, *site.config).returncode == 0  # the twin


@pytest.mark.parametrize(
    ("version", "group"),
    [("v1.28.9", {"system:masters"}), ("v1.34.4", {"kubeadm:cluster-admins"}), ("v1.36.1", set())],
)
def test_the_groups_are_the_versions(site: Site, version: str, group: set[str]) -> None:
    """The groups of apiserver-kubelet-client follow the configuration's version, which is named."""
    site.remove(KUBELET_CLIENT)
    run = site.renew(KUBELET_CLIENT, *site.write_config("v.yaml", lambda text: text.replace("v1.37.2", version)))
    assert run.returncode == 0, run.stderr
    assert version in run.stderr
    subject = attributes(live_certificates(site.pki)[KUBELET_CLIENT].subject)
    assert {value for oid, value in subject if oid == "2.5.4.10"} == group


def test_cron_makes_no_certificate_that_was_not_named(site: Site) -> None:
    """`renew` and `renew all` fail with exit 1 as before, and say how it is made; super-admin.conf may be missing."""
    site.remove(KUBELET_CLIENT, "super-admin.conf")
    for names in ([], ["all"]):
        run = site.renew(*names, "--no-restart", *site.config)
        assert run.returncode == 1
        assert f"`ca-bridge renew {KUBELET_CLIENT}` makes it anew" in run.stderr
        assert not site.path(KUBELET_CLIENT).exists()
        assert not site.path("super-admin.conf").exists()
    run = site.renew("super-admin.conf", *site.config)
    assert run.returncode == 7, run.stderr  # for what `renew all --no-restart` has left to an operator
    assert ("2.5.4.10", "system:masters") in attributes(live_certificates(site.pki)["super-admin.conf"].subject)
    assert site.renew("kubelet.conf", *site.config).returncode == 7  # it is there


@pytest.mark.parametrize("has_run", [True, False])
def test_a_kubelets_kubeconfig_is_made(site: Site, has_run: bool) -> None:
    """It refers to the kubelet's own file, which gets the pair, once a kubelet has run here; otherwise it is as kubeadm writes it."""
    directory, conf = site.pki.root / "var/lib/kubelet/pki", site.path("kubelet.conf")
    site.bridge.tables[0] += f'kubelet_dir = "{directory.parent}"\n'
    site.bridge.add("renewal", {"key": "same"})
    before, texts = live_certificates(site.pki)["kubelet.conf"], without_data(conf)
    if has_run:
        directory.mkdir(parents=True)
    conf.unlink()
    run = site.renew("kubelet.conf", *site.config)
    assert run.returncode == 0, run.stderr
    assert "made anew from" in run.stderr
    current = directory / "kubelet-client-current.pem"
    parsed = kubeconfig.parse(conf.read_bytes())
    if has_run:
        assert (parsed.certificate_file, parsed.key_file, parsed.certificate_data) == (str(current), str(current), None)
        assert current.is_symlink()
        assert stat.S_IMODE(current.stat().st_mode) == 0o600
    made = load_pem_certificates(current.read_bytes() if has_run else parsed.certificate_data or b"")[0]
    assert says(made) == says(before)
    key = current.read_bytes() if has_run else kubeconfig.key_data(conf.read_bytes()) or b""
    assert load_pem_private_key(key_block(key), None).public_key() == made.public_key()
    assert stat.S_IMODE(conf.stat().st_mode) == 0o600
    assert without_data(conf) == [line.replace("api.example.com", "192.0.2.10") for line in texts]
    assert site.renew("kubelet.conf").returncode == 0  # which is a renewal like all others
    assert site.bridge.run("rollback").returncode == 0


@dataclass(kw_only=True)
class Slow:
    """The same node with people as its CA."""

    bridge: Bridge
    approver: approval.Approver
    plugin: Path

    @classmethod
    def make(cls, site: Site, directory: Path) -> Slow:
        """With the cluster's own CA."""
        plugin, desk = directory / "site", directory / "desk"
        desk.mkdir()
        approval.install_plugin(plugin)
        bridge = Bridge(pki=site.pki, directory=directory / "slow")
        bridge.add("backend.people", {"type": "approval", "dir": str(desk)})
        bridge.add("authority.ca", {"backend": "people"})
        approver = approval.Approver(directory=desk, signer=Signer.load(*site.pki.ca_pem("ca")))
        return cls(bridge=bridge, approver=approver, plugin=plugin)

    def renew(self, *args: str) -> subprocess.CompletedProcess[str]:
        """The installed program."""
        command = [
            str(Path(sys.executable).with_name("ca-bridge")),
            "renew",
            *args,
            "--config",
            str(self.bridge.config),
        ]
        environment = approval.environment(self.plugin)
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)


def test_a_ca_that_answers_later(site: Site, tmp_path: Path) -> None:
    """The next cron run collects it, without the configuration, and the kubeconfig is made whole then."""
    slow = Slow.make(site, tmp_path)
    texts = without_data(site.path("scheduler.conf"))
    site.path("scheduler.conf").unlink()
    assert slow.renew("scheduler.conf", *site.config).returncode == 4
    assert slow.renew().returncode == 4
    assert len(slow.approver.asked()) == 1
    slow.approver.approve("scheduler.conf")
    done = slow.renew()
    assert done.returncode == 0, done.stderr
    assert without_data(site.path("scheduler.conf")) == texts
    assert_private(site.path("scheduler.conf"), live_certificates(site.pki)["scheduler.conf"])
    assert (
        json.loads((slow.bridge.directory / "state/audit.jsonl").read_text().splitlines()[-1])["event"] == "installed"
    )


@pytest.mark.parametrize("name", ["evil.example.com", "wanted.example.com"])
def test_an_answer_that_says_something_else_is_refused(site: Site, tmp_path: Path, name: str) -> None:
    """The new certificate is compared with its request, as in every renewal; the right twin is installed."""
    slow = Slow.make(site, tmp_path)
    site.remove("apiserver")
    wanted = [*site.config, "--add-san", "apiserver=wanted.example.com"]
    assert slow.renew("apiserver", *wanted).returncode == 4
    path = slow.approver.requests()["apiserver"]
    request = SignRequest(spec=SPECS["apiserver"], csr_pem=path.read_bytes(), validity=timedelta(days=365))
    asked = request.csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    sans = [x509.DNSName(name) if san == x509.DNSName("wanted.example.com") else san for san in asked]
    now = datetime.now(UTC)
    issued = slow.approver.signer.issue(
        request, sans=sans, begin=now - timedelta(minutes=5), end=now + timedelta(days=9)
    )
    path.with_suffix(".crt").write_bytes(pem(issued.leaf))
    run = slow.renew()
    is_right = name == "wanted.example.com"
    assert (run.returncode, site.path("apiserver").exists()) == ((0, True) if is_right else (5, False)), run.stderr
    assert ("SAN: wanted" in run.stderr) is not is_right


@pytest.mark.first_use("26")
def test_a_broken_certificate_is_made_anew_as_its_hint_says(site: Site, tmp_path: Path) -> None:
    """The named command replaces it; a rollback leaves it alone, since its broken half is nothing to go back to, and restores the others."""
    path, other = site.path("front-proxy-client"), site.path("scheduler.conf")
    path.write_text("garbage")
    before = other.read_bytes()
    broken = site.renew("front-proxy-client")
    assert broken.returncode == 1
    found = re.search(r"; or mv (\S+) /root, and `ca-bridge renew (\S+)` makes it anew", broken.stderr)
    assert found is not None, broken.stderr
    assert found.groups() == (str(path), "front-proxy-client")
    path.rename(tmp_path / path.name)
    assert site.renew("front-proxy-client", "scheduler.conf", *site.config).returncode == 0
    made = path.read_bytes()
    assert other.read_bytes() != before

    run = site.bridge.run("rollback")
    assert run.returncode == 0, run.stderr
    assert "front-proxy-client stays as it is" in run.stdout
    assert (path.read_bytes(), other.read_bytes()) == (made, before)
