"""A run that is interrupted ends at once, and says whether anything was replaced; a retry says what it waits for."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.kit import opensslca, terminals
from tests.kit.cas import Bridge
from tests.kit.pki import handmade_pki


@pytest.fixture
def bridge(tmp_path: Path) -> Bridge:
    """All is due, and Vault's address is for a test to say."""
    pki = handmade_pki(tmp_path / "node", not_after=datetime.now(UTC) + timedelta(days=20))
    return Bridge(pki=pki, directory=tmp_path / "bridge")


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that no process listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port whose server accepts connections and sends nothing."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


def with_vault(bridge: Bridge, url: str, **more: object) -> None:
    token = bridge.secret("token", "hvs.x")
    bridge.add("backend.corp", {"type": "vault", "url": url, **more})
    bridge.add("backend.corp.auth", {"token_file": token})
    for name in ("ca", "etcd-ca", "front-proxy-ca"):
        bridge.add(f"authority.{name}", {"backend": "corp"})


def started(bridge: Bridge, *words: str) -> subprocess.Popen[str]:
    program = str(Path(sys.executable).with_name("ca-bridge"))
    return subprocess.Popen(
        [program, *words, "--config", str(bridge.config)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def reported(run: subprocess.Popen[str], wanted: str) -> list[str]:
    """What it has said until it says this."""
    assert run.stderr is not None
    lines = []
    for line in run.stderr:
        lines.append(line)
        if wanted in line:
            return lines
    raise AssertionError("".join(lines))


def files(bridge: Bridge) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in bridge.pki.kubeconfig_dir.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_asks_again_ends_at_once(bridge: Bridge, closed_port: int, number: int, code: int) -> None:
    """Within seconds where it would have asked for an hour; with what was replaced, and the code of the signal."""
    with_vault(bridge, f"http://127.0.0.1:{closed_port}", retry_for="1h")
    before = files(bridge)
    with started(bridge, "renew", "-v") as run:
        reported(run, "asked again in 8.0 s")
        os.kill(run.pid, number)
        _, rest = run.communicate(timeout=300)
    assert run.returncode == code
    assert "asked again in 16" not in rest  # no CA was waited for
    # the threads that asked for the other authorities may say so after it
    assert re.search(r"^error: interrupted, nothing was replaced \[run \w+\]$", rest, re.MULTILINE)
    assert files(bridge) == before
    assert bridge.run("audit", "verify").returncode == 0


def test_a_run_that_waits_for_an_answer_ends_at_once(bridge: Bridge, silent_port: int) -> None:
    """The run ends without waiting for the threads that ask."""
    with_vault(bridge, f"http://127.0.0.1:{silent_port}", timeout="10m", retry_for="1h")
    with started(bridge, "renew", "apiserver") as run, socket.socket() as other:
        other.settimeout(0.1)
        deadline = time.monotonic() + 180
        while not _is_asking(run.pid, silent_port) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(run.pid, signal.SIGINT)
        _, rest = run.communicate(timeout=300)  # the server would be waited for ten minutes
    assert run.returncode == 130
    assert "interrupted, nothing was replaced" in rest


def _is_asking(_: int, port: int) -> bool:
    """Whether any process has a connection to the port (proc(5), net/tcp; state 01)."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(line.split()[2].endswith(f":{port:04X}") and line.split()[3] == "01" for line in lines)


def test_what_is_replaced_already_is_reported(bridge: Bridge, tmp_path: Path) -> None:
    """Interrupted in a hook after the installation: which backup has the old files, and how it goes on."""
    script = tmp_path / "hook.sh"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/begun\nexec sleep 600\n")
    script.chmod(0o755)
    bridge.add("hooks", {"after_install": str(script)})
    bridge.add("backend.desk", {"type": "openssl"})
    for name in ("ca", "etcd-ca", "front-proxy-ca"):
        place = opensslca.make_ca_directory(tmp_path / "cas" / name, *bridge.pki.ca_pem(name))
        bridge.add(f"authority.{name}", {"backend": "desk", "dir": str(place)})
    with started(bridge, "renew", "apiserver") as run:
        deadline = time.monotonic() + 120
        while not (tmp_path / "begun").exists() and time.monotonic() < deadline and run.poll() is None:
            time.sleep(0.05)
        os.kill(run.pid, signal.SIGTERM)
        _, rest = run.communicate(timeout=300)
    [backup] = (bridge.directory / "state/backups").iterdir()
    assert run.returncode == 143, rest
    assert f"interrupted after files were replaced; the old ones are in the backup {backup.name}" in rest


def asked_often(bridge: Bridge, *words: str) -> str:
    """What a run that would ask for an hour has said by its fourth try; then it is interrupted."""
    with started(bridge, *words, "-v") as run:
        said = reported(run, "asked again in 4.0 s")
        os.kill(run.pid, signal.SIGINT)
        _, rest = run.communicate(timeout=300)
    assert run.returncode == 130, rest
    return "".join(said)


def test_a_retry_says_why_and_until_when(bridge: Bridge, closed_port: int) -> None:
    """The message comes once; and when the run gives up, another says what may be wrong."""
    with_vault(bridge, f"http://127.0.0.1:{closed_port}", retry_for="1h")
    said = asked_often(bridge, "renew", "apiserver")
    [line] = [line for line in said.splitlines() if "asked again until" in line]
    assert re.search(r"corp \(vault\): .*refused.*; asked again until \d\d:\d\d:\d\d UTC \(retry_for\)", line)
    bridge.config.write_text(bridge.config.read_text().replace('"1h"', '"1s"'))
    run = bridge.run("renew", "apiserver")
    assert run.returncode == 6
    assert "is the server up, and is the port in `url` right?" in run.stdout + run.stderr


@pytest.mark.first_use("13")
def test_a_port_where_nothing_listens_is_one_warning(bridge: Bridge, closed_port: int) -> None:
    """For all authorities that one backend serves; a terminal does without the wait, and without the warning."""
    with_vault(bridge, f"http://127.0.0.1:{closed_port}", retry_for="1h")
    bridge.tables = [table.replace('backend = "corp"', f'backend = "corp"\nmount = "m{number}"')
                     for number, table in enumerate(bridge.tables)]  # fmt: skip
    bridge.config.write_text("\n".join(bridge.tables))
    said = asked_often(bridge, "renew", "all")
    assert said.count("asked again until") == 1, said
    assert "Ctrl-C" not in said
    bridge.config.write_text(bridge.config.read_text().replace('"1h"', '"1s"'))
    run = bridge.run("renew", "all")
    assert len([line for line in run.stderr.splitlines() if line.startswith("error: ")]) == 1, run.stderr
    begin = time.monotonic()
    bridge.config.write_text("\n".join(bridge.tables))
    shown = terminals.run(bridge.command("renew", "all"))
    assert (shown.exit_code, "asked again" in shown.text) == (6, False), shown.text
    assert time.monotonic() - begin < 300


def test_an_unknown_name_is_reported(bridge: Bridge) -> None:
    """The error says what to check; at a terminal it says, too, how to stop the wait."""
    with_vault(bridge, "https://no-such-host.invalid", retry_for="1h")
    with terminals.working(bridge.command("renew", "apiserver"), "stops") as said:
        assert "(retry_for); Ctrl-C stops" in " ".join(said.split())
    bridge.config.write_text(bridge.config.read_text().replace('"1h"', '"1s"'))
    run = bridge.run("renew", "apiserver")
    assert run.returncode == 6
    assert "is the host in `url` right" in run.stdout + run.stderr


@pytest.mark.parametrize("lost", ["newcerts", "passphrase"])
def test_a_file_of_this_machine_is_a_usage_error(bridge: Bridge, tmp_path: Path, lost: str) -> None:
    """Exit 2, and not that of a refusal, because no CA was asked."""
    place = opensslca.make_ca_directory(tmp_path / "ca", *bridge.pki.ca_pem("ca"), passphrase="x" * 20)
    bridge.add("backend.desk", {"type": "openssl", "dir": str(place)})
    bridge.add("authority.ca", {"backend": "desk", "passphrase_file": bridge.secret("passphrase", "x" * 20)})
    bridge.add("restart", {"method": "none"})
    assert bridge.run("renew", "admin.conf").returncode == 0
    if lost == "newcerts":
        shutil.rmtree(place / lost)
    else:
        (bridge.directory / lost).unlink()
    run = bridge.run("renew", "admin.conf")
    assert run.returncode == 2
    assert lost in run.stdout + run.stderr
