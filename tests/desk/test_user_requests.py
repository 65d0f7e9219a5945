"""Users' requests at a CA desk: a bundle from any sender gets what the policy and a person allow, and no more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from bridge.desk.policy import judge, parse
from bridge.errors import SettingsError
from bridge.pki.bundle import BundledRequest, RequestBundle
from bridge.pki.bundle_format import dumps, loads_request
from bridge.pki.csr import generate_key
from bridge.specs import EKU, USER
from tests.kit import odd_csrs
from tests.kit.bundles import make_bundle, old_pairs
from tests.kit.pki import Pki, handmade_pki

NOW = datetime.now(UTC).replace(microsecond=0)
ALLOW = '[allow]\nclusters = ["kubernetes"]\nnodes = ["cp-*"]\nmasters = ["super-admin.conf"]\n'
USERS = '[users]\ngroups = ["dev-*"]\nallow = ["kubeadm:cluster-admins"]\n'
WAIVED = frozenset({USER.name})


def csr_for(
    name: str = "bob", *groups: str, extra: tuple[x509.NameAttribute[str], ...] = (), sans: bool = False, bits: int = 0
) -> x509.CertificateSigningRequest:
    subject = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
    subject += [x509.NameAttribute(NameOID.COMMON_NAME, name), *extra]
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(subject))
    if sans:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("kubernetes")]), critical=False)
    key = rsa.generate_private_key(65537, bits) if bits else generate_key("ecdsa-p256")
    return builder.sign(key, hashes.SHA256())


def asked(csr: x509.CertificateSigningRequest, validity: timedelta = timedelta(hours=8)) -> RequestBundle:
    """As it comes to the desk: through the bytes of a file."""
    request = BundledRequest(
        name=USER.name, authority="ca", ekus=USER.ekus, validity=validity, csr=csr, replaces=None, proof=None
    )
    bundle = RequestBundle(batch="0" * 32, node="cp-1", cluster="kubernetes", created=NOW, requests=(request,))
    return loads_request(dumps(bundle))


def judged(bundle: RequestBundle, policy: str = ALLOW + USERS, waived: frozenset[str] = WAIVED) -> str:
    """What speaks against it; empty if nothing does."""
    return "; ".join(judge(bundle.requests[0], bundle, parse(policy), [], NOW, waived).problems)


def test_what_the_policy_allows_is_signed_on_a_persons_word() -> None:
    """Without the person's approval the desk does not sign it, and neither does a policy that says nothing of users."""
    bundle = asked(csr_for("bob", "dev-1", "kubeadm:cluster-admins"))
    optional = ALLOW.replace("masters", 'proof = "optional"\nmasters')

    assert judged(bundle) == ""
    assert "sign --without-proof user" in judged(bundle, waived=frozenset())
    assert judged(bundle, optional + USERS, frozenset()) == ""
    assert "no table [users]" in judged(bundle, ALLOW)
    assert judge(bundle.requests[0], bundle, parse(ALLOW + USERS), [], NOW, WAIVED).proven is False


WRONG: dict[str, tuple[Callable[[], RequestBundle], str]] = {
    "another group": (lambda: asked(csr_for("bob", "ops")), "group: wanted dev-*"),
    "masters": (lambda: asked(csr_for("bob", "dev-1", "system:masters")), "group: wanted one that is not Kubernetes'"),
    "a component": (lambda: asked(csr_for("system:kube-scheduler")), "name: wanted one that is not Kubernetes'"),
    "a node": (lambda: asked(csr_for("system:node:cp-1", "system:nodes")), "name: wanted one that is not"),
    "kubeadm's admin": (lambda: asked(csr_for("kubernetes-admin")), "name: wanted one that is not"),
    "a line break": (lambda: asked(csr_for("bob\nroot")), "name: wanted at most 64"),
    "a year": (lambda: asked(csr_for(), timedelta(days=365)), "users.max_validity"),
    "two names": (
        lambda: asked(csr_for(extra=(x509.NameAttribute(NameOID.COMMON_NAME, "root"),))),
        "wanted one CN",
    ),
    "more than CN and O": (
        lambda: asked(csr_for(extra=(x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "x"),))),
        "wanted CN and O alone",
    ),
    "a group twice": (lambda: asked(csr_for("bob", "dev-1", "dev-1")), "each group once"),
    "SANs": (lambda: asked(csr_for(sans=True)), "asks for no extension"),
    "a weak key": (lambda: asked(csr_for(bits=1024)), "key: wanted"),
    "another CA": (lambda: changed(authority="front-proxy-ca"), "authority: wanted ca"),
    "a server": (lambda: changed(ekus=frozenset({EKU.SERVER_AUTH})), "EKU: wanted clientAuth"),
    "a proof": (lambda: changed(proof=b"x"), "nothing proves who a user is"),
}


def changed(**values: object) -> RequestBundle:
    bundle = asked(csr_for("bob", "dev-1"))
    return replace(bundle, requests=(replace(bundle.requests[0], **values),))  # type: ignore[arg-type]


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(case: str) -> None:
    """Even with a waived proof a group beyond the policy, a name of Kubernetes' own, and a lifetime of a year are refused."""
    make, wanted = WRONG[case]
    assert wanted in judged(make())


@pytest.mark.attack("G9")
def test_a_second_list_of_extensions_is_refused() -> None:
    """An empty list that the library reads, and names that a CA in Go would read; its twin has the empty list alone."""
    key = generate_key("ecdsa-p256")
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    subject, names = x509.Name.from_rfc4514_string("CN=bob,O=dev-1"), x509.SubjectAlternativeName([x509.DNSName("x")])
    empty = odd_csrs.asking(odd_csrs.EXTENSION_REQUEST)
    for oid in (odd_csrs.EXTENSION_REQUEST, odd_csrs.MICROSOFTS):
        pem = odd_csrs.with_attributes(key, subject, empty, odd_csrs.asking(oid, names))
        assert "asks for no extension, found" in judged(asked(x509.load_pem_x509_csr(pem)))
    assert judged(asked(x509.load_pem_x509_csr(odd_csrs.with_attributes(key, subject, empty)))) == ""


@pytest.mark.parametrize("name", ["bob", "eve"])
def test_names_of_the_policy(name: str) -> None:
    """A list of names is all that there is."""
    found = judged(asked(csr_for(name)), f'{ALLOW}[users]\nnames = ["bob", "b-*"]\n')
    assert ("(users.names)" in found) == (name == "eve")


def test_a_certificate_of_before_proves_no_right_to_a_group(pki: Pki) -> None:
    """The holder of one of the CA's certificates, with a valid proof, gets no group by it."""
    pairs = old_pairs(pki)
    old = make_bundle(pairs).requests[0]
    bundle = changed(replaces=pairs["admin.conf"][0], proof=old.proof)
    assert "wanted none, since nothing proves who a user is" in judged(bundle)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return handmade_pki(tmp_path_factory.mktemp("pki"))


@pytest.mark.parametrize("key", ["groups", "allow"])
def test_no_policy_puts_users_into_masters(key: str) -> None:
    """The file is refused, with the key's name; the same with a group that a binding has can be read."""
    with pytest.raises(SettingsError, match="kubeadm:cluster-admins is a binding"):
        parse(f'{ALLOW}[users]\n{key} = ["system:masters"]\n')
    assert parse(f'{ALLOW}[users]\n{key} = ["kubeadm:cluster-admins"]\n').users is not None


def test_two_users_need_two_bundles() -> None:
    """A name is once in a bundle, so that an answer is to one of them."""
    bundle = asked(csr_for())
    with pytest.raises(Exception, match="each name once"):
        dumps(replace(bundle, requests=bundle.requests * 2))
