"""
Tickets for what a CA answers later, by the object's uid; they survive the gateway's restarts.

Another replica has a state directory of its own; it asks the CA once more with the same id, and a CA that has the
request does not take it twice (`bridge.contract.Collects`).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from bridge.state.store import Store
from bridge.system.state_file import OnDamage, StateFile

_KEY = "ticketsV1"
#: Each is a person's work.
MOST_TICKETS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """A request that a CA has."""

    uid: str
    object_name: str
    signer: str
    csr_sha256: str
    reference: str  #: The backend's.
    validity_seconds: int
    asked: str  #: ISO 8601.

    @property
    def asked_at(self) -> datetime:
        """When the CA was asked."""
        return datetime.fromisoformat(self.asked)


class Tickets:
    """The file, from any thread; the state directory's lock is held."""

    def __init__(self, store: Store) -> None:
        """
        Raises:
            StateError: The file is there and can't be read.
        """
        self._file = StateFile(
            path=store.tickets,
            what="the requests that the gateway's CA answers later",
            parse=_parse,
            keys=frozenset({_KEY}),
            # a CA that has a request is asked once more, and does not take it twice
            on_damage=OnDamage.START_OVER,
        )
        self._mutex = threading.Lock()
        self._tickets = dict(self._file.read() or {})

    def get(self, uid: str) -> Ticket | None:
        """The ticket of an object, by its uid."""
        with self._mutex:
            return self._tickets.get(uid)

    def all(self) -> list[Ticket]:
        """All tickets."""
        with self._mutex:
            return list(self._tickets.values())

    def put(self, ticket: Ticket) -> None:
        """
        One more, or another one; safe on disk when this returns.

        Raises:
            StateError: It could not be written.
        """
        with self._mutex:
            self._write({**self._tickets, ticket.uid: ticket})

    def drop(self, uid: str) -> Ticket | None:
        """
        Forget one.

        Raises:
            StateError: It could not be written.
        """
        with self._mutex:
            found = self._tickets.get(uid)
            if found is not None:
                self._write({key: value for key, value in self._tickets.items() if key != uid})
            return found

    def _write(self, tickets: dict[str, Ticket]) -> None:
        self._file.replace({_KEY: [asdict(one) for one in tickets.values()]})
        self._tickets = tickets


def _parse(document: Mapping[str, Any]) -> dict[str, Ticket]:
    found = [Ticket(**one) for one in document[_KEY]]
    for one in found:
        _ = one.asked_at, one.reference.encode(), int(one.validity_seconds)
    return {one.uid: one for one in found}
