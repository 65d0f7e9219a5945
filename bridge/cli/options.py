"""What all commands share: their options, and what becomes of an error."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from bridge.cli.help import Command
from bridge.errors import BridgeError, SettingsError, SettingsProblem
from bridge.node import kubelet
from bridge.pki.expiry import parse_duration
from bridge.settings.load import load, overridden
from bridge.settings.tables import Settings
from bridge.state.store import replaced_here
from bridge.system import console, interruption
from bridge.system.console import LogFormat


@dataclass(frozen=True, slots=True)
class Common:
    """The options that every command has."""

    config: Path | None
    pki_dir: Path | None
    kubeconfig_dir: Path | None
    state_dir: Path | None

    def settings(self) -> Settings:
        """
        The settings file with the options over it; the node's name, if nothing sets it, is that of its certificates.

        Raises:
            SettingsError: The file can't be used.
        """
        settings = overridden(load(self.config), self.pki_dir, self.kubeconfig_dir, self.state_dir)
        return kubelet.with_node_name(settings)

    def settings_with_record(self) -> Settings:
        """
        As `settings`, for a command that shows what a state directory has: one that is named has to be there.

        Raises:
            SettingsError: The file can't be used, or the directory is not there.
        """
        if self.state_dir is not None and not self.state_dir.is_dir():
            raise SettingsError([SettingsProblem("--state-dir", "a state directory", f"no directory {self.state_dir}")])
        return self.settings()


def _common_options(
    config: Annotated[
        Path | None,
        typer.Option(envvar="CA_BRIDGE_CONFIG", help="Settings file. [default: /etc/ca-bridge/config.toml]"),
    ] = None,
    pki_dir: Annotated[Path | None, typer.Option(help="Overrides node.pki_dir.")] = None,
    kubeconfig_dir: Annotated[Path | None, typer.Option(help="Overrides node.kubeconfig_dir.")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="Overrides node.state_dir.")] = None,
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, show_default=False, help="More messages.")] = 0,
    log_format: Annotated[LogFormat, typer.Option(help="Format of messages on standard error.")] = LogFormat.TEXT,
) -> Common:
    console.set_up(verbose, log_format)
    return Common(config, pki_dir, kubeconfig_dir, state_dir)


def command(to: typer.Typer, name: str) -> Callable[[Callable[..., None]], None]:
    """
    Register a command: its first parameter is a `Common`, its errors become messages and exit codes.

    A parameter whose type is a dataclass stands for an option of each of its fields: a bundle that commands share.
    """

    def register(function: Callable[..., None]) -> None:
        ours = inspect.signature(_common_options, eval_str=True).parameters
        theirs = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        bundles: dict[str, type] = {
            p.name: p.annotation
            for p in theirs
            if isinstance(p.annotation, type) and dataclasses.is_dataclass(p.annotation)
        }

        @functools.wraps(function)
        def run(**arguments: Any) -> None:
            common = _common_options(**{key: arguments.pop(key) for key in ours})
            for key, bundle in bundles.items():
                arguments[key] = bundle(
                    **{field.name: arguments.pop(field.name) for field in dataclasses.fields(bundle)}
                )
            with _Errors():
                function(common, **arguments)

        options = [one for p in theirs for one in (_fields(p.annotation) if p.name in bundles else [p])]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*options, *ours.values())]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        to.command(name, cls=Command)(run)

    return register


def _fields(bundle: type) -> list[inspect.Parameter]:
    return list(inspect.signature(bundle, eval_str=True).parameters.values())


#: Exceptions that end a command as they should.
_TYPERS_OWN = (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError)


class _Errors:
    """Turns an exception into a message on standard error and the promised exit code."""

    def __enter__(self) -> None:
        replaced_here.clear()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, BridgeError):
            _fail(error)
        if isinstance(error, KeyboardInterrupt):
            _interrupted(error)
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            place = f"{error.filename}: " if error.filename else ""
            _fail(BridgeError(f"{place}{error.strerror or type(error).__name__}"))
        if isinstance(error, Exception) and not isinstance(error, _TYPERS_OWN):
            _bug(error)


def _fail(error: BridgeError) -> NoReturn:
    console.print_error(error)
    raise typer.Exit(error.exit_code)


def _interrupted(error: KeyboardInterrupt) -> NoReturn:
    """Say at once whether anything was replaced."""
    if replaced_here:
        text = f"interrupted after files were replaced; the old ones are in the backup {replaced_here[-1]}"
        console.print_error(
            BridgeError(text, hint="`ca-bridge renew` goes on with what is owed: restarts, proof, hooks")
        )
    else:
        console.print_error(BridgeError("interrupted, nothing was replaced"))
    raise typer.Exit(interruption.exit_code(error))


def _bug(error: Exception) -> NoReturn:
    """Report a bug: where, and of which kind; never its text, which might hold a secret."""
    frames = [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    console.log.debug("traceback: %s", " < ".join(reversed(frames)))
    bug = BridgeError(
        f"internal error: {type(error).__name__} at {frames[-1]}", hint="a bug: report it with what -v prints"
    )
    _fail(bug)


def utc_now() -> datetime:
    """The node's clock."""
    return datetime.now(UTC)


class ExpirationOutput(StrEnum):
    """Formats of `check-expiration`."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"
    PROMETHEUS = "prometheus"
    NAGIOS = "nagios"


class Output(StrEnum):
    """Formats of a run's result."""

    TEXT = "text"
    JSON = "json"


def duration(text: str) -> timedelta:
    """
    Read an option such as "30d".

    Raises:
        typer.BadParameter: It is none.
    """
    try:
        return parse_duration(text)
    except ValueError as e:
        raise typer.BadParameter(f"wanted {e}, found {text!r}") from None


Names = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NAME…|all]", help="kubeadm's names, or all. [default: what is due]", show_default=False),
]
AnyIdentityOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Renew the named certificate as it is, though the live one is of another CA, or not for whom it should be. "
        "May be given more than once.",
    ),
]
WaitOption = Annotated[
    timedelta | None,
    typer.Option(parser=duration, metavar="DURATION", help='How long to wait for another run to end, such as "60s".'),
]
OutputOption = Annotated[Output, typer.Option("--output", "-o", help="Format of the result.")]
