"""Which of the gateway's rights the API server gives us: it is asked (SelfSubjectAccessReview), and nothing is tried."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus

from bridge.cluster.api import Api
from bridge.errors import BridgeError, Exit
from bridge.settings.gateway import GatewaySettings

_REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
_CERTIFICATES, _REQUESTS = "certificates.k8s.io", "certificatesigningrequests"


class ApiRefusesError(BridgeError):
    """The API server answers, and does not let us do what the gateway has to do."""

    exit_code = Exit.REFUSED
    hint = "docs/gateway.md names the rights that the gateway needs, and `ca-bridge setup kubernetes` prints them"


@dataclass(frozen=True, slots=True, kw_only=True)
class Right:
    """One verb on one kind of object."""

    verb: str
    group: str
    resource: str
    subresource: str = ""
    name: str = ""
    namespace: str = ""

    def __str__(self) -> str:
        """The right as a message has it."""
        what = f"{self.resource}/{self.subresource}" if self.subresource else self.resource
        return " ".join(filter(None, (self.verb, what, self.name)))

    @property
    def attributes(self) -> Mapping[str, str]:
        """The attributes as a review has them."""
        found = {
            "verb": self.verb, "group": self.group, "resource": self.resource, "subresource": self.subresource,
            "name": self.name, "namespace": self.namespace,
        }  # fmt: skip
        return {key: value for key, value in found.items() if value}


def needed(signers: Sequence[str], settings: GatewaySettings) -> Iterator[Right]:
    """The rights that docs/gateway.md names, but for that to create the lease, which may be there already (pure)."""
    for verb in ("get", "list", "watch"):
        yield Right(verb=verb, group=_CERTIFICATES, resource=_REQUESTS)
    for subresource in ("approval", "status"):
        yield Right(verb="patch", group=_CERTIFICATES, resource=_REQUESTS, subresource=subresource)
    for signer in signers:
        for verb in ("approve", "sign"):
            yield Right(verb=verb, group=_CERTIFICATES, resource="signers", name=signer)
    yield Right(verb="get", group="", resource="nodes")
    if settings.lease:
        for verb in ("get", "update"):
            yield Right(
                verb=verb,
                group="coordination.k8s.io",
                resource="leases",
                name=settings.lease_name,
                namespace=settings.lease_namespace,
            )


def assert_given(api: Api, rights: Iterator[Right]) -> None:
    """
    Ask for each.

    Raises:
        NoAnswerError: The API server does not answer.
        ApiRefusesError: Some are missing; all of these are named.
    """
    missing = [str(right) for right in rights if not _is_given(api, right)]
    if missing:
        raise ApiRefusesError(f"{api.server}: wanted the right to {', to '.join(missing)}, found that it is missing")


def _is_given(api: Api, right: Right) -> bool:
    """A signer's may be given for all of its domain, too, as the API server has it."""
    names = [right.name]
    if right.resource == "signers":
        names.append(f"{right.name.partition('/')[0]}/*")
    return any(_is_allowed(api, {**right.attributes, **({"name": name} if name else {})}) for name in names)


def _is_allowed(api: Api, attributes: Mapping[str, str]) -> bool:
    kind = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview"}
    reply = api.ask("POST", _REVIEWS, {**kind, "spec": {"resourceAttributes": attributes}})
    status = reply.document.get("status")
    if reply.status != HTTPStatus.CREATED or not isinstance(status, dict):
        raise ApiRefusesError(
            f"{api.server}: wanted to ask which rights we have, found HTTP {reply.status} {reply.message}"
        )
    return status.get("allowed") is True
