"""Superseded certificates are revoked: when their successors are proven, after the delay, and never before."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from backends.openssl import OpensslBackend
from bridge.control_plane import proof
from bridge.control_plane.probes import ProofState
from bridge.control_plane.proof import ProofFinding, ProofReport
from bridge.entry import nothing_to_do
from bridge.errors import BackendRefusedError, BackendUnavailableError, BridgeError, Exit
from bridge.node import inventory
from bridge.renewal import renew, verify_and_install
from bridge.renewal.selection import RunOptions
from bridge.renewal.transaction import put_back_and_retire
from bridge.renewal.verify_and_install import Result
from bridge.settings.load import load
from bridge.settings.tables import Settings
from bridge.specs import SPECS
from bridge.state import Store, audit, remember_checked
from bridge.state.install import InstallError
from bridge.state.obligations import revocations_file
from tests.kit.pki import Pki, handmade_pki
from tests.kit.renewing import Quiet, settings_for

DAY = timedelta(days=1)


@pytest.fixture
def node(tmp_path: Path) -> Pki:
    """Nothing of it is due."""
    return handmade_pki(tmp_path / "node")


@pytest.fixture(autouse=True)
def in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no cluster; every certificate is seen in use."""
    findings = tuple(
        ProofFinding(component=spec.component, certificate=name, what="serves", state="current", detail="")
        for name, spec in SPECS.items()
    )
    monkeypatch.setattr(proof, "look", lambda *_: ProofReport(findings=findings))


@pytest.fixture
def settings(node: Pki, tmp_path: Path) -> Settings:
    """Revoked after a day."""
    return settings_for(node, tmp_path, '[renewal]\nrevoke = "superseded"\nrevoke_after = "1d"')


def run(settings: Settings, *names: str, later: timedelta = timedelta(), quiet: Quiet | None = None) -> Result:
    """One run, so much later."""
    return renew.run(settings, RunOptions(names=names), lambda: datetime.now(UTC) + later, quiet or Quiet())[0]


def revoked(tmp_path: Path) -> set[str]:
    """Serial numbers in the CAs' databases, in hexadecimal."""
    lines = [line for path in (tmp_path / "cas").glob("*/index.txt") for line in path.read_text().splitlines()]
    return {line.split("\t")[3].lower().lstrip("0") for line in lines if line.startswith("R")}


def serial(node: Pki, name: str) -> str:
    [item] = [i for i in inventory.read(node.pki_dir, node.kubeconfig_dir).items if i.spec.name == name]
    return f"{item.certificates[0].serial_number:x}"


def due(settings: Settings) -> list[str]:
    return [one.name for one in revocations_file(Store(settings.node.state_dir)).read() or ()]


def test_what_was_superseded_is_revoked_after_the_delay(node: Pki, settings: Settings, tmp_path: Path) -> None:
    """A run that has nothing else to do revokes it; the audit log says so, and the one in use is left alone."""
    old = {serial(node, name) for name in ("apiserver", "etcd-peer")}
    assert run(settings, "apiserver", "etcd-peer").exit_code == 0
    new = {serial(node, name) for name in ("apiserver", "etcd-peer")}
    assert (run(settings).exit_code, revoked(tmp_path), due(settings)) == (0, set(), ["apiserver", "etcd-peer"])
    assert run(settings, later=2 * DAY).exit_code == 0
    assert (revoked(tmp_path), due(settings)) == (old, [])
    assert not new & old
    events = list(audit.events(Store(settings.node.state_dir), None, "apiserver"))
    assert (events[-1]["event"], events[-1]["exitCode"]) == (audit.REVOKED, 0)
    assert str(events[-1]["previousSerialNumber"]).replace(":", "").lower().lstrip("0") in old


def test_by_default_nothing_is_revoked(settings: Settings, tmp_path: Path) -> None:
    """By default no certificate is revoked; once the settings say "never", open revocations are dropped, too."""
    never = replace(settings, renewal=replace(settings.renewal, revoke="never"))
    run(never, "apiserver")
    assert due(settings) == []
    run(settings, "apiserver")
    assert due(settings) == ["apiserver"]
    quiet = Quiet()
    assert run(never, later=2 * DAY, quiet=quiet).exit_code == 0
    assert (due(settings), revoked(tmp_path)) == ([], set())
    assert "not revoked: apiserver" in "; ".join(quiet.notes)


def test_what_is_in_use_again_is_not_revoked(node: Pki, settings: Settings, tmp_path: Path) -> None:
    """The operator has gone back."""
    old = serial(node, "apiserver")
    run(settings, "apiserver")
    put_back_and_retire(settings, None, lambda: datetime.now(UTC), Quiet(), force=False, wait=timedelta())
    assert serial(node, "apiserver") == old
    assert run(settings, later=2 * DAY).exit_code == 0
    assert (due(settings), revoked(tmp_path)) == ([], set())


def test_what_was_never_installed_supersedes_nothing(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The installation failed after it was remembered."""

    def fails(*_: object) -> str:
        raise InstallError("nothing was replaced")

    with monkeypatch.context() as patch:
        patch.setattr(verify_and_install, "install", fails)
        with pytest.raises(InstallError):
            run(settings, "apiserver")
    run(settings, later=2 * DAY)
    assert (due(settings), revoked(tmp_path)) == ([], set())


def test_nothing_is_revoked_where_nothing_is_seen(
    node: Pki, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a check of the new certificate the old one may be in use, and stays valid; with one it is revoked."""
    old, quiet = serial(node, "apiserver"), Quiet()
    run(settings, "apiserver")
    with monkeypatch.context() as patch:
        patch.setattr(proof, "look", lambda *_: ProofReport(findings=()))
        assert run(settings, later=2 * DAY, quiet=quiet).exit_code == 0
    assert (due(settings), revoked(tmp_path)) == (["apiserver"], set())
    assert "not revoked, since the successor is not seen in use: apiserver" in "; ".join(quiet.notes)
    run(settings, later=2 * DAY)
    assert (due(settings), revoked(tmp_path)) == ([], {old})


@pytest.mark.parametrize("state", ["stale", "refused", "no-answer", "unknown"])
def test_nothing_is_revoked_before_the_new_one_is_proven(
    node: Pki, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: ProofState
) -> None:
    """A component may still run on it; when all is well it is revoked."""
    old = serial(node, "apiserver")
    run(settings, "apiserver")
    wrong = ProofFinding(
        component=SPECS["apiserver"].component, certificate="apiserver", what="x", state=state, detail="y"
    )
    with monkeypatch.context() as patch:
        patch.setattr(proof, "look", lambda *_: ProofReport(findings=(wrong,)))
        assert run(settings, later=2 * DAY).exit_code == 0
    assert (due(settings), revoked(tmp_path)) == (["apiserver"], set())
    run(settings, later=2 * DAY)
    assert (due(settings), revoked(tmp_path)) == ([], {old})


@pytest.mark.parametrize(
    ("error", "left"), [(BackendUnavailableError("no answer"), ["apiserver"]), (BackendRefusedError("no such"), [])]
)
def test_a_ca_that_does_not_revoke_is_reported(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, error: BridgeError, left: list[str]
) -> None:
    """An unavailable CA is asked again, and a refusal is reported once. Neither counts as a failed renewal."""
    run(settings, "apiserver")

    def revoke(*_: object) -> None:
        raise error

    for table in settings.backends.values():
        table["retry_for"] = "1s"  # type: ignore[index]
    monkeypatch.setattr(OpensslBackend, "revoke", revoke)
    result = run(settings, later=2 * DAY)
    assert (result.exit_code, due(settings)) == (error.exit_code, left)
    assert "not revoked: apiserver, serial" in str(result.errors[0])
    assert not Store(settings.node.state_dir).attempts.exists()


def test_a_ca_that_cannot_revoke_is_reported_before(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A revocation that the backend can't make is not recorded as open; the renewal goes on."""
    monkeypatch.delattr(OpensslBackend, "revoke")
    quiet = Quiet()
    assert run(settings, "apiserver", quiet=quiet).exit_code == 0
    assert due(settings) == []
    assert "can't revoke" in "; ".join(quiet.notes)


def test_a_run_with_revocations_due_is_not_over_at_once(node: Pki, settings: Settings, tmp_path: Path) -> None:
    """Open revocations are handled though no certificate is due."""
    config = tmp_path / "config.toml"
    config.write_text(
        f'[node]\npki_dir = "{node.pki_dir}"\nkubeconfig_dir = "{node.kubeconfig_dir}"\nstate_dir = "{tmp_path}/state"\n'
    )
    arguments = ["renew", "--config", str(config)]
    store = Store(tmp_path / "state")
    store.prepare()
    remember_checked(load(config), store)
    assert nothing_to_do(arguments) is not None
    run(settings, "apiserver")
    assert nothing_to_do(arguments) is None


def test_a_damaged_file_is_kept_and_reported(settings: Settings) -> None:
    """The error comes once, and says what to do."""
    run(settings, "apiserver")
    store = Store(settings.node.state_dir)
    store.revocations.write_text("{")
    result = run(settings, later=2 * DAY)
    assert result.exit_code == Exit.FAILED
    assert "serial numbers" in result.errors[0].hint
    assert run(settings, later=2 * DAY).exit_code == 0
