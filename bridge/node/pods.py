"""The running instances of a static pod: by the container runtime, or else by the process table."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from bridge.node import crictl, processes
from bridge.specs import Component

#: How long a kubelet needs to forget a pod (measured on 1.37; too early back costs 10 to 25 s) after its sandbox has
#: ended, and after its process has: the sandbox ends later.
SANDBOX_SETTLES = timedelta(seconds=3)
PROCESS_SETTLES = timedelta(seconds=5)

Instances = Callable[[], frozenset[str]]


def instances(component: Component) -> tuple[Instances, timedelta]:
    """
    Who tells what runs of a component's static pod, and how long a kubelet takes to forget it after nothing does.

    crictl, where it is there and answers.
    """
    try:
        return _Runtime(component), SANDBOX_SETTLES
    except (OSError, ValueError, subprocess.SubprocessError):  # the process table knows as well, if later
        pass
    return lambda: _in_process_table(component), PROCESS_SETTLES


# --- the container runtime -------------------------------------------------------------------------------------------


class _Runtime:
    """Instances as crictl lists them; while it fails, as it last did. Where kubeadm's pod is, none that is called alike."""

    def __init__(self, component: Component) -> None:
        """
        Raises:
            OSError, ValueError, SubprocessError: The runtime can't be asked.
        """
        self._component = component
        self._last = _sandboxes(component)
        self._is_labelled = any(self._last.values())

    def __call__(self) -> frozenset[str]:
        with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
            self._last = _sandboxes(self._component)
        return frozenset(pod for pod, labelled in self._last.items() if labelled or not self._is_labelled)


def _sandboxes(component: Component) -> dict[str, bool]:
    """
    The running pods that a kubelet made of a manifest file, and that may be the component's by their name.

    Returns:
        Of each whether it has kubeadm's label.

    Raises:
        OSError, ValueError, SubprocessError: The runtime can't be asked.
    """
    found = crictl.ask("pods", "--state", "ready")
    try:
        ours = [one for one in found.get("items") or () if _may_be_of(one, component)]
        return {f"pod {one['id'][:13]}": _label(one) is not None for one in ours}
    except (LookupError, AttributeError, TypeError) as e:
        raise ValueError("something else") from e


def _may_be_of(pod: Any, component: Component) -> bool:
    """A static pod is called after the name in its manifest, and its node."""
    return bool(
        pod["metadata"]["name"].startswith(f"{component.value}-")
        and _label(pod) in (None, component.value)
        and pod.get("annotations", {}).get("kubernetes.io/config.source") == "file"
    )


def _label(pod: Any) -> Any:
    """The value of a label, which kubeadm's pods have: by it they are told from an operator's `etcd-defrag`."""
    return pod.get("labels", {}).get("component")


# --- the process table -----------------------------------------------------------------------------------------------


def _in_process_table(component: Component) -> frozenset[str]:
    return frozenset(f"process {one.pid}" for one in processes.running(component.value))
