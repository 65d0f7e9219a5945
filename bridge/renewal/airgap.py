"""
The node's side of the air-gapped walk: `export`, `inspect`, `import`, `pending list`, `pending cancel`.

Keys stay in the state directory; a bundle has no place for one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509

from bridge.desk.trust_origin import known_cas
from bridge.errors import BridgeError, Exit, WaitingError
from bridge.node.inventory import Item, Node
from bridge.pki import bundle, bundle_format, bundle_text, signatures
from bridge.pki.bundle import AnswerBundle, BundledRequest, BundleError, RequestBundle
from bridge.renewal.carried_answers import Found, answered_by, answers_in
from bridge.renewal.changes import decide
from bridge.renewal.issuance import Answered, refused_as_shorter
from bridge.renewal.prepare import Prepared, open_request, prepare, take_up, with_continuity
from bridge.renewal.readiness import assert_room
from bridge.renewal.select import ALL, RunOptions, Selection, assert_known, outcome_of, select
from bridge.renewal.transaction import Transaction
from bridge.renewal.verify_and_install import Result, expectations, record_failed, remember, verify_all
from bridge.settings.tables import Settings
from bridge.state import audit, retention
from bridge.state.outcome import Outcome
from bridge.state.requests import OpenRequest, OpenRequests
from bridge.state.session import Run, begun
from bridge.system.console import Progress
from bridge.system.files import write_atomically
from bridge.system.paths import UnreadableError, read

SCHEMA_VERSION = 1
#: For what a bundle may do; nothing in it is secret.
BUNDLE_MODE = 0o644


# --- export ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """The result of `export`."""

    bundle: RequestBundle | None  #: None: there was nothing to ask for.
    again: tuple[str, ...]  #: Names whose keys and CSRs an earlier run made.
    failed: tuple[Outcome, ...]
    skipped: tuple[str, ...]  #: Sentences for the operator.


def export(
    settings: Settings, path: Path, options: RunOptions, now: Callable[[], datetime], progress: Progress
) -> tuple[Exported, Node]:
    """
    Keys into the state directory, requests into a bundle; a request that waits is exported again as it is.

    Raises:
        LockedError: Another run works on this node.
        BridgeError: The bundle can't be written. The requests are kept, and exporting again gives the same.
    """
    assert_free(path)
    with begun(settings, now, progress, options.wait) as (run, node):
        desired = decide(node, settings, options)
        selection = select(node, settings, options, now(), requests=run.requests, desired=desired)
        for sentence in selection.notes:
            progress.note(sentence)
        shorter = refused_as_shorter(selection.items, settings, now())
        made = [
            *prepare(
                [one for one in selection.items if one.spec.name not in shorter],
                settings,
                run.requests.by_name(),
                selection.desired,
            ),
            *(outcome_of(one, shorter[one.spec.name]) for one in selection.items if one.spec.name in shorter),
        ]
        prepared = [one for one in made if isinstance(one, Prepared)]
        failed = (*selection.failed, *(one for one in made if isinstance(one, Outcome)))
        record_failed(run.record, failed)
        if not prepared:
            return Exported(bundle=None, again=(), failed=failed, skipped=selection.skipped), node
        for one in prepared:
            if one.open is None and (old := run.requests.get(one.name)) is not None and old.is_waiting:
                progress.note(
                    f"{one.name}: not the key and CSR of before: another kind of key (renewal.key), or other names, are wanted now"
                )
        requests, prepared = carry(run, prepared, path)
        again = tuple(one.name for one in prepared if one.open is not None)
        return Exported(bundle=requests, again=again, failed=failed, skipped=selection.skipped), node


def carry(run: Run, prepared: Sequence[Prepared], path: Path) -> tuple[RequestBundle, list[Prepared]]:
    """
    Write requests into a bundle for somebody to carry away; they and their keys are safe on disk before.

    Returns:
        The bundle, and the requests as they are in it.

    Raises:
        BridgeError: The bundle can't be written; the requests are kept.
    """
    prepared = with_continuity(prepared, run.settings, run.now())
    requests = bundle.bundle_of([one.request for one in prepared], run.now())
    data, digest = bundle_format.dumps(requests), bundle_format.digest(requests)
    for one in prepared:
        request = open_request(run, one)
        carried = tuple(dict.fromkeys((*request.bundles, digest)))
        run.requests.put(dataclasses.replace(request, request=one.request, bundles=carried))
        run.record.know(one.name, one.request, f"bundle {bundle_format.short_fingerprint(requests)}", None)
        run.record.add(audit.ASKED, one.name, authority=one.authority)
    run.requests.save()
    run.record.write()
    try:
        write_atomically(path, data, BUNDLE_MODE)
    except OSError as e:
        raise BridgeError(
            f"{path}: wanted to write the bundle, found: {e.strerror}",
            hint="export again, to another place: the keys and CSRs are kept",
        ) from e
    return requests, prepared


def assert_free(path: Path) -> None:
    """An older request bundle may be overwritten, nothing else."""
    try:
        data = read(path)
        if data is None and not path.is_dir():
            return
        bundle_format.loads_request(data or b"")
    except (BundleError, UnreadableError) as e:
        raise BridgeError(
            f"{path}: wanted no file, or a request bundle of before, found something else", hint="name another file"
        ) from e


# --- inspect ---------------------------------------------------------------------------------------------------------


def inspect(settings: Settings, path: Path, now: datetime) -> tuple[str, int]:
    """
    Describe a bundle for a person who approves it; 5 if a continuity proof does not hold, or is another CA's.

    Raises:
        BridgeError: It can't be read, or has been changed.
    """
    found, cas = _bundle(path), known_cas(settings)
    text = bundle_text.describe(found, now, cas)
    if isinstance(found, RequestBundle) and any(_doubt(one, found, cas) for one in found.requests):
        return text, Exit.REFUSED
    return text, Exit.DONE


def _doubt(one: BundledRequest, whole: RequestBundle, cas: Mapping[str, Sequence[x509.Certificate]]) -> str | None:
    """Why the proof is worth nothing, as far as that can be told here."""
    problem = signatures.proof_problem(one, whole) or signatures.usages_problem(one)
    return problem or (signatures.origin_problem(one, cas[one.authority]) if one.authority in cas else None)


def _bundle(path: Path) -> RequestBundle | AnswerBundle:
    try:
        data = read(path)
    except UnreadableError as e:
        raise BridgeError(f"{path}: wanted a bundle, found: {e}") from None
    if data is None:
        raise BridgeError(f"{path}: wanted a bundle, found nothing")
    try:
        return bundle_format.loads(data)
    except BundleError as e:
        raise BridgeError(f"{path}: {e}", hint=e.hint) from None


# --- import ----------------------------------------------------------------------------------------------------------


def import_answers(
    settings: Settings, paths: Sequence[Path], options: RunOptions, now: Callable[[], datetime], progress: Progress
) -> tuple[Result, Node, list[BridgeError]]:
    """
    Match certificates to open requests by public key, prove them, and install them as `renew` does.

    Returns:
        What became of them, the node, and what was refused as no answer to anything here.

    Raises:
        BridgeError: A file that was named can't be read, or holds no certificate.
        LockedError: Another run works on this node.
        InstallError: Nothing was replaced.
    """
    with begun(settings, now, progress, options.wait) as (run, as_found):
        transaction = Transaction(run, options)
        node = transaction.settle_earlier(as_found)
        if not transaction.may_go_on:
            return transaction.with_earlier(Result(outcomes=())), node, []
        found = answers_in(run, paths)
        result = _finish_import(run, node, found, transaction)
        if result.backup_id is not None:
            retention.retire(run.store, settings, node, now())
        left = tuple(_still_waiting(node, run.requests, result))
        return dataclasses.replace(result, outcomes=(*result.outcomes, *left)), node, found.strange


def _still_waiting(node: Node, requests: OpenRequests, result: Result) -> Iterator[Outcome]:
    told = {outcome.name for outcome in result.outcomes}
    by_name = {item.spec.name: item for item in node.items}
    for one in requests:
        item = by_name.get(one.name)
        if one.is_waiting and one.name not in told and item is not None:
            yield outcome_of(item, WaitingError("no answer to it was among these"), one.backend)


def _finish_import(run: Run, node: Node, found: Found, transaction: Transaction) -> Result:
    by_name = {item.spec.name: item for item in node.items}
    items = tuple(by_name[name] for name in found.candidates if name in by_name)
    if not items:
        return transaction.with_earlier(Result(outcomes=()))
    selection = Selection(items=items)
    with transaction.about(selection):
        assert_room(run.settings)
        answered, failed = _answered(run, node, items, found)
        proven, failed = verify_all(run, answered, failed)
        remember(run, answered, proven, by_hand=True)
        result = transaction.install(selection, proven, failed)
    return transaction.conclude(selection, transaction.activate(selection, result))


def _answered(run: Run, node: Node, items: Sequence[Item], found: Found) -> tuple[list[Answered], list[Outcome]]:
    prepared, failed = [], []
    for item in items:
        made = run.requests.get(item.spec.name)
        one = take_up(item, made) if made is not None else None
        if isinstance(one, Prepared):
            prepared.append(one)
        elif one is not None:
            failed.append(one)
    expected, unproved = expectations(node, run.settings, [one.item for one in prepared], run.now())
    unproven = {outcome.name for outcome in unproved}
    answered = [
        answered_by(run, one, found.best(one, expected[one.authority]), expected[one.authority])
        for one in prepared
        if one.name not in unproven
    ]
    return answered, [*failed, *unproved]


# --- pending ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """The result of `pending cancel`."""

    requests: tuple[OpenRequest, ...]
    missing: tuple[str, ...]  #: Names of which no request is open.


def cancel(settings: Settings, options: RunOptions, now: Callable[[], datetime], progress: Progress) -> Cancelled:
    """
    Forget requests and their keys; an answer to them is refused from now on.

    Raises:
        SettingsError: A name that is none.
        LockedError: Another run works on this node.
    """
    names = options.names
    assert_known(names)
    with begun(settings, now, progress, options.wait) as (run, _):
        there = [one.name for one in run.requests]
        cancelled: list[OpenRequest] = []
        for name in there if ALL in names else [name for name in there if name in names]:
            made = run.requests.drop(name)
            if made is not None:
                run.record.know(name, made.request, made.backend or "bundle", None)
                run.record.add(audit.CANCELLED, name, authority=made.request.spec.authority.name)
                cancelled.append(made)
        run.record.write()
        run.requests.save()
    missing = tuple(name for name in names if name != ALL and name not in there)
    return Cancelled(requests=tuple(cancelled), missing=missing)
