"""Bundles: what is carried between a node and a CA desk (pure); no field of theirs would fit a private key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from bridge import dataclass
from bridge.contract import Continuity, Issued, SignRequest
from bridge.errors import BridgeError
from bridge.specs import EKU, SPECS, USER, CertificateSpec, is_pair_name, pair_spec
from bridge.words import one_line

#: In version 2 the continuity proofs cover the validity and the time as well.
REQUEST_VERSIONS = (1, 2)

#: Certificates that bundles may ask for: kubeadm's, and a user's in its own bundle; and further pairs of a node.
CARRIED: Mapping[str, CertificateSpec] = {**SPECS, USER.name: USER}

LONGEST_TEXT = 2000

#: What a door takes. A control plane's with keys of 4096 bits has 70,000, and 4,600 for each further pair; of a node's
#: junk beside a good request each byte may take 35 of memory.
LARGEST_REQUEST_BYTES = 256 << 10


def is_carried(name: object) -> bool:
    """Whether a bundle may ask for a certificate of this name."""
    return isinstance(name, str) and (name in CARRIED or is_pair_name(name))


class BundleError(BridgeError):
    """A bundle is not as it should be."""

    hint = "carry it again, unchanged; if that does not help, it was changed on the way"

    def __init__(self, field: str, wanted: str, found: str, *, hint: str | None = None) -> None:
        self.field = field  #: Such as `requests[2].csr`; empty for the bundle as a whole.
        self.wanted = wanted
        self.found = found
        super().__init__(f"{field or 'bundle'}: wanted {wanted}, found {found}", hint=hint)

    def __reduce__(self) -> tuple[object, ...]:
        """A worker process sends it."""
        return type(self), (self.field, self.wanted, self.found), self.__dict__


class IncompleteBundleError(BundleError):
    """It is no JSON document yet: the file may still be being copied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BundledRequest:
    """One certificate that is asked for."""

    name: str  #: kubeadm's, or `user`: one of `CARRIED`; or a further pair's.
    authority: str
    ekus: frozenset[EKU]
    validity: timedelta  #: Wanted; whole seconds.
    csr: x509.CertificateSigningRequest
    replaces: x509.Certificate | None
    proof: bytes | None  #: See `bridge.pki.signatures`.

    @property
    def spec(self) -> CertificateSpec:
        """From our table; a further pair's CA and usages are the request's, and the desk's policy judges them."""
        return CARRIED.get(self.name) or pair_spec(self.name, self.authority, self.ekus)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestBundle:
    """One node's requests."""

    batch: str  #: 32 hex digits, another for each set of requests.
    node: str
    cluster: str
    created: datetime  #: UTC, whole seconds.
    requests: tuple[BundledRequest, ...]  #: Each name once.
    version: int = REQUEST_VERSIONS[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a desk did not sign."""

    reason: str  #: One line for people.


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerBundle:
    """A desk's answers to one request bundle, by name; authorities that the desk does not sign for are left out."""

    request_digest: str  #: `digest` of the request bundle.
    batch: str
    node: str
    cluster: str
    signer: str  #: For people: which desk, which backend, who approved it.
    signed: datetime  #: UTC, whole seconds.
    answers: Mapping[str, Issued | Refusal]
    signature: bytes | None = None  #: The desk's, over `answer_message`; None: the desk signs no answers.


Bundle = RequestBundle | AnswerBundle


def bundle_of(requests: Sequence[SignRequest], created: datetime) -> RequestBundle:
    """A bundle of one batch; `created` is used for requests of an earlier version, which have no time."""
    batches = {
        (who.batch, who.node, who.cluster, who.asked) for request in requests if (who := request.continuity) is not None
    }
    if len(batches) != 1 or any(request.continuity is None for request in requests):
        raise ValueError(f"wanted requests of one batch, found {len(batches)}")
    [(batch, node, cluster, proven_at)] = batches
    return RequestBundle(
        batch=batch,
        node=node,
        cluster=cluster,
        created=(proven_at or created).astimezone(UTC).replace(microsecond=0),
        version=1 if proven_at is None else 2,
        requests=tuple(
            BundledRequest(
                name=request.spec.name,
                authority=request.spec.authority.name,
                ekus=request.spec.ekus,
                validity=timedelta(seconds=int(request.validity.total_seconds())),
                csr=request.csr,
                replaces=request.replaces,
                proof=request.continuity.proof if request.continuity is not None else None,
            )
            for request in requests
        ),
    )


def sign_request(request: BundledRequest, bundle: RequestBundle) -> SignRequest:
    """The request for a backend; EKUs and authority of kubeadm's come from our table, not from the bundle."""
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
            asked=bundle.created if bundle.version > 1 else None,
        ),
    )
    vars(result)["csr"] = request.csr  # parsed already, and so are its extensions
    return result


def refusal(reason: str) -> Refusal:
    """A refusal whose reason, from any text, can be carried and shown."""
    return Refusal(reason=one_line(reason, LONGEST_TEXT) or "no reason was given")
