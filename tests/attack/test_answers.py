"""More answers that are wrong in one way, and clocks that are; beside each a twin that passes."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from bridge.certificates import load_pem_certificates
from bridge.contract import Issued
from bridge.errors import VerificationError
from bridge.verify import check
from tests.attack.conftest import Tried
from tests.kit.issuing import NOW, Signer, cn, name
from tests.test_verify import ADMIN, WRONG, expectation, request, root, violations

YEAR = timedelta(days=365)


def constrained(*, permitted: str | None = None, excluded: str | None = None) -> Signer:
    """A trust anchor with name constraints of its own."""
    only = [x509.DNSName(permitted)] if permitted else None
    never = [x509.IPAddress(ipaddress.ip_network(excluded))] if excluded else None
    return Signer.make(constraints=x509.NameConstraints(only, never))


def crossed() -> Signer:
    """The node's CA, certified by another root: the same name and key in another certificate."""
    return Signer.make("kubernetes", parent=Signer.make("other root"), key=root().key)


def test_every_answer_of_the_table_is_wrong_in_one_way(tried: Tried) -> None:
    """Counted here, refused one by one in the suite of `bridge.verify`."""
    assert len(WRONG) >= 33
    tried("answers of a CA that are wrong in one way (tests/test_verify.py)", len(WRONG))


def test_a_cross_signed_ca_makes_no_difference(tried: Tried) -> None:
    """The path ends at the anchor on the node, and the cross certificate is dropped; under the other root it is refused."""
    other = crossed()
    verified = check(root().issue(request(), intermediates=[other]), request(), expectation())
    assert verified.intermediates == ()
    stranger = Signer.make("other root")
    with pytest.raises(VerificationError):
        check(root().issue(request(), intermediates=[other]), request(), expectation(stranger))
    tried("hostile answers", 1)


@pytest.mark.parametrize("anchor", [constrained(permitted="example.org"), constrained(excluded="10.96.0.0/12")])
def test_name_constraints_of_the_anchor_hold(anchor: Signer, tried: Tried) -> None:
    """A leaf with names that its own root excludes is worthless."""
    free = constrained(excluded="198.51.100.0/24")
    check(free.issue(request()), request(), expectation(free))
    assert "chain" in {v.subject for v in violations(anchor.issue(request()), expected=expectation(anchor))}
    tried("hostile answers", 1)


def test_an_o_that_was_lost(tried: Tried) -> None:
    """Vault's roles drop it: a valid certificate for nobody in particular."""
    asked = request("admin.conf")
    check(root().issue(asked), asked, expectation())
    found = violations(root().issue(asked, subject=cn("kubernetes-admin")), asked)
    assert {v.subject for v in found} == {"subject"}
    tried("hostile answers", 1)


def test_attributes_in_another_order_are_accepted_but_not_in_another_type(tried: Tried) -> None:
    """An OU is no O."""
    asked = request("admin.conf")
    check(root().issue(asked, subject=x509.Name(list(ADMIN)[::-1])), asked, expectation())
    unit = name((NameOID.ORGANIZATIONAL_UNIT_NAME, "kubeadm:cluster-admins"), (NameOID.COMMON_NAME, "kubernetes-admin"))
    assert {v.subject for v in violations(root().issue(asked, subject=unit), asked)} == {"subject"}
    tried("hostile answers", 1)


def test_p224(tried: Tried) -> None:
    """A curve that no part of Kubernetes need know, under a good signature."""
    odd = ec.generate_private_key(ec.SECP224R1()).public_key()
    assert {v.subject for v in violations(root().issue(request(), public_key=odd))} == {"public key", "curve"}
    tried("hostile answers", 1)


def test_a_leaf_as_issuer(tried: Tried) -> None:
    """Another certificate of the node may not sign."""
    signer = Signer.make("kube-apiserver", parent=root(), ca=False)
    found = violations(signer.issue(request(), intermediates=[signer]))
    assert {v.subject for v in found} == {"chain"}
    tried("hostile answers", 1)


def der(issued: Issued) -> bytes:
    return issued.leaf.public_bytes(serialization.Encoding.DER)


def pem(issued: Issued) -> bytes:
    return issued.leaf.public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data.replace(b"END CERTIFICATE", b"END"),
        lambda _: b"",
        lambda _: b"<html>502 Bad Gateway</html>",
        lambda _: b"x" * 10_000_000,
        lambda data: data[:200] + b"!" + data[201:],
    ],
)
def test_text_that_is_no_certificate(damage: Callable[[bytes], bytes], tried: Tried) -> None:
    """A clear error, in bounded time."""
    good = pem(root().issue(request()))
    assert len(load_pem_certificates(good)) == 1
    with pytest.raises(ValueError):
        load_pem_certificates(damage(good))
    tried("hostile answers", 1)


@pytest.mark.parametrize(("skew", "subject"), [(-YEAR, "notBefore"), (YEAR, "notAfter")])
def test_a_clock_that_is_a_year_off(skew: timedelta, subject: str, tried: Tried) -> None:
    """Set back, the certificate is not valid yet, and the message asks for the clock; set forward, it has expired."""
    issued = root().issue(request())
    check(issued, request(), expectation())
    off = replace(expectation(), now=NOW + skew)
    with pytest.raises(VerificationError) as e:
        check(issued, request(), off)
    found = {v.subject: v for v in e.value.violations}
    assert subject in found
    if skew < timedelta():
        assert f"this node's clock says {NOW + skew:%Y-%m-%d}" in found[subject].got
    tried("clocks that are wrong", 1)
