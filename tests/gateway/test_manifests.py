"""`config/kubernetes/` against a real API server: each right is needed, none is left over, and the policies hold."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509

from bridge.ca import registry
from bridge.gateway import policy as gateway_policy
from bridge.settings.load import parse
from bridge.system.waiting import wait_until
from tests.kit import kube_api
from tests.kit.api_client import CSRS, ApiClient, Reply
from tests.kit.gateways import body, csr_pem
from tests.kit.kube_api import ApiServer, user_name

pytestmark = pytest.mark.kube("etcd", "kube-apiserver", "kubectl")

SHIPPED = Path(__file__).resolve().parents[2] / "config/kubernetes"
CLIENT = "kubernetes.io/kube-apiserver-client-kubelet"
SERVING = "kubernetes.io/kubelet-serving"
USER = "kubernetes.io/kube-apiserver-client"
NAMESPACE = "ca-bridge"
ROLES = "/apis/rbac.authorization.k8s.io/v1"
CLUSTER_ROLE = f"{ROLES}/clusterroles/ca-bridge-gateway"
ROLE = f"{ROLES}/namespaces/{NAMESPACE}/roles/ca-bridge-gateway"
LEASE = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/ca-bridge-gateway"
#: As in kubernetes-csr: how long the authorizer's cache of roles may be behind.
SOON = timedelta(minutes=3)

Action = Callable[[ApiClient], Reply]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """An API server with all manifests but the admission policies, and a Node object."""
    with kube_api.serving(tmp_path_factory.mktemp("rbac")) as server:
        for name in ("00-namespace", "10-rbac", "30-config", "40-deployment"):
            server.kubectl("apply", "-f", str(SHIPPED / f"{name}.yaml"))
        server.apply("{apiVersion: v1, kind: Node, metadata: {name: w1}}")
        yield server


@pytest.fixture(scope="module")
def gateway(api: ApiServer) -> ApiClient:
    """The service account."""
    return api.bearer(NAMESPACE, "ca-bridge-gateway")


def node_csr(name: str = "w1") -> bytes:
    """As a kubelet makes it."""
    return csr_pem(user_name(f"system:node:{name}", ["system:nodes"]))


def asked(api: ApiServer, signer: str = CLIENT) -> str:
    """A node's request, which no controller has looked at."""
    usages = ["digital signature", "server auth" if signer == SERVING else "client auth"]
    reply = api.client("system:node:w1", "system:nodes").create_csr(node_csr(), signer, usages)
    assert reply.status == 201, reply
    return str(reply.document["metadata"]["name"])


def certificate(api: ApiServer) -> bytes:
    """Any; the API server looks for PEM alone."""
    return api.trust.read_bytes()


def actions(api: ApiServer) -> dict[tuple[str, str], Action]:
    """What the gateway does, by the rule that it needs: what the rule is for, and the verb."""

    def lease(who: ApiClient) -> Reply:
        found = api.admin.ask("GET", LEASE).document
        spec = {"holderIdentity": "test", "leaseDurationSeconds": 10}
        return who.ask("PUT", LEASE, {**found, "spec": spec})

    return {
        ("certificatesigningrequests", "list"): lambda who: who.ask("GET", f"{CSRS}?limit=10"),
        ("certificatesigningrequests", "watch"): _watch,
        ("certificatesigningrequests", "get"): lambda who: who.ask("GET", f"{CSRS}/{asked(api)}"),
        ("certificatesigningrequests/approval", "patch"): lambda who: decide(api, who, asked(api)),
        ("certificatesigningrequests/status", "patch"): lambda who: issue(api, who, asked(api)),
        ("signers", "approve"): lambda who: decide(api, who, asked(api)),
        ("signers", "sign"): lambda who: issue(api, who, asked(api)),
        ("nodes", "get"): lambda who: who.ask("GET", "/api/v1/nodes/w1"),
        ("nodes", "list"): lambda who: who.ask("GET", "/api/v1/nodes?limit=10"),
        ("leases", "get"): lambda who: who.ask("GET", LEASE),
        ("leases", "update"): lease,
    }


def decide(api: ApiServer, who: ApiClient, name: str, kind: str = "Approved") -> Reply:
    """As `who`, with what an administrator knows of the object."""
    metadata = {key: api.admin.csr(name)["metadata"][key] for key in ("uid", "resourceVersion")}
    condition = {"type": kind, "status": "True", "reason": "PolicyAllows", "message": "a test"}
    old = api.admin.csr(name)["status"].get("conditions", [])
    body = {"metadata": metadata, "status": {"conditions": [*old, condition]}}
    return who.patch(f"{CSRS}/{name}/approval", body)


def issue(api: ApiServer, who: ApiClient, name: str) -> Reply:
    """As `who`."""
    encoded = base64.b64encode(certificate(api)).decode()
    return who.patch(f"{CSRS}/{name}/status", {"status": {"certificate": encoded}})


def _watch(who: ApiClient) -> Reply:
    """The beginning of a watch: a list of what is there, or a refusal."""
    return who.ask("GET", f"{CSRS}?watch=1&timeoutSeconds=1")


def rules_of(document: dict[str, Any]) -> list[tuple[int, str, str]]:
    """Index, resource and verb of each right."""
    return [
        (index, resource, verb)
        for index, rule in enumerate(document["rules"])
        for resource in rule["resources"]
        for verb in rule["verbs"]
    ]


def assert_work(todo: dict[tuple[str, str], Action], gateway: ApiClient) -> None:
    """Each of them is allowed, as soon as the authorizer knows it."""
    for key, action in todo.items():
        reply = wait_until(lambda: action(gateway), lambda found: found.status == 200, SOON, pause_seconds=0.05)  # noqa: B023
        assert reply.status == 200, (key, reply)


def test_every_right_is_needed(api: ApiServer, gateway: ApiClient, tried: Callable[[str, int], None]) -> None:
    """With all of them each action works; with any one taken away its action is forbidden, and the others still work."""
    todo = actions(api)
    assert_work(todo, gateway)
    seen = set()
    for path in (CLUSTER_ROLE, ROLE):
        whole = api.admin.ask("GET", path).document
        for index, resource, verb in rules_of(whole):
            rules = json.loads(json.dumps(whole["rules"]))
            rules[index]["verbs"] = [one for one in rules[index]["verbs"] if one != verb] or ["none"]
            assert api.admin.patch(path, {"rules": rules}).status == 200
            action = todo[resource, verb]
            reply = wait_until(lambda: action(gateway), lambda found: found.status == 403, SOON, pause_seconds=0.05)  # noqa: B023
            assert reply.status == 403, (resource, verb, reply)
            seen.add((resource, verb))
        assert api.admin.patch(path, {"rules": whole["rules"]}).status == 200
    assert seen == set(todo)
    assert_work(todo, gateway)
    tried("rights of the gateway taken away", len(seen))


def test_nothing_else_is_allowed(api: ApiServer, gateway: ApiClient, tried: Callable[[str, int], None]) -> None:
    """An attacker's uses of the gateway's token are forbidden; an administrator's twin of each is not."""
    other = api.admin.create_csr(node_csr(), "example.com/other", ["client auth"]).document["metadata"]["name"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"},
           "spec": {"containers": [{"name": "x", "image": "x"}]}}  # fmt: skip
    binding = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "x"},
               "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
               "subjects": [{"kind": "ServiceAccount", "name": "ca-bridge-gateway", "namespace": NAMESPACE}]}  # fmt: skip
    lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "other"}}
    token = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    account = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/ca-bridge-gateway"
    forbidden: list[tuple[str, Action, int]] = [
        ("approve another signer's", lambda who: decide(api, who, other), 200),
        ("sign another signer's", lambda who: issue(api, who, other), 200),
        ("ask for a certificate", lambda who: who.create_csr(node_csr(), CLIENT, ["client auth"]), 201),
        ("label a request", lambda who: who.patch(f"{CSRS}/{other}", {"metadata": {"labels": {"a": "b"}}}), 200),
        ("delete a request", lambda who: who.ask("DELETE", f"{CSRS}/{other}"), 200),
        ("watch nodes", lambda who: who.ask("GET", "/api/v1/nodes?watch=1&timeoutSeconds=1"), 200),
        ("change a node", lambda who: who.patch("/api/v1/nodes/w1", {"metadata": {"labels": {"a": "b"}}}), 200),
        ("read secrets", lambda who: who.ask("GET", f"/api/v1/namespaces/{NAMESPACE}/secrets/ca-bridge-gateway"), 200),
        ("list secrets", lambda who: who.ask("GET", "/api/v1/secrets"), 200),
        ("read settings", lambda who: who.ask("GET", f"/api/v1/namespaces/{NAMESPACE}/configmaps/ca-bridge-gateway"), 200),
        ("make pods", lambda who: who.ask("POST", f"/api/v1/namespaces/{NAMESPACE}/pods", pod), 201),
        ("make leases", lambda who: who.ask("POST", LEASE.rpartition("/")[0], lease), 201),
        ("delete its lease", lambda who: who.ask("DELETE", LEASE), 200),
        ("a token", lambda who: who.ask("POST", f"{account}/token", token), 201),
        ("be cluster-admin", lambda who: who.ask("POST", f"{ROLES}/clusterrolebindings", binding), 201),
        ("widen its role", lambda who: who.patch(CLUSTER_ROLE, {"metadata": {"labels": {"a": "b"}}}), 200),
    ]  # fmt: skip
    for what, action, _ in forbidden:
        assert action(gateway).status == 403, what
    twins = {what: action(api.admin).status for what, action, wanted in forbidden if action(api.admin).status != wanted}
    # what can be done once only has been done by the first of the two looks
    assert set(twins) <= {"approve another signer's", "delete a request", "make leases", "delete its lease",
                          "be cluster-admin", "make pods"}, twins  # fmt: skip
    api.kubectl("delete", "clusterrolebinding", "x")
    api.kubectl("apply", "-f", str(SHIPPED / "10-rbac.yaml"))
    tried("things that the gateway's token can't do", len(forbidden))


# ------------------------------------------------------------------------------------------------ admission policies


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """An API server with all manifests; returns once the policies count."""
    with kube_api.serving(tmp_path_factory.mktemp("admission")) as server:
        server.kubectl("apply", "-f", str(SHIPPED))
        server.apply("{apiVersion: v1, kind: Node, metadata: {name: w1}}")
        for policy in ("ca-bridge-gateway-decides", "ca-bridge-gateway-requests"):
            path = f"/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies/{policy}"
            found = server.admin.ask("GET", path).document
            assert not found.get("status", {}).get("typeChecking", {}).get("expressionWarnings"), found

        def refused() -> bool:
            reply = server.admin.create_csr(node_csr(), SERVING, ["digital signature", "server auth"])
            return reply.status == 403

        assert wait_until(refused, bool, SOON, pause_seconds=0.2)
        server.apply("""
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: bootstrap}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: "system:node-bootstrapper"}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: Group, name: "system:bootstrappers"}]
""")
        node = server.client("system:bootstrap:abcdef", "system:bootstrappers")
        assert wait_until(lambda: node.may("create"), bool, SOON, pause_seconds=0.05)
        yield server


def test_only_the_gateway_approves_and_signs(guarded: ApiServer) -> None:
    """
    Even system:masters can't approve or sign for its signers, but by the gateway's name.

    Denying, failing and other signers stay open.
    """
    gateway, boss = guarded.bearer(NAMESPACE, "ca-bridge-gateway"), guarded.admin
    for signer in (CLIENT, SERVING):
        name = asked(guarded, signer)
        reply = decide(guarded, boss, name)
        assert (reply.status, "only the gateway approves" in reply.message) == (403, True), reply
        reply = issue(guarded, boss, name)
        assert (reply.status, "only the gateway writes certificates" in reply.message) == (403, True), reply
        assert decide(guarded, gateway, name).status == 200
        assert issue(guarded, boss, name).status == 403
        assert issue(guarded, gateway, name).status == 200
        old = guarded.admin.csr(name)["status"]["conditions"]
        body = {"status": {"conditions": [*old, {"type": "Failed", "status": "True", "reason": "X", "message": ""}]}}
        assert boss.patch(f"{CSRS}/{name}/status", body).status == 200  # which leaves the certificate alone
    assert decide(guarded, boss, asked(guarded, SERVING), "Denied").status == 200
    other = boss.create_csr(node_csr(), "example.com/other", ["client auth"]).document["metadata"]["name"]
    assert decide(guarded, boss, other).status == 200
    assert issue(guarded, boss, other).status == 200
    name, impersonating = asked(guarded, SERVING), guarded.client("boss", "system:masters")
    impersonating.session.headers["Impersonate-User"] = f"system:serviceaccount:{NAMESPACE}:ca-bridge-gateway"
    assert decide(guarded, impersonating, name).status == 200
    assert issue(guarded, impersonating, name).status == 200  # whatever it is, by a CA or not


def test_who_may_ask(guarded: ApiServer) -> None:
    """Nodes and bootstrap tokens may ask for kubelets' certificates; none may ask for months or for a large one; twins pass."""
    node, boss = guarded.client("system:node:w1", "system:nodes"), guarded.admin
    bootstrap = guarded.client("system:bootstrap:abcdef", "system:bootstrappers")
    client, server = ["digital signature", "client auth"], ["digital signature", "server auth"]
    month = 30 * 86400
    many = [x509.DNSName(f"host-{number}.example.com") for number in range(900)]
    large = csr_pem(user_name("bob", []), many)
    assert len(large) > 1 << 14

    def ask(who: ApiClient, signer: str, usages: list[str], pem: bytes = b"", **more: int) -> tuple[int, str]:
        reply = who.create_csr(pem or node_csr(), signer, usages, **more)
        return reply.status, reply.message.rpartition("denied request: ")[2] if reply.status >= 400 else ""

    assert ask(node, CLIENT, client) == (201, "")
    assert ask(node, SERVING, server, expirationSeconds=month) == (201, "")
    assert ask(bootstrap, CLIENT, client) == (201, "")
    assert ask(bootstrap, SERVING, server) == (403, "only nodes may request kubelets' serving certificates")
    assert ask(boss, SERVING, server) == (403, "only nodes may request kubelets' serving certificates")
    assert ask(boss, CLIENT, client) == (
        403,
        "only nodes and bootstrap tokens may request kubelets' client certificates",
    )
    masked = guarded.client("system:node:w1", "system:nodes", "system:masters")
    assert ask(masked, CLIENT, client) == (403, "members of system:masters are not nodes")
    assert ask(boss, USER, client, csr_pem(user_name("bob", []))) == (201, "")
    assert ask(node, CLIENT, client, expirationSeconds=month + 1)[1] == "the request asks for more than 30 days"
    assert ask(boss, USER, client, large)[1] == "the request is larger than 16 KiB"
    assert ask(boss, "example.com/other", client, large, expirationSeconds=month + 1) == (201, "")


@pytest.mark.attack("G1", "G3")
def test_what_may_stand_round_a_request(guarded: ApiServer) -> None:
    """No finalizers and no owners, which would keep it for ever, and few annotations; twins pass."""
    node = guarded.client("system:node:w1", "system:nodes")
    owner = {"apiVersion": "v1", "kind": "Node", "name": "w1", "uid": "00000000-0000-4000-8000-000000000000"}

    def ask(signer: str = CLIENT, **metadata: object) -> tuple[int, str]:
        made = body(node_csr(), signer)
        made["metadata"] |= metadata
        reply = node.ask("POST", CSRS, made)
        return reply.status, reply.message.rpartition("denied request: ")[2] if reply.status >= 400 else ""

    kept = (422, "a request must not have finalizers or owners")
    assert ask(finalizers=["example.com/mine"]) == kept
    assert ask(ownerReferences=[owner]) == kept
    assert ask(annotations={"x": "x" * 24_600})[1] == "the annotations are larger than 24 KiB"
    assert ask(annotations={"x": "x" * 20_000, "y": "y"}) == (201, "")
    assert ask("example.com/other", finalizers=["example.com/mine"]) == (201, "")


# -------------------------------------------------------------------------------------------------- files by themselves


def documents() -> list[dict[str, Any]]:
    """All that is shipped."""
    return [one for path in sorted(SHIPPED.glob("*.yaml")) for one in yaml.safe_load_all(path.read_text()) if one]


def test_the_pods_have_no_privilege() -> None:
    """No root, nothing to write to but its own volumes, no capability, no escalation, the runtime's seccomp profile."""
    [deployment] = [one for one in documents() if one["kind"] == "Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert deployment["spec"]["replicas"] >= 2
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "privileged": False,
        "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert {kind for volume in pod["volumes"] for kind in volume} == {"name", "projected", "emptyDir"}
    assert not {"hostPID", "hostIPC", "shareProcessNamespace"} & set(pod)
    assert container["resources"]["limits"]["memory"] == "256Mi"


def test_its_settings_are_whole_but_for_their_places() -> None:
    """The shipped settings name only files that the pod's volumes bring."""
    objects = documents()
    [deployment] = [one for one in objects if one["kind"] == "Deployment"]
    [config] = [one for one in objects if one["kind"] == "ConfigMap"]
    sources = deployment["spec"]["template"]["spec"]["volumes"][0]["projected"]["sources"]
    brought = {item["path"] for one in sources for kind in one.values() for item in kind.get("items", [])}
    text = config["data"]["config.toml"]
    settings = parse(text)
    assert set(registry.configured(settings, settings.authorities)) == {"ca"}
    policy = gateway_policy.parse(config["data"]["gateway-policy.toml"])
    assert set(policy.signers) == {CLIENT, SERVING, USER}
    for path in ("files/role-id", "files/secret-id", "files/vault-ca.crt"):
        assert f"/etc/ca-bridge/{path}" in text
        assert path in brought
    assert "trust/ca.crt" in brought
    assert {"config.toml", "gateway-policy.toml", "inventory.toml"} == set(config["data"])
