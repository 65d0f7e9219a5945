"""All kubelets of the cluster, as their clients find them, and the API servers that verify them or do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any
from urllib.parse import quote

from bridge.cluster.access import ANONYMOUS, Client, below, items, text_of
from bridge.cluster.api import Api, NoAnswerError
from bridge.node import endpoints
from bridge.node.endpoints import Address, Flags
from bridge.node.manifests import flags_of
from bridge.pki.certificates import name_text
from bridge.specs import Component
from bridge.system.http import HttpsError
from bridge.words import one_line

#: The API server's, by which it verifies kubelets; without it none is verified.
AUTHORITY = "--kubelet-certificate-authority"
_NODES = "/api/v1/nodes"
#: A node lists up to 50 images, and an answer has at most 4 MiB.
_PAGE = 50
_AT_ONCE = 8
#: kube-apiserver's own order, where its flag does not say.
_TYPES = "Hostname,InternalDNS,InternalIP,ExternalDNS,ExternalIP"
_API_SERVERS = "/api/v1/namespaces/kube-system/pods?labelSelector=component%3Dkube-apiserver"
_REQUESTS = (
    "/apis/certificates.k8s.io/v1/certificatesigningrequests?fieldSelector="
    "spec.signerName%3Dkubernetes.io%2Fkubelet-serving"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The certificate that the clients of one kubelet see."""

    node: str
    place: Address | None = None  #: Where the API server reaches it; None: its Node object has no address.
    trouble: str = ""  #: Why a client that trusts the cluster's CA alone would turn away; empty: it is right.
    end: datetime | None = None  #: Of its certificate, where it is right.


def all_served(api: Api, trust_pem: bytes, flags: Flags) -> list[Served]:
    """Look at the kubelet of each Node object, as an API server with these flags does (NoAnswerError: none answers)."""
    client = replace(ANONYMOUS, name="the API server", trust_pem=trust_pem)
    every = list(nodes(api))
    with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
        return list(pool.map(lambda one: _look(one, client, flags), every))


def served(api: Api, name: str, trust_pem: bytes, flags: Flags) -> Served:
    """The same for one node."""
    client = replace(ANONYMOUS, name="the API server", trust_pem=trust_pem)
    return _look(api.get(f"{_NODES}/{quote(name, safe='')}"), client, flags)


def nodes(api: Api) -> Iterator[Mapping[str, Any]]:
    """All Node objects, page by page (NoAnswerError)."""
    return api.every(_NODES, _PAGE)


def _look(node: Mapping[str, Any], client: Client, flags: Flags) -> Served:
    name, place = name_of(node), place_of(node, flags)
    if place is None:
        return Served(node=name, trouble="wanted its address in its Node object, found none")
    try:
        leaf = client.served(place)
    except HttpsError as e:
        return Served(node=name, place=place, trouble=f"{e}{_issuer(place)}")
    return Served(node=name, place=place, end=leaf.not_valid_after_utc)


def _issuer(place: Address) -> str:
    """Words about who signed what it shows; empty: it shows nothing."""
    try:
        return f"; it shows a certificate from {one_line(name_text(ANONYMOUS.served(place).issuer))}"
    except (HttpsError, ValueError):
        return ""


def place_of(node: Mapping[str, Any], flags: Flags) -> Address | None:
    """The address that an API server takes: the first of the first type that the node has."""
    by_type: dict[str, str] = {}
    for one in items(node, "status", "addresses"):
        by_type.setdefault(str(one.get("type")), str(one.get("address") or ""))
    wanted = flags.get("--kubelet-preferred-address-types", _TYPES).split(",")
    host = next((found for kind in wanted if (found := by_type.get(kind.strip()))), "")
    port = below(node, "status", "daemonEndpoints", "kubeletEndpoint", "Port")
    usual = endpoints.PORTS[Component.KUBELET]
    return Address(host, port if isinstance(port, int) and 0 < port < 1 << 16 else usual) if host else None


def authorities(api: Api, own: str, own_flags: Flags) -> dict[str, str]:
    """
    The CA file by which each node's API server verifies kubelets, empty where it verifies none, by their mirror pods; of
    the node `own` by its manifest (NoAnswerError).
    """
    # a mirror pod follows some seconds after a restart
    found: dict[str, Flags] = {own: own_flags}
    for pod in items(api.get(_API_SERVERS), "items"):
        words = [str(word) for one in items(pod, "spec", "containers") for word in _words(one)]
        found.setdefault(one_line(text_of(pod, "spec", "nodeName")), flags_of(words))
    return {node: flags.get(AUTHORITY, "") for node, flags in sorted(found.items())}


def _words(container: Mapping[str, Any]) -> Sequence[Any]:
    parts = [container.get("command"), container.get("args")]
    return [word for part in parts if isinstance(part, list) for word in part]


def request_of(api: Api, node: str) -> str:
    """Words about the newest request for a serving certificate of a node; empty: it can't be seen."""
    try:
        found = items(api.get(_REQUESTS), "items")
    except NoAnswerError:
        return ""
    ours = [one for one in found if text_of(one, "spec", "username") == f"system:node:{node}"]
    if not ours:
        return "it has not asked for one"
    newest = max(ours, key=lambda one: text_of(one, "metadata", "creationTimestamp"))
    said = [text_of(one, "type") for one in items(newest, "status", "conditions")]
    why = [text_of(one, "message") for one in items(newest, "status", "conditions")]
    is_signed = bool(text_of(newest, "status", "certificate"))
    state = "signed" if is_signed else " and ".join(said).lower() or "open: no answer yet"
    reason = f" ({one_line(why[-1])[:300]})" if why and why[-1] and not is_signed else ""
    return f"its request {name_of(newest)} is {state}{reason}"


def name_of(of: Mapping[str, Any]) -> str:
    """An object's name."""
    return one_line(text_of(of, "metadata", "name"))
