"""The result of a run, as text and as JSON; `renew`, `install` and `import` print it alike."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

from bridge import control_plane
from bridge.cli.options import Output
from bridge.cli.printing import end_text, say, say_headed, say_json, say_sentence, say_sentences, say_table
from bridge.errors import BridgeError, WaitingError
from bridge.node.inventory import Node
from bridge.pki.certificates import name_text, serial_hex
from bridge.pki.expiry import minute, residual
from bridge.renewal import Selection, nothing_due, pairs
from bridge.renewal.gate import NotYetError
from bridge.renewal.selection import RunOptions
from bridge.renewal.verify_and_install import Result
from bridge.settings.tables import Settings
from bridge.specs import Component
from bridge.state import Outcome
from bridge.system.console import hint_of, log, log_with_hint, print_error, printable
from bridge.words import cause


def report(
    result: Result,
    node: Node,
    selection: Selection,
    settings: Settings,
    now: datetime,
    output: Output,
    *,
    restarts: bool = True,
) -> None:
    """Print which certificates were renewed, wait or failed, and which components must be restarted."""
    by_hand = not restarts or settings.restart.method == "none"
    components = stale(result, node, settings) if by_hand else []
    if output is Output.JSON:
        renewed = [(outcome, outcome.new) for outcome in result.renewed if outcome.new is not None]
        say_json(
            exitCode=result.exit_code,
            backup=result.backup_id,
            renewed=[{**about(o), **certificates_json(o), "issuer": name_text(new.issuer)} for o, new in renewed],
            failed=failed_json(result.failed),
            waiting=[
                {**about(o), "notAfter": _end(o), "note": o.error.reason if o.error else ""} for o in result.waiting
            ],
            skipped=selection.skipped,
            restart=components,
            restarted=result.restarted,
            readAgain=result.read_again,
            proven=result.proven,
            errors=errors_json(result.errors),
        )
    else:
        if rows := installed_rows(result.renewed):
            say_table(rows, (2, 3), ["ok"] * len(rows))
            place = settings.node.state_dir / "backups" / str(result.backup_id)
            say_sentence(f"{len(rows)} renewed; the old files are in {place}")
        elif not result.failed and not result.waiting and not result.errors:
            say_sentence(nothing_due(node, settings, now))
        say_waiting(result.waiting, now)
        print_restart("These still run on their old certificates until they are restarted", components, settings)
        if not restarts:
            print_pairs(node, [outcome.name for outcome in result.renewed])
        if result.restarted:
            say(f"restarted: {', '.join(result.restarted)}")
        if result.read_again:
            say(f"read again: {', '.join(result.read_again)}")
        if result.proven is not None:
            say(f"proven: {result.proven} checks hold")
    warn_of_waiting(result.waiting, now)
    print_errors(result.failed, result.errors)


def stale(result: Result, node: Node, settings: Settings) -> list[Component]:
    """List the components that must be restarted to use the renewed certificates."""
    specs = [item.spec for item in node.items if item.spec.name in {o.name for o in result.renewed}]
    return control_plane.stale(specs, control_plane.reloading(node, settings.node), settings.restart.components)


def installed_rows(outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """Return for each installed certificate its name, end, serial number, issuer and CA."""
    pairs = [(outcome, outcome.new) for outcome in outcomes if outcome.new is not None]
    return [(outcome.name, f"until {minute(new.not_valid_after_utc)}", f"serial {serial_hex(new)}",
             f"issuer {name_text(new.issuer)}", f"by {outcome.backend}") for outcome, new in pairs]  # fmt: skip


def say_waiting(waiting: Sequence[Outcome], now: datetime) -> None:
    """Print a row for each waiting certificate, below its CA and the CA's note."""
    if waiting:
        say_headed([(whereabouts(o), (o.name, "waiting", end_text(_end(o), now))) for o in waiting])


def _end(outcome: Outcome) -> datetime | None:
    return outcome.old.not_valid_after_utc if outcome.old is not None else None


def whereabouts(outcome: Outcome) -> str:
    """Return the CA that a certificate waits for, with the CA's note; or the operator's next step."""
    reason = printable(outcome.error.reason if outcome.error is not None else "")
    return f"{outcome.backend}: {reason}" if outcome.backend else reason


#: How long before its end a waiting certificate causes a warning, and how long before it an error.
NEAR = timedelta(days=7)
VERY_NEAR = timedelta(days=2)


def warn_of_waiting(waiting: Sequence[Outcome], now: datetime) -> None:
    """Print a warning, or an error, if a certificate whose successor waits ends soon."""
    if not waiting:
        return
    left = min(filter(None, map(_end, waiting)), default=now) - now
    what, hint = "for an answer", "`ca-bridge pending list` shows them; ask the people who approve them"
    if all(isinstance(outcome.error, NotYetError) for outcome in waiting):
        what, hint = "for a window", NotYetError.hint
    certificates = f"{len(waiting)} certificates wait" if len(waiting) != 1 else "1 certificate waits"
    text = f"{certificates} {what}; the first of them"
    if left <= VERY_NEAR:
        when = f"ENDS IN {residual(int(left.total_seconds()))}" if left > timedelta() else "HAS EXPIRED"
        print_error(WaitingError(f"{text} {when}", hint=hint))
    elif left <= NEAR:
        log_with_hint(logging.WARNING, f"{text} ends in {residual(int(left.total_seconds()))}", hint)


def print_restart(why: str, components: Sequence[Component], settings: Settings) -> None:
    """Print which components to restart, and how."""
    if components:
        say("\n")
        say_sentence(f"{why}, one at a time:")
    for component in components:
        say_sentence(control_plane.how_to_restart(component, settings.node), "  ")


def print_pairs(node: Node, names: Sequence[str]) -> None:
    """Print how the programs of these further pairs start to use them."""
    if any(item.pair is not None for item in node.items):
        say_sentences(pairs.advice(node, names), "")


def log_skipped(sentences: Sequence[str], options: RunOptions) -> None:
    """Log which certificates a run passed over; without names that is usual, and of interest with `-v -v` alone."""
    for sentence in sentences:
        log.log(logging.INFO if options.is_by_name else logging.DEBUG, "%s", sentence)


def print_errors(failed: Sequence[Outcome], errors: Sequence[BridgeError] = ()) -> None:
    """Print the errors of a run, then those of its certificates."""
    for error in errors:
        print_error(error)
    for about, error in grouped(failed):
        print_error(error, about)


def grouped(failed: Sequence[Outcome]) -> Iterator[tuple[str, BridgeError]]:
    """Yield one error for all certificates that failed for the same reason at the same CA, with the first hint."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in failed:
        reason = outcome.error.reason if outcome.error else ""
        reason = cause(reason, outcome.name) if outcome.backend else reason
        groups.setdefault((outcome.backend, reason), []).append(outcome)
    for (backend, _), outcomes in groups.items():
        if outcomes[0].error is not None:
            names = ", ".join(outcome.name for outcome in outcomes)
            yield f"{names}: {_who(backend, outcomes[0].error)}" if backend else names, outcomes[0].error


def _who(backend: str, error: BridgeError) -> str:
    """Return the CA, such as `corp (vault)`, without the type if the error begins with it."""
    name, _, kind = backend.rpartition(" (")
    return name if name and error.reason.startswith(f"{kind.removesuffix(')')}: ") else backend


def about(outcome: Outcome) -> dict[str, Any]:
    """Return the keys that each outcome has in JSON."""
    return {"name": outcome.name, "authority": outcome.authority, "backend": outcome.backend}


def certificates_json(outcome: Outcome) -> dict[str, Any]:
    """Return the keys about the installed certificate, and the one that it replaced."""
    new, old = outcome.new, outcome.old
    return {
        "notAfter": new.not_valid_after_utc if new is not None else None,
        "serialNumber": serial_hex(new) if new is not None else None,
        "previousSerialNumber": serial_hex(old) if old is not None else None,
    }


def failed_json(failed: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return the certificates that failed, each with its error."""
    errors = [(outcome, outcome.error) for outcome in failed if outcome.error is not None]
    return [{**about(outcome), "exitCode": e.exit_code, "error": e.reason, "hint": hint_of(e)} for outcome, e in errors]


def errors_json(errors: Sequence[BridgeError]) -> list[dict[str, Any]]:
    """Return the errors with their hints."""
    return [{"exitCode": error.exit_code, "error": str(error), "hint": hint_of(error)} for error in errors]
