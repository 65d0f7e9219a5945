"""How a command is declared: its options, and the message and exit code of an error."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_args

import typer

from bridge.cli import printing
from bridge.cli.app import Command, Group
from bridge.errors import BridgeError, SettingsError, SettingsProblem
from bridge.node import kubelet
from bridge.pki.expiry import parse_duration
from bridge.settings.load import Overrides
from bridge.settings.tables import Settings
from bridge.state import changed_here, replaced_here
from bridge.system import console, waiting


# readable=False, or Typer would report an unreadable file as a usage error, which a monitor would not see
@dataclass(frozen=True, slots=True)
class Common(Overrides):
    """The options that every command has."""

    config: Annotated[
        Path | None,
        typer.Option(
            envvar="CA_BRIDGE_CONFIG", readable=False, help="Settings file. [default: /etc/ca-bridge/config.toml]"
        ),
    ] = None
    pki_dir: Annotated[Path | None, typer.Option(readable=False, help="Overrides node.pki_dir.")] = None
    kubeconfig_dir: Annotated[Path | None, typer.Option(readable=False, help="Overrides node.kubeconfig_dir.")] = None
    state_dir: Annotated[Path | None, typer.Option(readable=False, help="Overrides node.state_dir.")] = None
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, show_default=False, help="More messages, and all columns.")
    ] = 0
    log_format: Annotated[console.LogFormat, typer.Option(help="Format of messages on standard error.")] = (
        console.LogFormat.TEXT
    )

    def settings(self) -> Settings:
        """Return the settings with these options; without node.name, the node's name comes from its certificates."""
        return kubelet.with_node_name(Overrides.settings(self))

    def examined(self) -> tuple[Settings, list[SettingsProblem]]:
        """Return `settings` with all problems instead of an error; see `Overrides`."""
        settings, problems = Overrides.examined(self)
        return settings if problems else kubelet.with_node_name(settings), problems

    def settings_with_record(self) -> Settings:
        """Return `settings` for a command that shows a state directory; --state-dir must exist."""
        if self.state_dir is not None and not self.state_dir.is_dir():
            raise SettingsError([SettingsProblem("--state-dir", "a state directory", f"no directory {self.state_dir}")])
        return self.settings()


_Function = TypeVar("_Function", bound=Callable[..., int | None])


def group(to: typer.Typer, name: str, sentence: str) -> typer.Typer:
    """Make a group of commands that share their first word."""
    made = typer.Typer(cls=Group, no_args_is_help=True, rich_markup_mode=None, help=sentence)
    to.add_typer(made, name=name)
    return made


def command(to: typer.Typer, name: str, cls: type[Command] = Command) -> Callable[[_Function], _Function]:
    """
    Register a command whose first parameter is a `Common`, and which returns its exit code (None: 0). Errors become
    messages and exit codes; each field of a parameter whose type is a dataclass becomes an option.
    """

    def register(function: _Function) -> _Function:
        common, *others = inspect.signature(function, eval_str=True).parameters.values()
        options: list[inspect.Parameter] = []
        bundles: dict[str, tuple[Any, list[str]]] = {}  #: The dataclass of a parameter, and its fields' names.
        for p in (*others, common):
            own = {p.name: p}
            if dataclasses.is_dataclass(p.annotation):
                own = dict(inspect.signature(p.annotation, eval_str=True).parameters)  # type: ignore[arg-type]
                bundles[p.name] = p.annotation, list(own)
            options += own.values()

        @functools.wraps(function)
        def run(**arguments: Any) -> None:
            for key, (bundle, names) in bundles.items():
                arguments[key] = bundle(**{name: arguments.pop(name) for name in names})
            console.set_up(arguments[common.name].verbose, arguments[common.name].log_format)
            with _errors():
                code = function(**arguments) or 0
                _report_unwritten()
                raise typer.Exit(printing.exit_code(code))

        for p in options:
            kind, *details = get_args(p.annotation)
            if kind is bool and details[0].default is ...:  # no names: Typer would make a --no-… of it, too
                details[0].param_decls = (f"--{p.name.replace('_', '-')}",)
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in options]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        to.command(name, cls=cls)(run)
        return function

    return register


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Turn an exception into a message on standard error and the promised exit code."""
    replaced_here.clear()
    changed_here.clear()
    printing.unwritten.clear()
    try:
        yield
    except BridgeError as e:
        _fail(e)
    except KeyboardInterrupt as e:
        hint, text = "", "interrupted, nothing was replaced"
        if replaced_here:
            text = f"interrupted after files were replaced; the old ones are in the backup {replaced_here[-1]}"
            hint = "`ca-bridge renew` goes on with the open restarts, proofs and hooks"
        elif changed_here:
            text, hint = f"interrupted after {changed_here[-1]} was changed", "the same command again goes on"
        _fail(BridgeError(text, hint=hint), waiting.exit_code(e))
    except (typer.Exit, typer.Abort, typer.BadParameter):  # Typer handles these
        raise
    except OSError as e:
        _fail(BridgeError(f"{f'{e.filename}: ' if e.filename else ''}{e.strerror or type(e).__name__}"))
    except Exception as e:  # noqa: BLE001 (a bug)
        # the place and the type, never the text, which might hold a secret
        frames = [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in traceback.extract_tb(e.__traceback__)]
        console.log.debug("traceback: %s", " < ".join(reversed(frames)))
        text = f"internal error: {type(e).__name__} at {frames[-1]}"
        _fail(BridgeError(text, hint="a bug: report it with what -v prints"))


def _report_unwritten() -> None:
    """Report that standard output can't be written; a closed pipe, as with `head`, only after files were replaced."""
    for error in printing.unwritten:
        text = f"standard output: {error.strerror}"
        if replaced_here:
            text += f"; files were replaced, and the old ones are in the backup {replaced_here[-1]}"
        if replaced_here or not isinstance(error, BrokenPipeError):
            console.print_error(BridgeError(text), has_hint=False)


def _fail(error: BridgeError, code: int | None = None) -> NoReturn:
    console.print_error(error)
    raise typer.Exit(error.exit_code if code is None else code)


def duration(text: str | timedelta) -> timedelta:
    """Parse an option such as "30d"; an option's default is a duration already."""
    if isinstance(text, timedelta):
        return text
    try:
        return parse_duration(text)
    except ValueError as e:
        raise typer.BadParameter(f"wanted {e}, found {text!r}") from None


def option(text: str, *words: str) -> Any:
    """Return an option with this help text, these names (else its parameter's) and, without hyphens, this metavar."""
    names = [word for word in words if word.startswith("-")]
    return typer.Option(*names, metavar=" ".join(words[len(names) :]) or None, help=text)


def argument(text: str, metavar: str | None = None) -> Any:
    """Return an argument with this help text."""
    return typer.Argument(metavar=metavar, help=text)


def duration_option(text: str, *names: str) -> Any:
    """Return an option such as "30d", whose help text says its default."""
    return typer.Option(*names, parser=duration, metavar="DURATION", help=text, show_default=False)
