"""The gateway's policy, and the judgement of CertificateSigningRequests by it (pure: no I/O, no clock)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path

from cryptography import x509

from bridge.cluster import mapping
from bridge.contract import Names
from bridge.desk import policy
from bridge.desk.node_inventory import Inventory, NodeEntry
from bridge.desk.policy import Policy, name_problems
from bridge.gateway.rules import (
    BOOTSTRAP_USER,
    NODE_USER,
    NODES_GROUP,
    SYSTEM,
    PodSignerRules,
    SignerRules,
    read_pod_signers,
    read_signers,
    spec_of,
    usages_fit,
)
from bridge.pki import user_rules
from bridge.pki.certificates import CN_OID, O_OID, attributes
from bridge.pki.csr import CsrData, OddRequestError, read_strictly
from bridge.pki.expiry import duration_text, minute
from bridge.pki.kubeadm_names import is_node_name
from bridge.pki.user_rules import User
from bridge.settings import opened
from bridge.specs import KUBELET_CLIENT, KUBELET_SERVER, KUBELET_SERVING, MASTERS, USER, CertificateSpec
from bridge.words import one_line

#: A certificate ends this long before its CA's certificate, so that clocks may differ.
BEFORE_THE_CA_ENDS = timedelta(minutes=5)


@dataclass(frozen=True, kw_only=True)
class GatewayPolicy(Policy):
    """The policy file: a desk's policy, plus signers."""

    signers: Mapping[str, SignerRules]  #: By signer name, as in the certificates API.
    pod_signers: Mapping[str, PodSignerRules] = field(default_factory=dict)


def parse(text: str, file: Path | None = None) -> GatewayPolicy:
    """Read a policy from TOML text."""
    reader, document = opened(text, file)
    signers = read_signers(reader, mapping(document, "signer"))
    pod_signers = read_pod_signers(reader, mapping(document, "pod_signer"))
    found = GatewayPolicy(signers=signers, pod_signers=pod_signers, **vars(policy.read(reader, document)))
    for name in ("kubelet.conf", KUBELET_SERVER):
        if found.needs_approval(name):
            wanted = 'approval = "required" in the table of the [signer], since no desk decides about it here'
            reader.add(("certificate", name, "approval"), wanted, "it")
    reader.raise_problems()
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One CertificateSigningRequest, with the requester that the API server names."""

    signer: str
    username: str
    groups: frozenset[str]
    usages: frozenset[str]
    asked_validity: timedelta | None  #: `spec.expirationSeconds`.
    pem: bytes  #: The CSR as it came, unchecked.


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeState:
    """The current state of a Node object at the API server."""

    exists: bool
    ready: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowed:
    """The request may be signed, with these values."""

    spec: CertificateSpec
    csr: CsrData
    validity: timedelta
    longest: timedelta  #: The policy's limit, whatever the request says: a CA with profiles decides itself.
    name: str  #: The certificate's name in metrics; see `csrs.name_in`.
    names: Names | None = None  #: A pod's names, since its CSR has none.
    most: timedelta = timedelta()  #: The longest lifetime that the pod accepts, from notBefore on.
    refresh: int = 0  #: For a pod: when the kubelet renews, in per cent of the lifetime.


@dataclass(frozen=True, slots=True)
class Hostile:
    """The request will never be signed unless the policy changes. The reason is for the log."""

    reason: str
    code: str = "NotAllowed"  #: The condition's reason.
    message: str = "not allowed"  #: The condition's message, which other users may read.


@dataclass(frozen=True, slots=True)
class Later:
    """The request can't be signed now, but may be after a change. The reason is for the log."""

    reason: str


Verdict = Allowed | Hostile | Later


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Everything besides the request itself that the verdict depends on."""

    policy: GatewayPolicy
    cluster: str
    inventory: Inventory
    ca_end: datetime  #: When the CA's certificate ends.
    min_validity: timedelta
    now: datetime
    #: The inventory's entry and the Node object of the node that the request is about, if any.
    entry: NodeEntry | None = None
    state: NodeState | None = None


#: A kubelet's request has less than 1 kB. Parsed, an entry takes up to four times as much: 24 MB for all at most.
USUAL_BYTES = 3 << 10


def read_csr(pem: bytes) -> CsrData | OddRequestError:
    """Return a request's CSR, or the error that names what is odd in it."""
    try:
        return read_strictly(pem)
    except OddRequestError as e:
        return e.with_traceback(None)


def addresses_of(request: Request) -> list[str]:
    """Return the IP addresses in the CSR; none if it can't be read."""
    csr = read_csr(request.pem)
    return [] if isinstance(csr, OddRequestError) else sorted(value for kind, value in csr.sans if kind == "IP")


def node_of(request: Request) -> str | None:
    """Return the node that a kubelet's request is about; None: it is about no node, or its CSR can't be read."""
    if spec_of(request.signer) not in (KUBELET_CLIENT, KUBELET_SERVING):
        return None
    csr = read_csr(request.pem)
    if isinstance(csr, OddRequestError):
        return None
    name = csr.cn.removeprefix(NODE_USER)
    return name if name != csr.cn and is_node_name(name) else None


def judge(request: Request, world: World) -> Verdict:
    """Judge a request: sign it, refuse it, or leave it for later."""
    rules, spec = world.policy.signers.get(request.signer), spec_of(request.signer)
    if rules is None or spec is None:
        return Later("the policy has no table for this signer")
    csr = read_csr(request.pem)
    if isinstance(csr, OddRequestError):
        return Hostile(str(csr))
    who = _who(request, csr, spec, rules, world)
    if not isinstance(who, str):
        return who
    longest, left = _longest(spec, rules, world.policy), world.ca_end - world.now - BEFORE_THE_CA_ENDS
    # a request for a longer lifetime gets a shorter one, not a denial
    validity = min(longest, left, request.asked_validity if request.asked_validity is not None else longest)
    if not any(fnmatchcase(world.cluster, pattern) for pattern in world.policy.allow.clusters):
        return Later(f"the policy's allow.clusters does not have this cluster, {world.cluster}")
    if validity < world.min_validity:
        least, found = duration_text(world.min_validity), duration_text(validity)
        of_ca = f"the CA's certificate ends at {minute(world.ca_end)}"
        of_request = f"wanted at least {least} (gateway.min_validity), found {found} by the request or the policy"
        return Later(of_ca if left < world.min_validity else of_request)
    return Allowed(spec=spec, csr=csr, validity=validity, longest=longest, name=who)


def _longest(spec: CertificateSpec, rules: SignerRules, policy: Policy) -> timedelta:
    """Return the shortest limit of the signer's table, the certificate's table, `[allow]` and, for users, `[users]`."""
    own = policy.certificates[spec.name].max_validity if spec.name in policy.certificates else None
    of_users = policy.users.max_validity if spec is USER and policy.users is not None else None
    limits = (rules.max_validity, own, of_users, policy.allow.max_validity)
    return min(limit for limit in limits if limit is not None)


def _who(request: Request, csr: CsrData, spec: CertificateSpec, rules: SignerRules, world: World) -> str | Verdict:
    """Return the name the certificate is for, or the verdict against it."""
    if not usages_fit(spec, request.usages):
        return Hostile(f"usages: {', '.join(sorted(request.usages))}")
    keys = rules.keys or world.policy.allow.keys
    if csr.key not in keys:
        return Hostile(f"key: wanted {' or '.join(keys)}, found {csr.key}")
    if spec in (KUBELET_CLIENT, KUBELET_SERVING):
        return _kubelet(request, csr, spec, rules, world)
    if spec is USER:
        return _user(request, csr, rules, world.policy)
    return _control_plane(request, csr, spec, rules, world)


def _kubelet(request: Request, csr: CsrData, spec: CertificateSpec, rules: SignerRules, world: World) -> str | Verdict:
    name = csr.cn.removeprefix(NODE_USER)
    if csr.subject != tuple(sorted([(CN_OID, f"{NODE_USER}{name}"), (O_OID, NODES_GROUP)])):
        return Hostile("subject: wanted O=system:nodes,CN=system:node:NAME and nothing else")
    if not is_node_name(name):
        return Hostile("subject: the CN has no node's name")
    if spec is KUBELET_CLIENT and csr.sans:
        return Hostile("SAN: a kubelet's client certificate has none")
    if (trouble := _requester(request, name, spec, rules, world)) is not None:
        return trouble
    if spec is KUBELET_SERVING and (wrong := _serving_sans(csr, name, world)) is not None:
        return wrong
    return name


def _requester(
    request: Request, name: str, spec: CertificateSpec, rules: SignerRules, world: World
) -> Hostile | Later | None:
    """Check the requester: a node asks for itself, a bootstrap token for a node that does not exist yet."""
    itself = request.username == f"{NODE_USER}{name}" and NODES_GROUP in request.groups
    bootstraps = (
        spec is KUBELET_CLIENT
        and request.username.startswith(BOOTSTRAP_USER)
        and not request.groups.isdisjoint(rules.bootstrap_groups)
    )
    if not itself and not bootstraps:
        return Hostile(f"{one_line(request.username)} may not ask for node {name}")
    if bootstraps and name in world.inventory.control_planes:
        return Hostile(f"a bootstrap token may not ask for the control-plane node {name}")
    return _presence(name, world, bootstraps=bootstraps)


def _presence(name: str, world: World, *, bootstraps: bool) -> Later | None:
    """Check that the inventory has the node, and that its Node object exists (for a token: does not, or may rejoin)."""
    entry, state, trouble = world.entry, world.state, ""
    if not any(fnmatchcase(name, pattern) for pattern in world.policy.allow.nodes):
        trouble = f"the policy's allow.nodes does not have {name}"
    elif entry is None:
        trouble = f"the inventory does not have node {name}"
    elif entry.blocked:
        trouble = f"the inventory blocks node {name}"
    elif state is None:
        trouble = f"the API did not tell whether node {name} is there"
    elif not bootstraps:
        trouble = "" if state.exists else f"there is no Node object {name} any more"
    elif state.exists and not entry.rejoin:
        trouble = f"node {name} is there already; rejoin = true in the inventory lets it come back while NotReady"
    elif state.exists and state.ready:
        trouble = f"node {name} is there, and ready"
    return Later(trouble) if trouble else None


def _serving_sans(csr: CsrData, name: str, world: World) -> Hostile | Later | None:
    if not csr.sans:
        return Hostile("SAN: a serving certificate without any")
    if any(kind not in {"DNS", "IP"} for kind, _ in csr.sans):
        return Hostile("SAN: names besides DNS names and IP addresses")
    never = [value for kind, value in csr.sans if world.inventory.is_never_a_nodes((kind, value), name)]
    if never:
        return Hostile(f"SAN: {_texts(never)} can be no node's")
    known = world.entry.sans(name) if world.entry is not None else frozenset()
    unknown = [value for kind, value in csr.sans if (kind, value) not in known]
    # later, since the inventory may have it tomorrow
    return Later(f"SAN: the inventory does not give {name} {_texts(unknown)}") if unknown else None


def _texts(values: Iterable[str]) -> str:
    return one_line(", ".join(sorted(values)))


def _user(request: Request, csr: CsrData, rules: SignerRules, policy: Policy) -> str | Verdict:
    if csr.sans:
        return Hostile("SAN: a user's certificate has none")
    if any(oid in (CN_OID, O_OID) and value.startswith(SYSTEM) for oid, value in csr.subject):
        return Hostile(f"subject: a user or group of Kubernetes' own ({SYSTEM}…)")
    grants = [grant for _, grant in rules.grants if grant.is_for(request.username, request.groups)]
    if not any(_is_granted(csr, text, request.username) for grant in grants for text in grant.subjects):
        return Hostile(f"no grant lets {one_line(request.username)} have this subject")
    user = User(name=csr.cn, groups=tuple(value for oid, value in csr.subject if oid == O_OID))
    if policy.users is not None and (found := user_rules.name_problems(user, policy.users.limits)):
        return Hostile(f"[users]: {'; '.join(found)}")
    return csr.cn


def _is_granted(csr: CsrData, text: str, username: str) -> bool:
    """Whether a grant's subject matches; the requester's name goes into parsed values, and can't add an attribute."""
    try:
        pattern = attributes(x509.Name.from_rfc4514_string(text))
    except ValueError:
        return False
    return csr.subject == tuple(sorted((oid, value.replace("{user}", username)) for oid, value in pattern))


def _control_plane(
    request: Request, csr: CsrData, spec: CertificateSpec, rules: SignerRules, world: World
) -> str | Verdict:
    if spec.name not in world.policy.allow.names:
        return Later(f"the policy's allow.names does not have {spec.name}")
    if (O_OID, MASTERS) in csr.subject and spec.name not in world.policy.allow.masters:
        return Hostile(f"subject: the group {MASTERS}")
    nodes = sorted(  # the nodes that the requester may ask for: itself, or all
        name
        for name, entry in world.inventory.control_planes.items()
        if not entry.blocked
        and any(fnmatchcase(name, pattern) for pattern in world.policy.allow.nodes)
        and any(grant.is_for(request.username, request.groups, node=name) for _, grant in rules.grants)
    )
    if not nodes:
        return Hostile(f"no grant lets {one_line(request.username)} ask for {spec.name}")
    problems: list[str] = []
    for name in nodes:
        own = [value for _, value in world.inventory.nodes[name].sans(name)]
        found = list(name_problems(spec.name, csr.parsed, world.policy, name, own))
        if not found:
            return spec.name
        problems = problems or found
    return Hostile(one_line("; ".join(problems)))
