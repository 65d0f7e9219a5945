"""Revocation through the door: a node may have revoked what it has replaced, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path

import pytest
from cryptography import x509

from backends.door import DoorBackend, DoorSettings
from bridge.contract import Issued, Revocation, SignRequest
from bridge.control_plane import proof
from bridge.control_plane.proof import ProofFinding, ProofReport
from bridge.errors import BackendRefusedError, Exit
from bridge.pki import csr, node_proofs
from bridge.pki.bundle_format import dumps, loads_answer
from bridge.pki.certificates import pem, serial_hex
from bridge.pki.csr import PrivateKey
from bridge.renewal import renew
from bridge.renewal.selection import RunOptions
from bridge.settings.load import parse
from bridge.specs import SPECS
from bridge.state import Store, audit
from bridge.state.obligations import revocations_file
from bridge.system.locks import lock
from bridge.system.waiting import wait_until
from tests.kit.bundles import changed, make_bundle, old_pairs
from tests.kit.cas import live_certificates
from tests.kit.desks import POLICY, Desk, make_desk
from tests.kit.issuing import Signer
from tests.kit.pki import Pki, handmade_pki
from tests.kit.renewing import Quiet
from tests.kit.serving import Answer, Database, ServeProgram, add_door, insist, running

_PATIENCE = timedelta(minutes=3)
_NAME = "front-proxy-client"
ALLOWED = f'{POLICY}revoke = "superseded"\n'

Pair = tuple[x509.Certificate, PrivateKey]


@pytest.fixture
def desk(tmp_path: Path, pki: Pki) -> Desk:
    return make_desk(tmp_path / "desk", pki, policy=ALLOWED)


def renewed(door: ServeProgram, old: Pair, name: str = _NAME, node: str = "cp-1", *, is_proven: bool = True) -> Pair:
    """The next certificate of a node, with its key."""
    key = csr.generate_key("ecdsa-p256")
    bundle = make_bundle({name: old}, node=node, build=lambda live: x509.load_pem_x509_csr(csr.build(live, key)))
    if not is_proven:
        bundle = changed(bundle, name, proof=None)
    posted = door.post(dumps(bundle))
    assert posted.status == 202, posted.body
    place = posted.headers["location"]
    answer = wait_until(lambda: door.ask("GET", place), lambda one: one.status == 200, _PATIENCE, pause_seconds=0.1)
    issued = loads_answer(answer.body).answers[name]
    assert isinstance(issued, Issued), issued
    return issued.leaf, key


def word(successor: Pair, old: x509.Certificate, **differences: str) -> Revocation:
    """A node's word, by the successor's key."""
    who = {"name": _NAME, "node": "cp-1", "cluster": "kubernetes", **differences}
    return node_proofs.revocation(successor[1], old=old, successor=successor[0], **who)


def send(door: ServeProgram, asked: Revocation | bytes) -> Answer:
    """As a node does: again while a CA, the record or the database has no time for it."""
    return insist(lambda: send_once(door, asked))


def send_once(door: ServeProgram, asked: Revocation | bytes) -> Answer:
    body = asked if isinstance(asked, bytes) else node_proofs.revocation_json(asked)
    return door.ask("POST", "/v1/revocations", body, Content_Type="application/json")


def revoked(desk: Desk) -> set[str]:
    """Serial numbers that the CAs have as revoked."""
    return {row.split("\t")[3].lstrip("0") for row in desk.issued() if row.startswith("R")}


def recorded(desk: Desk) -> list[str]:
    """Serial numbers of the audit log's lines about revocations."""
    lines = [json.loads(line) for line in (desk.state / "audit.jsonl").read_text().splitlines()]
    return [_short(line["previousSerialNumber"]) for line in lines if line["event"] == audit.REVOKED]


def serial(one: Pair | x509.Certificate) -> str:
    return _short(serial_hex(one if isinstance(one, x509.Certificate) else one[0]))


def _short(text: str) -> str:
    return text.replace(":", "").upper().lstrip("0")


def test_a_node_has_revoked_what_it_replaced(desk: Desk, database: Database, pki: Pki) -> None:
    """A node can have the one before the last revoked, too, which another CA's program signed; a second request changes nothing."""
    first = old_pairs(pki)[_NAME]
    with running(add_door(desk.config, desk.directory, database.settings)) as door:
        second = renewed(door, first)
        third = renewed(door, second)
        settings = DoorSettings(url=door.url, ca_file=door.ca, node="cp-1")
        with closing(DoorBackend.from_settings(settings)) as backend:
            for old in (first, second, second):
                backend.revoke_proven(word(third, old[0]))
            with pytest.raises(BackendRefusedError, match="HTTP 403"):
                backend.revoke_proven(word(second, third[0]))

    assert revoked(desk) == {serial(first), serial(second)}
    assert recorded(desk) == [serial(first), serial(second), serial(second)]
    assert desk.run("audit", "verify").returncode == 0


def test_the_policy_decides(desk: Desk, pki: Pki) -> None:
    """Nothing is revoked unless it says so, nor for a node that it no longer allows; it is read while the door works."""
    desk.policy.write_text(POLICY)
    first = old_pairs(pki)[_NAME]
    with running(add_door(desk.config, desk.directory)) as door:
        second = renewed(door, first)
        asked = word(second, first[0])
        never = send(door, asked)
        desk.policy.write_text(ALLOWED.replace('nodes = ["cp-*"]', 'nodes = ["cp-2"]'))
        elsewhere = wait_until(
            lambda: send(door, asked), lambda one: one.body != never.body, _PATIENCE, pause_seconds=0.2
        )
        before = revoked(desk)
        desk.policy.write_text(ALLOWED)
        allowed = wait_until(lambda: send(door, asked), lambda one: one.status == 200, _PATIENCE, pause_seconds=0.2)

    assert (never.status, elsewhere.status, allowed.status) == (403, 403, 200)
    assert 'allow.revoke: wanted "superseded"' in never.document["error"]
    assert "node: wanted cp-2, found cp-1" in elsewhere.document["error"]
    assert before == set()
    assert revoked(desk) == {serial(first)}


def test_a_certificate_without_a_proof_revokes_nothing(desk: Desk, pki: Pki) -> None:
    """Where people waive the proof, its request names a certificate that its maker need not have had."""
    desk.policy.write_text(f'{ALLOWED}proof = "optional"\n')
    first = old_pairs(pki)[_NAME]
    with running(add_door(desk.config, desk.directory)) as door:
        unproven, proven = renewed(door, first, is_proven=False), renewed(door, first)
        refused, done = send(door, word(unproven, first[0])), send(door, word(proven, first[0]))

    assert (refused.status, done.status) == (403, 200)
    assert recorded(desk) == [serial(first)]


def test_a_revoked_successor_revokes_nothing(desk: Desk, pki: Pki) -> None:
    """Its key may be lost or stolen; the one that replaced it may."""
    first = old_pairs(pki)[_NAME]
    with running(add_door(desk.config, desk.directory)) as door:
        second = renewed(door, first)
        third = renewed(door, second)
        done = [send(door, word(third, second[0])), send(door, word(third, first[0]))]
        fourth = renewed(door, third)
        stolen = send(door, word(second, first[0]))
        last = send(door, word(fourth, third[0]))

    assert [one.status for one in done] == [200, 200]
    assert (stolen.status, last.status) == (403, 200)
    assert "not revoked" in stolen.document["error"]
    assert revoked(desk) == {serial(first), serial(second), serial(third)}


def test_no_revocation_stays_unrecorded(desk: Desk, pki: Pki) -> None:
    """While the audit log can't be written to the node hears "later", and asks again."""
    first = old_pairs(pki)[_NAME]
    with running(add_door(desk.config, desk.directory)) as door:
        second = renewed(door, first)
        wait_until(
            lambda: door.ask("GET", "/metrics").body, lambda one: b'"answered"} 1' in one, _PATIENCE, pause_seconds=0.2
        )
        with lock(Store(desk.state).lock, "a test", _PATIENCE):
            later = send_once(door, word(second, first[0]))
            unrecorded = recorded(desk)
        again = send(door, word(second, first[0]))

    assert (later.status, later.headers["retry-after"], unrecorded) == (503, "30", [])
    assert again.status == 200
    assert recorded(desk) == [serial(first)]


# --- hostile ----------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Stage:
    """A door, two nodes and their certificates."""

    door: ServeProgram
    desk: Desk
    pki: Pki

    @cached_property
    def first(self) -> Pair:
        """Both nodes have it, since kubeadm's front-proxy-client names no node."""
        return old_pairs(self.pki)[_NAME]

    @cached_property
    def second(self) -> Pair:
        """The node's next one."""
        return renewed(self.door, self.first)

    @cached_property
    def third(self) -> Pair:
        """The node's live one."""
        return renewed(self.door, self.second)

    @cached_property
    def others(self) -> Pair:
        """Another node's live one, which replaced `others_old`."""
        return renewed(self.door, self.others_old, node="cp-2")

    @cached_property
    def others_old(self) -> Pair:
        """Another node's."""
        return renewed(self.door, self.first, node="cp-2")

    @cached_property
    def etcd(self) -> Pair:
        """The node's live one of another name and CA."""
        return renewed(self.door, old_pairs(self.pki)["apiserver-etcd-client"], "apiserver-etcd-client")

    def made(self, ca: str = "front-proxy-ca") -> Pair:
        """By the CA, and not through the door."""
        key = csr.generate_key("ecdsa-p256")
        request = SignRequest(spec=SPECS[_NAME], csr_pem=csr.build(self.first[0], key), validity=timedelta(days=1))
        return Signer.load(*self.pki.ca_pem(ca)).issue(request).leaf, key

    @cached_property
    def good(self) -> Revocation:
        """What the node may send; each test but one sends another."""
        return word(self.third, self.second[0])

    def text(self, old: str = "", new: str = "") -> bytes:
        """The good one, written differently."""
        data = node_proofs.revocation_json(self.good).decode()
        assert old in data
        return data.replace(old, new, 1).encode()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, pki: Pki) -> Iterator[Stage]:
    desk = make_desk(tmp_path_factory.mktemp("stage") / "desk", pki, policy=ALLOWED)
    with running(add_door(desk.config, desk.directory)) as door:
        yield Stage(door=door, desk=desk, pki=pki)


Hostile = Callable[[Stage], Revocation | bytes]
_REFUSED: dict[str, Hostile] = {
    "the live one, by the key of the one before": lambda s: word(s.second, s.third[0]),
    "the live one, by its own key": lambda s: word(s.third, s.third[0]),
    "another node's, by this node's key": lambda s: word(s.third, s.others_old[0]),
    "another node's, in that node's name": lambda s: word(s.third, s.others_old[0], node="cp-2"),
    "this node's, by another node's key": lambda s: word(s.others, s.second[0]),
    "this node's, by another node's key in its name": lambda s: word(s.others, s.second[0], node="cp-2"),
    "for another cluster": lambda s: word(s.third, s.second[0], cluster="other"),
    "of another name": lambda s: word(s.third, s.second[0], name="apiserver"),
    "of another name and successor": lambda s: word(s.etcd, s.second[0], name="apiserver-etcd-client"),
    "by another successor of this node": lambda s: word(s.etcd, s.second[0]),
    "a word about another certificate": lambda s: replace(word(s.third, s.first[0]), certificate=s.second[0]),
    "a word for another successor": lambda s: replace(word(s.second, s.first[0]), successor=s.third[0]),
    "a signature by the replaced key": lambda s: replace(word(s.second, s.first[0]), certificate=s.second[0]),
    "a signature by a stranger's key": lambda s: word((s.third[0], s.others[1]), s.second[0]),
    "no signature": lambda s: replace(s.good, proof=b"\0"),
    "a successor that was not signed here": lambda s: word(s.made(), s.second[0]),
    "a successor by another CA": lambda s: word(s.made("etcd-ca"), s.second[0]),
    "a certificate that was not signed here": lambda s: word(s.third, s.made()[0]),
    "a certificate by another CA": lambda s: word(s.third, s.made("ca")[0]),
    "the CA's own certificate": lambda s: word(
        s.third, x509.load_pem_x509_certificate(s.pki.ca_pem("front-proxy-ca")[0])
    ),
    "the node's first one as the successor": lambda s: word(s.first, s.second[0]),
}
_UNREADABLE: dict[str, Hostile] = {
    "nothing": lambda _: b"",
    "a list": lambda _: b"[]",
    "no JSON": lambda _: b"{",
    "deep": lambda _: b"[" * 60_000,
    "a bundle's schema": lambda s: s.text("ca-bridge/revocation", "ca-bridge/request-bundle"),
    "a further key": lambda s: s.text("{", '{"node": "cp-2", '),
    "a key twice": lambda s: s.text("{", '{"name": "apiserver", '),
    "no proof": lambda s: s.text('"proof"', '"proof": null, "x"'),
    "a proof that is null": lambda s: json.dumps(json.loads(s.text()) | {"proof": None}).encode(),
    "a proof that is no base64": lambda s: json.dumps(json.loads(s.text()) | {"proof": "?"}).encode(),
    "two certificates": lambda s: json.dumps(
        json.loads(s.text()) | {"certificate": pem(s.second[0], s.first[0]).decode()}
    ).encode(),
    "a certificate that is a number": lambda s: json.dumps(json.loads(s.text()) | {"certificate": 1}).encode(),
    "a path as the name": lambda s: s.text(_NAME, "../ca"),
    "SQL as the name": lambda s: s.text(_NAME, "x' OR '1'='1"),
    "markup as the name": lambda s: s.text(_NAME, "<script>"),
}


@pytest.mark.parametrize("which", [*_REFUSED, *_UNREADABLE])
def test_nothing_hostile_is_revoked(stage: Stage, which: str) -> None:
    """Each is refused with a reason, and the CAs have nothing as revoked; the honest twin comes last."""
    hostile = (_REFUSED | _UNREADABLE)[which](stage)
    before = revoked(stage.desk)
    answer = send(stage.door, hostile)
    after = revoked(stage.desk)

    assert answer.status == (403 if which in _REFUSED else 400), answer.body
    assert "wanted" in answer.document["error"]
    assert after == before


def test_the_address_takes_one_kind_of_request(stage: Stage) -> None:
    """Another method, path, kind of body and length are refused; the honest word is not, nor is it afterwards."""
    ask, body = stage.door.ask, node_proofs.revocation_json(stage.good)
    kind = {"Content_Type": "application/json"}
    statuses = [
        ask("GET", "/v1/revocations").status,
        ask("PUT", "/v1/revocations", body, **kind).status,
        ask("POST", "/v1/revocations/", body, **kind).status,
        ask("POST", "/v1/revocationsx", body, **kind).status,
        ask("POST", "/v1/revocations", body, Content_Type="text/plain").status,
        ask("POST", "/v1/revocations", body + b" " * (64 << 10), **kind).status,
    ]
    before = revoked(stage.desk)
    done = send(stage.door, stage.good)

    assert statuses == [405, 405, 404, 404, 415, 413]
    assert serial(stage.second) not in before
    assert done.status == 200
    assert serial(stage.second) in revoked(stage.desk)


# --- a node -----------------------------------------------------------------------------------------------------------


def test_renew_has_its_superseded_certificates_revoked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new keys, of files and of kubeconfigs, prove the node; nothing is left to do, and the live ones stay."""
    findings = tuple(
        ProofFinding(component=spec.component, certificate=name, what="serves", state="current", detail="")
        for name, spec in SPECS.items()
    )
    monkeypatch.setattr(proof, "look", lambda *_: ProofReport(findings=findings))  # there is no cluster
    node, names = handmade_pki(tmp_path / "node"), ("front-proxy-client", "scheduler.conf")
    desk = make_desk(tmp_path / "desk", node, policy=ALLOWED)
    old = {serial(live_certificates(node)[name]) for name in names}
    with running(add_door(desk.config, desk.directory)) as door:
        lines = [f'[node]\npki_dir = "{node.pki_dir}"\nkubeconfig_dir = "{node.kubeconfig_dir}"\nname = "cp-1"']
        lines += [f'state_dir = "{tmp_path}/state"', '[renewal]\nrevoke = "superseded"\nrevoke_after = "1d"']
        lines += [f'[backend.door]\ntype = "door"\nurl = "{door.url}"\nca_file = "{door.ca}"\nwait = "2m"']
        lines += [f'[authority.{name}]\nbackend = "door"' for name in desk.authorities]
        settings, quiet = parse("\n".join(lines)), Quiet()

        def run(later: timedelta, *wanted: str) -> int:
            return renew.run(settings, RunOptions(names=wanted), lambda: datetime.now(UTC) + later, quiet)[0].exit_code

        codes = [run(timedelta(), *names), run(timedelta(days=2))]

    assert codes == [Exit.DONE, Exit.DONE], quiet.notes
    assert revoked(desk) == old
    assert not revocations_file(Store(settings.node.state_dir)).read()
    assert old.isdisjoint(serial(one) for one in live_certificates(node).values())
