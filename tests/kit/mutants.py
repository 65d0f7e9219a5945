"""
Certificates that are changed in their DER and signed again: what no CA's software makes, and a forger may.

A `Tree` is DER as nested lists; a `Mutant` is a chain of them, whose signatures hold over whatever they have become.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding

from bridge.pki import der
from bridge.pki.csr import PrivateKey

#: Tags of strings, times and what else may stand where one of them is wanted.
STRINGS = (0x0C, 0x12, 0x13, 0x14, 0x16, 0x1A, 0x1B, 0x1C, 0x1E, der.OCTET_STRING, der.BIT_STRING, der.INTEGER)
UTC_TIME, GENERALIZED_TIME = 0x17, 0x18


@dataclass(kw_only=True)
class Tree:
    """One value of DER."""

    tag: int
    content: bytes = b""
    children: list[Tree] | None = None  #: None: a primitive, whose content counts.

    @classmethod
    def read(cls, element: der.Element) -> Tree:
        """What constructed values hold, too; what OCTET STRINGs hold is left as it is."""
        if element.tag & 0x20:
            return cls(tag=element.tag, children=[cls.read(child) for child in element.children()])
        return cls(tag=element.tag, content=element.content)

    def encoded(self) -> bytes:
        """DER."""
        content = self.content if self.children is None else b"".join(child.encoded() for child in self.children)
        return bytes([self.tag]) + _length(len(content)) + content

    def copy(self) -> Tree:
        """One that can be changed by itself."""
        children = None if self.children is None else [child.copy() for child in self.children]
        return Tree(tag=self.tag, content=self.content, children=children)

    def __getitem__(self, index: int) -> Tree:
        """A child."""
        assert self.children is not None
        return self.children[index]

    def nodes(self) -> list[Tree]:
        """Itself and all below it."""
        return [self, *(node for child in self.children or () for node in child.nodes())]


def _length(length: int) -> bytes:
    if length < 0x80:
        return bytes([length])
    digits = length.to_bytes((length.bit_length() + 7) // 8)
    return bytes([0x80 | len(digits)]) + digits


def value(tag: int, *content: bytes | Tree) -> Tree:
    """Shorter: bytes make a primitive, trees (or nothing) what is constructed."""
    if content and isinstance(content[0], bytes):
        return Tree(tag=tag, content=content[0])
    return Tree(tag=tag, children=[each for each in content if isinstance(each, Tree)])


def oid(dotted: str) -> bytes:
    """The content of an OID."""
    first, second, *rest = map(int, dotted.split("."))
    return b"".join(_base128(number) for number in (40 * first + second, *rest))


def _base128(number: int) -> bytes:
    digits = [number & 0x7F]
    while number := number >> 7:
        digits.append(0x80 | number & 0x7F)
    return bytes(reversed(digits))


def extension(dotted: str, content: bytes | Tree, *, critical: bool | None = None) -> Tree:
    """One extension; None: not critical, without saying so."""
    inner = content if isinstance(content, bytes) else content.encoded()
    flag = [] if critical is None else [value(der.BOOLEAN, b"\xff" if critical else b"\x00")]
    return value(der.SEQUENCE, value(der.OID, oid(dotted)), *flag, value(der.OCTET_STRING, inner))


@dataclass(kw_only=True)
class Draft:
    """A certificate before it is signed."""

    tbs: Tree
    key: PrivateKey  #: Its own.
    #: The algorithm's second name; None: as inside.
    outer: Tree | None = None

    # fields of tbs, behind the version
    SERIAL, SIGNATURE, ISSUER, VALIDITY, SUBJECT, PUBLIC_KEY, EXTENSIONS = range(1, 8)

    @classmethod
    def of(cls, certificate: x509.Certificate, key: PrivateKey) -> Draft:
        """One to change."""
        return cls(tbs=Tree.read(der.one(certificate.tbs_certificate_bytes, der.SEQUENCE)), key=key)

    def extensions(self) -> list[Tree]:
        """To add to, and to take from."""
        found = self.tbs[self.EXTENSIONS][0].children
        assert found is not None
        return found

    def signed(self, by: PrivateKey) -> bytes:
        """DER."""
        tbs = self.tbs.encoded()
        signature = (
            by.sign(tbs, ec.ECDSA(hashes.SHA256()))
            if isinstance(by, ec.EllipticCurvePrivateKey)
            else by.sign(tbs, padding.PKCS1v15(), hashes.SHA256())
        )
        outer = (self.outer or self.tbs[self.SIGNATURE]).encoded()
        return Tree(
            tag=der.SEQUENCE, content=tbs + outer + value(der.BIT_STRING, b"\x00" + signature).encoded()
        ).encoded()


@dataclass(kw_only=True)
class Mutant:
    """The leaf first, the anchor last."""

    drafts: list[Draft]
    done: list[str] = field(default_factory=list)  #: What was changed.

    def ders(self) -> list[bytes]:
        """Each signed by the one behind it, the last by itself; issuers' names are taken over as they have become."""
        made = []
        for draft, issuer in zip(self.drafts, [*self.drafts[1:], self.drafts[-1]], strict=True):
            if len(draft.tbs.children or ()) > Draft.SUBJECT and len(issuer.tbs.children or ()) > Draft.SUBJECT:
                draft.tbs.children[Draft.ISSUER] = issuer.tbs[Draft.SUBJECT]  # type: ignore[index]
            made.append(draft.signed(issuer.key))
        return made

    def mutate(self, dice: random.Random, times: int) -> None:
        """Changes of any certificates, those last after which a part is no more where it was."""
        picked = {(dice.randrange(len(self.drafts)), dice.choice(CHANGES)) for _ in range(times)}
        for place, change in sorted(picked, key=lambda pick: (CHANGES.index(pick[1]), pick[0])):
            change(self.drafts[place], dice)
            self.done.append(f"{change.__name__} of {place}")


# --- changes ----------------------------------------------------------------------------------------------------------


def _general_names() -> list[Tree]:
    """Names of all kinds, good and odd."""
    directory = value(der.context(4, constructed=True), value(der.SEQUENCE))
    other = value(der.context(0, constructed=True), value(der.OID, oid("1.2.3")), value(0xA0, value(0x0C, b"x")))
    plain = {
        1: [b"a@example.com", b"", b"x", b"a@b@c", b"\xff@x"],
        2: [
            b"kubernetes",
            b"",
            b".",
            b"example.com.",
            b"*.example.com",
            b"a..b",
            b"\xfcber",
            b"x y",
            b".svc",
            b"svc",
            b"local",
            b".local",
        ],
        6: [
            *(b"https://example.com/x", b"", b"%", b"http://[::1]/", b"http://x:99999/", b"//x..y", b"urn:a:b", b"a b"),
            *(b"http://example.com:80/", b"https://a.b./", b"x", b":", b"http://\x7f/", b"spiffe://x/%zz"),
        ],
        7: [
            b"\x0a\x60\x00\x01",
            b"\x0a\x00\x00\x00\xff\x00\x00\x00",
            b"\x0a",
            bytes(16),
            bytes(32),
            b"\x0a\0\0\1\xff\0\xff\0",
            bytes(8),
        ],
        8: [oid("1.2.3.4")],
    }
    return [directory, other, *(value(der.context(tag), each) for tag, some in plain.items() for each in some)]


def _subtrees(tag: int, base: Tree) -> Tree:
    return value(der.context(tag, constructed=True), value(der.SEQUENCE, base))


def _uri(text: bytes) -> Tree:
    return value(der.context(6), text)


#: Made of one: numbers of more than 31 bits.
UUID = "2.25.329800735698586629295641978511506172918"
_SEQ = der.SEQUENCE


def _policies(*dotted: str) -> Tree:
    return value(_SEQ, *(value(_SEQ, value(der.OID, oid(each))) for each in dotted))


def _some_extension(dice: random.Random) -> tuple[str, Tree | bytes]:
    """OID and value."""
    names = _general_names()
    base = dice.choice(names)
    ekus = ["1.3.6.1.5.5.7.3.1", "1.3.6.1.5.5.7.3.2", "1.3.6.1.5.5.7.3.3", "2.5.29.37.0", "1.3.6.1.5.5.7.3.4", UUID]
    some: list[tuple[str, Tree | bytes]] = [
        ("2.5.29.14", value(der.OCTET_STRING, b"12345678")),
        ("2.5.29.35", value(_SEQ, value(0x80, b"12345678"))),
        ("2.5.29.35", value(_SEQ, value(0x81, b"12345678"))),
        ("2.5.29.17", value(_SEQ, base)),
        ("2.5.29.17", value(_SEQ, *dice.sample(names, 2))),
        ("2.5.29.17", value(_SEQ)),
        ("2.5.29.18", value(_SEQ, base)),
        ("2.5.29.15", value(der.BIT_STRING, dice.choice([b"\x01\x06", b"\x00\x06", b"\x00", b"\x05\xa0", b"\x02\x84", b"\x08\x00"]))),
        ("2.5.29.19", value(_SEQ)),
        ("2.5.29.19", value(_SEQ, value(der.BOOLEAN, b"\xff"))),
        ("2.5.29.19", value(_SEQ, value(der.BOOLEAN, b"\xff"), value(der.INTEGER, dice.choice([b"\x00", b"\x01", b"\xff", b"\x7f"])))),
        ("2.5.29.19", value(_SEQ, value(der.BOOLEAN, b"\x00"))),
        ("2.5.29.19", value(_SEQ, value(der.INTEGER, b"\x00"))),
        ("2.5.29.37", value(_SEQ, *(value(der.OID, oid(each)) for each in dice.sample(ekus, dice.randrange(0, 4))))),
        ("2.5.29.30", value(_SEQ, _subtrees(dice.choice([0, 1]), base))),
        ("2.5.29.30", value(_SEQ, _subtrees(0, dice.choice(names)), _subtrees(1, base))),
        ("2.5.29.30", value(_SEQ)),
        ("2.5.29.30", value(_SEQ, value(0xA0))),
        ("2.5.29.31", value(_SEQ, value(_SEQ, value(0xA0, value(0xA0, _uri(b"http://x/crl")))))),
        ("2.5.29.31", value(_SEQ, value(_SEQ, value(0xA0, value(0xA1, value(_SEQ, value(der.OID, oid("2.5.4.3")), value(0x0C, b"x"))))))),
        ("2.5.29.31", value(_SEQ, value(_SEQ, value(0x81, b"\x01\x06")))),
        ("2.5.29.32", _policies(*dice.choice([["1.2.3"], ["2.5.29.32.0"], ["1.2.3", "1.2.3"], ["1.2.3", "1.2.4"], [UUID], []]))),
        ("2.5.29.33", value(_SEQ, value(_SEQ, value(der.OID, oid("1.2.3")), value(der.OID, oid("1.2.4"))))),
        ("2.5.29.33", value(_SEQ, value(_SEQ, value(der.OID, oid("2.5.29.32.0")), value(der.OID, oid("1.2.4"))))),
        ("2.5.29.33", value(_SEQ, value(_SEQ, value(der.OID, oid("1.2.4"))))),
        ("2.5.29.33", b"garbage"),
        ("2.5.29.36", value(_SEQ, value(0x80, dice.choice([b"\x00", b"\x01", b"\x05", b"\xff"])))),
        ("2.5.29.36", value(_SEQ, value(0x81, b"\x00"))),
        ("2.5.29.36", value(_SEQ)),
        ("2.5.29.54", value(der.INTEGER, dice.choice([b"\x00", b"\x01", b"\xff"]))),
        ("2.5.29.54", b"garbage"),
        ("2.5.29.46", value(_SEQ, value(_SEQ, value(0xA0, value(0xA0, _uri(b"http://x/crl")))))),
        ("1.3.6.1.5.5.7.1.1", value(_SEQ, value(_SEQ, value(der.OID, oid(dice.choice(["1.3.6.1.5.5.7.48.1", "1.2.3", UUID]))), _uri(b"http://x")))),
        ("1.3.6.1.5.5.7.1.1", value(_SEQ, value(_SEQ, value(der.OID, oid("1.3.6.1.5.5.7.48.2")), base))),
        ("1.3.6.1.5.5.7.1.24", value(_SEQ, value(der.INTEGER, b"\x05"))),
        ("1.2.3.4", b"\x05\x00"),
        (UUID, b"\x05\x00"),
        ("2.5.29.99", b"\x05\x00"),
        ("2.16.840.1.113730.1.1", value(der.BIT_STRING, b"\x01\x06")),
    ]  # fmt: skip
    return dice.choice(some)


def adds_an_extension(draft: Draft, dice: random.Random) -> None:
    """Instead of the one of its kind, most times."""
    dotted, content = _some_extension(dice)
    found = draft.extensions()
    if dice.random() < 0.9:
        found[:] = [each for each in found if each[0].content != oid(dotted)]
    found.insert(
        dice.randrange(len(found) + 1), extension(dotted, content, critical=dice.choice([None, None, True, False]))
    )


def turns_a_flag(draft: Draft, dice: random.Random) -> None:
    """Critical or not."""
    each = dice.choice(draft.extensions())
    assert each.children is not None
    if len(each.children) == 3:
        each.children.pop(1)
    else:
        each.children.insert(1, value(der.BOOLEAN, dice.choice([b"\xff", b"\xff", b"\x00", b"\x01"])))


def drops_an_extension(draft: Draft, dice: random.Random) -> None:
    """Drops an extension, or writes it twice."""
    found = draft.extensions()
    if not found:
        return
    if dice.random() < 0.3:
        found.append(dice.choice(found).copy())
    else:
        found.pop(dice.randrange(len(found)))


def retypes_a_string(draft: Draft, dice: random.Random) -> None:
    """Another type of string, or another value, in the subject."""
    attribute = dice.choice(
        [node for node in draft.tbs[Draft.SUBJECT].nodes() if node.tag in STRINGS] or [value(0x0C, b"")]
    )
    attribute.tag = dice.choice(STRINGS)
    if dice.random() < 0.3:
        attribute.content += dice.choice([b"\x00", b"\x00\x00", b"@", b"*", b"&", b"\xff", b"\xc3\xbc", b" ", b"_"])


def adds_an_attribute(draft: Draft, dice: random.Random) -> None:
    """To the subject."""
    kind = dice.choice(["2.5.4.11", "2.5.4.3", "2.5.4.10", UUID, "0.9.2342.19200300.100.1.25", "1.2.840.113549.1.9.1"])
    string = value(dice.choice(STRINGS), dice.choice([b"x", b"x", b"12", b"", b"\x00x", b"\xff\xfe", b"x@y"]))
    rdn = value(der.SET, value(_SEQ, value(der.OID, oid(kind)), string))
    found = draft.tbs[Draft.SUBJECT].children
    assert found is not None
    found.insert(dice.randrange(len(found) + 1), rdn)


def changes_a_time(draft: Draft, dice: random.Random) -> None:
    """Its form; the moment only where the form can say no other."""
    time = dice.choice(draft.tbs[Draft.VALIDITY].children or [])
    forms = [
        (UTC_TIME, time.content[:-3] + b"Z"),
        (UTC_TIME, time.content[:-1] + b"+0000"),
        (UTC_TIME, time.content[:-1]),
        (GENERALIZED_TIME, b"20" + time.content),
        (GENERALIZED_TIME, b"20" + time.content[:-1] + b".5Z"),
        (GENERALIZED_TIME, b"20" + time.content[:-1] + b"+0100"),
        (GENERALIZED_TIME, b"99991231235959Z"),
        (UTC_TIME, b"500101000000Z"),
        (GENERALIZED_TIME, b"00000101000000Z"),
        (UTC_TIME, b"20" + time.content),
        (UTC_TIME, time.content[:-3] + b"60Z"),
    ]
    time.tag, time.content = dice.choice(forms)


def changes_the_serial(draft: Draft, dice: random.Random) -> None:
    """Negative, none, long, or not in its shortest form."""
    draft.tbs[Draft.SERIAL].content = dice.choice(
        [b"\xff", b"\x00", b"\x80", b"\x01", b"\x00\x01", b"\x7f" * 21, b"\x7f" * 40, b""]
    )


def changes_the_version(draft: Draft, dice: random.Random) -> None:
    """1, 2, 4, and none."""
    draft.tbs[0][0].content = dice.choice([b"\x00", b"\x01", b"\x03", b"\xff", b"\x02"])


def changes_the_algorithm(draft: Draft, dice: random.Random) -> None:
    """Parameters, or another name; inside, outside or both."""
    inner = draft.tbs[Draft.SIGNATURE]
    assert inner.children is not None
    draft.outer = inner.copy()
    target = dice.choice([inner, draft.outer])
    assert target.children is not None
    if dice.random() < 0.5:
        target.children.append(value(0x05, b""))
    else:
        target.children[0] = value(
            der.OID, oid(dice.choice(["1.2.840.10045.4.3.3", "1.2.840.10045.4.1", "1.2.3", UUID]))
        )
    if dice.random() < 0.4:
        draft.outer = None


def encodes_the_key_otherwise(draft: Draft, dice: random.Random) -> None:
    """A compressed point, a hybrid one, no parameters or others."""
    spki = draft.tbs[Draft.PUBLIC_KEY]
    assert spki.children is not None
    bits = spki[1].content
    parameters = spki[0].children
    assert parameters is not None
    match dice.randrange(5):
        case 0:
            spki[1].content = b"\x00" + bytes([2 + (bits[-1] & 1)]) + bits[2:34]
        case 1:
            spki[1].content = b"\x00" + bytes([6 + (bits[-1] & 1)]) + bits[2:]
        case 2:
            parameters.pop()
        case 3:
            parameters[1:] = [value(0x05, b"")]
        case _:
            parameters[0] = value(der.OID, oid(dice.choice(["1.3.132.1.12", "1.2.840.113549.1.1.10", "1.2.3"])))


def adds_a_field(draft: Draft, dice: random.Random) -> None:
    """Unique identifiers, or something behind the end."""
    found = draft.tbs.children
    assert found is not None
    found.insert(
        dice.choice([Draft.EXTENSIONS, len(found)]), value(dice.choice([0x81, 0x82, 0xA1, 0x05, 0x84]), b"\x00x")
    )


def damages_a_node(draft: Draft, dice: random.Random) -> None:
    """Anything, anywhere but in names of algorithms and keys."""
    node = dice.choice(
        draft.tbs[dice.choice([Draft.SUBJECT, Draft.VALIDITY, Draft.EXTENSIONS, Draft.EXTENSIONS])].nodes()
    )
    match dice.randrange(4):
        case 0:
            node.tag = dice.choice([node.tag ^ 0x20, node.tag ^ 0x80, node.tag + 1 & 0xFF, der.OCTET_STRING, 0x05])
        case 1 if node.children:
            node.children.pop(dice.randrange(len(node.children)))
        case 2 if node.children:
            node.children.append(dice.choice(node.children).copy())
        case _ if node.children is None and node.content:
            place = dice.randrange(len(node.content))
            node.content = node.content[:place] + bytes([dice.randrange(256)]) + node.content[place + 1 :]


CHANGES: Sequence[Callable[[Draft, random.Random], None]] = (
    *[adds_an_extension] * 6,
    *[turns_a_flag, retypes_a_string] * 2,
    drops_an_extension,
    adds_an_attribute,
    changes_a_time,
    changes_the_serial,
    changes_the_version,
    changes_the_algorithm,
    encodes_the_key_otherwise,
    adds_a_field,
    *[damages_a_node] * 2,
)
