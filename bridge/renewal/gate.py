"""Decides when a run without names may act: in its window, after its jitter, and not at a CA that failed too often."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from bridge.errors import BridgeError, Exit, WaitingError
from bridge.node import inventory
from bridge.node.reading import read_node
from bridge.pki.expiry import first_end, minute
from bridge.renewal import Selection
from bridge.renewal.selection import RunOptions, select
from bridge.settings.tables import RenewalSettings, Settings
from bridge.settings.windows import Decision, may_act
from bridge.state import Store
from bridge.state.session import Run, not_yet_signing
from bridge.system.codec import named
from bridge.system.state_file import OnDamage, StateFile, coded
from bridge.system.waiting import back_off_seconds

#: After this many failed runs in a row an operator is needed.
MANY = 3
FIRST_PAUSE = timedelta(hours=1)
LONGEST_PAUSE = timedelta(hours=24)
#: The longest pause once a certificate has expired, since the cluster then waits for the CA.
EXPIRED_PAUSE = timedelta(minutes=5)

_LONGEST_REASON = 500


def delay(settings: Settings, now: datetime, *, is_terminal: bool) -> timedelta:
    """Return how long a run without names waits before it takes the lock: `renewal.jitter`, if anything is due."""
    if is_terminal or not settings.renewal.jitter.most:
        return timedelta()
    node = read_node(settings.node)
    due = hold_for_window(select(node, settings, RunOptions(), now), settings.renewal, now)
    due = Attempts(Store(settings.node.state_dir)).held(due, now)
    return jitter(due, settings.renewal, now, share=secrets.SystemRandom().random())


# --- windows ---------------------------------------------------------------------------------------------------------


class NotYetError(WaitingError):
    """The certificate is due, and waits for its window; no CA has been asked."""

    hint = "the first run within the window renews it; `ca-bridge renew NAME` and `ca-bridge renew all` do not wait"


def decide(selection: Selection, settings: RenewalSettings, now: datetime) -> Decision:
    """Decide whether the selected certificates may be renewed now; if one can't wait, none of them waits."""
    if not settings.window or not selection.items:
        return Decision(act=True, reason="renewal.window is not set, or nothing is due")
    return may_act(now, settings.window, settings.window_zone.resolve(), _first_end(selection))


def hold_for_window(selection: Selection, settings: RenewalSettings, now: datetime) -> Selection:
    """Return the selection or, outside of the window, one without items: all certificates wait for the next window."""
    decision = decide(selection, settings, now)
    if decision.act:
        return selection
    error = NotYetError(f"due; {decision.reason} ({settings.window}, {settings.window_zone})")
    return selection.without({item.spec.name: error for item in selection.items})


def jitter(selection: Selection, settings: RenewalSettings, now: datetime, *, share: float) -> timedelta:
    """Return the wait before a run takes the lock, within the open window; `share` is random, from 0 to below 1."""
    if not selection.items:
        return timedelta()
    limits = [settings.jitter.most, (_first_end(selection) - now) / 2]
    if (until := decide(selection, settings, now).until) is not None:
        limits.append(until - now)
    return max(min(limits), timedelta()) * share


def _first_end(selection: Selection) -> datetime:
    """Return the earliest expiry; a missing certificate, which an operator asked for, waits for no window."""
    long_ago = datetime(2000, 1, 1, tzinfo=UTC)
    return min(first_end(item.ending) if item.certificates else long_ago for item in selection.items)


# --- a CA that is being replaced -------------------------------------------------------------------------------------


def next_ca_file(store: Store) -> StateFile[tuple[str, ...]]:
    """Return the file of authorities whose next CA has been asked, until all of its answers are installed."""
    what = "which authorities' next CAs have been asked"
    afterwards = "`ca-bridge pending list` shows the requests; `ca-bridge rotate-ca issue` goes on"
    return coded(tuple[str, ...], store.next_ca, what, OnDamage.REFUSE, key="authorities", afterwards=afterwards)


def hold_for_next_ca(selection: Selection, run: Run, node: inventory.Node) -> Selection:
    """Hold back certificates that the next CA has been asked for, or will be asked for later."""
    next_cas = next_ca_file(run.store).read() or ()
    waiting = {request.name for request in run.requests if request.is_waiting}
    later = not_yet_signing(run.settings, node.bundles)
    failing: dict[str, BridgeError] = {}
    for name, authority in ((item.spec.name, item.spec.authority.name) for item in selection.items):
        if authority in next_cas and name in waiting:
            failing[name] = WaitingError(
                "the CA that takes this one's place has the request, and has not answered yet",
                hint="`ca-bridge rotate-ca issue` installs its answer; `ca-bridge pending cancel NAME` gives it up",
            )
        elif authority in later:
            failing[name] = WaitingError(
                "the settings name the next CA alone (`next.anchor`), which does not sign yet on this node",
                hint="`ca-bridge rotate-ca trust` and `issue` renew it with all others; before `trust`, where kubeadm's CA "
                "key is on this node, `kubeadm certs renew NAME`",
            )
    return selection.without(failing)


# --- failed runs ------------------------------------------------------------------------------------------------------


class HeldOffError(BridgeError):
    """A CA is not asked yet, since its renewals failed too often; the exit code is that of the last failure."""

    hint = "fix the cause; `ca-bridge renew NAME` or `ca-bridge renew all` asks at once, and success ends the pauses"


class NeedsAPersonError(BridgeError):
    """A CA's renewals failed again and again; the exit code is that of the last failure."""

    hint = "fix the cause; without names, `renew` asks this CA less and less often until it succeeds"

    def __init__(self, authority: str, failures: Failures) -> None:
        super().__init__(f"{authority}: {failures}, and will be tried less often", exit_code=failures.exit_code)
        self.authority = authority


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """The failures in a row of one authority."""

    count: int
    since: datetime  #: Time of the first failure.
    last: datetime  #: Time of the last failure.
    exit_code: int = field(metadata=named("exitCode"))  #: Exit code of the last failure.
    reason: str  #: Message of the last failure.

    def __post_init__(self) -> None:
        if self.exit_code not in Exit.PRECEDENCE[:-1]:
            raise ValueError("not written by this program")

    @property
    def needs_a_person(self) -> bool:
        """Whether another try without an operator is unlikely to help."""
        return self.count >= MANY

    def __str__(self) -> str:
        runs = f"{self.count} runs in a row have" if self.count != 1 else "1 run has"
        return f"{runs} failed since {minute(self.since)}"


def next_try(failures: Failures, expires: datetime) -> datetime:
    """Return when to ask the CA again (pure): pauses double, up to a day and half of the time until `expires`."""
    if not failures.needs_a_person:
        return failures.last
    longest = LONGEST_PAUSE.total_seconds()
    pause = timedelta(seconds=back_off_seconds(failures.count - MANY, FIRST_PAUSE.total_seconds(), longest))
    left = expires - failures.last
    return failures.last + min(pause, left / 2 if left > timedelta() else EXPIRED_PAUSE)


class Attempts:
    """The failed runs so far; a caller that changes them holds the lock."""

    def __init__(self, store: Store) -> None:
        self._file = attempts_file(store)
        self.authorities = self._file.read() or {}

    def held(self, selection: Selection, now: datetime) -> Selection:
        """Hold back certificates of a CA that is not asked yet; they fail with the exit code of its last failure."""
        pauses = {name: pause for name in self.authorities if (pause := self._pause(name, selection, now)) is not None}
        names = ((item.spec.name, item.spec.authority.name) for item in selection.items)
        return selection.without({name: pauses[authority] for name, authority in names if authority in pauses})

    def _pause(self, name: str, selection: Selection, now: datetime) -> HeldOffError | None:
        items = [item for item in selection.items if item.spec.authority.name == name]
        ends = [first_end(item.certificates) for item in items if item.certificates]
        failures = self.authorities[name]
        # a last try in the future was dated by a clock that was set back since: no reason to wait
        if not ends or not failures.last <= now < (until := next_try(failures, min(ends))):
            return None
        text = f"{name}: {failures}, the next try is at {minute(until)}; the last failure: {failures.reason}"
        return HeldOffError(text, exit_code=failures.exit_code)

    def note(
        self, authorities: Collection[str], failed: Mapping[str, BridgeError], now: datetime
    ) -> list[NeedsAPersonError]:
        """Count a run on disk; return an error for each authority that failed and needs an operator."""
        before = dict(self.authorities)
        for name in authorities:
            if (error := failed.get(name)) is None:
                self.authorities.pop(name, None)
                continue
            record, reason, code = before.get(name), error.reason[:_LONGEST_REASON], error.exit_code
            count, since = (record.count + 1, record.since) if record is not None else (1, now)
            self.authorities[name] = Failures(count=count, since=since, last=now, exit_code=code, reason=reason)
        if self.authorities != before:
            self._file.put(self.authorities)
        records = [(name, record) for name, record in self.authorities.items() if name in failed]
        return [NeedsAPersonError(name, record) for name, record in records if record.needs_a_person]


def attempts_file(store: Store) -> StateFile[dict[str, Failures]]:
    """Return the file of failed runs, by authority; a damaged one counts as empty, at the cost of one more try."""
    what = "the failed runs so far"
    return coded(dict[str, Failures], store.attempts, what, OnDamage.START_OVER, key="authorities")
