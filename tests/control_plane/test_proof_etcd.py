"""`prove` and real etcd members on loopback: who accepts whose certificates, with and without a quorum."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from bridge.control_plane import proof
from bridge.control_plane.proof import ProofFinding
from bridge.pki.certificates import load_pem_certificates
from bridge.specs import Component
from bridge.system.waiting import wait_until
from tests.kit import issuing, members
from tests.kit.issuing import Signer
from tests.kit.loopback import free_port
from tests.kit.members import Cluster, Place

pytestmark = pytest.mark.kube("etcd")


def made(directory: Path, count: int) -> Cluster:
    client_port, peer_port, api_port = free_port(), free_port(), free_port()
    return members.make(directory, count, client_port=client_port, peer_port=peer_port, api_port=api_port)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with members.running(made(tmp_path_factory.mktemp("cluster"), 3)) as running:
        yield running


@pytest.fixture
def cluster(three: Cluster) -> Iterator[Cluster]:
    """Three members that are well, and are made so again."""
    yield three
    three.mend()


def etcd(place: Place) -> dict[str, ProofFinding]:
    """What is found about etcd, and about its people's client, by certificate and what."""
    report = proof.look(place.node, place.settings(), datetime.now(UTC))
    return {
        f"{finding.certificate} {finding.what}": finding
        for finding in report.findings
        if finding.component is Component.ETCD or finding.certificate == "etcd-healthcheck-client"
    }


def states(place: Place) -> dict[str, str]:
    return {what: finding.state for what, finding in etcd(place).items()}


def etcd_once(place: Place, is_seen: Callable[[dict[str, ProofFinding]], bool]) -> dict[str, ProofFinding]:
    """The findings, once they are so: members notice a moment later that another one is away, or was."""
    found = wait_until(lambda: etcd(place), is_seen, timedelta(minutes=3), pause_seconds=0.2)
    assert is_seen(found), found
    return found


def all_current(found: dict[str, ProofFinding]) -> bool:
    return {finding.state for finding in found.values()} == {"current"}


def test_all_is_well(cluster: Cluster) -> None:
    """The report has the member's served certificate, its client certificates, and the name of each peer that accepts its peer certificate."""
    place = cluster.places[0]
    found = etcd_once(place, all_current)
    assert len(found) == 5
    peers = found["etcd-peer is accepted by its peers"].detail
    assert all(f"https://{one.address}:" in peers for one in cluster.places)


def test_a_peer_that_is_away_is_no_fault_of_this_node(cluster: Cluster) -> None:
    """The report names the missing peer, and finds nothing else wrong."""
    cluster.places[2].kill_etcd()
    found = etcd_once(cluster.places[0], all_current)
    assert f"https://{cluster.places[2].address}:" in found["etcd-peer is accepted by its peers"].detail
    assert "connection refused" in found["etcd-peer is accepted by its peers"].detail


def test_without_a_quorum_etcd_does_not_answer(cluster: Cluster) -> None:
    """It still shows its certificate, which is its file's."""
    for place in cluster.places[1:]:
        place.kill_etcd()
    clients = ("etcd-server is accepted by etcd", "etcd-healthcheck-client is accepted by etcd")
    found = etcd_once(cluster.places[0], lambda seen: all(seen[what].state == "no-answer" for what in clients))
    assert {finding.state for what, finding in found.items() if " serves " in what} == {"current"}


@pytest.mark.parametrize("base", ["peer", "server"])
def test_a_new_certificate_is_served_at_once(cluster: Cluster, base: str) -> None:
    """etcd serves it at once, and the served certificate is compared with the file of this moment."""
    place = cluster.places[0]
    with replaced(place, base):
        etcd_once(place, all_current)


def test_a_name_that_peers_refuse(cluster: Cluster) -> None:
    """They compare the certificate's names with the address that its owner comes from, and end the connection."""
    place = cluster.places[1]  # on loopback all members connect from the first one's address
    with replaced(place, "peer", sans=[x509.IPAddress(ipaddress.ip_address(place.address))]):
        found = etcd_once(place, lambda seen: seen["etcd-peer is accepted by its peers"].state == "refused")
    assert found[f"etcd-peer serves {_peer_place(found)}"].state == "current"
    assert "ends the connection once it has seen it" in found["etcd-peer is accepted by its peers"].detail


def _peer_place(found: dict[str, ProofFinding]) -> str:
    (served,) = (what for what in found if what.startswith("etcd-peer serves "))
    return served.removeprefix("etcd-peer serves ")


def test_a_peer_that_does_not_show_its_own_name_is_refused(cluster: Cluster) -> None:
    """A peer that connects wants the advertised address in the certificate."""
    place = cluster.places[0]
    with replaced(place, "peer", sans=[x509.DNSName("elsewhere.example.com")]):
        found = etcd_once(place, lambda seen: seen["etcd-peer is accepted by its peers"].state == "refused")
    assert found[f"etcd-peer serves {_peer_place(found)}"].state == "refused"


def test_a_client_of_another_ca_is_refused(cluster: Cluster) -> None:
    """TLS itself refuses it."""
    place = cluster.places[0]
    healthcheck = place.pki_dir / "etcd/healthcheck-client"
    before = {suffix: healthcheck.with_suffix(suffix).read_bytes() for suffix in (".crt", ".key")}
    for suffix in before:
        healthcheck.with_suffix(suffix).write_bytes((place.pki_dir / f"front-proxy-client{suffix}").read_bytes())
    refused = {"etcd-healthcheck-client is accepted by etcd": "refused"}
    try:
        etcd_once(place, lambda seen: {k: one.state for k, one in seen.items() if one.state != "current"} == refused)
    finally:
        for suffix, content in before.items():
            healthcheck.with_suffix(suffix).write_bytes(content)


def test_http_has_ports_of_its_own(tmp_path: Path) -> None:
    """Those ports are asked then, and the certificate is checked on all of them."""
    files = made(tmp_path, 1)
    (place,) = files.places
    http_port = free_port()
    place.add_etcd_flags(listen_client_http_urls=f"https://{place.address}:{http_port}")
    grpc_port, files.client_port = files.client_port, http_port
    with members.running(files):
        found = states(place)
    assert set(found.values()) == {"current"}
    assert {f"etcd-server serves {place.address}:{port}" for port in (grpc_port, http_port)} <= found.keys()


@contextlib.contextmanager
def replaced(place: Place, base: str, *, sans: Sequence[x509.GeneralName] | None = None) -> Iterator[None]:
    """Another certificate for the same key, for a while."""
    path = place.pki_dir / "etcd" / f"{base}.crt"
    before = path.read_bytes()
    ca = place.cas["etcd-ca"]
    signer = Signer(certificate=ca.certificate, key=ca.key)
    path.write_bytes(issuing.signed_again(load_pem_certificates(before)[0], signer, sans=sans))
    try:
        yield
    finally:
        path.write_bytes(before)
