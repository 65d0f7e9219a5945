"""The HTTPS client tells an answer from a refusal and a refusal from silence, within its time, with keys in memory."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from bridge.node import sample_pki
from bridge.pki.certificates import load_pem_certificates, serial
from bridge.system import https
from bridge.system.https import ClientRefusedError, HttpAnswer, UnreachableError, UntrustedError
from tests.kit.loopback import LoopbackServer


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A control plane's files, whose API server is on loopback."""
    directory = tmp_path_factory.mktemp("kubernetes")
    now = datetime.now(UTC)
    cluster = sample_pki.Cluster(address="127.0.0.1", endpoint="api.example.com:6443")
    sample_pki.make(directory, now=now, not_after=now + timedelta(days=1), key="ecdsa-p256", cluster=cluster)
    return directory / "pki"


class Handler(BaseHTTPRequestHandler):
    """Tells what it was asked."""

    def do_GET(self) -> None:
        """Large, endless or broken at the paths of these names, else the request's own words."""
        if self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.05)
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        said = f"{self.command} {self.path} {self.headers['Host']} {self.headers['X-One']} ".encode() + body
        if self.path == "/large":
            said = b"x" * (https.MAX_ANSWER_BYTES + 1)
        self.send_response(418)
        self.send_header("Content-Length", str(len(said) + (self.path == "/half")))
        self.end_headers()
        with contextlib.suppress(OSError):  # a client that has read enough
            self.wfile.write(said)

    do_POST = do_GET  # noqa: N815 (http.server's spelling)

    def log_message(self, *args: object) -> None:
        """Nothing."""


@contextlib.contextmanager
def server(pki: Path, *, client_ca: str = "", newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> Iterator[int]:
    """An API server's look-alike; with `client_ca` it insists on a client certificate from there, as etcd does."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = newest
    context.load_cert_chain(pki / "apiserver.crt", pki / "apiserver.key")
    if client_ca:
        context.load_verify_locations(pki / client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    with LoopbackServer(("127.0.0.1", 0), Handler) as listening:
        # the handshake in the connection's own thread, at its first use
        listening.socket = context.wrap_socket(listening.socket, server_side=True, do_handshake_on_connect=False)
        listening.handle_error = lambda *_: None  # type: ignore[method-assign]  # refusals are its job
        thread = threading.Thread(target=listening.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield listening.server_port
        finally:
            listening.shutdown()
            thread.join()


@contextlib.contextmanager
def tcp(answer: Callable[[socket.socket], object]) -> Iterator[int]:
    """A server that is none."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def work() -> None:
            with contextlib.suppress(OSError), listening.accept()[0] as opened:
                answer(opened)

        thread = threading.Thread(target=work)
        thread.start()
        yield listening.getsockname()[1]
        thread.join()


def pair(pki: Path, base: str) -> dict[str, Any]:
    """A client certificate and its key, as arguments."""
    certificate, key = ((pki / f"{base}{suffix}").read_bytes() for suffix in (".crt", ".key"))
    return {"certificate_pem": certificate, "key_pem": key}


def leaf(pki: Path, base: str) -> x509.Certificate:
    return load_pem_certificates((pki / f"{base}.crt").read_bytes())[0]


def ask(port: int, pki: Path, path: str = "/", *, seconds: float = 5, **more: Any) -> HttpAnswer:
    """Ask the server on loopback, and trust the cluster's CA."""
    arguments = {"trust_pem": (pki / "ca.crt").read_bytes(), "timeout_seconds": seconds, **more}
    return https.request(f"https://127.0.0.1:{port}{path}", **arguments)


def test_gives_the_whole_answer(pki: Path) -> None:
    """Status and body; the request arrives as it was meant."""
    with server(pki) as port:
        answer = ask(port, pki, "/a?b=c", method="POST", body=b"{}", headers={"X-One": "1"})
    assert answer.status == 418
    assert answer.body == f"POST /a?b=c 127.0.0.1:{port} 1 {{}}".encode()


def test_reads_no_more_than_it_must(pki: Path) -> None:
    """A body without end does not fill the memory."""
    with server(pki) as port:
        assert len(ask(port, pki, "/large").body) == https.MAX_ANSWER_BYTES


def test_shows_its_client_certificate(pki: Path) -> None:
    """Who insists on one gets it, in a request and in a bare handshake."""
    with server(pki, client_ca="ca.crt") as port:
        assert ask(port, pki, **pair(pki, "apiserver-kubelet-client")).status == 418


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_knows_a_refusal_from_silence(pki: Path, newest: ssl.TLSVersion) -> None:
    """A client certificate of another CA is refused and not merely unanswered."""
    with server(pki, client_ca="ca.crt", newest=newest) as port, pytest.raises(ClientRefusedError):
        ask(port, pki, **pair(pki, "front-proxy-client"))


def test_shows_what_is_served_to_nobody_in_particular(pki: Path) -> None:
    """A handshake needs no client certificate, no trust and no matching name, and ends without a request."""
    with server(pki, client_ca="ca.crt") as port:
        shown = https.served("127.0.0.1", port, timeout_seconds=5)
    assert serial(shown) == serial(leaf(pki, "apiserver"))


@pytest.mark.parametrize(
    ("anchor", "name"),
    [("front-proxy-ca.crt", None), ("ca.crt", "other.example.com")],
    ids=["issuer", "name"],
)
def test_trusts_only_what_it_was_told_to(pki: Path, anchor: str, name: str | None) -> None:
    """A server of another CA, and one with another name, are not believed."""
    trusted: dict[str, Any] = {"trust_pem": (pki / anchor).read_bytes(), "server_name": name}
    with server(pki) as port:
        with pytest.raises(UntrustedError):
            ask(port, pki, **trusted)
        with pytest.raises(UntrustedError):
            https.served("127.0.0.1", port, timeout_seconds=5, **trusted)


def test_takes_another_name_than_the_address(pki: Path) -> None:
    """A server may be asked at an address that its certificate does not name."""
    with server(pki) as port:
        assert ask(port, pki, server_name="api.example.com").status == 418


def test_nobody_there(pki: Path) -> None:
    """A closed port is unreachable, at once."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(UnreachableError, match="connection refused"):
        ask(port, pki)


def test_not_tls(pki: Path) -> None:
    """A port that speaks something else is unreachable, too."""
    with tcp(lambda opened: opened.sendall(b"220 welcome\r\n")) as port, pytest.raises(UnreachableError):
        ask(port, pki)


def test_a_silent_server_costs_no_more_than_the_time_limit(pki: Path) -> None:
    """One that accepts and says nothing."""
    begin = time.monotonic()
    with tcp(lambda opened: opened.recv(1 << 20, socket.MSG_WAITALL)) as port:
        with pytest.raises(UnreachableError, match=r"no answer within 0\.5 s"):
            ask(port, pki, seconds=0.5)
        assert time.monotonic() - begin < 2


def test_a_slow_server_costs_no_more_than_the_time_limit(pki: Path) -> None:
    """One that sends a byte now and then, each within any limit for a single read."""
    begin = time.monotonic()
    with server(pki) as port, pytest.raises(UnreachableError, match=r"no answer within 0\.5 s"):
        ask(port, pki, "/endless", seconds=0.5)
    assert time.monotonic() - begin < 3


def test_half_an_answer_is_none(pki: Path) -> None:
    """A server that dies within its answer has not answered."""
    with server(pki) as port, pytest.raises(UnreachableError):
        ask(port, pki, "/half")


def test_a_foreign_key_is_no_pair(pki: Path) -> None:
    """Certificate and key that don't belong together are refused before anybody is asked."""
    mixed = pair(pki, "apiserver-kubelet-client") | {"key_pem": (pki / "front-proxy-client.key").read_bytes()}
    with pytest.raises(ClientRefusedError, match="key values mismatch"):
        ask(1, pki, **mixed)


def test_an_encrypted_key_asks_nobody(pki: Path) -> None:
    """No passphrase is asked for at the terminal."""
    files = pair(pki, "apiserver-kubelet-client")
    key = serialization.load_pem_private_key(files["key_pem"], None)
    encrypted = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.BestAvailableEncryption(b"a passphrase"),
    )
    with pytest.raises(ClientRefusedError):
        ask(1, pki, **files | {"key_pem": encrypted})


def test_the_key_is_never_on_disk(pki: Path) -> None:
    """No file is opened to be written while a pair is loaded; one that is opened would be noticed."""
    program = """
import os, sys
from pathlib import Path
from bridge.system import https
opened = []
writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
sys.addaudithook(lambda e, a: opened.append(a[0]) if e == "open" and isinstance(a[0], str) and a[2] & writing else None)
pki = Path(sys.argv[1])
pair = [(pki / f"apiserver-kubelet-client{suffix}").read_bytes() for suffix in (".crt", ".key")]
https.context(None, *pair)
print(opened)
open(sys.argv[2], "wb").close()
print(opened)
"""
    noticed = str(pki / "noticed")
    command = [sys.executable, "-c", program, str(pki), noticed]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["[]", f"['{noticed}']"]
