"""
Control-plane nodes on loopback, as far as their files and their etcd members go: real etcd processes, no kubelet.

Node k has the address 127.0.0.k; ports are the same on all nodes, as kubeadm has it.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import yaml

from bridge.cluster import Client
from bridge.node import inventory, sample_pki
from bridge.node.endpoints import Server
from bridge.node.inventory import Node
from bridge.node.sample_pki import ThrowawayCA
from bridge.pki.certificates import pem
from bridge.pki.csr import generate_key, key_pem
from bridge.settings import load
from bridge.settings.tables import Settings
from bridge.specs import AUTHORITIES, ETCD_CA, SPECS, Component
from bridge.system import http, tls
from tests.kit import programs
from tests.kit.pki import PKI_SPECS

_START_SECONDS = 180


@dataclass(kw_only=True)
class Place:
    """What is on one node."""

    name: str
    address: str
    directory: Path
    cas: dict[str, ThrowawayCA]
    process: subprocess.Popen[bytes] | None = None

    @property
    def kubeconfig_dir(self) -> Path:
        """Takes the place of `/etc/kubernetes`."""
        return self.directory / "kubernetes"

    @property
    def pki_dir(self) -> Path:
        """Takes the place of `/etc/kubernetes/pki`."""
        return self.kubeconfig_dir / "pki"

    @property
    def node(self) -> Node:
        """What the program reads of it."""
        return inventory.read(self.pki_dir, self.kubeconfig_dir)

    def settings(self, rules: str = "") -> Settings:
        """The program's, with these lines in `[cluster]`."""
        return load.parse(
            f'[node]\nname = "{self.name}"\npki_dir = "{self.pki_dir}"\nkubeconfig_dir = "{self.kubeconfig_dir}"\n'
            f'state_dir = "{self.directory}/state"\n[cluster]\n{rules}\n'
        )

    def become_etcd_host(self) -> None:
        """Leave what kubeadm's "Set up a High Availability etcd Cluster" leaves on a host: etcd's own files, and a client pair."""
        keep = {"etcd", "apiserver-etcd-client.crt", "apiserver-etcd-client.key"}
        for path in self.pki_dir.iterdir():
            if path.name not in keep:
                path.unlink()
        for path in (*self.kubeconfig_dir.glob("*.conf"), self.kubeconfig_dir / "manifests/kube-apiserver.yaml"):
            path.unlink()

    def add_etcd_flags(self, **flags: str) -> None:
        """Into the manifest; `_` stands for a hyphen."""
        path = self.kubeconfig_dir / "manifests/etcd.yaml"
        pod = yaml.safe_load(path.read_text())
        words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        pod["spec"]["containers"][0]["command"] += words
        path.write_text(yaml.safe_dump(pod))

    def start_etcd(self) -> None:
        """Start what the manifest says."""
        pod = yaml.safe_load((self.kubeconfig_dir / "manifests/etcd.yaml").read_text())
        program, *arguments = pod["spec"]["containers"][0]["command"]
        with (self.directory / "etcd.log").open("ab") as log:
            self.process = subprocess.Popen([programs.require(program), *arguments], stdout=log, stderr=log)

    def kill_etcd(self) -> None:
        """As a machine that goes away."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@dataclass(kw_only=True)
class Cluster:
    """Several of them."""

    places: list[Place]
    client_port: int
    api_port: int
    pems: dict[str, bytes] = field(repr=False)

    def etcd(self, place: Place, path: str, body: bytes = b"{}") -> http.Answer:
        """Ask a member as kubeadm's healthcheck client."""
        url = f"https://{place.address}:{self.client_port}{path}"
        return self._ask(url, "POST", body)

    def wait_until_healthy(self, place: Place) -> None:
        """
        Wait for a member with a quorum.

        Raises:
            AssertionError: None in time.
        """
        url = f"https://{place.address}:{self.client_port}/health"
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end:
            with contextlib.suppress(tls.HttpsError):
                if self._ask(url).status == 200:
                    return
            time.sleep(0.1)
        log = (place.directory / "etcd.log").read_text()[-2000:]
        raise AssertionError(f"wanted a healthy member at {url} within {_START_SECONDS} s\n{log}")

    def mend(self) -> None:
        """
        Start those that are dead, and wait until all are well.

        Raises:
            AssertionError: One is not, in time.
        """
        for place in self.places:
            if place.process is None:
                place.start_etcd()
        for place in self.places:
            self.wait_until_healthy(place)

    def _ask(self, url: str, method: str = "GET", body: bytes | None = None) -> http.Answer:
        client = Client(
            name="member",
            trust_pem=self.pems["trust"],
            certificate_pem=self.pems["certificate"],
            key_pem=self.pems["key"],
        )
        return client.ask(Server(url), "", method=method, body=body, seconds=60)


def make(directory: Path, count: int, *, client_port: int, peer_port: int, api_port: int) -> Cluster:
    """
    Write the files of nodes 1 to `count`, with one set of CAs.

    Args:
        directory: Empty.
        count: At most 9.
        client_port: etcd's.
        peer_port: etcd's.
        api_port: The API servers'.
    """
    begin, end = datetime.now(UTC), datetime.now(UTC) + timedelta(hours=1)
    places: list[Place] = []
    peers: list[str] = []
    for number in range(1, count + 1):
        address = f"127.0.0.{number}"
        cluster = sample_pki.Cluster(node=f"cp-{number}", address=address, endpoint=f"127.0.0.1:{api_port}")
        home = directory / cluster.node
        place = Place(name=cluster.node, address=address, directory=home, cas=places[0].cas if places else {})
        if not places:
            place.cas = sample_pki.make(
                place.kubeconfig_dir, now=begin, not_after=end, key="ecdsa-p256", cluster=cluster
            )
        else:
            _write_node(place, cluster, begin, end)
        peers.append(f"{place.name}=https://{address}:{peer_port}")
        places.append(place)
    for place in places:
        _write_manifests(place, peers, client_port, peer_port, api_port)
    pki = places[0].pki_dir
    base = SPECS["etcd-healthcheck-client"].base
    pems = {
        "trust": (pki / ETCD_CA.certificate_file).read_bytes(),
        "certificate": (pki / f"{base}.crt").read_bytes(),
        "key": (pki / f"{base}.key").read_bytes(),
    }
    return Cluster(places=places, client_port=client_port, api_port=api_port, pems=pems)


def _write_node(place: Place, cluster: sample_pki.Cluster, begin: datetime, end: datetime) -> None:
    for name, ca in place.cas.items():
        sample_pki._write(place.pki_dir / AUTHORITIES[name].certificate_file, ca.certificate_pem, 0o644)
    for name, spec in PKI_SPECS.items():
        ca, key = place.cas[spec.authority.name], generate_key("ecdsa-p256")
        leaf = sample_pki.leaf_certificate(spec, key, ca, cluster, not_before=begin, not_after=end)
        if spec.kubeconfig:
            data = sample_pki._kubeconfig(name, leaf, key, ca, cluster)
            sample_pki._write(place.kubeconfig_dir / spec.base, data, 0o600)
        else:
            sample_pki._write(place.pki_dir / f"{spec.base}.crt", pem(leaf), 0o644)
            sample_pki._write(place.pki_dir / f"{spec.base}.key", key_pem(key), 0o600)


def _write_manifests(place: Place, peers: list[str], client_port: int, peer_port: int, api_port: int) -> None:
    pki, address = place.pki_dir / "etcd", place.address
    client, peer = f"https://{address}:{client_port}", f"https://{address}:{peer_port}"
    etcd = {
        "name": place.name,
        "data-dir": place.directory / "data",
        "listen-client-urls": client,
        "advertise-client-urls": client,
        "listen-peer-urls": peer,
        "initial-advertise-peer-urls": peer,
        "initial-cluster": ",".join(peers),
        "listen-metrics-urls": f"http://{address}:0",
        "cert-file": pki / "server.crt",
        "key-file": pki / "server.key",
        "trusted-ca-file": pki / "ca.crt",
        "client-cert-auth": "true",
        "peer-cert-file": pki / "peer.crt",
        "peer-key-file": pki / "peer.key",
        "peer-trusted-ca-file": pki / "ca.crt",
        "peer-client-cert-auth": "true",
        "unsafe-no-fsync": "true",
        # An idle machine needs a tenth of that, one that builds programs at the same time all of it.
        "heartbeat-interval": 200,
        "election-timeout": 2000,
    }
    apiserver = {"advertise-address": address, "secure-port": api_port}
    for component, tag, flags in (
        (Component.ETCD, "3.7.3-0", etcd),
        (Component.APISERVER, "v1.37.2", apiserver),
    ):
        command = [component.value, *(f"--{name}={value}" for name, value in flags.items())]
        container = {"name": component.value, "image": f"{component.value}:{tag}", "command": command}
        path = place.kubeconfig_dir / "manifests" / f"{component.value}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump({"spec": {"containers": [container]}}))


@contextlib.contextmanager
def running(cluster: Cluster) -> Iterator[Cluster]:
    """With all members up, and none at the end."""
    try:
        for place in cluster.places:
            place.start_etcd()
        for place in cluster.places:
            cluster.wait_until_healthy(place)
        yield cluster
    finally:
        for place in cluster.places:
            place.kill_etcd()
