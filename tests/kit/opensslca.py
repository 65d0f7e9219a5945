"""A CA desk with `openssl ca`, as a test needs it."""

from __future__ import annotations

from pathlib import Path

from bridge.node import sample_pki


def make_ca_directory(directory: Path, certificate_pem: bytes, key_pem: bytes, passphrase: str | None = None) -> Path:
    """`ca.crt`, `ca.key` (encrypted when there is a passphrase), `index.txt`, `index.txt.attr` and `newcerts`."""
    return sample_pki.create_openssl_directory(directory, certificate_pem, key_pem, passphrase)
