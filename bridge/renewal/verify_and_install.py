"""The end of a renewal, with answers from CAs or files: verify each, keep what passed, install it in one step."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509

from bridge.ca import RefusedByCheckError, UntrustedAnswerError
from bridge.ca.registry import cross_behind
from bridge.contract import Issued, Pending
from bridge.errors import (
    BackendUnavailableError,
    BridgeError,
    Exit,
    NoVerdictError,
    SettingsError,
    VerificationError,
    WaitingError,
)
from bridge.node import kubeconfig, kubelet, pairs
from bridge.node.inventory import Item, Node
from bridge.node.kubeconfig import KubeconfigError
from bridge.pki import verify
from bridge.pki.certificates import UNREADABLE, leads_to, load_pem_certificates, pem
from bridge.pki.expiry import duration_text, first_end, is_due, minute, residual, seconds_left
from bridge.renewal import MissingCertificateError, NotReadyError, anchors_of, outcome_of
from bridge.renewal.issuance import Answered, ShorterError
from bridge.renewal.prepare import Prepared, open_request, read_live
from bridge.settings.pair_tables import MOST_OF_A_KEY, PairFiles
from bridge.settings.tables import Settings
from bridge.specs import CA
from bridge.state import Outcome, audit
from bridge.state.install import CERTIFICATE_MASK, KEY_MASK, KUBECONFIG_MASK, Replacement, install
from bridge.state.session import Run
from bridge.system.files import Attributes
from bridge.system.paths import UnreadableError, read
from bridge.system.state_file import StateError
from bridge.words import one_line

#: The certificates of CA files, by authority.
Bundles = Mapping[str, tuple[x509.Certificate, ...]]

#: Below this version kubeadm reads one certificate a file (measured on 1.20; chains since 1.21).
FIRST_WITH_CHAINS = (1, 21)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The result of a run."""

    outcomes: tuple[Outcome, ...] = ()
    backup_id: str | None = None
    errors: tuple[BridgeError, ...] = ()  #: About the run as a whole, or about earlier ones.
    restarted: tuple[str, ...] = ()  #: Sentences, one a component.
    read_again: tuple[str, ...] = ()  #: Further pairs that their programs have read again.
    proven: int | None = None  #: Number of checks that passed; None: no look.
    left_to_people: bool = False  #: An operator has to restart the components that use the new certificates.

    @property
    def renewed(self) -> list[Outcome]:
        """Outcomes of certificates that were installed."""
        return [outcome for outcome in self.outcomes if outcome.new is not None]

    @property
    def waiting(self) -> list[Outcome]:
        """Outcomes of certificates that a CA has not answered for yet."""
        return [outcome for outcome in self.outcomes if isinstance(outcome.error, WaitingError)]

    @property
    def failed(self) -> list[Outcome]:
        """Outcomes of certificates that were not installed for another reason."""
        return [o for o in self.outcomes if o.error is not None and not isinstance(o.error, WaitingError)]

    @property
    def exit_code(self) -> int:
        """The worst exit code of all outcomes and errors."""
        return Exit.worst([*(o.exit_code for o in self.outcomes), *(e.exit_code for e in self.errors)])


def expectations(
    node: Node, settings: Settings, items: Sequence[Item], now: datetime, bundles: Bundles | None = None
) -> tuple[dict[str, verify.Expectation], list[Outcome]]:
    """
    Return expectations by authority, and failures where the CA file can't be read, or the CA is half replaced; `bundles`
    are the next contents of CA files that the installation replaces, too.
    """
    bundles = bundles or {}
    wanted = settings.node.kubernetes_version
    version = node.kubernetes_version if wanted is None else (wanted.major, wanted.minor)
    half = _half_rotated(node, settings.node.kubeconfig_dir)
    demands: dict[str, verify.Expectation] = {}
    failed = []
    for item in items:
        name = item.spec.authority.name
        if half is not None and name == CA.name and name not in bundles:
            failed.append(outcome_of(item, half))
            continue
        try:
            anchors = bundles.get(name) or anchors_of(item)
            demands[name] = dataclasses.replace(
                settings.expectation(name, anchors, str(item.anchor_path), now),
                intermediates_allowed=version is None or version >= FIRST_WITH_CHAINS,
                cross=cross_behind(settings, name, anchors[0], now),
            )
        except BridgeError as e:
            failed.append(outcome_of(item, e))
    return demands, failed


def _half_rotated(node: Node, kubeconfig_dir: Path) -> NotReadyError | None:
    """Find kubeconfigs that accept the API server's live certificate, and would refuse its next one."""
    serving = next((item.certificates for item in node.items if item.spec.name == "apiserver"), ())
    anchors = node.bundles.get(CA.name, ())
    if not serving or not anchors or (len(anchors) == 1 and leads_to(serving, anchors)):
        return None
    new = anchors[0]  # kubeadm and our own checks take the first as the root
    behind = []
    for spec in (item.spec for item in node.items if item.spec.kubeconfig and item.state == "present"):
        trusted = _trusted(kubeconfig_dir / spec.base)
        if not any(_is_same(anchor, new) for anchor in trusted) and leads_to(serving, trusted):
            behind.append(str(kubeconfig_dir / spec.base))
    if not behind:
        return None
    ca = next(authority.path for authority in node.authorities if authority.authority == CA)
    return NotReadyError(
        f"wanted the first CA of {ca} in each kubeconfig, since it signs the new certificates; "
        f"found only the old one in {', '.join(behind)}",
        hint="have both CAs in certificate-authority-data of every kubeconfig, of all nodes and people, before the new "
        "one is the first in ca.crt (Kubernetes' “Manual Rotation of CA Certificates”); no CA was asked, and nothing was replaced",
    )


def _trusted(path: Path) -> list[x509.Certificate]:
    """Return the CAs that a kubeconfig trusts; empty: it names none, or they can't be read."""
    with contextlib.suppress(KubeconfigError, UnreadableError, ValueError):
        return load_pem_certificates(kubeconfig.parse(read(path) or b"").ca_data or b"")
    return []


def _is_same(certificate: x509.Certificate, other: x509.Certificate) -> bool:
    """Whether both are certificates of one CA, perhaps renewed with the same key."""
    with contextlib.suppress(*UNREADABLE):
        return certificate.subject == other.subject and certificate.public_key() == other.public_key()
    return False


def replacements(prepared: Prepared, verified: verify.Verified) -> Iterator[Replacement]:
    """Yield the replacements of one certificate's files, key first."""
    chain = pem(*verified.chain)
    item, path = prepared.item, prepared.item.certificate_path
    if item.pair is not None:
        for files in item.pair.places:
            yield from _pairs(prepared, files, verified)
    elif item.current is not None:
        yield from _kubelets(prepared, item.current, chain)
    elif item.key_path is None:
        yield _replacing(prepared, path, KUBECONFIG_MASK, _embedding(prepared, _conf(prepared, chain), chain))
    elif item.in_one_file:
        yield _replacing(prepared, path, KEY_MASK, chain + prepared.key_pem)
    else:
        yield _replacing(prepared, item.key_path, KEY_MASK, prepared.key_pem, makes_directory=item.spec.by_flag)
        new = dataclasses.replace(Attributes.private(), mode=0o644)  # kubeadm's, for a file that does not exist yet
        yield _replacing(prepared, path, CERTIFICATE_MASK, chain, attributes=new)


def _replacing(prepared: Prepared, path: Path, mask: int, data: bytes | None, **more: Any) -> Replacement:
    was = prepared.was.get(path)
    return Replacement(certificate=prepared.name, path=path, data=data, mode_mask=mask, was=was, **more)


def _pairs(prepared: Prepared, files: PairFiles, verified: verify.Verified) -> Iterator[Replacement]:
    """Replace the files of a further pair at one place, key first; the settings name their owners."""
    chain = pem(*verified.chain)
    contents = {files.key_file: prepared.key_pem, files.certificate_file: chain}
    if os.path.realpath(files.key_file) == os.path.realpath(files.certificate_file):
        contents = {files.key_file: chain + prepared.key_pem}
    if files.ca_file is not None:
        contents[files.ca_file] = pem(*verified.intermediates, *anchors_of(prepared.item))
    for path, data in contents.items():
        attributes = pairs.attributes_for(files, path)
        mask = MOST_OF_A_KEY if path == files.key_file else CERTIFICATE_MASK
        yield _replacing(prepared, path, mask, data, attributes=attributes, is_imposed=True)


def _kubelets(prepared: Prepared, current: Path, chain: bytes) -> Iterator[Replacement]:
    """Replace a pair as a kubelet does: a dated file, and the symlink to it, which the kubeconfig names afterwards."""
    base, moment = current.name.removesuffix("-current.pem"), datetime.now(UTC)  # of writing, as in a kubelet's names
    directory, path = current.parent.resolve(), prepared.item.certificate_path
    while (dated := directory / f"{base}-{moment.astimezone():%Y-%m-%d-%H-%M-%S}.pem").exists():
        moment += timedelta(seconds=1)
    conf = None if prepared.item.key_path is not None else _conf(prepared, chain)
    try:
        attributes = Attributes.of(current) if current.exists() else None
    except OSError as e:
        raise MissingCertificateError(f"{e.filename}: can't read it: {e.strerror}") from e
    pair = kubelet.OURS + chain + prepared.key_pem
    yield _replacing(prepared, dated, KEY_MASK, pair, attributes=attributes)
    yield _replacing(prepared, current, KEY_MASK, None, is_link=True, leads_to=str(dated))
    if conf is not None:  # an embedded copy, once expired, keeps the kubelet from starting (measured on 1.37)
        try:
            data = kubeconfig.with_references(conf, str(current))
        except kubeconfig.KubeconfigError:  # its form allows no references
            data = _embedding(prepared, conf, chain)
        yield _replacing(prepared, path, KUBECONFIG_MASK, data)


def _conf(prepared: Prepared, chain: bytes) -> bytes:
    path, fresh = prepared.item.certificate_path, prepared.kubeconfig
    return (read_live(path) or b"") if fresh is None else fresh.text(chain, prepared.key_pem)


def _embedding(prepared: Prepared, conf: bytes, chain: bytes) -> bytes:
    try:
        return kubeconfig.with_credentials(conf, chain, prepared.key_pem)
    except kubeconfig.KubeconfigError as e:
        raise e.of(prepared.item.certificate_path) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Proven:
    """A certificate that passed, and the files that will hold it."""

    prepared: Prepared
    label: str  #: The CA or file that answered.
    verified: verify.Verified
    ca_end: datetime  #: The earliest end among its issuers.
    files: tuple[Replacement, ...]

    @property
    def name(self) -> str:
        """kubeadm's name of the certificate."""
        return self.prepared.name

    @property
    def outcome(self) -> Outcome:
        """The outcome of its installation."""
        prepared, new = self.prepared, self.verified.leaf
        return Outcome(
            name=prepared.name, authority=prepared.authority, old=prepared.request.replaces, new=new, backend=self.label
        )


def verify_all(
    run: Run,
    answered: Sequence[Answered],
    earlier: Sequence[Outcome] = (),
    files_of: Callable[[Prepared, verify.Verified], Iterable[Replacement]] = replacements,
) -> tuple[list[Proven], list[Outcome]]:
    """Verify each answer now, since signing takes time; return those that passed, and the failures after `earlier`."""
    now, proven, failed = run.now(), [], list(earlier)
    for item in answered:
        try:
            verified = _verified(item, now)
            files = tuple(files_of(item.prepared, verified))
        except BridgeError as e:
            failed.append(outcome_of(item.prepared.item, e, item.label))
        else:
            issuers = (*verified.intermediates, *item.expected.anchors[:1])
            ca_end = min(issuer.not_valid_after_utc for issuer in issuers)
            passed = Proven(prepared=item.prepared, label=item.label, verified=verified, ca_end=ca_end, files=files)
            proven.append(passed)
            new, authority = verified.leaf, item.prepared.authority
            run.record.add(audit.VERIFIED, passed.name, authority=authority, new=new, result=_shorter(passed) or "ok")
    record_failed(run.record, failed)
    return proven, failed


def _verified(item: Answered, now: datetime) -> verify.Verified:
    if isinstance(item.answer, BridgeError):
        raise item.answer
    if isinstance(item.answer, Pending):
        raise WaitingError(item.answer.note or "the CA has the request, and has not answered yet")
    try:
        return verify.check(item.answer, item.prepared.request, dataclasses.replace(item.expected, now=now))
    except VerificationError as e:
        e.hint = item.advice
        raise


def remember(run: Run, answered: Sequence[Answered], proven: Sequence[Proven], *, by_hand: bool = False) -> None:
    """Save passed and pending requests before a file is replaced; drop wrongly answered ones, unless `by_hand`."""
    passed = {item.name for item in proven}
    for item in answered:
        name, answer, kept = item.prepared.name, item.answer, run.requests.get(item.prepared.name)
        request = kept or open_request(run, item.prepared)
        request = dataclasses.replace(request, request=item.prepared.request, backend=item.label)
        if isinstance(answer, Pending):
            run.requests.put(dataclasses.replace(request, reference=answer.reference, note=answer.note))
        elif isinstance(answer, Issued) and name in passed:
            run.requests.put(dataclasses.replace(request, answer=answer))
        elif kept is not None and isinstance(answer, UntrustedAnswerError):
            run.requests.put(dataclasses.replace(kept, note=one_line(answer.reason)))
        elif kept is None or by_hand or isinstance(answer, _NOT_ASKED):
            continue
        elif kept.bundles:  # the carried request may still get its answer
            run.requests.put(dataclasses.replace(kept, reference="", note=""))
        else:
            run.requests.drop(kept.name)
            if kept.is_waiting:
                run.progress.note(f"{name}: dropped the request of {minute(kept.created)} with its key, as it is over")
    run.requests.save()


#: Errors after which the CA may still sign the request.
_NOT_ASKED = (BackendUnavailableError, NoVerdictError, RefusedByCheckError, SettingsError, ShorterError)


def record_failed(record: audit.Record, failed: Sequence[Outcome]) -> None:
    """Add an audit line for each failure, to be written later."""
    for outcome in failed:
        if (error := outcome.error) is not None:
            event = audit.FAILED if isinstance(error, HeldBackError) else audit.event_of(error)
            record.add(event, outcome.name, authority=outcome.authority, old=outcome.old, error=error)


class HeldBackError(BridgeError):
    """The answer passed, and was not installed because another answer did not pass."""

    exit_code = Exit.REFUSED


def hold_back(run: Run, good: Sequence[Prepared], failed: Sequence[Outcome]) -> Result:
    """Return the result under `--all-or-nothing`: nothing is installed, since some failed."""
    error: BridgeError = HeldBackError("not installed, since others failed and --all-or-nothing was given")
    if all(isinstance(outcome.error, WaitingError) for outcome in failed):
        error = WaitingError("kept until the others are answered, since --all-or-nothing was given", hint="")
    held = [outcome_of(item.item, error) for item in good]
    record_failed(run.record, held)
    return Result(outcomes=(*failed, *held))


def await_validity(leaves: Sequence[x509.Certificate]) -> None:
    """Wait until all leaves are valid: a CA's clock may be some seconds ahead (`verify.CLOCK_SKEW` at most)."""
    begin = max(leaf.not_valid_before_utc for leaf in leaves).timestamp()
    time.sleep(max(0.0, min(begin - time.time(), verify.CLOCK_SKEW.total_seconds())))


def install_all(run: Run, proven: Sequence[Proven], files: Sequence[Replacement]) -> str:
    """Install these files in one step, and drop the requests; return the backup's ID."""
    replaced = ((item.name, item.prepared.request.replaces, item.verified.leaf) for item in proven)
    backup_id = install(run.store, files, run.record.run_id, audit.about(replaced))
    for item in proven:
        run.record.add(audit.INSTALLED, item.name, authority=item.prepared.authority, new=item.verified.leaf)
        run.requests.drop(item.name)
    run.record.write_late()  # restart and proof may take minutes, and may be killed
    try:
        run.requests.save()
    except StateError as e:
        run.progress.note(f"{e}; everything is installed, and the next run forgets these requests")
    _note_short_lives(run, proven)
    _note_cut_short(run, proven)
    return backup_id


def _shorter(item: Proven) -> str:
    """Return a sentence if a certificate ends before the one that it replaces; else an empty string."""
    old, new = item.prepared.request.replaces, item.verified.leaf.not_valid_after_utc
    if old is None or not verify.is_shorter(new, old):
        return ""
    return f'ends {minute(new)} instead of {minute(old.not_valid_after_utc)} (renewal.shorter = "allow")'


def _note_cut_short(run: Run, proven: Sequence[Proven]) -> None:
    """Report certificates that end with their CA's: the operator has to renew the CA."""
    cut: dict[datetime, list[str]] = {}
    for item in proven:
        end, wanted_end = item.verified.leaf.not_valid_after_utc, run.now() + item.prepared.request.validity
        if end < wanted_end - verify.LONGEST_BACKDATING and item.ca_end - end < verify.LONGEST_BACKDATING:
            cut.setdefault(item.ca_end, []).append(item.name)
        if sentence := _shorter(item):
            run.progress.note(f"{item.name}: {sentence}")
    for end, names in cut.items():
        run.progress.note(
            f"{', '.join(names)}: cut short, since the CA itself ends {minute(end)} (asked for: renewal.validity = "
            f"{duration_text(run.settings.renewal.validity)}); renew the CA's certificate"
        )


def _note_short_lives(run: Run, proven: Sequence[Proven]) -> None:
    """Report lifetimes below `renewal.before`: each run would renew again, and succeed."""
    renewal, now = run.settings.renewal, run.now()
    short: dict[str, list[str]] = {}
    for item in proven:
        if is_due(item.verified.chain, renewal.before, renewal.validity, now):
            short.setdefault(residual(seconds_left(first_end(item.verified.chain), now)), []).append(item.name)
    for lifetime, names in short.items():
        run.progress.note(
            f"{', '.join(names)}: wanted a lifetime of more than renewal.before ({renewal.before}), got {lifetime}: "
            f'every run renews again; have the CA give more (its profile or role), or set before = "33%"'
        )
