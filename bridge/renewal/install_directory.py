"""
`install DIR`: installs keys and certificates of a directory from `renew --csr-only` or `kubeadm certs generate-csr`.

A key's file name says which certificate the key is for, and certificates are matched by public key. The expected names
come from the live certificate, not from a CSR in the directory.
"""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from bridge.contract import SignRequest
from bridge.desk.csr_directory import spec_of
from bridge.errors import BridgeError, Exit, WaitingError
from bridge.node import kubeconfig
from bridge.node.inventory import Item, Node
from bridge.pki import csr
from bridge.pki.certificates import certificates_in
from bridge.pki.csr import PrivateKey
from bridge.renewal import Selection, lost_keys, outcome_of, prepare
from bridge.renewal.airgap import Found, answered_by
from bridge.renewal.prepare import Prepared, with_room
from bridge.renewal.selection import RunOptions, select
from bridge.renewal.transaction import Transaction
from bridge.renewal.verify_and_install import Proven, Result, expectations, record_failed, remember, verify_all
from bridge.settings.tables import Settings
from bridge.specs import CertificateSpec
from bridge.state.session import Now, Run, begun, give_up
from bridge.system.console import Progress, log
from bridge.system.paths import UnreadableError, read_once, trusted_users

#: kubeadm writes about 40 files.
_MOST_FILES = 1000
_KEY, _CSR = ".key", ".csr"


class DirectoryError(BridgeError):
    """The directory's files can't be installed."""

    exit_code: ClassVar[int] = Exit.USAGE


def install(
    settings: Settings, directory: Path, options: RunOptions, now: Now, progress: Progress
) -> tuple[Result, Node, Selection]:
    """Verify a directory's certificates as a CA's answers, and install them with their keys."""
    contents = _read(directory, {pair.name: pair.spec for pair in settings.node.pairs})
    with begun(settings, now, progress, options.wait) as (run, as_found):
        transaction = Transaction(run, options)
        node = transaction.settle_earlier(as_found)
        if not transaction.may_go_on:
            return transaction.with_earlier(Result()), node, Selection()
        options = dataclasses.replace(options, names=tuple(contents.keys))
        selection = select(node, settings, options, now())
        for sentence in selection.waived:
            progress.note(sentence)
        if selection.items:
            result = _installed(run, transaction, selection, node, contents, options)
        else:
            record_failed(run.record, selection.failed)
            result = transaction.nothing_to_install(selection)
        return result, node, selection


def _installed(
    run: Run, transaction: Transaction, selection: Selection, node: Node, contents: Found, options: RunOptions
) -> Result:
    with transaction.about(selection):
        selection = with_room(run.settings, selection)
        expected, unproved = expectations(node, run.settings, selection.items, run.now())
        answered, failed = [], [*selection.failed, *unproved]
        for item in selection.items:
            if item.spec.authority.name in expected:
                try:
                    prepared = _prepared(item, run.settings, contents)
                except BridgeError as e:
                    failed.append(outcome_of(item, e))
                else:
                    answered.append(answered_by(run, prepared, contents, expected[prepared.authority], "install"))
        proven, failed = verify_all(run, answered, failed)
        proven = _without_those_in_place(run, node, proven)
        if not (failed and options.all_or_nothing):
            for passed in proven:
                give_up(run, passed.name, "another certificate is installed in its place")  # its key differs
            names = {each.name for each in proven}
            remember(run, [answer for answer in answered if answer.prepared.name in names], proven)
        result = transaction.install(selection, proven, failed)
    return transaction.conclude(selection, transaction.activate(selection, result))


def _without_those_in_place(run: Run, node: Node, proven: Sequence[Proven]) -> list[Proven]:
    """Leave out pairs that are live already, with a note: another backup would push out a useful one."""
    lost = lost_keys(node)
    same = {item.name for item in proven if item.verified.chain == item.prepared.item.certificates}
    other = {item.spec.name for item in node.items if item.spec.name in lost or item.copy or item.unlike}
    if there := [item.name for item in proven if item.name in same - other]:
        run.progress.note(f"{', '.join(there)}: left out, since this key and certificate are in place already")
    return [item for item in proven if item.name not in there]


def _prepared(item: Item, settings: Settings, contents: Found) -> Prepared:
    path, key = contents.keys[item.spec.name]
    own = item.key_path or item.certificate_path
    if item.certificates and item.key_trouble is None and os.path.realpath(path) == os.path.realpath(own):
        raise DirectoryError(
            f"{path}: wanted a new key, found the one that is in use", hint="name the directory of the new keys"
        )
    live, was = prepare.live_pair(item)
    naming, replaced = prepare.serving_names(item, settings), prepare.replaced_by_next(item, live)
    pem = csr.build_for(naming, key) if naming is not None else csr.build(prepare.present(item, live), key)
    request = SignRequest(spec=item.spec, csr_pem=pem, validity=settings.renewal.validity, replaces=replaced)
    if not contents.take_loose(request):
        raise WaitingError(
            f"there is no certificate for its key in {path.parent}",
            hint="have its CSR signed, put the certificate there under any name, then run this again",
        )
    return Prepared(item=item, request=request, key_pem=csr.key_pem(key), was=was)


def _read(directory: Path, pairs: Mapping[str, CertificateSpec]) -> Found:
    """Read every file once: keys by kubeadm's names, certificates under any name."""
    answers = Found()
    for path in _files(directory):
        relative = path.relative_to(directory)
        try:
            data, status = read_once(path)
        except (UnreadableError, FileNotFoundError) as e:
            log.info("%s: passed over: %s", path, e)
            continue
        if path.suffix == _CSR:
            continue
        spec, key_pem = _key_in(relative, data, pairs)
        if spec is not None and key_pem is not None:
            _assert_ours(path, status)
            key = _private_key(path, key_pem)
            if spec.name in answers.keys:
                other, _ = answers.keys[spec.name]
                raise DirectoryError(f"{path}: wanted one key for {spec.name}, found {other} too", hint="move one away")
            answers.keys[spec.name] = path, key
        elif b"PRIVATE KEY-----" not in data:
            try:
                answers.keep(path, certificates_in(data))
            except ValueError as e:
                log.info("%s: passed over: %s", path, e)
    for error in answers.strange:
        log.warning("%s", error)
    if not answers.keys:
        raise DirectoryError(
            f"{directory}: there are no private keys named as kubeadm names them (apiserver.key, etcd/server.key)",
            hint="`ca-bridge renew --csr-only --csr-dir DIR` writes them; `ca-bridge import` takes certificates alone",
        )
    return answers


def _files(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise DirectoryError(f"{directory}: there is no such directory with keys and certificates")
    files = [path for path in sorted(directory.rglob("*")) if not path.name.startswith(".") and not path.is_dir()]
    if len(files) > _MOST_FILES:
        raise DirectoryError(f"{directory}: wanted at most {_MOST_FILES} files, found {len(files)}")
    return files


def _key_in(
    relative: Path, data: bytes, pairs: Mapping[str, CertificateSpec]
) -> tuple[CertificateSpec | None, bytes | None]:
    """Find the key in `NAME.key` (kubeadm's or a further pair's name), or in a kubeconfig from `generate-csr`."""
    if relative.suffix == _KEY:
        return spec_of(relative, _KEY) or pairs.get(relative.as_posix().removesuffix(_KEY)), data
    spec = spec_of(relative, "")
    if spec is None or not spec.kubeconfig:
        return None, None
    try:
        return spec, kubeconfig.key_data(data)
    except kubeconfig.KubeconfigError:
        return None, None


def _assert_ours(path: Path, status: os.stat_result) -> None:
    is_theirs = status.st_uid not in trusted_users()
    if is_theirs or status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        found = f"one of user {status.st_uid}" if is_theirs else f"mode {stat.S_IMODE(status.st_mode):04o}"
        raise DirectoryError(
            f"{path}: wanted a private key for root or this user alone, found {found}",
            hint="a user who has read it can pose as its owner: make a new key; if no other user has, "
            f"chown {os.geteuid()} {path} && chmod 600 {path}",
        )


def _private_key(path: Path, pem: bytes) -> PrivateKey:
    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # broken, encrypted or of an unsupported type
        key = None  # the error is raised outside of `except`, since a traceback could expose the key
    if not isinstance(key, PrivateKey):
        raise DirectoryError(f"{path}: wanted an RSA or ECDSA key in PEM without a passphrase, found something else")
    return key
