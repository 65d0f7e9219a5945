"""Clients of the CA that goes are found in what API servers write; a hostile line is no client, and costs little."""

from __future__ import annotations

import gzip
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from bridge.cli.options import utc_now
from bridge.cluster import ANONYMOUS, of_gateway
from bridge.cluster.api import Api
from bridge.contract import SignRequest
from bridge.node import inventory
from bridge.node.endpoints import Server
from bridge.pki.certificates import fingerprint, load_pem_certificates, pem
from bridge.rotation import Change, old_ca_clients
from bridge.rotation.old_ca_clients import (
    Counters,
    UncountedError,
    UnreadableLogError,
    Users,
    counters,
    refusals,
    requests,
    users,
)
from bridge.specs import USER
from bridge.state import Store
from tests.kit import kube_api
from tests.kit.issuing import NOW, Signer, cn
from tests.kit.pki import handmade_pki

OLD, NEW = "a" * 64, "b" * 64
ID = "authentication.kubernetes.io/credential-id"


def event(digest: str = OLD, name: str = "jane", time: str = "2026-11-28T12:00:00.000000Z", **more: Any) -> str:
    """As an API server at the level Metadata writes it."""
    user = {"username": name, "groups": ["dev", "system:authenticated"], "extra": {ID: [f"X509SHA256={digest}"]}}
    whole = {
        "kind": "Event",
        "apiVersion": "audit.k8s.io/v1",
        "stage": "ResponseComplete",
        "user": user,
        "sourceIPs": ["192.0.2.7"],
    }
    event = {**whole, "userAgent": "kubectl/v1.37.2", "stageTimestamp": time, **more}
    return json.dumps(event, separators=(",", ":"))


def log(directory: Path, *lines: str) -> Path:
    path = directory / "audit.log"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_a_certificate_that_is_not_known_is_named_with_its_last_request(tmp_path: Path) -> None:
    """One user a certificate, by the newest event; a known certificate, a token and an anonymous user are none."""
    later = event(time="2026-11-28T13:00:00.000000Z", sourceIPs=["192.0.2.8", "10.0.0.1"])
    token = event(user={"username": "sa", "extra": {ID: ["JTI=7d"]}})
    path = log(
        tmp_path, event(), later, event(), event(NEW, "new"), token, event(user={"username": "system:anonymous"})
    )
    [found] = users([path], {NEW}).users
    assert (found.sha256, found.name, found.groups) == (OLD, "jane", ("dev", "system:authenticated"))
    assert str(found) == (
        "jane (dev, system:authenticated), certificate aaaaaaaa, last at 2026-11-28T13:00:00.000000Z from 192.0.2.8, "
        "10.0.0.1 by kubectl/v1.37.2"
    )
    noon, last = "2026-11-28T12:00:00.000000Z", "2026-11-28T13:00:00.000000Z"
    assert users([path], {NEW, OLD}) == Users([], 0, 6, noon, last)
    assert users([path], {NEW, OLD}).read == f"6 events from {noon} to {last}"
    assert [user.name for user in users([path, path], {OLD}).users] == ["new"]


def leaf_of(ca: Signer) -> x509.Certificate:
    """A client's."""
    builder = x509.CertificateBuilder().subject_name(cn("jane")).issuer_name(ca.certificate.subject)
    builder = builder.public_key(ca.key.public_key()).serial_number(7)
    builder = builder.not_valid_before(NOW - timedelta(days=1)).not_valid_after(NOW + timedelta(days=1))
    return builder.sign(ca.key, hashes.SHA256())


@pytest.mark.parametrize(
    "line",
    [
        "X509SHA256=",
        f"X509SHA256={OLD}",
        event(OLD[:-1]),
        event(user=[OLD]),
        event(user={"username": "x", "extra": {ID: f"X509SHA256={OLD}"}}),
        event(user={"username": "x", "extra": [f"X509SHA256={OLD}"]}),
        f'{{"user": "X509SHA256={OLD}"',
        "[" * 100_000 + f"X509SHA256={OLD}",
        f'"X509SHA256={OLD}"' + "," * 200_000,
        f'{{"x": 1{"0" * 10_000}, "X509SHA256=": 1}}',
    ],
)
def test_a_line_of_another_shape_is_no_client(tmp_path: Path, line: str) -> None:
    """The next line counts; a line that is no JSON is counted, since a client may be in it."""
    found = users([log(tmp_path, line, event())], set())
    assert [user.name for user in found.users] == ["jane"]
    assert found.unread == (not line.startswith('{"kind"'))


@pytest.mark.attack
@pytest.mark.parametrize(
    "content",
    [
        event().encode("utf-16"),
        bytes(range(256)) * 20,
        json.dumps({"log": event()}).encode(),
        f'{{"log": {event()}}}'.encode(),
        gzip.compress(b"no event\n"),
        b"",
    ],
    ids=["utf-16", "noise", "shipped as text", "shipped as an object", "gzip", "empty"],  # a gzip head holds the time
)
def test_a_log_without_events_is_no_proof_that_the_old_ca_has_no_clients(tmp_path: Path, content: bytes) -> None:
    """Another encoding, noise, a log shipper's lines and an empty file are errors, also beside a good log."""
    good, bad = log(tmp_path, event()), tmp_path / "other.log"
    bad.write_bytes(content)
    for paths in ([bad], [good, bad]):
        with pytest.raises(UnreadableLogError, match=r"other\.log: wanted an audit log, found no line"):
            users(paths, {OLD})
    with pytest.raises(UnreadableLogError, match=r"other\.log: wanted an API server's log, found no line"):
        refusals([bad])


@pytest.mark.attack("E2")
def test_compressed_logs_are_read_and_a_cut_one_is_an_error(tmp_path: Path) -> None:
    """As kube-apiserver's `--audit-log-compress` writes them; lines that are no events are counted."""
    line = next(iter(REFUSED))
    for name, text in (("audit.log.gz", f"{event()}\nno event\n"), ("server.log.gz", f"{line}\n")):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    audit = users([tmp_path / "audit.log.gz"], set())
    assert ([user.name for user in audit.users], audit.unread, audit.events) == (["jane"], 1, 1)
    assert [refusal.count for refusal in refusals([tmp_path / "server.log.gz"])] == [1]
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress(f"{event()}\n".encode() * 1000)[:-20])
    with pytest.raises(UnreadableLogError, match="wanted a whole gzip file"):
        users([cut], {OLD})


def test_words_of_others_steer_no_terminal_and_fill_no_memory(tmp_path: Path) -> None:
    """A user's agent is the client's own word; a line without end is left out, and the next one is read."""
    odd = event(name="a\x1b[2Jb\nc", userAgent="x" * 100_000, sourceIPs=["192.0.2.7"] * 1000)
    endless = event().replace("jane", "j" * (5 << 20))
    all_of_it = users([log(tmp_path, odd, endless, event(NEW, "last"))], set())
    found = {user.name: user for user in all_of_it.users}
    assert (len(found), all_of_it.unread) == (2, 1)
    assert all(name.isprintable() for name in found)
    assert all(len(str(user)) < 1000 for user in found.values())
    assert "last" in found


def test_a_log_that_is_none_is_named(tmp_path: Path) -> None:
    """A missing file, a pipe without a writer and a directory are named."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "none", tmp_path / "pipe", tmp_path):
        with pytest.raises(UnreadableLogError, match="wanted a log"):
            users([path], set())
        with pytest.raises(UnreadableLogError, match="wanted a log"):
            refusals([path])


def test_certificates_of_the_new_ca_are_known_by_the_node_and_by_the_operator(tmp_path: Path) -> None:
    """Leaves of this node, and those in a directory of the CA, show the new CA's certificates; the old CA's there do not count."""
    pki = handmade_pki(tmp_path / "node")
    old, new = Signer.load(*pki.ca_pem("ca")), Signer.make("kubernetes-2")
    node, store = inventory.read(pki.pki_dir, pki.kubeconfig_dir), Store(tmp_path / "state")
    issued = tmp_path / "newcerts"
    issued.mkdir()
    leaf = leaf_of(new)
    (issued / "01.pem").write_bytes(pem(leaf))
    (issued / "02.pem").write_bytes(pem(Signer.make("other").certificate))
    (issued / "index.txt").write_bytes(b"\xff no certificate")
    change = Change(old.certificate, new.certificate)
    assert old_ca_clients.known(node, store, change, [issued]) == {fingerprint(leaf)}
    assert old_ca_clients.known(node, store, change, [issued / "01.pem"]) == {fingerprint(leaf)}
    assert old_ca_clients.known(node, store, change, []) == set()
    apiserver = next(item for item in node.items if item.spec.name == "apiserver").certificates[0]
    assert fingerprint(apiserver) in old_ca_clients.known(node, store, Change(new.certificate, old.certificate), [])
    with pytest.raises(UnreadableLogError, match="can't read its certificates"):
        old_ca_clients.known(node, store, change, [tmp_path / "none"])


REFUSED: Mapping[str, str] = {
    "2026-11-28T12:00:00Z stderr F I1128 12:00:00.0 1 log.go:245] http: TLS handshake error from 192.0.2.9:44321: "
    "remote error: tls: bad certificate": "a client at 192.0.2.9 does not trust the API server's certificate",
    "I1128 12:00:00.0 1 log.go:245] http: TLS handshake error from [2001:db8::7]:1234: remote error: tls: unknown certificate authority": (
        "a client at [2001:db8::7] does not trust the API server's certificate"
    ),
    'E1128 authentication.go:75] "Unable to authenticate the request" err="[invalid bearer token, verifying certificate '
    "SN=4763, SKID=, AKID=38:3B:0A failed: x509: certificate signed by unknown authority]"
    '"': "serial number 129B, of the CA with the key identifier 38:3B:0A, is of no CA that the API server trusts",
}


@pytest.mark.parametrize(("line", "words"), REFUSED.items())
def test_refusals_are_read_off_the_servers_log(tmp_path: Path, line: str, words: str) -> None:
    """The log of kube-apiserver 1.37 names refused clients by address and by certificate."""
    [found] = refusals([log(tmp_path, line, "http: TLS handshake error from 192.0.2.1:5: EOF", line)])
    assert words in found.who
    assert found.count == 2


# --- requests by the ends of their certificates -----------------------------------------------------------------------


@pytest.mark.kube("kube-apiserver", "etcd")
def test_requests_are_counted_by_the_ends_of_their_certificates(tmp_path: Path) -> None:
    """A real API server: a certificate that ends when none of the new CA's does is seen; one that does hides it, and says so."""
    with kube_api.serving(tmp_path / "api") as server:
        found = of_gateway(server.kubeconfig("metrics", "system:masters"))
        api = Api(found.clients, found.servers)
        pair, _ = server.pair("jane", "dev")
        [jane] = load_pem_certificates(pair.read_bytes())
        before = utc_now(), counters(api)
        for _ in range(5):
            assert server.client("jane", "dev").ask("GET", "/version").status == 200
        after = utc_now(), counters(api)
        long = leaf(Signer.make("kubernetes-2"), days=200)
        for known, is_like_new in ((long, False), (jane, True)):
            seen = requests("cp-1", before, after, [known])
            assert [one.is_like_new for one in seen] == [is_like_new], seen
            assert (seen[0].more_than, seen[0].at_most) == (timedelta(hours=12), timedelta(days=1))
            assert seen[0].count >= 5
        with pytest.raises(ValueError, match="cp-1: wanted one API server that counts, found that it was started anew"):
            requests("cp-1", after, before, [long])
        api.close()


_BUCKET = "apiserver_client_certificate_expiration_seconds_bucket"


@pytest.mark.attack("E8")
@pytest.mark.parametrize(
    "page",
    [
        "",
        "<html>sign in</html>\n",
        f'{_BUCKET}{{zone="a",le="0"}} 0\n{_BUCKET}{{zone="a",le="+Inf"}} 7\n',
        f'{_BUCKET}{{le="0"}} 0\n{_BUCKET}{{le="1800"}} 3\n',
    ],
)
def test_a_server_without_the_metric_is_not_counted(page: str) -> None:
    """A switched-off metric, a load balancer's page, a further label and a page without its end are no count of zero."""
    whole = f'{_BUCKET}{{le="0"}} 0\n{_BUCKET}{{le="+Inf"}} 7\n'
    with metrics(whole) as api:
        assert counters(api) == Counters({0.0: 0.0, math.inf: 7.0}, 0.0)
    with metrics(page) as api, pytest.raises(UncountedError, match="found none"):
        counters(api)


@contextmanager
def metrics(page: str) -> Iterator[Api]:
    """An API server whose metrics are this page."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/metrics"
            self.send_response(200)
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        api = Api([ANONYMOUS], [Server(f"http://127.0.0.1:{server.server_port}")])
        try:
            yield api
        finally:
            api.close()
            server.shutdown()
            thread.join()


def leaf(ca: Signer, *, days: int) -> x509.Certificate:
    """A client's, which ends after so many days from now."""
    csr = x509.CertificateSigningRequestBuilder().subject_name(cn("x")).sign(ca.key, hashes.SHA256())
    request = SignRequest(spec=USER, csr_pem=csr.public_bytes(Encoding.PEM), validity=timedelta(days=days))
    return ca.issue(request, begin=utc_now() - timedelta(minutes=5), end=utc_now() + timedelta(days=days)).leaf


def test_a_range_of_ends_is_shown_in_words() -> None:
    """Those that have ended are a range of their own, and so are those that end last."""
    counted = Counters({0.0: 1.0, 1800.0: 3.0, math.inf: 7.0}, failed=2.0)
    nothing = Counters({0.0: 0.0, 1800.0: 0.0, math.inf: 0.0}, failed=0.0)
    found = requests("cp-1", (NOW, nothing), (NOW, counted), [])
    whose = "no certificate that is known to be of the new CA does"
    assert [str(one) for one in found] == [
        f"cp-1: 1 requests with a client certificate that ends already: {whose}",
        f"cp-1: 2 requests with a client certificate that ends in at most 30m: {whose}",
        f"cp-1: 4 requests with a client certificate that ends in more than 30m: {whose}",
    ]
