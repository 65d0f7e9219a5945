"""The Vault backend, and the roles and policies that go with it, against a real OpenBao."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import logging
import os
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Self

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

from backends import vault as vault_backend
from backends.vault import VaultBackend
from backends.vault import setup as vault_setup
from backends.vault.server import Server
from backends.vault.settings import VaultAuth, VaultSettings, role_selector
from bridge.contract import PlannedCertificate, Secret, Selector, SignRequest
from bridge.errors import (
    BackendError,
    BackendRefusedError,
    BackendUnavailableError,
    Exit,
    LocalFileError,
    SettingsError,
    VerificationError,
    Violation,
)
from bridge.node import inventory
from bridge.pki import csr, verify
from bridge.pki.certificates import pem
from bridge.pki.kubeadm_names import builder_of
from bridge.specs import AUTHORITIES, SPECS, KeyAlgorithm
from bridge.testing import BackendConformance, TestCA, sign_request
from tests.kit import openbao
from tests.kit.cas import Bridge, live_certificates
from tests.kit.loopback import LoopbackServer, free_port
from tests.kit.measured import traced
from tests.kit.pki import Pki, handmade_pki

APISERVER = SPECS["apiserver"]
ADMIN = SPECS["admin.conf"]
DAYS_30 = timedelta(days=30)


# ------------------------------------------------------------------------------------------ servers


@pytest.fixture(scope="module")
def bao() -> Iterator[openbao.OpenBao]:
    with openbao.dev_server() as server:
        yield server


@pytest.fixture(scope="module")
def ca() -> TestCA:
    """The CA in the engine `pki`."""
    return TestCA.make(algorithm="ecdsa-p256")


@pytest.fixture(scope="module")
def live(ca: TestCA) -> dict[str, x509.Certificate]:
    """A node's certificates from that CA."""
    return {name: ca.leaf(spec) for name, spec in SPECS.items()}


@pytest.fixture(scope="module")
def pki(bao: openbao.OpenBao, ca: TestCA, live: dict[str, x509.Certificate]) -> openbao.OpenBao:
    """The server with that CA in engine `pki`, the printed roles, and the printed policy as `node`."""
    bao.add_ca("pki", ca.certificate_pem, ca.key_pem)
    bao.add_policy("node", vault_setup.policy("pki", bao.add_kubeadm_roles("pki", live)))
    return bao


@pytest.fixture
def request_for(live: dict[str, x509.Certificate]) -> Callable[[str], SignRequest]:
    """A request to renew one of the node's certificates."""
    return lambda name: sign_request(live[name], SPECS[name], "ecdsa-p256", DAYS_30)


@pytest.fixture
def apiserver(request_for: Callable[[str], SignRequest]) -> SignRequest:
    return request_for("apiserver")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tls:
    """Certificates and keys for a server on 127.0.0.1 and for its client, from one CA."""

    trust: Path
    server: tuple[Path, Path]
    client: tuple[Path, Path]


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    directory = tmp_path_factory.mktemp("tls")
    authority = TestCA.make("corp", "ecdsa-p256")
    trust = directory / "ca.crt"
    trust.write_bytes(authority.certificate_pem)
    return Tls(
        trust=trust,
        server=_pair(directory / "server", authority, ExtendedKeyUsageOID.SERVER_AUTH),
        client=_pair(directory / "client", authority, ExtendedKeyUsageOID.CLIENT_AUTH),
    )


def _pair(base: Path, authority: TestCA, eku: x509.ObjectIdentifier) -> tuple[Path, Path]:
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    identifier = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, base.name)]))
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.ExtendedKeyUsage([eku]), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    files = base.with_suffix(".crt"), base.with_suffix(".key")
    files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(csr.key_pem(key))
    return files


@pytest.fixture(scope="module")
def tls_bao(tls: Tls, ca: TestCA, live: dict[str, x509.Certificate]) -> Iterator[openbao.OpenBao]:
    """A server with TLS, which can be sealed; engine `pki` as above, and method `cert` for the client's CA."""
    with openbao.tls_server(*tls.server, tls.trust) as server:
        server.add_ca("pki", ca.certificate_pem, ca.key_pem)
        server.add_policy("node", vault_setup.policy("pki", server.add_kubeadm_roles("pki", live)))
        server.enable_auth("cert")
        server.write("auth/cert/certs/node", certificate=tls.trust.read_text(), token_policies=["node"])
        yield server


class Double(LoopbackServer):
    """
    An HTTP server for answers that the real one does not give on demand.

    It expects exactly the requests of its script, in order, with the headers of a Vault client and a JSON body
    where there is one; whatever else comes makes the test fail.
    """

    def __init__(self, *script: tuple[str, int, Mapping[str, str], bytes]) -> None:
        """Args: for each request "METHOD PATH", and its answer: status, headers, body."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = list(script)
        self.tokens: list[str | None] = []
        self.unexpected: list[str] = []

    @property
    def url(self) -> str:
        """The URL of the server."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
        assert self.unexpected == []
        assert self.script == []


class _Handler(BaseHTTPRequestHandler):
    server: Double

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if body:
            json.loads(body)
        self.do_GET()

    def do_GET(self) -> None:
        asked = f"{self.command} {self.path}"
        if self.headers.get("X-Vault-Request") != "true" or not self.server.script or self.server.script[0][0] != asked:
            self.server.unexpected.append(asked)
            self.send_error(599)
            return
        self.server.tokens.append(self.headers.get("X-Vault-Token"))
        _, status, headers, content = self.server.script.pop(0)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):  # the client may have had enough
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Silent."""


SIGN = "POST /v1/pki/sign/kubeadm-apiserver"
JSON = {"Content-Type": "application/json"}


def errors(*texts: str) -> bytes:
    return json.dumps({"errors": texts}).encode()


# ------------------------------------------------------------------------------------------- helpers


def file_secret(path: Path, value: str) -> Secret:
    """A secret in a file, as an editor leaves it."""
    path.write_text(f"{value}\n")
    return Secret("file", str(path))


def token_file(directory: Path, token: str) -> VaultAuth:
    return VaultAuth(token=file_secret(directory / "token", token))


@contextlib.contextmanager
def vault(url: str, auth: VaultAuth, **settings: object) -> Iterator[VaultBackend]:
    """A backend, closed at the end."""
    given = {"timeout": timedelta(minutes=3), **settings}
    checked = VaultSettings(url=url, auth=auth, **given)  # type: ignore[arg-type]
    assert list(checked.problems()) == []
    backend = VaultBackend.from_settings(checked)
    yield backend
    backend.close()


def approle(bao: openbao.OpenBao, directory: Path, *policies: str, **options: Any) -> VaultAuth:
    """Method `approle`, with a new AppRole that has these policies."""
    role_id, secret_id = bao.add_approle(f"r{time.monotonic_ns()}", *policies, **options)
    return VaultAuth(
        method="approle",
        role_id=file_secret(directory / "role-id", role_id),
        secret_id=file_secret(directory / "secret-id", secret_id),
    )


def refusal(backend: VaultBackend, request: SignRequest) -> BackendRefusedError:
    with pytest.raises(BackendRefusedError) as e:
        backend.sign(request)
    return e.value


def unavailability(backend: VaultBackend, request: SignRequest) -> BackendUnavailableError:
    with pytest.raises(BackendUnavailableError) as e:
        backend.sign(request)
    return e.value


def expectation(*anchors: x509.Certificate) -> verify.Expectation:
    return verify.Expectation(
        anchors=anchors, anchor_name="ca.crt", now=datetime.now(UTC), min_validity=timedelta(days=7)
    )


def jwt(key: ec.EllipticCurvePrivateKey, **claims: object) -> str:
    """A signed JWT (RFC 7519, ES256)."""

    def part(value: bytes) -> str:
        return base64.urlsafe_b64encode(value).rstrip(b"=").decode()

    claims = {"iat": int(time.time()), "exp": int(time.time()) + 600, **claims}
    signed = ".".join(part(json.dumps(value).encode()) for value in ({"alg": "ES256", "typ": "JWT"}, claims))
    r, s = decode_dss_signature(key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
    return f"{signed}.{part(r.to_bytes(32) + s.to_bytes(32))}"


class TestConformance(BackendConformance):
    """The suite that every backend passes, with the rights of the printed policy and no others."""

    unsupported = frozenset({"sign_many", "collect"})

    @pytest.fixture(scope="module")
    @classmethod
    def ca(cls, ca: TestCA) -> TestCA:
        """The CA in the engine."""
        return ca

    @pytest.fixture(scope="module")
    @classmethod
    def live(cls, live: dict[str, x509.Certificate]) -> dict[str, x509.Certificate]:
        """The certificates that the roles were made from."""
        return live

    @pytest.fixture
    def backend(self, pki: openbao.OpenBao, tmp_path: Path) -> Iterator[VaultBackend]:
        """With a token that has the printed policy and not even `default`."""
        with vault(pki.url, token_file(tmp_path, pki.token("node", no_default_policy=True))) as backend:
            yield backend

    @pytest.fixture
    def dead_backend(self, tmp_path: Path) -> VaultBackend:
        """A backend whose server's port is closed."""
        url = f"http://127.0.0.1:{free_port()}"
        auth = token_file(tmp_path, "unused")
        return VaultBackend.from_settings(VaultSettings(url=url, auth=auth, timeout=timedelta(seconds=2)))


# ----------------------------------------------------------------------------------------- signing in


@pytest.fixture
def secret_id_auth(pki: openbao.OpenBao, tmp_path: Path) -> VaultAuth:
    return approle(pki, tmp_path, "node")


@pytest.fixture
def wrapped_auth(pki: openbao.OpenBao, tmp_path: Path) -> VaultAuth:
    role_id, _ = pki.add_approle("wrapped", "node")
    return VaultAuth(
        method="approle",
        wrapped=True,
        role_id=file_secret(tmp_path / "role-id", role_id),
        secret_id=file_secret(tmp_path / "wrapped", pki.wrapped("auth/approle/role/wrapped/secret-id")),
    )


@pytest.fixture
def userpass_auth(pki: openbao.OpenBao, tmp_path: Path) -> VaultAuth:
    pki.enable_auth("userpass", "people")
    pki.write("auth/people/users/node", password="a pass phrase, ä", token_policies=["node"])
    password = file_secret(tmp_path / "password", "a pass phrase, ä")
    return VaultAuth(method="userpass", mount="people", username="node", password=password)


@pytest.fixture
def jwt_auth(pki: openbao.OpenBao, tmp_path: Path) -> VaultAuth:
    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    pki.enable_auth("jwt")
    pki.write("auth/jwt/config", jwt_validation_pubkeys=[public.decode()])
    pki.write(
        "auth/jwt/role/node",
        role_type="jwt", user_claim="sub", bound_audiences=["ca"], bound_subject="cp-1", token_policies=["node"],
    )  # fmt: skip
    return VaultAuth(method="jwt", role="node", jwt=file_secret(tmp_path / "jwt", jwt(key, sub="cp-1", aud="ca")))


class _TokenReview(BaseHTTPRequestHandler):
    """What method `kubernetes` asks an API server (authentication.k8s.io/v1); accepts one token."""

    good: str
    account = "system:serviceaccount:kube-system:ca-bridge"

    def do_POST(self) -> None:
        review = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = self.path, self.headers["Authorization"]
        accepted = asked == ("/apis/authentication.k8s.io/v1/tokenreviews", "Bearer reviewer")
        ok = accepted and review["spec"]["token"] == self.good
        review["status"] = {"authenticated": ok, "user": {"username": self.account, "uid": "1"} if ok else {}}
        content = json.dumps(review).encode()
        self.send_response(201 if accepted else 400)
        for name, value in {**JSON, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def kubernetes_auth(pki: openbao.OpenBao, ca: TestCA, tmp_path: Path) -> Iterator[VaultAuth]:
    account = {"name": "ca-bridge", "uid": "1"}
    claims = {"sub": _TokenReview.account, "kubernetes.io": {"namespace": "kube-system", "serviceaccount": account}}
    token = jwt(ec.generate_private_key(ec.SECP256R1()), **claims)
    handler = type("Handler", (_TokenReview,), {"good": token})
    with LoopbackServer(("127.0.0.1", 0), handler) as api_server:
        threading.Thread(target=api_server.serve_forever, args=(0.02,), daemon=True).start()
        pki.enable_auth("kubernetes")
        pki.write(
            "auth/kubernetes/config",
            kubernetes_host=f"http://127.0.0.1:{api_server.server_address[1]}",
            kubernetes_ca_cert=ca.certificate_pem.decode(),
            token_reviewer_jwt="reviewer",
            disable_local_ca_jwt=True,
        )
        pki.write(
            "auth/kubernetes/role/node",
            bound_service_account_names=["ca-bridge"],
            bound_service_account_namespaces=["kube-system"],
            token_policies=["node"],
        )
        yield VaultAuth(method="kubernetes", role="node", jwt=file_secret(tmp_path / "jwt", token))
        api_server.shutdown()


LOGINS = ["secret_id_auth", "wrapped_auth", "userpass_auth", "jwt_auth", "kubernetes_auth"]


@pytest.mark.parametrize("auth", LOGINS)
def test_logs_in_once_and_revokes_its_token(
    pki: openbao.OpenBao, apiserver: SignRequest, auth: str, request: pytest.FixtureRequest
) -> None:
    """With each method, several threads share one login, and its token is gone after the run."""
    method: VaultAuth = request.getfixturevalue(auth)
    before = pki.accessors()
    with vault(pki.url, method) as backend:
        assert pki.accessors() == before  # nothing yet
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(backend.sign, [apiserver] * 8))
        assert len(pki.accessors() - before) == 1
    assert pki.accessors() <= before  # a wrapping token is used up


@pytest.mark.parametrize("auth", LOGINS)
def test_refuses_wrong_credentials_without_showing_them(
    pki: openbao.OpenBao,
    apiserver: SignRequest,
    auth: str,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Credentials that the server does not accept are a refusal, and appear in no text at any log level."""
    caplog.set_level(logging.DEBUG)
    method: VaultAuth = request.getfixturevalue(auth)
    secret = method.password or method.secret_id or method.jwt
    assert secret is not None
    wrong = "x" + secret.read()[:-1]
    Path(secret.where).write_text(wrong)
    with vault(pki.url, method) as backend:
        assert_not_shown(wrong, refusal(backend, apiserver), caplog)


def assert_not_shown(secret: str, error: BackendError, caplog: pytest.LogCaptureFixture) -> None:
    """Assert that the error, its traceback and the log records do not show it."""
    shown = [str(error), repr(error), error.hint, repr(vars(error)), *traceback.format_exception(error), caplog.text]
    assert secret not in "".join(shown)


def test_logs_in_with_a_client_certificate(tls_bao: openbao.OpenBao, tls: Tls, apiserver: SignRequest) -> None:
    """Method `cert` needs nothing but the client certificate of the connection, and its token is revoked too."""
    before = tls_bao.accessors()
    auth = VaultAuth(method="cert", role="node")
    files = {"ca_file": tls.trust, "client_cert": tls.client[0], "client_key": tls.client[1]}
    with vault(tls_bao.url, auth, **files) as backend:
        backend.sign(apiserver)
        assert len(tls_bao.accessors() - before) == 1
    assert tls_bao.accessors() == before


def test_a_client_certificate_for_another_purpose_is_refused(
    tls_bao: openbao.OpenBao, tls: Tls, apiserver: SignRequest
) -> None:
    """A server certificate does not log in, although the server answers with a status that means "later"."""
    auth = VaultAuth(method="cert", role="node")
    files = {"ca_file": tls.trust, "client_cert": tls.server[0], "client_key": tls.server[1]}
    with vault(tls_bao.url, auth, **files) as backend:
        refusal(backend, apiserver)


def test_leaves_a_given_token_alone(pki: openbao.OpenBao, apiserver: SignRequest, tmp_path: Path) -> None:
    """A token from a file is not ours to revoke."""
    token = pki.token("node")
    with vault(pki.url, token_file(tmp_path, token)) as backend:
        backend.sign(apiserver)
    assert pki.is_valid(token)


def test_a_wrapped_secret_id_that_was_opened_is_an_alarm(
    pki: openbao.OpenBao, apiserver: SignRequest, wrapped_auth: VaultAuth
) -> None:
    """The second client to open a wrapping token reads that another has opened it before."""
    with vault(pki.url, wrapped_auth) as backend:
        backend.sign(apiserver)
    with vault(pki.url, wrapped_auth) as backend:
        assert "someone else" in refusal(backend, apiserver).hint


def test_a_wrapped_secret_id_serves_a_second_login(
    pki: openbao.OpenBao, apiserver: SignRequest, wrapped_auth: VaultAuth
) -> None:
    """A login that is needed again in the same run does not open the wrapping token again."""
    with vault(pki.url, wrapped_auth) as backend:
        for _ in range(2):
            backend.sign(apiserver)
            pki.write("auth/token/revoke-accessor", accessor=newest(pki, "wrapped"))


def newest(bao: openbao.OpenBao, role: str) -> str:
    """The accessor of the token that an AppRole's login made."""
    looks = [bao.request("POST", "auth/token/lookup-accessor", {"accessor": a}) for a in bao.accessors()]
    found = [look.json()["data"] for look in looks if look.ok]  # one that is used up may just be going
    return next(str(t["accessor"]) for t in found if (t.get("meta") or {}).get("role_name") == role)


def test_opens_nothing_that_is_not_a_wrapped_secret_id(
    pki: openbao.OpenBao, apiserver: SignRequest, wrapped_auth: VaultAuth
) -> None:
    """A token that was wrapped by other means is left unopened."""
    forged = pki.wrapped("sys/wrapping/wrap", secret_id="0")
    assert wrapped_auth.secret_id is not None
    Path(wrapped_auth.secret_id.where).write_text(forged)
    with vault(pki.url, wrapped_auth) as backend:
        refusal(backend, apiserver)
    assert pki.write("sys/wrapping/lookup", token=forged)["data"]["creation_path"] == "sys/wrapping/wrap"


def test_logs_in_again_when_the_token_is_used_up(pki: openbao.OpenBao, apiserver: SignRequest, tmp_path: Path) -> None:
    """A token that ends in the middle of a run is replaced by a new login."""
    with vault(pki.url, approle(pki, tmp_path, "node", token_num_uses=1)) as backend:
        for _ in range(3):
            backend.sign(apiserver)


def test_a_token_that_has_ended_is_not_revoked(
    pki: openbao.OpenBao, apiserver: SignRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A gateway logs in anew each hour for months: of its tokens it has the last one, and revokes that one at its end."""
    before = pki.accessors()
    with vault(pki.url, approle(pki, tmp_path, "node")) as backend:
        for _ in range(2):
            backend.sign(apiserver)
            [made] = pki.accessors() - before
            pki.write("auth/token/revoke-accessor", accessor=made)
        backend.sign(apiserver)
        assert len(pki.accessors() - before) == 1
    assert pki.accessors() <= before
    assert [r.getMessage() for r in caplog.records if r.name == "ca-bridge.vault"] == []


def test_tokens_that_are_good_for_few_requests_fill_no_memory() -> None:
    """A gateway has thousands a day: the latest are hidden in what a server says, and the others are forgotten."""
    server = Server(VaultSettings(url="http://127.0.0.1:1", auth=VaultAuth(token=Secret("env", "UNSET"))))
    with traced() as memory:
        for number in range(20_000):
            token = server.hide(f"hvs.{number:0100}")
        assert memory()[0] < 1 << 20
    assert server.presentable(f"no such token: {token}") == "no such token: (secret)"


def test_a_server_that_hangs_is_waited_for_once_and_not_by_each_thread_in_turn(tmp_path: Path) -> None:
    """Eight workers that want a login have their error after two logins, and not after eight."""
    secret = file_secret(tmp_path / "secret", "s")
    auth = VaultAuth(method="approle", role_id=secret, secret_id=secret)
    logins = 0
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(8) as pool:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        backend = VaultBackend.from_settings(VaultSettings(url=url, auth=auth, timeout=timedelta(seconds=1)))

        def look(_: int) -> None:
            with pytest.raises(BackendUnavailableError):
                backend.identity()

        list(pool.map(look, range(8)))
        silent.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                silent.accept()[0].close()
                logins += 1
    backend.close()
    assert 0 < logins <= 4  # each further one is for those who came when the one before had begun


def test_does_not_log_in_again_for_what_the_policy_forbids(
    pki: openbao.OpenBao, apiserver: SignRequest, tmp_path: Path
) -> None:
    """A good token without the right is refused at once."""
    before = pki.accessors()
    with vault(pki.url, approle(pki, tmp_path)) as backend:
        refusal(backend, apiserver)
        assert len(pki.accessors() - before) == 1


def test_says_both_reasons_when_a_new_login_fails(pki: openbao.OpenBao, apiserver: SignRequest, tmp_path: Path) -> None:
    """A secret id that was good for one login is named as what stops the second one."""
    with vault(pki.url, approle(pki, tmp_path, "node", token_num_uses=1, secret_id_num_uses=1)) as backend:
        backend.sign(apiserver)
        assert "invalid role or secret ID" in str(refusal(backend, apiserver))


def test_reads_a_token_file_again(pki: openbao.OpenBao, apiserver: SignRequest, tmp_path: Path) -> None:
    """A revoked token is refused, until the agent that keeps the file has written a good one."""
    first = pki.token("node")
    with vault(pki.url, token_file(tmp_path, first)) as backend:
        backend.sign(apiserver)
        pki.write("auth/token/revoke", token=first)
        refusal(backend, apiserver)
        token_file(tmp_path, pki.token("node"))
        backend.sign(apiserver)


def test_a_batch_token_needs_no_revoking(
    pki: openbao.OpenBao, apiserver: SignRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A batch token, which can't be revoked, is no reason for a warning."""
    with vault(pki.url, approle(pki, tmp_path, "node", token_type="batch")) as backend:
        backend.sign(apiserver)
    assert [r for r in caplog.records if r.name == "ca-bridge.vault"] == []


def test_close_survives_a_server_that_is_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A token that can't be revoked any more is a warning, not an error, and is not shown."""
    secret = file_secret(tmp_path / "secret", "s")
    auth = VaultAuth(method="approle", role_id=secret, secret_id=secret)
    login = json.dumps({"auth": {"client_token": "hvs.planted-token"}}).encode()
    with Double(
        ("POST /v1/auth/approle/login", 200, JSON, login),
        ("POST /v1/sys/capabilities-self", 200, JSON, b"{}"),
    ) as double:
        backend = VaultBackend.from_settings(
            VaultSettings(url=double.url, auth=auth, mode="sign-verbatim", timeout=timedelta(minutes=1))
        )
        assert backend.check([]) == {}
    backend.close()
    assert [r.levelname for r in caplog.records if r.name == "ca-bridge.vault"] == ["WARNING"]
    assert "planted" not in caplog.text


def test_keeps_the_token_that_a_certificate_hangs_on(
    pki: openbao.OpenBao, apiserver: SignRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With generate_lease, revoking the token would revoke the certificate, so it stays, and the log says why."""
    role = pki.read("pki/roles/kubeadm-apiserver")["data"]
    pki.write("pki/roles/leased", **{**role, "generate_lease": True})
    before = pki.accessors()
    with vault(pki.url, approle(pki, tmp_path, "node", "leased"), roles={"apiserver": "leased"}) as backend:
        pki.add_policy("leased", vault_setup.policy("pki", ["leased"]))
        leaf = backend.sign(apiserver).leaf
    serial = ":".join(f"{byte:02x}" for byte in leaf.serial_number.to_bytes(20).lstrip(b"\0"))
    assert len(pki.accessors() - before) == 1
    assert pki.read(f"pki/cert/{serial}")["data"]["revocation_time"] == 0
    assert "generate_lease" in caplog.text


@pytest.mark.first_use("25")
@pytest.mark.parametrize("kind", ["file", "env", "credential"])
def test_a_secret_that_is_not_there_is_a_refusal_that_names_it(
    pki: openbao.OpenBao, apiserver: SignRequest, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says once where a secret was looked for, and what to do; with the secret there, the same settings sign."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    where = {"file": str(tmp_path / "login"), "env": "THE_TOKEN", "credential": "login"}[kind]
    with vault(pki.url, VaultAuth(token=Secret(kind, where))) as backend:
        error = refusal(backend, apiserver)
        assert (str(error).count(where), bool(error.hint)) == (1, True)
        token = pki.token("node")
        monkeypatch.setenv("THE_TOKEN", token)
        (tmp_path / "login").write_text(token)
        backend.sign(apiserver)


@pytest.mark.parametrize("token", ["hvs.planted\nhvs.second", "hvs.plänted", "hvs.planted hvs.second"])
def test_a_token_that_fits_no_header_is_not_shown(
    pki: openbao.OpenBao, apiserver: SignRequest, tmp_path: Path, token: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A token file with more than a token in it is refused before anything can quote it."""
    with vault(pki.url, token_file(tmp_path, token)) as backend:
        error = refusal(backend, apiserver)
    assert error.exit_code == Exit.USAGE
    for word in token.split():
        assert_not_shown(word, error, caplog)


# ---------------------------------------------------------------------------------------- the engine


@pytest.mark.parametrize("algorithm", ["rsa-2048", "ecdsa-p256"])
def test_signs_verbatim_what_was_asked(
    pki: openbao.OpenBao,
    ca: TestCA,
    live: dict[str, x509.Certificate],
    tmp_path: Path,
    algorithm: KeyAlgorithm,
) -> None:
    """Mode sign-verbatim needs no role, and gives kubeadm's usages to every type of key."""
    pki.add_policy("verbatim", vault_setup.policy("pki", [], mode="sign-verbatim"))
    auth = token_file(tmp_path, pki.token("verbatim", no_default_policy=True))
    with vault(pki.url, auth, mode="sign-verbatim") as backend:
        assert backend.check(list(SPECS.values())) == {}
        for name, spec in SPECS.items():
            request = sign_request(live[name], spec, algorithm, DAYS_30)
            issued = backend.sign(request)
            verify.check(issued, request, expectation(ca.certificate))
            usage = issued.leaf.extensions.get_extension_for_class(x509.KeyUsage).value
            assert (usage.digital_signature, usage.key_encipherment, usage.key_agreement) == (True, True, False)


def test_chooses_an_issuer_by_name(
    bao: openbao.OpenBao, ca: TestCA, apiserver: SignRequest, live: dict[str, x509.Certificate], tmp_path: Path
) -> None:
    """With several issuers in one engine the settings' one signs, in both modes, with a policy for its paths."""
    bao.add_ca("many", ca.certificate_pem, ca.key_pem)
    second = TestCA.make("second", "ecdsa-p256")
    pem = (second.certificate_pem + second.key_pem).decode()
    (issuer,) = bao.write("many/issuers/import/bundle", pem_bundle=pem)["data"]["imported_issuers"]
    usage = "read-only,issuing-certificates,ocsp-signing"  # or naming a CA without cRLSign fails
    bao.write(f"many/issuer/{issuer}", issuer_name="second", usage=usage)
    roles = bao.add_kubeadm_roles("many", live)
    for mode in ("sign", "sign-verbatim"):
        bao.add_policy("many", vault_setup.policy("many", roles, issuer="second", mode=mode))
        auth = token_file(tmp_path, bao.token("many", no_default_policy=True))
        with vault(bao.url, auth, mount="many", issuer="second", mode=mode) as backend:
            verify.check(backend.sign(apiserver), apiserver, expectation(second.certificate))
            assert backend.issuers() == [second.certificate]
            assert backend.check([APISERVER]) == {}
        with vault(bao.url, auth, mount="many", mode=mode) as backend:
            refusal(backend, apiserver)
            assert backend.issuers() == [ca.certificate]


def test_a_misspelt_issuer_is_refused(pki: openbao.OpenBao, apiserver: SignRequest, tmp_path: Path) -> None:
    """An issuer that is not there is a refusal, although the server answers with status 500."""
    with vault(pki.url, token_file(tmp_path, pki.root_token), issuer="nobody") as backend:
        assert "issuer" in refusal(backend, apiserver).hint
        with pytest.raises(BackendRefusedError):
            backend.issuers()


def test_brings_the_intermediates(bao: openbao.OpenBao, tmp_path: Path, live: dict[str, x509.Certificate]) -> None:
    """A leaf from an intermediate CA comes with the chain up to the node's trust anchor."""
    root = TestCA.make("root", "ecdsa-p256")
    key, now = csr.generate_key("ecdsa-p256"), datetime.now(UTC)
    middle = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "middle")]))
        .issuer_name(root.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=100))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(root.certificate.extensions.get_extension_for_class(x509.KeyUsage).value, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(root.key, hashes.SHA256())
    )
    bao.add_ca("middle", middle.public_bytes(serialization.Encoding.PEM), csr.key_pem(key))
    bao.add_kubeadm_roles("middle", live)
    request = sign_request(live["admin.conf"], ADMIN, "ecdsa-p256", DAYS_30)
    with vault(bao.url, token_file(tmp_path, bao.root_token), mount="middle") as backend:
        verify.check(backend.sign(request), request, expectation(root.certificate))
        assert backend.issuers() == [middle]
        bao.write("middle/issuers/import/cert", pem_bundle=root.certificate_pem.decode())
        begin, other = datetime.now(UTC), sign_request(live["admin.conf"], ADMIN, "ecdsa-p256", DAYS_30)
        issued = backend.sign(other)
        verify.check(issued, other, expectation(root.certificate))
        assert backend.issuers() == [middle, root.certificate]
        assert backend.recall([other], begin) == [issued]


def test_finds_what_was_signed_for_a_killed_run(
    pki: openbao.OpenBao, request_for: Callable[[str], SignRequest], tmp_path: Path
) -> None:
    """By exactly its key and usages, where the mount has it since then; a revoked one is not given out."""
    begin = datetime.now(UTC)
    token = token_file(tmp_path, pki.root_token)
    with vault(pki.url, token) as backend:
        assert backend.recall([request_for("apiserver")], begin) == [None]
        requests = [request_for(name) for name in ("apiserver", "admin.conf", "scheduler.conf")]
        issued = [backend.sign(request) for request in requests[:2]]
        other = dataclasses.replace(requests[0], spec=ADMIN)

        assert backend.recall([*requests, other], begin) == [*issued, None, None]
        assert backend.recall(requests[:1], begin + timedelta(hours=2)) == [None]
        assert backend.recall(requests[:1], begin - timedelta(hours=2)) == issued[:1]
        pki.write("pki/revoke", certificate=pem(issued[0].leaf).decode())
        assert backend.recall(requests[:2], begin) == [None, issued[1]]
    with vault(pki.url, token) as backend:
        assert backend.recall(requests[:2], begin) == [None, issued[1]]


def test_of_several_certificates_of_a_key_the_newest_counts(
    ca: TestCA, apiserver: SignRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What strangers had signed by the mount, and can't be read, keeps none from being found; and what is gone is forgotten."""
    now = datetime.now(UTC)
    broken = x509.UnrecognizedExtension(ExtensionOID.EXTENDED_KEY_USAGE, b"\0")
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])

    def stored(minutes: int, value: x509.ExtensionType) -> x509.Certificate:
        begin, end = now - timedelta(minutes=minutes), now + timedelta(days=1)
        builder = builder_of(apiserver.csr.subject, ca.certificate.subject, apiserver.csr.public_key(), begin, end)
        return builder.add_extension(value, critical=False).sign(ca.key, hashes.SHA256())

    there = {f"0{number}": stored(*one) for number, one in enumerate([(9, usage), (2, usage), (1, broken), (5, usage)])}

    def listed(*numbers: str) -> tuple[str, int, Mapping[str, str], bytes]:
        return "GET /v1/pki/certs?list=true&limit=10001", 200, JSON, json.dumps({"data": {"keys": numbers}}).encode()

    def one(number: str, certificate: x509.Certificate) -> tuple[str, int, Mapping[str, str], bytes]:
        return (
            f"GET /v1/pki/cert/{number}",
            200,
            JSON,
            json.dumps({"data": {"certificate": pem(certificate).decode()}}).encode(),
        )

    def number_of(certificate: x509.Certificate) -> str:
        return certificate.serial_number.to_bytes((certificate.serial_number.bit_length() + 7) // 8).hex("-")

    monkeypatch.setattr(vault_backend, "_READ_AT_ONCE", 1)
    signer, newest = one("ca_chain", ca.certificate), one(number_of(there["01"]), there["01"])
    script = [signer, listed(*there), *(one(*item) for item in there.items()), newest]
    again = [signer, listed("00", "03"), one(number_of(there["03"]), there["03"])]
    with Double(*script, *again) as double, vault(double.url, token_file(tmp_path, "t")) as backend:
        assert [answer and answer.leaf for answer in backend.recall([apiserver], now)] == [there["01"]]
        assert [answer and answer.leaf for answer in backend.recall([apiserver], now)] == [there["03"]]
        assert backend._read.keys() == {"00", "03"}


def test_a_missing_token_is_no_ca_that_tells_nothing(apiserver: SignRequest, ca: TestCA, tmp_path: Path) -> None:
    """The file is missed, and the request is not signed a second time when it is back."""
    signer = ("GET /v1/pki/cert/ca_chain", 200, JSON, answer(ca))
    with Double(signer) as double, vault(double.url, VaultAuth(token=Secret("file", str(tmp_path / "t")))) as backend:
        with pytest.raises(LocalFileError):
            backend.may_recall()
        with pytest.raises(LocalFileError):
            backend.recall([apiserver], datetime.now(UTC))


def test_two_threads_that_look_back_differently_far_lose_nothing(
    ca: TestCA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one takes for too old is not kept as such for the other."""
    now, leaf = datetime.now(UTC), ca.leaf(APISERVER)  # begins twelve hours ago
    reading, read = threading.Event(), threading.Event()

    def read_one(_: VaultBackend, __: str, oldest: datetime) -> object:
        if leaf.not_valid_before_utc < oldest:
            reading.set()
            read.wait(0.5)  # the other one, unless it waits for us
            return None
        read.set()
        return (b"", frozenset()), leaf

    monkeypatch.setattr(vault_backend, "_FURTHER", timedelta())
    monkeypatch.setattr(VaultBackend, "_listed", lambda *_: ["01"])
    monkeypatch.setattr(VaultBackend, "_read_one", read_one)
    with vault("http://127.0.0.1:1", token_file(tmp_path, "t")) as backend, ThreadPoolExecutor(2) as pool:
        near = pool.submit(backend._stored, now)
        assert reading.wait(180)
        far = pool.submit(backend._stored, now - timedelta(days=1))
        assert [list(near.result()), len(list(far.result()))] == [[], 1]
        assert len(list(backend._stored(now - timedelta(days=1)))) == 1


@pytest.mark.parametrize("why", ["the policy", "too many"])
def test_a_token_that_may_list_nothing_finds_nothing(
    pki: openbao.OpenBao,
    apiserver: SignRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    why: str,
) -> None:
    """A warning says what that means; the right that the printed policy leaves to an administrator is enough."""
    left_out = vault_setup.policy("pki", ["kubeadm-apiserver"])
    given = re.sub("(# Only for a desk.*\n)# (.*\n)# (.*\n)# ", r"\1\2\3", left_out)
    assert given != left_out
    pki.add_policy("left-out", left_out)
    pki.add_policy("given", given)
    with vault(pki.url, token_file(tmp_path, pki.token("given", no_default_policy=True))) as backend:
        assert backend.may_recall()
        begin, issued = datetime.now(UTC), backend.sign(apiserver)
        assert backend.recall([apiserver], begin) == [issued]
    if why == "too many":
        monkeypatch.setattr(vault_backend, "_MOST_LISTED", 0)  # beside the one above there may be none
    token = pki.token("left-out" if why == "the policy" else "given", no_default_policy=True)
    with vault(pki.url, token_file(tmp_path, token)) as backend:
        assert not backend.may_recall()
        assert backend.recall([apiserver], begin) == [None]
    assert "may be signed twice: the token lacks `list` on pki/certs, or there are more than" in caplog.text


def test_what_a_role_does_not_store_is_not_recalled(
    bao: openbao.OpenBao, ca: TestCA, live: dict[str, x509.Certificate], tmp_path: Path
) -> None:
    """A role with `no_store` leaves nothing to find, and the backend says so; a role that is mended counts at the next look."""
    bao.add_ca("unstored", ca.certificate_pem, ca.key_pem)
    [(name, role)] = vault_setup.roles({"admin.conf": live["admin.conf"]}, DAYS_30).items()
    with vault(bao.url, token_file(tmp_path, bao.root_token), mount="unstored") as backend:
        for no_store in (False, True, False):
            bao.add_roles("unstored", {name: {**role, "no_store": no_store}})
            assert backend.check([ADMIN]) == {}
            assert backend.may_recall() is not no_store


def test_a_role_of_another_issuer_is_found(
    bao: openbao.OpenBao, ca: TestCA, live: dict[str, x509.Certificate], tmp_path: Path
) -> None:
    """It would sign by a CA that the settings do not name; a role may name the default issuer by its id, too."""
    bao.add_ca("issuers", ca.certificate_pem, ca.key_pem)
    default, other = bao.read("issuers/config/issuers")["data"]["default"], TestCA.make()
    imported = bao.write("issuers/issuers/import/bundle", pem_bundle=(other.certificate_pem + other.key_pem).decode())
    [another] = imported["data"]["imported_issuers"]
    [(name, role)] = vault_setup.roles({"admin.conf": live["admin.conf"]}, DAYS_30).items()
    day = timedelta(days=1)
    wanted = PlannedCertificate(
        spec=ADMIN, certificate=live["admin.conf"], key="ecdsa-p256", validity=day, at_least=day
    )

    def found(reference: str, issuer: str | None = None) -> list[str]:
        bao.add_roles("issuers", {name: {**role, "issuer_ref": reference}})
        auth = token_file(tmp_path, bao.root_token)
        with vault(bao.url, auth, mount="issuers", issuer=issuer) as backend:
            return [one.subject for one in backend.check_whole([wanted]).get("admin.conf", [])]

    assert [found(one) for one in ("default", default)] == [[], []]
    assert found(another, issuer=default) == []
    assert found(another) == [f"role {name} of issuers: issuer_ref"]


def test_works_in_a_namespace(
    bao: openbao.OpenBao, ca: TestCA, live: dict[str, x509.Certificate], apiserver: SignRequest, tmp_path: Path
) -> None:
    """The script of `setup`, login, signing and revoking all work in the namespace; another one is refused."""
    team = bao.in_namespace("team1")
    team.add_ca("pki", ca.certificate_pem, ca.key_pem)
    script = vault_setup.text(VaultSettings(url="", namespace="team1"), live, timedelta(days=365), "node")
    program = openbao.program()
    assert program is not None
    environment = {"PATH": f"{program.parent}:{os.defpath}", "HOME": str(tmp_path)}
    environment |= {"BAO_ADDR": bao.url, "BAO_TOKEN": bao.root_token}
    subprocess.run(["sh"], input=script, text=True, check=True, env=environment, capture_output=True)
    auth, before = approle(team, tmp_path, "node"), team.accessors()
    with vault(bao.url, auth, namespace="team1") as backend:
        verify.check(backend.sign(apiserver), apiserver, expectation(ca.certificate))
        assert backend.issuers() == [ca.certificate]
        assert len(team.accessors() - before) == 1
    assert team.accessors() == before
    with vault(bao.url, auth, namespace="team2") as backend:
        assert "namespace" in refusal(backend, apiserver).hint


def test_takes_a_nested_mount(
    bao: openbao.OpenBao, ca: TestCA, live: dict[str, x509.Certificate], apiserver: SignRequest, tmp_path: Path
) -> None:
    """A mount path may have several parts, and slashes around it."""
    bao.add_ca("team/a/pki", ca.certificate_pem, ca.key_pem)
    bao.add_kubeadm_roles("team/a/pki", live)
    with vault(bao.url, token_file(tmp_path, bao.root_token), mount="/team/a/pki/") as backend:
        verify.check(backend.sign(apiserver), apiserver, expectation(ca.certificate))


def test_names_the_setting_that_is_wrong(pki: openbao.OpenBao, apiserver: SignRequest, tmp_path: Path) -> None:
    """The server says "permission denied" to all of these; the hint tells where to look."""
    auth = approle(pki, tmp_path, "node")
    with vault(pki.url, dataclasses.replace(auth, mount="nowhere")) as backend:
        assert "auth.mount" in refusal(backend, apiserver).hint
    with vault(pki.url, auth, mount="nowhere") as backend:
        assert "policy" in refusal(backend, apiserver).hint
        with pytest.raises(BackendRefusedError) as e:
            backend.issuers()
    assert "`mount`" in e.value.hint


@pytest.mark.parametrize(
    "settings", [{"mount": "nowhere"}, {"role": "no-such-role"}, {"mount": "empty", "mode": "sign-verbatim"}]
)
def test_refuses_what_is_not_there(
    pki: openbao.OpenBao, apiserver: SignRequest, tmp_path: Path, settings: dict[str, str]
) -> None:
    """An unknown mount, an unknown role and an engine without a CA are refusals that say what to look at."""
    with contextlib.suppress(openbao.OpenBaoError):  # it is there from the run before
        pki.write("sys/mounts/empty", type="pki")
    with vault(pki.url, token_file(tmp_path, pki.root_token), **settings) as backend:
        assert refusal(backend, apiserver).hint


def test_a_ca_that_ends_too_soon_is_refused_with_a_hint(
    bao: openbao.OpenBao, live: dict[str, x509.Certificate], apiserver: SignRequest, tmp_path: Path
) -> None:
    """A certificate can't outlive its CA; a shorter one is signed."""
    short = TestCA.make("short", "ecdsa-p256", days=10)
    bao.add_ca("short", short.certificate_pem, short.key_pem)
    bao.add_kubeadm_roles("short", live)
    with vault(bao.url, token_file(tmp_path, bao.root_token), mount="short") as backend:
        assert "renewal.validity" in refusal(backend, apiserver).hint
        backend.sign(dataclasses.replace(apiserver, validity=timedelta(days=9)))


def test_logs_that_a_lifetime_was_cut(
    pki: openbao.OpenBao, apiserver: SignRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A lifetime beyond the role's maximum comes back shorter, with the server's warning in the log."""
    with vault(pki.url, token_file(tmp_path, pki.root_token)) as backend:
        backend.sign(apiserver)
        assert caplog.records == []
        leaf = backend.sign(dataclasses.replace(apiserver, validity=timedelta(days=400))).leaf
    assert leaf.not_valid_after_utc < datetime.now(UTC) + timedelta(days=366)
    assert ["apiserver" in r.message and "maxTTL" in r.message for r in caplog.records] == [True]


def test_check_finds_roles_that_give_wrong_usages(pki: openbao.OpenBao, tmp_path: Path) -> None:
    """`check` reports what a role would make wrong before anything is signed."""
    pki.write("pki/roles/default-flags", allow_any_name=True)
    pki.write("pki/roles/odd", server_flag=False, ext_key_usage=["clientauth", "CodeSigning"], key_usage=["CertSign"])
    roles = {"apiserver": "default-flags", "etcd-server": "default-flags", "admin.conf": "odd", "server": "none"}
    with vault(pki.url, token_file(tmp_path, pki.root_token), roles=roles) as backend:
        found = backend.check([APISERVER, ADMIN, SPECS["etcd-server"], SPECS["scheduler.conf"]])
    both, server = "clientAuth, serverAuth", "serverAuth"
    usages = Violation(subject="key_usage", want="DigitalSignature, KeyEncipherment", got="CertSign")
    assert found == {
        "apiserver": [Violation(subject="EKU", want=server, got=both)],
        "admin.conf": [Violation(subject="EKU", want="clientAuth", got="CodeSigning, clientAuth"), usages],
    }


def test_check_finds_roles_that_drop_names(pki: openbao.OpenBao, tmp_path: Path) -> None:
    """A role that ignores the CSR's names is found for a certificate with SANs; one without needs no SANs."""
    role = pki.read("pki/roles/kubeadm-etcd-server")["data"]
    pki.write("pki/roles/no-names", **{**role, "use_csr_sans": False, "use_csr_common_name": False})
    with vault(pki.url, token_file(tmp_path, pki.root_token), roles={"etcd-server": "no-names"}) as backend:
        found = backend.check([SPECS["etcd-server"], ADMIN])
    keys = ["use_csr_common_name", "use_csr_sans"]
    assert found == {"etcd-server": [Violation(subject=key, want="true", got="false") for key in keys]}


def test_check_finds_missing_roles_and_rights(pki: openbao.OpenBao, tmp_path: Path) -> None:
    """A role that is not there and a path that the policy does not allow are two different findings."""
    pki.add_policy("one", vault_setup.policy("pki", ["none"]))
    with vault(pki.url, token_file(tmp_path, pki.token("one")), roles={"apiserver": "none"}) as backend:
        found = backend.check([APISERVER, ADMIN])
    assert found == {
        "apiserver": [Violation(subject="role", want="none", got="no role of this name")],
        "admin.conf": [Violation(subject="policy", want="update on pki/sign/kubeadm-admin.conf", got="deny")],
    }


def test_check_is_silent_about_what_it_may_not_see(
    pki: openbao.OpenBao, apiserver: SignRequest, tmp_path: Path
) -> None:
    """A token that may sign and do nothing else passes, since nothing is known to be wrong."""
    stanza = vault_setup.policy("pki", ["kubeadm-apiserver"], read_roles=False).split("# The node may end")[0]
    pki.add_policy("bare", stanza)
    with vault(pki.url, token_file(tmp_path, pki.token("bare", no_default_policy=True))) as backend:
        assert backend.check([APISERVER]) == {}
        backend.sign(apiserver)


def test_check_refuses_a_bad_token(pki: openbao.OpenBao, tmp_path: Path) -> None:
    """A preflight with a token that the server does not know fails, where signing would."""
    with vault(pki.url, token_file(tmp_path, "hvs.unknown")) as backend, pytest.raises(BackendRefusedError):
        backend.check([APISERVER])


# ------------------------------------------------------------------------------------------ trouble


def test_a_sealed_server_is_unavailable(
    tls_bao: openbao.OpenBao, tls: Tls, apiserver: SignRequest, tmp_path: Path
) -> None:
    """Sealed means later; unsealed, the same backend signs."""
    with vault(tls_bao.url, token_file(tmp_path, tls_bao.root_token), ca_file=tls.trust) as backend:
        tls_bao.seal()
        try:
            error = unavailability(backend, apiserver)
            with pytest.raises(BackendUnavailableError):
                backend.issuers()
        finally:
            tls_bao.unseal()
        assert error.hint
        backend.sign(apiserver)


def test_a_refusal_whose_reason_is_lost_is_still_one(apiserver: SignRequest, tmp_path: Path) -> None:
    """Where an error's body breaks off, the status decides."""
    headers = {**JSON, "Content-Length": "1000", "Connection": "close"}
    with Double((SIGN, 400, headers, b"{")) as double, vault(double.url, token_file(tmp_path, "t")) as backend:
        refusal(backend, apiserver)


def test_a_rate_limit_says_when_to_come_back(pki: openbao.OpenBao, apiserver: SignRequest, tmp_path: Path) -> None:
    """Status 429 is unavailable, with the time to wait that the server names."""
    pki.write("sys/quotas/config", enable_rate_limit_response_headers=True)
    pki.write("sys/quotas/rate-limit/test", path="pki/sign/kubeadm-apiserver", rate=1, interval="10m")
    try:
        with vault(pki.url, token_file(tmp_path, pki.root_token)) as backend:
            backend.sign(apiserver)
            wait = unavailability(backend, apiserver).retry_after_seconds
    finally:
        pki.request("DELETE", "sys/quotas/rate-limit/test")
    assert wait is not None
    assert 0 < wait <= 600


def test_an_untrusted_server_is_refused(
    tls_bao: openbao.OpenBao, tls: Tls, apiserver: SignRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's certificate has to be from ca_file, or without it from the system's CAs."""
    auth = token_file(tmp_path, tls_bao.root_token)
    (tmp_path / "other.crt").write_bytes(TestCA.make(algorithm="ecdsa-p256").certificate_pem)
    for settings in ({}, {"ca_file": tmp_path / "other.crt"}):
        with vault(tls_bao.url, auth, **settings) as backend:
            assert "ca_file" in refusal(backend, apiserver).hint
    monkeypatch.setenv("SSL_CERT_FILE", str(tls.trust))  # decides which CAs other programs trust
    assert len(ssl.create_default_context().get_ca_certs()) == 1
    with vault(tls_bao.url, auth) as backend:
        assert "ca_file" in refusal(backend, apiserver).hint
    built_in = ssl.get_default_verify_paths()._replace(openssl_cafile=str(tls.trust))
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: built_in)
    with vault(tls_bao.url, auth) as backend:
        backend.sign(apiserver)


def test_tls_and_plain_http_mixed_up_are_refused(
    tls_bao: openbao.OpenBao, pki: openbao.OpenBao, tls: Tls, apiserver: SignRequest, tmp_path: Path
) -> None:
    """A wrong scheme in the URL is no reason to try again, and the error names it where the server's answer shows it."""
    auth = token_file(tmp_path, "t")
    with vault(tls_bao.url.replace("https:", "http:"), auth) as backend, pytest.raises(BackendError):
        backend.sign(apiserver)  # the server may reset the connection before its answer is read
    reported = b"Client sent an HTTP request to an HTTPS server.\n"
    with Double((SIGN, 400, {}, reported)) as double, vault(double.url, auth) as backend:
        assert "https://" in refusal(backend, apiserver).hint
    with vault(pki.url.replace("http:", "https:"), auth, ca_file=tls.trust) as backend:
        refusal(backend, apiserver)


def test_the_environment_has_no_say(
    pki: openbao.OpenBao, apiserver: SignRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proxies, another server, another token and client certificates in the environment are not used."""
    dead = f"http://127.0.0.1:{free_port()}"
    (tmp_path / ".vault-token").write_text("hvs.other")
    (tmp_path / ".netrc").write_text("default login a password b\n")
    names = ["VAULT_ADDR", "BAO_ADDR", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"]
    for name in names:
        monkeypatch.setenv(name, dead)
    others = {"HOME": tmp_path, "VAULT_TOKEN": "hvs.other", "VAULT_NAMESPACE": "x", "REQUESTS_CA_BUNDLE": "/none"}
    for name, value in others.items():
        monkeypatch.setenv(name, str(value))
    with vault(pki.url, token_file(tmp_path, pki.token("node"))) as backend:
        backend.sign(apiserver)


@pytest.mark.parametrize(
    ("status", "expected"), [(307, BackendUnavailableError), (301, BackendRefusedError), (308, BackendRefusedError)]
)
def test_follows_no_redirect(apiserver: SignRequest, tmp_path: Path, status: int, expected: type[BackendError]) -> None:
    """A redirect (307: a standby whose leader is gone) is reported, and the token does not go where it points."""
    with Double() as other, Double() as double:
        location = f"{other.url.replace('//', '//user:planted@')}/v1/pki/sign/planted"
        double.script.append((SIGN, status, {"Location": location}, b""))
        with vault(double.url, token_file(tmp_path, "t")) as backend, pytest.raises(expected) as e:
            backend.sign(apiserver)
    assert other.url in str(e.value)
    assert "planted" not in str(e.value)
    assert other.tokens == []


@pytest.mark.parametrize(
    ("status", "texts", "expected"),
    [
        (400, ["common name x not allowed by this role"], BackendRefusedError),
        (404, ["no handler for route"], BackendRefusedError),
        (405, ["1 error occurred: unsupported operation"], BackendRefusedError),
        (413, ["http: request body too large"], BackendRefusedError),
        (408, [], BackendUnavailableError),
        (412, ["required index state not present"], BackendUnavailableError),
        (429, [], BackendUnavailableError),
        (500, ["internal error"], BackendUnavailableError),
        (500, ["could not fetch the CA certificate (was one set?)"], BackendRefusedError),
        (502, [], BackendUnavailableError),
        (503, ["Vault is sealed"], BackendUnavailableError),
        (504, [], BackendUnavailableError),
    ],
)
def test_sorts_errors_by_whether_trying_again_helps(
    apiserver: SignRequest, tmp_path: Path, status: int, texts: list[str], expected: type[BackendError]
) -> None:
    """Each status is refused or unavailable; 500 is sorted by the server's words."""
    with Double((SIGN, status, JSON, errors(*texts))) as double:
        with vault(double.url, token_file(tmp_path, "t")) as backend, pytest.raises(expected):
            backend.sign(apiserver)
        assert double.tokens == ["t"]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0),
        ("soon", None),
        ("-1", None),
        ("9" * 400, None),
        (f"Mon, 01 Jan {'9' * 20} 00:00:00 GMT", None),
    ],
)
def test_understands_retry_after(apiserver: SignRequest, tmp_path: Path, value: str, seconds: float | None) -> None:
    """Retry-After counts where it is a sensible number of seconds, or a date."""
    with (
        Double((SIGN, 503, {**JSON, "Retry-After": value}, errors())) as double,
        vault(double.url, token_file(tmp_path, "t")) as backend,
    ):
        assert unavailability(backend, apiserver).retry_after_seconds == seconds


@pytest.mark.parametrize(
    "content",
    [
        errors("your token hvs.planted is bad", "\x1b[31m" + "a" * 100_000 + "\nINFO forged"),
        b"<html>hvs.planted</html>",
        json.dumps({"data": {"token": "hvs.planted"}}).encode(),
        json.dumps(["hvs.planted"]).encode(),
    ],
)
def test_quotes_the_server_with_care(
    apiserver: SignRequest, tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """A server or proxy that echoes the token does not get it into our texts, nor a line of its own, nor a flood."""
    caplog.set_level(logging.DEBUG)
    with (
        Double((SIGN, 400, JSON, content)) as double,
        vault(double.url, token_file(tmp_path, "hvs.planted")) as backend,
    ):
        error = refusal(backend, apiserver)
    assert_not_shown("hvs.planted", error, caplog)
    assert str(error).isprintable()
    assert len(str(error)) < 1000


def answer(ca: TestCA, *, leaves: int = 1, **changes: object) -> bytes:
    """The body of a good answer, with changes."""
    leaf = ca.leaf(APISERVER).public_bytes(serialization.Encoding.PEM).decode()
    data: dict[str, object] = {"certificate": leaf * leaves, "issuing_ca": ca.certificate_pem.decode(), **changes}
    return json.dumps({"data": data, "warnings": changes.get("warnings")}).encode()


def test_takes_the_issuer_where_there_is_no_chain(ca: TestCA, apiserver: SignRequest, tmp_path: Path) -> None:
    """Vault leaves ca_chain out for a root; the issuer is in the answer all the same."""
    with Double((SIGN, 200, JSON, answer(ca))) as double, vault(double.url, token_file(tmp_path, "t")) as backend:
        assert backend.sign(apiserver).intermediates == (ca.certificate,)


def test_a_servers_warnings_are_no_flood(
    ca: TestCA, apiserver: SignRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An answer has room for many thousands of them; the first few are in the log."""
    content = answer(ca, warnings=["a long life"] * 20_000)
    with Double((SIGN, 200, JSON, content)) as double, vault(double.url, token_file(tmp_path, "t")) as backend:
        backend.sign(apiserver)
    assert [record.getMessage() for record in caplog.records] == ["apiserver: a long life"] * 5


@pytest.mark.parametrize(
    "content",
    [
        b"<html>Welcome</html>",
        b"",
        b"[]",
        b'{"data": null}',
        lambda ca: answer(ca, leaves=2),
        lambda ca: answer(ca, leaves=0),
        lambda ca: answer(ca, certificate=7),
        lambda ca: answer(ca, certificate="-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"),
        lambda ca: answer(ca, ca_chain=["nothing"]),
        lambda ca: answer(ca, filling="x" * (1 << 20)),
    ],
)
def test_refuses_an_answer_that_is_no_certificate(
    ca: TestCA, apiserver: SignRequest, tmp_path: Path, content: bytes | Callable[[TestCA], bytes]
) -> None:
    """Status 200 alone is no success: exactly one certificate is, with a readable chain, in an answer of sane size."""
    body = content if isinstance(content, bytes) else content(ca)
    with Double((SIGN, 200, JSON, body)) as double, vault(double.url, token_file(tmp_path, "t")) as backend:
        refusal(backend, apiserver)


def test_a_login_without_a_token_is_refused(apiserver: SignRequest, tmp_path: Path) -> None:
    """A login that asks for a second factor is refused, because no person is there to type one."""
    secret = file_secret(tmp_path / "secret", "s")
    login = json.dumps({"auth": {"client_token": "", "mfa_requirement": {"mfa_request_id": "1"}}}).encode()
    with (
        Double(("POST /v1/auth/userpass/login/a%2Fb", 200, JSON, login)) as double,
        vault(double.url, VaultAuth(method="userpass", username="a/b", password=secret)) as backend,
    ):
        refusal(backend, apiserver)


# ----------------------------------------------------------------------------------------- settings


SECRET = Secret("file", "/secret")
TOKEN = VaultAuth(token=SECRET)


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({}, []),
        ({"url": "https://[2001:db8::1]:8200/prefix"}, []),
        ({"url": "http://127.0.0.2:8200"}, []),
        ({"url": "http://[::1]"}, []),
        ({"url": "http://localhost:8200"}, []),
        ({"url": "http://vault.example"}, ["url"]),
        ({"url": "http://vault.example", "plain_http": True}, []),
        ({"url": "http://127.0.0.1.example"}, ["url"]),
        ({"url": "vault.example:8200"}, ["url"]),
        ({"url": "https://vault.example:port"}, ["url"]),
        ({"url": "https://user:pw@vault.example"}, ["url"]),
        ({"url": "https://vault.example/?a=b"}, ["url"]),
        ({"mount": "/"}, ["mount"]),
        ({"client_cert": Path("/c"), "client_key": Path("/k")}, []),
        ({"client_cert": Path("/c")}, ["client_key"]),
        ({"client_key": Path("/k")}, ["client_cert"]),
        ({"role": "{nod}"}, ["role"]),
        ({"roles": {"apiserver": "a", "client": "b"}}, []),
        ({"roles": {"api-server": "a"}}, ["roles.api-server"]),
        ({"auth": VaultAuth()}, ["auth.token_file"]),
        ({"auth": VaultAuth(token=SECRET, mount="x")}, ["auth.mount"]),
        ({"auth": VaultAuth(method="approle", role_id=SECRET, secret_id=SECRET, wrapped=True, mount="x")}, []),
        ({"auth": VaultAuth(method="approle", role_id=SECRET)}, ["auth.secret_id_file"]),
        ({"auth": VaultAuth(method="approle", token=Secret("env", "T"))},
         ["auth.token_env", "auth.role_id_file", "auth.secret_id_file"]),
        ({"auth": VaultAuth(method="userpass", username="", password=SECRET)}, ["auth.username"]),
        ({"auth": VaultAuth(method="jwt", role="r", jwt=SECRET, wrapped=True)}, ["auth.wrapped"]),
        ({"auth": VaultAuth(method="kubernetes", jwt=SECRET)}, ["auth.role"]),
        ({"auth": VaultAuth(method="cert")}, ["client_cert"]),
        ({"auth": VaultAuth(method="cert", role="r"), "client_cert": Path("/c"), "client_key": Path("/k")}, []),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_named(settings: dict[str, object], keys: list[str]) -> None:
    """Each key that is wrong is named, and what works is left alone."""
    chosen = VaultSettings(**{"url": "https://vault.example:8200", "auth": TOKEN, **settings})  # type: ignore[arg-type]
    assert [problem.key for problem in chosen.problems()] == keys


def test_no_problem_quotes_a_url_with_a_password() -> None:
    """A password that someone wrote into the URL is not repeated."""
    (problem,) = VaultSettings(url="https://user:planted@vault.example", auth=TOKEN).problems()
    assert "planted" not in str(problem)


def test_tls_files_are_tried_though_the_url_is_http(tls: Tls, tmp_path: Path) -> None:
    """They are not shown there, but the URL may be `https:` tomorrow."""

    def keys(**files: Path | None) -> list[str]:
        settings = VaultSettings(url="http://127.0.0.1:8200", auth=TOKEN, **files)  # type: ignore[arg-type]
        try:
            VaultBackend.from_settings(settings).close()
        except SettingsError as e:
            return [problem.key for problem in e.problems]
        return []

    cert, good = tls.client
    assert keys(ca_file=tls.trust, client_cert=cert, client_key=good) == []
    assert keys(ca_file=tmp_path / "none", client_cert=cert, client_key=tls.server[1]) == ["ca_file", "client_cert"]


# --------------------------------------------------------------------------- roles, policy, commands


def hostile(
    live: x509.Certificate, name: str, *, cn: str | None = None, o: Sequence[str] | None = None, dns: Sequence[str] = ()
) -> SignRequest:
    """A CSR as for the live certificate, with some names changed; without SANs unless they are given."""
    own = live.subject.get_attributes_for_oid
    common_name = cn or str(own(NameOID.COMMON_NAME)[0].value)
    organizations = [str(a.value) for a in own(NameOID.ORGANIZATION_NAME)] if o is None else o
    attributes = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, value) for value in organizations]
    attributes.append(x509.NameAttribute(NameOID.COMMON_NAME, common_name))
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(attributes))
    if dns:
        names = x509.SubjectAlternativeName([x509.DNSName(name) for name in dns])
        builder = builder.add_extension(names, critical=False)
    pem = builder.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    return SignRequest(spec=SPECS[name], csr_pem=pem.public_bytes(serialization.Encoding.PEM), validity=DAYS_30)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("admin.conf", {"cn": "kubernetes-super-admin"}),
        ("admin.conf", {"cn": "anyone@kubernetes-admin"}),
        ("admin.conf", {"cn": "sub.kubernetes-admin"}),
        ("scheduler.conf", {"cn": "system:kube-controller-manager"}),
        ("kubelet.conf", {"cn": "system:node:cp-2"}),
        ("etcd-server", {"dns": ["cp-2"]}),
        ("apiserver", {"dns": ["*.example.com"]}),
        ("apiserver", {"dns": ["x.wild.example.com"]}),
    ],
)
def test_a_role_refuses_other_names(
    pki: openbao.OpenBao, live: dict[str, x509.Certificate], tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    """Through the printed roles no name can be had but those of the certificate that the role was made from."""
    with vault(pki.url, token_file(tmp_path, pki.token("node"))) as backend:
        backend.sign(hostile(live[name], name))
        refusal(backend, hostile(live[name], name, **changes))


def test_a_role_replaces_another_o(
    pki: openbao.OpenBao, ca: TestCA, live: dict[str, x509.Certificate], tmp_path: Path
) -> None:
    """A request for system:masters gets the role's own O, and verification finds the difference."""
    request = hostile(live["admin.conf"], "admin.conf", o=["system:masters"])
    with vault(pki.url, token_file(tmp_path, pki.token("node"))) as backend:
        issued = backend.sign(request)
    (o,) = issued.leaf.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    assert o.value == "kubeadm:cluster-admins"
    with pytest.raises(VerificationError):
        verify.check(issued, request, expectation(ca.certificate))


def test_a_client_role_gives_no_san(pki: openbao.OpenBao, live: dict[str, x509.Certificate], tmp_path: Path) -> None:
    """A SAN that is smuggled into the CSR of a certificate without one does not come out."""
    with vault(pki.url, token_file(tmp_path, pki.token("node"))) as backend:
        leaf = backend.sign(hostile(live["admin.conf"], "admin.conf", dns=["kubernetes-admin"])).leaf
    with pytest.raises(x509.ExtensionNotFound):
        leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)


def test_a_role_refuses_other_addresses(
    pki: openbao.OpenBao, ca: TestCA, live: dict[str, x509.Certificate], tmp_path: Path
) -> None:
    """Addresses are bound as names are, and IPv6 ones too: the next address is refused."""
    request = sign_request(live["etcd-server"], SPECS["etcd-server"], "ecdsa-p256", DAYS_30)
    with vault(pki.url, token_file(tmp_path, pki.token("node"))) as backend:
        for address in ("192.0.2.11", "::2"):
            names = x509.SubjectAlternativeName([x509.IPAddress(ip_address(address))])
            builder = x509.CertificateSigningRequestBuilder().subject_name(request.csr.subject)
            other = builder.add_extension(names, critical=False).sign(csr.generate_key("ecdsa-p256"), hashes.SHA256())
            pem = other.public_bytes(serialization.Encoding.PEM)
            refusal(backend, dataclasses.replace(request, csr_pem=pem))
        verify.check(backend.sign(request), request, expectation(ca.certificate))


@pytest.mark.parametrize(
    ("path", "changes"),
    [
        ("pki/sign/kubeadm-admin.conf", {"not_after": "2099-01-01T00:00:00Z", "ttl": None}),
        ("pki/sign/kubeadm-admin.conf", {"exclude_cn_from_sans": None}),
        ("pki/sign/kubeadm-admin.conf", {"exclude_cn_from_sans": False}),
        ("pki/sign/kubeadm-admin.conf", {"issuer_ref": "default"}),
        ("pki/issuer/default/sign/kubeadm-admin.conf", {}),
        ("pki/sign-verbatim", {}),
        ("pki/sign-verbatim/kubeadm-admin.conf", {}),
        ("pki/issue/kubeadm-admin.conf", {"csr": None}),
        ("pki/root/sign-intermediate", {}),
    ],
)
def test_the_policy_allows_nothing_else(
    pki: openbao.OpenBao, live: dict[str, x509.Certificate], path: str, changes: dict[str, object]
) -> None:
    """With the printed policy, other paths and other parameters are forbidden; what the backend sends is not."""
    token = pki.token("node", no_default_policy=True)
    body = {"csr": hostile(live["admin.conf"], "admin.conf").csr_pem.decode(), "ttl": "60s"}
    good: dict[str, object] = {**body, "exclude_cn_from_sans": True}
    assert pki.request("POST", "pki/sign/kubeadm-admin.conf", good, token=token).ok
    changed = {key: value for key, value in {**good, **changes}.items() if value is not None}
    assert pki.request("POST", path, changed, token=token).status_code == 403


def test_the_printed_script_makes_all_that_signing_needs(
    bao: openbao.OpenBao, ca: TestCA, live: dict[str, x509.Certificate], tmp_path: Path
) -> None:
    """An administrator who runs the script twice, with the real command line program, has roles and policy that work."""
    bao.add_ca("scripted", ca.certificate_pem, ca.key_pem)
    some = {name: live[name] for name in ("apiserver", "admin.conf", "scheduler.conf")}
    roles = vault_setup.roles(some, timedelta(days=90))
    policy = vault_setup.policy("scripted", roles)
    text = vault_setup.commands(
        VaultSettings(url="", mount="scripted"), roles, policy_name="a node's", policy_text=policy
    )
    program = openbao.program()
    assert program is not None
    environment = {"PATH": f"{program.parent}:{os.defpath}", "HOME": str(tmp_path)}
    environment |= {"BAO_ADDR": bao.url, "BAO_TOKEN": bao.root_token}
    for _ in range(2):
        done = subprocess.run(["sh"], input=text, text=True, check=True, env=environment, capture_output=True)
        roles_written = [f"role scripted/roles/{role}" for role in roles]
        assert done.stdout.splitlines() == [*roles_written, "policy a node's, for the mount scripted", "4 written"]
    with vault(bao.url, token_file(tmp_path, bao.token("a node's")), mount="scripted") as backend:
        assert backend.check([SPECS[name] for name in some]) == {}
        for name, certificate in some.items():
            request = sign_request(certificate, SPECS[name], "ecdsa-p256", timedelta(days=90))
            verify.check(backend.sign(request), request, expectation(ca.certificate))


@pytest.mark.first_use("14")
def test_the_printed_script_writes_all_though_its_output_is_closed(
    live: dict[str, x509.Certificate], tmp_path: Path
) -> None:
    """`sh roles.sh | head -1`, whose pipe is closed after the first line: each role and the policy all the same."""
    (tmp_path / "bao").write_text(f'#!/bin/sh\ncat >/dev/null; echo "$*" >>{tmp_path}/calls; sleep 0.05\n')
    (tmp_path / "bao").chmod(0o755)
    text = vault_setup.commands(
        VaultSettings(url="", mount="pki"), vault_setup.roles(live, DAYS_30), policy_name="node", policy_text=""
    )
    (tmp_path / "roles.sh").write_text(text)
    environment = {"PATH": f"{tmp_path}:{os.defpath}"}
    words = ["sh", "-c", f"sh {tmp_path}/roles.sh | head -1"]
    done = subprocess.run(words, text=True, check=True, env=environment, capture_output=True)
    assert (len(done.stdout.splitlines()), done.stderr) == (1, "")
    assert len((tmp_path / "calls").read_text().splitlines()) == len(live) + 1


def test_the_printed_script_says_what_it_lacks(live: dict[str, x509.Certificate], tmp_path: Path) -> None:
    """Without a command line program the script fails and writes nothing."""
    roles = vault_setup.roles(live, DAYS_30)
    text = vault_setup.commands(VaultSettings(url="", mount="pki"), roles, policy_name="node", policy_text="")
    run = subprocess.run(
        ["/bin/sh"], input=text, text=True, check=False, env={"PATH": str(tmp_path)}, capture_output=True
    )
    assert run.returncode == 1
    assert run.stderr.startswith("error: ")


def odd_certificate(
    ca: TestCA, subject: Sequence[tuple[x509.ObjectIdentifier, str]], *names: x509.GeneralName
) -> x509.Certificate:
    """A live certificate with a subject and SANs that kubeadm would not give."""
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(oid, value) for oid, value in subject]))
        .issuer_name(ca.certificate.subject)
        .public_key(csr.generate_key("ecdsa-p256").public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(ca.key, hashes.SHA256())


CN = (NameOID.COMMON_NAME, "kube-apiserver")


def test_a_role_keeps_what_a_company_adds(bao: openbao.OpenBao, ca: TestCA, tmp_path: Path) -> None:
    """Several O values, an OU, a country and a URI in the live certificate come out of its role again."""
    subject = [
        (NameOID.COUNTRY_NAME, "DE"),
        (NameOID.ORGANIZATION_NAME, "one"),
        (NameOID.ORGANIZATION_NAME, "two, with a comma"),
        (NameOID.ORGANIZATIONAL_UNIT_NAME, "pki"),
        CN,
    ]
    names = [x509.DNSName("Mixed.Example.com"), x509.UniformResourceIdentifier("spiffe://example/a")]
    odd = odd_certificate(ca, subject, *names)
    bao.add_ca("odd", ca.certificate_pem, ca.key_pem)
    bao.add_kubeadm_roles("odd", {"apiserver": odd})
    request = sign_request(odd, APISERVER, "ecdsa-p256", DAYS_30)
    with vault(bao.url, token_file(tmp_path, bao.root_token), mount="odd") as backend:
        verify.check(backend.sign(request), request, expectation(ca.certificate))


@pytest.mark.parametrize(
    ("subject", "names"),
    [
        ([CN, (NameOID.DOMAIN_COMPONENT, "example")], []),
        ([CN, (NameOID.COMMON_NAME, "second")], []),
        ([(NameOID.ORGANIZATION_NAME, "no CN")], []),
        ([CN], [x509.RFC822Name("a@kube-apiserver")]),
    ],
)
def test_no_role_for_what_a_role_cannot_give(
    ca: TestCA, subject: list[tuple[x509.ObjectIdentifier, str]], names: list[x509.GeneralName]
) -> None:
    """A certificate that no role gives is an error, rather than a role for another one."""
    with pytest.raises(vault_setup.NoRoleError):
        vault_setup.roles({"apiserver": odd_certificate(ca, subject, *names)}, DAYS_30)
    assert vault_setup.roles({"apiserver": odd_certificate(ca, [CN])}, DAYS_30)


def test_two_certificates_share_a_role_only_if_they_are_alike(live: dict[str, x509.Certificate]) -> None:
    """etcd's two certificates may have one role; two identities may not."""
    chosen = Selector("kubeadm-{name}", {"peer": "etcd-member", "client": "client"})
    etcd = {name: live[name] for name in ("etcd-server", "etcd-peer")}
    assert list(vault_setup.roles(etcd, DAYS_30, chosen)) == ["etcd-member"]
    clients = {name: live[name] for name in ("admin.conf", "scheduler.conf")}
    with pytest.raises(vault_setup.NoRoleError):
        vault_setup.roles(clients, DAYS_30, chosen)


@pytest.mark.parametrize(("validity", "text"), [(timedelta(days=365), "8760h"), (timedelta(seconds=90), "90s")])
def test_a_role_gives_no_longer_than_is_asked(
    live: dict[str, x509.Certificate], validity: timedelta, text: str
) -> None:
    """A role's lifetime and its maximum are the settings' validity."""
    (role,) = vault_setup.roles({"apiserver": live["apiserver"]}, validity).values()
    assert (role["ttl"], role["max_ttl"]) == (text, text)


# ------------------------------------------------------------------------------- config/vault, README


CONFIG = Path(__file__).parents[2] / "config/vault"
MOUNTS = {"ca": "pki-kubernetes", "etcd-ca": "pki-etcd", "front-proxy-ca": "pki-front-proxy"}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """The node that the example scripts are for."""
    return handmade_pki(tmp_path_factory.mktemp("node"), extra_sans=())


def certificates_below(node: Pki, authority: str) -> dict[str, x509.Certificate]:
    items = inventory.read(node.pki_dir, node.kubeconfig_dir).items
    return {i.spec.name: i.certificates[0] for i in items if i.spec.authority.name == authority}


@pytest.mark.parametrize("authority", AUTHORITIES)
def test_the_example_scripts_are_what_is_printed(node: Pki, authority: str) -> None:
    """The scripts in config/vault are those of the example node, to the byte."""
    mount = MOUNTS[authority]
    engine, certificates = VaultSettings(url="", mount=mount), certificates_below(node, authority)
    printed = vault_setup.text(engine, certificates, timedelta(days=365), f"ca-bridge-cp-1_{authority}", "cp-1")
    assert (CONFIG / f"{mount}.sh").read_text() == printed


def test_the_administrators_commands_work(node: Pki, tmp_path: Path) -> None:
    """The commands of config/vault/README.md make a server that renews all certificates of the node."""
    program = openbao.program()
    assert program is not None
    blocks = re.findall(r"```sh\n(.*?)```", (CONFIG / "README.md").read_text(), re.DOTALL)
    shutil.copytree(node.ca_dir, tmp_path, dirs_exist_ok=True)
    shutil.copytree(CONFIG, tmp_path, dirs_exist_ok=True)
    with openbao.dev_server() as bao:
        environment = {"PATH": f"{program.parent}:{os.defpath}", "HOME": str(tmp_path)}
        environment |= {"BAO_ADDR": bao.url, "BAO_TOKEN": bao.root_token}
        subprocess.run(
            ["sh", "-eu"], input="\n".join(blocks), text=True, check=True,
            cwd=tmp_path, env=environment, capture_output=True,
        )  # fmt: skip
        role_id, secret_id = (Secret("file", str(tmp_path / name)) for name in ("role-id", "secret-id"))
        auth = VaultAuth(method="approle", role_id=role_id, secret_id=secret_id)
        for authority, mount in MOUNTS.items():
            anchor = x509.load_pem_x509_certificate(node.ca_pem(authority)[0])
            with vault(bao.url, auth, mount=mount, node="cp-1") as backend:
                for name, certificate in certificates_below(node, authority).items():
                    assert backend.check([SPECS[name]]) == {}
                    request = sign_request(certificate, SPECS[name], "ecdsa-p256", timedelta(days=365))
                    verify.check(backend.sign(request), request, expectation(anchor))


# ------------------------------------------------------------------------- roles of several nodes


def test_two_nodes_have_roles_of_their_own(node: Pki) -> None:
    """One node's script changes nothing of another node's; a role that all nodes have alike is one role."""
    live = certificates_below(node, "ca")
    first, second = (
        vault_setup.roles(live, DAYS_30, role_selector(None, {}, name)).keys() for name in ("cp-1", "cp-2")
    )
    assert first - second == {"kubeadm-cp-1-apiserver", "kubeadm-cp-1-kubelet.conf"}
    assert second - first == {"kubeadm-cp-2-apiserver", "kubeadm-cp-2-kubelet.conf"}
    assert "kubeadm-admin.conf" in first & second


def test_a_node_uses_the_roles_of_its_own_names_alone(
    pki: openbao.OpenBao, apiserver: SignRequest, tmp_path: Path
) -> None:
    """Without `role` in the settings it asks for the role with its name; another pattern has to be set."""
    auth = approle(pki, tmp_path, "node")
    with vault(pki.url, auth, node="cp-1") as backend:
        assert backend.check([apiserver.spec])["apiserver"][0].want == "update on pki/sign/kubeadm-cp-1-apiserver"
    with vault(pki.url, auth, node="cp-1", role="kubeadm-{name}") as backend:
        assert backend.check([apiserver.spec]) == {}


# ------------------------------------------------------------------------- revocation


def test_revokes_what_its_mount_signed(pki: openbao.OpenBao, apiserver: SignRequest, tmp_path: Path) -> None:
    """Once or twice is the same; the server then tells, and tells nothing of a certificate that it does not know."""
    with vault(pki.url, token_file(tmp_path, pki.root_token)) as backend:
        old, new = backend.sign(apiserver).leaf, backend.sign(apiserver).leaf
        assert not backend.is_revoked(old)
        backend.revoke(old)
        backend.revoke(old)
        assert (backend.is_revoked(old), backend.is_revoked(new)) == (True, False)
        foreign = TestCA.make("foreign").leaf(apiserver.spec)
        assert not backend.is_revoked(foreign)
        with pytest.raises(BackendRefusedError, match="unable to verify signature"):
            backend.revoke(foreign)


def test_revokes_nothing_without_the_right(pki: openbao.OpenBao, apiserver: SignRequest, tmp_path: Path) -> None:
    """The policy that `setup vault` prints gives no such right by itself."""
    with vault(pki.url, approle(pki, tmp_path, "node")) as backend:
        leaf = backend.sign(apiserver).leaf
        with pytest.raises(BackendRefusedError, match="permission denied"):
            backend.revoke(leaf)
        assert not backend.is_revoked(leaf)


def test_lists_what_is_revoked(
    pki: openbao.OpenBao, ca: TestCA, apiserver: SignRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the policy that `setup vault` prints; without its right to list, or with too many, each is looked up."""
    with vault(pki.url, token_file(tmp_path, pki.root_token)) as backend:
        old, new = backend.sign(apiserver).leaf, backend.sign(apiserver).leaf
        backend.revoke(old)
    with vault(pki.url, approle(pki, tmp_path, "node")) as backend:
        listed = backend.revoked()
        assert listed is not None
        assert (old.serial_number in listed, new.serial_number in listed) == (True, False)
        monkeypatch.setattr("backends.vault._MOST_LISTED", len(listed) - 1)
        assert backend.revoked() is None
    with vault(pki.url, token_file(tmp_path, pki.token("default"))) as backend:
        assert backend.revoked() is None
        assert backend.is_revoked(old)
    pki.add_ca("nothing-revoked", ca.certificate_pem, ca.key_pem)
    with vault(pki.url, token_file(tmp_path, pki.root_token), mount="nothing-revoked") as backend:
        assert backend.revoked() == frozenset()


# ------------------------------------------------------------------------- one login for three authorities


@pytest.fixture
def bridge(bao: openbao.OpenBao, tmp_path: Path) -> Bridge:
    """A node's program; its three CAs are engines of their own, and one table of the settings says how to get there."""
    bridge = Bridge(pki=handmade_pki(tmp_path / "node", external=True), directory=tmp_path / "bridge")
    name = tmp_path.name
    for authority in AUTHORITIES:
        mount = f"{authority}-{name}"
        bao.add_ca(mount, *bridge.pki.ca_pem(authority))
        bao.add_policy(
            mount, vault_setup.policy(mount, bao.add_kubeadm_roles(mount, certificates_below(bridge.pki, authority)))
        )
        bridge.add(f"authority.{authority}", {"backend": "corp", "mount": mount, "role": "kubeadm-{name}"})
    bridge.add("backend.corp", {"type": "vault", "url": bao.url, "timeout": "2m", "retry_for": "2s"})
    return bridge


def add_login(bridge: Bridge, bao: openbao.OpenBao, *, wrapped: bool, secret_id_num_uses: int = 0) -> None:
    """A secret id in the node's settings."""
    role = bridge.directory.parent.name
    role_id, secret_id = bao.add_approle(
        role, *(f"{authority}-{role}" for authority in AUTHORITIES), secret_id_num_uses=secret_id_num_uses
    )
    secret = bao.wrapped(f"auth/approle/role/{role}/secret-id") if wrapped else secret_id
    auth: dict[str, object] = {"method": "approle", "wrapped": wrapped, "role_id_file": bridge.secret("role", role_id)}
    bridge.add("backend.corp.auth", auth | {"secret_id_file": bridge.secret("secret", secret)})


@pytest.mark.parametrize(("wrapped", "uses"), [(True, 0), (False, 1)], ids=["wrapped", "good for one login"])
def test_three_authorities_share_a_login(bao: openbao.OpenBao, bridge: Bridge, *, wrapped: bool, uses: int) -> None:
    """One single-use login is enough for a run, each CA signs its own, and the token is revoked at the end."""
    add_login(bridge, bao, wrapped=wrapped, secret_id_num_uses=uses)
    before, accessors = live_certificates(bridge.pki), bao.accessors()
    run = bridge.run("renew", "all")
    assert run.returncode == 0, run.stderr
    after = live_certificates(bridge.pki)
    assert {name for name in after if after[name] != before[name]} == set(after)
    assert bao.accessors() <= accessors
    assert bridge.run("renew", "all").returncode == 5  # it was used


def test_doctor_leaves_a_wrapping_token_unopened(bao: openbao.OpenBao, bridge: Bridge) -> None:
    """It says what it did not look at, and the renewal after it works; a secret id that is not wrapped is tried."""
    add_login(bridge, bao, wrapped=True)
    for _ in range(2):
        run = bridge.run("doctor")
        assert run.returncode == 0, run.stdout
        assert run.stdout.count("that would use up the wrapping token in") == 1
    assert bridge.run("renew", "all").returncode == 0
    del bridge.tables[-1]
    add_login(bridge, bao, wrapped=False, secret_id_num_uses=1)
    run = bridge.run("doctor")
    assert run.returncode == 0, run.stdout
    assert "use up" not in run.stdout


# ------------------------------------------------------------------------------------- roles in the documents

DOCS = Path(__file__).parents[2] / "docs"


def documented_roles(page: str) -> list[tuple[str, dict[str, str]]]:
    """The roles that a page's `bao write` commands make, in their order: name and fields, each once, or `bao` refuses it."""
    text = (DOCS / page).read_text().replace("\\\n", " ")
    [common] = re.findall(r"^common='([^']*)'", text, re.MULTILINE)
    found = []
    for line in re.findall(r"^bao write (\S+/roles/\S+ .*)$", text, re.MULTILINE):
        path, *words = shlex.split(line.replace("$common", " ".join(common.split())))
        fields = dict(word.split("=", 1) for word in words)
        assert len(fields) == len(words), line
        found.append((path.rpartition("/")[2], fields))
    return found


def csr_for(cn: str, *sans: x509.GeneralName) -> str:
    key = ec.generate_private_key(ec.SECP256R1())
    made = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, cn)])
    )
    if sans:
        made = made.add_extension(x509.SubjectAlternativeName(sans), critical=False)
    return made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


@pytest.mark.attack("G16")
def test_the_gateways_roles_in_the_documents(pki: openbao.OpenBao) -> None:
    """The general ones give each node's names and no CN besides; those with names give nothing but these nodes'."""
    roles = documented_roles("gateway.md")
    assert [name for name, _ in roles] == ["kubeadm-kubelet-client", "kubeadm-kubelet-serving"] * 2

    def gives(number: int, cn: str, *sans: x509.GeneralName) -> bool:
        name, fields = roles[number]
        pki.write(f"pki/roles/documented-{name}", **fields)
        body = {"csr": csr_for(cn, *sans), "ttl": "24h", "exclude_cn_from_sans": True}
        return pki.request("POST", f"pki/sign/documented-{name}", body).ok

    def sans(name: str, address: str) -> tuple[x509.GeneralName, ...]:
        return x509.DNSName(name), x509.IPAddress(ip_address(address))

    for client, serving in ((0, 1), (2, 3)):
        assert gives(client, "system:node:w1")
        assert gives(serving, "system:node:w1", *sans("w1", "192.0.2.7"))
        assert not gives(client, "system:kube-controller-manager")
        assert not gives(serving, "system:node:w1", *sans("*.svc", "192.0.2.7"))  # one pattern would be all servers
    assert gives(0, "system:node:w3")
    assert not gives(2, "system:node:w3")
    assert gives(1, "system:node:w1", *sans("kubernetes.default.svc", "10.96.0.1"))
    assert not gives(3, "system:node:w1", *sans("kubernetes.default.svc", "192.0.2.7"))
    assert not gives(3, "system:node:w1", *sans("w1", "10.96.0.1"))


def test_the_roles_for_people_in_the_documents(pki: openbao.OpenBao) -> None:
    """`allow_any_name` gives any CN; a list of people, or a prefix, gives these."""
    general, by_name, by_prefix = (
        dict(word.split("=", 1) for word in shlex.split(found))
        for found in re.findall(r"`(allow_any_name=[^`]*)`", (DOCS / "users.md").read_text())
    )

    def gives(fields: dict[str, str], cn: str) -> bool:
        pki.write("pki/roles/documented-people", **{**general, **fields})
        return pki.request("POST", "pki/sign/documented-people", {"csr": csr_for(cn), "ttl": "8h"}).ok

    controller = "system:kube-controller-manager"
    assert [gives({}, cn) for cn in ("bob", controller)] == [True, True]
    others = ("mallory", controller, "mallory@bob", "localhost")
    assert [cn for cn in ("bob", *others) if gives(by_name, cn)] == ["bob"]
    assert [cn for cn in ("dev-bob", "bob", *others) if gives(by_prefix, cn)] == ["dev-bob"]
