"""The desk's policy: strict to read, and each thing that it forbids is named."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from bridge.desk import node_inventory
from bridge.desk import policy as desk_policy
from bridge.desk.est_rules import node_of
from bridge.desk.policy import Policy, PolicyVerdict, judge, parse
from bridge.errors import SettingsError
from bridge.node import sample_pki
from bridge.pki import kubeadm_names
from bridge.pki.bundle import RequestBundle
from bridge.pki.csr import PrivateKey, generate_key, signature_hash
from bridge.pki.kubeadm_names import Release, builder_of
from bridge.specs import AUTHORITIES, EKU, SPECS
from bridge.specs import MASTERS as MASTERS_GROUP
from tests.kit import odd_csrs
from tests.kit.bundles import changed, make_bundle, new_csr, old_pairs, proven
from tests.kit.issuing import Signer
from tests.kit.pki import ADDRESS, PKI_SPECS, Pki, handmade_pki

NOW = datetime.now(UTC)
ALLOW = '[allow]\nclusters = ["kubernetes"]\nnodes = ["cp-*"]\n'
MASTERS = ALLOW + 'masters = ["super-admin.conf"]\n'

Pairs = dict[str, tuple[x509.Certificate, PrivateKey]]


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return handmade_pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def cas(pki: Pki) -> dict[str, x509.Certificate]:
    return {name: x509.load_pem_x509_certificate(pki.ca_pem(name)[0]) for name in AUTHORITIES}


@pytest.fixture(scope="module")
def pairs(pki: Pki) -> Pairs:
    return old_pairs(pki)


@pytest.fixture(scope="module")
def bundle(pairs: Pairs) -> RequestBundle:
    return make_bundle(pairs)


Judge = Callable[..., str]


@pytest.fixture
def judged(cas: dict[str, x509.Certificate]) -> Judge:
    """What speaks against one request of a bundle; empty if nothing does."""

    def problems(
        bundle: RequestBundle,
        name: str,
        policy: str = MASTERS,
        *,
        now: datetime = NOW,
        without_proof: frozenset[str] = frozenset(),
    ) -> str:
        request = next(one for one in bundle.requests if one.name == name)
        # a changed authority is judged with the right CA's certificates
        ca = cas[SPECS[name].authority.name]
        return "; ".join(judge(request, bundle, parse(policy), [ca], now, without_proof).problems)

    return problems


def with_csr(bundle: RequestBundle, pairs: Pairs, name: str, csr: x509.CertificateSigningRequest) -> RequestBundle:
    """Another CSR, with a proof that holds."""
    return proven(bundle, name, pairs[name][1], csr)


def csr_for(
    subject: str,
    sans: Sequence[x509.GeneralName] = (),
    *,
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | None = None,
    extra: x509.ExtensionType | None = None,
) -> x509.CertificateSigningRequest:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name.from_rfc4514_string(subject))
    if sans:
        builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=False)
    if extra is not None:
        builder = builder.add_extension(extra, critical=True)
    key = key or generate_key("ecdsa-p256")
    return builder.sign(key, signature_hash(key))


# --- what is allowed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PKI_SPECS)
def test_a_plain_renewal_is_allowed(bundle: RequestBundle, judged: Judge, name: str) -> None:
    """Every certificate of a kubeadm node, with the shortest policy that there is."""
    assert judged(bundle, name) == ""


def test_an_expired_certificate_can_be_renewed_for_some_time(judged: Judge, pairs: Pairs) -> None:
    """Its proof counts for as long as the policy says."""
    end = pairs["apiserver"][0].not_valid_after_utc
    bundle = make_bundle(pairs, created=end + timedelta(days=89))

    assert judged(bundle, "apiserver", now=end + timedelta(days=89)) == ""
    assert "at most 90d ago" in judged(bundle, "apiserver", now=end + timedelta(days=91))
    longer = MASTERS + 'proof_after_expiry = "400d"\n'
    assert judged(bundle, "apiserver", longer, now=end + timedelta(days=91)) == ""


def test_a_request_becomes_too_old(bundle: RequestBundle, judged: Judge, pairs: Pairs) -> None:
    """A request that is too old by the policy, or comes from the future, is refused."""
    begin, day = bundle.created, timedelta(days=1)

    assert judged(bundle, "apiserver", now=begin + 30 * day) == ""
    assert "age: wanted a request made at most 30d ago (allow.max_age)" in judged(
        bundle, "apiserver", now=begin + 30.01 * day
    )
    assert judged(bundle, "apiserver", MASTERS + 'max_age = "60d"\n', now=begin + 31 * day) == ""
    assert judged(bundle, "apiserver", now=begin - 0.9 * day) == ""
    assert "age: wanted a request that is not from the future" in judged(bundle, "apiserver", now=begin - 1.1 * day)
    younger = replace(make_bundle(pairs, created=begin - 40 * day), created=begin)
    assert "another signature" in judged(younger, "apiserver")


@pytest.mark.attack("N6")
def test_a_blocked_node_gets_nothing(pairs: Pairs, cas: dict[str, x509.Certificate]) -> None:
    """A blocked node gets nothing, whatever it proves and a person waives; another node of the inventory gets all of it."""
    bundle = make_bundle(pairs)
    for blocked in (True, False):
        text = f'[node."{bundle.node}"]\naddresses = ["{ADDRESS}"]\nblocked = {str(blocked).lower()}\n'
        policy = replace(parse(MASTERS), nodes=node_inventory.parse(text))
        for request in bundle.requests:
            waived = frozenset({request.name})
            found = judge(request, bundle, policy, [cas[request.authority]], NOW, waived).problems
            assert [one.startswith("node: wanted one that the inventory") for one in found] == [True] * blocked


def test_the_first_serving_certificate_of_a_component_has_the_nodes_own_names(
    bundle: RequestBundle, cas: dict[str, x509.Certificate]
) -> None:
    """Loopback and the name without more; its address by the inventory; another node's address never."""
    nodes = node_inventory.parse(f'[node."{bundle.node}"]\naddresses = ["{ADDRESS}"]\n')
    name, local = "scheduler-server", [x509.DNSName("localhost"), x509.DNSName(bundle.node)]

    def found(policy: Policy, *addresses: str) -> str:
        sans = [*local, *(x509.IPAddress(ipaddress.ip_address(one)) for one in addresses)]
        request = replace(
            next(one for one in bundle.requests if one.name == "apiserver"),
            name=name,
            csr=csr_for("CN=kube-scheduler", sans),
            replaces=None,
            proof=None,
        )
        return "; ".join(judge(request, bundle, policy, [cas["ca"]], NOW, frozenset({name})).problems)

    plain, listed = parse(MASTERS), replace(parse(MASTERS), nodes=nodes)
    assert found(plain, "127.0.0.1", "::1") == found(listed, "127.0.0.1", ADDRESS) == ""
    assert "SAN: wanted" in found(plain, ADDRESS)
    assert "SAN: wanted" in found(listed, "192.0.2.99")


@pytest.mark.attack("G9")
def test_a_second_list_of_extensions_is_refused(judged: Judge, bundle: RequestBundle, pairs: Pairs) -> None:
    """CAs in Go read each list, the library the first alone; an honest CSR has one."""
    key, names = generate_key("ecdsa-p256"), x509.SubjectAlternativeName([x509.DNSName("cp-1")])
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    subject, ca = x509.Name.from_rfc4514_string("CN=kube-apiserver"), x509.BasicConstraints(ca=True, path_length=None)
    first, empty = (odd_csrs.asking(odd_csrs.EXTENSION_REQUEST, *some) for some in ([names], []))
    for second in (odd_csrs.EXTENSION_REQUEST, odd_csrs.MICROSOFTS):
        pem = odd_csrs.with_attributes(key, subject, empty, odd_csrs.asking(second, ca))
        twice = with_csr(bundle, pairs, "apiserver", x509.load_pem_x509_csr(pem))
        wanted = f"CSR: wanted one that asks for SANs and nothing else, found {second.dotted_string} too"
        assert wanted in judged(twice, "apiserver")
    once = x509.load_pem_x509_csr(odd_csrs.with_attributes(key, subject, first))
    assert "CSR" not in judged(with_csr(bundle, pairs, "apiserver", once), "apiserver")


def test_a_person_can_do_without_a_proof_that_is_too_old(
    judged: Judge, pairs: Pairs, cas: dict[str, x509.Certificate]
) -> None:
    """The refusal names the setting; what is done without a proof counts as that."""
    now = pairs["scheduler.conf"][0].not_valid_after_utc + timedelta(days=400)
    bundle = make_bundle(pairs, created=now)
    request = next(one for one in bundle.requests if one.name == "scheduler.conf")
    waived = frozenset({"scheduler.conf"})

    assert "allow.proof_after_expiry" in judged(bundle, "scheduler.conf", now=now)
    assert judge(request, bundle, parse(MASTERS), [cas["ca"]], now, waived) == PolicyVerdict(problems=(), proven=False)


# --- what is not ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "wanted"),
    [({"node": "worker-1"}, "node: wanted cp-*, found worker-1"), ({"cluster": "other"}, "cluster: wanted kubernetes")],
)
def test_other_clusters_and_nodes_are_refused(pairs: Pairs, judged: Judge, values: dict[str, str], wanted: str) -> None:
    """Requests for other clusters and nodes are refused, even with a valid proof."""
    assert wanted in judged(make_bundle(pairs, **values), "scheduler.conf")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        ('names = ["apiserver"]', "name: wanted apiserver, found scheduler.conf"),
        ('max_validity = "90d"', "validity: wanted at most 90d, found 365d"),
        ('keys = ["rsa-4096"]', "key: wanted rsa-4096, found ecdsa-p256"),
        ('[certificate."scheduler.conf"]\nmax_validity = "30d"', "validity: wanted at most 30d"),
        ('[certificate."scheduler.conf"]\nkeys = ["ecdsa-p384"]', "key: wanted ecdsa-p384"),
        ('[certificate."scheduler.conf"]\nsubjects = ["CN=x"]', "subject: wanted CN=x, found CN=system:kube-scheduler"),
    ],
)
def test_what_the_policy_narrows_is_refused(bundle: RequestBundle, judged: Judge, policy: str, wanted: str) -> None:
    """A policy narrows names, validity, keys and subjects, for all certificates or for one."""
    assert wanted in judged(bundle, "scheduler.conf", f"{MASTERS}{policy}\n")


def test_ekus_and_authority_are_the_table_s(bundle: RequestBundle, judged: Judge) -> None:
    """The table decides, whatever a node asks for."""
    ekus = changed(bundle, "apiserver", ekus=frozenset(EKU))
    authority = changed(bundle, "apiserver", authority="etcd-ca")

    assert "EKU: wanted serverAuth, found clientAuth, serverAuth" in judged(ekus, "apiserver")
    assert "authority: wanted ca for apiserver, found etcd-ca" in judged(authority, "apiserver")


def test_without_a_proof_nothing_is_signed_unless_a_person_says_so(bundle: RequestBundle, judged: Judge) -> None:
    """A person waives a proof by name; a policy may waive it for all."""
    without = changed(bundle, "scheduler.conf", proof=None)

    assert "there is no continuity proof" in judged(without, "scheduler.conf")
    assert "there is no continuity proof" in judged(without, "scheduler.conf", without_proof=frozenset({"apiserver"}))
    assert judged(without, "scheduler.conf", without_proof=frozenset({"scheduler.conf"})) == ""
    assert judged(without, "scheduler.conf", MASTERS + 'proof = "optional"\n') == ""


def test_a_proof_by_no_certificate_is_none(bundle: RequestBundle, judged: Judge) -> None:
    """A request that replaces no certificate has no proof: it is refused, unless a person allows it."""
    alone = changed(bundle, "scheduler.conf", replaces=None)

    assert "the certificate that is replaced is missing" in judged(alone, "scheduler.conf")
    assert judged(alone, "scheduler.conf", without_proof=frozenset({"scheduler.conf"})) == ""


def test_a_proof_that_does_not_hold_is_always_refused(bundle: RequestBundle, judged: Judge) -> None:
    """A wrong proof is worse than none, because it can be an attack: neither a policy nor a person allows it."""
    broken = changed(bundle, "scheduler.conf", proof=bundle.requests[0].proof)

    for policy in (MASTERS, MASTERS + 'proof = "optional"\n'):
        assert "another signature" in judged(broken, "scheduler.conf", policy, without_proof=frozenset(SPECS))


def test_a_certificate_of_another_ca_proves_nothing(judged: Judge, tmp_path: Path) -> None:
    """Another CA's certificate proves nothing, even if the CA has the same name."""
    other = make_bundle(old_pairs(handmade_pki(tmp_path), ["scheduler.conf"]))

    assert "not signed by it" in judged(other, "scheduler.conf")


#: All that a policy can allow, so that nothing but the proof speaks against a request.
WIDE = (
    ALLOW
    + f"masters = {list(SPECS)}\n"
    + "".join(f'[certificate."{name}"]\ngroups = ["x"]\nsans = ["{{node}}", "0.0.0.0/0", "::/0"]\n' for name in SPECS)
)


def proven_by(name: str, subject: str, old: x509.Certificate, key: PrivateKey) -> RequestBundle:
    """A request for this name and subject, with a proof by the given certificate."""
    return make_bundle({name: (old, key)}, build=lambda _: csr_for(subject))


@pytest.mark.parametrize("name", SPECS)
def test_another_certificate_of_the_same_ca_proves_nothing(
    pairs: Pairs, cas: dict[str, x509.Certificate], judged: Judge, pki: Pki, name: str
) -> None:
    """A user's, another node's or another component's certificate proves nothing, whatever the policy allows or a person waives."""
    authority, subject = SPECS[name].authority.name, desk_policy.kubeadms_subject(name)[0].replace("{node}", "cp-1")
    ca = sample_pki.ThrowawayCA(certificate=cas[authority], key=_ca_key(pki, authority))
    key = generate_key("ecdsa-p256")
    others = {cn: (_leaf(ca, f"O=x,CN={cn}", key), key) for cn in ("jane", "system:node:worker-9", "cp-2")}
    others |= {
        other: pair
        for other, pair in pairs.items()
        if SPECS[other].authority.name == authority
        and desk_policy.kubeadms_subject(other)[0] != desk_policy.kubeadms_subject(name)[0]
    }
    honest = _leaf(ca, f"O=x,CN={subject}", key)

    assert judged(proven_by(name, f"O=x,CN={subject}", honest, key), name, WIDE) == ""
    for other, pair in others.items():
        for waived in (frozenset[str](), frozenset(SPECS)):
            found = judged(proven_by(name, f"CN={subject}", *pair), name, WIDE, without_proof=waived)
            assert f"proof: wanted one by the certificate of CN={subject}, found one by that of" in found, other


def test_a_longer_name_is_another(judged: Judge, cas: dict[str, x509.Certificate], pki: Pki) -> None:
    """Two CNs that read like one, and none at all."""
    ca = sample_pki.ThrowawayCA(certificate=cas["ca"], key=_ca_key(pki))
    key = generate_key("ecdsa-p256")
    rule = '[certificate."scheduler.conf"]\nsubjects = ["O=ops"]\n'

    two = proven_by("scheduler.conf", "CN=a\\,CN=b", _leaf(ca, "CN=a,CN=b", key), key)
    assert "proof: wanted one by" in judged(two, "scheduler.conf", WIDE)
    none = proven_by("scheduler.conf", "O=ops", _leaf(ca, "O=jane", key), key)
    assert "proof: wanted one by" in judged(none, "scheduler.conf", MASTERS + rule)
    same = proven_by("scheduler.conf", "O=ops", _leaf(ca, "O=ops", key), key)
    assert judged(same, "scheduler.conf", MASTERS + rule) == ""


def test_a_servers_certificate_does_not_prove_a_client(
    judged: Judge, cas: dict[str, x509.Certificate], pki: Pki
) -> None:
    """As the kubelet's own, of the same name and by the same CA; a person may do without the proof."""
    ca = sample_pki.ThrowawayCA(certificate=cas["ca"], key=_ca_key(pki))
    key, subject = generate_key("ecdsa-p256"), "O=system:nodes,CN=system:node:cp-1"
    server = proven_by("kubelet.conf", subject, _leaf(ca, subject, key, EKU.SERVER_AUTH), key)
    both = proven_by("kubelet.conf", subject, _leaf(ca, subject, key, *EKU), key)
    waived = frozenset({"kubelet.conf"})

    assert judged(both, "kubelet.conf") == ""
    assert judged(server, "kubelet.conf") == (
        "proof: wanted one by a certificate with the same usages, found one without clientAuth"
    )
    assert judged(server, "kubelet.conf", without_proof=waived) == ""
    assert not judge(server.requests[0], server, parse(MASTERS), [cas["ca"]], NOW, waived).proven


def test_masters_only_where_they_were(judged: Judge, cas: dict[str, x509.Certificate], pki: Pki) -> None:
    """The policy's list of masters puts no certificate into the group that was not in it before; a request may leave the group out."""
    ca = sample_pki.ThrowawayCA(certificate=cas["ca"], key=_ca_key(pki))
    key, cn = generate_key("ecdsa-p256"), "CN=kubernetes-super-admin"
    more = proven_by("super-admin.conf", f"O=system:masters,{cn}", _leaf(ca, cn, key), key)
    less = proven_by("super-admin.conf", cn, _leaf(ca, f"O=system:masters,{cn}", key), key)

    assert judged(more, "super-admin.conf") == (
        "group: wanted no system:masters, as in the replaced certificate, found it"
    )
    assert judged(less, "super-admin.conf") == ""


def test_one_ca_for_all_proves_no_more(pairs: Pairs) -> None:
    """Where the authorities have one CA, its certificate for one of them is still none for another name."""
    key = generate_key("ecdsa-p256")
    one = sample_pki.ca_certificate("one", key, NOW - timedelta(days=1), NOW + timedelta(days=1000))
    ca = sample_pki.ThrowawayCA(certificate=one, key=key)
    for name, other in (("apiserver-etcd-client", "apiserver-kubelet-client"), ("front-proxy-client", "admin.conf")):
        old = _leaf(ca, pairs[other][0].subject.rfc4514_string(), key)
        bundle = proven_by(name, f"CN={desk_policy.kubeadms_subject(name)[0]}", old, key)
        assert "proof: wanted one by" in judge(bundle.requests[0], bundle, parse(WIDE), [one], NOW).problems[0]


def test_masters_only_by_name(pairs: Pairs, cas: dict[str, x509.Certificate], judged: Judge, pki: Pki) -> None:
    """A certificate that is in system:masters today is refused, too, unless the policy names it."""
    ca = sample_pki.ThrowawayCA(certificate=cas["ca"], key=_ca_key(pki))
    key = generate_key("ecdsa-p256")
    old = _leaf(ca, "O=system:masters,CN=kubernetes-admin", key)
    bundle = make_bundle({"admin.conf": (old, key)})

    assert "system:masters" in judged(bundle, "admin.conf", ALLOW)
    assert judged(bundle, "admin.conf", ALLOW + 'masters = ["admin.conf"]\n') == ""
    assert "system:masters" in judged(make_bundle(pairs), "super-admin.conf", ALLOW)


def _ca_key(pki: Pki, authority: str = "ca") -> PrivateKey:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = load_pem_private_key(pki.ca_pem(authority)[1], None)
    assert isinstance(key, PrivateKey)
    return key


def _leaf(ca: sample_pki.ThrowawayCA, subject: str, key: PrivateKey, *ekus: EKU) -> x509.Certificate:
    name = x509.Name.from_rfc4514_string(subject)
    builder = builder_of(name, ca.certificate.subject, key.public_key(), NOW, NOW + timedelta(days=10))
    if ekus:
        usages = x509.ExtendedKeyUsage([x509.ObjectIdentifier(eku.value) for eku in ekus])
        builder = builder.add_extension(usages, critical=False)
    return builder.sign(ca.key, signature_hash(ca.key))


@pytest.mark.parametrize(
    ("name", "subject", "wanted"),
    [
        ("scheduler.conf", "CN=kubernetes-admin", "CN: wanted system:kube-scheduler, found kubernetes-admin"),
        ("scheduler.conf", "O=system:masters,CN=system:kube-scheduler", "system:masters"),
        ("scheduler.conf", "O=kubeadm:cluster-admins,CN=system:kube-scheduler", "group: wanted none, found kubeadm:"),
        ("scheduler.conf", "OU=x,CN=system:kube-scheduler", "what the replaced certificate has, found 2.5.4.11=x"),
        ("scheduler.conf", "CN=system:kube-scheduler+CN=kubernetes-admin", "CN: wanted system:kube-scheduler"),
        ("scheduler.conf", "O=x", "CN: wanted system:kube-scheduler, found none"),
        ("kubelet.conf", "O=system:nodes,CN=system:node:cp-2", "CN: wanted system:node:cp-1, found system:node:cp-2"),
        ("etcd-server", "CN=cp-2", "CN: wanted cp-1, found cp-2"),
    ],
)
def test_another_identity_is_refused(
    bundle: RequestBundle, pairs: Pairs, judged: Judge, name: str, subject: str, wanted: str
) -> None:
    """The holder of one key can't get another identity with it, nor another node's."""
    assert wanted in judged(with_csr(bundle, pairs, name, csr_for(subject)), name)


def test_fewer_groups_and_sans_are_allowed(bundle: RequestBundle, pairs: Pairs, judged: Judge) -> None:
    """A request may give up rights without any permission."""
    admin = with_csr(bundle, pairs, "admin.conf", csr_for("CN=kubernetes-admin"))
    server = with_csr(bundle, pairs, "apiserver", csr_for("CN=kube-apiserver", [x509.DNSName("kubernetes")]))

    assert judged(admin, "admin.conf") == ""
    assert judged(server, "apiserver") == ""


def test_groups_of_the_policy(bundle: RequestBundle, pairs: Pairs, judged: Judge) -> None:
    """A list replaces what the old certificate has: it can allow more, and less."""
    wider = with_csr(bundle, pairs, "admin.conf", csr_for("O=ops,CN=kubernetes-admin"))
    rule = '[certificate."admin.conf"]\ngroups = ["ops"]\n'

    assert "group: wanted kubeadm:cluster-admins, found ops" in judged(wider, "admin.conf")
    assert judged(wider, "admin.conf", MASTERS + rule) == ""
    assert "group: wanted ops" in judged(bundle, "admin.conf", MASTERS + rule)


def test_whole_subjects_of_the_policy(bundle: RequestBundle, pairs: Pairs, judged: Judge) -> None:
    """A subject fits in any order, with the node's name in it."""
    rule = '[certificate."kubelet.conf"]\nsubjects = ["CN=system:node:{node},O=system:nodes"]\n'
    other = with_csr(bundle, pairs, "kubelet.conf", csr_for("O=system:nodes,CN=system:node:cp-9"))

    assert judged(bundle, "kubelet.conf", MASTERS + rule) == ""
    assert "subject: wanted CN=system:node:cp-1,O=system:nodes" in judged(other, "kubelet.conf", MASTERS + rule)


def _ip(text: str) -> x509.GeneralName:
    import ipaddress

    return x509.IPAddress(ipaddress.ip_address(text))


@pytest.mark.parametrize(
    ("san", "rules", "is_allowed"),
    [
        (x509.DNSName("api.example.com"), ["api.example.com"], True),
        (x509.DNSName("API.Example.com"), ["api.example.com"], True),
        (x509.DNSName("api.example.com"), [".example.com"], True),
        (x509.DNSName("a.b.example.com"), [".example.com"], True),
        (x509.DNSName("example.com"), [".example.com"], False),
        (x509.DNSName("evilexample.com"), [".example.com"], False),
        (x509.DNSName("api.example.com.evil.org"), [".example.com"], False),
        (x509.DNSName("*.example.com"), ["*.example.com"], True),
        (x509.DNSName("a.example.com"), ["*.example.com"], False),
        (x509.DNSName("*.example.com"), [".example.com"], False),
        (x509.DNSName("a.*.example.com"), [".example.com"], False),
        (x509.DNSName("a\0.example.com"), [".example.com"], False),
        (x509.DNSName("a\n.example.com"), [".example.com"], False),
        (x509.DNSName("a b.example.com"), [".example.com"], False),
        (x509.DNSName("a,b.example.com"), [".example.com"], False),
        (x509.DNSName("evil.org/.example.com"), [".example.com"], False),
        (x509.DNSName("https://a.example.com"), [".example.com"], False),
        (x509.DNSName("a..example.com"), [".example.com"], False),
        (x509.DNSName("..example.com"), [".example.com"], False),
        (x509.DNSName("-a.example.com"), [".example.com"], False),
        (x509.DNSName("a-.example.com"), [".example.com"], False),
        (x509.DNSName("a_b.example.com"), [".example.com"], False),
        (x509.DNSName(f"{'a' * 63}.example.com"), [".example.com"], True),
        (x509.DNSName(f"{'a' * 64}.example.com"), [".example.com"], False),
        (x509.DNSName(f"{'a.' * 121}example.com"), [".example.com"], True),
        (x509.DNSName(f"{'a.' * 122}example.com"), [".example.com"], False),
        (x509.DNSName("cp-1"), ["{node}"], True),
        (x509.DNSName("cp-2"), ["{node}"], False),
        (x509.DNSName("10.0.0.1"), ["10.0.0.0/8"], False),
        (_ip("10.1.2.3"), ["10.0.0.0/8"], True),
        (_ip("11.1.2.3"), ["10.0.0.0/8"], False),
        (_ip("10.1.2.3"), ["10.1.2.3"], True),
        (_ip("2001:db8::7"), ["2001:db8::/32"], True),
        (_ip("2001:db8::7"), ["10.0.0.0/8"], False),
        (x509.RFC822Name("a@example.com"), [".example.com"], False),
        (x509.UniformResourceIdentifier("spiffe://example.com/x"), [".example.com"], False),
    ],
)
def test_sans_of_the_policy(
    bundle: RequestBundle, pairs: Pairs, judged: Judge, san: x509.GeneralName, rules: list[str], is_allowed: bool
) -> None:
    """The policy allows exact names, suffixes, addresses and networks, and nothing of another type."""
    asked = with_csr(bundle, pairs, "apiserver", csr_for("CN=kube-apiserver", [san]))
    problems = judged(asked, "apiserver", f"{MASTERS}[certificate.apiserver]\nsans = {rules}\n")

    assert (problems == "") is is_allowed
    assert is_allowed or "SAN: wanted" in problems


def test_each_san_once(bundle: RequestBundle, pairs: Pairs, judged: Judge) -> None:
    """A SAN twice is refused, even if it is allowed, and so are too many."""
    rules = MASTERS + '[certificate.apiserver]\nsans = ["kubernetes", ".example.com"]\n'
    twice = with_csr(bundle, pairs, "apiserver", csr_for("CN=kube-apiserver", [x509.DNSName("kubernetes")] * 4000))
    many = [x509.DNSName(f"a{number}.example.com") for number in range(101)]
    more, enough = (
        with_csr(bundle, pairs, "apiserver", csr_for("CN=kube-apiserver", sans)) for sans in (many, many[:100])
    )

    assert "SAN: wanted each once, found DNS:kubernetes 4000 times" in judged(twice, "apiserver", rules)
    assert "SAN: wanted each once, found DNS:kubernetes 4000 times" in judged(twice, "apiserver")
    assert judged(more, "apiserver", rules) == "SAN: wanted at most 100, found 101"
    others = MASTERS + '[certificate.apiserver]\nsans = ["kubernetes"]\n'
    # no rule is asked about any of them: a stranger's may be a hundred thousand
    assert judged(more, "apiserver", others) == "SAN: wanted at most 100, found 101"
    assert judged(enough, "apiserver", rules) == ""


def test_a_refusal_has_no_thousands_of_reasons(bundle: RequestBundle, pairs: Pairs, judged: Judge) -> None:
    """A stranger asks for as many groups as a bundle has room for, and each reason says what the policy allows."""
    groups = ",".join(f"O=group-{number}" for number in range(1000))
    asked = with_csr(bundle, pairs, "scheduler.conf", csr_for(f"{groups},CN=system:kube-scheduler"))

    assert judged(asked, "scheduler.conf").count("group: wanted none, found group-") == 100


def test_a_refusal_is_for_people(bundle: RequestBundle, pairs: Pairs, judged: Judge) -> None:
    """A refusal is one line, cut, with the first few of many findings."""
    sans = [x509.DNSName(f"a{number}\n.evil.org") for number in range(1000, 1020)]
    asked = with_csr(bundle, pairs, "apiserver", csr_for("CN=kube-apiserver", sans))

    problem = judged(asked, "apiserver", MASTERS + '[certificate.apiserver]\nsans = [".example.com"]\n')

    assert problem.startswith("SAN: wanted .example.com, found DNS:a1000 .evil.org, DNS:a1001 .evil.org, ")
    assert problem.endswith("DNS:a1004 .evil.org and 15 more")


def test_the_node_s_name_is_reported_with_its_setting(bundle: RequestBundle, pairs: Pairs, judged: Judge) -> None:
    """Where the CN has the node's name in it."""
    asked = with_csr(bundle, pairs, "etcd-server", csr_for("CN=cp-7.prod", [x509.DNSName("localhost")]))

    assert "CN: wanted cp-1, found cp-7.prod (cp-1 is node.name in the node's settings)" in judged(asked, "etcd-server")


def test_a_san_that_the_old_certificate_lacks_is_refused(bundle: RequestBundle, pairs: Pairs, judged: Judge) -> None:
    """Without a list the SANs of the old certificate are the limit."""
    more = with_csr(
        bundle, pairs, "apiserver", csr_for("CN=kube-apiserver", [x509.DNSName("kubernetes"), _ip("10.9.9.9")])
    )

    assert judged(more, "apiserver") == "SAN: wanted those of the replaced certificate, found IP:10.9.9.9"


def test_without_a_proof_only_kubeadms_own_names(bundle: RequestBundle, judged: Judge) -> None:
    """Without a proof the old certificate says nothing, since an attacker can send it along."""
    without = frozenset(SPECS)
    server = changed(bundle, "apiserver", proof=None)

    assert "DNS:api.example.com, " in judged(server, "apiserver", without_proof=without)
    sans = 'sans = ["{node}", "kubernetes", ".svc", ".local", ".default", ".example.com", "*.wild.example.com", "0.0.0.0/0", "::/0"]'
    rule = f"{MASTERS}[certificate.apiserver]\n{sans}\n"
    assert judged(server, "apiserver", rule, without_proof=without) == ""
    assert f"IP:{ADDRESS}" in judged(changed(bundle, "etcd-server", proof=None), "etcd-server", without_proof=without)
    admin = changed(bundle, "admin.conf", proof=None)
    assert judged(admin, "admin.conf", without_proof=without) == ""


def test_a_csr_with_more_than_sans_is_refused(bundle: RequestBundle, pairs: Pairs, judged: Judge) -> None:
    """One that wants to be a CA, most of all."""
    extra = x509.BasicConstraints(ca=True, path_length=None)
    asked = with_csr(bundle, pairs, "scheduler.conf", csr_for("CN=system:kube-scheduler", extra=extra))

    assert "found 2.5.29.19 too" in judged(asked, "scheduler.conf")


def test_a_csr_that_is_not_signed_with_its_key_is_refused(bundle: RequestBundle, pairs: Pairs, judged: Judge) -> None:
    """The requester must hold the CSR's key."""
    from cryptography.hazmat.primitives.serialization import Encoding

    good = new_csr(pairs["scheduler.conf"][0])
    der = bytearray(good.public_bytes(Encoding.DER))
    der[der.index(b"kube-scheduler")] ^= 1
    broken = with_csr(bundle, pairs, "scheduler.conf", x509.load_der_x509_csr(bytes(der)))

    assert "signed with its own key" in judged(broken, "scheduler.conf")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"batch": "0" * 32}, "another signature"),
        ({"node": "cp-2"}, "another signature"),
        ({"cluster": "kubernetes2"}, "another signature"),
    ],
)
def test_a_bundle_that_was_changed_with_its_digest_is_refused(
    bundle: RequestBundle, judged: Judge, values: dict[str, str], named: str
) -> None:
    """An attacker can make a new digest, but does not have the old keys."""
    policy = MASTERS.replace('"kubernetes"', '"kubernetes*"')
    for name in PKI_SPECS:
        assert named in judged(replace(bundle, **values), name, policy)  # type: ignore[arg-type]


def test_a_request_that_was_changed_with_its_digest_is_refused(
    bundle: RequestBundle, pairs: Pairs, judged: Judge
) -> None:
    """Each of its fields in turn."""
    name, other = "etcd-server", "etcd-peer"
    old = pairs[other][0]
    cases: dict[str, tuple[dict[str, object], str]] = {
        "authority": ({"authority": "ca"}, "authority: wanted etcd-ca"),
        "ekus": ({"ekus": frozenset({EKU.CLIENT_AUTH})}, "EKU: wanted"),
        "validity": ({"validity": timedelta(days=366)}, "validity: wanted at most"),
        "csr": ({"csr": new_csr(pairs[name][0])}, "another signature"),
        "replaces": ({"replaces": old}, "another signature"),
        "no replaces": ({"replaces": None}, "the certificate that is replaced is missing"),
        "proof": ({"proof": b"x"}, "another signature"),
        "no proof": ({"proof": None}, "there is no continuity proof"),
    }
    for what, (values, named) in cases.items():
        assert named in judged(changed(bundle, name, **values), name), what
    renamed = replace(bundle, requests=tuple(replace(r, name=other) for r in bundle.requests if r.name == name))
    assert "another signature" in judged(renamed, other)
    assert "another signature" in judged(changed(bundle, name, validity=timedelta(days=30)), name)


def test_everything_that_is_wrong_is_reported_at_once(pairs: Pairs, judged: Judge) -> None:
    """A node mends its request in one go."""
    bundle = make_bundle(pairs, node="x", cluster="y", validity=timedelta(days=9999))

    problems = judged(changed(bundle, "super-admin.conf", proof=None), "super-admin.conf", ALLOW)

    for word in ("cluster:", "node:", "proof:", "validity:", "group:"):
        assert word in problems


# --- another CA in the place of this one ------------------------------------------------------------------------------


def test_a_former_ca_proves_what_it_signed_and_nothing_else(
    bundle: RequestBundle, cas: dict[str, x509.Certificate]
) -> None:
    """The desk's CA is another one: only what the earlier CA of the same authority signed is proven."""
    new = Signer.make("kubernetes-2").certificate
    request = next(one for one in bundle.requests if one.name == "apiserver-kubelet-client")
    plain = parse(ALLOW)

    def problems(former: dict[str, list[x509.Certificate]]) -> str:
        return "; ".join(judge(request, bundle, replace(plain, former=former), [new], NOW).problems)

    assert "proof: wanted a replaced certificate that CN=kubernetes-2 signed" in problems({})
    assert problems({"ca": [cas["ca"]]}) == ""
    assert "proof:" in problems({"etcd-ca": [cas["ca"]]})
    assert "proof:" in problems({"ca": [cas["etcd-ca"]]})


# --- the file ---------------------------------------------------------------------------------------------------------


def test_all_problems_come_at_once_with_their_lines() -> None:
    """The author of a policy can mend all problems in one go."""
    text = (
        "[desk]\n"
        'ca_dir = "anchors"\n'
        "[allow]\n"
        "clusters = []\n"
        'names = ["apiserve"]\n'
        'keys = ["rsa-1024"]\n'
        "max_validity = 3\n"
        'proof = "never"\n'
        "[certificate.No]\n"
        "[certificate.apiserver]\n"
        'subjects = ["O=system:masters,CN=x"]\n'
        'sans = ["10.0.0.0/99", "a b"]\n'
        'groups = ["system:masters"]\n'
    )
    with pytest.raises(SettingsError) as e:
        parse(text, Path("/p.toml"))

    assert {(p.key, p.line) for p in e.value.problems} >= {
        ("desk.ca_dir", 2),
        ("allow.max_validity", 7),
        ("allow.proof", 8),
        ("certificate.No", 9),
        ("certificate.apiserver.subjects", 11),
        ("certificate.apiserver.sans", 12),
        ("certificate.apiserver.groups", 13),
    }


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("", "allow.clusters"),
        ('[allow]\nclusters = ["a"]\n', "allow.nodes"),
        ('[allow]\nclusters = []\nnodes = ["a"]\n', "allow.clusters"),
        (ALLOW + 'names = ["apiserve"]\n', "allow.names"),
        (ALLOW + '[desk]\nformer_cas = { "ca" = "old.crt" }\n', "desk.former_cas.ca"),
        (ALLOW + '[desk]\nformer_cas = { "kubernetes" = "/old.crt" }\n', "desk.former_cas"),
        (ALLOW + 'masters = ["x"]\n', "allow.masters"),
        (ALLOW + 'keys = ["rsa-1024"]\n', "allow.keys"),
        (ALLOW + "[unknown]\n", "unknown"),
        (ALLOW + "[certificate]\napiserver = 1\n", "certificate.apiserver"),
        (ALLOW + '[certificate.apiserver]\nsubjects = ["x"]\n', "certificate.apiserver.subjects"),
        (ALLOW + '[certificate.apiserver]\nsans = ["1.2.3"]\n', "certificate.apiserver.sans"),
        (ALLOW + '[certificate.apiserver]\nsan = ["a"]\n', "certificate.apiserver.san"),
    ],
)
def test_each_mistake_is_named(text: str, key: str) -> None:
    """A policy that is not understood is none."""
    with pytest.raises(SettingsError) as e:
        parse(text)
    assert key in {p.key for p in e.value.problems}


@given(st.text(max_size=200) | st.text(max_size=60).map(lambda text: f"{ALLOW}{text}"))
def test_whatever_the_file_holds_the_error_is_ours(text: str) -> None:
    """No traceback."""
    try:
        assert isinstance(parse(text), Policy)
    except SettingsError:
        return


def test_the_example_is_a_policy() -> None:
    """The installed example can be used, and its comments are right."""
    text = Path(__file__).parents[2].joinpath("config/desk/desk-policy.toml").read_text()
    policy = parse(text)
    commented = parse(
        "\n".join(
            line.removeprefix("# ")
            for line in text.splitlines()
            if not line.startswith('# masters = ["admin') and not _is_prose(line)
        )
    )

    assert policy.allow.masters == ("super-admin.conf",)
    assert policy.certificates == {}
    defaults = replace(policy.allow, names=commented.allow.names)
    assert replace(commented.allow) == defaults
    kubeadms = {"apiserver", "admin.conf", "super-admin.conf", "kubelet-server", "kubelet.conf"}
    assert commented.certificates.keys() == {*kubeadms, "registry"}
    assert commented.desk.inventory is not None
    assert (commented.est["registry"].clients, commented.est["registry"].validity) == (
        ("O=agents,CN={node}",),
        timedelta(days=90),
    )


_EST = 'clusters = ["kubernetes"]\nnodes = ["cp-*"]\n[est.{label}]\ncluster = "kubernetes"\n{rest}\n'


@pytest.mark.parametrize(
    ("label", "rest", "problem"),
    [
        ("etcd-peer", "", "clients: wanted subjects such as CN={node}, or secrets = true, found neither"),
        ("etcd-peer", 'clients = ["CN=agent"]', "with {node} once, found 'CN=agent'"),
        ("etcd-peer", 'clients = ["CN={node},O={node}"]', "with {node} once"),
        ("etcd-peer", 'clients = ["{node}"]', "with {node} once"),
        ("web", "secrets = true", "or one with a table [certificate.web], found 'web'"),
        ("user", "secrets = true", "or one with a table [certificate.user], found 'user'"),
        ("cacerts", 'certificate = "etcd-peer"\nsecrets = true', "no operation of EST is called like"),
        ('"a/b"', 'certificate = "etcd-peer"\nsecrets = true', "no operation of EST is called like"),
        ('".."', 'certificate = "etcd-peer"\nsecrets = true', "no operation of EST is called like"),
    ],
)
def test_a_label_of_est_says_who_may_ask(label: str, rest: str, problem: str) -> None:
    """A label that allows no peer, a subject without its node, and a certificate that nothing describes are refused; the twin is read."""
    text = f"[allow]\n{_EST}"
    with pytest.raises(SettingsError) as e:
        parse(text.replace("{label}", label).replace("{rest}", rest))
    good = parse(text.replace("{label}", "etcd-peer").replace("{rest}", 'clients = ["CN={node}"]'))

    assert problem in str(e.value)
    assert good.est["etcd-peer"].clients == ("CN={node}",)


@pytest.mark.parametrize(
    ("subject", "node"),
    [
        ("CN=web.cp-1", "cp-1"),
        ("O=agents,CN=cp-1", "cp-1"),
        ("CN=cp-1,O=agents", "cp-1"),
        ("CN=cp-1", ""),
        ("CN=web.", ""),
        ("CN=web.cp-1,CN=web.cp-2", ""),
        ("O=agents,O=more,CN=cp-1", ""),
        ("O=agents,OU=cp-1", ""),
        ("O=agents,CN=CP 1", ""),
        ("O=agents,CN={node}", ""),
    ],
)
def test_a_clients_subject_tells_its_node(subject: str, node: str) -> None:
    """A pattern has to fit the whole subject, in any order; nothing else names the node."""
    patterns = ["CN=web.{node}", "O=agents,CN={node}"]

    assert node_of(x509.Name.from_rfc4514_string(subject), patterns) == node


def _is_prose(line: str) -> bool:
    body = line.removeprefix("# ").removeprefix("#").strip()
    return line.startswith("#") and not (body.startswith(("[", "]", '"')) or " = " in body)


def test_the_subjects_are_kubeadms() -> None:
    """The policy's table and the specs say the same."""
    for name, spec in SPECS.items():
        wanted_cn, groups = desk_policy.kubeadms_subject(name)
        assert wanted_cn == spec.common_names[0]
        assert set(kubeadm_names.groups(spec, Release(1, 37))) <= {MASTERS_GROUP, *groups}


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ('[certificate.registry]\nauthority = "ca"\nusages = ["server"]\nsubjects = ["CN=r"]\n', "sans"),
        ('[certificate.registry]\nauthority = "ca"\nusages = ["server"]\nsans = ["r"]\n', "subjects"),
        ('[certificate.registry]\nauthority = "ca"\nsubjects = ["CN=r"]\nsans = ["r"]\n', "usages"),
        ('[certificate.registry]\nusages = ["server"]\nsubjects = ["CN=r"]\nsans = ["r"]\n', "authority"),
        ('[certificate.apiserver]\nauthority = "etcd-ca"\n', "authority"),
    ],
)
def test_a_further_pair_has_a_whole_table(table: str, key: str) -> None:
    """No other rule limits such a certificate; kubeadm's keep their CA and usages."""
    with pytest.raises(SettingsError) as e:
        parse(ALLOW + table)
    assert [one.key.rpartition(".")[2] for one in e.value.problems] == [key]
