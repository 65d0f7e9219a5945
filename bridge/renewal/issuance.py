"""Asks the CAs of a run: reach each, check what can be checked before a signature is spent, then ask."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from bridge.ca import CA, CLOSED, registry
from bridge.contract import Issued, Pending, SignRequest
from bridge.errors import BridgeError, Exit, VerificationError
from bridge.node.inventory import Item
from bridge.pki import verify
from bridge.pki.expiry import duration_text, minute
from bridge.renewal.prepare import Prepared, open_request, with_continuity
from bridge.settings.tables import Settings
from bridge.specs import AUTHORITIES
from bridge.state import audit, credentials
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
        cas: dict[str, CA] = {}
        opened = CLOSED
        for name in names:
            items_of_ca = [item for item in items if item.spec.authority.name == name]
            progress.signing(backends[name].label, [item.spec.name for item in items_of_ca])
            if opened is CLOSED:
                _warn_of_open_secrets(backends[name])
            specs, wanted = [item.spec for item in items_of_ca], expected[name]
            cas[name] = ca = CA.reach(backends[name], specs, lambda _, wanted=wanted: wanted, progress.note, opened)  # type: ignore[misc]
            if ca.backend.asks_validity:  # it would give exactly this validity, which we would refuse
                ca.wrong = {**refused_as_shorter(items_of_ca, settings, wanted.now), **ca.wrong}
            if opened is CLOSED:
                ca.ends = ca.ask_ends(f"backend.{backends[name].name}")
            opened = ca.backend
        return cas

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
    for name, configured in backends.items():
        is_carried, same = configured.backend_type.carries, (configured.name, configured.settings)
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
            if (exposure := open_secret(path)) is not None:
                log.warning("%s: %s", configured.label, exposure)
                log.warning("%s", exposure.hint, extra={"is_hint": True})


def issue_all(run: Run, prepared: Sequence[Prepared], reached: Reached, expected: Expected) -> list[Answered]:
    """Record when our credentials at the CAs end, for later runs that ask no CA; then issue all certificates."""
    credentials.remember(run.store, {name: end for ca in reached.values() for name, end in ca.ends.items()}, run.now())
    return issue(run, prepared, reached, expected) if prepared else []


def issue(run: Run, prepared: Sequence[Prepared], reached: Reached, expected: Expected) -> list[Answered]:
    """Ask all CAs concurrently for certificates or pending answers; requests and audit log are on disk before."""
    prepared = _opened(run, prepared, reached)
    for item in prepared:
        ca = reached[item.authority]
        run.record.describe(item.name, item.request, ca.label, ca.identity)
        if ca.error(item.name) is None and not _owes(ca, item):
            run.record.add(audit.ASKED, item.name, authority=item.authority)
    run.record.write()
    lots: dict[int, list[Prepared]] = defaultdict(list)
    for item in prepared:  # authorities that share a backend are asked in one request
        lots[id(reached[item.authority].backend)].append(item)
    answers: dict[str, Answer] = {}
    with workers(len(AUTHORITIES)) as pool:
        for part in pool.map(lambda lot: _ask(reached, expected, lot, run.progress), lots.values()):
            answers |= part
    answered = []
    for item in prepared:
        ca, answer, wanted = reached[item.authority], answers[item.name], expected[item.authority]
        if isinstance(answer, Issued):
            run.record.add(audit.ISSUED, item.name, authority=item.authority, new=answer.leaf)
        hint = ca.backend.advice(item.item.spec)
        answered.append(Answered(prepared=item, expected=wanted, label=ca.label, answer=answer, advice=hint))
    return answered


def _opened(run: Run, prepared: Sequence[Prepared], reached: Reached) -> list[Prepared]:
    """Save requests and keys before asking a CA that answers later; carried requests get the node's name."""
    opened = {item.name: item for item in prepared}
    to_carry: dict[tuple[int, str], list[Prepared]] = defaultdict(list)
    for item in prepared:
        ca = reached[item.authority]
        if _owes(ca, item):
            continue
        _drop_unfit(run, item)
        if ca.backend.carries:
            made_before = item.request.continuity.batch if item.request.continuity else ""
            to_carry[id(ca.backend), made_before].append(item)
    for lot in to_carry.values():
        opened |= {item.name: item for item in with_continuity(lot, run.settings, run.now())}
    for item in opened.values():
        ca = reached[item.authority]
        if ca.backend.can("collect") and not _owes(ca, item):
            saved = open_request(run, item)
            run.requests.put(dataclasses.replace(saved, request=item.request, backend=ca.label, reference="", note=""))
    run.requests.save()
    return list(opened.values())


def _drop_unfit(run: Run, item: Prepared) -> None:
    """Drop an open request that `prepare` replaced by one with other names, another kind of key or validity."""
    earlier = run.requests.get(item.name)
    if earlier is not None and item.open is None:
        if earlier.is_waiting:
            give_up(run, item.name, "another kind of key, another validity or other names are wanted now")
        run.requests.drop(item.name)


def _ask(reached: Reached, expected: Expected, prepared: Sequence[Prepared], progress: Progress) -> dict[str, Answer]:
    """Ask one backend; return its answers by certificate name, with the errors of those that its preflight refused."""
    ca = reached[prepared[0].authority]
    answers: dict[str, Answer] = {}
    requests = []
    for item in prepared:
        if item.open is not None and ca.backend is not CLOSED and _owes(ca, item):
            answers[item.name] = ca.collect(item.open.request, item.open.reference, expected[item.authority])
            progress.signed(item.name)
        elif (error := reached[item.authority].error(item.name)) is not None:
            answers[item.name] = error
        else:
            requests.append(item.request)

    def signed(some: Sequence[tuple[SignRequest, object]]) -> None:
        for request, _ in some:
            progress.signed(request.spec.name)

    if requests:
        given = ca.ask(requests, signed)
        answers |= {request.spec.name: answer for request, answer in zip(requests, given, strict=True)}
    return answers


def _owes(ca: CA, item: Prepared) -> bool:
    """Whether this CA has the request from an earlier run."""
    return item.open is not None and bool(item.open.reference) and item.open.backend == ca.label
