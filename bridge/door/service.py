"""
The door as a service: its start, its signing thread, its shutdown, and its pages for monitors.

One thread signs in rounds (`signing`); cheroot's threads receive requests and send answers (`https`, `app`). They share
the database (`store`). While a CA is down, the door keeps requests. While the database is down, it tells nodes to try
again later, because it signs nothing that it can't record.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from http import HTTPStatus
from itertools import chain
from pathlib import Path
from typing import Any

from cryptography import x509

from bridge.desk.approval import Trust
from bridge.door import fleet
from bridge.door.app import METRICS, Door, Reply, monitors_page
from bridge.door.approvals import Approvals, Pages
from bridge.door.est import ROOT, Est
from bridge.door.https import Https, serving
from bridge.door.revocations import ROOT as REVOCATIONS
from bridge.door.revocations import Revocations
from bridge.door.signing import Next, OwnClusterError, Signing
from bridge.door.store import DatabaseError, open_memory
from bridge.errors import BridgeError, SettingsError, SettingsProblem
from bridge.pki.certificates import spki
from bridge.settings.tables import Settings
from bridge.state import Store, credentials
from bridge.system.files import SECRET_MODE, write_atomically
from bridge.system.metrics import by_label, health, metric
from bridge.system.paths import UnreadableError, open_secret, read_ca_file
from bridge.system.waiting import CachedResult, back_off_seconds

log = logging.getLogger("ca-bridge")

PREFIX = "ca_bridge_serve"
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 30.0
#: How often the door looks for requests that another replica or an approver has left to it.
_IDLE_SECONDS = 5.0
#: At shutdown the signing round and open exchanges get this long together: longer than a CA's default `timeout`, and
#: shorter than the unit's TimeoutStopSec and the pod's grace period.
_DRAIN_SECONDS = 45.0
_TICK_SECONDS = 0.2
_TIDY_SECONDS = 3600.0
_SECRET, _SECRET_BYTES = "door.secret", 32
#: Most worker processes that parse and judge requests; one CPU is left to the signing thread.
_MOST_WORKERS = 4
#: A worker that spends this long on a bundle hangs; the largest bundle takes a second.
_LONGEST_TASK_SECONDS = 30.0


class Service:
    """The door: its database, its CAs, its signing thread and its HTTPS server."""

    def __init__(self, settings: Settings, policy_file: Path | None, now: Callable[[], datetime]) -> None:
        """Open the database, read the policy, reach the CAs (SettingsError, DatabaseError, OwnClusterError)."""
        if not settings.authorities:
            wanted = "an [authority.NAME] table for each CA that signs"
            raise SettingsError([SettingsProblem("authority", wanted, "none", settings.source.file)])
        self._settings = settings
        self._now = now
        self.memory = open_memory(settings, may_make=True)
        self._nodes = CachedResult(self._nodes_metrics)  # one text for all who ask, of megabytes at 100,000 nodes
        self._secret = secret(Store(settings.node.state_dir))
        self._persons: tuple[x509.Certificate, ...] = ()
        self._signing = Signing(settings, self.memory, policy_file, now, self._trust)
        self._signing.look()
        self._persons = _persons(settings, self._node_cas())
        self._assert_labels()
        for name, text in self._signing.troubles.items():
            log.warning("%s: %s; requests for it wait", name, text)
        served = [credentials.CredentialFile(credentials.SERVED, settings.serve.certificate)]
        for text in credentials.warnings(credentials.look(settings, served, None), settings, now()):
            log.warning("%s", text)
        pages: dict[str, Callable[[], Reply]] = {
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            METRICS: self._metrics,
        }
        approvals = Approvals(self.memory, self._signing)
        self._door = Door(settings, self.memory, self._signing, now, pages, approvals.asker)
        self._door.below |= {
            ROOT: Est(self._door),
            REVOCATIONS: Revocations(settings, self._door),
            "/v1/approvals": approvals.answer,
            "/approvals": Pages(approvals, self._secret, now),
        }
        self._ending = False
        self._fatal: OwnClusterError | None = None
        self._trouble = ""  #: The last round's error; empty if it succeeded.
        self._thread = threading.Thread(target=self._sign, name="signing", daemon=True)
        self._https: Https | None = None

    def stop(self) -> None:
        """Take no new request, and shut down; a signal handler may call this."""
        self._ending = True

    def run(self, started: Callable[[int], None]) -> None:
        """Listen, call `started` with the port, and serve until `stop`."""
        spare = max(1, min(_MOST_WORKERS, len(os.sched_getaffinity(0)) - 1))
        with contextlib.closing(self.memory), contextlib.closing(self._signing.workers):
            self._signing.workers.begin(spare)
            with serving(self._settings.serve, self._door, self._anchors, ROOT.encode()) as self._https:
                self._thread.start()
                started(self._https.port)
                heard = time.monotonic()
                while not self._ending and self._thread.is_alive():
                    time.sleep(_TICK_SECONDS)
                    self._signing.workers.tend(_LONGEST_TASK_SECONDS)
                    if time.monotonic() - heard > _IDLE_SECONDS:
                        heard = time.monotonic()
                        with contextlib.suppress(DatabaseError):  # the next round reports it
                            self._signing.doors.alive()
                log.info("shutting down: the door takes no new request")
                over = time.monotonic() + _DRAIN_SECONDS
                self._door.ending.set()
                self._signing.doors.is_ending = True
                self._signing.arrived.set()
            while self._thread.is_alive() and time.monotonic() < over:
                self._thread.join(_TICK_SECONDS)
                self._signing.workers.tend(_LONGEST_TASK_SECONDS)
            if self._thread.is_alive():
                text = "a CA has not answered %d seconds after the shutdown began; its requests wait for the next start"
                log.warning(text, _DRAIN_SECONDS)
            self._signing.close()
        if self._fatal is not None:
            raise self._fatal

    def _assert_labels(self) -> None:
        """Refuse an EST label whose CA the settings do not have."""
        policy, here = self._signing.policy, self._settings.authorities
        for label, rules in policy.est.items():
            spec = policy.spec_of(rules.certificate or label)
            if spec is not None and spec.authority.name not in here:
                wanted = f"a certificate by {' or '.join(here)}, which the settings have"
                raise SettingsError([SettingsProblem(f"est.{label}", wanted, f"one by {spec.authority.name}")])

    def _node_cas(self) -> list[x509.Certificate]:
        """Return the CAs that sign for nodes and agents."""
        return [*chain(*self._signing.cas.values(), *self._signing.policy.est_cas.values())]

    def _anchors(self) -> list[x509.Certificate]:
        """Return the CAs whose certificates clients may present: nodes' and approvers'."""
        return list(dict.fromkeys([*self._node_cas(), *self._persons]))

    def _trust(self) -> Trust:
        """Return what verifies approvers' decisions, without any CA that also signs for nodes or agents."""
        anchors = tuple(person for person in self._persons if not _shares_key(person, self._node_cas()))
        return Trust(anchors=anchors, secret=self._secret, now=self._now())

    # --- signing ------------------------------------------------------------------------------------------------------

    def _sign(self) -> None:
        """Run round after round, with a longer pause after each failure in a row."""
        failures, tidied = 0, -_TIDY_SECONDS
        while not self._door.ending.is_set():
            self._signing.arrived.clear()
            after: Next = "down"
            try:
                after = self._signing.round()
                if time.monotonic() - tidied > _TIDY_SECONDS:
                    tidied = time.monotonic()
                    kept, proves = self._settings.serve.keep, self._signing.policy.allow.proof_after_expiry
                    self.memory.forget(self._now() - kept, self._now() - max(kept, proves))
                    self._signing.doors.judge_again(self._now() - self._signing.policy.allow.max_age)
                self._trouble = ""
            except OwnClusterError as e:
                self._fatal = e
                return
            except BridgeError as e:
                self._failed(str(e))
            except Exception as e:
                log.exception("a round of signing ended (a bug: report it)")
                self._failed(f"internal error: {type(e).__name__}")
            failures = failures + 1 if after in {"down", "later"} else 0
            pause = back_off_seconds(failures, _FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS)
            if after == "down":
                self._door.ending.wait(pause)
            elif after != "more":
                self._signing.arrived.wait({"busy": _FIRST_PAUSE_SECONDS, "later": pause, "idle": _IDLE_SECONDS}[after])

    def _failed(self, text: str) -> None:
        if text != self._trouble:
            log.error("%s; requests wait, and are tried again", text)
        self._trouble = text
        self._signing.close()

    # --- pages --------------------------------------------------------------------------------------------------------

    def _healthz(self) -> Reply:
        has_ended = not (self._thread.is_alive() or self._door.ending.is_set())
        return monitors_page(*health(["the thread that signs has ended"] if has_ended else [], "ok\n"))

    def _readyz(self) -> Reply:
        """Report whether the door takes requests, which it does even while a CA is down."""
        down = "".join(f"{name} can't be used now; requests for it wait\n" for name in self._signing.troubles)
        return monitors_page(*health(self._unready(), f"ok\n{down}"))

    def _unready(self) -> Iterator[str]:
        if self._door.ending.is_set():
            yield "the door is shutting down"
        if self._trouble:
            yield "signing rounds fail; the log says why"
        try:
            self.memory.find("")
        except DatabaseError:
            yield "the database does not answer"

    def _metrics(self) -> Reply:
        try:
            counts = self.memory.counts()
            nodes = self._nodes()
        except DatabaseError:
            counts, nodes = {}, b""
        connections = self._https.counts() if self._https is not None else {}
        by_one_label: list[tuple[str, str, str, Mapping[Any, float], str]] = [
            ("requests", "Requests by state.", "state", counts, "gauge"),
            ("certificates_total", "Answers to single requests.", "outcome", self._signing.outcomes, "counter"),
            ("http_answers_total", "Answers by status.", "status", self._door.answers, "counter"),
            ("connections", "Connections now; those turned away since the start.", "kind", connections, "gauge"),
            ("workers", "Worker processes by state.", "state", self._signing.workers.states(), "gauge"),
            ("ca_down", "CAs that can't be used now.", "authority", dict.fromkeys(self._signing.troubles, 1), "gauge"),
        ]
        parts = [metric(f"{PREFIX}_{name}", text, by_label(label, values), kind)
                 for name, text, label, values, kind in by_one_label]  # fmt: skip
        parts += [metric(f"{PREFIX}_signing", "Whether rounds succeed.", [("", int(not self._trouble))])]
        return monitors_page(HTTPStatus.OK, "".join(parts), nodes)

    def _nodes_metrics(self) -> bytes:
        known = fleet.fleet(self.memory, self._settings.renewal.before, self._now())
        return fleet.metrics(known, fleet.unnamed(self.memory)).encode()


def secret(store: Store) -> bytes:
    """Return the door's secret, made at the first start, which authenticates what the door itself attests."""
    path = store.directory / _SECRET
    if not path.exists():
        write_atomically(path, secrets.token_bytes(_SECRET_BYTES), SECRET_MODE)
    exposed = open_secret(path)
    found = path.read_bytes()
    if exposed is not None or len(found) != _SECRET_BYTES:
        what = exposed.found if exposed is not None else f"{len(found)} bytes"
        hint = "remove it and start again: decisions without a signature that were not carried out are void then"
        wanted = f"{_SECRET_BYTES} bytes that only their owner can read"
        raise BridgeError(f"{path}: wanted {wanted}, found {what}", hint=hint)
    return found


def _shares_key(ca: x509.Certificate, others: Sequence[x509.Certificate]) -> bool:
    return spki(ca.public_key()) in {spki(other.public_key()) for other in others}


def _persons(settings: Settings, others: Sequence[x509.Certificate]) -> tuple[x509.Certificate, ...]:
    """Return the approvers' CAs (SettingsError: the file can't be read, or has a CA that signs for nodes or agents)."""
    path = settings.serve.approvers_ca
    if path is None:
        return ()
    wanted = "PEM with CA certificates that sign for people alone"
    try:
        persons = tuple(read_ca_file(path))
    except UnreadableError as e:
        raise SettingsError([SettingsProblem("serve.approvers_ca", wanted, f"{path}: {e}")]) from None
    if any(_shares_key(person, others) for person in persons):
        problem = SettingsProblem("serve.approvers_ca", wanted, f"{path}: a CA that signs for nodes or agents")
        raise SettingsError([problem])
    return persons
