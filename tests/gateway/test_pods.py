"""The gateway as signer of PodCertificateRequests, with a real API server, real rights and real CAs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from bridge.pki.certificates import is_for
from tests.kit import cluster_api, gateways, hostile_pods, openbao, pods
from tests.kit.cluster_api import ClusterApi
from tests.kit.gateways import Gateway, Place
from tests.kit.issuing import Signer
from tests.kit.openbao import OpenBao
from tests.kit.pods import SIGNER, Pod, condition, make_pod, outcome

pytestmark = pytest.mark.kube("kube-apiserver", "etcd")

_MOUNTS = itertools.count(1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterApi]:
    """With the rights that the documents name."""
    with cluster_api.running() as found:
        gateways.grant_rights(found)
        pods.grant_rights(found)
        yield found


@pytest.fixture(scope="module")
def bao() -> Iterator[OpenBao]:
    """One server, with a mount for each CA."""
    with openbao.dev_server() as found:
        yield found


@pytest.fixture(scope="module")
def ca() -> Signer:
    """The pods' own, which the cluster's components don't know."""
    return Signer.make("pods of corp.example", begin=datetime.now(UTC) - timedelta(days=1))


@pytest.fixture
def place(cluster: ClusterApi, bao: OpenBao, ca: Signer, tmp_path: Path) -> Place:
    """Settings with OpenBao."""
    return pods.with_vault(pods.place(cluster, tmp_path), bao, ca, f"pods-{next(_MOUNTS)}")


def until(gateway: Gateway, pod: Pod, name: str, wanted: str = "Issued") -> dict[str, Any]:
    """The request with this outcome."""
    gateway.until(lambda: outcome(pod.read(name)) == wanted, what=f"wanted {name} to be {wanted}")
    return pod.read(name)


def test_a_pod_gets_its_identity(cluster: ClusterApi, place: Place, ca: Signer) -> None:
    """Namespace and service account make the SPIFFE ID; the policy gives one of the accounts DNS names besides."""
    web, till = make_pod(cluster), make_pod(cluster, "bank", "till")
    with gateways.running(place) as gateway:
        found = until(gateway, web, web.ask())
        leaf = pods.chain(found)[0]
        leaf.verify_directly_issued_by(ca.certificate)
        assert is_for(leaf, x509.load_pem_x509_csr(gateways.csr_pem([], key=web.key)))
        assert set(pods.names(leaf)) == {
            f"UniformResourceIdentifier:spiffe://{pods.TRUST_DOMAIN}/ns/shop/sa/web",
            "DNSName:web.shop.svc", f"DNSName:{web.name}.web.shop.svc",
        }  # fmt: skip
        assert leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).critical
        usages = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert set(usages) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
        status = found["status"]
        begin, end, refresh = (
            datetime.fromisoformat(status[key]) for key in ("notBefore", "notAfter", "beginRefreshAt")
        )
        assert (begin, end) == (leaf.not_valid_before_utc, leaf.not_valid_after_utc)
        assert timedelta(hours=23, minutes=40) < end - begin <= timedelta(hours=24)
        assert abs(refresh - (begin + (end - begin) / 2)) <= timedelta(seconds=1)
        assert condition(found) == ("PolicyAllows", "")
        other = pods.chain(until(gateway, till, till.ask()))[0]
        assert pods.names(other) == [f"UniformResourceIdentifier:spiffe://{pods.TRUST_DOMAIN}/ns/bank/sa/till"]
        gateway.until(lambda: len(gateway.audit()) == 6)
        assert [line["event"] for line in gateway.audit()] == ["asked", "issued", "installed"] * 2
        assert (
            gateway.audit()[0] | {"namespace": "shop", "pod": web.name, "serviceAccount": "web"} == gateway.audit()[0]
        )
        assert gateway.audit()[0]["requester"] == "system:node:w1"
        assert gateway.metric("requests_total", signer=SIGNER, outcome="signed") == 2


@pytest.mark.attack("P1")
def test_nothing_hostile_is_signed(
    cluster: ClusterApi, bao: OpenBao, ca: Signer, tmp_path: Path, tried: Callable[..., None]
) -> None:
    """Stolen nodes and users who may create requests, with a CA that signs whatever it is asked for: none is signed, each twin is."""
    wide = {"allowed_uri_sans": ["*"], "allow_any_name": True, "max_ttl": "8760h"}
    place = pods.with_vault(pods.place(cluster, tmp_path), bao, ca, f"pods-{next(_MOUNTS)}", **wide)
    place.gateway |= {"node_rate": 10_000, "pod_rate": 100_000, "pod_namespace_rate": 100_000}
    make_pod(cluster, "bank", "till", name="elsewhere")
    make_pod(cluster, "shop", "admin", "w2")
    other = cluster.client("mallory", "system:masters")
    hostile: dict[str, tuple[Pod, str]] = {}
    honest: dict[str, tuple[Pod, str]] = {}
    for case in hostile_pods.cases():
        sources = [pods.source(**one) for one in case.pod.get("sources", [])]
        pod = make_pod(cluster, **{**case.pod, "sources": sources})
        content = case.make(pod)
        case.before(pod)
        what = f"{case.what}, by {case.who}"
        hostile[what] = (pod, pod.ask(other if case.who == hostile_pods.OTHER else None, **content))
        if case.twin:
            honest[what] = (pod, pod.ask())
    with gateways.running(place) as gateway:
        for what, (pod, name) in honest.items():
            gateway.until(lambda: outcome(pod.read(name)) == "Issued", 60, what)  # noqa: B023
        said = {line.get("request") for line in gateway.lines()}
        for what, (pod, name) in hostile.items():
            uid = pod.read(name)["metadata"]["uid"]
            gateway.until(lambda: uid in said or uid in gateway.text(), 30, what)  # noqa: B023
    found = {what: outcome(pod.read(name)) for what, (pod, name) in hostile.items()}
    assert set(found.values()) <= {"Denied", ""}, found
    assert len(found) >= 80
    assert sum(one == "Denied" for one in found.values()) >= 60, found
    tried("requests for pods that must not be signed, each beside an honest one", len(found))
