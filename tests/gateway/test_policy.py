"""What a policy says to a request by the certificates API: the rules by themselves."""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.desk import node_inventory
from bridge.errors import SettingsError
from bridge.gateway import policy as gateway_policy
from bridge.gateway.policy import Allowed, Hostile, Later, NodeState, Request, Verdict, World, judge, node_of
from bridge.gateway.rules import CLIENT, CLIENT_KUBELET, SERVING, spec_of
from bridge.pki.csr import OddRequestError, read_strictly
from bridge.settings import load
from bridge.specs import KUBELET_SERVING, SPECS
from tests.kit import gateways, hostile_csrs
from tests.kit.gateways import csr_pem, node_subject

NOW = datetime(2026, 11, 26, tzinfo=UTC)
INVENTORY = node_inventory.parse(gateways.INVENTORY + gateways.workers("w1", "w2"))
READY = NodeState(exists=True, ready=True)
ABSENT = NodeState(exists=False)
TOKENS = "system:bootstrappers:kubeadm:default-node-token"


def world(*, policy: str = gateways.POLICY, node: str = "w1", state: NodeState | None = READY) -> World:
    """As it is for a worker that is there."""
    return World(
        policy=gateway_policy.parse(policy),
        cluster="kubernetes",
        inventory=INVENTORY,
        ca_end=NOW + timedelta(days=100),
        min_validity=timedelta(minutes=5),
        now=NOW,
        entry=INVENTORY.nodes.get(node),
        state=state,
    )


def asked(signer: str = CLIENT_KUBELET, node: str = "w1", pem: bytes = b"") -> Request:
    """By the node itself."""
    sans = hostile_csrs.honest_sans(node) if signer == SERVING else []
    return Request(
        signer=signer,
        username=f"system:node:{node}",
        groups=frozenset({"system:nodes", "system:authenticated"}),
        usages=frozenset(gateways.USAGES[signer]),
        asked_validity=None,
        pem=pem or csr_pem(node_subject(node), sans),
    )


def by_token(request: Request) -> Request:
    """The same, asked with a bootstrap token."""
    return replace(request, username="system:bootstrap:abcdef", groups=frozenset({TOKENS}))


def validity(verdict: Verdict) -> timedelta:
    """The validity of an allowed request."""
    assert isinstance(verdict, Allowed)
    return verdict.validity


def test_the_validity_is_the_shortest_one_asked_for() -> None:
    """The validity is the shortest of the request's, the table's, `allow`'s and the CA's; a long request is shortened and not refused."""
    request = asked()
    assert validity(judge(request, world())) == timedelta(days=7)
    for seconds in (600, 86400):
        desired = replace(request, asked_validity=timedelta(seconds=seconds))
        assert validity(judge(desired, world())) == timedelta(seconds=seconds)
    assert validity(judge(replace(request, asked_validity=timedelta(days=20000)), world())) == timedelta(days=7)
    ends = replace(world(), ca_end=NOW + timedelta(hours=2))
    assert validity(judge(request, ends)) == timedelta(hours=2) - timedelta(minutes=5)
    late = judge(request, replace(world(), ca_end=NOW + timedelta(minutes=8)))
    assert late == Later("the CA's certificate ends at 2026-11-26 00:08 UTC")
    brief = replace(request, asked_validity=timedelta(minutes=10))
    found = judge(brief, replace(world(), min_validity=timedelta(minutes=15)))
    assert found == Later("wanted at least 15m (gateway.min_validity), found 10m by the request or the policy")
    short = gateways.POLICY.replace('max_validity = "30d"', 'max_validity = "1h"')
    found = judge(replace(request, asked_validity=timedelta(minutes=10)), world(policy=short))
    assert isinstance(found, Allowed)
    assert (found.validity, found.longest) == (timedelta(minutes=10), timedelta(hours=1))
    assert validity(judge(request, world(policy=short))) == timedelta(hours=1)


@pytest.mark.parametrize(
    ("request_", "state", "entry", "wanted"),
    [
        (asked(), READY, "w1", Allowed),
        (asked(), NodeState(exists=True), "w1", Allowed),  # not ready, and renews: that may be why
        (asked(), ABSENT, "w1", Later),
        (asked(), None, "w1", Later),
        (asked(), READY, "other", Later),
        (by_token(asked()), ABSENT, "w1", Allowed),
        (by_token(asked()), READY, "w1", Later),
        (by_token(asked()), NodeState(exists=True), "w1", Later),
        (by_token(asked()), ABSENT, "other", Later),
        (by_token(asked(SERVING)), ABSENT, "w1", Hostile),
        (by_token(asked(node="cp1")), ABSENT, "cp1", Hostile),
        (replace(asked(), username="system:node:w2"), READY, "w1", Hostile),
        (replace(asked(), groups=frozenset({"system:authenticated"})), READY, "w1", Hostile),
        (replace(by_token(asked()), groups=frozenset({"system:bootstrappers"})), ABSENT, "w1", Hostile),
        (asked(SERVING), READY, "w1", Allowed),
    ],
)
def test_who_may_ask_for_a_node(request_: Request, state: NodeState | None, entry: str, wanted: type) -> None:
    """A node for itself; a token for one that the inventory names, and that is not there."""
    assert isinstance(judge(request_, world(node=entry, state=state)), wanted)


@pytest.mark.parametrize("users", ["system:node:{node}", "system:node:cp1"])
def test_a_user_who_is_called_like_a_node_is_none(users: str) -> None:
    """An identity provider's user of that name, without the nodes' group, has no grant of the node's; the node has."""
    signer = f"{gateways.DOMAIN}/apiserver"
    policy = gateways.POLICY.replace('"system:node:{node}", "kubernetes-super-admin"', f'"{users}"')
    assert users in policy
    pem = csr_pem([(hostile_csrs.CN, "kube-apiserver")], [x509.DNSName("kubernetes"), x509.DNSName("cp1")])
    usages = frozenset({"digital signature", "server auth"})
    node = replace(asked(node="cp1"), signer=signer, pem=pem, usages=usages)
    assert isinstance(judge(node, world(policy=policy)), Allowed)
    false_node = replace(node, groups=frozenset({"system:authenticated"}))
    assert judge(false_node, world(policy=policy)) == Hostile("no grant lets system:node:cp1 ask for apiserver")


def test_a_node_may_rejoin_or_be_blocked() -> None:
    """The inventory alone decides, and a node rejoins only while it is not ready."""
    entry = replace(INVENTORY.nodes["w1"], rejoin=True)
    back = replace(world(), entry=entry, state=NodeState(exists=True))
    assert isinstance(judge(by_token(asked()), back), Allowed)
    assert isinstance(judge(by_token(asked()), replace(back, state=READY)), Later)
    assert isinstance(judge(asked(), replace(world(), entry=replace(entry, blocked=True))), Later)


def test_nodes_and_clusters_of_the_policy() -> None:
    """`allow.nodes` and `allow.clusters` count here as they do at the desk."""
    others = gateways.POLICY.replace('nodes = ["*"]', 'nodes = ["x*"]')
    assert isinstance(judge(asked(), world(policy=others)), Later)
    assert isinstance(judge(asked(), replace(world(), cluster="another")), Later)


def test_a_grant_puts_the_user_into_values_alone() -> None:
    """A username can't add attributes to a subject, nor be one of Kubernetes' own."""

    def user(name: str, *subject: tuple[x509.ObjectIdentifier, str]) -> Verdict:
        return judge(
            Request(
                signer=CLIENT, username=name, groups=frozenset({"corp:issuers"}), usages=frozenset({"client auth"}),
                asked_validity=None, pem=csr_pem(list(subject)),
            ),
            world(),
        )  # fmt: skip

    cn, org = hostile_csrs.CN, hostile_csrs.ORG
    assert isinstance(user("zoe", (org, "developers"), (cn, "zoe")), Allowed)
    assert isinstance(user("zoe", (org, "developers"), (org, "readers"), (cn, "zoe")), Allowed)
    odd = "zoe,O=kubeadm:cluster-admins"
    assert isinstance(user(odd, (org, "developers"), (cn, odd)), Allowed)  # one value with a comma in it
    assert isinstance(user(odd, (org, "developers"), (org, "kubeadm:cluster-admins"), (cn, "zoe")), Hostile)
    assert isinstance(user("system:node:w1", (org, "developers"), (cn, "system:node:w1")), Hostile)
    assert isinstance(user("zoe", (cn, "zoe")), Hostile)


def test_a_table_of_users_limits_what_grants_give() -> None:
    """Names, groups and lifetimes: a grant gives no more than `[users]` allows, and all that it names where there is no such table."""
    head = '[allow]\nclusters = ["kubernetes"]\nnodes = ["*"]\n'
    grants = f'[signer."{CLIENT}".grant.x]\nusers = ["alice"]\nsubjects = ["O=dev-a,CN={{user}}", "O=ops,CN={{user}}", '
    grants += '"O=kubeadm:cluster-admins,CN={user}", "O=dev-a,CN=bob", "CN=kubernetes-admin"]\n'
    table = '[users]\ngroups = ["dev-*"]\nnames = ["alice"]\nmax_validity = "8h"\n'
    cn, org = hostile_csrs.CN, hostile_csrs.ORG
    subjects = [
        [(org, "dev-a"), (cn, "alice")], [(org, "ops"), (cn, "alice")], [(org, "kubeadm:cluster-admins"), (cn, "alice")],
        [(org, "dev-a"), (cn, "bob")], [(cn, "kubernetes-admin")],
    ]  # fmt: skip
    requests = [replace(asked(CLIENT, pem=csr_pem(one)), username="alice", groups=frozenset()) for one in subjects]
    first, *others = (judge(one, world(policy=head + table + grants)) for one in requests)
    assert validity(first) == timedelta(hours=8)
    assert [type(one) for one in others] == [Hostile] * 4
    assert {validity(judge(one, world(policy=head + grants))) for one in requests} == {timedelta(days=100, minutes=-5)}
    admins = table + 'allow = ["kubeadm:cluster-admins"]\n'
    assert isinstance(judge(requests[2], world(policy=head + admins + grants)), Allowed)


def test_each_hostile_case_is_judged_alike_without_an_api_server() -> None:
    """The same cases that a real API server lets through, by the rules alone: denied, or left."""
    wrong = {}
    for case in hostile_csrs.cases():
        asking = case.make(case.worker)
        entry = node_inventory.parse(gateways.INVENTORY + gateways.workers(case.worker))
        request = Request(
            signer=asking.signer,
            username=asking.user,
            groups=frozenset({asking.group}),
            usages=frozenset(asking.usages or gateways.USAGES.get(asking.signer, ["digital signature", "server auth"])),
            asked_validity=None,
            pem=asking.pem,
        )
        node = node_of(request)
        here = replace(world(), inventory=entry, entry=entry.nodes.get(node or ""), state=READY)
        verdict = judge(request, here)
        if isinstance(verdict, Allowed) or (asking.wanted == "denied" and not isinstance(verdict, Hostile)):
            wrong[case.name] = verdict
    assert wrong == {}


_HONEST = csr_pem(node_subject("w1"), [x509.DNSName("w1"), x509.IPAddress(ipaddress.ip_address("198.51.0.1"))])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_mutated_csr_is_odd_or_says_the_same(data: st.DataObject) -> None:
    """Bytes changed, cut or added anywhere: it is refused, or nothing of it has changed."""
    text = bytearray(_HONEST)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text) - 1))
        match data.draw(st.sampled_from(["change", "cut", "add"])):
            case "change":
                text[at] = data.draw(st.integers(0, 255))
            case "cut":
                del text[at : at + data.draw(st.integers(1, 80))]
            case _:
                text[at:at] = data.draw(st.binary(min_size=1, max_size=20))
        if not text:
            return
    try:
        found = read_strictly(bytes(text))
    except OddRequestError:
        return
    assert found.parsed == read_strictly(_HONEST).parsed


@given(st.binary(max_size=300))
def test_anything_is_a_csr_or_odd(data: bytes) -> None:
    """Nothing but our own error comes out, whatever goes in."""
    for text in (data, b"-----BEGIN CERTIFICATE REQUEST-----\n" + data + b"-----END CERTIFICATE REQUEST-----\n"):
        with pytest.raises(OddRequestError):
            read_strictly(text)


def test_signers_of_a_policy() -> None:
    """A policy may have Kubernetes' own three signers, and a domain of one's own with kubeadm's names."""
    assert spec_of(SERVING) is KUBELET_SERVING
    assert spec_of("ca-bridge.internal/super-admin.conf") is SPECS["super-admin.conf"]
    for name in ("kubernetes.io/apiserver", "kubernetes.io/legacy-unknown", "x.kubernetes.io/apiserver", "apiserver",
                 "/apiserver", "example.com/nothing", "x' || true || '/apiserver", "A.example/apiserver", "a..b/apiserver"):  # fmt: skip
        assert spec_of(name) is None, name


@pytest.mark.parametrize(
    ("table", "wanted"),
    [
        ('[signer."kubernetes.io/whatever"]', "DOMAIN/NAME"),
        (f'[signer."{SERVING}"]\nkeys = ["rsa-1024"]', "keys"),
        (f'[signer."{SERVING}"]\nbootstrap_groups = ["x"]', CLIENT_KUBELET),
        (f'[signer."{SERVING}".grant.x]\nusers = ["x"]', "asks for itself"),
        (f'[signer."{CLIENT}".grant.x]\nsubjects = ["CN=x"]', "users or groups"),
        (f'[signer."{CLIENT}".grant.x]\nusers = ["x"]', "whole subjects"),
        (f'[signer."{CLIENT}".grant.x]\nusers = ["x"]\nsubjects = ["CN=system:admin"]', "Kubernetes' own"),
        (f'[signer."{CLIENT}".grant.x]\nusers = ["x"]\nsubjects = ["O=system:masters,CN=x"]', "Kubernetes' own"),
        (f'[signer."{CLIENT}".grant.x]\nusers = ["x"]\nsubjects = ["O=x"]', "one CN"),
        ('[signer."a.example/apiserver".grant.x]\nusers = ["x"]\nsubjects = ["CN=x"]', "certificate"),
        (f'[signer."{CLIENT_KUBELET}"]\nbootstrap_groups = ["system:authenticated"]', "bootstrap tokens"),
        (f'[signer."{SERVING}"]\nunknown = 1', "unknown"),
        (
            '[approvals]\napprovers = ["alice"]\n[certificate.kubelet-server]\napproval = "required"',
            "in the table of the .signer., since no desk decides about it here",
        ),
        ('[certificate."super-admin.conf"]\napproval = "required"', "people who decide"),
    ],
)
def test_what_a_policy_may_not_say(table: str, wanted: str) -> None:
    """It is an error when it is read, and not a request later."""
    head = '[allow]\nclusters = ["kubernetes"]\nnodes = ["*"]\n'
    assert gateway_policy.parse(head).signers == {}
    with pytest.raises(SettingsError, match=wanted):
        gateway_policy.parse(head + table)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('[node.w1]\naddresses = ["10.96.0.1"]', "none of the API's"),
        ('[cluster]\nendpoints = ["192.0.2.5"]\n[node.w1]\naddresses = ["192.0.2.5"]', "none of the API's"),
        ('[node.w1]\nnames = ["kubernetes"]', "none of the API's"),
        ('[node.w1]\nnames = ["*.example.com"]', "host names"),
        ('[node.w1]\naddresses = ["10.0.0.0/8"]', "IP addresses"),
        ('[node."W 1"]', "a node's name"),
        ('[cluster]\nservice_networks = ["x"]', "networks"),
        ('[node.cp]\ncontrol_plane = true\naddresses = ["192.0.2.7"]\n[node.w]\naddresses = ["192.0.2.7"]', "none of"),
        ("[nodes]", "one of cluster, node"),
        ("garbage", "TOML"),
    ],
)
def test_what_an_inventory_may_not_say(text: str, wanted: str) -> None:
    """A node with a name or an address of the API is a mistake or an attack."""
    with pytest.raises(SettingsError, match=wanted):
        node_inventory.parse(text)


def test_the_shipped_examples_are_read() -> None:
    """Policy and inventory below config/gateway, as `docs/gateway.md` shows them."""
    directory = Path(__file__).parents[2] / "config/gateway"
    policy = gateway_policy.parse((directory / "policy.toml").read_text())
    assert {CLIENT_KUBELET, SERVING, CLIENT, "ca-bridge.internal/apiserver"} == set(policy.signers)
    found = node_inventory.parse((directory / "inventory.toml").read_text())
    assert set(found.control_planes) == {"cp1"}
    assert load.parse((directory / "config.toml").read_text()).gateway == load.parse("").gateway
    page = (directory.parents[1] / "docs/gateway.md").read_text()
    for name in ("policy", "inventory", "config"):
        body = (directory / f"{name}.toml").read_text().split("\n\n", 1)[1].strip()
        assert body in page, name
