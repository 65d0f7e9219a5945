"""A kubeconfig where there is none, byte by byte as kubeadm writes it (measured on 1.37)."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass

import yaml

from bridge.node import kubeconfig


@dataclass(frozen=True, slots=True, kw_only=True)
class FreshKubeconfig:
    """A kubeconfig, but for the user's certificate and key."""

    server: str  #: URL.
    cluster: str  #: Its name in the file.
    user: str
    ca_pem: bytes

    def text(self, certificate_pem: bytes, key_pem: bytes | None, key_file: str = "") -> bytes:
        """
        The file.

        Args:
            certificate_pem: The leaf, and what must follow it.
            key_pem: None: the user has it.
            key_file: Its file then, seen from the kubeconfig's directory.

        Raises:
            KubeconfigError: It can't be read back as it was meant; a bug.
        """
        context = f"{self.user}@{self.cluster}"
        user = {"client-certificate-data": _base64(certificate_pem)}
        if key_pem is not None:
            user["client-key-data"] = _base64(key_pem)
        elif key_file:
            user["client-key"] = key_file
        document = {
            "apiVersion": "v1",
            "clusters": [
                {
                    "cluster": {"certificate-authority-data": _base64(self.ca_pem), "server": self.server},
                    "name": self.cluster,
                }
            ],
            "contexts": [{"context": {"cluster": self.cluster, "user": self.user}, "name": context}],
            "current-context": context,
            "kind": "Config",
            "users": [{"name": self.user, "user": user}],
        }
        text = yaml.safe_dump(document, width=1 << 20, default_flow_style=False, allow_unicode=True).encode()
        parsed = kubeconfig.parse(text)
        if (parsed.user, parsed.server, parsed.ca_data, parsed.certificate_data) != (
            self.user,
            self.server,
            self.ca_pem,
            certificate_pem,
        ):
            raise kubeconfig.KubeconfigError("wanted a kubeconfig that reads back as it was written, found another one")
        return text


def _base64(pem: bytes) -> str:
    return b64encode(pem).decode()
