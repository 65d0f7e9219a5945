"""Copies of kubeconfigs: refreshed with the node's own, whatever interrupts, and safe against other users' tricks."""

from __future__ import annotations

import base64
import importlib
import json
import os
import re
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from bridge import entry
from bridge.errors import Exit
from bridge.node import inventory, kubeconfig
from bridge.renewal import activate, renew
from bridge.renewal.selection import RunOptions
from bridge.renewal.transaction import put_back_and_retire
from bridge.settings.load import load, overridden, parse
from bridge.settings.tables import Settings
from bridge.state import Store, audit, copies, remember_checked
from bridge.state.obligations import copies_file
from bridge.state.session import alone
from bridge.system.files import write_staged
from tests.kit import dead_fs, programs
from tests.kit.cas import Bridge, add_openssl
from tests.kit.pki import Pki, handmade_pki
from tests.kit.renewing import Quiet, settings_for

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other users: run the tests as root")

ALICE, BOB = 12345, 12346
ADMIN = "admin.conf"


def now() -> datetime:
    return datetime.now(UTC)


@pytest.fixture
def node(tmp_path: Path) -> Pki:
    return handmade_pki(tmp_path / "node", not_after=now() + timedelta(days=20))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Alice's, with a directory for kubeconfigs."""
    tmp_path.chmod(0o755)
    place = tmp_path / "home/alice/.kube"
    place.mkdir(parents=True)
    for one in (place, place.parent):
        os.chown(one, ALICE, ALICE)
    return place


def given(node: Pki, path: Path, *, uid: int = ALICE, mode: int = 0o600, name: str = ADMIN) -> Path:
    """A copy as `cp` makes it."""
    path.write_bytes((node.kubeconfig_dir / name).read_bytes())
    path.chmod(mode)
    os.chown(path, uid, uid)
    return path


def settings_with(node: Pki, directory: Path, *files: Path, more: str = "") -> Settings:
    listed = ", ".join(f'"{path}"' for path in files)
    return settings_for(node, directory, f"[copies]\nfiles = [{listed}]\n{more}")


def renewed(settings: Settings, *names: str) -> list[str]:
    """The errors of a renewal of these, and its exit code as the last one."""
    result = renew.run(settings, RunOptions(names=names), now, Quiet())[0]
    return [*map(str, result.errors), str(result.exit_code)]


def pair(path: Path) -> tuple[bytes | None, bytes | None]:
    """Certificate and key of the current context."""
    data = path.read_bytes()
    return kubeconfig.parse(data).certificate_data, kubeconfig.key_data(data)


def is_fresh(copy: Path, node: Pki, name: str = ADMIN) -> bool:
    return pair(copy) == pair(node.kubeconfig_dir / name)


# --- what a renewal does ------------------------------------------------------------------------------------------------


def test_a_copy_gets_what_is_installed(node: Pki, home: Path, tmp_path: Path) -> None:
    """A copy gets the new certificate and keeps its owner, mode, attributes and every other byte; a second renewal refreshes it again."""
    copy = given(node, home / "config", mode=0o640)
    os.setxattr(copy, "user.note", b"mine")
    settings = settings_with(node, tmp_path, copy)
    for _ in range(2):
        before, old = copy.read_text(), pair(copy)
        assert renewed(settings, "all") == ["0"]
        assert is_fresh(copy, node)
        assert pair(copy) != old
        status = copy.stat()
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (ALICE, ALICE, 0o640)
        assert os.getxattr(copy, "user.note") == b"mine"
        hidden = r"(client-(certificate|key)-data: )\S+"
        assert re.sub(hidden, r"\1", copy.read_text()) == re.sub(hidden, r"\1", before)
    assert [one.name for one in home.iterdir()] == ["config"]
    assert not Store(settings.node.state_dir).copies.exists()


def test_without_the_setting_a_copy_is_left_alone(node: Pki, home: Path, tmp_path: Path) -> None:
    """The same renewal, and the copy keeps its old certificate."""
    copy = given(node, home / "config")
    assert renewed(settings_for(node, tmp_path), "all") == ["0"]
    assert not is_fresh(copy, node)


def test_a_key_is_for_no_one_else_to_read(node: Pki, home: Path, tmp_path: Path) -> None:
    """A copy that all users could read is narrowed to its owner and group."""
    copy = given(node, home / "config", mode=0o644)
    assert renewed(settings_with(node, tmp_path, copy), "all") == ["0"]
    assert stat.S_IMODE(copy.stat().st_mode) == 0o640


def merged(node: Pki) -> bytes:
    """The file of a user with several clusters: another current context, a user with a token, a block value, two of ours."""

    def value(name: str, key: str) -> str:
        document = yaml.safe_load((node.kubeconfig_dir / name).read_text())
        return str(document["users"][0]["user"][key])

    block = "\n".join("        " + line for line in re.findall(".{1,64}", value(ADMIN, "client-certificate-data")))
    return f"""\
# mine: do not touch
apiVersion: v1
kind: Config
current-context: other
clusters:
- {{name: other, cluster: {{server: "https://other.example:6443"}}}}
contexts:
- {{name: other, context: {{cluster: other, user: other}}}}
users:
- {{name: other, user: {{token: "t0ken"}}}}
- name: prod
  user:
    client-certificate-data: |
{block}
    client-key-data: '{value(ADMIN, "client-key-data")}'   # a comment
- user: {{client-certificate-data: "{value("super-admin.conf", "client-certificate-data")}",
         client-key-data: {value("super-admin.conf", "client-key-data")}}}
  name: break-glass
- name: scheduler
  user: {{client-certificate: /a.crt, client-key: /a.key}}
""".encode()


def test_only_users_with_the_old_certificate_are_changed(node: Pki, home: Path, tmp_path: Path) -> None:
    """In a file with several clusters only those users change; comments, order and the current context stay."""
    copy = given(node, home / "config")
    before = merged(node)
    copy.write_bytes(before)
    assert renewed(settings_with(node, tmp_path, copy), ADMIN) == ["0"]
    users = {one.name: one for one in kubeconfig.embedded_users(copy.read_bytes())}
    old = {one.name: one for one in kubeconfig.embedded_users(before)}
    assert (users["prod"].certificate_pem, users["prod"].key_pem) == pair(node.kubeconfig_dir / ADMIN)
    assert users["break-glass"] == old["break-glass"]
    after = copy.read_text()
    assert after.startswith("# mine: do not touch\n")
    assert "'   # a comment\n" in after
    assert renewed(settings_with(node, tmp_path / "2", copy), "super-admin.conf") == ["0"]
    users = {one.name: one for one in kubeconfig.embedded_users(copy.read_bytes())}
    assert users["break-glass"].certificate_pem == pair(node.kubeconfig_dir / "super-admin.conf")[0]
    loaded: Any = yaml.safe_load(copy.read_text())
    assert loaded["users"][0] == {"name": "other", "user": {"token": "t0ken"}}
    assert len(loaded["users"]) == 4


def test_the_record_has_it(node: Pki, home: Path, tmp_path: Path) -> None:
    """The audit log records the file and the certificate."""
    copy = given(node, home / "config")
    settings = settings_with(node, tmp_path, copy)
    assert renewed(settings, "all") == ["0"]
    lines = Store(settings.node.state_dir).audit.read_text().splitlines()
    [line] = [line for line in lines if f'"event":"{audit.COPIED}"' in line]
    assert f'"result":"{copy}"' in line
    assert '"name":"admin.conf"' in line


def test_a_rollback_puts_the_old_one_back(node: Pki, home: Path, tmp_path: Path) -> None:
    """A rollback puts the old one back into the copy, and a second rollback undoes that, too."""
    copy = given(node, home / "config")
    old = pair(copy)
    settings = settings_with(node, tmp_path, copy)
    assert renewed(settings, "all") == ["0"]
    new = pair(copy)
    for wanted in (old, new):
        done, _ = put_back_and_retire(settings, None, now, Quiet(), force=False, wait=timedelta())
        assert done.late == ()
        assert pair(copy) == wanted
        assert is_fresh(copy, node)


# --- whose file it is --------------------------------------------------------------------------------------------------


def a_link(node: Pki, copy: Path) -> None:
    target = given(node, copy.with_name("elsewhere"))
    copy.symlink_to(target)
    os.chown(copy, ALICE, ALICE, follow_symlinks=False)


def a_link_to_the_node(node: Pki, copy: Path) -> None:
    copy.symlink_to(node.kubeconfig_dir / ADMIN)
    os.chown(copy, ALICE, ALICE, follow_symlinks=False)


def a_linked_directory(node: Pki, copy: Path) -> None:
    real = copy.parent.with_name("real")
    copy.parent.rename(real)
    given(node, real / copy.name)
    copy.parent.symlink_to(real)
    os.chown(copy.parent, ALICE, ALICE, follow_symlinks=False)


def a_hard_link(node: Pki, copy: Path) -> None:
    given(node, copy)
    os.link(copy, copy.with_name("second"))


def a_shared_directory(node: Pki, copy: Path) -> None:
    given(node, copy)
    copy.parent.chmod(0o777)


def a_shared_directory_with_sticky_bit(node: Pki, copy: Path) -> None:
    given(node, copy)
    copy.parent.chmod(0o1777)


def a_shared_directory_above(node: Pki, copy: Path) -> None:
    given(node, copy)
    copy.parent.parent.chmod(0o775)


def another_users_file(node: Pki, copy: Path) -> None:
    given(node, copy, uid=BOB)


def a_pipe(_: Pki, copy: Path) -> None:
    os.mkfifo(copy)


def a_directory(_: Pki, copy: Path) -> None:
    copy.mkdir()


def no_kubeconfig(node: Pki, copy: Path) -> None:
    given(node, copy).write_text("[" * 5000)


def too_large(node: Pki, copy: Path) -> None:
    given(node, copy).write_bytes(b"#" * (2 << 20))


def an_anchor(node: Pki, copy: Path) -> None:
    path = given(node, copy)
    path.write_text(path.read_text().replace("client-key-data: ", "client-key-data: &k "))


def thousands_of_aliases(node: Pki, copy: Path) -> None:
    """Aliases of one mapping of 40,000 keys: to read it for each of them takes longer than an operator waits."""
    given(node, copy)
    keys = "".join(f"  k{number}: 1\n" for number in range(40_000))
    copy.write_text(f"a: &a\n{keys}users:\n" + "- *a\n" * 15_000)


def more_values_than_any_kubeconfig(node: Pki, copy: Path) -> None:
    given(node, copy).write_text("a: &a {}\nusers:\n" + "- *a\n" * 100_000)


def many_users_with_our_certificate(node: Pki, copy: Path) -> None:
    path = given(node, copy)
    document = yaml.safe_load(path.read_text())
    document["users"] *= 9
    path.write_text(json.dumps(document))  # which is YAML without aliases


def a_taken_name(node: Pki, copy: Path) -> None:
    given(node, copy)
    (copy.parent / ".ca-bridge-copy-config").mkdir()


BAD = [
    (a_link, "wanted no link, or one that only root can make"),
    (a_link_to_the_node, "wanted no link, or one that only root can make"),
    (a_linked_directory, "wanted no link, or one that only root can make"),
    (a_hard_link, "a file with 2 names (hard links)"),
    (a_shared_directory, "others than its owner may write to the directory"),
    (a_shared_directory_with_sticky_bit, "others than its owner may write to the directory"),
    (a_shared_directory_above, "others than its owner may write to the directory"),
    (another_users_file, f"the users {ALICE}, {BOB} have a hand in it"),
    (a_pipe, "not a regular file"),
    (a_directory, "not a regular file"),
    (no_kubeconfig, "wanted YAML, found a syntax error"),
    (too_large, "more than 1048576 bytes"),
    (an_anchor, "found an anchor or alias"),
    (thousands_of_aliases, "found an alias (*)"),
    (more_values_than_any_kubeconfig, "wanted at most 100000 values, found more"),
    (many_users_with_our_certificate, "wanted at most 8 users with the node's certificates, found more"),
    (a_taken_name, "Is a directory"),
]


def everything_below(directory: Path) -> dict[str, object]:
    """What is there, without following links."""
    return {
        str(path): (
            path.lstat().st_mode,
            path.lstat().st_uid,
            path.read_bytes() if stat.S_ISREG(path.lstat().st_mode) else None,
        )
        for path in directory.rglob("*")
    }


@pytest.mark.parametrize(("make", "says"), BAD, ids=[make.__name__ for make, _ in BAD])
def test_a_bad_copy_stops_no_other(
    node: Pki, home: Path, tmp_path: Path, make: Callable[[Pki, Path], None], says: str
) -> None:
    """It is reported, with exit code 7, and stays as it is; the node and the other copies have the new one."""
    bad, good = home / "config", tmp_path / "monitoring.conf"
    make(node, bad)
    given(node, good, uid=0)
    settings = settings_with(node, tmp_path, bad, good)
    before = everything_below(home.parent)
    errors = renewed(settings, "all")
    assert errors[-1] == str(Exit.NOT_LIVE)
    assert any(str(bad) in error and says in error for error in errors), errors
    assert everything_below(home.parent) == before
    assert is_fresh(good, node)
    # each later run tells it again
    again = renewed(settings)
    assert again[-1] == str(Exit.NOT_LIVE)
    # until the operator takes it out of the list
    assert renewed(settings_with(node, tmp_path / "x", good)) == ["0"]


def test_a_copy_that_is_read_for_ever_holds_up_nothing(
    node: Pki, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its home may be on a dead network file system: restart and proof come first, and the other copies are fresh."""
    dead, good = home / "config", tmp_path / "monitoring.conf"
    given(node, dead)
    given(node, good, uid=0)
    order: list[str] = []
    first, over = copies._refreshed, threading.Event()

    def refreshed(path: Path, *rest: Any) -> list[str]:
        order.append("copy")
        if path == dead:
            over.wait(600)
        return first(path, *rest)

    def finish(*_: object) -> activate.Activation:
        order.append("restart and proof")
        return activate.Activation()

    more = '[restart]\nmethod = "static-pods"'
    settings = settings_with(node, tmp_path, dead, good, more=more)
    with monkeypatch.context() as patch:
        patch.setattr(copies, "_LONGEST", timedelta(seconds=5))
        patch.setattr(copies, "_refreshed", refreshed)
        patch.setattr(activate, "finish", finish)
        *errors, code = renewed(settings, ADMIN)
    over.set()
    assert (order, code) == (["restart and proof", "copy", "copy"], str(Exit.NOT_LIVE))
    assert [error for error in errors if f"{dead}: it could not be read to its end within 5 s" in error] == errors
    assert is_fresh(good, node)


@pytest.mark.attack("N1")
def test_a_key_that_takes_minutes_to_check_is_not_read(node: Pki, home: Path, tmp_path: Path) -> None:
    """The node's certificate with an RSA key of two large Mersenne primes: it is left alone, and stops no other copy."""
    copy = given(node, home / "config")
    document = yaml.safe_load(copy.read_text())
    document["users"][0]["user"]["client-key-data"] = base64.b64encode(mersenne_key()).decode()
    copy.write_text(yaml.safe_dump(document))
    before = copy.read_bytes()
    good = given(node, tmp_path / "monitoring.conf", uid=0)

    started = time.process_time()
    assert renewed(settings_with(node, tmp_path, copy, good), "all") == ["0"]

    assert time.process_time() - started < 10  # a hundred quiet seconds otherwise
    assert copy.read_bytes() == before
    assert is_fresh(good, node)


def mersenne_key() -> bytes:
    """An RSA key of 13,942 bits in PKCS #1, made in no time."""
    p, q = 2**9689 - 1, 2**4253 - 1
    d = pow(65537, -1, (p - 1) * (q - 1))
    numbers = (0, p * q, 65537, d, p, q, d % (p - 1), d % (q - 1), pow(q, -1, p))
    content = b"".join(tlv(0x02, number.to_bytes(number.bit_length() // 8 + 1)) for number in numbers)
    encoded = base64.encodebytes(tlv(0x30, content))
    return b"-----BEGIN RSA PRIVATE KEY-----\n" + encoded + b"-----END RSA PRIVATE KEY-----\n"


def tlv(tag: int, content: bytes) -> bytes:
    """One DER value."""
    length = len(content).to_bytes((len(content).bit_length() + 7) // 8 or 1)
    return bytes([tag, *((0x80 | len(length),) if len(content) > 0x7F else ()), *length]) + content


def test_once_mended_a_copy_is_refreshed(node: Pki, home: Path, tmp_path: Path) -> None:
    """The next run refreshes it, due or not, though two renewals have passed."""
    copy = home / "config"
    a_hard_link(node, copy)
    settings = settings_with(node, tmp_path, copy)
    for _ in range(2):
        assert renewed(settings, ADMIN)[-1] == str(Exit.NOT_LIVE)
    (home / "second").unlink()
    assert renewed(settings) == ["0"]
    assert is_fresh(copy, node)


def test_roots_own_link_is_followed(node: Pki, home: Path, tmp_path: Path) -> None:
    """A link of root's own is followed, and stays a link."""
    copy, link = given(node, home / "config"), tmp_path / "link"
    link.symlink_to(copy)
    assert renewed(settings_with(node, tmp_path, link), "all") == ["0"]
    assert is_fresh(copy, node)
    assert link.is_symlink()


def test_a_certificate_alone_earns_no_key(
    node: Pki, home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The old certificate is no secret: a file that has it with another key gets nothing, and a message says so."""
    copy = given(node, home / "config")
    other = kubeconfig.key_data((node.kubeconfig_dir / "scheduler.conf").read_bytes()) or b""
    document = yaml.safe_load(copy.read_text())
    document["users"][0]["user"]["client-key-data"] = base64.b64encode(other).decode()
    copy.write_text(yaml.safe_dump(document))
    before = copy.read_bytes()
    with caplog.at_level("WARNING", logger="ca-bridge"):
        assert renewed(settings_with(node, tmp_path, copy, given(node, home / "fine")), "all") == ["0"]
    assert copy.read_bytes() == before
    reported = "it has no certificate of the node's kubeconfigs with its key; it is left alone"
    assert [line for line in caplog.messages if "left alone" in line] == [f"{copy}: {reported}"]


def test_another_kubeconfigs_renewal_is_no_matter(
    node: Pki, home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A copy of scheduler.conf stays as it is, without a message, when admin.conf is renewed."""
    copy = given(node, home / "config", name="scheduler.conf")
    before = copy.read_bytes()
    with caplog.at_level("WARNING", logger="ca-bridge"):
        assert renewed(settings_with(node, tmp_path, copy), ADMIN) == ["0"]
    assert (copy.read_bytes(), caplog.messages) == (before, [])


def test_a_damaged_list_of_outdated_copies_is_reported_once(node: Pki, home: Path, tmp_path: Path) -> None:
    """The damaged list is reported once and set aside; the renewal goes on, and its copies are refreshed."""
    copy = given(node, home / "config")
    settings = settings_with(node, tmp_path, copy)
    assert renewed(settings, "apiserver") == ["0"]
    Store(settings.node.state_dir).copies.write_bytes(b"{")
    errors = renewed(settings, ADMIN)
    assert errors[-1] == str(Exit.FAILED)
    assert "wanted which certificates copies of kubeconfigs may still hold" in errors[0]
    assert is_fresh(copy, node)
    assert renewed(settings) == ["0"]


def test_a_copy_that_is_away_is_a_warning(
    node: Pki, home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A missing copy holds no old certificate."""
    with caplog.at_level("WARNING", logger="ca-bridge"):
        assert renewed(settings_with(node, tmp_path, home / "config", home / "no/such"), "all") == ["0"]
    assert caplog.text.count("there is no such copy of a kubeconfig (copies.files)") == 2


def test_what_the_owner_writes_meanwhile_stays(
    node: Pki, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An owner's change to the file, or another file in its place, stays, is reported, and is tried again later."""
    copy = given(node, home / "config")
    real = write_staged

    def and_then(path: Path, *args: Any) -> None:
        real(path, *args)
        copy.write_bytes(copy.read_bytes() + b"# mine\n")

    monkeypatch.setattr(copies, "write_staged", and_then)
    settings = settings_with(node, tmp_path, copy)
    errors = renewed(settings, "all")
    assert "it was changed while it was refreshed" in errors[0]
    assert copy.read_bytes().endswith(b"# mine\n")
    assert [one.name for one in home.iterdir()] == ["config"]
    monkeypatch.undo()
    assert renewed(settings) == ["0"]
    assert is_fresh(copy, node)


def test_new_keys_are_for_the_owner_at_any_time(
    node: Pki, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the new file gets its content it belongs to the owner, and no other user can read it."""
    copy = given(node, home / "config")
    seen: list[tuple[int, int]] = []
    real = os.fsync

    def look(descriptor: int) -> None:
        staged = home / ".ca-bridge-copy-config"
        if staged.exists():
            seen.append((staged.stat().st_uid, stat.S_IMODE(staged.stat().st_mode)))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    assert renewed(settings_with(node, tmp_path, copy), "all") == ["0"]
    assert set(seen) == {(ALICE, 0o600)}


# --- interruption ------------------------------------------------------------------------------------------------------

#: Where a run is cut off: a function, the module from which it is called, and whether that is after its call.
CUTS = [
    ("bridge.renewal.verify_and_install", "install", False),
    ("bridge.renewal.verify_and_install", "install", True),
    ("bridge.state.copies", "opened", False),
    ("bridge.state.copies", "write_staged", False),
    ("bridge.state.copies", "write_staged", True),
    ("bridge.state.copies", "sync_directory", False),
    ("bridge.state.copies", "sync_directory", True),
]


def cut_off(settings: Settings, module: str, name: str, *, after: bool) -> None:
    """A renewal in a process that is gone at this place, as by kill -9."""
    child = os.fork()
    if child == 0:
        try:
            found = importlib.import_module(module)
            real = getattr(found, name)

            def cut(*args: Any, **kwargs: Any) -> Any:
                if after:
                    real(*args, **kwargs)
                os._exit(9)

            setattr(found, name, cut)
            renew.run(settings, RunOptions(names=(ADMIN, "apiserver")), now, Quiet())
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize(("module", "name", "after"), CUTS)
def test_after_a_kill_all_is_old_or_all_is_new(
    node: Pki, home: Path, tmp_path: Path, module: str, name: str, after: bool
) -> None:
    """After the next command that writes the copy holds the live certificate, and nothing lies beside it."""
    copy = given(node, home / "config")
    old = pair(copy)
    settings = settings_with(node, tmp_path, copy)
    cut_off(settings, module, name, after=after)
    store = Store(settings.node.state_dir)
    with alone(settings, timedelta(), lambda _: None) as (_, record):
        assert copies.finish(settings, store, record) == []
    assert is_fresh(copy, node)
    assert (pair(copy) == old) == (name == "install" and not after)
    assert [one.name for one in home.iterdir()] == ["config"]
    assert not store.copies.exists()


def test_outdated_copies_are_seen_by_a_run_with_nothing_due(node: Pki, home: Path, tmp_path: Path) -> None:
    """The quick look of cron's run does not take it for nothing to do."""
    copy = given(node, home / "config")
    settings = settings_with(node, tmp_path, copy)
    config = tmp_path / "config.toml"
    config.write_text("[copies]\n" + f'files = ["{copy}"]\n')
    config.chmod(0o644)
    arguments = ["renew", "--config", str(config), "--pki-dir", str(node.pki_dir)]
    arguments += ["--kubeconfig-dir", str(node.kubeconfig_dir), "--state-dir", str(settings.node.state_dir)]
    assert renewed(settings, "all") == ["0"]
    loaded = overridden(load(config), node.pki_dir, node.kubeconfig_dir, settings.node.state_dir)
    remember_checked(loaded, Store(settings.node.state_dir))
    quiet = entry.nothing_to_do(arguments)
    assert quiet is not None
    assert quiet.sentence.startswith("nothing is due")
    copies_file(Store(settings.node.state_dir)).replace({"certificates": {ADMIN: ["00"]}})
    assert entry.nothing_to_do(arguments) is None


# --- settings and looks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files", ['"/root/.kube/config"', '["config"]', '["/a/../b"]', '["/a", "/a"]', "[1]", '["/"]', '["/a\\u0000b"]']
)
def test_odd_lists_are_refused(files: str) -> None:
    """A list needs absolute paths without detours, each once; one that is fine is taken."""
    with pytest.raises(Exception, match=r"copies.files: wanted a list of absolute paths"):
        parse(f"[copies]\nfiles = {files}")
    assert parse('[copies]\nfiles = ["/a"]').copies.files.paths == (Path("/a"),)


def test_a_look_changes_nothing(node: Pki, home: Path, tmp_path: Path) -> None:
    """The look reports what each copy holds, and what is wrong with it, and changes no file."""
    good, bad, other = given(node, home / "config"), home / "pipe", given(node, home / "s", name="scheduler.conf")
    os.mkfifo(bad)
    settings = settings_with(node, tmp_path, good, bad, other, home / "none")
    before = everything_below(home.parent)
    found = copies.look(settings, inventory.read(node.pki_dir, node.kubeconfig_dir))
    assert [(one.names, one.is_there, one.error is None) for one in found] == [
        ((ADMIN,), True, True),
        ((), True, False),
        (("scheduler.conf",), True, True),
        ((), False, True),
    ]
    assert everything_below(home.parent) == before


@dead_fs.needs_mount
def test_a_look_ends_in_time(node: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that does not answer; the copies behind it are looked at, too."""
    good = given(node, tmp_path / "monitoring.conf", uid=0)
    monkeypatch.setattr(copies, "_LONGEST", timedelta(seconds=5))
    with dead_fs.mounted(tmp_path / "home") as home:
        settings = settings_with(node, tmp_path, home / "config", good)
        hung, fresh = copies.look(settings, inventory.read(node.pki_dir, node.kubeconfig_dir))
    assert "could not be read to its end" in str(hung.error)
    assert (fresh.names, fresh.error) == ((ADMIN,), None)


def test_plan_doctor_and_recover_tell(node: Pki, home: Path, tmp_path: Path) -> None:
    """With the installed program: the copy's path at `plan` and `doctor`, exit 7 while one stays behind."""
    bridge = Bridge(pki=node, directory=tmp_path / "bridge")
    for name in ("ca", "etcd-ca", "front-proxy-ca"):
        add_openssl(bridge, name)
    good, bad = given(node, home / "config"), home / "pipe"
    bridge.add("copies", {"files": [str(good), str(bad)]})
    plan = bridge.run("plan")
    assert re.search(rf"copy of admin.conf +refresh +{good}", " ".join(plan.stdout.split()))
    os.mkfifo(bad)
    doctor = " ".join(bridge.run("doctor").stdout.split())
    assert f"ok {good}: holds the certificate of admin.conf, and is refreshed with it" in doctor
    assert f"error {bad}: wanted a copy of a kubeconfig that only its owner can change, found: a FIFO" in doctor
    renewal = bridge.run("renew")
    assert renewal.returncode == Exit.NOT_LIVE
    assert f"error: {bad}: wanted a copy of a kubeconfig that only its owner can change" in renewal.stderr
    assert f"{good}: holds what admin.conf holds now" in renewal.stderr
    for words in (("recover",), ("renew",)):
        assert bridge.run(*words).returncode == Exit.NOT_LIVE
    bad.unlink()
    assert bridge.run("recover").returncode == 0
    assert bridge.run("renew").returncode == 0
    back = bridge.run("rollback")
    assert back.returncode == 0, back.stderr
    assert is_fresh(good, node)


@pytest.mark.kube("kubectl")
def test_kubectl_reads_a_refreshed_copy(node: Pki, home: Path, tmp_path: Path) -> None:
    """The file with several clusters is one for the real kubectl, before and after."""
    copy = given(node, home / "config")
    copy.write_bytes(merged(node))

    def users() -> str:
        command = [str(programs.require("kubectl")), "--kubeconfig", str(copy), "config", "view", "--raw", "-o", "json"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    before = users()
    assert renewed(settings_with(node, tmp_path, copy), "all") == ["0"]
    new = base64.b64encode(pair(node.kubeconfig_dir / ADMIN)[0] or b"").decode()
    assert (new in users(), new in before) == (True, False)
