"""Each way in which a CA's answer can be wrong is refused under its own name; beside each, a twin that passes."""

from __future__ import annotations

import functools
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.x509.oid import NameOID

from bridge.contract import Issued, SignRequest
from bridge.errors import VerificationError, Violation
from bridge.pki import csr
from bridge.pki.verify import BACKDATING, Expectation, check
from bridge.specs import SPECS, KeyAlgorithm
from bridge.testing import TestCA
from tests.counts import Tried
from tests.kit.hostile import HOSTILE, LEFT, Desk
from tests.kit.issuing import CLIENT, NOW, Signer, cn, name


@functools.cache
def root() -> Signer:
    return Signer.make()


@functools.cache
def request(spec: str = "apiserver", algorithm: KeyAlgorithm = "ecdsa-p256") -> SignRequest:
    live = TestCA.make(algorithm="ecdsa-p256").leaf(SPECS[spec])
    pem = csr.build(live, csr.generate_key(algorithm))
    return SignRequest(spec=SPECS[spec], csr_pem=pem, validity=timedelta(days=365))


def expectation(*anchors: Signer, now: datetime = NOW) -> Expectation:
    certificates = tuple(anchor.certificate for anchor in anchors or (root(),))
    return Expectation(anchors=certificates, anchor_name="ca.crt", now=now, min_validity=timedelta(days=7))


def violations(
    issued: Issued, asked: SignRequest | None = None, expected: Expectation | None = None
) -> list[Violation]:
    """All that is wrong, after a twin without the fault has passed."""
    asked, expected = asked or request(), expected or expectation()
    check(root().issue(asked), asked, expectation())
    with pytest.raises(VerificationError) as e:
        check(issued, asked, expected)
    return e.value.violations


@pytest.mark.parametrize("fault", HOSTILE)
def test_refuses(fault: str, tried: Tried) -> None:
    """One fault leads to the violations that name it, and to no other; its twin passes."""
    case, now = HOSTILE[fault], datetime.now(UTC)  # some of them are made by openssl, which knows no other time
    signer = case.root(now)
    old = signer.issue(request(case.name), begin=now - timedelta(days=358), end=now + LEFT).leaf
    asked = replace(request(case.name, case.algorithm), replaces=old)
    desk = Desk(root=signer, request=asked, now=now)
    expected = expectation(signer, now=now)
    check(case.right(desk), asked, expected)
    with pytest.raises(VerificationError) as e:
        check(case.wrong(desk), asked, expected)
    assert {violation.subject for violation in e.value.violations} == case.subjects
    tried("hostile answers before the checks alone, each with a twin", 1)


def through(*intermediates: Signer, signer: Signer | None = None) -> Issued:
    return (signer or intermediates[0]).issue(request(), intermediates=intermediates)


def test_accepts_a_chain_and_keeps_only_what_it_needs() -> None:
    """Intermediates that lead to the anchor are returned in order, others and the anchor itself are dropped."""
    upper = Signer.make("upper", parent=root())
    lower, unneeded = Signer.make("lower", parent=upper), Signer.make("unneeded")
    verified = check(through(unneeded, upper, root(), lower, signer=lower), request(), expectation())
    assert verified.intermediates == (lower.certificate, upper.certificate)


def test_takes_the_intermediate_that_lasts_of_two_with_one_key() -> None:
    """A CA that has renewed its intermediate may send the old one along, in either order."""
    new = Signer.make("mid", parent=root())
    old = Signer.make("mid", parent=root(), key=new.key, end=NOW + timedelta(days=30))
    for sent in ((old, new), (new, old)):
        assert check(through(*sent), request(), expectation()).intermediates == (new.certificate,)


def test_accepts_an_intermediate_as_the_anchor() -> None:
    """ca.crt may be a company's intermediate CA."""
    anchor = Signer.make("mid", parent=root())
    assert check(anchor.issue(request()), request(), expectation(anchor)).intermediates == ()


def test_takes_only_the_first_certificate_of_a_bundle_as_anchor() -> None:
    """As kubeadm does: a leaf of the second CA in ca.crt is refused, and the message says so."""
    second = Signer.make("second")
    check(root().issue(request()), request(), expectation(root(), second))
    [violation] = violations(second.issue(request()), expected=expectation(root(), second))
    assert violation.subject == "chain"
    assert "another certificate of the same file" in violation.got


def test_refuses_intermediates_where_kubeadm_cannot_read_them() -> None:
    """kubeadm below 1.21 reads one certificate a file."""
    old = replace(expectation(), intermediates_allowed=False)
    check(root().issue(request()), request(), old)
    [violation] = violations(through(Signer.make("mid", parent=root())), expected=old)
    assert "kubeadm below 1.21" in violation.want


def test_refuses_an_expired_anchor() -> None:
    """A leaf cannot be valid under a CA that is not."""
    expired = Signer.make(begin=NOW - timedelta(days=20), end=NOW - timedelta(days=1))
    found = violations(expired.issue(request()), expected=expectation(expired))
    assert {v.subject for v in found} == {"chain", "notAfter"}


def test_refuses_a_node_without_an_anchor() -> None:
    """Nothing is proven against nothing."""
    [violation] = violations(root().issue(request()), expected=replace(expectation(), anchors=()))
    assert violation.subject == "chain"


def test_refuses_a_certificate_that_ends_before_the_one_it_replaces() -> None:
    """A renewal that shortens is none."""
    old = root().issue(request()).leaf
    asked = replace(request(), replaces=old)
    barely = NOW + timedelta(days=365) - BACKDATING
    check(root().issue(asked, end=barely + timedelta(seconds=1)), asked, expectation())
    with pytest.raises(VerificationError) as e:
        check(root().issue(asked, end=barely), asked, expectation())
    assert [v.subject for v in e.value.violations] == ["notAfter"]


def test_a_shorter_lifetime_passes_where_it_is_allowed() -> None:
    """It lasts at least `min_validity` nevertheless; elsewhere the message names the setting."""
    old = root().issue(request()).leaf
    asked, allowed = replace(request(), replaces=old), replace(expectation(), shorter_allowed=True)
    month = root().issue(asked, end=NOW + timedelta(days=30))
    check(month, asked, allowed)
    with pytest.raises(VerificationError) as e:
        check(month, asked, expectation())
    assert 'shorter = "allow" in [renewal]' in e.value.reason
    with pytest.raises(VerificationError) as e:
        check(root().issue(asked, end=NOW + timedelta(days=6)), asked, allowed)
    assert [v.subject for v in e.value.violations] == ["notAfter"]


def test_an_attribute_that_the_settings_name_may_be_added() -> None:
    """A named exception holds for exactly that value."""
    subject = name((NameOID.ORGANIZATIONAL_UNIT_NAME, "Platform"), (NameOID.COMMON_NAME, "kube-apiserver"))
    issued = root().issue(request(), subject=subject)
    assert {v.subject for v in violations(issued)} == {"subject"}
    check(issued, request(), replace(expectation(), extra_subject=frozenset({("2.5.4.11", "Platform")})))
    other = replace(expectation(), extra_subject=frozenset({("2.5.4.11", "Other")}))
    assert {v.subject for v in violations(issued, expected=other)} == {"subject"}


def test_all_violations_are_told_at_once() -> None:
    """Whoever mends the CA's profile does it once."""
    issued = Signer.make("other").issue(request(), ekus=[CLIENT], sans=[], subject=cn("x"), end=NOW + timedelta(days=1))
    assert {v.subject for v in violations(issued)} == {"subject", "SAN", "EKU", "notAfter", "issuer"}
