"""A renewal in this process, with `openssl ca` directories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bridge.settings.load import parse
from bridge.settings.tables import Settings
from tests.kit import opensslca
from tests.kit.pki import Pki


class Quiet:
    """Show no progress."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def signing(self, backend: str, names: Sequence[str]) -> None:
        """Not shown."""

    def signed(self, name: str) -> None:
        """Not shown."""

    def note(self, text: str) -> None:
        """Kept."""
        self.notes.append(text)


def settings_for(node: Pki, directory: Path, more: str = "", **cas: tuple[bytes, bytes]) -> Settings:
    """`openssl ca` directories with the node's CAs, or with others."""
    lines = [f'[node]\npki_dir = "{node.pki_dir}"\nkubeconfig_dir = "{node.kubeconfig_dir}"']
    lines += [f'state_dir = "{directory}/state"', more, '[backend.desk]\ntype = "openssl"']
    for name in ("ca", "etcd-ca", "front-proxy-ca"):
        pem = cas.get(name.replace("-", "_"), node.ca_pem(name))
        place = opensslca.make_ca_directory(directory / "cas" / name, *pem)
        lines.append(f'[authority.{name}]\nbackend = "desk"\ndir = "{place}"')
    return parse("\n".join(lines))
