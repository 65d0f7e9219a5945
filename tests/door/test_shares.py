"""One address and the others: a flood of costly bundles, and of slow clients, beside a node's request."""

from __future__ import annotations

import contextlib
import re
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.client import HTTPSConnection

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from bridge.pki.bundle_format import dumps
from bridge.system.waiting import FairQueue, FairSemaphore, wait_until
from tests.kit.bundles import make_bundle, old_pairs
from tests.kit.desks import Desk
from tests.kit.pki import Pki
from tests.kit.serving import ServeProgram, add_door, running

#: A flood's bundles, as many as one address may have connections but a few, and the requests in each.
_FLOOD, _REQUESTS = 60, 140
_PATIENCE = timedelta(minutes=3)
#: The program, in which a bundle may wait for its reading for as long as a busy machine takes for the whole flood.
_PATIENT = "from bridge.door import signing\nsigning._WORKER_SECONDS = 300.0\nfrom bridge.entry import main\nmain()"


def costly(pki: Pki) -> bytes:
    """A bundle near the limit of size, which takes a dozen times as long to read as a node's."""
    bundle, key = make_bundle(old_pairs(pki, ["apiserver"])), ec.generate_private_key(ec.SECP256R1())
    [one] = bundle.requests
    requests = []
    for number in range(_REQUESTS):
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, str(number))])
        csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
        requests.append(replace(one, name=f"p{number}", csr=csr))
    return dumps(replace(bundle, requests=tuple(requests)))


def client(door: ServeProgram, address: str) -> HTTPSConnection:
    """A connection from this address of the loopback network."""
    return HTTPSConnection(door.address, door.port, context=door.context(), timeout=180, source_address=(address, 0))


def post(door: ServeProgram, address: str, bundle: bytes) -> int:
    """The status of the answer to a bundle."""
    with closing(client(door, address)) as connection:
        connection.request("POST", "/v1/requests", bundle, {"Content-Type": "application/json"})
        return connection.getresponse().status


def test_a_flood_of_costly_bundles_keeps_no_other_address_waiting(desk: Desk, pki: Pki) -> None:
    """A node's request is answered before most of the flood that came before it, and the flood is answered, too."""
    bundle, honest = costly(pki), dumps(make_bundle(old_pairs(pki, ["apiserver"])))
    door = add_door(desk.config, desk.directory, 'exchange_for = "10m"')
    with running(door, [sys.executable, "-c", _PATIENT]), ThreadPoolExecutor(_FLOOD) as clients:
        flood = [clients.submit(post, door, "127.0.0.2", bundle) for _ in range(_FLOOD)]
        wait_until(lambda: done(flood), lambda count: count >= 5, _PATIENCE, pause_seconds=0.01)
        with closing(client(door, "127.0.0.3")) as connection:
            connection.request("POST", "/v1/requests", honest, {"Content-Type": "application/json"})
            sent = datetime.now(UTC)
            status = connection.getresponse().status
        statuses = [one.result() for one in flood]
    [answered] = answers(door, "127.0.0.3")

    assert status == 202
    assert statuses == [403] * _FLOOD
    assert len(answers(door, "127.0.0.2")) == _FLOOD
    assert sum(sent < one < answered for one in answers(door, "127.0.0.2")) <= _FLOOD // 3


def answers(door: ServeProgram, address: str) -> list[datetime]:
    """When the door answered requests from there: by its own log, since this process may stall by itself."""
    lines = [line for line in door.lines() if line["message"].startswith(f"POST /v1/requests from {address}: ")]
    return [datetime.fromisoformat(line["time"]) for line in lines]


def done(flood: Sequence[Future[int]]) -> int:
    """How many of its requests are answered."""
    return sum(one.done() for one in flood)


def test_slow_clients_of_one_address_leave_threads_to_others(desk: Desk) -> None:
    """They have three of four threads and go on waiting; each question from another address is answered meanwhile."""
    with (
        running(add_door(desk.config, desk.directory, 'threads = 4\nexchange_for = "10m"')) as door,
        contextlib.ExitStack() as stack,
    ):
        for _ in range(6):
            slow = socket.create_connection((door.address, door.port), timeout=180, source_address=("127.0.0.2", 0))
            stack.enter_context(slow).sendall(b"\x16")  # the first byte of a handshake
        # the connection of the question before may be open for a moment longer
        seen = [
            wait_until(lambda: connections(door), lambda one: one == (7, 4), _PATIENCE, pause_seconds=0.1)
            for _ in range(4)
        ]

    assert seen == [(7, 4)] * 4


def connections(door: ServeProgram) -> tuple[int, int]:
    """Those that are open, and those that have a thread, this question among them."""
    text = door.ask("GET", "/metrics").body.decode()
    found = dict(re.findall(r'serve_connections{kind="(\w+)"} (\d+)', text))
    return int(found["open"]), int(found["working"])


# --- the turns --------------------------------------------------------------------------------------------------------


def order(shares: FairQueue[int], *came: tuple[str, int]) -> list[tuple[str, int]]:
    """Those that have a place after these came."""
    for peer, one in came:
        shares.wait(peer, one)
    return list(iter(shares.next, None))


def test_an_address_has_three_quarters_of_the_places() -> None:
    """Its further ones wait until it gives one back; the other quarter is for others, however many addresses they have."""
    shares = FairQueue[int](4)

    assert order(shares, *(("a", number) for number in range(5))) == [("a", 0), ("a", 1), ("a", 2)]
    assert order(shares, ("b", 0), ("c", 0)) == [("b", 0)]
    shares.give_back("b")
    assert order(shares) == [("c", 0)]
    shares.give_back("a")
    assert order(shares) == [("a", 3)]
    assert order(FairQueue[int](1), ("a", 0), ("b", 0)) == [("a", 0)]


def test_addresses_take_turns() -> None:
    """The first of a short line is before the second of a long one; each line has its own order."""
    shares = FairQueue[int](1)
    shares.wait("z", 0)
    assert shares.next() == ("z", 0)
    came = [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("c", 0)]
    assert order(shares, *came) == []
    found = []
    for last in ["z", "a", "b", "c", "a", "b"]:
        shares.give_back(last)
        found += order(shares)

    assert found == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("b", 1), ("a", 2)]


def test_who_waits_in_vain_leaves_the_line() -> None:
    """A thread that got no place in time has none, and takes none from those behind it."""
    places = FairSemaphore(1)
    with places.taken("a", 0) as first, places.taken("b", 0.01) as second:
        pass
    with places.taken("c", 0) as third:
        pass

    assert (first, second, third) == (True, False, True)


def test_all_have_their_turn_in_the_end() -> None:
    """A server that ends lets those in that wait, and those that come."""
    shares = FairQueue[int](1)
    assert order(shares, ("a", 0), ("a", 1), ("b", 0)) == [("a", 0)]
    shares.open()

    assert order(shares, ("a", 2)) == [("b", 0), ("a", 1), ("a", 2)]
