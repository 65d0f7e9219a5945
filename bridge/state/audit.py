"""
The audit log: `state_dir/audit.jsonl`, one line of JSON for each event, each with the SHA-256 of the line before it.

A line's digest covers its exact bytes, newline included: `sed -n 5p audit.jsonl | sha256sum` prints the digest that line
6 must hold. `audit.head` has the newest number and digest, so that a missing end shows. A user who may write to the
state directory can rewrite the whole chain; only copies that leave the machine (syslog) reveal that.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Self

from cryptography import x509

from bridge.contract import SignRequest
from bridge.errors import BackendUnavailableError, BridgeError, Exit, WaitingError
from bridge.pki.certificates import UNREADABLE, csr_fingerprint, fingerprint, name_text, serial_hex
from bridge.pki.expiry import rfc3339
from bridge.settings.tables import AuditSettings
from bridge.state import Store
from bridge.system import console
from bridge.system.console import log, print_error
from bridge.system.files import append, digest, sync_directory, user_name, version, write_atomically
from bridge.system.state_file import OnDamage, StateDamagedError, StateError, StateFile, coded

SYSLOG = Path("/dev/log")

ASKED, ISSUED, VERIFIED, INSTALLED = "asked", "issued", "verified", "installed"
REFUSED, UNAVAILABLE, FAILED = "refused", "unavailable", "failed"
RECOVERED, ROLLED_BACK, RESTARTED = "recovered", "rolled-back", "restarted"
#: The content of a kubeadm configuration or a component's configuration changed; `result` names the file.
CONFIGURED = "configured"
#: Requested, signed and proven, but not installed.
REHEARSED = "rehearsed"
#: A copy of a kubeconfig, named in `result`, received the new certificate.
COPIED = "copied"
#: The CAs that the node trusts were changed; `result` lists them.
TRUSTED = "trusted"
#: A CA took the request and answers later; a request was given up.
PENDING, CANCELLED = "pending", "cancelled"
#: A CA's renewals fail again and again.
NEEDS_A_PERSON = "needs-a-person"
#: The event's `previousSerialNumber` is the revoked certificate's.
REVOKED = "revoked"
#: A node may request its first certificates with a one-time secret, or no longer may; `result` names the node.
ENROLLED, WITHDRAWN = "enrolled", "withdrawn"
#: The door's database was restored; a person confirmed that no CA signed the request of a door that is gone.
RESTORED, AGAIN = "restored", "again"
#: A person approved or refused a request; the line has the evidence.
APPROVED, NOT_APPROVED = "approved", "not-approved"
#: The log was changed or cut after its last line was written.
DAMAGED = "damaged"
#: Old files of the log were deleted, by `audit.keep_total`; the line has the last deleted line's number and digest.
RETIRED = "retired"

_LONGEST_RESULT = 2000
#: The latest lines' certificates: a gateway's certificate has two lines, up to fifty lines apart.
_REMEMBERED = 128
_SYSLOG_SECONDS = 1.0
#: Facility authpriv (10), severity notice (5), or critical (2) for events that need an operator: RFC 5424 §6.2.1.
_SYSLOG_PRIORITY = 10 * 8 + 5
_SYSLOG_LOUD = {NEEDS_A_PERSON: 10 * 8 + 2, DAMAGED: 10 * 8 + 2}


_REPAIR = "make room, or fix the state directory, and keep this message: the audit log does not have it"


class AuditError(BridgeError):
    """The audit log could not be written."""

    hint = "nothing is installed that the audit log can't have; make room, or fix the state directory, then run again"


def event_of(error: BridgeError) -> str:
    """The event to record for an error that kept a certificate from being installed."""
    if isinstance(error, BackendUnavailableError):
        return UNAVAILABLE
    if isinstance(error, WaitingError):
        return PENDING
    return REFUSED if error.exit_code == Exit.REFUSED else FAILED


@lru_cache(maxsize=_REMEMBERED)
def _facts(certificate: x509.Certificate) -> Mapping[str, str]:
    """A new certificate's facts; without an unreadable issuer, since a CA's answer is recorded before it is verified."""
    facts = {"certificateSha256": fingerprint(certificate), "serialNumber": serial_hex(certificate)}
    with contextlib.suppress(*UNREADABLE):
        facts["issuer"] = name_text(certificate.issuer)
    return facts


class Record:
    """The lines of one run, buffered until they are written together."""

    def __init__(self, store: Store, settings: AuditSettings) -> None:
        self.run_id = console.begin_run()  #: Each message of the run carries it.
        self._store = store
        self._settings = settings
        self._waiting: list[dict[str, Any]] = []
        self._known: dict[str, dict[str, Any]] = {}
        self.common: Mapping[str, Any] = {}  #: Facts that each later line repeats.
        self._end: _End | None = None  #: The file's end, if its head is written later.
        self._late: list[AuditError] = []

    def describe(self, name: str, request: SignRequest, backend: str, identity: str | None) -> None:
        """Remember facts that each later line about a certificate repeats."""
        old = request.replaces
        self._known[name] = {
            "csrSha256": csr_fingerprint(request.csr),
            "previousSerialNumber": _serial(old),
            "backend": backend,
            "identity": identity,
        }

    def add(
        self,
        event: str,
        name: str | None = None,
        *,
        authority: str | None = None,
        old: x509.Certificate | None = None,
        new: x509.Certificate | None = None,
        error: BridgeError | None = None,
        result: str = "ok",
        more: Mapping[str, str] | None = None,
    ) -> None:
        """Buffer a line about a certificate or the run, with an error or another result."""
        line = {
            "run": self.run_id,
            "time": rfc3339(datetime.now(UTC), "milliseconds"),
            "event": event,
            "name": name,
            "authority": authority,
            **self._known.get(name or "", {}),
            **self.common,
            **(more or {}),
            "result": (error.reason if error is not None else result)[:_LONGEST_RESULT],
            "exitCode": error.exit_code if error is not None else Exit.DONE,
        }
        if old is not None:
            line["previousSerialNumber"] = serial_hex(old)
        if new is not None:
            line |= _facts(new)
        self._waiting.append({key: value for key, value in line.items() if value is not None})

    def write(self, *, head_later: bool = False) -> None:
        """Write the lines to disk and sync them (AuditError); with `head_later` the caller writes the head."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        try:
            written = self._add_to_chain(waiting, head_later=head_later)
        except OSError as e:
            place = e.filename or self._store.audit
            raise AuditError(f"{place}: the audit log could not be written: {e.strerror}") from e
        except StateError as e:
            raise AuditError(f"the audit log could not be written: {e}") from e
        if self._settings.syslog:
            _tell_syslog(written)

    def write_head(self) -> None:
        """Record which line is the newest."""
        try:
            last, _ = _set_aside_torn(self._store)
            if last.sequence and head_if_any(self._store) != last:
                _head_file(self._store).put(last)
        except (OSError, StateError) as e:
            raise AuditError(f"the audit log could not be written: {e}") from e

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for error in self.end():  # however the run ended
            print_error(error)

    def end(self) -> list[AuditError]:
        """Write the lines, and return once each error about lines that `write_late` could not write."""
        self.write_late()
        late, self._late = self._late, []
        return late

    def write_late(self) -> None:
        """Write the lines; a failure is only logged, since it is too late to stop, and `end` returns it as an error."""
        lost = [f"{line['event']} {line.get('name', '')}".strip() for line in self._waiting]
        try:
            self.write()
        except AuditError as e:
            text = f"{e}; the audit log lacks of run {self.run_id}: {', '.join(lost)}"
            log.warning("%s", text)  # a restart may take minutes, and may be killed
            self._late.append(AuditError(text, hint=_REPAIR))

    # --- the chain's end; the caller holds the state directory's lock ---

    def _add_to_chain(self, events: Sequence[Mapping[str, Any]], *, head_later: bool = False) -> list[bytes]:
        """Append lines, safe on disk, and return them after lines about damage; after an error nothing was added."""
        path, end = self._store.audit, self._end
        self._end = None
        if head_later and end is not None and end.found.st_size < self._settings.rotate_at.count and end.is_of(path):
            lines, last = _chained(events, end.link, end.doer)
            found = append(path, b"".join(lines))
        else:
            lines, last, found = self._add_after_a_look(events, head_later=head_later)
        self._end = _End(found, last, end.doer if end is not None else who()) if head_later else None
        return lines

    def _add_after_a_look(
        self, events: Sequence[Mapping[str, Any]], *, head_later: bool
    ) -> tuple[list[bytes], Link, os.stat_result]:
        """Append lines after the last good one, with one write and one fsync."""
        store = self._store
        if not store.audit_head.exists() and not files(store):
            _head_file(store).put(START)  # before the first line, so that a missing head always means damage
        last, troubles = _set_aside_torn(store)
        last, more = _continued(store, last)
        own = [_damage(events[0], text) for text in (*troubles, *more)]
        old: list[Path] = []
        if store.audit.exists() and store.audit.stat().st_size >= self._settings.rotate_at.count:
            _rotate(store, last)
            old = self._outdated()
            own += [_retirement(events[0], old[-1])] if old else []
        lines, last = _chained([*own, *events], last, who())
        found = append(store.audit, b"".join(lines))
        _delete(old)  # not before the log records it
        if not head_later:
            _head_file(store).put(last)
        return lines, last, found

    def _outdated(self) -> list[Path]:
        """The oldest files that must be deleted to make room for one more; never the newest file."""
        if self._settings.keep_total is None:
            return []
        most = self._settings.keep_total.count - self._settings.rotate_at.count
        sizes = {path: path.stat().st_size for path in files(self._store)}
        old: list[Path] = []
        for path in list(sizes)[:-1]:
            if sum(sizes.values()) > most:
                old.append(path)
                del sizes[path]
        return old


def who() -> dict[str, str]:
    """The effective user, and the user who logged in (which neither sudo nor the environment changes)."""
    doer = {"user": user_name(os.geteuid()), "host": os.uname().nodename}
    try:
        login = int(Path("/proc/self/loginuid").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return doer  # a kernel without audit
    return doer if login == _NO_LOGIN else {**doer, "login": user_name(login)}


def person() -> str:
    """The user who logged in, before sudo."""
    doer = who()
    return doer.get("login") or os.environ.get("SUDO_USER") or doer["user"]


def about(
    certificates: Iterable[tuple[str, x509.Certificate | None, x509.Certificate | None]] = (), **more: object
) -> dict[str, object]:
    """The facts that a backup's manifest records: the command, its user, and names with their old and new certificates."""
    replaced = [
        {"name": name, "old_serial": _serial(old), "new_serial": _serial(new)} for name, old, new in certificates
    ]
    return {"command": shlex.join(sys.argv), **who(), "certificates": replaced, **more}


def _serial(certificate: x509.Certificate | None) -> str | None:
    return serial_hex(certificate) if certificate is not None else None


#: (uid_t) -1: the process was started by cron, by systemd or in a container.
_NO_LOGIN = 0xFFFFFFFF


def _tell_syslog(lines: Sequence[bytes]) -> None:
    """Send copies to this machine's syslog; a failure is only reported."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log_socket:
            log_socket.settimeout(_SYSLOG_SECONDS)
            log_socket.connect(str(SYSLOG))
            for line in lines:
                priority = _SYSLOG_LOUD.get(json.loads(line)["event"], _SYSLOG_PRIORITY)
                log_socket.send(f"<{priority}>ca-bridge[{os.getpid()}]: ".encode() + line.rstrip(b"\n"))
    except OSError as e:
        log.warning("%s: syslog did not get the line: %s", SYSLOG, e.strerror or type(e).__name__)


# --- the chain -------------------------------------------------------------------------------------------------------

SCHEMA_VERSION = 1
#: The first line holds this instead of a digest.
ZEROS = "0" * 64
#: A shared encoder, because `json.dumps` would make one for each line.
_encode = json.JSONEncoder(separators=(",", ":")).encode
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Link:
    """A line's place in the chain."""

    sequence: int  #: From 1; 0: before the first line.
    sha256: str


START = Link(0, ZEROS)


@dataclass(frozen=True, slots=True)
class _End:
    """The end of the file as this writer left it; if the end differs, another writer added lines."""

    found: os.stat_result
    link: Link
    doer: Mapping[str, str]  #: The user and host of this process.

    def is_of(self, path: Path) -> bool:
        """Whether the file still ends here; False also if it can't be read."""
        try:
            return version(path.lstat()) == version(self.found)
        except OSError:
            return False


def _damage(event: Mapping[str, Any], text: str) -> dict[str, Any]:
    log.warning("the audit log was damaged: %s", text)
    return {"run": event["run"], "time": event["time"], "event": DAMAGED, "result": text, "exitCode": Exit.FAILED}


def _retirement(event: Mapping[str, Any], newest: Path) -> dict[str, Any]:
    """The line that records which lines are deleted."""
    _, last = _good_part(_tail(newest))
    text = f"lines 1 to {last.sequence} are deleted (audit.keep_total)"
    about = {"run": event["run"], "time": event["time"], "event": RETIRED, "result": text, "exitCode": Exit.DONE}
    return {**about, "lastLine": last.sequence, "lastSha256": last.sha256}


def _delete(old: Sequence[Path]) -> None:
    for path in old:
        try:
            path.unlink()
        except OSError as e:  # the next rotation tries again
            log.warning("%s: can't delete this old part of the audit log: %s", path, e.strerror)


def _chained(events: Sequence[Mapping[str, Any]], last: Link, doer: Mapping[str, str]) -> tuple[list[bytes], Link]:
    lines = []
    for event in events:
        sequence = last.sequence + 1
        place = {"schemaVersion": SCHEMA_VERSION, "sequence": sequence, "previous": last.sha256}
        lines.append(_encode({**place, **event, **doer}).encode() + b"\n")
        last = Link(sequence, digest(lines[-1]))
    return lines, last


def files(store: Store) -> list[Path]:
    """The log's files, oldest first."""
    rotated = [path for path in store.directory.glob("audit-*.jsonl") if re.fullmatch(r"audit-\d+\.jsonl", path.name)]
    return [*sorted(rotated, key=lambda path: int(path.stem[6:])), *([store.audit] if store.audit.exists() else [])]


def _head_file(store: Store) -> StateFile[Link]:
    # `_continued` records damage in the log, which goes on after its last good line
    return coded(Link, store.audit_head, "the newest line's number and digest", OnDamage.REFUSE)


def _rotate(store: Store, last: Link) -> None:
    """Rename the file after the number of its last line; the next file continues the chain."""
    _head_file(store).put(last)  # or a crash in between could leave the head behind lines that are no longer checked
    store.audit.rename(store.directory / f"audit-{last.sequence:08}.jsonl")
    sync_directory(store.directory)


def _set_aside_torn(store: Store) -> tuple[Link, list[str]]:
    """Return the last good line; bytes after it, the rest of a write that a crash cut, are moved to a separate file."""
    data = _tail(store.audit)
    if data.endswith(b"\n") and (last := _link(data.splitlines(keepends=True)[-1])) is not None:
        return last, []
    data = store.audit.read_bytes() if store.audit.exists() else b""
    good, last = _good_part(data)
    torn = data[good:]
    if not torn:
        return last, []
    kept = store.directory / f"audit.torn-{last.sequence + 1}-{digest(torn)[:8]}"
    write_atomically(kept, torn)
    os.truncate(store.audit, good)
    return last, [
        f"{len(torn)} bytes after line {last.sequence} were no line; SHA-256 {digest(torn)}, kept in {kept.name}"
    ]


def _tail(path: Path) -> bytes:
    """The last lines of the file; the first of them may be incomplete."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return file.read()
    except FileNotFoundError:
        return b""


def _good_part(data: bytes) -> tuple[int, Link]:
    """The number of bytes up to the last good line, and that line."""
    end = len(data)
    while end:
        begin = data.rfind(b"\n", 0, end - 1) + 1
        last = _link(data[begin:end])
        if last is not None:
            return end, last
        end = begin
    return 0, START


def _continued(store: Store, last: Link) -> tuple[Link, list[str]]:
    """The link after which the chain continues: the newest line ever written, so that removed lines stay visible."""
    head = head_if_any(store)
    if head is None:
        return last, [f"{store.audit_head.name} has no number of the newest line"]
    if head.sequence < last.sequence:
        return last, []
    if head != last and store.audit.exists():
        return head, [f"wanted line {head.sequence} with SHA-256 {head.sha256} at the end, found line {last.sequence}"]
    return head, []


def head_if_any(store: Store) -> Link | None:
    """The newest line that was ever written, by `audit.head`; None: the file is missing or damaged."""
    try:
        return _head_file(store).read()
    except StateDamagedError:
        return None


def line_of(line: bytes) -> dict[str, Any] | None:
    """Parse a line of the log; None: it is no such line, or incomplete."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_of_the_log = (
        isinstance(value, dict) and type(value.get("sequence")) is int and isinstance(value.get("previous"), str)
    )
    return value if is_of_the_log and line.endswith(b"\n") else None


def _link(line: bytes) -> Link | None:
    value = line_of(line)
    return Link(value["sequence"], digest(line)) if value is not None else None


# --- read ------------------------------------------------------------------------------------------------------------

_WALKS = 3
_LINE_SECONDS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One fault of the audit log."""

    kind: str  #: changed, missing, out of order, broken, cut, no head
    first: int  #: Sequence number of the line; for `broken` its line number in the file.
    last: int
    place: str  #: File and line where it was noticed.

    def __str__(self) -> str:
        lines = f"line {self.first}" if self.first == self.last else f"lines {self.first} to {self.last}"
        return f"{self.place}: {_SENTENCES[self.kind].format(lines=lines)}"


_SENTENCES = {
    "changed": "{lines} was changed, or the link to it after it",
    "missing": "{lines}: missing here",
    "out of order": "{lines} was inserted, repeated or moved",
    "broken": "{lines} of this file is no line of the audit log (after a crash the next run sets a last one aside)",
    "cut": "{lines}: written once, found missing at the end",
    "no head": "there is no number of the newest line",
}


def verify(store: Store) -> tuple[int, list[Damage]]:
    """Count the lines of all files and find damage; repeat if there is any, since a run may be writing a line."""
    for _ in range(_WALKS):
        count, problems = _walk(store)
        if not problems:
            break
        time.sleep(_LINE_SECONDS)
    return count, problems


def _walk(store: Store) -> tuple[int, list[Damage]]:
    head = head_if_any(store)  # first: a run may be adding lines
    if head is None and not files(store):
        return 0, []
    head = head or head_if_any(store)  # a run writes the head before the very first lines
    count, problems = 0, []
    first = last = begin(store)
    known, retired = {START.sequence: START.sha256}, {START.sequence: START.sha256}
    for place, line in _lines(store):
        count += 1
        damages, last = _step(last, line, place)
        problems += damages
        retired |= _retired(line)
        if head is not None and last.sequence == head.sequence:
            known[last.sequence] = last.sha256
    if retired.get(first.sequence) != first.sha256:
        problems.insert(0, Damage(kind="missing", first=1, last=first.sequence, place=files(store)[0].name + ":1"))
    return count, problems + list(_against_head(head, last, known, store))


def begin(store: Store) -> Link:
    """The link before the first remaining line: old files may have been deleted."""
    first = next((line_of(line) for _, line in _lines(store)), None)
    return Link(first["sequence"] - 1, first["previous"]) if first is not None and first["sequence"] > 1 else START


def _retired(line: bytes) -> dict[int, str]:
    """The number and digest of the last deleted line, if this line records a deletion."""
    value = line_of(line) if f'"event":"{RETIRED}"'.encode() in line else None
    return {value["lastLine"]: value["lastSha256"]} if value is not None and "lastSha256" in value else {}


def _lines(store: Store) -> Iterator[tuple[str, bytes]]:
    """The lines of all files with their places; all files are opened first, since a run may rename one."""
    with contextlib.ExitStack() as stack:
        for name, file in _opened(store, stack):
            for number, line in enumerate(file, start=1):
                yield f"{name}:{number}", line


def _opened(store: Store, stack: contextlib.ExitStack) -> Sequence[tuple[str, BinaryIO]]:
    while True:
        there = files(store)
        try:
            opened = [(path.name, stack.enter_context(path.open("rb"))) for path in there]
        except FileNotFoundError:
            continue
        if files(store) == there:
            return opened


def _step(last: Link, line: bytes, place: str) -> tuple[list[Damage], Link]:
    value = line_of(line)
    if value is None:
        number = int(place.rpartition(":")[2])
        return [Damage(kind="broken", first=number, last=number, place=place)], Link(last.sequence + 1, digest(line))
    here = Link(value["sequence"], digest(line))
    if here.sequence <= last.sequence:
        return [Damage(kind="out of order", first=here.sequence, last=here.sequence, place=place)], here
    if here.sequence > last.sequence + 1:
        return [Damage(kind="missing", first=last.sequence + 1, last=here.sequence - 1, place=place)], here
    if value["previous"] != last.sha256:
        number = max(last.sequence, 1)
        return [Damage(kind="changed", first=number, last=number, place=place)], here
    return [], here


def _against_head(head: Link | None, last: Link, known: Mapping[int, str], store: Store) -> Iterator[Damage]:
    name = store.audit_head.name
    if head is None:
        yield Damage(kind="no head", first=0, last=0, place=name)
    elif head.sequence > last.sequence:
        yield Damage(kind="cut", first=last.sequence + 1, last=head.sequence, place=name)
    elif known.get(head.sequence) != head.sha256:
        yield Damage(kind="changed", first=head.sequence, last=head.sequence, place=name)


def events(store: Store, since: datetime | None, name: str | None) -> Iterator[dict[str, Any]]:
    """The lines since a time and about a certificate, exactly as written; `verify` reports unreadable lines."""
    for _, line in _lines(store):
        value = line_of(line)
        if value is None or (name is not None and value.get("name") != name):
            continue
        if since is None or _time(value) >= since:
            yield value


def _time(event: Mapping[str, Any]) -> datetime:
    try:
        time = datetime.fromisoformat(str(event.get("time")))
    except ValueError:
        return datetime.max.replace(tzinfo=UTC)  # show a changed line rather than hide it
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)
