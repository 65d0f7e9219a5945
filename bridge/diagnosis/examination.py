"""All checks of a node, of a CA desk, or of a machine that is neither."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from cryptography import x509

from bridge.desk import files as desk_files
from bridge.desk.policy import Policy
from bridge.diagnosis import Finding, authorities, ca_keys, from_error, installed, machine, upgrade, use
from bridge.errors import BridgeError, SettingsError
from bridge.node import inventory
from bridge.node.reading import read_node
from bridge.settings.tables import Settings
from bridge.specs import SIGNING_AUTHORITIES, SPECS
from bridge.state.session import in_force
from bridge.system.paths import UnreadableError, read_ca_file

Look = Callable[[inventory.Node, Settings, datetime], Iterator[Finding]]


def before_upgrade(settings: Settings, now: datetime) -> Iterator[Finding]:
    """Check what `kubeadm upgrade` would do to this node's certificates; asks the cluster's API, and no CA."""
    return _of_node(settings, now, upgrade.look, use.look_at_names)


def of_kubelets(settings: Settings, now: datetime) -> Iterator[Finding]:
    """Check every kubelet's serving certificate; asks the cluster's API and each kubelet, and no CA."""
    return _of_node(settings, now, upgrade.look_at_kubelets)


def for_ca_keys(root: Path, settings: Settings, now: datetime) -> Iterator[Finding]:
    """Search all files below a directory, and the cluster's Secrets, for the keys of this node's CAs."""
    return _of_node(settings, now, lambda node, settings, _: ca_keys.search(node, settings, root))


def _of_node(settings: Settings, now: datetime, *looks: Look) -> Iterator[Finding]:
    node = read_node(settings.node)
    if not node.is_here:
        yield from_error("no-node", "node", inventory.NoNodeError(settings.node.pki_dir))
        return
    for look in looks:
        yield from _whole(look(node, settings, now))


def examine(settings: Settings, now: datetime) -> Iterator[Finding]:
    """Check everything that the next renewal depends on; spends no signature and writes nothing."""
    node = read_node(settings.node)
    is_desk = desk_files.policy_path(settings).is_file()
    settings = in_force(settings, node.bundles)
    if node.is_here:
        for look in (installed.look, ca_keys.look, use.look_at_pairs, use.look, machine.look, authorities.look):
            yield from _whole(look(node, settings, now))
    elif not is_desk:
        error = inventory.NoNodeError(settings.node.pki_dir)
        hint = f"{error.hint}; a CA desk has its policy in {desk_files.policy_path(settings)}"
        yield Finding.error("no-node", "node", str(error), hint)
    if is_desk:
        yield from _whole(look_at_desk(settings, now))


def _whole(part: Iterator[Finding]) -> Iterator[Finding]:
    """Yield one part's findings; an unreadable file ends this part, and no other."""
    try:
        yield from part
    except OSError as e:
        yield Finding.error("unreadable", str(e.filename or "this machine"), f"can't look at it: {e.strerror}")
    except BridgeError as e:
        yield from_error("unreadable", "state directory", e)


def look_at_desk(settings: Settings, now: datetime) -> Iterator[Finding]:
    """Check a desk: its policy, directories and CAs."""
    file = desk_files.policy_path(settings)
    policy = None
    try:
        policy = desk_files.load_policy(settings, None)
        yield Finding.ok("desk-policy", str(file), "nothing wrong")
    except SettingsError as e:
        for problem in e.problems:
            yield Finding.error("desk-policy", str(file), str(problem), e.hint)
    archive = policy.desk.archive if policy is not None else None
    yield from installed.open_directories([file.parent, *([archive] if archive is not None else [])])
    yield from machine.disk_space([settings.node.state_dir])
    yield from machine.state_directory(settings.node.state_dir)
    yield from machine.lock(settings.node.state_dir, now)
    yield from machine.jobs_of_cron()
    yield from machine.desk_directories()
    if not settings.authorities:
        text = "the settings have no [authority.NAME] for a CA that signs here"
        yield Finding.error("settings", "settings", text)
    questions = {name: _question(name, policy, settings, now) for name in settings.authorities}
    yield from authorities.ask_all(settings, dict.fromkeys(questions), questions, now)


def _question(name: str, policy: Policy | None, settings: Settings, now: datetime) -> authorities.Question:
    # not every site has the CA sign its kubelets' serving certificates
    specs = [spec for spec in SPECS.values() if spec.authority.name == name and spec.of_kubeadm]
    # the cluster's CA files, where the policy names their directory; else the backends report their own CAs
    anchors: tuple[x509.Certificate, ...] = ()
    if policy is not None and policy.desk.ca_dir is not None:
        with contextlib.suppress(UnreadableError):
            anchors = read_ca_file(policy.desk.ca_dir / SIGNING_AUTHORITIES[name].certificate_file)
    file = f"desk.ca_dir's {SIGNING_AUTHORITIES[name].certificate_file}"
    expected = settings.expectation(name, anchors, file, now)
    return authorities.Question(specs=specs, wanted=[], expected=expected if anchors else None, is_desks=True)
