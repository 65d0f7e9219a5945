"""`python -m release`: build files of a release for one platform, for `scripts/offline` and `scripts/release`."""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from release import debian, offline, package, rpm, tree
from release.wheels import PLATFORMS, BuildError, Wheel, proven

KINDS = ("run", "deb", "rpm", "bom")


def build(given: argparse.Namespace) -> list[Path]:
    """Build each requested kind from one tree."""
    project, platform, epoch = Wheel.read(given.project), given.platform, given.epoch
    wheels = proven(given.wheels, given.lock.read_text(encoding="utf-8"))
    base = tree.build(project, wheels, platform, epoch)
    built = []
    name = f"ca-bridge-{project.version}-linux-{platform}"
    if "run" in given.kind:
        files = tree.with_manifest(tree.with_installer(base), project, wheels, platform)
        built.append(given.output / f"{name}.run")
        names = {"VERSION": project.version, "PLATFORM": platform, "FILE": built[-1].name}
        offline.build(files, names, epoch, built[-1])
    if "bom" in given.kind:
        built.append(given.output / f"{name}.cdx.json")
        built[-1].write_bytes(base["bom.cdx.json"].data)
    for kind, module in (("deb", debian), ("rpm", rpm)):
        if kind in given.kind:
            with tempfile.TemporaryDirectory() as scratch:
                layout = package.layout(base, project)
                built.append(module.build(layout, platform, epoch, Path(scratch), given.output))
    return built


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, build, and print each file's digest and name."""
    parser = argparse.ArgumentParser(prog="python -m release", description=__doc__)
    parser.add_argument("kind", choices=KINDS, nargs="+")
    parser.add_argument("--project", type=Path, required=True, help="the project's wheel")
    parser.add_argument("--wheels", type=Path, required=True, help="a directory with all other wheels")
    parser.add_argument("--lock", type=Path, required=True)
    parser.add_argument("--platform", choices=PLATFORMS, required=True)
    parser.add_argument("--epoch", type=int, required=True, help="the commit's time, in seconds")
    parser.add_argument("--output", type=Path, required=True, help="the directory for the files")
    try:
        built = build(parser.parse_args(arguments))
    except BuildError as e:
        raise SystemExit(f"error: {e}") from e
    for path in built:
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}")


if __name__ == "__main__":
    main()
