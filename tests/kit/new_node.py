"""A machine that is to become a node: empty directories, CAs elsewhere, ca-bridge and the real kubeadm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bridge.bootstrap import Places
from bridge.specs import AUTHORITIES
from tests.kit import opensslca, programs, warm
from tests.kit.cas import Bridge
from tests.kit.pki import Pki, handmade_pki

NAME, ADDRESS, ENDPOINT = "cp-1", "192.0.2.10", "api.example.com:6443"
CONFIG = f"""\
apiVersion: kubeadm.k8s.io/v1beta4
kind: InitConfiguration
localAPIEndpoint: {{advertiseAddress: {ADDRESS}}}
nodeRegistration: {{name: {NAME}, criSocket: "unix:///run/none.sock"}}
---
apiVersion: kubeadm.k8s.io/v1beta4
kind: ClusterConfiguration
kubernetesVersion: v1.37.2
controlPlaneEndpoint: {ENDPOINT}
encryptionAlgorithm: ECDSA-P256
apiServer: {{certSANs: [spare.example.com, 203.0.113.7]}}
"""


@dataclass(kw_only=True)
class NewNode:
    """What is below `root` takes the place of the machine's `/`."""

    directory: Path
    bridge: Bridge
    cas: Pki  #: Whose CAs sign; nothing of it is on the node.

    @classmethod
    def make(cls, directory: Path, *, cas: Pki | None = None, backend: bool = True) -> NewNode:
        """
        An empty one.

        Args:
            directory: Empty or absent.
            cas: Those of another node's cluster; None: new ones.
            backend: Its settings name an `openssl ca` directory a CA.
        """
        root = directory / "root"
        (root / "etc/kubernetes").mkdir(parents=True)
        (root / "tmp").mkdir()
        cas = cas or handmade_pki(directory / "elsewhere")
        place = Pki(root=root, external=True)
        node = cls(directory=directory, bridge=Bridge(pki=place, directory=directory / "bridge"), cas=cas)
        node.bridge.tables[0] += f'kubelet_dir = "{node.places.kubelet}"\n'
        node.bridge.add("backups", {"keep": 3})
        if backend:
            node.add_cas()
        return node

    def add_cas(self) -> None:
        """An `openssl ca` directory each, beside the node."""
        for name in AUTHORITIES:
            place = self.directory / "signers" / name
            opensslca.make_ca_directory(place, *self.cas.ca_pem(name), passphrase="s3cret phrase")
            secret = self.bridge.secret(f"{name}.passphrase", "s3cret phrase\n")
            self.bridge.add(f"backend.{name}-signer", {"type": "openssl", "dir": str(place), "passphrase_file": secret})
            self.bridge.add(f"authority.{name}", {"backend": f"{name}-signer"})

    @property
    def root(self) -> Path:
        """The machine's `/`."""
        return self.directory / "root"

    @property
    def places(self) -> Places:
        """Where files go."""
        kubernetes = self.root / "etc/kubernetes"
        return Places(
            pki=kubernetes / "pki",
            kubeconfigs=kubernetes,
            kubelet=self.root / "var/lib/kubelet",
            etcd=self.root / "var/lib/etcd",
        )

    @property
    def state(self) -> Path:
        """The state directory."""
        return self.bridge.directory / "state"

    def config(self, text: str = CONFIG) -> Path:
        """kubeadm's configuration file, where an operator keeps it."""
        path = self.directory / "cluster.yaml"
        path.write_text(text)
        return path

    def command(self, *args: str | Path) -> list[str]:
        """To run `ca-bridge bootstrap`."""
        program = Path(sys.executable).with_name("ca-bridge")
        return [str(one) for one in (program, "bootstrap", *args, "--config", self.bridge.config)]

    def run(self, *args: str | Path, given: bytes = b"") -> subprocess.CompletedProcess[str]:
        """Run it, with this on its standard input."""
        path = {"PATH": f"{programs.directory()}:{os.environ['PATH']}"}
        if not given:
            return warm.shared().run(self.command(*args), timeout=400, more=path)
        return subprocess.run(
            self.command(*args),
            capture_output=True,
            text=True,
            check=False,
            input=given.decode(),
            timeout=400,
            env={**os.environ, "LC_ALL": "C.UTF-8", **path},
        )

    def init(self, *args: str | Path, config: str = CONFIG) -> subprocess.CompletedProcess[str]:
        """`bootstrap init` with a file."""
        return self.run("init", "--kubeadm-config", self.config(config), *args)

    def kubeadm(self, *args: str) -> subprocess.CompletedProcess[str]:
        """The real one, with `root` as its root directory."""
        command = [str(programs.require("kubeadm")), *args, "--rootfs", str(self.root)]
        if os.geteuid() != 0:
            command = ["unshare", "--map-root-user", *command]
        return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)

    def phase(self, *args: str) -> subprocess.CompletedProcess[str]:
        """A phase of `kubeadm init`, each of which begins with kubeadm's own look at external CAs."""
        return self.kubeadm("init", "phase", *args, "--config", "/etc/kubernetes/kubeadm.yaml")

    def files(self) -> dict[str, bytes]:
        """All of the machine's, by path below its root."""
        paths = [path for path in sorted(self.root.rglob("*")) if path.is_file()]
        return {str(path.relative_to(self.root)): path.read_bytes() for path in paths}

    def wipe(self) -> None:
        """As `kubeadm reset` does it: certificates, kubeconfigs and all of the kubelet's, keys included."""
        for path in (self.places.pki, self.places.kubelet, self.places.kubeconfigs / "manifests"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.places.kubeconfigs.glob("*.conf"):
            path.unlink()
