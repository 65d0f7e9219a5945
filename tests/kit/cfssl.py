"""The real cfssl servers on free ports of this machine, TLS files for them, and a strict double for rare answers."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import ipaddress
import json
import secrets
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from backends.cfssl.settings import DISABLED, signing_config
from bridge.specs import Authority
from tests.kit import programs
from tests.kit.loopback import LoopbackServer, free_port

API = "/api/v1/cfssl"
_START_SECONDS = 180


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """Files for one server that wants client certificates; all below one CA unless said otherwise."""

    ca: Path
    server_cert: Path
    server_key: Path
    client_cert: Path
    client_key: Path
    client_cn: str | None = None  #: A regular expression on the CN of clients; None: any.
    mutual: bool = True


def serve(
    directory: Path,
    ca_cert_pem: bytes,
    ca_key_pem: bytes,
    config: Mapping[str, object] | None,
    *,
    tls: Tls | None = None,
    disable: bool | str = True,
    database: bool = False,
) -> contextlib.AbstractContextManager[str]:
    """
    A `cfssl serve` with one CA.

    Args:
        directory: For its files; made if it is not there.
        ca_cert_pem: The CA's certificate.
        ca_key_pem: Its key, PKCS#1, SEC1 or PKCS#8.
        config: The signing configuration; None: cfssl's open default.
        tls: HTTPS with these files; None: plain HTTP.
        database: What it signs is kept, in SQLite.
        disable: Only `authsign`, `info` and `health` are there; False: all; or the names of those that are not.

    Returns:
        A context manager; its value is the server's URL. It answers when the block begins, and is gone afterwards.
    """
    directory.mkdir(parents=True, exist_ok=True)
    command = [str(programs.require("cfssl")), "serve", "-address", "127.0.0.1"]
    command += ["-ca", _write(directory / "ca.crt", ca_cert_pem), "-ca-key", _write(directory / "ca.key", ca_key_pem)]
    if config is not None:
        command += ["-config", _write(directory / "config.json", json.dumps(config, indent=1).encode())]
    if database:
        with contextlib.closing(sqlite3.connect(directory / "certs.db")) as made:
            made.execute(_TABLE)
        place = {"driver": "sqlite3", "data_source": str(directory / "certs.db")}
        command += ["-db-config", _write(directory / "db.json", json.dumps(place).encode())]
    if disable:
        command += ["-disable", disable if isinstance(disable, str) else DISABLED]
    if tls:
        command += ["-tls-cert", str(tls.server_cert), "-tls-key", str(tls.server_key), "-min-tls-version", "1.2"]
    if tls and tls.mutual:
        command += ["-mutual-tls-ca", str(tls.ca)]
        command += ["-mutual-tls-cn", tls.client_cn] if tls.client_cn else []
    return running(lambda port: [*command, "-port", str(port)], directory, tls)


#: As cfssl's own migrations make it (certdb/sqlite/migrations, 001 and 002).
_TABLE = """
CREATE TABLE certificates (
  serial_number blob NOT NULL, authority_key_identifier blob NOT NULL, ca_label blob, status blob NOT NULL, reason int,
  expiry timestamp, revoked_at timestamp, pem blob NOT NULL, issued_at timestamp, not_before timestamp, metadata text,
  sans text, common_name text, PRIMARY KEY(serial_number, authority_key_identifier)
)"""


@contextlib.contextmanager
def serve_authority(
    directory: Path,
    authority: Authority,
    certificates: Mapping[str, x509.Certificate],
    validity: timedelta,
    *,
    ca_pem: tuple[bytes, bytes],
    tls: Tls | None = None,
) -> Iterator[dict[str, str]]:
    """
    A `cfssl serve` that is set up as `ca-bridge setup cfssl` says.

    Args:
        directory: For its files.
        authority: Whose certificates it signs.
        certificates: The live ones by name, of any authority.
        validity: Of what it signs.
        ca_pem: The CA's certificate and key.
        tls: As in `serve`.

    Returns:
        A context manager; its value are the keys of the settings' table `[authority.NAME]`, but `backend`.
    """
    config = signing_config(authority, certificates, validity, directory)
    write_hmac_keys(config)
    with serve(directory, *ca_pem, config, tls=tls) as url:
        table = {"url": url, "auth_key_file": f"{directory}/keys/{authority.name}-{{usage}}.hex"}
        if tls:
            table |= {"ca_file": str(tls.ca), "client_cert": str(tls.client_cert), "client_key": str(tls.client_key)}
        yield table


def write_hmac_keys(config: Mapping[str, Any]) -> None:
    """Make the key files that a signing configuration names."""
    for key in config["auth_keys"].values():
        path = Path(key["key"].removeprefix("file:"))
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, secrets.token_hex(32).encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """One CA of a multirootca."""

    cert_pem: bytes
    key_pem: bytes = field(repr=False)
    config: Mapping[str, object]
    nets: str = "127.0.0.0/8"  #: The addresses that it signs for.


def multirootca(
    directory: Path, roots: Mapping[str, Root], *, default: str | None = None, tls: Tls | None = None
) -> contextlib.AbstractContextManager[str]:
    """
    A `multirootca` (which knows no client certificates).

    Args:
        directory: For its files; made if it is not there.
        roots: By label, letters, digits and underscores.
        default: The label for requests without one; None: those are refused.
        tls: HTTPS with these files; None: plain HTTP.

    Returns:
        As `serve`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    sections = []
    for label, root in roots.items():
        certificate = _write(directory / f"{label}.crt", root.cert_pem)
        key = _write(directory / f"{label}.key", root.key_pem)
        config = _write(directory / f"{label}.json", json.dumps(root.config).encode())
        sections += [f"[ {label} ]", f"private = file://{key}", f"certificate = {certificate}", f"config = {config}"]
        sections += [f"nets = {root.nets}", ""]
    file = Path(_write(directory / "roots.conf", "\n".join(sections).encode()))
    more = ["-l", default] if default else []
    more += ["-tls-cert", str(tls.server_cert), "-tls-key", str(tls.server_key)] if tls else []
    return running(lambda port: [*multirootca_command(file, port), *more], directory, tls)


def multirootca_command(roots_file: Path, port: int) -> list[str]:
    """How a `multirootca` is started."""
    return [str(programs.require("multirootca")), "-roots", str(roots_file), "-a", f"127.0.0.1:{port}"]


@contextlib.contextmanager
def running(command: Callable[[int], list[str]], directory: Path, tls: Tls | None) -> Iterator[str]:
    """A server that is started with a port, answers when the block begins, and is gone afterwards."""
    port = free_port()
    log = directory / f"{port}.log"
    url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(command(port), stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        _wait_for_answer(url, tls, process, log)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(180)


def _wait_for_answer(url: str, tls: Tls | None, process: subprocess.Popen[bytes], log: Path) -> None:
    """Ask `info`: `health` says nothing about the CA, and a bare connection leaves an error in the log."""
    deadline = time.monotonic() + _START_SECONDS
    with requests.Session() as session:
        session.trust_env = False
        if tls:
            session.verify, session.cert = str(tls.ca), (str(tls.client_cert), str(tls.client_key))
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(requests.ConnectionError, requests.Timeout):
                session.post(f"{url}{API}/info", json={}, timeout=5)
                return
            time.sleep(0.02)
    raise AssertionError(f"{process.args!r} does not answer (exit {process.poll()}):\n{log.read_text()}")


def make_tls(directory: Path, *, client_cn: str = "bridge-cp-1", allowed_cn: str | None = None) -> Tls:
    """
    A CA for TLS, a server's certificate for 127.0.0.1 and localhost, a client's.

    Args:
        directory: For the files; made if it is not there.
        client_cn: The CN of the client's certificate.
        allowed_cn: A regular expression; the server turns others away. None: takes any.
    """
    directory.mkdir(parents=True, exist_ok=True)
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca = _tls_certificate("tls-ca", ca_key, None, ca_key)
    server_key, client_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    server = _tls_certificate("cfssl", server_key, ca, ca_key, ExtendedKeyUsageOID.SERVER_AUTH)
    client = _tls_certificate(client_cn, client_key, ca, ca_key, ExtendedKeyUsageOID.CLIENT_AUTH)
    return Tls(
        ca=Path(_write(directory / "tls-ca.crt", pem(ca))),
        server_cert=Path(_write(directory / "server.crt", pem(server))),
        server_key=Path(_write(directory / "server.key", _key_pem(server_key))),
        client_cert=Path(_write(directory / "client.crt", pem(client))),
        client_key=Path(_write(directory / "client.key", _key_pem(client_key))),
        client_cn=allowed_cn,
    )


def _tls_certificate(
    cn: str,
    key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate | None,
    ca_key: ec.EllipticCurvePrivateKey,
    usage: x509.ObjectIdentifier | None = None,
) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, cn)])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(ca.subject if ca else name)
    builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=1))
    builder = builder.add_extension(x509.BasicConstraints(ca=usage is None, path_length=None), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    builder = builder.add_extension(identifier, critical=False)
    if usage:
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    return builder.sign(ca_key, hashes.SHA256())


def pem(certificate: x509.Certificate) -> bytes:
    """One PEM block."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    path.chmod(0o600)
    return str(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a `Double` answers to one signing request."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    times: int = 1  #: How often the body is sent.

    @classmethod
    def error(cls, status: int, code: int, message: str, **headers: str) -> Answer:
        """In cfssl's envelope, labelled as cfssl does."""
        envelope = {
            "success": False,
            "result": None,
            "errors": [{"code": code, "message": message}],
            "messages": [],
        }
        named = {"Content-Type": "text/plain; charset=utf-8", **{k.replace("_", "-"): v for k, v in headers.items()}}
        return cls(status=status, body=json.dumps(envelope).encode() + b"\n", headers=named)

    @classmethod
    def result(cls, **result: object) -> Answer:
        """A success with this result."""
        envelope = {"success": True, "result": result, "errors": [], "messages": []}
        body = json.dumps(envelope).encode() + b"\n"
        return cls(body=body, headers={"Content-Type": "application/json"})


@dataclass(slots=True)
class Double:
    """Plays answers that a real server gives only in trouble, and is as strict about requests as may be."""

    url: str
    keys: Mapping[str, bytes] = field(repr=False)  #: HMAC key by profile.
    ca_cert_pem: bytes
    usages: Sequence[str] | None = None  #: Of every profile, as `info` tells them.
    #: To signing requests, in this order; or what makes one of the request's body.
    answers: list[Answer | Callable[[bytes], Answer]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list, repr=False)  #: Of the signing requests.
    sent_bytes: int = 0  #: Of all answers' bodies.
    complaints: list[str] = field(default_factory=list)  #: What was wrong with requests.

    def answer(self, path: str, body: bytes) -> Answer:
        """Look at the request, then answer."""
        envelope = json.loads(body)
        if path == f"{API}/info":
            if not set(envelope) <= {"label", "profile"}:
                self.complaints.append(f"info with {sorted(envelope)}")
            return Answer.result(certificate=self.ca_cert_pem.decode().strip(), usages=self.usages, expiry="1m")
        if path != f"{API}/authsign":
            self.complaints.append(f"POST {path}")
            return Answer(status=404, body=b"404 page not found\n")
        inner = self._examine(envelope)
        if not inner["certificate_request"]:  # a look at the HMAC alone
            return Answer.error(400, 400, "missing parameter 'certificate_request'")
        x509.load_pem_x509_csr(inner["certificate_request"].encode())
        self.bodies.append(body)
        answer = self.answers.pop(0)
        return answer if isinstance(answer, Answer) else answer(body)

    def _examine(self, envelope: Mapping[str, str]) -> Mapping[str, str]:
        if set(envelope) != {"token", "request"}:
            self.complaints.append(f"authsign with {sorted(envelope)}")
        text = base64.b64decode(envelope["request"], validate=True)
        inner: dict[str, str] = json.loads(text)
        if not {"certificate_request", "profile"} <= set(inner) <= {"certificate_request", "profile", "label"}:
            self.complaints.append(f"request with {sorted(inner)}")
        token = hmac.new(self.keys[inner["profile"]], text, hashlib.sha256).digest()
        if base64.b64decode(envelope["token"], validate=True) != token:
            self.complaints.append("wrong HMAC")
        return inner


def inner_request(body: bytes) -> object:
    """What the body of an `authsign` request asks for."""
    return json.loads(base64.b64decode(json.loads(body)["request"]))


@contextlib.contextmanager
def double(keys: Mapping[str, bytes], ca_cert_pem: bytes, usages: Sequence[str] | None = None) -> Iterator[Double]:
    """A running `Double`; at the end nothing may have been wrong with the requests, and no answer may be left."""
    server = LoopbackServer(("127.0.0.1", 0), _Handler)
    server.double = Double(f"http://127.0.0.1:{server.server_port}", keys, ca_cert_pem, usages)  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        played: Double = server.double  # type: ignore[attr-defined]
        yield played
        assert played.complaints == []
        assert played.answers == []
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        played: Double = self.server.double  # type: ignore[attr-defined]
        try:
            answer = played.answer(self.path, self.rfile.read(int(self.headers["Content-Length"])))
        except Exception as e:
            played.complaints.append(f"{type(e).__name__}: {e}")
            raise
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body) * answer.times))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # of a client that has had enough
            for _ in range(answer.times):
                self.wfile.write(answer.body)
                played.sent_bytes += len(answer.body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        """Nothing on the terminal."""
