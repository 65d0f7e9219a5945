"""
Processes that do the desk's computations ahead: read a bundle, verify signatures, apply the policy, compare answers.

They exist for the row "`sign` of an inbox" of docs/evidence/numbers.md. They use no CA, file or clock: they receive
bytes, and answer with the bundle and its problems. The desk does what they have not done, so losing a worker costs
only time, and the next task starts another. A worker keeps each bundle until its answers come, so that nothing is sent
twice, and ends with the desk, even a killed one, when its standard input ends. `ProcessPoolExecutor` takes the same
processor time, but its processes import from the current directory, and a pool and a thread for each worker would
still be needed.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from functools import lru_cache
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Protocol, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from bridge.contract import Issued, SignRequest
from bridge.desk.policy import Policy, PolicyVerdict, judge
from bridge.pki import verify
from bridge.pki.bundle import BundleError, RequestBundle, sign_request
from bridge.pki.bundle_format import loads_digested
from bridge.pki.verify import Expectation
from bridge.system.console import log
from bridge.system.run_command import python_command

#: Fewer bundles are done before a worker has loaded its modules.
WORTHWHILE = 50
_MOST = 4
_LEAST_SHARE = 2  #: A certificate requested for a short time has to live for at least half of it.
#: Bundles that a worker gets at once; few at first, from which the desk learns which CAs to judge by.
CHUNK, FIRST_CHUNK = 20, 1
#: The size of a chunk's files, so that large bundles do not fill the memory; ordinary chunks stay below it.
_LARGEST_CHUNK_BYTES = 1 << 20
#: Chunks that are at the workers while the next are read.
_CHUNKS_AHEAD = 8
#: For this long after a worker's start no other replaces it: starts of a broken worker stay rare.
_REST_SECONDS = 10.0
_SERVE = "from bridge.desk.workers import serve; serve()"

_Answer = TypeVar("_Answer")


class _HasData(Protocol):
    @property
    def data(self) -> bytes:
        """The file's content."""


_File = TypeVar("_File", bound=_HasData)


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
    #: By certificate name; the desk adds missing verdicts.
    verdicts: Mapping[str, PolicyVerdict] = field(default_factory=dict)
    by: Judgement | None = None  #: The rules of the verdicts, by which a door keeps them.
    number: int = 0  #: The worker's number for the bundle.
    chunk: int | None = None  #: The chunk with which a worker got it; None: no worker has it.


# --- in the worker ----------------------------------------------------------------------------------------------------

#: Bundles that were read and will be compared, as bytes, by the desk's number: parsed, a stranger's SANs take 35 times as
#: much. The desk itself compares answers of bundles beyond this limit, about which people may decide for days, and
#: of bundles that could not be judged.
_known: dict[int, bytes] = {}
_LARGEST_KNOWN_BYTES = 32 << 20


def read(bundles: Mapping[int, bytes], by: Judgement) -> list[ReadBundle | BundleError]:
    """The bundles with the policy's verdict on each request, or why the bytes are no bundle."""
    return [_read_one(number, data, by) for number, data in bundles.items()]


def _read_one(number: int, data: bytes, by: Judgement) -> ReadBundle | BundleError:
    try:
        bundle, digest = loads_digested(data)
    except BundleError as e:
        return e
    found = verdicts(bundle, by)
    if not all(verdict.problems for verdict in found.values()):  # else it may be a stranger's
        _known[number] = bytes(ForkingPickler.dumps(bundle))
        while sum(map(len, _known.values())) > _LARGEST_KNOWN_BYTES:
            del _known[next(iter(_known))]
    return ReadBundle(bundle=bundle, digest=digest, verdicts=found)


def verdicts(bundle: RequestBundle, by: Judgement, *, held: bool = False) -> dict[str, PolicyVerdict]:
    """The policy's verdict on each request, by name, except those that can't be judged here; `held` as in `judge`."""
    found = {}
    for request in bundle.requests:
        with contextlib.suppress(Exception):  # the desk judges it again, and reports the error
            cas = by.cas[request.authority]
            found[request.name] = judge(request, bundle, by.policy, cas, by.now, by.without_proof, held=held)
    return found


def compared(
    answered: Sequence[tuple[int, Mapping[str, Issued]]], by: Mapping[str, Expectation]
) -> list[dict[str, str]]:
    """By bundle number, why certificates are not the requested ones; nothing for a bundle that is not kept here."""
    return [
        _reasons(answers, ForkingPickler.loads(kept), by) if (kept := _known.pop(number, None)) is not None else {}
        for number, answers in answered
    ]


def _reasons(answers: Mapping[str, Issued], bundle: RequestBundle, by: Mapping[str, Expectation]) -> dict[str, str]:
    requests = {request.name: request for request in bundle.requests}
    return {
        name: reason_against(issued, sign_request(requests[name], bundle), by[requests[name].authority])
        for name, issued in answers.items()
    }


def reason_against(issued: Issued, request: SignRequest, expected: Expectation) -> str:
    """
    Why a certificate is not the requested one; empty: it is.

    A certificate requested for days or hours, such as a user's, may live that short.
    """
    least = request.validity / _LEAST_SHARE
    expected = replace(expected, min_validity=min(expected.min_validity, least))
    error = verify.error_of(issued, request, expected)
    return error.reason if error is not None else ""


def serve() -> None:
    """Run as a worker: read tasks from standard input, and write answers to standard output, until the input ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the desk handles Ctrl-C and the end of a unit
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


def _in_bytes(policy: Policy) -> tuple[Callable[[bytes], Policy], tuple[bytes]]:
    """Pickle a policy once as bytes: one with an inventory of thousands of nodes takes longer than a bundle."""
    kept = vars(policy)
    if "in_bytes" not in kept:
        kept["in_bytes"] = bytes(ForkingPickler.dumps({field.name: kept[field.name] for field in fields(policy)}))
    return _policy, (kept["in_bytes"],)


@lru_cache(maxsize=1)
def _policy(in_bytes: bytes) -> Policy:
    return Policy(**ForkingPickler.loads(in_bytes))


# both sides are this program, so bytes that were checked once are only parsed
ForkingPickler.register(x509.Certificate, lambda certificate: (_certificate, (certificate.public_bytes(Encoding.DER),)))
ForkingPickler.register(Policy, _in_bytes)
ForkingPickler.register(x509.CertificateSigningRequest, lambda csr: (_csr, (csr.public_bytes(Encoding.DER),)))


# --- at the desk ------------------------------------------------------------------------------------------------------


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


def _chunks(files: Iterable[_File]) -> Iterator[list[_File]]:
    chunk: list[_File] = []
    size_bytes, enough = 0, FIRST_CHUNK
    for file in files:
        chunk.append(file)
        size_bytes += len(file.data)
        if len(chunk) >= enough or size_bytes >= _LARGEST_CHUNK_BYTES:
            yield chunk
            chunk, size_bytes, enough = [], 0, CHUNK
    if chunk:
        yield chunk


def _arrived(
    files: Sequence[_File], numbers: Iterable[int], chunk: int, answer: Future[list[ReadBundle | BundleError] | None]
) -> Iterator[tuple[_File, ReadBundle | None]]:
    for file, number, result in zip(files, numbers, answer.result() or (None for _ in files), strict=True):
        yield file, replace(result, number=number, chunk=chunk) if isinstance(result, ReadBundle) else None


class Workers:
    """One worker for each processor, or none."""

    def __init__(self, count: int | None = None) -> None:
        """`count` of processes; None: one for each processor of this machine."""
        wanted = min(_MOST, len(os.sched_getaffinity(0))) if count is None else count
        self._workers: list[_Worker] = []
        with contextlib.suppress(OSError):  # no memory, no more processes: the desk does it by itself
            for _ in range(wanted):
                self._workers.append(_Worker())

    def __bool__(self) -> bool:
        return bool(self._workers)

    def submit(self, chunk: int, task: Callable[..., _Answer], *arguments: object) -> Future[_Answer | None]:
        """Run a task in the worker that handles this chunk; the result is None if it can't."""
        worker = self._workers[chunk % len(self._workers)]
        return worker.thread.submit(worker.ask, task, arguments)

    def read_ahead(
        self, files: Iterable[_File], by: Callable[[], Judgement]
    ) -> Iterator[tuple[_File, ReadBundle | None]]:
        """Each file in order, as a worker read it ahead by the CAs of `by`; None: no worker did."""
        if not self._workers:
            yield from ((file, None) for file in files)
            return
        ahead, numbers = deque[Iterator[tuple[_File, ReadBundle | None]]](), count()
        for chunk, some in enumerate(_chunks(files)):
            bundles, judgement = {next(numbers): file.data for file in some}, by()
            ahead.append(_arrived(some, bundles, chunk, self.submit(chunk, read, bundles, judgement)))
            if len(ahead) > (_CHUNKS_AHEAD if judgement.cas else 0):
                yield from ahead.popleft()
        while ahead:
            yield from ahead.popleft()

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
