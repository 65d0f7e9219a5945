"""A CA desk's policy: what it signs for which nodes, and its verdict on a request (pure: no I/O, no clock)."""

from __future__ import annotations

import dataclasses
import ipaddress
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.x509.oid import ExtensionOID

from bridge import words
from bridge.desk.approval import Approval, ApprovalRules
from bridge.desk.est_rules import EstRules, is_label
from bridge.desk.node_inventory import Inventory, San
from bridge.errors import SettingsProblem
from bridge.pki import user_rules
from bridge.pki.bundle import CARRIED, BundledRequest, RequestBundle
from bridge.pki.certificates import CN_OID, O_OID, attributes, san_counts, san_entry, subject_pattern, subject_text
from bridge.pki.csr import Naming, address, algorithm_name, requested
from bridge.pki.expiry import day, duration_text, minute
from bridge.pki.kubeadm_names import is_host_name
from bridge.pki.signatures import origin_problem, proof_problem, usages_problem
from bridge.pki.user_rules import Limits, User
from bridge.settings import Reader, network_of, opened
from bridge.specs import (
    AUTHORITIES,
    EKU,
    KEY_ALGORITHMS,
    KUBELET_SERVER,
    MASTERS,
    SERVERS,
    SPECS,
    USER,
    CertificateSpec,
    is_pair_name,
    pair_spec,
)
from bridge.words import one_line, one_of

_CLOCKS_DIFFER = timedelta(days=1)
#: The length of a text in a refusal, and the number of texts; people read them.
_LONGEST_SHOWN, _MOST_SHOWN = 100, 5
#: A stranger's request may have tens of thousands of problems, each of which lists what the policy allows.
_MOST_PROBLEMS = 100
#: More than any control-plane node has; a replaced certificate may have more.
_MOST_SANS = 100
_ETCD_SANS = ("{node}", "localhost", "127.0.0.1", "::1")
#: Names that kubeadm uses on every node; addresses depend on the site.
_SANS: Mapping[str, tuple[str, ...]] = {
    "apiserver": (
        "{node}",
        *("kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"),
    ),
    "etcd-peer": _ETCD_SANS,
    "etcd-server": _ETCD_SANS,
    "kubelet-server": ("{node}",),
    **{spec.name: _ETCD_SANS for spec in SERVERS.values()},
}
#: Serving certificates that a node requests for the first time without a live one: the inventory has its addresses.
_BY_INVENTORY = {KUBELET_SERVER, *(spec.name for spec in SERVERS.values())}


@dataclass(frozen=True, kw_only=True)
class DeskSettings:
    """Table `[desk]`."""

    name: str = ""  #: The name in every answer; empty: the host's name.
    #: The cluster's CA certificates, laid out as in /etc/kubernetes/pki; without it, the backends report them.
    ca_dir: Path | None = None
    #: An unencrypted private key in PEM, with which answers are signed; None: they are not signed.
    answer_key: Path | None = None
    archive: Path | None = None  #: For finished bundles; without it, in the state directory.
    #: The nodes with their names and addresses, as for the gateway; they are the SANs of serving certificates.
    inventory: Path | None = None
    #: While a CA is replaced: by authority, the file with the former CA's certificate; a certificate of that CA also
    #: proves a request.
    former_cas: dict[str, str] = field(default_factory=dict)

    def problems(self) -> Iterator[SettingsProblem]:
        """Unknown authorities, and relative paths."""
        for name, path in self.former_cas.items():
            if name not in AUTHORITIES:
                yield SettingsProblem("former_cas", f"one of {', '.join(AUTHORITIES)}", repr(name))
            elif not path.startswith("/"):
                yield SettingsProblem(f"former_cas.{name}", "an absolute path", repr(path))


@dataclass(frozen=True, kw_only=True)
class Allow:
    """Table `[allow]`: rules for all certificates."""

    clusters: tuple[str, ...]  #: Names of clusters, as shell patterns with `*` and `?`.
    nodes: tuple[str, ...]
    names: tuple[str, ...] = tuple(SPECS)
    keys: tuple[str, ...] = KEY_ALGORITHMS
    max_validity: timedelta = timedelta(days=365)
    masters: tuple[str, ...] = ()  #: Certificates that may have the group `system:masters`.
    proof: Literal["required", "optional"] = "required"
    proof_after_expiry: timedelta = timedelta(days=90)  #: How long a proof by an expired certificate counts.
    max_age: timedelta = timedelta(days=30)  #: Older request bundles are refused.
    #: Whether a certificate needs people's approval before it is signed (table `[approvals]`).
    approval: Approval = "none"
    #: With `"superseded"` a node may have the CA revoke, through `ca-bridge serve`, a certificate of its own that a later
    #: one has replaced.
    revoke: Literal["never", "superseded"] = "never"

    def problems(self) -> Iterator[SettingsProblem]:
        """Unknown names, and lists that allow nothing."""
        for key in ("clusters", "nodes", "names", "keys"):
            if not getattr(self, key):
                yield SettingsProblem(key, "at least one", "none")
        for key in ("names", "masters"):
            yield from _unknown(key, getattr(self, key), tuple(SPECS))
        yield from _unknown("keys", self.keys, KEY_ALGORITHMS)


@dataclass(frozen=True, kw_only=True)
class CertificateRules:
    """
    Table `[certificate.NAME]`: rules for one certificate; `{node}` stands for the node's name.

    A node's further pairs need a table here, which lists everything that such a certificate may have.
    """

    authority: str = ""  #: The CA that signs a further pair.
    usages: tuple[str, ...] = ()  #: The usages of a further pair: `server`, `client`, or both.
    #: Whole subjects, such as `O=system:nodes,CN=system:node:{node}`.
    subjects: tuple[str, ...] | None = None
    groups: tuple[str, ...] | None = None  #: Allowed O values.
    #: Allowed names and addresses; `.example.com`: all names below it; `10.0.0.0/8`: the addresses in it.
    sans: tuple[str, ...] | None = None
    keys: tuple[str, ...] | None = None
    max_validity: timedelta | None = None
    approval: Approval | None = None  #: Like `approval` in `[allow]`, for this certificate.

    def problems(self) -> Iterator[SettingsProblem]:
        """Unreadable rules, and rules that would bypass `allow.masters`."""
        if self.subjects is not None and self.groups is not None:
            yield SettingsProblem("groups", "either subjects or groups", "both")
        for text in self.subjects or ():
            subject = subject_pattern(text, "x")
            if subject is None:
                yield SettingsProblem("subjects", "subjects such as O=system:nodes,CN=system:node:{node}", repr(text))
            elif (O_OID, MASTERS) in subject:
                yield SettingsProblem("subjects", f"allow.masters to allow members of {MASTERS}", repr(text))
        if MASTERS in (self.groups or ()):
            yield SettingsProblem("groups", "allow.masters for that", MASTERS)
        for text in self.sans or ():
            if _san_rule(text.replace("{node}", "x")) is None:
                yield SettingsProblem("sans", "a name, .suffix, address or network (10.0.0.0/8)", repr(text))
        yield from _unknown("keys", self.keys or (), KEY_ALGORITHMS)
        yield from _unknown("usages", self.usages, tuple(_USAGES))
        yield from _unknown("authority", [self.authority] if self.authority else [], tuple(AUTHORITIES))

    def pair_problems(self, *, is_pair: bool) -> Iterator[SettingsProblem]:
        """Keys that a further pair lacks, or that make no sense for a certificate of kubeadm's."""
        for key, value in (("authority", self.authority), ("usages", self.usages)):
            if bool(value) != is_pair:
                found = "nothing" if is_pair else "it"
                wanted = "it for a node's further pair" if is_pair else "no such key for a certificate of kubeadm's"
                yield SettingsProblem(key, wanted, found)
        for key, rule in (("subjects", self.subjects), ("sans", self.sans)):
            if is_pair and rule is None:
                wanted = "a list for a node's further pair, whose names no other rule limits"
                yield SettingsProblem(key, wanted, "nothing")
        if is_pair and self.groups is not None:
            yield SettingsProblem("groups", "whole subjects for a node's further pair", "groups")


_USAGES = {"server": EKU.SERVER_AUTH, "client": EKU.CLIENT_AUTH}


@dataclass(frozen=True, kw_only=True)
class UserRules:
    """Table `[users]`: kubeconfigs for people and machines; without the table the desk signs none."""

    groups: tuple[str, ...] = ()  #: O values that a request may have, as shell patterns with `*` and `?`.
    names: tuple[str, ...] = ("*",)  #: CNs, as patterns likewise.
    allow: tuple[str, ...] = ()  #: Allowed names of Kubernetes and kubeadm (`kubeadm:cluster-admins`).
    max_validity: timedelta = timedelta(hours=24)

    def problems(self) -> Iterator[SettingsProblem]:
        """Groups that the desk never gives to a user."""
        for key in ("groups", "allow"):
            if MASTERS in getattr(self, key):
                wanted = "no group that no RBAC rule can hold back; kubeadm:cluster-admins is a binding"
                yield SettingsProblem(key, wanted, MASTERS)

    @property
    def limits(self) -> Limits:
        """The limits in the form that `kubeconfig user` uses on a node."""
        return Limits(groups=self.groups, allow=self.allow, max_validity=self.max_validity, names=self.names)


def _unknown(key: str, values: Sequence[str], known: Sequence[str]) -> Iterator[SettingsProblem]:
    for value in values:
        if value not in known:
            yield SettingsProblem(key, f"some of {', '.join(known)}", repr(value))


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The whole policy file."""

    allow: Allow
    desk: DeskSettings = field(default_factory=DeskSettings)
    certificates: Mapping[str, CertificateRules] = field(default_factory=dict)
    nodes: Inventory | None = None  #: The content of `desk.inventory`.
    former: Mapping[str, Sequence[x509.Certificate]] = field(default_factory=dict)  #: The content of `desk.former_cas`.
    users: UserRules | None = None  #: None: the desk signs for no user.
    est: Mapping[str, EstRules] = field(default_factory=dict)  #: By label.
    est_cas: Mapping[str, Sequence[x509.Certificate]] = field(default_factory=dict)  #: Those of `clients_ca`, by label.
    approvals: ApprovalRules = field(default_factory=ApprovalRules)

    def spec_of(self, name: str) -> CertificateSpec | None:
        """The kind of this certificate, by our table or, for a further pair, by the policy's; None: neither has it."""
        if name in SPECS:
            return SPECS[name]
        rules = self.certificates.get(name)
        return None if rules is None else pair_spec(name, rules.authority, map(_USAGES.__getitem__, rules.usages))

    def rules(self, name: str) -> CertificateRules:
        """The rules for this certificate; without a table they limit nothing."""
        return self.certificates.get(name, CertificateRules())

    def longest_validity(self, name: str) -> timedelta:
        """The longest validity that a request for this certificate may ask for."""
        return self.rules(name).max_validity or self.allow.max_validity

    def keys(self, name: str) -> Sequence[str]:
        """The key algorithms that a certificate of this name may have."""
        return self.rules(name).keys or self.allow.keys

    def blocks(self, node: str) -> bool:
        """Whether the inventory blocks this node."""
        return self.nodes is not None and node in self.nodes.blocked

    @property
    def blocks_some(self) -> bool:
        """Whether the inventory blocks any node."""
        return self.nodes is not None and bool(self.nodes.blocked)

    def needs_approval(self, name: str) -> bool:
        """Whether a certificate needs people's approval before it is signed."""
        return (self.rules(name).approval or self.allow.approval) == "required"


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyVerdict:
    """The policy's verdict on one request."""

    problems: tuple[str, ...]  #: Empty: the request may be signed.
    proven: bool  #: The continuity proof holds, with this CA's certificate of the same name and usages.
    may_waive: bool = False  #: The proof is a problem that a person at the desk may waive (`--without-proof`).
    #: SANs that only the node's name allows, and that the replaced certificate lacks.
    claimed_sans: tuple[str, ...] = ()
    is_too_long: bool = False  #: The CSR has more SANs than any node; each look at them takes long.


def parse(text: str, file: Path | None = None) -> Policy:
    """Parse a policy from TOML text."""
    reader, document = opened(text, file)
    return read(reader, document)


def read(reader: Reader, document: Mapping[str, Any]) -> Policy:
    """Read the desk's tables of a policy; only the gateway uses the tables `[signer."NAME"]`."""
    names = ("desk", "allow", "approvals", "certificate", "signer", "pod_signer", "users", "est")
    tables = reader.tables(document, names)
    allow = reader.read(Allow, tables["allow"], ("allow",))
    desk = reader.read(DeskSettings, tables["desk"], ("desk",))
    certificates = _certificates(reader, tables["certificate"])
    est = _est(reader, tables["est"], certificates)
    users = reader.read(UserRules, tables["users"], ("users",)) if "users" in document else None
    approvals = reader.read(ApprovalRules, tables["approvals"], ("approvals",))
    reader.raise_problems()
    if allow is None or desk is None or approvals is None:
        raise AssertionError("a table that could not be read is a problem")
    policy = Policy(allow=allow, desk=desk, certificates=certificates, users=users, est=est, approvals=approvals)
    if not approvals.approvers and any(map(policy.needs_approval, [*SPECS, *certificates])):
        reader.add(("approvals", "approvers"), 'people who decide, since there is approval = "required"', "none")
        reader.raise_problems()
    return policy


def _certificates(reader: Reader, tables: Mapping[str, Any]) -> dict[str, CertificateRules]:
    wanted, key = f"one of {', '.join(SPECS)}, or the name of a node's further pair", ("certificate",)
    rules = reader.each(CertificateRules, tables, key, lambda name: name in SPECS or is_pair_name(name), wanted)
    for name, table in rules.items():
        for problem in table.pair_problems(is_pair=name not in SPECS):
            reader.add((*key, name, problem.key), problem.wanted, problem.found)
    return rules


def _est(
    reader: Reader, tables: Mapping[str, Any], certificates: Mapping[str, CertificateRules]
) -> dict[str, EstRules]:
    wanted = "a label of small letters, digits, hyphens and dots that no operation of EST is called like"
    rules = reader.each(EstRules, tables, ("est",), is_label, wanted)
    for label, table in rules.items():
        name = table.certificate or label
        if name not in SPECS and name not in certificates:
            wanted = f"one of {', '.join(SPECS)}, or one with a table [certificate.{name}]"
            reader.add(("est", label, "certificate"), wanted, repr(name))
    return rules


def judge(
    request: BundledRequest,
    bundle: RequestBundle,
    policy: Policy,
    cas: Sequence[x509.Certificate],
    now: datetime,
    without_proof: frozenset[str] = frozenset(),
    *,
    held: bool = False,
) -> PolicyVerdict:
    """
    A request's problems (only the first of thousands), and whether its proof holds. `cas` are the desk's certificates of
    its authority; `held`: the requester has proven in TLS to hold the replaced certificate's key, and keeps its names.
    """
    if blocked := _blocked(bundle.node, policy) or _unlisted(request.name, policy):
        return PolicyVerdict(problems=(blocked,), proven=False)
    problems = [*_who(bundle.node, bundle.cluster, policy.allow), *_age(bundle, policy.allow, now)]
    waived = policy.allow.proof == "optional" or request.name in without_proof
    unproven: str | None = "a user's"
    can_be_waived = is_too_long = False
    try:
        if request.name == USER.name:
            problems += islice(_user_problems(request, policy, waived=waived), _MOST_PROBLEMS)
        else:
            unproven, can_be_waived = _proof_trouble(request, bundle, policy, cas, now, held=held)
            if unproven and not (waived and can_be_waived):
                problems.append(f"proof: {unproven}")
            problems += islice(_what(request, bundle, policy, proven=not unproven), _MOST_PROBLEMS)
        is_too_long = san_counts(request.csr).total() > _most_sans(None if unproven else request.replaces)
    except (ValueError, UnsupportedAlgorithm, x509.UnsupportedGeneralNameType, x509.DuplicateExtension) as e:
        problems.append(f"CSR: wanted one that can be read, found: {one_line(e)}")
    may_waive = bool(unproven) and can_be_waived and not waived
    claimed = () if problems or waived or unproven else _claimed_sans(request, policy)
    return PolicyVerdict(
        problems=tuple(problems),
        proven=not unproven,
        may_waive=may_waive,
        claimed_sans=claimed,
        is_too_long=is_too_long,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A certificate that a node is about to request, with the facts that are known before its key is made."""

    node: str
    cluster: str
    spec: CertificateSpec
    naming: Naming
    key: str  #: The new key's algorithm, such as `rsa-2048`.
    validity: timedelta
    replaces: x509.Certificate | None  #: The live certificate; None: it is missing, or its names are not kept.


def planned_problems(planned: Planned, policy: Policy) -> tuple[str, ...]:
    """Every problem that a node's own policy has with a renewal; no proof is needed, since the node holds the replaced key."""
    name, node = planned.spec.name, planned.node
    if blocked := _blocked(node, policy) or _unlisted(name, policy):
        return (blocked,)
    subject, sans = attributes(planned.naming.subject), Counter(map(san_entry, planned.naming.sans))
    return (
        *_who(node, planned.cluster, policy.allow),
        *_spec_problems(name, planned.spec.authority.name, planned.spec.ekus, policy),
        *_limit_problems(name, planned.validity, policy),
        *_key_problems(planned.key, policy.keys(name)),
        *_subject_problems(name, subject, policy, node, planned.replaces),
        *_san_problems(name, sans, _with_inventory(name, policy, node), node, planned.replaces),
    )


def node_problems(node: str, cluster: str, policy: Policy) -> tuple[str, ...]:
    """Why the policy allows this node of this cluster nothing, whatever it requests."""
    return (*filter(None, [_blocked(node, policy)]), *_who(node, cluster, policy.allow))


def _blocked(node: str, policy: Policy) -> str:
    """The problem with a node that the inventory blocks; empty for every other node."""
    if not policy.blocks(node):
        return ""
    return f"node: wanted one that the inventory ({policy.desk.inventory}) does not block, found {node}"


def _who(node: str, cluster: str, allow: Allow) -> Iterator[str]:
    for what, found, patterns in (("cluster", cluster, allow.clusters), ("node", node, allow.nodes)):
        if not any(fnmatchcase(found, pattern) for pattern in patterns):
            yield f"{what}: wanted {one_of(patterns)}, found {found}"


def _age(bundle: RequestBundle, allow: Allow, now: datetime) -> Iterator[str]:
    """Problems with a bundle's age; clocks may differ by a day."""
    if now - bundle.created > allow.max_age:
        limit = f"made at most {duration_text(allow.max_age)} ago (allow.max_age)"
        yield f"age: wanted a request {limit}, found one of {day(bundle.created)}; export it again"
    elif bundle.created - now > _CLOCKS_DIFFER:
        yield f"age: wanted a request that is not from the future, found one of {minute(bundle.created)}"


def _proof_trouble(
    request: BundledRequest,
    bundle: RequestBundle,
    policy: Policy,
    cas: Sequence[x509.Certificate],
    now: datetime,
    *,
    held: bool,
) -> tuple[str | None, bool]:
    """Why the proof does not hold, and whether a person may waive it: not if it is by another certificate."""
    former, trouble = policy.former.get(request.authority, ()), None if held else proof_problem(request, bundle)
    if not trouble and (trouble := origin_problem(request, [*cas, *former])) and not former:
        trouble += " (while this CA takes another one's place, the policy's desk.former_cas names that one)"
    if trouble or request.replaces is None:
        return trouble, not held and (request.proof is None or request.replaces is None)
    end, longest = request.replaces.not_valid_after_utc, policy.allow.proof_after_expiry
    if now - end > longest:
        limit = f"ended at most {duration_text(longest)} ago (allow.proof_after_expiry)"
        return f"wanted one by a certificate that {limit}, found {day(end)}", True
    return usages_problem(request), not held


def _what(request: BundledRequest, bundle: RequestBundle, policy: Policy, *, proven: bool) -> Iterator[str]:
    name, csr = request.name, request.csr
    yield from _limit_problems(name, request.validity, policy)
    yield from _spec_problems(name, request.authority, request.ekus, policy)
    yield from _csr_problems(csr, policy.keys(name), sans=True)
    old = request.replaces if proven else None
    yield from _subject_problems(name, attributes(csr.subject), policy, bundle.node, old)
    listed = _with_inventory(name, policy, bundle.node)
    if listed.sans == () and policy.rules(name).sans is None:
        yield f"node: wanted one that the inventory ({policy.desk.inventory}) has, and does not block, found {bundle.node}"
    yield from _san_problems(name, san_counts(csr), listed, bundle.node, old)


def _limit_problems(name: str, validity: timedelta, policy: Policy) -> Iterator[str]:
    if name in SPECS and name not in policy.allow.names:
        yield f"name: wanted {one_of(policy.allow.names)}, found {name}"
    if validity > (longest := policy.longest_validity(name)):
        yield f"validity: wanted at most {duration_text(longest)}, found {duration_text(validity)}"


def _with_inventory(name: str, policy: Policy, node: str) -> CertificateRules:
    """
    The rules, with the inventory's SANs for a node's serving certificate whose SANs the policy does not list; without
    SANs for a node that is blocked or not in the inventory.
    """
    rules = policy.rules(name)
    if name not in _BY_INVENTORY or policy.nodes is None or rules.sans is not None:
        return rules
    entry = policy.nodes.nodes.get(node)
    if entry is None or entry.blocked:
        return dataclasses.replace(rules, sans=())
    local = _SANS[name] if SPECS[name].by_flag else ()
    return dataclasses.replace(rules, sans=(*sorted(value for _, value in entry.sans(node)), *local))


def _unlisted(name: str, policy: Policy) -> str:
    """The problem of a further pair without a table in the policy, so that no rule covers it; else empty."""
    if name in CARRIED or name in policy.certificates:
        return ""
    return f"name: wanted one of kubeadm's, or one with a table [certificate.{name}] in the policy, found {name}"


def _spec_problems(name: str, authority: str, ekus: frozenset[EKU], policy: Policy) -> Iterator[str]:
    """Problems with CA and usages, by our table or, for a further pair, by the policy's."""
    spec = CARRIED.get(name) or policy.spec_of(name)
    if spec is None:
        raise AssertionError("a pair without a table is a problem already")
    if authority != spec.authority.name:
        yield f"authority: wanted {spec.authority.name} for {name}, found {authority}"
    if ekus != spec.ekus:
        yield f"EKU: wanted {_ekus(spec.ekus)}, found {_ekus(ekus)}"


def _csr_problems(csr: x509.CertificateSigningRequest, keys: Sequence[str], *, sans: bool) -> Iterator[str]:
    """Problems with a CSR's key, its signature, and its requested extensions (only SANs are allowed)."""
    yield from _key_problems(algorithm_name(csr.public_key()), keys)
    if not csr.is_signature_valid:
        yield "CSR: wanted one that is signed with its own key, found another signature"
    if others := requested(csr, *([ExtensionOID.SUBJECT_ALTERNATIVE_NAME] if sans else [])):
        what, too = ("SANs and nothing else", " too") if sans else ("no extension", "")
        yield f"CSR: wanted one that asks for {what}, found {', '.join(others)}{too}"


def _key_problems(key: str, keys: Sequence[str]) -> Iterator[str]:
    if key not in keys:
        yield f"key: wanted {one_of(keys)}, found {key}"


# --- a user's request: nothing can prove a user's identity, and an earlier certificate proves no right to a group ------


def _user_problems(request: BundledRequest, policy: Policy, *, waived: bool) -> Iterator[str]:
    """Problems by the table `[users]`; `waived`: a person at the desk vouches that this user made the request."""
    if policy.users is None:
        yield "user: the policy has no table [users], which says who may be a user"
        return
    if request.replaces is not None or request.proof is not None:
        yield "proof: wanted none, since nothing proves who a user is, found one"
    elif not waived:
        yield (
            "proof: nothing proves who a user is: after a look at name, groups and fingerprint, "
            f"`ca-bridge sign --without-proof {USER.name}`"
        )
    yield from _spec_problems(USER.name, request.authority, request.ekus, policy)
    yield from _csr_problems(request.csr, policy.allow.keys, sans=False)
    found = attributes(request.csr.subject)
    names = [value for oid, value in found if oid == CN_OID]
    groups = [value for oid, value in found if oid == O_OID]
    if others := [f"{oid}={one_line(value, _LONGEST_SHOWN)}" for oid, value in found if oid not in (CN_OID, O_OID)]:
        yield f"subject: wanted CN and O alone, found {_some(others)}"
    if len(names) != 1 or len(set(groups)) != len(groups):
        yield f"subject: wanted one CN, and each group once, found {_some([*names, *groups]) or 'neither'}"
        return
    user = User(name=names[0], groups=tuple(groups))
    yield from user_rules.problems(user, request.validity, policy.users.limits)


def name_problems(
    name: str, csr: x509.CertificateSigningRequest, policy: Policy, node: str, own_sans: Sequence[str]
) -> Iterator[str]:
    """Problems with the names in a CSR without replaced certificate and proof; `own_sans` are known to be the node's."""
    rules = policy.rules(name)
    yield from _subject_problems(name, attributes(csr.subject), policy, node, None)
    if name in _SANS or rules.sans is not None:
        listed = _SANS[name] if rules.sans is None else rules.sans
        rules = dataclasses.replace(rules, sans=(*listed, *own_sans))
    yield from _san_problems(name, san_counts(csr), rules, node, None)


def _subject_problems(
    name: str, subject: Sequence[tuple[str, str]], policy: Policy, node: str, replaced: x509.Certificate | None
) -> Iterator[str]:
    rules, old = policy.rules(name), attributes(replaced.subject) if replaced is not None else None
    if (O_OID, MASTERS) in subject:
        yield from _masters_problem(old, may_be=name in policy.allow.masters)
    rest = sorted(item for item in subject if item != (O_OID, MASTERS))
    if rules.subjects is not None:
        if not any(rest == subject_pattern(text, node) for text in rules.subjects):
            allowed = [text.replace("{node}", node) for text in rules.subjects]
            yield f"subject: wanted {one_of(allowed)}, found {one_line(subject_text(rest))}"
        return
    yield from _cn_problem(name, [value for oid, value in rest if oid == CN_OID], node)
    yield from _group_problems([value for oid, value in rest if oid == O_OID], _groups(name, rules, old))
    wanted = "CN and O and what the replaced certificate has" if old else "CN and O"
    for oid, value in rest:
        if oid not in (CN_OID, O_OID) and (oid, value) not in (old or ()):
            yield f"subject: wanted {wanted}, found {oid}={one_line(value, _LONGEST_SHOWN)}"


def _cn_problem(name: str, common_names: Sequence[str], node: str) -> Iterator[str]:
    cn, _ = kubeadms_subject(name)
    wanted = cn.replace("{node}", node)
    if common_names != [wanted]:
        where = f" ({node} is node.name in the node's settings)" if wanted != cn else ""
        yield f"CN: wanted {wanted}, found {_some(common_names) or 'none'}{where}"


def _groups(name: str, rules: CertificateRules, old: Sequence[tuple[str, str]] | None) -> Sequence[str]:
    """The groups that are allowed: the policy's, or else the replaced certificate's, or else kubeadm's."""
    if rules.groups is not None:
        return rules.groups
    return kubeadms_subject(name)[1] if old is None else [value for oid, value in old if oid == O_OID]


def _group_problems(organizations: Iterable[str], groups: Sequence[str]) -> Iterator[str]:
    for value in organizations:
        if value not in groups:
            yield f"group: wanted {one_of(groups)}, found {one_line(value, _LONGEST_SHOWN)}"


def kubeadms_subject(name: str) -> tuple[str, tuple[str, ...]]:
    """kubeadm's CN of a certificate, and the groups (O) that any of its versions adds, without `system:masters`."""
    spec = SPECS[name]
    return spec.common_names[0], tuple(sorted(frozenset().union(*spec.groups) - {MASTERS}))


def _masters_problem(old: Sequence[tuple[str, str]] | None, *, may_be: bool) -> Iterator[str]:
    if not may_be:
        yield f"group: wanted no {MASTERS} (allow.masters names the certificates that may have it), found it"
    elif old is not None and (O_OID, MASTERS) not in old:
        yield f"group: wanted no {MASTERS}, as in the replaced certificate, found it"


def _san_problems(
    name: str, counted: Counter[San], rules: CertificateRules, node: str, replaced: x509.Certificate | None
) -> Iterator[str]:
    """Problems by the policy's list, or else by the replaced certificate, or else by kubeadm's own names."""
    old = Counter[San]() if replaced is None else san_counts(replaced)
    most = _most_sans(replaced)
    if counted.total() > most:
        yield f"SAN: wanted at most {most}, found {counted.total()}"
    if len(counted) > most:  # comparing a megabyte of a stranger's names with each rule takes seconds
        return
    if rules.sans is None and replaced is not None:
        wanted, others = "those of the replaced certificate", counted.keys() - old.keys()
    else:
        wanted, others = _beyond_rules(name, counted, rules.sans, node)
    if others:
        yield f"SAN: wanted {wanted}, found {_some(f'{kind}:{value}' for kind, value in sorted(others))}"
    repeated = {san: times for san, times in counted.items() if times > max(old[san], 1)}
    if repeated:
        texts = [f"{kind}:{value} {times} times" for (kind, value), times in sorted(repeated.items())]
        yield f"SAN: wanted each once, found {_some(texts)}"


def _claimed_sans(request: BundledRequest, policy: Policy) -> tuple[str, ...]:
    sans, listed = set(san_counts(request.csr)), policy.rules(request.name).sans
    if request.replaces is not None:
        sans -= san_counts(request.replaces).keys()
    texts = [text for text in (_SANS.get(request.name, ()) if listed is None else listed) if "{node}" not in text]
    return tuple(
        f"{kind}:{value}" for kind, value in sorted(sans) if not any(_matches(kind, value, text) for text in texts)
    )


def _most_sans(replaced: x509.Certificate | None) -> int:
    return _MOST_SANS if replaced is None else max(_MOST_SANS, san_counts(replaced).total())


def _beyond_rules(name: str, names: Iterable[San], sans: Sequence[str] | None, node: str) -> tuple[str, set[San]]:
    """What the policy, or else kubeadm, allows, as text; and the names that it does not allow."""
    texts = [text.replace("{node}", node) for text in (_SANS.get(name, ()) if sans is None else sans)]
    wanted, others = one_of(texts), {san for san in names if not any(_matches(*san, text) for text in texts)}
    if sans is None:
        by_inventory = ", or desk.inventory," if name in _BY_INVENTORY else ""
        wanted += f" (the policy's [certificate.{name}] sans{by_inventory} says what else)"
    return wanted, others


# --- names in a policy --------------------------------------------------------------------------------------------------


def _some(texts: Iterable[str]) -> str:
    """The first few texts, for a refusal that people read."""
    return words.some((one_line(text, _LONGEST_SHOWN) for text in texts), _MOST_SHOWN)


def _matches(kind: str, value: str, text: str) -> bool:
    """Whether a policy's text (a name, address, suffix or network) allows a SAN."""
    rule = _san_rule(text)
    if isinstance(rule, ipaddress.IPv4Network | ipaddress.IPv6Network):
        matches = address(value) if kind == "IP" else None
        return matches is not None and matches in rule
    if rule is None or kind != "DNS":
        return False
    # as in a resolver, regardless of case
    name, wanted = value.lower(), rule.lower()
    if not wanted.startswith("."):
        return name == wanted
    # a wildcard stands for whole hosts, which only an explicit rule may allow: `*.example.com`
    return name.endswith(wanted) and is_host_name(name)


def _san_rule(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | str | None:
    """A network (perhaps of one address), a name, or a suffix; None: invalid."""
    if (network := network_of(text)) is not None:
        return network
    plain = text.removeprefix(".").removeprefix("*.")
    is_name = plain and all(part and part.replace("-", "").replace("_", "").isalnum() for part in plain.split("."))
    looks_like_address = all(part.isdigit() for part in plain.split("."))
    return text if is_name and plain.isascii() and not looks_like_address else None


def _ekus(ekus: frozenset[EKU]) -> str:
    return ", ".join(sorted(eku.label for eku in ekus))
