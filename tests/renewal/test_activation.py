"""
What becomes of an installation: it is proven, waits for a better moment, or goes back; also over several runs.

The CA, the files and the commands that restart are real; what proof sees, and what speaks against a restart, is scripted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest import mock

import pytest

from bridge.control_plane import probes, proof, restarts, turns
from bridge.control_plane.neighbours import NeighbourError
from bridge.control_plane.probes import ProofState
from bridge.control_plane.proof import ProofFinding, ProofReport
from bridge.control_plane.restarts import Restarted, Restarts
from bridge.control_plane.turns import LeaseHeldError
from bridge.errors import BridgeError, Exit
from bridge.renewal import renew
from bridge.renewal.selection import RunOptions
from bridge.renewal.verify_and_install import Result
from bridge.settings.tables import Components, Settings
from bridge.specs import Component
from bridge.state import Store
from bridge.state.install import MANIFEST
from bridge.state.static_pods import StoppedError
from tests.kit.pki import PKI_SPECS, Pki, handmade_pki
from tests.kit.renewing import Quiet, settings_for

MANAGER, SCHEDULER = "controller-manager.conf", "scheduler.conf"


class KilledError(BaseException):
    """Stands for the end of the process."""


@dataclass(kw_only=True)
class Site:
    """A node, and the messages about it."""

    node: Pki
    directory: Path
    settings: Settings
    states: dict[str, ProofState] = field(default_factory=dict)  #: By certificate; all others are current.
    obstacle: BridgeError | None = None  #: To each restart.
    turns: list[Settings] = field(default_factory=list)

    def look(self, *_: object) -> ProofReport:
        """As `prove.look`."""
        findings = [
            ProofFinding(
                component=spec.component, certificate=name, what="works", state=state, detail="says the script"
            )
            for name, spec in PKI_SPECS.items()
            if (state := self.states.get(name, "current"))
        ]
        return ProofReport(findings=tuple(findings))

    @contextlib.contextmanager
    def turn(self, _: object, settings: Settings, *__: object, **___: object) -> Iterator[Callable[[Component], None]]:
        """As `cluster.turn`."""
        self.turns.append(settings)
        if isinstance(self.obstacle, LeaseHeldError):
            raise self.obstacle

        def may_restart(_: Component) -> None:
            if self.obstacle is not None:
                raise self.obstacle

        yield may_restart

    def renew(self, *names: str, restarts: bool = True) -> Result:
        """One run."""
        return renew.run(self.settings, RunOptions(names=names, restarts=restarts), self.clock, Quiet())[0]

    def clock(self) -> datetime:
        """The node's."""
        return datetime.now(UTC)

    def hold_the_rollback(self, is_back: bool) -> None:
        """Another node is not well from the first restart of it on."""
        if is_back:
            self.obstacle = NeighbourError("another node is not well")

    def files(self) -> dict[str, bytes]:
        """All kubeconfigs and the PKI."""
        return {str(path): path.read_bytes() for path in self.node.kubeconfig_dir.rglob("*") if path.is_file()}

    @property
    def restarted(self) -> list[str]:
        """Whose commands ran."""
        return self._lines("restarts")

    @property
    def reported(self) -> list[str]:
        """What the hooks got: event, exit code, run, renewed certificates."""
        return self._lines("hooks")

    def _lines(self, name: str) -> list[str]:
        path = self.directory / name
        return path.read_text().splitlines() if path.exists() else []

    @property
    def is_unproven(self) -> bool:
        """Whether something is not proven."""
        return (self.directory / "state/unproven.json").exists()

    def change(self, **restart: object) -> None:
        """Other settings."""
        self.settings = dataclasses.replace(
            self.settings,
            restart=dataclasses.replace(self.settings.restart, **restart),  # type: ignore[arg-type]
        )


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Nothing is due, all is well."""
    node = handmade_pki(tmp_path / "node")
    variables = "$CA_BRIDGE_EVENT $CA_BRIDGE_EXIT_CODE $CA_BRIDGE_RUN_ID $CA_BRIDGE_RENEWED"
    hook = f"sh -c 'echo {variables} >>{tmp_path}/hooks'"
    command = f"sh -c 'echo $CA_BRIDGE_COMPONENT >>{tmp_path}/restarts'"
    more = [
        *("[hooks]", f"success = {json.dumps(hook)}", f"failure = {json.dumps(hook)}"),
        *("[restart]", 'method = "command"', 'prove_for = "1s"', "[restart.commands]"),
        *(f"{component.value} = {json.dumps(command)}" for component in Component),
    ]
    site = Site(node=node, directory=tmp_path, settings=settings_for(node, tmp_path, "\n".join(more)))
    site.change(min_interval=timedelta())
    monkeypatch.setattr(proof, "look", site.look)
    monkeypatch.setattr(turns, "turn", site.turn)
    monkeypatch.setattr(probes, "trouble", lambda *_: None)
    return site


def test_what_works_is_proven(site: Site) -> None:
    """The component is restarted once, and no work stays open."""
    result = site.renew(MANAGER, SCHEDULER)
    assert (result.exit_code, site.restarted) == (0, ["kube-controller-manager", "kube-scheduler"])
    assert not site.is_unproven
    assert site.renew().exit_code == 0
    assert len(site.restarted) == 2
    assert [line.split()[:2] for line in site.reported] == [["success", "0"]]


POSTPONED = [
    (NeighbourError("another node is not well"), Exit.UNAVAILABLE),
    (LeaseHeldError("it is another node's turn"), Exit.UNAVAILABLE),
    (StoppedError("stopped by SIGTERM in the middle of a restart"), Exit.NOT_LIVE),
]


@pytest.mark.parametrize(("obstacle", "code"), POSTPONED, ids=[type(one).__name__ for one, _ in POSTPONED])
def test_what_can_not_be_restarted_now_stays_and_is_restarted_by_a_later_run(
    site: Site, obstacle: BridgeError, code: int
) -> None:
    """It says nothing against the certificates: they are not put back, and no CA is blamed."""
    old, site.obstacle, site.states = site.files(), obstacle, {MANAGER: "stale"}
    result = site.renew(MANAGER)
    new = site.files()
    assert new != old
    assert (result.exit_code, site.restarted, site.is_unproven) == (code, [], True)
    assert str(obstacle) in str(result.errors[0])
    assert not (site.directory / "state/attempts.json").exists()
    site.obstacle, site.states = None, {}
    assert site.renew().exit_code == 0
    assert (site.files(), site.restarted, site.is_unproven) == (new, ["kube-controller-manager"], False)
    failed, done = (line.split() for line in site.reported)
    assert failed[:2] == ["failure", str(code)]
    assert (done[:2], done[3:]) == (["success", "0"], [MANAGER])
    assert failed[2] == done[2]  # of the run that renewed


def test_a_restart_that_is_impossible_leaves_the_certificates_where_they_are(site: Site) -> None:
    """Exit 7 says what is left, run after run, until it is restarted by hand or there is a way."""
    site.obstacle, site.states = NeighbourError("another node is not well"), {MANAGER: "stale", SCHEDULER: "stale"}
    assert site.renew(MANAGER, SCHEDULER).exit_code == Exit.UNAVAILABLE
    new, site.obstacle, commands = site.files(), None, site.settings.restart.commands
    site.change(commands={name: text for name, text in commands.items() if name != "kube-controller-manager"})
    site.states = {MANAGER: "stale"}
    for _ in range(2):
        result = site.renew()
        assert (result.exit_code, site.files(), site.is_unproven) == (Exit.NOT_LIVE, new, True)
        [error] = [error for error in result.errors if error.exit_code == Exit.NOT_LIVE]
        assert "kube-controller-manager: [restart.commands] has no command" in str(error)
    assert site.restarted == ["kube-scheduler"]
    site.states = {}
    assert (site.renew().exit_code, site.is_unproven) == (0, False)


def test_what_is_refused_goes_back_though_another_restart_is_impossible(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The certificates themselves are bad."""
    old = site.files()
    site.obstacle = NeighbourError("another node is not well")
    site.renew(MANAGER)
    site.obstacle = None
    site.change(commands={"kube-scheduler": "true"})
    monkeypatch.setattr(proof, "look", lambda *_: _with(site, MANAGER, "current" if site.files() == old else "refused"))
    assert site.renew().exit_code == Exit.ROLLED_BACK
    assert site.files() == old


def _with(site: Site, name: str, state: ProofState) -> ProofReport:
    site.states = {name: state}
    return site.look()


def test_a_second_restart_too_soon_is_no_failure(site: Site) -> None:
    """A restart that has to wait is no failure, and a check that failed before the renewal is no reason for a rollback."""
    site.change(min_interval=timedelta(hours=1))
    site.renew(MANAGER)
    site.states = {MANAGER: "refused"}
    old = site.files()
    result = site.renew(MANAGER)
    assert (result.exit_code, site.is_unproven) == (Exit.UNAVAILABLE, True)
    assert "restart.min_interval" in str(result.errors[0])
    assert site.files() != old
    site.change(min_interval=timedelta())
    assert site.renew().exit_code == Exit.NOT_LIVE
    assert site.restarted == ["kube-controller-manager"] * 2


def test_what_does_not_work_although_another_waits_goes_back(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollback restarts only the components that the renewal had restarted."""
    old = site.files()

    @contextlib.contextmanager
    def turn(_: object, settings: Settings, *__: object, **___: object) -> Iterator[Callable[[Component], None]]:
        site.turns.append(settings)

        def may_restart(component: Component) -> None:
            if component is Component.SCHEDULER:
                raise NeighbourError("another node is not well")
            site.states = {MANAGER: "refused" if len(site.turns) == 1 else "current"}

        yield may_restart

    monkeypatch.setattr(turns, "turn", turn)
    result = site.renew(MANAGER, SCHEDULER)
    assert (result.exit_code, site.files(), site.is_unproven) == (Exit.ROLLED_BACK, old, False)
    assert site.restarted == ["kube-controller-manager"] * 2
    assert all(one.cluster.neighbours != "ignore" for one in site.turns)


@contextlib.contextmanager
def before_restarts(act: Callable[[bool], None]) -> Iterator[None]:
    """Call `act` right before components are restarted; its argument says whether that is a rollback."""
    first = Restarts.all

    def restart_all(given: Restarts, components: Sequence[Component]) -> list[Restarted]:
        act(given.going_back)
        return first(given, components)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Restarts, "all", restart_all)
        yield


def failing(site: Site, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """From the installation of the next ones on they are refused; nothing is wrong with the old ones."""
    old = site.files()

    def look(*_: object) -> ProofReport:
        site.states = dict.fromkeys(names, "current" if site.files() == old else "refused")
        return site.look()

    monkeypatch.setattr(proof, "look", look)


@pytest.mark.parametrize("place", ["before the files are put back", "before the restarts"])
def test_a_rollback_that_was_cut_off_is_continued(site: Site, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """The next run continues it, due or not, and never exits with 0 while components run on the files that were rolled back."""
    old = site.files()
    failing(site, monkeypatch, MANAGER)

    def killed(given: Restarts, components: Sequence[Component]) -> list[Restarted]:
        if not given.going_back:
            return first(given, components)
        raise KilledError

    first = Restarts.all
    with monkeypatch.context() as patch:
        if place == "before the restarts":
            patch.setattr(Restarts, "all", killed)
        else:
            patch.setattr("bridge.state.backups.put_back", mock.Mock(side_effect=KilledError))
        with pytest.raises(KilledError):
            site.renew(MANAGER)
    assert (site.files() == old) is (place == "before the restarts")
    assert site.is_unproven
    result = site.renew()
    assert (result.exit_code, site.files(), site.is_unproven) == (Exit.ROLLED_BACK, old, False)
    assert site.restarted == ["kube-controller-manager"] * 2
    assert "everything runs on the old files again" in str(result.errors[0])
    assert site.reported[-1].split()[:2] == ["failure", "8"]
    assert site.renew().exit_code == 0


def test_what_could_not_be_restarted_back_is_restarted_by_a_later_run(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another node may not be well at that moment; forced, the cluster could lose its quorum."""
    failing(site, monkeypatch, MANAGER)
    with before_restarts(site.hold_the_rollback):
        result = site.renew(MANAGER)
    assert (result.exit_code, site.restarted, site.is_unproven) == (Exit.ROLLED_BACK, ["kube-controller-manager"], True)
    assert "another node is not well" in str(result.outcomes[0].error)
    site.obstacle = None
    assert site.renew().exit_code == Exit.ROLLED_BACK
    assert (site.restarted, site.is_unproven) == (["kube-controller-manager"] * 2, False)


def unproven(site: Site, *names: str) -> list[dict[str, bytes]]:
    """One run a name whose restarts are put off; the files before, and after each."""
    steps = [site.files()]
    site.obstacle = NeighbourError("another node is not well")
    for name in names:
        assert site.renew(name).exit_code == Exit.UNAVAILABLE
        steps.append(site.files())
    site.obstacle = None
    return steps


@pytest.mark.parametrize("names", [(MANAGER, SCHEDULER), (MANAGER, MANAGER), (MANAGER, SCHEDULER, MANAGER)])
@pytest.mark.parametrize("wrong", [MANAGER, SCHEDULER])
def test_what_several_runs_installed_goes_back_to_what_was_in_use(
    site: Site, names: tuple[str, ...], wrong: str
) -> None:
    """A rollback skips the files of an earlier unproven run, too, because no check has seen them in use."""
    before, *_ = unproven(site, *names)
    site.states = {wrong: "refused"}
    result = site.renew()
    assert result.exit_code == (Exit.ROLLED_BACK if wrong in names else 0)
    assert (site.files() == before) is (wrong in names)
    assert not site.is_unproven
    runs = {line.split()[2] for line in site.reported}
    last = {line.split()[2] for line in site.reported if line.split()[1] == str(result.exit_code)}
    assert len(runs) == len(names)
    assert len(last) == len(set(names))  # the first of two for the same certificate has nothing live any more


@pytest.mark.parametrize("harm", ["gone", "damaged", "expired"])
def test_if_one_set_cant_go_back_none_does(site: Site, monkeypatch: pytest.MonkeyPatch, harm: str) -> None:
    """All is looked at before the first file moves; and the next run proves again."""
    *_, new = unproven(site, MANAGER, SCHEDULER)
    first = min((site.directory / "state/backups").iterdir())
    if harm == "gone":
        shutil.rmtree(first)
    elif harm == "damaged":
        next(path for path in first.iterdir() if path.name != MANIFEST).write_text("x")
    else:
        later = datetime.now(UTC) + timedelta(days=400)
        monkeypatch.setattr(site, "clock", lambda: later)
    site.states = {MANAGER: "refused"}
    result = site.renew("apiserver") if harm != "expired" else site.renew()
    assert Exit.NOT_LIVE in {error.exit_code for error in result.errors}
    assert "it was not rolled back" in str(result.errors[0])
    assert all(site.files()[path] == new[path] for path in new if path.endswith((MANAGER, SCHEDULER)))
    assert site.is_unproven
    site.states = {}
    monkeypatch.setattr(site, "clock", lambda: datetime.now(UTC))
    assert site.renew().exit_code == 0
    assert not site.is_unproven


def test_backups_are_kept_until_all_is_proven(site: Site) -> None:
    """Backups are kept until all is proven, even if the settings keep fewer."""
    site.settings = dataclasses.replace(site.settings, backups=dataclasses.replace(site.settings.backups, keep=1))
    before, *_ = unproven(site, MANAGER, SCHEDULER)
    site.states = {MANAGER: "refused"}
    assert site.renew().exit_code == Exit.ROLLED_BACK
    assert site.files() == before
    site.states = {}
    assert site.renew("apiserver").exit_code == 0
    assert len(list((site.directory / "state/backups").iterdir())) <= 2


def test_what_was_renewed_meanwhile_stays(site: Site) -> None:
    """A certificate that another run renewed with `--no-restart` is not at fault, so the rollback leaves it."""
    before, *_ = unproven(site, MANAGER, SCHEDULER)
    assert site.renew(MANAGER, restarts=False).exit_code == 0
    newer = site.files()
    site.states = {SCHEDULER: "refused"}
    assert site.renew().exit_code == Exit.ROLLED_BACK
    [manager, scheduler] = [next(p for p in before if p.endswith(name)) for name in (MANAGER, SCHEDULER)]
    assert (site.files()[manager], site.files()[scheduler]) == (newer[manager], before[scheduler])


def test_a_restart_back_that_fails_keeps_no_other_one_away(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run restarts the components that were not tried because of it."""
    before = site.files()
    failing(site, monkeypatch, MANAGER)
    commands = dict(site.settings.restart.commands)
    count = f"sh -c 'echo kube-controller-manager >>{site.directory}/restarts; test $(wc -l <{site.directory}/restarts) = 1'"
    site.change(commands={**commands, "kube-controller-manager": count})
    assert site.renew(MANAGER, SCHEDULER).exit_code == Exit.ROLLED_BACK
    assert (site.files() == before, site.is_unproven) == (True, True)
    site.change(commands=commands)
    assert site.renew().exit_code == Exit.ROLLED_BACK
    assert site.restarted[-1] == "kube-scheduler"
    assert not site.is_unproven


def test_what_is_still_to_be_restarted_back_keeps_no_renewal_away(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another node may be away for good; nor does the renewal forget what is to be restarted."""
    failing(site, monkeypatch, MANAGER)
    with before_restarts(site.hold_the_rollback):
        assert site.renew(MANAGER).exit_code == Exit.ROLLED_BACK
        old = site.files()
        monkeypatch.setattr(proof, "look", site.look)
        assert site.renew("apiserver").exit_code == Exit.ROLLED_BACK
    new = site.files()
    assert (new != old, site.is_unproven, site.restarted) == (True, True, ["kube-controller-manager"])
    site.obstacle = None
    assert site.renew().exit_code == 0
    assert site.restarted[1:] == ["kube-apiserver", "kube-controller-manager"]
    assert (site.is_unproven, site.files()) == (False, new)


def test_a_stale_component_that_is_not_listed_is_reported_and_no_reason_to_go_back(site: Site) -> None:
    """The operator has listed only the others, and restarts it by hand; each run reports it until then."""
    site.change(components=Components("listed", (Component.SCHEDULER,)))
    old = site.files()
    with before_restarts(lambda _: site.states.update({MANAGER: "stale"})):
        result = site.renew(MANAGER, SCHEDULER)
    assert (result.exit_code, site.files() == old, site.is_unproven) == (Exit.NOT_LIVE, False, True)
    assert "restart.components does not list" in str(result.errors[0])
    assert site.renew().exit_code == Exit.NOT_LIVE
    assert site.restarted == ["kube-scheduler"]
    site.states = {}
    assert site.renew().exit_code == 0


def test_what_runs_on_the_new_certificates_is_not_restarted_again_while_another_one_waits(site: Site) -> None:
    """Each later run looks again; it restarts what it has to."""
    site.change(on_failure="keep", components=Components("all"))
    site.states = {MANAGER: "unknown"}
    assert [site.renew(*names).exit_code for names in ((MANAGER,), (), ())] == [Exit.FAILED] * 3
    assert site.restarted == ["kube-controller-manager"]


def test_a_restart_back_that_fails_is_tried_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the component would run on files that are no longer on disk, without any message."""
    before = site.files()
    failing(site, monkeypatch, MANAGER)
    commands = dict(site.settings.restart.commands)
    site.change(commands={**commands, "kube-controller-manager": f"mkdir {site.directory}/once"})
    assert site.renew(MANAGER).exit_code == Exit.ROLLED_BACK
    assert (site.files() == before, site.is_unproven) == (True, True)
    site.change(commands=commands)
    assert site.renew().exit_code == Exit.ROLLED_BACK
    assert (site.restarted, site.is_unproven) == (["kube-controller-manager"], False)


def test_what_earlier_runs_had_restarted_is_restarted_back_too(site: Site) -> None:
    """Without manifests only our own state knows which components were restarted."""
    first = Restarts.all

    def restart_all(given: Restarts, _: Sequence[Component]) -> list[Restarted]:
        first(given, [Component.CONTROLLER_MANAGER])
        raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Restarts, "all", restart_all)
        with pytest.raises(KilledError):
            site.renew(MANAGER, SCHEDULER)
    site.states = {SCHEDULER: "refused"}
    assert site.renew().exit_code == Exit.ROLLED_BACK
    assert site.restarted == [
        *("kube-controller-manager", "kube-scheduler"),  # the second by the run that finds out
        *("kube-controller-manager", "kube-scheduler"),
    ]


def test_a_file_that_is_away_for_a_while_ends_nothing(site: Site) -> None:
    """A message says so, and the open work is done when the file is back."""
    unproven(site, MANAGER)
    path = site.node.kubeconfig_dir / MANAGER
    data = path.read_bytes()
    path.write_text("kind: Config\n")
    result = site.renew()
    assert "installed, and not proven: controller-manager.conf" in str(result.errors[0])
    assert (result.exit_code, site.is_unproven, site.restarted) == (Exit.FAILED, True, [])
    path.write_bytes(data)
    assert site.renew().exit_code == 0
    assert (site.is_unproven, site.restarted) == (False, ["kube-controller-manager"])


def test_settings_that_leave_restarts_to_people_say_what_is_left(site: Site) -> None:
    """Exit 7 says so once, in the middle of a rollback, too."""
    unproven(site, MANAGER)
    site.change(method="none")
    result = site.renew()
    assert result.exit_code == Exit.NOT_LIVE
    assert "to be restarted: kube-controller-manager" in str(result.errors[0])
    assert "kube-controller-manager" in result.errors[0].hint
    assert site.renew().exit_code == 0


def test_a_failure_that_is_kept_is_reported_until_it_is_gone(site: Site) -> None:
    """The failure is reported after another renewal, too, though the check failed before that one."""
    site.change(on_failure="keep")
    site.states = {MANAGER: "unknown"}
    assert site.renew(MANAGER).exit_code == Exit.FAILED
    site.states = {MANAGER: "refused"}
    assert site.renew().exit_code == Exit.NOT_LIVE
    assert site.renew(SCHEDULER).exit_code == Exit.NOT_LIVE
    assert site.renew().exit_code == Exit.NOT_LIVE
    site.states = {}
    assert site.renew().exit_code == 0
    assert not site.is_unproven


def test_without_restarts_nothing_is_restarted_or_proven(site: Site) -> None:
    """A run without restarts leaves no open work of its own, and leaves that of earlier runs to later ones."""
    site.obstacle = NeighbourError("another node is not well")
    assert site.renew(MANAGER).exit_code == Exit.UNAVAILABLE
    site.states, site.obstacle = {SCHEDULER: "refused"}, None
    assert site.renew(SCHEDULER, restarts=False).exit_code == 0
    assert (site.restarted, site.is_unproven) == ([], True)
    assert site.renew().exit_code == 0
    assert (site.restarted, site.is_unproven) == (["kube-controller-manager"], False)


def test_what_could_not_be_seen_before_is_no_excuse(site: Site) -> None:
    """A check that was unknown before and is refused now counts as failed by this renewal."""
    old, site.states = site.files(), {MANAGER: "unknown"}
    with before_restarts(lambda _: site.states.update({MANAGER: "refused"})):
        result = site.renew(MANAGER)
    assert (result.exit_code, site.files()) == (Exit.ROLLED_BACK, old)
    assert "the old ones do not work, either" in str(result.outcomes[0].error)


def owing(site: Site) -> Path:
    """A site where an installation is not proven, since nothing may be restarted now; where that is written down."""
    site.obstacle = NeighbourError("another node is not well")
    site.renew(MANAGER)
    site.obstacle = None
    path = site.directory / "state/unproven.json"
    assert path.exists()
    return path


def test_a_clock_that_was_set_back_makes_no_restart(site: Site) -> None:
    """A restart before the installation is none after it, whatever the clock said."""
    site.renew(MANAGER)
    times = restarts.times_file(Store(site.directory / "state"))
    ahead = {
        one: dataclasses.replace(last, at=last.at + timedelta(days=1)) for one, last in (times.read() or {}).items()
    }
    times.put(ahead)
    owing(site)
    assert site.restarted == ["kube-controller-manager"]
    assert site.renew().exit_code == 0
    assert site.restarted == ["kube-controller-manager"] * 2


@pytest.mark.parametrize("text", ["", "{", '{"certificates": [3]}', None], ids=["empty", "cut", "other", "bit flip"])
def test_a_damaged_file_never_means_that_nothing_is_unproven(site: Site, text: str | None) -> None:
    """Exit 7 on each run, nothing is installed over it, and what it says is kept."""
    path = owing(site)
    damaged = path.read_text().replace("going_back", "going_bacj") if text is None else text
    path.write_text(damaged)
    before = site.files()
    for _ in range(2):
        result = site.renew(SCHEDULER)
        assert result.exit_code == Exit.NOT_LIVE
        assert "--set-aside" in result.errors[0].hint
    assert (path.read_text(), site.files()) == (damaged, before)


def test_a_passing_read_error_deletes_no_unproven_certificate(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 7 while the disk can't read it; the next run that can proves what was installed."""
    path, read = owing(site), Path.read_bytes

    def broken(one: Path) -> bytes:
        if one == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(one))
        return read(one)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", broken)
        result = site.renew()
    assert (result.exit_code, site.restarted) == (Exit.NOT_LIVE, [])
    assert "Input/output error" in str(result.errors[0])
    assert site.renew().exit_code == 0
    assert (site.restarted, site.is_unproven) == (["kube-controller-manager"], False)
