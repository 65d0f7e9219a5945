"""`demo`: show the main job on a throwaway PKI, in a minute and 80 columns, with real commands."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from bridge.cli.declare import Common, command, option
from bridge.cli.options import utc_now
from bridge.cli.printing import say, say_sentence, wrapped
from bridge.diagnosis.installed import key_of
from bridge.errors import BridgeError, Exit
from bridge.node import inventory, sample_pki
from bridge.pki.certificates import pem
from bridge.specs import EKU
from bridge.system.console import doing, styled
from bridge.system.files import make_directories
from bridge.system.run_command import python_command

commands = typer.Typer()

_RUN = "from bridge.cli.demo import run_program; run_program()"
_WIDTH = 80
_INDENT = "  "
_RENAMED = 7  # of about twenty files, before the run is killed

_NEXT = (
    ("ca-bridge settings init vault", "on a control-plane node: writes a settings file with comments"),
    ("ca-bridge setup vault", "prints what the CA's administrator needs; also for cfssl, openssl, cmp, est, exec"),
    ("ca-bridge doctor", "is everything ready? requests no certificate"),
    ("ca-bridge renew", "the command for cron; `ca-bridge setup systemd --enable` makes a timer"),
)


@command(commands, "demo")
def demo(
    _: Common,
    directory: Annotated[
        Path | None, option("Keep all files in this directory. [default: a temporary directory]")
    ] = None,
) -> int:
    """
    Show the main job on a throwaway PKI: no root, no cluster, no network.

    A plan, a renewal, a bad certificate that is refused, a killed run that the next run finishes, a rollback, and the
    audit log of all of this. An `openssl ca` directory is the company's CA.
    """
    with _directory_for(directory) as base:
        with doing("making a control plane and a CA", is_plain=False):
            _make(base, utc_now())
        story = _Story(base, is_temporary=directory is None)
        story.play()
        return Exit.FAILED if story.wrong else Exit.DONE


class _Story:
    def __init__(self, base: Path, *, is_temporary: bool) -> None:
        self._base, self._kubernetes = base, base / "kubernetes"
        self._is_temporary = is_temporary
        self.wrong: list[str] = []
        self._step = 0

    def play(self) -> None:
        _say(_styled("ca-bridge: certificates of a kubeadm control plane whose CA keys are elsewhere", "heading"))
        _say(f"Everything is in {self._base}; nothing else is touched.")
        self._headline(f"The certificates expire in {_DAYS_LEFT} days, and the node has no CA key.")
        self._expect(self._command("ca-bridge plan", 4, 0) == Exit.DUE, "12 certificates are due")

        self._headline("New certificates from the company's CA: verified, then installed in one step.")
        before = self._contents()
        code = self._command("ca-bridge renew", 3, 2, until="These still run")
        count = sum(before[path] != content for path, content in self._contents().items())
        items = self._items()
        self._expect(code == Exit.DONE and count > len(items), f"{count} files were replaced")
        good = sum(map(_is_good, items))
        self._expect(good == len(items), f"`openssl verify -purpose` agrees: {good} certificates have the right usages")

        self._headline("A careless CA issues the API server a client certificate: refused.")
        before = self._contents()
        code = self._command("ca-bridge renew apiserver --config careless.toml", 4, 0)
        self._expect(code == Exit.REFUSED and self._contents() == before, f"exit code {code}; no file was changed")

        self._headline("A run is killed while it replaces files; the next run finishes its work.")
        code = self._command("ca-bridge renew all", 0, 0, renamed=str(_RENAMED))
        self._expect(code == -signal.SIGKILL, f"kill -9 after {_RENAMED} files: the node has old files and new ones")
        code, items = self._command("ca-bridge recover", 2, 0), self._items()
        paired = sum(not any(key_of(item)) for item in items)
        text = f"every key belongs to its certificate: {paired} of {len(items)}"
        self._expect(code == Exit.DONE and paired == len(items), text)

        self._headline("A rollback is one command, and is itself backed up.")
        code = self._command("ca-bridge rollback", 2, 2, until="These still run")
        same = self._contents() == before
        self._expect(code == Exit.DONE and same, "every file is as it was before the killed run")

        self._headline("The audit log records every step, and reveals any later change to the log.")
        self._command("ca-bridge audit show --name apiserver", 3, 2)
        code = self._command("ca-bridge audit verify", 1, 0)
        self._expect(code == Exit.DONE, "the hash chain of the audit log is intact")
        self._say_next()

    def _say_next(self) -> None:
        _say(_styled("\nNext", "heading"))
        if self._is_temporary:
            _say(f"{_INDENT}The directory is removed now; `ca-bridge demo --directory DIR` keeps it.")
        for line, text in _NEXT:
            _say(f"{_INDENT}{_styled(f'$ {line}', 'hint')}")
            say_sentence(text, f"{_INDENT}    ")

    def _contents(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in sorted(self._kubernetes.rglob("*")) if path.is_file()}

    def _items(self) -> Sequence[inventory.Item]:
        return inventory.read(self._kubernetes / "pki", self._kubernetes, self._kubernetes / "kubelet").items

    def _headline(self, text: str) -> None:
        self._step += 1
        _say(f"\n{_styled(str(self._step), 'number')} {_styled(text, 'heading')}")

    def _command(self, typed: str, head: int, tail: int, *, until: str = "\n", renamed: str = "all") -> int:
        """Run a command, kill it after `renamed` files, show its first and last lines, and return its exit code."""
        _say(f"{_INDENT}{_styled(f'$ {typed}', 'hint')}")
        variables = {"CA_BRIDGE_CONFIG": str(self._base / "config.toml"), "COLUMNS": str(_WIDTH - len(_INDENT))}
        with doing(f"running {typed}", is_plain=False):
            done = subprocess.run(
                python_command(_RUN, renamed, str(self._kubernetes), *typed.split()[1:]),
                cwd=self._base,
                env={**os.environ, **variables},
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        lines = done.stdout.splitlines()
        lines = [line for line in itertools.takewhile(lambda line: not line.startswith(until), lines) if line]
        last = lines[len(lines) - tail :] if tail else []
        hidden = len(lines) - head - len(last)
        for line in lines[:head] if hidden > 0 else lines:
            _say_printed(line)
        if hidden > 0 and (head or tail):
            _say(_styled(f"{_INDENT}… {hidden} more lines", "faint"))
            for line in last:
                _say_printed(line)
        return done.returncode

    def _expect(self, is_true: bool, text: str) -> None:
        if not is_true:
            self.wrong.append(text)
        _say(f"{_INDENT}{_styled('✓', 'good') if is_true else _styled('✗ FAILED:', 'error')} {text}")


def _say(text: str) -> None:
    say(text, is_styled=True)


def _styled(text: str, style: str) -> str:
    return styled(text, style, sys.stdout)


def _say_printed(line: str) -> None:
    """Print a line of the program's output, with messages in their terminal style."""
    lines = "\n".join(wrapped(f"{_INDENT}{line}", _WIDTH, len(_INDENT) + 2))
    level, colon, text = lines.partition(":")
    is_level = level.strip() in {"error", "hint", "warning"}
    _say(f"{_styled(level + colon, level.strip())}{text}" if is_level and colon else lines)


def _is_good(item: inventory.Item) -> bool:
    """Whether `openssl verify` accepts it for exactly the usages of its spec."""
    purposes, good = {EKU.SERVER_AUTH: "sslserver", EKU.CLIENT_AUTH: "sslclient"}, set()
    with tempfile.NamedTemporaryFile(suffix=".pem") as file:
        file.write(pem(item.certificates[0]))
        file.flush()
        for eku, purpose in purposes.items():
            command = ["openssl", "verify", "-CAfile", str(item.anchor_path), "-purpose", purpose, file.name]
            if subprocess.run(command, check=False, capture_output=True).returncode == 0:
                good.add(eku)
    return good == item.spec.ekus


# --- the scene: a control plane as kubeadm makes it, the company's CA, and a careless CA ---------------------------------

_DAYS_LEFT = 20  # less than renewal.before, so that everything is due
_PASSPHRASE = "correct horse battery staple"  # noqa: S105 (for a CA that lives a minute)

_NODE_SETTINGS = """\
[node]
pki_dir = "{base}/kubernetes/pki"
kubeconfig_dir = "{base}/kubernetes"
state_dir = "{base}/state"
name = "cp-1"

"""
_SETTINGS = """\
[backend.desk]
type = "openssl"
passphrase_file = "{base}/passphrase"
"""
_AUTHORITY = """
[authority.{name}]
backend = "desk"
dir = "{base}/corporate-ca/{name}"
"""

_CARELESS_SETTINGS = """\
[backend.careless]
type = "exec"
command = ["{base}/careless-ca"]

[authority.ca]
backend = "careless"
"""

#: It signs with the right key, but gives every certificate clientAuth and no SAN.
_CARELESS_CA = """\
#!/bin/sh
case ${{CERTMONGER_OPERATION:-}} in
  FETCH-ROOTS) echo "careless CA"; cat {ca}/ca.crt; exit 0 ;;
  SUBMIT) ;;
  *) exit 6 ;;
esac
work=$(mktemp -d) || exit 3
trap 'rm -rf "$work"' EXIT
printf '%s\\n' "$CERTMONGER_CSR" >"$work/csr"
printf 'keyUsage=critical,digitalSignature,keyEncipherment\\nextendedKeyUsage=clientAuth\\n' >"$work/ext"
openssl x509 -req -in "$work/csr" -CA {ca}/ca.crt -CAkey {ca}/ca.key -passin file:{passphrase} \\
  -set_serial "0x$(openssl rand -hex 8)" -days 365 -extfile "$work/ext" 2>/dev/null
"""


@contextlib.contextmanager
def _directory_for(wanted: Path | None) -> Iterator[Path]:
    """Yield the named directory, which must be empty and is kept, or a temporary one."""
    if wanted is None:
        with tempfile.TemporaryDirectory(prefix="ca-bridge-demo-") as temporary:
            yield Path(temporary)
        return
    if wanted.exists() and any(wanted.iterdir()):
        raise BridgeError(f"{wanted}: wanted an empty directory, found files in it", hint="name a new directory")
    make_directories(wanted)
    yield wanted.absolute()


def _make(base: Path, now: datetime) -> None:
    """Make all files, as they are 345 days after `kubeadm init`."""
    made, not_after = now - timedelta(days=365 - _DAYS_LEFT), now + timedelta(days=_DAYS_LEFT)
    cas = sample_pki.make(base / "kubernetes", now=made, not_after=not_after)
    for name, ca in cas.items():
        directory = base / "corporate-ca" / name
        sample_pki.create_openssl_directory(directory, ca.certificate_pem, ca.key_pem, _PASSPHRASE)
    words = {"ca": shlex.quote(str(base / "corporate-ca/ca")), "passphrase": shlex.quote(str(base / "passphrase"))}
    _write(base / "passphrase", f"{_PASSPHRASE}\n", 0o600)
    authorities = "".join(_AUTHORITY.format(base=base, name=name) for name in cas)
    _write(base / "config.toml", (_NODE_SETTINGS + _SETTINGS).format(base=base) + authorities, 0o644)
    _write(base / "careless.toml", (_NODE_SETTINGS + _CARELESS_SETTINGS).format(base=base), 0o644)
    _write(base / "careless-ca", _CARELESS_CA.format(**words), 0o755)


def _write(path: Path, text: str, mode: int) -> None:
    path.touch(mode=mode)
    path.write_text(text, encoding="utf-8")


def run_program() -> None:
    """Run the program with the arguments COUNT (`all`, or how many renames until SIGKILL) DIRECTORY ARGUMENT…."""
    from bridge.cli.app import app  # noqa: PLC0415 (only in this process)

    may_rename, below, *typed = sys.argv[1:]
    if may_rename != "all":
        left = iter(range(int(may_rename)))

        def look(event: str, arguments: tuple[object, ...]) -> None:
            is_below = event == "os.rename" and str(arguments[1]).startswith(f"{below}/")
            if is_below and next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(look)
    sys.argv = ["ca-bridge", *typed]
    app()
