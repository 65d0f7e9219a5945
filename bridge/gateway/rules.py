"""The tables `[signer."NAME"]` and `[pod_signer."NAME"]` of the gateway's policy: who may ask for what (pure)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from string import Formatter
from typing import Any, Literal, TypeVar

from bridge.contract import GIVEN, NamePatterns, Names
from bridge.errors import SettingsProblem
from bridge.pki.certificates import CN_OID, O_OID, subject_pattern
from bridge.pki.expiry import duration_text
from bridge.pki.kubeadm_names import is_host_name
from bridge.settings import Reader
from bridge.specs import (
    EKU,
    KEY_ALGORITHMS,
    KUBELET_CLIENT,
    KUBELET_SERVING,
    MASTERS,
    POD_SPECS,
    SPECS,
    USER,
    CertificateSpec,
)

T = TypeVar("T")

CLIENT_KUBELET = "kubernetes.io/kube-apiserver-client-kubelet"
SERVING = "kubernetes.io/kubelet-serving"
CLIENT = "kubernetes.io/kube-apiserver-client"
#: Kubernetes' own signers that the gateway signs for: all but kubernetes.io/legacy-unknown.
KUBERNETES_SIGNERS: Mapping[str, CertificateSpec] = {
    CLIENT_KUBELET: KUBELET_CLIENT,
    SERVING: KUBELET_SERVING,
    CLIENT: USER,
}
_KUBERNETES = "kubernetes.io"
#: A domain as the API server accepts it (RFC 1123); it goes into manifests and expressions unescaped.
_DOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_SIGNERS_NAME = re.compile(r"[a-zA-Z0-9]([-a-zA-Z0-9._]*[a-zA-Z0-9])?")
#: The prefix of Kubernetes' own users and groups, which no grant may give.
SYSTEM = "system:"
NODE_USER = "system:node:"
NODES_GROUP = "system:nodes"
BOOTSTRAP_USER = "system:bootstrap:"

_SIGNATURE = "digital signature"
_USAGES = {EKU.SERVER_AUTH: "server auth", EKU.CLIENT_AUTH: "client auth"}


def spec_of(signer: str) -> CertificateSpec | None:
    """Return the spec of a Kubernetes signer, or of `DOMAIN/NAME` with kubeadm's NAME; None: no policy may name it."""
    if signer in KUBERNETES_SIGNERS:
        return KUBERNETES_SIGNERS[signer]
    return SPECS.get(signer.partition("/")[2]) if is_own_signer(signer) else None


def is_own_signer(signer: str) -> bool:
    """Whether the signer is `DOMAIN/NAME` with a domain that is not Kubernetes' own."""
    domain, _, name = signer.partition("/")
    is_ours = _DOMAIN.fullmatch(domain) and domain != _KUBERNETES and not domain.endswith(f".{_KUBERNETES}")
    return bool(is_ours and _SIGNERS_NAME.fullmatch(name))


def usages_fit(spec: CertificateSpec, usages: frozenset[str]) -> bool:
    """Whether the request's `usages` fit: the spec's EKUs, digital signature, and key encipherment for RSA keys."""
    needed = {_USAGES[eku] for eku in spec.ekus}
    if spec in (KUBELET_CLIENT, KUBELET_SERVING):
        needed.add(_SIGNATURE)
    return needed <= usages <= needed | {_SIGNATURE, "key encipherment"}


@dataclass(frozen=True, kw_only=True)
class Grant:
    """Table `[signer."NAME".grant.X]`: the users and groups that may ask, and for which subjects."""

    users: tuple[str, ...] = ()  #: Usernames; for kubeadm's certificates, `{node}` is any control-plane node.
    groups: tuple[str, ...] = ()  #: Groups; their members may ask.
    subjects: tuple[str, ...] = ()  #: Whole subjects of users; `{user}` is the requester's name.

    def problems(self) -> Iterator[SettingsProblem]:
        """Yield a problem for a grant without a requester, and for each subject that no user may have."""
        if not self.users and not self.groups:
            yield SettingsProblem("users", "users or groups that may ask", "neither")
        for text in self.subjects:
            subject = subject_pattern(text, "x")
            if not subject or sum(oid == CN_OID for oid, _ in subject) != 1:
                yield SettingsProblem("subjects", "subjects with one CN such as O=developers,CN={user}", repr(text))
            elif any(oid in (CN_OID, O_OID) and value.startswith(SYSTEM) for oid, value in subject):
                wanted = f"no user or group of Kubernetes' own ({SYSTEM}…)"
                yield SettingsProblem("subjects", wanted, repr(text))

    def is_for(self, username: str, groups: frozenset[str], node: str = "") -> bool:
        """
        Whether the grant lets a user ask, with `{node}` as this node. A node's username counts only in the node group,
        as in the API server's authorizer, since an identity provider may have a user of that name.
        """
        users = {*self.users, *(user.replace("{node}", node) for user in self.users if node)}
        is_false_node = username.startswith(NODE_USER) and NODES_GROUP not in groups
        return (username in users and not is_false_node) or not groups.isdisjoint(self.groups)


@dataclass(frozen=True, kw_only=True)
class SignerRules:
    """Table `[signer."NAME"]`."""

    keys: tuple[str, ...] | None = None
    max_validity: timedelta | None = None
    #: required: a person also has to approve; gateway: the gateway approves each request that the policy allows.
    approval: Literal["gateway", "required"] = "gateway"
    #: For kube-apiserver-client-kubelet: members of these groups may ask for a node that does not exist yet.
    bootstrap_groups: tuple[str, ...] = ()
    grants: tuple[tuple[str, Grant], ...] = field(default=(), metadata={GIVEN: True})

    def problems(self) -> Iterator[SettingsProblem]:
        """Yield a problem for each unknown key algorithm, and for each group that is too wide."""
        for key in self.keys or ():
            if key not in KEY_ALGORITHMS:
                yield SettingsProblem("keys", f"some of {', '.join(KEY_ALGORITHMS)}", repr(key))
        for group in self.bootstrap_groups:
            if group in {"system:authenticated", "system:unauthenticated", NODES_GROUP, MASTERS}:
                yield SettingsProblem("bootstrap_groups", "groups of bootstrap tokens", repr(group))


def read_signers(reader: Reader, tables: Mapping[str, Any]) -> dict[str, SignerRules]:
    """Return the rules by signer; the reader collects the problems."""
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
    """Return the valid tables below a key; the reader collects the problems of the others."""
    if not isinstance(tables, dict):
        reader.add(key, "tables", repr(tables))
        return {}
    found = {name: reader.table(schema, table, (*key, name)) for name, table in tables.items()}
    return {name: table for name, table in found.items() if table is not None}


def _grants(reader: Reader, tables: Any, key: tuple[str, ...], spec: CertificateSpec) -> dict[str, Grant]:
    if isinstance(tables, dict) and tables and spec in (KUBELET_CLIENT, KUBELET_SERVING):
        reader.add(key, "no grants: a kubelet asks for itself", "some")
        return {}
    grants = read_each(reader, Grant, tables, key)
    for name, grant in grants.items():
        if (spec is USER) != bool(grant.subjects):
            wanted = "whole subjects" if spec is USER else f"none: they are in [certificate.{spec.name!r}]"
            reader.add((*key, name, "subjects"), wanted, ", ".join(grant.subjects) or "none")
    return grants


# --- pods -------------------------------------------------------------------------------------------------------------

#: The kubelet's names of key types (`podCertificate.keyType`), by ours.
KEY_TYPES: Mapping[str, str] = {
    "ecdsa-p256": "ECDSAP256",
    "ecdsa-p384": "ECDSAP384",
    "ecdsa-p521": "ECDSAP521",
    "rsa-3072": "RSA3072",
    "rsa-4096": "RSA4096",
    "ed25519": "ED25519",
}
#: The API server's limits for a certificate's lifetime, and for the distance of notBefore from now (measured on 1.37:
#: 4:55 passes, 5:00 does not). The kubelet asks again at `beginRefreshAt`, at least this far from both ends.
SHORTEST = timedelta(hours=1)
LONGEST = timedelta(days=91)
_FROM_NOW = timedelta(minutes=4, seconds=50)
_REFRESH_FROM_BEGIN = timedelta(minutes=10)
#: The kubelet adds up to 5 random minutes, checks every 1 to 2 minutes, and writes the file within 1.5 minutes.
_REFRESH_FROM_END = timedelta(minutes=20)
_LONGEST_ID = 2048  # https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE-ID.md#23-maximum-spiffe-id-length
_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]{1,255}")
_SEGMENT = re.compile(r"[A-Za-z0-9._-]+")
_COMMON_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
IN_PATH, _IN_NAME = ("namespace", "service_account", "pod", "pod_uid"), ("namespace", "service_account", "pod")


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Table `[pod_signer."NAME".identity.X]`: names that some service accounts get in addition to the SPIFFE ID."""

    namespaces: tuple[str, ...]  #: Namespaces that get the names, with `*` and `?` as in a shell.
    service_accounts: tuple[str, ...]
    dns: tuple[str, ...] = ()  #: DNS names; `{namespace}`, `{service_account}` and `{pod}` stand for the pod's.
    common_name: str = ""

    def problems(self) -> Iterator[SettingsProblem]:
        """Yield a problem for each name that no pod may have, and for each template with unknown placeholders."""
        for key in ("namespaces", "service_accounts"):
            if not getattr(self, key):
                yield SettingsProblem(key, "at least one", "none")
        for text in self.dns:
            name = _filled(text)
            if name is None or not is_host_name(name) or is_never_a_pods(name) or _runs_together(text):
                yield SettingsProblem("dns", f"DNS names in small letters, of no API server, {_APART}", repr(text))
        if self.common_name:
            name = _filled(self.common_name)
            if name is None or not _is_common_name(name) or _runs_together(self.common_name):
                yield SettingsProblem(
                    "common_name", f"letters, digits, hyphens and dots, {_APART}", repr(self.common_name)
                )
        if not self.dns and not self.common_name:
            yield SettingsProblem("dns", "dns or common_name, or the table gives nothing", "neither")


#: The rule for a template's placeholders, in words for messages; see `_runs_together`.
_APART = "with {namespace}, and {service_account} or {pod}, in them, with a dot between the two"


def _filled(template: str) -> str | None:
    """Fill each placeholder of a template with one letter; None: it has unknown placeholders."""
    try:
        found = [(name, form, change) for _, name, form, change in Formatter().parse(template) if name is not None]
    except ValueError:
        return None
    if any(name not in _IN_NAME or form or change for name, form, change in found):
        return None
    return template.format(**dict.fromkeys(_IN_NAME, "x"))


def _runs_together(template: str) -> bool:
    """
    Whether two pods could get the same name: from two placeholders in one label (`a-b` with c, and a with `b-c`), or
    from two whose values may have dots (pod `a.b` with account c, and pod a with account `b.c`).
    """
    with_dots = [name for name in ("{service_account}", "{pod}") if name in template]
    return len(with_dots) > 1 or any(label.count("{") > 1 for label in template.split("."))


def _is_common_name(name: str) -> bool:
    return _COMMON_NAME.fullmatch(name) is not None and not name.startswith(SYSTEM)


def is_never_a_pods(name: str) -> bool:
    """Whether the name is the API server's, or a client's own machine."""
    labels = name.split(".")
    return labels[:2] in (["kubernetes"], ["kubernetes", "default"]) or labels[0] == "localhost"


@dataclass(frozen=True, kw_only=True)
class PodSignerRules:
    """Table `[pod_signer."NAME"]`."""

    #: The SPIFFE ID is `spiffe://`, the trust domain and the path; empty: certificates have an identity's names alone.
    trust_domain: str = ""
    path: str = "/ns/{namespace}/sa/{service_account}"  #: The SPIFFE ID's path; also with `{pod}`, `{pod_uid}`.
    namespaces: tuple[str, ...] = ()  #: Namespaces whose pods may ask, with `*` and `?` as in a shell.
    namespace_labels: dict[str, str] = field(default_factory=dict)  #: Labels that the namespace must have, all of them.
    service_accounts: tuple[str, ...] = ("*",)
    keys: tuple[str, ...] = ("ecdsa-p256", "ecdsa-p384", "rsa-3072", "rsa-4096")
    usages: Literal["peer", "client", "server"] = "peer"  #: peer: client and server, as SPIFFE has it.
    max_validity: timedelta = timedelta(hours=24)
    #: How far the CA dates notBefore back; the gateway requests that much less than the pod's limit.
    backdating: timedelta = timedelta(minutes=10)
    #: Whether the CA backdates by exactly `backdating`; then a pod may also ask for one hour, the shortest lifetime.
    exact_dates: bool = False
    refresh: int = 50  #: The kubelet renews after this share of the lifetime, in per cent.
    publish: bool = True  #: true: keep a ClusterTrustBundle with the roots; false: remove it.
    annotations: dict[str, str] = field(
        default_factory=dict
    )  #: Annotations that a pod may request, with a pattern for each value.
    identities: tuple[tuple[str, Identity], ...] = field(default=(), metadata={GIVEN: True})

    @property
    def spec(self) -> CertificateSpec:
        """The spec, with the certificate's usages and its CA."""
        return POD_SPECS[self.usages]

    @property
    def least(self) -> timedelta:
        """The shortest lifetime that a pod may ask for; the API server counts it from the backdated notBefore."""
        return SHORTEST if self.exact_dates else SHORTEST + self.backdating

    def problems(self) -> Iterator[SettingsProblem]:
        """Yield a problem for each rule that the API server, the kubelet or a SPIFFE library would not accept."""
        yield from self._limit_problems()
        if self.trust_domain and not _TRUST_DOMAIN.fullmatch(self.trust_domain):
            yield SettingsProblem("trust_domain", "small letters, digits, dots, hyphens", repr(self.trust_domain))
        if not _is_path(self.path):
            wanted = "segments such as /ns/{namespace}/sa/{service_account}, each placeholder a whole one"
            yield SettingsProblem("path", wanted, repr(self.path))
        if not self.namespaces and not self.namespace_labels:
            yield SettingsProblem("namespaces", "namespaces, or namespace_labels", "neither")
        for key in ("service_accounts", "keys"):
            if not getattr(self, key):
                yield SettingsProblem(key, "at least one", "none")
        for key in self.keys:
            if key not in KEY_TYPES:
                yield SettingsProblem("keys", f"some of {', '.join(KEY_TYPES)}", repr(key))

    def _limit_problems(self) -> Iterator[SettingsProblem]:
        if not SHORTEST <= self.max_validity <= LONGEST:
            wanted = f"{duration_text(SHORTEST)} to {duration_text(LONGEST)}"
            yield SettingsProblem("max_validity", wanted, duration_text(self.max_validity))
        if self.backdating >= SHORTEST:
            yield SettingsProblem("backdating", f"below {duration_text(SHORTEST)}", duration_text(self.backdating))
        if not 20 <= self.refresh <= 80:  # noqa: PLR2004
            yield SettingsProblem("refresh", "20 to 80 per cent", str(self.refresh))

    def names(self, parts: Mapping[str, str], identity: Identity | None) -> Names | None:
        """Return the names for a pod with these parts; None: it would have no name, or one that is too long."""
        uri = f"spiffe://{self.trust_domain}{self.path.format(**parts)}" if self.trust_domain else ""
        names = Names(
            common_name=identity.common_name.format(**parts) if identity else "",
            uris=(uri,) if uri else (),
            dns=tuple(dict.fromkeys(text.format(**parts) for text in identity.dns)) if identity else (),
        )
        is_named = names.uris or names.dns
        fits = len(uri) <= _LONGEST_ID and all(map(is_host_name, names.dns))
        return names if is_named and fits and (not names.common_name or _is_common_name(names.common_name)) else None


def _is_path(path: str) -> bool:
    """Whether the path is valid; each placeholder is a segment of its own, so that two pods never share a path."""
    begin, *segments = path.split("/")
    names = [text[1:-1] for text in segments if text.startswith("{") and text.endswith("}")]
    rest = [text for text in segments if not (text.startswith("{") and text.endswith("}"))]
    return (
        not begin
        and len(set(names)) == len(names)
        and {"namespace", "service_account"} <= set(names) <= set(IN_PATH)
        and all(_SEGMENT.fullmatch(text) and text not in {".", ".."} for text in rest)
    )


def read_pod_signers(reader: Reader, tables: Mapping[str, Any]) -> dict[str, PodSignerRules]:
    """Return the rules by signer; the reader collects the problems."""
    found = {}
    for name, table in tables.items():
        key = ("pod_signer", name)
        if not is_own_signer(name):
            reader.add(key, "DOMAIN/NAME, of a domain that is not Kubernetes' own", repr(name))
        elif not isinstance(table, dict):
            reader.add(key, "a table", repr(table))
        else:
            rules = reader.read(PodSignerRules, {k: v for k, v in table.items() if k != "identity"}, key)
            identities = read_each(reader, Identity, table.get("identity", {}), (*key, "identity"))
            if rules is not None:
                found[name] = replace(rules, identities=tuple(identities.items()))
                if not rules.trust_domain and not identities:
                    reader.add((*key, "trust_domain"), "a trust domain, or an identity with names", "neither")
    return found


def patterns(tables: Collection[PodSignerRules]) -> list[NamePatterns]:
    """Return all names that the tables may give, by usage, as patterns for the CA's own limits."""
    found = []
    for spec in dict.fromkeys(rules.spec for rules in tables):
        ours = [rules for rules in tables if rules.spec == spec]
        identities = [identity for rules in ours for _, identity in rules.identities]
        names = (_any(identity.common_name) for identity in identities if identity.common_name)
        found.append(
            NamePatterns(
                spec=spec,
                longest=max(rules.max_validity for rules in ours),
                uris=tuple(dict.fromkeys(uri for rules in ours for uri in _uris(rules))),
                dns=tuple(dict.fromkeys(_any(text) for identity in identities for text in identity.dns)),
                common_names=tuple(dict.fromkeys(names)),
            )
        )
    return found


def _any(template: str) -> str:
    return template.format(**dict.fromkeys(IN_PATH, "*"))


def _uris(rules: PodSignerRules) -> Iterator[str]:
    for namespace in rules.namespaces or ("*",) if rules.trust_domain else ():
        for account in rules.service_accounts:
            path = rules.path.format(namespace=namespace, service_account=account, pod="*", pod_uid="*")
            yield f"spiffe://{rules.trust_domain}{path}"


def dates_problem(begin: datetime, end: datetime, longest: timedelta, now: datetime) -> str:
    """Return why the API server would reject a certificate with these dates; empty: it accepts them."""
    if abs(begin - now) > _FROM_NOW:
        return f"it begins {duration_text(abs(begin - now))} from now, and the API server takes less than 5 minutes"
    if end - begin < SHORTEST:
        return f"it lives {duration_text(end - begin)}, and the API server takes no less than an hour"
    if end - begin > longest:
        found = f"{duration_text(end - begin)} with its backdated beginning"
        return f"it lives {found}, and the pod takes {duration_text(longest)} (is `backdating` what the CA backdates?)"
    return ""


def refresh_at(begin: datetime, end: datetime, percent: int) -> datetime:
    """Return `beginRefreshAt`, from which the kubelet asks for the next certificate, in whole seconds."""
    wanted = begin + (end - begin) * percent / 100
    return min(max(wanted, begin + _REFRESH_FROM_BEGIN), end - _REFRESH_FROM_END).replace(microsecond=0)
