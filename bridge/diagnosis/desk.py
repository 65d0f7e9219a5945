"""At a CA desk there is no node: what counts is the policy, the CAs' files and keys, and what is not delivered."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from cryptography import x509

from bridge.ca import registry
from bridge.ca.ca import signer_of
from bridge.ca.retry import Rest
from bridge.desk import files as desk_files
from bridge.desk.policy import Policy
from bridge.diagnosis import authorities, installed, machine
from bridge.diagnosis.findings import Finding
from bridge.errors import BridgeError, SettingsError
from bridge.pki import verify
from bridge.settings.tables import Settings
from bridge.specs import AUTHORITIES, SPECS
from bridge.system.ca_files import read_ca_file
from bridge.system.paths import UnreadableError


def policy_file(settings: Settings) -> Path:
    """Where a desk's policy is, if this is one; as `sign` looks for it."""
    return desk_files.policy_path(settings)


def look(settings: Settings, now: datetime) -> Iterator[Finding]:
    """Examine a desk: its policy, directories and CAs."""
    file = policy_file(settings)
    policy = None
    try:
        policy = desk_files.load_policy(settings, None)
        yield Finding(level="ok", check="desk-policy", about=str(file), text="nothing wrong")
    except SettingsError as e:
        for problem in e.problems:
            yield Finding(level="error", check="desk-policy", about=str(file), text=str(problem), hint=e.hint)
    archive = policy.desk.archive if policy is not None else None
    yield from installed.open_directories([file.parent, *([archive] if archive is not None else [])])
    yield from machine.room(settings, node=False)
    yield from machine.state_directory(settings.node.state_dir)
    yield from machine.lock(settings.node.state_dir, now)
    if not settings.authorities:
        text = "wanted an [authority.NAME] for each CA that signs here, found none"
        yield Finding(level="error", check="settings", about="settings", text=text)
    names = dict.fromkeys(settings.authorities)
    questions = {name: _question(name, policy, settings, now) for name in names}
    yield from authorities.ask_all(settings, names, questions)
    yield from _cas(settings, now)


def _question(name: str, policy: Policy | None, settings: Settings, now: datetime) -> authorities.Question:
    # not every site has the CA sign what its kubelets serve with
    specs = [spec for spec in SPECS.values() if spec.authority.name == name and not spec.kubelets]
    anchors = _anchors(policy, name)
    expected = verify.Expectation(
        anchors=anchors,
        anchor_name=f"desk.ca_dir's {AUTHORITIES[name].certificate_file}",
        now=now,
        min_validity=settings.renewal.min_validity,
    )
    return authorities.Question(specs=specs, wanted=[], expected=expected if anchors else None)


def _anchors(policy: Policy | None, name: str) -> tuple[x509.Certificate, ...]:
    """The cluster's, as the policy names them; none: the backends tell their own."""
    if policy is None or policy.desk.ca_dir is None:
        return ()
    try:
        return read_ca_file(policy.desk.ca_dir / AUTHORITIES[name].certificate_file)
    except UnreadableError:
        return ()


def _cas(settings: Settings, now: datetime) -> Iterator[Finding]:
    """Findings about how long the CAs' own certificates are good, by their own word."""
    try:
        backends = registry.configured(settings, settings.authorities)
    except SettingsError:
        return  # told before
    for name, configured in backends.items():
        try:
            certificates = signer_of(configured, Rest())
        except BridgeError:
            continue  # told before
        for certificate in certificates:
            yield installed.ca_end(certificate, f"CA {name}", now)
