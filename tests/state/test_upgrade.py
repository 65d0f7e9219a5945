"""An installation of an earlier version goes on after the update, whatever it was in the middle of."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from typer.testing import CliRunner, Result

from bridge.cli.app import app
from bridge.control_plane import probes
from bridge.pki.certificates import load_pem_certificates, pem
from bridge.renewal.transaction import state_files
from bridge.state import Store, backups
from bridge.state.open_requests import OpenRequests
from bridge.system.state_file import StateFile
from tests.kit import approval
from tests.kit.cas import live_certificates
from tests.kit.issuing import Signer
from tests.kit.pairs import assert_pairs
from tests.kit.pki import Pki

#: What version 7673d04 left; `upgrade/make.py` tells what that is.
ARCHIVE = Path(__file__).parent / "upgrade/node.tar.gz"

PENDING, NOT_PROVEN, CUT_OFF = "front-proxy-client", "scheduler.conf", "admin.conf"

Run = Callable[..., Result]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The node, and the third party's plug-in that it uses."""
    subprocess.run(["tar", "-xzf", ARCHIVE, "-C", tmp_path, "--no-same-owner"], check=True)
    for path in tmp_path.rglob("*"):
        if path.is_file() and b"@ROOT@" in (data := path.read_bytes()):
            path.write_bytes(data.replace(b"@ROOT@", str(tmp_path).encode()))
    config = tmp_path / "config.toml"
    text = config.read_text().replace("[restart]", '[restart]\nmin_interval = "1s"')
    config.write_text(text.replace("[restart.commands]", '[restart.commands]\nkube-apiserver = "true"'))
    for directory in ("state", "state/backups"):
        (tmp_path / directory).chmod(0o700)
    approval.install_plugin(tmp_path / "site")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    monkeypatch.setattr(probes, "trouble", lambda *_: None)  # there is no cluster
    (tmp_path / "well").touch()
    return tmp_path


@pytest.fixture
def node(root: Path) -> Pki:
    return Pki(root=root / "node", external=True)


@pytest.fixture
def run(root: Path) -> Run:
    def run(*words: str) -> Result:
        return CliRunner().invoke(app, [*words, "--config", str(root / "config.toml")])

    return run


def answer(root: Path, node: Pki) -> None:
    """The person's, to what an earlier version has asked."""
    request = OpenRequests(Store(root / "state")).by_name()[PENDING]
    certificate, key = node.ca_pem("front-proxy-ca")
    private_key = load_pem_private_key(key, None)
    assert isinstance(private_key, EllipticCurvePrivateKey)
    signer = Signer(certificate=load_pem_certificates(certificate)[0], key=private_key)
    assert request.request.replaces is not None
    end = request.request.replaces.not_valid_after_utc + timedelta(days=1)
    leaf = signer.issue(request.request, begin=datetime.now(UTC) - timedelta(minutes=5), end=end).leaf
    [path] = (root / "desk").glob("*.csr")
    path.with_suffix(".crt").write_bytes(pem(leaf))


def test_it_goes_on_where_it_was(root: Path, node: Pki, run: Run) -> None:
    """The cut-off installation, the proof, the hook and the request that waits; the audit log is one chain."""
    store, before = Store(root / "state"), live_certificates(node)
    key, cut_off = OpenRequests(store).by_name()[PENDING].key_pem, json.loads(store.journal.read_bytes())["run_id"]

    first = run("renew")
    assert first.exit_code == 4, first.output
    assert f"finished the installation of run {cut_off}, which was interrupted: 1 files of {CUT_OFF}" in first.output
    assert (root / "log").read_text().split() == ["failure", "kube-scheduler", "success"]
    assert_pairs(node)

    answer(root, node)
    second = run("renew")
    assert second.exit_code == 0, second.output
    after = live_certificates(node)
    assert {name for name in after if after[name] != before[name]} == {PENDING, CUT_OFF}
    assert (node.pki_dir / "front-proxy-client.key").read_bytes() == key
    left = [file.path.name for file in state_files(store) if file.path.exists()]
    assert left == ["restarted.json"]
    assert run("audit", "verify").exit_code == 0


def test_its_backups_are_put_back(root: Path, node: Pki, run: Run) -> None:
    """The oldest, over what two later installations left."""
    found, broken = backups.read_all(Store(root / "state"))
    assert (len(found), broken) == (3, [])
    oldest = min(found, key=lambda backup: backup.created)
    [file] = oldest.files
    assert file.copy is not None
    wanted = file.copy.read_bytes()
    result = run("rollback", oldest.backup_id)
    assert result.exit_code == 0, result.output
    assert (node.kubeconfig_dir / NOT_PROVEN).read_bytes() == wanted


def test_all_kinds_of_files_are_among_them(root: Path) -> None:
    """The old files have no digest, and each that is written from now on has one."""
    store = Store(root / "state")

    def digests() -> dict[str, bool]:
        paths = [file.path for file in state_files(store) if file.path.exists()]
        return {path.name: "digest" in json.loads(path.read_bytes()) for path in [*paths, store.audit_head]}

    names = ["journal", "staging", "requests", "unproven", "hooks", "restarted"]
    assert digests() == {"audit.head": False, **{f"{name}.json": False for name in names}}
    file: StateFile[object]
    for file in state_files(store):
        if file.path.exists():
            document = json.loads(file.path.read_bytes())
            assert file.read()
            file.replace(document)
            assert file.damage() is None
    assert set(digests().values()) == {True, False}
