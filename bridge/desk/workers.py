"""
Processes that read bundles, judge their requests, and compare the answers, for a door that many nodes ask at once and
for a desk with a full inbox.

They use no CA, file or clock: they receive bytes, and answer with the bundle and its problems. Door and desk do what the
workers have not done, so losing one costs only time, and the next task starts another. A worker ends with its door or
desk, even a killed one, when its standard input ends. The processes of `ProcessPoolExecutor` import from the current
directory, and one that hangs can't be ended alone.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from bridge.contract import Issued, SignRequest
from bridge.desk.policy import Policy, PolicyVerdict, judge
from bridge.pki import verify
from bridge.pki.bundle import BundleError, RequestBundle
from bridge.pki.bundle_format import loads_digested
from bridge.pki.verify import Expectation
from bridge.system.console import log
from bridge.system.run_command import python_command

#: For this long after a worker's start no other replaces it: starts of a broken worker stay rare.
_REST_SECONDS = 10.0
_LEAST_SHARE = 2  #: A certificate requested for a short time has to live for at least half of it.
_SERVE = "from bridge.desk.workers import serve; serve()"

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """The rules for judging requests."""

    policy: Policy
    cas: Mapping[str, tuple[x509.Certificate, ...]]  #: By authority.
    now: datetime
    without_proof: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadBundle:
    """A bundle that was read, and judged as far as there are verdicts."""

    bundle: RequestBundle
    digest: str  #: The bundle's digest.
    #: By certificate name; the next round adds missing verdicts.
    verdicts: Mapping[str, PolicyVerdict] = field(default_factory=dict)
    by: Judgement | None = None  #: The rules of the verdicts; None: it was not judged yet.


# --- in the worker ----------------------------------------------------------------------------------------------------


def read(data: bytes, by: Judgement) -> ReadBundle | BundleError:
    """The bundle with the policy's verdict on each request, or why the bytes are no bundle."""
    try:
        bundle, digest = loads_digested(data)
    except BundleError as e:
        return e
    return ReadBundle(bundle=bundle, digest=digest, verdicts=verdicts(bundle, by))


def read_all(bundles: Sequence[bytes], by: Judgement) -> list[ReadBundle | None]:
    """Several bundles by `read`, as a large policy takes longer to send than one bundle; None: bytes that are none."""
    return [found if isinstance(found := read(data, by), ReadBundle) else None for data in bundles]


def verdicts(bundle: RequestBundle, by: Judgement, *, held: bool = False) -> dict[str, PolicyVerdict]:
    """The policy's verdict on each request, by name, except those that can't be judged here; `held` as in `judge`."""
    found = {}
    for request in bundle.requests:
        with contextlib.suppress(Exception):  # the round judges it again, and reports the error
            cas = by.cas[request.authority]
            found[request.name] = judge(request, bundle, by.policy, cas, by.now, by.without_proof, held=held)
    return found


def reasons(answered: Sequence[tuple[SignRequest, Issued]], by: Mapping[str, Expectation]) -> list[str]:
    """Why each certificate is not the requested one, by the demands of its authority; empty: it is."""
    return [reason_against(request, issued, by[request.spec.authority.name]) for request, issued in answered]


def reason_against(request: SignRequest, issued: Issued, expected: Expectation) -> str:
    """
    Why a certificate is not the requested one; empty: it is.

    A certificate requested for days or hours, such as a user's, may live that short.
    """
    least = min(expected.min_validity, request.validity / _LEAST_SHARE)
    error = verify.error_of(issued, request, replace(expected, min_validity=least))
    return error.reason if error is not None else ""


def serve() -> None:
    """Run as a worker: read tasks from standard input, and write answers to standard output, until the input ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # door and desk handle Ctrl-C and the end of a unit
        signal.signal(number, signal.SIG_IGN)
    tasks, answers = Connection(os.dup(0), writable=False), Connection(os.dup(1), readable=False)
    os.dup2(2, 1)  # nothing else may write to the answers' output
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while True:
            task, arguments = tasks.recv()
            answers.send(task(*arguments))


def _certificate(der: bytes) -> x509.Certificate:
    return x509.load_der_x509_certificate(der)


def _csr(der: bytes) -> x509.CertificateSigningRequest:
    return x509.load_der_x509_csr(der)


# both sides are this program, so bytes that were checked once are only parsed
ForkingPickler.register(x509.Certificate, lambda certificate: (_certificate, (certificate.public_bytes(Encoding.DER),)))
ForkingPickler.register(x509.CertificateSigningRequest, lambda csr: (_csr, (csr.public_bytes(Encoding.DER),)))


# --- at door or desk -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Worker:
    """A worker process, and the thread that waits for it."""

    process: subprocess.Popen[bytes] = field(init=False)
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    began: float | None = None  #: When its current task began, by the monotonic clock.

    def __post_init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._is_gone, self._again = True, time.monotonic() + _REST_SECONDS
        self.process = subprocess.Popen(python_command(_SERVE), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdin is not None and self.process.stdout is not None  # noqa: S101, PT018 (for the types)
        self._tasks = Connection(os.dup(self.process.stdin.fileno()), readable=False)
        self._answers = Connection(os.dup(self.process.stdout.fileno()), writable=False)
        self.process.stdin.close()
        self.process.stdout.close()
        self._is_gone = False

    def ask(self, task: Callable[..., _Answer], arguments: tuple[object, ...]) -> _Answer | None:
        """Let the worker run a task; None: the worker has ended."""
        if self._is_gone and time.monotonic() > self._again:
            with contextlib.suppress(OSError):  # no memory, no more processes
                self._begin()
        if self._is_gone:
            return None
        self.began = time.monotonic()
        try:
            self._tasks.send((task, arguments))
            answer: _Answer = self._answers.recv()
        except (OSError, EOFError):
            self._end()
            if self._again < math.inf:
                log.warning("a worker process has ended; until another one begins, its part takes longer")
            return None
        finally:
            self.began = None
        return answer

    def _end(self) -> None:
        self._is_gone = True
        self._tasks.close()
        self._answers.close()
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self._again = math.inf
        self.process.kill()  # first, since its thread may wait for it
        self.thread.shutdown()
        self._end()


class Workers:
    """The worker processes; none at first."""

    def __init__(self) -> None:
        self._workers: list[_Worker] = []
        self._turns = count()

    def begin(self, most: int) -> None:
        """Start this many processes, or as many as there is room for."""
        with contextlib.suppress(OSError):  # no memory, no more processes: door or desk does it by itself
            for _ in range(most):
                self._workers.append(_Worker())

    def __bool__(self) -> bool:
        return bool(self._workers)

    def submit(self, task: Callable[..., _Answer], *arguments: object) -> Future[_Answer | None]:
        """Run a task in the next worker; the result is None if it can't, or there is none."""
        if not self._workers:
            nothing = Future[_Answer | None]()
            nothing.set_result(None)
            return nothing
        worker = self._workers[next(self._turns) % len(self._workers)]
        return worker.thread.submit(worker.ask, task, arguments)

    def tend(self, longest_seconds: float) -> None:
        """End workers that have spent more than this on one task; callable from any thread."""
        for worker in self._workers:
            if (began := worker.began) is not None and time.monotonic() - began > longest_seconds:
                worker.process.kill()

    def states(self) -> dict[str, int]:
        """How many processes are running, and how many have ended."""
        running = sum(worker.process.poll() is None for worker in self._workers)
        return {"running": running, "ended": len(self._workers) - running}

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.close()
        self._workers = []
