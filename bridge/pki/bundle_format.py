"""Bundles as JSON and as text for people (pure); the digest detects accidents; proofs, policy and people detect changes."""

from __future__ import annotations

import json
import re
from base64 import b64decode, b64encode
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from hashlib import sha256
from typing import Any, NoReturn, TypeVar, cast

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding

from bridge.contract import Issued
from bridge.pki.budget import OverBudgetError, json_of
from bridge.pki.bundle import (
    CARRIED,
    LONGEST_TEXT,
    AnswerBundle,
    Bundle,
    BundledRequest,
    BundleError,
    IncompleteBundleError,
    Refusal,
    RequestBundle,
    is_carried,
)
from bridge.pki.certificates import UNREADABLE, extended_key_usages, fingerprint, pem, san_counts, serial_hex
from bridge.pki.csr import fingerprint_text, issuer_line, key_line, sans_line, subject_line
from bridge.pki.expiry import duration_text, minute
from bridge.pki.signatures import is_by, origin_problem, proof_problem, usages_problem
from bridge.specs import AUTHORITIES, EKU, MASTERS
from bridge.words import counted, one_line

_Signed = TypeVar("_Signed", x509.Certificate, x509.CertificateSigningRequest)

REQUEST_SCHEMA = "ca-bridge/request-bundle"
ANSWER_SCHEMA = "ca-bridge/answer-bundle"
REQUEST_VERSION, ANSWER_VERSION = 2, 1

LONGEST_NAME = 253  #: Kubernetes' limit for a node's name.
_LONGEST_VALIDITY = timedelta(days=36500)
_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")  # it becomes part of file names
_DIGEST = re.compile(r"[0-9a-f]{64}")
_BATCH = re.compile(r"[0-9a-f]{32}")


# --- writing ----------------------------------------------------------------------------------------------------------


def dumps(bundle: Bundle) -> bytes:
    """Encode the bundle as a file; equal bundles give equal bytes (BundleError: a reader would refuse it)."""
    document = _document(bundle)
    document |= {"digest": _digest(document)}
    if isinstance(bundle, AnswerBundle) and bundle.signature is not None:
        document |= {"signature": b64encode(bundle.signature).decode()}
    if isinstance(bundle, RequestBundle):
        _read_request_bundle(document)
    else:
        _read_answer_bundle(document, lambda pem, _: pem)  # the desk has compared the certificates with the requests
    return json.dumps(document, indent=1).encode() + b"\n"


def digest(bundle: Bundle) -> str:
    """The SHA-256 (hex) of the bundle's values, independent of white space between them."""
    return _digest(_document(bundle))


def answer_message(bundle: AnswerBundle) -> bytes:
    """The bytes that a desk signs: a prefix of its own, and the digest of the whole answer."""
    return b"ca-bridge answer bundle 1\n" + digest(bundle).encode()


def is_authentic(answer: AnswerBundle, desk_key: PublicKeyTypes | None) -> bool:
    """Whether the desk signed the answer, if the settings name its key."""
    if desk_key is None:
        return True
    return answer.signature is not None and is_by(desk_key, answer.signature, answer_message(answer))


def short_fingerprint(bundle: Bundle) -> str:
    """The bundle's digest, short enough to read out over the phone."""
    return fingerprint_text(digest(bundle))


def _digest(document: Mapping[str, Any]) -> str:
    return sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _document(bundle: Bundle) -> dict[str, Any]:
    if isinstance(bundle, RequestBundle):
        return {
            "schema": REQUEST_SCHEMA,
            "version": REQUEST_VERSION,
            "batch": bundle.batch,
            "node": bundle.node,
            "cluster": bundle.cluster,
            "created": bundle.created.strftime(TIME),
            "requests": [_request_document(request) for request in bundle.requests],
        }
    return {
        "schema": ANSWER_SCHEMA,
        "version": ANSWER_VERSION,
        "requestDigest": bundle.request_digest,
        "batch": bundle.batch,
        "node": bundle.node,
        "cluster": bundle.cluster,
        "signer": bundle.signer,
        "signed": bundle.signed.strftime(TIME),
        "answers": [{"name": name, **_answer_document(answer)} for name, answer in bundle.answers.items()],
    }


def _request_document(request: BundledRequest) -> dict[str, Any]:
    return {
        "name": request.name,
        "authority": request.authority,
        "ekus": sorted(eku.label for eku in request.ekus),
        "validitySeconds": int(request.validity.total_seconds()),
        "csr": request.csr.public_bytes(Encoding.PEM).decode(),
        "replaces": pem(request.replaces).decode() if request.replaces is not None else None,
        "proof": b64encode(request.proof).decode() if request.proof is not None else None,
    }


def _answer_document(answer: Issued | Refusal) -> dict[str, Any]:
    if isinstance(answer, Refusal):
        return {"refusal": answer.reason}
    return {"chain": [pem(certificate).decode() for certificate in (answer.leaf, *answer.intermediates)]}


def request_file_name(bundle: RequestBundle) -> str:
    """The default file name, different for each bundle."""
    return file_names(bundle.node, digest(bundle))[0]


def file_names(node: str, request_digest: str, authorities: Collection[str] = tuple(AUTHORITIES)) -> tuple[str, str]:
    """The file names of a request, and of its answer from a desk with the CAs of these authorities."""
    stem = f"{node}-{request_digest[:32]}"
    return f"{stem}.request.json", f"{stem}{answer_suffix(authorities)}"


def answer_suffix(authorities: Collection[str]) -> str:
    """The end of an answer's file name; it names the authorities unless it has all, as two desks' answers must differ."""
    ours = [name for name in AUTHORITIES if name in authorities]
    return "".join(f".{name}" for name in ours if len(ours) < len(AUTHORITIES)) + ".answer.json"


# --- reading ----------------------------------------------------------------------------------------------------------


def loads(data: bytes) -> Bundle:
    """Decode a bundle of either kind; IncompleteBundleError: no JSON document; BundleError: invalid or changed."""
    return _read(parse(data))


def _read(document: Mapping[str, Any]) -> Bundle:
    schema = document.get("schema")
    if schema == REQUEST_SCHEMA:
        return _read_request_bundle(document)
    if schema == ANSWER_SCHEMA:
        return _read_answer_bundle(document, certificate)
    wanted, found = f"{REQUEST_SCHEMA} or {ANSWER_SCHEMA}", "none" if schema is None else excerpt(schema)
    raise BundleError("schema", wanted, found, hint=_OTHER_HINT if schema is None else None)


def loads_request(data: bytes) -> RequestBundle:
    """Decode a request bundle."""
    bundle = loads(data)
    if not isinstance(bundle, RequestBundle):
        hint = "this is the answer, which goes back to the node"
        raise BundleError("schema", REQUEST_SCHEMA, ANSWER_SCHEMA, hint=hint)
    return bundle


def loads_digested(data: bytes) -> tuple[RequestBundle, str]:
    """Decode a request bundle, and return it with its `digest`, which reading computes anyway."""
    document = parse(data)
    if document.get("schema") != REQUEST_SCHEMA:
        raise BundleError("schema", REQUEST_SCHEMA, excerpt(document.get("schema")))
    return _read_request_bundle(document), document["digest"]


def loads_answer(data: bytes) -> AnswerBundle:
    """Decode an answer bundle, without verifying the answers: see `bridge.pki.verify`."""
    bundle = loads(data)
    if not isinstance(bundle, AnswerBundle):
        hint = "this is the request, which goes to the CA desk"
        raise BundleError("schema", ANSWER_SCHEMA, REQUEST_SCHEMA, hint=hint)
    return bundle


def _read_request_bundle(document: Mapping[str, Any]) -> RequestBundle:
    fields = Fields.of(document, "", ("schema", "version", "batch", "node", "cluster", "created", "requests", "digest"))
    fields.choice("version", [REQUEST_VERSION])
    bundle = RequestBundle(
        batch=_batch(fields),
        node=_node(fields),
        cluster=fields.text("cluster", LONGEST_NAME),
        created=fields.time("created"),
        requests=tuple(fields.items("requests", _read_request)),
    )
    _assert_once(fields, "requests", [request.name for request in bundle.requests])
    _assert_digest(fields)
    return bundle


def _read_request(value: object, place: str) -> BundledRequest:
    keys = ("name", "authority", "ekus", "validitySeconds", "csr", "replaces", "proof")
    fields = Fields.of(value, f"{place}.", keys)
    replaces = fields.values["replaces"]
    return BundledRequest(
        name=_carried(fields),
        authority=fields.choice("authority", list(AUTHORITIES)),
        ekus=_ekus(fields),
        validity=_validity(fields),
        csr=_block(x509.load_pem_x509_csr, fields.values["csr"], f"{place}.csr", "a CSR"),
        replaces=None if replaces is None else certificate(replaces, f"{place}.replaces", " or null"),
        proof=fields.encoded("proof"),
    )


def _read_answer_bundle(document: Mapping[str, Any], load: Callable[[object, str], Any]) -> AnswerBundle:
    keys = ("schema", "version", "requestDigest", "batch", "node", "cluster", "signer", "signed", "answers", "digest")
    fields = Fields.of(document, "", (*keys, "signature") if "signature" in document else keys)
    fields.choice("version", [ANSWER_VERSION])
    answers = fields.items("answers", partial(_read_answer, load=load))
    _assert_once(fields, "answers", [name for name, _ in answers])
    bundle = AnswerBundle(
        request_digest=fields.shaped("requestDigest", _DIGEST, "64 hex digits"),
        batch=_batch(fields),
        node=_node(fields),
        cluster=fields.text("cluster", LONGEST_NAME),
        signer=fields.text("signer"),
        signed=fields.time("signed"),
        answers=dict(answers),
        signature=fields.encoded("signature") if "signature" in document else None,
    )
    _assert_digest(fields)
    return bundle


def _read_answer(value: object, place: str, load: Callable[[object, str], Any]) -> tuple[str, Issued | Refusal]:
    is_refusal = isinstance(value, dict) and "refusal" in value
    fields = Fields.of(value, f"{place}.", ("name", "refusal" if is_refusal else "chain"))
    name = _carried(fields)
    if is_refusal:
        return name, Refusal(reason=fields.text("refusal"))
    leaf, *intermediates = fields.items("chain", load)
    return name, Issued(leaf=leaf, intermediates=tuple(intermediates))


def _carried(fields: Fields) -> str:
    """The name of a certificate."""
    name = fields.values["name"]
    if not is_carried(name):
        fields.fail("name", f"one of {', '.join(CARRIED)}, or the name of a node's further pair")
    return cast("str", name)


def _batch(fields: Fields) -> str:
    return fields.shaped("batch", _BATCH, "32 hex digits")


def _node(fields: Fields) -> str:
    return fields.shaped("node", _NODE, "a node's name (letters, digits, '.', '_' and '-')")


def _ekus(fields: Fields) -> frozenset[EKU]:
    labels = {eku.label: eku for eku in EKU}
    value = fields.values["ekus"]
    is_list = isinstance(value, list) and bool(value)
    if not is_list or not all(isinstance(entry, str) and entry in labels for entry in value):
        fields.fail("ekus", f"a list of {' and '.join(sorted(labels))}")
    if value != sorted(set(value)):
        fields.fail("ekus", "each once, in alphabetical order")
    return frozenset(labels[label] for label in value)


def _validity(fields: Fields) -> timedelta:
    value = fields.values["validitySeconds"]
    longest = int(_LONGEST_VALIDITY.total_seconds())
    if type(value) is not int or not 0 < value <= longest:
        fields.fail("validitySeconds", f"a whole number of seconds, at most {longest}")
    return timedelta(seconds=value)


def _assert_once(fields: Fields, key: str, names: Sequence[str]) -> None:
    for number, name in enumerate(names):
        if name in names[:number]:
            raise BundleError(f"{fields.place}{key}[{number}].name", "each name once", f"{name} again")


def _assert_digest(fields: Fields) -> None:
    """Compare the digest with that of the document's values."""
    given = fields.shaped("digest", _DIGEST, "64 hex digits")
    wanted = _digest({key: value for key, value in fields.values.items() if key not in ("digest", "signature")})
    if given != wanted:
        raise BundleError("digest", f"{wanted}, which is that of what it holds", given)


#: The most keys of an object: no bundle has more than a dozen, but answers have one for each certificate.
_MOST_KEYS = 1000
_LONGEST_FOUND = 60

TIME = "%Y-%m-%dT%H:%M:%SZ"
_TIME_SHAPE = re.compile(r"[0-9]{4}(-[0-9]{2}){2}T[0-9]{2}(:[0-9]{2}){2}Z")

#: For a CSR that is not in a bundle.
_CSR_HINT = (
    "this is a CSR: a person's is signed by `ca-bridge kubeconfig user NAME --csr FILE`, kubeadm's by `ca-bridge sign` "
    "of the directory that they are in"
)

#: For JSON that is not a bundle.
_OTHER_HINT = "another program wrote this file: name what `ca-bridge export`, the outbox or the desk has made"


def parse(data: bytes) -> dict[str, Any]:
    """Parse the bytes as one JSON object."""
    try:
        document = json_of(data, pairs=each_once)
    except OverBudgetError as e:
        raise BundleError("", e.wanted, e.found) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        if isinstance(e, UnicodeDecodeError):
            reason = "bytes that are no UTF-8"
        else:
            reason = f"none: {e.msg.removesuffix(' starting at')} at byte {e.pos}"
        is_csr = b"CERTIFICATE REQUEST-----" in data and not data.lstrip().startswith(b"{")
        hint = _CSR_HINT if is_csr else "is it still being copied? a copy that was cut off has to be made again"
        raise IncompleteBundleError("", "one JSON document", reason, hint=hint) from None
    except ValueError:  # a number with thousands of digits, or NaN
        raise BundleError("", "a bundle", "NaN or an infinite number") from None
    if not isinstance(document, dict):
        raise BundleError("", "a JSON object", excerpt(document), hint=_OTHER_HINT)
    return document


def excerpt(value: object) -> str:
    """A document's value for an error message: short, and without control characters."""
    text = repr(value)
    return text if len(text) <= _LONGEST_FOUND else f"{text[:_LONGEST_FOUND]}…"


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object without duplicate keys, since two readers may use different values of a repeated key."""
    if len(pairs) > _MOST_KEYS:
        raise BundleError("", f"objects of at most {_MOST_KEYS} keys", f"{len(pairs)}")
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise BundleError(excerpt(key), "each key once", "it twice")
        values[key] = value
    return values


@dataclass(frozen=True, slots=True)
class Fields:
    """One JSON object; each method returns a key's value, or raises a BundleError with path, wanted and found."""

    values: Mapping[str, Any]
    place: str  #: The object's path in the bundle, such as `requests[2].`; empty for the whole bundle.

    @classmethod
    def of(cls, value: object, place: str, keys: Sequence[str]) -> Fields:
        """Read an object that has exactly these keys."""
        if not isinstance(value, dict):
            raise BundleError(place.rstrip("."), "an object", excerpt(value))
        for key in value:
            if key not in keys:
                raise BundleError(f"{place}{one_line(key)}", f"one of {', '.join(keys)}", excerpt(key))
        for key in keys:
            if key not in value:
                raise BundleError(f"{place}{key}", "a value", "nothing")
        return cls(value, place)

    def fail(self, key: str, wanted: str, found: str | None = None) -> NoReturn:
        """Refuse the key's value; without `found` the message quotes it."""
        raise BundleError(f"{self.place}{key}", wanted, excerpt(self.values[key]) if found is None else found)

    def text(self, key: str, longest: int = LONGEST_TEXT) -> str:
        """A text that is not empty, and printable, since terminals show it."""
        value = self.values[key]
        if not isinstance(value, str) or not value.strip():
            self.fail(key, "a text")
        if len(value) > longest:
            self.fail(key, f"at most {longest} characters", f"{len(value)}")
        if not value.isprintable():
            self.fail(key, "a text without control characters")
        return value

    def shaped(self, key: str, shape: re.Pattern[str], wanted: str) -> str:
        """A text that matches `shape`, which `wanted` names."""
        value = self.values[key]
        if not isinstance(value, str) or not shape.fullmatch(value):
            self.fail(key, wanted)
        return value

    def choice(self, key: str, choices: Sequence[object]) -> Any:
        """One of these values with its type: `true` is not 1."""
        value = self.values[key]
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            self.fail(key, f"one of {', '.join(map(str, choices))}" if len(choices) > 1 else str(choices[0]))
        return value

    def time(self, key: str) -> datetime:
        """A time in UTC and whole seconds, in the form of `TIME`."""
        value = self.shaped(key, _TIME_SHAPE, "a time such as 2026-01-31T12:00:00Z")
        try:
            time = datetime.strptime(value, TIME).replace(tzinfo=UTC)
        except ValueError:
            self.fail(key, "a time that there is")
        if time.strftime(TIME) != value:
            self.fail(key, "a time after the year 1000")
        return time

    def items(self, key: str, read: Callable[[object, str], Any]) -> list[Any]:
        """A list that is not empty; `read` gets each item and its path (`requests[2]`)."""
        value = self.values[key]
        if not isinstance(value, list) or not value:
            self.fail(key, "a list, not empty")
        return [read(item, f"{self.place}{key}[{number}]") for number, item in enumerate(value)]

    def encoded(self, key: str) -> bytes | None:
        """Base64 in its canonical form, or null."""
        value = self.values[key]
        if value is None:
            return None
        try:
            decoded = b64decode(value, validate=True) if isinstance(value, str) else b""
        except ValueError:
            decoded = b""
        if not decoded or b64encode(decoded).decode() != value:
            self.fail(key, "base64 or null")
        return decoded


def certificate(value: object, place: str, or_else: str = "") -> x509.Certificate:
    """A certificate as one PEM block, all readable; `or_else` names another type that was allowed."""
    return _block(x509.load_pem_x509_certificate, value, place, "a certificate", or_else)


def _block(load: Callable[[bytes], _Signed], value: object, place: str, what: str, or_else: str = "") -> _Signed:
    wanted = f"{what} as one PEM block, and not a byte more{or_else}"
    try:
        if not isinstance(value, str):
            raise ValueError("no text")  # noqa: TRY004, TRY301 (like text that is no PEM)
        found = load(value.encode("ascii"))
    except (ValueError, x509.InvalidVersion) as e:
        raise BundleError(place, wanted, f"something else ({one_line(e)})") from None
    if found.public_bytes(Encoding.PEM).decode() != value:
        raise BundleError(place, wanted, "more than that, or other line breaks")
    if (damage := _damage(found)) is not None:
        raise BundleError(place, f"{what} that can be read", damage)
    return found


def _damage(thing: x509.Certificate | x509.CertificateSigningRequest) -> str | None:
    """Why a part of a CSR or certificate can't be read; all parts are read, since the library parses lazily."""
    try:
        _ = thing.subject, thing.public_key(), san_counts(thing), extended_key_usages(thing)
        if isinstance(thing, x509.Certificate):
            _ = thing.issuer, serial_hex(thing)
            _ = minute(thing.not_valid_before_utc), minute(thing.not_valid_after_utc)
    except (*UNREADABLE, OverflowError) as e:
        return f"{type(e).__name__}: {one_line(e)}"
    return None


# --- for people -------------------------------------------------------------------------------------------------------


def describe(bundle: Bundle, now: datetime, cas: Mapping[str, Sequence[x509.Certificate]]) -> str:
    """All that a person who approves or receives a bundle has to know; `cas` are the CAs by authority."""
    if isinstance(bundle, RequestBundle):
        lines, summary = list(_request_lines(bundle, now, cas)), _asked_in_short(bundle, cas)
    else:
        refused = sum(isinstance(answer, Refusal) for answer in bundle.answers.values())
        summary = f"{counted(len(bundle.answers) - refused, 'certificate')}, {refused} refused"
        lines = list(_answer_lines(bundle))
    return "\n".join([*lines, "", f"fingerprint  {short_fingerprint(bundle)}", f"in short     {summary}", ""])


def _asked_in_short(bundle: RequestBundle, cas: Mapping[str, Sequence[x509.Certificate]]) -> str:
    """A summary that highlights unusual parts: proofs, other CAs, changes, and the group with all rights."""
    every = bundle.requests
    proven = sum((proof_problem(request, bundle) or usages_problem(request)) is None for request in every)
    of_cas = [request for request in every if request.authority in cas]
    provable = sum(origin_problem(request, cas[request.authority]) is None for request in of_cas)
    origin = f"{counted(provable, 'replaced certificate')} {'is' if provable == 1 else 'are'} of these CAs"
    parts = [
        f"{proven} of {counted(len(every), 'proof')} {'holds' if len(every) == 1 else 'hold'}",
        origin if cas else "no CA is here to compare with",
    ]
    if changed := sum(any(_changes(request)) for request in every):
        parts.append(f"{changed} CHANGED")
    if masters := sum(MASTERS in subject_line(request.csr) for request in every):
        parts.append(f"{masters} in {MASTERS}")
    return ", ".join(parts)


def _request_lines(
    bundle: RequestBundle, now: datetime, cas: Mapping[str, Sequence[x509.Certificate]]
) -> Iterator[str]:
    yield f"request of node {bundle.node}, cluster {one_line(bundle.cluster)}, made {minute(bundle.created)}"
    yield f"batch {bundle.batch}, {counted(len(bundle.requests), 'certificate')}"
    for request in bundle.requests:
        usages = ", ".join(sorted(eku.label for eku in request.ekus))
        yield ""
        yield f"{request.name} by {request.authority}"
        yield f"  asks for    {subject_line(request.csr)}"
        yield f"  SANs        {sans_line(request.csr)}"
        yield f"  usages      {usages}, for {duration_text(request.validity)}"
        yield f"  key         {key_line(request.csr)}"
        yield f"  replaces    {_replaced(request, now)}"
        yield from _changes(request)
        proof = proof_problem(request, bundle) or usages_problem(request)
        yield f"  proof       {proof or 'holds: made with the key of the replaced certificate'}"
        yield f"  origin      {_origin(request, cas)}"


def _origin(request: BundledRequest, cas: Mapping[str, Sequence[x509.Certificate]]) -> str:
    if request.authority not in cas:
        return f"NOT CHECKED: no certificate of {request.authority} is here, so the proof may be another CA's"
    return origin_problem(request, cas[request.authority]) or "signed by this CA"


def _changes(request: BundledRequest) -> Iterator[str]:
    if request.replaces is None:
        return
    if subject_line(request.csr) != subject_line(request.replaces):
        yield f"  CHANGED     another subject than the replaced {subject_line(request.replaces)}"
    if sans_line(request.csr) != sans_line(request.replaces):
        yield f"  CHANGED     other SANs than the replaced {sans_line(request.replaces)}"


def _replaced(request: BundledRequest, now: datetime) -> str:
    old = request.replaces
    if old is None:
        return "nothing"
    end = old.not_valid_after_utc
    state = "expired" if end <= now else "valid until"
    return f"serial {serial_hex(old)}, SHA-256 {fingerprint(old)[:16]}…, {state} {minute(end)}"


def _answer_lines(bundle: AnswerBundle) -> Iterator[str]:
    yield f"answer to node {bundle.node}, cluster {one_line(bundle.cluster)}, signed {minute(bundle.signed)} by {one_line(bundle.signer)}"
    yield f"batch {bundle.batch}, to the request with the digest {bundle.request_digest[:16]}…"
    for name, answer in bundle.answers.items():
        yield ""
        yield name
        if isinstance(answer, Refusal):
            yield f"  refused     {one_line(answer.reason, LONGEST_TEXT)}"
            continue
        yield f"  certificate {subject_line(answer.leaf)}, serial {serial_hex(answer.leaf)}"
        yield f"  valid       {minute(answer.leaf.not_valid_before_utc)} to {minute(answer.leaf.not_valid_after_utc)}"
        yield f"  issuer      {issuer_line(answer.leaf)}, {counted(len(answer.intermediates), 'intermediate')}"
