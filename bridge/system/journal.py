"""
systemd's journal, by its own protocol: a message with its priority, its run and what it is about as fields.

https://systemd.io/JOURNAL_NATIVE_PROTOCOL/: one datagram a message. libsystemd is not needed for that.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

SOCKET = Path("/run/systemd/journal/socket")
#: A longer datagram would need a file descriptor to be passed; no message of ours is as long.
_LONGEST_VALUE = 32 << 10


def is_stderr() -> bool:
    """Whether standard error leads to the journal, as systemd says of what it starts (systemd.exec(5))."""
    named = os.environ.get("JOURNAL_STREAM", "")
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return named == f"{status.st_dev}:{status.st_ino}"


def send(fields: Sequence[tuple[str, str]], place: Path = SOCKET) -> None:
    """
    Have the journal take a message.

    Args:
        fields: Names in capital letters with their values; a name may stand there several times.
        place: The journal's socket.

    Raises:
        OSError: Nobody listens, or it is too long.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as ours:
        ours.sendto(b"".join(_encoded(name, value) for name, value in fields), str(place))


def _encoded(name: str, value: str) -> bytes:
    """A value with a line break could pass for further fields: it goes with its length."""
    data = value.encode("utf-8", "replace")[:_LONGEST_VALUE]
    if b"\n" not in data:
        return name.encode() + b"=" + data + b"\n"
    return name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
