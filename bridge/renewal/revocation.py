"""Revokes superseded certificates, where the settings say so: `[renewal] revoke = "superseded"`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

from bridge.ca import CA, registry
from bridge.contract import Revocation
from bridge.errors import BackendUnavailableError, BridgeError, LocalFileError
from bridge.node.inventory import Node
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
    known = {one.certificate for one in earlier}
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
        left = [one for one in every if not one.is_outdated(node, run.now())]
        due = _proven([one for one in left if one.due <= run.now()], run, node)
        done, errors = _revoke_all(run, due, node)
        file.put(tuple(one for one in left if one not in done))
    except StateError as e:
        errors = [e]
    return errors


def _names(every: Iterable[Superseded]) -> str:
    return "; ".join(map(str, every))


def _proven(due: Sequence[Superseded], run: Run, node: Node) -> list[Superseded]:
    if not due:
        return []
    from bridge.control_plane import proof  # noqa: PLC0415 (40 ms; only where something is revoked)

    unproven, pairs = unproven_file(run.store).read(), pairs_file(run.store).read() or ()
    silent = {item.spec.name for item in node.items if item.pair is not None and not item.pair.prove}
    there = {item.spec.name for item in node.items if item.state == "present"}
    report = proof.look(node, run.settings, run.now())
    seen = {finding.certificate for finding in report.findings} - {finding.certificate for finding in report.wrong}
    waiting = {*(unproven.names if unproven is not None else ()), *(pair.name for pair in pairs)}
    proven = (there & (seen | silent)) - waiting
    if unseen := [one for one in due if one.name not in proven]:
        run.progress.note(f"renewal.revoke: not revoked, since the successor is not seen in use: {_names(unseen)}")
    return [one for one in due if one.name in proven]


def _revoke_all(run: Run, due: Sequence[Superseded], node: Node) -> tuple[list[Superseded], list[BridgeError]]:
    """Ask the CAs to revoke; return the certificates that need no further try, and the errors."""
    done: list[Superseded] = []
    errors: list[BridgeError] = []
    for authority in dict.fromkeys(one.authority_on(node) for one in due):
        ours = [one for one in due if one.authority_on(node) == authority]
        try:
            over, more = _revoke(run, authority, ours, node)
        except BridgeError as e:
            over, more = [], [_not_now(ours, e)]
        done += over
        errors += more
    for error in errors:
        run.record.add(audit.FAILED, error=error)
    return done, errors


def _not_now(ours: Sequence[Superseded], cause: BridgeError) -> RevocationError:
    hint = 'the next run tries again; `[renewal] revoke = "never"` ends that'
    return RevocationError(f"not revoked: {_names(ours)}: {cause}", hint=hint, exit_code=cause.exit_code)


def _revoke(
    run: Run, authority: str, ours: Sequence[Superseded], node: Node
) -> tuple[list[Superseded], list[BridgeError]]:
    configured = registry.configured(run.settings, [authority])[authority]
    done: list[Superseded] = []
    errors: list[BridgeError] = []
    with contextlib.closing(CA.of(configured)) as ca:
        if not ca.backend.can("revoke", "revoke_proven"):
            run.progress.note(f"renewal.revoke: {ca.label} can't revoke: {_names(ours)}")
            return list(ours), []
        for one in ours:
            try:
                if ca.backend.can("revoke_proven"):
                    ca.revoke_proven(_holders_proof(one, run, node))
                else:
                    ca.revoke(one.certificate)
            except BackendUnavailableError as e:
                errors.append(_not_now([one], e))
                continue
            except BridgeError as e:
                hint = "it is not tried again: another CA's, or one that this CA does not know, can be revoked by hand"
                text = f"not revoked: {one}: {ca.label}: {e}"
                errors.append(RevocationError(text, hint=hint, exit_code=e.exit_code))
            else:
                run.record.add(audit.REVOKED, one.name, authority=authority, old=one.certificate)
            done.append(one)
    return done, errors


def _holders_proof(one: Superseded, run: Run, node: Node) -> Revocation:
    """Prove that the successor's holder asks for the revocation (LocalFileError: the successor's key can't be used)."""
    from bridge.pki import node_proofs  # noqa: PLC0415 (15 ms; only where a door is asked)

    ours = run.settings.node
    [item] = [item for item in node.items if item.spec.name == one.name]
    who = {"name": one.name, "node": ours.node_name, "cluster": ours.cluster}
    try:
        key = prepare.live_key(item)
        return node_proofs.revocation(key, old=one.certificate, successor=item.certificates[0], **who)
    except prepare.NO_KEY as e:
        text = f"wanted the key of {one.name}, found one that can't be used: {type(e).__name__}"
        raise LocalFileError(text) from None
