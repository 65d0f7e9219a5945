"""
Processes that do the desk's arithmetic ahead: read a bundle, verify its signatures, apply the policy, compare.

They exist for the row "`sign` of an inbox" of docs/evidence/numbers.md. They touch no CA, file or clock: they get
bytes, and answer with the bundle and its problems. The desk does itself what they did not do, so that losing one costs
only time, and the next task begins another. A worker keeps each bundle until its answers come, so that nothing is sent
twice, and ends with the desk, even a killed one, when its standard input ends. `ProcessPoolExecutor` costs the
same processor time; but its processes import from the current directory, and a pool for each worker and a thread in it
would have to do the rest.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import field, fields, replace
from datetime import datetime
from functools import lru_cache
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Protocol, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from bridge import dataclass
from bridge.contract import Issued, SignRequest
from bridge.desk.policy import Policy, PolicyVerdict, judge
from bridge.pki import verify
from bridge.pki.bundle import BundleError, RequestBundle, sign_request
from bridge.pki.bundle_format import loads_digested
from bridge.pki.verify import Expectation
from bridge.system.console import log
from bridge.system.run_command import python_command

#: Fewer bundles are done before a worker has loaded what it needs.
WORTHWHILE = 50
_MOST = 4
_LEAST_SHARE = 2  #: A certificate that was asked for a short time lives for half of it at least.
#: Bundles that a worker gets at once; the first time few, which tell the desk what CAs there are to judge by.
CHUNK, FIRST_CHUNK = 20, 1
#: The size of a chunk's files, so that large bundles do not fill the memory; honest ones stay below it.
_LARGEST_CHUNK_BYTES = 1 << 20
#: Bundles are many objects with no cycle: looking for some as often as usual takes a fifth of a worker's time.
GARBAGE = 100_000
#: Lots of bundles that are at the workers while the next are read.
_CHUNKS_AHEAD = 8
#: After the start of a worker no other takes its place for so long: one that can't work costs a start now and then.
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
    """The rules that requests are judged by."""

    policy: Policy
    cas: Mapping[str, tuple[x509.Certificate, ...]]  #: By authority.
    now: datetime
    without_proof: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadBundle:
    """A request bundle that was read, and judged as far as there are verdicts."""

    bundle: RequestBundle
    digest: str  #: The bundle's.
    #: By certificate name; the desk gives those that are missing.
    verdicts: Mapping[str, PolicyVerdict] = field(default_factory=dict)
    by: Judgement | None = None  #: A door keeps by what the verdicts are.
    number: int = 0  #: A worker knows the bundle by it.
    chunk: int | None = None  #: With which it was at the worker; None: no worker has it.


# --- in the worker ----------------------------------------------------------------------------------------------------

#: Bundles that were read and will be compared, as bytes, by the desk's number: what was read of a stranger's SANs takes 35
#: times as much. Of those beyond this limit, which people may decide about in days, and of those that could not be
#: judged, the desk compares the answers by itself.
_known: dict[int, bytes] = {}
_LARGEST_KNOWN_BYTES = 32 << 20


def read(bundles: Mapping[int, bytes], by: Judgement) -> list[ReadBundle | BundleError]:
    """These bundles with the policy's verdict on each request, or why the bytes are no bundle."""
    return [_read_one(number, data, by) for number, data in bundles.items()]


def _read_one(number: int, data: bytes, by: Judgement) -> ReadBundle | BundleError:
    try:
        bundle, digest = loads_digested(data)
    except BundleError as e:
        return e
    found = verdicts(bundle, by)
    if not all(one.problems for one in found.values()):  # else it may be a stranger's
        _known[number] = bytes(ForkingPickler.dumps(bundle))
        while sum(map(len, _known.values())) > _LARGEST_KNOWN_BYTES:
            del _known[next(iter(_known))]
    return ReadBundle(bundle=bundle, digest=digest, verdicts=found)


def verdicts(bundle: RequestBundle, by: Judgement, *, held: bool = False) -> dict[str, PolicyVerdict]:
    """The policy's verdict on each request, by name, without those that can't be judged here; `held` as in `judge`."""
    found = {}
    for request in bundle.requests:
        with contextlib.suppress(Exception):  # the desk judges it by itself, and tells what is wrong
            cas = by.cas[request.authority]
            found[request.name] = judge(request, bundle, by.policy, cas, by.now, by.without_proof, held=held)
    return found


def compared(
    answered: Sequence[tuple[int, Mapping[str, Issued]]], by: Mapping[str, Expectation]
) -> list[dict[str, str]]:
    """Why each certificate of these bundles, by number, is not what was asked for; nothing about a bundle that is not here."""
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
    Why a certificate is not what was asked for; empty: it is.

    One that was asked for a few days or hours, as a user's, may live that short.
    """
    least = request.validity / _LEAST_SHARE
    expected = replace(expected, min_validity=min(expected.min_validity, least))
    error = verify.error_of(issued, request, expected)
    return error.reason if error is not None else ""


def serve() -> None:
    """Be a worker: tasks come in on standard input, answers go out on standard output, until there are no more."""
    for one in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C, and the end of a unit, are the desk's to answer
        signal.signal(one, signal.SIG_IGN)
    gc.freeze()
    gc.set_threshold(GARBAGE)
    tasks, answers = Connection(os.dup(0), writable=False), Connection(os.dup(1), readable=False)
    os.dup2(2, 1)  # nothing else writes where the answers go
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while True:
            task, arguments = tasks.recv()
            answers.send(task(*arguments))


def _certificate(der: bytes) -> x509.Certificate:
    return x509.load_der_x509_certificate(der)


def _csr(der: bytes) -> x509.CertificateSigningRequest:
    return x509.load_der_x509_csr(der)


def _in_bytes(policy: Policy) -> tuple[Callable[[bytes], Policy], tuple[bytes]]:
    """With an inventory of thousands of nodes it takes longer than a bundle: it is made into bytes once, and read once."""
    kept = vars(policy)
    if "in_bytes" not in kept:
        kept["in_bytes"] = bytes(ForkingPickler.dumps({one.name: kept[one.name] for one in fields(policy)}))
    return _policy, (kept["in_bytes"],)


@lru_cache(maxsize=1)
def _policy(in_bytes: bytes) -> Policy:
    return Policy(**ForkingPickler.loads(in_bytes))


# both sides are this program, so that bytes which were checked once are only parsed
ForkingPickler.register(x509.Certificate, lambda one: (_certificate, (one.public_bytes(Encoding.DER),)))
ForkingPickler.register(Policy, _in_bytes)
ForkingPickler.register(x509.CertificateSigningRequest, lambda one: (_csr, (one.public_bytes(Encoding.DER),)))


# --- at the desk ------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Worker:
    """One process, and the thread that waits for it."""

    process: subprocess.Popen[bytes] = field(init=False)
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    began: float | None = None  #: When its task of now began, by the monotonic clock.

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
        """Have the worker answer a question; None: the worker is no more."""
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
        self.process.kill()  # first: its thread may wait for it
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
    for file, number, one in zip(files, numbers, answer.result() or (None for _ in files), strict=True):
        yield file, replace(one, number=number, chunk=chunk) if isinstance(one, ReadBundle) else None


class Workers:
    """One worker for each processor, or none."""

    def __init__(self, count: int | None = None) -> None:
        """`count` of processes; None: as many as this machine has processors for."""
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

    def read_ahead(
        self, files: Iterable[_File], by: Callable[[], Judgement]
    ) -> Iterator[tuple[_File, ReadBundle | None]]:
        """Each file in its order, as a worker read it ahead by the CAs of `by`; None: no worker did."""
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
        """End workers that are at one task for longer; from any thread."""
        for worker in self._workers:
            if (began := worker.began) is not None and time.monotonic() - began > longest_seconds:
                worker.process.kill()

    def states(self) -> dict[str, int]:
        """How many processes are there, and how many have ended."""
        running = sum(worker.process.poll() is None for worker in self._workers)
        return {"running": running, "ended": len(self._workers) - running}

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.close()
        self._workers = []
