"""With `restart.method = "none"`, or --no-restart, what was installed stays unproven until it is seen in use."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest import mock

import pytest

from bridge import monitoring
from bridge.cli import expiration
from bridge.control_plane import probes
from bridge.diagnosis import examination
from bridge.errors import Exit
from bridge.node import processes
from bridge.node.reading import read_node
from bridge.renewal import pairs, renew
from bridge.renewal.selection import RunOptions
from bridge.renewal.transaction import put_back_and_retire
from bridge.renewal.verify_and_install import Result
from bridge.settings.load import parse
from bridge.settings.tables import Settings
from bridge.state import Store, copies
from tests.kit.pki import Pki, handmade_pki
from tests.kit.renewing import Quiet, settings_for

SCHEDULER = "scheduler.conf"
MANIFEST = """\
apiVersion: v1
kind: Pod
metadata: {{name: kube-scheduler}}
spec:
  containers:
  - name: kube-scheduler
    image: registry.k8s.io/kube-scheduler:v1.37.2
    command: [kube-scheduler, "--kubeconfig={conf}", "--secure-port=0"]
"""


def now() -> datetime:
    return datetime.now(UTC)


class Site:
    """A node with a scheduler that only waits, and whose manifest names its kubeconfig."""

    def __init__(self, directory: Path) -> None:
        self.pki: Pki = handmade_pki(directory / "node")
        self.conf = self.pki.kubeconfig_dir / SCHEDULER
        manifest = self.pki.kubeconfig_dir / "manifests/kube-scheduler.yaml"
        manifest.parent.mkdir()
        manifest.write_text(MANIFEST.format(conf=self.conf))
        self.log = directory / "log"
        hooks = "\n".join(f"{one} = \"sh -c 'echo {one} >>{self.log}'\"" for one in ("success", "failure"))
        self.settings: Settings = settings_for(self.pki, directory, f"[hooks]\n{hooks}")

    def restart_with(self, command: str) -> None:
        """Have a command restart the scheduler, whatever the rest of the cluster does."""
        table = f'method = "command"\nprove_for = "1s"\non_failure = "keep"\ncommands.kube-scheduler = "{command}"'
        parsed = parse(f'[restart]\n{table}\n[cluster]\nlease = false\nneighbours = "ignore"')
        self.settings = dataclasses.replace(self.settings, restart=parsed.restart, cluster=parsed.cluster)

    def renew(self, *names: str, restarts: bool = True) -> Result:
        """One run."""
        return renew.run(self.settings, RunOptions(names=names, restarts=restarts), now, Quiet())[0]

    @property
    def hooks(self) -> list[str]:
        """Which hooks ran."""
        return self.log.read_text().split() if self.log.exists() else []

    @property
    def warnings(self) -> tuple[bool, bool, bool]:
        """Whether Nagios, the metrics and the doctor warn."""
        line, _, status = expiration.nagios_check(self.settings, now(), None, None, {})
        known = monitoring.known_here(self.settings, now())
        found = [one.check for one in examination.examine(self.settings, now())]
        return (
            status == 1 and f"kube-scheduler does not use its new {SCHEDULER} yet" in line,
            'ca_bridge_certificate_not_in_use{name="scheduler.conf",component="kube-scheduler"} 1'
            in monitoring.of_node(self.settings, now(), known),
            "not-in-use" in found,
        )


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@contextlib.contextmanager
def scheduler(conf: Path) -> Iterator[None]:
    """A process that is called as a scheduler is."""
    time.sleep(0.02)  # the start of a process is known to a hundredth of a second
    program = "import sys; print('up', flush=True); sys.stdin.read()"
    command = ["bash", "-c", 'exec -a kube-scheduler "$@"', "-", sys.executable, "-c", program, f"--kubeconfig={conf}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "up\n"
        time.sleep(0.02)
        try:
            yield
        finally:
            started.kill()


@pytest.mark.attack("N2")
def test_each_run_says_what_is_not_restarted_until_it_is(site: Site) -> None:
    """The success hook comes when the scheduler is seen to be younger than its kubeconfig, and then all is quiet."""
    with scheduler(site.conf):
        assert site.renew(SCHEDULER).exit_code == Exit.DONE
        assert (site.hooks, site.warnings) == ([], (True, True, True))
        for _ in range(2):
            late = site.renew()
            assert late.exit_code == Exit.NOT_LIVE
            assert "not seen in use: scheduler.conf" in str(late.errors[0])
            assert "move " in (late.errors[0].hint or "")
        assert "success" not in site.hooks
    site.log.unlink()
    with scheduler(site.conf):
        assert site.renew().exit_code == Exit.DONE
        assert (site.hooks, site.warnings) == (["success"], (False, False, False))
        assert not Store(site.settings.node.state_dir).unproven.exists()


@pytest.mark.attack("N2")
def test_what_was_postponed_is_waited_for_and_no_run_restarts_for_it(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --no-restart each later run says what is not in use, until it is; without it the first run restarts it."""
    monkeypatch.setattr(probes, "trouble", lambda *_: None)  # nothing else runs here
    restarted = tmp_path / "restarted"
    site.restart_with(f"touch {restarted}")
    postponed = Store(site.settings.node.state_dir).postponed
    with scheduler(site.conf):
        assert site.renew(SCHEDULER, restarts=False).exit_code == Exit.DONE
        assert (site.hooks, site.warnings) == (["success"], (True, True, True))
        for options in ({}, {"restarts": False}):
            late = site.renew(**options)
            assert late.exit_code == Exit.NOT_LIVE
            assert "to be restarted: kube-scheduler" in str(late.errors[0])
        assert site.renew("admin.conf").exit_code == Exit.NOT_LIVE  # it restarts for its own certificates alone
        assert not restarted.exists()
    with scheduler(site.conf):
        assert site.renew().exit_code == Exit.DONE
        assert site.warnings == (False, False, False)
        assert not postponed.exists()
        site.renew(SCHEDULER)
        assert restarted.exists()


@pytest.mark.attack("N2")
def test_without_a_method_no_restart_is_due_just_as_well(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `restart.method = "none"`, too, and a method that is set later does not restart for it."""
    monkeypatch.setattr(probes, "trouble", lambda *_: None)
    restarted = tmp_path / "restarted"
    with scheduler(site.conf):
        assert site.renew(SCHEDULER, restarts=False).exit_code == Exit.DONE
        assert site.warnings == (True, True, True)
        assert site.renew().exit_code == Exit.NOT_LIVE
        site.restart_with(f"touch {restarted}")
        late = site.renew()
        assert late.exit_code == Exit.NOT_LIVE
        assert "to be restarted: kube-scheduler" in str(late.errors[0])
        assert not restarted.exists()
    with scheduler(site.conf):
        assert site.renew().exit_code == Exit.DONE
        assert site.warnings == (False, False, False)


def test_what_was_postponed_and_is_replaced_is_forgotten(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that restarts has installed another certificate in its place."""
    monkeypatch.setattr(probes, "trouble", lambda *_: None)
    site.restart_with("false")
    with scheduler(site.conf):
        assert site.renew(SCHEDULER, restarts=False).exit_code == Exit.DONE
        site.renew(SCHEDULER)
        assert not Store(site.settings.node.state_dir).postponed.exists()


@pytest.mark.parametrize("is_killed", [False, True])
def test_what_was_put_back_is_waited_for(site: Site, monkeypatch: pytest.MonkeyPatch, is_killed: bool) -> None:
    """After a `rollback`, be it killed once the files were back, each run names what runs on the replaced ones."""
    before = site.conf.read_bytes()
    assert site.renew(SCHEDULER).exit_code == Exit.DONE
    with scheduler(site.conf):
        assert site.renew().exit_code == Exit.DONE
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            if is_killed:
                patch.setattr(copies, "finish", mock.Mock(side_effect=KeyboardInterrupt))
            put_back_and_retire(site.settings, None, now, Quiet(), force=False, wait=timedelta())
        assert site.conf.read_bytes() == before
        assert site.warnings == (True, True, True)
        for _ in range(2):
            late = site.renew()
            assert late.exit_code == Exit.NOT_LIVE
            assert "to be restarted: kube-scheduler" in str(late.errors[0])
    with scheduler(site.conf):
        assert site.renew().exit_code == Exit.DONE
        assert site.warnings == (False, False, False)


def test_what_reloads_is_not_waited_for(site: Site) -> None:
    """A client certificate that no component reads at its start is a success at once."""
    with scheduler(site.conf):
        assert site.renew("admin.conf").exit_code == Exit.DONE
    assert (site.hooks, site.warnings) == (["success"], (False, False, False))


def test_a_component_that_is_not_seen_is_not_in_use(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its manifest says that it should run here; that no process of it is found is no proof."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")  # no crictl
    monkeypatch.setattr(processes, "running", lambda *_: [])
    assert site.renew(SCHEDULER).exit_code == Exit.DONE
    assert site.renew().exit_code == Exit.NOT_LIVE


def test_without_a_manifest_nothing_is_due(site: Site) -> None:
    """A component that does not run here as a static pod is not waited for, since its state is unknown."""
    (site.pki.kubeconfig_dir / "manifests/kube-scheduler.yaml").unlink()
    assert site.renew(SCHEDULER).exit_code == Exit.DONE
    assert site.hooks == ["success"]
    assert site.renew().exit_code == Exit.DONE


@pytest.mark.parametrize("debt", ["postponed", "pairs"])
def test_a_look_takes_no_damaged_file_away(site: Site, debt: str) -> None:
    """A monitor comes by every few minutes: the next run still says what was lost, and where it is kept, once."""
    store = Store(site.settings.node.state_dir)
    store.prepare()
    path: Path = getattr(store, debt)
    path.write_text("{")
    for look in range(2):
        assert pairs.late(site.settings, read_node(site.settings.node), now()) == []
        assert path.exists() is not bool(look)
        errors = renew.run(site.settings, RunOptions(), now, Quiet())[0].errors
        assert ["is in" in error.hint and path.name in str(error) for error in errors] == [True] * (not look)
