"""One-time secrets: who asks the door for the first time, by the program as it is."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
from base64 import b64encode
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from backends.door import DoorBackend, DoorSettings
from bridge.contract import Issued, Pending, Secret
from bridge.door.store import DoorDatabase, EnrolmentError, sqlite_url
from bridge.errors import BackendError, BackendRefusedError, Exit, LocalFileError
from bridge.pki.bundle import AnswerBundle, Refusal, RequestBundle, sign_request
from bridge.pki.bundle_format import digest, dumps, loads_answer
from bridge.pki.csr import generate_key, key_pem
from bridge.pki.expiry import parse_duration
from bridge.pki.node_proofs import enrolment_proof, secret_hash
from bridge.state import audit
from bridge.system.waiting import wait_until
from tests.kit.bundles import changed, make_bundle, old_pairs
from tests.kit.desks import Desk, make_desk
from tests.kit.pki import Pki
from tests.kit.serving import Answer, ServeProgram, add_door, running

_PATIENCE = timedelta(minutes=3)
_FIRST = ("scheduler.conf", "apiserver-etcd-client")
_SECRET = "A" * 43


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, pki: Pki) -> Desk:
    return make_desk(tmp_path_factory.mktemp("desk") / "desk", pki)


@pytest.fixture(scope="module")
def door(desk: Desk) -> Iterator[ServeProgram]:
    with running(add_door(desk.config, desk.directory)) as program:
        yield program


def first(pki: Pki, *names: str, node: str = "cp-1", cluster: str = "kubernetes") -> RequestBundle:
    """A bundle of a node that has nothing to prove with."""
    bundle = make_bundle(old_pairs(pki, names or _FIRST), node=node, cluster=cluster)
    return replace(bundle, requests=tuple(replace(one, replaces=None, proof=None) for one in bundle.requests))


def enrolled(desk: Desk, *options: str, node: str = "cp-1") -> str:
    """The secret."""
    run = desk.run("enroll", node, *options)
    assert run.returncode == Exit.DONE, run.stderr
    assert re.fullmatch("[A-Za-z0-9_-]{43}\n", run.stdout)
    assert run.stdout.strip() not in run.stderr
    return run.stdout.strip()


def posted(door: ServeProgram, bundle: RequestBundle, authorization: str) -> Answer:
    return door.post(dumps(bundle), Authorization=authorization)


def shown(door: ServeProgram, bundle: RequestBundle, secret: str) -> Answer:
    """A request, with the proof that its maker has the secret."""
    return posted(door, bundle, enrolment_proof(secret, digest(bundle)))


def awaited(door: ServeProgram, answer: Answer) -> AnswerBundle:
    assert answer.status == 202, answer.body
    place = answer.headers["location"]
    found = wait_until(
        lambda: door.ask("GET", place), lambda one: one.status not in {202, 503}, _PATIENCE, pause_seconds=0.1
    )
    assert found.status == 200, found.body
    return loads_answer(found.body)


def kinds(answer: AnswerBundle) -> dict[str, type]:
    return {name: type(one) for name, one in answer.answers.items()}


# --- the first request ------------------------------------------------------------------------------------------------


def test_a_secret_lets_one_request_in(door: ServeProgram, desk: Desk, pki: Pki) -> None:
    """The same bundle is the same request; a second one is refused, and one without the proof is, too."""
    bundle, secret, before = first(pki), enrolled(desk), len(desk.issued())
    bare = door.post(dumps(bundle))
    answer = shown(door, bundle, secret)
    again = shown(door, bundle, secret)
    second = shown(door, first(pki), secret)

    assert kinds(awaited(door, answer)) == dict.fromkeys(_FIRST, Issued)
    assert len(desk.issued()) == before + len(_FIRST)
    assert (bare.status, second.status) == (403, 403)
    assert again.headers["location"] == answer.headers["location"]
    assert "found one that is used since" in second.document["error"]
    assert "ca-bridge enroll" in second.document["hint"]


def test_the_secret_is_kept_nowhere(door: ServeProgram, desk: Desk, pki: Pki) -> None:
    """No file of the state directory and no line of the log has it; the record has who vouched for what."""
    bundle, secret = first(pki, "scheduler.conf"), enrolled(desk)
    awaited(door, shown(door, bundle, secret))

    kept = b"".join(path.read_bytes() for path in desk.state.rglob("*") if path.is_file())
    assert secret.encode() not in kept
    assert (secret_hash(secret) or "").encode() in kept
    assert secret not in "".join(door.said)
    lines = [json.loads(line) for line in (desk.state / "audit.jsonl").read_text().splitlines()]
    assert re.search(r"node cp-1, .*, by enrolment \d+ of \w+", lines[-1]["result"])
    assert {line["event"] for line in lines} >= {"enrolled", "signed for others"}
    assert desk.run("audit", "verify").returncode == 0


def test_of_two_requests_at_the_same_time_one_wins(door: ServeProgram, desk: Desk, pki: Pki) -> None:
    """Each of eight threads has a request of its own, and the same secret."""
    secret, bundles = enrolled(desk), [first(pki, "scheduler.conf") for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda one: shown(door, one, secret), bundles))

    assert sorted(one.status for one in answers) == [202, *[403] * 7]


def test_the_policy_decides_what_a_secret_is_good_for(door: ServeProgram, desk: Desk, pki: Pki) -> None:
    """Another name in a request, and a group that the policy gives to no one here, are refused beside a good request."""
    bundle = first(pki, "scheduler.conf", "admin.conf", "apiserver-kubelet-client")
    foreign = [one.csr for one in bundle.requests if one.name == "admin.conf"]
    bundle = changed(bundle, "scheduler.conf", csr=foreign[0])
    answer = awaited(door, shown(door, bundle, enrolled(desk)))

    assert kinds(answer)["scheduler.conf"] is Refusal
    assert {kinds(answer)[name] for name in ("admin.conf", "apiserver-kubelet-client")} & {Issued}


def test_a_secret_can_be_for_some_certificates(door: ServeProgram, desk: Desk, pki: Pki) -> None:
    """The others of the same request still need a proof."""
    secret = enrolled(desk, "--certificate", "scheduler.conf")
    answer = awaited(door, shown(door, first(pki), secret))

    assert kinds(answer) == {"scheduler.conf": Issued, "apiserver-etcd-client": Refusal}


@pytest.mark.parametrize(
    ("who", "words"),
    [
        ({"node": "cp-2"}, "found one of cp-2 in kubernetes"),
        ({"cluster": "other"}, "found one of cp-1 in other"),
    ],
)
def test_another_nodes_request_is_refused(
    door: ServeProgram, desk: Desk, pki: Pki, who: dict[str, str], words: str
) -> None:
    """The name is the enrolment's; the refused attempt does not use the secret up."""
    secret = enrolled(desk)
    wrong = shown(door, first(pki, **who), secret)

    assert wrong.status == 403
    assert words in wrong.document["error"]
    assert shown(door, first(pki), secret).status == 202


def test_a_proof_for_another_request_is_refused(door: ServeProgram, desk: Desk, pki: Pki) -> None:
    """A header that was overheard, an unknown secret, and the secret itself as a password."""
    secret, bundle = enrolled(desk), first(pki)
    overheard = enrolment_proof(secret, digest(first(pki)))
    unknown = enrolment_proof(_SECRET, digest(bundle))
    plain = f"Basic {b64encode(f'cp-1:{secret}'.encode()).decode()}"

    assert [posted(door, bundle, one).status for one in (overheard, unknown, plain)] == [403] * 3
    assert shown(door, bundle, secret).status == 202


def test_a_withdrawn_secret_lets_no_one_in(door: ServeProgram, desk: Desk, pki: Pki) -> None:
    """It lets no client in before its use, nor between its use and the signature."""
    unused, used = enrolled(desk), enrolled(desk)
    away = desk.ca("ca").with_name("away")
    desk.ca("ca").rename(away)
    waiting = shown(door, first(pki, "scheduler.conf"), used)
    assert waiting.status == 202
    for number in [one["number"] for one in listed(desk)[:2]]:
        assert desk.run("enrolments", "withdraw", str(number)).returncode == Exit.DONE
    away.rename(desk.ca("ca"))

    refused = shown(door, first(pki), unused)
    assert (refused.status, "found one that is withdrawn" in refused.document["error"]) == (403, True)
    assert kinds(awaited(door, waiting)) == {"scheduler.conf": Refusal}
    assert [one["state"] for one in listed(desk)[:2]] == ["withdrawn", "withdrawn"]


def test_a_restored_database_opens_no_secret_again(tmp_path: Path, pki: Pki) -> None:
    """A copy from before its use does not know of it; all that are open in the copy are withdrawn, and said to be."""
    desk = make_desk(tmp_path / "desk", pki)
    door, copy = add_door(desk.config, desk.directory), desk.directory / "copy"
    with running(door):
        used, unused = enrolled(desk), enrolled(desk)
        assert desk.run("serve-database", "backup", copy).returncode == Exit.DONE
        assert kinds(awaited(door, shown(door, first(pki), used))) == dict.fromkeys(_FIRST, Issued)
        assert [one["state"] for one in listed(desk)] == ["open", "used"]
    before = len(desk.issued())
    restored = desk.run("serve-database", "restore", copy)
    assert restored.returncode == Exit.DONE, restored.stderr
    assert "one-time secrets withdrawn, since they may have been used after the copy was made: 2;" in " ".join(
        restored.stdout.split()
    )
    with running(door):
        again = [shown(door, first(pki), secret) for secret in (used, unused)]
        assert [one["state"] for one in listed(desk)] == ["withdrawn", "withdrawn"]
        assert kinds(awaited(door, shown(door, first(pki), enrolled(desk)))) == dict.fromkeys(_FIRST, Issued)

    assert [one.status for one in again] == [403, 403]
    assert len(desk.issued()) == before + len(_FIRST)


def test_a_secret_ends_by_itself(door: ServeProgram, desk: Desk, pki: Pki) -> None:
    """The secret ends at the moment that it was given for."""
    ends = enrolled(desk, "--for", "1m")
    [one, *_] = listed(desk)
    assert datetime.fromisoformat(one["ends"]) - datetime.fromisoformat(one["created"]) == parse_duration("1m")
    database = sqlite3.connect(desk.state / "door.db", timeout=180)
    with database:
        past = (datetime.now(UTC) - timedelta(seconds=1)).strftime("%Y-%m-%d %H:%M:%S.%f")
        database.execute("UPDATE enrolments SET ends = ? WHERE id = ?", (past, one["number"]))
    database.close()

    refused = shown(door, first(pki), ends)
    assert (refused.status, "found one that is ended" in refused.document["error"]) == (403, True)
    assert shown(door, first(pki), enrolled(desk, "--for", "1h")).status == 202


def test_an_old_secret_spoils_no_request_with_proofs(door: ServeProgram, pki: Pki) -> None:
    """A node that is renewed with its own keys is not refused for a file that was left there."""
    bundle = make_bundle(old_pairs(pki, ["scheduler.conf"]))

    assert kinds(awaited(door, posted(door, bundle, enrolment_proof(_SECRET, digest(bundle))))) == {
        "scheduler.conf": Issued
    }


def test_a_use_that_comes_too_late_keeps_no_request(tmp_path: Path) -> None:
    """The row that binds the secret and the row of the request are written together, or neither is."""
    memory = DoorDatabase(sqlite_url(tmp_path / "door.db"))
    who = {"node": "cp-1", "cluster": "kubernetes", "peer": "192.0.2.1", "now": datetime.now(UTC)}
    try:
        with pytest.raises(EnrolmentError):
            memory.receive(b"bundle", digest="aa", enrolment=7, **who)  # type: ignore[arg-type]
        assert memory.find("aa", "digest") is None
        assert memory.receive(b"bundle", digest="aa", **who)  # type: ignore[arg-type]
    finally:
        memory.close()


# --- a node's end -----------------------------------------------------------------------------------------------------


def asked(door: ServeProgram, bundle: RequestBundle, place: Path) -> Sequence[Issued | Pending | BackendError]:
    """What the backend `door` gets, with the secret in a file."""
    settings = DoorSettings(
        url=door.url, ca_file=door.ca, node="cp-1", wait=timedelta(minutes=2), enrolment=Secret("file", str(place))
    )
    with contextlib.closing(DoorBackend.from_settings(settings)) as backend:
        return backend.sign_many([sign_request(one, bundle) for one in bundle.requests])


def test_a_node_proves_itself_with_the_file(door: ServeProgram, desk: Desk, pki: Pki, tmp_path: Path) -> None:
    """A node without live certificates proves itself with the file; without it, or with another text in it, the error comes before any request."""
    place, bundle = tmp_path / "enrolment", first(pki)
    with pytest.raises(LocalFileError, match="wanted a secret in"):
        asked(door, bundle, place)
    place.write_text("no secret of an enrolment")
    with pytest.raises(LocalFileError, match="43 characters"):
        asked(door, bundle, place)
    place.write_text(f"{enrolled(desk)}\n")

    assert [type(one) for one in asked(door, bundle, place)] == [Issued, Issued]
    again = asked(door, first(pki), place)
    assert [type(one) for one in again] == [BackendRefusedError] * 2
    assert all("found one that is used" in str(one) for one in again)


@pytest.mark.parametrize("left", ["", "no secret of an enrolment", "used"])
def test_one_certificate_without_a_proof_stops_no_other(
    door: ServeProgram, desk: Desk, pki: Pki, tmp_path: Path, caplog: pytest.LogCaptureFixture, left: str
) -> None:
    """A node that has lost one certificate, and whose secret is gone or used: the door refuses that one, and signs the others."""
    bundle = changed(make_bundle(old_pairs(pki, ["scheduler.conf", "admin.conf"])), "admin.conf", proof=None)
    bundle, place = changed(bundle, "admin.conf", replaces=None), tmp_path / "enrolment"
    if left:
        place.write_text(enrolled(desk) if left == "used" else left)
    if left == "used":
        awaited(door, shown(door, first(pki), place.read_text()))

    answers = asked(door, bundle, place)

    found = {one.name: answer for one, answer in zip(bundle.requests, answers, strict=True)}
    assert isinstance(found["scheduler.conf"], Issued)
    refused = found["admin.conf"]
    assert isinstance(refused, BackendRefusedError)
    assert "proof: the certificate that is replaced is missing" in str(refused)
    if left == "used":
        assert "found one that is used since" in "".join(door.said)
        return
    [warned] = caplog.messages
    assert "for admin.conf: wanted" in warned
    assert "enroll NODE" in warned


def test_a_node_with_live_certificates_uses_no_secret_up(
    door: ServeProgram, desk: Desk, pki: Pki, tmp_path: Path
) -> None:
    """It proves itself with their keys; the secret is open afterwards."""
    place = tmp_path / "enrolment"
    place.write_text(enrolled(desk))
    live = make_bundle(old_pairs(pki, ["scheduler.conf"]))

    assert [type(one) for one in asked(door, live, place)] == [Issued]
    assert listed(desk)[0]["state"] == "open"


def test_a_node_takes_signed_answers_alone(desk: Desk, door: ServeProgram, pki: Pki, tmp_path: Path) -> None:
    """Where its settings name the desk's key: an answer without a signature, or with another's, is refused."""
    own, others = generate_key("ecdsa-p256"), generate_key("ecdsa-p256")
    public, other = tmp_path / "desk.pub", tmp_path / "other.pub"
    for path, key in ((public, own), (other, others)):
        path.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    (tmp_path / "desk.key").touch(mode=0o600)
    (tmp_path / "desk.key").write_bytes(key_pem(own))
    with pytest.raises(BackendRefusedError, match="found no signature"):
        renewed(door, pki, public)
    policy = desk.policy.read_text()
    desk.policy.write_text(policy.replace("[desk]\n", f'[desk]\nanswer_key = "{tmp_path}/desk.key"\n'))
    try:
        with pytest.raises(BackendRefusedError, match="found another signature"):
            renewed(door, pki, other)
        assert [type(one) for one in renewed(door, pki, public)] == [Issued]
    finally:
        desk.policy.write_text(policy)


def renewed(door: ServeProgram, pki: Pki, desk_key: Path) -> Sequence[Issued | Pending | BackendError]:
    bundle = make_bundle(old_pairs(pki, ["scheduler.conf"]))
    wait = timedelta(minutes=2)
    settings = DoorSettings(url=door.url, ca_file=door.ca, node="cp-1", wait=wait, signed_by=desk_key)
    with contextlib.closing(DoorBackend.from_settings(settings)) as backend:
        assert backend.recall([sign_request(one, bundle) for one in bundle.requests], bundle.created) == [None]
        return backend.sign_many([sign_request(one, bundle) for one in bundle.requests])


# --- the commands -----------------------------------------------------------------------------------------------------


def listed(desk: Desk) -> list[dict[str, str]]:
    run = desk.run("enrolments", "list", "-o", "json")
    assert run.returncode == Exit.DONE, run.stderr
    found: list[dict[str, str]] = json.loads(run.stdout)["enrolments"]
    return found


def test_what_the_policy_has_no_place_for_is_refused_at_once(desk: Desk) -> None:
    """A node, a cluster, a certificate, and a secret for a year; the names are shown."""
    enrolled(desk)
    wrong = [
        desk.run("enroll", "worker-1"),
        desk.run("enroll", "cp-1", "--cluster", "other"),
        desk.run("enroll", "cp-1", "--certificate", "user"),
        desk.run("enroll", "cp-1", "--for", "365d"),
        desk.run("enrolments", "withdraw", "999"),
        desk.run("enrolments", "withdraw", str(1 << 63)),
        desk.run("enroll", "cp-*"),
    ]

    assert [one.returncode for one in wrong] == [Exit.USAGE] * 7
    assert [one.stdout for one in wrong] == [""] * 7
    words = [
        "node: wanted cp-*, as the policy has it, found worker-1",
        "as the policy has it, found other",
        "found 'user'",
        "1m to 30d",
        "found 999",
        "found 9223372036854775808",
        "NODE: wanted the name of one node",
    ]
    assert [word for word, one in zip(words, wrong, strict=True) if word not in one.stderr] == []


def test_the_list_says_who_made_which(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest first; at 80 columns without the one who made it, where there is no room."""
    made_by = audit.person()
    enrolled(desk, "--certificate", "kubelet.conf", "--certificate", "kubelet-server", node="cp-9")
    whole = desk.run("enrolments", "list").stdout
    monkeypatch.setenv("COLUMNS", "80")
    narrow = desk.run("enrolments", "list").stdout

    assert re.match(r"\d+ +open +cp-9 +kubernetes +until 2.* by (\S+) +kubelet.conf, kubelet-server\n", whole)
    assert f"by {made_by} " in whole
    assert re.match(r"\d+ +open +cp-9 +kubernetes +until 2", narrow)
    assert max(map(len, narrow.splitlines())) <= 80
