"""The tables `[signer."NAME"]` of the gateway's policy: who may ask for what by the certificates API (pure)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal, TypeVar

from bridge.contract import GIVEN
from bridge.desk.patterns import CN_OID, O_OID, subject_of
from bridge.errors import SettingsProblem
from bridge.settings.reader import Reader
from bridge.specs import EKU, KEY_ALGORITHMS, KUBELET_CLIENT, KUBELET_SERVING, MASTERS, SPECS, USER, CertificateSpec

T = TypeVar("T")

CLIENT_KUBELET = "kubernetes.io/kube-apiserver-client-kubelet"
SERVING = "kubernetes.io/kubelet-serving"
CLIENT = "kubernetes.io/kube-apiserver-client"
#: Kubernetes' own signers; the gateway signs for no other one of them (kubernetes.io/legacy-unknown).
KUBERNETES_SIGNERS: Mapping[str, CertificateSpec] = {
    CLIENT_KUBELET: KUBELET_CLIENT,
    SERVING: KUBELET_SERVING,
    CLIENT: USER,
}
_KUBERNETES = "kubernetes.io"
#: As the API server takes it (RFC 1123); it goes into manifests and expressions as it is.
_DOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_SIGNERS_NAME = re.compile(r"[a-zA-Z0-9]([-a-zA-Z0-9._]*[a-zA-Z0-9])?")
#: Names that the API server takes for Kubernetes' own, and that no grant may give.
SYSTEM = "system:"
NODE_USER = "system:node:"
NODES_GROUP = "system:nodes"
BOOTSTRAP_USER = "system:bootstrap:"

_SIGNATURE = "digital signature"
_USAGES = {EKU.SERVER_AUTH: "server auth", EKU.CLIENT_AUTH: "client auth"}


def spec_of(signer: str) -> CertificateSpec | None:
    """The spec for a Kubernetes signer, or for `DOMAIN/NAME` with kubeadm's name; None: no policy may name it."""
    if signer in KUBERNETES_SIGNERS:
        return KUBERNETES_SIGNERS[signer]
    return SPECS.get(signer.partition("/")[2]) if is_own_signer(signer) else None


def is_own_signer(signer: str) -> bool:
    """Whether it is `DOMAIN/NAME` of a domain that is not Kubernetes' own."""
    domain, _, name = signer.partition("/")
    is_ours = _DOMAIN.fullmatch(domain) and domain != _KUBERNETES and not domain.endswith(f".{_KUBERNETES}")
    return bool(is_ours and _SIGNERS_NAME.fullmatch(name))


def is_no_false_node(username: str, groups: frozenset[str]) -> bool:
    """Whether a user that is called like a node is one."""
    return not username.startswith(NODE_USER) or NODES_GROUP in groups


def usages_fit(spec: CertificateSpec, usages: frozenset[str]) -> bool:
    """Whether `spec.usages` is what such a certificate has: its EKUs and signatures, and encipherment for RSA keys."""
    needed = {_USAGES[eku] for eku in spec.ekus}
    if spec in (KUBELET_CLIENT, KUBELET_SERVING):
        needed.add(_SIGNATURE)
    return needed <= usages <= needed | {_SIGNATURE, "key encipherment"}


@dataclass(frozen=True, kw_only=True)
class Grant:
    """Table `[signer."NAME".grant.X]`: who may ask, and for which subjects of users."""

    users: tuple[str, ...] = ()  #: Usernames; `{node}` (in a control-plane signer's) is a control-plane node.
    groups: tuple[str, ...] = ()  #: The requester has to be in one of these.
    subjects: tuple[str, ...] = ()  #: Whole subjects; `{user}` is the requester.

    def problems(self) -> Iterator[SettingsProblem]:
        """Grants without a requester, and subjects that no user may have."""
        if not self.users and not self.groups:
            yield SettingsProblem("users", "users or groups that may ask", "neither")
        for text in self.subjects:
            subject = subject_of(text, "x")
            if not subject or sum(oid == CN_OID for oid, _ in subject) != 1:
                yield SettingsProblem("subjects", "subjects with one CN such as O=developers,CN={user}", repr(text))
            elif any(oid in (CN_OID, O_OID) and value.startswith(SYSTEM) for oid, value in subject):
                wanted = f"no user or group of Kubernetes' own ({SYSTEM}…)"
                yield SettingsProblem("subjects", wanted, repr(text))

    def is_for(self, username: str, groups: frozenset[str]) -> bool:
        """
        Whether the grant lets a user ask, `{node}` apart; a node's user name counts only with the nodes' group, as in
        the API server's authorizer, since an identity provider may have a user of that name.
        """
        by_name = username in self.users and is_no_false_node(username, groups)
        return by_name or not groups.isdisjoint(self.groups)


@dataclass(frozen=True, kw_only=True)
class SignerRules:
    """Table `[signer."NAME"]`."""

    keys: tuple[str, ...] | None = None
    max_validity: timedelta | None = None
    #: required: a person has to approve as well; gateway: the gateway approves each request that the policy allows.
    approval: Literal["gateway", "required"] = "gateway"
    #: For kube-apiserver-client-kubelet: members of these groups may ask for a node that does not exist yet.
    bootstrap_groups: tuple[str, ...] = ()
    grants: tuple[tuple[str, Grant], ...] = field(default=(), metadata={GIVEN: True})

    def problems(self) -> Iterator[SettingsProblem]:
        """Unknown keys, and groups that are too wide."""
        for key in self.keys or ():
            if key not in KEY_ALGORITHMS:
                yield SettingsProblem("keys", f"some of {', '.join(KEY_ALGORITHMS)}", repr(key))
        for group in self.bootstrap_groups:
            if group in {"system:authenticated", "system:unauthenticated", NODES_GROUP, MASTERS}:
                yield SettingsProblem("bootstrap_groups", "groups of bootstrap tokens", repr(group))


def read_signers(reader: Reader, tables: Mapping[str, Any]) -> dict[str, SignerRules]:
    """The rules by signer; the reader has the problems."""
    found = {}
    for name, table in tables.items():
        key, spec = ("signer", name), spec_of(name)
        if spec is None:
            wanted = f"one of {', '.join(KUBERNETES_SIGNERS)}, or DOMAIN/NAME with kubeadm's name of a certificate"
            reader.add(key, wanted, repr(name))
        elif not isinstance(table, dict):
            reader.add(key, "a table", repr(table))
        else:
            rules = reader.read(SignerRules, {k: v for k, v in table.items() if k != "grant"}, key)
            grants = _grants(reader, table.get("grant", {}), (*key, "grant"), spec)
            if rules is not None:
                found[name] = replace(rules, grants=tuple(grants.items()))
            if name != CLIENT_KUBELET and table.get("bootstrap_groups"):
                reader.add((*key, "bootstrap_groups"), f"it at {CLIENT_KUBELET} alone", "some")
    return found


def read_each(reader: Reader, schema: type[T], tables: Any, key: tuple[str, ...]) -> dict[str, T]:
    """Each of the tables below a key that can be read; the reader has the problems of the others."""
    if not isinstance(tables, dict):
        reader.add(key, "tables", repr(tables))
        return {}
    found = {name: reader.table(schema, table, (*key, name)) for name, table in tables.items()}
    return {name: one for name, one in found.items() if one is not None}


def _grants(reader: Reader, tables: Any, key: tuple[str, ...], spec: CertificateSpec) -> dict[str, Grant]:
    if isinstance(tables, dict) and tables and spec in (KUBELET_CLIENT, KUBELET_SERVING):
        reader.add(key, "no grants: a kubelet asks for itself", "some")
        return {}
    found = read_each(reader, Grant, tables, key)
    for name, grant in found.items():
        if (spec is USER) != bool(grant.subjects):
            wanted = "whole subjects" if spec is USER else f"none: they are in [certificate.{spec.name!r}]"
            reader.add((*key, name, "subjects"), wanted, ", ".join(grant.subjects) or "none")
    return found
