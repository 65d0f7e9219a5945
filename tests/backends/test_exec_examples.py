"""
The example scripts of `config/exec/`, each against a stand-in for its CA's command line that checks every argument.

What the real programs make of these arguments is their documentation's word; they were not tried. step-ca was:
`test_exec_step_ca.py`.
"""

from __future__ import annotations

import hashlib
import os
import pwd
import re
import shutil
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from backends.exec import ExecBackend
from backends.exec.settings import ExecSettings
from bridge.ca import registry
from bridge.contract import Issued, Pending, SignRequest
from bridge.errors import BackendError, BackendRefusedError, BackendUnavailableError
from bridge.settings.load import parse
from bridge.specs import SPECS
from bridge.testing import TestCA, sign_request
from tests.kit.issuing import Signer
from tests.kit.stand_in import Call, StandIn

EXAMPLES = Path(__file__).parents[2] / "config/exec"
CA = TestCA.make()
CA_PEM = CA.certificate_pem.decode()
SIGNER = Signer(certificate=CA.certificate, key=CA.key)
NAMES = ("apiserver", "admin.conf", "etcd-peer")
REQUESTS = {name: sign_request(CA.leaf(SPECS[name]), SPECS[name], "ecdsa-p256", timedelta(days=365)) for name in NAMES}
APISERVER = REQUESTS["apiserver"]
ARN = "arn:aws:acm-pca:eu-central-1:111122223333:certificate-authority/1"


def csr(request: SignRequest) -> str:
    return request.csr_pem.decode()


def csr_hash(request: SignRequest) -> str:
    """As the scripts have it: of the CSR with two line ends, one of which is `printf`'s."""
    return hashlib.sha256(request.csr_pem + b"\n").hexdigest()


def leaf(request: SignRequest) -> str:
    now = datetime.now(UTC)
    issued = SIGNER.issue(request, begin=now - timedelta(minutes=5), end=now + timedelta(days=365))
    return issued.leaf.public_bytes(Encoding.PEM).decode()


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[StandIn]:
    """Every call that the test announced has to come."""
    made = StandIn(tmp_path / "stand-in")
    yield made
    made.done()


def opened(script: str, stand_in: StandIn, *arguments: str, profile: str = "{usage}") -> ExecBackend:
    """A copy that only its owner can write, as an operator installs it."""
    program = stand_in.directory / "example" / script
    program.parent.mkdir()
    shutil.copy(EXAMPLES / script, program)
    program.chmod(0o755)
    return ExecBackend.from_settings(
        ExecSettings(
            command=(str(program), *arguments),
            profile=profile,
            environment={"PATH": stand_in.path},
            timeout=timedelta(minutes=3),
        )
    )


def issued(answer: Issued | Pending, request: SignRequest) -> Issued:
    assert isinstance(answer, Issued)
    assert answer.leaf.public_key() == request.csr.public_key()
    return answer


def aws(command: str, *arguments: str, **answer: object) -> Call:
    words = ["acm-pca", command, *arguments, "--certificate-authority-arn", re.escape(ARN), "--output", "text"]
    return Call(program="aws", arguments=words, **answer)  # type: ignore[arg-type]


def aws_issue(request: SignRequest, template: str, **answer: object) -> Call:
    words = [
        *("--csr", "fileb://.*/csr.pem", "--signing-algorithm", "SHA256WITHRSA"),
        *("--template-arn", f"arn:aws:acm-pca:::template/{template}/V1", "--validity", "Value=365,Type=DAYS"),
        *("--idempotency-token", csr_hash(request)[:32], "--query", "CertificateArn"),
    ]
    return aws("issue-certificate", *words, reads={4: csr(request)}, **answer)


def aws_get(**answer: object) -> Call:
    words = ["--certificate-arn", f"{ARN}/certificate/7", "--query", r"\[Certificate,CertificateChain\]"]
    return aws("get-certificate", *words, **answer)


SOON = "An error occurred (RequestInProgressException) when calling the GetCertificate operation\n"


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("apiserver", "EndEntityServerAuthCertificate"),
        ("admin.conf", "EndEntityClientAuthCertificate"),
        ("etcd-peer", "EndEntityCertificate"),
    ],
)
def test_aws_issues_by_the_usage_classs_template(stand_in: StandIn, name: str, template: str) -> None:
    """Template, validity and idempotency token go out; certificate and chain come back after a short wait."""
    request = REQUESTS[name]
    stand_in.expect(
        aws_issue(request, template, stdout=f"{ARN}/certificate/7\n"),
        aws_get(stderr=SOON, status=254),
        aws_get(stdout=f"{leaf(request)}\t{CA_PEM}"),
    )
    answer = issued(opened("aws-private-ca", stand_in, ARN).sign(request), request)
    assert answer.intermediates == (CA.certificate,)


def test_aws_answers_later(stand_in: StandIn) -> None:
    """A certificate that takes long is asked for by its ARN in a later run."""
    stand_in.expect(
        aws_issue(APISERVER, "EndEntityServerAuthCertificate", stdout=f"{ARN}/certificate/7\n"),
        *[aws_get(stderr=SOON, status=254)] * 4,
    )
    backend = opened("aws-private-ca", stand_in, ARN)
    answer = backend.sign(APISERVER)
    assert isinstance(answer, Pending)
    assert answer.reference == f"{ARN}/certificate/7"
    stand_in.expect(aws_get(stdout=f"{leaf(APISERVER)}\tNone\n"))
    issued(backend.collect(APISERVER, answer.reference), APISERVER)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("An error occurred (ThrottlingException) when calling", BackendUnavailableError),
        ('Could not connect to the endpoint URL: "https://acm-pca', BackendUnavailableError),
        ("An error occurred (AccessDeniedException) when calling", BackendRefusedError),
        ("An error occurred (InvalidStateException) when calling", BackendRefusedError),
        ("An error occurred (AccessDeniedException) for connect.example", BackendRefusedError),
    ],
)
def test_aws_tells_no_from_not_now(stand_in: StandIn, said: str, error: type[BackendError]) -> None:
    """AWS's own words reach the operator, and only what may pass is tried again."""
    stand_in.expect(aws_issue(APISERVER, "EndEntityServerAuthCertificate", stderr=said, status=254))
    with pytest.raises(error, match=re.escape(said[:40])):
        opened("aws-private-ca", stand_in, ARN).sign(APISERVER)


def test_aws_is_looked_at_before_it_signs(stand_in: StandIn) -> None:
    """Profiles are compared without a request; the CA's own certificates are had for one."""
    query = ["--query", r"\[Certificate,CertificateChain\]"]
    stand_in.expect(aws("get-certificate-authority-certificate", *query, stdout=f"{CA_PEM}\tNone\n"))
    backend = opened("aws-private-ca", stand_in, ARN)
    assert backend.check([SPECS[name] for name in NAMES]) == {}
    assert backend.issuers() == [CA.certificate]


def test_aws_has_no_other_profile(tmp_path: Path) -> None:
    """A profile that the script does not know is found before anything is asked."""
    made = StandIn(tmp_path / "stand-in")
    found = opened("aws-private-ca", made, ARN, profile="kubeadm-{usage}").check([SPECS["apiserver"]])
    assert [violation.want for violation in found["apiserver"]] == ["kubeadm-server among the program's"]


GOOGLE = ["--issuer-pool", "kube", "--issuer-location", "europe-west3", "--quiet"]
TEMPLATES = "projects/corp/locations/europe-west3/certificateTemplates/kubeadm-{usage}"


def gcloud_create(request: SignRequest, **answer: object) -> Call:
    words = ["privateca", "certificates", "create", f"ca-bridge-{csr_hash(request)[:40]}", "--csr", ".*/csr.pem"]
    words += ["--cert-output-file", ".*/out", "--validity", "P365D"]
    words += ["--template", TEMPLATES.format(usage=request.spec.usage), *GOOGLE]
    return Call(program="gcloud", arguments=words, reads={6: csr(request)}, **answer)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_google_issues_by_the_usage_classs_template(stand_in: StandIn, name: str) -> None:
    """The certificate's name follows from the CSR, its usages from the template."""
    request = REQUESTS[name]
    stand_in.expect(gcloud_create(request, writes={8: leaf(request) + CA_PEM}))
    backend = opened("google-cas", stand_in, "kube", "europe-west3", profile=TEMPLATES)
    assert issued(backend.sign(request), request).intermediates == (CA.certificate,)


def test_google_is_not_asked_for_a_second_one(stand_in: StandIn) -> None:
    """A certificate that a lost answer held is fetched."""
    name = f"ca-bridge-{csr_hash(APISERVER)[:40]}"
    words = ["privateca", "certificates", "describe", name, "--format"]
    words += [r"value\(pemCertificate,pemCertificateChain\)", *GOOGLE]
    stand_in.expect(
        gcloud_create(APISERVER, stderr="ERROR: (gcloud) ALREADY_EXISTS: Resource", status=1),
        Call(program="gcloud", arguments=words, stdout=f"{leaf(APISERVER)}\t{CA_PEM}"),
    )
    issued(opened("google-cas", stand_in, "kube", "europe-west3", profile=TEMPLATES).sign(APISERVER), APISERVER)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("ERROR: (gcloud.privateca.certificates.create) UNAVAILABLE: backend", BackendUnavailableError),
        ("ERROR: (gcloud.privateca.certificates.create) PERMISSION_DENIED: no", BackendRefusedError),
        ("ERROR: (gcloud.privateca.certificates.create) PERMISSION_DENIED: pool internal", BackendRefusedError),
        ("ERROR: (gcloud.privateca.certificates.create) connection reset", BackendUnavailableError),
        ("ERROR: (gcloud.privateca.certificates.create) INVALID_ARGUMENT: validity", BackendRefusedError),
    ],
)
def test_google_tells_no_from_not_now(stand_in: StandIn, said: str, error: type[BackendError]) -> None:
    """gcloud ends with 1 for all of them; the words decide."""
    stand_in.expect(gcloud_create(APISERVER, stderr=said, status=1))
    with pytest.raises(error, match=re.escape(said[:60])):
        opened("google-cas", stand_in, "kube", "europe-west3", profile=TEMPLATES).sign(APISERVER)


def test_google_tells_its_ca(stand_in: StandIn) -> None:
    """The pool's certificates are compared with the node's own."""
    words = ["privateca", "pools", "get-ca-certs", "kube", "--location", "europe-west3"]
    words += ["--output-file", ".*/out", "--quiet"]
    stand_in.expect(Call(program="gcloud", arguments=words, writes={8: CA_PEM}))
    assert opened("google-cas", stand_in, "kube", "europe-west3").issuers() == [CA.certificate]


def ssh(command: str, **answer: object) -> Call:
    words = ["-o", "BatchMode=yes", "--", "ca-bridge@win", re.escape(command)]
    return Call(program="ssh", arguments=words, **answer)  # type: ignore[arg-type]


def scp(source: str, target: str, **answer: object) -> Call:
    words = ["-q", "-o", "BatchMode=yes", "--", source, target]
    return Call(program="scp", arguments=words, **answer)  # type: ignore[arg-type]


CONFIG = "ca01.corp.example\\Corp CA"
PLACE = "C:/ca-bridge"


def certreq(request: SignRequest, **answer: object) -> list[Call]:
    name = csr_hash(request)[:32]
    template = f"K8s{request.spec.usage}"
    command = f'certreq -submit -f -q -config "{CONFIG}" -attrib "CertificateTemplate:{template}"'
    return [
        scp(".*/csr", f"ca-bridge@win:{PLACE}/{name}.csr", reads={5: csr(request)}),
        ssh(f"{command} {PLACE}/{name}.csr {PLACE}/{name}.cer", **answer),
    ]


def fetched(name: str, content: str) -> list[Call]:
    return [
        scp(f"ca-bridge@win:{PLACE}/{name}.cer", ".*/out", writes={6: content}),
        ssh(f'del "C:\\ca-bridge\\{name}.*"'),
    ]


def absent(name: str) -> Call:
    return scp(f"ca-bridge@win:{PLACE}/{name}.cer", ".*/out", stderr="scp: No such file\n", status=1)


def adcs(stand_in: StandIn) -> ExecBackend:
    return opened("adcs-certreq", stand_in, "ca-bridge@win", CONFIG, PLACE, profile="K8s{usage}")


@pytest.mark.parametrize("name", NAMES)
def test_adcs_issues_by_the_usage_classs_template(stand_in: StandIn, name: str) -> None:
    """The CSR is copied, submitted with the template's name, and the certificate copied back."""
    request = REQUESTS[name]
    said = 'RequestId: 41\r\nRequestId: "41"\r\nCertificate retrieved(Issued) Issued\r\n'
    stand_in.expect(*certreq(request, stdout=said), *fetched(csr_hash(request)[:32], leaf(request)))
    issued(adcs(stand_in).sign(request), request)


def test_adcs_waits_for_a_person(stand_in: StandIn) -> None:
    """certreq ends with 0 and no file; the request's number is the cookie, and a later run retrieves it."""
    said = 'RequestId: 42\r\nRequestId: "42"\r\nCertificate request is pending: Taken Under Submission (0)\r\n'
    stand_in.expect(*certreq(APISERVER, stdout=said), absent(csr_hash(APISERVER)[:32]))
    backend = adcs(stand_in)
    answer = backend.sign(APISERVER)
    assert isinstance(answer, Pending)
    assert answer.reference == "42"
    retrieve = f'certreq -retrieve -f -q -config "{CONFIG}" 42 {PLACE}/r42.cer'
    stand_in.expect(ssh(retrieve, stdout="RequestId: 42\r\nTaken Under Submission\r\n"), absent("r42"))
    again = backend.collect(APISERVER, "42")
    assert isinstance(again, Pending)
    assert again.reference == "42"
    stand_in.expect(ssh(retrieve, stdout="Certificate retrieved(Issued)\r\n"), *fetched("r42", leaf(APISERVER)))
    issued(backend.collect(APISERVER, again.reference), APISERVER)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("Certificate not issued (Denied) Denied by Policy Module  0x80094800", BackendRefusedError),
        ("The RPC server is unavailable. 0x800706ba (WIN32: 1722)", BackendUnavailableError),
    ],
)
def test_adcs_tells_no_from_not_now(stand_in: StandIn, said: str, error: type[BackendError]) -> None:
    """A refusal has a request's number, too, and is no waiting one."""
    stand_in.expect(*certreq(APISERVER, stdout=f"RequestId: 43\r\n{said}\r\n"), absent(csr_hash(APISERVER)[:32]))
    with pytest.raises(error, match=re.escape(said[:20])):
        adcs(stand_in).sign(APISERVER)


def test_adcs_is_not_reached(stand_in: StandIn) -> None:
    """ssh's own status is no answer of the CA."""
    stand_in.expect(*certreq(APISERVER, stderr="ssh: connect to host win port 22: Connection refused", status=255))
    with pytest.raises(BackendUnavailableError, match="Connection refused"):
        adcs(stand_in).sign(APISERVER)


def test_adcs_takes_no_cookie_that_is_no_number(tmp_path: Path) -> None:
    """It would be read by the shell of the Windows host."""
    made = StandIn(tmp_path / "stand-in")
    with pytest.raises(BackendRefusedError, match="request's number"):
        adcs(made).collect(APISERVER, "42 & del C:\\*")


def test_adcs_tells_its_ca(stand_in: StandIn) -> None:
    """The preflight pings the CA; its certificate may be DER."""
    stand_in.expect(
        ssh(f'certutil -config "{CONFIG}" -ping'),
        ssh(f'certutil -f -config "{CONFIG}" -ca.cert {PLACE}/ca.cer'),
        scp(f"ca-bridge@win:{PLACE}/ca.cer", ".*/ca.cer", writes={6: CA_PEM}),
    )
    backend = adcs(stand_in)
    assert backend.check([SPECS["apiserver"]]) == {}
    assert backend.issuers() == [CA.certificate]


# What cepces-submit of openSUSE's cepces reads and prints; its requests over SOAP are not imitated.
CEPCES = """\
#!/bin/sh
[ "$1" = --server=ca.corp.example ] || exit 99
case $CERTMONGER_OPERATION in
  IDENTIFY) echo "cepces 0.3.15" ;;
  GET-NEW-REQUEST-REQUIREMENTS) echo CERTMONGER_CA_PROFILE ;;
  GET-SUPPORTED-TEMPLATES) printf 'Kubernetesserver\\nKubernetesclient\\nKubernetespeer\\n' ;;
  SUBMIT) [ -z "${CERTMONGER_CERTIFICATE+set}" ] && [ -n "$CERTMONGER_CSR" ] || exit 2
          printf '3600\\n17,https://ca.corp.example/CES\\n'; exit 5 ;;
  POLL) [ "$CERTMONGER_CA_COOKIE" = "17,https://ca.corp.example/CES" ] || exit 2; cat "${0%/*}/leaf.pem" ;;
  *) exit 6 ;;
esac
"""


def test_cepces_is_run_as_it_is(tmp_path: Path) -> None:
    """The settings of `cepces.toml`: its templates are compared, its cookie of two parts comes back whole."""
    program = tmp_path / "cepces-submit"
    text = (EXAMPLES / "cepces.toml").read_text()
    settings = parse(text.replace("/usr/libexec/certmonger/cepces-submit", str(program)))
    program.write_text(CEPCES)
    program.chmod(0o755)
    (tmp_path / "leaf.pem").write_text(leaf(APISERVER))
    backend = registry.configured(settings, ["ca"])["ca"].open()
    assert isinstance(backend, ExecBackend)
    assert backend.check([SPECS["apiserver"]]) == {}
    answer = backend.sign(APISERVER)
    assert isinstance(answer, Pending)
    assert "3600 s" in answer.note
    issued(backend.collect(APISERVER, answer.reference), APISERVER)


@pytest.mark.parametrize("name", ["config.toml", "cepces.toml"])
def test_the_example_settings_load(name: str) -> None:
    """They load unchanged; and with each comment mark taken away every key is there."""
    text = (EXAMPLES / name).read_text()
    settings = parse(text)
    assert set(registry.configured(settings, settings.authorities)) == {"ca", "etcd-ca", "front-proxy-ca"}
    if name == "config.toml":
        full = re.sub(r"^# (?=\[|\"?[\w.]+\"? = )", "", text, flags=re.MULTILINE)
        full = full.replace('user = "ca-helper"', f'user = "{_me()}"')
        configured = registry.configured(parse(full), ["ca"])["ca"]
        assert isinstance(configured.settings, ExecSettings)
        named = set(tomllib.loads(full)["backend"]["site-ca"]) - {"type"}
        assert named == set(vars(configured.settings)) - {"node", "pairs"}


def _me() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name


def test_every_script_says_whether_it_was_tried() -> None:
    """A test against a stand-in does not count as one against the CA."""
    scripts = {path.name: path.read_text() for path in EXAMPLES.iterdir() if os.access(path, os.X_OK)}
    assert len(scripts) == 4
    assert "Tried with" in scripts.pop("step-ca")
    for text in scripts.values():
        assert "Tested with a stand-in" in text
        assert "not tried" in text


def test_the_stand_in_can_fail(tmp_path: Path) -> None:
    """One argument that differs, and a call that does not come, are noticed."""
    made = StandIn(tmp_path / "stand-in")
    made.expect(gcloud_create(APISERVER, stderr="not reached"))
    backend = opened("google-cas", made, "other", "europe-west3", profile=TEMPLATES)
    with pytest.raises(BackendRefusedError, match="stand-in: wanted"):
        backend.sign(APISERVER)
    with pytest.raises(AssertionError, match="other"):
        made.done()
