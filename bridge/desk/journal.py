"""
The desk's journal: what CAs were asked, and answered, and is not delivered yet, so that a run that was killed signs
nothing twice.

One line of JSON a request, another its answer, with an fsync for each lot. Answers stay on disk; memory holds only where each one is.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from bridge.contract import Issued, Pending, SignRequest
from bridge.errors import BridgeError
from bridge.pki.certificates import load_pem_certificates, pem
from bridge.system.console import log
from bridge.system.files import SECRET_MODE, sync_directory
from bridge.system.state_file import sealed_line, unsealed
from bridge.words import one_line

#: Older entries were delivered already, or their bundle was deleted.
_KEPT = timedelta(days=90)


#: All that a line may have.
_KEYS = frozenset({"key", "asked", "added", "reference", "note", "chain"})


class JournalError(BridgeError):
    """The journal can't be used."""

    hint = "make room, or fix the state directory, then run again"


@dataclass(frozen=True, slots=True)
class Asked:
    """A CA was asked by a run that ended before it wrote down the answer."""

    since: datetime


@dataclass(frozen=True, slots=True)
class _Place:
    offset: int
    length: int


class Journal:
    """The file; the process that has it open holds the desk's lock, and may add from several threads."""

    def __init__(self, path: Path, now: datetime) -> None:
        self._path = path
        self._now = now
        self._places: dict[str, _Place] = {}
        self._lock = threading.Lock()
        is_new = not path.exists()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, SECRET_MODE)
        self._end = 0
        with path.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break  # a crash cut it; nothing is behind it
                entry = _read(line)
                if entry is None:  # its request is asked for again, and the others' answers stay
                    log.warning("%s: passed over a damaged line, at byte %d", path, self._end)
                elif entry[1] is not None and now - entry[1] > _KEPT:
                    self._places.pop(entry[0], None)
                else:
                    self._places[entry[0]] = _Place(self._end, len(line))
                self._end += len(line)
        os.ftruncate(self._file, self._end)
        if is_new:
            sync_directory(path.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def get(self, request: SignRequest) -> Issued | Pending | Asked | None:
        """A CA's latest answer to exactly this request, as far as it is known."""
        place = self._places.get(key_of(request))
        if place is None:
            return None
        try:
            return _answer(unsealed(os.pread(self._file, place.length, place.offset), _KEYS))
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            log.warning("%s: passed over a damaged entry, at byte %d: %s", self._path, place.offset, one_line(e))
            return None  # not known: it is asked for again

    def add(self, answers: Iterable[tuple[SignRequest, Issued | Pending | Asked]]) -> None:
        """
        Safe on disk when this returns.

        Raises:
            JournalError: It could not be written; then these answers are known to the CA alone.
        """
        lines = [_line(request, answer, self._now) for request, answer in answers]
        with self._lock:
            self._write(b"".join(line for _, line in lines))
            for key, line in lines:
                self._places[key] = _Place(self._end, len(line))
                self._end += len(line)

    def _write(self, data: bytes) -> None:
        try:
            _write_all(self._file, data, self._end)
            os.fsync(self._file)
        except OSError as e:
            raise JournalError(f"{self._path}: wanted to keep the CA's answers there, found: {e.strerror}") from e

    def forget(self, requests: Iterable[SignRequest]) -> None:
        """Their answers were delivered; on disk after `tidy`."""
        for request in requests:
            self._places.pop(key_of(request), None)

    def tidy(self) -> None:
        """Keep on disk only what is still to be delivered, as a rule nothing."""
        if not self._places:
            self._end = 0
            os.ftruncate(self._file, 0)
        elif sum(place.length for place in self._places.values()) < self._end:
            self._compact()

    def _compact(self) -> None:
        temporary = self._path.with_name(f".{self._path.name}.new")
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        new, end, places = os.open(temporary, flags, SECRET_MODE), 0, {}
        for key, place in self._places.items():
            _write_all(new, os.pread(self._file, place.length, place.offset), end)
            places[key] = _Place(end, place.length)
            end += place.length
        os.fsync(new)
        temporary.rename(self._path)
        sync_directory(self._path.parent)
        os.close(self._file)
        self._file, self._end, self._places = new, end, places


def _write_all(file: int, data: bytes, offset: int) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(file, data[written:], offset + written)


def key_of(request: SignRequest) -> str:
    """The SHA-256 (hex) of a CSR and what it is wanted for."""
    about = json.dumps([request.spec.name, request.spec.authority.name, request.validity.total_seconds()])
    return sha256(about.encode() + b"\0" + request.csr_pem).hexdigest()


def _line(request: SignRequest, answer: Issued | Pending | Asked, now: datetime) -> tuple[str, bytes]:
    key = key_of(request)
    entry: dict[str, Any] = {"key": key}
    if isinstance(answer, Asked):
        entry["asked"] = answer.since.isoformat()
    elif isinstance(answer, Pending):
        entry |= {"reference": answer.reference, "note": answer.note}
    else:
        entry["added"] = now.isoformat()
        entry["chain"] = [pem(certificate).decode() for certificate in (answer.leaf, *answer.intermediates)]
    return key, sealed_line(entry)


def _answer(entry: Mapping[str, Any]) -> Issued | Pending | Asked:
    if "asked" in entry:
        return Asked(since=datetime.fromisoformat(entry["asked"]))
    if "reference" in entry:
        return Pending(reference=str(entry["reference"]), note=str(entry["note"]))
    leaf, *intermediates = load_pem_certificates("".join(entry["chain"]).encode())
    return Issued(leaf=leaf, intermediates=tuple(intermediates))


def _read(line: bytes) -> tuple[str, datetime | None] | None:
    """The line's key, and when it was added, unless its answer is still to come; None: not a line of ours."""
    try:
        entry = unsealed(line, _KEYS)
        added = entry.get("added") or entry.get("asked")
        key = str(entry["key"])
        moment = datetime.fromisoformat(added) if added else None
        if moment is not None and moment.tzinfo is None:
            return None
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None
    return key, moment
