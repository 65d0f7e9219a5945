"""
Makes a renewal's keys and CSRs from the live certificates, or uses an open request again. Before that it checks disk
space and the node's own policy.

The names of a kubelet's serving certificate come from the settings, or from the node's own configuration; never from its
`Node.status`, which a holder of a kubelet's credentials can write.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from types import MappingProxyType

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from bridge.contract import Continuity, SignRequest
from bridge.desk.files import load_policy
from bridge.desk.policy import Planned, planned_problems
from bridge.errors import BridgeError, Exit
from bridge.node import kubeconfig, manifests, pairs
from bridge.node.inventory import Item
from bridge.node.kubeconfig import FreshKubeconfig, KubeconfigError
from bridge.node.kubelet import KubeletFiles
from bridge.pki import csr, signatures
from bridge.pki.certificates import load_pem_certificates
from bridge.pki.csr import Naming, alternative_names, subject_of
from bridge.renewal import RESTORE, Desired, MissingCertificateError, NotReadyError, Selection, outcome_of
from bridge.settings.tables import NodeSettings, Settings, is_host
from bridge.specs import KUBELET_SERVER, Component, KeyAlgorithm
from bridge.state import Outcome
from bridge.state.install import fingerprint
from bridge.state.open_requests import OpenRequest
from bridge.state.session import Run
from bridge.system.console import READ_ONLY_HINT
from bridge.system.files import (
    DIRECTORY_MODE,
    Attributes,
    DiskSpace,
    assert_holds_keys,
    digest,
    disk_spaces,
    make_directories,
    reasons,
    sync_directory,
    write_staged,
)
from bridge.system.paths import ForeignLinkError, UnreadableError, foreign_link, opened, read_once, real_path

#: A desk takes no request that is older than its policy's `max_age` (30 days by default).
_PROOF_ANEW = timedelta(days=7)
_USUAL_KEY: KeyAlgorithm = "rsa-2048"  # kubeadm's


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A certificate that is ready to be requested; holds the new key."""

    item: Item
    request: SignRequest
    key_pem: bytes = field(repr=False)
    was: Mapping[Path, str | None]  #: Digests of the files that are to be replaced.
    open: OpenRequest | None = None  #: The earlier run's request that this one continues.
    kubeconfig: FreshKubeconfig | None = None  #: The whole file, where none exists.

    @classmethod
    def of_open(cls, item: Item, open_: OpenRequest, was: Mapping[Path, str | None]) -> Prepared:
        """Return what an earlier run prepared and requested."""
        fresh = open_.kubeconfig
        return cls(item=item, request=open_.request, key_pem=open_.key_pem, was=was, open=open_, kubeconfig=fresh)

    @property
    def name(self) -> str:
        """kubeadm's name of the certificate."""
        return self.item.spec.name

    @property
    def authority(self) -> str:
        """The name of its authority."""
        return self.item.spec.authority.name


def prepare(
    items: Sequence[Item],
    settings: Settings,
    requests: Mapping[str, OpenRequest] = MappingProxyType({}),
    desired: Mapping[str, Desired] = MappingProxyType({}),
) -> tuple[list[Prepared], list[Outcome]]:
    """Make keys and CSRs on all cores; return what is prepared, and the failures."""
    earlier = [(item, requests.get(item.spec.name), desired.get(item.spec.name)) for item in items]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return divided([*pool.map(lambda each: _prepare(settings, *each), earlier)])


def divided(results: Sequence[Prepared | Outcome]) -> tuple[list[Prepared], list[Outcome]]:
    """Divide results into the prepared certificates and the failures."""
    prepared = [result for result in results if isinstance(result, Prepared)]
    return prepared, [result for result in results if isinstance(result, Outcome)]


def _prepare(settings: Settings, item: Item, open_: OpenRequest | None, desired: Desired | None) -> Prepared | Outcome:
    try:
        live, was = live_pair(item)
        algorithm = _next_key(item, live, settings, open_, desired)
        naming = desired.naming if desired is not None else serving_names(item, settings)
        replaced = replaced_by_next(item, live)
        validity = settings.renewal.validity
        if open_ is not None and open_.request.validity == validity and _fits(item, open_, replaced, algorithm, naming):
            return _of_open(item, open_, was, settings)
        key = csr.generate_key(algorithm)
        csr_pem = csr.build_for(naming, key) if naming is not None else csr.build(present(item, live), key)
        request = SignRequest(spec=item.spec, csr_pem=csr_pem, validity=validity, replaces=replaced)
    except BridgeError as e:
        return outcome_of(item, e)
    fresh = desired.kubeconfig if desired is not None else None
    return Prepared(item=item, request=request, key_pem=csr.key_pem(key), was=was, kubeconfig=fresh)


def _next_key(
    item: Item, live: x509.Certificate | None, settings: Settings, open_: OpenRequest | None, desired: Desired | None
) -> KeyAlgorithm:
    """Return the new key's algorithm: the settings', else the live certificate's, else kubeadm's configuration's."""
    wanted = (item.pair.key if item.pair is not None else None) or settings.renewal.key
    if live is not None and (item.pair is None or csr.known_algorithm(live.public_key())):
        return csr.key_algorithm(live, wanted)
    if wanted != "same":
        return wanted
    if open_ is not None and (desired is None or desired.key is None):
        return csr.known_algorithm(open_.request.csr.public_key()) or _USUAL_KEY
    return desired.key if desired is not None and desired.key is not None else _USUAL_KEY


def _of_open(item: Item, open_: OpenRequest, was: Mapping[Path, str | None], settings: Settings) -> Prepared:
    """Continue the open request, which the node's current policy has to allow (NotAllowedError)."""
    if (error := policy_error(item, settings, None, open_.request)) is not None:
        raise error
    return Prepared.of_open(item, open_, was)


def open_request(run: Run, prepared: Prepared) -> OpenRequest:
    """Return the open request of a prepared certificate, or a new one that stores it."""
    if prepared.open is not None:
        return prepared.open
    request, key, conf = prepared.request, prepared.key_pem, prepared.kubeconfig
    return OpenRequest(request=request, key_pem=key, created=run.now(), run_id=run.record.run_id, kubeconfig=conf)


def take_up(item: Item, open_: OpenRequest, settings: Settings) -> Prepared | Outcome:
    """Continue an open request whose answer is there, whatever kind of key the settings name today."""
    try:
        if item.obstacle is not None:
            raise item.obstacle
        live, was = live_pair(item)
        if open_.request.replaces != replaced_by_next(item, live):
            raise MissingCertificateError("its certificate was replaced since it was asked for")
        return _of_open(item, open_, was, settings)
    except BridgeError as e:
        return outcome_of(item, e)


def with_continuity(prepared: Sequence[Prepared], settings: Settings, now: datetime) -> list[Prepared]:
    """Have each request name its node and prove it, all in one batch; a batch that still holds stays as it is."""
    batches = {(who.batch, who.asked) if (who := item.request.continuity) is not None else None for item in prepared}
    if len(batches) == 1 and all(_is_continuity_current(item, settings, now) for item in prepared):
        return list(prepared)
    batch, created = secrets.token_hex(16), now.replace(microsecond=0)
    proofs = [(item, _continuity(item, settings, batch, created)) for item in prepared]
    return [replace(item, request=replace(item.request, continuity=continuity)) for item, continuity in proofs]


def _is_continuity_current(prepared: Prepared, settings: Settings, now: datetime) -> bool:
    continuity = prepared.request.continuity
    if continuity is None or now - continuity.asked > _PROOF_ANEW:
        return False
    if (continuity.node, continuity.cluster) != (settings.node.node_name, settings.node.cluster):
        return False
    if prepared.request.replaces is None:
        return continuity.proof is None
    return (
        continuity.proof is not None
        or _continuity(prepared, settings, continuity.batch, continuity.asked).proof is None
    )


def _continuity(prepared: Prepared, settings: Settings, batch: str, created: datetime) -> Continuity:
    identity = {"batch": batch, "node": settings.node.node_name, "cluster": settings.node.cluster}
    proof = None
    # a key proves nothing for a certificate that the request does not replace
    if prepared.request.replaces is not None:
        with contextlib.suppress(*NO_KEY):
            key, validity = live_key(prepared.item), prepared.request.validity
            about = {"name": prepared.name, **identity}
            proof = signatures.sign_proof(key, prepared.request.csr, validity=validity, created=created, **about)
    return Continuity(proof=proof, asked=created, **identity)


#: Errors of a key that is missing, broken, encrypted, or of an unsupported type.
NO_KEY = (MissingCertificateError, ValueError, TypeError, UnsupportedAlgorithm)


def live_key(item: Item) -> PrivateKeyTypes:
    """Load the key of the live certificate (NO_KEY: it can't be loaded)."""
    data = read_live(item.key_path or item.certificate_path) or b""
    if not item.certificates:
        raise MissingCertificateError("its certificate can't be read")
    pem = data if item.key_path else kubeconfig.key_data(data) or b""
    return csr.load_key(pem, item.certificates[0].public_key())


def _fits(item: Item, open_: OpenRequest, replaced: x509.Certificate | None, key: str, naming: Naming | None) -> bool:
    """Whether an open request replaces the live certificate, with the kind of key and the names that are wanted now."""
    spec = open_.request.spec
    if (spec.authority, spec.ekus) != (item.spec.authority, item.spec.ekus):  # the settings changed
        return False
    says_it = naming is None or naming.is_of(open_.request.csr)
    is_alike = csr.algorithm_name(open_.request.csr.public_key()) == key
    return open_.request.replaces == replaced and is_alike and says_it


#: The end of the first line of every kind of private key (RFC 7468 §10, §11, and older formats).
_PRIVATE_KEY = b"PRIVATE KEY-----"
_CERTIFICATE = b"CERTIFICATE-----"


def live_pair(item: Item) -> tuple[x509.Certificate | None, dict[Path, str | None]]:
    """Read the certificate on disk (None: still missing) and its files' digests (BridgeError: changed, or unreadable)."""
    paths = [item.certificate_path] if item.key_path is None else [item.key_path, item.certificate_path]
    for path in paths:
        if (foreign := foreign_link(path)) is not None:
            raise BridgeError(str(foreign), hint=foreign.hint)
    contents = {path: read_live(path) for path in paths}
    data = contents[item.certificate_path]
    old_key = contents.get(item.key_path) if item.key_path is not None else None
    if old_key and _PRIVATE_KEY not in old_key:
        raise BridgeError(
            f"{item.key_path}: wanted the old private key in PEM, which is replaced, found something else",
            hint="look at the file, or where the symlink leads; move it away, and a renewal puts a new key there",
        )
    was = {path: None if content is None else digest(content) for path, content in contents.items()}
    was |= _was_elsewhere(item)
    if item.current is not None:  # the symlink to a kubelet's pair is replaced, not its target
        with reasons(MissingCertificateError, f"{item.current}: can't read it"):
            was[item.current] = fingerprint(item.current)
    if item.state == "missing":
        if data is not None:
            raise MissingCertificateError(f"{item.certificate_path} was made while this run began", hint="run again")
        return None, was
    try:
        certificate_data = kubeconfig.parse(data or b"").certificate_data if item.embedded else data
        live = load_pem_certificates(certificate_data or b"")[0]
    except KubeconfigError as e:
        raise e.of(item.certificate_path) from None
    except ValueError as e:
        raise MissingCertificateError(f"{item.certificate_path}: wanted a certificate, found {e}", hint=RESTORE) from e
    if (live,) != item.certificates[:1]:
        raise MissingCertificateError("its certificate was replaced while this run began", hint="run again")
    return live, was


def _was_elsewhere(item: Item) -> dict[Path, str | None]:
    """Return the digests of all files of a further pair (BridgeError: one holds something else)."""
    if item.pair is None:
        return {}
    digests: dict[Path, str | None] = {}
    for files in item.pair.places:
        for key, path in files.paths():
            wanted, marker = ("a private key", _PRIVATE_KEY) if key == "key_file" else ("certificates", _CERTIFICATE)
            if (data := read_live(path)) and marker not in data:
                raise BridgeError(
                    f"{path}: wanted {wanted} in PEM, which is replaced, found something else",
                    hint=f"does [certificate.{item.spec.name}] name the right file? Move it away, and a renewal makes it",
                )
            digests[path] = None if data is None else digest(data)
    return digests


def present(item: Item, live: x509.Certificate | None) -> x509.Certificate:
    """Return the live certificate (MissingCertificateError: there is none)."""
    if live is None:
        text = f"there is no certificate to renew in {item.certificate_path}"
        raise MissingCertificateError(text, hint=RESTORE)
    return live


def read_live(path: Path) -> bytes | None:
    """Read a file that is to be replaced, following no link that other users could have made; None: no such file."""
    try:
        with opened(path) as place:
            return read_once(place.path)[0]
    except FileNotFoundError:
        return None  # a renewal needs no old key
    except (OSError, ForeignLinkError, UnreadableError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise MissingCertificateError(f"{path}: can't read it: {reason}") from e


def write_csrs(prepared: Sequence[Prepared], directory: Path) -> None:
    """Write `NAME.csr` and `NAME.key`, flat, with mode 0600 and over no existing file; all or none."""
    written: list[Path] = []
    try:
        assert_holds_keys(directory)
        make_directories(directory, DIRECTORY_MODE)
        assert_holds_keys(directory)  # another user may have made it meanwhile
        for item in prepared:
            for suffix, data in ((".key", item.key_pem), (".csr", item.request.csr_pem)):
                path = directory / f"{item.name}{suffix}"
                write_staged(path, data, Attributes.private())
                written.append(path)
        sync_directory(directory)
    except OSError as e:
        for path in written:
            path.unlink()
        reason = f"{e.filename}: {e.strerror}" if e.filename else e.strerror
        text = f"can't write keys and CSRs to {directory}: {reason}"
        raise BridgeError(text, hint="choose an empty --csr-dir") from e


_ADDRESSES = "--node-ip of the kubelet (kubeadm: nodeRegistration.kubeletExtraArgs)"


def replaced_by_next(item: Item, live: x509.Certificate | None) -> x509.Certificate | None:
    """Return the certificate that the request replaces, by its names or its key; None: the live one proves nothing."""
    if item.pair is not None:
        return live if pairs.proves_itself(item) else None
    return None if item.foreign and item.spec.name == KUBELET_SERVER else live


def serving_names(item: Item, settings: Settings) -> Naming | None:
    """Return the names of a further pair's or a kubelet's next certificate; None: it keeps the live one's."""
    if item.pair is not None:
        return item.pair.naming
    if item.spec.name != KUBELET_SERVER or not (item.foreign or settings.serving_sans):
        return None
    names = settings.serving_sans or own_names(settings.node)
    if item.foreign or not item.certificates:
        subject = subject_of(f"system:node:{settings.node.node_name}", ["system:nodes"])
    else:
        subject = item.certificates[0].subject
    return Naming(subject=subject, sans=alternative_names(names))


def own_names(node: NodeSettings) -> tuple[str, ...]:
    """Return the node's names and addresses from its kubelet's or API server's configuration (NotReadyError: none)."""
    kubelet = KubeletFiles.load(node.kubelet_dir)
    addresses = [address for address in kubelet.addresses if is_host(address)] or _advertised(node)
    if not addresses:
        names = f'["{node.node_name}", "192.0.2.10"]'
        raise NotReadyError(
            f"{KUBELET_SERVER}: this node's own configuration has no address of it ({_ADDRESSES})",
            hint=f"list each name and address by which clients reach it: [certificate.{KUBELET_SERVER}] sans = {names}",
        )
    return tuple(dict.fromkeys([node.node_name, *([kubelet.hostname] if kubelet.hostname else []), *addresses]))


def _advertised(node: NodeSettings) -> list[str]:
    """Return the API server's address on a control plane, which kubeadm sets to the node's; elsewhere nothing."""
    with contextlib.suppress(ValueError):
        manifest = manifests.load(Component.APISERVER, node.kubeconfig_dir)
        address = manifest.flags.get("--advertise-address", "") if manifest is not None else ""
        return [address] if address and is_host(address) else []
    return []


# --- before a CA is asked: disk space, and the node's own policy ------------------------------------------------------

#: A renewal of all twelve takes 0.3 MiB: new files beside the old ones, a backup, requests, a record.
BYTES_NEEDED, INODES_NEEDED = 1 << 20, 64


def directories(settings: Settings, items: Sequence[Item]) -> list[Path]:
    """Return the directories that a renewal of these writes to: a symlinked file is replaced at its target."""
    node = settings.node
    files = [path for item in items for path in (item.certificate_path, item.key_path) if path is not None]
    places = [place for item in items if item.pair is not None for place in item.pair.places]
    files += [path for place in places for _, path in place.paths()]
    real = dict.fromkeys(real_path(file).parent for file in files)
    return [node.state_dir, node.pki_dir, node.kubeconfig_dir, *real]


def with_room(settings: Settings, selection: Selection) -> Selection:
    """Fail the pairs whose own disks are full or read-only (NotReadyError: the node's own disks are)."""
    assert_room(settings, [item for item in selection.items if item.pair is None])
    failing: dict[str, BridgeError] = {}
    for item in (item for item in selection.items if item.pair is not None):
        try:
            assert_room(settings, [item])
        except NotReadyError as e:
            failing[item.spec.name] = e
    return selection.without(failing)


def assert_room(settings: Settings, items: Sequence[Item] = ()) -> None:
    """Check the disks that a renewal writes to (NotReadyError: one is full or read-only)."""
    spaces = list(disk_spaces(directories(settings, items)))
    if closed := [str(room.place) for room in spaces if room.is_read_only]:
        text = f"file system of {', '.join(closed)}: wanted one that can be written to, found it read-only"
        raise NotReadyError(text, hint=f"{READ_ONLY_HINT}, then run again; no CA was asked")
    if problems := [text for text in map(_too_little, spaces) if text]:
        raise NotReadyError("; ".join(problems), hint="make room there, then run again; no CA was asked")


def _too_little(room: DiskSpace) -> str:
    where = f"file system of {room.place}"
    if room.free < BYTES_NEEDED:
        return f"{where}: wanted {BYTES_NEEDED >> 10} KiB for a renewal, found {room.free >> 10} KiB"
    if room.inodes is not None and room.inodes < INODES_NEEDED:
        return f"{where}: wanted {INODES_NEEDED} inodes for a renewal, found {room.inodes}"
    return ""


class NotAllowedError(BridgeError):
    """The node's own policy does not allow the next certificate: no CA was asked, or the answer is not installed."""

    exit_code = Exit.REFUSED

    def __init__(self, item: Item, file: Path | None, problems: tuple[str, ...], *, is_asked: bool) -> None:
        key = f'"{item.spec.name}"' if "." in item.spec.name else item.spec.name
        hint = f"if it is meant, allow it in the policy ([allow] or [certificate.{key}])"
        if is_asked:
            hint = f"`ca-bridge pending cancel {item.spec.name}` gives the open request up; {hint}"
        elif item.certificates:
            what = f"find out who put {item.certificate_path} there"
            hint = f"{what}, and put the right one back (an expired one will do); {hint}"
        text = f"this node's policy {file} does not allow the next certificate: {'; '.join(problems)}"
        super().__init__(text, hint=hint)


def policy_error(
    item: Item, settings: Settings, desired: Desired | None, asked: SignRequest | None = None
) -> BridgeError | None:
    """
    Return why the node's own policy, in the format of a CA desk's, forbids the next certificate, or the one that was
    `asked` for; None: it allows it, or there is none (SettingsError: its file can't be used). Without a policy, renewals
    for ever keep the additional names of a certificate that an attacker once put in a live one's place.
    """
    if settings.policy.file is None:
        return None
    policy, live = load_policy(settings, settings.policy.file), item.certificates[0] if item.certificates else None
    try:
        if asked is not None:
            naming, key = csr.naming_of(asked.csr), csr.algorithm_name(asked.csr.public_key())
        else:
            wanted = desired.naming if desired is not None else serving_names(item, settings)
            naming = wanted or csr.naming_of(present(item, live))
            key = _next_key(item, live, settings, None, desired)
        planned = Planned(
            node=settings.node.node_name,
            cluster=settings.node.cluster,
            spec=item.spec,
            naming=naming,
            key=key,
            validity=asked.validity if asked is not None else settings.renewal.validity,
            replaces=replaced_by_next(item, live),
        )
    except BridgeError as e:  # the renewal would fail with the same error
        return e
    problems = planned_problems(planned, policy)
    return NotAllowedError(item, settings.policy.file, problems, is_asked=asked is not None) if problems else None
