"""Fields of a backend's settings that are no plain values: secrets, named by their place and read when they are needed, and what is given."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

#: In a settings field's metadata: its value comes from the bridge, and no key of the settings file has its name.
GIVEN = "given"


class SecretUnavailableError(Exception):
    """A secret can't be read; the text names where it was looked for, never its value."""


@dataclass(frozen=True, slots=True)
class Secret:
    """
    Where a secret comes from; the value is read when it is needed, and is in no text of this object.

    In the settings a field `token: Secret` is one of the keys `token_file` (a path), `token_env`
    (an environment variable) and `token_credential` (a systemd credential's name).
    """

    kind: str  #: `file`, `env` or `credential`.
    where: str

    def __str__(self) -> str:
        return {"file": self.where, "env": f"${self.where}", "credential": f"credential {self.where}"}[self.kind]

    def read(self) -> str:
        """
        The secret, without white space around it.

        Raises:
            SecretUnavailableError: Not there, not readable, or empty.
        """
        raw = os.environ.get(self.where, "") if self.kind == "env" else self._read_file(self._path())
        value = raw.strip()
        if not value:
            raise SecretUnavailableError(f"wanted a secret in {self}, found nothing there")
        return value

    def _path(self) -> Path:
        if self.kind == "file":
            return Path(self.where)
        # https://systemd.io/CREDENTIALS/
        directory = os.environ.get("CREDENTIALS_DIRECTORY")
        if not directory:
            raise SecretUnavailableError(
                f"wanted systemd {self}, found no $CREDENTIALS_DIRECTORY (LoadCredential= in the unit sets it)"
            )
        return Path(directory, self.where)

    def _read_file(self, path: Path) -> str:
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            reason = e.strerror if isinstance(e, OSError) else "not UTF-8 text"
            raise SecretUnavailableError(f"wanted a secret in {path}, found: {reason}") from None
