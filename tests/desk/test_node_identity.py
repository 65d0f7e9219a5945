"""Which node a bundle is from: by what proves it, by what was signed before; a name alone is a claim."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509

from bridge.contract import Issued
from bridge.desk import node_inventory
from bridge.desk.node_identity import Identity, Owner, identify, key_digest, keys_in
from bridge.desk.policy import Policy, PolicyVerdict, judge, parse
from bridge.pki import csr
from bridge.pki.bundle import RequestBundle
from bridge.pki.bundle_format import digest, dumps, loads_answer
from bridge.pki.csr import PrivateKey, signature_hash
from bridge.specs import AUTHORITIES
from tests.kit.bundles import make_bundle, old_pairs
from tests.kit.desks import POLICY, Desk, make_desk
from tests.kit.pki import ADDRESS, NODE, Pki, handmade_pki

NOW = datetime.now(UTC)
OTHER = "cp-2"
#: Certificates whose subject names no node.
NAMELESS = ("admin.conf", "apiserver-kubelet-client", "front-proxy-client", "scheduler.conf")

Pairs = dict[str, tuple[x509.Certificate, PrivateKey]]


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return handmade_pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def pairs(pki: Pki) -> Pairs:
    return old_pairs(pki)


def some(pairs: Pairs, *names: str) -> Pairs:
    return {name: pairs[name] for name in names}


def policy_of(inventory: str = "", more: str = "") -> Policy:
    policy = parse(POLICY + more)
    return replace(policy, nodes=node_inventory.parse(inventory)) if inventory else policy


def judged(pki: Pki, bundle: RequestBundle, policy: Policy) -> dict[str, PolicyVerdict]:
    cas = {name: x509.load_pem_x509_certificate(pki.ca_pem(name)[0]) for name in AUTHORITIES}
    return {one.name: judge(one, bundle, policy, [cas[one.authority]], NOW) for one in bundle.requests}


def identity_of(
    pki: Pki, bundle: RequestBundle, policy: Policy, *recorded: Owner, is_named: bool = False
) -> tuple[Identity, dict[str, list[str]]]:
    """The identity, with all keys recorded for these owners; and each request's problems by it."""
    verdicts = judged(pki, bundle, policy)
    identity = identify(bundle, verdicts, dict.fromkeys(keys_in(bundle), recorded), policy, is_named=is_named)
    return identity, {name: [*identity.problems(one, is_vouched=False)] for name, one in verdicts.items()}


def owner(node: str, cluster: str = "kubernetes", *, is_proven: bool = True) -> Owner:
    return Owner(node=node, cluster=cluster, is_proven=is_proven)


# --- the name that a bundle gives itself ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kubelet.conf", "etcd-server", "etcd-peer"])
def test_a_certificate_with_the_nodes_name_proves_it(pki: Pki, pairs: Pairs, name: str) -> None:
    """A fleet whose certificates were signed elsewhere comes in by these; without them a name is a claim."""
    blocked = '[node."cp-9"]\nblocked = true\n'
    proof, problems = identity_of(pki, make_bundle(some(pairs, name, *NAMELESS)), policy_of(blocked))
    claim, without = identity_of(pki, make_bundle(some(pairs, *NAMELESS)), policy_of(blocked))
    none_blocked, fine = identity_of(pki, make_bundle(some(pairs, *NAMELESS)), policy_of())

    assert (proof.is_proven, claim.is_proven, none_blocked.is_proven) == (True, False, False)
    assert not any(problems.values())
    assert all("wanted a proof that this is cp-1" in one for [one] in without.values())
    assert not any(fine.values())


@pytest.mark.attack("D1")
@pytest.mark.parametrize("is_proven", [True, False])
def test_a_key_that_was_signed_for_another_node_is_not_this_ones(pki: Pki, pairs: Pairs, is_proven: bool) -> None:
    """Whether that name was proven or not; another cluster's node of the same name is another node, too."""
    bundle = make_bundle(some(pairs, *NAMELESS), node=OTHER)
    _, problems = identity_of(pki, bundle, policy_of(), owner(NODE, is_proven=is_proven))
    _, of_cluster = identity_of(pki, bundle, policy_of(), owner(OTHER, "staging", is_proven=is_proven))
    own, none = identity_of(pki, bundle, policy_of(), owner(OTHER, is_proven=is_proven))

    wanted = "node: wanted certificates of cp-2 (cluster kubernetes) alone, found some of"
    assert {one for [one] in problems.values()} == {f"{wanted} cp-1 (cluster kubernetes)"}
    assert {one for [one] in of_cluster.values()} == {f"{wanted} cp-2 (cluster staging)"}
    assert not any(none.values())
    assert own.is_proven is is_proven


@pytest.mark.attack("D1")
def test_a_bundle_of_two_nodes_is_refused(pki: Pki, pairs: Pairs) -> None:
    """etcd's certificate names cp-1, and so nothing beside it is cp-2's, also where an enrolment names cp-2."""
    policy = policy_of(more='[certificate.etcd-server]\nsubjects = ["CN=cp-1", "CN={node}"]\n')
    bundle = make_bundle(some(pairs, "etcd-server", *NAMELESS), node=OTHER)
    for is_named in (False, True):
        identity, problems = identity_of(pki, bundle, policy, is_named=is_named)
        assert not identity.is_proven
        assert all("found some of cp-1" in one for [one] in problems.values())


@pytest.mark.attack("D1")
def test_a_blocked_nodes_keys_get_nothing_under_any_name(pki: Pki, pairs: Pairs) -> None:
    """By the certificate's own name and by the record of its key, also for requests that a person vouches for."""
    policy = policy_of(f'[node."{NODE}"]\nblocked = true\n[node."{OTHER}"]\n')
    bundle = make_bundle(some(pairs, *NAMELESS), node=OTHER)
    for recorded in (owner(NODE), owner(NODE, is_proven=False)):
        identity, _ = identity_of(pki, bundle, policy, recorded, is_named=True)
        verdict = PolicyVerdict(problems=(), proven=True)
        [text] = identity.problems(verdict, is_vouched=True)
        assert (
            text
            == "node: wanted no key of a node that the inventory (None) blocks, found one of cp-1 (cluster kubernetes)"
        )
    free, _ = identity_of(pki, bundle, policy, owner(OTHER))
    assert not [*free.problems(verdict, is_vouched=True)]


def test_a_claim_does_not_lock_the_owner_out(pki: Pki, pairs: Pairs) -> None:
    """A request without a proof said that these keys were cp-2's: cp-1 still proves by its etcd that they are its own."""
    bundle = make_bundle(some(pairs, "etcd-server", *NAMELESS))
    own, problems = identity_of(
        pki, bundle, policy_of(f'[node."{OTHER}"]\nblocked = true\n'), owner(OTHER, is_proven=False)
    )

    assert own.is_proven
    assert not any(problems.values())


@pytest.mark.attack("D12")
def test_the_nodes_name_is_no_right_to_a_san_before_it_is_proven(pki: Pki, pairs: Pairs) -> None:
    """`{node}` in the policy's SANs counts for a proven name; the replaced certificate's names count always."""
    more = f'[certificate.apiserver]\nsans = ["{{node}}", "kubernetes", ".svc", ".local", "{ADDRESS}", "10.96.0.1"]\n'
    old, _ = pairs["apiserver"]
    key = csr.generate_key("ecdsa-p256")

    def with_name(name: str) -> x509.CertificateSigningRequest:
        sans = x509.SubjectAlternativeName([x509.DNSName("kubernetes"), x509.DNSName(name)])
        builder = x509.CertificateSigningRequestBuilder(old.subject).add_extension(sans, critical=False)
        return builder.sign(key, signature_hash(key))

    lie = make_bundle(some(pairs, "apiserver"), node=OTHER, build=lambda _: with_name(OTHER))
    same = make_bundle(some(pairs, "apiserver"), build=lambda _: with_name(NODE))
    claim, problems = identity_of(pki, lie, policy_of(more=more))
    _, by_person = identity_of(pki, lie, policy_of(more=more), is_named=True)
    _, none = identity_of(pki, same, policy_of(more=more))

    assert not claim.is_proven
    assert (
        "SAN: wanted those of the replaced certificate, since nothing proves the node, found DNS:cp-2"
        in problems["apiserver"][0]
    )
    assert by_person == none == {"apiserver": []}


# --- at the desk ------------------------------------------------------------------------------------------------------


@pytest.mark.attack("D1")
def test_a_stolen_node_takes_no_other_name_at_the_desk(tmp_path: Path, pki: Pki, pairs: Pairs) -> None:
    """The desk renewed cp-1, which then asks as cp-2 by the same good proofs; under its own name it is renewed again."""
    desk = make_desk(tmp_path / "desk", pki)
    keys = {name: csr.generate_key("ecdsa-p256") for name in ("etcd-server", *NAMELESS)}
    by_serial = {pairs[name][0].serial_number: key for name, key in keys.items()}

    def build(old: x509.Certificate) -> x509.CertificateSigningRequest:
        return x509.load_pem_x509_csr(csr.build(old, by_serial[old.serial_number]))

    first = sign(desk, make_bundle(some(pairs, *keys), build=build))
    renewed = {name: (issued.leaf, keys[name]) for name, issued in first.items() if isinstance(issued, Issued)}
    stolen = {name: renewed[name] for name in NAMELESS}
    lie = sign(desk, make_bundle(stolen, node=OTHER))
    again = sign(desk, make_bundle(stolen))

    assert [*renewed] == [*keys]
    assert {str(getattr(one, "reason", "signed")) for one in lie.values()} == {
        "node: wanted certificates of cp-2 (cluster kubernetes) alone, found some of cp-1 (cluster kubernetes)"
    }
    assert all(isinstance(one, Issued) for one in again.values())
    lines = (desk.state / "audit.jsonl").read_text().splitlines()
    assert sum("node cp-1, cluster" in line for line in lines) == len(keys) + len(NAMELESS)
    assert sum("node cp-2 (not proven), cluster" in line for line in lines) == len(NAMELESS)


def sign(desk: Desk, bundle: RequestBundle) -> dict[str, object]:
    path, out = desk.directory / "b.json", desk.directory / f"{digest(bundle)[:16]}.json"
    path.write_bytes(dumps(bundle))
    desk.run("sign", path, "-o", out)
    return dict(loads_answer(out.read_bytes()).answers)


def test_a_users_key_is_no_nodes(pairs: Pairs) -> None:
    """The records are of nodes' keys: a person may ask from any node."""
    bundle = make_bundle(some(pairs, "admin.conf"))
    users = replace(bundle, requests=tuple(replace(one, name="user") for one in bundle.requests))

    assert keys_in(users) == set()
    assert keys_in(bundle) == {key_digest(one.public_key()) for one in (bundle.requests[0].csr, pairs["admin.conf"][0])}
