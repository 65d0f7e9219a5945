"""Reading a node's files, whatever stands in their place."""

from __future__ import annotations

import os
import stat
from pathlib import Path

#: Certificates, kubeconfigs and manifests are far below.
MAX_BYTES = 1 << 20


class UnreadableError(Exception):
    """Something is there and can't be read; the text says why."""


def read(path: Path) -> bytes | None:
    """
    A file's content; None when there is none: nothing, a dangling symlink or a directory (as kubeadm sees it).

    Raises:
        UnreadableError: No permission, not a regular file, too large, or the disk's trouble.
    """
    try:
        with open(path, "rb", opener=_open) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UnreadableError("not a regular file")
            data = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as e:
        raise UnreadableError(e.strerror or str(e)) from e
    if len(data) > MAX_BYTES:
        raise UnreadableError(f"more than {MAX_BYTES} bytes")
    return data


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # or a named pipe would keep us for ever
