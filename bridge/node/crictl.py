"""The container runtime's own word on what runs, by crictl where it is there and answers."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

from bridge.node.kubelet import Kubelet

_SECONDS = 10


def ask(*arguments: str) -> dict[str, Any]:
    """
    Ask the runtime that the kubelet's configuration names, or that crictl finds by itself.

    Args:
        arguments: A command of crictl's that prints JSON with `--output json`.

    Raises:
        OSError, ValueError, SubprocessError: No crictl, no runtime, or another one's answer.
    """
    program = shutil.which("crictl")
    if program is None:
        raise FileNotFoundError("no crictl")
    endpoint = Kubelet.load().runtime_endpoint
    command = [program, *(["--runtime-endpoint", endpoint] if endpoint else []), *arguments, "--output", "json"]
    run = subprocess.run(command, capture_output=True, check=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)
    found = json.loads(run.stdout)
    if not isinstance(found, dict):
        raise ValueError("something else")  # noqa: TRY004 (of a program, not of a caller)
    return found
