"""The kubelet's configuration, as far as it matters here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bridge.node import endpoints
from bridge.node.yamltree import YamlError, document, split_bom
from bridge.system.safe_read import UnreadableError, read

#: Where kubeadm keeps the kubelet's configuration.
KUBELET_CONFIG = Path("/var/lib/kubelet/config.yaml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kubelet:
    """The part of the kubelet's configuration that its health check and its pods need."""

    health_url: str | None  #: None: switched off.
    runtime_endpoint: str  #: Empty: the kubelet finds it itself, or a flag names it.

    @classmethod
    def load(cls, path: Path | None = None) -> Kubelet:
        """
        Read the file; the kubelet's defaults where it is not there, not YAML or says nothing.

        https://kubernetes.io/docs/reference/config-api/kubelet-config.v1beta1/
        """
        found = {}
        try:
            root = document(split_bom(read(path or KUBELET_CONFIG) or b"{}")[1])
            for key in ("healthzBindAddress", "healthzPort", "containerRuntimeEndpoint"):
                node = root.get(key)
                found[key] = node.text() if node is not None else ""
        except (UnreadableError, YamlError):
            found = {}
        host, port = found.get("healthzBindAddress") or "127.0.0.1", found.get("healthzPort") or "10248"
        url = f"http://{endpoints.reachable(host)}:{port}/healthz"
        return cls(health_url=url if port != "0" else None, runtime_endpoint=found.get("containerRuntimeEndpoint", ""))
