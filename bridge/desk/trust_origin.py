"""The CAs' certificates by which the origin of a replaced certificate can be told, on a node or at a desk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cryptography import x509

from bridge.ca import registry
from bridge.ca.ca import signer_of
from bridge.ca.retry import Rest
from bridge.desk.files import load_policy, policy_path
from bridge.desk.policy import Policy
from bridge.errors import BridgeError
from bridge.settings.tables import Settings
from bridge.specs import AUTHORITIES
from bridge.system.ca_files import NoCaFileError, read_ca_file
from bridge.system.console import log
from bridge.system.paths import UnreadableError


def known_cas(settings: Settings) -> dict[str, tuple[x509.Certificate, ...]]:
    """
    The CA certificates that are here, by authority: the node's own, and where there is a desk's policy, the desk's.

    Raises:
        SettingsError: The policy or a backend's table is wrong.
    """
    policy = load_policy(settings, None) if policy_path(settings).exists() else None
    found = {name: tuple(dict.fromkeys(_certificates(settings, policy, name))) for name in AUTHORITIES}
    return {name: certificates for name, certificates in found.items() if certificates}


def _certificates(settings: Settings, policy: Policy | None, authority: str) -> Iterator[x509.Certificate]:
    yield from _in_file(settings.node.pki_dir / AUTHORITIES[authority].certificate_file)
    if policy is not None:
        if policy.desk.ca_dir is not None:
            yield from _in_file(policy.desk.ca_dir / AUTHORITIES[authority].certificate_file)
        if authority in settings.authorities:
            yield from _of_backend(settings, authority)


def _in_file(path: Path) -> tuple[x509.Certificate, ...]:
    """The certificates in a CA file; none where there is no such file: at a desk there may be no /etc/kubernetes."""
    try:
        return read_ca_file(path)
    except NoCaFileError:
        return ()
    except UnreadableError as e:
        log.warning("%s: wanted a CA certificate, found: %s", path, e)
        return ()


def _of_backend(settings: Settings, authority: str) -> tuple[x509.Certificate, ...]:
    configured = registry.configured(settings, [authority])[authority]
    try:
        return signer_of(configured, Rest())
    except BridgeError as e:
        log.warning("%s: wanted the certificate of %s, found: %s", configured.label, authority, e)
        return ()
