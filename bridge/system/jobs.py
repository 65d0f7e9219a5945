"""Jobs for systemd and cron: the units and crontabs below `config/`, adapted to this machine's paths."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shlex
import shutil
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from bridge.errors import BridgeError
from bridge.system.files import DIRECTORY_MODE, held_directory, make_directories, reasons, user_name, write_atomically
from bridge.system.paths import program_exposure
from bridge.system.run_command import Command, run
from bridge.words import has_controls

#: The program's paths in the shipped files.
_SHIPPED_PROGRAM = "/usr/bin/ca-bridge"
UNIT_DIRECTORY = Path("/etc/systemd/system")
CRON_DIRECTORY = Path("/etc/cron.d")
_MODE = 0o644
_SYSTEMCTL_LIMIT = timedelta(seconds=60)
_MOST_SAID = 64 << 10


class JobError(BridgeError):
    """A job can't be written or enabled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One file of a job."""

    path: Path  #: The path to install it at.
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """The program, options and paths of this machine, for units and cron jobs."""

    program: Path  #: An absolute path.
    options: Sequence[str]  #: Options of each command, such as `--config FILE`; empty for the default settings.
    #: This machine's paths, by the path in the shipped files.
    paths: Mapping[str, str]
    user: str  #: The user that runs the job.
    writable: Sequence[Path]  #: Directories that the job writes into.
    maybe_writable: Sequence[Path] = ()  #: Further ones, which may be missing.


def this_program(user: str) -> Path:
    """The running program's path, in a form that cron and systemd can call as this user."""
    called = Path(sys.argv[0])
    found = called if called.is_absolute() else Path(shutil.which(sys.argv[0]) or called).absolute()
    if found.name != "ca-bridge" or not found.is_file():
        found = Path(sys.executable).with_name("ca-bridge")
    if not found.is_file():
        raise JobError(
            f"wanted the installed program ca-bridge, found {called}", hint="install it, then call it by its name"
        )
    if os.geteuid() == 0 and (unsafe := program_exposure(found, _uid(user))) is not None:
        hint = f"a job would run what others can change: install it where only root can write, or {unsafe.hint}"
        raise JobError(str(unsafe), hint=hint)
    return found


def _uid(user: str) -> int | None:
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(user).pw_uid
    return None


def unit(name: str, shipped: str, places: Places) -> Job:
    """Adapt a systemd unit's shipped text to this machine's paths (JobError: a path has a control character)."""
    text = _placed(shipped, places, _systemd_word).replace(_WHERE, "")
    listed = [*map(str, places.writable), *(f"-{path}" for path in places.maybe_writable)]
    writable = " ".join(_systemd_word(path, "ReadWritePaths=") for path in listed)
    text = _WRITABLE.sub(lambda _: f"ReadWritePaths={writable}", text)
    if places.paths.get(_STATE, _STATE) != _STATE:
        text = _STATE_LINES.sub("", text)
    return Job(path=UNIT_DIRECTORY / name, text=_USER.sub(f"User={places.user}", text))


_STATE = "/var/lib/ca-bridge"
_STATE_LINES = re.compile(r"^StateDirectory(Mode)?=.*\n", re.MULTILINE)
_WRITABLE = re.compile(r"^ReadWritePaths=.*$", re.MULTILINE)
_USER = re.compile(r"^User=.*$", re.MULTILINE)
#: Only for administrators who copy the shipped file by hand.
_WHERE = "# The path of the installed program: see `command -v ca-bridge`.\n"
_CRON_LINE = re.compile(r"^((?:\S+\s+){5})(\S+)(\s+)(?=/)", re.MULTILINE)


def crontab(name: str, shipped: str, places: Places) -> Job:
    """Adapt a shipped crontab for /etc/cron.d, like `unit`."""
    text = _placed(shipped, places, _cron_word)
    return Job(path=CRON_DIRECTORY / name, text=_CRON_LINE.sub(rf"\g<1>{places.user}\g<3>", text))


def _placed(shipped: str, places: Places, word: Callable[[str, str], str]) -> str:
    """The shipped text with this machine's paths, longest first, so that no path replaces the start of a longer one."""
    by_length = sorted(places.paths, key=len, reverse=True)
    paths = "|".join(rf"{re.escape(path)}(?![\w.-])" for path in by_length) or "(?!)"

    def line(text: str) -> str:
        text = re.sub(paths, lambda place: word(places.paths[place[0]], text), text)
        program, *options = (word(argument, text) for argument in (str(places.program), *places.options))
        return re.sub(rf"{_SHIPPED_PROGRAM} (\w+)", lambda place: " ".join((program, place[1], *options)), text)

    return "".join(text if text.startswith("#") else line(text) for text in shipped.splitlines(keepends=True))


def _systemd_word(text: str, line: str) -> str:
    """Quote a word for a line of a unit (systemd.syntax(7), "Quoting"; systemd.unit(5), "Specifiers")."""
    escaped = _one_line(text).replace("%", "%%")
    if line.startswith("Condition"):
        return escaped  # taken literally up to the end of the line
    escaped = escaped.replace("\\", "\\\\").replace('"', '\\"')
    if line.startswith("Exec"):
        escaped = escaped.replace("$", "$$")
    return f'"{escaped}"' if re.search(r"[\s'\";]", text) else escaped


def _cron_word(text: str, _: str) -> str:
    """Quote a word for a command in a crontab, where a bare % ends the command (crontab(5))."""
    return shlex.quote(_one_line(text)).replace("%", "\\%")


def _one_line(text: str) -> str:
    """Return the text, unless it could begin a new line in a unit or a crontab (JobError)."""
    if has_controls(text):
        raise JobError(
            f"wanted a path in UTF-8 without line breaks and other control characters, found {text!r}",
            hint="units and crontabs have no way to name it; name another place",
        )
    return text


def write(jobs: Sequence[Job], directory: Path | None) -> list[Path]:
    """Write each file atomically."""
    places = [job.path if directory is None else directory / job.path.name for job in jobs]
    for job, path in zip(jobs, places, strict=True):
        try:
            with held_directory(path.parent) as held:
                write_atomically(held / path.name, job.text.encode(), _MODE)
        except OSError as e:
            hint = "run as root (sudo), or name a directory with -o" if isinstance(e, PermissionError) else None
            raise JobError(f"{path}: can't write it: {e.strerror}", hint=hint) from e
    return places


#: Names in the process table of programs that read /etc/cron.d.
_CRONS = frozenset({"cron", "crond", "fcron", "bcron-start", "busybox"})
#: systemd-cron has no process of its own: it turns the files in /etc/cron.d into timers.
_GENERATOR = "systemd/system-generators/systemd-crontab-generator"
_ROOTS = (Path("/usr/lib"), Path("/lib"), Path("/usr/local/lib"))


def cron_runs(proc: Path = Path("/proc"), roots: Sequence[Path] = _ROOTS) -> bool:
    """Whether a program on this machine runs the jobs of /etc/cron.d."""
    return any((root / _GENERATOR).exists() for root in roots) or any(map(_is_cron, proc.glob("[0-9]*")))


def _is_cron(process: Path) -> bool:
    try:
        name = (process / "comm").read_text(encoding="utf-8", errors="replace").strip()
        words = (process / "cmdline").read_bytes().split(b"\0")
    except OSError:  # it has ended
        return False
    return name in _CRONS and (name != "busybox" or b"crond" in words)


def crontabs() -> list[Path]:
    """The crontabs of our jobs that exist."""
    return [path for name in ("ca-bridge", "ca-bridge-desk") if (path := CRON_DIRECTORY / name).exists()]


def assert_user(user: str) -> None:
    """Raise a JobError if a job's user does not exist, since nothing would run."""
    if _uid(user) is None:
        raise JobError(
            f"there is no user {user}, as whom the job has to run",
            hint=f"make the user (`useradd --system {user}`), or name another one: --user",
        )


def assert_cron_takes(user: str) -> None:
    """Raise a JobError if nothing would run from /etc/cron.d: the user does not exist, or cron does not run."""
    assert_user(user)
    if not cron_runs():
        raise JobError(
            "no cron runs: nothing would read the file",
            hint="install and start one (Debian: `apt-get install cron`), or take `ca-bridge setup systemd --enable`; "
            f"`-o {CRON_DIRECTORY}` writes the file all the same",
        )


#: The directory that sd_booted(3) checks.
_SYSTEMD_RUNS = Path("/run/systemd/system")


def assert_systemd_takes(user: str) -> None:
    """Raise a JobError if units would not run: the user does not exist, or systemd is not the init."""
    assert_user(user)
    if not _SYSTEMD_RUNS.is_dir():
        raise JobError(
            "no systemd runs: nothing would read the units",
            hint=f"`ca-bridge setup cron --enable` needs none; `-o {UNIT_DIRECTORY}` writes the units all the same",
        )


def others(made: Sequence[Job]) -> list[Path]:
    """Enabled jobs of the other kind (crontab or timer) that do the same as these."""
    timers = {f"{job.path.name}.timer" for job in made if job.path.parent == CRON_DIRECTORY}
    crontab = {job.path.stem for job in made if job.path.suffix == ".timer"}
    wanted = (UNIT_DIRECTORY / "timers.target.wants" / name for name in timers)
    return [path for path in (*wanted, *(CRON_DIRECTORY / name for name in crontab)) if os.path.lexists(path)]


# --- the directories of a job's user ----------------------------------------------------------------------------------


def make_directory(path: Path, user: str, mode: int) -> None:
    """Make a directory of a job's user, or accept one that the user may write to (JobError: neither is possible)."""
    if path.exists():
        assert_may_write(path, user, "of the job's user")
        return
    account = pwd.getpwnam(user)
    with reasons(JobError, f"{path}: can't make it", hint=_install(path, user)):
        make_directories(path.parent)
        path.mkdir(mode=DIRECTORY_MODE)
        # by descriptor, so that a link in its place is not followed
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if os.fstat(descriptor).st_uid == os.geteuid():
                os.fchmod(descriptor, mode)
                if account.pw_uid != os.geteuid():
                    os.fchown(descriptor, account.pw_uid, account.pw_gid)
        finally:
            os.close(descriptor)


def assert_may_write(path: Path, user: str, which: str) -> None:
    """Raise a JobError if a job's user can't add and remove files in a directory."""
    trouble = trouble_with(path, user)
    if trouble == _NO_DIRECTORY:
        hint = f"mount it, or make it: {_install(path, user)}"
        raise JobError(f"{path}: there is no such directory {which}", hint=hint)
    if trouble:
        raise JobError(f"{path}: wanted a directory {which}, found {trouble}", hint=f"chown {user} {path}")


def _install(path: Path, user: str) -> str:
    return f"`install -d -o {user} {path}`"


_NO_DIRECTORY = "no directory"


def trouble_with(path: Path, user: str) -> str:
    """Why a user can't add and remove files in a directory, by its owner and mode; empty: the user can."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return _NO_DIRECTORY
    except OSError as e:
        return str(e.strerror)
    if not stat.S_ISDIR(status.st_mode):
        return _NO_DIRECTORY
    account = pwd.getpwnam(user)
    groups = os.getgrouplist(user, account.pw_gid)
    shift = 6 if status.st_uid == account.pw_uid else 3 if status.st_gid in groups else 0
    if account.pw_uid == 0 or (status.st_mode >> shift) & stat.S_IRWXO == stat.S_IRWXO:
        return ""
    return f"that {user} can't write to it (owner {user_name(status.st_uid)}, mode {stat.S_IMODE(status.st_mode):04o})"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeskPlaces:
    """The directories of an installed job of a CA desk."""

    job: Path
    user: str
    inbox: Path
    outbox: Path


def desk_places() -> list[DeskPlaces]:
    """The directories of the desk jobs that are installed here."""
    places = []
    for job in (CRON_DIRECTORY / "ca-bridge-desk", UNIT_DIRECTORY / "ca-bridge-desk.service"):
        with contextlib.suppress(OSError, ValueError):
            text = job.read_text(encoding="utf-8")
            is_unit = job.suffix == ".service"
            pattern = r"^ExecStart=(.*)$" if is_unit else r"^(?:\S+\s+){5}(\S+\s+.*)$"
            line = re.search(pattern, re.sub(r"^#.*\n", "", text, flags=re.MULTILINE), re.MULTILINE)
            words = shlex.split(line[1].replace("\\%", "%").replace("%%", "%")) if line else []
            user = re.search(r"^User=(.*)$", text, re.MULTILINE)
            if "-o" in words:
                at = words.index("-o")
                runs_as = (user[1] if user else "root") if is_unit else words[0]
                inbox, outbox = Path(words[at - 1]), Path(words[at + 1])
                places.append(DeskPlaces(job=job, user=runs_as, inbox=inbox, outbox=outbox))
    return places


def enable(units: Sequence[str]) -> None:
    """Make systemd reload its units, and enable and start these."""
    for arguments in (["daemon-reload"], ["enable", "--now", *units]):
        said, words = bytearray(), ["systemctl", *arguments]
        command = Command(words=words, environment=os.environ, limit=_SYSTEMCTL_LIMIT, most_output=_MOST_SAID)
        ended = run(command, messages=said.extend)
        if ended.code is None:
            found = ended.error or ended.failure
            raise JobError(f"wanted `systemctl {arguments[0]}`, found: {found}", hint="`setup cron` needs no systemd")
        if ended.failure:
            found = " ".join(said.decode(errors="replace").split()) or f"exit code {ended.code}"
            raise JobError(
                f"wanted `systemctl {' '.join(arguments)}`, found: {found}",
                hint="the units that were written stay; where systemd does not run, `ca-bridge setup cron --enable`",
            )
