"""What a command shows on a terminal: a pseudo-terminal for its output, or for its messages alone."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Shown:
    """What came of a command."""

    exit_code: int
    terminal: str  #: All that was written to it, escape sequences included.
    output: str  #: Standard output, where that is no terminal.

    @property
    def text(self) -> str:
        """What a person reads: without colours, and without what was written over."""
        text = re.sub(r"[^\n]*\r(?!\n)(\x1b\[K)?", "", self.terminal.replace("\r\n", "\n"))
        return re.sub(r"\x1b\[[0-9;]*[a-zA-Z]", "", text)


def run(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    *,
    columns: int = 80,
    messages_only: bool = False,
) -> Shown:
    """
    Run it to its end.

    Args:
        command: The program and its arguments.
        environment: On top of this process's; TERM is xterm unless it is there.
        columns: Of the terminal.
        messages_only: Standard error is the terminal, and standard output a pipe.
    """
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    plain = {key: value for key, value in os.environ.items() if key not in {"COLUMNS", "NO_COLOR"}}
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if messages_only else child,
        stderr=child,
        env={**plain, "TERM": "xterm", **(environment or {})},
    ) as process:
        os.close(child)
        shown = b"".join(iter(lambda: _read(parent), b""))
        output = process.stdout.read() if process.stdout is not None else b""
    os.close(parent)
    return Shown(process.returncode, shown.decode(), output.decode())


@contextlib.contextmanager
def working(command: Sequence[str], *ready: str) -> Iterator[str]:
    """A server on a terminal that has said a line with each of `ready` in it, and SIGTERM at the end; what it said until then."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=child, stderr=child)
    os.close(child)
    said, heard = bytearray(), threading.Event()
    lines = [re.compile(rf"[^\n]*{one}[^\n]*\n".encode()) for one in ready]

    def found() -> list[re.Match[bytes]]:
        return [one for line in lines if (one := line.search(said))]

    def listen() -> None:  # to the end, or the terminal would be full and the server would wait
        for part in iter(lambda: _read(parent), b""):
            said.extend(part)
            if len(found()) == len(lines):
                heard.set()
        heard.set()

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        assert heard.wait(180), said
        there = found()
        assert len(there) == len(lines), said
        yield Shown(0, said[: max(one.end() for one in there)].decode(), "").text
    finally:
        process.terminate()
        process.wait(180)
        listener.join()
        os.close(parent)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux's way to say that the other end is closed
        return b""
