"""The judgement of a pod's request, by the API server's word and the objects looked up (pure: no I/O, no clock)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from fnmatch import fnmatchcase

from bridge.desk.node_inventory import Inventory, NodeEntry
from bridge.gateway.policy import BEFORE_THE_CA_ENDS, Allowed, GatewayPolicy, Hostile, Later, Verdict, read_csr
from bridge.gateway.rules import IN_PATH, KEY_TYPES, Identity, PodSignerRules, is_never_a_pods
from bridge.pki.csr import CsrData, OddRequestError
from bridge.pki.expiry import minute
from bridge.words import one_line

#: The kubelet makes a new request after 10 to 15 minutes, and kube-controller-manager deletes those older than 15.
_OLDEST = timedelta(minutes=14)
#: The lifetime of a pod without `maxExpirationSeconds`.
USUAL_SECONDS = 86400
_CURVE_NAMES = {"ecdsa-secp521r1": "ecdsa-p521"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PodRequest:
    """A PodCertificateRequest's content; if a node made it, the API server vouches for the pod in it."""

    signer: str
    namespace: str
    pod: str
    pod_uid: str
    service_account: str
    service_account_uid: str
    node: str
    node_uid: str
    seconds: int  #: `maxExpirationSeconds`.
    annotations: tuple[tuple[str, str], ...]
    pem: bytes  #: The CSR as it came; its names should be empty.

    @property
    def username(self) -> str:
        """The requester for the queue: node and namespace, so that one namespace does not delay another."""
        return f"system:node:{self.node} for {self.namespace}"

    @property
    def parts(self) -> dict[str, str]:
        """The values for the placeholders in certificate names."""
        return {key: getattr(self, key) for key in IN_PATH}


@dataclass(frozen=True, slots=True, kw_only=True)
class PodState:
    """What one request's verdict needs of a Pod object."""

    uid: str
    node: str
    service_account: str
    phase: str
    key_types: frozenset[str]  #: The key types of its volumes with the request's signer, lifetime and annotations.
    ends: datetime | None = None  #: When its grace period ends, if it was deleted.


@dataclass(frozen=True, slots=True, kw_only=True)
class PodWorld:
    """Everything besides the request that the verdict depends on; None: there is no such object."""

    policy: GatewayPolicy
    cluster: str
    inventory: Inventory
    ca_end: datetime
    now: datetime
    created: datetime  #: When the request was made.
    pod: PodState | None
    account_uid: str | None
    node_uid: str | None
    labels: Mapping[str, str]  #: The namespace's labels.
    entry: NodeEntry | None  #: The node's entry in the inventory.


def judge(request: PodRequest, world: PodWorld) -> Verdict:
    """Judge a request: sign it, refuse it, or leave it for later."""
    rules, csr = world.policy.pod_signers.get(request.signer), csr_or_problem(request)
    if isinstance(csr, Hostile):
        return csr
    if rules is None or world.pod is None:
        return Later("there is no such pod any more" if rules else "the policy has no table for this signer")
    if (trouble := next(_troubles(request, csr, rules, world, world.pod), None)) is not None:
        return trouble
    names = rules.names(request.parts, _identity(request, rules))
    if names is None or any(is_never_a_pods(name) or name in world.inventory.taken_names for name in names.dns):
        return Later("the policy gives this pod no names, too long ones, or names of the API server or of a node")
    longest, left = min(rules.max_validity, world.policy.allow.max_validity), world.ca_end - world.now
    of_pod = timedelta(seconds=request.seconds) - rules.backdating  # the CA adds it before the beginning
    validity = min(longest, left - BEFORE_THE_CA_ENDS, of_pod)
    validity = timedelta(seconds=validity // timedelta(seconds=1))
    if validity < rules.least - rules.backdating:
        return Later(f"the CA's certificate ends at {minute(world.ca_end)}, or allow.max_validity is too short")
    return Allowed(
        spec=rules.spec,
        csr=csr,
        validity=validity,
        longest=longest,
        name=f"{request.namespace}/{request.service_account}",
        names=names,
        most=timedelta(seconds=request.seconds),
        refresh=rules.refresh,
    )


def _troubles(
    request: PodRequest, csr: CsrData, rules: PodSignerRules, world: PodWorld, pod: PodState
) -> Iterator[Hostile | Later]:
    yield from map(Later, _absent(request, world, pod))
    yield from _invented(request, csr, pod)
    for against in _against(request, csr, rules, world):
        # a denial would force a running pod's owner to delete it, where a corrected policy would be enough
        yield against if pod.phase == "Pending" else Later(against.reason)


def csr_or_problem(request: PodRequest) -> CsrData | Hostile:
    """Return the CSR, or why it is hostile: it must have no names, as every kubelet's has none."""
    csr = read_csr(request.pem)
    if isinstance(csr, OddRequestError):
        return Hostile(str(csr))
    if csr.subject or csr.sans:
        return Hostile("the CSR has names, and a kubelet's has none", message="the CSR has to be empty")
    return csr


def key_of(csr: CsrData) -> str:
    """Return our name for the key's algorithm."""
    return _CURVE_NAMES.get(csr.key, csr.key)


def _absent(request: PodRequest, world: PodWorld, pod: PodState) -> Iterator[str]:
    """Reasons why no pod waits for the answer now; the pod may come later, or the cluster deletes the request."""
    name, entry = request.node, world.entry
    if pod.uid != request.pod_uid:
        yield "another pod has this name by now"
    if pod.phase not in {"Pending", "Running"}:
        yield f"the pod has ended ({one_line(pod.phase)})"
    if pod.ends is not None and pod.ends <= world.now:
        yield "the pod was deleted, and its grace period is over"
    if world.account_uid != request.service_account_uid:
        yield "the service account was deleted, or made again"
    if world.node_uid != request.node_uid:
        yield f"node {name} was deleted, or made again"
    if entry is not None and entry.blocked:
        yield f"the inventory blocks node {name}"
    if not any(fnmatchcase(name, pattern) for pattern in world.policy.allow.nodes):
        yield f"the policy's allow.nodes does not have {name}"
    if not any(fnmatchcase(world.cluster, pattern) for pattern in world.policy.allow.clusters):
        yield f"the policy's allow.clusters does not have this cluster, {world.cluster}"
    if world.now - world.created > _OLDEST:
        yield "the request is too old: the kubelet has another one by now, or soon; or this machine's clock is ahead"


def _invented(request: PodRequest, csr: CsrData, pod: PodState) -> Iterator[Hostile]:
    """Mismatches with the pod: NodeRestriction checks no lifetime, key or annotation, and only requests of nodes."""
    if (pod.node, pod.service_account) != (request.node, request.service_account):
        yield _open("the pod has another node or service account")
    if KEY_TYPES.get(key_of(csr), "") not in pod.key_types:
        yield _open("the pod has no volume with this signer, key type, lifetime and annotations")


def _against(request: PodRequest, csr: CsrData, rules: PodSignerRules, world: PodWorld) -> Iterator[Hostile]:
    """Reasons to deny a new pod's request, with messages for the pod's owner."""
    if key_of(csr) not in rules.keys:
        types = ", ".join(KEY_TYPES[key] for key in rules.keys)
        yield Hostile(f"key: {key_of(csr)}", "UnsupportedKeyType", f"keyType: this signer takes {types}")
    for key, value in request.annotations:
        if key not in rules.annotations:
            yield Hostile(f"annotation {one_line(key)}", "InvalidUnverifiedUserAnnotations",
                          f"userAnnotations: this signer does not know {one_line(key, 100)}")  # fmt: skip
        elif not fnmatchcase(value, rules.annotations[key]):
            yield Hostile(f"annotation {one_line(key)}: its value", "InvalidUnverifiedUserAnnotations",
                          f"userAnnotations: the value of {one_line(key, 100)} is not allowed")  # fmt: skip
    if not _has_namespace(request, rules, world):
        yield _open(f"namespace {request.namespace} may not have certificates of this signer")
    if not any(fnmatchcase(request.service_account, pattern) for pattern in rules.service_accounts):
        yield _open(f"service account {request.service_account} may not have certificates of this signer")
    if timedelta(seconds=request.seconds) < rules.least:
        yield _open(f"maxExpirationSeconds: this signer's CA needs at least {rules.least.total_seconds():.0f}")
    if not rules.trust_domain and _identity(request, rules) is None:
        account = f"service account {request.service_account} of {request.namespace}"
        yield _open(f"this signer has no names for {account}")


def _open(reason: str) -> Hostile:
    """Return a denial whose reason the pod's owner may read."""
    return Hostile(reason, message=reason)


def _has_namespace(request: PodRequest, rules: PodSignerRules, world: PodWorld) -> bool:
    by_name = not rules.namespaces or any(fnmatchcase(request.namespace, pattern) for pattern in rules.namespaces)
    return by_name and all(world.labels.get(key) == value for key, value in rules.namespace_labels.items())


def _identity(request: PodRequest, rules: PodSignerRules) -> Identity | None:
    """Return the first identity that lists this service account."""
    for _, identity in rules.identities:
        in_namespace = any(fnmatchcase(request.namespace, pattern) for pattern in identity.namespaces)
        if in_namespace and any(fnmatchcase(request.service_account, pattern) for pattern in identity.service_accounts):
            return identity
    return None
