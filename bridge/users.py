"""
Kubeconfigs for people and machines: short-lived client certificates of the cluster's CA.

The user makes a key and a CSR on their own machine; the operator checks the CSR and the settings, has the CA sign,
verifies the certificate and its lifetime, and writes the kubeconfig.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import glob
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

from bridge.ca import CA, UntrustedAnswerError, owe_putting_away, put_away, registry
from bridge.ca.retry import WaitPolicy
from bridge.contract import Continuity, Issued, Pending
from bridge.errors import (
    BackendError,
    BackendRefusedError,
    BridgeError,
    Exit,
    NoVerdictError,
    SettingsError,
    SettingsProblem,
    VerificationError,
    WaitingError,
)
from bridge.node import endpoints, kubeconfig
from bridge.node.kubeconfig import FreshKubeconfig, Kubeconfig
from bridge.pki import csr, user_rules, verify
from bridge.pki.certificates import CN_OID, O_OID, UNREADABLE, attributes, is_for, load_pem_certificates, pem
from bridge.pki.csr import Naming, PrivateKey, requested, subject_of
from bridge.pki.user_rules import SHORTEST, Limits, User
from bridge.settings.tables import Settings, UserSettings
from bridge.specs import CA as CLUSTER_CA
from bridge.specs import KEY_ALGORITHMS, USER, KeyAlgorithm
from bridge.state import Store, audit
from bridge.state.open_requests import OpenUser, OpenUsers
from bridge.state.session import alone, in_force
from bridge.system.console import Progress
from bridge.system.files import (
    Attributes,
    assert_holds_keys,
    reasons,
    remove_unfinished,
    sync_directory,
    write_atomically,
    write_staged,
)
from bridge.system.paths import UnreadableError, opened, read, read_ca_file, read_once
from bridge.words import one_line

#: Kubernetes accepts it everywhere, and it takes no time to make.
DEFAULT_KEY: KeyAlgorithm = "ecdsa-p256"
#: A block has no hyphen, so that a file of BEGIN lines alone is scanned once, and not once for each line.
_PEM = re.compile(rb"-----BEGIN ((?:NEW )?CERTIFICATE REQUEST)-----[^-]*-----END \1-----")
#: A carried request is made anew after this: by default a desk refuses a request that is older than a month.
_CARRIED_ANEW = timedelta(days=20)
#: How far CAs backdate; an even older certificate belongs to an earlier request with the same CSR.
_DATED_BACK = timedelta(hours=1)
_KEPT = (
    "other users may have written that, so the request is kept, and a good answer to it still counts: "
    "once the desk signs it, carry the same bundle there again"
)
_LEAST_SHARE = 2


class NoCsrError(BridgeError):
    """The file holds no CSR, or can't be read; no request was refused."""

    exit_code = Exit.USAGE
    hint = "`ca-bridge kubeconfig request NAME --group GROUP` makes one where the person is"


class CsrRefusedError(BridgeError):
    """The CSR differs from the command's options."""

    exit_code = Exit.REFUSED
    hint = "`ca-bridge kubeconfig request NAME --group GROUP` makes one where the person is"


def make_csr(user: User, key: PrivateKey) -> bytes:
    """Make a CSR in PEM, as `kubeadm kubeconfig user` does: all groups, then the name; no SAN."""
    return csr.build_for(Naming(subject=subject_of(user.name, user.groups)), key)


def stem_of(name: str) -> str:
    """Return a user's name as a file name, which can't lead to another directory."""
    return re.sub(r"[^A-Za-z0-9._@+-]", "_", name)


def write_request(user: User, directory: Path, algorithm: KeyAlgorithm) -> tuple[Path, Path]:
    """Write a new key and its CSR, `NAME.key` (0600) and `NAME.csr`: both or neither, and never over an older file."""
    if wrong := [SettingsProblem(what, user_rules.NAME_FORM, value) for what, value in user_rules.misnamed(user)]:
        raise SettingsError(wrong)
    key_path, csr_path = (directory / f"{stem_of(user.name)}.{kind}" for kind in ("key", "csr"))
    key, private = csr.generate_key(algorithm), Attributes.private()
    written: list[Path] = []
    try:
        assert_holds_keys(directory)
        write_staged(key_path, csr.key_pem(key), private)
        written.append(key_path)
        write_staged(csr_path, make_csr(user, key), dataclasses.replace(private, mode=0o644))
        written.append(csr_path)
        sync_directory(directory)
    except OSError as e:
        for path in written:
            path.unlink()
        first = {errno.EEXIST: "move the older ones away, or ", errno.ENOENT: "make the directory, or "}.get(
            e.errno or 0, ""
        )
        raise BridgeError(
            f"{e.filename or directory}: can't write a key and a CSR: {e.strerror}",
            hint=f"{first}name another directory with -o",
        ) from None
    return key_path, csr_path


def load_csr(path: Path, user: User) -> bytes:
    """Read a user's CSR, check it against the operator's options, and return it as PEM."""
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
        problems = _csr_problems(request, user)
    except (*UNREADABLE, UnsupportedAlgorithm) as e:
        problems = [f"wanted a CSR that can be read, found: {one_line(e)}"]
    if problems:
        raise CsrRefusedError(f"{path}: {'; '.join(problems)}")
    return blocks[0] + b"\n"


def _csr_problems(request: x509.CertificateSigningRequest, user: User) -> list[str]:
    problems = []
    pairs = attributes(request.subject)
    names = [value for oid, value in pairs if oid == CN_OID]
    groups = [value for oid, value in pairs if oid == O_OID]
    if names != [user.name]:
        problems.append(f"CN: wanted {user.name}, found {_listed(names)}")
    if sorted(groups) != sorted(user.groups):
        problems.append(f"O: wanted {_listed(user.groups)} (--group), found {_listed(groups)}")
    if others := [oid for oid, _ in pairs if oid not in (CN_OID, O_OID)]:
        problems.append(f"subject: wanted CN and O alone, found {_listed(others)} too")
    if extensions := requested(request):
        problems.append(f"extensions: wanted none, found {_listed(extensions)}")
    if csr.known_algorithm(request.public_key()) is None:
        problems.append(
            f"key: wanted one of {', '.join(KEY_ALGORITHMS)}, found {csr.algorithm_name(request.public_key())}"
        )
    if not request.is_signature_valid:
        problems.append("wanted a CSR that is signed with its own key, found another signature")
    return problems


def _listed(texts: tuple[str, ...] | list[str]) -> str:
    return ", ".join(one_line(text, 80) for text in texts[:5]) or "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class UserOrder:
    """The kubeconfig that the operator wants."""

    user: User
    out: Path  #: Where the kubeconfig goes.
    csr: Path | None = None  #: The user's CSR; None: a key is made here.
    key_file: str = ""  #: The user's key file, relative to the kubeconfig; empty: beside it, under the CSR's name.
    key: KeyAlgorithm = DEFAULT_KEY  #: Algorithm of a key that is made here.
    validity: timedelta | None = None  #: None: `users.validity`.
    server: str = ""  #: The API server's URL; empty: the one in the node's admin.conf.
    ca_file: Path | None = None  #: The cluster's CA certificate; None: the node's CA file.


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The kubeconfig that was written."""

    leaf: x509.Certificate
    server: str
    backend: str
    key_file: str  #: The key file that the kubeconfig names; empty: the kubeconfig holds the key.


class UserNotAllowedError(BridgeError):
    """The settings do not allow this user; no CA was asked."""

    exit_code = Exit.REFUSED
    hint = "[users] in the settings says what may be signed"


def assert_allowed(user: User, validity: timedelta, rules: UserSettings) -> None:
    """Raise an error with every rule that this user breaks (UserNotAllowedError)."""
    limits = Limits(groups=rules.groups, allow=rules.allow, max_validity=rules.max_validity)
    if problems := user_rules.problems(user, validity, limits):
        raise UserNotAllowedError("; ".join(problems))


def issue(
    settings: Settings, order: UserOrder, now: Callable[[], datetime], progress: Progress, wait: timedelta = timedelta()
) -> Done:
    """Have the certificate signed, or collect it, and write the kubeconfig; an error leaves no new kubeconfig."""
    rules = settings.users
    validity = order.validity or rules.validity
    assert_allowed(order.user, validity, rules)
    given = load_csr(order.csr, order.user) if order.csr is not None else None
    older = _assert_may_write(order)
    anchors, anchor_name = _anchors(settings, order)
    fresh = FreshKubeconfig(
        server=_server(settings, order), cluster=settings.node.cluster, user=order.user.name, ca_pem=pem(*anchors)
    )
    settings = in_force(settings, {CLUSTER_CA.name: anchors})
    configured = registry.configured(settings, [CLUSTER_CA.name])[CLUSTER_CA.name]
    expected = dataclasses.replace(
        settings.expectation(CLUSTER_CA.name, anchors, anchor_name, now()),
        min_validity=validity / _LEAST_SHARE,
        longest=rules.max_validity,
        longest_name="users.max_validity",
        cross=registry.cross_behind(settings, CLUSTER_CA.name, anchors[0], now()),
    )
    outage = WaitPolicy(configured.settings.retry_for, configured.label, progress.note)
    with alone(settings, wait, lambda recovery: progress.note(str(recovery))) as (store, record):
        put_away(settings, store, progress.note)
        open_user = _resumed_or_new(store, record, order, given, validity, configured.label, now(), older)
        with contextlib.closing(CA.of(configured, outage)) as ca:
            verified = _Submission(settings, ca, open_user, record, store).verified(expected, now)
            _add(record, audit.VERIFIED, open_user, new=verified.leaf)
            record.write()
            owe_putting_away(settings, store, [(CLUSTER_CA.name, open_user.reference)])
            _write(order, fresh, verified, open_user)
            _add(record, audit.INSTALLED, open_user, new=verified.leaf, result=f"in {order.out}")
            _forget(store, open_user)
        put_away(settings, store, progress.note)
    return Done(leaf=verified.leaf, server=fresh.server, backend=configured.label, key_file=_key_file(order, open_user))


def _name(open_user: OpenUser) -> str:
    return f"{USER.name} {open_user.name}"


def _add(record: audit.Record, event: str, open_user: OpenUser, **details: Any) -> None:
    record.add(event, _name(open_user), authority=CLUSTER_CA.name, **details)


# --- before the CA is asked ------------------------------------------------------------------------------------------


def _assert_may_write(order: UserOrder) -> Kubeconfig | None:
    try:
        with opened(order.out) as place:
            return _older(place.path, order)
    except OSError as e:
        found = "none" if isinstance(e, FileNotFoundError) else e.strerror
        raise BridgeError(f"{order.out.parent}: wanted the directory for the kubeconfig, found {found}") from None


def _older(path: Path, order: UserOrder) -> Kubeconfig | None:
    """Return the same user's kubeconfig, which will be replaced, or None; any other file is an error."""
    older: Kubeconfig | None = None
    with contextlib.suppress(UnreadableError, kubeconfig.KubeconfigError):
        try:
            older = kubeconfig.parse(read_once(path)[0])
        except FileNotFoundError:
            return None
    if older is None or older.user != order.user.name or older.has_others or not older.certificate_data:
        raise BridgeError(
            f"{order.out}: wanted no file, or an older kubeconfig of {order.user.name} alone, found something else",
            hint="name another file with -o",
        )
    return older


def _anchors(settings: Settings, order: UserOrder) -> tuple[tuple[x509.Certificate, ...], str]:
    path = order.ca_file or settings.node.pki_dir / CLUSTER_CA.certificate_file
    try:
        return read_ca_file(path), str(path)
    except UnreadableError as e:
        raise BridgeError(
            f"{path}: wanted the cluster's CA certificate, found: {e}",
            hint="name it with --ca FILE, away from a node",
        ) from None


def _server(settings: Settings, order: UserOrder) -> str:
    if order.server:
        if not order.server.startswith("https://") or not endpoints.is_url(order.server):
            found = repr(order.server)
            raise SettingsError([SettingsProblem("--server", "a URL such as https://api.example.com:6443", found)])
        return order.server
    path = settings.node.kubeconfig_dir / "admin.conf"
    try:
        data = read(path)
        server = kubeconfig.parse(data or b"").server
        found = "no file" if data is None else "none"
    except (UnreadableError, kubeconfig.KubeconfigError) as e:
        server, found = "", str(e)
    if not server:
        raise BridgeError(
            f"{path}: wanted the API server's URL in it, found {found}", hint="name it: --server https://HOST:6443"
        )
    return server


def _resumed_or_new(
    store: Store,
    record: audit.Record,
    order: UserOrder,
    given: bytes | None,
    validity: timedelta,
    label: str,
    now: datetime,
    older: Kubeconfig | None,
) -> OpenUser:
    """Return the user's open request if it still fits the order, else a new open_user."""
    open_user = OpenUsers(store).get(order.user.name)
    if open_user is not None:
        wanted = (order.user.groups, label, given or open_user.csr_pem, validity)
        is_same = (open_user.groups, open_user.backend, open_user.csr_pem, open_user.validity) == wanted
        has_ended = _has_ended(open_user, older, now)
        is_old = has_ended or (open_user.carried is not None and now - open_user.created > _CARRIED_ANEW)
        is_key = open_user.key_pem is None or csr.known_algorithm(open_user.request.csr.public_key()) == order.key
        if is_same and is_key and not is_old and (given is None) is (open_user.key_pem is not None):
            return open_user
        why = "its certificate is installed, and has ended" if has_ended else "something else is asked for now"
        _add(record, audit.CANCELLED, open_user, result=why)
    key_pem = None
    if given is None:
        key = csr.generate_key(order.key)
        given, key_pem = make_csr(order.user, key), csr.key_pem(key)
    return OpenUser(
        name=order.user.name,
        groups=order.user.groups,
        csr_pem=given,
        key_pem=key_pem,
        validity=validity,
        created=now,
        backend=label,
    )


def _forget(store: Store, open_user: OpenUser) -> None:
    requests = OpenUsers(store)
    requests.drop(open_user.name)
    requests.save()


def _has_ended(open_user: OpenUser, older: Kubeconfig | None, now: datetime) -> bool:
    """Whether a killed run wrote this request's certificate into the kubeconfig, and the certificate has expired."""
    with contextlib.suppress(*UNREADABLE):
        leaf, *_ = load_pem_certificates((older and older.certificate_data) or b"")
        is_its = is_for(leaf, open_user.request.csr) and leaf.not_valid_before_utc >= open_user.created - _DATED_BACK
        return is_its and leaf.not_valid_after_utc <= now
    return False


class _Submission:
    def __init__(self, settings: Settings, ca: CA, open_user: OpenUser, record: audit.Record, store: Store) -> None:
        self._ca, self._open_user, self._record, self._store = ca, open_user, record, store
        self._is_carried = ca.backend.carries
        if self._is_carried and open_user.carried is None:
            # unproven, for a desk's policy and for file names
            name, cluster = settings.node.node_name, settings.node.cluster
            created = open_user.created.replace(microsecond=0)
            carried = Continuity(batch=secrets.token_hex(16), node=name, cluster=cluster, proof=None, asked=created)
            self._open_user = dataclasses.replace(open_user, carried=carried)

    def verified(self, expected: verify.Expectation, now: Callable[[], datetime]) -> verify.Verified:
        open_user = self._open_user
        try:
            if self._is_carried:  # the answer may be hours old when it arrives
                expected = dataclasses.replace(expected, min_validity=min(expected.min_validity, SHORTEST))
            answer = self._answer(expected)
            if isinstance(answer, Pending):
                self._remember(dataclasses.replace(open_user, reference=answer.reference))
                raise WaitingError(
                    f"{_name(open_user)}: {answer.note or 'the CA has the request, and has not answered yet'}",
                    hint="the same command again takes the answer; no request is sent twice",
                )
            _add(self._record, audit.ISSUED, open_user, new=answer.leaf)
            verified = self._ca.verified(answer, open_user.request, dataclasses.replace(expected, now=now()))
        except BridgeError as e:
            if isinstance(e, UntrustedAnswerError):
                e.hint = _KEPT
            elif isinstance(e, BackendRefusedError | VerificationError) and not isinstance(e, NoVerdictError):
                _forget(self._store, open_user)  # its CA said no, or signed something else
            _add(self._record, audit.event_of(e), open_user, error=e)
            raise
        return verified

    def _answer(self, expected: verify.Expectation) -> Issued | Pending:
        open_user, ca = self._open_user, self._ca
        collects = ca.backend.can("collect")
        if open_user.reference and collects:
            answer = ca.collect(open_user.request, open_user.reference, expected)
        else:
            ca.look([USER], lambda _: expected)
            if (wrong := ca.error(USER.name)) is not None:
                raise wrong
            self._record.describe(_name(open_user), open_user.request, open_user.backend, ca.identity)
            _add(self._record, audit.ASKED, open_user)
            self._record.write()  # the audit log has the request before the CA
            if collects:
                self._remember(open_user)  # the key is on disk before the CA can sign for it
            [answer] = ca.ask([open_user.request])
        if isinstance(answer, BackendError):
            raise answer
        return answer

    def _remember(self, open_user: OpenUser) -> None:
        requests = OpenUsers(self._store)
        requests.put(open_user)
        requests.save()


def _key_file(order: UserOrder, open_user: OpenUser) -> str:
    """Return the key file that the kubeconfig names; empty: the kubeconfig holds the key."""
    beside = order.csr.with_suffix(".key").name if order.csr is not None else ""
    return (order.key_file or beside) if open_user.key_pem is None else ""


def _write(order: UserOrder, fresh: FreshKubeconfig, verified: verify.Verified, open_user: OpenUser) -> None:
    """Write the kubeconfig with mode 0600, with or without a key; while a CA is being replaced, it trusts both CAs."""
    text = fresh.text(pem(*verified.chain), open_user.key_pem, _key_file(order, open_user))
    failed, hint = f"{order.out}: can't write the kubeconfig", "run the same command again with a writable place"
    # hold the directory open, so that its owner can't exchange it
    with reasons(BridgeError, failed, hint=hint), opened(order.out) as place:
        _older(place.path, order)
        # a killed run's temporary file holds a key
        remove_unfinished(place.path.parent, f".{glob.escape(place.name)}.????????")
        write_atomically(place.path, text)
