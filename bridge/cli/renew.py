"""`renew`, its rehearsal and its CSRs, and `install`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from bridge import monitoring
from bridge.cli.options import (
    ZERO,
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
from bridge.cli.plan import plan
from bridge.cli.printing import progress_shown, say, say_json, say_table
from bridge.cli.results import about, errors_json, failed_json, grouped, report
from bridge.errors import Exit
from bridge.node import inventory
from bridge.pki.certificates import name_text, serial_hex
from bridge.pki.expiry import minute, rfc3339
from bridge.renewal import renew as renewal
from bridge.renewal.prepare import Prepared, prepare
from bridge.renewal.prepare import write_csrs as write_csr_files
from bridge.renewal.renew import Rehearsal
from bridge.renewal.select import RunOptions, nothing_due, select
from bridge.settings.tables import Settings
from bridge.state.install import InstallError
from bridge.state.store import Outcome, Store
from bridge.system.console import log, print_error

commands = typer.Typer()

RekeyOption = Annotated[
    bool, typer.Option("--rekey", help="Make new keys, which every renewal does: it changes nothing.")
]


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
        bool, typer.Option("--rehearse", help="Have everything, or the names, signed and proven, and throw it away.")
    ] = False,
    ahead: Annotated[
        timedelta | None, duration_option('With --rehearse: only what will be due so soon, such as "2d".')
    ] = None,
    *,
    options: ChangeOptions,
    rekey: RekeyOption = False,
    wait: WaitOption = ZERO,
    output: OutputOption = Output.TEXT,
) -> int:
    """
    Renew what is due (the cron job's command), or the named certificates now.

    Each answer of the CA is proven before anything on disk moves; keys and certificates are replaced in one step
    that survives a crash. A named certificate that is missing is made, from kubeadm-config or --kubeadm-config.
    """
    if rekey:
        log.info("--rekey: every renewal makes a new key; nothing else is done than without it")
    wanted = options.read(
        names,
        all_or_nothing=all_or_nothing,
        restarts=not no_restart,
        csrs_only=csr_only,
        ahead=ahead,
        wait=wait,
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
    wait: WaitOption = ZERO,
    output: OutputOption = Output.TEXT,
) -> int:
    """
    Install keys of `renew --csr-only` or `kubeadm certs generate-csr`, and certificates that were signed by any means.

    Keys have kubeadm's names, flat or nested; certificates are found by public key, in PEM, DER or PKCS#7. Each is
    proven and installed as by `renew`, and must have the identity of the one that it replaces. Exits with 4 while a
    key has no certificate.
    """
    options = RunOptions(
        any_identity=tuple(any_identity or ()), all_or_nothing=all_or_nothing, restarts=not no_restart, wait=wait
    )
    return install(common.settings(), directory.absolute(), options, utc_now, output)


def renew(settings: Settings, options: RunOptions, now: Callable[[], datetime], output: Output) -> int:
    """Renew, print the result, and return the exit code; the metrics file gets the code, whatever it is."""
    with monitoring.written(settings, now) as told:
        with progress_shown() as progress:
            result, node, selection = renewal.run(settings, options, now, progress)
        for sentence in selection.skipped:
            log.log(logging.INFO if options.is_by_name else logging.DEBUG, "%s", sentence)
        report(result, node, selection, settings, now(), output, restarts=options.restarts)
        told.exit_code = result.exit_code
    return told.exit_code


def install(
    settings: Settings, directory: Path, options: RunOptions, now: Callable[[], datetime], output: Output
) -> int:
    """Install from a directory of keys and certificates; return the exit code."""
    from bridge.renewal import airgap  # noqa: PLC0415 (20 ms, which `renew` needs not)

    with monitoring.kept_current(settings, now), progress_shown() as progress:
        result, node, selection = airgap.install_directory(settings, directory, options, now, progress)
    report(result, node, selection, settings, now(), output, restarts=options.restarts)
    if result.renewed:
        log.warning("%s: what was installed from there is no longer needed: remove the keys", directory)
    return result.exit_code


def write_csrs(settings: Settings, directory: Path, options: RunOptions, now: datetime) -> int:
    """Write keys and CSRs into a directory; touch nothing else."""
    if Store(settings.node.state_dir).journal.exists():
        raise InstallError("an installation was interrupted", hint="run `ca-bridge recover`, then this again")
    node = inventory.of(settings.node)
    selection = select(node, settings, options, now)
    for sentence in selection.waived:
        log.warning("%s", sentence)
    made = prepare(selection.items, settings)
    prepared = [one for one in made if isinstance(one, Prepared)]
    if prepared:
        write_csr_files(prepared, directory)
    rows = [(one.item.spec.name, str(directory / f"{one.item.spec.name}.csr"), f"for {one.item.spec.authority.name}")
            for one in prepared]  # fmt: skip
    failed = [*selection.failed, *(one for one in made if isinstance(one, Outcome))]
    if rows:
        say_table(rows)
    elif not failed:
        say(nothing_due(node, settings, now))
    for name, error in grouped(failed):
        print_error(error, name)
    return Exit.worst([outcome.exit_code for outcome in failed])


def rehearse(settings: Settings, options: RunOptions, now: Callable[[], datetime], output: Output) -> int:
    """Rehearse, print the result, and return the exit code; the metrics file gets the code, whatever it is."""
    with monitoring.written(settings, now, rehearsal=True) as told:
        with progress_shown() as progress:
            result = renewal.rehearse(settings, options, now, progress)
        if output is Output.JSON:
            say_json(**_json(result))
        else:
            _print(result)
        for error in result.errors:
            print_error(error)
        for about, error in grouped(result.failed):
            print_error(error, about)
        told.exit_code = result.exit_code
    return told.exit_code


def _print(result: Rehearsal) -> None:
    say_table(
        [
            (
                one.outcome.name,
                f"until {minute(one.leaf.not_valid_after_utc)}",
                f"by {one.outcome.backend}",
                "revoked" if one.revoked else "not revoked",
            )
            for one in result.passed
        ],
        (2,),
        ["ok"] * len(result.passed),
    )
    for sentence in result.skipped:
        log.info("%s", sentence)
    if result.passed:
        say(f"{len(result.passed)} signed, proven and thrown away; nothing on this node was replaced")
    elif not result.failed:
        say("nothing to rehearse; nothing on this node was replaced")
    else:
        say("nothing on this node was replaced")


def _json(result: Rehearsal) -> dict[str, Any]:
    return {
        "exitCode": result.exit_code,
        "rehearsed": [
            {
                **about(one.outcome),
                "notAfter": rfc3339(one.leaf.not_valid_after_utc),
                "serialNumber": serial_hex(one.leaf),
                "issuer": name_text(one.leaf.issuer),
                "revoked": one.revoked,
            }
            for one in result.passed
        ],
        "failed": failed_json(result.failed),
        "skipped": result.skipped,
        "errors": errors_json(result.errors),
    }
