"""`recover`, `backups`, `rollback`, `audit`: what was done here, and going back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

from bridge.cli.printing import columns, say, say_json, say_sentence, say_table
from bridge.cli.results import print_restart, stale
from bridge.errors import BridgeError, Exit, SettingsError, SettingsProblem
from bridge.monitoring import metrics
from bridge.pki.certificates import serial_hex
from bridge.pki.expiry import minute, rfc3339
from bridge.renewal.verify_and_install import Result
from bridge.settings.tables import Settings
from bridge.specs import SPECS, USER, Component
from bridge.state import audit_reader, backups, copies
from bridge.state.install import Recovery
from bridge.state.rollback import Rollback, put_back_and_retire
from bridge.state.session import alone
from bridge.state.store import Store
from bridge.system.console import hint_of, log, print_error, printable
from bridge.words import name_found


def recover(settings: Settings, *, set_aside: bool) -> int:
    """`recover`: finish or undo what a crash left, and say which; 7 if a copy of a kubeconfig stays behind."""
    if not settings.node.state_dir.is_dir():
        say("nothing to recover: no run has been here")
        return Exit.DONE
    from bridge.renewal import damage  # noqa: PLC0415 (loads all that restarts)

    for moved in damage.set_aside(settings) if set_aside else ():
        say_sentence(f"{moved.why}; it is {moved.kept} now")
        for sentence in filter(None, moved.afterwards):
            say_sentence(sentence, "  ")
    found: list[Recovery | str] = []
    with alone(settings, timedelta(), found.append) as (store, record):
        late = copies.settle(settings, store, record)
        say("\n".join(map(str, found)) if found else "nothing to recover")
    for one in found:
        for path in one.paths if isinstance(one, Recovery) else ():
            say(f"  {path}")
    return _told(late)


def _told(late: Sequence[BridgeError]) -> int:
    """About copies that could not be refreshed."""
    for error in late:
        print_error(error)
    return Exit.worst([error.exit_code for error in late])


def list_backups(settings: Settings, *, as_json: bool) -> int:
    """`backups`: what could be put back, the newest first; 1 if one can't be read."""
    found, broken = backups.read_all(Store(settings.node.state_dir))
    if as_json:
        entries = [_backup_json(backup) for backup in found]
        say_json({"backups": entries})
    elif found:
        say_table([row for backup in found for row in _backup_rows(backup)])
    elif not broken:
        say("no backups: nothing was replaced here")
    for error in broken:
        print_error(error)
    return Exit.FAILED if broken else Exit.DONE


def _backup_rows(backup: backups.Backup) -> Iterator[tuple[str, ...]]:
    """A line for the backup, and one below it for each certificate."""
    who = "@".join(part for part in (backup.user, backup.host) if part)
    yield printable(backup.backup_id), f"{minute(backup.created)}", f"{printable(who)}: {printable(backup.command)}"
    for one in backup.certificates:
        serials = f"serial {one.get('old_serial') or 'none'}, replaced by {one.get('new_serial') or 'none'}"
        yield f"  {printable(one.get('name'))}", "", printable(serials)


def _backup_json(backup: backups.Backup) -> dict[str, Any]:
    return {
        "id": backup.backup_id,
        "created": rfc3339(backup.created),
        "run": backup.run_id,
        "command": backup.command,
        "user": backup.user,
        "host": backup.host,
        "certificates": [
            {
                "name": one.get("name"),
                "serialNumber": one.get("old_serial"),
                "replacedBySerialNumber": one.get("new_serial"),
            }
            for one in backup.certificates
        ],
        "files": [{"path": str(file.path), "wasThere": file.was_there} for file in backup.files],
    }


def rollback(
    settings: Settings,
    backup_id: str | None,
    now: Callable[[], datetime],
    *,
    force: bool,
    wait: timedelta,
    as_json: bool,
) -> int:
    """`rollback`: put a backup back, and say what to restart; 7 if a copy of a kubeconfig stays behind."""
    with metrics.kept_current(settings, now):
        done, node = put_back_and_retire(settings, backup_id, now, force=force, wait=wait)
    components = stale(Result(outcomes=done.outcomes), node, settings)
    if as_json:
        say_json(_rollback_json(done, components))
        return _told(done.late)
    rows = [
        (o.name, f"until {minute(o.new.not_valid_after_utc)}", f"serial {serial_hex(o.new)}")
        for o in done.outcomes
        if o.new is not None
    ]
    say("\n".join([*columns(rows), *(f"removed {path}, as it was not there then" for path in done.removed)]))
    replaced = settings.node.state_dir / "backups" / done.replaced_backup_id
    say_sentence(f"backup {done.backup.backup_id} was put back; what it replaced is in {replaced}")
    print_restart("These still run on what was replaced until they are restarted", components, settings)
    return _told(done.late)


def _rollback_json(done: Rollback, components: Sequence[Component]) -> dict[str, Any]:
    return {
        "exitCode": Exit.worst([error.exit_code for error in done.late]),
        "restored": done.backup.backup_id,
        "backup": done.replaced_backup_id,
        "certificates": [
            {
                "name": o.name,
                "authority": o.authority,
                "notAfter": rfc3339(o.new.not_valid_after_utc) if o.new else None,
                "serialNumber": serial_hex(o.new) if o.new else None,
                "previousSerialNumber": serial_hex(o.old) if o.old else None,
            }
            for o in done.outcomes
        ],
        "errors": [{"exitCode": e.exit_code, "error": str(e), "hint": hint_of(e)} for e in done.late],
        "removed": [str(path) for path in done.removed],
        "restart": [component.value for component in components],
    }


def audit_verify(settings: Settings) -> int:
    """`audit verify`: 1 if anything is wrong with the chain."""
    count, damages = audit_reader.verify(Store(settings.node.state_dir))
    for damage in damages:
        log.error("%s", damage)
    if damages:
        log.error("compare with a copy that was made elsewhere (syslog, a backup)", extra={"is_hint": True})
        return Exit.FAILED
    say(f"{count} lines, each follows the one before it" if count else "no audit log yet: nothing was renewed here")
    return Exit.DONE


def audit_show(settings: Settings, since: datetime | None, name: str | None, *, as_json: bool) -> None:
    """
    `audit show`: the record's events, oldest first.

    Raises:
        SettingsError: No event can have such a name.
    """
    known = [*SPECS, *(component.value for component in Component)]
    if name is not None and name not in known and not name.startswith(f"{USER.name} "):
        wanted = f"the name of a certificate or component ({', '.join(known)}), or `{USER.name} NAME`"
        raise SettingsError([SettingsProblem("--name", wanted, name_found(name, known))])
    found = list(audit_reader.events(Store(settings.node.state_dir), since, name))
    if as_json:
        say_json({"events": found})
    elif found:
        keys = ("time", "run", "user", "event", "name", "serialNumber", "backend", "result")
        rows = [[printable(event.get(key, "")) for key in keys] for event in found]
        say_table(rows)
    else:
        say("nothing recorded")
