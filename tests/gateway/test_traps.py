"""What the API server lets happen between two looks of a gateway: names used again, rights withdrawn, nodes that lie."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from bridge.cluster.api import Api, NoAnswerError
from bridge.gateway import watch
from bridge.gateway.rules import CLIENT_KUBELET, SERVING
from bridge.gateway.watch import Watch
from tests.kit import api_proxy, cluster_api, gateways, hostile_csrs
from tests.kit.api_client import CSRS
from tests.kit.cluster_api import ClusterApi
from tests.kit.desk_program import DeskProgram
from tests.kit.gateways import Gateway, Place, csr_pem, node_subject, read, state_of
from tests.kit.nodes import wait_for

pytestmark = pytest.mark.kube("kube-apiserver", "etcd")

BINDINGS = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings"
BINDING, ALL_USERS = f"{BINDINGS}/{gateways.USER}", f"{BINDINGS}/all-users-ask"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ClusterApi]:
    """With the rights that the documents name, and the node w1."""
    with cluster_api.running(tmp_path / "cluster") as found:
        gateways.grant_rights(found)
        found.add_node("w1")
        yield found


@pytest.fixture
def place(cluster: ClusterApi, tmp_path: Path) -> Place:
    """For a gateway that knows w1, and a CA that signs what it gets."""
    desk = DeskProgram.make(tmp_path / "desk", cluster.ca, cluster.cas["front-proxy-ca"])
    inventory = gateways.INVENTORY + gateways.workers("w1")
    return Place(cluster=cluster, directory=tmp_path / "gateway", inventory=inventory, tables=[desk.tables])


def ask(cluster: ClusterApi, signer: str, pem: bytes, name: str = "") -> str:
    """As w1, by its own certificate; the object's name."""
    made = cluster.client("system:node:w1", "system:nodes").create(CSRS, gateways.body(pem, signer, name=name))
    return str(made["metadata"]["name"])


def until(gateway: Gateway, cluster: ClusterApi, name: str, state: str) -> None:
    """What becomes of an object."""
    gateway.until(lambda: state_of(read(cluster, name)) == state, 180, f"wanted {name} to be {state}")


def test_a_node_says_of_itself_what_it_likes(cluster: ClusterApi, place: Place) -> None:
    """The API server takes any address into `Node.status`; none of them is signed for what stands there."""
    reported = {
        "InternalIP": ["10.96.0.1", "198.51.0.99", gateways.address_of("w1")],
        "InternalDNS": ["kubernetes.default.svc", "auth.company.example"],
    }
    addresses = [{"type": kind, "address": one} for kind, some in reported.items() for one in some]
    itself = cluster.client("system:node:w1", "system:nodes")
    answer = itself.patch("/api/v1/nodes/w1/status", {"status": {"addresses": addresses}})
    assert answer.ok, answer.text
    own = hostile_csrs.honest_sans("w1")
    wanted = {
        "10.96.0.1": "denied",
        "kubernetes.default.svc": "denied",
        "198.51.0.99": "open",
        "auth.company.example": "open",
    }
    with gateways.running(place) as gateway:
        for text, state in wanted.items():
            san = hostile_csrs.addresses(text) if text[0].isdigit() else [x509.DNSName(text)]
            name = ask(cluster, SERVING, csr_pem(node_subject("w1"), [*own, *san]))
            seen = "left alone" if state == "open" else "denied"
            uid = read(cluster, name)["metadata"]["uid"]
            gateway.until(lambda: any(line.get("request") == uid for line in gateway.lines()), what=f"{text}: {seen}")  # noqa: B023
            until(gateway, cluster, name, state)
        until(gateway, cluster, ask(cluster, SERVING, csr_pem(node_subject("w1"), own)), "signed")
        found = {one["metadata"]["name"]: state_of(one) for one in cluster.client().get(CSRS)["items"]}
    assert sorted(found.values()) == ["denied", "denied", "open", "open", "signed"]


def test_a_namesake_gets_nothing(cluster: ClusterApi, place: Place) -> None:
    """
    In the moment of the write the object is deleted, and its name is another's.

    A patch without uid would be stored there; ours is refused, and the newcomer is judged by itself.
    """
    with api_proxy.between(cluster, gateways.USER) as proxy:
        place.gateway |= {"kubeconfig": str(proxy.kubeconfig(cluster, gateways.USER)), "lease": False}
        foreign = csr_pem(node_subject("w1"), [*hostile_csrs.honest_sans("w1"), x509.DNSName("auth.company.example")])
        swapped: list[str] = []

        def swap(method: str, path: str) -> None:
            if method == "PATCH" and path.endswith("/one-name/status") and not swapped:
                uid = read(cluster, "one-name")["metadata"]["uid"]
                assert cluster.client().ask("DELETE", f"{CSRS}/one-name").ok
                ask(cluster, SERVING, foreign, name="one-name")
                swapped.append(uid)

        proxy.before = swap
        with gateways.running(place) as gateway:
            ask(cluster, CLIENT_KUBELET, csr_pem(node_subject("w1")), name="one-name")
            gateway.until(lambda: swapped, 180, "wanted a write")
            uid = read(cluster, "one-name")["metadata"]["uid"]
            assert uid != swapped[0]
            gateway.until(lambda: any(line.get("request") == uid for line in gateway.lines()), 180)
            twin = ask(cluster, CLIENT_KUBELET, csr_pem(node_subject("w1")), name="another-name")
            until(gateway, cluster, twin, "signed")
            assert [one["event"] for one in gateway.audit() if one["request"] == swapped[0]] == ["asked", "issued"]
        assert read(cluster, "one-name")["status"].get("certificate") is None
        assert state_of(read(cluster, "one-name")) == "open"


def test_hostile_requests_keep_no_kubelet_waiting(cluster: ClusterApi, place: Place) -> None:
    """
    After the API server was away a node's honest request is there, and newer ones in its name that the gateway will not sign.

    The newest of a node is the one that its kubelet reads, but only among those that may be signed.
    """
    own = hostile_csrs.honest_sans("w1")
    honest = ask(cluster, SERVING, csr_pem(node_subject("w1"), own))
    time.sleep(1.1)  # objects' times are whole seconds
    names = ["kubernetes.default.svc", "auth.company.example"] * 3
    newer = [ask(cluster, SERVING, csr_pem(node_subject("w1"), [*own, x509.DNSName(name)])) for name in names]
    with gateways.running(place) as gateway:
        until(gateway, cluster, honest, "signed")
        for name in newer[::2]:
            until(gateway, cluster, name, "denied")
    assert {state_of(read(cluster, name)) for name in newer[1::2]} == {"open"}


def test_a_watch_outlives_the_rights(cluster: ClusterApi, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A running watch goes on delivering without any right, so that each has an end; the next one is refused."""
    api = Api.of_gateway(cluster.kubeconfig(gateways.USER))
    with monkeypatch.context() as patch:
        patch.setattr(watch, "ROUND_SECONDS", 1)
        Watch(api, [CLIENT_KUBELET]).run(lambda _: None, lambda _: None)  # the API server ends it
    round_ = Watch(api, [CLIENT_KUBELET])
    seen: list[str] = []
    admin, body = cluster.client(), cluster.client().get(BINDING)
    asked = csr_pem(node_subject("w1"))

    def withdraw() -> None:
        if not seen:
            seen.append("alive")
            assert admin.ask("DELETE", BINDING).ok
            assert admin.ask("DELETE", ALL_USERS).ok
            wait_for("rights that are gone", lambda: cluster.client(gateways.USER).ask("GET", CSRS).status == 403)
            ask(cluster, CLIENT_KUBELET, asked, name="behind-the-rights")

    def changed(one: watch.ApiObject) -> None:
        seen.append(one.name)
        round_.end()

    monkeypatch.setattr(round_, "_is_alive", withdraw)
    round_.run(changed, lambda _: None)
    assert seen == ["alive", "behind-the-rights"]
    with pytest.raises(NoAnswerError):
        Watch(api, [CLIENT_KUBELET]).run(changed, lambda _: None)

    del body["metadata"]["resourceVersion"], body["metadata"]["uid"]
    admin.create(BINDINGS, body)
    with gateways.running(place) as gateway:
        until(gateway, cluster, "behind-the-rights", "signed")  # the twin


def test_a_gateway_without_rights_writes_nothing(cluster: ClusterApi, place: Place) -> None:
    """Rights that go while it works: what it still hears of is left, it says why, and goes on when they are back."""
    admin, body = cluster.client(), cluster.client().get(BINDING)
    with gateways.running(place) as gateway:
        assert admin.ask("DELETE", BINDING).ok
        refused = f"{CSRS}/no-such-request/approval"  # 404 for who may
        who = cluster.client(gateways.USER)
        wait_for("rights that are gone", lambda: who.patch(refused, {}).status == 403)
        name = ask(cluster, CLIENT_KUBELET, csr_pem(node_subject("w1")))
        gateway.until(lambda: _said(gateway, "HTTP 403"), 180, "wanted it to say what it lacks")
        assert (state_of(read(cluster, name)), read(cluster, name)["status"]) == ("open", {})
        del body["metadata"]["resourceVersion"], body["metadata"]["uid"]
        admin.create(BINDINGS, body)
        until(gateway, cluster, name, "signed")


def _said(gateway: Gateway, word: str) -> bool:
    lines: list[dict[str, Any]] = gateway.lines()
    return any(word in str(line) for line in lines)
