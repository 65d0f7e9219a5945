"""
The state directory: its paths, which settings were checked, and the outcome for each certificate. The modules of this
package are the audit log, installation, backups and static pods.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bridge.errors import BridgeError, Exit

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cryptography import x509

    from bridge.settings.tables import Settings

#: Where distributions are installed; a backend is added or removed there.
_INSTALLED = Path(__file__).parents[2]
#: The ends of further paths with distributions; the last is the offline installation's.
_PLUG_INS = ("/site-packages", "/dist-packages", "/plugins")

#: Files whose names vary: the torn end of an audit log, and a manifest that was replaced while it was away.
_NUMBERED = r"audit\.torn-\d+-[0-9a-f]{8}|[a-z-]+-[0-9a-f]{8}\.yaml"
_BACKUP = r"\d{8}T\d{6}Z-[0-9a-z]+(-[0-9a-z]+)?"


#: IDs of the backups that this process has made, newest last; the message of an interrupted run names them.
replaced_here: list[str] = []
#: Files that this process has changed without a backup: a manifest, a kubelet's configuration.
changed_here: list[Path] = []


class Store:
    """The state directory: journal, staging list, backups and record."""

    def __init__(self, state_dir: Path) -> None:
        self.directory = state_dir
        self._to_do: list[Path] = []
        self.journal = self._work("journal.json")
        self.staging = self._work("staging.json")
        self.backups = state_dir / "backups"
        self.lock = state_dir / "lock"
        self.tree = state_dir / "tree.json"  #: This state's cluster: its PKI and kubeconfig directories.
        self.requests = self._work("requests.json")  #: Keys whose certificates are not installed yet.
        self.written = state_dir / "written.json"  #: When files were installed, by a clock that is never set.
        self.restart = self._work("restart.json")  #: The manifest that is out of its directory.
        self.restarted = state_dir / "restarted.json"  #: When each component was last restarted.
        self.kubelet_copy = state_dir / "kubelet-client-current.pem"  #: The last client pair taken from the kubelet.
        self.unproven = self._work("unproven.json")  #: Certificates that were installed, and not yet seen in use.
        self.postponed = self._work("postponed.json")  #: Installed with --no-restart, or put back; not yet seen in use.
        self.pairs = self._work("pairs.json")  #: Further pairs that were installed, and not yet seen in use.
        self.hooks = self._work("hooks.json")  #: Hooks that have not succeeded yet.
        self.revocations = self._work("revocations.json")  #: Superseded certificates that are to be revoked.
        self.checked_settings = state_dir / "settings.checked"  #: The settings file that needs no further check.
        self.collected = self._work("collected.json")  #: Installed answers that backends have to put away.
        self.copies = self._work("copies.json")  #: The certificates that copies of kubeconfigs may still hold.
        self.next_ca = state_dir / "next-ca.json"  #: Authorities whose next CA was already asked for certificates.
        self.going_back = state_dir / "going-back.json"  #: The phases to which CAs of this node go back.
        self.credentials = state_dir / "credentials.json"  #: When our own tokens end, according to their CAs.
        self.attempts = self._work("attempts.json")  #: How many renewals in a row failed at each CA.
        self.history = state_dir / "history.json"  #: The results of the last runs, for monitors.
        self.history_lock = state_dir / "history.lock"
        self.pending_at_ca = state_dir / "tickets.json"  #: Requests of the gateway that its CA answers later.
        self.desk_answers = state_dir / "desk-answers.jsonl"  #: The desk's requests to CAs, and their answers.
        self.door = state_dir / "door.json"  #: The ID of this door among the doors that share its database.
        self.door_lock = state_dir / "door.lock"
        self.bootstrap = state_dir / "bootstrap.json"  #: The purpose of a new node's requests.
        self.users = state_dir / "users.json"  #: Users' requests that a CA has not answered yet.
        self.audit = state_dir / "audit.jsonl"
        self.audit_head = state_dir / "audit.head"  #: The newest line's number and digest.

    def _work(self, name: str) -> Path:
        """The path of a file that exists while a run has to act, even if no certificate is due."""
        self._to_do.append(self.directory / name)
        return self._to_do[-1]

    def has_work(self) -> bool:
        """Whether an earlier run has left something to do."""
        return any(path.exists() for path in self._to_do)

    def prepare(self) -> None:
        """Make the directories (BridgeError: another user can write to them)."""
        from bridge.system.files import private_directory  # noqa: PLC0415 (reading the store does not need it)

        private_directory(self.directory)
        private_directory(self.backups)

    def half_written(self) -> list[Path]:
        """Files that a killed `write_atomically` left; not the history's, which has a lock of its own."""
        every = [path for path in vars(self).values() if isinstance(path, Path)]
        beside = [path for path in every if path.parent == self.directory and path != self.history]
        names = [re.escape(path.name) for path in beside]
        ours = re.compile(rf"\.({'|'.join([*names, _NUMBERED])})\.[a-z0-9_]{{8}}")  # as `tempfile` makes them
        return [path for path in self.directory.glob(".*") if ours.fullmatch(path.name) and path.is_file()]

    def backup_directories(self) -> list[Path]:
        """The directories of all backups, finished or not."""
        backup_directories = self.backups.iterdir() if self.backups.is_dir() else ()
        return [path for path in backup_directories if re.fullmatch(_BACKUP, path.name) and path.is_dir()]

    @property
    def is_interrupted(self) -> bool:
        """Whether a run was killed while it installed or restarted, so that `recover` has work to do."""
        return any(path.exists() for path in (self.journal, self.staging, self.restart))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The outcome for one certificate."""

    name: str
    authority: str
    old: x509.Certificate | None = None
    new: x509.Certificate | None = None  #: The installed certificate.
    backend: str = ""
    error: BridgeError | None = None

    @property
    def exit_code(self) -> int:
        """The exit code of its error."""
        return self.error.exit_code if self.error is not None else Exit.DONE


# --- settings that were checked completely, so that a run with nothing due loads no backend --------------------------


def is_checked(settings: Settings, store: Store) -> bool:
    """Whether this installation has checked this very file; without a file there is nothing to check."""
    return checked_credentials(settings, store) is not None


def checked_credentials(settings: Settings, store: Store) -> list[tuple[str, Path]] | None:
    """Our own credentials in settings that were checked, as key and file; None: the settings were not checked."""
    if settings.source.file is None:
        return []
    try:
        first, *rest = store.checked_settings.read_text().splitlines()
        found = [line.split(" ", 1) for line in rest]
        return [(name, Path(path)) for name, path in found] if first == _signature(settings.source.file) else None
    except (OSError, ValueError):
        return None


def remember_checked(settings: Settings, store: Store, credentials: Iterable[tuple[str, Path]] = ()) -> None:
    """Remember that settings were checked completely, and their credentials; if that fails, the next run checks them again."""
    from bridge.system.files import write_atomically  # noqa: PLC0415 (a look needs none of it)

    if settings.source.file is None or is_checked(settings, store):
        return
    try:
        lines = [_signature(settings.source.file), *(f"{name} {path}" for name, path in credentials)]
        write_atomically(store.checked_settings, "".join(f"{line}\n" for line in lines).encode())
    except OSError:
        return


def _signature(file: Path) -> str:
    status = file.stat()
    numbers = [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, _INSTALLED.stat().st_mtime_ns]
    plug_ins = dict.fromkeys(path for path in sys.path if path.endswith(_PLUG_INS) and path != str(_INSTALLED))
    numbers += [path.stat().st_mtime_ns for path in map(Path, plug_ins) if path.is_dir()]
    return f"{file} {' '.join(map(str, numbers))}"
