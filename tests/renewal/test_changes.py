"""Other SANs and subjects than the live certificate's, only as an operator names them; each drift is reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from bridge.pki.certificates import attributes, pem, san_entries
from bridge.pki.csr import generate_key, key_pem, subject_of
from tests.kit import apiserver
from tests.kit.airgap import Node
from tests.kit.cas import Bridge, add_openssl, live_certificates
from tests.kit.desks import POLICY, make_desk
from tests.kit.issuing import Signer
from tests.kit.members import Place
from tests.kit.pki import NODE, Pki, handmade_pki, kubeadm_pki

pytestmark = pytest.mark.kube

KUBELET_CLIENT = "apiserver-kubelet-client"
BINDING = {"kubeadm:apiserver-kubelet-client": ("system:kubelet-api-admin", "User", "kube-apiserver-kubelet-client")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A control plane of the real kubeadm 1.37: certificates, kubeconfigs, manifests."""
    pki = kubeadm_pki(
        tmp_path_factory.mktemp("made"), algorithm="ECDSA-P256", extra_sans=("zz.example.com", "127.0.0.1")
    )
    pki.run_kubeadm("init", "phase", "control-plane", "all")
    pki.run_kubeadm("init", "phase", "etcd", "local")
    return pki.root


@dataclass(kw_only=True)
class Site:
    """A copy of it, with `openssl ca` directories."""

    pki: Pki
    bridge: Bridge

    def live(self, name: str) -> x509.Certificate:
        """The certificate."""
        return live_certificates(self.pki)[name]

    def edit(self, path: str, old: str, new: str) -> None:
        """Change a file below /etc/kubernetes."""
        file = self.pki.kubeconfig_dir / path
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))


@pytest.fixture
def site(made: Path, tmp_path: Path) -> Site:
    root = tmp_path / "node"
    shutil.copytree(made, root, symlinks=True)
    pki = Pki(root=root, external=True)
    for path in pki.kubeconfig_dir.glob("manifests/*.yaml"):
        path.write_text(path.read_text().replace("/etc/kubernetes", str(pki.kubeconfig_dir)))
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    for authority in ("ca", "etcd-ca", "front-proxy-ca"):
        add_openssl(bridge, authority)
    return Site(pki=pki, bridge=bridge)


@pytest.fixture
def cluster(site: Site) -> Iterator[apiserver.State]:
    """An API server that answers where admin.conf and the manifest lead."""
    state = apiserver.State()
    with apiserver.serving(Place(name=NODE, address="127.0.0.1", directory=site.pki.root / "etc", cas={}), state):
        site.edit("admin.conf", "https://api.example.com:6443", f"https://127.0.0.1:{state.port}")
        yield state


def test_sans_come_and_go_by_name(site: Site) -> None:
    """Exactly those, in two certificates of one run; everything else stays, and the plan says it before."""
    before = {name: san_entries(site.live(name)) for name in ("apiserver", "etcd-peer")}
    add = ("--add-san", "apiserver=new.example.com", "--add-san", "etcd-peer=2001:db8::1")
    changes = (*add, "--drop-san", "apiserver=DNS:zz.example.com")
    plan = site.bridge.run("plan", *changes, "-o", "json")
    reported = {one["name"]: " ".join(one["changes"]) for one in json.loads(plan.stdout)["renew"]}
    assert plan.returncode == 3
    assert (
        "with DNS:new.example.com" in reported["apiserver"],
        "without DNS:zz.example.com" in reported["apiserver"],
    ) == (
        True,
        True,
    )
    run = site.bridge.run("renew", *changes)
    assert run.returncode == 0, run.stderr
    assert san_entries(site.live("apiserver")) == {
        *(before["apiserver"] - {("DNS", "zz.example.com")}),
        ("DNS", "new.example.com"),
    }
    assert san_entries(site.live("etcd-peer")) == before["etcd-peer"] | {("IP", "2001:db8::1")}
    assert site.bridge.run("renew", "apiserver").returncode == 0
    assert ("DNS", "new.example.com") in san_entries(site.live("apiserver"))


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--drop-san", "apiserver=192.0.2.10"], 2, "--advertise-address"),
        (["--drop-san", "apiserver=api.example.com"], 2, "the server of admin.conf"),
        (["--drop-san", "etcd-server=127.0.0.1"], 2, "--etcd-servers"),
        (["--drop-san", "apiserver=absent.example.com"], 2, "it has no absent.example.com"),
        (["--add-san", "admin.conf=x.example.com"], 2, "client certificate"),
        (["--add-san", "apiserver=bad name"], 2, "wanted an IP address, or a DNS name"),
        (["--add-san", "apiserver"], 2, "NAME=SAN"),
        (["--add-san", "unknown=x"], 2, "wanted names of certificates"),
        (["etcd-peer", "--add-san", "apiserver=x"], 2, "among the names"),
        (["--adopt-defaults"], 2, "names of certificates, or all"),
        (["--add-san", "apiserver=x", "--csr-only", "--csr-dir", "/nowhere"], 2, "can't be combined"),
    ],
)
def test_what_would_do_harm_is_refused(site: Site, arguments: list[str], code: int, text: str) -> None:
    """Names that this node's own files need stay, and no CA is asked."""
    before = live_certificates(site.pki)
    run = site.bridge.run("renew", *arguments)
    assert (run.returncode, text in run.stderr) == (code, True), run.stderr
    assert live_certificates(site.pki) == before


def with_old_subject(site: Site) -> None:
    """As kubeadm up to 1.28 made it, and as `kubeadm certs renew` keeps it."""
    key = generate_key("ecdsa-p256")
    old = site.live(KUBELET_CLIENT)
    builder = x509.CertificateBuilder().subject_name(subject_of("kube-apiserver-kubelet-client", ("system:masters",)))
    signer = Signer.load(*site.pki.ca_pem("ca"))
    builder = builder.issuer_name(old.issuer).public_key(key.public_key()).serial_number(4711)
    builder = builder.not_valid_before(old.not_valid_before_utc).not_valid_after(old.not_valid_after_utc)
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    certificate = builder.sign(signer.key, hashes.SHA256())
    (site.pki.pki_dir / f"{KUBELET_CLIENT}.crt").write_bytes(pem(certificate))
    (site.pki.pki_dir / f"{KUBELET_CLIENT}.key").write_bytes(key_pem(key))


def groups(certificate: x509.Certificate) -> set[str]:
    return {value for oid, value in attributes(certificate.subject) if oid == "2.5.4.10"}


def test_newer_subjects_only_where_their_rights_are(site: Site, cluster: apiserver.State) -> None:
    """A renewal keeps system:masters; --adopt-defaults drops it once the binding is there, and not before."""
    with_old_subject(site)
    assert site.bridge.run("renew", KUBELET_CLIENT).returncode == 0
    assert groups(site.live(KUBELET_CLIENT)) == {"system:masters"}
    early = site.bridge.run("renew", KUBELET_CLIENT, "--adopt-defaults")
    assert (early.returncode, "kubectl create clusterrolebinding" in early.stderr) == (5, True)
    assert groups(site.live(KUBELET_CLIENT)) == {"system:masters"}
    cluster.bindings = {"kubeadm:apiserver-kubelet-client": ("cluster-admin", "User", "alice")}
    assert "another role or subject" in site.bridge.run("renew", KUBELET_CLIENT, "--adopt-defaults").stderr
    cluster.bindings = BINDING
    run = site.bridge.run("renew", KUBELET_CLIENT, "scheduler.conf", "--adopt-defaults")
    assert run.returncode == 0, run.stderr
    assert groups(site.live(KUBELET_CLIENT)) == set()
    assert "warning: scheduler.conf: the subject is kubeadm's of today" in run.stderr
    plan = site.bridge.run("plan", KUBELET_CLIENT, "scheduler.conf", "--adopt-defaults").stderr
    assert plan.count("the subject is kubeadm's of today") == 1, plan
    assert f"{KUBELET_CLIENT}, scheduler.conf: the subject" in plan or f"scheduler.conf, {KUBELET_CLIENT}: the" in plan


def test_without_an_api_server_no_subject_is_changed(site: Site) -> None:
    """No answer of the API server counts as no permission."""
    with_old_subject(site)
    run = site.bridge.run("renew", KUBELET_CLIENT, "--adopt-defaults")
    assert (run.returncode, "while the API server answers" in run.stderr) == (5, True), run.stderr
    assert groups(site.live(KUBELET_CLIENT)) == {"system:masters"}


@pytest.mark.parametrize("allowed", [True, False])
def test_the_desk_decides(tmp_path: Path, allowed: bool) -> None:
    """A SAN that the replaced certificate does not have needs a rule of the policy."""
    pki = handmade_pki(tmp_path / "node")
    node = Node.make(tmp_path, pki)
    rule = '\n[certificate.apiserver]\nsans = ["{node}", ".example.com", "kubernetes", ".default.svc", ".svc.cluster.local", '
    rule += '"kubernetes.default", "kubernetes.default.svc", "0.0.0.0/0", "::/0", "*.wild.example.com"]\n'
    desk = make_desk(tmp_path / "desk", pki, policy=POLICY + (rule if allowed else ""))
    assert node.run("export", node.carried / "bundle.json", "--add-san", "apiserver=new.example.com").returncode == 0
    assert "CHANGED" in desk.run("inspect", node.carried / "bundle.json").stdout
    signed = desk.run("sign", node.carried / "bundle.json", "-o", node.carried / "answer.json")
    assert signed.returncode == (0 if allowed else 5), signed.stderr
    done = node.run("import", node.carried / "answer.json")
    assert done.returncode == (0 if allowed else 5)
    assert (("DNS", "new.example.com") in san_entries(node.live()["apiserver"])) is allowed


def test_an_open_request_that_says_something_else_is_not_gone_on_with(tmp_path: Path) -> None:
    """Another export with another SAN makes another key; a plain one goes on with what an operator wanted."""
    node = Node.make(tmp_path, handmade_pki(tmp_path / "node"))
    path = node.carried / "bundle.json"
    first = node.export("apiserver")
    assert node.run("export", path, "--add-san", "apiserver=new.example.com").returncode == 0
    wanted = node.open()["apiserver"].request.csr
    assert wanted != first.requests[0].csr
    assert ("DNS", "new.example.com") in san_entries(wanted)
    assert node.export("apiserver").requests[0].csr == wanted


def drift(site: Site) -> list[tuple[str, str]]:
    run = site.bridge.run("plan", "all", "-o", "json")
    return [(one["check"], one["about"]) for one in json.loads(run.stdout)["drift"]]


@pytest.mark.parametrize(
    ("path", "old", "new", "about"),
    [
        (
            "manifests/kube-apiserver.yaml",
            "--advertise-address=192.0.2.10",
            "--advertise-address=192.0.2.99",
            "apiserver",
        ),
        ("manifests/kube-apiserver.yaml", "ip-range=10.96.0.0/12", "ip-range=10.200.0.0/16", "apiserver"),
        (
            "manifests/kube-apiserver.yaml",
            "--etcd-servers=https://127.0.0.1",
            "--etcd-servers=https://192.0.2.7",
            "etcd-server",
        ),
        (
            "manifests/etcd.yaml",
            "listen-client-urls=https://127.0.0.1",
            "listen-client-urls=https://192.0.2.8",
            "etcd-server",
        ),
        (
            "manifests/etcd.yaml",
            "listen-peer-urls=https://192.0.2.10",
            "listen-peer-urls=https://192.0.2.9",
            "etcd-peer",
        ),
        ("scheduler.conf", "https://192.0.2.10:6443", "https://192.0.2.77:6443", "scheduler.conf"),
    ],
)
def test_plan_and_doctor_tell_what_has_drifted(site: Site, path: str, old: str, new: str, about: str) -> None:
    """From files alone, with the command that puts it right; nothing on a node as kubeadm made it."""
    assert drift(site) == []
    site.edit(path, old, new)
    check = "kubeconfig-server" if path == "scheduler.conf" else "sans-of-manifest"
    assert drift(site) == [(check, about)]
    text = site.bridge.run("plan").stderr
    assert "ca-bridge renew --add-san" in text
    assert check in site.bridge.run("doctor", "-o", "json").stdout
    if about != "scheduler.conf":
        command = text.split("ca-bridge ")[1].splitlines()[0].partition(" [run ")[0].split()
        assert site.bridge.run(*command).returncode == 0
        assert drift(site) == []


def test_doctor_compares_with_kubeadm_config(site: Site, cluster: apiserver.State) -> None:
    """SANs, service range and endpoint that differ are warnings; names that a renewal keeps and kubeadm would not are reported."""
    site.edit("manifests/kube-apiserver.yaml", "--secure-port=6443", f"--secure-port={cluster.port}")
    head = "apiVersion: kubeadm.k8s.io/v1beta4\nkind: ClusterConfiguration\nkubernetesVersion: v1.37.2\n"
    cluster.config = (
        head + f"controlPlaneEndpoint: 127.0.0.1:{cluster.port}\napiServer: {{certSANs: [zz.example.com]}}\n"
    )

    def found() -> dict[str, tuple[str, str]]:
        reported = json.loads(site.bridge.run("doctor", "-o", "json").stdout)["findings"]
        return {one["check"]: (one["level"], one["text"]) for one in reported if "kubeadm-config" in one["check"]}

    assert set(found()) == {"kubeadm-config"}
    assert found()["kubeadm-config"][0] == "ok"
    assert "DNS:api.example.com" in found()["kubeadm-config"][1]
    cluster.config = head + "networking: {serviceSubnet: 10.200.0.0/16}\ncontrolPlaneEndpoint: new.example.com:6443\n"
    wrong = found()
    assert {check for check, (level, _) in wrong.items() if level == "warning"} == {
        *("sans-of-kubeadm-config", "manifest-of-kubeadm-config", "endpoint-of-kubeadm-config"),
    }
    assert "10.200.0.1" in wrong["sans-of-kubeadm-config"][1]
