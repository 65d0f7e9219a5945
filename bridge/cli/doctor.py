"""
Is everything ready for the next renewal?

Asks each authority's CA what can be asked without spending a signature; writes nothing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from bridge.cli.printing import say_table
from bridge.contract import Spends
from bridge.errors import BridgeError, Exit, SettingsError
from bridge.node import inventory
from bridge.node.inventory import AuthorityState, Item, Node
from bridge.pki import expiry, verify
from bridge.pki.certificates import name_text
from bridge.renewal import hooks, verify_and_install
from bridge.renewal.attempts import Attempts
from bridge.settings.tables import Settings
from bridge.settings.windows import ever_waits
from bridge.signing import preflight, registry
from bridge.specs import Component
from bridge.state.store import Store
from bridge.system.console import printable

Level = Literal["ok", "warning", "error"]

#: A CA that ends sooner can't give certificates of the usual length for long.
CA_ENDS_SOON = timedelta(days=365)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report."""

    level: Level
    about: str
    text: str
    exit_code: int = Exit.DONE  #: Not 0 for an error.


def run(settings: Settings, now: datetime) -> int:
    """Print the report; the exit code is that of the worst error."""
    node = inventory.read(settings.node.pki_dir, settings.node.kubeconfig_dir)
    findings = [
        *_node_name(node, settings),
        *_certificates(node, settings, now),
        *_authorities(node, now),
        *_state_directory(settings.node.state_dir),
        *_windows(settings, now),
        *_hooks(settings),
        *_attempts(settings),
        *_backends(node, settings, now),
    ]
    say_table([(f.level, f.about, f.text) for f in findings])
    return Exit.worst([finding.exit_code for finding in findings])


def _error(about: str, error: BridgeError) -> Finding:
    hint = f" ({error.hint})" if error.hint else ""
    return Finding(level="error", about=about, text=f"{error}{hint}", exit_code=error.exit_code)


def _node_name(node: Node, settings: Settings) -> Iterator[Finding]:
    """What the cluster calls it is in the kubelet's certificate: hooks, bundles and a desk's policy go by that."""
    ours = settings.node.node_name
    for item in node.items:
        if item.spec.component is Component.KUBELET and item.certificates:
            user = _subject(item).partition("CN=system:node:")[2].partition(",")[0]
            if user and user != ours:
                text = f"wanted the node's name in the cluster, which is {user}, found {ours}: set node.name"
                yield Finding(level="warning", about="node.name", text=printable(text))


def _subject(item: Item) -> str:
    """Empty when it can't be read."""
    try:
        return name_text(item.certificates[0].subject)
    except ValueError:
        return ""


def _certificates(node: Node, settings: Settings, now: datetime) -> Iterator[Finding]:
    for item in node.items:
        name = item.spec.name
        if item.state == "present":
            yield _certificate(item, settings, now)
            yield from _modes(item)
            if item.obstacle is not None:
                yield _error(name, item.obstacle)
        elif item.state == "missing" and item.spec.optional:
            yield Finding(level="ok", about=name, text="not on this node, as is usual for it")
        else:
            text = item.trouble or f"wanted a certificate in {item.certificate_path}, found nothing"
            yield Finding(level="error", about=name, text=text, exit_code=Exit.FAILED)


def _certificate(item: Item, settings: Settings, now: datetime) -> Finding:
    left = expiry.residual(expiry.seconds_left(expiry.first_end(item.certificates), now))
    if not item.managed:
        return Finding(level="ok", about=item.spec.name, text=f"{left} left; rotated by the kubelet itself")
    due = expiry.is_due(item.certificates, settings.renewal.before, settings.renewal.validity, now)
    return Finding(level="warning" if due else "ok", about=item.spec.name, text=f"{left} left{', due' if due else ''}")


def _modes(item: Item) -> Iterator[Finding]:
    """A private key that others can read."""
    path = item.key_path or (item.certificate_path if item.embedded else None)
    try:
        mode = stat.S_IMODE(path.stat().st_mode) if path is not None else 0
    except OSError as e:
        yield Finding(level="warning", about=item.spec.name, text=f"wanted its key in {path}, found: {e.strerror}")
        return
    if mode & 0o007:
        text = f"wanted a key for its owner alone, found {path} with mode {mode:04o} (a renewal narrows it)"
        yield Finding(level="warning", about=item.spec.name, text=text)


def _authorities(node: Node, now: datetime) -> Iterator[Finding]:
    for state in node.authorities:
        about = f"CA {state.authority.name}"
        if state.state != "present":
            text = state.trouble or f"wanted a CA certificate in {state.path}, found nothing"
            yield Finding(level="error", about=about, text=text, exit_code=Exit.FAILED)
        else:
            yield _authority(state, about, now)
            if state.key == "local":
                text = "its key is on this disk; whoever reads it can be anybody in the cluster"
                yield Finding(level="warning", about=about, text=text)


def _authority(state: AuthorityState, about: str, now: datetime) -> Finding:
    end = state.certificates[0].not_valid_after_utc
    left = expiry.residual(expiry.seconds_left(end, now))
    if end <= now:
        text = f"expired on {end:%Y-%m-%d}: nothing that it signs is valid"
        return Finding(level="error", about=about, text=text, exit_code=Exit.FAILED)
    if end - now < CA_ENDS_SOON:
        return Finding(level="warning", about=about, text=f"{left} left; no certificate may outlive it")
    return Finding(level="ok", about=about, text=f"{left} left, key {state.key}")


def _state_directory(path: Path) -> Iterator[Finding]:
    about = "state directory"
    if Store(path).is_interrupted:
        text = "an installation or restart is under way, or was interrupted; the next run, or `recover`, finishes it"
        yield Finding(level="warning", about=about, text=text)
    if path.is_dir() and (path.stat().st_uid != os.geteuid() or path.stat().st_mode & 0o077):
        text = f"wanted {path} to be ours with mode 0700, found mode {stat.S_IMODE(path.stat().st_mode):04o}"
        yield Finding(level="error", about=about, text=text, exit_code=Exit.FAILED)
    elif path.is_dir():
        yield Finding(level="ok", about=about, text=str(path))
    else:
        yield Finding(level="ok", about=about, text=f"{path} is made by the first renewal")


def _windows(settings: Settings, now: datetime) -> Iterator[Finding]:
    renewal, about = settings.renewal, "renewal.window"
    if not renewal.window:
        return
    try:
        zone = renewal.window_zone.resolve()
    except SettingsError as e:
        yield _error(about, e)
        return
    text = f"{renewal.window} ({zone})"
    if ever_waits(now, renewal.window, zone, renewal.before.of(renewal.validity)):
        yield Finding(level="ok", about=about, text=f"{text}; the timer must fire within it")
    else:
        text = f"wanted renewal.before longer than two windows take, found {renewal.before}: nothing waits for {text}"
        yield Finding(level="warning", about=about, text=text)


def _hooks(settings: Settings) -> Iterator[Finding]:
    for event in (hooks.BEFORE, hooks.AFTER_INSTALL, hooks.SUCCESS, hooks.FAILURE):
        for words in getattr(settings.hooks, event).words():
            found = shutil.which(words[0])
            text = found or f"wanted a program {words[0]!r}, found none that can be run"
            yield Finding(level="ok" if found else "warning", about=f"hook {event}", text=text)
    if Store(settings.node.state_dir).hooks.exists():
        text = "some of an earlier run did not succeed; the next `ca-bridge renew` runs them again"
        yield Finding(level="warning", about="hooks", text=text)


def _attempts(settings: Settings) -> Iterator[Finding]:
    for name, failures in Attempts(Store(settings.node.state_dir)).authorities.items():
        text = f"{failures}; the last failure: {failures.reason}"
        yield Finding(level="warning", about=f"backend of {name}", text=printable(text))


def _backends(node: Node, settings: Settings, now: datetime) -> Iterator[Finding]:
    items = [item for item in node.items if item.managed and item.state == "present"]
    names = dict.fromkeys(item.spec.authority.name for item in items)
    try:
        backends = registry.configured(settings, names)
    except SettingsError as e:
        yield from (Finding(level="error", about="settings", text=str(p), exit_code=e.exit_code) for p in e.problems)
        return
    demands, _ = verify_and_install.expectations(node, settings, items, now)
    with contextlib.ExitStack() as opened:  # until all were asked, since they may share a login
        for name, configured in backends.items():
            if name in demands:
                ours = [item for item in items if item.spec.authority.name == name]
                yield from _backend(configured, ours, demands[name], opened)


def _backend(
    configured: registry.Configured, items: list[Item], expected: verify.Expectation, opened: contextlib.ExitStack
) -> Iterator[Finding]:
    about = f"backend of {configured.authority}"
    try:
        backend = configured.open()
        opened.callback(registry.close, backend)
        spends = backend.spends() if isinstance(backend, Spends) else ""
        wrong = preflight.preflight(backend, [] if spends else [item.spec for item in items], expected)
    except BridgeError as e:
        yield _error(about, e)
        return
    yield from (_error(f"{about}, {name}", error) for name, error in wrong.items())
    if not wrong:
        rest = f"; not looked at: the login and what it may do, which would use up {spends}" if spends else ""
        yield Finding(level="ok", about=about, text=f"{configured.label} answers, and is the right CA{rest}")
