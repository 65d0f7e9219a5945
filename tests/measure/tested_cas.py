"""
The versions of the CAs that the tests sign with, asked of the programs themselves.

`python -m tests.measure.tested_cas [--docs]` prints them; with `--docs` they go into the tables of docs/first-renewal.md.
Needs the programs of `tests/kit/binaries.sh`, and for Debian's the packages that `.ci/run` installs.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.kit import programs

DOCUMENT = Path(__file__).parents[2] / "docs/first-renewal.md"
_HEADING = "### Tested CAs\n"
_MODULES = programs.KIT / "modules"


@dataclass(frozen=True, kw_only=True)
class Tested:
    """One CA of the page."""

    row: str  #: The row's first cell.
    version: Callable[[], str]
    is_pinned: bool = True  #: Whatever the machine: by a lock file, or by what `tests/kit/binaries.sh` builds.


def _said(pattern: str, *words: str | Path) -> str:
    """What a program says of its version."""
    run = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True)
    found = re.search(pattern, run.stdout + run.stderr)
    if found is None:
        raise SystemExit(f"{words[0]}: wanted a version, found {run.stdout[:100]!r}")
    return found[1]


def _module(name: str, path: str) -> str:
    """The version of a Go module of the kit, whose program does not say it."""
    [line] = [one for one in (_MODULES / name / "go.mod").read_text().splitlines() if f"{path} v" in one]
    return line.split()[-1].removeprefix("v")


def _openbao() -> str:
    return _said(r"v(\S+)", Path(sys.executable).with_name("bao"), "version")


def _debian() -> str:
    return _said(r"(?m)^VERSION_ID=\"(\d+)", "cat", "/etc/os-release")


def _of_debian(version: Callable[[], str]) -> Callable[[], str]:
    return lambda: f"{version()} (Debian {_debian()})"


def _openssl() -> str:
    return _said(r"OpenSSL (\S+)", "openssl", "version")


def _softhsm() -> str:
    softhsm = _said(r"(\S+)", programs.require("softhsm2-util"), "--version")
    return f"SoftHSM {softhsm}, OpenSSL {_openssl()}"


def _certmonger() -> str:
    return _said(r"([^-]+)", "dpkg-query", "-W", "-f", "${Version}", "certmonger")


def _kubernetes() -> str:
    return _said(r"v(\d+\.\d+)", programs.require("kubeadm"), "version", "-o", "short")


TESTED = (
    Tested(row="OpenBao", version=_openbao),
    Tested(row="cfssl: `cfssl serve`, `multirootca`", version=lambda: _said(r"Version: (\S+)", programs.require("cfssl"), "version")),
    Tested(row="`openssl ca`, its key in a file", version=_of_debian(_openssl), is_pinned=False),
    Tested(row="`openssl ca`, its key in an HSM", version=_of_debian(_softhsm), is_pinned=False),
    Tested(row="smallstep step-ca", version=lambda: _said(r"CA/(\S+)", programs.require("step-ca"), "version")),
    *(
        Tested(row=name, version=_of_debian(_certmonger), is_pinned=False)
        for name in ("certmonger's local CA", "Dogtag", "FreeIPA", "SCEP")
    ),
    Tested(row="a site's script over `openssl x509`", version=_of_debian(_openssl), is_pinned=False),
    Tested(row="GlobalSign's `estserver` with its mock CA", version=lambda: _module("est", "github.com/globalsign/est")),
    Tested(
        row="cert-manager's CA issuer, by its CSR controllers",
        version=lambda: f"{_module('cert-manager', 'github.com/cert-manager/cert-manager')}, Kubernetes {_kubernetes()}",
    ),
    Tested(row="kube-controller-manager with a CA's key", version=lambda: f"Kubernetes {_kubernetes()}"),
)  # fmt: skip


def in_page(text: str) -> dict[str, str]:
    """The page's versions by the first cell of their rows: the cell before the last one."""
    lines = [line for line in text.partition(_HEADING)[2].splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[-2] for row in rows}


def written(text: str, versions: Mapping[str, str]) -> str:
    """The page with these versions."""
    before, heading, tables = text.partition(_HEADING)
    for row, version in versions.items():
        pattern = rf"(?m)^(\| {re.escape(row)} \|(?:[^|\n]*\|)*?) [^|\n]* (\|[^|\n]*\|)$"
        found = re.search(pattern, tables)
        if found is None:
            raise SystemExit(f"{DOCUMENT.name}: wanted a row for {row}, found none")
        tables = tables.replace(found[0], f"{found[1]} {version} {found[2]}")
    return before + heading + tables


def main() -> None:
    """Ask, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.measure.tested_cas")
    parser.add_argument("--docs", action="store_true")
    options = parser.parse_args()
    versions = {one.row: one.version() for one in TESTED}
    for row, version in versions.items():
        print(f"{row}: {version}")
    if options.docs:
        DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8"), versions), encoding="utf-8")


if __name__ == "__main__":
    main()
