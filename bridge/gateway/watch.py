"""
CertificateSigningRequest objects (certificates.k8s.io/v1): reading one, and watching all, one a line, for a few minutes
at a time, so that withdrawn rights take effect and missed objects come again.
"""

from __future__ import annotations

import base64
import binascii
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import quote, urlencode

from bridge.cluster.api import Api, Lines, NoAnswerError
from bridge.gateway.policy import Request
from bridge.pki.budget import Budget, json_of

COLLECTION = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
APPROVED, DENIED, FAILED = "Approved", "Denied", "Failed"
PENDING_AT_CA = "PendingAtCA"
#: The reason of kube-controller-manager's approvals (pkg/controller/certificates/approver/sarapprove.go).
AUTO_APPROVED = "AutoApproved"
#: Our conditions and reasons; every user may read an object, so none holds any part of the policy.
ALLOWS, NOT_ALLOWED, NOT_ANSWERED, WAITS = "PolicyAllows", "NotAllowed", "NotAnswered", "Waiting"

#: A request of 16 KiB in base64, conditions and a chain are far below.
LONGEST_OBJECT_BYTES = 64 << 10
#: Python needs about so much for an object besides its texts.
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
    is_deleted: bool  #: An administrator deleted it; finalizers keep it.
    size: int  #: In memory, about.

    def has(self, kind: str) -> bool:
        """Whether it has a condition that is true."""
        return any(self._true(kind))

    def _true(self, kind: str) -> Iterator[Mapping[str, Any]]:
        return (one for one in self.conditions if one.get("type") == kind and one.get("status") == "True")

    @property
    def is_approved_by_person(self) -> bool:
        """Whether it was approved, and not by kube-controller-manager, which approves whatever RBAC lets a node ask for."""
        return any(one.get("reason") != AUTO_APPROVED for one in self._true(APPROVED))

    @property
    def is_settled(self) -> bool:
        """Whether nothing more is to be written into it."""
        return self.is_deleted or bool(self.certificate) or self.has(DENIED) or self.has(FAILED)

    @property
    def age_key(self) -> tuple[datetime, int]:
        """A key to sort by age: a newer object's is greater."""
        return self.created, int(self.version) if self.version.isdecimal() else 0

    @property
    def path(self) -> str:
        """The object's path; its name is the requester's choice."""
        return f"{COLLECTION}/{quote(self.name, safe='')}"


def parse(document: Any, size: int) -> SigningRequest:
    """Read an object from JSON of so many bytes."""
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
            is_deleted=bool(metadata.get("deletionTimestamp")),
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
    """`status.certificate` as PEM."""
    return base64.b64decode(certificate, validate=True)


#: A bookmark comes each minute, so that a longer silence is a dead connection.
SILENCE_SECONDS = 90.0
ROUND_SECONDS = 300
#: After so long without an event all objects were read that existed when the round began.
_QUIET_SECONDS = 2.0


class Watch:
    """One round of watching; `end` is for another thread."""

    def __init__(self, api: Api, signers: Iterable[str]) -> None:
        self._api = api
        #: An object without the text of one of these names is not read.
        self._wanted = {signer: json.dumps(signer).encode() for signer in signers}
        self._lines: Lines | None = None
        self._mutex = threading.Lock()
        self._ended = False
        self._heard: float | None = None  #: When something came for the last time.
        self._has_seen_all = False
        self.began = time.monotonic()
        self.left_out = 0  #: Objects that were too large.

    def run(
        self, changed: Callable[[SigningRequest], None], gone: Callable[[str], None], alive: Callable[[], None]
    ) -> None:
        """Watch for one round, until the server ends it or `end` is called."""
        query = urlencode({"watch": 1, "allowWatchBookmarks": "true", "timeoutSeconds": ROUND_SECONDS})
        with self._api.lines(f"{COLLECTION}?{query}", SILENCE_SECONDS, LONGEST_OBJECT_BYTES) as lines:
            with self._mutex:
                if self._ended:
                    return
                self._lines = lines
            try:
                alive()
                self._heard = time.monotonic()
                for line in lines:
                    self._heard = time.monotonic()
                    alive()
                    self._event(line, changed, gone)
            except NoAnswerError:
                if not self._ended:
                    raise
            finally:
                self._lines = None
                self.left_out += lines.left_out

    def _event(self, line: bytes, changed: Callable[[SigningRequest], None], gone: Callable[[str], None]) -> None:
        if not any(name in line for name in self._wanted.values()):
            if b'"ERROR"' in line[:40]:
                raise NoAnswerError("the API server ended the watch with an error; it is begun anew")
            if b'"BOOKMARK"' in line[:40]:  # comes after all that existed
                self._has_seen_all = True
            return
        try:
            event = json_of(line, Budget(len(line)))
            kind, document = event["type"], event["object"]
            if kind not in {"ADDED", "MODIFIED", "DELETED"}:
                return
            found = parse(document, len(line))
        except (ValueError, KeyError, TypeError, NotAnObjectError):
            return
        if found.request.signer not in self._wanted:
            return
        if kind == "DELETED":
            gone(found.uid)
        else:
            changed(found)

    def has_seen_all(self) -> bool:
        """Whether this round has got to the end of the objects that existed when it began."""
        if self._heard is not None and time.monotonic() - self._heard > _QUIET_SECONDS:
            self._has_seen_all = True
        return self._has_seen_all

    def end(self) -> None:
        """End the round."""
        self._ended = True
        with self._mutex:
            if self._lines is not None:
                self._lines.end()
