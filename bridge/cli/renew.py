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
from bridge.cli.declare import Common, argument, command, duration_option, option
from bridge.cli.options import (
    AllOrNothingOption,
    AnyIdentityOption,
    ChangeOptions,
    Names,
    NoRestartOption,
    Output,
    OutputOption,
    WaitOption,
    utc_now,
)
from bridge.cli.printing import end_text, exit_code, progress_shown, say, say_json, say_sentence, say_table
from bridge.cli.results import about, errors_json, failed_json, log_skipped, print_errors, print_restart, report
from bridge.diagnosis import Finding, authorities, installed, use
from bridge.errors import Exit
from bridge.node.inventory import Item, Node
from bridge.node.reading import read_node
from bridge.pki.certificates import name_text, serial_hex
from bridge.pki.expiry import duration_text, first_end, minute
from bridge.renewal import Selection, install_directory, nothing_due
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
from bridge.system.console import log, log_with_hint

commands = typer.Typer()


@command(commands, "renew")
def renew_command(
    common: Common,
    names: Names = None,
    csr_only: Annotated[bool, option("Only write keys and CSRs, to --csr-dir.")] = False,
    csr_dir: Annotated[Path | None, option("Where --csr-only writes NAME.key and NAME.csr.")] = None,
    dry_run: Annotated[bool, option("Show what would be done; the same as `plan`.")] = False,
    all_or_nothing: AllOrNothingOption = False,
    no_restart: NoRestartOption = False,
    is_rehearsal: Annotated[
        bool, option("Have all or the named certificates signed and verified, then discard them.", "--rehearse")
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
    more = {"all_or_nothing": all_or_nothing, "restarts": not no_restart, "csrs_only": csr_only, "ahead": ahead}
    wanted, settings = options.read(names, wait=wait, **more), common.settings()
    if is_rehearsal:
        return rehearse(settings, wanted, utc_now, output)
    if csr_only and csr_dir is not None:
        return write_csrs(settings, csr_dir.absolute(), wanted, utc_now())
    return plan(settings, wanted, utc_now(), output) if dry_run else renew(settings, wanted, utc_now, output)


@command(commands, "install")
def install_command(
    common: Common,
    directory: Annotated[Path, argument("Keys, and certificates beside them.", "DIR")],
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
        log_skipped(selection.skipped, options)
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
            copies=[copy for copy in copies.look(settings, node) if copy.error or replaced & set(copy.names)],
        )


def _about_cas(node: Node, settings: Settings, now: datetime) -> Iterator[Finding]:
    """Yield `doctor`'s findings about CAs that end too soon or are being replaced."""
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
        refreshed = [copy for copy in found.copies if copy.error is None]
        say_table([(f"copy of {', '.join(copy.names)}", f"refresh {copy.path}") for copy in refreshed])
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
        log_with_hint(level, f"{finding.about}: {finding.text}", finding.hint)
    if plan.shorter:
        validity, shorter = settings.renewal.validity, settings.renewal.shorter
        becomes = "is taken" if shorter == "allow" else 'is refused; set shorter = "allow" in [renewal] if it is meant'
        ends = f"{duration_text(validity)} ends {minute(now + validity)}, before the live certificate does"
        log.warning("%s: renewal.validity = %s: such an answer %s", ", ".join(plan.shorter), ends, becomes)


def _plan_row(item: Item, settings: Settings, now: datetime) -> tuple[str, ...]:
    ours = settings.authorities.get(item.spec.authority.name)
    ask = f"ask {ours.backend}" if ours is not None else f"ask no CA: no [authority.{item.spec.authority.name}]"
    end = end_text(first_end(item.ending), now) if item.certificates else "not on this node"
    files = f"{item.certificate_path}{f' and {item.key_path.name}' if item.key_path else ''}"
    if item.current is not None:
        files = f"{item.current} by a new file{f' and {item.certificate_path}' if item.embedded else ''}"
    return item.spec.name, end, ask, f"{'replace' if item.certificates else 'make'} {files}"


def _plan_json(plan: _Plan, settings: Settings) -> dict[str, Any]:
    selection = plan.selection
    return {
        "renew": [
            {
                "name": item.spec.name,
                "authority": item.spec.authority.name,
                "backend": ours.backend if (ours := settings.authorities.get(item.spec.authority.name)) else None,
                "notAfter": first_end(item.certificates[:1] + item.copy) if item.certificates else None,
                "replace": list(dict.fromkeys(map(str, filter(None, paths)))),
                "changes": desired.notes if (desired := selection.desired.get(item.spec.name)) is not None else [],
            }
            for item in selection.items
            for paths in [(item.key_path, item.certificate_path, item.current)]
        ],
        "shorter": plan.shorter,
        "failed": [{"name": o.name, "error": str(o.error)} for o in selection.failed],
        "skipped": selection.skipped,
        "restart": plan.components,
        "copies": [{"path": str(c.path), "of": c.names, "error": c.error and str(c.error)} for c in plan.copies],
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
    specs = [item.item.spec for item in prepared]
    rows = [(str(directory / f"{spec.name}.csr"), f"for {spec.authority.name}") for spec in specs]
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
            _say_json(result)
        else:
            _print(result)
        print_errors(result.failed, result.errors)
        outcome.exit_code = exit_code(result.exit_code)
    return outcome.exit_code


def _print(result: Rehearsal) -> None:
    rows = []
    for rehearsed in result.passed:
        end, revoked = rehearsed.leaf.not_valid_after_utc, "revoked" if rehearsed.revoked else "not revoked"
        rows.append((rehearsed.outcome.name, f"until {minute(end)}", f"by {rehearsed.outcome.backend}", revoked))
    say_table(rows, (2,), ["ok"] * len(rows))
    for sentence in result.skipped:
        log.info("%s", sentence)
    done = f"{len(rows)} signed, verified and thrown away; " if rows else ""
    begin = done or ("" if result.failed else "nothing to rehearse; ")
    say(f"{begin}nothing on this node was replaced")


def _say_json(result: Rehearsal) -> None:
    rehearsed = [
        {
            **about(passed.outcome),
            "notAfter": passed.leaf.not_valid_after_utc,
            "serialNumber": serial_hex(passed.leaf),
            "issuer": name_text(passed.leaf.issuer),
            "revoked": passed.revoked,
        }
        for passed in result.passed
    ]
    failed, errors = failed_json(result.failed), errors_json(result.errors)
    say_json(exitCode=result.exit_code, rehearsed=rehearsed, failed=failed, skipped=result.skipped, errors=errors)
