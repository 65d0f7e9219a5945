"""What runs of a static pod: by the container runtime, or else by the process table."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from bridge import processes
from bridge.health import Kubelet
from bridge.specs import Component

#: How long a kubelet needs to forget a pod (measured on 1.37; too early back costs 10 to 25 s) after its sandbox has
#: ended, and after its process has: the sandbox ends later.
SANDBOX_SETTLES = timedelta(seconds=3)
PROCESS_SETTLES = timedelta(seconds=5)

_CRICTL_SECONDS = 10

Instances = Callable[[], frozenset[str]]


def instances(component: Component) -> tuple[Instances, timedelta]:
    """
    Who tells what runs of a component's static pod, and how long a kubelet takes to forget it after nothing does.

    crictl, where it is there and answers; it is pointed at the runtime that the kubelet's configuration names.
    """
    program = shutil.which("crictl")
    if program is not None:
        endpoint = Kubelet.load().runtime_endpoint
        command = [program, *(["--runtime-endpoint", endpoint] if endpoint else []), "pods", "--state", "ready"]
        try:
            return _Runtime(command, component), SANDBOX_SETTLES
        except (OSError, ValueError, subprocess.SubprocessError):
            pass  # the process table knows as well, if later
    return lambda: _in_process_table(component), PROCESS_SETTLES


# --- the container runtime -------------------------------------------------------------------------------------------


class _Runtime:
    """What crictl says; while it says nothing, what it said before."""

    def __init__(self, command: list[str], component: Component) -> None:
        """
        Raises:
            OSError, ValueError, SubprocessError: The runtime can't be asked.
        """
        self._command, self._component = command, component
        self._last = _sandboxes(command, component)

    def __call__(self) -> frozenset[str]:
        with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
            self._last = _sandboxes(self._command, self._component)
        return self._last


def _sandboxes(command: list[str], component: Component) -> frozenset[str]:
    """
    The running pods that a kubelet made of a manifest file, and that are the component's by their name.

    Raises:
        OSError, ValueError, SubprocessError: The runtime can't be asked.
    """
    run = subprocess.run(
        [*command, "-o", "json"],
        capture_output=True,
        check=True,
        timeout=_CRICTL_SECONDS,
        stdin=subprocess.DEVNULL,
    )
    found: Any = json.loads(run.stdout)
    if not isinstance(found, dict):
        raise ValueError("something else")  # noqa: TRY004 (of a program, not of a caller)
    try:
        return frozenset(f"pod {one['id'][:13]}" for one in found.get("items") or () if _is_of(one, component))
    except (LookupError, AttributeError, TypeError) as e:
        raise ValueError("something else") from e


def _is_of(pod: Any, component: Component) -> bool:
    """A static pod is called after the name in its manifest, and its node; kubeadm's have a label as well."""
    return bool(
        pod["metadata"]["name"].startswith(f"{component.value}-")
        and pod.get("labels", {}).get("component", component.value) == component.value
        and pod.get("annotations", {}).get("kubernetes.io/config.source") == "file"
    )


# --- the process table -----------------------------------------------------------------------------------------------


def _in_process_table(component: Component) -> frozenset[str]:
    return frozenset(f"process {one.pid}" for one in processes.running(component.value))
