"""
A door (`ca-bridge serve`) as a CA: request bundles by HTTPS with the continuity proof, and no CA secret on the node.

Each batch is one bundle, as for a CA desk, or several if one would be too long. The door gives the same bundle the same
id, so a killed run can ask again without harm. A run waits a while for the answers; if people have to decide, it leaves
them to the next run.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from http import HTTPStatus
from pathlib import Path

from cryptography import x509
from requests import Response

from backends.http import LATER_STATUSES, Http, OverHttp, Wording, json_object, retry_after_seconds
from backends.settings import tls_context, url_problems
from bridge.contract import (
    GIVEN,
    BackendSettings,
    Issued,
    Pending,
    Revocation,
    Secret,
    SecretUnavailableError,
    SetupFile,
    SetupRequest,
    SignRequest,
)
from bridge.errors import (
    BackendError,
    BackendRefusedError,
    BackendUnavailableError,
    LocalFileError,
    NoVerdictError,
    SettingsProblem,
    Violation,
)
from bridge.pki import node_proofs
from bridge.pki.bundle import LARGEST_REQUEST_BYTES, AnswerBundle, BundleError, Refusal, RequestBundle, bundle_of
from bridge.pki.bundle_format import digest, dumps, is_authentic, loads_answer
from bridge.pki.certificates import O_OID, attributes, csr_fingerprint, load_pem_certificates, san_entries
from bridge.specs import MASTERS, CertificateSpec
from bridge.system.paths import read_public_key
from bridge.system.waiting import wait_until
from bridge.words import one_line

log = logging.getLogger("ca-bridge.door")

_REFERENCE = re.compile(r"([0-9a-f]{64})@([A-Za-z0-9_-]{1,100})")
_HINTS = {
    403: (
        "the door's policy, or the proof, is against it; a node without certificates needs the secret that "
        "`ca-bridge enroll NODE` prints at the door, in the file of enrolment_file"
    ),
    400: "are both sides of the same version?",
    404: "is `url` the door's own, without a path?",
}
_LARGE_HINT = "look at the SANs of the request, which are those of the live certificate"
_ENROL_HINT = "`ca-bridge enroll NODE` prints it at the door's host; it is good for one request"
_UNSIGNED_HINT = "desk.answer_key of the door's policy signs its answers; node.desk_key of this node is its public key"
_NOT_OURS = "is it the door (`ca-bridge serve`) that answers there, and not a proxy or another program?"
_TLS_HINT = "ca_file has the CA certificate of the door's server certificate, and `url` a name that is in it"
_ENDED_HINT = (
    "the door's server certificate has ended, or this node's clock is wrong: a new one goes into the file that "
    "serve.certificate of the door's settings names, and is read by itself"
)
#: Pauses between two looks for an answer, unless the door says otherwise.
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 30.0


@dataclass(frozen=True, kw_only=True)
class DoorSettings(BackendSettings):
    """Table `[backend.NAME]` with `type = "door"`."""

    url: str  #: The door's URL, such as `https://ca-door.corp.example:9443`.
    ca_file: Path | None = None  #: CA certificates (PEM) for the door's server certificate; if not set, the system's.
    #: How long a run waits for the answer; after that the next run asks for it.
    wait: timedelta = timedelta(seconds=30)
    #: The one-time secret that `ca-bridge enroll NODE` prints at the door, for a node without live certificates.
    enrolment: Secret | None = None
    #: `node.desk_key`, which the bridge fills in: only answers signed with this key count.
    signed_by: Path | None = field(default=None, metadata={GIVEN: True})

    def problems(self) -> Iterator[SettingsProblem]:
        """Find a URL that can't be a door's."""
        yield from url_problems(self.url, "https://HOST[:PORT], without a path", suffix="/")


class DoorBackend(OverHttp):
    """All CAs behind one door."""

    settings_type = DoorSettings
    carries = True
    asks_validity = True

    def __init__(self, settings: DoorSettings) -> None:
        self._settings = settings
        signed_by = settings.signed_by
        self._desk_key = None if signed_by is None else read_public_key(signed_by, "node.desk_key")
        wording = Wording(
            name="door", not_ours=_NOT_OURS, tls=lambda text: _ENDED_HINT if "has expired" in text else _TLS_HINT
        )
        self._http = Http(wording, settings.url, settings.timeout, partial(tls_context, settings.ca_file, None, None))

    @classmethod
    def setup(cls, wanted: SetupRequest) -> Sequence[SetupFile]:
        """Write the authority's part of the door's `desk-policy.toml`; parts of several authorities fit together."""
        text = "\n".join([*_allow_lines(wanted), *_certificate_lines(wanted)])
        return [SetupFile(name=f"door-{wanted.authority.name}.toml", text=f"{text}\n")]

    def check(self, specs: Sequence[CertificateSpec]) -> dict[str, list[Violation]]:
        """Ask the door which CAs it has; only a request shows what its policy allows."""
        answer = self._ask("GET", "/v1/authorities")
        if answer.status_code != HTTPStatus.OK:
            raise _error(answer)
        there = (json_object(answer.content) or {}).get("authorities")
        if not isinstance(there, list) or not all(isinstance(line, str) for line in there):
            raise BackendRefusedError("door: wanted a list of authorities, found something else", hint=_NOT_OURS)
        got = one_line(", ".join(there)) or "none"
        return {
            spec.name: [Violation(subject="authority of the door", want=spec.authority.name, got=got)]
            for spec in specs
            if spec.authority.name not in there
        }

    def issuers_of(self, authority: str) -> list[x509.Certificate]:
        """The door's CA certificates of an authority, the signing one first; empty until it has reached that CA."""
        answer = self._ask("GET", f"/v1/authorities/{authority}")
        if answer.status_code in {HTTPStatus.NOT_FOUND, HTTPStatus.SERVICE_UNAVAILABLE}:
            return []
        return self._certificates(answer)

    def identity(self) -> str:
        """The node's name; the door verifies it by the proof."""
        return self._settings.node

    def sign_many(self, requests: Sequence[SignRequest]) -> Sequence[Issued | Pending | BackendError]:
        """Send each batch in one bundle or several (`_lots`), and wait for the answers as long as the settings say."""
        batches: dict[str, list[SignRequest]] = {}
        for request in requests:
            batches.setdefault(request.continuity.batch if request.continuity else "", []).append(request)
        end = time.monotonic() + self._settings.wait.total_seconds()
        answers: dict[int, Issued | Pending | BackendError] = {}
        posted = [(lot, self._posted(*made)) for batch in batches.values() for lot, made in _lots(batch)]
        for lot, waiting in posted:
            answer = self._awaited(waiting, end) if isinstance(waiting, Pending) else waiting
            answers |= {id(request): _given(answer, request) for request in lot}
        return [answers[id(request)] for request in requests]

    def collect(self, request: SignRequest, reference: str) -> Issued | Pending:
        """Ask for the answer once; if the door has lost the request, send it again."""
        found = self._read(self._look(reference), reference)
        given = _given(found or self._posted(*_bundled([request])), request)
        if isinstance(given, BackendError):
            raise given
        return given

    def recall(self, requests: Sequence[SignRequest], since: datetime) -> Sequence[Issued | None]:  # noqa: ARG002
        """Ask for the certificate of each CSR, which is signed once, by its digest, as unguessable as its key."""
        if self._desk_key is not None:  # it signs only whole answers; the same bundle gets its answer again
            return [None] * len(requests)
        return [self._recalled(request) for request in requests]

    def revoke_proven(self, revocation: Revocation) -> None:
        """Have the door's CA revoke a certificate; the proof shows which node asks, and the door's policy decides."""
        answer = self._ask("POST", "/v1/revocations", node_proofs.revocation_json(revocation))
        if answer.status_code != HTTPStatus.OK:
            raise _error(answer)

    def _recalled(self, request: SignRequest) -> Issued | None:
        answer = self._ask("GET", f"/v1/certificates/{request.spec.name}/{csr_fingerprint(request.csr)}")
        if answer.status_code == HTTPStatus.NOT_FOUND:
            return None
        leaf, *intermediates = self._certificates(answer)
        return Issued(leaf=leaf, intermediates=tuple(intermediates))

    @staticmethod
    def _certificates(answer: Response) -> list[x509.Certificate]:
        if answer.status_code != HTTPStatus.OK:
            raise _error(answer)
        try:
            return load_pem_certificates(answer.content)
        except ValueError as e:
            raise BackendRefusedError(f"door: wanted certificates in PEM, found: {one_line(e)}") from e

    def _posted(self, bundle: RequestBundle, data: bytes) -> Pending | BackendError:
        """Post a bundle: Pending, or a BackendError for all its requests, which are refused or too long."""
        if len(data) > LARGEST_REQUEST_BYTES:
            wanted = f"wanted at most {LARGEST_REQUEST_BYTES} bytes in the bundle of one request, found {len(data)}"
            return BackendRefusedError(f"door: {wanted}", hint=_LARGE_HINT)
        answer = self._ask("POST", "/v1/requests", data, self._enrolled(bundle))
        if answer.status_code != HTTPStatus.ACCEPTED:
            is_about_this_one = answer.status_code == HTTPStatus.BAD_REQUEST and _said(answer)
            if is_about_this_one or answer.status_code == HTTPStatus.FORBIDDEN:
                return _error(answer)  # the next bundle may be taken
            raise _error(answer)
        request_digest, reference = digest(bundle), (json_object(answer.content) or {}).get("id")
        if not isinstance(reference, str) or _REFERENCE.fullmatch(f"{request_digest}@{reference}") is None:
            raise BackendRefusedError("door: the door's answer has no id of a request", hint=_NOT_OURS)
        return Pending(reference=f"{request_digest}@{reference}", note=f"the door has request {request_digest[:16]}")

    def _enrolled(self, bundle: RequestBundle) -> dict[str, str]:
        """The header that proves an enrolment, if a request has no live certificate to prove it."""
        place, now = self._settings.enrolment, datetime.now(UTC)
        if place is None or all(
            request.proof and request.replaces and request.replaces.not_valid_after_utc > now
            for request in bundle.requests
        ):
            return {}
        try:
            return {"Authorization": node_proofs.enrolment_proof(place.read(), digest(bundle))}
        except (SecretUnavailableError, ValueError) as e:
            text = f"wanted {e} in {place}, found something else" if isinstance(e, ValueError) else str(e)
            unproven = [request.name for request in bundle.requests if request.proof is None]
            if len(unproven) == len(bundle.requests):
                raise LocalFileError(f"door: enrolment: {text}", hint=_ENROL_HINT) from e
            if unproven:  # the door refuses these alone
                log.warning("door: enrolment, for %s: %s; %s", ", ".join(unproven), text, _ENROL_HINT)
            return {}

    def _awaited(self, waiting: Pending, end: float) -> AnswerBundle | Pending:
        """Wait for the answer; Pending when the time is over."""
        if not self._settings.wait:
            return waiting

        def look() -> tuple[AnswerBundle | Pending | None, float]:
            answer = self._look(waiting.reference)
            pause_seconds = min(retry_after_seconds(answer) or _PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS)
            return self._read(answer, waiting.reference), pause_seconds

        # one look, even where other bundles took all the time
        left = timedelta(seconds=end - time.monotonic())
        read, _ = wait_until(
            look, lambda seen: isinstance(seen[0], AnswerBundle), left, pause_seconds=lambda seen: seen[1]
        )
        return read or waiting

    def _look(self, reference: str) -> Response:
        match = _REFERENCE.fullmatch(reference)
        if match is None:
            hint = "`ca-bridge pending cancel` makes room for a new request"
            raise BackendRefusedError("door: wanted a reference of the door, found another text", hint=hint)
        return self._ask("GET", f"/v1/requests/{match[2]}")

    def _ask(
        self, method: str, path: str, body: bytes | None = None, more: Mapping[str, str] | None = None
    ) -> Response:
        headers = {"Accept": "application/json"} | ({"Content-Type": "application/json"} if body is not None else {})
        headers |= more or {}
        url = self._settings.url.rstrip("/") + path
        return self._http.request(method, url, f"{method} {url}", headers=headers, data=body)

    def _read(self, answer: Response, reference: str) -> AnswerBundle | Pending | None:
        """The answer bundle to this request, or Pending; None: the door does not know it."""
        if answer.status_code == HTTPStatus.NOT_FOUND:
            return None
        if answer.status_code == HTTPStatus.ACCEPTED:
            note = (json_object(answer.content) or {}).get("note")
            return Pending(reference=reference, note=one_line(note, 500) if isinstance(note, str) else "")
        if answer.status_code != HTTPStatus.OK:
            raise _error(answer)
        try:
            bundle = loads_answer(answer.content)
        except BundleError as e:
            raise NoVerdictError(f"door: wanted an answer bundle, found: {e}", hint=_NOT_OURS) from e
        if bundle.request_digest != reference.partition("@")[0]:
            raise NoVerdictError("door: wanted the answer to our request, found another one's", hint=_NOT_OURS)
        if not is_authentic(bundle, self._desk_key):
            found = "no signature" if bundle.signature is None else "another signature"
            wanted = f"an answer that is signed by the desk's key ({self._settings.signed_by})"
            raise NoVerdictError(f"door: wanted {wanted}, found {found}", hint=_UNSIGNED_HINT)
        return bundle


def _lots(requests: Sequence[SignRequest]) -> Iterator[tuple[Sequence[SignRequest], tuple[RequestBundle, bytes]]]:
    """A batch with its bundle, halved again and again while a bundle is longer than a door accepts."""
    middle, made = len(requests) // 2, _bundled(requests)
    if middle and len(made[1]) > LARGEST_REQUEST_BYTES:
        yield from (*_lots(requests[:middle]), *_lots(requests[middle:]))
    else:
        yield requests, made


def _bundled(requests: Sequence[SignRequest]) -> tuple[RequestBundle, bytes]:
    """The requests' bundle, and its bytes."""
    try:
        bundle = bundle_of(requests)
        return bundle, dumps(bundle)
    except BundleError as e:
        raise BackendRefusedError(f"door: no bundle can be made of these requests: {e}") from e


def _given(answer: AnswerBundle | Pending | BackendError, request: SignRequest) -> Issued | Pending | BackendError:
    if not isinstance(answer, AnswerBundle):
        return answer
    given = answer.answers.get(request.spec.name)
    if isinstance(given, Issued):
        return given
    signer = one_line(answer.signer)
    if isinstance(given, Refusal):
        return BackendRefusedError(f"{signer} refused: {given.reason}")
    return BackendRefusedError(f"{signer}: this door has no CA for {request.spec.authority.name}")


def _said(answer: Response) -> str:
    """The door's own words; empty for an answer from a proxy in front of it."""
    said = (json_object(answer.content) or {}).get("error")
    return one_line(said, 2000) if isinstance(said, str) else ""


def _error(answer: Response) -> BackendError:
    text = ", ".join(filter(None, (f"door: HTTP {answer.status_code}", _said(answer))))
    if answer.status_code in LATER_STATUSES:
        return BackendUnavailableError(text, retry_after_seconds=retry_after_seconds(answer))
    kind = BackendRefusedError if _said(answer) and answer.status_code != HTTPStatus.UNAUTHORIZED else NoVerdictError
    return kind(text, hint=_HINTS.get(answer.status_code, _NOT_OURS))


#: The policy's own default, and the types of SANs that its rules can name.
_LONGEST, _KINDS = timedelta(days=365), {"DNS", "IP"}


def _allow_lines(wanted: SetupRequest) -> Iterator[str]:
    """Lines for the table `[allow]`, as comments, since the policy has the table only once."""
    where = f"authority {wanted.authority.name} of cluster {one_line(wanted.cluster)}, node {one_line(wanted.node)}"
    yield f"# For desk-policy.toml at the door: {where}."
    yield "# The table [allow], which is there once, needs at least:"
    yield f"#   clusters = [{_quoted(wanted.cluster)}]"
    yield f"#   nodes = [{_quoted(wanted.node)}]"
    if wanted.validity > _LONGEST:
        yield f'#   max_validity = "{-(-wanted.validity // timedelta(days=1))}d"'
    subjects = {name: attributes(certificate.subject) for name, certificate in wanted.certificates.items()}
    masters = [name for name, subject in subjects.items() if (O_OID, MASTERS) in subject]
    if masters:
        yield f"#   masters = [{', '.join(map(_quoted, masters))}]"


def _certificate_lines(wanted: SetupRequest) -> Iterator[str]:
    bare = [name for name, certificate in wanted.certificates.items() if not san_entries(certificate)]
    if bare:
        yield f"# Without SANs, so that [allow] is enough: {', '.join(bare)}."
    if len(bare) < len(wanted.certificates):
        yield "# Each list is all that such a certificate may have, on every node that [allow] names; without the list it is"
        yield "# what the live one has, and a node without certificates gets kubeadm's own names alone."
        yield "# Other nodes have other addresses: add them, or a network such as 192.0.2.0/24."
    for name, certificate in wanted.certificates.items():
        entries = sorted(san_entries(certificate))
        if not entries:
            continue
        yield f"\n[certificate.{_quoted(name)}]"
        yield "sans = ["
        for kind, value in entries:
            if kind in _KINDS:
                yield f"    {_quoted('{node}' if value == wanted.node else value)},"
            else:
                yield f"    # {kind} {one_line(value)}: no rule of the policy allows it"
        yield "]"


def _quoted(text: str) -> str:
    """A TOML string; a JSON string is one."""
    return json.dumps(text)
