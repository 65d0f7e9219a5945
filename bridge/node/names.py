"""The node's name in the cluster, from the certificates that it was given."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cryptography.x509.oid import NameOID

from bridge.node import kubeconfig
from bridge.node.kubeconfig import KubeconfigError
from bridge.pki.certificates import UNREADABLE, load_pem_certificates
from bridge.settings.tables import Settings
from bridge.system.safe_read import UnreadableError, read

_NODE_USER = "system:node:"


def with_name(settings: Settings) -> Settings:
    """The settings with the name of the node's certificates, where they set none and the certificates tell one."""
    if settings.node.name:
        return settings
    name = in_certificates(settings.node.pki_dir, settings.node.kubeconfig_dir)
    return dataclasses.replace(settings, node=dataclasses.replace(settings.node, name=name)) if name else settings


def in_certificates(pki_dir: Path, kubeconfig_dir: Path) -> str:
    """
    Read it from kubelet.conf's certificate (CN system:node:NAME), or else etcd's (CN NAME), as kubeadm makes them.

    Empty: none of them is here, or can be read.
    """
    path = kubeconfig_dir / "kubelet.conf"
    try:
        parsed = kubeconfig.parse(read(path) or b"")
        pem = parsed.certificate_data or read(path.parent / (parsed.certificate_file or ""))
    except (KubeconfigError, UnreadableError):
        pem = None
    user = _common_name(pem)
    if user.startswith(_NODE_USER):
        return user.removeprefix(_NODE_USER)
    for base in ("etcd/server.crt", "etcd/peer.crt"):
        try:
            name = _common_name(read(pki_dir / base))
        except UnreadableError:
            continue
        if name:
            return name
    return ""


def _common_name(pem: bytes | None) -> str:
    try:
        subject = load_pem_certificates(pem or b"")[0].subject
        return " ".join(str(one.value) for one in subject.get_attributes_for_oid(NameOID.COMMON_NAME))
    except UNREADABLE:
        return ""
