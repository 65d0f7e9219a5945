"""
Judge whether a backup is fit to be put back.

It is checked as a new certificate is, against the live one's subject and SANs. The node ran on it before, though:
what a component can start with may be forced, and only what it can't start with may not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509

from bridge.errors import BridgeError
from bridge.node import kubeconfig, pair
from bridge.node.inventory import Item, Node
from bridge.pki import csr, verify
from bridge.pki.certificates import UNREADABLE, load_pem_certificates
from bridge.settings.tables import Settings
from bridge.specs import KUBELET_SERVER
from bridge.state.backups import Backup, BackupError, File
from bridge.state.install import (
    digest,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One reason not to put a backup back."""

    certificate: str  #: kubeadm's name.
    wanted: str
    found: str
    subject: str = ""  #: What is wrong with the certificate itself, as `bridge.pki.verify` calls it.

    @property
    def is_damage(self) -> bool:
        """Whether it is not whole, not there, or apart from its key: nothing that the certificate says."""
        return not self.subject

    @property
    def can_be_forced(self) -> bool:
        """Whether the node could run on it nevertheless; a kubelet serves with whatever it has, its own included."""
        return not self.is_damage and (self.certificate == KUBELET_SERVER or self.subject not in _NEVER_FORCED)

    def __str__(self) -> str:
        about = f"{self.subject}: " if self.subject else ""
        return f"{self.certificate}: {about}wanted {self.wanted}, found {self.found}"


_PAIR, _NO_PAIR = "a certificate and its private key", "another key, or none that can be read"
#: Nobody would trust it: another CA's, or the CA was changed.
_NEVER_FORCED = ("chain", "issuer", "public key", "extensions", "critical extension")


def problems_of(backup: Backup, settings: Settings, node: Node, now: datetime) -> list[Problem]:
    """All that speaks against putting it back."""
    items = {item.spec.name: item for item in node.items}
    found: list[Problem] = []
    for name in backup.names:
        item = items.get(name)
        if item is None:
            wanted = "a certificate of this node"
            found.append(Problem(certificate=name, wanted=wanted, found="a name that it does not have"))
        else:
            kubeconfig_dir, extra = settings.node.kubeconfig_dir, settings.extra_subject(item.spec.authority.name)
            found += _problems(files_of(backup, name), item, kubeconfig_dir, now, extra)
    return found


def files_of(backup: Backup, name: str) -> list[File]:
    """The files of one certificate."""
    return [file for file in backup.files if file.certificate == name]


def _problems(
    files: Sequence[File], item: Item, kubeconfig_dir: Path, now: datetime, extra: frozenset[tuple[str, str]]
) -> Iterator[Problem]:
    """Problems of one certificate: its files, its pair, what is in it; later ones make no sense without the earlier."""
    name = item.spec.name
    found = [*_misplaced(name, files, item, kubeconfig_dir), *_damaged(name, files)]
    if found:
        yield from found
    elif any(file.was_there for file in files):
        try:
            certificates, key_pem = pair_of(files, item)
        except (BridgeError, *UNREADABLE) as e:
            reason = str(e) if isinstance(e, BridgeError) else _NO_PAIR
            yield Problem(certificate=name, wanted=_PAIR, found=reason)
            return
        yield from _unproven(item, certificates, key_pem, now, extra)


def _misplaced(name: str, files: Sequence[File], item: Item, kubeconfig_dir: Path) -> Iterator[Problem]:
    """A backup is of this node's files, and writes no others."""
    places = {path.resolve() for path in (item.key_path, item.certificate_path) if path is not None}
    if item.current is not None:
        places |= {(kubeconfig_dir / item.spec.base).resolve(), item.current.parent.resolve() / item.current.name}
    for file in files:
        place = file.path if file.is_link else file.path.resolve()
        if place not in places and not _is_kubelets(file, item):
            wanted = " or ".join(sorted(map(str, places)))
            yield Problem(certificate=name, wanted=f"a file for {wanted}", found=f"one for {file.path}")


def _is_kubelets(file: File, item: Item) -> bool:
    """Whether it is one of the dated files beside the symlink that leads to the one in use."""
    if item.current is None or file.path.resolve().parent != item.current.parent.resolve():
        return False
    return re.fullmatch(DATED.format(item.current.name.removesuffix("-current.pem")), file.path.name) is not None


#: What a kubelet calls its pairs, and we ours; without the name's beginning.
DATED = r"{}-\d{{4}}(?:-\d\d){{5}}\.pem"


def _damaged(name: str, files: Sequence[File]) -> Iterator[Problem]:
    for file in files:
        if file.target is not None and _content_behind(file, files) is None:
            yield Problem(certificate=name, wanted=f"the file {file.target}, which stays there", found="nothing")
        if file.copy is None:
            continue
        try:
            now = digest(file.copy.read_bytes())
        except OSError as e:
            yield Problem(certificate=name, wanted=f"the file {file.copy}", found=e.strerror or "an error")
        else:
            if now != file.sha256:
                wanted = f"{file.copy} with SHA-256 {str(file.sha256)[:16]}…"
                yield Problem(certificate=name, wanted=wanted, found=f"{now[:16]}…")


def _content_behind(link: File, files: Sequence[File]) -> bytes | None:
    """The content that a symlink will lead to: of a file that is put back with it, or one that stays; None: neither."""
    target = link.target
    if target is None:
        return None
    copies = [file.copy for file in files if file.copy is not None and file.path.resolve() == target.resolve()]
    path = copies[0] if copies else target
    return path.read_bytes() if path.is_file() else None


def pair_of(files: Sequence[File], item: Item) -> tuple[list[x509.Certificate], bytes]:
    """Certificates, the leaf first, and key (PEM)."""
    if item.current is not None and (pair := _kubelets_pair(files, item)) is not None:
        return pair
    contents = {file.path.resolve(): file.copy.read_bytes() for file in files if file.copy is not None}
    certificate_path = item.certificate_path.resolve()
    key_path = item.key_path.resolve() if item.key_path is not None else certificate_path
    missing = [str(path) for path in dict.fromkeys((certificate_path, key_path)) if path not in contents]
    if missing:
        raise BackupError(f"no {' and no '.join(missing)}")
    if item.key_path is None:
        parsed = kubeconfig.parse(contents[certificate_path])
        key = kubeconfig.key_data(contents[certificate_path])
        return load_pem_certificates(parsed.certificate_data or b""), key or b""
    return load_pem_certificates(contents[certificate_path]), contents[key_path]


def _kubelets_pair(files: Sequence[File], item: Item) -> tuple[list[x509.Certificate], bytes] | None:
    """The pair that a kubelet starts with: embedded in its kubeconfig, or else where the symlink led; None: neither is here."""
    for file in files:
        if file.copy is not None and file.path.name == item.spec.base:
            data = file.copy.read_bytes()
            certificate, key = kubeconfig.parse(data).certificate_data, kubeconfig.key_data(data)
            return load_pem_certificates(certificate or b""), key or b""
    for file in files:
        if file.is_link and file.was_there:
            data = file.copy.read_bytes() if file.copy is not None else _content_behind(file, files) or b""
            return load_pem_certificates(data), csr.key_block(data)
    return None


def _unproven(
    item: Item,
    certificates: Sequence[x509.Certificate],
    key_pem: bytes,
    now: datetime,
    extra: frozenset[tuple[str, str]],
) -> Iterator[Problem]:
    """Problems of a certificate as an answer to a request that we would make now, but for how long it must be valid."""
    name, leaf = item.spec.name, certificates[0]
    live = item.certificates[0] if item.certificates else leaf
    try:
        expected = verify.Expectation(
            anchors=tuple(load_pem_certificates(item.anchor_path.read_bytes())),
            anchor_name=str(item.anchor_path),
            now=now,
            min_validity=timedelta(),
            extra_subject=extra,
        )
    except (OSError, ValueError) as e:
        reason = str(e.strerror if isinstance(e, OSError) else e)
        yield Problem(certificate=name, wanted=f"the CA certificate {item.anchor_path}", found=reason)
        return
    for one in pair.findings(item.spec, certificates, key_pem, expected, live):
        violation = one.violation
        if one.kind in ("certificate", "incomparable"):
            yield Problem(certificate=name, subject=violation.subject, wanted=violation.want, found=violation.got)
        else:
            yield Problem(certificate=name, wanted=_PAIR, found=violation.got if one.kind == "unusable" else _NO_PAIR)
