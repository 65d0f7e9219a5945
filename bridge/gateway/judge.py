"""The verdict on an object at this moment, and how often a requester may ask."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

from bridge.errors import BridgeError
from bridge.gateway import watch
from bridge.gateway.context import Context
from bridge.gateway.nodes import NodeStates
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
from bridge.gateway.queue import Job, Look
from bridge.gateway.rules import NODE_USER, spec_of
from bridge.gateway.watch import AnyObject, SigningRequest
from bridge.specs import CertificateSpec
from bridge.system.waiting import Rate

#: Before the CA is asked, a file or Node object that was looked at so long ago is as good as one of now.
_RECENT_SECONDS = 1.0


class Judge:
    """May be used by several threads."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._states = NodeStates(context.api)
        self._mutex = threading.Lock()
        ours = context.settings.gateway
        self._requesters, self._nodes = Rate(ours.requester_rate), Rate(ours.node_rate)

    def turn(self, job: Job) -> float | None:
        """Seconds until the rates give the job its turn; None: too many wait already."""
        user, now = job.one.request.username, time.monotonic()
        with self._mutex:
            if job.look.is_hostile:
                return self._requesters.reserve(f"hostile\n{user}", now)
            if job.look.counts and job.look.is_known:
                # each node has a rate, since all that join with one bootstrap token are one user
                # by requester, too: another node could name this one until its own kubelet had to wait
                return self._nodes.reserve(job.key, now)
            return self._requesters.reserve(user, now)

    def look(self, one: AnyObject) -> Look:
        """
        What a request says, compared with the files alone; a node that only `inventory_command` could name counts as
        allowed. A large CSR has to wait for its turn: thousands would delay all requests behind them.
        """
        one = _ours(one)
        spec = self._spec(one)
        if spec is None or len(one.request.pem) > USUAL_BYTES:
            return Look()
        node = node_of(one.request)
        world = self._world(spec, time.monotonic() - _RECENT_SECONDS)
        entry = world.inventory.nodes.get(node) if node is not None else None
        if entry is not None:
            state = NodeState(exists=one.request.username == f"{NODE_USER}{node}")
            world = replace(world, entry=entry, state=state)
        verdict = judge(one.request, world)
        is_hostile, is_known = isinstance(verdict, Hostile), entry is not None
        counts = isinstance(verdict, Allowed) if is_known else node is not None and not is_hostile
        return Look(node=node, counts=counts, is_known=is_known, is_hostile=is_hostile)

    def verdict(self, job: Job, *, at_write: bool = False) -> Verdict:
        """The policy's verdict; for a write, files and Node object are looked at now, else they may have been a second ago."""
        one, nodes = _ours(job.one), self._context.nodes
        node = node_of(one.request)
        since = time.monotonic() - (0.0 if at_write else _RECENT_SECONDS)
        spec = self._spec(one)
        if spec is None:
            return Later("the policy had no table for this signer when the gateway was started; restart it")
        world = self._world(spec, since)
        verdict = judge(one.request, world)
        # no program, DNS or API server is asked about a request that is hostile by its own words
        if node is not None and not isinstance(verdict, Hostile):
            try:
                entry = nodes.entry(node, world.inventory)
            except BridgeError as e:
                return Later(str(e))
            if entry is not None:
                entry = nodes.with_dns(node, entry, addresses_of(one.request))
                # usually a token's node does not exist yet; a node that asks for itself may have just registered
                itself = one.request.username == f"{NODE_USER}{node}"
                state = self._states.state(node, since, newer=itself, with_readiness=entry.rejoin and not itself)
                verdict = judge(one.request, replace(world, entry=entry, state=state))
        rules = world.policy.signers.get(one.request.signer)
        if isinstance(verdict, Allowed) and rules is not None and rules.approval == "required":
            if one.is_approved_by_person:
                return verdict
            found = "only a controller has approved it, which does not count" if one.has(watch.APPROVED) else ""
            return Later(f"{found or 'it was not approved yet'} (approval = required)")
        return verdict

    def _spec(self, one: SigningRequest) -> CertificateSpec | None:
        spec = spec_of(one.request.signer)
        return spec if spec is not None and spec.authority.name in self._context.authorities else None

    def _world(self, spec: CertificateSpec, since: float) -> World:
        context = self._context
        policy, inventory = context.nodes.files(since)
        return World(
            policy=policy,
            cluster=context.settings.node.cluster,
            inventory=inventory,
            ca_end=context.authorities[spec.authority.name].end(),
            min_validity=context.settings.gateway.min_validity,
            now=context.now(),
        )


def _ours(one: AnyObject) -> SigningRequest:
    if not isinstance(one, SigningRequest):
        raise TypeError(f"wanted a CertificateSigningRequest, found {type(one).__name__}")
    return one
