"""
One small JSON document that outlives a run, with its own digest: read, validated, replaced as a whole, removed.
`OnDamage` decides what happens to a damaged file; a file that can't be read is left alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Generic, TypeVar

from cryptography import x509

from bridge.errors import BridgeError, Exit
from bridge.system import codec
from bridge.system.files import digest, reasons, sync_directory, write_atomically

log = logging.getLogger("ca-bridge")

T = TypeVar("T")

_DIGEST = "digest"

#: Errors of a parser for a document that is not as expected.
NOT_OURS = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, x509.InvalidVersion)


class OnDamage(Enum):
    """The policy for a file whose content is not what we wrote."""

    REFUSE = "no run goes on over it: something is still to be done, and only an operator may have it set aside"
    SET_ASIDE = "a warning says so once, and the file is kept under another name; from then on there is none"
    START_OVER = "nothing is left to do by it: a warning, and it counts as none"


class StateError(BridgeError):
    """A state file can't be used or written."""

    hint = "make room, or fix the directory, then run again"


class StateUnreadableError(StateError):
    """The file exists, but can't be read now."""

    hint = "fix the disk or the permissions, then run again; it stays as it is until then"


class StateDamagedError(StateError):
    """The file's content is not what we wrote."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateFile(Generic[T]):
    """One state file; changes need the lock of its directory."""

    path: Path
    what: str  #: The content, for messages, such as `the requests that are not finished`.
    parse: Callable[[bytes], T]  #: Parses the file's bytes with `unsealed` (`NOT_OURS`: they are damaged).
    on_damage: OnDamage
    afterwards: str = ""  #: For the hint: what to do after a damaged file was moved away.
    exit_code: int = Exit.FAILED  #: The exit code of an unreadable file.
    by_command: bool = True  #: `recover --set-aside` handles it; else it is renamed by hand.
    #: Returns a value's document, for `put`.
    document: Callable[[T], Mapping[str, Any]] | None = None

    def read(self) -> T | None:
        """Its content; None: the file is missing, or counts as missing (StateUnreadableError, StateDamagedError)."""
        try:
            return self.look()
        except StateDamagedError as e:
            if self.on_damage is OnDamage.START_OVER:
                log.warning("%s; it counts as none", e)
                return None
            if self.on_damage is OnDamage.SET_ASIDE:
                with contextlib.suppress(StateError):  # then the next read reports it again
                    e.hint = f"what was in it is in {self.set_aside()} now; {self.afterwards}"
            raise

    def damage(self) -> StateDamagedError | None:
        """The damage of its content, without changing anything."""
        try:
            self.look()
        except StateDamagedError as e:
            return e
        return None

    def look(self) -> T | None:
        """Its content, without changes, for readers without the lock (StateUnreadableError; StateDamagedError always)."""
        data = self.content()
        if data is None:
            return None
        try:
            return self.parse(data)
        except NOT_OURS as e:
            reason = str(e) if isinstance(e, _DigestError | codec.CodecError) else type(e).__name__
            command = "`ca-bridge recover --set-aside` moves it out of the way, and keeps everything else"
            raise StateDamagedError(
                f"{self.path}: wanted {self.what}, found something else ({reason})",
                hint=f"{command if self.by_command else 'rename it, and keep it'}; {self.afterwards}",
                exit_code=self.exit_code,
            ) from None

    def content(self) -> bytes | None:
        """Its bytes; None: the file is missing."""
        failed = f"{self.path}: can't read {self.what}"
        with reasons(StateUnreadableError, failed, exit_code=self.exit_code), contextlib.suppress(FileNotFoundError):
            return self.path.read_bytes()
        return None

    def put(self, value: T | None) -> None:
        """Write a value, safe on disk when this returns; None or an empty value removes the file."""
        if self.document is None:
            raise AssertionError(f"{self.what} is written as a document")
        self.replace(self.document(value)) if value else self.remove()

    def replace(self, document: Mapping[str, Any]) -> None:
        """Write a document, safe on disk when this returns."""
        with reasons(StateError, f"{self.path}: can't write down {self.what}"):
            write_atomically(self.path, sealed(document))

    def remove(self) -> None:
        """Remove the file durably, if it exists."""
        with reasons(StateError, f"{self.path}: can't remove it"):
            self.path.unlink(missing_ok=True)
            sync_directory(self.path.parent)

    def set_aside(self) -> Path:
        """Rename the file within its directory, and return the new path; nothing is lost."""
        data = self.content() or b""
        kept = self.path.with_name(f"{self.path.name}.damaged-{digest(data)[:8]}")
        with reasons(StateError, f"{self.path}: can't rename it to {kept.name}"):
            self.path.rename(kept)
            sync_directory(kept.parent)
        return kept


def coded(
    kind: type[T],
    path: Path,
    what: str,
    on_damage: OnDamage,
    *,
    key: str = "",
    afterwards: str = "",
    exit_code: int = Exit.FAILED,
) -> StateFile[T]:
    """A file that the codec writes and reads: a dataclass, or with `key` any value below that key."""

    def parse(data: bytes) -> T:
        document = unsealed(data)
        if key and document.keys() != {key}:
            raise codec.CodecError(f"wanted the key {key} and no other")
        return codec.from_json(kind, document[key] if key else document, key)

    def document(value: T) -> Mapping[str, Any]:
        content: Mapping[str, Any] = codec.to_json(value)
        return {key: content} if key else content

    return StateFile(
        path=path,
        what=what,
        parse=parse,
        on_damage=on_damage,
        afterwards=afterwards,
        exit_code=exit_code,
        document=document,
    )


class _DigestError(ValueError):
    """The message says which digest."""


def sealed(document: Mapping[str, Any]) -> bytes:
    """Encode a document with its digest."""
    return json.dumps({_DIGEST: _digest(document), **document}, indent=1).encode() + b"\n"


def sealed_line(document: Mapping[str, Any]) -> bytes:
    """Encode a document, which is not empty, as one line with its digest, for a file of thousands of lines."""
    text = json.dumps(document)
    return f'{{"{_DIGEST}": "{digest(text.encode())}", {text[1:]}\n'.encode()


def unsealed(data: bytes) -> dict[str, Any]:
    """Decode what `sealed` or `sealed_line` wrote; the error says which digest is missing or wrong."""
    document = json.loads(data)
    if not isinstance(document, dict):
        raise _DigestError(f"wanted a JSON object, found {type(document).__name__}")
    wanted = document.pop(_DIGEST, None)
    if wanted is None:
        raise _DigestError("it has no digest")
    if wanted != (digest := _digest(document)):
        raise _DigestError(f"digest: wanted {str(wanted)[:16]!r}…, found {digest[:16]}…")
    return document


def _digest(document: Mapping[str, Any]) -> str:
    """SHA-256 in hex of the document's content and order, independent of spacing."""
    return digest(json.dumps(document).encode())
