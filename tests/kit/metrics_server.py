"""A real metrics-server (tests/kit/modules/metrics-server) beside a cluster, behind its APIService, as `kubectl top` finds it."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.kit import programs
from tests.kit.gateway_cluster import GatewayCluster
from tests.kit.loopback import free_port
from tests.kit.nodes import wait_for

_Found = TypeVar("_Found")
#: This machine, as nodes see it.
_HERE = "198.18.77.1"
#: An ExternalName, since no kube-proxy leads to a service's own address.
_SERVICE = """\
apiVersion: v1
kind: Service
metadata: {{name: metrics-server, namespace: kube-system}}
spec: {{type: ExternalName, externalName: {here}, ports: [{{port: {port}}}]}}
---
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {{name: v1beta1.metrics.k8s.io}}
spec:
  group: metrics.k8s.io
  version: v1beta1
  service: {{name: metrics-server, namespace: kube-system, port: {port}}}
  insecureSkipTLSVerify: true
  groupPriorityMinimum: 100
  versionPriority: 100
"""


@dataclass(frozen=True, kw_only=True)
class MetricsServer:
    """One that runs."""

    cluster: GatewayCluster
    log: Path

    def top(self) -> dict[str, list[str]]:
        """`kubectl top nodes`: the words of each node with figures; none before it has any."""
        run = self.cluster.control_plane.kubectl("top", "nodes", "--no-headers", check=False)
        rows = [line.split() for line in run.stdout.splitlines()] if run.returncode == 0 else []
        return {words[0]: words[1:] for words in rows if "<unknown>" not in words}

    def wait_for(self, what: str, look: Callable[[], _Found | None]) -> _Found:
        """As `nodes.wait_for`; an error has the end of its log."""
        try:
            return wait_for(what, look, seconds=240)
        except AssertionError as e:
            raise AssertionError(f"{e}\n{self.said()[-3000:]}") from None

    def said(self) -> str:
        """Its log."""
        return self.log.read_text()


@contextlib.contextmanager
def running(cluster: GatewayCluster, directory: Path) -> Iterator[MetricsServer]:
    """Without `--kubelet-insecure-tls`: it trusts the CA of its kubeconfig, which is the cluster's."""
    directory.mkdir()
    port, log = free_port(), directory / "metrics-server.log"
    config = cluster.api.kubeconfig("kubernetes-super-admin", "system:masters")
    same = [f"--{kind}kubeconfig={config}" for kind in ("", "authentication-", "authorization-")]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                programs.require("metrics-server"), *same, f"--secure-port={port}", f"--bind-address={_HERE}",
                f"--cert-dir={directory}", "--metric-resolution=15s", "--kubelet-preferred-address-types=InternalIP",
            ],
            stdout=output, stderr=output,
        )  # fmt: skip
    try:
        cluster.apply(_SERVICE.format(here=_HERE, port=port))
        yield MetricsServer(cluster=cluster, log=log)
    finally:
        process.kill()
        process.wait()
        cluster.control_plane.kubectl("delete", "apiservice", "v1beta1.metrics.k8s.io", check=False)
