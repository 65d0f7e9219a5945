"""
The file that installs ca-bridge without a network.

It is a shell script that finds a Python, followed by a zip archive that Python runs directly.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
import zipfile
from pathlib import Path

from release import tree

#: The part of the archive that Python runs.
_MAIN = b"""import sys
sys.path.insert(0, sys.argv[0] + "/tree/libexec")
from release.installer import command
command.main()
"""
_ZIP_BEGINS = 315532800  # 1980, in seconds: the earliest time in a zip archive


def build(files: tree.Tree, names: dict[str, str], epoch: int, output: Path) -> None:
    """Write the file completely or not at all."""
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


def _add(archive: zipfile.ZipFile, path: str, file: tree.File, when: tuple[int, ...]) -> None:
    info = zipfile.ZipInfo(path, when)  # type: ignore[arg-type]  # six numbers
    info.create_system = 3  # Unix, on any build machine
    info.external_attr = (0o100000 | file.mode) << 16
    archive.writestr(info, file.data, zipfile.ZIP_DEFLATED)
