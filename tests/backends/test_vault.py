"""The Vault backend against a real OpenBao."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509

from backends.vault import VaultAuth, VaultBackend, VaultSettings
from bridge import setup_vault
from bridge.contract import Secret
from bridge.testing import BackendConformance, TestCA
from tests.kit import openbao


@pytest.fixture(scope="module")
def bao() -> Iterator[openbao.OpenBao]:
    with openbao.dev_server() as server:
        yield server


def token_file(directory: Path, token: str) -> VaultAuth:
    """Method `token`, with the token in a file, as an editor leaves it."""
    path = directory / "token"
    path.write_text(f"{token}\n")
    return VaultAuth(token=Secret("file", str(path)))


class TestConformance(BackendConformance):
    """The suite that every backend passes, with the rights of the printed policy and no others."""

    unsupported = frozenset({"sign_many"})

    @pytest.fixture(scope="module")
    @classmethod
    def ca(cls) -> TestCA:
        """The CA in the engine."""
        return TestCA.make()

    @pytest.fixture(scope="module")
    @classmethod
    def live(cls, ca: TestCA) -> dict[str, x509.Certificate]:
        """The certificates to renew."""
        return {spec.name: ca.leaf(spec) for spec in cls.specs}

    @pytest.fixture(scope="module")
    @classmethod
    def mount(cls, bao: openbao.OpenBao, ca: TestCA, live: dict[str, x509.Certificate]) -> str:
        """An engine with that CA, the printed roles, and a policy of the same name."""
        bao.add_ca("conformance", ca.certificate_pem, ca.key_pem)
        roles = bao.add_kubeadm_roles("conformance", live)
        bao.add_policy("conformance", setup_vault.policy("conformance", roles))
        return "conformance"

    @pytest.fixture
    def backend(self, bao: openbao.OpenBao, mount: str, tmp_path: Path) -> Iterator[VaultBackend]:
        """With a token that has this policy and not even `default`."""
        auth = token_file(tmp_path, bao.token(mount, no_default_policy=True))
        backend = VaultBackend.from_settings(VaultSettings(url=bao.url, mount=mount, auth=auth))
        yield backend
        backend.close()

    @pytest.fixture
    def dead_backend(self, tmp_path: Path) -> VaultBackend:
        """Nobody listens."""
        url = f"http://127.0.0.1:{openbao.free_port()}"
        auth = token_file(tmp_path, "unused")
        return VaultBackend.from_settings(VaultSettings(url=url, auth=auth, timeout=timedelta(seconds=2)))
