"""A file system of a few kilobytes, and what fills it."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount; run the tests as root")
_PAGE_BYTES = 4096


@contextlib.contextmanager
def mounted(directory: Path, *options: str) -> Iterator[Path]:
    """Mount over a directory, which is made, until the end."""
    directory.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", *options, str(directory)], check=True)
    try:
        yield directory
    finally:
        # lazily: a program that a failed test left behind keeps no mount
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def tmpfs(directory: Path, size: str = "1m") -> contextlib.AbstractContextManager[Path]:
    """A file system in memory, which only its owner can read."""
    return mounted(directory, "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs")


def fill(directory: Path, spared_pages: int = 0) -> Path:
    """A file that takes all room but some pages."""
    path = directory / "filler"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(_PAGE_BYTES))
    os.truncate(path, max(0, path.stat().st_size - spared_pages * _PAGE_BYTES))
    return path
