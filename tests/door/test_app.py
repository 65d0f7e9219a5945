"""What the door takes from an address, and how long it lets a node wait."""

from __future__ import annotations

import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa

from bridge.desk.node_identity import Identity
from bridge.desk.workers import ReadBundle
from bridge.door.app import METRICS, Door, monitors_page
from bridge.door.store import DoorDatabase, sqlite_url
from bridge.pki.bundle import RequestBundle
from bridge.pki.bundle_format import digest, dumps, loads_request
from bridge.settings import Source
from bridge.settings.tables import ServeSettings, Settings
from bridge.system.waiting import wait_until
from tests.kit.bundles import make_bundle, old_pairs
from tests.kit.pki import Pki

NOW = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)


_PATIENCE = timedelta(minutes=3)


def now() -> datetime:
    return datetime.now(UTC)


def received(memory: DoorDatabase, digest_: str = "aa", **more: Any) -> str:
    values = {"digest": digest_, "node": "cp-1", "cluster": "kubernetes", "peer": "192.0.2.1", "now": NOW, **more}
    return memory.receive(values.pop("data", b"bundle"), **values)


def fill(memory: DoorDatabase) -> None:
    """Let SQLite itself say that its disk is full, and let all that waits in its log be in the file."""
    with memory.engine.connect() as connection:
        connection.execute(sa.text("PRAGMA wal_checkpoint(TRUNCATE)"))
    memory.engine.dispose()

    @sa.event.listens_for(memory.engine, "connect")
    def limited(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA max_page_count = 1")  # SQLite takes it as "no more than there are"


def posted(door: Door, data: bytes, peer: str = "192.0.2.1") -> tuple[str, dict[str, str], dict[str, Any]]:
    """Status, headers and document of an answer."""
    started: list[Any] = []
    environ = {
        "REQUEST_METHOD": "POST", "PATH_INFO": "/v1/requests", "CONTENT_TYPE": "application/json",
        "CONTENT_LENGTH": str(len(data)), "wsgi.input": BytesIO(data), "REMOTE_ADDR": peer,
    }  # fmt: skip
    body = b"".join(door(environ, lambda status, headers: started.extend([status, dict(headers)])))
    return started[0], started[1], json.loads(body)


def unjudged(bundle: RequestBundle) -> ReadBundle:
    return ReadBundle(bundle=bundle, digest=digest(bundle))


def make_application(
    memory: DoorDatabase,
    *,
    is_judged: bool = True,
    a_minute: int = 1000,
    waiting: int = 10,
    nodes: bytes = b"nodes 1\n",
    **more: Any,
) -> Door:
    serve = ServeSettings(waiting=waiting, waiting_per_peer=waiting, requests_per_minute=a_minute, **more)
    signing: Any = SimpleNamespace(
        read=lambda data, _: unjudged(loads_request(data)),
        judged=lambda one, _: one,
        identity=lambda *_, **__: Identity(),
        refused=lambda *_: "",
        judges=lambda _: is_judged,
        arrived=threading.Event(),
    )
    pages = {"/healthz": lambda: monitors_page(200, "ok\n"), METRICS: lambda: monitors_page(200, "up 1\n", nodes)}
    return Door(Settings(source=Source(None, ""), serve=serve), memory, signing, now, pages)


def got(door: Door, path: str, peer: str = "192.0.2.1") -> tuple[str, list[bytes]]:
    """Status and pieces of the answer to a GET."""
    statuses: list[str] = []
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": path, "REMOTE_ADDR": peer}
    pieces = list(door(environ, lambda status, _: statuses.append(status)))
    return statuses[0], pieces


@pytest.mark.attack("D8")
def test_one_address_writes_one_line_a_minute_about_its_rate(
    memory: DoorDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    """Each answer below the rate is a line; of a thousand above it one is, and the metrics count them."""
    door = make_application(memory, a_minute=3)
    with caplog.at_level(logging.INFO):
        for _ in range(1000):
            posted(door, b"text")
        posted(door, b"text", peer="192.0.2.2")
    about = [record.getMessage() for record in caplog.records]

    assert sum("400 in" in text for text in about) == 4
    assert [text for text in about if "429" in text] == [
        "192.0.2.1 sends more than 3 requests a minute; answers of 429 to all addresses so far: 1"
    ]
    assert door.answers[429] == 997


@pytest.mark.attack("D11")
def test_the_settings_say_which_addresses_read_the_metrics(memory: DoorDatabase) -> None:
    """Without the setting everyone; with it no stranger, also not one who asks by IPv6 for a part of an IPv4 network."""
    monitors = ("192.0.2.0/28", "2001:db8::/64")
    closed, all_read = make_application(memory, metrics_for=monitors), make_application(memory)
    good, bad = ("192.0.2.1", "::ffff:192.0.2.1", "2001:db8::1"), ("192.0.2.16", "::ffff:192.0.2.16", "2001:db8:0:1::")

    assert {got(closed, METRICS, peer)[0] for peer in good} == {"200 OK"}
    assert {got(closed, METRICS, peer)[0] for peer in bad} == {"403 Forbidden"}
    assert {got(all_read, METRICS, peer)[0] for peer in bad} == {"200 OK"}
    assert {got(closed, "/healthz", peer)[0] for peer in bad} == {"200 OK"}


@pytest.mark.attack("D11")
def test_a_long_page_is_sent_in_pieces(memory: DoorDatabase) -> None:
    """Clients that read slowly share one text; cheroot would hold two copies of it for each of them."""
    text = b"x" * 3_000_000
    _, pieces = got(make_application(memory, nodes=text), METRICS)

    assert b"".join(pieces) == b"up 1\n" + text
    assert max(map(len, pieces)) <= 65536


def test_one_address_has_a_rate(memory: DoorDatabase) -> None:
    """The answer to one more says when to come again; another address gets its answer."""
    door = make_application(memory, a_minute=3)
    statuses = [posted(door, b"text")[0] for _ in range(4)]
    late = posted(door, b"text")[1]

    assert statuses == [*["400 Bad Request"] * 3, "429 Too Many Requests"]
    assert 1 <= int(late["Retry-After"]) <= 20
    assert posted(door, b"text", peer="192.0.2.2")[0] == "400 Bad Request"


def test_what_can_not_be_judged_gets_a_tenth_of_the_room(memory: DoorDatabase, pki: Pki) -> None:
    """A stranger fills that while no CA was reached, and a node whose request can be judged still gets in."""
    first, second, third = (dumps(make_bundle(old_pairs(pki, ["apiserver"]))) for _ in range(3))
    unjudged = make_application(memory, is_judged=False)
    statuses = [posted(unjudged, first)[0], posted(unjudged, second)[0], posted(unjudged, second, peer="192.0.2.2")[0]]

    assert statuses == ["202 Accepted", "429 Too Many Requests", "503 Service Unavailable"]
    assert posted(make_application(memory), third)[0] == "202 Accepted"


def test_what_can_not_be_judged_is_not_long(memory: DoorDatabase, pki: Pki) -> None:
    """A stranger's, of which rounds hold two hundred, would take a door's memory; a node's comes again for its CA."""
    data = dumps(make_bundle(old_pairs(pki, ["apiserver"])))
    long = data + b" " * ((64 << 10) + 1 - len(data))
    unjudged = make_application(memory, is_judged=False, waiting=1000)
    status, headers, document = posted(unjudged, long)

    assert (status, headers["Retry-After"]) == ("503 Service Unavailable", "30")
    assert document["error"] == "wanted at most 65536 bytes for a CA that was not reached yet, found 65537"
    assert posted(make_application(memory), long)[0] == "202 Accepted"
    assert posted(unjudged, dumps(make_bundle(old_pairs(pki, ["apiserver"]))))[0] == "202 Accepted"


def test_where_many_wait_nodes_look_again_later(memory: DoorDatabase, pki: Pki) -> None:
    """A second for each 60 that were there before; those for people don't count."""
    first, second = (dumps(make_bundle(old_pairs(pki, ["apiserver"]))) for _ in range(2))
    door = make_application(memory, waiting=250)
    waiting = [received(memory, f"{number}") for number in range(180)]
    many = posted(door, first)[1]["Retry-After"]
    for request in waiting[:60]:
        memory.conclude(request, b"{}", [], now(), "")
    fewer = posted(door, first)[1]["Retry-After"]
    for request in waiting[60:]:
        memory.move(request, "undecided", before=["waiting"])
    few = posted(door, second)[1]["Retry-After"]

    assert (many, fewer, few) == ("3", "2", "1")


def test_an_answer_that_comes_soon_is_waited_for(memory: DoorDatabase) -> None:
    """By as many threads as there are places; a further one gets the request as it is."""
    kept = memory.find(received(memory, "aa"))
    assert kept is not None
    door = make_application(memory, threads=4, exchange_for=2 * _PATIENCE)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(door.awaited, kept, _PATIENCE)
        wait_until(lambda: door._places._value, lambda places: not places, _PATIENCE, pause_seconds=0.01)
        second = door.awaited(kept, _PATIENCE)
        memory.conclude(kept.id, b"{}", [], now(), "")
        answered = first.result(_PATIENCE.total_seconds())

    assert (answered.answer, second) == (b"{}", kept)
    assert door.awaited(kept, timedelta()).answer == b"{}"


def test_a_full_disk_takes_no_request(tmp_path: Path, bundle: RequestBundle, caplog: pytest.LogCaptureFixture) -> None:
    """503 with Retry-After, and a sentence without the database's own words, which the log has."""
    memory = DoorDatabase(sqlite_url(tmp_path / "door.db"))
    door = make_application(memory)
    big = json.dumps({**json.loads(dumps(bundle)), "digest": digest(bundle)}).encode() + b" " * 100_000
    fill(memory)
    full = posted(door, big)
    with memory.engine.begin() as connection:
        connection.execute(sa.text("PRAGMA max_page_count = 100000"))
        assert connection.execute(REQUEST_COUNT).scalar() == 0
    memory.close()

    assert full[0] == "503 Service Unavailable"
    assert full[1]["Retry-After"] == "30"
    assert full[2]["error"] == "the database does not answer; the door's log says why"
    assert "is full" in caplog.text


REQUEST_COUNT = sa.text("SELECT count(*) FROM requests")
