"""A user's key and CSR: made where the user is, and judged where they are signed."""

from __future__ import annotations

import re
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.x509.oid import NameOID

from bridge.errors import BridgeError, Exit
from bridge.pki import csr
from bridge.pki.certificates import UNREADABLE, attributes
from bridge.pki.csr import Naming, PrivateKey, subject_of
from bridge.pki.csr_fields import requested
from bridge.specs import KEY_ALGORITHMS, KeyAlgorithm
from bridge.system.files import Attributes, sync_directory, write_staged
from bridge.system.paths import UnreadableError, read
from bridge.users.user_rules import User
from bridge.words import one_line

#: Kubernetes accepts it everywhere, and it is made at once.
DEFAULT_KEY: KeyAlgorithm = "ecdsa-p256"
_CSR_MODE = 0o644
#: No hyphen within a block, so that a file of BEGIN lines alone is read once, not once for each line.
_PEM = re.compile(rb"-----BEGIN ((?:NEW )?CERTIFICATE REQUEST)-----[^-]*-----END \1-----")
_CN, _O = NameOID.COMMON_NAME.dotted_string, NameOID.ORGANIZATION_NAME.dotted_string


class NoCsrError(BridgeError):
    """A file that holds no CSR, or can't be read; no request was refused."""

    exit_code = Exit.USAGE
    hint = "`ca-bridge kubeconfig request NAME --group GROUP` makes one where the person is"


class CsrRefusedError(BridgeError):
    """A CSR that differs from the command's options."""

    exit_code = Exit.REFUSED
    hint = "`ca-bridge kubeconfig request NAME --group GROUP` makes one where the person is"


def naming_of(user: User) -> Naming:
    """The subject of a user, as `kubeadm kubeconfig user` writes it: all groups, then the name; no SAN."""
    return Naming(subject=subject_of(user.name, user.groups))


def make(user: User, key: PrivateKey) -> bytes:
    """A CSR in PEM."""
    return csr.build_for(naming_of(user), key)


def stem_of(name: str) -> str:
    """A user's name as a part of a file's name, which leads to no other directory."""
    return re.sub(r"[^A-Za-z0-9._@+-]", "_", name)


def write_request(user: User, directory: Path, algorithm: KeyAlgorithm = DEFAULT_KEY) -> tuple[Path, Path]:
    """Make a key and a CSR for it, `NAME.key` (0600) and `NAME.csr`: both or neither, and never over an older file."""
    stem = stem_of(user.name)
    key = csr.generate_key(algorithm)
    files = [(directory / f"{stem}.key", csr.key_pem(key), Attributes.private().mode)]
    files.append((directory / f"{stem}.csr", make(user, key), _CSR_MODE))
    written: list[Path] = []
    try:
        for path, data, mode in files:
            private = Attributes.private()
            write_staged(path, data, Attributes(mode=mode, uid=private.uid, gid=private.gid, extended={}))
            written.append(path)
        sync_directory(directory)
    except OSError as e:
        for path in written:
            path.unlink()
        raise BridgeError(
            f"{e.filename or directory}: wanted to write a key and a CSR, found: {e.strerror}",
            hint="move the older ones away, or name another directory with -o",
        ) from None
    return files[0][0], files[1][0]


def load(path: Path, user: User) -> bytes:
    """Read a CSR that was made elsewhere, check it against the operator's options, and return it as PEM."""
    try:
        data = read(path)
    except UnreadableError as e:
        raise NoCsrError(f"{path}: wanted a CSR, found: {e}") from None
    blocks = [match[0] for match in _PEM.finditer(data or b"")]
    if len(blocks) != 1:
        found = "no file" if data is None else f"{len(blocks)} of them"
        raise NoCsrError(f"{path}: wanted one CSR in PEM, found {found}")
    try:
        request = x509.load_pem_x509_csr(blocks[0])
        problems = _problems(request, user)
    except (*UNREADABLE, UnsupportedAlgorithm) as e:
        problems = [f"wanted a CSR that can be read, found: {one_line(e)}"]
    if problems:
        raise CsrRefusedError(f"{path}: {'; '.join(problems)}")
    return blocks[0] + b"\n"


def _problems(request: x509.CertificateSigningRequest, user: User) -> list[str]:
    problems = []
    found = attributes(request.subject)
    names = [value for oid, value in found if oid == _CN]
    groups = [value for oid, value in found if oid == _O]
    if names != [user.name]:
        problems.append(f"CN: wanted {user.name}, found {_words(names)}")
    if sorted(groups) != sorted(user.groups):
        problems.append(f"O: wanted {_words(user.groups)} (--group), found {_words(groups)}")
    if others := [oid for oid, _ in found if oid not in (_CN, _O)]:
        problems.append(f"subject: wanted CN and O alone, found {_words(others)} too")
    if asked := requested(request):
        problems.append(f"extensions: wanted none, found {_words(asked)}")
    if csr.known_algorithm(request.public_key()) is None:
        problems.append(
            f"key: wanted one of {', '.join(KEY_ALGORITHMS)}, found {csr.algorithm_name(request.public_key())}"
        )
    if not request.is_signature_valid:
        problems.append("wanted a CSR that is signed with its own key, found another signature")
    return problems


def _words(texts: tuple[str, ...] | list[str]) -> str:
    return ", ".join(one_line(text, 80) for text in texts[:5]) or "none"
