"""
Our own credentials, which identify us to a CA, a desk or a cluster, and when each ends; a renewal replaces none of them.
Their files are remembered with the checked settings, so that a night with nothing due loads no backend.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cryptography import x509

from bridge.errors import BridgeError, Exit
from bridge.pki.certificates import load_pem_certificates
from bridge.pki.expiry import ROTATION_IS_LATE, Before, first_end, left_text, minute
from bridge.settings.tables import ServeSettings, Settings
from bridge.state import Store, checked_credentials
from bridge.system.paths import UnreadableError, read

if TYPE_CHECKING:  # a night with nothing due needs none of these
    from bridge.contract import CredentialEnd
    from bridge.system.state_file import StateFile


class CredentialFile(NamedTuple):
    """A file with a credential that ends."""

    name: str  #: The settings' key, such as `backend.corp.client_cert`.
    path: Path


class CredentialEndedError(BridgeError):
    """One of our own credentials has ended: the server refuses the next request, even if no certificate is due."""

    exit_code = Exit.USAGE
    hint = "have a new one issued, and put it in its place; `ca-bridge doctor` tries it"

    def __init__(self, credential: Credential, now: datetime) -> None:
        self.name = credential.name
        super().__init__(credential.text(now))


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """One of our own credentials, and when it ends."""

    name: str  #: The settings' key.
    path: str  #: Empty: it is in no file.
    ends: datetime | None = None  #: The first end of its certificate and intermediates; None: see `trouble`.
    begins: datetime | None = None
    trouble: str = ""  #: Why its end is not known.
    reported: datetime | None = None  #: When the CA reported the end; None: the file says it.
    renewed_as: str = (
        ""  #: The further pair whose renewal replaces the file, so that the credential renews itself; empty: none.
    )

    def near_from(self, before: Before) -> datetime | None:
        """When to begin to warn: at `renewal.before`, or later, when the program that replaces it is late."""
        if self.ends is None:
            return None
        if self.begins is None:
            return self.ends - (before.remaining or timedelta())
        lifetime = self.ends - self.begins
        return self.ends - min(before.of(lifetime), lifetime * ROTATION_IS_LATE)

    def is_near(self, before: Before, now: datetime) -> bool:
        """Whether it ends soon, or has ended."""
        near = self.near_from(before)
        return near is not None and now >= near

    def has_ended(self, now: datetime) -> bool:
        """Whether it has ended."""
        return self.ends is not None and self.ends <= now

    def needs_a_word(self, before: Before, now: datetime) -> bool:
        """Whether it ends soon, has ended, or can't be read."""
        return self.ends is None or self.is_near(before, now)

    @property
    def is_key_alone(self) -> bool:
        """Whether signatures are checked with the key alone, so that the certificate's end stops nothing."""
        return self.name in _KEYS

    def text(self, now: datetime) -> str:
        """A sentence about its end."""
        place = f"{self.name} ({self.path})" if self.path else self.name
        if self.ends is None:
            return (
                f"own credential {place}: wanted a certificate in PEM, or a kubeconfig with one, found {self.trouble}"
            )
        by = f" by the CA's word of {minute(self.reported)}" if self.reported is not None else ""
        if not self.has_ended(now):
            then = "its key counts beyond that" if self.is_key_alone else "from then on what needs it is refused"
            itself = f"; renewed as [certificate.{self.renewed_as}]" if self.renewed_as else ""
            return f"own credential {place}: {left_text(self.ends, now)}, until {minute(self.ends)}{by}; {then}{itself}"
        then = "its key counts nevertheless" if self.is_key_alone else "what needs it is refused"
        found = f"one that {left_text(self.ends, now)}, at {minute(self.ends)}{by}"
        return f"own credential {place}: wanted one that is valid, found {found}; {then}"


_KEYS = ("node.desk_key", "node.order_key")
SERVED = "serve.certificate"


def own_places(settings: Settings) -> Iterator[CredentialFile]:
    """Credential files in the program's own settings; `bridge.ca.registry.credentials` adds the backends'."""
    door = settings.serve.certificate if settings.serve != ServeSettings() else None  # else there is no door
    paths = (settings.node.desk_key, settings.node.order_key, settings.gateway.kubeconfig, door)
    for name, path in zip((*_KEYS, "gateway.kubeconfig", SERVED), paths, strict=True):
        if path is not None:
            yield CredentialFile(name, path)


def may_look(settings: Settings) -> bool:
    """Whether this user may read the state directory, or it does not exist yet."""
    directory = settings.node.state_dir
    try:
        directory.lstat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return os.access(directory, os.R_OK | os.X_OK)


def seen(settings: Settings) -> list[Credential] | None:
    """All credentials, without loading a backend; None: the settings are not checked, or this user may not read that."""
    store = Store(settings.node.state_dir)
    if not settings.authorities or settings.source.file is None:
        return look(settings, own_places(settings), None)
    listed = checked_credentials(settings, store) if may_look(settings) else None
    return None if listed is None else look(settings, [CredentialFile(*entry) for entry in listed], store)


def look(settings: Settings, there: Iterable[CredentialFile], store: Store | None) -> list[Credential]:
    """When each credential ends, by its file, or else by its CA's report in `store` (None: reports are left out)."""
    pairs = {os.path.realpath(pair.certificate_file): pair.name for pair in settings.node.pairs}
    credentials = [credential for place in there if (credential := _read(place)) is not None]
    by_file = (
        [replace(credential, renewed_as=pairs.get(os.path.realpath(credential.path), "")) for credential in credentials]
        if pairs
        else credentials
    )
    return [*by_file, *(_remembered(settings, store) if store is not None else ())]


def _read(place: CredentialFile) -> Credential | None:
    """The credential in a file; None: it holds only a public key or a token, or the gateway's file is on another machine."""
    trouble = ""
    try:
        data = read(place.path)
        if data is None:
            trouble = "no such file"
        elif b"PUBLIC KEY" in data and b"CERTIFICATE" not in data:
            return None
        elif chain := _certificates(data, place.path):
            begins = chain[0].not_valid_before_utc
            return Credential(name=place.name, path=str(place.path), begins=begins, ends=first_end(chain))
        else:
            return None
    except (UnreadableError, ValueError, BridgeError) as e:
        trouble = str(e) if isinstance(e, UnreadableError) else "something else"
    if place.name == "gateway.kubeconfig":
        return None
    return Credential(name=place.name, path=str(place.path), trouble=trouble)


def _certificates(data: bytes, path: Path) -> list[x509.Certificate]:
    """The certificates of a PEM file, or the client certificates of a kubeconfig; empty if it has a token."""
    if b"-----BEGIN CERTIFICATE-----" in data:
        return load_pem_certificates(data)
    from bridge.node import kubeconfig  # noqa: PLC0415 (only if a credential is a kubeconfig)

    found = kubeconfig.parse(data)
    if found.certificate_data is None and found.certificate_file is None:
        return []
    pem = found.certificate_data or read(path.parent / (found.certificate_file or "")) or b""
    return load_pem_certificates(pem)


# --- what a CA has reported -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reported:
    """The end of a token or secret id, as its CA reported it."""

    ends: datetime
    reported: datetime
    begins: datetime | None = None
    file: str | None = None  #: None: it is in no file.
    stamp: str | None = None  #: The file's; once the file is replaced, the CA's report is forgotten.


def reported_file(store: Store) -> StateFile[dict[str, _Reported]]:
    """The file with CAs' reports; a damaged one counts as missing, since the worst result is a late warning."""
    from bridge.system.state_file import OnDamage, coded  # noqa: PLC0415 (only if a CA has reported an end)

    what = "when our own tokens end"
    return coded(dict[str, _Reported], store.credentials, what, OnDamage.START_OVER, key="credentials")


def remember(store: Store, ends: Mapping[str, CredentialEnd], now: datetime) -> None:
    """Remember the ends that CAs have just reported, by the settings' key; reports of other CAs stay."""
    if not ends:
        return
    file = reported_file(store)
    new = {
        name: _Reported(
            ends=credential.ends,
            reported=now,
            begins=credential.begins,
            file=None if credential.file is None else str(credential.file),
            stamp=None if credential.file is None else _stamp(credential.file),
        )
        for name, credential in ends.items()
    }
    file.put({**(file.read() or {}), **new})


def _stamp(path: Path) -> str | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return f"{status.st_ino} {status.st_size} {status.st_mtime_ns}"


def _remembered(settings: Settings, store: Store) -> Iterator[Credential]:
    if not store.credentials.exists():
        return
    for name, reported in (reported_file(store).read() or {}).items():
        is_same = reported.file is None or _stamp(Path(reported.file)) == reported.stamp
        if is_same and name.split(".")[1] in settings.backends:
            yield Credential(
                name=name,
                path=reported.file or "",
                ends=reported.ends,
                begins=reported.begins,
                reported=reported.reported,
            )


def warnings(credentials: Iterable[Credential], settings: Settings, now: datetime) -> list[str]:
    """A sentence about each credential that ends soon, has ended, or can't be read."""
    return [credential.text(now) for credential in credentials if credential.needs_a_word(settings.renewal.before, now)]


def ended(credentials: Iterable[Credential], now: datetime) -> list[CredentialEndedError]:
    """An error for each ended credential that a renewal logs in with, and whose end this machine can see."""
    logins = (
        credential
        for credential in credentials
        if credential.reported is None and not credential.is_key_alone and credential.name != "gateway.kubeconfig"
    )
    return [CredentialEndedError(login, now) for login in logins if login.has_ended(now)]


def metrics(credentials: Sequence[Credential], before: Before) -> str:
    """The metrics of all credentials with a known end, in Prometheus' format."""
    from bridge.system.metrics import labels, metric  # noqa: PLC0415 (for monitors alone)

    def moments(name: str, text: str, times: Iterable[datetime | None]) -> str:
        known = [(credential, time) for credential, time in zip(credentials, times, strict=True) if time is not None]
        samples = (
            (labels(name=credential.name, path=credential.path), int(time.timestamp())) for credential, time in known
        )
        return metric(name, text, samples)

    end, near = "End of one of ca-bridge's own credentials.", "From when on ca-bridge warns of a credential's end."
    return moments(
        "ca_bridge_credential_not_after_seconds", end, (credential.ends for credential in credentials)
    ) + moments("ca_bridge_credential_near_seconds", near, (credential.near_from(before) for credential in credentials))
