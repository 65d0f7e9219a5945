"""Which certificates of a CA count for what it signs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509

from bridge.contract import Backend, BackendSettings, Issued, SignRequest
from bridge.errors import BackendRefusedError, SettingsError
from bridge.gateway.authorities import AuthorityOfSigners, read_anchors
from bridge.pki.certificates import pem
from bridge.settings import load
from bridge.specs import PODS
from tests.kit import issuing
from tests.kit.forged import validity, with_field
from tests.kit.issuing import Signer


def backend_that_shows(*certificates: x509.Certificate) -> Backend:
    """It signs nothing; without certificates it can't show any."""

    class Silent(Backend):
        def sign(self, request: SignRequest) -> Issued:
            raise NotImplementedError(request)

    class Shows(Silent):
        def issuers(self) -> Sequence[x509.Certificate]:
            return certificates

    return Shows() if certificates else Silent()


def authority_of(directory: Path, root: Signer, *shown: x509.Certificate) -> AuthorityOfSigners:
    """The CA of a cluster that trusts `root`; it shows these certificates when it is asked for its own."""
    (directory / "ca.crt").write_bytes(pem(root.certificate))
    backend = backend_that_shows(*shown)
    ca: Any = SimpleNamespace(authority="ca", label="ca", open=lambda: backend, settings=BackendSettings())
    return AuthorityOfSigners(ca, load.parse(f'[node]\npki_dir = "{directory}"\n'), [])


def test_a_cas_other_certificates_shorten_no_life(tmp_path: Path) -> None:
    """
    Old ones of its own, other roots and one of the year 0 are shown by a CA that has been renewed (certmonger's helpers,
    EST's roll-over); what ends first on the way from the one that signs counts.
    """
    now = issuing.NOW
    root, other = Signer.make("root"), Signer.make("other", end=now - timedelta(days=1))
    ours, old = (Signer.make("ours", parent=root, end=now + timedelta(days=days)) for days in (50, 2))
    odd = with_field(ours.certificate, 4, validity(b"20200101000000Z", b"00001231235959Z"))
    year_0 = x509.load_pem_x509_certificate(odd.encode())
    above = (root.certificate, old.certificate, other.certificate, year_0)
    for first, wanted in ((ours, ours), (old, old), (root, root)):
        authority = authority_of(tmp_path, root, first.certificate, *above)
        assert authority.check(now) == []
        assert authority.end() == wanted.certificate.not_valid_after_utc
    for first_shown in (year_0, other.certificate):  # whose answers are refused
        authority = authority_of(tmp_path, root, first_shown, *above)
        with pytest.raises(BackendRefusedError, match="wanted the CA of ca"):
            authority.check(now)
        assert authority.end() == root.certificate.not_valid_after_utc


@pytest.mark.attack("E12")
@pytest.mark.parametrize("file", ["ca.crt", "front-proxy-ca.crt", "etcd/ca.crt"])
def test_the_ca_of_pods_shares_no_key_with_a_ca_of_the_cluster(tmp_path: Path, file: str) -> None:
    """Its certificates would be users of the API server, which takes their names from these CAs; a name of its own is no help."""
    of_the_cluster, own = Signer.make("kubernetes"), Signer.make("pods")
    same_key = Signer.make("pods", key=of_the_cluster.key)
    node = load.parse(f'[node]\npki_dir = "{tmp_path}"\n').node
    (tmp_path / "etcd").mkdir()
    (tmp_path / file).write_bytes(pem(of_the_cluster.certificate))
    (tmp_path / "pods.crt").write_bytes(pem(own.certificate))
    assert read_anchors(node, PODS) == (own.certificate,)
    for shared in (of_the_cluster, same_key):
        (tmp_path / "pods.crt").write_bytes(pem(own.certificate, shared.certificate))
        with pytest.raises(SettingsError, match="a CA for pods that has its own key"):
            read_anchors(node, PODS)


def test_of_two_roots_for_pods_the_one_that_signs_counts(tmp_path: Path) -> None:
    """Where the CA does not tell which of them signs, no request is for longer than either of them lives."""
    now = datetime.now(UTC)
    ended, old, new = (
        Signer.make(f"root {days}", begin=now - timedelta(days=50), end=now + timedelta(days=days))
        for days in (-2, 2, 99)
    )
    (tmp_path / "pods.crt").write_bytes(pem(ended.certificate, new.certificate, old.certificate))
    for backend, wanted in (
        (backend_that_shows(), old),
        (backend_that_shows(new.certificate), new),
        (backend_that_shows(old.certificate), old),
    ):
        ca: Any = SimpleNamespace(authority="pods", label="pods", open=lambda: backend, settings=BackendSettings())  # noqa: B023
        authority = AuthorityOfSigners(ca, load.parse(f'[node]\npki_dir = "{tmp_path}"\n'), [])
        assert authority.check(now) == []
        assert authority.end() == wanted.certificate.not_valid_after_utc
