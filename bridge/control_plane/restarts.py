"""Restart components one at a time, each only when its neighbours are healthy."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from bridge import control_plane
from bridge.control_plane import checks, probes, proof, turns
from bridge.errors import BridgeError, Exit, PostponedError, SettingsError, SettingsProblem
from bridge.node import kubeconfig, manifests, pairs, processes
from bridge.node.inventory import Node
from bridge.node.kubeconfig import KubeconfigError
from bridge.node.reading import read_node
from bridge.pki.certificates import load_pem_certificates
from bridge.pki.expiry import duration_text
from bridge.settings.tables import Settings
from bridge.specs import Component
from bridge.state import Store, audit, session, static_pods
from bridge.state.backups import Backup
from bridge.state.install import newest_number
from bridge.state.static_pods import Pod, RestartError
from bridge.system.console import doing, log
from bridge.system.files import write_atomically
from bridge.system.paths import UnreadableError, read
from bridge.system.run_command import Command, command_failure, run, unsafe_program
from bridge.system.state_file import OnDamage, StateFile, coded
from bridge.system.waiting import wait_until
from bridge.words import name_found

_POLL_SECONDS = 0.5


class RestartPostponedError(PostponedError):
    """A component must not be restarted now."""


class ImpossibleError(RestartError):
    """A component can't be restarted from here; the new certificates are not the cause."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restarted:
    """The result of one component's restart."""

    component: Component
    seconds: float | None = None  #: Until it was healthy; None: it was not restarted, or is not healthy.
    error: BridgeError | None = None

    @property
    def exit_code(self) -> int:
        """Exit code 0 if the component is back, else its error's."""
        return self.error.exit_code if self.error is not None else Exit.DONE


@dataclass(frozen=True, slots=True, kw_only=True)
class Restarts:
    """Restarts components, one at a time, by the settings' method."""

    node: Node
    settings: Settings
    store: Store
    record: audit.Record
    force: bool = False  #: Despite unhealthy neighbours, on this node or others, and shortly after a restart.
    going_back: bool = False  #: As `force`, but never while another node is unhealthy.
    content: bytes | None = None  #: The manifest's new text, where one component is restarted for it.

    def all(self, components: Sequence[Component]) -> list[Restarted]:
        """Restart these in order until one fails; return a result for each, and for every other unhealthy component."""
        ordered = [component for component in control_plane.ORDER if component in components]
        errors = {
            component: obstacle(component, self.node, self.settings) or self._too_soon(component)
            for component in ordered
        }
        left = [component for component, error in errors.items() if error is None]
        done: list[Restarted] = []
        try:
            if left:
                with self._turn() as may_restart:
                    for restarted in self._one_by_one(left, may_restart):
                        self.record.add(audit.RESTARTED, restarted.component.value, error=restarted.error)
                        self.record.write_late()  # a crash in the next restart takes nothing from the record
                        done.append(restarted)
        except BridgeError as e:  # it is not our turn
            done += [Restarted(component=component, error=e) for component in left[len(done) :]]
        return [
            *(Restarted(component=component, error=error) for component, error in errors.items() if error is not None),
            *done,
        ]

    def with_text(self, component: Component, content: bytes | None) -> tuple[list[Restarted], list[Restarted]]:
        """Restart with a new manifest (None: the serving pair's), or else with the old one; return both results."""
        path = manifests.path_of(component, self.settings.node.kubeconfig_dir)
        old = path.read_bytes()
        done = dataclasses.replace(self, content=content).all([component])
        error = done[0].error
        if error is None or isinstance(error, PostponedError) or path.read_bytes() == old:
            return done, []
        log.warning("%s", error)
        return done, dataclasses.replace(self, going_back=True, content=old).all([component])

    @property
    def _at_once(self) -> bool:
        """Whether to ignore this node's other components and the time of the last restart."""
        return self.force or self.going_back

    def _turn(self) -> contextlib.AbstractContextManager[Callable[[Component], None]]:
        """Return this node's turn: a forced restart waits for it, but ignores other nodes; a worker needs none."""
        if self.node.is_worker:
            return contextlib.nullcontext(lambda _: None)
        settings = self.settings
        if self.force:
            settings = dataclasses.replace(settings, cluster=dataclasses.replace(settings.cluster, neighbours="ignore"))
        return turns.turn(self.node, settings, self.record.run_id, note=lambda text: log.info("%s", text))

    def _one_by_one(
        self, ordered: Sequence[Component], may_restart: Callable[[Component], None]
    ) -> Iterator[Restarted]:
        for number, component in enumerate(ordered):
            to_come = ordered[number + 1 :]
            waited = self._after_the_others(component, to_come, may_restart)
            yield waited
            if waited.error is not None:
                yield from (Restarted(component=left, error=_not_tried(left, waited)) for left in to_come)
                return
        # the others may have lost their leases or connections meanwhile: they get the same time to recover
        rest = [component for component in _present(self.node) if component not in ordered]
        for component, text in self._wait_until_healthy(rest).items():
            error = RestartError(f"not restarted, and not healthy afterwards: {text}")
            yield Restarted(component=component, error=error)

    def _after_the_others(
        self, component: Component, to_come: Sequence[Component], may_restart: Callable[[Component], None]
    ) -> Restarted:
        try:
            if not self._at_once:
                self._wait_for_the_others(component, to_come)
            may_restart(component)
            begin = time.monotonic()
            with doing(f"restarting {component.value}"):
                self._restart(component)
        except BridgeError as e:
            return Restarted(component=component, error=e)
        except OSError as e:
            place = f"{e.filename}: " if e.filename else ""
            hint = "fix the file system, then run `ca-bridge recover`"
            return Restarted(component=component, error=RestartError(f"{place}{e.strerror}", hint=hint))
        seconds = time.monotonic() - begin
        log.info("%s: healthy after %.1f s", component.value, seconds)
        return Restarted(component=component, seconds=seconds)

    def _too_soon(self, component: Component) -> RestartPostponedError | None:
        if self._at_once:
            return None
        restarted, interval = _times(self.store).get(component), self.settings.restart.min_interval
        now = datetime.now(UTC)
        if restarted is None or not (last := restarted.at) <= now < last + interval:
            return None
        at_once = "with --force" if self.content else f"`ca-bridge restart {component.value} --force` does it at once"
        return RestartPostponedError(
            f"{component.value}: wanted {duration_text(interval)} since its last restart (restart.min_interval), found "
            f"{int((now - last).total_seconds())} s",
            hint=f"run again after {last + interval:%H:%M:%S} UTC, or {at_once}",
        )

    def _wait_for_the_others(self, component: Component, to_come: Sequence[Component]) -> None:
        """Wait until no other component of this node is down, except those that this run restarts later."""
        beside = [other for other in _present(self.node) if other is not component and other not in to_come]
        found = self._unhealthy(beside)
        if not found:
            return
        log.info("%s: waits for its neighbours: %s", component.value, _sentence(found))
        found = self._wait_until_healthy(beside)
        if found:
            raise RestartPostponedError(
                f"{component.value}: wanted healthy neighbours before its restart, found {_sentence(found)}",
                hint="fix them, then run `ca-bridge restart`; --force restarts nevertheless",
            )

    def _unhealthy(self, components: Sequence[Component]) -> dict[Component, str]:
        found = {
            component: probes.trouble(component, self.node, self.settings.node.kubeconfig_dir)
            for component in components
        }
        return {component: text for component, text in found.items() if text is not None}

    def _wait_until_healthy(self, components: Sequence[Component]) -> dict[Component, str]:
        return wait_until(
            lambda: self._unhealthy(components),
            lambda troubles: not troubles,
            self.settings.restart.timeout,
            pause_seconds=_POLL_SECONDS,
        )

    def _restart(self, component: Component) -> None:
        settings = self.settings
        if settings.restart.method == "none":
            raise ValueError("the settings name no method to restart components with (restart.method)")
        if component is not Component.KUBELET and settings.restart.method == "static-pods":
            pod = self._pod(component)
            _remember(component, self.store)
            try:
                static_pods.restart(pod, self.store, settings.restart.timeout)
            except static_pods.NotEndedError as e:
                if not isinstance(pod.instances, _Answers):
                    raise
                text = f"{component.value}: can't see it end: it has no visible process or pod, and it still answers"
                hint = 'restart it by hand; a [restart] method = "command" sees the end of its command'
                raise ImpossibleError(text, hint=hint) from e
            return
        command, content = _command(component, settings), self._content(component)
        _remember(component, self.store)
        if content is not None:
            static_pods.replace(manifests.path_of(component, settings.node.kubeconfig_dir), content)
        if component is Component.KUBELET:
            take_copy(settings.node.kubeconfig_dir, control_plane.KUBELET_COPY, self.store)
        name, timeout = component.value, settings.restart.timeout
        if failure := command_failure(name, command, {"CA_BRIDGE_COMPONENT": name}, timeout):
            raise RestartError(f"{name}: its restart failed: {failure}", hint="see [restart.commands]")
        if component not in _present(self.node):
            return  # without a manifest here only the command's exit code shows success
        if found := self._wait_until_healthy([component]):
            text = f"{name}: wanted it to be healthy within {duration_text(timeout)}, found: {found[component]}"
            raise RestartError(text)

    def _pod(self, component: Component) -> Pod:
        directory = self.settings.node.kubeconfig_dir

        def trouble() -> str | None:
            return probes.trouble(component, self.node, directory)

        instances, settle = processes.instances(component)
        if not instances() and trouble() is None:
            instances, settle = _Answers(trouble), processes.PROCESS_SETTLES
        return Pod(
            name=component.value,
            manifest=manifests.path_of(component, directory),
            instances=instances,
            trouble=trouble,
            settle=settle,
            is_needed_by_api=component is Component.ETCD,
            content=self._content(component),
        )

    def _content(self, component: Component) -> bytes | None:
        """Return the manifest's next text, which names an existing serving pair; None: the manifest stays."""
        if self.content is not None or component not in self.node.manifests:
            return self.content
        try:
            return pairs.manifest_with_pair(self.node, component, self.settings.node.kubeconfig_dir)
        except ValueError as e:
            hint = "name the pair by hand, or take it away with `ca-bridge serving-certs off`"
            raise ImpossibleError(f"{component.value}: {e}", hint=hint) from None


class _Answers:
    """The instances of a component that only its answers show: whenever the answers stop, one instance has ended."""

    def __init__(self, trouble: Callable[[], str | None]) -> None:
        self._trouble, self._ends, self._answers = trouble, 0, True

    def __call__(self) -> frozenset[str]:
        answers = self._trouble() is None
        self._ends += self._answers and not answers
        self._answers = answers
        return frozenset({f"its answers (after {self._ends} ends)"} if answers else ())


def _not_tried(component: Component, failed: Restarted) -> BridgeError:
    kind = RestartPostponedError if isinstance(failed.error, PostponedError) else RestartError
    hint = f"fix {failed.component.value}, then run `ca-bridge restart`"
    return kind(f"{component.value}: not restarted, since {failed.component.value} was not", hint=hint)


def _sentence(troubles: Mapping[Component, str]) -> str:
    return "; ".join(f"{component.value}: {text}" for component, text in troubles.items())


def _present(node: Node) -> list[Component]:
    return [c for c in control_plane.ORDER if c in node.manifests or c is Component.KUBELET]


# --- the times of the last restarts ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LastRestart:
    """The last restart of a component, by the clock, and by the number of the newest installation before it."""

    at: datetime
    installation: int  #: As in `Backup.number`; 0: there was none.

    def is_after(self, backup: Backup) -> bool:
        """Whether the restart followed an installation, by its number, since the clock may have been set."""
        return self.installation >= backup.number


def restarted_since(store: Store, backup: Backup | None) -> list[Component]:
    """Return, in order, the components whose restart began after an installation; without its backup, all restarted."""
    times = _times(store)
    return [c for c in control_plane.ORDER if c in times and (backup is None or times[c].is_after(backup))]


def _times(store: Store) -> dict[Component, LastRestart]:
    return times_file(store).read() or {}


def times_file(store: Store) -> StateFile[dict[Component, LastRestart]]:
    """Return the file of last restarts; without it none counts as restarted."""
    what = "when each component was last restarted"
    return coded(dict[Component, LastRestart], store.restarted, what, OnDamage.START_OVER)


def _remember(component: Component, store: Store) -> None:
    """Record a restart before it happens, so that runs that are killed repeatedly do not repeat it."""
    now = LastRestart(at=datetime.now(UTC), installation=newest_number(store))
    times_file(store).put({**_times(store), component: now})


def obstacle(component: Component, node: Node, settings: Settings) -> ImpossibleError | None:
    """Return why the settings' method can't restart a component; None: it can."""
    if component is not Component.KUBELET and settings.restart.method == "static-pods":
        if component in node.manifests:
            return None
        path = manifests.path_of(component, settings.node.kubeconfig_dir)
        hint = "a component that is no static pod has its command in [restart.commands]"
        return ImpossibleError(f"{component.value}: there is no manifest {path} that can be read", hint=hint)
    if words := _command(component, settings):
        unsafe = unsafe_program(words)
        return None if unsafe is None else ImpossibleError(f"{component.value}: {unsafe}", hint=unsafe.hint)
    advice = control_plane.how_to_restart(component, settings.node)
    text = f"{component.value}: [restart.commands] has no command for it"
    return ImpossibleError(text, hint=f"name one, or by hand: {advice}")


def _command(component: Component, settings: Settings) -> list[str]:
    """Return the settings' command; by default systemd's for the kubelet, and none for the others."""
    return settings.restart.command(component) or (_systemctl() if component is Component.KUBELET else [])


# --- the kubelet -----------------------------------------------------------------------------------------------------


_SYSTEMCTL_LIMIT = timedelta(seconds=30)


def _systemctl() -> list[str]:
    """Return the command that restarts the kubelet; empty where systemd does not run, or has no kubelet."""
    program = shutil.which("systemctl")
    if program is None or not Path("/run/systemd/system").is_dir():  # sd_booted(3)
        return []
    look = Command(words=[program, "cat", "kubelet.service"], environment=os.environ, limit=_SYSTEMCTL_LIMIT)
    return [program, "restart", "kubelet.service"] if run(look).code == 0 else []


def take_copy(kubeconfig_dir: Path, copy: Path, store: Store) -> None:
    """Move away the kubelet's cached certificate, which it prefers, unless that is kubelet.conf's or a younger one."""
    path = kubeconfig_dir / "kubelet.conf"
    try:
        data = read(path)
        embedded = kubeconfig.parse(data).certificate_data if data is not None else None
        wanted = load_pem_certificates(embedded)[0] if embedded else None
    except (UnreadableError, KubeconfigError, ValueError) as e:
        raise RestartError(f"{path}: wanted the kubelet's kubeconfig, found: {e}") from e
    try:
        content = copy.read_bytes()
    except FileNotFoundError:
        return
    try:
        used = load_pem_certificates(content)[0]
    except ValueError:
        used = None
    if wanted is None or used == wanted or (used is not None and checks.is_rotated(copy, used, path, wanted)):
        return
    write_atomically(store.kubelet_copy, content)
    copy.unlink()
    log.info("kubelet: moved %s, its copy of another certificate, to %s", copy, store.kubelet_copy)


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartReport:
    """The result of `ca-bridge restart`."""

    components: tuple[Component, ...]  #: The components that were to be restarted.
    done: tuple[Restarted, ...] = ()
    advised: bool = False  #: With `restart.method = "none"` nothing was restarted; an operator has to.
    unknown: BridgeError | None = None  #: Some components do not show which certificates they use.

    @property
    def exit_code(self) -> int:
        """The worst exit code: 7 where the operator has to restart something."""
        codes = [restarted.exit_code for restarted in self.done]
        if self.advised and self.components:
            codes.append(Exit.NOT_LIVE)
        if self.unknown is not None:
            codes.append(self.unknown.exit_code)
        return Exit.worst(codes)


def restart_stale(
    settings: Settings, names: Sequence[str], now: Callable[[], datetime], *, force: bool, wait: timedelta
) -> RestartReport:
    """Restart the named components, or those that proof shows to use an old certificate."""
    named = _components(names)
    with session.alone(settings, wait) as (store, record):
        node = read_node(settings.node)
        if _ALL in names:
            named = [component for component in named if _has(node, component) or settings.restart.command(component)]
        components, unknown = (named, None) if named else _by_settings(node, settings, now())
        if settings.restart.method == "none":
            return RestartReport(components=tuple(components), advised=True, unknown=unknown)
        done = Restarts(node=node, settings=settings, store=store, record=record, force=force).all(components)
        return RestartReport(components=tuple(components), done=tuple(done), unknown=unknown)


_ALL = "all"


def _has(node: Node, component: Component) -> bool:
    """Whether a node of this role has the component, with or without its manifest."""
    return node.local_etcd if component is Component.ETCD else not node.is_etcd_host


def _components(names: Sequence[str]) -> list[Component]:
    known = {component.value: component for component in Component}
    if _ALL in names:
        return list(manifests.COMPONENTS)
    wrong = [name for name in names if name not in known]
    if wrong:
        wanted = f"all, or some of {', '.join(known)}"
        raise SettingsError([SettingsProblem("restart", wanted, name_found(name, known)) for name in wrong])
    return [known[name] for name in names]


def _by_settings(node: Node, settings: Settings, now: datetime) -> tuple[list[Component], BridgeError | None]:
    """Return the components to restart, and an error if more of them may need it."""
    wanted = settings.restart.components
    hint = "`ca-bridge prove` shows each check; `ca-bridge restart COMPONENT` restarts without a check"
    if not node.manifests and not node.is_worker:
        place = settings.node.kubeconfig_dir / "manifests"
        text = f"nothing is known of what runs here: there are no static-pod manifests in {place}"
        return [], BridgeError(text, hint=hint)
    if wanted.which != "needed":
        every = control_plane.ORDER if node.is_worker else manifests.COMPONENTS
        return [component for component in wanted.listed or every if component in _present(node)], None
    found = proof.look(node, settings, now)
    pairs = {item.spec.name for item in node.items if item.pair is not None and item.spec.component is None}
    unseen = [
        finding
        for finding in found.findings
        if finding.state in ("unknown", "no-answer") and finding.certificate not in pairs
    ]
    names = dict.fromkeys(
        check.certificate or "" if check.component is None else check.component.value for check in unseen
    )
    text = f"no answer from {', '.join(names)}, so it is unknown on which certificates all components run"
    return found.stale, BridgeError(text, hint=hint, exit_code=found.exit_code) if unseen else None
