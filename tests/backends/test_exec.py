"""Programs with certmonger's helper contract: its own helpers, a site's scripts, and all that scripts do wrong."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, pkcs7

from backends.exec import ExecBackend, certificates_of, cookie_of, display_text
from backends.exec.settings import ENVIRONMENT, ExecSettings
from bridge.ca import registry
from bridge.contract import Issued, Pending, SetupRequest, SignRequest
from bridge.errors import BackendError, BackendRefusedError, BackendUnavailableError, LocalFileError, SettingsError
from bridge.pki.certificates import attributes, extended_key_usages, san_counts
from bridge.settings.load import parse
from bridge.specs import AUTHORITIES, SPECS
from bridge.system.waiting import wait_until
from bridge.testing import BackendConformance, TestCA, sign_request
from tests.kit import dogtag, exec_programs
from tests.kit.cas import Bridge, live_certificates
from tests.kit.exec_programs import program
from tests.kit.issuing import Signer, odd_certificates
from tests.kit.measured import is_running
from tests.kit.pki import handmade_pki

CA = TestCA.make()
SIGNER = Signer(certificate=CA.certificate, key=CA.key)
LIVE = CA.leaf(SPECS["apiserver"])
REQUEST = sign_request(LIVE, SPECS["apiserver"], "ecdsa-p256", timedelta(days=365))
PAGE = Path(__file__).parents[2] / "docs/exec.md"
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user; run the tests as root")
CERTMONGER = pytest.mark.skipif(
    exec_programs.helper("local-submit") is None, reason="install the Debian package certmonger"
)


def opened(*command: object, timeout_seconds: float = 180, **settings: Any) -> ExecBackend:
    """With a time limit that a stalled machine keeps."""
    words = tuple(map(str, command))
    made = ExecSettings(command=words, timeout=timedelta(seconds=timeout_seconds), **settings)
    return ExecBackend.from_settings(made)


def answer_of(request: SignRequest = REQUEST) -> x509.Certificate:
    now = datetime.now(UTC)
    return SIGNER.issue(request, begin=now - timedelta(minutes=5), end=now + timedelta(days=365)).leaf


def pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(one.public_bytes(Encoding.PEM) for one in certificates)


def printing(directory: Path, output: bytes, status: int = 0) -> ExecBackend:
    """A program that prints just that."""
    (directory / "output").write_bytes(output)
    return opened(program(directory / "printing", f'cat "{directory}/output"; exit {status}'))


class TestConformance(BackendConformance):
    """The suite that every backend passes, with a site's script over openssl."""

    unsupported = frozenset({"sign_many", "identity", "close"})

    @pytest.fixture(scope="class")
    @classmethod
    def script(cls, ca: TestCA, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """With the key of the suite's CA."""
        return exec_programs.site_ca(tmp_path_factory.mktemp("site") / "ca", ca.certificate_pem, ca.key_pem)

    @pytest.fixture
    def backend(self, script: Path) -> ExecBackend:
        """Runs the script."""
        return opened(script)

    @pytest.fixture
    def dead_backend(self, tmp_path: Path) -> ExecBackend:
        """A script whose CA is down."""
        return opened(program(tmp_path / "dead", 'echo "no route to the CA"; exit 3'))


@CERTMONGER
class TestLocalSubmit(TestConformance):
    """certmonger's own local-submit, behind a script that adds the usages; its certificates end when its CA does."""

    validity = timedelta(days=300)

    @pytest.fixture(scope="session")
    @classmethod
    def ca(cls) -> TestCA:
        """One that ends when the suite's certificates are to end; with half a year left local-submit makes another."""
        return TestCA.make(days=cls.validity.days)

    @pytest.fixture(scope="class")
    @classmethod
    def script(cls, ca: TestCA, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """local-submit with the suite's CA."""
        place = tmp_path_factory.mktemp("local")
        exec_programs.local_submit_ca(place / "ca", ca.certificate_pem, ca.key_pem)
        return exec_programs.local_submit_with_usages(place / "local-submit", place / "ca")


# --- a program's input --------------------------------------------------------------------------------------------


def reported(directory: Path, request: SignRequest, **settings: Any) -> dict[str, str]:
    """The environment of a program that is asked for this certificate, and nothing else that it could tell."""
    script = program(directory / "tell", f'env -0 >"{directory}/environment"; echo cookie; exit 1')
    opened(script, **settings).sign(request)
    entries = (directory / "environment").read_bytes().decode().split("\0")
    shells_own = {"PWD", "OLDPWD", "SHLVL", "_"}
    return {
        name: value for name, _, value in (entry.partition("=") for entry in entries if entry) if name not in shells_own
    }


def test_a_program_gets_exactly_this(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """certmonger's variables, ours, the settings' and a fixed few; nothing of what is around ca-bridge itself."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "never to be seen")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/never")
    request = replace(REQUEST, validity=timedelta(days=89, hours=1))
    spki = request.csr.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    found = reported(
        tmp_path, request, environment={"SITE": "x"}, profile="{node}-{usage}", node="cp-7", timeout_seconds=9
    )
    assert set(found.pop("CERTMONGER_REQ_HOSTNAME").split("\n")) >= {"kubernetes", "*.wild.example.com"}
    assert set(found.pop("CERTMONGER_REQ_IP_ADDRESS").split("\n")) >= {"10.96.0.1", "2001:db8::7"}
    assert found.pop("HOME").startswith("/")
    assert found == {
        **ENVIRONMENT,
        "SITE": "x",
        "CERTMONGER_OPERATION": "SUBMIT",
        "CERTMONGER_CSR": request.csr_pem.decode(),
        "CERTMONGER_CA_PROFILE": "cp-7-server",
        "CERTMONGER_CA_NICKNAME": "ca",
        "CERTMONGER_REQ_SUBJECT": "CN=kube-apiserver",
        "CERTMONGER_SPKI": "".join(spki.splitlines()[1:-1]),
        "CERTMONGER_KEY_TYPE": "EC",
        "CA_BRIDGE_AUTHORITY": "ca",
        "CA_BRIDGE_CERTIFICATE": "apiserver",
        "CA_BRIDGE_NODE": "cp-7",
        "CA_BRIDGE_USAGE": "server",
        "CA_BRIDGE_EKUS": "serverAuth",
        "CA_BRIDGE_VALIDITY_SECONDS": str(89 * 86400 + 3600),
        "CA_BRIDGE_DAYS": "90",
        "CA_BRIDGE_TIMEOUT_SECONDS": "9",
        "CA_BRIDGE_REPLACES": pem(LIVE).decode(),
    }


def test_exact_usages_and_no_names_where_there_are_none(tmp_path: Path) -> None:
    """A peer certificate has both EKUs, a client certificate no variable for SANs, an RSA key its type."""
    peer = sign_request(CA.leaf(SPECS["etcd-peer"]), SPECS["etcd-peer"], "rsa-2048", timedelta(days=1))
    admin = sign_request(CA.leaf(SPECS["admin.conf"]), SPECS["admin.conf"], "ecdsa-p256", timedelta(days=1))
    found = reported(tmp_path, peer)
    assert (found["CA_BRIDGE_EKUS"], found["CERTMONGER_KEY_TYPE"]) == ("serverAuth,clientAuth", "RSA")
    assert found["CERTMONGER_CA_NICKNAME"] == "etcd-ca"
    found = reported(tmp_path, admin)
    assert found["CERTMONGER_REQ_SUBJECT"] == "CN=kubernetes-admin,O=kubeadm:cluster-admins"
    assert not {name for name in found if name.startswith("CERTMONGER_REQ_") and name != "CERTMONGER_REQ_SUBJECT"}


def test_the_certificate_being_renewed_is_not_certmongers_variable(tmp_path: Path) -> None:
    """cepces-submit turns to endpoints that want the old key where CERTMONGER_CERTIFICATE is set."""
    assert "CERTMONGER_CERTIFICATE" not in reported(tmp_path, REQUEST)


def test_a_program_has_nothing_to_read_and_a_session_of_its_own(tmp_path: Path) -> None:
    """It can't ask on a terminal, and its files are its own."""
    place = tmp_path / "reported"
    script = program(
        tmp_path / "tell",
        f'exec >"{place}"; read line || echo "nothing to read"; cut -d" " -f6 /proc/$$/stat; echo $$; umask; pwd; set -- /proc/$$/fd/*; echo $#; exit 3',
    )
    with pytest.raises(BackendUnavailableError):
        opened(script).sign(REQUEST)
    nothing, session, pid, umask, directory, descriptors = place.read_text().split("\n")[:6]
    assert (nothing, session, umask, directory) == ("nothing to read", pid, "0077", "/")
    assert int(descriptors) <= 5  # the three, and the shell's own of its script and of the directory that it lists


def enterable(directory: Path) -> None:
    """For other users than the one that runs the tests: pytest's directories are for that one alone."""
    system = Path(tempfile.gettempdir())
    for place in (directory, *directory.parents):  # with several workers they are one level deeper
        if place == system:
            break
        place.chmod(0o755)


@AS_ROOT
def test_a_program_runs_as_the_settings_user(tmp_path: Path) -> None:
    """With that user's number, groups and home, and no other's; a twin without `user` runs as we do."""
    enterable(tmp_path)
    script = program(tmp_path / "tell", 'echo "$(id -u):$(id -G):$HOME"; exit 1')
    as_nobody = subprocess.run(["id", "-G", "nobody"], capture_output=True, text=True, check=True).stdout.strip()
    for user, expected in (("nobody", f"65534:{as_nobody}:/nonexistent"), ("", "0:0:/root")):
        answer = opened(script, user=user).sign(REQUEST)
        assert isinstance(answer, Pending)
        assert answer.reference == expected


# --- answers --------------------------------------------------------------------------------------------------------


def pkcs7_pem(*certificates: x509.Certificate) -> bytes:
    return pkcs7.serialize_certificates(list(certificates), Encoding.PEM)


def as_json(leaf: x509.Certificate, *others: x509.Certificate) -> bytes:
    text = [{"nickname": "n", "certificate": pem(one).decode()} for one in others]
    return json.dumps({"certificate": pem(leaf).decode(), "chain": text[:1], "roots": text[1:]}).encode()


FORMS: dict[str, Callable[[x509.Certificate, x509.Certificate], bytes]] = {
    "PEM": pem,
    "PEM, the CA first": lambda leaf, ca: pem(ca, leaf),
    "PEM, words before it": lambda leaf, ca: b"Certificate:\n  Data: \xff\n" + pem(leaf) + b"and\n" + pem(ca),
    "PEM, CRLF": lambda leaf, ca: pem(leaf, ca).replace(b"\n", b"\r\n"),
    "PKCS#7, PEM": lambda leaf, ca: pkcs7_pem(ca, leaf),
    "PKCS#7, DER": lambda leaf, ca: pkcs7.serialize_certificates([ca, leaf], Encoding.DER),
    "JSON": as_json,
    "JSON, roots": lambda leaf, ca: as_json(leaf, ca, ca),
    "JSON, pretty": lambda leaf, ca: b"\n" + json.dumps(json.loads(as_json(leaf, ca)), indent=2).encode(),
}


@pytest.mark.parametrize("form", FORMS)
def test_takes_certificates_in_every_form_of_certmongers(tmp_path: Path, form: str) -> None:
    """The leaf is the one with the CSR's key, the others come along, in whatever order they were printed."""
    leaf = answer_of()
    answer = printing(tmp_path, FORMS[form](leaf, CA.certificate)).sign(REQUEST)
    assert isinstance(answer, Issued)
    assert answer.leaf == leaf
    assert set(answer.intermediates) == {CA.certificate}


def test_takes_a_single_certificate_in_der(tmp_path: Path) -> None:
    """With no chain there is nothing else in it."""
    leaf = answer_of()
    assert printing(tmp_path, leaf.public_bytes(Encoding.DER)).sign(REQUEST) == Issued(leaf=leaf)


#: An enveloped PKCS#7, as scep-submit returns it: for the node's key, which no backend has.
ENVELOPED = b"-----BEGIN PKCS7-----\nMBEGCSqGSIb3DQEHA6AEMAICAQA=\n-----END PKCS7-----\n"
ODD = odd_certificates(CA.certificate)
NO_CERTIFICATES: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "found nothing"),
    "blank lines": (lambda: b"\n \n", "found nothing"),
    "words": (lambda: b"issued, see your mail\n", "no certificate in PEM, DER or PKCS#7"),
    "another key": (
        lambda: pem(answer_of(sign_request(LIVE, REQUEST.spec, "ecdsa-p256", REQUEST.validity))),
        "1 for other keys",
    ),
    "the CA's alone": (lambda: pem(CA.certificate), "1 for other keys"),
    "cut off": (lambda: pem(answer_of())[:-40], "has no end"),
    "half of a block": (lambda: pem(answer_of()).replace(b"MII", b"MI", 1), "PEM block 1"),
    "a block that is not base64": (lambda: pem(answer_of()).replace(b"\nMII", b"\n!!!", 1), "not base64"),
    "DER, cut off": (lambda: answer_of().public_bytes(Encoding.DER)[:-1], "no certificate in PEM, DER or PKCS#7"),
    "enveloped for the node's key": (lambda: ENVELOPED, "no certificate in PEM, DER or PKCS#7"),
    "a private key": (lambda: CA.key_pem, "no PEM block of type CERTIFICATE"),
    "a CSR": (lambda: REQUEST.csr_pem, "no PEM block of type CERTIFICATE"),
    "HTML": (lambda: b"<html>504 Gateway Time-out</html>", "no certificate in PEM, DER or PKCS#7"),
    "JSON of another kind": (lambda: b'{"error": "no"}', "JSON without"),
    "JSON that is cut off": (lambda: as_json(answer_of())[:-9], "JSON without"),
    "JSON with numbers": (lambda: b'{"certificate": 7}', "no text"),
    "JSON with a chain of another kind": (lambda: b'{"certificate": "x", "chain": 7}', "JSON without"),
    "JSON without end": (lambda: b'{"certificate":' * 50_000, "JSON without"),
}


@pytest.mark.parametrize("form", NO_CERTIFICATES)
def test_status_0_without_our_certificate_is_refused(tmp_path: Path, form: str) -> None:
    """The message says what was found in its place."""
    output, found = NO_CERTIFICATES[form]
    with pytest.raises(BackendRefusedError, match=re.escape(found)) as e:
        printing(tmp_path, output()).sign(REQUEST)
    assert "wanted a certificate for the CSR's key" in str(e.value)


def test_spoilt_answers_are_refused_or_taken() -> None:
    """A damaged answer is a certificate for our key, one for another key, or an error of ours."""
    random = Random(12)  # noqa: S311 (the same each time)
    leaf = answer_of()
    for form in FORMS.values():
        good = form(leaf, CA.certificate)
        for _ in range(60):
            spoilt = bytearray(good)
            for _ in range(random.choice((1, 1, 5))):
                spoilt[random.randrange(len(spoilt))] = random.randrange(256)
            with contextlib.suppress(ValueError):
                found = certificates_of(bytes(spoilt[: random.choice((len(spoilt), random.randrange(9999)))]))
                assert all(one.subject is not None for one in found)
            with contextlib.suppress(ValueError):
                assert "\0" not in cookie_of(bytes(spoilt))
            assert display_text(bytes(spoilt)).isprintable()


@pytest.mark.parametrize("what", ODD)
def test_odd_certificates_are_an_error_of_ours(tmp_path: Path, what: str) -> None:
    """Kinds that the library refuses in its own ways, when they are loaded or later."""
    backend = printing(tmp_path, ODD[what])
    with pytest.raises(BackendRefusedError):
        backend.sign(REQUEST)
    with contextlib.suppress(BackendRefusedError):
        assert len(backend.issuers()) == 1


# --- what is to come later ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "status", "cookie"),
    [
        (b"ticket-17\n", 1, "ticket-17"),
        (b"17,https://ca.example/CES", 1, "17,https://ca.example/CES"),
        (b"a\n\n \nb\n", 1, "a\nb"),
        (b"3600\nticket-17\n", 5, "ticket-17"),
        (b"0\nstate=check&requestId=7", 5, "state=check&requestId=7"),
        (b"5\n\na\nb\n", 5, "a\nb"),
    ],
)
def test_a_cookie_is_kept_as_certmonger_keeps_it(tmp_path: Path, output: bytes, status: int, cookie: str) -> None:
    """A line's end and blank lines are no part of it; a poll gets it back, byte for byte."""
    backend = printing(tmp_path, output, status)
    answer = backend.sign(REQUEST)
    assert isinstance(answer, Pending)
    assert answer.reference == cookie
    (tmp_path / "leaf").write_bytes(pem(answer_of()))
    poll = f'printf %s "$CERTMONGER_CA_COOKIE" >"{tmp_path}/cookie"; [ "$CERTMONGER_OPERATION" = POLL ] && cat "{tmp_path}/leaf"'
    assert isinstance(opened(program(tmp_path / "poll", poll)).collect(REQUEST, answer.reference), Issued)
    assert (tmp_path / "cookie").read_text() == cookie


def test_who_waits_tells_the_operator_what_for(tmp_path: Path) -> None:
    """The seconds, the cookie and what stands on standard error; nothing of it steers a terminal."""
    script = program(tmp_path / "wait", r'printf "3600\nticket\t17\n"; printf "\033[31mapprover: \r\nbob" >&2; exit 5')
    answer = opened(script).sign(REQUEST)
    assert isinstance(answer, Pending)
    assert answer.note == (
        f'{script} waits, and is to be asked again in 3600 s; its cookie: "ticket 17", '
        'on standard error: "[31mapprover: bob"'
    )


def test_a_poll_gets_all_that_the_submission_got(tmp_path: Path) -> None:
    """Beside operation and cookie nothing differs, as with certmonger."""
    script = program(tmp_path / "tell", f'env -0 >"{tmp_path}/$CERTMONGER_OPERATION"; echo next; exit 1')
    backend = opened(script)
    backend.sign(REQUEST)
    backend.collect(REQUEST, "ticket")
    submitted, polled = (set((tmp_path / name).read_text().split("\0")) for name in ("SUBMIT", "POLL"))
    assert polled - submitted == {"CERTMONGER_OPERATION=POLL", "CERTMONGER_CA_COOKIE=ticket"}
    assert submitted - polled == {"CERTMONGER_OPERATION=SUBMIT"}


@pytest.mark.parametrize(
    ("output", "status", "found"),
    [
        (b"a\0b\n", 1, "a NUL character"),
        (b"\xff\xfe\n", 1, "bytes that are no UTF-8"),
        (b"x" * 131_060, 1, "a cookie of more than"),
        (b"", 5, "no line with the seconds"),
        (b"soon\nticket\n", 5, '"soon" in the place of the seconds'),
        (b"-5\nticket\n", 5, '"-5" in the place of the seconds'),
        (b"60\n\n", 5, "no cookie after the seconds"),
        (b"60", 5, "no cookie after the seconds"),
    ],
)
def test_a_cookie_that_can_not_be_given_back_is_refused(tmp_path: Path, output: bytes, status: int, found: str) -> None:
    """At once, and not when it is asked for."""
    with pytest.raises(BackendRefusedError, match=re.escape(found)):
        printing(tmp_path, output, status).sign(REQUEST)


def test_the_longest_cookie_comes_back(tmp_path: Path) -> None:
    """One byte less than what is refused."""
    longest = 131_071 - len("CERTMONGER_CA_COOKIE=")
    answer = printing(tmp_path, b"x" * longest, 1).sign(REQUEST)
    assert isinstance(answer, Pending)
    count = program(tmp_path / "count", 'echo "${#CERTMONGER_CA_COOKIE}"; exit 1')
    counted = opened(count).collect(REQUEST, answer.reference)
    assert isinstance(counted, Pending)
    assert counted.reference == str(longest)


# --- what goes wrong ------------------------------------------------------------------------------------------------

TRACEBACK = "#!/usr/bin/python3\nraise KeyError('no such template')"
WRONG: dict[str, tuple[str, type[BackendError], str, str]] = {
    "a Python traceback": (TRACEBACK, BackendUnavailableError, "KeyError: 'no such template'", "has a cookie"),
    "grep that finds nothing": ("grep -q x /dev/null", BackendUnavailableError, "status 1 (wait, but there is no cookie)", "most broken"),
    "a blank line and 1": ("echo; exit 1", BackendUnavailableError, "printed nothing", "most broken"),
    "no": ('echo "names not allowed"; exit 2', BackendRefusedError, 'status 2 (refused), printed: "names not allowed"', "shell"),
    "no, and nothing more": ("exit 2", BackendRefusedError, "status 2 (refused), printed nothing", "shell"),
    "an unset variable": ("set -u; echo $nowhere", BackendRefusedError, "nowhere: parameter not set", "shell"),
    "a syntax error": ("if", BackendRefusedError, "Syntax error", "shell"),
    "the CA is down": ('echo "Error 7 connecting"; exit 3', BackendUnavailableError, '(the CA can\'t be reached), printed: "Error 7 connecting"', "does the CA run"),
    "not configured": ('echo "usage: …"; exit 4', BackendRefusedError, "status 4 (not configured)", "lacks settings"),
    "SUBMIT is unknown": ("exit 6", BackendRefusedError, "status 6 (operation not supported)", "has to know SUBMIT"),
    "SCEP": ("exit 16", BackendRefusedError, "status 16 (SCEP data)", "private key"),
    "another key": ("exit 17", BackendRefusedError, "status 17 (wants a new key)", "rules on keys"),
    "a file without x": ("/etc/passwd", BackendRefusedError, "status 126 (not executable)", "look into the script"),
    "a missing command": ("no-such-command", BackendRefusedError, "status 127 (command not found)", "PATH"),
    "curl's own status": ("exit 7", BackendRefusedError, "status 7, printed nothing", "no such status"),
    "timeout(1)'s own status": ("timeout 0.1 sleep 600", BackendRefusedError, "status 124, printed nothing", "no such status"),
    "killed": ("kill -9 $$", BackendUnavailableError, "was ended by signal 9", ""),
    "crashed": ("kill -SEGV $$", BackendUnavailableError, "was ended by signal 11", ""),
    "endless output": ("yes", BackendRefusedError, "printed more than 1 MiB", ""),
    "endless words": ("yes >&2", BackendRefusedError, "printed more than 1 MiB", ""),
    "output that is too long": ("head -c 1048577 /dev/zero", BackendRefusedError, "printed more than 1 MiB", ""),
    "no end": ("echo working; sleep 3600", BackendUnavailableError, 'still running after 3 s, and was killed, printed: "working"', "`timeout`"),
    "no end, with signals ignored": ("trap '' HUP INT TERM; while :; do sleep 1; done", BackendUnavailableError, "still running after 3 s", "`timeout`"),
    "an unknown interpreter": ("#!/no/such/interpreter\n", BackendRefusedError, "No such file or directory", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.usefixtures("failure_is_counted")
def test_each_failure_says_what_the_program_did(tmp_path: Path, case: str) -> None:
    """Status, everything it printed, and what to do; only what may pass is tried again."""
    text, kind, message, hint = WRONG[case]
    script = program(tmp_path / "wrong", text)

    def failure() -> BackendError:
        with pytest.raises(kind) as e:
            opened(script, timeout_seconds=3 if "no end" in case else 180).sign(REQUEST)
        return e.value

    # one that is killed before it has begun has printed nothing
    is_told = "no end" not in case or "printed" not in message
    error = wait_until(
        failure, lambda one: is_told or "printed nothing" not in str(one), timedelta(minutes=3), pause_seconds=0
    )
    assert message in str(error)
    assert str(error).startswith(f"exec: {script}: ")
    assert hint in error.hint


def test_what_is_printed_is_collapsed_and_cut(tmp_path: Path) -> None:
    """Its beginning of standard output, the end of standard error, and nothing that steers a terminal."""
    script = program(
        tmp_path / "long",
        r'printf "first\033[2J\a \n\n second "; head -c 9999 /dev/zero | tr "\0" a; echo last; seq 9999 >&2; exit 2',
    )
    with pytest.raises(BackendRefusedError) as e:
        opened(script).sign(REQUEST)
    text = str(e.value)
    assert 'printed: "first [2J second aaa' in text
    assert 'a…", on standard error: "…' in text
    assert text.endswith(' 9998 9999"')
    assert len(text) < 1000
    assert text.isprintable()


def _ends(pid: int) -> bool:
    end = time.monotonic() + 120
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not is_running(pid)


@pytest.mark.parametrize("ending", ["exit 3", "wait"])
def test_nothing_that_it_started_outlives_it(tmp_path: Path, ending: str) -> None:
    """Whether it ends by itself or at its time limit, its children are killed, though they ignore signals."""
    child = f"(trap '' HUP INT TERM; echo $$ >/dev/null; exec sleep 3600) & echo $! >\"{tmp_path}/child\"; {ending}"
    begun, parent, end = tmp_path / "child", program(tmp_path / "parent", child), time.monotonic() + 180
    while not (begun.exists() and begun.read_text()):  # it may be killed before it has begun
        assert time.monotonic() < end
        with pytest.raises(BackendUnavailableError):
            opened(parent, timeout_seconds=3).sign(REQUEST)
    pid = int(begun.read_text())
    try:
        assert _ends(pid)
    finally:
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)


def test_a_child_that_keeps_the_output_open_is_not_waited_for(tmp_path: Path) -> None:
    """The answer counts when the program has ended, long before the time limit; what came late is no part of it."""
    (tmp_path / "leaf").write_bytes(pem(answer_of()))
    script = program(tmp_path / "parent", f'(sleep 3600; echo late) & cat "{tmp_path}/leaf"')
    begin = time.monotonic()
    assert isinstance(opened(script, timeout_seconds=600).sign(REQUEST), Issued)
    assert time.monotonic() - begin < 300


def test_more_than_a_pipe_holds(tmp_path: Path) -> None:
    """Output of more than a pipe holds is read while it runs."""
    filler = b"x" * 79 + b"\n"
    answer = printing(tmp_path, filler * 10_000 + pem(answer_of())).sign(REQUEST)
    assert isinstance(answer, Issued)


def test_a_csr_that_no_variable_holds_is_refused(tmp_path: Path) -> None:
    """The kernel's limit is named, and not the program."""
    script = program(tmp_path / "never", "exit 3")
    with pytest.raises(BackendRefusedError, match="Argument list too long") as e:
        opened(script).collect(REQUEST, "x" * 131_072)
    assert "131071 bytes" in e.value.hint


# --- whose program it is --------------------------------------------------------------------------------------------


def refused(path: Path, message: str, hint: str = "") -> None:
    with pytest.raises(LocalFileError, match=re.escape(message)) as e:
        opened(path).sign(REQUEST)
    assert hint in e.value.hint


def test_a_program_that_others_can_change_is_not_run(tmp_path: Path) -> None:
    """A program is not run if others can change it, or can put another in its place; the twin is run."""
    directory = tmp_path / "bin"
    directory.mkdir(mode=0o755)
    script = program(directory / "helper", f'echo ran >>"{tmp_path}/ran"; exit 3')
    for place, mode in ((script, 0o775), (script, 0o757), (directory, 0o777), (directory, 0o775)):
        before = place.stat().st_mode & 0o7777
        place.chmod(mode)
        kind = "directory" if place.is_dir() else "file"
        refused(
            script,
            f"{place}: wanted a {kind} that only its owner can write to, found mode 0{mode:o}",
            f"chmod go-w {place}",
        )
        place.chmod(before)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(BackendUnavailableError):
        opened(script).sign(REQUEST)
    assert (tmp_path / "ran").exists()


@AS_ROOT
def test_a_program_of_another_user_is_not_run(tmp_path: Path) -> None:
    """Unless it is the user that runs it; a link of another's is as bad as a file."""
    script = program(tmp_path / "helper", "exit 3")
    link = tmp_path / "link"
    link.symlink_to(script)
    os.chown(link, 12345, 12345, follow_symlinks=False)
    refused(link, f"{link}: wanted it to belong to root, found user 12345", f"chown -h 0 {link}")
    os.chown(script, 12345, 12345)
    refused(script, f"{script}: wanted it to belong to root, found user 12345")
    nobody = pwd.getpwnam("nobody")
    os.chown(script, nobody.pw_uid, nobody.pw_gid)
    enterable(tmp_path)
    with pytest.raises(BackendUnavailableError):
        opened(script, user="nobody").sign(REQUEST)


def test_a_link_to_a_program_that_others_can_change_is_not_run(tmp_path: Path) -> None:
    """The whole path counts, links within directories included; the twin is run."""
    open_place = tmp_path / "open"
    open_place.mkdir()
    program(open_place / "helper", "exit 3")
    (tmp_path / "safe").symlink_to("open")
    link = tmp_path / "link"
    link.symlink_to("safe/../safe/helper")
    with pytest.raises(BackendUnavailableError):
        opened(link).sign(REQUEST)
    open_place.chmod(0o777)
    refused(link, f"{open_place}: wanted a directory that only its owner can write to")


def test_what_is_no_program_is_named(tmp_path: Path) -> None:
    """A file that is missing, not executable, without its first line, a directory, or a circle of links is named."""
    refused(tmp_path / "nowhere", "can't be run: No such file or directory", "`command` begins with its path")
    script = program(tmp_path / "plain", "exit 3")
    script.chmod(0o644)
    refused(script, "could not be started: Permission denied", "is it executable")
    script.write_bytes(b"\x7fELF nothing of the kind")
    script.chmod(0o755)
    refused(script, "could not be started: Exec format error", "#!/bin/sh")
    refused(tmp_path, "found something else than a regular file")
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    refused(tmp_path / "a", "Too many levels of symbolic links")


# --- before anything is signed --------------------------------------------------------------------------------------

SERVERS = [SPECS["apiserver"], SPECS["etcd-peer"]]


def asked_before(directory: Path, **answers: str) -> ExecBackend:
    """A program that answers these operations, and ends with 6 for others."""
    cases = "\n".join(f"{operation.replace('_', '-')}) {text} ;;" for operation, text in answers.items())
    return opened(program(directory / "asked", f"case $CERTMONGER_OPERATION in\n{cases}\n*) exit 6 ;;\nesac"))


def test_a_program_that_tells_nothing_is_not_in_the_way(tmp_path: Path) -> None:
    """Status 6 is an answer; there are no certificates to compare then."""
    backend = asked_before(tmp_path)
    assert backend.check(SERVERS) == {}
    assert backend.issuers() == []


def test_a_profile_that_the_program_does_not_have_is_found(tmp_path: Path) -> None:
    """`check` names a profile that the program does not list; commas and line ends separate the list."""
    backend = asked_before(tmp_path, GET_SUPPORTED_TEMPLATES='printf "client, server\\n\\nother"')
    found = backend.check(SERVERS)
    assert list(found) == ["etcd-peer"]
    assert str(found["etcd-peer"][0]) == "profile: wanted peer among the program's, got client, server, other"


def test_variables_that_are_never_set_are_found(tmp_path: Path) -> None:
    """A helper that needs a Kerberos principal can't be served; one that the settings name can."""
    needs = "echo CERTMONGER_CA_PROFILE; echo CERTMONGER_REQ_PRINCIPAL"
    backend = asked_before(tmp_path, GET_NEW_REQUEST_REQUIREMENTS=needs)
    found = backend.check(SERVERS)
    assert list(found) == ["apiserver", "etcd-peer"]
    assert "CERTMONGER_REQ_PRINCIPAL" in str(found["apiserver"][0])
    named = opened(tmp_path / "asked", environment={"CERTMONGER_REQ_PRINCIPAL": "host/cp-1@CORP.EXAMPLE"})
    assert named.check(SERVERS) == {}


def test_optional_answers_may_be_refused(tmp_path: Path) -> None:
    """A program that keeps its list of profiles from this client violates nothing; a CA that is down gives no answer."""
    refuses = asked_before(tmp_path, GET_SUPPORTED_TEMPLATES="exit 2", FETCH_ROOTS="exit 2")
    assert refuses.check(SERVERS) == {}
    assert refuses.issuers() == []
    assert asked_before(tmp_path, FETCH_ROOTS="echo").issuers() == []
    down = asked_before(tmp_path, GET_SUPPORTED_TEMPLATES="exit 3", FETCH_ROOTS="exit 3")
    with pytest.raises(BackendUnavailableError):
        down.check(SERVERS)
    with pytest.raises(BackendUnavailableError):
        down.issuers()


@pytest.mark.parametrize(
    ("text", "kind", "hint"),
    [
        ("exit 3", BackendUnavailableError, "does the CA run"),
        ("exit 4", BackendRefusedError, "lacks settings"),
        ("exit 1", BackendUnavailableError, "status 6 for operations that it does not know"),
        ("exit 2", BackendRefusedError, "status 6 for operations that it does not know"),
        ("echo 5; exit 5", BackendRefusedError, "status 6 for operations that it does not know"),
        ("exit 127", BackendRefusedError, "status 6 for operations that it does not know"),
    ],
)
def test_a_broken_program_is_found_before_it_is_asked_to_sign(
    tmp_path: Path, text: str, kind: type[BackendError], hint: str
) -> None:
    """IDENTIFY starts it."""
    with pytest.raises(kind) as e:
        opened(program(tmp_path / "broken", text)).check(SERVERS)
    assert hint in e.value.hint


def test_the_one_that_signs_comes_first(tmp_path: Path) -> None:
    """certmonger's helpers print nicknames, and roots before what they have signed."""
    root = Signer.make("root")
    below = Signer.make("below", parent=root)
    (tmp_path / "chain").write_bytes(b"root\n" + pem(root.certificate) + b"\n\n\nbelow\n" + pem(below.certificate))
    backend = asked_before(tmp_path, FETCH_ROOTS=f'cat "{tmp_path}/chain"')
    assert backend.issuers() == [below.certificate, root.certificate]


def test_roots_that_are_none_are_refused(tmp_path: Path) -> None:
    """Output that is no certificate is refused."""
    with pytest.raises(BackendRefusedError, match="FETCH-ROOTS: wanted the CA's certificates, found no certificate"):
        asked_before(tmp_path, FETCH_ROOTS="echo root").issuers()


# --- certmonger's own helpers ---------------------------------------------------------------------------------------


def real(name: str, *arguments: str) -> ExecBackend:
    path = exec_programs.helper(name)
    assert path is not None
    return opened(path, *arguments)


@CERTMONGER
def test_local_submit_alone_gives_no_usages(tmp_path: Path) -> None:
    """It works unchanged: makes its CA, signs, tells its root; usages are those of the CSR, which has none."""
    backend = real("local-submit", "-d", str(tmp_path))
    assert backend.check(SERVERS) == {}
    answer = backend.sign(REQUEST)
    assert isinstance(answer, Issued)
    assert [one.subject for one in backend.issuers()] == [answer.leaf.issuer]
    with pytest.raises(x509.ExtensionNotFound):
        answer.leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage)


@CERTMONGER
def test_what_certmongers_helpers_say_when_they_can_not(tmp_path: Path) -> None:
    """Statuses and words of the real ones: directory missing, server dead, not configured, a principal needed."""
    with pytest.raises(BackendUnavailableError, match="lockfile"):
        real("local-submit", "-d", str(tmp_path / "nowhere")).sign(REQUEST)
    with pytest.raises(BackendRefusedError, match="not configured"):
        real("dogtag-submit").sign(REQUEST)
    with pytest.raises(BackendUnavailableError, match="Error 7 connecting"):
        real("dogtag-submit", "-E", "http://127.0.0.1:1/ca/ee/ca", "-T", "caServerCert").sign(REQUEST)
    with pytest.raises(BackendRefusedError, match="No RA certificate"):
        real("scep-submit", "-u", "http://127.0.0.1:1/").sign(REQUEST)
    with pytest.raises(BackendRefusedError, match="not configured"):
        real("ipa-submit").sign(REQUEST)
    found = real("ipa-submit").check(SERVERS)
    assert "CERTMONGER_REQ_PRINCIPAL" in str(found["apiserver"])


@CERTMONGER
def test_dogtag_submit_with_a_server() -> None:
    """The profile chooses the usages; a deferred request is polled by its number; a refusal has the server's words."""
    with dogtag.serving(SIGNER) as server:
        backend = real("dogtag-submit", "-E", server.url)
        server.answers("apiserver")
        answer = backend.sign(REQUEST)
        assert isinstance(answer, Issued)
        assert extended_key_usages(answer.leaf) == frozenset(eku.value for eku in REQUEST.spec.ekus)
        server.answers("defer")
        later = backend.sign(REQUEST)
        assert isinstance(later, Pending)
        assert later.reference == "state=check&requestId=7"
        with pytest.raises(BackendRefusedError):  # there is no such page for the answer here
            backend.collect(REQUEST, later.reference)
        assert server.asked[-1] == "/ca/ee/ca/checkRequest?requestId=7&xml=true"
        server.answers("reject")
        with pytest.raises(BackendRefusedError, match="Request Rejected - subject not allowed"):
            backend.sign(REQUEST)
        server.answers("html")
        with pytest.raises(BackendRefusedError, match=r"status 2 \(refused\), printed nothing"):
            backend.sign(REQUEST)
        assert backend.check(SERVERS) == {}


# --- through the program --------------------------------------------------------------------------------------------


@pytest.fixture
def one(tmp_path: Path) -> Bridge:
    """A node whose front proxy's certificate ends soon, and a script that signs for its CA."""
    pki = handmade_pki(tmp_path / "node", not_after=datetime.now(UTC) + timedelta(days=10))
    script = exec_programs.site_ca(tmp_path / "ca", *pki.ca_pem("front-proxy-ca"))
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    values = {"type": "exec", "command": [str(script)], "timeout": "3m", "retry_for": "1s"}
    bridge.add("backend.site", values)
    bridge.add("authority.front-proxy-ca", {"backend": "site"})
    return bridge


#: The part of the script that is replaced, its replacement, the exit code, and a part of the message.
HOSTILE = {
    "other usages": ("=%s\\n' \"$CA_BRIDGE_EKUS\"", "=serverAuth,clientAuth\\n'", 5, "EKU: wanted clientAuth, got clientAuth, serverAuth"),
    "no usages": ("extendedKeyUsage=%s\\n' \"$CA_BRIDGE_EKUS\"", "\\n'", 5, "EKU: wanted clientAuth, got"),
    "a CA": ("CA:FALSE", "CA:TRUE", 5, "BasicConstraints: wanted CA:FALSE, got CA:TRUE"),
    "for a day": ('"$CA_BRIDGE_DAYS"', "1", 5, "notAfter: wanted at least 7d"),
    "signed with SHA-1": ("-set_serial", "-sha1 -set_serial", 5, "SHA"),
    "other names": ("CA:FALSE\\n", "CA:FALSE\\nsubjectAltName=DNS:evil\\n", 5, "SAN: wanted none, got DNS:evil"),
    "another key": ('openssl x509 -req -in "$work/csr"', "openssl req -new -newkey rsa:2048 -nodes -keyout /dev/null -subj /CN=front-proxy-client 2>/dev/null | openssl x509 -req", 5, "for other keys"),
    "cut off": ("|| exit 2\ncat ca.crt", "2>/dev/null | head -c 400; exit 0", 5, "has no end"),
    "without end": ("openssl x509 -req", "yes; openssl x509 -req", 5, "printed more than 1 MiB"),
    "late": ("openssl x509 -req", "sleep 3600; openssl x509 -req", 6, "still running after 9 s"),
    "later, for ever": ("openssl x509 -req", "echo soon; exit 1; openssl x509 -req", 4, 'its cookie: "soon"'),
    "down": ("openssl x509 -req", "exit 3; openssl x509 -req", 6, "the CA can't be reached"),
    "broken": ("openssl x509 -req", "false || exit; openssl x509 -req", 6, "there is no cookie"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_answer_moves_nothing(one: Bridge, what: str) -> None:
    """The run ends as it should, says why, and leaves the node as it was; with the right script the same command renews."""
    old, new, code, message = HOSTILE[what]
    script, before = Path(one.directory.parent, "ca/site-ca"), live_certificates(one.pki)
    right = script.read_text()
    assert old in right
    script.write_text(right.replace(old, new))
    settings = one.config.read_text()
    if what == "late":
        one.config.write_text(settings.replace('"3m"', '"9s"'))
    run = one.run("renew", "front-proxy-client")
    one.config.write_text(settings)
    assert (run.returncode, message in run.stdout + run.stderr) == (code, True), run.stdout + run.stderr
    assert live_certificates(one.pki) == before
    script.write_text(right)
    if what == "later, for ever":
        assert one.run("pending", "cancel", "front-proxy-client").returncode == 0
    run = one.run("renew", "front-proxy-client")
    assert run.returncode == 0, run.stderr
    assert live_certificates(one.pki)["front-proxy-client"] != before["front-proxy-client"]


def examples(language: str) -> list[str]:
    """Code in the page for operators."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_pages_worked_example_works(one: Bridge) -> None:
    """As it is printed, but for the CA's directory: the suite passes, and a renewal."""
    script = Path(one.directory.parent, "ca/site-ca")
    [text] = [text for text in examples("sh") if text.startswith("#!/bin/sh")]
    script.write_text(text.replace("/srv/ca/$1", str(script.parent)))
    for arguments in (("backend", "test", "front-proxy-ca"), ("renew", "front-proxy-client")):
        run = one.run(*arguments)
        assert run.returncode == 0, run.stdout + run.stderr


def test_the_pages_person_answers_later(one: Bridge, tmp_path: Path) -> None:
    """As it is printed, but for the desk's directory: a ticket, and its answer a run later."""
    script, desk = Path(one.directory.parent, "ca/site-ca"), tmp_path / "desk"
    signs = program(tmp_path / "signs", script.read_text())
    desk.mkdir()
    [text] = [text for text in examples("sh") if "the PKI team" in text]
    script.write_text(f"#!/bin/sh\n{text.replace('/srv/desk', str(desk))}")
    run = one.run("renew", "front-proxy-client")
    assert (run.returncode, "waits for the PKI team" in run.stdout) == (4, True)
    [ticket] = desk.glob("*.csr")
    asked = {"CERTMONGER_OPERATION": "SUBMIT", "CERTMONGER_CSR": ticket.read_text()}
    asked |= {"CA_BRIDGE_EKUS": "clientAuth", "CA_BRIDGE_DAYS": "90", "PATH": ENVIRONMENT["PATH"]}
    answer = subprocess.run([signs], env=asked, capture_output=True, check=True).stdout
    ticket.with_suffix(".crt").write_bytes(answer)
    assert one.run("renew", "front-proxy-client").returncode == 0


def test_the_pages_have_every_key_and_variable(tmp_path: Path) -> None:
    """The pages list every key of the settings, and every variable that a program gets."""
    text = PAGE.read_text(encoding="utf-8")
    settings = PAGE.with_name("settings.md").read_text(encoding="utf-8").partition("[backend.NAME]")[2]
    for key in set(vars(ExecSettings(command=("/bin/x",)))) - {"node", "pairs", "profiles"}:
        assert f"| `{key}` |" in settings
    for name in reported(tmp_path, REQUEST, node="cp-1"):
        assert name in text or f"`_{name.removeprefix('CERTMONGER_REQ_')}`" in text


def test_the_signature_of_another_ca_moves_nothing(one: Bridge, tmp_path: Path) -> None:
    """The program's word for its CA is compared before, and the chain after it has signed."""
    script, before = Path(one.directory.parent, "ca/site-ca"), live_certificates(one.pki)
    other = exec_programs.site_ca(tmp_path / "other", *one.pki.ca_pem("etcd-ca"))
    for text in (
        other.read_text(),
        other.read_text().replace('FETCH-ROOTS) echo "site CA"; cat ca.crt;', "FETCH-ROOTS) exit 6;"),
    ):
        script.write_text(text)
        run = one.run("renew", "front-proxy-client")
        assert run.returncode == 5
        assert "CN=etcd-ca" in run.stderr
        assert live_certificates(one.pki) == before


def test_a_killed_run_does_not_ask_twice(one: Bridge, tmp_path: Path) -> None:
    """A run that is killed between the order and the cookie asks again with the same CSR, by which a script knows it."""
    desk = tmp_path / "desk"
    asks = exec_programs.person(desk)
    script = Path(one.directory.parent, "ca/site-ca")
    script.write_text(asks.read_text().replace('echo "ticket', 'kill -9 "$PPID"\necho "ticket'))
    assert one.run("renew", "front-proxy-client").returncode == -signal.SIGKILL
    [ticket] = desk.glob("*.csr")
    asked = ticket.read_bytes()
    script.write_text(asks.read_text())
    run = one.run("renew", "front-proxy-client")
    assert run.returncode == 4, run.stderr
    assert [(path, path.read_bytes()) for path in desk.glob("*.csr")] == [(ticket, asked)]


def test_only_the_programs_word_ends_an_order(one: Bridge, tmp_path: Path) -> None:
    """A request that waits outlives a program that is gone, can't be run or lacks its settings; a refusal drops it, and says so."""
    script, order = Path(one.directory.parent, "ca/site-ca"), ("renew", "front-proxy-client")
    asks = exec_programs.person(tmp_path / "desk").read_text()
    script.write_text(asks)
    assert one.run(*order).returncode == 4

    def listed() -> str:
        """The fingerprint of the request's key, or the end of "nothing is pending"."""
        return one.run("pending", "list").stdout.split()[-1]

    waiting = listed()

    def left(code: int) -> str:
        run = one.run(*order)
        assert run.returncode == code, run.stderr
        assert ("dropped the request" in run.stderr) == (code == 5 and "status 2" in run.stderr)
        return listed()

    script.chmod(0o644)
    assert left(2) == waiting
    script.unlink()
    assert left(2) == waiting
    for text in ("exit 4", "no-such-command"):
        program(script, text)
        assert left(5) == waiting
    program(script, "exit 2")
    assert left(5) == "pending"


def test_doctor_finds_what_is_wrong_with_a_program(one: Bridge) -> None:
    """Before it is needed: the twin is well, then others can write to it, then it is gone."""
    script = Path(one.directory.parent, "ca/site-ca")
    for authority in ("ca", "etcd-ca"):
        one.add(f"authority.{authority}", {"backend": "site"})

    def reported() -> str:
        """Only what is about the backends."""
        return " ".join(one.run("doctor").stdout.partition("backend of")[2].split())

    assert str(script) not in reported()
    script.chmod(0o777)
    assert f"{script}: wanted a file that only its owner can write to, found mode 0777" in reported()
    script.unlink()
    assert "can't be run: No such file or directory" in reported()


# --- settings -------------------------------------------------------------------------------------------------------


def problems(table: str) -> list[str]:
    """Those of a backend's table."""
    text = f'[backend.site]\ntype = "exec"\n{table}\n[authority.ca]\nbackend = "site"\n'
    with pytest.raises(SettingsError) as e:
        registry.configured(parse(text), ["ca"])["ca"].open()
    return [f"{problem.key}: {problem.wanted} / {problem.found}" for problem in e.value.problems]


@pytest.mark.parametrize(
    ("table", "found"),
    [
        ("", "command: a value / nothing"),
        ("command = []", "command: a program's absolute path, then its arguments / an empty list"),
        ('command = ["helper", "-v"]', "a program's absolute path, then its arguments / 'helper'"),
        ('command = "/bin/helper -v"', "command: a list of texts"),
        ('command = ["/bin/x", "a\\u0000b"]', "texts without NUL characters"),
        ('command = ["/bin/x"]\nprofile = "{host}"', "{name}, {usage} and {node}"),
        ('command = ["/bin/x"]\nprofiles = {web = "x"}', "profiles.web"),
        ('command = ["/bin/x"]\nenvironment = {CERTMONGER_CSR = "x"}', "does not set itself"),
        ('command = ["/bin/x"]\nenvironment = {CA_BRIDGE_DAYS = "9"}', "does not set itself"),
        ('command = ["/bin/x"]\nenvironment = {"A-B" = "x"}', "letters, digits and underscores"),
        ('command = ["/bin/x"]\nenvironment = {AWS_SECRET_ACCESS_KEY = "x"}', "no secret in the settings"),
        ('command = ["/bin/x"]\nenvironment = {VAULT_TOKEN = "x"}', "no secret in the settings"),
        ('command = ["/bin/x"]\nenvironment = {DB_PASSWORD = "x"}', "no secret in the settings"),
        ('command = ["/bin/x"]\nenvironment = {X = "a\\u0000b"}', "without NUL characters"),
        (f'command = ["/bin/x"]\nenvironment = {{X = "{"x" * 131_070}"}}', "at most 131071 bytes"),
        ('command = ["/bin/x"]\nuser = "no-such-user"', "user: a user of this machine / 'no-such-user'"),
        ('command = ["/bin/x"]\nshell = true', "shell"),
    ],
)  # fmt: skip
def test_settings_that_can_not_be_used_are_named(table: str, found: str) -> None:
    """The error names each key before any program runs, and shows no secret's value."""
    assert any(found in problem for problem in problems(table))


def test_the_place_of_a_secret_is_no_secret() -> None:
    """A variable names the file that a program reads by itself; the twin of the refusal above."""
    environment = {
        "AWS_WEB_IDENTITY_TOKEN_FILE": "/run/token",
        "VAULT_TOKEN_PATH": "/run/token",
        "SSH_AUTH_SOCK": "/run/s",
    }
    assert not list(ExecSettings(command=("/bin/x",), environment=environment).problems())


# --- setup ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("authority", AUTHORITIES)
def test_setup_prints_what_asks_the_program_by_hand(tmp_path: Path, authority: str) -> None:
    """The script has the node's names, and the certificate that it gets passes for a renewal but for its key."""
    pki = handmade_pki(tmp_path / "node")
    script = exec_programs.site_ca(tmp_path / "ca", *pki.ca_pem(authority))
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    bridge.add("backend.site", {"type": "exec", "command": [str(script)]})
    bridge.add(f"authority.{authority}", {"backend": "site"})
    printed = bridge.run("setup", "exec", "--authority", authority)
    assert printed.returncode == 0, printed.stderr
    asks = program(tmp_path / "try.sh", printed.stdout)
    live = {name: one for name, one in live_certificates(pki).items() if SPECS[name].authority.name == authority}
    for name, certificate in live.items():
        asked = subprocess.run([asks, name], capture_output=True, check=True)
        issued = x509.load_pem_x509_certificates(asked.stdout)[0]
        assert attributes(issued.subject) == attributes(certificate.subject)
        assert san_counts(issued) == san_counts(certificate)
        assert extended_key_usages(issued) == extended_key_usages(certificate)
    identified = subprocess.run([asks, next(iter(live)), "IDENTIFY"], capture_output=True, text=True, check=True)
    assert (identified.stdout, identified.stderr) == ("site CA 1.0\n", "status 0\n")
    assert subprocess.run([asks, "no-such-name"], capture_output=True, check=False).returncode == 2


@AS_ROOT
def test_the_script_of_setup_runs_the_program_as_the_settings_user(tmp_path: Path) -> None:
    """As ca-bridge does: root's hand gives a program that is another user's none of root's rights."""
    enterable(tmp_path)
    pki = handmade_pki(tmp_path / "node")
    script = program(tmp_path / "tell", 'echo "$(id -un):$HOME"; exit 2')
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    bridge.add("backend.site", {"type": "exec", "command": [str(script)], "user": "nobody"})
    bridge.add("authority.front-proxy-ca", {"backend": "site"})
    asks = program(tmp_path / "try.sh", bridge.run("setup", "exec", "--authority", "front-proxy-ca").stdout)
    asked = subprocess.run([asks, "front-proxy-client"], capture_output=True, text=True, check=False)
    assert (asked.returncode, asked.stdout) == (2, "nobody:/nonexistent\n"), asked.stderr


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('command = "/bin/x"', "backend.x.command"),
        ('profile = "{host}"', "profile"),
        ("profile = 7", "backend.x.profile"),
        ("environment = {X = 7}", "backend.x.environment.X"),
    ],
)
def test_setup_names_settings_that_can_not_be_used(line: str, key: str) -> None:
    """`setup` names unusable settings, though it needs none of them."""
    settings = parse(f'[authority.ca]\nbackend = "x"\n[backend.x]\ntype = "exec"\n{line}\n')
    with pytest.raises(SettingsError) as e:
        ExecBackend.setup(
            SetupRequest(
                authority=AUTHORITIES["ca"],
                certificates={"apiserver": LIVE},
                validity=timedelta(days=365),
                node="cp-1",
                cluster="kubernetes",
                settings=registry.keys_so_far(settings, "ca", "exec"),
            )
        )
    assert [problem.key for problem in e.value.problems] == [key]


@pytest.mark.attack("N20")
def test_a_line_break_in_a_certificate_ends_no_comment_of_the_script(tmp_path: Path) -> None:
    """Text after a line break would run, so it stays in the comment; the request has the name as it is."""
    evil = f"x\ntouch {tmp_path}/ran\n#"
    builder = x509.CertificateBuilder(public_key=LIVE.public_key(), serial_number=1)
    builder = builder.subject_name(LIVE.subject).issuer_name(LIVE.issuer)
    builder = builder.not_valid_before(LIVE.not_valid_before_utc).not_valid_after(LIVE.not_valid_after_utc)
    builder = builder.add_extension(
        x509.SubjectAlternativeName([x509.RFC822Name._init_without_validation(evil)]), False
    )
    certificate = builder.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    wanted = SetupRequest(
        authority=AUTHORITIES["ca"],
        certificates={"apiserver": certificate},
        validity=timedelta(days=365),
        node="cp-1",
        cluster="kubernetes",
        settings={},
    )
    [script] = ExecBackend.setup(wanted)
    head = script.text.partition("set -eu")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    program(tmp_path / "try.sh", script.text)
    assert subprocess.run([tmp_path / "try.sh", "no-such-name"], capture_output=True, check=False).returncode == 2
    assert not (tmp_path / "ran").exists()
