"""Jobs for systemd and cron run what is installed here, with the places that are true here."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bridge.cli.setup import DeskJob, prepare
from bridge.desk import files
from bridge.diagnosis import machine
from bridge.errors import BridgeError
from bridge.settings.load import parse
from bridge.system import jobs
from bridge.system.console import READ_ONLY_HINT, hint_of
from bridge.system.jobs import Places
from tests.kit.pki import Pki, handmade_pki
from tests.kit.small_disk import needs_root, tmpfs

ROOT = Path(__file__).parents[2]
PROGRAM = Path(sys.executable).with_name("ca-bridge")


@pytest.fixture
def node(tmp_path: Path) -> Pki:
    """A node whose certificates are good for a year."""
    return handmade_pki(tmp_path / "a node", external=True)


@pytest.fixture
def config(node: Pki, tmp_path: Path) -> Path:
    """Settings at an odd place, with a CA behind a door."""
    file = tmp_path / "50% off/config.toml"
    file.parent.mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "in").mkdir()
    door = f'[backend.door]\ntype = "exchange"\noutbox = "{tmp_path}/out"\ninbox = "{tmp_path}/in"\n'
    places = f'pki_dir = "{node.pki_dir}"\nkubeconfig_dir = "{node.kubeconfig_dir}"\nstate_dir = "{tmp_path}/state"'
    file.write_text(f'[node]\n{places}\n{door}[authority.ca]\nbackend = "door"\n')
    return file


def setup(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`ca-bridge setup …` as it is installed here."""
    command = [str(PROGRAM), "setup", *arguments, "--config", str(config)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def cron_command(text: str) -> str:
    """The job's command as cron gives it to the shell (crontab(5): % is a line break unless it is escaped)."""
    (line,) = [one for one in text.splitlines() if re.match(r"[0-9*]", one)]
    command = line.split(maxsplit=6)[6]
    assert not re.search(r"(?<!\\)%", command)
    return command.replace("\\%", "%")


def test_the_crontab_runs_as_cron_runs_it(config: Path) -> None:
    """With cron's bare environment, from an install that is in no PATH."""
    settings = config.read_text()
    config.write_text(settings[: settings.index("[backend.door]")])
    text = setup(config, "cron").stdout
    run = subprocess.run(
        ["/bin/sh", "-c", cron_command(text)],
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "nothing is due" in run.stdout
    bare = (ROOT / "config/cron/ca-bridge").read_text()
    missing = subprocess.run(["/bin/sh", "-c", cron_command(bare)], env={"PATH": "/usr/bin:/bin"}, check=False)
    assert missing.returncode == 127 or Path("/usr/bin/ca-bridge").exists()


def test_crontabs_are_written_to_the_given_place(config: Path, tmp_path: Path) -> None:
    """Readable for all, not for others to write, and without a dot in the name, which cron would pass over."""
    assert setup(config, "cron", "-o", str(tmp_path / "cron.d")).returncode == 0
    desk = setup(
        config, "cron", "-o", str(tmp_path / "cron.d"), "--inbox", "/srv/i", "--outbox", "/srv/o", "--user", "cas"
    )
    assert desk.returncode == 0, desk.stderr
    files = {path.name: path for path in (tmp_path / "cron.d").iterdir()}
    assert files.keys() == {"ca-bridge", "ca-bridge-desk"}
    assert {path.stat().st_mode & 0o777 for path in files.values()} == {0o644}
    line = files["ca-bridge-desk"].read_text().splitlines()[-1].split()
    assert line[5] == "cas"
    assert " ".join(line).endswith("/srv/i -o /srv/o --wait 4m >/dev/null")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze; install systemd")
@pytest.mark.parametrize(
    "desk", [[], ["--inbox", "/srv/i", "--outbox", "/srv/o", "--user", "root"]], ids=["node", "desk"]
)
def test_systemd_takes_the_units(config: Path, tmp_path: Path, desk: list[str]) -> None:
    """systemd warns about no line of them; the units may write to what the backends need, and to nothing else."""
    directory = tmp_path / "units"
    made = setup(config, "systemd", "-o", str(directory), *desk)
    assert made.returncode == 0, made.stderr
    for path in directory.iterdir():
        run = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(path)],
            capture_output=True, text=True, check=False, timeout=400,
        )  # fmt: skip
        assert (run.returncode, run.stdout + run.stderr) == (0, "")
    (service,) = (path for path in directory.glob("*.service") if "recover" not in path.name)
    text = service.read_text()
    writable = re.search(r"^ReadWritePaths=(.*)$", text, re.MULTILINE)
    assert writable is not None
    assert str(tmp_path / "out") in writable[1]
    assert not re.search(r"[= -]/etc/kubernetes", text)
    assert "/usr/local/bin" not in text
    assert "50%% off" in text


def test_a_unit_may_write_metrics_and_copies(config: Path, tmp_path: Path) -> None:
    """Where the settings say that `renew` writes; a directory that is missing does not stop it."""
    more = f'[metrics]\nfile = "{tmp_path}/textfile/a.prom"\n[copies]\nfiles = ["{tmp_path}/alice/.kube/config"]\n'
    before = setup(config, "systemd").stdout
    config.write_text(config.read_text() + more)
    after = setup(config, "systemd").stdout
    for place in (f"-{tmp_path}/textfile", f"-{tmp_path}/alice/.kube"):
        assert (place in before, place in after) == (False, True)


def test_a_desks_unit_may_write_to_the_archive_that_its_policy_names(config: Path) -> None:
    """Without that each run signs, and fails before it answers."""
    desk = ("systemd", "--inbox", "/srv/i", "--outbox", "/srv/o", "--user", "root")
    before = setup(config, *desk).stdout
    policy = config.with_name("desk-policy.toml")
    policy.write_text('[desk]\narchive = "/srv/done"\n[allow]\nclusters = ["*"]\nnodes = ["*"]\n')
    after = setup(config, *desk).stdout
    assert (" -/srv/done\n" in before, " -/srv/done\n" in after) == (False, True)


def test_a_unit_may_write_where_the_kubelets_certificates_are(config: Path, tmp_path: Path) -> None:
    """The settings and the kubelet's own configuration name the directory; a desk's unit may not write there."""
    kubelet = tmp_path / "kubelet"
    kubelet.mkdir()
    config.write_text(config.read_text().replace("[node]\n", f'[node]\nkubelet_dir = "{kubelet}"\n'))
    assert f" -{kubelet}/pki\n" in setup(config, "systemd").stdout
    (kubelet / "config.yaml").write_text("tlsCertFile: /srv/tls/a.crt\ntlsPrivateKeyFile: /srv/keys/a.key\n")
    assert f" -{kubelet}/pki -/srv/tls -/srv/keys\n" in setup(config, "systemd").stdout
    desk = setup(config, "systemd", "--inbox", "/srv/i", "--outbox", "/srv/o", "--user", "root")
    assert "/srv/tls" not in desk.stdout


def test_half_a_desk_and_a_relative_place_are_refused(config: Path) -> None:
    """They are refused before anything is printed."""
    for arguments in (["--inbox", "/srv/i"], ["--inbox", "i", "--outbox", "/srv/o"]):
        run = setup(config, "systemd", *arguments)
        assert (run.returncode, run.stdout) == (2, "")


@pytest.mark.attack("N33")
def test_a_job_works_on_the_places_of_its_options(config: Path) -> None:
    """Each command of a job has the options of `setup`, so that a second tree is renewed, and not the settings' one."""
    places = ("--pki-dir", "/srv/b/pki", "--kubeconfig-dir", "/srv/b", "--state-dir", "/var/lib/b")
    for kind in ("cron", "systemd"):
        run = setup(config, kind, *places)
        assert run.returncode == 0, run.stderr
        commands = [line for line in run.stdout.splitlines() if not line.startswith("#") and str(PROGRAM) in line]
        assert commands
        assert all(" ".join(places) in line and "--config" in line for line in commands)
        assert not any("--pki-dir" in line for line in setup(config, kind).stdout.splitlines())


@pytest.mark.first_use("3")
def test_a_node_whose_requests_are_carried_looks_every_hour(config: Path) -> None:
    """systemd and cron start it each hour, since an answer comes at any time; the twin's CA answers at once."""
    assert "OnCalendar=hourly" in setup(config, "systemd").stdout
    assert re.search(r"^17 \* \* \* \*  root  ", setup(config, "cron").stdout, re.MULTILINE)
    text = config.read_text()
    config.write_text(text[: text.index("[backend.door]")])
    assert "OnCalendar=*-*-* 03:17:00" in setup(config, "systemd").stdout
    assert re.search(r"^17 3 \* \* \*  root  ", setup(config, "cron").stdout, re.MULTILINE)


@pytest.mark.first_use("19")
def test_units_that_nothing_would_read_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where systemd is not the init, before a file is written; the twin has one."""
    monkeypatch.setattr(jobs, "_SYSTEMD_RUNS", tmp_path)
    jobs.assert_systemd_takes("root")
    with pytest.raises(BridgeError, match="there is no user nobody-of-this-name"):
        jobs.assert_systemd_takes("nobody-of-this-name")
    monkeypatch.setattr(jobs, "_SYSTEMD_RUNS", tmp_path / "none")
    with pytest.raises(BridgeError, match="no systemd runs") as e:
        jobs.assert_systemd_takes("root")
    assert "setup cron --enable" in e.value.hint


@pytest.mark.first_use("19")
def test_the_other_job_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A timer that is enabled where a crontab is made, and a crontab where a timer is; a desk's is another job."""
    monkeypatch.setattr(jobs, "CRON_DIRECTORY", tmp_path / "cron.d")
    monkeypatch.setattr(jobs, "UNIT_DIRECTORY", tmp_path / "units")
    wants = tmp_path / "units/timers.target.wants"
    for path in (wants / "ca-bridge.timer", tmp_path / "cron.d/ca-bridge-desk"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    made = {name: [jobs.Job(path=tmp_path / name, text="")] for name in ("cron.d/ca-bridge", "units/ca-bridge.timer")}
    desk = [jobs.Job(path=tmp_path / "units/ca-bridge-desk.timer", text="")]
    assert jobs.others(made["cron.d/ca-bridge"]) == [wants / "ca-bridge.timer"]
    assert jobs.others(desk) == [tmp_path / "cron.d/ca-bridge-desk"]
    assert jobs.others(made["units/ca-bridge.timer"]) == []


DESK = """\
[backend.openssl]
type = "openssl"
passphrase_file = "{place}/secrets/passphrase"
[authority.ca]
backend = "openssl"
dir = "{place}/ca"
"""


@pytest.mark.first_use("2")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give directories to another user")
def test_a_desks_directories_are_made_for_its_user_or_refused(tmp_path: Path) -> None:
    """Inbox, outbox, state directory and those of secrets; the CA's own have to be there, and the user's."""
    ours = parse(f'[node]\nstate_dir = "{tmp_path}/state"\n{DESK.format(place=tmp_path)}')
    places = {name: tmp_path / "desk" / name for name in ("inbox", "outbox", "archive")}
    desk = DeskJob(**places, user="nobody")
    with pytest.raises(BridgeError, match=r"ca: there is no such directory that openssl "):
        prepare(ours, desk)
    (tmp_path / "ca").mkdir()
    with pytest.raises(BridgeError, match=r"ca: wanted a directory that openssl .* found that nobody can't write") as e:
        prepare(ours, desk)
    assert e.value.hint == f"chown nobody {tmp_path}/ca"
    os.chown(tmp_path / "ca", pwd.getpwnam("nobody").pw_uid, -1)
    prepare(ours, desk)
    made = {
        name: (tmp_path / name).stat() for name in ("desk/inbox", "desk/outbox", "desk/archive", "state", "secrets")
    }
    assert {status.st_uid for status in made.values()} == {pwd.getpwnam("nobody").pw_uid}
    assert [status.st_mode & 0o777 for status in made.values()] == [0o755, 0o755, 0o700, 0o700, 0o700]
    prepare(ours, desk)
    os.chown(tmp_path / "desk/outbox", 0, 0)
    with pytest.raises(BridgeError, match="outbox: wanted a directory of the job's user") as e:
        prepare(ours, desk)
    assert e.value.hint == f"chown nobody {tmp_path}/desk/outbox"
    door = f'[backend.door]\ntype = "exchange"\noutbox = "{tmp_path}/o"\ninbox = "{tmp_path}/i"\n'
    with pytest.raises(BridgeError, match=r"o: there is no such directory that door ") as e:
        prepare(parse(f'{door}[authority.ca]\nbackend = "door"\n'), None)
    assert e.value.hint == f"mount it, or make it: `install -d -o root {tmp_path}/o`"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, as a node's job does")
def test_a_nodes_state_directory_is_made_for_its_job(tmp_path: Path) -> None:
    """The unit may write there, and systemd starts no unit that may write to a directory that is missing."""
    ours = parse(f'[node]\nstate_dir = "{tmp_path}/state"\n')
    prepare(ours, None)
    prepare(ours, None)
    made = (tmp_path / "state").stat()
    assert (made.st_uid, made.st_mode & 0o777) == (0, 0o700)


@pytest.mark.first_use("2")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give directories to another user")
@pytest.mark.parametrize("kind", ["cron", "systemd"])
def test_the_doctor_looks_at_a_desks_inbox_and_outbox(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As the installed job names them, for the job's user; a desk without a job has none."""
    monkeypatch.setattr(jobs, "CRON_DIRECTORY", tmp_path / "jobs")
    monkeypatch.setattr(jobs, "UNIT_DIRECTORY", tmp_path / "jobs")
    assert list(machine.desk_directories()) == []
    inbox, outbox = tmp_path / "50% in", tmp_path / "out box"
    places = ["--inbox", str(inbox), "--outbox", str(outbox), "--user", "nobody"]
    assert setup(config, kind, "-o", str(tmp_path / "jobs"), *places).returncode == 0
    inbox.mkdir()
    os.chown(inbox, pwd.getpwnam("nobody").pw_uid, -1)
    found = {one.about: (one.level, one.hint) for one in machine.desk_directories()}
    assert found == {str(inbox): ("ok", ""), str(outbox): ("error", f"install -d -o nobody {outbox}")}
    outbox.mkdir()
    found = {one.about: (one.level, one.hint) for one in machine.desk_directories()}
    assert found[str(outbox)] == ("error", f"chown nobody {outbox}")
    outbox.chmod(0o777)
    assert {one.level for one in machine.desk_directories()} == {"ok"}


@pytest.mark.first_use("2")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_a_desk_that_cannot_answer_signs_nothing(tmp_path: Path) -> None:
    """An outbox of root's ends the run before a CA is asked, with a hint that does not send its user to root and back."""
    nobody = pwd.getpwnam("nobody").pw_uid
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o011)
    files.assert_writable(tmp_path)
    os.seteuid(nobody)
    try:
        with pytest.raises(BridgeError, match="can't write answers there: it is a directory of user 0") as e:
            files.assert_writable(tmp_path)
        assert hint_of(e.value) == f"as root: chown {nobody} {tmp_path}"
    finally:
        os.seteuid(0)


@needs_root
def test_a_desk_signs_nothing_for_a_stick_that_is_read_only(tmp_path: Path) -> None:
    """Root is not sent to change the owner to root, which would not help."""
    with tmpfs(tmp_path / "stick") as stick:
        files.assert_writable(stick)
        subprocess.run(["mount", "-o", "remount,ro", stick], check=True)
        with pytest.raises(BridgeError, match="can't write answers there: Read-only file system") as e:
            files.assert_writable(stick)
        assert hint_of(e.value) == READ_ONLY_HINT


@pytest.mark.first_use("27")
def test_defaults_of_a_ca_that_the_settings_do_not_name_are_announced(config: Path) -> None:
    """`setup vault` beside settings of another backend says which it found; for its own it says nothing."""
    other = setup(config, "vault", "--authority", "ca")
    assert "roles/kubeadm-" in other.stdout
    assert f"ca: the settings have exchange for it ({config}), so this has the defaults of vault" in other.stderr
    assert "`ca-bridge settings init vault FILE`" in other.stderr
    text = config.read_text().replace('type = "exchange"', 'type = "vault"\nurl = "https://v.corp.example:8200"')
    config.write_text(re.sub(r"^(outbox|inbox) = .*\n", "", text, flags=re.MULTILINE))
    own = setup(config, "vault", "--authority", "ca")
    assert (own.returncode, own.stderr) == (0, "")


def process(proc: Path, comm: str, *words: str) -> None:
    (proc / "7").mkdir(parents=True, exist_ok=True)
    (proc / "7/comm").write_text(f"{comm}\n")
    (proc / "7/cmdline").write_bytes("\0".join(words).encode())


def test_which_cron_runs(tmp_path: Path) -> None:
    """The process table or systemd's generator shows it; a program of another name does not count."""
    proc, root = tmp_path / "proc", tmp_path / "lib"
    for comm, words, runs in (
        ("cron", ["/usr/sbin/cron", "-f"], True),
        ("crond", ["crond"], True),
        ("busybox", ["busybox", "crond"], True),
        ("busybox", ["busybox", "sh"], False),
        ("bash", ["bash"], False),
    ):
        process(proc, comm, *words)
        assert jobs.cron_runs(proc, [root]) is runs
    generator = root / "systemd/system-generators/systemd-crontab-generator"
    generator.parent.mkdir(parents=True)
    generator.touch()
    assert jobs.cron_runs(proc, [root])


@pytest.mark.attack("N29")
def test_a_crontab_that_nothing_would_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crontab without a cron, or for a user that is not there, is refused; the twin has both."""
    monkeypatch.setattr(jobs, "cron_runs", lambda: True)
    jobs.assert_cron_takes("root")
    with pytest.raises(BridgeError, match="there is no user nobody-of-this-name") as e:
        jobs.assert_cron_takes("nobody-of-this-name")
    assert "--user" in e.value.hint
    monkeypatch.setattr(jobs, "cron_runs", lambda: False)
    with pytest.raises(BridgeError, match="no cron runs") as e:
        jobs.assert_cron_takes("root")
    assert "setup systemd --enable" in e.value.hint


def test_the_doctor_looks_whether_a_crontab_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file of ours without a cron is a warning; with one, or without the file, there is none."""
    monkeypatch.setattr(jobs, "crontabs", lambda: [tmp_path / "ca-bridge"])
    monkeypatch.setattr(jobs, "cron_runs", lambda: False)
    [finding] = machine.jobs_of_cron()
    assert (finding.level, finding.check) == ("warning", "cron")
    monkeypatch.setattr(jobs, "cron_runs", lambda: True)
    assert list(machine.jobs_of_cron()) == []
    monkeypatch.setattr(jobs, "crontabs", list)
    monkeypatch.setattr(jobs, "cron_runs", lambda: False)
    assert list(machine.jobs_of_cron()) == []


def test_what_can_not_be_enabled_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The error has systemd's own words, or says that there is no systemd; the twin succeeds."""
    systemctl = tmp_path / "systemctl"
    for script, wrong in (("echo 'unit is masked' >&2; exit 1", "unit is masked"), ("exit 0", None)):
        systemctl.write_text(f"#!/bin/sh\n{script}\n")
        systemctl.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.defpath}")
        if wrong is None:
            jobs.enable(["ca-bridge.timer"])
            continue
        with pytest.raises(BridgeError, match=wrong):
            jobs.enable(["ca-bridge.timer"])
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BridgeError) as e:
        jobs.enable(["ca-bridge.timer"])
    assert "setup cron" in e.value.hint


@pytest.mark.parametrize("kind", ["systemd", "cron"])
@pytest.mark.parametrize("line", ["\nExecStartPre=/bin/false", "\n* * * * * root /bin/false", "\r", "\u2028"])
def test_no_path_begins_a_line_of_its_own(config: Path, tmp_path: Path, kind: str, line: str) -> None:
    """A settings file, a directory in it, a desk's or the kubelet's: none gets into a unit or a crontab as more than a path."""
    twin = setup(config, kind)
    assert (twin.returncode, "/bin/false" in twin.stdout) == (0, False), twin.stderr
    odd = tmp_path / f"odd{line}"
    odd.mkdir(parents=True)
    shutil.copy(config, odd / "config.toml")
    kubelet = tmp_path / "kubelet"
    kubelet.mkdir()
    (kubelet / "config.yaml").write_text(
        f"tlsCertFile: {json.dumps(f'/srv/x{line}/a.crt')}\ntlsPrivateKeyFile: /srv/k/a.key\n"
    )
    inside = config.with_name("inside.toml")
    state = f'state_dir = "{tmp_path}/state"'
    inside.write_text(config.read_text().replace(state, f"state_dir = {json.dumps(f'{tmp_path}/state{line}')}"))
    kubelets = config.with_name("kubelet.toml")
    kubelets.write_text(config.read_text().replace("[node]\n", f'[node]\nkubelet_dir = "{kubelet}"\n'))
    desk = ["--inbox", f"/srv/i{line}", "--outbox", "/srv/o", "--user", "ca"]
    runs = [setup(odd / "config.toml", kind), setup(inside, kind), setup(config, kind, *desk)]
    if kind == "systemd":
        runs.append(setup(kubelets, kind))
    for run in runs:
        assert (run.returncode in {1, 2}, run.stdout) == (True, "")
        assert "control characters" in run.stderr
        assert line not in run.stderr


@pytest.mark.parametrize("user", ["ca\nExecStartPre=+/bin/false", "root /bin/false #", r"\g<2>", "%n", "-x", ""])
def test_a_desks_user_is_a_name(config: Path, user: str) -> None:
    """A desk's user in a unit or a crontab is a name and nothing else; a user of Active Directory is one."""
    desk = ["--inbox", "/srv/i", "--outbox", "/srv/o"]
    assert "User=ca.desk@corp\n" in setup(config, "systemd", *desk, "--user", "ca.desk@corp").stdout
    for kind in ("systemd", "cron"):
        run = setup(config, kind, *desk, f"--user={user}")
        assert (run.returncode, run.stdout) == (2, "")
        assert "--user: wanted a user's name" in run.stderr


def test_words_of_units_are_words() -> None:
    """Blanks, quotes, percent and dollar signs of a path mean nothing to systemd, in each line by that line's own rules."""
    places = Places(
        program=Path('/opt/a b/"x"/$y/ca-bridge'),
        options=(),
        paths={"/a": '/srv/a "b" 50% $x'},
        user="root",
        writable=[Path("/srv/50% $x")],
    )
    shipped = (
        "[Service]\nConditionPathExists=|/a/x\nExecStart=/usr/bin/ca-bridge renew\nExecStopPost=/bin/x /a\n"
        "ReadWritePaths=/a\n"
    )
    assert jobs.unit("x.service", shipped, places).text.splitlines() == [
        "[Service]",
        'ConditionPathExists=|/srv/a "b" 50%% $x/x',
        'ExecStart="/opt/a b/\\"x\\"/$$y/ca-bridge" renew',
        'ExecStopPost=/bin/x "/srv/a \\"b\\" 50%% $$x"',
        'ReadWritePaths="/srv/50%% $x"',
    ]


@pytest.mark.attack("N12")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a directory away")
def test_no_job_runs_what_another_user_can_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in another's home, say; a job of that user itself, as a CA desk's, may."""
    program = tmp_path / "home/bin/ca-bridge"
    program.parent.mkdir(parents=True)
    shutil.copy(PROGRAM, program)
    monkeypatch.setattr(sys, "argv", [str(program)])
    assert jobs.this_program("root") == program
    nobody = pwd.getpwnam("nobody").pw_uid
    os.chown(tmp_path / "home", nobody, nobody)
    with pytest.raises(jobs.JobError, match=f"home: wanted it to belong to root, found user {nobody}"):
        jobs.this_program("root")
    assert jobs.this_program("nobody") == program
