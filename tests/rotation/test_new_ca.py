"""A new CA that can't work is refused before anything moves; each refusal has a twin that passes."""

from __future__ import annotations

from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from bridge.rotation import Change, new_ca_violations, untimely
from tests.kit.issuing import NOW, Signer, cn, usage

OLD = Signer.make("kubernetes", extra=None, end=NOW + timedelta(days=300))


def with_key_id(name: str, digest: bytes | None = None, like: Signer | None = None) -> Signer:
    """A CA with a subject key identifier, and another CA's key if one is given."""
    extra = x509.SubjectKeyIdentifier(digest) if digest else None
    return Signer.make(name, key=like.key if like else None, key_id=digest is None, extra=extra)


def leaf_of(ca: Signer, *, authority_key_id: bool) -> x509.Certificate:
    """A leaf, with or without an authority key identifier."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(cn("kube-apiserver"))
        .issuer_name(ca.certificate.subject)
        .public_key(ca.key.public_key())
        .serial_number(7)
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=1))
    )
    if authority_key_id:
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.key.public_key())
        builder = builder.add_extension(identifier, critical=False)
    return builder.sign(ca.key, hashes.SHA256())


def said(
    new: Signer,
    old: Signer = OLD,
    leaves: dict[str, x509.Certificate] | None = None,
    others: dict[str, tuple[x509.Certificate, ...]] | None = None,
) -> str:
    """All violations, as text."""
    change = Change(old.certificate, new.certificate)
    return "; ".join(map(str, [*new_ca_violations(change, leaves or {}, others or {}, NOW), *untimely(change, NOW)]))


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
    assert (list(new_ca_violations(Change(OLD.certificate, new.certificate), {}, {}, NOW)) == []) is is_possible


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
