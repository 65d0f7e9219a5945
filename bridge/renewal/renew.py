"""
Renewal: what is due, keys and CSRs (`bridge.renewal.prepare`), the CAs (`bridge.renewal.issuance`), proof and installation (`bridge.renewal.verify_and_install`).

Keys stay in this process's memory and the state directory until their certificates are installed; a type that leaves
the node holds none.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

from bridge.contract import Backend, Carries, Collects, Issued
from bridge.errors import VerificationError, WaitingError
from bridge.node.inventory import Item, Node
from bridge.pki import expiry, verify
from bridge.pki.durations import duration_text
from bridge.renewal import around
from bridge.renewal.issuance import Answer, Reached, owes, reach, sign
from bridge.renewal.prepare import Prepared, prepare, with_continuity
from bridge.renewal.schedule import NotYetError
from bridge.renewal.selection import Selection, outcome_of, select
from bridge.renewal.transaction import Walk
from bridge.renewal.verify_and_install import Result, expectations, finish, held_back, open_request, record_failed
from bridge.settings.tables import Settings
from bridge.signing import registry
from bridge.specs import AUTHORITIES
from bridge.state import audit, retention
from bridge.state.outcome import Outcome
from bridge.state.requests import OpenRequest
from bridge.state.session import Run, begun, give_up
from bridge.system.console import Progress


def run(
    settings: Settings,
    names: Collection[str],
    now: Callable[[], datetime],
    progress: Progress,
    *,
    all_or_nothing: bool = False,
    restarts: bool = True,
    wait: timedelta = timedelta(),
) -> tuple[Result, Node, Selection]:
    """
    Renew, online, in one process; wait so long for another run to end.

    Without `restarts` nothing is restarted and proven, and what earlier runs owe of that is left to later ones.

    Raises:
        LockedError: Another run works on this node.
        SettingsError: Nothing was asked.
        StateError: The open requests can't be read or kept; nothing was replaced.
        InstallError: Nothing was replaced.
    """
    is_terminal = any(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))
    if not names:
        _sleep(around.delay(settings, now(), is_terminal=is_terminal), progress)
    with begun(settings, now, progress, wait) as (ours, found):
        walk = Walk(ours, restarts=restarts)
        node = walk.earlier(found)
        if not walk.may_go_on:
            return walk.with_earlier(Result(outcomes=())), node, Selection(items=(), failed=(), skipped=())
        waiting = [one.name for one in ours.requests if one.reference]
        selection = select(node, settings, names, now(), waiting)
        if not names:
            selection = walk.around.held(selection, is_terminal=is_terminal)
        if selection.items:
            result = walk.whole(
                selection, lambda: _renew(ours, selection, node, walk.before, all_or_nothing=all_or_nothing)
            )
        else:
            record_failed(ours.record, [o for o in selection.failed if not isinstance(o.error, NotYetError)])
            result = walk.without_work(selection)
        if result.backup_id is not None:
            retention.retire(ours.store, settings, node, now())
        return result, node, selection


def _sleep(delay: timedelta, progress: Progress) -> None:
    if delay:
        progress.note(f"waits {duration_text(timedelta(seconds=int(delay.total_seconds())))} (renewal.jitter)")
        time.sleep(delay.total_seconds())


def _renew(
    run: Run,
    selection: Selection,
    node: Node,
    before: Callable[[Sequence[Outcome]], None],
    *,
    all_or_nothing: bool,
) -> Result:
    expected, unproved = expectations(node, run.settings, selection.items, run.now())
    items = [item for item in selection.items if item.spec.authority.name in expected]
    kept = _kept(run, items, expected)
    rest, carried = _to_ask(run, [item for item in items if item.spec.name not in kept])
    with ThreadPoolExecutor(1 + len(AUTHORITIES)) as pool:
        making = pool.submit(prepare, rest, run.settings, run.requests.by_name())  # takes as long as all the rest
        backends = registry.configured(run.settings, dict.fromkeys(item.spec.authority.name for item in rest))
        reached = _reach_all(pool, backends, rest, expected, run.progress)
        made = making.result()
    prepared = [one for one in made if isinstance(one, Prepared)]
    earlier = [*selection.failed, *unproved, *carried, *(one for one in made if isinstance(one, Outcome))]
    try:
        if earlier and all_or_nothing:
            outcomes = (*earlier, *held_back([*kept.values(), *prepared], earlier))
            record_failed(run.record, outcomes)
            return Result(outcomes=outcomes)
        prepared = _opened(run, prepared, reached)
        answers = _answers(run, prepared, reached)
    finally:
        for ca in reached.values():
            if ca.backend is not None:
                registry.close(ca.backend)
    labels = {one.name: reached[one.authority].label for one in prepared}
    for name, one in kept.items():
        if one.open is not None and one.open.answer is not None:
            answers[name], labels[name] = one.open.answer, one.open.backend
            run.record.know(name, one.request, one.open.backend, None)
    return finish(
        run,
        [*kept.values(), *prepared],
        answers,
        # as late as possible: signing may have taken a while
        {name: dataclasses.replace(one, now=run.now()) for name, one in expected.items()},
        labels=labels,
        earlier=earlier,
        all_or_nothing=all_or_nothing,
        before=before,
    )


def _kept(run: Run, items: Sequence[Item], expected: Mapping[str, verify.Expectation]) -> dict[str, Prepared]:
    """By name, those whose answers an earlier run proved and did not install: nobody is asked for them again."""
    answered = {one.name: one for one in run.requests if one.answer is not None}
    had = prepare([item for item in items if item.spec.name in answered], run.settings, answered)
    return {
        one.name: one
        for one in had
        if isinstance(one, Prepared) and one.open is not None and _is_still_good(one.open, run, expected[one.authority])
    }


def _is_still_good(kept: OpenRequest, run: Run, expected: verify.Expectation) -> bool:
    if kept.answer is None:
        return False
    try:
        proven = verify.check(kept.answer, kept.request, expected)
    except VerificationError:
        return False
    renewal = run.settings.renewal
    return not expiry.is_due((proven.leaf, *proven.intermediates), renewal.before, renewal.validity, run.now())


def _to_ask(run: Run, items: Sequence[Item]) -> tuple[list[Item], list[Outcome]]:
    """Those that have a backend, and those whose requests a person has carried away."""
    rest, carried = [], []
    for item in items:
        made = run.requests.get(item.spec.name)
        if made is not None and made.bundles and item.spec.authority.name not in run.settings.authorities:
            error = WaitingError("a person has the request", hint="`ca-bridge import` takes the answer")
            carried.append(outcome_of(item, error))
        else:
            rest.append(item)
    return rest, carried


def _opened(run: Run, prepared: Sequence[Prepared], reached: Mapping[str, Reached]) -> list[Prepared]:
    """For a CA that answers later: who asks is in the request, and its key on disk before that CA is asked."""
    opened = {one.name: one for one in prepared}
    to_carry: dict[tuple[int, str], list[Prepared]] = defaultdict(list)
    for one in prepared:
        ca = reached[one.authority]
        if owes(ca, one):
            continue
        _drop_unfit(run, one)
        if isinstance(ca.backend, Carries):
            made_before = one.request.continuity.batch if one.request.continuity else ""
            to_carry[id(ca.backend), made_before].append(one)
    for ours in to_carry.values():
        opened |= {one.name: one for one in with_continuity(ours, run.settings)}
    for one in opened.values():
        ca = reached[one.authority]
        if isinstance(ca.backend, Collects) and not owes(ca, one):
            made = open_request(run, one)
            run.requests.put(dataclasses.replace(made, request=one.request, backend=ca.label, reference="", note=""))
    run.requests.save()
    return list(opened.values())


def _drop_unfit(run: Run, one: Prepared) -> None:
    """`prepare` made a new key, since an open request is not what would be asked for now."""
    made = run.requests.get(one.name)
    if made is not None and one.open is None:
        if made.is_waiting:
            give_up(run, one.name, "renewal.key asks for another kind of key")
        run.requests.drop(one.name)


def _answers(run: Run, prepared: Sequence[Prepared], reached: Mapping[str, Reached]) -> dict[str, Answer]:
    """Ask; that it was asked is recorded before, and what was answered after."""
    for one in prepared:
        ca = reached[one.authority]
        run.record.know(one.name, one.request, ca.label, ca.identity)
        if ca.backend is not None and one.name not in ca.wrong and not owes(ca, one):
            run.record.add(audit.ASKED, one.name, authority=one.authority)
    run.record.write()
    answers = sign(prepared, reached, run.progress)
    for one in prepared:
        answer = answers[one.name]
        if isinstance(answer, Issued):
            run.record.add(audit.ISSUED, one.name, authority=one.authority, new=answer.leaf)
    return answers


def _reach_all(
    pool: ThreadPoolExecutor,
    backends: Mapping[str, registry.Configured],
    items: Sequence[Item],
    expected: Mapping[str, verify.Expectation],
    progress: Progress,
) -> dict[str, Reached]:
    def of(names: Sequence[str]) -> dict[str, Reached]:
        found: dict[str, Reached] = {}
        opened: Backend | None = None
        for name in names:
            ours = [item for item in items if item.spec.authority.name == name]
            found[name] = reach(backends[name], ours, expected[name], progress, opened)
            opened = found[name].backend
        return found

    lots = pool.map(of, _sharing(backends))
    return {name: reached for lot in lots for name, reached in lot.items()}


def _sharing(backends: Mapping[str, registry.Configured]) -> list[list[str]]:
    """Authorities whose requests are carried the same way are together: one file goes out, not one each."""
    lots: list[list[str]] = []
    for name, ours in backends.items():
        for lot in lots:
            if _are_carried_alike(backends[lot[0]], ours):
                lot.append(name)
                break
        else:
            lots.append([name])
    return lots


def _are_carried_alike(one: registry.Configured, other: registry.Configured) -> bool:
    return hasattr(one.backend_type, "carries") and one.name == other.name and one.settings == other.settings
