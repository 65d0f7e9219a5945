"""
The clients that still use the old CA, by audit logs, logged refusals and metrics of API servers. Any client's requests
shape those logs: we read them line by line, and believe a line only about itself (measured on 1.37).
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import math
import re
import time
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO

from cryptography import x509

from bridge.cluster import mapping
from bridge.cluster.api import Api, NoAnswerError
from bridge.control_plane import neighbours
from bridge.errors import BridgeError, Exit
from bridge.node.endpoints import Server
from bridge.node.inventory import Node
from bridge.pki.budget import MOST_OF_SERVER, Budget, json_of
from bridge.pki.certificates import fingerprint, leads_to, load_pem_certificates, name_text
from bridge.pki.expiry import duration_text
from bridge.rotation import Change
from bridge.settings.tables import Settings
from bridge.state import Store, audit
from bridge.state.session import Now
from bridge.system.codec import named
from bridge.system.files import reasons
from bridge.system.paths import read_present, regular_file
from bridge.words import one_line

_CREDENTIAL_ID = "authentication.kubernetes.io/credential-id"
_IS_CERTIFICATE = "X509SHA256="
#: The longest line; an event with the request's body has a megabyte or more.
_LONGEST_LINE = 4 << 20
#: The most users, and addresses, that we count; a cluster has hundreds.
_MOST_USERS = 10_000
_MOST_TEXT = 200
#: How kube-apiserver begins each event. An event in another layout is parsed, to be sure.
_EVENT_BEGINS = re.compile(rb'\{"kind":"Event","apiVersion":"audit\.k8s\.io/')
_EVENT_TIME = re.compile(rb'"stageTimestamp": ?"([0-9T:.+Z-]{20,32})"')


class UnreadableLogError(BridgeError):
    """A named file can't be read."""

    exit_code = Exit.USAGE


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """The last use of a client certificate that is not known to be the new CA's."""

    sha256: str
    name: str
    groups: tuple[str, ...]
    address: str
    agent: str
    time: str

    def __str__(self) -> str:
        """For the screen."""
        groups = f" ({', '.join(self.groups)})" if self.groups else ""
        return f"{self.name}{groups}, certificate {self.sha256[:8]}, last at {self.time} from {self.address} by {self.agent}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A client, by address, that rejects a serving certificate, or a client certificate that an API server rejects."""

    who: str
    count: int

    def __str__(self) -> str:
        """For the screen."""
        return f"{self.who}, {self.count} times"


# --- clients with certificates of the old CA --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Users:
    """The users of client certificates in audit logs."""

    users: list[User]
    unread: int  #: The number of lines that are too long or no events; they may hide clients.
    events: int  #: The number of events that were read.
    begin: str  #: The times of the first and the last event, as the API server writes them.
    end: str

    @property
    def read(self) -> str:
        """The events that were read, for the screen."""
        return f"{self.events} events from {self.begin or 'an unknown time'} to {self.end or 'an unknown time'}"


def users(logs: Sequence[Path], known: Collection[str]) -> Users:
    """List users in audit logs whose certificate is not in `known`, by SHA-256 (UnreadableLogError: also for no event)."""
    by_digest: dict[str, User] = {}
    unread = events = 0
    begin = end = ""
    for path in logs:
        events_before = events
        for line in _lines([path]):
            event = _event(line)
            if event is None:
                unread += 1
                continue
            events += 1
            if written := _EVENT_TIME.findall(line)[-1:]:
                at = written[0].decode("ascii")
                begin, end = min(begin or at, at), max(end, at)
            for user in _users_of(event):
                is_new = user.sha256 not in by_digest
                if user.sha256 in known or (is_new and len(by_digest) == _MOST_USERS):
                    continue
                if is_new or by_digest[user.sha256].time <= user.time:
                    by_digest[user.sha256] = user
        if events == events_before:
            raise UnreadableLogError(f"{path}: wanted an audit log, found no line that is an API server's event")
    by_name = sorted(by_digest.values(), key=lambda user: (user.name, user.time))
    return Users(by_name, unread, events, begin, end)


def _event(line: bytes) -> dict[str, Any] | None:
    """Parse the event of a line, to {} if it names no certificate; None: the line is no event, or too long."""
    if _IS_CERTIFICATE.encode() not in line and _EVENT_BEGINS.match(line):
        return {}
    with contextlib.suppress(ValueError):
        event = json_of(line, Budget(_LONGEST_LINE, MOST_OF_SERVER))
        if isinstance(event, dict) and str(event.get("apiVersion")).startswith("audit.k8s.io/"):
            return event
    return None


def _users_of(event: Mapping[str, Any]) -> Iterator[User]:
    """Yield the user of an event once for each certificate; none for an event of an unexpected shape."""
    user = mapping(event, "user")
    ids = mapping(user, "extra").get(_CREDENTIAL_ID)
    for each in ids if isinstance(ids, list) else ():
        digest = str(each).partition(_IS_CERTIFICATE)[2].lower()
        if re.fullmatch(r"[0-9a-f]{64}", digest):
            yield User(
                sha256=digest,
                name=_word(user.get("username")),
                groups=tuple(_texts(user.get("groups"))),
                address=", ".join(_texts(event.get("sourceIPs"))) or "an unknown address",
                agent=_word(event.get("userAgent")) or "an unknown program",
                time=_word(event.get("stageTimestamp")),
            )


def _word(value: Any) -> str:
    return one_line(value[:_MOST_TEXT]) if isinstance(value, str) else ""


def _texts(value: Any) -> list[str]:
    return [_word(text) for text in value[:8]] if isinstance(value, list) else []


def known(node: Node, store: Store, change: Change, issued: Sequence[Path]) -> set[str]:
    """Return the SHA-256 of the new CA's certificates: here, from this node's runs, or in files (UnreadableLogError)."""
    return {fingerprint(leaf) for leaf in leaves_of_the_new_ca(node, change, issued)} | set(_installed(store, change))


def leaves_of_the_new_ca(node: Node, change: Change, issued: Sequence[Path]) -> list[x509.Certificate]:
    """List the new CA's leaves on this node, and in the files or directories of `issued` (UnreadableLogError)."""
    leaves = [item.certificates for item in node.items if item.certificates]
    named = [[certificate] for path in issued for certificate in _certificates(path)]
    return [chain[0] for chain in (*leaves, *named) if leads_to(chain, (change.new,))]


def _installed(store: Store, change: Change) -> Iterator[str]:
    """Yield digests from our own audit log, by the issuer's name, unless both CAs have the same name."""
    if change.old.subject == change.new.subject:
        return
    issuer = name_text(change.new.subject)
    for line in _lines(audit.files(store)):
        said = audit.line_of(line) or {}
        if said.get("issuer") == issuer and isinstance(digest := said.get("certificateSha256"), str):
            yield digest


def _certificates(path: Path) -> Iterator[x509.Certificate]:
    """Yield all certificates in a PEM file, or in the files of a directory."""
    with reasons(UnreadableLogError, f"{path}: can't read its certificates"):
        files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    for file in files:
        with reasons(UnreadableLogError, f"{file}: can't read its certificates"):
            data = read_present(file)
        with contextlib.suppress(ValueError):  # a CA's directory also has other files
            yield from load_pem_certificates(data)


# --- clients that trust the old CA alone ------------------------------------------------------------------------------

#: The alerts of Go and OpenSSL clients that do not trust the server's certificate; logged from verbosity 5 on.
_HANDSHAKE = re.compile(
    r"TLS handshake error from ([0-9A-Fa-f.:\[\]%a-z]{2,60}):\d{1,5}: remote error: tls: "
    r"(?:bad certificate|unknown certificate authority|unknown certificate)"
)
#: The head of a line in both of Kubernetes's formats of logs, text and JSON.
_LOGGED = re.compile(rb'[IWEF]\d{4} .{0,60}?\S\.go:\d+\]|\{"ts":\d')
#: A client certificate from none of the API server's CAs; logged at any verbosity.
_UNKNOWN = re.compile(r"verifying certificate SN=(\d{1,50}), SKID=[0-9A-F:]{0,60}, AKID=([0-9A-F:]{0,60}) failed")


def refusals(logs: Sequence[Path]) -> list[Refusal]:
    """List the refusals of both kinds in API servers' logs, the most frequent first (UnreadableLogError)."""
    counts: dict[str, int] = {}
    for path in logs:
        is_log = False
        for line in _lines([path]):
            is_log = is_log or _LOGGED.search(line) is not None
            for who in _refused(line.decode("utf-8", errors="replace")):
                if who in counts or len(counts) < _MOST_USERS:
                    counts[who] = counts.get(who, 0) + 1
        if not is_log:
            raise UnreadableLogError(f"{path}: wanted an API server's log, found no line that an API server writes")
    return [Refusal(who, count) for who, count in sorted(counts.items(), key=lambda item: -item[1])]


def _refused(line: str) -> Iterator[str]:
    if match := _HANDSHAKE.search(line):
        yield f"a client at {match[1]} does not trust the API server's certificate"
    if match := _UNKNOWN.search(line):
        whose = f"serial number {int(match[1]):X}, of the CA with the key identifier {match[2] or '(none)'}"
        yield f"the client certificate with {whose}, is of no CA that the API server trusts"


# --- requests by the expiry of their certificates ---------------------------------------------------------------------

#: The time left of the client certificate, counted for each request that has one, refused or not (Kubernetes 1.37).
_LEFT = re.compile(
    rb'apiserver_client_certificate_expiration_seconds_bucket\{le="([0-9.e+]{1,24}|\+Inf)"\} ([0-9.e+]{1,24})'
)
_FAILED = re.compile(rb"apiserver_tls_handshake_errors_total ([0-9.e+]{1,24})")
_SILENCE_SECONDS = 10.0
_LONGEST_SAMPLE = 1 << 16
_MOST_SAMPLES = 2_000_000


class UncountedError(BridgeError):
    """An API server's metrics lack the metric of client certificates, or have it in another form."""


@dataclass(frozen=True, slots=True)
class Counters:
    """An API server's counters since its start."""

    left: Mapping[float, float]  #: Requests by upper bound: certificates with at most this many seconds left.
    failed: float  #: Failed TLS handshakes.

    @property
    def buckets(self) -> Iterator[tuple[float, float, float]]:
        """Each bucket's lower and upper bound in seconds, and its requests; the first is for expired certificates."""
        below, counted = -math.inf, 0.0
        for most, count in sorted(self.left.items()):
            yield below, most, count - counted
            below, counted = most, count


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """Requests to one API server with client certificates in the same bucket of remaining time."""

    server: str
    count: int
    more_than: timedelta | None = field(metadata=named("moreThanSeconds"))  #: None: the certificates have expired.
    at_most: timedelta | None = field(metadata=named("atMostSeconds"))  #: None: no upper bound.
    #: Whether a known certificate of the new CA is in the same bucket.
    is_like_new: bool = field(metadata=named("isLikeNew"))

    def __str__(self) -> str:
        """For the screen."""
        ends = [
            f"in more than {duration_text(self.more_than)}" if self.more_than else "",
            f"in at most {duration_text(self.at_most)}" if self.at_most else "",
        ]
        when = " and ".join(filter(None, ends)) or "already"
        whose = (
            "certificates of the new CA do, too, so that it can't be said whose these are"
            if self.is_like_new
            else "no certificate that is known to be of the new CA does"
        )
        return f"{self.server}: {self.count} requests with a client certificate that ends {when}: {whose}"


def counters(api: Api) -> Counters:
    """Read the counters from the first server's metrics (NoAnswerError; UncountedError: the metrics do not have them)."""
    left: dict[float, float] = {}
    failed = 0.0
    with api.lines("/metrics", _SILENCE_SECONDS, _LONGEST_SAMPLE) as lines:
        for line in itertools.islice(lines, _MOST_SAMPLES):
            if match := _LEFT.fullmatch(line):
                left[float(match[1])] = float(match[2])
            elif match := _FAILED.fullmatch(line):
                failed = float(match[1])
    if math.inf not in left:
        raise UncountedError("wanted the metric apiserver_client_certificate_expiration_seconds, found none")
    return Counters(left, failed)


def requests(
    server: str, before: tuple[datetime, Counters], after: tuple[datetime, Counters], new: Collection[x509.Certificate]
) -> list[Requests]:
    """Return the requests between two readings of one API server, with their times (pure; ValueError: it restarted)."""
    (begin, first), (end, last) = before, after
    if any(count > last.left.get(most, 0.0) for most, count in first.left.items()) or first.failed > last.failed:
        raise ValueError(f"{server}: wanted one API server that counts, found that it was started anew: look again")
    counted = {most: count for _, most, count in first.buckets}
    ends = [leaf.not_valid_after_utc for leaf in new]
    lives = [((at - end).total_seconds(), (at - begin).total_seconds()) for at in ends]
    return [
        Requests(
            server=server,
            count=round(count - counted.get(most, 0.0)),
            more_than=timedelta(seconds=least) if least > 0 else None,
            at_most=timedelta(seconds=most) if 0 < most < math.inf else None,
            is_like_new=any(longest > least and rest <= most for rest, longest in lives),
        )
        for least, most, count in last.buckets
        if round(count - counted.get(most, 0.0)) > 0
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """What the counters of all API servers showed over a period."""

    requests: list[Requests] = field(metadata=named("byEnd"))
    failed: Mapping[str, int] = field(metadata=named("failedHandshakes"))  #: TLS handshakes, by server.
    troubles: list[str]  #: Why some servers gave no counters.


def watched(node: Node, settings: Settings, new: Collection[x509.Certificate], period: timedelta, now: Now) -> Watched:
    """Read each API server's counters twice, a period apart (NoAnswerError: the servers are not known)."""
    api = neighbours.connect(node, settings)
    apis = {name: Api(api.clients, [Server(url)]) for name, url in neighbours.api_servers(api, node)}
    first, troubles = _counted(apis, now)
    time.sleep(period.total_seconds())
    last, more = _counted(apis, now)
    found: list[Requests] = []
    failed: dict[str, int] = {}
    for name in (name for name in first if name in last):
        (_, begin, before), (end, _, after) = first[name], last[name]
        try:
            found += requests(name, (begin, before), (end, after), new)
            failed[name] = round(after.failed - before.failed)
        except ValueError as e:
            more.append(str(e))
    return Watched(requests=found, failed=failed, troubles=list(dict.fromkeys([*troubles, *more])))


def _counted(apis: Mapping[str, Api], now: Now) -> tuple[dict[str, _Look], list[str]]:
    """Read the counters of each server; return readings by server, and why others failed."""
    counts, troubles = {}, []
    for name, api in apis.items():
        begin = now()
        try:
            counted = counters(api)
        except NoAnswerError as e:
            troubles.append(f"{name}: its metrics were not read: {e}")
        except UncountedError as e:
            troubles.append(f"{name}: its requests were not counted: {e}")
        else:
            counts[name] = (now(), begin, counted)
    return counts, troubles


#: The end of a reading, its beginning, and the counters.
_Look = tuple[datetime, datetime, Counters]


def _lines(paths: Iterable[Path]) -> Iterator[bytes]:
    """Yield the lines of files, gzip or not, that may grow; a line that is too long is empty (UnreadableLogError)."""
    for path in paths:
        with (
            reasons(UnreadableLogError, f"{path}: wanted a log, found"),
            regular_file(path) as (descriptor, _),
            open(descriptor, "rb", closefd=False) as file,
        ):
            try:
                yield from _lines_of(gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == b"\x1f\x8b" else file)
            except (EOFError, zlib.error) as e:
                raise UnreadableLogError(f"{path}: wanted a whole gzip file, found: {e}") from e


def _lines_of(file: BinaryIO | gzip.GzipFile) -> Iterator[bytes]:
    is_rest = False
    while line := file.readline(_LONGEST_LINE):
        is_whole, was_rest = line.endswith(b"\n"), is_rest
        is_rest = not is_whole and len(line) == _LONGEST_LINE
        if not was_rest:
            yield b"" if is_rest else line
