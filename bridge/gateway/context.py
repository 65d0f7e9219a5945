"""The place that every step works at: the settings, the API server, the CAs, the record, the queue."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from bridge.cluster.api import Api
from bridge.desk.signer_rules import spec_of
from bridge.errors import BackendError, VerificationError
from bridge.gateway.authorities import AuthorityOfSigners
from bridge.gateway.known_nodes import Known
from bridge.gateway.ledger import About, Ledger
from bridge.gateway.metrics import Metrics
from bridge.gateway.objects import SigningRequest
from bridge.gateway.outcomes import LeftError
from bridge.gateway.pending_at_ca import Tickets
from bridge.gateway.queue import Queue
from bridge.settings.tables import Settings
from bridge.state.audit import AuditError
from bridge.system.state_file import StateError

log = logging.getLogger("ca-bridge")


class Holder(Protocol):
    """Says whether this replica works."""

    def is_ours(self) -> bool:
        """Whether the lease is ours at this moment."""
        ...

    def doubtful_before(self) -> datetime | None:
        """Objects older than this may have been asked for by one who died; None: whoever worked before us has ended well."""
        ...


@dataclass(eq=False, kw_only=True)
class Place:
    """May be used by several threads."""

    settings: Settings
    api: Api
    known: Known
    authorities: dict[str, AuthorityOfSigners]
    ledger: Ledger
    tickets: Tickets
    metrics: Metrics
    holder: Holder
    now: Callable[[], datetime]
    queue: Queue = field(default_factory=Queue)

    def __post_init__(self) -> None:
        self._identities = {name: one.identity() for name, one in self.authorities.items()}

    def assert_ours(self) -> None:
        """
        Raises:
            LeftError: Another replica works.
        """
        if not self.holder.is_ours():
            raise LeftError("left", "another replica works", 0.5)

    def about(self, one: SigningRequest, authority: AuthorityOfSigners | None = None) -> About:
        """The facts that the audit log's lines about a request repeat."""
        spec = spec_of(one.request.signer)
        if spec is None:
            raise AssertionError("only signers that have a spec are looked at")
        if authority is None:
            return About.of(one, spec)
        return About.of(one, spec, authority.label, self._identities[authority.name])

    def record_quietly(self, about: About, event: str, error: BackendError | VerificationError) -> None:
        """Record what has happened already; if that fails, it is said, and `/readyz` fails."""
        try:
            self.ledger.write(about.line(event, error=error))
        except AuditError as e:
            log.error("%s; the audit log lacks: %s", e, event, extra={"request": about.more["request"]})  # noqa: TRY400

    def drop_ticket(self, uid: str) -> None:
        """Forget a ticket: it has been answered, or never will be."""
        try:
            self.tickets.drop(uid)
        except StateError as e:
            log.error("%s", e, extra={"request": uid})  # noqa: TRY400

    def give_up(self, uid: str, why: str) -> None:
        """A ticket that nobody waits for any more."""
        if self.tickets.get(uid) is not None:
            self.drop_ticket(uid)
            log.info("the request at the CA is given up: %s", why, extra={"request": uid})
