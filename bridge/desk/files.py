"""The files of `sign`: policy, bundles and CSRs in, answers out, and finished bundles into the archive."""

from __future__ import annotations

import contextlib
import errno
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from bridge.ca import registry, signer_of
from bridge.ca.retry import NoWaitPolicy
from bridge.contract import Issued
from bridge.desk import csr_directory, node_inventory
from bridge.desk.desk import Delivery, Desk, Job, Observer, Origin, windows
from bridge.desk.node_identity import Identity
from bridge.desk.policy import Policy, parse
from bridge.desk.records import Archive, Journal, NewFile, archive_directory
from bridge.desk.workers import ReadBundle, Workers, read_all
from bridge.errors import BridgeError, SettingsError, SettingsProblem
from bridge.pki import signatures
from bridge.pki.budget import MOST_BYTES
from bridge.pki.bundle import CARRIED, AnswerBundle, BundleError, IncompleteBundleError, RequestBundle
from bridge.pki.bundle_format import answer_suffix, digest, dumps, file_names, loads, loads_request
from bridge.pki.certificates import load_pem_certificates
from bridge.pki.expiry import is_due, minute
from bridge.settings.load import DEFAULT_FILE
from bridge.settings.tables import RenewalSettings, Settings
from bridge.specs import AUTHORITIES
from bridge.state import Store, audit
from bridge.system.console import ROOT_HINT, log
from bridge.system.files import how_to_begin, remove_unfinished, version
from bridge.system.locks import lock
from bridge.system.paths import (
    NoCaFileError,
    UnreadableError,
    mounted_at,
    mounts,
    open_secret,
    own_text,
    read,
    read_ca_file,
    read_once,
    real_path,
)
from bridge.words import one_line

POLICY_NAME = "desk-policy.toml"
#: The file systems to be mounted.
FSTAB = Path("/etc/fstab")
#: A file that has not changed for this long is no longer being copied.
STALE = timedelta(minutes=10)
_ANSWER_MODE = 0o644  #: Certificates are public, and another user fetches them.


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `sign`."""

    source: Path
    out: Path | None = None
    policy: Path | None = None
    archive: Path | None = None
    without_proof: frozenset[str] = frozenset()
    node: str = ""  #: For a directory of CSRs, which does not name a node.
    cluster: str = ""

    def assert_usable(self, policy: Policy) -> None:
        """Refuse a name of no certificate, and a missing source."""
        known = dict.fromkeys([*CARRIED, *policy.certificates])  # including the policy's further pairs
        unknown = sorted(self.without_proof - known.keys())
        if unknown:
            wanted = f"one of {', '.join(known)}"
            raise SettingsError([SettingsProblem("--without-proof", wanted, ", ".join(unknown))])
        if not self.source.exists():
            raise BridgeError(f"{self.source}: there is no such file or directory")


_FROM_NODE = "have it from a node: ca.crt in its PKI directory"


def policy_path(settings: Settings) -> Path:
    """The policy's path, unless the command line names another."""
    return (settings.source.file or DEFAULT_FILE).with_name(POLICY_NAME)


def load_policy(settings: Settings, path: Path | None) -> Policy:
    """Read the policy file that was named, or else the policy beside the settings."""
    path = path or policy_path(settings)
    policy = parse(own_text(path, "a policy file", how_to_begin(f"desk/{POLICY_NAME}", path)), path)
    former = {name: _ca_of(Path(file), "desk.former_cas", _FROM_NODE) for name, file in policy.desk.former_cas.items()}
    hint = "get it from the CA that signs the clients' certificates"
    est_cas = {
        label: _ca_of(rules.clients_ca, f"est.{label}.clients_ca", hint)
        for label, rules in policy.est.items()
        if rules.clients_ca is not None
    }
    policy = replace(policy, former=former, est_cas=est_cas)
    if (inventory := policy.desk.inventory) is None:
        return policy
    hint = how_to_begin("gateway/inventory.toml", inventory)
    text = own_text(inventory, "the inventory that desk.inventory names", hint)
    return replace(policy, nodes=node_inventory.parse(text, inventory))


def _ca_of(path: Path, setting: str, hint: str) -> list[x509.Certificate]:
    text = own_text(path, f"the CA certificate that {setting} names", hint)
    try:
        return load_pem_certificates(text.encode())
    except ValueError as e:
        raise SettingsError([SettingsProblem("", "a CA certificate", str(e), path)]) from None


_A_FILE = "a bundle is carried as a file; standard output has what is in it for people"


def assert_free(path: Path, kind: type[AnswerBundle | RequestBundle], node: str, cluster: str) -> None:
    """Refuse to overwrite anything but an older bundle of this kind and node: no link, no device, no other file."""
    what = "request" if kind is RequestBundle else "answer"
    if path.name == "-":
        raise SettingsError([SettingsProblem("", f"the name of a file for the {what} bundle", "-")], hint=_A_FILE)
    found = "something else"
    with contextlib.suppress(FileNotFoundError, UnreadableError, BundleError):
        if isinstance(there := loads(read_once(path)[0]), kind):
            if (there.node, there.cluster) == (node, cluster):
                return
            found = f"that of node {one_line(there.node)}, cluster {one_line(there.cluster)}"
    if os.path.lexists(path):
        article = "an" if what == "answer" else "a"
        wanted = f"no file, or {article} {what} bundle of before (node {node}, cluster {cluster})"
        raise BridgeError(f"{path}: wanted {wanted}, found {found}", hint="name another file")


def load_answer_key(policy: Policy) -> PrivateKeyTypes | None:
    """Load the policy's key for the desk's answers."""
    path = policy.desk.answer_key
    return None if path is None else load_signing_key(path, "desk.answer_key", "answers")


def load_signing_key(path: Path, setting: str, what: str) -> PrivateKeyTypes:
    """Read our private key for signing messages (`what`), such as a desk's answers; `setting` names it."""
    try:
        exposed = open_secret(path)
    except OSError as e:
        wanted = f"the private key that {what} are signed with"
        raise SettingsError([SettingsProblem(setting, wanted, str(e.strerror), path)]) from None
    if exposed is not None:
        problem = SettingsProblem(setting, exposed.wanted, exposed.found, exposed.path)
        raise SettingsError([problem], hint=exposed.hint)
    try:
        data = read(path)
        found = "nothing" if data is None else "something else"
        key = load_pem_private_key(data or b"", None)
        signatures.sign(key, b"")
    except (UnreadableError, ValueError, TypeError, UnsupportedAlgorithm) as e:
        found = str(e) if isinstance(e, UnreadableError) else found
        wanted = "an RSA, ECDSA or Ed25519 private key in PEM, not encrypted"
        raise SettingsError([SettingsProblem(setting, wanted, found, path)]) from None
    return key


def known_cas(settings: Settings) -> dict[str, tuple[x509.Certificate, ...]]:
    """The CA certificates on this machine, by authority: the node's own, and with a desk's policy, the desk's."""
    policy = load_policy(settings, None) if policy_path(settings).exists() else None
    found = {name: tuple(dict.fromkeys(_cas_of(settings, policy, name))) for name in AUTHORITIES}
    return {name: certificates for name, certificates in found.items() if certificates}


def _cas_of(settings: Settings, policy: Policy | None, authority: str) -> Iterator[x509.Certificate]:
    yield from _in_file(settings.node.pki_dir / AUTHORITIES[authority].certificate_file)
    if policy is not None:
        if policy.desk.ca_dir is not None:
            yield from _in_file(policy.desk.ca_dir / AUTHORITIES[authority].certificate_file)
        if authority in settings.authorities:
            yield from _of_backend(settings, authority)


def _in_file(path: Path) -> tuple[x509.Certificate, ...]:
    """The certificates in a CA file; none without the file, since a desk may have no /etc/kubernetes."""
    try:
        return read_ca_file(path)
    except NoCaFileError:
        return ()
    except UnreadableError as e:
        log.warning("%s: wanted a CA certificate, found: %s", path, e)
        return ()


def _of_backend(settings: Settings, authority: str) -> tuple[x509.Certificate, ...]:
    configured = registry.configured(settings, [authority])[authority]
    try:
        return signer_of(configured, NoWaitPolicy())
    except BridgeError as e:
        log.warning("%s: wanted the certificate of %s, found: %s", configured.label, authority, e)
        return ()


@contextlib.contextmanager
def books_open(
    settings: Settings, store: Store, now: Callable[[], datetime], wait: timedelta, holder: str
) -> Iterator[tuple[Journal, audit.Record]]:
    """Open the journal and the audit log for one run of the desk, which locks the state directory (LockedError)."""
    try:
        store.prepare()
    except (PermissionError, BridgeError) as e:
        if isinstance(e, BridgeError) and e.hint != ROOT_HINT:
            raise
        text = f"{store.directory}: there is no state directory of the desk's user {os.geteuid()}"
        hint = f"as root: install -d -m 0700 -o {os.geteuid()} {store.directory}, after a look at who else uses it"
        raise BridgeError(text, hint=hint) from None
    with lock(store.lock, holder, wait):
        journal = Journal(store.desk_answers, now())
        with audit.Record(store, settings.audit) as record:
            yield journal, record


def job_of(
    bundle: RequestBundle,
    request_digest: str,
    data: bytes,
    archive: Archive,
    *,
    label: str,
    where: str,
    conclude: Callable[[AnswerBundle, bytes, Identity], None],
    out: Path | None = None,
) -> Job:
    """
    The desk's job for a bundle received as `data`; certificates that were signed before come from the archive.

    `where` is the answer's destination in messages, `out` its file, if any; `conclude` gets the answer and its bytes when
    all files are safe on disk.
    """

    def delivery(answer: AnswerBundle, identity: Identity) -> Delivery:
        written = dumps(answer)
        files = archive.files(bundle, request_digest, data, answer, written, is_proven=identity.is_proven)
        if out is not None:
            files.insert(0, NewFile(path=out, data=written, mode=_ANSWER_MODE))
        return Delivery(where=where, files=files, conclude=lambda: conclude(answer, written, identity))

    answered = archive.answers(bundle)
    return Job(
        bundle=bundle, digest=request_digest, label=label, delivery=delivery, size_bytes=len(data), answered=answered,
        owners=archive.owners(bundle),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _InboxFile:
    path: Path
    data: bytes
    status: os.stat_result


#: Bundles in an inbox for which processes begin: their start takes as long as the work on a few bundles.
_WORTH_PROCESSES = 30
#: Bundles that a worker reads at once, and how many such lots are read ahead, while CAs sign.
_CHUNK, _LARGEST_CHUNK_BYTES, _CHUNKS_AHEAD = 10, 256 << 10, 6

#: Reports a skipped file, and why it is skipped.
PassedOver = Callable[[str, BridgeError], None]


class Session:
    """One run of `sign` over its files."""

    def __init__(
        self, settings: Settings, policy: Policy, options: Options, now: Callable[[], datetime], passed_over: PassedOver
    ) -> None:
        self._settings = settings
        self._options = options
        self._now = now
        self._passed_over = passed_over
        self._store = Store(settings.node.state_dir)
        directory = options.archive or policy.desk.archive or archive_directory(self._store)
        self._archive = Archive(directory, self._store.directory)
        self._seen: set[str] = set()  #: Digests.
        self._processes = Workers()

    def run(self, desk: Desk, wait: timedelta, observed: Callable[[int], AbstractContextManager[Observer]]) -> int:
        """Sign what may be signed, and return the number of bundles; `observed` makes an observer from that number."""
        with contextlib.ExitStack() as stack:
            books = books_open(self._settings, self._store, self._now, wait, "ca-bridge sign")
            journal, record = stack.enter_context(books)
            jobs, total = self.work(desk)
            self._archive.prepare()
            if self._options.out is not None and self._options.out.is_dir():
                ours = answer_suffix(self._settings.authorities)  # another desk may be writing to it
                remove_unfinished(self._options.out, f".*-{'[0-9a-f]' * 32}{ours}.*")
            if total >= _WORTH_PROCESSES:
                stack.enter_context(contextlib.closing(self._processes))
                self._processes.begin(len(os.sched_getaffinity(0)))
            desk.run(jobs, journal, record, stack.enter_context(observed(total)), self._processes)
        return total

    def work(self, desk: Desk) -> tuple[Iterator[Job], int]:
        """Find the bundles to sign, and their number, without writing anything."""
        source, out = self._options.source, self._options.out
        if not source.is_dir():
            beside = source.with_name(f"{source.stem}{answer_suffix(self._settings.authorities)}")
            target = out or beside
            assert_writable(target.parent)
            return iter([self._one_bundle(source, target)]), 1
        if self._options.node or self._options.cluster or (out is None and csr_directory.find(source)):
            return iter([self._csrs(desk)]), 1
        if out is None or out.resolve() == source.resolve():
            raise BridgeError(f"{source}: the inbox is no directory for the answers", hint="name it with -o")
        for directory in (source, out):
            _assert_mounted(directory)
        assert_writable(out)
        names = _names_in(source)
        if not names:
            if any(not path.is_relative_to(self._archive.directory) for path in csr_directory.find(source)):
                raise _whose(source)
            self._assert_none_below(source, out)
        return self._inbox(out, self._read_ahead(desk, self._files(source, names))), len(names)

    def _assert_none_below(self, inbox: Path, outbox: Path) -> None:
        """Refuse an inbox whose bundles are all one directory deeper: nothing would be signed."""
        ours = {self._archive.directory.resolve(), outbox.resolve()}
        for path in sorted(inbox.glob("[!.]*/*.json")):
            if path.parent.resolve() not in ours:
                text = f"{path.parent}: wanted request bundles in the inbox itself, found files in a directory below it"
                raise BridgeError(text, hint=f"move them to {inbox}, or name that directory")

    # --- one bundle, or an inbox of them ------------------------------------------------------------------------------

    def _one_bundle(self, path: Path, out: Path) -> Job:
        try:
            data = read(path) or b""
            bundle = loads_request(data)
        except UnreadableError as e:
            raise BridgeError(f"{path}: wanted a request bundle, found: {e}") from None
        except BundleError as e:
            raise BridgeError(f"{path}: {e}", hint=e.hint) from None
        assert_free(out, AnswerBundle, bundle.node, bundle.cluster)
        return self._job(bundle, digest(bundle), data, path, out, lambda: None)

    def _read_ahead(self, desk: Desk, files: Iterator[_InboxFile]) -> Iterator[tuple[_InboxFile, ReadBundle | None]]:
        """Each file, in order, with what a worker has read ahead; None: no worker did, or it is no request."""
        if not self._processes:
            yield from ((file, None) for file in files)
            return
        by, ahead = desk.judgement(), deque[tuple[list[_InboxFile], Future[list[ReadBundle | None] | None]]]()

        def first() -> Iterator[tuple[_InboxFile, ReadBundle | None]]:
            chunk, answer = ahead.popleft()
            return zip(chunk, answer.result() or [None] * len(chunk), strict=True)

        for chunk in windows(files, lambda file: (1, len(file.data)), _CHUNK, _LARGEST_CHUNK_BYTES):
            by = replace(by, now=self._now())
            ahead.append((chunk, self._processes.submit(read_all, [file.data for file in chunk], by)))
            if len(ahead) > _CHUNKS_AHEAD:
                yield from first()
        while ahead:
            yield from first()

    def _inbox(self, outbox: Path, files: Iterable[tuple[_InboxFile, ReadBundle | None]]) -> Iterator[Job]:
        for file, by_worker in files:
            try:
                job = self._inbox_job(file, outbox, by_worker)
            except BridgeError as e:
                self._passed_over(one_line(file.path), e)
            else:
                if job is not None:
                    yield job

    def _files(self, inbox: Path, names: Sequence[str]) -> Iterator[_InboxFile]:
        """Read each file once, so that the judged bytes are archived."""
        for path in map(inbox.joinpath, names):
            if path.suffix == ".csr":
                hint = "kubeadm's CSRs are signed in a directory of their own: `sign DIR --node NAME --cluster NAME`"
                self._passed_over(one_line(path), BridgeError("wanted a request bundle, found a CSR", hint=hint))
                continue
            try:
                yield _InboxFile(path, *read_once(path))
            except FileNotFoundError:
                continue  # removed meanwhile
            except UnreadableError as e:
                text = f"wanted a file of at most {MOST_BYTES} bytes with a bundle, found: {e}"
                self._passed_over(one_line(path), BridgeError(text))

    def _inbox_job(self, file: _InboxFile, outbox: Path, by_worker: ReadBundle | None) -> Job | None:
        try:
            bundle = by_worker.bundle if by_worker is not None else loads(file.data)
        except IncompleteBundleError as e:
            if self._now().timestamp() - file.status.st_mtime > STALE.total_seconds():
                written = minute(datetime.fromtimestamp(file.status.st_mtime, UTC))
                raise BridgeError(f"not whole since {written}: {e}", hint=e.hint) from None
            log.info("%s: left alone, as it is still being copied", one_line(file.path))
            return None
        if isinstance(bundle, AnswerBundle):
            return None  # inbox and outbox may be the same directory
        request_digest = by_worker.digest if by_worker is not None else digest(bundle)
        if request_digest in self._seen:
            log.info("%s: a second copy of the same bundle; the next run archives it", one_line(file.path))
            return None
        self._seen.add(request_digest)
        out = outbox / file_names(bundle.node, request_digest, self._settings.authorities)[1]
        job = self._job(bundle, request_digest, file.data, file.path, out, lambda: _remove(file.path, file.status))
        return replace(job, foreseen=by_worker.verdicts) if by_worker is not None else job

    def _job(
        self, bundle: RequestBundle, request_digest: str, data: bytes, path: Path, out: Path, remove: Callable[[], None]
    ) -> Job:
        job = job_of(
            bundle, request_digest, data, self._archive,
            label=one_line(path), where=str(out), conclude=lambda *_: remove(), out=out,
        )  # fmt: skip
        return replace(job, earlier=_earlier(out, request_digest))

    # --- kubeadm's CSRs -----------------------------------------------------------------------------------------------

    def _csrs(self, desk: Desk) -> Job:
        source, target, now = self._options.source, self._options.out or self._options.source, self._now()
        if not self._options.node or not self._options.cluster:
            raise _whose(source)
        csrs = csr_directory.load(
            source,
            node=self._options.node,
            cluster=self._options.cluster,
            validity=self._settings.renewal.validity,
            created=now.replace(microsecond=0),
        )
        earlier = _beside(csrs, target, self._settings.renewal, now)

        def delivery(answer: AnswerBundle, _: Identity) -> Delivery:
            issued = {name: issued for name, issued in answer.answers.items() if isinstance(issued, Issued)}
            write = partial(csr_directory.deliver, csrs, target, issued, desk.anchor("ca"))
            return Delivery(where=str(target), files=(), conclude=write)

        return Job(
            bundle=csrs.bundle, digest=digest(csrs.bundle), label=one_line(source), delivery=delivery, earlier=earlier,
            owners=self._archive.owners(csrs.bundle), origin=Origin(names_node=True),
        )  # fmt: skip


def _names_in(inbox: Path) -> list[str]:
    """The names of files in the inbox, sorted; directories and hidden files are no bundles."""
    return sorted(
        entry.name
        for entry in os.scandir(inbox)
        if not entry.name.startswith(".") and not entry.is_dir(follow_symlinks=False)
    )


def _assert_mounted(directory: Path) -> None:
    """Refuse an inbox on a file system that is not mounted, since it looks empty."""
    mounted = set(map(Path, mounts()))
    for listed in _to_be_mounted() if mounted else ():
        place = real_path(listed.parent) / listed.name
        if place not in mounted:  # looking at a mount whose server is gone never ends
            place = real_path(place)
        if place not in mounted and real_path(directory).is_relative_to(place):
            raise BridgeError(f"{directory}: it is not mounted, although {FSTAB} has {place}")


def assert_writable(outbox: Path) -> None:
    """Refuse a directory that answers can't be written to, before anything is signed."""
    if not outbox.is_dir():
        hint = "make or mount it, or name another place with -o"
        raise BridgeError(f"{outbox}: there is no such directory for the answers", hint=hint)
    if os.statvfs(outbox).f_flag & os.ST_RDONLY:
        raise BridgeError(f"{outbox}: can't write answers there: {os.strerror(errno.EROFS)}")
    if not os.access(outbox, os.W_OK | os.X_OK, effective_ids=True):
        text = f"{outbox}: can't write answers there: it is a directory of user {outbox.stat().st_uid}"
        raise BridgeError(text, hint=f"as root: chown {os.geteuid()} {outbox}")


def _to_be_mounted() -> set[Path]:
    try:
        lines = FSTAB.read_text(errors="replace").splitlines()
    except OSError:
        return set()
    places = [fields[1] for line in lines if len(fields := line.split()) > 1]
    return {Path(mounted_at(place)) for place in places if place.startswith("/")}


def _whose(source: Path) -> BridgeError:
    return BridgeError(
        f"{source}: CSRs do not say whose they are, and --node and --cluster are missing",
        hint="name them with --node and --cluster",
    )


def _earlier(path: Path, request_digest: str) -> dict[str, Issued]:
    """Certificates that an earlier run delivered for the same request; they are verified later."""
    with contextlib.suppress(UnreadableError, BundleError):
        answer = loads(read(path) or b"")
        if isinstance(answer, AnswerBundle) and answer.request_digest == request_digest:
            return {name: issued for name, issued in answer.answers.items() if isinstance(issued, Issued)}
    return {}


def _beside(
    csrs: csr_directory.CsrDirectory, target: Path, renewal: RenewalSettings, now: datetime
) -> dict[str, Issued]:
    """Certificates from an earlier run that are not due; they are verified later."""
    earlier = {}
    for name, relative in csrs.files.items():
        with contextlib.suppress(UnreadableError, ValueError):
            leaf, *intermediates = load_pem_certificates(read(target / relative.with_suffix(".crt")) or b"")
            if not is_due((leaf, *intermediates), renewal.before, renewal.validity, now):
                earlier[name] = Issued(leaf=leaf, intermediates=tuple(intermediates))
    return earlier


def _remove(path: Path, status: os.stat_result) -> None:
    """Remove the judged file, unless another file has its name now."""
    with contextlib.suppress(FileNotFoundError):
        if version(path.lstat()) != version(status):
            log.warning("%s: another file came under this name; the next run takes it", one_line(path))
            return
        path.unlink()
