"""A live certificate whose identity is not its own is refused; what kubeadm's versions made passes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from bridge.contract import SignRequest
from bridge.pki import csr, identity
from bridge.specs import SPECS
from bridge.testing import TestCA
from tests.kit.issuing import NOW, Signer, cn, name

CN, ORG = NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME


@pytest.fixture(scope="module")
def ca() -> Signer:
    """The node's CA, whose certificate has expired."""
    return Signer.make(end=NOW - timedelta(days=1))


def live(
    ca: Signer, spec: str, subject: x509.Name | None = None, by: Signer | None = None, behind: Sequence[Signer] = ()
) -> list[str]:
    """What speaks against an expired certificate."""
    key = csr.generate_key("ecdsa-p256")
    pem = csr.build(TestCA.make(algorithm="ecdsa-p256").leaf(SPECS[spec]), key)
    request = SignRequest(spec=SPECS[spec], csr_pem=pem, validity=timedelta(days=365))
    begin, end = NOW - timedelta(days=400), NOW - timedelta(days=35)
    issued = (by or ca).issue(request, subject=subject, intermediates=behind, begin=begin, end=end)
    found = identity.check(SPECS[spec], (issued.leaf, *issued.intermediates), (ca.certificate,), "ca.crt")
    return [violation.subject for violation in found]


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
    """Those of kubeadm 1.20, 1.29 and 1.37; another group is refused."""
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
        ("front-proxy-client", cn("system:admin"), ["CN"]),
        ("apiserver", name((CN, "kube-apiserver"), (CN, "root")), ["CN"]),
        ("apiserver", x509.Name([]), ["CN"]),
    ],
)
def test_who_it_is_for(spec: str, subject: x509.Name, wrong: list[str], ca: Signer) -> None:
    """A CN or a group of somebody else's is named."""
    assert live(ca, spec, subject) == wrong


def test_a_certificate_of_another_ca(ca: Signer) -> None:
    """Of the same name, self-signed, or by a leaf of the CA: refused; by an earlier certificate of the CA: not."""
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
    """As `allow_extra_subject` names it."""
    ca = Signer.make()
    key = csr.generate_key("ecdsa-p256")
    pem = csr.build(TestCA.make(algorithm="ecdsa-p256").leaf(SPECS["scheduler.conf"]), key)
    request = SignRequest(spec=SPECS["scheduler.conf"], csr_pem=pem, validity=timedelta(days=365))
    leaf = ca.issue(request, subject=name((ORG, "Example Corp"), (CN, "system:kube-scheduler"))).leaf
    allowed = frozenset({(ORG.dotted_string, "Example Corp")})
    assert identity.check(SPECS["scheduler.conf"], (leaf,), (ca.certificate,), "ca.crt", allowed) == []
    assert identity.check(SPECS["scheduler.conf"], (leaf,), (ca.certificate,), "ca.crt") != []
