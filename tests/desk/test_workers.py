"""The workers of door and desk: what they say is what the desk would say, and none hangs or outlives its parent."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from bridge.desk import workers as desk_workers
from bridge.desk.policy import judge, parse
from bridge.desk.workers import Judgement, ReadBundle, Workers, read, reasons
from bridge.pki.bundle import (
    BundleError,
    IncompleteBundleError,
    sign_request,
)
from bridge.pki.bundle_format import digest, dumps
from bridge.pki.csr import PrivateKey, generate_key
from bridge.pki.verify import Expectation
from bridge.system.waiting import wait_until
from tests.kit.bundles import changed, make_bundle, old_pairs
from tests.kit.desks import POLICY
from tests.kit.issuing import Signer
from tests.kit.measured import is_running
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
def workers() -> Iterator[Workers]:
    made = Workers()
    made.begin(1)
    yield made
    made.close()


def judgement(pki: Pki) -> tuple[Judgement, x509.Certificate]:
    ca = x509.load_pem_x509_certificate(pki.ca_pem("ca")[0])
    by = Judgement(policy=parse(POLICY), cas={"ca": (ca,)}, now=NOW, without_proof=frozenset())
    return by, ca


def test_a_worker_reads_and_judges_as_the_desk_does(pki: Pki, pairs: Pairs, workers: Workers) -> None:
    """The same bundle, digest and verdicts on good and bad requests; what it can't judge it leaves to the desk."""
    good = make_bundle(pairs)
    made = [good, changed(good, "apiserver", proof=None), changed(good, "apiserver", authority="etcd-ca")]
    by, ca = judgement(pki)

    found = [workers.submit(read, data, by).result() for data in [*map(dumps, made), b"{", b'{"schema": 1}']]

    wanted = [{one.name: judge(one, each, by.policy, [ca], NOW) for one in each.requests} for each in made]
    assert [type(one) for one in found[3:]] == [IncompleteBundleError, BundleError]
    good_ones = [one for one in found if isinstance(one, ReadBundle)]
    verdicts = [one.verdicts for one in good_ones]
    assert [(one.bundle, one.digest) for one in good_ones] == [(one, digest(one)) for one in made]
    assert verdicts[:2] == wanted[:2]
    assert verdicts[1]["apiserver"].problems
    assert not verdicts[0]["apiserver"].problems
    assert verdicts[2].keys() == {"scheduler.conf"}


def test_no_worker_outlives_a_killed_desk(tmp_path: Path) -> None:
    """Its standard input ends with the desk, however that ended."""
    script = "import sys, time\nfrom bridge.desk.workers import Workers\n"
    script += "made = Workers()\nmade.begin(1)\nprint(made._workers[0].process.pid, flush=True)\ntime.sleep(600)\n"
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
    with contextlib.closing(Workers()) as workers:
        workers.begin(1)
        assert workers.states() == {"running": 1, "ended": 0}
        assert workers.submit(os.fspath, 1).result() is None
        assert workers.states() == {"running": 0, "ended": 1}
        assert workers.submit(os.fspath, "a path").result() == (None if rests else "a path")
        assert workers.states()["ended"] == int(rests)


def stopped(workers: Workers) -> Future[str | None]:
    """A task at a worker that does nothing, which fills the pipe to it."""
    workers.submit(os.fspath, "a path").result()
    os.kill(workers._workers[0].process.pid, signal.SIGSTOP)
    answer = workers.submit(os.fspath, "a path" * 200_000)
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
    workers = Workers()
    workers.begin(1)
    process, answer = workers._workers[0].process, stopped(workers)
    waiting = workers.submit(os.fspath, "a path")

    workers.close()

    assert (answer.result(), waiting.result()) == (None, None)
    assert process.poll() == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_end_of_a_unit_leaves_the_workers_to_the_desk(workers: Workers, number: signal.Signals) -> None:
    """systemd and a terminal tell all processes: a worker works on until the desk has ended; only a kill ends it."""
    assert workers.submit(os.fspath, "a path").result() == "a path"
    process = workers._workers[0].process
    process.send_signal(number)
    if number == signal.SIGKILL:
        assert process.wait() == -signal.SIGKILL
    else:
        assert workers.submit(os.fspath, "a path").result() == "a path"
        assert process.poll() is None


def test_a_worker_compares_answers_as_the_desk_does(pki: Pki, pairs: Pairs, workers: Workers) -> None:
    """There is no reason against the right certificate, and the desk's own reason against one for another key."""
    bundle, (_, ca) = make_bundle(pairs), judgement(pki)
    apiserver, scheduler = (sign_request(request, bundle) for request in bundle.requests)
    by = {
        "ca": Expectation(
            anchors=(ca,),
            anchor_name="ca.crt",
            now=datetime.now(UTC),
            min_validity=timedelta(days=7),
            shorter_allowed=True,
        )
    }
    signer = Signer.load(*pki.ca_pem("ca"))
    answered = [
        (apiserver, signer.issue(apiserver)),
        (scheduler, signer.issue(scheduler, public_key=generate_key("ecdsa-p256").public_key())),
    ]

    found = workers.submit(reasons, answered, by).result()

    assert found == reasons(answered, by)
    assert found[0] == ""
    assert "public key: " in found[1]


def test_without_a_worker_there_is_no_answer() -> None:
    """The caller then does the work itself."""
    assert Workers().submit(os.fspath, "a path").result() is None
