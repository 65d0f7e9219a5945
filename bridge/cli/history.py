"""`recover`, `backups`, `rollback` and `audit`: the record of this node, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Annotated, Any

import typer

from bridge import monitoring
from bridge.cli.declare import Common, argument, command, duration_option, group, option
from bridge.cli.options import Output, OutputOption, WaitOption, utc_now
from bridge.cli.printing import progress_shown, say, say_json, say_sentence, say_sentences, say_table
from bridge.cli.results import certificates_json, errors_json, installed_rows, print_pairs, print_restart, stale
from bridge.errors import BridgeError, Exit, SettingsError, SettingsProblem
from bridge.pki.expiry import minute
from bridge.renewal.transaction import put_back_and_retire, set_damaged_aside
from bridge.renewal.verify_and_install import Result
from bridge.specs import SPECS, USER, Component
from bridge.state import Store, audit, backups, copies
from bridge.state.install import Recovery
from bridge.state.session import alone
from bridge.system.console import log, print_error, printable
from bridge.words import counted, name_found

commands = typer.Typer()
audit_group = group(commands, "audit", "Show and verify the audit log.")


@command(commands, "recover")
def recover(
    common: Common,
    set_aside: Annotated[bool, option("First rename damaged state files, and say what they may leave undone.")] = False,
) -> int:
    """Finish or undo what a crash interrupted; every command that writes does the same first."""
    settings = common.settings_with_record()
    if not settings.node.state_dir.is_dir():
        say("nothing to recover: no run has been here")
        return Exit.DONE
    for moved in set_damaged_aside(settings) if set_aside else ():
        say_sentence(f"{moved.why}; it is {moved.kept} now")
        say_sentences(filter(None, moved.afterwards))
    recoveries: list[Recovery | str] = []
    with alone(settings, timedelta(), recoveries.append) as (store, record):
        late = copies.finish(settings, store, record)
        say("\n".join(map(str, recoveries)) if recoveries else "nothing to recover")
    for recovery in recoveries:
        for path in recovery.paths if isinstance(recovery, Recovery) else ():
            say(f"  {path}")
    return _exit_code_of_late(late)


def _exit_code_of_late(late: Sequence[BridgeError]) -> int:
    """Print errors about copies that were not refreshed and audit lines that are missing; return their exit code."""
    for error in late:
        print_error(error)
    return Exit.worst([error.exit_code for error in late])


@command(commands, "backups")
def list_backups(
    common: Common,
    backup_id: Annotated[str | None, argument("Show this backup with its certificates and files.", "[ID]")] = None,
    output: OutputOption = Output.TEXT,
) -> int:
    """List the backups, newest first: when, by whom, and how many certificates; or show one of them whole."""
    records, broken = backups.read_all(Store(common.settings_with_record().node.state_dir))
    if backup_id is not None:
        known = [backup.backup_id for backup in records]
        records = [backup for backup in records if backup.backup_id == backup_id]
        if not records:
            raise SettingsError([SettingsProblem("ID", "a backup that is here", name_found(backup_id, known))])
    if output is Output.JSON:
        say_json(backups=[_backup_json(backup) for backup in records])
    elif backup_id is not None:
        say("  ".join(_backup_row(records[0])))
        for certificate in records[0].certificates:
            say(f"  {printable(certificate.get('name'))}")
            say(f"    serial {printable(certificate.get('old_serial') or 'none')}")
            say(f"    now    {printable(certificate.get('new_serial') or 'none')}")
        for file in records[0].files:
            say(f"  {file.path}{'' if file.was_there else ' (was not there)'}")
    elif records:
        say_table([_backup_row(backup) for backup in records], (1,))
    elif not broken:
        say("no backups: nothing was replaced here")
    for error in broken:
        print_error(error)
    return Exit.FAILED if broken else Exit.DONE


def _backup_row(backup: backups.Backup) -> tuple[str, ...]:
    who = "@".join(part for part in (backup.user, backup.host) if part)
    count, by = counted(len(backup.certificates), "certificate"), f"{printable(who)}: {printable(backup.command)}"
    return printable(backup.backup_id), minute(backup.created), count, by


#: Keys of a certificate in JSON, with those in a backup's manifest.
_CERTIFICATE = {"name": "name", "serialNumber": "old_serial", "replacedBySerialNumber": "new_serial"}


def _backup_json(backup: backups.Backup) -> dict[str, Any]:
    return {
        "id": backup.backup_id,
        "created": backup.created,
        "run": backup.run_id,
        **{key: getattr(backup, key) for key in ("command", "user", "host")},
        "certificates": [{key: each.get(name) for key, name in _CERTIFICATE.items()} for each in backup.certificates],
        "files": [{"path": str(file.path), "wasThere": file.was_there} for file in backup.files],
    }


@command(commands, "rollback")
def rollback(
    common: Common,
    backup_id: Annotated[str | None, argument("As in `backups`. [default: the newest]", "[ID]")] = None,
    force: Annotated[
        bool, option("Also certificates that would not pass as new; never damaged files or another CA's.")
    ] = False,
    wait: WaitOption = timedelta(),
    output: OutputOption = Output.TEXT,
) -> int:
    """
    Put a backup's files back in one step that survives a crash.

    Refused unless each file is as it was backed up, each key belongs to its certificate, and each certificate would
    pass as a new one: CA, dates, usages, subject, SANs; of these, --force checks only the CA. The replaced files are
    backed up: a second rollback undoes the first.
    """
    settings = common.settings()
    with monitoring.kept_current(settings, utc_now), progress_shown("putting files back") as progress:
        done, node = put_back_and_retire(settings, backup_id, utc_now, progress, force=force, wait=wait)
    components = stale(Result(outcomes=done.outcomes), node, settings)
    if output is Output.JSON:
        say_json(
            exitCode=Exit.worst([error.exit_code for error in done.late]),
            restored=done.backup.backup_id,
            backup=done.replaced_backup_id,
            certificates=[{"name": o.name, "authority": o.authority, **certificates_json(o)} for o in done.outcomes],
            errors=errors_json(done.late),
            removed=list(map(str, done.removed)),
            stays=done.stays,
            restart=components,
        )
        return _exit_code_of_late(done.late)
    rows = [row[:3] for row in installed_rows(done.outcomes)]
    say_table(rows, (2,), ["ok"] * len(rows))
    say("\n".join(f"removed {path}, as it was not there then" for path in done.removed))
    for name in done.stays:
        say_sentence(f"{name} stays as it is: it was missing, and the backup has nothing but its key")
    replaced = settings.node.state_dir / "backups" / done.replaced_backup_id
    say_sentence(f"backup {done.backup.backup_id} was put back; the replaced files are in {replaced}")
    print_restart("These still run on the replaced files until they are restarted", components, settings)
    print_pairs(node, [outcome.name for outcome in done.outcomes])
    return _exit_code_of_late(done.late)


#: Styles of the audit log's events.
_EVENT_STYLES = {
    **dict.fromkeys((audit.REFUSED, audit.FAILED, audit.UNAVAILABLE, audit.DAMAGED, audit.NEEDS_A_PERSON), "error"),
    **dict.fromkeys((audit.INSTALLED, audit.ROLLED_BACK, audit.RECOVERED), "ok"),
}


@command(audit_group, "show")
def audit_show(
    common: Common,
    since: Annotated[timedelta | None, duration_option('Only events newer than this, such as "7d".')] = None,
    name: Annotated[str | None, option("Only events of this certificate.")] = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """
    Show what was asked, issued, refused and installed, when and by whom.

    It prints the audit log in the state directory, oldest event first; `audit verify` checks it.
    """
    settings = common.settings_with_record()
    begin = utc_now() - since if since is not None else None
    known = [*SPECS, *(pair.name for pair in settings.node.pairs), *(component.value for component in Component)]
    store = Store(settings.node.state_dir)
    is_known = name is None or name in known or name.startswith(f"{USER.name} ")
    if not is_known and not any(audit.events(store, None, name)):  # a pair that was removed may still have lines
        wanted = f"the name of a certificate or component ({', '.join(known)}), or `{USER.name} NAME`"
        raise SettingsError([SettingsProblem("--name", wanted, name_found(str(name), known))])
    events = list(audit.events(store, begin, name))
    if output is Output.JSON:
        say_json(events=events)
    elif events:
        keys = ("time", "run", "user", "event", "name", "serialNumber", "backend", "result")
        rows = [[printable(event.get(key, "")) for key in keys] for event in events]
        say_table(rows, (1, 5, 2, 6), [_EVENT_STYLES.get(str(event.get("event")), "") for event in events], styled=3)
    else:
        say("nothing recorded")


@command(audit_group, "verify")
def audit_verify(common: Common) -> int:
    """
    Find changed, missing, inserted, moved and cut lines of the audit log.

    Exits with 1 if there are any. Only a copy elsewhere reveals a log that was rewritten as a whole.
    """
    store = Store(common.settings_with_record().node.state_dir)
    count, damages = audit.verify(store)
    for damage in damages:
        log.error("%s", damage)
    if damages:
        log.error("compare with a copy that was made elsewhere (syslog, a backup)", extra={"is_hint": True})
        return Exit.FAILED
    say(f"{count} lines, each follows the one before it" if count else "no audit log yet: nothing was renewed here")
    if deleted := audit.begin(store).sequence:
        say(f"the {deleted} lines before them were deleted (audit.keep_total), as the log says")
    return Exit.DONE
