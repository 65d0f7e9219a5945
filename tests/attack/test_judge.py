"""
Go's own verdict on what we would install: nothing that it refuses passes, and what only we refuse is written down.

The kit's judge reads, loads, verifies and connects as kube-apiserver, etcd and client-go do.
"""

from __future__ import annotations

import functools
import random
import re
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridge.contract import Issued, SignRequest
from bridge.errors import VerificationError, Violation
from bridge.pki import csr, der
from bridge.pki.certificates import load_der_certificate, san_entries
from bridge.pki.verify import Expectation, check
from bridge.specs import SPECS
from bridge.testing import TestCA
from tests.counts import Tried
from tests.kit.hostile import HOSTILE, LEFT, MIN_VALIDITY, Desk, are_read_as
from tests.kit.issuing import NOW, Signer
from tests.kit.judge import Judge, judge
from tests.kit.mutants import UUID, Draft, Mutant, Tree, extension, oid, value

# as in `bridge.pki.certificates`, where pytest's own filters undo it
pytestmark = [pytest.mark.kube("judge"), pytest.mark.filterwarnings("ignore:Attribute's length must be:UserWarning")]

#: The same in each run, and new ones.
SEEDS, EXAMPLES = 4000, 500
DOCUMENT = Path(__file__).parents[2] / "docs/certificates.md"
#: What a client calls the servers.
HOSTS = {"apiserver": "kubernetes", "etcd-server": "localhost", "admin.conf": ""}


@pytest.fixture(scope="module")
def go() -> Iterator[Judge]:
    """The judge."""
    with judge() as running:
        yield running


# --- chains to change -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request, and its key."""

    request: SignRequest
    key: csr.PrivateKey


@functools.cache
def asked(name: str) -> Asked:
    key = csr.generate_key("ecdsa-p256")
    pem = csr.build(TestCA.make(algorithm="ecdsa-p256").leaf(SPECS[name]), key)
    return Asked(request=SignRequest(spec=SPECS[name], csr_pem=pem, validity=timedelta(days=365)), key=key)


@functools.cache
def issuers(levels: int) -> tuple[Signer, ...]:
    """The leaf's issuer first, the root last."""
    if levels == 0:
        return (Signer.make(),)
    above = issuers(levels - 1)
    return (Signer.make(f"level {levels}", parent=above[0]), *above)


def chain(name: str, levels: int) -> Mutant:
    """A good one, to be changed."""
    above = issuers(levels)
    leaf = Draft.of(above[0].issue(asked(name).request).leaf, asked(name).key)
    return Mutant(drafts=[leaf, *(Draft.of(signer.certificate, signer.key) for signer in above)])


# --- two judgements ---------------------------------------------------------------------------------------------------


def ours(ders: Sequence[bytes], request: SignRequest, now: datetime) -> tuple[list[bytes], list[Violation]]:
    """What would be installed, as DER, and what is wrong; all that was sent where something is."""
    sent = list(ders[:-1])
    try:
        leaf, *rest = map(load_der_certificate, ders)
    except ValueError as e:
        return sent, [Violation(subject="certificate", want="one that can be read", got=str(e))]
    expected = Expectation(anchors=(rest[-1],), anchor_name="ca.crt", now=now, min_validity=MIN_VALIDITY)
    try:
        verified = check(Issued(leaf=leaf, intermediates=tuple(rest[:-1])), request, expected)
    except VerificationError as e:
        return sent, e.violations
    return [_der(each) for each in (verified.leaf, *verified.intermediates)], []


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


@dataclass(kw_only=True)
class Trial:
    """One chain's trial."""

    violations: list[Violation]
    refused: str  #: By Go.

    @property
    def is_beyond(self) -> bool:
        """Refused by us alone."""
        return bool(self.violations) and not self.refused


def tried_both(
    go: Judge, ders: Sequence[bytes], request: SignRequest, now: datetime, *, key_pem: bytes = b"", host: str = ""
) -> Trial:
    """Our judgement and Go's; fails where we would install what Go refuses, or takes for another identity."""
    installed, violations = ours(ders, request, now)
    verdict = go.ask(installed, ders[-1:], at=now, ekus=request.spec.ekus, key_pem=key_pem, host=host)
    if not violations:
        reported = [b64encode(each).decode() for each in ders]
        assert not verdict.refused, f"{verdict.refused}: {reported}"
        assert (verdict.user, verdict.groups) == identity(request), reported
        assert (verdict.dns, verdict.ips) == names(request), reported
    return Trial(violations=violations, refused=verdict.refused)


def judged(go: Judge, name: str, mutant: Mutant) -> Trial:
    """The chain of a certificate whose key is here."""
    one = asked(name)
    return tried_both(go, mutant.ders(), one.request, NOW, key_pem=csr.key_pem(one.key), host=HOSTS[name])


def identity(request: SignRequest) -> tuple[str, frozenset[str]]:
    """CN and O of the request."""
    values = [(attribute.oid.dotted_string, str(attribute.value)) for attribute in request.csr.subject]
    return dict(values)["2.5.4.3"], frozenset(value for kind, value in values if kind == "2.5.4.10")


def names(request: SignRequest) -> tuple[frozenset[str], frozenset[str]]:
    """DNS names and addresses of the request."""
    found = san_entries(request.csr)
    by_kind = [frozenset(value for kind, value in found if kind == wanted) for wanted in ("DNS", "IP")]
    return by_kind[0], by_kind[1]


# --- what Go refuses, by name -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Two changes of one certificate of a chain: one that Go refuses, and its twin."""

    reads: str  #: Our violations, as in `tests.kit.hostile`.
    wrong: Callable[[Draft], None]
    right: Callable[[Draft], None] = lambda _: None
    place: int = 1  #: 0: the leaf; 1: the intermediate; 2: the anchor.
    name: str = "apiserver"


def put(dotted: str, content: Tree | bytes, *, critical: bool = False) -> Callable[[Draft], None]:
    """One extension instead of the one of its kind."""

    def change(draft: Draft) -> None:
        found = draft.extensions()
        found[:] = [each for each in found if each[0].content != oid(dotted)]
        found.append(extension(dotted, content, critical=critical or None))

    return change


def both(*changes: Callable[[Draft], None]) -> Callable[[Draft], None]:
    """One after the other."""

    def change(draft: Draft) -> None:
        for each in changes:
            each(draft)

    return change


def string(tag: int, content: bytes | None = None) -> Callable[[Draft], None]:
    """The CN in another type."""

    def change(draft: Draft) -> None:
        cn = draft.tbs[Draft.SUBJECT][-1][0][1]
        cn.tag, cn.content = tag, cn.content if content is None else content

    return change


def attribute(tag: int, content: bytes, kind: str = "2.5.4.11") -> Callable[[Draft], None]:
    """One more in the subject."""
    rdn = value(der.SET, value(der.SEQUENCE, value(der.OID, oid(kind)), value(tag, content)))
    return lambda draft: (draft.tbs[Draft.SUBJECT].children or []).insert(0, rdn)


def ekus(*dotted: str, critical: bool = False) -> Callable[[Draft], None]:
    content = value(der.SEQUENCE, *(value(der.OID, oid(each)) for each in dotted))
    return put("2.5.29.37", content, critical=critical)


def policies(*dotted: str) -> Callable[[Draft], None]:
    each = (value(der.SEQUENCE, value(der.OID, oid(policy))) for policy in dotted)
    return put("2.5.29.32", value(der.SEQUENCE, *each))


def constraints(tag: int, content: bytes, *, kind: int = 0) -> Callable[[Draft], None]:
    """Permitted (0) or excluded (1) names of one kind."""
    subtree = value(der.SEQUENCE, value(tag, content))
    return put("2.5.29.30", value(der.SEQUENCE, value(0xA0 | kind, subtree)), critical=True)


directories = put(
    "2.5.29.30", value(der.SEQUENCE, value(0xA1, value(der.SEQUENCE, value(0xA4, value(der.SEQUENCE))))), critical=True
)


def sans(*names: Tree, critical: bool = False) -> Callable[[Draft], None]:
    return put("2.5.29.17", value(der.SEQUENCE, *names), critical=critical)


def field_of(index: int, content: bytes) -> Callable[[Draft], None]:
    """Other content of a field."""

    def change(draft: Draft) -> None:
        draft.tbs[index].content = content

    return change


def compressed(draft: Draft) -> None:
    """The public key as a compressed point."""
    bits = draft.tbs[Draft.PUBLIC_KEY][1]
    bits.content = b"\x00" + bytes([2 + (bits.content[-1] & 1)]) + bits.content[2:34]


def two_algorithms(draft: Draft) -> None:
    """NULL as a parameter of the outer one."""
    draft.outer = draft.tbs[Draft.SIGNATURE].copy()
    assert draft.outer.children is not None
    draft.outer.children.append(value(0x05, b""))


SERVER, CLIENT, CODE, EMAIL = (f"1.3.6.1.5.5.7.3.{number}" for number in (1, 2, 3, 4))
SKI, AKI, AIA = "2.5.29.14", "2.5.29.35", "1.3.6.1.5.5.7.1.1"
KEY_ID = value(der.OCTET_STRING, b"12345678")
ISSUER_ID = value(der.SEQUENCE, value(0x80, b"12345678"))
ACCESS = value(der.SEQUENCE, value(der.SEQUENCE, value(der.OID, oid("1.3.6.1.5.5.7.48.1")), value(0x86, b"http://x")))
DEMAND = value(der.SEQUENCE, value(0x80, b"\x00"))
FULL_NAME = value(0xA0, value(0x86, b"http://x/crl"))
RELATIVE_NAME = value(0xA1, value(der.SEQUENCE, value(der.OID, oid("2.5.4.3")), value(0x0C, b"x")))


def crl_points(point: Tree) -> Callable[[Draft], None]:
    return put("2.5.29.31", value(der.SEQUENCE, value(der.SEQUENCE, value(0xA0, point))))


def never_critical(dotted: str, name: str, content: Tree, place: int) -> Fault:
    kind, name = "critical extension", f"{name} ({dotted}) not critical"
    who = ("", " in intermediate CN=level 1", " in the CA")[place]
    reads = (
        f"chain: wanted {kind} with {name} in each issuer, got it is{who}"
        if who
        else f"{kind}: wanted {name}, got it is"
    )
    return Fault(reads=reads, wrong=put(dotted, content, critical=True), right=put(dotted, content), place=place)


FAULTS: dict[str, Fault] = {
    "a client's intermediate for a server": Fault(reads="chain: wanted issuers whose EKU covers serverAuth, got intermediate CN=level 1 with EKU clientAuth (1.3.6.1.5.5.7.3.2) alone", wrong=ekus(CLIENT), right=ekus(SERVER)),
    "a server's intermediate for a client": Fault(reads="chain: wanted issuers whose EKU covers clientAuth, got intermediate CN=level 1 with EKU serverAuth (1.3.6.1.5.5.7.3.1) alone", wrong=ekus(SERVER), right=ekus(CLIENT), name="admin.conf"),
    "half of a peer's intermediate": Fault(reads="chain: wanted issuers whose EKU covers clientAuth, got intermediate CN=level 1 with EKU serverAuth (1.3.6.1.5.5.7.3.1) alone", wrong=ekus(SERVER), right=ekus(SERVER, CLIENT), name="etcd-server"),
    "code signing alone": Fault(reads="chain: wanted issuers whose EKU covers serverAuth, got intermediate CN=level 1 with EKU codeSigning (1.3.6.1.5.5.7.3.3) alone", wrong=ekus(CODE), right=ekus(CODE, "2.5.29.37.0")),
    "critical e-mail alone": Fault(reads="chain: wanted issuers whose EKU covers serverAuth, got intermediate CN=level 1 with EKU emailProtection (1.3.6.1.5.5.7.3.4) alone", wrong=ekus(EMAIL, critical=True), right=ekus(EMAIL, SERVER, critical=True)),
    "an anchor for clients": Fault(reads="chain: wanted issuers whose EKU covers serverAuth, got the CA with EKU clientAuth (1.3.6.1.5.5.7.3.2) alone", wrong=ekus(CLIENT), right=ekus(SERVER), place=2),
    "a UUID as EKU": Fault(reads="chain: wanted form with DER that Kubernetes can read in each issuer, got … in intermediate CN=level 1", wrong=ekus(SERVER, UUID), right=ekus(SERVER, "1.2.3")),
    **{f"critical SKI of {place}": never_critical(SKI, "subjectKeyIdentifier", KEY_ID, place) for place in range(3)},
    **{f"critical AKI of {place}": never_critical(AKI, "authorityKeyIdentifier", ISSUER_ID, place) for place in range(3)},
    **{f"critical AIA of {place}": never_critical(AIA, "authorityInfoAccess", ACCESS, place) for place in range(3)},
    "CN as UniversalString": Fault(reads="certificate: wanted one that can be read, got …", wrong=string(0x1C), right=string(0x13), place=0),
    "CN as NumericString": Fault(reads="subject: wanted UTF8String, PrintableString or IA5String, got NumericString", wrong=string(0x12), right=string(0x0C), place=0),
    "CN as VisibleString": Fault(reads="subject: wanted UTF8String, PrintableString or IA5String, got VisibleString", wrong=string(0x1A), right=string(0x16), place=0),
    "CN as OCTET STRING": Fault(reads="subject: wanted UTF8String, PrintableString or IA5String, got OCTET STRING", wrong=string(der.OCTET_STRING), right=string(0x0C), place=0),
    "O as VisibleString": Fault(reads="issuer: wanted a string type that Go reads, got VisibleString | chain: wanted subject with a string type that Go reads in each issuer, got VisibleString in intermediate CN=level 1,OU=x", wrong=attribute(0x1A, b"x"), right=attribute(0x13, b"x")),
    "an issuer in letters of digits": Fault(reads="issuer: wanted a string type that Go reads, got NumericString | chain: wanted subject with a string type that Go reads in each issuer, got NumericString in intermediate CN=level 1", wrong=string(0x12), right=string(0x12, b"12 34")),
    "an issuer in half a letter": Fault(reads="certificate: wanted one that can be read, got …", wrong=string(0x1E, b"\x00a\xd8\x00"), right=string(0x1E, b"\x00a\x00b")),
    "an underline in PrintableString": Fault(reads="certificate: wanted one that can be read, got …", wrong=string(0x13, b"a_b"), right=string(0x13, b"a-b")),
    "an anchor's name as GeneralString": Fault(reads="certificate: wanted one that can be read, got …", wrong=string(0x1B), right=string(0x14), place=2),
    "a UUID as attribute": Fault(reads="form: wanted DER that Kubernetes can read, got an object identifier with a number of more than 31 bits | chain: wanted form with DER that Kubernetes can read in each issuer, got … in intermediate CN=level 1,2.25.…=x", wrong=attribute(0x0C, b"x", UUID), right=attribute(0x0C, b"x", "1.2.3")),
    "a policy twice": Fault(reads="certificate policies: wanted each once, got 1.2.3 twice", wrong=policies("1.2.3", "1.2.3"), right=policies("1.2.3", "1.2.4"), place=0),
    "a policy twice in an issuer": Fault(reads="chain: wanted certificate policies with each once in each issuer, got 1.2.3 twice in intermediate CN=level 1", wrong=policies("1.2.3", "1.2.3"), right=policies("1.2.3")),
    "garbage as policy mappings": Fault(reads="chain: wanted form with DER that Kubernetes can read in each issuer, got not DER in intermediate CN=level 1 | chain: wanted issuers that can be read, got not DER", wrong=put("2.5.29.33", b"garbage"), right=put("1.2.3.4", b"garbage")),
    "a policy that is demanded": Fault(reads="chain: wanted one certificate policy in the whole path, not mapped, got none, and policyConstraints in CN=level 1", wrong=put("2.5.29.36", DEMAND), right=both(put("2.5.29.36", value(der.SEQUENCE, value(0x81, b"\x00"))), policies("1.2.3"))),
    "a policy that a leaf demands": Fault(reads="extension: wanted none that is for CAs, got policyConstraints (2.5.29.36) | chain: wanted one certificate policy in the whole path, not mapped, got none, and policyConstraints in CN=kube-apiserver", wrong=put("2.5.29.36", DEMAND), place=0),
    "a critical constraint of registered IDs": Fault(reads="chain: wanted name constraints with DNS, IP, email and URI names alone in each issuer, got RegisteredID in intermediate CN=level 1", wrong=constraints(0x88, oid("1.2.3.4")), right=constraints(0x82, b"example.org", kind=1)),
    "a critical constraint of directories": Fault(reads="chain: wanted a path to …, got …", wrong=directories, right=constraints(0x82, b"example.org", kind=1)),
    "a constraint of the anchor": Fault(reads="chain: wanted a path to …, got excluded name constraint matched SAN", wrong=constraints(0x82, b"local", kind=1), right=constraints(0x82, b"example.org", kind=1), place=2),
    "a network as an issuer's SAN": Fault(reads="chain: wanted SAN with IP addresses in each issuer, got a network, 0.0.0.0/0 in intermediate CN=level 1", wrong=sans(value(0x87, bytes(8))), right=sans(value(0x87, bytes(4)))),
    "a URI that is none": Fault(reads="chain: wanted SAN with a URI with a plain host name in each issuer, got 'http://\\x7f/' in intermediate CN=level 1", wrong=sans(value(0x86, b"http://\x7f/")), right=sans(value(0x86, b"http://example.com/x"))),
    "a critical SAN of unknown kind": Fault(reads="chain: wanted SAN with a name that Kubernetes knows, since it is critical in each issuer, got none in intermediate CN=level 1", wrong=sans(value(0x88, oid("1.2.3")), critical=True), right=sans(value(0x82, b"ca"), critical=True)),
    "CRL addresses relative to the issuer": Fault(reads="chain: wanted CRL distribution points with full names in each issuer, got one relative to its issuer in intermediate CN=level 1", wrong=crl_points(RELATIVE_NAME), right=crl_points(FULL_NAME)),
    "an unknown critical extension": Fault(reads="chain: wanted a path to …, got invalid extension: 1.2.3.4: …", wrong=put("1.2.3.4", b"\x05\x00", critical=True), right=put("1.2.3.4", b"\x05\x00")),
    "a UUID as extension": Fault(reads="form: wanted DER that Kubernetes can read, got an object identifier with a number of more than 31 bits", wrong=put(UUID, b"\x05\x00"), right=put("1.2.3.4", b"\x05\x00"), place=0),
    "an issuer's negative serial": Fault(reads="chain: wanted a path to …, got certificate serial number cannot be negative", wrong=field_of(Draft.SERIAL, b"\xff"), right=field_of(Draft.SERIAL, b"\x7f")),
    "the anchor's negative serial": Fault(reads="chain: wanted a path to …, got certificate serial number cannot be negative", wrong=field_of(Draft.SERIAL, b"\x80"), right=field_of(Draft.SERIAL, b"\x00"), place=2),
    "a compressed key": Fault(reads="public key: wanted one in its usual encoding, got one that Go can't read", wrong=compressed, place=0),
    "an issuer's compressed key": Fault(reads="chain: wanted public key with one in its usual encoding in each issuer, got one that Go can't read in intermediate CN=level 1", wrong=compressed),
    "two signature algorithms": Fault(reads="certificate: wanted one that can be read, got …", wrong=two_algorithms, place=0),
    "a path length": Fault(reads="chain: wanted a path to …, got path length constraint violated", wrong=put("2.5.29.19", value(der.SEQUENCE, value(der.BOOLEAN, b"\xff"), value(der.INTEGER, b"\x00"))), right=put("2.5.29.19", value(der.SEQUENCE, value(der.BOOLEAN, b"\xff"), value(der.INTEGER, b"\x01"))), place=2),
    "a large extension": Fault(reads="chain: wanted at most 65536 bytes, got … bytes", wrong=put("1.2.3.4", bytes(1 << 18)), right=put("1.2.3.4", bytes(1 << 14)), place=0),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_go_refuses_is_refused(fault: str, go: Judge, tried: Tried) -> None:
    """Go and we refuse the same chain, and both take its twin."""
    case = FAULTS[fault]
    wrong, right = chain(case.name, 1), chain(case.name, 1)
    case.wrong(wrong.drafts[case.place])
    case.right(right.drafts[case.place])
    trial = judged(go, case.name, wrong)
    assert trial.refused
    assert are_read_as(case.reads, trial.violations), trial.violations
    assert judged(go, case.name, right) == Trial(violations=[], refused="")
    tried("chains that Go refuses, each with a twin that it takes", 1)


# --- random changes ---------------------------------------------------------------------------------------------------


def changed(dice: random.Random) -> tuple[str, Mutant]:
    """A chain with one to three changes."""
    name = dice.choice(list(HOSTS))
    mutant = chain(name, dice.choice([0, 1, 1, 2]))
    mutant.mutate(dice, dice.choice([1, 1, 1, 2, 3]))
    return name, mutant


@dataclass(frozen=True)
class Row:
    """One row of the document's list."""

    subject: str
    text: str

    def matches(self, violation: Violation) -> bool:
        """Whether the message is of this kind."""
        return violation.subject == self.subject and self.text in str(violation)


def beyond_go() -> list[Row]:
    """What we refuse, and Go does not, with reasons."""
    text = DOCUMENT.read_text(encoding="utf-8").split("## What we refuse, and Go does not")[1]
    return [
        Row(subject, message)
        for subject, message in re.findall(r"^\| `([^`]+)` \| ([^|]*?) *\| \S", text, re.MULTILINE)
    ]


def rows_of(trial: Trial, reported: object) -> set[Row]:
    """Those of the list that say why only we refuse; there is one at least."""
    if not trial.is_beyond:
        return set()
    found = {row for row in beyond_go() if any(map(row.matches, trial.violations))}
    assert found, f"{reported}: {trial.violations}"
    return found


#: Changes by place that Go takes and we do not, and that no dice may throw.
OURS_ALONE: dict[str, dict[int, Callable[[Draft], None]]] = {
    "an issuer with an empty KeyUsage": {1: put("2.5.29.15", value(der.BIT_STRING, b"\x00"), critical=True)},
    "a constraint that begins with a dot": {1: constraints(0x82, b".example.org", kind=1)},
    "a key identifier that is not the issuer's": {
        0: put(AKI, ISSUER_ID),
        1: put(SKI, value(der.OCTET_STRING, b"87654321")),
    },
    "an e-mail address below a constraint": {1: sans(value(0x81, b"a@b")), 2: constraints(0x81, b"b")},
}


def judged_alone(go: Judge, fault: str) -> set[Row]:
    """One of them."""
    mutant = chain("apiserver", 1)
    for place, change in OURS_ALONE[fault].items():
        change(mutant.drafts[place])
    trial = judged(go, "apiserver", mutant)
    assert trial.is_beyond, trial
    return rows_of(trial, fault)


def judged_below(go: Judge, key: csr.PrivateKey) -> set[Row]:
    """A good answer of a CA with this key."""
    root, one = Signer.make(key=key), asked("apiserver")
    ders = [_der(root.issue(one.request).leaf), _der(root.certificate)]
    trial = tried_both(go, ders, one.request, NOW, key_pem=csr.key_pem(one.key), host=HOSTS["apiserver"])
    assert trial.is_beyond, trial
    return rows_of(trial, key)


def judged_hostile(go: Judge, fault: str) -> set[Row]:
    """One of the answers of `tests/kit/hostile.py`, and its twin, which both take."""
    case, now = HOSTILE[fault], datetime.now(UTC)  # some are made by openssl, which knows no other time
    live = TestCA.make(algorithm="ecdsa-p256").leaf(SPECS[case.name])
    pem = csr.build(live, csr.generate_key(case.algorithm))
    signer = case.root(now)
    request = SignRequest(spec=SPECS[case.name], csr_pem=pem, validity=timedelta(days=365))
    old = signer.issue(request, begin=now - timedelta(days=358), end=now + LEFT).leaf
    desk = Desk(root=signer, request=replace(request, replaces=old), now=now)
    answers = [case.right(desk), case.wrong(desk)]
    now = datetime.now(UTC)  # openssl may have made them seconds later
    trials = [
        tried_both(go, [_der(each) for each in (made.leaf, *made.intermediates, signer.certificate)], desk.request, now)
        for made in answers
    ]
    assert trials[0] == Trial(violations=[], refused="")
    return rows_of(trials[1], fault)


def test_nothing_that_go_refuses_is_installed(go: Judge, tried: Tried) -> None:
    """Nothing that Go refuses is installed, of thousands of changed chains, the same in each run; the document lists what only we refuse."""
    trials, rows = [], set[Row]()
    for seed in range(SEEDS):
        name, mutant = changed(random.Random(seed))  # noqa: S311 (no secret: the same in each run)
        trials.append(judged(go, name, mutant))
        rows |= rows_of(trials[-1], mutant.done)
    assert sum(not trial.violations for trial in trials) > SEEDS / 10
    assert sum(bool(trial.violations and trial.refused) for trial in trials) > SEEDS / 10
    for fault in HOSTILE:
        rows |= judged_hostile(go, fault)
    for fault in OURS_ALONE:
        rows |= judged_alone(go, fault)
    for key in (ec.generate_private_key(ec.SECP224R1()), rsa.generate_private_key(65537, 1024)):
        rows |= judged_below(go, key)
    assert set(beyond_go()) == rows
    tried("changed certificates and chains, judged by us and by Go", SEEDS)
    tried("hostile answers judged by us and by Go, each with a twin", len(HOSTILE))


def test_nothing_that_go_refuses_is_installed_whatever_is_changed(go: Judge, tried: Tried) -> None:
    """The same of chains that are new in each run; a failure is made small."""

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=False))
    def holds(dice: random.Random) -> None:
        name, mutant = changed(dice)
        rows_of(judged(go, name, mutant), mutant.done)

    holds()
    tried("changed certificates and chains, judged by us and by Go", EXAMPLES)
