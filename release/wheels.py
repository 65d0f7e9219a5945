"""Downloaded wheels: names, tags, contents. Nothing runs or imports them."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from functools import cached_property
from pathlib import Path

#: One file has the modules for all of them; the launcher uses the Python that the machine has.
PYTHONS = ("3.13", "3.12", "3.11")
PLATFORMS = ("x86_64", "aarch64")

_GLIBC = re.compile(r"manylinux_(\d+)_(\d+)_\w+")


class BuildError(Exception):
    """Nothing was built; the text says what was wanted and what was found."""


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """One wheel file (https://packaging.python.org/en/latest/specifications/binary-distribution-format/)."""

    path: Path
    name: str  #: Normalised, as in the lock file.
    version: str
    pythons: frozenset[str]  #: Such as `cp311` or `py3`.
    abis: frozenset[str]
    platforms: frozenset[str]

    @classmethod
    def read(cls, path: Path) -> Wheel:
        """A wheel's name and tags."""
        parts = path.stem.split("-")
        if path.suffix != ".whl" or len(parts) not in {5, 6}:
            raise BuildError(f"{path.name}: wanted the name of a wheel")
        pythons, abis, platforms = (frozenset(part.split(".")) for part in parts[-3:])
        return cls(
            path=path,
            name=normal(parts[0]),
            version=parts[1],
            pythons=pythons,
            abis=abis,
            platforms=platforms,
        )

    @property
    def place(self) -> str:
        """`any` for every Python, or the single Python that it is for, such as `cp311`."""
        if self.abis & {"none", "abi3"}:
            return "any"
        (python,) = self.pythons
        return python

    @property
    def glibc(self) -> tuple[int, int]:
        """The oldest glibc that it runs on; (0, 0) if it needs none (PEP 600)."""
        found = [match for platform in self.platforms if (match := _GLIBC.fullmatch(platform))]
        return min(((int(one[1]), int(one[2])) for one in found), default=(0, 0))

    @cached_property
    def sha256(self) -> str:
        """The file's digest, in the lock file's form."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    @cached_property
    def metadata(self) -> Message:
        """The wheel's METADATA."""
        with zipfile.ZipFile(self.path) as file:
            (name,) = [one for one in file.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", one)]
            return Parser().parsestr(file.read(name).decode())

    def files(self) -> Iterator[tuple[str, bytes, bool]]:
        """Each file's path, content and whether it is executable, verified against RECORD."""
        with zipfile.ZipFile(self.path) as file:
            (record,) = [one for one in file.namelist() if re.fullmatch(r"[^/]+\.dist-info/RECORD", one)]
            wanted = {row[0]: row[1] for row in csv.reader(io.StringIO(file.read(record).decode())) if row}
            for info in file.infolist():
                if info.is_dir():
                    continue
                data = file.read(info)
                if info.filename != record and wanted.get(info.filename) != _digest(data):
                    raise BuildError(f"{self.path.name}: wanted {info.filename} as in RECORD, found another content")
                if ".." in info.filename.split("/") or info.filename.startswith("/"):
                    raise BuildError(f"{self.path.name}: wanted paths inside the wheel, found {info.filename}")
                yield info.filename, data, bool(info.external_attr >> 16 & 0o111)


def _digest(data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"sha256={digest}"


def normal(name: str) -> str:
    """A distribution's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(text: str) -> dict[str, tuple[str, frozenset[str]]]:
    """Version and allowed SHA-256 digests of each distribution in a lock file, except those for Windows only."""
    found: dict[str, tuple[str, frozenset[str]]] = {}
    text = re.sub(r"^[^ #\n]+ ; sys_platform == 'win32'.*?(?=^[\w#]|\Z)", "", text, flags=re.MULTILINE | re.DOTALL)
    for name, version, rest in re.findall(r"^([\w.-]+)==(\S+)(.*?)(?=^[\w#]|\Z)", text, re.MULTILINE | re.DOTALL):
        found[normal(name)] = (version, frozenset(re.findall(r"--hash=sha256:([0-9a-f]{64})", rest)))
    return found


def proven(directory: Path, lock: str) -> list[Wheel]:
    """Return a directory's wheels, sorted; each must be in the lock file with one of its digests."""
    wanted = locked(lock)
    wheels = sorted((Wheel.read(path) for path in directory.glob("*.whl")), key=lambda wheel: wheel.path.name)
    for wheel in wheels:
        version, digests = wanted.get(wheel.name, ("none", frozenset()))
        if wheel.version != version or wheel.sha256 not in digests:
            raise BuildError(f"{wheel.path.name}: wanted a file that requirements.lock names, found {wheel.sha256}")
    for python in PYTHONS:
        tag = f"cp{python.replace('.', '')}"
        there = {wheel.name for wheel in wheels if wheel.place in {"any", tag}}
        if missing := sorted(wanted.keys() - there):
            raise BuildError(f"wanted wheels for Python {python} of all that the lock names, found none for {missing}")
    return wheels
