"""
The tree that the offline file installs below /opt/ca-bridge, and the packages in /usr/lib.

    bin/ca-bridge            finds a Python and starts the program
    lib/any                  modules for every Python
    lib/cp311 …              modules compiled for one Python
    share                    example settings, roles, units; manual pages, completion
    bom.cdx.json             bill of materials (CycloneDX)
    allowed_signers          the keys that may sign the next version
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
    """A file's content, and whether it is executable; the tree keeps no other attributes."""

    data: bytes
    executable: bool = False

    @property
    def mode(self) -> int:
        """Root may write, all users may read."""
        return 0o755 if self.executable else 0o644


Tree = dict[str, File]


def build(project: Wheel, wheels: Iterable[Wheel], platform: str, epoch: int) -> Tree:
    """All files but the manifest, by path."""
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
    """Add the offline file's installer and uninstaller; packages need neither."""
    modules = [HERE / "__init__.py", *(HERE / "installer").glob("*.py")]
    added = {f"libexec/release/{path.relative_to(HERE)}": File(path.read_bytes()) for path in modules}
    return {**tree, **added, "bin/uninstall": File(_shell("uninstall.sh"), executable=True)}


def with_manifest(tree: Tree, project: Wheel, wheels: Iterable[Wheel], platform: str) -> Tree:
    """Add `manifest.json`, with which the installer verifies each file."""
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
    """A shell script, with the code that finds a Python filled in."""
    text = (HERE / name).read_text(encoding="utf-8")
    found = (HERE / "find-python.sh").read_text(encoding="utf-8").replace("@PYTHONS@", " ".join(PYTHONS))
    return text.replace("@FIND_PYTHON@\n", found).encode()


def head(names: Mapping[str, str]) -> bytes:
    """The beginning of the offline file, with its placeholders filled in."""
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
