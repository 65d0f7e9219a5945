"""
The nodes in this door's database: which certificate expires next, what failed, and which nodes are silent. Requests
count if something proves that they are of their node; anyone with one good certificate could make up names.

A node sends requests only when its certificates are due. It is silent if half of a certificate's renewal time is over,
and no request has come since that time began.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal, get_args

import sqlalchemy as sa

from bridge.door.store import CERTIFICATES, ENROLMENTS, REQUESTS, DoorDatabase
from bridge.pki.expiry import Before, day
from bridge.specs import KUBELET_CONF, KUBELET_SERVER, SUPER_ADMIN, USER
from bridge.system.codec import named
from bridge.system.metrics import labels, metric
from bridge.words import one_line

#: Node states, the worst first.
NodeState = Literal["expired", "silent", "failed", "waits", "new", "ok"]
STATES: tuple[NodeState, ...] = get_args(NodeState)
#: An operator has to look at these nodes.
RED: tuple[NodeState, ...] = ("expired", "silent", "failed")
PREFIX = "ca_bridge_fleet"
#: Certificates that nodes do not renew: users', and super-admin.conf, which is valid for hours.
_NOT_A_NODES = (USER.name, SUPER_ADMIN)
#: Certificates that a kubelet usually rotates itself, once it has them.
_KUBELETS = (KUBELET_CONF, KUBELET_SERVER)
#: A run's certificates begin within this time, even if it waits for people.
_ONE_RUN = timedelta(days=7)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetNode:
    """One node of one cluster."""

    node: str
    cluster: str
    state: NodeState
    ends: datetime | None  #: End of the certificate that expires next; None: none was signed.
    name: str = field(metadata=named("certificate"))  #: The name of that certificate.
    heard: datetime | None  #: Time of its last request; None: it has sent none.
    why: str  #: What failed, or what the node waits for.


def fleet(memory: DoorDatabase, before: Before, now: datetime) -> list[FleetNode]:
    """Return all nodes, the worst first, then by the next expiry; `before` is the nodes' `renewal.before`."""
    covered, last = _covered(memory), _last(memory)
    places = dict.fromkeys((*covered, *last, *_enrolled(memory, now)))
    found = [_node(place, covered.get(place, ()), last.get(place), before, now) for place in places]
    return sorted(found, key=lambda node: (STATES.index(node.state), node.ends or now, node.cluster, node.node))


_Place = tuple[str, str]  # node, cluster
_Covered = tuple[str, datetime, datetime]  # name, begin and end of the newest certificate
_Last = tuple[datetime, str, str]  # received, state, note


def _node(
    place: _Place,
    covered: Sequence[_Covered],
    last: _Last | None,
    before: Before,
    now: datetime,
) -> FleetNode:
    heard = last[0] if last is not None else None
    counted = [certificate for certificate in covered if not _is_superseded(certificate, covered)]
    name, begins, ends = min(counted, key=lambda row: row[2], default=("", now, None))
    state, why = _state(last)
    if ends is not None:
        due = ends - min(before.of(ends - begins), (ends - begins) / 3)
        if ends <= now:
            state = "expired"
        elif now > due + (ends - due) / 2 and (heard is None or heard < due):
            state, why = "silent", f"should have asked since {day(due)}"
    return FleetNode(node=place[0], cluster=place[1], state=state, ends=ends, name=name, heard=heard, why=why)


def _is_superseded(certificate: _Covered, covered: Sequence[_Covered]) -> bool:
    """Return whether a kubelet has rotated it: others of its node, valid as long, were renewed here without it."""
    name, begins, ends = certificate
    return name in _KUBELETS and any(
        other_begins - begins > _ONE_RUN and other_ends - other_begins >= ends - begins
        for _, other_begins, other_ends in covered
    )


def _state(last: _Last | None) -> tuple[NodeState, str]:
    """Return a node's state by its last request alone, and why."""
    if last is None:
        return "new", "has a one-time secret, and has not asked"
    _, state, note = last
    if state == "answered":
        return ("failed", note) if note else ("ok", "")
    return "waits", note or ("people decide" if state == "undecided" else "waits for its turn")


def _covered(memory: DoorDatabase) -> dict[_Place, list[_Covered]]:
    ours = CERTIFICATES.c
    whose = (ours.node, ours.cluster, ours.name)
    named = REQUESTS, sa.and_(REQUESTS.c.id == ours.request, REQUESTS.c.named)
    begun = sa.select(*whose, sa.func.max(ours.begins).label("begins")).join(*named).group_by(*whose).subquery()
    newest = sa.and_(*(column == begun.c[column.name] for column in (*whose, ours.begins)))
    query = (
        sa.select(*whose, ours.begins, ours.ends).where(ours.name.not_in(_NOT_A_NODES)).join(begun, newest).join(*named)
    )
    found: dict[_Place, list[_Covered]] = {}
    for row in memory.select(query):
        found.setdefault((row["node"], row["cluster"]), []).append((row["name"], row["begins"], row["ends"]))
    return found


def _last(memory: DoorDatabase) -> dict[_Place, _Last]:
    ours = REQUESTS.c
    latest = sa.select(ours.node, ours.cluster, sa.func.max(ours.received).label("at")).where(ours.named)
    newest = latest.group_by(ours.node, ours.cluster).subquery()
    same = (ours.node == newest.c.node, ours.cluster == newest.c.cluster, ours.received == newest.c.at)
    query = sa.select(ours.node, ours.cluster, ours.received, ours.state, ours.note)
    query = query.join(newest, sa.and_(*same)).where(ours.named)
    return {
        (row["node"], row["cluster"]): (row["received"], row["state"], one_line(row["note"]))
        for row in memory.select(query)
    }


def _enrolled(memory: DoorDatabase, now: datetime) -> list[_Place]:
    ours = ENROLMENTS.c
    query = sa.select(ours.node, ours.cluster).where(ours.withdrawn.is_(None), ours.ends > now).distinct()
    return [(row["node"], row["cluster"]) for row in memory.select(query)]


def unnamed(memory: DoorDatabase) -> int:
    """Return the number of requests of which nothing proves the node; they are in no node's row."""
    [row] = memory.select(sa.select(sa.func.count().label("count")).where(~REQUESTS.c.named))
    return int(row["count"])


def metrics(nodes: Sequence[FleetNode], unnamed: int) -> str:
    """Return Prometheus metrics: the nodes in each state, and each node's next expiry and last request."""
    counts = {state: sum(node.state == state for node in nodes) for state in STATES}
    by_state = ((labels(state=state), count) for state, count in counts.items())

    def moments(name: str, text: str, times: Iterable[datetime | None]) -> str:
        known = ((node, time) for node, time in zip(nodes, times, strict=True) if time is not None)
        samples = ((labels(cluster=node.cluster, node=node.node), f"{time.timestamp():.0f}") for node, time in known)
        return metric(f"{PREFIX}_node_{name}_timestamp_seconds", text, samples)

    states = metric(f"{PREFIX}_nodes", "Nodes by state; expired, silent and failed ones need a person.", by_state)
    ends = moments("next_end", "End of the certificate that ends next.", (node.ends for node in nodes))
    text = "Requests of which nothing proves the node, which are in no other of these metrics."
    left_out = metric(f"{PREFIX}_unnamed_requests", text, [("", unnamed)])
    return (
        states + ends + moments("last_request", "The node's last request.", (node.heard for node in nodes)) + left_out
    )
