"""What people see on a terminal: progress, colours where they are wanted, tables that fit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bridge.cli import printing
from tests.kit import opensslca, terminals
from tests.kit.cas import Bridge
from tests.kit.loopback import free_port
from tests.kit.pki import Pki, handmade_pki

PROGRAM = str(Path(sys.executable).with_name("ca-bridge"))


@pytest.fixture
def node(tmp_path: Path) -> Pki:
    """A node whose certificates end in 20 days."""
    return handmade_pki(tmp_path / "node", not_after=datetime.now(UTC) + timedelta(days=20))


@pytest.fixture
def config(node: Pki, tmp_path: Path) -> Path:
    """Settings with an `openssl ca` directory for each authority, and an openssl that takes its time."""
    slow = tmp_path / "openssl"
    slow.write_text('#!/bin/sh\nsleep 1.5\nexec openssl "$@"\n')
    slow.chmod(0o755)
    lines = [
        f'[node]\npki_dir = "{node.pki_dir}"\nkubeconfig_dir = "{node.kubeconfig_dir}"\nstate_dir = "{tmp_path}/state"'
    ]
    lines.append(f'[backend.desk]\ntype = "openssl"\nopenssl = "{slow}"')
    for name in ("ca", "etcd-ca", "front-proxy-ca"):
        directory = opensslca.make_ca_directory(tmp_path / "cas" / name, *node.ca_pem(name))
        lines.append(f'[authority.{name}]\nbackend = "desk"\ndir = "{directory}"')
    file = tmp_path / "config.toml"
    file.write_text("\n".join([*lines, ""]))
    file.chmod(0o644)
    return file


def renewed(config: Path, term: str) -> terminals.Shown:
    """One certificate, with the terminal for messages alone."""
    command = [PROGRAM, "renew", "front-proxy-client", "--config", str(config)]
    shown = terminals.run(command, {"TERM": term}, messages_only=True)
    assert shown.exit_code == 0, shown
    assert "1 renewed" in shown.output
    assert "\x1b" not in shown.output
    return shown


def test_progress_where_it_takes_long(config: Path) -> None:
    """A line that says who is asked, and is gone in the end; none on a terminal that can't write over a line."""
    shown = renewed(config, "xterm")
    assert "asking desk (openssl): 0 of 1 requests are answered … " in shown.terminal
    assert shown.text == ""
    assert "\x1b" not in renewed(config, "dumb").terminal


#: A step that goes on until it is to be shown, however long the machine stalls.
_SLOW = """
import threading
from bridge.system import console
console.set_up(0, console.LogFormat.TEXT)
is_long, show = threading.Event(), console._Line._show
def shown(*about):
    show(*about)
    is_long.set()
console._Line._show = shown
with console.doing("restarting etcd", is_plain={plain}):
    assert is_long.wait(180)
    console.log.warning("a message")
"""


def test_one_line_where_there_is_no_terminal() -> None:
    """A journal gets one line about a long step, and none about a step of most runs; a terminal's line is written over."""
    for plain, wanted in ((True, "restarting etcd …\nwarning: a message\n"), (False, "warning: a message\n")):
        code = _SLOW.format(plain=plain)
        assert terminals.run([sys.executable, "-c", code], {"TERM": "dumb"}).text == wanted
    shown = terminals.run([sys.executable, "-c", code])
    found = re.search(r"\r\x1b\[K[|/\\-] restarting etcd … (\d+) s", shown.terminal)
    assert found is not None
    assert int(found[1]) >= 2
    assert shown.text == "warning: a message\n"


def test_colours_where_they_are_seen_and_wanted() -> None:
    """The first word of a message; not with NO_COLOR, nor on a terminal that has none."""
    command = [PROGRAM, "plan", "--config", "/nowhere/config.toml"]
    assert "\x1b[1;31merror:\x1b[0m /nowhere" in terminals.run(command).terminal
    for environment in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        shown = terminals.run(command, environment)
        assert "\x1b" not in shown.terminal
        assert shown.text.startswith("error: /nowhere")


ROWS = [("apiserver", "expires soon", "a" * 30), ("etcd-server", "", "b" * 30)]


def test_a_table_fits_where_it_is_shown() -> None:
    """Columns without room go on below; with room, and in a file, each row is a line."""
    wide = ["apiserver    expires soon  " + "a" * 30, "etcd-server                " + "b" * 30]
    assert list(printing.columns(ROWS, 57)) == wide
    assert list(printing.columns(ROWS, None)) == wide
    narrow = list(printing.columns(ROWS, 56))
    assert narrow == ["apiserver    expires soon", f"    {'a' * 30}", "etcd-server", f"    {'b' * 30}"]
    assert list(printing.columns(ROWS, 20))[0:2] == ["apiserver", "    expires soon"]


@pytest.mark.first_use("10")
def test_one_row_is_one_line_at_80_columns(config: Path) -> None:
    """Columns that have no room are left out there; with `-v`, and on a wide terminal, all of them are shown."""
    renewal = terminals.run([PROGRAM, "renew", "all", "--config", str(config)])
    assert len(re.findall(r"(?m)^[a-z.-]+ +until .* by desk \(openssl\)$", renewal.text)) == 12
    assert re.findall(r"[0-9A-F]{30,}", renewal.text) == []
    tables = (("check-expiration", 3), ("plan all", 12), ("backups", 1), ("audit show", 48), ("rollback", 12))
    for words, count in tables:
        shown = terminals.run([PROGRAM, *words.split(), "--config", str(config)])
        lines = shown.text.partition("\n\nAfter")[0].partition("\nbackup ")[0].splitlines()
        assert len(lines) >= count, words
        assert [line for line in lines if len(line) > 80 or line.startswith("    ")] == [], words
    for columns, more in ((80, ["-v"]), (300, [])):
        shown = terminals.run([PROGRAM, "plan", "all", *more, "--config", str(config)], columns=columns)
        assert "apiserver.crt and apiserver.key" in " ".join(shown.text.split())
    shown = terminals.run([PROGRAM, "check-expiration", "-v", "--config", str(config)])
    assert "EXTERNALLY MANAGED" in shown.text


@pytest.mark.first_use("10")
def test_one_backup_is_shown_whole(config: Path) -> None:
    """Its certificates with both serial numbers, and its files; another name than a backup's is refused."""
    renewed(config, "dumb")
    backup = terminals.run([PROGRAM, "backups", "--config", str(config)]).text.split()[0]
    shown = terminals.run([PROGRAM, "backups", backup, "--config", str(config)])
    assert len(re.findall(r"(?m)^    (?:serial|now   ) [0-9A-F]+$", shown.text)) == 2, shown.text
    assert "front-proxy-client.crt" in shown.text
    assert terminals.run([PROGRAM, "backups", "none", "--config", str(config)]).exit_code == 2


@pytest.mark.first_use("11")
def test_results_have_colour_where_the_terminal_does(config: Path, node: Pki) -> None:
    """A due certificate is yellow, a broken one red, a good one green; there is no colour with NO_COLOR, or in a pipe."""
    (node.pki_dir / "apiserver.crt").write_text("nothing")
    command = [PROGRAM, "check-expiration", "--config", str(config)]
    shown = terminals.run(command)
    for word, code in (("apiserver", "1;31"), ("admin.conf", "33"), ("etcd-ca", "32")):
        assert f"\x1b[{code}m{word}\x1b[0m" in shown.terminal
    (node.kubeconfig_dir / "super-admin.conf").unlink(missing_ok=True)
    (node.pki_dir / "apiserver-kubelet-client.crt").unlink()
    marked = terminals.run([*command, "-v"]).terminal
    for mark in ("\x1b[1;31m!INVALID!\x1b[0m apiserver", "\x1b[1;31m!MISSING!\x1b[0m apiserver-kubelet-client"):
        assert mark in marked
    assert "\x1b[34m!MISSING!\x1b[0m super-admin.conf" in marked  # a healthy node may be without it
    assert "\x1b[" not in terminals.run(command, {"NO_COLOR": "1"}).terminal
    assert "\x1b[" not in subprocess.run(command, check=False, capture_output=True, text=True).stdout


@pytest.mark.first_use("12")
def test_the_demo_on_80_columns() -> None:
    """Short, coloured where that is wanted, and no line is cut in two by the terminal."""
    shown = terminals.run([PROGRAM, "demo"])
    lines = shown.text.splitlines()
    assert shown.exit_code == 0, shown.text
    assert "\x1b[1;32m" in shown.terminal
    assert [line for line in lines if len(line) > 80] == []
    assert 40 < len(lines) < 90
    assert "Next" in lines


def test_closed_outputs_stop_no_run(config: Path) -> None:
    """A run whose standard error was closed from the beginning does its work; so does one without standard output."""
    for closed in ("2>&-", ">&-"):
        line = f"exec {PROGRAM} renew front-proxy-client --config {config} {closed}"
        assert subprocess.run(["sh", "-c", line], check=False, stdout=subprocess.DEVNULL).returncode == 0, closed


@pytest.mark.first_use("25")
@pytest.mark.parametrize("network", [[], ["unshare", "--net"]], ids=["nothing listens", "no way leads there"])
def test_a_person_does_not_wait_for_a_ca_that_is_not_there(tmp_path: Path, network: list[str]) -> None:
    """At a terminal the run ends at once; a job asks again until `retry_for` is over."""
    if network and os.geteuid() != 0:
        pytest.skip("makes a network of its own; run as root")
    bridge = Bridge(pki=handmade_pki(tmp_path / "node"), directory=tmp_path / "bridge")
    url = f"http://127.0.0.1:{free_port()}"
    bridge.add("backend.corp", {"type": "vault", "url": url, "retry_for": "2s"})
    bridge.add("backend.corp.auth", {"method": "token", "token_file": bridge.secret("token", "s3cret")})
    bridge.add("authority.front-proxy-ca", {"backend": "corp", "mount": "pki"})
    command = [*network, PROGRAM, "renew", "front-proxy-client", "--config", str(bridge.config)]
    shown = terminals.run(command)
    assert (shown.exit_code, "asked again" in shown.text) == (6, False), shown.text
    job = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert (job.returncode, "asked again" in job.stderr) == (6, True), job.stderr


def test_sentences_and_rows_of_csrs_fit_80_columns(config: Path, tmp_path: Path) -> None:
    """A run with nothing to do, a line a CSR, and one sentence for all keys that have no certificate yet."""
    assert terminals.run([PROGRAM, "renew", "all", "--config", str(config)]).exit_code == 0
    for words in (["renew"], ["export", str(tmp_path / "none.json")]):
        shown = terminals.run([PROGRAM, *words, "--config", str(config)])
        assert max(map(len, shown.text.splitlines())) <= 80, shown.text
        assert "nothing is due" in shown.text
    csrs = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        more = ["--csr-only", "--csr-dir", str(csrs), "--config", str(config)]
        rows = terminals.run([PROGRAM, "renew", "all", *more]).text.splitlines()
        assert len(rows) == len(list(csrs.glob("*.csr"))) > 9
        installed = terminals.run([PROGRAM, "install", str(csrs), "--config", str(config)])
    finally:
        shutil.rmtree(csrs)
    assert installed.exit_code == 4
    assert installed.text.count("there is no certificate for its key") == 1
