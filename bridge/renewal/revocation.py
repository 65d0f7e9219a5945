"""Revokes superseded certificates, where the settings say so: `[renewal] revoke = "superseded"`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

from bridge.ca import CA, registry
from bridge.contract import Revocation
from bridge.control_plane import proof
from bridge.errors import BackendUnavailableError, BridgeError, LocalFileError
from bridge.node.inventory import Node
from bridge.pki import node_proofs
from bridge.renewal import prepare
from bridge.state import Outcome, audit
from bridge.state.obligations import Superseded, pairs_file, revocations_file, unproven_file
from bridge.state.session import Run
from bridge.system.state_file import StateError


class RevocationError(BridgeError):
    """A superseded certificate is not revoked; the exit code is the cause's. The new certificates are in use."""


def record_due(run: Run, done: Sequence[Outcome]) -> None:
    """Record the certificates to revoke once the new ones are installed and in use."""
    renewal = run.settings.renewal
    if renewal.revoke == "never":
        return
    earlier = revocations_file(run.store).read() or ()
    known = {superseded.certificate for superseded in earlier}
    able = _able(run, {outcome.authority for outcome in done})
    due = run.now() + renewal.revoke_after
    new = [
        Superseded(name=outcome.name, certificate=outcome.old, due=due)
        for outcome in done
        if outcome.old is not None and outcome.old not in known and outcome.authority in able
    ]
    if new:
        revocations_file(run.store).put((*earlier, *new))


def _able(run: Run, authorities: Iterable[str]) -> set[str]:
    """Return the authorities whose CA can revoke, and note the others."""
    have = [name for name in sorted(authorities) if name in run.settings.authorities]
    configured = registry.configured(run.settings, have)
    able = {name for name in have if configured[name].backend_type.can("revoke", "revoke_proven")}
    for name in sorted(set(authorities) - able):
        why = f"{configured[name].label} can't revoke" if name in configured else "no backend is configured for it"
        run.progress.note(f"renewal.revoke: superseded certificates of {name} stay valid until they end: {why}")
    return able


def finish(run: Run, node: Node) -> list[BridgeError]:
    """Revoke the certificates that are due, and keep the others for a later run."""
    try:
        file = revocations_file(run.store)
        every = file.read() or ()
        if not every:
            return []
        if run.settings.renewal.revoke == "never":
            run.progress.note(f'renewal.revoke is "never" now; these certificates are not revoked: {_names(every)}')
            file.remove()
            return []
        left = [superseded for superseded in every if not superseded.is_outdated(node, run.now())]
        due = _proven([superseded for superseded in left if superseded.due <= run.now()], run, node)
        done, errors = _revoke_all(run, due, node)
        file.put(tuple(superseded for superseded in left if superseded not in done))
    except StateError as e:
        errors = [e]
    return errors


def _names(every: Iterable[Superseded]) -> str:
    return "; ".join(map(str, every))


def _proven(due: Sequence[Superseded], run: Run, node: Node) -> list[Superseded]:
    if not due:
        return []
    unproven, pairs = unproven_file(run.store).read(), pairs_file(run.store).read() or ()
    silent = {item.spec.name for item in node.items if item.pair is not None and not item.pair.prove}
    there = {item.spec.name for item in node.items if item.state == "present"}
    report = proof.look(node, run.settings, run.now())
    seen = {finding.certificate for finding in report.findings} - {finding.certificate for finding in report.wrong}
    waiting = {*(unproven.names if unproven is not None else ()), *(pair.name for pair in pairs)}
    proven = (there & (seen | silent)) - waiting
    if unseen := [superseded for superseded in due if superseded.name not in proven]:
        run.progress.note(f"renewal.revoke: not revoked, since the successor is not seen in use: {_names(unseen)}")
    return [superseded for superseded in due if superseded.name in proven]


def _revoke_all(run: Run, due: Sequence[Superseded], node: Node) -> tuple[list[Superseded], list[BridgeError]]:
    """Ask the CAs to revoke; return the certificates that need no further try, and the errors."""
    done: list[Superseded] = []
    errors: list[BridgeError] = []
    for authority in dict.fromkeys(superseded.authority_on(node) for superseded in due):
        of_authority = [superseded for superseded in due if superseded.authority_on(node) == authority]
        try:
            over, more = _revoke(run, authority, of_authority, node)
        except BridgeError as e:
            over, more = [], [_not_now(of_authority, e)]
        done += over
        errors += more
    for error in errors:
        run.record.add(audit.FAILED, error=error)
    return done, errors


def _not_now(certificates: Sequence[Superseded], cause: BridgeError) -> RevocationError:
    hint = 'the next run tries again; `[renewal] revoke = "never"` ends that'
    return RevocationError(f"not revoked: {_names(certificates)}: {cause}", hint=hint, exit_code=cause.exit_code)


def _revoke(
    run: Run, authority: str, certificates: Sequence[Superseded], node: Node
) -> tuple[list[Superseded], list[BridgeError]]:
    configured = registry.configured(run.settings, [authority])[authority]
    done: list[Superseded] = []
    errors: list[BridgeError] = []
    with contextlib.closing(CA.of(configured)) as ca:
        if not ca.backend.can("revoke", "revoke_proven"):
            run.progress.note(f"renewal.revoke: {ca.label} can't revoke: {_names(certificates)}")
            return list(certificates), []
        for superseded in certificates:
            try:
                if ca.backend.can("revoke_proven"):
                    ca.revoke_proven(_holders_proof(superseded, run, node))
                else:
                    ca.revoke(superseded.certificate)
            except BackendUnavailableError as e:
                errors.append(_not_now([superseded], e))
                continue
            except BridgeError as e:
                hint = "it is not tried again: another CA's, or one that this CA does not know, can be revoked by hand"
                text = f"not revoked: {superseded}: {ca.label}: {e}"
                errors.append(RevocationError(text, hint=hint, exit_code=e.exit_code))
            else:
                run.record.add(audit.REVOKED, superseded.name, authority=authority, old=superseded.certificate)
            done.append(superseded)
    return done, errors


def _holders_proof(superseded: Superseded, run: Run, node: Node) -> Revocation:
    """Prove that the successor's holder asks for the revocation (LocalFileError: the successor's key can't be used)."""
    places = run.settings.node
    [item] = [item for item in node.items if item.spec.name == superseded.name]
    who = {"name": superseded.name, "node": places.node_name, "cluster": places.cluster}
    try:
        key = prepare.live_key(item)
        return node_proofs.revocation(key, old=superseded.certificate, successor=item.certificates[0], **who)
    except prepare.NO_KEY as e:
        text = f"wanted the key of {superseded.name}, found one that can't be used: {type(e).__name__}"
        raise LocalFileError(text) from None
