"""`setup -o DIR` in another user's directory changes nothing but the files that it makes there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bridge.cli.setup import write_files
from bridge.contract import SetupFile
from bridge.errors import BridgeError
from bridge.system import jobs
from tests.kit.pki import handmade_pki

PROGRAM = Path(sys.executable).with_name("ca-bridge")
NOBODY = 65534
#: Puts a link in the place of each file as soon as it is there.
_SWAP = """
import os, sys
victim, count = sys.argv[1], int(sys.argv[2])
for number in range(count):
    os.symlink(victim, f".link{number}")
print("ready", flush=True)
for number in range(count):
    while not os.path.lexists(f"f{number}"):
        pass
    os.rename(f".link{number}", f"f{number}")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be two users; run the tests as root")
def test_no_link_gets_the_mode_of_what_is_written(tmp_path: Path) -> None:
    """The directory's owner changes a file for a link to root's: that one's mode stays, at each of 300 tries."""
    victim = tmp_path / "shadow"
    victim.write_text("secret")
    victim.chmod(0o600)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, NOBODY, NOBODY)
    count = 300
    command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "/usr/bin/python3", "-I", "-c"]
    # begun in the directory, because the user `nobody` may not enter the directories above it
    with subprocess.Popen([*command, _SWAP, victim, str(count)], cwd=theirs, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == b"ready\n"
            for number in range(count):
                write_files([SetupFile(name=f"f{number}", text="x", executable=True)], theirs)
                assert victim.stat().st_mode & 0o777 == 0o600, number
        finally:
            other.kill()
    assert victim.read_text() == "secret"


def test_what_is_written_has_its_mode_whatever_the_umask(tmp_path: Path) -> None:
    """All users may read it, only its owner may write to it or to a directory that is made, and an older file stays."""
    place, jobs_place = tmp_path / "new/setup", tmp_path / "new/jobs/etc"
    before = os.umask(0)
    try:
        write_files([SetupFile(name="a", text="x", executable=True), SetupFile(name="b", text="y")], place)
        jobs.write([jobs.Job(path=Path("/etc/cron.d/c"), text="z")], jobs_place)
    finally:
        os.umask(before)
    made = (place / "a", place / "b", jobs_place / "c", place, jobs_place, jobs_place.parent, place.parent)
    assert [path.stat().st_mode & 0o777 for path in made] == [0o755, 0o644, 0o644, *[0o755] * 4]
    with pytest.raises(BridgeError):
        write_files([SetupFile(name="a", text="z")], place)
    assert (place / "a").read_text() == "x"


@pytest.mark.parametrize("kind", ["pipe", "endless"])
def test_a_list_of_nodes_is_a_file(tmp_path: Path, kind: str) -> None:
    """A named pipe or an endless file in its place delays no caller and fills no memory."""
    nodes = tmp_path / "nodes"
    if kind == "pipe":
        os.mkfifo(nodes)
    else:
        with nodes.open("wb") as opened:
            opened.truncate(1 << 40)
    node = handmade_pki(tmp_path / "node", external=True)
    places = ["--pki-dir", str(node.pki_dir), "--kubeconfig-dir", str(node.kubeconfig_dir)]
    command = [str(PROGRAM), "setup", "vault", "--nodes", str(nodes), *places]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 2
    assert "--nodes: wanted a list of nodes" in ended.stderr
