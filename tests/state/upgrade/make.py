"""
Make `node.tar.gz`: a node as version 7673d04 of this repository left it in the middle of everything.

An installation is interrupted at its commit point, another is not proven, a request waits for its CA, a hook is to run;
there are backups and an audit log. Made once, by that version's own code:

    git archive 7673d04 | tar -x -C OLD
    cd OLD && python REPOSITORY/tests/state/upgrade/make.py

Its certificates are good for twenty years. Where paths stand in its files, `@ROOT@` stands for the directory that it is
unpacked to.
"""

from __future__ import annotations

import io
import os
import sys
import tarfile
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path.cwd()))

from bridge import health, install, renew  # type: ignore[attr-defined]  # of that version
from bridge.settings import parse  # type: ignore[attr-defined]
from tests.kit import approval, opensslca
from tests.kit.pki import Pki, handmade_pki

YEAR = timedelta(days=365)
NOW = datetime.now(UTC)
HERE = Path(__file__).parent
PLACEHOLDER = "@ROOT@"

SETTINGS = """\
[node]
pki_dir = "{root}/node/etc/kubernetes/pki"
kubeconfig_dir = "{root}/node/etc/kubernetes"
state_dir = "{root}/state"
[renewal]
validity = "9000d"
[hooks]
success = "sh -c 'test -e {root}/well && echo success >>{root}/log'"
failure = "sh -c 'test -e {root}/well && echo failure >>{root}/log'"
[restart]
method = "command"
on_failure = "keep"
prove_for = "1s"
timeout = "5s"
[restart.commands]
kube-scheduler = "sh -c 'test -e {root}/well && echo kube-scheduler >>{root}/log'"
[cluster]
neighbours = "ignore"
lease = false
[backend.desk]
type = "openssl"
[backend.people]
type = "approval"
dir = "{root}/desk"
[authority.ca]
backend = "desk"
dir = "{root}/cas/ca"
[authority.front-proxy-ca]
backend = "people"
"""


class Quiet:
    """Show no progress."""

    def signing(self, *_: object) -> None:
        """Not shown."""

    def signed(self, *_: object) -> None:
        """Not shown."""

    def note(self, *_: object) -> None:
        """Not shown."""


class CutOffError(BaseException):
    """Stands for the end of the process."""


def cut_off(*_: object) -> None:
    """In the place of the swap."""
    raise CutOffError


def make(root: Path) -> None:
    """All that the docstring of this file says, below `root`."""
    os.uname = lambda: os.uname_result(("Linux", "cp-1", "6", "#1", "x86_64"))
    sys.argv = ["ca-bridge", "renew"]
    health.trouble = lambda *_: None  # there is no cluster
    node: Pki = handmade_pki(root / "node", now=NOW, not_after=NOW + 20 * YEAR, ca_not_after=NOW + 40 * YEAR)
    opensslca.make_ca_directory(root / "cas/ca", *node.ca_pem("ca"))
    (root / "desk").mkdir()
    approval.install_plugin(root / "site")
    sys.path.insert(0, str(root / "site"))
    (root / "config.toml").write_text(SETTINGS.format(root=root))
    settings = parse((root / "config.toml").read_text())

    def run(name: str, *, restarts: bool = True) -> int:
        return int(renew.run(settings, (name,), lambda: datetime.now(UTC), Quiet(), restarts=restarts)[0].exit_code)

    (root / "well").touch()
    assert run("scheduler.conf") == 0
    assert run("front-proxy-client") == 4
    (root / "well").unlink()
    assert run("scheduler.conf") == 6  # its component was restarted a moment ago
    install._forward = cut_off
    try:
        run("admin.conf", restarts=False)
    except CutOffError:
        return
    raise AssertionError("wanted to be cut off")


def pack(root: Path, archive: Path) -> None:
    """Everything but the plug-in, with the placeholder in the place of the directory."""
    with tarfile.open(archive, "w:gz") as tar:
        for path in sorted(root.rglob("*")):
            name = str(path.relative_to(root))
            if not path.is_file() or name.startswith("site/") or name == "log":
                continue
            data = path.read_bytes()
            if str(root).encode() in data:
                assert path.suffix in (".json", ".toml", ".cnf"), path
                data = data.replace(str(root).encode(), PLACEHOLDER.encode())
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), path.stat().st_mode & 0o777
            tar.addfile(entry, io.BytesIO(data))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        make(Path(directory))
        pack(Path(directory), HERE / "node.tar.gz")
