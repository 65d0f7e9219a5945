"""A door that speaks EST: a desk's policy with labels, agents' certificates by a CA of their own, and a client."""

from __future__ import annotations

import base64
import http.client
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, pkcs7

from bridge.contract import SignRequest
from bridge.pki.certificates import pem
from bridge.pki.csr import PrivateKey, generate_key, key_pem
from bridge.specs import SPECS
from tests.kit.desks import POLICY, Desk, make_desk
from tests.kit.issuing import CLIENT, Signer
from tests.kit.pki import Pki
from tests.kit.serving import Answer, ServeProgram, add_door, insist

ROOT = "/.well-known/est"
TYPE = "application/pkcs10"
#: A further pair, whose certificate lets its holder renew it; and the same for those that have one alone.
LABELS = """
[certificate.web]
authority = "ca"
usages = ["server", "client"]
subjects = ["CN=web.{node}"]
sans = ["{node}", ".{node}.example.com", "192.0.2.0/24"]
max_validity = "30d"

[est.web]
cluster = "kubernetes"
clients = ["O=agents,CN={node}", "CN=web.{node}"]
clients_ca = "{agents}"

[est.more]
certificate = "web"
cluster = "kubernetes"
clients = ["O=agents,CN={node}"]
clients_ca = "{agents}"

[est.first]
certificate = "web"
cluster = "kubernetes"
secrets = true

[est.default]
certificate = "web"
cluster = "kubernetes"
clients = ["CN=web.{node}"]
"""
#: What a policy grants to a node of the kit beside kubeadm's own names.
NAMES = "".join(
    f'\n[certificate.{name}]\nsans = ["{{node}}", "localhost", "kubernetes", ".default.svc", "kubernetes.default", '
    '"kubernetes.default.svc", ".svc.cluster.local", ".example.com", "*.wild.example.com", "0.0.0.0/0", "::/0"]\n'
    for name in ("apiserver", "etcd-server", "etcd-peer")
)


@dataclass(frozen=True, kw_only=True)
class EstDoor:
    """The door's program, the desk behind it, and the CA of agents."""

    desk: Desk
    program: ServeProgram
    signer: Signer  #: Of agents' certificates.
    directory: Path

    def agent(self, subject: str = "O=agents,CN=cp-1", **differences: Any) -> dict[str, Path]:
        """A good client certificate with the given changes (of `Signer.issue`, or another `signer`)."""
        number = len(list(self.directory.iterdir()))
        name, now, key = x509.Name.from_rfc4514_string(subject), datetime.now(UTC), generate_key("ecdsa-p256")
        signer = differences.pop("signer", self.signer)
        dates = {"begin": now - timedelta(hours=1), "end": now + timedelta(days=1), "ekus": [CLIENT]}
        request = SignRequest(
            spec=SPECS["apiserver"],
            csr_pem=make_csr(name, key=key).public_bytes(Encoding.PEM),
            validity=timedelta(days=1),
        )
        issued = signer.issue(request, **{**dates, **differences})
        return write_pair(self.directory / f"agent-{number}", issued.leaf, key)

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        agent: Mapping[str, Path] | None = None,
        **headers: str,
    ) -> Answer:
        """One exchange on a connection of its own; OSError: the handshake ended."""
        context = self.program.context()
        if agent is not None:
            context.load_cert_chain(agent["client_cert"], agent["client_key"])
        port = self.program.port
        with closing(http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=180)) as client:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            client.request(method, f"{ROOT}{path}", body, named)
            answer = client.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(status=answer.status, headers=found, body=answer.read())

    def enrol(
        self,
        csr: x509.CertificateSigningRequest,
        agent: Mapping[str, Path] | None,
        path: str = "/web/simpleenroll",
        **headers: str,
    ) -> Answer:
        """A good client's enrolment with the given changes, again while the door has no time for it."""
        return insist(lambda: self.ask("POST", path, body_of(csr), agent, **{"Content_Type": TYPE, **headers}))


def make_est_door(directory: Path, pki: Pki, *, more: str = "", policy: str = "", settings: str = "") -> EstDoor:
    """A desk with the CAs of a PKI, a door, and labels; not started."""
    day = datetime.now(UTC) - timedelta(days=1)
    signer = Signer.make("agents", begin=day, end=day + timedelta(days=9))
    agents = directory / "agents"
    agents.mkdir(parents=True)
    (agents / "ca.crt").write_bytes(pem(signer.certificate))
    desk = make_desk(
        directory / "desk", pki, policy=(policy or POLICY + LABELS + more).replace("{agents}", f"{agents / 'ca.crt'}")
    )
    program = add_door(desk.config, desk.directory, settings)
    return EstDoor(desk=desk, program=program, signer=signer, directory=agents)


def make_csr(
    subject: x509.Name | str = "CN=web.cp-1",
    sans: Sequence[str] = (),
    *,
    key: PrivateKey | None = None,
    extensions: Sequence[tuple[x509.ExtensionType, bool]] = (),
    attributes: Mapping[x509.ObjectIdentifier, bytes] | None = None,
) -> x509.CertificateSigningRequest:
    """A CSR for a key, a new one if none is given."""
    name = x509.Name.from_rfc4514_string(subject) if isinstance(subject, str) else subject
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    if sans:
        builder = builder.add_extension(x509.SubjectAlternativeName([_san(text) for text in sans]), critical=False)
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    for oid, value in (attributes or {}).items():
        builder = builder.add_attribute(oid, value)
    return builder.sign(key or generate_key("ecdsa-p256"), hashes.SHA256())


def _san(text: str) -> x509.GeneralName:
    return x509.IPAddress(ip_address(text)) if text[0].isdigit() else x509.DNSName(text)


def body_of(csr: x509.CertificateSigningRequest) -> bytes:
    """As a client sends it."""
    return base64.encodebytes(csr.public_bytes(Encoding.DER))


def certificates(answer: Answer) -> list[x509.Certificate]:
    """The certificates of a good answer."""
    assert answer.status == 200, (answer.status, answer.body)
    return pkcs7.load_der_pkcs7_certificates(base64.b64decode(b"".join(answer.body.split()), validate=True))


def write_pair(base: Path, certificate: x509.Certificate, key: PrivateKey) -> dict[str, Path]:
    """Files with a client certificate and its key."""
    found = {"client_cert": base.with_suffix(".crt"), "client_key": base.with_suffix(".key")}
    found["client_cert"].write_bytes(pem(certificate))
    found["client_key"].touch(mode=0o600)
    found["client_key"].write_bytes(key_pem(key))
    return found
