"""What goes to standard error: messages, as text or JSON lines. Results are printed by the commands themselves."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Protocol, TextIO

from bridge.errors import BridgeError
from bridge.system import status

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


#: Of the first word of a message, on a terminal that has colours.
_COLOURS = {"error": "\x1b[1;31m", "warning": "\x1b[33m", "hint": "\x1b[36m"}


class _TerminalFormat(_TextFormat):
    """Lines that end between words (paths can be copied), and a colour for what kind of message it is."""

    def format(self, record: logging.LogRecord) -> str:
        import textwrap  # noqa: PLC0415 (for people alone)

        width = shutil.get_terminal_size().columns
        words = super().format(record)
        text = "\n  ".join(textwrap.wrap(words, width - 2, break_long_words=False, break_on_hyphens=False))
        level, colon, rest = text.partition(":")
        colour = _COLOURS.get(level) if status.is_coloured(sys.stderr) and record.levelno != logging.INFO else None
        return f"{colour}{level}:\x1b[0m{rest}" if colour else f"{level}{colon}{rest}"


class _Handler(logging.StreamHandler[TextIO]):
    """A message has a line of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        status.clear()
        super().emit(record)


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
    handler = _Handler(sys.stderr)
    text_format = _TerminalFormat if status.is_lively(sys.stderr) else _TextFormat
    handler.setFormatter(_JsonFormat() if log_format is LogFormat.JSON else text_format())
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
