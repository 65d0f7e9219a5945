"""Requests that are open, by their lines: what is written is what is read, and damage means what its kind says."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from bridge.bootstrap.make import unfinished_file
from bridge.desk.records import Journal
from bridge.gateway.context import PendingRequests
from bridge.monitoring import history_file
from bridge.pki.certificates import pem
from bridge.renewal.gate import attempts_file
from bridge.renewal.transaction import state_files
from bridge.specs import Component
from bridge.state import Store, obligations, open_requests
from bridge.state.open_requests import RENEWALS, Kind, OpenRequests, OpenUsers, RequestLog, file_of
from bridge.system.files import append
from bridge.system.state_file import StateDamagedError

#: What version 5154d35 left; `upgrade/make_open.py` tells what that is.
ARCHIVE = Path(__file__).parent / "upgrade/open.tar.gz"


@dataclass(frozen=True)
class Entry:
    """A request, as far as the file is concerned."""

    name: str
    count: int


def kind(*, has_keys: bool = False, lies_on_disk: bool = False) -> Kind[Entry]:
    return Kind(
        name="entry",
        type=Entry,
        key_of=lambda one: one.name,
        what="entries",
        has_keys=has_keys,
        lies_on_disk=lies_on_disk,
    )


KINDS = {"added": kind(), "with keys": kind(has_keys=True), "on disk": kind(lies_on_disk=True)}


@pytest.fixture(params=KINDS)
def each(request: pytest.FixtureRequest) -> Kind[Entry]:
    return KINDS[request.param]


def test_changes_are_on_disk_after_save(tmp_path: Path, each: Kind[Entry]) -> None:
    """Changes are on disk after save and not before; the last line of a request counts; without requests there is no file."""
    path = tmp_path / "entries"
    log = RequestLog(path, each)
    log.put(Entry("a", 1))
    assert (log.get("a"), path.exists()) == (Entry("a", 1), False)
    log.save()
    assert path.stat().st_mode & 0o777 == 0o600
    log.put(Entry("b", 1))
    log.put(Entry("a", 2))
    log.save()
    assert RequestLog(path, each).by_name() == {"a": Entry("a", 2), "b": Entry("b", 1)}
    again = RequestLog(path, each)
    assert again.drop("a") == Entry("a", 2)
    assert (again.drop("a"), again.drop("c")) == (None, None)
    again.save()
    assert list(RequestLog(path, each)) == list(again) == [Entry("b", 1)]
    again.forget("b")
    again.forget("c")
    again.save()
    assert not path.exists()
    again.put(Entry("d", 1))
    again.save()
    assert list(RequestLog(path, each)) == [Entry("d", 1)]


def test_who_saves_soon_waits_for_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one thread waits for the disk, another one goes on; the next save takes its change along."""
    disk, goes_on = threading.Event(), threading.Event()

    def slow(path: Path, data: bytes) -> None:
        disk.set()
        assert goes_on.wait(180)
        append(path, data)

    monkeypatch.setattr(open_requests, "append", slow)
    log = RequestLog(tmp_path / "entries", kind())
    with ThreadPoolExecutor(1) as pool:
        log.put(Entry("a", 1))
        first = pool.submit(log.save_soon)
        assert disk.wait(180)
        log.put(Entry("b", 1))
        log.save_soon()
        assert not first.done()
        goes_on.set()
        first.result(180)
    assert list(RequestLog(tmp_path / "entries", kind())) == [Entry("a", 1)]
    log.save_soon()
    assert list(RequestLog(tmp_path / "entries", kind())) == [Entry("a", 1), Entry("b", 1)]


def test_what_is_dropped_leaves_the_disk(tmp_path: Path) -> None:
    """A dropped request leaves the disk at once where the file has keys, elsewhere when there are many."""
    for name, one in KINDS.items():
        path = tmp_path / name
        log = RequestLog(path, one)
        for number in range(3000):
            log.put(Entry("same", number))
            if number < 2 or number > 2000:
                log.put(Entry(f"x{number}", 0))
            log.save()
            log.drop(f"x{number}")
            if one.has_keys and number > 5:
                break
        log.save()
        count = len(path.read_bytes().splitlines())
        assert count == 2 if one.has_keys else count < 1100
        log.tidy()
        assert len(path.read_bytes().splitlines()) == 1 + one.has_keys
        assert list(log) == list(RequestLog(path, one))


def test_a_cut_line_is_forgotten(tmp_path: Path) -> None:
    """Lines that are added later begin where the last whole one ends."""
    path, one = tmp_path / "entries", KINDS["added"]
    log = RequestLog(path, one)
    log.put(Entry("a", 1))
    log.save()
    with path.open("ab") as file:
        file.write(b'{"digest": "00')
    again = RequestLog(path, one)
    again.put(Entry("b", 1))
    again.save()
    assert list(RequestLog(path, one)) == [Entry("a", 1), Entry("b", 1)]


def test_damage_among_keys_is_an_error(tmp_path: Path) -> None:
    """Each flipped bit, and each line that is missing, is noticed; without keys the other lines count."""
    for name, one in KINDS.items():
        path = tmp_path / name
        log = RequestLog(path, one)
        for key in ("a", "b", "c"):
            log.put(Entry(key, 1))
        log.save()
        whole = path.read_bytes()
        lines = whole.splitlines(keepends=True)
        damaged = [bytes([*whole[:at], whole[at] ^ 4, *whole[at + 1 :]]) for at in range(0, len(whole) - 1, 3)]
        for data in (*damaged, whole[:-5], b"".join(lines[:-1]), b"".join(lines[1:])):
            path.write_bytes(data)
            if one.has_keys:
                with pytest.raises(StateDamagedError):
                    RequestLog(path, one)
            else:
                assert 1 <= len(RequestLog(path, one)) <= 2


# --- the files of version 5154d35 -------------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path: Path) -> Store:
    subprocess.run(["tar", "-xzf", ARCHIVE, "-C", tmp_path, "--no-same-owner"], check=True)
    return Store(tmp_path)


def document(path: Path) -> Mapping[str, Any]:
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found


def test_all_of_an_earlier_version_is_whole(old: Store) -> None:
    """None of its files counts as damaged."""
    files = [file for file in state_files(old) if file.path.exists()]
    assert {file.path.name for file in files} == {
        f"{name}.json"
        for name in ("requests", "users", "unproven", "hooks", "revocations", "copies", "attempts", "restarted")
    }
    assert [file.damage() for file in files] == [None] * len(files)


def test_requests_of_a_node_live_on(old: Store) -> None:
    """Keys, references, proofs and answers are those of before, and the next change writes them in today's form."""
    entries = {one["name"]: one for one in document(old.requests)["requestsV1"]}

    def assert_same(opened: OpenRequests) -> None:
        made = opened.by_name()
        assert made.keys() == entries.keys() == {"apiserver", "scheduler.conf", "admin.conf"}
        for name, one in made.items():
            entry = entries[name]
            assert (one.key_pem.decode(), one.request.csr_pem.decode()) == (entry["key"], entry["csr"])
            assert (one.reference, one.note, one.backend) == (entry["reference"], entry["note"], entry["backend"])
            assert (one.run_id, one.created.isoformat(), list(one.bundles)) == (
                entry["run"], entry["created"], entry["bundles"],
            )  # fmt: skip
            assert one.request.validity == timedelta(seconds=entry["validitySeconds"])
            assert one.request.replaces is not None
            assert pem(one.request.replaces).decode() == entry["replaces"]
        late = made["scheduler.conf"]
        assert late.answer is not None
        assert [pem(one).decode() for one in (late.answer.leaf, *late.answer.intermediates)] == entries[late.name][
            "answer"
        ]
        assert late.request.continuity is not None
        assert (late.request.continuity.proof, late.request.continuity.node) == (b"\1\2", "cp-1")
        assert late.kubeconfig is not None
        assert late.kubeconfig.server == "https://a:6443"

    opened = OpenRequests(old)
    assert_same(opened)
    dropped = opened.drop("admin.conf")
    assert dropped is not None
    opened.save()
    assert b"requestsV1" not in old.requests.read_bytes()
    assert dropped.key_pem.splitlines()[1] not in old.requests.read_bytes()
    opened.put(dropped)
    opened.save()
    assert_same(OpenRequests(old))


def test_a_damaged_one_of_an_earlier_version_is_noticed(old: Store) -> None:
    """Its own digest shows the damage."""
    whole = old.requests.read_bytes()
    old.requests.write_bytes(whole.replace(b"R-1", b"R-2"))
    assert file_of(RENEWALS, old.requests).damage() is not None
    with pytest.raises(StateDamagedError):
        OpenRequests(old)


def test_requests_for_users_live_on(old: Store) -> None:
    """They keep their key, or the asker of a CSR that another user made."""
    users = OpenUsers(old)
    jane, john = (users.by_name()[name] for name in ("jane", "john"))
    assert (jane.groups, jane.reference, jane.validity, jane.carried) == (("dev",), "R-2", timedelta(hours=8), None)
    assert jane.key_pem is not None
    assert (john.key_pem, john.reference) == (None, "")
    assert john.carried is not None
    assert (john.carried.batch, john.carried.proof) == ("1" * 32, None)
    users.drop("jane")
    users.save()
    assert list(OpenUsers(old)) == [john]


def test_requests_at_the_gateways_ca_live_on(old: Store) -> None:
    """One is answered, the other still waits."""
    pending = PendingRequests(old)
    assert {one.uid: (one.reference, one.validity_seconds) for one in pending} == {
        "u-1": ("R-u-1", 600), "u-2": ("R-u-2", 600),
    }  # fmt: skip
    pending.drop("u-1")
    pending.save()
    assert [one.uid for one in PendingRequests(old)] == ["u-2"]


def test_the_desks_journal_lives_on(old: Store) -> None:
    """A question, an answer that comes later, and a certificate; each for its own request."""
    lines = [json.loads(line) for line in old.desk_answers.read_bytes().splitlines()]
    journal = Journal(old.desk_answers, datetime.fromisoformat(lines[0]["asked"]) + timedelta(days=1))
    asked, later, issued = (journal._log.get(line["key"]) for line in lines)
    assert asked is not None
    assert asked.asked == datetime.fromisoformat(lines[0]["asked"])
    assert later is not None
    assert (later.reference, later.note) == ("R-3", "at the CA")
    assert issued is not None
    assert issued.chain is not None
    assert [pem(issued.chain.leaf).decode()] == lines[2]["chain"]


def test_what_was_unproven_lives_on(old: Store) -> None:
    """The files' form is the same; so is a new node's beginning, and what is remembered of runs."""
    state = obligations.unproven_file(old).read()
    assert state is not None
    [unproven] = state.certificates
    assert (unproven.runs, unproven.before) == ({"0a": "44444444"}, frozenset({"a", "b"}))
    assert (state.going_back, state.to_restart) == ("it does not work", (Component.APISERVER,))
    [hooks] = obligations.hooks_file(old).read() or ()
    assert (hooks.event, hooks.done, hooks.tries) == ("success", ("true",), 2)
    [revocation] = obligations.revocations_file(old).read() or ()
    assert revocation.name == "admin.conf"
    assert obligations.copies_file(old).read() == {"admin.conf": ("00", "01")}
    begun = unfinished_file(old).read()
    assert begun is not None
    assert (begun.role, begun.names, begun.sa_key) == ("init", ("admin.conf",), "k")
    history, attempts = history_file(old).read(), attempts_file(old).read()
    assert history is not None
    assert (history.failures, history.seconds) == (3, 1.5)
    assert attempts is not None
    assert attempts["ca"].reason == "not there"


def test_the_file_of_further_pairs_keeps_its_keys(tmp_path: Path) -> None:
    """The pairs that a version before has installed are proven by this one; a file with another key is damaged."""
    store = Store(tmp_path)
    one = {"name": "apiserver", "runs": {"ab": "0001"}, "backup_of": "0001", "before": []}
    state = {"certificates": [one], "going_back": "", "to_restart": []}
    for key, expected in (("owed", nullcontext()), ("unproven", pytest.raises(StateDamagedError))):
        pair = {key: state, "worked": True, "by_hand": False, "is_read": False}
        store.pairs.write_text(json.dumps({"version": 1, "pairs": [pair]}))
        with expected:
            assert [found.name for found in obligations.pairs_file(store).read() or ()] == ["apiserver"]


@pytest.mark.parametrize("name", ["unproven", "hooks", "revocations", "copies", "bootstrap", "history", "attempts"])
def test_what_keeps_its_form_keeps_its_bytes(old: Store, name: str) -> None:
    """Each file that is read and written again is the same."""
    files = {
        "unproven": obligations.unproven_file, "hooks": obligations.hooks_file,
        "revocations": obligations.revocations_file, "copies": obligations.copies_file,
        "bootstrap": unfinished_file, "history": history_file, "attempts": attempts_file,
    }  # fmt: skip
    file: Any = files[name](old)
    before = file.path.read_bytes()
    file.put(file.read())
    assert file.path.read_bytes() == before
