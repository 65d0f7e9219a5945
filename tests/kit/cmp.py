"""
A real CMP registration authority on loopback (`tests/kit/modules/cmp-ra`), and what may stand between it and a client.

It serves any number of CAs, each below a path of its own, and departs from the RFCs in one way where the path says so.
The front passes requests on, with TLS if wanted, or answers in the place of the registration authority.
"""

from __future__ import annotations

import contextlib
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import requests
from cryptography.hazmat.primitives import serialization

from tests.kit import programs
from tests.kit.issuing import Signer, usage
from tests.kit.loopback import LoopbackServer, free_port

REFERENCE, SECRET = "k8s-cp1", "correct horse battery staple"
RA_SUBJECT = "/CN=CMP RA"
CONTENT_TYPE = "application/pkixcmp"
_START_SECONDS = 180


@dataclass(kw_only=True)
class RegistrationAuthority:
    """One that runs."""

    directory: Path
    port: int
    process: subprocess.Popen[bytes]

    def add_ca(self, name: str, certificate_pem: bytes, key_pem: bytes, *, days: int = 30) -> None:
        """Let it sign for a CA, with this validity where a request names none; the path begins with the name."""
        place = self.directory / name
        place.mkdir()
        (place / "days").write_text(str(days))
        (place / "ca.crt").write_bytes(certificate_pem)
        (place / "ca.key").write_bytes(key_pem)

    def url(self, name: str, behaviour: str = "") -> str:
        """The URL of a CA, without what follows from `/.well-known`; `behaviour` is one of CmpRa.java's."""
        return "/".join([f"http://127.0.0.1:{self.port}", name, *([behaviour] if behaviour else [])])

    def approve(self, name: str) -> None:
        """Let all requests of a CA's that wait be granted."""
        (self.directory / name / "approved").touch()

    def refuse(self, name: str, reason: str) -> None:
        """Let all of them be rejected."""
        (self.directory / name / "refused").write_text(reason)

    def lines(self, kind: str) -> list[dict[str, str]]:
        """What it has seen: `request`, `confirmation` (by the key `""`) or `revocation`."""
        found = [line.split() for line in (self.directory / "log").read_text().splitlines()]
        return [dict(part.partition("=")[::2] for part in line[1:]) for line in found if line[:1] == [kind]]

    def requests(self, name: str) -> list[dict[str, str]]:
        """Those for a CA, in their order."""
        return [line for line in self.lines("request") if line["ca"] == name]

    def mac(self) -> dict[str, Any]:
        """The settings' keys for a request that is protected by the shared secret."""
        return {"reference": REFERENCE, "secret_file": str(self.directory / "node.secret")}

    def signature(self) -> dict[str, Any]:
        """The settings' keys for a request that is signed by an agent."""
        files = {"client_cert": "client.crt", "client_key": "client.key", "trusted_file": "ra-root.crt"}
        return {key: str(self.directory / file) for key, file in files.items()}


@contextlib.contextmanager
def registration_authority(directory: Path, port: int = 0) -> Iterator[RegistrationAuthority]:
    """
    A running one, gone afterwards.

    Args:
        directory: For its files; what an earlier one left there is used again.
        port: Free unless given.
    """
    if not (directory / "ra.key").exists():
        make_files(directory)
    log = directory / "log"
    log.write_bytes(b"")
    with log.open("wb") as output:
        command = [str(programs.require("cmp-ra")), str(directory), str(port or free_port())]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield RegistrationAuthority(directory=directory, port=_port(process, log), process=process)
    finally:
        process.terminate()
        process.wait(180)


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        text = log.read_text()
        if text.startswith("listening on ") and text.endswith("\n"):
            return int(text.split()[2])
        time.sleep(0.02)
    raise AssertionError(f"cmp-ra does not listen (exit {process.poll()}):\n{log.read_text()}")


def make_files(directory: Path) -> None:
    """The registration authority's certificate and key, those of an agent, and a shared secret."""
    directory.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC)
    dates: Any = {"begin": now - timedelta(days=1), "end": now + timedelta(days=20)}
    root = Signer.make("CMP root", **dates)
    ra = Signer.make("CMP RA", parent=root, ca=False, key_usage=usage(), **dates)
    clients = Signer.make("agents", **dates)
    client = Signer.make("bridge-cp-1", parent=clients, ca=False, key_usage=usage(), **dates)
    other = Signer.make("others", **dates)
    foreign = Signer.make("bridge-cp-1", parent=other, ca=False, key_usage=usage(), **dates)
    files = {"ra": ra, "ra-root": root, "clients-ca": clients, "client": client, "others-ca": other, "foreign": foreign}
    for name, signer in files.items():
        (directory / f"{name}.crt").write_bytes(signer.certificate.public_bytes(serialization.Encoding.PEM))
        (directory / f"{name}.key").write_bytes(_key_pem(signer))
    (directory / "secrets").mkdir()
    (directory / "secrets" / REFERENCE).write_text(SECRET)
    (directory / "node.secret").write_text(f"{SECRET}\n")


def _key_pem(signer: Signer) -> bytes:
    return signer.key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the front says in the place of the registration authority."""

    status: int = 200
    content_type: str = CONTENT_TYPE
    body: bytes = b""
    length: int | None = None  #: Content-Length; None: the body's.
    headers: Mapping[str, str] = field(default_factory=dict)
    endless: bool = False  #: The body again and again, as long as the client takes it.
    after_seconds: float = 0.0


#: What a front does with an answer of the registration authority (or with the request, if it does not pass it on).
Change = Callable[[bytes], Reply]


@dataclass(kw_only=True)
class Front:
    """A server between a client and a registration authority."""

    target: str  #: Where requests are passed on to, without a path.
    change: Change | None
    instead: Reply | None
    url: str = ""  #: With its port, without a path.
    posts: int = 0
    sent_bytes: int = 0  #: Of bodies.
    stopped: threading.Event = field(default_factory=threading.Event)

    def reply(self, path: str, body: bytes) -> Reply:
        """To a request."""
        self.posts += 1
        if self.instead is not None:
            return self.instead
        with requests.Session() as session:
            session.trust_env = False
            got = session.post(self.target + path, body, headers={"Content-Type": CONTENT_TYPE}, timeout=180)
        if self.change is not None:
            return self.change(got.content)
        return Reply(status=got.status_code, content_type=got.headers["Content-Type"], body=got.content)


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        front: Front = self.server.front  # type: ignore[attr-defined]
        reply = front.reply(self.path, self.rfile.read(int(self.headers["Content-Length"])))
        front.stopped.wait(reply.after_seconds)
        with contextlib.suppress(ConnectionError, ssl.SSLError):  # of a client that has had enough
            self._send(reply, front)

    def _send(self, reply: Reply, front: Front) -> None:
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.content_type)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if not reply.endless:
            self.send_header("Content-Length", str(len(reply.body) if reply.length is None else reply.length))
        self.end_headers()
        while True:
            self.wfile.write(reply.body)
            front.sent_bytes += len(reply.body)
            if not reply.endless or front.stopped.is_set():
                return

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        """Nothing on the terminal."""


@contextlib.contextmanager
def front(
    target: str, change: Change | None = None, *, instead: Reply | None = None, tls: ssl.SSLContext | None = None
) -> Iterator[Front]:
    """
    A running front, gone afterwards.

    Args:
        target: Where requests are passed on to, without a path.
        change: Of what comes back from there; None: passed on as it is.
        instead: Answers at once, and passes nothing on.
        tls: A server's; None: plain HTTP.
    """
    server = LoopbackServer(("127.0.0.1", 0), _Handler)
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    url = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}"
    server.front = found = Front(target=target, change=change, instead=instead, url=url)  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        found.stopped.set()
        server.shutdown()
        server.server_close()
