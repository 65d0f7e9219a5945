"""
Objects that ask for a certificate (certificates.k8s.io): read one, or watch all of a kind, a few minutes at a time, so
that withdrawn rights take effect and missed objects come again.
"""

from __future__ import annotations

import base64
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from http import HTTPStatus
from typing import Any
from urllib.parse import quote, urlencode

from bridge.cluster import items
from bridge.cluster.api import Api, Lines, NoAnswerError
from bridge.gateway.pod_policy import USUAL_SECONDS, PodRequest
from bridge.gateway.policy import Request
from bridge.pki.budget import Budget, json_of

log = logging.getLogger("ca-bridge")

GROUP = "/apis/certificates.k8s.io/v1"
CSRS, PODS = "certificatesigningrequests", "podcertificaterequests"
#: The version of PodCertificateRequests and ClusterTrustBundles in Kubernetes 1.36, if they are turned on there.
BETA_GROUP = "/apis/certificates.k8s.io/v1beta1"
COLLECTION = f"{GROUP}/{CSRS}"
APPROVED, DENIED, FAILED = "Approved", "Denied", "Failed"
PENDING_AT_CA = "PendingAtCA"
#: The reason in kube-controller-manager's approvals (pkg/controller/certificates/approver/sarapprove.go).
AUTO_APPROVED = "AutoApproved"
#: The reasons of our conditions; other users may read them, so they tell nothing of the policy.
ALLOWS, NOT_ALLOWED, NOT_ANSWERED, WAITS = "PolicyAllows", "NotAllowed", "NotAnswered", "Waiting"

#: Far more than a request of 16 KiB in base64 with conditions and a chain.
LONGEST_OBJECT_BYTES = 64 << 10
#: About what Python needs for an object besides its texts.
_OBJECT_BYTES = 4 << 10
#: The same for each of a requester's groups (a company's directory may give hundreds, and a grant may name the last)
#: and of a pod's annotations, which its users choose.
_TEXT_BYTES = 150


def quoted(name: str) -> str:
    """Quote a name as a segment of a path."""
    return quote(name, safe="")


class NotAnObjectError(ValueError):
    """The object does not have the API server's shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiObject:
    """The fields of both kinds of objects, at one resourceVersion."""

    name: str
    uid: str
    version: str  #: metadata.resourceVersion
    created: datetime
    conditions: tuple[Mapping[str, Any], ...] = field(repr=False)
    certificate: str  #: Base64 of PEM (PEM itself in a PodCertificateRequest); empty: none.
    is_deleted: bool  #: It has a deletionTimestamp, and only finalizers keep it.
    size: int  #: About its bytes in memory.

    def has(self, kind: str) -> bool:
        """Whether a condition of this type is true."""
        return any(self._true(kind))

    def _true(self, kind: str) -> Iterator[Mapping[str, Any]]:
        return (each for each in self.conditions if each.get("type") == kind and each.get("status") == "True")

    @property
    def is_finished(self) -> bool:
        """Whether it has a certificate, was denied, has failed or was deleted; then we write nothing more into it."""
        return self.is_deleted or bool(self.certificate) or self.has(DENIED) or self.has(FAILED)

    @property
    def age_key(self) -> tuple[datetime, int]:
        """A sort key by age; a newer object has a greater one."""
        return self.created, int(self.version) if self.version.isdecimal() else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SigningRequest(ApiObject):
    """A CertificateSigningRequest."""

    request: Request

    @property
    def is_approved_by_person(self) -> bool:
        """Whether anyone but kube-controller-manager approved it, which approves all that RBAC lets a node ask for."""
        return any(approval.get("reason") != AUTO_APPROVED for approval in self._true(APPROVED))

    @property
    def path(self) -> str:
        """The object's path; its name is the requester's choice."""
        return f"{COLLECTION}/{quoted(self.name)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PodObject(ApiObject):
    """A PodCertificateRequest."""

    request: PodRequest
    group: str = GROUP  #: The API group and version in which it was read.

    @property
    def path(self) -> str:
        """The object's path; its name is the requester's choice."""
        return f"{self.group}/namespaces/{quoted(self.request.namespace)}/{PODS}/{quoted(self.name)}"


AnyObject = SigningRequest | PodObject


def parse(document: Any, size: int) -> SigningRequest:
    """Read a CertificateSigningRequest; `size` is the length of its JSON in bytes."""
    try:
        spec, status = document["spec"], document.get("status") or {}
        seconds, groups = spec.get("expirationSeconds"), _texts(spec.get("groups"))
        request = Request(
            signer=_text(spec["signerName"]),
            username=_text(spec.get("username", "")),
            groups=frozenset(groups),
            usages=frozenset(_texts(spec.get("usages"))),
            asked_validity=timedelta(seconds=seconds) if isinstance(seconds, int) and seconds > 0 else None,
            pem=base64.b64decode(_text(spec["request"]), validate=True),
        )
        certificate = _text(status.get("certificate") or "")
        common = _common(document, size + _TEXT_BYTES * len(groups))
        return SigningRequest(request=request, certificate=certificate, **common)
    except _MALFORMED as e:
        raise NotAnObjectError(f"{type(e).__name__}") from None


def parse_pod(document: Any, size: int) -> PodObject:
    """Read a PodCertificateRequest; objects without a CSR, which old kubelets make in v1beta1, are malformed here."""
    try:
        spec, status = document["spec"], document.get("status") or {}
        der = base64.b64decode(_text(spec["stubPKCS10Request"]), validate=True)
        annotations = spec.get("unverifiedUserAnnotations") or {}
        request = PodRequest(
            signer=_text(spec["signerName"]),
            namespace=_text(document["metadata"]["namespace"]),
            pod=_text(spec["podName"]),
            pod_uid=_text(spec["podUID"]),
            service_account=_text(spec["serviceAccountName"]),
            service_account_uid=_text(spec["serviceAccountUID"]),
            node=_text(spec["nodeName"]),
            node_uid=_text(spec["nodeUID"]),
            seconds=int(spec.get("maxExpirationSeconds") or USUAL_SECONDS),
            annotations=tuple(sorted((_text(key), _text(value)) for key, value in annotations.items())),
            pem=b"-----BEGIN CERTIFICATE REQUEST-----\n%b-----END CERTIFICATE REQUEST-----\n" % base64.encodebytes(der),
        )
        certificate = _text(status.get("certificateChain") or "")
        group = BETA_GROUP if document.get("apiVersion") == BETA_GROUP.removeprefix("/apis/") else GROUP
        common = _common(document, size + _TEXT_BYTES * len(annotations))
        return PodObject(request=request, certificate=certificate, group=group, **common)
    except _MALFORMED as e:
        raise NotAnObjectError(f"{type(e).__name__}") from None


_MALFORMED = (KeyError, TypeError, AttributeError, ValueError, OverflowError)


def _common(document: Any, size: int) -> dict[str, Any]:
    """Return the fields of both kinds of objects, except the certificate."""
    metadata, status = document["metadata"], document.get("status") or {}
    return {
        "name": _text(metadata["name"]),
        "uid": _text(metadata["uid"]),
        "version": _text(metadata["resourceVersion"]),
        "created": datetime.fromisoformat(_text(metadata["creationTimestamp"])),
        "conditions": tuple(each for each in status.get("conditions") or () if isinstance(each, dict)),
        "is_deleted": bool(metadata.get("deletionTimestamp")),
        "size": size + _OBJECT_BYTES,
    }


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise NotAnObjectError("not a text")
    return value


def _texts(value: Any) -> list[str]:
    return [_text(text) for text in value or []]


def chain_of(request: AnyObject) -> bytes:
    """Return an object's certificates as PEM."""
    if isinstance(request, PodObject):
        return request.certificate.encode()
    return base64.b64decode(request.certificate, validate=True)


#: A bookmark comes each minute, so a longer silence means a dead connection.
SILENCE_SECONDS = 90.0
ROUND_SECONDS = 300
#: After this long without an event, the round has read all objects that existed when it began.
_QUIET_SECONDS = 2.0


def served(api: Api, resource: str) -> str:
    """Return the API group and version that serves a resource: v1, or else v1beta1 (NoAnswerError: neither)."""
    for group in (GROUP, BETA_GROUP):
        reply = api.ask("GET", group)
        if reply.status == HTTPStatus.FORBIDDEN:  # we may not list the resources, and v1 is the usual version
            return GROUP
        if any(item.get("name") == resource for item in items(reply.document, "resources")):
            return group
    wanted = f"wanted {resource} in certificates.k8s.io/v1 (Kubernetes 1.37) or v1beta1 (1.36, where it is turned on)"
    raise NoAnswerError(f"{api.server}: {wanted}, found neither", hint="docs/pod-certificates.md names the flags")


class Watch:
    """Watches all objects of some signers, round after round, in one thread; others may call `end` and read fields."""

    def __init__(self, api: Api, signers: Sequence[str], *, of_pods: bool = False) -> None:
        """With `of_pods` there is one signer, and the server filters: pods' requests stay for a quarter of an hour."""
        self._api = api
        self._of_pods = of_pods
        self.signers = signers
        self.what = f"requests of pods for {signers[0]}" if of_pods else "requests"
        #: A line without any of these texts is not parsed.
        self._wanted = {signer: json.dumps(signer).encode() for signer in signers}
        self._lines: Lines | None = None
        self._mutex = threading.Lock()
        self._ended = self._has_seen_all = False
        self.began = math.inf  #: When the current or last round began.
        self.left_out = 0  #: How many objects of this round were too large.
        self.alive = time.monotonic()  #: When the last line arrived.
        self.trouble = "the API server was not asked yet"

    def run(self, changed: Callable[[AnyObject], None], deleted: Callable[[str], None]) -> None:
        """
        Watch for one round, until the server ends it or `end` is called: `changed` gets each object in its current
        version, and `deleted` the uid of each object that was deleted.
        """
        self._ended = self._has_seen_all = False
        self.began, self.left_out = time.monotonic(), 0
        query = {"watch": 1, "allowWatchBookmarks": "true", "timeoutSeconds": ROUND_SECONDS}
        path = COLLECTION
        if self._of_pods:
            query["fieldSelector"] = f"spec.signerName={self.signers[0]}"
            path = f"{served(self._api, PODS)}/{PODS}"  # each round, since an upgrade may have changed the version
        with self._api.lines(f"{path}?{urlencode(query)}", SILENCE_SECONDS, LONGEST_OBJECT_BYTES) as lines:
            self._is_alive()
            with self._mutex:
                if self._ended:
                    return
                self._lines = lines
            try:
                for line in lines:
                    self._is_alive()
                    found = self._found(line)
                    if isinstance(found, str):
                        deleted(found)
                    elif found is not None:
                        changed(found)
            except NoAnswerError:
                if not self._ended:
                    raise
            finally:
                self._lines = None
                self.left_out += lines.left_out

    def _is_alive(self) -> None:
        self.alive = time.monotonic()
        if self.trouble:
            log.info("watching %s of %s", self.what, self._api.server)
            self.trouble = ""

    def _found(self, line: bytes) -> AnyObject | str | None:
        """Return the object of an event, or the uid of a deleted object; None: neither."""
        if not any(name in line for name in self._wanted.values()):
            if b'"ERROR"' in line[:40]:
                raise NoAnswerError("the API server ended the watch with an error")
            if b'"BOOKMARK"' in line[:40]:  # comes after all objects that existed before
                self._has_seen_all = True
            return None
        try:
            event = json_of(line, Budget(len(line)))
            kind, document = event["type"], event["object"]
            if kind == "DELETED":
                return _text(document["metadata"]["uid"])
            found = (parse_pod if self._of_pods else parse)(document, len(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        return found if kind in ("ADDED", "MODIFIED") and found.request.signer in self._wanted else None

    def has_seen_all(self) -> bool:
        """Whether this round has read all objects that existed when it began."""
        if self._lines is not None and time.monotonic() - self.alive > _QUIET_SECONDS:
            self._has_seen_all = True
        return self._has_seen_all

    def end(self) -> None:
        """End the round."""
        self._ended = True
        with self._mutex:
            if self._lines is not None:
                self._lines.end()
