"""The gateway as a service: who works, the threads, what can be asked about it, and how it ends."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import secrets
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from http import HTTPStatus
from pathlib import Path

from bridge.cluster.api import Api
from bridge.cluster.errors import NoAnswerError
from bridge.errors import BackendError, SettingsError, SettingsProblem
from bridge.gateway import authorities, rights, status
from bridge.gateway.context import Place
from bridge.gateway.handling import Gateway, specs_of
from bridge.gateway.known_nodes import Known
from bridge.gateway.leader import Alone, Leader
from bridge.gateway.ledger import Ledger
from bridge.gateway.metrics import Metrics
from bridge.gateway.pending_at_ca import Tickets
from bridge.gateway.watch import SILENCE_SECONDS, Watch
from bridge.settings.tables import Settings
from bridge.state.audit import AuditError
from bridge.state.store import Store
from bridge.system.files import LockedError, lock
from bridge.words import one_line

log = logging.getLogger("ca-bridge")

#: So many more threads wait where a CA signs many in one go: what waits is what it gets together.
_THREADS_OF_MANY = 96
#: Python looks for circles after 700 new objects; hundreds of requests at once have many more, and hardly a circle.
_OBJECTS_A_COLLECTION = 20_000
_TICK_SECONDS = 0.5
_FLUSH_SECONDS = 1.0
#: What is at the CA is given this long when the gateway is to end; systemd and the kubelet give 30 s and more.
_DRAIN_SECONDS = 25.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 15.0


@contextlib.contextmanager
def _alone(store: Store) -> Iterator[None]:
    """
    One gateway a state directory.

    Raises:
        LockedError: Another one has it.
    """
    try:
        with lock(store.lock, shlex.join(sys.argv), timedelta()):
            yield
    except LockedError as e:
        e.hint = "each gateway has a state directory of its own: end the other one, or set gateway.state_dir"
        raise


class Service:
    """The gateway as a whole: made of the settings, started, run and ended."""

    def __init__(self, settings: Settings, now: Callable[[], datetime]) -> None:
        """
        Raises:
            SettingsError: Policy, inventory, the CAs' certificates, credentials or backends can't be used.
        """
        ours = settings.gateway
        self.settings = settings
        self.known = Known(ours)
        self.signers = tuple(sorted(self.known.policy.signers))
        if not self.signers:
            wanted = 'a table for a signer, such as [signer."kubernetes.io/kubelet-serving"]'
            raise SettingsError([SettingsProblem("signer", wanted, "none", ours.policy)])
        self.specs = specs_of(iter(self.signers))
        self.api = Api.of_gateway(ours.kubeconfig)
        self.authorities = authorities.opened(settings, self.specs)
        self.metrics = Metrics(self.signers)
        self.identity = f"{ours.identity or os.uname().nodename}_{secrets.token_hex(4)}"
        self.holder: Leader | Alone = Alone()
        if ours.lease:
            self.holder = Leader(self.api, (ours.lease_namespace, ours.lease_name), self.identity, ours.lease_duration)
        self._now = now
        self._ending = False
        self._stop = threading.Event()
        self._watch: Watch | None = None
        self._api_trouble = "the API server was not asked yet"
        self._alive = time.monotonic()
        self._threads: list[threading.Thread] = []

    def check(self) -> Iterator[str]:
        """
        Ask the API server and the CAs, and sign nothing; what is wrong, in sentences.

        Raises:
            NoAnswerError, ApiRefusesError: The API server does not answer, or not us.
            BackendError: A CA does not.
        """
        rights.assert_given(self.api, rights.needed(self.signers, self.settings.gateway))
        for authority in self.authorities.values():
            yield from authority.check([spec for spec in self.specs if spec.authority.name == authority.name])

    # --- running ----------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Begin nothing new, and end; for a signal handler, too."""
        self._ending = True  # an Event's lock may be held by the thread that the signal came to

    def run(self, started: Callable[[int | None], None]) -> None:
        """
        Work until `stop`.

        Args:
            started: Is told the port of the status pages, if there are any.

        Raises:
            LockedError: Another gateway has the state directory.
            BridgeError: The state directory or the address can't be used.
        """
        store = Store(_state_dir(self.settings))
        store.prepare()
        with contextlib.ExitStack() as stack:
            stack.enter_context(_alone(store))
            port = None
            address = self.settings.gateway.address
            if self.settings.gateway.serve_status and address is not None:
                port = stack.enter_context(status.serving(address, self._pages()))
            self._ledger = Ledger(store, self.settings.audit)
            self.place = Place(
                settings=self.settings, api=self.api, known=self.known, authorities=self.authorities,
                ledger=self._ledger, tickets=Tickets(store), metrics=self.metrics, holder=self.holder, now=self._now,
            )  # fmt: skip
            self._gateway = Gateway(self.place)
            self._look_at_cas()
            self.holder.start()
            threads = [threading.Thread(target=self._work, name=f"worker-{n}", daemon=True) for n in range(self._count)]
            threads.append(threading.Thread(target=self._watch_on, name="watch", daemon=True))
            for thread in threads:
                thread.start()
            self._threads = [*threads, *self.holder.threads]
            started(port)
            gc.freeze()
            gc.set_threshold(_OBJECTS_A_COLLECTION, 20, 50)
            self._tick_until_stopped()
            self._drain(threads)

    @property
    def _count(self) -> int:
        many = any(one.signs_many for one in self.authorities.values())
        return max(self.settings.gateway.concurrency, _THREADS_OF_MANY if many else 0)

    def _look_at_cas(self) -> None:
        """Check the CAs as `--check` does; a CA that is away now is waited for."""
        for authority in self.authorities.values():
            ours = [spec for spec in self.specs if spec.authority.name == authority.name]
            try:
                for text in authority.check(ours):
                    log.warning("%s", text)
            except BackendError as e:
                log.warning("%s: %s", authority.label, e)

    def _work(self) -> None:
        while not self._stop.is_set():
            self._gateway.work(_TICK_SECONDS)

    def _watch_on(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while not self._stop.is_set():
            if not self.holder.wait(_TICK_SECONDS):
                self._alive = time.monotonic()
                continue
            watch = self._watch = Watch(self.api, self.signers)
            try:
                watch.run(self._gateway.changed, self._gateway.gone, self._is_alive)
                pause = _FIRST_PAUSE_SECONDS
            except NoAnswerError as e:
                if not self._api_trouble:
                    log.warning("%s; it is begun anew", e)
                self._api_trouble = str(e)
                self._stop.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            except Exception as e:  # noqa: BLE001 (without a watch nothing would ever be signed again)
                self._api_trouble = f"internal error: {type(e).__name__}"
                log.error("the watch ended with %s (a bug: report it); it is begun anew", type(e).__name__)  # noqa: TRY400
                self._stop.wait(_LONGEST_PAUSE_SECONDS)
            finally:
                if watch.left_out:
                    log.warning("%d objects with one of our signers' names were too large to be read", watch.left_out)
                    self.metrics.count(self.signers[0], "too-large", watch.left_out)
            if not self.holder.is_ours():
                self.place.queue.forget()

    def _is_alive(self) -> None:
        self._alive = time.monotonic()
        if self._api_trouble:
            log.info("watching %s", self.api.server)
            self._api_trouble = ""

    def _tick_until_stopped(self) -> None:
        changes, flushed, is_full = self.known.changes, time.monotonic(), False
        while not self._ending:
            time.sleep(_TICK_SECONDS / 2)
            _ = self.known.policy, self.known.register  # read again if they have changed
            if self.known.changes != changes:
                changes = self.known.changes
                self._warn_of_new_signers()
                self.place.queue.wake()
            if time.monotonic() - flushed >= _FLUSH_SECONDS:
                flushed = time.monotonic()
                self._flush()
            waiting, _working = self.place.queue.counts()
            if self.place.queue.overflowed is not is_full:
                is_full = self.place.queue.overflowed
                self._tell(is_full=is_full)
            lost = not self.holder.is_ours()
            if self._watch is not None and (lost or (self.place.queue.overflowed and waiting < _ROOM)):
                self.place.queue.overflowed = False
                self._watch.end()

    def _tell(self, *, is_full: bool) -> None:
        if is_full:
            text = "more requests are waiting than fit into the queue, most of them by %s: some are looked at later"
            log.warning(text, one_line(self.place.queue.greediest()))

    def _flush(self) -> None:
        try:
            self._ledger.flush()
        except AuditError as e:
            log.error("%s", e)  # noqa: TRY400

    def _warn_of_new_signers(self) -> None:
        if new := sorted(set(self.known.policy.signers) - set(self.signers)):
            log.warning("the policy has new signers: %s; restart the gateway for them", ", ".join(new))

    def _drain(self, threads: list[threading.Thread]) -> None:
        log.info("ending: nothing new is begun")
        self._stop.set()
        self.place.queue.close()
        if self._watch is not None:
            self._watch.end()
        deadline = time.monotonic() + _DRAIN_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._flush()
        self.holder.release()
        for authority in self.authorities.values():
            authority.close()
        self.api.close()
        left = self.place.queue.counts()[1]
        log.info("ended%s", f"; {left} requests were left in the middle" if left else "")

    # --- what can be asked about it -----------------------------------------------------------------------------------

    def _pages(self) -> dict[str, status.Page]:
        return {"/metrics": self._metrics_page, "/healthz": self._healthz, "/readyz": self._readyz}

    def _metrics_page(self) -> tuple[int, str]:
        place = getattr(self, "place", None)
        if place is not None:
            waiting, working = place.queue.counts()
            gauges = {
                ("queue", '{state="waiting"}'): waiting,
                ("queue", '{state="working"}'): working,
                ("queue", '{state="at-ca"}'): len(place.tickets.all()),
                ("leader", ""): self.holder.is_ours(),
                ("api_up", ""): not self._api_trouble,
                ("inventory_good", ""): not self.known.trouble,
            }
            self.metrics.gauges.update({key: float(value) for key, value in gauges.items()})
        return HTTPStatus.OK, self.metrics.text()

    def _healthz(self) -> tuple[int, str]:
        if ended := [thread.name for thread in self._threads if not (thread.is_alive() or self._ending)]:
            return HTTPStatus.SERVICE_UNAVAILABLE, f"threads have ended: {', '.join(ended)}\n"
        silence = time.monotonic() - self._alive
        if silence > 2 * SILENCE_SECONDS and not self._api_trouble:
            return HTTPStatus.SERVICE_UNAVAILABLE, f"nothing was heard from the watch for {silence:.0f} s\n"
        return HTTPStatus.OK, "ok\n"

    def _readyz(self) -> tuple[int, str]:
        ledger = getattr(self, "_ledger", None)
        troubles = [self.known.trouble, ledger.trouble if ledger is not None else "it is starting"]
        if self.holder.is_ours():
            troubles.append(self._api_trouble)
        elif isinstance(self.holder, Leader) and time.monotonic() - self.holder.last_answer > SILENCE_SECONDS:
            troubles.append("the API server does not answer")
        found = [one for one in troubles if one]
        if found:
            return HTTPStatus.SERVICE_UNAVAILABLE, "".join(f"{one}\n" for one in found)
        return HTTPStatus.OK, "ok: this replica works\n" if self.holder.is_ours() else "ok: standing by\n"


#: Below so many waiting ones a flood is looked at again.
_ROOM = 500


def _state_dir(settings: Settings) -> Path:
    return settings.gateway.state_dir or settings.node.state_dir / "gateway"
