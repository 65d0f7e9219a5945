"""What Go can't read or verify, rule by rule; the judge in tests/attack asks Go itself."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Sequence
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import AuthorityInformationAccessOID, NameOID

from bridge.contract import SignRequest
from bridge.pki import csr, der, go_x509
from bridge.pki.certificates import load_der_certificate
from bridge.specs import EKU, SPECS
from bridge.testing import TestCA
from tests.kit.issuing import CLIENT, SERVER, Signer
from tests.kit.mutants import Draft, Tree, extension, oid, value

KEY = csr.generate_key("ecdsa-p256")
ROOT = Signer.make()
#: The largest number in an OID that Go reads, and the next one.
LARGEST, TOO_LARGE = f"1.2.{2**31 - 1}.3", f"1.2.{2**31}.3"


@functools.cache
def request() -> SignRequest:
    pem = csr.build(TestCA.make(algorithm="ecdsa-p256").leaf(SPECS["apiserver"]), KEY)
    return SignRequest(spec=SPECS["apiserver"], csr_pem=pem, validity=timedelta(days=365))


def dns(*names: str) -> list[x509.GeneralName]:
    return [x509.DNSName(name) for name in names]


def leaf(
    by: Signer = ROOT, *, sans: Sequence[x509.GeneralName] = (), extra: x509.ExtensionType | None = None
) -> x509.Certificate:
    return by.issue(request(), sans=sans or dns("cp-1"), extra=extra).leaf


def form(certificate: x509.Certificate, *, is_leaf: bool = True) -> list[str]:
    return list(map(str, go_x509.form(certificate, leaf=is_leaf)))


def path(*chain: x509.Certificate, ekus: Sequence[EKU] = (EKU.SERVER_AUTH,)) -> list[str]:
    """The leaf first, the anchor last."""
    return [str(violation) for violation in go_x509.path(chain[0], chain[1:-1], chain[-1], ekus)]


def forged(*extensions: tuple[str, bytes]) -> x509.Certificate:
    """A leaf with these instead of its SANs."""
    draft = Draft.of(leaf(), KEY)
    found = draft.extensions()
    found[:] = [each for each in found if each[0].content != oid("2.5.29.17")]
    found += [extension(dotted, content) for dotted, content in extensions]
    return load_der_certificate(draft.signed(ROOT.key))


# --- one certificate --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri", ["spiffe://x/y", "http://example.com", "http://a-b.example.com/x/y.z", "urn:a:b", "mailto:a@b", "a+b.c-1:x"]
)
def test_uris_with_plain_hosts_pass(uri: str) -> None:
    """The URIs that CAs write pass."""
    assert form(leaf(sans=[x509.UniformResourceIdentifier(uri)])) == []


@pytest.mark.parametrize(
    "uri", ["http://[::1]/", "http://a:80/", "http://a..b/", "http://.a/", "//a", "a", "1a:b", "http://a/ b", "", "A:b"]
)
def test_other_uris_are_refused(uri: str) -> None:
    """Go's own parser may read them otherwise, or not at all."""
    assert form(leaf(sans=[x509.UniformResourceIdentifier(uri)])) == [
        f"SAN: wanted a URI with a plain host name, got {uri!r}"
    ]


def test_networks_are_no_addresses() -> None:
    """Eight or thirty-two bytes are refused where four or sixteen belong."""
    network = value(der.SEQUENCE, value(0x87, bytes([10, 0, 0, 0, 255, 0, 0, 0])))
    assert form(forged(("2.5.29.17", network.encoded()))) == ["SAN: wanted IP addresses, got a network, 10.0.0.0/8"]
    address = value(der.SEQUENCE, value(0x87, bytes([10, 0, 0, 1])))
    assert form(forged(("2.5.29.17", address.encoded()))) == []


def test_object_identifiers_have_numbers_of_31_bits() -> None:
    """Extensions, EKUs, access methods and attributes have them; each number counts by itself."""
    refusal = ["form: wanted DER that Kubernetes can read, got an object identifier with a number of more than 31 bits"]
    for dotted, violations in ((LARGEST, []), (TOO_LARGE, refusal), (f"1.2.{2**31 - 1}.{2**31 - 1}", [])):
        identifier = x509.ObjectIdentifier(dotted)
        access = x509.AuthorityInformationAccess([
            x509.AccessDescription(AuthorityInformationAccessOID.OCSP, x509.UniformResourceIdentifier("http://x")),
            x509.AccessDescription(identifier, x509.UniformResourceIdentifier("http://x")),
        ])  # fmt: skip
        assert form(leaf(extra=x509.UnrecognizedExtension(identifier, b"\x05\x00"))) == violations
        assert form(ROOT.issue(request(), ekus=[SERVER, dotted]).leaf) == violations
        assert form(leaf(extra=access)) == violations
        subject = x509.Name([x509.NameAttribute(identifier, "x"), x509.NameAttribute(NameOID.COMMON_NAME, "y")])
        assert form(ROOT.issue(request(), subject=subject).leaf) == violations


def test_rsa_keys_have_at_most_8192_bits_and_a_small_exponent() -> None:
    """crypto/tls connects with no larger ones."""
    for bits, exponent, violations in (
        (8192, 65537, []),
        (8193, 65537, ["key size: wanted RSA of at most 8192 bits, got 8193 bits"]),
        (2048, 2**31 - 1, []),
        (2048, 2**31 + 1, ["public key: wanted an odd exponent below 2^31, got 0x80000001"]),
        (2048, 3, []),
    ):
        public = rsa.RSAPublicNumbers(exponent, (1 << bits - 1) + 1).public_key()
        assert form(ROOT.issue(request(), public_key=public).leaf) == violations


def test_extensions_of_cas_are_for_cas() -> None:
    """An issuer may have them."""
    limits = x509.InhibitAnyPolicy(0)
    assert form(leaf(extra=limits)) == ["extension: wanted none that is for CAs, got inhibitAnyPolicy (2.5.29.54)"]
    assert form(Signer.make("mid", parent=ROOT, extra=limits).certificate, is_leaf=False) == []


@pytest.mark.parametrize(
    ("base", "reads"),
    [
        (x509.DNSName("example.com"), ""),
        (x509.DNSName(".example.com"), ""),
        (x509.DNSName(""), ""),
        (x509.DNSName("a..b"), "'a..b'"),
        (x509.DNSName("a b"), "'a b'"),
        (x509.DNSName("a" * 64), repr("a" * 64)),
        (x509.RFC822Name("example.com"), ""),
        (x509.UniformResourceIdentifier("example.com"), ""),
        (x509.UniformResourceIdentifier("192.0.2.1"), "'192.0.2.1'"),
        (x509.IPAddress(ipaddress.ip_network("10.0.0.0/8")), ""),
    ],
)
def test_constraints_are_names_that_go_compares(base: x509.GeneralName, reads: str) -> None:
    """A name that Go can't compare is refused among permitted and among excluded names."""
    for permitted, excluded in (([base], None), (None, [base])):
        constraints = x509.NameConstraints(permitted, excluded)
        found = form(Signer.make("mid", parent=ROOT, constraints=constraints).certificate, is_leaf=False)
        assert found == ([f"name constraints: wanted names that Go can compare, got {reads}"] if reads else [])


def test_constraints_of_other_kinds_may_be_there_unless_they_are_critical() -> None:
    """Go passes over the former."""
    constraints = x509.NameConstraints(None, [x509.RegisteredID(x509.ObjectIdentifier("1.2.3"))])
    for is_critical in (False, True):
        issuer = Signer.make("mid", parent=ROOT, extra=constraints, extra_critical=is_critical).certificate
        refusal = ["name constraints: wanted DNS, IP, email and URI names alone, got RegisteredID"]
        assert form(issuer, is_leaf=False) == refusal * is_critical


# --- a path -----------------------------------------------------------------------------------------------------------

NOT_WITHIN = "chain: wanted names within the constraints of CN=mid, got {}"


@pytest.mark.parametrize(
    ("permitted", "excluded", "name", "is_within"),
    [
        ("example.com", None, "example.com", True),
        ("example.com", None, "a.EXAMPLE.com", True),
        ("EXAMPLE.com", None, "a.example.com", True),
        ("example.com", None, "badexample.com", False),
        ("example.com", None, "example.com.org", False),
        (".example.com", None, "a.example.com", True),
        (".example.com", None, "example.com", False),
        ("", None, "a.b", True),
        (None, "example.com", "a.b", True),
        (None, "example.com", "a.example.com", False),
        (None, "", "a.b", False),
        (None, "a.example.com", "*.example.com", False),
        (None, "A.example.com", "*.EXAMPLE.com", False),
        (None, "a.example.com", "*.example.org", True),
        (None, "a.example.com", "b.example.com", True),
        ("example.com", "bad.example.com", "x.bad.example.com", False),
        ("example.com", "bad.example.com", "x.example.com", True),
        ("example.com", None, "a b.example.com", False),
    ],
)
def test_dns_names_below_constraints(permitted: str | None, excluded: str | None, name: str, is_within: bool) -> None:
    """As RFC 5280 §4.2.1.10 has them, and a wildcard is every name that it could stand for."""
    constraints = x509.NameConstraints(
        None if permitted is None else dns(permitted), None if excluded is None else dns(excluded)
    )
    mid = Signer.make("mid", parent=ROOT, constraints=constraints)
    found = path(leaf(mid, sans=dns(name)), mid.certificate, ROOT.certificate)
    assert found == ([] if is_within else [NOT_WITHIN.format(repr(name))])


@pytest.mark.parametrize(
    ("name", "is_within"),
    [
        (x509.IPAddress(ipaddress.ip_address("10.1.2.3")), True),
        (x509.IPAddress(ipaddress.ip_address("11.1.2.3")), False),
        (x509.IPAddress(ipaddress.ip_address("2001:db8::7")), False),
        (x509.DNSName("free.example.org"), True),
        (x509.RegisteredID(x509.ObjectIdentifier("1.2.3")), True),
        (x509.RFC822Name("a@b"), False),
        (x509.UniformResourceIdentifier("spiffe://x/y"), False),
    ],
)
def test_other_names_below_constraints(name: x509.GeneralName, is_within: bool) -> None:
    """Addresses by their network; e-mail and URIs, which kubeadm makes none of, never."""
    mid = Signer.make(
        "mid", parent=ROOT, constraints=x509.NameConstraints([x509.IPAddress(ipaddress.ip_network("10.0.0.0/8"))], None)
    )
    found = path(leaf(mid, sans=[name]), mid.certificate, ROOT.certificate)
    assert found == ([] if is_within else [NOT_WITHIN.format(repr(name.value))])


def test_constraints_hold_for_all_below_them_and_for_none_above() -> None:
    """An issuer's own names are not under its own constraints."""
    limits = x509.NameConstraints(None, dns("bad"))
    named = x509.SubjectAlternativeName(dns("bad"))
    upper = Signer.make("mid", parent=ROOT, constraints=limits, extra=named)
    lower = Signer.make("lower", parent=upper)
    assert path(leaf(lower), lower.certificate, upper.certificate, ROOT.certificate) == []
    wrong = Signer.make("lower", parent=upper, extra=named)
    found = path(leaf(wrong), wrong.certificate, upper.certificate, ROOT.certificate)
    assert found == [NOT_WITHIN.format("'bad'")]


def test_issuers_cover_the_usages() -> None:
    """Each that lists some, the anchor too; any usage covers all."""
    for usages, lacking in (
        ([SERVER, CLIENT], ""),
        (["2.5.29.37.0"], ""),
        ([CLIENT], "serverAuth"),
        (["1.2.3"], "clientAuth and serverAuth"),
    ):
        extra = x509.ExtendedKeyUsage([x509.ObjectIdentifier(usage) for usage in usages])
        mid = Signer.make("mid", parent=ROOT, extra=extra)
        found = path(leaf(mid), mid.certificate, ROOT.certificate, ekus=(EKU.SERVER_AUTH, EKU.CLIENT_AUTH))
        assert [each.partition(", got")[0] for each in found] == (
            [f"chain: wanted issuers whose EKU covers {lacking}"] if lacking else []
        )


def test_a_ca_stands_once_in_a_path() -> None:
    """A CA is known by its name and key; one of them alone may be there twice."""
    mid = Signer.make("mid", parent=ROOT)
    again = Signer.make("mid", parent=mid, key=mid.key)
    found = path(leaf(again), again.certificate, mid.certificate, ROOT.certificate)
    assert found == ["chain: wanted each CA once, got two certificates of one name and key"]
    for other in (Signer.make("other", parent=mid, key=mid.key), Signer.make("mid", parent=mid)):
        assert path(leaf(other), other.certificate, mid.certificate, ROOT.certificate) == []


def test_path_lengths_count_every_intermediate_below() -> None:
    """A path has at most as many intermediates as the number says."""
    upper = Signer.make("upper", parent=ROOT, path_length=1)
    middle = Signer.make("middle", parent=upper)
    assert path(leaf(middle), middle.certificate, upper.certificate, ROOT.certificate) == []
    lower = Signer.make("lower", parent=middle)
    found = path(leaf(lower), lower.certificate, middle.certificate, upper.certificate, ROOT.certificate)
    assert found == ["chain: wanted at most 1 intermediates, got 2 below CN=upper"]


def test_what_is_sent_fits_into_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the anchor, which is not sent."""
    assert go_x509.MAX_CHAIN_BYTES == 65536
    mid = Signer.make("mid", parent=ROOT)
    own = leaf(mid)
    size = sum(len(each.public_bytes(Encoding.DER)) for each in (own, mid.certificate))
    monkeypatch.setattr(go_x509, "MAX_CHAIN_BYTES", size)
    assert path(own, mid.certificate, ROOT.certificate) == []
    monkeypatch.setattr(go_x509, "MAX_CHAIN_BYTES", size - 1)
    assert path(own, mid.certificate, ROOT.certificate) == [f"chain: wanted at most {size - 1} bytes, got {size} bytes"]


def test_names_of_issuers_are_the_same_bytes() -> None:
    """Another string type is another name to Go."""
    found = path(leaf(), Signer.make("other").certificate)
    assert found == ["chain: wanted issuer names that are encoded alike, got CN=kubernetes"]


def policies(*dotted: str) -> x509.CertificatePolicies:
    return x509.CertificatePolicies([x509.PolicyInformation(x509.ObjectIdentifier(each), None) for each in dotted])


def adding(certificate: x509.Certificate, *extensions: tuple[str, Tree]) -> x509.Certificate:
    """The same with more extensions, signed anew."""
    draft = Draft.of(certificate, KEY)
    for dotted, content in extensions:
        draft.extensions().append(extension(dotted, content))
    return load_der_certificate(draft.signed(ROOT.key))


DEMAND = ("2.5.29.36", value(der.SEQUENCE, value(0x80, b"\x00")))
NO_MAPPING = ("2.5.29.36", value(der.SEQUENCE, value(0x81, b"\x00")))


def mapping(issuer: str, subject: str) -> tuple[str, Tree]:
    pair = value(der.SEQUENCE, value(der.OID, oid(issuer)), value(der.OID, oid(subject)))
    return "2.5.29.33", value(der.SEQUENCE, pair)


@pytest.mark.parametrize(
    ("in_mid", "in_leaf", "is_common"),
    [
        (["1.2.3"], ["1.2.3"], True),
        (["1.2.3", "1.2.4"], ["1.2.4", "1.2.5"], True),
        (["1.2.3"], ["1.2.4"], False),
        (["1.2.3"], [], False),
        (["2.5.29.32.0"], ["2.5.29.32.0"], False),
        (["1.2.3", "2.5.29.32.0"], ["1.2.3", "2.5.29.32.0"], True),
    ],
)
def test_a_policy_that_is_demanded_is_in_the_whole_path(in_mid: list[str], in_leaf: list[str], is_common: bool) -> None:
    """One and the same in each certificate, and not anyPolicy; where none is demanded, none is needed."""
    mid = Signer.make("mid", parent=ROOT, extra=policies(*in_mid))
    own = leaf(mid, extra=policies(*in_leaf) if in_leaf else None)
    assert path(own, mid.certificate, ROOT.certificate) == []
    assert path(own, adding(mid.certificate, NO_MAPPING), ROOT.certificate) == []
    found = path(own, adding(mid.certificate, DEMAND), ROOT.certificate)
    refusal = (
        "chain: wanted one certificate policy in the whole path, not mapped, got none, and policyConstraints in CN=mid"
    )
    assert found == ([] if is_common else [refusal])


def test_a_mapped_policy_meets_no_demand() -> None:
    """RFC 5280 §6.1 allows it; from or to anyPolicy it is refused in any case."""
    signer = Signer.make("mid", parent=ROOT, extra=policies("1.2.3"))
    mid, own = signer.certificate, leaf(signer, extra=policies("1.2.3"))
    demanding = adding(mid, DEMAND)
    assert path(own, demanding, ROOT.certificate) == []
    assert path(own, adding(mid, mapping("1.2.3", "1.2.4")), ROOT.certificate) == []
    found = path(own, adding(demanding, mapping("1.2.3", "1.2.4")), ROOT.certificate)
    assert found == [
        "chain: wanted one certificate policy in the whole path, not mapped, got none, and policyConstraints in CN=mid"
    ]
    for pair in (("1.2.3", "2.5.29.32.0"), ("2.5.29.32.0", "1.2.3")):
        found = path(own, adding(mid, mapping(*pair)), ROOT.certificate)
        assert found == ["chain: wanted no policy mapped from or to anyPolicy, got CN=mid"]


def test_mappings_are_pairs_of_policies() -> None:
    """Anything else in their place can't be read."""
    mid = Signer.make("mid", parent=ROOT).certificate
    one = value(der.OID, oid("1.2.3"))
    assert form(adding(mid, mapping("1.2.3", "1.2.4")), is_leaf=False) == []
    for parts in ([one], [one, one, one], [one, value(der.INTEGER, b"\x01")]):
        odd = adding(mid, ("2.5.29.33", value(der.SEQUENCE, value(der.SEQUENCE, *parts))))
        reads = "form: wanted DER that Kubernetes can read, got policyMappings that are no pairs of policies"
        assert form(odd, is_leaf=False) == [reads]


def test_a_form_that_an_issuer_may_not_have_is_reported_with_its_place() -> None:
    """The error names the intermediate, or the anchor as the CA."""
    twice = policies("1.2.3", "1.2.3")
    mid, anchor = Signer.make("mid", parent=ROOT, extra=twice), Signer.make(extra=twice)
    want = "chain: wanted certificate policies with each once in each issuer, got 1.2.3 twice in"
    assert path(leaf(mid), mid.certificate, ROOT.certificate) == [f"{want} intermediate CN=mid"]
    assert path(leaf(anchor), anchor.certificate) == [f"{want} the CA"]
