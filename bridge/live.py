"""
After an installation: restart what runs on old certificates, prove that all runs on the new ones, or go back.

That this is owed is on disk before anything is installed, and stays there until it is proven: a run that was cut off, or
could not restart a component, leaves it to the next one, due or not. So is that the old files are coming back, until
everything that had been restarted runs on them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from bridge import backups, prove, restart
from bridge.certificates import serial_hex
from bridge.errors import BridgeError, Exit, PostponedError
from bridge.files import sync_directory, write_atomically
from bridge.finish import version_of
from bridge.hooks import Occasion
from bridge.inventory import Node
from bridge.prove import Finding, Report
from bridge.restarting import Restarted, restart_all
from bridge.runs import Run
from bridge.selection import Outcome
from bridge.specs import SPECS, Component
from bridge.static_pods import StoppedError
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
    about: Mapping[str, Occasion] = dataclasses.field(default_factory=dict)  #: For hooks; by the run that installed.


@dataclass(frozen=True, slots=True, kw_only=True)
class _Installation:
    """What one run has installed, and what did not work before it, either."""

    run_id: str
    serials: Mapping[str, str]  #: By kubeadm's name.
    before: frozenset[tuple[str, str]] = frozenset()  #: Checks that failed, as in `_key`.

    def live_on(self, node: Node) -> _Installation:
        """Only what is still there: the rest was not installed, or was replaced by another one."""
        live = {i.spec.name: serial_hex(i.certificates[0]) for i in node.items if i.certificates}
        serials = {name: serial for name, serial in self.serials.items() if live.get(name) == serial}
        return dataclasses.replace(self, serials=serials)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Owed:
    """What is not proven."""

    installations: tuple[_Installation, ...]  #: The oldest first.
    going_back: str = ""  #: Why all of it goes back; empty: it does not.
    touched: tuple[Component, ...] = ()  #: Restarted on what goes back.

    @property
    def names(self) -> list[str]:
        """Of all certificates, each once."""
        return list(dict.fromkeys(name for one in self.installations for name in one.serials))

    def is_new(self, finding: Finding) -> bool:
        """Whether it worked before the installation that it is about."""
        return not any(finding.certificate in one.serials and _key(finding) in one.before for one in self.installations)


def owe(run: Run, outcomes: Sequence[Outcome]) -> None:
    """
    Before the installation of these, where components are restarted (`restart.method` is not "none").

    Raises:
        BridgeError: It can't be remembered; then nothing must be installed.
    """
    node, earlier = run.read_node(), _read(run.store)
    owed = tuple(one.live_on(node) for one in earlier.installations) if earlier is not None else ()
    unproven = {name for one in owed for name in one.serials}  # that it does not work may be its fault
    found = prove.look(node, run.settings, run.now()).wrong
    ours = _Installation(
        run_id=run.record.run_id,
        serials={o.name: serial_hex(o.new) for o in outcomes if o.new is not None},
        before=frozenset(_key(f) for f in found if f.state in _FAILED and f.certificate not in unproven),
    )
    _write(run.store, _Owed(installations=(*owed, ours)))


_FAILED = ("refused", "no-answer")


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
    if run.settings.restart.method == "none":
        _forget(run.store)
        return Settled()
    if owed.going_back:
        return _go_back(run, owed)
    live = tuple(one for each in owed.installations if (one := each.live_on(node)).serials)
    if not live:
        _forget(run.store)
        return Settled()
    owed = _Owed(installations=live)
    restarted = _restart(run, node, owed.names)
    if any(isinstance(one.error, StoppedError) for one in restarted):  # it may still be starting
        return _settled(run, owed, restarted, None, _errors(restarted))
    report, more = _proven(run, owed, restarted)
    return _judged(run, owed, [*restarted, *more], report)


def _settled(
    run: Run, owed: _Owed, restarted: Sequence[Restarted], proven: int | None, errors: Sequence[BridgeError]
) -> Settled:
    rolled_back = next((error for error in errors if isinstance(error, RolledBackError)), None)
    return Settled(
        restarted=tuple(restarted),
        proven=proven,
        errors=tuple(errors),
        rolled_back=rolled_back,
        about=dict(_occasions(run, owed, errors, is_back=rolled_back is not None)),
    )


def _judged(run: Run, owed: _Owed, restarted: Sequence[Restarted], report: Report) -> Settled:
    """What is wrong with other certificates is none of this installation's doing, nor what was so before it."""
    postponed = {one.component: one.error for one in restarted if isinstance(one.error, PostponedError)}
    failures = [error for error in _errors(restarted) if not isinstance(error, PostponedError)]
    found = [f for f in report.wrong if f.certificate in owed.names]
    wrong = [f for f in found if owed.is_new(f) and not (f.state == "stale" and f.component in postponed)]
    proven = len(report.findings) - len(report.wrong)
    if postponed and not failures and not any(f.state in _FAILED for f in wrong):
        return _settled(run, owed, restarted, proven, [*postponed.values()])
    if not failures and not wrong:
        _forget(run.store)
        text = f"installed, and as before the renewal this does not work: {_sentence(found)}"
        errors = [NotLiveError(text, hint="`ca-bridge prove` shows each check")] if found else []
        return _settled(run, owed, restarted, proven, errors)
    why = "; ".join([*map(str, failures), *([_sentence(wrong)] if wrong else [])])
    if not failures and all(finding.state == "unknown" for finding in wrong):
        return _settled(run, owed, restarted, proven, [UnprovenError(f"installed, and not proven: {why}")])
    if run.settings.restart.on_failure == "keep":
        return _settled(run, owed, restarted, proven, [NotLiveError(f"installed, and not in use: {why}")])
    log.error("the new certificates do not work, so the old ones are put back: %s", why)
    back = _going_back(owed, {finding.certificate for finding in wrong}, why, restarted)
    return dataclasses.replace(_go_back(run, back), restarted=tuple(restarted), proven=proven)


def _errors(restarted: Sequence[Restarted]) -> list[BridgeError]:
    return [one.error for one in restarted if one.error is not None]


# --- restart and proof -----------------------------------------------------------------------------------------------


def _restart(run: Run, node: Node, names: Collection[str]) -> list[Restarted]:
    """First those that are known not to reload, as the settings say; if only what is needed, as proof shows it."""
    wanted = run.settings.restart.components
    specs = [SPECS[name] for name in names]
    components = restart.stale(specs, version_of(node, run.settings), wanted)
    if wanted.which == "needed" and components and node.manifests:
        stale = prove.look(node, run.settings, run.now()).stale
        components = [c for c in components if c in stale or c is Component.KUBELET]
    return _restarted(run, node, components)


def _restarted(run: Run, node: Node, components: Sequence[Component], *, going_back: bool = False) -> list[Restarted]:
    if not components:
        return []
    return restart_all(
        components,
        node,
        run.settings,
        run.store,
        tell=lambda text: log.info("%s", text),
        record=run.record,
        going_back=going_back,
    )


def _proven(run: Run, owed: _Owed, restarted: Sequence[Restarted]) -> tuple[Report, list[Restarted]]:
    """
    Look until all is well; what was trusted to reload and did not is restarted after all.

    What could not be restarted now is on its old certificate, and not waited for.
    """
    names, done = owed.names, {one.component for one in restarted}
    if any(isinstance(one.error, PostponedError) for one in restarted):
        return _looked(run, lambda f: f.certificate in names and f.state in _FAILED and owed.is_new(f)), []
    report = _looked(run, lambda f: f.certificate in names)
    late = [f.component for f in report.wrong if f.state == "stale" and f.certificate in names and f.component]
    more = [component for component in restart.ORDER if component in late and component not in done]
    if not more or run.settings.restart.components.which == "listed":
        return report, []
    again = _restarted(run, run.read_node(), more)
    return _looked(run, lambda f: f.certificate in names), again


def _looked(run: Run, counts: Callable[[Finding], bool]) -> Report:
    return prove.within(run.read_node, run.settings, run.now, run.settings.restart.prove_for, counts=counts)


def _sentence(findings: Sequence[Finding]) -> str:
    parts = [f"{f.certificate}: {f.what}: {f.state}: {f.detail}" for f in findings[:_MOST_SHOWN]]
    more = len(findings) - _MOST_SHOWN
    return "; ".join([*parts, *([f"and {more} more"] if more > 0 else [])])


# --- the way back ----------------------------------------------------------------------------------------------------


def _going_back(owed: _Owed, wrong: Collection[str], why: str, restarted: Sequence[Restarted]) -> _Owed:
    """The first installation with something wrong, and what came after it; all, if a restart alone tells."""
    guilty = [number for number, one in enumerate(owed.installations) if wrong & one.serials.keys()]
    return _Owed(
        installations=owed.installations[min(guilty, default=0) :],
        going_back=why,
        touched=tuple(one.component for one in restarted if one.touched),
    )


def _go_back(run: Run, owed: _Owed) -> Settled:
    """Put the old files back, and what was restarted back on them; or go on with it where a run was cut off."""
    try:
        _write(run.store, owed)
        done = list(_put_back(run, owed))
    except BridgeError as e:
        with contextlib.suppress(BridgeError):  # then the next run tries this again, which does no harm
            _write(run.store, dataclasses.replace(owed, going_back="", touched=()))
        error = NotLiveError(f"installed, and not in use: {owed.going_back}; it was not rolled back: {e}")
        return _settled(run, owed, (), None, [error])
    restarted = _restart_back(run, owed)
    left = tuple(one.component for one in restarted if isinstance(one.error, PostponedError))
    if left:
        _write(run.store, dataclasses.replace(owed, touched=left))
        after = f"the next run goes on: {'; '.join(map(str, _errors(restarted)))}"
    else:
        _forget(run.store)
        after = _on_the_old_set(run, owed, restarted)
    where = f" to {', '.join(one.backup.backup_id for one in done)}" if done else ""
    return _settled(
        run, owed, restarted, None, [RolledBackError(f"rolled back{where}, since {owed.going_back}; {after}")]
    )


def _put_back(run: Run, owed: _Owed) -> Iterator[backups.Rollback]:
    """
    The newest first; what is back already stays as it is.

    Raises:
        BridgeError: It can't be put back.
    """
    for one in reversed(owed.installations):
        node, now = run.read_node(), run.now()
        if not one.live_on(node).serials:
            continue
        backup = _backup_of(run.store, one.run_id)
        if backup is None:
            raise BridgeError(f"wanted the backup of run {one.run_id}, found none")
        expired = [o.name for o in backups.outcomes_of(backup, node) if o.new and o.new.not_valid_after_utc <= now]
        if expired:
            raise BridgeError(f"the old certificates have expired: {', '.join(expired)}")
        # all of it was in use a minute ago, whatever a new certificate would have to be
        yield backups.put_back(
            backup, run.settings, run.store, run.record, node, now, lambda problem: not problem.is_damage
        )


def _backup_of(store: Store, run_id: str) -> backups.Backup | None:
    return next((one for one in backups.read_all(store)[0] if one.run_id == run_id), None)


def _restart_back(run: Run, owed: _Owed) -> list[Restarted]:
    """Everything that had been restarted, and what took the new files up by itself and did not let go."""
    node = run.read_node()
    stale = prove.look(node, run.settings, run.now()).stale if node.manifests else []
    components = [c for c in restart.ORDER if c in owed.touched or c in stale]
    return _restarted(run, node, components, going_back=True)


def _on_the_old_set(run: Run, owed: _Owed, restarted: Sequence[Restarted]) -> str:
    report = _looked(run, lambda f: f.certificate in owed.names)
    wrong = [finding for finding in report.wrong if finding.certificate in owed.names]
    failures = list(map(str, _errors(restarted)))
    if failures or wrong:
        text = "; ".join([*failures, *([_sentence(wrong)] if wrong else [])])
        return f"the old ones do not work, either: {text}"
    return f"everything runs on the old files again ({len(report.findings) - len(report.wrong)} checks hold)"


# --- what hooks are told ---------------------------------------------------------------------------------------------


def _occasions(
    run: Run, owed: _Owed, errors: Sequence[BridgeError], *, is_back: bool
) -> Iterator[tuple[str, Occasion]]:
    items = {item.spec.name: item for item in run.read_node().items}
    for one in owed.installations:
        backup = _backup_of(run.store, one.run_id)
        serials = {} if is_back else dict(one.serials)
        olds = {entry["name"]: entry["old_serial"] for entry in backup.certificates} if backup is not None else {}
        paths = [p for name in serials for p in (items[name].certificate_path, items[name].key_path) if p is not None]
        yield (
            one.run_id,
            Occasion(
                names=tuple(one.serials),
                old_serials={name: olds[name] for name in serials if olds.get(name)},
                new_serials=serials,
                files=tuple(map(str, paths)),
                backup_id=backup.backup_id if backup is not None else None,
                exit_code=Exit.worst([error.exit_code for error in errors]),
                errors=tuple(map(str, errors)),
            ),
        )


# --- what is owed ----------------------------------------------------------------------------------------------------


def _read(store: Store) -> _Owed | None:
    """A file that nobody can read says nothing."""
    try:
        document = json.loads(store.unproven.read_bytes())
        return _Owed(
            installations=tuple(map(_installation, document["installations"])),
            going_back=str(document["going_back"]),
            touched=tuple(map(Component, document["touched"])),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        log.warning("%s: wanted what was installed and not proven, found %s", store.unproven, type(e).__name__)
        log.warning("%s", "`ca-bridge prove` shows whether all is in use", extra={"is_hint": True})
        _forget(store)
        return None


def _installation(entry: Mapping[str, Any]) -> _Installation:
    return _Installation(
        run_id=str(entry["run"]),
        serials={str(name): str(serial) for name, serial in entry["serials"].items()},
        before=frozenset((str(certificate), str(what)) for certificate, what in entry["before"]),
    )


def _write(store: Store, owed: _Owed) -> None:
    document = {
        "installations": [
            {"run": one.run_id, "serials": dict(one.serials), "before": sorted(one.before)}
            for one in owed.installations
        ],
        "going_back": owed.going_back,
        "touched": [component.value for component in owed.touched],
    }
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
