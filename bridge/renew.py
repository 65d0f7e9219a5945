"""
Renewal: `prepare` (what is due, keys, CSRs), `sign` (the CAs), `finish` (proof, installation).

Keys live in this process's memory until their certificates have passed; a type that leaves the node holds none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol

from cryptography import x509
from cryptography.x509.verification import VerificationError as NoPathError

from bridge import audit, backups, csr, inventory, kubeconfig, plugins, verify
from bridge.certificates import fingerprint, load_pem_certificates, name_text, pem, serial_hex
from bridge.contract import Backend, Checks, Identifies, Issued, ListsIssuers, SignRequest
from bridge.errors import (
    BackendError,
    BackendRefusedError,
    BridgeError,
    Exit,
    VerificationError,
    Violation,
)
from bridge.files import DIRECTORY_MODE, Attributes, lock, sync_directory, write_staged
from bridge.install import (
    CERTIFICATE_MASK,
    KEY_MASK,
    KUBECONFIG_MASK,
    InstallError,
    Replacement,
    digest,
    install,
    recover,
)
from bridge.inventory import Item, Node
from bridge.selection import RESTORE, MissingCertificateError, Outcome, Selection, outcome_of, select
from bridge.settings import Settings
from bridge.specs import AUTHORITIES, CertificateSpec
from bridge.store import Store

#: Below this version kubeadm reads one certificate a file (measured on 1.20; chains since 1.21).
FIRST_WITH_CHAINS = (1, 21)


class RefusedByCheckError(BackendRefusedError):
    """The CA would sign something else than what we need; nothing was asked of it."""


class Progress(Protocol):
    """Who looks on; called from several threads."""

    def signing(self, backend: str, names: Sequence[str]) -> None:
        """These certificates are being asked for."""

    def signed(self, name: str) -> None:
        """The CA has answered for one, with a certificate or not."""

    def note(self, text: str) -> None:
        """Something that the operator should know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A certificate on its way; holds the new key."""

    item: Item
    request: SignRequest
    key_pem: bytes = field(repr=False)
    was: Mapping[Path, str | None]  #: Digests of the files that are to be replaced.

    @property
    def authority(self) -> str:
        """Its CA's name."""
        return self.item.spec.authority.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of a run."""

    outcomes: tuple[Outcome, ...]
    backup_id: str | None = None

    @property
    def renewed(self) -> list[Outcome]:
        """What was installed."""
        return [outcome for outcome in self.outcomes if outcome.new is not None]

    @property
    def failed(self) -> list[Outcome]:
        """What was not."""
        return [outcome for outcome in self.outcomes if outcome.error is not None]

    @property
    def exit_code(self) -> int:
        """The worst outcome's."""
        return Exit.worst([outcome.exit_code for outcome in self.outcomes])


# --- prepare ---------------------------------------------------------------------------------------------------------


def prepare(items: Sequence[Item], settings: Settings) -> list[Prepared | Outcome]:
    """
    Keys and CSRs from the live certificates, on all cores; what can't be made fails alone.

    Returns:
        In the order of the items.
    """
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(lambda item: _prepare(item, settings), items))


def _prepare(item: Item, settings: Settings) -> Prepared | Outcome:
    try:
        live, was = _live(item)
        key = csr.generate_key(csr.key_algorithm(live, settings.renewal.key))
        request = SignRequest(
            spec=item.spec, csr_pem=csr.build(live, key), validity=settings.renewal.validity, replaces=live
        )
    except BridgeError as e:
        return outcome_of(item, e)
    return Prepared(item=item, request=request, key_pem=csr.key_pem(key), was=was)


def _live(item: Item) -> tuple[x509.Certificate, dict[Path, str | None]]:
    """The certificate on disk now, and the digests of all files of its pair, read at the same time."""
    paths = [item.certificate_path] if item.key_path is None else [item.key_path, item.certificate_path]
    contents = {path: _read(path) for path in paths}
    data = contents[item.certificate_path]
    certificate_data = kubeconfig.parse(data or b"").certificate_data if item.embedded else data
    try:
        live = load_pem_certificates(certificate_data or b"")[0]
    except ValueError as e:
        raise MissingCertificateError(f"{item.certificate_path}: wanted a certificate, found {e}", hint=RESTORE) from e
    return live, {path: None if content is None else digest(content) for path, content in contents.items()}


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None  # a key without which its certificate can still be renewed
    except OSError as e:
        raise MissingCertificateError(f"{path}: wanted to read it, found: {e.strerror}") from e


def write_csrs(prepared: Sequence[Prepared], directory: Path) -> None:
    """
    `NAME.csr` and `NAME.key`, flat and 0600, as `kubeadm certs renew --csr-only` wrote them up to 1.22.

    Unlike it, never over an older file: that key may belong to a CSR that a CA is about to sign.

    Raises:
        BridgeError: A file is there already, or can't be written; then none of ours is left.
    """
    written: list[Path] = []
    try:
        if not directory.is_dir():
            directory.mkdir(mode=DIRECTORY_MODE, parents=True)
        for one in prepared:
            for suffix, data in ((".key", one.key_pem), (".csr", one.request.csr_pem)):
                path = directory / f"{one.item.spec.name}{suffix}"
                write_staged(path, data, Attributes.private())
                written.append(path)
        sync_directory(directory)
    except OSError as e:
        for path in written:
            path.unlink()
        found = f"{e.filename}: {e.strerror}" if e.filename else e.strerror
        raise BridgeError(
            f"wanted to write keys and CSRs to {directory}, found {found}", hint="choose an empty --csr-dir"
        ) from e


# --- sign ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """One authority's CA after its preflight."""

    label: str
    backend: Backend | None  #: None: it can't be opened.
    outage: plugins.Outage
    wrong: Mapping[str, BridgeError]  #: What can't be asked for, by certificate name.
    identity: str | None = None  #: Who we are to it, if it tells.


def reach(
    configured: plugins.Configured, items: Sequence[Item], expected: verify.Expectation, progress: Progress
) -> Reached:
    """Open a backend, and ask what can be asked before a signature is spent; an error is part of the answer."""
    names = [item.spec.name for item in items]
    progress.signing(configured.label, names)
    outage = plugins.Outage(configured.settings.retry_for)
    backend: Backend | None = None
    wrong: Mapping[str, BridgeError] = {}
    identity = None
    try:
        backend = opened = configured.open()
        wrong = outage.ask(lambda: preflight(opened, [item.spec for item in items], expected))
        identity = _identity(opened)
    except BridgeError as e:
        wrong = dict.fromkeys(names, e)
    return Reached(label=configured.label, backend=backend, outage=outage, wrong=wrong, identity=identity)


def _identity(backend: Backend) -> str | None:
    """For the record; a CA that does not tell it may still sign."""
    with contextlib.suppress(BackendError):
        return (backend.identity() or None) if isinstance(backend, Identifies) else None
    return None


def sign(
    prepared: Sequence[Prepared], reached: Mapping[str, Reached], progress: Progress
) -> dict[str, Issued | BridgeError]:
    """
    Ask each authority's CA for its certificates, all CAs at the same time.

    Args:
        prepared: What to ask for.
        reached: By authority.
        progress: Is told.

    Returns:
        By certificate name.
    """

    def ask(authority: str) -> dict[str, Issued | BridgeError]:
        return _ask(reached[authority], [one for one in prepared if one.authority == authority], progress)

    answers: dict[str, Issued | BridgeError] = {}
    with ThreadPoolExecutor(len(AUTHORITIES)) as pool:
        for part in pool.map(ask, dict.fromkeys(one.authority for one in prepared)):
            answers |= part
    return answers


def _ask(reached: Reached, prepared: Sequence[Prepared], progress: Progress) -> dict[str, Issued | BridgeError]:
    answers: dict[str, Issued | BridgeError] = dict(reached.wrong)
    requests = [one.request for one in prepared if one.item.spec.name not in answers]
    if reached.backend is not None and requests:
        signed = plugins.sign_all(
            reached.backend, requests, reached.outage, lambda request: progress.signed(request.spec.name)
        )
        answers |= {request.spec.name: answer for request, answer in zip(requests, signed, strict=True)}
    return answers


def preflight(
    backend: Backend, specs: Sequence[CertificateSpec], expected: verify.Expectation
) -> dict[str, RefusedByCheckError]:
    """
    What can be known before a signature is spent: the right CA, and the right usages for each certificate.

    Returns:
        By certificate name, only what would go wrong.

    Raises:
        BackendRefusedError: It is another CA, or does not accept us.
        BackendUnavailableError: No answer.
    """
    if isinstance(backend, ListsIssuers):
        _assert_right_ca(backend.issuers(), expected)
    found = backend.check(specs) if isinstance(backend, Checks) else {}
    return {name: RefusedByCheckError(_violations_text(violations), hint=VerificationError.hint)
            for name, violations in found.items() if violations}  # fmt: skip


def _violations_text(violations: Sequence[Violation]) -> str:
    return "; ".join(map(str, violations))


def _assert_right_ca(issuers: Sequence[x509.Certificate], expected: verify.Expectation) -> None:
    anchor = expected.anchors[0]
    with contextlib.suppress(NoPathError, IndexError):
        verify.verified_path(issuers[0], issuers[1:], anchor, expected.now)
        return
    got = f"{name_text(issuers[0].subject)}, SHA-256 {fingerprint(issuers[0])[:16]}…" if issuers else "no certificate"
    raise BackendRefusedError(
        f"wanted the CA of {expected.anchor_name} ({name_text(anchor.subject)}, SHA-256 {fingerprint(anchor)[:16]}…), got {got}",
        hint="the mount, label, URL or directory of this authority may be another one's",
    )


# --- finish ----------------------------------------------------------------------------------------------------------


def expectations(
    node: Node, settings: Settings, items: Sequence[Item], now: datetime
) -> tuple[dict[str, verify.Expectation], list[Outcome]]:
    """What the node demands, by authority; and the certificates whose CA file can't be read."""
    version = version_of(node, settings)
    demands: dict[str, verify.Expectation] = {}
    failed = []
    for item in items:
        name = item.spec.authority.name
        ours = settings.authorities.get(name)
        try:
            demands[name] = verify.Expectation(
                anchors=_anchors(item),
                anchor_name=str(item.anchor_path),
                now=now,
                min_validity=settings.renewal.min_validity,
                intermediates_allowed=version is None or version >= FIRST_WITH_CHAINS,
                extra_subject=ours.extra_subject if ours is not None else frozenset(),
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
    """The files of one pair, key first."""
    chain = b"".join(pem(certificate) for certificate in (verified.leaf, *verified.intermediates))
    item, name = one.item, one.item.spec.name
    if item.key_path is None:
        path = item.certificate_path
        data = kubeconfig.with_credentials(path.read_bytes(), chain, one.key_pem)
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
    prepared: Sequence[Prepared],
    answers: Mapping[str, Issued | BridgeError],
    expected: Mapping[str, verify.Expectation],
    store: Store,
    *,
    labels: Mapping[str, str],
    earlier: Sequence[Outcome],
    all_or_nothing: bool,
    record: audit.Record,
) -> Result:
    """
    Prove every answer, then install those that passed in one step.

    Args:
        prepared: What was asked for.
        answers: By certificate name.
        expected: By authority.
        store: Its lock is held.
        labels: The backend's label by authority.
        earlier: What failed before it could be asked for.
        all_or_nothing: Install nothing if anything failed.
        record: Is told; all of it is written before anything is replaced.

    Raises:
        AuditError: Nothing was replaced.
        InstallError: Nothing was replaced.
    """
    passed: list[tuple[Prepared, verify.Verified]] = []
    failed = list(earlier)
    for one in prepared:
        authority = one.authority
        try:
            passed.append((one, _proven(one, answers[one.item.spec.name], expected[authority])))
        except BridgeError as e:
            failed.append(outcome_of(one.item, e, labels[authority]))
    _record_proofs(record, passed, failed)
    if failed and all_or_nothing:
        held = [outcome_of(one.item, _HELD_BACK, labels[one.authority]) for one, _ in passed]
        _record_failed(record, held)
        return Result(outcomes=tuple(failed + held))
    if not passed:
        return Result(outcomes=tuple(failed))
    files = [replacement for one, verified in passed for replacement in replacements(one, verified)]
    _wait_until_valid([verified.leaf for _, verified in passed])
    record.write()  # nothing is installed that the record does not know
    try:
        backup_id = install(store, files, record.run_id, _about(passed))
    except InstallError as e:
        _record_failed(record, [outcome_of(one.item, e) for one, _ in passed])
        raise
    for one, verified in passed:
        record.add(audit.INSTALLED, one.item.spec.name, authority=one.authority, new=verified.leaf)
    done = [
        Outcome(
            name=one.item.spec.name,
            authority=one.authority,
            old=one.request.replaces,
            new=verified.leaf,
            backend=labels[one.authority],
        )
        for one, verified in passed
    ]
    return Result(outcomes=tuple(done + failed), backup_id=backup_id)


def _record_answers(
    record: audit.Record, prepared: Sequence[Prepared], answers: Mapping[str, Issued | BridgeError]
) -> None:
    for one in prepared:
        answer = answers[one.item.spec.name]
        if isinstance(answer, Issued):
            record.add(audit.ISSUED, one.item.spec.name, authority=one.authority, new=answer.leaf)


def _record_proofs(
    record: audit.Record, passed: Sequence[tuple[Prepared, verify.Verified]], failed: Sequence[Outcome]
) -> None:
    for one, verified in passed:
        record.add(audit.VERIFIED, one.item.spec.name, authority=one.authority, new=verified.leaf)
    _record_failed(record, failed)


def _record_failed(record: audit.Record, failed: Sequence[Outcome]) -> None:
    for outcome in failed:
        if outcome.error is not None:
            event = audit.FAILED if outcome.error is _HELD_BACK else audit.event_of(outcome.error)
            record.add(event, outcome.name, authority=outcome.authority, old=outcome.old, error=outcome.error)


class HeldBackError(BridgeError):
    """The answer was good, and was not installed because another one was not."""

    exit_code = Exit.REFUSED


_HELD_BACK = HeldBackError("not installed, since others failed and --all-or-nothing was given")


def _proven(one: Prepared, answer: Issued | BridgeError, expected: verify.Expectation) -> verify.Verified:
    if isinstance(answer, BridgeError):
        raise answer
    return verify.check(answer, one.request, expected)


def _wait_until_valid(leaves: Sequence[x509.Certificate]) -> None:
    """A CA's clock may be some seconds ahead (`verify.CLOCK_SKEW` at most): nothing is installed before it is valid."""
    begin = max(leaf.not_valid_before_utc for leaf in leaves).timestamp()
    time.sleep(max(0.0, min(begin - time.time(), verify.CLOCK_SKEW.total_seconds())))


def _about(passed: Sequence[tuple[Prepared, verify.Verified]]) -> dict[str, object]:
    """For the backup's manifest."""
    certificates = [
        {
            "name": one.item.spec.name,
            "old_serial": serial_hex(one.request.replaces) if one.request.replaces else None,
            "new_serial": serial_hex(verified.leaf),
        }
        for one, verified in passed
    ]
    return {"command": shlex.join(sys.argv), **audit.who(), "certificates": certificates}


# --- the whole -------------------------------------------------------------------------------------------------------


def run(
    settings: Settings,
    names: Collection[str],
    now: Callable[[], datetime],
    progress: Progress,
    *,
    all_or_nothing: bool = False,
    wait: timedelta = timedelta(),
) -> tuple[Result, Node, Selection]:
    """
    Renew, online, in one process; wait so long for another run to end.

    Raises:
        LockedError: Another run works on this node.
        SettingsError: Nothing was asked.
        InstallError: Nothing was replaced.
    """
    store = Store(settings.node.state_dir)
    store.prepare()
    record = audit.Record(store, settings.audit)
    with lock(store.lock, shlex.join(sys.argv), wait), record:
        recovery = recover(store)
        if recovery is not None:
            progress.note(str(recovery))
            record.add(audit.RECOVERED, result=str(recovery))
        node = inventory.read(settings.node.pki_dir, settings.node.kubeconfig_dir)
        selection = select(node, settings, names, now())
        if not selection.items:
            _record_failed(record, selection.failed)
            return Result(outcomes=selection.failed), node, selection
        result = _renew(selection, node, settings, store, now, progress, record, all_or_nothing=all_or_nothing)
        if result.backup_id is not None:
            backups.retire(store, settings.backups, node, now())
        return result, node, selection


def _renew(
    selection: Selection,
    node: Node,
    settings: Settings,
    store: Store,
    now: Callable[[], datetime],
    progress: Progress,
    record: audit.Record,
    *,
    all_or_nothing: bool,
) -> Result:
    expected, unproved = expectations(node, settings, selection.items, now())
    items = [item for item in selection.items if item.spec.authority.name in expected]
    with ThreadPoolExecutor(1 + len(AUTHORITIES)) as pool:
        making = pool.submit(prepare, items, settings)  # new keys take as long as all the rest
        backends = plugins.configured(settings, dict.fromkeys(item.spec.authority.name for item in selection.items))
        reached = _reach_all(pool, backends, items, expected, progress)
        made = making.result()
    prepared = [one for one in made if isinstance(one, Prepared)]
    earlier = [*selection.failed, *unproved, *(one for one in made if isinstance(one, Outcome))]
    try:
        if earlier and all_or_nothing:
            outcomes = (*earlier, *(outcome_of(one.item, _HELD_BACK) for one in prepared))
            _record_failed(record, outcomes)
            return Result(outcomes=outcomes)
        _record_asked(record, prepared, reached)
        answers = sign(prepared, reached, progress)
        _record_answers(record, prepared, answers)
    finally:
        for one in reached.values():
            if one.backend is not None:
                plugins.close(one.backend)
    return finish(
        prepared,
        answers,
        # as late as possible: signing may have taken a while
        {name: dataclasses.replace(one, now=now()) for name, one in expected.items()},
        store,
        labels={name: backend.label for name, backend in backends.items()},
        earlier=earlier,
        all_or_nothing=all_or_nothing,
        record=record,
    )


def _record_asked(record: audit.Record, prepared: Sequence[Prepared], reached: Mapping[str, Reached]) -> None:
    for one in prepared:
        ca, name = reached[one.authority], one.item.spec.name
        record.know(name, one.request, ca.label, ca.identity)
        if ca.backend is not None and name not in ca.wrong:
            record.add(audit.ASKED, name, authority=one.authority)


def _reach_all(
    pool: ThreadPoolExecutor,
    backends: Mapping[str, plugins.Configured],
    items: Sequence[Item],
    expected: Mapping[str, verify.Expectation],
    progress: Progress,
) -> dict[str, Reached]:
    def of(name: str) -> Reached:
        ours = [item for item in items if item.spec.authority.name == name]
        return reach(backends[name], ours, expected[name], progress)

    return dict(zip(expected, pool.map(of, expected), strict=True))
