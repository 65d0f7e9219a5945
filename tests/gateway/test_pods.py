"""The gateway as signer of PodCertificateRequests, with a real API server, real rights and real CAs."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from backends.vault.setup import role_beside
from bridge.cluster.api import NoAnswerError, Reply
from bridge.gateway import policy, roots, watch
from bridge.gateway.context import Context, Ledger, LeftError, PendingRequests
from bridge.gateway.issue import Issuing
from bridge.gateway.pods import PodJudge, PodWriter
from bridge.gateway.queue import Queue
from bridge.gateway.rules import KEY_TYPES, patterns
from bridge.gateway.service import Service
from bridge.pki.certificates import is_for, pem
from bridge.settings import load
from bridge.settings.tables import GatewaySettings
from bridge.state import Store
from tests.kit import api_proxy, cluster_api, gateways, hostile_pods, kube_api, openbao, pods
from tests.kit.cluster_api import ClusterApi
from tests.kit.gateways import Gateway, Place
from tests.kit.issuing import Signer
from tests.kit.loopback import free_port
from tests.kit.measured import traced
from tests.kit.nodes import wait_for
from tests.kit.openbao import OpenBao
from tests.kit.pods import SIGNER, Pod, condition, make_pod, outcome
from tests.kit.signing_requests import pod_job

pytestmark = pytest.mark.kube("kube-apiserver", "etcd")

_MOUNTS = itertools.count(1)
BUNDLES = f"{watch.GROUP}/{roots.BUNDLES}"
#: A service account that was looked at so long ago is looked at again.
AS_OF_NOW_SECONDS = 2
ACCOUNT = "system:serviceaccount:ca-bridge:ca-bridge-gateway"
_TYPES = {
    "P-384": "ECDSAP384",
    "P-521": "ECDSAP521",
    "RSA-3072": "RSA3072",
    "RSA-4096": "RSA4096",
    "Ed25519": "ED25519",
}


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
            gateway.until(lambda: outcome(pod.read(name)) == "Issued", 180, what)  # noqa: B023
        said = {line.get("request") for line in gateway.lines()}
        for what, (pod, name) in hostile.items():
            uid = pod.read(name)["metadata"]["uid"]
            gateway.until(lambda: uid in said or uid in gateway.text(), 180, what)  # noqa: B023
    found = {what: outcome(pod.read(name)) for what, (pod, name) in hostile.items()}
    assert set(found.values()) <= {"Denied", ""}, found
    assert len(found) >= 80
    assert sum(one == "Denied" for one in found.values()) >= 60, found
    tried("requests for pods that must not be signed, each beside an honest one", len(found))


@pytest.mark.attack("P2")
@pytest.mark.kube("kube-apiserver", "etcd", "kubectl")
def test_it_works_with_what_setup_kubernetes_prints(ca: Signer, tmp_path: Path) -> None:
    """These rights are enough, and each is needed; only a node may ask, for its own pods, and only the gateway may answer."""
    with kube_api.serving(tmp_path / "api") as api:
        cluster = api.cluster
        place = pods.with_openssl(pods.place(cluster, tmp_path), ca)
        place.user, place.gateway["lease_namespace"] = ACCOUNT, "ca-bridge"
        program = str(Path(sys.executable).with_name("ca-bridge"))
        command = [program, "setup", "kubernetes", "--config", str(place.write()), "-o", str(tmp_path / "manifests")]
        subprocess.run(command, check=True)
        for path in sorted((tmp_path / "manifests").glob("*.yaml")):
            api.kubectl("apply", "-f", str(path))
        signers = yaml.safe_load((tmp_path / "manifests/10-rbac.yaml").read_text().split("---")[1])["rules"][3]
        assert signers["resourceNames"] == ["ca-bridge.invalid/none"]  # an empty list would be all of them
        pod, admin, node = make_pod(cluster), cluster.client(), cluster.client("system:node:w1", "system:nodes")
        kept = pod.body()
        kept["metadata"]["finalizers"] = ["example.com/kept"]
        owned = pod.body()
        owned["metadata"]["ownerReferences"] = [{"apiVersion": "v1", "kind": "Pod", "name": "x", "uid": "x"}]
        wait_for(
            "a policy in force",
            lambda: "only nodes may request" in admin.ask("POST", pods.collection("shop"), pod.body()).text,
        )
        for body, what in ((kept, "must not have finalizers"), (owned, "an owner other than its pod")):
            wait_for(what, lambda: what in node.ask("POST", pods.collection("shop"), body).text)  # noqa: B023
        elsewhere = cluster.client("system:node:w2", "system:nodes").ask("POST", pods.collection("shop"), pod.body())
        assert elsewhere.status == 403
        with gateways.running(place) as gateway:
            found = until(gateway, pod, pod.ask())
            assert gateway.end() == 0
        asked = pod.ask()
        status = f"{pods.collection('shop')}/{asked}/status"
        reply = admin.patch(
            status, {"status": {"conditions": [{**found["status"]["conditions"][0], "type": "Denied"}]}}
        )
        assert "only the gateway answers" in reply.text
        role = "/apis/rbac.authorization.k8s.io/v1/clusterroles/ca-bridge-gateway-pods"
        whole = admin.get(role)["rules"]
        for number, rule in enumerate(whole):
            for verb in rule["verbs"]:
                rules = [*whole[:number], {**rule, "verbs": [one for one in rule["verbs"] if one != verb] or ["none"]},
                         *whole[number + 1:]]  # fmt: skip
                assert admin.patch(role, {"rules": rules}).ok
                wait_for(f"{verb} {rule['resources']} to be missed", lambda: check(place).returncode == 5)
        assert admin.patch(role, {"rules": whole}).ok
        wait_for("all rights", lambda: check(place).returncode == 0)


def check(place: Place) -> subprocess.CompletedProcess[str]:
    """`gateway --check`."""
    command = [str(Path(sys.executable).with_name("ca-bridge")), "gateway", "--check", "--config", str(place.write())]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_check_compares_the_policy_with_the_cas_role(
    cluster: ClusterApi, bao: OpenBao, ca: Signer, tmp_path: Path
) -> None:
    """What `setup` prints fits; a role that would refuse certificates of the policy is named before a pod asks."""
    mount = f"pods-{next(_MOUNTS)}"
    place = pods.with_vault(pods.place(cluster, tmp_path), bao, ca, mount)
    [usual] = [role_beside(one) for one in patterns(policy.parse(place.policy).pod_signers.values())]
    assert check(place).returncode == 0
    wrong: dict[str, dict[str, object]] = {
        "max_ttl: wanted at least 1h": {"max_ttl": "50m"},
        "key_type: wanted rsa (for rsa-3072) or any, got ec": {"key_type": "ec", "key_bits": 256},
        "allowed_uri_sans: wanted spiffe://": {"allowed_uri_sans": ["spiffe://other.example/*"]},
        "organization: wanted none, got system:masters": {"organization": ["system:masters"]},
    }
    for text, change in wrong.items():
        bao.add_roles(mount, {"kubeadm-pod": {**usual, **change}})
        found = check(place)
        assert found.returncode == 5, found.stderr
        assert text in " ".join(found.stderr.split()), found.stderr


@pytest.mark.attack("P3")
def test_a_ca_that_answers_wrongly_or_not(cluster: ClusterApi, bao: OpenBao, ca: Signer, tmp_path: Path) -> None:
    """Another CA, other usages, names that it leaves out, too long or too old: nothing is written, and an honest answer then is."""
    mount = f"pods-{next(_MOUNTS)}"
    place = pods.with_vault(pods.place(cluster, tmp_path), bao, ca, mount)
    [usual] = [role_beside(one) for one in patterns(policy.parse(place.policy).pod_signers.values())]
    wrong: dict[str, dict[str, object]] = {
        "other usages": {"client_flag": False},
        "a CA's usages": {"key_usage": ["DigitalSignature", "CertSign"]},
        "an organization": {"organization": ["system:masters"]},
        "too old": {"not_before_duration": "10m"},
        "too short": {"max_ttl": "50m"},
        "names of the CSR": {"use_csr_sans": True},
    }
    pod = make_pod(cluster, "bank", "till")
    asked = pod.ask()
    with gateways.running(place, "wrong") as gateway:
        until(gateway, pod, asked)
    pods.trust(place, Signer.make("another", begin=datetime.now(UTC) - timedelta(days=1)), ca)
    for number, (what, change) in enumerate(wrong.items()):
        bao.add_roles(mount, {"kubeadm-pod": {**usual, **change}})
        asked = pod.ask()
        uid = pod.read(asked)["metadata"]["uid"]
        with gateways.running(place, f"wrong-{number}") as gateway:
            gateway.until(lambda: said(gateway, uid), 180, what)  # noqa: B023
            assert outcome(pod.read(asked)) == "", what
            reasons = [str(line) for line in gateway.lines() if line.get("request") == uid]
            assert "another" not in "".join(reasons), what  # they are about the root that the answer leads to
        bao.add_roles(mount, {"kubeadm-pod": usual})
        with gateways.running(place, f"right-{number}") as gateway:
            until(gateway, pod, asked)
    pods.trust(place, Signer.make("pods of corp.example", begin=datetime.now(UTC) - timedelta(days=1)))
    asked = pod.ask()
    with gateways.running(place, "another-root") as gateway:
        gateway.until(lambda: said(gateway, pod.read(asked)["metadata"]["uid"]))
        assert outcome(pod.read(asked)) == ""
        pods.trust(place, Signer.make("old", begin=datetime.now(UTC) - timedelta(days=1)), ca)
    with gateways.running(place, "two-roots") as gateway:
        until(gateway, pod, asked)


def said(gateway: Gateway, uid: str) -> bool:
    """Whether the log has a line about what the CA answered."""
    wrong = {"bad-answer", "ca-refused"}
    return any(line.get("request") == uid and line.get("outcome") in wrong for line in gateway.lines())


def test_a_ca_that_is_away_denies_no_request(cluster: ClusterApi, bao: OpenBao, ca: Signer, tmp_path: Path) -> None:
    """A sealed OpenBao: the requests of forty pods wait, and all are signed when it is back; the record has each once."""
    place = pods.with_vault(pods.place(cluster, tmp_path), bao, ca, f"pods-{next(_MOUNTS)}")
    url = bao.url
    place.tables = [table.replace(url, f"http://127.0.0.1:{free_port()}") for table in place.tables]
    waiting = [make_pod(cluster, node=f"w{number % 4}") for number in range(40)]
    asked = [(pod, pod.ask()) for pod in waiting]
    with gateways.running(place, "away") as gateway:
        gateway.until(lambda: gateway.metric("requests_total", signer=SIGNER, outcome="ca-unavailable") >= 1)
        gateway.until(lambda: reported(asked[0][0]) == ["the CA does not answer"])
        assert not any(outcome(pod.read(name)) for pod, name in asked)
    place.tables = [re.sub(r'url = "[^"]*"', f'url = "{url}"', table) for table in place.tables]
    with gateways.running(place, "back") as gateway:
        for pod, name in asked:
            until(gateway, pod, name)
        gateway.until(lambda: gateway.metric("requests_total", signer=SIGNER, outcome="signed") == 40)


def reported(pod: Pod) -> list[str]:
    """Reasons in the gateway's events of a pod."""
    events = pod.cluster.client().get(f"/api/v1/namespaces/{pod.namespace}/events")["items"]
    ours = [one for one in events if one["involvedObject"]["uid"] == pod.document["metadata"]["uid"]]
    return [one["message"].partition(" waits: ")[2] for one in ours if one["reason"] == "CertificateWaits"]


def test_a_refresh_that_the_policy_does_not_allow_any_more(cluster: ClusterApi, place: Place) -> None:
    """A running pod's next request waits until the policy is put right; a new pod's is denied, with words for its owner."""
    running, new = make_pod(cluster, "bank", "till"), make_pod(cluster, "bank", "till")
    running.set_phase("Running")
    usual = place.policy
    place.policy = usual.replace('["shop", "bank"]', '["shop"]')
    with gateways.running(place) as gateway:
        waits, denied = running.ask(), new.ask()
        found = until(gateway, new, denied, "Denied")
        assert condition(found) == ("NotAllowed", "namespace bank may not have certificates of this signer")
        gateway.until(lambda: reported(running) == ["namespace bank may not have certificates of this signer"])
        assert reported(new) == []
        assert outcome(running.read(waits)) == ""
        place.write_policy(usual)
        until(gateway, running, waits)


def test_a_denial_counts_what_was_put_right_a_moment_ago(cluster: ClusterApi, ca: Signer, tmp_path: Path) -> None:
    """A namespace whose label, and a policy whose namespace, came after a look at them that still counts otherwise."""
    labels = pods.POLICY.replace('namespaces = ["shop", "bank"]\n', 'namespace_labels = { mtls = "yes" }\n', 1)
    place = pods.with_openssl(pods.place(cluster, tmp_path, labels), ca)
    first, second, third = (make_pod(cluster, "lab", "x") for _ in range(3))
    with gateways.running(place) as gateway:
        until(gateway, first, first.ask(), "Denied")
        assert cluster.client().patch("/api/v1/namespaces/lab", {"metadata": {"labels": {"mtls": "yes"}}}).ok
        until(gateway, second, second.ask())
        asked = make_pod(cluster, "lab", "x")
        place.write_policy(labels.replace('"yes"', '"no"'))
        gateway.until(lambda: "policy.toml again" in gateway.text())
        until(gateway, asked, asked.ask(), "Denied")
        place.write_policy(labels)
        until(gateway, third, third.ask())


@pytest.mark.parametrize(
    ("type_name", "text"),
    [("exec", 'command = ["/bin/false"]'), ("vault", 'url = "http://127.0.0.1:1"\nmode = "sign-verbatim"')],
)
def test_a_ca_that_can_not_have_names_beside_the_csr(
    cluster: ClusterApi, tmp_path: Path, ca: Signer, type_name: str, text: str
) -> None:
    """It would sign certificates without any name: the settings are refused, and say which backends can."""
    place = pods.place(cluster, tmp_path)
    pods.trust(place, ca)
    auth = '[backend.pods.auth]\ntoken_env = "X"\n' if type_name == "vault" else ""
    place.tables.append(f'[backend.pods]\ntype = "{type_name}"\n{text}\n{auth}[authority.pods]\nbackend = "pods"\n')
    run = check(place)
    assert (run.returncode, "names beside the CSR" in run.stderr.replace("\n  ", " ")) == (2, True), run.stderr


def test_a_life_of_exactly_an_hour(cluster: ClusterApi, ca: Signer, tmp_path: Path) -> None:
    """`openssl ca` has exact dates: a pod gets the hour that it asks for, counted from the backdated beginning, and no more."""
    exact = pods.POLICY.replace("namespaces", 'backdating = "1m"\nexact_dates = true\nnamespaces', 1)
    place = pods.with_openssl(pods.place(cluster, tmp_path, exact), ca)
    pod = make_pod(cluster, sources=[pods.source(maxExpirationSeconds=3600)])
    with gateways.running(place) as gateway:
        leaf = pods.chain(until(gateway, pod, pod.ask(maxExpirationSeconds=3600)))[0]
    assert leaf.not_valid_after_utc - leaf.not_valid_before_utc == timedelta(hours=1)


def test_every_key_that_a_pod_may_ask_for(cluster: ClusterApi, bao: OpenBao, ca: Signer, tmp_path: Path) -> None:
    """Each type of the kubelet's, if the policy takes it."""
    place = pods.place(cluster, tmp_path)
    keys = ", ".join(f'"{one}"' for one in KEY_TYPES)
    place.policy = place.policy.replace(
        'namespaces = ["shop", "bank"]', f'namespaces = ["shop", "bank"]\nkeys = [{keys}]'
    )
    made = {"ECDSAP256": gateways.new_key, **{_TYPES[one]: key for one, key in hostile_pods.KEYS.items()}}
    with gateways.running(pods.with_vault(place, bao, ca, f"pods-{next(_MOUNTS)}")) as gateway:
        for key_type, key in made.items():
            pod = make_pod(cluster, sources=[pods.source(keyType=key_type)])
            until(gateway, pod, pod.ask(key=key()))


def test_the_roots_are_published(cluster: ClusterApi, bao: OpenBao, ca: Signer, tmp_path: Path) -> None:
    """Two while one is replaced; what others change or delete is put back; with `publish = false` ours is removed, and no other."""
    admin, path = cluster.client(), f"{BUNDLES}/corp.example:spiffe:ca-bridge"
    admin.ask("DELETE", path)
    new = Signer.make("new", begin=datetime.now(UTC) - timedelta(days=1))
    other = {
        "metadata": {"name": "corp.example:spiffe:by-hand"},
        "spec": {"signerName": SIGNER, "trustBundle": text(ca)},
    }
    admin.create(BUNDLES, other)

    def published() -> str:
        reply = admin.ask("GET", path)
        return str(reply.document["spec"]["trustBundle"]) if reply.ok else ""

    place = pods.with_vault(pods.place(cluster, tmp_path), bao, ca, f"pods-{next(_MOUNTS)}")
    with gateways.running(place) as gateway:
        gateway.until(lambda: published() == text(ca))
        gateway.until(lambda: gateway.metric("roots_published", signer=SIGNER) == 1)
        assert admin.patch(path, {"spec": {"trustBundle": text(new)}, "metadata": {"labels": {"a": "b"}}}).ok
        gateway.until(lambda: published() == text(ca))
        assert admin.ask("DELETE", path).ok
        gateway.until(lambda: published() == text(ca))
        place.write_policy(place.policy.replace("namespaces", "publish = false\nnamespaces", 1))
        gateway.until(lambda: not admin.ask("GET", path).ok)
    assert admin.get(f"{BUNDLES}/corp.example:spiffe:by-hand")["spec"]["trustBundle"] == text(ca)
    foreign = {
        "metadata": {"name": "corp.example:spiffe:ca-bridge"},
        "spec": {"signerName": SIGNER, "trustBundle": text(new)},
    }
    admin.create(BUNDLES, foreign)
    place.policy = place.policy.replace("namespaces", "publish = false\nnamespaces", 1)
    with gateways.running(place, "foreign") as gateway:
        gateway.until(lambda: gateway.metric("roots_published", signer=SIGNER) == 1)
        assert published() == text(new)
    place.policy = place.policy.replace("publish = false\n", "")
    pods.trust(place, ca, new)
    with gateways.running(place, "two") as gateway:
        gateway.until(lambda: published() == text(ca, new))


def text(*cas: Signer) -> str:
    """Certificates as a bundle has them."""
    return pem(*(one.certificate for one in cas)).decode()


@pytest.mark.attack("P4")
def test_what_changes_while_the_ca_signs(cluster: ClusterApi, bao: OpenBao, ca: Signer, tmp_path: Path) -> None:
    """No certificate is written for a pod that ends, an account that is made again, or a node that is blocked meanwhile."""
    place = pods.with_vault(pods.place(cluster, tmp_path), bao, ca, f"pods-{next(_MOUNTS)}")
    ended, stays = make_pod(cluster), make_pod(cluster)
    remade, blocked = make_pod(cluster, account="fleeting"), make_pod(cluster, node="w7")
    with gateways.running(place) as gateway:
        os.kill(bao.process.pid, signal.SIGSTOP)
        try:
            asked = [(pod, pod.ask()) for pod in (ended, remade, blocked, stays)]
            # a CA that hangs with one request still gets others, a second later
            gateway.until(lambda: sum(line["event"] == "asked" for line in gateway.audit()) >= len(asked))
            ended.set_phase("Failed")
            account = "/api/v1/namespaces/shop/serviceaccounts"
            assert cluster.client().ask("DELETE", f"{account}/fleeting").ok
            cluster.client().create(account, {"metadata": {"name": "fleeting"}})
            place.write_inventory(f"{place.inventory}[node.w7]\nblocked = true\n")
            time.sleep(AS_OF_NOW_SECONDS + 1)
        finally:
            os.kill(bao.process.pid, signal.SIGCONT)
        until(gateway, *asked[-1])
        for pod, name in asked[:-1]:
            was_left = functools.partial(is_logged, gateway, pod.read(name)["metadata"]["uid"], "left")
            gateway.until(was_left)
            assert outcome(pod.read(name)) == ""


@pytest.mark.attack("P4")
def test_a_node_that_a_program_blocks(cluster: ClusterApi, ca: Signer, tmp_path: Path) -> None:
    """`inventory_command` is asked for nodes that the file does not have, and its answer is remembered; while it fails, their pods wait."""
    place = pods.with_openssl(pods.place(cluster, tmp_path), ca)
    program, asked, answers = tmp_path / "cmdb", tmp_path / "asked", tmp_path / "answers"
    for node, answer in {"w71": '{"blocked": true}', "w72": "what?", "w73": "{}"}.items():
        gateways.written(answers / node, answer)
    gateways.written(program, f'#!/bin/sh\necho "$1" >>{asked}\ncat {answers}/"$1" 2>/dev/null || true\n', 0o755)
    place.gateway["inventory_command"] = str(program)
    blocked, unclear, known, *more = (make_pod(cluster, node=node) for node in ("w71", "w72", *["w73"] * 20))
    with gateways.running(place) as gateway:
        requests = [(pod, pod.ask()) for pod in (blocked, unclear, known, *more)]
        for pod, name in requests[2:]:
            until(gateway, pod, name)
        gateway.until(lambda: "the inventory blocks node w71" in gateway.text())
        gateway.until(lambda: f"{program} w72: wanted an object in JSON" in gateway.text())
        assert [outcome(pod.read(name)) for pod, name in requests[:2]] == ["", ""]
        assert asked.read_text().split().count("w73") <= 21  # and not once more for each at its write
        gateways.written(answers / "w72", "{}")
        until(gateway, *requests[1])
    assert (
        cluster.client().ask("DELETE", f"{pods.collection('shop')}/{requests[0][1]}").ok
    )  # other gateways would sign it


def test_a_name_that_the_policy_takes_back_before_the_write(cluster: ClusterApi, ca: Signer, tmp_path: Path) -> None:
    """While the API server takes no answer, a DNS name is taken out: it is in no certificate; what stays as it was is signed once."""
    with api_proxy.between(cluster, gateways.USER) as proxy:
        place = pods.with_openssl(pods.place(cluster, tmp_path), ca)
        place.gateway["kubeconfig"] = str(proxy.kubeconfig(cluster, gateways.USER))
        proxy.before = lambda method, path: (503, b"{}") if (method, path[-7:]) == ("PATCH", "/status") else None
        web, till = make_pod(cluster), make_pod(cluster, "bank", "till")
        with gateways.running(place) as gateway:
            asked = {pod.name: (pod, pod.ask()) for pod in (web, till)}
            gateway.until(lambda: issued(gateway, web, till) == sorted(asked))
            place.write_policy(place.policy.replace('"web.{namespace}.svc", ', ""))
            signed = sorted([web.name, web.name, till.name])
            gateway.until(lambda: issued(gateway, web, till) == signed)  # a write from before may still be under way
            proxy.before = lambda *_: None
            found = {name: pods.chain(until(gateway, pod, request))[0] for name, (pod, request) in asked.items()}
            assert issued(gateway, web, till) == signed
    account = f"UniformResourceIdentifier:spiffe://{pods.TRUST_DOMAIN}/ns/shop/sa/web"
    assert set(pods.names(found[web.name])) == {account, f"DNSName:{web.name}.web.shop.svc"}


def issued(gateway: Gateway, *ours: Pod) -> list[str]:
    """Those of these pods for which the CA has signed, by the record; other tests' requests wait beside them."""
    names = {pod.name for pod in ours}
    return sorted(line["pod"] for line in gateway.audit() if line["event"] == "issued" and line["pod"] in names)


def test_a_certificate_that_has_waited_for_too_long_is_made_anew_at_once(
    cluster: ClusterApi, ca: Signer, tmp_path: Path
) -> None:
    """The API server takes no answer for six minutes, and no certificate that began five ago: the CA is not at fault, nor left alone."""
    ahead = [timedelta()]
    with api_proxy.between(cluster, gateways.USER) as proxy:
        place = pods.with_openssl(pods.place(cluster, tmp_path), ca)
        place.gateway |= {"kubeconfig": str(proxy.kubeconfig(cluster, gateways.USER)), "lease": False}
        proxy.before = lambda method, path: (503, b"{}") if (method, path[-7:]) == ("PATCH", "/status") else None
        settings, store = load.load(place.write()), Store(tmp_path / "state")
        store.prepare()
        service = Service(settings, lambda: datetime.now(UTC) + ahead[0])
        issuing = Issuing(
            Context(
                settings=settings, api=service.api, nodes=service.nodes, authorities=service.authorities,
                ledger=Ledger(store, settings.audit), pending_at_ca=PendingRequests(store), metrics=service.metrics,
                holder=service.holder, now=lambda: datetime.now(UTC) + ahead[0], queue=Queue(lambda _: "pods"),
            )
        )  # fmt: skip
        pod = make_pod(cluster)
        asked = pod.ask()
        issuing.changed(watch.parse_pod(pod.read(asked), 1000))
        assert issuing.work(0)
        assert outcome(pod.read(asked)) == ""
        proxy.before, ahead[0] = (lambda *_: None), timedelta(minutes=6)
        assert issuing.work(10)
        assert outcome(pod.read(asked)) == ""
        ahead[0] = timedelta()
        assert issuing.work(10)
        assert outcome(pod.read(asked)) == "Issued"
        service.api.close()


def test_a_record_that_can_not_be_written_for_a_moment_costs_no_certificate(
    cluster: ClusterApi, bao: OpenBao, ca: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when a certificate comes: it is kept until the record has it, and the CA is not asked again."""
    mount = f"pods-{next(_MOUNTS)}"
    place = pods.with_vault(pods.place(cluster, tmp_path), bao, ca, mount, no_store=False)
    place.gateway["lease"] = False
    settings, store = load.load(place.write()), Store(tmp_path / "state")
    store.prepare()
    service, ledger = Service(settings, lambda: datetime.now(UTC)), Ledger(store, settings.audit)
    issuing = Issuing(
        Context(
            settings=settings, api=service.api, nodes=service.nodes, authorities=service.authorities, ledger=ledger,
            pending_at_ca=PendingRequests(store), metrics=service.metrics, holder=service.holder,
            now=lambda: datetime.now(UTC), queue=Queue(lambda _: "pods"),
        )
    )  # fmt: skip
    add, failed = ledger._record._add_to_chain, list[int]()

    def full(lines: Sequence[dict[str, Any]], **more: Any) -> Any:
        if not failed and any(line["event"] == "issued" for line in lines):
            failed.append(len(lines))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "audit.jsonl")
        return add(lines, **more)

    monkeypatch.setattr(ledger._record, "_add_to_chain", full)
    made = [make_pod(cluster) for _ in range(3)]
    asked = [(pod, pod.ask()) for pod in made]
    for pod, name in asked:
        issuing.changed(watch.parse_pod(pod.read(name), 1000))
    while issuing.work(3):
        pass
    ledger.flush()
    assert failed == [1]
    assert [outcome(pod.read(name)) for pod, name in asked] == ["Issued"] * 3
    lines = [json.loads(line) for line in store.audit.read_text().splitlines()]
    assert [line["event"] for line in lines].count("asked") == 3
    recorded = {int(line["serialNumber"], 16) for line in lines if line["event"] == "issued"}
    assert {pods.chain(pod.read(name))[0].serial_number for pod, name in asked} == recorded
    service.api.close()
    for authority in service.authorities.values():
        authority.ca.close()


def is_logged(gateway: Gateway, uid: str, found: str) -> bool:
    """Whether the log has this outcome of an object."""
    return any(line.get("request") == uid and line.get("outcome") == found for line in gateway.lines())


@pytest.mark.attack("P5")
def test_a_flood_keeps_no_other_namespace_waiting(
    cluster: ClusterApi, bao: OpenBao, ca: Signer, tmp_path: Path, tried: Callable[..., None]
) -> None:
    """While hundreds of large requests of one namespace wait, another's pod has its certificate; memory stays below 150 MB."""
    place = pods.with_vault(pods.place(cluster, tmp_path), bao, ca, f"pods-{next(_MOUNTS)}")
    noisy, quiet = make_pod(cluster, "noisy", "x"), make_pod(cluster, "bank", "till", "w2")
    mallory = cluster.client("mallory", "system:masters")
    sizes = [40_000] * 500 + [200_000] * 20
    for number, size in enumerate(sizes):
        noisy.ask(mallory, unverifiedUserAnnotations={f"example.com/k{number}": "x" * size})
    with gateways.running(place) as gateway:
        until(gateway, quiet, quiet.ask())
        assert '""' in pods.outcomes(cluster.client().get(pods.collection("noisy")))
        gateway.until(lambda: "too large to be read" in gateway.text() or gateway.metric("watch_complete") == 1)
        assert gateway.peak_mb() < 150
    assert cluster.client().ask("DELETE", pods.collection("noisy")).ok
    tried("requests of a flood of pods", len(sizes))


def test_a_request_without_a_csr_is_not_read(cluster: ClusterApi) -> None:
    """An old kubelet makes one by v1beta1, with a key in the CSR's place; its twin is read."""
    pod = make_pod(cluster)
    document = pod.read(pod.ask())
    assert watch.parse_pod(document, 1000).request.pod == pod.name
    with pytest.raises(watch.NotAnObjectError):
        watch.parse_pod({**document, "spec": {**document["spec"], "stubPKCS10Request": None}}, 1000)


def test_an_api_server_that_has_v1beta1_alone(bao: OpenBao, ca: Signer, tmp_path: Path) -> None:
    """As 1.36 has it (here v1 is hidden by a proxy): requests are signed, waiting pods get their reason, and roots are published there."""
    turned_on = ",".join(f"certificates.k8s.io/v1beta1/{one}=true" for one in (watch.PODS, roots.BUNDLES))
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(cluster_api.running(flags={"runtime-config": turned_on}))
        proxy = stack.enter_context(api_proxy.between(cluster, gateways.USER))
        gateways.grant_rights(cluster)
        pods.grant_rights(cluster)
        proxy.before = without_v1
        place = pods.with_vault(pods.place(cluster, tmp_path), bao, ca, f"pods-{next(_MOUNTS)}")
        place.gateway["kubeconfig"] = str(proxy.kubeconfig(cluster, gateways.USER))
        pod, other = (dataclasses.replace(make_pod(cluster, one), group=watch.BETA_GROUP) for one in ("shop", "else"))
        bundle = f"{watch.BETA_GROUP}/{roots.BUNDLES}/{roots.name_of(SIGNER)}"
        with gateways.running(place) as gateway:
            found = until(gateway, pod, pod.ask())
            assert pods.chain(found)[0].public_key() == pod.key.public_key()
            assert found["apiVersion"] == "certificates.k8s.io/v1beta1"
            until(gateway, other, other.ask(), "Denied")
            gateway.until(lambda: cluster.client().ask("GET", bundle).ok)
            assert cluster.client().get(bundle)["spec"]["trustBundle"] == text(ca)
        written = [path for _, path in proxy.writes if path.startswith("/apis/certificates.k8s.io")]
        assert len(written) >= 3
        assert all(path.startswith(f"{watch.BETA_GROUP}/") for path in written)
        assert check(place).returncode == 0
        proxy.before = lambda _, path: NO_PODS if path in {watch.GROUP, watch.BETA_GROUP} else None
        run = check(place)
        assert (run.returncode, "podcertificaterequests" in run.stderr) == (6, True), run.stderr


#: What an API server lists that has nothing for pods.
NO_PODS = 200, json.dumps({"kind": "APIResourceList", "resources": [{"name": watch.CSRS}]}).encode()


def without_v1(_: str, path: str) -> tuple[int, bytes] | None:
    """An API server without the objects of v1: they are not in its list, and not to be had."""
    if path == watch.GROUP:
        return NO_PODS
    return (404, b"{}") if path.startswith((f"{watch.GROUP}/{watch.PODS}", BUNDLES)) else None


# --- by themselves -------------------------------------------------------------------------------------------------------


NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)


def context_of(answer: Callable[[], Reply]) -> Any:
    """Settings as they are without a file, and an API server that answers like this."""
    api = SimpleNamespace(ask=lambda *_, **__: answer(), answer=lambda *_: answer())
    return SimpleNamespace(settings=SimpleNamespace(gateway=GatewaySettings()), api=api, now=lambda: NOW)


def test_what_a_pod_asks_for_in_vain_takes_nothing_of_its_namespaces_rate() -> None:
    """Thousands of requests for one pod, of a stolen node, keep no pod of another node of the namespace waiting."""
    judge = PodJudge(context_of(lambda: Reply(status=500, body=b"")))
    turns = [judge.turn(pod_job()) for _ in range(7000)]
    assert turns.count(0) == GatewaySettings().node_rate
    assert turns.count(None) > 6900
    assert judge.turn(pod_job(pod_uid="p2", node="w2")) == 0


def test_what_users_write_into_their_objects_fills_no_memory() -> None:
    """Of 100 service accounts, namespaces and pods with thousands of annotations, labels and volumes little is remembered."""
    many = {f"corp.example/{number}": "" for number in range(2000)}
    sources = [{"podCertificate": {"signerName": "corp.example/spiffe", "userAnnotations": many, "keyType": "RSA2048"}}]
    sources += [
        {"podCertificate": {"signerName": f"corp.example/{number}", "keyType": "RSA3072"}} for number in range(2000)
    ]
    document = {
        "metadata": {"uid": "u", "annotations": many, "labels": {**many, "mtls": "yes"}},
        "spec": {"volumes": [{"projected": {"sources": sources}}]},
    }
    body = json.dumps(document).encode()
    judge = PodJudge(context_of(lambda: Reply(status=200, body=body)))
    with traced() as memory:
        for number in range(100):
            assert judge._known(f"namespaces/shop/serviceaccounts/s{number}")[0] == "u"
            assert judge._known(f"namespaces/n{number}", labels={"mtls": "yes"})[1] == {"mtls": "yes"}
            job = pod_job(f"r{number}", annotations=tuple(many.items()))
            found = judge._pod(job)
            assert found is not None
            assert found.key_types == {"RSA2048"}
        assert memory()[0] < 1 << 20


def test_objects_of_users_are_parsed_one_at_a_time() -> None:
    """Each thread that looks at a pod has its answer of up to half a megabyte, and one thread what that becomes: five."""
    held: list[bool] = []

    class Seen(Reply):
        def found(self, path: str) -> Any:
            held.append(judge._reading.locked())
            return super().found(path)

    judge = PodJudge(context_of(lambda: Seen(status=200, body=b"{}")))
    judge._pod(pod_job())
    judge._known("nodes/w1")
    assert (held, judge._reading.locked()) == ([True, True], False)


def test_a_pod_of_megabytes_is_not_read() -> None:
    """Its request waits, and the reason names the pod; other trouble of the API server is no fault of the pod's."""
    error = NoAnswerError("a longer one")
    error.is_too_long = True

    def answer() -> Reply:
        raise error

    judge = PodJudge(context_of(answer))
    with pytest.raises(LeftError, match=r"^namespaces/shop/pods/web: wanted at most 512 KiB, found more: shorten"):
        judge._pod(pod_job())
    error.is_too_long = False
    with pytest.raises(NoAnswerError):
        judge._pod(pod_job())


def test_few_pods_are_looked_at_at_once() -> None:
    """Forty threads at once have sixteen answers of half a megabyte, and each of them has its own in the end."""
    held: list[int] = []
    there, may_answer = threading.Semaphore(0), threading.Event()

    def answer() -> Reply:
        held.append(1)
        there.release()
        may_answer.wait(180)
        held.pop()
        return Reply(status=200, body=b"{}")

    judge = PodJudge(context_of(answer))
    with ThreadPoolExecutor(40) as pool:
        found = [pool.submit(judge._pod, pod_job(f"r{number}")) for number in range(40)]
        for _ in range(16):
            assert there.acquire(timeout=180)
        assert not there.acquire(timeout=0.3)
        assert len(held) == 16
        may_answer.set()
        assert all(one.result(180) is not None for one in found)


def test_more_pods_that_wait_than_events_take_none_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as many requests wait as there may be events a minute: each minute has its full number of events."""
    clock, sent = [0.0], list[float]()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def answer() -> Reply:
        sent.append(clock[0])
        return Reply(status=201, body=b"")

    writer = PodWriter(context_of(answer))
    for number in range(4 * 240):
        clock[0] = number / 4
        writer.tell(pod_job(f"r{number}"), "left", "the policy has no table for this signer")
    minutes = [sum(begin <= one < begin + 60 for one in sent) for begin in (0, 60, 120, 180)]
    assert minutes == [pytest.approx(wanted, abs=2) for wanted in (240, 120, 120, 120)]
