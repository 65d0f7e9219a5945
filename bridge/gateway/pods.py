"""PodCertificateRequest objects: lookups for a verdict, rate limits for pods, and the one write of the answer."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from functools import partial
from http import HTTPStatus
from typing import Any, TypeVar, cast

from bridge.cluster import items, mapping
from bridge.cluster.api import JSON, METADATA, NoAnswerError, Reply, request_of
from bridge.errors import BridgeError
from bridge.gateway import watch
from bridge.gateway.context import Context, LeftError, after_refusal
from bridge.gateway.csrs import Writer, condition_of, identity_of
from bridge.gateway.nodes import Remembered
from bridge.gateway.pod_policy import USUAL_SECONDS, PodRequest, PodState, PodWorld, csr_or_problem, judge
from bridge.gateway.policy import Allowed, Hostile, Later, Verdict
from bridge.gateway.queue import Job, Look
from bridge.gateway.rules import dates_problem, refresh_at
from bridge.gateway.watch import AnyObject, PodObject, parse_pod, quoted
from bridge.pki.certificates import pem
from bridge.pki.expiry import rfc3339
from bridge.pki.verify import Verified
from bridge.specs import PODS
from bridge.system.waiting import Rate
from bridge.words import one_line

log = logging.getLogger("ca-bridge")

T = TypeVar("T")

#: A Pod object has 5 to 60 kB; its users may write 3 MB, which take 40 MB in memory, or a gigabyte with all threads.
_LONGEST_LOOKED_AT = 512 << 10
_PODS_AT_ONCE = 16
#: The most characters of the API server's message in ours.
_LONGEST_REASON = 200

#: The metadata of service accounts, nodes and namespaces may be this old.
_RECENT_SECONDS = 2.0
_EVENTS_A_MINUTE = 120
#: Reasons for a pod's owner; the CA's own words stay in the gateway's log, since they may hold internals.
_OF_THE_CA = {
    "ca-unavailable": "the CA does not answer",
    "ca-refused": "the CA refuses it",
    "bad-answer": "the CA has signed another certificate than the requested one",
}


class PodJudge:
    """Judges PodCertificateRequests; several threads may use it."""

    def __init__(self, context: Context) -> None:
        self._context = context
        # UIDs and wanted labels alone: users choose the rest of an object, and so its size
        self._metadata: Remembered[tuple[str, ...], tuple[str | None, Mapping[str, Any]]] = Remembered(_RECENT_SECONDS)
        self._looking, self._reading = threading.BoundedSemaphore(_PODS_AT_ONCE), threading.Lock()
        self._mutex = threading.Lock()
        ours = context.settings.gateway
        self._rates = (Rate(ours.node_rate), Rate(ours.pod_rate), Rate(ours.pod_namespace_rate))

    def turn(self, job: Job) -> float | None:
        """Return the seconds until the rates of pod, node and namespace let the job proceed; None: too many wait."""
        request, now = _request(job.one), time.monotonic()
        names = (f"{request.node}\n{request.pod_uid}", request.username, request.namespace)
        longest = 0.0
        with self._mutex:
            for rate, name in zip(self._rates, names, strict=True):
                wait = rate.reserve(name, now)
                if wait is None:  # a pod over its own rate uses up nothing of its node's and namespace's
                    return None
                longest = max(longest, wait)
        return longest

    def look(self, request: AnyObject) -> Look:
        """Return nothing known: a kubelet may have several requests at a time, and none supersedes another."""
        del request
        return Look()

    def verdict(self, job: Job) -> Verdict:
        """
        Return the policy's verdict, by the pod as it is now. A denial, after which a pod never starts, rests on fresh
        lookups of everything.
        """
        now = time.monotonic()
        verdict = self._judged(job)
        return self._judged(job, now) if isinstance(verdict, Hostile) else verdict

    def _judged(self, job: Job, since: float = -math.inf) -> Verdict:
        context, request = self._context, _request(job.one)
        if PODS.name not in context.authorities:
            return Later("the policy had no table for this signer when the gateway was started; restart it")
        policy, inventory = context.nodes.files()
        rules = policy.pod_signers.get(request.signer)
        labels = rules.namespace_labels if rules is not None else {}
        hostile = csr_or_problem(request)
        if isinstance(hostile, Hostile):  # without any lookup
            return hostile
        namespace = f"namespaces/{quoted(request.namespace)}"
        world = PodWorld(
            policy=policy,
            cluster=context.settings.node.cluster,
            inventory=inventory,
            created=job.one.created,
            pod=self._pod(job),
            account_uid=self._known(f"{namespace}/serviceaccounts/{quoted(request.service_account)}", since)[0],
            node_uid=self._known(f"nodes/{quoted(request.node)}", since)[0],
            labels=self._known(namespace, since, labels)[1] if labels else {},
            entry=inventory.nodes.get(request.node),
            ca_end=context.authorities[PODS.name].end(),
            now=context.now(),
        )
        verdict = judge(request, world)
        if isinstance(verdict, Allowed) and world.entry is None:  # only now, so that denied requests run no program
            try:
                entry = context.nodes.entry(request.node, inventory)
            except BridgeError as e:
                return Later(str(e))
            if entry is not None:
                verdict = judge(request, replace(world, entry=entry))
        return verdict

    # --- lookups at the API server ------------------------------------------------------------------------------------

    def _pod(self, job: Job) -> PodState | None:
        """Return the request's pod as it is now; None: no pod has this name."""
        request = _request(job.one)
        path = f"namespaces/{quoted(request.namespace)}/pods/{quoted(request.pod)}"
        with self._looking:
            return self._read(path, JSON, partial(pod_state, request=request))

    def _known(
        self, path: str, since: float = -math.inf, labels: Collection[str] = ()
    ) -> tuple[str | None, Mapping[str, Any]]:
        """Return an object's UID (None: it does not exist) and its labels named in `labels`, as of a moment ago."""

        def read(document: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
            found = mapping(document, "metadata", "labels").items()
            uid = str(mapping(document, "metadata").get("uid", ""))
            return uid, {key: value for key, value in found if key in labels}

        return self._metadata.of((path, *labels), lambda: self._read(path, METADATA, read) or (None, {}), since)

    def _read(self, path: str, accept: str, read: Callable[[Mapping[str, Any]], T]) -> T | None:
        """Read an object; None: it does not exist (NoAnswerError; LeftError: it is too large)."""
        request = request_of("GET", f"/api/v1/{path}", accept=accept, longest=_LONGEST_LOOKED_AT)
        try:
            reply = self._context.api.answer(request)
        except NoAnswerError as e:
            if e.is_too_long:
                wanted = f"wanted at most {_LONGEST_LOOKED_AT >> 10} KiB, found more: shorten the object"
                raise LeftError("left", f"{path}: {wanted}") from None
            raise
        if reply.status == HTTPStatus.NOT_FOUND:
            return None
        with self._reading:  # one at a time, since a parsed object takes ten times its size
            return read(reply.found(path))


def pod_state(document: Mapping[str, Any], request: PodRequest) -> PodState:
    """Return what a verdict on this request needs of a Pod object, without values of an unexpected shape."""
    metadata, spec = mapping(document, "metadata"), mapping(document, "spec")
    deleted = metadata.get("deletionTimestamp")
    return PodState(
        uid=str(metadata.get("uid", "")),
        node=str(spec.get("nodeName", "")),
        service_account=str(spec.get("serviceAccountName", "")),
        phase=str(mapping(document, "status").get("phase", "")),
        key_types=frozenset(_key_types(spec, request)),
        ends=datetime.fromisoformat(deleted) if isinstance(deleted, str) else None,
    )


def _key_types(spec: Mapping[str, Any], request: PodRequest) -> Iterator[str]:
    """Yield the key types of the pod's volumes that have the request's signer, lifetime and annotations."""
    wanted = request.signer, request.seconds, dict(request.annotations)
    for volume in items(spec, "volumes"):
        for item in items(volume, "projected", "sources"):
            if source := mapping(item, "podCertificate"):
                seconds = int(source.get("maxExpirationSeconds") or USUAL_SECONDS)
                if (source.get("signerName"), seconds, mapping(source, "userAnnotations")) == wanted:
                    yield str(source.get("keyType", ""))


def _request(request: AnyObject) -> PodRequest:
    return cast(PodObject, request).request


class PodWriter(Writer):
    """Writes one final answer: after a denial the kubelet asks no more, and the API server takes no other."""

    kind = "PodCertificateRequest"
    parse = staticmethod(parse_pod)

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._mutex = threading.Lock()
        self._events = Rate(_EVENTS_A_MINUTE)
        self._cannot_tell = False

    def deny(self, job: Job, hostile: Hostile) -> str:
        """Deny the request with a message for the pod's owner; empty: the object has changed."""
        condition = condition_of(watch.DENIED, hostile.code, hostile.message, self._context.now())
        body = {"metadata": identity_of(job.one), "status": {"conditions": [condition]}}
        return watch.DENIED if self._patched(job, "status", body).status == HTTPStatus.OK else ""

    def mark(self, job: Job, kind: str, reason: str) -> bool:
        """Write nothing: the API server takes only final conditions, and an outage must not stop a pod for good."""
        del job, kind, reason
        return False

    def tell(self, job: Job, outcome: str, reason: str) -> None:
        """Write an event with the reason why the pod's request waits; a rate limit drops some in a large outage."""
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

    def trouble(self, verdict: Allowed, verified: Verified) -> str:
        """Return why the API server would reject this certificate now; empty: it would not."""
        begin, end = verified.leaf.not_valid_before_utc, verified.leaf.not_valid_after_utc
        return dates_problem(begin, end, verdict.most, self._context.now())

    def issue(self, job: Job, verdict: Allowed, verified: Verified) -> bool:
        """Write the certificate with its dates; False: the object has changed."""
        self._context.assert_fresh(job)
        begin, end = verified.leaf.not_valid_before_utc, verified.leaf.not_valid_after_utc
        status = {
            "conditions": [condition_of("Issued", watch.ALLOWS, "", self._context.now())],
            "certificateChain": pem(verified.leaf, *verified.intermediates).decode("ascii"),
            "notBefore": rfc3339(begin),
            "notAfter": rfc3339(end),
            "beginRefreshAt": rfc3339(refresh_at(begin, end, verdict.refresh)),
        }
        reply = self._patched(job, "status", {"metadata": identity_of(job.one), "status": status})
        return reply.status == HTTPStatus.OK

    def _unprocessable(self, job: Job, subresource: str, reply: Reply) -> None:
        """Leave the job; the reason is the end of the API server's message, which quotes the whole chain before it."""
        del subresource
        self._read_again(job)  # raises GoneError if it is finished or replaced by now
        job.verified = None
        reason = one_line(reply.message[-_LONGEST_REASON:])
        raise LeftError("bad-answer", f"the API server does not take the answer: …{reason}", after_refusal(job))
