"""
`check-expiration`; `expiration_forms` makes its texts, except `-o nagios`: a line, data and a status, as
https://nagios-plugins.org/doc/guidelines.html has them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal

import typer

from bridge import monitoring
from bridge.ca import registry
from bridge.cli.app import Command
from bridge.cli.declare import Common, command, duration_option, option
from bridge.cli.expiration_forms import look
from bridge.cli.options import utc_now
from bridge.cli.printing import say, say_usage, unwritten
from bridge.control_plane.proof import ProofFinding
from bridge.errors import BridgeError
from bridge.node.expiry_report import ExpiryReport, Limit, Row, report
from bridge.node.inventory import Node
from bridge.node.reading import read_node
from bridge.pki.expiry import CA_ENDS_SOON, minute, residual, seconds_left
from bridge.renewal import pairs
from bridge.renewal.gate import Failures, attempts_file
from bridge.rotation import places
from bridge.settings.tables import Settings
from bridge.state import Store, credentials
from bridge.state.credentials import Credential
from bridge.system.console import ROOT_HINT, lacks_rights, log, print_error
from bridge.words import one_line

_Output = Literal["table", "json", "yaml", "prometheus", "nagios"]
_WORDS = ("OK", "WARNING", "CRITICAL", "UNKNOWN")
_UNKNOWN = 3  #: The status of a check that could not look.
#: With this share of `renewal.before` left, many nightly runs have failed to renew the certificate.
_CRITICAL_SHARE = 1 / 3

commands = typer.Typer()


class _Check(Command):
    """The command; with `-o nagios` even a wrong option gives a plugin's output and exit code."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Parse the command line."""
        with _shown_to_nagios(is_wanted=any(word.endswith("nagios") for word in args)):
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with _shown_to_nagios(is_wanted=ctx.params["output"] == "nagios"):
            return super().invoke(ctx)


@contextlib.contextmanager
def _shown_to_nagios(*, is_wanted: bool) -> Iterator[None]:
    """Print a usage error as a plugin's line: monitors show no standard error, and take code 2 for CRITICAL."""
    try:
        yield
    except typer.TyperException as error:
        if not is_wanted:
            raise
        e: Any = error  # the classes of usage errors are not exported
        say_usage(e)
        raise typer.Exit(_print(_unknown(e.format_message()), [], _UNKNOWN)) from None


@command(commands, "check-expiration", _Check)
def check_expiration(
    common: Common,
    output: Annotated[_Output, option("Format.", "--output", "-o")] = "table",
    within: Annotated[
        timedelta | None,
        duration_option(
            'Exit with 3 if a certificate ends within this time, such as "30d", is missing or not yet valid.'
        ),
    ] = None,
    warning: Annotated[
        timedelta | None, duration_option("For -o nagios. [default: renewal.before]", "--warning", "-w")
    ] = None,
    critical: Annotated[
        timedelta | None, duration_option("For -o nagios. [default: a third of -w]", "--critical", "-c")
    ] = None,
) -> int:
    """
    Show when the control plane's certificates expire, as `kubeadm certs check-expiration` does.

    It reads files only: it asks no API server, opens no key file and writes nothing.
    """
    if (warning or critical) and output != "nagios":
        raise typer.BadParameter("-w and -c are for -o nagios; for exit code 3 there is --within")
    if warning is not None and critical is not None and critical > warning:
        raise typer.BadParameter("-c has to be shorter than -w: else no warning comes before it is critical")
    if output == "nagios":
        return _check_for_nagios(common, within if warning is None else warning, critical)
    settings = common.settings()
    node, now, own = read_node(settings.node), utc_now(), _own(settings)
    known = monitoring.known_here(settings, now) if output == "prometheus" else None
    replaced = _replaced(settings, node)
    shown = look(node, now, within, output, renewal=settings.renewal, known=known, own=own, replaced=replaced)
    return _print(*shown, is_styled=output == "table")


def _check_for_nagios(common: Common, warning: timedelta | None, critical: timedelta | None) -> int:
    """Print a plugin's line and return its status; the line has errors too, since monitors show no standard error."""
    try:
        settings = common.settings()
        own = _own(settings) or ()
        code = _print(*nagios_check(settings, utc_now(), warning, critical, _failures(settings), own))
    except (BridgeError, OSError) as e:
        error = e if isinstance(e, BridgeError) else BridgeError(f"{e.filename}: {e.strerror}")
        print_error(error)
        code = _print(_unknown(error.reason), [], _UNKNOWN)
    return _UNKNOWN if unwritten else code


def _print(text: str, troubles: Sequence[str], code: int, *, is_styled: bool = False) -> int:
    """Print the result, and on standard error the files that can't be used; return the code."""
    say(text, is_styled=is_styled)
    for trouble in troubles:
        log.error("%s", trouble)
    if any(map(lacks_rights, troubles)):
        log.error("%s", ROOT_HINT, extra={"is_hint": True})
    return code


def _failures(settings: Settings) -> Mapping[str, Failures] | None:
    """Return the failed runs in a row by authority; None: this user may not see them."""
    return attempts_file(Store(settings.node.state_dir)).read() or {} if credentials.may_look(settings) else None


def _own(settings: Settings) -> list[Credential] | None:
    """
    Return our own credentials; None: this user may not see them, or the settings are wrong (see `settings check`).

    Settings that no run has checked yet are read with their backends, which takes longer.
    """
    own = credentials.seen(settings)
    if own is not None or not credentials.may_look(settings):
        return own
    try:
        files = registry.credentials(settings, registry.configured(settings, settings.authorities))
    except BridgeError:
        return None
    return credentials.look(settings, files, Store(settings.node.state_dir))


def _replaced(settings: Settings, node: Node) -> list[places.Replaced] | None:
    """Return the CAs that are being replaced; None: this user may not see that."""
    if not any(authority.next for authority in settings.authorities.values()):
        return []
    try:
        return list(places.look(settings, node, ()).values())
    except (BridgeError, OSError):
        return None


def _limits(settings: Settings, warning: timedelta | None, critical: timedelta | None) -> tuple[Limit, Limit]:
    """Return the limits for WARNING (by default: due for `renew`) and CRITICAL (by default a third of that)."""

    def early(lifetime: timedelta) -> timedelta:
        return settings.renewal.before.of(min(lifetime, settings.renewal.validity)) if warning is None else warning

    def late(lifetime: timedelta) -> timedelta:
        return early(lifetime) * _CRITICAL_SHARE if critical is None else critical

    return early, late


def nagios_check(
    settings: Settings,
    now: datetime,
    warning: timedelta | None,
    critical: timedelta | None,
    failures: Mapping[str, Failures] | None,
    own: Sequence[Credential] = (),
) -> tuple[str, list[str], int]:
    """
    Check a node, and return the plugin's line, lines for standard error, and the status.

    `failures` are the failed runs by CA; None: this user can't see them. `own` are our own credentials.
    """
    node = read_node(settings.node)
    left_alone = settings.renewal.left_alone
    early_limit, late_limit = _limits(settings, warning, critical)
    early = report(node, now, early_limit, left_alone, early_limit if warning is not None else lambda _: CA_ENDS_SOON)
    late = report(node, now, late_limit, left_alone)
    unused = [] if failures is None else pairs.late(settings, node, now)
    lost, near = _of_credentials(own, settings, now)
    errors = [*_critical(late), *_unlisted(late), *lost]
    replaced = None if failures is None else _replaced(settings, node)
    slow = [f"{ca.name} is in phase {ca.standing.text} since {minute(ca.since)}"
            for ca in replaced or () if ca.is_late(now)]  # fmt: skip
    warnings = [*_warning(early, late, failures, unused), *slow, *near]
    status = 2 if errors or early.troubles else 1 if warnings else 0
    what = ", ".join([*errors, *warnings]) or _good(early)
    unseen = "" if failures is not None else " (failed runs are for root to see)"
    later = {row.name: row for row in late.rows}  # another limit may give another order
    data = " ".join(_performance(row, later[row.name]) for row in early.rows if row.chain)
    return f"CERTIFICATES {_WORDS[status]} - {what}{unseen}{' | ' if data else ''}{data}", list(early.troubles), status


def _of_credentials(own: Sequence[Credential], settings: Settings, now: datetime) -> tuple[list[str], list[str]]:
    """Our own credentials that are expired or unreadable, and those that end soon."""
    lost = [f"{each.name} expired" for each in own if each.has_ended(now)]
    lost += [f"{each.name} unreadable" for each in own if each.ends is None and not lacks_rights(each.trouble)]
    near = [each for each in own if each.is_near(settings.renewal.before, now) and not each.has_ended(now)]
    return lost, [f"{each.name} ends in {residual(seconds_left(each.ends or now, now))}" for each in near]


def _unknown(why: str) -> str:
    return f"CERTIFICATES {_WORDS[_UNKNOWN]} - {_in_line(why)}"


def _in_line(text: str) -> str:
    """Make a text safe for the plugin's line, in which a bar begins the performance data."""
    return one_line(text).replace("|", "/")


def _unlisted(late: ExpiryReport) -> Iterator[str]:
    """Yield troubles with files that belong to no certificate, such as a manifest: no row names them."""
    names = {row.name for row in late.rows}
    return (_in_line(trouble) for trouble in late.troubles if trouble.partition(":")[0] not in names)


def _critical(late: ExpiryReport) -> list[str]:
    rows = [row for row in late.rows if not (row.state == "missing" and row.optional)]
    return [
        *(f"{row.name} expired" for row in rows if row.expired),
        *(f"{row.name} is not valid yet" for row in rows if row.early and not row.foreign),
        *(f"{row.name} {row.state}" for row in rows if row.state != "present"),
        *(_ends(row) for row in rows if row.due and row.chain and not row.expired and not row.early),
    ]


def _warning(
    early: ExpiryReport, late: ExpiryReport, failures: Mapping[str, Failures] | None, unused: Sequence[ProofFinding]
) -> list[str]:
    late_names = {row.name for row in late.rows if row.due}
    programs = [(each.component.value if each.component else "a program", each.certificate) for each in unused]
    return [
        *(_ends(row) for row in early.rows if row.due and row.chain and row.name not in late_names),
        *(f"{name}: {failure}" for name, failure in (failures or {}).items()),
        *(f"{program} does not use its new {certificate} yet" for program, certificate in programs),
    ]


def _ends(row: Row) -> str:
    return f"{row.name} ends in {residual(row.chain_seconds_left or 0)}"


def _good(report: ExpiryReport) -> str:
    left: Sequence[Row] = [row for row in report.rows if row.chain_seconds_left is not None]
    if not left:
        return "no certificates"
    first = min(left, key=lambda row: row.chain_seconds_left or 0)
    return f"{len(left)} certificates, {first.name} ends first, in {residual(first.chain_seconds_left or 0)}"


def _performance(early: Row, late: Row) -> str:
    """Return the seconds left with both limits; the form `N:` alerts below N."""
    limits = ";".join("" if row.limit is None else f"{int(row.limit.total_seconds())}:" for row in (early, late))
    return f"'{early.name}'={early.chain_seconds_left}s;{limits}"
