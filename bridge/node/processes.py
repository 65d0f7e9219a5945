"""The node's processes and static pods, from the process table or crictl, and whether they are older than a file."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from bridge.node import kubelet
from bridge.pki.budget import of_server
from bridge.specs import Component
from bridge.system import paths
from bridge.system.paths import UnreadableError
from bridge.system.run_command import Command, run

PROC = Path("/proc")

#: The field's index after the name in `/proc/PID/stat`, as the name may have blanks: proc_pid_stat(5), field 22.
_START_FIELD = 22 - 3
#: UID_MIN of login.defs(5): from this UID on, users may call any program `kubelet`. Services have lower UIDs, and so do
#: kubeadm's components without root.
_FIRST_PERSON = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One running process."""

    pid: int
    started: datetime
    arguments: tuple[str, ...]  #: The program first, as it was called.
    root: Path  #: The process's root directory, as a path for us.


def running(program: str, proc: Path = PROC) -> list[Process]:
    """A program's processes in our own network namespace, which is the node's, oldest first; none of a regular user's."""
    here, found = _network(proc / "self"), []
    for entry in (path for path in proc.iterdir() if path.name.isdigit()):
        # a process may end meanwhile, or belong to another user
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            words = tuple((entry / "cmdline").read_bytes().rstrip(b"\0").decode(errors="replace").split("\0"))
            if os.path.basename(words[0]) != program or _is_of_a_person(entry):  # noqa: PTH119 (a text)
                continue
            if _network(entry) == here:
                started, root = _started(entry), entry / "root"
                found.append(Process(pid=int(entry.name), started=started, arguments=words, root=root))
    return sorted(found, key=lambda process: process.started)


def _is_of_a_person(entry: Path) -> bool:
    """Whether its real user is neither root nor a service's; set-uid programs change only the effective user."""
    status = (entry / "status").read_text(errors="replace")
    uid = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("Uid:"))
    return uid >= _FIRST_PERSON and uid not in paths.trusted_users()


def _network(entry: Path) -> str:
    return os.readlink(entry / "ns/net")  # noqa: PTH115 (`net:[4026531840]` is no path)


def _started(entry: Path) -> datetime:
    """When a process started, by the present clock, even if that was set since: the kernel counts from boot."""
    behind_name = (entry / "stat").read_text(errors="replace").rpartition(")")[2]
    ticks = int(behind_name.split()[_START_FIELD])
    return datetime.fromtimestamp(_boot_seconds() + ticks / os.sysconf("SC_CLK_TCK"), UTC)


def _boot_seconds() -> float:
    """When the machine booted, by the present clock; the fastest of three readings counts, since it was interrupted least."""
    readings = []
    for _ in range(3):
        begin, now, end = time.clock_gettime(time.CLOCK_BOOTTIME), time.time(), time.clock_gettime(time.CLOCK_BOOTTIME)
        readings.append((end - begin, now - end))
    return min(readings)[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """When we wrote a file, in time since boot, which a change of the clock does not affect."""

    boot: str  #: The kernel's ID of this boot.
    seconds: float
    inode: int
    changed_ns: int  #: The file's ctime: if it differs, the file was changed since.

    @classmethod
    def of(cls, path: Path) -> Written:
        """Describe a file that was written just now."""
        status, seconds = path.lstat(), time.clock_gettime(time.CLOCK_BOOTTIME)
        return cls(boot=_boot_id(), seconds=seconds, inode=status.st_ino, changed_ns=status.st_ctime_ns)

    def since(self, earlier: Written | None) -> Written:
        """The same file with an earlier time of writing; None: a time before this boot."""
        boot, seconds = (earlier.boot, earlier.seconds) if earlier is not None else ("", 0)
        return replace(self, boot=boot, seconds=seconds)

    def is_of(self, path: Path) -> bool:
        """Whether the file is unchanged since we wrote it."""
        try:
            status = path.lstat()
        except OSError:
            return False
        return (status.st_ino, status.st_ctime_ns) == (self.inode, self.changed_ns)

    @property
    def moment(self) -> datetime:
        """The time of writing, by the present clock; after a reboot, the time of that reboot."""
        return datetime.fromtimestamp(_boot_seconds() + (self.seconds if self.boot == _boot_id() else 0), UTC)


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def oldest_start(component: Component, named: Sequence[Path], proc: Path = PROC) -> datetime | None:
    """The start of a component's oldest process that names one of these files; None: no process is visible."""
    processes = running(component.value, proc)
    return next((process.started for process in processes if any(_names(process, path) for path in named)), None)


def reader_of(component: Component, path: Path) -> Process | None:
    """A component's oldest process that has this very file among its arguments; None: no process is visible."""
    found = (process for process in running(component.value) if any(_is_same(file, path) for file in _files(process)))
    return next(found, None)


def program_of(process: Process) -> Path:
    """The program that a restart of a process would run (OSError: it has ended, or is another user's)."""
    return Path(os.readlink(PROC / str(process.pid) / "exe").removesuffix(" (deleted)"))  # noqa: PTH115 (may not be there)


class Age(NamedTuple):
    """Whether a component is older than a file."""

    older: bool | None  #: The component is older than the file, or sees another content; None: unknown.
    detail: str


def compare_age(
    component: Component,
    path: Path,
    proc: Path = PROC,
    written: Mapping[str, Written] = MappingProxyType({}),
    *,
    by: Sequence[Path] = (),
) -> Age:
    """Compare a file's age with that of a component's oldest process that names it, or one of `by` (UnreadableError, ValueError)."""
    data = file_contents(path)
    changed = max(_changed(path, written), _changed(path.resolve(), written))
    if changed > datetime.now(UTC):
        text = f"{path} was changed at {moment_text(changed)}, which is in the future: was the clock set back?"
        return Age(None, text)
    processes = running(component.value, proc)
    ours = [process for process in processes if any(_names(process, place) for place in (path, *by))]
    if processes and not ours:
        pids = ", ".join(str(process.pid) for process in processes)
        named = " or ".join(dict.fromkeys(map(str, (path, *by))))
        return Age(None, f"wanted {component.value} with {named} among its arguments, found process {pids} without it")
    started = ours[0].started if ours else _container_made(component)
    if started is None:
        detail = f"there is no process {component.value} to be seen (root alone sees all), and crictl knows none"
        return Age(None, detail)
    exact = abs(started - changed) < timedelta(seconds=1)
    times = f"started at {moment_text(started, exact=exact)}, {path} changed at {moment_text(changed, exact=exact)}"
    if any(_sees_another(process, path, data) for process in ours):
        return Age(True, f"still sees what was in {path} before; {times}")
    return Age(started <= changed, times)


def _names(process: Process, path: Path) -> bool:
    """Whether a process has a file among its arguments, by our path or by its own."""
    if any(str(path) in word for word in process.arguments):
        return True
    return any(_is_same(file, path) for file in _files(process))


def _files(process: Process) -> Iterator[Path]:
    """The files among a process's arguments, as paths for us."""
    values = (word.rpartition("=")[2] for word in process.arguments)
    return (process.root / value.lstrip("/") for value in values if value.startswith("/"))


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # it does not exist, or the process is another user's
        return False


def file_contents(path: Path) -> bytes:
    """The content of a file (ValueError: it does not exist)."""
    try:
        data = paths.read(path)
    except UnreadableError as e:
        raise UnreadableError(f"{path}: {e}") from e
    if data is None:
        raise ValueError(f"{path}: there is no such file")
    return data


def moment_text(moment: datetime, *, exact: bool = False) -> str:
    """A time as text in UTC, to the second, or with `exact` to the millisecond."""
    return f"{moment.astimezone(UTC).replace(tzinfo=None).isoformat(' ', 'milliseconds' if exact else 'seconds')} UTC"


def _changed(path: Path, written: Mapping[str, Written]) -> datetime:
    """When the file or link itself last changed, by our record or else by its ctime."""
    noted = written.get(str(path))
    if noted is not None and noted.is_of(path):
        return noted.moment
    return datetime.fromtimestamp(path.lstat().st_ctime, UTC)


def _sees_another(process: Process, path: Path, data: bytes) -> bool:
    try:
        seen = paths.read(process.root / path.relative_to("/"))
    except UnreadableError:  # another user's process; its times are enough
        return False
    return seen is not None and seen != data


#: The label with a pod's namespace, set by the kubelet.
_NAMESPACE = "io.kubernetes.pod.namespace"


def _container_made(component: Component) -> datetime | None:
    """When a component's oldest running container was made, other namespaces excluded; None: the runtime can't tell."""
    try:
        answer = _crictl("ps", "--state", "running", "--name", f"^{component.value}$")
        own = (container for container in answer["containers"] if container["labels"][_NAMESPACE] == "kube-system")
        nanoseconds = [int(container["createdAt"]) for container in own]
    except (OSError, ValueError, LookupError, TypeError):
        return None  # no crictl, no runtime, or an unexpected answer
    return datetime.fromtimestamp(min(nanoseconds) / 1e9, UTC) if nanoseconds else None


#: The time that a kubelet needs to forget a pod after its sandbox ended, and after its process ended, which is
#: earlier (measured on 1.37; a manifest that is back too early costs 10 to 25 s).
SANDBOX_SETTLES = timedelta(seconds=3)
PROCESS_SETTLES = timedelta(seconds=5)

Instances = Callable[[], frozenset[str]]


def instances(component: Component) -> tuple[Instances, timedelta]:
    """A function that lists a static pod's instances, by crictl or the process table; and how long a kubelet needs to forget it."""
    with contextlib.suppress(OSError, ValueError):
        seen = _sandboxes(component)
        is_labelled = any(seen.values())  # then pods without the label do not count

        def last_answer() -> frozenset[str]:
            nonlocal seen
            with contextlib.suppress(OSError, ValueError):
                seen = _sandboxes(component)
            return frozenset(pod for pod, labelled in seen.items() if labelled or not is_labelled)

        if seen or not _in_process_table(component):
            return last_answer, SANDBOX_SETTLES
    return lambda: _in_process_table(component), PROCESS_SETTLES


def instances_of_pod(name: str) -> frozenset[str]:
    """The running instances of a static pod with this name in its manifest, by crictl alone (OSError, ValueError: crictl failed)."""
    return frozenset(_static_pods(name))


_CRICTL_LIMIT = timedelta(seconds=10)
_MOST_ANSWER = 16 << 20


def _crictl(*arguments: str) -> dict[str, Any]:
    """Query the runtime that the kubelet's configuration names, or that crictl finds by itself."""
    program = shutil.which("crictl")
    if program is None:
        raise FileNotFoundError("no crictl")
    endpoint = kubelet.runtime_endpoint()
    words = [program, *(["--runtime-endpoint", endpoint] if endpoint else []), *arguments, "--output", "json"]
    answer = bytearray()
    command = Command(words=words, environment=os.environ, limit=_CRICTL_LIMIT, most_output=_MOST_ANSWER)
    ended = run(command, answer.extend)
    if ended.failure:
        raise OSError(f"crictl {ended.failure}")
    document = of_server(bytes(answer))
    if not isinstance(document, dict):
        raise ValueError("something else")  # noqa: TRY004 (of a program, not of a caller)
    return document


def _sandboxes(component: Component) -> dict[str, bool]:
    """The static pods that may be the component's, and whether each has kubeadm's label."""
    static_pods = _static_pods(component.value)
    return {pod: label is not None for pod, label in static_pods.items() if label in (None, component.value)}


def _static_pods(name: str) -> dict[str, Any]:
    """Static pods called NAME-NODE, with the value of kubeadm's label, which an `etcd-defrag` pod lacks."""
    answer = _crictl("pods", "--state", "ready")
    try:
        called = [pod for pod in answer.get("items") or () if pod["metadata"]["name"].startswith(f"{name}-")]
        static = [pod for pod in called if pod.get("annotations", {}).get("kubernetes.io/config.source") == "file"]
        return {f"pod {pod['id'][:13]}": pod.get("labels", {}).get("component") for pod in static}
    except (LookupError, AttributeError, TypeError) as e:
        raise ValueError("something else") from e


def _in_process_table(component: Component) -> frozenset[str]:
    return frozenset(f"process {process.pid}" for process in running(component.value))
