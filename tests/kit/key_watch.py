"""A watch for CA keys: the kernel reports every file that is made, written or moved in some directories (inotify(7))."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import struct
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from bridge.pki.csr import key_block
from bridge.specs import AUTHORITIES

_CLOSE_WRITE, _MOVED_TO, _CREATE, _IS_DIRECTORY = 0x008, 0x080, 0x100, 0x40000000
_HEADER = struct.Struct("iIII")
_NAMES = {Path(authority.key_file).name for authority in AUTHORITIES.values()}  # ca.key, front-proxy-ca.key
_SPKI = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


class KeyWatch:
    """
    Notes every file with the private key of a CA, or with the name of such a file, from its beginning to its end.

    Directories that are made meanwhile are watched from then on, and looked into at once.
    """

    def __init__(self, directories: Iterable[Path], cas: Iterable[x509.Certificate]) -> None:
        """
        Args:
            directories: With all that is below them now.
            cas: Whose keys.
        """
        self.found: list[str] = []
        self.seen = 0  #: Files that were looked at.
        self._keys = {ca.public_key().public_bytes(*_SPKI) for ca in cas}
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._places: dict[int, Path] = {}
        self._end, self._ending = os.pipe()
        self._thread = threading.Thread(target=self._run, daemon=True)
        for directory in directories:
            self._add(directory)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.write(self._ending, b".")
        self._thread.join()
        for descriptor in (self._descriptor, self._end, self._ending):
            os.close(descriptor)

    def _add(self, directory: Path) -> None:
        mask = _CLOSE_WRITE | _MOVED_TO | _CREATE
        number = self._libc.inotify_add_watch(self._descriptor, os.fsencode(directory), mask)
        if number < 0:
            return  # it is gone already
        self._places[number] = directory
        with contextlib.suppress(OSError):
            for path in directory.iterdir():
                if path.is_dir() and not path.is_symlink():
                    self._add(path)
                else:
                    self._look(path)

    def _run(self) -> None:
        while True:
            ready, _, _ = select.select([self._descriptor, self._end], [], [])
            if self._descriptor in ready:
                self._take(os.read(self._descriptor, 1 << 16))
            elif self._end in ready:  # nothing is left to be read
                return

    def _take(self, data: bytes) -> None:
        place = 0
        while place < len(data):
            number, mask, _, length = _HEADER.unpack_from(data, place)
            name = data[place + _HEADER.size : place + _HEADER.size + length].rstrip(b"\0")
            place += _HEADER.size + length
            if number in self._places and name:
                path = self._places[number] / os.fsdecode(name)
                if mask & _IS_DIRECTORY:
                    self._add(path)
                else:
                    self._look(path)

    def _look(self, path: Path) -> None:
        self.seen += 1
        if path.name in _NAMES:
            self.found.append(f"{path}: named as a CA's key")
        with contextlib.suppress(OSError):
            data = path.read_bytes() if path.is_file() else b""
            if b"PRIVATE KEY-----" in data and self._is_a_cas(data):
                self.found.append(f"{path}: holds a CA's key")

    def _is_a_cas(self, data: bytes) -> bool:
        with contextlib.suppress(ValueError, TypeError, UnsupportedAlgorithm):  # half written, or of another kind
            return load_pem_private_key(key_block(data), None).public_key().public_bytes(*_SPKI) in self._keys
        return False
