"""Requests for pods that must not be signed, each beside an honest twin of the same pod."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import AttributeOID, ExtendedKeyUsageOID, NameOID

from tests.kit.gateways import new_key
from tests.kit.issuing import usage
from tests.kit.pods import TRUST_DOMAIN, Pod

#: Who makes the request: the pod's own node, or a user with the verb `create`.
NODE, OTHER = "node", "other"
Content = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One hostile request."""

    what: str
    who: str
    make: Callable[[Pod], Content]  #: Keywords for `Pod.ask`.
    before: Callable[[Pod], None] = lambda _: None  #: What happens to the pod first.
    pod: Mapping[str, Any] = field(default_factory=dict)  #: Keywords for `make_pod`.
    twin: bool = True  #: An honest request of the same pod is signed.


def stub(
    subject: Sequence[tuple[x509.ObjectIdentifier, str]] = (),
    sans: Sequence[x509.GeneralName] = (),
    extensions: Sequence[x509.ExtensionType] = (),
    password: bytes = b"",
) -> bytes:
    """A CSR that is not empty."""
    name = x509.Name([x509.NameAttribute(*one) for one in subject])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    for one in (*([x509.SubjectAlternativeName(sans)] if sans else []), *extensions):
        builder = builder.add_extension(one, critical=False)
    if password:
        builder = builder.add_attribute(AttributeOID.CHALLENGE_PASSWORD, password)
    return builder.sign(new_key(), hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


_URI, _DNS = x509.UniformResourceIdentifier, x509.DNSName
STUBS: Mapping[str, Callable[[], bytes]] = {
    "a CN": lambda: stub([(NameOID.COMMON_NAME, "web")]),
    "an administrator": lambda: stub(
        [(NameOID.ORGANIZATION_NAME, "system:masters"), (NameOID.COMMON_NAME, "kubernetes-admin")]
    ),
    "a node": lambda: stub([(NameOID.ORGANIZATION_NAME, "system:nodes"), (NameOID.COMMON_NAME, "system:node:cp1")]),
    "an OU": lambda: stub([(NameOID.ORGANIZATIONAL_UNIT_NAME, "x")]),
    "a user id": lambda: stub([(NameOID.USER_ID, "0")]),
    "its own SPIFFE ID": lambda: stub(sans=[_URI(f"spiffe://{TRUST_DOMAIN}/ns/shop/sa/web")]),
    "another's SPIFFE ID": lambda: stub(sans=[_URI(f"spiffe://{TRUST_DOMAIN}/ns/bank/sa/till")]),
    "two SPIFFE IDs": lambda: stub(sans=[_URI(f"spiffe://{TRUST_DOMAIN}/ns/shop/sa/web"), _URI("spiffe://other/x")]),
    "the API server": lambda: stub(sans=[_DNS("kubernetes.default.svc")]),
    "a wildcard": lambda: stub(sans=[_DNS("*.shop.svc")]),
    "an address": lambda: stub(sans=[x509.IPAddress(ipaddress.ip_address("10.96.0.1"))]),
    "an e-mail address": lambda: stub(sans=[x509.RFC822Name("root@corp.example")]),
    "a CA": lambda: stub(extensions=[x509.BasicConstraints(ca=True, path_length=None)]),
    "a CA's usages": lambda: stub(extensions=[usage(ca=True)]),
    "code signing": lambda: stub(extensions=[x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING])]),
    "any usage": lambda: stub(extensions=[x509.ExtendedKeyUsage([ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE])]),
    "a password": lambda: stub(password=b"x"),
}
KEYS: Mapping[str, Callable[[], Any]] = {
    "P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "P-521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "RSA-3072": lambda: rsa.generate_private_key(65537, 3072),
    "RSA-4096": lambda: rsa.generate_private_key(65537, 4096),
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
}
#: Such as the pod has none of.
ANNOTATIONS: Mapping[str, Mapping[str, str]] = {
    "one that the policy knows": {"corp.example/tier": "gold"},
    "a value that it does not": {"corp.example/tier": "iron"},
    "one that it does not know": {"corp.example/role": "admin"},
    "a path": {"spiffe/path-overriding": "/ns/bank/sa/till"},
    "a name": {"example.com/san": "kubernetes.default.svc"},
    "a pattern": {"corp.example/tier": "gold*\nx"},
    "many": {f"example.com/k{number}": "x" for number in range(500)},
}
SECONDS = (3600, 3601, 4200, 86399, 86401, 172800, 7862400)


def cases() -> Iterator[Case]:
    """All of them."""
    for who in (NODE, OTHER):
        for what, make in STUBS.items():
            yield Case(what=f"a CSR with {what}", who=who, make=lambda _, make=make: {"pem": make()})  # type: ignore[misc]
        for what, key in KEYS.items():
            yield Case(what=f"a key of {what}", who=who, make=lambda _, key=key: {"key": key()})  # type: ignore[misc]
        for what, pairs in ANNOTATIONS.items():
            yield Case(
                what=f"annotations: {what}",
                who=who,
                make=lambda _, a=pairs: {"unverifiedUserAnnotations": a},  # type: ignore[misc]
            )
        for seconds in SECONDS:
            yield Case(what=f"{seconds} s", who=who, make=lambda _, s=seconds: {"maxExpirationSeconds": s})  # type: ignore[misc]
        for phase in ("Succeeded", "Failed"):
            yield Case(
                what=f"a pod that is {phase}", who=who, make=lambda _: {}, twin=False,
                before=lambda pod, phase=phase: pod.set_phase(phase),  # type: ignore[misc]
            )  # fmt: skip
    yield from _invented()
    yield from _against_the_policy()


def _invented() -> Iterator[Case]:
    """Requests that NodeRestriction refuses a node, made by another user."""
    for what, spec in {
        "another service account": {"serviceAccountName": "admin"},
        "another's UID of it": {"serviceAccountUID": "7c9e6679-7425-40de-944b-e07fc1f90ae7"},
        "an account that is not there": {"serviceAccountName": "nobody"},
        "a pod that is not there": {"podName": "nobody"},
        "another pod's UID": {"podUID": "7c9e6679-7425-40de-944b-e07fc1f90ae7"},
        "no UID": {"podUID": "x"},
        "a UID that is a path": {"podUID": "../../secrets"},
        "another node": {"nodeName": "w2"},
        "a node that is not there": {"nodeName": "w99"},
        "another node's UID": {"nodeUID": "7c9e6679-7425-40de-944b-e07fc1f90ae7"},
    }.items():
        yield Case(what=what, who=OTHER, make=lambda _, spec=spec: spec)  # type: ignore[misc]
    yield Case(
        what="a pod of another namespace",
        who=OTHER,
        make=lambda _: {"podName": "elsewhere", "serviceAccountName": "till"},
    )
    yield Case(what="a pod that was deleted", who=OTHER, make=lambda _: {}, before=_delete, twin=False)
    yield Case(what="a pod whose grace period is over", who=OTHER, make=lambda _: {}, before=_end, twin=False)
    yield Case(what="a service account that was made again", who=OTHER, make=lambda _: {}, before=_remake, twin=False,
               pod={"account": "remade"})  # fmt: skip


def _against_the_policy() -> Iterator[Case]:
    """Honest nodes, whose pods may not have what they mount."""
    for namespace in ("kube-system", "default", "shops", "shop-x", "xbank"):
        yield Case(what=f"namespace {namespace}", who=NODE, make=lambda _: {}, pod={"namespace": namespace}, twin=False)
    for what, source in {
        "a key that the policy does not have": {"keyType": "ED25519"},
        "too short a life": {"maxExpirationSeconds": 3600},
        "an annotation that it does not know": {"userAnnotations": {"corp.example/role": "x"}},
        "a value that it does not": {"userAnnotations": {"corp.example/tier": "iron"}},
    }.items():
        yield Case(what=what, who=NODE, make=as_mounted, pod={"sources": [source]}, twin=False)


def as_mounted(pod: Pod) -> dict[str, Any]:
    """Keywords for the request that the kubelet makes for the pod's first source."""
    source = pod.document["spec"]["volumes"][0]["projected"]["sources"][0]["podCertificate"]
    return {
        "key": ed25519.Ed25519PrivateKey.generate() if source["keyType"] == "ED25519" else None,
        "maxExpirationSeconds": source.get("maxExpirationSeconds", 86400),
        "unverifiedUserAnnotations": source.get("userAnnotations"),
    }


def _delete(pod: Pod) -> None:
    assert pod.cluster.client().ask("DELETE", f"{pod.path}?gracePeriodSeconds=0").ok


def _end(pod: Pod) -> None:
    """A finalizer keeps it."""
    admin = pod.cluster.client()
    assert admin.patch(pod.path, {"metadata": {"finalizers": ["example.com/kept"]}}).ok
    assert admin.ask("DELETE", f"{pod.path}?gracePeriodSeconds=0").ok


def _remake(pod: Pod) -> None:
    account = f"/api/v1/namespaces/{pod.namespace}/serviceaccounts"
    admin = pod.cluster.client()
    assert admin.ask("DELETE", f"{account}/remade").ok
    admin.create(account, {"metadata": {"name": "remade"}})
