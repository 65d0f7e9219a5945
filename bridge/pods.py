"""What is left of a static pod whose manifest is away: by the container runtime, or else by the process table."""

from __future__ import annotations

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

Remains = Callable[[], str | None]


def remains(component: Component) -> tuple[Remains, timedelta]:
    """
    Who tells what is left of a component's static pod, and how long to wait after that.

    crictl, where it is there and answers; it is pointed at the runtime that the kubelet's configuration names.
    """
    program = shutil.which("crictl")
    if program is not None:
        endpoint = Kubelet.load().runtime_endpoint
        command = [program, *(["--runtime-endpoint", endpoint] if endpoint else []), "pods", "--state", "ready"]
        try:
            _sandboxes(command, component)
        except (OSError, ValueError, subprocess.SubprocessError):
            pass  # the process table knows as well, if later
        else:
            return lambda: _left_in_runtime(command, component), SANDBOX_SETTLES
    return lambda: _left_in_process_table(component), PROCESS_SETTLES


# --- the container runtime -------------------------------------------------------------------------------------------


def _left_in_runtime(command: list[str], component: Component) -> str | None:
    try:
        ready = _sandboxes(command, component)
    except (OSError, ValueError, subprocess.SubprocessError) as e:
        return f"no answer from crictl ({type(e).__name__})"
    return f"a running pod {ready[0]}" if ready else None


def _sandboxes(command: list[str], component: Component) -> list[str]:
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
        return [one["metadata"]["name"] for one in found.get("items") or () if _is_of(one, component)]
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


def _left_in_process_table(component: Component) -> str | None:
    found = processes.running(component.value)
    return f"process {found[0].pid}" if found else None
