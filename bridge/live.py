"""
After an installation: restart what runs on old certificates, prove that all runs on the new ones, or go back.

That this is owed is on disk before anything is installed, and stays there until it is proven: a run that was cut off, or
could not restart a component, leaves it to the next one, due or not.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from bridge import backups, prove, restart
from bridge.certificates import serial_hex
from bridge.errors import BridgeError, Exit
from bridge.files import sync_directory, write_atomically
from bridge.finish import version_of
from bridge.inventory import Node
from bridge.prove import Finding, Report
from bridge.restarting import NotNowError, Restarted, restart_all
from bridge.runs import Run
from bridge.selection import Outcome
from bridge.specs import SPECS, Component
from bridge.store import Store

log = logging.getLogger("ca-bridge")

_MOST_SHOWN = 3


class NotLiveError(BridgeError):
    """What was installed is not in use, or does not work."""

    exit_code: ClassVar[int] = Exit.NOT_LIVE
    hint = "`ca-bridge prove` shows each check; `ca-bridge rollback` puts the old files back"


class RolledBackError(BridgeError):
    """What was installed did not work, and the old files are back."""

    exit_code: ClassVar[int] = Exit.ROLLED_BACK
    hint = "the CA's certificates passed every check and can't work in this cluster: see the failed check"


class UnprovenError(BridgeError):
    """Whether it works could not be found out."""

    hint = "the next `ca-bridge renew` looks again; `ca-bridge prove` shows what could not be seen"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What came of it."""

    restarted: tuple[Restarted, ...] = ()
    proven: int | None = None  #: Checks that hold, of the last look; None: nobody looked.
    errors: tuple[BridgeError, ...] = ()
    rolled_back: RolledBackError | None = None  #: One of the errors.


@dataclass(frozen=True, slots=True, kw_only=True)
class _Owed:
    """What was installed, and what did not work before it, either."""

    run_id: str
    serials: Mapping[str, str]  #: By kubeadm's name.
    before: frozenset[tuple[str, str]] = frozenset()  #: Checks that failed, as in `_key`.


def owe(run: Run, outcomes: Sequence[Outcome]) -> None:
    """
    Before the installation of these, where components are restarted (`restart.method` is not "none").

    Raises:
        BridgeError: It can't be remembered; then nothing must be installed.
    """
    serials = {o.name: serial_hex(o.new) for o in outcomes if o.new is not None}
    earlier = _read(run.store)
    failing = {_key(f) for f in prove.look(run.read_node(), run.settings, run.now()).wrong if f.state != "stale"}
    _write(
        run.store,
        _Owed(
            run_id=run.record.run_id,
            serials={**(earlier.serials if earlier is not None else {}), **serials},
            before=frozenset(failing),
        ),
    )


def _key(finding: Finding) -> tuple[str, str]:
    return finding.certificate, finding.what


def settle(run: Run, node: Node) -> Settled:
    """
    Restart, prove, and go back if need be; what this or an earlier run has installed.

    Args:
        run: Its lock is held.
        node: As it is now.
    """
    owed = _read(run.store)
    if owed is None:
        return Settled()
    names = _installed(node, owed.serials)
    if not names or run.settings.restart.method == "none":
        _forget(run.store)  # the installation did not happen, or was replaced by another
        return Settled()
    restarted = _restart(run, node, names)
    if any(isinstance(one.error, NotNowError) for one in restarted):
        report = prove.look(run.read_node(), run.settings, run.now())
        if not any(f.certificate in names and f.state in ("refused", "no-answer") for f in report.wrong):
            return Settled(restarted=tuple(restarted), errors=tuple(one.error for one in restarted if one.error))
    else:
        report, more = _prove(run, names, {one.component for one in restarted})
        restarted = [*restarted, *more]
    return _judged(run, owed, names, restarted, report)


def _judged(run: Run, owed: _Owed, names: Collection[str], restarted: Sequence[Restarted], report: Report) -> Settled:
    """What is wrong with other certificates is none of this installation's doing, nor what was so before it."""
    found = [finding for finding in report.wrong if finding.certificate in names]
    wrong = [finding for finding in found if _key(finding) not in owed.before]
    failures = [one.error for one in restarted if one.error is not None]
    settled = Settled(restarted=tuple(restarted), proven=len(report.findings) - len(report.wrong))
    if not failures and not wrong:
        _forget(run.store)
        if not found:
            return settled
        text = f"installed, and as before the renewal this does not work: {_sentence(found)}"
        return dataclasses.replace(settled, errors=(NotLiveError(text, hint="`ca-bridge prove` shows each check"),))
    why = "; ".join([*map(str, failures), *([_sentence(wrong)] if wrong else [])])
    error: BridgeError
    if not failures and all(finding.state == "unknown" for finding in wrong):
        error = UnprovenError(f"installed, and not proven: {why}")
    elif run.settings.restart.on_failure == "keep":
        error = NotLiveError(f"installed, and not in use: {why}")
    else:
        error = _back(run, owed, names, {one.component for one in restarted}, why)
    rolled_back = error if isinstance(error, RolledBackError) else None
    return dataclasses.replace(settled, errors=(error,), rolled_back=rolled_back)


def _installed(node: Node, serials: Mapping[str, str]) -> list[str]:
    live = {i.spec.name: serial_hex(i.certificates[0]) for i in node.items if i.certificates}
    return [name for name, serial in serials.items() if live.get(name) == serial]


def _restart(run: Run, node: Node, names: Collection[str]) -> list[Restarted]:
    """First those that are known not to reload, as the settings say; if only what is needed, as proof shows it."""
    wanted = run.settings.restart.components
    specs = [SPECS[name] for name in names]
    components = restart.stale(specs, version_of(node, run.settings), wanted)
    if wanted.which == "needed" and components and node.manifests:
        stale = prove.look(node, run.settings, run.now()).stale
        components = [c for c in components if c in stale or c is Component.KUBELET]
    return _restarted(run, node, components)


def _restarted(run: Run, node: Node, components: Sequence[Component]) -> list[Restarted]:
    if not components:
        return []
    return restart_all(
        components, node, run.settings, run.store, tell=lambda text: log.info("%s", text), record=run.record
    )


def _prove(run: Run, names: Collection[str], done: Collection[Component]) -> tuple[Report, list[Restarted]]:
    """Look until all is well; what was trusted to reload and did not is restarted after all."""
    report = _looked(run, names)
    late = [f.component for f in report.wrong if f.state == "stale" and f.certificate in names and f.component]
    more = [component for component in restart.ORDER if component in late and component not in done]
    if not more or run.settings.restart.components.which == "listed":
        return report, []
    restarted = _restarted(run, run.read_node(), more)
    return _looked(run, names), restarted


def _looked(run: Run, names: Collection[str]) -> Report:
    return prove.within(
        run.read_node,
        run.settings,
        run.now,
        run.settings.restart.prove_for,
        counts=lambda finding: finding.certificate in names,
    )


def _sentence(findings: Sequence[Finding]) -> str:
    parts = [f"{f.certificate}: {f.what}: {f.state}: {f.detail}" for f in findings[:_MOST_SHOWN]]
    more = len(findings) - _MOST_SHOWN
    return "; ".join([*parts, *([f"and {more} more"] if more > 0 else [])])


def _back(run: Run, owed: _Owed, names: Collection[str], restarted: Collection[Component], why: str) -> BridgeError:
    """Put the old files back, and what was restarted back on them."""
    log.error("the new certificates do not work, so the old ones are put back: %s", why)
    try:
        done = _put_back(run, owed.run_id)
    except BridgeError as e:
        return NotLiveError(f"installed, and not in use: {why}; it was not rolled back: {e}")
    _forget(run.store)
    after = _on_the_old_set(run, names, restarted)
    return RolledBackError(f"rolled back to {done.backup.backup_id}, since {why}; {after}")


def _put_back(run: Run, run_id: str) -> backups.Rollback:
    backup = next((one for one in backups.read_all(run.store)[0] if one.run_id == run_id), None)
    if backup is None:
        raise BridgeError(f"wanted the backup of run {run_id}, found none")
    node, now = run.read_node(), run.now()
    expired = [o.name for o in backups.outcomes_of(backup, node) if o.new and o.new.not_valid_after_utc <= now]
    if expired:
        raise BridgeError(f"the old certificates have expired: {', '.join(expired)}")
    # all of it was in use a minute ago, whatever a new certificate would have to be
    return backups.put_back(
        backup, run.settings, run.store, run.record, node, now, lambda problem: not problem.is_damage
    )


def _on_the_old_set(run: Run, names: Collection[str], restarted: Collection[Component]) -> str:
    """Everything that had been restarted, and what took the new files up by itself and did not let go."""
    node = run.read_node()
    stale = prove.look(node, run.settings, run.now()).stale if node.manifests else []
    components = [c for c in restart.ORDER if c in restarted or c in stale]
    failures = []
    if components:
        done = restart_all(
            components,
            node,
            run.settings,
            run.store,
            tell=lambda text: log.info("%s", text),
            record=run.record,
            force=True,
        )
        failures = [str(one.error) for one in done if one.error is not None]
    report = _looked(run, names)
    wrong = [finding for finding in report.wrong if finding.certificate in names]
    if failures or wrong:
        text = "; ".join([*failures, *([_sentence(wrong)] if wrong else [])])
        return f"the old ones do not work, either: {text}"
    return f"everything runs on the old files again ({len(report.findings) - len(report.wrong)} checks hold)"


# --- what is owed ----------------------------------------------------------------------------------------------------


def _read(store: Store) -> _Owed | None:
    """A file that nobody can read says nothing."""
    try:
        document = json.loads(store.unproven.read_bytes())
        return _Owed(
            run_id=str(document["run"]),
            serials={str(name): str(serial) for name, serial in document["serials"].items()},
            before=frozenset((str(certificate), str(what)) for certificate, what in document["before"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        log.warning("%s: wanted what was installed and not proven, found %s", store.unproven, type(e).__name__)
        log.warning("%s", "`ca-bridge prove` shows whether all is in use", extra={"is_hint": True})
        _forget(store)
        return None


def _write(store: Store, owed: _Owed) -> None:
    document = {"run": owed.run_id, "serials": dict(owed.serials), "before": sorted(owed.before)}
    try:
        write_atomically(store.unproven, json.dumps(document, indent=1).encode() + b"\n")
    except OSError as e:
        raise BridgeError(
            f"{store.unproven}: wanted to remember what is to be proven, found: {e.strerror}; nothing was replaced",
            hint="make room, or mend the state directory",
        ) from e


def _forget(store: Store) -> None:
    store.unproven.unlink(missing_ok=True)
    sync_directory(store.directory)
