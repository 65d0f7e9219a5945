"""The table of certificates says what the real kubeadm does."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge.node.kubeconfig import parse
from bridge.node.manifests import load
from bridge.pki.certificates import extended_key_usages, load_pem_certificates
from bridge.specs import AUTHORITIES, CertificateSpec
from tests.kit.pki import PKI_SPECS, KubeadmPki, kubeadm_pki

LISTED = [spec for spec in PKI_SPECS.values() if spec.listed]


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> KubeadmPki:
    """A node with its CA keys and its manifests, by kubeadm 1.37."""
    pki = kubeadm_pki(tmp_path_factory.mktemp("specs") / "node", algorithm="ECDSA-P256", external=False)
    pki.run_kubeadm("init", "phase", "control-plane", "all")
    pki.run_kubeadm("init", "phase", "etcd", "local")
    return pki


def place(pki: KubeadmPki, spec: CertificateSpec) -> Path:
    """The file that holds the certificate."""
    return pki.kubeconfig_dir / spec.base if spec.kubeconfig else pki.pki_dir / f"{spec.base}.crt"


@pytest.mark.kube
def test_usages_and_files_are_those_of_kubeadm(pki: KubeadmPki) -> None:
    """Each certificate has exactly the EKUs that kubeadm gives, in the files that it writes."""
    for spec in PKI_SPECS.values():
        path = place(pki, spec)
        data = parse(path.read_bytes()).certificate_data if spec.kubeconfig else path.read_bytes()
        assert extended_key_usages(load_pem_certificates(data or b"")[0]) == frozenset(eku.value for eku in spec.ekus)
        assert spec.kubeconfig or (pki.pki_dir / f"{spec.base}.key").exists()
    for authority in AUTHORITIES.values():
        assert (pki.pki_dir / authority.certificate_file).exists()
        assert (pki.pki_dir / authority.key_file).exists()


@pytest.mark.kube
def test_there_is_nothing_that_the_table_does_not_know(pki: KubeadmPki) -> None:
    """All .crt and .conf files that kubeadm wrote are ours or a CA's."""
    known = {place(pki, spec) for spec in PKI_SPECS.values()}
    known |= {pki.pki_dir / authority.certificate_file for authority in AUTHORITIES.values()}
    assert {*pki.kubeconfig_dir.rglob("*.crt"), *pki.kubeconfig_dir.rglob("*.conf")} == known


@pytest.mark.kube
def test_components_take_the_files_by_the_flags_of_the_table(pki: KubeadmPki) -> None:
    """The flags are those of the manifests that kubeadm renders."""
    for spec in LISTED:
        if spec.component is None:
            continue
        manifest = load(spec.component, pki.kubeconfig_dir)
        assert manifest is not None
        inside = f"/{place(pki, spec).relative_to(pki.root)}"
        assert {manifest.flags[flag] for flag in spec.flags} == {inside}


@pytest.mark.kube("kubeadm-1.20")
def test_what_is_newer_than_1_20_is_not_there(tmp_path: Path) -> None:
    """`since` is right about super-admin.conf."""
    old = kubeadm_pki(tmp_path / "node", version="1.20")
    for spec in PKI_SPECS.values():
        assert place(old, spec).exists() == (spec.since <= (1, 20))
