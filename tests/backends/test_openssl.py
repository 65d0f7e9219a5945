"""The `openssl ca` backend against the real openssl."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import ipaddress
import os
import pickle
import pty
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import termios
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePath
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID, ObjectIdentifier

from backends.openssl import OpensslBackend
from backends.openssl import settings as openssl_settings
from backends.openssl.index import Database, IndexDamagedError, parse_index
from backends.openssl.program import KeyFile
from backends.openssl.settings import ConfigDoubtError, OpensslSettings, parse_config
from bridge.contract import Issued, Secret, SignRequest
from bridge.errors import (
    BackendError,
    BackendRefusedError,
    BackendUnavailableError,
    Exit,
    LocalFileError,
    SettingsError,
)
from bridge.node import sample_pki
from bridge.specs import AUTHORITIES, EKU, SPECS, CertificateSpec
from bridge.system.waiting import wait_until
from bridge.testing import BackendConformance, TestCA, sign_request, tampered
from tests.kit.cas import Bridge, add_openssl, live_certificates
from tests.kit.measured import is_running
from tests.kit.opensslca import REAL, make_ca_directory, program
from tests.kit.pki import handmade_pki

CA = TestCA.make()
SERVER, CLIENT, PEER = SPECS["apiserver"], SPECS["admin.conf"], SPECS["etcd-server"]
PASSPHRASE = "correct horse"
ROOT = Path(openssl_settings.__file__).parents[1]  #: For other processes to import from.
CERTIFICATE = re.compile(r"([0-9A-F]{2})+\.pem")
LIVE = {name: CA.leaf(spec) for name, spec in SPECS.items()}


class TestConformance(BackendConformance):
    """The suite that every backend passes."""

    unsupported = frozenset({"collect", "identity", "close"})

    @pytest.fixture(scope="class")
    @classmethod
    def ca(cls) -> TestCA:
        """The CA in the directory."""
        return CA

    @pytest.fixture(scope="class")
    @classmethod
    def live(cls) -> dict[str, x509.Certificate]:
        """The certificates to renew, by kubeadm's name."""
        return LIVE

    @pytest.fixture
    def backend(self, ca: TestCA, tmp_path: Path) -> OpensslBackend:
        """A directory as a CA desk has it."""
        return opened(make_ca_directory(tmp_path / "ca", ca.certificate_pem, ca.key_pem))

    @pytest.fixture
    def dead_backend(self, ca: TestCA, tmp_path: Path) -> Iterator[OpensslBackend]:
        """Another process holds the lock of the database, as long as the test lasts."""
        directory = make_ca_directory(tmp_path / "locked", ca.certificate_pem, ca.key_pem)
        with locked(directory):
            yield opened(directory, timeout=timedelta(seconds=0.3))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A CA directory whose key has no passphrase."""
    return make_ca_directory(tmp_path / "ca", CA.certificate_pem, CA.key_pem)


@pytest.fixture
def encrypted(tmp_path: Path) -> Path:
    """A CA directory whose key is encrypted."""
    return make_ca_directory(tmp_path / "encrypted", CA.certificate_pem, CA.key_pem, PASSPHRASE)


@pytest.fixture(autouse=True)
def working_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Assert that no folder of a run stays behind after a test."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr("backends.openssl.index._SETTLE_SECONDS", 0.05)  # no other process works on the database
    yield
    assert list(folder.iterdir()) == []


def opened(directory: Path, **settings: Any) -> OpensslBackend:
    """The backend for a directory, with a time limit that a stalled machine keeps."""
    return OpensslBackend.from_settings(OpensslSettings(dir=directory, **{"timeout": timedelta(minutes=3), **settings}))


def secret(tmp_path: Path, value: str = PASSPHRASE) -> Secret:
    """A passphrase in a file."""
    path = tmp_path / "passphrase"
    path.write_text(f"{value}\n")
    return Secret("file", str(path))


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """The lock of a database, held by another process."""
    lock = os.open(directory / ".ca-bridge.lock", os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(lock)


def renewal(spec: CertificateSpec = SERVER, days: float = 30) -> SignRequest:
    """A request to renew one of kubeadm's certificates."""
    return sign_request(LIVE[spec.name], spec, "ecdsa-p256", timedelta(days=days))


def name(*attributes: tuple[ObjectIdentifier, str]) -> x509.Name:
    """A subject."""
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in attributes])


COMMON_NAME = name((NameOID.COMMON_NAME, "x"))


def request(
    subject: x509.Name = COMMON_NAME,
    extensions: Mapping[x509.ExtensionType, bool] | None = None,
    spec: CertificateSpec = SERVER,
) -> SignRequest:
    """A request with a CSR of one's own."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    for extension, critical in (extensions or {}).items():
        builder = builder.add_extension(extension, critical=critical)
    csr = builder.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    return SignRequest(spec=spec, csr_pem=csr.public_bytes(serialization.Encoding.PEM), validity=timedelta(days=30))


def tlv(tag: int, *content: bytes) -> bytes:
    """One DER value."""
    value = b"".join(content)
    size = len(value).to_bytes((len(value).bit_length() + 7) // 8, "big")
    return bytes([tag, len(value)] if len(value) < 128 else [tag, 0x80 | len(size), *size]) + value


def handmade(subject: bytes, attributes: bytes = b"") -> SignRequest:
    """A request whose CSR has what the library would not write: subject (RDNs) and attributes in DER."""
    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    info = tlv(0x30, b"\x02\x01\x00", tlv(0x30, subject), public, tlv(0xA0, attributes))
    signature = key.sign(info, ec.ECDSA(hashes.SHA256()))
    algorithm = bytes.fromhex("300a06082a8648ce3d040302")  # ecdsa-with-SHA256
    der = tlv(0x30, info, algorithm, tlv(0x03, b"\x00", signature))
    pem = subprocess.run(["openssl", "base64"], input=der, capture_output=True, check=True).stdout
    csr = b"-----BEGIN CERTIFICATE REQUEST-----\n" + pem + b"-----END CERTIFICATE REQUEST-----\n"
    return SignRequest(spec=SERVER, csr_pem=csr, validity=timedelta(days=30))


def rdn(tag: int, value: bytes, oid: str = "550403") -> bytes:
    """One RDN; by default a CN."""
    return tlv(0x31, tlv(0x30, tlv(0x06, bytes.fromhex(oid)), tlv(tag, value)))


def rows(directory: Path) -> list[int]:
    """The serial numbers in the index, in order."""
    return list(parse_index(directory.joinpath("index.txt").read_bytes()))


def certificates(directory: Path) -> set[int]:
    """The serial numbers of the certificates in the folder."""
    names = [path.name for path in directory.joinpath("newcerts").iterdir()]
    return {int(name.removesuffix(".pem"), 16) for name in names if CERTIFICATE.fullmatch(name)}


def ekus(certificate: x509.Certificate) -> set[str]:
    """Its EKUs' OIDs."""
    return {oid.dotted_string for oid in certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value}


def content(directory: Path) -> dict[str, bytes]:
    """All files below a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def age(directory: Path) -> None:
    """Make the certificates of a directory so old that no process can still be writing them."""
    for path in directory.joinpath("newcerts").iterdir():
        os.utime(path, (time.time() - 60, time.time() - 60))


# What is revoked


def revoked(directory: Path) -> list[str]:
    """Reasons of the rows that are revoked, by openssl's own file."""
    lines = directory.joinpath("index.txt").read_text().splitlines()
    return [line.split("\t")[2].partition(",")[2] for line in lines if line.startswith("R")]


def test_revokes_what_was_superseded(directory: Path) -> None:
    """Once or twice is the same, the others' rows stay, and a certificate that the index does not know is added."""
    backend = opened(directory)
    old, new = backend.sign(renewal()).leaf, backend.sign(renewal()).leaf
    backend.revoke(old)
    backend.revoke(old)
    assert (revoked(directory), rows(directory)) == (["superseded"], [old.serial_number, new.serial_number])
    backend.revoke(CA.leaf(SERVER))
    assert revoked(directory) == ["superseded"] * 2


def test_tells_what_is_revoked(directory: Path) -> None:
    """A certificate is known by serial number and CA name: another CA's of the same number is not revoked, nor one that is not in the index."""
    backend = opened(directory)
    old, new = backend.sign(renewal()).leaf, backend.sign(renewal()).leaf
    assert not backend.is_revoked(old)

    backend.revoke(old)

    another = x509.CertificateBuilder(
        TestCA.make("another").certificate.subject, old.subject, CA.leaf(SERVER).public_key(), old.serial_number,
        old.not_valid_before_utc, old.not_valid_after_utc,
    ).sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())  # fmt: skip
    assert [backend.is_revoked(one) for one in (old, new, CA.leaf(SERVER), another)] == [True, False, False, False]
    assert backend.revoked() == {old.serial_number}
    (directory / "index.txt").unlink()
    with pytest.raises(BackendRefusedError, match=r"index\.txt"):
        opened(directory).is_revoked(old)


def test_the_index_is_read_while_openssl_renames_it(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`openssl ca` renames index.txt to index.txt.old before the new one takes its place; both readers wait for that."""
    backend, index, aside = opened(directory), directory / "index.txt", directory / "aside"
    leaf = backend.sign(renewal()).leaf
    backend.revoke(leaf)
    is_there: list[bool] = []

    def come_back(_: float) -> None:
        is_there.append(index.exists())
        aside.rename(index)

    monkeypatch.setattr("backends.openssl.index.time.sleep", come_back)
    for look in (backend.revoked, lambda: Database(index, directory / "newcerts").read().serials):
        index.rename(aside)
        assert look() == {leaf.serial_number}
    assert is_there == [False, False]


def test_a_revocation_is_on_disk_before_it_is_reported(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power cut could take it back, and the CA's record of it would be wrong."""
    backend, index = opened(directory), directory / "index.txt"
    leaf = backend.sign(renewal()).leaf
    synced: list[tuple[Path, bytes]] = []
    monkeypatch.setattr("backends.openssl.index._sync", lambda path, **_: synced.append((path, index.read_bytes())))

    backend.revoke(leaf)

    assert (index, index.read_bytes()) in synced


def test_what_was_revoked_is_no_killed_runs_answer(directory: Path) -> None:
    """A certificate that no node got is revoked by an operator: the next run asks for another one, and does not install it."""
    backend, begin, asked = opened(directory), datetime.now(UTC), [renewal(), renewal()]
    first, second = backend.sign_many(asked)
    assert isinstance(first, Issued)
    assert backend.recall(asked, begin) == [first, second]
    backend.revoke(first.leaf)
    assert backend.recall(asked, begin) == [None, second]
    again = backend.sign(asked[0])
    assert backend.recall(asked, begin) == [again, second]


def test_revokes_nothing_of_another_ca(directory: Path) -> None:
    """openssl would add it, and revoke whatever has its number."""
    backend = opened(directory)
    leaf = backend.sign(renewal()).leaf
    before = directory.joinpath("index.txt").read_bytes()
    with pytest.raises(BackendRefusedError, match="another CA's"):
        backend.revoke(TestCA.make("kubernetes").leaf(SERVER))
    assert directory.joinpath("index.txt").read_bytes() == before
    backend.revoke(leaf)
    assert revoked(directory) == ["superseded"]


# What is issued


def test_records_each_certificate_and_leaves_nothing_else(directory: Path) -> None:
    """The database has a row and a file for each certificate; beside it are lock, backups and openssl's own .old."""
    leaf = opened(directory).sign(renewal()).leaf

    assert rows(directory) == [leaf.serial_number]
    assert certificates(directory) == {leaf.serial_number}
    names = {path.name for path in directory.iterdir() if ".ca-bridge.2" not in path.name}
    assert names == {
        *("ca.crt", "ca.key", "index.txt", "index.txt.attr", "newcerts"),
        *(".ca-bridge.lock", "index.txt.old", "index.txt.attr.old"),
    }


@pytest.mark.parametrize("spec", [SERVER, CLIENT, PEER], ids=["server", "client", "peer"])
def test_pins_the_usages(directory: Path, spec: CertificateSpec) -> None:
    """Each usage class gets exactly its EKUs, both key identifiers, and is not a CA."""
    leaf = opened(directory).sign(renewal(spec)).leaf

    assert ekus(leaf) == {eku.value for eku in spec.ekus}
    assert {extension.oid: extension.critical for extension in leaf.extensions} == {
        x509.BasicConstraints.oid: True,
        x509.KeyUsage.oid: True,
        x509.ExtendedKeyUsage.oid: False,
        x509.SubjectKeyIdentifier.oid: False,
        x509.AuthorityKeyIdentifier.oid: False,
        **({x509.SubjectAlternativeName.oid: False} if spec is not CLIENT else {}),
    }
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.digital_signature, usage.key_encipherment, usage.key_cert_sign) == (True, True, False)
    authority = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    assert (authority.key_identifier is not None, authority.authority_cert_issuer) == (True, None)


SUBJECTS = {
    "CN first": name((NameOID.COMMON_NAME, "x"), (NameOID.ORGANIZATION_NAME, "o")),
    "several O": name(
        *((NameOID.ORGANIZATION_NAME, o) for o in ("system:masters", "a", "system:nodes")), (NameOID.COMMON_NAME, "x")
    ),
    "other attributes": name(
        *((NameOID.DOMAIN_COMPONENT, "example"), (NameOID.DOMAIN_COMPONENT, "com"), (NameOID.COUNTRY_NAME, "DE")),
        *((NameOID.ORGANIZATIONAL_UNIT_NAME, "ou"), (NameOID.COMMON_NAME, "x"), (NameOID.SERIAL_NUMBER, "12")),
        *((NameOID.USER_ID, "u"), (NameOID.EMAIL_ADDRESS, "a@example.com")),
    ),
    "UTF-8": name((NameOID.ORGANIZATION_NAME, 'Müller & Söhne, "GmbH" # 1'), (NameOID.COMMON_NAME, "节点/1=2")),
    "several in one RDN": x509.Name([
        x509.RelativeDistinguishedName(
            x509.NameAttribute(oid, value) for oid, value in ((NameOID.ORGANIZATION_NAME, "o"), (NameOID.COMMON_NAME, "x"))
        ),
        x509.RelativeDistinguishedName([x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "ou")]),
    ]),
    "no CN": name((NameOID.ORGANIZATION_NAME, "o")),
}  # fmt: skip


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS.keys())
def test_keeps_the_subject_byte_by_byte(directory: Path, subject: x509.Name) -> None:
    """Order, string types, repeated and unusual attributes of a subject stay."""
    assert opened(directory).sign(request(subject)).leaf.subject.public_bytes() == subject.public_bytes()


def test_keeps_sans_of_every_type(directory: Path) -> None:
    """SANs stay byte by byte, with their order and criticality."""
    san = x509.SubjectAlternativeName(
        [
            x509.DNSName("*.wild.example.com"),
            x509.IPAddress(ipaddress.ip_address("2001:db8::7")),
            x509.IPAddress(ipaddress.ip_address("192.0.2.10")),
            x509.RFC822Name("a@example.com"),
            x509.UniformResourceIdentifier("spiffe://example.com/a,DNS:evil?$HOME#x"),
            x509.DirectoryName(SUBJECTS["UTF-8"]),
            x509.RegisteredID(ObjectIdentifier("1.2.3.4")),
            x509.OtherName(ObjectIdentifier("1.3.6.1.4.1.311.20.2.3"), tlv(0x0C, b"user")),
            x509.DNSName("a,DNS:evil"),
        ]
    )
    got = opened(directory).sign(request(extensions={san: True})).leaf.extensions.get_extension_for_class(type(san))

    assert (got.value.public_bytes(), got.critical) == (san.public_bytes(), True)


def test_ends_no_later_than_the_ca(directory: Path, tmp_path: Path) -> None:
    """A certificate that would outlive its CA ends with it; within the CA's time it gets the requested validity."""
    short = TestCA.make(days=20)
    capped = opened(make_ca_directory(tmp_path / "short", short.certificate_pem, short.key_pem))
    now = datetime.now(UTC)

    assert capped.sign(renewal(days=30)).leaf.not_valid_after_utc == short.certificate.not_valid_after_utc
    asked = opened(directory).sign(renewal(days=30)).leaf
    assert (
        timedelta(0)
        <= asked.not_valid_after_utc - now - timedelta(days=30) + timedelta(seconds=1)
        < timedelta(minutes=1)
    )
    assert timedelta(minutes=4) < now - asked.not_valid_before_utc < timedelta(minutes=6)


def test_ends_after_2049_as_rfc_5280_wants_it(directory: Path) -> None:
    """UTCTime has no years from 2050 on."""
    ca = TestCA.make(days=36500)
    shutil.rmtree(directory)
    make_ca_directory(directory, ca.certificate_pem, ca.key_pem)

    leaf = opened(directory).sign(renewal(days=36000)).leaf

    assert leaf.not_valid_after_utc.year > 2100
    assert opened(directory).sign(renewal()).leaf.not_valid_after_utc.year < 2100


@pytest.mark.parametrize("digest", ["sha256", "sha384", "sha512"])
def test_signs_with_the_digest_that_is_set(directory: Path, digest: str) -> None:
    """The certificate's signature has the digest of the settings."""
    algorithm = opened(directory, digest=digest).sign(renewal()).leaf.signature_hash_algorithm
    assert algorithm is not None
    assert algorithm.name == digest


def test_signs_with_an_elliptic_curve(tmp_path: Path) -> None:
    """The CA's key may be of another type."""
    ca = TestCA.make(algorithm="ecdsa-p384")
    leaf = opened(make_ca_directory(tmp_path / "ec", ca.certificate_pem, ca.key_pem)).sign(renewal()).leaf
    leaf.verify_directly_issued_by(ca.certificate)


def test_signs_for_a_ca_without_key_identifier(tmp_path: Path) -> None:
    """A CA as kubeadm made them before 1.19 is named in its certificates by issuer and serial number."""
    ca = ca_with({x509.BasicConstraints(ca=True, path_length=None): True})
    leaf = opened(make_ca_directory(tmp_path / "old", ca.certificate_pem, ca.key_pem)).sign(renewal()).leaf

    leaf.verify_directly_issued_by(ca.certificate)
    authority = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    assert authority.authority_cert_serial_number == ca.certificate.serial_number
    assert authority.key_identifier is None


def test_gives_the_chain_without_the_root(directory: Path) -> None:
    """The intermediates of the CA's certificate file come with the leaf, and the root does not."""
    root, middle = TestCA.make("root"), TestCA.make("middle")
    signer = ca_with({x509.BasicConstraints(ca=True, path_length=None): True}, issuer=middle, key=CA)
    between = ca_with({x509.BasicConstraints(ca=True, path_length=None): True}, issuer=root, key=middle)
    chain = [signer.certificate, between.certificate, root.certificate]
    directory.joinpath("ca.crt").write_bytes(b"".join(pem(certificate) for certificate in chain))
    backend = opened(directory)

    issued = backend.sign(renewal())

    issued.leaf.verify_directly_issued_by(signer.certificate)
    assert issued.intermediates == (signer.certificate, between.certificate)
    assert backend.issuers() == chain


def pem(certificate: x509.Certificate) -> bytes:
    """One PEM block."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def ca_with(
    extensions: Mapping[x509.ExtensionType, bool],
    *,
    begin: timedelta = timedelta(days=-1),
    end: timedelta = timedelta(days=99),
    issuer: TestCA | None = None,
    key: TestCA = CA,
) -> TestCA:
    """A CA certificate with these extensions alone, for the key of another one."""
    now, subject = datetime.now(UTC), name((NameOID.COMMON_NAME, "another"))
    builder = x509.CertificateBuilder(
        issuer_name=issuer.certificate.subject if issuer else subject,
        subject_name=key.certificate.subject if issuer else subject,
        public_key=key.key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now + begin,
        not_valid_after=now + end,
    )
    for extension, critical in extensions.items():
        builder = builder.add_extension(extension, critical=critical)
    return TestCA(certificate=builder.sign((issuer or key).key, hashes.SHA256()), key=key.key)


# CSRs

KEY_USAGE = x509.KeyUsage(
    digital_signature=True, key_encipherment=True, key_cert_sign=True, crl_sign=False, content_commitment=False,
    data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
)  # fmt: skip
DNS = x509.SubjectAlternativeName([x509.DNSName("x")])
NAME_CONSTRAINTS = x509.NameConstraints(permitted_subtrees=[x509.DNSName("x")], excluded_subtrees=None)
# An extension request under Microsoft's OID, which openssl honours: nameConstraints
MICROSOFT = tlv(
    0x30,
    tlv(0x06, bytes.fromhex("2b0601040182370 20 10e".replace(" ", ""))),
    tlv(0x31, tlv(0x30, tlv(0x30, tlv(0x06, bytes.fromhex("551d1e")), tlv(0x04, NAME_CONSTRAINTS.public_bytes())))),
)
EXTENSION_REQUEST = tlv(
    0x30,
    tlv(0x06, bytes.fromhex("2a864886f70d01090e")),
    tlv(0x31, tlv(0x30, tlv(0x30, tlv(0x06, bytes.fromhex("551d11")), tlv(0x04, DNS.public_bytes())))),
)
CHALLENGE = tlv(0x30, tlv(0x06, bytes.fromhex("2a864886f70d010907")), tlv(0x31, tlv(0x0C, b"challenge")))
BAD_REQUESTS: dict[str, Callable[[], SignRequest]] = {
    "CA:TRUE": lambda: request(extensions={x509.BasicConstraints(ca=True, path_length=None): True}),
    "CA:FALSE": lambda: request(extensions={x509.BasicConstraints(ca=False, path_length=None): True, DNS: False}),
    "key usage": lambda: request(extensions={KEY_USAGE: True}),
    "EKU": lambda: request(extensions={x509.ExtendedKeyUsage([ObjectIdentifier(EKU.CLIENT_AUTH.value)]): False}),
    "name constraints": lambda: request(extensions={NAME_CONSTRAINTS: True}),
    "unknown extension": lambda: request(
        extensions={x509.UnrecognizedExtension(ObjectIdentifier("1.2.3"), b"x"): False}
    ),
    "Microsoft's extension request": lambda: handmade(rdn(0x0C, b"x"), MICROSOFT),
    "two extension requests": lambda: handmade(rdn(0x0C, b"x"), EXTENSION_REQUEST * 2),
    "bad signature": lambda: tampered(request()),
    "two CSRs": lambda: dataclasses.replace(request(), csr_pem=request().csr_pem + request().csr_pem),
    "no CSR": lambda: dataclasses.replace(request(), csr_pem=b""),
    "certificate": lambda: dataclasses.replace(request(), csr_pem=CA.certificate_pem),
    "cut off": lambda: dataclasses.replace(request(), csr_pem=request().csr_pem[:200]),
    "DER": lambda: dataclasses.replace(request(), csr_pem=request().csr.public_bytes(serialization.Encoding.DER)),
    "empty subject": lambda: request(x509.Name([])),
    "PrintableString with an underscore": lambda: handmade(rdn(0x13, b"a_b")),
    "IA5String that is not ASCII": lambda: handmade(rdn(0x16, b"a\xe9")),
    "BIT STRING": lambda: handmade(rdn(0x03, b"\0x")),
    # openssl's own views: it would stop at them, and sign nothing of the whole batch
    "emailAddress as UTF8String": lambda: handmade(rdn(0x0C, b"x") + rdn(0x0C, b"a@b", "2a864886f70d010901")),
    "VisibleString": lambda: handmade(rdn(0x1A, b"x")),
    "NumericString": lambda: handmade(rdn(0x12, b"1")),
    "UniversalString": lambda: handmade(rdn(0x1C, "x".encode("utf-32-be"))),
}
GOOD_REQUESTS: dict[str, Callable[[], SignRequest]] = {
    "SAN": lambda: request(extensions={DNS: False}),
    "one extension request and a challenge": lambda: handmade(rdn(0x0C, b"x"), CHALLENGE + EXTENSION_REQUEST),
    "PrintableString": lambda: handmade(rdn(0x13, b"a'()+,-./:=? b")),
    "UTF8String with an underscore": lambda: handmade(rdn(0x0C, b"a_b")),
    "IA5String": lambda: handmade(rdn(0x16, b"a_b")),
    "T61String": lambda: handmade(rdn(0x14, b"a_b")),
    "BMPString": lambda: handmade(rdn(0x1E, "\xe9".encode("utf-16-be"))),
    "emailAddress as IA5String": lambda: handmade(rdn(0x0C, b"x") + rdn(0x16, b"a@b", "2a864886f70d010901")),
    "text around": lambda: dataclasses.replace(request(), csr_pem=b"text\n" + request().csr_pem + b"text\n"),
}


@pytest.mark.parametrize("bad", BAD_REQUESTS.values(), ids=BAD_REQUESTS.keys())
def test_refuses_a_csr_and_signs_those_around_it(directory: Path, bad: Callable[[], SignRequest]) -> None:
    """A CSR that is not fit, or asks for more than SANs, fails alone, and nothing is recorded for it."""
    before, refused, after = opened(directory).sign_many([request(), bad(), request()])

    assert isinstance(refused, BackendRefusedError)
    assert isinstance(before, Issued)
    assert isinstance(after, Issued)
    assert rows(directory) == [before.leaf.serial_number, after.leaf.serial_number]


@pytest.mark.parametrize("good", GOOD_REQUESTS.values(), ids=GOOD_REQUESTS.keys())
def test_signs_a_csr_of_the_same_kind_that_is_fit(directory: Path, good: Callable[[], SignRequest]) -> None:
    """The twins of the refused CSRs are signed."""
    wanted = good()
    leaf = opened(directory).sign(wanted).leaf
    assert leaf.subject.public_bytes() == wanted.csr.subject.public_bytes()
    assert leaf.public_key() == wanted.csr.public_key()


@pytest.fixture
def unforeseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch off our own checks, so that openssl itself meets each problem."""
    monkeypatch.setattr("backends.openssl._is_readable", lambda _: True)


def bad_among(count: int, *positions: int) -> list[SignRequest]:
    """CSRs that are fit, but for these."""
    return [BAD_REQUESTS["VisibleString"]() if number in positions else request() for number in range(count)]


@pytest.mark.parametrize("name", ["VisibleString", "emailAddress as UTF8String", "IA5String that is not ASCII"])
def test_what_openssl_stops_at_is_never_given_to_it(directory: Path, tmp_path: Path, name: str) -> None:
    """One run for all, however many are not fit."""
    wrapper = program(tmp_path, f'echo >> {tmp_path}/runs; exec $REAL "$@"')
    requests = [BAD_REQUESTS[name]() if number % 3 else request() for number in range(12)]

    answers = opened(directory, openssl=wrapper).sign_many(requests)

    assert [isinstance(answer, Issued) for answer in answers] == [number % 3 == 0 for number in range(12)]
    assert len(tmp_path.joinpath("runs").read_text()) == 1


@pytest.mark.usefixtures("unforeseen")
def test_finds_several_bad_csrs_in_a_batch(directory: Path) -> None:
    """CSRs that openssl stops the whole batch for are found by halving it, and the others are signed once."""
    answers = opened(directory).sign_many(bad_among(64, 3, 17, 40, 63))

    bad = [position for position, answer in enumerate(answers) if not isinstance(answer, Issued)]
    assert bad == [3, 17, 40, 63]
    assert all(type(answers[position]) is BackendRefusedError for position in bad)
    assert len(rows(directory)) == len(certificates(directory)) == 60


@pytest.mark.usefixtures("unforeseen")
def test_a_batch_of_bad_csrs_ends(directory: Path, tmp_path: Path) -> None:
    """When nothing in a batch can be signed, halving it ends before each CSR had its own process."""
    wrapper = program(tmp_path, f'echo >> {tmp_path}/runs; exec $REAL "$@"')
    with pytest.raises(BackendRefusedError):
        opened(directory, openssl=wrapper).sign_many(bad_among(30, *range(30)))
    assert len(tmp_path.joinpath("runs").read_text()) == 20


@pytest.mark.usefixtures("unforeseen")
def test_what_was_not_tried_is_not_refused(directory: Path) -> None:
    """After so many bad CSRs in a row, those that had no run of their own can be asked for again."""
    requests = [renewal(SPECS["apiserver"]), *bad_among(34, *range(30))]

    answers = opened(directory).sign_many(requests)

    assert isinstance(answers[0], Issued)
    refused = [answer for answer in answers if isinstance(answer, BackendRefusedError)]
    not_tried = [answer for answer in refused if answer.is_for_all]
    assert len(refused) == 34
    assert all(answer in not_tried for answer in answers[31:])
    assert len(not_tried) < 34
    assert all(str(answer).startswith("too many CSRs stop openssl") for answer in not_tried)


def test_one_process_a_usage_class(directory: Path, tmp_path: Path) -> None:
    """All certificates of a node are signed by three processes, and each comes back in its place."""
    wrapper = program(tmp_path, f'echo "$@" | grep -o "extensions [a-z]*" >> {tmp_path}/runs; exec $REAL "$@"')
    requests = [renewal(spec) for spec in SPECS.values()]

    answers = opened(directory, openssl=wrapper).sign_many(requests)

    runs = tmp_path.joinpath("runs").read_text().splitlines()
    assert sorted(runs) == ["extensions client", "extensions peer", "extensions server"]
    for asked, answer in zip(requests, answers, strict=True):
        assert isinstance(answer, Issued)
        assert answer.leaf.public_key() == asked.csr.public_key()
        assert ekus(answer.leaf) == {eku.value for eku in asked.spec.ekus}


def test_each_validity_is_its_own(directory: Path) -> None:
    """Requests of one batch that want different validities get them."""
    short, long = opened(directory).sign_many([renewal(days=10), renewal(days=100)])
    assert isinstance(short, Issued)
    assert isinstance(long, Issued)
    apart = long.leaf.not_valid_after_utc - short.leaf.not_valid_after_utc
    assert abs(apart - timedelta(days=90)) < timedelta(minutes=1)  # two runs, a moment apart


def test_cuts_large_batches(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process gets more CSRs than a batch has; the same CSR twice is two certificates."""
    monkeypatch.setattr("backends.openssl.program.KeyFile.batch_size", 3)
    wrapper = program(tmp_path, f'echo >> {tmp_path}/runs; exec $REAL "$@"')
    requests = [request() for _ in range(7)]
    requests[6] = requests[0]

    answers = opened(directory, openssl=wrapper).sign_many(requests)

    assert len(tmp_path.joinpath("runs").read_text()) == 3
    for asked, answer in zip(requests, answers, strict=True):
        assert isinstance(answer, Issued)
        assert answer.leaf.public_key() == asked.csr.public_key()
    assert len(set(rows(directory))) == 7


def test_no_requests_no_run(tmp_path: Path) -> None:
    """Without requests the CA is not even looked for."""
    assert opened(tmp_path / "nowhere").sign_many([]) == []


def test_equal_subjects_are_no_trouble(directory: Path) -> None:
    """etcd-server and etcd-peer share a subject, and so do the old and the new certificate of a renewal."""
    backend = opened(directory)
    for _ in range(2):
        answers = backend.sign_many([renewal(PEER), renewal(SPECS["etcd-peer"])])
        assert all(isinstance(answer, Issued) for answer in answers)
    assert len(rows(directory)) == 4


# The CA


@pytest.mark.parametrize("call", [lambda b: b.sign(renewal()), lambda b: b.check([SERVER])], ids=["sign", "check"])
class TestCertificate:
    """What the CA's certificate must be; openssl itself would sign with any."""

    TRUE = x509.BasicConstraints(ca=True, path_length=None)
    NO_SIGNING = x509.KeyUsage(
        digital_signature=True, key_encipherment=True, key_cert_sign=False, crl_sign=False, content_commitment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip

    @pytest.mark.parametrize(
        "ca",
        [
            ca_with({TRUE: True}, begin=timedelta(days=-9), end=timedelta(days=-1)),
            ca_with({TRUE: True}, begin=timedelta(days=1)),
            ca_with({}),
            ca_with({x509.BasicConstraints(ca=False, path_length=None): True}),
            ca_with({TRUE: True, NO_SIGNING: True}),
        ],
        ids=["expired", "not yet valid", "without basicConstraints", "CA:FALSE", "without keyCertSign"],
    )
    def test_refuses_one_that_may_not_sign(
        self, directory: Path, ca: TestCA, call: Callable[[OpensslBackend], object]
    ) -> None:
        """An expired or future certificate, or no CA's, signs nothing."""
        directory.joinpath("ca.crt").write_bytes(ca.certificate_pem)
        with pytest.raises(BackendRefusedError) as e:
            call(opened(directory))
        assert ("valid now" in str(e.value)) == ("clock" in e.value.hint)
        assert rows(directory) == []

    @pytest.mark.parametrize("ca", [ca_with({TRUE: True}), ca_with({TRUE: True, KEY_USAGE: True})])
    def test_accepts_one_that_may(self, directory: Path, ca: TestCA, call: Callable[[OpensslBackend], object]) -> None:
        """A certificate that differs from a refused one in that point only is used."""
        directory.joinpath("ca.crt").write_bytes(ca.certificate_pem)
        call(opened(directory))

    @pytest.mark.parametrize("text", [b"", b"junk", CA.key_pem])
    def test_refuses_a_file_without_one(
        self, directory: Path, text: bytes, call: Callable[[OpensslBackend], object]
    ) -> None:
        """A certificate file without a certificate is named."""
        directory.joinpath("ca.crt").write_bytes(text)
        with pytest.raises(BackendRefusedError, match=re.escape(str(directory / "ca.crt"))):
            call(opened(directory))

    @pytest.mark.first_use("9")
    @pytest.mark.parametrize("file", ["ca.crt", "ca.key", "index.txt", "newcerts"])
    def test_names_what_is_missing(self, directory: Path, file: str, call: Callable[[OpensslBackend], object]) -> None:
        """A missing file of the CA is named."""
        path = directory / file
        path.rmdir() if path.is_dir() else path.unlink()
        with pytest.raises(BackendRefusedError, match=re.escape(str(path))) as e:
            call(opened(directory))
        assert (e.value.exit_code, bool(e.value.hint)) == (Exit.USAGE, True)

    @pytest.mark.parametrize("file", ["ca.crt", "ca.key", "index.txt", "index.txt.attr"])
    def test_does_not_wait_at_a_fifo(
        self, directory: Path, file: str, call: Callable[[OpensslBackend], object]
    ) -> None:
        """A FIFO in the place of a file is named, and nothing waits for its writer."""
        (directory / file).unlink(missing_ok=True)
        os.mkfifo(directory / file)
        with pytest.raises(
            BackendRefusedError, match=f"{re.escape(str(directory / file))}.*a FIFO, not a regular file"
        ):
            call(opened(directory))

    @pytest.mark.parametrize("file", ["ca.crt", "ca.key", "index.txt", "index.txt.attr"])
    def test_reads_no_file_without_bound(
        self, directory: Path, file: str, call: Callable[[OpensslBackend], object]
    ) -> None:
        """It would fill the memory of the CA's host: it is named, and not read."""
        with directory.joinpath(file).open("ab") as opened_file:
            opened_file.truncate(1 << 29)
        with pytest.raises(BackendRefusedError, match=f"{re.escape(str(directory / file))}.*more than [0-9]+ bytes"):
            call(opened(directory))

    @pytest.mark.parametrize("key", [b"", b"junk", TestCA.make("x").key_pem], ids=["empty", "junk", "another CA's"])
    def test_refuses_a_key_that_is_not_its_own(
        self, directory: Path, key: bytes, call: Callable[[OpensslBackend], object]
    ) -> None:
        """A key file without the CA's key is named, and nothing is recorded."""
        directory.joinpath("ca.key").write_bytes(key)
        with pytest.raises(BackendRefusedError, match=re.escape(str(directory / "ca.key"))):
            call(opened(directory))
        assert rows(directory) == []

    @pytest.mark.first_use("9")
    def test_needs_the_right_passphrase(
        self, encrypted: Path, tmp_path: Path, call: Callable[[OpensslBackend], object]
    ) -> None:
        """An encrypted key is used with its passphrase, and refused with another or none, which no text shows."""
        for wrong in (None, secret(tmp_path, "wrong-passphrase")):
            with pytest.raises(BackendRefusedError) as e:
                call(opened(encrypted, passphrase=wrong))
            assert "wrong-passphrase" not in f"{e.value} {e.value.hint} {e.value!r}"
            assert (e.value.exit_code, bool(e.value.hint)) == (Exit.USAGE, True)
        assert rows(encrypted) == []
        call(opened(encrypted, passphrase=secret(tmp_path)))

    def test_needs_a_passphrase_that_openssl_can_take(
        self, encrypted: Path, tmp_path: Path, call: Callable[[OpensslBackend], object]
    ) -> None:
        """openssl takes one line of 1023 bytes; more is refused before it is asked, and so is a missing file."""
        for bad in ("two\nlines", "x" * 1024):
            with pytest.raises(BackendRefusedError) as e:
                call(opened(encrypted, passphrase=secret(tmp_path, bad)))
            assert bad not in str(e.value)
        with pytest.raises(BackendRefusedError) as e:
            call(opened(encrypted, passphrase=Secret("file", str(tmp_path / "nowhere"))))
        assert (e.value.exit_code, bool(e.value.hint)) == (Exit.USAGE, True)

    def test_a_passphrase_for_a_plain_key_does_no_harm(
        self, directory: Path, tmp_path: Path, call: Callable[[OpensslBackend], object]
    ) -> None:
        """A key that is not encrypted is used whatever the passphrase."""
        call(opened(directory, passphrase=secret(tmp_path)))

    def test_needs_the_program(self, directory: Path, tmp_path: Path, call: Callable[[OpensslBackend], object]) -> None:
        """A program that is not there, or can't be started, is refused by its name."""
        broken = tmp_path / "broken"
        broken.write_text("#!/nonexistent/interpreter\n")
        broken.chmod(0o755)
        for missing in (str(tmp_path / "nowhere"), "no-such-openssl", str(broken)):
            with pytest.raises(LocalFileError, match=re.escape(missing)):
                call(opened(directory, openssl=missing))
        call(opened(directory, openssl=str(REAL)))


@pytest.mark.first_use("9")
def test_a_cas_folder_that_is_not_there_is_a_matter_of_this_machine(tmp_path: Path) -> None:
    """The exit code is 2, as for each of its files, since no CA has refused."""
    with pytest.raises(BackendRefusedError) as e:
        opened(tmp_path / "nowhere").issuers()
    assert (e.value.exit_code, bool(e.value.hint)) == (Exit.USAGE, True)


def test_a_long_passphrase_of_one_line_is_taken(tmp_path: Path) -> None:
    """The longest passphrase that openssl takes works."""
    long = "x" * 1023
    directory = make_ca_directory(tmp_path / "long", CA.certificate_pem, CA.key_pem, long)
    opened(directory, passphrase=secret(tmp_path, long)).sign(renewal())


@pytest.mark.parametrize(
    "text", ["OpenSSL 1.0.2k-fips  26 Jan 2017", "OpenSSL 1.1.0l  10 Sep 2019", "LibreSSL 3.8.2", ""]
)
def test_check_refuses_another_program(directory: Path, tmp_path: Path, text: str) -> None:
    """openssl must be OpenSSL, and not older than 1.1.1."""
    version = 'if [ "$1" = version ]; then echo "{}"; else exec $REAL "$@"; fi'
    with pytest.raises(BackendRefusedError):
        opened(directory, openssl=program(tmp_path, version.format(text))).check([SERVER])
    with pytest.raises(BackendUnavailableError):
        opened(directory, openssl=program(tmp_path, "sleep 60"), timeout=timedelta(seconds=0.1)).check([SERVER])
    for good in ("OpenSSL 1.1.1w  11 Sep 2023", "OpenSSL 3.5.9 1 Jan 2027 (Library: OpenSSL 3.5.9)"):
        assert opened(directory, openssl=program(tmp_path, version.format(good))).check([SERVER]) == {}


def test_check_changes_nothing(encrypted: Path, tmp_path: Path) -> None:
    """The preflight writes nothing into the CA's directory, not even a lock."""
    before = content(encrypted)
    assert opened(encrypted, passphrase=secret(tmp_path)).check([SERVER]) == {}
    assert content(encrypted) == before


# The passphrase and the process


def test_the_passphrase_is_on_no_command_line_and_in_no_environment(
    encrypted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other users and child processes see neither the passphrase nor our environment in the process."""
    monkeypatch.setenv("CA_PASSPHRASE", PASSPHRASE)
    monkeypatch.setenv("OPENSSL_CONF", "/nonexistent")
    wrapper = program(
        tmp_path,
        f"""
        cat /proc/$$/cmdline >> {tmp_path}/cmdline
        cat /proc/$$/environ >> {tmp_path}/environ
        cat openssl.cnf *.csr >> {tmp_path}/files 2> /dev/null
        exec $REAL "$@"
        """,
    )

    opened(encrypted, passphrase=Secret("env", "CA_PASSPHRASE"), openssl=wrapper).sign(renewal())

    seen = {file: tmp_path.joinpath(file).read_bytes() for file in ("cmdline", "environ", "files")}
    assert b"-passin\0fd:" in seen["cmdline"]
    assert not [file for file, text in seen.items() if PASSPHRASE.encode() in text]
    variables = {variable.split(b"=")[0] for variable in seen["environ"].split(b"\0") if variable}
    assert variables <= {b"PATH", b"LD_LIBRARY_PATH", b"LC_ALL"}


def test_a_passphrase_that_openssl_prints_is_not_passed_on(encrypted: Path, tmp_path: Path) -> None:
    """Even a program that prints the passphrase does not bring it into our error."""
    wrapper = program(tmp_path, f'echo "cannot use {PASSPHRASE} here" >&2; exit 1')
    with pytest.raises(BackendRefusedError, match="cannot use") as e:
        opened(encrypted, passphrase=secret(tmp_path), openssl=wrapper).sign(renewal())
    assert PASSPHRASE not in f"{e.value} {e.value.hint}"


ON_A_TERMINAL = """
import sys
from pathlib import Path
open("/dev/tty").close()  # there is one
sys.path.insert(0, sys.argv[4])
from backends.openssl import OpensslBackend
from backends.openssl.settings import OpensslSettings
from bridge.contract import SignRequest
from bridge.errors import BackendRefusedError
from bridge.specs import SPECS
from datetime import timedelta
settings = OpensslSettings(dir=Path(sys.argv[1]), openssl=sys.argv[3], timeout=timedelta(minutes=3))
csr = Path(sys.argv[2]).read_bytes()
try:
    OpensslBackend.from_settings(settings).sign(
        SignRequest(spec=SPECS["apiserver"], csr_pem=csr, validity=timedelta(days=1))
    )
except BackendRefusedError:
    sys.exit(42)
"""


def test_never_asks_on_a_terminal(encrypted: Path, tmp_path: Path) -> None:
    """Started on a terminal, with an encrypted key and no passphrase, it refuses instead of asking there."""
    tmp_path.joinpath("csr").write_bytes(request().csr_pem)
    wrapper = program(tmp_path, f'(: < /dev/tty) 2> /dev/null && echo >> {tmp_path}/terminal; exec $REAL "$@"')
    arguments = [sys.executable, "-c", ON_A_TERMINAL, str(encrypted), str(tmp_path / "csr"), wrapper, str(ROOT)]
    ours, theirs = pty.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    try:
        done = subprocess.run(
            arguments, stdin=theirs, start_new_session=True, preexec_fn=take_terminal, timeout=300, check=False
        )
    finally:
        os.close(theirs)
        os.close(ours)
    assert done.returncode == 42
    assert not tmp_path.joinpath("terminal").exists()


def test_a_process_that_signs_many_has_more_time(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time limit is for one request: what is too slow for one is not too slow for many."""
    monkeypatch.setattr("backends.openssl.program.CSRS_A_LIMIT", 1)
    settings: dict[str, Any] = {"openssl": program(tmp_path, 'sleep 8; exec $REAL "$@"')}
    settings["timeout"] = timedelta(seconds=3)
    with pytest.raises(BackendUnavailableError, match="within 6 s"):
        opened(directory, **settings).sign(renewal())
    answers = opened(directory, **settings).sign_many([renewal() for _ in range(30)])
    assert all(isinstance(answer, Issued) for answer in answers)


def test_a_slow_program_is_stopped(directory: Path, tmp_path: Path) -> None:
    """At its time limit the process and its children are killed, and the CA is unavailable."""
    slow = program(tmp_path, f"sleep 600 & echo $$ $! > {tmp_path}/pids; wait")
    begin, pids = time.monotonic(), tmp_path / "pids"

    while not (pids.exists() and pids.read_text()):  # it may be stopped before it has begun
        with pytest.raises(BackendUnavailableError):
            opened(directory, openssl=slow, timeout=timedelta(seconds=1)).sign(renewal())
        assert time.monotonic() - begin < 300

    for pid in map(int, pids.read_text().split()):
        assert has_ended(pid)
    opened(directory).sign(renewal())


def has_ended(pid: int) -> bool:
    """Whether a process ends that was killed."""
    return wait_until(lambda: not is_running(pid), bool, timedelta(minutes=3), pause_seconds=0.02)


def test_a_certificate_of_a_stopped_program_is_not_lost(directory: Path, tmp_path: Path) -> None:
    """A certificate that is recorded when the time is up is delivered."""
    slow = program(tmp_path, '$REAL "$@"; sleep 600')
    leaf = opened(directory, openssl=slow, timeout=timedelta(seconds=20)).sign(renewal()).leaf
    assert rows(directory) == [leaf.serial_number]


def test_the_exit_code_says_nothing(directory: Path, tmp_path: Path) -> None:
    """A certificate that is recorded counts, with whatever code the program ended; without one, 0 is no success."""
    crashing = program(tmp_path, '$REAL "$@"; kill -SEGV $$')
    leaf = opened(directory, openssl=crashing).sign(renewal()).leaf
    assert rows(directory) == [leaf.serial_number]

    with pytest.raises(BackendRefusedError):
        opened(directory, openssl=program(tmp_path, "exit 0")).sign(renewal())


# The database


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "no final newline": lambda text: text.removesuffix(b"\n"),
    "NUL bytes": lambda text: text + bytes(64),
    "blank line": lambda text: text + b"\n",
    "comment": lambda text: b"# ours\n" + text,
    "garbage": lambda text: text + b"garbage\n",
    "spaces": lambda text: text.replace(b"\t", b" "),
    "seven fields": lambda text: text.replace(b"unknown", b"unknown\tunknown"),
    "duplicate serial": lambda text: text + text,
    "odd serial": lambda text: text.replace(b"\tunknown", b"0\tunknown"),
    "revoked without date": lambda text: text.replace(b"V", b"R", 1),
    "valid with date": lambda text: text.replace(b"Z\t", b"Z\t260101000000Z", 1),
    "emptied": lambda _: b"",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_refuses_a_damaged_index(directory: Path, damage: Callable[[bytes], bytes]) -> None:
    """An index that openssl would refuse, or lose rows of without a word, is refused and left as it is."""
    backend = opened(directory)
    backend.sign(renewal())
    backend.sign(renewal())
    index = directory / "index.txt"
    good = index.read_bytes()
    damaged = damage(good)
    index.write_bytes(damaged)

    with pytest.raises(BackendRefusedError, match=re.escape(str(index))):
        backend.sign(renewal())
    with pytest.raises(BackendRefusedError, match=re.escape(str(index))):
        backend.check([SERVER])

    assert index.read_bytes() == damaged
    index.write_bytes(good)
    assert backend.check([SERVER]) == {}
    backend.sign(renewal())
    assert index.read_bytes().startswith(good)


def test_accepts_rows_of_every_kind(directory: Path) -> None:
    """Valid, revoked and expired rows, old forms and odd subjects stay byte by byte."""
    text = (
        b"V\t351231235959Z\t\t0A\tunknown\t/O=system:masters/CN=a\\/b\\x0A\n"
        b"R\t20601231235959Z\t260101000000Z,superseded\t0b\tunknown\t/CN=b\r\n"
        b"R\t351231235959Z\t260101000000Z\t00FF\tunknown\t/CN=M\xc3\xbcller\n"
        b"E\t201231235959Z\t\t00\tunknown\t\n"
    )
    directory.joinpath("index.txt").write_bytes(text)
    opened(directory).sign(renewal())
    assert directory.joinpath("index.txt").read_bytes().startswith(text)


def test_tells_the_line_of_the_damage() -> None:
    """Damage is found with its line, and numbers are compared as numbers."""
    row = b"V\t351231235959Z\t\t0A\tunknown\t/CN=a\n"
    assert parse_index(row + row.replace(b"0A", b"0B")) == {10: 1, 11: 2}
    with pytest.raises(IndexDamagedError, match="line 2"):
        parse_index(row + row.replace(b"0A", b"000a"))


def killed_run(directory: Path, tmp_path: Path, rewind: str) -> OpensslBackend:
    """
    A backend whose program dies as by `kill -9` in the middle of writing.

    The program runs openssl to its end, takes back a part of what that wrote, and kills itself; the steps and their
    order are those of openssl's system calls.
    """
    script = f"""
    if [[ "$*" != *-infiles* ]]; then exec $REAL "$@"; fi
    cd database && cp index.txt index.before && cp index.txt.attr attr.before && ls newcerts > {tmp_path}/known
    cd - > /dev/null; $REAL "$@" || exit; cd database
    new=$(ls newcerts | grep -vxFf {tmp_path}/known)
    {rewind}
    rm -f index.before attr.before
    kill -9 $$
    """
    return opened(directory, openssl=program(tmp_path, script))


UNCOMMITTED = "mv index.txt index.txt.new; cp index.before index.txt; mv index.txt.attr index.txt.attr.new; cp attr.before index.txt.attr;"
KILLED = {
    "before anything is written": "cp index.before index.txt; (cd newcerts; rm $new)",
    "before the certificates": f"{UNCOMMITTED} (cd newcerts; rm $new)",
    "with an empty certificate": f"{UNCOMMITTED} (cd newcerts; for f in $new; do : > $f; done)",
    "with half a certificate": f"{UNCOMMITTED} (cd newcerts; for f in $new; do truncate -s 500 $f; done)",
    "before the renames": UNCOMMITTED,
}


@pytest.mark.parametrize("rewind", KILLED.values(), ids=KILLED.keys())
def test_a_run_killed_before_its_commit_is_repaired(directory: Path, tmp_path: Path, rewind: str) -> None:
    """The killed run is unavailable; the next one records what it signed, and moves aside what it half wrote."""
    opened(directory).sign(renewal())
    first = rows(directory)
    with pytest.raises(BackendUnavailableError):
        killed_run(directory, tmp_path, rewind).sign_many([renewal(), renewal()])
    assert rows(directory) == first
    signed = {path.name: path.stat().st_size for path in directory.joinpath("newcerts").iterdir()}
    whole = {int(file.removesuffix(".pem"), 16) for file, size in signed.items() if size > 500}
    age(directory)

    leaf = opened(directory).sign(renewal()).leaf

    assert set(rows(directory)) == whole | {leaf.serial_number} == certificates(directory)
    quarantine = directory / "newcerts" / ".ca-bridge-quarantine"
    aside = {path.name.partition(".pem")[0] + ".pem" for path in quarantine.iterdir()} if quarantine.exists() else set()
    assert aside == {file for file, size in signed.items() if size <= 500}


@pytest.mark.parametrize(
    "rewind",
    ["mv index.txt index.txt.new", "mv index.txt.attr index.txt.attr.new", "rm index.txt.attr"],
    ids=["between the renames of the index", "between the renames of the attributes", "attributes lost"],
)
def test_a_run_killed_in_its_commit_is_finished(directory: Path, tmp_path: Path, rewind: str) -> None:
    """When everything is written but a rename is missing, the rename is done and the certificate delivered."""
    opened(directory).sign(renewal())
    leaf = killed_run(directory, tmp_path, rewind).sign(renewal()).leaf

    assert rows(directory)[1:] == [leaf.serial_number]
    assert directory.joinpath("index.txt.attr").read_text() == "unique_subject = no\n"
    opened(directory).sign(renewal())


def without_index(directory: Path, *, new: bool = True, old: bool = True) -> None:
    """Take the index away, as a run does that dies between its renames."""
    directory.joinpath("index.txt").rename(directory / "index.txt.new")
    if not new:
        directory.joinpath("index.txt.new").unlink()
    if not old:
        directory.joinpath("index.txt.old").unlink()


def test_a_missing_index_is_put_back(directory: Path) -> None:
    """The new index is taken when it is whole, or else the old one; with neither, a person is needed."""
    backend = opened(directory)
    first = backend.sign(renewal()).leaf.serial_number
    second = backend.sign(renewal()).leaf.serial_number
    age(directory)

    without_index(directory)
    assert backend.check([SERVER]) == {}
    third = backend.sign(renewal()).leaf.serial_number
    assert rows(directory) == [first, second, third]

    without_index(directory, new=False)
    age(directory)
    fourth = backend.sign(renewal()).leaf.serial_number
    assert set(rows(directory)) == {first, second, third, fourth}  # the third as an orphan

    without_index(directory, new=False, old=False)
    with pytest.raises(BackendRefusedError):
        backend.sign(renewal())
    with pytest.raises(BackendRefusedError):
        backend.check([SERVER])


def test_a_new_index_that_is_not_whole_is_not_taken(directory: Path) -> None:
    """When a certificate of the new index was never written, the old index counts."""
    backend = opened(directory)
    first = backend.sign(renewal()).leaf.serial_number
    backend.sign(renewal())
    for path in directory.joinpath("newcerts").iterdir():
        if int(path.stem, 16) != first:
            path.write_bytes(b"")
    age(directory)

    without_index(directory)
    leaf = backend.sign(renewal()).leaf

    assert rows(directory) == [first, leaf.serial_number]


def test_records_orphans_of_this_ca_alone(directory: Path, tmp_path: Path) -> None:
    """Certificates in no index are recorded if they are this CA's; other CAs', expired ones and other files are left alone."""
    other = TestCA.make("other")
    stray = opened(make_ca_directory(tmp_path / "other", other.certificate_pem, other.key_pem)).sign(renewal()).leaf
    backend = opened(directory)
    orphan = backend.sign(renewal()).leaf
    expired = CA.leaf(SERVER)
    expired = (
        x509.CertificateBuilder(
            CA.certificate.subject, expired.subject, expired.public_key(), 0xABCDEF,
            datetime.now(UTC) - timedelta(days=9), datetime.now(UTC) - timedelta(days=8),
        ).sign(CA.key, hashes.SHA256())
    )  # fmt: skip
    newcerts = directory / "newcerts"
    for certificate in (stray, expired):
        newcerts.joinpath(f"{certificate.serial_number:X}.pem".zfill(10)).write_bytes(pem(certificate))
    newcerts.joinpath("README").write_text("not a certificate\n")
    directory.joinpath("index.txt").write_bytes(b"")
    directory.joinpath("index.txt.old").unlink()
    for path in directory.glob("index.txt.ca-bridge.*"):
        path.unlink()
    age(directory)
    before = {path.name for path in newcerts.iterdir()}

    leaf = backend.sign(renewal()).leaf

    assert rows(directory) == [orphan.serial_number, leaf.serial_number]
    assert before < {path.name for path in newcerts.iterdir()}


def test_a_truncated_index_is_put_back(directory: Path, tmp_path: Path) -> None:
    """When a run cuts the index, as on a full disk, the old one comes back, and the next run records what was signed."""
    opened(directory).sign(renewal())
    before = directory.joinpath("index.txt").read_bytes()
    cutting = program(tmp_path, '$REAL "$@"; truncate -s 60 database/index.txt')

    with pytest.raises(BackendRefusedError):
        opened(directory, openssl=cutting).sign(renewal())

    assert directory.joinpath("index.txt").read_bytes() == before
    assert len(certificates(directory)) == 2
    age(directory)
    opened(directory).sign(renewal())
    assert set(rows(directory)) == certificates(directory)
    assert len(rows(directory)) == 3


def test_an_empty_certificate_file_is_no_answer(directory: Path, tmp_path: Path) -> None:
    """A certificate that did not reach the disk is unavailable; the other of its run is delivered."""
    emptying = program(tmp_path, '$REAL "$@"; : > newcerts/$(cut -f4 database/index.txt | tail -n 1).pem')
    good, bad = opened(directory, openssl=emptying).sign_many([renewal(), renewal()])
    assert isinstance(good, Issued)
    assert isinstance(bad, BackendUnavailableError)


def test_a_disk_without_room_is_not_written_to(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With less free space than a run needs none begins, since openssl would damage the index and exit with 0."""
    # the one answer that a real disk won't give here: 20 kB free
    real = os.statvfs(directory)
    full = os.statvfs_result((*real[:4], 5, *real[5:])) if real.f_frsize == 4096 else None
    assert full is not None
    before = content(directory)
    monkeypatch.setattr(os, "statvfs", lambda _: full)

    with pytest.raises(BackendUnavailableError):
        opened(directory).sign(renewal())

    assert content(directory) == {**before, ".ca-bridge.lock": b""}
    monkeypatch.undo()
    opened(directory).sign(renewal())


def test_a_revocation_meanwhile_is_not_undone(directory: Path, tmp_path: Path) -> None:
    """Rows that another process changed without our lock during a run are no damage, as long as none is lost."""
    opened(directory).sign(renewal())
    revoking = program(
        tmp_path,
        """
        $REAL "$@"
        first=newcerts/$(cut -f4 database/index.txt | head -n 1).pem
        $REAL ca -config openssl.cnf -name bridge -revoke $first 2> /dev/null
        """,
    )
    leaf = opened(directory, openssl=revoking).sign(renewal()).leaf

    lines = directory.joinpath("index.txt").read_text().splitlines()
    assert [line[0] for line in lines] == ["R", "V"]
    assert int(lines[1].split("\t")[3], 16) == leaf.serial_number


def test_keeps_three_backups(directory: Path) -> None:
    """Before each run the index is copied; the three youngest copies stay."""
    backend, states = opened(directory), []
    for _ in range(5):
        states.append(directory.joinpath("index.txt").read_bytes())
        backend.sign(renewal())
    copies = sorted(directory.glob("index.txt.ca-bridge.*"))
    assert [copy.read_bytes() for copy in copies] == states[-3:]


class TestUniqueSubject:
    """`index.txt.attr` wins over every openssl.cnf."""

    @pytest.mark.parametrize("text", ["unique_subject = yes\n", "# ours\n\nunique_subject=1\n", "unique_subject = \n"])
    def test_yes_is_refused_by_file_and_line(self, directory: Path, text: str) -> None:
        """With yes no certificate can be renewed: it is refused, and the site's file left as it is."""
        attributes = directory / "index.txt.attr"
        attributes.write_text(text)
        line = text.count("\n")
        backend = opened(directory)
        for call in (lambda: backend.sign(renewal()), lambda: backend.check([SERVER])):
            with pytest.raises(BackendRefusedError, match=re.escape(f"{attributes}:{line}:")):
                call()
        assert attributes.read_text() == text

    @pytest.mark.parametrize("text", [None, "", "unique_subject = no\n", "# ours\nunique_subject=n\n", "other = 1\n"])
    def test_no_or_nothing_becomes_no(self, directory: Path, text: str | None) -> None:
        """A missing or silent file is written, since openssl would take the default yes for good."""
        attributes = directory / "index.txt.attr"
        attributes.unlink()
        if text is not None:
            attributes.write_text(text)
        for _ in range(2):
            opened(directory).sign(renewal())
        assert attributes.read_text() == "unique_subject = no\n"


# Several at once


SIGN_SOME = """
import sys
from datetime import timedelta
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from backends.openssl import OpensslBackend
from backends.openssl.settings import OpensslSettings
from bridge.contract import SignRequest
from bridge.specs import SPECS
backend = OpensslBackend.from_settings(OpensslSettings(dir=Path(sys.argv[2]), timeout=timedelta(seconds=120)))
for path in sys.argv[3:]:
    request = SignRequest(spec=SPECS["apiserver"], csr_pem=Path(path).read_bytes(), validity=timedelta(days=1))
    print(backend.sign(request).leaf.serial_number)
"""


def test_many_processes_lose_nothing(directory: Path, tmp_path: Path) -> None:
    """Eight processes that sign at once get certificates with numbers of their own, and all are recorded."""
    processes = []
    for number in range(8):
        paths = []
        for part in range(4):
            path = tmp_path / f"{number}-{part}.csr"
            path.write_bytes(request().csr_pem)
            paths.append(str(path))
        arguments = [sys.executable, "-c", SIGN_SOME, str(ROOT), str(directory), *paths]
        processes.append(subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=300)[0] for process in processes]

    assert [process.returncode for process in processes] == [0] * 8
    serials = [int(line) for output in outputs for line in output.split()]
    assert Counter(serials) == Counter(rows(directory))
    assert set(serials) == certificates(directory)
    assert len(serials) == 32


def test_the_lock_outlives_a_killed_bridge(directory: Path, tmp_path: Path) -> None:
    """While an openssl still runs whose parent was killed, the database stays locked."""
    tmp_path.joinpath("csr").write_bytes(request().csr_pem)
    slow = program(tmp_path, f"echo $$ > {tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid; exec sleep 600")
    script = SIGN_SOME.replace("dir=Path(sys.argv[2]),", f"dir=Path(sys.argv[2]), openssl={slow!r},")
    parent = subprocess.Popen([sys.executable, "-c", script, ROOT, directory, tmp_path / "csr"])
    while not tmp_path.joinpath("pid").exists():
        assert parent.poll() is None
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    orphan = int(tmp_path.joinpath("pid").read_text())
    try:
        with pytest.raises(BackendUnavailableError):
            opened(directory, timeout=timedelta(seconds=0.2)).sign(renewal())
    finally:
        os.kill(orphan, signal.SIGKILL)
    [left] = tmp_path.joinpath("tmp").iterdir()
    other = left.with_name("ca-bridge-other")
    other.mkdir()
    other.joinpath("database").symlink_to(tmp_path)
    opened(directory).check([])
    assert left.exists()
    opened(directory).sign(renewal())
    assert list(tmp_path.joinpath("tmp").iterdir()) == [other]  # of another database, whose lock we had not
    shutil.rmtree(other)


def test_what_a_killed_check_or_copy_left_goes_with_the_next_run(directory: Path, tmp_path: Path) -> None:
    """A check that may still run keeps its folder; one of the day before does not, and no hidden copy of the index stays."""
    killed = "import os\ntype(backend._openssl).public_key = lambda *_: os.kill(os.getpid(), 9)\nbackend.check([])\n"
    script = SIGN_SOME.partition("for path")[0] + killed
    subprocess.run([sys.executable, "-c", script, ROOT, directory], check=False)
    [left] = tmp_path.joinpath("tmp").iterdir()
    os.close(tempfile.mkstemp(dir=directory, prefix=".index.txt.ca-bridge.20260101T000000.000000Z.")[0])
    directory.joinpath(".index.txt.swp").touch()
    opened(directory).sign(renewal())
    assert left.exists()
    assert [path.name for path in directory.glob(".index*")] == [".index.txt.swp"]
    os.utime(left, (0, 0))
    opened(directory).sign(renewal())
    assert not left.exists()


# Owners, modes, links and odd names


@pytest.mark.parametrize("last", ["sign", "revoke", "recover"])
def test_keeps_the_mode_and_the_owner_of_the_index(directory: Path, last: str) -> None:
    """The CA's own user can still read and write the database after a run with another umask, or of root."""
    files = [directory / "index.txt", directory / "index.txt.attr"]
    owner = (65534, 65534) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    for path in files:
        path.chmod(0o640)
        os.chown(path, *owner)
    umask = os.umask(0o077)
    try:
        leaf = opened(directory).sign(renewal()).leaf
        if last == "revoke":
            opened(directory).revoke(leaf)
        elif last == "recover":
            (directory / "index.txt").write_bytes(b"")  # the certificate is there, and its row is not
            (directory / "index.txt.old").write_bytes(b"")
            for copy in directory.glob("index.txt.ca-bridge.*"):
                copy.unlink()
            assert opened(directory).recall([], datetime.now(UTC)) == []
    finally:
        os.umask(umask)
    lock = directory / ".ca-bridge.lock"  # no other user may hold it
    for path in (*files, *directory.glob("newcerts/*.pem"), lock):
        status = path.stat()
        assert (path.name, stat.S_IMODE(status.st_mode)) == (path.name, 0o600 if path == lock else 0o640)
        assert (status.st_uid, status.st_gid) == owner
    assert certificates(directory) == {leaf.serial_number}


def test_follows_a_linked_index(directory: Path, tmp_path: Path) -> None:
    """A symbolic link to an index stays one, and its target gets the row."""
    real = tmp_path / "real"
    real.mkdir()
    directory.joinpath("index.txt").rename(real / "ca.db")
    directory.joinpath("index.txt").symlink_to(real / "ca.db")

    serial = opened(directory).sign(renewal()).leaf.serial_number

    assert directory.joinpath("index.txt").is_symlink()
    assert rows(directory) == [serial]
    assert real.joinpath("ca.db.attr").exists()


@pytest.mark.parametrize(
    "folder", ["a$b", "$ENV::HOME", 'quo"te', "it's", "a # b", "back\\slash", "new\nline", "ä", "x" * 250]
)
def test_takes_folders_of_any_name(tmp_path: Path, folder: str) -> None:
    """Nothing in a path of the site means anything to openssl, nor is it too long for it."""
    directory = make_ca_directory(tmp_path / folder / "ca", CA.certificate_pem, CA.key_pem)
    backend = opened(directory)
    assert backend.check([SERVER]) == {}
    leaf = backend.sign(renewal()).leaf
    assert rows(directory) == [leaf.serial_number]


def test_refuses_an_index_of_an_odd_name(directory: Path) -> None:
    """The index's own name has to be written into our config; a plain one is taken, another refused."""
    for plain in ("index.txt", "ca_db-1.txt"):
        directory.joinpath(plain).touch()
        opened(directory, database=directory / plain).sign(renewal())
    with pytest.raises(BackendRefusedError):
        opened(directory, database=directory / "index$HOME.txt").sign(renewal())


def as_another_user(function: Callable[[], object]) -> BackendError | None:
    """The error of a function that is called without root's rights to write everywhere."""
    if os.geteuid() != 0:
        return error_of(function)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            os.write(writing, pickle.dumps(error_of(function)))
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    error = pickle.loads(answer)  # noqa: S301
    assert error is None or isinstance(error, BackendError)
    return error


def error_of(function: Callable[[], object]) -> BackendError | None:
    """The error that a function raises."""
    try:
        function()
    except BackendError as e:
        return e
    return None


@pytest.mark.parametrize("place", [".", "newcerts"])
def test_refuses_a_folder_that_it_may_not_write(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the right to write in the CA's folders nothing is signed; with it the CA's own user needs no root."""
    mine = 65534 if os.geteuid() == 0 else os.geteuid()
    with tempfile.TemporaryDirectory(dir="/tmp") as base:
        Path(base).chmod(0o1777)
        monkeypatch.setenv("TMPDIR", base)
        directory = make_ca_directory(Path(base) / "ca", CA.certificate_pem, CA.key_pem)
        for path in (directory, *directory.iterdir()):
            os.chown(path, mine, -1)
        asked = renewal()
        directory.joinpath(place).chmod(0o500)
        for call in (lambda: opened(directory).sign(asked), lambda: opened(directory).check([SERVER])):
            assert isinstance(as_another_user(call), BackendRefusedError)
        directory.joinpath(place).chmod(0o700)
        assert as_another_user(lambda: opened(directory).check([SERVER])) is None
        assert as_another_user(lambda: opened(directory).sign(asked)) is None
        assert len(rows(directory)) == 1


# Settings


def site(tmp_path: Path, text: str) -> Path:
    """A site's openssl.cnf."""
    path = tmp_path / "openssl.cnf"
    path.write_text(textwrap.dedent(text))
    return path


def hostile(directory: Path) -> str:
    """An openssl.cnf with everything in it that spoils a certificate."""
    return f"""
    copy_extensions = copyall            # inherited by every section
    x509_extensions = v3_ca
    [ ca ]
    default_ca = CA_default
    [ CA_default ]
    dir = {directory}
    database = $dir/index.txt
    new_certs_dir = ${{dir}}/newcerts
    certificate = $(dir)/ca.crt
    private_key = $CA_default::dir/ca.key
    preserve = yes
    unique_subject = yes
    policy = policy_match
    default_md = md5
    default_days = 36500
    email_in_dn = no
    serial = $dir/serial
    [ policy_match ]
    countryName = match
    [ v3_ca ]
    basicConstraints = critical,CA:true
    [ server ]
    basicConstraints = critical,CA:true
    [ client ]
    extendedKeyUsage = codeSigning
    """


def test_a_hostile_site_config_changes_nothing(directory: Path, tmp_path: Path) -> None:
    """A site's openssl.cnf decides nothing but the places of the files."""
    directory.joinpath("index.txt.attr").unlink()
    backend = OpensslBackend.from_settings(OpensslSettings(config=site(tmp_path, hostile(directory))))
    for asked in [renewal(SERVER), renewal(CLIENT), request(SUBJECTS["other attributes"])] * 2:
        leaf = backend.sign(asked).leaf
        assert leaf.subject.public_bytes() == asked.csr.subject.public_bytes()
        assert ekus(leaf) == {eku.value for eku in asked.spec.ekus}
        assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        assert leaf.not_valid_after_utc - datetime.now(UTC) < timedelta(days=31)
    with pytest.raises(BackendRefusedError):
        backend.sign(BAD_REQUESTS["CA:TRUE"]())


def test_takes_another_section(directory: Path, tmp_path: Path) -> None:
    """The section of the settings counts, and without one the file's default_ca."""
    text = hostile(directory).replace("[ CA_default ]", "[ etcd ]")
    path = site(tmp_path, text.replace("CA_default::dir", "etcd::dir"))
    OpensslBackend.from_settings(OpensslSettings(config=path, section="etcd")).sign(renewal())
    with pytest.raises(SettingsError):
        OpensslBackend.from_settings(OpensslSettings(config=path))


@pytest.mark.parametrize(
    "line",
    [
        "dir = .",
        "private_key = ./ca.key",
        "private_key = pkcs11:token=ca;object=key?pin-value=1234",
        'database = "/with quotes/index.txt"',
        "database = /with\\\\escape/index.txt",
        "certificate = $nowhere/ca.crt",
        "certificate = $ENV::CA_BRIDGE_NOT_SET/ca.crt",
        "certificate = ${dir/ca.crt",
        "certificate =",
        "no equals sign",
        "[ unclosed",
        ".include /etc/ssl/other.cnf",
        ".include = /etc/ssl/other.cnf",
        ".pragma = dollarid:on",
    ],
)
def test_refuses_a_site_config_that_is_not_sure(directory: Path, tmp_path: Path, line: str) -> None:
    """A value that depends on another file, or on where openssl is started, is refused by file; the rest is taken."""
    text = textwrap.dedent(hostile(directory))
    replaced = f"dir = {directory}\n" if line.startswith("dir") else "serial = $dir/serial\n"
    with pytest.raises(SettingsError) as e:
        OpensslBackend.from_settings(OpensslSettings(config=site(tmp_path, text.replace(replaced, f"{line}\n"))))
    assert {problem.file for problem in e.value.problems if problem.key != "pkcs11"} == {tmp_path / "openssl.cnf"}
    assert "1234" not in str(e.value)
    OpensslBackend.from_settings(OpensslSettings(config=site(tmp_path, text)))


def test_refuses_a_site_config_that_is_not_there(tmp_path: Path) -> None:
    """A missing openssl.cnf is a mistake in the settings."""
    with pytest.raises(SettingsError):
        OpensslBackend.from_settings(OpensslSettings(config=tmp_path / "nowhere.cnf"))


CONFIG = """\ufeff# comment = 1
top = a$ENV::CA_TEST   # comment
quoted = "x # y"
[ one ]
empty =
joined = first \\
  second
twice = 1
twice = 2
inherited = $top/b
two::elsewhere = ${one::twice}
broken = ${quoted}
[two]\r
self = $elsewhere\r
"""


def test_reads_the_syntax_of_openssl() -> None:
    """Sections, inheritance, variables, comments, joined lines and repeated keys mean what they do to openssl."""
    config = parse_config(CONFIG, {"CA_TEST": "env"})
    found = {
        (section, key): value.text if (value := config.get(section, key)) else None
        for section, key in [
            *(("one", "top"), ("one", "empty"), ("one", "joined"), ("one", "twice"), ("one", "inherited")),
            *(("two", "elsewhere"), ("two", "self"), ("two", "missing")),
        ]
    }
    assert found == {
        ("one", "top"): "aenv",
        ("one", "empty"): "",
        ("one", "joined"): "first   second",
        ("one", "twice"): "2",
        ("one", "inherited"): "aenv/b",
        ("two", "elsewhere"): "2",
        ("two", "self"): "2",
        ("two", "missing"): None,
    }
    for doubtful in ("quoted", "broken"):
        with pytest.raises(ConfigDoubtError):
            config.get("one", doubtful)


@pytest.mark.parametrize(
    ("keys", "wrong"),
    [
        ({}, {"certificate", "private_key", "database", "new_certs_dir"}),
        ({"certificate": Path("/c"), "database": Path("/d")}, {"private_key", "new_certs_dir"}),
        ({"dir": Path("/ca"), "config": Path("/openssl.cnf")}, {"config"}),
        ({"dir": Path("/ca"), "section": "x"}, {"section"}),
        ({"dir": Path("/ca"), "private_key": "pkcs11:token=ca;pin-value=1234"}, {"private_key", "pkcs11"}),
        ({"dir": Path("/ca"), "private_key": "ca.key"}, {"private_key"}),
        ({"dir": Path("/ca")}, set()),
        ({"dir": Path("/ca"), "private_key": "/hsm/ca.key"}, set()),
        ({"config": Path("/openssl.cnf"), "section": "x"}, set()),
        (
            {
                **{key: Path("/x") for key in ("certificate", "database", "new_certs_dir")},
                "private_key": "/x",
            },
            set(),
        ),
    ],
)
def test_settings_name_each_file_once(keys: dict[str, Any], wrong: set[str]) -> None:
    """The files are named by one of three ways, and the key is a file; a PIN in a URI is not repeated."""
    problems = list(OpensslSettings(**keys).problems())
    assert {problem.key for problem in problems} == wrong
    assert "1234" not in "".join(map(str, problems))


def test_takes_files_from_anywhere(directory: Path, tmp_path: Path) -> None:
    """Each of the four may be where it likes, with dir or without."""
    key = tmp_path / "elsewhere.key"
    directory.joinpath("ca.key").rename(key)
    opened(directory, private_key=str(key)).sign(renewal())
    settings = OpensslSettings(
        certificate=directory / "ca.crt",
        private_key=str(key),
        database=directory / "index.txt",
        new_certs_dir=directory / "newcerts",
    )
    OpensslBackend.from_settings(settings).sign(renewal())
    assert len(rows(directory)) == 2


# What `ca-bridge setup openssl` prints


def test_the_printed_config_signs_by_hand(tmp_path: Path) -> None:
    """The commands in the printed openssl.cnf, run as they stand, give certificates with the right usages."""
    directory = tmp_path / "desk"
    text = openssl_settings.config_text(AUTHORITIES["etcd-ca"], LIVE, timedelta(days=90), directory)
    sample_pki.create_openssl_directory(directory, CA.certificate_pem, CA.key_pem)
    directory.joinpath("openssl.cnf").write_text(text)
    commands = re.findall(r"^#   for (.*):\n#     (flock .*) \\\n#       (.*)$", text, re.MULTILINE)
    seen = set()
    for names, *command in commands:
        for spec in (SPECS[name] for name in names.split(", ")):
            asked = renewal(spec)
            tmp_path.joinpath("NAME.csr").write_bytes(asked.csr_pem)
            subprocess.run(["bash", "-c", " ".join(command)], cwd=tmp_path, check=True, capture_output=True)
            leaf = x509.load_pem_x509_certificate(tmp_path.joinpath("NAME.crt").read_bytes())
            assert ekus(leaf) == {eku.value for eku in spec.ekus}
            assert leaf.subject.public_bytes() == asked.csr.subject.public_bytes()
            assert leaf.not_valid_after_utc - leaf.not_valid_before_utc == timedelta(days=90)
            leaf.verify_directly_issued_by(CA.certificate)
            seen.add(spec.name)
    assert seen == {spec.name for spec in SPECS.values() if spec.authority.name == "etcd-ca"}
    assert OpensslBackend.from_settings(OpensslSettings(config=directory / "openssl.cnf")).check([PEER]) == {}


def test_forgetting_the_section_fails_by_hand(tmp_path: Path) -> None:
    """With the printed openssl.cnf a command without -extensions signs nothing; the twin is the test above."""
    directory = sample_pki.create_openssl_directory(tmp_path / "desk", CA.certificate_pem, CA.key_pem)
    text = openssl_settings.config_text(AUTHORITIES["ca"], LIVE, timedelta(days=90), directory)
    directory.joinpath("openssl.cnf").write_text(text)
    tmp_path.joinpath("x.csr").write_bytes(renewal().csr_pem)
    command = ["openssl", "ca", "-config", str(directory / "openssl.cnf"), "-batch", "-in", str(tmp_path / "x.csr")]
    assert subprocess.run(command, check=False, capture_output=True).returncode != 0
    assert rows(directory) == []


def test_the_example_configs_are_what_setup_prints() -> None:
    """`config/openssl` can't go stale."""
    folder = (
        next(base for base in (ROOT / "config", Path(sys.prefix) / "share/kubeadm-ca-bridge") if base.is_dir())
        / "openssl"
    )
    for name, authority in AUTHORITIES.items():
        text = openssl_settings.config_text(authority, LIVE, timedelta(days=365))
        assert folder.joinpath(f"{name}.cnf").read_text() == text


def test_prints_for_one_authority_and_plain_paths_only() -> None:
    """Certificates of another authority are no reason to print anything, and a path has to be plain."""
    validity = timedelta(days=90)
    only = {"front-proxy-client": LIVE["front-proxy-client"]}
    with pytest.raises(ValueError, match="etcd-ca"):
        openssl_settings.config_text(AUTHORITIES["etcd-ca"], only, validity)
    with pytest.raises(ValueError, match="path"):
        openssl_settings.config_text(AUTHORITIES["front-proxy-ca"], only, validity, PurePath("/srv/$HOME"))
    text = openssl_settings.config_text(AUTHORITIES["front-proxy-ca"], only, validity)
    assert re.findall(r"^\[(server|client|peer)\]$", text, re.MULTILINE) == ["client"]


def test_a_new_directory_is_private_and_overwrites_nothing(tmp_path: Path) -> None:
    """Key and directory are for their owner alone; a second call changes nothing."""
    directory = sample_pki.create_openssl_directory(tmp_path / "a" / "ca", CA.certificate_pem, CA.key_pem, PASSPHRASE)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (directory, directory / "ca.key")}
    assert modes == {"ca": 0o700, "ca.key": 0o600}
    assert b"ENCRYPTED" in directory.joinpath("ca.key").read_bytes()
    before = content(directory)
    with pytest.raises(FileExistsError):
        sample_pki.create_openssl_directory(directory, CA.certificate_pem, CA.key_pem)
    assert content(directory) == before


@pytest.mark.attack("N24")
@pytest.mark.parametrize("closed", ["<&-", "<&- >&-", "<&- >&- 2>&-", "2>&-"])
def test_with_standard_streams_closed_the_passphrase_arrives(tmp_path: Path, closed: str) -> None:
    """Its pipe would get the number of one of them, which openssl's own streams take."""
    bridge = Bridge(pki=handmade_pki(tmp_path / "node"), directory=tmp_path / "bridge")
    add_openssl(bridge, "front-proxy-ca")
    before = live_certificates(bridge.pki)["front-proxy-client"]
    script = f'"$@" {closed}'
    command = ["sh", "-c", script, "sh", *bridge.command("renew", "front-proxy-client")]
    assert subprocess.run(command, check=False, timeout=400).returncode == 0
    assert live_certificates(bridge.pki)["front-proxy-client"] != before


@pytest.mark.parametrize("words", ["Could not read CA private key", "Could not find private key of key from ca.key"])
def test_a_key_that_is_none_is_named(tmp_path: Path, words: str) -> None:
    """As OpenSSL 3.0 and 3.5 say it."""
    key = tmp_path / "ca.key"
    found = KeyFile(path=key, secret=None).failure(f"{words}\n", words)
    assert isinstance(found, LocalFileError)
    assert str(key) in str(found)
