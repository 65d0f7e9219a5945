"""Pods that ask for certificates, without a kubelet: their objects, a node that asks for them, and a CA of their own."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from backends.vault.setup import role_beside
from bridge.gateway import policy, rules
from bridge.gateway.watch import GROUP, PODS
from bridge.pki.certificates import pem
from bridge.pki.csr import key_pem
from tests.kit import gateways
from tests.kit.api_client import ApiClient, Reply
from tests.kit.cluster_api import ClusterApi
from tests.kit.gateways import USER, Place, csr_pem, new_key
from tests.kit.issuing import Signer
from tests.kit.nodes import wait_for
from tests.kit.openbao import OpenBao
from tests.kit.opensslca import make_ca_directory

SIGNER = "corp.example/spiffe"
TRUST_DOMAIN = "prod.corp.example"
POLICY = f"""\
[allow]
clusters = ["kubernetes"]
nodes = ["*"]

[pod_signer."{SIGNER}"]
trust_domain = "{TRUST_DOMAIN}"
namespaces = ["shop", "bank"]
annotations = {{ "corp.example/tier" = "gold*" }}
[pod_signer."{SIGNER}".identity.web]
namespaces = ["shop"]
service_accounts = ["web"]
dns = ["web.{{namespace}}.svc", "{{pod}}.web.{{namespace}}.svc"]
"""
_RIGHTS = [
    {"apiGroups": ["certificates.k8s.io"], "resources": [PODS], "verbs": ["get", "list", "watch"]},
    {"apiGroups": ["certificates.k8s.io"], "resources": [f"{PODS}/status"], "verbs": ["patch"]},
    {
        "apiGroups": ["certificates.k8s.io"],
        "resources": ["signers"],
        "verbs": ["sign", "attest"],
        "resourceNames": [SIGNER],
    },
    {
        "apiGroups": ["certificates.k8s.io"],
        "resources": ["clustertrustbundles"],
        "verbs": ["create", "get", "patch", "delete"],
    },
    {"apiGroups": [""], "resources": ["pods", "serviceaccounts", "nodes", "namespaces"], "verbs": ["get"]},
    {"apiGroups": [""], "resources": ["events"], "verbs": ["create"]},
]
_NUMBERS = itertools.count(1)


def grant_rights(cluster: ClusterApi) -> None:
    """What docs/pod-certificates.md says that the gateway needs besides its lease."""
    gateways.add_role(cluster.client(), f"{USER}-pods", _RIGHTS, {"kind": "User", "name": USER})


def place(cluster: ClusterApi, directory: Path, policy: str = POLICY) -> Place:
    """Settings for pods alone, without a CA yet."""
    made = Place(cluster=cluster, directory=directory / "gateway", policy=policy, trust=directory / "trust")
    made.trust = directory / "trust"
    made.trust.mkdir(parents=True, exist_ok=True)
    return made


def trust(place: Place, *cas: Signer) -> None:
    """The roots, of which there may be two."""
    assert place.trust is not None
    beside = place.trust / ".pods.crt"
    beside.write_bytes(pem(*(one.certificate for one in cas)))
    beside.rename(place.trust / "pods.crt")


def with_vault(place: Place, bao: OpenBao, ca: Signer, mount: str = "pods", **role: object) -> Place:
    """A PKI engine of OpenBao with a role for pods."""
    bao.add_ca(mount, pem(ca.certificate), key_pem(ca.key))
    [patterns] = rules.patterns(policy.parse(place.policy).pod_signers.values())
    bao.add_roles(mount, {"kubeadm-pod": {**role_beside(patterns), **role}})
    trust(place, ca)
    token = gateways.written(place.directory / f"{mount}.token", bao.root_token, 0o600)
    place.tables.append(
        f'[backend.pods]\ntype = "vault"\nurl = "{bao.url}"\ntimeout = "1m"\nmount = "{mount}"\nrole = "kubeadm-{{name}}"\n'
        f'[backend.pods.auth]\ntoken_file = "{token}"\n[authority.pods]\nbackend = "pods"\n'
    )
    return place


def with_openssl(place: Place, ca: Signer) -> Place:
    """A directory of `openssl ca`."""
    directory = place.directory / "pods-ca"
    make_ca_directory(directory, pem(ca.certificate), key_pem(ca.key))
    trust(place, ca)
    place.tables.append(f'[backend.pods]\ntype = "openssl"\ndir = "{directory}"\n[authority.pods]\nbackend = "pods"\n')
    return place


def source(**changes: Any) -> dict[str, Any]:
    """The source of a projected volume."""
    usual = {"signerName": SIGNER, "keyType": "ECDSAP256", "credentialBundlePath": "credential-bundle.private-key.pem"}
    return {key: value for key, value in {**usual, **changes}.items() if value is not None}


@dataclass(kw_only=True)
class Pod:
    """A Pod object, bound to a node, and what a kubelet knows of it."""

    cluster: ClusterApi
    document: dict[str, Any]
    account_uid: str
    node_uid: str
    key: Any = field(default_factory=new_key)
    group: str = GROUP  #: With the version by which the kubelet asks.

    @property
    def namespace(self) -> str:
        """Its namespace."""
        return str(self.document["metadata"]["namespace"])

    @property
    def name(self) -> str:
        """Its name."""
        return str(self.document["metadata"]["name"])

    @property
    def path(self) -> str:
        """The path of the object."""
        return f"/api/v1/namespaces/{self.namespace}/pods/{self.name}"

    @property
    def node(self) -> str:
        """Its node."""
        return str(self.document["spec"]["nodeName"])

    def body(self, key: Any = None, pem: bytes = b"", **spec: Any) -> dict[str, Any]:
        """A request as a kubelet makes it, with changes; None takes a key away."""
        stub = pem or csr_pem([], key=key or self.key)
        der = x509.load_pem_x509_csr(stub).public_bytes(serialization.Encoding.DER)
        usual = {
            "signerName": SIGNER,
            "podName": self.name,
            "podUID": self.document["metadata"]["uid"],
            "serviceAccountName": self.document["spec"]["serviceAccountName"],
            "serviceAccountUID": self.account_uid,
            "nodeName": self.node,
            "nodeUID": self.node_uid,
            "maxExpirationSeconds": 86400,
            "stubPKCS10Request": base64.b64encode(der).decode(),
        }
        return {
            "apiVersion": self.group.removeprefix("/apis/"),
            "kind": "PodCertificateRequest",
            "metadata": {"generateName": "req-", "namespace": self.namespace},
            "spec": {key: value for key, value in {**usual, **spec}.items() if value is not None},
        }

    def ask(self, who: ApiClient | None = None, key: Any = None, pem: bytes = b"", **spec: Any) -> str:
        """Make the request, as the pod's node unless another asks; the object's name."""
        reply = wait_for("an answer", lambda: self._once(who, self.body(key, pem, **spec)))
        assert reply.status == 201, reply.text[-500:]
        return str(reply.document["metadata"]["name"])

    def _once(self, who: ApiClient | None, body: Mapping[str, Any]) -> Reply | None:
        """None: NodeRestriction has not heard of the pod yet."""
        who = who or self.cluster.client(f"system:node:{self.node}", "system:nodes")
        reply = who.ask("POST", collection(self.namespace, self.group), body)
        return None if reply.status in {403, 500} and "not found" in reply.text else reply

    def read(self, name: str) -> dict[str, Any]:
        """A request of the namespace, as it is."""
        return self.cluster.client().get(f"{collection(self.namespace, self.group)}/{name}")

    def set_phase(self, phase: str) -> None:
        """As the kubelet says it."""
        assert self.cluster.client().patch(f"{self.path}/status", {"status": {"phase": phase}}).ok


def collection(namespace: str, group: str = GROUP) -> str:
    """The path of a namespace's requests."""
    return f"{group}/namespaces/{namespace}/{PODS}"


def make_pod(
    cluster: ClusterApi,
    namespace: str = "shop",
    account: str = "web",
    node: str = "w1",
    sources: Sequence[Mapping[str, Any]] = (),
    name: str = "",
) -> Pod:
    """A pod with these sources in one volume, and whatever it needs, as far as that is not there."""
    admin = cluster.client()
    if not admin.ask("GET", f"/api/v1/nodes/{node}").ok:
        cluster.add_node(node)
    if not admin.ask("GET", f"/api/v1/namespaces/{namespace}").ok:
        admin.create("/api/v1/namespaces", {"metadata": {"name": namespace}})
    accounts = f"/api/v1/namespaces/{namespace}/serviceaccounts"
    if not admin.ask("GET", f"{accounts}/{account}").ok:
        admin.create(accounts, {"metadata": {"name": account}})
    volume = {"name": "id", "projected": {"sources": [{"podCertificate": one} for one in sources or [source()]]}}
    spec = {
        "nodeName": node, "serviceAccountName": account, "automountServiceAccountToken": False, "volumes": [volume],
        "containers": [{"name": "x", "image": "x", "volumeMounts": [{"name": "id", "mountPath": "/id"}]}],
    }  # fmt: skip
    body = {"metadata": {"name": name or f"p{next(_NUMBERS)}"}, "spec": spec}
    document = admin.create(f"/api/v1/namespaces/{namespace}/pods", body)
    uid = admin.get(f"{accounts}/{account}")["metadata"]["uid"]
    node_uid = admin.get(f"/api/v1/nodes/{node}")["metadata"]["uid"]
    return Pod(cluster=cluster, document=document, account_uid=uid, node_uid=node_uid)


def outcome(document: Mapping[str, Any]) -> str:
    """`Issued`, `Denied`, `Failed`, or nothing yet."""
    return next((str(one["type"]) for one in document.get("status", {}).get("conditions", [])), "")


def condition(document: Mapping[str, Any]) -> tuple[str, str]:
    """Reason and message of the one condition."""
    [one] = document["status"]["conditions"]
    return one["reason"], one.get("message", "")


def chain(document: Mapping[str, Any]) -> list[x509.Certificate]:
    """The certificates."""
    return x509.load_pem_x509_certificates(document["status"]["certificateChain"].encode())


def names(leaf: x509.Certificate) -> list[str]:
    """SANs with their types, and CNs."""
    san = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [*(f"{type(one).__name__}:{one.value}" for one in san), *(one.rfc4514_string() for one in leaf.subject)]


def outcomes(documents: Mapping[str, Any]) -> Iterator[str]:
    """Outcomes of a list, for counting."""
    yield from (json.dumps(outcome(one)) for one in documents["items"])
