"""A watch for CA keys: the kernel reports every file that is made, written or moved in some directories."""

from __future__ import annotations

import contextlib
import os
import select
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
from tests.kit.inotify import CLOSE_WRITE, CREATE, IS_DIRECTORY, MOVED_TO, Inotify

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
        self._kernel = Inotify()
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
        self._kernel.close()
        for descriptor in (self._end, self._ending):
            os.close(descriptor)

    def _add(self, directory: Path) -> None:
        if not self._kernel.add(directory, CLOSE_WRITE | MOVED_TO | CREATE):
            return
        with contextlib.suppress(OSError):
            for path in directory.iterdir():
                if path.is_dir() and not path.is_symlink():
                    self._add(path)
                else:
                    self._look(path)

    def _run(self) -> None:
        while True:
            ready, _, _ = select.select([self._kernel.descriptor, self._end], [], [])
            if self._kernel.descriptor in ready:
                for path, kinds in self._kernel.events():
                    (self._add if kinds & IS_DIRECTORY else self._look)(path)
            elif self._end in ready:  # nothing is left to be read
                return

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
