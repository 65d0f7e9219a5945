"""The cfssl backend against real cfssl servers; a double only where a real one can't be brought to answer so."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import re
import secrets
import sqlite3
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from backends.cfssl import CfsslBackend
from backends.cfssl import settings as cfssl_settings
from backends.cfssl.settings import CfsslSettings
from bridge.ca.registry import configured
from bridge.contract import Secret, SetupRequest, SignRequest
from bridge.errors import BackendRefusedError, BackendUnavailableError, LocalFileError, Violation
from bridge.pki import csr
from bridge.settings.load import parse
from bridge.specs import AUTHORITIES, CA, ETCD_CA, FRONT_PROXY_CA, SPECS, Authority, CertificateSpec
from bridge.testing import BackendConformance, TestCA, sign_request
from tests.kit import cfssl as kit
from tests.kit import programs
from tests.kit.issuing import Signer
from tests.kit.loopback import free_port

Make = Callable[..., CfsslBackend]
Live = dict[str, x509.Certificate]

VALIDITY = timedelta(days=30)
APISERVER = SPECS["apiserver"]
ADMIN = SPECS["admin.conf"]
CONFIG = Path(__file__).resolve().parents[2] / "config" / "cfssl"
SERVER_USAGES = ["digital signature", "key encipherment", "server auth"]

#: What the tests below share, apart from those of the conformance suite.
_CA = TestCA.make("kubernetes", "ecdsa-p256")
_LIVE = {spec.name: _CA.leaf(spec) for spec in SPECS.values()}


def specs_of(authority: Authority) -> tuple[CertificateSpec, ...]:
    return tuple(spec for spec in SPECS.values() if spec.authority == authority)


def asked(authority: Authority, settings: dict[str, Any] | None = None) -> SetupRequest:
    """What `setup` gets for an authority of one node."""
    return SetupRequest(
        authority=authority,
        certificates=_LIVE,
        validity=VALIDITY,
        node="cp-1",
        cluster="kubernetes",
        settings=settings or {},
    )


def request(spec: CertificateSpec, live: x509.Certificate | None = None) -> SignRequest:
    """To renew `live`, or else the certificate that is named like the spec."""
    return sign_request(live or _LIVE[spec.name], spec, "ecdsa-p256", VALIDITY)


def keys_of(table: Mapping[str, str]) -> dict[str, Any]:
    """What `kit.serve_authority` gave, as the reader of settings files would pass it on."""
    paths = ("ca_file", "client_cert", "client_key")
    keys: dict[str, Any] = {name: Path(value) if name in paths else value for name, value in table.items()}
    keys["auth_key"] = Secret("file", keys.pop("auth_key_file"))
    return keys


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes backends, whose settings must be without problems, and closes them at the end."""
    with contextlib.ExitStack() as stack:

        def backend(**keys: Any) -> CfsslBackend:
            settings = CfsslSettings(**{"timeout": timedelta(minutes=2), **keys})
            assert list(settings.problems()) == []
            return stack.enter_context(contextlib.closing(CfsslBackend.from_settings(settings)))

        yield backend


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Settings for a server that is set up for authority `ca` as `ca-bridge setup cfssl` says."""
    directory = tmp_path_factory.mktemp("closed")
    with kit.serve_authority(directory, CA, _LIVE, VALIDITY, ca_pem=(_CA.certificate_pem, _CA.key_pem)) as table:
        yield keys_of(table)


@pytest.fixture(scope="module")
def mutual(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The same behind mutual TLS, for one client by its CN."""
    directory = tmp_path_factory.mktemp("mutual")
    tls = kit.make_tls(directory / "tls", client_cn="bridge-cp-1", allowed_cn="^bridge-cp-1$")
    pems = _CA.certificate_pem, _CA.key_pem
    with kit.serve_authority(directory, CA, _LIVE, VALIDITY, ca_pem=pems, tls=tls) as table:
        yield keys_of(table)


def open_config(usages: list[str], **profiles: list[str]) -> dict[str, object]:
    """Without keys: a default profile with these usages, and further profiles."""
    return {
        "signing": {
            "default": {"expiry": "720h", "usages": usages},
            "profiles": {name: {"expiry": "721h", "usages": theirs} for name, theirs in profiles.items()},
        }
    }


@contextlib.contextmanager
def serving(
    directory: Path, config: dict[str, object], *, disable: bool | str = "newcert", ca_key_pem: bytes = _CA.key_pem
) -> Iterator[dict[str, Any]]:
    """Settings for a server without keys."""
    with kit.serve(directory, _CA.certificate_pem, ca_key_pem, config, disable=disable) as url:
        yield {"url": url, "endpoint": "sign"}


def posts(url: str, directory: Path) -> list[tuple[str, int]]:
    """The requests that the server's log has so far, as (endpoint, status)."""
    requests.get(f"{url}{kit.API}/health", timeout=180)  # logged when what came before it is
    log = next(directory.glob("*.log"))
    deadline = time.monotonic() + 180
    while '/health"' not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    return [(name, int(status)) for name, status in re.findall(r'"POST /api/v1/cfssl/(\w+)" (\d+)', log.read_text())]


@functools.cache
def rsa_ca() -> TestCA:
    """A CA with a key as kubeadm makes it unless a parameter says otherwise."""
    return TestCA.make()


class Conformance(BackendConformance):
    """The suite with what all of ours have in common; tests are in the classes below."""

    __test__ = False
    unsupported = frozenset({"sign_many", "collect"})

    @pytest.fixture(scope="class")
    @classmethod
    def ca(cls) -> TestCA:
        """The CA behind the server."""
        return rsa_ca()

    @pytest.fixture(scope="class")
    @classmethod
    def live(cls, ca: TestCA) -> Live:
        """The certificates to renew."""
        return {spec.name: ca.leaf(spec) for spec in cls.specs}

    @pytest.fixture
    def dead_backend(self, make: Make) -> CfsslBackend:
        """The backend of a server that is not there."""
        return make(url=f"http://127.0.0.1:{free_port()}", endpoint="sign")


@pytest.mark.kube("cfssl")
class TestServe(Conformance):
    """`cfssl serve` for the cluster's CA, over HTTP on the same machine."""

    __test__ = True
    specs = specs_of(CA)

    @pytest.fixture(scope="class")
    @classmethod
    def keys(cls, ca: TestCA, live: Live, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
        """Settings for a server of the class."""
        directory, pems = tmp_path_factory.mktemp("serve"), (ca.certificate_pem, ca.key_pem)
        with kit.serve_authority(directory, CA, live, VALIDITY, ca_pem=pems) as table:
            yield keys_of(table)

    @pytest.fixture
    def backend(self, keys: dict[str, Any], make: Make) -> CfsslBackend:
        """With the HMAC keys of all profiles."""
        return make(**keys)


@pytest.mark.kube("cfssl")
class TestServeMutualTls(Conformance):
    """`cfssl serve` for the front proxy's CA, behind mutual TLS."""

    __test__ = True
    specs = specs_of(FRONT_PROXY_CA)

    @pytest.fixture(scope="class")
    @classmethod
    def keys(cls, ca: TestCA, live: Live, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
        """Settings for a server of the class."""
        directory, pems = tmp_path_factory.mktemp("tls"), (ca.certificate_pem, ca.key_pem)
        tls = kit.make_tls(directory / "tls")
        with kit.serve_authority(directory, FRONT_PROXY_CA, live, VALIDITY, ca_pem=pems, tls=tls) as table:
            yield keys_of(table)

    @pytest.fixture
    def backend(self, keys: dict[str, Any], make: Make) -> CfsslBackend:
        """With the HMAC key and a client certificate."""
        return make(**keys)


@pytest.mark.kube("multirootca")
class TestMultirootca(Conformance):
    """`multirootca` with another CA beside etcd's."""

    __test__ = True
    specs = specs_of(ETCD_CA)

    @pytest.fixture(scope="class")
    @classmethod
    def keys(cls, ca: TestCA, live: Live, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
        """Settings for a server of the class."""
        directory = tmp_path_factory.mktemp("multirootca")
        config = cfssl_settings.signing_config(ETCD_CA, live, VALIDITY, directory)
        kit.write_hmac_keys(config)
        other = TestCA.make("other", "ecdsa-p256")
        theirs: dict[str, Any] = {"cert_pem": other.certificate_pem, "key_pem": other.key_pem}
        unkeyed: Any = open_config(SERVER_USAGES, peer=SERVER_USAGES)
        roots = {
            "other": kit.Root(**theirs, config=config),
            "unkeyed": kit.Root(**theirs, config=unkeyed),
            "far": kit.Root(**theirs, config=config, nets="192.0.2.0/24"),
            "etcd_ca": kit.Root(cert_pem=ca.certificate_pem, key_pem=ca.key_pem, config=config),
        }
        with kit.multirootca(directory, roots) as url:
            secret = Secret("file", f"{directory}/keys/etcd-ca-{{usage}}.hex")
            yield {"url": url, "label": "etcd_ca", "auth_key": secret}

    @pytest.fixture
    def backend(self, keys: dict[str, Any], make: Make) -> CfsslBackend:
        """With the label of etcd's CA."""
        return make(**keys)

    def test_the_label_chooses_the_ca(self, keys: dict[str, Any], make: Make) -> None:
        """Another label is another CA, in what it signs too."""
        other = make(**{**keys, "label": "other"})
        spec = SPECS["etcd-peer"]
        assert other.issuers()[0].subject.rfc4514_string() == "CN=other"
        assert other.sign(request(spec)).leaf.issuer == other.issuers()[0].subject

    @pytest.mark.parametrize("label", ["etcd-ca", ""])
    def test_an_unknown_label_is_refused(self, keys: dict[str, Any], make: Make, label: str) -> None:
        """A label that the server does not have, or none where it has no default, is found before and at signing."""
        backend = make(**{**keys, "label": label})
        for ask in (backend.issuers, lambda: backend.check(self.specs), lambda: backend.sign(request(self.specs[0]))):
            with pytest.raises(BackendRefusedError) as e:
                ask()
            assert repr(label) in e.value.hint

    def test_an_unknown_profile_is_refused(self, keys: dict[str, Any], make: Make) -> None:
        """Multirootca knows no fall-back: a misspelt profile is an error at signing and a violation before."""
        backend = make(**keys, profile="x{usage}")
        assert list(backend.check(self.specs[:1])) == [self.specs[0].name]
        with pytest.raises(BackendRefusedError) as e:
            backend.sign(request(self.specs[0]))
        assert f"'x{self.specs[0].usage}'" in e.value.hint

    def test_a_profile_without_a_key_is_refused(self, keys: dict[str, Any], make: Make) -> None:
        """Multirootca signs nothing without a key."""
        backend = make(**{**keys, "label": "unkeyed"}, profile="peer")
        with pytest.raises(BackendRefusedError) as e:
            backend.sign(request(SPECS["etcd-peer"]))
        assert "auth_key" in e.value.hint

    def test_a_machine_that_is_not_in_its_nets_is_refused(self, keys: dict[str, Any], make: Make) -> None:
        """A label that is for others' addresses is found by the preflight, and refused."""
        backend = make(**{**keys, "label": "far"})
        assert list(backend.check([SPECS["etcd-peer"]])) == ["etcd-peer"]
        with pytest.raises(BackendRefusedError) as e:
            backend.sign(request(SPECS["etcd-peer"]))
        assert "nets" in e.value.hint


SETTINGS = {"url": "https://ca.example.com:8881", "auth_key": Secret("file", "/k.hex")}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"url": "https://ca.example.com/etcd/"},
        {"url": "http://127.0.0.1:8881"},
        {"url": "http://[::1]:8881"},
        {"url": "http://localhost"},
        {"url": "http://ca.example.com:8881", "plain_http": True},
        {"auth_key": Secret("file", "/keys/{usage}.hex"), "profile": "kubeadm-{name}"},
        {"auth_key": Secret("env", "KEY"), "profiles": {"etcd-peer": "etcd", "client": "users"}},
        {"auth_key": None, "endpoint": "sign"},
        {"ca_file": Path("/ca"), "client_cert": Path("/crt"), "client_key": Path("/key"), "label": "ca"},
    ],
)
def test_settings_without_problems(keys: dict[str, Any]) -> None:
    """These settings go together."""
    assert list(CfsslSettings(**{**SETTINGS, **keys}).problems()) == []


@pytest.mark.parametrize(
    ("keys", "wrong"),
    [
        ({"url": "http://ca.example.com:8881"}, ["url"]),
        ({"url": "http://10.0.0.5"}, ["url"]),
        ({"url": "ca.example.com:8881"}, ["url"]),
        ({"url": "https://"}, ["url"]),
        ({"url": "https://ca.example.com:x"}, ["url"]),
        ({"url": "https://ca.example.com/api/v1/cfssl/authsign"}, ["url"]),
        ({"url": "https://ca.example.com/?a=b"}, ["url"]),
        ({"url": "https://me:s3cret@ca.example.com"}, ["url"]),
        ({"url": "http://localhost", "ca_file": Path("/ca")}, ["url"]),
        ({"auth_key": None}, ["auth_key_file"]),
        ({"endpoint": "sign"}, ["endpoint"]),
        ({"auth_key": Secret("credential", "key-{profile}")}, ["auth_key_credential"]),
        ({"client_cert": Path("/crt")}, ["client_key"]),
        ({"client_key": Path("/key")}, ["client_cert"]),
        ({"profile": "{role}"}, ["profile"]),
        ({"profile": ""}, ["profile"]),
        ({"profiles": {"servers": "x", "client": ""}}, ["profiles.servers", "profiles.client"]),
        ({"url": "", "profile": "{", "auth_key": None}, ["url", "profile", "auth_key_file"]),
    ],
)
def test_settings_with_problems(keys: dict[str, Any], wrong: list[str]) -> None:
    """The error names each contradiction by its key, all at once, and shows no secret."""
    problems = list(CfsslSettings(**{**SETTINGS, **keys}).problems())
    assert [problem.key for problem in problems] == wrong
    assert "s3cret" not in str(problems)


@pytest.mark.kube("cfssl")
@pytest.mark.parametrize("value", [None, "", "s3cret-s3cret-s3cret-s3cret", "abc", "00" * 15])
def test_a_bad_hmac_key_is_refused(closed: dict[str, Any], make: Make, tmp_path: Path, value: str | None) -> None:
    """A key that is not there, empty, not hexadecimal or short is refused by its place, and not shown."""
    place = tmp_path / "key.hex"
    if value is not None:
        place.write_text(value)
    backend = make(**{**closed, "auth_key": Secret("file", str(place))})
    for ask in (lambda: backend.sign(request(APISERVER)), lambda: backend.check([APISERVER])):
        with pytest.raises(LocalFileError) as e:
            ask()
        assert str(place) in str(e.value)
        assert "openssl rand" in e.value.hint
        assert not value or value not in f"{e.value} {e.value.hint}"


@pytest.mark.kube("cfssl")
def test_the_wrong_hmac_key_is_found_before_and_at_signing(closed: dict[str, Any], make: Make, tmp_path: Path) -> None:
    """A key that is not the profile's is a violation of the preflight, and refused; its twin in another case is taken."""
    right = Path(closed["auth_key"].where.format(usage="server")).read_text()
    place = tmp_path / "key.hex"
    place.write_text(f" {right.upper()}\n")
    backend = make(**{**closed, "auth_key": Secret("file", str(place))})
    assert backend.check([APISERVER]) == {}
    backend.sign(request(APISERVER))

    assert backend.check([APISERVER, ADMIN]) == {
        "admin.conf": [
            Violation(subject="authsign with profile client", want="that the server accepts us", got="invalid token")
        ]
    }
    with pytest.raises(BackendRefusedError) as e:
        backend.sign(request(ADMIN))
    assert "HMAC key" in e.value.hint
    assert "profile 'client'" in e.value.hint


@pytest.mark.kube("cfssl")
def test_a_misspelt_profile_of_a_closed_server(closed: dict[str, Any], make: Make) -> None:
    """Without usages in the default profile a misspelt one is found before, and refused with both causes named."""
    backend = make(**closed, profiles={"apiserver": "servr"})
    assert backend.check([APISERVER, ADMIN]) == {
        "apiserver": [
            Violation(
                subject="profile servr, unknown or without these usages",
                want="digital signature, key encipherment, server auth",
                got="none",
            )
        ]
    }
    with pytest.raises(BackendRefusedError) as e:
        backend.sign(request(APISERVER))
    assert "HMAC key" in e.value.hint
    assert "profile 'servr'" in e.value.hint


@pytest.mark.kube("cfssl")
def test_a_misspelt_profile_of_an_open_server(tmp_path: Path, make: Make) -> None:
    """The server signs with its default profile and says nothing; the preflight finds the mistake by the usages."""
    config = open_config(["signing", "key encipherment", "client auth"], server=SERVER_USAGES)
    with serving(tmp_path, config) as keys:
        assert make(**keys, profile="server").check([APISERVER]) == {}
        misspelt = make(**keys, profile="servr")
        assert misspelt.sign(request(APISERVER)).leaf.public_key()
        assert misspelt.check([APISERVER, ADMIN]) == {  # admin.conf gets the right usages by chance
            "apiserver": [
                Violation(
                    subject="profile servr, unknown or without these usages",
                    want="digital signature, key encipherment, server auth",
                    got="client auth, digital signature, key encipherment",
                )
            ]
        }


@pytest.mark.kube("cfssl")
@pytest.mark.parametrize(
    ("usages", "right"),
    [
        (SERVER_USAGES, True),
        (["signing", "key encipherment", "server auth"], True),
        ([*SERVER_USAGES, "client auth"], False),
        (["digital signature", "key encipherment"], False),
        (["digital signature", "server auth"], False),
        ([*SERVER_USAGES, "cert sign"], False),
    ],
)
def test_usages_are_exactly_ours(tmp_path: Path, make: Make, usages: list[str], right: bool) -> None:
    """A usage missing or to spare is a violation that names both lists; cfssl's two names of one usage are the same."""
    with serving(tmp_path, open_config(["client auth"], server=usages)) as keys:
        found = make(**keys).check([APISERVER])
    wrong = Violation(
        subject="profile server, without these usages",
        want="digital signature, key encipherment, server auth",
        got=", ".join(sorted(usages)),
    )
    assert found == ({} if right else {"apiserver": [wrong]})


@pytest.mark.kube("cfssl")
def test_the_preflight_asks_once_a_profile_and_signs_nothing(tmp_path: Path, make: Make) -> None:
    """Certificates with the same profile share its look, and no certificate is made."""
    pems = _CA.certificate_pem, _CA.key_pem
    with kit.serve_authority(tmp_path, CA, _LIVE, VALIDITY, ca_pem=pems) as table:
        before = posts(table["url"], tmp_path)
        assert make(**keys_of(table)).check(specs_of(CA)) == {}
        found = posts(table["url"], tmp_path)[len(before) :]
    assert sorted(found) == [("authsign", 400), ("authsign", 400), ("info", 200), ("info", 200)]
    assert "signed certificate" not in next(tmp_path.glob("*.log")).read_text()


@pytest.mark.kube("cfssl")
def test_a_name_off_the_whitelist_is_refused(closed: dict[str, Any], make: Make) -> None:
    """The printed configuration lets no other CN through, though the HMAC is right."""
    backend = make(**closed)
    backend.sign(request(ADMIN, _LIVE["admin.conf"]))
    with pytest.raises(BackendRefusedError) as e:
        backend.sign(request(ADMIN, _LIVE["etcd-peer"]))
    assert "name_whitelist" in e.value.hint


@pytest.mark.kube("cfssl")
@pytest.mark.parametrize("mixed", [True, False])
def test_plain_sign(tmp_path: Path, make: Make, mixed: bool) -> None:
    """A profile without a key signs on the endpoint `sign`, and takes no HMAC, whether others have keys or none has."""
    config: Any = open_config([], server=SERVER_USAGES, client=["client auth"])
    if mixed:
        config["auth_keys"] = {"client": {"type": "standard", "key": f"file:{tmp_path}/key.hex"}}
        config["signing"]["profiles"]["client"]["auth_key"] = "client"
    kit.write_hmac_keys({"auth_keys": {"client": {"key": f"file:{tmp_path}/key.hex"}}})
    with serving(tmp_path, config) as keys:
        plain = make(**keys)
        assert plain.check([APISERVER]) == {}
        assert plain.sign(request(APISERVER)).leaf.issuer == _CA.certificate.subject
        keyed = make(url=keys["url"], auth_key=Secret("file", f"{tmp_path}/key.hex"))
        for backend, spec in [(keyed, APISERVER)] + ([(plain, ADMIN)] if mixed else []):
            assert list(backend.check([spec])) == [spec.name]
            with pytest.raises(BackendRefusedError) as e:
                backend.sign(request(spec))
            assert "auth_key" in e.value.hint


@pytest.mark.kube("cfssl")
def test_plain_sign_with_a_server_that_wants_keys(closed: dict[str, Any], make: Make) -> None:
    """Where every profile has a key there is no endpoint `sign`."""
    backend = make(url=closed["url"], endpoint="sign")
    assert list(backend.check([APISERVER])) == ["apiserver"]
    with pytest.raises(BackendRefusedError):
        backend.sign(request(APISERVER))


@pytest.mark.kube("cfssl")
def test_a_url_with_a_slash_at_its_end(closed: dict[str, Any], make: Make) -> None:
    """It makes no difference."""
    assert make(**{**closed, "url": f"{closed['url']}//"}).issuers() == [_CA.certificate]


@pytest.mark.kube("cfssl")
@pytest.mark.parametrize("path", ["/elsewhere", "/api/v1"])
def test_a_url_that_leads_elsewhere(closed: dict[str, Any], make: Make, path: str) -> None:
    """A path before the API's is kept, and so refused where the server has no such path."""
    backend = make(**{**closed, "url": f"{closed['url']}{path}"})
    for ask in (backend.issuers, lambda: backend.check([APISERVER]), lambda: backend.sign(request(APISERVER))):
        with pytest.raises(BackendRefusedError):
            ask()


@pytest.mark.kube("cfssl")
def test_https_to_a_server_without_tls(closed: dict[str, Any], make: Make) -> None:
    """Refused: cfssl serves plain HTTP where one of its TLS files is missing, and waiting would not help."""
    with pytest.raises(BackendRefusedError):
        make(**{**closed, "url": closed["url"].replace("http:", "HTTPS:")}).sign(request(APISERVER))


@pytest.mark.kube("cfssl")
def test_text_around_a_csr(closed: dict[str, Any], make: Make) -> None:
    """It does no harm, whatever its encoding."""
    asked = request(APISERVER)
    asked = dataclasses.replace(asked, csr_pem="Antrag für München\n".encode("latin-1") + asked.csr_pem)
    assert make(**closed).sign(asked).leaf.public_key() == asked.csr.public_key()


@pytest.mark.kube("cfssl")
def test_the_ca_of_another_cluster_is_shown(tmp_path: Path, make: Make) -> None:
    """`issuers` shows the CA that is behind the URL, also when it is another cluster's."""
    other = TestCA.make("other", "ecdsa-p256")
    config = open_config(SERVER_USAGES)
    with kit.serve(tmp_path, other.certificate_pem, other.key_pem, config, disable=False) as url:
        assert make(url=url, endpoint="sign").issuers() == [other.certificate] != [_CA.certificate]


def intermediate_below(root: TestCA) -> TestCA:
    """A CA that another one certified."""
    key, now = csr.generate_key("ecdsa-p256"), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "intermediate")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(root.certificate.subject)
    builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=90))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return TestCA(certificate=builder.sign(root.key, hashes.SHA256()), key=key)


@pytest.mark.kube("cfssl")
@pytest.mark.parametrize("preflight", [True, False])
def test_an_intermediate_comes_along(tmp_path: Path, make: Make, preflight: bool) -> None:
    """The CA's certificate goes with each leaf unless it is a root, and is asked for once, or not at all after a check."""
    ca = intermediate_below(_CA)
    config = open_config(SERVER_USAGES)
    with kit.serve(tmp_path, ca.certificate_pem, ca.key_pem, config, disable="newcert") as url:
        before = posts(url, tmp_path)
        backend = make(url=url, endpoint="sign")
        if preflight:
            backend.check([APISERVER])
        assert [backend.sign(request(APISERVER)).intermediates for _ in range(3)] == [(ca.certificate,)] * 3
        assert posts(url, tmp_path)[len(before) :].count(("info", 200)) == 1


@pytest.mark.kube("cfssl")
def test_a_server_that_is_open_for_signing_alone(tmp_path: Path, make: Make) -> None:
    """Without `info` the backend can't know whose CA it is: it asks for no certificate, and the hint says what is missing."""
    with serving(tmp_path, open_config([], server=SERVER_USAGES), disable="newcert,info") as keys:
        backend = make(**keys)
        for ask in (backend.issuers, lambda: backend.check([APISERVER]), lambda: backend.sign(request(APISERVER))):
            with pytest.raises(BackendRefusedError) as e:
                ask()
            assert "are `info` and the signing endpoint enabled" in e.value.hint


@pytest.mark.kube("cfssl")
def test_a_server_without_its_ca(tmp_path: Path, make: Make) -> None:
    """One that runs on without its key is found by the preflight, and refused."""
    with serving(tmp_path, open_config(SERVER_USAGES), ca_key_pem=b"") as keys:
        backend = make(**keys)
        for ask in (backend.issuers, lambda: backend.check([APISERVER]), lambda: backend.sign(request(APISERVER))):
            with pytest.raises(BackendRefusedError):
                ask()


@pytest.mark.kube("cfssl")
def test_a_server_whose_key_is_of_another_ca(tmp_path: Path, make: Make) -> None:
    """It starts, but can't sign: refused."""
    with serving(tmp_path, open_config(SERVER_USAGES), ca_key_pem=TestCA.make().key_pem) as keys:
        with pytest.raises(BackendRefusedError) as e:
            make(**keys).sign(request(APISERVER))
        assert "does not fit" in e.value.hint


@pytest.mark.kube("cfssl")
class TestTls:
    """Over HTTPS; the good twin of all refusals is the first test."""

    def test_with_a_client_certificate(self, mutual: dict[str, Any], make: Make) -> None:
        """The CN that the server wants is let in."""
        backend = make(**mutual)
        assert backend.check(specs_of(CA)) == {}
        assert backend.sign(request(APISERVER)).leaf.issuer == _CA.certificate.subject

    # Several times, since TLS 1.3 lets us begin to write before the server says no.
    @pytest.mark.parametrize("_", range(5))
    def test_without_a_client_certificate(self, mutual: dict[str, Any], make: Make, _: int) -> None:
        """The server's refusal has a hint, and never counts as a server that is away."""
        backend = make(**{**mutual, "client_cert": None, "client_key": None})
        with pytest.raises(BackendRefusedError) as e:
            backend.sign(request(APISERVER))
        assert "client_cert" in e.value.hint

    @pytest.mark.parametrize("_", range(5))
    def test_with_a_client_certificate_of_another_ca(
        self, mutual: dict[str, Any], make: Make, tmp_path: Path, _: int
    ) -> None:
        """The server refuses a client certificate of another CA."""
        other = kit.make_tls(tmp_path)
        backend = make(**{**mutual, "client_cert": other.client_cert, "client_key": other.client_key})
        with pytest.raises(BackendRefusedError) as e:
            backend.sign(request(APISERVER))
        assert "client_cert" in e.value.hint

    def test_with_another_clients_certificate(self, make: Make, tmp_path: Path) -> None:
        """A CN that the server does not want is refused, in the preflight already."""
        tls = kit.make_tls(tmp_path, client_cn="someone", allowed_cn="^bridge-cp-1$")
        pems = _CA.certificate_pem, _CA.key_pem
        keys: dict[str, Any] = {"ca_file": tls.ca, "client_cert": tls.client_cert, "client_key": tls.client_key}
        with kit.serve(tmp_path, *pems, open_config(SERVER_USAGES), tls=tls, disable="newcert") as url:
            backend = make(**keys, url=url, endpoint="sign")
            for ask in (lambda: backend.check([APISERVER]), lambda: backend.sign(request(APISERVER))):
                with pytest.raises(BackendRefusedError) as e:
                    ask()
                assert "-mutual-tls-cn" in e.value.hint

    def test_a_server_of_another_ca(self, mutual: dict[str, Any], make: Make, tmp_path: Path) -> None:
        """A server whose certificate is not below ca_file is refused."""
        with pytest.raises(BackendRefusedError) as e:
            make(**{**mutual, "ca_file": kit.make_tls(tmp_path).ca}).sign(request(APISERVER))
        assert "ca_file" in e.value.hint


HMAC_KEY = secrets.token_hex(32)


@pytest.fixture
def double() -> Iterator[kit.Double]:
    """Plays answers; strict about requests."""
    with kit.double({"server": bytes.fromhex(HMAC_KEY)}, _CA.certificate_pem) as played:
        yield played


@pytest.fixture
def to_double(double: kit.Double, make: Make, tmp_path: Path) -> CfsslBackend:
    """A backend that asks the double."""
    (tmp_path / "key.hex").write_text(HMAC_KEY)
    return make(url=double.url, auth_key=Secret("file", str(tmp_path / "key.hex")), label="kubernetes")


HTML = b"<html><body>Bad Gateway</body></html>"
UNAVAILABLE = {
    "database locked": kit.Answer.error(400, 11000, "database is locked"),
    "upstream": kit.Answer.error(400, 7400, "failed POST to http://10.0.0.5:8888"),
    "502": kit.Answer(status=502, body=HTML),
    "503": kit.Answer(status=503, body=HTML),
    "504": kit.Answer(status=504, body=HTML),
    "429": kit.Answer(status=429, body=HTML),
}
LEAF = _LIVE["apiserver"]
LEAF_PEM = kit.pem(LEAF).decode()
REFUSED = {
    "database broken": kit.Answer.error(400, 11100, "no such table: certificates"),
    "internal error": kit.Answer.error(500, 0, "x509: unsupported public key type: <nil>"),
    "internal error of a proxy": kit.Answer(status=500, body=HTML),
    "redirect": kit.Answer(status=301, headers={"Location": "http://127.0.0.1:1/"}),
    "page": kit.Answer(body=HTML),
    "no text": kit.Answer(body=b"\xff\xfe"),
    "nothing": kit.Answer(),
    "list": kit.Answer(body=b"[]"),
    "deep": kit.Answer(body=b"[" * 100_000),
    "no success": kit.Answer(body=b'{"success": "yes", "result": {}, "errors": [], "messages": []}'),
    "no error": kit.Answer(status=400, body=b'{"success": false, "result": null, "errors": [], "messages": []}'),
    "odd error": kit.Answer(status=400, body=b'{"success": false, "errors": [{"code": {}, "message": []}]}'),
    "no certificate": kit.Answer.result(),
    "null": kit.Answer.result(certificate=None),
    "a broken one": kit.Answer.result(certificate=LEAF_PEM.replace("M", "N", 20)),
    "odd text": kit.Answer(body=b'{"success": true, "result": {"certificate": "\\ud800"}}'),
    "two": kit.Answer.result(certificate=LEAF_PEM * 2),
}


@pytest.mark.parametrize("answer", UNAVAILABLE.values(), ids=UNAVAILABLE)
def test_a_trouble_that_may_pass(double: kit.Double, to_double: CfsslBackend, answer: kit.Answer) -> None:
    """It is unavailable, and the same CSR is signed when it is over."""
    double.answers += [answer, kit.Answer.result(certificate=LEAF_PEM)]
    same = request(APISERVER)
    with pytest.raises(BackendUnavailableError) as e:
        to_double.sign(same)
    assert e.value.retry_after_seconds is None
    assert to_double.sign(same).leaf == LEAF
    assert double.bodies[0] == double.bodies[1]


def test_a_new_certificate_of_the_ca_comes_along_while_a_service_runs(
    double: kit.Double, to_double: CfsslBackend
) -> None:
    """A gateway that asks for the CA's certificate each hour has the right one behind each leaf, also within that hour."""
    root = Signer(certificate=_CA.certificate, key=_CA.key)
    for ca in (Signer.make("old", parent=root), Signer.make("new", parent=root), root):
        double.ca_cert_pem = kit.pem(ca.certificate)
        for asked in (request(APISERVER), request(APISERVER)):
            double.answers.append(kit.Answer.result(certificate=kit.pem(ca.issue(asked).leaf).decode()))
            assert to_double.sign(asked).intermediates == (() if ca is root else (ca.certificate,))


@pytest.mark.parametrize("answer", REFUSED.values(), ids=REFUSED)
def test_an_answer_that_is_none(double: kit.Double, to_double: CfsslBackend, answer: kit.Answer) -> None:
    """Anything but a success with one certificate is refused, and not quoted when it is not cfssl's."""
    double.answers.append(answer)
    with pytest.raises(BackendRefusedError) as e:
        to_double.sign(request(APISERVER))
    assert "html" not in f"{e.value} {e.value.hint}"


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        (lambda: "7", 7, 7),
        (lambda: format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True), 3000, 3600),
        (lambda: "Sun, 06 Nov 1994 08:49:37 GMT", 0, 0),
    ],
    ids=["seconds", "date", "date that is over"],
)
def test_retry_after(
    double: kit.Double, to_double: CfsslBackend, value: Callable[[], str], least: float, most: float
) -> None:
    """The pause that the server asks for is passed on, whether it is a number or a date."""
    double.answers.append(kit.Answer(status=503, body=HTML, headers={"Retry-After": value()}))
    with pytest.raises(BackendUnavailableError) as e:
        to_double.sign(request(APISERVER))
    assert e.value.retry_after_seconds is not None
    assert least <= e.value.retry_after_seconds <= most


@pytest.mark.parametrize("value", ["soon", "-1", "Sun, 06 Nov 1994 08:49:37"])
def test_retry_after_that_is_neither(double: kit.Double, to_double: CfsslBackend, value: str) -> None:
    """A Retry-After that can't be read is ignored."""
    double.answers.append(kit.Answer(status=503, headers={"Retry-After": value}))
    with pytest.raises(BackendUnavailableError) as e:
        to_double.sign(request(APISERVER))
    assert e.value.retry_after_seconds is None


def test_the_request_says_no_more_than_it_must(double: kit.Double, to_double: CfsslBackend) -> None:
    """CSR, profile and label: names, dates and serial numbers would replace what is in the CSR."""
    double.answers.append(kit.Answer.result(certificate=LEAF_PEM))
    asked = request(APISERVER)
    to_double.sign(asked)
    inner = kit.inner_request(double.bodies[0])
    assert inner == {"certificate_request": asked.csr_pem.decode(), "profile": "server", "label": "kubernetes"}


def test_no_secret_is_reported(double: kit.Double, to_double: CfsslBackend, caplog: pytest.LogCaptureFixture) -> None:
    """The server quotes the whole request, and neither error nor log hold the key, the token or the body."""
    caplog.set_level(logging.DEBUG)
    double.answers += [
        lambda body: kit.Answer.error(400, 400, f"can't read {body.decode()}"),
        lambda body: kit.Answer.error(400, 7400, body.decode()),
        lambda body: kit.Answer(status=503, body=body),
        lambda body: kit.Answer(body=body),
        kit.Answer(body=b"x" * 65536, times=32),
    ]
    reported = []
    for _ in range(5):
        with pytest.raises((BackendRefusedError, BackendUnavailableError)) as e:
            to_double.sign(request(APISERVER))
        reported.append(f"{e.value!r} {e.value.hint} {''.join(traceback.format_exception(e.value))}")
    assert "can't read" in reported[0]
    for body in double.bodies:
        sent = json.loads(body)
        for secret in (HMAC_KEY, sent["token"], sent["request"], sent["request"][:100]):
            assert secret not in f"{reported} {caplog.text}"


@pytest.mark.kube("cfssl")
def test_only_what_is_needed_is_open(closed: dict[str, Any], tmp_path: Path) -> None:
    """The printed list switches off all that signs without a key or asks other hosts; a server without it has them."""
    names = [*cfssl_settings.DISABLED.removesuffix(",/").split(","), ""]

    def statuses(url: str) -> dict[str, int]:
        paths = {name: f"{kit.API}/{name}" if name else "/" for name in names}
        return {name: requests.get(f"{url}{path}", timeout=180).status_code for name, path in paths.items()}

    assert statuses(closed["url"]) == dict.fromkeys(names, 404)
    with serving(tmp_path, open_config(SERVER_USAGES), disable=False) as keys:
        opened = statuses(keys["url"])
    absent = {"crl", "revoke", "ocspsign", "certadd", "gencrl", "bundle", "", "scan", "scaninfo"}
    assert {name for name, status in opened.items() if status == 404} <= absent


@pytest.mark.kube("cfssl")
@pytest.mark.parametrize("authority", AUTHORITIES.values(), ids=AUTHORITIES)
def test_the_printed_script(authority: Authority, tmp_path: Path, make: Make) -> None:
    """Run as it is, `setup cfssl`'s text makes keys and configuration, and a server that signs for this node."""
    tls = kit.make_tls(tmp_path / "tls", client_cn="ca-bridge")
    for name, data in {
        f"{authority.name}.crt": _CA.certificate_pem,
        f"{authority.name}.key": _CA.key_pem,
        "server.crt": tls.server_cert.read_bytes(),
        "server.key": tls.server_key.read_bytes(),
        "bridge-clients-ca.crt": tls.ca.read_bytes(),
    }.items():
        (tmp_path / name).write_bytes(data)
    text = cfssl_settings.text(asked(authority), tmp_path)
    default = cfssl_settings.PORTS[authority.name]

    def command(port: int) -> list[str]:
        path = f"PATH={programs.require('cfssl').parent}:{os.environ['PATH']}"
        return ["env", path, "sh", "-c", text.replace(f"-port {default}", f"-port {port}")]

    with kit.running(command, tmp_path, tls) as url:
        key = Secret("file", f"{tmp_path}/keys/{authority.name}-{{usage}}.hex")
        files = {"ca_file": tls.ca, "client_cert": tls.client_cert, "client_key": tls.client_key}
        backend = make(url=url, auth_key=key, **files)
        assert backend.check(specs_of(authority)) == {}
        assert backend.sign(request(specs_of(authority)[0])).leaf.issuer == _CA.certificate.subject
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "keys").iterdir()} == {0o600}
    assert tls.server_cert.read_bytes() == (tmp_path / "server.crt").read_bytes()


@pytest.mark.first_use("8")
@pytest.mark.kube("cfssl")
def test_the_printed_script_makes_tls_and_the_nodes_files(tmp_path: Path, make: Make) -> None:
    """From a directory with the CA alone, and the node's settings: its host, port and file names; it can be run again."""
    port = free_port()
    settings = {
        "url": f"https://127.0.0.1:{port}",
        "ca_file": Path("/etc/x/tls.pem"),
        "client_cert": Path("/etc/x/me.pem"),
        "client_key": Path("/etc/x/me.key"),
        "auth_key": Secret("file", "/etc/x/k-{usage}.hex"),
    }
    (tmp_path / "ca.crt").write_bytes(_CA.certificate_pem)
    (tmp_path / "ca.key").write_bytes(_CA.key_pem)
    text = cfssl_settings.text(asked(AUTHORITIES["ca"], settings), tmp_path)
    assert f'url = "https://127.0.0.1:{port}"' in text
    path = f"PATH={programs.require('cfssl').parent}:{os.environ['PATH']}"
    node = tmp_path / "node"
    tls = kit.Tls(
        server_cert=tmp_path / "server.crt",
        server_key=tmp_path / "server.key",
        ca=node / "tls.pem",
        client_cert=node / "me.pem",
        client_key=node / "me.key",
    )
    subprocess.run(["sh", "-c", text.replace("exec cfssl serve", "exec true")], check=True, capture_output=True)
    made = {file.name: file.read_bytes() for file in node.iterdir()}

    def again(at: int) -> list[str]:
        return ["env", path, "sh", "-c", text.replace(f"-port {port}", f"-port {at}")]

    with kit.running(again, tmp_path, tls) as url:
        files = {"ca_file": tls.ca, "client_cert": tls.client_cert, "client_key": tls.client_key}
        backend = make(url=url, auth_key=Secret("file", f"{node}/k-{{usage}}.hex"), **files)
        assert backend.check(specs_of(AUTHORITIES["ca"])) == {}
        assert backend.sign(request(specs_of(AUTHORITIES["ca"])[0])).leaf.issuer == _CA.certificate.subject
    assert {file.name: file.read_bytes() for file in node.iterdir()} == made
    assert set(made) == {"tls.pem", "me.pem", "me.key", "k-client.hex", "k-server.hex"}
    assert {file.stat().st_mode & 0o777 for file in (node / "me.key", node / "k-client.hex")} == {0o600}


@pytest.mark.parametrize("authority", AUTHORITIES.values(), ids=AUTHORITIES)
def test_the_printed_settings(authority: Authority) -> None:
    """The node's part of the text is settings that the bridge takes, for the keys that the script makes."""
    text = cfssl_settings.text(asked(authority))
    lines = text.partition("# In the node's settings:\n")[2].partition("\n\n")[0].splitlines()
    parsed = parse("\n".join(line.removeprefix("#") for line in lines))
    read = configured(parsed, [authority.name])[authority.name]
    assert isinstance(read.settings, CfsslSettings)
    assert read.settings.auth_key is not None
    for spec in specs_of(authority):
        assert Path(read.settings.auth_key.where.format(usage=spec.usage)).name in text


def test_the_configuration_is_for_certificates_that_are_there() -> None:
    """Without a certificate of the authority there is nothing to configure."""
    assert cfssl_settings.signing_config(FRONT_PROXY_CA, _LIVE, VALIDITY)
    with pytest.raises(ValueError, match="front-proxy-ca"):
        cfssl_settings.signing_config(FRONT_PROXY_CA, {"apiserver": _LIVE["apiserver"]}, VALIDITY)


@pytest.mark.parametrize(
    ("validity", "text"),
    [(timedelta(days=365), "8760h"), (timedelta(minutes=90), "1h30m"), (timedelta(minutes=5, seconds=30), "0h5m")],
)
def test_the_configurations_validity(validity: timedelta, text: str) -> None:
    """It is in hours and minutes, since Go's durations know no days."""
    config: Any = cfssl_settings.signing_config(FRONT_PROXY_CA, _LIVE, validity)
    assert config["signing"]["profiles"]["client"]["expiry"] == text


@pytest.mark.kube("multirootca")
def test_the_examples_in_config(tmp_path: Path, make: Make) -> None:
    """The shipped files, with other paths, give each kubeadm certificate its usages under its CA's label."""
    for file in CONFIG.iterdir():
        (tmp_path / file.name).write_text(file.read_text().replace("/etc/cfssl", str(tmp_path)))
    cas = {name: TestCA.make(name, "ecdsa-p256") for name in AUTHORITIES}
    for name, ca in cas.items():
        (tmp_path / f"{name}.crt").write_bytes(ca.certificate_pem)
        (tmp_path / f"{name}.key").write_bytes(ca.key_pem)
        kit.write_hmac_keys(json.loads((tmp_path / f"{name}.json").read_text()))
    with kit.running(lambda port: kit.multirootca_command(tmp_path / "roots.conf", port), tmp_path, None) as url:
        for label, authority in {"kubernetes": CA, "etcd_ca": ETCD_CA, "front_proxy_ca": FRONT_PROXY_CA}.items():
            key = Secret("file", f"{tmp_path}/keys/{authority.name}-{{usage}}.hex")
            backend = make(url=url, label=label, auth_key=key)
            assert backend.issuers() == [cas[authority.name].certificate]
            assert backend.check(specs_of(authority)) == {}
            for spec in set(specs_of(authority)) - {APISERVER}:  # whose names are the site's own
                assert backend.sign(request(spec)).leaf.subject == _LIVE[spec.name].subject


# What is revoked


@pytest.mark.kube("cfssl")
def test_revokes_in_the_servers_database(tmp_path: Path, make: Make) -> None:
    """Once or twice is the same; a certificate that the database does not know is refused."""
    pems = _CA.certificate_pem, _CA.key_pem
    config = open_config(SERVER_USAGES)
    with kit.serve(tmp_path, *pems, config, disable="newcert", database=True) as url:
        backend = make(url=url, endpoint="sign")
        old, _ = (backend.sign(request(APISERVER)).leaf for _ in range(2))
        backend.revoke(old)
        backend.revoke(old)
        with contextlib.closing(sqlite3.connect(tmp_path / "certs.db")) as database:
            found = dict(database.execute("SELECT status, count(*) FROM certificates GROUP BY status"))
        assert found == {"revoked": 1, "good": 1}
        with pytest.raises(BackendRefusedError) as e:
            backend.revoke(_LIVE["apiserver"])
        assert "knows no such certificate" in e.value.hint


@pytest.mark.kube("cfssl")
def test_a_server_that_revokes_nothing(tmp_path: Path, make: Make) -> None:
    """A server as `setup cfssl` has it refuses, and the hint says what is disabled."""
    with serving(tmp_path, open_config(SERVER_USAGES), disable="newcert,revoke") as keys:
        with pytest.raises(BackendRefusedError) as e:
            make(**keys).revoke(_LIVE["apiserver"])
        assert "`revoke` is disabled there" in e.value.hint
