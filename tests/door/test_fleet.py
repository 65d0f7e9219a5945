"""`ca-bridge fleet`: the door's nodes, from its database alone."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bridge.door.fleet import fleet, metrics, unnamed
from bridge.door.store import ENROLMENTS, DoorDatabase, IssuedRow, open_memory, sqlite_url
from bridge.errors import Exit
from bridge.pki.expiry import Before
from bridge.settings.load import load
from tests.kit.desks import make_desk
from tests.kit.pki import handmade_pki

NOW = datetime.now(UTC).replace(microsecond=0)
_BEFORE = Before(remaining=timedelta(days=30))
_YEAR = timedelta(days=365)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[DoorDatabase]:
    one = DoorDatabase(sqlite_url(tmp_path / "door.db"))
    yield one
    one.close()


def asked(
    memory: DoorDatabase,
    node: str,
    ago: timedelta,
    *,
    left: timedelta | None = None,
    note: str = "",
    name: str = "",
    life: timedelta = _YEAR,
    named: bool = True,
) -> None:
    """A node's request; with `left` it was answered by a certificate that ends then."""
    heard = NOW - ago
    digest = f"{node} {ago} {name}"
    request = memory.receive(
        b"bundle", digest=digest, node=node, cluster="kubernetes", peer="192.0.2.1", now=heard, named=named
    )
    if left is None:
        memory.note(request, note)
        return
    row = IssuedRow(
        fingerprint=f"{node} {ago} {name}", csr="cc", key="dd", name=name or "apiserver", authority="ca", node=node,
        cluster="kubernetes", serial="01", begins=NOW + left - life, ends=NOW + left, chain=b"pem",
    )  # fmt: skip
    memory.conclude(request, b"answer", [row], heard, note, named=named)


def test_each_state_of_a_node(memory: DoorDatabase) -> None:
    """The worst first; half of the time for a renewal without a request is silence, and a refusal is not."""
    day = timedelta(days=1)
    asked(memory, "expired", 400 * day, left=-day)
    asked(memory, "silent", 355 * day, left=10 * day)
    asked(memory, "early", 345 * day, left=20 * day)
    asked(memory, "refused", 355 * day, left=10 * day, name="etcd-server")
    asked(memory, "refused", day, left=300 * day, note="admin.conf: proof: wanted one", name="apiserver")
    asked(memory, "waits", day, note="the CA is away")
    asked(memory, "well", day, left=300 * day)
    found = fleet(memory, _BEFORE, NOW)

    states = {one.node: one.state for one in found}
    assert states == {
        "expired": "expired", "silent": "silent", "refused": "failed", "waits": "waits", "early": "ok", "well": "ok",
    }  # fmt: skip
    assert [one.node for one in found] == ["expired", "silent", "refused", "waits", "early", "well"]
    assert [(one.name, one.why) for one in found if one.node == "refused"] == [
        ("etcd-server", "admin.conf: proof: wanted one")
    ]


def test_what_people_have_is_no_nodes(memory: DoorDatabase) -> None:
    """A user's certificate of some hours and super-admin.conf end by themselves."""
    for name in ("user", "super-admin.conf"):
        asked(memory, "cp-1", timedelta(days=2), left=-timedelta(days=1), name=name)
    asked(memory, "cp-1", timedelta(days=1), left=300 * timedelta(days=1))

    assert [(one.state, one.name) for one in fleet(memory, _BEFORE, NOW)] == [("ok", "apiserver")]


def test_a_kubelet_that_rotates_by_itself_is_not_expired(memory: DoorDatabase) -> None:
    """What day 0 had signed counts until others that live as long are renewed without it, and a pair of some days is none."""
    day = timedelta(days=1)
    names = ("kubelet.conf", "kubelet-server", "apiserver")
    for name in names:
        asked(memory, "cp-1", 370 * day, left=-5 * day, name=name)
        asked(memory, "cp-2", 370 * day, left=-5 * day, name=name)
        asked(memory, "cp-3", 370 * day, left=-5 * day, name=name)
    asked(memory, "cp-1", 30 * day, left=335 * day)
    asked(memory, "cp-2", day, left=6 * day, name="pair", life=7 * day)
    asked(memory, "cp-3", 30 * day, left=335 * day, name="kubelet.conf")

    found = {one.node: (one.state, one.name) for one in fleet(memory, _BEFORE, NOW)}
    assert found["cp-1"] == ("ok", "apiserver")
    assert found["cp-2"][0] == found["cp-3"][0] == "expired"


def test_the_newest_certificate_counts(memory: DoorDatabase) -> None:
    """An older one that ends later covers nothing: the node has replaced it; nor is a node new whose secret is over."""
    day = timedelta(days=1)
    asked(memory, "cp-1", 20 * day, left=300 * day)
    asked(memory, "cp-1", 10 * day, left=-day, life=9 * day)
    row = {"node": "cp-2", "cluster": "kubernetes", "created": NOW - day, "created_by": "root", "ends": NOW}
    memory.change(ENROLMENTS.insert().values(**row, secret_hash="aa"))

    assert [(one.node, one.state) for one in fleet(memory, _BEFORE, NOW)] == [("cp-1", "expired")]


@pytest.mark.attack("D4")
def test_a_name_that_nothing_proves_changes_no_node(memory: DoorDatabase) -> None:
    """A claim makes no expired node well, and no new row; it is counted."""
    year, day = timedelta(days=365), timedelta(days=1)
    asked(memory, "cp-1", year, left=-day)
    for name in ("cp-1", "cp-2"):
        asked(memory, name, day, left=year, named=False)

    nodes = fleet(memory, _BEFORE, NOW)
    assert [(one.node, one.state) for one in nodes] == [("cp-1", "expired")]
    assert "\nca_bridge_fleet_unnamed_requests 2\n" in metrics(nodes, unnamed(memory))
    asked(memory, "cp-1", timedelta(0), left=year)
    assert [one.state for one in fleet(memory, _BEFORE, NOW)] == ["ok"]


def test_the_metrics_have_every_node(memory: DoorDatabase) -> None:
    """The metrics count the nodes of each state, and have each node's next end."""
    asked(memory, "cp-1", timedelta(days=1), left=-timedelta(days=1))
    text = metrics(fleet(memory, _BEFORE, NOW), unnamed(memory))

    assert 'ca_bridge_fleet_nodes{state="expired"} 1\n' in text
    assert 'ca_bridge_fleet_nodes{state="silent"} 0\n' in text
    end = f"{(NOW - timedelta(days=1)).timestamp():.0f}"
    assert f'ca_bridge_fleet_node_next_end_timestamp_seconds{{cluster="kubernetes",node="cp-1"}} {end}\n' in text


def test_the_command_shows_them_at_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 3 if one needs a person; a node with a secret that has not asked is there, too. Readers make no database."""
    desk = make_desk(tmp_path / "desk", handmade_pki(tmp_path / "pki"))
    for reader in (("fleet",), ("enrolments", "list"), ("serve-database", "status")):
        refused = desk.run(*reader)
        assert (refused.returncode, (desk.state / "door.db").exists()) == (Exit.USAGE, False), refused.stdout
        assert f"{desk.state}/door.db: there is no database of a door" in " ".join(refused.stderr.split())
        assert "`ca-bridge serve` and `enroll` make the database" in " ".join(refused.stderr.split())
    with contextlib.closing(open_memory(load(desk.config), may_make=True)):
        assert (desk.state / "door.db").stat().st_mode & 0o777 == 0o600
    assert desk.run("fleet").stdout == "no nodes: none has asked this door yet\n"
    assert desk.run("enroll", "cp-9").returncode == Exit.DONE
    new = desk.run("fleet")
    memory = DoorDatabase(sqlite_url(desk.state / "door.db"))
    asked(memory, "cp-1", timedelta(days=400), left=-timedelta(days=1))
    memory.close()
    shown = desk.run("fleet", "-o", "json")
    monkeypatch.setenv("COLUMNS", "80")
    narrow = desk.run("fleet").stdout

    assert (new.returncode, new.stdout.split()[:2]) == (Exit.DONE, ["new", "cp-9"])
    assert shown.returncode == Exit.DUE
    assert narrow.split()[:2] == ["expired", "cp-1"]
    assert max(map(len, narrow.splitlines())) <= 80
    assert [(one["node"], one["state"]) for one in json.loads(shown.stdout)["nodes"]] == [
        ("cp-1", "expired"),
        ("cp-9", "new"),
    ]
    assert 'ca_bridge_fleet_nodes{state="new"} 1' in desk.run("fleet", "-o", "prometheus").stdout
