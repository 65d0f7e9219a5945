"""Messages: to standard error as text or JSON lines, or into systemd's journal. Results are printed by the commands."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Protocol, TextIO

from bridge.errors import BridgeError
from bridge.specs import SPECS
from bridge.system import status
from bridge.system.run_id import run_id

log = logging.getLogger("ca-bridge")
ROOT_HINT = "run it as root (sudo)"
_ROOM_HINT = "make room there, then run again"
#: A kernel does that by itself after errors of a disk.
READ_ONLY_HINT = "is it meant to be read-only, or has its disk failed (dmesg)? mount it writable"
_HINTS = {errno.EROFS: READ_ONLY_HINT, errno.ENOSPC: _ROOM_HINT, errno.EDQUOT: _ROOM_HINT}


class LogFormat(StrEnum):
    """How messages are written."""

    TEXT = "text"
    JSON = "json"
    JOURNAL = "journal"


def print_error(error: BridgeError, about: str = "") -> None:
    """`error: …` and `hint: …` on standard error; through the log when that is JSON."""
    prefix = f"{about}: " if about else ""
    for line in (error.reason if about else str(error)).splitlines():
        log.error("%s%s", prefix, line, extra={"exit_code": error.exit_code})
    if hint := hint_of(error):
        log.error("%s", hint, extra={"is_hint": True})


def hint_of(error: BridgeError) -> str:
    """An error's hint; where rights are what is missing, to run as root, whatever else may be wrong."""
    if lacks_rights(error.reason):
        return ROOT_HINT
    return error.hint or next((hint for code, hint in _HINTS.items() if f": {os.strerror(code)}" in error.reason), "")


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


class _TaggedFormat(_TextFormat):
    """For files and mails, where the lines of several runs stand together: each says which it is of."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{super().format(record)} [run {run_id()}]"


#: What a message may say it is about (`extra` of the log call), as keys of its line.
_ABOUT = ("request", "signer", "requester", "outcome")


def facts(record: logging.LogRecord) -> dict[str, object]:
    """
    The fields of a message for programs, besides its words; `config/logs/log-line.schema.json` describes them.

    Args:
        record: Its message begins with the certificates that it is about, if it is about some.
    """
    found: dict[str, object] = {
        "level": "hint" if getattr(record, "is_hint", False) else record.levelname.lower(),
        "run": run_id(),
    }
    found |= {key: value for key in _ABOUT if (value := getattr(record, key, None)) is not None}
    names = record.getMessage().partition(": ")[0].split(", ")
    if all(name in SPECS for name in names):
        found["certificates"] = names
    if (code := getattr(record, "exit_code", None)) is not None:
        found["exitCode"] = code
    return found


class _JsonFormat(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        return json.dumps({"time": time, **facts(record), "message": record.getMessage()})


class _JournalHandler(logging.Handler):
    """Into systemd's journal; where that does not listen, to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        from bridge.system import journal  # noqa: PLC0415 (for the journal alone)

        try:
            journal.send(list(_fields(record)))
        except OSError:
            sys.stderr.write(f"{_TaggedFormat().format(record)}\n")


#: RFC 5424 §6.2.1.
_PRIORITIES = {logging.ERROR: "3", logging.WARNING: "4", logging.INFO: "6", logging.DEBUG: "7"}


def _fields(record: logging.LogRecord) -> Iterator[tuple[str, str]]:
    yield "MESSAGE", printable(record.getMessage())
    yield "PRIORITY", _PRIORITIES.get(record.levelno, "3")
    yield "SYSLOG_IDENTIFIER", "ca-bridge"
    for key, value in facts(record).items():
        name = _FIELD_NAMES.get(key, key.upper())
        for one in value if isinstance(value, list) else [value]:
            yield f"CA_BRIDGE_{name}", printable(one)


#: Where it is not the key in capital letters.
_FIELD_NAMES = {"certificates": "CERTIFICATE", "exitCode": "EXIT_CODE"}


def _handler(log_format: LogFormat) -> logging.Handler:
    if log_format is LogFormat.JOURNAL or (log_format is LogFormat.TEXT and _leads_to_the_journal()):
        return _JournalHandler()
    handler = _Handler(sys.stderr)
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    plain = _TextFormat if is_terminal else _TaggedFormat
    text_format = _TerminalFormat if status.is_lively(sys.stderr) else plain
    handler.setFormatter(_JsonFormat() if log_format is LogFormat.JSON else text_format())
    return handler


def _leads_to_the_journal() -> bool:
    if "JOURNAL_STREAM" not in os.environ:
        return False
    from bridge.system import journal  # noqa: PLC0415 (see above)

    return journal.is_stderr()


def set_up(verbose: int, log_format: LogFormat) -> None:
    """Our own messages only: what libraries log at a high level may hold headers."""
    log.handlers = [_handler(log_format)]
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
