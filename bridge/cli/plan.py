"""`plan`: what the next `renew` would do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import typer

from bridge.cli.options import (
    ChangeOptions,
    Common,
    Names,
    Output,
    OutputOption,
    command,
    utc_now,
)
from bridge.cli.printing import end_text, say, say_json, say_table
from bridge.cli.results import grouped, print_restart
from bridge.control_plane import restart_plan
from bridge.diagnosis import use
from bridge.diagnosis.findings import Finding
from bridge.errors import Exit
from bridge.node import inventory
from bridge.node.inventory import Item, Node
from bridge.pki.expiry import duration_text, first_end, minute, rfc3339
from bridge.renewal.changes import decide
from bridge.renewal.issuance import shortened
from bridge.renewal.select import RunOptions, Selection, nothing_due, select
from bridge.settings.tables import Settings
from bridge.specs import Component
from bridge.state import copies
from bridge.state.copies import Copy
from bridge.system.console import log, print_error

commands = typer.Typer()


@command(commands, "plan")
def plan_command(
    common: Common,
    names: Names = None,
    *,
    options: ChangeOptions,
    output: OutputOption = Output.TEXT,
) -> int:
    """
    Show what `renew` would ask, replace and restart.

    It asks no CA and writes nothing; the cluster's API is asked only about a named certificate that is missing, and for
    --adopt-defaults. Exits with 3 if there is something to do.
    """
    return plan(common.settings(), options.read(names), utc_now(), output)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    selection: Selection
    drifted: Sequence[Finding]
    shorter: Sequence[str]  #: Names whose next certificate would end before the live one.
    components: Sequence[Component]  #: To be restarted.
    copies: Sequence[Copy]  #: To be refreshed, or with an error.

    @classmethod
    def of(cls, node: Node, settings: Settings, options: RunOptions, now: datetime) -> _Plan:
        selection = select(node, settings, options, now, desired=decide(node, settings, options))
        specs = [item.spec for item in selection.items]
        replaced = {spec.name for spec in specs}
        reloading = restart_plan.reloading(node, settings.node)
        return cls(
            selection=selection,
            drifted=list(use.of_files(node, settings)),
            shorter=[item.spec.name for item in selection.items if shortened(item, settings, now)],
            components=restart_plan.stale(specs, reloading, settings.restart.components),
            copies=[one for one in copies.look(settings, node) if one.error is not None or replaced & set(one.names)],
        )


def plan(settings: Settings, options: RunOptions, now: datetime, output: Output) -> int:
    """Print what `renew` would do; 3 if that is anything."""
    node = inventory.of(settings.node)
    found = _Plan.of(node, settings, options, now)
    _warn(found, settings, now)
    if output is Output.JSON:
        say_json(**_plan_json(found, settings))
    elif found.selection.items:
        styles = [_style(item, now) for item in found.selection.items]
        say_table([_plan_row(item, settings, now) for item in found.selection.items], (3,), styles)
        say_table(
            [(f"copy of {', '.join(one.names)}", f"refresh {one.path}") for one in found.copies if one.error is None]
        )
        print_restart("After that, these must be restarted to use the new ones", found.components, settings)
    elif not found.selection.failed:
        say(nothing_due(node, settings, now))
    for sentence in found.selection.powerful:
        log.info("%s", sentence)
    for name, error in grouped(found.selection.failed):
        print_error(error, name)
    for copy in found.copies:
        if copy.error is not None:
            log.warning("%s", copy.error)
    failed = Exit.worst([outcome.exit_code for outcome in found.selection.failed])
    return failed or (Exit.DUE if found.selection.items else Exit.DONE)


def _warn(found: _Plan, settings: Settings, now: datetime) -> None:
    for sentence in found.selection.notes:
        log.warning("%s", sentence)
    for one in found.drifted:
        log.warning("%s: %s", one.about, one.text)
        log.warning("%s", one.hint, extra={"is_hint": True})
    if found.shorter:
        log.warning("%s", _shorter_text(found.shorter, settings, now))


def _shorter_text(names: Sequence[str], settings: Settings, now: datetime) -> str:
    """A sentence about answers that would end before the live certificates do."""
    validity, shorter = settings.renewal.validity, settings.renewal.shorter
    becomes = "is taken" if shorter == "allow" else 'is refused; set shorter = "allow" in [renewal] if it is meant'
    return (
        f"{', '.join(names)}: renewal.validity = {duration_text(validity)} ends {minute(now + validity)}, "
        f"before the live certificate does: such an answer {becomes}"
    )


def _plan_row(item: Item, settings: Settings, now: datetime) -> tuple[str, ...]:
    verb = "replace" if item.certificates else "make"
    return (
        item.spec.name,
        end_text(first_end(item.ending), now) if item.certificates else "not on this node",
        f"ask {_asked(item, settings)}",
        f"{verb} {_replaced(item)}",
    )


def _style(item: Item, now: datetime) -> str:
    return "warning" if item.certificates and first_end(item.ending) > now else "error"


def _replaced(item: Item) -> str:
    if item.current is not None:
        more = f" and {item.certificate_path}" if item.embedded else ""
        return f"{item.current} by a new file{more}"
    return " and ".join([str(item.certificate_path), *([item.key_path.name] if item.key_path else [])])


def _asked(item: Item, settings: Settings) -> str:
    ours = settings.authorities.get(item.spec.authority.name)
    return ours.backend if ours is not None else f"nobody: no [authority.{item.spec.authority.name}]"


def _files(item: Item) -> list[Path]:
    paths = [item.key_path, item.certificate_path, item.current]
    return list(dict.fromkeys(path for path in paths if path is not None))


def _plan_json(found: _Plan, settings: Settings) -> dict[str, Any]:
    selection = found.selection
    return {
        "renew": [
            {
                "name": item.spec.name,
                "authority": item.spec.authority.name,
                "backend": ours.backend if (ours := settings.authorities.get(item.spec.authority.name)) else None,
                "notAfter": rfc3339(first_end(item.certificates[:1] + item.copy)) if item.certificates else None,
                "replace": [str(path) for path in _files(item)],
                "changes": one.notes if (one := selection.desired.get(item.spec.name)) is not None else [],
            }
            for item in selection.items
        ],
        "shorter": found.shorter,
        "failed": [{"name": o.name, "error": str(o.error)} for o in selection.failed],
        "skipped": selection.skipped,
        "restart": found.components,
        "copies": [
            {"path": str(one.path), "of": one.names, "error": one.error and str(one.error)} for one in found.copies
        ],
        "drift": [
            {"check": one.check, "about": one.about, "text": one.text, "hint": one.hint} for one in found.drifted
        ],
    }
