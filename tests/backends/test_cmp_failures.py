"""
What an operator reads when a CMP server, or an attacker in its place, does not give a certificate.

The numbers are those of the failures that were measured with openssl 3.0 and 3.5; each has a test here, or is one of the
settings that `test_cmp.py` refuses (a secret that is not there: 3; no reference: 4; no trusted_file: 21; an HTTPS server
that nothing vouches for: 36).
"""

from __future__ import annotations

import contextlib
import ssl
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from backends.cmp import CmpBackend, CmpSettings
from backends.cmp.program import Log, Poll, Program, body_of, failure, poll_of, quoted
from bridge.contract import Issued, Secret, SignRequest
from bridge.errors import BackendError, BackendRefusedError, BackendUnavailableError
from bridge.specs import SPECS
from bridge.testing import TestCA, sign_request, tampered
from tests.kit import cfssl
from tests.kit import cmp as kit
from tests.kit.loopback import free_port

pytestmark = pytest.mark.kube("cmp-ra")

REFUSED: type[BackendError] = BackendRefusedError
UNAVAILABLE: type[BackendError] = BackendUnavailableError
_CA = TestCA.make("kubernetes", "ecdsa-p256")
_SPEC = SPECS["apiserver"]


def a_request() -> SignRequest:
    return sign_request(_CA.leaf(_SPEC), _SPEC, "ecdsa-p256", timedelta(days=30))


@pytest.fixture(scope="module")
def ra(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kit.RegistrationAuthority]:
    """One for all tests of this file, with our CA as `ca`."""
    with kit.registration_authority(tmp_path_factory.mktemp("failing") / "ra") as server:
        server.add_ca("ca", _CA.certificate_pem, _CA.key_pem)
        yield server


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> cfssl.Tls:
    """Certificates for TLS."""
    return cfssl.make_tls(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def mac(ra: kit.RegistrationAuthority) -> dict[str, Any]:
    """Settings with the shared secret."""
    return {"reference": kit.REFERENCE, "secret": Secret("file", str(ra.directory / "node.secret"))}


@pytest.fixture
def signed(ra: kit.RegistrationAuthority) -> dict[str, Any]:
    """Settings with an agent's certificate."""
    return {key: Path(value) for key, value in ra.signature().items()}


def make(url: str, **keys: Any) -> CmpBackend:
    """With time enough for a server on a busy machine; where none answers, a test says for how long to wait."""
    settings = CmpSettings(**{"url": url, "timeout": timedelta(minutes=2), "wait": timedelta(), **keys})
    assert list(settings.problems()) == []
    return CmpBackend.from_settings(settings)


def error_of(backend: CmpBackend, asked: SignRequest | None = None) -> BackendError:
    """Why nothing was signed, on one line that is not too long, with something to do next."""
    with pytest.raises(BackendError) as e:
        backend.sign(asked or a_request())
    text = str(e.value)
    assert text.startswith("cmp: ")
    assert text.isprintable()
    assert len(text) < 500
    assert e.value.hint
    assert kit.SECRET not in text
    return e.value


def other_secret(directory: Path) -> Secret:
    (directory / "secret").write_text("not the secret of the server")
    return Secret("file", str(directory / "secret"))


#: By number: what the server does, which client asks, further settings, the error, and what its text and hint hold.
ANSWERS: list[tuple[str, str, str, dict[str, Any], type[BackendError], str, str]] = [
    ("11", "error", "mac", {}, UNAVAILABLE, "systemUnavail: 'the RA is closed for maintenance'", "run again later"),
    ("11s", "error", "signed", {}, UNAVAILABLE, "systemUnavail: 'the RA is closed for maintenance'", "run again later"),
    ("12", "rawerror", "mac", {}, REFUSED, "without", "`unprotected_errors = true`"),
    ("12a", "rawerror", "mac", {"unprotected_errors": True}, UNAVAILABLE, "closed for maintenance", "run again"),
    ("13", "reject", "mac", {}, REFUSED, "notAuthorized: 'names not registered for this node'", "registered"),
    ("13s", "reject", "signed", {}, REFUSED, "notAuthorized: 'names not registered for this node'", "registered"),
    ("14", "rawreject", "mac", {}, REFUSED, "without", "`unprotected_errors = true`"),
    ("14a", "rawreject", "mac", {"unprotected_errors": True}, REFUSED, "names not registered", "registered"),
    ("15", "raw", "mac", {}, REFUSED, "without", "never taken"),
    ("15a", "raw", "mac", {"unprotected_errors": True}, REFUSED, "without", "never taken"),
    ("15s", "raw", "signed", {"unprotected_errors": True}, REFUSED, "without", "never taken"),
    ("16", "nocert", "mac", {}, REFUSED, "sent no certificate", "log"),
    ("17", "wrongkey", "mac", {}, REFUSED, "for our key, found one for another", "rejected there"),
    ("17s", "wrongkey", "signed", {}, REFUSED, "for our key, found one for another", "rejected there"),
    ("18", "badmac", "mac", {}, REFUSED, "another secret than ours", "in the server's place"),
    ("19n", "nonce", "mac", {}, REFUSED, "another (recipnonce)", "repeated"),
    ("19t", "tid", "mac", {}, REFUSED, "another (transactionid)", "repeated"),
    ("19v", "oldversion", "mac", {}, REFUSED, "wanted CMP version 2", "version"),
    ("22", "", "signed", {"sender": "/CN=another"}, REFUSED, "answer from `sender`", "`sender`"),
    ("23", "badmac", "signed", {}, REFUSED, "signature of the answer is wrong", "in the server's place"),
    ("24", "chainless", "signed", {}, REFUSED, "did not send the certificate", "server"),
    ("30", "noconf", "mac", {}, REFUSED, "certConfirmed: 'confirmed too late'", "discarded"),
    ("loud", "loud", "mac", {}, REFUSED, "notAuthorized: '[2Jno'", "registered"),
    ("long", "long", "mac", {}, REFUSED, "it gave no reason", "log"),
]


@pytest.mark.parametrize(
    ("behaviour", "who", "more", "kind", "text", "hint"), [row[1:] for row in ANSWERS], ids=[row[0] for row in ANSWERS]
)
@pytest.mark.usefixtures("failure_is_counted")
def test_an_answer_of_the_server(
    ra: kit.RegistrationAuthority,
    request: pytest.FixtureRequest,
    behaviour: str,
    who: str,
    more: dict[str, Any],
    kind: type[BackendError],
    text: str,
    hint: str,
) -> None:
    """Each answer has its own message, and its content decides between "refused" and "unavailable"."""
    error = error_of(make(ra.url("ca", behaviour), **request.getfixturevalue(who), **more))
    assert type(error) is kind
    assert text in str(error)
    assert hint in error.hint


def test_a_clock_that_is_off_is_no_failure(ra: kit.RegistrationAuthority, mac: dict[str, Any]) -> None:
    """The twin of all of the above: a server whose clock is a day off, and one that does all as it should."""
    for behaviour in ("skew", "mods", ""):
        assert isinstance(make(ra.url("ca", behaviour), **mac).sign(a_request()), Issued)


@pytest.mark.parametrize("more", [{}, {"unprotected_errors": True}, {"trusted": True}], ids=["1", "2", "1a"])
@pytest.mark.usefixtures("failure_is_counted")
def test_a_wrong_secret(
    ra: kit.RegistrationAuthority, mac: dict[str, Any], tmp_path: Path, more: dict[str, Any]
) -> None:
    """The server can't say so with our secret: it signs, and `trusted_file` or the operator's word lets it be read."""
    keys = {**mac, "secret": other_secret(tmp_path)}
    if more.pop("trusted", False):
        more = {"trusted_file": ra.directory / "ra-root.crt"}
    error = error_of(make(ra.url("ca"), **keys, **more))
    assert type(error) is REFUSED
    assert ("badMessageCheck: 'wrong protection'" if more else "nothing here says whether it may") in str(error)
    assert "`reference`" in error.hint


def test_a_reference_that_is_unknown(ra: kit.RegistrationAuthority, mac: dict[str, Any]) -> None:
    """The same as a wrong secret, with the server's reason."""
    keys = {**mac, "reference": "nobody", "trusted_file": ra.directory / "ra-root.crt"}
    assert "'unknown reference'" in str(error_of(make(ra.url("ca"), **keys)))


def test_20_a_server_that_nothing_vouches_for(ra: kit.RegistrationAuthority, signed: dict[str, Any]) -> None:
    """Another CA in `trusted_file` than that of the server's CMP certificate; no chain is dumped on the operator."""
    error = error_of(make(ra.url("ca"), **{**signed, "trusted_file": ra.directory / "others-ca.crt"}))
    assert "signer is not trusted by `trusted_file`" in str(error)
    assert "digitalSignature" in error.hint


def test_24_the_certificate_of_a_server_that_sends_none(
    ra: kit.RegistrationAuthority, signed: dict[str, Any], tmp_path: Path
) -> None:
    """The hint helps: with the server's certificate in `trusted_file` its answer is taken."""
    both = tmp_path / "both.crt"
    both.write_bytes(b"".join((ra.directory / name).read_bytes() for name in ("ra-root.crt", "ra.crt")))
    assert isinstance(make(ra.url("ca", "chainless"), **{**signed, "trusted_file": both}).sign(a_request()), Issued)


def test_25_a_signer_that_the_server_does_not_know(ra: kit.RegistrationAuthority, signed: dict[str, Any]) -> None:
    """The server signs its refusal, so that it can be read."""
    files = {"client_cert": ra.directory / "foreign.crt", "client_key": ra.directory / "foreign.key"}
    error = error_of(make(ra.url("ca"), **{**signed, **files}))
    assert "badMessageCheck: 'signer not trusted'" in str(error)
    assert "`client_cert`" in error.hint


def test_26_a_key_of_another_certificate(ra: kit.RegistrationAuthority, signed: dict[str, Any]) -> None:
    """The backend sends nothing."""
    count = len(ra.requests("ca"))
    error = error_of(make(ra.url("ca"), **{**signed, "client_key": ra.directory / "foreign.key"}))
    assert "wanted the key of `client_cert`" in str(error)
    assert len(ra.requests("ca")) == count


def test_28_a_csr_with_a_wrong_signature(ra: kit.RegistrationAuthority, mac: dict[str, Any]) -> None:
    """The server finds it."""
    assert "badPOP" in str(error_of(make(ra.url("ca"), **mac), tampered(a_request())))


# --- options that openssl is never given ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["-csr", "nosuch.csr"], "a file of the settings can't be used"),
        ([], "missing PKCS#10 CSR"),
        (["-csr", "request.csr", "-nosuch"], "does not know one of our options"),
        (["-csr", "request.csr", "-out_trusted", "{others}"], "not from the CA that it was wanted from"),
    ],
    ids=["27", "27a", "31", "29"],
)
@pytest.mark.usefixtures("failure_is_counted")
def test_words_of_openssl_that_nothing_here_leads_to(
    ra: kit.RegistrationAuthority, words: list[str], text: str
) -> None:
    """Words that only a later OpenSSL might print are shown unchanged."""
    program = Program(name="openssl", timeout=timedelta(minutes=2), wait=timedelta())
    words = [word.format(others=ra.directory / "others-ca.crt") for word in words]
    addressed = ["-config", "", "-batch", "-cmd", "p10cr", "-server", f"{ra.url('ca')}/.well-known/cmp/p/server"]
    more = ["-ref", kit.REFERENCE, "-recipient", "/CN=kubernetes", "-implicit_confirm", "-certout", "leaf.pem"]
    ran = program.run([*addressed, *more, *words], {"request.csr": a_request().csr_pem}, kit.SECRET.encode())
    assert ran.code == 1
    error = failure(Log.of(ran.messages), "http://ra")
    assert type(error) is REFUSED
    assert text in str(error)
    assert len(str(error)) < 500


# --- HTTP ------------------------------------------------------------------------------------------------------------

#: 3.5 tells no status of an empty body.
PLAIN: Any = {"content_type": "text/plain", "body": b"broken"}
HTTP: list[tuple[str, kit.Reply, type[BackendError], str]] = [
    ("7", kit.Reply(status=500, **PLAIN), UNAVAILABLE, "status 500"),
    ("7b", kit.Reply(status=503, **PLAIN), UNAVAILABLE, "status 503"),
    ("7c", kit.Reply(status=404, content_type="text/html", body=b"<html>"), REFUSED, "no such path"),
    (
        "7d",
        kit.Reply(status=401, **PLAIN, headers={"WWW-Authenticate": "Basic"}),
        REFUSED,
        "denies access (status 401)",
    ),
    ("7e", kit.Reply(status=400, **PLAIN), REFUSED, "status 400"),
    ("7f", kit.Reply(status=302, headers={"Location": "http://127.0.0.1:9/"}), REFUSED, "redirects to another place"),
    ("8", kit.Reply(content_type="text/html", body=b"<html>sign in</html>"), REFUSED, "text/html"),
    ("9", kit.Reply(after_seconds=60), UNAVAILABLE, "no answer in time"),
    ("empty", kit.Reply(), UNAVAILABLE, "before the answer was whole"),
    ("garbage", kit.Reply(body=b"no DER at all"), REFUSED, "found something else"),
    ("truncated", kit.Reply(body=b"0\x82\x13\x84abc", length=5000), UNAVAILABLE, "before the answer was whole"),
    ("long", kit.Reply(body=b"0\x84\x7f\xff\xff\xff" + b"\0" * 200_000), REFUSED, "without end"),
    ("endless", kit.Reply(body=b"0\x84\x7f\xff\xff\xff" + b"\0" * 9_994, endless=True), REFUSED, "without end"),
]


@pytest.mark.parametrize(("reply", "kind", "text"), [row[1:] for row in HTTP], ids=[row[0] for row in HTTP])
@pytest.mark.usefixtures("failure_is_counted")
def test_an_answer_in_the_servers_place(
    mac: dict[str, Any], reply: kit.Reply, kind: type[BackendError], text: str
) -> None:
    """Each kind of HTTP answer has its own message, and the request ends in time."""
    with kit.front("", instead=reply) as front:
        limit = timedelta(seconds=2 if reply.after_seconds else 120)
        error = error_of(make(front.url, timeout=limit, **mac))
    assert type(error) is kind
    assert text in str(error)
    assert front.sent_bytes < 10_000_000


def test_a_server_that_comes_late_within_the_limit(ra: kit.RegistrationAuthority, mac: dict[str, Any]) -> None:
    """10: an answer that comes before `timeout` is over is taken, and not thrown away for the total."""

    def late(answer: bytes) -> kit.Reply:
        return kit.Reply(body=answer, after_seconds=1.5)

    with kit.front(ra.url("ca").removesuffix("/ca"), late) as front:
        issued = make(f"{front.url}/ca", **{**mac, "timeout": timedelta(minutes=2)}).sign(a_request())
    assert isinstance(issued, Issued)


def test_an_answer_that_was_cut(ra: kit.RegistrationAuthority, mac: dict[str, Any]) -> None:
    """Half of a good answer is none."""

    def half(answer: bytes) -> kit.Reply:
        return kit.Reply(body=answer[: len(answer) // 2])

    with kit.front(ra.url("ca").removesuffix("/ca"), half) as front:
        assert type(error_of(make(f"{front.url}/ca", **mac))) in {REFUSED, UNAVAILABLE}


def test_an_answer_that_is_repeated(ra: kit.RegistrationAuthority, mac: dict[str, Any]) -> None:
    """A recorded answer, good in its time, is none to a later request."""
    recorded: list[bytes] = []

    def record(answer: bytes) -> kit.Reply:
        recorded.append(answer)
        return kit.Reply(body=recorded[0])

    with kit.front(ra.url("ca").removesuffix("/ca"), record) as front:
        backend = make(f"{front.url}/ca", **mac)
        assert isinstance(backend.sign(a_request()), Issued)
        assert "found one to another" in str(error_of(backend))


@pytest.mark.parametrize("who", ["mac", "signed"])
def test_an_answer_with_any_byte_changed(
    ra: kit.RegistrationAuthority, request: pytest.FixtureRequest, who: str
) -> None:
    """Every 50th byte of an answer, turned over: never a certificate that was not the CA's."""
    asked, positions = a_request(), list(range(4, 900, 50))

    def changed(answer: bytes) -> kit.Reply:
        at = positions.pop()
        return kit.Reply(body=answer[:at] + bytes([answer[at] ^ 1]) + answer[at + 1 :])

    with kit.front(ra.url("ca").removesuffix("/ca"), changed) as front:
        backend = make(f"{front.url}/ca", **request.getfixturevalue(who))
        while positions:
            with contextlib.suppress(BackendError):  # a certificate beside the answer may have changed
                issued = backend.sign(asked)
                assert isinstance(issued, Issued)
                assert issued.leaf.public_key() == asked.csr.public_key()
                issued.leaf.verify_directly_issued_by(_CA.certificate)


# --- connections -----------------------------------------------------------------------------------------------------


def test_5_a_server_that_is_dead(mac: dict[str, Any]) -> None:
    """Unavailable at once, and not when openssl gives up; later its port may be open."""
    begin = time.monotonic()
    error = error_of(make(f"http://127.0.0.1:{free_port()}", **{**mac, "timeout": timedelta(minutes=10)}))
    assert time.monotonic() - begin < 300
    assert type(error) is UNAVAILABLE
    assert "no connection: connection refused" in str(error)


def test_6_a_host_that_is_unknown(mac: dict[str, Any]) -> None:
    """An unknown host is unavailable, since a resolver may be down."""
    error = error_of(make("http://nosuch.invalid", **{**mac, "timeout": timedelta(seconds=1)}))
    assert type(error) is UNAVAILABLE


def test_32_a_proxy_of_the_environment_is_not_asked(
    ra: kit.RegistrationAuthority, mac: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead proxy in the environment of ca-bridge makes no difference."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert isinstance(make(ra.url("ca"), **mac).sign(a_request()), Issued)


def context(tls: cfssl.Tls, *, mutual: bool = False) -> ssl.SSLContext:
    """The TLS context of a server."""
    found = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    found.load_cert_chain(tls.server_cert, tls.server_key)
    if mutual:
        found.verify_mode = ssl.CERT_REQUIRED
        found.load_verify_locations(tls.ca)
    return found


def test_33_the_wrong_scheme(ra: kit.RegistrationAuthority, mac: dict[str, Any], tls: cfssl.Tls) -> None:
    """HTTP to a port that speaks TLS, and TLS to one that does not: unavailable, with the question that leads on."""
    with kit.front("", tls=context(tls)) as front:
        error = error_of(make(front.url.replace("https:", "http:"), timeout=timedelta(seconds=20), **mac))
    assert type(error) is UNAVAILABLE
    assert "HTTP or HTTPS" in error.hint
    error = error_of(
        make(ra.url("ca").replace("http:", "https:"), timeout=timedelta(seconds=20), **mac, tls_ca_file=tls.ca)
    )
    assert "TLS" in error.hint or "plain HTTP" in error.hint


def test_34_a_tls_server_that_nothing_vouches_for(
    ra: kit.RegistrationAuthority, mac: dict[str, Any], tls: cfssl.Tls
) -> None:
    """A server of another CA, or with another name, is refused; the right one is taken."""
    host = ra.url("ca").removesuffix("/ca")
    with kit.front(host, tls=context(tls)) as front:
        error = error_of(make(f"{front.url}/ca", **mac, tls_ca_file=ra.directory / "others-ca.crt"))
        assert type(error) is REFUSED
        assert "`tls_ca_file`" in error.hint
        assert front.posts == 0
        assert isinstance(make(f"{front.url}/ca", **mac, tls_ca_file=tls.ca).sign(a_request()), Issued)
    nameless = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    nameless.load_cert_chain(ra.directory / "ra.crt", ra.directory / "ra.key")
    with kit.front(host, tls=nameless) as front:
        error = error_of(make(f"{front.url}/ca", **mac, tls_ca_file=ra.directory / "ra-root.crt"))
    assert type(error) is REFUSED
    assert "for the name in url" in str(error)


def test_35_a_tls_server_that_wants_a_client_certificate(
    ra: kit.RegistrationAuthority, mac: dict[str, Any], tls: cfssl.Tls
) -> None:
    """Without one the error asks for one; with one the server gets the request."""
    with kit.front(ra.url("ca").removesuffix("/ca"), tls=context(tls, mutual=True)) as front:
        keys = {**mac, "tls_ca_file": tls.ca}
        error = error_of(make(f"{front.url}/ca", **keys))
        assert "`tls_client_cert`" in error.hint
        more = {"tls_client_cert": tls.client_cert, "tls_client_key": tls.client_key}
        assert isinstance(make(f"{front.url}/ca", **keys, **more).sign(a_request()), Issued)


# --- rules that need no server ---------------------------------------------------------------------------------------


def test_an_error_of_another_version_is_reported() -> None:
    """An error that no rule knows is quoted: the last two lines, cut."""
    log = Log.of("CMP info: sending P10CR\nCMP error: one\nCMP error: two\nCMP error: three " + "x" * 1000)
    error = failure(log, "http://ra")
    assert type(error) is REFUSED
    assert "'two; three xxx" in str(error)
    assert len(str(error)) < 300


def test_texts_of_3_5() -> None:
    """Where 3.5 says it otherwise than 3.0, it means the same."""
    for text, kind in {
        "CMP error: status code unsupported:code=404, reason=Not Found": REFUSED,
        "CMP error: status code unsupported:code=503, reason=x": UNAVAILABLE,
        "CMP error: unexpected sender:/O=Lab/CN=CMP RA": REFUSED,
        "CMP error: Connection refused:calling connect(127.0.0.1, 9)\nCMP error: connect error": UNAVAILABLE,
        "CMP error: system lib:Name or service not known\nCMP error: transfer error": UNAVAILABLE,
    }.items():
        assert type(failure(Log.of(text), "http://ra")) is kind


def test_what_the_server_wrote_is_data() -> None:
    """Line ends and what steers a terminal do not reach the operator's."""
    assert quoted("\x1b[2J a\n\nb\t\u202ec") == "'[2J a b c'"
    assert len(quoted("x" * 10_000)) < 250


POLL_REP = bytes.fromhex("30133003020102ba0c300a30080201ff02010a3000")


def test_a_message_is_read_as_far_as_is_needed() -> None:
    """The seconds of a pollRep; not of a message that is cut off anywhere, or another one."""
    body = body_of(POLL_REP)
    assert body is not None
    assert poll_of(body) == Poll(seconds=10)
    for length in range(len(POLL_REP)):
        assert body_of(POLL_REP[:length]) is None
    assert poll_of((0xA3, body[1])) is None
    assert poll_of((0xBA, bytes.fromhex("3082010b 30820107 0201ff 02820100") + b"\x7f" * 256)) == Poll(seconds=10**9)
    assert poll_of((0xBA, b"\x30\x80\x00\x00")) is None


def test_a_message_that_was_spoilt_is_no_trouble() -> None:
    """Each byte of a pollRep with each of its values: another message, another number, or none, and no error."""
    for at in range(len(POLL_REP)):
        for value in range(256):
            body = body_of(POLL_REP[:at] + bytes([value]) + POLL_REP[at + 1 :])
            assert body is None or poll_of(body) is None or isinstance(poll_of(body), Poll)
