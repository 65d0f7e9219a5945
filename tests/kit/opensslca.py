"""A CA desk with `openssl ca`, as a test needs it."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path

from bridge.node import sample_pki


def make_ca_directory(directory: Path, certificate_pem: bytes, key_pem: bytes, passphrase: str | None = None) -> Path:
    """`ca.crt`, `ca.key` (encrypted when there is a passphrase), `index.txt`, `index.txt.attr` and `newcerts`."""
    return sample_pki.create_openssl_directory(directory, certificate_pem, key_pem, passphrase)


REAL = shutil.which("openssl")


def program(folder: Path, script: str) -> str:
    """
    An openssl that does something else around the real one, which it finds as `$REAL`.

    It is started in the working folder: `database/` and `newcerts/` are the CA's.
    """
    path = folder / "openssl"
    path.write_text(f"#!/bin/bash\nREAL={REAL}\n{textwrap.dedent(script)}\n")
    path.chmod(0o755)
    return str(path)
