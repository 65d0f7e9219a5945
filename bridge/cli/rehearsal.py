"""`renew --rehearse`: what it prints."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from bridge.cli.printing import say, say_json, say_table
from bridge.cli.progress import progress_shown
from bridge.cli.results import grouped
from bridge.monitoring import metrics
from bridge.pki.certificates import name_text, serial_hex
from bridge.pki.expiry import minute, rfc3339
from bridge.renewal import rehearsal
from bridge.renewal.rehearsal import Rehearsal
from bridge.renewal.select import RunOptions
from bridge.settings.tables import Settings
from bridge.system.console import hint_of, log, print_error


def rehearse(settings: Settings, options: RunOptions, now: Callable[[], datetime], *, as_json: bool) -> int:
    """Rehearse, print the result, and return the exit code; monitors are told how it ended."""
    with metrics.written(settings, now, rehearsal=True) as told:
        with progress_shown() as progress:
            result = rehearsal.run(settings, options, now, progress)
        if as_json:
            say_json(_json(result))
        else:
            _print(result)
        for error in result.errors:
            print_error(error)
        for about, error in grouped(result.failed):
            print_error(error, about)
        told.exit_code = result.exit_code
    return told.exit_code


def _print(result: Rehearsal) -> None:
    say_table(
        [
            (
                one.outcome.name,
                f"until {minute(one.leaf.not_valid_after_utc)}",
                f"by {one.outcome.backend}",
                "revoked" if one.revoked else "not revoked",
            )
            for one in result.passed
        ]
    )
    for sentence in result.skipped:
        log.info("%s", sentence)
    if result.passed:
        say(f"{len(result.passed)} signed, proven and thrown away; nothing on this node was replaced")
    elif not result.failed:
        say("nothing to rehearse; nothing on this node was replaced")
    else:
        say("nothing on this node was replaced")


def _json(result: Rehearsal) -> dict[str, Any]:
    return {
        "exitCode": result.exit_code,
        "rehearsed": [
            {
                "name": one.outcome.name,
                "authority": one.outcome.authority,
                "backend": one.outcome.backend,
                "notAfter": rfc3339(one.leaf.not_valid_after_utc),
                "serialNumber": serial_hex(one.leaf),
                "issuer": name_text(one.leaf.issuer),
                "revoked": one.revoked,
            }
            for one in result.passed
        ],
        "failed": [
            {
                "name": o.name,
                "authority": o.authority,
                "backend": o.backend,
                "exitCode": o.exit_code,
                "error": o.error.reason if o.error is not None else "",
                "hint": hint_of(o.error) if o.error is not None else "",
            }
            for o in result.failed
        ],
        "skipped": list(result.skipped),
        "errors": [{"exitCode": e.exit_code, "error": str(e), "hint": hint_of(e)} for e in result.errors],
    }
