"""Looks at a component from outside: the certificate that it serves, whether it accepts its clients', and its health."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cryptography import x509

from bridge.cluster import ANONYMOUS, Client, below, document, items, mapping
from bridge.cluster.api import Api
from bridge.errors import BridgeError
from bridge.node import endpoints, kubelet, processes
from bridge.node.endpoints import Address, Server, is_url
from bridge.node.inventory import Node
from bridge.node.processes import file_contents
from bridge.pki.budget import of_server
from bridge.pki.certificates import load_pem_certificates, serial_hex
from bridge.specs import Component
from bridge.system import http, tls
from bridge.system.paths import UnreadableError
from bridge.system.tls import ClientRefusedError, HttpsError, UnreachableError, UntrustedError

#: next-connection: right, and in use from the component's next connection on. not-ours: nothing that we renew.
#: unknown: it could not be checked.
ProofState = Literal["current", "next-connection", "not-ours", "stale", "refused", "no-answer", "unknown"]

_MOST_WORDS = 300
_MOST_REASON = 200


class Verdict(NamedTuple):
    """The result of a check."""

    state: ProofState
    detail: str


class RefusedError(BridgeError):
    """A server or client rejects a certificate."""


class Check(NamedTuple):
    """A finding that has no result yet."""

    component: Component | None
    certificate: str
    what: str
    judge: Callable[[], Verdict]  #: May raise the errors that `run` handles.

    def run(self) -> Verdict:
        """Judge, and turn an error into a verdict."""
        try:
            return self.judge()
        except (RefusedError, UntrustedError, ClientRefusedError) as e:
            return Verdict("refused", str(e))
        except HttpsError as e:
            return Verdict("no-answer", str(e))
        except (BridgeError, UnreadableError, ValueError) as e:  # a file that exists and can't be used
            return Verdict("unknown", str(e))
        except OSError as e:
            return Verdict("unknown", f"{e.filename}: {e.strerror}")


def first(path: Path, data: bytes) -> x509.Certificate:
    """Return the first certificate of a file's content."""
    try:
        return load_pem_certificates(data)[0]
    except ValueError as e:
        raise ValueError(f"{path}: wanted a certificate, found {e}") from None


def _outside_dates(certificate: x509.Certificate, now: datetime) -> str:
    """Return why a certificate is not valid now; empty: it is."""
    if now > certificate.not_valid_after_utc:
        return f"expired at {processes.moment_text(certificate.not_valid_after_utc)}"
    if now < certificate.not_valid_before_utc:
        return f"not valid before {processes.moment_text(certificate.not_valid_before_utc)}"
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """A certificate that a component, or another program, shows at some addresses."""

    component: Component | None  #: None: another program.
    certificate: str
    file: Path
    key_file: Path
    trust_file: Path | None = None  #: The CAs that its clients trust; None: not known here.
    name: str | None = None  #: The name by which clients know the server; None: the address.
    asks_for: str | None = None  #: The name that the handshake asks for, by which some servers choose a certificate.
    mutual: bool = False  #: The server wants client certificates, and this certificate is also one.

    def at(self, place: Address, now: datetime) -> Check:
        """Return a check of the certificate that is shown at one address."""
        return Check(self.component, self.certificate, f"serves {place}", lambda: self._judge(place, now))

    def as_client(self) -> Client:
        """Return a client with the same pair."""
        return Client.of(self.file, self.key_file, self.trust_file)

    def _judge(self, place: Address, now: datetime) -> Verdict:
        pem, key = file_contents(self.file), file_contents(self.key_file)
        ours = first(self.file, pem)
        try:
            tls.context(None, pem, key)
        except ClientRefusedError as e:  # the component keeps running on the old pair, and would not survive a restart
            raise RefusedError(f"{self.file}, {self.key_file}: {e}") from None
        client = replace(ANONYMOUS, certificate_pem=pem, key_pem=key) if self.mutual else ANONYMOUS
        served = client.served(place, self.asks_for)
        if served != ours:
            return Verdict("stale", f"shows serial {serial_hex(served)}, {self.file} has {serial_hex(ours)}")
        if reason := _outside_dates(ours, now):
            return Verdict("refused", f"serial {serial_hex(ours)}: {reason}")
        if self.trust_file is not None:
            replace(client, trust_pem=file_contents(self.trust_file)).served(place, self.name)
        return Verdict("current", f"serial {serial_hex(ours)}, until {processes.moment_text(ours.not_valid_after_utc)}")


def ask_all(client: Client, servers: Sequence[Server], path: str, **request: Any) -> dict[str, http.Answer]:
    """Ask all; return answers by URL (HttpsError: one rejects the certificate, shows a wrong one, or none answers)."""
    answers, silent = {}, []
    for server in servers:
        try:
            answers[server.url] = _ask(client, server, path, request)
        except UnreachableError as e:
            silent.append(str(e))
    if not answers:
        raise UnreachableError("; ".join(silent) or "no server is known")
    return answers


def _ask(client: Client, server: Server, path: str, request: Mapping[str, Any]) -> http.Answer:
    try:
        answer = client.ask(server, path, **request)
    except HttpsError as e:
        raise type(e)(f"{server.url}: {e}") from None
    if answer.status >= HTTPStatus.INTERNAL_SERVER_ERROR or answer.status == HTTPStatus.TOO_MANY_REQUESTS:
        raise UnreachableError(f"{server.url}: wanted an answer, found HTTP {answer.status}: {text_of(answer)}")
    return answer


def text_of(answer: http.Answer) -> str:
    """Return the message in a server's answer: from Kubernetes' Status, from etcd's error, or the text itself."""
    text = answer.body[:_MOST_WORDS].decode(errors="replace").strip()
    try:
        found = of_server(answer.body)
    except ValueError:
        return text
    message = below(found, "message")
    return message[:_MOST_WORDS] if isinstance(message, str) else text


def accepted(answers: Mapping[str, http.Answer]) -> str:
    """Name the servers that accepted the client (RefusedError: one did not know it, or forbade its work)."""
    for url, answer in answers.items():
        if answer.status == HTTPStatus.UNAUTHORIZED:
            raise RefusedError(f"{url} does not know this client (HTTP 401)")
        if answer.status == HTTPStatus.FORBIDDEN:
            raise RefusedError(f"{url} accepts it, but forbids the request that it is for: {text_of(answer)}")
    return f"accepted by {', '.join(answers)}"


# --- health ----------------------------------------------------------------------------------------------------------

#: Paths of the components' health checks.
PATHS = {Component.APISERVER: "/readyz", Component.CONTROLLER_MANAGER: "/healthz", Component.SCHEDULER: "/healthz"}


def trouble(component: Component, node: Node, kubeconfig_dir: Path) -> str | None:
    """Return why a component of this node is not healthy; None: it is, or its health check is switched off."""
    if component is Component.KUBELET:
        url = kubelet.health_url()
        return None if url is None else _trouble(url, ANONYMOUS)
    flags = node.manifests[component].flags
    if component is Component.ETCD:
        return _etcd_trouble(Server(endpoints.etcd_url(flags)), node)
    host = flags.get("--bind-address", "0.0.0.0")  # noqa: S104 (looked for, not bound)
    port = flags.get("--secure-port", endpoints.PORTS[component])
    if port == "0":
        return None
    url = f"https://{endpoints.reachable(host)}:{port}{PATHS[component]}"
    found = _trouble(url, ANONYMOUS)
    if component is Component.APISERVER and found is not None:  # it may not answer unknown clients
        for client in Api.of_node(node, kubeconfig_dir).clients:
            found = _trouble(url, replace(client, trust_pem=None))
            if found is None:
                break
    return found


def _etcd_trouble(server: Server, node: Node) -> str | None:
    try:
        found = Etcd.of(node, trusting=True).trouble(server, alarms=True)
    except HttpsError as e:
        found = str(e)
    return None if found is None else f"{server.url}: {found}"


def _trouble(url: str, client: Client) -> str | None:
    try:
        found = _reason(client.ask(Server(url), ""))
    except HttpsError as e:
        found = str(e)
    return None if found is None else f"{url}: {found}"


def _reason(answer: http.Answer) -> str | None:
    """Return why a component is not healthy: failed checks of the API machinery's health handlers begin with [-]."""
    if answer.status == HTTPStatus.OK:
        return None
    lines = answer.body.decode(errors="replace").splitlines()
    failed = [line for line in lines if line.startswith("[-]")] or lines[:1]
    return f"HTTP status {answer.status}: {'; '.join(failed)}"[:_MOST_REASON]


# --- etcd by its JSON gateway ----------------------------------------------------------------------------------------


#: Client certificates from etcd's CA, in the order of use; kubeadm makes the first for health checks.
_CLIENTS = ("etcd-healthcheck-client", "apiserver-etcd-client", "etcd-server")

# From a member's status, since the alarm request is a proposal to the whole cluster.
_ALARM = re.compile(r"memberID:(\d+)\s+alarm:(\w+)")
_WITHOUT_ALARMS = "?exclude=NOSPACE&exclude=CORRUPT"


class Member(NamedTuple):
    """One member, as in the cluster's member list."""

    id: str
    name: str  #: Empty: it has not started yet.
    client_urls: tuple[str, ...]
    peer_urls: tuple[str, ...]
    learner: bool  #: Has no vote.


class Etcd:
    """A client of etcd's JSON gateway (https://etcd.io/docs/v3.6/dev-guide/api_grpc_gateway/), with each certificate of ours."""

    def __init__(self, clients: Sequence[Client], troubles: Sequence[str] = ()) -> None:
        """Try the clients in this order; `troubles` says why there are no others."""
        self._clients, self._troubles = tuple(clients), tuple(troubles)

    @classmethod
    def of(cls, node: Node, *, trusting: bool = False) -> Etcd:
        """Return a client of the node's etcd; with `trusting` it accepts any server, such as an expired one."""
        clients, troubles = [], []
        for item in filter(None, map(node.item, _CLIENTS)):
            if item.key_path is not None:
                trust = None if trusting else item.anchor_path
                try:
                    clients.append(Client.of(item.certificate_path, item.key_path, trust))
                except (UnreadableError, ValueError) as e:
                    troubles.append(f"{item.spec.name}: {e}")
        return cls(clients, troubles)

    def ask(self, server: Server, path: str, body: bytes | None = None) -> http.Answer:
        """Ask with the first of our certificates that the server accepts; without TLS, with none."""
        request: dict[str, Any] = {"method": "GET" if body is None else "POST", "body": body}
        if not server.url.startswith("https:"):
            return ANONYMOUS.ask(server, path, **request)
        refused = "; ".join(self._troubles) or "no certificate for etcd"
        for client in self._clients:
            try:
                return client.ask(server, path, **request)
            except tls.ClientRefusedError as e:
                refused = f"{client.name}: {e}"
        raise tls.ClientRefusedError(refused)

    def members(self, server: Server) -> list[Member]:
        """Return the members that this server knows."""
        return [_member(item) for item in items(self._call(server, "/v3/cluster/member/list"), "members")]

    def status(self, server: Server) -> tuple[str, tuple[tuple[str, str], ...]]:
        """Return a member's own ID (empty: not given), and the alarms that it knows, as (member ID, alarm)."""
        found = self._call(server, "/v3/maintenance/status")
        alarms = _ALARM.findall(" ".join(map(str, found.get("errors") or [])))
        return str(mapping(found, "header").get("member_id", "")), tuple(alarms)

    def trouble(self, server: Server, *, alarms: bool) -> str | None:
        """Return why a member is not healthy, with `alarms` or without; None: it has a leader, and reads by quorum."""
        answer = self.ask(server, f"/health{'' if alarms else _WITHOUT_ALARMS}")
        try:
            body = document(answer.body)
        except tls.HttpsError as e:
            return f"HTTP status {answer.status}" if answer.status != HTTPStatus.OK else str(e)
        if answer.status == HTTPStatus.OK and body.get("health") == "true":
            return None
        return str(body.get("reason") or "") or "not healthy"

    def _call(self, server: Server, path: str) -> dict[str, Any]:
        answer = self.ask(server, path, b"{}")
        if answer.status != HTTPStatus.OK:
            raise tls.UnreachableError(f"wanted an answer of {path}, found HTTP {answer.status}")
        return document(answer.body)


def _member(entry: Mapping[str, Any]) -> Member:
    client_urls, peer_urls = (
        tuple(filter(is_url, map(str, entry.get(key) or ()))) for key in ("clientURLs", "peerURLs")
    )
    name, is_learner = str(entry.get("name") or ""), entry.get("isLearner") is True
    return Member(str(entry.get("ID") or ""), name, client_urls, peer_urls, is_learner)
