"""The command line of the main job: renew, plan, install, and what undoes or goes on with a run."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from bridge.cli.changes import ChangeOptions, RekeyOption, names_of
from bridge.cli.options import (
    AnyIdentityOption,
    Common,
    Names,
    Output,
    OutputOption,
    WaitOption,
    command,
    duration,
    utc_now,
)
from bridge.cli.program import app
from bridge.renewal.select import RunOptions


@command(app, "renew")
def renew(
    common: Common,
    names: Names = None,
    csr_only: Annotated[bool, typer.Option("--csr-only", help="Only write keys and CSRs, to --csr-dir.")] = False,
    csr_dir: Annotated[Path | None, typer.Option(help="Where --csr-only writes NAME.key and NAME.csr.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done; the same as `plan`.")] = False,
    all_or_nothing: Annotated[
        bool, typer.Option("--all-or-nothing", help="Install nothing if one certificate fails.")
    ] = False,
    no_restart: Annotated[
        bool, typer.Option("--no-restart", help="Restart nothing, whatever the settings say; name what to restart.")
    ] = False,
    rehearse: Annotated[
        bool,
        typer.Option("--rehearse", help="Have everything, or the names, signed and proven, and throw it away."),
    ] = False,
    ahead: Annotated[
        timedelta | None,
        typer.Option(
            parser=duration, metavar="DURATION", help='With --rehearse: only what will be due so soon, such as "2d".'
        ),
    ] = None,
    any_identity: AnyIdentityOption = None,
    *,
    options: ChangeOptions,
    rekey: RekeyOption = False,
    wait: WaitOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """
    Renew what is due (the cron job's command), or the named certificates now.

    Each answer of the CA is proven before anything on disk moves; keys and certificates are replaced in one step
    that survives a crash. A named certificate that is missing is made, from kubeadm-config or --kubeadm-config.
    """
    from bridge.cli import renewals  # noqa: PLC0415

    changes = options.read(rekey=rekey)
    if csr_only and (changes.is_any or options.kubeadm_config):
        raise typer.BadParameter(
            "--csr-only can't be combined with changes and --kubeadm-config: `export` asks for them"
        )
    if (csr_dir is not None) != csr_only:
        given, missing = ("--csr-only", "--csr-dir DIR") if csr_only else ("--csr-dir", "--csr-only")
        raise typer.BadParameter(f"{given} needs {missing} beside it")
    if csr_only and (dry_run or all_or_nothing or no_restart):
        raise typer.BadParameter("--csr-only can't be combined with --dry-run, --all-or-nothing and --no-restart")
    if wait is not None and (csr_only or dry_run):
        raise typer.BadParameter("--wait can't be combined with --csr-only and --dry-run, which take no lock")
    if rehearse and (csr_only or dry_run or all_or_nothing or no_restart):
        raise typer.BadParameter(
            "--rehearse can't be combined with --csr-only, --dry-run, --all-or-nothing and --no-restart"
        )
    if ahead is not None and not rehearse:
        raise typer.BadParameter("--ahead needs --rehearse beside it")
    wanted = RunOptions(
        names=names_of(names, changes),
        any_identity=tuple(any_identity or ()),
        changes=changes,
        all_or_nothing=all_or_nothing,
        restarts=not no_restart,
        csrs_only=csr_only,
        ahead=ahead,
        wait=wait or timedelta(),
    )
    settings, as_json = common.settings(), output is Output.JSON
    if rehearse:
        from bridge.cli import rehearsal  # noqa: PLC0415

        code = rehearsal.rehearse(settings, wanted, utc_now, as_json=as_json)
    elif csr_dir is not None:
        code = renewals.write_csrs(settings, csr_dir.absolute(), wanted, utc_now())
    elif dry_run:
        code = renewals.plan(settings, wanted, utc_now(), as_json=as_json)
    else:
        code = renewals.renew(settings, wanted, utc_now, as_json=as_json)
    raise typer.Exit(code)


@command(app, "plan")
def plan(
    common: Common,
    names: Names = None,
    any_identity: AnyIdentityOption = None,
    *,
    options: ChangeOptions,
    output: OutputOption = Output.TEXT,
) -> None:
    """
    Show what `renew` would ask, replace and restart.

    It asks no CA and writes nothing; the cluster's API is asked only about a named certificate that is missing, and for
    --adopt-defaults. Exits with 3 if there is something to do.
    """
    from bridge.cli import renewals  # noqa: PLC0415

    changes = options.read()
    wanted = RunOptions(names=names_of(names, changes), any_identity=tuple(any_identity or ()), changes=changes)
    raise typer.Exit(renewals.plan(common.settings(), wanted, utc_now(), as_json=output is Output.JSON))


@command(app, "recover")
def recover(
    common: Common,
    set_aside: Annotated[
        bool, typer.Option("--set-aside", help="First rename damaged state files, and say what they may leave undone.")
    ] = False,
) -> None:
    """Finish or undo what a crash interrupted; every command that writes does the same first."""
    from bridge.cli import history  # noqa: PLC0415

    raise typer.Exit(history.recover(common.settings(), set_aside=set_aside))


@command(app, "backups")
def list_backups(common: Common, output: OutputOption = Output.TEXT) -> None:
    """List the backups, newest first: when, by whom, which certificates and serial numbers."""
    from bridge.cli import history  # noqa: PLC0415

    raise typer.Exit(history.list_backups(common.settings_with_record(), as_json=output is Output.JSON))


@command(app, "rollback")
def rollback(
    common: Common,
    backup_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="As in `backups`. [default: the newest]", show_default=False)
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also what would not pass as new; never damage or another CA.")
    ] = False,
    wait: WaitOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """
    Put a backup's files back in one step that survives a crash.

    Refused unless each file is as it was backed up, each key belongs to its certificate, and each certificate would
    pass as a new one: CA, dates, usages, subject, SANs; with --force only the CA counts of these. What is replaced is
    backed up: a second rollback undoes the first.
    """
    from bridge.cli import history  # noqa: PLC0415

    as_json = output is Output.JSON
    settings = common.settings()
    code = history.rollback(settings, backup_id, utc_now, force=force, wait=wait or timedelta(), as_json=as_json)
    raise typer.Exit(code)


@command(app, "restart")
def restart(
    common: Common,
    components: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[COMPONENT…|all]",
            help="etcd, kube-apiserver, kube-controller-manager, kube-scheduler, kubelet; all: the first four. "
            "[default: as restart.components says]",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also while another node is unhealthy, or shortly after another restart.")
    ] = False,
    wait: WaitOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """
    Restart what still runs on old certificates, one component at a time, each only while the other nodes are healthy.

    It does so as restart.method in the settings says; with "none" it prints what to do and exits with 7.
    """
    from bridge.cli import components as module  # noqa: PLC0415

    as_json = output is Output.JSON
    settings = common.settings()
    code = module.restart(settings, components or [], utc_now, force=force, wait=wait or timedelta(), as_json=as_json)
    raise typer.Exit(code)


@command(app, "install")
def install(
    common: Common,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Keys, and certificates beside them.", show_default=False)
    ],
    all_or_nothing: Annotated[
        bool, typer.Option("--all-or-nothing", help="Install nothing if one certificate fails.")
    ] = False,
    no_restart: Annotated[
        bool, typer.Option("--no-restart", help="Restart nothing, whatever the settings say; name what to restart.")
    ] = False,
    any_identity: AnyIdentityOption = None,
    wait: WaitOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """
    Install keys of `renew --csr-only` or `kubeadm certs generate-csr`, and certificates that were signed by any means.

    Keys have kubeadm's names, flat or nested; certificates are found by public key, in PEM, DER or PKCS#7. Each is
    proven and installed as by `renew`, and must have the identity of the one that it replaces. Exits with 4 while a
    key has no certificate.
    """
    from bridge.cli import renewals  # noqa: PLC0415

    options = RunOptions(
        any_identity=tuple(any_identity or ()),
        all_or_nothing=all_or_nothing,
        restarts=not no_restart,
        wait=wait or timedelta(),
    )
    as_json = output is Output.JSON
    code = renewals.install(common.settings(), directory.absolute(), options, utc_now, as_json=as_json)
    raise typer.Exit(code)
