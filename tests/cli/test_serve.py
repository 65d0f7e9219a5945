"""`ca-bridge serve` without the packages that it needs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from bridge.cli import serve
from bridge.errors import Exit


def test_without_the_extra_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the missing packages and how to install them; with them the door begins."""
    real = importlib.util.find_spec
    serve.assert_installed("ca-bridge serve")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cheroot" else real(name))

    with pytest.raises(
        serve.MissingExtraError, match="needs cheroot, Jinja2, SQLAlchemy, alembic, found no cheroot"
    ) as e:
        serve.assert_installed("ca-bridge serve")
    assert e.value.exit_code == Exit.USAGE
    page = (Path(__file__).parents[2] / "docs/door.md").read_text(encoding="utf-8")
    assert all(line in page for line in re.findall("`(pip install [^`]+)`", e.value.hint))
    assert "kubeadm-ca-bridge[" not in page + e.value.hint  # the name is not registered: a stranger could have it
