"""Reading files, whatever stands in their place."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

#: Certificates, kubeconfigs and manifests are far below.
MAX_FILE_BYTES = 1 << 20


class UnreadableError(Exception):
    """Something is there and can't be read; the text says why."""


def read(path: Path) -> bytes | None:
    """
    A file's content; None when there is none: nothing, a dangling symlink or a directory (as kubeadm sees it).

    Raises:
        UnreadableError: No permission, not a regular file, too large, or the disk's trouble.
    """
    try:
        return _read(path, 0)[0]
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


def read_once(path: Path) -> tuple[bytes, os.stat_result]:
    """
    Content and status of a file in a directory that others can write to: opened once, and no link is followed.

    Whoever judges it has to keep these bytes: under the same name there may be another file by now.

    Raises:
        FileNotFoundError: Nothing is there (any more).
        UnreadableError: As `read`; also for a link or a directory.
    """
    try:
        return _read(path, os.O_NOFOLLOW)
    except (NotADirectoryError, IsADirectoryError) as e:
        raise UnreadableError("not a regular file") from e


def _read(path: Path, flags: int) -> tuple[bytes, os.stat_result]:
    try:
        # without O_NONBLOCK a named pipe would keep us for ever
        with open(path, "rb", opener=lambda name, mode: os.open(name, mode | os.O_NONBLOCK | flags)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UnreadableError("not a regular file")
            data = file.read(MAX_FILE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise
    except OSError as e:
        found = "a symbolic link" if e.errno == errno.ELOOP and flags else e.strerror or str(e)
        raise UnreadableError(found) from e
    if len(data) > MAX_FILE_BYTES:
        raise UnreadableError(f"more than {MAX_FILE_BYTES} bytes")
    return data, status
