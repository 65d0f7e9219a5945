"""
Bare Debians, in which a release is tried: `tests/kit/trees.sh` makes them, an overlay keeps them as they are.

Everything runs in namespaces of its own, with no network interface but a loopback that is down; they and their mounts
end with the last process in them.
"""

from __future__ import annotations

import ctypes
import io
import os
import shlex
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.kit.loopback import free_port

SUITES = ("bookworm", "trixie")
#: What cron and a bare `sh` have, and nothing of the tests' own environment.
ENVIRONMENT = ("env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8", "COLUMNS=80")

#: What a test says of the nightly timer; a test's own words replace those of the tree.
TIMER = "/etc/systemd/system/ca-bridge.timer.d/try.conf"

_BOOT_SECONDS = 180.0
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET


def directory() -> Path:
    """Where the trees are: `$CA_BRIDGE_TREES`."""
    return Path(os.environ.get("CA_BRIDGE_TREES", "/var/lib/ca-bridge-trees"))


def lacking() -> str:
    """What is not there, and what brings it; empty where all is."""
    if os.geteuid() != 0:
        return "trees need root; run the tests as root"
    missing = [suite for suite in SUITES if not (directory() / f"{suite}.stamp").is_file()]
    return f"{', '.join(missing)} not found in {directory()}; run tests/kit/trees.sh" if missing else ""


@dataclass(frozen=True, slots=True)
class Tree:
    """One Debian, and what was changed in it."""

    suite: str
    base: Path  #: Below it are the changes, `upper`.
    below: tuple[Path, ...] = ()  #: Changes of others that this one stands on, the newest first.

    @classmethod
    def new(cls, suite: str, base: Path) -> Tree:
        """As it was bootstrapped."""
        for name in ("upper", "work", "root"):
            (base / name).mkdir(parents=True)
        return cls(suite, base)

    def copy(self, base: Path) -> Tree:
        """As this one is now; it must not change any more."""
        return Tree(self.suite, Tree.new(self.suite, base).base, (self.base / "upper", *self.below))

    @property
    def _mount(self) -> str:
        lower = ":".join(map(str, (*self.below, directory() / self.suite)))
        upper, work = self.base / "upper", self.base / "work"
        return f"mount -t overlay tree -o lowerdir={lower},upperdir={upper},workdir={work} {self.base / 'root'}"

    def run(self, script: str, *, stdin: bytes = b"", check: bool = True) -> subprocess.CompletedProcess[str]:
        """
        Run a shell script in it as root, without network.

        Raises:
            AssertionError: It ended with another code than 0, and `check` is set; the text has its output.
        """
        inside = shlex.join(["chroot", str(self.base / "root"), *ENVIRONMENT, "sh", "-c", script])
        return self.host(f"exec {inside}", stdin=stdin, check=check)

    def host(self, script: str, *, stdin: bytes = b"", check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a script of this machine's programs, which find the tree at `$ROOT`; else as `run`."""
        root = self.base / "root"
        outer = f"{self._mount} && mount -t proc proc {root}/proc && ROOT={root} && {script}"
        command = ["unshare", "--mount", "--propagation", "private", "--net", "--pid", "--fork", "--kill-child"]
        done = subprocess.run([*command, "sh", "-c", outer], input=stdin, capture_output=True, check=False, timeout=300)
        return _checked(script, done, check=check)

    def put(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Write a file."""
        quoted = shlex.quote(path)
        self.run(f"mkdir -p $(dirname {quoted}) && cat >{quoted} && chmod {mode:o} {quoted}", stdin=data)

    def put_directory(self, source: Path, path: str) -> None:
        """Copy a directory's content, modes kept, as root's."""
        buffer = io.BytesIO()

        def roots(info: tarfile.TarInfo) -> tarfile.TarInfo:
            info.uid = info.gid = 0
            info.uname = info.gname = "root"
            return info

        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.add(source, ".", filter=roots)
        self.run(f"mkdir -p {path} && tar -x -C {path}", stdin=buffer.getvalue())

    def changed(self) -> set[str]:
        """Path of each file that was added or changed, and of each that was removed."""
        upper = self.base / "upper"
        return {f"/{path.relative_to(upper)}" for path in upper.rglob("*") if path.is_symlink() or not path.is_dir()}

    @contextmanager
    def booted(self) -> Iterator[Booted]:
        """With its own systemd as process 1 (systemd-nspawn), and again without network."""
        name = f"t{os.getpid()}-{time.monotonic_ns()}"
        command = [
            *("systemd-nspawn", "--quiet", "--directory", str(self.base / "root"), "--boot", "--private-network"),
            *("--register=no", "--keep-unit", "--console=pipe", f"--machine={name}"),
        ]
        # A machine with cgroup v1 has an empty v2 beside it, which is all that systemd needs to keep services apart.
        environment = {**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}
        outer = [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            f"{_enter(name)} && {self._mount} && exec {shlex.join(command)}",
        ]
        with (self.base / "console").open("wb") as console:
            process = subprocess.Popen(
                outer, env=environment, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT
            )
            try:
                yield Booted(_first_process(process, self.base / "console"))
            finally:
                process.terminate()
                try:
                    process.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                _remove(name)


#: Where control groups are, of version 2, or of version 1 with an empty version 2 beside it.
_CONTROL_GROUPS = ("/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd", "/sys/fs/cgroup")


def _enter(name: str) -> str:
    """
    Shell words that put the shell into a control group of its own.

    Two machines would have one tree of groups: when a unit ends in one of them, its systemd removes the group of the unit
    that is called alike in the other, which may be about to start a process there ("Failed to spawn executor").
    """
    tops = " ".join(_CONTROL_GROUPS)
    return f"for top in {tops}; do [ ! -e $top/cgroup.procs ] || {{ mkdir $top/{name} && echo $$ >$top/{name}/cgroup.procs; }}; done"


def _remove(name: str) -> None:
    for top in _CONTROL_GROUPS:
        for directory, _, _ in os.walk(f"{top}/{name}", topdown=False):
            with suppress(OSError):
                Path(directory).rmdir()


@dataclass(frozen=True, slots=True)
class Booted:
    """A tree whose systemd runs."""

    pid: int  #: Of its process 1, as the machine numbers it.

    def run(self, script: str, *, stdin: bytes = b"", check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a shell script in it; as `Tree.run`."""
        command = ["nsenter", "--target", str(self.pid), "--all", *ENVIRONMENT, "sh", "-c", script]
        done = subprocess.run(command, input=stdin, capture_output=True, check=False, timeout=300)
        return _checked(script, done, check=check)

    def wait(self, script: str, seconds: float = 180) -> str:
        """
        Run a script until it ends with 0, and return its output.

        Raises:
            AssertionError: It does not within that time.
        """
        end = time.monotonic() + seconds
        while (done := self.run(script, check=False)).returncode:
            assert time.monotonic() < end, f"{script}: {done.stdout}{done.stderr}\n{self.journal()}"
            time.sleep(0.2)
        return done.stdout

    @contextmanager
    def network(self) -> Iterator[None]:
        """What is started in here listens on the machine's loopback (setns(2) is for this thread and its children alone)."""
        free_port()  # a block of ports that is taken in there may be another process's outside
        libc = ctypes.CDLL(None, use_errno=True)
        with Path("/proc/thread-self/ns/net").open() as ours, Path(f"/proc/{self.pid}/ns/net").open() as theirs:
            assert libc.setns(theirs.fileno(), _NEW_NETWORK) == 0
            try:
                yield
            finally:
                assert libc.setns(ours.fileno(), _NEW_NETWORK) == 0

    def journal(self) -> str:
        """What our units said."""
        return self.run("journalctl --no-pager -o cat -u 'ca-bridge*'", check=False).stdout

    def crash(self) -> None:
        """As a power cut: nothing is stopped in order."""
        os.kill(self.pid, signal.SIGKILL)


def _checked(script: str, done: subprocess.CompletedProcess[bytes], *, check: bool) -> subprocess.CompletedProcess[str]:
    out, err = done.stdout.decode(), done.stderr.decode()
    assert not check or done.returncode == 0, f"{script}: exit code {done.returncode}\n{out}\n{err}"
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


def _first_process(nspawn: subprocess.Popen[bytes], console: Path) -> int:
    """The container's process 1, once its systemd has started what it had to."""
    end = time.monotonic() + _BOOT_SECONDS
    while time.monotonic() < end and nspawn.poll() is None:
        children = Path(f"/proc/{nspawn.pid}/task/{nspawn.pid}/children").read_text(encoding="ascii").split()
        for pid in map(int, children):
            if _is_up(pid):
                return pid
        time.sleep(0.1)
    raise AssertionError(f"the tree did not boot: {console.read_text(errors='replace')}")


def _is_up(pid: int) -> bool:
    command = ["nsenter", "--target", str(pid), "--all", "systemctl", "is-system-running"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() in {"running", "degraded"}
