"""Looking at further pairs from outside: whether the server that the settings name shows the pair that is on disk."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from bridge.control_plane.probes import Check, Serving
from bridge.node.endpoints import Address
from bridge.node.inventory import Item, Node


def of(node: Node, now: datetime) -> Iterator[Check]:
    """A check of each pair that is on disk and whose server can be asked."""
    for item in node.items:
        if item.state == "present" and (check := of_one(item, now)) is not None:
            yield check


def of_one(item: Item, now: datetime) -> Check | None:
    """The check of one pair; None: the settings name no server for it."""
    pair = item.pair
    if pair is None or pair.place is None:
        return None
    serving = Serving(
        component=item.spec.component,
        certificate=pair.name,
        file=item.certificate_path,
        key_file=item.key_path or item.certificate_path,
        trust_file=item.anchor_path,
        name=pair.shown_name,
        asks_for=pair.shown_name,
        mutual="client" in pair.usages,
    )
    return serving.at(Address(*pair.place), now)
