"""Makes new keys in memory while a run does other work; the time of `renew` in docs/evidence/numbers.md needs it."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections import defaultdict, deque
from collections.abc import Iterable
from concurrent.futures import Future

from bridge.pki import csr
from bridge.pki.csr import PrivateKey
from bridge.specs import KeyAlgorithm

_lock = threading.Lock()
_begun: defaultdict[KeyAlgorithm, deque[Future[PrivateKey]]] = defaultdict(deque)
_to_make: queue.SimpleQueue[tuple[KeyAlgorithm, Future[PrivateKey]]] = queue.SimpleQueue()


def begin(algorithms: Iterable[KeyAlgorithm]) -> None:
    """Start making one key for each algorithm, on all cores but one, which the rest of the run needs."""
    for algorithm in algorithms:
        future: Future[PrivateKey] = Future()
        with _lock:
            _begun[algorithm].append(future)
        _to_make.put((algorithm, future))
    for _ in range(max(1, (os.cpu_count() or 1) - 1)):
        _start()


def use_last_core() -> None:
    """Use the last core: the run has nothing else to do until the keys are made."""
    if not _to_make.empty():
        _start()


def _start() -> None:
    threading.Thread(target=_make_all, daemon=True).start()  # the process does not wait for them when it ends


def _make_all() -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            algorithm, future = _to_make.get_nowait()
            try:
                future.set_result(csr.generate_key(algorithm))
            except BaseException as e:  # noqa: BLE001 (the caller of `take` gets it)
                future.set_exception(e)


def take(algorithm: KeyAlgorithm) -> PrivateKey:
    """Return a new key for this caller alone: one begun before, or else one made now."""
    with _lock:
        begun = _begun[algorithm].popleft() if _begun[algorithm] else None
    return begun.result() if begun is not None else csr.generate_key(algorithm)
