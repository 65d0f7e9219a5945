"""The tree inside the offline file; each file is verified with the manifest's digest before it is written."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from release.installer.places import InstallError


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`manifest.json` of a tree."""

    version: str
    platform: str  #: Such as `x86_64`.
    glibc: tuple[int, int]  #: The oldest that is enough.
    pythons: list[str]  #: Such as `3.11`.
    executable: frozenset[str]
    files: dict[str, str]  #: SHA-256 digest by path.
    digest: str  #: SHA-256 of the manifest itself.

    @property
    def directory(self) -> str:
        """The tree's name below `versions`: different content has a different name."""
        return f"{self.version}-{self.digest[:8]}"

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """Parse a manifest."""
        raw = json.loads(data)
        return cls(
            version=raw["version"],
            platform=raw["platform"],
            glibc=(raw["glibc"][0], raw["glibc"][1]),
            pythons=raw["pythons"],
            executable=frozenset(raw["executable"]),
            files=raw["files"],
            digest=hashlib.sha256(data).hexdigest(),
        )


class Payload:
    """The archive that this program was started from."""

    def __init__(self, path: Path) -> None:
        try:
            self._archive = zipfile.ZipFile(path)
            self._manifest = self._archive.read("tree/manifest.json")
        except (OSError, KeyError, zipfile.BadZipFile) as e:
            raise InstallError(
                f"{path}: wanted all of the file, found: {e}", "copy it again, and check its digest"
            ) from e
        self.manifest = Manifest.parse(self._manifest)

    def unpack(self, directory: Path) -> None:
        """Write the whole tree into an empty directory."""
        for path, digest in self.manifest.files.items():
            target = directory / path
            target.parent.mkdir(parents=True, exist_ok=True)
            _write(target, self._proven(path, digest), executable=path in self.manifest.executable)
        _write(directory / "manifest.json", self._manifest, executable=False)

    def _proven(self, path: str, digest: str) -> bytes:
        try:
            data = self._archive.read(f"tree/{path}")
        except (KeyError, zipfile.BadZipFile, zlib.error, OSError, EOFError) as e:
            raise _damaged(path, str(e)) from e
        if hashlib.sha256(data).hexdigest() != digest:
            raise _damaged(path, "another digest")
        return data


def _damaged(path: str, found: str) -> InstallError:
    hint = "copy it again, and check its digest and signature"
    return InstallError(f"{sys.argv[0]}: wanted {path} as in the manifest, found: {found}", hint)


def version(tree: Path) -> str:
    """The version of an installed tree, if its manifest can be read."""
    try:
        return Manifest.parse((tree / "manifest.json").read_bytes()).version
    except (OSError, ValueError, LookupError, TypeError):
        return "an unknown version"


def changed(tree: Path, wanted: Manifest | None = None) -> list[str]:
    """The files of an installed tree that are missing, changed, not in the manifest, or writable by others than root."""
    try:
        manifest = Manifest.parse((tree / "manifest.json").read_bytes())
    except (OSError, ValueError, LookupError, TypeError):
        return ["manifest.json"]
    if wanted is not None and wanted.digest != manifest.digest:
        return ["manifest.json"]
    there = {str(path.relative_to(tree)): path.lstat() for path in (tree, *tree.rglob("*"))}
    found = {path for path, status in there.items() if not _is_as_written(path, status, manifest)}
    found |= {path for path, digest in manifest.files.items() if path not in found and _digest(tree / path) != digest}
    return sorted(found)


def _is_as_written(path: str, status: os.stat_result, manifest: Manifest) -> bool:
    """Whether it is a directory, or a file of the manifest or compiled from one; the content is not checked."""
    if status.st_uid or status.st_mode & 0o022:
        return False
    if stat.S_ISDIR(status.st_mode):
        return True
    is_known = path in manifest.files or path in {"manifest.json", "python"} or ".pyc" in path.rpartition("/")[2]
    return is_known and stat.S_ISREG(status.st_mode) and not status.st_mode & (stat.S_ISUID | stat.S_ISGID)


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return "missing"


def _write(path: Path, data: bytes, *, executable: bool) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o755 if executable else 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
