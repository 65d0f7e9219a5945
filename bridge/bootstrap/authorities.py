"""The CA certificates of a new node: from files, or from the CAs themselves; never a key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from cryptography import x509

from bridge.bootstrap.places import Places, Role, ca_keys
from bridge.ca import registry
from bridge.ca.ca import signer_of
from bridge.errors import BridgeError, Exit
from bridge.pki.certificates import UNREADABLE, fingerprint, is_ca, name_text, spki
from bridge.pki.expiry import minute
from bridge.settings.tables import Settings
from bridge.specs import Authority
from bridge.system.paths import NoCaFileError, UnreadableError, read, read_ca_file

Certificates = Mapping[str, tuple[x509.Certificate, ...]]


class AuthorityError(BridgeError):
    """A CA certificate that no cluster can be made with."""

    exit_code = Exit.USAGE
    hint = "--ca-dir DIR holds ca.crt, front-proxy-ca.crt and etcd/ca.crt, each with the certificate that signs first"


class CaKeyError(BridgeError):
    """A CA's private key is on the node."""

    exit_code = Exit.REFUSED
    hint = "kubeadm would sign with it: find out who put it there, and remove it (shred -u) first"


def gather(
    settings: Settings, places: Places, role: Role, ca_dir: Path | None, carried: Certificates, now: datetime
) -> Certificates:
    """Gather the CAs' certificates by authority, as each file will hold them: the one that signs first."""
    for path in ca_keys(places):
        raise CaKeyError(f"{path}: wanted no CA's private key on a node, found one")
    if ca_dir is not None:
        _assert_holds_some(ca_dir, places.authorities(role))
    found: dict[str, tuple[x509.Certificate, ...]] = {}
    for authority in places.authorities(role):
        named = carried.get(authority.name) or (_in_file(ca_dir / authority.certificate_file) if ca_dir else ())
        live = _in_file(places.authority(authority))
        if named and live and named[0] != live[0]:
            raise AuthorityError(
                f"{places.authority(authority)}: wanted {_about(named[0])}, found {_about(live[0])}",
                hint="one of the two belongs to another cluster",
            )
        ours = tuple(named or live)
        if not ours and authority.name in settings.authorities:  # the one that signs, which kubeadm uses as the root
            ours = signer_of(registry.configured(settings, [authority.name])[authority.name])
        if not ours:
            raise AuthorityError(
                f"{authority.name}: wanted the CA's certificate, found it in no file and from no backend"
            )
        if (wrong := trouble(ours, now)) is not None:
            raise AuthorityError(f"{authority.name}: {wrong}")
        found[authority.name] = ours
    if (twice := shared_key(found)) is not None:
        raise AuthorityError(
            f"{' and '.join(twice)}: wanted a CA each, found the same key for both",
            hint="a certificate of one CA would be valid for the other: with front-proxy-ca it can act as any user, "
            "with etcd-ca it can read and write everything",
        )
    return found


def _assert_holds_some(ca_dir: Path, wanted: Sequence[Authority]) -> None:
    """Refuse a mistyped directory, which would silently be ignored in favour of the backends' answers."""
    files = [authority.certificate_file for authority in wanted]
    if not any((ca_dir / file).exists() for file in files):
        found = "none of them" if ca_dir.is_dir() else "no such directory"
        raise AuthorityError(f"{ca_dir}: wanted {', '.join(files)} in it, found {found}")


def _in_file(path: Path) -> tuple[x509.Certificate, ...]:
    """The certificates in a CA file; none where there is no file."""
    try:
        if b"PRIVATE KEY-----" in (read(path) or b""):
            raise CaKeyError(f"{path}: wanted a CA's certificate alone, found a private key beside it")
        return read_ca_file(path)
    except NoCaFileError:
        return ()
    except UnreadableError as e:
        raise AuthorityError(f"{path}: wanted a CA certificate, found: {e}") from None


def trouble(certificates: tuple[x509.Certificate, ...], now: datetime) -> str | None:
    """Why the first of a CA's certificates, the one that signs, can't be used; None: it can."""
    first = certificates[0]
    try:
        if not is_ca(first):
            return f"wanted a CA's certificate, found {_about(first)}, which is none"
        if not first.not_valid_before_utc <= now < first.not_valid_after_utc:
            begin, end = minute(first.not_valid_before_utc), minute(first.not_valid_after_utc)
            return f"wanted a CA that is valid now, found {_about(first)}, valid from {begin} until {end}"
        first.public_key()
    except UNREADABLE as e:
        return f"wanted a CA's certificate that can be read, found: {e}"
    return None


def shared_key(found: Certificates) -> tuple[str, str] | None:
    """The names of two authorities with the same key; None: there are no such two."""
    keys: dict[bytes, str] = {}
    for name, certificates in found.items():
        other = keys.setdefault(spki(certificates[0].public_key()), name)
        if other != name:
            return other, name
    return None


def _about(certificate: x509.Certificate) -> str:
    return f"{name_text(certificate.subject)} (SHA-256 {fingerprint(certificate)[:16]}…)"
