"""Answers to a new node's requests: proven by an earlier run, from carried files, or from the CAs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bridge.bootstrap.authorities import Certificates
from bridge.bootstrap.desired import DesiredNode, NobodySignsError
from bridge.errors import BridgeError, WaitingError
from bridge.pki import verify
from bridge.pki.bundle_format import short_fingerprint
from bridge.renewal import airgap
from bridge.renewal.issuance import Answered, issue, reaching
from bridge.renewal.prepare import Prepared
from bridge.renewal.select import outcome_of
from bridge.specs import AUTHORITIES
from bridge.state.session import Run
from bridge.state.store import Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """The answers that were found to a new node's requests."""

    answered: Sequence[Answered]
    waiting: Sequence[Outcome] = ()  #: Somebody has the request.
    strange: Sequence[BridgeError] = ()  #: Answers to something else.


def expected(run: Run, desired: DesiredNode, cas: Certificates) -> dict[str, verify.Expectation]:
    """The expectations that answers are checked against, by authority."""
    settings = run.settings
    return {
        name: verify.Expectation(
            anchors=certificates,
            anchor_name=str(desired.places.authority(AUTHORITIES[name])),
            now=run.now(),
            min_validity=settings.renewal.min_validity,
            extra_subject=settings.extra_subject(name),
        )
        for name, certificates in cas.items()
    }


def gather(
    run: Run, desired: DesiredNode, prepared: Sequence[Prepared], expected: Mapping[str, verify.Expectation]
) -> Answers:
    """Take what was proven before and what was carried; ask the CAs for the rest, or write it down for a desk."""
    answered = [one for each in prepared if (one := _proven_before(each, expected)) is not None]
    carried, strange = _carried(run, desired, _rest(prepared, answered), expected)
    answered += carried
    rest = _rest(prepared, answered)
    if desired.request is not None and rest:
        requests, _ = airgap.carry(run, rest, desired.request)
        why = f"{desired.request} is to be carried to the desk, fingerprint {short_fingerprint(requests)}"
        return Answers(answered=answered, waiting=[_waits(one, why) for one in rest], strange=strange)
    away = [one for one in rest if _is_away(run, one)]
    answered += _asked(run, [one for one in rest if one not in away], expected)
    waiting = [_waits(one, "an operator has the request") for one in away]
    return Answers(answered=answered, waiting=waiting, strange=strange)


def _rest(prepared: Sequence[Prepared], answered: Sequence[Answered]) -> list[Prepared]:
    had = {one.prepared.name for one in answered}
    return [one for one in prepared if one.name not in had]


def _carried(
    run: Run, desired: DesiredNode, prepared: Sequence[Prepared], expected: Mapping[str, verify.Expectation]
) -> tuple[list[Answered], Sequence[BridgeError]]:
    if not desired.answers:
        return [], ()
    found = airgap.answers_in(run, desired.answers)
    answered = [
        airgap.answered_by(run, one, found, expected[one.authority]) for one in prepared if one.name in found.candidates
    ]
    return answered, tuple(found.strange)


def _is_away(run: Run, one: Prepared) -> bool:
    """An operator has the request, and no CA can be asked for it."""
    return bool(one.open and one.open.bundles) and one.authority not in run.settings.authorities


def _asked(run: Run, prepared: Sequence[Prepared], expected: Mapping[str, verify.Expectation]) -> list[Answered]:
    if not prepared:
        return []
    lacking = {one.authority for one in prepared} - run.settings.authorities.keys()
    if lacking:
        raise NobodySignsError(
            f"wanted somebody who signs for {', '.join(name for name in AUTHORITIES if name in lacking)}, found nobody"
        )
    items = [one.item for one in prepared]
    with reaching(run.settings, items, expected, run.progress) as reached:
        return issue(run, prepared, reached(), expected)


def _proven_before(one: Prepared, expected: Mapping[str, verify.Expectation]) -> Answered | None:
    """An answer that an earlier run has checked and kept, if it still holds."""
    made, wanted = one.open, expected[one.authority]
    if made is None or made.answer is None or verify.error_of(made.answer, one.request, wanted) is not None:
        return None
    return Answered(prepared=one, expected=wanted, label=made.backend, answer=made.answer)


def _waits(one: Prepared, why: str) -> Outcome:
    return outcome_of(one.item, WaitingError(why, hint="run the same command again, with --answer FILE"))
