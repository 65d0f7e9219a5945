"""
The end of a renewal: prove every answer, keep what passed, install it in one step.

Used by `renew`, whose answers come from CAs, and by `import`, whose answers come in files.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509

from bridge.contract import Issued, Pending
from bridge.errors import BackendUnavailableError, BridgeError, Exit, SettingsError, WaitingError
from bridge.node import kubeconfig
from bridge.node.inventory import Item, Node
from bridge.pki import verify
from bridge.pki.certificates import load_pem_certificates, pem, serial_hex
from bridge.pki.expiry import first_end, is_due, residual, seconds_left
from bridge.renewal.issuance import Answer
from bridge.renewal.prepare import Prepared
from bridge.renewal.selection import MissingCertificateError, outcome_of
from bridge.settings.tables import Settings
from bridge.signing.preflight import RefusedByCheckError
from bridge.state import audit
from bridge.state.install import (
    CERTIFICATE_MASK,
    KEY_MASK,
    KUBECONFIG_MASK,
    Replacement,
    install,
)
from bridge.state.outcome import Outcome
from bridge.state.requests import OpenRequest, OpenRequests
from bridge.state.session import Run
from bridge.system.state_file import StateError

#: Below this version kubeadm reads one certificate a file (measured on 1.20; chains since 1.21).
FIRST_WITH_CHAINS = (1, 21)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of a run."""

    outcomes: tuple[Outcome, ...]
    backup_id: str | None = None
    errors: tuple[BridgeError, ...] = ()  #: About the run as a whole, or about earlier ones.
    restarted: tuple[str, ...] = ()  #: Sentences, one a component.
    proven: int | None = None  #: How many checks held; None: nothing was looked at.

    @property
    def renewed(self) -> list[Outcome]:
        """What was installed."""
        return [outcome for outcome in self.outcomes if outcome.new is not None]

    @property
    def waiting(self) -> list[Outcome]:
        """What a CA has not answered yet."""
        return [outcome for outcome in self.outcomes if isinstance(outcome.error, WaitingError)]

    @property
    def failed(self) -> list[Outcome]:
        """What was not, for another reason."""
        return [o for o in self.outcomes if o.error is not None and not isinstance(o.error, WaitingError)]

    @property
    def exit_code(self) -> int:
        """The worst outcome's, or the worst error's."""
        return Exit.worst([*(o.exit_code for o in self.outcomes), *(e.exit_code for e in self.errors)])


def expectations(
    node: Node, settings: Settings, items: Sequence[Item], now: datetime
) -> tuple[dict[str, verify.Expectation], list[Outcome]]:
    """What the node demands, by authority; and the certificates whose CA file can't be read."""
    version = version_of(node, settings)
    demands: dict[str, verify.Expectation] = {}
    failed = []
    for item in items:
        name = item.spec.authority.name
        try:
            demands[name] = verify.Expectation(
                anchors=_anchors(item),
                anchor_name=str(item.anchor_path),
                now=now,
                min_validity=settings.renewal.min_validity,
                intermediates_allowed=version is None or version >= FIRST_WITH_CHAINS,
                extra_subject=settings.extra_subject(name),
            )
        except BridgeError as e:
            failed.append(outcome_of(item, e))
    return demands, failed


def version_of(node: Node, settings: Settings) -> tuple[int, int] | None:
    """Kubernetes' version on this node; the settings count more than the image tags."""
    version = settings.node.kubernetes_version
    return node.kubernetes_version if version is None else (version.major, version.minor)


def _anchors(item: Item) -> tuple[x509.Certificate, ...]:
    try:
        return tuple(load_pem_certificates(item.anchor_path.read_bytes()))
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise MissingCertificateError(
            f"{item.anchor_path}: wanted the CA certificate that {item.spec.name} must lead to, found: {reason}",
            hint="put the CA certificate back",
        ) from e


def replacements(one: Prepared, verified: verify.Verified) -> Iterator[Replacement]:
    """
    The files of one pair, key first.

    Raises:
        KubeconfigError, MissingCertificateError: The kubeconfig was changed meanwhile, and can't be edited or read now.
    """
    chain = b"".join(pem(certificate) for certificate in (verified.leaf, *verified.intermediates))
    item, name = one.item, one.name
    if item.key_path is None:
        path = item.certificate_path
        try:
            data = kubeconfig.with_credentials(path.read_bytes(), chain, one.key_pem)
        except kubeconfig.KubeconfigError as e:
            raise e.of(path) from None
        except OSError as e:
            raise MissingCertificateError(f"{path}: wanted to read it, found: {e.strerror}") from e
        yield Replacement(certificate=name, path=path, data=data, mode_mask=KUBECONFIG_MASK, was=one.was[path])
        return
    yield Replacement(
        certificate=name, path=item.key_path, data=one.key_pem, mode_mask=KEY_MASK, was=one.was[item.key_path]
    )
    yield Replacement(
        certificate=name,
        path=item.certificate_path,
        data=chain,
        mode_mask=CERTIFICATE_MASK,
        was=one.was[item.certificate_path],
    )


def finish(
    run: Run,
    prepared: Sequence[Prepared],
    answers: Mapping[str, Answer],
    expected: Mapping[str, verify.Expectation],
    *,
    labels: Mapping[str, str],
    earlier: Sequence[Outcome],
    all_or_nothing: bool,
    by_hand: bool = False,
    before: Callable[[Sequence[Outcome]], None] | None = None,
) -> Result:
    """
    Prove every answer, then install those that passed in one step.

    What passed is in the state directory before anything is replaced, so that a run after an interruption asks no CA
    for it again.

    Args:
        run: Its record is told; all of it is written before anything is replaced.
        prepared: What was asked for.
        answers: By certificate name.
        expected: By authority.
        labels: Who answered, by certificate name.
        earlier: What failed before it could be asked for.
        all_or_nothing: Install nothing if anything failed.
        by_hand: A person brought the answers; with a wrong one among them a request is not over.
        before: Is told what is about to be installed, and may stop it by an error.

    Raises:
        AuditError: Nothing was replaced.
        InstallError: Nothing was replaced.
        StateError: Nothing was replaced.
    """
    passed: list[tuple[Prepared, verify.Verified]] = []
    files: list[Replacement] = []
    failed = list(earlier)
    for one in prepared:
        try:
            verified = _proven(one, answers[one.name], expected[one.authority])
            files += list(replacements(one, verified))
        except BridgeError as e:
            failed.append(outcome_of(one.item, e, labels[one.name]))
        else:
            passed.append((one, verified))
    _record_proofs(run.record, passed, failed)
    _keep(run, prepared, answers, {one.name for one, _ in passed}, labels, by_hand=by_hand)
    if failed and all_or_nothing:
        held = held_back([one for one, _ in passed], failed)
        record_failed(run.record, held)
        return Result(outcomes=(*failed, *held))
    if not passed:
        return Result(outcomes=tuple(failed))
    done = [
        Outcome(
            name=one.name,
            authority=one.authority,
            old=one.request.replaces,
            new=verified.leaf,
            backend=labels[one.name],
        )
        for one, verified in passed
    ]
    backup_id = _install(run, passed, files, lambda: before(done) if before is not None else None)
    _note_short_lives(run, passed)
    return Result(outcomes=(*done, *failed), backup_id=backup_id)


def _note_short_lives(run: Run, passed: Sequence[tuple[Prepared, verify.Verified]]) -> None:
    """A CA that gives less than `renewal.before` lets every run renew all again, and each succeeds."""
    renewal, now = run.settings.renewal, run.now()
    short: dict[str, list[str]] = {}
    for one, verified in passed:
        chain = (verified.leaf, *verified.intermediates)
        if is_due(chain, renewal.before, renewal.validity, now):
            short.setdefault(residual(seconds_left(first_end(chain), now)), []).append(one.name)
    for lifetime, names in short.items():
        run.progress.note(
            f"{', '.join(names)}: wanted a lifetime of more than renewal.before ({renewal.before}), got {lifetime}: "
            f'every run renews again; have the CA give more (its profile or role), or set before = "33%"'
        )


def _install(
    run: Run,
    passed: Sequence[tuple[Prepared, verify.Verified]],
    files: Sequence[Replacement],
    before: Callable[[], None],
) -> str:
    _wait_until_valid([verified.leaf for _, verified in passed])
    run.record.write()  # nothing is installed that the record does not know
    try:
        before()
        backup_id = install(run.store, files, run.record.run_id, _about(passed))
    except BridgeError as e:
        record_failed(run.record, [outcome_of(one.item, e) for one, _ in passed])
        raise
    for one, verified in passed:
        run.record.add(audit.INSTALLED, one.name, authority=one.authority, new=verified.leaf)
        run.requests.drop(one.name)
    run.record.write_or_warn()  # restart and proof may take minutes, and be killed
    try:
        run.requests.save()
    except StateError as e:
        run.progress.note(f"{e}; all is installed, and the next run forgets what is kept there")
    return backup_id


def _keep(
    run: Run,
    prepared: Sequence[Prepared],
    answers: Mapping[str, Answer],
    passed: Collection[str],
    labels: Mapping[str, str],
    *,
    by_hand: bool,
) -> None:
    """Remember what passed and what is still to come, and forget what came to nothing."""
    for one in prepared:
        answer, kept = answers[one.name], run.requests.get(one.name)
        made = kept or open_request(run, one)
        made = dataclasses.replace(made, request=one.request, backend=labels[one.name])
        if isinstance(answer, Pending):
            run.requests.put(dataclasses.replace(made, reference=answer.reference, note=answer.note))
        elif isinstance(answer, Issued) and one.name in passed:
            run.requests.put(dataclasses.replace(made, answer=answer))
        elif kept is not None and not by_hand and not isinstance(answer, _NOT_ASKED):
            _forget(run.requests, kept)
    run.requests.save()


#: The CA has not said no to the request itself.
_NOT_ASKED = (BackendUnavailableError, RefusedByCheckError, SettingsError)


def _forget(requests: OpenRequests, kept: OpenRequest) -> None:
    """Its CA said no, or signed something else: the next run makes a new key. What was carried out may still come back."""
    if kept.bundles:
        requests.put(dataclasses.replace(kept, reference="", note=""))
    else:
        requests.drop(kept.name)


def open_request(run: Run, one: Prepared) -> OpenRequest:
    """To keep what was prepared."""
    return one.open or OpenRequest(
        request=one.request, key_pem=one.key_pem, created=run.now(), run_id=run.record.run_id
    )


def _record_proofs(
    record: audit.Record, passed: Sequence[tuple[Prepared, verify.Verified]], failed: Sequence[Outcome]
) -> None:
    for one, verified in passed:
        record.add(audit.VERIFIED, one.name, authority=one.authority, new=verified.leaf)
    record_failed(record, failed)


def record_failed(record: audit.Record, failed: Sequence[Outcome]) -> None:
    """Lines that wait to be written."""
    for outcome in failed:
        if outcome.error is not None:
            held = isinstance(outcome.error, HeldBackError)
            event = audit.FAILED if held else audit.event_of(outcome.error)
            record.add(event, outcome.name, authority=outcome.authority, old=outcome.old, error=outcome.error)


class HeldBackError(BridgeError):
    """The answer was good, and was not installed because another one was not."""

    exit_code = Exit.REFUSED


class HeldBackWaitingError(WaitingError):
    """The answer was good, and is kept until the others are there."""

    hint = ""


def held_back(prepared: Sequence[Prepared], failed: Sequence[Outcome]) -> list[Outcome]:
    """For `--all-or-nothing`."""
    error: BridgeError
    if all(isinstance(outcome.error, WaitingError) for outcome in failed):
        error = HeldBackWaitingError("kept until the others are answered, since --all-or-nothing was given")
    else:
        error = HeldBackError("not installed, since others failed and --all-or-nothing was given")
    return [outcome_of(one.item, error) for one in prepared]


def _proven(one: Prepared, answer: Answer, expected: verify.Expectation) -> verify.Verified:
    if isinstance(answer, BridgeError):
        raise answer
    if isinstance(answer, Pending):
        raise WaitingError(answer.note or "the CA has the request, and has not answered yet")
    return verify.check(answer, one.request, expected)


def _wait_until_valid(leaves: Sequence[x509.Certificate]) -> None:
    """A CA's clock may be some seconds ahead (`verify.CLOCK_SKEW` at most): nothing is installed before it is valid."""
    begin = max(leaf.not_valid_before_utc for leaf in leaves).timestamp()
    time.sleep(max(0.0, min(begin - time.time(), verify.CLOCK_SKEW.total_seconds())))


def _about(passed: Sequence[tuple[Prepared, verify.Verified]]) -> dict[str, object]:
    """For the backup's manifest."""
    certificates = [
        {
            "name": one.name,
            "old_serial": serial_hex(one.request.replaces) if one.request.replaces else None,
            "new_serial": serial_hex(verified.leaf),
        }
        for one, verified in passed
    ]
    return {"command": shlex.join(sys.argv), **audit.who(), "certificates": certificates}
