"""
EST servers to sign with: GlobalSign's `estserver`, and a double for answers and certificates that it can't give.

The mock CA of `estserver` gives every certificate both EKUs and digitalSignature alone, whatever the label: right for
etcd's own certificates with elliptic keys, wrong for all others.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, pkcs7

from bridge.contract import SignRequest
from bridge.pki.certificates import pem
from bridge.pki.csr import generate_key, key_pem
from bridge.specs import SPECS, CertificateSpec
from tests.kit import programs
from tests.kit.issuing import CLIENT, SERVER, Signer, cn
from tests.kit.loopback import LoopbackServer, free_port
from tests.kit.pki import Pki

ROOT = "/.well-known/est"
_START_SECONDS = 180
#: Each kind of certificate by its usage class; what a label of that name gives.
EXAMPLES: Mapping[str, CertificateSpec] = {spec.usage: spec for spec in SPECS.values()}


@dataclass(frozen=True, kw_only=True)
class Tls:
    """Who speaks TLS: the server, and agents of the same CA."""

    signer: Signer = field(repr=False)
    directory: Path
    ca: Path
    server_cert: Path
    server_key: Path

    def agent(self, name: str, **differences: Any) -> dict[str, Path]:
        """
        Settings for a client certificate that is written for the purpose.

        Args:
            name: Its CN, and that of its files.
            differences: From a good one, of `Signer.issue`; or another `signer`.
        """
        signer = differences.pop("signer", self.signer)
        certificate, key = _identity(self.directory / name, signer, name, **{"ekus": [CLIENT], **differences})
        return {"client_cert": certificate, "client_key": key}

    def sign_agent(self, csr_pem: str) -> bytes:
        """A client certificate for a client's own CSR."""
        request = SignRequest(spec=SPECS["apiserver"], csr_pem=csr_pem.encode(), validity=timedelta(days=1))
        now = datetime.now(UTC)
        issued = self.signer.issue(request, begin=now - timedelta(hours=1), end=now + timedelta(days=1), ekus=[CLIENT])
        return pem(issued.leaf)


def make_tls(directory: Path, *, sans: Sequence[str] = ("127.0.0.1",), left: timedelta = timedelta(days=1)) -> Tls:
    """
    A CA for TLS, and a server's certificate.

    Args:
        directory: For the files; made if it is not there.
        sans: Addresses of the server.
        left: Of the server's certificate's time; negative: it has expired.
    """
    directory.mkdir(parents=True, exist_ok=True)
    signer = Signer.make(
        "tls-ca", begin=datetime.now(UTC) - timedelta(days=2), end=datetime.now(UTC) + timedelta(days=2)
    )
    (directory / "tls-ca.crt").write_bytes(pem(signer.certificate))
    names = [x509.IPAddress(ip_address(address)) for address in sans]
    end = datetime.now(UTC) + left
    certificate, key = _identity(directory / "server", signer, "est", sans=names, ekus=[SERVER], end=end)
    return Tls(signer=signer, directory=directory, ca=directory / "tls-ca.crt", server_cert=certificate, server_key=key)


def _identity(base: Path, signer: Signer, name: str, **differences: Any) -> tuple[Path, Path]:
    """Certificate and key below `base`, valid from an hour ago for a day unless a caller says otherwise."""
    key, now = generate_key("ecdsa-p256"), datetime.now(UTC)
    builder = x509.CertificateSigningRequestBuilder().subject_name(cn(name))
    csr_pem = builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
    request = SignRequest(spec=SPECS["apiserver"], csr_pem=csr_pem, validity=timedelta(days=1))
    dates = {"begin": now - timedelta(hours=1), "end": now + timedelta(days=1)}
    issued = signer.issue(request, **{**dates, **differences})
    certificate_file, key_file = base.with_suffix(".crt"), base.with_suffix(".key")
    certificate_file.write_bytes(pem(issued.leaf))
    key_file.touch(mode=0o600)
    key_file.write_bytes(key_pem(key))
    return certificate_file, key_file


# ------------------------------------------------------------------------------------------------ GlobalSign's estserver


@contextlib.contextmanager
def estserver(
    directory: Path,
    ca_pem: tuple[bytes, bytes],
    tls: Tls,
    *,
    rate_limit: int = 0,
    allowed_hosts: Sequence[str] = (),
    port: int = 0,
) -> Iterator[str]:
    """
    A running `estserver`; it answers when the block begins, and is gone afterwards.

    Args:
        directory: For its files; made if it is not there.
        ca_pem: The CA's certificates, the one that signs first, and its key.
        tls: Its own certificate, and the CA of client certificates, which clients need not have.
        rate_limit: Requests a second, twice as many at once; 0: none.
        allowed_hosts: In `Host`; none: any.
        port: Of an earlier one, which has ended; 0: a free one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "ca.crt").write_bytes(ca_pem[0])
    (directory / "ca.key").write_bytes(ca_pem[1])
    (directory / "ca.key").chmod(0o600)
    port = port or free_port()
    settings = {
        "mock_ca": {"certificates": str(directory / "ca.crt"), "private_key": str(directory / "ca.key")},
        "tls": {
            "listen_address": f"127.0.0.1:{port}",
            "certificates": str(tls.server_cert),
            "private_key": str(tls.server_key),
            "client_cas": [str(tls.ca)],
        },
        "allowed_hosts": list(allowed_hosts),
        "rate_limit": rate_limit,
        "timeout": 120,
        "log_file": str(directory / "est.log"),
    }
    config = directory / "est.json"
    config.write_text(json.dumps(settings))
    with (directory / "output").open("wb") as output:
        command = [str(programs.require("estserver")), "-config", str(config)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    url = f"https://127.0.0.1:{port}"
    try:
        _wait_for_answer(url, tls, process, directory / "output")
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(180)


def _wait_for_answer(url: str, tls: Tls, process: subprocess.Popen[bytes], output: Path) -> None:
    """A busy port is never reported: the server runs on, deaf and silent."""
    deadline = time.monotonic() + _START_SECONDS
    with requests.Session() as session:
        session.trust_env = False
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(requests.ConnectionError, requests.Timeout):
                session.get(f"{url}/healthcheck", verify=str(tls.ca), timeout=5)
                return
            time.sleep(0.02)
    raise AssertionError(f"estserver does not answer (exit {process.poll()}):\n{output.read_text()}")


def asked(directory: Path) -> list[tuple[str, int]]:
    """What an `estserver` was asked for EST so far, as (path, status), from its log."""
    found = re.findall(r"/\.well-known/est(/\S*?)[\"',\]\s].*?[Ss]tatus\D+(\d+)", (directory / "est.log").read_text())
    return [(path, int(status)) for path, status in found]


# ----------------------------------------------------------------------------------------------------------------- double


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a `Double` answers."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    times: int = 1  #: How often the body is sent.
    promised: int | None = None  #: Content-Length; None: the right one.

    @classmethod
    def text(cls, status: int, text: str, **headers: str) -> Answer:
        """As `estserver` words its errors."""
        named = {"Content-Type": "text/plain; charset=utf-8", **{k.replace("_", "-"): v for k, v in headers.items()}}
        return cls(status=status, body=f"{status} {text}\n".encode(), headers=named)

    @classmethod
    def certificates(cls, *found: x509.Certificate) -> Answer:
        """As `estserver` sends them: base64 of 76 columns with CRLF."""
        lines = base64.encodebytes(bag(*found)).replace(b"\n", b"\r\n")
        headers = {
            "Content-Type": "application/pkcs7-mime; smime-type=certs-only",
            "Content-Transfer-Encoding": "base64",
        }
        return cls(body=lines, headers=headers)


def bag(*found: x509.Certificate) -> bytes:
    """A PKCS#7 with certificates alone, as DER (sorted by the library)."""
    return pkcs7.serialize_certificates(list(found), Encoding.DER)


@dataclass(frozen=True, kw_only=True)
class Label:
    """What one label of a double gives."""

    signer: Signer
    spec: CertificateSpec  #: Its EKUs are those of each certificate.
    chain: Sequence[x509.Certificate] = ()  #: Above the signer, for `cacerts`.

    def issue(self, csr: x509.CertificateSigningRequest, validity: timedelta) -> x509.Certificate:
        """The certificate for a CSR."""
        request = SignRequest(spec=self.spec, csr_pem=csr.public_bytes(Encoding.PEM), validity=validity)
        now = datetime.now(UTC)
        return self.signer.issue(request, begin=now - timedelta(minutes=5), end=now + validity).leaf


@dataclass(kw_only=True)
class Double:
    """Plays an EST server, and is as strict about requests as may be."""

    url: str
    labels: Mapping[str, Label]  #: By path segment(s); `""`: without one.
    validity: timedelta
    users: Mapping[str, str]  #: Passwords by name; none: no client needs one.
    client_cn: str | None  #: The one client certificate that may enrol; None: every client may.
    #: To enrolments, in this order, or what makes one of the CSR; without one it signs.
    answers: list[Answer | Callable[[x509.CertificateSigningRequest], Answer]] = field(default_factory=list)
    always: Callable[[x509.CertificateSigningRequest], Answer] | None = (
        None  #: To every other enrolment, if there is one.
    )
    cacerts: list[Answer] = field(default_factory=list)  #: To `cacerts`, in this order; without one the right one.
    csrs: list[bytes] = field(default_factory=list)  #: What enrolments asked for, as DER.
    asked: list[str] = field(default_factory=list)  #: `LABEL OPERATION` of all requests.
    sent_bytes: int = 0
    complaints: list[str] = field(default_factory=list)  #: What was wrong with requests.

    def get(self, label: str, headers: Mapping[str, str]) -> Answer:
        """`cacerts`, which needs no password and gets none."""
        if "Authorization" in headers:
            self.complaints.append("a password for cacerts")
        if self.cacerts:
            return self.cacerts.pop(0)
        if label not in self.labels:
            return Answer.text(404, "page not found")
        ours = self.labels[label]
        return Answer.certificates(ours.signer.certificate, *ours.chain)

    def post(self, label: str, headers: Mapping[str, str], body: bytes, client_cn: str | None) -> Answer:
        """`simpleenroll`."""
        wanted = {"Content-Type": "application/pkcs10", "Content-Transfer-Encoding": "base64"}
        wanted["Accept"] = "application/pkcs7-mime"
        self.complaints += [f"{k}: {headers.get(k)}" for k, v in wanted.items() if headers.get(k) != v]
        refusal = self._refusal(label, headers, client_cn)
        if refusal or not body:  # without a CSR only to see whether it would be let in
            return refusal or Answer.text(400, "malformed PKCS10 certificate signing request")
        if not re.fullmatch(rb"[A-Za-z0-9+/]+=*", body):
            self.complaints.append("a body that is not one line of base64")
        csr = x509.load_der_x509_csr(base64.b64decode(body, validate=True))
        if not csr.is_signature_valid:
            return Answer.text(400, "invalid PKCS10 certificate signing request signature")
        self.csrs.append(csr.public_bytes(Encoding.DER))
        if self.answers:
            answer = self.answers.pop(0)
            return answer if isinstance(answer, Answer) else answer(csr)
        if self.always is not None:
            return self.always(csr)
        return Answer.certificates(self.labels[label].issue(csr, self.validity))

    def _refusal(self, label: str, headers: Mapping[str, str], client_cn: str | None) -> Answer | None:
        if label not in self.labels:
            return Answer.text(404, "page not found")
        if self.client_cn is not None and client_cn != self.client_cn:
            return Answer.text(403, f"no rights for {client_cn}")
        if self.users and not self._is_user(headers.get("Authorization", "")):
            return Answer.text(401, "authorization required", WWW_Authenticate='Basic realm="estserver@127.0.0.1"')
        return None

    def _is_user(self, authorization: str) -> bool:
        known = [base64.b64encode(f"{name}:{password}".encode()).decode() for name, password in self.users.items()]
        return authorization in [f"Basic {one}" for one in known]


def labels_of(pki: Pki, names: Mapping[str, str]) -> dict[str, Label]:
    """A label an authority and usage class, of two segments, below the names of `names`, which has them by authority."""
    return {
        f"{prefix}/{usage}": Label(signer=Signer.load(*pki.ca_pem(authority)), spec=spec)
        for authority, prefix in names.items()
        for usage, spec in EXAMPLES.items()
    }


@contextlib.contextmanager
def double(
    labels: Mapping[str, Label],
    tls: Tls,
    *,
    validity: timedelta = timedelta(days=30),
    users: Mapping[str, str] | None = None,
    client_cn: str | None = None,
    verify_mode: ssl.VerifyMode = ssl.CERT_OPTIONAL,
) -> Iterator[Double]:
    """
    A running `Double`; at the end nothing may have been wrong with the requests, and no answer may be left.

    Args:
        labels: See `Double`.
        tls: As for `estserver`.
        validity: Of what it signs.
        users: See `Double`.
        client_cn: See `Double`.
        verify_mode: Whether TLS itself wants a client certificate.
    """
    server = LoopbackServer(("127.0.0.1", 0), _Handler)
    server.socket = _listening(server, tls, verify_mode)
    played = Double(
        url=f"https://127.0.0.1:{server.server_port}",
        labels=labels,
        validity=validity,
        users=users or {},
        client_cn=client_cn,
    )
    server.double = played  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield played
        assert played.complaints == []
        assert (played.answers, played.cacerts) == ([], [])
    finally:
        server.shutdown()
        server.server_close()


def _listening(server: LoopbackServer, tls: Tls, verify_mode: ssl.VerifyMode) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls.server_cert, tls.server_key)
    context.load_verify_locations(tls.ca)
    context.verify_mode = verify_mode
    # the handshake is the connection's own thread's: one that is slow keeps no other waiting
    return context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with contextlib.suppress(ssl.SSLError):  # of a client that was turned away, or has turned us away
            super().handle()

    def do_GET(self) -> None:
        label = self._label("cacerts")
        self._reply(lambda played: played.get(label, self.headers))  # type: ignore[arg-type]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        label = self._label("simpleenroll")
        subject: Any = (self.connection.getpeercert() or {}).get("subject", ())
        names = dict(pair for attributes in subject for pair in attributes)
        self._reply(lambda played: played.post(label, self.headers, body, names.get("commonName")))  # type: ignore[arg-type]

    def _label(self, operation: str) -> str:
        """From the path; still percent-encoded."""
        played: Double = self.server.double  # type: ignore[attr-defined]
        found = re.fullmatch(rf"{re.escape(ROOT)}/(?:(.+)/)?{operation}", self.path)
        if not found:
            played.complaints.append(f"{self.command} {self.path}")
        label = (found and found[1]) or ""
        played.asked.append(f"{label} {operation}".strip())
        return label

    def _reply(self, ask: Callable[[Double], Answer]) -> None:
        played: Double = self.server.double  # type: ignore[attr-defined]
        try:
            answer = ask(played)
        except Exception as e:
            played.complaints.append(f"{type(e).__name__}: {e}")
            raise
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        length = len(answer.body) * answer.times if answer.promised is None else answer.promised
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if answer.promised is not None:
            self.close_connection = True
        with contextlib.suppress(ConnectionError):  # of a client that has had enough
            for _ in range(answer.times):
                self.wfile.write(answer.body)
                played.sent_bytes += len(answer.body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        """Nothing on the terminal."""
