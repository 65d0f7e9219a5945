"""The gateway with a real API server, real rights and real CAs: what it signs, and what becomes of it when things break."""

from __future__ import annotations

import contextlib
import itertools
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from bridge.gateway import watch
from bridge.gateway.context import Context, Ledger, PendingRequests
from bridge.gateway.issue import Issuing
from bridge.gateway.queue import Queue
from bridge.gateway.rules import CLIENT, CLIENT_KUBELET, SERVING
from bridge.gateway.service import Service
from bridge.pki.certificates import fingerprint, load_pem_certificates, pem
from bridge.pki.csr import key_pem
from bridge.settings import load
from bridge.state import Store, audit
from tests.kit import api_proxy, cluster_api, desk_program, gateways, hostile_csrs, kube_api, next_cas, openbao
from tests.kit.api_client import CSRS, ApiClient
from tests.kit.cluster_api import ClusterApi
from tests.kit.desk_program import DeskProgram
from tests.kit.gateways import Gateway, Place, chain, conditions, csr_pem, node_subject, read, state_of
from tests.kit.nodes import wait_for
from tests.kit.opensslca import make_ca_directory

pytestmark = pytest.mark.kube("kube-apiserver", "etcd")

_WORKERS = itertools.count(1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterApi]:
    """With the rights that the documents name."""
    with cluster_api.running() as found:
        gateways.grant_rights(found)
        yield found


@pytest.fixture
def worker(cluster: ClusterApi) -> str:
    """A worker that is in the cluster, and that no other test uses."""
    name = f"w{next(_WORKERS)}"
    cluster.add_node(name)
    return name


@pytest.fixture
def desk(cluster: ClusterApi, tmp_path: Path) -> DeskProgram:
    """A CA that answers as the test says."""
    return DeskProgram.make(tmp_path / "desk", cluster.ca, cluster.cas["front-proxy-ca"])


def place_with(cluster: ClusterApi, desk: DeskProgram, directory: Path, *workers: str, **keys: Any) -> Place:
    """Settings for these workers."""
    return Place(
        cluster=cluster,
        directory=directory / "gateway",
        inventory=gateways.INVENTORY + gateways.workers(*workers),
        tables=[desk.tables],
        gateway={"requester_rate": 1000, "node_rate": 1000, **keys},
    )


def place_with_openssl(cluster: ClusterApi, directory: Path, *workers: str) -> Place:
    """The same with `openssl ca`, which can say what it has signed."""
    inventory = gateways.INVENTORY + gateways.workers(*workers)
    place = Place(cluster=cluster, directory=directory / "gateway", inventory=inventory)
    place.gateway.update(requester_rate=1000, node_rate=1000)
    return place.with_openssl()


def ask(cluster: ClusterApi, worker: str, signer: str = CLIENT_KUBELET, pem: bytes = b"", **more: Any) -> str:
    """As the worker itself; the object's name."""
    sans = hostile_csrs.honest_sans(worker) if signer == SERVING else []
    pem = pem or csr_pem(node_subject(worker), sans)
    headers = {"Impersonate-User": f"system:node:{worker}", "Impersonate-Group": "system:nodes"}
    made = cluster.client().create(CSRS, gateways.body(pem, signer, **more), **headers)
    return str(made["metadata"]["name"])


def until_signed(gateway: Gateway, cluster: ClusterApi, name: str, seconds: float = 180) -> dict[str, Any]:
    """The object with its certificate."""
    gateway.until(lambda: state_of(read(cluster, name)) == "signed", seconds, f"wanted {name} to be signed")
    return read(cluster, name)


def leaf_for(cluster: ClusterApi, document: dict[str, Any], pem: bytes) -> x509.Certificate:
    """The leaf, which is for this CSR and by the cluster's CA."""
    leaf = chain(document)[0]
    leaf.verify_directly_issued_by(cluster.ca.certificate)
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert leaf.public_key().public_bytes(*form) == x509.load_pem_x509_csr(pem).public_key().public_bytes(*form)
    return leaf


# --- what is signed ---------------------------------------------------------------------------------------------------


def test_a_node_joins_serves_and_rotates(cluster: ClusterApi, tmp_path: Path) -> None:
    """With a real token and a real node's certificate: client, serving and the next client certificate, by OpenBao's roles."""
    token = cluster.bootstrap_token("abcdef")
    with openbao.dev_server() as bao:
        place = Place(cluster=cluster, directory=tmp_path, inventory=gateways.INVENTORY + gateways.workers("w5001"))
        with gateways.running(place.with_vault(bao)) as gateway:
            pem = csr_pem(node_subject("w5001"))
            joining = cluster.token_client(token).create(CSRS, gateways.body(pem, CLIENT_KUBELET))
            found = until_signed(gateway, cluster, joining["metadata"]["name"])
            leaf = leaf_for(cluster, found, pem)
            assert leaf.subject == x509.load_pem_x509_csr(pem).subject
            assert conditions(found) == {"Approved"}
            cluster.add_node("w5001")
            node = cluster.client("system:node:w5001", "system:nodes")
            sans = hostile_csrs.honest_sans("w5001")
            pem = csr_pem(node_subject("w5001"), sans)
            serving = node.create(CSRS, gateways.body(pem, SERVING, seconds=3600))
            leaf = leaf_for(cluster, until_signed(gateway, cluster, serving["metadata"]["name"]), pem)
            assert list(leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value) == sans
            life = leaf.not_valid_after_utc - datetime.now(UTC)
            assert timedelta(minutes=50) < life <= timedelta(hours=1)
            pem = csr_pem(node_subject("w5001"))
            again = node.create(CSRS, gateways.body(pem, CLIENT_KUBELET))
            leaf = leaf_for(cluster, until_signed(gateway, cluster, again["metadata"]["name"]), pem)
            life = leaf.not_valid_after_utc - datetime.now(UTC)
            assert timedelta(days=6) < life <= timedelta(days=7)  # the policy's, since nothing was asked for
            gateway.until(lambda: len(gateway.audit()) == 9)
            events = [(line["event"], line["request"]) for line in gateway.audit()]
            assert [event for event, _ in events] == ["asked", "issued", "installed"] * 3
            assert len({uid for _, uid in events}) == 3
            assert gateway.metric("requests_total", signer=CLIENT_KUBELET, outcome="signed") == 2
            assert gateway.metric("certificate_end_timestamp_seconds", signer=SERVING, name="w5001") > time.time()
            assert 'ca_bridge_credential_not_after_seconds{name="gateway.kubeconfig",' in gateway.page("metrics")[1]
            assert gateway.end() == 0
            assert audit.verify(Store(gateway.state_dir)) == (9, [])


def test_a_ca_that_an_earlier_one_certifies(cluster: ClusterApi, worker: str, tmp_path: Path) -> None:
    """An API server that trusts the earlier CA alone takes the certificate with the cross certificate behind it, and not without."""
    new = next_cas.make(tmp_path / "next")["ca"].signer
    old = (cluster.ca.certificate_pem, cluster.ca.key_pem)
    cross = next_cas.cross(old, pem(new.certificate), tmp_path / "cross")
    place = Place(cluster=cluster, directory=tmp_path / "gateway", trust=tmp_path / "trust")
    place.inventory += gateways.workers(worker)
    (tmp_path / "trust").mkdir()
    (tmp_path / "trust/ca.crt").write_bytes(pem(new.certificate))
    directory = make_ca_directory(tmp_path / "ca", pem(new.certificate), key_pem(new.key))
    ours = f'[authority.ca]\nbackend = "ca"\ncross = "{cross}"\n'
    place.tables = [f'[backend.ca]\ntype = "openssl"\ndir = "{directory}"\n{ours}']
    key = gateways.new_key()
    with gateways.running(place) as gateway:
        name = ask(cluster, worker, pem=csr_pem(node_subject(worker), key=key))
        found = chain(until_signed(gateway, cluster, name))
    assert found[1:] == load_pem_certificates(cross.read_bytes())
    (tmp_path / "key").write_bytes(key_pem(key))
    for count, status in ((2, 200), (1, 401)):
        certificate = tmp_path / f"{count}.crt"
        certificate.write_bytes(pem(*found[:count]))
        node = ApiClient(url=cluster.url, trust=cluster.pki_dir / "ca.crt", pair=(certificate, tmp_path / "key"))
        assert node.ask("GET", f"/api/v1/nodes/{worker}").status == status
        node.session.close()


def test_who_has_approved_does_not_matter(cluster: ClusterApi, desk: DeskProgram, worker: str, tmp_path: Path) -> None:
    """Another controller approves each object in the moment that it comes; the certificate is written all the same."""
    with gateways.running(place_with(cluster, desk, tmp_path, worker)) as gateway:
        desk.does("down")
        name = ask(cluster, worker)
        gateway.until(lambda: "left alone" in gateway.text())
        condition = {"type": "Approved", "status": "True", "reason": "AutoApproved", "message": "KCM"}
        answer = cluster.client().patch(f"{CSRS}/{name}/approval", {"status": {"conditions": [condition]}})
        assert answer.ok
        desk.does("sign")
        found = until_signed(gateway, cluster, name)
        assert [one["reason"] for one in found["status"]["conditions"]] == ["AutoApproved"]


@pytest.mark.attack("G8")
def test_another_person_has_to_approve(cluster: ClusterApi, desk: DeskProgram, worker: str, tmp_path: Path) -> None:
    """`approval = "required"`: what the policy allows waits for a person, and the CA gets no request until then."""
    place = place_with(cluster, desk, tmp_path, worker)
    place.policy = place.policy.replace(f'[signer."{CLIENT}"]\n', f'[signer."{CLIENT}"]\napproval = "required"\n')
    pem = csr_pem([(hostile_csrs.ORG, "developers"), (hostile_csrs.CN, "alice")])
    with gateways.running(place) as gateway:
        headers = {"Impersonate-User": "alice", "Impersonate-Group": "people"}
        name = cluster.client().create(CSRS, gateways.body(pem, CLIENT), **headers)["metadata"]["name"]
        gateway.until(lambda: "it was not approved yet" in gateway.text())
        assert (state_of(read(cluster, name)), desk.calls) == ("open", [])
        approve(cluster, name, "looked")
        leaf_for(cluster, until_signed(gateway, cluster, name), pem)
        automatic = cluster.client().create(CSRS, gateways.body(pem, CLIENT), **headers)["metadata"]["name"]
        approve(cluster, automatic, "AutoApproved")  # as kube-controller-manager does
        gateway.until(lambda: "only a controller has approved it" in gateway.text())
        assert (state_of(read(cluster, automatic)), len(desk.calls)) == ("open", 1)
    assert cluster.client().ask("DELETE", f"{CSRS}/{automatic}").ok  # no other test's gateway signs it


@pytest.mark.attack("G8")
@pytest.mark.kube("kube-apiserver", "etcd", "kube-controller-manager")
def test_kube_controller_manager_replaces_no_person(tmp_path: Path) -> None:
    """With kubeadm's binding it approves a new node's request at once: that counts only where no person has to approve."""
    with kube_api.serving(tmp_path / "cluster") as api:
        cluster = api.cluster
        gateways.grant_rights(cluster)
        role = "system:certificates.k8s.io:certificatesigningrequests:nodeclient"
        group = {"kind": "Group", "name": cluster_api.BOOTSTRAP_GROUP, "apiGroup": "rbac.authorization.k8s.io"}
        binding = {
            "metadata": {"name": "kubeadm:node-autoapprove-bootstrap"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
            "subjects": [group],
        }
        cluster.client().create("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", binding)
        api.start_controller_manager()
        desk = DeskProgram.make(tmp_path / "desk", cluster.ca, cluster.cas["front-proxy-ca"])
        place = place_with(cluster, desk, tmp_path, "w1")
        usual, table = place.policy, f'[signer."{CLIENT_KUBELET}"]\n'
        place.policy = usual.replace(table, f'{table}approval = "required"\n')
        pem = csr_pem(node_subject("w1"))
        headers = {"Impersonate-User": "system:bootstrap:abcdef", "Impersonate-Group": cluster_api.BOOTSTRAP_GROUP}
        name = cluster.client().create(CSRS, gateways.body(pem, CLIENT_KUBELET), **headers)["metadata"]["name"]
        with gateways.running(place) as gateway:
            gateway.until(lambda: "only a controller has approved it" in gateway.text(), 180)
            [approved] = read(cluster, name)["status"]["conditions"]
            assert (approved["type"], approved["reason"]) == ("Approved", "AutoApproved")
            assert (state_of(read(cluster, name)), desk.calls) == ("open", [])
            place.write_policy(usual)
            leaf_for(cluster, until_signed(gateway, cluster, name), pem)


def approve(cluster: ClusterApi, name: str, reason: str, kind: str = "Approved") -> None:
    """As another client than the gateway; or deny."""
    condition = {"type": kind, "status": "True", "reason": reason, "message": "by another"}
    assert cluster.client().patch(f"{CSRS}/{name}/approval", {"status": {"conditions": [condition]}}).ok


# --- the CA -----------------------------------------------------------------------------------------------------------


def test_a_certificate_lives_no_longer_than_all_of_the_policy_lets_it(
    cluster: ClusterApi, desk: DeskProgram, worker: str, tmp_path: Path
) -> None:
    """A CA that counts in days, below an `[allow]` of hours: the signer's own table, which gives a week, is no way round."""
    place = place_with(cluster, desk, tmp_path, worker)
    place.policy = place.policy.replace('max_validity = "30d"', 'max_validity = "2h"')
    desk.does("a day")
    with gateways.running(place) as gateway:
        name = ask(cluster, worker)
        gateway.until(lambda: "at most 2h" in gateway.text())
        assert state_of(read(cluster, name)) == "open"


def test_a_hostile_ca_answer_is_never_written(
    cluster: ClusterApi, desk: DeskProgram, tmp_path: Path, tried: Callable[..., None]
) -> None:
    """Whatever else the CA signs, the gateway does not write it, and writes an honest answer after it."""
    workers = {f"w{6000 + number}": mode for number, mode in enumerate(desk_program.HOSTILE)}
    for name in workers:
        cluster.add_node(name)
    with gateways.running(place_with(cluster, desk, tmp_path, *workers, concurrency=1)) as gateway:
        for number, (name, mode) in enumerate(workers.items(), start=1):
            desk.does(mode)
            asked = ask(cluster, name, SERVING if mode in {"a SAN", "more usages"} else CLIENT_KUBELET)
            gateway.until(lambda number=number: len(desk.calls) >= number, what=mode)  # type: ignore[misc]
            gateway.until(lambda: said(gateway, read(cluster, asked)["metadata"]["uid"]), what=mode)  # noqa: B023
            assert state_of(read(cluster, asked)) == "open", mode
            workers[name] = asked
    assert {line["event"] for line in gateway.audit()} == {"asked", "refused"}
    desk.does("sign")
    with gateways.running(place_with(cluster, desk, tmp_path, *workers), "two") as gateway:
        for asked in workers.values():
            until_signed(gateway, cluster, asked)
    tried("hostile answers of a CA to the gateway, none of them written", len(workers))


def said(gateway: Gateway, uid: str) -> bool:
    """Whether the log has a line about what the CA answered."""
    return any(
        line.get("request") == uid and line.get("outcome") in {"bad-answer", "ca-refused"} for line in gateway.lines()
    )


def test_a_ca_that_is_away_or_refuses(cluster: ClusterApi, desk: DeskProgram, worker: str, tmp_path: Path) -> None:
    """The object is left alone, and signed when the CA is back; nothing is denied for what a CA's profile says today."""
    with gateways.running(place_with(cluster, desk, tmp_path, worker)) as gateway:
        desk.does("refuse")
        refused = ask(cluster, worker, SERVING)
        gateway.until(lambda: gateway.metric("requests_total", outcome="ca-refused", signer=SERVING) >= 1)
        desk.does("down")
        away = ask(cluster, worker)
        gateway.until(lambda: gateway.metric("requests_total", outcome="ca-unavailable", signer=CLIENT_KUBELET) >= 1)
        assert [state_of(read(cluster, name)) for name in (refused, away)] == ["open", "open"]
        assert not any(conditions(read(cluster, name)) for name in (refused, away))
        desk.does("sign")
        until_signed(gateway, cluster, away)
        gateway.until(lambda: gateway.page("healthz")[0] == gateway.page("readyz")[0] == 200)


def test_an_answer_that_comes_later(cluster: ClusterApi, desk: DeskProgram, worker: str, tmp_path: Path) -> None:
    """It waits, says so in a condition, survives a kill, asks the CA no second time, and is written when it comes."""
    place = place_with(cluster, desk, tmp_path, worker, collect_every="1s", lease=False)
    desk.does("wait")
    pem = csr_pem(node_subject(worker))
    with gateways.running(place) as gateway:
        name = ask(cluster, worker, pem=pem)
        gateway.until(lambda: conditions(read(cluster, name)) == {"PendingAtCA"})
        gateway.until(lambda: gateway.metric("queue", state="at-ca") == 1)
        gateway.kill()
    with gateways.running(place) as gateway:
        gateway.until(lambda: any(call.startswith("POLL ticket-4711") for call in desk.calls))
        desk.does("sign")
        found = until_signed(gateway, cluster, name)
        leaf_for(cluster, found, pem)
        assert conditions(found) == {"Approved"}
        gateway.until(lambda: gateway.metric("queue", state="at-ca") == 0)
        assert sum(call.startswith("SUBMIT") for call in desk.calls) == 1
        assert gateway.end() == 0
    events = [line["event"] for line in gateway.audit()]
    assert events == ["asked", "pending", "issued", "installed"]


def test_no_request_waits_for_ever(cluster: ClusterApi, desk: DeskProgram, worker: str, tmp_path: Path) -> None:
    """After `pending_for` the object has failed, so that the cluster clears it away; a deleted or denied one is forgotten at once."""
    desk.does("wait")
    other = f"w{next(_WORKERS)}"
    cluster.add_node(other)
    place = place_with(cluster, desk, tmp_path, worker, other, collect_every="1s", pending_for="1h")
    with gateways.running(place) as gateway:
        for is_denied in (False, True):
            left = ask(cluster, other)
            gateway.until(lambda: gateway.metric("queue", state="at-ca") == 1)
            if is_denied:
                approve(cluster, left, "NotByPeople", "Denied")
            else:
                assert cluster.client().ask("DELETE", f"{CSRS}/{left}").ok
            gateway.until(lambda: gateway.metric("queue", state="at-ca") == 0)
        assert gateway.end() == 0
    place.gateway["pending_for"] = "4s"
    with gateways.running(place) as gateway:
        name = ask(cluster, worker)
        gateway.until(lambda: state_of(read(cluster, name)) == "failed")
        gateway.until(lambda: gateway.metric("queue", state="at-ca") == 0)
        assert conditions(read(cluster, name)) == {"Failed"}


def test_only_the_newest_of_a_node_is_asked_for(
    cluster: ClusterApi, desk: DeskProgram, worker: str, tmp_path: Path
) -> None:
    """A kubelet reads the answer to its newest request alone, so that the older ones cost no certificate."""
    names = []
    for _ in range(4):
        names.append(ask(cluster, worker))
        time.sleep(1.1)  # objects' times are whole seconds
    with gateways.running(place_with(cluster, desk, tmp_path, worker, concurrency=1)) as gateway:
        until_signed(gateway, cluster, names[-1])
        signed = [name for name in names if state_of(read(cluster, name)) == "signed"]
        assert names[-1] in signed
        assert len(signed) <= len(desk.calls) <= 2  # the first may have been begun before the others were seen


def test_the_watch_may_be_behind_our_own_writes(
    cluster: ClusterApi, desk: DeskProgram, worker: str, tmp_path: Path
) -> None:
    """An older version of an object that we have answered asks no CA, before or after the newer one; another replica looks."""
    settings = load.load(place_with(cluster, desk, tmp_path, worker, lease=False).write())
    service = Service(settings, lambda: datetime.now(UTC))
    store = Store(tmp_path / "state")
    store.prepare()

    def replica() -> Issuing:
        return Issuing(
            Context(
                settings=settings, api=service.api, nodes=service.nodes, authorities=service.authorities,
                ledger=Ledger(store, settings.audit), pending_at_ca=PendingRequests(store), metrics=service.metrics,
                holder=service.holder, now=lambda: datetime.now(UTC), queue=Queue(),
            )
        )  # fmt: skip

    foreign = csr_pem(node_subject(worker), [x509.DNSName("kubernetes.default.svc")])
    signed, denied = ask(cluster, worker), ask(cluster, worker, SERVING, foreign)
    old = [watch.parse(read(cluster, name), 1000) for name in (signed, denied)]
    issuing = replica()
    for one in old:
        issuing.changed(one)
        assert issuing.work(0)
    assert [state_of(read(cluster, name)) for name in (signed, denied)] == ["signed", "denied"]
    recorded = (tmp_path / "state/audit.jsonl").read_bytes()
    new = [watch.parse(read(cluster, name), 1000) for name in (signed, denied)]
    for events in ([*old, *new], [*new, *old]):
        for one in events:
            issuing.changed(one)
        while issuing.work(0):
            pass
    assert len(desk.calls) == 1
    assert (tmp_path / "state/audit.jsonl").read_bytes() == recorded
    another = replica()
    another.changed(old[0])
    assert another.work(0)
    assert len(desk.calls) == 2
    service.api.close()


# --- replicas, kills, drains ------------------------------------------------------------------------------------------


def test_another_replica_takes_over(cluster: ClusterApi, desk: DeskProgram, tmp_path: Path) -> None:
    """After SIGTERM without waiting, after a kill when the lease has ended; never do two work, called alike or not."""
    workers = [f"w{7000 + number}" for number in range(3)]
    for name in workers:
        cluster.add_node(name)
    lease = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/take-over"
    place = place_with(cluster, desk, tmp_path, *workers, lease_name="take-over", identity="cp1", lease_duration="5m")
    with gateways.running(place) as one, contextlib.ExitStack() as stack:
        until_signed(one, cluster, ask(cluster, workers[0]))
        place.gateway["lease_duration"] = "10s"  # theirs, and how often they look
        two = stack.enter_context(gateways.begun(place, "two"))
        two.until(lambda: "standing by" in two.page("readyz")[1])
        time.sleep(4)  # two looks at the lease
        assert "is ours" not in two.text()
        before = cluster.client().get(lease)["spec"]["holderIdentity"]
        assert one.end() == 0
        assert cluster.client().get(lease)["spec"]["holderIdentity"] != before  # it is not waited for
        until_signed(two, cluster, ask(cluster, workers[1]))
        assert "the lease take-over is ours" in two.text()
        three = stack.enter_context(gateways.begun(place, "three"))
        three.until(lambda: three.page("readyz")[0] == 200)
        two.kill()
        until_signed(three, cluster, ask(cluster, workers[2]))
        assert three.end() == 0
    assert len(desk.calls) == 3


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_at_each_write(
    cluster: ClusterApi, desk: DeskProgram, tmp_path: Path, moment: str, tried: Callable[..., None]
) -> None:
    """Before and after each request that writes, and each look: the next run signs what is left, and the record is whole."""
    kills = 0
    base = 8000 if moment == "before" else 8500
    for at in range(1, 5):
        worker = f"w{base + at}"
        cluster.add_node(worker)
        with api_proxy.between(cluster, gateways.USER) as proxy:
            place = place_with(cluster, desk, tmp_path / f"{moment}-{at}", worker, lease=False)
            place.gateway["kubeconfig"] = str(proxy.kubeconfig(cluster, gateways.USER))
            gateway = place.start()
            gateway.until_working()
            count = itertools.count(1)

            def act(_: str, path: str, gateway: Gateway = gateway, at: int = at, count: Any = count) -> bool:
                is_ours = "certificatesigningrequests" in path or "/nodes/" in path
                if not is_ours or next(count) != at:
                    return False
                gateway.kill()
                return True

            setattr(proxy, moment, act)
            pem = csr_pem(node_subject(worker))
            name = ask(cluster, worker, pem=pem)
            deadline = time.monotonic() + 180
            while gateway.process.poll() is None and not has_signed(gateway):
                assert time.monotonic() < deadline, gateway.text()
                time.sleep(0.02)
            setattr(proxy, moment, lambda *_: None)
            code = gateway.end()  # or it is being killed at this very moment
            assert code in {0, -signal.SIGKILL}
            kills += code != 0
            with gateways.running(place) as gateway:
                leaf = leaf_for(cluster, until_signed(gateway, cluster, name), pem)
                assert gateway.end() == 0
        digests = [line["certificateSha256"] for line in gateway.audit() if line["event"] == "issued"]
        assert fingerprint(leaf) in digests  # recorded before it was written
        assert audit.verify(Store(gateway.state_dir))[1] == []
    assert kills >= 3
    tried("kills of the gateway at a request of its own", kills)


def has_signed(gateway: Gateway) -> bool:
    """Whether it has heard that a certificate was written."""
    return any(line.get("outcome") == "signed" for line in gateway.lines())


@pytest.mark.parametrize("successor", ["one", "two"])
def test_what_was_signed_for_a_killed_gateway_is_found(
    cluster: ClusterApi, worker: str, tmp_path: Path, successor: str
) -> None:
    """Killed between signing and writing: the same replica, or another one, finds the certificate, and none is signed anew."""
    place = place_with_openssl(cluster, tmp_path, worker)
    place.gateway["lease_duration"] = "5s"  # the heir waits for it
    index = tmp_path / "gateway/ca/index.txt"
    pem = csr_pem(node_subject(worker))
    with api_proxy.between(cluster, gateways.USER) as proxy:
        place.gateway["kubeconfig"] = str(proxy.kubeconfig(cluster, gateways.USER))
        gateway = place.start("one")
        gateway.until_working()

        def act(method: str, path: str) -> bool:
            if method == "PATCH" and path.endswith("/approval"):
                gateway.kill()
                return True
            return False

        proxy.before = act
        name = ask(cluster, worker, pem=pem)
        gateway.process.wait(180)
        [signed] = index.read_text().splitlines()
        proxy.before = lambda *_: None
        with gateways.running(place, successor) as heir:
            leaf = leaf_for(cluster, until_signed(heir, cluster, name), pem)
            assert index.read_text().splitlines() == [signed]
            assert f"{leaf.serial_number:X}" in signed.upper()
            heir.until(lambda: "installed" in [line["event"] for line in heir.audit()])
            [found] = [line for line in heir.audit() if line["event"] == "issued" and "lost" in line["result"]]
            assert found["certificateSha256"] == fingerprint(leaf)
            until_signed(heir, cluster, ask(cluster, worker))  # another key is none that was signed
            assert len(index.read_text().splitlines()) == 2
            assert heir.end() == 0
        with gateways.running(place, successor) as third:  # whose predecessor has given the lease back
            until_signed(third, cluster, ask(cluster, worker))
        assert len(index.read_text().splitlines()) == 3


def test_the_api_server_is_killed(cluster: ClusterApi, desk: DeskProgram, worker: str, tmp_path: Path) -> None:
    """The watch breaks and begins anew; requests that came meanwhile are signed, and `/healthz` stays well."""
    with gateways.running(place_with(cluster, desk, tmp_path, worker)) as gateway:
        until_signed(gateway, cluster, ask(cluster, worker))
        cluster.kill_server()
        gateway.until(lambda: gateway.metric("api_up") == 0)
        assert gateway.page("healthz")[0] == 200
        assert gateway.page("readyz")[0] in {200, 503}
        cluster.start_server()
        until_signed(gateway, cluster, ask(cluster, worker, SERVING))


def test_answers_of_an_api_server_in_trouble(
    cluster: ClusterApi, desk: DeskProgram, worker: str, tmp_path: Path
) -> None:
    """Watches that are too old, cut or garbage; writes that are throttled, lost on the way back or in conflict."""
    texts = iter([
        b'{"type": "ERROR", "object": {"code": 410, "message": "too old resource version: 1 (718)"}}\n',
        b'garbage\n[1]\n{}\n{"type":"ADDED","object":{"metadata":{},"spec":{"signerName":"' + SERVING.encode() + b'"}}}\n',
        b'{"type":"ADDED","object":[' + b"[" * 2000 + f'"{SERVING}"'.encode(),
        b'"' + SERVING.encode() + b"x" * 3_000_000,
    ])  # fmt: skip
    troubles: Iterator[tuple[int, bytes] | bool] = iter(
        [(429, b"{}"), (500, b"{}"), True, (409, b'{"message": "conflict"}'), (422, b"{}")]
    )

    def before(method: str, _: str) -> tuple[int, bytes] | bool | None:
        return next(troubles, None) if method == "PATCH" else None

    lost = iter([True])
    with api_proxy.between(cluster, gateways.USER) as proxy:
        proxy.watch = lambda: next(texts, None)
        proxy.before = before
        proxy.after = lambda _, path: next(lost, None) if path.endswith("/status") else None
        place = place_with(cluster, desk, tmp_path, worker, lease=False)
        place.gateway["kubeconfig"] = str(proxy.kubeconfig(cluster, gateways.USER))
        name = ask(cluster, worker)
        with gateways.running(place) as gateway:
            until_signed(gateway, cluster, name)
            assert (next(troubles, None), next(lost, None), next(texts, None)) == (None, None, None)
    assert len(desk.calls) == 1  # what the CA has signed is kept until it is written


@pytest.mark.attack("G12")
def test_a_lease_that_is_none(cluster: ClusterApi, desk: DeskProgram, worker: str, tmp_path: Path) -> None:
    """Garbage in the place of the lease is no lease: no gateway works until there is one."""
    endless = b'{"metadata": {}, "spec": {"holderIdentity": "x", "leaseDurationSeconds": ' + b"9" * 400 + b"}}"
    texts = [b"[]", b"{}", b'{"metadata": 1, "spec": 2}', b"x", endless]
    garbage = iter([(500, b""), *((200, text) for text in texts)])

    def before(_: str, path: str) -> tuple[int, bytes] | None:
        return next(garbage, None) if "/leases/" in path else None

    with api_proxy.between(cluster, gateways.USER) as proxy:
        proxy.before = before
        place = place_with(cluster, desk, tmp_path, worker, lease_name="garbage")
        place.gateway["kubeconfig"] = str(proxy.kubeconfig(cluster, gateways.USER))
        with gateways.running(place) as gateway:
            assert next(garbage, None) is None
            until_signed(gateway, cluster, ask(cluster, worker))
            assert gateway.page("healthz")[0] == 200


#: The program, which waits for a CA at its end for as long as a machine may stall.
_PATIENT = "from bridge.gateway import service\nservice._DRAIN_SECONDS = 150.0\nfrom bridge.entry import main\nmain()"


def test_it_drains(cluster: ClusterApi, desk: DeskProgram, tmp_path: Path) -> None:
    """SIGTERM in the middle of a burst: what is at the CA is written, nothing is begun, and the end is clean."""
    workers = [f"w{9500 + number}" for number in range(12)]
    for name in workers:
        cluster.add_node(name)
    desk.does("hold")
    place = place_with(cluster, desk, tmp_path, *workers, concurrency=3)
    place.program = [sys.executable, "-c", _PATIENT]
    with gateways.running(place) as gateway:
        names = [ask(cluster, name) for name in workers]
        gateway.until(lambda: len(desk.calls) == 3)
        gateway.process.send_signal(signal.SIGTERM)
        gateway.until(lambda: "nothing new is begun" in gateway.text())
        desk.does("sign")
        assert gateway.process.wait(180) == 0
    signed = [name for name in names if state_of(read(cluster, name)) == "signed"]
    assert len(signed) == len(desk.calls) == 3
    events = [line["event"] for line in gateway.audit()]
    assert events.count("installed") == len(signed)


# --- policy, inventory and rates while it runs ------------------------------------------------------------------------


def test_policy_and_inventory_are_read_again(
    cluster: ClusterApi, desk: DeskProgram, worker: str, tmp_path: Path
) -> None:
    """A node that is added is signed within seconds; a broken file is reported, and the last good one goes on counting."""
    place = place_with(cluster, desk, tmp_path)
    with gateways.running(place) as gateway:
        name = ask(cluster, worker)
        gateway.until(lambda: "the inventory does not have node" in gateway.text())
        place.write_inventory(place.inventory + "garbage = \n")
        gateway.until(lambda: is_unready(gateway, "inventory.toml"))
        assert state_of(read(cluster, name)) == "open"
        place.write_inventory(place.inventory + '[node.x]\naddresses = ["1"]\n[node.y]\naddresses = ["2"]\n')
        gateway.until(lambda: is_unready(gateway, "node.y.addresses"))
        [both] = [line["message"] for line in gateway.lines() if "node.y.addresses" in line["message"]]
        assert "node.x.addresses" in both
        assert both.isprintable()
        assert "\N{REPLACEMENT CHARACTER}" not in both
        place.write_inventory(place.inventory + gateways.workers(worker, more="blocked = true\n"))
        gateway.until(lambda: "the inventory blocks node" in gateway.text())
        tmp_path.chmod(0o777)
        place.write_inventory(place.inventory + gateways.workers(worker))
        gateway.until(lambda: is_unready(gateway, "mode 0777"))
        tmp_path.chmod(0o700)
        until_signed(gateway, cluster, name)
        gateway.until(lambda: gateway.page("readyz")[0] == 200)


def is_unready(gateway: Gateway, word: str) -> bool:
    """Whether it says that it is not ready, with this word in the reason."""
    status, text = gateway.page("readyz")
    return status == 503 and word in text


def test_the_policy_counts_when_it_is_written(
    cluster: ClusterApi, desk: DeskProgram, worker: str, tmp_path: Path
) -> None:
    """A certificate that the policy no longer allows when the CA's answer comes is not written; nor is one for a deleted node."""
    place = place_with(cluster, desk, tmp_path, worker, collect_every="1s")
    desk.does("wait")
    with gateways.running(place) as gateway:
        name = ask(cluster, worker)
        gateway.until(lambda: conditions(read(cluster, name)) == {"PendingAtCA"})
        place.write_inventory(place.inventory.replace(f"[node.{worker}]", f"[node.{worker}]\nblocked = true"))
        gateway.until(lambda: "the inventory blocks node" in gateway.text())
        desk.does("sign")
        time.sleep(2)
        assert state_of(read(cluster, name)) == "open"
        assert cluster.client().ask("DELETE", f"/api/v1/nodes/{worker}").ok
        place.write_inventory(place.inventory)
        gateway.until(lambda: "there is no Node object" in gateway.text())
        assert state_of(read(cluster, name)) == "open"
        cluster.add_node(worker)
        until_signed(gateway, cluster, name)


def test_rates(cluster: ClusterApi, desk: DeskProgram, tmp_path: Path) -> None:
    """A requester that asks too often waits, and no other does."""
    mine = [f"w{9700 + number}" for number in range(8)]
    for name in mine:
        cluster.add_node(name)
    place = place_with(cluster, desk, tmp_path, *mine, requester_rate=3)
    headers = {"Impersonate-User": "alice", "Impersonate-Group": "people"}
    pem = csr_pem([(hostile_csrs.ORG, "developers"), (hostile_csrs.CN, "alice")])
    with gateways.running(place) as gateway:
        begin = time.monotonic()
        names = [
            cluster.client().create(CSRS, gateways.body(pem, CLIENT), **headers)["metadata"]["name"] for _ in range(10)
        ]
        for name in mine:
            until_signed(gateway, cluster, ask(cluster, name))

        def signed() -> int:
            return sum(state_of(read(cluster, name)) == "signed" for name in names)

        gateway.until(lambda: signed() >= 3)
        assert signed() <= 3 + (time.monotonic() - begin) / 20  # three a minute
        assert "too many requests" in gateway.text()
    for name in names:  # the gateways of other tests in this cluster would sign what is left
        assert cluster.client().ask("DELETE", f"{CSRS}/{name}").ok


def test_no_other_requester_uses_up_a_nodes_rate(
    cluster: ClusterApi, desk: DeskProgram, worker: str, tmp_path: Path
) -> None:
    """A bootstrap token asks for a node that is there, as often as it may: that node's own request waits for none of it."""
    place = place_with(cluster, desk, tmp_path, worker, node_rate=1)
    headers = {"Impersonate-User": "system:bootstrap:abcdef", "Impersonate-Group": cluster_api.BOOTSTRAP_GROUP}
    pem = csr_pem(node_subject(worker))
    with gateways.running(place) as gateway:
        for _ in range(12):  # each is looked at before the next one supersedes it
            uid = cluster.client().create(CSRS, gateways.body(pem, CLIENT_KUBELET), **headers)["metadata"]["uid"]
            gateway.until(lambda: uid in gateway.text())  # noqa: B023 (waited for here)
        gateway.until(lambda: "too many requests" in gateway.text())
        until_signed(gateway, cluster, ask(cluster, worker), 90)  # two minutes later, if they were one


def test_a_node_may_come_back_if_the_inventory_says_so(
    cluster: ClusterApi, desk: DeskProgram, worker: str, tmp_path: Path
) -> None:
    """A token asks for a node that is there: only with `rejoin`, and only while it is not ready."""
    place = place_with(cluster, desk, tmp_path, worker)
    headers = {"Impersonate-User": "system:bootstrap:abcdef", "Impersonate-Group": cluster_api.BOOTSTRAP_GROUP}
    with gateways.running(place) as gateway:
        pem = csr_pem(node_subject(worker))
        name = cluster.client().create(CSRS, gateways.body(pem, CLIENT_KUBELET), **headers)["metadata"]["name"]
        gateway.until(lambda: "is there already" in gateway.text())
        place.write_inventory(place.inventory.replace(f"[node.{worker}]", f"[node.{worker}]\nrejoin = true"))
        gateway.until(lambda: "is there, and ready" in gateway.text())
        assert state_of(read(cluster, name)) == "open"
        cluster.set_ready(worker, ready=False)
        until_signed(gateway, cluster, name)


def test_an_inventory_command(cluster: ClusterApi, desk: DeskProgram, worker: str, tmp_path: Path) -> None:
    """A program knows the nodes that the file does not have; it makes no control-plane node, and may fail."""
    program = tmp_path / "cmdb"
    answer = tmp_path / "answer"
    answer.write_text('{"control_plane": true}')
    program.write_text(f'#!/bin/sh\n[ "$#" = 1 ] || exit 9\n[ "$1" = {worker} ] || exit 0\ncat {answer}\n')
    program.chmod(0o755)
    place = place_with(cluster, desk, tmp_path, inventory_command=str(program))
    with gateways.running(place) as gateway:
        name = ask(cluster, worker, SERVING)
        gateway.until(lambda: "makes no control-plane node" in gateway.text())
        assert state_of(read(cluster, name)) == "open"
        answer.write_text(f'{{"addresses": ["{gateways.address_of(worker)}"]}}')
        until_signed(gateway, cluster, name)


def test_a_hostile_request_starts_no_inventory_command(
    cluster: ClusterApi, desk: DeskProgram, worker: str, tmp_path: Path
) -> None:
    """A flood of requests that are denied anyhow starts no program: with a slow one it took all threads for minutes."""
    program, asked = tmp_path / "cmdb", tmp_path / "asked"
    program.write_text(f'#!/bin/sh\necho "$1" >>{asked}\nsleep 5\n')
    program.chmod(0o755)
    place = place_with(cluster, desk, tmp_path, inventory_command=str(program))
    headers = {"Impersonate-User": "system:bootstrap:abcdef", "Impersonate-Group": cluster_api.BOOTSTRAP_GROUP}
    pem = csr_pem(node_subject(worker), [x509.DNSName(worker)])

    def is_asked() -> bool:
        return asked.exists() and worker in asked.read_text().split()

    with gateways.running(place) as gateway:
        for signer in (SERVING, CLIENT_KUBELET):  # no token may have the one, and no requester the other with names
            made = gateways.body(pem, signer, usages=gateways.USAGES[signer])
            name = cluster.client().create(CSRS, made, **headers)["metadata"]["name"]
            gateway.until(lambda name=name: state_of(read(cluster, name)) == "denied")  # type: ignore[misc]
        assert not is_asked()  # what other tests have left open may be
        ask(cluster, worker, SERVING)
        gateway.until(is_asked)


def test_unknown_names_keep_no_known_node_waiting(
    cluster: ClusterApi, desk: DeskProgram, worker: str, tmp_path: Path
) -> None:
    """A token asks for a hundred nodes that only a slow program could know: one of the inventory's is served at once."""
    program, looked_up = tmp_path / "cmdb", tmp_path / "looked-up"
    program.write_text(f'#!/bin/sh\necho "$1" >>{looked_up}\nexec sleep 8\n')
    looked_up.touch()
    program.chmod(0o755)
    place = place_with(cluster, desk, tmp_path, worker, inventory_command=str(program))
    headers = {"Impersonate-User": "system:bootstrap:abcdef", "Impersonate-Group": cluster_api.BOOTSTRAP_GROUP}
    with gateways.running(place) as gateway:
        for number in range(100):
            body = gateways.body(csr_pem(node_subject(f"unknown-{number}")), CLIENT_KUBELET)
            body["metadata"]["labels"] = {"unknown": "yes"}
            cluster.client().create(CSRS, body, **headers)
        until_signed(gateway, cluster, ask(cluster, worker))
        assert len(looked_up.read_text().splitlines()) < 50  # most of them come after it
        assert cluster.client().ask("DELETE", f"{CSRS}?labelSelector=unknown%3Dyes").ok


def test_several_threads_ask_at_once(cluster: ClusterApi, tmp_path: Path) -> None:
    """A burst through `openssl ca`, which signs many in one process: all are signed, each for its own key."""
    workers = [f"w{10000 + number}" for number in range(40)]
    pems = {name: csr_pem(node_subject(name)) for name in workers}
    for name in workers:
        cluster.add_node(name)
    place = Place(
        cluster=cluster, directory=tmp_path, inventory=gateways.INVENTORY + gateways.workers(*workers)
    ).with_openssl()
    names: dict[str, str] = {}
    threads = [
        threading.Thread(target=lambda name=name: names.update({name: ask(cluster, name, pem=pems[name])}))
        for name in workers
    ]
    with gateways.running(place) as gateway:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        gateway.until(lambda: gateway.metric("requests_total", signer=CLIENT_KUBELET, outcome="signed") >= 40, 180)
        for worker, name in names.items():
            leaf_for(cluster, read(cluster, name), pems[worker])
        _, text = gateway.page("metrics")
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        assert [line for line in lines if not re.fullmatch(r"\w+(\{[^}]+\})? [0-9.e+-]+", line)] == []


# --- the command ------------------------------------------------------------------------------------------------------


def checked(place: Place) -> tuple[int, str]:
    """Exit code and words of `gateway --check`, and nothing is written by it."""
    command = [str(Path(sys.executable).with_name("ca-bridge")), "gateway", "--check", "--config", str(place.write())]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert not (place.directory / "state").exists()
    return run.returncode, run.stdout + run.stderr


def test_check_says_what_is_missing(cluster: ClusterApi, tmp_path: Path) -> None:
    """Ready; a role that gives other usages; a CA that is away; no rights; no API server; a file that others may write."""
    inventory = gateways.INVENTORY + gateways.workers("w1")
    policy = gateways.POLICY.partition('[signer."kubernetes.io/kube-apiserver-client"]')[0]
    with openbao.dev_server() as bao:
        place = Place(cluster=cluster, directory=tmp_path, inventory=inventory, policy=policy).with_vault(bao)
        code, text = checked(place)
        assert (code, text.partition(":")[0]) == (0, "ready"), text
        assert "3 nodes in the inventory" in text
        head = f'[signer."{CLIENT_KUBELET}"]\n'
        place.policy = policy.replace(head, f'{head}approval = "required"\n')
        code, text = checked(place)
        assert (code, "kubeadm:node-autoapprove-certificate-rotation" in text) == (0, True), text
        place.policy, place.trust = policy, cluster.pki_dir.parent / "another"
        place.trust.mkdir(exist_ok=True)
        (place.trust / "ca.crt").write_bytes(cluster.cas["front-proxy-ca"].certificate_pem)
        code, text = checked(place)
        assert (code, "wanted the CA of ca.crt" in " ".join(text.split())) == (5, True), text
        place.trust = None
        role = {**gateways.ROLES["kubeadm-kubelet-serving"], "client_flag": True}
        bao.write("pki/roles/kubeadm-kubelet-serving", **role)
        code, text = checked(place)
        assert (code, "kubelet-serving" in text) == (5, True), text
    place.tables = [table.replace('timeout = "1m"', 'timeout = "2s"') for table in place.tables]
    assert checked(place)[0] == 6
    place.gateway["kubeconfig"] = str(cluster.kubeconfig("no-rights"))
    code, text = checked(place)
    assert (code, "the right is missing" in text) == (5, True), text
    flat = " ".join(text.split())
    for right in ("patch certificatesigningrequests/approval", "sign signers kubernetes.io/kubelet-serving",
                  "update leases ca-bridge-gateway in namespace kube-system"):  # fmt: skip
        assert f"to {right}" in flat
    assert "to list certificatesigningrequests" not in flat  # every user may list them here
    place.gateway["kubeconfig"] = str(tmp_path / "gone.conf")
    assert checked(place)[0] == 2
    place.write()
    (tmp_path / "policy.toml").chmod(0o666)
    place.write_policy = lambda text: None  # type: ignore[method-assign]  # noqa: ARG005
    code, text = checked(place)
    assert (code, "mode 0666" in text) == (2, True), text


def test_a_lease_that_can_not_be_made(cluster: ClusterApi, desk: DeskProgram, tmp_path: Path) -> None:
    """`--check` finds that the namespace or the right to create it is missing, and a running gateway says so."""
    admin, place = cluster.client(), place_with(cluster, desk, tmp_path, lease_name="not-there")
    assert checked(place)[0] == 0
    place.user = "without-create"
    rights = [{"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "update"]}]
    gateways.add_role(admin, place.user, rights, {"kind": "User", "name": place.user}, namespace="kube-system")
    role = admin.get(f"/apis/rbac.authorization.k8s.io/v1/clusterroles/{gateways.USER}")["rules"]
    gateways.add_role(admin, place.user, role, {"kind": "User", "name": place.user})
    code, text = checked(place)
    assert (code, 'cannot create resource "leases"' in " ".join(text.split())) == (5, True), text
    gateways.add_role(admin, "leases", [{**rights[0], "verbs": ["*"]}], {"kind": "User", "name": place.user})
    place.gateway["lease_namespace"] = "no-such"
    wait_for("the right", lambda: 'namespaces "no-such" not found' in " ".join(checked(place)[1].split()))
    with gateways.begun(place, "one") as gateway:
        gateway.until(lambda: 'namespaces \\"no-such\\" not found' in gateway.text())


def test_one_state_directory_is_for_one(cluster: ClusterApi, desk: DeskProgram, tmp_path: Path) -> None:
    """A second gateway with the same state directory ends with 9, and says whose it is."""
    with gateways.running(place_with(cluster, desk, tmp_path)) as gateway:
        text = re.sub(r'listen = "[^"]*"', 'listen = "127.0.0.1:1"', gateway.config.read_text())
        config = gateways.written(tmp_path / "second.toml", text)
        command = [str(Path(sys.executable).with_name("ca-bridge")), "gateway", "--config", str(config)]
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert (run.returncode, str(gateway.process.pid) in run.stderr) == (9, True), run.stderr
        assert "gateway.state_dir" in run.stderr
