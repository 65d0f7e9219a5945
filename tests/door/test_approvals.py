"""People who decide at the door, run as it is: `ca-bridge approvals` and its addresses, `openssl ca` behind it."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from bridge.cli.serve import _print
from bridge.contract import Issued
from bridge.desk.approval import Decision, Verdict
from bridge.desk.node_identity import Identity
from bridge.door import approvals
from bridge.door.client import Review
from bridge.door.store import DECISIONS, REQUESTS, DatabaseError, DecisionRow, DoorDatabase, sqlite_url
from bridge.errors import Exit
from bridge.pki import signatures
from bridge.pki.bundle import AnswerBundle, Refusal, RequestBundle
from bridge.pki.bundle_format import digest, dumps, loads_answer, short_fingerprint
from bridge.pki.csr import PrivateKey
from bridge.pki.node_proofs import enrolment_proof
from bridge.system.waiting import wait_until
from tests.kit.bundles import changed, make_bundle, old_pairs, proven
from tests.kit.desks import POLICY, make_desk
from tests.kit.est_door import TYPE, body_of, make_csr
from tests.kit.issuing import Signer
from tests.kit.people import APPROVALS, Team, make_team
from tests.kit.pki import Pki
from tests.kit.serving import Answer, ServeProgram, running

Pairs = dict[str, tuple[x509.Certificate, PrivateKey]]
_PATIENCE = timedelta(minutes=3)


@pytest.fixture(scope="module")
def pairs(pki: Pki) -> Pairs:
    return old_pairs(pki, ["apiserver", "etcd-server", "super-admin.conf", "front-proxy-client"])


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory, pki: Pki) -> Iterator[Team]:
    """A door at work, for tests whose requests are their own."""
    one = make_team(tmp_path_factory.mktemp("team"), pki)
    with running(one.door):
        yield one


@pytest.fixture
def own(tmp_path: Path, pki: Pki) -> Team:
    """A door for one test, not started."""
    return make_team(tmp_path, pki)


@pytest.fixture
def bundle(pairs: Pairs) -> RequestBundle:
    return make_bundle({"apiserver": pairs["apiserver"]})


def place_of(answer: Answer) -> str:
    assert answer.status == 202, answer.body
    return answer.headers["location"]


def in_state(door: ServeProgram, place: str, state: str) -> None:
    """Wait until a request is in this state."""
    wait_until(lambda: _state(door.ask("GET", place)), lambda one: one == state, _PATIENCE, pause_seconds=0.1)


def _state(answer: Answer) -> str:
    return "answered" if answer.status == 200 else str(answer.document.get("state"))


def brought(door: ServeProgram, bundle: RequestBundle) -> str:
    """The place of a request that waits for people."""
    place = place_of(door.post(dumps(bundle)))
    in_state(door, place, "undecided")
    return place


def awaited(door: ServeProgram, place: str) -> AnswerBundle:
    in_state(door, place, "answered")
    return loads_answer(door.ask("GET", place).body)


def signed(
    agent: Mapping[str, Path],
    asked: str,
    verdict: Verdict = "approved",
    reason: str = "",
    by: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    """A decision as a person's program sends it, signed with the key of `by`."""
    leaf = x509.load_pem_x509_certificate(agent["client_cert"].read_bytes())
    key = load_pem_private_key((by or agent)["client_key"].read_bytes(), None)
    decision = Decision(
        approver="", verdict=verdict, reason=reason, decided=datetime.now(UTC), certificate=leaf,
        evidence="signature", proof=b"",
    )  # fmt: skip
    return {
        "verdict": verdict,
        "reason": reason,
        "signature": b64encode(signatures.sign(key, decision.message(asked))).decode(),
    }


def decide(team: Team, agent: Mapping[str, Path], bundle: RequestBundle, body: Mapping[str, Any]) -> Answer:
    return team.ask(agent, "POST", f"/v1/approvals/{digest(bundle)}", dict(body))


# --- deciding ---------------------------------------------------------------------------------------------------------


def test_a_request_waits_until_a_person_approves_it(own: Team, bundle: RequestBundle) -> None:
    """Nothing is signed before; afterwards the certificate is there, and the record has the signature."""
    alice = own.agent("alice")
    with running(own.door):
        place = brought(own.door, bundle)
        before = len(own.desk.issued())
        listed = own.run(alice, "list")
        shown = own.run(alice, "show", digest(bundle)[:16])
        run = own.run(alice, "approve", digest(bundle)[:16], "--reason", "change 4711")
        answer = awaited(own.door, place)

    assert before == 0
    whom = "a node that says it is cp-1, which nothing proves,"
    assert f"this gives {whom} the API server's certificate, as before, for 365d" in " ".join(listed.stdout.split())
    assert short_fingerprint(bundle) in shown.stdout
    assert re.search(r"asks for +CN=kube-apiserver\b.*\napproved ", run.stdout, re.DOTALL), (
        run.stdout
    )  # seen, then signed
    assert run.returncode == Exit.DONE, run.stderr
    assert isinstance(answer.answers["apiserver"], Issued)
    assert "approved by alice (signed)" in answer.signer
    [line] = [json.loads(one) for one in _audit(own) if '"approved"' in one]
    assert (line["approver"], line["reason"], line["evidence"]) == ("alice", "change 4711", "signature")
    assert digest(bundle) in line["result"]
    assert own.desk.run("audit", "verify").returncode == 0


def test_what_only_the_door_says_is_marked(bundle: RequestBundle, capsys: pytest.CaptureFixture[str]) -> None:
    """A door that lies about a certificate's meaning can't replace the sentence that the approver's host works out."""
    means = "this gives cp-1 the scheduler's client certificate, as before, for 90d"
    lie: dict[str, Any] = {
        "certificates": [{"name": "apiserver", "means": means}],
        "state": "undecided",
        "approvals": "1 of 2",
    }
    lie["decisions"] = [{"approver": "bob", "verdict": "approved", "decided": "today", "evidence": "signature"}]
    _print(Review(bundle=bundle, digest=digest(bundle), document=lie, cas={}))
    computed, door = " ".join(capsys.readouterr().out.split()).split("the door says, and nothing here proves it:")

    whom = "a node that says it is cp-1, which nothing proves,"
    assert f"apiserver: this gives {whom} the API server's certificate, as before, for 365d" in computed
    assert "bob" not in computed
    assert "scheduler" not in computed
    assert f"apiserver: {means}" in door
    assert "bob approved it today (signature)" in door


@pytest.mark.attack("D6")
def test_a_signature_over_another_request_proves_no_decision(
    bundle: RequestBundle, pairs: Pairs, tmp_path: Path, pki: Pki, capsys: pytest.CaptureFixture[str]
) -> None:
    """A door may send a person's signature over something else: it stays the door's word; over this digest it is proof."""
    alice = make_team(tmp_path, pki).agent("alice")
    leaf, other = alice["client_cert"].read_text(), make_bundle({"etcd-server": pairs["etcd-server"]})
    for asked, is_proof in ((bundle, True), (other, False)):
        body = signed(alice, digest(asked), reason="yes")
        proof = {"kind": "signature", "certificate": leaf, "proof": body["signature"]}
        decision = {
            "approver": "alice",
            "verdict": "approved",
            "reason": "yes",
            "evidence": "signature",
            "proof": proof,
        }
        _print(Review(bundle=bundle, digest=digest(bundle), document={"decisions": [decision]}, cas={}))
        proven, doors = " ".join(capsys.readouterr().out.split()).split("the door says, and nothing here proves it:")
        assert ("approved by the key of CN=alice" in proven) is is_proof
        assert ("alice approved it" in doors) is not is_proof


@pytest.mark.attack("D6")
def test_some_digits_approve_the_only_request_that_waits(own: Team, pairs: Pairs) -> None:
    """Beside another one all digits are needed, which `show` prints; a refusal needs only some."""
    alice = own.agent("alice")
    first, second = (make_bundle({name: pairs[name]}) for name in ("apiserver", "etcd-server"))
    with running(own.door):
        for bundle in (first, second):
            brought(own.door, bundle)
        short = own.run(alice, "approve", digest(first)[:16])
        shown = own.run(alice, "show", digest(first)[:16])
        whole = own.run(alice, "approve", digest(first))
        alone = own.run(alice, "approve", digest(second)[:16])

    assert short.returncode == Exit.USAGE
    assert "wanted all 64 digits of a request, or 16 or more of the only one that waits" in short.stderr
    assert digest(first) in "".join(shown.stdout.split())
    assert (whole.returncode, alone.returncode) == (0, 0), whole.stderr + alone.stderr


@pytest.mark.attack("D2")
def test_all_requests_of_a_node_are_refused_at_once(own: Team, pairs: Pairs) -> None:
    """Those of another node go on waiting; the command wants a digest or a node."""
    alice = own.agent("alice")
    with running(own.door):
        places = [brought(own.door, make_bundle({"etcd-server": pairs["etcd-server"]})) for _ in range(3)]
        kept = brought(own.door, make_bundle({"front-proxy-client": pairs["front-proxy-client"]}, node="cp-9"))
        both = own.run(alice, "refuse", "0" * 64, "--node", "cp-1", "--reason", "stolen")
        run = own.run(alice, "refuse", "--node", "cp-1", "--reason", "stolen")
        answers = [awaited(own.door, place).answers["etcd-server"] for place in places]
        other = _state(own.door.ask("GET", kept))

    assert both.returncode == Exit.USAGE
    assert (run.returncode, run.stdout) == (0, "refused 3 requests of cp-1\n"), run.stderr
    assert answers == [Refusal(reason="not approved: stolen (alice)")] * 3
    assert other == "undecided"


def _audit(team: Team) -> list[str]:
    return (team.desk.state / "audit.jsonl").read_text().splitlines()


def test_a_person_refuses(team: Team, bundle: RequestBundle) -> None:
    """The node gets an answer with the reason and the name; a refusal without a reason is none."""
    bob = team.agent("bob")
    place = brought(team.door, bundle)
    without = decide(team, bob, bundle, signed(bob, digest(bundle), "refused", ""))
    odd = team.run(bob, "refuse", digest(bundle), "--reason", "\udcff")  # a byte that is no UTF-8
    run = team.run(bob, "refuse", digest(bundle), "--reason", "no call came")
    answer = awaited(team.door, place).answers["apiserver"]

    assert without.status == 403
    assert (odd.returncode, "wanted a reason of one line" in odd.stderr) == (Exit.REFUSED, True), odd.stderr
    assert run.returncode == Exit.DONE, run.stderr
    assert answer == Refusal(reason="not approved: no call came (bob)")


def test_the_whole_bundle_waits(tmp_path: Path, pki: Pki, pairs: Pairs) -> None:
    """One certificate that needs an approval holds the others of its bundle; a bundle without one is signed at once."""
    policy = POLICY + '\n[approvals]\napprovers = ["alice"]\n[certificate."super-admin.conf"]\napproval = "required"\n'
    team = make_team(tmp_path, pki, policy)
    alice = team.agent("alice")
    both = make_bundle({name: pairs[name] for name in ("super-admin.conf", "front-proxy-client")})
    with running(team.door):
        place = brought(team.door, both)
        other = awaited(team.door, place_of(team.door.post(dumps(make_bundle({"apiserver": pairs["apiserver"]})))))
        before = len(team.desk.issued())
        team.run(alice, "approve", digest(both))
        answer = awaited(team.door, place)

    assert isinstance(other.answers["apiserver"], Issued)
    assert before == 1
    assert [isinstance(one, Issued) for one in answer.answers.values()] == [True, True]


def test_two_of_a_group(tmp_path: Path, pki: Pki, bundle: RequestBundle) -> None:
    """One approval is not enough, and the same person's second one is none."""
    team = make_team(tmp_path, pki, APPROVALS + "count = 2\n")
    alice, bob = team.agent("alice"), team.agent("bob")
    with running(team.door):
        place = brought(team.door, bundle)
        first = team.run(alice, "approve", digest(bundle))
        again = team.run(alice, "approve", digest(bundle))
        state = _state(team.door.ask("GET", place))
        shown = team.run(bob, "show", digest(bundle))
        second = team.run(bob, "approve", digest(bundle))
        answer = awaited(team.door, place)

    assert "1 of 2" in first.stdout
    proven, doors = " ".join(shown.stdout.split()).split("the door says")
    assert "approved by the key of CN=alice (a certificate of CN=" in proven
    assert "alice" not in doors
    assert again.returncode == Exit.REFUSED
    assert state == "undecided"
    assert second.returncode == Exit.DONE, second.stderr
    assert "approved by alice (signed), bob (signed)" in answer.signer


def test_an_approval_that_is_enough_by_now_counts(tmp_path: Path, pki: Pki, bundle: RequestBundle) -> None:
    """When the policy wants fewer people, the door goes on by itself; another decision of the same person is refused."""
    team = make_team(tmp_path, pki, APPROVALS + "count = 2\n")
    alice = team.agent("alice")
    with running(team.door):
        place = brought(team.door, bundle)
        team.run(alice, "approve", digest(bundle))
        team.desk.policy.write_text(team.desk.policy.read_text().replace("count = 2", "count = 1"))
        other = team.run(alice, "refuse", digest(bundle), "--reason", "after all")
        answer = awaited(team.door, place)

    assert other.returncode == Exit.REFUSED
    assert isinstance(answer.answers["apiserver"], Issued)
    assert "approved by alice (signed)" in answer.signer


def test_the_policy_is_asked_again_after_the_approval(own: Team, bundle: RequestBundle) -> None:
    """A policy that was tightened in between refuses what a person has approved."""
    alice = own.agent("alice")
    with running(own.door):
        place = brought(own.door, bundle)
        away = own.desk.ca("ca").rename(own.desk.directory / "away")
        run = own.run(alice, "approve", digest(bundle))
    own.desk.policy.write_text(own.desk.policy.read_text().replace('nodes = ["cp-*"]', 'nodes = ["cp-9"]'))
    away.rename(own.desk.ca("ca"))
    with running(own.door):
        answer = awaited(own.door, place).answers["apiserver"]

    assert run.returncode == Exit.DONE, run.stderr
    assert isinstance(answer, Refusal)
    assert "cp-9" in answer.reason
    assert own.desk.issued() == []


# --- rows that no person has written ----------------------------------------------------------------------------------


def test_the_policy_is_asked_again_while_people_decide(own: Team, bundle: RequestBundle, pairs: Pairs) -> None:
    """Where it needs no approval any more, also since a time without a door, or the one-time secret was withdrawn."""
    bare = make_bundle({"front-proxy-client": pairs["front-proxy-client"]})
    bare = changed(bare, "front-proxy-client", replaces=None, proof=None)
    tighter = APPROVALS.replace("[allow]", '[allow]\nnames = ["etcd-server"]')
    with running(own.door):
        secret = own.desk.run("enroll", "cp-1").stdout.strip()
        authorization = enrolment_proof(secret, digest(bare))
        secretly = place_of(own.door.post(dumps(bare), Authorization=authorization))
        in_state(own.door, secretly, "undecided")
        assert own.desk.run("enrolments", "withdraw", "1").returncode == Exit.DONE
        answers = [awaited(own.door, secretly)]
        asked, other = brought(own.door, bundle), make_bundle({"etcd-server": pairs["etcd-server"]})
        stays = brought(own.door, other)
        own.desk.policy.write_text(tighter)
        answers.append(awaited(own.door, asked))
        in_state(own.door, stays, "undecided")
        own.door.stop()
    own.desk.policy.write_text(POLICY)
    with running(own.door):
        answers.append(awaited(own.door, stays))

    assert [type(one) for answer in answers for one in answer.answers.values()] == [Refusal, Refusal, Issued]


def test_a_person_reads_what_the_policy_refuses(team: Team, pairs: Pairs) -> None:
    """In the terminal, before the approval of the others; a refusal by a person has no such line."""
    alice, names = team.agent("alice"), ["apiserver", "etcd-server"]
    for verdict, expected in (("approve", 1), ("refuse", 0)):
        bundle = changed(make_bundle({name: pairs[name] for name in names}), "etcd-server", proof=None)
        place = brought(team.door, bundle)
        words = [verdict, digest(bundle), *(["--reason", "no"] if verdict == "refuse" else [])]
        shown, decided = team.run(alice, "show", digest(bundle)), team.run(alice, *words)
        counts = [
            one.stdout.count("etcd-server: the policy refuses it: proof: there is no continuity proof")
            for one in (shown, decided)
        ]
        assert counts == [1, expected], (shown.stdout, decided.stdout)
        awaited(team.door, place)


def rows(own: Team, bundle: RequestBundle, **values: Any) -> None:
    """Write a decision into the database, and say there that the request is approved."""
    engine = sa.create_engine(sqlite_url(own.desk.state / "door.db"), connect_args={"timeout": 180})
    with engine.begin() as connection:
        request = connection.execute(sa.select(REQUESTS.c.id).where(REQUESTS.c.digest == digest(bundle))).scalar_one()
        row = {"request": request, "verdict": "approved", "reason": "", "decided": datetime.now(UTC), **values}
        connection.execute(DECISIONS.insert().values(**row))
        connection.execute(REQUESTS.update().where(REQUESTS.c.id == request).values(state="approved"))
    engine.dispose()


@pytest.mark.parametrize("kind", ["nothing", "another key", "another digest", "the door's word", "another CA"])
def test_a_row_in_the_database_approves_nothing(own: Team, bundle: RequestBundle, pairs: Pairs, kind: str) -> None:
    """An attacker who can write there still lacks the person's key and the door's secret; the true decision counts."""
    alice, mallory = own.agent("alice"), own.agent("mallory")
    begin = datetime.now(UTC) - timedelta(days=1)
    false = own.agent("alice-2", signer=Signer.make("security-team", begin=begin, end=begin + timedelta(days=3)))
    false["client_cert"].write_bytes(false["client_cert"].read_bytes())
    other = digest(make_bundle({"apiserver": pairs["apiserver"]}))
    bodies = {
        "another key": signed(alice, digest(bundle), by=mallory),
        "another digest": signed(alice, other),
        "another CA": signed(false, digest(bundle)),
        "the door's word": {"signature": b64encode(b"x" * 32).decode()},
    }
    evidence = None
    if kind != "nothing":
        agent = false if kind == "another CA" else alice
        document = {
            "kind": "door" if kind == "the door's word" else "signature",
            "certificate": agent["client_cert"].read_text(),
            "proof": bodies[kind]["signature"],
        }
        evidence = json.dumps(document).encode()
    with running(own.door):
        place = brought(own.door, bundle)
        rows(own, bundle, approver="alice", signature=evidence)
        wait_until(lambda: any("does not count" in one for one in own.door.said), bool, _PATIENCE, pause_seconds=0.1)
        in_state(own.door, place, "undecided")
        before = len(own.desk.issued())
        run = own.run(alice, "approve", digest(bundle))
        answer = awaited(own.door, place)

    assert before == 0
    assert run.returncode == Exit.DONE, run.stderr
    assert isinstance(answer.answers["apiserver"], Issued)


# --- who is no approver -----------------------------------------------------------------------------------------------


def test_who_may_not_decide(team: Team, pki: Pki, bundle: RequestBundle) -> None:
    """No certificate, a node's, an unlisted person's: nothing is shown and nothing decided; a listed person may."""
    brought(team.door, bundle)
    node = Signer.load(*(path.read_bytes() for path in pki.ca_files("ca")))
    agents = {"none": None, "node": team.agent("alice-node", signer=node), "unlisted": team.agent("mallory")}
    found = {
        name: [
            team.ask(agent, "GET", "/v1/approvals").status,
            team.ask(agent, "GET", f"/v1/approvals/{digest(bundle)}").status,
        ]
        for name, agent in agents.items()
    }
    posts = [decide(team, agents["unlisted"] or {}, bundle, signed(agents["unlisted"] or {}, digest(bundle))).status]

    assert set(map(tuple, found.values())) == {(403, 403)}
    assert posts == [403]
    assert team.ask(team.agent("alice"), "GET", "/v1/approvals").status == 200


def test_who_brings_a_request_does_not_decide_about_it(team: Team, bundle: RequestBundle) -> None:
    """A person whose certificate came with the request is refused; another one is not."""
    alice, bob = team.agent("alice"), team.agent("bob")
    place = place_of(team.ask(alice, "POST", "/v1/requests", dumps(bundle), Content_Type="application/json"))
    in_state(team.door, place, "undecided")
    mine = decide(team, alice, bundle, signed(alice, digest(bundle)))
    theirs = decide(team, bob, bundle, signed(bob, digest(bundle)))

    assert mine.status == 403
    assert "another person" in mine.document["error"]
    assert theirs.status == 200
    awaited(team.door, place)


@pytest.mark.attack("D5")
def test_who_brings_a_request_again_does_not_decide_about_it(team: Team, bundle: RequestBundle) -> None:
    """
    The node has sent it before, or the door was killed before it answered her: alice may still not decide. The request and
    who brought it are one transaction.
    """
    alice, bob = team.agent("alice"), team.agent("bob")
    place = brought(team.door, bundle)
    in_state(team.door, place, "undecided")
    again = team.ask(alice, "POST", "/v1/requests", dumps(bundle), Content_Type="application/json")
    mine = decide(team, alice, bundle, signed(alice, digest(bundle)))
    theirs = decide(team, bob, bundle, signed(bob, digest(bundle)))

    assert place_of(again) == place
    assert (mine.status, theirs.status) == (403, 200)
    assert "another person" in mine.document["error"]
    awaited(team.door, place)


@pytest.mark.attack("D5")
def test_a_request_is_not_kept_without_who_brought_it(memory: DoorDatabase) -> None:
    """If the one row can't be written, neither is the other."""
    with memory.engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE decisions"))
    with pytest.raises(DatabaseError):
        received(memory, "aa", asked_by="alice")
    assert memory.find("aa", "digest") is None
    assert received(memory, "bb")


@pytest.mark.attack("D7")
def test_a_decision_that_was_confirmed_stays(memory: DoorDatabase) -> None:
    """Only the decision that was void when it was read is replaced, and none that another thread has stored since."""
    request, about = received(memory, "aa"), {"approver": "alice", "reason": ""}

    def decided(verdict: str, evidence: bytes, *void: DecisionRow) -> bool:
        return memory.decide(request, verdict=verdict, evidence=evidence, now=NOW, void=void, **about)

    assert decided("approved", b"void by now")
    void = memory.decisions(request)
    assert decided("refused", b"first", *void)
    assert not decided("approved", b"second", *void)
    assert not decided("approved", b"second")
    assert [(row.verdict, row.signature) for row in memory.decisions(request)] == [("refused", b"first")]


def test_who_brings_a_request_by_est_does_not_decide_about_it(tmp_path: Path, pki: Pki) -> None:
    """A person who has shown a certificate beside a node's one-time secret is refused; another one is not."""
    team = make_team(tmp_path, pki, APPROVALS + _LABEL)
    alice, bob = team.agent("alice"), team.agent("bob")
    with running(team.door):
        secret = team.desk.run("enroll", "cp-1").stdout.strip()
        basic = b64encode(f"cp-1:{secret}".encode()).decode()
        sent = {"Content_Type": TYPE, "Authorization": f"Basic {basic}"}
        asked = team.ask(alice, "POST", "/.well-known/est/first/simpleenroll", body_of(make_csr()), **sent)
        [one] = wait_until(
            lambda: team.ask(alice, "GET", "/v1/approvals").document["requests"], bool, _PATIENCE, pause_seconds=0.2
        )
        place = f"/v1/approvals/{one['digest']}"
        mine = team.ask(alice, "POST", place, signed(alice, one["digest"]))
        theirs = team.ask(bob, "POST", place, signed(bob, one["digest"]))

    assert asked.status == 202
    assert (mine.status, theirs.status) == (403, 200)
    assert "another person" in mine.document["error"]


_LABEL = """
[certificate.web]
authority = "ca"
usages = ["server"]
subjects = ["CN=web.{node}"]
sans = ["{node}"]

[est.first]
certificate = "web"
cluster = "kubernetes"
secrets = true
"""


@pytest.mark.parametrize(
    "kind", ["another digest", "another person", "another verdict", "another reason", "no signature"]
)
def test_a_signature_is_for_one_decision(team: Team, bundle: RequestBundle, pairs: Pairs, kind: str) -> None:
    """A signature for another request, person, verdict or reason is refused; the true one is taken."""
    alice, bob = team.agent("alice"), team.agent("bob")
    other = make_bundle({"apiserver": pairs["apiserver"]})
    place = brought(team.door, bundle)
    good = signed(alice, digest(bundle))
    bad = {
        "another digest": signed(alice, digest(other)),
        "another person": signed(bob, digest(bundle)),
        "another verdict": {**signed(alice, digest(bundle), "refused", "no"), "verdict": "approved"},
        "another reason": {**good, "reason": "all is well"},
        "no signature": {**good, "signature": ""},
    }[kind]

    assert decide(team, alice, bundle, bad).status == 403
    assert decide(team, alice, bundle, good).status == 200
    assert decide(team, alice, bundle, good).status == 409  # a replay
    awaited(team.door, place)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"{}", b'{"verdict": "approved"}', b"[" * 100000, b'{"verdict": 1, "reason": "", "signature": ""}',
        json.dumps({"verdict": "approved' OR 1=1 --", "reason": "", "signature": ""}).encode(),
        json.dumps({"verdict": "approved", "reason": "a\nb", "signature": "QQ=="}).encode(),
        json.dumps({"verdict": "approved", "reason": "a" * 501, "signature": "QQ=="}).encode(),
    ],
)  # fmt: skip
def test_what_is_no_decision_decides_nothing(team: Team, bundle: RequestBundle, body: bytes) -> None:
    """Broken and hostile documents are refused with a sentence, and the request goes on waiting."""
    alice = team.agent("alice")
    place = brought(team.door, bundle)
    path = f"/v1/approvals/{digest(bundle)}"
    answer = team.ask(alice, "POST", path, body, Content_Type="application/json")
    plain = team.ask(alice, "POST", path, json.dumps(signed(alice, digest(bundle))).encode(), Content_Type="text/plain")

    assert (answer.status, plain.status) == (403, 403)
    assert "wanted" in answer.document["error"]
    assert _state(team.door.ask("GET", place)) == "undecided"
    assert decide(team, alice, bundle, signed(alice, digest(bundle))).status == 200


def test_an_unknown_request(team: Team) -> None:
    """A digest that there is not, and a short one, name nothing."""
    alice = team.agent("alice")

    assert team.ask(alice, "GET", f"/v1/approvals/{'0' * 64}").status == 404
    assert team.ask(alice, "GET", "/v1/approvals/x").status == 404
    assert team.ask(alice, "DELETE", "/v1/approvals").status == 405
    assert team.run(alice, "show", "0" * 16).returncode == Exit.USAGE


def test_a_request_whose_bundle_was_put_away(team: Team, bundle: RequestBundle) -> None:
    """The record still names it, and its page says where the evidence is; before it was there."""
    alice = team.agent("alice")
    place = brought(team.door, bundle)
    decide(team, alice, bundle, signed(alice, digest(bundle)))
    awaited(team.door, place)
    paths = [f"/v1/approvals/{digest(bundle)}", f"/approvals/{digest(bundle)}"]
    before = [team.ask(alice, "GET", path).status for path in paths]
    engine = sa.create_engine(sqlite_url(team.desk.state / "door.db"), connect_args={"timeout": 180})
    with engine.begin() as connection:
        connection.execute(REQUESTS.update().where(REQUESTS.c.digest == digest(bundle)).values(bundle=b"", answer=None))
    engine.dispose()

    assert before == [200, 200]
    assert [team.ask(alice, "GET", path).status for path in paths] == [404, 404]
    assert digest(bundle)[:16].encode() in team.ask(alice, "GET", f"/approvals/record?q={digest(bundle)}").body


# --- at the desk's terminal -------------------------------------------------------------------------------------------


def test_sign_asks_for_the_same_approval(tmp_path: Path, pki: Pki, bundle: RequestBundle) -> None:
    """Without `--approve` the bundle waits, and nothing is signed; where no approval is needed it is signed."""
    desk = make_desk(tmp_path / "desk", pki, policy=APPROVALS)
    path = tmp_path / "one.request.json"
    path.write_bytes(dumps(bundle))
    run = desk.run("sign", path, "-o", tmp_path / "one.answer.json")
    before = len(desk.issued())
    desk.policy.write_text(POLICY)
    after = desk.run("sign", path, "-o", tmp_path / "one.answer.json")

    assert run.returncode == Exit.WAITING
    assert "wanted an approval by 1 of alice, bob" in " ".join(run.stderr.split())
    assert before == 0
    assert after.returncode == Exit.DONE, after.stderr


# --- by themselves -------------------------------------------------------------------------------------------------------


NOW = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)


def received(memory: DoorDatabase, digest_: str = "aa", **more: Any) -> str:
    values = {"digest": digest_, "node": "cp-1", "cluster": "kubernetes", "peer": "192.0.2.1", "now": NOW, **more}
    return memory.receive(values.pop("data", b"bundle"), **values)


def test_a_list_for_people_reads_no_more_than_it_shows(memory: DoorDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand bundles may wait for people, and a look at the first of them is not to take the memory of all."""
    for number in range(3):
        memory.move(received(memory, f"{number}"), "undecided", before=["waiting"])
    found: list[int] = []
    select = memory.select

    def counted(*query: Any) -> Any:
        rows = select(*query)
        found.append(len(rows))
        return rows

    monkeypatch.setattr(memory, "select", counted)
    monkeypatch.setattr(approvals, "MOST", 2)
    cases, count = approvals.Approvals(memory, _signing()).waiting("")
    list(cases)

    assert found == [1, 2]  # their number, and two of them
    assert count == 3


@pytest.mark.attack("D2")
def test_a_node_hides_no_other_nodes_request(memory: DoorDatabase) -> None:
    """Nodes come in turn, and requests of which nothing proves the node by their address; a search finds each."""
    for number in range(9):
        about = {"node": "cp-1", "named": True, "now": NOW + timedelta(seconds=number)}
        memory.move(received(memory, f"a{number}", **about), "undecided", before=["waiting"])
        about = {"node": f"made-up-{number}", "peer": "192.0.2.9", "now": NOW + timedelta(seconds=number, minutes=1)}
        memory.move(received(memory, f"b{number}", **about), "undecided", before=["waiting"])
    late = {"node": "cp-2", "named": True, "now": NOW + timedelta(hours=1)}
    memory.move(received(memory, "cc", **late), "undecided", before=["waiting"])

    first, count = memory.undecided("", 3)
    assert ([one.digest for one in first], count) == (["a0", "b0", "cc"], 19)
    for text in ("cp-2", "cc"):
        assert [one.digest for one in memory.undecided(text, 3)[0]] == ["cc"]
    assert memory.undecided("b%", 3) == ([], 0)
    assert (memory.undecided_of("cp-1", "kubernetes"), memory.undecided_of("made-up-1", "kubernetes")) == (9, 0)


@pytest.mark.attack("D2")
def test_one_nodes_requests_for_people_have_a_limit(own: Team, pairs: Pairs) -> None:
    """Ten of a proven node wait; another one is for later, and ten are no limit for what comes before them."""
    with running(own.door):
        for _ in range(10):
            place = brought(own.door, make_bundle({"etcd-server": pairs["etcd-server"]}))
            in_state(own.door, place, "undecided")
        more = own.door.post_once(dumps(make_bundle({"etcd-server": pairs["etcd-server"]})))

    assert more.status == 429
    assert "wanted at most 10 requests of one node that wait for people" in more.document["error"]


@pytest.mark.attack("D2")
def test_a_bundle_with_thousands_of_names_waits_for_no_person(team: Team, pairs: Pairs) -> None:
    """Each look at the list would read them all; the same bundle without them waits."""
    old, key = pairs["apiserver"]
    names = x509.SubjectAlternativeName([x509.DNSName(f"n{number}.example") for number in range(2000)])
    builder = x509.CertificateSigningRequestBuilder(old.subject).add_extension(names, critical=False)
    good = make_bundle({name: pairs[name] for name in ("apiserver", "etcd-server")})
    long = proven(good, "apiserver", key, builder.sign(key, hashes.SHA256()))
    answer = team.door.post(dumps(long))

    assert answer.status == 403
    assert "wanted at most 100, found 2000" in answer.document["error"]
    in_state(team.door, brought(team.door, good), "undecided")


def _signing() -> Mock:
    return Mock(verdicts=Mock(return_value=({}, Identity())))


def test_a_list_for_people_has_one_bundle_in_memory(memory: DoorDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is read when it is its turn: two hundred with a stranger's SANs would take more than a door's unit has."""
    for number in range(3):
        memory.move(received(memory, f"{number}"), "undecided", before=["waiting"])
    read = Mock(return_value=Mock(requests=[]))
    monkeypatch.setattr(approvals, "loads_request", read)
    waiting, _ = approvals.Approvals(memory, _signing()).waiting("")
    next(waiting)

    assert read.call_count == 1
    assert len(list(waiting)) == 2
