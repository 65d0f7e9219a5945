"""
After an installation: restart what runs on old certificates, prove that all runs on the new ones, or go back.

That this is owed is on disk before anything is installed, and stays there until it is proven: a run that was cut off, or
could not restart a component, leaves it to the next one, due or not. So is that the old files are coming back, until
everything that had been restarted runs on them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence

from bridge.control_plane import proof, restart_plan
from bridge.control_plane.proof import ProofFinding, ProofReport
from bridge.control_plane.restarts import ImpossibleError, Restarted
from bridge.errors import BridgeError, PostponedError
from bridge.node.inventory import Node
from bridge.pki.certificates import serial_hex
from bridge.renewal.ruling import Meaning, Ruling, meaning, rule
from bridge.renewal.settled import NotLiveError, Settled, UnprovenError, errors_of, is_stopped, settled
from bridge.renewal.taking_effect import FAILED, look, restart, sentence
from bridge.renewal.way_back import go_back
from bridge.settings.tables import Components
from bridge.specs import SPECS, Component
from bridge.state.obligations import Owed, Unproven, unproven_file
from bridge.state.outcome import Outcome
from bridge.state.session import Run
from bridge.system.state_file import StateError

log = logging.getLogger("ca-bridge")


def owe(run: Run, outcomes: Sequence[Outcome]) -> None:
    """
    Write down, before the installation, that these are to be proven, unless `restart.method` is "none".

    What an earlier run has installed and nobody has proven is no reason to forget what was in use before that; nor is
    what is still to be restarted forgotten.

    Raises:
        BridgeError: It can't be remembered; then nothing must be installed.
    """
    node, owed = run.read_node(), unproven_file(run.store).read()
    earlier = {one.name: one for one in owed.live_on(node).certificates} if owed is not None else {}
    failed = [f for f in proof.look(node, run.settings, run.now()).wrong if f.state in FAILED]
    run_id = run.record.run_id
    for name, serial in ((o.name, serial_hex(o.new)) for o in outcomes if o.new is not None):
        before = frozenset(f.what for f in failed if f.certificate == name)
        one = earlier.pop(name, Unproven(name=name, runs={}, backup_of=run_id, before=before))
        earlier[name] = dataclasses.replace(one, runs={**one.runs, serial: run_id})
    to_restart = owed.to_restart if owed is not None else ()
    unproven_file(run.store).put(Owed(certificates=tuple(earlier.values()), to_restart=to_restart))


def settle(run: Run, node: Node) -> Settled:
    """
    Restart, prove, and go back if need be; what this or earlier runs have installed.

    Args:
        run: Its lock is held.
        node: As it is now.
    """
    try:
        owed = unproven_file(run.store).read()
    except StateError as e:
        return Settled(errors=(e,), may_go_on=False)
    return _settle_owed(run, node, owed) if owed is not None else Settled()


def _settle_owed(run: Run, node: Node, owed: Owed) -> Settled:
    if run.settings.restart.method == "none":
        return _left_to_people(run, node, owed)
    if odd := owed.unreadable_on(node):
        troubles = "; ".join(f"{item.spec.name}: {item.trouble}" for item in odd)
        return settled(run, owed, [UnprovenError(f"installed, and not proven: {troubles}")])
    if owed.going_back:
        return go_back(run, owed)
    owed = owed.live_on(node)
    if not owed.certificates and not owed.to_restart:
        unproven_file(run.store).remove()
        return Settled()
    return _prove(run, node, owed)


def _left_to_people(run: Run, node: Node, owed: Owed) -> Settled:
    """The settings are others now: what was still to be done is said once."""
    unproven_file(run.store).remove()
    live = owed.live_on(node)
    reloads = restart_plan.reloading(node, run.settings.node.kubernetes_version)
    users = restart_plan.stale([SPECS[name] for name in live.names], reloads, Components("needed"))
    components = [c for c in restart_plan.ORDER if c in users or c in owed.to_restart]
    if not components and not (owed.going_back and live.certificates):
        return Settled()
    names = ", ".join(component.value for component in components) or "nothing"
    text = f'installed by an earlier run, and with restart.method = "none" not proven; to be restarted: {names}'
    if owed.going_back and live.certificates:
        text = f"{text}; and it was to go back, since {owed.going_back}"
    manifests = run.settings.node.kubeconfig_dir / "manifests"
    hint = "; ".join(restart_plan.how(component, manifests) for component in components) or NotLiveError.hint
    return settled(run, owed, [NotLiveError(text, hint=hint)])


def _prove(run: Run, node: Node, owed: Owed) -> Settled:
    restarted = restart(run, node, owed)
    report: ProofReport | None = None
    if not is_stopped(restarted):
        report, more = look(run, owed, restarted)
        restarted += more
    if report is None or is_stopped(restarted):
        return settled(run, owed, errors_of(restarted), restarted)
    return _judged(run, owed, restarted, report)


def _judged(run: Run, owed: Owed, restarted: Sequence[Restarted], report: ProofReport) -> Settled:
    """Judge an installation by its own certificates: not by what is wrong with others, or was so before it."""
    postponed = {one.component: one.error for one in restarted if isinstance(one.error, PostponedError)}
    impossible = _impossible(owed, restarted, report)
    failures = [e for e in errors_of(restarted) if not isinstance(e, PostponedError | ImpossibleError)]
    seen = _meanings(run, owed, postponed, impossible, report)
    ruling = rule(seen.keys(), postponed=bool(postponed), failed=bool(failures), impossible=bool(impossible))
    proven = len(report.findings) - len(report.wrong)
    if ruling is Ruling.FAILED:
        decisive = [f for m in (Meaning.BROKEN, Meaning.NOT_IN_USE, Meaning.UNSEEN) for f in seen.get(m, [])]
        why = "; ".join([*map(str, failures), *([sentence(decisive)] if decisive else [])])
        return _failed(run, owed, restarted, proven, why)
    if ruling is Ruling.PROVEN:
        unproven_file(run.store).remove()
    said = [*postponed.values()] if ruling is Ruling.POSTPONED else _said_of(ruling, seen, [*impossible.values()])
    return settled(run, owed, said, restarted, proven)


def _impossible(
    owed: Owed, restarted: Sequence[Restarted], report: ProofReport
) -> dict[Component | None, ImpossibleError]:
    """Components that nobody can restart from here, unless they are seen to have been restarted by hand."""
    states: dict[Component | None, set[str]] = {}
    for finding in report.findings:
        if finding.certificate in owed.names:
            states.setdefault(finding.component, set()).add(finding.state)
    return {
        one.component: one.error
        for one in restarted
        if isinstance(one.error, ImpossibleError)
        and not states.get(one.component, {"unknown"}) <= {"current", "next-connection"}
    }


def _meanings(
    run: Run,
    owed: Owed,
    postponed: Collection[Component],
    impossible: Collection[Component | None],
    report: ProofReport,
) -> dict[Meaning, list[ProofFinding]]:
    """All that is wrong with our certificates, by what it says of the installation."""
    listed = run.settings.restart.components.listed
    seen: dict[Meaning, list[ProofFinding]] = {}
    for finding in report.wrong:
        found = meaning(
            finding.state,
            postponed=finding.component in postponed,
            ours=(not listed or finding.component in listed) and finding.component not in impossible,
            new=owed.is_new(finding.certificate, finding.what),
        )
        if found is not None and finding.certificate in owed.names:
            seen.setdefault(found, []).append(finding)
    return seen


def _said_of(
    ruling: Ruling, seen: Mapping[Meaning, Sequence[ProofFinding]], impossible: Sequence[ImpossibleError]
) -> list[BridgeError]:
    """Errors that tell what stays, and what is left to do."""
    if ruling is Ruling.UNPROVEN:
        return [UnprovenError(f"installed, and not proven: {sentence(seen[Meaning.UNSEEN])}")]
    if ruling is Ruling.LEFT and impossible:
        return [NotLiveError(f"installed, and still to be restarted: {e}", hint=e.hint) for e in impossible]
    if ruling is Ruling.LEFT:
        text = f"installed, and not in use by what restart.components does not list: {sentence(seen[Meaning.LEFT])}"
        return [NotLiveError(text, hint="restart it (`ca-bridge restart NAME`), or list it")]
    if as_before := seen.get(Meaning.AS_BEFORE):
        text = f"installed, and as before the renewal this does not work: {sentence(as_before)}"
        return [NotLiveError(text, hint="`ca-bridge prove` shows each check")]
    return []


def _failed(run: Run, owed: Owed, restarted: Sequence[Restarted], proven: int, why: str) -> Settled:
    if run.settings.restart.on_failure == "keep":
        return settled(run, owed, [NotLiveError(f"installed, and not in use: {why}")], restarted, proven)
    log.error("the new certificates do not work, so the old ones are put back: %s", why)
    back = go_back(run, dataclasses.replace(owed, going_back=why))
    return dataclasses.replace(back, restarted=tuple(restarted), proven=proven)
