"""EST requests that are wrong in one way, each beside the honest one: none is signed, and none is kept."""

from __future__ import annotations

import base64
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import AttributeOID, ExtendedKeyUsageOID

from bridge.door import enrolments
from bridge.door.enrolments import Wanted
from bridge.pki import node_proofs
from bridge.settings.load import load
from bridge.system.waiting import wait_until
from tests.kit.est_door import ROOT, TYPE, EstDoor, body_of, make_csr, make_est_door, write_pair
from tests.kit.issuing import CLIENT, SERVER, Signer, usage
from tests.kit.pki import Pki, handmade_pki
from tests.kit.serving import Answer, running

_PATIENCE = timedelta(minutes=3)
_ENDED: dict[str, Any] = {
    "begin": datetime.now(UTC) - timedelta(hours=20),
    "end": datetime.now(UTC) - timedelta(hours=1),
}
_OWN: dict[str, Any] = {"ekus": [SERVER, CLIENT]}
_RENEW = "/web/simplereenroll"
_SANS = ("cp-1", "a.cp-1.example.com")

#: Status and text; "no": TLS, or the connection, has ended without an answer.
Found = tuple[str, str]


@dataclass(kw_only=True)
class Stage:
    """What a sender has: a good agent's certificate, a web server's own, and a secret that is used up."""

    door: EstDoor
    ca: Signer  #: The cluster's.

    @cached_property
    def agent(self) -> dict[str, Path]:
        """The agent of cp-1."""
        return self.door.agent()

    @cached_property
    def own(self) -> dict[str, Path]:
        """The certificate that cp-1 may renew, with the names `_SANS`."""
        return self.of_ca()

    def of_ca(self, subject: str = "CN=web.cp-1", **differences: Any) -> dict[str, Path]:
        """A certificate by the cluster's CA."""
        names = [x509.DNSName(name) for name in _SANS]
        return self.door.agent(subject, signer=self.ca, **{"sans": names, **_OWN, **differences})

    def post(
        self, body: bytes | None, agent: dict[str, Path] | None = None, path: str = "/web/simpleenroll", **headers: str
    ) -> Found:
        """A request with this body."""
        named = {"Content_Type": TYPE, **headers}
        return self._found(lambda: self.door.ask("POST", path, body, agent or self.agent, **named))

    def get(self, method: str, path: str) -> Found:
        """A request without a body."""
        return self._found(lambda: self.door.ask(method, path, None, self.agent))

    def enrol(self, csr: x509.CertificateSigningRequest, *args: Any, **more: str) -> Found:
        """Send a good client's request with the given changes, until it is decided."""
        agent = args[0] if args else self.agent
        return wait_until(
            lambda: self._found(lambda: self.door.enrol(csr, agent, *args[1:], **more)),
            lambda one: one[0] != "202",
            _PATIENCE,
            pause_seconds=0.2,
        )

    def renew(self, csr: x509.CertificateSigningRequest, agent: dict[str, Path] | None = None) -> Found:
        """The same by `simplereenroll`, with the web server's own certificate if no other is given."""
        return self.enrol(csr, agent or self.own, _RENEW)

    def chunked(
        self, form: str, more: str = "", encoding: str = "chunked", path: str = f"{ROOT}/web/simpleenroll"
    ) -> Found:
        """A good body in chunks of this form, which has its size and itself."""
        body = body_of(make_csr()).decode()
        return self.raw(
            f"{_TYPE}Transfer-Encoding: {encoding}\r\n{more}", path, body=(form % (len(body), body)).encode()
        )

    def raw(
        self, head: str, path: str = f"{ROOT}/web/simpleenroll", agent: dict[str, Path] | None = None, body: bytes = b""
    ) -> Found:
        """A request whose head is this text; the body is good if no other is given."""
        body = body or body_of(make_csr())
        context = self.door.program.context()
        shown = agent if agent is not None else self.agent
        if shown:
            context.load_cert_chain(shown["client_cert"], shown["client_key"])
        text = f"POST {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{head}\r\n".replace("LENGTH", f"{len(body)}")

        def exchange() -> Answer:
            plain = socket.create_connection(("127.0.0.1", self.door.program.port), timeout=180)
            with plain, context.wrap_socket(plain, server_hostname="127.0.0.1") as client:
                client.sendall(text.encode() + body)
                found = b""
                while part := client.recv(4096):
                    found += part
            line, _, rest = found.partition(b"\r\n")
            return Answer(status=int(line.split()[1]), headers={}, body=rest)

        return self._found(exchange)

    def basic(
        self, csr: x509.CertificateSigningRequest, authorization: str, path: str = "/first/simpleenroll"
    ) -> Found:
        """A request with a header `Authorization`, and without a client certificate."""
        return self.enrol(csr, None, path, Authorization=authorization)

    def secret(
        self, node: str = "cp-1", certificates: tuple[str, ...] = (), lasts: timedelta = timedelta(hours=1)
    ) -> str:
        """A new enrolment's secret."""
        wanted = Wanted(node=node, cluster="kubernetes", certificates=certificates, lasts=lasts)
        return enrolments.enroll(load(self.door.desk.config), None, wanted, datetime.now(UTC))[1]

    def used(self) -> str:
        """One that has got its certificate."""
        secret = self.secret()
        assert self.basic(make_csr(), header("cp-1", secret))[0] == "200"
        return secret

    def _found(self, exchange: Callable[[], Answer]) -> Found:
        try:
            answer = exchange()
        except (OSError, ValueError, IndexError):
            return "no", ""
        return str(answer.status), answer.body.decode("utf-8", "replace")


def header(user: str, secret: str, scheme: str = "Basic") -> str:
    return f"{scheme} {base64.b64encode(f'{user}:{secret}'.encode()).decode()}"


def forged(csr: x509.CertificateSigningRequest) -> bytes:
    """The CSR with another signature."""
    encoded = bytearray(csr.public_bytes(Encoding.DER))
    encoded[-1] ^= 1
    return base64.encodebytes(bytes(encoded))


def der(csr: x509.CertificateSigningRequest) -> bytes:
    return csr.public_bytes(Encoding.DER)


def asking(*extensions: x509.ExtensionType) -> x509.CertificateSigningRequest:
    return make_csr(extensions=[(one, True) for one in extensions])


def good(stage: Stage) -> Found:
    return stage.enrol(make_csr(sans=_SANS))


def good_renewal(stage: Stage) -> Found:
    return stage.renew(make_csr(sans=_SANS))


def good_secret(stage: Stage) -> Found:
    return stage.basic(make_csr(), header("cp-1", stage.secret()))


def plain_head(stage: Stage) -> Found:
    found = stage.raw(f"Content-Type: {TYPE}\r\nContent-Length: LENGTH\r\n")
    return ("200", found[1]) if found[0] == "202" else found


CHUNKS = "%x\r\n%s\r\n0\r\n\r\n"


def good_chunks(stage: Stage) -> Found:
    found = stage.chunked(CHUNKS)
    return ("200", found[1]) if found[0] == "202" else found


def weak(bits: int) -> Any:
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


_TYPE = f"Content-Type: {TYPE}\r\n"
#: By name: the answer, what is sent, and its honest twin.
HOSTILE: dict[str, tuple[str, Callable[[Stage], Found], Callable[[Stage], Found]]] = {
    # --- HTTP
    "GET of an enrolment": ("405", lambda s: s.get("GET", "/web/simpleenroll"), good),
    "PUT of an enrolment": ("405", lambda s: s.get("PUT", "/web/simpleenroll"), good),
    "POST of cacerts": ("405", lambda s: s.post(b"", path="/web/cacerts"), good),
    "no content type": ("415", lambda s: s.raw("Content-Length: LENGTH\r\n"), plain_head),
    "content type of a text": ("415", lambda s: s.post(body_of(make_csr()), Content_Type="text/plain"), good),
    "content type with a letter more": ("415", lambda s: s.post(body_of(make_csr()), Content_Type=f"{TYPE}x"), good),
    "compressed": ("415", lambda s: s.post(body_of(make_csr()), Content_Encoding="gzip"), good),
    "oversized": ("413", lambda s: s.post(body_of(make_csr()) + b"\n" * 70_000), good),
    "length given twice": ("400", lambda s: s.raw(f"{_TYPE}Content-Length: LENGTH\r\nContent-Length: 0\r\n"), plain_head),
    "in chunks with a length": (
        "411", lambda s: s.chunked(CHUNKS, "Content-Length: 5\r\n"), good_chunks,
    ),
    "in chunks by two names": ("411", lambda s: s.chunked(CHUNKS, "", "chunked, chunked"), good_chunks),
    "in chunks and packed": ("501", lambda s: s.chunked(CHUNKS, "", "gzip, chunked"), good_chunks),
    "in chunks of a signed size": ("400", lambda s: s.chunked("+%x\r\n%s\r\n0\r\n\r\n"), good_chunks),
    "in chunks of a size with a prefix": ("400", lambda s: s.chunked("0x%x\r\n%s\r\n0\r\n\r\n"), good_chunks),
    "in chunks with an extension": ("400", lambda s: s.chunked("%x;a=b\r\n%s\r\n0\r\n\r\n"), good_chunks),
    "in chunks with a trailer": ("400", lambda s: s.chunked("%x\r\n%s\r\n0\r\nContent-Length: 1\r\n\r\n"), good_chunks),
    "in chunks with half a line end": ("400", lambda s: s.chunked("%x\n%s\n0\n\n"), good_chunks),
    "in chunks without an end": ("400", lambda s: s.chunked("%x\r\n%s\r\nend\r\n"), good_chunks),
    "in a chunk that is longer than all may be": ("400", lambda s: s.chunked("ffffff\r\n%.0x%s\r\n0\r\n\r\n"), good_chunks),
    "in a thousand chunks and one": ("400", lambda s: s.chunked("1\r\n\n\r\n" * 999 + CHUNKS), good_chunks),
    "in chunks elsewhere": ("411", lambda s: s.chunked(CHUNKS, path="/v1/requests"), good_chunks),
    "length with a sign": ("411", lambda s: s.raw(f"{_TYPE}Content-Length: +LENGTH\r\n"), plain_head),
    "blank before a colon": ("400", lambda s: s.raw(f"{_TYPE}Content-Length : LENGTH\r\n"), plain_head),
    "folded header": ("400", lambda s: s.raw(f"Content-Type:\r\n {TYPE}\r\nContent-Length: LENGTH\r\n"), plain_head),
    # --- paths
    "unknown label": ("404", lambda s: s.post(body_of(make_csr()), path="/other/simpleenroll"), good),
    "label in capitals": ("404", lambda s: s.post(body_of(make_csr()), path="/WEB/simpleenroll"), good),
    "label above": ("404", lambda s: s.post(body_of(make_csr()), path="/..%2fweb/simpleenroll"), good),
    "label and back": ("404", lambda s: s.post(body_of(make_csr()), path="/other/../web/simpleenroll"), good),
    "encoded slash": ("404", lambda s: s.post(body_of(make_csr()), path="/web%2fsimpleenroll"), good),
    "encoded twice": ("404", lambda s: s.post(body_of(make_csr()), path="/%2577eb/simpleenroll"), good),
    "two slashes": ("404", lambda s: s.post(body_of(make_csr()), path="//web/simpleenroll"), good),
    "slash at the end": ("404", lambda s: s.post(body_of(make_csr()), path="/web/simpleenroll/"), good),
    "zero byte": ("404", lambda s: s.post(body_of(make_csr()), path="/web%00/simpleenroll"), good),
    "line end in the label": ("404", lambda s: s.post(body_of(make_csr()), path="/web%0d%0a/simpleenroll"), good),
    "parameter of the path": ("404", lambda s: s.post(body_of(make_csr()), path="/web/simpleenroll;x=1"), good),
    "label of SQL": ("404", lambda s: s.post(body_of(make_csr()), path="/web'--/simpleenroll"), good),
    "serverkeygen": ("404", lambda s: s.post(body_of(make_csr()), path="/web/serverkeygen"), good),
    "fullcmc": ("404", lambda s: s.post(body_of(make_csr()), path="/web/fullcmc"), good),
    # --- bodies
    "empty": ("400", lambda s: s.post(b""), good),
    "PEM": ("400", lambda s: s.post(make_csr().public_bytes(Encoding.PEM)), good),
    "DER": ("400", lambda s: s.post(der(make_csr()), Content_Transfer_Encoding="binary"), good),
    "base64 for URLs": ("400", lambda s: s.post(base64.urlsafe_b64encode(b"\xfb\xff" + der(make_csr()))), good),
    "base64 that is cut off": ("400", lambda s: s.post(body_of(make_csr())[:-9]), good),
    "base64 with other characters": ("400", lambda s: s.post(b"!!" + body_of(make_csr())), good),
    "zero byte in base64": ("400", lambda s: s.post(body_of(make_csr()) + b"\0"), good),
    "two CSRs": ("400", lambda s: s.post(base64.b64encode(der(make_csr()) + der(make_csr()))), good),
    "a byte more": ("400", lambda s: s.post(base64.b64encode(der(make_csr()) + b"\0")), good),
    "certificate": ("400", lambda s: s.post(base64.b64encode(
        x509.load_pem_x509_certificate(s.agent["client_cert"].read_bytes()).public_bytes(Encoding.DER))), good),
    "forged signature": ("400", lambda s: s.post(forged(make_csr())), good),
    # --- who asks
    "no client certificate": ("403", lambda s: s.enrol(make_csr(), None), good),
    "no certificate to replace": ("403", lambda s: s.enrol(make_csr(), None, _RENEW), good_renewal),
    "certificate in a header": ("403", lambda s: s.enrol(
        make_csr(), None, Ssl_Client_Cert=base64.b64encode(s.agent["client_cert"].read_bytes()).decode(),
        Ssl_Client_Verify="SUCCESS"), good),
    "name of the environ in a header": ("400", lambda s: s.raw(
        f"{_TYPE}Content-Length: LENGTH\r\nca bridge.peer: x\r\n", agent={}), plain_head),
    "Client-Cert of a proxy": ("403", lambda s: s.enrol(make_csr(), None, Client_Cert=":MIIB:"), good),
    "expired agent": ("no", lambda s: s.enrol(make_csr(), s.door.agent(**_ENDED)), good),
    "agent of another CA": ("no", lambda s: s.enrol(make_csr(), s.door.agent(signer=Signer.make("agents", begin=_ENDED["begin"]))), good),
    "agent that is for servers": ("no", lambda s: s.enrol(make_csr(), s.door.agent(ekus=[SERVER])), good),
    "agent of another node": ("403", lambda s: s.enrol(make_csr(), s.door.agent("O=agents,CN=cp-2")), good),
    "agent of a node that the policy has not": (
        "403", lambda s: s.enrol(make_csr("CN=web.worker-1"), s.door.agent("O=agents,CN=worker-1")), good,
    ),
    "agent with a group more": ("403", lambda s: s.enrol(make_csr(), s.door.agent("O=more,O=agents,CN=cp-1")), good),
    "agent with two names": ("403", lambda s: s.enrol(make_csr(), s.door.agent("CN=cp-2,O=agents,CN=cp-1")), good),
    "agent whose node is a pattern": ("403", lambda s: s.enrol(make_csr(), s.door.agent("O=agents,CN=*")), good),
    "agent whose node has attributes": (
        "403", lambda s: s.enrol(make_csr(), s.door.agent("O=agents,CN=cp-1\\,O=agents")), good,
    ),
    "CA's own certificate as a client's": ("403", lambda s: s.enrol(
        make_csr(), write_pair(s.door.directory / "ca-as-client", s.door.signer.certificate, s.door.signer.key)), good),
    "enrolment by the other CA's certificate": ("403", lambda s: s.enrol(make_csr(sans=_SANS), s.own), good),
    "renewal by a certificate of the agents' CA": (
        "403", lambda s: s.renew(make_csr(sans=_SANS), s.door.agent(
            "CN=web.cp-1", sans=[x509.DNSName(name) for name in _SANS], **_OWN)), good_renewal,
    ),
    "renewal by a kubelet's certificate": ("403", lambda s: s.renew(
        make_csr("O=system:nodes,CN=system:node:cp-1"), s.of_ca("O=system:nodes,CN=system:node:cp-1")), good_renewal),
    # --- renewals
    "another node's subject": ("403", lambda s: s.renew(make_csr("CN=web.cp-2", _SANS)), good_renewal),
    "subject with a group more": ("403", lambda s: s.renew(make_csr("O=system:masters,CN=web.cp-1", _SANS)), good_renewal),
    "SAN added": ("403", lambda s: s.renew(make_csr(sans=[*_SANS, "b.cp-1.example.com"])), good_renewal),
    "SAN dropped": ("403", lambda s: s.renew(make_csr(sans=_SANS[:1])), good_renewal),
    "SANs dropped": ("403", lambda s: s.renew(make_csr()), good_renewal),
    "SAN twice": ("403", lambda s: s.renew(make_csr(sans=[*_SANS, _SANS[0]])), good_renewal),
    "renewal of a certificate with less usages": (
        "403", lambda s: s.renew(make_csr(sans=_SANS), s.of_ca(ekus=[CLIENT])), good_renewal,
    ),
    "renewal of an expired certificate": ("no", lambda s: s.renew(make_csr(sans=_SANS), s.of_ca(**_ENDED)), good_renewal),
    "renewal of names that the policy has not": ("403", lambda s: s.renew(
        make_csr(sans=["kubernetes"]), s.of_ca(sans=[x509.DNSName("kubernetes")])), good_renewal),
    # --- the requested certificate
    "another node's name": ("403", lambda s: s.enrol(make_csr("CN=web.cp-2")), good),
    "name of the API server": ("403", lambda s: s.enrol(make_csr("CN=kube-apiserver")), good),
    "no subject": ("403", lambda s: s.enrol(make_csr(x509.Name([]))), good),
    "group that may do everything": ("403", lambda s: s.enrol(make_csr("O=system:masters,CN=web.cp-1")), good),
    "another node's SAN": ("403", lambda s: s.enrol(make_csr(sans=["cp-2"])), good),
    "SAN of the API server": ("403", lambda s: s.enrol(make_csr(sans=["kubernetes.default.svc"])), good),
    "wildcard below the node": ("403", lambda s: s.enrol(make_csr(sans=["*.cp-1.example.com"])), good),
    "address outside of the network": ("403", lambda s: s.enrol(make_csr(sans=["192.0.3.1"])), good),
    "mail address": ("403", lambda s: s.enrol(
        asking(x509.SubjectAlternativeName([x509.RFC822Name("a@cp-1.example.com")]))), good),
    "SAN twice in a first request": ("403", lambda s: s.enrol(make_csr(sans=["cp-1", "cp-1"])), good),
    "too many SANs": ("403", lambda s: s.enrol(make_csr(sans=[f"n{n}.cp-1.example.com" for n in range(101)])), good),
    "CA:TRUE": ("403", lambda s: s.enrol(asking(x509.BasicConstraints(ca=True, path_length=None))), good),
    "keyCertSign": ("403", lambda s: s.enrol(asking(usage(ca=True))), good),
    "usages of its own": ("403", lambda s: s.enrol(
        asking(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]))), good),
    "challengePassword": ("403", lambda s: s.enrol(
        make_csr(attributes={AttributeOID.CHALLENGE_PASSWORD: b"tls-unique"})), good),
    "weak key": ("403", lambda s: s.enrol(make_csr(key=weak(1024))), good),
    "odd curve": ("403", lambda s: s.enrol(make_csr(key=ec.generate_private_key(ec.SECP521R1()))), good),
    # --- secrets
    "no header for a secret": ("401", lambda s: s.enrol(make_csr(), None, "/first/simpleenroll"), good_secret),
    "bad base64": ("401", lambda s: s.basic(make_csr(), "Basic !!!"), good_secret),
    "no colon": ("401", lambda s: s.basic(make_csr(), "Basic Y3AtMQ=="), good_secret),
    "bytes that are no text": ("401", lambda s: s.basic(make_csr(), "Basic /////w=="), good_secret),
    "another scheme": ("401", lambda s: s.basic(make_csr(), header("cp-1", s.secret(), "Bearer")), good_secret),
    "unknown secret": ("401", lambda s: s.basic(make_csr(), header("cp-1", "A" * 43)), good_secret),
    "hash as the secret": ("401", lambda s: s.basic(
        make_csr(), header("cp-1", node_proofs.secret_hash(s.secret()) or "")), good_secret),
    "another node with a good secret": ("401", lambda s: s.basic(make_csr("CN=web.cp-2"), header("cp-2", s.secret())), good_secret),
    "another node's names with a good secret": (
        "403", lambda s: s.basic(make_csr("CN=web.cp-2"), header("cp-1", s.secret())), good_secret,
    ),
    "a used secret once more": ("403", lambda s: s.basic(make_csr(), header("cp-1", s.used())), good_secret),
    "a secret for another certificate": (
        "403", lambda s: s.basic(make_csr(), header("cp-1", s.secret(certificates=("apiserver",)))), good_secret,
    ),
    "a secret for a renewal": (
        "403", lambda s: s.basic(make_csr(), header("cp-1", s.secret()), "/first/simplereenroll"), good_secret,
    ),
    "a secret at a label without secrets": (
        "403", lambda s: s.basic(make_csr(), header("cp-1", s.secret()), "/web/simpleenroll"), good_secret,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    pki: Pki = handmade_pki(tmp_path_factory.mktemp("pki"))
    door = make_est_door(tmp_path_factory.mktemp("est"), pki)
    with running(door.program):
        yield Stage(door=door, ca=Signer.load(*pki.ca_pem("ca")))


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_hostile_is_signed(stage: Stage, name: str) -> None:
    """It is turned away before it is kept, and its honest twin gets a certificate."""
    wanted, hostile, twin = HOSTILE[name]
    used = 1 if name == "a used secret once more" else 0
    before = kept(stage)
    found = hostile(stage)
    after = kept(stage)

    assert found[0] == wanted, found
    assert after == (before[0] + used, before[1] + used)
    assert twin(stage)[0] == "200"


def kept(stage: Stage) -> tuple[int, int]:
    """The number of requests that were ever kept, and of certificates that were signed."""
    text = stage.door.program.ask("GET", "/metrics").body.decode()
    lines = [line for line in text.splitlines() if line.startswith("ca_bridge_serve_requests{")]
    return sum(int(line.split()[-1]) for line in lines), len(stage.door.desk.issued())
