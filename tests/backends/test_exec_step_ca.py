"""smallstep's step-ca for real, by the example script and the provisioners that `setup exec` prints."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from backends.exec import ExecBackend
from backends.exec.settings import ExecSettings
from bridge.contract import Issued, Pending, SetupFile, SetupRequest, SignRequest
from bridge.errors import BackendRefusedError, BackendUnavailableError, BridgeError
from bridge.pki import verify
from bridge.specs import AUTHORITIES, SPECS
from bridge.testing import BackendConformance, TestCA, sign_request
from tests.kit import programs, step_ca
from tests.kit.issuing import Signer, name
from tests.kit.loopback import free_port
from tests.kit.step_ca import StepCA

pytestmark = pytest.mark.kube("step", "step-ca")

VALIDITY = timedelta(days=30)
_CA = TestCA.make()
_SIGNER = Signer(certificate=_CA.certificate, key=_CA.key)
LIVE = {one.name: _CA.leaf(one) for one in SPECS.values()}


def opened(ca: StepCA, **keys: Any) -> ExecBackend:
    """The example, as an operator installs it."""
    values: dict[str, Any] = ca.settings(**keys)
    return ExecBackend.from_settings(ExecSettings(timeout=timedelta(minutes=3), **values))


def printed(settings: dict[str, object], live: dict[str, x509.Certificate] = LIVE) -> Sequence[SetupFile]:
    """What `setup exec` makes for these certificates."""
    wanted = SetupRequest(
        authority=AUTHORITIES["ca"],
        certificates=live,
        validity=VALIDITY,
        node="cp-1",
        cluster="kubernetes",
        settings=settings,
    )
    return ExecBackend.setup(wanted)


def live(name: str, **changes: Any) -> x509.Certificate:
    """A certificate of the node's, or one like it with another `subject` or other `sans`."""
    if not changes:
        return LIVE[name]
    end = datetime.now(UTC) + timedelta(days=1)
    return _SIGNER.issue(asked(name), begin=end - timedelta(days=2), end=end, **changes).leaf


def asked(name: str, **changes: Any) -> SignRequest:
    """To renew it."""
    return sign_request(live(name, **changes), SPECS[name], "ecdsa-p256", VALIDITY)


#: What would end a string, a comment or a heredoc, or run.
ODD_NAME = 'a"b{{c}}`touch ran`d\\e\nTEMPLATE\ntouch ran\n$(touch ran) <&>é'
ODD = {
    "admin.conf": live("admin.conf", subject=name((NameOID.ORGANIZATION_NAME, ODD_NAME), (NameOID.COMMON_NAME, "odd")))
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StepCA]:
    """Signs with the CA's own key; set up twice, and with a provisioner that has step-ca's default template."""
    ca = step_ca.make(tmp_path_factory.mktemp("step") / "ca", _CA.certificate_pem, _CA.certificate_pem, _CA.key_pem)
    script = printed(ca.settings())[0].text
    ca.set_up(script.replace("digitalSignature", "dataEncipherment"))
    ca.set_up(script)  # replaces the templates
    ca.set_up(printed(ca.settings(profile="odd-{usage}"), ODD)[0].text)
    ca.add_provisioner("careless")
    with ca.serving():
        yield ca


class TestConformance(BackendConformance):
    """The suite that every backend passes."""

    unsupported = frozenset({"sign_many", "identity", "close"})

    @pytest.fixture(scope="session")
    @classmethod
    def ca(cls) -> TestCA:
        """The CA behind step-ca."""
        return _CA

    @pytest.fixture(scope="session")
    @classmethod
    def live(cls) -> dict[str, x509.Certificate]:
        """The certificates that the provisioners were made for."""
        return LIVE

    @pytest.fixture
    def backend(self, server: StepCA) -> ExecBackend:
        """The example."""
        return opened(server)

    @pytest.fixture
    def dead_backend(self, server: StepCA) -> ExecBackend:
        """A port where nothing listens."""
        return opened(server, url=f"https://127.0.0.1:{free_port()}")


def violations(answer: Issued | Pending, request: SignRequest) -> set[str]:
    """What a node finds wrong with an answer."""
    assert isinstance(answer, Issued)
    expected = verify.Expectation(
        anchors=(_CA.certificate,), anchor_name="ca.crt", now=datetime.now(UTC), min_validity=timedelta(days=7)
    )
    wrong = verify.error_of(answer, request, expected)
    return set() if wrong is None else set(map(str, wrong.violations))


def test_a_default_template_is_refused_by_the_node(server: StepCA) -> None:
    """It gives both usages, and the CN as a SAN; by the printed template the same request is as it should be."""
    request = asked("admin.conf")
    wrong = violations(opened(server, profile="careless").sign(request), request)
    assert {"EKU: wanted clientAuth, got clientAuth, serverAuth", "SAN: wanted none, got DNS:kubernetes-admin"} <= wrong
    assert violations(opened(server).sign(request), request) == set()


MASTERS = name((NameOID.ORGANIZATION_NAME, "system:masters"), (NameOID.COMMON_NAME, "kubernetes-admin"))


@pytest.mark.parametrize(
    ("request_", "found"),
    [
        (asked("admin.conf", subject=MASTERS), "no certificate for .*system:masters"),
        (asked("apiserver", sans=[x509.DNSName("kubernetes"), x509.DNSName("evil.example")]), "no SAN evil.example"),
        (asked("apiserver", subject=LIVE["etcd-peer"].subject), "no certificate for .*cp-1"),
    ],
)
def test_a_template_signs_this_nodes_certificates_alone(server: StepCA, request_: SignRequest, found: str) -> None:
    """A client with the password chooses subject and SANs, and gets none but this node's."""
    with pytest.raises(BackendRefusedError, match=found):
        opened(server).sign(request_)


def test_fewer_sans_are_signed(server: StepCA) -> None:
    """The twin: `--drop-san` needs no new template."""
    request = asked("apiserver", sans=[x509.DNSName("kubernetes")])
    assert violations(opened(server).sign(request), request) == set()


TOO_LONG = SignRequest(spec=SPECS["apiserver"], csr_pem=asked("apiserver").csr_pem, validity=timedelta(days=31))
#: The changed settings, the request, and the error that step's message becomes.
FAILURES: dict[str, tuple[dict[str, str], SignRequest, type[BridgeError], str]] = {
    "another password": ({"password": "{root}"}, asked("apiserver"), BackendRefusedError, "invalid password"),
    "no password": ({"password": "/nowhere"}, asked("apiserver"), BackendRefusedError, "no such file"),
    "another root": ({"root": "{other}"}, asked("apiserver"), BackendRefusedError, "unknown authority"),
    "no provisioner": ({"profile": "nobody"}, asked("apiserver"), BackendRefusedError, "invalid value 'nobody'"),
    "too long": ({}, TOO_LONG, BackendRefusedError, "more than the authorized maximum"),
    "no host": ({"url": "https://no.such.host.invalid"}, asked("apiserver"), BackendUnavailableError, "no such host"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_refusal_differs_from_not_now(server: StepCA, tmp_path: Path, what: str) -> None:
    """step ends with 1 for all of them; its own words decide, and reach the operator without its decoration."""
    changes, request, error, found = FAILURES[what]
    other = tmp_path / "other.crt"
    other.write_bytes(TestCA.make("other", "ecdsa-p256").certificate.public_bytes(Encoding.PEM))
    keys = {key: value.format(root=server.root, other=other) for key, value in changes.items()}
    with pytest.raises(error, match=found) as e:
        opened(server, **keys).sign(request)
    assert "[kid:" not in str(e.value)


def test_a_provisioner_that_is_not_there_is_found_before(server: StepCA) -> None:
    """The preflight lists them, and names the root; one whose CA is down says so."""
    assert opened(server).check([SPECS["apiserver"]]) == {}
    assert opened(server).issuers() == [_CA.certificate]
    found = opened(server, profile="other-{usage}").check([SPECS["apiserver"]])
    assert [violation.want for violation in found["apiserver"]] == ["other-server among the program's"]
    with pytest.raises(BackendUnavailableError, match="connection refused"):
        opened(server, url=f"https://127.0.0.1:{free_port()}").check([SPECS["apiserver"]])


def test_each_node_has_provisioners_of_its_own(server: StepCA) -> None:
    """With the node in the profile the scripts of several nodes stand side by side, and take nothing of each other."""
    shared, own = (printed(server.settings(profile=profile)) for profile in ("kubeadm-{usage}", "{node}-{usage}"))
    assert [(file.name, file.by_node) for file in shared] == [("step-ca-ca.sh", False), ("try-ca.sh", True)]
    assert [file.by_node for file in own] == [True, True]
    assert set(re.findall(r"(?m)^provisioner (\S+)", own[0].text)) == {"cp-1-server", "cp-1-client", "cp-1-peer"}
    assert [file.name for file in printed({"command": ["/usr/local/bin/other"]})] == ["try-ca.sh"]


UNKNOWN = name((NameOID.USER_ID, "x"))


@pytest.mark.parametrize(
    ("profile", "items", "found"),
    [
        ("kubeadm", LIVE, "one usage class"),
        ("{usage}", {"admin.conf": live("admin.conf", subject=UNKNOWN)}, "attributes that step-ca knows, found UID"),
        ("{usage}", {"apiserver": live("apiserver", sans=[x509.RegisteredID(NameOID.USER_ID)])}, "found registeredID"),
    ],
)
def test_setup_names_what_step_ca_can_not_sign(
    server: StepCA, profile: str, items: dict[str, x509.Certificate], found: str
) -> None:
    """`setup` names it before an administrator makes a provisioner that refuses it."""
    with pytest.raises(BridgeError, match=found):
        printed(server.settings(profile=profile), items)


@pytest.mark.attack("N20")
def test_odd_names_are_names(server: StepCA) -> None:
    """Quotes, marks of templates, line ends and what Go escapes are characters of a name, for the shell and for step-ca."""
    request = sign_request(ODD["admin.conf"], SPECS["admin.conf"], "ecdsa-p256", VALIDITY)
    assert violations(opened(server, profile="odd-{usage}").sign(request), request) == set()
    assert not (server.directory / "ran").exists()


def test_the_example_names_the_version_that_it_was_tried_with() -> None:
    """The kit's."""
    said = subprocess.run([programs.require("step-ca"), "version"], capture_output=True, text=True, check=True).stdout
    assert f"Tried with step-ca and step {said.partition('/')[2].split()[0]}." in step_ca.EXAMPLE.read_text()


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("\033[32m✔\033[0m CA: https://ca.example:8502 \nerror: no SAN evil.example", 2),
        ("error: https://ca.example:8503 forbids it", 2),
        ("The request could not be completed: no SAN timeout.example. Re-run with STEPDEBUG=1.", 2),
        ("The certificate authority encountered an Internal Server Error. Please see the logs.", 3),
        ("error: HTTP 503 Service Unavailable", 3),
        ("dial tcp 192.0.2.1:443: connect: connection refused", 3),
    ],
)
def test_a_port_is_no_status(tmp_path: Path, said: str, status: int) -> None:
    """What `step` says holds the CA's URL, whose port may end like a status that means "not now"."""
    step = tmp_path / "step"
    step.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{said}\nEND\nexit 1\n")
    step.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{step_ca.PATH}", "CERTMONGER_CA_PROFILE": "any", "CERTMONGER_CSR": "any"}
    words = [str(step_ca.EXAMPLE), "https://ca.example:8502", "root.crt", "password"]
    assert subprocess.run(words, env=environment, capture_output=True, check=False).returncode == status
