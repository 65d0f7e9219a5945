"""Requests that a CA may have, with their keys, and answers that are not in use yet: JSON lines, each with a digest."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

from bridge.contract import Continuity, Issued, SignRequest
from bridge.node.kubeconfig import FreshKubeconfig
from bridge.specs import USER
from bridge.state import Store
from bridge.system import codec
from bridge.system.console import log
from bridge.system.files import append, reasons, write_atomically
from bridge.system.state_file import NOT_OURS, OnDamage, StateError, StateFile, sealed_line, unsealed

T = TypeVar("T")

_GONE, _HEAD, _COUNT = "gone", "openRequests", "count"
#: Rewrite the file when it has more outdated lines than this, and more of them than current lines.
_MOST_OUTDATED = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind(Generic[T]):
    """Requests of one kind."""

    name: str
    type: type[T]
    key_of: Callable[[T], str]
    what: str  #: The file's content, for messages.
    #: With private keys, each change rewrites the file, so that no old key stays in it, and damage is an error.
    #: Without keys, lines are appended, and a damaged line costs one repeated request.
    has_keys: bool = False
    afterwards: str = ""  #: What the operator has to do after a damaged file was renamed.
    lies_on_disk: bool = False  #: Memory holds only each line's position.


@dataclass(frozen=True, slots=True)
class _Place:
    offset: int
    length: int


def _values(kind: Kind[T], data: bytes) -> dict[str, T]:
    """All values of a complete file with keys."""
    head, *lines = data.removesuffix(b"\n").split(b"\n")
    if unsealed(head) != {_HEAD: kind.name, _COUNT: len(lines)}:
        raise codec.CodecError(f"wanted a first line that counts {len(lines)} others")
    entries = [unsealed(line) for line in lines]
    values = [codec.from_json(kind.type, entry, f"[{number}]") for number, entry in enumerate(entries)]
    return {kind.key_of(value): value for value in values}


def file_of(kind: Kind[T], path: Path) -> StateFile[dict[str, T]]:
    """The file of a kind, read completely; a damaged file without keys counts as missing."""
    return StateFile(
        path=path,
        what=kind.what,
        parse=partial(_values, kind),
        on_damage=OnDamage.REFUSE if kind.has_keys else OnDamage.START_OVER,
        afterwards=kind.afterwards,
    )


class RequestLog(Generic[T]):
    """The open requests of one kind, by key, for threads of a process that holds the lock; `save` writes changes."""

    def __init__(self, path: Path, kind: Kind[T], is_current: Callable[[T], bool] = lambda _: True) -> None:
        """Read the file, without the values that are no longer current."""
        self._kind, self._file, self._is_current = kind, file_of(kind, path), is_current
        self._lock = threading.RLock()
        #: Values from `put`, which takes no lock: a thread that saves also writes values that others add meanwhile.
        self._added: deque[T] = deque()
        self._found: dict[str, T | _Place] = {}
        self._changed: dict[str, None] = {}  #: Keys in the order of change.
        self._lines = self._end = 0  #: Complete lines that were read or written, and their size in bytes.
        self._must_rewrite = kind.has_keys
        self._load()

    def _load(self) -> None:
        if self._kind.has_keys:
            self._found |= self._file.read() or {}
            return
        data = self._file.content() or b""
        for line in data.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break  # torn by a crash; nothing follows it
            try:
                self._take(line)
            except NOT_OURS:  # that request is repeated, and the other answers stay
                log.warning("%s: passed over a damaged line, at byte %d", self._file.path, self._end)
            self._end += len(line)
            self._lines += 1

    def _take(self, line: bytes) -> None:
        entry = unsealed(line)
        if _GONE in entry:
            self._found.pop(entry[_GONE], None)
            return
        value = codec.from_json(self._kind.type, entry)
        key = self._kind.key_of(value)
        self._found.pop(key, None)
        if self._is_current(value):
            self._found[key] = _Place(self._end, len(line)) if self._kind.lies_on_disk else value

    def __iter__(self) -> Iterator[T]:
        return iter(self.by_name().values())

    def __len__(self) -> int:
        with self._locked():
            return len(self._found)

    def by_name(self) -> dict[str, T]:
        """All open requests, by key."""
        with self._locked():
            return {key: value for key in list(self._found) if (value := self.get(key)) is not None}

    def get(self, key: str) -> T | None:
        """The open request with a key."""
        with self._locked():
            request = self._found.get(key)
            if not isinstance(request, _Place):
                return request
            try:
                return codec.from_json(self._kind.type, unsealed(self._bytes(request)))
            except NOT_OURS:  # unknown, so its request is repeated
                log.warning("%s: passed over a damaged line, at byte %d", self._file.path, request.offset)
                return None

    def _bytes(self, place: _Place) -> bytes:
        with self._file.path.open("rb") as file:
            file.seek(place.offset)
            return file.read(place.length)

    def put(self, value: T) -> None:
        """Add or replace a request."""
        self._added.append(value)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock, and take in all values from `put`."""
        with self._lock:
            while self._added:
                value = self._added.popleft()
                key = self._kind.key_of(value)
                if self._found.get(key) != value:
                    self._found[key] = value
                    self._changed[key] = None
            yield

    def drop(self, key: str) -> T | None:
        """Remove and return a request with its key."""
        with self._locked():
            value = self.get(key)
            self.forget(key)
            return value

    def forget(self, key: str) -> None:
        """Drop a request that is finished, without reading it back from disk."""
        with self._locked():
            if self._found.pop(key, None) is not None:
                self._changed[key] = None

    def save(self) -> None:
        """Make all changes safe on disk, including other threads'."""
        with self._locked():
            if not self._changed:
                return
            if not self._found:
                self._file.remove()
                self._lines = self._end = 0
            elif self._must_rewrite or self._lines > 2 * len(self._found) + _MOST_OUTDATED:
                self._rewrite()
            else:
                self._append()
            self._changed.clear()

    def tidy(self) -> None:
        """Remove outdated lines from the file."""
        with self._locked():
            self.save()
            if self._found and self._lines != len(self._found):
                self._rewrite()

    def _line(self, key: str) -> bytes:
        request = self._found.get(key)
        if isinstance(request, _Place):
            return self._bytes(request)
        return sealed_line(codec.to_json(request) if request is not None else {_GONE: key})

    def _append(self) -> None:
        lines = {key: self._line(key) for key in self._changed}
        path = self._file.path
        with reasons(StateError, f"{path}: can't write down {self._kind.what}"):
            if path.exists() and path.stat().st_size > self._end:
                os.truncate(path, self._end)
            append(path, b"".join(lines.values()))
        self._written(lines)

    def _rewrite(self) -> None:
        path = self._file.path
        with reasons(StateError, f"{path}: can't write down {self._kind.what}"):
            written = path.read_bytes() if self._kind.lies_on_disk else b""
            lines = {
                key: written[place.offset : place.offset + place.length]
                if isinstance(place, _Place)
                else self._line(key)
                for key, place in self._found.items()
            }
            head = [sealed_line({_HEAD: self._kind.name, _COUNT: len(lines)})] if self._kind.has_keys else []
            write_atomically(path, b"".join([*head, *lines.values()]))
        self._lines = self._end = 0
        self._must_rewrite = self._kind.has_keys
        self._written(lines)

    def _written(self, lines: Mapping[str, bytes]) -> None:
        for key, line in lines.items():
            if self._kind.lies_on_disk and key in self._found:
                self._found[key] = _Place(self._end, len(line))
            self._end += len(line)
            self._lines += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRequest:
    """One request for a certificate of this node, and the key that stays here."""

    request: SignRequest
    key_pem: bytes = field(repr=False)
    created: datetime
    run_id: str
    backend: str = ""  #: Label of the backend whose CA has the request; empty: no CA has it yet.
    reference: str = ""  #: The backend's reference, with which it collects the answer.
    note: str = ""  #: The backend's note for the operator.
    answer: Issued | None = None  #: Verified, but not installed yet.
    bundles: tuple[str, ...] = ()  #: SHA-256 of the bundles that carried it out of the node.
    kubeconfig: FreshKubeconfig | None = None  #: The kubeconfig to create for it, if there was none.

    @property
    def name(self) -> str:
        """kubeadm's name of the certificate."""
        return self.request.spec.name

    @property
    def was_taken(self) -> bool:
        """Whether a CA or a desk has the request, and will answer."""
        return bool(self.reference or self.bundles)

    @property
    def is_waiting(self) -> bool:
        """Whether a CA or a desk has the request, and has not answered yet."""
        return self.was_taken and self.answer is None

    @property
    def deadline(self) -> datetime | None:
        """The end of the certificate that the request replaces."""
        return self.request.replaces.not_valid_after_utc if self.request.replaces is not None else None


RENEWALS = Kind(
    name="renewal",
    type=OpenRequest,
    key_of=lambda request: request.name,
    what="the requests that were made and not finished, with their keys",
    has_keys=True,
    afterwards="new keys are made then; what a CA has signed for the old ones is worth nothing without them",
)


class OpenRequests(RequestLog[OpenRequest]):
    """The open requests for this node's certificates."""

    def __init__(self, store: Store) -> None:
        super().__init__(store.requests, RENEWALS)


class Unkept(OpenRequests):
    """The requests of a rehearsal, kept only in memory."""

    def __init__(self) -> None:
        self._kind, self._lock = RENEWALS, threading.RLock()
        self._added, self._found, self._changed = deque(), {}, {}

    def save(self) -> None:
        """Write nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenUser:
    """One request for a user's certificate, and its key."""

    name: str  #: Kubernetes' user name.
    groups: tuple[str, ...]
    csr_pem: bytes
    key_pem: bytes | None = field(repr=False)  #: None: only the user has it.
    validity: timedelta
    created: datetime
    backend: str  #: Label of the backend whose CA gets the request.
    reference: str = ""  #: The backend collects the answer with it; empty: the CA may not have the request.
    carried: Continuity | None = None  #: The requesting node, if the request is carried to a desk; it has no proof.

    @property
    def request(self) -> SignRequest:
        """The request in the form that the backend sends."""
        return SignRequest(spec=USER, csr_pem=self.csr_pem, validity=self.validity, continuity=self.carried)


USERS = Kind(
    name="user",
    type=OpenUser,
    key_of=lambda request: request.name,
    what="the requests for users that were not answered, with their keys",
    has_keys=True,
    afterwards="ask again for the users that waited",
)


class OpenUsers(RequestLog[OpenUser]):
    """The open requests for users' certificates."""

    def __init__(self, store: Store) -> None:
        super().__init__(store.users, USERS)
