"""A real node whose pods have certificates of OpenBao through the gateway, and handshakes with the files that they have."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509

from bridge.pki.certificates import load_pem_certificates, pem
from bridge.pki.csr import key_pem
from tests.kit import gateway_cluster, gateways, openbao, pods
from tests.kit.api_client import ApiClient
from tests.kit.gateway_cluster import ACCOUNT
from tests.kit.gateways import Gateway, Place
from tests.kit.issuing import Signer
from tests.kit.node import Node, directory
from tests.kit.nodes import wait_for
from tests.kit.openbao import OpenBao
from tests.kit.pods import SIGNER

BUNDLE = "credential-bundle.private-key.pem"
BUNDLES = {"signerName": SIGNER, "labelSelector": {}, "path": "roots.pem"}
NAMESPACES = ("shop", "bank", "outside")
_KUBELET = "crashLoopBackOff: {maxContainerRestartPeriod: 1s}\n"
#: The kubelet looks at a pod's volumes each 60 to 90 s.
SYNC_SECONDS = 150
#: And the gateway reads the roots again each minute.
ROOTS_SECONDS = SYNC_SECONDS + 70


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A pod's files, as they are at each look."""

    name: str
    bundle: Path  #: Key and certificates.
    roots: Path

    @property
    def leaf(self) -> x509.Certificate:
        """The certificate that the pod has now."""
        return load_pem_certificates(_read(self.bundle))[0]

    def context(self, side: ssl._SSLMethod, place: Path) -> ssl.SSLContext:
        """As a program makes one of its files (copied to a place, at one moment); whose certificate it is, it looks itself."""
        bundle, anchors = place / f"{self.name}.pem", place / f"{self.name}.roots"
        bundle.write_bytes(_read(self.bundle))
        anchors.write_bytes(_read(self.roots))
        made = ssl.SSLContext(side)
        made.check_hostname, made.verify_mode = False, ssl.CERT_REQUIRED
        made.load_verify_locations(anchors)
        made.load_cert_chain(bundle)
        return made


def _path(namespace: str, what: str = "pods") -> str:
    return f"/api/v1/namespaces/{namespace}/{what}"


def _read(path: Path) -> bytes:
    """The kubelet swaps a link, and removes the old directory at once: between the two a program has to look again."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return path.read_bytes()


@dataclass(kw_only=True)
class Talks:
    """Handshakes of two pods, one after the other, in both directions."""

    done: int = 0
    failed: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Site:
    """A node, its gateway and the pods' CA."""

    node: Node
    place: Place
    bao: OpenBao
    ca: Signer
    gateway: Gateway

    @property
    def admin(self) -> ApiClient:
        """A client with an administrator's rights; `kubectl` takes minutes for hundreds of objects on a busy machine."""
        return self.place.cluster.client()

    def make(self, *documents: dict[str, Any]) -> None:
        """Pods."""
        for one in documents:
            self.admin.create(_path(one["metadata"]["namespace"]), one)

    def remove(self, namespace: str, *names: str) -> None:
        """Pods, at once."""
        for name in names:
            assert self.admin.ask("DELETE", f"{_path(namespace)}/{name}").ok

    def pod(self, namespace: str, name: str) -> dict[str, Any]:
        """The object as it is."""
        return self.admin.get(f"{_path(namespace)}/{name}")

    def phases(self, namespace: str) -> dict[str, str]:
        """The phases of all pods of a namespace, by their names."""
        listed = self.admin.get(_path(namespace))["items"]
        return {one["metadata"]["name"]: one["status"].get("phase", "") for one in listed}

    def events(self, namespace: str) -> str:
        """What the events of a namespace say."""
        return "\n".join(one.get("message", "") for one in self.admin.get(_path(namespace, "events"))["items"])

    def until_running(self, namespace: str, *names: str, seconds: float = 240) -> None:
        """All of them."""

        def running() -> bool:
            phases = self.phases(namespace)
            return all(phases.get(name) == "Running" for name in names)

        wait_for(f"{', '.join(names)} of {namespace} to run", running, seconds=seconds)

    def holder(self, namespace: str, name: str) -> Holder:
        """The files of a pod that runs."""
        pid = (directory() / self.node.name / "pid").read_text().strip()
        uid = self.pod(namespace, name)["metadata"]["uid"]
        volumes = Path(f"/proc/{pid}/root/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~projected")
        return Holder(name=name, bundle=volumes / "id" / BUNDLE, roots=volumes / "roots/roots.pem")

    def sign_below(self, ca: Signer) -> None:
        """Have OpenBao sign by another CA from now on."""
        made = self.bao.write("pods/config/ca", pem_bundle=(pem(ca.certificate) + key_pem(ca.key)).decode())
        [issuer] = made["data"]["imported_issuers"]
        self.bao.write("pods/config/issuers", default=issuer)

    def containers(self, namespace: str, *names: str) -> list[str]:
        """The containers' ids, which a restart changes."""
        return [self.pod(namespace, name)["status"]["containerStatuses"][0]["containerID"] for name in names]


def pod(namespace: str, name: str, account: str = "default", source: dict[str, Any] | None = None) -> dict[str, Any]:
    """A program that does nothing, with an identity."""
    [reference] = {one.read_text().strip() for one in directory().glob("images-*/pause.reference")}
    volumes = [
        {"name": "id", "projected": {"sources": [{"podCertificate": source or pods.source()}]}},
        {"name": "roots", "projected": {"sources": [{"clusterTrustBundle": BUNDLES}]}},
    ]
    mounts = [{"name": one["name"], "mountPath": f"/run/spiffe/{one['name']}", "readOnly": True} for one in volumes]
    return {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "serviceAccountName": account, "automountServiceAccountToken": False, "hostNetwork": True,
            "terminationGracePeriodSeconds": 0, "tolerations": [{"operator": "Exists"}], "volumes": volumes,
            "securityContext": {"runAsUser": 1000, "fsGroup": 2000},
            "containers": [{"name": "it", "image": reference, "imagePullPolicy": "Never", "volumeMounts": mounts}],
        },
    }  # fmt: skip


@contextmanager
def running(
    name: str, ip: str, files: Path, *, policy: str = pods.POLICY, kubelet: str = "", **role: object
) -> Iterator[Site]:
    """One control-plane node, the manifests of `setup kubernetes`, OpenBao with a role for pods, and a gateway."""
    ca = Signer.make("pods of corp.example", begin=datetime.now(UTC) - timedelta(days=1))
    with openbao.dev_server() as bao, Node.up(name, ip, ca_dir=files / "ca-keys", kubelet=_KUBELET + kubelet) as node:
        api = gateway_cluster.api_of(ip, files / "ca-keys", files / "api")
        place = pods.with_vault(pods.place(api, files, policy), bao, ca, "pods", **role)
        place.user = ACCOUNT
        place.gateway |= {"lease_namespace": "ca-bridge", "node_rate": 1000, "pod_rate": 10_000}
        program = str(Path(sys.executable).with_name("ca-bridge"))
        out = files / "manifests"
        command = [program, "setup", "kubernetes", "--config", str(place.write()), "-o", str(out)]
        subprocess.run(command, check=True, capture_output=True)
        for manifest in ("00-namespace", "10-rbac", "20-admission", "50-pods"):
            (node.kubeconfig_dir / "apply.yaml").write_text((out / f"{manifest}.yaml").read_text())
            node.kubectl("apply", "-f", "/etc/kubernetes/apply.yaml")
        with gateways.running(place) as gateway:
            found = Site(node=node, place=place, bao=bao, ca=ca, gateway=gateway)
            for namespace in NAMESPACES:
                found.admin.create("/api/v1/namespaces", {"metadata": {"name": namespace}})
                account = f"{_path(namespace, 'serviceaccounts')}/default"
                wait_for("the default account", lambda: found.admin.ask("GET", account).ok)  # noqa: B023
            found.admin.create(_path("shop", "serviceaccounts"), {"metadata": {"name": "web"}})
            yield found


# --- a stock TLS stack (OpenSSL by Python's ssl) -----------------------------------------------------------------------


def talk(server: Holder, client: Holder, place: Path) -> tuple[str, str]:
    """A handshake with the files that the two pods have at this moment: the SPIFFE ID that each side sees of the other."""
    contexts = [server.context(ssl.PROTOCOL_TLS_SERVER, place), client.context(ssl.PROTOCOL_TLS_CLIENT, place)]
    ours, theirs = socket.socketpair()
    seen: dict[str, str] = {}

    def serve() -> None:
        with ours, suppress(OSError), contexts[0].wrap_socket(ours, server_side=True) as connection:
            seen["server"] = spiffe_id(connection)
            connection.sendall(b"x")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with theirs, contexts[1].wrap_socket(theirs) as connection:
            seen["client"] = spiffe_id(connection)
            assert connection.recv(1) == b"x"
    finally:
        thread.join()
    return seen["server"], seen["client"]


@contextmanager
def talking(one: Holder, other: Holder, place: Path, pause_seconds: float = 0.5) -> Iterator[Talks]:
    """Let them talk all the time, each with the files that it has at that moment; a failure is noted, and no end."""
    talks, stop = Talks(), threading.Event()

    def talk_on() -> None:
        while not stop.wait(pause_seconds):
            for server, client in ((one, other), (other, one)):
                try:
                    talk(server, client, place)
                except (OSError, ValueError, AssertionError) as e:
                    talks.failed.append(f"{datetime.now(UTC):%H:%M:%S} {server.name} and {client.name}: {e}")
                talks.done += 1

    thread = threading.Thread(target=talk_on)
    thread.start()
    try:
        yield talks
    finally:
        stop.set()
        thread.join()


def spiffe_id(connection: ssl.SSLSocket) -> str:
    """The SPIFFE ID of the peer: the one URI."""
    certificate: Any = connection.getpeercert()
    [one] = [value for kind, value in certificate["subjectAltName"] if kind == "URI"]
    return str(one)
