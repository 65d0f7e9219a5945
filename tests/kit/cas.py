"""The three real CAs, set up for a PKI's authorities, and the settings with which ca-bridge finds them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509

from backends.vault import setup as vault_setup
from bridge.node import inventory
from bridge.pki.certificates import load_pem_certificates
from bridge.specs import AUTHORITIES, KUBELET_CONF, SPECS
from tests.kit import cfssl, opensslca, warm
from tests.kit.openbao import OpenBao
from tests.kit.pki import Pki

Kind = Literal["vault", "cfssl", "openssl"]

VALIDITY = timedelta(days=365)


def live_certificates(pki: Pki) -> dict[str, x509.Certificate]:
    """The leaves on the node by kubeadm's name."""
    items = inventory.read(pki.pki_dir, pki.kubeconfig_dir).items
    found = {item.spec.name: item.certificates[0] for item in items if item.state == "present" and item.managed}
    current = pki.root / "var/lib/kubelet/pki/kubelet-client-current.pem"
    if KUBELET_CONF not in found and current.is_symlink():  # a path that is right on the node alone
        dated = current.parent / current.readlink().name
        found[KUBELET_CONF] = load_pem_certificates(dated.read_bytes())[0]
    return found


@dataclass(kw_only=True)
class Bridge:
    """A node's ca-bridge: its settings, and the program to run."""

    pki: Pki
    directory: Path  #: For settings, secrets and state.
    tables: list[str] = field(default_factory=list)
    warm: bool = True  #: Runs are forked from a process that has loaded the program (`tests.kit.warm`).

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.add(
            "node",
            {
                "pki_dir": str(self.pki.pki_dir),
                "kubeconfig_dir": str(self.pki.kubeconfig_dir),
                "state_dir": str(self.directory / "state"),
            },
        )

    @property
    def config(self) -> Path:
        """The settings file."""
        return self.directory / "config.toml"

    def add(self, table: str, values: Mapping[str, object]) -> None:
        """One table of the settings."""
        lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        self.tables.append("\n".join([f"[{table}]", *lines, ""]))
        self.config.write_text("\n".join(self.tables))
        self.config.chmod(0o644)

    def secret(self, name: str, value: str) -> str:
        """A file with a secret in it."""
        path = self.directory / name
        path.touch(mode=0o600)
        path.write_text(value)
        return str(path)

    def command(self, *args: str) -> list[str]:
        """To run the installed program."""
        return [str(Path(sys.executable).with_name("ca-bridge")), *args, "--config", str(self.config)]

    def run(self, *args: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
        """Run the installed program."""
        if self.warm:
            return warm.shared().run(self.command(*args), timeout=timeout)
        environment = {**os.environ, "LC_ALL": "C.UTF-8"}
        return subprocess.run(
            self.command(*args),
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=timeout,
            env=environment,
        )


def add_vault(bridge: Bridge, bao: OpenBao, authority: str, prefix: str, *, mode: str = "sign") -> None:
    """
    A mount with the authority's CA, roles and policy as `ca-bridge setup vault` prints them, and an AppRole.

    Args:
        bridge: Whose settings get the tables.
        bao: The server.
        authority: `ca`, `etcd-ca` or `front-proxy-ca`.
        prefix: Keeps the mounts of several tests apart.
        mode: `sign` or `sign-verbatim`.
    """
    mount = f"{prefix}-{authority}"
    certificates = {n: c for n, c in live_certificates(bridge.pki).items() if _authority(n) == authority}
    bao.add_ca(mount, *bridge.pki.ca_pem(authority))
    roles = bao.add_kubeadm_roles(mount, certificates, VALIDITY)
    bao.add_policy(mount, vault_setup.policy(mount, roles, mode="sign-verbatim" if mode == "sign-verbatim" else "sign"))
    role_id, secret_id = bao.add_approle(mount, mount, token_ttl="5m")
    bridge.add(f"backend.{mount}", {"type": "vault", "url": bao.url, "mode": mode, "timeout": "2m", "retry_for": "5s"})
    auth = {
        "method": "approle",
        "role_id_file": bridge.secret(f"{mount}.role-id", role_id),
        "secret_id_file": bridge.secret(f"{mount}.secret-id", secret_id),
    }
    bridge.add(f"backend.{mount}.auth", auth)
    bridge.add(f"authority.{authority}", {"backend": mount, "mount": mount, "role": "kubeadm-{name}"})


@contextlib.contextmanager
def add_cfssl(bridge: Bridge, authority: str) -> Iterator[None]:
    """A `cfssl serve` with mutual TLS, set up as `ca-bridge setup cfssl` prints it."""
    directory = bridge.directory / "cfssl" / authority
    directory.mkdir(parents=True)
    tls = cfssl.make_tls(directory / "tls")
    ca_pem = bridge.pki.ca_pem(authority)
    certificates = live_certificates(bridge.pki)
    with cfssl.serve_authority(
        directory, AUTHORITIES[authority], certificates, VALIDITY, ca_pem=ca_pem, tls=tls
    ) as table:
        bridge.add(f"backend.{authority}-signer", {"type": "cfssl", "timeout": "2m", "retry_for": "5s", **table})
        bridge.add(f"authority.{authority}", {"backend": f"{authority}-signer"})
        yield


def add_openssl(bridge: Bridge, authority: str) -> Path:
    """An `openssl ca` directory with an encrypted key."""
    directory = bridge.directory / "desk" / authority
    opensslca.make_ca_directory(directory, *bridge.pki.ca_pem(authority), passphrase="s3cret phrase")
    passphrase = bridge.secret(f"{authority}.passphrase", "s3cret phrase\n")
    bridge.add(f"backend.{authority}-desk", {"type": "openssl", "dir": str(directory), "passphrase_file": passphrase})
    bridge.add(f"authority.{authority}", {"backend": f"{authority}-desk"})
    return directory


@contextlib.contextmanager
def bridge_with(pki: Pki, directory: Path, kinds: Mapping[str, Kind], bao: OpenBao) -> Iterator[Bridge]:
    """
    Settings and running CAs.

    Args:
        pki: The node's.
        directory: For everything else.
        kinds: The kind of CA by authority.
        bao: The server, if one of them is `vault`.
    """
    bridge = Bridge(pki=pki, directory=directory)
    with contextlib.ExitStack() as stack:
        for authority, kind in kinds.items():
            if kind == "vault":
                add_vault(bridge, bao, authority, directory.name)
            elif kind == "cfssl":
                stack.enter_context(add_cfssl(bridge, authority))
            else:
                add_openssl(bridge, authority)
        yield bridge


def _authority(name: str) -> str:
    return SPECS[name].authority.name
