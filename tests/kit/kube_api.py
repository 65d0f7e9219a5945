"""
What administrators do with a real API server (`cluster_api`): kubectl, tokens, a controller manager, decisions by hand.

```python
with kube_api.serving(tmp_path) as api:
    api.apply(MANIFEST)
    node = api.client("system:node:w1", "system:nodes")
    node.ask("POST", CSRS, {...})
```

Each named user gets a client certificate, so that a test can play any user of any group.
"""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import NameOID

from bridge.pki.csr import key_pem
from tests.kit import cluster_api, programs
from tests.kit.api_client import ApiClient
from tests.kit.cluster_api import ClusterApi
from tests.kit.issuing import Signer
from tests.kit.loopback import free_port


@dataclass(kw_only=True)
class ApiServer:
    """One that runs."""

    directory: Path
    cluster: ClusterApi
    admin: ApiClient
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """The URL of the API server."""
        return self.cluster.url

    @property
    def trust(self) -> Path:
        """The CA's certificate."""
        return self.cluster.pki_dir / "ca.crt"

    def client(self, user: str, *groups: str) -> ApiClient:
        """A user with a client certificate."""
        return self.cluster.client(user, *groups)

    def pair(self, user: str, *groups: str) -> tuple[Path, Path]:
        """A client certificate and its key."""
        return self.cluster.credentials(user, *groups)

    def bearer(self, namespace: str, account: str) -> ApiClient:
        """A service account that there is, with a token of it."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}}
        reply = self.admin.ask("POST", path, body)
        assert reply.status == 201, reply
        return self.cluster.token_client(reply.document["status"]["token"])

    def kubeconfig(self, user: str, *groups: str) -> Path:
        """A kubeconfig with everything embedded."""
        path = self.directory / f"{secrets.token_hex(6)}.conf"
        certificate, key = self.pair(user, *groups)
        data = {
            "certificate-authority-data": self.trust, "client-certificate-data": certificate, "client-key-data": key
        }  # fmt: skip
        encoded = {name: base64.b64encode(file.read_bytes()).decode() for name, file in data.items()}
        ca = encoded.pop("certificate-authority-data")
        document = {
            "apiVersion": "v1", "kind": "Config", "current-context": "it",
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
            "clusters": [{"name": "it", "cluster": {"server": self.url, "certificate-authority-data": ca}}],
            "users": [{"name": "it", "user": encoded}],
        }  # fmt: skip
        path.touch(0o600)
        path.write_text(json.dumps(document))
        return path

    def kubectl(self, *args: str, text: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        """kubectl as admin."""
        path = self.directory / "admin.conf"
        if not path.exists():
            self.kubeconfig("admin", "system:masters").rename(path)
        command: list[str | Path] = [
            programs.require("kubectl"),
            "--kubeconfig",
            path,
            "--cache-dir",
            self.directory / "cache",
            *args,
        ]
        run = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=300)
        assert not check or run.returncode == 0, f"kubectl {' '.join(args)}: {run.stderr}"
        return run

    def apply(self, text: str) -> None:
        """Manifests in YAML."""
        self.kubectl("apply", "-f", "-", text=text)

    def start(self, name: str, command: Sequence[str | Path]) -> subprocess.Popen[bytes]:
        """A program beside it, which ends with it; its log is NAME.log."""
        with (self.directory / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self.processes[name] = process
        return process

    def stop(self, name: str) -> None:
        """End one."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def log(self, name: str, lines: int = 20) -> str:
        """The end of a program's log."""
        return "\n".join((self.directory / f"{name}.log").read_text(errors="replace").splitlines()[-lines:])

    def start_controller_manager(self, signer: Signer | None = None, *, duration: str = "8760h") -> None:
        """kube-controller-manager: approver, cleaner, service accounts, and the signers if it gets a CA's key."""
        command: list[str | Path] = [
            programs.require("kube-controller-manager"), f"--kubeconfig={self.kubeconfig('system:kube-controller-manager')}",
            "--controllers=csrapproving,csrsigning,csrcleaner,serviceaccount-controller,namespace",
            "--use-service-account-credentials=true", "--leader-elect=false", f"--secure-port={free_port()}",
            "--bind-address=127.0.0.1", f"--cluster-signing-duration={duration}",
        ]  # fmt: skip
        if signer is not None:
            certificate, key = self.directory / "signing.crt", self.directory / "signing.key"
            certificate.write_bytes(signer.certificate.public_bytes(serialization.Encoding.PEM))
            key.touch(0o600)
            key.write_bytes(key_pem(signer.key))
            command += [f"--cluster-signing-cert-file={certificate}", f"--cluster-signing-key-file={key}"]
        self.start("kube-controller-manager", command)


@contextlib.contextmanager
def serving(directory: Path) -> Iterator[ApiServer]:
    """etcd and kube-apiserver on free ports of loopback, with RBAC, node authorization and NodeRestriction."""
    with cluster_api.running(directory) as cluster:
        server = ApiServer(directory=directory, cluster=cluster, admin=cluster.client("admin", "system:masters"))
        try:
            yield server
        finally:
            for name in reversed(list(server.processes)):
                server.stop(name)


def user_name(user: str, groups: Sequence[str]) -> x509.Name:
    """As Kubernetes reads it."""
    attributes = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
    return x509.Name([*attributes, x509.NameAttribute(NameOID.COMMON_NAME, user)])
