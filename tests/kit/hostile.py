"""
Answers of a CA that are wrong in one way, each with a twin that is right.

One table for two suites: `tests/pki/test_verify.py` shows each certificate to the checks alone, `test_answers.py` has
each sent to the whole program.
"""

from __future__ import annotations

import ipaddress
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID, ObjectIdentifier

from bridge.contract import Issued, SignRequest
from bridge.errors import Violation
from bridge.pki import csr
from bridge.pki.verify import BACKDATING, CLOCK_SKEW
from bridge.specs import KeyAlgorithm
from tests.kit.issuing import CLIENT, SERVER, Signer, cn, name, usage

ANY_EKU, CODE_SIGNING = "2.5.29.37.0", "1.3.6.1.5.5.7.3.3"
ORG, OU, CN = NameOID.ORGANIZATION_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME, NameOID.COMMON_NAME
DAY = timedelta(days=1)
#: What the node demands at least.
MIN_VALIDITY = 7 * DAY
#: When the certificate ends that is replaced.
LEFT = 20 * DAY


@dataclass(frozen=True, kw_only=True)
class Desk:
    """A CA that was asked for one certificate."""

    root: Signer
    request: SignRequest
    now: datetime

    @property
    def replaced_end(self) -> datetime:
        """When the certificate ends that is replaced, whenever that was made."""
        assert self.request.replaces is not None
        return self.request.replaces.not_valid_after_utc

    def issue(self, *, by: Signer | None = None, **changes: Any) -> Issued:
        """The requested certificate with the changes (see `Signer.issue`)."""
        dates = {"begin": self.now - timedelta(minutes=5), "end": self.now + 365 * DAY}
        return (by or self.root).issue(self.request, **(dates | changes))

    def through(self, *intermediates: Signer, by: Signer | None = None) -> Issued:
        """Signed by the first of the intermediates, or by another signer, with all of them sent along."""
        return self.issue(by=by or intermediates[0], intermediates=intermediates)

    def ca(self, subject: str = "mid", **changes: Any) -> Signer:
        """A CA below the root, but for the changes (see `Signer.make`)."""
        return Signer.make(subject, **({"parent": self.root, **dates(self.now)} | changes))

    def sans(self, *added: x509.GeneralName, without: str = "") -> list[x509.GeneralName]:
        """The request's, but for these."""
        extension = self.request.csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return [*(n for n in extension if str(n.value) != without), *added]

    def weakly_signed(self, algorithm: str) -> Issued:
        """By openssl, since the library makes no such signatures any more."""
        extensions = "keyUsage=critical,digitalSignature,keyEncipherment\nextendedKeyUsage=serverAuth\nbasicConstraints=CA:FALSE\n"
        with tempfile.TemporaryDirectory() as directory:
            folder = Path(directory)
            (folder / "ca.crt").write_bytes(self.root.certificate.public_bytes(Encoding.PEM))
            (folder / "ca.key").write_bytes(csr.key_pem(self.root.key))
            (folder / "leaf.csr").write_bytes(self.request.csr_pem)
            (folder / "leaf.cnf").write_text(extensions)
            fixed = ["-in", "leaf.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-extfile", "leaf.cnf", "-days", "365"]
            command = ["openssl", "x509", "-req", *fixed, "-copy_extensions", "copy", f"-{algorithm}"]
            pem = subprocess.run(command, cwd=folder, check=True, capture_output=True).stdout
        return Issued(leaf=x509.load_pem_x509_certificate(pem))


def dates(now: datetime) -> dict[str, Any]:
    """A CA's."""
    return {"begin": now - 100 * DAY, "end": now + 3000 * DAY}


def plain_root(now: datetime) -> Signer:
    """A CA in kubeadm's shape."""
    return Signer.make(**dates(now))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One fault."""

    reads: str  #: The violations as an operator reads them, as in `are_read_as`.
    wrong: Callable[[Desk], Issued]
    right: Callable[[Desk], Issued]  #: The twin, as like it as may be.
    name: str  #: Of the certificate that is asked for.
    algorithm: KeyAlgorithm
    root: Callable[[datetime], Signer]

    @property
    def subjects(self) -> set[str]:
        """What exactly the violations name."""
        return {text.partition(":")[0] for text in self.reads.split(" | ")}


def are_read_as(reads: str, violations: Sequence[Violation]) -> bool:
    """Whether these are the violations, each as its text, with ` | ` between them; `…` stands for any text."""
    patterns = [".*".join(map(re.escape, text.split("…"))) for text in reads.split(" | ")]
    texts = [str(violation) for violation in violations]
    return len(texts) == len(patterns) and all(map(re.fullmatch, patterns, texts))


def case(
    reads: str,
    wrong: Callable[[Desk], Issued],
    right: Callable[[Desk], Issued] = Desk.issue,
    *,
    name: str = "apiserver",
    algorithm: KeyAlgorithm = "ecdsa-p256",
    root: Callable[[datetime], Signer] = plain_root,
) -> Case:
    """The usual case is the API server's certificate below a root without peculiarities."""
    return Case(reads=reads, wrong=wrong, right=right, name=name, algorithm=algorithm, root=root)


def changed(reads: str, name: str = "apiserver", **changes: Any) -> Case:
    """The right certificate but for these."""
    return case(reads, lambda desk: desk.issue(**changes), name=name)


def with_sans(got: str, *added: x509.GeneralName, without: str = "") -> Case:
    """The right certificate but for these SANs; the twin has the same ones in another order."""
    return case(
        f"SAN: wanted {SANS}, got {got}",
        lambda desk: desk.issue(sans=desk.sans(*added, without=without)),
        lambda desk: desk.issue(sans=desk.sans()[::-1]),
    )


def below(reads: str, **changes: Any) -> Case:
    """Signed by an intermediate that is wrong; the twin's is right."""
    return case(reads, lambda desk: desk.through(desk.ca(**changes)), lambda desk: desk.through(desk.ca(path_length=0)))


def weak(algorithm: str) -> Case:
    """A signature by a hash of old; the twin's is by SHA-384."""
    return case(
        f"signature: wanted SHA-256 or stronger, got {algorithm} | {NO_PATH} Forbidden signature algorithm…",
        lambda desk: desk.weakly_signed(algorithm),
        lambda desk: desk.weakly_signed("sha384"),
        root=lambda now: Signer.make(key=csr.generate_key("rsa-2048"), **dates(now)),
    )


def constrained(permitted: str | None = None, excluded: str | None = None) -> x509.NameConstraints:
    """Name constraints: DNS names that are allowed, addresses that are not."""
    return x509.NameConstraints(
        [x509.DNSName(permitted)] if permitted else None,
        [x509.IPAddress(ipaddress.ip_network(excluded))] if excluded else None,
    )


def an_odd_key(curve: ec.EllipticCurve | None = None) -> Any:
    """A public key that no CSR of ours has."""
    private = (
        ec.generate_private_key(curve) if curve else rsa.generate_private_key(public_exponent=65537, key_size=1024)
    )
    return private.public_key()


def the_leaf_of_another(desk: Desk) -> Issued:
    """The scheduler's certificate, in the answer for the controller manager."""
    other = csr.generate_key("ecdsa-p256").public_key()
    return desk.issue(subject=cn("system:kube-scheduler"), public_key=other)


def two_levels(desk: Desk, *, path_length: int | None) -> Issued:
    """Two intermediates below the root."""
    upper = desk.ca("upper", path_length=path_length)
    lower = desk.ca("lower", parent=upper)
    return desk.through(lower, upper)


def crossed(desk: Desk, *, known: bool) -> Issued:
    """A new CA that was certified by an older one: by the node's, or by a foreign one of the same name."""
    older = desk.root if known else plain_root(desk.now)
    return desk.through(desk.ca("new CA", parent=older))


def as_dns(value: str) -> x509.GeneralName:
    """Shorter."""
    return x509.DNSName(value)


ADMIN = name((ORG, "kubeadm:cluster-admins"), (CN, "kubernetes-admin"))
UNKNOWN = x509.UnrecognizedExtension(ObjectIdentifier("1.2.3.4"), b"\x05\x00")
KEY_ID = x509.SubjectKeyIdentifier(b"12345678")
POLICY = x509.PolicyInformation(ObjectIdentifier("1.2.3"), None)
CA_TRUE = x509.BasicConstraints(ca=True, path_length=None)
CA_TRUE_0 = x509.BasicConstraints(ca=True, path_length=0)
ADDRESS = "10.96.0.1"
OTHER_ADDRESS = x509.IPAddress(ipaddress.ip_address("10.96.0.2"))

NO_PATH = "chain: wanted a path to ca.crt (CN=kubernetes, SHA-256 …), got"
NO_ISSUER = NO_PATH.replace("chain", "issuer")
ENDS_BEFORE = (
    "notAfter: wanted not before the replaced certificate's … UTC, "
    'got … UTC (shorter = "allow" in [renewal] takes it, if the CA is meant to give less)'
)
SANS = (
    "DNS:*.wild.example.com, DNS:api.example.com, DNS:cp-1, DNS:kubernetes, DNS:kubernetes.default, "
    "DNS:kubernetes.default.svc, DNS:kubernetes.default.svc.cluster.local, IP:10.96.0.1, IP:192.0.2.10, IP:2001:db8::7"
)

HOSTILE: dict[str, Case] = {
    # key
    "another key": case("public key: wanted the key of the CSR, got another ecdsa-p256 key", lambda desk: desk.issue(public_key=an_odd_key(ec.SECP256R1()))),
    "RSA-1024": case("key size: wanted RSA of at least 2048 bits, got 1024 bits | public key: wanted the key of the CSR, got another rsa-1024 key", lambda desk: desk.issue(public_key=an_odd_key())),
    "P-224": case("curve: wanted P-256, P-384 or P-521, got secp224r1 | public key: wanted the key of the CSR, got another ecdsa-secp224r1 key", lambda desk: desk.issue(public_key=an_odd_key(ec.SECP224R1()))),
    "secp256k1": case("curve: wanted P-256, P-384 or P-521, got secp256k1 | public key: wanted the key of the CSR, got another ecdsa-secp256k1 key", lambda desk: desk.issue(public_key=an_odd_key(ec.SECP256K1()))),
    # subject
    "another CN": changed("subject: wanted CN=kube-apiserver, got CN=kube-apiserver2", subject=cn("kube-apiserver2")),
    "CN in capitals": changed("subject: wanted CN=kube-apiserver, got CN=Kube-Apiserver", subject=cn("Kube-Apiserver")),
    "no subject": changed("subject: wanted CN=kube-apiserver, got (empty)", subject=x509.Name([])),
    "an O to spare": changed("subject: wanted CN=kube-apiserver, got CN=kube-apiserver,O=system:masters", subject=name((ORG, "system:masters"), (CN, "kube-apiserver"))),
    "CN twice": changed("subject: wanted CN=kube-apiserver, got CN=kube-apiserver,CN=kube-apiserver", subject=name((CN, "kube-apiserver"), (CN, "kube-apiserver"))),
    "the O lost": case(
        "subject: wanted CN=kubernetes-admin,O=kubeadm:cluster-admins, got CN=kubernetes-admin",
        lambda desk: desk.issue(subject=cn("kubernetes-admin")),
        lambda desk: desk.issue(subject=x509.Name(list(ADMIN)[::-1])),  # reordered is accepted
        name="admin.conf",
    ),
    "an OU for the O": case(
        "subject: wanted CN=kubernetes-admin,O=…, got CN=kubernetes-admin,OU=kubeadm:cluster-admins",
        lambda desk: desk.issue(subject=name((OU, "kubeadm:cluster-admins"), (CN, "kubernetes-admin"))),
        lambda desk: desk.issue(subject=x509.Name([x509.RelativeDistinguishedName(list(ADMIN))])),  # so is regrouped
        name="admin.conf",
    ),
    "the leaf of another certificate of the run": case(
        "public key: wanted the key of the CSR, got another ecdsa-p256 key | subject: wanted CN=system:kube-controller-manager, got CN=system:kube-scheduler", the_leaf_of_another, name="controller-manager.conf"
    ),
    # SAN
    "a SAN missing": with_sans("…DNS:cp-1, DNS:kubernetes.default, …", without="kubernetes"),
    "no SAN at all": changed(f"SAN: wanted {SANS}, got none", sans=[]),
    "a SAN to spare": with_sans("…DNS:cp-1, DNS:evil.example.com, …", as_dns("evil.example.com")),
    "a SAN twice": with_sans("…DNS:kubernetes, DNS:kubernetes, …", as_dns("kubernetes")),
    "a SAN in capitals": with_sans("…DNS:Kubernetes, DNS:api.example.com, DNS:cp-1, DNS:kubernetes.default, …", as_dns("Kubernetes"), without="kubernetes"),
    "an address as DNS name": with_sans("…DNS:10.96.0.1, …IP:192.0.2.10, …", as_dns(ADDRESS), without=ADDRESS),
    "a DNS name as URI": with_sans("…URI:kubernetes | SAN: wanted a URI with a plain host name, got 'kubernetes'", x509.UniformResourceIdentifier("kubernetes"), without="kubernetes"),
    "another address": with_sans("…IP:10.96.0.2, …", OTHER_ADDRESS, without=ADDRESS),
    "a SAN where none was asked for": case(
        "SAN: wanted none, got DNS:kubernetes", lambda desk: desk.issue(sans=[as_dns("kubernetes")]), name="admin.conf"
    ),
    # EKU
    "an EKU to spare": changed("EKU: wanted serverAuth, got clientAuth, serverAuth", ekus=[SERVER, CLIENT]),
    "an EKU missing": changed("EKU: wanted clientAuth, serverAuth, got serverAuth", name="etcd-server", ekus=[SERVER]),
    "another EKU": changed("EKU: wanted serverAuth, got clientAuth", ekus=[CLIENT]),
    "no EKU": changed("EKU: wanted serverAuth, got no EKU extension", ekus=[]),
    "any EKU": changed("EKU: wanted serverAuth, got anyExtendedKeyUsage", ekus=[ANY_EKU]),
    "any EKU beside the right one": changed("EKU: wanted serverAuth, got anyExtendedKeyUsage, serverAuth", ekus=[SERVER, ANY_EKU]),
    "code signing": changed("EKU: wanted serverAuth, got codeSigning (1.3.6.1.5.5.7.3.3), serverAuth", ekus=[SERVER, CODE_SIGNING]),
    # KeyUsage
    "no KeyUsage": changed("KeyUsage: wanted digitalSignature, got no KeyUsage extension", no_key_usage=True),
    "no digitalSignature": changed("KeyUsage: wanted digitalSignature, got keyEncipherment", key_usage=usage(digital_signature=False)),
    "no keyEncipherment for RSA": case(
        "KeyUsage: wanted digitalSignature, keyEncipherment, got digitalSignature", lambda desk: desk.issue(key_usage=usage(key_encipherment=False)), algorithm="rsa-2048"
    ),
    "keyCertSign": case(
        "KeyUsage: wanted digitalSignature without keyCertSign and cRLSign, got digitalSignature, keyEncipherment, keyCertSign",
        lambda desk: desk.issue(key_usage=usage(key_cert_sign=True)),
        lambda desk: desk.issue(key_usage=usage(key_encipherment=False)),  # an ECDSA key enciphers nothing
    ),
    "cRLSign": changed("KeyUsage: wanted digitalSignature without keyCertSign and cRLSign, got digitalSignature, keyEncipherment, cRLSign", key_usage=usage(crl_sign=True)),
    # CA, extensions, signature
    "CA:TRUE": changed("BasicConstraints: wanted CA:FALSE, got CA:TRUE", basic_constraints=CA_TRUE),
    "CA:TRUE with a path length": changed("BasicConstraints: wanted CA:FALSE, got CA:TRUE", basic_constraints=CA_TRUE_0),
    "an unknown critical extension": case(
        f"critical extension: wanted none that Kubernetes does not know, got 1.2.3.4 | {NO_PATH} invalid extension: 1.2.3.4: …",
        lambda desk: desk.issue(extra=UNKNOWN, extra_critical=True),
        lambda desk: desk.issue(extra=UNKNOWN),
    ),
    "name constraints in a leaf": changed(f"extension: wanted none that is for CAs, got nameConstraints (2.5.29.30) | {NO_PATH} no permitted …", extra=constrained("x"), extra_critical=True),
    "a critical key identifier": case(
        "critical extension: wanted subjectKeyIdentifier (2.5.29.14) not critical, got it is",
        lambda desk: desk.issue(extra=KEY_ID, extra_critical=True),
        lambda desk: desk.issue(extra=KEY_ID),
    ),
    "a certificate policy twice": changed("certificate policies: wanted each once, got 1.2.3 twice", extra=x509.CertificatePolicies([POLICY, POLICY])),
    "SHA-1": weak("sha1"),
    "MD5": weak("md5"),
    # dates
    "not yet valid": case(
        "notBefore: wanted not in the future, got … UTC (this node's clock says … UTC; is one of the two wrong?)", lambda desk: desk.issue(begin=desk.now + 10 * CLOCK_SKEW), lambda desk: desk.issue(begin=desk.now)
    ),
    "expired": case(f"notAfter: wanted in the future, got … UTC (it begins at … UTC, and this node's clock says …?) | {ENDS_BEFORE}", lambda desk: desk.issue(begin=desk.now - 9 * DAY, end=desk.now - DAY)),
    "shorter than min_validity": case(f"notAfter: wanted at least 7d of validity, got 6d, until … UTC | {ENDS_BEFORE}", lambda desk: desk.issue(end=desk.now + MIN_VALIDITY - CLOCK_SKEW)),
    "ends before the replaced one": case(
        ENDS_BEFORE,
        lambda desk: desk.issue(end=desk.replaced_end - BACKDATING - CLOCK_SKEW),
        lambda desk: desk.issue(end=desk.replaced_end + CLOCK_SKEW),
    ),
    "longer than its CA": case(
        "notAfter: wanted not after its CA's … UTC, got … UTC",
        lambda desk: desk.issue(end=desk.root.certificate.not_valid_after_utc + timedelta(seconds=1)),
        lambda desk: desk.issue(end=desk.root.certificate.not_valid_after_utc),
    ),
    "longer than its intermediate": case(
        "notAfter: wanted not after its intermediate CN=mid's … UTC, got … UTC",
        lambda desk: desk.through(desk.ca(end=desk.now + 300 * DAY)),
        lambda desk: desk.through(desk.ca(end=desk.now + 365 * DAY)),
    ),
    # issuer
    "another CA": case(f"{NO_ISSUER} issuer CN=other, and no certificate of that name", lambda desk: desk.issue(by=desk.ca("other", parent=None))),
    "another key under the CA's name": case(f"{NO_ISSUER} another key under the name CN=kubernetes", lambda desk: desk.issue(by=desk.ca("kubernetes", parent=None))),
    "the CA's key under another name": case(f"{NO_ISSUER} issuer CN=other, and no certificate of that name", lambda desk: desk.issue(issuer=cn("other"))),
    "cross-signed by another CA of the same name": case(
        f"{NO_PATH} signature does not match", lambda desk: crossed(desk, known=False), lambda desk: crossed(desk, known=True)
    ),
    "an intermediate that was not sent": case(
        f"{NO_ISSUER} issuer CN=mid, and no certificate of that name", lambda desk: desk.issue(by=desk.ca()), lambda desk: desk.through(desk.ca())
    ),
    "a leaf as issuer": below(f"{NO_PATH} basicConstraints.cA must be asserted in a CA certificate", ca=False, subject="kube-apiserver"),
    "an intermediate without keyCertSign": below("chain: wanted issuers that may sign certificates, got CN=mid with keyUsage digitalSignature, keyEncipherment", key_usage=usage(ca=False)),
    "an expired intermediate": case(
        f"{NO_PATH} cert is not valid at validation time",
        lambda desk: desk.through(desk.ca(end=desk.now - DAY)),
        lambda desk: desk.through(desk.ca()),
    ),
    "another CA's intermediate": case(
        f"{NO_PATH} signature does not match",
        lambda desk: desk.through(desk.ca(parent=desk.ca("kubernetes", parent=None))),
        lambda desk: desk.through(desk.ca()),
    ),
    "two levels where one is allowed": case(
        f"{NO_PATH} path length constraint violated", lambda desk: two_levels(desk, path_length=0), lambda desk: two_levels(desk, path_length=1)
    ),
    "a level where the root allows none": case(
        f"{NO_PATH} path length constraint violated",
        lambda desk: desk.through(desk.ca()),
        root=lambda now: Signer.make(path_length=0, **dates(now)),
    ),
    "an intermediate for clients alone": below("chain: wanted issuers whose EKU covers serverAuth, got intermediate CN=mid with EKU clientAuth (1.3.6.1.5.5.7.3.2) alone", extra=x509.ExtendedKeyUsage([ObjectIdentifier(CLIENT)])),
    "an intermediate with a critical key identifier": below("chain: wanted critical extension with subjectKeyIdentifier (2.5.29.14) not critical in each issuer, got it is in intermediate CN=mid", extra=KEY_ID, extra_critical=True),
    "names that the intermediate may not give": below(f"{NO_PATH} no permitted name constraints matched SAN", constraints=constrained("example.org")),
    "an address that the intermediate may not give": below(f"{NO_PATH} excluded name constraint matched SAN", constraints=constrained(excluded="10.96.0.0/12")),
}  # fmt: skip
