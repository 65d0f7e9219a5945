"""Each way in which a CA's answer can be wrong is refused under its own name; beside each, a twin that passes."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from bridge.contract import Issued, SignRequest
from bridge.errors import VerificationError, Violation
from bridge.pki import csr
from bridge.pki.certificates import load_der_certificate
from bridge.pki.verify import BACKDATING, CLOCK_SKEW, Expectation, check, error_of, is_valid_at
from bridge.specs import SPECS, KeyAlgorithm
from bridge.testing import TestCA
from tests.counts import Tried
from tests.kit.hostile import HOSTILE, LEFT, Desk, are_read_as
from tests.kit.issuing import CLIENT, NOW, Signer, cn, name, odd_certificates, usage
from tests.kit.mutants import Draft, oid


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
    """One fault leads to the violations that name it, in words that say what it is, and to no other; its twin passes."""
    case, now = HOSTILE[fault], datetime.now(UTC)  # some of them are made by openssl, which knows no other time
    signer = case.root(now)
    old = signer.issue(request(case.name), begin=now - timedelta(days=358), end=now + LEFT).leaf
    asked = replace(request(case.name, case.algorithm), replaces=old)
    desk = Desk(root=signer, request=asked, now=now)
    expected = expectation(signer, now=now)
    check(case.right(desk), asked, expected)
    with pytest.raises(VerificationError) as e:
        check(case.wrong(desk), asked, expected)
    assert are_read_as(case.reads, e.value.violations), e.value.violations
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


def test_a_key_identifier_is_the_issuers() -> None:
    """OpenSSL finds no issuer of a leaf, or of an intermediate, that names another key or serial number; without one all is well."""
    ca = Signer.make(key_id=True)
    own, kind = (
        ca.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value,
        x509.AuthorityKeyIdentifier,
    )
    names, serial = [x509.DirectoryName(ca.certificate.subject)], ca.certificate.serial_number
    for right in (kind(own.digest, names, serial), kind(None, names, serial), kind(own.digest, None, None)):
        check(ca.issue(request(), extra=right), request(), expectation(ca))
        mid = Signer.make("mid", parent=ca, extra=right)
        check(mid.issue(request(), intermediates=[mid]), request(), expectation(ca))
    for wrong in (kind(b"another", None, None), kind(None, names, serial + 1), kind(own.digest, names, serial + 1)):
        mid = Signer.make("mid", parent=ca, extra=wrong)
        for issued in (ca.issue(request(), extra=wrong), mid.issue(request(), intermediates=[mid])):
            assert [one.subject for one in violations(issued, expected=expectation(ca))] == ["authorityKeyIdentifier"]


def test_a_cross_signed_chain_passes_in_any_order() -> None:
    """The company's root comes along by itself, as a CA with a cross certificate sends it, and is not part of the path."""
    other = Signer.make("other root")
    cross = Signer.make("other root", parent=root(), key=other.key)
    mid = Signer.make("mid", parent=other)
    for sent in itertools.permutations((mid, other, cross)):
        found = check(through(*sent, signer=mid), request(), expectation()).intermediates
        assert found == (mid.certificate, cross.certificate)
    ours = Signer.make("mid", parent=root(), key=mid.key)
    found = check(through(mid, other, ours, signer=mid), request(), expectation()).intermediates
    assert found == (ours.certificate,)


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
    assert violation.want.startswith("a path to ca.crt (CN=kubernetes, SHA-256 ")
    assert violation.got == "a path to another certificate of the same file (CN=second); kubeadm takes only the first"


def test_a_second_certificate_of_the_file_is_blamed_for_its_own_leaves_alone() -> None:
    """A third CA's is from another CA."""
    second, third = Signer.make("second"), Signer.make("third")
    [violation] = violations(third.issue(request()), expected=expectation(root(), second))
    assert (violation.subject, violation.got) == ("issuer", "issuer CN=third, and no certificate of that name")


def test_an_error_is_given_without_being_raised() -> None:
    """The same one, and none for an answer that passes."""
    assert error_of(root().issue(request()), request(), expectation()) is None
    found = error_of(Signer.make("other").issue(request()), request(), expectation())
    assert found is not None
    assert (found.name, [violation.subject for violation in found.violations]) == ("apiserver", ["issuer"])


@pytest.mark.parametrize(
    ("bits", "reads"),
    [
        ({"content_commitment": True, "key_agreement": True}, "contentCommitment, keyEncipherment, keyAgreement"),
        ({"data_encipherment": True}, "keyEncipherment, dataEncipherment"),
        ({"crl_sign": True, "key_cert_sign": True}, "keyEncipherment, keyCertSign, cRLSign"),
        ({"key_encipherment": False}, "none"),
    ],
)
def test_a_key_usage_is_shown_by_its_bits(bits: dict[str, bool], reads: str) -> None:
    """The bits are shown in the order of RFC 5280 §4.2.1.3."""
    [violation] = violations(root().issue(request(), key_usage=usage(**{"digital_signature": False, **bits})))
    assert violation == Violation(subject="KeyUsage", want="digitalSignature", got=reads)


def forged(change: Callable[[Draft], None]) -> list[Violation]:
    """Violations of a leaf that was changed before it was signed; unchanged it passes."""
    key = csr.generate_key("ecdsa-p256")
    pem = csr.build(TestCA.make(algorithm="ecdsa-p256").leaf(SPECS["apiserver"]), key)
    asked = SignRequest(spec=SPECS["apiserver"], csr_pem=pem, validity=timedelta(days=365))
    right = root().issue(asked)
    draft = Draft.of(right.leaf, key)
    check(replace(right, leaf=load_der_certificate(draft.signed(root().key))), asked, expectation())
    change(draft)
    return violations(replace(right, leaf=load_der_certificate(draft.signed(root().key))), asked)


def field_of(*place: int, content: bytes) -> Callable[[Draft], None]:
    """Other content in one place of a certificate."""

    def change(draft: Draft) -> None:
        tree = draft.tbs
        for index in place:
            tree = tree[index]
        tree.content = content

    return change


def test_an_unknown_signature_algorithm_is_named() -> None:
    """The message does not guess whose signature it is."""
    found = forged(field_of(Draft.SIGNATURE, 0, content=oid("1.2.3.4")))
    assert [v.subject for v in found] == ["signature", "chain"]
    assert (found[0].want, found[0].got) == ("SHA-256 or stronger", "1.2.3.4")


@pytest.mark.parametrize(("content", "number"), [(b"\x00", "0"), (b"\xff", "-1")])
def test_a_serial_number_is_positive(content: bytes, number: str) -> None:
    """RFC 5280 §4.1.2.2; CAs that kubeadm made have 0, a leaf has not."""
    found = forged(field_of(Draft.SERIAL, content=content))
    assert found[0] == Violation(subject="serial number", want="a positive number", got=number)


def test_a_certificate_of_version_1_is_refused() -> None:
    """Its extensions would count for some and not for others."""

    def without_version(draft: Draft) -> None:
        draft.outer = draft.tbs[Draft.SIGNATURE]
        assert draft.tbs.children is not None
        del draft.tbs.children[0]

    found = forged(without_version)
    assert found[0] == Violation(subject="version", want="v3", got="v1")


def test_another_root_of_the_cas_name_is_called_one() -> None:
    """It was sent along, and has signed the leaf; its fingerprint tells it from the node's."""
    other = Signer.make()
    [violation] = violations(other.issue(request(), intermediates=[other]))
    digest = other.certificate.fingerprint(hashes.SHA256()).hex()[:16]
    assert (violation.subject, violation.got) == ("issuer", f"another root (CN=kubernetes, SHA-256 {digest}…)")


def test_refuses_intermediates_where_kubeadm_cannot_read_them() -> None:
    """kubeadm below 1.21 reads one certificate a file."""
    old = replace(expectation(), intermediates_allowed=False)
    check(root().issue(request()), request(), old)
    found = violations(through(Signer.make("mid", parent=root())), expected=old)
    want = "a leaf signed by ca.crt itself (kubeadm below 1.21 reads one certificate a file)"
    assert found == [Violation(subject="chain", want=want, got="one signed through CN=mid")]


def test_refuses_an_expired_anchor() -> None:
    """A leaf cannot be valid under a CA that is not."""
    expired = Signer.make(begin=NOW - timedelta(days=20), end=NOW - timedelta(days=1))
    found = {v.subject: v for v in violations(expired.issue(request()), expected=expectation(expired))}
    assert set(found) == {"chain", "notAfter"}
    dates = f"from {NOW - timedelta(days=20):%Y-%m-%d} to {NOW - timedelta(days=1):%Y-%m-%d}"
    clock = f"this node's clock says {NOW:%Y-%m-%d} 12:00:00 UTC"
    assert found["chain"].got == f"ca.crt is valid only {dates} ({clock}; is one of the two wrong?)"


def test_refuses_a_node_without_an_anchor() -> None:
    """Without an anchor nothing can be proven."""
    found = violations(root().issue(request()), expected=replace(expectation(), anchors=()))
    assert found == [Violation(subject="chain", want="a CA certificate in ca.crt", got="none")]


def test_refuses_a_certificate_that_ends_before_the_one_it_replaces() -> None:
    """A renewal that shortens is none."""
    old = root().issue(request()).leaf
    asked = replace(request(), replaces=old)
    barely = NOW + timedelta(days=365) - BACKDATING
    check(root().issue(asked, end=barely + timedelta(seconds=1)), asked, expectation())
    with pytest.raises(VerificationError) as e:
        check(root().issue(asked, end=barely), asked, expectation())
    assert [v.subject for v in e.value.violations] == ["notAfter"]


SECOND, DAY = timedelta(seconds=1), timedelta(days=1)


@pytest.mark.parametrize(
    ("dates", "wrong"),
    [
        ({"begin": NOW + CLOCK_SKEW}, {"begin": NOW + CLOCK_SKEW + SECOND}),
        ({"end": NOW + timedelta(days=7)}, {"end": NOW + timedelta(days=7) - SECOND}),
        ({"end": NOW + timedelta(days=3000)}, {"end": NOW + timedelta(days=3000) + SECOND}),
    ],
)
def test_dates_count_to_the_second(dates: dict[str, Any], wrong: dict[str, Any]) -> None:
    """The last one that passes, and the first that does not."""
    check(root().issue(request(), **dates), request(), expectation())
    [violation] = violations(root().issue(request(), **wrong))
    assert violation.subject == {"begin": "notBefore", "end": "notAfter"}[next(iter(wrong))]


def test_the_longest_lifetime_counts_from_now() -> None:
    """With ten minutes for CAs that round; the message names the setting, if there is one."""
    allowed = replace(expectation(), longest=timedelta(days=30), longest_name="longest in [users]")
    last = NOW + timedelta(days=30, minutes=10)
    check(root().issue(request(), end=last), request(), allowed)
    [violation] = violations(root().issue(request(), end=last + SECOND), expected=allowed)
    assert violation == Violation(
        subject="notAfter", want="at most 30d (longest in [users])", got=f"until {last + SECOND:%Y-%m-%d} 12:10:01 UTC"
    )
    [unnamed] = violations(root().issue(request(), end=last + SECOND), expected=replace(allowed, longest_name=""))
    assert unnamed.want == "at most 30d"


@pytest.mark.parametrize(
    ("least", "left", "want", "got"),
    [
        (timedelta(days=3), timedelta(days=2), "3d", "2d"),
        (timedelta(days=2), timedelta(days=2) - SECOND, "2d", "47h"),
        (timedelta(hours=3), timedelta(hours=2), "3h", "2h"),
        (timedelta(hours=2), timedelta(hours=2) - SECOND, "2h", "7199s"),
    ],
)
def test_the_time_left_is_shown_in_units_that_fit(least: timedelta, left: timedelta, want: str, got: str) -> None:
    """The time left is shown in days, hours or seconds."""
    [violation] = violations(
        root().issue(request(), end=NOW + left), expected=replace(expectation(), min_validity=least)
    )
    until = f"{NOW + left:%Y-%m-%d %H:%M:%S} UTC"
    assert violation == Violation(subject="notAfter", want=f"at least {want} of validity", got=f"{got}, until {until}")


def test_a_beginning_long_ago_may_be_a_wrong_clock() -> None:
    """Both clocks are named where an answer is of no use, and began more than two days ago."""
    for begin, is_named in ((NOW - 2 * DAY, False), (NOW - 2 * DAY - SECOND, True)):
        for end in (NOW, NOW + DAY):
            [violation] = violations(root().issue(request(), begin=begin, end=end))
            clock = f"this node's clock says {NOW:%Y-%m-%d} 12:00:00 UTC"
            said = f" (it begins at {begin:%Y-%m-%d %H:%M:%S} UTC, and {clock}; "
            assert violation.got.endswith(f"UTC{said}is one of the two wrong?)" if is_named else f"{end:%H:%M:%S} UTC")
            assert violation.want == ("in the future" if end == NOW else "at least 7d of validity")


def test_an_anchor_is_valid_to_its_last_second() -> None:
    """Both ends included, as in RFC 5280 §4.1.2.5."""
    begin, end = NOW - DAY, NOW + DAY
    anchor = Signer.make(begin=begin, end=end).certificate
    assert [is_valid_at(anchor, time) for time in (begin, end, begin - SECOND, end + SECOND)] == [
        True,
        True,
        False,
        False,
    ]


def test_what_cannot_be_read_is_named() -> None:
    """A part of the leaf, an intermediate, or the node's own CA that can't be read is named, and no further check is made."""
    twice = load_der_certificate(odd_certificates(root().certificate)["an extension twice"])
    good = root().issue(request())
    [violation] = violations(replace(good, leaf=twice))
    assert (violation.subject, violation.want) == ("extensions", "one that can be read")
    assert "2.5.29.19" in violation.got
    [violation] = violations(replace(good, intermediates=(twice,)))
    assert (violation.subject, violation.want) == ("extensions", "one that can be read")
    assert re.match(r"an intermediate's that can't: .*2\.5\.29\.19", violation.got)
    [violation] = violations(good, expected=replace(expectation(), anchors=(twice,)))
    assert (violation.subject, violation.want) == ("chain", "a CA certificate in ca.crt that can be read")
    assert re.match(r"one whose extensions can't: .*2\.5\.29\.19", violation.got)


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


def test_all_violations_are_reported_at_once() -> None:
    """The CA's administrator can mend the profile in one go."""
    issued = Signer.make("other").issue(request(), ekus=[CLIENT], sans=[], subject=cn("x"), end=NOW + timedelta(days=1))
    assert {v.subject for v in violations(issued)} == {"subject", "SAN", "EKU", "notAfter", "issuer"}


def crossed() -> tuple[Signer, Signer, Expectation]:
    """A CA with a key identifier, its cross certificate by an earlier CA, and what is expected of its leaves."""
    ca = Signer.make("kubernetes-2", key_id=True)
    by_old = Signer.make("kubernetes-2", key=ca.key, parent=root(), key_id=True)
    return ca, by_old, replace(expectation(ca), cross=by_old.certificate)


def test_a_cross_certificate_goes_behind_the_leaf() -> None:
    """After all intermediates, and it is none of them: what verifies by the CA's own certificate needs it not."""
    ca, by_old, expected = crossed()
    own = ca.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    key_id = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)
    found = check(ca.issue(request(), extra=key_id), request(), expected)
    assert (found.intermediates, found.cross) == ((), (by_old.certificate,))
    assert found.chain == (found.leaf, by_old.certificate)
    below = Signer.make("below", parent=ca)
    found = check(below.issue(request(), intermediates=[below]), request(), expected)
    assert found.chain == (found.leaf, below.certificate, by_old.certificate)
    assert check(ca.issue(request()), request(), expectation(ca)).cross == ()


def test_a_leaf_that_a_cross_certificate_does_not_fit_is_refused() -> None:
    """OpenSSL takes no issuer whose key identifier, or name and serial number, the leaf contradicts."""
    ca, _, expected = crossed()
    own = ca.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    names = [x509.DirectoryName(ca.certificate.subject)]
    both = x509.AuthorityKeyIdentifier(own.digest, names, ca.certificate.serial_number)
    other = x509.AuthorityKeyIdentifier(b"another", None, None)
    for wrong, got in ((both, "an issuer and serial number, too"), (other, "another one")):
        issued = ca.issue(request(), extra=wrong)
        with pytest.raises(VerificationError) as e:
            check(issued, request(), expected)
        assert [(one.subject, one.got) for one in e.value.violations] == [("authorityKeyIdentifier", got)]
    check(ca.issue(request(), extra=both), request(), expectation(ca))
    narrow = Signer.make("kubernetes-2", key=ca.key, parent=root(), key_id=True, path_length=0)
    below = Signer.make("below", parent=ca)
    issued = below.issue(request(), intermediates=[below])
    check(issued, request(), expected)
    with pytest.raises(VerificationError, match="at most 0 intermediates below the cross certificate"):
        check(issued, request(), replace(expected, cross=narrow.certificate))
