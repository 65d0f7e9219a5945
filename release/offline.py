"""
`python -m release.offline`: the file that installs ca-bridge where there is no network; `scripts/offline` calls it.

It is a shell script that finds a Python, with a zip archive behind it, which Python runs as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from release import tree
from release.wheels import PLATFORMS, BuildError, Wheel, proven

#: What Python runs of the archive.
_MAIN = b"""import sys
sys.path.insert(0, sys.argv[0] + "/tree/libexec")
from release.installer import command
command.main()
"""
_ZIP_BEGINS = 315532800  # 1980, in seconds: a zip archive knows no earlier time


def write(files: tree.Tree, names: dict[str, str], epoch: int, output: Path) -> str:
    """
    Write the file, whole or not at all.

    Args:
        files: All of the tree.
        names: `VERSION`, `PLATFORM` and `FILE`, for the head.
        epoch: The commit's time, in seconds.
        output: Where.

    Returns:
        Its SHA-256 digest.
    """
    buffer = io.BytesIO()
    when = time.gmtime(max(epoch, _ZIP_BEGINS))[:6]
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        _add(archive, "__main__.py", tree.File(_MAIN), when)
        for path, file in sorted(files.items()):
            _add(archive, f"tree/{path}", file, when)
    archive_digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    data = tree.head({**names, "DIGEST": archive_digest}) + buffer.getvalue()
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.chmod(0o755)
    temporary.replace(output)
    return hashlib.sha256(data).hexdigest()


def _add(archive: zipfile.ZipFile, path: str, file: tree.File, when: tuple[int, ...]) -> None:
    info = zipfile.ZipInfo(path, when)  # type: ignore[arg-type]  # six numbers
    info.create_system = 3  # Unix, wherever it is built
    info.external_attr = (0o100000 | file.mode) << 16
    archive.writestr(info, file.data, zipfile.ZIP_DEFLATED)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, build, and print the name and digest of what was built."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--project", type=Path, required=True, help="the project's wheel")
    parser.add_argument("--wheels", type=Path, required=True, help="a directory with all others")
    parser.add_argument("--lock", type=Path, required=True)
    parser.add_argument("--platform", choices=PLATFORMS, required=True)
    parser.add_argument("--epoch", type=int, required=True, help="the commit's time, in seconds")
    parser.add_argument("--output", type=Path, required=True, help="a directory")
    given = parser.parse_args(arguments)
    try:
        project = Wheel.read(given.project)
        wheels = proven(given.wheels, given.lock.read_text(encoding="utf-8"))
        files = tree.with_installer(tree.build(project, wheels, given.platform, given.epoch))
        files = tree.with_manifest(files, project, wheels, given.platform)
    except BuildError as e:
        raise SystemExit(f"error: {e}") from e
    output = given.output / f"ca-bridge-{project.version}-linux-{given.platform}.run"
    names = {"VERSION": project.version, "PLATFORM": given.platform, "FILE": output.name}
    print(f"{write(files, names, given.epoch, output)}  {output.name}")


if __name__ == "__main__":
    main()
