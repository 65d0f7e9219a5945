"""A private key of ours that messages are signed with: a desk's answers, an administrator's orders."""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from bridge.errors import SettingsError, SettingsProblem
from bridge.pki import signatures
from bridge.system.paths import UnreadableError, open_secret, read


def load(path: Path, setting: str, what: str) -> PrivateKeyTypes:
    """
    Read it.

    Args:
        path: PEM, not encrypted.
        setting: Who names it, for messages.
        what: That is signed, for messages.

    Raises:
        SettingsError: It can't be used, or others can read it.
    """
    try:
        exposed = open_secret(path)
    except OSError as e:
        wanted = f"the private key that {what} are signed with"
        raise SettingsError([SettingsProblem(setting, wanted, str(e.strerror), path)]) from None
    if exposed is not None:
        problem = SettingsProblem(setting, exposed.wanted, exposed.found, exposed.path)
        raise SettingsError([problem], hint=exposed.hint)
    try:
        data = read(path)
        found = "nothing" if data is None else "something else"
        key = load_pem_private_key(data or b"", None)
        signatures.sign(key, b"")
    except (UnreadableError, ValueError, TypeError, UnsupportedAlgorithm) as e:
        found = str(e) if isinstance(e, UnreadableError) else found
        wanted = "an RSA, ECDSA or Ed25519 private key in PEM, not encrypted"
        raise SettingsError([SettingsProblem(setting, wanted, found, path)]) from None
    return key
