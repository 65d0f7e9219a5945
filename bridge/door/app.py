"""
What the door answers: our own requests, and the pages for monitors (WSGI).

`POST /v1/requests` takes a request bundle as it is carried to a CA desk, and answers 202 with its id: the same bundle
has the same id, so that a node that was killed asks again. A node without certificates proves in the header
`Authorization` that it has the secret of an enrolment. `GET /v1/requests/ID` is the answer bundle, or 202 with
Retry-After. `GET /v1/certificates/NAME/DIGEST` finds what was issued for a CSR, by its SHA-256. `GET /v1/authorities`
says which CAs there are, and `GET /v1/authorities/NAME` has the certificates of one. Further paths have modules
of their own. No answer holds a secret: the bundle proves its sender, and certificates are public.
"""

from __future__ import annotations

import json
import logging
import math
import re
import secrets
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from http import HTTPStatus
from typing import Any

from bridge.door import enrolments
from bridge.door.enrolments import Enrolment
from bridge.door.signing import BusyError, Judged, Signing
from bridge.door.store import TO_SIGN, DatabaseError, EnrolmentError, Kept, Memory
from bridge.errors import BridgeError
from bridge.pki.bundle import BundleError, RequestBundle
from bridge.pki.certificates import pem
from bridge.settings.tables import Settings
from bridge.system.waiting import Rate, remember, wait_until
from bridge.words import one_line

log = logging.getLogger("ca-bridge")

#: When a node is to look again: soon after it has asked, and then less often.
_SOON_SECONDS, _LATER_SECONDS = 1, 30
_SOON_FOR = timedelta(seconds=30)
#: How many requests are answered in a second, about: a node that looks too early takes time from signing, and one that
#: looks late waits for nothing (docs/evidence/numbers.md).
_PACE = 60
#: Another door on the same database may answer, and this one is not told.
_LOOK_SECONDS = 0.25
#: When a node that was turned away may come again.
_PAUSE_SECONDS = 30
#: The part of the threads that may wait for answers.
_PART_AWAITING = 4
#: The part of the room for requests that no CA's certificate is there to judge by.
_PART_UNJUDGED = 10
_ID = re.compile(r"/v1/requests/([A-Za-z0-9_-]{43})")
_AUTHORITY = re.compile(r"/v1/authorities/([a-z-]{1,100})")
_CHAIN = "application/pem-certificate-chain"
_CERTIFICATE = re.compile(r"/v1/certificates/([a-z0-9.-]{1,100})/([0-9a-f]{64})")

Environ = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer."""

    status: HTTPStatus
    body: bytes
    kind: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, status: HTTPStatus, document: Mapping[str, Any], **headers: str) -> Reply:
        """A JSON document; `retry_after="1"` is the header Retry-After."""
        named = {name.replace("_", "-").title(): value for name, value in headers.items()}
        return cls(status=status, body=json.dumps(document).encode() + b"\n", headers=named)

    @classmethod
    def error(cls, status: HTTPStatus, error: BridgeError | str, **headers: str) -> Reply:
        """An error's answer: what was wanted, what was found, what to do next."""
        hint = error.hint if isinstance(error, BridgeError) else ""
        return cls.of(status, {"error": one_line(error, 2000), **({"hint": hint} if hint else {})}, **headers)


class Awaited:
    """Answers that clients' threads wait for, as long as this is better than to let the clients come again."""

    def __init__(self, memory: Memory, *, longest: timedelta, places: int) -> None:
        """At most as many threads wait as there are `places`, none of them longer than `longest`."""
        self._memory = memory
        self._longest = longest
        self._places = threading.Semaphore(places)
        self._mutex = threading.Lock()
        self._digests: dict[threading.Event, str] = {}  #: Of the requests that threads wait for.

    def over(self, kept: Kept, limit: timedelta) -> Kept:
        """The request once a round has answered it or left it to people, or as it is after the limit."""
        if _is_over(kept) or not self._places.acquire(blocking=False):
            return kept
        answered = threading.Event()
        with self._mutex:
            self._digests[answered] = kept.digest
        try:
            return wait_until(
                lambda: self._memory.find(kept.id) or kept,
                _is_over,
                min(limit, self._longest),
                pause_seconds=0,
                between=lambda _: answered.wait(_LOOK_SECONDS),
            )
        finally:
            with self._mutex:
                del self._digests[answered]
            self._places.release()

    def answered(self, request_digest: str) -> None:
        """Let those look who wait for this request."""
        with self._mutex:
            for event, waited in self._digests.items():
                if waited == request_digest:
                    event.set()


def _is_over(kept: Kept) -> bool:
    return kept.answer is not None or kept.state not in TO_SIGN


class Door:
    """The application; called from many threads."""

    def __init__(
        self,
        settings: Settings,
        memory: Memory,
        signing: Signing,
        now: Callable[[], datetime],
        pages: Mapping[str, Callable[[], tuple[int, str]]],
    ) -> None:
        """`pages` are those for monitors, by path."""
        ours = settings.serve
        self._settings = ours
        self._memory = memory
        self.awaited = Awaited(memory, longest=ours.exchange_for / 2, places=max(1, ours.threads // _PART_AWAITING))
        self._signing = signing
        self._now = now
        self._rate = Rate(ours.requests_per_minute)
        self._authorities = sorted(settings.authorities)
        self._pages = pages
        #: Called with the peer and the id of each new request.
        self.brought: Callable[[Environ, str], object] = lambda *_: None
        self._mutex = threading.Lock()
        self.arrived = threading.Event()  #: There is something to sign.
        self.ending = threading.Event()  #: No new request is taken.
        self.answers: Counter[int] = Counter()  #: By status.
        self.to_sign = 0  #: Requests for the next rounds of signing, as they were counted last.
        self._answered = 0  #: Requests since the start.
        #: By digest, how many are answered when it is a request's turn.
        self._turns: OrderedDict[str, int] = OrderedDict()
        #: What answers below other paths, by their beginning.
        self.below: dict[str, Callable[[Environ], Reply]] = {}

    def __call__(self, environ: Environ, start: Callable[[str, list[tuple[str, str]]], Any]) -> list[bytes]:
        """WSGI."""
        request_id, began = secrets.token_hex(8), time.monotonic()
        try:
            reply = self._too_fast(environ) or self._reply(environ)
        except DatabaseError as e:
            log.error("%s", e, extra={"request": request_id})  # noqa: TRY400
            reply = Reply.error(HTTPStatus.SERVICE_UNAVAILABLE, e, retry_after=str(_PAUSE_SECONDS))
        with self._mutex:
            self.answers[int(reply.status)] += 1
        method, path, peer = (str(environ.get(key, "")) for key in ("REQUEST_METHOD", "PATH_INFO", "REMOTE_ADDR"))
        if path not in self._pages:
            path_text = _ID.sub("/v1/requests/…", path)  # who knows the id gets the answer
            text = "%s %s from %s: %d in %.0f ms"
            about = {"request": request_id, "requester": peer, "outcome": str(int(reply.status))}
            milliseconds = 1000 * (time.monotonic() - began)
            log.info(
                text, one_line(method, 20), one_line(path_text, 200), peer, reply.status, milliseconds, extra=about
            )
        body = b"" if method == "HEAD" else reply.body
        headers = {
            "Content-Type": reply.kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "X-Request-Id": request_id,
            **reply.headers,
        }
        start(f"{int(reply.status)} {reply.status.phrase}", list(headers.items()))
        return [body]

    def _too_fast(self, environ: Environ) -> Reply | None:
        with self._mutex:
            seconds = self._rate.take(str(environ.get("REMOTE_ADDR", "")), time.monotonic())
        if not seconds:
            return None
        text = f"wanted at most {self._settings.requests_per_minute} requests a minute from one address, found more"
        return Reply.error(HTTPStatus.TOO_MANY_REQUESTS, text, retry_after=str(math.ceil(seconds)))

    def _reply(self, environ: Environ) -> Reply:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if path == "/v1/requests":
            if method == "POST":
                return self._post(environ)
            return Reply.error(HTTPStatus.METHOD_NOT_ALLOWED, "wanted POST", allow="POST")
        for beginning, reply in self.below.items():
            if path.startswith(beginning):
                return reply(environ)
        found = self._found(path)
        if found is None:
            return Reply.error(HTTPStatus.NOT_FOUND, "wanted a page of the door, found another path")
        if method != "GET":
            return Reply.error(HTTPStatus.METHOD_NOT_ALLOWED, "wanted GET", allow="GET")
        return found()

    def _found(self, path: str) -> Callable[[], Reply] | None:
        if (page := self._pages.get(path)) is not None:
            return lambda: _page(*page())
        if (match := _ID.fullmatch(path)) is not None:
            request_id = match[1]
            return lambda: self._answer(request_id)
        if (match := _CERTIFICATE.fullmatch(path)) is not None:
            name, csr = match[1], match[2]
            return lambda: self._certificate(name, csr)
        if (match := _AUTHORITY.fullmatch(path)) is not None and match[1] in self._authorities:
            name = match[1]
            return lambda: self._issuers(name)
        if path == "/v1/authorities":
            return lambda: Reply.of(HTTPStatus.OK, {"authorities": self._authorities})
        return None

    def _issuers(self, authority: str) -> Reply:
        if not (found := self._signing.chains.get(authority, ())):
            text = f"wanted the CA of {authority}, found that it was not reached yet"
            return Reply.error(HTTPStatus.SERVICE_UNAVAILABLE, text, retry_after=str(_PAUSE_SECONDS))
        return Reply(status=HTTPStatus.OK, body=pem(*found), kind=_CHAIN)

    # --- our own requests ---------------------------------------------------------------------------------------------

    def _post(self, environ: Environ) -> Reply:
        if self.ending.is_set():
            text = "wanted a running door, found one that is shutting down"
            return Reply.error(HTTPStatus.SERVICE_UNAVAILABLE, text, retry_after=str(_SOON_SECONDS))
        data = json_body(environ)
        if isinstance(data, Reply):
            return data
        try:
            bundle, request_digest, judged = self._signing.read(data, str(environ.get("REMOTE_ADDR", "")))
        except BundleError as e:
            return Reply.error(HTTPStatus.BAD_REQUEST, e)
        except BusyError as e:
            return Reply.error(HTTPStatus.SERVICE_UNAVAILABLE, e, retry_after=str(_PAUSE_SECONDS))
        kept = self._memory.find_digest(request_digest)
        if kept is None:
            received = self._receive(environ, data, bundle, request_digest, judged)
            if isinstance(received, Reply):
                return received
            request_id = received
        else:
            request_id = kept.id
        self.arrived.set()
        document = {"id": request_id, "digest": request_digest, "state": "waiting" if kept is None else kept.state}
        place = f"/v1/requests/{request_id}"
        return Reply.of(
            HTTPStatus.ACCEPTED, document, location=place, retry_after=str(self._soon_seconds(request_digest))
        )

    def _receive(
        self, environ: Environ, data: bytes, bundle: RequestBundle, request_digest: str, judged: Judged | None
    ) -> str | Reply:
        """The id of a request that is new, or why it is not kept."""
        peer = str(environ.get("REMOTE_ADDR", ""))
        try:
            used = self._enrolment(str(environ.get("HTTP_AUTHORIZATION", "")), bundle, request_digest)
            vouched = frozenset(used.vouches(bundle) if used is not None else ())
            if judged is None or vouched:
                judged = self._signing.judged(bundle, vouched)
            if judged.refused:
                return _refused(bundle, request_digest, peer, judged.refused)
            if (refused := self.too_many(peer, is_judged=self._signing.judges(bundle))) is not None:
                return refused
            who: dict[str, Any] = {"node": bundle.node, "cluster": bundle.cluster, "peer": peer}
            number = used.id if used is not None else None
            request_id = self._memory.receive(data, digest=request_digest, now=self._now(), enrolment=number, **who)
            with self._mutex:
                remember(self._turns, request_digest, self._answered + self.to_sign, self._settings.waiting)
            self._signing.expect(data, judged)
            self.brought(environ, request_id)
        except EnrolmentError as e:
            return _refused(bundle, request_digest, peer, e)
        text = "request %s of %s was received"
        log.info(text, request_digest[:16], bundle.node, extra={"request": request_digest[:16], "requester": peer})
        return request_id

    def _enrolment(self, authorization: str, bundle: RequestBundle, request_digest: str) -> Enrolment | None:
        """The enrolment that the header proves; one that lets nothing in is no error where each request has a proof."""
        if not authorization:
            return None
        try:
            return enrolments.proven_by(self._memory, authorization, bundle, request_digest, self._now())
        except EnrolmentError:
            if all(one.proof is not None for one in bundle.requests):
                return None
            raise

    def too_many(self, peer: str, *, is_judged: bool) -> Reply | None:
        """
        The answer where no further request of this address may wait, or none at all; None: one may.

        A request that could not be judged gets a tenth of the room, so that strangers take no node's place.
        """
        found = self._memory.unanswered(peer)
        every, theirs, self.to_sign = found.every, found.theirs, found.to_sign
        later = {"retry_after": str(_PAUSE_SECONDS)}
        kind, part = ("requests", 1) if is_judged else ("requests of a CA that was not reached yet", _PART_UNJUDGED)
        most, most_theirs = -(-self._settings.waiting // part), -(-self._settings.waiting_per_peer // part)
        if theirs >= most_theirs:
            text = f"wanted at most {most_theirs} {kind} of one address that wait, found {theirs}"
            return Reply.error(HTTPStatus.TOO_MANY_REQUESTS, text, **later)
        if every >= most:
            text = f"wanted at most {most} {kind} that wait, found {every}"
            return Reply.error(HTTPStatus.SERVICE_UNAVAILABLE, text, **later)
        return None

    def _answer(self, request_id: str) -> Reply:
        kept = self._memory.find(request_id)
        if kept is None:
            return Reply.error(HTTPStatus.NOT_FOUND, "wanted the id of a request, found another text")
        if self._pause_seconds(kept) == _SOON_SECONDS:  # its turn may come before the node would be back
            kept = self.awaited.over(kept, timedelta(seconds=_SOON_SECONDS))
        if kept.answer is not None:
            return Reply(status=HTTPStatus.OK, body=kept.answer)
        if kept.state == "answered":
            return Reply.error(HTTPStatus.GONE, "wanted an answer that is kept, found one that is too old (serve.keep)")
        document = {"id": kept.id, "digest": kept.digest, "state": kept.state, "note": _note(kept)}
        return Reply.of(HTTPStatus.ACCEPTED, document, retry_after=str(self._pause_seconds(kept)))

    def answered(self, request_digest: str) -> None:
        """Count one request less that waits."""
        self.to_sign -= 1
        with self._mutex:
            self._answered += 1
            self._turns.pop(request_digest, None)
        self.awaited.answered(request_digest)

    def _pause_seconds(self, kept: Kept) -> int:
        """Until a node should look again."""
        is_new = kept.begun is None or self._now() - kept.received < _SOON_FOR
        return self._soon_seconds(kept.digest) if is_new else _LATER_SECONDS

    def _soon_seconds(self, request_digest: str) -> int:
        """Until it is about the turn of a request; of one that came before the start, as if it were the last."""
        with self._mutex:
            turn = self._turns.get(request_digest)
            ahead = self.to_sign if turn is None else min(turn - self._answered, self.to_sign)
        return min(max(_SOON_SECONDS, ahead // _PACE), _LATER_SECONDS)

    def _certificate(self, name: str, csr: str) -> Reply:
        chain = self._memory.issued_for(csr, name)
        if chain is None:
            return Reply.error(HTTPStatus.NOT_FOUND, "wanted a CSR that was signed here, found another one")
        return Reply(status=HTTPStatus.OK, body=chain, kind=_CHAIN)


def json_body(environ: Environ) -> bytes | Reply:
    """The body of a request in JSON, not parsed; or the answer where the header says that it is something else."""
    if str(environ.get("CONTENT_TYPE", "")).partition(";")[0].strip() != "application/json":
        return Reply.error(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "wanted Content-Type: application/json")
    data: bytes = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    return data


def _refused(bundle: RequestBundle, request_digest: str, peer: str, reason: BridgeError | str) -> Reply:
    text = "request %s of %s from %s is refused: %s"
    log.warning(
        text, request_digest[:16], bundle.node, peer, one_line(reason, 2000), extra={"request": request_digest[:16]}
    )
    return Reply.error(HTTPStatus.FORBIDDEN, reason)


def _note(kept: Kept) -> str:
    """Why it waits, for the node; what a CA or a database said stays at the door, whose clients may be anyone."""
    if kept.state == "undecided":
        return f"people decide about request {kept.digest[:16]}"
    if kept.note:
        return f"request {kept.digest[:16]} waits at the door, whose log says why"
    return f"request {kept.digest[:16]} waits for its turn"


def _page(status: int, text: str) -> Reply:
    kind = "text/plain; version=0.0.4; charset=utf-8"
    return Reply(status=HTTPStatus(status), body=text.encode(), kind=kind)
