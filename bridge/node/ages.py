"""Whether what runs has started after a file was changed: by the process table, else by the container runtime."""

from __future__ import annotations

import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from bridge.node import crictl, processes
from bridge.specs import Component
from bridge.system import safe_read
from bridge.system.safe_read import UnreadableError


class Age(NamedTuple):
    """A component's age, compared with a file's."""

    older: bool | None  #: The component is older than the file, or sees another one; None: it can't be told.
    detail: str


def compare(component: Component, path: Path, proc: Path = processes.PROC) -> Age:
    """
    Compare a running component with a file that it uses.

    By the file's ctime, which no copying of times sets back, and which a rename sets, too. A container that has a
    file mounted goes on seeing the old one after a rename, whatever the times say. Of several processes the oldest
    counts.

    Args:
        component: On this node.
        path: As the component knows it, and as it is here.
        proc: Where the process table is.

    Raises:
        UnreadableError, ValueError: There is no such file, or it can't be read.
    """
    data = contents(path)
    changed = max(_changed(path.lstat()), _changed(path.stat()))
    if changed > datetime.now(UTC):
        return Age(None, f"{path} was changed at {text(changed)}, which is in the future: was the clock set back?")
    found = processes.running(component.value, proc)
    ours = [process for process in found if any(str(path) in word for word in process.arguments)] or found
    started = ours[0].started if ours else _container_made(component)
    if started is None:
        return Age(None, f"wanted a process {component.value}, found none (root alone sees all), and crictl knows none")
    times = f"started at {text(started)}, {path} changed at {text(changed)}"
    if any(_sees_another(process, path, data) for process in ours):
        return Age(True, f"still sees what was in {path} before; {times}")
    return Age(started <= changed, times)


def contents(path: Path) -> bytes:
    """
    A file that has to be there.

    Raises:
        UnreadableError: It can't be read.
        ValueError: It is not there.
    """
    try:
        data = safe_read.read(path)
    except UnreadableError as e:
        raise UnreadableError(f"{path}: {e}") from e
    if data is None:
        raise ValueError(f"{path}: wanted a file, found none")
    return data


def text(moment: datetime) -> str:
    """A time as text, to the second, in UTC."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _changed(status: os.stat_result) -> datetime:
    return datetime.fromtimestamp(status.st_ctime, UTC)


def _sees_another(process: processes.Process, path: Path, data: bytes) -> bool:
    try:
        seen = safe_read.read(process.root / path.relative_to("/"))
    except UnreadableError:  # another user's process; the times remain
        return False
    return seen is not None and seen != data


def _container_made(component: Component) -> datetime | None:
    """When the runtime made the oldest running container of a component; None: it can't tell."""
    try:
        found = crictl.ask("ps", "--state", "running", "--name", f"^{component.value}$")
        nanoseconds = [int(container["createdAt"]) for container in found["containers"]]
    except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError):
        return None  # no crictl, no runtime, or another one's answer
    return datetime.fromtimestamp(min(nanoseconds) / 1e9, UTC) if nanoseconds else None
