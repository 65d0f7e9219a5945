"""The throwaway PKI is what kubeadm would have made."""

from __future__ import annotations

import base64
import re
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_args

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from bridge.node import sample_pki
from bridge.specs import AUTHORITIES, SPECS, KeyAlgorithm
from tests.kit.pki import PKI_SPECS, KubeadmAlgorithm, KubeadmPki, Pki, handmade_pki, kubeadm_pki

NOW = datetime(2026, 1, 31, 12, 0, 0, 5000, tzinfo=UTC)


def certificate(pki: Pki, name: str) -> x509.Certificate:
    """The leaf of this name, or the CA."""
    if name in AUTHORITIES:
        return x509.load_pem_x509_certificate((pki.pki_dir / AUTHORITIES[name].certificate_file).read_bytes())
    spec = SPECS[name]
    if not spec.kubeconfig:
        return x509.load_pem_x509_certificate((pki.pki_dir / f"{spec.base}.crt").read_bytes())
    return x509.load_pem_x509_certificate(data(pki, name, "client-certificate-data"))


def data(pki: Pki, name: str, field: str) -> bytes:
    """A value of a kubeconfig, decoded."""
    kubeconfig = yaml.safe_load((pki.kubeconfig_dir / name).read_text())
    return base64.b64decode(kubeconfig["users"][0]["user"][field], validate=True)


def shape(certificate: x509.Certificate) -> dict[str, object]:
    """All of a certificate that two runs of kubeadm have in common, in its order, with its string types."""
    extensions = [
        (extension.oid.dotted_string, extension.critical, type(extension.value).__name__)
        if isinstance(extension.value, x509.SubjectKeyIdentifier | x509.AuthorityKeyIdentifier)
        else (extension.oid.dotted_string, extension.critical, extension.value.public_bytes())
        for extension in certificate.extensions
    ]
    public = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return {
        "version": certificate.version,
        "subject": certificate.subject.public_bytes(),
        "issuer": certificate.issuer.public_bytes(),
        "extensions": extensions,
        "key": len(public),
        "signature": certificate.signature_algorithm_oid,
        "serial": certificate.serial_number.bit_length() < 64,
        # kubeadm's two phases are two runs, a second or so apart
        "lifetime": round((certificate.not_valid_after_utc - certificate.not_valid_before_utc) / timedelta(minutes=1)),
    }


def files(pki: Pki) -> dict[str, int]:
    """Path and mode of each file."""
    return {
        str(path.relative_to(pki.kubeconfig_dir)): stat.S_IMODE(path.stat().st_mode)
        for path in sorted(pki.kubeconfig_dir.rglob("*"))
    }


def layout(text: str) -> str:
    """A kubeconfig without what is random in it."""
    return re.sub(r"(-data: )\S+", r"\1…", text)


def both(directory: Path, algorithm: KubeadmAlgorithm) -> tuple[KubeadmPki, Pki]:
    """The same control plane, made by kubeadm and by us."""
    real = kubeadm_pki(directory / "real", algorithm=algorithm)
    key = next(name for name in get_args(KeyAlgorithm) if name == algorithm.lower())
    return real, handmade_pki(directory / "ours", key=key)


@pytest.mark.kube
@pytest.mark.parametrize("algorithm", ["RSA-2048", "ECDSA-P256", "ECDSA-P384"])
def test_has_the_shape_of_the_real_one(tmp_path: Path, algorithm: KubeadmAlgorithm) -> None:
    """Files, modes, certificates (but for keys, serials and the hour) and kubeconfigs are those of kubeadm 1.37."""
    real, ours = both(tmp_path, algorithm)

    assert files(ours) == files(real)
    for name in [*AUTHORITIES, *PKI_SPECS]:
        assert shape(certificate(ours, name)) == shape(certificate(real, name)), name
    for name, spec in PKI_SPECS.items():
        if spec.kubeconfig:
            texts = [(pki.kubeconfig_dir / name).read_text() for pki in (ours, real)]
            assert layout(texts[0]) == layout(texts[1]), name
            labels = [data(pki, name, "client-key-data").split(b"\n")[0] for pki in (ours, real)]
            assert labels[0] == labels[1], name


@pytest.mark.kube
def test_kubeadm_takes_it_for_its_own(tmp_path: Path) -> None:
    """`init phase certs all` and `init phase kubeconfig all` find nothing to do and nothing to complain of."""
    real = kubeadm_pki(tmp_path / "real")
    ours = handmade_pki(tmp_path / "ours")
    before = {path: path.read_bytes() for path in ours.kubeconfig_dir.rglob("*") if path.is_file()}
    (ours.root / real.config_file.name).write_text(real.config_file.read_text())
    judge = KubeadmPki(root=ours.root, external=True, version="1.37")

    certs = judge.run_kubeadm("init", "phase", "certs", "all")
    judge.run_kubeadm("init", "phase", "kubeconfig", "all")
    judge.run_kubeadm("certs", "check-expiration")

    assert certs.stdout.count("Using existing") == len(AUTHORITIES) + 7 + 1  # three CAs, seven leaves, sa
    assert {path: path.read_bytes() for path in ours.kubeconfig_dir.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("algorithm", ["rsa-2048", "ecdsa-p256", "ecdsa-p384"])
def test_certificates_chain_and_keys_match(tmp_path: Path, algorithm: KeyAlgorithm) -> None:
    """Each key is its certificate's, and each certificate is signed by its authority; no two share a key."""
    pki = handmade_pki(tmp_path, now=NOW, key=algorithm)

    publics = set()
    for name, spec in PKI_SPECS.items():
        leaf = certificate(pki, name)
        leaf.verify_directly_issued_by(certificate(pki, spec.authority.name))
        pem = data(pki, name, "client-key-data") if spec.kubeconfig else (pki.pki_dir / f"{spec.base}.key").read_bytes()
        private = serialization.load_pem_private_key(pem, password=None)
        assert private.public_key() == leaf.public_key(), name
        publics.add(
            leaf.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        )
    assert len(publics) == len(PKI_SPECS)


def test_takes_any_dates(tmp_path: Path) -> None:
    """The certificates, and their CA too, may have expired."""
    not_after, ca_not_after = NOW + timedelta(hours=1), NOW + timedelta(days=2)

    pki = handmade_pki(tmp_path, now=NOW, not_after=not_after, ca_not_after=ca_not_after)

    begin = NOW.replace(microsecond=0) - timedelta(minutes=5)
    for name in PKI_SPECS:
        leaf = certificate(pki, name)
        assert (leaf.not_valid_before_utc, leaf.not_valid_after_utc) == (begin, not_after.replace(microsecond=0)), name
    for name in AUTHORITIES:
        assert certificate(pki, name).not_valid_after_utc == ca_not_after.replace(microsecond=0), name


@pytest.mark.parametrize("external", [True, False])
def test_ca_keys_are_where_the_settings_say(tmp_path: Path, *, external: bool) -> None:
    """The CA keys are below the PKI directory only if they are not external, and match their certificates."""
    pki = handmade_pki(tmp_path, external=external)

    for name, files in AUTHORITIES.items():
        assert (pki.pki_dir / files.key_file).exists() is not external
        certificate_pem, key_pem = pki.ca_pem(name)
        public = serialization.load_pem_private_key(key_pem, password=None).public_key()
        assert certificate_pem == (pki.pki_dir / files.certificate_file).read_bytes()
        assert x509.load_pem_x509_certificate(certificate_pem).public_key() == public
        assert stat.S_IMODE((pki.ca_dir / files.key_file).stat().st_mode) == 0o600


def test_never_overwrites(tmp_path: Path) -> None:
    """A directory that holds a PKI already keeps it."""
    pki = handmade_pki(tmp_path)
    before = certificate(pki, "ca")

    with pytest.raises(FileExistsError):
        sample_pki.make(pki.kubeconfig_dir, now=NOW, not_after=NOW)

    assert certificate(pki, "ca") == before
