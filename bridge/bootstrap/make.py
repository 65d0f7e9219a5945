"""
From nothing to a node that `kubeadm init` or `kubeadm join` can be run on.

Nothing is put in place before all of it is there and judged as a whole; then all of it is, in one step that the next
run finishes or undoes after a crash. A run that was cut off, or waits for a desk, is gone on with by running it again.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path

from bridge.bootstrap import authorities, kept, keys, unfinished
from bridge.bootstrap.authorities import Certificates
from bridge.bootstrap.configuration import Configuration, assert_usable
from bridge.bootstrap.files import Composer
from bridge.bootstrap.kept import Kept
from bridge.bootstrap.keys import ForeignSaError, Made
from bridge.bootstrap.places import (
    SUPER_ADMIN,
    Places,
    Role,
    specs_of,
    traces_of_cluster,
)
from bridge.bootstrap.unfinished import Unfinished
from bridge.bootstrap.whole import Look, is_sa_pair
from bridge.bootstrap.wish import (
    Bootstrapped,
    ClusterExistsError,
    LeftoversError,
    NobodySignsError,
    NotWholeError,
    OtherWishError,
    Wish,
)
from bridge.contract import SignRequest
from bridge.errors import BridgeError, VerificationError, WaitingError
from bridge.node.inventory import Item
from bridge.pki import verify
from bridge.pki.bundle import short_fingerprint
from bridge.renewal import airgap
from bridge.renewal.issuance import Answered, issue, reaching
from bridge.renewal.prepare import Prepared
from bridge.renewal.readiness import assert_room
from bridge.renewal.selection import outcome_of
from bridge.renewal.verify_and_install import await_validity, remember, verify_all
from bridge.settings.tables import Settings
from bridge.specs import AUTHORITIES, KUBELET_CONF, KUBELET_SERVER, SPECS, CertificateSpec, KeyAlgorithm
from bridge.state import audit
from bridge.state.install import CERTIFICATE_MASK, KEY_MASK, Replacement, digest, install
from bridge.state.outcome import Outcome
from bridge.state.requests import OpenRequest
from bridge.state.session import Run, begun, give_up
from bridge.system.console import Progress
from bridge.system.files import sync_directory
from bridge.system.ownership import exposure
from bridge.system.safe_read import UnreadableError, read

#: super-admin.conf is needed for seconds; what the settings let be asked for, and a little more.
_SUPER_ADMIN_MORE = timedelta(days=1)
_DIRECTORY_MODE = 0o755
_PRIVATE = 0o600


def make(
    settings: Settings, wish: Wish, now: Callable[[], datetime], progress: Progress, wait: timedelta
) -> Bootstrapped:
    """
    Make what is missing, ask for it, and put it in place once all is there.

    Args:
        settings: CAs, directories, how long.
        wish: What for.
        now: The clock.
        progress: Is told.
        wait: For another run to end.

    Raises:
        KubeadmConfigError: The configuration can't be used.
        ClusterExistsError, LeftoversError: The node is not new.
        NotWholeError: Something is wrong with the whole.
        LockedError: Another run works on this node.
        BridgeError: Whatever else; nothing was put in place.
    """
    if wish.role != "worker":
        assert_usable(wish.config, str(settings.node.pki_dir), further=wish.role == "control-plane")
    node = dataclasses.replace(settings.node, name=wish.node)
    with begun(dataclasses.replace(settings, node=node), now, progress, wait) as (run, _):
        keys.clear(run.store.directory)
        return _Making(run, wish).run()


def live(path: Path) -> bytes | None:
    """
    A file on the node.

    Raises:
        BridgeError: It is there and can't be read.
    """
    try:
        return read(path)
    except UnreadableError as e:
        raise BridgeError(f"{path}: wanted to read it, found: {e}") from None


def check(
    settings: Settings, places: Places, role: Role, node: str, config: Configuration | None, now: datetime
) -> list[str]:
    """All that is missing or wrong on a node that kubeadm is about to be run on; nothing is changed."""
    extra = frozenset().union(*map(settings.extra_subject, AUTHORITIES))
    return Look(places=places, role=role, read=live, now=now, node=node, config=config, extra_subject=extra).problems()


class _Making:
    """One run."""

    def __init__(self, run: Run, wish: Wish) -> None:
        self._run, self._wish, self._places = run, wish, wish.places
        self._strange: list[BridgeError] = []

    def run(self) -> Bootstrapped:
        """See `make`."""
        look = self._look(live)
        if traces := list(traces_of_cluster(self._places)):
            raise ClusterExistsError(f"wanted a node without a cluster, found {_some(traces)}")
        if not look.missing():
            return self._already(look)
        self._assert_no_leftovers(look)
        if (there := self._from_kept()) is not None:
            return there
        cas = authorities.gather(
            self._run.settings, self._places, self._wish.role, self._wish.ca_dir, self._wish.carried, self._run.now()
        )
        self._assert_sa()
        begun_before = self._begin()
        prepared = [self._prepared(SPECS[name], self._run.requests.by_name()[name]) for name in begun_before.names]
        answered, failed = self._answered(prepared, self._expected(cas))
        composer = self._composer(begun_before, cas)
        proven, failed = verify_all(self._run, answered, failed, composer.certificate)
        remember(self._run, answered, proven, by_hand=bool(self._wish.answers))
        self._run.record.write()
        if failed:
            return self._result(failed)
        await_validity([one.verified.leaf for one in proven])
        files = [
            *(file for one in proven for file in one.files),
            *composer.ca_files(),
            *self._service_account(composer, begun_before),
            *(file for path, data in self._wish.files.items() for file in composer.configuration(path, data)),
        ]
        self._put_in_place(files, composer.kubelet_pem)
        for one in proven:
            self._run.record.add(audit.INSTALLED, one.name, authority=one.prepared.authority, new=one.verified.leaf)
        self._run.record.write_or_warn()
        return self._result([one.outcome for one in proven], files=len(files))

    def _result(self, outcomes: Sequence[Outcome], files: int = 0, *, from_kept: bool = False) -> Bootstrapped:
        return Bootstrapped(
            role=self._wish.role,
            node=self._wish.node,
            outcomes=tuple(outcomes),
            files=files,
            is_complete=files > 0,
            from_kept=from_kept,
            strange=tuple(self._strange),
        )

    def _look(self, reader: Callable[[Path], bytes | None]) -> Look:
        wish = self._wish
        return Look(
            places=self._places,
            role=wish.role,
            read=reader,
            now=self._run.now(),
            node=wish.node,
            config=wish.config if wish.role != "worker" else None,
            extra_subject=frozenset().union(*(self._run.settings.extra_subject(name) for name in AUTHORITIES)),
        )

    # --- what is there already ----------------------------------------------------------------------------------------

    def _already(self, look: Look) -> Bootstrapped:
        """An earlier run has ended, or was cut off after the last step but one."""
        if problems := look.problems():
            raise NotWholeError(
                "\n".join(problems),
                hint="all files are there, and kubeadm would fail with them: move them away, or mend them",
            )
        for path, wanted in self._wish.files.items():
            if live(path) != wanted:
                raise OtherWishError(f"{path}: wanted the configuration that is asked for now, found another one")
        there = {path: data for path in look.files() if (data := live(path)) is not None}
        self._keep({**there, **self._wish.files})
        self._forget()
        return dataclasses.replace(self._result([]), is_complete=True)

    def _assert_no_leftovers(self, look: Look) -> None:
        places = self._places
        allowed = {places.sa_key, places.sa_public, *places.serving}
        allowed |= {places.authority(one) for one in AUTHORITIES.values()}
        there = [path for path in look.files() if path not in allowed and look.read(path) is not None]
        missing = look.missing()
        if there and len(missing) < len(there):
            raise NotWholeError("\n".join(look.problems()), hint=_BRING_BACK)
        if there:
            raise LeftoversError(f"wanted a node without certificates, or with all of them, found {_some(there)}")
        for path, data in self._wish.files.items():
            if live(path) not in (None, data):
                raise LeftoversError(
                    f"{path}: wanted no file, found another configuration",
                    hint="move it away, or give it as --kubeadm-config",
                )

    # --- keys and requests --------------------------------------------------------------------------------------------

    def _begin(self) -> Unfinished:
        """Go on with what an earlier run has begun, or make keys and CSRs."""
        run, wish = self._run, self._wish
        file = unfinished.unfinished_file(run.store)
        found, open_requests = file.read(), run.requests.by_name()
        if found is not None and set(found.names) <= open_requests.keys():
            if found.is_for(wish.role, wish.mark) and not wish.anew:
                return found
            if not wish.anew and any(one.is_waiting for one in run.requests):
                raise OtherWishError(
                    "wanted to go on with what waits for an answer, found that another configuration, name or role is asked for now"
                )
        for name in open_requests:
            give_up(run, name, "a new node's keys are made anew")
            run.requests.drop(name)
        file.remove()
        made = self._made()
        keys.assert_fits(made, wish.node)
        for name, one in made.items():
            run.requests.put(self._open(SPECS[name], one))
        run.requests.save()
        sa = ("", "") if wish.role != "init" else self._new_sa(keys.algorithm_of(made))
        fresh = Unfinished(
            role=wish.role,
            config=wish.mark,
            servers={name: one.server for name, one in made.items() if one.server},
            names=tuple(made),
            sa_key=sa[0],
            sa_public=sa[1],
        )
        unfinished.remember(run.store, fresh)
        return fresh

    def _made(self) -> dict[str, Made]:
        wish = self._wish
        if wish.role == "worker":
            made = {KUBELET_CONF: keys.kubelet_client(wish.node, wish.server, wish.algorithm)}
        else:
            made = keys.by_kubeadm(wish.kubeadm, wish.config.version, wish.text, wish.role, self._run.store.directory)
            # the local endpoint, which kubeadm itself writes at the next upgrade
            local = made["controller-manager.conf"].server
            made[KUBELET_CONF] = dataclasses.replace(made[KUBELET_CONF], server=local)
        made[KUBELET_SERVER] = keys.kubelet_serving(wish.node, wish.addresses, keys.algorithm_of(made))
        return made

    def _new_sa(self, algorithm: KeyAlgorithm) -> tuple[str, str]:
        if live(self._places.sa_key) is not None:
            return "", ""
        key, public = keys.service_account(algorithm)
        return key.decode(), public.decode()

    def _open(self, spec: CertificateSpec, one: Made) -> OpenRequest:
        renewal = self._run.settings.renewal
        is_short = spec.name == SUPER_ADMIN
        validity = min(renewal.validity, renewal.min_validity + _SUPER_ADMIN_MORE) if is_short else renewal.validity
        request = SignRequest(spec=spec, csr_pem=one.csr_pem, validity=validity)
        run = self._run
        return OpenRequest(request=request, key_pem=one.key_pem, created=run.now(), run_id=run.record.run_id)

    def _prepared(self, spec: CertificateSpec, made: OpenRequest) -> Prepared:
        return Prepared(item=_item(spec, self._places), request=made.request, key_pem=made.key_pem, was={}, open=made)

    # --- answers ------------------------------------------------------------------------------------------------------

    def _expected(self, cas: Certificates) -> dict[str, verify.Expectation]:
        settings = self._run.settings
        return {
            name: verify.Expectation(
                anchors=certificates,
                anchor_name=str(self._places.authority(AUTHORITIES[name])),
                now=self._run.now(),
                min_validity=settings.renewal.min_validity,
                extra_subject=settings.extra_subject(name),
            )
            for name, certificates in cas.items()
        }

    def _answered(
        self, prepared: Sequence[Prepared], expected: Mapping[str, verify.Expectation]
    ) -> tuple[list[Answered], list[Outcome]]:
        """From what was proven before, from files that were carried, and from the CAs."""
        run, wish = self._run, self._wish
        answered = [one for each in prepared if (one := _kept_answer(each, expected)) is not None]
        if wish.answers:
            found = airgap.answers_in(run, wish.answers)
            self._strange += found.strange
            had = {one.prepared.name for one in answered}
            answered += [
                airgap.answered_by(run, one, found.best(one, expected[one.authority]), expected[one.authority])
                for one in prepared
                if one.name in found.candidates and one.name not in had
            ]
        had = {one.prepared.name for one in answered}
        rest = [one for one in prepared if one.name not in had]
        if wish.request is not None and rest:
            requests, _ = airgap.carry(run, rest, wish.request)
            carry = f"{wish.request} is to be carried to the desk, fingerprint {short_fingerprint(requests)}"
            return answered, [_waits(one, carry) for one in rest]
        carried = [one for one in rest if self._is_carried(one)]
        to_ask = [one for one in rest if one not in carried]
        return [*answered, *self._asked(to_ask, expected)], [
            _waits(one, "an operator has the request") for one in carried
        ]

    def _is_carried(self, one: Prepared) -> bool:
        """A person has the request, and no CA can be asked for it."""
        return bool(one.open and one.open.bundles) and one.authority not in self._run.settings.authorities

    def _asked(self, prepared: Sequence[Prepared], expected: Mapping[str, verify.Expectation]) -> list[Answered]:
        if not prepared:
            return []
        lacking = {one.authority for one in prepared} - self._run.settings.authorities.keys()
        if lacking:
            raise NobodySignsError(
                f"wanted somebody who signs for {', '.join(name for name in AUTHORITIES if name in lacking)}, found nobody"
            )
        assert_room(self._run.settings)
        items = [one.item for one in prepared]
        with reaching(self._run.settings, items, expected, self._run.progress) as reached:
            return issue(self._run, prepared, reached(), expected)

    # --- files --------------------------------------------------------------------------------------------------------

    def _composer(self, begun_before: Unfinished, cas: Certificates) -> Composer:
        cluster = self._wish.config.cluster.get("clusterName")
        return Composer(
            places=self._places,
            role=self._wish.role,
            servers=begun_before.servers,
            cluster=cluster if isinstance(cluster, str) and cluster else "kubernetes",
            authorities=cas,
            read=live,
            now=self._run.now(),
        )

    def _service_account(self, composer: Composer, begun_before: Unfinished) -> Iterator[Replacement]:
        if self._wish.role != "worker":
            made = begun_before.sa_key.encode(), begun_before.sa_public.encode()
            yield from composer.service_account(*(self._sa_there() or self._wish.sa or made))

    def _sa_there(self) -> tuple[bytes, bytes] | None:
        """
        The pair that is in place already.

        Raises:
            ForeignSaError: It is half a pair, or not the other nodes'.
        """
        key, public = live(self._places.sa_key), live(self._places.sa_public)
        if key is None and public is None:
            return None
        if key is None or public is None:
            raise ForeignSaError(
                f"{self._places.sa_key}: wanted sa.key and sa.pub, or none of them, found one of the two"
            )
        if not is_sa_pair(key, public):
            raise ForeignSaError(f"{self._places.sa_public}: wanted the public key of sa.key, found another one")
        if self._wish.sa is not None and key != self._wish.sa[0]:
            raise ForeignSaError(
                f"{self._places.sa_key}: wanted the other nodes' service account key, found another one"
            )
        return key, public

    def _assert_sa(self) -> None:
        """Before anybody is asked: a further node can't make one."""
        if self._wish.role == "worker" or self._sa_there() is not None:
            return
        if self._wish.role == "control-plane" and self._wish.sa is None:
            raise ForeignSaError(
                "wanted the service account key of another control-plane node, found none",
                hint="--shared - with what `ca-bridge bootstrap share` prints there, or sa.key and sa.pub copied to "
                f"{self._places.pki} (mode 0600) over a safe channel",
            )

    def _put_in_place(self, files: Sequence[Replacement], kubelet_pem: Path) -> None:
        """Judge the whole as it will be; copy it if that is wished; then all of it in one step."""
        new: dict[Path, bytes | None] = {file.path: file.data for file in files}
        new[self._places.kubelet_current] = new[kubelet_pem]

        def overlay(path: Path) -> bytes | None:
            return new[path] if path in new else live(path)

        look = self._look(overlay)
        if problems := look.problems():
            raise NotWholeError("\n".join(problems))
        whole = {path: data for path in look.files() if (data := overlay(path)) is not None}
        whole.update(self._wish.files)
        whole[kubelet_pem] = whole.pop(self._places.kubelet_current)
        self._keep(whole)
        self._make_directories()
        _link(self._places.kubelet_current, kubelet_pem)
        about = {"command": f"bootstrap {self._wish.role}", **audit.who(), "certificates": []}
        install(self._run.store, files, self._run.record.run_id, about)
        self._forget()

    def _make_directories(self) -> None:
        """kubeadm's and the kubelet's; nobody else may write to them."""
        for path in self._places.directories(self._wish.role):
            path.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
            if (found := exposure(path)) is not None:
                raise BridgeError(f"{path} can't hold keys: {found}", hint=found.hint)

    def _forget(self) -> None:
        """What was to be remembered until all is in place."""
        for name in self._run.requests.by_name():
            self._run.requests.drop(name)
        self._run.requests.save()
        unfinished.unfinished_file(self._run.store).remove()

    # --- copies -------------------------------------------------------------------------------------------------------

    def _keep(self, whole: Mapping[Path, bytes]) -> None:
        if self._wish.keep is None:
            return
        names = {path: spec.name for spec in specs_of(self._wish.role) for path in self._look(live).files_of(spec)}
        current = self._places.kubelet_current
        files = tuple(
            (
                names.get(path, KUBELET_CONF if path.suffix == ".pem" else "node"),
                self._real(path, current),
                _mode(path),
                data,
            )
            for path, data in whole.items()
        )
        kept.keep(self._wish.keep, self._wish.node, Kept(role=self._wish.role, config=self._wish.mark, files=files))

    def _real(self, path: Path, current: Path) -> Path:
        return Path(os.path.realpath(path)) if path == current else path

    def _from_kept(self) -> Bootstrapped | None:
        """Put copies of an earlier run in place again, if they are for the same node and still good."""
        wish, run = self._wish, self._run
        if wish.keep is None or wish.anew or not (wish.keep / f"{wish.node}.kept.json").exists():
            return None
        found = kept.kept_file(wish.keep, wish.node).read()
        if found is None or (found.role, found.config) != (wish.role, wish.mark):
            raise OtherWishError(
                f"{wish.keep}: wanted copies of what is asked for now, found those of another configuration or role",
                hint="name another directory, or --anew to have all signed anew",
            )
        files = [_replacement(*one) for one in found.files]
        there = [file.path for file in files if file.path not in self._places.serving]
        kept_data = {file.path: file.data for file in files}
        if others := [path for path in there if live(path) not in (None, kept_data[path])]:
            raise LeftoversError(f"wanted to put copies back, found another file in the place of {_some(others)}")
        pem = next(
            file.path for file in files if file.path.parent == self._places.kubelet_pki and file.path.suffix == ".pem"
        )
        try:
            self._put_in_place([file for file in files if live(file.path) != file.data], pem)
        except NotWholeError as e:
            e.hint = f"the copies in {wish.keep} are of no use any more: --anew has all signed anew"
            raise
        run.record.add(audit.RECOVERED, result=f"put {len(files)} kept files of {wish.node} back in place")
        run.record.write_or_warn()
        return self._result([], files=len(files), from_kept=True)


_BRING_BACK = "bring back what is missing, or move all of it away and run this again"
_MOST_NAMED = 3


def _some(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - _MOST_NAMED} more" if len(paths) > _MOST_NAMED else ""
    return ", ".join(map(str, paths[:_MOST_NAMED])) + more


def _replacement(name: str, path: Path, mode: int, data: bytes) -> Replacement:
    there = live(path)
    return Replacement(
        certificate=name,
        path=path,
        data=data,
        mode_mask=KEY_MASK if mode == _PRIVATE else CERTIFICATE_MASK,
        was=None if there is None else digest(there),
        attributes=kept.attributes(mode),
    )


def _mode(path: Path) -> int:
    """As `Composer` has it."""
    return 0o644 if path.suffix == ".crt" else _PRIVATE


def _item(spec: CertificateSpec, places: Places) -> Item:
    """A certificate that is not there yet."""
    key: Path | None
    if spec.name == KUBELET_CONF:
        key = certificate = places.kubelet_current
    elif spec.kubeconfig:
        key, certificate = None, places.kubeconfigs / spec.base
    else:
        key, certificate = places.serving if spec.name == KUBELET_SERVER else places.pair(spec)
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


def _kept_answer(one: Prepared, expected: Mapping[str, verify.Expectation]) -> Answered | None:
    """What an earlier run has proven."""
    made, wanted = one.open, expected[one.authority]
    if made is None or made.answer is None:
        return None
    try:
        verify.check(made.answer, one.request, wanted)
    except VerificationError:
        return None
    return Answered(prepared=one, expected=wanted, label=made.backend, answer=made.answer)


def _waits(one: Prepared, why: str) -> Outcome:
    return outcome_of(one.item, WaitingError(why, hint="run the same command again, with --answer FILE"))


def _link(link: Path, target: Path) -> None:
    """As a kubelet does it: absolute, and replaced in one step."""
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.rename(link)
    sync_directory(link.parent)
