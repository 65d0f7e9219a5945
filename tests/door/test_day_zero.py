"""A node's first certificates through the door, with the real kubeadm: nothing of the CA on it but a one-time secret."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bridge.bootstrap import Role
from bridge.bootstrap.whole import NodeLook
from bridge.errors import Exit
from bridge.settings.load import parse as settings_of
from bridge.specs import AUTHORITIES
from bridge.system.waiting import wait_until
from tests.kit.desks import Desk, make_desk
from tests.kit.new_node import ADDRESS, NewNode
from tests.kit.pki import Pki, handmade_pki
from tests.kit.serving import ServeProgram, add_door, running

pytestmark = pytest.mark.kube

_ETCD = f'sans = ["{{node}}", "localhost", "127.0.0.1", "::1", "{ADDRESS}", "192.0.2.11"]'
#: Proofs are required, as a policy has it where nodes are renewed through the same door.
POLICY = f"""\
[allow]
clusters = ["kubernetes"]
nodes = ["cp-1", "cp-2", "w-1"]
masters = ["super-admin.conf"]

[certificate.apiserver]
sans = ["{{node}}", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local",
  "10.96.0.1", "{ADDRESS}", "192.0.2.11", ".example.com", "203.0.113.7"]
[certificate.etcd-server]
{_ETCD}
[certificate.etcd-peer]
{_ETCD}
[certificate.kubelet-server]
sans = ["{{node}}", "{ADDRESS}", "192.0.2.11", "192.0.2.21"]
"""


@pytest.fixture(scope="module")
def cas(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return handmade_pki(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, cas: Pki) -> Desk:
    return make_desk(tmp_path_factory.mktemp("desk") / "desk", cas, policy=POLICY)


@pytest.fixture(scope="module")
def door(desk: Desk) -> Iterator[ServeProgram]:
    with running(add_door(desk.config, desk.directory)) as program:
        yield program


def new_node(directory: Path, cas: Pki, door: ServeProgram, wait: str = "2m") -> NewNode:
    """A machine whose settings name the door and the secret's file, which is not there yet."""
    node = NewNode.make(directory, cas=cas, backend=False)
    where = {"url": door.url, "ca_file": str(door.ca), "wait": wait, "enrolment_file": str(secret_of(node))}
    node.bridge.add("backend.door", {"type": "door", **where})
    for name in AUTHORITIES:
        node.bridge.add(f"authority.{name}", {"backend": "door"})
    return node


def secret_of(node: NewNode) -> Path:
    return node.directory / "enrolment"


def enrolled(desk: Desk, node: NewNode, name: str, *options: str) -> None:
    """By the door's administrator, who hands the secret over."""
    run = desk.run("enroll", name, *options)
    assert run.returncode == Exit.DONE, run.stderr
    secret_of(node).touch(mode=0o600)
    secret_of(node).write_text(run.stdout)


def problems(node: NewNode, role: Role, name: str) -> list[str]:
    def read(path: Path) -> bytes | None:
        return path.read_bytes() if path.exists() else None

    return NodeLook(
        places=node.places, role=role, read=read, now=datetime.now(UTC), node=name, settings=settings_of("")
    ).problems()


def test_a_cluster_from_one_time_secrets(tmp_path: Path, desk: Desk, door: ServeProgram, cas: Pki) -> None:
    """`bootstrap init`, then `join` of a control plane and a worker: the CAs' certificates come through the door, too."""
    first, second, worker = (new_node(tmp_path / name, cas, door) for name in ("cp-1", "cp-2", "w-1"))
    enrolled(desk, first, "cp-1")
    made = first.init()
    enrolled(desk, second, "cp-2")
    enrolled(desk, worker, "w-1", "--certificate", "kubelet.conf", "--certificate", "kubelet-server")
    names = [
        ("--name", "cp-2", "--advertise-address", "192.0.2.11"),
        ("--name", "w-1", "--advertise-address", "192.0.2.21"),
    ]
    joined = second.run("join", "--control-plane", "--shared", "-", *names[0], given=first.run("share").stdout.encode())
    works = worker.run(
        "join", "--shared", "-", "--worker", *names[1], given=first.run("share", "--worker").stdout.encode()
    )

    assert [one.returncode for one in (made, joined, works)] == [0] * 3, made.stderr + joined.stderr + works.stderr
    assert (
        problems(first, "init", "cp-1") + problems(second, "control-plane", "cp-2") + problems(worker, "worker", "w-1")
        == []
    )
    phases = [first.phase("certs", "all"), first.phase("kubeconfig", "all")]
    assert [run.returncode for run in phases] == [0, 0], phases[0].stderr + phases[1].stderr
    assert "Generating" not in "".join(run.stdout for run in phases)
    assert len(desk.issued()) == 13 + 12 + 2
    secret = secret_of(first).read_text().strip().encode()
    assert [path for path in first.state.rglob("*") if path.is_file() and secret in path.read_bytes()] == []


def test_without_a_secret_of_its_own_a_node_gets_nothing(
    tmp_path: Path, desk: Desk, door: ServeProgram, cas: Pki
) -> None:
    """No file, and another node's secret: nothing is put in place. The right one is used once, and the next run goes on."""
    node, before = new_node(tmp_path, cas, door, wait="1s"), len(desk.issued())
    without = node.init()
    enrolled(desk, node, "cp-2")
    anothers = node.init()

    assert (without.returncode, anothers.returncode) == (Exit.USAGE, Exit.REFUSED), without.stderr + anothers.stderr
    assert "ca-bridge enroll" in without.stderr
    assert "found one of cp-1" in anothers.stderr
    assert node.files() == {}
    assert len(desk.issued()) == before
    enrolled(desk, node, "cp-1")
    away = desk.ca("ca").with_name("away")
    desk.ca("ca").rename(away)
    begun = node.init()
    away.rename(desk.ca("ca"))
    assert begun.returncode == Exit.WAITING, begun.stderr
    secret_of(node).unlink()
    done = wait_until(node.init, lambda run: run.returncode != Exit.WAITING, timedelta(minutes=5), pause_seconds=0.5)
    assert done.returncode == Exit.DONE, done.stderr
    assert len(desk.issued()) == before + 13
