"""The CMP backend with the real openssl against a real registration authority; a front for what that never answers."""

from __future__ import annotations

import base64
import dataclasses
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from backends.cmp import CmpBackend, CmpSettings
from backends.cmp.program import OLDEST_WITH_PROFILES, Program
from bridge.ca import registry
from bridge.contract import BackendSettings, Issued, Pending, Secret, SetupRequest, SignRequest
from bridge.errors import (
    BackendRefusedError,
    BackendUnavailableError,
    LocalFileError,
    SettingsError,
    VerificationError,
    Violation,
)
from bridge.pki import verify
from bridge.pki.certificates import extended_key_usages
from bridge.settings.load import parse
from bridge.specs import AUTHORITIES, CA, SPECS, CertificateSpec
from bridge.testing import BackendConformance, TestCA, sign_request, tampered
from tests.kit import cfssl
from tests.kit import cmp as kit
from tests.kit.loopback import free_port
from tests.kit.measured import is_running

pytestmark = pytest.mark.kube("cmp-ra")

Make = Callable[..., CmpBackend]
Live = dict[str, x509.Certificate]

VALIDITY = timedelta(days=30)
APISERVER, ADMIN = SPECS["apiserver"], SPECS["admin.conf"]
_CA = TestCA.make("kubernetes", "ecdsa-p256")
_LIVE = {spec.name: _CA.leaf(spec) for spec in SPECS.values()}


def request(spec: CertificateSpec = APISERVER) -> SignRequest:
    return sign_request(_LIVE[spec.name], spec, "ecdsa-p256", VALIDITY)


def typed(keys: dict[str, Any]) -> dict[str, Any]:
    """As the reader of settings files would pass them on."""
    found = {
        key: Path(value) if key.endswith(("_cert", "_key", "trusted_file")) else value for key, value in keys.items()
    }
    if "secret_file" in found:
        found["secret"] = Secret("file", str(found.pop("secret_file")))
    return found


def make(**keys: Any) -> CmpBackend:
    """A backend whose settings must be without problems."""
    settings = CmpSettings(**{"timeout": timedelta(minutes=2), "wait": timedelta(), **keys})
    assert list(settings.problems()) == []
    return CmpBackend.from_settings(settings)


@pytest.fixture(scope="module")
def ra(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kit.RegistrationAuthority]:
    """One for all tests of this file, with our CA as `ca`."""
    with kit.registration_authority(tmp_path_factory.mktemp("ra") / "ra") as server:
        server.add_ca("ca", _CA.certificate_pem, _CA.key_pem)
        yield server


@pytest.fixture(params=["mac", "signature"])
def keys(ra: kit.RegistrationAuthority, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Settings for one of the two protections, without a URL."""
    return typed(ra.mac() if request.param == "mac" else ra.signature())


@pytest.fixture
def mac(ra: kit.RegistrationAuthority) -> dict[str, Any]:
    """Settings with the shared secret, without a URL."""
    return typed(ra.mac())


@pytest.fixture
def waiting(ra: kit.RegistrationAuthority) -> str:
    """A CA of the test's own, whose requests an officer has to approve."""
    name = f"waiting-{len(list(ra.directory.iterdir()))}"
    ra.add_ca(name, _CA.certificate_pem, _CA.key_pem)
    return name


class Conformance(BackendConformance):
    """The suite with what all of ours have in common."""

    __test__ = False
    unsupported = frozenset({"sign_many", "issuers", "close"})

    @pytest.fixture(scope="class")
    @classmethod
    def place(cls, ca: TestCA, ra: kit.RegistrationAuthority) -> str:
        """The suite's CA at the registration authority."""
        if not (ra.directory / "suite").exists():
            ra.add_ca("suite", ca.certificate_pem, ca.key_pem, days=30)
        return ra.url("suite")

    @pytest.fixture
    def dead_backend(self, mac: dict[str, Any]) -> CmpBackend:
        """The backend of a server that is not there."""
        return make(**mac, url=f"http://127.0.0.1:{free_port()}", timeout=timedelta(seconds=1))


class TestSecret(Conformance):
    """p10cr, protected by a shared secret, usages by the path."""

    __test__ = True

    @pytest.fixture
    def backend(self, place: str, ra: kit.RegistrationAuthority) -> CmpBackend:
        """With the reference and the secret."""
        return make(url=place, **typed(ra.mac()))


class TestSignature(Conformance):
    """p10cr, signed by an agent, over HTTPS."""

    __test__ = True

    @pytest.fixture(scope="class")
    @classmethod
    def tls(cls, tmp_path_factory: pytest.TempPathFactory) -> cfssl.Tls:
        """Certificates for TLS."""
        return cfssl.make_tls(tmp_path_factory.mktemp("tls"))

    @pytest.fixture
    def backend(self, place: str, tls: cfssl.Tls, ra: kit.RegistrationAuthority) -> Iterator[CmpBackend]:
        """With the agent's certificate, the server's CA for CMP, and that for TLS."""
        host, _, name = place.rpartition("/")
        with kit.front(host, tls=server_context(tls)) as front:
            yield make(url=f"{front.url}/{name}", tls_ca_file=tls.ca, sender=kit.RA_SUBJECT, **typed(ra.signature()))


class TestRaVerified(Conformance):
    """Mode `cr`: usages and validity in the template, by a client that the server trusts as an RA."""

    __test__ = True

    @pytest.fixture
    def backend(self, place: str, ra: kit.RegistrationAuthority) -> CmpBackend:
        """Without a profile in the path."""
        return make(url=place, mode="cr", recipient="/CN=kubernetes", **typed(ra.signature()))


def server_context(tls: cfssl.Tls, *, mutual: bool = False) -> ssl.SSLContext:
    """The TLS context of a server; `mutual`: it wants a client certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls.server_cert, tls.server_key)
    if mutual:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(tls.ca)
    return context


SETTINGS: dict[str, Any] = {"url": "http://ra.example.com:8080", "reference": "cp1", "secret": Secret("file", "/s")}
SIGNED: dict[str, Any] = {
    "reference": "",
    "secret": None,
    "client_cert": Path("/crt"),
    "client_key": Path("/key"),
    "trusted_file": Path("/ca"),
}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"url": "https://ra.example.com/ejbca/publicweb/", "tls_ca_file": Path("/ca"), "path": "cmp/k8s-{usage}"},
        {"paths": {"etcd-peer": "cmp/a", "client": "cmp/b"}},
        {"profile": "kubeadm-{name}", "profiles": {"client": "users"}},
        SIGNED,
        {
            **SIGNED,
            "mode": "cr",
            "recipient": "/O=Corp/CN=kubernetes",
            "sender": "/CN=RA",
            "wait": timedelta(minutes=1),
        },
    ],
)
def test_settings_without_problems(keys: dict[str, Any]) -> None:
    """These settings go together."""
    assert list(CmpSettings(**{**SETTINGS, **keys}).problems()) == []


@pytest.mark.parametrize(
    ("keys", "wrong"),
    [
        ({"url": "ra.example.com"}, ["url"]),
        ({"url": "http://ra.example.com:x"}, ["url"]),
        ({"url": "http://me:s3cret@ra.example.com"}, ["url"]),
        ({"url": "http://ra.example.com/?a=b"}, ["url"]),
        ({"url": "ftp://ra.example.com"}, ["url"]),
        ({"url": "https://ra.example.com"}, ["tls_ca_file"]),
        ({"tls_ca_file": Path("/ca")}, ["url"]),
        ({"url": "https://ra", "tls_ca_file": Path("/ca"), "tls_client_cert": Path("/c")}, ["tls_client_key"]),
        ({"path": "cmp/{role}"}, ["path"]),
        ({"path": "cmp/a b"}, ["path"]),
        ({"paths": {"servers": "x", "client": "a?b"}}, ["paths.servers", "paths.client"]),
        ({"profile": "{"}, ["profile"]),
        ({"profiles": {"client": "users"}}, ["profile"]),
        ({"recipient": "CN=kubernetes"}, ["recipient"]),
        ({"trusted_file": Path("/ca"), "sender": "RA"}, ["sender"]),
        ({"sender": "/CN=RA"}, ["trusted_file"]),
        ({"secret": None}, ["secret_file"]),
        ({"reference": ""}, ["reference"]),
        ({"client_cert": Path("/crt"), "client_key": Path("/key"), "trusted_file": Path("/ca")}, ["client_cert"]),
        ({**SIGNED, "client_key": None}, ["client_key"]),
        ({**SIGNED, "client_cert": None}, ["client_cert"]),
        ({**SIGNED, "trusted_file": None}, ["trusted_file"]),
        ({"wait": timedelta(hours=1)}, ["wait"]),
    ],
)
def test_settings_with_problems(keys: dict[str, Any], wrong: list[str]) -> None:
    """The error names each contradiction by its key, and shows no user name or password."""
    problems = list(CmpSettings(**{**SETTINGS, **keys}).problems())
    assert [problem.key for problem in problems] == wrong
    assert "s3cret" not in str(problems)


def test_files_are_looked_at_when_the_backend_is_made(tmp_path: Path) -> None:
    """A missing file, a file without a certificate, and an encrypted key are reported at once."""
    (tmp_path / "crt").write_text("nothing")
    (tmp_path / "key").write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\n")
    files = {"client_cert": tmp_path / "crt", "client_key": tmp_path / "key", "trusted_file": tmp_path / "none"}
    with pytest.raises(SettingsError) as e:
        make(url="http://127.0.0.1", **files)
    assert [problem.key for problem in e.value.problems] == ["client_cert", "trusted_file", "client_key"]


def test_the_settings_file_is_read() -> None:
    """Patterns with exceptions and a secret's place come from TOML; an unknown key is reported."""
    text = (
        '[backend.corp]\ntype = "cmp"\nurl = "http://ra:8080"\nreference = "cp1"\nsecret_file = "/s"\n'
        '[backend.corp.paths]\netcd-peer = "cmp/peers"\n[authority.etcd-ca]\nbackend = "corp"\nwait = "1m"\n'
    )
    settings = registry.configured(parse(text), ["etcd-ca"])["etcd-ca"].settings
    assert isinstance(settings, CmpSettings)
    assert (settings.paths, settings.wait) == ({"etcd-peer": "cmp/peers"}, timedelta(minutes=1))
    with pytest.raises(SettingsError, match="secret_fil"):
        registry.configured(parse(text.replace("secret_file", "secret_fil")), ["etcd-ca"])


ROOT = Path(__file__).parents[2]
EXAMPLE, PAGE = ROOT / "config/cmp/config.toml", ROOT / "docs/cmp.md"


def fields() -> set[str]:
    """The settings' keys, as they are written; those that every backend has are not looked for."""
    names = {one.name for one in dataclasses.fields(CmpSettings)} - {
        one.name for one in dataclasses.fields(BackendSettings)
    }
    return (names - {"secret"}) | {"secret_file"}


def test_the_examples_load() -> None:
    """The settings in `config/` and on the page, as they are."""
    for text in (EXAMPLE.read_text(), *re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)):
        assert set(registry.configured(parse(text), list(AUTHORITIES))) == set(AUTHORITIES)


def test_every_key_is_in_the_example_and_on_the_settings_page() -> None:
    """The example and the page have every key, and the example has no other but for the exceptions' tables."""
    keys = set(re.findall(r"^(?:# )?(\w+) = ", EXAMPLE.read_text().split("[backend.corp.paths]")[0], re.MULTILINE))
    assert keys - {"type", "backend", "timeout", "retry_for"} == fields() - {"paths", "profiles"}
    keys_there = (ROOT / "docs/settings.md").read_text().partition('type = "cmp"')[2].partition("\n## ")[0]
    assert fields() <= set(re.findall(r"\w+", keys_there))


def test_exceptions_choose_the_path(ra: kit.RegistrationAuthority, mac: dict[str, Any]) -> None:
    """A certificate's own path comes before its usage class's, and that before the pattern."""
    paths = {"client": ".well-known/cmp/p/nosuch", "admin.conf": ".well-known/cmp/p/client"}
    backend = make(url=ra.url("ca"), paths=paths, **mac)
    backend.sign(request(ADMIN))
    backend.sign(request(APISERVER))
    with pytest.raises(BackendRefusedError):
        backend.sign(request(SPECS["scheduler.conf"]))
    assert [line["profile"] for line in ra.requests("ca")[-2:]] == ["client", "server"]


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_the_secret_is_in_no_process_list_environment_or_file(
    ra: kit.RegistrationAuthority, mac: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While openssl runs, its arguments, its environment and all its files are without the secret."""
    look = (
        "import os, pathlib, sys\n"
        f"with open({str(tmp_path / 'seen')!r}, 'ab') as seen:\n"
        "    for path in ('/proc/self/cmdline', '/proc/self/environ'): seen.write(open(path, 'rb').read())\n"
        "    for path in pathlib.Path().iterdir() if sys.argv[1] == 'cmp' else (): seen.write(path.read_bytes())\n"
        "os.execvp('openssl', ['openssl', *sys.argv[1:]])\n"
    )
    program = tmp_path / "looking-openssl"
    program.write_text(f"#!/usr/bin/env python3\n{look}")
    program.chmod(0o755)
    monkeypatch.setenv("CMP_SECRET", kit.SECRET)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    keys = {**mac, "secret": Secret("env", "CMP_SECRET"), "openssl": str(program)}
    assert isinstance(make(url=ra.url("ca"), **keys).sign(request()), Issued)
    seen = (tmp_path / "seen").read_bytes()
    assert b"CERTIFICATE REQUEST" in seen
    assert b"-server" in seen
    assert kit.SECRET.encode() not in seen
    assert b"http_proxy" not in seen


@pytest.mark.parametrize(
    "text", ["", "fifteen bytes..", "x" * 1024, "sixteen bytes and\nanother line", "sixteen bytes \x07 and more"]
)
def test_a_secret_that_openssl_would_not_take_is_refused(
    ra: kit.RegistrationAuthority, mac: dict[str, Any], tmp_path: Path, text: str
) -> None:
    """Openssl would take the option's own text, or a part of the secret, and say so nowhere."""
    file = tmp_path / "secret"
    file.write_text(text)
    count = len(ra.requests("ca"))
    with pytest.raises(LocalFileError) as e:
        make(**{**mac, "secret": Secret("file", str(file))}, url=ra.url("ca")).sign(request())
    assert str(file) in str(e.value)
    assert "openssl rand" in e.value.hint
    assert not text or text not in str(e.value)
    assert len(ra.requests("ca")) == count


def test_a_secret_that_is_not_there_is_refused(ra: kit.RegistrationAuthority, mac: dict[str, Any]) -> None:
    """Openssl would send a request with the file's name as the secret."""
    with pytest.raises(LocalFileError, match="nosuch") as e:
        make(**{**mac, "secret": Secret("file", "/nosuch")}, url=ra.url("ca")).sign(request())
    assert e.value.hint.startswith("put it there")


def test_nothing_is_left_behind(
    ra: kit.RegistrationAuthority, keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither files nor processes are left, be it a success, a refusal or an order that was stopped at once."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert isinstance(make(url=ra.url("ca"), **keys).sign(request()), Issued)
    with pytest.raises(BackendRefusedError):
        make(url=ra.url("ca", "reject"), **keys).sign(request())
    assert isinstance(make(url=ra.url("ca", "waitlong"), **keys).sign(request()), Pending)
    assert list(tmp_path.iterdir()) == []
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
    assert not [pid for pid in children if b"cmp" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]


# --- what the CA gives -----------------------------------------------------------------------------------------------


def test_implicit_confirmation_spares_a_round_trip(ra: kit.RegistrationAuthority, keys: dict[str, Any]) -> None:
    """It is asked for always; a server that grants none is sent a confirmation."""
    for behaviour, types in {"": ["4"], "explicit": ["4", "24"]}.items():
        count = len(ra.requests("ca"))
        make(url=ra.url("ca", behaviour), **keys).sign(request())
        assert [line["type"] for line in ra.requests("ca")[count:]] == types


@pytest.mark.parametrize("behaviour", ["mods", "wrongsubject", "wrongusage"])
def test_what_openssl_does_not_look_at_is_found_by_the_bridge(
    ra: kit.RegistrationAuthority, mac: dict[str, Any], behaviour: str
) -> None:
    """Openssl ends with 0 for another subject or usage; the verification of every answer does not pass it."""
    asked = request()
    issued = make(url=ra.url("ca", behaviour), **mac).sign(asked)
    assert isinstance(issued, Issued)
    expected = verify.Expectation(
        anchors=(_CA.certificate,), anchor_name="ca.crt", now=datetime.now(UTC), min_validity=timedelta(days=7)
    )
    if behaviour == "mods":
        verify.check(issued, asked, expected)
    else:
        with pytest.raises(VerificationError):
            verify.check(issued, asked, expected)


def test_intermediates_come_along(ra: kit.RegistrationAuthority, mac: dict[str, Any]) -> None:
    """The certificates that come with an answer are passed on, for the bridge to choose from."""
    issued = make(url=ra.url("ca"), **mac).sign(request())
    assert isinstance(issued, Issued)
    assert [one.subject.rfc4514_string() for one in issued.intermediates] == ["CN=CMP RA"]


def test_a_tampered_csr_is_not_vouched_for(ra: kit.RegistrationAuthority) -> None:
    """In mode `cr` the server sees no proof of possession: a CSR with a wrong signature is not sent at all."""
    count = len(ra.requests("ca"))
    with pytest.raises(BackendRefusedError, match="signed with its own key"):
        make(url=ra.url("ca"), mode="cr", **typed(ra.signature())).sign(tampered(request()))
    assert len(ra.requests("ca")) == count


def test_identity(ra: kit.RegistrationAuthority, mac: dict[str, Any]) -> None:
    """The reference, or the agent's subject, which the server's log has as well."""
    assert make(url=ra.url("ca"), **mac).identity() == kit.REFERENCE
    assert make(url=ra.url("ca"), **typed(ra.signature())).identity() == "CN=bridge-cp-1"


# --- preflight -------------------------------------------------------------------------------------------------------


def test_check_asks_each_path_once_and_spends_no_signature(ra: kit.RegistrationAuthority, keys: dict[str, Any]) -> None:
    """One general message for each of the three profiles' paths."""
    count = len(ra.requests("ca"))
    assert make(url=ra.url("ca"), **keys).check(list(SPECS.values())) == {}
    seen = ra.requests("ca")[count:]
    assert {(line["type"], line["profile"]) for line in seen} == {
        ("21", usage) for usage in ("server", "client", "peer")
    }
    assert len(seen) == 3


def test_check_finds_a_path_that_is_not_there(ra: kit.RegistrationAuthority, mac: dict[str, Any]) -> None:
    """A misspelt profile is a violation for its certificates alone."""
    paths = {"client": ".well-known/cmp/p/nosuch"}
    found = make(url=ra.url("ca"), paths=paths, **mac).check([APISERVER, ADMIN])
    [violation] = found.pop("admin.conf")
    assert violation == Violation(
        subject="path /ca/.well-known/cmp/p/nosuch", want="a CMP service", got="HTTP status 404"
    )
    assert found == {}


def test_check_takes_a_server_without_general_messages(ra: kit.RegistrationAuthority, keys: dict[str, Any]) -> None:
    """It says so in a protected message, so that reference, secret and certificates are right."""
    assert make(url=ra.url("ca", "nogenm"), **keys).check([APISERVER]) == {}


def test_check_finds_a_wrong_secret(ra: kit.RegistrationAuthority, mac: dict[str, Any], tmp_path: Path) -> None:
    """A wrong secret is found before any certificate is requested."""
    (tmp_path / "secret").write_text("not the secret of the server")
    backend = make(**{**mac, "secret": Secret("file", str(tmp_path / "secret"))}, url=ra.url("ca"))
    with pytest.raises(BackendRefusedError) as e:
        backend.check([APISERVER])
    assert "`reference`" in e.value.hint


@pytest.mark.parametrize(
    ("behaviour", "error"), [("error", BackendUnavailableError), ("rawerror", BackendRefusedError)]
)
def test_check_of_a_server_that_is_closed(
    ra: kit.RegistrationAuthority, mac: dict[str, Any], behaviour: str, error: type[Exception]
) -> None:
    """A protected "closed" is unavailable; an unprotected one, which an attacker could have written, is a refusal."""
    with pytest.raises(error):
        make(url=ra.url("ca", behaviour), **mac).check([APISERVER])


# --- waiting ---------------------------------------------------------------------------------------------------------


def test_a_later_process_goes_on(ra: kit.RegistrationAuthority, keys: dict[str, Any], waiting: str) -> None:
    """The order waits, waits again, and is collected, without a second request; each time by another process."""
    asked, backend = request(), make(url=ra.url(waiting, "wait"), **keys)
    first = backend.sign(asked)
    assert isinstance(first, Pending)
    assert "not approved yet" in first.note
    second = backend.collect(asked, first.reference)
    assert isinstance(second, Pending)
    assert second.reference == first.reference
    ra.approve(waiting)
    issued = make(url=ra.url(waiting, "wait"), **keys).collect(asked, second.reference)
    assert isinstance(issued, Issued)
    assert issued.leaf.public_key() == asked.csr.public_key()
    seen = ra.requests(waiting)
    assert [line["type"] for line in seen].count("4") == 1
    assert len({line["tid"] for line in seen}) == 1


def test_a_template_waits_too(ra: kit.RegistrationAuthority, waiting: str) -> None:
    """A template in mode `cr` waits as above."""
    asked = request(SPECS["etcd-peer"])
    backend = make(url=ra.url(waiting, "wait"), mode="cr", **typed(ra.signature()))
    first = backend.sign(asked)
    assert isinstance(first, Pending)
    ra.approve(waiting)
    assert isinstance(backend.collect(asked, first.reference), Issued)
    assert [line["type"] for line in ra.requests(waiting)].count("2") == 1


def test_the_reference_holds_no_secret(ra: kit.RegistrationAuthority, mac: dict[str, Any], waiting: str) -> None:
    """It is the server's own answer, which was readable on the network."""
    first = make(url=ra.url(waiting, "wait"), **mac).sign(request())
    assert isinstance(first, Pending)
    assert kit.SECRET.encode() not in base64.b64decode(first.reference)


def test_an_answer_that_takes_a_moment_is_waited_for(
    ra: kit.RegistrationAuthority, mac: dict[str, Any], waiting: str
) -> None:
    """A server that says "not yet" is asked again in the same run, while `wait` lasts."""
    patient = make(**mac, url=ra.url(waiting, "wait"), wait=timedelta(minutes=5))
    asked = request()

    def approve() -> None:
        while not ra.requests(waiting):
            time.sleep(0.02)
        ra.approve(waiting)

    thread = threading.Thread(target=approve)
    thread.start()
    assert isinstance(patient.sign(asked), Issued)
    thread.join()


def test_a_server_that_wants_to_be_asked_later_is_not_waited_for(
    ra: kit.RegistrationAuthority, mac: dict[str, Any], waiting: str
) -> None:
    """When the server says to come back in an hour, the backend does not sit out `wait`."""
    begin = time.monotonic()
    first = make(**mac, url=ra.url(waiting, "waitlong"), wait=timedelta(minutes=10)).sign(request())
    assert isinstance(first, Pending)
    assert "3600 s" in first.note
    assert time.monotonic() - begin < 300


def test_a_rejection_while_waiting_is_refused(
    ra: kit.RegistrationAuthority, keys: dict[str, Any], waiting: str
) -> None:
    """The error shows the officer's reason."""
    asked, backend = request(), make(url=ra.url(waiting, "wait"), **keys)
    first = backend.sign(asked)
    assert isinstance(first, Pending)
    ra.refuse(waiting, "this node is retired")
    with pytest.raises(BackendRefusedError, match=r"notAuthorized.*this node is retired"):
        backend.collect(asked, first.reference)


def test_an_order_that_the_server_forgot_is_refused(ra: kit.RegistrationAuthority, mac: dict[str, Any]) -> None:
    """It will not be asked for again by its reference; and at once where the server forgets at once."""
    asked, backend = request(), make(url=ra.url("ca", "wait"), **mac)
    first = backend.sign(asked)
    assert isinstance(first, Pending)
    with pytest.raises(BackendRefusedError, match="no such transaction"):
        make(url=ra.url("ca", "forget"), **mac).collect(asked, first.reference)
    with pytest.raises(BackendRefusedError, match="no such transaction"):
        make(url=ra.url("ca", "forget"), **mac).sign(asked)


def test_a_dead_server_does_not_end_the_waiting(
    ra: kit.RegistrationAuthority, mac: dict[str, Any], waiting: str
) -> None:
    """The order is collected when the server is there again."""
    asked, backend = request(), make(url=ra.url(waiting, "wait"), **mac)
    first = backend.sign(asked)
    assert isinstance(first, Pending)
    dead = make(url=f"http://127.0.0.1:{free_port()}", timeout=timedelta(seconds=1), **mac)
    with pytest.raises(BackendUnavailableError):
        dead.collect(asked, first.reference)
    ra.approve(waiting)
    assert isinstance(backend.collect(asked, first.reference), Issued)


@pytest.mark.parametrize("behaviour", ["rawerror", "rawreject", "nonce", "badmac"])
def test_an_unprotected_answer_does_not_end_the_waiting(
    ra: kit.RegistrationAuthority, keys: dict[str, Any], waiting: str, behaviour: str
) -> None:
    """An attacker on the path can keep us waiting, and not make us give up an order; the server itself can."""
    asked = request()
    first = make(url=ra.url(waiting, "wait"), **keys).sign(asked)
    assert isinstance(first, Pending)
    try:
        kept = make(url=ra.url(waiting, behaviour), **keys).collect(asked, first.reference)
    except BackendUnavailableError:
        kept = first
    assert isinstance(kept, Pending)
    ra.approve(waiting)
    assert isinstance(make(url=ra.url(waiting, "wait"), **keys).collect(asked, kept.reference), Issued)


def test_an_order_is_known_when_the_server_dies_after_it(
    ra: kit.RegistrationAuthority, mac: dict[str, Any], waiting: str
) -> None:
    """The answer "waiting" came, the answer to the first question never: the order is waited for all the same."""
    host, _, _ = ra.url(waiting).rpartition("/")
    with kit.front(host) as front:

        def first_alone(answer: bytes) -> kit.Reply:
            return kit.Reply(body=answer) if front.posts == 1 else kit.Reply(status=503)

        front.change = first_alone
        asked = request()
        first = make(url=f"{front.url}/{waiting}/wait", **mac).sign(asked)
    assert isinstance(first, Pending)
    ra.approve(waiting)
    assert isinstance(make(url=ra.url(waiting, "wait"), **mac).collect(asked, first.reference), Issued)


@pytest.mark.parametrize("reference", ["", "none", base64.b64encode(b"0\x03abc").decode()])
def test_a_reference_that_is_none_is_refused(
    ra: kit.RegistrationAuthority, mac: dict[str, Any], reference: str
) -> None:
    """The backend sends no request for it."""
    count = len(ra.requests("ca"))
    with pytest.raises(BackendRefusedError, match="reference"):
        make(url=ra.url("ca"), **mac).collect(request(), reference)
    assert len(ra.requests("ca")) == count


def test_an_order_of_the_other_protection_is_refused(
    ra: kit.RegistrationAuthority, mac: dict[str, Any], waiting: str
) -> None:
    """An operator who changes from a secret to a certificate loses the waiting orders, and the error says why."""
    asked = request()
    first = make(url=ra.url(waiting, "wait"), **typed(ra.signature())).sign(asked)
    assert isinstance(first, Pending)
    with pytest.raises(BackendRefusedError) as e:
        make(url=ra.url(waiting, "wait"), **mac).collect(asked, first.reference)
    assert "other settings" in e.value.hint


def test_another_csr_than_at_first_is_refused(ra: kit.RegistrationAuthority, mac: dict[str, Any], waiting: str) -> None:
    """The certificate for the first key is not taken for another."""
    backend = make(url=ra.url(waiting, "wait"), **mac)
    first = backend.sign(request())
    assert isinstance(first, Pending)
    ra.approve(waiting)
    with pytest.raises(BackendRefusedError, match="our key"):
        backend.collect(request(), first.reference)


def test_orders_wait_side_by_side(ra: kit.RegistrationAuthority, mac: dict[str, Any], waiting: str) -> None:
    """Each of several orders gives its own certificate."""
    backend = make(url=ra.url(waiting, "wait"), **mac)
    asked = [request(spec) for spec in (APISERVER, ADMIN, SPECS["etcd-peer"])]
    waits = [backend.sign(one) for one in asked]
    ra.approve(waiting)
    for one, pending in reversed(list(zip(asked, waits, strict=True))):
        assert isinstance(pending, Pending)
        issued = backend.collect(one, pending.reference)
        assert isinstance(issued, Issued)
        assert issued.leaf.public_key() == one.csr.public_key()


# --- revocation ------------------------------------------------------------------------------------------------------


def test_revokes_what_was_superseded(ra: kit.RegistrationAuthority, keys: dict[str, Any]) -> None:
    """With the reason; revoked already is no error, and a certificate that the server does not know is refused."""
    backend = make(url=ra.url("ca"), **keys)
    assert backend.can("revoke")
    issued = backend.sign(request(SPECS["etcd-peer"]))
    assert isinstance(issued, Issued)
    for _ in range(2):
        backend.revoke(issued.leaf)
        assert ra.lines("revocation")[-1] == {"serial": str(issued.leaf.serial_number), "reason": "4"}
    assert ra.requests("ca")[-1]["profile"] == "peer"
    with pytest.raises(BackendRefusedError, match="badCertId"):
        backend.revoke(_LIVE["apiserver"])


def test_a_revocation_that_the_server_refuses(ra: kit.RegistrationAuthority, mac: dict[str, Any]) -> None:
    """The error shows its reason; a dead server is unavailable; a certificate without usages is no node's."""
    issued = make(url=ra.url("ca"), **mac).sign(request())
    assert isinstance(issued, Issued)
    with pytest.raises(BackendRefusedError, match="not by this client"):
        make(url=ra.url("ca", "reject"), **mac).revoke(issued.leaf)
    with pytest.raises(BackendUnavailableError):
        make(url=f"http://127.0.0.1:{free_port()}", timeout=timedelta(seconds=1), **mac).revoke(issued.leaf)
    with pytest.raises(BackendRefusedError, match="usages"):
        make(url=ra.url("ca"), **mac).revoke(_CA.certificate)


# --- the program -----------------------------------------------------------------------------------------------------


def program(directory: Path, says: str) -> str:
    """One that says so when it is asked for its version."""
    path = directory / "an-openssl"
    path.write_text(f'#!/bin/sh\n[ "$1" = version ] && {{ echo "{says}"; exit; }}\nexec openssl "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("says", ["OpenSSL 1.1.1w  11 Sep 2023", "LibreSSL 3.8.2", ""])
def test_an_openssl_without_the_command_is_refused(
    ra: kit.RegistrationAuthority, mac: dict[str, Any], tmp_path: Path, says: str
) -> None:
    """The error shows its version before anything is sent."""
    count = len(ra.requests("ca"))
    with pytest.raises(BackendRefusedError, match=r"wanted OpenSSL 3\.0"):
        make(url=ra.url("ca"), openssl=program(tmp_path, says), **mac).sign(request())
    assert len(ra.requests("ca")) == count


def test_no_openssl_is_refused(ra: kit.RegistrationAuthority, mac: dict[str, Any]) -> None:
    """The error names the missing program."""
    with pytest.raises(LocalFileError, match="/nosuch/openssl"):
        make(url=ra.url("ca"), openssl="/nosuch/openssl", **mac).sign(request())


def test_a_profile_needs_a_newer_openssl(ra: kit.RegistrationAuthority, mac: dict[str, Any], tmp_path: Path) -> None:
    """An older one would end with an unknown option; a newer one is given it."""
    keys = {**mac, "profile": "kubeadm-{usage}", "url": ra.url("ca")}
    with pytest.raises(BackendRefusedError, match=r"3\.3"):
        make(**keys, openssl=program(tmp_path, "OpenSSL 3.0.19 27 Jan 2026")).sign(request())
    newer = tmp_path / "newer"
    newer.write_text(
        f'#!/bin/sh\n[ "$1" = version ] && {{ echo "OpenSSL 3.5.9 1 Jan 2026"; exit; }}\necho "$@" >{tmp_path}/words\nexit 1\n'
    )
    newer.chmod(0o755)
    with pytest.raises(BackendRefusedError):
        make(**keys, openssl=str(newer)).sign(request())
    words = (tmp_path / "words").read_text().split()
    assert words[words.index("-profile") + 1] == "kubeadm-server"
    assert words[words.index("-server") + 1] == f"{ra.url('ca')}/.well-known/cmp"


def test_the_header_names_the_profile(ra: kit.RegistrationAuthority, mac: dict[str, Any]) -> None:
    """Where this system's openssl can, the server gives the usages of the named profile; where not, nothing is sent."""
    backend, count = make(url=ra.url("ca"), profile="{usage}", **mac), len(ra.requests("ca"))
    asked = request(SPECS["etcd-peer"])
    if Program(name="openssl", timeout=timedelta(minutes=2), wait=timedelta()).version() >= OLDEST_WITH_PROFILES:
        issued = backend.sign(asked)
        assert isinstance(issued, Issued)
        assert extended_key_usages(issued.leaf) == frozenset(eku.value for eku in asked.spec.ekus)
        assert ra.requests("ca")[-1]["profile"] == "null"  # in the path
    else:
        with pytest.raises(BackendRefusedError):
            backend.sign(asked)
        assert len(ra.requests("ca")) == count


def test_no_room_for_files_is_unavailable(
    ra: kit.RegistrationAuthority, mac: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both where nothing can be written, and where openssl could not write the certificate, which it does not tell."""
    full = tmp_path / "full-openssl"
    full.write_text(
        '#!/bin/sh\nfor word; do shift; [ "$word" != leaf.pem ] || word=/dev/full; set -- "$@" "$word"; done\nexec openssl "$@"\n'
    )
    full.chmod(0o755)
    count = len(ra.requests("ca"))
    with pytest.raises(BackendUnavailableError) as e:
        make(url=ra.url("ca"), openssl=str(full), **mac).sign(request())
    assert "full" in e.value.hint
    assert len(ra.requests("ca")) == count + 1
    monkeypatch.setattr("tempfile.tempdir", "/nosuch")
    with pytest.raises(BackendUnavailableError, match="/nosuch"):
        make(url=ra.url("ca"), **mac).sign(request())
    assert len(ra.requests("ca")) == count + 1


def test_a_program_that_does_not_end_is_stopped(
    mac: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program is stopped with all that it started, and that is "unavailable"."""
    monkeypatch.setattr("backends.cmp.program._GRACE", timedelta(seconds=1))
    path = tmp_path / "slow"
    path.write_text(
        f'#!/bin/sh\n[ "$1" = version ] && {{ echo "OpenSSL 3.0.19 x"; exit; }}\nsleep 600 & echo $! >{tmp_path}/pid; wait\n'
    )
    path.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as there:
        url = f"http://127.0.0.1:{there.getsockname()[1]}"
        backend = make(url=url, openssl=str(path), timeout=timedelta(seconds=1), **mac)
        pid, deadline = tmp_path / "pid", time.monotonic() + 180
        while not (pid.exists() and pid.read_text()):  # it may be stopped before it has begun
            assert time.monotonic() < deadline
            with pytest.raises(BackendUnavailableError, match="stopped"):
                backend.sign(request())
    deadline = time.monotonic() + 180
    while is_running(pid.read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- setup -----------------------------------------------------------------------------------------------------------


def wanted_setup(**settings: Any) -> SetupRequest:
    names = [spec.name for spec in SPECS.values() if spec.authority == CA]
    return SetupRequest(
        authority=AUTHORITIES["ca"],
        certificates={name: _LIVE[name] for name in names},
        validity=timedelta(days=365),
        node="cp-1",
        cluster="prod",
        settings=settings,
    )


def test_setup_says_each_profile_and_its_names() -> None:
    """Two usage classes, two paths, each with exactly its usages and its certificates' subjects and SANs."""
    [file] = CmpBackend.setup(wanted_setup(url="http://ra.corp.example:8080"))
    parts = {part.split("\n")[0]: part for part in file.text.split("# 2.")[0].split("/.well-known/cmp/p/")[1:]}
    server, client = parts["server"], parts["client"]
    assert file.name == "ca.txt"
    assert "extendedKeyUsage: serverAuth\n" in server
    assert "extendedKeyUsage: clientAuth\n" in client
    assert "DNS:kubernetes.default.svc.cluster.local" in " ".join(server.split("\n#"))
    assert "admin.conf: " in client
    assert "apiserver-kubelet-client: " in client
    assert "365 days" in server


def test_setup_follows_the_settings() -> None:
    """Paths, exceptions, profiles and mode are those of the settings so far; a bad pattern is reported."""
    [file] = CmpBackend.setup(wanted_setup(path="cmp/k8s", profile="a-{usage}", mode="cr", reference="node-7"))
    assert "http://RA-HOST:8080/cmp/k8s, with profile a-server" in file.text
    assert "raVerified" in file.text
    assert "a shared secret with reference node-7" in file.text
    with pytest.raises(SettingsError):
        CmpBackend.setup(wanted_setup(path="cmp/{role}"))


def test_the_settings_that_setup_prints_load() -> None:
    """The printed settings load with either of the two protections."""
    [file] = CmpBackend.setup(wanted_setup(url="http://ra.corp.example:8080"))
    lines = [line.lstrip("# ").split("   ")[0] for line in file.text.split("# 4.")[1].splitlines()[1:]]
    for left_out in (("client_cert", "client_key"), ("reference", "secret_file")):
        text = "\n".join(line for line in lines if not line.startswith(left_out))
        assert set(registry.configured(parse(text), ["ca"])) == {"ca"}
