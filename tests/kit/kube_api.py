"""
What administrators do with a real API server (`cluster_api`): kubectl, tokens, a controller manager, decisions by hand.

```python
with kube_api.serving(tmp_path) as api:
    api.apply(MANIFEST)
    node = api.client("system:node:w1", "system:nodes")
    node.ask("POST", CSRS, {...})
```

Whoever is named gets a client certificate, so that any user of any group can be played.
"""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import NameOID

from bridge.pki.csr import key_pem
from tests.kit import cluster_api, programs
from tests.kit.cluster_api import CSRS, ClusterApi
from tests.kit.issuing import Signer
from tests.kit.openbao import free_port


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Any answer."""

    status: int
    document: dict[str, Any]

    @property
    def message(self) -> str:
        """Of a `Status`."""
        return str(self.document.get("message", ""))


@dataclass(kw_only=True)
class ApiClient:
    """Somebody who asks."""

    user: str
    url: str
    trust: Path
    pair: tuple[str, str] | None = None
    token: str = ""

    def ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, kind: str = "application/json"
    ) -> Reply:
        """One request; any status is an answer."""
        headers = {"Content-Type": kind} | ({"Authorization": f"Bearer {self.token}"} if self.token else {})
        with requests.Session() as session:
            session.trust_env = False
            data = None if body is None else json.dumps(body)
            answer = session.request(
                method, self.url + path, data=data, headers=headers, verify=str(self.trust), cert=self.pair, timeout=20
            )
            return Reply(status=answer.status_code, document=answer.json())

    def patch(self, path: str, body: Mapping[str, Any]) -> Reply:
        """A merge patch."""
        return self.ask("PATCH", path, body, kind="application/merge-patch+json")

    def create_csr(self, pem: bytes, signer: str, usages: Sequence[str], **more: Any) -> Reply:
        """A CertificateSigningRequest; `name` is its metadata's, the rest goes into spec."""
        name = more.pop("name", "")
        metadata = {"name": name} if name else {"generateName": "csr-"}
        spec = {"request": base64.b64encode(pem).decode(), "signerName": signer, "usages": list(usages), **more}
        body = {"apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest", "metadata": metadata}
        return self.ask("POST", CSRS, {**body, "spec": spec})

    def csr(self, name: str) -> dict[str, Any]:
        """One that is there."""
        reply = self.ask("GET", f"{CSRS}/{name}")
        assert reply.status == 200, reply
        return reply.document

    def csrs(self) -> list[dict[str, Any]]:
        """All that are there."""
        items: list[dict[str, Any]] = self.ask("GET", CSRS).document["items"]
        return items

    def decide(self, name: str, kind: str = "Approved", message: str = "by a test", reason: str = "Test") -> Reply:
        """Approve, deny or fail one."""
        old = self.csr(name)
        conditions = [
            *old.get("status", {}).get("conditions", []),
            {"type": kind, "status": "True", "reason": reason, "message": message},
        ]
        where = "status" if kind == "Failed" else "approval"
        metadata = {key: old["metadata"][key] for key in ("uid", "resourceVersion")}
        return self.patch(f"{CSRS}/{name}/{where}", {"metadata": metadata, "status": {"conditions": conditions}})

    def issue(self, name: str, pem: bytes) -> Reply:
        """Write a certificate, whatever it is."""
        return self.patch(f"{CSRS}/{name}/status", {"status": {"certificate": base64.b64encode(pem).decode()}})


@dataclass(kw_only=True)
class ApiServer:
    """One that runs."""

    directory: Path
    cluster: ClusterApi
    admin: ApiClient
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Of the API server."""
        return self.cluster.url

    @property
    def trust(self) -> Path:
        """The CA's certificate."""
        return self.cluster.pki_dir / "ca.crt"

    def client(self, user: str, *groups: str) -> ApiClient:
        """Somebody with a client certificate."""
        pair = self.pair(user, *groups)
        return ApiClient(user=user, url=self.url, trust=self.trust, pair=(str(pair[0]), str(pair[1])))

    def pair(self, user: str, *groups: str) -> tuple[Path, Path]:
        """A client certificate and its key."""
        return self.cluster.credentials(user, *groups)

    def bearer(self, namespace: str, account: str) -> ApiClient:
        """A service account that there is, with a token of it."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}}
        reply = self.admin.ask("POST", path, body)
        assert reply.status == 201, reply
        user = f"system:serviceaccount:{namespace}:{account}"
        return ApiClient(user=user, url=self.url, trust=self.trust, token=reply.document["status"]["token"])

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
        run = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=60)
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
        certificate, key = cluster.credentials("admin", "system:masters")
        pair = (str(certificate), str(key))
        admin = ApiClient(user="admin", url=cluster.url, trust=cluster.pki_dir / "ca.crt", pair=pair)
        server = ApiServer(directory=directory, cluster=cluster, admin=admin)
        try:
            yield server
        finally:
            for name in reversed(list(server.processes)):
                server.stop(name)


def user_name(user: str, groups: Sequence[str]) -> x509.Name:
    """As Kubernetes reads it."""
    attributes = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
    return x509.Name([*attributes, x509.NameAttribute(NameOID.COMMON_NAME, user)])
