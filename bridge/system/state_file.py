"""
One small JSON document that outlives a run, with a digest of itself (but in earlier versions'): read, validated,
replaced as a whole, removed. `OnDamage` says what happens to a damaged one; one that can't be read is left as it is.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Generic, TypeVar

from cryptography import x509

from bridge import dataclass
from bridge.errors import BridgeError, Exit
from bridge.system import codec
from bridge.system.files import digest, reasons, sync_directory, write_atomically

log = logging.getLogger("ca-bridge")

T = TypeVar("T")

_DIGEST = "digest"

#: How parsing says that a document is not what it should be.
NOT_OURS = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, x509.InvalidVersion)


class OnDamage(Enum):
    """The policy for a file whose content is not what we wrote."""

    REFUSE = "no run goes on over it: something is still to be done, and only an operator may have it set aside"
    SET_ASIDE = "a warning says so once, and the file is kept under another name; from then on there is none"
    START_OVER = "nothing is left to do by it: a warning, and it counts as none"


class StateError(BridgeError):
    """A state file can't be used, or not be written."""

    hint = "make room, or fix the directory, then run again"


class StateUnreadableError(StateError):
    """The file is there and can't be read at this moment."""

    hint = "fix the disk or the permissions, then run again; it stays as it is until then"


class StateDamagedError(StateError):
    """The file's content is not what we wrote."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateFile(Generic[T]):
    """One file; a change needs the lock of its directory."""

    path: Path
    what: str  #: That is in it, for messages, such as `the requests that are not finished`.
    parse: Callable[[bytes], T]  #: From its bytes, by `unsealed` (`NOT_OURS`: they are damaged).
    on_damage: OnDamage
    afterwards: str = ""  #: What to do when a damaged one is out of the way, for the hint.
    exit_code: int = Exit.FAILED  #: Of what can't be read.
    by_command: bool = True  #: `recover --set-aside` finds it; else it is renamed by hand.
    #: The document of a value, for `put`.
    document: Callable[[T], Mapping[str, Any]] | None = None

    def read(self) -> T | None:
        """Its content; None: no file, or one that counts as none (StateUnreadableError, StateDamagedError)."""
        try:
            return self.look()
        except StateDamagedError as e:
            if self.on_damage is OnDamage.START_OVER:
                log.warning("%s; it counts as none", e)
                return None
            if self.on_damage is OnDamage.SET_ASIDE:
                with contextlib.suppress(StateError):  # then it is reported again next time
                    e.hint = f"what was in it is in {self.set_aside()} now; {self.afterwards}"
            raise

    def damage(self) -> StateDamagedError | None:
        """Find what is wrong with its content, changing nothing."""
        try:
            self.look()
        except StateDamagedError as e:
            return e
        return None

    def look(self) -> T | None:
        """Its content, changing nothing, for those without the lock (StateUnreadableError; StateDamagedError by any policy)."""
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
        """Its bytes; None: no such file."""
        wanted = f"{self.path}: wanted to read {self.what}"
        with reasons(StateUnreadableError, wanted, exit_code=self.exit_code), contextlib.suppress(FileNotFoundError):
            return self.path.read_bytes()
        return None

    def put(self, value: T | None) -> None:
        """Write another value, safe on disk when this returns; None or an empty one removes the file."""
        if self.document is None:
            raise AssertionError(f"{self.what} is written as a document")
        self.replace(self.document(value)) if value else self.remove()

    def replace(self, document: Mapping[str, Any]) -> None:
        """Write another content, safe on disk when this returns."""
        with reasons(StateError, f"{self.path}: wanted to write down {self.what}"):
            write_atomically(self.path, sealed(document))

    def remove(self) -> None:
        """Remove it for good; there may be none."""
        with reasons(StateError, f"{self.path}: wanted to remove it"):
            self.path.unlink(missing_ok=True)
            sync_directory(self.path.parent)

    def set_aside(self) -> Path:
        """Give it another name, beside it, and return that; nothing is lost."""
        data = self.content() or b""
        kept = self.path.with_name(f"{self.path.name}.damaged-{digest(data)[:8]}")
        with reasons(StateError, f"{self.path}: wanted to rename it to {kept.name}"):
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
    version: int | None = None,
    afterwards: str = "",
    exit_code: int = Exit.FAILED,
) -> StateFile[T]:
    """A file whose document the codec writes and reads: a dataclass, or with `key` anything below that key."""
    constant = {} if version is None else {"version": version}
    keys = frozenset({*constant, *([key] if key else codec.keys_of(kind))})

    def parse(data: bytes) -> T:
        rest = {name: found for name, found in unsealed(data, keys).items() if name not in constant}
        if key and rest.keys() != {key}:
            raise codec.CodecError(f"wanted the key {key} and no other")
        return codec.from_json(kind, rest[key] if key else rest, key)

    def document(value: T) -> Mapping[str, Any]:
        found = codec.to_json(value)
        return {**constant, **({key: found} if key else found)}

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
    """The text says which digest."""


def sealed(document: Mapping[str, Any]) -> bytes:
    """Write a document out, with a digest of all of it."""
    return json.dumps({_DIGEST: _digest(document), **document}, indent=1).encode() + b"\n"


def sealed_line(document: Mapping[str, Any]) -> bytes:
    """Write a document that is not empty out as one line of a file that has thousands, with a digest of it."""
    text = json.dumps(document)
    return f'{{"{_DIGEST}": "{digest(text.encode())}", {text[1:]}\n'.encode()


def unsealed(data: bytes, keys: frozenset[str]) -> dict[str, Any]:
    """Read what `sealed` or `sealed_line` wrote, or an earlier version's document, without a digest and with these keys."""
    document = json.loads(data)
    if not isinstance(document, dict):
        raise _DigestError(f"wanted a JSON object, found {type(document).__name__}")
    wanted = document.pop(_DIGEST, None)
    if wanted is None and not document.keys() <= keys:
        raise _DigestError("neither a digest nor an earlier version's keys")
    if wanted is not None and wanted != (found := _digest(document)):
        raise _DigestError(f"digest: wanted {str(wanted)[:16]!r}…, found {found[:16]}…")
    return document


def _digest(document: Mapping[str, Any]) -> str:
    """SHA-256 in hex of the document's content and order, not of how it is spaced."""
    return digest(json.dumps(document).encode())
