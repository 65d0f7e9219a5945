"""The audit log read: is its chain whole, and what does it tell?"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, BinaryIO

from bridge.state.audit_chain import START, Link, files, head_if_any, line_of, sha256_of
from bridge.state.store import Store

_WALKS = 3
_LINE_SECONDS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One thing that is wrong with the record."""

    kind: str  #: changed, missing, out of order, broken, cut, no head
    first: int  #: Sequence number of the line; of `broken` its number in the file.
    last: int
    place: str  #: File and line where it was noticed.

    def __str__(self) -> str:
        lines = f"line {self.first}" if self.first == self.last else f"lines {self.first} to {self.last}"
        return f"{self.place}: {_SENTENCES[self.kind].format(lines=lines)}"


_SENTENCES = {
    "changed": "{lines} was changed, or the link to it after it",
    "missing": "{lines}: wanted here, found missing",
    "out of order": "{lines} was inserted, repeated or moved",
    "broken": "{lines} of this file is no line of the audit log (after a crash the next run sets a last one aside)",
    "cut": "{lines}: written once, found missing at the end",
    "no head": "wanted the newest line's number, found none",
}


def verify(store: Store) -> tuple[int, list[Damage]]:
    """
    Walk the chain through all files; once more if something is wrong, as a run may be in the middle of a line.

    Returns:
        The number of lines, and everything that is wrong.
    """
    for _ in range(_WALKS):
        count, found = _walk(store)
        if not found:
            break
        time.sleep(_LINE_SECONDS)
    return count, found


def _walk(store: Store) -> tuple[int, list[Damage]]:
    head = head_if_any(store)  # first: a run may be adding lines
    if head is None and not files(store):
        return 0, []
    head = head or head_if_any(store)  # a run that writes the very first lines makes it before them
    last, count, found = START, 0, []
    known = {START.sequence: START.sha256}
    for place, line in _lines(store):
        count += 1
        damages, last = _step(last, line, place)
        found += damages
        if head is not None and last.sequence == head.sequence:
            known[last.sequence] = last.sha256
    return count, found + list(_against_head(head, last, known, store))


def _lines(store: Store) -> Iterator[tuple[str, bytes]]:
    """The lines of all files with where they stand; all are opened first, since a run may be renaming one."""
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
        return [Damage(kind="broken", first=number, last=number, place=place)], Link(last.sequence + 1, sha256_of(line))
    here = Link(value["sequence"], sha256_of(line))
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
    """
    The record's lines as they were written; those that can't be read are left to `verify`.

    Args:
        store: Where they are.
        since: None: all.
        name: Only of this certificate.
    """
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
        return datetime.max.replace(tzinfo=UTC)  # changed by somebody: shown rather than hidden
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)
