"""
Takes further pairs into use: their programs read them again, a handshake proves it, or the old pair comes back.

Each pair is judged alone: a fault of one pair rolls back no other pair, and no certificate of the control plane.
`bridge.renewal.activate` restarts and proves a component that reads a pair; this file has the pairs of other programs.
Each pair is recorded before its installation: after a kill the next run has the program read it once more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from bridge.control_plane import proof
from bridge.control_plane.proof import ProofFinding
from bridge.errors import BridgeError
from bridge.node import processes
from bridge.node.inventory import Item, Node
from bridge.node.manifests import pod_name
from bridge.renewal import in_use
from bridge.renewal.activate import RolledBackError, UnprovenError, backup_of
from bridge.renewal.in_use import NotLiveError
from bridge.settings import command_words
from bridge.settings.tables import Settings
from bridge.state import Outcome, Store, audit, backups, static_pods
from bridge.state.obligations import NotProven, UnprovenPair, pairs_file, postponed_file, unproven_file
from bridge.state.session import Run
from bridge.state.static_pods import Pod
from bridge.system.console import doing, log
from bridge.system.run_command import command_failure
from bridge.system.state_file import StateError
from bridge.system.waiting import wait_until

_PAUSE_SECONDS = 0.2


@dataclass(slots=True, kw_only=True)
class Finished:
    """The results of all pairs that were installed and not yet seen in use."""

    errors: list[BridgeError] = field(default_factory=list)
    back: dict[str, RolledBackError] = field(default_factory=dict)  #: By name, pairs whose old files are back.
    read: list[str] = field(default_factory=list)  #: Names of pairs that their programs have read again.
    proven: int = 0  #: Number of pairs seen in use.


def own(node: Node) -> dict[str, Item]:
    """Return the pairs that no component reads, and whose settings name a way to reload them or a server to check."""
    return {
        item.spec.name: item
        for item in node.items
        if item.pair is not None and item.spec.component is None and (item.pair.is_read_again or item.pair.prove)
    }


def _reloads(item: Item) -> bool:
    return item.pair is not None and item.pair.is_read_again


def record_due(run: Run, outcomes: Sequence[Outcome], *, by_hand: bool = False) -> Collection[str]:
    """Record, before the installation, which pairs must be seen in use; return the names of all `own` pairs."""
    items = own(run.read_node())
    file = pairs_file(run.store)
    earlier = {pair.name: pair for pair in file.read() or ()}
    for outcome in outcomes:
        name, pair = outcome.name, items[outcome.name].pair if outcome.name in items else None
        if outcome.new is None or pair is None or (by_hand and not pair.prove):
            continue
        before = earlier.pop(name, None)
        unproven = (
            before.unproven if before is not None and not before.unproven.going_back else NotProven(certificates=())
        )
        worked = before.worked if before is not None else _works(items[name], run.now())
        unproven = unproven.with_installed([outcome], run.record.run_id)
        earlier[name] = UnprovenPair(unproven=unproven, worked=worked, by_hand=by_hand)
    if earlier:
        file.put(tuple(earlier.values()))
    return items.keys()


def _works(item: Item, now: datetime) -> bool:
    """Whether the server shows the pair on disk; a pair without a server counts as working, a missing pair does not."""
    if item.state != "present":
        return False
    works = proof.of_pair(item, now)
    return works is None or works.state == "current"


def finish(run: Run) -> Finished:
    """Continue with each recorded pair, from the state on disk."""
    done = Finished()
    try:
        file = pairs_file(run.store)
        for pair in file.read() or ():
            _keep(run, pair, _finish_one(run, pair, done))
    except (StateError, static_pods.StoppedError) as e:  # the remaining records stay on disk
        done.errors.append(e)
    return done


def _keep(run: Run, pair: UnprovenPair, left: UnprovenPair | None) -> None:
    """Replace the record of one pair, or remove it (None); the records of other pairs stay."""
    file = pairs_file(run.store)
    others = tuple(other for other in file.read() or () if other.name != pair.name)
    file.put((*others, left) if left is not None else others)


def _finish_one(run: Run, pair: UnprovenPair, done: Finished) -> UnprovenPair | None:
    node = run.read_node(pair.name)
    item = own(node).get(pair.name)
    if item is None:
        where = f"[certificate.{pair.name}] is gone from the settings"
        run.progress.note(f"{pair.name}: {where}; whether it is in use was not seen")
        return None
    if item.state in ("broken", "unreadable"):
        done.errors.append(UnprovenError(f"installed, and not proven: {item.spec.name}: {item.trouble}"))
        return pair
    if pair.unproven.going_back:
        return _go_back(run, pair, item, done)
    if not pair.unproven.live_on(node).certificates:
        return None  # it was not installed, or was replaced meanwhile
    if pair.by_hand:
        return _left_to_people(run, pair, item, done)
    return _take_up(run, pair, item, done)


def _left_to_people(run: Run, pair: UnprovenPair, item: Item, done: Finished) -> UnprovenPair | None:
    finding = proof.of_pair(item, run.now())
    if finding is None or finding.state == "current":
        return None
    if pair.unproven.certificates[0].newest_run != run.record.run_id:
        text = f"{pair.name}: installed by an earlier run, and not seen in use: {finding.detail}"
        done.errors.append(NotLiveError(text, hint=how(item)))
    return pair


def _take_up(run: Run, pair: UnprovenPair, item: Item, done: Finished) -> UnprovenPair | None:
    why = None if pair.is_read else _have_read(run, item)
    if why is None:
        if _reloads(item) and not pair.is_read:
            done.read.append(pair.name)
            pair = dataclasses.replace(pair, is_read=True)
            _keep(run, pair, pair)  # a later run only looks
        finding = _until_current(run, item)
        if finding is None or finding.state == "current":
            done.proven += finding is not None
            return None
        if finding.state == "unknown":
            done.errors.append(UnprovenError(f"installed, and not proven: {pair.name}: {finding.detail}"))
            return pair
        why = f"{finding.state}: {finding.detail}"
    stays = _why_it_stays(run, pair, item)
    if stays:
        done.errors.append(NotLiveError(f"{pair.name}: installed, and not in use: {why}; {stays}", hint=how(item)))
        return pair
    log.error("%s: the new pair does not work, so the old one is put back: %s", pair.name, why)
    back = dataclasses.replace(pair, unproven=dataclasses.replace(pair.unproven, going_back=why))
    _keep(run, pair, back)
    return _go_back(run, back, item, done)


def _why_it_stays(run: Run, pair: UnprovenPair, item: Item) -> str:
    """Return why the old pair is not put back; empty: put it back."""
    if run.settings.restart.on_failure == "keep":
        return 'it stays, as restart.on_failure = "keep" says'
    if not _reloads(item):
        return "nothing says how its program reads it again"
    if not pair.worked:
        return "it did not work before, either, so that nothing was put back"
    return ""


def _have_read(run: Run, item: Item) -> str | None:
    pair = item.pair
    if pair is None or not pair.is_read_again:
        return None
    with doing(f"having {pair.name} read again"):
        if pair.static_pod is not None:
            failure = _restart(run, pair.static_pod)
        else:
            variables = {"CA_BRIDGE_CERTIFICATE": pair.name}
            failure = (
                command_failure(pair.name, command_words(pair.reload), variables, run.settings.restart.timeout) or None
            )
    run.record.add(audit.RESTARTED, pair.name, error=NotLiveError(failure) if failure else None)
    run.record.write_late()
    return failure


def _restart(run: Run, manifest: Path) -> str | None:
    """Restart a static pod; the container runtime shows when it has ended."""
    name = pod_name(manifest)
    if not name:
        return f"there is no manifest of a static pod in {manifest}"
    look = functools.partial(processes.instances_of_pod, name)
    try:
        look()
        pod = Pod(name=name, manifest=manifest, instances=look, trouble=lambda: None if look() else "no pod of it runs",
                  settle=processes.SANDBOX_SETTLES)  # fmt: skip
        static_pods.restart(pod, run.store, run.settings.restart.timeout)
    except (OSError, ValueError) as e:
        return f"can't see the static pod {name} end: {e}"
    except static_pods.StoppedError:
        raise
    except BridgeError as e:
        return str(e)
    return None


def _until_current(run: Run, item: Item) -> ProofFinding | None:
    """Look until the server shows the new pair, or the time is over; None: the settings name no server."""
    with doing(f"proving that {item.spec.name} is in use"):
        return wait_until(
            lambda: proof.of_pair(item, run.now()),
            lambda finding: finding is None or finding.state == "current",
            run.settings.restart.prove_for,
            pause_seconds=_PAUSE_SECONDS,
        )


# --- rollback --------------------------------------------------------------------------------------------------------


def _go_back(run: Run, pair: UnprovenPair, item: Item, done: Finished) -> UnprovenPair | None:
    """Put the old files back and have the program read them, or continue a rollback that was cut off."""
    node, why = run.read_node(), pair.unproven.going_back
    try:
        if pair.unproven.live_on(node).certificates:
            backup = backup_of(run, pair.unproven)
            if not any(file.was_there for file in backup.files):
                raise BridgeError("there was no pair before it")  # noqa: TRY301
            backups.put_back(run, backup, node, lambda one: not one.is_damage)
    except BridgeError as e:
        text = f"{pair.name}: installed, and not in use: {why}; it was not rolled back: {e}"
        done.errors.append(NotLiveError(text, hint=how(item)))
        return pair
    item = own(run.read_node()).get(pair.name, item)
    failure = _have_read(run, item)
    if failure is None and (finding := _until_current(run, item)) is not None and finding.state != "current":
        failure = finding.detail
    after = "the old pair is in use again" if failure is None else f"the old one does not work, either: {failure}"
    done.back[pair.name] = RolledBackError(f"{pair.name}: rolled back, since {why}; {after}")
    return None


def how(item: Item) -> str:
    """Tell an operator how the program takes the pair into use."""
    if item.pair is not None and item.pair.reload:
        return f"{item.spec.name}: run `{item.pair.reload}`"
    if item.pair is not None and item.pair.static_pod is not None:
        manifest = item.pair.static_pod
        return f"{item.spec.name}: move {manifest} out of its directory, wait until the pod is gone and 3 s more, move it back"
    return f"{item.spec.name}: have the program that uses {item.certificate_path} read it again"


def advice(node: Node, names: Sequence[str]) -> list[str]:
    """Return an instruction for each of these pairs whose program an operator has to make read it again."""
    return [how(item) for name, item in own(node).items() if name in names and _reloads(item)]


def late(settings: Settings, node: Node, now: datetime) -> list[ProofFinding]:
    """Find installed certificates not in use, for monitors and `doctor`; none if the state directory is unreadable."""
    store = Store(settings.node.state_dir)
    found: list[ProofFinding] = []
    for file in (unproven_file(store), postponed_file(store)):
        with contextlib.suppress(StateError):  # a run reports it
            unproven = file.look()
            found += in_use.not_in_use(in_use.look(unproven, node, settings, now)) if unproven is not None else []
    with contextlib.suppress(StateError):
        found += _late_pairs(pairs_file(store).look() or (), node, now)
    return list(dict.fromkeys(found))


def _late_pairs(unproven: Sequence[UnprovenPair], node: Node, now: datetime) -> Iterator[ProofFinding]:
    for one in unproven:
        item = own(node).get(one.name)
        if item is None or not one.unproven.live_on(node).certificates:
            continue
        unseen = ProofFinding(None, one.name, "is read", "unknown", "no server is named to look at")
        found = proof.of_pair(item, now) or unseen
        if found.state != "current":
            yield found
