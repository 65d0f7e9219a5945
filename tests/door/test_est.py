"""EST at the door, with real clients: curl, GlobalSign's `estclient` and our own backend."""

from __future__ import annotations

import base64
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from bridge.door.est import csr_attributes
from bridge.door.store import DoorDatabase, sqlite_url
from bridge.errors import Exit
from bridge.pki.csr import generate_key, key_pem
from bridge.specs import SPECS
from bridge.system.waiting import wait_until
from tests.kit import programs
from tests.kit.cas import Bridge, live_certificates
from tests.kit.desks import POLICY
from tests.kit.est_door import (
    NAMES,
    ROOT,
    TYPE,
    EstDoor,
    body_of,
    certificates,
    make_csr,
    make_est_door,
    write_pair,
)
from tests.kit.pki import Pki, handmade_pki
from tests.kit.serving import Answer, running

_PATIENCE = timedelta(minutes=3)
_SIMPLE = "/web/simpleenroll"


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory, pki: Pki) -> Iterator[EstDoor]:
    made = make_est_door(tmp_path_factory.mktemp("est"), pki)
    with running(made.program):
        yield made


@pytest.fixture
def own_door(tmp_path: Path, pki: Pki) -> Iterator[EstDoor]:
    made = make_est_door(tmp_path, pki)
    with running(made.program):
        yield made


#: The program, which keeps a client waiting until it has its certificate: some clients can't be told to come again.
_HOLDS = """\
from datetime import timedelta
from bridge.door import est
est._HOLD = timedelta(minutes=5)
from bridge.entry import main
main()
"""


@pytest.fixture
def holding_door(tmp_path: Path, pki: Pki) -> Iterator[EstDoor]:
    made = make_est_door(tmp_path, pki, settings='exchange_for = "10m"')
    with running(made.program, [sys.executable, "-c", _HOLDS]):
        yield made


def decided(
    door: EstDoor, csr: x509.CertificateSigningRequest, agent: Mapping[str, Path] | None, path: str = _SIMPLE
) -> Answer:
    """What becomes of an enrolment in the end."""
    return wait_until(lambda: door.enrol(csr, agent, path), lambda one: one.status != 202, _PATIENCE, pause_seconds=0.2)


def enrolled(
    door: EstDoor, csr: x509.CertificateSigningRequest, agent: Mapping[str, Path] | None, path: str = _SIMPLE
) -> x509.Certificate:
    """The one certificate that it gives."""
    [certificate] = certificates(decided(door, csr, agent, path))
    return certificate


def test_an_agent_enrols_and_its_certificate_renews_itself(own_door: EstDoor) -> None:
    """An agent enrols by `simpleenroll` and renews by `simplereenroll` with that certificate; the audit log names the requester."""
    key, renewed_key = generate_key("ecdsa-p256"), generate_key("ecdsa-p256")
    names = ["cp-1", "a.cp-1.example.com", "192.0.2.7"]
    first = enrolled(own_door, make_csr(sans=names, key=key), own_door.agent())
    pair = write_pair(own_door.directory / "first", first, key)
    second = enrolled(own_door, make_csr(sans=names, key=renewed_key), pair, "/web/simplereenroll")
    third = enrolled(own_door, make_csr(sans=names), pair, "/simplereenroll")  # the label `default`

    assert first.public_key() == key.public_key()
    assert second.public_key() == renewed_key.public_key()
    assert second.subject == first.subject == third.subject
    assert timedelta(days=29) < second.not_valid_after_utc - second.not_valid_before_utc < timedelta(days=31)
    assert len(own_door.desk.issued()) == 3
    log = own_door.desk.run("audit", "show", "--output", "json").stdout
    assert "by EST's simpleenroll of label web, in TLS as O=agents,CN=cp-1" in log
    assert "by EST's simplereenroll of label web, in TLS as CN=web.cp-1" in log
    assert own_door.desk.run("audit", "verify").returncode == 0


def test_the_same_request_gets_the_same_certificate(own_door: EstDoor) -> None:
    """Nothing is signed twice, nor when the answer is not kept any more; a new CSR is a request of its own."""
    agent, csr = own_door.agent(), make_csr()
    found = [enrolled(own_door, csr, agent) for _ in range(2)]
    other = enrolled(own_door, make_csr(), agent)
    memory = DoorDatabase(sqlite_url(own_door.desk.state / "door.db"))
    memory.forget(datetime.now(UTC) + timedelta(days=1), datetime.now(UTC) + timedelta(days=1))
    memory.close()
    late = own_door.enrol(csr, agent)

    assert found[0] == found[1] != other
    assert len(own_door.desk.issued()) == 2
    assert (late.status, b"too old (serve.keep): make a new CSR" in late.body) == (403, True)


def test_an_answer_that_takes_time_is_waited_for(own_door: EstDoor) -> None:
    """202 with Retry-After while the CA is away; the same request gets the certificate when it is back."""
    agent, csr = own_door.agent(), make_csr()
    away = own_door.desk.ca("ca").with_name("away")
    own_door.desk.ca("ca").rename(away)
    waiting = own_door.enrol(csr, agent)
    away.rename(own_door.desk.ca("ca"))

    assert waiting.status == 202
    assert int(waiting.headers["retry-after"]) >= 1
    assert str(own_door.desk.directory) not in waiting.body.decode()
    assert enrolled(own_door, csr, agent).public_key() == csr.public_key()
    assert len(own_door.desk.issued()) == 1


def test_cacerts_has_the_cas_certificate(door: EstDoor, pki: Pki) -> None:
    """For everyone, with the headers that older clients insist on; a label that there is not has none."""
    answer = door.ask("GET", "/web/cacerts")
    ca = x509.load_pem_x509_certificate(pki.ca_pem("ca")[0])

    assert certificates(answer) == [ca]
    assert certificates(door.ask("GET", "/cacerts")) == [ca]
    assert answer.headers["content-type"] == "application/pkcs7-mime; smime-type=certs-only"
    assert answer.headers["content-transfer-encoding"] == "base64"
    assert door.ask("GET", "/other/cacerts").status == 404


def test_csrattrs_names_the_keys(door: EstDoor) -> None:
    """OpenSSL reads the key algorithms that the policy allows; an algorithm that EST has no words for is left out."""
    answer = door.ask("GET", "/web/csrattrs")
    parse = ["openssl", "asn1parse", "-inform", "DER"]
    read = subprocess.run(parse, input=base64.b64decode(answer.body), capture_output=True, check=True).stdout.decode()

    assert answer.headers["content-type"] == "application/csrattrs"
    for text in ("rsaEncryption", ":0800", ":0C00", ":1000", "id-ecPublicKey", "prime256v1", "secp384r1"):
        assert text in read
    assert base64.b64decode(csr_attributes(["ed25519"])) == bytes([0x30, 0])


@pytest.mark.parametrize(
    "changed",
    [
        lambda body: b"".join(body.split()),
        lambda body: body.replace(b"\n", b"\r\n"),
        lambda body: b"\r\n \t" + body.replace(b"\n", b" \n") + b"\n\n",
    ],
    ids=["one line", "CR and LF", "white space"],
)
def test_base64_may_be_laid_out_as_one_likes(door: EstDoor, changed: object) -> None:
    """RFC 8951: line ends and white space do not count, nor does Content-Transfer-Encoding."""
    assert callable(changed)
    body, agent = changed(body_of(make_csr())), door.agent()
    headers = {"Content_Type": f"{TYPE}; charset=utf-8", "Content_Transfer_Encoding": "binary"}

    assert door.ask("POST", "/web/simpleenroll", body, agent, **headers).status in {200, 202}


def test_a_revoked_certificate_renews_nothing(own_door: EstDoor) -> None:
    """The CA is asked before it signs; the certificate beside it, which is not revoked, is renewed."""
    keys = [generate_key("ecdsa-p256") for _ in range(2)]
    pairs = [
        write_pair(own_door.directory / f"own-{n}", enrolled(own_door, make_csr(key=key), own_door.agent()), key)
        for n, key in enumerate(keys)
    ]
    index = own_door.desk.ca("ca") / "index.txt"
    first, *rest = index.read_text().splitlines(keepends=True)
    status, end, _, more = first.split("\t", 3)
    assert status == "V"
    index.write_text("".join([f"R\t{end}\t260101000000Z\t{more}", *rest]))
    wanted = x509.load_pem_x509_certificate(pairs[0]["client_cert"].read_bytes()).serial_number
    assert int(more.split("\t")[0], 16) == wanted

    refused = decided(own_door, make_csr(), pairs[0], "/web/simplereenroll")

    assert refused.status == 403
    assert b"not revoked" in refused.body
    assert enrolled(own_door, make_csr(), pairs[1], "/web/simplereenroll")
    assert len(own_door.desk.issued()) == 3


def test_the_policy_is_asked_again_before_signing(own_door: EstDoor) -> None:
    """A label that was taken away while the request waited gives nothing; a request of a label that is left is signed."""
    agent, csr, other = own_door.agent(), make_csr(), make_csr()
    ca, policy = own_door.desk.ca("ca"), own_door.desk.policy
    ca.rename(ca.with_name("away"))
    waiting = [own_door.enrol(one, agent, path) for one, path in ((csr, _SIMPLE), (other, "/more/simpleenroll"))]
    before = policy.read_text()
    policy.write_text(before.replace('"O=agents,CN={node}", "CN=web.{node}"', '"CN=web.{node}"'))
    ca.with_name("away").rename(ca)
    granted = decided(own_door, other, agent, "/more/simpleenroll")

    assert [one.status for one in waiting] == [202, 202]
    assert granted.status == 200
    assert own_door.enrol(csr, agent).status == 403
    log = own_door.desk.run("audit", "show").stdout
    assert "client: wanted CN=web.{node}, found O=agents,CN=cp-1" in " ".join(log.split())
    assert len(own_door.desk.issued()) == 1


# --- clients ----------------------------------------------------------------------------------------------------------


def test_curl(holding_door: EstDoor, tmp_path: Path) -> None:
    """As the page shows it: openssl makes the CSR, curl sends it, openssl reads the certificate."""
    agent, program = holding_door.agent(), holding_door.program
    script = f"""\
    set -e
    openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout web.key -subj /CN=web.cp-1 -outform DER -out web.csr
    openssl base64 -in web.csr -out web.csr.b64
    curl --silent --show-error --fail --cacert {program.ca} --cert {agent["client_cert"]} --key {agent["client_key"]} \
        --header 'Content-Type: application/pkcs10' --data-binary @web.csr.b64 \
        --retry 30 --retry-delay 1 --output web.p7.b64 {program.url}{ROOT}/web/simpleenroll
    openssl base64 -d -in web.p7.b64 | openssl pkcs7 -inform DER -print_certs -out web.crt
    openssl x509 -in web.crt -noout -subject
    """
    run = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "subject=CN = web.cp-1"


@pytest.mark.kube("estclient")
def test_estclient(holding_door: EstDoor, tmp_path: Path) -> None:
    """GlobalSign's client: cacerts, csrattrs, enroll with an agent's certificate, reenroll with the one that came."""
    agent = holding_door.agent()
    key = generate_key("ecdsa-p256")
    (tmp_path / "web.key").write_bytes(key_pem(key))
    (tmp_path / "web.csr").write_bytes(make_csr(key=key).public_bytes(Encoding.PEM))
    client = [str(programs.require("estclient"))]

    def run(operation: str, *args: str | Path) -> str:
        where: list[str | Path] = [
            "-server",
            f"127.0.0.1:{holding_door.program.port}",
            "-explicit",
            holding_door.program.ca,
            "-aps",
            "web",
        ]
        done = subprocess.run(
            [*client, operation, *map(str, where), *map(str, args)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    shown: list[str | Path] = ["-certs", agent["client_cert"], "-key", agent["client_key"]]
    assert "BEGIN CERTIFICATE" in run("cacerts")
    assert "rsaEncryption" in run("csrattrs") or run("csrattrs")
    (tmp_path / "web.crt").write_text(run("enroll", *shown, "-csr", tmp_path / "web.csr"))
    again = run("reenroll", "-certs", tmp_path / "web.crt", "-key", tmp_path / "web.key")

    first = x509.load_pem_x509_certificate((tmp_path / "web.crt").read_bytes())
    second = x509.load_pem_x509_certificate(again.encode())
    assert first.public_key() == second.public_key() == key.public_key()
    assert first.serial_number != second.serial_number


def test_our_own_backend_renews_a_node(tmp_path: Path) -> None:
    """`renew all` by EST, with an agent's certificate and a label for each certificate."""
    node = handmade_pki(tmp_path / "node")
    bridge = Bridge(pki=node, directory=tmp_path / "bridge")
    before = live_certificates(node)
    labels = "".join(
        f'[est."{SPECS[name].authority.name}.{name}"]\ncertificate = "{name}"\ncluster = "kubernetes"\nclients = ["O=agents,CN={{node}}"]\nclients_ca = "{{agents}}"\n'
        for name in before
    )
    door = make_est_door(tmp_path / "door", node, policy=POLICY + NAMES + labels)
    with running(door.program):
        agent = {key: str(path) for key, path in door.agent().items()}
        more = {"url": door.program.url, "ca_file": str(door.program.ca), **agent}
        bridge.add("backend.door", {"type": "est", **more})
        bridge.add("restart", {"method": "none"})
        for authority in door.desk.authorities:
            bridge.add(f"authority.{authority}", {"backend": "door", "label": f"{authority}.{{name}}"})
        last = wait_until(  # 202 until the door has signed, which takes a busy machine some seconds a certificate
            lambda: bridge.run("renew", "all"), lambda run: run.returncode != Exit.WAITING, _PATIENCE, pause_seconds=1
        )

    after = live_certificates(node)
    assert last.returncode == Exit.DONE, last.stdout + last.stderr
    assert [name for name in before if before[name] == after[name]] == []
    signed = {int(row.split("\t")[3], 16) for row in door.desk.issued()}
    assert {one.serial_number for one in after.values()} <= signed
