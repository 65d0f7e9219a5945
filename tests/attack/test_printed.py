"""What others have named (manifests, certificates) steers no terminal and stops no command, wherever it is printed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from bridge.cli.printing import say
from bridge.words import escaped, steady
from tests.kit.pki import Pki, handmade_pki

PROGRAM = Path(sys.executable).with_name("ca-bridge")
#: A title, a cleared screen, the same by one character (C1), and a line that reads from right to left.
BAD = "\x1b]0;owned\x07\x1b[2J\x9b2J\u202e"
_LOOKING = (
    ["check-expiration"],
    *(["check-expiration", "-o", form] for form in ("json", "yaml", "prometheus", "nagios")),
    ["plan", "all"],
    ["plan", "all", "-o", "json"],
    ["doctor"],
    ["doctor", "-o", "json"],
    ["doctor", "--before-upgrade"],
    ["prove"],
    ["renew", "all", "--dry-run"],
    ["settings", "show"],
    *(["setup", ca, "--authority", "ca"] for ca in ("vault", "cfssl", "openssl", "est", "kubernetes", "exec")),
)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A node, with an `openssl ca` that no test asks for a certificate."""
    node = handmade_pki(tmp_path / "node", external=True)
    places = f'pki_dir = "{node.pki_dir}"\nkubeconfig_dir = "{node.kubeconfig_dir}"\nstate_dir = "{tmp_path}/state"\n'
    file = tmp_path / "config.toml"
    file.write_text(
        f'[node]\n{places}[backend.a]\ntype = "openssl"\ndir = "{tmp_path}"\n[authority.ca]\nbackend = "a"\n'
    )
    return file


def node_of(config: Path) -> Pki:
    """Its PKI."""
    return Pki(root=config.parent / "node", external=True)


def called(config: Path) -> str:
    """A certificate with such names in the API server's place, and its manifest with such flags."""
    node = node_of(config)
    certificate_pem, key_pem = node.ca_pem("ca")
    authority = x509.load_pem_x509_certificate(certificate_pem)
    signing, key = serialization.load_pem_private_key(key_pem, None), ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    names = [x509.DNSName("kubernetes"), x509.UniformResourceIdentifier("http://x\x1b[2J/")]
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"kube-apiserver{BAD}")]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=9))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(signing, hashes.SHA256())  # type: ignore[arg-type]  # RSA or elliptic curves
    )
    (node.pki_dir / "apiserver.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    form = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (node.pki_dir / "apiserver.key").write_bytes(key.private_bytes(serialization.Encoding.PEM, *form))
    manifests = node.kubeconfig_dir / "manifests"
    manifests.mkdir()
    flags = ["client-ca-file=/x.crt", "tls-cert-file=/y.crt", "advertise-address=[", "etcd-servers=https://[:2379"]
    urls = [f"{name}=https://[:2379" for name in ("listen-client-urls", "listen-peer-urls", "advertise-client-urls")]
    for name, given in (("kube-apiserver", flags), ("etcd", [*urls, "cert-file=/z.crt"])):
        command = [name, *(f"--{flag}{BAD}" for flag in given)]
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"{name}{BAD}"},
               "spec": {"containers": [{"name": name, "image": f"x/{name}:v1.37.0{BAD}", "command": command}]}}  # fmt: skip
        (manifests / f"{name}.yaml").write_text(json.dumps(pod))
    return f"kube-apiserver{BAD}"


def run(config: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """The program, as it is installed."""
    command = [str(PROGRAM), *arguments, "--config", str(config)]
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def test_no_command_steers_the_terminal(config: Path) -> None:
    """No command steers the terminal or ends with an internal error, whatever a manifest says of addresses and files."""
    called(config)
    for arguments in _LOOKING:
        ended = run(config, list(arguments))
        for text in (ended.stdout, ended.stderr):
            assert steady(text) == text, arguments
            assert "internal error" not in text, arguments


@pytest.mark.parametrize(("form", "load"), [("json", json.loads), ("yaml", yaml.safe_load)], ids=["json", "yaml"])
def test_programs_read_the_name_as_it_is(config: Path, form: str, load: object) -> None:
    """The name is escaped, and not replaced."""
    name = called(config)
    assert callable(load)
    found = load(run(config, ["check-expiration", "-o", form]).stdout)
    (subject,) = (one["subject"] for one in found["certificates"] if one["name"] == "apiserver")
    assert subject.replace("\\", "") == f"CN={name}"


def test_a_path_that_is_no_text(config: Path) -> None:
    """A byte that is not UTF-8 in the name of a directory ends no command, and gets into no job."""
    odd = config.parent / "x\udcff"
    shutil.copytree(config.parent / "node", odd)
    config.write_text(f'{config.read_text()}[metrics]\nfile = "{config.parent}/x.prom"\n')
    [pki] = odd.rglob("pki")
    places = ["--pki-dir", str(pki), "--kubeconfig-dir", str(pki.parent), "--state-dir", str(odd / "state")]
    for arguments in (*_LOOKING, ["renew", "all"], ["setup", "systemd"], ["setup", "cron"]):
        ended = run(config, [*arguments, *places])
        assert "internal error" not in ended.stderr, (arguments, ended.stderr)
        assert arguments[1:] not in (["systemd"], ["cron"]) or "wanted a path in UTF-8" in ended.stderr
    assert "x\N{REPLACEMENT CHARACTER}/" in (config.parent / "x.prom").read_text(encoding="utf-8")
    found = yaml.safe_load(run(config, ["check-expiration", "-o", "yaml", *places]).stdout)
    assert {one["path"].startswith(str(odd)) for one in found["certificates"]} == {True}


def test_what_is_printed_is_steady(capsys: pytest.CaptureFixture[str]) -> None:
    """All that goes to standard output, line ends and tabs left; colours of our own are not from outside."""
    say(f"a{BAD}\tb\nc\ud800")
    bad = "\N{REPLACEMENT CHARACTER}"
    assert capsys.readouterr().out == f"a{bad}]0;owned{bad}{bad}[2J{bad}2J{bad}\tb\nc{bad}\n"
    say("\x1b[1mours\x1b[0m", is_styled=True)
    assert capsys.readouterr().out == "ours\n"  # here is no terminal; else there would be colours, and no replacement


def test_escaped_json_means_the_same() -> None:
    """Letters of all scripts stay as they are."""
    text = f"Zürich\u00a0東京 {BAD}\u2028\x7f"
    found = escaped(json.dumps(text, ensure_ascii=False))
    assert json.loads(found) == text
    assert steady(found) == found
    assert "Zürich\u00a0東京" in found
