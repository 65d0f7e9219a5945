"""What goes to standard error: messages, as text or JSON lines. Results are printed by the commands themselves."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Protocol

from bridge.errors import BridgeError

log = logging.getLogger("ca-bridge")
ROOT_HINT = "run it as root (sudo)"


class LogFormat(StrEnum):
    """How messages are written."""

    TEXT = "text"
    JSON = "json"


def print_error(error: BridgeError, about: str = "") -> None:
    """`error: …` and `hint: …` on standard error; through the log when that is JSON."""
    prefix = f"{about}: " if about else ""
    for line in (error.reason if about else str(error)).splitlines():
        log.error("%s%s", prefix, line)
    if hint := hint_of(error):
        log.error("%s", hint, extra={"is_hint": True})


def hint_of(error: BridgeError) -> str:
    """What to do next; where rights are what is missing, to have them, whatever else may be wrong."""
    return ROOT_HINT if lacks_rights(error.reason) else error.hint


def lacks_rights(text: str) -> bool:
    """Whether the system says no to a user who is not root."""
    return os.geteuid() != 0 and any(os.strerror(code) in text for code in (errno.EACCES, errno.EPERM))


def printable(value: object) -> str:
    """A CA's words or the names of carried files may be in it, and must not steer a terminal."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in str(value))


class _TextFormat(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "hint" if getattr(record, "is_hint", False) else record.levelname.lower()
        text = printable(record.getMessage())
        return text if record.levelno == logging.INFO else f"{level}: {text}"


#: What a message may say it is about (`extra` of the log call), as keys of its line.
_ABOUT = ("request", "signer", "requester", "outcome")


class _JsonFormat(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "hint" if getattr(record, "is_hint", False) else record.levelname.lower()
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        about = {key: value for key in _ABOUT if (value := getattr(record, key, None)) is not None}
        return json.dumps({"time": time, "level": level, **about, "message": record.getMessage()})


def set_up(verbose: int, log_format: LogFormat) -> None:
    """Our own messages only: what libraries log at a high level may hold headers."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormat() if log_format is LogFormat.JSON else _TextFormat())
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.DEBUG if verbose else logging.INFO)


class Progress(Protocol):
    """Who looks on; called from several threads."""

    def signing(self, backend: str, names: Sequence[str]) -> None:
        """These certificates are being asked for."""

    def signed(self, name: str) -> None:
        """The CA has answered for one, with a certificate or not."""

    def note(self, text: str) -> None:
        """Something that the operator should know."""
