"""Options that commands share, and the message and exit code of an error."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

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
from bridge.system.console import LogFormat

if TYPE_CHECKING:
    from cryptography import x509

    from bridge.renewal.selection import RunOptions


@dataclass(frozen=True, slots=True)
class Common(Overrides):
    """The options that every command has."""

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


# readable=False, or Typer would report an unreadable file as a usage error, which a monitor would not see
def _common_options(
    config: Annotated[
        Path | None,
        typer.Option(
            envvar="CA_BRIDGE_CONFIG", readable=False, help="Settings file. [default: /etc/ca-bridge/config.toml]"
        ),
    ] = None,
    pki_dir: Annotated[Path | None, typer.Option(readable=False, help="Overrides node.pki_dir.")] = None,
    kubeconfig_dir: Annotated[Path | None, typer.Option(readable=False, help="Overrides node.kubeconfig_dir.")] = None,
    state_dir: Annotated[Path | None, typer.Option(readable=False, help="Overrides node.state_dir.")] = None,
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, show_default=False, help="More messages, and all columns.")
    ] = 0,
    log_format: Annotated[LogFormat, typer.Option(help="Format of messages on standard error.")] = LogFormat.TEXT,
) -> Common:
    console.set_up(verbose, log_format)
    return Common(config, pki_dir, kubeconfig_dir, state_dir)


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
        ours = inspect.signature(_common_options, eval_str=True).parameters
        theirs = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        bundles: dict[str, Any] = {p.name: p.annotation for p in theirs if dataclasses.is_dataclass(p.annotation)}

        @functools.wraps(function)
        def run(**arguments: Any) -> None:
            common = _common_options(**{key: arguments.pop(key) for key in ours})
            for key, bundle in bundles.items():
                arguments[key] = bundle(
                    **{field.name: arguments.pop(field.name) for field in dataclasses.fields(bundle)}
                )
            with _errors():
                code = function(common, **arguments) or 0
                _report_unwritten()
                raise typer.Exit(printing.exit_code(code))

        options: list[inspect.Parameter] = []
        for p in theirs:
            own = inspect.signature(bundles[p.name], eval_str=True).parameters if p.name in bundles else {p.name: p}
            options += own.values()
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*options, *ours.values())]
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


def utc_now() -> datetime:
    """Return the time by the node's clock."""
    return datetime.now(UTC)


class Output(StrEnum):
    """Formats of a run's result."""

    TEXT = "text"
    JSON = "json"


def duration(text: str | timedelta) -> timedelta:
    """Parse an option such as "30d"; an option's default is a duration already."""
    if isinstance(text, timedelta):
        return text
    try:
        return parse_duration(text)
    except ValueError as e:
        raise typer.BadParameter(f"wanted {e}, found {text!r}") from None


def duration_option(text: str, *names: str) -> Any:
    """Return an option such as "30d", whose help text says its default."""
    return typer.Option(*names, parser=duration, metavar="DURATION", help=text, show_default=False)


Names = Annotated[
    list[str] | None, typer.Argument(metavar="[NAME…|all]", help="kubeadm's names, or all. [default: what is due]")
]
AnyIdentityOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Renew the named certificate even if the current one has another CA or an unexpected name. "
        "May be given more than once.",
    ),
]
WaitOption = Annotated[timedelta, duration_option('How long to wait for another run to end, such as "60s".')]
OutputOption = Annotated[Output, typer.Option("--output", "-o", help="Format of the result.")]
AllOrNothingOption = Annotated[bool, typer.Option("--all-or-nothing", help="Install nothing if one certificate fails.")]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Also while another node is unhealthy, or shortly after another restart.")
]
NoRestartOption = Annotated[
    bool, typer.Option("--no-restart", help="Restart nothing, whatever the settings say; list what to restart.")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeOptions:
    """The options that change the next certificates; one option a field."""

    add_san: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SAN",
            help="Add a DNS name or an IP address to the next certificate of apiserver, etcd-server or etcd-peer. "
            "May be given more than once.",
        ),
    ] = None
    drop_san: Annotated[
        list[str] | None, typer.Option(metavar="NAME=SAN", help="Remove a SAN that nothing on this node uses.")
    ] = None
    adopt_defaults: Annotated[
        bool,
        typer.Option(
            "--adopt-defaults",
            help="Give the named certificates the subjects of today's kubeadm, if the cluster grants them their rights.",
        ),
    ] = False
    kubeadm_config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="kubeadm's configuration, from which a named certificate that is missing is made. "
            "[default: the cluster's kubeadm-config]",
        ),
    ] = None
    any_identity: AnyIdentityOption = None

    def read(self, names: Sequence[str] | None, **more: Any) -> RunOptions:
        """Return the options of a run; without names, the run is about the certificates whose SANs change."""
        from bridge.renewal.selection import Changes, RunOptions  # noqa: PLC0415 (only for commands that renew)

        changes = Changes(
            add=_sans("--add-san", self.add_san),
            drop=_sans("--drop-san", self.drop_san),
            adopt_defaults=self.adopt_defaults,
            kubeadm_config=self.kubeadm_config,
        )
        return RunOptions(
            names=tuple(names or dict.fromkeys([*changes.add, *changes.drop])),
            any_identity=tuple(self.any_identity or ()),
            changes=changes,
            **more,
        )


def _sans(option: str, given: Sequence[str] | None) -> dict[str, tuple[x509.GeneralName, ...]]:
    from bridge.pki.csr import general_name  # noqa: PLC0415 (as above)

    names: dict[str, list[x509.GeneralName]] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        try:
            if not equals or not name:
                raise ValueError(f"wanted NAME=SAN such as apiserver=api.example.com, found {text[:60]!r}")  # noqa: TRY301
            names.setdefault(name, []).append(general_name(value))
        except ValueError as e:
            raise typer.BadParameter(f"{option}: {e}") from None
    return {name: tuple(dict.fromkeys(sans)) for name, sans in names.items()}
