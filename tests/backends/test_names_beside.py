"""Names beside an empty CSR, by each kind of CA that can have them: a pod's request has no others."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from backends.cfssl import CfsslBackend
from backends.cfssl.settings import CfsslSettings, config_beside
from backends.cmp import CmpBackend, CmpSettings
from backends.exec import ExecBackend
from backends.exec.settings import ExecSettings
from backends.openssl import OpensslBackend
from backends.openssl.settings import OpensslSettings
from backends.vault import VaultBackend
from backends.vault.settings import VaultAuth, VaultSettings
from backends.vault.setup import role_beside
from bridge.contract import Backend, Issued, NamePatterns, Names, Secret, SetupRequest, SignRequest
from bridge.errors import BackendRefusedError, BackendUnavailableError, SettingsError
from bridge.pki import verify
from bridge.pki.certificates import pem
from bridge.pki.csr import key_pem
from bridge.pki.verify import Expectation
from bridge.specs import POD_SPECS, PODS
from tests.kit import cfssl, cmp, openbao
from tests.kit.gateways import csr_pem
from tests.kit.issuing import Signer
from tests.kit.opensslca import make_ca_directory

SPEC = POD_SPECS["peer"]
PATTERNS = NamePatterns(
    spec=SPEC, longest=timedelta(hours=24), uris=("spiffe://td/ns/*/sa/*",), dns=("*.svc",), common_names=("web*",)
)
ID = "spiffe://td/ns/shop/sa/web"


@pytest.fixture(scope="module")
def ca() -> Signer:
    """The pods' CA."""
    return Signer.make("pods", begin=datetime.now(UTC) - timedelta(days=1))


@contextlib.contextmanager
def _vault(ca: Signer, directory: Path) -> Iterator[Backend]:
    with openbao.dev_server() as bao:
        bao.add_ca("pki", pem(ca.certificate), key_pem(ca.key))
        bao.add_roles("pki", {"kubeadm-pod": role_beside(PATTERNS)})
        token = directory / "token"
        token.write_text(bao.root_token)
        yield VaultBackend.from_settings(VaultSettings(url=bao.url, auth=VaultAuth(token=Secret("file", str(token)))))


@contextlib.contextmanager
def _openssl(ca: Signer, directory: Path) -> Iterator[Backend]:
    make_ca_directory(directory / "ca", pem(ca.certificate), key_pem(ca.key))
    yield OpensslBackend.from_settings(OpensslSettings(dir=directory / "ca"))


@contextlib.contextmanager
def _cfssl(ca: Signer, directory: Path) -> Iterator[Backend]:
    config = config_beside(PODS, [PATTERNS], directory)
    cfssl.write_hmac_keys(config)
    with cfssl.serve(directory, pem(ca.certificate), key_pem(ca.key), config) as url:
        key = Secret("file", f"{directory}/keys/pods-{{usage}}.hex")
        yield CfsslBackend.from_settings(CfsslSettings(url=url, auth_key=key))


@contextlib.contextmanager
def _exec(ca: Signer, directory: Path) -> Iterator[Backend]:
    (directory / "ca.crt").write_bytes(pem(ca.certificate))
    (directory / "ca.key").write_bytes(key_pem(ca.key))
    program = directory / "program"
    program.write_text(_PROGRAM.format(directory=directory))
    program.chmod(0o755)
    yield ExecBackend.from_settings(ExecSettings(command=(str(program),), names_beside_csr=True))


@contextlib.contextmanager
def _cmp(ca: Signer, directory: Path) -> Iterator[Backend]:
    with cmp.registration_authority(directory / "ra") as ra:
        ra.add_ca("pods", pem(ca.certificate), key_pem(ca.key), days=1)
        secret = Secret("file", ra.mac()["secret_file"])
        yield CmpBackend.from_settings(
            CmpSettings(url=ra.url("pods"), mode="cr", reference=cmp.REFERENCE, secret=secret)
        )


_PROGRAM = """\
#!/bin/bash
# As a site may write it: the names are the variables', and nothing of the CSR but its key counts.
set -eu
cd {directory}
case $CERTMONGER_OPERATION in
  SUBMIT) ;;
  IDENTIFY) echo it; exit 0 ;;
  *) exit 6 ;;
esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
subject=/ critical=critical,
[ -z "$CA_BRIDGE_COMMON_NAME" ] || {{ subject=/CN=$CA_BRIDGE_COMMON_NAME; critical=; }}
sans=$(printf '%s\n' "$CA_BRIDGE_URIS" | sed '/./!d; s/^/URI:/'; printf '%s\n' "$CA_BRIDGE_DNS" | sed '/./!d; s/^/DNS:/')
printf 'keyUsage=critical,digitalSignature\nextendedKeyUsage=%s\nsubjectAltName=%s\n' \
  "$CA_BRIDGE_EKUS" "$critical$(printf '%s' "$sans" | tr '\n' ',')" >"$work/ext"
printf '%s\n' "$CERTMONGER_CSR" >"$work/csr"
openssl x509 -req -in "$work/csr" -CA ca.crt -CAkey ca.key -days 1 -extfile "$work/ext" -subj "$subject" \
  -set_serial "0x$(openssl rand -hex 16)" 2>"$work/said" || {{ cat "$work/said" >&2; exit 2; }}
"""


@pytest.fixture(
    scope="module",
    params=[
        _vault,
        _openssl,
        _exec,
        pytest.param(_cmp, marks=pytest.mark.kube("cmp-ra")),
        pytest.param(_cfssl, marks=pytest.mark.kube("cfssl")),
    ],
)
def backend(request: pytest.FixtureRequest, ca: Signer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """Set up as `ca-bridge setup TYPE --authority pods` prints it."""
    made: Callable[[Signer, Path], contextlib.AbstractContextManager[Backend]] = request.param
    with made(ca, tmp_path_factory.mktemp("ca")) as found:
        yield found


def asked(**names: object) -> SignRequest:
    """For a new key."""
    found = Names(**names)  # type: ignore[arg-type]
    return SignRequest(spec=SPEC, csr_pem=csr_pem([]), validity=timedelta(hours=23), names=found)


def proven(backend: Backend, ca: Signer, request: SignRequest) -> x509.Certificate:
    """The leaf, once it is proven to match its request."""
    answer = backend.sign(request)
    assert isinstance(answer, Issued)
    expected = Expectation(
        anchors=(ca.certificate,), anchor_name="pods.crt", now=datetime.now(UTC), min_validity=timedelta(hours=1)
    )
    return verify.check(answer, request, expected).leaf


def test_exactly_these_names(backend: Backend, ca: Signer) -> None:
    """A SPIFFE ID alone; with DNS names; with a CN: each answer passes the check, and begins less than 5 minutes ago."""
    assert backend.names_beside_csr
    for names in (
        {"uris": (ID,)},
        {"uris": (ID,), "dns": ("web.svc", "a.web.svc")},
        {"uris": (ID,), "common_name": "web-1"},
    ):
        leaf = proven(backend, ca, asked(**names))
        assert timedelta() <= datetime.now(UTC) - leaf.not_valid_before_utc < timedelta(minutes=4, seconds=50)
        assert leaf.not_valid_after_utc - leaf.not_valid_before_utc <= timedelta(hours=24, minutes=1)


def test_an_answer_with_other_names_is_refused(backend: Backend, ca: Signer) -> None:
    """The twin: what the CA signed for one is no answer for another, whose names or whose subject differ."""
    request = asked(uris=(ID,))
    answer = backend.sign(request)
    assert isinstance(answer, Issued)
    expected = Expectation(
        anchors=(ca.certificate,), anchor_name="pods.crt", now=datetime.now(UTC), min_validity=timedelta(hours=1)
    )
    for other in ({"uris": ("spiffe://td/ns/bank/sa/web",)}, {"uris": (ID, "spiffe://td/x")}, {"uris": ()},
                  {"uris": (ID,), "dns": ("web.svc",)}, {"uris": (ID,), "common_name": "web"}):  # fmt: skip
        wanted = SignRequest(spec=SPEC, csr_pem=request.csr_pem, validity=request.validity, names=Names(**other))
        assert verify.error_of(answer, wanted, expected) is not None, other
    assert verify.error_of(answer, request, expected) is None


def test_the_ca_has_nothing_to_complain_of(backend: Backend) -> None:
    """`check` finds role, profile and section right."""
    assert getattr(backend, "check")([SPEC]) == {}  # noqa: B009


def test_verbatim_can_not() -> None:
    """OpenBao's sign-verbatim ignores `uri_sans`, and says nothing about it."""
    settings = VaultSettings(url="http://127.0.0.1:1", mode="sign-verbatim", auth=VaultAuth(token=Secret("env", "X")))
    assert not VaultBackend.from_settings(settings).names_beside_csr


def test_openssl_takes_plain_names_alone(ca: Signer, tmp_path: Path) -> None:
    """Characters with a meaning in an openssl.cnf or in `-subj` are refused before a run; a twin is signed."""
    with _openssl(ca, tmp_path) as backend:
        for names in ({"uris": ("spiffe://td/a\nbasicConstraints=CA:TRUE",)}, {"dns": ("a,DNS:b",)},
                      {"uris": (ID,), "common_name": "web/O=system:masters"}, {"uris": ("spiffe://td/$ENV::HOME",)}):  # fmt: skip
            with pytest.raises(BackendRefusedError, match="plain characters"):
                backend.sign(asked(**names))
        proven(backend, ca, asked(uris=(ID,)))
        named = SignRequest(spec=SPEC, csr_pem=csr_pem([(x509.NameOID.COMMON_NAME, "x")]), validity=timedelta(hours=2),
                            names=Names(uris=(ID,)))  # fmt: skip
        with pytest.raises(BackendRefusedError, match="no names in this CSR"):
            backend.sign(named)


def test_a_name_of_two_lines_is_no_name_for_a_program(ca: Signer, tmp_path: Path) -> None:
    """The program would read two names; without the line break it is one, and signed."""
    with _exec(ca, tmp_path) as backend:
        for names in ({"uris": (f"{ID}\n{ID}x",)}, {"uris": (ID,), "dns": ("a.svc\nb.svc",)}):
            with pytest.raises(BackendRefusedError, match="printable characters"):
                backend.sign(asked(**names))
        proven(backend, ca, asked(uris=(ID,), dns=("a.svc",)))


def test_cmp_takes_plain_names_alone(tmp_path: Path) -> None:
    """Characters with a meaning in openssl's configuration or subject are refused before a run, as is no name at all."""
    (tmp_path / "secret").write_text("a secret of twenty letters")
    secret = Secret("file", str(tmp_path / "secret"))
    backend = CmpBackend.from_settings(CmpSettings(url="http://127.0.0.1:1", mode="cr", reference="x", secret=secret))
    for names in ({"uris": ("spiffe://td/a\nextendedKeyUsage=anyExtendedKeyUsage",)}, {"dns": ("a,DNS:b",)},
                  {"uris": (ID,), "common_name": "web/O=system:masters"}, {"uris": ("spiffe://td/$ENV::HOME",)}, {}):  # fmt: skip
        with pytest.raises(BackendRefusedError, match=r"plain characters|no name beside"):
            backend.sign(asked(**names))
    with pytest.raises(BackendUnavailableError):
        backend.sign(asked(uris=(ID,)))
    plain = CmpBackend.from_settings(CmpSettings(url="http://127.0.0.1:1", reference="x", secret=secret))
    assert not plain.names_beside_csr


def test_what_setup_says_to_a_cmp_servers_administrator() -> None:
    """The template's names, usages and longest life; a CSR as it is can't have them, and is refused."""
    wanted = SetupRequest(authority=PODS, certificates={}, validity=timedelta(days=1), node="cp1", cluster="prod",
                          settings={"mode": "cr"}, patterns=[PATTERNS])  # fmt: skip
    [found] = CmpBackend.setup(wanted)
    assert "\n#      pod: URI spiffe://td/ns/*/sa/*\n#      pod: DNS *.svc\n#      pod: CN web*\n" in found.text
    assert "at most 86400 s" in found.text
    with pytest.raises(SettingsError, match="mode"):
        CmpBackend.setup(dataclasses.replace(wanted, settings={}))


@pytest.mark.parametrize("name", ["pods", "the pods' CA; touch broken", "$(touch broken)", "a\ntouch broken"])
def test_what_setup_has_run_for_openssl_makes_the_settings_directory(tmp_path: Path, name: str) -> None:
    """Whatever its path is: a space or what means something to a shell stays a part of the name."""
    directory = tmp_path / name
    wanted = SetupRequest(authority=PODS, certificates={}, validity=timedelta(days=1), node="cp1", cluster="prod",
                          settings={"dir": directory}, patterns=[PATTERNS])  # fmt: skip
    [found] = OpensslBackend.setup(wanted)
    subprocess.run(["/bin/sh", "-c", found.text], check=True, cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert sorted(path.name for path in directory.iterdir()) == ["index.txt", "index.txt.attr", "newcerts"]
    shown = found.text.rpartition("\n#   dir = ")[2]
    assert tomllib.loads(f"dir = {shown}") == {"dir": str(directory)}


def test_what_setup_says_to_a_programs_author() -> None:
    """For exec: which names come in which variable, with which usages, and how long a certificate may live."""
    wanted = SetupRequest(authority=PODS, certificates={}, validity=timedelta(days=1), node="cp1", cluster="prod",
                          settings={}, patterns=[PATTERNS])  # fmt: skip
    [found] = ExecBackend.setup(wanted)
    assert found.name == "pods.txt"
    assert found.text.splitlines()[2:] == [
        "CA_BRIDGE_CERTIFICATE=pod: CA_BRIDGE_EKUS=serverAuth,clientAuth",
        "  CA_BRIDGE_VALIDITY_SECONDS: at most 86400",
        "  CA_BRIDGE_URIS: spiffe://td/ns/*/sa/*",
        "  CA_BRIDGE_DNS: *.svc",
        "  CA_BRIDGE_COMMON_NAME: web*",
    ]


def test_what_setup_prints_is_json() -> None:
    """cfssl gets JSON with a pattern that takes an empty CN."""
    profile = json.loads(json.dumps(config_beside(PODS, [PATTERNS])))["signing"]["profiles"]["peer"]
    assert profile["name_whitelist"] == r"^(|spiffe://td/ns/.*/sa/.*|.*\.svc|web.*)$"
