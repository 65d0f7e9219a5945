"""Asks the CAs of a run: reach each, check what can be checked before a signature is spent, then ask."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, wait
from dataclasses import dataclass
from datetime import datetime

from bridge.ca import CA, CLOSED, registry
from bridge.contract import Issued, Pending, SignRequest
from bridge.errors import BridgeError, Exit, VerificationError
from bridge.node.inventory import Item
from bridge.pki import verify
from bridge.pki.expiry import duration_text, minute
from bridge.renewal import new_keys
from bridge.renewal.prepare import Making, Prepared, open_request, with_continuity
from bridge.settings.tables import Settings
from bridge.specs import AUTHORITIES
from bridge.state import Outcome, audit, credentials
from bridge.state.session import Run, give_up
from bridge.system.console import Progress, log
from bridge.system.paths import open_secret
from bridge.system.waiting import workers

Answer = Issued | Pending | BridgeError
#: By authority.
Expected = Mapping[str, verify.Expectation]
Reached = Mapping[str, CA]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One request, the expectation of its certificate, and the answer."""

    prepared: Prepared
    expected: verify.Expectation
    label: str  #: The CA or file that answered.
    answer: Answer
    advice: str = VerificationError.hint  #: The hint if the certificate fails verification.


class ShorterError(BridgeError):
    """Under our own settings the next certificate would end before the live one; no CA was asked."""

    exit_code = Exit.USAGE
    hint = 'set shorter = "allow" in [renewal] if that is meant, or a longer validity'


def shortened(item: Item, settings: Settings, now: datetime) -> ShorterError | None:
    """Return the error if the wanted validity ends before the live certificate does."""
    end = now + settings.renewal.validity
    if not item.certificates or not verify.is_shorter(end, item.certificates[0]):
        return None
    return ShorterError(
        f"wanted a certificate that does not end before the live one, {minute(item.certificates[0].not_valid_after_utc)}, "
        f"found renewal.validity = {duration_text(settings.renewal.validity)}, which ends {minute(end)}"
    )


def refused_as_shorter(items: Sequence[Item], settings: Settings, now: datetime) -> dict[str, ShorterError]:
    """Return the errors of `shortened` by certificate name; none where the settings allow it."""
    if settings.renewal.shorter == "allow":
        return {}
    return {item.spec.name: error for item in items if (error := shortened(item, settings, now)) is not None}


@contextlib.contextmanager
def reaching(run: Run, items: Sequence[Item], expected: Expected) -> Iterator[Callable[[], Reached]]:
    """Log in to all CAs concurrently and run their checks; yield a function that waits for them, then close them."""
    settings, progress = run.settings, run.progress
    backends = registry.configured(settings, dict.fromkeys(item.spec.authority.name for item in items))

    def reach_lot(names: Sequence[str]) -> dict[str, CA]:
        """Reach authorities that share a backend; the first of them opens it."""
        found: dict[str, CA] = {}
        opened = CLOSED
        for name in names:
            ours = [item for item in items if item.spec.authority.name == name]
            progress.signing(backends[name].label, [item.spec.name for item in ours])
            if opened is CLOSED:
                _warn_of_open_secrets(backends[name])
            specs, wanted = [item.spec for item in ours], expected[name]
            found[name] = ca = CA.reach(backends[name], specs, lambda _, wanted=wanted: wanted, progress.note, opened)  # type: ignore[misc]
            if ca.backend.asks_validity:  # it would give exactly this validity, which we would refuse
                ca.wrong = {**refused_as_shorter(ours, settings, wanted.now), **ca.wrong}
            if opened is CLOSED:
                ca.ends = ca.ask_ends(f"backend.{backends[name].name}")
            opened = ca.backend
        return found

    with workers(len(AUTHORITIES)) as pool:
        lots = [pool.submit(reach_lot, lot) for lot in _sharing(backends)]

        def reached() -> dict[str, CA]:
            return {name: ca for lot in lots for name, ca in lot.result().items()}

        is_interrupted = False
        try:
            yield reached
        except KeyboardInterrupt:  # do not wait for a CA
            is_interrupted = True
            raise
        finally:
            for ca in () if is_interrupted else reached().values():
                ca.close()


def _sharing(backends: Mapping[str, registry.Configured]) -> list[list[str]]:
    """Group authorities whose requests are carried the same way, so that one file goes out instead of several."""
    lots: list[list[str]] = []
    for name, ours in backends.items():
        is_carried, same = ours.backend_type.carries, (ours.name, ours.settings)
        alike = [lot for lot in lots if is_carried and (backends[lot[0]].name, backends[lot[0]].settings) == same]
        if alike:
            alike[0].append(name)
        else:
            lots.append([name])
    return lots


def _warn_of_open_secrets(configured: registry.Configured) -> None:
    """Warn of secrets in files that other users can read; `doctor` calls it an error, a renewal goes on."""
    for path in configured.settings.private_files():
        with contextlib.suppress(OSError):  # the backend that needs it reports it
            found = open_secret(path)
            if found is not None:
                log.warning("%s: %s", configured.label, found)
                log.warning("%s", found.hint, extra={"is_hint": True})


def issue_all(run: Run, making: Making, reached: Reached, expected: Expected) -> tuple[list[Answered], list[Outcome]]:
    """Issue each certificate once its key is made, or all at once if a CA wants that; return answers and failures."""
    new_keys.use_last_core()
    # for later runs that ask no CA
    credentials.remember(run.store, {name: one for ca in reached.values() for name, one in ca.ends.items()}, run.now())
    at_once = any(ca.backend.carries or ca.backend.can("sign_many", "collect") for ca in reached.values())
    left, answered = set(making), {}
    while left:
        done, left = wait(left, return_when=ALL_COMPLETED if at_once else FIRST_COMPLETED)
        ready = [one for each in making if each in done and isinstance(one := each.result(), Prepared)]
        answered.update({one.prepared.name: one for one in issue(run, ready, reached, expected)})
    every = [one.result() for one in making]
    done_in_order = [answered[one.name] for one in every if isinstance(one, Prepared)]
    return done_in_order, [one for one in every if isinstance(one, Outcome)]


def issue(run: Run, prepared: Sequence[Prepared], reached: Reached, expected: Expected) -> list[Answered]:
    """Ask all CAs concurrently for certificates or pending answers; requests and audit log are on disk before."""
    prepared = _opened(run, prepared, reached)
    for one in prepared:
        ca = reached[one.authority]
        run.record.describe(one.name, one.request, ca.label, ca.identity)
        if ca.error(one.name) is None and not _owes(ca, one):
            run.record.add(audit.ASKED, one.name, authority=one.authority)
    run.record.write()
    lots: dict[int, list[Prepared]] = defaultdict(list)
    for one in prepared:  # authorities that share a backend are asked in one request
        lots[id(reached[one.authority].backend)].append(one)
    answers: dict[str, Answer] = {}
    with workers(len(AUTHORITIES)) as pool:
        for part in pool.map(lambda lot: _ask(reached, expected, lot, run.progress), lots.values()):
            answers |= part
    answered = []
    for one in prepared:
        ca, answer, wanted = reached[one.authority], answers[one.name], expected[one.authority]
        if isinstance(answer, Issued):
            run.record.add(audit.ISSUED, one.name, authority=one.authority, new=answer.leaf)
        hint = ca.backend.advice(one.item.spec)
        answered.append(Answered(prepared=one, expected=wanted, label=ca.label, answer=answer, advice=hint))
    return answered


def _opened(run: Run, prepared: Sequence[Prepared], reached: Reached) -> list[Prepared]:
    """Save requests and keys before asking a CA that answers later; carried requests get the node's name."""
    opened = {one.name: one for one in prepared}
    to_carry: dict[tuple[int, str], list[Prepared]] = defaultdict(list)
    for one in prepared:
        ca = reached[one.authority]
        if _owes(ca, one):
            continue
        _drop_unfit(run, one)
        if ca.backend.carries:
            made_before = one.request.continuity.batch if one.request.continuity else ""
            to_carry[id(ca.backend), made_before].append(one)
    for ours in to_carry.values():
        opened |= {one.name: one for one in with_continuity(ours, run.settings, run.now())}
    for one in opened.values():
        ca = reached[one.authority]
        if ca.backend.can("collect") and not _owes(ca, one):
            request = open_request(run, one)
            run.requests.put(dataclasses.replace(request, request=one.request, backend=ca.label, reference="", note=""))
    run.requests.save()
    return list(opened.values())


def _drop_unfit(run: Run, one: Prepared) -> None:
    """Drop an open request that `prepare` replaced by one with other names, another kind of key or validity."""
    earlier = run.requests.get(one.name)
    if earlier is not None and one.open is None:
        if earlier.is_waiting:
            give_up(run, one.name, "another kind of key, another validity or other names are wanted now")
        run.requests.drop(one.name)


def _ask(reached: Reached, expected: Expected, prepared: Sequence[Prepared], progress: Progress) -> dict[str, Answer]:
    """Ask one backend; return its answers by certificate name, with the errors of those that its preflight refused."""
    ca = reached[prepared[0].authority]
    answers: dict[str, Answer] = {}
    requests = []
    for one in prepared:
        if one.open is not None and ca.backend is not CLOSED and _owes(ca, one):
            answers[one.name] = ca.collect(one.open.request, one.open.reference, expected[one.authority])
            progress.signed(one.name)
        elif (error := reached[one.authority].error(one.name)) is not None:
            answers[one.name] = error
        else:
            requests.append(one.request)

    def signed(some: Sequence[tuple[SignRequest, object]]) -> None:
        for request, _ in some:
            progress.signed(request.spec.name)

    if requests:
        given = ca.ask(requests, signed)
        answers |= {request.spec.name: answer for request, answer in zip(requests, given, strict=True)}
    return answers


def _owes(ca: CA, one: Prepared) -> bool:
    """Whether this CA has the request from an earlier run."""
    return one.open is not None and bool(one.open.reference) and one.open.backend == ca.label
