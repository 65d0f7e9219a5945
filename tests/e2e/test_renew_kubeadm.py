"""PKIs that the real kubeadm made, renewed through each of the three real CAs, and looked at by kubeadm again."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Mapping
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from bridge.pki.certificates import attributes, san_counts
from bridge.pki.csr import algorithm_name
from bridge.specs import AUTHORITIES
from tests.kit.cas import Bridge, Kind, bridge_with
from tests.kit.openbao import OpenBao
from tests.kit.pki import KubeadmAlgorithm, KubeadmPki, KubeadmVersion, kubeadm_pki
from tests.kit.renewed import Snapshot, assert_renewed, digest

pytestmark = pytest.mark.kube

MIX: Mapping[str, Kind] = {"ca": "vault", "etcd-ca": "openssl", "front-proxy-ca": "cfssl"}
CAS: dict[str, Mapping[str, Kind]] = {
    "vault": dict.fromkeys(AUTHORITIES, "vault"),
    "cfssl": dict.fromkeys(AUTHORITIES, "cfssl"),
    "openssl": dict.fromkeys(AUTHORITIES, "openssl"),
    "mix": MIX,
}
PKIS: list[tuple[KubeadmVersion, KubeadmAlgorithm]] = [
    ("1.37", "RSA-2048"),
    ("1.37", "RSA-3072"),
    ("1.37", "ECDSA-P256"),
    ("1.37", "ECDSA-P384"),
    ("1.20", "RSA-2048"),
]


@pytest.fixture(scope="module", params=PKIS, ids=lambda value: f"{value[0]}-{value[1]}")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> KubeadmPki:
    """A control plane's PKI by the real kubeadm, its CA keys elsewhere."""
    version, algorithm = request.param
    return kubeadm_pki(tmp_path_factory.mktemp("made") / "root", version=version, algorithm=algorithm)


@pytest.mark.parametrize("cas", CAS)
def test_renews_everything(made: KubeadmPki, cas: str, tmp_path: Path, bao: OpenBao) -> None:
    """Subjects, SANs, usages, key types, modes, owners and all other files are as before; kubeadm takes the result."""
    pki = KubeadmPki(root=tmp_path / "node", external=True, version=made.version)
    shutil.copytree(made.root, pki.root)
    before = Snapshot.of(pki)
    with bridge_with(pki, tmp_path / f"{made.root.parent.name}-{cas}", CAS[cas], bao) as bridge:
        run = bridge.run("renew", "all")
    assert run.returncode == 0, run.stderr
    assert_renewed(pki, before, tmp_path / "scratch")


def test_csr_only_writes_what_kubeadm_1_20_wrote(tmp_path: Path) -> None:
    """The same names, modes, subjects and SANs for the same PKI, and nothing else touched."""
    pki = kubeadm_pki(tmp_path / "node", version="1.20", external=False)  # 1.20 needs ca.key for this
    theirs = pki.root / "theirs"
    pki.run_kubeadm("certs", "renew", "all", "--csr-only", "--csr-dir", "/theirs")
    before = {path: digest(path) for path in pki.kubeconfig_dir.rglob("*") if path.is_file()}
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    (pki.kubeconfig_dir / "kubelet.conf").unlink()  # which kubeadm leaves out
    before.pop(pki.kubeconfig_dir / "kubelet.conf")
    ours = tmp_path / "ours"
    run = bridge.run("renew", "all", "--csr-only", "--csr-dir", str(ours))
    assert run.returncode == 0, run.stderr
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    assert {stat.S_IMODE(path.stat().st_mode) for path in ours.iterdir()} == {0o600}
    assert stat.S_IMODE(ours.stat().st_mode) == 0o700
    for path in ours.glob("*.csr"):
        mine, kubeadms = (x509.load_pem_x509_csr((directory / path.name).read_bytes()) for directory in (ours, theirs))
        assert sorted(attributes(mine.subject)) == sorted(attributes(kubeadms.subject))
        assert san_counts(mine) == san_counts(kubeadms)
        assert algorithm_name(mine.public_key()) == algorithm_name(kubeadms.public_key())
        assert [e.oid for e in mine.extensions] == [e.oid for e in kubeadms.extensions]
        key = load_pem_private_key(path.with_suffix(".key").read_bytes(), None)
        assert key.public_key() == mine.public_key()
        assert (
            path.with_suffix(".key").read_bytes().split(b"\n")[0]
            == (theirs / path.with_suffix(".key").name).read_bytes().split(b"\n")[0]
        )
    assert {path: digest(path) for path in pki.kubeconfig_dir.rglob("*") if path.is_file()} == before
    assert not (bridge.directory / "state").exists()


def test_csr_only_never_overwrites_a_key(tmp_path: Path) -> None:
    """It may belong to a CSR that a CA is about to sign; an empty place is taken."""
    pki = kubeadm_pki(tmp_path / "node", algorithm="ECDSA-P256")
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    args = ("renew", "apiserver", "--csr-only", "--csr-dir", str(tmp_path / "csrs"))
    assert bridge.run(*args).returncode == 0
    key = (tmp_path / "csrs/apiserver.key").read_bytes()
    run = bridge.run(*args)
    assert run.returncode == 1
    assert "hint:" in run.stderr
    assert (tmp_path / "csrs/apiserver.key").read_bytes() == key


def test_nothing_due_asks_no_ca(tmp_path: Path) -> None:
    """Exit 0, no CA needed, no file changed; a day is due with a long enough `before`."""
    pki = kubeadm_pki(tmp_path / "node", algorithm="ECDSA-P256")
    before = {path: digest(path) for path in pki.kubeconfig_dir.rglob("*") if path.is_file()}
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    run = bridge.run("renew")
    assert (run.returncode, run.stderr) == (0, "")
    assert "nothing is due" in run.stdout
    assert {path: digest(path) for path in pki.kubeconfig_dir.rglob("*") if path.is_file()} == before
    bridge.add("renewal", {"before": "370d", "validity": "400d"})
    assert bridge.run("renew").returncode == 2  # due, but without a CA to ask: an error before any request
    assert bridge.run("plan").returncode == 3
