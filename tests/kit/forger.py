"""A PKI engine of a Vault that answers with whatever a test wants, and takes no request that a real one would not."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler
from typing import Any

from cryptography import x509

from bridge.contract import Issued, SignRequest
from bridge.pki.certificates import pem
from bridge.specs import SPECS
from tests.kit.loopback import LoopbackServer

TOKEN = "hvs.forged"
MOUNT = "pki"
_SIGN = re.compile(rf"/v1/{MOUNT}/sign/kubeadm-([a-z.-]+)")


@dataclass(frozen=True, slots=True)
class Raw:
    """An answer that is no certificate, sent as it is; more than once for a large one."""

    body: bytes
    times: int = 1


@dataclass(kw_only=True)
class Forger:
    """What it says, and what it was asked."""

    url: str
    ca: x509.Certificate
    answer: Callable[[SignRequest], Issued | Raw]
    asked: list[str] = field(default_factory=list)  #: The certificates' names.
    complaints: list[str] = field(default_factory=list)  #: What was wrong with requests.

    def respond(self, method: str, path: str, headers: Any, body: bytes) -> Raw:
        """One request, looked at, and its answer."""
        public = path == f"/v1/{MOUNT}/cert/ca_chain"
        if headers["X-Vault-Request"] != "true" or headers["X-Vault-Token"] != (None if public else TOKEN):
            self.complaints.append(f"{path}: headers")
        if method == "GET" and public:
            return _data({"certificate": pem(self.ca).decode(), "ca_chain": pem(self.ca).decode()})
        if method == "GET" and path == "/v1/auth/token/lookup-self":
            return _data({"display_name": "token-forged", "entity_id": ""})
        if method == "POST" and path == "/v1/sys/capabilities-self":
            return _data({asked: ["update"] for asked in json.loads(body)["paths"]})
        if method == "POST" and (match := _SIGN.fullmatch(path)):
            return self._signed(match[1], json.loads(body))
        if method == "GET" and path.startswith(f"/v1/{MOUNT}/roles/"):
            return _FORBIDDEN  # nothing is known of the certificate before it comes
        self.complaints.append(f"{method} {path}")
        return _FORBIDDEN

    def _signed(self, name: str, body: dict[str, Any]) -> Raw:
        if set(body) != {"csr", "ttl", "exclude_cn_from_sans"} or body["exclude_cn_from_sans"] is not True:
            self.complaints.append(f"sign with {sorted(body)}")
        self.asked.append(name)
        validity = timedelta(seconds=int(body["ttl"].removesuffix("s")))
        request = SignRequest(spec=SPECS[name], csr_pem=body["csr"].encode(), validity=validity)
        if not request.csr.is_signature_valid:
            self.complaints.append("a CSR with a bad signature")
        answer = self.answer(request)
        if isinstance(answer, Raw):
            return answer
        return self.certificate(pem(answer.leaf).decode(), [pem(each).decode() for each in answer.intermediates])

    def certificate(self, text: str, chain: list[str], **more: str) -> Raw:
        """An engine's answer with a text in the certificate's place."""
        return _data({"certificate": text, "ca_chain": chain, "issuing_ca": pem(self.ca).decode(), **more})


def _data(data: dict[str, Any]) -> Raw:
    return Raw(json.dumps({"request_id": "1", "lease_id": "", "data": data, "warnings": None}).encode())


_FORBIDDEN = Raw(json.dumps({"errors": ["1 error occurred:\n\t* permission denied\n\n"]}).encode())


@contextlib.contextmanager
def forger(ca: x509.Certificate, answer: Callable[[SignRequest], Issued | Raw]) -> Iterator[Forger]:
    """A running one; at the end nothing may have been wrong with the requests."""
    server = LoopbackServer(("127.0.0.1", 0), _Handler)
    played = Forger(url=f"http://127.0.0.1:{server.server_port}", ca=ca, answer=answer)
    server.played = played  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield played
        assert played.complaints == []
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._play(b"")

    def do_POST(self) -> None:
        self._play(self.rfile.read(int(self.headers["Content-Length"])))

    def _play(self, body: bytes) -> None:
        played: Forger = self.server.played  # type: ignore[attr-defined]
        try:
            answer = played.respond(self.command, self.path, self.headers, body)
        except Exception as e:
            played.complaints.append(f"{type(e).__name__}: {e}")
            raise
        self.send_response(403 if answer is _FORBIDDEN else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer.body) * answer.times))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # of a client that has had enough
            for _ in range(answer.times):
                self.wfile.write(answer.body)

    def log_message(self, *_: object) -> None:
        """Silent."""
