"""Generated answers, whole, odd and broken, to our client and to curl: what curl calls broken has no body for us, either."""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from bridge.system import http
from bridge.system.http import ask, pool
from bridge.system.tls import HttpsError, Peer
from bridge.system.waiting import workers

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")

_SEED, _COUNT = 20261202, 400
_SECONDS = 20.0
_STATUS = (
    "HTTP/1.1 200 OK",
    "HTTP/1.1 200",
    "HTTP/1.0 200 OK",
    "HTTP/1.1 404 Not Found",
    "HTTP/1.1 503 x",
    "HTTP/1.1  200 OK",
)
_ODD_STATUS = ("HTTP/1.1 20 OK", "HTTP/1.1 abc", "HTP/1.1 200 OK", "HTTP/1.1 2000 OK", " HTTP/1.1 200 OK", "")
_INTERIM = ("HTTP/1.1 100 Continue", "HTTP/1.1 103 Early Hints\r\nLink: </a>", "HTTP/1.1 102 Processing")
_ODD_LENGTHS = ("-1", "+5", "0x5", "5, 6", "5 5", "1_0", "99999999999999999999", "", "five")
_ODD_SIZES = ("-5", "+5", "0x5", "1_0", "five", "", " 5", "5 5", "ffffffffffffffffff")
_ODD_FIELDS = ("no colon", ": no name", "Bad Name: x", "A: b\r\n folded", "X: \0")


def _chunked(random_: random.Random, body: bytes, *, is_odd: bool) -> bytes:
    """Cut a body into chunks, some with extensions; an odd one has one flaw in a size, an end, the last chunk or a trailer."""
    parts: list[bytes] = []
    rest, text = body, b""
    while rest:
        size = random_.randint(1, len(rest))
        parts.append(rest[:size])
        rest = rest[size:]
    flawed = random_.randrange(len(parts)) if parts and is_odd else -1
    for number, part in enumerate(parts):
        length = f"{len(part):x}"
        end = b"\r\n"
        if number == flawed and random_.random() < 1 / 2:
            length = random_.choice(_ODD_SIZES)
        elif number == flawed:
            end = random_.choice([b"", b"XX", b"\n"])
        text += length.encode() + random_.choice([b"", b";a=b", b';a="b"', b" "]) + b"\r\n" + part + end
    last = random_.choice([b"0\r\n", b"000\r\n", b"0;x\r\n"])
    trailer = random_.choice([b"", b"X-Sum: 1\r\n", b"A: b\r\nC: d\r\n"])
    return text + last + trailer + b"\r\n"


def _answer(random_: random.Random) -> bytes:
    """One answer, which ends with its connection; half of them have a flaw."""
    body = random_.randbytes(random_.choice([0, 1, 5, 40, 3000]))
    flaw = random_.choice(
        ["", "", "", "status", "length", "two lengths", "chunks", "cut", "cut", "coding", "field", "more"]
    )
    fields = random_.choices(["Server: x", "Content-Type: a/b", "X: y", "Date: z"], k=random_.randint(0, 3))
    status = random_.choice(_ODD_STATUS if flaw == "status" else _STATUS)
    kind = random_.choice(["length", "chunks", "close"])
    kind = "length" if flaw in {"length", "two lengths"} else "chunks" if flaw == "chunks" else kind
    text = body
    if kind == "length":
        fields.append(f"Content-Length: {random_.choice(_ODD_LENGTHS) if flaw == 'length' else len(body)}")
        fields += [f"Content-Length: {len(body) + random_.choice([0, 1, 7])}"] * (flaw == "two lengths")
    if kind == "chunks":
        status = status.replace("HTTP/1.0", "HTTP/1.1")
        fields.append("Transfer-Encoding: chunked")
        text = _chunked(random_, body, is_odd=flaw == "chunks")
    fields += ["Transfer-Encoding: gzip, chunked"] * (flaw == "coding")
    fields += [random_.choice(_ODD_FIELDS)] * (flaw == "field")
    fields += random_.choice([[], ["Connection: close"], ["Connection: keep-alive"]])
    random_.shuffle(fields)
    interim = "".join(f"{random_.choice(_INTERIM)}\r\n\r\n" for _ in range(random_.choice([0, 0, 0, 0, 1, 2])))
    end = random_.choice(["\r\n", "\r\n", "\r\n", "\n"])
    whole = interim.encode() + end.join([status, *fields, "", ""]).encode("latin-1") + text
    if flaw == "cut":
        return whole[: random_.randrange(len(whole))]
    return whole + (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nLATE" if flaw == "more" and kind != "close" else b"")


def answers() -> list[bytes]:
    """The same ones in each run."""
    random_ = random.Random(_SEED)  # noqa: S311 (the same ones in each run)
    return [_answer(random_) for _ in range(_COUNT)]


@contextlib.contextmanager
def serving(texts: Sequence[bytes], *, keeps: bool = False) -> Iterator[Peer]:
    """A server that answers a path such as `/3` with that text; it ends each connection, or has it go on."""
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listening:

        def serve(opened: socket.socket) -> None:
            with opened, contextlib.suppress(OSError, ValueError, IndexError):
                opened.settimeout(_SECONDS)
                received = b""
                while piece := opened.recv(65536):
                    received += piece
                    while b"\r\n\r\n" in received:
                        head, _, received = received.partition(b"\r\n\r\n")
                        opened.sendall(texts[int(head.split(b" ")[1][1:])])
                        if not keeps:
                            opened.shutdown(socket.SHUT_WR)
                            opened.recv(65536)
                            return

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield Peer(host="127.0.0.1", port=listening.getsockname()[1])
        listening.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True)
class Verdict:
    """What a client makes of an answer: the status and the body, or that it is broken."""

    is_whole: bool
    status: int = 0
    body: bytes = b""


def by_curl(peer: Peer, number: int, directory: Path) -> Verdict:
    """One answer by curl."""
    file = directory / str(number)
    options = ["--disable", "--silent", "--http1.1", "--max-time", f"{_SECONDS:g}", "--write-out", "%{http_code}"]
    run = subprocess.run(
        ["curl", *options, "--output", file, f"http://127.0.0.1:{peer.port}/{number}"], capture_output=True, check=False
    )
    return Verdict(run.returncode == 0, int(run.stdout), file.read_bytes() if file.exists() else b"")


def by_us(peer: Peer, number: int, *odd: type[Exception]) -> Verdict:
    """The answer by our client; `odd`: what http.client raises at lengths that our checks refuse."""
    broken: tuple[type[Exception], ...] = (HttpsError, *odd)
    with contextlib.closing(pool(peer)) as connections:
        try:
            answer = ask(connections, "GET", f"/{number}", {}, seconds=_SECONDS)
        except broken:
            return Verdict(is_whole=False)
    return Verdict(is_whole=True, status=answer.status, body=answer.body)


@pytest.fixture(scope="module")
def curls(tmp_path_factory: pytest.TempPathFactory) -> list[Verdict]:
    """What curl makes of all of them."""
    directory = tmp_path_factory.mktemp("curl")
    with serving(answers()) as peer, workers(8) as threads:
        return list(threads.map(lambda number: by_curl(peer, number, directory), range(_COUNT)))


def differences(curls: Sequence[Verdict], *odd: type[Exception]) -> list[tuple[bytes, Verdict, Verdict]]:
    """Answers of which we have a body that curl does not have, or another one."""
    texts = answers()
    with serving(texts) as peer:
        found = [
            (text, curl, by_us(peer, number, *odd))
            for number, (text, curl) in enumerate(zip(texts, curls, strict=True))
        ]
    return [(text, curl, ours) for text, curl, ours in found if ours.is_whole and ours != curl]


def test_what_curl_refuses_has_no_body(curls: Sequence[Verdict]) -> None:
    """Of 400 answers we take none that curl calls broken, and the others with curl's status and body, if we take them."""
    assert differences(curls) == []
    texts = answers()
    with serving(texts) as peer:
        taken = sum(by_us(peer, number).is_whole for number in range(_COUNT))
    refused = sum(not curl.is_whole for curl in curls)
    assert taken > _COUNT / 4, "most answers without a flaw are taken"
    assert refused > _COUNT / 8, "curl finds many flaws"


def test_the_comparison_can_fail(curls: Sequence[Verdict], monkeypatch: pytest.MonkeyPatch) -> None:
    """With http.client's own reading of lines and ends there are answers that curl refuses and we would take."""
    monkeypatch.setattr(http._Received, "readline", io.BufferedReader.readline)
    assert differences(curls, ValueError, OverflowError)


GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood"
IN_CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
#: The flaws of a review, by its number, each beside the answer without it.
FLAWS = {
    "E13-a length of -1": (IN_CHUNKS + b"-1\r\ngood\r\n0\r\n\r\n", IN_CHUNKS + b"4\r\ngood\r\n0\r\n\r\n"),
    "E13-a length of -2": (IN_CHUNKS + b"-2\r\ngood\r\n0\r\n\r\n", IN_CHUNKS + b"04\r\ngood\r\n0\r\n\r\n"),
    "E14-a length of 0x4": (IN_CHUNKS + b"0x4\r\ngood\r\n0\r\n\r\n", IN_CHUNKS + b"004\r\ngood\r\n0\r\n\r\n"),
    "E14-a length of +4": (IN_CHUNKS + b"+4\r\ngood\r\n0\r\n\r\n", IN_CHUNKS + b"4;a=b\r\ngood\r\n0\r\n\r\n"),
    "E14-a length of 0_4": (IN_CHUNKS + b"0_4\r\ngood\r\n0\r\n\r\n", IN_CHUNKS + b"4 \r\ngood\r\n0\r\n\r\n"),
    "E14-a wrong end of a chunk": (
        IN_CHUNKS + b"4\r\ngoodXX0\r\n\r\n",
        IN_CHUNKS + b"2\r\ngo\r\n2\r\nod\r\n0\r\n\r\n",
    ),
    "E14-an end within a padded length": (
        IN_CHUNKS + b"4\r\ngood\r\n0000",
        IN_CHUNKS + b"4\r\ngood\r\n0000\r\n\r\n",
    ),
    "E14-a trailer without an end": (
        IN_CHUNKS + b"4\r\ngood\r\n0\r\nX: y\r\n",
        IN_CHUNKS + b"4\r\ngood\r\n0\r\nX: y\r\n\r\n",
    ),
    "E14-two fields of codings": (
        IN_CHUNKS.replace(b"Transfer", b"Transfer-Encoding: gzip\r\nTransfer", 1) + b"4\r\ngood\r\n0\r\n\r\n",
        IN_CHUNKS.replace(b"Transfer", b"X-Encoding: gzip\r\nTransfer", 1) + b"4\r\ngood\r\n0\r\n\r\n",
    ),
    "E14-an end before its length": (GOOD[:-1], GOOD),
}


@pytest.mark.attack("E13", "E14")
@pytest.mark.parametrize("name", FLAWS)
def test_each_flaw_of_a_review_is_refused_as_by_curl(name: str, tmp_path: Path) -> None:
    """Neither client has a body of it; without the flaw both have the same. No other kind of exception gets through."""
    with serving(FLAWS[name]) as peer:
        flawed, whole = (by_us(peer, number) for number in (0, 1))
        assert (flawed.is_whole, by_curl(peer, 0, tmp_path).is_whole) == (False, False)
        assert whole == by_curl(peer, 1, tmp_path) == Verdict(is_whole=True, status=200, body=b"good")


@pytest.mark.attack("E16")
@pytest.mark.parametrize("is_early", [True, False])
def test_an_answer_before_the_request_is_none(is_early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """curl takes it, since no client can know of an answer that comes later; ours takes none that is there already."""
    connected = Peer.connected

    def slowly(peer: Peer, seconds: float) -> socket.socket:
        opened = connected(peer, seconds)
        time.sleep(0.3)
        return opened

    monkeypatch.setattr(Peer, "connected", slowly)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with listening.accept()[0] as opened, contextlib.suppress(OSError):
                opened.sendall(GOOD if is_early else b"")
                opened.recv(65536)
                opened.sendall(b"" if is_early else GOOD)

        threading.Thread(target=serve, daemon=True).start()
        verdict = by_us(Peer(host="127.0.0.1", port=listening.getsockname()[1]), 0)
    assert verdict.is_whole is not is_early


NEXT = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nNEXT"
CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\ngood\r\n0\r\n\r\n"
FIRST = {
    "nothing more": GOOD,
    "another answer": GOOD + NEXT,
    "another one's head": GOOD + NEXT[:-4],
    "another one's first bytes": GOOD + NEXT[:9],
    "a line end": GOOD + b"\r\n",
    "bytes": GOOD + b"x" * 70_000,
    "chunks": CHUNKS,
    "chunks and another answer": CHUNKS + NEXT,
    "an early hint": b"HTTP/1.1 103 Early Hints\r\n\r\n" + GOOD,
    "two early hints": b"HTTP/1.1 103 Early Hints\r\n\r\n" * 2 + GOOD,
    "another protocol": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n" + GOOD,
    "no content, and a body": b"HTTP/1.1 204 No Content\r\nContent-Length: 4\r\n\r\ngood",
    "a chunk with a wrong end": CHUNKS.replace(b"good\r\n", b"goodXX") + NEXT,
}


@pytest.mark.parametrize("first", FIRST.values(), ids=FIRST)
def test_what_is_left_of_an_answer_never_reaches_the_next_request(first: bytes) -> None:
    """Each following request over the same pool has its own answer, whatever the first one's connection brought."""
    texts = [first, *(GOOD.replace(b"good", b"%04d" % number) for number in range(1, 4))]
    with serving(texts, keeps=True) as peer, contextlib.closing(pool(peer)) as connections:
        with contextlib.suppress(HttpsError):
            assert ask(connections, "GET", "/0", {}, seconds=_SECONDS).body in {b"good", b""}
        following = [ask(connections, "GET", f"/{number}", {}, seconds=_SECONDS) for number in range(1, 4)]
    assert [answer.body for answer in following] == [b"0001", b"0002", b"0003"]
