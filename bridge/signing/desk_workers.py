"""
Processes that do the desk's arithmetic ahead of it: read a bundle, verify its signatures, apply the policy, compare.

What they do is pure: no CA, no file, no clock. They get bytes and answer with words. The desk computes for itself what
they did not, so that a worker that can't be started or is killed costs time and nothing else.
A worker ends with the desk, even with one that is killed, since then its standard input ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import TypeVar

from cryptography import x509

from bridge.contract import Issued, SignRequest
from bridge.errors import VerificationError
from bridge.pki import verify
from bridge.pki.bundle import RequestBundle, loads_request, sign_request
from bridge.pki.verify import Expectation
from bridge.signing.desk_policy import Policy, PolicyVerdict, judge
from bridge.specs import USER
from bridge.system import another_python
from bridge.system.console import log

#: Fewer bundles are done before a worker has loaded what it needs.
WORTHWHILE = 50
_MOST = 4
_LEAST_SHARE = 2  #: Of what a user asks for.
#: Bundles that a worker gets at once.
CHUNK = 20
_SERVE = "from bridge.signing.desk_workers import serve; serve()"

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """By what requests are judged; certificates as DER, by authority."""

    policy: Policy
    cas: Mapping[str, tuple[bytes, ...]]
    now: datetime
    without_proof: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredBundle:
    """One bundle, and the chains that its CAs answered with, by name; DER."""

    number: int
    data: bytes
    chains: Mapping[str, tuple[bytes, ...]]


#: Without anchors, which can't be sent: those are beside it, as DER.
Comparison = Mapping[str, tuple[Expectation, tuple[bytes, ...]]]

# --- in the worker ----------------------------------------------------------------------------------------------------

#: Bundles that were judged and will be compared, by the desk's number.
_known: dict[int, RequestBundle] = {}


def judged(bundles: Mapping[int, bytes], by: Judgement) -> list[dict[str, PolicyVerdict]]:
    """What the policy says to each request of these bundles, by name; none for what can't be judged here."""
    verdicts = []
    for number, data in bundles.items():
        bundle = _known[number] = loads_request(data)
        found = {}
        for request in bundle.requests:
            with contextlib.suppress(Exception):  # the desk judges it by itself, and tells what is wrong
                cas = _loaded(by.cas[request.authority])
                found[request.name] = judge(request, bundle, by.policy, cas, by.now, by.without_proof)
        verdicts.append(found)
    return verdicts


def compared(answered: Sequence[AnsweredBundle], by: Comparison) -> list[dict[str, str]]:
    """Why each certificate is not what was asked for, by name; empty: it is."""
    reasons = []
    for one in answered:
        bundle = _known.pop(one.number, None) or loads_request(one.data)
        by_name = {request.name: request for request in bundle.requests}
        found = {}
        for name, (leaf, *intermediates) in one.chains.items():
            expected, anchors = by[by_name[name].authority]
            issued = Issued(
                leaf=x509.load_der_x509_certificate(leaf),
                intermediates=tuple(map(x509.load_der_x509_certificate, intermediates)),
            )
            found[name] = _reason(issued, sign_request(by_name[name], bundle), expected, _loaded(anchors))
        reasons.append(found)
    return reasons


def _reason(issued: Issued, request: SignRequest, expected: Expectation, anchors: tuple[x509.Certificate, ...]) -> str:
    try:
        verify.check(issued, request, for_request(request, replace(expected, anchors=anchors)))
    except VerificationError as e:
        return e.reason
    return ""


def for_request(request: SignRequest, expected: Expectation) -> Expectation:
    """A user's certificate lives for hours, which would be too short for any of kubeadm's."""
    least = request.validity / _LEAST_SHARE
    return replace(expected, min_validity=min(expected.min_validity, least)) if request.spec == USER else expected


@lru_cache(maxsize=64)
def _loaded(certificates: tuple[bytes, ...]) -> tuple[x509.Certificate, ...]:
    return tuple(map(x509.load_der_x509_certificate, certificates))


def serve() -> None:
    """Be a worker: tasks come in on standard input, answers go out on standard output, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at the terminal is the desk's to answer
    tasks, answers = Connection(os.dup(0), writable=False), Connection(os.dup(1), readable=False)
    os.dup2(2, 1)  # nothing else writes where the answers go
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while True:
            task, arguments = tasks.recv()
            answers.send(task(*arguments))


# --- at the desk ------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Worker:
    """One process, and the thread that waits for it."""

    process: subprocess.Popen[bytes] = field(init=False)
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def __post_init__(self) -> None:
        self._is_gone = False
        self.process = subprocess.Popen(another_python.command(_SERVE), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdin is not None and self.process.stdout is not None  # noqa: S101, PT018 (for the types)
        self._tasks = Connection(os.dup(self.process.stdin.fileno()), readable=False)
        self._answers = Connection(os.dup(self.process.stdout.fileno()), writable=False)
        self.process.stdin.close()
        self.process.stdout.close()

    def ask(self, task: Callable[..., _Answer], arguments: tuple[object, ...]) -> _Answer | None:
        """None: it is no more."""
        if self._is_gone:
            return None
        try:
            self._tasks.send((task, arguments))
            answer: _Answer = self._answers.recv()
        except (OSError, EOFError):
            self._is_gone = True
            log.info("a worker process of the desk has ended; the desk does its part by itself, which takes longer")
            return None
        return answer

    def close(self) -> None:
        self.thread.shutdown()
        self._tasks.close()
        self._answers.close()
        self.process.kill()
        self.process.wait()


class Workers:
    """One worker for each processor, or none."""

    def __init__(self, count: int | None = None) -> None:
        """
        Args:
            count: Of processes; None: what this machine has processors for.
        """
        wanted = min(_MOST, len(os.sched_getaffinity(0))) if count is None else count
        self._workers: list[_Worker] = []
        with contextlib.suppress(OSError):  # no memory, no more processes: the desk does it by itself
            for _ in range(wanted):
                self._workers.append(_Worker())

    def __bool__(self) -> bool:
        return bool(self._workers)

    def submit(self, chunk: int, task: Callable[..., _Answer], *arguments: object) -> Future[_Answer | None]:
        """Have a task done by the worker that does all of this chunk; the answer is None when it can't."""
        worker = self._workers[chunk % len(self._workers)]
        return worker.thread.submit(worker.ask, task, arguments)

    def close(self) -> None:
        """End them."""
        for worker in self._workers:
            worker.close()
        self._workers = []
