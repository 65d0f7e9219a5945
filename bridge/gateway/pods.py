"""PodCertificateRequest objects: what is looked up for a verdict, how often pods may ask, and the one write of an answer."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from http import HTTPStatus
from typing import Any

from bridge.cluster import items, mapping
from bridge.cluster.api import MERGE_PATCH, METADATA, Api, NoAnswerError, Reply
from bridge.gateway import watch
from bridge.gateway.context import Context, GoneError, LeftError, NotAllowedError, after_refusal
from bridge.gateway.csrs import Writer, condition_of, identity_of
from bridge.gateway.nodes import Remembered
from bridge.gateway.pod_policy import (
    USUAL_SECONDS,
    AllowedPod,
    PodRequest,
    PodState,
    PodWorld,
    Source,
    judge,
    own_words,
)
from bridge.gateway.policy import Allowed, Hostile, Later, Verdict
from bridge.gateway.queue import Job, Look
from bridge.gateway.rules import dates_problem, refresh_at
from bridge.gateway.watch import AnyObject, PodObject, parse_pod, quoted
from bridge.pki.certificates import pem
from bridge.pki.expiry import rfc3339
from bridge.pki.verify import Verified
from bridge.specs import PODS
from bridge.state import audit
from bridge.system.waiting import Rate
from bridge.words import one_line

log = logging.getLogger("ca-bridge")

#: Of the API server's words.
_LONGEST_REASON = 200

#: A service account, a node's or a namespace's metadata that was looked at so long ago is as good as one of now; so is a
#: pod for the write, which was looked at anew right before the CA was asked.
_RECENT_SECONDS = 2.0
_EVENTS_A_MINUTE = 120
#: The CA's own words are in the gateway's log alone: they may name what a pod's owner should not read.
_OF_THE_CA = {
    "ca-unavailable": "the CA does not answer",
    "ca-refused": "the CA refuses it",
    "bad-answer": "the CA has signed another certificate than the requested one",
}


class PodJudge:
    """May be used by several threads."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._looks = Looks(context.api)
        self._mutex = threading.Lock()
        ours = context.settings.gateway
        self._rates = (Rate(ours.node_rate), Rate(ours.pod_rate), Rate(ours.pod_namespace_rate))

    def turn(self, job: Job) -> float | None:
        """Seconds until the rates of pod, node and namespace give the job its turn; None: too many wait already."""
        request, now = _request(job.one), time.monotonic()
        names = (f"{request.node}\n{request.pod_uid}", request.username, request.namespace)
        longest = 0.0
        with self._mutex:
            for rate, name in zip(self._rates, names, strict=True):
                wait = rate.reserve(name, now)
                if wait is None:  # what a pod asks for in vain takes nothing of its node's and its namespace's rate
                    return None
                longest = max(longest, wait)
        return longest

    def look(self, one: AnyObject) -> Look:
        """What a request says of itself; a kubelet may have several at a time, none of which supersedes another."""
        del one
        return Look()

    def verdict(self, job: Job, *, at_write: bool = False) -> Verdict:
        """The policy's verdict, by the pod as it is at this moment; for a write, it may have been looked at a moment ago."""
        context, request = self._context, _request(job.one)
        if PODS.name not in context.authorities:
            return Later("the policy had no table for this signer when the gateway was started; restart it")
        policy, inventory = context.nodes.files(time.monotonic() - (0.0 if at_write else _RECENT_SECONDS))
        rules = policy.pod_signers.get(request.signer)
        hostile = own_words(request)
        if isinstance(hostile, Hostile):  # nothing is looked up for it
            return hostile
        pod = self._looks.pod(request, at_write=at_write)
        account = self._looks.uid(
            f"namespaces/{quoted(request.namespace)}/serviceaccounts/{quoted(request.service_account)}"
        )
        node = self._looks.uid(f"nodes/{quoted(request.node)}")
        labels: Mapping[str, str] | None = None
        if rules is not None and rules.namespace_labels:
            labels = self._looks.labels(f"namespaces/{quoted(request.namespace)}")
        world = PodWorld(
            policy=policy,
            cluster=context.settings.node.cluster,
            inventory=inventory,
            ca_end=context.authorities[PODS.name].end(),
            now=context.now(),
            created=job.one.created,
            pod=pod,
            account_uid=account,
            node_uid=node,
            labels=labels,
        )
        return judge(request, world)


class Looks:
    """The API server's present objects of pods, their nodes and accounts; may be used by any thread."""

    def __init__(self, api: Api) -> None:
        self._api = api
        # nothing else of an account or a node is kept, since its users choose the rest
        self._uids: Remembered[str, str | None] = Remembered(_RECENT_SECONDS)
        self._labels: Remembered[str, Mapping[str, str]] = Remembered(_RECENT_SECONDS)
        self._pods: Remembered[str, PodState | None] = Remembered(_RECENT_SECONDS)

    def pod(self, request: PodRequest, *, at_write: bool) -> PodState | None:
        """A pod as it is at this moment, or for a write as it was a moment ago; None: there is none of this name."""
        path = f"namespaces/{quoted(request.namespace)}/pods/{quoted(request.pod)}"
        if at_write and (known := self._pods.get(path)) is not None:
            return known[0]
        now = time.monotonic()
        document = self._get(path, "application/json")
        found = None if document is None else pod_state(document)
        self._pods.put(path, found, now)
        return found

    def uid(self, path: str) -> str | None:
        """An object's UID, as it was a moment ago; None: it is not there."""

        def ask() -> str | None:
            document = self._get(path, METADATA)
            return None if document is None else str(mapping(document, "metadata").get("uid", ""))

        return self._uids.of(path, ask)

    def labels(self, path: str) -> Mapping[str, str]:
        """An object's labels, as they were a moment ago; none: it has none, or is not there."""
        return self._labels.of(path, lambda: mapping(self._get(path, METADATA), "metadata", "labels"))

    def _get(self, path: str, accept: str) -> Mapping[str, Any] | None:
        reply = self._api.ask("GET", f"/api/v1/{path}", accept=accept)
        return None if reply.status == HTTPStatus.NOT_FOUND else reply.found(path)


def pod_state(document: Mapping[str, Any]) -> PodState:
    """All of a Pod object that a verdict depends on; what is not in its usual shape is left out."""
    metadata, spec = mapping(document, "metadata"), mapping(document, "spec")
    deleted = metadata.get("deletionTimestamp")
    return PodState(
        uid=str(metadata.get("uid", "")),
        node=str(spec.get("nodeName", "")),
        service_account=str(spec.get("serviceAccountName", "")),
        phase=str(mapping(document, "status").get("phase", "")),
        sources=frozenset(_sources(spec)),
        ends=datetime.fromisoformat(deleted) if isinstance(deleted, str) else None,
    )


def _sources(spec: Mapping[str, Any]) -> Iterator[Source]:
    for volume in items(spec, "volumes"):
        for one in items(volume, "projected", "sources"):
            if source := mapping(one, "podCertificate"):
                annotations = mapping(source, "userAnnotations")
                yield Source(
                    signer=str(source.get("signerName", "")),
                    key_type=str(source.get("keyType", "")),
                    seconds=int(source.get("maxExpirationSeconds") or USUAL_SECONDS),
                    annotations=tuple(sorted((str(key), str(value)) for key, value in annotations.items())),
                )


def _request(one: AnyObject) -> PodRequest:
    if not isinstance(one, PodObject):
        raise TypeError(f"wanted a PodCertificateRequest, found {type(one).__name__}")
    return one.request


class PodWriter(Writer):
    """One write is final: the kubelet asks no more for a pod whose request was denied, nor does the API server take another."""

    kind = "PodCertificateRequest"
    parse = staticmethod(parse_pod)

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._events = Rate(_EVENTS_A_MINUTE)
        self._cannot_tell = False

    def deny(self, job: Job, hostile: Hostile) -> None:
        """Deny the request, with words for the pod's owner."""
        context = self._context
        context.ledger.write(context.about(job.one).line(audit.REFUSED, error=NotAllowedError(hostile.reason)))
        for _ in self.turns(job):
            condition = condition_of(watch.DENIED, hostile.code, hostile.message, context.now())
            if self._answered(job, {"conditions": [condition]}):
                self._denied(job, watch.DENIED, hostile.reason)
                return

    def failed_unanswered(self, job: Job) -> None:
        """Nothing is written: an outage is no reason why a pod should never start."""

    def waits(self, job: Job) -> None:
        """Nothing is written: the API server takes no condition but a final one."""

    def tell(self, job: Job, outcome: str, reason: str) -> None:
        """Say in an event of the pod why its request waits; in an outage of thousands some are left out."""
        request, context, now = _request(job.one), self._context, rfc3339(self._context.now())
        text = _OF_THE_CA.get(outcome, reason)
        with self._mutex:
            if job.last_event == text or self._events.take("events", time.monotonic()) > 0:
                return
            job.last_event = text
        pod = {"apiVersion": "v1", "kind": "Pod", "namespace": request.namespace}
        pod |= {"name": request.pod, "uid": request.pod_uid}
        event = {
            "metadata": {"generateName": "ca-bridge-", "namespace": request.namespace},
            "involvedObject": pod,
            "type": "Warning",
            "reason": "CertificateWaits",
            "message": f"the request for a certificate of {request.signer} waits: {one_line(text)}",
            "source": {"component": "ca-bridge-gateway"},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        with contextlib.suppress(NoAnswerError):
            reply = context.api.ask("POST", f"/api/v1/namespaces/{quoted(request.namespace)}/events", event)
            if reply.status not in {HTTPStatus.CREATED, HTTPStatus.NOT_FOUND} and not self._cannot_tell:
                self._cannot_tell = True
                log.warning("no events of pods: HTTP %d %s", reply.status, one_line(reply.message))

    def trouble(self, verdict: Allowed, found: Verified) -> str:
        """Why the API server would not take this certificate now."""
        leaf = found.leaf
        longest = verdict.most if isinstance(verdict, AllowedPod) else timedelta()
        now = self._context.now()
        return dates_problem(leaf.not_valid_before_utc, leaf.not_valid_after_utc, longest, now)

    def issue(self, job: Job, verdict: Allowed, found: Verified) -> bool:
        """Write the certificate with its dates; False: the object has changed."""
        context = self._context
        context.assert_ours()
        begin, end = found.leaf.not_valid_before_utc, found.leaf.not_valid_after_utc
        percent = verdict.refresh if isinstance(verdict, AllowedPod) else 0
        status = {
            "conditions": [condition_of("Issued", watch.ALLOWS, "", context.now())],
            "certificateChain": pem(found.leaf, *found.intermediates).decode("ascii"),
            "notBefore": rfc3339(begin),
            "notAfter": rfc3339(end),
            "beginRefreshAt": rfc3339(refresh_at(begin, end, percent)),
        }
        if not self._answered(job, status):
            return False
        self._remember(job.one.uid)
        return True

    def _answered(self, job: Job, status: Mapping[str, Any]) -> bool:
        """Whether it was written; the API server's reason for a refusal repeats the chain before its last words."""
        body = {"metadata": identity_of(job.one), "status": status}
        reply: Reply = self._context.api.ask("PATCH", f"{job.one.path}/status", body, MERGE_PATCH, accept=METADATA)
        if reply.status == HTTPStatus.NOT_FOUND:
            raise GoneError("the object is gone")
        if reply.status == HTTPStatus.UNPROCESSABLE_ENTITY:
            self._read_again(job)  # or it is finished, or another object, by now
            job.verified = None
            reason = one_line(reply.message[-_LONGEST_REASON:])
            raise LeftError("bad-answer", f"the API server does not take the answer: …{reason}", after_refusal(job))
        if reply.status not in {HTTPStatus.OK, HTTPStatus.CONFLICT}:
            self.assert_well(reply, "write its status")
        return reply.status == HTTPStatus.OK
