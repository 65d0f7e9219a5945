"""Another node's names in this node's certificates."""

from __future__ import annotations

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import NameOID

from bridge.pki.kubeadm_names import parse_nodes, renamed
from bridge.specs import SPECS
from bridge.testing import TestCA


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
    kubelet = renamed(ca.leaf(SPECS["kubelet.conf"]), {"cp-1": "cp-2"})
    assert kubelet.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "system:node:cp-2"
    with pytest.raises((InvalidSignature, ValueError)):  # ValueError: not even a key of that type
        other.verify_directly_issued_by(ca.certificate)
