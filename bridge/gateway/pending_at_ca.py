"""
Tickets for what a CA answers later, by the object's uid; they survive the gateway's restarts.

Another replica has a state directory of its own; it asks the CA once more with the same id, and a CA that has the
request does not take it twice (`bridge.contract.Collects`).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from bridge.state.open_requests import Kind, RequestLog
from bridge.state.store import Store

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
    asked: datetime


class Tickets(RequestLog[Ticket]):
    """All tickets; the state directory's lock is held."""

    def __init__(self, store: Store) -> None:
        super().__init__(store.tickets, _GATEWAY)


_GATEWAY = Kind(
    name="gateway",
    type=Ticket,
    key_of=lambda one: one.uid,
    what="the requests that the gateway's CA answers later",
    old_key="ticketsV1",
)
