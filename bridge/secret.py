"""Special fields of a backend's settings: secrets, read when they are needed, and values that the bridge fills in."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

#: In a settings field's metadata: the bridge fills in its value, and it is no key of the settings file.
GIVEN = "given"
#: Time for the program that writes a secret into a pipe; it may have to decrypt it first.
_PIPE_SECONDS = 10
_MAX_BYTES = 1 << 20


class SecretUnavailableError(Exception):
    """A secret can't be read; the text names where it was looked for, never its value."""


@dataclass(frozen=True, slots=True)
class Secret:
    """
    Where a secret comes from; its value is read when it is needed, and no text of this object contains it.

    In the settings a field `token: Secret` is one of the keys `token_file` (a path), `token_env`
    (an environment variable) and `token_credential` (a systemd credential's name).
    """

    kind: str  #: `file`, `env` or `credential`.
    where: str

    def __str__(self) -> str:
        return {"file": self.where, "env": f"${self.where}", "credential": f"credential {self.where}"}[self.kind]

    def read(self) -> str:
        """Read the secret, without white space around it (SecretUnavailableError: missing, unreadable or empty)."""
        raw = os.environ.get(self.where, "") if self.kind == "env" else self._read_file()
        value = raw.strip()
        if not value:
            raise SecretUnavailableError(f"there is no secret in {self}")
        return value

    def _path(self) -> Path:
        if self.kind == "file":
            return Path(self.where)
        # https://systemd.io/CREDENTIALS/
        directory = os.environ.get("CREDENTIALS_DIRECTORY")
        if not directory:
            raise SecretUnavailableError(
                f"there is no $CREDENTIALS_DIRECTORY for systemd {self} (LoadCredential= in the unit sets it)"
            )
        return Path(directory, self.where)

    def _read_file(self) -> str:
        path = self._path()
        try:
            return _content(path).decode()
        except (OSError, UnicodeDecodeError) as e:
            reason = e.strerror if isinstance(e, OSError) else "not UTF-8 text"
            raise SecretUnavailableError(f"wanted a secret in {path}, found: {reason}") from None


def _content(path: Path) -> bytes:
    """Read a file or a pipe; a FIFO without a writer, or a file without end, raises OSError."""
    descriptor, data = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), b""
    try:
        ready = select.poll()
        ready.register(descriptor, select.POLLIN)
        while ready.poll(_PIPE_SECONDS * 1000):
            if not (more := os.read(descriptor, _MAX_BYTES)):
                return data
            data += more
            if len(data) > _MAX_BYTES:
                raise OSError(errno.EFBIG, f"more than {_MAX_BYTES} bytes")
        raise OSError(errno.ETIMEDOUT, f"a pipe that said nothing for {_PIPE_SECONDS} s")
    finally:
        os.close(descriptor)


def leaves(table: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and values of a settings table and the tables within it, without fields that the bridge fills in."""
    for field in fields(table):
        value, key = getattr(table, field.name), f"{prefix}{field.name}"
        if is_dataclass(value) and not hasattr(value, "from_setting") and not isinstance(value, Secret):
            yield from leaves(value, f"{key}.")
        elif GIVEN not in field.metadata:
            yield key, value
