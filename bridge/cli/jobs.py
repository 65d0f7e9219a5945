"""`setup systemd` and `setup cron`: units and crontabs with the paths that are true on this machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bridge.ca import registry
from bridge.errors import SettingsError, SettingsProblem
from bridge.node.kubelet import KubeletFiles
from bridge.settings.tables import NodeSettings, Settings
from bridge.system import jobs
from bridge.system.jobs import Job, Places

Kind = Literal["systemd", "cron"]
KINDS: tuple[Kind, ...] = ("systemd", "cron")

#: The shipped files, by what they are for; where the paths are that a desk's files have.
_NODE = {
    "systemd": ("systemd/ca-bridge.service", "systemd/ca-bridge.timer", "systemd/ca-bridge-recover.service"),
    "cron": ("cron/ca-bridge",),
}
_DESK = {
    "systemd": ("desk/ca-bridge-desk.service", "desk/ca-bridge-desk.timer"),
    "cron": ("desk/crontab",),
}
_DESK_INBOX, _DESK_OUTBOX = "/srv/desk/inbox", "/srv/desk/outbox"
_DESK_CRONTAB = "ca-bridge-desk"
#: As systemd takes it (systemd.exec(5), User=; https://systemd.io/USER_NAMES), at its widest: what ends a word or a line
#: would be more than a name in a unit or a crontab.
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]*\$?")


@dataclass(frozen=True, kw_only=True)
class DeskJob:
    """A CA desk's job."""

    inbox: Path
    outbox: Path
    user: str  #: Whose the CA is.


def desk_of(inbox: Path | None, outbox: Path | None, user: str) -> DeskJob | None:
    """
    A desk, if its directories are named.

    Raises:
        SettingsError: One of them is, or the user is none.
    """
    if inbox is None and outbox is None:
        return None
    if inbox is None or outbox is None:
        missing, given = ("--inbox", "--outbox") if inbox is None else ("--outbox", "--inbox")
        raise SettingsError([SettingsProblem(missing, f"a directory, since {given} is given", "nothing")])
    if not _USER.fullmatch(user):
        raise SettingsError([SettingsProblem("--user", "a user's name", repr(user))])
    return DeskJob(inbox=inbox, outbox=outbox, user=user)


def make(settings: Settings, options: Sequence[str], kind: Kind, desk: DeskJob | None, shipped: Path) -> list[Job]:
    """
    The files of a node's job, or of a desk's.

    Args:
        settings: Where the files are that the job works on.
        options: By which the job's commands find the same settings.
        kind: For systemd or cron.
        desk: None: a node's.
        shipped: The directory of the files that are installed with the program.

    Raises:
        SettingsError: A directory is not absolute, or the backends' tables can't be read.
        BridgeError: The shipped files or the program are not there, or a path can't be named in such a file.
    """
    places = _places(settings, options, desk)
    make_one = jobs.unit if kind == "systemd" else jobs.crontab
    names = (_DESK if desk else _NODE)[kind]
    return [make_one(_installed_name(name), (shipped / name).read_text(encoding="utf-8"), places) for name in names]


def to_enable(made: Sequence[Job]) -> list[str]:
    """The units that are to be enabled: those that something wants at boot."""
    return [job.path.name for job in made if re.search(r"^WantedBy=", job.text, re.MULTILINE)]


def _installed_name(name: str) -> str:
    """A file in /etc/cron.d is read only if it has no dot in its name (cron(8))."""
    return _DESK_CRONTAB if name == "desk/crontab" else Path(name).name


def _places(settings: Settings, options: Sequence[str], desk: DeskJob | None) -> Places:
    node, usual = settings.node, NodeSettings()
    paths = {str(usual.kubeconfig_dir): str(node.kubeconfig_dir), str(usual.state_dir): str(node.state_dir)}
    writable, maybe = [node.kubeconfig_dir, node.pki_dir], _kubelets(node)
    if desk is not None:
        _assert_absolute(inbox=desk.inbox, outbox=desk.outbox)
        paths |= {_DESK_INBOX: str(desk.inbox), _DESK_OUTBOX: str(desk.outbox)}
        writable, maybe = [desk.inbox, desk.outbox], []
    writable.append(node.state_dir)
    maybe += [path.parent for path in settings.copies.files.paths]
    maybe += [settings.metrics.file.parent] if settings.metrics.file is not None else []
    for configured in registry.configured(settings, settings.authorities).values():
        writable += configured.settings.writes()
    return Places(
        program=jobs.this_program(desk.user if desk else "root"),
        options=options,
        paths=paths,
        user=desk.user if desk else "root",
        writable=_outermost(writable),
        maybe_writable=maybe,
    )


def _kubelets(node: NodeSettings) -> list[Path]:
    """Where the kubelet's certificates are, by its own configuration."""
    found = KubeletFiles.load(node.kubelet_dir)
    return _outermost([found.directory, found.certificate.parent, found.key.parent])


def _outermost(paths: Sequence[Path]) -> list[Path]:
    """The paths without those that lie in another one."""
    return [
        path
        for path in dict.fromkeys(paths)
        if not any(path != other and path.is_relative_to(other) for other in paths)
    ]


def _assert_absolute(**directories: Path) -> None:
    problems = [
        SettingsProblem(f"--{name}", "an absolute path", repr(str(path)))
        for name, path in directories.items()
        if not path.is_absolute()
    ]
    if problems:
        raise SettingsError(problems)
