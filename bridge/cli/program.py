"""The program `ca-bridge` and its groups of commands; each file of commands adds its own."""

from __future__ import annotations

from typing import Annotated

import typer

from bridge.cli.help import Group
from bridge.cli.printing import say

# Rich tracebacks can print local variables, and ours hold tokens and keys.
app = typer.Typer(
    name="ca-bridge",
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # plain help, the same in a document, a log and a terminal
    help="Renew the certificates of a kubeadm control plane whose CA keys are not on its disks.",
    epilog="`ca-bridge COMMAND -h` shows a command's options and examples. `ca-bridge doctor` says what is missing.",
)


def _group(name: str, sentence: str) -> typer.Typer:
    """Commands that share their first word."""
    group = typer.Typer(cls=Group, no_args_is_help=True, rich_markup_mode=None, help=sentence)
    app.add_typer(group, name=name)
    return group


settings_app = _group("settings", "Write, show and check the settings file.")
audit_app = _group("audit", "Show and verify the audit log.")
pending_app = _group("pending", "Show and cancel requests that a CA has not answered yet.")
backend_app = _group("backend", "Try a CA that the settings name.")


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version  # noqa: PLC0415 (18 ms, for this option alone)

        say(f"ca-bridge {version('kubeadm-ca-bridge')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...
