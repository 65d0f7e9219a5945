"""The offline file, in bare Debians without a network: installed, upgraded, refused, removed."""

from __future__ import annotations

import hashlib
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bridge.cli.settings import initial
from tests.kit import releases
from tests.kit.trees import Tree

FILE = "/root/ca-bridge.run"
INSTALL = f"sh {FILE} install"
#: As cron starts a job.
AS_CRON = "env -i PATH=/usr/bin:/bin HOME=/root sh -c"


def bring(tree: Tree, file: Path) -> None:
    """Carry the file to the machine."""
    tree.put(FILE, file.read_bytes())


def ours(tree: Tree) -> set[str]:
    """What is changed on the machine, without what was carried there."""
    return {path for path in tree.changed() if not path.startswith(("/root/", "/tmp/"))}


@pytest.mark.first_use("1")
def test_installs_runs_and_goes_without_a_network(tree: Tree, offline: Path) -> None:
    """On a bare Debian: no interface, no pip, no venv; the demo renews, and after the uninstall nothing is left."""
    bring(tree, offline)
    assert tree.run("ls /sys/class/net 2>/dev/null; grep -c : /proc/net/dev").stdout.split() == ["1"]  # lo
    assert tree.run("python3 -c 'import ensurepip'", check=False).returncode != 0

    said = tree.run(INSTALL).stdout
    assert "installed ca-bridge" in said
    assert "systemctl enable --now ca-bridge.timer" in said
    assert tree.run(f"{AS_CRON} 'ca-bridge --version'").stdout.startswith("ca-bridge ")
    demo = tree.run("cd / && ca-bridge demo").stdout
    assert "12 renewed" in demo
    assert tree.run("ca-bridge help trouble").stdout.startswith("# When something is wrong")
    assert tree.run(f"sh {FILE} check").stdout.endswith("(all files are as they were installed)\n")

    assert tree.run("/opt/ca-bridge/uninstall").stdout == "removed the program, its command and its units\n"
    assert ours(tree) == set()
    assert tree.run("ls -A /opt; ls -A /usr/local/lib").stdout == tree.run("ls -A /usr/local/lib").stdout


def test_what_the_installer_can_not_say_is_an_error(bookworm: Tree, offline: Path) -> None:
    """On a full disk below standard output it installs, and ends as the program does; a closed one is no error."""
    bring(bookworm, offline)
    for command in ("install", "check", "--help"):
        full = bookworm.run(f"sh {FILE} {command} >/dev/full", check=False)
        assert (full.returncode, full.stderr) == (1, "error: standard output: No space left on device\n")
    bookworm.run(f"ca-bridge --version && sh {FILE} check >&-")


def test_settings_and_plug_ins_are_found_beside_the_program(bookworm: Tree, offline: Path) -> None:
    """`settings init` has the tree's examples; a plug-in's directory that others can write to is refused."""
    bring(bookworm, offline)
    bookworm.run(f"{INSTALL} && ca-bridge settings init")
    assert bookworm.run("cat /etc/ca-bridge/config.toml").stdout == initial(None)

    info = "/opt/ca-bridge/plugins/corp-1.dist-info"
    bookworm.run(
        f"mkdir -p {info}; printf '[kubeadm_ca_bridge.backends]\\ncorp = corp:Corp\\n' >{info}/entry_points.txt"
    )
    bookworm.put("/etc/ca-bridge/config.toml", b'[backend.x]\ntype = "unknown"\n[authority.ca]\nbackend = "x"\n')
    assert "corp" in bookworm.run("ca-bridge settings check", check=False).stderr
    bookworm.run("chown 1000 /opt/ca-bridge/plugins/corp-1.dist-info")
    refused = bookworm.run("ca-bridge settings check", check=False)
    assert (
        refused.returncode,
        "corp-1.dist-info: wanted a file or directory that only root can write to" in refused.stderr,
    ) == (1, True)
    bookworm.run("chown root /opt/ca-bridge/plugins/corp-1.dist-info; chmod o+w /opt/ca-bridge/plugins")
    refused = bookworm.run("ca-bridge settings check", check=False)
    assert (refused.returncode, "only root can write to" in refused.stderr) == (1, True)


PLUG_IN = b"""
import dataclasses, corp.deep.module
from bridge.contract import Backend, BackendSettings
@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(BackendSettings): pass
class Corp(Backend):
    settings_type = Settings
    @classmethod
    def from_settings(cls, settings): return cls()
"""


#: What is done to a plug-in, and the path that is named then.
SPOILT = {
    "chgrp 1000 corp/__init__.py; chmod g+w corp/__init__.py": "corp/__init__.py",
    "chgrp 1000 corp; chmod 2775 corp": "corp",
    "chmod o+w corp/deep/module.py": "corp/deep/module.py",
    "chown 1000 corp/deep": "corp/deep",
    "mv corp /srv/corp; ln -s /srv/corp corp": "corp",
    "mv corp/deep/module.py /srv; ln -s /srv/module.py corp/deep/module.py": "corp/deep/module.py",
    "mkdir -m 777 corp/deep/__pycache__; touch corp/deep/__pycache__/module.cpython-311.pyc": "corp/deep/__pycache__",
    "chmod g+w corp-1.dist-info/*; chgrp 1000 corp-1.dist-info/*": "corp-1.dist-info/entry_points.txt",
}


@pytest.mark.attack("N10")
def test_a_plug_in_that_others_can_change_is_not_loaded(bookworm: Tree, offline: Path) -> None:
    """Members of a group, and owners of what is linked or further down, are others; root's group is not."""
    bring(bookworm, offline)
    plugins = "/opt/ca-bridge/plugins"
    bookworm.run(f"{INSTALL} && mkdir -p {plugins}/corp/deep {plugins}/corp-1.dist-info")
    bookworm.put(f"{plugins}/corp/__init__.py", PLUG_IN)
    bookworm.put(f"{plugins}/corp/deep/__init__.py", b"")
    bookworm.put(f"{plugins}/corp/deep/module.py", b"")
    bookworm.put(f"{plugins}/corp-1.dist-info/entry_points.txt", b"[kubeadm_ca_bridge.backends]\ncorp = corp:Corp\n")
    bookworm.put("/etc/ca-bridge/config.toml", b'[backend.x]\ntype = "corp"\n[authority.ca]\nbackend = "x"\n')
    bookworm.run(f"chmod g+w {plugins}/corp/*.py; cp -a {plugins} /srv/good")
    for spoil, named in SPOILT.items():
        bookworm.run("ca-bridge settings check")
        bookworm.run(f"rm -rf {plugins}; cp -a /srv/good {plugins}; cd {plugins}; {spoil}")
        refused = bookworm.run("ca-bridge settings check", check=False)
        assert refused.returncode == 1, (spoil, refused)
        assert (
            f"error: {plugins}/{named}: wanted a file or directory that only root can write to, and no link"
            in refused.stderr
        ), spoil
        bookworm.run(f"rm -rf {plugins} /srv/corp /srv/module.py; cp -a /srv/good {plugins}")


@pytest.mark.attack("N11")
def test_the_python_that_was_proven_runs_the_program(bookworm: Tree, offline: Path) -> None:
    """A Python that comes to /usr/local/bin later does not; without the proven one another is looked for."""
    bring(bookworm, offline)
    bookworm.run(INSTALL)
    for version in ("3.11", "3.12", "3.13"):
        bookworm.put(f"/usr/local/bin/python{version}", b"#!/bin/sh\necho theirs\n", 0o755)
    assert bookworm.run("ca-bridge --version").stdout.startswith("ca-bridge ")
    assert bookworm.run("cat /opt/ca-bridge/current/python").stdout == "/usr/bin/python3.11\n"
    assert bookworm.run(f"sh {FILE} check").stdout.endswith("(all files are as they were installed)\n")
    bookworm.run("rm /opt/ca-bridge/current/python")
    assert bookworm.run("ca-bridge --version").stdout.startswith("ca-bridge ")
    bookworm.run("mv /usr/bin/python3.11 /usr/bin/python3.hidden")
    assert bookworm.run("ca-bridge --version").stdout == "theirs\n"


@pytest.mark.first_use("27")
def test_an_upgrade_keeps_settings_state_and_the_version_before(bookworm: Tree, offline: Path, shared: Path) -> None:
    """The new tree comes beside the old one; a second upgrade removes the first tree; bytes of the operator's stay."""
    bring(bookworm, offline)
    bookworm.run(f"{INSTALL} && ca-bridge settings init && mkdir -m 700 /var/lib/ca-bridge")
    bookworm.put("/var/lib/ca-bridge/audit.log", b"what was done\n", 0o600)
    first = bookworm.run("readlink /opt/ca-bridge/current").stdout
    digests = bookworm.run("sha256sum /etc/ca-bridge/* /var/lib/ca-bridge/*; stat -c '%a %Y %n' /var/lib/ca-bridge/*")

    bring(bookworm, releases.offline(shared / "release-later", SOURCE_DATE_EPOCH="2000000000"))
    assert " with another build of it in /opt/ca-bridge" in bookworm.run(INSTALL).stdout
    assert " is installed already in /opt/ca-bridge" in bookworm.run(INSTALL).stdout
    assert bookworm.run("readlink /opt/ca-bridge/current").stdout != first
    assert len(bookworm.run("ls /opt/ca-bridge/versions").stdout.split()) == 2
    bring(bookworm, offline)
    bookworm.run(INSTALL)  # and back: nothing to unpack, and the link is replaced
    assert bookworm.run("readlink /opt/ca-bridge/current").stdout == first
    again = bookworm.run("sha256sum /etc/ca-bridge/* /var/lib/ca-bridge/*; stat -c '%a %Y %n' /var/lib/ca-bridge/*")
    assert again.stdout == digests.stdout

    said = bookworm.run("/opt/ca-bridge/uninstall").stdout
    assert "kept:     /etc/ca-bridge (" in said
    assert ours(bookworm) == {"/etc/ca-bridge/config.toml", "/var/lib/ca-bridge/audit.log"}


def test_takes_over_from_a_virtual_environment(bookworm: Tree, offline: Path, tmp_path: Path) -> None:
    """As the README had it before: jobs that name the environment's program get the new one, and the rest of it stays."""
    wheels, site = releases.ROOT / f".cache/wheels/{releases.PLATFORM}", tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site)]
    fits = ("none-any", "cp311-cp311", "abi3")
    with releases.alone():
        (project,) = (releases.ROOT / ".cache/wheels/project").glob("*.whl")
        chosen = [str(path) for path in wheels.glob("*.whl") if any(tag in path.name for tag in fits)]
        subprocess.run([*pip, *chosen, str(project)], check=True)
    bookworm.run("python3 -m venv --without-pip /opt/ca-bridge")
    shutil.rmtree(site / "bin")
    bookworm.put_directory(site, "/opt/ca-bridge/lib/python3.11/site-packages")
    bookworm.put_directory(site / "share", "/opt/ca-bridge/share")
    start = b"#!/opt/ca-bridge/bin/python\nfrom bridge.entry import main\nmain()\n"
    bookworm.put("/opt/ca-bridge/bin/ca-bridge", start, 0o755)
    bookworm.run(
        "mkdir /etc/ca-bridge; ln -s /opt/ca-bridge/bin/ca-bridge /usr/local/bin; /usr/local/bin/ca-bridge settings init"
    )
    bookworm.run("/usr/local/bin/ca-bridge setup systemd -o /etc/systemd/system")
    before = bookworm.run("sha256sum /etc/ca-bridge/* /etc/systemd/system/ca-bridge*").stdout
    bring(bookworm, offline)

    said = bookworm.run(INSTALL).stdout
    assert "kept:     the virtual environment" in said
    assert "systemd uses /etc/systemd/system/ca-bridge.service instead of the installed unit" in said
    old_name = "/opt/ca-bridge/bin/ca-bridge"
    assert "/versions/" in bookworm.run(f"readlink -f {old_name}").stdout
    assert bookworm.run(f"{old_name} --version && ca-bridge --version").stdout.count("ca-bridge ") == 2
    assert bookworm.run("sha256sum /etc/ca-bridge/* /etc/systemd/system/ca-bridge*").stdout == before


@pytest.mark.parametrize(
    ("first", "wanted"),
    [
        ("rm /usr/bin/python3*", "wanted one of Python 3.13 3.12 3.11"),
        (
            "rm /usr/bin/python3*; printf '#!/bin/sh\\necho Python 3.9.2' >/usr/bin/python3; chmod +x /usr/bin/python3",
            "found: /usr/bin/python3 (Python 3.9.2)",
        ),
        ("rm -r /usr/lib/python3.11/ssl.py /usr/lib/python3.11/xml", "wanted the new program to start"),
        (f"truncate -s -100 {FILE}", "wanted a complete and unchanged file"),
        ("chmod o+w /opt", "only root can write to, found user 0 and mode 0757"),
        ("chown 1000 /usr/local", "found user 1000 and mode"),
        ("mkdir -p /opt/ca-bridge/versions; chmod 777 /opt/ca-bridge/versions", "found user 0 and mode 0777"),
        ("echo x >/usr/bin/ca-bridge", "/usr/bin/ca-bridge: wanted nothing or our own link, found another program"),
        (
            "mkdir /etc/ca-bridge; echo 'x = 1' >/etc/ca-bridge/config.toml",
            "wanted settings that the new version accepts",
        ),
    ],
    ids=[
        "no Python",
        "an old Python",
        "half a Python",
        "half a file",
        "open",
        "foreign",
        "open inside",
        "taken",
        "settings",
    ],
)
def test_refuses_and_leaves_nothing(bookworm: Tree, offline: Path, first: str, wanted: str) -> None:
    """Each with its sentence and what to do; the machine stays as it was, and the same file installs on another."""
    bring(bookworm, offline)
    bookworm.run(first)
    before = ours(bookworm)
    refused = bookworm.run(INSTALL, check=False)
    assert refused.returncode == 1
    assert wanted in refused.stderr
    assert "\nhint: " in refused.stderr
    assert "Traceback" not in refused.stderr
    assert ours(bookworm) - before == set()
    assert bookworm.run("ls /usr/bin/ca-bridge", check=False).stdout.strip() in {"", "/usr/bin/ca-bridge"}


def test_refuses_another_processor(bookworm: Tree, offline: Path) -> None:
    """The file refuses another processor, and says which file is the right one."""
    bring(bookworm, offline)
    refused = bookworm.run(f"setarch i686 {INSTALL}", check=False)
    assert "wanted a machine with x86_64, which this file is for, found i686" in refused.stderr
    assert refused.returncode == 1


def test_refuses_a_changed_byte(bookworm: Tree, offline: Path) -> None:
    """A changed byte in its largest file is found; an attacker who changes the digest at its head as well meets those of the manifest."""
    data = bytearray(offline.read_bytes())
    with zipfile.ZipFile(offline) as opened:
        largest = max(opened.infolist(), key=lambda one: one.compress_size)
    name_bytes, extra_bytes = struct.unpack_from("<HH", data, largest.header_offset + 26)
    data[largest.header_offset + 30 + name_bytes + extra_bytes + largest.compress_size // 2] ^= 1
    bookworm.put(FILE, bytes(data))
    refused = bookworm.run(INSTALL, check=False)
    assert "wanted a complete and unchanged file, found another digest\nhint: copy it again" in refused.stderr
    assert ours(bookworm) == set()

    head, end, archive = bytes(data).partition(b"\nexit 1\nPK")
    was = hashlib.sha256(b"PK" + offline.read_bytes().partition(end)[2]).hexdigest()
    now = hashlib.sha256(b"PK" + archive).hexdigest()
    bookworm.put(FILE, head.replace(was.encode(), now.encode()) + end + archive)
    refused = bookworm.run(INSTALL, check=False)
    assert "as in the manifest, found" in refused.stderr
    assert "check its digest and signature" in refused.stderr
    assert not any("/usr/bin" in path or "/lib/" in path for path in ours(bookworm))


def test_another_user_may_look_and_not_install(bookworm: Tree, offline: Path) -> None:
    """Any user may run `check`, and only root `install`."""
    bookworm.put("/tmp/f", offline.read_bytes())
    nobody = "setpriv --reuid 65534 --clear-groups sh /tmp/f"
    assert "runs here" in bookworm.run(f"{nobody} check").stdout
    refused = bookworm.run(f"{nobody} install", check=False)
    assert (refused.returncode, refused.stderr) == (1, "error: wanted root, found user 65534\nhint: run it with sudo\n")


def test_a_killed_installation_is_done_by_the_next(bookworm: Tree, offline: Path) -> None:
    """The old program stays in force, and what the killed one had unpacked is removed."""
    bring(bookworm, offline)
    bookworm.run(
        f"{INSTALL} & while [ ! -e /opt/ca-bridge/versions/.new-*/lib ]; do :; done; kill -9 $!; pkill -9 python3",
        check=False,
    )
    assert "/usr/bin/ca-bridge" not in ours(bookworm)
    assert any("/.new-" in path for path in ours(bookworm))
    bookworm.run(f"{INSTALL} && ca-bridge --version")
    assert not any("/.new-" in path for path in ours(bookworm))


#: Ends the installer by SIGKILL at one of its steps, found by the system call and its path.
KILLED = f"""
import os, pathlib, signal, sys
at, seen = int(sys.argv[1]), 0
def killing(real):
    def step(*arguments, **more):
        global seen
        seen += 1
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **more)
    return step
for name in ("rename", "replace", "symlink", "unlink", "sync", "rmdir"):
    setattr(os, name, killing(getattr(os, name)))
sys.argv = ["{FILE}"]
sys.path.insert(0, "{FILE}/tree/libexec")
from release.installer import command
command.main(["install"])
"""


def test_killed_at_any_step_the_next_one_ends_it(bookworm: Tree, offline: Path, shared: Path) -> None:
    """From one version to another: the command starts at any time after the first installation, and nothing is left over."""
    bring(bookworm, offline)
    bookworm.run(INSTALL)
    bring(bookworm, releases.offline(shared / "release-later", SOURCE_DATE_EPOCH="2000000000"))
    bookworm.put("/root/killed.py", KILLED.encode())
    left = "find /usr/bin /opt/ca-bridge /usr/local/lib/systemd -maxdepth 2 -name '.*'"
    found = []
    for step in range(1, 7):
        ended = bookworm.run(f"python3 -I -S /root/killed.py {step} >/dev/null; echo $?; ca-bridge --version").stdout
        assert ended.split()[1:2] == ["ca-bridge"], (step, ended)
        found.append(ended.split()[0])
    assert "137" in found
    bookworm.run(INSTALL)
    assert bookworm.run(left).stdout == ""
    assert len(bookworm.run("ls -A /opt/ca-bridge/versions").stdout.split()) == 2


@pytest.mark.parametrize(
    "damage",
    [
        ": >$tree/manifest.json",
        "for f in $(find $tree/lib/any/bridge -name '*.pyc'); do truncate -s 40 $f; done",
        "chmod o+w $tree/lib/any $tree/lib/any/bridge/entry.py",
        "chown 1000 $tree/lib/any/bridge/entry.py",
        "echo x >$tree/lib/any/socket.py",
        "chmod u+s $tree/bin/ca-bridge",
    ],
    ids=["manifest", "bytecode", "open", "foreign", "more", "setuid"],
)
def test_what_was_changed_is_made_anew(installed: Tree, damage: str, offline: Path) -> None:
    """Whether a power cut, a bad disk or a user changed it: `check` reports all but bytecode, and another installation repairs it."""
    bring(installed, offline)
    installed.run(f"tree=$(readlink -f /opt/ca-bridge/current); {damage}")
    checked = installed.run(f"sh {FILE} check", check=False)
    assert (checked.returncode == 1, "Traceback" in checked.stderr) == ("pyc" not in damage, False)
    installed.run(INSTALL)
    assert installed.run(f"sh {FILE} check").stdout.endswith("(all files are as they were installed)\n")
    installed.run("ca-bridge --version")


def test_nothing_is_found_by_the_path_that_is_given(bookworm: Tree, offline: Path) -> None:
    """The installer and the uninstaller start no other user's programs from $PATH."""
    bring(bookworm, offline)
    names = "sed sha256sum readlink systemctl python3"
    bookworm.run(
        f"mkdir -p /tmp/other /run/systemd/system; for name in {names}; do "
        "printf '#!/bin/sh\necho %s >>/tmp/started\n' $name >/tmp/other/$name; chmod +x /tmp/other/$name; done"
    )
    with_it = "env PATH=/tmp/other:/usr/bin:/bin"
    bookworm.run(f"{with_it} /bin/{INSTALL}; {with_it} /bin/sh /opt/ca-bridge/uninstall", check=False)
    assert bookworm.run("cat /tmp/started", check=False).stdout == ""


def test_other_files_beside_the_versions_stay(bookworm: Tree, offline: Path) -> None:
    """Other files stay also where `versions` leads to a directory with other files."""
    bring(bookworm, offline)
    bookworm.run(
        "mkdir -p /opt/ca-bridge /srv/big/theirs; echo x >/srv/big/file; ln -s /srv/big /opt/ca-bridge/versions"
    )
    bookworm.run(f"{INSTALL} && {INSTALL} && ca-bridge --version && ls -d /srv/big/theirs /srv/big/file")
    said = bookworm.run("/opt/ca-bridge/uninstall").stdout
    assert "kept:     /opt/ca-bridge/versions, without" in said
    assert bookworm.run("ls -A /srv/big; ls /usr/bin/ca-bridge", check=False).stdout.split() == ["file", "theirs"]

    bookworm.run("rm /opt/ca-bridge/versions; mkdir -p /opt/ca-bridge/versions/theirs /etc/systemd/system")
    said = bookworm.run(f"ln -s /gone /etc/systemd/system/ca-bridge.service; {INSTALL}").stdout
    assert "/etc/systemd/system/ca-bridge.service instead of the installed unit; it starts nothing" in said
    bookworm.run("/opt/ca-bridge/uninstall && ls -d /opt/ca-bridge/versions/theirs")


def test_a_read_only_usr_leaves_no_half_installation(bookworm: Tree, offline: Path) -> None:
    """The error says what is read-only, nothing is in force by then, and with /usr writable the same file installs."""
    bring(bookworm, offline)
    refused = bookworm.run(f"mount --bind /usr /usr && mount -o remount,bind,ro /usr && {INSTALL}", check=False)
    assert "error: /usr/bin/.ca-bridge.new: Read-only file system" in refused.stderr
    assert (refused.returncode, ours(bookworm)) == (1, set())
    bookworm.run(f"{INSTALL} && ca-bridge --version")


def test_units_that_can_not_be_written_are_reported(bookworm: Tree, offline: Path) -> None:
    """The new version is in force by then, which is what it says; with room they come."""
    bring(bookworm, offline)
    units = "/usr/local/lib/systemd"
    full = f"mkdir -p {units} && mount -t tmpfs -o mode=755,size=8k none {units} && ! {INSTALL} && ls -A {units}/system"
    refused = bookworm.run(full)
    assert "is in use already; install it again to get its units" in refused.stderr
    assert ".new" not in refused.stdout
    assert "installed" not in bookworm.run(INSTALL).stderr
    assert "ca-bridge.timer" in bookworm.run(f"ls {units}/system").stdout


def test_a_run_at_work_keeps_its_program(bookworm: Tree, offline: Path) -> None:
    """It would lose its modules in the middle; when it has ended, the same command uninstalls."""
    bring(bookworm, offline)
    bookworm.run(f"{INSTALL}; mkdir -m 700 -p /var/lib/ca-bridge /srv/state /etc/ca-bridge")
    bookworm.put("/etc/ca-bridge/config.toml", b'[node]\nstate_dir = "/srv/state"\n')
    for state in ("/var/lib/ca-bridge", "/srv/state"):
        refused = bookworm.run(f"flock {state}/lock /opt/ca-bridge/uninstall", check=False)
        assert (refused.returncode, f"{state}: wanted no run at work" in refused.stderr) == (1, True), refused
    bookworm.run("ca-bridge --version && /opt/ca-bridge/uninstall")


@pytest.mark.attack("N22")
def test_an_interrupted_renewal_is_not_left_behind(bookworm: Tree, offline: Path) -> None:
    """Without the program it could not be finished."""
    bring(bookworm, offline)
    bookworm.run(f"{INSTALL}; mkdir -m 700 /var/lib/ca-bridge")
    bookworm.put("/var/lib/ca-bridge/journal.json", b"{}", 0o600)
    refused = bookworm.run("/opt/ca-bridge/uninstall", check=False)
    assert (refused.returncode, "ca-bridge recover" in refused.stderr) == (1, True)
    bookworm.run("mkdir -m 700 /srv/state && mv /var/lib/ca-bridge/journal.json /srv/state/restart.json")
    bookworm.put("/etc/ca-bridge/config.toml", b'[node]\nstate_dir = "/srv/state"\n')
    refused = bookworm.run("/opt/ca-bridge/uninstall", check=False)
    assert (refused.returncode, "/srv/state: wanted no interrupted renewal" in refused.stderr) == (1, True)
    bookworm.run("ca-bridge --version && rm /srv/state/restart.json && /opt/ca-bridge/uninstall")


@pytest.mark.parametrize("no", [b"n\n", b"\x04"], ids=["no", "Ctrl-D"])
def test_purge_asks_for_each(bookworm: Tree, offline: Path, no: bytes) -> None:
    """Without a terminal to ask on nothing happens; otherwise each item with a yes is removed, and the rest stays."""
    bring(bookworm, offline)
    bookworm.run(f"{INSTALL} && ca-bridge settings init && mkdir -m 700 /var/lib/ca-bridge")
    assert "wanted a terminal" in bookworm.run("/opt/ca-bridge/uninstall --purge", check=False).stderr
    bookworm.run("ca-bridge --version")
    answers = no + b"y\n"
    terminal = (
        "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(['/opt/ca-bridge/uninstall', '--purge'])))"
    )
    said = bookworm.run(f'mount -t devpts devpts /dev/pts; python3 -c "{terminal}"', stdin=answers).stdout
    assert "remove /etc/ca-bridge (settings, and files that they name)? [y/N]" in said
    assert (
        bookworm.run("ls -d /etc/ca-bridge /var/lib/ca-bridge /opt/ca-bridge", check=False).stdout == "/etc/ca-bridge\n"
    )
