"""
Bundles: what is carried between a node and a CA desk, as JSON (pure: bytes in, bytes out; no file, no clock).

A request bundle holds CSRs, an answer bundle certificates. Neither has a type that a private key would fit into: what is
not a CSR, a certificate, a signature, a name or a time has no place in it, and PEM text is taken only if it is one block
and not a byte more.

The digest finds accidents; who changes a bundle can make the digest anew. Against that stand the continuity proof, the
desk's policy, the short fingerprint that two people compare, and on the way back the node's own check of every answer.
"""

from __future__ import annotations

import json
import re
from base64 import b32encode, b64decode, b64encode
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any, NoReturn, cast

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes, PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from bridge.contract import Continuity, Issued, SignRequest
from bridge.errors import BridgeError
from bridge.pki.certificates import (
    UNREADABLE,
    attributes,
    extended_key_usages,
    fingerprint,
    name_text,
    pem,
    san_counts,
    serial_hex,
)
from bridge.pki.csr import algorithm_name
from bridge.pki.durations import duration_text
from bridge.pki.expiry import minute
from bridge.specs import AUTHORITIES, EKU, SPECS

REQUEST_SCHEMA = "ca-bridge/request-bundle"
ANSWER_SCHEMA = "ca-bridge/answer-bundle"
VERSION = 1

#: The requests of one node, a dozen with long chains, are a tenth of it.
MAX_BYTES = 1 << 20
LONGEST_TEXT = 2000
LONGEST_NAME = 253  #: As Kubernetes has it for a node's.
_LONGEST_VALIDITY = timedelta(days=36500)
_LONGEST_FOUND = 60

_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")  # it becomes part of file names
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_TIME_SHAPE = re.compile(r"[0-9]{4}(-[0-9]{2}){2}T[0-9]{2}(:[0-9]{2}){2}Z")
#: Signed with the old key, so never the beginning of anything else that such a key signs.
_PROOF_CONTEXT = b"ca-bridge continuity proof v1"


class BundleError(BridgeError):
    """A bundle is not as it should be."""

    hint = "carry it again, unchanged; if that does not help, somebody has changed it on the way"

    def __init__(self, field: str, wanted: str, found: str, *, hint: str | None = None) -> None:
        self.field = field  #: Such as `requests[2].csr`; empty for the bundle as a whole.
        self.wanted = wanted
        self.found = found
        super().__init__(f"{field or 'bundle'}: wanted {wanted}, found {found}", hint=hint)


class IncompleteBundleError(BundleError):
    """It is no JSON document, as a file that is still being copied isn't."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BundledRequest:
    """One certificate that is asked for."""

    name: str  #: kubeadm's, one of `SPECS`.
    authority: str
    ekus: frozenset[EKU]
    validity: timedelta  #: Wanted; whole seconds.
    csr: x509.CertificateSigningRequest
    replaces: x509.Certificate | None
    proof: bytes | None  #: See `sign_proof`.


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestBundle:
    """What one node asks for."""

    batch: str  #: 32 hex digits, another for each set of requests.
    node: str
    cluster: str
    created: datetime  #: UTC, whole seconds.
    requests: tuple[BundledRequest, ...]  #: Each name once.


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why somebody did not sign."""

    reason: str  #: One line for people.


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerBundle:
    """
    What a desk answers to one request bundle.

    By name; a desk that signs for some of the authorities leaves out the others' names.
    """

    request_digest: str  #: `digest` of the request bundle.
    batch: str
    node: str
    cluster: str
    signer: str  #: For people: which desk, which backend, who approved it.
    signed: datetime  #: UTC, whole seconds.
    answers: Mapping[str, Issued | Refusal]


Bundle = RequestBundle | AnswerBundle


# --- from and to what the rest of the program works with --------------------------------------------------------------


def bundle_of(requests: Sequence[SignRequest], created: datetime) -> RequestBundle:
    """
    Requests of one batch, each with its `continuity`.

    Raises:
        ValueError: None, or of several batches; a bug of the caller's.
    """
    batches = {(who.batch, who.node, who.cluster) for request in requests if (who := request.continuity) is not None}
    if len(batches) != 1 or any(request.continuity is None for request in requests):
        raise ValueError(f"wanted requests of one batch, found {len(batches)}")
    [(batch, node, cluster)] = batches
    return RequestBundle(
        batch=batch,
        node=node,
        cluster=cluster,
        created=created.astimezone(UTC).replace(microsecond=0),
        requests=tuple(
            BundledRequest(
                name=request.spec.name,
                authority=request.spec.authority.name,
                ekus=request.spec.ekus,
                validity=timedelta(seconds=int(request.validity.total_seconds())),
                csr=request.csr,
                replaces=request.replaces,
                proof=request.continuity.proof if request.continuity is not None else None,
            )
            for request in requests
        ),
    )


def sign_request(request: BundledRequest, bundle: RequestBundle) -> SignRequest:
    """What a backend is asked; EKUs and authority are those of our table, whatever the bundle says."""
    asked = SignRequest(
        spec=SPECS[request.name],
        csr_pem=request.csr.public_bytes(Encoding.PEM),
        validity=request.validity,
        replaces=request.replaces,
        continuity=Continuity(batch=bundle.batch, node=bundle.node, cluster=bundle.cluster, proof=request.proof),
    )
    vars(asked)["csr"] = request.csr  # parsed already, and so are its extensions
    return asked


def request_file_name(bundle: RequestBundle) -> str:
    """What its file is called where nobody chose a name; another for each bundle, so that none is written over another."""
    return file_names(bundle.node, digest(bundle))[0]


def file_names(node: str, request_digest: str, authorities: Collection[str] = tuple(AUTHORITIES)) -> tuple[str, str]:
    """Of the request, and of its answer by a desk with the CAs of these authorities."""
    stem = f"{node}-{request_digest[:32]}"
    return f"{stem}.request.json", f"{stem}{answer_suffix(authorities)}"


def answer_suffix(authorities: Collection[str]) -> str:
    """A desk with some of the CAs names them, so that the answers of two desks can lie side by side."""
    ours = [name for name in AUTHORITIES if name in authorities]
    return "".join(f".{name}" for name in ours if len(ours) < len(AUTHORITIES)) + ".answer.json"


# --- writing ----------------------------------------------------------------------------------------------------------


def dumps(bundle: Bundle) -> bytes:
    """
    The bundle as a file; the same bundle gives the same bytes.

    Raises:
        BundleError: A value in it is none that a bundle may have, such as a node's name with a line break.
    """
    document = _document(bundle)
    _assert_readable(document)  # what one side can't read, the other does not write
    return json.dumps({**document, "digest": _digest(document)}, indent=1).encode() + b"\n"


def _assert_readable(document: Mapping[str, Any]) -> None:
    """What types leave open: texts, numbers, names."""
    fields = _Fields(document, "")
    _batch(fields)
    _node(fields)
    fields.text("cluster", LONGEST_NAME)
    key = "requests" if document["schema"] == REQUEST_SCHEMA else "answers"
    if key == "answers":
        fields.text("signer")
        fields.shaped("requestDigest", _DIGEST, "64 hex digits")
    for entry in fields.items(key, lambda value, place: _Fields(cast(dict[str, Any], value), f"{place}.")):
        entry.choice("name", list(SPECS))
        if key == "requests":
            entry.choice("authority", list(AUTHORITIES))
            _ekus(entry)
            _validity(entry)
        elif "refusal" in entry.values:
            entry.text("refusal")
    _assert_once(fields, key, [entry["name"] for entry in document[key]])


def digest(bundle: Bundle) -> str:
    """SHA-256 (hex) over its values; white space between them does not count."""
    return _digest(_document(bundle))


def short_fingerprint(bundle: Bundle) -> str:
    """
    The first 100 bits of the digest, to be read out over the phone: four groups of five digits and letters.

    Crockford's alphabet, without I, L, O and U, so that nothing is heard or written for something else.
    """
    return short(digest(bundle))


def short(digest_hex: str) -> str:
    """The same, from the digest alone."""
    letters = b32encode(bytes.fromhex(digest_hex)).decode().translate(_CROCKFORD)
    return "-".join(letters[start : start + 5] for start in range(0, 20, 5))


_CROCKFORD = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", "0123456789ABCDEFGHJKMNPQRSTVWXYZ")


def _digest(document: Mapping[str, Any]) -> str:
    return sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _document(bundle: Bundle) -> dict[str, Any]:
    if isinstance(bundle, RequestBundle):
        return {
            "schema": REQUEST_SCHEMA,
            "version": VERSION,
            "batch": bundle.batch,
            "node": bundle.node,
            "cluster": bundle.cluster,
            "created": bundle.created.strftime(_TIME),
            "requests": [_request_document(request) for request in bundle.requests],
        }
    return {
        "schema": ANSWER_SCHEMA,
        "version": VERSION,
        "requestDigest": bundle.request_digest,
        "batch": bundle.batch,
        "node": bundle.node,
        "cluster": bundle.cluster,
        "signer": bundle.signer,
        "signed": bundle.signed.strftime(_TIME),
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


# --- reading ----------------------------------------------------------------------------------------------------------


def loads(data: bytes) -> Bundle:
    """
    A bundle of either kind.

    Raises:
        IncompleteBundleError: It is no JSON document.
        BundleError: It is another one, or has been changed.
    """
    document = _parse(data)
    schema = document.get("schema")
    if schema == REQUEST_SCHEMA:
        return _read_request_bundle(document)
    if schema == ANSWER_SCHEMA:
        return _read_answer_bundle(document)
    raise BundleError("schema", f"{REQUEST_SCHEMA} or {ANSWER_SCHEMA}", _found(schema))


def loads_request(data: bytes) -> RequestBundle:
    """
    A request bundle.

    Raises:
        BundleError: As `loads`; also for an answer bundle.
    """
    bundle = loads(data)
    if not isinstance(bundle, RequestBundle):
        raise BundleError(
            "schema", REQUEST_SCHEMA, ANSWER_SCHEMA, hint="this is the answer, which goes back to the node"
        )
    return bundle


def loads_answer(data: bytes) -> AnswerBundle:
    """
    An answer bundle. Whether the answers are right is not checked here: see `bridge.pki.verify`.

    Raises:
        BundleError: As `loads`; also for a request bundle.
    """
    bundle = loads(data)
    if not isinstance(bundle, AnswerBundle):
        raise BundleError(
            "schema", ANSWER_SCHEMA, REQUEST_SCHEMA, hint="this is the request, which goes to the CA desk"
        )
    return bundle


def _parse(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_BYTES:
        raise BundleError("", f"at most {MAX_BYTES} bytes", f"{len(data)}")
    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise BundleError("", "a bundle", "nesting without end") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        reason = "bytes that are no UTF-8" if isinstance(e, UnicodeDecodeError) else f"none: {e.msg} at byte {e.pos}"
        raise IncompleteBundleError("", "one JSON document", reason, hint="is it still being copied?") from None
    except ValueError:  # a number of thousands of digits
        raise BundleError("", "a bundle", "a number without end") from None
    if not isinstance(document, dict):
        raise BundleError("", "a JSON object", _found(document))
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are there once: of two values, two readers may each take another."""
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BundleError(_found(twice), "each key once", "it twice")
    return values


def _no_constant(text: str) -> NoReturn:
    raise BundleError("", "numbers", text)


@dataclass(frozen=True, slots=True)
class _Fields:
    """The keys of one object: exactly these, each of its kind."""

    values: Mapping[str, Any]
    place: str  #: Of the object in the bundle, such as `requests[2].`; empty for the whole.

    @classmethod
    def of(cls, value: object, place: str, keys: Sequence[str]) -> _Fields:
        if not isinstance(value, dict):
            raise BundleError(place.rstrip("."), "an object", _found(value))
        for key in value:
            if key not in keys:
                raise BundleError(f"{place}{_plain(key)}", f"one of {', '.join(keys)}", _found(key))
        for key in keys:
            if key not in value:
                raise BundleError(f"{place}{key}", "a value", "nothing")
        return cls(value, place)

    def fail(self, key: str, wanted: str, found: object) -> NoReturn:
        raise BundleError(f"{self.place}{key}", wanted, found if isinstance(found, _Words) else _found(found))

    def text(self, key: str, longest: int = LONGEST_TEXT) -> str:
        """Printable: it is shown on terminals."""
        value = self.values[key]
        if not isinstance(value, str) or not value.strip():
            self.fail(key, "a text", value)
        if len(value) > longest:
            self.fail(key, f"at most {longest} characters", _Words(f"{len(value)}"))
        if not value.isprintable():
            self.fail(key, "a text without control characters", value)
        return value

    def shaped(self, key: str, shape: re.Pattern[str], wanted: str) -> str:
        value = self.values[key]
        if not isinstance(value, str) or not shape.fullmatch(value):
            self.fail(key, wanted, value)
        return value

    def choice(self, key: str, choices: Sequence[object]) -> Any:
        value = self.values[key]
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            self.fail(key, f"one of {', '.join(map(str, choices))}" if len(choices) > 1 else str(choices[0]), value)
        return value

    def time(self, key: str) -> datetime:
        value = self.shaped(key, _TIME_SHAPE, "a time such as 2026-01-31T12:00:00Z")
        try:
            time = datetime.strptime(value, _TIME).replace(tzinfo=UTC)
        except ValueError:
            self.fail(key, "a time that there is", value)
        if time.strftime(_TIME) != value:
            self.fail(key, "a time after the year 1000", value)
        return time

    def items(self, key: str, read: Callable[[object, str], Any]) -> list[Any]:
        value = self.values[key]
        if not isinstance(value, list) or not value:
            self.fail(key, "a list, not empty", value)
        return [read(item, f"{self.place}{key}[{number}]") for number, item in enumerate(value)]

    def encoded(self, key: str) -> bytes | None:
        """Base64 in its one plain form, or null."""
        value = self.values[key]
        if value is None:
            return None
        try:
            decoded = b64decode(value, validate=True) if isinstance(value, str) else b""
        except ValueError:
            decoded = b""
        if not decoded or b64encode(decoded).decode() != value:
            self.fail(key, "base64 or null", value)
        return decoded


class _Words(str):
    """What was found, in our words; to be shown as it is."""

    __slots__ = ()


def _read_request_bundle(document: Mapping[str, Any]) -> RequestBundle:
    fields = _Fields.of(
        document, "", ("schema", "version", "batch", "node", "cluster", "created", "requests", "digest")
    )
    fields.choice("version", [VERSION])
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
    fields = _Fields.of(value, f"{place}.", keys)
    return BundledRequest(
        name=fields.choice("name", list(SPECS)),
        authority=fields.choice("authority", list(AUTHORITIES)),
        ekus=_ekus(fields),
        validity=_validity(fields),
        csr=_csr(fields),
        replaces=_certificate(fields.values["replaces"], f"{place}.replaces", " or null")
        if fields.values["replaces"] is not None
        else None,
        proof=fields.encoded("proof"),
    )


def _read_answer_bundle(document: Mapping[str, Any]) -> AnswerBundle:
    keys = ("schema", "version", "requestDigest", "batch", "node", "cluster", "signer", "signed", "answers", "digest")
    fields = _Fields.of(document, "", keys)
    fields.choice("version", [VERSION])
    answers = fields.items("answers", _read_answer)
    _assert_once(fields, "answers", [name for name, _ in answers])
    bundle = AnswerBundle(
        request_digest=fields.shaped("requestDigest", _DIGEST, "64 hex digits"),
        batch=_batch(fields),
        node=_node(fields),
        cluster=fields.text("cluster", LONGEST_NAME),
        signer=fields.text("signer"),
        signed=fields.time("signed"),
        answers=dict(answers),
    )
    _assert_digest(fields)
    return bundle


def _read_answer(value: object, place: str) -> tuple[str, Issued | Refusal]:
    is_refusal = isinstance(value, dict) and "refusal" in value
    fields = _Fields.of(value, f"{place}.", ("name", "refusal" if is_refusal else "chain"))
    name = fields.choice("name", list(SPECS))
    if is_refusal:
        return name, Refusal(reason=fields.text("refusal"))
    leaf, *intermediates = fields.items("chain", _certificate)
    return name, Issued(leaf=leaf, intermediates=tuple(intermediates))


_DIGEST = re.compile(r"[0-9a-f]{64}")
_BATCH = re.compile(r"[0-9a-f]{32}")


def _batch(fields: _Fields) -> str:
    return fields.shaped("batch", _BATCH, "32 hex digits")


def _node(fields: _Fields) -> str:
    return fields.shaped("node", _NODE, "a node's name (letters, digits, '.', '_' and '-')")


def _ekus(fields: _Fields) -> frozenset[EKU]:
    labels = {eku.label: eku for eku in EKU}
    value = fields.values["ekus"]
    if not isinstance(value, list) or not value or not all(isinstance(one, str) and one in labels for one in value):
        fields.fail("ekus", f"a list of {' and '.join(sorted(labels))}", value)
    if value != sorted(set(value)):
        fields.fail("ekus", "each once, in alphabetical order", value)
    return frozenset(labels[label] for label in value)


def _validity(fields: _Fields) -> timedelta:
    value = fields.values["validitySeconds"]
    longest = int(_LONGEST_VALIDITY.total_seconds())
    if type(value) is not int or not 0 < value <= longest:
        fields.fail("validitySeconds", f"a whole number of seconds, at most {longest}", value)
    return timedelta(seconds=value)


def _csr(fields: _Fields) -> x509.CertificateSigningRequest:
    value, wanted = fields.values["csr"], "a CSR as one PEM block, and not a byte more"
    try:
        csr = x509.load_pem_x509_csr(_ascii(value))
    except (ValueError, x509.InvalidVersion) as e:
        fields.fail("csr", wanted, _Words(f"something else ({_plain(str(e))})"))
    if csr.public_bytes(Encoding.PEM).decode() != value:
        fields.fail("csr", wanted, _Words("more than that, or other line breaks"))
    return csr


def _certificate(value: object, place: str, or_else: str = "") -> x509.Certificate:
    wanted = f"a certificate as one PEM block, and not a byte more{or_else}"
    try:
        certificate = x509.load_pem_x509_certificate(_ascii(value))
    except (ValueError, x509.InvalidVersion) as e:
        raise BundleError(place, wanted, f"something else ({_plain(str(e))})") from None
    if pem(certificate).decode() != value:
        raise BundleError(place, wanted, "more than that, or other line breaks")
    return certificate


def _ascii(value: object) -> bytes:
    if not isinstance(value, str):
        raise ValueError("no text")  # noqa: TRY004 (like what is no PEM)
    return value.encode("ascii")


def _assert_once(fields: _Fields, key: str, names: Sequence[str]) -> None:
    for number, name in enumerate(names):
        if name in names[:number]:
            raise BundleError(f"{fields.place}{key}[{number}].name", "each name once", f"{name} again")


def _assert_digest(fields: _Fields) -> None:
    """Over the values as they stand there: they were read, and so are as `dumps` writes them."""
    given = fields.shaped("digest", _DIGEST, "64 hex digits")
    wanted = _digest({key: value for key, value in fields.values.items() if key != "digest"})
    if given != wanted:
        raise BundleError("digest", f"{wanted}, which is that of what it holds", given)


def _found(value: object) -> str:
    """Short, and nothing that a terminal would obey."""
    text = repr(value)
    return text if len(text) <= _LONGEST_FOUND else f"{text[:_LONGEST_FOUND]}…"


def _plain(text: str) -> str:
    """One printable line."""
    line = "".join(character if character.isprintable() else " " for character in text)
    return line if len(line) <= LONGEST_TEXT else f"{line[: LONGEST_TEXT - 1]}…"


def refusal(reason: str) -> Refusal:
    """From any text."""
    return Refusal(reason=_plain(reason.strip()) or "no reason was given")


# --- the continuity proof ---------------------------------------------------------------------------------------------


def sign_proof(
    old_key: PrivateKeyTypes, csr: x509.CertificateSigningRequest, *, name: str, batch: str, node: str, cluster: str
) -> bytes:
    """
    Prove with the key of the certificate that is replaced that its holder wants this CSR signed.

    RSA-PSS, ECDSA or Ed25519, the first two with SHA-256. What is signed begins with words of its own, has each
    part with its length before it, and names the batch, so that a proof is good for one request of one bundle.

    Raises:
        ValueError: A key of another type.
    """
    message = _proof_message(csr, name=name, batch=batch, node=node, cluster=cluster)
    if isinstance(old_key, rsa.RSAPrivateKey):
        return old_key.sign(message, _PSS, hashes.SHA256())
    if isinstance(old_key, ec.EllipticCurvePrivateKey):
        return old_key.sign(message, ec.ECDSA(hashes.SHA256()))
    if isinstance(old_key, ed25519.Ed25519PrivateKey):
        return old_key.sign(message)
    raise ValueError(f"wanted an RSA, ECDSA or Ed25519 key, found {type(old_key).__name__}")


def proof_problem(request: BundledRequest, bundle: RequestBundle) -> str | None:
    """
    Why the continuity proof does not hold; None when it does.

    It says that whoever made the bundle has the key of `replaces`, and that the new certificate is for the same CN:
    one of another name, be it by the same CA, proves nothing. Whether it is by the cluster's CA is `origin_problem`,
    whether it has the usages `usages_problem`, and who may have the new one is the policy's.
    """
    if request.replaces is None:
        return "wanted the certificate that is replaced, found none"
    if request.proof is None:
        return "wanted a continuity proof, found none"
    message = _proof_message(
        request.csr, name=request.name, batch=bundle.batch, node=bundle.node, cluster=bundle.cluster
    )
    try:
        key = request.replaces.public_key()
    except (ValueError, UnsupportedAlgorithm) as e:
        return f"wanted a public key in the replaced certificate, found one that can't be read: {_plain(str(e))}"
    try:
        is_checked = _check_signature(key, request.proof, message)
    except InvalidSignature:
        return "wanted a continuity proof by the replaced certificate's key over this CSR, found another signature"
    if not is_checked:
        return f"wanted an RSA, ECDSA or Ed25519 key to prove with, found {algorithm_name(key)}"
    return _other_holder(request.csr, request.replaces)


def _other_holder(csr: x509.CertificateSigningRequest, replaces: x509.Certificate) -> str | None:
    """Groups may have changed since, and what else the policy lets; the CN says who it is."""
    try:
        is_same = _who(csr) == _who(replaces)
    except UNREADABLE as e:
        return f"wanted one by a certificate whose subject can be read, found: {_plain(str(e))}"
    return None if is_same else f"wanted one by the certificate of {_name(csr)}, found one by that of {_name(replaces)}"


def _who(subject: x509.Certificate | x509.CertificateSigningRequest) -> list[tuple[str, str]]:
    """The CN; the whole subject where there is none."""
    parts = attributes(subject.subject)
    return [part for part in parts if part[0] == NameOID.COMMON_NAME.dotted_string] or parts


def _check_signature(key: CertificatePublicKeyTypes, signature: bytes, message: bytes) -> bool:
    """False: of a type that proves nothing."""
    if isinstance(key, rsa.RSAPublicKey):
        key.verify(signature, message, _PSS, hashes.SHA256())
    elif isinstance(key, ec.EllipticCurvePublicKey):
        key.verify(signature, message, ec.ECDSA(hashes.SHA256()))
    elif isinstance(key, ed25519.Ed25519PublicKey):
        key.verify(signature, message)
    else:
        return False
    return True


_PSS = padding.PSS(padding.MGF1(hashes.SHA256()), hashes.SHA256.digest_size)


def _proof_message(csr: x509.CertificateSigningRequest, *, name: str, batch: str, node: str, cluster: str) -> bytes:
    csr_digest = sha256(csr.public_bytes(Encoding.DER)).digest()
    parts = (_PROOF_CONTEXT, batch.encode(), node.encode(), cluster.encode(), name.encode(), csr_digest)
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def usages_problem(request: BundledRequest) -> str | None:
    """Why the replaced certificate does not prove a right to these usages; one without EKUs is good for any."""
    if request.replaces is None:
        return "wanted the certificate that is replaced, found none"
    try:
        found = extended_key_usages(request.replaces)
    except UNREADABLE as e:
        return f"wanted usages in the replaced certificate, found some that can't be read: {_plain(str(e))}"
    lacking = sorted(eku.label for eku in SPECS[request.name].ekus if found is not None and eku.value not in found)
    return (
        f"wanted one by a certificate with the same usages, found one without {', '.join(lacking)}" if lacking else None
    )


def origin_problem(request: BundledRequest, cas: Sequence[x509.Certificate]) -> str | None:
    """
    Why the replaced certificate is none of this CA's; None when it is.

    Issuer name and signature alone; it may have expired.

    Args:
        request: The request.
        cas: Certificates of the authority: that of the cluster, and those that sign for it.
    """
    if request.replaces is None:
        return "wanted the certificate that is replaced, found none"
    if any(_is_issued_by(request.replaces, ca) for ca in cas):
        return None
    wanted = (
        " or ".join(dict.fromkeys(name_text(ca.subject) for ca in cas)) or f"a CA certificate of {request.authority}"
    )
    return (
        f"wanted a replaced certificate that {wanted} signed, found "
        f"{_name(request.replaces)} by {_issuer(request.replaces)}, not signed by it"
    )


def _is_issued_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


# --- for people -------------------------------------------------------------------------------------------------------


def describe(bundle: Bundle, now: datetime, cas: Mapping[str, Sequence[x509.Certificate]] | None = None) -> str:
    """
    What a person has to know who approves a bundle, or gets one back.

    Args:
        bundle: Of either kind.
        now: For "expired".
        cas: The CAs' certificates by authority, with which the origin of the replaced certificates can be told.
    """
    lines = list(_request_lines(bundle, now, cas) if isinstance(bundle, RequestBundle) else _answer_lines(bundle))
    return "\n".join([*lines, "", f"fingerprint  {short_fingerprint(bundle)}", ""])


def _request_lines(
    bundle: RequestBundle, now: datetime, cas: Mapping[str, Sequence[x509.Certificate]] | None
) -> Iterator[str]:
    yield f"request of node {bundle.node}, cluster {bundle.cluster}, made {minute(bundle.created)}"
    yield f"batch {bundle.batch}, {count(len(bundle.requests), 'certificate')}"
    for request in bundle.requests:
        usages = ", ".join(sorted(eku.label for eku in request.ekus))
        yield ""
        yield f"{request.name} by {request.authority}"
        yield f"  asks for    {_name(request.csr)}"
        yield f"  SANs        {_sans(request.csr)}"
        yield f"  usages      {usages}, for {duration_text(request.validity)}"
        yield f"  key         {_key(request.csr)}"
        yield f"  replaces    {_replaced(request, now)}"
        yield from _changes(request)
        proof = proof_problem(request, bundle) or usages_problem(request)
        yield f"  proof       {proof or 'holds: made with the key of the replaced certificate'}"
        if cas is not None:
            yield f"  origin      {origin_problem(request, cas.get(request.authority, ())) or 'signed by this CA'}"


def _changes(request: BundledRequest) -> Iterator[str]:
    """What makes this more than a renewal."""
    if request.replaces is None:
        return
    if _name(request.csr) != _name(request.replaces):
        yield f"  CHANGED     another subject than the replaced {_name(request.replaces)}"
    if _sans(request.csr) != _sans(request.replaces):
        yield f"  CHANGED     other SANs than the replaced {_sans(request.replaces)}"


def _replaced(request: BundledRequest, now: datetime) -> str:
    old = request.replaces
    if old is None:
        return "nothing"
    end = old.not_valid_after_utc
    state = "expired" if end <= now else "valid until"
    return f"serial {serial_hex(old)}, SHA-256 {fingerprint(old)[:16]}…, {state} {minute(end)}"


def _answer_lines(bundle: AnswerBundle) -> Iterator[str]:
    yield f"answer to node {bundle.node}, cluster {bundle.cluster}, signed {minute(bundle.signed)} by {bundle.signer}"
    yield f"batch {bundle.batch}, to the request with the digest {bundle.request_digest[:16]}…"
    for name, answer in bundle.answers.items():
        yield ""
        yield name
        if isinstance(answer, Refusal):
            yield f"  refused     {answer.reason}"
            continue
        yield f"  certificate {_name(answer.leaf)}, serial {serial_hex(answer.leaf)}"
        yield f"  valid       {minute(answer.leaf.not_valid_before_utc)} to {minute(answer.leaf.not_valid_after_utc)}"
        yield f"  issuer      {_issuer(answer.leaf)}, {count(len(answer.intermediates), 'intermediate')}"


def count(number: int, what: str) -> str:
    """Such as `1 certificate`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def _name(subject: x509.Certificate | x509.CertificateSigningRequest) -> str:
    try:
        return _plain(name_text(subject.subject)) or "(no subject)"
    except ValueError as e:
        return f"(a subject that can't be read: {_plain(str(e))})"


def _issuer(certificate: x509.Certificate) -> str:
    try:
        return _plain(name_text(certificate.issuer))
    except ValueError as e:
        return f"(an issuer that can't be read: {_plain(str(e))})"


def _sans(subject: x509.Certificate | x509.CertificateSigningRequest) -> str:
    try:
        return ", ".join(_plain(f"{kind}:{value}") for kind, value in sorted(san_counts(subject).elements())) or "none"
    except ValueError as e:
        return f"(extensions that can't be read: {_plain(str(e))})"


def _key(csr: x509.CertificateSigningRequest) -> str:
    try:
        return algorithm_name(csr.public_key())
    except (ValueError, UnsupportedAlgorithm) as e:
        return f"(one that can't be read: {_plain(str(e))})"
