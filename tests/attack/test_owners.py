"""Other users of the machine: what they may write is neither obeyed nor followed, and what is secret is not for them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest

from bridge.desk.files import load_policy
from bridge.diagnosis import machine
from bridge.errors import BridgeError, Exit, SettingsError
from bridge.node import inventory
from bridge.node.reading import read_node
from bridge.renewal import MissingCertificateError, prepare, renew
from bridge.renewal.prepare import live_key
from bridge.renewal.selection import RunOptions
from bridge.renewal.transaction import put_back_and_retire
from bridge.settings import load
from bridge.settings.tables import Settings
from bridge.state import Store
from bridge.state import install as installing
from bridge.state.install import KEY_MASK, InstallError, Replacement, install
from bridge.system.files import digest
from tests.kit.cas import Bridge, add_openssl
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


def a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_huge_file(path: Path) -> None:
    os.truncate(path, 3 << 30)


ODD = [
    pytest.param(a_fifo, "a FIFO, not a regular file", id="FIFO"),
    pytest.param(a_huge_file, "more than 1048576 bytes", id="huge"),
]


@pytest.mark.parametrize(("put", "found"), ODD)
def test_what_is_no_file_in_a_keys_place_stops_its_own_renewal_alone(
    node: Pki, tmp_path: Path, put: Callable[[Path], None], found: str
) -> None:
    """Neither a FIFO nor a file of 3 GiB holds root up: the other certificate is renewed."""
    key, other = node.pki_dir / "etcd/server.key", node.pki_dir / "apiserver.key"
    before = other.read_bytes()
    put(key)
    [error] = renewed(node, tmp_path, SERVER, "apiserver")
    assert f"{key}: can't read it: {found}" in str(error)
    assert other.read_bytes() != before
    item = inventory.read(node.pki_dir, node.kubeconfig_dir).item(SERVER)
    assert item is not None
    assert ("found a FIFO" in str(item.key_trouble)) is (put is a_fifo)
    with pytest.raises(MissingCertificateError, match=found):
        live_key(item)


def rolled_back(settings: Settings) -> None:
    now, none = partial(datetime.now, UTC), timedelta()
    put_back_and_retire(settings, None, now, Quiet(), force=False, wait=none)


@pytest.mark.parametrize(("put", "found"), ODD)
def test_what_is_no_file_in_a_keys_place_stops_a_rollback(
    node: Pki, tmp_path: Path, put: Callable[[Path], None], found: str
) -> None:
    """Nothing is replaced, and the same rollback works once the file, and the CA's, are as they were."""
    settings = settings_for(node, tmp_path)
    key, ca = node.pki_dir / "etcd/server.key", node.pki_dir / "etcd/ca.crt"
    renew.run(settings, RunOptions(names=(SERVER,)), lambda: datetime.now(UTC), Quiet())
    new = key.read_bytes()
    for path, content in ((key, new), (ca, ca.read_bytes())):
        put(path)
        with pytest.raises(BridgeError, match=found):
            rolled_back(settings)
        path.unlink()
        path.write_bytes(content)
    rolled_back(settings)
    assert key.read_bytes() != new


@pytest.mark.parametrize("file", ["server.key", "server.crt"])
def test_a_loop_of_links_is_no_internal_error(node: Pki, tmp_path: Path, file: str) -> None:
    """`doctor` goes on, and a rollback is refused by the link's name."""
    settings = settings_for(node, tmp_path)
    renew.run(settings, RunOptions(names=(SERVER,)), lambda: datetime.now(UTC), Quiet())
    link = node.pki_dir / "etcd" / file
    link.unlink()
    link.symlink_to(file)
    os.chown(link.parent, SOMEBODY, 0)
    list(machine.look(read_node(settings.node), settings, datetime.now(UTC)))
    with pytest.raises(BridgeError, match=f"{link}: wanted no link"):
        rolled_back(settings)


@pytest.mark.parametrize(("put", "found"), ODD)
@pytest.mark.parametrize("step", ["_stage", "_back_up", "_times_to_keep"])
def test_what_comes_into_a_keys_place_while_it_is_replaced_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, put: Callable[[Path], None], found: str
) -> None:
    """The staged file's name shows when: before the commit point nothing is replaced, and after it all goes back."""
    store = Store(tmp_path / "state")
    store.prepare()
    files = [tmp_path / "server.crt", tmp_path / "server.key"]
    for path in files:
        path.write_bytes(b"old")
    act = getattr(installing, step)

    def then(*args: object) -> object:
        done = act(*args)
        for path in tmp_path.glob(".ca-bridge-*server.key" if step == "_times_to_keep" else "server.key"):
            put(path)
        return done

    monkeypatch.setattr(installing, step, then)
    new = [
        Replacement(certificate="x", path=path, data=b"new", mode_mask=KEY_MASK, was=digest(b"old")) for path in files
    ]
    says = "all was put back" if step == "_times_to_keep" else f"nothing was replaced: {files[1]}: .*{found}"
    with pytest.raises(InstallError, match=says):
        install(store, new, "run1", {})
    assert files[0].read_bytes() == b"old"
    assert not store.is_interrupted


def test_a_link_that_comes_after_the_look_for_links_is_not_followed(
    node: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each directory is opened once, so a key that its owner moves away meanwhile is never another file of root's."""
    key = node.pki_dir / "etcd/server.key"
    os.chown(key.parent, SOMEBODY, 0)
    key.rename(tmp_path / "key")
    key.symlink_to(tmp_path / "key")
    monkeypatch.setattr(prepare, "foreign_link", lambda _: None)
    [error] = renewed(node, tmp_path, SERVER)
    assert f"{key}: can't read it: {key}: wanted no link" in str(error)


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


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A link of another user, in a directory of that user, to a directory of root's."""
    (tmp_path / "x").mkdir()
    (tmp_path / "root").mkdir(mode=0o700)
    link = tmp_path / "x/dir"
    link.symlink_to(tmp_path / "root")
    for path in (link, link.parent):
        os.chown(path, SOMEBODY, 0, follow_symlinks=False)
    return link


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("renew etcd-server --csr-only --csr-dir {dir}", "can't hold keys"),
        ("renew etcd-server --csr-only --csr-dir {dir}/new", "can't hold keys"),
        ("kubeconfig request bob -o {dir}", "can't hold keys"),
        ("kubeconfig user bob --group dev -o {dir}/bob.conf", "wanted no link"),
        ("export {dir}/request.json etcd-server", "wanted no link"),
        ("setup openssl -o {dir}", "wanted no link"),
        ("setup cron -o {dir}/new", "wanted no link"),
        ("settings init vault {dir}/config.toml", "wanted no link"),
    ],
)
def test_no_output_goes_through_another_users_link(node: Pki, theirs: Path, words: str, says: str) -> None:
    """Nothing is written behind it, and the message has the link's name, and what to do."""
    bridge = Bridge(pki=node, directory=theirs.parent.parent / "bridge")
    for authority in ("ca", "etcd-ca"):
        add_openssl(bridge, authority)
    run = bridge.run(*words.format(dir=theirs).split())
    assert list((theirs.parent.parent / "root").iterdir()) == []
    assert run.returncode == Exit.FAILED, run.stdout + run.stderr
    assert says in run.stderr
    assert str(theirs.parent) in run.stderr


@pytest.mark.parametrize("how", ["owner", "mode"])
@pytest.mark.parametrize("words", ["renew etcd-server --csr-only --csr-dir {}", "kubeconfig request bob -o {}"])
def test_keys_go_to_no_directory_of_others(node: Pki, tmp_path: Path, how: str, words: str) -> None:
    """They could put a key there that they know; the message says how to take the directory from them."""
    place = tmp_path / "keys"
    place.mkdir()
    bridge, command = Bridge(pki=node, directory=tmp_path / "bridge"), words.format(place).split()
    if how == "owner":
        os.chown(place, SOMEBODY, 0)
    else:
        place.chmod(0o777)
    run = bridge.run(*command)
    assert (run.returncode, list(place.iterdir())) == (Exit.FAILED, []), run.stderr
    assert f"{place} can't hold keys: " in " ".join(run.stderr.split())
    os.chown(place, 0, 0)
    place.chmod(0o755)
    assert bridge.run(*command).returncode == Exit.DONE
