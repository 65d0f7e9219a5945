"""
New keys that are made before anybody asks for them, in threads, from the moment it is known that they will be needed.

Making them takes as long as all the rest of a renewal, and needs nothing else of it. They are in memory alone.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict, deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from bridge.pki import csr
from bridge.pki.csr import PrivateKey
from bridge.specs import KeyAlgorithm

_lock = threading.Lock()
_begun: defaultdict[KeyAlgorithm, deque[Future[PrivateKey]]] = defaultdict(deque)


def begin(algorithms: Iterable[KeyAlgorithm]) -> None:
    """Begin to make one key for each; a process that ends does not wait for them."""
    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    with _lock:
        for algorithm in algorithms:
            _begun[algorithm].append(pool.submit(csr.generate_key, algorithm))
    pool.shutdown(wait=False)


def take(algorithm: KeyAlgorithm) -> PrivateKey:
    """A new key that nobody else gets: one that was begun, or else one made now."""
    with _lock:
        begun = _begun[algorithm].popleft() if _begun[algorithm] else None
    return begun.result() if begun is not None else csr.generate_key(algorithm)
