"""The policy's verdict on an object by what is true at this moment, and how often somebody may ask."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

from bridge.desk.node_inventory import NodeEntry
from bridge.desk.signer_rules import NODE_USER, spec_of
from bridge.errors import BridgeError
from bridge.gateway import objects
from bridge.gateway.context import Place
from bridge.gateway.node_states import NodeStates
from bridge.gateway.objects import SigningRequest
from bridge.gateway.queue import Job, key_of
from bridge.gateway.rates import Rate
from bridge.gateway.signer_policy import (
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
from bridge.specs import CertificateSpec


class Judging:
    """May be used by several threads."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._states = NodeStates(place.api)
        self._mutex = threading.Lock()
        ours = place.settings.gateway
        self._requesters, self._nodes = Rate(ours.requester_rate), Rate(ours.node_rate)

    def seconds_to_wait(self, job: Job) -> float:
        """Seconds until one more request of this user and for this node may be looked at; 0: it was counted, and goes on."""
        node, user, now = job.node, job.one.request.username, time.monotonic()
        # by who asks, too: whoever may ask at all could name a node until its own kubelet had to wait
        about = key_of(job.one, node)
        with self._mutex:
            wait = self._requesters.wait_seconds(user, now)
            if node is not None:
                wait = max(wait, self._nodes.wait_seconds(about, now))
            if wait:
                return max(wait, 0.1)
            self._requesters.take(user, now)
            if node is not None:
                self._nodes.take(about, now)
        job.begun = True
        return 0.0

    def verdict(self, job: Job) -> Verdict:
        """
        The policy's verdict on the job's object, by what is true now.

        Raises:
            NoAnswerError: The Node object can't be looked at.
        """
        place, one, node = self._place, job.one, job.node
        known, spec = place.known, spec_of(one.request.signer)
        if spec is None or spec.authority.name not in place.authorities:
            return Later("the policy had no table for this signer when the gateway was started; restart it")
        world = self._world(spec)
        policy = world.policy
        verdict = judge(one.request, world)
        # nobody is asked about a node (a program, the DNS, the API server) for what is hostile by its own words
        if node is not None and not isinstance(verdict, Hostile):
            try:
                entry = known.entry(node)
            except BridgeError as e:
                return Later(str(e))
            if entry is not None:
                entry = known.with_dns(node, entry, addresses_of(one.request))
                state = self._state(node, entry, one.request.username)
                verdict = judge(one.request, replace(world, entry=entry, state=state))
        rules = policy.signers.get(one.request.signer)
        needs_other = rules is not None and rules.approval == "required"
        if isinstance(verdict, Allowed) and needs_other and not one.has(objects.APPROVED):
            return Later("nobody has approved it yet (approval = required)")
        return verdict

    def counts(self, one: SigningRequest) -> bool:
        """
        Whether a request about a node may be signed by what the files say: no program, no API server is asked.

        A node that only a program knows is given credit.
        """
        spec, node = spec_of(one.request.signer), node_of(one.request)
        if spec is None or spec.authority.name not in self._place.authorities or node is None:
            return False
        world = self._world(spec)
        entry = world.register.nodes.get(node)
        if entry is None:
            return not isinstance(judge(one.request, world), Hostile)
        state = NodeState(exists=one.request.username == f"{NODE_USER}{node}")
        return isinstance(judge(one.request, replace(world, entry=entry, state=state)), Allowed)

    def _world(self, spec: CertificateSpec) -> World:
        place = self._place
        return World(
            policy=place.known.policy,
            cluster=place.settings.node.cluster,
            register=place.known.register,
            ca_end=place.authorities[spec.authority.name].end(),
            min_validity=place.settings.gateway.min_validity,
            now=place.now(),
        )

    def _state(self, node: str, entry: NodeEntry, username: str) -> NodeState:
        # a token's node is not there, as a rule; one that asks for itself may have registered this moment
        itself = username == f"{NODE_USER}{node}"
        return self._states.state(node, newer=itself, with_readiness=entry.rejoin and not itself)
