"""Nothing hostile is signed: a real API server that lets it through, and a CA that would sign whatever it gets."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from bridge.gateway.rules import CLIENT, CLIENT_KUBELET, SERVING
from tests.kit import cluster_api, gateways, hostile_csrs, openbao
from tests.kit.api_client import CSRS
from tests.kit.cluster_api import ClusterApi
from tests.kit.gateways import DOMAIN, Place, csr_pem, state_of
from tests.kit.hostile_csrs import CN, ORG, Asking, as_node, as_user

pytestmark = pytest.mark.kube("kube-apiserver", "etcd")

Tried = Callable[..., None]
#: Twins besides a worker's own: what is right beside the wrong ones of users and of the control plane.
OTHERS = {
    "alice": as_user("alice", CLIENT, csr_pem([(ORG, "developers"), (CN, "alice")])),
    "an issuer's bob": as_user("bob", CLIENT, csr_pem([(ORG, "developers"), (CN, "bob")]), "corp:issuers"),
    "a robot": as_user("alice", CLIENT, csr_pem([(CN, "robot")]), usages=("client auth",)),
    "an API server": as_node(
        "cp1",
        f"{DOMAIN}/apiserver",
        csr_pem(
            [(CN, "kube-apiserver")],
            [
                x509.DNSName("cp1"),
                x509.DNSName("kubernetes"),
                x509.DNSName("api.example.com"),
                *hostile_csrs.addresses("203.0.113.11", "10.96.0.1"),
            ],
        ),
    ),
    "the controller manager": as_node(
        "cp1",
        f"{DOMAIN}/controller-manager.conf",
        csr_pem([(CN, "system:kube-controller-manager")]),
        usages=("digital signature", "client auth"),
    ),
    "super-admin": as_user(
        "kubernetes-super-admin",
        f"{DOMAIN}/super-admin.conf",
        csr_pem([(ORG, "system:masters"), (CN, "kubernetes-super-admin")]),
        "system:masters",
        usages=("digital signature", "client auth"),
    ),
    "a control plane's own serving": as_node(
        "cp1",
        SERVING,
        csr_pem(
            gateways.node_subject("cp1"),
            [x509.DNSName("cp1"), *hostile_csrs.addresses("203.0.113.11")],
        ),
    ),
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterApi]:
    """With the rights that the documents name."""
    with cluster_api.running() as found:
        gateways.grant_rights(found)
        yield found


@pytest.fixture(scope="module")
def bao() -> Iterator[openbao.OpenBao]:
    """A CA that signs what it gets."""
    with openbao.dev_server() as found:
        yield found


def place_of(cluster: ClusterApi, bao: openbao.OpenBao, directory: Path, workers: list[str]) -> Place:
    """A gateway whose CA asks nothing (`sign-verbatim`), so that only the policy stands between."""
    place = Place(
        cluster=cluster,
        directory=directory,
        inventory=gateways.INVENTORY + gateways.workers(*workers),
        gateway={"requester_rate": 100_000, "node_rate": 100_000},
    ).with_vault(bao, f"pki-{directory.name}")
    place.tables = [table.replace('type = "vault"', 'type = "vault"\nmode = "sign-verbatim"') for table in place.tables]
    return place


def ask(cluster: ClusterApi, asking: Asking, name: str) -> bool:
    """Create the object as its requester; False: the API server itself refuses it."""
    made = gateways.body(asking.pem, asking.signer, usages=asking.usages, name=name)
    if asking.labels:
        claims = {"approved": "true", "certificates.k8s.io/approved": "true", "ca-bridge/approved": "yes"}
        made["metadata"] |= {"labels": {"approved": "true"}, "annotations": claims}
    headers = {"Impersonate-User": asking.user, "Impersonate-Group": asking.group}
    answer = cluster.client().ask("POST", CSRS, made, **headers)
    assert answer.status in {201, 403, 422, 400}, answer.text[-300:]
    return answer.status == 201


def states(cluster: ClusterApi) -> dict[str, Any]:
    """All objects by name."""
    return {one["metadata"]["name"]: one for one in cluster.client().get(CSRS)["items"]}


def test_nothing_hostile_is_signed(cluster: ClusterApi, bao: openbao.OpenBao, tmp_path: Path, tried: Tried) -> None:
    """At least 120 requests in one flood, half of them approved by another controller: none is signed, each twin is."""
    cases = hostile_csrs.cases()
    workers = [case.worker for case in cases]
    place = place_of(cluster, bao, tmp_path / "hostile", workers)
    for name in ("cp1", *workers):
        cluster.add_node(name)
    askings = {f"case-{number}": (case, case.make(case.worker)) for number, case in enumerate(cases)}
    there = [name for name, (_, asking) in askings.items() if ask(cluster, asking, name)]
    approved = there[::2]
    condition = {"type": "Approved", "status": "True", "reason": "AutoApproved", "message": "by another"}
    for name in approved:
        answer = cluster.client().patch(f"{CSRS}/{name}/approval", {"status": {"conditions": [condition]}})
        assert answer.ok, answer.text[-300:]

    with gateways.running(place) as gateway:
        left = {name for name in there if askings[name][1].wanted == "open"}
        gateway.until(
            lambda: answered(cluster, there) >= set(there) - left, 180, "wanted all hostile ones to be denied"
        )
        found = states(cluster)
        for name in there:
            case, asking = askings[name]
            wanted = "open" if asking.wanted == "open" else "failed" if name in approved else "denied"
            assert state_of(found[name]) == wanted, (case.name, found[name]["status"], gateway.text()[-2000:])
        assert_silent(found, there)
        twins = {f"twin-{case.worker}-{n}": hostile_csrs.honest(case.worker, signer)
                 for case in cases for n, signer in enumerate((CLIENT_KUBELET, SERVING))}  # fmt: skip
        twins |= {f"other-{n}": asking for n, asking in enumerate(OTHERS.values())}
        for name, asking in twins.items():
            assert ask(cluster, asking, name), name
        gateway.until(lambda: answered(cluster, list(twins)) >= set(twins), 300, "wanted all twins to be signed")
        found = states(cluster)
        assert {name: state_of(found[name]) for name in twins} == dict.fromkeys(twins, "signed")
        assert not [name for name in there if found[name]["status"].get("certificate")]
        assert not [line for line in gateway.audit() if line["event"] == "issued" and line["object"] in there]

    assert len(there) >= 120
    tried("hostile requests at the certificates API, none of them signed", len(there))


def answered(cluster: ClusterApi, names: list[str]) -> set[str]:
    """Those that are not open any more."""
    found = states(cluster)
    return {name for name in names if state_of(found[name]) != "open"}


def assert_silent(found: dict[str, Any], names: list[str]) -> None:
    """What the objects say gives nothing of the policy away."""
    said = {
        (one["reason"], one["message"])
        for name in names
        for one in found[name]["status"].get("conditions", [])
        if one["type"] in {"Denied", "Failed"}
    }
    assert said == {("NotAllowed", "not allowed")}


def test_denied_and_failed_are_final(cluster: ClusterApi, bao: openbao.OpenBao, tmp_path: Path) -> None:
    """The gateway leaves an honest request that is denied or failed as it is, though the API would take a certificate."""
    place = place_of(cluster, bao, tmp_path / "final", ["w9001", "w9002", "w9003"])
    for number, kind in ((9001, "Denied"), (9002, "Failed"), (9003, "")):
        cluster.add_node(f"w{number}")
        assert ask(cluster, hostile_csrs.honest(f"w{number}", CLIENT_KUBELET), f"final-{number}")
        condition = {"type": kind, "status": "True", "reason": "x", "message": "x"}
        if kind:
            path = f"{CSRS}/final-{number}/{'approval' if kind == 'Denied' else 'status'}"
            assert cluster.client().patch(path, {"status": {"conditions": [condition]}}).ok
    with gateways.running(place) as gateway:
        gateway.until(lambda: "final-9003" in answered(cluster, ["final-9003"]))
    found = states(cluster)
    assert [state_of(found[f"final-{n}"]) for n in (9001, 9002, 9003)] == ["denied", "failed", "signed"]


def test_a_flood_of_large_objects(cluster: ClusterApi, bao: openbao.OpenBao, tmp_path: Path) -> None:
    """A node fills the API server with requests of a megabyte: memory stays small, and others are served."""
    place = place_of(cluster, bao, tmp_path / "flood", ["w9101", "w9102"])
    cluster.add_node("w9101")
    cluster.add_node("w9102")
    large = csr_pem(gateways.node_subject("w9101"), [x509.DNSName(f"n{n}.example.com") for n in range(25_000)])
    for number in range(25):
        assert ask(cluster, as_node("w9101", SERVING, large), f"large-{number}")
    with gateways.running(place) as gateway:
        assert ask(cluster, hostile_csrs.honest("w9102", SERVING), "beside-the-flood")
        gateway.until(lambda: answered(cluster, ["beside-the-flood"]), 180)
        assert ask(cluster, hostile_csrs.honest("w9101", CLIENT_KUBELET), "of-the-same-node")
        gateway.until(lambda: answered(cluster, ["of-the-same-node"]), 180)
        assert gateway.peak_mb() < 150
        assert gateway.metric("requests_total", outcome="signed", signer=SERVING) >= 1
    found = states(cluster)
    assert {state_of(found[f"large-{number}"]) for number in range(25)} == {"open"}
    for number in range(25):
        cluster.client().ask("DELETE", f"{CSRS}/large-{number}")


def test_the_encodings_are_what_they_seem() -> None:
    """The odd requests reach the gateway as they were made: a test of the tests."""
    asking = next(
        c.make(c.worker) for c in hostile_csrs.cases() if c.name == "client: two CNs, a control plane's first"
    )
    der = base64.b64decode(b"".join(asking.pem.splitlines()[1:-1]))
    assert der.count(b"system:node:") == 2


def test_a_flood_of_one_keeps_no_other_out(cluster: ClusterApi, bao: openbao.OpenBao, tmp_path: Path) -> None:
    """A bootstrap token has more waiting than the queue can hold, and adds to it: a node is served at once."""
    place = place_of(cluster, bao, tmp_path / "lockout", ["w9201"])
    place.gateway = {}  # the rates that there are without settings
    cluster.add_node("w9201")
    asking = hostile_csrs.as_token(CLIENT_KUBELET, csr_pem([(CN, "x")]))
    headers = {"Impersonate-User": asking.user, "Impersonate-Group": asking.group}

    def flood(name: str, count: int, size: int = 55_000) -> None:
        for number in range(count):
            body = gateways.body(asking.pem, asking.signer, name=f"{name}-{number:03}")
            body["metadata"] |= {"annotations": {"x": "x" * size}, "labels": {"flood": "yes"}}
            assert cluster.client().ask("POST", CSRS, body, **headers).status == 201

    flood("aaa", 520)
    with gateways.running(place) as gateway:
        gateway.until(lambda: gateway.metric("requests_total", signer=CLIENT_KUBELET, outcome="denied") >= 120)
        flood("aab", 140)
        flood("aac", 100, 1_000)  # into what is left between the large ones
        gateway.until(lambda: f"most of them by {asking.user}" in gateway.text())
        names = ("beside-client", "beside-serving")
        for name, signer in zip(names, (CLIENT_KUBELET, SERVING), strict=True):
            assert ask(cluster, hostile_csrs.honest("w9201", signer), name)
        gateway.until(lambda: {state_of(gateways.read(cluster, name)) for name in names} == {"signed"}, 180)
        assert gateway.metric("queue", state="waiting") > 300
    assert cluster.client().ask("DELETE", f"{CSRS}?labelSelector=flood%3Dyes").ok
