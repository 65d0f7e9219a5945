"""A component's addresses, ports and files, from the flags of its static-pod manifest (pure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from bridge.specs import Component

#: The components' default ports.
PORTS = {
    Component.APISERVER: 6443,
    Component.CONTROLLER_MANAGER: 10257,
    Component.SCHEDULER: 10259,
    Component.KUBELET: 10250,
}
HTTPS = 443
#: With this flag (etcd-io/etcd#15402) `--listen-client-urls` serves only gRPC, which we do not speak.
ETCD_HTTP_ONLY = "--listen-client-http-urls"

#: kube-controller-manager's signing controller, and its older name.
_SIGNING = ("certificatesigningrequest-signing-controller", "csrsigning")
_PAIR = ("--cluster-signing-cert-file", "--cluster-signing-key-file")
#: Flags for single signers; with any of them, the pair for all signers does not count.
_KINDS = ("kubelet-serving", "kubelet-client", "kube-apiserver-client", "legacy-unknown")

Flags = Mapping[str, str]


class Address(NamedTuple):
    """A host or address, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Server(NamedTuple):
    """A server that can be contacted."""

    url: str  #: Without a path.
    name: str | None = None  #: The name in its certificate, if it differs from the URL's host.

    @property
    def place(self) -> Address:
        """Its host and port."""
        parts = urlsplit(self.url)
        return Address(parts.hostname or "", parts.port or HTTPS)


def bound(component: Component, flags: Flags) -> list[Address]:
    """A Kubernetes component's addresses; for all addresses, loopback and the one that an API server advertises."""
    host, port = flags.get("--bind-address", ""), int(flags.get("--secure-port", PORTS[component]))
    hosts = [loopback(host), flags.get("--advertise-address")] if is_any(host) else [host]
    return [Address(host, port) for host in dict.fromkeys(hosts) if host and port]


def name(flags: Flags) -> str | None:
    """The address in an API server's certificate by which its own node reaches it; None: no flag gives it."""
    host = flags.get("--bind-address", "")
    return flags.get("--advertise-address") or (None if is_any(host) else host)


def listening(flags: Flags, names: Sequence[str], advertised: str) -> list[Address]:
    """etcd's TLS addresses, by these flags; if it listens on all, loopback and the advertised address."""
    places = []
    for place in (Server(url).place for name in names for url in urls(flags, name)):
        hosts = [loopback(place.host), host(flags, advertised)] if is_any(place.host) else [place.host]
        places += [Address(host, place.port) for host in hosts if host]
    return list(dict.fromkeys(places))


def urls(flags: Flags, flag: str) -> list[str]:
    """The valid https URLs in a flag."""
    found = (url.rstrip("/") for url in flags.get(flag, "").split(",") if url.startswith("https://"))
    return [url for url in found if is_url(url)]


def is_url(text: str) -> bool:
    """Whether a text has a host and no invalid port; manifests and other nodes may contain anything."""
    try:
        parts = urlsplit(text)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def etcd_url(flags: Flags) -> str:
    """The URL of this node's etcd for HTTP, with or without TLS; on loopback if possible, since no firewall is there."""
    found = [url for url in flags.get(ETCD_HTTP_ONLY, flags.get("--listen-client-urls", "")).split(",") if is_url(url)]
    found.sort(key=lambda url: urlsplit(url).hostname not in {"127.0.0.1", "::1", "localhost"})
    url = (found or ["https://127.0.0.1:2379"])[0].strip().rstrip("/")
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def host(flags: Flags, flag: str) -> str | None:
    """The host of a flag's first https URL."""
    return next((urlsplit(url).hostname for url in urls(flags, flag)), None)


def file(flags: Flags, flag: str) -> Path | None:
    """The path in a flag: kubeadm mounts each file at its host path, and containers start in /."""
    return Path("/", flags[flag]) if flags.get(flag) else None


def wanted_file(flags: Flags, flag: str) -> Path:
    """The path in a flag, like `file`; ValueError: there is no such flag."""
    found = file(flags, flag)
    if found is None:
        raise ValueError(f"the flag {flag} is missing")
    return found


def signing_files(flags: Flags) -> dict[str, Path]:
    """The built-in signer's files, by flag; empty: the signer is off (kube-controller-manager 1.37)."""
    if not _is_on(flags.get("--controllers", "*")):
        return {}
    pair = {flag: path for flag in _PAIR if (path := file(flags, flag)) is not None}
    names = [f"--cluster-signing-{kind}-{part}-file" for kind in _KINDS for part in ("cert", "key")]
    single = {flag: path for flag in names if (path := file(flags, flag)) is not None}
    return single or (pair if len(pair) == len(_PAIR) else {})


def _is_on(controllers: str) -> bool:
    """Whether `--controllers` enables the signing controller: its first mention counts, else the star."""
    words = controllers.split(",")
    for word in words:
        if word.removeprefix("-") in _SIGNING:
            return not word.startswith("-")
    return "*" in words


def is_any(address: str) -> bool:
    """Whether an address means all of the machine's addresses."""
    return address in ("0.0.0.0", "::", "")  # noqa: S104 (looked for, not bound)


def loopback(address: str) -> str:
    """The loopback address of an address's family (IPv4 or IPv6)."""
    return "::1" if ":" in address else "127.0.0.1"


def reachable(address: str) -> str:
    """The host for a URL to a listening address (loopback if it means all addresses); an IPv6 address gets brackets."""
    bare = address.strip("[]")
    bare = loopback(bare) if is_any(bare) else bare
    return f"[{bare}]" if ":" in bare else bare
