"""`renew`, its plan, its rehearsal and its CSRs, and `install`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from bridge import control_plane, monitoring
from bridge.cli.options import (
    AllOrNothingOption,
    AnyIdentityOption,
    ChangeOptions,
    Common,
    Names,
    NoRestartOption,
    Output,
    OutputOption,
    WaitOption,
    command,
    duration_option,
    utc_now,
)
from bridge.cli.printing import end_text, exit_code, progress_shown, say, say_json, say_sentence, say_table
from bridge.cli.results import about, errors_json, failed_json, print_errors, print_restart, report
from bridge.diagnosis import Finding, use
from bridge.errors import Exit
from bridge.node.inventory import Item, Node
from bridge.node.reading import read_node
from bridge.pki.certificates import name_text, serial_hex
from bridge.pki.expiry import duration_text, first_end, minute, rfc3339
from bridge.renewal import Selection, nothing_due
from bridge.renewal import renew as renewal
from bridge.renewal.changes import decide
from bridge.renewal.issuance import shortened
from bridge.renewal.prepare import prepare
from bridge.renewal.prepare import write_csrs as write_csr_files
from bridge.renewal.renew import Rehearsal
from bridge.renewal.selection import RunOptions, select
from bridge.settings.tables import Settings
from bridge.specs import Component
from bridge.state import Store, copies
from bridge.state.copies import Copy
from bridge.state.install import InstallError
from bridge.system.console import log

commands = typer.Typer()


@command(commands, "renew")
def renew_command(
    common: Common,
    names: Names = None,
    csr_only: Annotated[bool, typer.Option("--csr-only", help="Only write keys and CSRs, to --csr-dir.")] = False,
    csr_dir: Annotated[Path | None, typer.Option(help="Where --csr-only writes NAME.key and NAME.csr.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done; the same as `plan`.")] = False,
    all_or_nothing: AllOrNothingOption = False,
    no_restart: NoRestartOption = False,
    is_rehearsal: Annotated[
        bool,
        typer.Option("--rehearse", help="Have all or the named certificates signed and verified, then discard them."),
    ] = False,
    ahead: Annotated[
        timedelta | None, duration_option('With --rehearse: only what will be due within this time, such as "2d".')
    ] = None,
    *,
    options: ChangeOptions,
    wait: WaitOption = timedelta(),
    output: OutputOption = Output.TEXT,
) -> int:
    """
    Renew what is due (the cron job's command), or the named certificates now.

    Each answer of the CA is verified before anything on disk moves; keys and certificates are replaced in one step
    that survives a crash. A named certificate that is missing is made, from kubeadm-config or --kubeadm-config.
    """
    wanted = options.read(
        names, all_or_nothing=all_or_nothing, restarts=not no_restart, csrs_only=csr_only, ahead=ahead, wait=wait
    )
    settings = common.settings()
    if is_rehearsal:
        return rehearse(settings, wanted, utc_now, output)
    if csr_only and csr_dir is not None:
        return write_csrs(settings, csr_dir.absolute(), wanted, utc_now())
    if dry_run:
        return plan(settings, wanted, utc_now(), output)
    return renew(settings, wanted, utc_now, output)


@command(commands, "install")
def install_command(
    common: Common,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Keys, and certificates beside them.")],
    all_or_nothing: AllOrNothingOption = False,
    no_restart: NoRestartOption = False,
    any_identity: AnyIdentityOption = None,
    wait: WaitOption = timedelta(),
    output: OutputOption = Output.TEXT,
) -> int:
    """
    Install keys of `renew --csr-only` or `kubeadm certs generate-csr`, and certificates that were signed by any means.

    Keys have kubeadm's names, flat or nested; certificates are found by public key, in PEM, DER or PKCS#7. Each is
    proven and installed as by `renew`, and must have the identity of the one that it replaces. Exits with 4 while a
    key has no certificate.
    """
    from bridge.renewal import install_directory  # noqa: PLC0415 (20 ms, and `renew` does not need it)

    settings, directory = common.settings(), directory.absolute()
    options = RunOptions(
        any_identity=tuple(any_identity or ()), all_or_nothing=all_or_nothing, restarts=not no_restart, wait=wait
    )
    with monitoring.kept_current(settings, utc_now), progress_shown() as progress:
        result, node, selection = install_directory.install(settings, directory, options, utc_now, progress)
    report(result, node, selection, settings, utc_now(), output, restarts=options.restarts)
    if result.renewed:
        text = "%s: its keys and certificates are installed, and no longer needed there: remove the keys"
        log.warning(text, directory)
    return result.exit_code


def renew(settings: Settings, options: RunOptions, now: Callable[[], datetime], output: Output) -> int:
    """Renew, print the result, and return the exit code, which the metrics file gets in any case."""
    with monitoring.written(settings, now) as outcome:
        with progress_shown() as progress:
            result, node, selection = renewal.run(settings, options, now, progress)
        for sentence in selection.skipped:
            log.log(logging.INFO if options.is_by_name else logging.DEBUG, "%s", sentence)
        report(result, node, selection, settings, now(), output, restarts=options.restarts)
        outcome.exit_code = exit_code(result.exit_code)
    return outcome.exit_code


@command(commands, "plan")
def plan_command(
    common: Common, names: Names = None, *, options: ChangeOptions, output: OutputOption = Output.TEXT
) -> int:
    """
    Show what `renew` would ask, replace and restart.

    It asks no CA and writes nothing; the cluster's API is asked only about a named certificate that is missing, and for
    --adopt-defaults. Exits with 3 if there is something to do.
    """
    return plan(common.settings(), options.read(names), utc_now(), output)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    selection: Selection
    drifted: Sequence[Finding]
    cas: Sequence[Finding]  #: CAs that end too soon, or are being replaced.
    shorter: Sequence[str]  #: Names whose next certificate would end before the live one.
    components: Sequence[Component]  #: Components to restart.
    copies: Sequence[Copy]  #: Copies to refresh, and copies with an error.

    @classmethod
    def of(cls, node: Node, settings: Settings, options: RunOptions, now: datetime) -> _Plan:
        selection = select(node, settings, options, now, desired=decide(node, settings, options))
        specs = [item.spec for item in selection.items]
        replaced = {spec.name for spec in specs}
        reloading = control_plane.reloading(node, settings.node)
        return cls(
            selection=selection,
            drifted=list(use.of_files(node, settings)),
            cas=list(_about_cas(node, settings, now)),
            shorter=[item.spec.name for item in selection.items if shortened(item, settings, now)],
            components=control_plane.stale(specs, reloading, settings.restart.components),
            copies=[
                copy for copy in copies.look(settings, node) if copy.error is not None or replaced & set(copy.names)
            ],
        )


def _about_cas(node: Node, settings: Settings, now: datetime) -> Iterator[Finding]:
    """Yield `doctor`'s findings about CAs that end too soon or are being replaced."""
    from bridge.diagnosis import authorities, installed  # noqa: PLC0415 (only for a plan)

    for state in node.authorities:
        ends = installed.authority(state, node, now) if state.state == "present" else ()
        yield from (end for end in ends if end.check in ("ca-expired", "ca-ends-soon", "ca-ends-first"))
    if any(authority.next for authority in settings.authorities.values()):
        yield from authorities.replacements(node, settings, now)


def plan(settings: Settings, options: RunOptions, now: datetime, output: Output) -> int:
    """Print what `renew` would do, and return the exit code: 3 if there is something to do."""
    node = read_node(settings.node)
    found = _Plan.of(node, settings, options, now)
    _warn(found, settings, now)
    if output is Output.JSON:
        say_json(**_plan_json(found, settings))
    elif found.selection.items:
        is_early = [bool(item.certificates) and first_end(item.ending) > now for item in found.selection.items]
        styles = ["warning" if early else "error" for early in is_early]
        say_table([_plan_row(item, settings, now) for item in found.selection.items], (3,), styles)
        say_table(
            [
                (f"copy of {', '.join(copy.names)}", f"refresh {copy.path}")
                for copy in found.copies
                if copy.error is None
            ]
        )
        print_restart("After that, these must be restarted to use the new ones", found.components, settings)
    elif not found.selection.failed:
        say_sentence(nothing_due(node, settings, now))
    for sentence in found.selection.powerful:
        log.info("%s", sentence)
    print_errors(found.selection.failed)
    for copy in found.copies:
        if copy.error is not None:
            log.warning("%s", copy.error)
    failed = Exit.worst([outcome.exit_code for outcome in found.selection.failed])
    return failed or (Exit.DUE if found.selection.items else Exit.DONE)


def _warn(plan: _Plan, settings: Settings, now: datetime) -> None:
    for sentence in plan.selection.notes:
        log.warning("%s", sentence)
    for finding in (*plan.drifted, *plan.cas):
        level = logging.INFO if finding.level == "note" else logging.WARNING
        log.log(level, "%s: %s", finding.about, finding.text)
        if finding.hint:
            log.log(level, "%s", finding.hint, extra={"is_hint": True})
    if plan.shorter:
        validity, shorter = settings.renewal.validity, settings.renewal.shorter
        becomes = "is taken" if shorter == "allow" else 'is refused; set shorter = "allow" in [renewal] if it is meant'
        ends = f"{duration_text(validity)} ends {minute(now + validity)}, before the live certificate does"
        names = ", ".join(plan.shorter)
        log.warning("%s: renewal.validity = %s: such an answer %s", names, ends, becomes)


def _plan_row(item: Item, settings: Settings, now: datetime) -> tuple[str, ...]:
    verb, authority = "replace" if item.certificates else "make", item.spec.authority.name
    ours = settings.authorities.get(authority)
    return (
        item.spec.name,
        end_text(first_end(item.ending), now) if item.certificates else "not on this node",
        f"ask {ours.backend}" if ours is not None else f"ask no CA: no [authority.{authority}]",
        f"{verb} {_replaced(item)}",
    )


def _replaced(item: Item) -> str:
    if item.current is not None:
        more = f" and {item.certificate_path}" if item.embedded else ""
        return f"{item.current} by a new file{more}"
    return " and ".join([str(item.certificate_path), *([item.key_path.name] if item.key_path else [])])


def _plan_json(plan: _Plan, settings: Settings) -> dict[str, Any]:
    selection = plan.selection
    return {
        "renew": [
            {
                "name": item.spec.name,
                "authority": item.spec.authority.name,
                "backend": ours.backend if (ours := settings.authorities.get(item.spec.authority.name)) else None,
                "notAfter": rfc3339(first_end(item.certificates[:1] + item.copy)) if item.certificates else None,
                "replace": list(
                    dict.fromkeys(map(str, filter(None, (item.key_path, item.certificate_path, item.current))))
                ),
                "changes": desired.notes if (desired := selection.desired.get(item.spec.name)) is not None else [],
            }
            for item in selection.items
        ],
        "shorter": plan.shorter,
        "failed": [{"name": o.name, "error": str(o.error)} for o in selection.failed],
        "skipped": selection.skipped,
        "restart": plan.components,
        "copies": [
            {"path": str(copy.path), "of": copy.names, "error": copy.error and str(copy.error)} for copy in plan.copies
        ],
        "drift": [_finding_json(finding) for finding in plan.drifted],
        "authorities": [_finding_json(ca) for ca in plan.cas],
    }


def _finding_json(finding: Finding) -> dict[str, str]:
    return {"check": finding.check, "about": finding.about, "text": finding.text, "hint": finding.hint}


def write_csrs(settings: Settings, directory: Path, options: RunOptions, now: datetime) -> int:
    """Write keys and CSRs into a directory, and change nothing else."""
    if Store(settings.node.state_dir).journal.exists():
        raise InstallError("an installation was interrupted", hint="run `ca-bridge recover`, then this again")
    node = read_node(settings.node)
    selection = select(node, settings, options, now)
    for sentence in selection.waived:
        log.warning("%s", sentence)
    prepared, unmade = prepare(selection.items, settings)
    if prepared:
        write_csr_files(prepared, directory)
    rows = [
        (str(directory / f"{item.item.spec.name}.csr"), f"for {item.item.spec.authority.name}") for item in prepared
    ]
    failed = [*selection.failed, *unmade]
    if rows:
        say_table(rows)
    elif not failed:
        say_sentence(nothing_due(node, settings, now))
    print_errors(failed)
    return Exit.worst([outcome.exit_code for outcome in failed])


def rehearse(settings: Settings, options: RunOptions, now: Callable[[], datetime], output: Output) -> int:
    """Rehearse, print the result, and return the exit code, which the metrics file gets in any case."""
    with monitoring.written(settings, now, rehearsal=True) as outcome:
        with progress_shown() as progress:
            result = renewal.rehearse(settings, options, now, progress)
        if output is Output.JSON:
            say_json(**_json(result))
        else:
            _print(result)
        print_errors(result.failed, result.errors)
        outcome.exit_code = exit_code(result.exit_code)
    return outcome.exit_code


def _print(result: Rehearsal) -> None:
    rows = []
    for outcome in result.passed:
        end, revoked = (
            f"until {minute(outcome.leaf.not_valid_after_utc)}",
            "revoked" if outcome.revoked else "not revoked",
        )
        rows.append((outcome.outcome.name, end, f"by {outcome.outcome.backend}", revoked))
    say_table(rows, (2,), ["ok"] * len(rows))
    for sentence in result.skipped:
        log.info("%s", sentence)
    done = f"{len(rows)} signed, verified and thrown away; " if rows else ""
    begin = done or ("" if result.failed else "nothing to rehearse; ")
    say(f"{begin}nothing on this node was replaced")


def _json(result: Rehearsal) -> dict[str, Any]:
    return {
        "exitCode": result.exit_code,
        "rehearsed": [
            {
                **about(renewed.outcome),
                "notAfter": rfc3339(renewed.leaf.not_valid_after_utc),
                "serialNumber": serial_hex(renewed.leaf),
                "issuer": name_text(renewed.leaf.issuer),
                "revoked": renewed.revoked,
            }
            for renewed in result.passed
        ],
        "failed": failed_json(result.failed),
        "skipped": result.skipped,
        "errors": errors_json(result.errors),
    }
