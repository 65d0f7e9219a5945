"""
A strict double of the few API requests about other nodes, for what a real API server does not give on demand.

It checks requests as the real one does (client certificate, content type, names, resourceVersion) and can fail in
between. Several servers share one cluster, as they share one etcd.
"""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.x509.oid import NameOID

from tests.kit.loopback import LoopbackServer
from tests.kit.members import Place

LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases"
BINDINGS = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/"


@dataclass(kw_only=True)
class State:
    """What all servers of a cluster share."""

    leases: dict[str, dict[str, Any]] = field(default_factory=dict)
    nodes: list[tuple[str, str]] = field(default_factory=list)  #: Name and address of the control-plane nodes.
    endpoints: list[str] = field(default_factory=list)  #: Addresses.
    port: int = 0  #: 0: any that is free, which is written here.
    secrets: list[dict[str, Any]] = field(default_factory=list)
    config: str = ""  #: ClusterConfiguration of the ConfigMap kubeadm-config; empty: there is none.
    kubelet_config: str = ""  #: Of the ConfigMap kubelet-config; empty: there is none.
    bindings: dict[str, tuple[str, str, str]] = field(default_factory=dict)  #: Role, kind and name of the subject.
    version: int = 0
    mutex: threading.Lock = field(default_factory=threading.Lock)
    requests: list[tuple[str, str, str]] = field(default_factory=list)  #: Method, path, the client's CN.
    refused: set[str] = field(default_factory=set)  #: CNs without rights.
    before_write: list[Callable[[], None]] = field(default_factory=list)  #: Each is called once.
    answers_to_lose: int = 0  #: So many writes are carried out, and the connection ends.

    def put(self, name: str, holder: str, *, seconds: int = 60, renewed: str = "2026-01-01T00:00:00.000000Z") -> None:
        """Another client writes a lease."""
        with self.mutex:  # not between the look and the write of a request
            self.version += 1
            self.leases[name] = {
                "apiVersion": "coordination.k8s.io/v1",
                "kind": "Lease",
                "metadata": {"name": name, "namespace": "kube-system", "resourceVersion": str(self.version)},
                "spec": {
                    "holderIdentity": holder,
                    "leaseDurationSeconds": seconds,
                    "renewTime": renewed,
                    "acquireTime": renewed,
                    "leaseTransitions": 3,
                },
            }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: ClassVar[State]
    ready: ClassVar[list[str]]  #: Names of checks that fail.

    def do_GET(self) -> None:
        """A lease, the nodes, the endpoints, or the server's own state."""
        parts = urlsplit(self.path)
        if not self._is_allowed():
            return
        if parts.path == "/readyz":
            if self.ready:
                self._send(500, "".join(f"[-]{name} failed: reason withheld\n" for name in self.ready))
            else:
                self._send(200, "ok")
        elif parts.path == "/api/v1/nodes":
            assert parse_qs(parts.query) == {"labelSelector": ["node-role.kubernetes.io/control-plane"]}
            self._send(200, {"kind": "NodeList", "items": [_node(*pair) for pair in self.state.nodes]})
        elif parts.path == "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices":
            assert parse_qs(parts.query) == {"labelSelector": ["kubernetes.io/service-name=kubernetes"]}
            endpoints = [{"addresses": [address], "conditions": {"ready": True}} for address in self.state.endpoints]
            piece = {"ports": [{"name": "https", "port": self.state.port}], "endpoints": endpoints}
            self._send(200, {"kind": "EndpointSliceList", "items": [piece]})
        elif parts.path == "/api/v1/namespaces/kube-system/configmaps/kubeadm-config" and self.state.config:
            self._send(200, {"kind": "ConfigMap", "data": {"ClusterConfiguration": self.state.config}})
        elif parts.path == "/api/v1/namespaces/kube-system/configmaps/kubelet-config" and self.state.kubelet_config:
            self._send(200, {"kind": "ConfigMap", "data": {"kubelet": self.state.kubelet_config}})
        elif parts.path == "/api/v1/secrets":
            self._send(200, _page(self.state.secrets, parse_qs(parts.query)))
        elif parts.path.startswith(BINDINGS):
            bound = self.state.bindings.get(parts.path.removeprefix(BINDINGS))
            self._send(*((200, _binding(*bound)) if bound else _status(404)))
        else:
            found = self.state.leases.get(self._name())
            self._send(*((200, found) if found else _status(404)))

    def do_POST(self) -> None:
        """Make a lease."""
        body = self._body()
        if body is None or not self._is_allowed():
            return
        name = body["metadata"]["name"]
        with self._writing():
            if self.path != LEASES or "resourceVersion" in body["metadata"]:
                self._send(*_status(400))
            elif name in self.state.leases:
                self._send(*_status(409))
            else:
                self._send(201, self._write(name, body))

    def do_PUT(self) -> None:
        """Change a lease, if it is the one that was read."""
        body = self._body()
        if body is None or not self._is_allowed():
            return
        name = self._name()
        with self._writing():
            found = self.state.leases.get(name)
            if found is None:
                self._send(*_status(404))
            elif body["metadata"]["name"] != name or "resourceVersion" not in body["metadata"]:
                self._send(*_status(400))
            elif body["metadata"]["resourceVersion"] != found["metadata"]["resourceVersion"]:
                self._send(*_status(409))
            else:
                self._send(200, self._write(name, body))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        while self.state.before_write:
            self.state.before_write.pop(0)()
        with self.state.mutex:
            yield

    def _write(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        spec = body["spec"]
        assert isinstance(spec["leaseDurationSeconds"], int)
        assert spec["leaseDurationSeconds"] > 0
        self.state.version += 1
        made = {**body, "metadata": {**body["metadata"], "resourceVersion": str(self.state.version)}}
        self.state.leases[name] = made
        if self.state.answers_to_lose:
            self.state.answers_to_lose -= 1
            self.close_connection = True
            self.connection.close()
        return made

    def _name(self) -> str:
        path, _, name = self.path.rpartition("/")
        return name if path == LEASES else ""

    def _body(self) -> dict[str, Any] | None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Content-Type"] != "application/json":
            self._send(*_status(415))
            return None
        body: dict[str, Any] = json.loads(data)
        assert (body["apiVersion"], body["kind"]) == ("coordination.k8s.io/v1", "Lease")
        return body

    def _is_allowed(self) -> bool:
        shown = self.connection.getpeercert(binary_form=True)
        subject = x509.load_der_x509_certificate(shown).subject
        who = str(subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
        self.state.requests.append((self.command, self.path, who))
        if who in self.state.refused:
            self._send(*_status(403))
        return who not in self.state.refused

    def _send(self, status: int, body: str | dict[str, Any]) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        with contextlib.suppress(OSError):  # it was closed above
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Nothing."""


def _status(code: int) -> tuple[int, dict[str, Any]]:
    return code, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code}


def _page(objects: list[dict[str, Any]], query: dict[str, list[str]]) -> dict[str, Any]:
    """A part of a list, as many as were asked for."""
    begin, most = int(query.get("continue", ["0"])[0]), int(query["limit"][0])
    more = {"continue": str(begin + most)} if len(objects) > begin + most else {}
    return {"kind": "List", "metadata": more, "items": objects[begin : begin + most]}


def _binding(role: str, kind: str, name: str) -> dict[str, Any]:
    return {"kind": "ClusterRoleBinding", "roleRef": {"kind": "ClusterRole", "name": role},
            "subjects": [{"kind": kind, "name": name}]}  # fmt: skip


def _node(name: str, address: str) -> dict[str, Any]:
    addresses = [{"type": "Hostname", "address": name}, {"type": "InternalIP", "address": address}]
    return {"metadata": {"name": name}, "status": {"addresses": addresses}}


@contextlib.contextmanager
def serving(place: Place, state: State) -> Iterator[list[str]]:
    """
    An API server of this node, at the shared port.

    Returns:
        The names of checks that fail at /readyz: put some in.
    """
    failing: list[str] = []
    handler = type("Handler", (_Handler,), {"state": state, "ready": failing})
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(place.pki_dir / "ca.crt"))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(place.pki_dir / "apiserver.crt", place.pki_dir / "apiserver.key")
    with LoopbackServer((place.address, state.port), handler) as server:
        state.port = server.server_port
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield failing
        finally:
            server.shutdown()
            thread.join()
