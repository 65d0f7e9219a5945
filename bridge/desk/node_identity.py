"""
Which node a bundle is from: by the certificates that prove it, by the records of what was signed before, or not at all.

The name that a bundle gives itself is a claim. A kubelet's or etcd's certificate has the node's name; a certificate
without one, such as admin.conf, belongs to the node for which its key was signed here. Pure: no I/O.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes

from bridge.desk.est_rules import NODE, node_of
from bridge.desk.policy import Policy, PolicyVerdict
from bridge.pki.bundle import RequestBundle
from bridge.pki.certificates import CN_OID, UNREADABLE, attributes, spki
from bridge.pki.kubeadm_names import is_node_name
from bridge.specs import SPECS, USER
from bridge.words import some

_MOST_NODES = 5  #: In a text for people.
_HINT = "a kubelet's or etcd's certificate in the same bundle, an enrolment, or a person at the desk proves it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """The node for which a key was signed here."""

    node: str
    cluster: str
    is_proven: bool  #: Something proved the node's name then.


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What is known of the node that a bundle names."""

    is_proven: bool = False  #: Something proves the name that the bundle gives itself.
    blocked: str = ""  #: The problem that a key of the bundle belongs to a blocked node.
    problem: str = ""  #: Why the bundle is not this node's, or why nothing proves it though something has to.

    def problems(self, verdict: PolicyVerdict, *, is_vouched: bool) -> Iterator[str]:
        """Problems of one request; a person, TLS or an enrolment vouches for some requests by name."""
        if self.blocked:
            yield self.blocked
        if is_vouched:
            return
        if self.problem:
            yield self.problem
        elif verdict.claimed_sans and not self.is_proven:
            names = some(verdict.claimed_sans, _MOST_NODES)
            yield f"SAN: wanted those of the replaced certificate, since nothing proves the node, found {names}; {_HINT}"


def key_digest(key: CertificatePublicKeyTypes) -> str:
    """The SHA-256 (hex) of a public key's SubjectPublicKeyInfo in DER."""
    return sha256(spki(key)).hexdigest()


def keys_in(bundle: RequestBundle) -> set[str]:
    """The digests of all nodes' keys in a bundle: those of its CSRs, and those of the replaced certificates."""
    keys = set[str]()
    for request in bundle.requests:
        for signed in (request.csr, request.replaces):
            if signed is not None and request.name != USER.name:
                try:
                    keys.add(key_digest(signed.public_key()))
                except UNREADABLE:  # which the policy refuses
                    continue
    return keys


def node_in(name: str, certificate: x509.Certificate, policy: Policy) -> str:
    """The node that a certificate of this name has in its subject, by the policy's subjects or kubeadm's; else empty."""
    if (subjects := policy.rules(name).subjects) is not None:
        return node_of(certificate.subject, subjects)
    before, has_node, after = (SPECS[name].common_names[0] if name in SPECS else "").partition(NODE)
    for value in [value for oid, value in attributes(certificate.subject) if oid == CN_OID and has_node]:
        node = value.removeprefix(before).removesuffix(after)
        if is_node_name(node) and value == f"{before}{node}{after}":
            return node
    return ""


def identify(
    bundle: RequestBundle,
    verdicts: Mapping[str, PolicyVerdict],
    owners: Mapping[str, Collection[Owner]],
    policy: Policy,
    *,
    is_named: bool,
) -> Identity:
    """
    Identify a bundle's node; `owners` has the records of its keys, by their digests, and `is_named` says that a person,
    TLS or an enrolment gave the bundle its node's name. A proven name outweighs records of names that were claimed.
    """
    own = (bundle.node, bundle.cluster)
    proven, claimed = set[tuple[str, str]](), set[tuple[str, str]]()
    proving = {request.name: request.replaces for request in bundle.requests
               if request.replaces is not None and (verdict := verdicts.get(request.name)) and verdict.proven}  # fmt: skip
    proving_keys = {key_digest(certificate.public_key()) for certificate in proving.values()}
    for key, recorded in owners.items():
        for owner in recorded:
            is_proof = owner.is_proven and key in proving_keys
            (proven if is_proof else claimed).add((owner.node, owner.cluster))
    named = {node_in(name, certificate, policy) for name, certificate in proving.items()} - {""}
    proven |= {(node, bundle.cluster) for node in named}
    places = proven if own in proven else proven | claimed
    if blocked := [place for place in sorted(places) if policy.blocks(place[0])]:
        wanted = f"no key of a node that the inventory ({policy.desk.inventory}) blocks"
        return Identity(blocked=f"node: wanted {wanted}, found one of {_texts(blocked)}")
    others = sorted((proven if is_named else places) - {own})
    is_proven = not others and (is_named or own in proven)
    problem = ""
    if others:
        problem = f"node: wanted certificates of {_texts([own])} alone, found some of {_texts(others)}"
    elif not is_proven and policy.blocks_some and policy.allow.proof == "required":
        problem = (
            f"node: wanted a proof that this is {bundle.node}, since the inventory blocks nodes, found none; {_HINT}"
        )
    return Identity(is_proven=is_proven, problem=problem)


def _texts(places: Collection[tuple[str, str]]) -> str:
    return some((f"{node} (cluster {cluster})" for node, cluster in places), _MOST_NODES)
