"""The names that kubeadm gives, by release, and another node's names in this node's certificates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import NameOID

from bridge.contract import SignRequest
from bridge.errors import Violation
from bridge.pki import csr, kubeadm_names
from bridge.pki.certificates import anchor_of, load_der_certificate
from bridge.pki.kubeadm_names import (
    NamingFacts,
    NoFactError,
    Release,
    identity_violations,
    is_node_name,
    parse_nodes,
    parse_release,
    renamed,
)
from bridge.specs import SPECS
from bridge.testing import TestCA
from tests.kit.issuing import NOW, Signer, cn, name, odd_certificates


def test_a_list_of_nodes() -> None:
    """Comments and blank lines are none; addresses are compared as addresses."""
    text = "# all\n\ncp-1 10.0.0.1 2001:db8:0::1\ncp-2   10.0.0.2 2001:db8::2 # new\n"
    found = [(node.line, node.role, node.name, node.addresses) for node in parse_nodes(text)]
    assert found == [(3, "", "cp-1", ("10.0.0.1", "2001:db8::1")), (4, "", "cp-2", ("10.0.0.2", "2001:db8::2"))]
    [worker] = parse_nodes("worker w-1 10.0.0.3\n", with_roles=True)
    assert (worker.role, worker.name, worker.addresses) == ("worker", "w-1", ("10.0.0.3",))


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("cp-1", "line 1"),
        ("cp-1 host.example.com", "line 1"),
        ("cp-1 10.0.0.1\ncp-1 10.0.0.2", "line 2"),
        ("cp-1 10.0.0.1\ncp-2 10.0.0.1", "line 2"),
    ],
)
def test_a_list_that_is_none_is_refused_with_its_line(text: str, wrong: str) -> None:
    """A name or address that is missing, odd or there twice."""
    with pytest.raises(ValueError, match=wrong):
        parse_nodes(text)


def test_a_nodes_certificates_as_another_node_would_have_them() -> None:
    """Its name and address, in CN and SANs; whatever all nodes have stays, in its order."""
    ca = TestCA.make()
    live = ca.leaf(SPECS["apiserver"])
    sans = live.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = [str(san.value) for san in sans if isinstance(san, x509.IPAddress)]
    other = renamed(live, {"cp-1": "cp-2", addresses[0]: "198.51.100.7"})
    theirs = other.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    mapped = {"cp-1": "cp-2", addresses[0]: "198.51.100.7"}
    assert [str(san.value) for san in theirs] == [mapped.get(str(san.value), str(san.value)) for san in sans]
    assert "198.51.100.7" in [str(san.value) for san in theirs]
    assert other.subject == live.subject
    for node in ("cp-2", f"cp-{'2' * 60}"):
        kubelet = renamed(ca.leaf(SPECS["kubelet.conf"]), {"cp-1": node})
        assert kubelet.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == f"system:node:{node}"
    with pytest.raises((InvalidSignature, ValueError)):  # ValueError: not even a key of that type
        other.verify_directly_issued_by(ca.certificate)


def test_releases_are_read() -> None:
    """Releases are read with and without a patch number; other words are refused."""
    for text, release in (
        ("v1.37.2", Release(1, 37, 2)),
        ("1.37", Release(1, 37)),
        (" v1.29.0-rc.1 ", Release(1, 29, 0)),
        ("v1.34.4+k3s1", Release(1, 34, 4)),
    ):
        assert parse_release(text) == release
    for text in ("", "stable-1", "1", "v1.x", "v1.37.2.1", "vv1.37"):
        assert parse_release(text) is None
    assert [str(Release(1, 37, 2)), str(Release(1, 37))] == ["v1.37.2", "v1.37"]


MASTERS, ADMINS = ("system:masters",), ("kubeadm:cluster-admins",)


@pytest.mark.parametrize(
    ("name", "release", "groups"),
    [
        ("admin.conf", "1.28", MASTERS),
        ("admin.conf", "1.29", ADMINS),
        ("super-admin.conf", "1.29", MASTERS),
        ("kubelet.conf", "1.37", ("system:nodes",)),
        ("apiserver", "1.37", ()),
        ("apiserver-etcd-client", "1.28", MASTERS),
        ("apiserver-etcd-client", "1.29", ()),
        ("apiserver-kubelet-client", "1.28", MASTERS),
        ("apiserver-kubelet-client", "1.29", ADMINS),
        ("apiserver-kubelet-client", "1.32", ADMINS),
        ("apiserver-kubelet-client", "1.33.11", ADMINS),
        ("apiserver-kubelet-client", "1.33.12", ()),
        ("apiserver-kubelet-client", "1.34.7", ADMINS),
        ("apiserver-kubelet-client", "1.34.8", ()),
        ("apiserver-kubelet-client", "1.35.4", ADMINS),
        ("apiserver-kubelet-client", "1.35.5", ()),
        ("apiserver-kubelet-client", "1.36.0", ADMINS),
        ("apiserver-kubelet-client", "1.36.1", ()),
        ("apiserver-kubelet-client", "1.37", ()),
    ],
)
def test_groups_by_release(name: str, release: str, groups: tuple[str, ...]) -> None:
    """The groups are those of kubeadm's sources of these releases."""
    assert kubeadm_names.groups(SPECS[name], parse_release(release)) == groups


@pytest.mark.parametrize(
    ("name", "release", "reads"),
    [
        ("admin.conf", None, "Kubernetes' version is unknown, which decides the groups (O) of admin.conf"),
        (
            "apiserver-kubelet-client",
            "1.34",
            "wanted Kubernetes' patch release, which decides the groups (O) of apiserver-kubelet-client, found v1.34",
        ),
    ],
)
def test_a_group_that_the_release_does_not_tell_is_not_guessed(name: str, release: str | None, reads: str) -> None:
    """A release that does not decide the group is an error, and no certificate decides instead."""
    with pytest.raises(NoFactError) as e:
        kubeadm_names.groups(SPECS[name], parse_release(release or ""))
    assert str(e.value) == reads


FACTS = NamingFacts(
    release=Release(1, 37),
    node="cp-1",
    address="192.0.2.10",
    service_address="10.96.0.1",
    endpoint_host="api.example.com",
    dns_domain="cluster.local",
    api_sans=("z.example.com", "192.0.2.9", "cp-1"),
    etcd_server_sans=("a.example.com",),
    etcd_peer_sans=("198.51.100.1",),
)
SERVICES = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"]
OWN = ["192.0.2.10", "127.0.0.1", "::1"]


@pytest.mark.parametrize(
    ("name", "common_name", "sans"),
    [
        (
            "apiserver",
            "kube-apiserver",
            ["api.example.com", "cp-1", *SERVICES, "z.example.com", "10.96.0.1", "192.0.2.10", "192.0.2.9"],
        ),
        ("etcd-server", "cp-1", ["a.example.com", "cp-1", "localhost", *OWN]),
        ("etcd-peer", "cp-1", ["cp-1", "localhost", *OWN, "198.51.100.1"]),
        ("kubelet.conf", "system:node:cp-1", []),
    ],
)
def test_names_are_in_kubeadms_order(name: str, common_name: str, sans: list[str]) -> None:
    """Names come first by their bytes, then addresses in their order, each once."""
    found = kubeadm_names.naming(SPECS[name], FACTS)
    assert [str(san.value) for san in found.sans] == sans
    assert found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == common_name


@pytest.mark.parametrize(
    ("name", "lacking", "what"),
    [
        ("apiserver", "node", "the node's name"),
        ("apiserver", "dns_domain", "the cluster's DNS domain"),
        ("apiserver", "service_address", "the service subnet"),
        ("apiserver", "address", "the advertise address"),
        ("etcd-server", "node", "the node's name"),
        ("etcd-peer", "address", "the advertise address"),
        ("kubelet.conf", "node", "the node's name"),
    ],
)
def test_what_is_not_known_is_named(name: str, lacking: str, what: str) -> None:
    """The facts that a certificate is made of; one that names no endpoint has none."""
    facts: dict[str, Any] = {lacking: ""}
    with pytest.raises(NoFactError) as e:
        kubeadm_names.naming(SPECS[name], replace(FACTS, **facts))
    assert str(e.value) == f"{what} is unknown"
    without = kubeadm_names.naming(SPECS["apiserver"], replace(FACTS, endpoint_host=""))
    assert "api.example.com" not in kubeadm_names.text_of(without.sans)


def test_a_san_that_is_none_is_named() -> None:
    """A SAN that kubeadm would refuse is named."""
    with pytest.raises(NoFactError, match="'a_b'"):
        kubeadm_names.naming(SPECS["apiserver"], replace(FACTS, api_sans=("a_b",)))


def test_names_as_one_text() -> None:
    """Names are joined to one text for messages."""
    assert kubeadm_names.text_of(kubeadm_names.naming(SPECS["etcd-peer"], FACTS).sans[:2]) == "cp-1, localhost"
    assert kubeadm_names.text_of(()) == "none"


def test_names_of_nodes() -> None:
    """A node's name is an RFC 1123 subdomain of at most 253 characters."""
    for good in ("a", "cp-1", "cp-1.example.com", "1", "a" * 253):
        assert is_node_name(good)
    for bad in ("", "-a", "a-", "a..b", "A", "a_b", "a.", ".a", "a" * 254):
        assert not is_node_name(bad)


def test_a_list_says_what_its_line_lacks() -> None:
    """The error shows the line as it stands there."""
    for text, reads in (
        ("cp-1", "line 1: wanted a name and addresses of its own, found 'cp-1'"),
        ("#\n cp-1 x", "line 2: wanted a name and addresses, found 'x' does not appear to be an IPv4 or IPv6 address"),
        ("worker", "line 1: wanted a name and addresses of its own, found 'worker'"),
        ("x" * 70, f"line 1: wanted a name and addresses of its own, found {'x' * 60!r}"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(reads)}$"):
            parse_nodes(text, with_roles=text == "worker")


def test_a_certificate_of_other_names_alone() -> None:
    """The certificate is for reading only: key, issuer and beginning stay, and it lasts one day."""
    live = TestCA.make().leaf(SPECS["apiserver"])
    naming = kubeadm_names.naming(SPECS["etcd-server"], FACTS)
    other = kubeadm_names.named(live, naming)
    assert naming.is_of(other)
    assert other.public_key() == live.public_key()
    assert (other.issuer, other.not_valid_before_utc) == (live.issuer, live.not_valid_before_utc)
    assert other.not_valid_after_utc - other.not_valid_before_utc == timedelta(days=1)
    assert [(each.oid.dotted_string, each.critical) for each in other.extensions] == [("2.5.29.17", False)]


# --- identity ------------------------------------------------------------------------------------------------------------


CN, ORG = NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME


@pytest.fixture(scope="module")
def ca() -> Signer:
    """The node's CA, whose certificate has expired."""
    return Signer.make(end=NOW - timedelta(days=1))


def violations(
    ca: Signer, spec: str, subject: x509.Name | None = None, by: Signer | None = None, behind: Sequence[Signer] = ()
) -> list[Violation]:
    """What speaks against an expired certificate."""
    key = csr.generate_key("ecdsa-p256")
    pem = csr.build(TestCA.make(algorithm="ecdsa-p256").leaf(SPECS[spec]), key)
    request = SignRequest(spec=SPECS[spec], csr_pem=pem, validity=timedelta(days=365))
    begin, end = NOW - timedelta(days=400), NOW - timedelta(days=35)
    issued = (by or ca).issue(request, subject=subject, intermediates=behind, begin=begin, end=end)
    return identity_violations(SPECS[spec], (issued.leaf, *issued.intermediates), (ca.certificate,), "ca.crt")


def live(
    ca: Signer, spec: str, subject: x509.Name | None = None, by: Signer | None = None, behind: Sequence[Signer] = ()
) -> list[str]:
    """The parts that are wrong."""
    return [violation.subject for violation in violations(ca, spec, subject, by, behind)]


@pytest.mark.parametrize("spec", SPECS)
def test_what_kubeadm_makes_passes(spec: str, ca: Signer) -> None:
    """Each certificate, expired and below an expired CA."""
    assert live(ca, spec) == []


@pytest.mark.parametrize(
    ("spec", "groups"),
    [
        ("admin.conf", ["system:masters"]),
        ("admin.conf", ["kubeadm:cluster-admins"]),
        ("apiserver-kubelet-client", ["system:masters"]),
        ("apiserver-kubelet-client", ["kubeadm:cluster-admins"]),
        ("apiserver-kubelet-client", ["kubeadm:cluster-admins", "system:masters"]),
        ("apiserver-kubelet-client", []),
        ("apiserver-etcd-client", ["system:masters"]),
        ("etcd-healthcheck-client", ["system:masters"]),
    ],
)
def test_the_groups_of_all_versions_pass(spec: str, groups: list[str], ca: Signer) -> None:
    """The groups of kubeadm 1.20, 1.29 and 1.37 pass, and another group is refused."""
    user = (CN, SPECS[spec].common_names[0])
    assert live(ca, spec, name(*((ORG, group) for group in groups), user)) == []
    assert live(ca, spec, name((ORG, "developers"), *((ORG, group) for group in groups), user)) == ["O"]


@pytest.mark.parametrize(
    ("spec", "subject", "wrong"),
    [
        ("etcd-server", cn("root"), ["CN"]),
        ("etcd-server", cn("kube-etcd"), []),
        ("etcd-peer", cn("cp-1"), []),
        ("etcd-peer", cn("cp-2"), ["CN"]),
        ("scheduler.conf", name((ORG, "system:masters"), (CN, "system:kube-scheduler")), ["O"]),
        ("scheduler.conf", cn("system:kube-controller-manager"), ["CN"]),
        ("kubelet.conf", name((ORG, "system:nodes"), (CN, "system:node:cp-7")), []),
        ("kubelet.conf", name((ORG, "system:nodes"), (CN, "system:node:")), ["CN"]),
        ("kubelet.conf", name((ORG, "system:masters"), (CN, "system:node:cp-1")), ["O"]),
        ("kubelet.conf", name((ORG, "system:nodes"), (CN, "system:node:cp-1.")), ["CN"]),
        ("kubelet.conf", name((ORG, "system:nodes"), (CN, "system:node:CP-1")), ["CN"]),
        ("kubelet.conf", name((ORG, "system:nodes"), (CN, "cp-1")), ["CN"]),
        ("etcd-server", cn("192.0.2.10"), ["CN"]),
        ("etcd-server", cn("*.wild.example.com"), ["CN"]),
        ("etcd-server", cn("system:node:cp-1"), ["CN"]),
        ("front-proxy-client", cn("system:admin"), ["CN"]),
        ("apiserver", name((CN, "kube-apiserver"), (CN, "root")), ["CN"]),
        ("apiserver", x509.Name([]), ["CN"]),
    ],
)
def test_who_it_is_for(spec: str, subject: x509.Name, wrong: list[str], ca: Signer) -> None:
    """The error names another holder's CN or group."""
    assert live(ca, spec, subject) == wrong


def test_a_certificate_of_another_ca(ca: Signer) -> None:
    """One from a CA of the same name, a self-signed one, and one by a leaf of the CA are refused; one by the CA's earlier certificate is not."""
    assert live(ca, "scheduler.conf", by=Signer.make()) == ["issuer"]
    mere_leaf = Signer.make("kubelet", parent=ca, ca=False)
    assert live(ca, "scheduler.conf", by=mere_leaf, behind=[mere_leaf]) == ["issuer"]
    earlier = Signer.make(key=ca.key, begin=NOW - timedelta(days=4000), end=NOW - timedelta(days=400))
    assert live(ca, "scheduler.conf", by=earlier) == []


def test_a_chain_leads_to_the_ca(ca: Signer) -> None:
    """Through the intermediates in its file; without them it does not, nor does a circle end in a hang."""
    upper = Signer.make("upper", parent=ca)
    lower = Signer.make("lower", parent=upper)
    assert live(ca, "scheduler.conf", by=lower, behind=[upper, lower]) == []
    assert live(ca, "scheduler.conf", by=lower, behind=[lower]) == ["issuer"]
    one = Signer.make("one")
    other = Signer.make("other", parent=one)
    back = Signer.make("one", parent=other, key=one.key)
    assert live(ca, "scheduler.conf", by=other, behind=[back, other]) == ["issuer"]


def test_what_a_ca_always_adds_is_no_group() -> None:
    """`allow_extra_subject` names what the CA adds."""
    ca = Signer.make()
    key = csr.generate_key("ecdsa-p256")
    pem = csr.build(TestCA.make(algorithm="ecdsa-p256").leaf(SPECS["scheduler.conf"]), key)
    request = SignRequest(spec=SPECS["scheduler.conf"], csr_pem=pem, validity=timedelta(days=365))
    leaf = ca.issue(request, subject=name((ORG, "Example Corp"), (CN, "system:kube-scheduler"))).leaf
    allowed = frozenset({(ORG.dotted_string, "Example Corp")})
    assert identity_violations(SPECS["scheduler.conf"], (leaf,), (ca.certificate,), "ca.crt", allowed) == []
    assert identity_violations(SPECS["scheduler.conf"], (leaf,), (ca.certificate,), "ca.crt") != []


@pytest.mark.parametrize(
    ("spec", "subject", "reads"),
    [
        ("etcd-server", cn("root"), "CN: wanted the node's name or kube-etcd, got root"),
        ("kubelet.conf", name((ORG, "system:nodes"), (CN, "x")), "CN: wanted system:node:the node's name, got x"),
        ("apiserver", x509.Name([]), "CN: wanted kube-apiserver, got none"),
        ("apiserver", name((CN, "kube-apiserver"), (CN, "r")), "CN: wanted kube-apiserver, got kube-apiserver, r"),
        (
            "admin.conf",
            name((ORG, "b"), (ORG, "a"), (CN, "kubernetes-admin")),
            "O: wanted kubeadm:cluster-admins or system:masters, got a, b",
        ),
        (
            "apiserver-kubelet-client",
            name((ORG, "a"), (CN, "kube-apiserver-kubelet-client")),
            "O: wanted none or kubeadm:cluster-admins, system:masters, got a",
        ),
    ],
)
def test_a_refusal_says_who_was_wanted(spec: str, subject: x509.Name, reads: str, ca: Signer) -> None:
    """The refusal says which identity was wanted and which was found; for a placeholder, its value."""
    assert list(map(str, violations(ca, spec, subject))) == [reads]


def test_a_refusal_says_whose_signature_it_found(ca: Signer) -> None:
    """The refusal names the other CA, or says that the certificate signed itself."""
    want = "issuer: wanted a signature of a CA in ca.crt, expired or not, got"
    assert list(map(str, violations(ca, "scheduler.conf", by=Signer.make("other")))) == [f"{want} one of CN=other"]
    own = cn("system:kube-scheduler")
    itself = violations(ca, "scheduler.conf", own, by=Signer.make("system:kube-scheduler"))
    assert list(map(str, itself)) == [f"{want} a self-signed certificate"]


def test_a_certificate_that_cannot_be_read_has_no_identity(ca: Signer) -> None:
    """The one violation says why."""
    twice = load_der_certificate(odd_certificates(ca.certificate)["an extension twice"])
    [violation] = identity_violations(SPECS["etcd-server"], (twice,), (ca.certificate,), "ca.crt")
    assert str(violation).startswith("subject: wanted one that can be read, got Duplicate 2.5.29.19")


def test_chains_of_eight_intermediates_are_followed(ca: Signer) -> None:
    """Chains of up to eight intermediates are followed, and longer ones are not."""
    chain = [ca]
    for level in range(9):
        chain.append(Signer.make(f"level {level}", parent=chain[-1]))
    for count, wrong in ((8, []), (9, ["issuer"])):
        below = chain[count:0:-1]
        assert len(below) == count
        assert live(ca, "scheduler.conf", by=below[0], behind=below) == wrong


def test_of_several_cas_the_one_that_ends_last_is_meant(ca: Signer) -> None:
    """A CA that was renewed with its key stands twice in the file, in either order."""
    later = Signer.make(key=ca.key, end=NOW + timedelta(days=1)).certificate
    leaf = Signer.make("x", parent=ca, ca=False).certificate
    for anchors in ((ca.certificate, later), (later, ca.certificate)):
        assert anchor_of((leaf,), anchors) == later
    assert anchor_of((leaf,), (Signer.make().certificate,)) is None
    assert anchor_of((leaf,), ()) is None
