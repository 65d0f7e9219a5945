"""Pods on a real node, whose kubelet has their certificates signed by OpenBao through the gateway: mutual TLS, by SPIFFE ID."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509

from bridge.pki.certificates import load_pem_certificates, pem
from bridge.pki.csr import key_pem
from tests.kit import gateway_cluster, gateways, openbao, pods
from tests.kit.gateway_cluster import ACCOUNT
from tests.kit.gateways import Gateway, Place
from tests.kit.issuing import Signer
from tests.kit.node import Node, directory
from tests.kit.nodes import restart_kubelet, wait_for
from tests.kit.openbao import OpenBao
from tests.kit.pods import SIGNER, TRUST_DOMAIN

pytestmark = [pytest.mark.node, pytest.mark.slow]

BUNDLE = "credential-bundle.private-key.pem"
BUNDLES = {"signerName": SIGNER, "labelSelector": {}, "path": "roots.pem"}
KUBELET = "crashLoopBackOff: {maxContainerRestartPeriod: 1s}\n"
#: The kubelet looks at a pod's volumes each 60 to 90 s.
SYNC_SECONDS = 150
#: And the gateway reads the roots again each minute.
ROOTS_SECONDS = SYNC_SECONDS + 70


@dataclass(kw_only=True)
class Site:
    """A node, its gateway and the pods' CA."""

    node: Node
    place: Place
    bao: OpenBao
    ca: Signer
    gateway: Gateway

    def apply(self, *documents: Any) -> None:
        """Objects."""
        (self.node.kubeconfig_dir / "apply.yaml").write_text(yaml.safe_dump_all(documents))
        self.node.kubectl("apply", "-f", "/etc/kubernetes/apply.yaml")

    def pod(self, namespace: str, name: str) -> dict[str, Any]:
        """The object as it is."""
        found: dict[str, Any] = json.loads(self.node.kubectl("get", "pod", "-n", namespace, name, "-o", "json").stdout)
        return found

    def until_running(self, namespace: str, *names: str, seconds: float = 60) -> None:
        """All of them."""

        def running() -> bool:
            listed = json.loads(self.node.kubectl("get", "pods", "-n", namespace, "-o", "json").stdout)["items"]
            phases = {one["metadata"]["name"]: one["status"].get("phase") for one in listed}
            return all(phases.get(name) == "Running" for name in names)

        wait_for(f"{', '.join(names)} of {namespace} to run", running, seconds=seconds)

    def file(self, namespace: str, name: str, path: str) -> str:
        """A file of a pod's volume, as the containers see it."""
        uid = self.pod(namespace, name)["metadata"]["uid"]
        return self.node.exec("cat", f"/var/lib/kubelet/pods/{uid}/volumes/{path}").stdout

    def bundle(self, namespace: str, name: str) -> str:
        """Key and certificates."""
        return self.file(namespace, name, f"kubernetes.io~projected/id/{BUNDLE}")

    def leaf(self, namespace: str, name: str) -> x509.Certificate:
        """The certificate that the pod has now."""
        return load_pem_certificates(self.bundle(namespace, name).encode())[0]


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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One control-plane node, the manifests of `setup kubernetes`, OpenBao and a gateway."""
    files = tmp_path_factory.mktemp("pods")
    ca = Signer.make("pods of corp.example", begin=datetime.now(UTC) - timedelta(days=1))
    name, ip = f"pods{os.getpid() % 10_000}", "198.18.77.190"
    with openbao.dev_server() as bao, Node.up(name, ip, ca_dir=files / "ca-keys", kubelet=KUBELET) as node:
        api = gateway_cluster.api_of(ip, files / "ca-keys", files / "api")
        place = pods.with_vault(pods.place(api, files), bao, ca)
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
            found.apply(
                *(
                    {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": one}}
                    for one in ("shop", "bank", "outside")
                )
            )
            found.apply(
                {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "web", "namespace": "shop"}},
            )
            for namespace in ("shop", "bank", "outside"):
                look = ("get", "serviceaccount", "-n", namespace, "default")
                wait_for("the default account", lambda: not node.kubectl(*look, check=False).returncode)  # noqa: B023
            yield found


# --- a stock TLS stack (OpenSSL by Python's ssl) -----------------------------------------------------------------------


def context(side: ssl._SSLMethod, bundle: Path, roots: Path) -> ssl.SSLContext:
    """As a program makes one of the two files; whose certificate it is, the program looks at itself."""
    made = ssl.SSLContext(side)
    made.check_hostname, made.verify_mode = False, ssl.CERT_REQUIRED
    made.load_verify_locations(roots)
    made.load_cert_chain(bundle)
    return made


def talk(site: Site, server: tuple[str, str], client: tuple[str, str], directory: Path) -> tuple[str, str]:
    """A handshake with the files that the two pods have at this moment: the SPIFFE ID that each side sees of the other."""
    contexts = []
    for side, (namespace, name) in ((ssl.PROTOCOL_TLS_SERVER, server), (ssl.PROTOCOL_TLS_CLIENT, client)):
        bundle, anchors = directory / f"{name}.pem", directory / f"{name}.roots"
        bundle.write_text(site.bundle(namespace, name))
        anchors.write_text(site.file(namespace, name, "kubernetes.io~projected/roots/roots.pem"))
        contexts.append(context(side, bundle, anchors))
    ours, theirs = socket.socketpair()
    seen: dict[str, str] = {}

    def serve() -> None:
        with contexts[0].wrap_socket(ours, server_side=True) as connection:
            seen["server"] = spiffe_id(connection)
            connection.sendall(b"x")

    thread = threading.Thread(target=serve)
    thread.start()
    with contexts[1].wrap_socket(theirs) as connection:
        seen["client"] = spiffe_id(connection)
        assert connection.recv(1) == b"x"
    thread.join()
    return seen["server"], seen["client"]


def spiffe_id(connection: ssl.SSLSocket) -> str:
    """Of the peer: the one URI."""
    certificate: Any = connection.getpeercert()
    [one] = [value for kind, value in certificate["subjectAltName"] if kind == "URI"]
    return str(one)


# --- tests, in this order -----------------------------------------------------------------------------------------------


def test_two_namespaces_talk(site: Site, tmp_path: Path) -> None:
    """Each knows the other by its SPIFFE ID; the key is the pod's user's alone, and a stranger's root is refused."""
    site.apply(pod("shop", "web", "web"), pod("bank", "till"))
    site.until_running("shop", "web")
    site.until_running("bank", "till")
    seen = talk(site, ("shop", "web"), ("bank", "till"), tmp_path)
    assert seen == (f"spiffe://{TRUST_DOMAIN}/ns/bank/sa/default", f"spiffe://{TRUST_DOMAIN}/ns/shop/sa/web")
    uid = site.pod("shop", "web")["metadata"]["uid"]
    path = f"/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~projected/id/{BUNDLE}"
    assert site.node.exec("stat", "-L", "-c", "%u %g %a", path).stdout.split() == ["1000", "2000", "640"]
    stranger = Signer.make("another CA", begin=datetime.now(UTC) - timedelta(days=1))
    anchors = tmp_path / "stranger"
    anchors.write_bytes(pem(stranger.certificate))
    made = context(ssl.PROTOCOL_TLS_CLIENT, tmp_path / "till.pem", anchors)
    ours, theirs = socket.socketpair()
    server = context(ssl.PROTOCOL_TLS_SERVER, tmp_path / "web.pem", tmp_path / "web.roots")

    def serve() -> None:
        with pytest.raises(ssl.SSLError):
            server.wrap_socket(ours, server_side=True)

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(ssl.SSLCertVerificationError):
        made.wrap_socket(theirs)
    thread.join()


def test_a_pod_that_may_not_says_so(site: Site) -> None:
    """Its events have the reason in words; the gateway's record has it, too."""
    site.apply(pod("outside", "stray"), pod("shop", "odd", "web", pods.source(keyType="ED25519")))

    def events(namespace: str) -> str:
        return site.node.kubectl("get", "events", "-n", namespace, "-o", "jsonpath={.items[*].message}").stdout

    wanted = "namespace outside may not have certificates of this signer"
    wait_for("an event", lambda: wanted in events("outside"), seconds=60)
    wait_for("an event", lambda: "this signer takes ECDSAP256" in events("shop"), seconds=60)
    assert site.pod("outside", "stray")["status"]["phase"] == "Pending"
    assert any(wanted in json.dumps(line) for line in site.gateway.audit())
    site.node.kubectl("delete", "pod", "-n", "outside", "stray")
    site.node.kubectl("delete", "pod", "-n", "shop", "odd")


def test_twenty_at_once_while_the_ca_is_away(site: Site) -> None:
    """They wait for it, none is denied, and all run when it is back."""
    names = [f"many-{number}" for number in range(20)]
    os.kill(site.bao.process.pid, signal.SIGSTOP)
    try:
        site.apply(*(pod("shop", name, "web") for name in names))
        time.sleep(20)
        assert "Running" not in site.node.kubectl("get", "pods", "-n", "shop", names[0]).stdout
    finally:
        os.kill(site.bao.process.pid, signal.SIGCONT)
    site.until_running("shop", *names, seconds=240)
    assert site.gateway.metric("requests_total", signer=SIGNER, outcome="denied") == 2
    site.node.kubectl("delete", "pod", "-n", "shop", "--wait=false", *names)


def test_the_root_is_replaced_under_them(site: Site, tmp_path: Path) -> None:
    """Two roots while one is replaced: certificates below the new one without a restart of a pod, and no handshake fails."""
    containers = [
        site.pod(*one)["status"]["containerStatuses"][0]["containerID"] for one in (("shop", "web"), ("bank", "till"))
    ]
    before = site.leaf("shop", "web")
    new = Signer.make("new pods of corp.example", begin=datetime.now(UTC) - timedelta(days=1))
    done = 0

    def both() -> bool:
        nonlocal done
        talk(site, ("shop", "web"), ("bank", "till"), tmp_path)
        talk(site, ("bank", "till"), ("shop", "web"), tmp_path)
        done += 2
        return True

    def have(count: int) -> bool:
        texts = [
            site.file(*one, "kubernetes.io~projected/roots/roots.pem") for one in (("shop", "web"), ("bank", "till"))
        ]
        return both() and all(text.count("BEGIN") == count for text in texts)

    pods.trust(site.place, site.ca, new)
    wait_for("both roots", lambda: have(2), seconds=ROOTS_SECONDS)
    made = site.bao.write("pods/config/ca", pem_bundle=(pem(new.certificate) + key_pem(new.key)).decode())
    [issuer] = made["data"]["imported_issuers"]
    site.bao.write("pods/config/issuers", default=issuer)
    restart_kubelet(site.node)  # or one would wait for half of the life

    def renewed() -> bool:
        leaves = [site.leaf("shop", "web"), site.leaf("bank", "till")]
        return both() and all(one.issuer == new.certificate.subject for one in leaves)

    wait_for("certificates below the new root", renewed, seconds=2 * SYNC_SECONDS)
    pods.trust(site.place, new)
    wait_for("the new root alone", lambda: have(1), seconds=ROOTS_SECONDS)
    assert site.leaf("shop", "web").serial_number != before.serial_number
    after = [
        site.pod(*one)["status"]["containerStatuses"][0]["containerID"] for one in (("shop", "web"), ("bank", "till"))
    ]
    assert after == containers
    assert done >= 6
