"""The gateway as a service: its threads, its pages, its start and end, and the rights that it needs."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shlex
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import datetime
from functools import cached_property, partial
from http import HTTPStatus
from typing import NamedTuple

from bridge.ca import registry
from bridge.cluster.api import Api, NoAnswerError
from bridge.errors import BackendError, BridgeError, Exit, SettingsError, SettingsProblem
from bridge.gateway import authorities, pages, roots
from bridge.gateway.authorities import AuthorityOfSigners
from bridge.gateway.context import Alone, Context, Leader, Ledger, PendingRequests, spec_for
from bridge.gateway.issue import Issuing
from bridge.gateway.nodes import Nodes
from bridge.gateway.pages import Metrics
from bridge.gateway.queue import Queue
from bridge.gateway.roots import Roots
from bridge.gateway.rules import CLIENT_KUBELET, PodSignerRules, spec_of
from bridge.gateway.watch import CSRS, SILENCE_SECONDS, Watch, served
from bridge.gateway.watch import PODS as POD_REQUESTS
from bridge.settings import address_of
from bridge.settings.tables import GatewaySettings, Settings
from bridge.specs import PODS
from bridge.state import Store, credentials
from bridge.state.audit import AuditError
from bridge.system.locks import LockedError, lock
from bridge.system.metrics import health, labels
from bridge.system.waiting import back_off_seconds
from bridge.words import one_line

log = logging.getLogger("ca-bridge")

_TICK_SECONDS = 0.5
#: An idle thread wakes up after this; the queue wakes it earlier for work, or when the queue is closed.
_IDLE_SECONDS = 30.0
#: A round of the watch that left requests out lasts at least this long, even if the queue has room for them earlier.
_SHORTEST_ROUND_SECONDS = 30.0
#: A round that has not read all objects after this makes the replica unready.
_LONGEST_READING_SECONDS = 120.0
#: If the audit log can't be written for this long, `/healthz` fails: a new pod has an empty directory.
_LONGEST_FAILING_SECONDS = 60.0
_ISSUERS_SECONDS = 3600.0
#: The gateway waits at most this long for the first check of its CAs before it signs.
_FIRST_LOOK_SECONDS = 10.0
_FLUSH_SECONDS = 1.0
_ROOTS_SECONDS = 5.0
#: Requests at the CA get this long when the gateway ends; systemd and the kubelet give at least 30 s.
_DRAIN_SECONDS = 25.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 15.0


class Service:
    """The gateway as a whole: built from the settings, checked, run and stopped."""

    def __init__(self, settings: Settings, now: Callable[[], datetime]) -> None:
        """Read policy, inventory, CA certificates and credentials, and open backends; SettingsError if one can't be used."""
        ours = settings.gateway
        self.settings = settings
        self.nodes = Nodes(ours)
        policy = self.nodes.files()[0]
        self.kubernetes_signers, self.pod_signers = tuple(sorted(policy.signers)), tuple(sorted(policy.pod_signers))
        self.signers = (*self.kubernetes_signers, *self.pod_signers)
        if not self.signers:
            wanted = 'a table for a signer, such as [signer."kubernetes.io/kubelet-serving"]'
            raise SettingsError([SettingsProblem("signer", wanted, "none", ours.policy)])
        self.specs = [spec for signer in self.kubernetes_signers if (spec := spec_of(signer)) is not None]
        self.specs += dict.fromkeys(rules.spec for _, rules in sorted(policy.pod_signers.items()))
        self.api = Api.of_gateway(ours.kubeconfig)
        self.authorities = authorities.opened(settings, self.specs)
        self.metrics = Metrics(self.signers)
        self.identity = f"{ours.identity or os.uname().nodename}_{secrets.token_hex(4)}"
        self.holder: Leader | Alone = Alone()
        if ours.lease:
            self.holder = Leader(self.api, (ours.lease_namespace, ours.lease_name), self.identity, ours.lease_duration)
        self._now = now
        self._started, self._ending = False, False
        self._stop = threading.Event()
        self._watching = [Watch(self.api, self.kubernetes_signers)] if self.kubernetes_signers else []
        self._watching += [Watch(self.api, (pod_signer,), of_pods=True) for pod_signer in self.pod_signers]
        self._threads: list[threading.Thread] = []
        self._roots = Roots(self.api)

    def check(self) -> Iterator[str]:
        """Check the API server (NoAnswerError, ApiRefusesError) and the CAs (BackendError); sign nothing, yield problems."""
        assert_rights(self.api, rights_needed(self.kubernetes_signers, self.settings.gateway, self.pod_signers))
        if isinstance(self.holder, Leader) and (found := self.holder.lease.trial()):
            failed = f"can't make the lease {self.holder.lease.name}, which is not there yet"
            raise ApiRefusesError(f"{self.api.server}: {failed}: {found}")
        for resource in (POD_REQUESTS, roots.BUNDLES) if self.pod_signers else ():
            served(self.api, resource)
        for authority in self.authorities.values():
            yield from authority.check(self._now(), self._pod_rules())

    def _pod_rules(self) -> Collection[PodSignerRules]:
        return self.nodes.files()[0].pod_signers.values()

    def notes(self) -> Iterator[str]:
        """Yield sentences on what `check` can't see but an administrator has to know."""
        rules = self.nodes.files()[0].signers.get(CLIENT_KUBELET)
        if rules is not None and rules.approval == "required":
            yield (
                f"{CLIENT_KUBELET} needs a person's approval: delete the bindings by which kube-controller-manager approves, "
                "kubeadm:node-autoapprove-bootstrap and kubeadm:node-autoapprove-certificate-rotation"
            )

    # --- running ----------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Start no new work, and end; a signal handler may call it."""
        self._ending = True  # no Event: the thread that the signal interrupts may hold its lock

    def run(self, started: Callable[[int | None], None]) -> None:
        """Work until `stop`; `started` gets the port of the status pages, or None without them (LockedError)."""
        store = Store(self.settings.gateway.state_dir or self.settings.node.state_dir / "gateway")
        store.prepare()
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(lock(store.lock, shlex.join(sys.argv)))
            except LockedError as e:
                e.hint = "each gateway has a state directory of its own: end the other one, or set gateway.state_dir"
                raise
            port = None
            address = address_of(self.settings.gateway.listen)
            if self.settings.gateway.serve_status and address is not None:
                by_path = {"/metrics": self._metrics_page, "/healthz": self._healthz, "/readyz": self._readyz}
                port = stack.enter_context(pages.serving(address, by_path))
            ledger, count = Ledger(store, self.settings.audit), self.settings.gateway.concurrency
            self.context = Context(
                settings=self.settings, api=self.api, nodes=self.nodes, authorities=self.authorities,
                ledger=ledger, pending_at_ca=PendingRequests(store), metrics=self.metrics, holder=self.holder, now=self._now,
                queue=Queue(lambda signer: spec_for(signer).authority.name, most_at_one_ca(count, len(self.authorities))),
            )  # fmt: skip
            self._issuing = Issuing(self.context)
            self._started = True
            cas = list(self._look_at_cas())
            self.holder.start(lambda: not ledger.trouble)
            threads = [threading.Thread(target=self._work, name=f"worker-{n}", daemon=True) for n in range(count)]
            threads += [threading.Thread(target=self._watch_on, args=(watch,), name=f"watch of {watch.what}", daemon=True)
                        for watch in self._watching]  # fmt: skip
            if self.pod_signers:
                threads.append(threading.Thread(target=self._keep_roots, name="roots", daemon=True))
            for thread in threads:
                thread.start()
            self._threads = [*threads, *cas, *self.holder.threads]
            started(port)
            self._tick_until_stopped()
            self._drain(threads)

    def _look_at_cas(self) -> Iterator[threading.Thread]:
        """Start a thread to check each CA, and await the first checks; a CA that hangs delays only its own signers."""
        deadline, looked = time.monotonic() + _FIRST_LOOK_SECONDS, []
        for authority in self.authorities.values():
            looked.append(threading.Event())
            work, name = partial(self._keep_looking, authority, looked[-1]), f"look at {authority.name}"
            thread = threading.Thread(target=work, name=name, daemon=True)
            thread.start()
            yield thread
        for event in looked:
            event.wait(max(0.0, deadline - time.monotonic()))

    def _keep_looking(self, authority: AuthorityOfSigners, looked: threading.Event) -> None:
        """
        Check a CA as `--check` does and read its issuers again, each hour and whenever its certificate file changes: a
        new intermediate or root ends later than the old one.
        """
        while not self._stop.is_set():
            anchors, until = authority.anchors(), time.monotonic() + _ISSUERS_SECONDS
            try:
                for text in authority.check(self._now(), self._pod_rules()):
                    log.warning("%s", text)
            except BackendError as e:
                log.warning("%s: %s", authority.ca.label, e)
            looked.set()
            while time.monotonic() < until and authority.anchors() == anchors and not self._stop.wait(_TICK_SECONDS):
                pass

    def _keep_roots(self) -> None:
        """Publish the roots by which we verify the CA's answers as those that pods trust; one replica does."""
        while not self._stop.wait(_ROOTS_SECONDS):
            if not self.holder.is_ours():
                continue
            tables = self.nodes.files()[0].pod_signers
            text = roots.text_of(self.authorities[PODS.name].anchors())
            for signer in self.pod_signers:
                if (rules := tables.get(signer)) is not None:
                    self._roots.keep(signer, text if rules.publish else None)

    def _work(self) -> None:
        while not self._stop.is_set():
            self._issuing.work(_IDLE_SECONDS)

    def _watch_on(self, watch: Watch) -> None:
        failures = 0
        while not self._stop.is_set():
            watch.alive = time.monotonic()
            if not self.holder.is_ours():
                self._stop.wait(_TICK_SECONDS)
                continue
            try:
                watch.run(self._issuing.changed, self._issuing.deleted)
                failures = 0
            except NoAnswerError as e:
                if not watch.trouble:
                    log.warning("%s; the watch starts again", e)
                watch.trouble = str(e)
                self._stop.wait(back_off_seconds(failures, _FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS))
                failures += 1
            except Exception as e:  # noqa: BLE001 (without a watch nothing would ever be signed again)
                watch.trouble = f"internal error: {type(e).__name__}"
                log.error("the watch ended with %s (a bug: report it); it starts again", type(e).__name__)  # noqa: TRY400
                self._stop.wait(_LONGEST_PAUSE_SECONDS)
            finally:
                if watch.left_out:
                    log.warning("%d objects with one of our signers' names were too large to be read", watch.left_out)
                    self.metrics.count(watch.signers[0], "too-large", watch.left_out)
            if not self.holder.is_ours():
                self.context.queue.forget()

    def _tick_until_stopped(self) -> None:
        changes, flushed, is_full = self.nodes.changes, time.monotonic(), False
        queue = self.context.queue
        while not self._ending:
            time.sleep(_TICK_SECONDS / 2)
            self.nodes.files()  # reads changed files again
            if self.nodes.changes != changes:
                changes = self.nodes.changes
                self._warn_of_new_signers()
                queue.wake()
            if time.monotonic() - flushed >= _FLUSH_SECONDS:
                flushed = time.monotonic()
                self._flush()
            if queue.overflowed is not is_full:
                is_full = queue.overflowed
                if is_full:
                    text = "more requests are waiting than fit into the queue, most of them by %s: some have to wait"
                    log.warning(text, one_line(queue.greediest()))
            if not self.holder.is_ours() or all(map(self._is_new_round_due, self._watching)):
                queue.overflowed = False
                for watch in self._watching:
                    watch.end()

    def _is_new_round_due(self, watch: Watch) -> bool:
        """Whether requests that did not fit have room now, and the round was long enough to get behind a flood."""
        is_old = time.monotonic() - watch.began >= _SHORTEST_ROUND_SECONDS
        queue = self.context.queue
        return queue.overflowed and is_old and watch.has_seen_all() and queue.has_room()

    def _flush(self) -> None:
        try:
            self.context.ledger.flush()
        except AuditError as e:
            log.error("%s", e)  # noqa: TRY400

    def _warn_of_new_signers(self) -> None:
        policy = self.nodes.files()[0]
        if new := sorted({*policy.signers, *policy.pod_signers} - set(self.signers)):
            log.warning("the policy has new signers: %s; restart the gateway for them", ", ".join(new))

    def _drain(self, threads: list[threading.Thread]) -> None:
        log.info("ending: nothing new is begun")
        self._stop.set()
        self.context.queue.close()
        for watch in self._watching:
            watch.end()
        deadline = time.monotonic() + _DRAIN_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._flush()
        self.holder.release()
        for authority in self.authorities.values():
            authority.ca.close()
        self.api.close()
        left = self.context.queue.counts()[1]
        log.info("ended%s", f"; {left} requests were left unfinished" if left else "")

    # --- pages --------------------------------------------------------------------------------------------------------

    def _metrics_page(self) -> tuple[int, str]:
        if self._started:
            queue = self.context.queue
            waiting, working = queue.counts()
            states = {"waiting": waiting, "working": working, "at-ca": len(self.context.pending_at_ca)}
            flags = {
                "queue_overflowed": queue.overflowed,
                "watch_complete": all(watch.has_seen_all() for watch in self._watching),
                "leader": self.holder.is_ours(),
                "api_up": not any(watch.trouble for watch in self._watching),
                "inventory_good": not self.nodes.trouble,
            }
            self.metrics.gauges = {
                **{("queue", labels(state=state)): float(count) for state, count in states.items()},
                **{(name, ""): float(value) for name, value in flags.items()},
                **{
                    ("roots_published", labels(signer=signer)): float(good) for signer, good in self._roots.good.items()
                },
            }
        own = credentials.look(self.settings, self._places, None)
        return HTTPStatus.OK, self.metrics.text() + credentials.metrics(own, self.settings.renewal.before)

    @cached_property
    def _places(self) -> list[credentials.CredentialFile]:
        """The credential files with which the gateway logs in at the API server and the CAs."""
        backends = registry.configured(self.settings, self.settings.authorities)
        return registry.credentials(self.settings, backends)

    def _healthz(self) -> tuple[int, str]:
        return health(self._sick(), "ok\n")

    def _sick(self) -> Iterator[str]:
        """Yield troubles that a restart may end."""
        if ended := [thread.name for thread in self._threads if not (thread.is_alive() or self._ending)]:
            yield f"threads have ended: {', '.join(ended)}"
        for watch in self._watching:
            silence = time.monotonic() - watch.alive
            if silence > 2 * SILENCE_SECONDS:
                yield f"nothing was heard from the watch for {silence:.0f} s"
        if self._started and self.context.ledger.failing_seconds() > _LONGEST_FAILING_SECONDS:
            yield self.context.ledger.trouble

    def _readyz(self) -> tuple[int, str]:
        return health(self._unready(), "ok: this replica works\n" if self.holder.is_ours() else "ok: standing by\n")

    def _unready(self) -> Iterator[str]:
        yield self.nodes.trouble
        yield self.context.ledger.trouble if self._started else "it is starting"
        if self.holder.is_ours():
            for watch in self._watching:
                yield watch.trouble
                age = time.monotonic() - watch.began
                if age > _LONGEST_READING_SECONDS and not watch.has_seen_all():
                    yield f"the watch has not read all {watch.what} for {age:.0f} s"
        elif isinstance(self.holder, Leader) and time.monotonic() - self.holder.last_answer > SILENCE_SECONDS:
            yield self.holder.said or "the API server does not answer"


def most_at_one_ca(threads: int, cas: int) -> int:
    """Return how many threads may work for one CA, so that one is left for each other CA while all the others hang."""
    return threads if cas == 1 else max(1, (threads - 1) // (cas - 1))


_REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
_CERTIFICATES = "certificates.k8s.io"


class ApiRefusesError(BridgeError):
    """The API server denies a right that the gateway needs."""

    exit_code = Exit.REFUSED
    hint = (
        "`ca-bridge help gateway` names the rights that the gateway needs, and `ca-bridge setup kubernetes` prints them"
    )


class Right(NamedTuple):
    """One verb on one kind of object."""

    verb: str
    group: str
    resource: str
    subresource: str = ""
    name: str = ""
    namespace: str = ""

    def __str__(self) -> str:
        what = f"{self.resource}/{self.subresource}" if self.subresource else self.resource
        return " ".join(filter(None, (self.verb, what, self.name, self.namespace and f"in namespace {self.namespace}")))


def rights_needed(
    signers: Sequence[str], settings: GatewaySettings, pod_signers: Sequence[str] = ()
) -> Iterator[Right]:
    """Yield the rights that docs/gateway.md names, except to create the lease, which `Lease.trial` checks (pure)."""
    for resource, subresources, names, verbs in (
        (CSRS, ("approval", "status"), signers, ("approve", "sign")),
        (POD_REQUESTS, ("status",), pod_signers, ("sign",)),
    ):
        if names:
            yield from (Right(verb, _CERTIFICATES, resource) for verb in ("get", "list", "watch"))
            yield from (Right("patch", _CERTIFICATES, resource, subresource) for subresource in subresources)
            yield from (Right(verb, _CERTIFICATES, "signers", name=name) for name in names for verb in verbs)
    if pod_signers:
        for resource in ("pods", "serviceaccounts", "namespaces"):
            yield Right("get", "", resource)
        yield Right("create", _CERTIFICATES, roots.BUNDLES)
        yield Right("create", "", "events")
    for pod_signer in pod_signers:
        yield Right("attest", _CERTIFICATES, "signers", name=pod_signer)
        for verb in ("get", "patch", "delete"):
            yield Right(verb, _CERTIFICATES, roots.BUNDLES, name=roots.name_of(pod_signer))
    yield Right("get", "", "nodes")
    if settings.lease:
        name, namespace = settings.lease_name, settings.lease_namespace
        for verb in ("get", "update"):
            yield Right(verb, "coordination.k8s.io", "leases", name=name, namespace=namespace)


def assert_rights(api: Api, rights: Iterator[Right]) -> None:
    """Ask the API server about each right (SelfSubjectAccessReview), without using any."""
    missing = [str(right) for right in rights if not _is_given(api, right)]
    if missing:
        raise ApiRefusesError(f"{api.server}: the right is missing to {', to '.join(missing)}")


def _is_given(api: Api, right: Right) -> bool:
    """Whether we have a right; on a signer, it may also come from a grant for all signers of its domain."""
    names = [right.name, f"{right.name.partition('/')[0]}/*"] if right.resource == "signers" else [right.name]
    return any(_is_allowed(api, right._replace(name=name)) for name in names)


def _is_allowed(api: Api, right: Right) -> bool:
    kind = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview"}
    attributes = {key: value for key, value in right._asdict().items() if value}
    reply = api.ask("POST", _REVIEWS, {**kind, "spec": {"resourceAttributes": attributes}})
    status = reply.document.get("status")
    if reply.status != HTTPStatus.CREATED or not isinstance(status, dict):
        found = f"HTTP {reply.status} {reply.message}"
        raise ApiRefusesError(f"{api.server}: can't ask which rights we have: {found}")
    return status.get("allowed") is True
