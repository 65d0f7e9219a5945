"""
Which door signs a request, and what it must find out before (pure), and which door this is.

Any door takes a request; the one that begins it writes itself down as its signer, since its state directory has the
journal and the archive that prove what was signed. Another door takes the request over when the signer was not heard
of for a while. It asks the CA what it has signed, and only then has it sign; for a CA that can't tell, people decide.
The same goes for requests that were made before the database was restored: it may have forgotten who began them.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta

from bridge.contract import Issued, Pending, SignRequest
from bridge.desk.records import Journal, Submitted
from bridge.door.store import Kept
from bridge.errors import BridgeError, Exit
from bridge.pki.bundle import BundledRequest, RequestBundle, sign_request
from bridge.state.store import Store
from bridge.system.state_file import OnDamage, StateFile

#: A door that was not heard of for this time has ended; by the database's clock.
SILENT = timedelta(seconds=60)
#: A door that could not say for this time that it lives asks no CA: less than `SILENT` by what an exchange takes.
STALE_SECONDS = 30.0
#: How far a node's clock may be behind ours.
_SLACK = timedelta(minutes=5)
_NODE_SLACK = timedelta(hours=1)


class NotOursError(BridgeError):
    """The door is ending, or the database did not hear of it for too long: another one may be signing in its place."""

    exit_code = Exit.UNAVAILABLE
    hint = "the database is slow or away; requests wait, and go on by themselves"


class BehindError(BridgeError):
    """The database knows of less than this door's audit log: an older copy of it was restored, or another one is used."""

    exit_code = Exit.REFUSED
    hint = (
        "name the right database, or run `ca-bridge serve-database restored` on each host of a door: "
        "then CAs are asked what they have signed before anything older is signed"
    )


def is_foreign(one: Kept, created: datetime, door: str, restored: datetime | None) -> bool:
    """Whether a CA may have signed a request for a door whose journal is not ours, or that the database has forgotten."""
    if one.signer == "":  # people have looked
        return False
    if one.signer not in {None, door}:
        return True
    is_older = restored is not None and created < restored + _NODE_SLACK
    return is_older and (one.begun is None or restored is None or one.begun < restored)


def left_text(one: Kept, doors: Mapping[str, str]) -> str:
    """Why people have to decide about a request that another door began, whose CA can't tell what it has signed."""
    where = doors.get(one.signer or "", "a door that the database has forgotten")
    return (
        f"a CA may have signed it for {where}, and can't tell: start that door again, or look for the certificate at "
        f"the CA, then `ca-bridge serve-database again {one.digest[:16]}` has it signed"
    )


def unknown(requests: Iterable[BundledRequest], bundle: RequestBundle, journal: Journal) -> list[SignRequest]:
    """Those of these requests of a bundle to which the journal has no answer."""
    sign_requests = [sign_request(one, bundle) for one in requests]
    return [one for one in sign_requests if not isinstance(journal.get(one), Issued | Pending)]


def ask_first(requests: Iterable[SignRequest], created: datetime, journal: Journal) -> None:
    """Write down that CAs may have signed these requests, so that the desk asks them before it has anything signed."""
    journal.add((one, Submitted(created - _SLACK)) for one in requests)


def assert_not_behind(recorded: int, remembered: int) -> None:
    """Compare the newest round in the audit log with the database's (BehindError)."""
    if recorded > remembered:
        text = f"wanted a database that knows of round {recorded}, which is in the audit log, found one at {remembered}"
        raise BehindError(text)


def rounds(lines: Iterable[Mapping[str, object]]) -> Callable[[str], int]:
    """The newest round of a door in lines of the audit log."""
    found: dict[str, int] = {}
    for line in lines:
        door, number = line.get("door"), line.get("round")
        if isinstance(door, str) and isinstance(number, int):
            found[door] = max(number, found.get(door, 0))
    return lambda door: found.get(door, 0)


def identity(store: Store) -> str:
    """The name of the state directory among doors, which is made when it is first asked for."""
    store.prepare()
    file = StateFile(
        path=store.door,
        what="which door this is",
        parse=lambda document: str(document["id"]),
        keys=frozenset({"id"}),
        on_damage=OnDamage.REFUSE,
        by_command=False,
        afterwards="then the door counts as a new one",
    )
    found = file.read()
    if found is None:
        found = secrets.token_hex(8)
        file.replace({"id": found})
    return found
