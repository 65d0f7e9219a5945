"""What would fail after a CA has signed is found before it is asked."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import pytest

from bridge.errors import Exit
from bridge.node import inventory
from bridge.renewal import NotReadyError, prepare, renew
from bridge.renewal.selection import RunOptions
from bridge.renewal.verify_and_install import Result
from bridge.settings.tables import RestartSettings, Settings
from tests.kit.pki import Pki, handmade_pki
from tests.kit.renewing import Quiet, settings_for

Method = Literal["none", "static-pods", "command"]


@pytest.fixture
def node(tmp_path: Path) -> Pki:
    """All its certificates are due."""
    return handmade_pki(tmp_path / "node", not_after=datetime.now(UTC) + timedelta(days=20))


def restarting(settings: Settings, method: Method, *commands: str) -> Settings:
    """The same with another `[restart]`, and these commands."""
    restart = RestartSettings(method=method, commands=dict.fromkeys(commands, "true"), prove_for=timedelta(seconds=1))
    return replace(settings, restart=restart)


def renewed(settings: Settings, *names: str, restarts: bool = True) -> Result:
    return renew.run(settings, RunOptions(names=names, restarts=restarts), lambda: datetime.now(UTC), Quiet())[0]


def without_restart(settings: Settings, *names: str) -> list[str]:
    node = inventory.read(settings.node.pki_dir, settings.node.kubeconfig_dir)
    items = [item for item in node.items if item.spec.name in names]
    return [outcome.name for outcome in renew.without_restart(node, settings, items, datetime.now(UTC))]


def signed(tmp_path: Path) -> int:
    """How many certificates the CAs have given."""
    return sum(len(path.read_text().splitlines()) for path in (tmp_path / "cas").glob("*/index.txt"))


def contents(node: Pki) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in node.kubeconfig_dir.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("limit", "what"), [("BYTES_NEEDED", "KiB"), ("INODES_NEEDED", "inodes")])
def test_no_signature_is_spent_where_there_is_no_room(
    node: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, what: str
) -> None:
    """Nothing was asked or replaced, and that counts as no CA's failure; with room the same run succeeds."""
    settings, old = settings_for(node, tmp_path), contents(node)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, limit, 1 << 70)
        for _ in range(3):
            with pytest.raises(NotReadyError, match=what):
                renewed(settings)
    assert (contents(node), signed(tmp_path)) == (old, 0)
    assert not (tmp_path / "state/attempts.json").exists()
    assert renewed(settings, "apiserver").exit_code == 0
    assert signed(tmp_path) == 1


def test_a_kubelet_without_a_command_is_found_before_its_certificate_is_asked_for(
    node: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only its own is not renewed; with --no-restart it is, and with a command it may be."""
    monkeypatch.setattr("bridge.control_plane.restarts._systemctl", list)  # no systemd, wherever this runs
    settings = settings_for(node, tmp_path)
    without = restarting(settings, "static-pods")
    result = renewed(without, "kubelet.conf", "admin.conf")
    assert ([o.name for o in result.renewed], [o.name for o in result.failed]) == (["admin.conf"], ["kubelet.conf"])
    assert isinstance(result.failed[0].error, NotReadyError)
    assert (result.exit_code, signed(tmp_path)) == (Exit.USAGE, 1)
    assert "restart.commands" in str(result.failed[0].error)
    assert not (tmp_path / "state/attempts.json").exists()
    assert renewed(without, "kubelet.conf", restarts=False).exit_code == 0
    assert without_restart(restarting(settings, "static-pods", "kubelet"), "kubelet.conf") == []


@pytest.mark.first_use("28")
def test_an_expired_certificate_is_installed_though_nothing_can_restart_its_component(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kubelet without its client certificate needs the new one at its next start; the run says that it is not in use."""
    monkeypatch.setattr("bridge.control_plane.restarts._systemctl", list)
    now = datetime.now(UTC)
    expired = handmade_pki(tmp_path / "expired", now=now - timedelta(days=400), not_after=now - timedelta(days=1))
    without = restarting(settings_for(expired, tmp_path), "static-pods")
    before = (expired.kubeconfig_dir / "kubelet.conf").read_bytes()
    result = renewed(without, "kubelet.conf")
    assert ([o.name for o in result.renewed], [o.name for o in result.failed]) == (["kubelet.conf"], [])
    assert (expired.kubeconfig_dir / "kubelet.conf").read_bytes() != before
    assert result.exit_code == Exit.NOT_LIVE
    assert any("restart.commands" in str(error) for error in result.errors)


def test_a_component_that_is_no_static_pod_needs_a_command(node: Pki, tmp_path: Path) -> None:
    """With method "command" each component that would be restarted needs one."""
    settings = settings_for(node, tmp_path)
    names = ["scheduler.conf", "controller-manager.conf", "admin.conf"]
    scheduler, both = ["kube-scheduler"], ["kube-scheduler", "kube-controller-manager"]
    assert without_restart(restarting(settings, "command", *scheduler), *names) == ["controller-manager.conf"]
    assert without_restart(restarting(settings, "command", *both), *names) == []
    assert without_restart(restarting(settings, "static-pods"), "scheduler.conf") == ["scheduler.conf"]
    assert without_restart(restarting(settings, "none"), *names) == []
