"""A new CA that can't work is refused before anything moves; each refusal has a twin that passes."""

from __future__ import annotations

import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from bridge.pki.certificates import pem
from bridge.rotation import Change, new_ca_violations, stops_openssl, untimely
from bridge.specs import CA, FRONT_PROXY_CA, Authority
from tests.kit.issuing import NOW, Signer, cn, usage

OLD = Signer.make("kubernetes", extra=None, end=NOW + timedelta(days=300))


def with_key_id(name: str, digest: bytes | None = None, like: Signer | None = None) -> Signer:
    """A CA with a subject key identifier, and another CA's key if one is given."""
    extra = x509.SubjectKeyIdentifier(digest) if digest else None
    return Signer.make(name, key=like.key if like else None, key_id=digest is None, extra=extra)


def leaf_of(
    ca: Signer,
    *,
    authority_key_id: bool,
    usages: x509.ObjectIdentifier | None = None,
    serial_of: Signer | None = None,
) -> x509.Certificate:
    """A leaf, with or without an authority key identifier, which may name its CA's serial number."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(cn("kube-apiserver"))
        .issuer_name(ca.certificate.subject)
        .public_key(ca.key.public_key())
        .serial_number(7)
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=1))
    )
    if usages is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usages]), critical=False)
    if authority_key_id:
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.key.public_key())
        if serial_of is not None:
            issuer = [x509.DirectoryName(serial_of.certificate.issuer)]
            serial = serial_of.certificate.serial_number
            identifier = x509.AuthorityKeyIdentifier(identifier.key_identifier, issuer, serial)
        builder = builder.add_extension(identifier, critical=False)
    return builder.sign(ca.key, hashes.SHA256())


def said(
    new: Signer,
    old: Signer = OLD,
    leaves: dict[str, x509.Certificate] | None = None,
    others: dict[str, tuple[x509.Certificate, ...]] | None = None,
    authority: Authority = CA,
) -> str:
    """All violations, as text."""
    change, chains = Change(old.certificate, new.certificate), {name: (leaf,) for name, leaf in (leaves or {}).items()}
    return "; ".join(
        map(str, [*new_ca_violations(change, authority, chains, others or {}, NOW), *untimely(change, NOW)])
    )


def test_a_good_one_passes() -> None:
    """A new CA passes with another name, another key and a later end, if it was made a while ago."""
    assert said(Signer.make("kubernetes-2", key_id=True)) == ""


@pytest.mark.parametrize(
    ("new", "wanted"),
    [
        (Signer.make("kubernetes-2", ca=False), "basicConstraints: wanted CA:TRUE"),
        (Signer.make("kubernetes-2", key_usage=usage(ca=False)), "keyUsage: wanted keyCertSign"),
        (Signer.make("kubernetes-2", begin=NOW + timedelta(minutes=5)), "notBefore: wanted at the latest"),
        (Signer.make("kubernetes-2", begin=NOW - timedelta(minutes=5)), "notBefore: wanted at the latest"),
        (Signer.make("kubernetes-2", end=NOW + timedelta(days=299)), "notAfter: wanted later than the old CA's"),
        (Signer.make("kubernetes-2", end=NOW - timedelta(days=1)), "notAfter: wanted later than 20"),
    ],
)
@pytest.mark.rotation("no CA bit, or expired", "begins in the future")
def test_one_that_could_not_sign_is_refused(new: Signer, wanted: str) -> None:
    """No CA bit, no right to sign, not old enough for a slow clock, an end before the old one's."""
    assert wanted in said(new)


@pytest.mark.parametrize(
    ("new", "is_possible"),
    [
        (
            Signer.make("kubernetes-2", key_id=True, begin=NOW - timedelta(minutes=5), end=NOW + timedelta(days=299)),
            True,
        ),
        (Signer.make("kubernetes-2", key_id=True, begin=NOW + timedelta(minutes=5)), False),
        (Signer.make("kubernetes-2", key_id=True, end=NOW - timedelta(days=1)), False),
    ],
)
def test_a_young_one_or_one_that_ends_first_can_sign(new: Signer, is_possible: bool) -> None:
    """An emergency needs no more than a valid one; one that is not valid can't sign."""
    assert (list(new_ca_violations(Change(OLD.certificate, new.certificate), CA, {}, {}, NOW)) == []) is is_possible


@pytest.mark.rotation("front-proxy CA's key is ca's", "etcd CA's key is ca's")
def test_one_key_is_for_one_ca() -> None:
    """With etcd-ca's key each kubeconfig would open etcd; another key passes."""
    new = Signer.make("kubernetes-2", key_id=True)
    etcd = Signer.make("etcd-ca", key=new.key)
    assert "key: wanted another than etcd-ca's" in said(new, others={"etcd-ca": (etcd.certificate,)})
    assert said(new, others={"etcd-ca": (Signer.make("etcd-ca").certificate,)}) == ""


@pytest.mark.rotation("same subject without key identifiers")
def test_one_name_for_both_needs_key_identifiers() -> None:
    """OpenSSL takes the first CA of a name that no identifier contradicts, and fails with its signature."""
    old, new = with_key_id("kubernetes"), with_key_id("kubernetes")
    old = Signer.make("kubernetes", key=old.key, end=NOW + timedelta(days=300), extra=x509.SubjectKeyIdentifier(b"1"))
    assert said(new, old, {"apiserver": leaf_of(old, authority_key_id=True)}) == ""
    assert "no authorityKeyIdentifier in apiserver" in said(
        new, old, {"apiserver": leaf_of(old, authority_key_id=False)}
    )
    assert "no subjectKeyIdentifier in the new CA" in said(Signer.make("kubernetes"), old)
    assert "no subjectKeyIdentifier in the old CA" in said(new, OLD)
    assert said(with_key_id("kubernetes-2"), OLD, {"apiserver": leaf_of(OLD, authority_key_id=False)}) == ""


@pytest.mark.rotation("recomputed key identifier")
def test_a_renewed_one_has_the_old_ones_name_and_identifier() -> None:
    """Go finds a CA by the bytes of its name, and OpenSSL by its key identifier."""
    old = Signer.make("kubernetes", end=NOW + timedelta(days=300), extra=x509.SubjectKeyIdentifier(b"sha-256 of it"))
    assert said(with_key_id("kubernetes", b"sha-256 of it", like=old), old) == ""
    assert said(Signer.make("kubernetes", key=old.key), old) == ""
    assert "subjectKeyIdentifier: wanted the old CA's" in said(with_key_id("kubernetes", b"sha-1", like=old), old)
    assert "subject: wanted the bytes of" in said(with_key_id("kubernetes-2", b"sha-256 of it", like=old), old)


@pytest.mark.rotation("subject in another encoding")
def test_a_name_in_another_encoding_is_another_name_for_go() -> None:
    """UTF8String for PrintableString: OpenSSL takes it, Go does not."""
    names = [
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kubernetes", _type=kind)])
        for kind in (x509.name._ASN1Type.PrintableString, x509.name._ASN1Type.UTF8String)
    ]
    old, new = (encoded(OLD, name, days) for name, days in zip(names, (300, 3000), strict=True))
    assert "encoded in another way" in said(new, old)
    assert said(encoded(OLD, names[0], 3000), old) == ""


def encoded(key_of: Signer, name: x509.Name, days: int) -> Signer:
    """A root with this very name."""
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key_of.key.public_key())
        .serial_number(5)
        .not_valid_before(NOW - timedelta(days=100))
        .not_valid_after(NOW + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(usage(ca=True), critical=True)
        .sign(key_of.key, hashes.SHA256())
    )
    return Signer(certificate=certificate, key=key_of.key)


@pytest.mark.attack("E5")
def test_a_key_that_go_can_not_read_is_refused() -> None:
    """On secp256k1 no API server starts again: Go refuses the whole CA file. P-384 passes."""
    odd, usual = ec.generate_private_key(ec.SECP256K1()), ec.generate_private_key(ec.SECP384R1())
    assert "public key: wanted RSA, ECDSA on P-224" in said(Signer.make("kubernetes-2", key=odd, key_id=True))
    assert said(Signer.make("kubernetes-2", key=usual, key_id=True)) == ""


_USAGES = (
    ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,
    ExtendedKeyUsageOID.CLIENT_AUTH,
    ExtendedKeyUsageOID.SERVER_AUTH,
)
ANY, CLIENT, SERVER = (x509.ExtendedKeyUsage([usage]) for usage in _USAGES)
BOTH = x509.ExtendedKeyUsage(_USAGES[1:])


@pytest.mark.attack("E17")
@pytest.mark.parametrize(
    ("usages", "authority", "wanted"),
    [
        pytest.param(SERVER, CA, "issuers whose EKU covers clientAuth", id="servers"),
        pytest.param(CLIENT, CA, "issuers whose EKU covers serverAuth", id="clients"),
        pytest.param(ANY, CA, "clientAuth and serverAuth, or no EKU, got anyExtendedKeyUsage", id="any"),
        pytest.param(BOTH, CA, "", id="both"),
        pytest.param(CLIENT, FRONT_PROXY_CA, "", id="clients of the front proxy"),
        pytest.param(SERVER, FRONT_PROXY_CA, "issuers whose EKU covers clientAuth", id="servers of the front proxy"),
    ],
)
def test_usages_that_a_new_ca_does_not_cover_are_refused(
    usages: x509.ExtendedKeyUsage, authority: Authority, wanted: str
) -> None:
    """The rules of `issue` come before `trust`, on a worker without servers too."""
    text = said(Signer.make("kubernetes-2", key_id=True, extra=usages), authority=authority)
    assert wanted in text if wanted else text == ""


@pytest.mark.attack("E17")
def test_name_constraints_that_exclude_the_api_server_are_refused() -> None:
    """Names of corp.example alone stop each API server, though this node has none."""

    def constrained(*permitted: str) -> Signer:
        subtrees = [x509.DNSName(name) for name in permitted]
        limits = x509.NameConstraints(permitted_subtrees=subtrees, excluded_subtrees=None)
        return Signer.make("kubernetes-2", key_id=True, constraints=limits)

    assert "within the constraints of" in said(constrained("corp.example"))
    assert said(constrained("corp.example", "svc")) == ""


@pytest.mark.attack("E4")
def test_a_certificate_for_the_same_key_is_judged_by_those_in_use() -> None:
    """It takes their CA's place at once: EKUs, names, path lengths and OpenSSL's serial number count now."""
    old = Signer.make("kubernetes", end=NOW + timedelta(days=300))
    leaf = leaf_of(old, authority_key_id=False, usages=_USAGES[2])
    named = leaf_of(old, authority_key_id=True, usages=_USAGES[2], serial_of=old)

    def judged(certificate: x509.Certificate, **different: Any) -> str:
        new = Signer.make("kubernetes", key=old.key, **different)
        return said(new, old, {"front-proxy-client": certificate}, authority=FRONT_PROXY_CA)

    assert judged(leaf) == ""
    assert "front-proxy-client below it: wanted issuers whose EKU covers serverAuth" in judged(leaf, extra=CLIENT)
    assert judged(leaf, extra=SERVER).count("issuers whose EKU") == 1  # the CA's own fault, said once
    assert "names to OpenSSL" in judged(named)
    assert judged(leaf, extra=BOTH) == ""


@pytest.mark.attack("E9")
def test_openssls_usual_rules_want_a_self_signed_ca(tmp_path: Path) -> None:
    """The rule agrees with `openssl verify` about a root, an intermediate, and a root that names another key."""
    root = Signer.make("a company's root", key_id=True)
    strange = x509.AuthorityKeyIdentifier.from_issuer_public_key(root.key.public_key())
    own_key = Signer.make("kubernetes-2", key_id=True)
    cas = {
        Signer.make("kubernetes-2", key_id=True): False,
        Signer.make("kubernetes-2", key_id=True, parent=root): True,
        Signer.make("kubernetes-2", key=own_key.key, key_id=True, extra=strange): True,
    }
    for number, (ca, stops) in enumerate(cas.items()):
        anchor, leaf = tmp_path / f"{number}-ca.crt", tmp_path / f"{number}.crt"
        anchor.write_bytes(pem(ca.certificate))
        leaf.write_bytes(pem(leaf_of(ca, authority_key_id=True)))
        openssl = ["openssl", "verify", "-no_check_time", "-CAfile", str(anchor), "-no-CApath", str(leaf)]
        verdict = subprocess.run(openssl, capture_output=True, text=True, check=False)
        assert (verdict.returncode != 0) is stops, verdict.stderr
        assert stops_openssl(Change(OLD.certificate, ca.certificate)) is stops
        assert not stops_openssl(Change([*cas][1].certificate, ca.certificate))
