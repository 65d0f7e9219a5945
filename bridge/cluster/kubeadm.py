"""Reads and changes the ConfigMaps from which kubeadm writes each node's files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, ClassVar, NamedTuple

import yaml

from bridge.cluster import below
from bridge.cluster.api import Api, NoAnswerError
from bridge.errors import BridgeError, Exit
from bridge.node.kubeadm_config import CLUSTER_CONFIGURATION
from bridge.node.yamltree import YamlError, document

#: A ClusterConfiguration as plain Python types.
Cluster = Mapping[str, Any]

_TURNS = 5  # each 409 means that another client was faster


class ConfigMapKey(NamedTuple):
    """Where a text is: a ConfigMap, and the key in its data."""

    name: str
    key: str
    namespace: str = "kube-system"

    @property
    def path(self) -> str:
        """The path in the Kubernetes API."""
        return f"/api/v1/namespaces/{self.namespace}/configmaps/{self.name}"

    def __str__(self) -> str:
        return f"the ConfigMap {self.namespace}/{self.name}"


#: kubeadm writes the static pods' manifests from it.
CLUSTER = ConfigMapKey("kubeadm-config", CLUSTER_CONFIGURATION)
#: kubeadm writes each kubelet's `config.yaml` from it.
KUBELETS = ConfigMapKey("kubelet-config", "kubelet")
#: A joining node learns the CAs from it; bootstrap tokens sign it (`kubeadm init phase bootstrap-token`).
CLUSTER_INFO = ConfigMapKey("cluster-info", "kubeconfig", "kube-public")


class NoConfigError(BridgeError):
    """One of kubeadm's ConfigMaps does not exist, or can't be changed."""

    exit_code: ClassVar[int] = Exit.FAILED
    hint = "kubeadm makes it: kubeadm init phase upload-config all --config FILE"


class Found(NamedTuple):
    """The API server's answer about a text."""

    text: str | None  #: None: there is none.
    status: int  #: The HTTP status, for messages.
    object: Mapping[str, Any]


def read(api: Api, place: ConfigMapKey) -> Found:
    """Read a text (NoAnswerError: no API server answers)."""
    reply = api.ask("GET", place.path)
    text = below(reply.document, "data", place.key) if reply.status == HTTPStatus.OK else None
    return Found(text=text if isinstance(text, str) else None, status=reply.status, object=reply.document)


def read_cluster(api: Api) -> Cluster:
    """Read the ClusterConfiguration (NoConfigError: there is no readable one; NoAnswerError)."""
    found = read(api, CLUSTER)
    if found.text is None:
        raise _none(CLUSTER, found)
    return _parsed(found.text)


def _none(place: ConfigMapKey, config_map: Found) -> NoConfigError:
    return NoConfigError(f"{place} is missing, or has no {place.key} (HTTP {config_map.status})")


def _parsed(text: str) -> Cluster:
    try:
        found = document(text).plain()
    except YamlError as e:
        raise NoConfigError(f"{CLUSTER}: {e}", hint="kubeadm config validate says what is wrong") from None
    if not isinstance(found, dict):
        raise NoConfigError(f"wanted a {CLUSTER.key} in {CLUSTER}, found something else")
    return found


def change(api: Api, place: ConfigMapKey, edit: Callable[[str], str]) -> bool:
    """
    Change a text with `edit`; if another client changes it meanwhile, `edit` gets the new text.

    Returns whether `edit` changed it (NoConfigError: no such text, or a refusal; NoAnswerError).
    """
    for _ in range(_TURNS):
        found = read(api, place)
        if found.text is None:
            raise _none(place, found)
        edited = edit(found.text)
        if edited == found.text:
            return False
        # the object keeps its resourceVersion, so that a change in between is a 409
        reply = api.ask("PUT", place.path, {**found.object, "data": {**found.object["data"], place.key: edited}})
        if reply.status == HTTPStatus.OK:
            return True
        if reply.status != HTTPStatus.CONFLICT:
            text = f"can't change {place}: HTTP {reply.status} {reply.message}".rstrip()
            raise NoConfigError(text, hint="`kubectl auth can-i update configmaps -n kube-system` says who may")
    raise NoAnswerError(f"can't change {place}: others changed it each time")


def change_cluster(api: Api, edit: Callable[[Cluster], Cluster]) -> bool:
    """Change the ClusterConfiguration as `change` does; `edit` returns the new one."""

    def edited(text: str) -> str:
        found = _parsed(text)
        wanted = edit(found)
        return text if wanted == found else yaml.safe_dump(dict(wanted), sort_keys=False, width=1 << 20)

    return change(api, CLUSTER, edited)
