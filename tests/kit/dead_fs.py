"""A file system that does not answer, as a network's does when its server is away: a FUSE that no program serves."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

_DEVICE = Path("/dev/fuse")
_DETACH = 2  # MNT_DETACH
#: Not a fault of the program: only root may mount, and not every kernel has FUSE.
needs_mount = pytest.mark.skipif(
    os.geteuid() != 0 or not _DEVICE.exists(), reason="needs root and /dev/fuse, for a file system that does not answer"
)


@contextlib.contextmanager
def mounted(directory: Path) -> Iterator[Path]:
    """Mount it there; at the end all that wait for it get an error."""
    directory.mkdir(parents=True, exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    served = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        options = f"fd={served},rootmode=40000,user_id=0,group_id=0".encode()
        assert libc.mount(b"dead", bytes(directory), b"fuse", 0, options) == 0, os.strerror(ctypes.get_errno())
        try:
            yield directory
        finally:
            os.close(served)
            served = -1
            libc.umount2(bytes(directory), _DETACH)
    finally:
        if served >= 0:
            os.close(served)
