"""A throwaway PKI as kubeadm 1.37 makes it (its pki_helpers.go and kubeconfig.go), for demos and tests."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

# No public name lets one choose PrintableString, and a CA's subject is compared byte by byte (RFC 5280 §7.1 as
# crypto/x509 of Go does it).
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import NameOID

from bridge.node.kubeconfig import FreshKubeconfig
from bridge.pki import kubeadm_names
from bridge.pki.certificates import pem
from bridge.pki.csr import PrivateKey, alternative_names, generate_key, key_pem, signature_hash
from bridge.pki.kubeadm_names import NamingFacts, Release, builder_of
from bridge.specs import AUTHORITIES, DEFAULT_CLUSTER, SPECS, CertificateSpec, KeyAlgorithm

_BACKDATED = timedelta(minutes=5)
_CA_LIFETIME = timedelta(days=3650)
_SERVICE_ADDRESS = "10.96.0.1"  # the first address of the default service subnet

#: Each authority's CN.
_CA_NAMES = {"ca": "kubernetes", "etcd-ca": "etcd-ca", "front-proxy-ca": "front-proxy-ca"}
_RELEASE = Release(1, 37)
#: The kubeconfigs of components on the node itself.
_LOCAL = {"controller-manager.conf", "kubelet.conf", "scheduler.conf"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A made-up cluster and node, with the values of a kubeadm configuration."""

    node: str = "cp-1"
    address: str = "192.0.2.10"  #: The advertise address.
    endpoint: str = "api.example.com:6443"  #: `controlPlaneEndpoint`: host and port.
    extra_sans: tuple[str, ...] = ()  #: `apiServer.certSANs`: names (wildcards too) and addresses.

    @property
    def local(self) -> str:
        """Host and port of this node's API server."""
        return f"[{self.address}]:6443" if ":" in self.address else f"{self.address}:6443"

    def sans(self, spec: CertificateSpec) -> Sequence[x509.GeneralName]:
        """The SANs that kubeadm gives this certificate; most certificates have none."""
        if not spec.of_kubeadm:
            return alternative_names([self.node, self.address])
        facts = NamingFacts(
            release=_RELEASE,
            node=self.node,
            address=self.address,
            service_address=_SERVICE_ADDRESS,
            endpoint_host=urlsplit(f"//{self.endpoint}").hostname or "",
            dns_domain="cluster.local",
            api_sans=self.extra_sans,
        )
        return kubeadm_names.naming(spec, facts).sans


@dataclass(frozen=True, slots=True, kw_only=True)
class ThrowawayCA:
    """One of the three CAs, with its key, which is not on the node."""

    certificate: x509.Certificate
    key: PrivateKey = field(repr=False)

    @property
    def certificate_pem(self) -> bytes:
        """The certificate as one PEM block."""
        return pem(self.certificate)

    @property
    def key_pem(self) -> bytes:
        """The key as PKCS#1 or SEC1, unencrypted."""
        return key_pem(self.key)


def make(
    directory: Path,
    *,
    now: datetime,
    not_after: datetime,
    key: KeyAlgorithm = "rsa-2048",
    ca_not_after: datetime | None = None,
    cluster: Cluster | None = None,
) -> dict[str, ThrowawayCA]:
    """Write `pki/` and the kubeconfigs into a directory, without the CAs' keys."""
    cluster = cluster or Cluster()
    not_before = now.replace(microsecond=0) - _BACKDATED
    specs = {name: spec for name, spec in SPECS.items() if spec.of_kubeadm}
    names = [*AUTHORITIES, *specs, "sa"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        keys = dict(zip(names, pool.map(lambda _: generate_key(key), names), strict=True))
    cas = {
        name: ThrowawayCA(
            certificate=ca_certificate(_CA_NAMES[name], keys[name], not_before, ca_not_after or now + _CA_LIFETIME),
            key=keys[name],
        )
        for name in AUTHORITIES
    }
    pki = directory / "pki"
    for name, ca in cas.items():
        _write(pki / AUTHORITIES[name].certificate_file, ca.certificate_pem, 0o644)
    for name, spec in specs.items():
        ca = cas[spec.authority.name]
        leaf = leaf_certificate(spec, keys[name], ca, cluster, not_before=not_before, not_after=not_after)
        if spec.kubeconfig:
            _write(directory / spec.base, _kubeconfig(name, leaf, keys[name], ca, cluster), 0o600)
        else:
            _write(pki / f"{spec.base}.crt", pem(leaf), 0o644)
            _write(pki / f"{spec.base}.key", key_pem(keys[name]), 0o600)
    _write(pki / "sa.key", key_pem(keys["sa"]), 0o600)
    public = keys["sa"].public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    _write(pki / "sa.pub", public, 0o600)
    return cas


def ca_certificate(cn: str, key: PrivateKey, not_before: datetime, not_after: datetime) -> x509.Certificate:
    """A self-signed CA as kubeadm makes it: a CN alone, KeyUsage without cRLSign."""
    subject = _name(cn)
    builder = (
        builder_of(subject, subject, key.public_key(), not_before, not_after)
        .add_extension(_key_usage(certificate_signing=True), critical=True)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_subject_key_identifier(key), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(cn)]), critical=False)
    )
    return builder.sign(key, signature_hash(key))


def leaf_certificate(
    spec: CertificateSpec,
    key: PrivateKey,
    ca: ThrowawayCA,
    cluster: Cluster,
    *,
    not_before: datetime,
    not_after: datetime,
) -> x509.Certificate:
    """The certificate that kubeadm would make for this spec."""
    subject = _name(_user(spec, cluster), *kubeadm_names.groups(spec, _RELEASE))
    # kubeadm still sets the notBefore of kubeconfigs' certificates to the CA's, however old
    begin = ca.certificate.not_valid_before_utc if spec.kubeconfig else not_before
    identifier = ca.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    issuer_key = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
    ekus = x509.ExtendedKeyUsage(sorted((x509.ObjectIdentifier(eku.value) for eku in spec.ekus), key=str))
    builder = (
        builder_of(subject, ca.certificate.subject, key.public_key(), begin, not_after)
        .add_extension(_key_usage(certificate_signing=False), critical=True)
        .add_extension(ekus, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(issuer_key, critical=False)
    )
    if sans := cluster.sans(spec):
        builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=False)
    return builder.sign(ca.key, signature_hash(ca.key))


def _user(spec: CertificateSpec, cluster: Cluster) -> str:
    return spec.common_names[0].replace("{node}", cluster.node)


def _name(cn: str, *groups: str) -> x509.Name:
    attributes = [*((NameOID.ORGANIZATION_NAME, group) for group in groups), (NameOID.COMMON_NAME, cn)]
    return x509.Name([x509.NameAttribute(oid, value, _ASN1Type.PrintableString) for oid, value in attributes])


def _key_usage(*, certificate_signing: bool) -> x509.KeyUsage:
    """The key usage as kubeadm sets it: keyEncipherment for every type of key, and no cRLSign for a CA."""
    return x509.KeyUsage(
        digital_signature=True,
        key_encipherment=True,
        key_cert_sign=certificate_signing,
        content_commitment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _subject_key_identifier(key: PrivateKey) -> x509.SubjectKeyIdentifier:
    """A key identifier from SHA-256 (RFC 7093 §2), as Go makes it since 1.25; `from_public_key` would take SHA-1."""
    public = key.public_key()
    if isinstance(public, rsa.RSAPublicKey):
        bits = public.public_bytes(Encoding.DER, PublicFormat.PKCS1)
    else:
        bits = public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    return x509.SubjectKeyIdentifier(hashlib.sha256(bits).digest()[:20])


def _kubeconfig(name: str, leaf: x509.Certificate, key: PrivateKey, ca: ThrowawayCA, cluster: Cluster) -> bytes:
    server = f"https://{cluster.local if name in _LOCAL else cluster.endpoint}"
    user = _user(SPECS[name], cluster)
    fresh = FreshKubeconfig(server=server, cluster=DEFAULT_CLUSTER, user=user, ca_pem=ca.certificate_pem)
    return fresh.text(pem(leaf), key_pem(key))


def _write(path: Path, data: bytes, mode: int) -> None:
    """Write a new file that never has a looser mode; the caller's umask applies, as for kubeadm."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    path.touch(mode=mode, exist_ok=False)
    path.write_bytes(data)


def create_openssl_directory(
    directory: Path, certificate_pem: bytes, key_pem: bytes, passphrase: str | None = None
) -> Path:
    """Make the directory of an `openssl ca`: `ca.crt`, `ca.key`, `index.txt`, `index.txt.attr`, `newcerts`."""
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        encryption = serialization.BestAvailableEncryption(passphrase.encode())
    loaded = serialization.load_pem_private_key(key_pem, None)
    key = loaded.private_bytes(Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.joinpath("newcerts").mkdir(mode=0o700)
    _write(directory / "ca.crt", certificate_pem, 0o644)
    _write(directory / "ca.key", key, 0o600)
    _write(directory / "index.txt", b"", 0o644)
    _write(directory / "index.txt.attr", b"unique_subject = no\n", 0o644)
    return directory
