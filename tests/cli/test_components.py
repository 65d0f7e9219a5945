"""What `prove` prints of what was found; `restart` is in the tests of the control plane, where something runs."""

from __future__ import annotations

import json

import pytest

from bridge.cli import components
from bridge.control_plane import proof
from bridge.control_plane.probes import State
from bridge.specs import Component


def finding(state: State, component: Component | None = Component.ETCD) -> proof.Finding:
    """One of a server whose words would steer a terminal."""
    return proof.Finding(component=component, certificate="a", what="b", state=state, detail="c\x1b[31m")


def test_a_report_for_people_and_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    """A server's words don't steer the terminal."""
    report = proof.Report(findings=(finding("stale"), finding("current", None)))

    components.print_proof(report, as_json=False)
    table = capsys.readouterr().out
    components.print_proof(report, as_json=True)
    told = json.loads(capsys.readouterr().out)

    assert [line.split()[0] for line in table.splitlines()] == ["COMPONENT", "etcd", "people"]
    assert "\x1b" not in table
    assert (told["schemaVersion"], told["exitCode"], told["stale"]) == (1, 7, ["etcd"])
    assert told["findings"][1] == {
        "component": None,
        "certificate": "a",
        "what": "b",
        "state": "current",
        "detail": "c\x1b[31m",
    }
