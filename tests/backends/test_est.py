"""The EST backend against a real server, and against a double for what its mock CA can't give."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import os
import re
import socket
import ssl
import subprocess
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from backends.est import EstBackend, EstSettings
from bridge.ca import registry
from bridge.contract import Issued, Pending, Secret, SetupRequest, SignRequest
from bridge.errors import (
    BackendError,
    BackendRefusedError,
    BackendUnavailableError,
    NoVerdictError,
    VerificationError,
)
from bridge.pki import verify
from bridge.pki.certificates import name_text, san_entries
from bridge.pki.csr import generate_key
from bridge.settings.load import parse
from bridge.specs import AUTHORITIES, SPECS, CertificateSpec, KeyAlgorithm
from bridge.testing import BackendConformance, TestCA, sign_request
from tests.kit import est as kit
from tests.kit.est import Answer
from tests.kit.forged import validity, with_field
from tests.kit.issuing import SERVER, Signer, cn
from tests.kit.loopback import free_port

Make = Callable[..., EstBackend]
Live = dict[str, x509.Certificate]

VALIDITY = timedelta(days=30)
ESTSERVER_VALIDITY = timedelta(days=90)  # of its mock CA, always
APISERVER, ADMIN, PEER = SPECS["apiserver"], SPECS["admin.conf"], SPECS["etcd-peer"]
ETCD_MEMBERS = (SPECS["etcd-peer"], SPECS["etcd-server"])
EXAMPLE = Path(__file__).resolve().parents[2] / "config/est/config.toml"
PASSWORD = "correct horse battery staple"

_CA = TestCA.make("kubernetes", "ecdsa-p256")
_SIGNER = Signer(certificate=_CA.certificate, key=_CA.key)
_LIVE = {spec.name: _CA.leaf(spec) for spec in SPECS.values()}
#: A double's labels: one a usage class.
_LABELS = {usage: kit.Label(signer=_SIGNER, spec=spec) for usage, spec in kit.EXAMPLES.items()}


def request(spec: CertificateSpec, algorithm: KeyAlgorithm = "ecdsa-p256") -> SignRequest:
    """To renew the certificate that is named like the spec."""
    return sign_request(_LIVE[spec.name], spec, algorithm, VALIDITY)


def request_of(common_name: str, *sans: x509.GeneralName) -> SignRequest:
    """For whatever subject and SANs."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(cn(common_name))
    if sans:
        builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=False)
    csr = builder.sign(generate_key("ecdsa-p256"), hashes.SHA256())
    return SignRequest(spec=PEER, csr_pem=csr.public_bytes(Encoding.PEM), validity=VALIDITY)


def issued(answer: Issued | Pending) -> Issued:
    """An answer that is a certificate."""
    assert isinstance(answer, Issued)
    return answer


def expectation(anchor: x509.Certificate = _CA.certificate) -> verify.Expectation:
    """What the node demands."""
    return verify.Expectation(
        anchors=(anchor,), anchor_name="ca.crt", now=datetime.now(UTC), min_validity=timedelta(days=7)
    )


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> kit.Tls:
    """A server's certificate, and the CA of agents."""
    return kit.make_tls(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def make(tls: kit.Tls) -> Iterator[Make]:
    """Makes backends, whose settings must be without problems, and closes them at the end."""
    with contextlib.ExitStack() as stack:

        def backend(url: str, **keys: Any) -> EstBackend:
            settings = EstSettings(url=url, **{"timeout": timedelta(minutes=2), "ca_file": tls.ca, **keys})
            assert list(settings.problems()) == []
            return stack.enter_context(contextlib.closing(EstBackend.from_settings(settings)))

        yield backend


@pytest.fixture
def double(tls: kit.Tls) -> Iterator[kit.Double]:
    """A server with one label for each class of usages, which is open to all clients."""
    with kit.double(_LABELS, tls) as played:
        yield played


@pytest.fixture
def ours(double: kit.Double, make: Make) -> EstBackend:
    """A backend for the double."""
    return make(double.url, label="{usage}")


def failure(ask: Callable[[], object]) -> BackendError:
    """The error, which is worded as all of ours are."""
    with pytest.raises(BackendError) as e:
        ask()
    text = str(e.value)
    assert text.startswith("est: ")
    assert text.isprintable()
    assert len(text) < 700
    return e.value


# ------------------------------------------------------------------------------------------------------------ conformance


class Conformance(BackendConformance):
    """The suite with what both have in common; tests are in the classes below."""

    __test__ = False
    unsupported = frozenset({"sign_many"})

    @pytest.fixture(scope="session")
    @classmethod
    def ca(cls) -> TestCA:
        """The CA behind the server."""
        return _CA

    @pytest.fixture(scope="session")
    @classmethod
    def live(cls) -> Live:
        """The certificates to renew."""
        return _LIVE

    @pytest.fixture
    def dead_backend(self, make: Make) -> EstBackend:
        """The backend of a server that is not there."""
        return make(f"https://127.0.0.1:{free_port()}", timeout=timedelta(seconds=2))


@pytest.fixture(scope="module")
def real(tls: kit.Tls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The URL and directory of an `estserver` for the CA itself."""
    directory = tmp_path_factory.mktemp("estserver")
    with kit.estserver(directory, (_CA.certificate_pem, _CA.key_pem), tls) as url:
        yield url, directory


@pytest.mark.kube("estserver")
class TestEstserver(Conformance):
    """GlobalSign's `estserver` for etcd's members, as far as its mock CA goes."""

    __test__ = True
    specs = ETCD_MEMBERS
    validity = ESTSERVER_VALIDITY

    @pytest.fixture
    def backend(self, real: tuple[str, Path], tls: kit.Tls, make: Make) -> EstBackend:
        """With an agent's certificate."""
        return make(real[0], label="{usage}", **tls.agent("agent"))

    @pytest.mark.parametrize("algorithm", ["ecdsa-p256", "ecdsa-p384"])
    def test_signs_exactly_what_was_asked(
        self, backend: Any, live: Live, expected: verify.Expectation, algorithm: KeyAlgorithm
    ) -> None:
        """Elliptic keys: for RSA its mock CA leaves keyEncipherment out, see below."""
        for spec in self.specs:
            asked = sign_request(live[spec.name], spec, algorithm, self.validity)
            verify.check(issued(backend.sign(asked)), asked, expected)


class TestDouble(Conformance):
    """All certificates of a cluster from one CA, an agent's certificate and a password shown."""

    __test__ = True

    @pytest.fixture
    def backend(self, tls: kit.Tls, tmp_path: Path, make: Make) -> Iterator[EstBackend]:
        """A label a usage class, for one agent and one user."""
        password = tmp_path / "password"
        password.write_text(PASSWORD)
        credentials = {**tls.agent("agent"), "username": "node-1", "password": Secret("file", str(password))}
        with kit.double(_LABELS, tls, users={"node-1": PASSWORD}, client_cn="agent") as played:
            yield make(played.url, label="{usage}", **credentials)


# -------------------------------------------------------------------------------------------------------------- estserver


@pytest.mark.kube("estserver")
class TestRealServer:
    """What `estserver` says of its own accord."""

    def test_no_more_than_the_csr_is_sent(self, real: tuple[str, Path], make: Make) -> None:
        """One enrolment, below the label, and the chain is asked for once for all of them."""
        url, directory = real
        backend = make(url, label="of-{name}")
        for _ in range(3):
            backend.sign(request(PEER))
        paths = [path for path, _ in kit.asked(directory) if path.startswith("/of-")]
        assert paths.count("/of-etcd-peer/simpleenroll") == 3
        assert paths.count("/of-etcd-peer/cacerts") == 1

    @pytest.mark.parametrize(
        ("spec", "algorithm", "subject"),
        [(APISERVER, "ecdsa-p256", "EKU"), (ADMIN, "ecdsa-p256", "EKU"), (PEER, "rsa-2048", "KeyUsage")],
    )
    def test_a_label_that_means_nothing_is_found_by_the_proof(
        self, real: tuple[str, Path], make: Make, spec: CertificateSpec, algorithm: KeyAlgorithm, subject: str
    ) -> None:
        """Every label gives the same usages there, and no request could tell; the proof does, by name."""
        backend, asked = make(real[0], label="{usage}"), request(spec, algorithm)
        assert backend.check([spec]) == {}
        with pytest.raises(VerificationError) as e:
            verify.check(issued(backend.sign(asked)), asked, expectation())
        assert [violation.subject for violation in e.value.violations] == [subject]

    def test_an_issuing_ca_and_its_chain(self, tls: kit.Tls, tmp_path: Path, make: Make) -> None:
        """The one that signs comes first, and a leaf has what it needs up to the root, which is left out."""
        root = Signer.make("kubernetes")
        middle = Signer.make("middle", parent=root)
        low = Signer.make("low", parent=middle)
        chain = b"".join(one.certificate.public_bytes(Encoding.PEM) for one in (low, middle, root))
        key = TestCA(certificate=low.certificate, key=low.key).key_pem
        with kit.estserver(tmp_path, (chain, key), tls) as url:
            backend, asked = make(url), request(PEER)
            assert backend.issuers() == [low.certificate, middle.certificate, root.certificate]
            given = issued(backend.sign(asked))
        assert given.intermediates == (low.certificate, middle.certificate)
        verify.check(given, asked, expectation(root.certificate))

    def test_no(self, real: tuple[str, Path], make: Make) -> None:
        """A refusal is one, in the server's words, and says who was not allowed what."""
        e = failure(lambda: make(real[0], label="triggererrors").sign(request_of("Trigger Error Forbidden")))
        assert isinstance(e, BackendRefusedError)
        assert "HTTP 403, triggered forbidden response" in str(e)
        assert "a client without client_cert or username" in e.hint

    def test_later(self, real: tuple[str, Path], make: Make) -> None:
        """A deferred answer is pending, and not asked for again before the time that the server named."""
        url, directory = real
        backend, asked = make(url, label="triggererrors"), request_of("Trigger Error Deferred")
        answer = backend.sign(asked)
        assert isinstance(answer, Pending)
        assert "triggered deferred response" in answer.note
        count = len(kit.asked(directory))
        again = backend.collect(asked, answer.reference)
        assert isinstance(again, Pending)
        assert again.reference == answer.reference
        assert "asks to wait until" in again.note
        assert len(kit.asked(directory)) == count

    def test_its_ca_fails(self, real: tuple[str, Path], make: Make) -> None:
        """A trouble behind the server may pass."""
        backend = make(real[0], label="triggererrors")
        e = failure(lambda: backend.sign(request_of("Trigger Error Unknown")))
        assert isinstance(e, BackendUnavailableError)
        assert "HTTP 500" in str(e)
        assert isinstance(failure(backend.issuers), BackendUnavailableError)

    def test_a_csr_that_is_too_long(self, real: tuple[str, Path], make: Make) -> None:
        """The server says 500, and the hint what it may mean; a third of it passes."""
        names = [x509.DNSName(f"node-{number}.cluster.example") for number in range(4000)]
        e = failure(lambda: make(real[0]).sign(request_of("many", *names)))
        assert isinstance(e, BackendUnavailableError)
        assert "64 KiB" in e.hint
        issued(make(real[0]).sign(request_of("fewer", *names[:1300])))

    def test_a_label_of_several_segments(self, real: tuple[str, Path], make: Make) -> None:
        """A server that knows one segment alone says 404, before anything is asked of it."""
        backend = make(real[0], label="devices/{usage}")
        assert "HTTP 404" in str(backend.check([PEER])["etcd-peer"][0])
        e = failure(lambda: backend.sign(request(PEER)))
        assert isinstance(e, BackendRefusedError)
        assert "several segments" in e.hint

    def test_a_host_that_it_does_not_answer_for(self, tls: kit.Tls, tmp_path: Path, make: Make) -> None:
        """The hint names the host in url."""
        pems = _CA.certificate_pem, _CA.key_pem
        with kit.estserver(tmp_path, pems, tls, allowed_hosts=["est.corp.example"]) as url:
            e = failure(make(url).issuers)
        assert isinstance(e, BackendRefusedError)
        assert "host in url" in e.hint

    def test_too_many_requests(self, tls: kit.Tls, tmp_path: Path, make: Make) -> None:
        """A rate limit is a reason to ask later."""
        with kit.estserver(tmp_path, (_CA.certificate_pem, _CA.key_pem), tls, rate_limit=1) as url:
            backend = make(url)
            e = failure(lambda: [backend.sign(request(PEER)) for _ in range(20)])
        assert isinstance(e, BackendUnavailableError)
        assert "HTTP 429, rate limit exceeded" in str(e)
        assert "how often" in e.hint

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("server-only", "not good for clientAuth"),
            ("expired", "it is valid from"),
            ("foreign", "its CA, or a missing intermediate"),
            ("no-intermediate", "its CA, or a missing intermediate"),
        ],
    )
    def test_a_client_certificate_that_it_does_not_accept(
        self, real: tuple[str, Path], tls: kit.Tls, make: Make, name: str, says: str
    ) -> None:
        """The error names the failed TLS handshake, and the hint says what is wrong with the certificate."""
        other = Signer.make("other", end=datetime.now(UTC) + timedelta(days=2))
        below = Signer.make("below", parent=tls.signer, end=datetime.now(UTC) + timedelta(days=2))
        differences: Mapping[str, dict[str, Any]] = {
            "server-only": {"ekus": [SERVER]},
            "expired": {"end": datetime.now(UTC) - timedelta(minutes=5)},
            "foreign": {"signer": other},
            "no-intermediate": {"signer": below},
        }
        backend = make(real[0], **tls.agent(name, **differences[name]))
        for ask in (backend.issuers, lambda: backend.sign(request(PEER))):
            e = failure(ask)
            assert isinstance(e, BackendRefusedError)
            assert "TLS" in str(e)
            assert says in e.hint

    def test_a_client_certificate_with_its_intermediate(self, real: tuple[str, Path], tls: kit.Tls, make: Make) -> None:
        """The twin: the same agent is accepted with the whole chain in its file."""
        below = Signer.make("below", parent=tls.signer, end=datetime.now(UTC) + timedelta(days=2))
        files = tls.agent("whole-chain", signer=below)
        with files["client_cert"].open("ab") as file:
            file.write(below.certificate.public_bytes(Encoding.PEM))
        issued(make(real[0], **files).sign(request(PEER)))


# ---------------------------------------------------------------------------------------------------------------- answers


def ber(bag: bytes) -> bytes:
    """The same PKCS#7 as BER (RFC 5652 §10.1): its two outermost lengths are left open, as streaming writers have them."""
    oid = bytes.fromhex("06092a864886f70d010702")
    begin = bag.index(oid) + len(oid)
    inner = bag[bag.index(b"\x30", begin) :]
    return b"\x30\x80" + oid + b"\xa0\x80" + inner + bytes(4)


def encoded(*found: x509.Certificate) -> dict[str, Answer]:
    """The same certificates in each form in which servers send them, labelled right, wrong or not at all."""
    der = kit.bag(*found)
    text = base64.b64encode(der)
    wrapped = base64.encodebytes(der)
    pem = b"-----BEGIN PKCS7-----\n" + wrapped + b"-----END PKCS7-----\n"
    return {
        "76 columns, CRLF": Answer.certificates(*found),
        "one line": Answer(body=text),
        "64 columns, LF, blank lines and ends": Answer(
            body=b"\n\n" + b" \n".join(text[i : i + 64] for i in range(0, len(text), 64)) + b"\n\n"
        ),
        "DER, labelled base64": Answer(body=der, headers={"Content-Transfer-Encoding": "base64"}),
        "DER, labelled as such": Answer(body=der, headers={"Content-Type": "application/pkcs7-mime"}),
        "base64, labelled binary": Answer(body=wrapped, headers={"Content-Transfer-Encoding": "binary"}),
        "base64, labelled as text": Answer(body=wrapped, headers={"Content-Type": "text/plain"}),
        "BER, lengths left open": Answer(body=ber(der)),
        "PEM": Answer(body=pem, headers={"Content-Type": "application/x-pem-file"}),
        "PEM, CRLF": Answer(body=pem.replace(b"\n", b"\r\n")),
    }


@pytest.mark.parametrize("form", list(encoded(_CA.certificate)))
def test_reads_every_form_of_answer(double: kit.Double, ours: EstBackend, form: str) -> None:
    """Each form is read in `cacerts` and in `simpleenroll`, with any Content-Type and Content-Transfer-Encoding."""
    double.cacerts.append(encoded(_CA.certificate)[form])
    double.answers.append(lambda csr: encoded(_LABELS["server"].issue(csr, VALIDITY))[form])
    asked = request(APISERVER)
    verify.check(issued(ours.sign(asked)), asked, expectation())


def test_finds_the_leaf_by_its_key(double: kit.Double, ours: EstBackend) -> None:
    """A PKCS#7 is a set: the leaf among its chain and strangers is that with the CSR's key, the latest of several."""
    root = Signer.make("root")
    middle = Signer.make("middle", parent=root)
    label = kit.Label(signer=middle, spec=APISERVER)
    now = datetime.now(UTC)

    def answer(csr: x509.CertificateSigningRequest) -> Answer:
        asked = SignRequest(spec=APISERVER, csr_pem=csr.public_bytes(Encoding.PEM), validity=VALIDITY)
        old = middle.issue(asked, begin=now - timedelta(days=9), end=now + timedelta(days=1)).leaf
        stranger = label.issue(request_of("stranger").csr, VALIDITY)
        return Answer.certificates(stranger, old, root.certificate, label.issue(csr, VALIDITY), middle.certificate)

    double.answers.append(answer)
    asked = request(APISERVER)
    given = issued(ours.sign(asked))
    assert given.leaf.not_valid_before_utc > now - timedelta(hours=1)
    assert given.intermediates[0] == middle.certificate
    assert root.certificate not in given.intermediates
    verify.check(given, asked, expectation(root.certificate))


def test_a_roll_over_of_the_cas_key(double: kit.Double, ours: EstBackend) -> None:
    """The certificate of the old key by the new one is kept, so that a node with the new anchor accepts the leaf."""
    old, new = Signer.make("kubernetes"), Signer.make("kubernetes")
    old_with_new = Signer.make("kubernetes", parent=new, key=old.key)
    double.cacerts.append(Answer.certificates(old.certificate, new.certificate, old_with_new.certificate))
    double.answers.append(lambda csr: Answer.certificates(kit.Label(signer=old, spec=ADMIN).issue(csr, VALIDITY)))
    asked = request(ADMIN)
    given = issued(ours.sign(asked))
    for anchor in (old, new):
        verify.check(given, asked, expectation(anchor.certificate))
    with pytest.raises(VerificationError):
        verify.check(given, asked, expectation(Signer.make("kubernetes").certificate))


def test_a_new_certificate_of_the_ca_is_read_while_a_service_runs(double: kit.Double, ours: EstBackend) -> None:
    """A gateway that runs for months has the chain of each leaf, and the CA's end, though it asks for `cacerts` seldom."""
    root = Signer.make("root")
    for number, name in enumerate(("old", "new"), start=1):
        middle = Signer.make(name, parent=root)
        double.cacerts.append(Answer.certificates(middle.certificate, root.certificate))
        double.always = lambda csr, ca=middle: Answer.certificates(
            kit.Label(signer=ca, spec=ADMIN).issue(csr, VALIDITY)
        )
        for _ in range(2):
            asked = request(ADMIN)
            verify.check(issued(ours.sign(asked)), asked, expectation(root.certificate))
        assert double.asked.count("client cacerts") == number
    double.cacerts.append(Answer.certificates(_CA.certificate))
    assert ours.issuers() == [_CA.certificate]


def test_a_certificate_for_another_key_is_refused(double: kit.Double, ours: EstBackend) -> None:
    """The error for an answer to another client's request names the subject in it."""
    double.answers.append(Answer.certificates(_LABELS["server"].issue(request_of("somebody else").csr, VALIDITY)))
    e = failure(lambda: ours.sign(request(APISERVER)))
    assert isinstance(e, BackendRefusedError)
    assert "CN=somebody else" in str(e)
    assert "older request" in e.hint


GARBAGE: Mapping[str, Answer] = {
    "empty": Answer(),
    "not base64": Answer(body=b"!!" + base64.b64encode(kit.bag(_CA.certificate))),
    "base64 of something else": Answer(body=base64.b64encode(b"certificate")),
    "a bare certificate": Answer(body=_CA.certificate.public_bytes(Encoding.DER)),
    "a PEM certificate": Answer(body=_CA.certificate_pem),
    "cut off DER": Answer(body=kit.bag(_CA.certificate)[:-40]),
    "too many": Answer(body=kit.bag(*[_CA.leaf(ADMIN) for _ in range(51)])),
    "a log-in page": Answer(body=b"<html><title>Sign\x1b[31m in</title></html>", headers={"Content-Type": "text/html"}),
    "JSON": Answer(body=b'{"error": "no"}', headers={"Content-Type": "application/json"}),
}


@pytest.mark.parametrize("case", GARBAGE)
@pytest.mark.usefixtures("failure_is_counted")
def test_what_is_no_pkcs7_is_refused(double: kit.Double, ours: EstBackend, case: str) -> None:
    """The error shows what was found instead, as far as a person can read it."""
    double.answers.append(GARBAGE[case])
    e = failure(lambda: ours.sign(request(APISERVER)))
    assert isinstance(e, BackendRefusedError)
    assert "wanted certificates in PKCS#7" in str(e)
    assert "proxy or a log-in page" in e.hint
    assert ("'Sign [31m in'" in str(e)) == (case == "a log-in page")
    assert ('{"error": "no"}' in str(e)) == (case == "JSON")


def test_a_certificate_without_extensions_twice_is_refused(double: kit.Double, ours: EstBackend) -> None:
    """A certificate that the library can't read is an error of ours, whichever error of its own that is."""
    from tests.kit.issuing import odd_certificates

    double.answers.append(Answer(body=odd_certificates(_CA.certificate)["an unknown version, PKCS#7"]))
    assert isinstance(failure(lambda: ours.sign(request(APISERVER))), BackendRefusedError)


@pytest.mark.parametrize("begin", [b"00000101000000Z", b"20200101000000Z"])
def test_a_certificate_from_the_year_0_is_refused(double: kit.Double, ours: EstBackend, begin: bytes) -> None:
    """Its error is one of the backend's, so that the run goes on at other CAs; the same with a good date is an answer."""

    def answer(csr: x509.CertificateSigningRequest) -> Answer:
        asked = SignRequest(spec=APISERVER, csr_pem=csr.public_bytes(Encoding.PEM), validity=VALIDITY)
        now = datetime.now(UTC)
        leaf = Signer.make("root").issue(asked, begin=now, end=now + VALIDITY).leaf
        dated = with_field(leaf, 4, validity(begin, b"20991231235959Z"))
        return Answer.certificates(x509.load_pem_x509_certificate(dated.encode()))

    double.answers.append(answer)
    if begin.startswith(b"0000"):
        assert isinstance(failure(lambda: ours.sign(request(APISERVER))), BackendRefusedError)
    else:
        assert issued(ours.sign(request(APISERVER))).leaf.not_valid_before_utc == datetime(2020, 1, 1, tzinfo=UTC)


STATUSES: Mapping[str, tuple[Answer, type[BackendError], str, str]] = {
    "204": (Answer(status=204), NoVerdictError, "HTTP 204", "EST server"),
    "302": (
        Answer(status=302, headers={"Location": "https://elsewhere.example/.well-known/est/simpleenroll"}),
        NoVerdictError,
        "HTTP 302",
        "https://elsewhere.example/",
    ),
    "307, nowhere": (Answer(status=307), NoVerdictError, "HTTP 307", "nowhere"),
    "400": (Answer.text(400, "bad proof-of-possession"), BackendRefusedError, "bad proof-of-possession", "tls-unique"),
    "401": (
        Answer.text(401, "authorization required", WWW_Authenticate='Basic realm="est"'),
        NoVerdictError,
        "HTTP 401, authorization required",
        "username and password_file",
    ),
    "401, Digest": (
        Answer.text(401, "authorization required", WWW_Authenticate='Digest realm="est, Basic", qop="auth"'),
        NoVerdictError,
        "HTTP 401",
        "the server wants Digest",
    ),
    "403": (Answer.text(403, "not you"), BackendRefusedError, "HTTP 403, not you", "policy"),
    "404": (Answer.text(404, "page not found"), NoVerdictError, "HTTP 404", "label"),
    "405": (Answer(status=405), NoVerdictError, "HTTP 405", "EST server"),
    "408": (Answer(status=408), BackendUnavailableError, "HTTP 408", ""),
    "413": (Answer(status=413), BackendRefusedError, "HTTP 413", "length of a CSR"),
    "415": (
        Answer.text(415, "missing Content-Transfer-Encoding header"),
        BackendRefusedError,
        "HTTP 415, missing Content-Transfer-Encoding header",
        "proxy",
    ),
    "418": (Answer(status=418), NoVerdictError, "HTTP 418", "log"),
    "421": (Answer(status=421), NoVerdictError, "HTTP 421", "host in url"),
    "422": (Answer(status=422), BackendRefusedError, "HTTP 422", "policy"),
    "429": (Answer.text(429, "rate limit exceeded"), BackendUnavailableError, "rate limit exceeded", "how often"),
    "500": (Answer.text(500, "internal server error"), BackendUnavailableError, "internal server error", "64 KiB"),
    "501": (Answer(status=501), NoVerdictError, "HTTP 501", "log"),
    "502": (
        Answer(status=502, body=b"<html><title>Bad Gateway</title>", headers={"Content-Type": "text/html"}),
        BackendUnavailableError,
        "a web page, 'Bad Gateway'",
        "",
    ),
    "503": (Answer(status=503, headers={"Retry-After": "7"}), BackendUnavailableError, "HTTP 503", "too much to do"),
    "504": (Answer(status=504), BackendUnavailableError, "HTTP 504", ""),
}


@pytest.mark.parametrize("case", STATUSES)
@pytest.mark.usefixtures("failure_is_counted")
def test_statuses(double: kit.Double, ours: EstBackend, case: str) -> None:
    """Each is an error that says whether asking again may help, in the server's words, with what to do next."""
    answer, kind, says, hint = STATUSES[case]
    double.answers.append(answer)
    e = failure(lambda: ours.sign(request(APISERVER)))
    assert type(e) is kind
    assert says in str(e)
    assert hint in e.hint
    if isinstance(e, BackendUnavailableError):
        assert e.retry_after_seconds == (7 if case == "503" else None)


def test_a_proxys_date_of_return(double: kit.Double, ours: EstBackend) -> None:
    """Retry-After may be a date."""
    moment = format_datetime(datetime.now(UTC) + timedelta(minutes=5), usegmt=True)
    double.answers.append(Answer(status=503, headers={"Retry-After": moment}))
    e = failure(lambda: ours.sign(request(APISERVER)))
    assert isinstance(e, BackendUnavailableError)
    assert e.retry_after_seconds is not None
    assert 0 < e.retry_after_seconds <= 300


# ------------------------------------------------------------------------------------------------------------------ later


def test_the_same_csr_is_asked_again(double: kit.Double, ours: EstBackend) -> None:
    """Pending until the server answers; byte for byte the same request each time, as nothing else names the order."""
    double.answers += [Answer(status=202), Answer.text(202, "triggered deferred response", Retry_After="0")]
    asked = request(APISERVER)
    first = ours.sign(asked)
    assert isinstance(first, Pending)
    assert first.note == "the server answers later"
    second = ours.collect(asked, first.reference)
    assert isinstance(second, Pending)
    assert "triggered deferred response" in second.note
    verify.check(issued(ours.collect(asked, second.reference)), asked, expectation())
    assert double.csrs == [asked.csr.public_bytes(Encoding.DER)] * 3


def test_a_time_to_wait_is_kept_for_a_day_at_most(double: kit.Double, ours: EstBackend) -> None:
    """A server can't put a renewal off until the certificate has expired; nor can a clock that was put back."""
    double.answers.append(Answer(status=202, headers={"Retry-After": "999999999"}))
    asked = request(APISERVER)
    answer = ours.sign(asked)
    assert isinstance(answer, Pending)
    digest, _, moment = answer.reference.partition("@")
    assert int(moment) <= (datetime.now(UTC) + timedelta(days=1)).timestamp()
    assert isinstance(ours.collect(asked, answer.reference), Pending)
    for later in (int(moment) + 5000, 10**30):  # as after an hour that came twice; and what no calendar has
        issued(ours.collect(asked, f"{digest}@{later}"))
    assert len(double.csrs) == 3


def test_another_csrs_reference_is_refused(ours: EstBackend) -> None:
    """A reference that would be a new order for the CA is not sent."""
    e = failure(lambda: ours.collect(request(APISERVER), "0" * 64))
    assert isinstance(e, BackendRefusedError)
    assert "pending cancel" in e.hint


def test_a_later_no(double: kit.Double, ours: EstBackend) -> None:
    """A refusal after the wait is one."""
    double.answers += [Answer(status=202), Answer.text(403, "the approver said no")]
    asked = request(APISERVER)
    answer = ours.sign(asked)
    assert isinstance(answer, Pending)
    e = failure(lambda: ours.collect(asked, answer.reference))
    assert isinstance(e, BackendRefusedError)
    assert not isinstance(e, NoVerdictError)
    assert "the approver said no" in str(e)


@pytest.mark.parametrize(
    "answer",
    [
        Answer.text(401, "who?"),
        Answer(status=302, headers={"Location": "https://sso.example/"}),
        Answer(status=200, headers={"Content-Type": "text/html"}, body=b"<html>"),
        Answer.text(404, "no such page"),
    ],
)
def test_what_is_no_verdict_keeps_an_order(double: kit.Double, ours: EstBackend, answer: Answer) -> None:
    """A server that does not let us in, or is none of EST's, has not refused the request that waits."""
    double.answers += [Answer(status=202), answer]
    asked = request(APISERVER)
    first = ours.sign(asked)
    assert isinstance(first, Pending)
    assert isinstance(failure(lambda: ours.collect(asked, first.reference)), NoVerdictError)
    verify.check(issued(ours.collect(asked, first.reference)), asked, expectation())


def test_a_client_that_is_not_let_in_keeps_its_order(double: kit.Double, ours: EstBackend) -> None:
    """A 403 that the server gives without a CSR, too, is about the client, whose order is there when it is let in again."""
    double.answers.append(Answer(status=202))
    asked, client = request(APISERVER), double.client_cn
    first = ours.sign(asked)
    assert isinstance(first, Pending)
    double.client_cn = "another"
    e = failure(lambda: ours.collect(asked, first.reference))
    assert isinstance(e, NoVerdictError)
    assert "HTTP 403, no rights" in str(e)
    assert "whatever the CSR is" in e.hint
    double.client_cn = client
    verify.check(issued(ours.collect(asked, first.reference)), asked, expectation())


# ------------------------------------------------------------------------------------------------------- labels, preflight


def test_labels(tls: kit.Tls, make: Make) -> None:
    """A pattern, exceptions to it, and several segments, each percent-encoded by itself."""
    server, client = _LABELS["server"], _LABELS["client"]
    labels = {"IOT%201/dg/cp%C3%BC/server": server, "IOT%201/dg/cp%C3%BC/client": client, "root%3F": client}
    with kit.double(labels, tls) as played:
        backend = make(played.url, label="IOT 1/dg/cpü/{usage}", labels={"admin.conf": "root?"})
        for spec in (APISERVER, ADMIN, SPECS["scheduler.conf"]):
            asked = request(spec)
            verify.check(issued(backend.sign(asked)), asked, expectation())
    enrolled = [one.removesuffix(" simpleenroll") for one in played.asked if one.endswith(" simpleenroll")]
    assert enrolled == ["IOT%201/dg/cp%C3%BC/server", "root%3F", "IOT%201/dg/cp%C3%BC/client"]


def test_a_path_before_the_root_and_no_label(tls: kit.Tls, make: Make) -> None:
    """Without a label the server's default is asked; a slash at the end of url is none too many."""
    with kit.double({"": _LABELS["peer"]}, tls) as played:
        asked = request(PEER)
        verify.check(issued(make(f"{played.url}/").sign(asked)), asked, expectation())
    assert played.asked == ["simpleenroll", "cacerts"]


def test_the_preflight_spends_nothing(double: kit.Double, ours: EstBackend) -> None:
    """It asks for each label's CA once, and enrols no certificate."""
    ours.issuers()
    assert ours.check(list(SPECS.values())) == {}
    assert double.csrs == []
    assert [double.asked.count(f"{usage} cacerts") for usage in _LABELS] == [1, 1, 1]


def test_the_preflight_names_a_label_that_is_not_there(double: kit.Double, make: Make) -> None:
    """Its certificates alone, the others may be asked for."""
    backend = make(double.url, label="{usage}", labels={"apiserver": "kube"})
    found = backend.check([APISERVER, ADMIN])
    assert list(found) == ["apiserver"]
    assert str(found["apiserver"][0]).startswith("label 'kube': wanted one that the server knows")


def test_the_preflight_finds_labels_of_two_cas(tls: kit.Tls, make: Make) -> None:
    """All labels of an authority have to belong to one CA; which one is right the node's anchor tells."""
    other = kit.Label(signer=Signer.make("etcd"), spec=PEER)
    with kit.double({**_LABELS, "peer": other}, tls) as played:
        found = make(played.url, label="{usage}").check((*ETCD_MEMBERS, ADMIN))
    assert list(found) == ["admin.conf"]
    assert "wanted the same CA as other labels, CN=etcd, got CN=kubernetes" in str(found["admin.conf"][0])


def test_the_ca_is_found_by_a_label_that_is_there(tls: kit.Tls, make: Make) -> None:
    """With a label a certificate those of other authorities are not there, and are passed over; nor is any of all."""
    etcd = {name: kit.Label(signer=_SIGNER, spec=SPECS[name]) for name in ("etcd-healthcheck-client", "etcd-peer")}
    with kit.double(etcd, tls) as played:
        assert make(played.url, label="{name}").issuers() == [_CA.certificate]
        e = failure(make(played.url, label="x{name}").issuers)
    assert isinstance(e, BackendRefusedError)
    assert "has the server this label" in e.hint


def test_a_server_that_sorts_its_certificates(double: kit.Double, make: Make) -> None:
    """The backend recognises the signing CA by what it certifies, not by its place."""
    root = Signer.make("root")
    middle = Signer.make("middle", parent=root)
    for order in ([root, middle], [middle, root]):
        lines = b"".join(
            base64.b64encode(kit.bag(*(one.certificate for one in order))) for _ in range(1)
        )  # sorted by the library in either case
        double.cacerts.append(Answer(body=lines))
        assert make(double.url, label="{usage}").issuers() == [middle.certificate, root.certificate]


# ------------------------------------------------------------------------------------------------------------ credentials


@pytest.fixture
def password_file(tmp_path: Path) -> Path:
    """With the right password."""
    path = tmp_path / "password"
    path.write_text(f"{PASSWORD}\n")
    return path


def test_the_password_is_sent_where_it_is_wanted_alone(tls: kit.Tls, password_file: Path, make: Make) -> None:
    """With an enrolment (the double complains about any other), in UTF-8, whatever it holds."""
    password_file.write_text("gehèim: 1")
    with kit.double(_LABELS, tls, users={"knoten-ü": "gehèim: 1"}) as played:
        keys = {"username": "knoten-ü", "password": Secret("file", str(password_file))}
        backend = make(played.url, label="{usage}", **keys)
        assert backend.check([APISERVER]) == {}
        issued(backend.sign(request(APISERVER)))
        assert backend.identity() == "user knoten-ü"


@pytest.mark.parametrize("given", ["wrong", "none", "unreadable"])
def test_a_wrong_password(tls: kit.Tls, password_file: Path, make: Make, given: str) -> None:
    """Found by the preflight, and at the signing; the text has no password in it."""
    password_file.write_text("wrong-s3cret" if given == "wrong" else "")
    keys = {} if given == "none" else {"username": "node-1", "password": Secret("file", str(password_file))}
    with kit.double(_LABELS, tls, users={"node-1": PASSWORD}) as played:
        backend = make(played.url, label="{usage}", **keys)
        e = failure(lambda: backend.sign(request(APISERVER)))
        assert isinstance(e, BackendRefusedError)
        assert {"wrong": "another password", "none": "username and password_file", "unreadable": "password_file"}[
            given
        ] in e.hint
        if given != "unreadable":
            assert "401" in str(backend.check([APISERVER])["apiserver"][0])
        assert "s3cret" not in "".join(traceback.format_exception(e)) + e.hint
        assert played.csrs == []


def test_what_repeats_our_password_is_not_repeated(tls: kit.Tls, password_file: Path, make: Make) -> None:
    """Neither as it is nor as it was sent."""
    basic = base64.b64encode(f"node-1:{PASSWORD}".encode()).decode()
    with kit.double(_LABELS, tls, users={"node-1": PASSWORD}) as played:
        keys = {"username": "node-1", "password": Secret("file", str(password_file))}
        backend = make(played.url, label="{usage}", **keys)
        played.answers.append(Answer.text(403, f"Basic {basic} ({PASSWORD}) may not"))
        e = failure(lambda: backend.sign(request(APISERVER)))
        played.answers.append(Answer(status=302, headers={"Location": f"https://x.example/?{basic}&{PASSWORD}"}))
        moved = failure(lambda: backend.sign(request(APISERVER)))
    assert "HTTP 403, Basic … (…) may not" in str(e)
    assert "https://x.example/?…&…" in moved.hint


def test_a_redirect_takes_no_password_along(tls: kit.Tls, password_file: Path, make: Make) -> None:
    """The other server is not asked at all."""
    keys = {"username": "node-1", "password": Secret("file", str(password_file))}
    with kit.double(_LABELS, tls) as other, kit.double(_LABELS, tls, users={"node-1": PASSWORD}) as played:
        played.answers.append(Answer(status=307, headers={"Location": f"{other.url}/.well-known/est/x/simpleenroll"}))
        e = failure(lambda: make(played.url, label="{usage}", **keys).sign(request(APISERVER)))
    assert other.url in e.hint
    assert other.asked == []


def test_rights_of_an_agent(tls: kit.Tls, make: Make) -> None:
    """Another agent is refused by the preflight and at the signing, and the hint says who we are."""
    with kit.double(_LABELS, tls, client_cn="agent") as played:
        issued(make(played.url, label="{usage}", **tls.agent("agent")).sign(request(APISERVER)))
        backend = make(played.url, label="{usage}", **tls.agent("stranger"))
        assert "no rights for stranger" in str(backend.check([APISERVER])["apiserver"][0])
        e = failure(lambda: backend.sign(request(APISERVER)))
        assert backend.identity() == "CN=stranger"
    assert "the client certificate" in e.hint


def test_a_server_that_wants_a_client_certificate(tls: kit.Tls, make: Make) -> None:
    """TLS breaks where none is shown, and the hint asks for one; with one it does not."""
    with kit.double(_LABELS, tls, verify_mode=ssl.CERT_REQUIRED) as played:
        issued(make(played.url, label="{usage}", **tls.agent("agent")).sign(request(APISERVER)))
        e = failure(lambda: make(played.url, label="{usage}").sign(request(APISERVER)))
    assert isinstance(e, BackendRefusedError)
    assert "client_cert and client_key" in e.hint


def test_a_client_certificate_that_is_wanted_later(tls: kit.Tls, make: Make) -> None:
    """A server that asks for it after the handshake of TLS 1.3, for some URLs only, is shown it, too."""
    shown: list[Any] = []

    def talk(there: socket.socket) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls.server_cert, tls.server_key)
        context.load_verify_locations(tls.ca)
        context.verify_mode, context.post_handshake_auth = ssl.CERT_REQUIRED, True
        with context.wrap_socket(there, server_side=True) as secure:
            secure.recv(1 << 16)
            shown.append(secure.getpeercert())
            secure.verify_client_post_handshake()
            secure.do_handshake()
            secure.settimeout(0.1)
            while secure.getpeercert() is None:  # for as long as the client has patience
                with contextlib.suppress(TimeoutError):
                    secure.recv(1)
            shown.append((secure.getpeercert() or {}).get("subject"))
            body = kit.bag(_CA.certificate)
            secure.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

    with talking(talk) as port:
        assert make(f"https://127.0.0.1:{port}", **tls.agent("agent")).issuers() == [_CA.certificate]
    assert shown == [None, ((("commonName", "agent"),),)]


def test_no_identity_at_an_open_server(ours: EstBackend) -> None:
    """A server that asks for no credentials knows us by no name."""
    assert ours.identity() == ""


def test_a_client_certificate_that_was_taken_away(tls: kit.Tls, double: kit.Double, make: Make) -> None:
    """Files that were good when the run began are an error of ours, too, when they are not any more."""
    files = tls.agent("short-lived")
    backend = make(double.url, label="{usage}", **files)
    files["client_cert"].unlink()
    for ask in (lambda: backend.sign(request(APISERVER)), backend.identity):
        e = failure(ask)
        assert isinstance(e, BackendRefusedError)
        assert "short-lived.crt" in str(e)


# ------------------------------------------------------------------------------------------------------ hostile, TLS, HTTP


@contextlib.contextmanager
def talking(talk: Callable[[socket.socket], None]) -> Iterator[int]:
    """The port of a server that talks so to each that connects."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    there, _ = listener.accept()
                    threading.Thread(target=one, args=(there,), daemon=True).start()

        def one(there: socket.socket) -> None:
            with there, contextlib.suppress(OSError):
                talk(there)

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]


def test_a_server_that_speaks_no_tls(make: Make) -> None:
    """The hint asks for the port."""
    with talking(lambda there: there.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as port:
        e = failure(make(f"https://127.0.0.1:{port}").issuers)
    assert isinstance(e, BackendRefusedError)
    assert "speak TLS at this port" in e.hint


@pytest.mark.parametrize(
    ("differences", "hint"),
    [
        ({"sans": ["127.0.0.2"]}, "SANs of the server's TLS certificate"),
        ({"left": timedelta(minutes=-5)}, "has to be renewed"),
    ],
    ids=["another address", "expired"],
)
def test_a_server_with_a_wrong_certificate(tmp_path: Path, make: Make, differences: dict[str, Any], hint: str) -> None:
    """Refused before anything is sent, and the hint says which of the two sides has to mend what."""
    wrong = kit.make_tls(tmp_path, **differences)
    with kit.double(_LABELS, wrong) as played:
        e = failure(make(played.url, ca_file=wrong.ca).issuers)
        assert played.asked == []
    assert isinstance(e, BackendRefusedError)
    assert "CERTIFICATE_VERIFY_FAILED" in str(e)
    assert hint in e.hint


def test_the_server_is_pinned_by_ca_file(double: kit.Double, tmp_path: Path, make: Make) -> None:
    """A server with another CA's certificate gets no request, even if the system trusts it; one with the pinned CA's does."""
    other = kit.make_tls(tmp_path)
    e = failure(make(double.url, ca_file=other.ca, label="{usage}").issuers)
    assert "ca_file" in e.hint
    assert double.asked == []
    issued(make(double.url, label="{usage}").sign(request(APISERVER)))


# --------------------------------------------------------------------------------------------------------------- settings

SETTINGS: dict[str, Any] = {"url": "https://est.corp.example"}
USER: dict[str, Any] = {"username": "node-1", "password": Secret("file", "/password")}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"url": "https://est.corp.example:8443/proxy/"},
        {"label": "{usage}"},
        {"label": "tenant/ca/{name}", "labels": {"apiserver": "a/b", "client": ""}},
        {"client_cert": Path("/c"), "client_key": Path("/k"), "ca_file": Path("/ca")},
        USER,
        {**USER, "client_cert": Path("/c"), "client_key": Path("/k")},
    ],
)
def test_settings_without_problems(keys: dict[str, Any]) -> None:
    """These settings go together."""
    assert list(EstSettings(**{**SETTINGS, **keys}).problems()) == []


@pytest.mark.parametrize(
    ("keys", "wrong"),
    [
        ({"url": "http://est.corp.example"}, ["url"]),
        ({"url": "http://127.0.0.1"}, ["url"]),
        ({"url": "https://"}, ["url"]),
        ({"url": "https://est.corp.example:port"}, ["url"]),
        ({"url": "https://est.corp.example/.well-known/est"}, ["url"]),
        ({"url": "https://est.corp.example/?a=b"}, ["url"]),
        ({"url": "https://me:s3cret@est.corp.example"}, ["url"]),
        ({"label": "{role}"}, ["label"]),
        ({"label": "/a"}, ["label"]),
        ({"label": "a//b"}, ["label"]),
        ({"label": "a/../b"}, ["label"]),
        ({"label": "a%2Fb"}, ["label"]),
        ({"label": "a\nb"}, ["label"]),
        ({"label": "simpleenroll"}, ["label"]),
        ({"labels": {"servers": "x", "client": "a/"}}, ["labels.servers", "labels.client"]),
        ({"client_cert": Path("/c")}, ["client_key"]),
        ({"client_key": Path("/k")}, ["client_cert"]),
        ({"username": "node-1"}, ["password_file"]),
        ({"password": Secret("file", "/password")}, ["username"]),
        ({**USER, "username": "a:b"}, ["username"]),
        ({"url": "", "label": "{", "username": "x"}, ["url", "label", "password_file"]),
    ],
)
def test_settings_with_problems(keys: dict[str, Any], wrong: list[str]) -> None:
    """The error names each contradiction by its key, all at once, and shows no secret."""
    problems = list(EstSettings(**{**SETTINGS, **keys}).problems())
    assert [problem.key for problem in problems] == wrong
    assert "s3cret" not in str(problems)


def test_the_example_has_every_key() -> None:
    """It is loaded as it stands, and with its comments taken away; and all keys of the type are in it."""
    text = EXAMPLE.read_text(encoding="utf-8")
    whole = re.sub(r"^# (?=[\w\[\"])(?=.*(=|\]$))", "", text, flags=re.MULTILINE)
    for one in (text, whole):
        settings = parse(one)
        read = registry.configured(settings, settings.authorities)
        assert {configured.type_name for configured in read.values()} == {"est"}
        assert list(read) == list(AUTHORITIES)
    words = set(re.findall(r"\w+", whole))
    assert {field.name for field in dataclasses.fields(EstSettings)} - {"node", "pairs"} <= words | {"password"}
    assert "password_file" in words


# ------------------------------------------------------------------------------------------------------------------ setup


def setup_request(authority: str, **settings: Any) -> SetupRequest:
    """What `ca-bridge setup est` knows about an authority."""
    ours = {name: one for name, one in _LIVE.items() if SPECS[name].authority.name == authority}
    return SetupRequest(
        authority=AUTHORITIES[authority],
        certificates=ours,
        validity=timedelta(days=365),
        node="cp-1",
        cluster="kubernetes",
        settings=settings,
    )


def test_setup_is_an_ability_of_the_type() -> None:
    """The backend's type has the ability as the contract says."""
    assert EstBackend.can("setup")


@pytest.mark.parametrize("authority", AUTHORITIES)
def test_setup_names_every_certificate_below_its_label(authority: str) -> None:
    """Subject, SANs, usages and validity of each; a label a usage class where the settings name none."""
    wanted = setup_request(authority)
    [file] = EstBackend.setup(wanted)
    assert file.name == f"est-{authority}.txt"
    for name, certificate in wanted.certificates.items():
        assert f"\n  {name}\n" in file.text
        assert name_text(certificate.subject) in file.text
        assert all(f" {value}\n" in file.text for _, value in san_entries(certificate))
    assert {line for line in file.text.splitlines() if line.startswith("Label ")} == {
        f"Label {authority}-{SPECS[name].usage}" for name in wanted.certificates
    }
    assert "365 days" in file.text
    assert "CAN'T BE USED" not in file.text


def test_setup_takes_labels_from_the_settings_and_finds_one_that_is_too_wide() -> None:
    """One label for a server and for clients can't give both their usages."""
    url = "https://est.example:8443"
    [good] = EstBackend.setup(setup_request("ca", url=url, label="k8s/{usage}", labels={"admin.conf": "admins"}))
    assert "Label admins" in good.text
    assert "Label k8s/server" in good.text
    assert '  "admin.conf" = "admins"' in good.text
    assert "CAN'T BE USED" not in good.text
    [wide] = EstBackend.setup(setup_request("ca", label="k8s"))
    assert "CAN'T BE USED" in wide.text


@pytest.mark.kube("curl")
def test_setups_commands_show_the_ca(double: kit.Double, tls: kit.Tls) -> None:
    """They are run as printed, with the pinned CA's file, and print the CA's subject."""
    [file] = EstBackend.setup(setup_request("ca", url=double.url, label="{usage}"))
    text = file.text.replace("/etc/ca-bridge/est-tls-ca.crt", str(tls.ca))
    lines = text.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("  curl"))
    run = subprocess.run(
        ["sh", "-c", "\n".join(lines[begin : begin + 2])], capture_output=True, text=True, check=True, env=os.environ
    )
    assert "kubernetes" in run.stdout
