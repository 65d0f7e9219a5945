"""
The keys of the cluster's CAs: whether kube-controller-manager signs with one, and where on this node there are copies.

The public half identifies a copy, whatever the file's name. Other users can write some of the searched files: each is
opened once, without following a link, and read up to a limit.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import os
import re
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_der_private_key

from bridge.cluster import text_of
from bridge.cluster.api import Api
from bridge.diagnosis import Finding, Level
from bridge.errors import BridgeError
from bridge.node import endpoints
from bridge.node.inventory import Node
from bridge.pki import der
from bridge.pki.certificates import UNREADABLE, spki
from bridge.settings.tables import Settings
from bridge.specs import Component
from bridge.system.paths import UnreadableError, mounts, regular_file
from bridge.words import one_line

#: File systems that the kernel makes up, and automounters.
_NO_FILES = re.compile(
    r"autofs|binfmt_misc|bpf|cgroup2?|configfs|debugfs|devpts|efivarfs|fusectl|mqueue|proc|pstore|securityfs|selinuxfs"
    r"|sysfs|tracefs"
)
#: File systems on other machines, which may be large, slow and full of other people's files.
_REMOTE = re.compile(r"nfs4?|cifs|smb3|ceph|lustre|afs|gpfs|beegfs|glusterfs|fuse\..+")
_PIECE = 1 << 20
#: The limit for each file, and for a gzip file's decompressed content.
_MOST_PIECES = 64
#: The size of a gzip file's pieces, and the limit for them and for its members.
_PACKED, _MOST_PACKED = 1 << 12, 1 << 16
#: The longest text of a key of 16,384 bits, base64-encoded twice.
_LONGEST_KEY = 32_000
_BEGIN = re.compile(rb"-----BEGIN ([A-Z ]{0,20}PRIVATE KEY)-----")
#: Base64 of text that begins with a PEM block, as in a YAML or JSON file, with line ends or JSON's escapes for them.
_BASE64 = re.compile(rb"LS0tLS1CRUdJTi(?:[A-Za-z0-9+/\s]|\\[nrt]){100,}")
#: Base64 of a key in DER: a SEQUENCE (with a length of one, two or three bytes) that begins with a version.
_BASE64_DER = re.compile(
    rb"M(?:[A-H][A-Za-z0-9+/]CA|I[E-H][A-Za-z0-9+/]Ag[E-H]|I[I-L][A-Za-z0-9+/]{2}[AQgw]IB)(?:[A-Za-z0-9+/\s]|\\[nrt]){40,}"
)
#: Characters to remove from base64, among them line ends as JSON escapes them.
_NOT_BASE64 = re.compile(rb"\\[nrt]|[^A-Za-z0-9+/]")
_LINE_END = re.compile(rb"\n|\\n")
_GZIP, _SEQUENCE = b"\x1f\x8b\x08", b"\x30"
_GZIP_BITS = 16 + zlib.MAX_WBITS


@dataclass(slots=True)
class Held:
    """The private keys in one file."""

    public: set[bytes] = field(default_factory=set)  #: Their public halves.
    is_encrypted: bool = False  #: A key has a passphrase.
    is_closed: bool = False  #: The file can't be read.
    is_cut: bool = False  #: The file is longer than the part that was read.
    is_broken: bool = False  #: The rest of a gzip file can't be decompressed.

    @classmethod
    def by_file(cls, path: Path) -> Held:
        """Read one file, which may have been deleted meanwhile."""
        held = cls()
        try:
            with regular_file(path, os.O_NOFOLLOW) as (descriptor, _), open(descriptor, "rb", closefd=False) as file:
                held.read(file)
        except FileNotFoundError:
            pass
        except (OSError, UnreadableError):
            held.is_closed = True
        return held

    def read(self, file: BinaryIO) -> None:
        """Read a file as it is and, if it is a gzip file, decompressed."""
        self._read(iter(lambda: file.read(_PIECE), b""))
        file.seek(0)
        if file.read(len(_GZIP)) == _GZIP:
            file.seek(0)
            self._read(self._decompressed(file))

    def _decompressed(self, file: BinaryIO) -> Iterator[bytes]:
        """Yield whatever a gzip file holds up to its end, a wrong byte, or the place where it is cut off."""
        stream, piece, packed = zlib.decompressobj(_GZIP_BITS), b"", b""
        for _ in range(_MOST_PACKED):
            packed = packed or file.read(_PACKED)
            if not packed:
                break
            before = stream.copy()
            try:
                piece += stream.decompress(packed, _PIECE)
            except zlib.error:
                self.is_broken = True
                piece += _up_to_the_error(before, packed)
                break
            packed = stream.unconsumed_tail
            if stream.eof:  # another member may follow, and what else follows was searched as it is
                packed = stream.unused_data + file.read(_PACKED if len(stream.unused_data) < len(_GZIP) else 0)
                if not packed.startswith(_GZIP):
                    break
                stream = zlib.decompressobj(_GZIP_BITS)
            if len(piece) >= _PIECE:
                yield piece
                piece = b""
        else:
            self.is_cut = True
        yield piece

    def _read(self, pieces: Iterator[bytes]) -> None:
        kept = b""
        for number, piece in enumerate(pieces):
            if number == _MOST_PIECES:
                self.is_cut = True
                return
            if not kept and piece[:1] == _SEQUENCE and len(piece) < _LONGEST_KEY:
                self._add_key(piece)
            text = kept + piece
            self._add_text(text)
            for match in _BASE64.finditer(text):
                self._add_text(_decoded(match[0]))
            for match in _BASE64_DER.finditer(text):
                self._add_key(_decoded(match[0][:_LONGEST_KEY]))
            kept = text[-_LONGEST_KEY:]

    def _add_text(self, text: bytes) -> None:
        for match in _BEGIN.finditer(text):
            end = text.find(b"-----", match.end(), match.end() + _LONGEST_KEY)
            body = text[match.end() : max(end, 0)]
            if b"DEK-Info" in body:  # RFC 1421; PKCS #8 marks encryption in the DER
                self.is_encrypted = True
            else:
                # Go and OpenSSL also read a block with header lines, which contain a colon
                self._add_key(_decoded(b"".join(line for line in _LINE_END.split(body) if b":" not in line)))

    def _add_key(self, encoded: bytes) -> None:
        """Add a key in DER, perhaps with something behind it."""
        try:
            encoded = der.first(encoded).encoded
            self.public.add(spki(load_der_private_key(encoded, None, unsafe_skip_rsa_key_validation=True).public_key()))
        except TypeError:
            self.is_encrypted = True
        except (ValueError, UnsupportedAlgorithm):
            pass


def _up_to_the_error(stream: zlib._Decompress, packed: bytes) -> bytes:
    """Decompress the bytes before the wrong one, whose output the library drops together with the error."""
    done = b""
    with contextlib.suppress(zlib.error):
        for byte in packed:
            done += stream.decompress(bytes([byte]))
    return done


def _decoded(text: bytes) -> bytes:
    """Decode base64 that may be broken into lines and cut off; return nothing if it is no base64."""
    text = _NOT_BASE64.sub(b"", text)
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4))
    except binascii.Error:
        return b""


_EMPTY = "`ca-bridge help gateway` says how the flags are emptied, and what signs instead"
_SECRETS = "/api/v1/secrets"
#: A Secret has up to 1 MiB, which base64 makes longer; a page of the API has at most 4 MiB.
_SECRETS_AT_ONCE = 2
#: kubeadm's encrypted copy of all CA keys for joining nodes, which expires after two hours.
_KUBEADM_CERTS = "Secret kube-system/kubeadm-certs"
_LONGEST_PATH = 4096  # PATH_MAX
_GONE = "delete it (`shred -u FILE`); a key that others may have read is worth nothing until there is a new CA"
_OUT = "delete it (`kubectl -n NAMESPACE delete secret NAME`) when nothing signs by it; snapshots of etcd keep it"


def look(node: Node, settings: Settings, _now: datetime) -> Iterator[Finding]:
    """Check whether kube-controller-manager signs, and search kubeadm's directories and ours for copies of CA keys."""
    yield from _signer(node)
    # `installed.authority` reports these
    ours = {settings.node.pki_dir / state.authority.key_file for state in node.authorities}
    searched = _Search(node)
    for directory in (settings.node.kubeconfig_dir, settings.node.pki_dir, settings.node.state_dir):
        yield from searched.below(directory, "warning", passed=ours)


def search(node: Node, settings: Settings, root: Path) -> Iterator[Finding]:
    """Search all files below a directory, and the cluster, for the CAs' keys: the proof that these have left."""
    root = root.resolve()  # else a link could lead to /proc by another name
    if not root.is_dir():
        yield Finding.error("ca-key-search", str(root), "there is no such directory to look for CA keys in")
        return
    searched = _Search(node)
    yield from searched.below(root, "error")
    if not (node.is_worker or node.is_etcd_host):  # these may not read Secrets
        yield from searched.in_cluster(Api.of_node(node, settings.node.kubeconfig_dir))
    yield from searched.summary(root)
    yield from _signer(node)


def _signer(node: Node) -> Iterator[Finding]:
    about = Component.CONTROLLER_MANAGER.value
    for flag, path in endpoints.signing_files(node.flags(Component.CONTROLLER_MANAGER)).items():
        if not path.exists():
            text = f"the file of {flag} ({path}) is missing: kube-controller-manager ends when it begins to sign"
            yield Finding.error("controller-manager-key", about, text, _EMPTY)
        elif flag.endswith("-key-file"):
            public = Held.by_file(path.resolve()).public
            names = [name for name, cas in _by_authority(node).items() if public & cas]
            text = f"signs requests of the cluster with {path} ({flag})"
            if names:
                text = f"{text}, the key of {', '.join(names)}, which has to be on this disk for it"
                yield Finding.warning("controller-manager-signs", about, text, _EMPTY)
            elif public:
                yield Finding.note("controller-manager-signs", about, f"{text}, which is no key of this node's CAs")


def _by_authority(node: Node) -> Mapping[str, set[bytes]]:
    """Return the public keys of all certificates in each CA file, by authority."""
    found: dict[str, set[bytes]] = {}
    for state in node.authorities:
        for certificate in state.certificates:
            with contextlib.suppress(*UNREADABLE):
                found.setdefault(state.authority.name, set()).add(spki(certificate.public_key()))
    return found


# --- copies ------------------------------------------------------------------------------------------------------------


class _Search:
    """One search for the CAs' keys; it also counts the files that it could not read."""

    def __init__(self, node: Node) -> None:
        self._cas = _by_authority(node)
        self._unknown = [state for state in node.authorities if state.authority.name not in self._cas]
        self._seen: set[tuple[int, int]] = set()
        self._remote: set[str] = set()  #: Mount points of remote file systems, which are not searched.
        self._found = self._closed = self._cut = self._secrets = 0
        self._broken: list[str] = []
        self._encrypted: list[str] = []

    def below(self, root: Path, level: Level, passed: Collection[Path] = ()) -> Iterator[Finding]:
        """Yield a finding for each file with a CA's key."""
        for path in self._files(root):
            if path in passed:
                continue
            held = Held.by_file(path)
            self._closed += held.is_closed
            self._cut += held.is_cut
            if names := self._names(held, str(path)):
                text = f"wanted no key of a CA on this node, found the key of {names}"
                yield Finding(level, "ca-key-copy", one_line(str(path), _LONGEST_PATH), text, _GONE)

    def _files(self, root: Path) -> Iterator[Path]:
        """Yield each regular file below a directory once, without following links or entering remote file systems."""
        kinds, waiting = mounts(), [str(root)]
        while waiting:
            try:
                with os.scandir(waiting.pop()) as entries:
                    found = sorted(entries, key=lambda entry: entry.name)
            except OSError as e:
                self._closed += not isinstance(e, FileNotFoundError)
                continue
            for entry in found:
                try:
                    if entry.is_dir(follow_symlinks=False):
                        waiting += [entry.path] if self._is_here(kinds.get(entry.path, ""), entry.path) else []
                    elif entry.is_file(follow_symlinks=False):
                        status = entry.stat(follow_symlinks=False)
                        if (file := (status.st_dev, status.st_ino)) not in self._seen:  # or it has another name
                            self._seen.add(file)
                            yield Path(entry.path)
                except OSError as e:
                    self._closed += not isinstance(e, FileNotFoundError)

    def _is_here(self, kind: str, place: str) -> bool:
        if _REMOTE.fullmatch(kind):
            self._remote.add(place)
            return False
        return not _NO_FILES.fullmatch(kind)

    def in_cluster(self, api: Api) -> Iterator[Finding]:
        """Yield a finding for each Secret with a CA's key, and for kubeadm's own, which has all of them."""
        try:
            for secret in api.every(_SECRETS, _SECRETS_AT_ONCE):
                self._secrets += 1
                about = f"Secret {text_of(secret, 'metadata', 'namespace')}/{text_of(secret, 'metadata', 'name')}"
                held, data = Held(), secret.get("data")
                for value in data.values() if isinstance(data, dict) else ():
                    with contextlib.suppress(ValueError):
                        held.read(io.BytesIO(base64.b64decode(str(value))))
                names = self._names(held, about)
                if about == _KUBEADM_CERTS:
                    names = "all CAs (encrypted; `kubeadm init --upload-certs` makes it)"
                if names:
                    text = f"wanted no Secret with a CA's key, found the key of {names}"
                    yield Finding.error("ca-keys-in-cluster", one_line(about), text, _OUT)
        except BridgeError as e:
            hint = "ask a control-plane node that runs"
            yield Finding.warning("ca-keys-in-cluster", "Secrets", f"not looked at: {e}", hint)

    def _names(self, held: Held, place: str) -> str:
        """Return the names of the CAs whose keys the file or Secret has, and note an encrypted key."""
        if held.is_encrypted:
            self._encrypted.append(one_line(place, _LONGEST_PATH))
        if held.is_broken:
            self._broken.append(one_line(place, _LONGEST_PATH))
        names = [name for name, publics in self._cas.items() if publics & held.public]
        self._found += bool(names)
        return ", ".join(names)

    def summary(self, root: Path) -> Iterator[Finding]:
        """Yield findings about what was read, and what could not be judged."""
        for state in self._unknown:
            text = f"wanted its certificate in {state.path} to know its key by, found {state.trouble or 'none'}"
            hint = "put the CA certificate back, and look again"
            yield Finding.error("ca-key-search", state.authority.name, text, hint)
        for place in self._encrypted:
            text = "has an encrypted key, which can't be compared with the CAs'"
            yield Finding.warning("ca-key-search", place, text, "find out whose it is, and delete a CA's")
        for place in self._broken:
            text = "is a gzip file with a wrong byte, behind which nothing could be read"
            yield Finding.warning("ca-key-search", place, text, "find out what it held, and delete it if in doubt")
        if self._closed:
            text = f"{self._closed} files or directories could not be read"
            yield Finding.warning("ca-key-search", f"{root}, closed", text, "run it as root; a disk may be broken")
        read = f"{len(self._seen)} files" + (f" and {self._secrets} Secrets" if self._secrets else "")
        text = f"looked for the keys of {', '.join(self._cas)} in {read}: {self._found} have such a key"
        if self._cut:
            text += f"; not read: the rest of {self._cut} files behind 64 MiB"
        yield Finding.note("ca-key-search", str(root), text)
        for place in sorted(self._remote):
            yield Finding.note("ca-key-search", place, "another machine's file system was not looked at")
