"""
etcd by its JSON gateway: who its members are, which alarms there are, and whether a member is well.

https://etcd.io/docs/v3.6/dev-guide/api_grpc_gateway/ and https://etcd.io/docs/v3.6/op-guide/monitoring/
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from bridge.cluster.client import NOBODY, Client, document, items
from bridge.node.endpoints import Server, is_url
from bridge.node.inventory import Node
from bridge.system import http
from bridge.system.paths import UnreadableError

#: Each is signed by etcd's CA and good for a client; the first is there for this.
_CLIENTS = ("etcd-healthcheck-client", "apiserver-etcd-client", "etcd-server")

# Not by the alarm request, which is a proposal to the whole cluster; a member tells those that it knows of.
_ALARM = re.compile(r"memberID:(\d+)\s+alarm:(\w+)")
_WITHOUT_ALARMS = "?exclude=NOSPACE&exclude=CORRUPT"


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One member, as the cluster's list has it."""

    id: str
    name: str  #: Empty: it has not started yet.
    client_urls: tuple[str, ...]
    peer_urls: tuple[str, ...]
    learner: bool  #: Has no vote.


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A member's own id, and the alarms that it knows of."""

    id: str  #: Empty: it does not tell.
    alarms: tuple[tuple[str, str], ...]  #: A member's id, and which alarm.


class Etcd:
    """A client of etcd, with each certificate that it may accept."""

    def __init__(self, clients: Sequence[Client], troubles: Sequence[str] = ()) -> None:
        """Take clients in the order in which they are tried, and the reasons why there are no more."""
        self._clients, self._troubles = tuple(clients), tuple(troubles)

    @classmethod
    def of(cls, node: Node, *, trusting: bool = False) -> Etcd:
        """
        A client of the node's etcd, with those of its client certificates that can be read.

        With `trusting` any server is believed, such as an etcd whose own certificate has expired.
        """
        clients, troubles = [], []
        for item in node.items:
            if item.spec.name in _CLIENTS and item.key_path is not None:
                trust = None if trusting else item.anchor_path
                try:
                    clients.append((item.spec.name, Client.of(item.certificate_path, item.key_path, trust)))
                except (UnreadableError, ValueError) as e:
                    troubles.append(f"{item.spec.name}: {e}")
        clients.sort(key=lambda one: _CLIENTS.index(one[0]))
        return cls([client for _, client in clients], troubles)

    def ask(self, server: Server, path: str, body: bytes | None = None) -> http.Answer:
        """Ask as the first of our clients that it accepts; without TLS as nobody in particular."""
        request: dict[str, Any] = {"method": "GET" if body is None else "POST", "body": body}
        if not server.url.startswith("https:"):
            return NOBODY.ask(server, path, **request)
        refused = "; ".join(self._troubles) or "no certificate for etcd"
        for client in self._clients:
            try:
                return client.ask(server, path, **request)
            except http.ClientRefusedError as e:
                refused = f"{client.name}: {e}"
        raise http.ClientRefusedError(refused)

    def members(self, server: Server) -> list[Member]:
        """The members that this one knows."""
        return [_member(one) for one in items(self._call(server, "/v3/cluster/member/list"), "members")]

    def status(self, server: Server) -> Status:
        """A member's own id, and the alarms that it knows of."""
        found = self._call(server, "/v3/maintenance/status")
        header = found.get("header")
        alarms = _ALARM.findall(" ".join(map(str, found.get("errors") or [])))
        return Status(id=str(header.get("member_id", "")) if isinstance(header, dict) else "", alarms=tuple(alarms))

    def trouble(self, server: Server, *, alarms: bool) -> str | None:
        """
        Why a member is not well, by its own word; None: it has a leader, and can read through the quorum.

        With `alarms` an alarm is trouble, too.
        """
        answer = self.ask(server, f"/health{'' if alarms else _WITHOUT_ALARMS}")
        try:
            body = document(answer.body)
        except http.HttpsError as e:
            return f"HTTP status {answer.status}" if answer.status != HTTPStatus.OK else str(e)
        if answer.status == HTTPStatus.OK and body.get("health") == "true":
            return None
        return str(body.get("reason") or "") or "not healthy"

    def _call(self, server: Server, path: str) -> dict[str, Any]:
        """The answer to a request without parameters."""
        answer = self.ask(server, path, b"{}")
        if answer.status != HTTPStatus.OK:
            raise http.UnreachableError(f"wanted an answer of {path}, found HTTP {answer.status}")
        return document(answer.body)


def _member(entry: Mapping[str, Any]) -> Member:
    urls = {key: tuple(filter(is_url, map(str, entry.get(key) or ()))) for key in ("clientURLs", "peerURLs")}
    return Member(
        id=str(entry.get("ID") or ""),
        name=str(entry.get("name") or ""),
        client_urls=urls["clientURLs"],
        peer_urls=urls["peerURLs"],
        learner=entry.get("isLearner") is True,
    )
