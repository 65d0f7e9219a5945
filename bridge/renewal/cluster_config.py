"""Where kubeadm's configuration is had from: a file that the operator names, or else the cluster itself."""

from __future__ import annotations

from http import HTTPStatus
from pathlib import Path

from bridge.cluster.api import Api, NoAnswerError
from bridge.errors import BridgeError
from bridge.node import kubeadm_config
from bridge.node.inventory import Node
from bridge.node.kubeadm_config import CLUSTER_CONFIGURATION, CONFIG_MAP, KubeadmConfig, KubeadmConfigError
from bridge.settings.tables import Settings


class NoSourceError(BridgeError):
    """The cluster does not tell kubeadm's configuration."""

    hint = (
        "name kubeadm's configuration with --kubeadm-config FILE; or put a good copy of the certificate back (an expired "
        "one will do), or have the API server answer (kubectl get -n kube-system cm kubeadm-config)"
    )


class ConfigSource:
    """Asked once, and only if somebody wants to know."""

    def __init__(self, node: Node, settings: Settings, file: Path | None) -> None:
        self._node, self._settings, self._file = node, settings, file
        self._api: Api | None = None
        self._config: KubeadmConfig | None = None

    @property
    def text(self) -> str:
        """Where the configuration is from, for messages."""
        return str(self._file) if self._file is not None else "the cluster's ConfigMap kube-system/kubeadm-config"

    @property
    def api(self) -> Api:
        """The cluster's, whether it answers or not."""
        if self._api is None:
            self._api = Api.of_node(self._node, self._settings.node.kubeconfig_dir)
        return self._api

    def config(self) -> KubeadmConfig:
        """
        Read it.

        Raises:
            NoSourceError: The cluster tells none that can be used.
            KubeadmConfigError: The file can't be used.
        """
        if self._config is None:
            self._config = (
                self._of_cluster()
                if self._file is None
                else kubeadm_config.parse(kubeadm_config.read_file(self._file), self.text)
            )
        return self._config

    def _of_cluster(self) -> KubeadmConfig:
        try:
            reply = self.api.ask("GET", CONFIG_MAP)
        except NoAnswerError as e:
            raise NoSourceError(f"wanted {self.text}, found {e}") from None
        data = reply.document.get("data")
        text = data.get(CLUSTER_CONFIGURATION) if isinstance(data, dict) else None
        if reply.status != HTTPStatus.OK or not isinstance(text, str):
            raise NoSourceError(f"wanted {self.text}, found none there (HTTP {reply.status})")
        try:
            return kubeadm_config.parse(text.encode(), self.text)
        except KubeadmConfigError as e:
            raise NoSourceError(str(e)) from None
