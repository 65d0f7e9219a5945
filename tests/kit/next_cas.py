"""The CAs that take the place of a node's three: new keys and names, in `openssl ca` directories."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from bridge.pki.certificates import pem
from bridge.pki.csr import key_pem
from bridge.specs import AUTHORITIES
from tests.kit import opensslca
from tests.kit.issuing import Signer


@dataclass(frozen=True, kw_only=True)
class NextCa:
    """One of them."""

    signer: Signer
    table: dict[str, str]  #: `[authority.NAME.next]`.


def make(directory: Path) -> dict[str, NextCa]:
    """Directories for all three, and what the settings say of them."""
    now, made = datetime.now(UTC), {}
    for name in AUTHORITIES:
        signer = Signer.make(f"{name}-2", begin=now - timedelta(days=1), end=now + timedelta(days=5000))
        place = opensslca.make_ca_directory(directory / name, pem(signer.certificate), key_pem(signer.key))
        anchor = directory / f"{name}.crt"
        anchor.write_bytes(pem(signer.certificate))
        made[name] = NextCa(signer=signer, table={"anchor": str(anchor), "dir": str(place)})
    return made
