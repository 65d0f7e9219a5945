"""`doctor --before-upgrade`: where kubeadm would abort, compared with the real kubeadm's own check, and what it changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bridge.diagnosis import examination, upgrade
from bridge.node import kubeconfig
from bridge.node.inventory import read
from bridge.pki.certificates import load_pem_certificates
from bridge.settings.load import load
from bridge.specs import SPECS
from tests.kit import apiserver
from tests.kit.cas import Bridge
from tests.kit.issuing import Signer, signed_again
from tests.kit.members import Place
from tests.kit.pki import NODE, KubeadmPki, kubeadm_pki

pytestmark = pytest.mark.kube

HEAD = "apiVersion: kubeadm.k8s.io/v1beta4\nkind: ClusterConfiguration\nkubernetesVersion: v1.36.3\n"
#: Where no API server answers.
UNSEEN = {"upgrade-not-looked-at": {"cluster"}}
APPROVE = ("kubeadm:node-autoapprove-bootstrap", "kubeadm:node-autoapprove-certificate-rotation")
KUBELET_CLIENT = "kubeadm:apiserver-kubelet-client"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> KubeadmPki:
    """A control plane of the real kubeadm 1.37: certificates, kubeconfigs, manifests."""
    pki = kubeadm_pki(tmp_path_factory.mktemp("made"), algorithm="ECDSA-P256", extra_sans=("127.0.0.1",))
    pki.run_kubeadm("init", "phase", "control-plane", "all")
    pki.run_kubeadm("init", "phase", "etcd", "local")
    return pki


@dataclass(kw_only=True)
class Site:
    """A copy of it."""

    pki: KubeadmPki
    bridge: Bridge

    def found(self, level: str = "error") -> dict[str, set[str]]:
        """The findings: subjects by check."""
        reported: dict[str, set[str]] = {}
        run = self.bridge.run("doctor", "--before-upgrade", "-o", "json")
        for one in json.loads(run.stdout)["findings"]:
            if one["level"] == level:
                reported.setdefault(one["check"], set()).update(one["about"])
        return reported

    def kubeadm_aborts(self) -> bool:
        """The real kubeadm's check of external CAs, which its upgrade makes, too, is made by `check-expiration`."""
        return self.pki.run_kubeadm("certs", "check-expiration", check=False).returncode != 0

    def end(self, name: str, when: timedelta) -> None:
        """A certificate for the same key, signed by its CA, that ends then."""
        path = self.pki.pki_dir / f"{SPECS[name].base}.crt"
        old = read(self.pki.pki_dir, self.pki.kubeconfig_dir)
        live = next(item.certificates[0] for item in old.items if item.spec.name == name)
        signer = Signer.load(*self.pki.ca_pem(SPECS[name].authority.name))
        path.write_bytes(signed_again(live, signer, end=datetime.now(UTC) + when))


@pytest.fixture
def site(made: KubeadmPki, tmp_path: Path) -> Site:
    root = tmp_path / "node"
    shutil.copytree(made.root, root, symlinks=True)
    pki = KubeadmPki(root=root, external=True, version="1.37")
    return Site(pki=pki, bridge=Bridge(pki=pki, directory=tmp_path / "bridge"))


@pytest.fixture
def cluster(site: Site) -> Iterator[apiserver.State]:
    """An API server that answers where admin.conf and the manifest lead."""
    state = apiserver.State(config=HEAD, kubelet_config="kind: KubeletConfiguration\nmaxPods: 110\n")
    state.bindings = dict.fromkeys((*APPROVE, KUBELET_CLIENT), ("r", "Group", "g"))
    with apiserver.serving(Place(name=NODE, address="127.0.0.1", directory=site.pki.root / "etc", cas={}), state):
        path = site.pki.kubeconfig_dir / "admin.conf"
        path.write_text(path.read_text().replace("https://api.example.com:6443", f"https://127.0.0.1:{state.port}"))
        yield state


def test_a_healthy_node_may_be_upgraded(site: Site, cluster: apiserver.State) -> None:
    """No error and no warning; the report still says what kubeadm will do, and which option to give it."""
    run = site.bridge.run("doctor", "--before-upgrade")
    assert (run.returncode, run.stdout.splitlines()[-1]) == (0, "nothing is wrong"), run.stdout
    assert cluster.requests
    assert "--certificate-renewal=false" in run.stdout
    assert (site.found(), site.found("warning"), site.kubeadm_aborts()) == ({}, {}, False)


@pytest.mark.parametrize(
    "name", ["apiserver", "apiserver-kubelet-client", "front-proxy-client", "etcd-healthcheck-client"]
)
@pytest.mark.parametrize("fault", ["expired", "missing", "no key", "another CA"])
def test_says_where_kubeadm_aborts(site: Site, name: str, fault: str) -> None:
    """Exactly where the real kubeadm does not take an external CA's certificates; and what is exchanged by then."""
    base = site.pki.pki_dir / SPECS[name].base
    if fault == "expired":
        site.end(name, -timedelta(minutes=5))
    elif fault == "missing":
        Path(f"{base}.crt").unlink()
    elif fault == "no key":
        Path(f"{base}.key").unlink()
    else:
        Path(f"{base}.crt").write_bytes(
            signed_again(
                next(
                    i.certificates[0]
                    for i in read(site.pki.pki_dir, site.pki.kubeconfig_dir).items
                    if i.spec.name == name
                ),
                Signer.make("another", begin=datetime.now(UTC) - timedelta(days=9)),
            )
        )
    assert site.kubeadm_aborts()
    assert site.found() == {"upgrade-aborts": {name}}
    text = " ".join(site.bridge.run("doctor", "--before-upgrade").stdout.split())
    by_then = "before anything is exchanged" if name.startswith("etcd") else "the manifest of etcd is exchanged already"
    assert by_then in text
    assert f"ca-bridge renew {name}" in text


def test_what_ends_soon_and_what_kubeadm_does_not_look_at(site: Site) -> None:
    """A certificate that ends within the maintenance is a warning; one of a CA whose key is here is kubeadm's own."""
    site.end("apiserver", timedelta(hours=3))
    assert (site.found("warning"), site.kubeadm_aborts()) == ({"upgrade-ends-soon": {"apiserver"}, **UNSEEN}, False)
    site.end("front-proxy-client", -timedelta(minutes=5))
    assert site.found() == {"upgrade-aborts": {"front-proxy-client"}}
    shutil.copy(site.pki.ca_files("front-proxy-ca")[1], site.pki.pki_dir / "front-proxy-ca.key")
    assert (site.found(), site.kubeadm_aborts()) == ({}, False)
    (site.pki.kubeconfig_dir / "admin.conf").unlink()
    assert site.found() == {"upgrade-no-access": {"admin.conf"}}


def test_a_worker_whose_kubelet_conf_has_ended(site: Site) -> None:
    """kubeadm has no other access there (seen on a real worker); a valid one is enough, and no other certificate counts."""
    directory = site.pki.kubeconfig_dir
    for path in (directory / "manifests", site.pki.pki_dir / "etcd"):
        shutil.rmtree(path)
    for path in [*directory.glob("*.conf"), *site.pki.pki_dir.iterdir()]:
        if path.name not in {"kubelet.conf", "ca.crt"}:
            path.unlink()
    assert read(site.pki.pki_dir, directory).is_worker
    assert site.found() == {}
    path = directory / "kubelet.conf"
    data = path.read_bytes()
    certificate, key = kubeconfig.parse(data).certificate_data, kubeconfig.key_data(data)
    assert certificate is not None
    assert key is not None
    [live] = load_pem_certificates(certificate)
    old = signed_again(live, Signer.load(*site.pki.ca_pem("ca")), end=datetime.now(UTC) - timedelta(minutes=5))
    path.write_bytes(kubeconfig.with_credentials(data, old, key))
    assert site.found() == {"upgrade-no-access": {"kubelet.conf"}}


def test_where_kubelet_conf_will_lead(site: Site) -> None:
    """kubelet.conf will lead to this node's own address, which the API server's certificate must have."""
    path = site.pki.kubeconfig_dir / "kubelet.conf"
    path.write_text(path.read_text().replace("https://192.0.2.10:6443", "https://api.example.com:6443"))
    assert "led to 192.0.2.10" in " ".join(site.bridge.run("doctor", "--before-upgrade").stdout.split())
    assert site.found() == {}
    manifest = site.pki.kubeconfig_dir / "manifests/kube-apiserver.yaml"
    manifest.write_text(manifest.read_text().replace("advertise-address=192.0.2.10", "advertise-address=192.0.2.99"))
    assert site.found() == {"upgrade-kubelet-server": {"kubelet.conf"}}


def test_what_is_in_the_cluster(site: Site, cluster: apiserver.State) -> None:
    """Bindings that come back, a configuration that 1.37 does not read, and none at all."""
    assert (site.found("warning"), site.found()) == ({}, {})
    del cluster.bindings[APPROVE[1]]
    assert site.found("warning") == {"upgrade-auto-approve": {"ClusterRoleBindings"}}
    cluster.config = HEAD.replace("v1beta4", "v1beta3") + "featureGates: {PublicKeysECDSA: true}\n"
    assert site.found("warning")["upgrade-old-config"] == {"kubeadm-config"}
    cluster.config = ""
    assert site.found() == {"upgrade-no-config": {"kubeadm-config"}}


def test_local_changes_of_the_kubelet_are_reported(
    site: Site, cluster: apiserver.State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report names the keys that differ from the ConfigMap, in any formatting."""
    file = tmp_path / "config.yaml"
    monkeypatch.setattr(upgrade, "KUBELET_CONFIG", file)
    settings = load(site.bridge.config)

    def reported() -> list[str]:
        found = examination.before_upgrade(settings, datetime.now(UTC))
        return [one.text for one in found if one.check == "upgrade-kubelet-config"]

    file.write_text('{"maxPods": 110, kind: "KubeletConfiguration", containerRuntimeEndpoint: "unix:///x"}')
    assert reported() == []
    file.write_text("kind: KubeletConfiguration\nmaxPods: 200\nserverTLSBootstrap: true\n")
    assert [text.rpartition(" in ")[2] for text in reported()] == ["maxPods, serverTLSBootstrap"]
    file.write_text("kind: &a KubeletConfiguration\nb: *a\n")
    assert reported() == []
    assert cluster.requests
