"""A live certificate whose identity is not its own is refused; what kubeadm's versions made passes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from bridge.contract import SignRequest
from bridge.errors import Violation
from bridge.pki import csr
from bridge.pki.certificates import anchor_of, load_der_certificate
from bridge.pki.kubeadm_names import identity_violations
from bridge.specs import SPECS
from bridge.testing import TestCA
from tests.kit.issuing import NOW, Signer, cn, name, odd_certificates

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
