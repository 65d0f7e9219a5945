"""kubeadm's ConfigMaps in a real API server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from bridge.cluster import kubeadm, text_of
from bridge.cluster.api import Api
from bridge.cluster.kubeadm import CLUSTER, KUBELETS, ConfigMapKey, NoConfigError
from tests.kit import cluster_api
from tests.kit.cluster_api import ClusterApi
from tests.kit.nodes import wait_for

MAPS = "/api/v1/namespaces/kube-system/configmaps"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterApi]:
    """An API server."""
    with cluster_api.running(tmp_path_factory.mktemp("kubeadm")) as found:
        yield found


@pytest.fixture
def api(cluster: ClusterApi) -> Api:
    """An administrator's client; the two ConfigMaps are there."""
    admin = cluster.client()
    for place, text in ((CLUSTER, "kind: ClusterConfiguration\nclusterName: one\n"), (KUBELETS, "kind: x\n# kept\n")):
        admin.ask("DELETE", place.path)
        admin.create(MAPS, {"metadata": {"name": place.name}, "data": {place.key: text, "other": "stays"}})
    return client(cluster.kubeconfig("kubernetes-super-admin", "system:masters"))


def client(config: Path) -> Api:
    """A client by a kubeconfig."""
    return Api.of_gateway(config)


def test_a_text_is_changed_and_the_rest_stays(cluster: ClusterApi, api: Api) -> None:
    """Only this key's text is another one; a second time nothing is written."""
    assert kubeadm.change(api, KUBELETS, lambda text: text.replace("x", "y"))
    found = kubeadm.read(api, KUBELETS)
    assert found.object["data"] == {"kubelet": "kind: y\n# kept\n", "other": "stays"}
    assert not kubeadm.change(api, KUBELETS, lambda text: text.replace("x", "y"))
    assert kubeadm.read(api, KUBELETS).object["metadata"] == found.object["metadata"]
    assert cluster.client().ask("GET", KUBELETS.path).document["data"]["other"] == "stays"


def test_a_change_in_between_is_not_lost(cluster: ClusterApi, api: Api) -> None:
    """Another client is faster: its change stays, and ours is made to what it wrote."""
    seen = []

    def edit(text: str) -> str:
        seen.append(text)
        if len(seen) == 1:
            answer = cluster.client().patch(KUBELETS.path, {"data": {"kubelet": "kind: theirs\n"}})
            assert answer.ok
        return f"{text}ours: true\n"

    assert kubeadm.change(api, KUBELETS, edit)
    assert seen == ["kind: x\n# kept\n", "kind: theirs\n"]
    assert kubeadm.read(api, KUBELETS).text == "kind: theirs\nours: true\n"


def test_the_cluster_configuration_is_changed_as_a_document(api: Api) -> None:
    """Long values stay on one line; what is not changed keeps its text."""
    assert not kubeadm.change_cluster(api, dict)
    assert kubeadm.read(api, CLUSTER).text == "kind: ClusterConfiguration\nclusterName: one\n"
    long = " ".join(["word"] * 60)
    assert kubeadm.change_cluster(
        api, lambda found: {**found, "apiServer": {"extraArgs": [{"name": "a", "value": long}]}}
    )
    text = kubeadm.read(api, CLUSTER).text or ""
    assert yaml.safe_load(text)["apiServer"]["extraArgs"] == [{"name": "a", "value": long}]
    assert long in text


def test_what_is_not_there_or_not_allowed(cluster: ClusterApi, api: Api) -> None:
    """The error says so; nothing is made."""
    nowhere = ConfigMapKey("nowhere", "text")
    assert kubeadm.read(api, nowhere).text is None
    with pytest.raises(NoConfigError, match=r"kube-system/nowhere is missing, or has no text \(HTTP 404\)"):
        kubeadm.change(api, nowhere, str.upper)
    reader = {
        "rules": [{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get"]}],
        "metadata": {"name": "reader", "namespace": "kube-system"},
    }
    roles = "/apis/rbac.authorization.k8s.io/v1/namespaces/kube-system"
    cluster.client().create(f"{roles}/roles", reader)
    subject = {"kind": "User", "name": "reads", "apiGroup": "rbac.authorization.k8s.io"}
    ref = {"kind": "Role", "name": "reader", "apiGroup": "rbac.authorization.k8s.io"}
    cluster.client().create(
        f"{roles}/rolebindings", {"metadata": reader["metadata"], "subjects": [subject], "roleRef": ref}
    )
    reads = cluster.client("reads")
    wait_for("the right to read", lambda: reads.ask("GET", KUBELETS.path).ok)
    with pytest.raises(NoConfigError, match=r"can't change .* HTTP 403"):
        kubeadm.change(client(cluster.kubeconfig("reads")), KUBELETS, str.upper)
    assert kubeadm.read(api, KUBELETS).text == "kind: x\n# kept\n"


@pytest.mark.parametrize("text", ["[]", "a: &x [1]\nb: *x\n", "a: [", "a: 1\na: 2\n"])
def test_a_damaged_cluster_configuration_is_left_alone(cluster: ClusterApi, api: Api, text: str) -> None:
    """It can't be changed without a loss, and the error quotes nothing of it."""
    cluster.client().patch(CLUSTER.path, {"data": {CLUSTER.key: text}})
    with pytest.raises(NoConfigError, match="kubeadm-config"):
        kubeadm.change_cluster(api, lambda found: {**found, "clusterName": "two"})
    assert kubeadm.read(api, CLUSTER).text == text


@pytest.mark.parametrize("filled", ["<", ","])
def test_no_tenant_keeps_a_list_from_being_read(cluster: ClusterApi, api: Api, filled: str) -> None:
    """A character that JSON writes as six makes a megabyte six, and a million commas in a text are no million values."""
    admin, namespace = cluster.client(), f"tenant-{ord(filled)}"
    admin.create("/api/v1/namespaces", {"metadata": {"name": namespace}})
    maps, names = f"/api/v1/namespaces/{namespace}/configmaps", [f"map-{number}" for number in range(5)]
    for name in names:
        admin.create(
            maps, {"metadata": {"name": name}, "data": {"all": filled * (1020 << 10 if name == "map-2" else 1)}}
        )
    assert [text_of(one, "metadata", "name") for one in api.every(maps, 3)] == names
