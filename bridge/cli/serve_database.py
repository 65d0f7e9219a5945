"""`serve-database`: the upkeep of the door's database."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bridge.cli.options import Common, command, group, utc_now
from bridge.cli.printing import say, say_sentence, say_table
from bridge.cli.serve import assert_installed

commands = typer.Typer()
database = group(commands, "serve-database", "Back up and restore the door's database.")


@command(database, "status")
def status(common: Common) -> None:
    """Count the door's requests by their state, and list those that were left to people."""
    assert_installed("ca-bridge serve-database")
    from bridge.door import upkeep  # noqa: PLC0415 (heavy, and an extra's packages)

    with upkeep.opened(common.settings()) as (memory, _):
        say_table([("STATE", "REQUESTS"), *((state, str(count)) for state, count in sorted(memory.counts().items()))])
        for one in memory.in_state("left"):
            say(f"{one.digest[:16]} of {one.node}: {one.note}")


@command(database, "backup")
def backup(common: Common, to: Annotated[Path, typer.Argument(help="The copy, a file that is replaced.")]) -> None:
    """Copy SQLite's file while the door works; `pg_dump` copies PostgreSQL's."""
    assert_installed("ca-bridge serve-database")
    from bridge.door import upkeep  # noqa: PLC0415 (heavy, and an extra's packages)

    upkeep.back_up(common.settings(), to.absolute())
    say(f"the door's database is in {to} now")


@command(database, "restore")
def restore(common: Common, copy: Annotated[Path, typer.Argument(help="A copy that `backup` has made.")]) -> None:
    """
    Put a copy in the place of SQLite's file, while no door works.

    From then on CAs are asked what they have signed before an older request is signed.
    """
    assert_installed("ca-bridge serve-database")
    from bridge.door import upkeep  # noqa: PLC0415 (heavy, and an extra's packages)

    old, withdrawn = upkeep.restore(common.settings(), copy.absolute(), utc_now)
    say_sentence(f"the copy is in its place; what was there before is in {old}")
    _say_withdrawn(withdrawn)


@command(database, "restored")
def restored(common: Common) -> None:
    """
    Say that the database was restored by other means, such as `pg_restore`; run it on the host of each door.

    From then on CAs are asked what they have signed before an older request is signed.
    """
    assert_installed("ca-bridge serve-database")
    from bridge.door import upkeep  # noqa: PLC0415 (heavy, and an extra's packages)

    withdrawn = upkeep.reconcile(common.settings(), utc_now)
    say("written down: what was made until now is signed after its CA was asked")
    _say_withdrawn(withdrawn)


@command(database, "again")
def again(common: Common, request: Annotated[str, typer.Argument(help="The first digits of its digest.")]) -> None:
    """Have a request signed that was left to people, once you know that its CA has not signed it."""
    assert_installed("ca-bridge serve-database")
    from bridge.door import upkeep  # noqa: PLC0415 (heavy, and an extra's packages)

    upkeep.again(common.settings(), request)
    say(f"request {request} is signed in the next round")


def _say_withdrawn(count: int) -> None:
    if count:
        text = f"one-time secrets withdrawn, since they may have been used after the copy was made: {count}"
        say_sentence(f"{text}; `ca-bridge enroll NODE` makes new ones")
