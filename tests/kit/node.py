"""Real control-plane nodes for tests: `node.sh` with types."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from tests.kit import programs
from tests.kit.api_client import SLOW_ETCD

_SCRIPT = programs.KIT / "node.sh"
_START_SECONDS = 480  # far more than the 15 of an idle machine; node.sh has its own, smaller limits


#: For `kubelet`: a container that was started in the last ten minutes is started again at once, and not up to five
#: minutes later. For tests that restart much and are about something else; `test_restart_node.py` has kubelets as they are.
AT_ONCE = "crashLoopBackOff: {maxContainerRestartPeriod: 1s}"

Form = Literal["reference", "data", "token"]

#: What kubectl says of an API server, or of an etcd behind it, that will answer in a moment: where it has just begun, and
#: on a machine that stalls.
_IN_A_MOMENT = (
    *(*SLOW_ETCD, "etcdserver: no leader", "connection refused"),
    *("was refused - did you specify", "TLS handshake timeout", "server is currently unable to handle the request"),
    *("Timeout: request did not complete", "client connection lost", "connection reset by peer", ": EOF"),
    *("readyz check failed", "RBAC: clusterrole"),
)
#: What it says of a write whose answer was lost.
_WAS_DONE = {"create": "(AlreadyExists)", "delete": "(NotFound)"}
_PATIENCE_SECONDS = 180


def answers_in_a_moment(text: str) -> bool:
    """Whether these words of kubectl are of a server that will answer in a moment, and no answer to what was asked."""
    return any(words in text for words in _IN_A_MOMENT)


def directory() -> Path:
    """Where nodes are: `$KUBE_NODE_DIR`."""
    return Path(os.environ.get("KUBE_NODE_DIR", "/var/lib/kube-nodes"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """
    A node that is up; as a context manager it goes down at the end.

    Tests that start nodes carry the mark `node`, which keeps those of a file in one process, one after the other; other
    files' nodes may be up at the same time (`tests.kit.plan`).
    """

    name: str
    ip: str

    @classmethod
    def up(cls, name: str, ip: str, *, ca_dir: Path | None = None, cluster: str = "", kubelet: str = "") -> Node:
        """
        Start the first control-plane node of a cluster.

        Args:
            name: 1 to 13 small letters, digits and hyphens, which no other test gives.
            ip: In 198.18.77.0/24, but not .1; in no other file of tests.
            ca_dir: Where the three CA keys go, with copies of the CA certificates: external-CA mode.
            cluster: More lines for kubeadm's ClusterConfiguration, such as `certificateValidityPeriod: 1h`.
            kubelet: More lines for the cluster's KubeletConfiguration, such as `serverTLSBootstrap: true`.

        Raises:
            AssertionError: It did not come up; nothing of it is left but the words of its logs.
        """
        more = {"KUBEADM_KUBELET": kubelet}
        return cls._start(cls(name=name, ip=ip), "up", *([str(ca_dir)] if ca_dir else []), cluster=cluster, **more)

    @classmethod
    def join(cls, name: str, ip: str, other: Node, *, cluster: str = "", kubelet: str = "") -> Node:
        """
        Start one more control-plane node beside another; its arguments are those of `up`.

        Raises:
            AssertionError: As `up`.
        """
        return cls._start(cls(name=name, ip=ip), "join", other.name, cluster=cluster, KUBEADM_KUBELET=kubelet)

    @classmethod
    def worker(cls, name: str, ip: str, other: Node, *, form: Form = "reference", minutes: int | None = None) -> Node:
        """
        Start a worker of another node's cluster, by `kubeadm join`.

        Args:
            name: As in `up`.
            ip: As in `up`.
            other: A control-plane node.
            form: How its kubelet gets its client certificate; with a token a signer has to sign it meanwhile.
            minutes: Lifetime of a pre-signed one; a year if not given.

        Raises:
            AssertionError: As `up`.
        """
        more = {} if minutes is None else {"KUBELET_MINUTES": str(minutes)}
        return cls._start(cls(name=name, ip=ip), "worker", other.name, form, cluster="", **more)

    @classmethod
    def etcd_host(cls, name: str, ip: str, members: Mapping[str, str], *, ca_dir: Path, cluster: str = "") -> Node:
        """
        Start a host of etcd alone, as kubeadm's "Set up a High Availability etcd Cluster" leaves it.

        Args:
            name: As in `up`.
            ip: As in `up`.
            members: Addresses by name, this one's among them; etcd answers once most of them are up.
            ca_dir: Where etcd's CA is, or is to be; its key stays on no host.
            cluster: As in `up`.

        Raises:
            AssertionError: As `up`.
        """
        listed = [f"{member}={address}" for member, address in members.items()]
        return cls._start(cls(name=name, ip=ip), "etcd_host", str(ca_dir), *listed, cluster=cluster)

    @classmethod
    def host(cls, name: str, ip: str) -> Node:
        """
        Start a machine before kubeadm: a container runtime, a network, a service for a kubelet.

        Raises:
            AssertionError: As `up`.
        """
        return cls._start(cls(name=name, ip=ip), "host", cluster="")

    @classmethod
    def _start(cls, node: Node, verb: str, *args: str, cluster: str, **more: str) -> Node:
        command = [str(_SCRIPT), verb, node.name, node.ip, *args]
        environment = {**os.environ, "KUBEADM_CLUSTER": cluster, **more}
        try:
            run = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False, timeout=_START_SECONDS
            )
        except BaseException:  # a time limit, a Ctrl-C: a node that half exists stands in the way of the next
            node.down()
            raise
        if run.returncode:
            logs = node.logs()
            if "found a node of that name" not in run.stderr:  # that one is another test's
                node.down()
            raise AssertionError(f"{' '.join(command)}: exit {run.returncode}\n{run.stderr}\n{logs}")
        return node

    @property
    def root(self) -> Path:
        """What is `/` on the node, as far as kubeadm, kubelet and etcd write to it, seen from here."""
        return directory() / self.name / "root"

    @property
    def kubeconfig_dir(self) -> Path:
        """What is `/etc/kubernetes` on the node, seen from here."""
        return self.root / "etc/kubernetes"

    @property
    def pki_dir(self) -> Path:
        """What is `/etc/kubernetes/pki` on the node, seen from here."""
        return self.kubeconfig_dir / "pki"

    def exec(
        self, *command: str | Path, check: bool = True, timeout_seconds: float = 400, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """
        Run a command as on the node, with the kit's programs first in its path.

        Args:
            command: The program and its arguments.
            check: Let a failure be an AssertionError, with the command's own words; kubectl waits for an API server.
            timeout_seconds: After which it is killed: an AssertionError, with its output and the ends of the node's logs.
            env: Added to the environment.
        """
        deadline, waits = time.monotonic() + _PATIENCE_SECONDS, check and command[0] == "kubectl"
        run = self._run(*command, timeout_seconds=timeout_seconds, env=env)
        while waits and run.returncode and answers_in_a_moment(run.stderr) and time.monotonic() < deadline:
            time.sleep(0.5)
            run = self._run(*command, timeout_seconds=timeout_seconds, env=env)
            if any(verb in command and said in run.stderr for verb, said in _WAS_DONE.items()):
                return run
        if check and run.returncode:
            words = " ".join(map(str, command))
            raise AssertionError(f"{self.name}: {words}: exit {run.returncode}\n{run.stdout}{run.stderr}")
        return run

    def _run(
        self, *command: str | Path, timeout_seconds: float, env: dict[str, str] | None
    ) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                [_SCRIPT, "exec", self.name, *command],
                capture_output=True,
                text=True,
                check=False,
                timeout=timeout_seconds,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired as e:  # whose own text has the first and the last 100 characters
            output = b"".join(part for part in (e.stdout, e.stderr) if part).decode(errors="replace")
            words = f"{self.name}: {' '.join(map(str, command))}"
            raise AssertionError(f"{words}: killed after {timeout_seconds} s\n{output}\n{self.logs(lines=60)}") from e

    def kubectl(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run kubectl on the node, with its `admin.conf`."""
        return self.exec("kubectl", "--kubeconfig", "/etc/kubernetes/admin.conf", *args, check=check)

    def crictl(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run crictl on the node, against its container runtime."""
        return self.exec("crictl", "--config", "/etc/kubernetes/crictl.yaml", *args, check=check)

    def logs(self, *, lines: int = 15) -> str:
        """The end of each of the node's logs."""
        parts = []
        for path in sorted((directory() / self.name).glob("*.log")):
            tail = path.read_text(errors="replace").splitlines()[-lines:]
            parts.append("\n".join([f"== {path.name}", *tail]))
        return "\n".join(parts)

    def down(self) -> None:
        """Stop it and remove all of it; also when it is down already."""
        run = subprocess.run(
            [_SCRIPT, "down", self.name], capture_output=True, text=True, check=False, timeout=_START_SECONDS
        )
        if run.returncode:
            raise AssertionError(f"{self.name}: {run.stderr}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.down()
