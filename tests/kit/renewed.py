"""What is true of a PKI of kubeadm's after it was renewed whole, by our own eyes and by kubeadm's."""

from __future__ import annotations

import hashlib
import shutil
import stat
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from bridge.node import kubeconfig
from bridge.pki.certificates import attributes, extended_key_usages, san_counts
from bridge.pki.csr import algorithm_name
from bridge.pki.verify import BACKDATING
from bridge.specs import AUTHORITIES, SPECS
from tests.kit.cas import live_certificates
from tests.kit.pki import PKI_SPECS, KubeadmPki


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a renewal must keep."""

    identities: dict[str, tuple[object, ...]]
    modes: dict[str, tuple[int, int, int]]
    certificates: dict[str, x509.Certificate] = field(compare=False)  #: Which are to be others afterwards.
    others: dict[str, str]  #: Digests of the files that a renewal must not touch.

    @classmethod
    def of(cls, pki: KubeadmPki) -> Snapshot:
        """The present state."""
        files = [path for path in pki.kubeconfig_dir.rglob("*") if path.is_file()]
        live = live_certificates(pki)
        return cls(
            certificates=live,
            identities={name: _identity(certificate) for name, certificate in live.items()},
            modes={str(p): (stat.S_IMODE(p.stat().st_mode), p.stat().st_uid, p.stat().st_gid) for p in files},
            others={str(p): digest(p) for p in files if _is_untouched(p, pki)},
        )


def _identity(certificate: x509.Certificate) -> tuple[object, ...]:
    return (
        sorted(attributes(certificate.subject)),
        san_counts(certificate),
        extended_key_usages(certificate),
        algorithm_name(certificate.public_key()),
    )


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_untouched(path: Path, pki: KubeadmPki) -> bool:
    ours = {pki.kubeconfig_dir / spec.base for spec in PKI_SPECS.values() if spec.kubeconfig}
    for spec in PKI_SPECS.values():
        ours |= {pki.pki_dir / f"{spec.base}.crt", pki.pki_dir / f"{spec.base}.key"}
    return path not in ours


def assert_pairs_match(pki: KubeadmPki) -> None:
    """Each key belongs to its certificate."""
    for name, certificate in live_certificates(pki).items():
        spec = SPECS[name]
        if spec.kubeconfig:
            key_pem = kubeconfig.key_data((pki.kubeconfig_dir / spec.base).read_bytes())
        else:
            key_pem = (pki.pki_dir / f"{spec.base}.key").read_bytes()
        assert key_pem is not None
        assert load_pem_private_key(key_pem, None).public_key() == certificate.public_key()


def assert_kubeadm_accepts(pki: KubeadmPki) -> None:
    """`init phase` in external-CA mode takes the tree as it is, and changes no byte."""
    before = {path: digest(path) for path in pki.kubeconfig_dir.rglob("*") if path.is_file()}
    certs = pki.run_kubeadm("init", "phase", "certs", "all")
    pki.run_kubeadm("init", "phase", "kubeconfig", "all")
    assert certs.stdout.count("Using existing") >= 11
    assert {path: digest(path) for path in pki.kubeconfig_dir.rglob("*") if path.is_file()} == before


def assert_kubeadm_reads(pki: KubeadmPki, scratch: Path) -> None:
    """`certs check-expiration` lists every certificate with its new date."""
    seen = pki
    if pki.version == "1.20":  # which can't do it without the CA keys (kubernetes/kubeadm#2618)
        shutil.copytree(pki.root, scratch)
        seen = KubeadmPki(root=scratch, external=False, version="1.20")
        for authority in AUTHORITIES.values():
            shutil.copy(pki.ca_dir / authority.key_file, seen.pki_dir / authority.key_file)
    table = seen.run_kubeadm("certs", "check-expiration").stdout
    for name, certificate in live_certificates(pki).items():
        if name != "kubelet.conf":
            row = next(line for line in table.splitlines() if line.startswith(f"{name} "))
            assert f"{certificate.not_valid_after_utc:%b %d, %Y %H:%M UTC}" in row  # as kubeadm prints it


def assert_renewed(pki: KubeadmPki, before: Snapshot, scratch: Path) -> None:
    """
    Every certificate is another one with the same identity and exactly its usages, and kubeadm takes the result.

    Args:
        pki: After the renewal.
        before: What it was.
        scratch: A directory that is not there yet.
    """
    new, old = live_certificates(pki), before.certificates
    assert Snapshot.of(pki) == before
    assert set(new) == set(old)
    assert not {c.serial_number for c in new.values()} & {c.serial_number for c in old.values()}
    for name, certificate in new.items():
        assert extended_key_usages(certificate) == frozenset(eku.value for eku in SPECS[name].ekus)
        assert certificate.not_valid_after_utc > old[name].not_valid_after_utc - BACKDATING
        assert certificate.public_key() != old[name].public_key()
    assert_pairs_match(pki)
    assert_kubeadm_accepts(pki)
    assert_kubeadm_reads(pki, scratch)
