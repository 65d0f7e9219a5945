"""What a policy says to a pod's request: the tables and the judgement by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.contract import Names
from bridge.desk import node_inventory
from bridge.desk.node_inventory import NodeEntry
from bridge.errors import SettingsError
from bridge.gateway import policy
from bridge.gateway.pod_policy import PodRequest, PodState, PodWorld, judge
from bridge.gateway.policy import Allowed, Hostile, Later
from bridge.gateway.rules import dates_problem, patterns, refresh_at
from tests.kit import pods
from tests.kit.gateways import csr_pem
from tests.kit.pods import SIGNER, TRUST_DOMAIN

NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)
PEM = csr_pem([])
REQUEST = PodRequest(
    signer=SIGNER, namespace="shop", pod="web-0", pod_uid="p", service_account="web", service_account_uid="s",
    node="w1", node_uid="n", seconds=86400, annotations=(), pem=PEM,
)  # fmt: skip
POD = PodState(uid="p", node="w1", service_account="web", phase="Pending", key_types=frozenset({"ECDSAP256"}))
INVENTORY = node_inventory.parse('[cluster]\nendpoints = ["api.example.com"]\n[node.cp1]\ncontrol_plane = true\n')


def world(text: str = pods.POLICY, **changes: Any) -> PodWorld:
    """As it is for a pod that may have a certificate."""
    usual = PodWorld(
        policy=policy.parse(text), cluster="kubernetes", inventory=INVENTORY, ca_end=NOW + timedelta(days=100), now=NOW,
        created=NOW, pod=POD, account_uid="s", node_uid="n", labels={}, entry=None,
    )  # fmt: skip
    return replace(usual, **changes)


def with_keys(keys: str) -> str:
    """The policy with more keys in the signer's table."""
    return pods.POLICY.replace(f'trust_domain = "{TRUST_DOMAIN}"\n', f'trust_domain = "{TRUST_DOMAIN}"\n{keys}\n')


def test_names_are_the_policys() -> None:
    """Namespace and service account in the SPIFFE ID, an identity's DNS names beside it; another account has none."""
    found = judge(REQUEST, world())
    assert isinstance(found, Allowed)
    assert found.names == Names(
        uris=(f"spiffe://{TRUST_DOMAIN}/ns/shop/sa/web",), dns=("web.shop.svc", "web-0.web.shop.svc")
    )
    other = judge(replace(REQUEST, service_account="db"), world(pod=replace(POD, service_account="db")))
    assert isinstance(other, Allowed)
    assert other.names == Names(uris=(f"spiffe://{TRUST_DOMAIN}/ns/shop/sa/db",))


@pytest.mark.parametrize(
    "changes",
    [
        {"pod": None},
        {"pod": replace(POD, uid="another")},
        {"pod": replace(POD, phase="Succeeded")},
        {"pod": replace(POD, phase="Failed")},
        {"pod": replace(POD, ends=NOW)},
        {"account_uid": None},
        {"account_uid": "another"},
        {"node_uid": None},
        {"node_uid": "another"},
        {"created": NOW - timedelta(minutes=15)},
        {"cluster": "other"},
        {"ca_end": NOW + timedelta(minutes=50)},
        {"entry": NodeEntry(blocked=True)},
    ],
)
def test_what_may_pass_later_is_left(changes: Mapping[str, Any]) -> None:
    """A denied pod never starts, so that nothing is denied for what is missing now; a twin in its grace period is signed."""
    assert isinstance(judge(REQUEST, world(**changes)), Later)
    ends = replace(POD, ends=NOW + timedelta(seconds=1))
    assert isinstance(judge(REQUEST, world(pod=ends)), Allowed)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"namespace": "kube-system"}, "NotAllowed"),
        ({"seconds": 4199}, "NotAllowed"),
        ({"annotations": (("x.y/z", "1"),)}, "InvalidUnverifiedUserAnnotations"),
        ({"annotations": (("corp.example/tier", "iron"),)}, "InvalidUnverifiedUserAnnotations"),
    ],
)
def test_what_the_policy_does_not_allow(changes: Any, code: str) -> None:
    """A first request is denied with words for its owner; the next one of a running pod waits for a better policy."""
    request = replace(REQUEST, **changes)
    first = judge(request, world())
    assert isinstance(first, Hostile)
    assert first.code == code
    assert first.message != "not allowed"
    assert isinstance(judge(request, world(pod=replace(POD, phase="Running"))), Later)


def test_a_key_that_the_policy_does_not_take() -> None:
    """The reason is the API's own, and the message names those that it takes."""
    text = with_keys('keys = ["ecdsa-p384", "ed25519"]')
    found = judge(REQUEST, world(text))
    assert found == Hostile("key: ecdsa-p256", "UnsupportedKeyType", "keyType: this signer takes ECDSAP384, ED25519")


def test_a_namespace_by_its_labels() -> None:
    """All of them, and the name as well where both are given."""
    text = with_keys('namespace_labels = { "corp.example/mtls" = "yes" }')
    assert isinstance(judge(REQUEST, world(text)), Hostile)
    assert isinstance(judge(REQUEST, world(text, labels={"corp.example/mtls": "no"})), Hostile)
    assert isinstance(judge(REQUEST, world(text, labels={"corp.example/mtls": "yes"})), Allowed)
    elsewhere = replace(REQUEST, namespace="other")
    assert isinstance(judge(elsewhere, world(text, labels={"corp.example/mtls": "yes"})), Hostile)


def test_an_hour_of_a_ca_with_exact_dates() -> None:
    """The API server counts from the backdated beginning: with exact dates an hour passes, and without them it would not."""
    hour = replace(REQUEST, seconds=3600)
    for exact, wanted in (("false", Hostile), ("true", Allowed)):
        text = with_keys(f'backdating = "1m"\nexact_dates = {exact}')
        found = judge(hour, world(text))
        assert isinstance(found, wanted), found
        if isinstance(found, Allowed):
            assert found.validity == timedelta(minutes=59)


def test_the_life_is_the_shortest_one_asked_for() -> None:
    """The lifetime is the shortest of the policy's, the CA's, and the pod's without the CA's backdating, so that the API server takes it."""

    def life(request: PodRequest = REQUEST, text: str = pods.POLICY, **changes: Any) -> timedelta:
        found = judge(request, world(text, **changes))
        assert isinstance(found, Allowed)
        assert found.most == timedelta(seconds=request.seconds)
        return found.validity

    assert life() == timedelta(hours=23, minutes=50)
    assert life(replace(REQUEST, seconds=7 * 86400)) == timedelta(hours=24)
    assert life(text=with_keys('max_validity = "2h"')) == timedelta(hours=2)
    assert life(text=with_keys('backdating = "1m"')) == timedelta(hours=23, minutes=59)
    assert life(ca_end=NOW + timedelta(hours=3)) == timedelta(hours=2, minutes=55)
    allow = pods.POLICY.replace('nodes = ["*"]', 'nodes = ["*"]\nmax_validity = "90m"')
    assert life(text=allow) == timedelta(minutes=90)


def test_names_that_are_never_a_pods() -> None:
    """The API server's and a node's: a template that comes to one of them gives nothing."""
    for name, account in (("api.example.com", "web"), ("{service_account}", "cp1")):
        text = pods.POLICY.replace('dns = ["web.{namespace}.svc", "{pod}.web.{namespace}.svc"]', f'dns = ["{name}"]')
        text = text.replace('service_accounts = ["web"]', 'service_accounts = ["*"]')
        found = judge(replace(REQUEST, service_account=account), world(text, pod=replace(POD, service_account=account)))
        assert isinstance(found, Later), name


@pytest.mark.parametrize(
    "keys",
    [
        'path = "/ns/{namespace}"',
        'path = "/{namespace}-{service_account}"',
        'path = "/ns/{namespace}/sa/{service_account}/.."',
        'path = "/ns/{namespace}//sa/{service_account}"',
        'path = "ns/{namespace}/sa/{service_account}"',
        'path = "/ns/{namespace}/sa/{service_account}/{node}"',
        'path = "/ns/{namespace}/sa/{service_account!r}"',
        'keys = ["rsa-1024"]',
        "keys = []",
        'max_validity = "30m"',
        'max_validity = "92d"',
        'backdating = "1h"',
        "refresh = 90",
        "service_accounts = []",
        'usages = "any"',
        "unknown = 1",
    ],
)
def test_tables_that_are_refused(keys: str) -> None:
    """Each by itself; without the line the policy is read."""
    policy.parse(pods.POLICY)
    with pytest.raises(SettingsError, match=keys.partition(" ")[0]):
        policy.parse(with_keys(keys))


@pytest.mark.parametrize(
    "dns",
    [
        *(
            "kubernetes",
            "kubernetes.default.svc",
            "localhost",
            "*.shop.svc",
            "Web.svc",
            "{node}.svc",
            "{pod.x}",
            "a..b",
        ),
        "{namespace}-{service_account}.svc",
        "{pod}.{namespace}.{service_account}.svc",
    ],
)
def test_dns_names_that_are_refused(dns: str) -> None:
    """Names of the API server, wildcards, templates with other placeholders, or that give two pods one name, are refused."""
    with pytest.raises(SettingsError, match="dns"):
        policy.parse(pods.POLICY.replace('"web.{namespace}.svc"', f'"{dns}"'))


def test_a_subject_that_two_accounts_could_have_is_refused() -> None:
    """
    `a-b` of c, and a of `b-c`; with a dot in the hyphen's place no two namespaces have one name. A pod's name and an
    account's may have dots, so that both in one template are refused, too.
    """
    both = "{pod}.{namespace}.{service_account}"
    two = [
        both.format(namespace="n", pod=one, service_account=other) for one, other in (("a.n.b", "c"), ("a", "b.n.c"))
    ]
    assert two[0] == two[1]
    for name in ("{namespace}-{service_account}", "x{pod}{namespace}", both, "{service_account}.x.{pod}"):
        with pytest.raises(SettingsError, match="common_name"):
            policy.parse(f'{pods.POLICY}common_name = "{name}"\n')
    for name in ("{service_account}.{namespace}", "{namespace}.x.{pod}", "{pod}.{namespace}.{pod}"):
        policy.parse(f'{pods.POLICY}common_name = "{name}"\n')


def test_a_name_that_is_too_long_is_given_to_no_pod() -> None:
    """Pods' and accounts' names have up to 253 characters, a label of DNS 63 and a CN 64: no CA is asked for a longer one."""
    longest = {"{pod}.web.{namespace}.svc": 63, "{pod}." + "x." * 100 + "svc": 49}
    templates = [(f'dns = ["{one}"]', most) for one, most in longest.items()]
    for line, most in [*templates, ('dns = ["web.svc"]\ncommon_name = "{pod}"', 64)]:
        text = pods.POLICY.replace('dns = ["web.{namespace}.svc", "{pod}.web.{namespace}.svc"]', line)
        for length, wanted in ((most, Allowed), (most + 1, Later)):
            found = judge(replace(REQUEST, pod="p" * length), world(text))
            assert isinstance(found, wanted), (line, length)


def test_the_example_of_a_table_is_read() -> None:
    """Each key of the file, with its line for a CN turned on, and without."""
    text = (Path(__file__).parents[2] / "config/gateway/pods.toml").read_text(encoding="utf-8")
    for shown in (text, text.replace("# common_name", "common_name")):
        [rules] = policy.parse(pods.POLICY.partition("[pod_signer")[0] + shown).pod_signers.values()
        [(_, identity)] = rules.identities
        assert identity.common_name == ("" if shown is text else "web.{namespace}")


@pytest.mark.parametrize(
    "name", ["kubernetes.io/x", "x.kubernetes.io/x", "spiffe", "corp.example/", "Corp.example/x", "a/b/c"]
)
def test_signers_that_are_refused(name: str) -> None:
    """Kubernetes' own domain, and names that the API server does not take, are refused."""
    with pytest.raises(SettingsError, match="pod_signer"):
        policy.parse(pods.POLICY.replace(SIGNER, name))


def test_a_trust_domain_that_is_none() -> None:
    """Capitals, a port, and an empty one without an identity are refused."""
    for text in ("Prod.example", "prod:8443", "a/b"):
        with pytest.raises(SettingsError, match="trust_domain"):
            policy.parse(pods.POLICY.replace(TRUST_DOMAIN, text))
    with pytest.raises(SettingsError, match="trust_domain"):
        policy.parse(pods.POLICY.replace(TRUST_DOMAIN, "").partition('[pod_signer."corp.example/spiffe".identity')[0])


_LABEL = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)


@given(a=st.tuples(_LABEL, _LABEL, _LABEL), b=st.tuples(_LABEL, _LABEL, _LABEL))
def test_two_accounts_never_have_one_id(a: tuple[str, str, str], b: tuple[str, str, str]) -> None:
    """Two service accounts never share an ID, whatever their names; the same one has the same ID in each pod."""
    rules = policy.parse(pods.POLICY).pod_signers[SIGNER]
    ids = [rules.names({"namespace": n, "service_account": s, "pod": p, "pod_uid": p}, None) for n, s, p in (a, b)]
    assert (ids[0] == ids[1]) is (a[:2] == b[:2])


@given(
    begin=st.integers(-400, 400), life=st.integers(3000, 100_000), longest=st.integers(3600, 100_000),
    percent=st.integers(20, 80),
)  # fmt: skip
def test_dates_that_the_api_server_takes(begin: int, life: int, longest: int, percent: int) -> None:
    """The API server takes all dates and refresh times that we let pass, by its own rules as measured."""
    first, last = NOW + timedelta(seconds=begin), NOW + timedelta(seconds=begin + life)
    if dates_problem(first, last, timedelta(seconds=longest), NOW):
        return
    assert abs(begin) < 300
    assert 3600 <= life <= longest
    refresh = refresh_at(first, last, percent)
    assert first + timedelta(minutes=10) <= refresh <= last - timedelta(minutes=18)


def test_what_the_ca_has_to_allow() -> None:
    """The patterns of all tables, by usage, with `*` for whatever a pod's name is."""
    more = (
        '\n[pod_signer."corp.example/client"]\ntrust_domain = "x"\nnamespace_labels = { a = "b" }\nusages = "client"\n'
    )
    found = {one.spec.name: one for one in patterns(policy.parse(pods.POLICY + more).pod_signers.values())}
    assert found["pod"].uris == (f"spiffe://{TRUST_DOMAIN}/ns/shop/sa/*", f"spiffe://{TRUST_DOMAIN}/ns/bank/sa/*")
    assert found["pod"].dns == ("web.*.svc", "*.web.*.svc")
    assert found["pod-client"].uris == ("spiffe://x/ns/*/sa/*",)
