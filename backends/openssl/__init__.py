"""
Signing with `openssl ca`: a directory with a CA's certificate, key and database of issued certificates.

All facts here and in the modules beside this one were measured with 1.1.1w, 3.0.19 and 3.5.9. The exit code of `openssl
ca` says nothing (0 for a CSR with a bad signature), its defaults give no usages, and a site's openssl.cnf can let a CSR
become a CA. So a run uses a configuration of our own, each CSR is checked before, and the database and the certificates
show what was issued.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Lock

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from backends.openssl.index import Database, file_name, log
from backends.openssl.program import KeyFile, Openssl, ProcessEnd, TokenKey
from backends.openssl.settings import CA_PLACE_HINT, EKUS, SECTION, OpensslSettings, files_of, setup_files
from bridge.contract import Backend, Issued, Names, SignRequest
from bridge.errors import BackendError, BackendRefusedError, BackendUnavailableError, LocalFileError, Violation
from bridge.pki.certificates import UNREADABLE, asked_key_and_usages, extension, is_signed_by, key_and_usages, spki
from bridge.pki.expiry import minute
from bridge.specs import CertificateSpec, Usage
from bridge.system.files import reasons
from bridge.system.paths import open_regular

_FAILED_RUNS = 20  # in a row: more than it takes to halve 1000 down to a bad CSR, and no endless list of failures
_BACKDATED = timedelta(minutes=5)  # clocks differ; kubeadm does the same
_BACKDATED_LITTLE = timedelta(minutes=1)  # the API server refuses a pod's certificate that began 5 minutes ago
_MEMORY = "/dev/shm"  # noqa: S108 (the folder made in it is private)
_PREFIX = "ca-bridge-"
_LONGEST_CHECK = 86_400  # seconds
_PLAIN_NAME = re.compile(r"[A-Za-z0-9._-]+")

# All paths are relative to the folder of the run, so that none of the site's has to be quoted.
_CONFIG = """\
[ca]
# Only here: in the CA's own section openssl ignores it, and the policy drops and reorders what the subject has.
preserve = yes

[bridge]
certificate = ca.crt
private_key = {private_key}
database = database/{index}
new_certs_dir = newcerts
rand_serial = yes
unique_subject = no
default_md = {digest}
policy = any
email_in_dn = yes
copy_extensions = copy
x509_extensions = no_section_so_that_forgetting_one_fails

[any]
commonName = optional
"""


@dataclass(frozen=True, slots=True)
class _Alike:
    """What the certificates of one run share."""

    usage: Usage
    validity: timedelta
    names: Names | None  #: Names beside the CSRs; one run has one section of extensions.


_Batch = tuple[_Alike, list[tuple[int, SignRequest]]]
_Answers = dict[int, Issued | BackendError]


class OpensslBackend(Backend):
    """Signs with `openssl ca` on this host."""

    settings_type = OpensslSettings
    setup = staticmethod(setup_files)
    asks_validity = True
    names_beside_csr = True

    def __init__(self, settings: OpensslSettings) -> None:
        self._settings = settings
        self._files = files_of(settings)
        where, token = self._files.private_key, settings.pkcs11
        self._key = TokenKey(where, token) if token is not None else KeyFile(Path(where), settings.passphrase)
        self._openssl = Openssl(program=settings.openssl, limit=settings.timeout, key=self._key)
        self._working = Lock()  #: Threads of a process take turns without the polling of the database's lock.

    def sign(self, request: SignRequest) -> Issued:
        """Have one CSR signed."""
        (answer,) = self.sign_many([request])
        if isinstance(answer, BackendError):
            raise answer
        return answer

    def sign_many(self, requests: Sequence[SignRequest]) -> list[Issued | BackendError]:
        """Have all requests signed, with one process for each chunk of a usage class."""
        if not requests:
            return []
        with _os_errors():
            signers = self.issuers()
            _check_signer(self._files.certificate, signers[0])
            with self._at_work(signers) as desk:
                answers = desk.sign(_batches(requests, self._key.batch_size))
        return [answers[position] for position in range(len(requests))]

    def recall(self, requests: Sequence[SignRequest], since: datetime) -> list[Issued | None]:
        """Find what a run signed for exactly these keys and usages before it was killed, once its `openssl ca` has ended."""
        with _os_errors():
            signers = self.issuers()
            with self._at_work(signers) as desk:
                revoked = desk.database.revoked()  # an operator may revoke a certificate that no node got
                found = {
                    key_and_usages(leaf): leaf
                    for leaf in desk.database.issued_since(since)
                    if leaf.serial_number not in revoked
                }
        chain = tuple(signer for signer in signers if signer.issuer != signer.subject)
        leaves = [found.get(asked_key_and_usages(request.csr_pem, request.spec.ekus)) for request in requests]
        return [Issued(leaf=leaf, intermediates=chain) if leaf is not None else None for leaf in leaves]

    def revoke(self, certificate: x509.Certificate) -> None:
        """Mark a certificate of this CA in the index, with reason `superseded`; an unknown certificate is added."""
        with _os_errors():
            signers = self.issuers()
            if not is_signed_by(certificate, signers[0]):
                raise BackendRefusedError("wanted a certificate of this CA to revoke, found another CA's")
            with self._at_work(signers) as desk:
                desk.revoke(certificate)

    def is_revoked(self, certificate: x509.Certificate) -> bool:
        """Look up a certificate of this CA in the index, by serial number."""
        return certificate.serial_number in self.revoked() and certificate.issuer == self.issuers()[0].subject

    def revoked(self) -> frozenset[int]:
        """The serial numbers that are revoked in the index; another CA may use the same numbers."""
        self.issuers()  # so that a missing CA directory is the same error in every method
        with _os_errors():
            return self._database().revoked()

    def check(self, specs: Sequence[CertificateSpec]) -> dict[str, list[Violation]]:  # noqa: ARG002
        """Find out whether a run could begin: program, certificate, database, key; the usages are always ours."""
        with _os_errors():
            signer = self.issuers()[0]
            _check_signer(self._files.certificate, signer)
            self._openssl.check_version()
            self._database().check()
            with self._folder(signer) as folder:
                if self._openssl.public_key(folder) != spki(signer.public_key()):
                    raise self._openssl.key_of_another_ca()
        return {}

    def issuers(self) -> list[x509.Certificate]:
        """The certificates in the CA's certificate file."""
        path = self._files.certificate
        try:
            failed = f"wanted the CA's certificate in {path}, found"
            with reasons(LocalFileError, failed, hint=CA_PLACE_HINT), open_regular(path) as file:
                return x509.load_pem_x509_certificates(file.read())
        except ValueError as e:
            text = f"{path} holds no PEM certificate; it has to be the CA's"
            raise LocalFileError(text, hint=CA_PLACE_HINT) from e

    def _database(self) -> Database:
        index = self._files.database.resolve()  # openssl would replace a link by a file
        if not _PLAIN_NAME.fullmatch(index.name):
            wanted = "a database whose file name has only letters, digits, '.', '_' and '-'"
            raise BackendRefusedError(f"wanted {wanted}, found {index.name!r}")
        return Database(index=index, new_certs_dir=self._files.new_certs_dir.resolve())

    @contextmanager
    def _at_work(self, signers: list[x509.Certificate]) -> Iterator[_Desk]:
        """Lock the database, and repair what a killed run left."""
        database = self._database()
        with (
            self._working,
            database.locked(self._settings.timeout) as lock,
            self._folder(signers[0], database) as folder,
        ):
            desk = _Desk(self._openssl, database, signers, folder, lock)
            desk.recover()
            yield desk

    @contextmanager
    def _folder(self, signer: x509.Certificate, locked: Database | None = None) -> Iterator[Path]:
        """A private folder to run in: our own config, the certificate that was checked, links to the rest."""
        # 0700, and in memory where Linux offers that: a run may have a thousand CSR files
        in_memory = "TMPDIR" not in os.environ and os.access(_MEMORY, os.W_OK | os.X_OK)
        parent = Path(_MEMORY if in_memory else tempfile.gettempdir())
        database = locked or self._database()
        if locked is not None:
            _sweep(parent, locked)
        with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent) as name:
            folder = Path(name)
            folder.joinpath("database").symlink_to(database.index.parent)
            if locked is not None:
                folder.joinpath("newcerts").symlink_to(locked.new_certs_dir)
            names = {"index": database.index.name, "private_key": self._key.reference}
            sections = [SECTION.format(usage=usage, ekus=ekus) for usage, ekus in EKUS.items()]
            config = "".join([self._key.config, _CONFIG.format(digest=self._settings.digest, **names), *sections])
            folder.joinpath("openssl.cnf").write_text(config, encoding="ascii")
            folder.joinpath("ca.crt").write_bytes(signer.public_bytes(Encoding.PEM))
            if isinstance(self._key, KeyFile):
                folder.joinpath(self._key.reference).symlink_to(self._key.path)
            yield folder


def _sweep(parent: Path, locked: Database) -> None:
    """
    Remove folders of killed runs.

    A folder belongs to the process that holds the database's lock; a check without the lock keeps one for minutes.
    """
    for path in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another user's
            status, is_for_us = path.lstat(), path.joinpath("database").readlink() == locked.index.parent
            is_left = path.joinpath("newcerts").is_symlink() or time.time() - status.st_mtime > _LONGEST_CHECK
            if status.st_uid == os.geteuid() and is_for_us and is_left:
                shutil.rmtree(path)


@dataclass(slots=True)
class _Desk:
    """The work of one `sign`, all of it while the database is locked."""

    openssl: Openssl
    database: Database
    signers: list[x509.Certificate]
    folder: Path
    lock: int
    failed_runs: int = 0  #: How many runs in a row failed.
    fatal: BackendError | None = None  #: Why nothing more is signed.

    def recover(self) -> None:
        """Repair what a killed run left: no index, or certificates of this CA that are in no index."""
        self.database.check_folders()
        self.database.put_right()
        index, now, signer = self.database.read(), datetime.now(UTC), self.signers[0]
        for path, leaf in self.database.orphans(index):
            if leaf.not_valid_after_utc <= now or not is_signed_by(leaf, signer):
                continue  # sites archive expired rows, which do no harm
            # openssl adds the row itself, so that the certificate can be revoked by its number
            outcome = self._run("-extensions", "client", "-valid", f"newcerts/{path.name}")
            self.database.adopt(index.status)
            index = self.database.read()
            if int(path.stem, 16) not in index.serials:
                raise self.openssl.failure(outcome)
            log.warning("%s was signed by a run that did not live to record it; it is recorded now", path)

    def revoke(self, certificate: x509.Certificate) -> None:
        before = self.database.read()
        self.database.back_up(before)
        self.folder.joinpath("superseded.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
        outcome = self._run("-revoke", "superseded.crt", "-crl_reason", "superseded")
        self.database.adopt(before.status)
        self.database.sync([])
        if outcome.code != 0 and "Already revoked" not in outcome.messages:
            raise self.openssl.failure(outcome)

    def sign(self, batches: Sequence[_Batch]) -> _Answers:
        """Sign batch by batch; requests that were not tried get the error that ended the run."""
        answers: _Answers = {}
        for alike, requests in batches:
            orders, refused = _checked_all(requests)
            answers |= refused | self._sign_or_halve(alike, orders)
        self.database.sync([answer.leaf.serial_number for answer in answers.values() if isinstance(answer, Issued)])
        if self.fatal is None:
            return answers
        if not any(isinstance(answer, Issued) for answer in answers.values()):
            raise self.fatal
        self.fatal.is_for_all = True
        return dict.fromkeys((position for _, requests in batches for position, _ in requests), self.fatal) | answers

    def _sign_or_halve(self, alike: _Alike, orders: Sequence[CheckedCsr]) -> _Answers:
        """Halve a run that fails as a whole until the CSR at fault is found: only that CSR is refused."""
        if not orders or self.fatal:
            return {}
        try:
            answers = self._run_batch(alike, orders)
        except BackendError as e:
            self.failed_runs += 1
            failure = e
        else:
            self.failed_runs = 0
            return answers
        if failure.is_for_all:
            self.fatal = failure
            return {}
        if self.failed_runs == _FAILED_RUNS:
            self.fatal = BackendRefusedError(f"too many CSRs stop openssl, the last one: {failure}")
        if len(orders) == 1:
            return {orders[0].position: failure}
        middle = len(orders) // 2
        return self._sign_or_halve(alike, orders[:middle]) | self._sign_or_halve(alike, orders[middle:])

    def _run_batch(self, alike: _Alike, orders: Sequence[CheckedCsr]) -> _Answers:
        """Run one batch (BackendError: it issued nothing)."""
        try:
            with _os_errors():
                outcome, serials = self._run_recorded(alike, orders)
        except BackendError as e:
            e.is_for_all = True
            raise
        failure = None if outcome.code == 0 else self.openssl.failure(outcome)
        if failure and not serials:
            raise failure
        if outcome.code is None:
            self.fatal = failure
        return self._read(orders, serials)

    def _run_recorded(self, alike: _Alike, orders: Sequence[CheckedCsr]) -> tuple[ProcessEnd, list[int]]:
        """Run one batch; return how it ended, and the serial numbers that it added to the database."""
        before = self.database.read()
        self.database.check_space(len(before.data), len(orders))
        copy = self.database.back_up(before)
        names = [f"{number}.csr" for number in range(len(orders))]
        for name, order in zip(names, orders, strict=True):  # a later batch overwrites these
            self.folder.joinpath(name).write_bytes(order.csr_pem)
        # never -out a real file: openssl empties it first, and keeps only the last of several certificates in it
        fixed = ("-notext", *self._extensions(alike), *self._dates(alike), "-out", "/dev/null")
        outcome = self._run(*fixed, "-infiles", *names, csrs=len(names))
        return outcome, self.database.added(before, copy)

    def _read(self, orders: Sequence[CheckedCsr], serials: Sequence[int]) -> _Answers:
        """Match new certificates to requests by public key: a CSR that openssl skips shifts the order of the others."""
        waiting: dict[bytes, list[int]] = defaultdict(list)
        for order in reversed(orders):
            waiting[order.public_key].append(order.position)
        chain = tuple(signer for signer in self.signers if signer.issuer != signer.subject)
        answers: _Answers = {}
        lost, error = [], self.fatal
        try:
            for serial in serials:
                leaf = self.database.certificate(serial)
                if leaf is None:
                    lost.append(file_name(serial))
                elif positions := waiting.get(spki(leaf.public_key())):
                    answers[positions.pop()] = Issued(leaf=leaf, intermediates=chain)
        except BackendError as e:
            error = e
        missing = [position for positions in waiting.values() for position in positions]
        return answers | dict.fromkeys(missing, error or _not_issued(lost))

    def _extensions(self, alike: _Alike) -> list[str]:
        """The arguments for the usage's section, or for a file whose section also has the names."""
        if alike.names is None:
            return ["-extensions", alike.usage]
        section = SECTION.format(usage="named", ekus=EKUS[alike.usage])
        self.folder.joinpath("named.cnf").write_text(section + alike.names.openssl_sans, encoding="ascii")
        subject = ["-subj", f"/CN={alike.names.common_name}"] if alike.names.common_name else []
        return ["-extfile", "named.cnf", "-extensions", "named", *subject]

    def _dates(self, alike: _Alike) -> list[str]:
        """Dates within the CA's own, which openssl does not check; with names beside the CSR, hardly backdated."""
        now, signer = datetime.now(UTC), self.signers[0]
        backdated = _BACKDATED if alike.names is None else _BACKDATED_LITTLE
        begin = max(now - backdated, signer.not_valid_before_utc)
        end = min(now + alike.validity, signer.not_valid_after_utc)
        return ["-startdate", _asn1_time(begin), "-enddate", _asn1_time(end)]

    def _run(self, *arguments: str, csrs: int = 0) -> ProcessEnd:
        fixed = ("-config", "openssl.cnf", "-name", "bridge", "-batch")
        # if we are killed, the process keeps the lock until it ends
        return self.openssl.run(self.folder, "ca", *fixed, *arguments, inherited=[self.lock], csrs=csrs)


def _not_issued(lost: Sequence[str]) -> BackendError:
    if lost:
        return BackendUnavailableError(
            f"wanted a whole certificate in each new file of new_certs_dir, found none in {', '.join(lost[:3])}",
            hint="a full disk does that; make room",
        )
    return BackendRefusedError("openssl issued nothing for this CSR, as it does for a CSR with a bad signature")


def _batches(requests: Sequence[SignRequest], size: int) -> list[_Batch]:
    groups: dict[_Alike, list[tuple[int, SignRequest]]] = defaultdict(list)
    for position, request in enumerate(requests):
        groups[_Alike(request.spec.usage, request.validity, request.names)].append((position, request))
    return [
        (alike, group[start : start + size]) for alike, group in groups.items() for start in range(0, len(group), size)
    ]


def _checked_all(requests: Sequence[tuple[int, SignRequest]]) -> tuple[list[CheckedCsr], _Answers]:
    """Split requests into orders that may be signed, and answers to those that may not."""
    orders: list[CheckedCsr] = []
    refused: _Answers = {}
    for position, request in requests:
        try:
            orders.append(checked(position, request))
        except BackendRefusedError as e:
            refused[position] = e
    return orders, refused


def _check_signer(path: Path, signer: x509.Certificate) -> None:
    """Check that the CA may sign now: openssl signs with any certificate, even an expired one."""
    now, wrong, hint = datetime.now(UTC), [], ""
    if not signer.not_valid_before_utc <= now < signer.not_valid_after_utc:
        dates = f"{minute(signer.not_valid_before_utc)} to {minute(signer.not_valid_after_utc)}"
        wrong.append(f"wanted one that is valid now ({minute(now)}), found {dates}")
        hint = "is this machine's clock right? if it is, have the CA's owner renew that certificate first"
    constraints, usage = extension(signer, x509.BasicConstraints), extension(signer, x509.KeyUsage)
    if not constraints or not constraints.ca:
        wrong.append("it has no CA:TRUE")
    if usage and not usage.key_cert_sign:
        wrong.append("it has no key usage keyCertSign")
    if wrong:
        raise BackendRefusedError(f"the CA's certificate {path}: {'; '.join(wrong)}", hint=hint)


def _asn1_time(moment: datetime) -> str:
    """UTCTime to the end of 2049, then GeneralizedTime (RFC 5280 §4.1.2.5)."""
    return moment.strftime("%y%m%d%H%M%SZ" if moment.year < 2050 else "%Y%m%d%H%M%SZ")  # noqa: PLR2004


@contextmanager
def _os_errors() -> Iterator[None]:
    """Turn the operating system's errors into the contract's."""
    try:
        yield
    except OSError as e:
        text = f"{e.filename or 'openssl ca'}: {e.strerror}"
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BackendUnavailableError(text, hint="make room") from e
        hint = "run as the CA's own user, who must be able to read and write there"
        is_denied = isinstance(e, PermissionError)
        raise LocalFileError(text, hint=hint if is_denied else "look at it as the CA's own user, then try again") from e


# --- CSRs before `openssl ca` sees them ------------------------------------------------------------------------------

_SAN = x509.SubjectAlternativeName.oid
_EXTENSION_REQUEST = x509.ObjectIdentifier("1.2.840.113549.1.9.14")
# With challengePassword and unstructuredName, which get into no certificate. Not Microsoft's 1.3.6.1.4.1.311.2.1.14:
# openssl also takes extensions from it, and cryptography does not show them as extensions.
_ATTRIBUTES = {_EXTENSION_REQUEST, *map(x509.ObjectIdentifier, ("1.2.840.113549.1.9.7", "1.2.840.113549.1.9.2"))}
_STRINGS = {"UTF8String", "PrintableString", "T61String", "BMPString"}


@dataclass(frozen=True, slots=True)
class CheckedCsr:
    """A CSR that may be signed, and its place among the requests."""

    position: int
    csr_pem: bytes
    public_key: bytes


def checked(position: int, request: SignRequest) -> CheckedCsr:
    """Check that a CSR can't stop the others of its run, and brings only subject and SANs into a certificate."""
    try:
        csr = request.csr
        wrong = _wrong_with(request.csr_pem, csr, request.names)
    except UNREADABLE as e:
        wrong = f"a well-formed CSR, found: {e}"
    if wrong:
        raise BackendRefusedError(f"wanted {wrong}", hint="make a new CSR")
    # encoded again, so that openssl reads what was checked
    return CheckedCsr(position, csr.public_bytes(Encoding.PEM), spki(csr.public_key()))


def _wrong_with(pem: bytes, csr: x509.CertificateSigningRequest, names: Names | None) -> str:
    if (blocks := pem.count(b"-----BEGIN ")) != 1:
        return f"one PEM block, found {blocks}"  # openssl signs the first and says nothing
    attributes = [attribute.oid for attribute in csr.attributes]
    others = {oid.dotted_string for oid in attributes if oid not in _ATTRIBUTES}
    others |= {extension.oid.dotted_string for extension in csr.extensions if extension.oid != _SAN}
    if others:
        return f"a CSR that asks for SANs and nothing else, found {', '.join(sorted(others))} too"
    if attributes.count(_EXTENSION_REQUEST) > 1:
        return "one list of extensions, found several"
    subject = list(csr.subject)
    if names is not None:
        wrong = "" if names.are_plain else "names of plain characters, found others"
        return "no names in this CSR, found some" if subject or list(csr.extensions) else wrong
    if not subject:
        return "a subject, found an empty one"
    unread = [
        f"{attribute.rfc4514_attribute_name} as {_string_type(attribute)}"
        for attribute in subject
        if not _is_readable(attribute)
    ]
    return f"a subject in strings that openssl ca reads, found {', '.join(unread)}" if unread else ""


def _is_readable(attribute: x509.NameAttribute[str | bytes]) -> bool:
    """Whether openssl ca reads the string; any other, or an e-mail address that is no IA5String, stops its run."""
    kind = _string_type(attribute)
    if kind == "IA5String":
        return isinstance(attribute.value, str) and attribute.value.isascii()
    return not kind or (kind in _STRINGS and attribute.oid != NameOID.EMAIL_ADDRESS)


def _string_type(attribute: x509.NameAttribute[str | bytes]) -> str:
    """The ASN.1 string type; empty if the library no longer shows it: then halving a run finds unreadable CSRs."""
    return getattr(getattr(attribute, "_type", None), "name", "")
