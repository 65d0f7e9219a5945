"""PKIs that the real kubeadm made, renewed whole through the certificates API of another cluster, where our gateway signs."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from bridge.specs import AUTHORITIES
from bridge.system.waiting import wait_until
from tests.kit import gateways, kube_api
from tests.kit.api_client import ApiClient
from tests.kit.cas import Bridge, live_certificates
from tests.kit.gateways import Place, state_of
from tests.kit.kube_api import ApiServer
from tests.kit.pki import NODE, PKI_SPECS, KubeadmPki, kubeadm_pki
from tests.kit.renewed import Snapshot, assert_renewed

pytestmark = pytest.mark.kube("kubeadm", "kube-apiserver", "etcd", "kubectl")

DOMAIN = "ca-bridge.example.com"
SIGNERS = {name: f"{DOMAIN}/{name}" for name in PKI_SPECS}
ACCOUNT = f"system:serviceaccount:ca-bridge:ca-bridge-{NODE}"


@pytest.fixture
def pki(tmp_path: Path) -> KubeadmPki:
    """A control plane's PKI, its CA keys elsewhere."""
    return kubeadm_pki(tmp_path / "node")


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """Another cluster, with the rights of a gateway."""
    with kube_api.serving(tmp_path_factory.mktemp("signing-cluster")) as server:
        gateways.grant_rights(server.cluster)
        yield server


@pytest.fixture
def place(api: ApiServer, pki: KubeadmPki, tmp_path: Path) -> Place:
    """For a gateway that signs by `openssl ca` with the three CAs, and proves each answer with their certificates."""
    return gateways.for_control_planes(api.cluster, pki, tmp_path / "gateway", gateways.page_policy())


def bridge_with(pki: KubeadmPki, api: ApiServer, directory: Path, account: str = f"ca-bridge-{NODE}") -> Bridge:
    """Settings with the other cluster for all authorities, where what `setup kubernetes` prints is applied."""
    bridge = Bridge(pki=pki, directory=directory)
    url, trust, token = api.url, str(api.trust), bridge.secret("token", "none yet")
    who = {"url": url, "ca_file": trust, "token_file": token}
    bridge.add("backend.cluster", {"type": "kubernetes", "wait": "5m", "retry_for": "5s", **who})
    for authority in AUTHORITIES:
        bridge.add(f"authority.{authority}", {"backend": "cluster", "signer": f"{DOMAIN}/{{name}}"})
    for authority in AUTHORITIES:
        printed = bridge.run("setup", "kubernetes", "--authority", authority)
        assert printed.returncode == 0, printed.stderr
        api.apply(printed.stdout)
    if account != f"ca-bridge-{NODE}":
        api.apply(f"{{apiVersion: v1, kind: ServiceAccount, metadata: {{name: {account}, namespace: ca-bridge}}}}")
    who_asks = api.bearer("ca-bridge", account)
    bridge.secret("token", who_asks.token)
    if account == f"ca-bridge-{NODE}":
        until_it_may(who_asks)
    return bridge


def until_it_may(client: ApiClient) -> None:
    """The authorizer hears of a binding a moment after it was written."""
    assert wait_until(lambda: client.may("create"), bool, timedelta(minutes=3), pause_seconds=0.1)


def test_renews_everything_through_our_gateway(pki: KubeadmPki, api: ApiServer, place: Place, tmp_path: Path) -> None:
    """One run: every certificate is asked for by a signer name of its own, approved, signed and proven; kubeadm takes them."""
    bridge, before = bridge_with(pki, api, tmp_path / "bridge"), Snapshot.of(pki)
    doctor = bridge.run("doctor")
    assert "cluster (kubernetes)" in doctor.stdout + doctor.stderr
    with gateways.running(place) as gateway:
        run = bridge.run("renew", "all")
        assert run.returncode == 0, run.stderr + gateway.text()[-3000:]
    assert_renewed(pki, before, tmp_path / "scratch")
    issued = [line for line in gateway.audit() if line["event"] == "issued"]
    assert sorted(line["name"] for line in issued) == sorted(PKI_SPECS)
    assert api.admin.csrs() == []  # answered objects are removed


def test_another_nodes_account_gets_nothing(pki: KubeadmPki, api: ApiServer, place: Place, tmp_path: Path) -> None:
    """
    The same requests by the account of a node that the inventory does not have, and may ask these signers: each is denied,
    and nothing moves.
    """
    bridge, before = bridge_with(pki, api, tmp_path / "bridge", account="ca-bridge-cp-9"), live_certificates(pki)
    # the right to ask at last: bindings count in the order in which they were written
    for role in (*(f"ca-bridge-{NODE}:{authority}" for authority in AUTHORITIES), "ca-bridge-requester"):
        binding = (
            f'{{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRoleBinding, metadata: {{name: "cp-9-{role}"}}, '
        )
        binding += f'roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: "{role}"}}, '
        api.apply(binding + "subjects: [{kind: ServiceAccount, name: ca-bridge-cp-9, namespace: ca-bridge}]}")
    until_it_may(api.bearer("ca-bridge", "ca-bridge-cp-9"))
    with gateways.running(place) as gateway:
        run = bridge.run("renew", "all")
    assert run.returncode == 5, run.stdout + run.stderr
    (error,) = (line for line in run.stderr.splitlines() if "denied: NotAllowed" in line)
    assert all(name in error for name in PKI_SPECS)
    assert live_certificates(pki) == before
    assert not [line for line in gateway.audit() if line["event"] == "issued"]


def test_what_waits_for_the_gateway_is_collected_later(
    pki: KubeadmPki, api: ApiServer, place: Place, tmp_path: Path
) -> None:
    """A gateway that is away: nothing moves, the objects wait, and a run after its return installs all that it signed."""
    bridge, before = bridge_with(pki, api, tmp_path / "bridge"), Snapshot.of(pki)
    bridge.config.write_text(bridge.config.read_text().replace('wait = "5m"', 'wait = "1s"'))
    asked = bridge.run("renew", "all")
    assert asked.returncode == 4, asked.stderr
    assert live_certificates(pki) == before.certificates
    names = {one["metadata"]["name"] for one in api.admin.csrs()}
    assert len(names) == len(before.certificates)
    again = bridge.run("renew")
    assert again.returncode == 4
    assert {one["metadata"]["name"] for one in api.admin.csrs()} == names

    with gateways.running(place) as gateway:
        gateway.until(lambda: {state_of(api.admin.csr(name)) for name in names} == {"signed"})
    run = bridge.run("renew")
    assert run.returncode == 0, run.stderr
    assert_renewed(pki, before, tmp_path / "scratch")
    assert api.admin.csrs() == []
