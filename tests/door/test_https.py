"""Certificates that clients show to the door: what TLS lets in, and for what an anchor counts."""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509

from bridge.door.https import PEER, Https, serving
from bridge.errors import Exit
from bridge.pki.certificates import pem
from bridge.pki.verify import client_problem
from bridge.settings.tables import ServeSettings
from tests.kit.desks import make_desk
from tests.kit.est import Tls, make_tls
from tests.kit.issuing import SERVER, Signer
from tests.kit.pki import handmade_pki
from tests.kit.serving import add_door, running

_LONG_AGO = datetime.now(UTC) - timedelta(days=1)


def make_signer(name: str, parent: Signer | None = None) -> Signer:
    """A CA of now."""
    return Signer.make(name, parent=parent, begin=_LONG_AGO, end=_LONG_AGO + timedelta(days=3))


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return make_tls(tmp_path_factory.mktemp("tls"))


def settings(tls: Tls) -> ServeSettings:
    """With time for a slow machine."""
    patience = timedelta(minutes=10)
    return ServeSettings(listen="127.0.0.1:0", certificate=tls.server_cert, key=tls.server_key, exchange_for=patience)


@pytest.fixture(scope="module")
def signers() -> Mapping[str, Signer]:
    root = make_signer("company")
    return {"people": make_signer("people", root), "nodes": make_signer("nodes"), "other": make_signer("other")}


@pytest.fixture(scope="module")
def server(tls: Tls, signers: Mapping[str, Signer]) -> Iterator[Https]:
    """A server that trusts two CAs, and whose answer says for which of them the client's certificate counts."""

    def application(environ: Mapping[str, Any], start: Callable[..., Any]) -> list[bytes]:
        shown = environ.get(PEER)
        counts = ["none"] if shown is None else []
        for purpose in ("people", "nodes"):
            if shown is not None:
                leaf, anchors = x509.load_der_x509_certificate(shown), [signers[purpose].certificate]
                counts += [purpose] if not client_problem(leaf, anchors, datetime.now(UTC)) else []
        start("200 OK", [("Content-Type", "text/plain")])
        return [" ".join(counts).encode()]

    anchors = [signers[purpose].certificate for purpose in ("people", "nodes")]
    with serving(settings(tls), application, lambda: anchors) as https:
        yield https


def ask(tls: Tls, port: int, agent: Mapping[str, Path] | None = None, headers: Mapping[str, str] | None = None) -> str:
    """The server's answer; "no": the handshake ended."""
    context = ssl.create_default_context(cafile=str(tls.ca))
    if agent is not None:
        context.load_cert_chain(agent["client_cert"], agent["client_key"])
    with closing(http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=180)) as client:
        try:
            client.request("GET", "/healthz", headers=dict(headers or {}))
            return client.getresponse().read().decode()
        except OSError:
            return "no"


def test_a_certificate_counts_for_its_own_purpose(server: Https, tls: Tls, signers: Mapping[str, Signer]) -> None:
    """A node's is no person's and a person's is no node's; a client without one is served as before."""
    agents = {who: tls.agent(f"of-{who}", signer=signers[who]) for who in signers}
    found = {who: ask(tls, server.port, agents[who]) for who in ("people", "nodes")}

    assert found == {"people": "people", "nodes": "nodes"}
    assert ask(tls, server.port) == "none"
    assert ask(tls, server.port, headers={"ca_bridge.peer": "x", "Ca-Bridge.Peer": "x"}) == "none"


@pytest.mark.parametrize(
    "differences",
    [
        {"begin": _LONG_AGO, "end": _LONG_AGO + timedelta(hours=1)},
        {"begin": datetime.now(UTC) + timedelta(hours=12)},  # of the moment in which the tests were collected
        {"ekus": [SERVER]},
    ],
    ids=["expired", "not yet valid", "for servers"],
)
def test_a_certificate_that_is_not_good_ends_the_handshake(
    server: Https, tls: Tls, signers: Mapping[str, Signer], differences: Mapping[str, Any]
) -> None:
    """Expired, not yet valid, for servers alone: there is no answer; with the right one there is."""
    assert ask(tls, server.port, tls.agent("bad", signer=signers["people"], **differences)) == "no"
    assert ask(tls, server.port, tls.agent("good", signer=signers["people"])) == "people"


def test_a_certificate_of_another_ca_ends_the_handshake(server: Https, tls: Tls, signers: Mapping[str, Signer]) -> None:
    """A CA with an anchor's name, and the CA of the server's own certificate, count as others."""
    twin = make_signer("people")
    found = [ask(tls, server.port, tls.agent("bad", signer=one)) for one in (signers["other"], twin, tls.signer)]

    assert found == ["no"] * 3


def test_what_tls_lets_through_does_not_count(server: Https, tls: Tls, signers: Mapping[str, Signer]) -> None:
    """A certificate without usages, and a CA's, are known to the server and good for nothing."""
    subordinate = make_signer("below", signers["people"])
    plain = tls.agent("plain", signer=signers["people"], ekus=[])
    wanted = {"no usages": plain, "a CA's": tls.agent("ca", signer=signers["people"], basic_constraints=_CA)}
    below = tls.agent("sub", signer=subordinate)
    below["client_cert"].write_bytes(below["client_cert"].read_bytes() + pem(subordinate.certificate))

    found = {name: ask(tls, server.port, agent) for name, agent in wanted.items()}

    assert set(found.values()) <= {"", "no"}
    assert found["no usages"] == ""
    assert ask(tls, server.port, below) == ""  # by a CA below the anchor, which the anchors' owner did not name


_CA = x509.BasicConstraints(ca=True, path_length=None)


def test_the_anchors_are_those_of_now(tls: Tls, signers: Mapping[str, Signer]) -> None:
    """A CA that is found later counts from then on, without a restart."""
    anchors: list[x509.Certificate] = []

    def application(environ: Mapping[str, Any], start: Callable[..., Any]) -> list[bytes]:
        start("200 OK", [("Content-Type", "text/plain")])
        return [b"some" if PEER in environ else b"none"]

    agent = tls.agent("late", signer=signers["nodes"])
    with serving(settings(tls), application, lambda: anchors) as https:
        before = ask(tls, https.port, agent)
        anchors.append(signers["nodes"].certificate)
        after = ask(tls, https.port, agent)

    assert (before, after) == ("none", "some")


@pytest.mark.attack("D10")
def test_an_idle_connection_ends_while_the_clock_stands(tls: Tls, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wall clock that was put back keeps no silent client connected."""

    def application(_environ: Mapping[str, Any], start: Callable[..., Any]) -> list[bytes]:
        start("200 OK", [("Content-Type", "text/plain")])
        return [b"ok"]

    monkeypatch.setattr("bridge.door.https._IDLE_SECONDS", 1)
    monkeypatch.setattr("cheroot.connections.time", SimpleNamespace(time=lambda: 0.0, sleep=time.sleep))
    with (
        serving(settings(tls), application, tuple) as https,
        socket.create_connection(("127.0.0.1", https.port)) as silent,
    ):
        silent.settimeout(180)
        assert silent.recv(1) == b""
        assert ask(tls, https.port) == "ok"


def test_the_door_knows_its_clusters_cas_and_the_peoples(tmp_path: Path, tls: Tls) -> None:
    """Both may come in; a CA of the cluster among the people's keeps the door from beginning."""
    pki, people = handmade_pki(tmp_path / "pki"), make_signer("people")
    (tmp_path / "people.crt").write_bytes(pem(people.certificate))
    cluster = Signer.load(*(path.read_bytes() for path in pki.ca_files("ca")))
    agents = [tls.agent(f"door-{number}", signer=one) for number, one in enumerate((people, cluster, tls.signer))]
    desk = make_desk(tmp_path / "desk", pki)
    door = add_door(desk.config, desk.directory, f'approvers_ca = "{tmp_path / "people.crt"}"')
    with running(door):
        own = Tls(signer=tls.signer, directory=tmp_path, ca=door.ca, server_cert=door.certificate, server_key=door.key)
        found = [ask(own, door.port, agent) for agent in agents]
    (tmp_path / "people.crt").write_bytes(pem(people.certificate, cluster.certificate))
    run = desk.run("serve")

    assert found == ["ok\n", "ok\n", "no"]
    assert run.returncode == Exit.USAGE
    assert "a CA that signs for nodes or agents" in run.stderr
