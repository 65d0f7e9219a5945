"""Each way in which a CA's answer can be wrong is refused under its own name; beside each, a twin that passes."""

from __future__ import annotations

import functools
import ipaddress
import subprocess
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from bridge import csr
from bridge.contract import Issued, SignRequest
from bridge.errors import VerificationError, Violation
from bridge.specs import SPECS, KeyAlgorithm
from bridge.testing import TestCA
from bridge.verify import BACKDATING, Expectation, check
from tests.attack.hostile import HOSTILE, LEFT, Desk
from tests.kit.issuing import CLIENT, NOW, Signer, cn, name, usage

ANY_EKU, CODE_SIGNING = "2.5.29.37.0", "1.3.6.1.5.5.7.3.3"


@functools.cache
def root() -> Signer:
    return Signer.make()


@functools.cache
def request(spec: str = "apiserver", algorithm: KeyAlgorithm = "ecdsa-p256") -> SignRequest:
    live = TestCA.make(algorithm="ecdsa-p256").leaf(SPECS[spec])
    pem = csr.build(live, csr.generate_key(algorithm))
    return SignRequest(spec=SPECS[spec], csr_pem=pem, validity=timedelta(days=365))


def expectation(*anchors: Signer) -> Expectation:
    certificates = tuple(anchor.certificate for anchor in anchors or (root(),))
    return Expectation(anchors=certificates, anchor_name="ca.crt", now=NOW, min_validity=timedelta(days=7))


def violations(
    issued: Issued, asked: SignRequest | None = None, expected: Expectation | None = None
) -> list[Violation]:
    """All that is wrong, after a twin without the fault has passed."""
    asked, expected = asked or request(), expected or expectation()
    check(root().issue(asked), asked, expectation())
    with pytest.raises(VerificationError) as e:
        check(issued, asked, expected)
    return e.value.violations


def sans(*changes: x509.GeneralName, without: str = "") -> list[x509.GeneralName]:
    extension = request().csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [*(n for n in extension if str(n.value) != without), *changes]


ADMIN = name((NameOID.ORGANIZATION_NAME, "kubeadm:cluster-admins"), (NameOID.COMMON_NAME, "kubernetes-admin"))


@pytest.mark.parametrize("fault", HOSTILE)
def test_refuses(fault: str) -> None:
    """One fault leads to the violations that name it, and to no other; its twin passes."""
    case = HOSTILE[fault]
    signer = case.root(NOW)
    old = signer.issue(request(case.name), end=NOW + LEFT).leaf
    asked = replace(request(case.name, case.algorithm), replaces=old)
    desk = Desk(root=signer, request=asked, now=NOW)
    check(case.right(desk), asked, expectation(signer))
    with pytest.raises(VerificationError) as e:
        check(case.wrong(desk), asked, expectation(signer))
    assert {violation.subject for violation in e.value.violations} == case.subjects


def through(*intermediates: Signer, signer: Signer | None = None) -> Issued:
    return (signer or intermediates[0]).issue(request(), intermediates=intermediates)


def test_accepts_a_chain_and_keeps_only_what_it_needs() -> None:
    """Intermediates that lead to the anchor are returned in order, others and the anchor itself are dropped."""
    upper = Signer.make("upper", parent=root())
    lower, unneeded = Signer.make("lower", parent=upper), Signer.make("unneeded")
    verified = check(through(unneeded, upper, root(), lower, signer=lower), request(), expectation())
    assert verified.intermediates == (lower.certificate, upper.certificate)


def test_accepts_an_intermediate_as_the_anchor() -> None:
    """ca.crt may be a company's intermediate CA."""
    anchor = Signer.make("mid", parent=root())
    assert check(anchor.issue(request()), request(), expectation(anchor)).intermediates == ()


@pytest.mark.parametrize(
    ("fault", "make"),
    [
        ("CA:FALSE", lambda: Signer.make("mid", parent=root(), ca=False)),
        ("no keyCertSign", lambda: Signer.make("mid", parent=root(), key_usage=usage(ca=False))),
        ("expired", lambda: Signer.make("mid", parent=root(), end=NOW - timedelta(days=1))),
        ("another CA's", lambda: Signer.make("mid", parent=Signer.make("kubernetes"))),
        ("wrong names", lambda: Signer.make(
            "mid", parent=root(), constraints=x509.NameConstraints([x509.DNSName("example.org")], None))),
        ("excluded address", lambda: Signer.make("mid", parent=root(), constraints=x509.NameConstraints(
            None, [x509.IPAddress(ipaddress.ip_network("10.96.0.0/12"))]))),
    ],
)  # fmt: skip
def test_refuses_an_intermediate_that_may_not_sign(fault: str, make: Callable[[], Signer]) -> None:
    """What an intermediate is not allowed to do makes its leaf worthless."""
    assert {v.subject for v in violations(through(make()))} == {"chain"}, fault
    check(through(Signer.make("mid", parent=root())), request(), expectation())


def test_refuses_a_path_longer_than_allowed() -> None:
    """A path length of 0 allows no further intermediate, but a leaf."""
    upper = Signer.make("upper", parent=root(), path_length=0)
    check(through(upper), request(), expectation())
    assert {v.subject for v in violations(through(Signer.make("lower", parent=upper), upper))} == {"chain"}


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


@pytest.mark.parametrize("algorithm", ["sha1", "md5"])
def test_refuses_weak_signatures(algorithm: str, tmp_path: Path) -> None:
    """SHA-1 and MD5 are named, whatever else Go says about them."""
    signer = Signer.make(key=csr.generate_key("rsa-2048"))
    check(signer.issue(request()), request(), expectation(signer))
    (tmp_path / "ca.crt").write_bytes(signer.certificate.public_bytes(serialization.Encoding.PEM))
    (tmp_path / "ca.key").write_bytes(csr.key_pem(signer.key))
    (tmp_path / "leaf.csr").write_bytes(request().csr_pem)
    command = ["openssl", "x509", "-req", "-in", "leaf.csr", "-CA", "ca.crt", "-CAkey", "ca.key", f"-{algorithm}"]
    pem = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True).stdout
    found = violations(Issued(leaf=x509.load_pem_x509_certificate(pem)), expected=expectation(signer))
    assert Violation(subject="signature", want="SHA-256 or stronger", got=algorithm) in found


def test_refuses_small_keys_and_odd_curves() -> None:
    """A key that is not the CSR's is also judged by itself."""
    small = rsa.generate_private_key(public_exponent=65537, key_size=1024).public_key()
    assert {v.subject for v in violations(root().issue(request(), public_key=small))} == {"public key", "key size"}
    odd = ec.generate_private_key(ec.SECP256K1()).public_key()
    assert {v.subject for v in violations(root().issue(request(), public_key=odd))} == {"public key", "curve"}


def test_an_rsa_leaf_needs_key_encipherment_and_an_ecdsa_leaf_does_not() -> None:
    """As the field's clients use them (RFC 5280 §4.2.1.3)."""
    asked = request(algorithm="rsa-2048")
    check(root().issue(asked), asked, expectation())
    bare = usage(key_encipherment=False)
    check(root().issue(request(), key_usage=bare), request(), expectation())
    with pytest.raises(VerificationError) as e:
        check(root().issue(asked, key_usage=bare), asked, expectation())
    assert [v.subject for v in e.value.violations] == ["KeyUsage"]


def test_the_order_and_grouping_of_the_subject_do_not_matter() -> None:
    """CAs written in Go rebuild the name."""
    asked = request("admin.conf")
    attributes = list(ADMIN)
    for subject in (x509.Name(attributes[::-1]), x509.Name([x509.RelativeDistinguishedName(attributes)])):
        check(root().issue(asked, subject=subject), asked, expectation())
    with pytest.raises(VerificationError):
        check(root().issue(asked, subject=cn("kubernetes-admin")), asked, expectation())


def test_an_attribute_that_the_settings_name_may_be_added() -> None:
    """A named exception holds for exactly that value."""
    subject = name((NameOID.ORGANIZATIONAL_UNIT_NAME, "Platform"), (NameOID.COMMON_NAME, "kube-apiserver"))
    issued = root().issue(request(), subject=subject)
    assert {v.subject for v in violations(issued)} == {"subject"}
    check(issued, request(), replace(expectation(), extra_subject=frozenset({("2.5.4.11", "Platform")})))
    other = replace(expectation(), extra_subject=frozenset({("2.5.4.11", "Other")}))
    assert {v.subject for v in violations(issued, expected=other)} == {"subject"}


def test_the_leaf_of_another_certificate_of_the_same_run_is_refused() -> None:
    """Answers can't be swapped."""
    found = violations(root().issue(request("scheduler.conf")), request("controller-manager.conf"))
    assert {v.subject for v in found} == {"public key", "subject"}


def test_all_violations_are_told_at_once() -> None:
    """Whoever mends the CA's profile does it once."""
    issued = Signer.make("other").issue(request(), ekus=[CLIENT], sans=[], subject=cn("x"), end=NOW + timedelta(days=1))
    assert {v.subject for v in violations(issued)} == {"subject", "SAN", "EKU", "notAfter", "issuer"}
