"""
The door's WSGI application: our own requests, and the pages for monitors.

`POST /v1/requests` takes the same request bundle as a CA desk, and answers 202 with an id. The same bundle gets the
same id, so a node that was killed can ask again. A node without certificates proves in the header `Authorization` that
it has an enrolment's secret. `GET /v1/requests/ID` returns the answer bundle, or 202 with Retry-After.
`GET /v1/certificates/NAME/DIGEST` returns the certificate that was issued for a CSR, by the CSR's SHA-256.
`GET /v1/authorities` lists the CAs, and `GET /v1/authorities/NAME` returns the certificates of one. Other paths have
modules of their own. No answer holds a secret: the bundle proves its sender, and certificates are public.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import math
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from http import HTTPStatus
from typing import Any

from bridge.desk.workers import ReadBundle
from bridge.door import enrolments
from bridge.door.enrolments import Enrolment
from bridge.door.signing import BusyError, Signing
from bridge.door.store import TO_SIGN, DatabaseError, DoorDatabase, EnrolmentError, Kept
from bridge.errors import BridgeError
from bridge.pki.bundle import BundleError
from bridge.pki.certificates import pem
from bridge.settings import network_of
from bridge.settings.tables import Settings
from bridge.system.waiting import Rate, wait_until
from bridge.words import one_line

log = logging.getLogger("ca-bridge")

#: Retry-After of a new request, and of an older one.
_SOON_SECONDS, _LATER_SECONDS = 1, 30
_SOON_FOR = timedelta(seconds=30)
#: About how many requests the door answers in a second: polling too early takes time from signing; polling late delays
#: the node (docs/evidence/numbers.md).
_PACE = 60
#: How often to look in the database for an answer, which may be another door's.
_LOOK_SECONDS = 0.1
#: Retry-After of a rejected request.
_PAUSE_SECONDS = 30
#: For clients, who may be anyone; only the log has the database's own error, with its address, user and files.
_DATABASE = DatabaseError("the database does not answer; the door's log says why")
#: One thread in this many may wait for an answer.
_PART_AWAITING = 4
#: One place in this many is for requests that can't be judged before their CA is reached, and their longest bundle: a
#: whole node's has 40,000 bytes, and each round parses two hundred of them again.
_PART_UNJUDGED, _LONGEST_UNJUDGED_BYTES = 10, 64 << 10
#: Requests of one node that may wait for people; a node that asks again has lost its keys, or hides others' requests.
_MOST_UNDECIDED = 10
_PIECE_BYTES = 64 << 10
#: The page for monitors that names nodes.
METRICS = "/metrics"
_ID = re.compile(r"/v1/requests/([A-Za-z0-9_-]{43})")
_CHAIN = "application/pem-certificate-chain"
_CERTIFICATE = re.compile(r"/v1/certificates/([a-z0-9.-]{1,100})/([0-9a-f]{64})")

Environ = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An HTTP answer."""

    status: HTTPStatus
    body: bytes
    kind: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)  #: `retry_after` stands for the header Retry-After.
    end: bytes = b""  #: The end of the body, which several answers may share.

    @classmethod
    def of(cls, status: HTTPStatus, document: Mapping[str, Any], **headers: str) -> Reply:
        """Return a JSON document as an answer."""
        return cls(status=status, body=json.dumps(document).encode() + b"\n", headers=headers)

    @classmethod
    def error(cls, status: HTTPStatus, error: BridgeError | str, **headers: str) -> Reply:
        """Return an error as an answer: what was wanted, what was found, what to do next."""
        hint = error.hint if isinstance(error, BridgeError) else ""
        return cls.of(status, {"error": one_line(error, 2000), **({"hint": hint} if hint else {})}, **headers)


class TurnedAwayError(Exception):
    """The request ends with this answer, and the door stores nothing of it."""

    def __init__(self, reply: Reply) -> None:
        super().__init__()
        self.reply = reply


class Door:
    """The WSGI application; thread-safe."""

    def __init__(
        self,
        settings: Settings,
        memory: DoorDatabase,
        signing: Signing,
        now: Callable[[], datetime],
        pages: Mapping[str, Callable[[], Reply]],
        asker: Callable[[Environ], str] = lambda _: "",
    ) -> None:
        """`pages` are the pages for monitors, by path; `asker` returns the approver who sends a request."""
        ours = settings.serve
        self._settings = ours
        self.memory = memory
        self._places = threading.Semaphore(
            max(1, ours.threads // _PART_AWAITING)
        )  #: For threads that wait for answers.
        self.signing = signing
        self.now = now
        self._rate = Rate(ours.requests_per_minute)
        self._lines = Rate(1)  #: Log lines about one address that sends too much.
        self._monitors = [network for text in ours.metrics_for if (network := network_of(text)) is not None]
        self._authorities = sorted(settings.authorities)
        self._pages = pages
        #: The handlers of GET, by path.
        self._paths: Mapping[re.Pattern[str], Callable[..., Reply]] = {
            _ID: self._answer,
            _CERTIFICATE: self._certificate,
            re.compile("/v1/authorities"): lambda: Reply.of(HTTPStatus.OK, {"authorities": self._authorities}),
            re.compile(f"/v1/authorities/({'|'.join(map(re.escape, self._authorities))})"): self._issuers,
            **{re.compile(re.escape(path)): page for path, page in pages.items()},
        }
        self.asker = asker
        self._mutex = threading.Lock()
        self.ending = threading.Event()  #: Set when the door takes no new request.
        self.answers: Counter[int] = Counter()  #: By status.
        #: The handlers of other paths, by prefix.
        self.below: dict[str, Callable[[Environ], Reply]] = {}

    def __call__(self, environ: Environ, start: Callable[[str, list[tuple[str, str]]], Any]) -> Iterable[bytes]:
        """Answer a WSGI request."""
        request_id, began = secrets.token_hex(8), time.monotonic()
        method, path, peer = (environ[key] for key in ("REQUEST_METHOD", "PATH_INFO", "REMOTE_ADDR"))
        seconds = self._seconds_too_early(peer, began)
        try:
            reply = self._too_early(seconds) if seconds else self._reply(environ)
        except TurnedAwayError as e:
            reply = e.reply
        except DatabaseError as e:
            log.error("%s", e, extra={"request": request_id})  # noqa: TRY400
            reply = Reply.error(HTTPStatus.SERVICE_UNAVAILABLE, _DATABASE, retry_after=str(_PAUSE_SECONDS))
        with self._mutex:
            self.answers[int(reply.status)] += 1
            is_told = path not in self._pages and not seconds
            is_news = bool(seconds) and not self._lines.take(peer, began)
        if is_news:
            text = "%s sends more than %d requests a minute; answers of 429 to all addresses so far: %d"
            log.warning(text, peer, self._settings.requests_per_minute, self.answers[int(reply.status)])
        if is_told:
            path_text = _ID.sub("/v1/requests/…", path)  # the id alone gets the answer
            text = "%s %s from %s: %d in %.0f ms"
            about = {"request": request_id, "requester": peer, "outcome": str(int(reply.status))}
            milliseconds = 1000 * (time.monotonic() - began)
            log.info(
                text, one_line(method, 20), one_line(path_text, 200), peer, reply.status, milliseconds, extra=about
            )
        parts = () if method == "HEAD" else (reply.body, reply.end)
        headers = {
            "Content-Type": reply.kind,
            "Content-Length": str(sum(map(len, parts))),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "X-Request-Id": request_id,
            **{name.replace("_", "-").title(): value for name, value in reply.headers.items()},
        }
        start(f"{int(reply.status)} {reply.status.phrase}", list(headers.items()))
        # cheroot copies each piece that it sends
        return (part[at : at + _PIECE_BYTES] for part in parts for at in range(0, len(part), _PIECE_BYTES))

    def _seconds_too_early(self, peer: str, now: float) -> float:
        with self._mutex:
            return self._rate.take(peer, now)

    def _too_early(self, seconds: float) -> Reply:
        text = f"wanted at most {self._settings.requests_per_minute} requests a minute from one address, found more"
        return Reply.error(HTTPStatus.TOO_MANY_REQUESTS, text, retry_after=str(math.ceil(seconds)))

    def _assert_monitor(self, peer: str) -> None:
        address = ipaddress.ip_address(peer)
        address = getattr(address, "ipv4_mapped", None) or address  # as a socket for both families writes IPv4
        if self._monitors and not any(address in network for network in self._monitors):
            text = f"wanted an address that may read {METRICS}, found {peer}"
            raise TurnedAwayError(
                Reply.error(HTTPStatus.FORBIDDEN, BridgeError(text, hint="serve.metrics_for of the door"))
            )

    def _reply(self, environ: Environ) -> Reply:
        path = environ["PATH_INFO"]
        if path == METRICS:
            self._assert_monitor(environ["REMOTE_ADDR"])
        if path == "/v1/requests":
            assert_method(environ, "POST")
            return self._post(environ)
        for beginning, reply in self.below.items():
            if path.startswith(beginning):
                return reply(environ)
        for pattern, get in self._paths.items():
            if (match := pattern.fullmatch(path)) is not None:
                assert_method(environ, "GET")
                return get(*match.groups())
        return Reply.error(HTTPStatus.NOT_FOUND, "this door has no such page")

    def _issuers(self, authority: str) -> Reply:
        if not (chain := self.signing.chains.get(authority, ())):
            text = f"the CA of {authority} was not reached yet"
            return Reply.error(HTTPStatus.SERVICE_UNAVAILABLE, text, retry_after=str(_PAUSE_SECONDS))
        return Reply(status=HTTPStatus.OK, body=pem(*chain), kind=_CHAIN)

    # --- our own requests ---------------------------------------------------------------------------------------------

    def _post(self, environ: Environ) -> Reply:
        if self.ending.is_set():
            text = "this door is shutting down"
            return Reply.error(HTTPStatus.SERVICE_UNAVAILABLE, text, retry_after=str(_SOON_SECONDS))
        data = json_body(environ)
        try:
            read = self.signing.read(data, environ["REMOTE_ADDR"])
        except BundleError as e:
            return Reply.error(HTTPStatus.BAD_REQUEST, e)
        except BusyError as e:
            return Reply.error(HTTPStatus.SERVICE_UNAVAILABLE, e, retry_after=str(_PAUSE_SECONDS))
        kept = self.memory.find(read.digest, "digest")
        if kept is None:
            request_id = self._receive(environ, data, read)
        else:
            request_id = kept.id
            if kept.state != "answered" and self.asker(environ):
                self.keep(environ, data, read, self.now())
        self.signing.arrived.set()
        document = {"id": request_id, "digest": read.digest, "state": "waiting" if kept is None else kept.state}
        place, soon = (
            f"/v1/requests/{request_id}",
            str(self._soon_seconds(self.now() if kept is None else kept.received)),
        )
        return Reply.of(HTTPStatus.ACCEPTED, document, location=place, retry_after=soon)

    def _receive(self, environ: Environ, data: bytes, read: ReadBundle) -> str:
        """Store a new request, and return its id."""
        peer, bundle = environ["REMOTE_ADDR"], read.bundle
        try:
            used = self._enrolment(str(environ.get("HTTP_AUTHORIZATION", "")), read)
            vouched = frozenset(used.vouches(bundle) if used is not None else ())
            if read.by is None or vouched:
                read = self.signing.judged(read, vouched)
            identity = self.signing.identity(read, is_named=used is not None)
            if reason := self.signing.refused(read, identity, vouched):
                raise _refused(read, peer, reason)
            self.assert_room(peer, is_judged=self.signing.judges(bundle), size=len(data))
            if identity.is_proven and self.memory.undecided_of(bundle.node, bundle.cluster) >= _MOST_UNDECIDED:
                text = f"wanted at most {_MOST_UNDECIDED} requests of one node that wait for people, found as many"
                raise away(HTTPStatus.TOO_MANY_REQUESTS, text, retry_after=str(_PAUSE_SECONDS))
            more = {"named": identity.is_proven, "enrolment": used.id if used is not None else None}
            request_id = self.keep(environ, data, read, self.now(), **more)
        except EnrolmentError as e:
            raise _refused(read, peer, e) from None
        text, short = "request %s of %s was received", read.digest[:16]
        log.info(text, short, bundle.node, extra={"request": short, "requester": peer})
        return request_id

    def keep(self, environ: Environ, data: bytes, read: ReadBundle, now: datetime, **more: Any) -> str:
        """Store a new request for the next round, and return its id; `more` and errors as in `DoorDatabase.receive`."""
        who = {"node": read.bundle.node, "cluster": read.bundle.cluster, "peer": environ["REMOTE_ADDR"]}
        who["asked_by"] = self.asker(environ)
        request_id = self.memory.receive(data, digest=read.digest, now=now, **who, **more)
        self.signing.arrived.set()
        return request_id

    def _enrolment(self, authorization: str, read: ReadBundle) -> Enrolment | None:
        """Return the enrolment that the header proves; a bad one is no error if another request has a continuity proof."""
        if not authorization:
            return None
        try:
            return enrolments.proven_by(self.memory, authorization, read.bundle, read.digest, self.now())
        except EnrolmentError as e:
            if any(request.proof is not None for request in read.bundle.requests):  # the policy refuses the others
                log.warning("request %s of %s: %s", read.digest[:16], read.bundle.node, e)
                return None
            raise

    def assert_room(self, peer: str, *, is_judged: bool, size: int = 0) -> None:
        """
        Reject a request of this size if no more requests of this address, or of any address, may wait.

        Requests that could not be judged get a tenth of the places, so that strangers take no node's place, and no memory.
        """
        every, theirs = self.memory.unanswered(peer)
        later = {"retry_after": str(_PAUSE_SECONDS)}
        kind, part = ("requests", 1) if is_judged else ("requests of a CA that was not reached yet", _PART_UNJUDGED)
        most, most_theirs = -(-self._settings.waiting // part), -(-self._settings.waiting_per_peer // part)
        if theirs >= most_theirs:
            text = f"wanted at most {most_theirs} {kind} of one address that wait, found {theirs}"
            raise away(HTTPStatus.TOO_MANY_REQUESTS, text, **later)
        if not is_judged and size > _LONGEST_UNJUDGED_BYTES:
            text = f"wanted at most {_LONGEST_UNJUDGED_BYTES} bytes for a CA that was not reached yet, found {size}"
            raise away(HTTPStatus.SERVICE_UNAVAILABLE, text, **later)
        if every >= most:
            text = f"wanted at most {most} {kind} that wait, found {every}"
            raise away(HTTPStatus.SERVICE_UNAVAILABLE, text, **later)

    def _answer(self, request_id: str) -> Reply:
        kept = self.memory.find(request_id)
        if kept is None:
            return Reply.error(HTTPStatus.NOT_FOUND, f"there is no request {one_line(request_id, 16)}")
        if self._pause_seconds(kept) == _SOON_SECONDS:  # its turn may come before the node polls again
            kept = self.awaited(kept, timedelta(seconds=_SOON_SECONDS))
        if kept.answer is not None:
            return Reply(status=HTTPStatus.OK, body=kept.answer)
        if kept.state == "answered":
            return Reply.error(HTTPStatus.GONE, "the answer is too old, and no longer kept (serve.keep)")
        document = {"id": kept.id, "digest": kept.digest, "state": kept.state, "note": _note(kept)}
        return Reply.of(HTTPStatus.ACCEPTED, document, retry_after=str(self._pause_seconds(kept)))

    def awaited(self, kept: Kept, limit: timedelta) -> Kept:
        """Return the request once it is answered or left to people, or at the limit, or at once if many threads wait."""
        if _is_over(kept) or not self._places.acquire(blocking=False):
            return kept
        limit = min(limit, self._settings.exchange_for / 2)
        try:
            return wait_until(lambda: self.memory.find(kept.id) or kept, _is_over, limit, pause_seconds=_LOOK_SECONDS)
        finally:
            self._places.release()

    def _pause_seconds(self, kept: Kept) -> int:
        """Return the seconds until a node should poll again."""
        is_new = kept.begun is None or self.now() - kept.received < _SOON_FOR
        return self._soon_seconds(kept.received) if is_new else _LATER_SECONDS

    def _soon_seconds(self, received: datetime) -> int:
        """Return the seconds until about the turn of a request that came at this time."""
        return min(max(_SOON_SECONDS, self.memory.ahead_of(received) // _PACE), _LATER_SECONDS)

    def _certificate(self, name: str, csr: str) -> Reply:
        chain = self.memory.issued_among([csr]).get((csr, name))
        if chain is None:
            return Reply.error(HTTPStatus.NOT_FOUND, "nothing was signed here for this CSR")
        return Reply(status=HTTPStatus.OK, body=chain, kind=_CHAIN)


def _is_over(kept: Kept) -> bool:
    return kept.answer is not None or kept.state not in TO_SIGN


def away(status: HTTPStatus, error: BridgeError | str, **headers: str) -> TurnedAwayError:
    """Return an exception that ends the request with this error."""
    return TurnedAwayError(Reply.error(status, error, **headers))


def assert_method(environ: Environ, *allowed: str) -> None:
    """Reject a request with another method."""
    if environ["REQUEST_METHOD"] not in allowed:
        methods = ", ".join(allowed)
        raise away(HTTPStatus.METHOD_NOT_ALLOWED, f"this page takes {methods} alone", allow=methods)


def kind_of(environ: Environ) -> str:
    """Return the media type of a request's body, without its parameters."""
    return str(environ.get("CONTENT_TYPE", "")).partition(";")[0].strip()


def body_of(environ: Environ) -> bytes:
    """Read all of a request's body, since closing a connection with unread bytes loses the answer."""
    data: bytes = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    return data


def json_body(environ: Environ) -> bytes:
    """Return a JSON request's body, not parsed; reject a request with another media type."""
    if kind_of(environ) != "application/json":
        raise away(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "wanted Content-Type: application/json")
    return body_of(environ)


def _refused(read: ReadBundle, peer: str, reason: BridgeError | str) -> TurnedAwayError:
    text, short = "request %s of %s from %s is refused: %s", read.digest[:16]
    log.warning(text, short, read.bundle.node, peer, one_line(reason, 2000), extra={"request": short})
    return away(HTTPStatus.FORBIDDEN, reason)


def _note(kept: Kept) -> str:
    """Return why a request waits, without a CA's or the database's error, since clients may be anyone."""
    if kept.state == "undecided":
        return f"people decide about request {kept.digest[:16]}"
    if kept.note:
        return f"request {kept.digest[:16]} waits at the door, whose log says why"
    return f"request {kept.digest[:16]} waits for its turn"


def monitors_page(status: int, text: str, end: bytes = b"") -> Reply:
    """Return a page of `bridge.system.metrics` as an answer."""
    kind = "text/plain; version=0.0.4; charset=utf-8"
    return Reply(status=HTTPStatus(status), body=text.encode(), end=end, kind=kind)
