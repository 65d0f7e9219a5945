"""
The file that installs ca-bridge where there is no network.

It is a shell script that finds a Python, with a zip archive behind it, which Python runs as it is.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
import zipfile
from pathlib import Path

from release import tree

#: What Python runs of the archive.
_MAIN = b"""import sys
sys.path.insert(0, sys.argv[0] + "/tree/libexec")
from release.installer import command
command.main()
"""
_ZIP_BEGINS = 315532800  # 1980, in seconds: a zip archive knows no earlier time


def build(files: tree.Tree, names: dict[str, str], epoch: int, output: Path) -> None:
    """Write the file, whole or not at all."""
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
    info.create_system = 3  # Unix, wherever it is built
    info.external_attr = (0o100000 | file.mode) << 16
    archive.writestr(info, file.data, zipfile.ZIP_DEFLATED)
