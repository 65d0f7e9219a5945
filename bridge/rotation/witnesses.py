"""
Who still uses the CA that goes: clients with its certificates, by the audit log of API servers, and clients that trust it
alone, by what API servers log of refusals.

Both files are what programs wrote about requests of others: they are read line by line, and nothing in them is believed but
for what a line says of itself. The API server writes the digest of a client's certificate into each event (measured on 1.37).
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509

from bridge.errors import BridgeError, Exit
from bridge.node.inventory import Node
from bridge.pki import identity
from bridge.pki.budget import MOST_OF_SERVER, Budget, json_of
from bridge.pki.certificates import fingerprint, load_pem_certificates, name_text
from bridge.rotation.phases import Change
from bridge.state import audit
from bridge.state.store import Store
from bridge.system.paths import UnreadableError, read, regular_file
from bridge.words import one_line

_CREDENTIAL_ID = "authentication.kubernetes.io/credential-id"
_IS_CERTIFICATE = "X509SHA256="
#: An event with the request's body has up to a megabyte and more.
_LONGEST_LINE = 4 << 20
#: Users, and addresses, that are kept apart; a cluster has hundreds.
_MOST_USERS = 10_000
_MOST_TEXT = 200


class UnreadableLogError(BridgeError):
    """A file that was named can't be read."""

    exit_code = Exit.USAGE


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """A client certificate that is not known to be one of the new CA's, as it was used last."""

    sha256: str
    name: str
    groups: tuple[str, ...]
    address: str
    agent: str
    time: str

    def __str__(self) -> str:
        """For the screen."""
        groups = f" ({', '.join(self.groups)})" if self.groups else ""
        return f"{self.name}{groups}, certificate {self.sha256[:8]}, last at {self.time} from {self.address} by {self.agent}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a client at an address did when it was shown a certificate, or what an API server refused."""

    who: str
    count: int

    def __str__(self) -> str:
        """For the screen."""
        return f"{self.who}, {self.count} times"


# --- clients with certificates of the old CA --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Users:
    """What audit logs say of certificates."""

    users: list[User]
    unread: int  #: Lines that are too long, or no events: clients may be in them.


def users(logs: Sequence[Path], known: Collection[str]) -> Users:
    """The users of audit logs whose certificate is none of the known ones, by SHA-256 (UnreadableLogError)."""
    found: dict[str, User] = {}
    unread = 0
    for line in itertools.chain.from_iterable(map(_lines, logs)):
        if line and _IS_CERTIFICATE.encode() not in line:
            continue
        event = _event(line)
        unread += event is None
        for user in _users_of(event):
            is_new = user.sha256 not in found
            if user.sha256 in known or (is_new and len(found) == _MOST_USERS):
                continue
            if is_new or found[user.sha256].time <= user.time:
                found[user.sha256] = user
    return Users(sorted(found.values(), key=lambda user: (user.name, user.time)), unread)


def _event(line: bytes) -> dict[str, Any] | None:
    """The event in a line; None: it is none, or too long."""
    try:
        event = json_of(line, Budget(_LONGEST_LINE, MOST_OF_SERVER))
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


def _users_of(event: Mapping[str, Any] | None) -> Iterator[User]:
    """The user of an event, once for each of its certificates; an event of another shape has none."""
    if event is None:
        return
    user = _below(event, "user")
    ids = _below(user, "extra").get(_CREDENTIAL_ID)
    for each in ids if isinstance(ids, list) else ():
        digest = str(each).partition(_IS_CERTIFICATE)[2].lower()
        if re.fullmatch(r"[0-9a-f]{64}", digest):
            yield User(
                sha256=digest,
                name=_word(user.get("username")),
                groups=tuple(_words(user.get("groups"))),
                address=", ".join(_words(event.get("sourceIPs"))) or "an unknown address",
                agent=_word(event.get("userAgent")) or "an unknown program",
                time=_word(event.get("stageTimestamp")),
            )


def _below(value: Any, key: str) -> Mapping[str, Any]:
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


def _word(value: Any) -> str:
    return one_line(value[:_MOST_TEXT]) if isinstance(value, str) else ""


def _words(value: Any) -> list[str]:
    return [_word(one) for one in value[:8]] if isinstance(value, list) else []


def known(node: Node, store: Store, change: Change, issued: Sequence[Path]) -> set[str]:
    """
    The SHA-256 of certificates that are the new CA's: this node's, those that this node's runs have installed, and those in
    the files or directories that the operator names (UnreadableLogError), of other nodes or of the CA itself.
    """
    leaves = [item.certificates for item in node.items if item.certificates]
    named = [[one] for path in issued for one in _certificates(path)]
    ours = {fingerprint(chain[0]) for chain in (*leaves, *named) if identity.leads_to(chain, (change.new,))}
    return ours | set(_installed(store, change))


def _installed(store: Store, change: Change) -> Iterator[str]:
    """Those in our own audit log, by the issuer's name, where that says which of both CAs it is."""
    if change.old.subject == change.new.subject:
        return
    issuer = name_text(change.new.subject)
    for line in itertools.chain.from_iterable(map(_lines, audit.files(store))):
        said = audit.line_of(line) or {}
        if said.get("issuer") == issuer and isinstance(digest := said.get("certificateSha256"), str):
            yield digest


def _certificates(path: Path) -> Iterator[x509.Certificate]:
    """All certificates in a PEM file, or in the files of a directory."""
    try:
        files = sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else [path]
    except OSError as e:
        raise UnreadableLogError(f"{path}: wanted certificates, found: {e.strerror}") from None
    for file in files:
        try:
            data = read(file)
        except UnreadableError as e:
            raise UnreadableLogError(f"{file}: wanted certificates, found: {e}") from None
        if data is None:
            raise UnreadableLogError(f"{file}: wanted certificates, found no file")
        with contextlib.suppress(ValueError):  # a directory of a CA has other files, too
            yield from load_pem_certificates(data)


# --- clients that trust the old CA alone ------------------------------------------------------------------------------

#: What a client says when it does not trust the server's certificate: Go's and OpenSSL's alerts, at verbosity 5 and above.
_HANDSHAKE = re.compile(
    r"TLS handshake error from ([0-9A-Fa-f.:\[\]%a-z]{2,60}):\d{1,5}: remote error: tls: "
    r"(?:bad certificate|unknown certificate authority|unknown certificate)"
)
#: A client certificate that no CA of the API server signed, at any verbosity.
_UNKNOWN = re.compile(r"verifying certificate SN=(\d{1,50}), SKID=[0-9A-F:]{0,60}, AKID=([0-9A-F:]{0,60}) failed")


def refusals(logs: Sequence[Path]) -> list[Refusal]:
    """What API servers logged of both kinds, the most frequent first (UnreadableLogError)."""
    found: dict[str, int] = {}
    for line in itertools.chain.from_iterable(map(_lines, logs)):
        text = line.decode("utf-8", errors="replace")
        for pattern, say in _SAYINGS:
            who = say(match) if (match := pattern.search(text)) else ""
            if who and (who in found or len(found) < _MOST_USERS):
                found[who] = found.get(who, 0) + 1
    return [Refusal(who, count) for who, count in sorted(found.items(), key=lambda one: -one[1])]


_SAYINGS: Iterable[tuple[re.Pattern[str], Callable[[re.Match[str]], str]]] = (
    (_HANDSHAKE, lambda found: f"a client at {found[1]} does not trust the API server's certificate"),
    (
        _UNKNOWN,
        lambda found: (
            f"the client certificate with serial number {int(found[1]):X}, of the CA with the key identifier "
            f"{found[2] or '(none)'}, is of no CA that the API server trusts"
        ),
    ),
)


# --- reading ----------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file that may grow meanwhile; one that is too long is empty (UnreadableLogError)."""
    try:
        with regular_file(path) as (descriptor, _), open(descriptor, "rb", closefd=False) as file:
            is_rest = False
            while line := file.readline(_LONGEST_LINE):
                is_whole, was_rest = line.endswith(b"\n"), is_rest
                is_rest = not is_whole and len(line) == _LONGEST_LINE
                if not was_rest:
                    yield b"" if is_rest else line
    except (OSError, UnreadableError) as e:
        raise UnreadableLogError(f"{path}: wanted a log, found: {getattr(e, 'strerror', None) or e}") from None
