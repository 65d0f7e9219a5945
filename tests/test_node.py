"""The kit's nodes are real, and leave nothing behind."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.specs import AUTHORITIES, Component
from tests.kit import node as kit
from tests.kit.node import Node
from tests.kit.nodes import wait_for
from tests.kit.pki import PKI_SPECS

pytestmark = pytest.mark.node

NAME, OTHER = "kit-1", "kit-2"
SHARED_DIRECTORIES = ("/etc/kubernetes", "/var/lib/kubelet", "/var/log/pods", "/etc/cni", "/run/containerd")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """After each test the machine is as it was; nodes of other tests come and go meanwhile."""
    before = traces()
    assert not [trace for trace in before if NAME in trace]
    yield
    with contextlib.suppress(AssertionError):
        wait_for("no new trace", lambda: not traces() - before)
    assert not traces() - before


def traces() -> set[str]:
    """What a node could leave behind, found by other means than those that remove it."""

    def lines(*command: str, check: bool = True) -> list[str]:
        return subprocess.run(command, capture_output=True, text=True, check=check).stdout.splitlines()

    links = lines("ip", "-brief", "link")
    found = [
        *links,
        *lines("ip", "netns", "list"),
        *Path("/proc/mounts").read_text().splitlines(),
        *lines("find", "/sys/fs/cgroup", "-type", "d", check=False),  # other nodes' cgroups end while it looks
        *map(str, kit.directory().glob("*")),
        *command_lines(),
    ]
    mine = {line for line in found if re.search(rf"\b({NAME}|{OTHER})\b", line)}
    if any(line.startswith("v-") for line in links):
        return mine  # another node, which needs what nodes share
    shared = {line.split()[0] for line in links if line.startswith("kube-nodes")}
    return mine | shared | {path for path in SHARED_DIRECTORIES if Path(path).exists()}


def command_lines() -> Iterator[str]:
    """The command lines of all processes; a killed one that init has not waited for yet has none any more."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            yield path.read_bytes().decode(errors="replace")


def running(node: Node) -> str:
    """The containers that run: those that do not find their API server yet end, and come again."""
    return node.crictl("ps", "--state", "running").stdout


@pytest.mark.slow
def test_runs_a_control_plane_without_ca_keys(tmp_path: Path) -> None:
    """A node in external-CA mode has all certificates, no CA key, and a control plane that answers; one of a name or address."""
    ca_dir = tmp_path / "ca-keys"
    with Node.up(NAME, "198.18.77.21", ca_dir=ca_dir) as node:
        for authority in AUTHORITIES.values():
            assert not (node.pki_dir / authority.key_file).exists()
            assert (ca_dir / authority.key_file).exists()
            assert (ca_dir / authority.certificate_file).read_bytes() == (
                node.pki_dir / authority.certificate_file
            ).read_bytes()
        static = [component for component in Component if component is not Component.KUBELET]
        for spec in PKI_SPECS.values():
            assert (node.kubeconfig_dir / spec.base if spec.kubeconfig else node.pki_dir / f"{spec.base}.crt").exists()

        with pytest.raises(AssertionError, match="found a node of that name"):
            Node.up(NAME, "198.18.77.22")
        with pytest.raises(AssertionError, match=r"found another node at 198\.18\.77\.21"):
            Node.host(OTHER, "198.18.77.21")
        assert NAME in node.kubectl("get", "nodes", "-o", "name").stdout
        wait_for("a control plane that runs", lambda: all(one.value in running(node) for one in static))
        assert node.exec("sh", "-c", "exit 3", check=False).returncode == 3
        with pytest.raises(AssertionError, match="exit 3"):
            node.exec("sh", "-c", "exit 3")


def test_a_machine_before_kubeadm_has_a_service_for_a_kubelet() -> None:
    """It starts one as soon as there is a configuration, and knows no other service; nothing of it is left."""
    with Node.host(NAME, "198.18.77.22") as node:
        assert node.exec("systemctl", "is-enabled", "kubelet").stdout == "enabled\n"
        assert node.exec("systemctl", "is-active", "kubelet.service", check=False).returncode == 3
        assert node.exec("systemctl", "restart", "sshd", check=False).returncode == 4
        (node.root / "var/lib/kubelet/config.yaml").write_text("kind: Nonsense\n")
        node.exec("systemctl", "start", "kubelet", check=False)
        log = node.root.parent / "kubelet.log"
        wait_for("a kubelet that ends and comes again", lambda: log.exists() and log.read_text().count("Nonsense") > 1)


def test_an_image_that_a_node_removes_is_there_for_the_next_one() -> None:
    """Nodes share the bytes of images, and none can change what another finds."""

    def images(node: Node) -> set[str]:
        listed = json.loads(node.crictl("images", "--output", "json").stdout)["images"]
        return {tag for image in listed for tag in image["repoTags"]}

    with Node.host(NAME, "198.18.77.22") as node:
        wait_for("all images", lambda: len(images(node)) == len(Component))  # and pause, but no kubelet
        before = images(node)
        [gone] = [tag for tag in before if "kube-scheduler:" in tag]
        node.crictl("rmi", gone)
        assert images(node) == before - {gone}
    with Node.host(NAME, "198.18.77.22") as node:
        wait_for("all images again", lambda: images(node) == before)


def test_a_node_that_does_not_come_up_leaves_nothing() -> None:
    """A failed start is an error with kubeadm's own words, and no half of a node stays."""
    with pytest.raises(AssertionError, match="Invalid encryption algorithm"):
        Node.up(NAME, "198.18.77.21", cluster="encryptionAlgorithm: Ed25519")


def test_down_needs_no_node() -> None:
    """`down` of a node that is not there succeeds."""
    Node(name=NAME, ip="198.18.77.21").down()
