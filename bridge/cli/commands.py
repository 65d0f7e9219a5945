"""What the commands do and print, between the command line and the rooms that do the work."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import typer
from cryptography import x509

from bridge.contract import GIVEN, Secret, SetupFile, SetupRequest
from bridge.control_plane import restart_plan
from bridge.errors import BridgeError, Exit, SettingsError, SettingsProblem, WaitingError
from bridge.node import inventory
from bridge.node.inventory import Item, Node
from bridge.pki.certificates import name_text, serial_hex
from bridge.pki.durations import duration_text
from bridge.pki.expiry import first_end, residual, rfc3339, seconds_left
from bridge.renewal import renew as renewal
from bridge.renewal.prepare import Prepared, prepare
from bridge.renewal.prepare import write_csrs as write_csr_files
from bridge.renewal.schedule import NotYetError
from bridge.renewal.selection import Selection, nothing_due, select
from bridge.renewal.verify_and_install import Result, version_of
from bridge.settings.load import DEFAULT_FILE
from bridge.settings.tables import Commands, Components, Settings
from bridge.settings.windows import Windows
from bridge.signing import registry
from bridge.specs import AUTHORITIES, Component
from bridge.state import audit, backups
from bridge.state.install import InstallError, Recovery
from bridge.state.outcome import Outcome
from bridge.state.rollback import Rollback, put_back_and_retire
from bridge.state.session import alone
from bridge.state.store import Store
from bridge.system.console import Progress, columns, log, print_error, printable, under_headings

SCHEMA_VERSION = 1
DATE = "%b %d, %Y %H:%M UTC"

# --- renew -----------------------------------------------------------------------------------------------------------


def renew(
    settings: Settings,
    names: Collection[str],
    now: Callable[[], datetime],
    *,
    as_json: bool,
    all_or_nothing: bool,
    restarts: bool = True,
    wait: timedelta = timedelta(),
) -> int:
    """Renew, print the result, and return the exit code."""
    with _progress() as progress:
        result, node, selection = renewal.run(
            settings, names, now, progress, all_or_nothing=all_or_nothing, restarts=restarts, wait=wait
        )
    for sentence in selection.skipped:
        log.log(logging.INFO if names else logging.DEBUG, "%s", sentence)
    _report(result, node, selection, settings, now(), as_json=as_json, restarts=restarts)
    return result.exit_code


def import_answers(
    settings: Settings,
    paths: Sequence[Path],
    now: Callable[[], datetime],
    *,
    as_json: bool,
    all_or_nothing: bool,
    wait: timedelta,
) -> int:
    """`import`: what a CA desk has answered; return the exit code."""
    from bridge.renewal import airgap  # noqa: PLC0415 (30 ms)

    with _progress() as progress:
        result, node, strange = airgap.import_answers(
            settings, paths, now, progress, all_or_nothing=all_or_nothing, wait=wait
        )
    result = dataclasses.replace(result, errors=(*result.errors, *strange))
    if result.outcomes or result.errors or as_json:
        nothing = Selection(items=(), failed=(), skipped=())
        _report(result, node, nothing, settings, now(), as_json=as_json)
    else:
        typer.echo("nothing to import: no answer to a request that waits here")
    return result.exit_code


def export(
    settings: Settings, path: Path, names: Collection[str], now: Callable[[], datetime], *, wait: timedelta
) -> int:
    """`export`: a bundle for a CA desk; return the exit code."""
    from bridge.renewal import airgap  # noqa: PLC0415 (30 ms)

    with _progress() as progress:
        done, node = airgap.export(settings, path, names, now, progress, wait)
    for sentence in done.skipped:
        log.log(logging.INFO if names else logging.DEBUG, "%s", sentence)
    airgap.print_exported(done, path, now())
    if done.bundle is None and not done.failed:
        typer.echo(nothing_due(node, settings, now()))
    for about, error in _grouped(done.failed):
        print_error(error, about)
    return Exit.worst([outcome.exit_code for outcome in done.failed])


def pending_cancel(settings: Settings, names: Collection[str], now: Callable[[], datetime], *, wait: timedelta) -> int:
    """`pending cancel`: return the exit code."""
    from bridge.renewal import airgap  # noqa: PLC0415 (30 ms)

    with _progress() as progress:
        return airgap.pending_cancel(settings, names, now, progress, wait)


def _report(
    result: Result,
    node: Node,
    selection: Selection,
    settings: Settings,
    now: datetime,
    *,
    as_json: bool,
    restarts: bool = True,
) -> None:
    by_hand = not restarts or settings.restart.method == "none"
    components = _stale(result, node, settings) if by_hand else []
    if as_json:
        typer.echo(json.dumps(_result_json(result, selection, components), indent=4))
    else:
        _print_result(result, node, settings, now)
        _print_restart("These still run on their old certificates until they are restarted", components, settings)
        if result.restarted:
            typer.echo(f"restarted: {', '.join(result.restarted)}")
        if result.proven is not None:
            typer.echo(f"proven: {result.proven} checks hold")
    warn_of_waiting(result.waiting, now)
    for run_error in result.errors:
        print_error(run_error)
    for about, error in _grouped(result.failed):
        print_error(error, about)


def _stale(result: Result, node: Node, settings: Settings) -> list[Component]:
    specs = [item.spec for item in node.items if item.spec.name in {o.name for o in result.renewed}]
    return restart_plan.stale(specs, version_of(node, settings), settings.restart.components)


def _print_result(result: Result, node: Node, settings: Settings, now: datetime) -> None:
    rows = [
        (
            o.name,
            f"until {o.new.not_valid_after_utc:{DATE}}",
            f"serial {serial_hex(o.new)}",
            f"issuer {name_text(o.new.issuer)}",
            f"by {o.backend}",
        )
        for o in result.renewed
        if o.new is not None
    ]
    if rows:
        typer.echo("\n".join(columns(rows)))
        typer.echo(
            f"{len(rows)} renewed; the old files are in {settings.node.state_dir / 'backups' / str(result.backup_id)}"
        )
    elif not result.failed and not result.waiting and not result.errors:
        typer.echo(nothing_due(node, settings, now))
    if result.waiting:
        typer.echo("\n".join(under_headings([_waiting_row(outcome, now) for outcome in result.waiting])))


def _waiting_row(outcome: Outcome, now: datetime) -> tuple[str, tuple[str, ...]]:
    """What it waits for, and its cells."""
    reason = printable(outcome.error.reason if outcome.error is not None else "")
    end = outcome.old.not_valid_after_utc if outcome.old is not None else None
    expires = f"expires {end:{DATE}} ({residual(seconds_left(end, now))})" if end is not None else ""
    return f"{outcome.backend}: {reason}" if outcome.backend else reason, (outcome.name, "waiting", expires)


#: A certificate that waits for its answer is warned of from here on, and cried out for from there on.
NEAR, VERY_NEAR = timedelta(days=7), timedelta(days=2)


def warn_of_waiting(waiting: Sequence[Outcome], now: datetime) -> None:
    """The nearer the end of what is to be replaced, the louder."""
    if not waiting:
        return
    ends = [o.old.not_valid_after_utc for o in waiting if o.old is not None]
    left = min(ends, default=now) - now
    if all(isinstance(outcome.error, NotYetError) for outcome in waiting):
        what, hint = "for a window", NotYetError.hint
    else:
        what, hint = "for an answer", "`ca-bridge pending list` shows them; ask whoever has them"
    certificates = f"{len(waiting)} certificates wait" if len(waiting) != 1 else "1 certificate waits"
    text = f"{certificates} {what}; the first of them"
    if left <= VERY_NEAR:
        when = f"ENDS IN {residual(int(left.total_seconds()))}" if left > timedelta() else "HAS EXPIRED"
        print_error(WaitingError(f"{text} {when}", hint=hint))
    elif left <= NEAR:
        log.warning("%s ends in %s", text, residual(int(left.total_seconds())))
        log.warning("%s", hint, extra={"is_hint": True})


def _print_restart(why: str, components: Sequence[Component], settings: Settings) -> None:
    if components:
        typer.echo(f"\n{why}, one at a time:")
    for component in components:
        typer.echo(f"  {restart_plan.how(component, settings.node.kubeconfig_dir / 'manifests')}")


def _grouped(failed: Sequence[Outcome]) -> Iterator[tuple[str, BridgeError]]:
    """One message for all certificates that failed for the same reason at the same CA."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in failed:
        groups.setdefault((outcome.backend, outcome.error.reason if outcome.error else ""), []).append(outcome)
    for (backend, _), outcomes in groups.items():
        if outcomes[0].error is not None:
            names = ", ".join(outcome.name for outcome in outcomes)
            yield f"{names}: {backend}" if backend else names, outcomes[0].error


def _result_json(result: Result, selection: Selection, components: Sequence[Component]) -> dict[str, Any]:
    return {
        "schemaVersion": SCHEMA_VERSION,
        "exitCode": result.exit_code,
        "backup": result.backup_id,
        "renewed": [
            {
                "name": o.name,
                "authority": o.authority,
                "backend": o.backend,
                "notAfter": rfc3339(o.new.not_valid_after_utc),
                "serialNumber": serial_hex(o.new),
                "previousSerialNumber": serial_hex(o.old) if o.old is not None else None,
                "issuer": name_text(o.new.issuer),
            }
            for o in result.renewed
            if o.new is not None
        ],
        "failed": [
            {
                "name": o.name,
                "authority": o.authority,
                "backend": o.backend,
                "exitCode": o.exit_code,
                "error": o.error.reason if o.error is not None else "",
                "hint": o.error.hint if o.error is not None else "",
            }
            for o in result.failed
        ],
        "waiting": [
            {
                "name": o.name,
                "authority": o.authority,
                "backend": o.backend,
                "notAfter": rfc3339(o.old.not_valid_after_utc) if o.old is not None else None,
                "note": o.error.reason if o.error is not None else "",
            }
            for o in result.waiting
        ],
        "skipped": list(selection.skipped),
        "restart": [component.value for component in components],
        "restarted": list(result.restarted),
        "proven": result.proven,
        "errors": [{"exitCode": e.exit_code, "error": str(e), "hint": e.hint} for e in result.errors],
    }


class _PlainProgress:
    """Lines on standard error, which cron mails: only what somebody has to know."""

    def signing(self, backend: str, names: Sequence[str]) -> None:
        log.debug("asking %s for %s", backend, ", ".join(names))

    def signed(self, name: str) -> None:
        log.debug("%s was answered", name)

    def note(self, text: str) -> None:
        log.warning("%s", text)


class _TerminalProgress(_PlainProgress):
    """A bar for each CA; made at the first question, since most runs have none."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._lock = threading.Lock()
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}

    def signing(self, backend: str, names: Sequence[str]) -> None:
        with self._lock:
            if self._bars is None:
                self._bars = self._stack.enter_context(_bars())
            task = self._bars.add_task(f"asking {backend}", total=len(names), detail="")
            self._tasks.update(dict.fromkeys(names, task))

    def signed(self, name: str) -> None:
        with self._lock:
            self._bars.update(self._tasks[name], advance=1, detail=name)


def _bars() -> Any:
    from rich.console import Console  # noqa: PLC0415 (60 ms; only on a terminal, when a CA is asked)
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn  # noqa: PLC0415

    layout = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*layout, TextColumn("{task.fields[detail]}"), console=Console(stderr=True), transient=True)


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    with contextlib.ExitStack() as stack:
        yield _TerminalProgress(stack) if sys.stderr.isatty() else _PlainProgress()


# --- csr-only, plan, recover -----------------------------------------------------------------------------------------


def write_csrs(settings: Settings, names: Collection[str], directory: Path, now: datetime) -> int:
    """`renew --csr-only`: keys and CSRs into a directory, nothing else touched."""
    if Store(settings.node.state_dir).journal.exists():
        raise InstallError("an installation was interrupted", hint="run `ca-bridge recover`, then this again")
    node = inventory.read(settings.node.pki_dir, settings.node.kubeconfig_dir)
    selection = select(node, settings, names, now, csrs_only=True)
    made = prepare(selection.items, settings)
    prepared = [one for one in made if isinstance(one, Prepared)]
    if prepared:
        write_csr_files(prepared, directory)
    rows = [(one.item.spec.name, str(directory / f"{one.item.spec.name}.csr"), f"for {one.item.spec.authority.name}")
            for one in prepared]  # fmt: skip
    failed = [*selection.failed, *(one for one in made if isinstance(one, Outcome))]
    if rows:
        typer.echo("\n".join(columns(rows)))
    elif not failed:
        typer.echo(nothing_due(node, settings, now))
    for name, error in _grouped(failed):
        print_error(error, name)
    return Exit.worst([outcome.exit_code for outcome in failed])


def plan(settings: Settings, names: Collection[str], now: datetime, *, as_json: bool) -> int:
    """Print what `renew` would do; 3 if that is anything."""
    node = inventory.read(settings.node.pki_dir, settings.node.kubeconfig_dir)
    selection = select(node, settings, names, now)
    specs = [item.spec for item in selection.items]
    components = restart_plan.stale(specs, version_of(node, settings), settings.restart.components)
    if as_json:
        typer.echo(json.dumps(_plan_json(selection, settings, components), indent=4))
    elif selection.items:
        typer.echo("\n".join(columns([_plan_row(item, settings, now) for item in selection.items])))
        _print_restart("After that, these must be restarted to use the new ones", components, settings)
    elif not selection.failed:
        typer.echo(nothing_due(node, settings, now))
    for name, error in _grouped(selection.failed):
        print_error(error, name)
    failed = Exit.worst([outcome.exit_code for outcome in selection.failed])
    return failed or (Exit.DUE if selection.items else Exit.DONE)


def _plan_row(item: Item, settings: Settings, now: datetime) -> tuple[str, ...]:
    end = first_end(item.certificates)
    left = residual(seconds_left(end, now))
    return (
        item.spec.name,
        f"expires {end:{DATE}} ({left})",
        f"ask {_asked(item, settings)}",
        f"replace {' and '.join([str(item.certificate_path), *([item.key_path.name] if item.key_path else [])])}",
    )


def _asked(item: Item, settings: Settings) -> str:
    ours = settings.authorities.get(item.spec.authority.name)
    return ours.backend if ours is not None else f"nobody: no [authority.{item.spec.authority.name}]"


def _files(item: Item) -> list[Path]:
    return [path for path in (item.key_path, item.certificate_path) if path is not None]


def _plan_json(selection: Selection, settings: Settings, components: Sequence[Component]) -> dict[str, Any]:
    return {
        "schemaVersion": SCHEMA_VERSION,
        "renew": [
            {
                "name": item.spec.name,
                "authority": item.spec.authority.name,
                "backend": ours.backend if (ours := settings.authorities.get(item.spec.authority.name)) else None,
                "notAfter": rfc3339(item.certificates[0].not_valid_after_utc),
                "replace": [str(path) for path in _files(item)],
            }
            for item in selection.items
        ],
        "failed": [{"name": o.name, "error": str(o.error)} for o in selection.failed],
        "skipped": list(selection.skipped),
        "restart": [component.value for component in components],
    }


def recover(settings: Settings) -> None:
    """`recover`: finish or undo what a crash left, and say which."""
    if not settings.node.state_dir.is_dir():
        typer.echo("nothing to recover: no run has been here")
        return
    found: list[Recovery | str] = []
    with alone(settings, timedelta(), found.append):
        typer.echo("\n".join(map(str, found)) if found else "nothing to recover")
    for one in found:
        for path in one.paths if isinstance(one, Recovery) else ():
            typer.echo(f"  {path}")


# --- going back ------------------------------------------------------------------------------------------------------


def list_backups(settings: Settings, *, as_json: bool) -> int:
    """`backups`: what could be put back, the newest first; 1 if one can't be read."""
    found, broken = backups.read_all(Store(settings.node.state_dir))
    if as_json:
        entries = [_backup_json(backup) for backup in found]
        typer.echo(json.dumps({"schemaVersion": SCHEMA_VERSION, "backups": entries}, indent=4))
    elif found:
        typer.echo("\n".join(columns([row for backup in found for row in _backup_rows(backup)])))
    elif not broken:
        typer.echo("no backups: nothing was replaced here")
    for error in broken:
        print_error(error)
    return Exit.FAILED if broken else Exit.DONE


def _backup_rows(backup: backups.Backup) -> Iterator[tuple[str, ...]]:
    """A line for the backup, and one below it for each certificate."""
    who = "@".join(part for part in (backup.user, backup.host) if part)
    yield printable(backup.backup_id), f"{backup.created:{DATE}}", f"{printable(who)}: {printable(backup.command)}"
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
        "files": [{"path": str(file.path), "wasThere": file.copy is not None} for file in backup.files],
    }


def rollback(
    settings: Settings,
    backup_id: str | None,
    now: Callable[[], datetime],
    *,
    force: bool,
    wait: timedelta,
    as_json: bool,
) -> None:
    """`rollback`: put a backup back, and say what to restart."""
    done, node = put_back_and_retire(settings, backup_id, now, force=force, wait=wait)
    components = _stale(Result(outcomes=done.outcomes), node, settings)
    if as_json:
        typer.echo(json.dumps(_rollback_json(done, components), indent=4))
        return
    rows = [
        (o.name, f"until {o.new.not_valid_after_utc:{DATE}}", f"serial {serial_hex(o.new)}")
        for o in done.outcomes
        if o.new is not None
    ]
    typer.echo("\n".join([*columns(rows), *(f"removed {path}, as it was not there then" for path in done.removed)]))
    replaced = settings.node.state_dir / "backups" / done.replaced_backup_id
    typer.echo(f"backup {done.backup.backup_id} was put back; what it replaced is in {replaced}")
    _print_restart("These still run on what was replaced until they are restarted", components, settings)


def _rollback_json(done: Rollback, components: Sequence[Component]) -> dict[str, Any]:
    return {
        "schemaVersion": SCHEMA_VERSION,
        "exitCode": Exit.DONE,
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
        "removed": [str(path) for path in done.removed],
        "restart": [component.value for component in components],
    }


# --- the record ------------------------------------------------------------------------------------------------------


def audit_verify(settings: Settings) -> int:
    """`audit verify`: 1 if anything is wrong with the chain."""
    count, damages = audit.verify(Store(settings.node.state_dir))
    for damage in damages:
        log.error("%s", damage)
    if damages:
        log.error("compare with a copy that was made elsewhere (syslog, a backup)", extra={"is_hint": True})
        return Exit.FAILED
    typer.echo(f"{count} lines, each follows the one before it" if count else "no record yet: nothing was renewed here")
    return Exit.DONE


def audit_show(settings: Settings, since: datetime | None, name: str | None, *, as_json: bool) -> None:
    """`audit show`: the record's events, oldest first."""
    found = list(audit.events(Store(settings.node.state_dir), since, name))
    if as_json:
        typer.echo(json.dumps({"schemaVersion": SCHEMA_VERSION, "events": found}, indent=4))
    elif found:
        keys = ("time", "run", "user", "event", "name", "serialNumber", "backend", "result")
        rows = [[printable(event.get(key, "")) for key in keys] for event in found]
        typer.echo("\n".join(columns(rows)))
    else:
        typer.echo("nothing recorded")


# --- settings and setup ----------------------------------------------------------------------------------------------


def settings_init(file: Path | None) -> Path:
    """
    Write a commented settings file.

    Raises:
        BridgeError: There is one.
    """
    path = file or DEFAULT_FILE
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    try:
        with path.open("x", encoding="utf-8") as opened:
            path.chmod(0o644)
            opened.write(example().read_text(encoding="utf-8"))
    except FileExistsError:
        raise BridgeError(f"{path}: wanted no file, found one", hint="edit it, or name another place") from None
    return path


def example() -> Path:
    """The commented example that is installed with the program."""
    name = "config.toml"
    for directory in (Path(sys.prefix, "share", "kubeadm-ca-bridge"), Path(__file__).parents[2] / "config"):
        if (directory / name).is_file():
            return directory / name
    raise BridgeError(
        "wanted the example settings that are installed with the program, found none", hint="reinstall it"
    )


def settings_show(settings: Settings) -> str:
    """The settings in force, as TOML that means the same; a backend's keys are in the tables of its authorities."""
    lines = [f"# from {settings.source.file or 'defaults alone: no settings file'}"]
    named = dataclasses.replace(settings, node=dataclasses.replace(settings.node, name=settings.node.node_name))
    for name in ("node", "renewal", "restart", "cluster", "hooks", "audit", "backups"):
        lines += ["", f"[{name}]", *_shown(getattr(named, name))]
    backends = registry.configured(settings, settings.authorities)
    for name, type_name in {one.name: one.type_name for one in backends.values()}.items():
        lines += ["", f"[backend.{json.dumps(name)}]", f"type = {json.dumps(type_name)}"]
    for authority, configured in backends.items():
        lines += ["", f"[authority.{authority}]", *_shown(settings.authorities[authority])]
        lines += _shown(configured.settings)
    return "\n".join(lines) + "\n"


def _shown(values: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(values):
        value, key = getattr(values, field.name), f"{prefix}{field.name}"
        if GIVEN in field.metadata or value in (
            None,
            "",
            timedelta(),
        ):  # no key; or as if it were not set: none of them could be
            continue
        if isinstance(value, Secret):
            yield f"{key}_{value.kind} = {json.dumps(value.where)}"
        elif dataclasses.is_dataclass(value) and not hasattr(value, "from_setting"):
            yield from _shown(value, f"{key}.")
        elif isinstance(value, Mapping):
            yield from (f"{key}.{json.dumps(name)} = {json.dumps(text)}" for name, text in value.items())
        else:
            yield f"{key} = {json.dumps(_plain(value))}"


def _plain(value: Any) -> Any:
    """As it may stand in the settings file."""
    match value:
        case bool() | int() | tuple():
            return value
        case timedelta():
            return duration_text(value)
        case Windows():
            return list(map(str, value.windows))
        case Commands():
            return value.texts
        case Components(which="listed"):
            return [component.value for component in value.listed]
        case _:
            return str(value)


def setup(settings: Settings, type_name: str, authority: str | None) -> list[SetupFile]:
    """
    What the administrator of a CA needs for this node's certificates.

    Args:
        settings: Where the node's files are, and how its backends are configured so far.
        type_name: A backend's type.
        authority: Only this one; None: all that the node has certificates of.

    Raises:
        SettingsError: No such authority, or no such type that could tell.
        BridgeError: The certificates can't be had from such a CA.
    """
    if authority is not None and authority not in AUTHORITIES:
        problem = SettingsProblem("--authority", f"one of {', '.join(AUTHORITIES)}", repr(authority))
        raise SettingsError([problem])
    backend_type = registry.that_sets_up(type_name)
    node = inventory.read(settings.node.pki_dir, settings.node.kubeconfig_dir)
    files: list[SetupFile] = []
    for name in [authority] if authority else AUTHORITIES:
        items = {i.spec.name: i.certificates[0] for i in node.items
                 if i.spec.authority.name == name and i.managed and i.state == "present"}  # fmt: skip
        if items:
            request = _setup_request(settings, type_name, name, items)
            try:
                files += backend_type.setup(request)
            except SettingsError as e:
                raise registry.located(e, settings, name) from None
    if not files:
        raise BridgeError("wanted live certificates to make it from, found none", hint="--pki-dir tells where they are")
    return files


def _setup_request(
    settings: Settings, type_name: str, authority: str, items: Mapping[str, x509.Certificate]
) -> SetupRequest:
    return SetupRequest(
        authority=AUTHORITIES[authority],
        certificates=items,
        validity=settings.renewal.validity,
        node=settings.node.node_name,
        cluster=settings.node.cluster,
        settings=registry.keys_so_far(settings, authority, type_name),
    )
