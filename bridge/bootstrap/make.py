"""Makes a node ready for `kubeadm init` or `kubeadm join` in one command; if a CA's answer is missing, run it again."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

from cryptography import x509

from bridge.bootstrap import Certificates, Places, Role, assert_usable, gather_authorities, keys, live, whole
from bridge.bootstrap.desired import Bootstrapped, DesiredNode, LeftoversError, NotWholeError, OtherNodeDesiredError
from bridge.bootstrap.keys import Made
from bridge.bootstrap.whole import NodeLook, look_at
from bridge.ca.registry import cross_behind
from bridge.contract import SignRequest
from bridge.desk.files import assert_free
from bridge.errors import BridgeError, Exit, WaitingError
from bridge.node.inventory import Item
from bridge.node.kubeconfig import FreshKubeconfig
from bridge.pki import verify
from bridge.pki.bundle import RequestBundle
from bridge.pki.bundle_format import short_fingerprint
from bridge.pki.certificates import common_names, pem
from bridge.pki.csr import alternative_names, generate_key, key_pem
from bridge.pki.kubeadm_names import NamingFacts, naming
from bridge.pki.verify import Verified
from bridge.renewal import airgap, outcome_of
from bridge.renewal.issuance import Answered, issue, reaching
from bridge.renewal.prepare import Prepared, assert_room
from bridge.renewal.verify_and_install import await_validity, remember, verify_all
from bridge.settings.tables import Settings
from bridge.specs import AUTHORITIES, KUBELET_CONF, KUBELET_SERVER, SPECS, SUPER_ADMIN, CertificateSpec
from bridge.state import Outcome, Store, audit
from bridge.state.install import CERTIFICATE_MASK, KEY_MASK, Replacement, fingerprint, install
from bridge.state.open_requests import OpenRequest
from bridge.state.session import Now, Run, begun, claim, give_up, in_force
from bridge.system.console import Progress
from bridge.system.files import Attributes, assert_holds_keys, digest, private_directory, reasons
from bridge.system.state_file import OnDamage, StateFile, coded
from bridge.words import some


def make(settings: Settings, desired: DesiredNode, now: Now, progress: Progress, wait: timedelta) -> Bootstrapped:
    """Make the keys, request the certificates, and install all files once complete; after a BridgeError none was."""
    if desired.role != "worker":
        assert_usable(desired.config, str(settings.node.pki_dir), further=desired.role == "control-plane")
    node = dataclasses.replace(settings.node, name=desired.node)
    with begun(dataclasses.replace(settings, node=node), now, progress, wait) as (run, _):
        keys.clear(run.store.directory)
        done = _make(run, desired)
        return dataclasses.replace(done, errors=(*done.errors, *run.record.end()))


def _make(run: Run, desired: DesiredNode) -> Bootstrapped:
    result = partial(Bootstrapped, node=desired.node)
    whole.assert_no_cluster(desired)
    look = look_at(run.settings, desired.places, desired.role, desired.config, live, run.now())
    whole.assert_keys_closed(look)
    if not look.missing():
        whole.assert_as_desired(desired, look)
        _keep(desired, look, desired.places.kubelet_current.resolve())  # an earlier run may have died before this
        _forget(run)
        return result(is_complete=True)
    whole.assert_no_leftovers(desired, look)
    if (count := put_back(run, desired, look)) > 0:
        return result(files=count, is_complete=True, from_kept=True)
    ca_dir, carried = desired.inputs.ca_dir, desired.carried
    cas = gather_authorities(run.settings, desired.places, desired.role, ca_dir, carried, run.now())
    run = dataclasses.replace(run, settings=in_force(run.settings, cas))
    whole.assert_brought(look, cas)
    keys.assert_sa_at_hand(desired)
    assert_room(run.settings)  # kubeadm's keys need disk space, too
    open_requests = _begin(run, desired)
    prepared = _prepared(run, desired, open_requests)
    expected = {
        name: dataclasses.replace(
            run.settings.expectation(name, anchors, str(desired.places.authority(AUTHORITIES[name])), run.now()),
            cross=cross_behind(run.settings, name, anchors[0], run.now()),
        )
        for name, anchors in cas.items()
    }
    answered, waiting, strange = _gather_answers(run, desired, prepared, expected)
    servers = open_requests.servers
    composer = Composer(settings=run.settings, desired=desired, servers=servers, authorities=cas, now=run.now())
    proven, failed = verify_all(run, answered, waiting, composer.certificate)
    remember(run, answered, proven, by_hand=bool(desired.inputs.answers))
    run.record.write()
    if failed:
        return result(outcomes=tuple(failed), errors=tuple(strange))
    await_validity([answer.verified.leaf for answer in proven])
    certificates = [file for answer in proven for file in answer.files]
    made = open_requests.sa_key.encode(), open_requests.sa_public.encode()
    files = [*certificates, *composer.beside_certificates(made)]
    put_in_place(run, desired, files, composer.kubelet_pem)
    for answer in proven:
        run.record.add(audit.INSTALLED, answer.name, authority=answer.prepared.authority, new=answer.verified.leaf)
    outcomes = tuple(answer.outcome for answer in proven)
    return result(outcomes=outcomes, files=len(files), is_complete=bool(files), errors=tuple(strange))


#: The names that a kubelet and `Composer` give a kubelet's pairs.
_DATED = re.compile(r"kubelet-client-\d{4}(-\d\d){5}\.pem")


def put_in_place(run: Run, desired: DesiredNode, files: Sequence[Replacement], kubelet_pem: Path) -> None:
    """Check the complete result, keep copies if desired, and install all files in one step."""
    places = desired.places
    new: dict[Path, bytes | None] = {file.path: file.data for file in files}
    new[places.kubelet_current] = new[kubelet_pem] if kubelet_pem in new else live(kubelet_pem)

    def overlay(path: Path) -> bytes | None:
        return new[path] if path in new else live(path)

    look = look_at(run.settings, desired.places, desired.role, desired.config, overlay, run.now())
    if problems := look.problems():
        raise NotWholeError("\n".join(problems))
    _keep(desired, look, kubelet_pem)
    for directory in sorted({path.parent for path in (*look.files(), *desired.files)}):  # parents first
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        assert_holds_keys(directory)
    # installed with the files, so that the kubelet's link never dangles; absolute, as a kubelet makes it
    current, was, target = places.kubelet_current, fingerprint(places.kubelet_current), str(kubelet_pem)
    link = Replacement(
        certificate=KUBELET_CONF, path=current, data=None, mode_mask=KEY_MASK, was=was, is_link=True, leads_to=target
    )
    about = audit.about() | {"command": f"bootstrap {desired.role}"}
    install(run.store, [*files, link], run.record.run_id, about)
    _forget(run)


def put_back(run: Run, desired: DesiredNode, look: NodeLook) -> int:
    """Put copies of an earlier run in place, and return the number of files; 0: no copies."""
    keep = desired.inputs.keep
    if keep is None or desired.inputs.anew or not (keep / f"{desired.node}.kept.json").exists():
        return 0
    kept = kept_file(keep, desired.node).read()
    if kept is None or (kept.role, kept.config) != (desired.role, desired.mark):
        raise OtherNodeDesiredError(
            f"{keep}: wanted copies for this configuration and role, found copies for another",
            hint="name another directory, or use --anew to have all signed again",
        )
    pem = _assert_own(desired, look, [Path(file.path) for file in kept.files])
    # the path decides the mode, since a user who can write to the copies may have changed it
    files = [_replacement(desired.places, file.certificate, Path(file.path), file.data) for file in kept.files]
    kubelets = desired.places.serving
    if others := [f.path for f in files if f.path not in kubelets and live(f.path) not in (None, f.data)]:
        raise LeftoversError(f"can't put copies back: another file is in the place of {some(others)}")
    try:
        put_in_place(run, desired, [file for file in files if live(file.path) != file.data], pem)
    except NotWholeError as e:
        e.hint = f"the copies in {keep} are no longer usable: --anew has all signed again"
        raise
    run.record.add(audit.RECOVERED, result=f"put {len(files)} kept files of {desired.node} back in place")
    run.record.write_late()
    return len(files)


def _assert_own(desired: DesiredNode, look: NodeLook, paths: Sequence[Path]) -> Path:
    """Make sure that the copies are this node's files; return the target of the kubelet's link."""
    places = desired.places
    own_files = {*look.files(), *desired.files} - {places.kubelet_current}
    others = [path for path in paths if path not in own_files]
    if len(others) != 1 or others[0].parent != places.kubelet_pki or not _DATED.fullmatch(others[0].name):
        wanted = f"the files of {desired.node} and one {places.kubelet_pki}/kubelet-client-….pem"
        raise NotWholeError(
            f"{desired.inputs.keep}: wanted {wanted}, found {some(others) or 'none'}",
            hint="the copies were changed, and their content may be, too: --anew has all signed again",
        )
    return others[0]


def _replacement(places: Places, name: str, path: Path, data: bytes) -> Replacement:
    there, mode = live(path), places.mode(path)
    was = None if there is None else digest(there)
    mask = CERTIFICATE_MASK if mode & 0o044 else KEY_MASK
    attributes = dataclasses.replace(Attributes.private(), mode=mode)
    return Replacement(certificate=name, path=path, data=data, mode_mask=mask, was=was, attributes=attributes)


def _keep(desired: DesiredNode, look: NodeLook, kubelet_pem: Path) -> None:
    """Keep copies of a complete node's files, if desired; the kubelet's link leads to `kubelet_pem`."""
    if desired.inputs.keep is None:
        return
    there = {path: data for path in look.files() if (data := look.read(path)) is not None}
    names = {path: spec.name for spec in desired.places.specs(desired.role) for path in look.files_of(spec)}
    files = tuple(
        KeptFile(
            certificate=names.get(path, "node"),
            path=str(kubelet_pem if path == desired.places.kubelet_current else path),
            mode=desired.places.mode(path),
            data=data,
        )
        for path, data in {**there, **desired.files}.items()
    )
    failed = f"{desired.inputs.keep}: can't make a directory for copies (--keep)"
    with reasons(BridgeError, failed, hint="name another one"):
        private_directory(desired.inputs.keep)
    kept_file(desired.inputs.keep, desired.node).put(Kept(role=desired.role, config=desired.mark, files=files))


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
    config: str  #: The `mark` of the node that the files are for.
    files: tuple[KeptFile, ...]


def kept_file(directory: Path, node: str) -> StateFile[Kept]:
    """Return the file with a node's copies."""
    what, afterwards = "copies of a node's files", "without it all is signed again"
    file = coded(Kept, directory / f"{node}.kept.json", what, OnDamage.REFUSE, key="kept", afterwards=afterwards)
    return dataclasses.replace(file, by_command=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Composer:
    """Makes a new node's files from answers."""

    settings: Settings
    desired: DesiredNode
    servers: Mapping[str, str]  #: API servers, by kubeconfig.
    authorities: Certificates
    now: datetime

    def certificate(self, prepared: Prepared, verified: Verified) -> Iterator[Replacement]:
        """Yield the key and certificate files, or the kubeconfig with both."""
        chain = pem(*verified.chain)
        spec, places = prepared.item.spec, self.desired.places
        if spec.name == KUBELET_CONF:
            yield _replacement(places, spec.name, self.kubelet_pem, chain + prepared.key_pem)
            # by reference: one place to renew, and a starting kubelet makes no copy
            data = self._kubeconfig(spec.name, verified.leaf).referring_text(str(places.kubelet_current))
            yield _replacement(places, spec.name, places.kubeconfigs / spec.base, data)
        elif spec.kubeconfig:
            data = self._kubeconfig(spec.name, verified.leaf).text(chain, prepared.key_pem)
            yield _replacement(places, spec.name, places.kubeconfigs / spec.base, data)
        else:
            key, certificate = places.pair(spec)
            yield _replacement(places, spec.name, key, prepared.key_pem)
            yield _replacement(places, spec.name, certificate, chain)

    @property
    def kubelet_pem(self) -> Path:
        """The file that `kubelet-client-current.pem` leads to, named as a kubelet names it."""
        return self.desired.places.kubelet_pki / f"kubelet-client-{self.now:%Y-%m-%d-%H-%M-%S}.pem"

    def beside_certificates(self, made: tuple[bytes, bytes]) -> Iterator[Replacement]:
        """Yield the missing CA certificates, service account keys (`made` if there are no others) and configuration files."""
        desired, places = self.desired, self.desired.places
        if desired.role != "worker":  # kubeadm writes a worker's CA file, and refuses an existing one
            for authority in places.authorities(desired.role):
                if live(path := places.authority(authority)) is None:
                    yield _replacement(places, authority.name, path, pem(*self.authorities[authority.name]))
            pair = keys.sa_in_place(desired) or desired.sa or made
            for path, data in zip((places.sa_key, places.sa_public), pair, strict=True):
                if live(path) != data:
                    yield _replacement(places, "sa", path, data)
        for path, data in desired.files.items():
            if live(path) != data:  # mode 0600, since an operator's may hold a token
                yield _replacement(places, "kubeadm", path, data)

    def _kubeconfig(self, name: str, leaf: x509.Certificate) -> FreshKubeconfig:
        [user] = common_names(leaf.subject)
        ca_pem = pem(*self.settings.embedded("ca", self.authorities["ca"]))
        cluster = self.desired.config.cluster_name
        return FreshKubeconfig(server=self.servers[name], cluster=cluster, user=user, ca_pem=ca_pem)


def _begin(run: Run, desired: DesiredNode) -> Unfinished:
    """Continue an earlier run, or make keys and CSRs."""
    file = unfinished_file(run.store)
    unfinished, open_requests = file.read(), run.requests.by_name()
    if unfinished is not None and open_requests.keys() & set(unfinished.names) and not desired.inputs.anew:
        if (unfinished.role, unfinished.config) == (desired.role, desired.mark):
            return unfinished if set(unfinished.names) <= open_requests.keys() else _begun(run, desired, unfinished)
        if any(request.is_waiting for request in run.requests):
            raise OtherNodeDesiredError(
                "wanted to continue with the requests that wait, found another configuration, name or role"
            )
    if open_requests and desired.inputs.request is None:
        _assert_asks(run, [spec for spec in desired.places.specs(desired.role) if spec not in desired.places.brought])
    for name in open_requests:
        give_up(run, name, "a new node's keys are made anew")
        run.requests.drop(name)
    file.remove()
    return _begun(run, desired)


def _begun(run: Run, desired: DesiredNode, unfinished: Unfinished | None = None) -> Unfinished:
    """Make the missing keys and CSRs: all, or those whose requests were refused or cancelled since `found`."""
    made = _made_keys(run, desired)
    keys.assert_fits(made, desired.node)
    for name, made_key in made.items():
        if run.requests.get(name) is None:
            run.requests.put(_open(run, SPECS[name], made_key))
    claim(run.settings)
    run.requests.save()
    servers = {name: made_key.server for name, made_key in made.items() if made_key.server}
    fresh = Unfinished(role=desired.role, config=desired.mark, servers=servers, names=tuple(made))
    if unfinished is not None:
        fresh = dataclasses.replace(fresh, sa_key=unfinished.sa_key, sa_public=unfinished.sa_public)
    elif desired.role == "init" and live(desired.places.sa_key) is None:
        key = generate_key(keys.algorithm_of(made))
        public = keys.sa_public_pem(key).decode()
        fresh = dataclasses.replace(fresh, sa_key=key_pem(key).decode(), sa_public=public)
    unfinished_file(run.store).put(fresh)
    return fresh


def _prepared(run: Run, desired: DesiredNode, begun: Unfinished) -> list[Prepared]:
    """Return the open requests like those of a renewal, except that they replace nothing."""
    made = run.requests.by_name()
    return [Prepared.of_open(_item(SPECS[name], desired.places), made[name], {}) for name in begun.names]


def _forget(run: Run) -> None:
    """Drop this bootstrap's open requests and its state file."""
    for name in run.requests.by_name():
        run.requests.drop(name)
    run.requests.save()
    unfinished_file(run.store).remove()


def _made_keys(run: Run, desired: DesiredNode) -> dict[str, Made]:
    if desired.role == "worker":
        made = {KUBELET_CONF: keys.made_for(keys.kubelets(desired.node), desired.config.key, desired.server)}
    else:
        brought = desired.places.brought
        specs = [spec for spec in desired.places.specs(desired.role) if spec not in brought and not spec.by_flag]
        made = keys.by_kubeadm(desired.inputs.kubeadm, desired.config.version, desired.text, specs, run.store.directory)
        # the local endpoint, as kubeadm itself writes it at the next upgrade
        local = made["controller-manager.conf"].server
        made[KUBELET_CONF] = dataclasses.replace(made[KUBELET_CONF], server=local)
        for spec in desired.places.servers:
            wanted = naming(spec, NamingFacts(node=desired.node, address=desired.config.address))
            made[spec.name] = keys.made_for(wanted, keys.algorithm_of(made))
    sans = alternative_names(desired.serving)
    made[KUBELET_SERVER] = keys.made_for(keys.kubelets(desired.node, sans), keys.algorithm_of(made))
    return made


def _open(run: Run, spec: CertificateSpec, made: Made) -> OpenRequest:
    validity = run.settings.renewal.validity
    if spec.name == SUPER_ADMIN:  # needed for seconds, so it gets little more than the settings' minimum
        validity = min(validity, run.settings.renewal.min_validity + timedelta(days=1))
    request = SignRequest(spec=spec, csr_pem=made.csr_pem, validity=validity)
    return OpenRequest(request=request, key_pem=made.key_pem, created=run.now(), run_id=run.record.run_id)


def _item(spec: CertificateSpec, places: Places) -> Item:
    """Return the item of a certificate that does not exist yet."""
    key: Path | None
    if spec.name == KUBELET_CONF:
        key = certificate = places.kubelet_current
    elif spec.kubeconfig:
        key, certificate = None, places.kubeconfigs / spec.base
    else:
        key, certificate = places.pair(spec)
    return Item(
        spec=spec,
        authority_external=True,
        certificate_path=certificate,
        key_path=key,
        embedded=key is None,
        anchor_path=places.authority(spec.authority),
        certificates=(),
        state="missing",
        trouble=None,
        managed=True,
        listed=spec.listed,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """A node's unfinished bootstrap; its keys are among the open requests."""

    role: Role
    config: str  #: The `mark` of the node that the CSRs are for.
    servers: Mapping[str, str]  #: API servers, by kubeconfig.
    names: tuple[str, ...]  #: The certificates' names.
    sa_key: str = field(default="", repr=False)  #: PEM; empty if it comes from elsewhere.
    sa_public: str = ""


def unfinished_file(store: Store) -> StateFile[Unfinished]:
    """Return the file in the state directory; damage costs new keys and requests, and nothing else."""
    what = "what the requests of a new node are for"
    return coded(Unfinished, store.bootstrap, what, OnDamage.START_OVER, key="bootstrap")


def _gather_answers(
    run: Run, desired: DesiredNode, prepared: Sequence[Prepared], expected: Mapping[str, verify.Expectation]
) -> tuple[list[Answered], list[Outcome], list[BridgeError]]:
    """Take stored and carried answers, and request the rest; return answers, waiting requests and foreign answers."""
    answered = [proven for each in prepared if (proven := _proven_before(each, expected)) is not None]
    strange: list[BridgeError] = []
    if desired.inputs.answers:
        answers = airgap.answers_in(run, desired.inputs.answers)
        taken = [item for item in _rest(prepared, answered) if item.name in answers.candidates]
        answered += [airgap.answered_by(run, item, answers, expected[item.authority]) for item in taken]
        strange = answers.strange
    rest = _rest(prepared, answered)
    if desired.inputs.request is not None and rest:
        assert_free(desired.inputs.request, RequestBundle, run.settings.node.node_name, run.settings.node.cluster)
        requests, _ = airgap.carry(run, rest, desired.inputs.request)
        why = f"{desired.inputs.request} is to be carried to the desk, fingerprint {short_fingerprint(requests)}"
        return answered, [_waits(item, why) for item in rest], strange
    at_desks = [item for item in rest if item.open and item.open.bundles]
    away = [at_desk for at_desk in at_desks if at_desk.authority not in run.settings.authorities]
    if to_ask := [item for item in rest if item not in away]:
        items = [prepared.item for prepared in to_ask]
        _assert_asks(run, [item.spec for item in items])
        with reaching(run, items, expected) as reached:
            answered += issue(run, to_ask, reached(), expected)
    return answered, [_waits(item, "an operator has the request") for item in away], strange


def _rest(prepared: Sequence[Prepared], answered: Sequence[Answered]) -> list[Prepared]:
    answered_names = {answer.prepared.name for answer in answered}
    return [item for item in prepared if item.name not in answered_names]


def _assert_asks(run: Run, specs: Sequence[CertificateSpec]) -> None:
    """Make sure that the settings name a CA for each of these."""
    if lacking := [spec for spec in specs if spec.authority.name not in run.settings.authorities]:
        authorities = ", ".join(name for name in AUTHORITIES if name in {spec.authority.name for spec in lacking})
        text = f"{some(spec.name for spec in lacking)}: there is no CA and no desk for {authorities}"
        hint = "an [authority.NAME] table in the settings, or --request BUNDLE for a CA desk"
        raise BridgeError(text, hint=hint, exit_code=Exit.USAGE)


def _proven_before(prepared: Prepared, expected: Mapping[str, verify.Expectation]) -> Answered | None:
    """Return the answer that an earlier run has checked and stored, if it still holds."""
    made, wanted = prepared.open, expected[prepared.authority]
    if made is None or made.answer is None or verify.error_of(made.answer, prepared.request, wanted) is not None:
        return None
    return Answered(prepared=prepared, expected=wanted, label=made.backend, answer=made.answer)


def _waits(prepared: Prepared, why: str) -> Outcome:
    return outcome_of(prepared.item, WaitingError(why, hint="run the same command again, with --answer FILE"))
