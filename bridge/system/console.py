"""Messages of a run, with the run's name: to standard error as text or JSON lines, or to systemd's journal."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Protocol, TextIO

from bridge.errors import BridgeError
from bridge.specs import SPECS

log = logging.getLogger("ca-bridge")
ROOT_HINT = "run it as root (sudo)"
_ROOM_HINT = "make room there, then run again"
#: The kernel remounts a file system read-only after disk errors.
READ_ONLY_HINT = "is it meant to be read-only, or has its disk failed (dmesg)? mount it writable"
_HINTS = {errno.EROFS: READ_ONLY_HINT, errno.ENOSPC: _ROOM_HINT, errno.EDQUOT: _ROOM_HINT}


class LogFormat(StrEnum):
    """The format of messages."""

    TEXT = "text"
    JSON = "json"
    JOURNAL = "journal"


def print_error(error: BridgeError, about: str = "", *, has_hint: bool = True) -> None:
    """Print `error: …` and `hint: …` to standard error (no hint if a later error repeats it); with JSON, log them."""
    prefix = f"{about}: " if about else ""
    for line in (error.reason if about else str(error)).splitlines():
        log.error("%s%s", prefix, line, extra={"exit_code": error.exit_code})
    if has_hint and (hint := hint_of(error)):
        log.error("%s", hint, extra={"is_hint": True})


def log_with_hint(level: int, text: str, hint: str) -> None:
    """Log a message on standard error and, unless it is empty, a hint."""
    log.log(level, "%s", text)
    if hint:
        log.log(level, "%s", hint, extra={"is_hint": True})


def hint_of(error: BridgeError) -> str:
    """An error's hint; if rights are missing, the advice to run as root."""
    if lacks_rights(error.reason):
        return ROOT_HINT
    return error.hint or next((hint for code, hint in _HINTS.items() if f": {os.strerror(code)}" in error.reason), "")


def lacks_rights(text: str) -> bool:
    """Whether a user other than root was denied an operation."""
    return os.geteuid() != 0 and any(os.strerror(code) in text for code in (errno.EACCES, errno.EPERM))


def printable(value: object) -> str:
    """A text without control characters, which a CA's messages or file names may contain."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in str(value))


class Progress(Protocol):
    """Observes a run; called from several threads."""

    def signing(self, backend: str, names: Sequence[str]) -> None:
        """The CA is being asked for these certificates."""

    def signed(self, name: str) -> None:
        """The CA has answered a request, with a certificate or an error."""

    def note(self, text: str) -> None:
        """A note for the operator."""


_ID_BYTES = 4
_ids: list[str] = []
_taken: set[str] = set()


def run_id() -> str:
    """The run ID of this process, in hexadecimal; messages before its audit record begins carry it, too."""
    if not _ids:
        _ids.append(os.urandom(_ID_BYTES).hex())
    return _ids[-1]


def begin_run() -> str:
    """Return the ID of a new record: the process's, or a new one if another record uses it."""
    if run_id() in _taken:
        _ids[:] = [os.urandom(_ID_BYTES).hex()]
    _taken.clear()
    _taken.add(_ids[-1])
    return _ids[-1]


# --- the current step -------------------------------------------------------------------------------------------------

# A status line on a terminal, a plain line elsewhere; nothing in the first two seconds. A terminal's line disappears at
# the end of the step; a file or a journal gets one line for each step that takes that long.

_QUIET_SECONDS = 2.0
_FRAME_SECONDS = 0.25
_FRAMES = ("|", "/", "-", "\\")
_CLEAR = "\r\x1b[K"


def is_lively(stream: TextIO) -> bool:
    """Whether a stream is a terminal whose line can be overwritten."""
    return stream.isatty() and os.environ.get("TERM", "") not in {"", "dumb"}


def columns() -> int:
    """The terminal's width, by $COLUMNS or the terminal itself."""
    import shutil  # noqa: PLC0415 (2 ms, and a table in a file has no width)

    return shutil.get_terminal_size().columns


def is_attended() -> bool:
    """Whether a person is at the terminal, who can decide when to try again."""
    return sys.stdin.isatty() or sys.stderr.isatty()


#: Colours of levels, in messages and tables, and of the demo's lines.
STYLES = {
    "error": "1;31",
    "warning": "33",
    "hint": "36",
    "ok": "32",
    "note": "34",
    "good": "1;32",
    "number": "1;34",
    "heading": "1",
    "faint": "2",
}


def styled(text: str, style: str, stream: TextIO) -> str:
    """Colour a text in one of the styles, unless colours are invisible or unwanted (https://no-color.org)."""
    is_coloured = style and text and is_lively(stream) and not os.environ.get("NO_COLOR")
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if is_coloured else text


def is_verbose() -> bool:
    """Whether `-v` was given: tables are complete, however narrow the terminal is."""
    return log.isEnabledFor(logging.DEBUG)


class Doing:
    """A step that is in progress."""

    def __init__(self, text: str, *, is_logged: bool = False) -> None:
        self.text = text
        self.since = time.monotonic()
        self.is_logged = is_logged  #: It was logged as a plain line, or will not be.


class _Line:
    """The status line of the newest step, drawn by a thread while any step is in progress."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._going: list[Doing] = []
        self._wake = threading.Condition(self.lock)
        self._thread: threading.Thread | None = None
        self._is_shown = False

    def begin(self, doing: Doing) -> None:
        with self.lock:
            self._going.append(doing)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="status", daemon=True)
                self._thread.start()

    def end(self, doing: Doing) -> None:
        with self.lock:
            self._going.remove(doing)
            self.clear()
            if not self._going:
                self._wake.notify()

    def clear(self) -> None:
        with self.lock:
            if self._is_shown:
                _write(_CLEAR)
                self._is_shown = False

    def _run(self) -> None:
        frame = 0
        with self.lock:
            while self._going:
                doing, passed = self._going[-1], time.monotonic() - self._going[-1].since
                if passed >= _QUIET_SECONDS:
                    self._show(doing, passed, _FRAMES[frame % len(_FRAMES)])
                    frame += 1
                self._wake.wait(_FRAME_SECONDS)
            self._thread = None

    def _show(self, doing: Doing, passed: float, frame: str) -> None:
        if is_lively(sys.stderr):
            room = columns() - 1
            _write(f"{_CLEAR}{f'{frame} {doing.text} … {passed:.0f} s'[:room]}")
            self._is_shown = True
        elif not doing.is_logged:
            doing.is_logged = True
            log.info("%s …", doing.text)


def _write(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # standard error is closed
        sys.stderr.write(text)
        sys.stderr.flush()


_line = _Line()


@contextlib.contextmanager
def doing(text: str, *, is_plain: bool = True) -> Iterator[Doing]:
    """Show a step while it lasts, if it takes long."""
    entry = Doing(text, is_logged=not is_plain)
    _line.begin(entry)
    try:
        yield entry
    finally:
        _line.end(entry)


def clear_status() -> None:
    """Clear the status line before something else is written."""
    _line.clear()


# --- systemd's journal ------------------------------------------------------------------------------------------------

# By the journal's own protocol, one datagram a message: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/

JOURNAL = Path("/run/systemd/journal/socket")
#: A longer datagram would have to pass a file descriptor; none of our messages is as long.
_LONGEST_VALUE = 32 << 10


def stderr_is_journal() -> bool:
    """Whether standard error leads to the journal, by the variable that systemd sets (systemd.exec(5))."""
    named = os.environ.get("JOURNAL_STREAM")
    if not named:
        return False
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return named == f"{status.st_dev}:{status.st_ino}"


def send_to_journal(fields: Sequence[tuple[str, str]], place: Path = JOURNAL) -> None:
    """Send a message to the journal: names in capitals with their values; a name may occur several times."""
    import socket  # noqa: PLC0415 (only for the journal)

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as ours:
        ours.sendto(b"".join(_encoded(name, value) for name, value in fields), str(place))


def _encoded(name: str, value: str) -> bytes:
    """Encode a field; a value with a line break is sent with its length, so that it can't add fields."""
    data = value.encode("utf-8", "replace")[:_LONGEST_VALUE]
    if b"\n" not in data:
        return name.encode() + b"=" + data + b"\n"
    return name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"


# --- how messages are written -----------------------------------------------------------------------------------------


class _TextFormat(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "hint" if getattr(record, "is_hint", False) else record.levelname.lower()
        text = printable(record.getMessage())
        return text if record.levelno == logging.INFO else f"{level}: {text}"


class _TerminalFormat(_TextFormat):
    """Lines wrapped between words, so that paths can be copied, with colours by level."""

    def format(self, record: logging.LogRecord) -> str:
        import textwrap  # noqa: PLC0415 (only for terminals)

        width = columns()
        words = super().format(record)
        text = "\n  ".join(textwrap.wrap(words, width - 2, break_long_words=False, break_on_hyphens=False))
        level, colon, rest = text.partition(":")
        if record.levelno == logging.INFO or level not in STYLES:
            return text
        return f"{styled(f'{level}{colon}', level, sys.stderr)}{rest}"


class _Handler(logging.StreamHandler[TextIO]):
    def emit(self, record: logging.LogRecord) -> None:
        clear_status()
        super().emit(record)


class _TaggedFormat(_TextFormat):
    """For files and mails with lines of several runs: each line begins with its run's name."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{super().format(record)} [run {run_id()}]"


#: Further facts in a message (`extra` of the log call), as keys of its JSON line.
_ABOUT = ("request", "signer", "requester", "outcome")


def facts(record: logging.LogRecord) -> dict[str, object]:
    """A message's fields for programs; `config/logs/log-line.schema.json` describes them."""
    document: dict[str, object] = {
        "level": "hint" if getattr(record, "is_hint", False) else record.levelname.lower(),
        "run": run_id(),
    }
    document |= {key: value for key in _ABOUT if (value := getattr(record, key, None)) is not None}
    names = record.getMessage().partition(": ")[0].split(", ")
    if all(name in SPECS for name in names):
        document["certificates"] = names
    if (code := getattr(record, "exit_code", None)) is not None:
        document["exitCode"] = code
    return document


class _JsonFormat(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        return json.dumps({"time": time, **facts(record), "message": record.getMessage()})


class _JournalHandler(logging.Handler):
    """To systemd's journal, or to standard error if the journal does not listen."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            send_to_journal(list(_fields(record)))
        except OSError:
            _write(f"{_TaggedFormat().format(record)}\n")


#: Severities of RFC 5424 §6.2.1.
_PRIORITIES = {logging.ERROR: "3", logging.WARNING: "4", logging.INFO: "6", logging.DEBUG: "7"}


def _fields(record: logging.LogRecord) -> Iterator[tuple[str, str]]:
    yield "MESSAGE", printable(record.getMessage())
    yield "PRIORITY", _PRIORITIES.get(record.levelno, "3")
    yield "SYSLOG_IDENTIFIER", "ca-bridge"
    for key, value in facts(record).items():
        name = _FIELD_NAMES.get(key, key.upper())
        for line in value if isinstance(value, list) else [value]:
            yield f"CA_BRIDGE_{name}", printable(line)


#: Journal names that are not the key in capitals.
_FIELD_NAMES = {"certificates": "CERTIFICATE", "exitCode": "EXIT_CODE"}


def _handler(log_format: LogFormat) -> logging.Handler:
    if log_format is LogFormat.JOURNAL or (log_format is LogFormat.TEXT and stderr_is_journal()):
        return _JournalHandler()
    handler = _Handler(sys.stderr)
    plain = _TextFormat if sys.stderr.isatty() else _TaggedFormat
    text_format = _TerminalFormat if is_lively(sys.stderr) else plain
    handler.setFormatter(_JsonFormat() if log_format is LogFormat.JSON else text_format())
    return handler


def set_up(verbose: int, log_format: LogFormat) -> None:
    """Set up our own messages only: libraries' messages at a verbose level may contain headers."""
    log.handlers = [_handler(log_format)]
    log.propagate = False
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
