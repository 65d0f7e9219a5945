"""The result of an installation, for the run's end and for hooks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from bridge.control_plane.restarts import Restarted
from bridge.control_plane.static_pods import StoppedError
from bridge.errors import BridgeError, Exit
from bridge.pki.certificates import serial_hex
from bridge.renewal.hooks import HookEvent
from bridge.state import backups
from bridge.state.obligations import Owed
from bridge.state.session import Run


class NotLiveError(BridgeError):
    """An installed certificate is not in use, or does not work."""

    exit_code: ClassVar[int] = Exit.NOT_LIVE
    hint = "`ca-bridge prove` shows each check; `ca-bridge rollback` puts the old files back"


class RolledBackError(BridgeError):
    """An installed certificate did not work, and the old files are back."""

    exit_code: ClassVar[int] = Exit.ROLLED_BACK
    hint = "the CA's certificates passed every check and can't work in this cluster: see the failed check"


class UnprovenError(BridgeError):
    """Whether it works could not be found out."""

    hint = "the next `ca-bridge renew` looks again; `ca-bridge prove` shows what could not be seen"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """The result of an installation."""

    restarted: tuple[Restarted, ...] = ()
    proven: int | None = None  #: Checks that hold, of the last look; None: nobody looked.
    errors: tuple[BridgeError, ...] = ()
    rolled_back: RolledBackError | None = None  #: One of the errors.
    about: Mapping[str, HookEvent] = dataclasses.field(default_factory=dict)  #: For hooks; by the run that installed.
    may_go_on: bool = True  #: False: stopped by a signal, or in the middle of the way back; nothing is to be installed.


def is_stopped(restarted: Sequence[Restarted]) -> bool:
    """Whether a signal stopped the restarts: what may still be starting can't be proven."""
    return any(isinstance(one.error, StoppedError) for one in restarted)


def settled(
    run: Run,
    owed: Owed,
    errors: Sequence[BridgeError],
    restarted: Sequence[Restarted] = (),
    proven: int | None = None,
    *,
    may_go_on: bool = True,
) -> Settled:
    """The result of an installation, with what hooks are told."""
    rolled_back = next((error for error in errors if isinstance(error, RolledBackError)), None)
    return Settled(
        restarted=tuple(restarted),
        proven=proven,
        errors=tuple(errors),
        rolled_back=rolled_back,
        about=_hook_events(run, owed, errors, is_back=rolled_back is not None),
        may_go_on=may_go_on and not is_stopped(restarted),
    )


def errors_of(restarted: Sequence[Restarted]) -> list[BridgeError]:
    """Why some were not restarted."""
    return [one.error for one in restarted if one.error is not None]


def _hook_events(run: Run, owed: Owed, errors: Sequence[BridgeError], *, is_back: bool) -> dict[str, HookEvent]:
    """The hook events by the run that installed."""
    items = {item.spec.name: item for item in run.read_node().items}
    replaced = {one.run_id: one for one in backups.read_all(run.store)[0]}
    found = {}
    for run_id in dict.fromkeys(one.newest_run for one in owed.certificates):
        ours = [one for one in owed.certificates if one.newest_run == run_id]
        live = [] if is_back else [one.name for one in ours if one.name in items and items[one.name].certificates]
        new = {name: serial_hex(items[name].certificates[0]) for name in live}
        old = {one.name: _old_serial(replaced.get(one.backup_of), one.name) for one in ours if one.name in new}
        paths = [p for name in new for p in (items[name].certificate_path, items[name].key_path) if p is not None]
        found[run_id] = HookEvent(
            names=tuple(one.name for one in ours),
            old_serials={name: serial for name, serial in old.items() if serial},
            new_serials=new,
            files=tuple(map(str, paths)),
            backup_id=replaced[run_id].backup_id if run_id in replaced else None,
            exit_code=Exit.worst([error.exit_code for error in errors]),
            errors=tuple(map(str, errors)),
        )
    return found


def _old_serial(backup: backups.Backup | None, name: str) -> str:
    entries = backup.certificates if backup is not None else ()
    return next((entry["old_serial"] or "" for entry in entries if entry["name"] == name), "")
