"""What a metrics file says, and `promtool`, which says whether Prometheus would take it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.kit import programs

_SAMPLE = re.compile(r'(?P<name>\w+)(?:\{(?P<labels>(?:\w+="(?:[^"\\\n]|\\["\\n])*",?)*)\})? (?P<value>[-+.\de]+)')


def samples(text: str) -> dict[str, dict[str, float]]:
    """
    The values, by metric and then by labels as they stand there.

    Raises:
        AssertionError: A line is neither a sample nor a comment.
    """
    found: dict[str, dict[str, float]] = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        match = _SAMPLE.fullmatch(line)
        assert match is not None, line
        found.setdefault(match["name"], {})[match["labels"] or ""] = float(match["value"])
    return found


def value(file: Path, name: str) -> float | None:
    """The value of a metric without labels; None: it is not there."""
    return samples(file.read_text()).get(name, {}).get("")


def check(text: str) -> None:
    """
    Have `promtool` read it, as Prometheus does.

    Raises:
        AssertionError: It finds an error. What it calls a matter of style (exit code 3) is none.
    """
    command = [str(programs.require("promtool")), "check", "metrics"]
    run = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert run.returncode in (0, 3), run.stderr
    assert "error while linting" not in run.stderr, run.stderr
