"""
Which worker of a run with several runs what: `NODE_WORKERS` of them begin with the tests that start nodes.

A node waits more than it works, and nodes of several files may be up at the same time, since each has a name and an
address of its own. A file's tests stay together: they share nodes. A worker that has done its part takes of what is left.

The tests of `TOGETHER` stay together as well: they share a server that takes seconds of processor time to start, which each
worker would otherwise start for itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePath

NODE_WORKERS = 4

#: Seconds that a file takes by itself on two idle cores (`pytest --numprocesses 0 FILE`); another one takes `_UNKNOWN`.
SECONDS = {
    "e2e/test_gateway_node.py": 480,
    "e2e/test_three_live_nodes.py": 420,
    "e2e/test_cluster_node.py": 400,
    "e2e/test_fast_motion_node.py": 365,
    "e2e/test_rotate_ca_node.py": 295,
    "e2e/test_restart_node.py": 220,
    "e2e/test_etcd_hosts_node.py": 180,
    "e2e/test_kubelets_node.py": 150,
    "e2e/test_prove_node.py": 140,
    "e2e/test_pods_node.py": 180,
    "e2e/test_live_node.py": 130,
    "e2e/test_adoption_node.py": 220,
    "e2e/test_day0_node.py": 90,
    "e2e/test_door_node.py": 130,
    "e2e/test_door_pod_node.py": 100,
    "e2e/test_node.py": 55,
    "e2e/test_changes_node.py": 50,
    "test_node.py": 45,
}
_UNKNOWN = 30

#: Files whose tests share an API server with its etcd, a registration authority or a step-ca, and take at most three minutes.
TOGETHER = frozenset(
    {
        "backends/test_cmp_failures.py",
        "backends/test_exec_step_ca.py",
        "backends/test_kubernetes.py",
        "cluster/test_kubeadm.py",
        "control_plane/test_etcd_claim.py",
        "control_plane/test_kubelet_serving.py",
        "control_plane/test_proof_etcd.py",
        "diagnosis/test_ca_keys.py",
        "e2e/test_kubernetes_kubeadm.py",
        "gateway/test_gateway.py",
        "gateway/test_hostile.py",
        "gateway/test_manifests.py",
        "gateway/test_pods.py",
        "gateway/test_setup_kubernetes.py",
        "gateway/test_trust.py",
        "rotation/test_trust_copies.py",
    }
)


def starts_nodes(path: str) -> bool:
    """Whether its tests may start nodes, by the file's name."""
    return "node" in PurePath(path).name


def groups(paths: Iterable[str]) -> dict[str, int]:
    """
    The number of the worker, from 0, for each file whose tests start nodes: the longest first, to who has least so far.

    Args:
        paths: Of test files, as pytest names them.
    """
    busy, found = [0] * NODE_WORKERS, dict[str, int]()
    for path in sorted(set(filter(starts_nodes, paths)), key=lambda one: (-seconds(one), one)):
        found[path] = busy.index(min(busy))
        busy[found[path]] += seconds(path)
    return found


def seconds(path: str) -> int:
    """The time that a file takes by itself."""
    return SECONDS.get(_tail(path), _UNKNOWN)


def stays_together(path: str) -> bool:
    """Whether one worker runs all tests of a file."""
    return _tail(path) in TOGETHER


def _tail(path: str) -> str:
    """Leave out the directory of all tests."""
    return "/".join(PurePath(path).parts[1:])
