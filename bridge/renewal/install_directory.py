"""
`install DIR`: keys from `renew --csr-only` or `kubeadm certs generate-csr`, signed by whatever means.

A key says by its file's name which certificate it is for; certificates are found by public key, whatever they are
called. What a certificate has to be comes from the live one that it replaces, not from a CSR in the directory.
"""

from __future__ import annotations

import dataclasses
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import ClassVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from bridge.contract import SignRequest
from bridge.desk.csr_directory import spec_of
from bridge.errors import BridgeError, Exit, WaitingError
from bridge.node import kubeconfig
from bridge.node.inventory import Item, Node
from bridge.pki import csr, verify
from bridge.pki.certificates import certificates_in
from bridge.pki.csr import PrivateKey
from bridge.renewal.airgap import Found, answered_by
from bridge.renewal.issuance import Answered
from bridge.renewal.prepare import Prepared, live_pair, present, replaced_by_next, serving_names
from bridge.renewal.readiness import assert_room
from bridge.renewal.select import RunOptions, Selection, outcome_of, select
from bridge.renewal.transaction import Transaction
from bridge.renewal.verify_and_install import Result, expectations, record_failed, remember, verify_all
from bridge.settings.tables import Settings
from bridge.specs import CertificateSpec
from bridge.state import backups
from bridge.state.session import Run, begun, give_up
from bridge.state.store import Outcome
from bridge.system.console import Progress, log
from bridge.system.paths import UnreadableError, read_once

#: All of kubeadm's files are some 40.
_MOST_FILES = 1000
_KEY, _CSR = ".key", ".csr"


class DirectoryError(BridgeError):
    """The directory's files can't be installed."""

    exit_code: ClassVar[int] = Exit.USAGE


@dataclass(frozen=True, slots=True, kw_only=True)
class _Contents:
    """Keys and certificates that were found in a directory, each file read once."""

    keys: dict[str, PrivateKey] = field(default_factory=dict, repr=False)  #: By certificate name.
    key_files: dict[str, Path] = field(default_factory=dict)
    found: Found = field(default_factory=Found)  #: The certificates.

    def take_key(self, spec: CertificateSpec, path: Path, key: PrivateKey) -> None:
        """Keep a key, the only one for its certificate."""
        if spec.name in self.keys:
            other = self.key_files[spec.name]
            raise DirectoryError(f"{path}: wanted one key for {spec.name}, found {other} too", hint="move one away")
        self.keys[spec.name], self.key_files[spec.name] = key, path


def run(
    settings: Settings, directory: Path, options: RunOptions, now: Callable[[], datetime], progress: Progress
) -> tuple[Result, Node, Selection]:
    """Prove a directory's certificates as any CA's answer, and install them with their keys."""
    contents = _read(directory)
    with begun(settings, now, progress, options.wait) as (ours, found):
        transaction = Transaction(ours, options)
        node = transaction.settle_earlier(found)
        if not transaction.may_go_on:
            return transaction.with_earlier(Result(outcomes=())), node, Selection()
        options = dataclasses.replace(options, names=tuple(contents.keys))
        selection = select(node, settings, options, now())
        for sentence in selection.waived:
            progress.note(sentence)
        if selection.items:
            result = _install(ours, transaction, selection, node, contents, options)
        else:
            record_failed(ours.record, selection.failed)
            result = transaction.nothing_to_install(selection)
        if result.backup_id is not None:
            backups.retire(ours.store, settings, node, now())
        return result, node, selection


def _install(
    run: Run,
    transaction: Transaction,
    selection: Selection,
    node: Node,
    contents: _Contents,
    options: RunOptions,
) -> Result:
    with transaction.about(selection):
        assert_room(run.settings)
        expected, unproved = expectations(node, run.settings, selection.items, run.now())
        items = [item for item in selection.items if item.spec.authority.name in expected]
        answered, failed = _answered(run, items, expected, contents)
        proven, failed = verify_all(run, answered, [*selection.failed, *unproved, *failed])
        if not (failed and options.all_or_nothing):
            for one in proven:
                _supersede(run, one.prepared)
            names = {one.name for one in proven}
            remember(run, [one for one in answered if one.prepared.name in names], proven)
        result = transaction.install(selection, proven, failed)
    return transaction.conclude(selection, transaction.activate(selection, result))


def _answered(
    run: Run, items: Sequence[Item], expected: Mapping[str, verify.Expectation], contents: _Contents
) -> tuple[list[Answered], list[Outcome]]:
    answered, failed = [], []
    for item in items:
        try:
            one = _prepared(item, run.settings, contents)
        except BridgeError as e:
            failed.append(outcome_of(item, e))
        else:
            answered.append(answered_by(run, one, contents.found, expected[one.authority], "install"))
    return answered, failed


def _prepared(item: Item, settings: Settings, contents: _Contents) -> Prepared:
    """The request that a directory's key and certificates answer."""
    key = contents.keys[item.spec.name]
    live, was = live_pair(item)
    pem, replaced = _csr_pem(item, settings, live, key), replaced_by_next(item, live)
    request = SignRequest(spec=item.spec, csr_pem=pem, validity=settings.renewal.validity, replaces=replaced)
    if not contents.found.take_loose(request):
        raise WaitingError(
            f"wanted a certificate for {contents.key_files[item.spec.name]}, found none in the directory",
            hint="have its CSR signed, put the certificate there under any name, then run this again",
        )
    return Prepared(item=item, request=request, key_pem=csr.key_pem(key), was=was)


def _csr_pem(item: Item, settings: Settings, live: x509.Certificate | None, key: PrivateKey) -> bytes:
    naming = serving_names(item, settings)
    return csr.build_for(naming, key) if naming is not None else csr.build(present(item, live), key)


def _supersede(run: Run, prepared: Prepared) -> None:
    """Give up an open request for the same certificate, since its key is another one."""
    made = run.requests.get(prepared.name)
    if made is not None:
        give_up(run, prepared.name, "another certificate is installed in its place")


# --- the directory ---------------------------------------------------------------------------------------------------


def _read(directory: Path) -> _Contents:
    """Read every file once: keys by kubeadm's names, certificates whatever they are called."""
    contents = _Contents()
    for path in _files(directory):
        relative = path.relative_to(directory)
        try:
            data, status = read_once(path)
        except (UnreadableError, FileNotFoundError) as e:
            log.info("%s: passed over: %s", path, e)
            continue
        if path.suffix == _CSR:
            continue
        spec, key_pem = _key_in(relative, data)
        if spec is not None and key_pem is not None:
            _assert_ours(path, status.st_mode)
            contents.take_key(spec, path, _private_key(path, key_pem))
        elif b"PRIVATE KEY-----" not in data:
            contents.found.loose[path] = _certificates(path, data)
    if not contents.keys:
        raise DirectoryError(
            f"{directory}: wanted private keys named as kubeadm names them (apiserver.key, etcd/server.key), found none",
            hint="`ca-bridge renew --csr-only --csr-dir DIR` writes them; `ca-bridge import` takes certificates alone",
        )
    return contents


def _files(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise DirectoryError(f"{directory}: wanted a directory with keys and certificates, found none")
    found = [path for path in sorted(directory.rglob("*")) if not path.name.startswith(".") and not path.is_dir()]
    if len(found) > _MOST_FILES:
        raise DirectoryError(f"{directory}: wanted at most {_MOST_FILES} files, found {len(found)}")
    return found


def _key_in(relative: Path, data: bytes) -> tuple[CertificateSpec | None, bytes | None]:
    """The key in `NAME.key`, or in the kubeconfig that `generate-csr` has made."""
    spec = spec_of(relative, _KEY)
    if relative.suffix == _KEY:
        return spec, data
    spec = spec_of(relative, "")
    if spec is None or not spec.kubeconfig:
        return None, None
    try:
        return spec, kubeconfig.key_data(data)
    except kubeconfig.KubeconfigError:
        return None, None


def _assert_ours(path: Path, mode: int) -> None:
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise DirectoryError(
            f"{path}: wanted a private key for its owner alone, found mode {stat.S_IMODE(mode):04o}",
            hint="a user who has read it can pose as its owner: make a new key, or chmod 600 it if no other user has",
        )


def _private_key(path: Path, pem: bytes) -> PrivateKey:
    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # broken, encrypted, of an odd type
        key = None  # outside of `except`, since a traceback could lead to the key
    if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
        raise DirectoryError(f"{path}: wanted an RSA or ECDSA key in PEM without a passphrase, found something else")
    return key


def _certificates(path: Path, data: bytes) -> list[x509.Certificate]:
    try:
        return certificates_in(data)
    except ValueError as e:
        log.info("%s: passed over: %s", path, e)
        return []
