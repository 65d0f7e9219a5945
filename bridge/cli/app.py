"""
The program `ca-bridge`: each command is in a file of its own, which is loaded when the command is used; it parses its
options, calls a room, prints what came of it, and returns the exit code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Annotated, Any

import typer

from bridge.cli.help import Group
from bridge.cli.printing import say, say_usage

#: The commands in each file below `bridge.cli`.
COMMANDS = {
    "expiration": ("check-expiration",),
    "renew": ("plan", "renew", "install"),
    "components": ("prove", "restart", "serving-certs", "kubelets"),
    "doctor": ("doctor",),
    "rotate_ca": ("rotate-ca",),
    "carried": ("export", "inspect", "import", "pending"),
    "desk": ("sign",),
    "gateway": ("gateway", "trust"),
    "serve": ("serve", "fleet", "enroll", "enrolments", "serve-database", "approvals"),
    "history": ("backups", "rollback", "recover", "audit"),
    "bootstrap": ("bootstrap",),
    "users": ("kubeconfig",),
    "settings": ("settings", "backend"),
    "setup": ("setup",),
    "demo": ("demo",),
    "pages": ("help",),
    "completion": ("complete",),
}
#: The file of each command.
FILES = {command: file for file, names in COMMANDS.items() for command in names}


class _Commands(Mapping[str, Any]):
    """The commands by name; looking one up loads its file."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded:
            file = import_module(f"{__package__}.{FILES[name]}")
            file.commands.rich_markup_mode = None  # as the program's
            self._loaded.update(typer.main.get_group(file.commands).commands)
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(FILES)

    def __len__(self) -> int:
        return len(FILES)


class _Program(Group):
    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = _Commands()  # type: ignore[assignment]  # no command is added later

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Parse what stands before the command."""
        with _usage():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Parse and run the command."""
        with _usage():
            return super().invoke(ctx)


@contextlib.contextmanager
def _usage() -> Iterator[None]:
    """Print a usage error, and end with its exit code."""
    try:
        yield
    except typer.TyperException as error:
        e: Any = error  # the classes of usage errors are not exported
        say_usage(e)
        raise typer.Exit(e.exit_code) from None


# Rich tracebacks can print local variables, and ours hold tokens and keys.
app = typer.Typer(
    name="ca-bridge",
    cls=_Program,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # plain help, the same in a document, a log and a terminal
    help="Renew the certificates of a kubeadm control plane whose CA keys are not on its disks.",
    epilog="`ca-bridge COMMAND -h` shows a command's options and examples. `ca-bridge doctor` says what is missing.",
)


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
