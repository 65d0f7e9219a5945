"""
CertificateSigningRequest objects: their verdicts, the rate limits for requesters, and the writes, which go only into
the object that was judged, by its uid and resourceVersion.
"""

from __future__ import annotations

import base64
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from http import HTTPStatus
from typing import Any, cast

from cryptography import x509

from bridge.cluster import text_of
from bridge.cluster.api import MERGE_PATCH, METADATA, NoAnswerError, Reply, request_of
from bridge.errors import BridgeError
from bridge.gateway import watch
from bridge.gateway.context import AFTER_REFUSAL_SECONDS, Context, GoneError, LeftError
from bridge.gateway.nodes import state_of
from bridge.gateway.policy import (
    USUAL_BYTES,
    Allowed,
    Hostile,
    Later,
    NodeState,
    Verdict,
    World,
    addresses_of,
    judge,
    node_of,
)
from bridge.gateway.queue import Job, Look, key_of
from bridge.gateway.rules import NODE_USER, spec_of
from bridge.gateway.watch import AnyObject, NotAnObjectError, PodObject, SigningRequest, parse
from bridge.pki.certificates import CN_OID, attributes, pem
from bridge.pki.expiry import rfc3339
from bridge.pki.verify import Verified
from bridge.specs import GATEWAY_SPECS
from bridge.system.waiting import Rate

log = logging.getLogger("ca-bridge")


class Judge:
    """Judges CertificateSigningRequests; several threads may use it."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._mutex = threading.Lock()
        ours = context.settings.gateway
        self._requesters, self._nodes = Rate(ours.requester_rate), Rate(ours.node_rate)

    def turn(self, job: Job) -> float | None:
        """Return the seconds until the rate limits let the job proceed; None: too many wait already."""
        user, now = job.one.request.username, time.monotonic()
        with self._mutex:
            if job.look.is_hostile:
                return self._requesters.reserve(f"hostile\n{user}", now)
            if job.look.key and job.look.is_known:
                # per node, since all nodes that join with one bootstrap token are one user; and per requester,
                # or another node could use up this node's rate with requests that name it
                return self._nodes.reserve(job.look.key, now)
            return self._requesters.reserve(user, now)

    def look(self, csr: AnyObject) -> Look:
        """
        Compare a request with the files alone; a node that only `inventory_command` could name counts as allowed here.
        A large CSR has to wait for its turn: thousands would delay all requests behind them.
        """
        csr = cast(SigningRequest, csr)
        world = self._world(csr)
        if world is None or len(csr.request.pem) > USUAL_BYTES:
            return Look()
        node = node_of(csr.request)
        entry = world.inventory.nodes.get(node) if node is not None else None
        if entry is not None:
            state = NodeState(exists=csr.request.username == f"{NODE_USER}{node}")
            world = replace(world, entry=entry, state=state)
        verdict = judge(csr.request, world)
        is_hostile, is_known = isinstance(verdict, Hostile), entry is not None
        counts = isinstance(verdict, Allowed) if is_known else node is not None and not is_hostile
        return Look(key=key_of(csr, node) if counts else "", is_known=is_known, is_hostile=is_hostile)

    def verdict(self, job: Job) -> Verdict:
        """Return the policy's verdict, by the files and the Node object as they are now."""
        one, nodes = cast(SigningRequest, job.one), self._context.nodes
        world = self._world(one)
        if world is None:
            return Later("the policy had no table for this signer when the gateway was started; restart it")
        node, verdict = node_of(one.request), judge(one.request, world)
        # a request that is hostile by its content alone costs no program run, DNS lookup or API call
        if node is not None and not isinstance(verdict, Hostile):
            try:
                entry = nodes.entry(node, world.inventory)
            except BridgeError as e:
                return Later(str(e))
            if entry is not None:
                entry = nodes.with_dns(node, entry, addresses_of(one.request))
                with_readiness = entry.rejoin and one.request.username != f"{NODE_USER}{node}"
                state = state_of(self._context.api, node, with_readiness=with_readiness)
                verdict = judge(one.request, replace(world, entry=entry, state=state))
        needs_person = isinstance(verdict, Allowed) and world.policy.signers[one.request.signer].approval == "required"
        if needs_person and not one.is_approved_by_person:
            csr = "only a controller has approved it, which does not count" if one.has(watch.APPROVED) else ""
            return Later(f"{csr or 'it was not approved yet'} (approval = required)")
        return verdict

    def _world(self, csr: SigningRequest) -> World | None:
        """Return the facts for a verdict; None: the policy had no table for the signer when the gateway started."""
        context, spec = self._context, spec_of(csr.request.signer)
        if spec is None or spec.authority.name not in context.authorities:
            return None
        policy, inventory = context.nodes.files()
        return World(
            policy=policy,
            cluster=context.settings.node.cluster,
            inventory=inventory,
            ca_end=context.authorities[spec.authority.name].end(),
            min_validity=context.settings.gateway.min_validity,
            now=context.now(),
        )


# --- the writes -------------------------------------------------------------------------------------------------------

_TURNS = 5  # each 409 means that another client wrote


class Writer:
    """Writes answers into CertificateSigningRequests; several threads may use it."""

    kind = "CertificateSigningRequest"
    parse: Callable[[Any, int], AnyObject] = staticmethod(parse)

    def __init__(self, context: Context) -> None:
        self._context = context

    # --- answers ----------------------------------------------------------------------------------------------------
    # each raises GoneError (the object is finished or replaced), LeftError or NoAnswerError if nothing was written

    def deny(self, job: Job, hostile: Hostile) -> str:
        """Write `Denied` without the reason, or `Failed` if it was approved; return which (empty: it changed)."""
        del hostile
        is_approved = job.one.has(watch.APPROVED)
        subresource, kind = ("status", watch.FAILED) if is_approved else ("approval", watch.DENIED)
        return kind if self._marked(job, subresource, kind, watch.NOT_ALLOWED) else ""

    def tell(self, job: Job, outcome: str, reason: str) -> None:
        """Write no event: a CSR object's owner reads its conditions, and few people look at its events."""

    def mark(self, job: Job, kind: str, reason: str) -> bool:
        """Write a condition unless there is one of its kind; False: this kind of object takes only a final one."""
        for _ in self.turns(job):
            if job.one.has(kind) or self._marked(job, "status", kind, reason):
                break
        return True

    def trouble(self, verdict: Allowed, verified: Verified) -> str:
        """Return no trouble: the API server takes any certificate for these objects."""
        del verdict, verified
        return ""

    def issue(self, job: Job, verdict: Allowed, verified: Verified) -> bool:
        """Approve the object, unless another client did, and write the certificate; False: the object has changed."""
        del verdict
        self._context.assert_fresh(job)
        if not (job.one.has(watch.APPROVED) or self._marked(job, "approval", watch.APPROVED, watch.ALLOWS)):
            return False
        self._context.assert_fresh(job)  # the approval may have taken a while
        reply = self._patched(job, "status", with_certificate(job.one, pem(*verified.chain)))
        return reply.status == HTTPStatus.OK

    # --- objects ----------------------------------------------------------------------------------------------------

    def turns(self, job: Job) -> Iterator[None]:
        """Yield once for each try to write; before each but the first, read the object again."""
        for turn in range(_TURNS):
            if turn:
                self._read_again(job)
            yield
        raise LeftError("conflict", "another client changes the object each time", 1.0)

    def _read_again(self, job: Job) -> None:
        reply = self._context.api.ask("GET", job.one.path)
        self._assert_well(reply, "get the object")
        try:
            found = self.parse(reply.document, len(reply.body))
        except NotAnObjectError as e:
            raise NoAnswerError(f"wanted a {self.kind}, found something else ({e})") from None
        if found.uid != job.one.uid or found.request != job.one.request:
            raise GoneError("another object has its name by now")
        job.one = found
        if found.is_finished:
            raise GoneError("another client has answered it")

    def _marked(self, job: Job, subresource: str, kind: str, reason: str) -> bool:
        """Add a condition; False: the object has changed."""
        csr, body = job.one, with_condition(job.one, kind, reason, self._context.now())
        reply = self._patched(job, subresource, body)
        if reply.status != HTTPStatus.OK:
            return False
        job.one = replace(csr, version=_version(reply), conditions=tuple(body["status"]["conditions"]))
        return True

    def _patched(self, job: Job, subresource: str, body: Mapping[str, Any]) -> Reply:
        """Send a patch; the reply is 200 with metadata alone, or says that the object has changed (409, 422)."""
        request = request_of("PATCH", f"{job.one.path}/{subresource}", body, MERGE_PATCH, accept=METADATA)
        reply = self._context.write(request)
        if reply.status == HTTPStatus.UNPROCESSABLE_ENTITY:
            self._unprocessable(job, subresource, reply)
        elif reply.status != HTTPStatus.CONFLICT:
            self._assert_well(reply, f"write its {subresource}")
        return reply

    def _unprocessable(self, job: Job, subresource: str, reply: Reply) -> None:
        """Leave the job, longer each time, if the object is unchanged: the API server or a policy refused the write."""
        found = self._context.api.ask("GET", job.one.path)
        if text_of(found.document, "metadata", "resourceVersion") == job.one.version:
            refusal = f"can't write its {subresource}: HTTP {reply.status} {reply.message}"
            log.error("%s (does an admission policy or webhook of the cluster reject it?)", refusal)
            raise LeftError("left", refusal)

    @staticmethod
    def _assert_well(reply: Reply, what: str) -> None:
        """Leave the job for a while after any answer but 200."""
        if reply.status == HTTPStatus.NOT_FOUND:
            raise GoneError("the object is gone")
        if reply.status != HTTPStatus.OK:
            reason = f"can't {what}: HTTP {reply.status} {reply.message}"
            log.error("%s (does the gateway have the rights that `ca-bridge help gateway` names?)", reason)
            raise LeftError("left", reason, AFTER_REFUSAL_SECONDS)


def _version(reply: Reply) -> str:
    """Return the resourceVersion after a write; the write's uid made sure that it was our object."""
    version = text_of(reply.document, "metadata", "resourceVersion")
    if not version:
        raise NoAnswerError("wanted the version of an object that was written, found something else")
    return version


def name_in(csr: AnyObject, leaf: x509.Certificate) -> str:
    """Return the node's or user's name, kubeadm's name of the certificate, or a pod's namespace and service account."""
    if isinstance(csr, PodObject):
        return f"{csr.request.namespace}/{csr.request.service_account}"
    spec = spec_of(csr.request.signer)
    if spec is not None and spec.name not in GATEWAY_SPECS:
        return spec.name
    cn = next((value for oid, value in attributes(leaf.subject) if oid == CN_OID), "")
    return cn.removeprefix(NODE_USER)


# --- bodies: always with uid and resourceVersion, or a write could hit a new object of the same name ------------------

_TEXTS = {
    watch.ALLOWS: "allowed by ca-bridge's policy",
    watch.NOT_ALLOWED: "not allowed",
    watch.NOT_ANSWERED: "the CA has not answered in time",
    watch.WAITS: "the CA has the request and answers later",
}


def condition_of(kind: str, reason: str, message: str, now: datetime) -> dict[str, str]:
    """Return a condition that is true from now on."""
    return {"type": kind, "status": "True", "reason": reason, "message": message, "lastTransitionTime": rfc3339(now)}


def with_condition(csr: AnyObject, kind: str, reason: str, now: datetime) -> dict[str, Any]:
    """Return a body with one more condition and all others, since a merge patch replaces the whole list."""
    condition = {**condition_of(kind, reason, _TEXTS[reason], now), "lastUpdateTime": rfc3339(now)}
    others = csr.conditions if kind == watch.APPROVED else _without_waiting(csr)
    return {"metadata": identity_of(csr), "status": {"conditions": [*others, condition]}}


def with_certificate(csr: AnyObject, chain_pem: bytes) -> dict[str, Any]:
    """Return the body for /status with the certificate chain, leaf first."""
    status: dict[str, Any] = {"certificate": base64.b64encode(chain_pem).decode("ascii")}
    if csr.has(watch.PENDING_AT_CA):
        status["conditions"] = _without_waiting(csr)
    return {"metadata": identity_of(csr), "status": status}


def identity_of(csr: AnyObject) -> dict[str, str]:
    """Return the uid and version, so that a write fails on a new object of the same name or another version."""
    return {"uid": csr.uid, "resourceVersion": csr.version}


def _without_waiting(csr: AnyObject) -> list[Mapping[str, Any]]:
    return [condition for condition in csr.conditions if condition.get("type") != watch.PENDING_AT_CA]
