"""Random bytes, and good ones with random damage, for everything that reads what others wrote."""

from __future__ import annotations

import json
import resource
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends.cfssl import CfsslBackend
from backends.cfssl.settings import CfsslSettings
from backends.vault import VaultBackend
from backends.vault.settings import VaultAuth, VaultSettings
from bridge.contract import Backend, Issued, Secret
from bridge.errors import BackendError
from bridge.pki.certificates import pem
from bridge.settings.tables import AuditSettings
from bridge.state import Store, audit
from tests.counts import Tried
from tests.fuzz.targets import answer, asked, root, targets
from tests.kit.loopback import LoopbackServer

#: Of each target, in every run; atheris may do millions.
EXAMPLES = 300
#: What the process may grow by while a target is tried.
MOST_MEGABYTES = 100

_quickly = settings(
    max_examples=EXAMPLES,
    deadline=timedelta(minutes=3),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def spoilt(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    """A good one with up to four places changed, or anything."""

    def damage(seed: bytes, places: list[tuple[int, int, bytes]]) -> bytes:
        for place, length, piece in places:
            start = place % (len(seed) + 1)
            seed = seed[:start] + piece + seed[start + length :]
        return seed

    piece = st.binary(max_size=6) | st.sampled_from(
        [b"\n", b"\t", b"'", b'"', b"{", b"[", b": ", b"&a ", b"*a", b"---\n"]
    )
    place = st.tuples(st.integers(0, 1 << 14), st.integers(0, 20), piece)
    return st.builds(damage, st.sampled_from(seeds), st.lists(place, min_size=1, max_size=4)) | st.binary(max_size=400)


@pytest.mark.parametrize("name", targets())
def test_any_bytes_are_read_or_refused(name: str, tried: Tried) -> None:
    """No other exception, no hang, bounded memory; the good ones pass."""
    target = targets()[name]
    for seed in target.seeds:
        target.holds(seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @_quickly
    @given(spoilt(list(target.seeds)))
    def holds(data: bytes) -> None:
        target.holds(data)

    holds()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MOST_MEGABYTES
    tried("spoilt files and answers for what reads them", EXAMPLES)


# --- answers over HTTP ------------------------------------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, body = self.server.answer  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def server() -> Iterator[LoopbackServer]:
    """Answers whatever its `answer` is."""
    server = LoopbackServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def vault(url: str, secret: Secret) -> Backend:
    auth = VaultAuth(method="token", token=secret)
    return VaultBackend.from_settings(VaultSettings(url=url, auth=auth, timeout=timedelta(minutes=1)))


def cfssl(url: str, secret: Secret) -> Backend:
    return CfsslBackend.from_settings(CfsslSettings(url=url, auth_key=secret, timeout=timedelta(minutes=1)))


LEAF = pem(answer()).decode()
VAULT = json.dumps({"data": {"certificate": LEAF, "ca_chain": [pem(root().certificate).decode()], "issuing_ca": LEAF}})
CFSSL = json.dumps({"success": True, "result": {"certificate": LEAF, "usages": []}, "errors": [], "messages": []})
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(LEAF),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["data", "certificate", "ca_chain", "errors", "success", "result", "message", "code"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@pytest.mark.parametrize(("make", "good"), [(vault, VAULT), (cfssl, CFSSL)], ids=["vault", "cfssl"])
def test_any_answer_of_a_server_is_a_certificate_or_our_error(
    make: Callable[[str, Secret], Backend], good: str, server: LoopbackServer, tmp_path: Path, tried: Tried
) -> None:
    """Any status and any body give a certificate or an error of ours; the good answer is a certificate."""
    (tmp_path / "secret").write_text("ab" * 32)
    backend = make(f"http://127.0.0.1:{server.server_port}", Secret("file", str(tmp_path / "secret")))
    server.answer = (200, good.encode())  # type: ignore[attr-defined]
    found = backend.sign(asked())
    assert isinstance(found, Issued)
    assert found.leaf == answer()

    @_quickly
    @given(
        st.sampled_from([200, 200, 200, 400, 403, 404, 429, 500, 503]),
        spoilt([good.encode()]) | json_values.map(lambda value: json.dumps(value).encode()),
    )
    def holds(status: int, body: bytes) -> None:
        server.answer = (status, body)  # type: ignore[attr-defined]
        try:
            issued = backend.sign(asked())
        except BackendError as e:
            assert len(str(e)) < 1000
        else:
            assert status == 200
            assert isinstance(issued, Issued)

    holds()
    tried("spoilt answers of a server over HTTP", EXAMPLES)


# --- our own files, changed by others ---------------------------------------------------------------------------------


def test_any_bytes_in_the_record_are_reported(tmp_path: Path, tried: Tried) -> None:
    """The walk ends, whatever is there; only the bytes that were written pass."""
    store = Store(tmp_path / "state")
    store.prepare()
    with audit.Record(store, AuditSettings()) as record:
        for event in (audit.ASKED, audit.ISSUED, audit.VERIFIED):
            record.add(event, "apiserver")
    good = store.audit.read_bytes()

    @_quickly
    @given(spoilt([good]))
    def holds(data: bytes) -> None:
        store.audit.write_bytes(data)
        _, damages = audit.verify(store)
        assert (damages == []) == (data == good)
        for _ in audit.events(store, None, None):
            pass

    holds()
    tried("spoilt files and answers for what reads them", EXAMPLES)
