"""The certificate that an earlier CA gave to the one that signs now, which goes behind each new certificate."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from cryptography import x509

from bridge.errors import SettingsError, SettingsProblem
from bridge.pki.certificates import load_pem_certificates, name_text, spki
from bridge.settings.tables import RenewalSettings, Settings
from bridge.system.paths import own_text


def load(path: Path) -> x509.Certificate:
    """Read the file that a setting names (SettingsError: it is not there, others can change it, or it has not one certificate)."""
    what = "a cross certificate: the CA's name and key, certified by the CA before it"
    hint = "the administrator of the earlier CA makes it; without it take `cross` out of the settings"
    text = own_text(path, what, hint)
    try:
        found = load_pem_certificates(text.encode())
    except ValueError as e:
        raise SettingsError([SettingsProblem("", what, str(e), path)]) from None
    if len(found) != 1:
        raise SettingsError([SettingsProblem("", what, f"{len(found)} certificates", path)])
    return found[0]


def is_long_enough(cross: x509.Certificate, renewal: RenewalSettings, now: datetime) -> bool:
    """Whether a certificate with this one behind it is not due at once."""
    return cross.not_valid_after_utc - now > renewal.before.of(renewal.validity)


def behind(settings: Settings, authority: str, anchor: x509.Certificate, now: datetime) -> x509.Certificate | None:
    """As `of`; None also if it ends so soon that the certificates before it would be due for renewal at once."""
    found = of(settings, authority, anchor)
    return found if found is not None and is_long_enough(found, settings.renewal, now) else None


def of(settings: Settings, authority: str, anchor: x509.Certificate) -> x509.Certificate | None:
    """The cross certificate of the CA that signs for an authority; None: the settings name none (SettingsError: a wrong one)."""
    ours = settings.authorities.get(authority)
    if ours is None or ours.cross is None:
        return None
    found = load(ours.cross)
    if found.subject != anchor.subject or spki(found.public_key()) != spki(anchor.public_key()):
        want = f"a cross certificate for {name_text(anchor.subject)} and its key, which signs now"
        raise SettingsError([SettingsProblem("", want, f"one for {name_text(found.subject)}", ours.cross)])
    return found
