"""
The database of an `openssl ca` directory: index.txt, its attributes and the folder of issued certificates.

`openssl ca` (1.1.1 to 3.5, measured) takes no lock, calls no fsync, drops an index line without a final newline, and
reports success when a full disk has cut the index. So the lock, the checks before and after a run, the backup and its
restoration are here.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from io import FileIO
from pathlib import Path

from cryptography import x509

from backends.openssl.settings import CA_PLACE_HINT, ConfigDoubtError, parse_config
from bridge.errors import BackendRefusedError, BackendUnavailableError, LocalFileError
from bridge.system.files import reasons, remove_unfinished, sync_directory, write_atomically
from bridge.system.locks import take_lock
from bridge.system.paths import exposure, open_regular

#: For operators, too: `flock DIR/.ca-bridge.lock openssl ca …`
LOCK_NAME = ".ca-bridge.lock"
QUARANTINE_NAME = ".ca-bridge-quarantine"
_BACKUP = ".ca-bridge."  # and a time; beside the index
_BACKUPS_KEPT = 3

# Between its two renames, an `openssl ca` that was started by hand without our lock looks for
# microseconds like a killed one.
_SETTLE_SECONDS = 1.0
_TICK_SECONDS = 2.0  # file systems' clocks may be that coarse
_MANY_FILES = 32
# Type, expiry, revocation date and reason, serial, file name (always "unknown"), subject. We first refuse each
# row that `openssl ca` would refuse (1.1.1 without a message) or drop.
_ROW = re.compile(
    rb"(?:[VE]\t\d{10,14}Z\t|R\t\d{10,14}Z\t\d{10,14}Z(?:,[^\t]*)?)\t((?:[0-9A-Fa-f]{2})+)\t[^\t]*\t[^\t]*"
)
_CERTIFICATE_NAME = re.compile(r"((?:[0-9A-F]{2})+)\.pem")
# Two copies that `openssl ca` makes of the index and one of ours; a certificate takes one or two blocks.
_INDEX_COPIES = 3
_BYTES_PER_CERTIFICATE = 16 * 1024
#: The largest certificate, with the text that openssl may have written before it.
_LARGEST_FILE = 1 << 20
#: Two million rows; `openssl ca` has all of them in memory several times.
_LARGEST_INDEX = 256 << 20

log = logging.getLogger("ca-bridge.openssl")


#: The row of a revoked certificate, and its serial number.
_REVOKED = re.compile(rb"^R\t[^\t\n]*\t[^\t\n]*\t([0-9A-Fa-f]+)\t", re.MULTILINE)


class IndexDamagedError(Exception):
    """An index that `openssl ca` would refuse, or from which it would silently lose rows."""


def parse_index(data: bytes) -> dict[int, int]:
    """The serial numbers of an index, with their line numbers (from 1)."""
    if data and not data.endswith(b"\n"):
        # openssl would drop the row, even a complete one, and exit with 0
        raise IndexDamagedError("the last line has no newline at its end")
    lines: dict[int, int] = {}
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        row = _ROW.fullmatch(line)
        if not row:
            fields = line.count(b"\t") + 1
            found = f"{fields} fields that are not that" if fields != 1 else "1 field that is not that"
            wanted = "type, dates, serial number, file and subject with tabs between them"
            raise IndexDamagedError(f"line {number}: wanted {wanted}, found {found}")
        serial = int(row[1], 16)
        if serial in lines:
            found = f"{serial:X} in line {lines[serial]} too"
            raise IndexDamagedError(f"line {number}: wanted each serial number once, found {found}")
        lines[serial] = number
    return lines


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An index as it is before a run."""

    data: bytes
    serials: frozenset[int]
    status: os.stat_result  #: Owner and mode that the CA's own user gave it.


def file_name(serial: int) -> str:
    """The file below `new_certs_dir`, as `openssl ca` names it: an even number of hexadecimal digits."""
    digits = f"{serial:X}"
    return f"{'0' * (len(digits) % 2)}{digits}.pem"


@dataclass(frozen=True, slots=True)
class Database:
    """An index file and its folder of certificates; all but `locked`, `check`, `read` and `revoked` need the lock."""

    index: Path  #: A real path: `openssl ca` replaces a symbolic link by a file.
    new_certs_dir: Path

    @property
    def attributes(self) -> Path:
        """The file in which `openssl ca` keeps `unique_subject`; it overrides openssl.cnf."""
        return self._beside(".attr")

    def _beside(self, suffix: str) -> Path:
        return self.index.with_name(self.index.name + suffix)

    @contextmanager
    def locked(self, limit: timedelta) -> Iterator[int]:
        """Hold the lock (BackendUnavailableError: another process holds it)."""
        path = self.index.with_name(LOCK_NAME)
        hint = "run as the CA's own user, which must be able to write in the database's folder"
        with reasons(LocalFileError, f"can't lock {path}", hint=hint):
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with suppress(PermissionError):  # then it is the CA's own user's already, or we can't give it away
                os.fchown(lock, self._pattern().st_uid, self._pattern().st_gid)
            with suppress(PermissionError):
                os.fchmod(lock, 0o600)  # a user who may open it may hold it for ever
            if not take_lock(lock, limit):
                wanted = f"the lock {path} within {limit.total_seconds():g} s"
                raise BackendUnavailableError(f"wanted {wanted}, found it held by another process")
            yield lock
        finally:
            os.close(lock)

    def read(self) -> Snapshot:
        """Read the index (LocalFileError: no such file; BackendRefusedError: it is damaged)."""
        try:
            with self._open() as file:
                data, status = file.read(), os.fstat(file.fileno())
            if not data:
                self._check_emptiness()
            return Snapshot(data, frozenset(parse_index(data)), status)
        except FileNotFoundError as e:
            hint = "if this CA has signed nothing yet, an empty file is right"
            raise LocalFileError(f"there is no file {self.index}, the CA's database", hint=hint) from e
        except OSError as e:
            raise LocalFileError(f"can't read the CA's database {self.index}: {e.strerror}") from e
        except IndexDamagedError as e:
            raise BackendRefusedError(
                f"the CA's database {self.index}: {e}",
                hint=f"openssl ca would refuse it or lose rows of it; fix it, or put back a copy that is right"
                f" (ours are {self.index.name}{_BACKUP}*)",
            ) from e

    def revoked(self) -> frozenset[int]:
        """The serial numbers that are revoked; works also while another run signs."""
        with reasons(LocalFileError, f"can't read the CA's database {self.index}"), self._open() as file:
            return frozenset(int(serial, 16) for serial in _REVOKED.findall(file.read()))

    def _open(self) -> FileIO:
        """Open the index, or wait while another run's `openssl ca` is between its renames."""
        with suppress(FileNotFoundError):
            return open_regular(self.index, _LARGEST_INDEX)
        time.sleep(_SETTLE_SECONDS)
        return open_regular(self.index, _LARGEST_INDEX)

    def _check_emptiness(self) -> None:
        """Refuse an index that a power cut emptied: it looks like a new CA's, and `openssl ca` takes it for one."""
        for path in (self._beside(".old"), *self._backups()[-1:]):
            if _read_if_there(path):
                raise IndexDamagedError(f"wanted rows, as in {path.name}, found an empty file")

    def check(self) -> None:
        """Find out, changing nothing, whether a run could begin."""
        if self.index.exists() or self._remains() is None:
            self.read()
        self._unique_subject()
        self.check_folders()

    def check_folders(self) -> None:
        """Make sure that both folders exist and that we can write in them."""
        for folder in (self.index.parent, self.new_certs_dir):
            if not folder.is_dir():
                hint = f"mkdir -m 0700 {folder}, as the CA's own user; or set `dir` to the CA's folder"
                raise LocalFileError(f"there is no folder {folder}", hint=hint)
            if (weakness := exposure(folder)) is not None:
                owner, hint = folder.stat().st_uid, weakness.hint
                hint = hint if owner in {0, os.geteuid()} else f"run it as the CA's own user {owner}, or {hint}"
                raise LocalFileError(f"the CA's folder: {weakness}", hint=hint)
            if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
                hint = "run as the CA's own user; openssl ca replaces files by renaming, so it must write the folder"
                raise LocalFileError(f"wanted a folder that we can write in, found {folder}", hint=hint)

    def put_right(self) -> None:
        """Repair what a killed run left: no index, or no attributes."""
        self._find_index()
        if not self._unique_subject():
            _write(self.attributes, b"unique_subject = no\n", self._pattern())

    def _find_index(self) -> None:
        if not self.index.exists():
            time.sleep(_SETTLE_SECONDS)
        if not self.index.exists() and (remains := self._remains()) is not None:
            log.warning("%s was missing, as after a killed openssl ca; put back from its .new or .old", self.index)
            _write(self.index, remains, self._pattern())

    def _remains(self) -> bytes | None:
        """The index as it should be after a run that died between its renames; None: no file shows it."""
        before, after = _read_if_there(self._beside(".old")), _read_if_there(self._beside(".new"))
        if before is not None and after is not None and after.startswith(before):
            with suppress(IndexDamagedError):
                known = parse_index(before)
                added = [serial for serial in parse_index(after) if serial not in known]
                if all(self.certificate(serial) for serial in added):
                    return after
        return before

    def _unique_subject(self) -> bool:
        """Whether the attributes say `unique_subject = no`; False: they say nothing."""
        text = (_read_if_there(self.attributes) or b"").decode(errors="surrogateescape")
        try:
            value = parse_config(text, {}).get("default", "unique_subject")
        except ConfigDoubtError as e:
            raise BackendRefusedError(f"{self.attributes}:{e.line}: wanted {e.wanted}, found {e.found}") from e
        # openssl reads only the first letter, and takes any other value for a yes
        if value is not None and value.text[:1] not in tuple("nNfF0"):
            raise BackendRefusedError(
                f"{self.attributes}:{value.line}: wanted unique_subject = no, found {value.text!r}",
                hint="with it no certificate can be renewed, and etcd-server and etcd-peer share a subject from the"
                f" start; put the one line `unique_subject = no` into {self.attributes}",
            )
        return value is not None

    def certificate(self, serial: int) -> x509.Certificate | None:
        """The certificate with this number; None: there is none in the folder, no whole one, or more than one."""
        return _parse_if_whole(_read_if_there(self.new_certs_dir / file_name(serial), _LARGEST_FILE))

    def issued_since(self, moment: datetime) -> Iterator[x509.Certificate]:
        """The certificates whose files are not older than `moment`."""
        earliest = moment.timestamp() - _TICK_SECONDS
        for entry in os.scandir(self.new_certs_dir):
            name = _CERTIFICATE_NAME.fullmatch(entry.name)
            if name and entry.stat().st_mtime >= earliest and (certificate := self.certificate(int(name[1], 16))):
                yield certificate

    def orphans(self, index: Snapshot) -> list[tuple[Path, x509.Certificate]]:
        """Certificates in the folder whose numbers are not in the index; incomplete files are moved aside."""
        paths = self._unknown_files(index)
        if any(time.time() - path.stat().st_mtime < _SETTLE_SECONDS for path in paths):
            time.sleep(_SETTLE_SECONDS)
            paths = self._unknown_files(self.read())
        orphans = []
        for path in paths:
            certificate = _parse_if_whole(_read_if_there(path, _LARGEST_FILE))
            if certificate:
                orphans.append((path, certificate))
            else:
                self._quarantine(path)
        return orphans

    def _unknown_files(self, index: Snapshot) -> list[Path]:
        names = (_CERTIFICATE_NAME.fullmatch(entry.name) for entry in os.scandir(self.new_certs_dir))
        return [self.new_certs_dir / name[0] for name in names if name and int(name[1], 16) not in index.serials]

    def _quarantine(self, path: Path) -> None:
        folder = self.new_certs_dir / QUARANTINE_NAME
        folder.mkdir(mode=0o700, exist_ok=True)
        target = folder / f"{path.name}.{time.time_ns()}"
        log.warning("%s holds no whole certificate, as after a killed openssl ca; moved to %s", path, target)
        path.rename(target)

    def check_space(self, index_size: int, certificates: int) -> None:
        """Make sure that the disk has room for a run: `openssl ca` does not notice a full disk."""
        wanted = _INDEX_COPIES * index_size + _BYTES_PER_CERTIFICATE * (certificates + 1)
        for folder in {self.index.parent, self.new_certs_dir}:
            disk = os.statvfs(folder)
            if (free_bytes := disk.f_bavail * disk.f_frsize) < wanted:
                text = f"wanted {wanted} bytes of free space in {folder}, found {free_bytes}"
                hint = "openssl ca damages its database when the disk is full; make room"
                raise BackendUnavailableError(text, hint=hint)
            if disk.f_files and disk.f_favail < certificates + _INDEX_COPIES:
                wanted_files = f"room for {certificates + _INDEX_COPIES} files in {folder}"
                raise BackendUnavailableError(f"wanted {wanted_files}, found {disk.f_favail}")

    def back_up(self, before: Snapshot) -> Path:
        """Keep a copy of the index; `.old` is no backup, since the next run would put a damaged index there."""
        remove_unfinished(self.index.parent, f".{self.index.name}{_BACKUP}*.????????")
        copy = self._beside(datetime.now(UTC).strftime(f"{_BACKUP}%Y%m%dT%H%M%S.%fZ"))
        _write(copy, before.data, before.status)
        for path in self._backups()[:-_BACKUPS_KEPT]:
            path.unlink()
        return copy

    def _backups(self) -> list[Path]:
        prefix = self.index.name + _BACKUP
        return sorted(path for path in self.index.parent.iterdir() if path.name.startswith(prefix))

    def added(self, before: Snapshot, copy: Path) -> list[int]:
        """
        The serial numbers that a run added to the index `before` it, in order; the index gets its old owner and mode.

        BackendRefusedError: the run damaged the index, and `copy` (from `back_up`) replaced it.
        """
        self._find_index()
        try:
            serials = _new_serials(before, self.index.read_bytes())
        except IndexDamagedError as e:
            copy.rename(self.index)  # where the disk is full there is no room for another copy
            sync_directory(self.index.parent)
            raise BackendRefusedError(
                f"openssl ca damaged the CA's database {self.index} ({e}); the old one is back",
                hint="a full disk does that, or a second openssl ca that does not take our lock; what was signed will"
                " be recorded by the next run",
            ) from e
        self.adopt(before.status, serials)
        self.put_right()
        return serials

    def adopt(self, pattern: os.stat_result, serials: Sequence[int] = ()) -> None:
        """Give the index and its attributes, which each run writes anew, and new certificates this owner and mode."""
        for path in (self.index, self.attributes, *(self.new_certs_dir / file_name(serial) for serial in serials)):
            with suppress(FileNotFoundError), open_regular(path, None) as file:
                _adopt(file.fileno(), pattern)

    def sync(self, serials: Sequence[int]) -> None:
        """Make new certificates and the index survive a power cut."""
        many = len(serials) > _MANY_FILES
        paths = () if many else [self.new_certs_dir / file_name(serial) for serial in serials]
        for path in () if many else (*paths, self.index, self.attributes):
            with suppress(FileNotFoundError):
                _sync(path)
        folders = (self.new_certs_dir, self.index.parent)
        for folder in {folder.stat().st_dev: folder for folder in folders}.values() if many else folders:
            _sync(folder, whole_file_system=many)

    def _pattern(self) -> os.stat_result:
        """The owner and mode for new files beside the index."""
        for path in (self.index, self._beside(".old"), self.index.parent):
            with suppress(FileNotFoundError):
                return path.stat()
        raise LocalFileError(f"there is no folder {self.index.parent}", hint=CA_PLACE_HINT)


def _new_serials(before: Snapshot, after: bytes) -> list[int]:
    """The serial numbers of new rows; usually the old rows are unchanged, and only the new ones are parsed."""
    if after.startswith(before.data):
        return list(parse_index(after[len(before.data) :]))
    # someone without our lock may have revoked a certificate meanwhile: the old rows would undo that
    new_serials = parse_index(after)
    lost = [serial for serial in parse_index(before.data) if serial not in new_serials]
    if lost:
        raise IndexDamagedError(f"{len(lost)} old rows are missing")
    return [serial for serial in new_serials if serial not in before.serials]


def _read_if_there(path: Path, at_most: int = -1) -> bytes | None:
    most = _LARGEST_INDEX if at_most < 0 else None
    with reasons(LocalFileError, f"can't read {path}"), suppress(FileNotFoundError), open_regular(path, most) as file:
        return file.read(at_most)
    return None


def _parse_if_whole(data: bytes | None) -> x509.Certificate | None:
    try:
        certificate = x509.load_pem_x509_certificates(data or b"")
    except (ValueError, x509.InvalidVersion):
        return None
    return certificate[0] if len(certificate) == 1 and len(data or b"") < _LARGEST_FILE else None


def _adopt(fd: int, pattern: os.stat_result) -> None:
    """Give a file the owner and the mode of another; only root can give it away, other users keep it."""
    with suppress(PermissionError):
        os.fchown(fd, pattern.st_uid, pattern.st_gid)
    with suppress(PermissionError):
        os.fchmod(fd, pattern.st_mode & 0o666)


def _write(path: Path, data: bytes, pattern: os.stat_result) -> None:
    write_atomically(path, data, adopt=lambda fd: _adopt(fd, pattern))


def _sync(path: Path, *, whole_file_system: bool = False) -> None:
    """Flush a file, or a folder's new names, to disk; or the whole file system, which is faster than many fsync(2)."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if not whole_file_system:
            os.fsync(fd)
        elif ctypes.CDLL(None, use_errno=True).syncfs(fd) != 0:  # Python has no name for it
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    finally:
        os.close(fd)
