"""Table `[gateway]`: who may ask for what by the certificates API, and how the gateway works."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from bridge.errors import SettingsProblem
from bridge.pki.expiry import duration_text

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_IDENTITY = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,126}[A-Za-z0-9])?")
_LISTEN = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/\[\]]+):([0-9]{1,5})")
#: Three renewals have to fit into it; and another one waits that long for one that died.
_SHORTEST_LEASE, _LONGEST_LEASE = timedelta(seconds=5), timedelta(minutes=5)
_LAST_PORT = 65535
_MOST_THREADS = 64


@dataclass(frozen=True, kw_only=True)
class GatewaySettings:
    """Table `[gateway]`."""

    policy: Path = Path("/etc/ca-bridge/gateway-policy.toml")  #: Who may have what: a desk's policy with signers.
    inventory: Path = Path("/etc/ca-bridge/inventory.toml")  #: The nodes, and their names and addresses.
    #: A program that is asked with a node's name, and nothing else, for one that the inventory does not have.
    inventory_command: Path | None = None
    reverse_dns: bool = False  #: An address that leads to the node's name and back is the node's, too.
    kubeconfig: Path | None = None  #: How the API server is reached; without one by the service account of the pod.
    state_dir: Path | None = None  #: For the audit log and tickets; without one `gateway` below `node.state_dir`.
    listen: str = "127.0.0.1:9880"  #: Address and port of `/metrics`, `/healthz` and `/readyz`.
    serve_status: bool = True  #: Whether there are these pages.
    lease: bool = True  #: One of several replicas works; without it there must be only one.
    lease_namespace: str = "kube-system"  #: Where the lease is.
    lease_name: str = "ca-bridge-gateway"  #: What the lease is called.
    lease_duration: timedelta = timedelta(seconds=10)  #: After which another replica takes a lease over.
    identity: str = ""  #: In the lease, before a random part; without one the host's name.
    concurrency: int = 32  #: Requests that are answered at the same time.
    #: New requests a minute by one user; those for a node of the inventory that may be signed have `node_rate` alone.
    requester_rate: int = 120
    node_rate: int = 12  #: New requests a minute by one user for one node's name.
    collect_every: timedelta = timedelta(seconds=30)  #: How often a CA that answers later is asked.
    pending_for: timedelta = timedelta(hours=24)  #: After which a request that the CA has not answered fails.
    min_validity: timedelta = timedelta(minutes=5)  #: Certificates that end sooner are not written.

    def problems(self) -> Iterator[SettingsProblem]:
        """Settings that the API, the clock or this machine would not take."""
        for key in ("lease_namespace", "lease_name"):
            if not _NAME.fullmatch(getattr(self, key)):
                wanted = "at most 63 small letters, digits and hyphens, a letter or digit first and last"
                yield SettingsProblem(key, wanted, repr(getattr(self, key)))
        if self.identity and not _IDENTITY.fullmatch(self.identity):
            yield SettingsProblem("identity", "letters, digits, hyphens, dots", repr(self.identity))
        if not _SHORTEST_LEASE <= self.lease_duration <= _LONGEST_LEASE:
            wanted = f"{duration_text(_SHORTEST_LEASE)} to {duration_text(_LONGEST_LEASE)}"
            yield SettingsProblem("lease_duration", wanted, duration_text(self.lease_duration))
        if self.address is None:
            yield SettingsProblem("listen", "an address and a port such as 127.0.0.1:9880", repr(self.listen))
        for key in ("requester_rate", "node_rate"):
            if getattr(self, key) < 1:
                yield SettingsProblem(key, "at least 1", str(getattr(self, key)))
        if not 1 <= self.concurrency <= _MOST_THREADS:
            yield SettingsProblem("concurrency", f"1 to {_MOST_THREADS}", str(self.concurrency))

    @property
    def address(self) -> tuple[str, int] | None:
        """Host and port of `listen`."""
        match = _LISTEN.fullmatch(self.listen)
        if match is None or int(match[2]) > _LAST_PORT:
            return None
        return match[1].strip("[]"), int(match[2])
