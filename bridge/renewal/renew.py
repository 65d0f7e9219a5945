"""
Renewal, online, in one process: select, prepare, issue, verify, remember, install, activate, conclude.

Keys stay in this process's memory and the state directory until their certificates are installed; a type that leaves
the node holds none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta

from bridge.ca import registry
from bridge.contract import Issued
from bridge.errors import VerificationError, WaitingError
from bridge.node.inventory import Item, Node
from bridge.pki import expiry, verify
from bridge.pki.expiry import duration_text
from bridge.renewal import gate, new_keys
from bridge.renewal.changes import decide
from bridge.renewal.gate import NotYetError
from bridge.renewal.issuance import Answered, issue_all, reaching
from bridge.renewal.prepare import Prepared, prepare, preparing
from bridge.renewal.readiness import assert_room, without_restart
from bridge.renewal.select import RunOptions, Selection, outcome_of, select
from bridge.renewal.transaction import Transaction
from bridge.renewal.verify_and_install import Result, expectations, hold_back, record_failed, remember, verify_all
from bridge.settings.tables import Settings
from bridge.state import backups
from bridge.state.open_requests import OpenRequest
from bridge.state.session import Run, begun
from bridge.state.store import Outcome, remember_checked
from bridge.system.console import Progress, is_attended


def run(
    settings: Settings, options: RunOptions, now: Callable[[], datetime], progress: Progress
) -> tuple[Result, Node, Selection]:
    """
    Renew what is due, or the named certificates; a named certificate that is missing is made.

    Raises:
        LockedError: Another run works on this node.
        SettingsError: Nothing was asked.
        StateError: The open requests can't be read or kept; nothing was replaced.
        InstallError: Nothing was replaced.
    """
    is_terminal = is_attended()
    if not options.names:
        _sleep(gate.delay(settings, now(), is_terminal=is_terminal), progress)
    with begun(settings, now, progress, options.wait) as (ours, found):
        transaction = Transaction(ours, options)
        node = transaction.settle_earlier(found)
        if not transaction.may_go_on:
            return transaction.with_earlier(Result(outcomes=())), node, Selection()
        waiting = [one.name for one in ours.requests if one.reference]
        desired = decide(node, settings, options)
        selection = select(node, settings, options, now(), requests=ours.requests, waiting=waiting, desired=desired)
        for sentence in selection.notes:
            progress.note(sentence)
        if not options.names:
            selection = gate.hold(selection, settings, None if is_terminal else transaction.attempts, now())
        if selection.items:
            result = _renew(ours, transaction, selection, node, options)
            remember_checked(settings, ours.store)  # all tables were read to find the CAs
        else:
            _check(settings, ours)
            record_failed(ours.record, [o for o in selection.failed if not isinstance(o.error, NotYetError)])
            result = transaction.nothing_to_install(selection)
        if result.backup_id is not None:
            backups.retire(ours.store, settings, node, now())
        return result, node, selection


def _sleep(delay: timedelta, progress: Progress) -> None:
    if delay:
        progress.note(f"waits {duration_text(timedelta(seconds=int(delay.total_seconds())))} (renewal.jitter)")
        time.sleep(delay.total_seconds())


def _check(settings: Settings, run: Run) -> None:
    """Read every backend's table, though no CA is asked: a mistake (SettingsError) shows on the day that it is made."""
    registry.configured(settings, settings.authorities)
    remember_checked(settings, run.store)


def _renew(run: Run, transaction: Transaction, selection: Selection, node: Node, options: RunOptions) -> Result:
    """Renew: from keys to components that run on them."""
    with transaction.about(selection):
        assert_room(run.settings)
        stuck = without_restart(node, run.settings, selection.items, run.now()) if options.restarts else []
        answered, failed, unasked = _prepare_and_issue(run, selection, stuck, node, options)
        proven, failed = verify_all(run, answered, failed)
        remember(run, answered, proven)
        result = hold_back(run, unasked, failed) if unasked else transaction.install(selection, proven, failed)
    return transaction.conclude(selection, transaction.activate(selection, result))


def _prepare_and_issue(
    run: Run, selection: Selection, stuck: Sequence[Outcome], node: Node, options: RunOptions
) -> tuple[list[Answered], list[Outcome], list[Prepared]]:
    """
    Make keys, which takes as long as all the rest, and meanwhile reach the CAs and ask them.

    Returns:
        The answers; what failed; and, with `all_or_nothing`, the requests that were not sent because something failed.
    """
    expected, unproved = expectations(node, run.settings, selection.items, run.now())
    without = {outcome.name for outcome in stuck}
    items = [i for i in selection.items if i.spec.authority.name in expected and i.spec.name not in without]
    kept = _kept(run, items, selection, expected)
    to_ask, carried = _to_ask(run, items, kept)
    earlier = [*selection.failed, *stuck, *(o for o in unproved if o.name not in without), *carried]
    with (
        preparing(to_ask, run.settings, run.requests.by_name(), selection.desired) as making,
        reaching(run.settings, to_ask, expected, run.progress) as reached,
    ):
        if options.all_or_nothing:
            made = [one.result() for one in making]
            earlier += [one for one in made if isinstance(one, Outcome)]
            if earlier:
                unasked = [*(one.prepared for one in kept), *(one for one in made if isinstance(one, Prepared))]
                return [], earlier, unasked
        cas = reached()
        new_keys.use_last_core()
        asked, unmade = issue_all(run, making, cas, expected)
    return [*kept, *asked], [*earlier, *unmade], []


def _kept(
    run: Run, items: Sequence[Item], selection: Selection, expected: Mapping[str, verify.Expectation]
) -> list[Answered]:
    """Answers that an earlier run verified and did not install: no CA is asked for them again."""
    answered = {one.name: one for one in run.requests if one.answer is not None}
    had = prepare([item for item in items if item.spec.name in answered], run.settings, answered, selection.desired)
    kept = []
    for one in had:
        made, wanted = one.open if isinstance(one, Prepared) else None, expected[one.authority]
        if isinstance(one, Prepared) and made and made.answer and _is_still_good(made.answer, made, run, wanted):
            run.record.know(one.name, one.request, made.backend, None)
            kept.append(Answered(prepared=one, expected=wanted, label=made.backend, answer=made.answer))
    return kept


def _is_still_good(answer: Issued, kept: OpenRequest, run: Run, expected: verify.Expectation) -> bool:
    try:
        proven = verify.check(answer, kept.request, expected)
    except VerificationError:
        return False
    renewal = run.settings.renewal
    return not expiry.is_due((proven.leaf, *proven.intermediates), renewal.before, renewal.validity, run.now())


def _to_ask(run: Run, items: Sequence[Item], kept: Sequence[Answered]) -> tuple[list[Item], list[Outcome]]:
    """Items that a backend is asked for, and outcomes of those whose requests a person has carried away."""
    have = {one.prepared.name for one in kept}
    rest, carried = [], []
    for item in items:
        made = run.requests.get(item.spec.name)
        if item.spec.name in have:
            continue
        if made is not None and made.bundles and item.spec.authority.name not in run.settings.authorities:
            error = WaitingError("an operator has the request", hint="`ca-bridge import` takes the answer")
            carried.append(outcome_of(item, error))
        else:
            rest.append(item)
    return rest, carried
