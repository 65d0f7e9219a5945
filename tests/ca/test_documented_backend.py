"""The worked example of `docs/writing-a-backend.md`: installed as it stands there, it passes the suite and renews."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bridge import contract

PAGE = Path(__file__).parents[2] / "docs/writing-a-backend.md"

#: What stands in for both CAs: it checks the CSR's signature (the site's also a token), and signs by profile or path.
SERVER = """
import json, threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID as EKU

USAGES = {"server": [EKU.SERVER_AUTH], "client": [EKU.CLIENT_AUTH], "peer": [EKU.SERVER_AUTH, EKU.CLIENT_AUTH]}

def signed(csr, issuer, key, usages, days):
    now = datetime.now(UTC)
    usage = dict.fromkeys(("content_commitment", "data_encipherment", "key_agreement", "key_cert_sign", "crl_sign",
                           "encipher_only", "decipher_only"), False)
    builder = (x509.CertificateBuilder().subject_name(csr.subject).issuer_name(issuer.subject)
        .public_key(csr.public_key()).serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=1)).not_valid_after(now + timedelta(days=days))
        .add_extension(x509.KeyUsage(digital_signature=True, key_encipherment=True, **usage), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False))
    for extension in csr.extensions:
        if extension.oid == x509.SubjectAlternativeName.oid:
            builder = builder.add_extension(extension.value, critical=False)
    return builder.sign(key, hashes.SHA256())

@pytest.fixture
def site_server():
    servers = []
    def start(issuer, key):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(issuer)
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/sign":
                    asked = json.loads(body)
                else:
                    asked = {"csr": body.decode(), "profile": f"kubeadm-{self.path[1:]}", "days": 30}
                csr = x509.load_pem_x509_csr(asked["csr"].encode())
                is_known = self.path != "/sign" or self.headers["Authorization"] == "Bearer s3cret"
                if not is_known or not csr.is_signature_valid:
                    self.send_error(403)
                    return
                usages = USAGES[asked["profile"].removeprefix("kubeadm-")]
                self.answer(signed(csr, issuer, key, usages, asked["days"]))
            def answer(self, certificate):
                body = certificate.public_bytes(Encoding.PEM)
                if self.path in ("/ca", "/sign"):
                    body = json.dumps({"certificates": body.decode()}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            def log_message(self, *_):
                pass
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
"""


LAB_SUITE = """
import pytest
from bridge.testing import ABILITIES, BackendConformance
from lab_ca import LabBackend, LabSettings

class TestLabBackend(BackendConformance):
    unsupported = frozenset(ABILITIES)

    @pytest.fixture
    def backend(self, ca, site_server):
        return LabBackend.from_settings(LabSettings(url=site_server(ca.certificate, ca.key)))

    @pytest.fixture
    def dead_backend(self):
        return LabBackend.from_settings(LabSettings(url="http://127.0.0.1:9"))
"""


def blocks(language: str) -> list[str]:
    """The blocks of the page, in their order."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the plug-in as pip installs it, and the page's test."""
    directory = tmp_path_factory.mktemp("site-ca")
    (smallest, backend, suite), (project, _) = blocks("python"), blocks("toml")
    source, target = directory / "source", directory / "plugins"
    source.mkdir()
    source.joinpath("site_ca.py").write_text(backend)
    source.joinpath("pyproject.toml").write_text(project)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-index"]
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--target", str(target), str(source)], check=True)
    directory.joinpath("conftest.py").write_text(SERVER)
    directory.joinpath("test_site_ca.py").write_text(suite)
    directory.joinpath("lab_ca.py").write_text(smallest)
    directory.joinpath("test_lab_ca.py").write_text(LAB_SUITE)
    return directory


def in_its_place(directory: Path, *command: str) -> subprocess.CompletedProcess[str]:
    places = os.pathsep.join([str(directory / "plugins"), str(PAGE.parents[1])])  # the sources that are tested, too
    environment = {**os.environ, "PYTHONPATH": places, "PYTHONDONTWRITEBYTECODE": "1"}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    return subprocess.run(command, cwd=directory, env=environment, check=False, capture_output=True, text=True)


def suite(directory: Path, test: str = "test_site_ca.py") -> subprocess.CompletedProcess[str]:
    pytest_ = [
        str(Path(sys.executable).with_name("pytest")),
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(directory),
    ]
    return in_its_place(directory, *pytest_, test)


def test_the_worked_example_passes_the_suite(installed: Path) -> None:
    """The example passes as it is printed, and as pip installs it."""
    run = suite(installed)
    assert run.returncode == 0, run.stdout
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed
    assert int(passed[1]) >= 8


def test_the_smallest_backend_passes_the_suite(installed: Path) -> None:
    """About twenty lines, without blank ones, are a backend; the suite fails it once it says that it can do more."""
    lines = [line for line in installed.joinpath("lab_ca.py").read_text().splitlines() if line]
    assert len(lines) <= 25
    run = suite(installed, "test_lab_ca.py")
    assert run.returncode == 0, run.stdout
    test = installed / "test_lab_ca.py"
    test.write_text(test.read_text().replace("frozenset(ABILITIES)", 'frozenset(ABILITIES) - {"issuers"}'))
    run = suite(installed, "test_lab_ca.py")
    assert (run.returncode, "test_abilities_are_as_declared" in run.stdout) == (1, True)


def test_a_backend_that_forgets_the_usages_does_not_pass(installed: Path) -> None:
    """The suite can fail: one profile for all certificates is not enough."""
    module = installed / "plugins/site_ca.py"
    right = module.read_text()
    module.write_text(right.replace("self._settings.profile.format(usage=request.spec.usage)", '"kubeadm-client"'))
    try:
        run = suite(installed)
    finally:
        module.write_text(right)
    assert run.returncode == 1
    assert "EKU: wanted serverAuth, got clientAuth" in run.stdout


@pytest.mark.parametrize("answer", ["<html>", "[1]", "{}", '{"certificates": null}', '{"certificates": ""}'])
def test_an_answer_of_something_else_is_an_error_of_the_contract(answer: str, installed: Path) -> None:
    """Where a backend parses what a server sends, nothing else than errors of `bridge.errors` may come out."""
    code = (
        "import site_ca, bridge.errors as e\n"
        "settings = site_ca.SiteSettings(url='http://ca', token=site_ca.Secret('file', '/x'))\n"
        f"try: site_ca.SiteBackend(settings)._certificates({answer.encode()!r})\n"
        "except e.NoVerdictError as found: print(found)"
    )
    run = in_its_place(installed, sys.executable, "-c", code)
    assert run.stdout.startswith("wanted certificates from http://ca, found: "), run.stderr


def test_the_program_finds_it(installed: Path, tmp_path: Path) -> None:
    """The program finds it by its entry point, checks its settings with all others, and names a wrong key."""
    _, settings = blocks("toml")
    config = tmp_path / "config.toml"
    program = [sys.executable, "-c", "from bridge.cli.app import app; app()", "settings"]
    config.write_text(settings.replace("/etc/ca-bridge/site-token", str(tmp_path / "token")))
    config.chmod(0o644)
    shown = in_its_place(installed, *program, "show", "--config", str(config))
    assert 'profile = "kubeadm-{usage}"' in shown.stdout, shown.stderr
    config.write_text(config.read_text().replace("url =", "uri ="))
    wrong = in_its_place(installed, *program, "check", "--config", str(config))
    assert wrong.returncode == 2
    assert "backend.corp.uri" in wrong.stderr


def test_each_method_of_the_page_is_in_the_contract() -> None:
    """A name that is not there would never be called."""
    table = re.findall(r"^\| (`[a-z_`, ]+`) \|", PAGE.read_text(), re.MULTILINE)
    names = [name for cell in table for name in re.findall(r"`(\w+)`", cell)]
    assert len(names) > 10
    assert [name for name in names if not hasattr(contract.Backend, name)] == []


def test_the_page_has_each_ability_and_each_method_of_the_settings() -> None:
    """An author of a backend finds all that the bridge would use."""
    names = {name for name in vars(contract.Backend) if not name.startswith("_")}
    names |= {name for name, found in vars(contract.BackendSettings).items() if callable(found) and name[0] != "_"}
    assert {"writes", "asks_validity", "sign_many"} < names
    assert {name for name in names if f"`{name}`" not in PAGE.read_text()} == set()
