"""The command line of setting up: settings, what a CA's administrator needs, jobs, the demonstration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bridge.cli.options import (
    Common,
    command,
    utc_now,
)
from bridge.cli.printing import say
from bridge.cli.program import app, settings_app


@command(app, "setup")
def setup(
    common: Common,
    kind: Annotated[
        str,
        typer.Argument(
            metavar="TYPE",
            help="A backend's type (vault, cfssl, openssl …), kubernetes, systemd or cron.",
            show_default=False,
        ),
    ],
    authority: Annotated[
        str | None, typer.Option(help="Only this one of ca, etcd-ca, front-proxy-ca.", show_default=False)
    ] = None,
    nodes: Annotated[
        Path | None,
        typer.Option(help="For all nodes of this list, one per line: `NAME ADDRESS …`.", show_default=False),
    ] = None,
    directory: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write files into this directory.", show_default=False)
    ] = None,
    enable: Annotated[
        bool, typer.Option("--enable", help="systemd, cron: write the files where they belong, and start them.")
    ] = False,
    inbox: Annotated[
        Path | None, typer.Option(help="systemd, cron: for a CA desk that signs what is in here …", show_default=False)
    ] = None,
    outbox: Annotated[Path | None, typer.Option(help="… and puts the answers here.", show_default=False)] = None,
    user: Annotated[str, typer.Option(help="systemd, cron: the desk's user.")] = "ca",
) -> None:
    """
    Print what a CA's administrator needs, or a job for cron.

    For a CA it is made for exactly this node's certificates. Vault: roles and a policy; cfssl: signing profiles;
    openssl: an openssl.cnf for each CA; cmp, est and exec: what the CA has to give. `setup systemd` and
    `setup cron` make the jobs of this node, or of a CA desk, with this machine's paths. `setup kubernetes` makes the
    gateway's manifests for this cluster; with `--authority`, what a cluster needs that signs for this one.
    """
    from bridge.cli import jobs  # noqa: PLC0415
    from bridge.cli import setup as module  # noqa: PLC0415

    if kind == "kubernetes" and authority is None:
        module.setup_gateway(common.settings(), directory)
        return
    if kind in jobs.KINDS:
        module.setup_jobs(common.settings(), kind, jobs.desk_of(inbox, outbox, user), directory, enable=enable)
        return
    options = module.SetupOptions(authority=authority, nodes=nodes, directory=directory)
    module.setup(common.settings(), kind, options)


@command(app, "demo")
def demo(
    _: Common,
    directory: Annotated[
        Path | None, typer.Option(help="Keep everything in this directory. [default: a temporary one]")
    ] = None,
) -> None:
    """
    Show the main job on a throwaway PKI: no root, no cluster, no network.

    A plan, a renewal, a bad certificate that is refused, a run that is killed and the next one that ends what it
    began, a rollback, and the record of all of it, with an `openssl ca` directory as the company's CA.
    """
    from bridge.cli import demo as demo_module  # noqa: PLC0415

    raise typer.Exit(demo_module.run(directory, utc_now()))


@app.command("complete", hidden=True)
def complete(words: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Say what a shell may offer for the last word, each with its meaning after a tab."""
    from bridge.cli import completion  # noqa: PLC0415
    from bridge.system.console import printable  # noqa: PLC0415

    program = typer.main.get_command(app)
    offers = completion.offers(program, words or [""])
    say("\n".join(f"{printable(word)}\t{meaning}" for word, meaning in offers))


@command(settings_app, "init")
def settings_init(
    common: Common,
    file: Annotated[Path | None, typer.Argument(help="[default: --config, or /etc/ca-bridge/config.toml]")] = None,
) -> None:
    """Write a commented settings file; an older one is never overwritten."""
    from bridge.cli import setup as module  # noqa: PLC0415

    module.settings_init(file or common.config)


@command(settings_app, "show")
def settings_show(common: Common) -> None:
    """Show the settings in force, defaults included; a secret's value is never shown."""
    from bridge.cli import setup as module  # noqa: PLC0415

    module.settings_show(common.settings())


@command(settings_app, "check")
def settings_check(common: Common) -> None:
    """Check the whole settings file, backends' tables included; asks no CA."""
    from bridge.cli import setup as module  # noqa: PLC0415

    module.settings_check(common.settings())
