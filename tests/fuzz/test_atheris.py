"""Inputs guided by coverage; collected only where atheris is installed (see `conftest.py`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.counts import Tried
from tests.fuzz.targets import targets

#: Of each target; `python -m tests.fuzz` does as many as you have time for.
RUNS = 3000


@pytest.mark.parametrize("name", targets())
def test_atheris_finds_nothing(name: str, tmp_path: Path, tried: Tried) -> None:
    """Atheris changes good inputs to reach more code, and finds no other exception, no hang and no growing memory."""
    options = [f"-runs={RUNS}", "-rss_limit_mb=600", "-timeout=180", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", name, *options],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tried("inputs guided by coverage", RUNS)
