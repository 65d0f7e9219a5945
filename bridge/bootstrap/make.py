"""
From nothing to a node that `kubeadm init` or `kubeadm join` can run on; a run that waits is run again.

All files go in place in one step, which the next run finishes or undoes after a crash; copies of them are kept.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import NameOID

from bridge.bootstrap import keys, new_requests, whole
from bridge.bootstrap.configuration import assert_usable
from bridge.bootstrap.desired import Bootstrapped, DesiredNode, LeftoversError, NotWholeError, OtherNodeDesiredError
from bridge.bootstrap.places import ETCD_CLIENT, Certificates, Places, Role, gather_authorities, live
from bridge.bootstrap.whole import look_at
from bridge.errors import BridgeError
from bridge.node.kubeconfig import FreshKubeconfig
from bridge.pki.certificates import pem
from bridge.pki.verify import Verified
from bridge.renewal.prepare import Prepared
from bridge.renewal.select import assert_room
from bridge.renewal.verify_and_install import await_validity, remember, verify_all
from bridge.settings.tables import Settings
from bridge.specs import ETCD_CA, KUBELET_CONF, KUBELET_SERVER
from bridge.state import audit
from bridge.state.install import CERTIFICATE_MASK, KEY_MASK, Replacement, fingerprint, install
from bridge.state.session import Run, begun, in_force
from bridge.state.store import Outcome
from bridge.system.console import Progress
from bridge.system.files import Attributes, digest, private_directory
from bridge.system.paths import exposure
from bridge.system.state_file import OnDamage, StateFile, coded
from bridge.words import some


def make(
    settings: Settings, desired: DesiredNode, now: Callable[[], datetime], progress: Progress, wait: timedelta
) -> Bootstrapped:
    """
    Make what is missing, ask for it, and put it in place once all is there.

    After any BridgeError nothing was put in place: KubeadmConfigError (the configuration), ClusterExistsError or
    LeftoversError (the node is not new), NotWholeError (the result as a whole), LockedError.
    """
    if desired.role != "worker":
        assert_usable(desired.config, str(settings.node.pki_dir), further=desired.role == "control-plane")
    node = dataclasses.replace(settings.node, name=desired.node)
    with begun(dataclasses.replace(settings, node=node), now, progress, wait) as (run, _):
        keys.clear(run.store.directory)
        return _made(run, desired)


def _made(run: Run, desired: DesiredNode) -> Bootstrapped:
    whole.assert_no_cluster(desired)
    look = look_at(run.settings, desired, live, run.now())
    if not look.missing():
        whole.assert_as_desired(desired, look)
        keep_what_is_there(run, desired)
        new_requests.forget(run)
        return dataclasses.replace(_result(desired, []), is_complete=True)
    whole.assert_no_leftovers(desired, look)
    if (count := put_back(run, desired)) > 0:
        return dataclasses.replace(_result(desired, [], files=count), from_kept=True)
    cas = gather_authorities(
        run.settings, desired.places, desired.role, desired.inputs.ca_dir, desired.carried, run.now()
    )
    run = dataclasses.replace(run, settings=in_force(run.settings, cas))
    whole.assert_brought(look, cas)
    keys.assert_sa_at_hand(desired)
    assert_room(run.settings)  # kubeadm's keys need some, too
    open_requests = new_requests.begin(run, desired)
    prepared = new_requests.prepared(run, desired, open_requests)
    found = new_requests.gather_answers(run, desired, prepared, new_requests.expectations(run, desired, cas))
    composer = Composer(desired=desired, servers=open_requests.servers, authorities=cas, now=run.now())
    proven, failed = verify_all(run, list(found.answered), list(found.waiting), composer.certificate)
    remember(run, found.answered, proven, by_hand=bool(desired.inputs.answers))
    run.record.write()
    if failed:
        return _result(desired, failed, strange=found.strange)
    await_validity([one.verified.leaf for one in proven])
    certificates = [file for one in proven for file in one.files]
    made = open_requests.sa_key.encode(), open_requests.sa_public.encode()
    files = [*certificates, *composer.beside_certificates(made)]
    put_in_place(run, desired, files, composer.kubelet_pem)
    for one in proven:
        run.record.add(audit.INSTALLED, one.name, authority=one.prepared.authority, new=one.verified.leaf)
    run.record.write_or_warn()
    return _result(desired, [one.outcome for one in proven], files=len(files), strange=found.strange)


def _result(
    desired: DesiredNode, outcomes: Sequence[Outcome], *, files: int = 0, strange: Sequence[BridgeError] = ()
) -> Bootstrapped:
    return Bootstrapped(
        role=desired.role,
        node=desired.node,
        outcomes=tuple(outcomes),
        files=files,
        is_complete=files > 0,
        strange=tuple(strange),
    )


_DIRECTORY_MODE = 0o755
#: The names that a kubelet, and `Composer`, give its pairs.
_DATED = re.compile(r"kubelet-client-\d{4}(-\d\d){5}\.pem")
_PRIVATE, _PUBLIC = 0o600, 0o644


def put_in_place(run: Run, desired: DesiredNode, files: Sequence[Replacement], kubelet_pem: Path) -> None:
    """Judge the result as a whole, copy it if desired, and put all files in place in one step."""
    places = desired.places
    new: dict[Path, bytes | None] = {file.path: file.data for file in files}
    new[places.kubelet_current] = new[kubelet_pem] if kubelet_pem in new else live(kubelet_pem)

    def overlay(path: Path) -> bytes | None:
        return new[path] if path in new else live(path)

    look = look_at(run.settings, desired, overlay, run.now())
    if problems := look.problems():
        raise NotWholeError("\n".join(problems))
    complete = {path: data for path in look.files() if (data := overlay(path)) is not None}
    complete.update(desired.files)
    complete[kubelet_pem] = complete.pop(places.kubelet_current)
    _keep(run, desired, complete)
    _make_directories(desired)
    files = [*files, _link(places.kubelet_current, kubelet_pem)]
    about = audit.about() | {"command": f"bootstrap {desired.role}"}
    install(run.store, files, run.record.run_id, about)
    new_requests.forget(run)


def keep_what_is_there(run: Run, desired: DesiredNode) -> None:
    """Copy the files of a complete node: an earlier run may have ended between installing and copying."""
    look = look_at(run.settings, desired, live, run.now())
    there = {path: data for path in look.files() if (data := live(path)) is not None}
    _keep(run, desired, {**there, **desired.files})


def put_back(run: Run, desired: DesiredNode) -> int:
    """Put copies of an earlier run in place, and return the number of files; 0: no copies."""
    if (
        desired.inputs.keep is None
        or desired.inputs.anew
        or not (desired.inputs.keep / f"{desired.node}.kept.json").exists()
    ):
        return 0
    found = kept_file(desired.inputs.keep, desired.node).read()
    if found is None or (found.role, found.config) != (desired.role, desired.mark):
        raise OtherNodeDesiredError(
            f"{desired.inputs.keep}: wanted copies for this configuration and role, found copies for another",
            hint="name another directory, or use --anew to have all signed again",
        )
    pem = _assert_own(run, desired, [Path(one.path) for one in found.files])
    # the path decides the mode, since a user who can write to the copies may have changed it
    paths = [(one, Path(one.path)) for one in found.files]
    files = [_replacement(one.certificate, path, _mode(desired.places, path), one.data) for one, path in paths]
    _assert_free(files, desired.places)
    try:
        put_in_place(run, desired, [file for file in files if live(file.path) != file.data], pem)
    except NotWholeError as e:
        e.hint = f"the copies in {desired.inputs.keep} are no longer usable: --anew has all signed again"
        raise
    run.record.add(audit.RECOVERED, result=f"put {len(files)} kept files of {desired.node} back in place")
    run.record.write_or_warn()
    return len(files)


def _assert_own(run: Run, desired: DesiredNode, paths: Sequence[Path]) -> Path:
    """Make sure that the copies are this node's files; return the target of the kubelet's link."""
    places = desired.places
    ours = {*look_at(run.settings, desired, live, run.now()).files(), *desired.files} - {places.kubelet_current}
    others = [path for path in paths if path not in ours]
    if len(others) != 1 or others[0].parent != places.kubelet_pki or not _DATED.fullmatch(others[0].name):
        wanted = f"the files of {desired.node} and one {places.kubelet_pki}/kubelet-client-….pem"
        raise NotWholeError(
            f"{desired.inputs.keep}: wanted {wanted}, found {some(others) or 'none'}",
            hint="the copies were changed, and their content may be, too: --anew has all signed again",
        )
    return others[0]


def _assert_free(files: Sequence[Replacement], places: Places) -> None:
    others = [
        file.path for file in files if file.path not in places.serving and live(file.path) not in (None, file.data)
    ]
    if others:
        raise LeftoversError(f"wanted to put copies back, found another file in the place of {some(others)}")


def _replacement(name: str, path: Path, mode: int, data: bytes) -> Replacement:
    there, own = live(path), Attributes.private()
    return Replacement(
        certificate=name,
        path=path,
        data=data,
        mode_mask=KEY_MASK if mode == _PRIVATE else CERTIFICATE_MASK,
        was=None if there is None else digest(there),
        attributes=Attributes(mode=mode, uid=own.uid, gid=own.gid, extended={}),
    )


def _keep(run: Run, desired: DesiredNode, complete: Mapping[Path, bytes]) -> None:
    if desired.inputs.keep is None:
        return
    look, current = look_at(run.settings, desired, live, run.now()), desired.places.kubelet_current
    names = {path: spec.name for spec in desired.places.specs(desired.role) for path in look.files_of(spec)}
    files = tuple(
        KeptFile(
            certificate=names.get(path, KUBELET_CONF if path.suffix == ".pem" else "node"),
            path=os.path.realpath(path) if path == current else str(path),
            mode=_mode(desired.places, path),
            data=data,
        )
        for path, data in complete.items()
    )
    private_directory(desired.inputs.keep)
    kept_file(desired.inputs.keep, desired.node).put(Kept(role=desired.role, config=desired.mark, files=files))


def _mode(places: Places, path: Path) -> int:
    """The mode that `Composer` gives a file; an external etcd's have names of the operator's."""
    key, certificate = places.pair(ETCD_CLIENT)
    is_public = path in (certificate, places.authority(ETCD_CA)) or path.suffix == ".crt"
    return _PUBLIC if is_public and path != key else _PRIVATE


def _link(link: Path, target: Path) -> Replacement:
    """The kubelet's link, absolute as a kubelet makes it; it comes with the files, so that it never leads to nothing."""
    return Replacement(
        certificate=KUBELET_CONF,
        path=link,
        data=None,
        mode_mask=KEY_MASK,
        was=fingerprint(link),
        is_link=True,
        leads_to=str(target),
    )


def _make_directories(desired: DesiredNode) -> None:
    """Make kubeadm's directories and the kubelet's; other users may not write to them."""
    for path in desired.places.directories(desired.role):
        path.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
        if (found := exposure(path)) is not None:
            raise BridgeError(f"{path} can't hold keys: {found}", hint=found.hint)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptFile:
    """A copy of one file."""

    certificate: str
    path: str
    mode: int
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Copies of the files of one node."""

    role: Role
    config: str  #: kubeadm's, for which they were made.
    files: tuple[KeptFile, ...]


def kept_file(directory: Path, node: str) -> StateFile[Kept]:
    """The file with a node's copies."""
    return coded(
        Kept,
        directory / f"{node}.kept.json",
        "copies of a node's files",
        OnDamage.REFUSE,
        key="keptV1",
        afterwards="without it all is signed again",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Composer:
    """Makes a new node's files from answers."""

    desired: DesiredNode
    servers: Mapping[str, str]  #: By kubeconfig.
    authorities: Certificates
    now: datetime

    def certificate(self, one: Prepared, verified: Verified) -> Iterator[Replacement]:
        """Key and certificate, or a kubeconfig with them."""
        chain = pem(*verified.chain)
        spec, places = one.item.spec, self.desired.places
        if spec.name == KUBELET_CONF:
            yield _replacement(spec.name, self.kubelet_pem, _PRIVATE, chain + one.key_pem)
            # by reference: one place to renew, and a kubelet that starts makes no copy
            data = self._kubeconfig(spec.name, verified.leaf).referring_text(str(places.kubelet_current))
            yield _replacement(spec.name, places.kubeconfigs / spec.base, _PRIVATE, data)
        elif spec.kubeconfig:
            data = self._kubeconfig(spec.name, verified.leaf).text(chain, one.key_pem)
            yield _replacement(spec.name, places.kubeconfigs / spec.base, _PRIVATE, data)
        else:
            key, certificate = places.serving if spec.name == KUBELET_SERVER else places.pair(spec)
            yield _replacement(spec.name, key, _PRIVATE, one.key_pem)
            yield _replacement(spec.name, certificate, _PUBLIC, chain)

    @property
    def kubelet_pem(self) -> Path:
        """The file that `kubelet-client-current.pem` leads to, named as a kubelet names it."""
        return self.desired.places.kubelet_pki / f"kubelet-client-{self.now:%Y-%m-%d-%H-%M-%S}.pem"

    def beside_certificates(self, made: tuple[bytes, bytes]) -> Iterator[Replacement]:
        """CA certificates, the service account key (`made` if there is no other) and the configuration, as far as they lack."""
        desired, places = self.desired, self.desired.places
        if desired.role != "worker":  # whose CA certificate kubeadm writes itself, and refuses an existing file
            for authority in places.authorities(desired.role):
                if live(places.authority(authority)) is None:
                    data = pem(*self.authorities[authority.name])
                    yield _replacement(authority.name, places.authority(authority), _PUBLIC, data)
            pair = keys.sa_in_place(desired) or desired.sa or made
            for path, data in zip((places.sa_key, places.sa_public), pair, strict=True):
                if live(path) != data:
                    yield _replacement("sa", path, _PRIVATE, data)
        for path, data in desired.files.items():
            if live(path) != data:  # an operator's may hold a bootstrap token
                yield _replacement("kubeadm", path, _PRIVATE, data)

    def _kubeconfig(self, name: str, leaf: x509.Certificate) -> FreshKubeconfig:
        """A kubeconfig in kubeadm's form; every version of kubeadm accepts the first certificate of ca.crt alone."""
        [user] = (str(one.value) for one in leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME))
        named = self.desired.config.cluster.get("clusterName")
        cluster = named if isinstance(named, str) and named else "kubernetes"
        ca_pem = pem(self.authorities["ca"][0])
        return FreshKubeconfig(server=self.servers[name], cluster=cluster, user=user, ca_pem=ca_pem)
