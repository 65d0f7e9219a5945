"""
A real kube-apiserver with a real etcd, and no node: for what speaks to the API alone. Ready in about five seconds.

```python
with cluster_api.running(directory) as cluster:
    admin = cluster.client()                       # O=system:masters
    cluster.client("system:node:w1", "system:nodes")
```
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from bridge.contract import SignRequest
from bridge.node import sample_pki
from bridge.node.sample_pki import ThrowawayCA
from bridge.specs import USER
from tests.kit import programs
from tests.kit.api_client import ApiClient
from tests.kit.issuing import Signer, name
from tests.kit.loopback import free_port

PROGRAMS = ("kube-apiserver", "etcd")
BOOTSTRAP_GROUP = "system:bootstrappers:kubeadm:default-node-token"
_START_SECONDS = 300  #: Far more than the 5 of an idle machine.
_CN, _O = x509.NameOID.COMMON_NAME, x509.NameOID.ORGANIZATION_NAME


@dataclass(kw_only=True)
class ClusterApi:
    """A running pair."""

    directory: Path
    ca: ThrowawayCA
    cas: Mapping[str, ThrowawayCA]
    port: int
    etcd: subprocess.Popen[bytes] | None = None  #: None: the caller started it, and the server.
    host: str = "127.0.0.1"
    server: subprocess.Popen[bytes] | None = None
    arguments: Sequence[str] = ()
    _clients: dict[tuple[str, ...], ApiClient] = field(default_factory=dict)

    @property
    def pki_dir(self) -> Path:
        """With the CAs' certificates, and no key of theirs."""
        return self.directory / "kubernetes/pki"

    @property
    def url(self) -> str:
        """The URL of the API server."""
        return f"https://{self.host}:{self.port}"

    def credentials(self, user: str, *groups: str) -> tuple[Path, Path]:
        """A client certificate of the cluster's CA, and its key, in files."""
        place = self.directory / "clients" / base64.urlsafe_b64encode(repr((user, groups)).encode()).decode()[-60:]
        certificate, key_file = place / "client.crt", place / "client.key"
        if not certificate.exists():
            place.mkdir(parents=True)
            key = ec.generate_private_key(ec.SECP256R1())
            signer = Signer(certificate=self.ca.certificate, key=self.ca.key)
            now = datetime.now(UTC)
            subject = name(*((_O, group) for group in groups), (_CN, user))
            csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
            request = SignRequest(
                spec=USER, csr_pem=csr.public_bytes(serialization.Encoding.PEM), validity=timedelta(days=1)
            )
            leaf = signer.issue(request, begin=now - timedelta(minutes=5), end=now + timedelta(days=1)).leaf
            certificate.write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
            key_file.touch(mode=0o600)
            key_file.write_bytes(
                key.private_bytes(
                    serialization.Encoding.PEM,
                    serialization.PrivateFormat.TraditionalOpenSSL,
                    serialization.NoEncryption(),
                )
            )
        return certificate, key_file

    def client(self, user: str = "kubernetes-super-admin", *groups: str) -> ApiClient:
        """A user with a client certificate; without a name an administrator."""
        groups = groups or (("system:masters",) if user == "kubernetes-super-admin" else ())
        found = self._clients.get((user, *groups))
        if found is None:
            found = ApiClient(url=self.url, trust=self.pki_dir / "ca.crt", pair=self.credentials(user, *groups))
            self._clients[user, *groups] = found
        return found

    def token_client(self, token: str) -> ApiClient:
        """A user with a token."""
        return ApiClient(url=self.url, trust=self.pki_dir / "ca.crt", token=token)

    def kubeconfig(self, user: str, *groups: str) -> Path:
        """A kubeconfig with which a program acts as this user."""
        certificate, key = self.credentials(user, *groups)
        path = certificate.with_name("client.conf")
        document = {
            "apiVersion": "v1", "kind": "Config", "current-context": "it",
            "clusters": [{"name": "it", "cluster": {"server": self.url, "certificate-authority": str(self.pki_dir / "ca.crt")}}],
            "users": [{"name": "it", "user": {"client-certificate": str(certificate), "client-key": str(key)}}],
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
        }  # fmt: skip
        path.write_text(json.dumps(document))
        path.chmod(0o600)
        return path

    def bootstrap_token(self, token_id: str) -> str:
        """A token of kubeadm's kind, for joining nodes."""
        secret = "0123456789abcdef"
        data = {
            "token-id": token_id, "token-secret": secret, "usage-bootstrap-authentication": "true",
            "auth-extra-groups": BOOTSTRAP_GROUP,
        }  # fmt: skip
        body = {
            "metadata": {"name": f"bootstrap-token-{token_id}", "namespace": "kube-system"},
            "type": "bootstrap.kubernetes.io/token",
            "stringData": data,
        }
        self.client().create("/api/v1/namespaces/kube-system/secrets", body)
        return f"{token_id}.{secret}"

    def add_node(self, node: str, *, ready: bool = True) -> None:
        """A Node object."""
        admin = self.client()
        admin.create("/api/v1/nodes", {"metadata": {"name": node}})
        self.set_ready(node, ready=ready)

    def set_ready(self, node: str, *, ready: bool) -> None:
        """Its condition."""
        condition = {"type": "Ready", "status": "True" if ready else "False", "reason": "x", "message": "x"}
        answer = self.client().patch(f"/api/v1/nodes/{node}/status", {"status": {"conditions": [condition]}})
        assert answer.ok, answer.text

    def start_server(self) -> None:
        """The API server, which may have been stopped."""
        with (self.directory / "kube-apiserver.log").open("ab") as log:
            self.server = subprocess.Popen(list(self.arguments), stdout=log, stderr=log, env=programs.environment())
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self.server.poll() is None:
            with contextlib.suppress(requests.exceptions.ConnectionError):
                if self.client().ask("GET", "/readyz").ok:
                    return
            time.sleep(0.1)
        raise AssertionError((self.directory / "kube-apiserver.log").read_text()[-3000:])

    def kill_server(self) -> None:
        """At once, as a power cut would."""
        assert self.server is not None
        self.server.kill()
        self.server.wait()


@contextlib.contextmanager
def running(
    parent: Path | None = None, *, on_disk: bool = False, flags: Mapping[str, str] | None = None
) -> Iterator[ClusterApi]:
    """
    Both, on loopback and free ports.

    Args:
        parent: For logs and certificates.
        on_disk: etcd's data is where it would be, and not in memory: each write is an fsync.
        flags: More of the API server's.
    """
    shm = Path("/nowhere" if on_disk else "/dev/shm")
    with contextlib.ExitStack() as stack:
        data = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="etcd-", dir=shm if os.access(shm, os.W_OK) else None)
        )
        directory = parent or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cluster-api-")))
        now = datetime.now(UTC)
        kubernetes = directory / "kubernetes"
        cas = sample_pki.make(
            kubernetes, now=now, not_after=now + timedelta(days=30), key="ecdsa-p256",
            cluster=sample_pki.Cluster(node="cp1", address="127.0.0.1", endpoint="localhost:6443"),
        )  # fmt: skip
        client_port, peer_port = free_port(), free_port()
        etcd_url = f"http://127.0.0.1:{client_port}"
        peer_url = f"http://127.0.0.1:{peer_port}"
        with (directory / "etcd.log").open("wb") as log:
            etcd = subprocess.Popen(
                [
                    str(programs.require("etcd")), "--data-dir", data, "--name", "one",
                    "--listen-client-urls", etcd_url, "--advertise-client-urls", etcd_url,
                    "--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url,
                    "--initial-cluster", f"one={peer_url}",
                ],
                stdout=log, stderr=log, env=programs.environment(),
            )  # fmt: skip
        stack.callback(_end, etcd)
        cluster = ClusterApi(directory=directory, ca=cas["ca"], cas=cas, port=free_port(), etcd=etcd)
        cluster.arguments = [
            *_arguments(cluster, etcd_url),
            *(f"--{key}={value}" for key, value in (flags or {}).items()),
        ]
        stack.callback(lambda: _end(cluster.server))
        cluster.start_server()
        yield cluster
        for client in cluster._clients.values():
            client.session.close()


def _end(process: subprocess.Popen[bytes] | None) -> None:
    if process is not None:
        process.kill()
        process.wait()


def _arguments(cluster: ClusterApi, etcd_url: str) -> list[str]:
    pki = cluster.pki_dir
    flags = {
        "etcd-servers": etcd_url,
        "bind-address": "127.0.0.1",
        "advertise-address": "127.0.0.1",
        "secure-port": cluster.port,
        "tls-cert-file": pki / "apiserver.crt",
        "tls-private-key-file": pki / "apiserver.key",
        "client-ca-file": pki / "ca.crt",
        "service-account-key-file": pki / "sa.pub",
        "service-account-signing-key-file": pki / "sa.key",
        "service-account-issuer": "https://kubernetes.default.svc.cluster.local",
        "authorization-mode": "Node,RBAC",
        "enable-admission-plugins": "NodeRestriction",
        "enable-bootstrap-token-auth": "true",
        "service-cluster-ip-range": "10.96.0.0/16",
        "cert-dir": cluster.directory,
        "endpoint-reconciler-type": "none",
        "event-ttl": "1h",
    }
    return [str(programs.require("kube-apiserver")), *(f"--{key}={value}" for key, value in flags.items())]
