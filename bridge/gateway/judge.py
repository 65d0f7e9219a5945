"""The verdict on an object by what is true at this moment, and how often a requester may ask."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

from bridge.desk.node_inventory import NodeEntry
from bridge.errors import BridgeError
from bridge.gateway import watch
from bridge.gateway.context import Context
from bridge.gateway.nodes import NodeStates
from bridge.gateway.policy import (
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
from bridge.gateway.queue import Job, Rate, key_of
from bridge.gateway.rules import NODE_USER, spec_of
from bridge.gateway.watch import SigningRequest
from bridge.specs import CertificateSpec


class Judge:
    """May be used by several threads."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._states = NodeStates(context.api)
        self._mutex = threading.Lock()
        ours = context.settings.gateway
        self._requesters, self._nodes = Rate(ours.requester_rate), Rate(ours.node_rate)

    def seconds_to_wait(self, job: Job) -> float:
        """Seconds until one more request of this user and for this node may be looked at; 0: it is counted, and goes on."""
        node, user, now = job.node, job.one.request.username, time.monotonic()
        # by requester, too: another node could name this one until its own kubelet had to wait
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
            NoAnswerError: The API server does not tell whether the Node object exists.
        """
        one, node, nodes = job.one, job.node, self._context.nodes
        spec = self._spec(one)
        if spec is None:
            return Later("the policy had no table for this signer when the gateway was started; restart it")
        world = self._world(spec)
        verdict = judge(one.request, world)
        # no program, DNS or API server is asked about a request that is hostile by its own words
        if node is not None and not isinstance(verdict, Hostile):
            try:
                entry = nodes.entry(node)
            except BridgeError as e:
                return Later(str(e))
            if entry is not None:
                entry = nodes.with_dns(node, entry, addresses_of(one.request))
                state = self._state(node, entry, one.request.username)
                verdict = judge(one.request, replace(world, entry=entry, state=state))
        rules = world.policy.signers.get(one.request.signer)
        needs_other = rules is not None and rules.approval == "required"
        if isinstance(verdict, Allowed) and needs_other and not one.has(watch.APPROVED):
            return Later("it was not approved yet (approval = required)")
        return verdict

    def counts(self, one: SigningRequest) -> bool:
        """
        Whether a request about a node may be signed by what the files say: no program, no API server is asked.

        A node that only `inventory_command` could name counts as allowed here.
        """
        spec, node = self._spec(one), node_of(one.request)
        if spec is None or node is None:
            return False
        world = self._world(spec)
        entry = world.inventory.nodes.get(node)
        if entry is None:
            return not isinstance(judge(one.request, world), Hostile)
        state = NodeState(exists=one.request.username == f"{NODE_USER}{node}")
        return isinstance(judge(one.request, replace(world, entry=entry, state=state)), Allowed)

    def _spec(self, one: SigningRequest) -> CertificateSpec | None:
        spec = spec_of(one.request.signer)
        return spec if spec is not None and spec.authority.name in self._context.authorities else None

    def _world(self, spec: CertificateSpec) -> World:
        context = self._context
        return World(
            policy=context.nodes.policy,
            cluster=context.settings.node.cluster,
            inventory=context.nodes.inventory,
            ca_end=context.authorities[spec.authority.name].end(),
            min_validity=context.settings.gateway.min_validity,
            now=context.now(),
        )

    def _state(self, node: str, entry: NodeEntry, username: str) -> NodeState:
        # a token's node does not exist yet, as a rule; a node that asks for itself may have registered this moment
        itself = username == f"{NODE_USER}{node}"
        return self._states.state(node, newer=itself, with_readiness=entry.rejoin and not itself)
