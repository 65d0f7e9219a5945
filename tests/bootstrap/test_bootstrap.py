"""The configuration that kubeadm is given, as far as we read and write it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.bootstrap import ConfigurationFacts, for_node, from_facts, join_configuration
from bridge.node.kubeadm_config import KubeadmConfigError
from bridge.node.kubeadm_config import parse_documents as parse
from tests.kit.new_node import ADDRESS, CONFIG, ENDPOINT, NAME


def test_what_decides_names_is_read() -> None:
    """The values come from the node's document and the cluster's."""
    found = parse(CONFIG.encode())

    assert (found.name, found.address, found.endpoint, found.version) == (NAME, ADDRESS, ENDPOINT, "v1.37.2")
    assert (found.socket, found.port) == ("unix:///run/none.sock", 6443)


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ('[{name: node-ip, value: "192.0.2.99, 2001:db8::9"}, {name: v, value: "4"}]', ("192.0.2.99", "2001:db8::9")),
        ("{node-ip: 192.0.2.99}", ("192.0.2.99",)),  # v1beta3
        ('[{name: node-ip, value: "::"}, {name: [a]}, 5]', ()),
        ("5", ()),
    ],
)
def test_the_kubelets_addresses_are_read(flags: str, found: tuple[str, ...]) -> None:
    """In both forms; an unspecified one only chooses the family, and what kubeadm refuses is passed over."""
    assert parse(CONFIG.replace("name: cp-1", f"kubeletExtraArgs: {flags}, name: cp-1").encode()).node_ips == found


def test_an_endpoint_without_a_port_has_kubeadms() -> None:
    """An endpoint without a port gets the one that kubeadm gives it."""
    assert parse(CONFIG.replace(":6443", "").encode()).endpoint == "api.example.com:6443"


def test_it_survives_being_written() -> None:
    """`kubeadm` gets the configuration that was read."""
    found = parse(CONFIG.encode())

    assert parse(found.text().encode()) == found


def test_another_node_has_the_same_cluster() -> None:
    """Only the node's part is another one's."""
    first = parse(CONFIG.encode())
    other = for_node(first, "cp-2", "192.0.2.11")

    assert other.cluster == first.cluster
    assert (other.name, other.address, other.socket) == ("cp-2", "192.0.2.11", first.socket)


@pytest.mark.parametrize("control_plane", [True, False])
def test_joining_needs_no_token(*, control_plane: bool) -> None:
    """Discovery is by a file; nothing in it is secret."""
    node = for_node(parse(CONFIG.encode()), "cp-2", "192.0.2.11")
    base = {"kind": "JoinConfiguration", "nodeRegistration": {"taints": [], "ignorePreflightErrors": ["Swap"]}}
    found = join_configuration(node, "/etc/kubernetes/admin.conf", "File", control_plane=control_plane, base=base)
    [document] = found.documents

    assert document["discovery"] == {"file": {"kubeConfigPath": "/etc/kubernetes/admin.conf"}}
    assert ("controlPlane" in document) == control_plane
    assert document["nodeRegistration"]["ignorePreflightErrors"] == ["Swap", "File"]
    assert document["nodeRegistration"]["taints"] == []
    assert "token" not in str(document).lower()


def test_facts_make_a_configuration() -> None:
    """A missing fact gets kubeadm's default."""
    facts = ConfigurationFacts(
        name="a", address="192.0.2.1", endpoint="api:6443", version="v1.37.2", sans=("b.example.com",)
    )
    found = parse(from_facts(facts).text().encode())

    assert (found.name, found.address, found.endpoint) == ("a", "192.0.2.1", "api:6443")
    assert found.cluster["apiServer"] == {"certSANs": ["b.example.com"]}
    assert "networking" not in found.cluster


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_whatever_is_in_it(data: bytes) -> None:
    """It is read, or it is kubeadm's no configuration; never another error."""
    try:
        parse(data)
    except KubeadmConfigError as e:
        assert "wanted" in str(e)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["C"]), max_size=5),
        lambda one: (
            st.lists(one, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["nodeRegistration", "localAPIEndpoint", "controlPlane", "name", "etcd", "local", "kind"]
                ),
                one,
                max_size=4,
            )
        ),
    )
)
def test_values_of_odd_types_are_none(value: object) -> None:
    """A value of another type than a mapping or a text, where one is wanted, counts as not given."""
    node = {"apiVersion": "kubeadm.k8s.io/v1beta4", "kind": "InitConfiguration"}
    cluster = {"apiVersion": "kubeadm.k8s.io/v1beta4", "kind": "ClusterConfiguration"}
    more = (
        value if isinstance(value, dict) else {"nodeRegistration": value, "etcd": value, "controlPlaneEndpoint": value}
    )
    found = parse("\n---\n".join(json.dumps({**more, **one}, ensure_ascii=False) for one in (node, cluster)).encode())

    assert all(isinstance(one, str) for one in (found.name, found.address, found.endpoint, found.etcd_directory))
