"""
Certificates that people carry: `export`, `inspect`, `import`, `pending list`, `pending cancel`.

A bundle has no field for a key. Loose certificates are matched by public key.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from cryptography import x509

from bridge.ca import owe_putting_away, put_away
from bridge.contract import Issued, SignRequest
from bridge.desk.files import assert_free, known_cas
from bridge.errors import BackendRefusedError, BridgeError, Exit, SettingsError, WaitingError
from bridge.node.inventory import Item, Node
from bridge.pki import bundle, bundle_format, signatures, verify
from bridge.pki.bundle import AnswerBundle, BundleError, IncompleteBundleError, Refusal, RequestBundle
from bridge.pki.certificates import UNREADABLE, certificates_in, fingerprint, is_ca, is_for, name_text, serial_hex
from bridge.pki.csr import PrivateKey, fingerprint_text
from bridge.renewal import ALL, Selection, assert_known, outcome_of, prepare
from bridge.renewal.changes import decide
from bridge.renewal.issuance import Answered, refused_as_shorter
from bridge.renewal.prepare import Prepared, with_room
from bridge.renewal.selection import RunOptions, select
from bridge.renewal.transaction import Transaction
from bridge.renewal.verify_and_install import Result, expectations, record_failed, remember, verify_all
from bridge.settings.tables import Settings
from bridge.state import Outcome, audit
from bridge.state.open_requests import OpenRequest
from bridge.state.session import Now, Run, begun
from bridge.system.console import Progress, log, printable
from bridge.system.files import reasons, write_atomically
from bridge.system.paths import UnreadableError, opened, read, read_present, read_public_key


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """The result of `export`."""

    bundle: RequestBundle | None  #: None: there was nothing to request.
    again: tuple[str, ...]  #: Names whose keys and CSRs an earlier run made.
    failed: tuple[Outcome, ...]
    skipped: tuple[str, ...]  #: Sentences for the operator.


def export(settings: Settings, path: Path, options: RunOptions, now: Now, progress: Progress) -> tuple[Exported, Node]:
    """Write keys into the state directory and requests into a bundle; export a pending request again unchanged."""
    assert_free(path, RequestBundle, settings.node.node_name, settings.node.cluster)
    with begun(settings, now, progress, options.wait) as (run, node):
        desired = decide(node, settings, options)
        selection = select(node, settings, options, now(), requests=run.requests, desired=desired)
        for sentence in selection.notes:
            progress.note(sentence)
        selection = selection.without(refused_as_shorter(selection.items, settings, now()))
        prepared, unmade = prepare.prepare(selection.items, settings, run.requests.by_name(), selection.desired)
        failed = (*selection.failed, *unmade)
        record_failed(run.record, failed)
        for item in prepared:
            if item.open is None and (old := run.requests.get(item.name)) is not None and old.is_waiting:
                progress.note(
                    f"{item.name}: a new key and CSR, since another kind of key (renewal.key), another validity or other names are wanted now"
                )
        requests, prepared = carry(run, prepared, path) if prepared else (None, [])
        again = tuple(item.name for item in prepared if item.open is not None)
        return Exported(bundle=requests, again=again, failed=failed, skipped=selection.skipped), node


def carry(run: Run, prepared: Sequence[Prepared], path: Path) -> tuple[RequestBundle, list[Prepared]]:
    """Save requests and their keys in the state directory, then write the requests into a bundle at a free path."""
    prepared = prepare.with_continuity(prepared, run.settings, run.now())
    requests = bundle.bundle_of([item.request for item in prepared])
    data, digest = bundle_format.dumps(requests), bundle_format.digest(requests)
    for item in prepared:
        request = prepare.open_request(run, item)
        carried = tuple(dict.fromkeys((*request.bundles, digest)))
        run.requests.put(dataclasses.replace(request, request=item.request, bundles=carried))
        run.record.describe(item.name, item.request, f"bundle {bundle_format.short_fingerprint(requests)}", None)
        run.record.add(audit.ASKED, item.name, authority=item.authority)
    run.requests.save()
    run.record.write()
    hint = "export again, to another place: the keys and CSRs are kept"
    with reasons(BridgeError, f"{path}: can't write the bundle", hint=hint), opened(path) as place:
        write_atomically(place.path, data, 0o644)  # nothing in a bundle is secret
    return requests, prepared


def inspect(settings: Settings, path: Path, now: datetime) -> tuple[str, int]:
    """Describe a bundle for the person who approves it; exit code 5 if a continuity proof does not hold."""
    try:
        with reasons(BridgeError, f"{path}: wanted a bundle, found"):
            loads = bundle_format.loads(read_present(path))
    except BundleError as e:
        raise BridgeError(f"{path}: {e}", hint=e.hint) from None
    cas = known_cas(settings)
    is_doubtful = isinstance(loads, RequestBundle) and any(
        signatures.proof_problem(request, loads)
        or signatures.usages_problem(request)
        or (request.authority in cas and signatures.origin_problem(request, cas[request.authority]))
        for request in loads.requests
    )
    return bundle_format.describe(loads, now, cas), Exit.REFUSED if is_doubtful else Exit.DONE


def import_answers(
    settings: Settings, paths: Sequence[Path], options: RunOptions, now: Now, progress: Progress
) -> tuple[Result, Node]:
    """Match certificates to open requests by public key, verify them, and install them as `renew` does."""
    with begun(settings, now, progress, options.wait) as (run, as_found):
        transaction = Transaction(run, options)
        node = transaction.settle_earlier(as_found)
        if not transaction.may_go_on:
            return transaction.with_earlier(Result()), node
        answers = answers_in(run, paths)
        result = _finish_import(run, node, answers, transaction)
        reported = {outcome.name for outcome in result.outcomes}
        left = [
            outcome_of(item, WaitingError("no answer to it was among these"), request.backend)
            for request in run.requests
            if request.is_waiting and request.name not in reported and (item := node.item(request.name)) is not None
        ]
        outcomes, errors = (*result.outcomes, *left), (*result.errors, *answers.strange)
        return dataclasses.replace(result, outcomes=outcomes, errors=errors), node


def _finish_import(run: Run, node: Node, answers: Found, transaction: Transaction) -> Result:
    items = tuple(item for name in answers.candidates if (item := node.item(name)) is not None)
    if not items:
        return transaction.with_earlier(Result())
    selection = Selection(items=items)
    with transaction.about(selection):
        selection = with_room(run.settings, selection)
        answered, failed = _answered(run, node, selection.items, answers)
        proven, failed = verify_all(run, answered, [*selection.failed, *failed])
        refused = [each.prepared for each in answered if isinstance(each.answer, BackendRefusedError)]
        for prepared in refused if run.settings.node.desk_key is not None else ():
            if prepared.open and prepared.open.is_waiting:
                run.requests.drop(prepared.name)  # a signed refusal ends the request
        remember(run, answered, proven, by_hand=True)
        result = transaction.install(selection, proven, failed)
    return transaction.conclude(selection, transaction.activate(selection, result))


def _answered(run: Run, node: Node, items: Sequence[Item], answers: Found) -> tuple[list[Answered], list[Outcome]]:
    requests = run.requests.by_name()
    taken_up = [prepare.take_up(item, requests[item.spec.name], run.settings) for item in items]
    prepared, failed = prepare.divided(taken_up)
    expected, unproved = expectations(node, run.settings, [item.item for item in prepared], run.now())
    unproven = {outcome.name for outcome in unproved}
    answered = [
        answered_by(run, item, answers, expected[item.authority]) for item in prepared if item.name not in unproven
    ]
    return answered, [*failed, *unproved]


# --- answers in files: a desk's bundle is matched by the request's digest, a loose certificate by its public key -------


#: For settings that name the desk's key.
_SIGNED = "wanted an answer that the desk has signed"
_SIGNED_HINT = "have the desk sign its answers (answer_key in its policy); node.desk_key in the settings names whose signature counts"


#: An answer to a request, and the file that has it.
Candidate = tuple[Issued | BridgeError, str]


@dataclass(kw_only=True)
class Found:
    """The answers to open requests in carried files, and the keys beside them in a directory."""

    keys: dict[str, tuple[Path, PrivateKey]] = field(default_factory=dict)  #: By certificate name.
    candidates: dict[str, list[Candidate]] = field(default_factory=dict)  #: By certificate name.
    strange: list[BridgeError] = field(default_factory=list)  #: Answers to other requests, or of unknown origin.
    loose: list[tuple[Path, x509.Certificate]] = field(default_factory=list)

    def refuse(self, path: Path, text: str, hint: str | None = None) -> None:
        """Keep an answer to another request, or of unknown origin, as an error."""
        self.strange.append(BridgeError(f"{path}: {text}", hint=hint, exit_code=Exit.REFUSED))

    def keep(self, path: Path, loose: Iterable[x509.Certificate]) -> None:
        """Keep certificates whose dates can be read: the library parses dates late, and refuses the year 0."""
        for certificate in loose:
            try:
                _ = certificate.not_valid_before_utc, certificate.not_valid_after_utc
            except UNREADABLE as e:
                self.refuse(path, f"wanted a certificate with dates, found: {e}")
            else:
                self.loose.append((path, certificate))

    def take(self, name: str, answer: Issued | BridgeError, path: Path) -> None:
        """Keep an answer; `best` chooses between several."""
        self.candidates.setdefault(name, []).append((answer, printable(path)))

    def take_loose(self, request: SignRequest) -> list[x509.Certificate]:
        """Keep the loose certificates for the request's key, each with all CA certificates that might lead to its CA."""
        cas = tuple(certificate for _, certificate in self.loose if is_ca(certificate))
        leaves = [(path, certificate) for path, certificate in self.loose if is_for(certificate, request.csr)]
        for path, leaf in leaves:
            self.take(request.spec.name, Issued(leaf=leaf, intermediates=cas), path)
        return [leaf for _, leaf in leaves]

    def best(self, item: Prepared, expected: verify.Expectation) -> Candidate:
        """Return the latest certificate that passes, so that no decoy hides it; else the latest; else a refusal."""
        candidates = self.candidates[item.name]
        issued = [(answer, source) for answer, source in candidates if isinstance(answer, Issued)]
        issued.sort(key=lambda pair: pair[0].leaf.not_valid_before_utc, reverse=True)
        good = (pair for pair in issued if verify.error_of(pair[0], item.request, expected) is None)
        return next(good, issued[0] if issued else candidates[0])


def answers_in(run: Run, paths: Sequence[Path]) -> Found:
    """Read the answers to open requests in carried files; record answers to other requests."""
    answers = Found()
    for path in dict.fromkeys(paths):
        is_directory = path.is_dir()
        for file in _files_in(path) if is_directory else [path]:
            _read_answer(run, file, answers, skip=is_directory)
    # loose certificates by public key; a leaf that answers no open request is refused by name
    matched = {fingerprint(leaf) for request in run.requests for leaf in answers.take_loose(request.request)}
    for path, certificate in answers.loose:
        if fingerprint(certificate) not in matched and not is_ca(certificate):
            text = f"wanted the certificate of a request that waits here, found {_about(certificate)} for another key"
            answers.refuse(path, text, "it answers a cancelled or older request, or another node's")
    for error in answers.strange:
        run.record.add(audit.REFUSED, error=error)
    return answers


def _files_in(directory: Path) -> list[Path]:
    with reasons(BridgeError, f"{directory}: can't look for answers there"):
        return sorted(path for path in directory.iterdir() if path.is_file() and not path.name.startswith("."))


def _read_answer(run: Run, path: Path, answers: Found, *, skip: bool) -> None:
    try:
        data = read(path)
        if data is None:
            raise UnreadableError("no such file")  # noqa: TRY301 (handled as an unreadable file)
        if data.lstrip().startswith(b"{"):
            answer, desk = bundle_format.loads_answer(data), run.settings.node.desk_key
            key = None if desk is None else read_public_key(desk, "node.desk_key")
            if bundle_format.is_authentic(answer, key):
                _take_bundle(run, path, answer, answers)
            else:
                answers.refuse(path, f"{_SIGNED}, found one without its signature", _SIGNED_HINT)
        elif (loose := certificates_in(data)) and run.settings.node.desk_key is not None:
            answers.refuse(path, f"{_SIGNED}, found loose certificates", _SIGNED_HINT)
        else:
            answers.keep(path, loose)
    except BundleError as e:
        code = Exit.FAILED if isinstance(e, IncompleteBundleError) else Exit.REFUSED
        error = BridgeError(f"{path}: {e}", hint=e.hint, exit_code=code)
        if not skip:
            raise error from None
        if e.found == bundle_format.REQUEST_SCHEMA:
            log.info("%s: passed over: it is the request", path)
        else:
            answers.strange.append(error)
    except (UnreadableError, ValueError) as e:
        if not skip:
            raise BridgeError(
                f"{path}: wanted an answer bundle, or certificates in PEM, DER or PKCS#7, found: {e}"
            ) from None
        log.info("%s: passed over: %s", path, e)


def _take_bundle(run: Run, path: Path, answer: AnswerBundle, answers: Found) -> None:
    node = run.settings.node
    if (answer.node, answer.cluster) != (node.node_name, node.cluster):
        text = f"wanted an answer to node {node.node_name} of cluster {node.cluster}"
        answers.refuse(path, f"{text}, found one to node {answer.node} of cluster {answer.cluster}")
        return
    matching = [request for request in run.requests if answer.request_digest in (*request.bundles, request.reference)]
    live = run.read_node() if answer.answers and not matching else None
    if live and all(
        isinstance(issued, Issued) and issued.leaf == live.live(name) for name, issued in answer.answers.items()
    ):
        run.progress.note(f"{path}: all its certificates are installed already")
    elif not matching:
        answers.refuse(
            path,
            "wanted an answer to a request that waits here, found one to the bundle with the fingerprint "
            f"{fingerprint_text(answer.request_digest)}, which was cancelled, is done, or is older",
            "`ca-bridge pending list` shows the waiting requests; export again if there is none",
        )
    for request in matching:
        given = answer.answers.get(request.name)
        if isinstance(given, Refusal):
            again = "carry the same request there again; `ca-bridge pending cancel` gives it up"
            if node.desk_key is not None and not run.store.bootstrap.exists():  # a signed refusal ends the request
                again = "`ca-bridge export` makes a new request"
            hint = f"once the desk's policy allows it, {again}"
            refusal = BackendRefusedError(f"refused by {answer.signer}: {given.reason}", hint=hint)
            answers.take(request.name, refusal, path)
        elif given is not None:
            answers.take(request.name, given, path)


def _about(certificate: x509.Certificate) -> str:
    with contextlib.suppress(*UNREADABLE):
        return f"{name_text(certificate.subject)}, serial {serial_hex(certificate)},"
    return f"SHA-256 {fingerprint(certificate)[:16]}…"


def answered_by(
    run: Run, item: Prepared, answers: Found, expected: verify.Expectation, verb: str = "import"
) -> Answered:
    """Return the best of the carried answers to a request, and record it."""
    answer, source = answers.best(item, expected)
    label = f"{verb} of {source}"
    run.record.describe(item.name, item.request, label, None)
    if isinstance(answer, Issued):
        run.record.add(audit.ISSUED, item.name, authority=item.authority, new=answer.leaf)
    return Answered(prepared=item, expected=expected, label=label, answer=answer)


def cancel(
    settings: Settings, options: RunOptions, now: Now, progress: Progress
) -> tuple[list[OpenRequest], list[str]]:
    """Delete requests and their keys, so that later answers are refused; return them, and names without a request."""
    names = options.names
    with begun(settings, now, progress, options.wait) as (run, node):
        requests = run.requests.by_name()
        assert_known(names, node, requests)
        cancelled = [request for request in requests.values() if ALL in names or request.name in names]
        for request in cancelled:
            run.requests.drop(request.name)
            run.record.describe(request.name, request.request, request.backend or "bundle", None)
            run.record.add(audit.CANCELLED, request.name, authority=request.request.spec.authority.name)
        sent = [(request.request.spec.authority.name, request.reference) for request in cancelled]
        with contextlib.suppress(SettingsError):  # a mistake in a CA's table does not keep its request open
            owe_putting_away(run.settings, run.store, sent)
        run.record.write()
        run.requests.save()
        put_away(run.settings, run.store, progress.note)
    return cancelled, [name for name in names if name != ALL and name not in requests]
