"""
Requests to the certificates API that no client may get signed, each with the gateway's right verdict.

Every row of the traps in the measurements of the API server (what it accepts and lets through), and what only our own
rules know. A case asks for a worker of its own, `wN`, whose honest request is its twin.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import AttributeOID, ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from bridge.gateway.rules import CLIENT, CLIENT_KUBELET, SERVING
from tests.kit.gateways import DOMAIN, address_of, csr_pem, new_key, node_subject

CN, ORG = NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME
#: Becomes the user's `uid` for an API server.
UID = ObjectIdentifier("1.3.6.1.4.1.57683.2")

#: denied: the object says so; open: left alone, since it may pass later.
Wanted = Literal["denied", "open"]


@dataclass(frozen=True, kw_only=True)
class Asking:
    """One request, with its requester."""

    signer: str
    user: str
    group: str
    pem: bytes = field(repr=False)
    usages: Sequence[str] | None = None
    wanted: Wanted = "denied"
    #: The API server may refuse it by itself; then it is no case.
    labels: bool = False  #: It has labels and annotations that claim things.


Make = Callable[[str], Asking]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A hostile request for a worker."""

    name: str
    make: Make
    worker: str


def as_node(worker: str, signer: str, pem: bytes, **more: Any) -> Asking:
    """Asked by a worker itself."""
    return Asking(signer=signer, user=f"system:node:{worker}", group="system:nodes", pem=pem, **more)


def as_token(signer: str, pem: bytes, **more: Any) -> Asking:
    """Asked with a bootstrap token."""
    group = "system:bootstrappers:kubeadm:default-node-token"
    return Asking(signer=signer, user="system:bootstrap:abcdef", group=group, pem=pem, **more)


def as_user(user: str, signer: str, pem: bytes, group: str = "people", **more: Any) -> Asking:
    """The request comes from another user."""
    return Asking(signer=signer, user=user, group=group, pem=pem, **more)


def honest_sans(worker: str) -> list[x509.GeneralName]:
    """As the inventory has them."""
    return [x509.DNSName(worker), x509.IPAddress(ipaddress.ip_address(address_of(worker)))]


def honest(worker: str, signer: str) -> Asking:
    """The twin: what the same worker may have."""
    sans = honest_sans(worker) if signer == SERVING else []
    return as_node(worker, signer, csr_pem(node_subject(worker), sans))


# --- subjects ---------------------------------------------------------------------------------------------------------


def _subjects(node: str) -> dict[str, x509.Name]:
    """A kubelet's subjects, each wrong in one way; the last CN is the node's own, since the API server looks at that."""
    own = f"system:node:{node}"

    def name(*attributes: Any) -> x509.Name:
        return x509.Name([x509.NameAttribute(*one) if isinstance(one, tuple) else one for one in attributes])

    def odd(kind: _ASN1Type, oid: ObjectIdentifier = CN, value: str = own) -> x509.Name:
        typed = x509.NameAttribute(oid, value, _type=kind)
        other = (ORG, "system:nodes") if oid == CN else (CN, own)
        return name(typed, other) if oid == ORG else name(other, typed)

    nodes = (ORG, "system:nodes")
    return {
        "two CNs, a control plane's first": name(nodes, (CN, "system:node:cp1"), (CN, own)),
        "two CNs, a user's first": name(nodes, (CN, "kubernetes-admin"), (CN, own)),
        "the same CN twice": name(nodes, (CN, own), (CN, own)),
        "a second O, system:masters": name(nodes, (ORG, "system:masters"), (CN, own)),
        "a second O, cluster-admins": name(nodes, (ORG, "kubeadm:cluster-admins"), (CN, own)),
        "O twice": name(nodes, nodes, (CN, own)),
        "another O": name((ORG, "system:masters"), (CN, own)),
        "no O": name((CN, own)),
        "O with a trailing space": name((ORG, "system:nodes "), (CN, own)),
        "O in capitals": name((ORG, "SYSTEM:NODES"), (CN, own)),
        "an OU": name(nodes, (NameOID.ORGANIZATIONAL_UNIT_NAME, "system:masters"), (CN, own)),
        "a serial number": name(nodes, (NameOID.SERIAL_NUMBER, "1"), (CN, own)),
        "a uid": name(nodes, (UID, "1"), (CN, own)),
        "a domain component": name(nodes, (NameOID.DOMAIN_COMPONENT, "example"), (CN, own)),
        "an e-mail address": name(nodes, (NameOID.EMAIL_ADDRESS, "a@example.com"), (CN, own)),
        "a country": name((NameOID.COUNTRY_NAME, "XX"), nodes, (CN, own)),
        "a multi-valued RDN": x509.Name([
            x509.RelativeDistinguishedName([x509.NameAttribute(ORG, "system:nodes"), x509.NameAttribute(CN, own)])
        ]),
        "a multi-valued RDN with system:masters": x509.Name([
            x509.RelativeDistinguishedName([x509.NameAttribute(ORG, "system:nodes"), x509.NameAttribute(ORG, "system:masters")]),
            x509.RelativeDistinguishedName([x509.NameAttribute(CN, own)]),
        ]),
        "CN as BMPString": odd(_ASN1Type.BMPString),
        "CN as IA5String": odd(_ASN1Type.IA5String),
        "CN as T61String": odd(_ASN1Type.T61String),
        "CN as UniversalString": odd(_ASN1Type.UniversalString),
        "CN as VisibleString": odd(_ASN1Type.VisibleString),
        "O as IA5String": odd(_ASN1Type.IA5String, ORG, "system:nodes"),
        "O as T61String": odd(_ASN1Type.T61String, ORG, "system:nodes"),
        "O as BMPString": odd(_ASN1Type.BMPString, ORG, "system:nodes"),
    }  # fmt: skip


# --- what is round the subject ----------------------------------------------------------------------------------------


def _pem(builder: x509.CertificateSigningRequestBuilder, key: Any = None) -> bytes:
    key = key or new_key()
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.PEM)


def _builder(worker: str, signer: str) -> x509.CertificateSigningRequestBuilder:
    name = x509.Name([x509.NameAttribute(*one) for one in node_subject(worker)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    if signer == SERVING:
        builder = builder.add_extension(x509.SubjectAlternativeName(honest_sans(worker)), critical=False)
    return builder


def _texts(worker: str, signer: str) -> dict[str, bytes]:
    """PEM texts with more than one block in them."""
    good = _pem(_builder(worker, signer))
    masters = csr_pem([(ORG, "system:masters"), (CN, "root")])
    head, _, rest = good.partition(b"\n")
    return {
        "a second PEM block": good + masters,
        "the same PEM block twice": good + good,
        "a certificate after the CSR": good + b"-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n",
        "text before the CSR": b"please sign\n" + good,
        "text after the CSR": good + b"thank you\n",
        "a PEM header": head + b"\nProc-Type: 4,ENCRYPTED\n\n" + rest,
        "a NUL after the CSR": good + b"\0",
    }


def _extensions(worker: str, signer: str) -> dict[str, bytes]:
    """Extensions and attributes that no kubelet asks for."""
    base = partial(_builder, worker, signer)
    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    return {
        "CA:TRUE": _pem(base().add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)),
        "CA:FALSE": _pem(base().add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)),
        "an EKU": _pem(base().add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)),
        "any EKU": _pem(
            base().add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]), critical=False)
        ),
        "key usage of a CA": _pem(base().add_extension(usage, critical=True)),
        "an unknown extension": _pem(
            base().add_extension(x509.UnrecognizedExtension(ObjectIdentifier("1.2.3.4"), b"\x05\x00"), critical=True)
        ),
        "a challenge password": _pem(base().add_attribute(AttributeOID.CHALLENGE_PASSWORD, b"secret")),
        "an unstructured name": _pem(base().add_attribute(AttributeOID.UNSTRUCTURED_NAME, b"root")),
    }


@cache
def _odd_keys() -> dict[str, Any]:
    """Keys that are weak, or not of the policy's kinds."""
    return {
        "RSA-1024": rsa.generate_private_key(public_exponent=65537, key_size=1024),
        "RSA-1536": rsa.generate_private_key(public_exponent=65537, key_size=1536),
        "RSA-2048 with exponent 3": rsa.generate_private_key(public_exponent=3, key_size=2048),
        "Ed25519": ed25519.Ed25519PrivateKey.generate(),
        "P-224": ec.generate_private_key(ec.SECP224R1()),
        "P-521": ec.generate_private_key(ec.SECP521R1()),
    }


_USAGES: dict[str, dict[str, tuple[str, ...]]] = {
    CLIENT_KUBELET: {
        "also server auth": ("digital signature", "client auth", "server auth"),
        "no digital signature": ("client auth",),
        "only server auth": ("digital signature", "server auth"),
        "cert sign": ("digital signature", "client auth", "cert sign"),
        "any": ("digital signature", "client auth", "any"),
        "code signing": ("digital signature", "client auth", "code signing"),
        "no client auth": ("digital signature", "key encipherment"),
    },
    SERVING: {
        "also client auth": ("digital signature", "server auth", "client auth"),
        "only client auth": ("digital signature", "client auth"),
        "no digital signature": ("server auth",),
        "crl sign": ("digital signature", "server auth", "crl sign"),
        "any": ("digital signature", "server auth", "any"),
    },
}


def addresses(*texts: str) -> list[x509.GeneralName]:
    return [x509.IPAddress(ipaddress.ip_address(text)) for text in texts]


def _sans(worker: str) -> dict[str, tuple[list[x509.GeneralName], Wanted]]:
    """SANs beside, or in the place of, a worker's own."""
    own, other = honest_sans(worker), f"w{int(worker[1:]) + 1}"
    never = [
        *("kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"),
        *("kubernetes.", "KUBERNETES", "api.example.com", "API.example.com", "cp1", "cp2", "cp2.example.com"),
        *("localhost", "node.localhost", "*.cluster.local", "*.example.com", "*", "x.svc", "a b.example.com"),
        *("web.default.svc.cluster.local", "cluster.local", "-x.example.com", "x..example.com"),
    ]
    numbers = [
        *("10.96.0.1", "10.96.0.10", "203.0.113.5", "203.0.113.11", "203.0.113.12", "2001:db8::12", "127.0.0.1"),
        *("127.8.9.1", "::1", str(ipaddress.IPv4Address(0)), "::", "::ffff:10.96.0.1", "::ffff:127.0.0.1", "224.0.0.1"),
    ]
    found: dict[str, tuple[list[x509.GeneralName], Wanted]] = {}
    found |= {f"the name {text}": ([*own, x509.DNSName(text)], "denied") for text in never}
    found |= {f"the address {text}": ([*own, *addresses(text)], "denied") for text in numbers}
    found |= {
        "no SAN": ([], "denied"),
        "an e-mail SAN": ([*own, x509.RFC822Name("root@example.com")], "denied"),
        "a URI SAN": ([*own, x509.UniformResourceIdentifier("spiffe://cluster/admin")], "denied"),
        "the same SAN twice": ([*own, own[0]], "denied"),
        "65 SANs": ([x509.DNSName(f"{worker}-{n}.example.com") for n in range(65)], "denied"),
        "3,000 SANs": ([x509.DNSName(f"{worker}-{n}.example.com") for n in range(3000)], "open"),
        "another worker's name": ([*own, x509.DNSName(other)], "open"),
        "another worker's address": ([*own, *addresses(address_of(other))], "open"),
        "only another worker's names": (honest_sans(other), "open"),
        "a name on no list": ([*own, x509.DNSName("auth.company.example")], "open"),
        "a name that begins with the node's": ([*own, x509.DNSName(f"{worker}.attacker.example")], "open"),
    }
    return found


# --- who asks ---------------------------------------------------------------------------------------------------------


def _requesters(worker: str) -> dict[str, Asking]:
    """Requesters that ask for another's certificate."""
    client, serving = csr_pem(node_subject(worker)), csr_pem(node_subject(worker), honest_sans(worker))
    gone = csr_pem(node_subject("w9999"))
    return {
        "an administrator asks for a node": as_user("kubernetes-admin", CLIENT_KUBELET, client),
        "a service account asks for a node": as_user("system:serviceaccount:a:b", CLIENT_KUBELET, client),
        "a service account asks for serving": as_user("system:serviceaccount:a:b", SERVING, serving),
        "a node's name without its group": as_user(f"system:node:{worker}", CLIENT_KUBELET, client),
        "a token asks for serving": as_token(SERVING, serving),
        "a token of another group": as_user(
            "system:bootstrap:zzzzzz", CLIENT_KUBELET, client, "system:bootstrappers:others"
        ),
        "a user in the tokens' group, without a token": as_user(
            "mallory", CLIENT_KUBELET, client, "system:bootstrappers:kubeadm:default-node-token"
        ),
        "a token asks for cp1": as_token(CLIENT_KUBELET, csr_pem(node_subject("cp1"))),
        "a token asks for cp2, which has no Node object": as_token(CLIENT_KUBELET, csr_pem(node_subject("cp2"))),
        "a token asks for a node without a name": as_token(
            CLIENT_KUBELET, csr_pem([(ORG, "system:nodes"), (CN, "system:node:")])
        ),
        "a token asks for an odd name": as_token(
            CLIENT_KUBELET, csr_pem([(ORG, "system:nodes"), (CN, "system:node:UPPER_x y")])
        ),
        "a token asks for a path": as_token(
            CLIENT_KUBELET, csr_pem([(ORG, "system:nodes"), (CN, "system:node:../../pods")])
        ),
        "a token asks for a user": as_token(CLIENT_KUBELET, csr_pem([(ORG, "system:nodes"), (CN, "kubernetes-admin")])),
        "a token asks for a node that exists": as_token(CLIENT_KUBELET, client, wanted="open"),
        "a token asks for an unknown node": as_token(CLIENT_KUBELET, gone, wanted="open"),
        "labels that claim it was approved": as_user("mallory", CLIENT_KUBELET, client, labels=True),
    }


def _users(worker: str) -> dict[str, Asking]:
    """Through the signer of users' certificates, and the control plane's."""

    def subject(*pairs: tuple[ObjectIdentifier, str]) -> bytes:
        return csr_pem(pairs)

    good = subject((ORG, "developers"), (CN, "alice"))
    api = f"{DOMAIN}/apiserver"
    own = [x509.DNSName("cp1"), x509.DNSName("kubernetes"), *addresses("203.0.113.11")]
    apiserver = csr_pem([(CN, "kube-apiserver")], own)
    manager = csr_pem([(CN, "system:kube-controller-manager")])
    node = partial(as_node, worker)
    control_plane = partial(as_node, "cp1")
    return {
        "a node asks for cluster-admins": node(CLIENT, subject((ORG, "kubeadm:cluster-admins"), (CN, "kubernetes-admin"))),
        "a node asks for the controller manager": node(CLIENT, subject((CN, "system:kube-controller-manager"))),
        "a node asks for another node": node(CLIENT, csr_pem(node_subject("cp1"))),
        "a node asks for itself as a user": node(CLIENT, csr_pem(node_subject(worker))),
        "a node asks for a developer": node(CLIENT, subject((ORG, "developers"), (CN, f"system:node:{worker}"))),
        "alice asks for bob": as_user("alice", CLIENT, subject((ORG, "developers"), (CN, "bob"))),
        "alice asks for another group": as_user("alice", CLIENT, subject((ORG, "admins"), (CN, "alice"))),
        "alice asks for one group more": as_user(
            "alice", CLIENT, subject((ORG, "developers"), (ORG, "kubeadm:cluster-admins"), (CN, "alice"))
        ),
        "alice asks for no group": as_user("alice", CLIENT, subject((CN, "alice"))),
        "alice with two CNs": as_user("alice", CLIENT, subject((ORG, "developers"), (CN, "alice"), (CN, "root"))),
        "alice with an OU": as_user(
            "alice", CLIENT, subject((ORG, "developers"), (NameOID.ORGANIZATIONAL_UNIT_NAME, "x"), (CN, "alice"))
        ),
        "alice with a SAN": as_user(
            "alice", CLIENT, csr_pem([(ORG, "developers"), (CN, "alice")], [x509.DNSName("alice.example.com")])
        ),
        "alice as a kubelet": as_user("alice", CLIENT, csr_pem(node_subject(worker))),
        "mallory, an unknown user": as_user("mallory", CLIENT, subject((ORG, "developers"), (CN, "mallory"))),
        "a username that would add a group": as_user(
            "alice,O=system:masters", CLIENT, subject((ORG, "developers"), (ORG, "root"), (CN, "alice")), "corp:issuers"
        ),
        "an issuer whose username begins with system:": as_user(
            "system:admin", CLIENT, subject((ORG, "developers"), (CN, "system:admin")), "corp:issuers"
        ),
        "alice with server auth": as_user("alice", CLIENT, good, usages=("client auth", "server auth")),
        "alice without client auth": as_user("alice", CLIENT, good, usages=("digital signature",)),
        "a worker asks for an API server": node(api, apiserver),
        "alice asks for an API server": as_user("alice", api, apiserver),
        "a control plane asks for another's address": control_plane(
            api, csr_pem([(CN, "kube-apiserver")], [*own, *addresses("203.0.113.12")])
        ),
        "a control plane asks for a foreign name": control_plane(
            api, csr_pem([(CN, "kube-apiserver")], [*own, x509.DNSName("evil.example.org")])
        ),
        "a control plane asks for a wildcard": control_plane(
            api, csr_pem([(CN, "kube-apiserver")], [*own, x509.DNSName("*.example.com")])
        ),
        "an API server with a group": control_plane(
            api, csr_pem([(ORG, "system:masters"), (CN, "kube-apiserver")], own)
        ),
        "an API server under another name": control_plane(api, csr_pem([(CN, "kubernetes-admin")], own)),
        "an API server as a client": control_plane(api, apiserver, usages=("digital signature", "client auth")),
        "a worker asks for the controller manager's certificate": node(
            f"{DOMAIN}/controller-manager.conf", manager, usages=("digital signature", "client auth")
        ),
        "the controller manager in system:masters": control_plane(
            f"{DOMAIN}/controller-manager.conf",
            csr_pem([(ORG, "system:masters"), (CN, "system:kube-controller-manager")]),
            usages=("digital signature", "client auth"),
        ),
        "alice asks for super-admin": as_user(
            "alice", f"{DOMAIN}/super-admin.conf",
            csr_pem([(ORG, "system:masters"), (CN, "kubernetes-super-admin")]), usages=("digital signature", "client auth"),
        ),
        "a signer without a table in the policy": as_user(
            "kubernetes-super-admin", f"{DOMAIN}/admin.conf", csr_pem([(CN, "kubernetes-admin")]), "system:masters",
            usages=("client auth",), wanted="open",
        ),
        "a kubernetes.io signer that does not exist": as_user(
            "alice", "kubernetes.io/whatever", good, usages=("client auth",), wanted="open"
        ),
        "a signer of another domain": as_user(
            "alice", "ca-bridge.internal.example.com/apiserver", apiserver, wanted="open"
        ),
    }  # fmt: skip


def _of_a_kubelet(signer: str) -> Iterator[tuple[str, Make]]:
    """What is wrong in the same way with both of a kubelet's requests."""
    sans = honest_sans if signer == SERVING else lambda _: []

    def with_pem(make: Callable[[str], bytes]) -> Make:
        return lambda worker: as_node(worker, signer, make(worker))

    for name in _subjects("w0"):
        yield name, with_pem(lambda worker, name=name: csr_pem(_subjects(worker)[name], sans(worker)))  # type: ignore[misc]
    for name in _texts("w0", signer):
        yield name, with_pem(lambda worker, name=name: _texts(worker, signer)[name])  # type: ignore[misc]
    for name in _extensions("w0", signer):
        yield name, with_pem(lambda worker, name=name: _extensions(worker, signer)[name])  # type: ignore[misc]
    for name, key in _odd_keys().items():
        yield name, with_pem(lambda worker, key=key: _pem(_builder(worker, signer), key))  # type: ignore[misc]
    for name, usages in _USAGES[signer].items():
        yield (
            f"usages: {name}",
            lambda worker, usages=usages: as_node(worker, signer, honest(worker, signer).pem, usages=usages),  # type: ignore[misc]
        )


def _all() -> Iterator[tuple[str, Make]]:
    for signer, kind in ((CLIENT_KUBELET, "client"), (SERVING, "serving")):
        for name, make in _of_a_kubelet(signer):
            yield f"{kind}: {name}", make
    yield (
        "client: a SAN",
        lambda worker: as_node(worker, CLIENT_KUBELET, csr_pem(node_subject(worker), honest_sans(worker))),
    )
    for name, (_, wanted) in _sans("w1").items():
        yield (
            f"SAN: {name}",
            lambda worker, name=name, wanted=wanted: as_node(  # type: ignore[misc]
                worker, SERVING, csr_pem(node_subject(worker), _sans(worker)[name][0]), wanted=wanted
            ),
        )
    for table in (_requesters, _users):
        for name in table("w0"):
            yield name, lambda worker, name=name, table=table: table(worker)[name]  # type: ignore[misc]


def cases(first: int = 1) -> list[Case]:
    """All of them, each for a worker of its own, from `w{first}` on."""
    return [Case(name=name, make=make, worker=f"w{first + number}") for number, (name, make) in enumerate(_all())]
