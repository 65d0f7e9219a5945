"""
Private keys in files, whatever the files are called; a key is known by its public half.

Others can write some of these files: each is opened once, without following a link, and read to a limit.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import gzip
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_der_private_key

from bridge.pki.certificates import spki
from bridge.system.paths import UnreadableError, mounts, regular_file

#: What the kernel makes up, and what mounts something when it is looked at.
_NO_FILES = frozenset(
    [
        "autofs",
        "binfmt_misc",
        "bpf",
        "cgroup",
        "cgroup2",
        "configfs",
        "debugfs",
        "devpts",
        "efivarfs",
        "fusectl",
        "mqueue",
        "proc",
        "pstore",
        "securityfs",
        "selinuxfs",
        "sysfs",
        "tracefs",
    ]
)
#: What other machines hold; it may be large, slow and full of other people's files.
_REMOTE = re.compile(r"nfs4?|cifs|smb3|ceph|lustre|afs|gpfs|beegfs|glusterfs|fuse\..+")
_PIECE = 1 << 20
#: Of each file, and of what gzip has compressed in it.
_MOST_PIECES = 64
#: The longest text that a key of 16,384 bits has, in base64 twice.
_LONGEST_KEY = 32_000
_BEGIN = re.compile(rb"-----BEGIN ([A-Z ]{0,20}PRIVATE KEY)-----")
#: Texts that begin with a PEM block, as a YAML or JSON file holds them.
_BASE64 = re.compile(rb"LS0tLS1CRUdJTi[A-Za-z0-9+/\s]{100,}")
#: What may be between the lines: also a line end as JSON writes it.
_NOT_BASE64 = re.compile(rb"\\[nrt]|[^A-Za-z0-9+/]")
_GZIP, _SEQUENCE = b"\x1f\x8b", b"\x30"


@dataclass(slots=True)
class Held:
    """The private keys in one file."""

    public: set[bytes] = field(default_factory=set)  #: Their public halves.
    is_encrypted: bool = False  #: One has a passphrase.
    is_closed: bool = False  #: The file can't be read.
    is_cut: bool = False  #: It is longer than what was read.

    @classmethod
    def by_file(cls, path: Path) -> Held:
        """Read one file; it may be gone."""
        held = cls()
        try:
            with regular_file(path, os.O_NOFOLLOW) as (descriptor, _), open(descriptor, "rb", closefd=False) as file:
                held.read(file)
        except FileNotFoundError:
            pass
        except (OSError, UnreadableError):
            held.is_closed = True
        return held

    def read(self, file: BinaryIO) -> None:
        """Read a file as it is, and what gzip has compressed in it."""
        self._read(file)
        file.seek(0)
        if file.read(2) == _GZIP:
            file.seek(0)
            with contextlib.suppress(gzip.BadGzipFile, EOFError, zlib.error):
                self._read(gzip.GzipFile(fileobj=file))

    def _read(self, file: BinaryIO | gzip.GzipFile) -> None:
        kept = b""
        for _ in range(_MOST_PIECES):
            piece = file.read(_PIECE)
            if not piece:
                return
            if not kept and piece[:1] == _SEQUENCE and len(piece) < _LONGEST_KEY:
                self._add_key(piece)
            text = kept + piece
            self._add_text(text)
            for found in _BASE64.finditer(text):
                self._add_text(_decoded(found[0]))
            kept = text[-_LONGEST_KEY:]
        self.is_cut |= bool(file.read(1))

    def _add_text(self, text: bytes) -> None:
        for found in _BEGIN.finditer(text):
            end = text.find(b"-----", found.end(), found.end() + _LONGEST_KEY)
            body = text[found.end() : max(end, 0)]
            if b"DEK-Info" in body:  # RFC 1421; PKCS #8 has it in the DER
                self.is_encrypted = True
            else:
                self._add_key(_decoded(body))

    def _add_key(self, der: bytes) -> None:
        try:
            self.public.add(spki(load_der_private_key(der, None, unsafe_skip_rsa_key_validation=True).public_key()))
        except TypeError:
            self.is_encrypted = True
        except (ValueError, UnsupportedAlgorithm):
            pass


def _decoded(text: bytes) -> bytes:
    """Base64, perhaps in lines and cut off; empty: it is none."""
    text = _NOT_BASE64.sub(b"", text)
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4))
    except binascii.Error:
        return b""


class Walk:
    """All regular files below directories of this machine, each once."""

    def __init__(self) -> None:
        self.seen: set[tuple[int, int]] = set()
        self.closed = 0  #: Directories and files that could not be looked at.
        self.remote: set[str] = set()  #: Places of other machines' file systems, which are left out.

    def below(self, root: Path) -> Iterator[Path]:
        """The files below a directory, without following a link."""
        kinds, waiting = mounts(), [str(root)]
        while waiting:
            try:
                with os.scandir(waiting.pop()) as entries:
                    found = sorted(entries, key=lambda entry: entry.name)
            except OSError as e:
                self._count(e)
                continue
            for entry in found:
                try:
                    if entry.is_dir(follow_symlinks=False):
                        waiting += [entry.path] if self._is_here(kinds.get(entry.path, ""), entry.path) else []
                    elif entry.is_file(follow_symlinks=False) and self._is_new(entry.stat(follow_symlinks=False)):
                        yield Path(entry.path)
                except OSError as e:
                    self._count(e)

    def _is_here(self, kind: str, place: str) -> bool:
        if _REMOTE.fullmatch(kind):
            self.remote.add(place)
            return False
        return kind not in _NO_FILES

    def _is_new(self, status: os.stat_result) -> bool:
        """Whether this file was not seen by another name."""
        key = (status.st_dev, status.st_ino)
        is_new = key not in self.seen
        self.seen.add(key)
        return is_new

    def _count(self, error: OSError) -> None:
        self.closed += not isinstance(error, FileNotFoundError)
