"""
A stand-in for a Dogtag CA's end-entity pages, as far as certmonger's dogtag-submit 0.79 asks them for a certificate.

It takes a request only if profile and CSR are as they should be; its XML has no more than dogtag-submit reads.
"""

from __future__ import annotations

import base64
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs

from cryptography.hazmat.primitives.serialization import Encoding

from bridge.contract import SignRequest
from bridge.specs import SPECS
from tests.kit.issuing import Signer
from tests.kit.loopback import LoopbackServer

PLACE = "/ca/ee/ca"
_ANSWERS = {
    "defer": "<Status>2</Status><Error>Request Deferred</Error><RequestId>7</RequestId>",
    "reject": "<Status>3</Status><Error>Request Rejected - subject not allowed</Error>",
}


@dataclass(kw_only=True)
class Dogtag:
    """One that runs."""

    signer: Signer
    url: str = ""
    asked: list[str] = field(default_factory=list)  #: Paths, in their order.
    answer: str = "reject"

    def answers(self, what: str) -> None:
        """From now on: a certificate's name (it is signed with that one's usages), `defer`, `reject` or `html`."""
        self.answer = what

    def page(self, path: str, body: str) -> str:
        """What a request is answered."""
        if path != f"{PLACE}/profileSubmit" or self.answer == "html":
            return "<html>504 Gateway Time-out</html>"
        return f'<?xml version="1.0"?><XMLResponse>{self._submitted(body)}</XMLResponse>'

    def _submitted(self, body: str) -> str:
        if self.answer in _ANSWERS:
            return _ANSWERS[self.answer]
        form, spec = parse_qs(body, strict_parsing=True), SPECS[self.answer]
        if form["profileId"] != [spec.usage] or form["cert_request_type"] != ["pkcs10"]:
            return f"<Status>1</Status><Error>wanted profile {spec.usage}, found {form['profileId']}</Error>"
        csr = form["cert_request"][0].replace("\r\n", "\n").encode()
        request = SignRequest(spec=spec, csr_pem=csr, validity=timedelta(days=90))
        now = datetime.now(UTC)
        issued = self.signer.issue(request, begin=now - timedelta(minutes=5), end=now + request.validity)
        text = base64.b64encode(issued.leaf.public_bytes(Encoding.DER)).decode()
        return f"<Status>0</Status><Requests><Request><Id>7</Id><b64>{text}</b64></Request></Requests>"


@contextlib.contextmanager
def serving(signer: Signer) -> Iterator[Dogtag]:
    """On loopback, over plain HTTP."""
    made = Dogtag(signer=signer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self._answer(self.rfile.read(int(self.headers["Content-Length"])).decode())

        def do_GET(self) -> None:
            self._answer("")

        def _answer(self, body: str) -> None:
            made.asked.append(self.path)
            page = made.page(self.path, body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *args: object) -> None:
            """Nothing."""

    server = LoopbackServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    made.url = f"http://127.0.0.1:{server.server_address[1]}{PLACE}"
    try:
        yield made
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
