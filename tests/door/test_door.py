"""`ca-bridge serve`, run as it is: bundles over HTTPS, `openssl ca` with encrypted keys behind it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import resource
import signal
import socket
import ssl
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from backends.door import DoorBackend, DoorSettings
from backends.openssl.index import LOCK_NAME
from bridge.contract import Issued, Pending, SignRequest
from bridge.desk.desk import SIGNED
from bridge.errors import BackendRefusedError, BackendUnavailableError, Exit
from bridge.pki import csr as csrs
from bridge.pki.bundle import LARGEST_REQUEST_BYTES, AnswerBundle, BundledRequest, Refusal, RequestBundle, sign_request
from bridge.pki.bundle_format import digest, dumps, loads_answer
from bridge.pki.csr import PrivateKey
from bridge.specs import SPECS, USER
from bridge.system.waiting import wait_until
from tests.kit import openbao
from tests.kit.bundles import VALIDITY, changed, make_bundle, old_pairs
from tests.kit.cas import Bridge, live_certificates
from tests.kit.desks import POLICY, SIGNING_STEPS, Desk, killing, make_desk
from tests.kit.est import make_tls
from tests.kit.pki import Pki, handmade_pki
from tests.kit.serving import CA_BRIDGE, Answer, Database, ServeProgram, add_door, running
from tests.kit.small_disk import fill, needs_root, tmpfs

NodeEnd = Callable[..., DoorBackend]
Pairs = dict[str, tuple[x509.Certificate, PrivateKey]]
_PATIENCE = timedelta(minutes=3)
_DOCS = Path(__file__).parents[2] / "docs"
#: What the policy grants beside kubeadm's names: those of this node.
_ADDRESSES = "".join(
    f'\n[certificate.{name}]\nsans = ["{{node}}", "localhost", "kubernetes", ".default.svc", "kubernetes.default", '
    '"kubernetes.default.svc", ".svc.cluster.local", ".example.com", "*.wild.example.com", "0.0.0.0/0", "::/0"]\n'
    for name in ("apiserver", "etcd-server", "etcd-peer")
)


@pytest.fixture(scope="module")
def pairs(pki: Pki) -> Pairs:
    return old_pairs(pki)


@pytest.fixture
def door(desk: Desk, database: Database) -> Iterator[ServeProgram]:
    with running(add_door(desk.config, desk.directory, database.settings)) as program:
        yield program


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory, pki: Pki) -> Iterator[ServeProgram]:
    """A door for tests that leave nothing behind which others could see."""
    desk = make_desk(tmp_path_factory.mktemp("common") / "desk", pki)
    with running(add_door(desk.config, desk.directory)) as program:
        yield program


def some(pairs: Pairs, *names: str) -> Pairs:
    return {name: pairs[name] for name in names}


def place_of(answer: Answer) -> str:
    assert answer.status == 202, answer.body
    return answer.headers["location"]


def awaited(door: ServeProgram, place: str) -> AnswerBundle:
    """The answer, as soon as it is there."""
    answer = wait_until(
        lambda: door.ask("GET", place), lambda one: one.status not in {202, 503}, _PATIENCE, pause_seconds=0.1
    )
    assert answer.status == 200, answer.body
    return loads_answer(answer.body)


def asked(bundle: RequestBundle, name: str) -> SignRequest:
    [request] = [one for one in bundle.requests if one.name == name]
    return sign_request(request, bundle)


@pytest.fixture
def node_end() -> Iterator[NodeEnd]:
    """A node's end of a door, whose connections are closed after the test."""
    with contextlib.ExitStack() as stack:

        def made(door: ServeProgram, wait: timedelta = timedelta()) -> DoorBackend:
            settings = DoorSettings(url=door.url, ca_file=door.ca, node="cp-1", wait=wait)
            return stack.enter_context(contextlib.closing(DoorBackend.from_settings(settings)))

        yield made


# --- requests ---------------------------------------------------------------------------------------------------------


def test_a_bundle_is_signed_once(door: ServeProgram, desk: Desk, pairs: Pairs) -> None:
    """The same bundle has the same id, an id that can't be guessed, and gets one certificate for each request."""
    bundle = make_bundle(some(pairs, "apiserver", "etcd-server"))
    first, second = door.post(dumps(bundle)), door.post(dumps(bundle))
    answer = awaited(door, place_of(first))

    assert place_of(first) == place_of(second) == place_of(door.post(dumps(bundle)))
    assert first.headers["retry-after"] == "1"
    assert re.fullmatch("/v1/requests/[A-Za-z0-9_-]{43}", place_of(first))
    assert answer.request_digest == digest(bundle)
    assert {name: type(one) for name, one in answer.answers.items()} == {"apiserver": Issued, "etcd-server": Issued}
    assert len(desk.issued()) == 2
    assert desk.run("audit", "verify").returncode == 0
    assert door.ask("GET", f"/v1/requests/{'A' * 43}").status == 404


def test_a_users_csr_is_signed_for_each_lifetime(desk: Desk) -> None:
    """A person asks with one CSR again and again; for the same lifetime the answer is the same certificate."""
    desk.policy.write_text(f'{POLICY}proof = "optional"\n\n[users]\n')
    csr = x509.load_pem_x509_csr(
        csrs.build_for(csrs.Naming(subject=csrs.subject_of("bob")), csrs.generate_key("ecdsa-p256"))
    )
    made = RequestBundle(
        batch="", node="cp-1", cluster="kubernetes", created=datetime.now(UTC).replace(microsecond=0), requests=()
    )
    with running(add_door(desk.config, desk.directory)) as door:
        hours = list[float]()
        for batch, asks in enumerate((24, 1, 24)):
            request = BundledRequest(
                name="user", authority="ca", ekus=USER.ekus, validity=timedelta(hours=asks), csr=csr, replaces=None, proof=None
            )  # fmt: skip
            bundle = replace(made, batch=f"{batch:032}", requests=(request,))
            answer = awaited(door, place_of(door.post(dumps(bundle)))).answers["user"]
            assert isinstance(answer, Issued)
            hours.append(round((answer.leaf.not_valid_after_utc - datetime.now(UTC)) / timedelta(hours=1)))
    assert hours == [24, 1, 24]
    assert len(desk.issued()) == 2


def test_the_policy_and_the_proof_decide(door: ServeProgram, desk: Desk, pairs: Pairs) -> None:
    """A forged proof, another cluster and another node are refused; the good request beside a forged one is signed."""
    good = make_bundle(some(pairs, "apiserver", "front-proxy-client"))
    forged = changed(good, "apiserver", proof=b"forged")
    elsewhere = make_bundle(some(pairs, "apiserver"), cluster="other")
    stranger = make_bundle(some(pairs, "apiserver"), node="worker-1")
    unproven = changed(make_bundle(some(pairs, "apiserver")), "apiserver", proof=None)

    refused = [door.post(dumps(one)) for one in (elsewhere, stranger, unproven)]
    answers = awaited(door, place_of(door.post(dumps(forged)))).answers

    assert [one.status for one in refused] == [403] * 3
    assert ["cluster" in refused[0].document["error"], "worker-1" in refused[1].document["error"]] == [True, True]
    assert isinstance(answers["apiserver"], Refusal)
    assert isinstance(answers["front-proxy-client"], Issued)
    assert len(desk.issued()) == 1
    kept = door.ask("GET", "/metrics").body.decode()
    assert 'ca_bridge_serve_requests{state="answered"} 1' in kept  # and nothing of those that can't be signed
    assert 'serve_requests{state="waiting"}' not in kept


def test_a_ca_that_is_down_loses_no_request(door: ServeProgram, desk: Desk, pairs: Pairs) -> None:
    """The door takes requests, says "later", and signs when the CA is back; what the CA said stays at the door."""
    away = desk.ca("ca").with_name("away")
    desk.ca("ca").rename(away)
    place = place_of(door.post(dumps(make_bundle(some(pairs, "apiserver")))))
    waiting = wait_until(
        lambda: door.ask("GET", place),
        lambda one: "log says why" in one.document.get("note", ""),
        _PATIENCE,
        pause_seconds=0.1,
    )
    ready = door.ask("GET", "/readyz")
    later = place_of(door.post(dumps(make_bundle(some(pairs, "admin.conf")))))
    wait_until(
        lambda: door.ask("GET", later),
        lambda one: "log says why" in one.document.get("note", ""),
        _PATIENCE,
        pause_seconds=0.1,
    )
    # the round of the second request was one for the first one, too, which has nothing new to say
    recorded = [json.loads(line) for line in (desk.state / "audit.jsonl").read_text().splitlines()]
    assert sorted(one["name"] for one in recorded if "result" in one and str(desk.directory) in one["result"]) == [
        "admin.conf",
        "apiserver",
    ]
    away.rename(desk.ca("ca"))

    assert waiting.status == 202
    assert int(waiting.headers["retry-after"]) >= 1
    assert str(desk.directory) not in waiting.body.decode()
    assert any(str(desk.directory) in line["message"] for line in door.lines())
    assert ready.status == 200
    assert isinstance(awaited(door, place).answers["apiserver"], Issued)


def test_what_waits_for_another_ca_is_recorded_once(door: ServeProgram, desk: Desk, pairs: Pairs) -> None:
    """A certificate, a refusal and a trouble of a bundle that waits are recorded in its first round, and no other one."""
    away = desk.ca("etcd-ca").with_name("away")
    desk.ca("etcd-ca").rename(away)
    bundle = changed(make_bundle(some(pairs, "apiserver", "admin.conf", "etcd-server")), "admin.conf", proof=b"forged")
    place = place_of(door.post(dumps(bundle)))
    for _ in range(2):  # each begins a round for what waits, too
        later = place_of(door.post(dumps(make_bundle(some(pairs, "front-proxy-client")))))
        assert isinstance(awaited(door, later).answers["front-proxy-client"], Issued)
    waiting = events_of(desk, bundle)
    away.rename(desk.ca("etcd-ca"))
    answers = awaited(door, place).answers

    assert waiting == [("admin.conf", "refused"), ("apiserver", SIGNED), ("etcd-server", "failed")]
    assert isinstance(answers["apiserver"], Issued)
    assert events_of(desk, bundle) == sorted([*waiting, ("admin.conf", "refused"), ("etcd-server", SIGNED)])


def events_of(desk: Desk, bundle: RequestBundle) -> list[tuple[str, str]]:
    """Names and events of the audit log's lines about a bundle."""
    lines = [json.loads(line) for line in (desk.state / "audit.jsonl").read_text().splitlines()]
    about = f"request {digest(bundle)[:16]}"
    return sorted((one["name"], one["event"]) for one in lines if about in str(one))


def test_a_door_whose_worker_is_gone_works_on(door: ServeProgram, pairs: Pairs) -> None:
    """Its processes read and judge what comes; without them the door does it by itself, and gets others; monitors see it."""
    assert door.process is not None
    children = Path(f"/proc/{door.process.pid}/task/{door.process.pid}/children").read_text().split()
    assert children
    assert isinstance(
        awaited(door, place_of(door.post(dumps(make_bundle(some(pairs, "apiserver")))))).answers["apiserver"], Issued
    )
    assert running_workers(door) == len(children)
    for pid in children:
        os.kill(int(pid), signal.SIGKILL)
    forged = changed(make_bundle(some(pairs, "apiserver")), "apiserver", proof=None)
    assert door.post(dumps(forged)).status == 403
    assert isinstance(
        awaited(door, place_of(door.post(dumps(make_bundle(some(pairs, "admin.conf")))))).answers["admin.conf"], Issued
    )

    def worked() -> int:
        assert door.post(dumps(forged)).status == 403
        return running_workers(door)

    wait_until(worked, lambda count: count == len(children), _PATIENCE, pause_seconds=0.5)
    assert running_workers(door) == len(children)
    assert any("a worker process has ended" in line for line in door.said)


@pytest.mark.parametrize("seconds", [1.0, 3600.0])
def test_a_worker_that_hangs_loses_no_request(desk: Desk, pairs: Pairs, seconds: float) -> None:
    """After a time the door ends it, and works on; before, it says "later", and neither holds up the door's own end."""
    door = add_door(desk.config, desk.directory)
    bundle, is_ended = dumps(make_bundle(some(pairs, "apiserver"))), seconds == 1.0
    patch = f"from bridge.door import service\nservice._LONGEST_TASK_SECONDS = {seconds}\n"
    if is_ended:  # none begins in its place, and a bundle is waited for meanwhile
        patch += "from bridge.desk import workers\nworkers._REST_SECONDS = 3600.0\n"
        patch += "from bridge.door import signing\nsigning._WORKER_SECONDS = 300.0\n"
    door.start([sys.executable, "-c", f"{patch}from bridge.entry import main\nmain()"])
    assert door.process is not None
    children = Path(f"/proc/{door.process.pid}/task/{door.process.pid}/children").read_text().split()
    for pid in children:
        os.kill(int(pid), signal.SIGSTOP)

    first = door.post_once(bundle)
    if is_ended:
        assert isinstance(awaited(door, place_of(first)).answers["apiserver"], Issued)
    else:
        assert (first.status, first.headers["retry-after"]) == (503, "30")
        assert "send the same request again" in first.document["hint"]
        for pid in children:
            os.kill(int(pid), signal.SIGCONT)
        assert isinstance(awaited(door, place_of(door.post(bundle))).answers["apiserver"], Issued)
        for pid in children:
            os.kill(int(pid), signal.SIGSTOP)

    assert running_workers(door) == len(children) - is_ended
    assert door.stop() == Exit.DONE
    assert any("a worker process has ended" in line for line in door.said) is is_ended


def running_workers(door: ServeProgram) -> int:
    """As the monitors see it."""
    found = re.search(r'serve_workers{state="running"} (\d+)', door.ask("GET", "/metrics").body.decode())
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize(
    ("module", "function", "before"),
    [
        ("door.store", "DoorDatabase.receive", False),  # a request is kept, and its node does not know it
        *SIGNING_STEPS,
    ],
)
def test_a_killed_door_signs_nothing_twice(
    desk: Desk, database: Database, pairs: Pairs, tmp_path: Path, module: str, function: str, before: bool
) -> None:
    """Wherever it was killed, the next start answers, and each request has one certificate."""
    door = add_door(desk.config, desk.directory, database.settings)
    bundle = make_bundle(some(pairs, "apiserver", "etcd-server"))
    door.start([sys.executable, str(killing(tmp_path, module, function, before=before))])
    with contextlib.suppress(OSError, HTTPException):
        door.post(dumps(bundle))
    assert door.ended() == -signal.SIGKILL
    with running(door):
        answer = awaited(door, place_of(door.post(dumps(bundle))))

    assert all(isinstance(one, Issued) for one in answer.answers.values())
    assert len(desk.issued()) == 2
    assert desk.run("audit", "verify").returncode == 0


def test_a_killed_door_finds_what_openbao_has_signed(desk: Desk, pki: Pki, pairs: Pairs, tmp_path: Path) -> None:
    """A certificate whose door was killed with the answer in its hands is found among those of the mount, and goes out."""
    certificate, key = pki.ca_pem("ca")
    bundle, token = make_bundle(some(pairs, "apiserver")), tmp_path / "token"
    with openbao.dev_server() as bao:
        bao.add_ca("ca", certificate, key)
        bao.add_kubeadm_roles("ca", {name: old for name, (old, _) in pairs.items()}, VALIDITY)
        token.touch(mode=0o600)
        token.write_text(bao.root_token)
        table = f'type = "vault"\nurl = "{bao.url}"\nmount = "ca"\nrole = "kubeadm-{{name}}"\ntimeout = "3m"\nauth = {{ token_file = "{token}" }}'
        desk.config.write_text(
            f'[node]\nstate_dir = "{desk.state}"\n[backend.x]\n{table}\n[authority.ca]\nbackend = "x"\n'
        )
        door = add_door(desk.config, desk.directory)
        door.start([sys.executable, str(killing(tmp_path, "desk.desk", "_keep", before=True))])
        with contextlib.suppress(OSError, HTTPException):
            door.post(dumps(bundle))
        assert door.ended() == -signal.SIGKILL
        [signed] = bao.request("LIST", "ca/certs").json()["data"]["keys"]
        with running(door):
            answer = awaited(door, place_of(door.post(dumps(bundle)))).answers["apiserver"]

        assert bao.request("LIST", "ca/certs").json()["data"]["keys"] == [signed]
    assert isinstance(answer, Issued)
    assert f"{answer.leaf.serial_number:X}" == signed.replace(":", "").upper().lstrip("0")
    assert desk.run("audit", "verify").returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_door_that_ends_answers_what_it_has_begun(
    desk: Desk, database: Database, pairs: Pairs, number: signal.Signals
) -> None:
    """Each of these signals is an end with exit code 0; what waits is answered after the next start."""
    door = add_door(desk.config, desk.directory, database.settings)
    with running(door):
        place = place_of(door.post(dumps(make_bundle(pairs))))
        assert door.stop(number) == Exit.DONE
    with running(door):
        answer = awaited(door, place)

    assert len(answer.answers) == len(desk.issued()) == len(pairs)


def signed_without_room(door: ServeProgram, desk: Desk, bundle: bytes, spared_pages: int) -> int:
    """How many certificates the CA signs for a bundle while the state directory's disk has a few pages left."""
    filler, said, before = fill(desk.state, spared_pages), len(door.said), len(desk.issued())
    answer = door.post_once(bundle)
    assert answer.status in {202, 503}
    if answer.status == 202:
        wait_until(
            lambda: len(desk.issued()) > before or any("wait" in line for line in door.said[said:]),
            bool,
            _PATIENCE,
            pause_seconds=0.1,
        )
    found = len(desk.issued()) - before
    filler.unlink()
    return found


@needs_root
def test_a_full_disk_signs_nothing_that_is_not_recorded(desk: Desk, database: Database, pairs: Pairs) -> None:
    """Wherever the room of the state directory ends, a certificate is signed once, recorded, and delivered later."""
    with tmpfs(desk.state, "16m"), running(add_door(desk.config, desk.directory, database.settings)) as door:
        for count, spared_pages in enumerate((0, 1, 2, 4, 8, 16), 1):
            bundle = dumps(make_bundle(some(pairs, "apiserver")))
            assert signed_without_room(door, desk, bundle, spared_pages) <= bool(spared_pages)
            assert isinstance(awaited(door, place_of(door.post(bundle))).answers["apiserver"], Issued)
            assert len(desk.issued()) == count
        recorded = [json.loads(line) for line in (desk.state / "audit.jsonl").read_text().splitlines()]
        signed = {one["serialNumber"].replace(":", "") for one in recorded if one["event"] == SIGNED}
        assert signed == {row.split("\t")[3] for row in desk.issued()}
        assert desk.run("audit", "verify").returncode == 0


#: The program, which gives a CA so many seconds at its end.
_ENDING = "from bridge.door import service\nservice._DRAIN_SECONDS = {}\nfrom bridge.entry import main\nmain()"


@pytest.mark.parametrize("answers", [True, False])
def test_a_door_that_ends_while_a_ca_is_asked(desk: Desk, pairs: Pairs, *, answers: bool) -> None:
    """It waits for a CA that answers soon, and not for one that does not: that one signs once, after the next start."""
    door = add_door(desk.config, desk.directory)
    lock = desk.ca("etcd-ca") / LOCK_NAME
    with lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        door.start([sys.executable, "-c", _ENDING.format(300.0 if answers else 1.0)])
        assert door.process is not None
        place = place_of(door.post(dumps(make_bundle(some(pairs, "apiserver", "etcd-server", "etcd-peer")))))
        files = Path(f"/proc/{door.process.pid}/fd")
        wait_until(lambda: _opened(files, lock), bool, _PATIENCE, pause_seconds=0.05)  # it asks for the lock
        door.process.terminate()
        wait_until(lambda: any("shutting down" in one for one in door.said), bool, _PATIENCE, pause_seconds=0.05)
        if not answers:
            assert door.ended() == Exit.DONE
    assert door.ended() == Exit.DONE
    assert any("a CA has not answered" in one for one in door.said) is not answers
    assert len((desk.ca("etcd-ca") / "index.txt").read_text().splitlines()) == (2 if answers else 0)

    with running(door):
        answer = awaited(door, place)
    assert all(isinstance(one, Issued) for one in answer.answers.values())
    assert len(answer.answers) == len(desk.issued()) == 3


def _opened(files: Path, path: Path) -> bool:
    """Whether a process, whose open files are there, has this one open."""
    found = set[Path]()
    for file in files.iterdir():
        with contextlib.suppress(OSError):  # it was closed meanwhile
            found.add(file.readlink())
    return path in found


# --- a node -----------------------------------------------------------------------------------------------------------


def test_a_node_is_renewed_whole_without_a_secret(tmp_path: Path) -> None:
    """`renew` asks the door with its own keys as the proof, and installs what comes; nothing else is on the node."""
    node = handmade_pki(tmp_path / "node")
    desk = make_desk(tmp_path / "desk", node, policy=POLICY + _ADDRESSES)
    door = add_door(desk.config, desk.directory)
    bridge = Bridge(pki=node, directory=tmp_path / "bridge")
    bridge.add("restart", {"method": "none"})
    for authority in desk.authorities:
        bridge.add(f"authority.{authority}", {"backend": "door"})
    before = live_certificates(node)
    with running(door):
        bridge.add("backend.door", {"type": "door", "url": door.url, "ca_file": str(door.ca)})
        run = bridge.run("renew", "all")

    after = live_certificates(node)
    assert [name for name in before if before[name] == after[name]] == [], run.stderr
    assert len(desk.issued()) == len(before)
    assert run.returncode == Exit.DONE, run.stderr


def test_doctor_compares_the_doors_cas_with_the_nodes(tmp_path: Path) -> None:
    """Another CA behind the door is found before the night in which its answers would be refused."""
    node = handmade_pki(tmp_path / "node")
    desk = make_desk(tmp_path / "desk", node)
    bridge = Bridge(pki=node, directory=tmp_path / "bridge")
    for authority in desk.authorities:
        bridge.add(f"authority.{authority}", {"backend": "door"})
    with running(add_door(desk.config, desk.directory)) as door:
        bridge.add("backend.door", {"type": "door", "url": door.url, "ca_file": str(door.ca)})
        paths = [f"/v1/authorities/{authority}" for authority in desk.authorities]
        # the door looks for its CAs when it begins
        wait_until(
            lambda: {door.ask("GET", path).status for path in paths},
            lambda seen: seen == {200},
            _PATIENCE,
            pause_seconds=0.1,
        )
        good = bridge.run("doctor")
        (node.pki_dir / "front-proxy-ca.crt").write_bytes(node.ca_pem("ca")[0])
        bad = json.loads(bridge.run("doctor", "-o", "json").stdout)

    assert good.stdout.count("door (door) answers, and is the right CA") == 1
    found = {about: one["level"] for one in bad["findings"] if one["check"] == "backend" for about in one["about"]}
    assert found == {"backend of ca": "ok", "backend of etcd-ca": "ok", "backend of front-proxy-ca": "error"}


def test_a_killed_node_finds_its_certificate(common: ServeProgram, pairs: Pairs, node_end: NodeEnd) -> None:
    """The CSR alone, which no other machine knows, finds its certificate; another CSR finds none."""
    bundle, other = make_bundle(some(pairs, "apiserver")), make_bundle(some(pairs, "apiserver"))
    backend = node_end(common, wait=timedelta(minutes=2))
    issued = backend.sign(asked(bundle, "apiserver"))

    found = backend.recall([asked(bundle, "apiserver"), asked(other, "apiserver")], bundle.created)

    assert found == [issued, None]


def test_a_door_that_lost_its_database_is_asked_again(desk: Desk, pairs: Pairs, node_end: NodeEnd) -> None:
    """It refuses to sign until `restored`; the archive has the certificate, so that none is signed twice."""
    door, bundle = add_door(desk.config, desk.directory), make_bundle(some(pairs, "apiserver"))
    request = asked(bundle, "apiserver")
    with running(door):
        pending = node_end(door).sign(request)
        first = awaited(door, place_of(door.post(dumps(bundle)))).answers["apiserver"]
    for path in desk.state.glob("door.db*"):
        path.unlink()
    assert isinstance(pending, Pending)
    assert desk.run("serve-database", "restored").returncode == Exit.DONE
    with running(door):
        backend = node_end(door)
        again = backend.collect(request, pending.reference)
        assert isinstance(again, Pending)
        second = wait_until(
            lambda: backend.collect(request, again.reference),
            lambda one: isinstance(one, Issued),
            _PATIENCE,
            pause_seconds=0.1,
        )

    assert second == first
    assert len(desk.issued()) == 1


def test_a_node_hears_a_refusal(common: ServeProgram, pairs: Pairs, node_end: NodeEnd) -> None:
    """The reason is the policy's; a CA that the door does not have is found before anything is asked."""
    backend = node_end(common, wait=timedelta(minutes=2))
    with pytest.raises(BackendRefusedError, match="worker-1"):
        backend.sign(asked(make_bundle(some(pairs, "apiserver"), node="worker-1"), "apiserver"))


def test_a_door_with_some_of_the_cas(tmp_path: Path, pki: Pki, pairs: Pairs, node_end: NodeEnd) -> None:
    """A CA that the door lacks is found before any request, and a request for it is refused all the same."""
    desk = make_desk(tmp_path / "desk", pki, authorities=["ca"])
    bundle = make_bundle(some(pairs, "apiserver", "etcd-server"))
    with running(add_door(desk.config, desk.directory)) as door:
        backend = node_end(door, wait=timedelta(minutes=2))
        found = backend.check([SPECS["apiserver"], SPECS["etcd-server"]])
        answers = backend.sign_many([asked(bundle, "apiserver"), asked(bundle, "etcd-server")])

    assert list(found) == ["etcd-server"]
    assert [type(one) for one in answers] == [Issued, BackendRefusedError]


# --- clients that are no nodes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/requests", 405),
        ("PUT", "/v1/requests", 405),
        ("POST", "/v1/authorities", 405),
        ("HEAD", "/v1/authorities", 405),
        ("GET", "/", 404),
        ("GET", "/v1/requests/../../etc/passwd", 404),
        ("GET", "/v1/requests/%2e%2e%2f", 404),
        ("GET", "/v1/requests/' OR 1=1 --".replace(" ", "%20"), 404),
        ("GET", f"/v1/certificates/apiserver/{'0' * 64}", 404),
        ("GET", "/v1/authorities", 200),
        ("GET", "/healthz", 200),
        ("GET", "/readyz", 200),
        ("GET", "/metrics", 200),
    ],
)
def test_pages(common: ServeProgram, method: str, path: str, status: int) -> None:
    """Each existing page answers; any other path is an error with a sentence in it, and caches and browsers may not keep or reinterpret it."""
    answer = common.ask(method, path)

    assert answer.status == status, answer.body
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    if status != 200 and method != "HEAD":
        assert answer.document["error"].startswith(
            ("there is no ", "wanted ", "this page ", "this door ", "nothing was signed ")
        )


def test_what_is_no_bundle_is_not_kept(common: ServeProgram, pairs: Pairs) -> None:
    """Another type, no JSON, a changed bundle, an answer and too many bytes are refused; the twin is taken."""
    good = dumps(make_bundle(some(pairs, "apiserver")))
    statuses = {
        "type": common.ask("POST", "/v1/requests", good, Content_Type="text/plain").status,
        "text": common.post(b"text").status,
        "empty": common.post(b"").status,
        "changed": common.post(good.replace(b"cp-1", b"cp-2")).status,
        "good": common.post(good).status,
    }

    assert statuses == {"type": 415, "text": 400, "empty": 400, "changed": 400, "good": 202}
    head = b"POST /v1/requests HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    assert raw(common, head % (LARGEST_REQUEST_BYTES + 1)).startswith(b"HTTP/1.1 413 ")  # before the bytes come


def large_certificate(key: rsa.RSAPrivateKey, names: int) -> x509.Certificate:
    """As a company's CA with a key of 4096 bits signs it: long names, its own URLs, and so many SANs."""
    issuer = [
        (NameOID.ORGANIZATION_NAME, "o" * 60),
        (NameOID.ORGANIZATIONAL_UNIT_NAME, "u" * 60),
        (NameOID.COMMON_NAME, "c" * 60),
    ]
    sans = x509.SubjectAlternativeName(
        [x509.DNSName(f"{number:02}.control-plane.production.corp.example") for number in range(1 + names)]
    )
    lists = [x509.UniformResourceIdentifier(f"http://pki.corp.example/{'l' * 60}.crl")]
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder(
            subject_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cp-1")]),
            issuer_name=x509.Name([x509.NameAttribute(oid, value) for oid, value in issuer]),
            public_key=key.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=now,
            not_valid_after=now + VALIDITY,
        )
        .add_extension(sans, critical=False)
        .add_extension(x509.CRLDistributionPoints([x509.DistributionPoint(lists, None, None, None)]), critical=False)
        .sign(key, hashes.SHA512())
    )


def test_the_largest_bundle_of_a_node_is_taken(common: ServeProgram) -> None:
    """
    Keys of 4096 bits, every certificate of a control plane and as many further pairs, twenty SANs in each second one.

    It is read and judged, and one of 1.4 times its size would be.
    """
    key = rsa.generate_private_key(public_exponent=65537, key_size=4096)
    old: Pairs = {name: (large_certificate(key, 20 * (number % 2)), key) for number, name in enumerate(SPECS)}
    bundle = make_bundle(old, build=lambda one: x509.load_pem_x509_csr(csrs.build(one, key)))
    further = [replace(one, name=f"pair-{number}") for number, one in enumerate(bundle.requests)]
    data = dumps(replace(bundle, requests=(*bundle.requests, *further)))

    assert 1.4 * len(data) < LARGEST_REQUEST_BYTES
    assert common.post(data).status == 403  # by the policy, for each certificate


@pytest.mark.parametrize("status", [HTTPStatus.FORBIDDEN, HTTPStatus.BAD_REQUEST])
def test_a_batch_that_no_bundle_holds_goes_in_several(
    door: ServeProgram, desk: Desk, pairs: Pairs, node_end: NodeEnd, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """A bundle each of whose requests the door is against takes nothing from the others, and a single long one is not sent."""
    bundle = make_bundle(some(pairs, "apiserver", "admin.conf", "etcd-server", "front-proxy-client"))
    for name in ("apiserver", "admin.conf"):
        bundle = changed(bundle, name, proof=b"forged")
    half = replace(bundle, requests=bundle.requests[:2])
    monkeypatch.setattr("backends.door.LARGEST_REQUEST_BYTES", len(dumps(half)) + 200)
    requests = [sign_request(one, bundle) for one in bundle.requests]
    end = node_end(door, _PATIENCE)
    if status == HTTPStatus.BAD_REQUEST:  # as a door of another version may find a bundle
        of_another = lambda one: dumps(one).replace(b"admin.conf", b"admin_conf")  # noqa: E731
        monkeypatch.setattr("backends.door.dumps", of_another)

    answers = end.sign_many(requests)

    assert [type(one) for one in answers] == [BackendRefusedError, BackendRefusedError, Issued, Issued]
    assert f"HTTP {status:d}, " in str(answers[0])
    assert len(desk.issued()) == 2
    assert 'ca_bridge_serve_requests{state="answered"} 1' in door.ask("GET", "/metrics").body.decode()
    again = node_end(door, timedelta(microseconds=1)).sign_many(requests[2:])  # looked for once, when the time is over
    first, second = ([one.leaf for one in found if isinstance(one, Issued)] for found in (answers, again))
    assert first == second
    monkeypatch.setattr("backends.door.LARGEST_REQUEST_BYTES", 1000)
    late = end.sign_many(requests[2:])
    assert all("wanted at most 1000 bytes in the bundle of one request" in str(one) for one in late)


def test_each_metric_is_in_the_document(common: ServeProgram) -> None:
    """The page has no metric that docs/door.md has no row for."""
    shown = set(re.findall(r"^# TYPE (\w+) ", common.ask("GET", "/metrics").body.decode(), re.MULTILINE))
    told = set(re.findall(r"^\| `(ca_bridge_\w+)", (_DOCS / "door.md").read_text(), re.MULTILINE))

    assert {"ca_bridge_serve_connections", "ca_bridge_serve_workers"} <= shown
    assert shown <= told


_SQL = "' OR '1'='1'; DROP TABLE requests; --"


def test_sql_in_a_field_is_text(tmp_path: Path, pki: Pki, pairs: Pairs) -> None:
    """A cluster may be called like that, and is kept as it is; all else is refused, and no row or table has changed."""
    desk = make_desk(tmp_path / "desk", pki, policy=POLICY.replace('["kubernetes"]', '["*"]'))
    good = make_bundle(some(pairs, "apiserver"))
    named = x509.CertificateSigningRequestBuilder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _SQL)]))
    csr = named.sign(pairs["apiserver"][1], hashes.SHA256())
    hostile = {
        key: dumps(good).replace(old, json.dumps(_SQL).encode())
        for key, old in {
            "batch": f'"{good.batch}"'.encode(),
            "node": b'"cp-1"',
            "name": b'"apiserver"',
            "CA": b'"ca"',
        }.items()
    }
    hostile["subject"] = dumps(changed(good, "apiserver", csr=csr))
    with running(add_door(desk.config, desk.directory)) as door:
        assert len(set(hostile.values()) - {dumps(good)}) == 5
        found = {name: door.post(data).status for name, data in hostile.items()}
        header = {"Authorization": f"CA-Bridge-Enrolment {_SQL}", "Content_Type": "application/json"}
        bare = dumps(changed(good, "apiserver", proof=None))
        found["secret"] = door.ask("POST", "/v1/requests", bare, **header).status
        assert set(found.values()) <= {400, 403}, found
        for cluster in ("kubernetes", _SQL):
            bundle = make_bundle(some(pairs, "apiserver", "etcd-server"), cluster=cluster)
            answers = awaited(door, place_of(door.post(dumps(bundle)))).answers.values()
            assert all(isinstance(answer, Issued) for answer in answers)

    nodes = json.loads(desk.run("fleet", "-o", "json").stdout)["nodes"]
    assert {(one["node"], one["cluster"]) for one in nodes} == {("cp-1", "kubernetes"), ("cp-1", _SQL)}
    assert len(desk.issued()) == 4


def raw(door: ServeProgram, data: bytes) -> bytes:
    """All that comes back for these bytes."""
    plain = socket.create_connection(("127.0.0.1", door.port), timeout=180)
    with plain, door.context().wrap_socket(plain, server_hostname="127.0.0.1") as client:
        client.sendall(data)
        found = b""
        with contextlib.suppress(OSError):
            while part := client.recv(65536):
                found += part
        return found


@pytest.mark.attack("D10")
@pytest.mark.parametrize(
    "head",
    [
        b"POST /v1/requests HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /healthz HTTP/1.1\r\n\r\n",
        b"POST /v1/requests HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nContent-Length: 44\r\n\r\nGET /healthz HTTP/1.1\r\n\r\n",
        b"POST /v1/requests HTTP/1.1\r\nHost: a\r\nContent-Length: +0\r\n\r\nGET /healthz HTTP/1.1\r\n\r\n",
        b"POST /v1/requests HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /healthz HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost : a\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: b\rGET /healthz HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: b\0c\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: b\vc\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: b\r\n c\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: b\r\n\tContent-Length: 44\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n X: b\r\nHost: a\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: b\n\r\n",
        b"GET /healthz\r HTTP/1.1\r\nHost: a\r\n\r\n",
        b" GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n\r\n",
    ],
)
def test_a_request_has_one_length(common: ServeProgram, head: bytes) -> None:
    """No bytes are read as a second request that another program would have taken for a part of the first."""
    found = raw(common, head)

    assert found.count(b"HTTP/1.1 ") == 1, found
    assert re.match(rb"HTTP/1.1 4(00|11) ", found), found
    assert raw(common, _HEALTH % b"X: b\tc \xe4\r\n").startswith(b"HTTP/1.1 200 OK")
    assert not [line for line in common.lines() if line["level"] == "error"]


_HEALTH = b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n%s\r\n"


def test_a_head_has_an_end(common: ServeProgram) -> None:
    """One of more than 16 KiB gets no answer that it asked for; a shorter one does."""
    assert b"200 OK" not in raw(common, _HEALTH % (b"X: " + b"y" * 20000 + b"\r\n"))
    assert b"200 OK" in raw(common, _HEALTH % (b"X: " + b"y" * 2000 + b"\r\n"))


def test_silent_clients_keep_no_others_out(desk: Desk) -> None:
    """Those that say nothing take no thread; one address has a number of connections, and a further one is closed."""
    more = 'threads = 2\nconnections_per_peer = 8\nexchange_for = "10m"'
    with running(add_door(desk.config, desk.directory, more)) as door:
        with contextlib.ExitStack() as stack:
            for _ in range(5):
                stack.enter_context(socket.create_connection(("127.0.0.1", door.port)))
            wanted = {"open": 6, "turned_away": 0, "working": 1}
            seen = wait_until(lambda: connections(door), lambda one: one == wanted, _PATIENCE, pause_seconds=0.1)
            late = [stack.enter_context(socket.create_connection(("127.0.0.1", door.port))) for _ in range(8)]
            wait_until(lambda: any(map(is_closed, late)), bool, _PATIENCE, pause_seconds=0.1)
        over = wait_until(lambda: connections(door), lambda one: one["turned_away"] > 0, _PATIENCE, pause_seconds=0.1)

    assert seen == wanted
    assert over["turned_away"] > 0


@pytest.mark.attack("D9")
def test_a_reset_before_the_door_sees_the_connection_is_no_error(door: ServeProgram) -> None:
    """Strangers may do this as often as they like; it leaves no line in the log and no open connection."""
    assert door.process is not None
    door.process.send_signal(signal.SIGSTOP)
    try:
        for _ in range(50):
            with socket.create_connection(("127.0.0.1", door.port)) as client:
                client.sendall(b"\x16")
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    finally:
        door.process.send_signal(signal.SIGCONT)
    seen = wait_until(lambda: connections(door), lambda one: one["open"] == 1, _PATIENCE, pause_seconds=0.1)

    assert seen["open"] == 1
    assert not [line for line in door.lines() if line["level"] == "error"]


@pytest.mark.attack("D3")
def test_a_door_without_files_for_more_connections_goes_on(door: ServeProgram) -> None:
    """It ends the connections that are idle longest, says so in one line a minute, and answers the next client."""
    assert door.process is not None
    held = len(list(Path(f"/proc/{door.process.pid}/fd").iterdir()))
    resource.prlimit(door.process.pid, resource.RLIMIT_NOFILE, (held + 16, held + 16))
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(("127.0.0.1", door.port))) for _ in range(40)]
        wait_until(lambda: sum(map(is_closed, clients)) >= 30, bool, _PATIENCE, pause_seconds=0.1)
        assert door.ask("GET", "/healthz").status == 200
        assert not all(map(is_closed, clients))
    assert door.ask("GET", "/healthz").status == 200

    assert (
        1 <= sum("no room for a new connection" in line for line in door.said) <= 2
    )  # libraries say lines of their own
    assert not [line for line in door.said if "https: " in line]


@pytest.mark.attack("D3")
def test_a_door_begins_only_with_files_for_its_connections(desk: Desk) -> None:
    """A soft limit is raised; a hard one that is too low is an error of the settings, with the number that fits."""
    limited = ["prlimit", "--nofile=64:800"]
    with running(add_door(desk.config, desk.directory, "connections = 600"), [*limited, CA_BRIDGE]) as door:
        assert door.ask("GET", "/healthz").status == 200
    desk.config.write_text(desk.config.read_text().replace("connections = 600", "connections = 601"))
    command = [*limited, CA_BRIDGE, "serve", "--config", str(desk.config)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)

    assert run.returncode == Exit.USAGE
    assert "serve.connections: wanted at most 600" in " ".join(run.stderr.split())


def is_closed(client: socket.socket) -> bool:
    """Whether the other side has ended the connection, on which nothing was sent."""
    client.setblocking(False)
    try:
        return not client.recv(1)
    except BlockingIOError:
        return False
    except OSError:
        return True


def connections(door: ServeProgram) -> dict[str, int]:
    """What the door counts, this question among it; it is turned away itself while there are too many."""
    with contextlib.suppress(OSError, HTTPException):
        text = door.ask("GET", "/metrics").body.decode()
        return {kind: int(value) for kind, value in re.findall(r'serve_connections{kind="(\w+)"} (\d+)', text)}
    return {"open": 0, "turned_away": 0, "working": 0}


def test_a_slow_client_is_cut_off(desk: Desk) -> None:
    """One that sends a byte at a time goes on for as long as it likes, as far as each of them is concerned."""
    with running(add_door(desk.config, desk.directory, 'exchange_for = "5s"')) as door:
        plain = socket.create_connection(("127.0.0.1", door.port), timeout=180)
        with plain, door.context().wrap_socket(plain, server_hostname="127.0.0.1") as client:
            client.sendall(b"GET /healthz HTTP/1.1\r\nX: ")
            is_cut_off = wait_until(lambda: _refuses_a_byte(client), bool, _PATIENCE, pause_seconds=0.1)

    assert is_cut_off


def _refuses_a_byte(client: ssl.SSLSocket) -> bool:
    try:
        client.sendall(b"y")
    except OSError:
        return True
    return False


def test_strangers_fill_nothing_while_a_ca_is_down(door: ServeProgram, desk: Desk, pairs: Pairs) -> None:
    """They are judged by the CA certificates of before; a node's request is kept, and one for a CA that is not here is not."""
    away = desk.ca("ca").with_name("away")
    desk.ca("ca").rename(away)
    place = place_of(door.post(dumps(make_bundle(some(pairs, "apiserver")))))
    wait_until(
        lambda: door.ask("GET", "/readyz").body,
        lambda body: b"requests for it wait" in body,
        _PATIENCE,
        pause_seconds=0.1,
    )
    stranger = handmade_pki(desk.directory / "stranger")
    foreign = make_bundle(old_pairs(stranger, ["apiserver"]))
    unproven = changed(make_bundle(some(pairs, "apiserver")), "apiserver", proof=None)
    refused = [door.post(dumps(one)).status for one in (foreign, unproven)]
    away.rename(desk.ca("ca"))

    assert refused == [403, 403]
    assert isinstance(awaited(door, place).answers["apiserver"], Issued)


def test_a_half_closed_client_keeps_no_connection(common: ServeProgram) -> None:
    """One that has sent half a request and its end is closed; nothing of it stays open."""
    for cut in (b"", b"GET /heal", b"POST /v1/requests HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nhalf"):
        plain = socket.create_connection(("127.0.0.1", common.port), timeout=180)
        with plain, common.context().wrap_socket(plain, server_hostname="127.0.0.1") as client:
            client.sendall(cut)
            with contextlib.suppress(ssl.SSLEOFError):  # the door may close its end without a word
                client.unwrap() if not cut else socket.socket.shutdown(client, socket.SHUT_WR)
    seen = wait_until(lambda: connections(common), lambda one: one["open"] == 1, _PATIENCE, pause_seconds=0.1)

    assert seen["open"] == 1  # the one that asks


def test_a_client_that_reads_nothing_is_cut_off(desk: Desk) -> None:
    """It asks and asks, and takes no answer: its thread is free again, and others are answered meanwhile."""
    with running(add_door(desk.config, desk.directory, 'exchange_for = "15s"\nthreads = 2')) as door:
        plain = socket.create_connection(("127.0.0.1", door.port), timeout=180)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with plain, door.context().wrap_socket(plain, server_hostname="127.0.0.1") as client:
            client.settimeout(1)
            with contextlib.suppress(OSError):
                while True:
                    client.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n" * 100)
            beside = door.ask("GET", "/healthz").status
            after = wait_until(lambda: connections(door), lambda one: one["open"] == 1, _PATIENCE, pause_seconds=0.1)

    assert (beside, after["open"], after["working"]) == (200, 1, 1)


def test_there_is_no_renegotiation(common: ServeProgram) -> None:
    """A client of TLS 1.2 that begins one gets an end; the same client without it gets its answer."""
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{common.port}", "-tls1_2", "-CAfile", str(common.ca)]
    renegotiates, asks = (
        subprocess.run([*command, *more], input=text, capture_output=True, check=False, timeout=300)
        for text, more in ((b"R\n", []), (_HEALTH % b"", ["-quiet"]))
    )

    assert b"RENEGOTIATING" in renegotiates.stdout + renegotiates.stderr
    assert b"no renegotiation" in renegotiates.stdout + renegotiates.stderr
    assert b"200 OK" in asks.stdout


def test_a_peer_has_a_number_of_waiting_requests(desk: Desk, pairs: Pairs) -> None:
    """The answer to one more is to come again later; a repeated request does not count twice."""
    bundles = [dumps(make_bundle(some(pairs, "apiserver"))) for _ in range(3)]
    with running(add_door(desk.config, desk.directory, "waiting_per_peer = 2")) as door:
        desk.ca("ca").rename(desk.ca("ca").with_name("away"))
        answers = [door.post(one) for one in (*bundles, bundles[0])]

    assert [one.status for one in answers] == [202, 202, 429, 202]
    assert answers[2].headers["retry-after"] == "30"


# --- how it begins and ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["certificate", "key"])
def test_a_server_certificate_that_is_not_there_is_named_with_its_setting(desk: Desk, missing: str) -> None:
    """The door does not begin, and says which setting names the file; the twin is each other test here."""
    getattr(add_door(desk.config, desk.directory), missing).unlink()
    run = desk.run("serve")

    assert run.returncode == Exit.USAGE
    assert "serve.certificate: wanted PEM files" in run.stderr
    assert "No such file" in run.stderr


def test_the_server_certificate_is_read_again(door: ServeProgram) -> None:
    """A renewed certificate is served without a restart; one that can't be read changes nothing."""
    before = served(door)
    door.key.write_text("no key")
    assert served(door) == before
    tls = make_tls(door.certificate.parent / "new")
    for new, old in ((tls.server_key, door.key), (tls.server_cert, door.certificate)):
        new.replace(old)

    assert served(door) not in {before, b""}


def served(door: ServeProgram) -> bytes:
    """The server certificate of now."""
    return ssl.get_server_certificate(("127.0.0.1", door.port)).encode()


def test_it_serves_no_cluster_from_within(desk: Desk, pki: Pki) -> None:
    """On a node whose CA signs here it does not begin, and says so; with another node's it does."""
    door = add_door(desk.config, desk.directory)
    text = desk.config.read_text()
    desk.config.write_text(text.replace("[node]", f'[node]\npki_dir = "{pki.pki_dir}"'))

    run = desk.run("serve")

    assert run.returncode == Exit.REFUSED
    assert "this door runs inside the cluster it signs for" in run.stderr
    desk.config.write_text(text.replace("[node]", f'[node]\npki_dir = "{desk.directory}"'))
    with running(door):
        assert door.ask("GET", "/readyz").status == 200


def test_a_dead_door_is_unavailable(common: ServeProgram, pairs: Pairs) -> None:
    """A node sees a dead door as a CA that does not answer."""
    settings = DoorSettings(url="https://127.0.0.1:9", ca_file=common.ca, timeout=timedelta(seconds=3))
    with pytest.raises(BackendUnavailableError):
        DoorBackend.from_settings(settings).sign(asked(make_bundle(some(pairs, "apiserver")), "apiserver"))
