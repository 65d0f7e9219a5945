"""Other users of the machine: what they may write is neither obeyed nor followed, and what is secret is not for them."""

from __future__ import annotations

import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bridge.desk.files import load_policy
from bridge.errors import BridgeError, Exit, SettingsError
from bridge.renewal import RunOptions, renew
from bridge.settings import load
from bridge.state import Store
from bridge.state.install import KEY_MASK, InstallError, Replacement, install
from bridge.system.files import digest
from tests.kit.pki import Pki, handmade_pki
from tests.kit.renewing import Quiet, settings_for

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")

SOMEBODY = 12345
SERVER = "etcd-server"


@pytest.fixture
def node(tmp_path: Path) -> Pki:
    return handmade_pki(tmp_path / "node", not_after=datetime.now(UTC) + timedelta(days=20))


def renewed(node: Pki, directory: Path, *names: str) -> list[BridgeError]:
    """Which errors a renewal of these has."""
    settings = settings_for(node, directory)
    result = renew.run(settings, RunOptions(names=names), lambda: datetime.now(UTC), Quiet())[0]
    return [*result.errors, *(one.error for one in result.outcomes if one.error is not None)]


@pytest.mark.parametrize("what", ["the file", "its directory", "the directory above"])
@pytest.mark.parametrize("how", ["owner", "mode"])
def test_settings_and_policy_of_others_are_not_obeyed(tmp_path: Path, what: str, how: str) -> None:
    """Exit 2 with what to do: the one names programs that root runs, the other says what is signed."""
    place = tmp_path / "above/etc"
    place.mkdir(parents=True)
    config, policy = place / "config.toml", place / "desk-policy.toml"
    config.write_text("")
    policy.write_text("version = 1\n[desk]\n")
    settings = load.load(config)

    def errors() -> list[SettingsError]:
        found = []
        for one in (lambda: load.load(config), lambda: load_policy(settings, policy)):
            with pytest.raises(SettingsError) as e:
                one()
            found.append(e.value)
        return found

    assert not any("belong" in str(error) or "write to" in str(error) for error in _of_good(config, policy))
    for one in {"the file": (config, policy), "its directory": (place,)}.get(what, (place.parent,)):
        if how == "owner":
            os.chown(one, SOMEBODY, 0)
        else:
            one.chmod(0o777)
    for error in errors():
        assert error.exit_code == Exit.USAGE
        assert error.hint
        assert "belong to root" in str(error) or "only its owner can write to" in str(error)


def _of_good(config: Path, policy: Path) -> list[Exception]:
    found: list[Exception] = []
    for one in (lambda: load.load(config), lambda: load_policy(load.load(config), policy)):
        try:
            one()
        except SettingsError as e:  # whatever else is wrong with it
            found.append(e)
    return found


def test_a_state_directory_below_another_users_holds_no_keys(node: Pki, tmp_path: Path) -> None:
    """The owner of a directory above it can put another one in its place."""
    assert renewed(node, tmp_path / "good", SERVER) == []
    (tmp_path / "site").mkdir()
    settings = settings_for(node, tmp_path / "site")
    os.chown(tmp_path / "site", SOMEBODY, 0)
    with pytest.raises(BridgeError, match="can't hold keys"):
        renew.run(settings, RunOptions(names=(SERVER,)), lambda: datetime.now(UTC), Quiet())


@pytest.mark.parametrize("folder", [".", "newcerts"])
@pytest.mark.parametrize("how", ["owner", "mode"])
def test_a_ca_directory_of_others_is_not_written_to(node: Pki, tmp_path: Path, folder: str, how: str) -> None:
    """Root would follow the links that they put there, and give away what they lead to."""
    settings = settings_for(node, tmp_path)
    one = tmp_path / "cas/etcd-ca" / folder
    if how == "owner":
        os.chown(one, SOMEBODY, 0)
    else:
        one.chmod(0o777)
    result = renew.run(settings, RunOptions(names=(SERVER,)), lambda: datetime.now(UTC), Quiet())[0]
    assert result.exit_code == Exit.USAGE
    assert "the CA's folder" in str(result.outcomes[0].error)


def test_the_cas_lock_is_for_its_user_alone(node: Pki, tmp_path: Path) -> None:
    """A user who can open the lock's file can hold the lock for ever, so a lock file that all could open becomes private."""
    settings = settings_for(node, tmp_path)
    lock = tmp_path / "cas/etcd-ca/.ca-bridge.lock"
    lock.touch(mode=0o666)
    lock.chmod(0o666)
    assert renew.run(settings, RunOptions(names=(SERVER,)), lambda: datetime.now(UTC), Quiet())[0].exit_code == 0
    assert stat.S_IMODE(lock.stat().st_mode) == 0o600


def test_no_link_in_another_users_directory_is_followed(node: Pki, tmp_path: Path) -> None:
    """As `etcd/server.key` it could lead to any file of root's; no CA's answer is put there, and the file stays."""
    shadow = tmp_path / "shadow"
    shadow.write_bytes((node.pki_dir / "etcd/server.key").read_bytes())
    key = node.pki_dir / "etcd/server.key"
    key.unlink()
    key.symlink_to(shadow)
    before = shadow.read_bytes()
    os.chown(key.parent, SOMEBODY, 0)
    [error] = renewed(node, tmp_path / "first", SERVER)
    assert f"{key}: wanted no link" in str(error)
    assert shadow.read_bytes() == before
    os.chown(key.parent, 0, 0)
    assert renewed(node, tmp_path / "second", SERVER) == []
    assert shadow.read_bytes() != before
    assert key.is_symlink()


def test_what_is_no_key_is_not_replaced_by_one(node: Pki, tmp_path: Path) -> None:
    """Such a file is refused before a CA is asked; an empty file, or none, is no loss."""
    key = node.pki_dir / "etcd/server.key"
    for content, is_refused in ((b"root:*:19000:0:99999:7:::\n", True), (b"", False)):
        key.write_bytes(content)
        errors = renewed(node, tmp_path / str(len(content)), SERVER)
        assert bool(errors) is is_refused
        assert (key.read_bytes() == content) is is_refused
    assert b"PRIVATE KEY" in key.read_bytes()


def test_an_installation_does_not_even_stage_beside_such_a_link(tmp_path: Path) -> None:
    """Nothing is written into the directory that it leads to."""
    store = Store(tmp_path / "state")
    store.prepare()
    target, place = tmp_path / "root/target", tmp_path / "theirs"
    for directory in (target.parent, place):
        directory.mkdir()
    target.write_bytes(b"old")
    (place / "link").symlink_to(target)
    os.chown(place, SOMEBODY, 0)
    one = Replacement(certificate="x", path=place / "link", data=b"new", mode_mask=KEY_MASK, was=digest(b"old"))
    with pytest.raises(InstallError):
        install(store, [one], "run1", {})
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    os.chown(place, 0, 0)
    install(store, [one], "run1", {})
    assert target.read_bytes() == b"new"


def test_a_secret_that_others_can_read_is_a_warning(
    node: Pki, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each renewal that uses it warns and goes on; for `doctor` it is an error."""
    settings = settings_for(node, tmp_path)
    caplog.set_level("WARNING", "ca-bridge")
    renew.run(settings, RunOptions(names=(SERVER,)), lambda: datetime.now(UTC), Quiet())
    assert "for its owner alone" not in caplog.text
    key = tmp_path / "cas/etcd-ca/ca.key"
    key.chmod(0o644)
    assert renew.run(settings, RunOptions(names=(SERVER,)), lambda: datetime.now(UTC), Quiet())[0].exit_code == 0
    assert f"{key}: wanted it for its owner alone, found mode 0644" in caplog.text
