"""The metrics file: `renew` writes it at the end of each run, with any result, and follows no other user's link."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bridge.settings.load import parse
from tests.kit import metrics
from tests.kit.cas import Bridge, add_openssl
from tests.kit.pki import handmade_pki

AUTHORITIES = ("ca", "etcd-ca", "front-proxy-ca")
SOMEBODY = 65534

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other users: run the tests as root")


def bridge_of(tmp_path: Path, *, days: int = 100) -> Bridge:
    """A node whose certificates end in so many days, with CAs and a metrics file."""
    pki = handmade_pki(tmp_path / "node", not_after=datetime.now(UTC) + timedelta(days=days))
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    for name in AUTHORITIES:
        add_openssl(bridge, name)
    (tmp_path / "textfile").mkdir()
    bridge.add("metrics", {"file": str(file_of(bridge))})
    return bridge


def file_of(bridge: Bridge) -> Path:
    return bridge.directory.parent / "textfile/ca-bridge.prom"


def ends(bridge: Bridge) -> dict[str, float]:
    """By the labels of each certificate."""
    return metrics.samples(file_of(bridge).read_text())["ca_bridge_certificate_not_after_seconds"]


@pytest.mark.kube("promtool")
def test_a_run_with_nothing_due_is_reported(tmp_path: Path) -> None:
    """The collector may read the file, Prometheus takes it, and it says the same as `check-expiration`."""
    bridge = bridge_of(tmp_path)
    before = time.time()
    run = bridge.run("renew")
    assert (run.returncode, run.stderr) == (0, "")
    assert "nothing is due" in run.stdout
    file = file_of(bridge)
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert [one.name for one in file.parent.iterdir()] == [file.name]
    metrics.check(file.read_text())
    found = metrics.samples(file.read_text())
    assert found["ca_bridge_last_run_exit_code"] == {"": 0}
    assert found["ca_bridge_consecutive_failures"] == {"": 0}
    assert found["ca_bridge_last_run_seconds"] == found["ca_bridge_last_success_seconds"]
    assert int(before) <= found["ca_bridge_last_run_seconds"][""] <= time.time()
    assert 0 < found["ca_bridge_last_run_duration_seconds"][""] < 600
    assert bridge.run("check-expiration", "-o", "prometheus").stdout == file.read_text()


def test_a_night_with_nothing_due_takes_no_lock(tmp_path: Path) -> None:
    """The file is still written, the run loads no command line, and fails where the file can't be written."""
    bridge = bridge_of(tmp_path)
    assert bridge.run("renew").returncode == 0
    first = metrics.value(file_of(bridge), "ca_bridge_last_run_seconds")
    while int(time.time()) == first:
        time.sleep(0.05)
    with (bridge.directory / "state/lock").open("rb+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        run = bridge.run("renew")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("nothing is due: ")
    found = metrics.samples(file_of(bridge).read_text())
    assert found["ca_bridge_last_run_seconds"][""] > (first or 0)
    assert found["ca_bridge_last_run_seconds"] == found["ca_bridge_last_success_seconds"]
    file_of(bridge).unlink()
    file_of(bridge).parent.rmdir()
    run = bridge.run("renew")
    assert run.returncode == 1
    assert run.stdout.startswith("nothing is due: ")
    assert "can't write the metrics: No such file or directory" in run.stderr


def test_due_is_where_renew_would_begin(tmp_path: Path) -> None:
    """`renewal.before` days earlier than the end; a certificate of the kubelet has none while the kubelet renews it."""
    bridge = bridge_of(tmp_path)
    bridge.add("renewal", {"before": "20d"})
    assert bridge.run("renew").returncode == 0
    due = metrics.samples(file_of(bridge).read_text())["ca_bridge_certificate_due_seconds"]
    assert len(due) >= 10
    assert {labels: end - 20 * 86400 for labels, end in ends(bridge).items() if labels in due} == due


def test_a_renewal_is_reported(tmp_path: Path) -> None:
    """The ends are those of the new certificates."""
    bridge = bridge_of(tmp_path, days=10)
    assert bridge.run("renew").returncode == 0
    assert min(ends(bridge).values()) > time.time() + 300 * 86400
    assert metrics.value(file_of(bridge), "ca_bridge_last_run_exit_code") == 0


def test_a_failed_run_is_reported_and_counted(tmp_path: Path) -> None:
    """With its exit code, at which CA, how often in a row, and when one last succeeded; a success ends the count."""
    bridge = bridge_of(tmp_path)
    assert bridge.run("renew").returncode == 0
    succeeded = metrics.value(file_of(bridge), "ca_bridge_last_success_seconds")
    key = bridge.directory / "desk/etcd-ca/ca.key"
    good = key.read_bytes()
    key.write_text("not a key\n")
    for count in (1, 2):
        code = bridge.run("renew", "all").returncode
        assert code not in (0, 4)
        found = metrics.samples(file_of(bridge).read_text())
        assert found["ca_bridge_last_run_exit_code"] == {"": code}
        assert found["ca_bridge_consecutive_failures"] == {"": count}
        assert found["ca_bridge_last_success_seconds"] == {"": succeeded}
        assert found["ca_bridge_failed_runs"]['authority="etcd-ca"'] == count
        assert found["ca_bridge_failed_runs"]['authority="ca"'] == 0
    key.write_bytes(good)
    assert bridge.run("renew", "all").returncode == 0
    assert metrics.value(file_of(bridge), "ca_bridge_consecutive_failures") == 0


def test_a_run_that_found_another_one_at_work_is_reported(tmp_path: Path) -> None:
    """It says so, and counts neither as success nor as failure."""
    bridge = bridge_of(tmp_path)
    assert bridge.run("renew").returncode == 0
    with (bridge.directory / "state/lock").open("rb+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert bridge.run("renew", "all").returncode == 9
    found = metrics.samples(file_of(bridge).read_text())
    assert found["ca_bridge_last_run_exit_code"] == {"": 9}
    assert found["ca_bridge_consecutive_failures"] == {"": 0}


def test_a_run_that_can_read_no_backend_is_reported(tmp_path: Path) -> None:
    """A mistake in a CA's table is found after the settings are read: exit code 2 is in the file."""
    bridge = bridge_of(tmp_path)
    bridge.add("backend.other", {"type": "no-such-type"})
    bridge.tables = [table.replace('backend = "ca-desk"', 'backend = "other"') for table in bridge.tables]
    bridge.add("audit", {})
    assert bridge.run("renew").returncode == 2
    assert metrics.value(file_of(bridge), "ca_bridge_last_run_exit_code") == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_is_reported(tmp_path: Path, number: int, code: int) -> None:
    """The metrics count it as a failure, with the code of the signal."""
    pki = handmade_pki(tmp_path / "node", not_after=datetime.now(UTC) + timedelta(days=5))
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    (tmp_path / "textfile").mkdir()
    bridge.add("metrics", {"file": str(file_of(bridge))})
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        bridge.add("backend.corp", {"type": "vault", "url": url, "timeout": "10m"})
        bridge.add("backend.corp.auth", {"token_file": bridge.secret("token", "hvs.x")})
        for name in AUTHORITIES:
            bridge.add(f"authority.{name}", {"backend": "corp"})
        program = str(Path(sys.executable).with_name("ca-bridge"))
        with subprocess.Popen(
            [program, "renew", "--config", str(bridge.config)], stderr=subprocess.PIPE, text=True
        ) as run:
            silent.settimeout(180)
            with silent.accept()[0]:  # it asks
                os.kill(run.pid, number)
                run.communicate(timeout=300)
    assert run.returncode == code
    assert metrics.value(file_of(bridge), "ca_bridge_last_run_exit_code") == code
    assert metrics.value(file_of(bridge), "ca_bridge_consecutive_failures") == 1
    assert metrics.value(file_of(bridge), "ca_bridge_last_success_seconds") is None


def test_what_changes_certificates_otherwise_is_reported(tmp_path: Path) -> None:
    """A rollback shows the old ends again, an export what is pending; neither counts as a run."""
    bridge = bridge_of(tmp_path, days=10)
    assert bridge.run("renew").returncode == 0
    before = metrics.samples(file_of(bridge).read_text())
    assert bridge.run("rollback").returncode == 0
    assert max(ends(bridge).values()) < time.time() + 11 * 86400
    pending = "ca_bridge_certificate_pending_since_seconds"
    assert pending not in metrics.samples(file_of(bridge).read_text())
    assert bridge.run("export", str(tmp_path / "request.json"), "apiserver").returncode == 0
    after = metrics.samples(file_of(bridge).read_text())
    [(labels, since)] = after[pending].items()
    assert 'name="apiserver"' in labels
    assert time.time() - 600 < since <= time.time()
    assert bridge.run("pending", "cancel", "apiserver").returncode == 0
    assert pending not in metrics.samples(file_of(bridge).read_text())
    for name in ("ca_bridge_last_run_seconds", "ca_bridge_last_run_exit_code", "ca_bridge_consecutive_failures"):
        assert after[name] == before[name]


def test_a_restart_is_reported(tmp_path: Path) -> None:
    """What was not in use may be by then, and an alert need not wait for the night; a look alone writes nothing."""
    bridge = bridge_of(tmp_path)
    assert bridge.run("renew").returncode == 0
    before = metrics.samples(file_of(bridge).read_text())
    file_of(bridge).unlink()
    bridge.run("prove")
    assert not file_of(bridge).exists()
    bridge.run("restart", "kube-scheduler")
    after = metrics.samples(file_of(bridge).read_text())
    assert after["ca_bridge_last_run_seconds"] == before["ca_bridge_last_run_seconds"]


def test_without_the_setting_nothing_is_written(tmp_path: Path) -> None:
    """A run with nothing due leaves no trace, as before."""
    bridge = bridge_of(tmp_path)
    bridge.tables = [table for table in bridge.tables if not table.startswith("[metrics]")]
    bridge.add("audit", {})
    assert bridge.run("renew").returncode == 0
    assert not file_of(bridge).exists()
    assert not (bridge.directory / "state/history.json").exists()


def test_a_file_that_can_not_be_written_is_no_success(tmp_path: Path) -> None:
    """The renewal is done, and the run says what is wrong with exit code 1; the next one writes the file again."""
    bridge = bridge_of(tmp_path, days=10)
    file_of(bridge).parent.rmdir()
    run = bridge.run("renew")
    assert run.returncode == 1
    assert f"{file_of(bridge)}: can't write the metrics: No such file or directory" in run.stderr
    assert "renewed; the old files are in" in run.stdout
    doctor = bridge.run("doctor")
    assert (doctor.returncode, "wanted a directory for the metrics file" in doctor.stdout) == (1, True)
    file_of(bridge).parent.mkdir()
    assert bridge.run("renew").returncode == 0
    assert file_of(bridge).exists()
    assert bridge.run("doctor").returncode == 0


@pytest.mark.parametrize("name", ["/x/metrics.txt", "relative.prom", "/x/../etc/a.prom"])
def test_names_that_no_collector_reads_are_refused(name: str) -> None:
    """An absolute path that ends with .prom."""
    with pytest.raises(Exception, match=r"metrics.file: wanted"):
        parse(f'[metrics]\nfile = "{name}"')
    assert parse('[metrics]\nfile = "/x/a.prom"').metrics.file == Path("/x/a.prom")


# --- the directory is the monitor's ------------------------------------------------------------------------------------


@as_root
def test_the_directory_may_be_the_monitors(tmp_path: Path) -> None:
    """The directory may belong to the monitor's user; the run removes the rest of a killed run from it, and leaves other files."""
    bridge = bridge_of(tmp_path)
    directory = file_of(bridge).parent
    (directory / ".ca-bridge.prom.a1b2c3d4").write_text("half")
    (directory / ".ca-bridge.prom.mine").write_text("theirs")
    os.chown(directory, SOMEBODY, SOMEBODY)
    assert bridge.run("renew").returncode == 0
    assert {one.name for one in directory.iterdir()} == {"ca-bridge.prom", ".ca-bridge.prom.mine"}


@as_root
@pytest.mark.parametrize("place", ["file", "directory"])
def test_the_monitors_links_lead_nowhere(tmp_path: Path, place: str) -> None:
    """A link's target stays as it is, and the run names the link's owner; root's own link is followed."""
    bridge = bridge_of(tmp_path)
    monitors, ours = tmp_path / "textfile", tmp_path / "ours"
    ours.mkdir()
    link = monitors / "ca-bridge.prom"
    if place == "file":
        link.symlink_to(ours / "ca-bridge.prom")
    else:
        bridge.tables = [table.replace("textfile/", "textfile/d/") for table in bridge.tables]
        bridge.add("audit", {})
        link = monitors / "d"
        link.symlink_to(ours)
    assert bridge.run("renew").returncode == 0
    assert [one.name for one in ours.iterdir()] == ["ca-bridge.prom"]
    (ours / "ca-bridge.prom").unlink()

    os.chown(monitors, SOMEBODY, SOMEBODY)
    os.chown(link, SOMEBODY, SOMEBODY, follow_symlinks=False)
    run = bridge.run("renew")
    assert run.returncode == 1
    assert f"{link}: wanted no link, or one that only root can make, found one of user {SOMEBODY}" in run.stderr
    assert list(ours.iterdir()) == []


@pytest.mark.attack("N17")
def test_what_is_no_file_is_left_alone(tmp_path: Path) -> None:
    """A directory or a link of the monitor's that is called like a file of a killed run ends no run."""
    bridge = bridge_of(tmp_path)
    directory = file_of(bridge).parent
    (directory / ".ca-bridge.prom.aaaaaaaa").mkdir()
    (directory / ".ca-bridge.prom.bbbbbbbb").symlink_to("nowhere")
    (directory / ".ca-bridge.prom.cccccccc").write_text("half")
    assert bridge.run("renew").returncode == 0
    assert {one.name[-8:] for one in directory.iterdir()} == {"aaaaaaaa", "bbbbbbbb", "dge.prom"}
