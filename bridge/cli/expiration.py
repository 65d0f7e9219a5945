"""`check-expiration`; the texts are made in `expiration_forms` and `nagios`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bridge.cli.expiration_forms import PhaseOfCa, look
from bridge.cli.help import Command
from bridge.cli.options import Common, command, duration_option, utc_now
from bridge.cli.printing import say, say_usage
from bridge.errors import BridgeError
from bridge.node import inventory
from bridge.settings.tables import Settings
from bridge.state.store import Store
from bridge.system.console import ROOT_HINT, lacks_rights, log, print_error

if TYPE_CHECKING:
    from bridge.node.inventory import Node
    from bridge.renewal.gate import Failures
    from bridge.state.credentials import Credential

commands = typer.Typer()


class ExpirationOutput(StrEnum):
    """Formats of `check-expiration`."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"
    PROMETHEUS = "prometheus"
    NAGIOS = "nagios"


class _Check(Command):
    """The command; a wrong option gives a monitor's own output and exit code."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Parse the command line."""
        with _told_to_nagios(asked=any(word.endswith(ExpirationOutput.NAGIOS) for word in args)):
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Do what it says."""
        with _told_to_nagios(asked=ctx.params["output"] == ExpirationOutput.NAGIOS):
            return super().invoke(ctx)


@contextlib.contextmanager
def _told_to_nagios(*, asked: bool) -> Iterator[None]:
    """Print a usage error as a plugin's line, too: monitors show no standard error, and code 2 is CRITICAL for them."""
    try:
        yield
    except typer.TyperException as error:
        if not asked:
            raise
        e: Any = error  # the classes of usage errors are not exported
        from bridge.cli import nagios  # noqa: PLC0415 (for monitors alone)

        say_usage(e)
        raise typer.Exit(_shown(nagios.unknown(e.format_message()), [], nagios.UNKNOWN)) from None


@command(commands, "check-expiration", _Check)
def check_expiration(
    common: Common,
    output: Annotated[ExpirationOutput, typer.Option("--output", "-o", help="Format.")] = ExpirationOutput.TABLE,
    within: Annotated[
        timedelta | None,
        duration_option('Exit with 3 if one expires within this time, such as "30d", is missing or not valid yet.'),
    ] = None,
    warning: Annotated[
        timedelta | None, duration_option("For -o nagios. [default: renewal.before]", "--warning", "-w")
    ] = None,
    critical: Annotated[
        timedelta | None, duration_option("For -o nagios. [default: a third of it]", "--critical", "-c")
    ] = None,
) -> int:
    """
    Show when the control plane's certificates expire, as `kubeadm certs check-expiration` does.

    It reads files only: it asks no API server, opens no key file and writes nothing.
    """
    if (warning or critical) and output is not ExpirationOutput.NAGIOS:
        raise typer.BadParameter("-w and -c are for -o nagios; for exit code 3 there is --within")
    if warning is not None and critical is not None and critical > warning:
        raise typer.BadParameter("-c has to be shorter than -w: else no warning comes before it is critical")
    if output is ExpirationOutput.NAGIOS:
        return _check_for_nagios(common, within if warning is None else warning, critical)
    settings = common.settings()
    known = None
    if output is ExpirationOutput.PROMETHEUS:
        from bridge import monitoring  # noqa: PLC0415 (for monitors alone)

        known = monitoring.known_here(settings, utc_now())
    node, own = inventory.of(settings.node), _own(settings)
    phases = _phases(settings, node)
    found = look(node, utc_now(), within, output.value, renewal=settings.renewal, known=known, own=own, phases=phases)
    return _shown(*found, is_styled=output is ExpirationOutput.TABLE)


def _check_for_nagios(common: Common, warning: timedelta | None, critical: timedelta | None) -> int:
    """Print a plugin's line and return its status; errors are in the line, too: monitors show no standard error."""
    from bridge.cli import nagios  # noqa: PLC0415 (for monitors alone)

    try:
        settings = common.settings()
        limits = nagios.Thresholds.of(settings, warning, critical)
        return _shown(*nagios.check(settings, utc_now(), limits, _failures(settings), _own(settings) or ()))
    except (BridgeError, OSError) as e:
        error = e if isinstance(e, BridgeError) else BridgeError(f"{e.filename}: {e.strerror}")
        print_error(error)
        return _shown(nagios.unknown(error.reason), [], nagios.UNKNOWN)


def _shown(text: str, troubles: Sequence[str], code: int, *, is_styled: bool = False) -> int:
    """Print the result, and on standard error the files that could not be read; return the code."""
    say(text, is_styled=is_styled)
    for trouble in troubles:
        log.error("%s", trouble)
    if any(map(lacks_rights, troubles)):
        log.error("%s", ROOT_HINT, extra={"is_hint": True})
    return code


def _failures(settings: Settings) -> Mapping[str, Failures] | None:
    """The failed runs in a row by authority; None: this user may not see them."""
    from bridge.renewal.gate import Attempts  # noqa: PLC0415 (for monitors alone)

    directory = settings.node.state_dir
    try:
        directory.lstat()
    except FileNotFoundError:
        return {}
    except OSError:
        return None
    return Attempts(Store(directory)).authorities if os.access(directory, os.R_OK | os.X_OK) else None


def _own(settings: Settings) -> list[Credential] | None:
    """
    Our own credentials; None: this user may not see them, or `settings check` has to be asked.

    Settings that no run has checked yet are read with their backends, which takes longer.
    """
    from bridge.state import credentials  # noqa: PLC0415 (the fast way to the table has its own)

    found = credentials.seen(settings)
    if found is not None or not credentials.may_look(settings):
        return found
    from bridge.ca import registry  # noqa: PLC0415 (it loads the backends)

    try:
        places = credentials.places(settings, registry.configured(settings, settings.authorities))
    except BridgeError:
        return None
    return credentials.look(settings, places, Store(settings.node.state_dir))


def _phases(settings: Settings, node: Node) -> list[PhaseOfCa] | None:
    """The phase of each CA that is being replaced; None: this user may not see it."""
    if not any(ours.next for ours in settings.authorities.values()):
        return []
    from bridge.rotation import places  # noqa: PLC0415 (where a CA is being replaced)

    try:
        found = places.look(settings, node, ())
        return [PhaseOfCa(name, one.standing.text, one.since) for name, one in found.items()]
    except (BridgeError, OSError):
        return None
