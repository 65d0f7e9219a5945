"""
Who shows which certificate: to our clients, to the API server, and what the API server shows to others.

The API server writes an audit log, which names the certificate of every client. The extension server is an aggregated
API on this machine, to which the API server comes with its front-proxy client certificate.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, cast

import yaml
from cryptography import x509

from bridge.node import kubeconfig
from bridge.pki.certificates import fingerprint
from bridge.specs import FRONT_PROXY_CA, SPECS
from bridge.system.waiting import wait_until
from tests.kit import cfssl
from tests.kit.api_client import SLOW_ETCD
from tests.kit.loopback import LoopbackServer
from tests.kit.node import Node
from tests.kit.nodes import wait_for

API_PORT, ETCD_PORT, ETCD_PEER_PORT = 6443, 2379, 2380
#: This machine's address, as nodes see it.
GATEWAY = "198.18.77.1"
#: The name of the ConfigMap that `traffic` writes.
TRAFFIC = "traffic"

# --- as a client -----------------------------------------------------------------------------------------------------


_SLOW = tuple(words.encode() for words in (*SLOW_ETCD, "did not complete within requested timeout"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a server answered, and the certificate that it showed."""

    certificate: x509.Certificate
    status: int
    body: bytes

    @property
    def is_late(self) -> bool:
        """Whether it says that etcd was too slow, as on a machine that stalls."""
        return self.status != http.client.OK and any(words in self.body for words in _SLOW)


def client(node: Node, name: str) -> ssl.SSLContext:
    """A client with one of the node's certificates, as it is on disk now, that trusts the authority it is from."""
    spec = SPECS[name]
    if spec.kubeconfig:
        data = (node.kubeconfig_dir / spec.base).read_bytes()
        pair = (kubeconfig.parse(data).certificate_data or b"") + (kubeconfig.key_data(data) or b"")
    else:
        pair = b"".join((node.pki_dir / f"{spec.base}{suffix}").read_bytes() for suffix in (".crt", ".key"))
    context = ssl.create_default_context(cafile=node.pki_dir / spec.authority.certificate_file)
    with tempfile.NamedTemporaryFile() as file:
        file.write(pair)
        file.flush()
        context.load_cert_chain(file.name)
    return context


def connection(
    node: Node, port: int, context: ssl.SSLContext, *, seconds: float = 120
) -> contextlib.closing[http.client.HTTPSConnection]:
    """A connection to the node, which opens at the first request; the server's name and chain are checked."""
    return contextlib.closing(http.client.HTTPSConnection(node.ip, port, context=context, timeout=seconds))


def ask(opened: http.client.HTTPSConnection, path: str, *, patch: object = None) -> Answer:
    """GET, or PATCH when there is a JSON merge patch."""
    if patch is None:
        opened.request("GET", path)
    else:
        opened.request("PATCH", path, json.dumps(patch), {"Content-Type": "application/merge-patch+json"})
    certificate = _peer(opened.sock)
    response = opened.getresponse()
    return Answer(certificate=certificate, status=response.status, body=response.read())


def ask_again(opened: http.client.HTTPSConnection, path: str, *, patch: object = None) -> Answer:
    """As `ask`; while etcd is too slow, as on a machine that stalls, it is asked again."""
    return wait_until(
        lambda: ask(opened, path, patch=patch), lambda one: not one.is_late, timedelta(minutes=2), pause_seconds=0.5
    )


def _peer(socket: object) -> x509.Certificate:
    shown = cast("ssl.SSLSocket", socket).getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown)


def served(node: Node, port: int, name: str) -> x509.Certificate:
    """What the server shows in a new handshake; it accepts the client's certificate `name`, too."""
    with connection(node, port, client(node, name)) as opened:
        answer = ask(opened, "/version")
    assert answer.status == http.client.OK, answer.body
    return answer.certificate


@dataclass(kw_only=True)
class Traffic:
    """What a client has seen that writes and reads all the time."""

    turns: int = 0
    errors: list[str] = field(default_factory=list)
    served: list[x509.Certificate] = field(default_factory=list)  #: In the order in which new connections saw them.


@contextlib.contextmanager
def traffic(node: Node) -> Iterator[Traffic]:
    """A client that writes and reads a ConfigMap every 0.1 s: on a connection that it keeps, and on a new one."""
    seen, stop, context = Traffic(), threading.Event(), client(node, "admin.conf")

    def work() -> None:
        with connection(node, API_PORT, context) as kept:
            while not stop.wait(0.1):
                seen.turns += 1
                begin = time.monotonic()
                try:
                    shown = _turn(str(seen.turns), kept, node, context)
                except (OSError, http.client.HTTPException, ValueError) as e:
                    seen.errors.append(f"turn {seen.turns}, after {time.monotonic() - begin:.1f} s: {e!r}")
                else:
                    seen.served += [] if shown in seen.served[-1:] else [shown]

    node.kubectl("create", "configmap", TRAFFIC)
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()
        node.kubectl("delete", "configmap", TRAFFIC)


def _turn(value: str, kept: http.client.HTTPSConnection, node: Node, context: ssl.SSLContext) -> x509.Certificate:
    """
    Write on the one connection, read on the other.

    Returns:
        What the API server showed on the new one.

    Raises:
        OSError, HTTPException, ValueError: Not as it should be.
    """
    path = f"/api/v1/namespaces/default/configmaps/{TRAFFIC}"
    wrote = ask_again(kept, path, patch={"data": {"turn": value}})
    try:
        with connection(node, API_PORT, context) as fresh:
            read = ask_again(fresh, path)
    except TimeoutError:  # of a handshake on a machine that stalls (seen once); a server that hangs fails again
        with connection(node, API_PORT, context) as fresh:
            read = ask_again(fresh, path)
    if (wrote.status, read.status) != (http.client.OK, http.client.OK):
        raise ValueError(f"wanted 200 twice, got {wrote.status} {wrote.body!r}, {read.status} {read.body!r}")
    if json.loads(read.body)["data"]["turn"] != value:
        raise ValueError(f"wanted {value}, got {read.body!r}")
    return read.certificate


# --- as the API server sees its clients, and the kubelet the API server -----------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """The API server's audit log."""

    directory: Path  #: On this machine, and under the same name on the node.

    def cluster(self) -> str:
        """Write the policy; what in kubeadm's ClusterConfiguration switches the log on."""
        # What the kubelet asks the API server about a client of its own holds that client's certificate.
        reviews = {"group": "authorization.k8s.io", "resources": ["subjectaccessreviews"]}
        policy = {
            "apiVersion": "audit.k8s.io/v1",
            "kind": "Policy",
            "omitStages": ["RequestReceived"],
            "rules": [{"level": "Request", "resources": [reviews]}, {"level": "Metadata"}],
        }
        self.directory.mkdir()
        (self.directory / "policy.yaml").write_text(yaml.safe_dump(policy))
        here = str(self.directory)
        arguments = {"audit-policy-file": f"{here}/policy.yaml", "audit-log-path": f"{here}/log"}
        apiserver = {
            "extraArgs": [{"name": name, "value": value} for name, value in arguments.items()],
            "extraVolumes": [{"name": "audit", "hostPath": here, "mountPath": here, "pathType": "Directory"}],
        }
        return yaml.safe_dump({"apiServer": apiserver})

    def certificates_of(self, user: str, since: datetime, until: datetime | None = None) -> set[str]:
        """The fingerprints of the certificates with which a user came (to the API server, or to the kubelet)."""
        found = set()
        for event in self._events():
            received = datetime.fromisoformat(event["requestReceivedTimestamp"])
            if since < received and (until is None or received < until):
                asked_about = event.get("requestObject", {}).get("spec", {})
                found |= _certificates(user, event["user"], "username") | _certificates(user, asked_about, "user")
        return found

    def _events(self) -> Iterator[dict[str, Any]]:
        for line in (self.directory / "log").read_text().splitlines(keepends=True):
            if line.endswith("\n"):  # the last one may be half written
                yield json.loads(line)


def _certificates(user: str, who: Mapping[str, Any], key: str) -> set[str]:
    credentials = who.get("extra", {}).get("authentication.kubernetes.io/credential-id", ())
    prefix = "X509SHA256="
    return {one.removeprefix(prefix) for one in credentials if who.get(key) == user and one.startswith(prefix)}


# --- as an extension server sees the API server ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """An aggregated API; the API server is its client."""

    node: Node
    shown: list[str]  #: Fingerprints of what the API server showed, one for each request.
    refused: list[str]  #: Handshakes that failed.

    def ask(self) -> str:
        """
        Ask it by way of the API server; the fingerprint of what that showed.

        The API server answers 503 for half a minute after one of its own looks at the extension took over 5 s, as on a
        machine that stalls.
        """
        before = len(self.shown)
        look = ("get", "--raw", f"/apis/{_GROUP}/v1/anything")
        wait_for("an answer of the extension", lambda: not self.node.kubectl(*look, check=False).returncode)
        return self.shown[before:][-1]


_GROUP = "looking.example.com"
_LISTED = {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": f"{_GROUP}/v1", "resources": []}
_REGISTRATION = """\
apiVersion: v1
kind: Service
metadata: {{name: looking, namespace: default}}
spec: {{type: ExternalName, externalName: {host}}}
---
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {{name: v1.{group}}}
spec:
  group: {group}
  version: v1
  groupPriorityMinimum: 1000
  versionPriority: 10
  insecureSkipTLSVerify: true  # it is the client that is looked at
  service: {{name: looking, namespace: default, port: {port}}}
"""


@contextlib.contextmanager
def extension(node: Node, directory: Path, trusted: Callable[[], str] | None = None) -> Iterator[Extension]:
    """
    An aggregated API on this machine, registered with the node; it turns away who has no front-proxy certificate.

    Args:
        node: The node.
        directory: For its files.
        trusted: The CA's certificates (PEM) at each handshake; by default, of the node's file.
    """
    shown: list[str] = []
    refused: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        """Speaks HTTP/1.0: a new connection, and a new handshake, for each request."""

        def setup(self) -> None:
            """The handshake, which the CA's certificates of now decide; in a thread of its own: one waits for no other."""
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cadata=cas())
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_cert_chain(tls.server_cert, tls.server_key)
            self.request.settimeout(120)
            try:
                self.request = context.wrap_socket(self.request, server_side=True)
            except ssl.SSLError as e:
                refused.append(str(e))
                raise
            super().setup()

        def finish(self) -> None:
            """Close it: the server has the socket below TLS."""
            super().finish()
            self.request.close()

        def do_GET(self) -> None:
            """Say that there is such an API, and nothing in it."""
            shown.append(fingerprint(_peer(self.connection)))
            self.send_response(http.client.OK)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(_LISTED).encode())

        def log_message(self, *args: object) -> None:
            """Nothing."""

    tls = cfssl.make_tls(directory)
    cas = trusted or (node.pki_dir / FRONT_PROXY_CA.certificate_file).read_text

    with LoopbackServer((GATEWAY, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            registration = directory / "registration.yaml"
            registration.write_text(_REGISTRATION.format(group=_GROUP, host=GATEWAY, port=server.server_port))
            node.kubectl("apply", "-f", str(registration))
            available = '{.status.conditions[?(@.type=="Available")].status}'
            look = ("get", "apiservice", f"v1.{_GROUP}", "-o", f"jsonpath={available}")
            wait_for("an extension that is available", lambda: node.kubectl(*look).stdout == "True")
            yield Extension(node=node, shown=shown, refused=refused)
        finally:
            server.shutdown()
            thread.join()
