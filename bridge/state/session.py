"""Begins each run that writes: takes the lock, recovers an interrupted run, and opens the audit log."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from bridge.errors import BridgeError
from bridge.node.inventory import Node
from bridge.node.reading import read_node
from bridge.pki.certificates import spki
from bridge.pki.expiry import minute
from bridge.settings.tables import Settings, for_next
from bridge.state import Store, audit, install, static_pods
from bridge.state.install import Recovery
from bridge.state.open_requests import OpenRequests
from bridge.system.console import Progress, log
from bridge.system.locks import lock
from bridge.system.paths import UnreadableError, read_ca_file
from bridge.system.state_file import OnDamage, StateError, StateFile, coded

if TYPE_CHECKING:
    from cryptography import x509

Now = Callable[[], datetime]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run: everything that its steps share."""

    settings: Settings
    store: Store  #: Its lock is held.
    requests: OpenRequests
    record: audit.Record
    progress: Progress
    now: Now

    def read_node(self, pair: str = "") -> Node:
        """Read the node's files now; of further pairs only `pair`, if it is given."""
        node = self.settings.node
        pairs = tuple(candidate for candidate in node.pairs if candidate.name == pair)
        return read_node(replace(node, pairs=pairs) if pair else node)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """The cluster that a state directory belongs to, by the real paths of its files."""

    pki_dir: str
    kubeconfig_dir: str


def tree_file(store: Store) -> StateFile[Tree]:
    """The file that names the state's cluster; a damaged one is rewritten."""
    return coded(Tree, store.tree, "which cluster's files the state is about", OnDamage.START_OVER)


def _tree(settings: Settings) -> Tree:
    node = settings.node
    return Tree(pki_dir=os.path.realpath(node.pki_dir), kubeconfig_dir=os.path.realpath(node.kubeconfig_dir))


def is_ours(settings: Settings) -> bool:
    """Whether the state is this cluster's; False: it has no cluster yet (BridgeError: it is another's, with keys to lose)."""
    store = Store(settings.node.state_dir)
    ours, theirs = _tree(settings), tree_file(store).read()
    if theirs not in (ours, None):
        raise BridgeError(
            f"{store.directory}: wanted the state of {ours.pki_dir} and {ours.kubeconfig_dir}, found that of "
            f"{theirs.pki_dir} and {theirs.kubeconfig_dir}",
            hint="give each cluster on this host its own node.state_dir; if these files have moved, or the first run "
            f"had a wrong path, and only then, remove {store.tree}",
        )
    return theirs is not None


def claim(settings: Settings) -> None:
    """Assign a state directory without a cluster to this cluster."""
    with contextlib.suppress(StateError):  # on a full disk other steps fail loudly; the next run writes it
        tree_file(Store(settings.node.state_dir)).put(_tree(settings))


def _has_node(settings: Settings) -> bool:
    """Whether both directories have files of a node: one path may be mistyped."""
    node, pki_dir = read_node(settings.node), settings.node.pki_dir
    cas = [authority.state for authority in node.authorities if authority.path.is_relative_to(pki_dir)]
    kubeconfigs = [item.state for item in node.items if item.spec.kubeconfig]  # an etcd host needs none
    return {"missing"} not in (set(cas), set(kubeconfigs))


@contextlib.contextmanager
def recording(settings: Settings, wait: timedelta) -> Iterator[tuple[Store, audit.Record]]:
    """Hold the state directory's lock, with no other check; added lines are in the audit log at the end."""
    store = Store(settings.node.state_dir)
    store.prepare()
    with lock(store.lock, shlex.join(sys.argv), wait), audit.Record(store, settings.audit) as record:
        yield store, record


@contextlib.contextmanager
def alone(
    settings: Settings,
    wait: timedelta,
    tell: Callable[[Recovery | str], None] = lambda recovery: log.warning("%s", recovery),
) -> Iterator[tuple[Store, audit.Record]]:
    """Hold the state directory's lock, after finishing or undoing an interrupted installation or restart."""
    with recording(settings, wait) as (store, record):
        is_claimed = is_ours(settings)
        # restore a missing manifest first: a problem with the files must not keep its component down
        recoveries = [
            recovery for step in (static_pods.recover, install.recover) if (recovery := step(store)) is not None
        ]
        for recovery in recoveries:
            tell(recovery)
            record.add(audit.RECOVERED, result=str(recovery))
        if recoveries:
            _forget_installed(settings, store, tell)
        if not is_claimed and _has_node(settings):
            claim(settings)
        yield store, record


def _forget_installed(settings: Settings, store: Store, tell: Callable[[Recovery | str], None]) -> None:
    """Forget answers that a killed run installed, or they would be installed again after a rollback."""
    node = read_node(settings.node)
    try:
        requests = OpenRequests(store)
        for request in requests:
            if request.answer is not None and request.answer.leaf == node.live(request.name):
                requests.drop(request.name)
        requests.save()
    except StateError as e:
        tell(str(e))


@contextlib.contextmanager
def begun(settings: Settings, now: Now, progress: Progress, wait: timedelta) -> Iterator[tuple[Run, Node]]:
    """Begin like `alone`, for a run with requests; drop requests whose certificates were replaced meanwhile."""
    with alone(settings, wait, lambda recovery: progress.note(str(recovery))) as (store, record):
        run = Run(
            settings=settings, store=store, requests=OpenRequests(store), record=record, progress=progress, now=now
        )
        node = run.read_node()
        run = replace(run, settings=in_force(settings, node.bundles))
        _forget_outdated(run, node)
        yield run, node


def in_force(settings: Settings, bundles: Mapping[str, Sequence[x509.Certificate]]) -> Settings:
    """The settings of the CAs that sign now: a next CA's where `bundles`, the CA files' content, has it first."""
    anchors = {name: Path(keys.next["anchor"]) for name, keys in settings.authorities.items() if keys.next}
    names = [name for name, anchor in anchors.items() if _signs(anchor, bundles.get(name, ()))]
    return for_next(settings, names) if names else settings


def not_yet_signing(
    settings: Settings, bundles: Mapping[str, Sequence[x509.Certificate]]
) -> dict[str, tuple[x509.Certificate, ...]]:
    """By authority, the next CA if the settings name only its backend, and the CA file still has the former CA first."""
    anchors: dict[str, tuple[x509.Certificate, ...]] = {}
    for name, keys in settings.authorities.items():
        if not keys.names_next_alone or not bundles.get(name):
            continue
        with contextlib.suppress(UnreadableError):  # a run of `rotate-ca` reports it
            next_ca = read_ca_file(Path(keys.next["anchor"]))
            if spki(next_ca[0].public_key()) != spki(bundles[name][0].public_key()):
                anchors[name] = next_ca[:1]
    return anchors


def _signs(anchor: Path, bundle: Sequence[x509.Certificate]) -> bool:
    try:
        return bool(bundle) and bundle[0] == read_ca_file(anchor)[0]
    except UnreadableError:  # then the old CA signs, and verification rejects its answer
        return False


def _forget_outdated(run: Run, node: Node) -> None:
    """Give up requests whose live certificate was replaced; a certificate that can't be read now may return."""
    for request in run.requests:
        certificate = node.live(request.name)
        if certificate is None or request.request.replaces in (certificate, None):
            continue
        if request.is_waiting:
            give_up(run, request.name, "its certificate was replaced meanwhile")
        run.requests.drop(request.name)
    run.requests.save()


def give_up(run: Run, name: str, why: str) -> None:
    """Drop a pending request and report it; safe on disk after `requests.save()`."""
    made = run.requests.drop(name)
    if made is not None:
        text = f"forgot the request of {minute(made.created)}: {why}"
        run.progress.note(f"{name}: {text}")
        run.record.describe(name, made.request, made.backend, None)
        run.record.add(audit.CANCELLED, name, authority=made.request.spec.authority.name, result=text)
