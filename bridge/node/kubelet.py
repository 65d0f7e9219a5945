"""
A kubelet's configuration and flags: where it listens, where its certificates are, and the node's name in them.

https://kubernetes.io/docs/reference/config-api/kubelet-config.v1beta1/ and
https://kubernetes.io/docs/reference/command-line-tools-reference/kubelet/; measured on 1.37.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from bridge.node import kubeconfig
from bridge.node.endpoints import reachable
from bridge.node.kubeconfig import KubeconfigError
from bridge.node.manifests import flags_of
from bridge.node.yamltree import YamlError, YamlNode, document, split_bom
from bridge.pki.certificates import UNREADABLE, common_names, load_pem_certificates
from bridge.settings.tables import Settings
from bridge.system.paths import UnreadableError, read

#: kubeadm's directory for a kubelet's files.
KUBELET_DIR = Path("/var/lib/kubelet")
KUBELET_CONFIG = KUBELET_DIR / "config.yaml"
#: Environment files of kubeadm's drop-in for systemd, on Debian and on Red Hat.
_EXTRA_ARGS = (Path("/etc/default/kubelet"), Path("/etc/sysconfig/kubelet"))

#: The first line of a pair that we installed and that a running kubelet has not read yet.
OURS = b"# Put here by ca-bridge, and not by the kubelet.\n"

_KEYS = ("staticPodPath", "rotateCertificates", "serverTLSBootstrap", "tlsCertFile", "tlsPrivateKeyFile")
_FLAGS = {
    "--rotate-certificates": "rotateCertificates",
    "--rotate-server-certificates": "serverTLSBootstrap",
    "--tls-cert-file": "tlsCertFile",
    "--tls-private-key-file": "tlsPrivateKeyFile",
    "--cert-dir": "certDir",
    "--hostname-override": "hostname",
    "--node-ip": "nodeIP",
    "--pod-manifest-path": "staticPodPath",
    "--client-ca-file": "clientCAFile",
}

#: made: the kubelet makes a self-signed pair, unless it has one; named: `tlsCertFile`; asked: with
#: `serverTLSBootstrap` it requests one from a signer of the cluster.
Serving = Literal["made", "named", "asked"]


def health_url() -> str | None:
    """The URL of the kubelet's health check (None: switched off); the default if the configuration has none."""
    found, _ = _configured(KUBELET_CONFIG, ("healthzBindAddress", "healthzPort"))
    host, port = found.get("healthzBindAddress") or "127.0.0.1", found.get("healthzPort") or "10248"
    return f"http://{reachable(host)}:{port}/healthz" if port != "0" else None


def runtime_endpoint() -> str:
    """The container runtime's endpoint; empty: the kubelet finds it itself, or a flag names it."""
    return _configured(KUBELET_CONFIG, ("containerRuntimeEndpoint",))[0].get("containerRuntimeEndpoint", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class KubeletFiles:
    """The kubelet's configuration of certificates: their paths and names."""

    directory: Path  #: `--cert-dir`, with `kubelet-client-current.pem`.
    rotates: bool | None  #: `rotateCertificates`; None: no readable configuration sets it.
    serving: Serving
    certificate: Path  #: The serving certificate's file.
    key: Path  #: The key's file; the same file if it holds both.
    hostname: str  #: `--hostname-override`; empty: not set.
    addresses: tuple[str, ...]  #: `--node-ip`, without unspecified addresses.
    client_ca: Path | None = None  #: `authentication.x509.clientCAFile`, the CA of its clients; None: not set.
    static_pods: Path | None = None  #: `staticPodPath`; None: no readable configuration sets it.
    trouble: str | None = None  #: Why its configuration can't be read; a missing one is no trouble.

    @property
    def client(self) -> Path:
        """The symlink to the current client certificate and key, which exists once the kubelet has run."""
        return self.directory / "kubelet-client-current.pem"

    @classmethod
    def load(cls, kubelet_dir: Path) -> KubeletFiles:
        """Read the configuration in a kubelet's directory; unset values have the kubelet's defaults."""
        found, trouble = _configured(kubelet_dir / "config.yaml", _KEYS)
        is_running = bool(found)
        found |= _flags(kubelet_dir)
        directory = Path(found.get("certDir") or kubelet_dir / "pki")
        certificate, key = found.get("tlsCertFile", ""), found.get("tlsPrivateKeyFile", "")
        serving: Serving = "made"
        pair = (directory / "kubelet.crt", directory / "kubelet.key")
        if certificate and key:
            # relative ones are relative to the configuration's directory
            serving, pair = "named", (kubelet_dir / certificate, kubelet_dir / key)
        elif _is_true(found.get("serverTLSBootstrap", "")):
            serving, pair = "asked", (directory / "kubelet-server-current.pem",) * 2
        rotates = _is_true(found.get("rotateCertificates", ""))
        return cls(
            directory=directory,
            rotates=rotates if is_running or "rotateCertificates" in found else None,
            serving=serving,
            certificate=pair[0],
            key=pair[1],
            hostname=found.get("hostname", ""),
            addresses=tuple(a for a in found.get("nodeIP", "").split(",") if a and a not in ("0.0.0.0", "::")),  # noqa: S104 (not bound)
            client_ca=kubelet_dir / found["clientCAFile"] if found.get("clientCAFile") else None,
            static_pods=Path(found["staticPodPath"]) if found.get("staticPodPath") else None,
            trouble=trouble,
        )


def _is_true(text: str) -> bool:
    return text.lower() in ("true", "t", "1")


def configuration(path: Path) -> YamlNode | None:
    """The root of a kubelet's configuration file, None without a file (UnreadableError, YamlError: it is unusable)."""
    data = read(path)
    return None if data is None else document(split_bom(data)[1])


def values(root: YamlNode, keys: Sequence[str]) -> dict[str, str]:
    """The texts below those of these keys that exist (YamlError: a value is no text)."""
    return {key: node.text() for key in keys if (node := root.get(key)) is not None}


def _configured(path: Path, keys: Sequence[str]) -> tuple[dict[str, str], str | None]:
    """The configuration's values, and why it can't be read."""
    try:
        root = configuration(path)
        if root is None:
            return {}, None
        authentication = root.get("authentication")
        x509 = None if authentication is None else authentication.get("x509")
        client_ca = {} if x509 is None else values(x509, ("clientCAFile",))
        return {"kind": "KubeletConfiguration", **values(root, keys), **client_ca}, None
    except (UnreadableError, YamlError) as e:
        return {}, f"wanted the kubelet's configuration in {path}, found: {e}"


_ASKS = "serverTLSBootstrap"


def asks(text: str) -> bool:
    """Whether this configuration makes a kubelet request its serving certificate from a signer (YamlError: unreadable)."""
    found = document(text).get(_ASKS)
    return found is not None and _is_true(found.text())


def asking(text: str, *, wanted: bool) -> str:
    """Edit whether the kubelet requests its serving certificate from a signer (YamlError: not one key a line)."""
    if asks(text) == wanted:
        return text
    root = document(text)
    found, before = root.get(_ASKS), root.plain()
    lines = text.splitlines(keepends=True)
    if found is None:
        lines = [*lines[:-1], f"{lines[-1].rstrip()}\n", f"{_ASKS}: true\n"]
    elif wanted:
        lines[found.place.line - 1] = f"{_ASKS}: true\n"
    else:
        del lines[found.place.line - 1]
    after = {key: value for key, value in before.items() if key != _ASKS} | ({_ASKS: True} if wanted else {})
    done = "".join(lines)
    with contextlib.suppress(YamlError):
        if document(done).plain() == after:
            return done
    raise YamlError("wanted one key a line, as kubeadm writes it, found another form")


def _flags(kubelet_dir: Path) -> dict[str, str]:
    """Flags that kubeadm and the operator give the kubelet, by name; they override its configuration."""
    files = [(kubelet_dir / "kubeadm-flags.env", "KUBELET_KUBEADM_ARGS")]
    if kubelet_dir == KUBELET_DIR:
        files += [(path, "KUBELET_EXTRA_ARGS") for path in _EXTRA_ARGS]
    flags: dict[str, str] = {}
    for path, variable in files:
        with contextlib.suppress(UnreadableError, ValueError):  # systemd could not parse it, either
            match = re.search(rf"^\s*{variable}=(.*)$", (read(path) or b"").decode(), re.MULTILINE)
            flags |= flags_of(shlex.split(" ".join(shlex.split(match[1])))) if match else {}
    return {name: flags[flag] for flag, name in _FLAGS.items() if flag in flags}


_NODE_USER = "system:node:"


def with_node_name(settings: Settings) -> Settings:
    """The settings with the node's name from its certificates, unless they set one."""
    if settings.node.name:
        return settings
    name = node_name(settings.node.pki_dir, settings.node.kubeconfig_dir)
    return replace(settings, node=replace(settings.node, name=name)) if name else settings


def node_name(pki_dir: Path, kubeconfig_dir: Path) -> str:
    """Read the name from kubelet.conf's certificate (CN system:node:NAME), or else etcd's (CN NAME); empty: neither."""
    path = kubeconfig_dir / "kubelet.conf"
    try:
        parsed = kubeconfig.parse(read(path) or b"")
        pem = parsed.certificate_data or read(path.parent / (parsed.certificate_file or ""))
    except (KubeconfigError, UnreadableError):
        pem = None
    user = _common_name(pem)
    if user.startswith(_NODE_USER):
        return user.removeprefix(_NODE_USER)
    for base in ("etcd/server.crt", "etcd/peer.crt"):
        try:
            name = _common_name(read(pki_dir / base))
        except UnreadableError:
            continue
        if name:
            return name
    return ""


def _common_name(pem: bytes | None) -> str:
    try:
        return " ".join(common_names(load_pem_certificates(pem or b"")[0].subject))
    except UNREADABLE:
        return ""
