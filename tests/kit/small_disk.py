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
def tmpfs(directory: Path, size: str = "1m") -> Iterator[Path]:
    """A file system in memory over a directory, which is made; its owner alone can read it. No file stays open in it."""
    directory.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", directory], check=True)
    lazily = ["--lazy"]  # a program that a failed test left behind keeps no mount
    try:
        yield directory
        lazily = []
    finally:
        subprocess.run(["umount", *lazily, directory], check=True)


def fill(directory: Path, spared_pages: int = 0) -> Path:
    """A file that takes all room but some pages."""
    path = directory / "filler"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(_PAGE_BYTES))
    os.truncate(path, max(0, path.stat().st_size - spared_pages * _PAGE_BYTES))
    return path
