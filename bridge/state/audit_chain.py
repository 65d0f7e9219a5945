"""
The audit log's files: lines that hold the SHA-256 of the line before them, added behind the last good one.

A line's digest is that of its exact bytes, newline included, so that `sed -n 5p audit.jsonl | sha256sum` gives what
line 6 must hold. The newest number and digest are in `audit.head` as well, so that a cut end is noticed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.errors import Exit
from bridge.state.store import Store
from bridge.system.files import append, sync_directory, write_atomically
from bridge.system.state_file import OnDamage, StateDamagedError, StateFile

log = logging.getLogger("ca-bridge")

SCHEMA_VERSION = 1
#: What the first line holds in the place of a digest.
ZEROS = "0" * 64
#: The event of a line that tells that the log was not as it was left.
DAMAGED = "damaged"

#: `json.dumps` would make an encoder for each line.
_encode = json.JSONEncoder(separators=(",", ":")).encode
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Link:
    """A line's place in the chain."""

    sequence: int  #: From 1; 0: before the first line.
    sha256: str


START = Link(0, ZEROS)


@dataclass(frozen=True, slots=True, kw_only=True)
class _End:
    """Where a writer has left the file; another end is not his."""

    device: int
    inode: int
    size: int
    changed_ns: int
    link: Link
    doer: Mapping[str, str]  #: Who this process is to the record.

    @classmethod
    def of(cls, path: Path, link: Link, doer: Mapping[str, str]) -> _End | None:
        """The end of the file as it is now; None: it can't be looked at."""
        try:
            found = path.lstat()
        except OSError:
            return None
        return cls(
            device=found.st_dev,
            inode=found.st_ino,
            size=found.st_size,
            changed_ns=found.st_mtime_ns,
            link=link,
            doer=doer,
        )


class Chain:
    """The log's end, to which lines are added; the state directory's lock is held meanwhile."""

    def __init__(self, store: Store, rotate_at_bytes: int, who: Callable[[], Mapping[str, str]]) -> None:
        """
        Args:
            store: Where the files are.
            rotate_at_bytes: A file of this size gets no more lines.
            who: Tells who this process is, for each line.
        """
        self._store = store
        self._limit = rotate_at_bytes
        self._who = who
        self._end: _End | None = None

    def add(self, events: Sequence[Mapping[str, Any]], *, head_later: bool = False) -> list[bytes]:
        """
        Add lines, safe on disk; where the file's end is still the one that we made, it is not looked for again.

        Args:
            events: At least one.
            head_later: `write_head` follows.

        Returns:
            The lines, those about a damage among them.

        Raises:
            OSError, StateError: None of them was added.
        """
        path, end = self._store.audit, self._end
        self._end = None
        if head_later and end is not None and end.size < self._limit and end == _End.of(path, end.link, end.doer):
            lines, last = _chained(events, end.link, end.doer)
            append(path, b"".join(lines))
        else:
            lines, last = self._add_after_a_look(events, head_later=head_later)
        self._end = _End.of(path, last, end.doer if end is not None else self._who()) if head_later else None
        return lines

    def _add_after_a_look(self, events: Sequence[Mapping[str, Any]], *, head_later: bool) -> tuple[list[bytes], Link]:
        """Add lines behind the last good one, with one write and one fsync."""
        store = self._store
        if not store.audit_head.exists() and not files(store):
            _write_head(store, START)  # before the first line, so that a missing head always means something
        last, troubles = _set_aside_torn(store)
        last, more = _continued(store, last)
        damages = [_damage(events[0], text) for text in (*troubles, *more)]
        if store.audit.exists() and store.audit.stat().st_size >= self._limit:
            _rotate(store, last)
        lines, last = _chained([*damages, *events], last, self._who())
        append(store.audit, b"".join(lines))
        if not head_later:
            _write_head(store, last)
        return lines, last

    def write_head(self) -> None:
        """
        Write down which line is the newest.

        Raises:
            OSError, StateError: It could not be written.
        """
        last, _ = _set_aside_torn(self._store)
        if last.sequence and head_if_any(self._store) != last:
            _write_head(self._store, last)


def _damage(event: Mapping[str, Any], text: str) -> dict[str, Any]:
    log.warning("the audit log was damaged: %s", text)
    return {"run": event["run"], "time": event["time"], "event": DAMAGED, "result": text, "exitCode": Exit.FAILED}


def _chained(events: Sequence[Mapping[str, Any]], last: Link, doer: Mapping[str, str]) -> tuple[list[bytes], Link]:
    lines = []
    for event in events:
        sequence = last.sequence + 1
        place = {"schemaVersion": SCHEMA_VERSION, "sequence": sequence, "previous": last.sha256}
        lines.append(_encode({**place, **event, **doer}).encode() + b"\n")
        last = Link(sequence, sha256_of(lines[-1]))
    return lines, last


def files(store: Store) -> list[Path]:
    """The log's files, oldest first."""
    rotated = [path for path in store.directory.glob("audit-*.jsonl") if re.fullmatch(r"audit-\d+\.jsonl", path.name)]
    return [*sorted(rotated, key=lambda path: int(path.stem[6:])), *([store.audit] if store.audit.exists() else [])]


def _write_head(store: Store, link: Link) -> None:
    _head_file(store).replace({"sequence": link.sequence, "sha256": link.sha256})


def _head_file(store: Store) -> StateFile[Link]:
    return StateFile(
        path=store.audit_head,
        what="the newest line's number and digest",
        parse=lambda document: Link(int(document["sequence"]), str(document["sha256"])),
        keys=frozenset({"sequence", "sha256"}),
        on_damage=OnDamage.REFUSE,  # here by a line of the record, which goes on after its last good one
    )


def _rotate(store: Store, last: Link) -> None:
    """The file keeps its lines under a name with the number of its last one; the next file goes on with the chain."""
    _write_head(store, last)  # or a crash in between could leave it behind the lines that are no longer looked at
    store.audit.rename(store.directory / f"audit-{last.sequence:08}.jsonl")
    sync_directory(store.directory)


def _set_aside_torn(store: Store) -> tuple[Link, list[str]]:
    """The last good line; what stands behind it (a crash cut it) is moved to a file of its own."""
    data = _tail(store.audit)
    if data.endswith(b"\n") and (last := _link(data.splitlines(keepends=True)[-1])) is not None:
        return last, []
    data = store.audit.read_bytes() if store.audit.exists() else b""
    good, last = _good_part(data)
    torn = data[good:]
    if not torn:
        return last, []
    kept = store.directory / f"audit.torn-{last.sequence + 1}-{sha256_of(torn)[:8]}"
    write_atomically(kept, torn)
    os.truncate(store.audit, good)
    return last, [
        f"{len(torn)} bytes after line {last.sequence} were no line; SHA-256 {sha256_of(torn)}, kept in {kept.name}"
    ]


def _tail(path: Path) -> bytes:
    """The last lines; the first of them may be cut."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return file.read()
    except FileNotFoundError:
        return b""


def _good_part(data: bytes) -> tuple[int, Link]:
    """How many bytes end with a good line, and that line."""
    end = len(data)
    while end:
        begin = data.rfind(b"\n", 0, end - 1) + 1
        last = _link(data[begin:end])
        if last is not None:
            return end, last
        end = begin
    return 0, START


def _continued(store: Store, last: Link) -> tuple[Link, list[str]]:
    """
    The link at which the chain goes on: after the newest line that was ever written.

    A crash may have come between a line and the head, which is then behind. A head that is ahead, or tells another
    digest, means that lines were cut or changed: the chain goes on after what the head knows, and so it stays visible.
    """
    try:
        head = _head(store)
    except ValueError as e:
        return last, [str(e)]
    if head.sequence < last.sequence:
        return last, []
    if head != last and store.audit.exists():
        return head, [f"wanted line {head.sequence} with SHA-256 {head.sha256} at the end, found line {last.sequence}"]
    return head, []


def _head(store: Store) -> Link:
    """
    Raises:
        ValueError: There is none, or a damaged one.
        StateUnreadableError: It can't be read at this moment.
    """
    try:
        head = _head_file(store).read()
    except StateDamagedError:
        head = None
    if head is None:
        raise ValueError(f"wanted the newest line's number in {store.audit_head.name}, found none")
    return head


def head_if_any(store: Store) -> Link | None:
    """The newest line that was ever written, by `audit.head`; None: that is not there, or damaged."""
    try:
        return _head(store)
    except ValueError:
        return None


def sha256_of(data: bytes) -> str:
    """The SHA-256 of a line's bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def line_of(line: bytes) -> dict[str, Any] | None:
    """Parse a line of the log; None: it is none, or not whole."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    ours = isinstance(value, dict) and type(value.get("sequence")) is int and isinstance(value.get("previous"), str)
    return value if ours and line.endswith(b"\n") else None


def _link(line: bytes) -> Link | None:
    value = line_of(line)
    return Link(value["sequence"], sha256_of(line)) if value is not None else None
