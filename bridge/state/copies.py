"""
Copies of the node's kubeconfigs that the settings name: they receive the new client certificate and key, too.

The certificates that copies may still hold are recorded before an installation, until each copy has the live one: the
next run continues after an interruption, and a rollback changes the copies back. They are no part of an installation's
journal, so that the owner of a copy can't hold up an installation.

A copy may lie in a user's home: it is opened once, by a path that only its owner and root can change, and receives a new
key only if it holds the old certificate with its key, so that no user gains rights.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

from bridge.errors import BridgeError, Exit
from bridge.node import kubeconfig
from bridge.node.inventory import Node
from bridge.node.kubeconfig import EmbeddedUser, KubeconfigError
from bridge.node.reading import read_node
from bridge.pki.certificates import UNREADABLE, fingerprint, load_pem_certificates, pem
from bridge.pki.csr import load_key
from bridge.settings.tables import Settings
from bridge.state import Store, audit
from bridge.state.install import KUBECONFIG_MASK, STAGED_PREFIX
from bridge.state.obligations import copies_file
from bridge.system.console import log
from bridge.system.files import Attributes, sync_directory, version, write_staged
from bridge.system.paths import ForeignLinkError, OpenPath, UnreadableError, opened, read, regular_file, trusted_users
from bridge.system.state_file import StateError
from bridge.system.waiting import within

T = TypeVar("T")

_STAGED = f"{STAGED_PREFIX}copy-"
#: The time for one copy; a healthy one takes milliseconds.
_LONGEST = timedelta(seconds=30)
#: The time for a copy when earlier copies have used up all of that time.
_SHORTEST_SECONDS = 1.0
#: The most users of one copy whose keys are read; a copy has one user, or one for each cluster.
_MOST_KEYS = 8


class CopyError(BridgeError):
    """A copy could not be refreshed: its users keep the old certificate."""

    exit_code = Exit.NOT_LIVE
    hint = "fix it, or remove it from copies.files; the next `ca-bridge renew` tries again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """A copy's state when it was looked at."""

    path: Path
    names: tuple[str, ...] = ()  #: kubeadm's names of the kubeconfigs whose live certificate it holds.
    is_there: bool = True
    error: CopyError | None = None  #: Why it can't be refreshed.


@dataclass(frozen=True, slots=True, kw_only=True)
class _Live:
    """The certificate and key that a kubeconfig of the node holds now."""

    certificate: x509.Certificate
    pair: tuple[bytes, bytes]  #: Certificate and key in PEM, as embedded there.


def record_due(settings: Settings, store: Store, node: Node, replaced: Mapping[str, x509.Certificate | None]) -> None:
    """Record, before an installation, that the copies need the next certificates (StateError: install nothing)."""
    if not settings.copies.files.paths:
        return
    file = copies_file(store)
    outdated = dict(file.read() or {})
    for item in node.items:
        old = replaced.get(item.spec.name)
        if item.embedded and old is not None:
            outdated[item.spec.name] = tuple(dict.fromkeys([*outdated.get(item.spec.name, ()), fingerprint(old)]))
    if outdated:
        file.put(outdated)


def finish(settings: Settings, store: Store, record: audit.Record) -> list[BridgeError]:
    """Refresh every copy that holds a replaced certificate; return errors, after which the record stays."""
    if not store.copies.exists():
        return []
    file = copies_file(store)
    try:
        outdated = file.read() or {}
    except StateError as e:
        return [e]
    errors: list[BridgeError] = []
    live, unread = _live(read_node(settings.node))
    for path in settings.copies.files.paths:
        try:
            for name in _in_time(path, _LONGEST.total_seconds(), partial(_refreshed, path, live, outdated)):
                log.info("%s: holds what %s holds now", path, name)
                record.add(audit.COPIED, name, new=live[name].certificate, result=str(path))
        except CopyError as e:
            errors.append(e)
            record.add(audit.FAILED, error=e)
    errors += [error for name, error in unread.items() if name in outdated]
    if not errors:
        with contextlib.suppress(StateError):  # then the next run finds nothing to do
            file.remove()
    return errors


def trust(
    settings: Settings,
    record: audit.Record,
    earlier: Collection[frozenset[x509.Certificate]],
    cas: Sequence[x509.Certificate],
) -> list[BridgeError]:
    """Make each copy trust these CAs where it trusts those of an earlier phase of the cluster; return errors."""
    errors: list[BridgeError] = []
    for path in settings.copies.files.paths:
        try:
            if _in_time(path, _LONGEST.total_seconds(), partial(_trusting, path, earlier, cas)):
                log.info("%s: trusts the CAs that this node trusts now", path)
                record.add(audit.COPIED, result=f"{path}: certificate-authority-data")
        except CopyError as e:
            errors.append(e)
            record.add(audit.FAILED, error=e)
    return errors


def following(
    earlier: Collection[frozenset[x509.Certificate]], cas: Sequence[x509.Certificate]
) -> Callable[[bytes], bytes | None]:
    """An edit of CA data that replaces an earlier phase's CAs by these; it returns None for other data."""

    def edit(data: bytes) -> bytes | None:
        try:
            found_cas = frozenset(load_pem_certificates(data))
        except ValueError:
            return None
        return pem(*cas) if found_cas in earlier and found_cas != frozenset(cas) else None

    return edit


def _trusting(path: Path, earlier: Collection[frozenset[x509.Certificate]], cas: Sequence[x509.Certificate]) -> bool:
    """Update the CA data of a copy, except other clusters'; return whether it changed."""
    with contextlib.suppress(FileNotFoundError), _judged(path) as judged:
        changed = kubeconfig.with_cas(judged.data, following(earlier, cas))
        if changed != judged.data:
            _replace(judged, changed)
            return True
    return False


def _in_time(path: Path, seconds: float, work: Callable[[], T]) -> T:
    """Run `work` on one copy within a time limit, since its home may be on a dead file system (CopyError)."""
    try:
        return within(seconds, work)
    except TimeoutError:
        limit = int(_LONGEST.total_seconds())
        raise CopyError(f"{path}: it could not be read to its end within {limit} s") from None


def _live(node: Node) -> tuple[dict[str, _Live], dict[str, CopyError]]:
    """The pairs of the node's kubeconfigs, and the errors of kubeconfigs that can't be read now; both by name."""
    live: dict[str, _Live] = {}
    errors: dict[str, CopyError] = {}
    for item in node.items:
        name, path = item.spec.name, item.certificate_path
        if not item.embedded or item.state == "missing":
            continue
        try:
            data = read(path) or b""
            pair = (kubeconfig.parse(data).certificate_data or b"", kubeconfig.key_data(data) or b"")
            live[name] = _Live(certificate=load_pem_certificates(pair[0])[0], pair=pair)
        except (KubeconfigError, UnreadableError, ValueError) as e:
            errors[name] = CopyError(f"{path}: wanted the certificate and key for its copies, found: {e}")
    return live, errors


def _refreshed(path: Path, live: Mapping[str, _Live], outdated: Mapping[str, Sequence[str]]) -> list[str]:
    """Refresh one copy; return kubeadm's names of the kubeconfigs that it copies (CopyError: it is unchanged)."""
    try:
        with _judged(path) as judged:
            if users := _outdated(judged.data, path, live, outdated):
                pairs = {number: live[name].pair for number, name in users.items()}
                _replace(judged, kubeconfig.with_users(judged.data, pairs))
            return list(dict.fromkeys(users.values()))
    except FileNotFoundError:
        log.warning("%s: there is no such copy of a kubeconfig (copies.files)", path)
        return []


def _outdated(
    data: bytes, path: Path, live: Mapping[str, _Live], outdated: Mapping[str, Sequence[str]]
) -> dict[int, str]:
    """The copy's users with a replaced certificate: the user's number, and kubeadm's name of the copied kubeconfig."""
    now = {name: fingerprint(certificate.certificate) for name, certificate in live.items()}
    old = {
        digest: name for name, digests in outdated.items() if name in now for digest in digests if digest != now[name]
    }
    held = [(user.number, digest) for user, digest in _held(data, {*old, *now.values()})]
    if not held:
        log.warning("%s: it has no certificate of the node's kubeconfigs with its key; it is left alone", path)
    return {number: old[digest] for number, digest in held if digest in old}


def _replace(judged: _Found, changed: bytes) -> None:
    place = judged.place
    staged = place.path.with_name(f"{_STAGED}{place.name}")
    staged.unlink(missing_ok=True)  # a killed run left it
    write_staged(staged, changed, judged.attributes.narrowed(KUBECONFIG_MASK))
    try:
        if version(place.path.lstat()) != version(judged.status):
            raise UnreadableError("it was changed while it was refreshed, and is as its owner has left it")  # noqa: TRY301
        staged.rename(place.path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    sync_directory(place.path.parent)


def _held(data: bytes, known: Container[str]) -> Iterator[tuple[EmbeddedUser, str]]:
    """Each user with a known certificate and its key; few keys are read, since the owner may make them slow to load."""
    keys = 0
    for user in kubeconfig.embedded_users(data):
        with contextlib.suppress(*UNREADABLE, UnsupportedAlgorithm):  # not one of the node's users
            certificate = load_pem_certificates(user.certificate_pem)[0]
            if (digest := fingerprint(certificate)) not in known:
                continue
            keys += 1
            if keys > _MOST_KEYS:
                raise KubeconfigError(f"wanted at most {_MOST_KEYS} users with the node's certificates, found more")
            public = certificate.public_key()
            if load_key(user.key_pem, public).public_key() == public:
                yield user, digest


def look(settings: Settings, node: Node) -> list[Copy]:
    """Each copy as it is now, with the reason why it can't be refreshed; one time limit covers all of them."""
    live, _ = _live(node)
    names = {fingerprint(certificate.certificate): name for name, certificate in live.items()}
    copies, end = [], time.monotonic() + _LONGEST.total_seconds()
    for path in settings.copies.files.paths:
        try:
            copies.append(_in_time(path, max(_SHORTEST_SECONDS, end - time.monotonic()), partial(_look, path, names)))
        except CopyError as e:
            copies.append(Copy(path=path, error=e))
    return copies


def _look(path: Path, names: Mapping[str, str]) -> Copy:
    try:
        with _judged(path) as judged:
            held = [names[digest] for _, digest in _held(judged.data, names)]
            return Copy(path=path, names=tuple(dict.fromkeys(held)))
    except FileNotFoundError:
        return Copy(path=path, is_there=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    place: OpenPath
    data: bytes
    attributes: Attributes
    status: os.stat_result


@contextlib.contextmanager
def _judged(path: Path) -> Iterator[_Found]:
    """Read a copy that is no link and only its owner and root can change; errors but FileNotFoundError are CopyErrors."""
    try:
        with opened(path) as place, regular_file(place.path, os.O_NOFOLLOW) as (descriptor, status):
            held = Path(f"/proc/self/fd/{descriptor}")
            if status.st_nlink != 1:
                raise UnreadableError(f"a file with {status.st_nlink} names (hard links)")  # noqa: TRY301
            if place.shared:
                raise UnreadableError(f"others than its owner may write to the directory {place.shared}")  # noqa: TRY301
            strangers = (place.owners | {status.st_uid}) - trusted_users()
            if len(strangers) > 1:
                raise UnreadableError(f"the users {', '.join(map(str, sorted(strangers)))} have a hand in it")  # noqa: TRY301
            yield _Found(place=place, data=read(held) or b"", attributes=Attributes.of(held), status=status)
    except FileNotFoundError:
        raise
    except KubeconfigError as e:
        raise CopyError(f"{path}: {e}") from None
    except (UnreadableError, ForeignLinkError) as e:
        raise CopyError(f"{path}: wanted a copy of a kubeconfig that only its owner can change, found: {e}") from None
    except OSError as e:
        raise CopyError(f"{path}: can't refresh this copy: {e.strerror}") from e
