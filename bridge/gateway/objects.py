"""CertificateSigningRequest objects of certificates.k8s.io/v1: what one says, and what is written into it (pure)."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

from cryptography import x509
from cryptography.x509.oid import NameOID

from bridge.gateway.signer_policy import Request
from bridge.pki.certificates import attributes

_CN = NameOID.COMMON_NAME.dotted_string
COLLECTION = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
APPROVED, DENIED, FAILED = "Approved", "Denied", "Failed"
PENDING_AT_CA = "PendingAtCA"
#: Ours, for whoever looks; nothing in an object is secret, and nothing of the policy is in one.
ALLOWS, NOT_ALLOWED, NOT_ANSWERED, WAITS = "PolicyAllows", "NotAllowed", "NotAnswered", "Waiting"

#: A request of 16 KiB in base64, conditions and a chain are far below; nobody else's words are kept.
LONGEST_OBJECT_BYTES = 64 << 10
#: What Python needs for one besides its texts, about.
_OBJECT_BYTES = 4 << 10
_MOST_GROUPS = 200


class NotAnObjectError(ValueError):
    """The object is not in the shape that the API server gives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SigningRequest:
    """One object, as it was at one resourceVersion."""

    name: str
    uid: str
    version: str  #: metadata.resourceVersion
    created: datetime
    request: Request
    conditions: tuple[Mapping[str, Any], ...] = field(repr=False)
    certificate: str  #: Base64 of PEM; empty: there is none.
    size: int  #: In memory, about.

    def has(self, kind: str) -> bool:
        """Whether it has a condition that is true."""
        return any(one.get("type") == kind and one.get("status") == "True" for one in self.conditions)

    @property
    def is_settled(self) -> bool:
        """Whether nothing more is to be written into it."""
        return bool(self.certificate) or self.has(DENIED) or self.has(FAILED)

    @property
    def age_key(self) -> tuple[datetime, int]:
        """A key to sort by age: of two the newer one's is greater."""
        return self.created, int(self.version) if self.version.isdecimal() else 0

    @property
    def path(self) -> str:
        """The object's path; its name is the requester's choice."""
        return f"{COLLECTION}/{quote(self.name, safe='')}"


def parse(document: Any, size: int) -> SigningRequest:
    """
    Read an object.

    Args:
        document: From JSON.
        size: Of the JSON, in bytes.

    Raises:
        NotAnObjectError: It is none.
    """
    try:
        metadata, spec, status = document["metadata"], document["spec"], document.get("status") or {}
        seconds = spec.get("expirationSeconds")
        request = Request(
            signer=_text(spec["signerName"]),
            username=_text(spec.get("username", "")),
            groups=frozenset(_texts(spec.get("groups"))[:_MOST_GROUPS]),
            usages=frozenset(_texts(spec.get("usages"))),
            asked_validity=timedelta(seconds=seconds) if isinstance(seconds, int) and seconds > 0 else None,
            pem=base64.b64decode(_text(spec["request"]), validate=True),
        )
        conditions = tuple(one for one in status.get("conditions") or () if isinstance(one, dict))
        return SigningRequest(
            name=_text(metadata["name"]),
            uid=_text(metadata["uid"]),
            version=_text(metadata["resourceVersion"]),
            created=datetime.fromisoformat(_text(metadata["creationTimestamp"])),
            request=request,
            conditions=conditions,
            certificate=_text(status.get("certificate") or ""),
            size=size + _OBJECT_BYTES,
        )
    except (KeyError, TypeError, AttributeError, ValueError, binascii.Error, OverflowError) as e:
        raise NotAnObjectError(f"{type(e).__name__}") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise NotAnObjectError("not a text")
    return value


def _texts(value: Any) -> list[str]:
    return [_text(one) for one in value or []]


def decoded(certificate: str) -> bytes:
    """
    `status.certificate` as PEM.

    Raises:
        ValueError: It is not base64.
    """
    return base64.b64decode(certificate, validate=True)


def cn_of(certificate: x509.Certificate) -> str:
    """A certificate's CN; empty if it has none."""
    return next((value for oid, value in attributes(certificate.subject) if oid == _CN), "")


def is_ready(node: Mapping[str, Any]) -> bool:
    """Whether a Node object has the condition `Ready`; when in doubt it has."""
    status = node.get("status")
    conditions = status.get("conditions") if isinstance(status, dict) else None
    ready = [one for one in conditions or () if isinstance(one, dict) and one.get("type") == "Ready"]
    return not ready or any(one.get("status") == "True" for one in ready)


# --- what is written: always with uid and resourceVersion, or it could land on a namesake -----------------------------


def approved(one: SigningRequest, now: datetime) -> dict[str, Any]:
    """The body for /approval."""
    return _conditions(one, [*one.conditions, _condition(APPROVED, ALLOWS, "allowed by ca-bridge's policy", now)])


def denied(one: SigningRequest, now: datetime) -> dict[str, Any]:
    """The body for /approval of a request that nobody has approved."""
    return _conditions(one, [*_without_ours(one), _condition(DENIED, NOT_ALLOWED, "not allowed", now)])


def failed(one: SigningRequest, reason: str, now: datetime) -> dict[str, Any]:
    """The body for /status of a request that somebody has approved, or whose CA has not answered."""
    text = {NOT_ALLOWED: "not allowed", NOT_ANSWERED: "the CA has not answered in time"}[reason]
    return _conditions(one, [*_without_ours(one), _condition(FAILED, reason, text, now)])


def waiting(one: SigningRequest, now: datetime) -> dict[str, Any]:
    """The body for /status while a CA has the request, and answers later."""
    condition = _condition(PENDING_AT_CA, WAITS, "the CA has the request and answers later", now)
    return _conditions(one, [*_without_ours(one), condition])


def issued(one: SigningRequest, chain_pem: bytes) -> dict[str, Any]:
    """The body for /status with the certificate; the leaf comes first."""
    status: dict[str, Any] = {"certificate": base64.b64encode(chain_pem).decode("ascii")}
    if one.has(PENDING_AT_CA):
        status["conditions"] = _without_ours(one)
    return {"metadata": _identity(one), "status": status}


def _identity(one: SigningRequest) -> dict[str, str]:
    return {"uid": one.uid, "resourceVersion": one.version}


def _without_ours(one: SigningRequest) -> list[Mapping[str, Any]]:
    return [condition for condition in one.conditions if condition.get("type") != PENDING_AT_CA]


def _conditions(one: SigningRequest, conditions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A merge patch replaces the whole list, so that the others' are in it as they were."""
    return {"metadata": _identity(one), "status": {"conditions": list(conditions)}}


def _condition(kind: str, reason: str, message: str, now: datetime) -> dict[str, str]:
    time = now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "type": kind,
        "status": "True",
        "reason": reason,
        "message": message,
        "lastUpdateTime": time,
        "lastTransitionTime": time,
    }
