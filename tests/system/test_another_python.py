"""Another Python finds what this one found, and nothing that its surroundings suggest."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from bridge.system import another_python


def test_finds_what_this_one_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of a directory that only this process was told of, as a release's tree is; arguments arrive."""
    (tmp_path / "only_here.py").write_text("import sys; print(sys.argv[1:])")
    command = another_python.command("import only_here", "a", "b c")
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0
    monkeypatch.syspath_prepend(tmp_path)
    command = another_python.command("import only_here", "a", "b c")
    assert subprocess.check_output(command, text=True) == "['a', 'b c']\n"


def test_its_surroundings_have_no_say(tmp_path: Path) -> None:
    """Neither $PYTHONPATH nor the working directory."""
    (tmp_path / "json.py").write_text("print('theirs')")
    done = subprocess.run(
        another_python.command("import json; print(json.loads('1'))"),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "1\n"
