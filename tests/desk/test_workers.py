"""The desk's workers: what they say is what the desk would say, and without them it says it by itself."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from bridge.cli.app import app
from bridge.contract import Issued
from bridge.desk import workers as desk_workers
from bridge.desk.policy import judge, parse
from bridge.desk.workers import Judgement, ReadBundle, Workers, compared, read
from bridge.errors import Exit
from bridge.pki.bundle import (
    AnswerBundle,
    BundleError,
    IncompleteBundleError,
    Refusal,
    RequestBundle,
    sign_request,
)
from bridge.pki.bundle_format import digest, dumps, loads_answer, request_file_name
from bridge.pki.csr import PrivateKey
from bridge.pki.verify import Expectation
from bridge.system.waiting import wait_until
from tests.kit.bundles import changed, make_bundle, old_pairs
from tests.kit.desks import POLICY, Desk, make_desk
from tests.kit.measured import is_running, traced
from tests.kit.pki import Pki, handmade_pki

Pairs = dict[str, tuple[x509.Certificate, PrivateKey]]
NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return handmade_pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def pairs(pki: Pki) -> Pairs:
    return {name: pair for name, pair in old_pairs(pki).items() if name in ("apiserver", "scheduler.conf")}


@pytest.fixture
def desk_(tmp_path: Path, pki: Pki) -> Desk:
    return make_desk(tmp_path / "desk", pki)


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers(1)
    yield made
    made.close()


def put(desk_: Desk, bundle: RequestBundle) -> None:
    (desk_.inbox / request_file_name(bundle)).write_bytes(dumps(bundle))


def large_inbox(desk_: Desk, pairs: Pairs) -> dict[str, RequestBundle]:
    """More bundles than are worth a worker; each seventh has a request without its proof."""
    made = [make_bundle(pairs) for _ in range(desk_workers.WORTHWHILE + 7)]
    made = [changed(one, "scheduler.conf", proof=None) if number % 7 == 0 else one for number, one in enumerate(made)]
    for bundle in made:
        put(desk_, bundle)
    return {bundle.batch: bundle for bundle in made}


def answers_of(desk_: Desk) -> dict[str, AnswerBundle]:
    answers = [loads_answer(path.read_bytes()) for path in desk_.outbox.iterdir()]
    return {answer.batch: answer for answer in answers}


def judgement(pki: Pki) -> tuple[Judgement, x509.Certificate]:
    ca = x509.load_pem_x509_certificate(pki.ca_pem("ca")[0])
    by = Judgement(policy=parse(POLICY), cas={"ca": (ca,)}, now=NOW, without_proof=frozenset())
    return by, ca


def test_a_worker_reads_and_judges_as_the_desk_does(pki: Pki, pairs: Pairs, workers: Workers) -> None:
    """The same bundle, digest and verdicts on good and bad requests; what it can't judge it leaves to the desk."""
    good = make_bundle(pairs)
    made = [good, changed(good, "apiserver", proof=None), changed(good, "apiserver", authority="etcd-ca")]
    by, ca = judgement(pki)

    found = workers.submit(0, read, dict(enumerate([*map(dumps, made), b"{", b'{"schema": 1}'])), by).result()

    wanted = [{one.name: judge(one, each, by.policy, [ca], NOW) for one in each.requests} for each in made]
    assert found is not None
    assert [type(one) for one in found[3:]] == [IncompleteBundleError, BundleError]
    good_ones = [one for one in found if isinstance(one, ReadBundle)]
    verdicts = [one.verdicts for one in good_ones]
    assert [(one.bundle, one.digest) for one in good_ones] == [(one, digest(one)) for one in made]
    assert verdicts[:2] == wanted[:2]
    assert verdicts[1]["apiserver"].problems
    assert not verdicts[0]["apiserver"].problems
    assert verdicts[2].keys() == {"scheduler.conf"}


def test_a_worker_compares_as_the_desk_does(pki: Pki, pairs: Pairs, workers: Workers) -> None:
    """The bundle with this number is compared, whatever else was read; an old certificate is not the answer."""
    made = [make_bundle(pairs) for _ in range(3)]
    by, ca = judgement(pki)
    workers.submit(0, read, {7 + number: dumps(one) for number, one in enumerate(made)}, by).result()
    expected = Expectation(anchors=(ca,), anchor_name="ca.crt", now=NOW, min_validity=timedelta(days=300))
    old = {name: Issued(leaf=pair[0]) for name, pair in pairs.items()}

    def reasons(number: int) -> dict[str, str]:
        found = workers.submit(0, compared, [(number, old)], {"ca": expected}).result()
        assert found is not None
        return found[0]

    second = reasons(8)
    assert all("public key: wanted the key of the CSR" in reason for reason in second.values())
    assert second.keys() == pairs.keys()
    assert reasons(8) == {}  # known no more, and so left to the desk
    assert reasons(7).keys() == reasons(9).keys() == pairs.keys()


def test_a_worker_keeps_what_may_be_answered_and_not_too_much(
    pki: Pki, pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a bundle of which nothing will be signed, or for no CA of ours; of the others the latest, up to a limit in bytes."""
    good, by = make_bundle(pairs), judgement(pki)[0]
    bad = changed(changed(good, "apiserver", proof=None), "scheduler.conf", proof=None)
    known: dict[int, bytes] = {}
    monkeypatch.setattr(desk_workers, "_known", known)
    monkeypatch.setattr(desk_workers, "_LARGEST_KNOWN_BYTES", 2 * len(dumps(good)))

    read({1: dumps(good), 2: dumps(bad)}, by)
    assert list(known) == [1]
    read({5: dumps(good)}, replace(by, cas={}))
    assert list(known) == [1]
    read({3: dumps(good), 4: dumps(good)}, by)
    assert list(known) == [3, 4]


def test_a_policy_is_written_and_read_once(pki: Pki) -> None:
    """A door's worker gets it with each bundle: with 5,000 nodes in the inventory that took 12 ms; another one is read anew."""
    by, _ = judgement(pki)
    later, other = replace(by, now=NOW + timedelta(hours=1)), replace(by, policy=parse(POLICY.replace("cp-*", "w-*")))
    written = [desk_workers._in_bytes(one.policy)[1][0] for one in (by, later, other)]
    found = [ForkingPickler.loads(ForkingPickler.dumps(one)) for one in (by, later, other, by)]

    assert found == [by, later, other, by]
    assert written[0] is written[1]
    assert found[0].policy is found[1].policy
    assert written[2] != written[0]


def test_what_a_worker_keeps_takes_no_more_memory_than_its_file(pki: Pki, pairs: Pairs) -> None:
    """Junk beside a good request: the SANs of a CSR, once they are read, would take twenty times as much."""
    by, good = judgement(pki)[0], make_bundle(pairs)
    names = x509.SubjectAlternativeName([x509.DNSName("a")] * 20_000)
    junk = x509.CertificateSigningRequestBuilder(x509.Name([]), [x509.Extension(names.oid, False, names)])
    data = dumps(changed(good, "scheduler.conf", csr=junk.sign(pairs["apiserver"][1], hashes.SHA256())))
    with traced() as memory:
        before, _ = memory()
        read({100: data}, by)
        after, _ = memory()
    kept = desk_workers._known.pop(100)

    assert len(kept) < len(data)
    assert after - before < 2 * len(data)


@pytest.mark.parametrize("begin", [b"", b"nothing"])
def test_the_first_bundle_tells_by_which_cas_the_others_are_judged(
    pki: Pki, pairs: Pairs, workers: Workers, begin: bytes
) -> None:
    """It is waited for, and so is what follows one that tells nothing; the others are at the workers meanwhile."""
    by, _ = judgement(pki)
    size = desk_workers.CHUNK
    files = [Lying(dumps(make_bundle(pairs))) for _ in range(1 + 3 * size)]
    files[0] = Lying(begin) if begin else files[0]
    arrived: list[int | None] = []
    asked = []

    def opened() -> Judgement:
        asked.append(len(arrived))
        return by if any(one is not None for one in arrived) else replace(by, cas={})

    for file, ahead in workers.read_ahead(files, opened):
        assert (ahead is None) == (file.data == begin)
        arrived.append(len(ahead.verdicts) if ahead is not None else None)

    rest = [len(pairs)] * 2 * size
    if begin:
        assert asked == [0, 1, 1 + size, 1 + size]
        assert arrived == [None, *[0] * size, *rest]
    else:
        assert asked == [0, 1, 1, 1]
        assert arrived == [0, *[len(pairs)] * size, *rest]


@dataclass
class Lying:
    """A file."""

    data: bytes


def test_a_large_inbox_is_answered_as_a_small_one(desk_: Desk, pairs: Pairs) -> None:
    """Each bundle gets its own certificates, and the refusals that it would get alone."""
    made = large_inbox(desk_, pairs)

    run = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)

    assert run.returncode == Exit.REFUSED
    assert_answered(desk_, made)
    assert desk_.run("audit", "verify").returncode == 0


def assert_answered(desk_: Desk, made: dict[str, RequestBundle]) -> None:
    answers = answers_of(desk_)
    assert answers.keys() == made.keys()
    for batch, bundle in made.items():
        for request in bundle.requests:
            answer = answers[batch].answers[request.name]
            if request.proof is None:
                assert answer == Refusal(reason="proof: there is no continuity proof")
            else:
                assert isinstance(answer, Issued)
                assert answer.leaf.public_key() == sign_request(request, bundle).csr.public_key()


def test_workers_that_are_killed_cost_time_alone(desk_: Desk, pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """All workers are killed after the first chunk, and the results are the same."""
    made = large_inbox(desk_, pairs)
    asked: list[Any] = []
    real = Workers.submit

    def submit(self: Workers, chunk: int, task: Any, *arguments: Any) -> Future[Any]:
        if asked:
            for worker in self._workers:
                worker.process.kill()
                worker.process.wait()
        asked.append(task)
        return real(self, chunk, task, *arguments)

    monkeypatch.setattr(Workers, "submit", submit)

    assert run_here(desk_) == Exit.REFUSED

    assert compared in asked
    assert_answered(desk_, made)


def test_what_a_worker_finds_wrong_does_not_go_out(desk_: Desk, pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its word is enough to refuse what the CA signed."""
    made = large_inbox(desk_, pairs)
    real = Workers.submit

    def submit(self: Workers, chunk: int, task: Any, *arguments: Any) -> Future[Any]:
        if task is not compared:
            return real(self, chunk, task, *arguments)
        found: Future[Any] = Future()
        found.set_result([dict.fromkeys(answers, "subject: another") for _, answers in arguments[0]])
        return found

    monkeypatch.setattr(Workers, "submit", submit)

    assert run_here(desk_) == Exit.REFUSED

    refused = [answer for one in answers_of(desk_).values() for answer in one.answers.values()]
    assert len(refused) == 2 * len(made)
    assert Refusal(reason="the desk's CA signed something else: subject: another") in refused
    assert all(isinstance(answer, Refusal) for answer in refused)


def run_here(desk_: Desk) -> int:
    """In this process, so that its parts can be changed."""
    code = app(
        ["sign", str(desk_.inbox), "-o", str(desk_.outbox), "--config", str(desk_.config)], standalone_mode=False
    )
    return int(code or 0)


def test_no_worker_outlives_a_killed_desk(tmp_path: Path) -> None:
    """Its standard input ends with the desk, however that ended."""
    script = "import sys, time\nfrom bridge.desk.workers import Workers\n"
    script += "made = Workers(1)\nprint(made._workers[0].process.pid, flush=True)\ntime.sleep(600)\n"
    desk = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert desk.stdout is not None
    worker = int(desk.stdout.readline())
    assert is_running(worker)

    desk.send_signal(signal.SIGKILL)
    desk.wait()
    desk.stdout.close()

    assert not wait_until(lambda: is_running(worker), lambda runs: not runs, timedelta(seconds=120), pause_seconds=0.1)


@pytest.mark.parametrize("rests", [True, False])
def test_a_worker_that_has_ended_is_replaced(monkeypatch: pytest.MonkeyPatch, *, rests: bool) -> None:
    """A task that fails ends its worker and nothing else; the next task begins another, but not at once after a start."""
    monkeypatch.setattr(desk_workers, "_REST_SECONDS", 3600.0 if rests else -1.0)
    with contextlib.closing(Workers(1)) as workers:
        assert workers.states() == {"running": 1, "ended": 0}
        assert workers.submit(0, os.fspath, 1).result() is None
        assert workers.states() == {"running": 0, "ended": 1}
        assert workers.submit(0, os.fspath, "a path").result() == (None if rests else "a path")
        assert workers.states()["ended"] == int(rests)


def stopped(workers: Workers) -> Future[str | None]:
    """A task at a worker that does nothing, which fills the pipe to it."""
    workers.submit(0, os.fspath, "a path").result()
    os.kill(workers._workers[0].process.pid, signal.SIGSTOP)
    answer = workers.submit(0, os.fspath, "a path" * 200_000)
    wait_until(lambda: workers._workers[0].began, bool, timedelta(seconds=120), pause_seconds=0.01)
    return answer


def test_a_worker_that_hangs_is_ended(workers: Workers) -> None:
    """Its task is left to the desk after a time, and not before."""
    answer, process = stopped(workers), workers._workers[0].process
    workers.tend(3600.0)
    assert process.poll() is None
    assert not answer.done()

    workers.tend(0.0)

    assert answer.result() is None
    assert process.poll() == -signal.SIGKILL


def test_a_worker_that_hangs_does_not_hold_up_the_end() -> None:
    """The process ends, and no other one begins for the tasks that wait."""
    workers = Workers(1)
    process, answer = workers._workers[0].process, stopped(workers)
    waiting = workers.submit(0, os.fspath, "a path")

    workers.close()

    assert (answer.result(), waiting.result()) == (None, None)
    assert process.poll() == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_end_of_a_unit_leaves_the_workers_to_the_desk(workers: Workers, number: signal.Signals) -> None:
    """systemd and a terminal tell all processes: a worker works on until the desk has ended; only a kill ends it."""
    assert workers.submit(0, os.fspath, "a path").result() == "a path"
    process = workers._workers[0].process
    process.send_signal(number)
    if number == signal.SIGKILL:
        assert process.wait() == -signal.SIGKILL
    else:
        assert workers.submit(0, os.fspath, "a path").result() == "a path"
        assert process.poll() is None
