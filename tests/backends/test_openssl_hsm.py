"""`openssl ca` with the CA's key in a token: a real SoftHSM, by openssl's engine and by its provider."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from backends.openssl import OpensslBackend
from backends.openssl.index import parse_index
from backends.openssl.program import _LOGINS, Pkcs11Settings
from backends.openssl.settings import OpensslSettings
from bridge.ca import registry
from bridge.contract import Issued, Secret, SignRequest
from bridge.errors import BackendError, BackendRefusedError, BackendUnavailableError, SettingsError
from bridge.settings.load import parse
from bridge.specs import AUTHORITIES, SPECS, CertificateSpec
from bridge.testing import BackendConformance, TestCA, sign_request, tampered
from tests.kit import softhsm
from tests.kit.cas import Bridge
from tests.kit.desks import POLICY
from tests.kit.opensslca import make_ca_directory, program
from tests.kit.pki import handmade_pki
from tests.kit.softhsm import PIN, Method, Token

CA = TestCA.make()
SERVER, CLIENT = SPECS["apiserver"], SPECS["admin.conf"]
LIVE = {name: CA.leaf(spec) for name, spec in SPECS.items()}
EXAMPLE = Path(__file__).parents[2] / "config/openssl/hsm.toml"


@pytest.fixture(params=softhsm.METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    """Each of the ways in which openssl reaches a token."""
    chosen: Method = request.param
    if reason := softhsm.missing(chosen):
        pytest.skip(reason)
    return chosen


@pytest.fixture
def token(method: Method, tmp_path: Path) -> Token:
    """A token with the CA's key."""
    del method  # or SoftHSM may not be there
    made = softhsm.make_token(tmp_path / "softhsm")
    made.add("ca-key", CA.key_pem, "a1")
    return made


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A CA directory without its key."""
    made = make_ca_directory(tmp_path / "ca", CA.certificate_pem, CA.key_pem)
    made.joinpath("ca.key").unlink()
    return made


@pytest.fixture(autouse=True)
def no_login_before() -> None:
    """As in a new process: no PIN was refused yet."""
    _LOGINS.clear()


Open = Callable[..., OpensslBackend]


@pytest.fixture
def opened(directory: Path, token: Token, method: Method, tmp_path: Path) -> Open:
    """The backend, with other settings if need be."""

    def opened(
        *, pin: str = PIN, uri: str = "", pkcs11: Pkcs11Settings | None = None, **settings: Any
    ) -> OpensslBackend:
        place = tmp_path / "pin"
        place.write_text(f"{pin}\n")
        table = pkcs11 or token.settings(method, Secret("file", str(place)))
        uri = uri or token.uri("ca-key")
        given = {"private_key": uri, "pkcs11": table, "timeout": timedelta(minutes=3), **settings}
        return OpensslBackend.from_settings(OpensslSettings(dir=directory, **given))

    return opened


def renewal(spec: CertificateSpec = SERVER) -> SignRequest:
    """A request to renew one of kubeadm's certificates."""
    return sign_request(LIVE[spec.name], spec, "ecdsa-p256", timedelta(days=30))


def rows(directory: Path) -> int:
    """How many certificates the CA has a record of."""
    return len(parse_index(directory.joinpath("index.txt").read_bytes()))


class TestConformance(BackendConformance):
    """The suite that every backend passes."""

    unsupported = frozenset({"collect", "close", "identity"})

    @pytest.fixture(scope="class")
    @classmethod
    def ca(cls) -> TestCA:
        """The CA whose key is in the token."""
        return CA

    @pytest.fixture(scope="class")
    @classmethod
    def live(cls) -> dict[str, x509.Certificate]:
        """The certificates to renew, by kubeadm's name."""
        return LIVE

    @pytest.fixture
    def backend(self, opened: Open) -> OpensslBackend:
        """A CA desk with an HSM."""
        return opened()

    @pytest.fixture
    def dead_backend(self, opened: Open, token: Token) -> OpensslBackend:
        """The HSM is away."""
        backend = opened()
        shutil.rmtree(token.directory / "tokens")
        return backend


@pytest.mark.parametrize("algorithm", ["rsa-2048", "ecdsa-p256", "ecdsa-p384"])
def test_signs_with_keys_of_each_kind(token: Token, opened: Open, directory: Path, algorithm: Any) -> None:
    """Each kind of key that kubeadm's CAs have works from a token; check says so before."""
    ca = TestCA.make(algorithm=algorithm)
    directory.joinpath("ca.crt").write_bytes(ca.certificate_pem)
    backend = opened(uri=token.add("another", ca.key_pem, "b2"))

    assert backend.check([SERVER]) == {}
    answers = backend.sign_many([renewal(spec) for spec in (SERVER, CLIENT, SERVER)])

    for answer in answers:
        assert isinstance(answer, Issued)
        answer.leaf.verify_directly_issued_by(ca.certificate)
    assert rows(directory) == 3


def test_one_login_for_a_chunk(opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An HSM is asked for its PIN once a process, and a process has no more CSRs than an HSM can sign in its time."""
    monkeypatch.setattr("backends.openssl.program.TokenKey.batch_size", 3)
    wrapper = program(tmp_path, f'echo run >> {tmp_path}/runs; exec $REAL "$@"')
    answers = opened(openssl=wrapper).sign_many([renewal() for _ in range(7)])
    assert all(isinstance(answer, Issued) for answer in answers)
    assert tmp_path.joinpath("runs").read_text().count("run") == 3


def test_a_bad_csr_fails_alone(opened: Open) -> None:
    """A bad CSR among good ones fails alone, with a token as with a file."""
    bad = tampered(renewal())
    first, second, third = opened().sign_many([renewal(), bad, renewal(CLIENT)])
    assert isinstance(first, Issued)
    assert isinstance(second, BackendRefusedError)
    assert isinstance(third, Issued)


# Each fault, and the message for it


@pytest.fixture(params=["sign", "check"])
def call(request: pytest.FixtureRequest) -> Callable[[OpensslBackend], object]:
    """Both ways of coming upon it."""
    ways: dict[str, Callable[[OpensslBackend], object]] = {
        "sign": lambda backend: backend.sign(renewal()),
        "check": lambda backend: backend.check([SERVER]),
    }
    return ways[request.param]


def reported(error: BackendError) -> str:
    """All that a person sees."""
    return f"{error} {error.hint} {error!r}"


class TestWithout:
    """Nothing is issued, the reason is named, and the PIN is in no text."""

    def test_the_right_pin(self, opened: Open, directory: Path, call: Callable[[OpensslBackend], object]) -> None:
        """A wrong PIN is a refusal, so that no retry locks the token; the right one works at once."""
        with pytest.raises(BackendRefusedError, match="PIN") as e:
            call(opened(pin="9999-wrong"))
        assert "9999-wrong" not in reported(e.value)
        assert rows(directory) == 0
        call(opened())

    def test_the_right_pin_for_three_cas(self, opened: Open, token: Token, tmp_path: Path) -> None:
        """Three CAs with their keys in one token cost one failed login, though they ask at the same time."""
        wrapper = program(tmp_path, f'case $1 in version) ;; *) echo run >> {tmp_path}/runs ;; esac; exec $REAL "$@"')
        uris = [token.uri("ca-key"), f"{token.uri('ca-key')};id=%a1", token.uri("another")]
        wrong = [opened(pin="9999-wrong", uri=uri, openssl=wrapper) for uri in uris]

        def refused(backend: OpensslBackend) -> str:
            with pytest.raises(BackendRefusedError, match="PIN") as e:
                backend.check([SERVER])
            return reported(e.value)

        with ThreadPoolExecutor(3) as pool:
            errors = list(pool.map(refused, wrong))
        assert tmp_path.joinpath("runs").read_text().count("run") == 1
        assert "9999-wrong" not in "".join(errors)

    def test_a_pin(self, opened: Open, tmp_path: Path, token: Token, method: Method) -> None:
        """A PIN that can't be read is no failed login: openssl is not started."""
        wrapper = program(tmp_path, f'case $1 in version) ;; *) touch {tmp_path}/started ;; esac; exec $REAL "$@"')
        for pin in (Secret("file", str(tmp_path / "nowhere")), Secret("env", "NOT_SET_ANYWHERE")):
            with pytest.raises(BackendRefusedError, match=re.escape(str(pin))):
                opened(pkcs11=token.settings(method, pin), openssl=wrapper).sign(renewal())
        assert not tmp_path.joinpath("started").exists()

    def test_the_token(
        self, opened: Open, directory: Path, token: Token, call: Callable[[OpensslBackend], object]
    ) -> None:
        """A token of that name is not there."""
        with pytest.raises(BackendError, match="token") as e:
            call(opened(uri=token.uri("ca-key").replace(token.label, "another")))
        assert PIN not in reported(e.value)
        assert rows(directory) == 0

    def test_the_key(
        self, opened: Open, directory: Path, token: Token, call: Callable[[OpensslBackend], object]
    ) -> None:
        """The token has no such key."""
        with pytest.raises(BackendRefusedError, match="no such key") as e:
            call(opened(uri=token.uri("another-key")))
        assert PIN not in reported(e.value)
        assert rows(directory) == 0

    def test_the_cas_own_key(
        self, opened: Open, directory: Path, token: Token, call: Callable[[OpensslBackend], object]
    ) -> None:
        """A key that is another CA's."""
        with pytest.raises(BackendRefusedError, match="found another's"):
            call(opened(uri=token.add("another", TestCA.make("other").key_pem, "b2")))
        assert rows(directory) == 0

    def test_the_module(
        self, opened: Open, tmp_path: Path, token: Token, method: Method, call: Callable[[OpensslBackend], object]
    ) -> None:
        """The module is not where the settings say, or is no such library."""
        good = token.settings(method, Secret("file", str(tmp_path / "pin")))
        junk = tmp_path / "junk.so"
        junk.write_text("no library")
        for module in (tmp_path / "nowhere.so", junk):
            settings = Pkcs11Settings(method=method, module=module, pin=good.pin, environment=good.environment)
            with pytest.raises(BackendError, match=re.escape(str(module))):
                call(opened(pkcs11=settings))

    def test_the_hsm(self, opened: Open, token: Token, call: Callable[[OpensslBackend], object]) -> None:
        """The module can't reach what it needs: it is asked again later, and signs when the HSM is back."""
        tokens = token.directory / "tokens"
        tokens.rename(token.directory / "away")
        with pytest.raises(BackendError) as e:
            call(opened())
        assert PIN not in reported(e.value)
        token.directory.joinpath("away").rename(tokens)
        call(opened())

    def test_the_engine_or_provider(
        self, opened: Open, tmp_path: Path, token: Token, method: Method, call: Callable[[OpensslBackend], object]
    ) -> None:
        """An openssl that can't reach tokens at all; the package that it lacks is named."""
        good = token.settings(method, Secret("file", str(tmp_path / "pin")))
        nothing = {**good.environment, "OPENSSL_ENGINES": str(tmp_path), "OPENSSL_MODULES": str(tmp_path)}
        settings = Pkcs11Settings(method=method, module=good.module, pin=good.pin, environment=nothing)
        with pytest.raises(BackendRefusedError, match=f"{method} pkcs11") as e:
            call(opened(pkcs11=settings))
        assert {"engine": "libengine-pkcs11-openssl", "provider": "pkcs11-provider"}[method] in str(e.value.hint)


def test_an_hsm_that_is_away_is_unavailable(opened: Open, token: Token) -> None:
    """The preflight tells an HSM that is away, which may be back later, from a wrong PIN, which is never retried."""
    shutil.rmtree(token.directory / "tokens")
    with pytest.raises(BackendUnavailableError):
        opened().check([SERVER])


def test_a_hanging_hsm_is_stopped(opened: Open, tmp_path: Path) -> None:
    """A module that never answers is stopped at the time limit."""
    wrapper = program(tmp_path, 'case $1 in version) exec $REAL "$@" ;; *) exec sleep 60 ;; esac')
    with pytest.raises(BackendUnavailableError, match="within"):
        opened(openssl=wrapper, timeout=timedelta(seconds=0.5)).sign(renewal())


def test_the_pin_is_on_no_command_line_and_in_no_environment(
    opened: Open, token: Token, method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other users see no PIN in the process, and of our environment only the variables that it needs."""
    monkeypatch.setenv("HSM_PIN", PIN)
    wrapper = program(
        tmp_path,
        f"""
        cat /proc/$$/cmdline >> {tmp_path}/cmdline
        cat /proc/$$/environ >> {tmp_path}/environ
        cat openssl.cnf >> {tmp_path}/files 2> /dev/null
        exec $REAL "$@"
        """,
    )
    backend = opened(pkcs11=token.settings(method, Secret("env", "HSM_PIN")), openssl=wrapper)
    backend.check([SERVER])
    backend.sign(renewal())

    seen = {file: tmp_path.joinpath(file).read_bytes() for file in ("cmdline", "environ", "files")}
    assert all(seen.values())
    assert not [file for file, text in seen.items() if PIN.encode() in text]
    assert b"HSM_PIN" not in seen["environ"]


def test_no_core_is_left_of_a_crash(opened: Open, tmp_path: Path) -> None:
    """openssl crashes when the engine finds no key; a core of it could hold the PIN."""
    wrapper = program(tmp_path, f'sleep 0.2; ulimit -c > {tmp_path}/limit; exec $REAL "$@"')
    opened(openssl=wrapper).sign(renewal())
    assert tmp_path.joinpath("limit").read_text().strip() == "0"


# The settings


@pytest.mark.parametrize(
    "uri",
    [
        "pkcs11:token=ca;object=key;pin-value=1234",
        "pkcs11:token=ca;object=key?pin-value=1234",
        "pkcs11:token=ca;object=key?pin-source=file:/etc/pin-1234",
        "pkcs11:token=ca;object=key?module-path=/1234.so",
        "pkcs11:token=ca;object=$1234",
        "pkcs11:token=ca;object=1 2 3 4 #1234",
        "pkcs11:token=ca\nobject=1234",
        "pkcs11:token=1234",
        "pkcs11:object=1234",
        "pkcs11:",
    ],
)
def test_refuses_a_uri(uri: str) -> None:
    """One with a PIN, one that leaves open which key, one that an openssl.cnf would read otherwise; none is shown."""
    table = Pkcs11Settings(method="engine", module=Path("/m.so"), pin=Secret("env", "PIN"))
    problems = list(OpensslSettings(dir=Path("/ca"), private_key=uri, pkcs11=table).problems())
    assert [problem.key for problem in problems] == ["private_key"]
    assert "1234" not in str(problems[0])
    good = "pkcs11:token=k8s%20ca;id=%a1;object=key;type=private"
    assert list(OpensslSettings(dir=Path("/ca"), private_key=good, pkcs11=table).problems()) == []


def test_a_token_needs_its_table_and_a_file_none() -> None:
    """A URI without the table, the table without a URI, and a passphrase for a token are named."""
    table = Pkcs11Settings(method="engine", module=Path("/m.so"), pin=Secret("env", "PIN"))
    uri = "pkcs11:token=ca;object=key"
    for settings, wrong in (
        (OpensslSettings(dir=Path("/ca"), private_key=uri), "pkcs11"),
        (OpensslSettings(dir=Path("/ca"), pkcs11=table), "pkcs11"),
        (OpensslSettings(dir=Path("/ca"), private_key="/ca.key", pkcs11=table), "pkcs11"),
        (OpensslSettings(dir=Path("/ca"), private_key=uri, pkcs11=table, passphrase=Secret("env", "X")), "passphrase"),
    ):
        assert [problem.key for problem in settings.problems()] == [wrong]


def test_a_site_config_may_name_a_token(directory: Path, token: Token, method: Method, tmp_path: Path) -> None:
    """The URI may stand in the site's openssl.cnf; how the token is reached stands in the settings, or it is refused."""
    place = tmp_path / "pin"
    place.write_text(PIN)
    site = tmp_path / "openssl.cnf"
    site.write_text(
        f"[ca]\ndefault_ca = desk\n[desk]\ncertificate = {directory}/ca.crt\ndatabase = {directory}/index.txt\n"
        f"new_certs_dir = {directory}/newcerts\nprivate_key = {token.uri('ca-key')}\n"
    )
    table = token.settings(method, Secret("file", str(place)))
    OpensslBackend.from_settings(OpensslSettings(config=site, pkcs11=table)).sign(renewal())
    with pytest.raises(SettingsError, match="pkcs11"):
        OpensslBackend.from_settings(OpensslSettings(config=site))


def test_the_example_settings_load() -> None:
    """`config/openssl/hsm.toml` can be used as it is: three CAs with three keys in one token."""
    settings = parse(EXAMPLE.read_text(encoding="utf-8"))
    backends = registry.configured(settings, settings.authorities)
    assert set(backends) == set(AUTHORITIES)


# The program


@pytest.mark.parametrize("method", softhsm.METHODS, indirect=True)
def test_renews_a_node_through_a_token(method: Method, tmp_path: Path) -> None:
    """All twelve certificates of a node, from three CAs with their keys in one token; then `doctor` is content."""
    pki = handmade_pki(tmp_path / "node", not_after=datetime.now(UTC) + timedelta(days=20))
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    token = softhsm.make_token(tmp_path / "softhsm")
    table = token.settings(method, Secret("file", bridge.secret("pin", f"{PIN}\n")))
    bridge.add("backend.desk", {"type": "openssl"})
    bridge.add("backend.desk.pkcs11", {"method": method, "module": str(table.module), "pin_file": table.pin.where})
    bridge.add("backend.desk.pkcs11.environment", table.environment)
    for number, name in enumerate(AUTHORITIES, 1):
        certificate, key = pki.ca_pem(name)
        directory = make_ca_directory(tmp_path / "desk" / name, certificate, key)
        directory.joinpath("ca.key").unlink()
        uri = token.add(name, key, f"{number:02}")
        bridge.add(f"authority.{name}", {"backend": "desk", "dir": str(directory), "private_key": uri})

    run = bridge.run("renew", "all")

    assert run.returncode == 0, run.stderr
    assert sum(rows(tmp_path / "desk" / name) for name in AUTHORITIES) == 12
    assert PIN not in run.stdout + run.stderr
    doctor = bridge.run("doctor")
    assert doctor.returncode == 0, doctor.stdout
    (bridge.directory / "desk-policy.toml").write_text(POLICY)
    at_a_desk = ("doctor", "--pki-dir", str(tmp_path / "none"), "--kubeconfig-dir", str(tmp_path / "none"))
    desk = bridge.run(*at_a_desk)
    assert (desk.returncode, "answers, and is the right CA" in desk.stdout) == (0, True), desk.stdout
    Path(table.pin.where).write_text("9999-wrong\n")
    locked = bridge.run(*at_a_desk)
    assert (locked.returncode, "failed login" in locked.stdout) == (1, True), locked.stdout
    refused = bridge.run("renew", "all")
    assert refused.returncode == 5
    assert "failed login" in refused.stderr
    assert not [secret for secret in (PIN, "9999-wrong") if secret in refused.stdout + refused.stderr]
