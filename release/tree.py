"""
The tree that is installed, whatever brings it: below /opt/ca-bridge by the offline file, in /usr/lib by the packages.

    bin/ca-bridge            finds a Python and starts the program
    lib/any                  what is good for each Python
    lib/cp311 …              what was compiled for one
    share                    example settings, roles, units; manual pages, completion
    bom.cdx.json             what is in it (CycloneDX)
    allowed_signers          whose signature the next version must have
    manifest.json            version, platform, and the digest of each other file
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from release import bill
from release.wheels import PYTHONS, BuildError, Wheel

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class File:
    """Content, and whether it can be executed; nothing else of a file is ours to keep."""

    data: bytes
    executable: bool = False

    @property
    def mode(self) -> int:
        """Root may write, all users may read."""
        return 0o755 if self.executable else 0o644


Tree = dict[str, File]


def build(project: Wheel, wheels: Iterable[Wheel], platform: str, epoch: int) -> Tree:
    """Everything but the manifest, by path."""
    wheels = sorted([project, *wheels], key=lambda wheel: wheel.path.name)
    tree: Tree = {}
    for wheel in wheels:
        for path, data, executable in wheel.files():
            _add(tree, _placed(wheel, path), File(data, executable))
    tree["bin/ca-bridge"] = File(_shell("ca-bridge.sh"), executable=True)
    tree["lib/start.py"] = File((HERE / "start.py").read_bytes())
    tree["allowed_signers"] = File((HERE / "allowed_signers").read_bytes())
    tree["bom.cdx.json"] = File(bill.of(project, wheels, platform, epoch))
    return tree


def with_installer(tree: Tree) -> Tree:
    """With what the offline file installs and removes it by; packages leave that to their package manager."""
    modules = [HERE / "__init__.py", *(HERE / "installer").glob("*.py")]
    added = {f"libexec/release/{path.relative_to(HERE)}": File(path.read_bytes()) for path in modules}
    return {**tree, **added, "bin/uninstall": File(_shell("uninstall.sh"), executable=True)}


def with_manifest(tree: Tree, project: Wheel, wheels: Iterable[Wheel], platform: str) -> Tree:
    """With `manifest.json`, by which the installer proves each file."""
    glibc = max(wheel.glibc for wheel in wheels)
    manifest = {
        "version": project.version,
        "platform": platform,
        "glibc": list(glibc),
        "pythons": list(PYTHONS),
        "executable": sorted(path for path, file in tree.items() if file.executable),
        "files": {path: hashlib.sha256(file.data).hexdigest() for path, file in sorted(tree.items())},
    }
    return {**tree, "manifest.json": File(json.dumps(manifest, indent=1).encode() + b"\n")}


def _shell(name: str) -> bytes:
    """One of the shell scripts, with how a Python is found in it."""
    text = (HERE / name).read_text(encoding="utf-8")
    found = (HERE / "find-python.sh").read_text(encoding="utf-8").replace("@PYTHONS@", " ".join(PYTHONS))
    return text.replace("@FIND_PYTHON@\n", found).encode()


def head(names: Mapping[str, str]) -> bytes:
    """What the offline file begins with, the placeholders filled in."""
    text = _shell("head.sh").decode()
    for name, value in names.items():
        text = text.replace(f"@{name}@", value)
    return text.encode()


def _placed(wheel: Wheel, path: str) -> str:
    first, _, rest = path.partition("/")
    if not first.endswith(".data"):
        return f"lib/{wheel.place}/{path}"
    kind, _, inner = rest.partition("/")
    if kind == "data" and inner.startswith("share/"):
        return inner
    raise BuildError(f"{wheel.path.name}: wanted modules and our own data, found {path}")


def _add(tree: Tree, path: str, file: File) -> None:
    if tree.setdefault(path, file) != file:
        raise BuildError(f"wanted one file {path}, found two different ones")
