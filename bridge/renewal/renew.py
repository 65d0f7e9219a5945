"""
Renewal, online, in one process: select, prepare, issue, verify, remember, install, activate, conclude; a rehearsal does
the first four, then throws the certificates away, and revokes them where the backend can.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509

from bridge import control_plane
from bridge.ca import CA, registry
from bridge.contract import Issued, Pending
from bridge.control_plane import restarts
from bridge.errors import BackendError, BackendUnavailableError, BridgeError, Exit, VerificationError, WaitingError
from bridge.node.inventory import Item, Node
from bridge.pki import expiry, verify
from bridge.pki.certificates import is_for, serial_hex
from bridge.pki.expiry import due_from, duration_text, first_end
from bridge.renewal import ALL, NotReadyError, Selection, anchors_in, gate, outcome_of
from bridge.renewal.changes import decide
from bridge.renewal.gate import NotYetError
from bridge.renewal.issuance import Answered, Expected, Reached, issue_all, reaching
from bridge.renewal.prepare import Prepared, prepare, with_room
from bridge.renewal.revocation import RevocationError
from bridge.renewal.selection import RunOptions, select
from bridge.renewal.transaction import Transaction
from bridge.renewal.verify_and_install import Result, expectations, hold_back, record_failed, remember, verify_all
from bridge.settings.tables import Settings, for_rehearsal
from bridge.specs import AUTHORITIES
from bridge.state import Outcome, audit, credentials, remember_checked
from bridge.state.credentials import Credential
from bridge.state.open_requests import Unkept
from bridge.state.session import Now, Run, begun
from bridge.system.console import Progress, is_attended, log


def run(settings: Settings, options: RunOptions, now: Now, progress: Progress) -> tuple[Result, Node, Selection]:
    """Renew the due or named certificates, and make missing named ones; after an error nothing was replaced."""
    is_terminal = is_attended()
    if not options.names and (delay := gate.delay(settings, now(), is_terminal=is_terminal)):
        progress.note(f"waits {duration_text(timedelta(seconds=int(delay.total_seconds())))} (renewal.jitter)")
        time.sleep(delay.total_seconds())
    with begun(settings, now, progress, options.wait) as (ours, as_found):
        transaction = Transaction(ours, options)
        node = transaction.settle_earlier(as_found)
        if not transaction.may_go_on:
            return transaction.with_earlier(Result()), node, Selection()
        waiting = [request.name for request in ours.requests if request.reference]
        desired = decide(node, settings, options)
        selection = select(node, settings, options, now(), requests=ours.requests, waiting=waiting, desired=desired)
        for sentence in selection.notes:
            progress.note(sentence)
        selection = gate.hold_for_next_ca(selection, ours, node)
        if not options.names:
            due = {item.spec.authority.name for item in selection.items} | {o.authority for o in selection.failed}
            attempts = transaction.attempts
            attempts.note(attempts.authorities.keys() - due, {}, now())  # their certificates are no longer due
            selection = gate.hold_for_window(selection, settings.renewal, now())
            selection = selection if is_terminal else attempts.held(selection, now())
        if selection.items:
            result = renew(ours, transaction, selection, node, options)
            own = _check(settings, ours)
        else:
            own = _check(settings, ours)
            record_failed(ours.record, [o for o in selection.failed if not isinstance(o.error, NotYetError)])
            result = transaction.nothing_to_install(selection)
            # no CA was asked, and the next renewal would fail with an expired credential
            result = dataclasses.replace(result, errors=(*result.errors, *credentials.ended(own, now())))
        _warn(own, result, settings, now())
        return result, node, selection


def _check(settings: Settings, run: Run) -> list[Credential]:
    """Read the credentials of every backend's table, even if no CA is asked: a mistake (SettingsError) shows up."""
    places = registry.credentials(settings, registry.configured(settings, settings.authorities))
    remember_checked(settings, run.store, places)
    return credentials.look(settings, places, run.store)


def _warn(own: Sequence[Credential], result: Result, settings: Settings, now: datetime) -> None:
    """Warn of credentials that end soon, except those that an error reports."""
    reported = [error.name for error in result.errors if isinstance(error, credentials.CredentialEndedError)]
    for credential in own:
        if credential.needs_a_word(settings.renewal.before, now) and credential.name not in reported:
            log.warning("%s", credential.text(now))
            log.warning("%s", credentials.CredentialEndedError.hint, extra={"is_hint": True})


def renew(run: Run, transaction: Transaction, selection: Selection, node: Node, options: RunOptions) -> Result:
    """Renew the selected certificates, from new keys to components that use them."""
    with transaction.about(selection):
        selection = with_room(run.settings, selection)
        stuck = without_restart(node, run.settings, selection.items, run.now()) if options.restarts else []
        answered, failed, unasked = _prepare_and_issue(run, selection, stuck, node, options)
        proven, failed = verify_all(run, answered, failed)
        remember(run, answered, proven)
        result = hold_back(run, unasked, failed) if unasked else transaction.install(selection, proven, failed)
    return transaction.conclude(selection, transaction.activate(selection, result))


def without_restart(node: Node, settings: Settings, items: Sequence[Item], now: datetime) -> list[Outcome]:
    """Return failures of certificates whose components must be restarted and can't be; expired ones are exempt."""
    if settings.restart.method == "none":
        return []
    reloads = control_plane.reloading(node, settings.node)
    obstacle = functools.cache(lambda component: restarts.obstacle(component, node, settings))
    outcomes = []
    for item in items:
        is_expired = bool(item.certificates) and first_end(item.renewable) <= now
        for component in control_plane.stale([item.spec], reloads, settings.restart.components):
            if not is_expired and (error := obstacle(component)) is not None:
                text = f"not asked for, since its component could not be restarted: {error}"
                hint = f"{error.hint}; or `ca-bridge renew --no-restart` installs it, and says what to restart"
                outcomes.append(outcome_of(item, NotReadyError(text, hint=hint, exit_code=Exit.USAGE)))
    return outcomes


def _prepare_and_issue(
    run: Run, selection: Selection, stuck: Sequence[Outcome], node: Node, options: RunOptions
) -> tuple[list[Answered], list[Outcome], list[Prepared]]:
    """Make keys while reaching the CAs, then ask; return answers, failures, and requests held by `all_or_nothing`."""
    expected, unproved = expectations(node, run.settings, selection.items, run.now(), options.trust.bundles)
    without = {outcome.name for outcome in stuck}
    items = [i for i in selection.items if i.spec.authority.name in expected and i.spec.name not in without]
    kept = _kept(run, items, selection, expected)
    to_ask, carried = _to_ask(run, items, kept)
    earlier = [*selection.failed, *stuck, *(o for o in unproved if o.name not in without), *carried]
    with reaching(run, to_ask, expected) as reached:
        prepared, unmade = prepare(to_ask, run.settings, run.requests.by_name(), selection.desired)
        failed = [*earlier, *unmade]
        if failed and options.all_or_nothing:
            return [], failed, [*(answer.prepared for answer in kept), *prepared]
        return [*kept, *issue_all(run, prepared, reached(), expected)], failed, []


def _kept(run: Run, items: Sequence[Item], selection: Selection, expected: Expected) -> list[Answered]:
    """Return answers that an earlier run verified and did not install; no CA is asked for them again."""
    answered = {request.name: request for request in run.requests if request.answer is not None}
    chosen = [item for item in items if item.spec.name in answered]
    kept = []
    for answer in prepare(chosen, run.settings, answered, selection.desired)[0]:
        if (open_ := answer.open) is None or open_.answer is None:
            continue
        wanted, renewal = expected[answer.authority], run.settings.renewal
        with contextlib.suppress(VerificationError):  # if it fails now, the CA is asked again
            chain = verify.check(open_.answer, answer.request, wanted).chain
            if not expiry.is_due(chain, renewal.before, renewal.validity, run.now()):
                run.record.describe(answer.name, answer.request, open_.backend, None)
                kept.append(Answered(prepared=answer, expected=wanted, label=open_.backend, answer=open_.answer))
    return kept


def _to_ask(run: Run, items: Sequence[Item], kept: Sequence[Answered]) -> tuple[list[Item], list[Outcome]]:
    """Return the items to ask a backend for, and outcomes of items whose requests an operator carries."""
    have = {answer.prepared.name for answer in kept}
    rest, carried = [], []
    for item in items:
        open_ = run.requests.get(item.spec.name)
        if item.spec.name in have:
            continue
        if open_ is not None and open_.bundles and item.spec.authority.name not in run.settings.authorities:
            error = WaitingError("an operator has the request", hint="`ca-bridge import` takes the answer")
            carried.append(outcome_of(item, error))
        else:
            rest.append(item)
    return rest, carried


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsed:
    """A certificate that was signed and passed; its key is gone."""

    outcome: Outcome
    leaf: x509.Certificate
    revoked: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """The result that a renewal would have."""

    passed: tuple[Rehearsed, ...] = ()
    failed: tuple[Outcome, ...] = ()
    errors: tuple[BridgeError, ...] = ()  #: About certificates that were signed and are not revoked.
    skipped: tuple[str, ...] = ()  #: Sentences.

    @property
    def exit_code(self) -> int:
        """The exit code that a renewal with these results would have."""
        return Exit.worst([*(o.exit_code for o in self.failed), *(e.exit_code for e in self.errors)])


def rehearse(settings: Settings, options: RunOptions, now: Now, progress: Progress) -> Rehearsal:
    """Rehearse the renewal of the named certificates, or of all, with the settings of `[authority.NAME.rehearsal]`."""
    options = dataclasses.replace(options, names=options.names or (ALL,))
    with begun(settings, now, progress, options.wait) as (ours, node):
        selection = select(node, settings, options, now(), desired=decide(node, settings, options))
        for sentence in selection.notes:
            progress.note(sentence)
        selection = _without_open(_within(selection, settings, now(), options.ahead), ours)
        ours.record.add(audit.REHEARSED, result="begins: nothing of this run is installed")
        rehearsing = dataclasses.replace(ours, settings=for_rehearsal(settings), requests=Unkept())
        return _rehearsed(rehearsing, settings, selection, node)


def _within(selection: Selection, settings: Settings, now: datetime, ahead: timedelta | None) -> Selection:
    """Return the selection without certificates that are not due within `ahead`."""
    if ahead is None:
        return selection
    before, validity = settings.renewal.before, settings.renewal.validity
    items = tuple(
        item
        for item in selection.items
        if not item.certificates or now + ahead >= due_from(item.renewable, before, validity, rotates=item.rotates)
    )
    skipped = selection.skipped if items else (*selection.skipped, f"nothing is due within {duration_text(ahead)}")
    return dataclasses.replace(selection, items=items, skipped=skipped)


def _without_open(selection: Selection, run: Run) -> Selection:
    waiting = {request.name for request in run.requests if request.is_waiting}
    names = [item.spec.name for item in selection.items if item.spec.name in waiting]
    notes = (f"{name} is not rehearsed: a CA has a request for it already" for name in names)
    items = tuple(item for item in selection.items if item.spec.name not in waiting)
    return dataclasses.replace(selection, items=items, skipped=(*selection.skipped, *notes))


def _rehearsed(run: Run, settings: Settings, selection: Selection, node: Node) -> Rehearsal:
    selection = with_room(run.settings, selection)
    expected, unproved = expectations(node, run.settings, selection.items, run.now())
    expected = {name: _expected(expectation, settings, name) for name, expectation in expected.items()}
    impossible = dict(_impossible(run.settings, expected))
    stuck = without_restart(node, run.settings, selection.items, run.now())
    without = {outcome.name: outcome for outcome in (*unproved, *stuck)}
    for item in selection.items:
        if (error := impossible.get(item.spec.authority.name)) is not None and item.spec.name not in without:
            without[item.spec.name] = outcome_of(item, error)
    items = [item for item in selection.items if item.spec.name not in without]
    with reaching(run, items, expected) as reached:
        prepared, unmade = prepare(items, run.settings, desired=selection.desired)
        cas = reached()
        answered = issue_all(run, prepared, cas, expected)
        proven, failed = verify_all(run, answered, [*selection.failed, *without.values(), *unmade])
        revoked, errors = _thrown_away(run, answered, cas)
    passed = []
    for signed in proven:
        authority, leaf = signed.prepared.authority, signed.verified.leaf
        passed.append(Rehearsed(outcome=signed.outcome, leaf=leaf, revoked=leaf in revoked))
        result = "passed, and revoked" if leaf in revoked else "passed, and thrown away; not revoked"
        run.record.add(audit.REHEARSED, signed.name, authority=authority, new=leaf, result=result)
    failures = tuple(map(_reworded, failed))
    return Rehearsal(passed=tuple(passed), failed=failures, errors=tuple(errors), skipped=selection.skipped)


def _expected(expectation: verify.Expectation, settings: Settings, authority: str) -> verify.Expectation:
    """Relax an expectation for a rehearsal: a scratch role may give a short life, and a scratch CA may differ."""
    keys = settings.authorities.get(authority)
    if keys is None or not keys.rehearsal:
        return expectation
    expectation = dataclasses.replace(expectation, min_validity=timedelta(), shorter_allowed=True)
    if (named := keys.rehearsal.get("anchor")) is None:
        return expectation
    path = Path(named)
    anchors = anchors_in(path, "the CA certificate of a rehearsal (anchor)", "put it there")
    return dataclasses.replace(expectation, anchors=anchors, anchor_name=str(path))


def _impossible(settings: Settings, authorities: Collection[str]) -> Iterator[tuple[str, BridgeError]]:
    """Yield, by authority, why a rehearsal must not ask its CA; this asks none."""
    known = [name for name in authorities if name in settings.authorities]
    hint = (
        "name another backend or role for it in [authority.NAME.rehearsal], or rehearse the other certificates by name"
    )
    for name, configured in registry.configured(settings, known).items():
        with contextlib.suppress(BridgeError), contextlib.closing(CA.of(configured)) as ca:  # reported later
            why = ""
            if ca.backend.carries:
                why = "nothing revokes what it signs"
                if ca.backend.can("candidates"):
                    why = "people carry its requests, and would carry this one for nothing"
            elif spent := ca.backend.spends():
                why = f"a rehearsal would use up {spent}"
            if why:
                yield name, BridgeError(f"{ca.label}: {why}", hint=hint, exit_code=Exit.USAGE)


def _reworded(outcome: Outcome) -> Outcome:
    """Reword the outcome of a pending request, whose key the rehearsal throws away."""
    if not isinstance(outcome.error, WaitingError):
        return outcome
    error = WaitingError(
        f"the CA took the request, and has not answered yet ({outcome.error.reason}); its key is thrown away",
        hint="so far it would work; the people who approve requests at the CA may refuse this one",
    )
    return dataclasses.replace(outcome, error=error)


def _thrown_away(
    run: Run, answered: Sequence[Answered], reached: Reached
) -> tuple[set[x509.Certificate], list[BridgeError]]:
    """Revoke each certificate that was signed for our keys, whether it passed or not."""
    revoked: set[x509.Certificate] = set()
    errors: list[BridgeError] = []
    unable: dict[str, list[str]] = {}
    for authority in (name for name in AUTHORITIES if name in reached):
        ca = reached[authority]
        of_ca = [answer for answer in answered if answer.prepared.authority == authority]
        for name, leaf in _signed(of_ca, ca, run.now()):
            if not ca.backend.can("revoke"):
                unable.setdefault(ca.label, []).append(name)
                continue
            try:
                ca.revoke(leaf)
            except BackendError as e:
                text = f"not revoked: {name}, serial {serial_hex(leaf)}: {ca.label}: {e}"
                hint = "its key is gone; revoke it at the CA if your rules ask for that"
                error = RevocationError(text, hint=hint, exit_code=e.exit_code)
                run.record.add(audit.FAILED, name, authority=authority, new=leaf, error=error)
                if isinstance(e, BackendUnavailableError):
                    errors.append(error)
                else:
                    run.progress.note(str(error))
            else:
                revoked.add(leaf)
                run.record.add(audit.REVOKED, name, authority=authority, old=leaf)
    for label, names in unable.items():
        text = f"its certificates for {', '.join(names)} stay valid; their keys are gone"
        run.progress.note(f"{label} can't revoke: {text}")
    return revoked, errors


def _signed(answered: Sequence[Answered], ca: CA, now: datetime) -> list[tuple[str, x509.Certificate]]:
    """Return names and certificates to revoke: those for our new keys, and lost answers that the CA still finds."""
    leaves = [(each, each.answer.leaf) for each in answered if isinstance(each.answer, Issued)]
    lost = [each for each in answered if isinstance(each.answer, Pending | BackendError)]
    with contextlib.suppress(BackendError):  # those answers stay lost
        if lost and ca.tells():
            recalled = ca.recall([each.prepared.request for each in lost], now - timedelta(days=1))
            leaves += [(each, issued.leaf) for each, issued in zip(lost, recalled, strict=True) if issued is not None]
    return [(each.prepared.name, leaf) for each, leaf in leaves if is_for(leaf, each.prepared.request.csr)]
