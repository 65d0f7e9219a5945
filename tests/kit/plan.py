"""
Which worker of a run with several runs what: `NODE_WORKERS` of them begin with the tests that start nodes.

A node waits more than it works, and nodes of several files may be up at the same time, since each has a name and an
address of its own. A file's tests stay together: they share nodes. A worker that has done its part takes of what is left.

Nodes that several files share are in the conftest of a directory of these files alone, which one worker runs (`unit`).

The tests of `TOGETHER` stay together as well: they share a server that takes seconds of processor time to start, which each
worker would otherwise start for itself. The files of `SLOW` are no part of the fast run, `scripts/test` without `--all`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePath

NODE_WORKERS = 4

#: Seconds that a file takes by itself on two idle cores (`pytest --numprocesses 0 FILE`); another one takes `_UNKNOWN`.
SECONDS = {
    "e2e/test_gateway_node.py": 250,
    "e2e/three_nodes/test_timers_node.py": 310,
    "e2e/three_nodes/test_neighbours_node.py": 170,
    "e2e/test_fast_motion_node.py": 365,
    "e2e/test_rotate_ca_node.py": 490,
    "e2e/test_restart_node.py": 220,
    "e2e/test_etcd_hosts_node.py": 180,
    "e2e/test_kubelets_node.py": 150,
    "e2e/one_node/test_prove_node.py": 140,
    "e2e/test_pods_node.py": 180,
    "e2e/one_node/test_renewal_node.py": 115,
    "e2e/test_day0_node.py": 90,
    "e2e/test_door_node.py": 130,
    "e2e/test_door_pod_node.py": 100,
    "e2e/test_node.py": 55,
    "e2e/test_changes_node.py": 50,
    "test_node.py": 45,
}
_UNKNOWN = 30

#: Files that take most of the processor time of all that need neither root nor the kit, or need servers of Debian packages:
#: each of their rooms has others.
SLOW = frozenset(
    {
        "attack/test_answers.py",
        "attack/test_faults.py",
        "attack/test_inputs.py",
        "attack/test_printed.py",
        "backends/test_exec.py",
        "backends/test_http.py",
        "backends/test_openssl_hsm.py",
        "ca/test_documented_backend.py",
        "cli/test_app.py",
        "cli/test_printing.py",
        "cli/test_trial.py",
        "control_plane/test_etcd_claim.py",
        "control_plane/test_kubelet_serving.py",
        "control_plane/test_neighbours.py",
        "control_plane/test_restarts.py",
        "door/test_approvals.py",
        "door/test_door.py",
        "door/test_doors.py",
        "door/test_enrolments.py",
        "door/test_est.py",
        "door/test_postgresql.py",
        "door/test_revocations.py",
        "e2e/test_bad_cas.py",
        "e2e/test_interruption.py",
        "fuzz/test_fuzz.py",
        "release/test_offline.py",
        "release/test_release.py",
        "release/test_units.py",
        "renewal/test_activation.py",
        "renewal/test_airgap.py",
        "renewal/test_pairs.py",
        "rotation/test_emergency.py",
        "rotation/test_steps.py",
        "rotation/test_walks.py",
        "state/test_backups.py",
        "state/test_install_links.py",
        "state/test_requests.py",
        "system/test_interruption.py",
        "test_secrets.py",
        "users/test_users.py",
    }
)

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
    The number of the worker, from 0, for each file whose tests start nodes: the longest unit first, to who has least so far.

    Args:
        paths: Of test files, as pytest names them.
    """
    busy, found, units = [0] * NODE_WORKERS, dict[str, int](), dict[str, list[str]]()
    for path in sorted(set(filter(starts_nodes, paths))):
        units.setdefault(unit(path), []).append(path)
    for files in sorted(units.values(), key=lambda files: -sum(map(seconds, files))):
        worker = busy.index(min(busy))
        found |= dict.fromkeys(files, worker)
        busy[worker] += sum(map(seconds, files))
    return found


def unit(path: str) -> str:
    """What shares nodes: the directory below a room's, such as `tests/e2e/three_nodes`, or else the file alone."""
    return str(PurePath(path).parent) if len(PurePath(_tail(path)).parts) == 3 else path


def seconds(path: str) -> int:
    """The time that a file takes by itself."""
    return SECONDS.get(_tail(path), _UNKNOWN)


def stays_together(path: str) -> bool:
    """Whether one worker runs all tests of a file."""
    return _tail(path) in TOGETHER


def is_fast(path: str) -> bool:
    """Whether the fast run has those of a file's tests that need neither root nor programs."""
    return _tail(path) not in SLOW


def _tail(path: str) -> str:
    """Leave out the directory of all tests."""
    return "/".join(PurePath(path).parts[1:])
