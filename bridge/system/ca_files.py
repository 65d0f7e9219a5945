"""A CA's certificates in a file, as kubeadm lays them down."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from cryptography import x509

from bridge.pki.certificates import load_pem_certificates
from bridge.system.paths import UnreadableError, read


class NoCaFileError(UnreadableError):
    """There is no such file."""


def read_ca_file(path: Path) -> tuple[x509.Certificate, ...]:
    """
    The certificates of a CA file; the first is kubeadm's trust anchor.

    Raises:
        NoCaFileError: There is no such file.
        UnreadableError: It can't be read, or holds no certificate; the text says why.
    """
    data = read(path)
    if data is None:
        raise NoCaFileError(os.strerror(errno.ENOENT))
    try:
        return tuple(load_pem_certificates(data))
    except ValueError as e:
        raise UnreadableError(str(e)) from None
