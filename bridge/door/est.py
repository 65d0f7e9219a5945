"""
EST (RFC 7030, RFC 8951) at the door: `cacerts`, `csrattrs`, `simpleenroll` and `simplereenroll`.

The URL's label selects the certificate. The requester is the TLS client certificate, or an enrolment whose one-time
secret is the HTTP Basic password; the CSR itself proves only that its sender has the new key. The request becomes a
bundle of one request: the database stores it, the desk judges it, and a signing round answers it, as with our own
requests. Until the answer is there, the client gets 202; it fetches the answer by sending the same request again.

TLS 1.3 has no `tls-unique`, with which RFC 7030 §3.5 links a CSR to its connection. The door does not ask for that
link, and refuses a CSR with a challengePassword, because it asks for more than SANs.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from http import HTTPStatus

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, pkcs7

from bridge.desk.est_rules import DEFAULT, Asker, EstRules, node_of
from bridge.desk.workers import ReadBundle
from bridge.door import enrolments
from bridge.door.app import Door, Environ, Reply, TurnedAwayError, body_of, kind_of
from bridge.door.enrolments import Enrolment
from bridge.door.https import PEER
from bridge.door.signing import asker_json, origin_problem
from bridge.door.store import EnrolmentError, Kept
from bridge.pki import der, node_proofs
from bridge.pki.bundle import BundledRequest, BundleError, Refusal, RequestBundle
from bridge.pki.bundle_format import dumps, loads_answer, loads_digested
from bridge.pki.certificates import UNREADABLE, attributes, csr_fingerprint, fingerprint, san_counts
from bridge.specs import CertificateSpec
from bridge.words import one_line

log = logging.getLogger("ca-bridge")

ROOT = "/.well-known/est/"
_PATH = re.compile(r"/\.well-known/est/(?:([a-z0-9.-]{1,63})/)?(cacerts|csrattrs|simpleenroll|simplereenroll)")
_CERTIFICATES = "application/pkcs7-mime; smime-type=certs-only"
#: Limit of a body in base64; a CSR with an RSA-4096 key and a hundred names takes a tenth of it.
_MOST_BYTES = 64 << 10
#: How long a client's request waits for its answer before it gets 202.
_HOLD = timedelta(seconds=8)
#: Retry-After of a new request, and of an older one.
_SOON_SECONDS, _LATER_SECONDS = 2, 30


@dataclass(frozen=True, slots=True, kw_only=True)
class _Label:
    name: str
    rules: EstRules
    spec: CertificateSpec  #: The label's certificate.


class Est:
    """The EST operations; thread-safe."""

    def __init__(self, door: Door) -> None:
        self._door = door

    def __call__(self, environ: Environ) -> Reply:
        """Answer a request below `ROOT`."""
        match = _PATH.fullmatch(environ["PATH_INFO"])
        if match is None:
            raise _away(HTTPStatus.NOT_FOUND, "this door has no such EST operation")
        label, operation = self._label(match[1] or DEFAULT), match[2]
        method = "GET" if operation in ("cacerts", "csrattrs") else "POST"
        if environ["REQUEST_METHOD"] != method:
            raise _away(HTTPStatus.METHOD_NOT_ALLOWED, f"this operation takes {method} alone", allow=method)
        if operation == "cacerts":
            return _encoded(certs_only(self._chain(label)), _CERTIFICATES)
        if operation == "csrattrs":
            return _encoded(csr_attributes(self._door.signing.policy.keys(label.spec.name)), "application/csrattrs")
        return self._enrol(environ, label, renews=operation == "simplereenroll")

    def _label(self, name: str) -> _Label:
        policy = self._door.signing.policy
        rules = policy.est.get(name)
        spec = policy.spec_of(rules.certificate or name) if rules is not None else None
        if rules is None or spec is None:
            raise _away(HTTPStatus.NOT_FOUND, "this door has no such label")
        return _Label(name=name, rules=rules, spec=spec)

    def _chain(self, label: _Label) -> tuple[x509.Certificate, ...]:
        authority = label.spec.authority.name
        if not (chain := self._door.signing.chains.get(authority, ())):
            raise _later(f"the CA of {authority} was not reached yet")
        return chain

    # --- enrolments ---------------------------------------------------------------------------------------------------

    def _enrol(self, environ: Environ, label: _Label, *, renews: bool) -> Reply:
        if self._door.ending.is_set():
            raise _later("this door is shutting down")
        self._chain(label)
        used, shown = None, environ.get(PEER)
        if not renews and label.rules.secrets and (shown is None or "HTTP_AUTHORIZATION" in environ):
            used = self._enrolment(environ)
            asker = Asker(label=label.name, certificate=None, renews=False, received=self._door.now())
            node = used.node
        elif shown is not None:
            asker, node = self._client(shown, label, renews=renews)
        else:
            wanted = "the certificate that is replaced" if renews else "a client certificate"
            raise _away(HTTPStatus.FORBIDDEN, f"{wanted} is missing in the TLS handshake")
        csr = _csr(environ)
        again = _repeat_digest(asker, used, csr)
        kept = self._door.memory.find(again, "again")
        if kept is None:
            kept = self._receive(self._bundle(label, asker, node, csr, again), asker, used, again, environ)
        return self._answered(kept)

    def _enrolment(self, environ: Environ) -> Enrolment:
        """Return the enrolment by HTTP Basic (RFC 7617): the user is its node, the password its secret."""
        challenge = 'Basic realm="ca-bridge", charset="UTF-8"'
        scheme, _, text = str(environ.get("HTTP_AUTHORIZATION", "")).partition(" ")
        try:
            user, _, secret = base64.b64decode(text.strip(), validate=True).decode().partition(":")
        except ValueError:
            scheme = user = secret = ""
        secret_hash = node_proofs.secret_hash(secret) if scheme.lower() == "basic" else None
        found = enrolments.find(self._door.memory, secret_hash) if secret_hash is not None else None
        if found is None or found.node != user:
            wanted = "a node's name and the secret that `ca-bridge enroll` printed for it"
            raise _away(HTTPStatus.UNAUTHORIZED, f"{wanted} are missing, or wrong", www_authenticate=challenge)
        return found

    def _client(self, shown: bytes, label: _Label, *, renews: bool) -> tuple[Asker, str]:
        """Return the client that presented this certificate, and the node of its request."""
        try:
            certificate = x509.load_der_x509_certificate(shown)
            node = node_of(certificate.subject, label.rules.clients)
        except UNREADABLE:
            raise _away(HTTPStatus.FORBIDDEN, "wanted a client certificate that can be read") from None
        asker = Asker(label=label.name, certificate=certificate, renews=renews, received=self._door.now())
        if not node:
            raise _away(HTTPStatus.FORBIDDEN, "wanted a client that this label is for, found another one")
        return asker, node

    def _bundle(
        self, label: _Label, asker: Asker, node: str, csr: x509.CertificateSigningRequest, again: str
    ) -> ReadBundle:
        """Return the request as a bundle for the desk, with the names that the policy and TLS give."""
        spec, policy = label.spec, self._door.signing.policy
        request = BundledRequest(
            name=spec.name,
            authority=spec.authority.name,
            ekus=spec.ekus,
            validity=label.rules.validity or policy.longest_validity(spec.name),
            csr=csr,
            replaces=asker.certificate if asker.renews else None,
            proof=None,
        )
        created = asker.received.replace(microsecond=0)
        bundle = RequestBundle(
            batch=again[:32], node=node, cluster=label.rules.cluster, created=created, requests=(request,)
        )
        try:
            bundle, request_digest = loads_digested(dumps(bundle))  # what the next round will read
        except BundleError as e:
            raise _away(HTTPStatus.BAD_REQUEST, str(e)) from None
        return ReadBundle(bundle=bundle, digest=request_digest)

    def _receive(self, read: ReadBundle, asker: Asker, used: Enrolment | None, again: str, environ: Environ) -> Kept:
        """Store a request if it may be signed, so that a client without a proof can't fill the disk."""
        bundle, peer, short = read.bundle, environ["REMOTE_ADDR"], read.digest[:16]
        [request], about = bundle.requests, {"request": short, "requester": peer}
        if reason := self._reason(read, asker, used):
            text = "request of %s for %s, %s, from %s is refused: %s"
            log.warning(text, bundle.node, request.name, asker.text, peer, one_line(reason, 2000), extra=about)
            raise _away(HTTPStatus.FORBIDDEN, reason)
        self._door.assert_room(peer, is_judged=True)
        who = {"origin": asker_json(asker), "again": again, "enrolment": used.id if used is not None else None}
        try:
            request_id = self._door.keep(environ, dumps(bundle), read, asker.received, named=True, **who)
        except EnrolmentError as e:  # another request used the secret first
            raise _away(HTTPStatus.FORBIDDEN, str(e)) from None
        log.info("request %s of %s was received, %s", short, bundle.node, asker.text, extra=about)
        if (kept := self._door.memory.find(request_id)) is None:
            raise _later("the request was received, and then removed")
        return kept

    def _reason(self, read: ReadBundle, asker: Asker, used: Enrolment | None) -> str:
        """Return why a request must not be stored; empty: it may."""
        bundle, signing = read.bundle, self._door.signing
        [request] = bundle.requests
        if used is not None:
            try:
                used.assert_for(bundle.node, bundle.cluster, asker.received)
            except EnrolmentError as e:
                return str(e)
        vouched = [request.name] if used is None else used.vouches(bundle)
        reason = origin_problem(asker, request, bundle.node, signing.policy, signing.cas)
        judged = signing.judged(read, frozenset(vouched), held=asker.renews)
        return reason or signing.refused(judged, signing.identity(judged, is_named=True), vouched)

    # --- answers ------------------------------------------------------------------------------------------------------

    def _answered(self, kept: Kept) -> Reply:
        """Answer with the certificate, the refusal, or 202 if neither comes in time."""
        kept = self._door.awaited(kept, _HOLD)
        if kept.state != "answered":
            is_new = self._door.now() - kept.received < timedelta(seconds=_LATER_SECONDS)
            whom = " for people" if kept.state == "undecided" else ""
            text = f"request {kept.digest[:16]} waits{whom}; send it again"
            return _text(HTTPStatus.ACCEPTED, text, retry_after=str(_SOON_SECONDS if is_new else _LATER_SECONDS))
        answer = next(iter(loads_answer(kept.answer).answers.values())) if kept.answer is not None else None
        if isinstance(answer, Refusal):
            return _text(HTTPStatus.FORBIDDEN, answer.reason)
        if answer is None or answer.leaf.not_valid_after_utc < self._door.now():
            what = "answer is too old (serve.keep)" if answer is None else "certificate has ended"
            text = f"wanted a CSR that was not answered before, found one whose {what}: make a new CSR"
            return _text(HTTPStatus.FORBIDDEN, text)
        return _encoded(certs_only([answer.leaf]), _CERTIFICATES)


def _csr(environ: Environ) -> x509.CertificateSigningRequest:
    if kind_of(environ).lower() != "application/pkcs10":
        raise _away(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "wanted Content-Type: application/pkcs10, found another one")
    if environ.get("HTTP_CONTENT_ENCODING", "identity") != "identity":
        raise _away(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "wanted no Content-Encoding, found one")
    body = body_of(environ)
    if len(body) > _MOST_BYTES:
        raise _away(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"wanted at most {_MOST_BYTES} bytes, found {len(body)}")
    try:
        return csr_of(body)
    except ValueError as e:
        raise _away(HTTPStatus.BAD_REQUEST, str(e)) from None


def _repeat_digest(asker: Asker, used: Enrolment | None, csr: x509.CertificateSigningRequest) -> str:
    """Return a hash of label, operation, requester and CSR, by which the door recognizes a repeated request."""
    who = fingerprint(asker.certificate) if asker.certificate is not None else f"enrolment {used and used.id}"
    return sha256(json.dumps([asker.label, asker.renews, who, csr_fingerprint(csr)]).encode()).hexdigest()


def _encoded(body: bytes, kind: str) -> Reply:
    """Return a reply in base64, with the header that RFC 8951 removed but older clients require."""
    return Reply(status=HTTPStatus.OK, body=body, kind=kind, headers={"Content-Transfer-Encoding": "base64"})


def _text(status: HTTPStatus, text: str, **headers: str) -> Reply:
    """Return a reply with a sentence for people (RFC 7030 §4.2.3)."""
    body = one_line(text, 2000).encode() + b"\n"
    return Reply(status=status, body=body, kind="text/plain; charset=utf-8", headers=headers)


def _away(status: HTTPStatus, text: str, **headers: str) -> TurnedAwayError:
    return TurnedAwayError(_text(status, text, **headers))


def _later(text: str) -> TurnedAwayError:
    return _away(HTTPStatus.SERVICE_UNAVAILABLE, text, retry_after=str(_LATER_SECONDS))


# --- the bodies (RFC 7030, RFC 8951) ----------------------------------------------------------------------------------

_RSA, _EC = bytes.fromhex("06092a864886f70d010101"), bytes.fromhex("06072a8648ce3d0201")
#: Key algorithms as CSR attributes: the type's OID and the value, both in DER.
_KEYS = {
    "rsa-2048": (_RSA, bytes.fromhex("02020800")),
    "rsa-3072": (_RSA, bytes.fromhex("02020c00")),
    "rsa-4096": (_RSA, bytes.fromhex("02021000")),
    "ecdsa-p256": (_EC, bytes.fromhex("06082a8648ce3d030107")),
    "ecdsa-p384": (_EC, bytes.fromhex("06052b81040022")),
}


def csr_of(body: bytes) -> x509.CertificateSigningRequest:
    """Parse an enrolment's CSR: base64 of DER, with any white space (RFC 8951 §3.1; ValueError says what it found)."""
    wanted = "wanted the base64 of one CSR in DER, with neither PEM's lines around it nor a byte more"
    try:
        encoded = base64.b64decode(b"".join(body.split()), validate=True)
    except binascii.Error:
        found = "PEM" if b"-----BEGIN" in body else "other characters, or base64 that is cut off"
        raise ValueError(f"{wanted}; found {found}") from None
    try:
        der.one(encoded, der.SEQUENCE)
        csr = x509.load_der_x509_csr(encoded)
        is_signed = csr.is_signature_valid
        _ = (attributes(csr.subject), san_counts(csr))  # cryptography parses these only when used
    except (*UNREADABLE, UnicodeError) as e:
        raise ValueError(f"{wanted}; found something else ({one_line(e, 100)})") from None
    if csr.public_bytes(Encoding.DER) != encoded:
        raise ValueError(f"{wanted}; found another encoding than DER")
    if not is_signed:
        raise ValueError("wanted a CSR that is signed with its own key, found another signature")
    return csr


def certs_only(certificates: Sequence[x509.Certificate]) -> bytes:
    """Return these certificates as an unordered PKCS#7, in base64 lines for all clients (RFC 7030 §4.1.3, §4.2.3)."""
    return _lines(pkcs7.serialize_certificates(list(certificates), Encoding.DER))


def csr_attributes(keys: Sequence[str]) -> bytes:
    """Return `CsrAttrs` (RFC 7030 §4.5.2) with these key algorithms, such as `rsa-2048`, as far as `_KEYS` has them."""
    values: dict[bytes, list[bytes]] = {}
    for kind, value in (_KEYS[key] for key in keys if key in _KEYS):
        values.setdefault(kind, []).append(value)
    found = [der.encoded(der.SEQUENCE, kind, der.encoded(der.SET, *sorted(some))) for kind, some in values.items()]
    return _lines(der.encoded(der.SEQUENCE, *found))


def _lines(data: bytes) -> bytes:
    return base64.encodebytes(data).replace(b"\n", b"\r\n")
