"""The `openssl ca` backend against the real openssl."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509

from backends.openssl import OpensslBackend, OpensslSettings
from bridge.testing import BackendConformance, TestCA
from tests.kit.opensslca import make_ca_directory

CA = TestCA.make()


class TestConformance(BackendConformance):
    """The suite that every backend passes."""

    unsupported = frozenset({"close"})

    @pytest.fixture(scope="class")
    @classmethod
    def ca(cls) -> TestCA:
        """The CA in the directory."""
        return CA

    @pytest.fixture(scope="class")
    @classmethod
    def live(cls, ca: TestCA) -> dict[str, x509.Certificate]:
        """The certificates to renew, by kubeadm's name."""
        return {spec.name: ca.leaf(spec) for spec in cls.specs}

    @pytest.fixture
    def backend(self, ca: TestCA, tmp_path: Path) -> OpensslBackend:
        """A directory as a CA desk has it."""
        directory = make_ca_directory(tmp_path / "ca", ca.certificate_pem, ca.key_pem)
        return OpensslBackend.from_settings(OpensslSettings(dir=directory))

    @pytest.fixture
    def dead_backend(self, ca: TestCA, tmp_path: Path) -> Iterator[OpensslBackend]:
        """Another process holds the lock of the database, as long as the test lasts."""
        directory = make_ca_directory(tmp_path / "locked", ca.certificate_pem, ca.key_pem)
        lock = os.open(directory / ".ca-bridge.lock", os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield OpensslBackend.from_settings(OpensslSettings(dir=directory, timeout=timedelta(seconds=0.3)))
        os.close(lock)
