"""Bundles: requests and answers between a node and a CA desk (pure); no field of theirs would fit a private key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from bridge.contract import Continuity, Issued, SignRequest
from bridge.errors import BridgeError
from bridge.specs import EKU, SPECS, USER, CertificateSpec, is_pair_name, pair_spec
from bridge.words import one_line

#: Certificates that bundles may request: kubeadm's, and a user's in its own bundle; further pairs come in addition.
CARRIED: Mapping[str, CertificateSpec] = {**SPECS, USER.name: USER}

LONGEST_TEXT = 2000

#: The largest bundle that a door accepts. A control plane's with keys of 4096 bits has 70,000 bytes, and 4,600 more for
#: each further pair; each byte of junk beside a node's good request may take 35 bytes of memory.
LARGEST_REQUEST_BYTES = 256 << 10


def is_carried(name: object) -> bool:
    """Whether a bundle may request a certificate of this name."""
    return isinstance(name, str) and (name in CARRIED or is_pair_name(name))


class BundleError(BridgeError):
    """A bundle is invalid."""

    hint = "carry it again, unchanged; if that does not help, it was changed on the way"

    def __init__(self, field: str, wanted: str, found: str, *, hint: str | None = None) -> None:
        self.field = field  #: Such as `requests[2].csr`; empty for the whole bundle.
        self.wanted = wanted
        self.found = found
        super().__init__(f"{field or 'bundle'}: wanted {wanted}, found {found}", hint=hint)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle it, since a worker process sends it."""
        return type(self), (self.field, self.wanted, self.found), self.__dict__


class IncompleteBundleError(BundleError):
    """The file is not a JSON document yet: it may still be being copied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BundledRequest:
    """A request for one certificate."""

    name: str  #: A name in `CARRIED` (kubeadm's, or `user`), or a further pair's.
    authority: str
    ekus: frozenset[EKU]
    validity: timedelta  #: The requested validity, in whole seconds.
    csr: x509.CertificateSigningRequest
    replaces: x509.Certificate | None
    proof: bytes | None  #: See `bridge.pki.signatures`.

    @property
    def spec(self) -> CertificateSpec:
        """The spec; a further pair's CA and usages are the request's, and the desk's policy checks them."""
        return CARRIED.get(self.name) or pair_spec(self.name, self.authority, self.ekus)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestBundle:
    """One node's requests."""

    batch: str  #: 32 hex digits, different for each set of requests.
    node: str
    cluster: str
    created: datetime  #: UTC, whole seconds.
    requests: tuple[BundledRequest, ...]  #: No name occurs twice.


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A desk's reason not to sign."""

    reason: str  #: One line for the operator.


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerBundle:
    """A desk's answers to one request bundle, by name; it leaves out authorities that the desk does not sign for."""

    request_digest: str  #: `digest` of the request bundle.
    batch: str
    node: str
    cluster: str
    signer: str  #: For people: the desk, its backend, and the approver.
    signed: datetime  #: UTC, whole seconds.
    answers: Mapping[str, Issued | Refusal]
    signature: bytes | None = None  #: The desk's signature over `answer_message`; None: the desk signs no answers.


Bundle = RequestBundle | AnswerBundle


def bundle_of(requests: Sequence[SignRequest]) -> RequestBundle:
    """Bundle the requests of one batch."""
    known = [(request, request.continuity) for request in requests if request.continuity is not None]
    batches = {(who.batch, who.node, who.cluster, who.asked) for _, who in known}
    if len(batches) != 1 or len(known) != len(requests):
        raise ValueError(f"wanted requests of one batch, found {len(batches)}")
    [(batch, node, cluster, created)] = batches
    return RequestBundle(
        batch=batch,
        node=node,
        cluster=cluster,
        created=created.astimezone(UTC).replace(microsecond=0),
        requests=tuple(
            BundledRequest(
                name=request.spec.name,
                authority=request.spec.authority.name,
                ekus=request.spec.ekus,
                validity=timedelta(seconds=int(request.validity.total_seconds())),
                csr=request.csr,
                replaces=request.replaces,
                proof=who.proof,
            )
            for request, who in known
        ),
    )


def sign_request(request: BundledRequest, bundle: RequestBundle) -> SignRequest:
    """The request for a backend; kubeadm certificates' EKUs and authority are our table's, not the bundle's."""
    result = SignRequest(
        spec=request.spec,
        csr_pem=request.csr.public_bytes(Encoding.PEM),
        validity=request.validity,
        replaces=request.replaces,
        continuity=Continuity(
            batch=bundle.batch,
            node=bundle.node,
            cluster=bundle.cluster,
            proof=request.proof,
            asked=bundle.created,
        ),
    )
    vars(result)["csr"] = request.csr  # it is parsed already, and so are its extensions
    return result


def refusal(reason: str) -> Refusal:
    """Make a refusal whose reason, from any text, can be carried and displayed."""
    return Refusal(reason=one_line(reason, LONGEST_TEXT) or "no reason was given")
