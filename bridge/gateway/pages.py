"""The gateway's pages, open to every client: `/metrics` (names as in docs/gateway.md), `/healthz` and `/readyz`."""

from __future__ import annotations

import contextlib
import io
import threading
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate
from socket import AF_INET, AF_INET6, SHUT_RDWR
from typing import Any

from bridge.errors import BridgeError
from bridge.system.files import reasons
from bridge.system.metrics import Page, labels, metric
from bridge.system.waiting import CachedResult, remember

PREFIX = "ca_bridge_gateway"
_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)
#: The most certificates whose end is a metric.
_MOST_ENDS = 10_000

OUTCOMES = (
    *("signed", "denied", "failed", "left", "pending", "ca-refused", "ca-unavailable", "bad-answer", "conflict"),
    "too-large",
)


class Metrics:
    """The gateway's counters and gauges; any thread may use them."""

    def __init__(self, signers: tuple[str, ...]) -> None:
        self._mutex = threading.Lock()
        self._requests = Counter({(signer, outcome): 0 for signer in signers for outcome in OUTCOMES})
        #: The count of each bucket, then of the bucket without a limit, and the sum of all seconds.
        self._seconds: dict[str, list[float]] = {signer: [0.0] * (len(_BUCKETS) + 2) for signer in signers}
        self._successes: dict[str, float] = {}
        self._ends: OrderedDict[tuple[str, str], float] = OrderedDict()
        self.gauges: dict[tuple[str, str], float] = {}

    def count(self, signer: str, outcome: str, times: int = 1) -> None:
        """Count a request with this outcome."""
        with self._mutex:
            self._requests[signer, outcome] += times

    def signed(self, signer: str, name: str, end: datetime, seconds: float, now: datetime) -> None:
        """Count a certificate that was written."""
        with self._mutex:
            self._requests[signer, "signed"] += 1
            row = self._seconds[signer]
            row[bisect_left(_BUCKETS, seconds)] += 1
            row[-1] += seconds
            self._successes[signer] = now.timestamp()
        self.saw(signer, name, end)

    def saw(self, signer: str, name: str, end: datetime) -> None:
        """Note the end of a certificate."""
        with self._mutex:
            key = (signer, name)
            remember(self._ends, key, max(self._ends.get(key, 0.0), end.timestamp()), _MOST_ENDS)

    def text(self) -> str:
        """Return all metrics as text."""
        with self._mutex:
            return "".join(self._metrics())

    def _metrics(self) -> Iterator[str]:
        counts = self._requests.items()
        requests = ((labels(signer=signer, outcome=outcome), count) for (signer, outcome), count in counts)
        yield _metric("requests_total", "Requests by what became of them.", requests, "counter")
        histogram = (line for signer, row in sorted(self._seconds.items()) for line in _histogram(signer, row))
        text = "From the arrival of a request to its certificate."
        yield metric(f"{PREFIX}_sign_seconds", text, histogram, "histogram")
        successes = ((labels(signer=signer), f"{moment:.3f}") for signer, moment in self._successes.items())
        yield _metric("last_success_timestamp_seconds", "When a certificate was last written.", successes)
        ends = ((labels(signer=signer, name=name), f"{end:.0f}") for (signer, name), end in self._ends.items())
        yield _metric("certificate_end_timestamp_seconds", "When the newest certificate ends.", ends)
        for gauge, text in _GAUGES.items():
            values = ((rest, f"{value:g}") for (name, rest), value in self.gauges.items() if name == gauge)
            yield _metric(gauge, text, values)


_GAUGES = {
    "queue": "Requests that are waiting, being worked at, or at a CA that answers later.",
    "queue_overflowed": "Whether requests wait at the API server, since the queue was full.",
    "watch_complete": "Whether the watch has read all requests that existed when its round began.",
    "leader": "Whether this replica works.",
    "api_up": "Whether the watch is alive.",
    "roots_published": "Whether the ClusterTrustBundle of the pods' signer has the roots of pods.crt.",
    "inventory_good": "Whether the inventory and the policy were read when they last changed.",
}


def _metric(name: str, text: str, samples: Iterable[tuple[str, object]], kind: str = "gauge") -> str:
    return metric(f"{PREFIX}_{name}", text, sorted(samples), kind)


def _histogram(signer: str, row: Sequence[float]) -> Iterator[tuple[str, str]]:
    counts = list(accumulate(row[:-1]))
    for limit, count_below in zip((*map(str, _BUCKETS), "+Inf"), counts, strict=True):
        yield f"_bucket{labels(signer=signer, le=limit)}", f"{count_below:.0f}"
    yield f"_count{labels(signer=signer)}", f"{counts[-1]:.0f}"
    yield f"_sum{labels(signer=signer)}", f"{row[-1]:.6f}"


#: The most connections, so that clients can't use up the threads; a further one closes the oldest, so that clients that
#: hold theirs open can't lock out the kubelet's probes, which would then kill the gateway.
_MOST_CONNECTIONS = 16
_SECONDS = 5
#: The library accepts 6 MB a connection, and needs 50 MB of memory to parse them.
_LONGEST_HEAD_BYTES = 8 << 10


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # with socketserver's 5, a small burst would wait for TCP to retry
    pages: Mapping[str, Page]

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._open: dict[Any, None] = {}  #: Sockets, the oldest first.
        self._mutex = threading.Lock()
        self.address_family = AF_INET6 if ":" in address[0] else AF_INET
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._mutex:
            if len(self._open) >= _MOST_CONNECTIONS:
                oldest = next(iter(self._open))
                del self._open[oldest]
                with contextlib.suppress(OSError):
                    oldest.shutdown(SHUT_RDWR)  # which wakes its thread, and the thread closes it
            self._open[request] = None
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._mutex:
                self._open.pop(request, None)

    def handle_error(self, *_: object) -> None:
        """Log nothing about a client that went away."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "ca-bridge", ""
    timeout = _SECONDS

    def setup(self) -> None:
        super().setup()
        head = bytearray()
        while (line := self.rfile.readline(_LONGEST_HEAD_BYTES - len(head))).strip():
            head += line
        self.rfile = io.BytesIO(head)  # we read only the first line of the head

    def do_GET(self) -> None:
        page = self.server.pages.get(self.path.partition("?")[0])
        status, text = page() if page is not None else (HTTPStatus.NOT_FOUND, "there is /metrics, /healthz, /readyz\n")
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing: probes come every few seconds."""


@contextlib.contextmanager
def serving(address: tuple[str, int], pages: dict[str, Page]) -> Iterator[int]:
    """Serve the pages while the block runs, and yield the port, which the system chooses if it is 0."""
    failed = f"gateway.listen: can't listen at {address[0]}:{address[1]}"
    with reasons(BridgeError, failed, hint="another port, or serve_status = false"):
        server = _Server(address, _Handler)
    server.pages = {path: CachedResult(page) for path, page in pages.items()}
    thread = threading.Thread(target=server.serve_forever, args=(0.2,), name="status", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
