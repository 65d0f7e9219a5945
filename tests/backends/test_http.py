"""Each client of HTTP, in front of a server that sends what it likes: an error of ours, in time, and in little memory."""

from __future__ import annotations

import gzip
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests

from backends.http import Http, Wording
from backends.settings import tls_context
from bridge.errors import BackendError, BackendRefusedError, BackendUnavailableError, NoVerdictError, SettingsError
from tests.kit import est
from tests.kit.loopback import free_port

Talk = Callable[[socket.socket], None]

#: The clients, each of which calls `ask` with the URL of the server; its own limit of time is LIMIT, in seconds.
CLIENTS = {
    "component": """
from bridge import cluster
cluster.TIMEOUT_SECONDS = LIMIT
def ask(url):
    return cluster.ANONYMOUS.ask(cluster.Server(url), "/healthz").status
""",
    "node": """
from bridge import cluster
from bridge.cluster import api
api.NODE_TIMEOUT_SECONDS = LIMIT
def ask(url):
    return api.Api([cluster.ANONYMOUS], [cluster.Server(url)]).ask("GET", "/api").status
""",
    "door": """
from bridge import cluster
from bridge.cluster import api
api.TIMEOUT_SECONDS = LIMIT
def ask(url):
    made = api.Api([cluster.ANONYMOUS], [cluster.Server(url)], again=lambda: None)
    return made.ask("GET", "/api").status
""",
    "watch": """
from bridge import cluster
from bridge.cluster import api
api.TIMEOUT_SECONDS = LIMIT
def ask(url):
    made = api.Api([cluster.ANONYMOUS], [cluster.Server(url)], again=lambda: None)
    with made.lines("/api?watch=1", LIMIT, 1000) as lines:
        for line in lines:
            pass
    return 200
""",
    "vault": """
from backends.vault.settings import VaultSettings
from backends.vault.server import Server
from datetime import timedelta
def ask(url):
    return Server(VaultSettings(url=url, timeout=timedelta(seconds=LIMIT))).anonymous.read("sys/health").or_raise().status
""",
    "vault's login": """
from backends.vault.settings import VaultSettings
from backends.vault.server import Server
from datetime import timedelta
def ask(url):
    client = Server(VaultSettings(url=url, timeout=timedelta(seconds=LIMIT))).anonymous
    return client.auth.userpass.login("u", "p", use_token=False).or_raise().status
""",
    "others": """
from backends.http import Http, Wording
from datetime import timedelta
def ask(url):
    made = Http(Wording(name="est", not_ours="", tls=str), url, timedelta(seconds=LIMIT), lambda: None)
    return made.request("POST", url, json={}).status_code
""",
}
#: Says how it ended, how many seconds it took, and by how many MB the process has grown beyond what it needs anyway.
PROGRAM = r"""
import re, sys, time
from bridge.errors import BridgeError
def peak():  # getrusage counts the memory of the process that started this one, too
    return int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) / 1024
before, begin = peak(), time.monotonic()
try:
    found = ask(sys.argv[1])
except BridgeError as e:
    found = type(e).__name__
print(found, time.monotonic() - begin, peak() - before)
"""

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
PIECE = b"x" * (1 << 20)


def minus_one(opened: socket.socket) -> None:
    """A chunk whose length is no limit, and 150 MB."""
    opened.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n")
    for _ in range(150):
        opened.sendall(PIECE)


def drip(opened: socket.socket, piece: bytes) -> None:
    """A piece every 0.05 s, for ten minutes."""
    for _ in range(12_000):
        opened.sendall(piece)
        time.sleep(0.05)


def dripping_head(opened: socket.socket) -> None:
    """A header that never ends, a byte at a time."""
    opened.sendall(OK + b"X: ")
    drip(opened, b"x")


def flood_of_100(opened: socket.socket) -> None:
    """`100 Continue`, again and again."""
    for _ in range(2000):
        opened.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)


def drip_of_100(opened: socket.socket) -> None:
    """The same, slowly."""
    drip(opened, b"HTTP/1.1 100 Continue\r\n\r\n")


def trailers(opened: socket.socket) -> None:
    """An answer that is whole, but for what comes after its last chunk."""
    opened.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n")
    for _ in range(30_000):
        opened.sendall(b"X: " + b"x" * 60_000 + b"\r\n")
        time.sleep(0.02)


def honest(opened: socket.socket) -> None:
    """`100 Continue` once, then an answer of almost the size that all take."""
    body = b'{"a": "' + b"x" * 1_000_000 + b'"}\n'
    opened.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Transfer-Encoding: chunked\r\n\r\n")
    for begin in range(0, len(body), 4096):
        piece = body[begin : begin + 4096]
        opened.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
    opened.sendall(b"0\r\nX: y\r\n\r\n")


def take_request(opened: socket.socket) -> None:
    """Take its head and its body, which come one after the other; a close with unread bytes would reset the connection."""
    head, _, body = opened.recv(1 << 16).partition(b"\r\n\r\n")
    length = int(match[1]) if (match := re.search(rb"(?i)\r\ncontent-length: *([0-9]+)", head)) else 0
    while len(body) < length and (data := opened.recv(1 << 16)):
        body += data


@contextmanager
def server(talk: Talk, *, reads: bool = True) -> Iterator[str]:
    """Takes a request on each connection, unless `talk` does so itself; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def one(opened: socket.socket) -> None:
            with opened, suppress(OSError):
                if reads:
                    take_request(opened)
                talk(opened)

        def serve() -> None:
            with suppress(OSError):
                while True:
                    threading.Thread(target=one, args=[listener.accept()[0]], daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def asked(client: str, talk: Talk, limit: int = 1) -> tuple[str, float, float]:
    """How it ended, seconds, and MB."""
    with server(talk) as url:
        command = [sys.executable, "-P", "-c", f"LIMIT = {limit}\n{CLIENTS[client]}{PROGRAM}", url]
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=700)
    found, seconds, growth = run.stdout.split()
    return found, float(seconds), float(growth)


HEADS, BODIES = [dripping_head, flood_of_100, drip_of_100], [minus_one, trailers]


@pytest.mark.attack("G5", "G17")
@pytest.mark.parametrize(
    ("client", "talk"),
    # a watch has a limit for each of its lines, and none for all; see below
    [(client, talk) for client in CLIENTS for talk in [*HEADS, *([] if client == "watch" else BODIES)]],
)
def test_a_hostile_answer_costs_little(client: str, talk: Talk) -> None:
    """The received bytes are counted below the parser, and one limit of time holds for a head; the limits are 1 and 4 MB."""
    found, seconds, growth = asked(client, talk)
    assert found.endswith("Error")
    assert seconds < 300  # of a second, on a busy machine; each talks for ten minutes
    assert growth < 40


@pytest.mark.attack("G5")
def test_a_watch_holds_no_more_than_a_line() -> None:
    """The limit counts for any length that a chunk announces."""
    _, _, growth = asked("watch", minus_one)
    assert growth < 40


@pytest.mark.parametrize("client", CLIENTS)
def test_an_honest_answer_is_read(client: str) -> None:
    """A large answer in many chunks, with `100 Continue` before and a trailer behind, is read."""
    assert asked(client, honest, 180)[0] == "200"


# --- the one client of all backends -----------------------------------------------------------------------------------

BODY = OK + b"Content-Length: 2\r\n\r\n{}"


def ask(url: str, tls: est.Tls | None = None, *, seconds: float = 120, **files: Path | None) -> requests.Response:
    """One request of a backend that trusts this CA."""
    with closing(client(url, tls, seconds=seconds, **files)) as made:
        return made.request("POST", url, json={"secret": "s3cret"})


def client(url: str, tls: est.Tls | None = None, *, seconds: float = 120, **files: Path | None) -> Http:
    """A backend's client of HTTP."""
    wording = Wording(name="some", not_ours="is it ours?", tls=lambda text: f"tls: {text}", cut_off="cut off")
    files = {"ca_file": tls.ca if tls else None, "client_cert": None, "client_key": None, **files}
    return Http(wording, url, timedelta(seconds=seconds), partial(tls_context, **files))


def failure(url: str, tls: est.Tls | None = None, **more: Any) -> BackendError:
    """The error, in time and without what we sent."""
    began = time.monotonic()
    with pytest.raises(BackendError) as e:
        ask(url, tls, **more)
    assert time.monotonic() - began < 300
    assert str(e.value).startswith(f"some: {url}: ")
    assert "s3cret" not in str(e.value)
    return e.value


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> est.Tls:
    """A server's certificate, and its CA."""
    return est.make_tls(tmp_path_factory.mktemp("tls"))


@contextmanager
def in_tls(tls: est.Tls, talk: Talk, newest: ssl.TLSVersion = ssl.TLSVersion.MAXIMUM_SUPPORTED) -> Iterator[str]:
    """The same server inside TLS, after the request has come; its URL."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if newest > 0:
        context.minimum_version, context.maximum_version = newest, newest
        context.set_ciphers("ALL:@SECLEVEL=0")
    context.load_cert_chain(tls.server_cert, tls.server_key)

    def wrapped(opened: socket.socket) -> None:
        with context.wrap_socket(opened, server_side=True) as secure:
            take_request(secure)
            talk(secure)

    with server(wrapped, reads=False) as url:
        yield url.replace("http:", "https:")


def silent(opened: socket.socket) -> None:
    """Take what comes, and say nothing."""
    while opened.recv(1 << 16):
        pass


def dripping_body(opened: socket.socket) -> None:
    """A body that comes a byte at a time."""
    opened.sendall(OK + b"Content-Length: 100000\r\n\r\n")
    drip(opened, b"x")


def endless_headers(opened: socket.socket) -> None:
    """Header after header."""
    opened.sendall(OK)
    while True:
        opened.sendall(b"X-More: " + b"x" * 10_000 + b"\r\n")


def says(data: bytes) -> Talk:
    """Send this, and hang up."""
    return lambda opened: opened.sendall(data)


SLOW, CUT = [silent, dripping_head, dripping_body], [says(b""), says(OK + b"Content-Length: 1000\r\n\r\n{")]


@pytest.mark.parametrize("talk", SLOW, ids=lambda talk: talk.__name__)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_slow_server_costs_no_more_than_the_limit(tls: est.Tls, scheme: str, talk: Talk) -> None:
    """A head or a body that never comes to an end is unavailable when the time is over; over TLS, too."""
    with server(talk) if scheme == "http" else in_tls(tls, talk) as url:
        e = failure(url, tls, seconds=1)
    assert isinstance(e, BackendUnavailableError)
    assert "no answer within 1 s" in str(e)


def test_a_server_that_never_shakes_hands(tls: est.Tls) -> None:
    """The limit of time holds for the way to an answer, too."""
    with server(silent) as url:
        e = failure(url.replace("http:", "https:"), tls, seconds=1)
    assert isinstance(e, BackendUnavailableError)
    assert "no answer within 1 s" in str(e)


@pytest.mark.parametrize("talk", CUT, ids=["no answer", "half an answer"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_what_is_cut_off_may_come_whole_the_next_time(tls: est.Tls, scheme: str, talk: Talk) -> None:
    """A connection that ends too early is a server that is away."""
    with server(talk) if scheme == "http" else in_tls(tls, talk) as url:
        assert isinstance(failure(url, tls), BackendUnavailableError)


def test_a_server_that_goes_away_in_the_handshake(tls: est.Tls) -> None:
    """As behind a TCP load balancer without servers; the hint differs from that of a closed port."""
    with server(says(b"")) as url:
        e = failure(url.replace("http:", "https:"), tls)
    assert isinstance(e, BackendUnavailableError)
    assert e.hint == "cut off"
    e = failure(f"https://127.0.0.1:{free_port()}", tls)
    assert isinstance(e, BackendUnavailableError)
    assert "nothing listens there" in e.hint


@pytest.mark.parametrize(
    ("talk", "words"),
    [(endless_headers, ""), (says(b"+OK POP3 ready\r\n"), "POP3"), (says(b"HTTP/1.1 200 OK\r\nX\r\n\r\n"), "'X")],
    ids=["headers without end", "no HTTP", "no header"],
)
def test_what_is_no_answer(talk: Talk, words: str) -> None:
    """The message quotes the odd line."""
    with server(talk) as url:
        assert words in str(failure(url))


def test_a_long_answer_is_no_verdict() -> None:
    """A megabyte is enough for every CA."""
    with server(says(OK + b"Content-Length: 2000000\r\n\r\n" + b"x" * 2_000_000)) as url:
        e = failure(url)
    assert isinstance(e, NoVerdictError)
    assert e.hint == "is it ours?"


def test_an_encoding_that_was_not_asked_for_is_not_undone() -> None:
    """A thousand bytes would become a megabyte."""
    data = gzip.compress(b"x" * 1_000_000)
    with server(says(OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(data) + data)) as url:
        assert ask(url).content == data


@pytest.mark.parametrize("location", ["{other}/x", "/x", "//", "http://[", "http://a:b@c:99999/", "\xff"])
def test_a_redirect_is_an_answer(location: str) -> None:
    """It leads nowhere, wherever it points."""
    asked: list[bytes] = []
    with server(lambda opened: asked.append(opened.recv(1))) as other:
        to = location.format(other=other).encode("latin-1")
        with server(says(b"HTTP/1.1 307 Moved\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % to)) as url:
            assert ask(url).status_code == 307
    assert asked == []


def test_a_cookie_is_not_sent_back() -> None:
    """A session keeps connections, and nothing else."""
    heard: list[bytes] = []

    def talk(opened: socket.socket) -> None:
        while data := opened.recv(1 << 16):
            heard.append(data)
            opened.sendall(BODY.replace(b"\r\n\r\n", b"\r\nSet-Cookie: a=b; Path=/\r\n\r\n"))

    with server(talk, reads=False) as url, closing(client(url)) as made:
        for _ in range(2):
            assert made.request("GET", url).content == b"{}"
    assert len(heard) == 2
    assert b"ookie" not in b"".join(heard)


def test_the_environment_has_no_say(tls: est.Tls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither proxies, nor a .netrc, nor other CAs, nor a file for session keys; for `requests` itself they count."""
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login root password s3cret\n")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.setenv(name, str(est.make_tls(tmp_path / "other").ca))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    heard: list[bytes] = []

    def talk(opened: socket.socket) -> None:
        while data := opened.recv(1 << 16):
            heard.append(data)
            opened.sendall(BODY)

    with server(talk, reads=False) as url:
        with pytest.raises(requests.exceptions.ProxyError):
            requests.get(url, timeout=180)
        assert ask(url).status_code == 200
    assert b"Authorization" not in b"".join(heard)
    with in_tls(tls, says(BODY)) as url:
        assert ask(url, tls).status_code == 200
    assert not (tmp_path / "keys").exists()


def test_only_the_pinned_ca_or_else_the_systems(tls: est.Tls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that come with `requests` are not trusted; nothing is sent to a server with another certificate."""
    sent: list[bool] = []
    with in_tls(tls, lambda opened: sent.append(True) or opened.sendall(BODY)) as url:  # type: ignore[func-returns-value]
        monkeypatch.setattr("requests.adapters.DEFAULT_CA_BUNDLE_PATH", str(tls.ca))
        for other in (None, est.make_tls(tmp_path)):
            e = failure(url, other)
            assert isinstance(e, NoVerdictError)
            assert "CERTIFICATE_VERIFY_FAILED" in e.hint
        assert sent == []
        built_in = ssl.get_default_verify_paths()._replace(openssl_cafile=str(tls.ca))
        monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: built_in)
        assert ask(url).status_code == 200


@pytest.mark.parametrize("differences", [{"sans": ["127.0.0.2"]}, {"left": timedelta(minutes=-5)}])
def test_a_server_with_a_wrong_certificate(tmp_path: Path, differences: dict[str, Any]) -> None:
    """One for another name, or an expired one, though the CA is right."""
    wrong = est.make_tls(tmp_path, **differences)
    with in_tls(wrong, says(BODY)) as url:
        assert "CERTIFICATE_VERIFY_FAILED" in failure(url, wrong).hint


def test_a_server_without_tls(tls: est.Tls) -> None:
    """The backend's own hint asks for the port."""
    with server(says(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as url:
        e = failure(url.replace("http:", "https:"), tls)
    assert isinstance(e, NoVerdictError)
    assert e.hint.startswith("tls: ")


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated:DeprecationWarning")
def test_tls_1_1_is_refused(tls: est.Tls) -> None:
    """A server that knows nothing newer than TLS 1.1 is not talked to, though it would talk to others."""
    with in_tls(tls, says(BODY), newest=ssl.TLSVersion.TLSv1_1) as url:
        assert isinstance(failure(url, tls), BackendRefusedError)
        context = ssl.create_default_context(cafile=str(tls.ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_1
        context.set_ciphers("ALL:@SECLEVEL=0")
        with (
            socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=180) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as shaken,
        ):
            assert shaken.version() == "TLSv1.1"


def test_a_connection_is_kept_until_it_is_closed() -> None:
    """Several requests use one; after `close`, as for new credentials, the next one opens another."""
    opens: list[int] = []

    def talk(opened: socket.socket) -> None:
        opens.append(0)
        while opened.recv(1 << 16):
            opens[-1] += 1
            opened.sendall(BODY)

    with server(talk, reads=False) as url, closing(client(url)) as made:
        for _ in range(3):
            made.request("GET", url)
        made.close()
        made.request("GET", url)
    assert opens == [3, 1]


def test_tls_files_are_tried_before_they_are_needed(tls: est.Tls, tmp_path: Path) -> None:
    """Files that OpenSSL can't load are settings errors, an encrypted key among them; it never asks for a password."""
    other, locked = est.make_tls(tmp_path / "other"), tmp_path / "locked.key"
    command = ["openssl", "pkcs8", "-topk8", "-in", str(tls.server_key), "-passout", "pass:secret", "-out", str(locked)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    good: dict[str, Path | None] = {"ca_file": tls.ca, "client_cert": tls.server_cert, "client_key": tls.server_key}

    def wrong(**files: Path) -> list[str]:
        try:
            client("https://localhost", None, seconds=120, **{**good, **files}).close()
        except SettingsError as e:
            return [problem.key for problem in e.problems]
        return []

    assert wrong() == []
    assert wrong(ca_file=tmp_path / "none", client_key=other.server_key) == ["ca_file", "client_cert"]
    assert wrong(ca_file=tls.server_key) == ["ca_file"]
    for odd in (locked, tmp_path / "none", tmp_path):
        assert wrong(client_key=odd) == ["client_cert"]


def test_http_loads_no_cas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without TLS the system's CAs, which take 20 ms, are not loaded; with it they are."""
    loaded: list[ssl.SSLContext] = []
    monkeypatch.setattr("backends.settings.load_system_cas", loaded.append)
    client("http://127.0.0.1").close()
    assert loaded == []
    client("https://127.0.0.1").close()
    assert len(loaded) == 1
