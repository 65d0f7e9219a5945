"""
Whether a Node object is there, asked of the API server: one by one, or in a burst with one list of names for many.

For a burst of nodes that join that is the difference between one request and hundreds; it needs the right to `list`,
and without it each is asked for, as before.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from bridge.cluster.api import Api
from bridge.cluster.errors import NoAnswerError
from bridge.gateway import objects
from bridge.gateway.signer_policy import NodeState
from bridge.system.combining import Combined

#: A Node object that was looked at so long ago is as good as one of now.
_SECONDS = 1.0
_MOST_NODES = 5_000
_MOST_TOGETHER = 256
_NODES = "/api/v1/nodes"
#: Names without what else is in the objects: a Node has dozens of images in it.
_NAMES_ALONE = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
_MOST_LISTED = 1_000
#: One request costs the API server as much as so many names in a list.
_NAMES_A_REQUEST = 20
_NO_LIST_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class _Wanted:
    name: str
    with_readiness: bool


class NodeStates:
    """May be used by any thread."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._mutex = threading.Lock()
        self._known: dict[str, tuple[NodeState, float]] = {}
        self._together: Combined[_Wanted, NodeState | NoAnswerError] = Combined(self._looked_at, _MOST_TOGETHER)
        self._count = 0  # that the latest list had
        self._lists_from = 0.0

    def state(self, name: str, *, newer: bool, with_readiness: bool) -> NodeState:
        """
        The node's state as it is now, or was a second ago.

        Args:
            name: The node's.
            newer: That it was not there a second ago does not count.
            with_readiness: It counts whether it is ready; else it may be said to be so.

        Raises:
            NoAnswerError: It can't be looked at.
        """
        now = time.monotonic()
        with self._mutex:
            known = self._known.get(name)
        if known is not None and now - known[1] < _SECONDS and (known[0].exists or not newer):
            return known[0]
        found = self._together(_Wanted(name, with_readiness))
        if isinstance(found, NoAnswerError):
            raise found
        with self._mutex:
            if len(self._known) >= _MOST_NODES:
                self._known.clear()
            self._known[name] = (found, now)
        return found

    def _looked_at(self, wanted: Sequence[_Wanted]) -> list[NodeState | NoAnswerError]:
        there = self._listed(len(wanted))
        found: list[NodeState | NoAnswerError] = []
        for one in wanted:
            if there is not None and not (one.with_readiness and one.name in there):
                found.append(NodeState(exists=one.name in there, ready=one.name in there))
                continue
            try:
                found.append(self._asked(one.name))
            except NoAnswerError as e:
                found.append(e)
        return found

    def _asked(self, name: str) -> NodeState:
        reply = self._api.ask("GET", f"{_NODES}/{quote(name, safe='')}")
        if reply.status == HTTPStatus.OK:
            return NodeState(exists=True, ready=objects.is_ready(reply.document))
        if reply.status == HTTPStatus.NOT_FOUND:
            return NodeState(exists=False)
        raise NoAnswerError(f"wanted to look at node {name}, found HTTP {reply.status} {reply.message}")

    def _listed(self, wanted: int) -> frozenset[str] | None:
        """The names of all nodes; None: to ask for each is less work, or there is no list."""
        if wanted * _NAMES_A_REQUEST < max(self._count, 3 * _NAMES_A_REQUEST) or time.monotonic() < self._lists_from:
            return None
        try:
            reply = self._api.ask("GET", f"{_NODES}?limit={_MOST_LISTED}", accept=_NAMES_ALONE)
            names = _names(reply.document) if reply.status == HTTPStatus.OK else None
        except NoAnswerError:
            names = None  # who asks for each finds out why
        if names is None:  # no right to, or too many
            self._lists_from = time.monotonic() + _NO_LIST_SECONDS
            return None
        self._count = len(names)
        return names


def _names(document: Mapping[str, Any]) -> frozenset[str] | None:
    """The names in a whole list of objects; None: it is none."""
    try:
        if document["kind"] != "PartialObjectMetadataList" or document["metadata"].get("continue"):
            return None
        return frozenset(str(item["metadata"]["name"]) for item in document["items"] or ())
    except (KeyError, TypeError, AttributeError):
        return None
