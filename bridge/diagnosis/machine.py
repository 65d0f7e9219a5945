"""What a renewal needs of the machine: disk space, the state directory, the lock, and no outdated copies."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

from cryptography import x509

from bridge.diagnosis import Finding, Level, from_error
from bridge.errors import BridgeError
from bridge.node import kubeconfig
from bridge.node.inventory import Item, Node
from bridge.pki.certificates import load_pem_certificates, serial_hex
from bridge.renewal.prepare import BYTES_NEEDED, INODES_NEEDED, directories
from bridge.renewal.transaction import state_files
from bridge.settings.tables import Settings
from bridge.state import Store, copies
from bridge.state.session import is_ours
from bridge.system import files, jobs, locks
from bridge.system.console import READ_ONLY_HINT
from bridge.system.paths import ForeignLinkError, UnreadableError, opened, read_once, real_path
from bridge.system.state_file import StateError
from bridge.system.waiting import within
from bridge.words import one_line

#: Below these bytes and inodes there is a warning.
_LITTLE, _FEW_INODES = 16 << 20, 512
#: A run may take this long while it waits for neighbours, a lease and restarts.
_HUNG_AFTER = timedelta(hours=1)


def look(node: Node, settings: Settings, now: datetime) -> Iterator[Finding]:
    """Check the machine."""
    yield from disk_space(directories(settings, [item for item in node.items if item.managed]))
    yield from _frozen(node)
    yield from state_directory(settings.node.state_dir)
    yield from _state_of_others(settings)
    yield from lock(settings.node.state_dir, now)
    yield from _metrics(settings)
    yield from jobs_of_cron()
    yield from _listed_copies(node, settings)
    yield from _copies(node, [home for home in _homes() if home / ".kube/config" not in settings.copies.files.paths])


def disk_space(places: Sequence[Path]) -> Iterator[Finding]:
    """Check free bytes and inodes on the file system of each path."""
    for found in files.disk_spaces(places):
        about = f"file system of {found.place}"
        if found.is_read_only:
            text = "wanted one that can be written to, found it mounted read-only: no renewal can be installed"
            yield Finding.error("read-only", about, text, READ_ONLY_HINT)
        if found.free < _LITTLE:
            needs = f"{_LITTLE >> 20} MiB for a renewal, its backup and some time to come"
            text = f"wanted {needs}, found {found.free >> 10} KiB"
            level: Level = "error" if found.free < BYTES_NEEDED else "warning"
            yield Finding(level, "disk-space", about, text, "make room there")
        if found.inodes is not None and found.inodes < _FEW_INODES:
            text = f"wanted {_FEW_INODES} inodes for new files, found {found.inodes}"
            level = "error" if found.inodes < INODES_NEEDED else "warning"
            yield Finding(level, "inodes", about, text, "remove small files there")


def _frozen(node: Node) -> Iterator[Finding]:
    """Find files and directories of certificates that not even root can replace."""
    paths: dict[Path, str] = {}
    for item in node.items:
        if item.managed and item.state == "present":
            for file in filter(None, (item.certificate_path, item.key_path)):
                real = real_path(file)
                paths |= {path: item.spec.name for path in (real, real.parent) if path not in paths}
    for path, name in paths.items():
        if files.is_frozen(path):
            text = f"can't replace {path}: it is immutable or append-only: no renewal can be installed"
            hint = f"chattr -i -a {path}, after a look at who set it"
            yield Finding.error("immutable", name, text, hint, str(path))


# --- the state directory ---------------------------------------------------------------------------------------------


def state_directory(path: Path) -> Iterator[Finding]:
    """Check that the state directory is closed to other users, and holds nothing half done."""
    about = "state directory"
    if Store(path).is_interrupted:
        text = "an installation or restart is under way, or was interrupted; the next run, or `recover`, finishes it"
        yield Finding.warning("interrupted", about, text)
    if not path.is_dir():
        yield Finding.ok("state-directory", about, f"{path} is made by the first renewal")
        return
    status = path.stat()
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid != os.geteuid() or mode & 0o077:
        text = f"wanted {path} to be ours with mode 0700, found owner {status.st_uid} and mode {mode:04o}"
        yield Finding.error("state-directory", about, text, files.how_to_own(path, status.st_uid))
    else:
        yield Finding.ok("state-directory", about, str(path))
        yield from _state_files(Store(path))


def _state_files(store: Store) -> Iterator[Finding]:
    """Find damaged state files, which may end each run before it asks a CA."""
    for file in state_files(store):
        try:
            damage: StateError | None = file.damage()
        except StateError as e:  # the file can't be read
            damage = e
        if damage is not None:
            yield from_error("state-file", str(file.path), damage)


def _state_of_others(settings: Settings) -> Iterator[Finding]:
    """Check that the state directory belongs to this cluster, as each run that writes does."""
    try:
        is_ours(settings)
    except BridgeError as e:
        yield from_error("state-directory", "state directory", e)


def lock(state_dir: Path, now: datetime) -> Iterator[Finding]:
    """Report a run that holds the lock; a run that never ends keeps out all others."""
    try:
        holder = locks.held_by(Store(state_dir).lock)
    except BridgeError as e:
        yield from_error("lock", "lock", e)
        return
    if holder is None:
        return
    if holder.since is None or now - holder.since > _HUNG_AFTER:
        text = f"wanted a run to end within an hour, found {one_line(holder)}"
        hint = "see what it waits for (`ps`, its log), then end it; the next run goes on where it stopped"
        yield Finding.warning("hung-run", "lock", text, hint)
    else:
        yield Finding.note("lock", "lock", f"a run is under way: {one_line(holder)}")


def jobs_of_cron() -> Iterator[Finding]:
    """Check that cron runs where /etc/cron.d has a file of ours."""
    crontabs = jobs.crontabs()
    if crontabs and not jobs.cron_runs():
        text = f"wanted a cron that runs the jobs of {', '.join(map(str, crontabs))}, found none"
        hint = "start one; or `ca-bridge setup systemd --enable`, and remove the file"
        yield Finding.warning("cron", "cron", text, hint)


def desk_directories() -> Iterator[Finding]:
    """Check that the desk's job can write to its inbox and outbox."""
    for places in jobs.desk_places():
        for name, path in (("inbox", places.inbox), ("outbox", places.outbox)):
            try:
                found = jobs.trouble_with(path, places.user)
            except KeyError:
                found = f"no user {places.user}, as which {places.job} runs"
            if found:
                hint = f"chown {places.user} {path}" if path.is_dir() else f"install -d -o {places.user} {path}"
                text = f"wanted the desk's {name}, which {places.user} can write to, found {found}"
                yield Finding.error("desk-directory", str(path), text, hint)
            else:
                yield Finding.ok("desk-directory", str(path), f"the {name} of the job in {places.job}")


def _metrics(settings: Settings) -> Iterator[Finding]:
    """Check that the next run could write its metrics; writes nothing."""
    file = settings.metrics.file
    if file is None:
        return
    try:
        with opened(file) as place:
            place.path.parent.stat()
    except (OSError, ForeignLinkError) as e:
        reason = e.strerror if isinstance(e, OSError) else str(e)
        text = f"wanted a directory for the metrics file, found: {reason}"
        hint = "mend it, or metrics.file in the settings; until then each `renew` ends with exit code 1"
        yield Finding.error("metrics", str(file), one_line(str(text)), hint)
    else:
        yield Finding.ok("metrics", str(file), "is written by each `renew`")


# --- copies of admin.conf --------------------------------------------------------------------------------------------


#: Limits for one home, which may be on a dead network file system, and for all homes.
_HOME_SECONDS, _ALL_HOMES_SECONDS = 5.0, 20.0
_UNSEEN_HINT = "see whether its file system answers"


def _homes() -> list[Path]:
    """Return the home directories of users who may have followed kubeadm's advice to copy admin.conf."""
    homes = [Path("/root"), Path("~").expanduser()]
    with contextlib.suppress(OSError, TimeoutError):
        homes += sorted(within(_HOME_SECONDS, lambda: list(Path("/home").iterdir())))
    return list(dict.fromkeys(homes))


def _copies(node: Node, homes: Sequence[Path]) -> Iterator[Finding]:
    """Find copies of admin.conf in home directories, which no run renews."""
    admins = {item.spec.name: item for item in node.items if item.spec.component is None and item.embedded}
    live = {item.certificates[0]: name for name, item in admins.items() if item.certificates}
    end = time.monotonic() + _ALL_HOMES_SECONDS
    for path in (home / ".kube/config" for home in homes) if live else ():
        if end - time.monotonic() < _HOME_SECONDS:
            text = (
                f"wanted to look into all homes within {_ALL_HOMES_SECONDS:g} s, found no end of those before this one"
            )
            yield Finding.warning("admin-copy-unseen", str(path), text, _UNSEEN_HINT)
            return
        try:
            certificate = within(_HOME_SECONDS, partial(_client_certificate, path))
        except TimeoutError:
            text = f"it can't be read to its end within {_HOME_SECONDS:g} s: it may be a copy of admin.conf"
            yield Finding.warning("admin-copy-unseen", str(path), text, _UNSEEN_HINT)
            continue
        if certificate is not None:
            yield from _copy(path, certificate, live, admins)


def _copy(
    path: Path, certificate: x509.Certificate, live: Mapping[x509.Certificate, str], admins: Mapping[str, Item]
) -> Iterator[Finding]:
    names = (certificate.subject, certificate.issuer)
    if certificate in live:
        text = (
            f"a copy of {live[certificate]}, which is to be copied again after each renewal, or listed in copies.files"
        )
        yield Finding.note("admin-copy", str(path), text)
    elif name := next((name for old, name in live.items() if names == (old.subject, old.issuer)), ""):
        text = f"wanted a copy of {name} as it is now, found an older one (serial {serial_hex(certificate)})"
        hint = f"copy {admins[name].certificate_path} there again"
        yield Finding.warning("admin-copy-old", str(path), text, hint)


def _listed_copies(node: Node, settings: Settings) -> Iterator[Finding]:
    """Check the copies in copies.files, which a renewal refreshes."""
    for copy in copies.look(settings, node):
        about = str(copy.path)
        if copy.error is not None:
            reason = one_line(str(copy.error).removeprefix(f"{copy.path}: "))
            yield Finding.error("copy", about, reason, "mend it, or take it out of copies.files")
        elif not copy.is_there:
            text, hint = "there is no such copy of a kubeconfig", "put it there, or take it out of copies.files"
            yield Finding.warning("copy", about, text, hint)
        elif not copy.names:
            text = "wanted the client certificate of one of the node's kubeconfigs, found none of them"
            hint = "copy it there again: a renewal refreshes what holds the certificate that it replaces"
            yield Finding.warning("copy", about, text, hint)
        else:
            text = f"holds the certificate of {', '.join(copy.names)}, and is refreshed with it"
            yield Finding.ok("copy", about, text)


def _client_certificate(path: Path) -> x509.Certificate | None:
    """Return the client certificate of a home's kubeconfig; None for a link, or a file that can't be parsed."""
    try:
        with opened(path) as place:
            pem = kubeconfig.parse(read_once(place.path)[0]).certificate_data
        return load_pem_certificates(pem)[0] if pem else None
    except (OSError, ForeignLinkError, kubeconfig.KubeconfigError, UnreadableError, ValueError):
        return None
