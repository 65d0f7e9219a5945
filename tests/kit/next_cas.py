"""The CAs that take the place of a node's three: new keys and names, in `openssl ca` directories."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from backends.vault import setup as vault_setup
from bridge.pki.certificates import pem
from bridge.pki.csr import key_pem
from bridge.specs import AUTHORITIES, SPECS
from tests.kit import opensslca
from tests.kit.cas import VALIDITY, Bridge, live_certificates
from tests.kit.issuing import Signer
from tests.kit.openbao import OpenBao


@dataclass(frozen=True, kw_only=True)
class NextCa:
    """One of them."""

    signer: Signer
    table: dict[str, str]  #: `[authority.NAME.next]`.


def make(directory: Path, days: int = 5000) -> dict[str, NextCa]:
    """Directories for all three, which end after so many days, and what the settings say of them."""
    now, made = datetime.now(UTC), {}
    for name in AUTHORITIES:
        signer = Signer.make(f"{name}-2", begin=now - timedelta(days=1), end=now + timedelta(days=days))
        place = opensslca.make_ca_directory(directory / name, pem(signer.certificate), key_pem(signer.key))
        anchor = directory / f"{name}.crt"
        anchor.write_bytes(pem(signer.certificate))
        made[name] = NextCa(signer=signer, table={"anchor": str(anchor), "dir": str(place)})
    return made


def add_vault(bridge: Bridge, bao: OpenBao, authority: str, prefix: str, ca: NextCa) -> None:
    """A mount with the next CA, and the table `next` of a node's settings."""
    mount = f"{prefix}-{authority}-2"
    ours = {n: c for n, c in live_certificates(bridge.pki).items() if SPECS[n].authority.name == authority}
    bao.add_ca(mount, pem(ca.signer.certificate), key_pem(ca.signer.key))
    roles = bao.add_kubeadm_roles(mount, ours, VALIDITY)
    bao.add_policy(mount, vault_setup.policy(mount, roles, mode="sign"))
    role_id, secret_id = bao.add_approle(mount, mount, token_ttl="5m")
    bridge.add(f"backend.{mount}", {"type": "vault", "url": bao.url, "timeout": "5s", "retry_for": "5s"})
    auth = {
        "role_id_file": bridge.secret(f"{mount}.role-id", role_id),
        "secret_id_file": bridge.secret(f"{mount}.secret-id", secret_id),
    }
    bridge.add(f"backend.{mount}.auth", {"method": "approle", **auth})
    table = {"backend": mount, "mount": mount, "anchor": ca.table["anchor"]}
    bridge.add(f"authority.{authority}.next", table)
