"""A new CA first in ca.crt: nothing is installed by halves."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from bridge.errors import Exit
from bridge.pki.certificates import pem
from bridge.pki.csr import key_pem
from bridge.renewal import NotReadyError, renew
from bridge.renewal.selection import ForeignIdentityError, RunOptions
from bridge.renewal.verify_and_install import Result
from bridge.settings.tables import Settings
from tests.kit.issuing import Signer
from tests.kit.pki import Pki, handmade_pki
from tests.kit.renewing import Quiet, settings_for

OF_OTHER_CAS = {"etcd-server", "etcd-peer", "etcd-healthcheck-client", "apiserver-etcd-client", "front-proxy-client"}


@pytest.fixture
def node(tmp_path: Path) -> Pki:
    """Nothing of it is due."""
    return handmade_pki(tmp_path / "node")


@pytest.fixture
def new() -> Signer:
    """The CA that is to replace the old one, of the same name, as kubeadm's are."""
    now = datetime.now(UTC)
    return Signer.make(begin=now - timedelta(days=1), end=now + timedelta(days=3000))


def signed_by(node: Pki, tmp_path: Path, ca: Signer) -> Settings:
    return settings_for(node, tmp_path, ca=(pem(ca.certificate), key_pem(ca.key)))


def renewed(settings: Settings) -> Result:
    return renew.run(settings, RunOptions(names=("all",)), lambda: datetime.now(UTC), Quiet())[0]


def kubeconfigs(node: Pki) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in node.kubeconfig_dir.glob("*.conf")}


@pytest.mark.parametrize("keeps_old", [True, False], ids=["before the old one", "in its place"])
def test_a_new_ca_that_the_kubeconfigs_do_not_know(node: Pki, tmp_path: Path, new: Signer, keeps_old: bool) -> None:
    """The run asks for and replaces none of that CA's certificates, and says what to do; other CAs' certificates are renewed."""
    old = node.ca_pem("ca")[0]
    (node.pki_dir / "ca.crt").write_bytes(pem(new.certificate) + (old if keeps_old else b""))
    before, serving = kubeconfigs(node), (node.pki_dir / "apiserver.crt").read_bytes()
    settings = signed_by(node, tmp_path, new)
    for _ in range(3):
        result = renewed(settings)
    assert {outcome.name for outcome in result.renewed} == OF_OTHER_CAS
    # without the old one nothing says any more whose the live certificates are
    wanted, hint = (NotReadyError, "certificate-authority-data") if keeps_old else (ForeignIdentityError, "old")
    assert {type(outcome.error) for outcome in result.failed} == {wanted}
    assert result.exit_code == Exit.FAILED
    assert hint in (result.failed[0].error or NotReadyError("")).hint
    assert (kubeconfigs(node), (node.pki_dir / "apiserver.crt").read_bytes()) == (before, serving)
    assert (tmp_path / "cas/ca/index.txt").read_text() == ""
    assert not (tmp_path / "state/attempts.json").exists()  # no CA was asked in vain


def test_a_new_ca_that_the_kubeconfigs_know_too(node: Pki, tmp_path: Path, new: Signer) -> None:
    """All is renewed: each client takes the old and the new serving certificate."""
    old = node.ca_pem("ca")[0]
    (node.pki_dir / "ca.crt").write_bytes(pem(new.certificate) + old)
    node.trust_in_kubeconfigs(old + pem(new.certificate))
    result = renewed(signed_by(node, tmp_path, new))
    assert (result.exit_code, len(result.renewed)) == (0, 12)


def test_a_cas_certificate_that_was_renewed_is_no_new_ca(node: Pki, tmp_path: Path) -> None:
    """The key is the same, so that the kubeconfigs' older certificate of it does."""
    old, key = node.ca_pem("ca")
    loaded, now = load_pem_private_key(key, None), datetime.now(UTC)
    again = Signer.make(key=loaded, begin=now - timedelta(days=1), end=now + timedelta(days=3000))  # type: ignore[arg-type]
    (node.pki_dir / "ca.crt").write_bytes(pem(again.certificate) + old)
    result = renewed(signed_by(node, tmp_path, again))
    assert (result.exit_code, len(result.renewed)) == (0, 12)
