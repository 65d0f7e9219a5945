"""What is known of a node: by the inventory command, by the DNS, by the API."""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from bridge.cluster.api import JSON, METADATA, Reply, Request
from bridge.errors import BridgeError
from bridge.gateway import nodes
from bridge.gateway.policy import NodeState

_ENTRY = '{"addresses": ["192.0.2.9"]}'


@pytest.mark.parametrize(
    ("script", "wanted"),
    [
        (f"echo '{_ENTRY}'", ""),
        (f"echo noise >&2; echo '{_ENTRY}'", ""),
        (f"sleep 600 & echo '{_ENTRY}'", ""),  # which keeps its standard output open
        (f"setsid sh -c 'exec sleep 600' & echo '{_ENTRY}'", ""),
        ("yes", "printed more than 64 KiB"),
        ("yes >&2", "was still running after 2 s, and was killed"),
        ("sleep 600; echo", "was still running after 2 s, and was killed"),
        ("kill -9 $$", "was ended by signal 9"),
        ("exit 3", "ended with code 3"),
    ],
)
def test_how_an_inventory_command_may_behave(
    script: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its background processes and its endless output delay no request and fill no memory."""
    monkeypatch.setattr(nodes, "_COMMAND_LIMIT", timedelta(seconds=2 if "after 2 s" in wanted else 900))
    program = tmp_path / "cmdb"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    begin = time.monotonic()
    if wanted:
        with pytest.raises(BridgeError, match=wanted):
            nodes._ask_command(program, "w1")
    else:
        found = nodes._ask_command(program, "w1")
        assert found is not None
        assert found.addresses == ("192.0.2.9",)
    assert time.monotonic() - begin < 300


def test_an_inventory_command_has_nothing_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No open file, and of the environment only what says where programs are."""
    program, found = tmp_path / "cmdb", tmp_path / "found"
    program.write_text(f"#!/bin/sh\n(env | cut -d= -f1; ls -l /proc/self/fd) >{found}\n")
    program.chmod(0o755)
    secret = tmp_path / "secret"
    secret.write_text("x")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("VAULT_TOKEN", "x")
    with secret.open("rb") as opened:
        os.set_inheritable(opened.fileno(), True)
        assert nodes._ask_command(program, "w1") is None
    names = found.read_text()
    assert str(secret) not in names
    assert not {"CREDENTIALS_DIRECTORY", "VAULT_TOKEN"} & set(names.split())
    assert "PATH" in names.split()


def test_the_dns_proves_both_ways() -> None:
    """An address that leads to a name, and back."""
    assert nodes.host_of("127.0.0.1") == "localhost"
    assert nodes.host_of("192.0.2.1") is None


@pytest.mark.attack("G7")
def test_a_resolver_that_does_not_answer_holds_few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look ends in time, at most so many lookups run at once, and an answer that comes later counts."""
    answers, running = threading.Event(), []

    def slow(address: str) -> str:
        running.append(address)
        answers.wait(600)
        return f"{address}.example"

    monkeypatch.setattr(nodes, "host_of", slow)
    monkeypatch.setattr(nodes, "_DNS_SECONDS", 0.3)
    resolver = nodes.Resolver(4)
    begin = time.monotonic()
    threads = [
        threading.Thread(target=resolver.hosts, args=([f"192.0.2.{4 * look + n}" for n in range(4)],))
        for look in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - begin < 300  # the resolver takes ten minutes
    assert len(running) == 4
    answers.set()
    until = time.monotonic() + 120
    while not all((found := resolver.hosts(running)).values()) and time.monotonic() < until:
        time.sleep(0.01)
    assert found == {address: f"{address}.example" for address in running}
    assert len(running) == 4  # remembered


@pytest.mark.attack("G7")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_name_that_breaks_the_resolver_takes_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who own an address choose the name that it leads to; the next lookups have a thread all the same."""

    def broken(address: str) -> str:
        if address.startswith("192.0.2."):
            raise ValueError("embedded null character")
        return f"{address}.example"

    monkeypatch.setattr(nodes, "host_of", broken)
    resolver = nodes.Resolver(2)
    for number in range(5):
        assert resolver.hosts([f"192.0.2.{number}"]) == {f"192.0.2.{number}": None}
    assert resolver.hosts(["198.51.100.1"]) == {"198.51.100.1": "198.51.100.1.example"}


def test_what_counts_is_looked_at_each_time(tmp_path: Path) -> None:
    """A file and a Node object count as they are now; only a whole object tells whether a node is ready."""
    there = [b'{"status": {"conditions": [{"type": "Ready", "status": "False"}]}}']
    accepted = []

    class OneNode:
        """An API server."""

        def answer(self, request: Request) -> Reply:
            assert request.path == "/api/v1/nodes/w1"
            accepted.append(request.headers["Accept"])
            return Reply(status=200, body=there[0]) if there else Reply(status=404, body=b"{}")

    file = tmp_path / "inventory.toml"
    file.write_text("old")
    file.chmod(0o644)
    watched = nodes.WatchedFile(file, "inventory", lambda text, _: text)

    def seen(*, with_readiness: bool = False) -> tuple[NodeState, str]:
        return nodes.state_of(OneNode(), "w1", with_readiness=with_readiness), watched.get()  # type: ignore[arg-type]

    assert seen() == (NodeState(exists=True, ready=True), "old")
    assert seen(with_readiness=True) == (NodeState(exists=True, ready=False), "old")
    there.clear()
    file.write_text("another")
    assert seen() == (NodeState(exists=False), "another")
    assert accepted == [METADATA, JSON, METADATA]
