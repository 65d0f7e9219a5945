"""A CA desk with `openssl ca`, as a test needs it."""

from __future__ import annotations

from pathlib import Path

from bridge import setup_openssl


def make_ca_directory(directory: Path, certificate_pem: bytes, key_pem: bytes, passphrase: str | None = None) -> Path:
    """`ca.crt`, `ca.key` (encrypted when there is a passphrase), `index.txt`, `index.txt.attr` and `newcerts`."""
    return setup_openssl.create_directory(directory, certificate_pem, key_pem, passphrase)
