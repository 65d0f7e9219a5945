"""The command line of requests and answers that are carried, on the node and at a CA desk."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from bridge.cli.changes import ChangeOptions, names_of
from bridge.cli.options import (
    AnyIdentityOption,
    Common,
    Names,
    Output,
    OutputOption,
    WaitOption,
    command,
    utc_now,
)
from bridge.cli.program import app, pending_app
from bridge.renewal.select import RunOptions


@command(app, "export")
def export(
    common: Common,
    path: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The file to write.", show_default=False)],
    names: Names = None,
    any_identity: AnyIdentityOption = None,
    *,
    options: ChangeOptions,
    wait: WaitOption = None,
) -> None:
    """
    Write requests for what is due into one file for a CA desk; the new keys stay on this node.

    While a request waits, exporting it again gives the same key and CSR. It also renews expired certificates, and asks
    for a named one that is missing; the desk's policy decides about that, and about changes.
    """
    from bridge.cli import carried  # noqa: PLC0415

    changes = options.read()
    wanted = RunOptions(
        names=names_of(names, changes),
        any_identity=tuple(any_identity or ()),
        changes=changes,
        wait=wait or timedelta(),
    )
    raise typer.Exit(carried.export(common.settings(), path, wanted, utc_now))


@command(app, "inspect")
def inspect_bundle(
    common: Common,
    path: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A request or an answer.", show_default=False)],
) -> None:
    """
    Show a bundle to the operator who approves it: what is asked, what it replaces, and whose proof it has.

    Compare the fingerprint over the phone: both sides see the same one unless the bundle was changed on its way.
    """
    from bridge.cli import carried  # noqa: PLC0415

    raise typer.Exit(carried.inspect(common.settings(), path, utc_now()))


@command(app, "import")
def import_answers(
    common: Common,
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE|DIR…",
            help="Answer bundles, or certificates in PEM, DER or PKCS#7, under any file name.",
            show_default=False,
        ),
    ],
    all_or_nothing: Annotated[
        bool, typer.Option("--all-or-nothing", help="Install nothing if one certificate fails.")
    ] = False,
    wait: WaitOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """
    Install a CA desk's answers: match each by its public key, prove it, and install it as `renew` does.

    Exits with 4 while other requests still wait.
    """
    from bridge.cli import carried  # noqa: PLC0415

    options = RunOptions(all_or_nothing=all_or_nothing, wait=wait or timedelta())
    code = carried.import_answers(common.settings(), paths, options, utc_now, as_json=output is Output.JSON)
    raise typer.Exit(code)


@command(pending_app, "list")
def pending_list(common: Common, output: OutputOption = Output.TEXT) -> None:
    """Show the open requests: their age, the time left, who has them, and their fingerprints."""
    from bridge.cli import carried  # noqa: PLC0415

    carried.pending_list(common.settings(), utc_now(), as_json=output is Output.JSON)


@command(pending_app, "cancel")
def pending_cancel(
    common: Common,
    names: Annotated[list[str], typer.Argument(metavar="NAME…|all", help="kubeadm's names.", show_default=False)],
    wait: WaitOption = None,
) -> None:
    """Forget requests and remove their keys; a later answer to them is refused."""
    from bridge.cli import carried  # noqa: PLC0415

    options = RunOptions(names=tuple(names), wait=wait or timedelta())
    raise typer.Exit(carried.pending_cancel(common.settings(), options, utc_now))


@command(app, "sign")
def sign(
    common: Common,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="BUNDLE|DIR",
            help="A request bundle, a directory of them, or one of kubeadm's CSRs.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="ANSWER|DIR", help="Where answers go. [default: beside a bundle or the CSRs]"
        ),
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="What may be signed. [default: desk-policy.toml beside the settings]")
    ] = None,
    archive: Annotated[
        Path | None, typer.Option(help="Where answered bundles go. [default: desk.archive, or the state directory]")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be signed and refused; sign nothing.")
    ] = False,
    approve: Annotated[
        bool, typer.Option("--approve", help="Show each bundle on the terminal, and ask whether to sign it.")
    ] = False,
    without_proof: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Require no continuity proof for this certificate; may be repeated."),
    ] = None,
    node: Annotated[str, typer.Option(help="The node whose CSRs the directory holds.", show_default=False)] = "",
    cluster: Annotated[str, typer.Option(help="The cluster of that node.", show_default=False)] = "",
    wait: WaitOption = None,
) -> None:
    """
    Sign what the policy allows, at the CA desk: request bundles of nodes, or kubeadm's CSRs.

    With a directory it is the CA host's cron job: it leaves half-copied bundles alone, archives answered ones, and
    does not sign again what an interrupted run had signed. A refusal goes back to its node in the answer.
    """
    from bridge.cli import desk  # noqa: PLC0415
    from bridge.desk.files import Options  # noqa: PLC0415

    options = Options(
        source=source.absolute(),
        out=out.absolute() if out is not None else None,
        policy=policy.absolute() if policy is not None else None,
        archive=archive.absolute() if archive is not None else None,
        without_proof=frozenset(without_proof or ()),
        node=node,
        cluster=cluster,
    )
    code = desk.sign(common.settings(), options, utc_now, dry_run=dry_run, approve=approve, wait=wait or timedelta())
    raise typer.Exit(code)
