"""What `prove` prints of what was found; `restart` is in the tests of the control plane, where something runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bridge.cli import components
from bridge.cli.options import Output
from bridge.control_plane import proof
from bridge.control_plane.probes import ProofState
from bridge.specs import Component
from tests.kit.cas import Bridge
from tests.kit.pki import handmade_pki


def finding(state: ProofState, component: Component | None = Component.ETCD) -> proof.ProofFinding:
    """One of a server whose words would steer a terminal."""
    return proof.ProofFinding(component=component, certificate="a", what="b", state=state, detail="c\x1b[31m")


def test_a_report_for_people_and_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    """A server's words don't steer the terminal."""
    report = proof.ProofReport(findings=(finding("stale"), finding("current", None)))

    components.print_proof(report, Output.TEXT)
    table = capsys.readouterr().out
    components.print_proof(report, Output.JSON)
    reported = json.loads(capsys.readouterr().out)

    assert [line.split() for line in table.splitlines()] == [
        ["error", "etcd", "a"],
        ["stale:", "a,", "b:", "c\N{REPLACEMENT CHARACTER}[31m"],
        ["ok", "people", "a"],
        ["1", "of", "2", "checks", "failed"],
    ]
    assert "\x1b" not in table
    assert (reported["schemaVersion"], reported["exitCode"], reported["stale"]) == (1, 7, ["etcd"])
    assert reported["findings"][1] == {
        "component": None,
        "certificate": "a",
        "what": "b",
        "state": "current",
        "detail": "c\x1b[31m",
    }


@pytest.mark.first_use("10")
def test_a_report_says_that_all_is_well(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a last line, below a line for each component; every check has a row with -v."""
    report = proof.ProofReport(findings=(finding("current"), finding("current"), finding("not-ours", None)))
    components.print_proof(report, Output.TEXT)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["ok", "ok", "all"]
    monkeypatch.setattr(components, "is_verbose", lambda: True)
    components.print_proof(report, Output.TEXT)
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == ["COMPONENT", "etcd", "etcd", "people", "all"]
    assert shown[-1] == "all is well: 3 checks hold"


def test_restart_claims_no_more_than_it_can_see(tmp_path: Path) -> None:
    """Without static pods, or with a component that does not answer, the exit code is 1 or 7, and never "every component"."""
    bridge = Bridge(pki=handmade_pki(tmp_path / "node"), directory=tmp_path / "bridge")
    run = bridge.run("restart")
    assert (run.returncode, run.stdout) == (1, "")
    assert "there are no static-pod manifests" in run.stderr
    manifests = bridge.pki.kubeconfig_dir / "manifests"
    manifests.mkdir()
    flags = ["--bind-address=127.0.0.1", "--secure-port=1", f"--kubeconfig={bridge.pki.kubeconfig_dir}/scheduler.conf"]
    container = {"name": "kube-scheduler", "image": "x/kube-scheduler:v1.37.2", "command": ["kube-scheduler", *flags]}
    (manifests / "kube-scheduler.yaml").write_text(json.dumps({"spec": {"containers": [container]}}))
    reported = json.loads(bridge.run("restart", "-o", "json").stdout)
    assert reported["exitCode"] in (1, 7)
    assert "kube-scheduler" in reported["unknown"]
    assert "every component" not in bridge.run("restart").stdout
