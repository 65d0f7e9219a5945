"""docs/doctor.md names the checks that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import bridge.diagnosis
from bridge.diagnosis import LEVELS

DOCUMENT = Path(__file__).parents[2] / "docs/doctor.md"
#: Of lines that say what is in order, or what was not looked at.
_ALWAYS_OK = {"ca", "certificate", "manifests", "kubeadm-config", "admin-copy", "by-hand", "upgrade"}
_MAKERS = {f"Finding.{level}" for level in LEVELS}
_STATES = {f"certificate-{state}" for state in ("missing", "broken", "unreadable")}


def checks_in(source: str) -> set[str]:
    """The names that findings are given."""
    places = {"from_error": 0, "Finding": 1, "_program": 0, "_missing_names": -1} | dict.fromkeys(_MAKERS, 0)
    names: list[ast.expr] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in places and node.args:
            names.append(node.args[places[ast.unparse(node.func)]])
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "check":
            names.append(node.value)
    values = [
        value for name in names for value in ([name.body, name.orelse] if isinstance(name, ast.IfExp) else [name])
    ]
    return {str(value.value) for value in values if isinstance(value, ast.Constant)}


def test_the_document_has_each_check_and_no_other() -> None:
    """Programs match by these names, so that one that comes or goes is a change for users."""
    directory = Path(bridge.diagnosis.__file__ or "").parent
    there = set().union(*(checks_in(path.read_text()) for path in directory.glob("*.py"))) | _STATES
    rows = [line.split("|")[1] for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    reported = set(re.findall(r"`([a-z-]+)`", " ".join(rows)))
    assert reported | {"desk-policy"} == there - _ALWAYS_OK


def test_the_comparison_can_fail() -> None:
    """A name in the code is seen in both ways in which a finding is made."""
    source = "Finding(level, 'a', 'x', t)\nfrom_error('b', 'x', e)\n_missing_names(n, 'c', h, w, 'd')\nFinding.note('e', 'x', t)"
    assert checks_in(source) == {"a", "b", "d", "e"}
