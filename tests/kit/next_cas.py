"""The CAs that take the place of a node's three: new keys and names, in `openssl ca` directories."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from backends.vault import setup as vault_setup
from bridge.pki.certificates import pem
from bridge.pki.csr import key_pem
from bridge.specs import AUTHORITIES, SPECS
from tests.kit import opensslca
from tests.kit.cas import VALIDITY, Bridge, live_certificates
from tests.kit.issuing import Signer
from tests.kit.openbao import OpenBao
from tests.kit.pki import Pki


@dataclass(frozen=True, kw_only=True)
class NextCa:
    """One of them."""

    signer: Signer
    table: dict[str, str]  #: `[authority.NAME.next]`.


def make(directory: Path, days: int = 5000, *, number: int = 2) -> dict[str, NextCa]:
    """Directories for all three, with this number behind their names, which end after so many days, and their settings."""
    now, made = datetime.now(UTC), {}
    for name in AUTHORITIES:
        begin, end = now - timedelta(days=1), now + timedelta(days=days)
        signer = Signer.make(f"{name}-{number}", key_id=True, begin=begin, end=end)
        place = opensslca.make_ca_directory(directory / name, pem(signer.certificate), key_pem(signer.key))
        anchor = directory / f"{name}.crt"
        anchor.write_bytes(pem(signer.certificate))
        made[name] = NextCa(signer=signer, table={"anchor": str(anchor), "dir": str(place)})
    return made


def as_pki(made: Mapping[str, NextCa], directory: Path) -> Pki:
    """Their certificates and keys as a node's CAs lie beside it, for whatever is set up with a PKI's."""
    pki = Pki(root=directory, external=True)
    for name, one in made.items():
        certificate, key = pki.ca_files(name)
        certificate.parent.mkdir(parents=True, exist_ok=True)
        certificate.write_bytes(pem(one.signer.certificate))
        key.write_bytes(key_pem(one.signer.key))
    return pki


def cross(old: tuple[bytes, bytes], new: bytes, directory: Path, days: int = 365, program: str = "openssl") -> Path:
    """
    What the administrator of the old CA makes, by the command of docs/replace-the-ca.md.

    Args:
        old: Certificate and key of the old CA, PEM.
        new: The certificate of the new one, PEM.
        directory: Where the files go.
        days: How long it is good.
        program: openssl.

    Returns:
        The file with the cross certificate.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in (("old.crt", old[0]), ("old.key", old[1]), ("new.crt", new)):
        (directory / name).write_bytes(data)
    (directory / "keyid").write_text("authorityKeyIdentifier = keyid\n")
    command = f"{program} x509 -in new.crt -CA old.crt -CAkey old.key -set_serial 0x{x509.random_serial_number():x}"
    command += f" -days {days} -sha256 -extfile keyid -out cross.crt"
    subprocess.run(command.split(), cwd=directory, check=True, capture_output=True, timeout=180)
    return directory / "cross.crt"


def add_vault(bridge: Bridge, bao: OpenBao, authority: str, prefix: str, ca: NextCa) -> None:
    """A mount with the next CA, and the table `next` of a node's settings."""
    mount = f"{prefix}-{authority}-2"
    ours = {n: c for n, c in live_certificates(bridge.pki).items() if SPECS[n].authority.name == authority}
    bao.add_ca(mount, pem(ca.signer.certificate), key_pem(ca.signer.key))
    roles = bao.add_kubeadm_roles(mount, ours, VALIDITY)
    bao.add_policy(mount, vault_setup.policy(mount, roles, mode="sign"))
    role_id, secret_id = bao.add_approle(mount, mount, token_ttl="5m")
    bridge.add(
        f"backend.{mount}",
        {"type": "vault", "url": bao.url, "timeout": "2m", "retry_for": "5s", "role": "kubeadm-{name}"},
    )
    auth = {
        "role_id_file": bridge.secret(f"{mount}.role-id", role_id),
        "secret_id_file": bridge.secret(f"{mount}.secret-id", secret_id),
    }
    bridge.add(f"backend.{mount}.auth", {"method": "approle", **auth})
    cas = {key: text for key, text in ca.table.items() if key != "dir"}
    bridge.add(f"authority.{authority}.next", {"backend": mount, "mount": mount, **cas})
