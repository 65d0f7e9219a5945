"""Messages: each says which run it is of, as JSON as the schema has it, and in the journal with fields."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import re
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bridge.state import Store, audit
from bridge.system import console
from bridge.system.console import LogFormat
from tests.kit import journald
from tests.kit.cas import Bridge, add_openssl
from tests.kit.journald import Journal
from tests.kit.json_schema import violations
from tests.kit.pki import handmade_pki

SCHEMA = json.loads((Path(__file__).parents[2] / "config/logs/log-line.schema.json").read_text())
AUTHORITIES = ("ca", "etcd-ca", "front-proxy-ca")


@pytest.fixture
def bridge(tmp_path: Path) -> Bridge:
    """All is due, and etcd's CA is broken."""
    pki = handmade_pki(tmp_path / "node", not_after=datetime.now(UTC) + timedelta(days=20))
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    for name in AUTHORITIES:
        add_openssl(bridge, name)
    (tmp_path / "bridge/desk/etcd-ca/ca.key").write_text("not a key")
    bridge.add("copies", {"files": [str(tmp_path / "no-copy")]})
    return bridge


def recorded(bridge: Bridge) -> list[str]:
    """The runs in the audit log."""
    lines = audit.events(Store(bridge.directory / "state"), None, None)
    return list(dict.fromkeys(str(line["run"]) for line in lines))


def test_each_line_of_text_says_which_run_it_is_of(bridge: Bridge) -> None:
    """The one of the audit log, in what cron mails; two runs have two names."""
    first, second = bridge.run("renew"), bridge.run("renew")
    tags = [set(re.findall(r"(?m) \[run ([0-9a-f]{8})\]$", run.stderr)) for run in (first, second)]
    assert [list(tag) for tag in tags] == [[one] for one in recorded(bridge)]
    for run in (first, second):
        assert run.stderr.count("\n") == len(re.findall(r"(?m) \[run [0-9a-f]{8}\]$", run.stderr))


@pytest.mark.parametrize(
    "words",
    [
        ("renew",),
        ("renew", "-v"),
        ("renew", "nonsense"),
        ("renew", "--rehearse", "apiserver", "etcd-peer"),
        ("plan",),
        ("rollback",),
        ("import", "/nonexistent"),
    ],
)
def test_lines_of_json_are_as_the_schema_has_them(bridge: Bridge, words: tuple[str, ...]) -> None:
    """Each of them, in every case; with the run of the audit log."""
    bridge.run("renew")
    before = recorded(bridge)
    lines = [json.loads(line) for line in bridge.run(*words, "--log-format", "json").stderr.splitlines()]
    assert lines or words == ("plan",)
    assert [list(violations(line, SCHEMA)) for line in lines] == [[]] * len(lines)
    new = [one for one in recorded(bridge) if one not in before]
    if new:
        assert {line["run"] for line in lines} == set(new)


def test_a_line_says_what_it_is_about(bridge: Bridge) -> None:
    """The names of certificates and the exit code, for a program that reads it."""
    lines = [json.loads(line) for line in bridge.run("renew", "--log-format", "json").stderr.splitlines()]
    [failed] = [line for line in lines if line["level"] == "error" and "etcd-peer" in line["message"]]
    assert "etcd-peer" in failed["certificates"]
    assert "apiserver" not in failed["certificates"]
    assert failed["exitCode"] not in (0, None)
    assert any("certificates" not in line for line in lines)


@pytest.mark.parametrize(
    "change",
    [
        {"time": "2026-11-26 01:00"},
        {"level": "fatal"},
        {"run": "x"},
        {"message": None},
        {"certificates": []},
        {"certificates": "apiserver"},
        {"exitCode": "2"},
        {"exitCode": -1},
        {"exitCode": True},
        {"more": 1},
    ],
)
def test_the_look_at_lines_can_fail(change: dict[str, object]) -> None:
    """A line that the schema forbids is found; the line that it is made from is fine."""
    line = {"time": "2026-11-26T01:00:00.123+00:00", "level": "error", "run": "0123abcd", "message": "x"}
    assert list(violations(line, SCHEMA)) == []
    assert list(violations({**line, **change}, SCHEMA))
    assert list(violations({key: line[key] for key in ("time", "level", "run")}, SCHEMA))


def test_a_process_with_several_runs() -> None:
    """The first has the name that the process had before it began, each later one another."""
    before = console.run_id()
    first, second = console.begin_run(), console.begin_run()
    assert first != second
    assert console.run_id() == second
    assert len({before, first, second}) >= 2


# --- the journal ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[socket.socket]:
    """In the journal's place."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ours:
        ours.bind(str(tmp_path / "socket"))
        ours.settimeout(5)
        yield ours


def test_a_value_can_not_pass_for_another_field(listening: socket.socket, tmp_path: Path) -> None:
    """A line break in it goes with a length, as the protocol has it."""
    console.send_to_journal([("MESSAGE", "a\nPRIORITY=0"), ("PRIORITY", "3")], tmp_path / "socket")
    assert listening.recv(1 << 16) == b"MESSAGE\n" + (12).to_bytes(8, "little") + b"a\nPRIORITY=0\nPRIORITY=3\n"


def test_without_a_journal_messages_are_on_standard_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No message is lost where no journal listens."""
    monkeypatch.setattr(console, "JOURNAL", tmp_path / "none")
    monkeypatch.setattr(console.send_to_journal, "__defaults__", (tmp_path / "none",))
    console.set_up(0, LogFormat.JOURNAL)
    logging.getLogger("ca-bridge").error("away")
    assert re.fullmatch(r"error: away \[run [0-9a-f]{8}\]\n", capsys.readouterr().err)


def test_a_message_that_nothing_takes_stops_no_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the journal its stream is gone, too: the step that a message is about goes on."""
    monkeypatch.setattr(console.send_to_journal, "__defaults__", (tmp_path / "none",))
    console.set_up(0, LogFormat.JOURNAL)
    reading, writing = os.pipe()
    with os.fdopen(writing, "w", buffering=1) as stream:
        monkeypatch.setattr("sys.stderr", stream)
        logging.getLogger("ca-bridge").error("taken")
        assert b"error: taken" in os.read(reading, 1 << 10)
        os.close(reading)
        with pytest.raises(BrokenPipeError):
            stream.write("lost\n")
        logging.getLogger("ca-bridge").error("lost")
        monkeypatch.undo()
        with contextlib.suppress(BrokenPipeError):
            stream.close()


@pytest.mark.parametrize("module", ["door", "exec", "openssl", "openssl.index", "vault.server"])
def test_a_backends_warning_has_the_form_of_the_log(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A backend's logger is below ours: its warnings are lines as all others; a logger by a module's name has no form."""
    logger = importlib.import_module(f"backends.{module}").log
    console.set_up(0, LogFormat.TEXT)
    logger.warning("moved to %s", "x.bad")
    assert re.fullmatch(r"warning: moved to x\.bad \[run [0-9a-f]{8}\]\n", capsys.readouterr().err)
    console.set_up(0, LogFormat.JSON)
    logger.warning("moved to %s", "x.bad")
    line = json.loads(capsys.readouterr().err)
    assert (line["level"], line["message"], list(violations(line, SCHEMA))) == ("warning", "moved to x.bad", [])
    logging.getLogger(f"backends.{module}").warning("moved")
    assert capsys.readouterr().err == ""


def test_only_the_stream_that_is_named_is_the_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that another program has left says nothing of our standard error."""
    monkeypatch.setenv("JOURNAL_STREAM", "1:2")
    assert not console.stderr_is_journal()
    monkeypatch.setenv("JOURNAL_STREAM", "")
    assert not console.stderr_is_journal()


@pytest.fixture(scope="module")
def real_journal() -> Iterator[Journal]:
    if reason := journald.missing():
        pytest.skip(reason)
    with journald.journald() as found:
        yield found


#: systemd sets it for what it starts (systemd.exec(5)), systemd-cat of version 252 does not.
AS_SYSTEMD = 'export JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2); exec "$0" "$@"'


@pytest.mark.parametrize("how", ["systemd", "option"])
def test_the_real_journal_has_the_fields(bridge: Bridge, real_journal: Journal, how: str) -> None:
    """Where systemd connects standard error with it, and where the option says so; found by the audit log's run."""
    if how == "systemd":
        run = real_journal.run(["systemd-cat", "--", "sh", "-c", AS_SYSTEMD, *bridge.command("renew")])
    else:
        run = real_journal.run(bridge.command("renew", "--log-format", "journal"))
    assert run.returncode not in (0, 4)
    assert run.stderr == ""
    [ours] = recorded(bridge)
    entries = real_journal.entries(f"CA_BRIDGE_RUN={ours}")
    assert entries
    assert {entry["SYSLOG_IDENTIFIER"] for entry in entries} == {"ca-bridge"}
    assert {entry["_TRANSPORT"] for entry in entries} == {"journal"}
    [failed] = [entry for entry in entries if "etcd-peer" in entry["MESSAGE"]]
    assert failed["PRIORITY"] == "3"
    assert "etcd-peer" in failed["CA_BRIDGE_CERTIFICATE"]
    assert failed["CA_BRIDGE_LEVEL"] == "error"
    assert failed["CA_BRIDGE_EXIT_CODE"] == str(run.returncode)
    assert {entry["PRIORITY"] for entry in entries} == {"3", "4"}
    by_name = real_journal.entries(f"CA_BRIDGE_RUN={ours}", "CA_BRIDGE_CERTIFICATE=etcd-peer")
    assert [entry["MESSAGE"] for entry in by_name] == [failed["MESSAGE"]]
    assert real_journal.entries("CA_BRIDGE_RUN=00000000") == []
