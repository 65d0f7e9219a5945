"""
Where `demo` plays: a control plane in kubeadm's shape without CA keys, the company's CA, and a careless one.

`demo` also runs the program from here, as a process that may end in the middle.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from bridge.errors import BridgeError
from bridge.node import sample_pki

DAYS_LEFT = 20  # less than renewal.before, so that everything is due
_PASSPHRASE = "correct horse battery staple"  # noqa: S105 (of a CA that lives for a minute)

_SETTINGS = """\
[node]
pki_dir = "{base}/kubernetes/pki"
kubeconfig_dir = "{base}/kubernetes"
state_dir = "{base}/state"
name = "cp-1"

[backend.desk]
type = "openssl"
passphrase_file = "{base}/passphrase"

[authority.ca]
backend = "desk"
dir = "{base}/corporate-ca/ca"

[authority.etcd-ca]
backend = "desk"
dir = "{base}/corporate-ca/etcd-ca"

[authority.front-proxy-ca]
backend = "desk"
dir = "{base}/corporate-ca/front-proxy-ca"
"""

_CARELESS_SETTINGS = """\
[node]
pki_dir = "{base}/kubernetes/pki"
kubeconfig_dir = "{base}/kubernetes"
state_dir = "{base}/state"
name = "cp-1"

[backend.careless]
type = "exec"
command = ["{base}/careless-ca"]

[authority.ca]
backend = "careless"
"""

#: It signs with the right key, and gives every certificate the usage of a client and no name of a host.
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


@dataclass(frozen=True, kw_only=True)
class DemoPlace:
    """A directory with all of it."""

    base: Path

    @property
    def kubernetes(self) -> Path:
        """The directory that stands for /etc/kubernetes."""
        return self.base / "kubernetes"

    @property
    def settings(self) -> Path:
        """The settings file, which names the company's CA."""
        return self.base / "config.toml"

    def contents(self) -> dict[Path, bytes]:
        """Every file of the control plane."""
        return {path: path.read_bytes() for path in sorted(self.kubernetes.rglob("*")) if path.is_file()}


@contextlib.contextmanager
def directory_for(wanted: Path | None) -> Iterator[Path]:
    """
    The one that was named, which stays, or a temporary one.

    Raises:
        BridgeError: There is something in it.
    """
    if wanted is None:
        with tempfile.TemporaryDirectory(prefix="ca-bridge-demo-") as temporary:
            yield Path(temporary)
        return
    if wanted.exists() and any(wanted.iterdir()):
        raise BridgeError(f"{wanted}: wanted an empty directory, found files in it", hint="name a new one")
    wanted.mkdir(parents=True, exist_ok=True)
    yield wanted.absolute()


def make(base: Path, now: datetime) -> DemoPlace:
    """Everything, as it is 345 days after `kubeadm init`."""
    place = DemoPlace(base=base)
    made, not_after = now - timedelta(days=365 - DAYS_LEFT), now + timedelta(days=DAYS_LEFT)
    cas = sample_pki.make(place.kubernetes, now=made, not_after=not_after)
    for name, ca in cas.items():
        directory = base / "corporate-ca" / name
        sample_pki.create_openssl_directory(directory, ca.certificate_pem, ca.key_pem, _PASSPHRASE)
    words = {"ca": shlex.quote(str(base / "corporate-ca/ca")), "passphrase": shlex.quote(str(base / "passphrase"))}
    _write(base / "passphrase", f"{_PASSPHRASE}\n", 0o600)
    _write(place.settings, _SETTINGS.format(base=base), 0o644)
    _write(base / "careless.toml", _CARELESS_SETTINGS.format(base=base), 0o644)
    _write(base / "careless-ca", _CARELESS_CA.format(**words), 0o755)
    return place


def _write(path: Path, text: str, mode: int) -> None:
    path.touch(mode=mode)
    path.write_text(text, encoding="utf-8")


def run_program() -> None:
    """
    Run the program as a process of its own, with the arguments COUNT DIRECTORY ARGUMENT….

    COUNT is `all`, or how many files below DIRECTORY it may rename before SIGKILL ends it.
    """
    from bridge.cli.app import app  # noqa: PLC0415 (only in that process)

    may_rename, below, *arguments = sys.argv[1:]
    if may_rename != "all":
        _kill_after(int(may_rename), below)
    sys.argv = ["ca-bridge", *arguments]
    app()


def _kill_after(count: int, directory: str) -> None:
    left = count

    def look(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event == "os.rename" and str(arguments[1]).startswith(f"{directory}/"):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(look)
