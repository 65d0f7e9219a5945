"""`fleet`: the nodes that the door of `serve` knows."""

from __future__ import annotations

from contextlib import closing
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bridge.cli.options import Common, command, utc_now
from bridge.cli.printing import say, say_json, say_table
from bridge.cli.serve import assert_installed
from bridge.errors import Exit
from bridge.pki.expiry import minute, rfc3339
from bridge.system.console import printable

if TYPE_CHECKING:
    from bridge.door.fleet import FleetNode

commands = typer.Typer()


class FleetOutput(StrEnum):
    """Formats of the list."""

    TEXT = "text"
    JSON = "json"
    PROMETHEUS = "prometheus"


@command(commands, "fleet")
def fleet(
    common: Common,
    output: Annotated[FleetOutput, typer.Option("--output", "-o", help="Format of the list.")] = FleetOutput.TEXT,
) -> int:
    """
    List the nodes that have asked this door, the worst first: what ends next, what failed, who was not heard of.

    It runs at the door's host, and reads the database alone. A node that should have asked for long, by renewal.before of
    these settings, is silent. Exits with 3 if a node is expired, silent or failed.
    """
    assert_installed("ca-bridge fleet")
    from bridge.door import fleet as rules  # noqa: PLC0415 (heavy, and an extra's packages)
    from bridge.door.store import open_memory  # noqa: PLC0415 (as above)

    settings = common.settings_with_record()
    with closing(open_memory(settings)) as memory:
        nodes = rules.fleet(memory, settings.renewal.before, utc_now())
    if output is FleetOutput.JSON:
        say_json(nodes=[_json(one) for one in nodes])
    elif output is FleetOutput.PROMETHEUS:
        say(rules.metrics(nodes))
    elif nodes:
        styles = ["error" if one.state in rules.RED else "" for one in nodes]
        say_table([_row(one) for one in nodes], (4, 3), styles)
    else:
        say("no nodes: none has asked this door yet")
    return Exit.DUE if any(one.state in rules.RED for one in nodes) else Exit.DONE


def _row(one: FleetNode) -> tuple[str, ...]:
    ends = f"{one.name} ends {minute(one.ends)}" if one.ends is not None else "no certificate"
    heard = f"asked {minute(one.heard)}" if one.heard is not None else "never asked"
    return tuple(map(printable, (one.state, one.node, ends, one.cluster, heard, one.why)))


def _json(one: FleetNode) -> dict[str, Any]:
    return {
        "node": one.node,
        "cluster": one.cluster,
        "state": one.state,
        "ends": rfc3339(one.ends) if one.ends is not None else None,
        "certificate": one.name,
        "heard": rfc3339(one.heard) if one.heard is not None else None,
        "why": one.why,
    }
