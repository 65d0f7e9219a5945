"""`bootstrap join`, `share` and `orders`: files of further nodes, as far as they can be judged without a cluster."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from base64 import b64encode
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bridge.bootstrap import Role, orders
from bridge.bootstrap.keys import sa_public_pem
from bridge.bootstrap.orders import Order, OrderError, new_node
from bridge.bootstrap.whole import NodeLook
from bridge.errors import Exit
from bridge.node import kubeconfig
from bridge.node.kubeadm_config import parse_documents as parse
from bridge.pki import signatures
from bridge.pki.certificates import load_pem_certificates, pem, san_entries
from bridge.pki.csr import generate_key, key_pem
from bridge.settings.load import parse as settings_of
from bridge.specs import AUTHORITIES
from bridge.system.state_file import sealed
from tests.kit import next_cas
from tests.kit.new_node import CONFIG, ENDPOINT, NewNode
from tests.kit.pki import handmade_pki

pytestmark = pytest.mark.kube

SECOND = ("--name", "cp-2", "--advertise-address", "192.0.2.11")
WORKER = ("--name", "w-1", "--advertise-address", "192.0.2.21")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> NewNode:
    """A control-plane node, ready for `kubeadm init`."""
    node = NewNode.make(tmp_path_factory.mktemp("first"))
    run = node.init()
    assert run.returncode == 0, run.stderr
    return node


@pytest.fixture(scope="module")
def shared(first: NewNode) -> bytes:
    """What it gives to the next one."""
    run = first.run("share")
    assert run.returncode == 0, run.stderr
    return run.stdout.encode()


@pytest.mark.attack("G14")
@pytest.mark.parametrize(("mode", "words", "code"), [(0o644, [], 2), (0o600, [], 0), (0o644, ["--worker"], 0)])
def test_a_key_is_written_into_no_file_that_others_can_read(
    first: NewNode, tmp_path: Path, mode: int, words: list[str], code: int
) -> None:
    """The key goes to no such file and to no terminal; a worker's part has no key in it."""
    path = tmp_path / "shared.json"
    path.touch()
    path.chmod(mode)
    with path.open("wb") as out:
        run = subprocess.run(first.command("share", *words), stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    assert (run.returncode, path.stat().st_size > 0) == (code, code == 0), run.stderr
    assert code == 0 or "umask 077" in run.stderr


@pytest.fixture
def other(first: NewNode, tmp_path: Path) -> NewNode:
    """Another machine, which asks the same CAs."""
    return NewNode.make(tmp_path, cas=first.cas)


def problems(node: NewNode, role: Role, name: str) -> list[str]:
    def read(path: Path) -> bytes | None:
        return path.read_bytes() if path.exists() else None

    return NodeLook(
        places=node.places, role=role, read=read, now=datetime.now(UTC), node=name, settings=settings_of("")
    ).problems()


def join_yaml(node: NewNode) -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load(node.places.join_config.read_text())
    return found


def test_a_further_control_plane(first: NewNode, other: NewNode, shared: bytes) -> None:
    """Its own names, the first one's CAs and service account key, a pre-signed kubelet, and no super-admin.conf."""
    run = other.run("join", "--control-plane", "--shared", "-", *SECOND, given=shared)

    assert run.returncode == 0, run.stderr
    assert problems(other, "control-plane", "cp-2") == []
    assert other.places.sa_key.read_bytes() == first.places.sa_key.read_bytes()
    assert not (other.places.kubeconfigs / "super-admin.conf").exists()
    leaf = load_pem_certificates((other.places.pki / "apiserver.crt").read_bytes())[0]
    assert {("DNS", "cp-2"), ("IP", "192.0.2.11"), ("DNS", "spare.example.com")} <= san_entries(leaf)
    assert ("DNS", "cp-1") not in san_entries(leaf)
    document = join_yaml(other)
    assert document["discovery"] == {"file": {"kubeConfigPath": str(other.places.kubeconfigs / "admin.conf")}}
    assert document["nodeRegistration"]["ignorePreflightErrors"] == ["FileAvailable--etc-kubernetes-kubelet.conf"]  # type: ignore[index]
    assert "kubeadm join --config" in run.stdout
    assert (
        kubeconfig.parse((other.places.kubeconfigs / "kubelet.conf").read_bytes()).server == "https://192.0.2.11:6443"
    )
    key = first.places.sa_key.read_text().splitlines()[1]
    assert key not in run.stdout + run.stderr


#: The program, which is killed right after it has put its n-th file below a directory in place.
KILLED = """
import os, signal, sys
at, root = int(sys.argv.pop(1)), sys.argv.pop(1)
rename, seen = os.rename, 0
def counting(source, target, **kwargs):
    global seen
    rename(source, target, **kwargs)
    seen += str(target).startswith(root)
    if seen == at:
        os.kill(os.getpid(), signal.SIGKILL)
os.rename = counting
from bridge.entry import main
main()
"""


def test_the_kubelets_link_comes_with_its_file(first: NewNode, other: NewNode, tmp_path: Path) -> None:
    """Killed after each file that it puts in place: the link never leads to nothing, and the next run ends well."""
    given = first.run("share", "--worker").stdout.encode()
    for at in range(1, 10):
        node = NewNode.make(tmp_path / f"n{at}", cas=other.cas)
        args = node.command("join", "--worker", "--shared", "-", *WORKER)
        command = [sys.executable, "-c", KILLED, str(at), str(node.root), *args[1:]]
        code = subprocess.run(command, input=given, capture_output=True, check=False).returncode
        current = node.places.kubelet_current
        assert current.exists() or not current.is_symlink(), at
        if code == 0:
            assert at == 6 + 1  # the pair behind the link, kubelet.conf, the serving pair's two, join.yaml, the link
            return
        assert code == -signal.SIGKILL
        again = node.run("join", "--worker", "--shared", "-", *WORKER, given=given)
        assert again.returncode == 0, (at, again.stderr)
        assert problems(node, "worker", "w-1") == []
    raise AssertionError("it was never done")


@pytest.mark.attack("G13")
@pytest.mark.parametrize("change", ["nothing", "one file more", "another place", "a looser mode"])
def test_copies_write_this_nodes_files_alone(first: NewNode, other: NewNode, change: str) -> None:
    """A user who can change the copies can't have another file written, nor a key opened for others."""
    given, keep = first.run("share", "--worker").stdout.encode(), other.directory / "kept"
    join = ("join", "--worker", "--shared", "-", *WORKER, "--keep", keep)
    assert other.run(*join, given=given).returncode == 0
    other.wipe()
    path, evil = keep / "w-1.kept.json", other.root / "etc/cron.d/evil"
    document = json.loads(path.read_text())
    files = document["kept"]["files"]
    evil.parent.mkdir(parents=True)
    match change:
        case "one file more":
            files.append({"certificate": "node", "path": str(evil), "mode": 0o755, "data": b64encode(b"#").decode()})
        case "another place":
            files[0]["path"] = str(other.root / "etc/kubernetes/manifests/evil.yaml")
        case "a looser mode":
            for file in files:
                file["mode"] = 0o666
    write(path, document)
    before = other.files()

    run = other.run(*join, given=given)
    modes = {stat.S_IMODE(one.stat().st_mode) for one in other.root.rglob("*") if one.is_file()}
    assert modes <= {0o600, 0o644}
    assert not evil.exists()
    if change in ("nothing", "a looser mode"):
        assert run.returncode == 0, run.stderr
        assert "from the copies that were kept" in run.stdout
        assert problems(other, "worker", "w-1") == []
    else:
        assert run.returncode == Exit.REFUSED, run.stderr
        assert "wanted the files of w-1" in run.stderr
        assert other.files() == before


def write(path: Path, document: dict[str, Any]) -> None:
    """Write the file by hand, as an operator does who knows its format."""
    document.pop("digest", None)
    path.write_bytes(sealed(document))


def test_a_worker(first: NewNode, other: NewNode) -> None:
    """Its kubelet's files and join.yaml, and nothing else: kubeadm writes ca.crt itself, and refuses one that is there."""
    given = first.run("share", "--worker")
    run = other.run("join", "--worker", "--shared", "-", *WORKER, given=given.stdout.encode())

    assert "PRIVATE KEY" not in given.stdout
    assert run.returncode == 0, run.stderr
    assert problems(other, "worker", "w-1") == []
    names = {
        path
        for path in other.files()
        if "kubelet-client-2" not in path and not path.endswith(("kubelet.crt", "kubelet.key"))
    }
    assert names == {
        "etc/kubernetes/join.yaml",
        "etc/kubernetes/kubelet.conf",
        "var/lib/kubelet/pki/kubelet-client-current.pem",
    }
    parsed = kubeconfig.parse((other.places.kubeconfigs / "kubelet.conf").read_bytes())
    assert parsed.server == f"https://{ENDPOINT}"
    assert parsed.ca_data is not None
    assert "controlPlane" not in join_yaml(other)
    assert other.run("check", "--worker").returncode == 0
    looked = other.bridge.run("doctor")
    assert looked.returncode == 0, looked.stdout  # ca.crt is kubeadm's to write, and kubelet.crt the CA's
    assert "kubeadm join" in looked.stdout
    assert "made by the kubelet itself" not in looked.stdout
    assert "unless its configuration says otherwise" in looked.stdout  # kubeadm join writes it


def test_what_hurts_a_cluster_is_found_before_it_joins(other: NewNode, shared: bytes) -> None:
    """Without kubelet.conf an etcd member would be added to a node that never comes; nothing compares names with join.yaml."""
    made = other.run("join", "--control-plane", "--shared", "-", *SECOND, given=shared)
    good = other.run("check", "--control-plane")
    config = other.places.join_config
    text = config.read_text()
    config.write_text(text.replace("192.0.2.11", "192.0.2.99"))
    address = other.run("check", "--control-plane")
    config.write_text(text.replace("name: cp-2", "name: cp-3"))
    name = other.run("check", "--control-plane")
    config.write_text(text)
    cluster = other.places.kubeadm_config
    cluster.rename(cluster.with_name("elsewhere"))
    unknown = other.run("check", "--control-plane")
    cluster.write_text(cluster.with_name("elsewhere").read_text().replace(ENDPOINT, "api.example.org:6443"))
    endpoint = other.run("check", "--control-plane")
    cluster.with_name("elsewhere").rename(cluster)
    (other.places.kubeconfigs / "kubelet.conf").unlink()
    kubelet = other.run("check", "--control-plane")

    assert (made.returncode, good.returncode) == (0, 0), made.stderr + good.stderr
    assert [one.returncode for one in (address, name, unknown, endpoint, kubelet)] == [5] * 5
    assert "kubeadm.yaml: kubeadm's configuration is missing" in unknown.stderr
    assert "DNS:api.example.org" in endpoint.stderr
    assert "wanted IP:192.0.2.99 among the SANs" in address.stderr
    assert "wanted CN system:node:cp-3" in name.stderr
    assert "kubelet.conf: there is no such file" in kubelet.stderr


def test_an_expired_kubelet_certificate_is_found(other: NewNode, shared: bytes) -> None:
    """A kubelet that starts with it exits at once and for ever, and with it all static pods of the node stay away."""
    assert other.run("join", "--control-plane", "--shared", "-", *SECOND, given=shared).returncode == 0

    def read(path: Path) -> bytes | None:
        return path.read_bytes() if path.exists() else None

    later = datetime.now(UTC) + timedelta(days=366)
    found = NodeLook(
        places=other.places, role="control-plane", read=read, now=later, node="cp-2", settings=settings_of("")
    ).problems()

    assert any("kubelet.conf" in one and "not" in one for one in found), found
    assert problems(other, "control-plane", "cp-2") == []


def test_a_second_run_changes_nothing(other: NewNode, shared: bytes) -> None:
    """It says that all is there."""
    first = other.run("join", "--control-plane", "--shared", "-", *SECOND, given=shared)
    before = other.files()
    again = other.run("join", "--control-plane", "--shared", "-", *SECOND, given=shared)

    assert (first.returncode, again.returncode) == (0, 0), first.stderr + again.stderr
    assert "nothing to do" in again.stdout
    assert other.files() == before


def test_two_addresses_are_refused_with_the_flags_name(other: NewNode, shared: bytes) -> None:
    """No order is at fault where there is none."""
    run = other.run(
        "join", "--worker", "--shared", "-", "--name", "w-1", "--advertise-address", "192.0.2.1,::2", given=shared
    )
    assert run.returncode == 2
    assert "w-1: wanted an IP address, found '192.0.2.1,::2'" in run.stderr
    assert ("--advertise-address" in run.stderr, "carry it again" in run.stderr) == (True, False)


def test_the_operators_own_join_configuration_stays(other: NewNode, shared: bytes) -> None:
    """Taints, flags and patches are theirs; discovery is ours."""
    mine = other.config(
        "apiVersion: kubeadm.k8s.io/v1beta4\nkind: JoinConfiguration\n"
        "discovery: {bootstrapToken: {token: abcdef.0123456789abcdef}}\n"
        "nodeRegistration: {name: cp-2, taints: [], kubeletExtraArgs: [{name: node-ip, value: 192.0.2.99}]}\n"
        "controlPlane: {localAPIEndpoint: {advertiseAddress: 192.0.2.11, bindPort: 7443}}\n"
    )
    run = other.run("join", "--control-plane", "--shared", "-", "--kubeadm-config", mine, given=shared)

    assert run.returncode == 0, run.stderr
    document = join_yaml(other)
    assert document["nodeRegistration"]["kubeletExtraArgs"] == [{"name": "node-ip", "value": "192.0.2.99"}]  # type: ignore[index]
    assert document["controlPlane"]["localAPIEndpoint"]["bindPort"] == 7443  # type: ignore[index]
    assert "https://192.0.2.11:7443" in (other.places.kubeconfigs / "kubelet.conf").read_text()
    leaf = load_pem_certificates(other.places.serving[1].read_bytes())[0]
    assert {("IP", "192.0.2.11"), ("IP", "192.0.2.99")} <= san_entries(leaf)
    assert "token" not in str(document["discovery"])


def test_without_a_service_account_key_no_ca_is_asked(first: NewNode, other: NewNode) -> None:
    """The same pair on every control-plane node, for ever: a new one would make all tokens worthless."""
    given = first.run("share", "--worker").stdout.encode()
    run = other.run("join", "--control-plane", "--shared", "-", *SECOND, "--ca-dir", first.places.pki, given=given)

    assert run.returncode == 2
    assert "the service account key is missing" in run.stderr
    assert other.files() == {}
    assert all("V\t" not in (other.directory / "signers" / name / "index.txt").read_text() for name in AUTHORITIES)


def test_a_shared_file_that_others_can_read_is_refused(other: NewNode, shared: bytes) -> None:
    """A user who can read it can act as any service account."""
    path = other.directory / "shared.json"
    path.write_bytes(shared)
    path.chmod(0o644)
    refused = other.run("join", "--control-plane", "--shared", path, *SECOND)
    path.chmod(0o600)
    taken = other.run("join", "--control-plane", "--shared", path, *SECOND)

    assert refused.returncode == 2
    assert "shared.json" in refused.stderr
    assert taken.returncode == 0, taken.stderr


def test_a_service_account_key_that_others_can_read_is_refused(first: NewNode, other: NewNode, shared: bytes) -> None:
    """It was copied here with a loose mode, and is right otherwise; no CA is asked until it is for its owner alone."""
    other.places.pki.mkdir(parents=True)
    for path, copy in ((first.places.sa_key, other.places.sa_key), (first.places.sa_public, other.places.sa_public)):
        copy.write_bytes(path.read_bytes())
        copy.chmod(0o644)
    refused = other.run("join", "--control-plane", "--shared", "-", *SECOND, given=shared)
    assert (refused.returncode, "sa.key: wanted it for its owner alone" in " ".join(refused.stderr.split())) == (
        5,
        True,
    )
    assert "chmod 600" in refused.stderr
    assert all("V\t" not in (other.directory / "signers" / name / "index.txt").read_text() for name in AUTHORITIES)
    other.places.sa_key.chmod(0o600)
    taken = other.run("join", "--control-plane", "--shared", "-", *SECOND, given=shared)
    assert taken.returncode == 0, taken.stderr
    other.places.sa_key.chmod(0o640)
    os.chown(other.places.sa_key, -1, 12345)
    assert other.run("check", "--control-plane").returncode == 5
    other.places.sa_key.chmod(0o600)
    assert other.run("check", "--control-plane").returncode == 0


def test_another_clusters_key_is_refused(first: NewNode, other: NewNode, shared: bytes) -> None:
    """The pair in place has to be the one that the other nodes have."""
    stranger = json.loads(shared)
    key, public = first.places.sa_key, first.places.sa_public
    other.places.pki.mkdir()
    shutil.copy(key, other.places.sa_key)
    shutil.copy(public, other.places.sa_public)
    again = NewNode.make(other.directory / "x", cas=first.cas)
    assert again.init(config=CONFIG).returncode == 0
    stranger["serviceAccount"] = json.loads(again.run("share").stdout)["serviceAccount"]
    run = other.run("join", "--control-plane", "--shared", "-", *SECOND, given=json.dumps(stranger).encode())

    assert run.returncode == 2
    assert "another one" in run.stderr


def test_another_clusters_order_is_refused(first: NewNode, other: NewNode, shared: bytes) -> None:
    """An order and what the other node shares have to be of one cluster."""
    cas = {name: tuple(load_pem_certificates(handmade_pki(other.directory / "y").ca_pem("ca")[0])) for name in ("ca",)}
    order = Order(
        cluster=orders.loads(shared).cluster, authorities=cas, node=new_node("control-plane", "cp-2", ["192.0.2.11"])
    )
    path = other.directory / "order.json"
    path.write_bytes(orders.dumps(order))
    run = other.run("join", "--order", path, "--shared", "-", given=shared)

    assert run.returncode == 2
    assert "wanted the same CA" in run.stderr
    assert other.files() == {}
    assert first.places.sa_key.exists()


def test_orders_for_a_list_of_nodes(first: NewNode, tmp_path: Path, shared: bytes) -> None:
    """One command prepares all; an order holds no key, and each node makes its own from it."""
    office = NewNode.make(tmp_path / "office", backend=False)
    nodes = tmp_path / "nodes.txt"
    nodes.write_text(
        "init cp-1 192.0.2.10\ncontrol-plane cp-2 192.0.2.11\nworker w-1 192.0.2.21 2001:db8::21  # rack 2\n"
    )
    given = tmp_path / "orders"
    cas = tmp_path / "cas"
    (cas / "etcd").mkdir(parents=True)
    for name, authority in AUTHORITIES.items():
        shutil.copy(first.cas.ca_files(name)[0], cas / authority.certificate_file)
    options = ("--nodes", nodes, "--kubeadm-config", office.config(), "--ca-dir", cas, "-o", given)
    mistyped = office.run("orders", *options[:-3], tmp_path / "ca-certificate", "-o", given)
    assert mistyped.returncode == 2
    assert "no such directory" in mistyped.stderr
    made = office.run("orders", *options)
    again = office.run("orders", *options)

    assert made.returncode == 0, made.stderr
    assert again.returncode == 0, again.stderr
    assert "no order has its nodeRegistration.criSocket, since that is a node's own" in made.stderr
    files = {path.name: path.read_text() for path in given.iterdir()}
    assert set(files) == {"cp-1.order.json", "cp-2.order.json", "w-1.order.json"}
    assert "PRIVATE KEY" not in "".join(files.values())
    assert set(json.loads(files["w-1.order.json"])["authorities"]) == {"ca"}
    for name, command in (
        ("cp-1", ("init",)),
        ("cp-2", ("join", "--shared", "-")),
        ("w-1", ("join",)),
    ):
        node = NewNode.make(tmp_path / name, cas=first.cas)
        run = node.run(*command, "--order", given / f"{name}.order.json", given=shared)
        assert run.returncode == 0, (name, run.stderr)
        role: Role = "init" if name == "cp-1" else "control-plane" if name == "cp-2" else "worker"
        assert problems(node, role, name) == []


def test_an_order_is_for_one_role(first: NewNode, other: NewNode, shared: bytes) -> None:
    """A worker's order makes no control plane, and no order for a further node a first one."""
    cluster = orders.loads(shared)
    path = other.directory / "order.json"
    path.write_bytes(
        orders.dumps(Order(cluster=cluster.cluster, authorities={}, node=new_node("worker", "w-1", ["192.0.2.21"])))
    )
    runs = [other.run("init", "--order", path), other.run("join", "--control-plane", "--order", path)]

    assert [run.returncode for run in runs] == [2, 2]
    assert all("wanted an order for a node as" in run.stderr for run in runs)
    assert all("`ca-bridge bootstrap join --order FILE` takes that one" in run.stderr for run in runs)
    assert first.places.sa_key.exists()


@pytest.fixture(scope="module")
def admin(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An administrator's key, and its public part."""
    directory = tmp_path_factory.mktemp("admin")
    key, public = directory / "admin.key", directory / "admin.pem"
    key.touch(mode=0o600)
    made = generate_key("ecdsa-p256")
    key.write_bytes(key_pem(made))
    public.write_bytes(sa_public_pem(made))
    return key, public


@pytest.fixture(scope="module")
def signed(first: NewNode, admin: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A worker's order, as it leaves the administrator's machine."""
    place = tmp_path_factory.mktemp("office")
    office = NewNode.make(place / "office", backend=False)
    (place / "cas/etcd").mkdir(parents=True)
    for name, authority in AUTHORITIES.items():
        shutil.copy(first.cas.ca_files(name)[0], place / "cas" / authority.certificate_file)
    (place / "nodes").write_text("worker w-1 192.0.2.21\n")
    options = ("--nodes", place / "nodes", "--kubeadm-config", office.config(), "--ca-dir", place / "cas")
    plain = office.run("orders", *options, "-o", place / "orders")
    run = office.run("orders", *options, "-o", place / "orders", "--sign-with", admin[0])
    assert (plain.returncode, run.returncode) == (0, 0), plain.stderr + run.stderr
    order = json.loads((place / "orders/w-1.order.json").read_text())
    assert "compare the fingerprint" in plain.stdout
    assert "compare the fingerprint" not in run.stdout
    return cast("dict[str, Any]", order)


@functools.cache
def stranger_pem() -> str:
    """A CA's certificate that is not this cluster's."""
    with tempfile.TemporaryDirectory() as directory:
        return handmade_pki(Path(directory)).ca_pem("ca")[0].decode()


def other_ca(order: dict[str, Any]) -> None:
    """Behind the right one, which stays the first."""
    order["authorities"]["ca"] += stranger_pem()


def other_image(order: dict[str, Any]) -> None:
    order["cluster"] = order["cluster"].replace(
        "kind: ClusterConfiguration", "kind: ClusterConfiguration\nimageRepository: e.example.com"
    )


def other_endpoint(order: dict[str, Any]) -> None:
    order["cluster"] = order["cluster"].replace("api.example.com", "evil.example.com")


def other_name(order: dict[str, Any]) -> None:
    order["node"]["name"] = "w-2"


def other_role(order: dict[str, Any]) -> None:
    order["node"]["role"] = "control-plane"


def more_addresses(order: dict[str, Any]) -> None:
    order["node"]["addresses"].append("192.0.2.99")


def another_socket(order: dict[str, Any]) -> None:
    order["node"]["criSocket"] = "unix:///tmp/evil.sock"


def no_signature(order: dict[str, Any]) -> None:
    del order["signature"]


def another_signature(order: dict[str, Any]) -> None:
    order["signature"] = "AAAA"


def a_strangers_signature(order: dict[str, Any]) -> None:
    read = orders.loads(json.dumps(order).encode())
    order["signature"] = b64encode(signatures.sign(generate_key("ecdsa-p256"), orders.message(read))).decode()


TAMPERED = [other_ca, other_image, other_endpoint, other_name, other_role, more_addresses, another_socket,
            no_signature, another_signature, a_strangers_signature]  # fmt: skip


@pytest.mark.parametrize("change", TAMPERED)
def test_an_order_that_was_changed_on_its_way_yields_nothing(
    first: NewNode,
    signed: dict[str, Any],
    admin: tuple[Path, Path],
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
) -> None:
    """Each field of it, and the signature: the node has nothing of it, and no CA was asked; unchanged it is taken."""
    node = NewNode.make(tmp_path / "node", cas=first.cas)
    node.bridge.tables[0] += f'order_key = "{admin[1]}"\n'
    node.bridge.config.write_text("\n".join(node.bridge.tables))
    order, path = json.loads(json.dumps(signed)), tmp_path / "order.json"
    change(order)
    path.write_text(json.dumps(order))
    assert order != signed
    run = node.run("join", "--order", path)
    assert (run.returncode, node.files()) == (5, {}), run.stderr
    assert "wanted an order that is signed" in run.stderr
    assert not (node.state / "requests.json").exists()
    if change is other_ca:
        path.write_text(json.dumps(signed, sort_keys=True))
        done = node.run("join", "--order", path)
        assert done.returncode == 0, done.stderr
        assert problems(node, "worker", "w-1") == []


def test_a_second_ca_behind_the_right_one_is_refused(other: NewNode, shared: bytes) -> None:
    """Each certificate in a CA's file would be trusted: an order has to have those that the other node has; a twin has."""
    document = json.loads(shared)
    key = document.pop("serviceAccount")
    document["node"] = {"role": "control-plane", "name": "cp-2", "addresses": ["192.0.2.11"], "criSocket": ""}
    right, wrong = other.directory / "right.json", other.directory / "wrong.json"
    right.write_text(json.dumps(document))
    document["authorities"]["ca"] += stranger_pem()
    wrong.write_text(json.dumps(document))
    refused = other.run("join", "--order", wrong, "--shared", "-", given=shared)
    assert (refused.returncode, other.files()) == (2, {}), refused.stderr
    assert "wanted the same CA" in refused.stderr
    taken = other.run("join", "--order", right, "--shared", "-", given=shared)
    assert taken.returncode == 0, taken.stderr
    assert "compare with what `bootstrap orders` printed" in " ".join(taken.stdout.split())
    assert key["key"].encode() == other.places.sa_key.read_bytes()


BAD_LISTS = {
    "a role that is none": "boss cp-1 192.0.2.1",
    "no address": "worker w-1",
    "no name": "worker",
    "a name in capitals": "worker W1 192.0.2.1",
    "an address that is none": "worker w-1 192.0.2.300",
    "a name twice": "worker w-1 192.0.2.1\nworker w-1 192.0.2.2",
    "two first nodes": "init a 192.0.2.1\ninit b 192.0.2.2",
    "nothing": "# no node\n",
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_a_list_that_is_none(case: str, tmp_path: Path) -> None:
    """The line is named."""
    file = tmp_path / "nodes"
    file.write_text(BAD_LISTS[case])
    with pytest.raises(OrderError) as caught:
        orders.read_nodes(file)
    assert "line" in str(caught.value) or case == "nothing"


@given(
    st.binary(max_size=100)
    | st.dictionaries(
        st.sampled_from(["schema", "version", "cluster", "authorities", "node", "serviceAccount", "x"]),
        st.sampled_from(["ca-bridge/new-node", 1, None, {}, [], "a: 1", {"ca": "x"}, CONFIG]),
    ).map(lambda one: json.dumps(one).encode())
)
def test_whatever_is_carried(data: bytes) -> None:
    """It is an order, or it is refused in words of ours."""
    try:
        orders.loads(data)
    except OrderError as e:
        assert "wanted" in str(e)


def test_an_order_survives_being_carried(shared: bytes) -> None:
    """An order that is written and read is the same."""
    order = orders.loads(shared)

    assert order.sa is not None
    assert orders.loads(orders.dumps(order)) == order
    assert order.cluster.cluster == parse(CONFIG.encode()).cluster


def test_a_key_is_not_printed_on_a_terminal(first: NewNode) -> None:
    """A terminal's scrollback and recordings would keep the key."""
    run = subprocess.run(
        ["script", "-qec", " ".join(first.command("share")), "/dev/null"], capture_output=True, text=True, check=False
    )

    assert "wanted a pipe or a file of your own" in run.stdout
    assert "PRIVATE KEY" not in run.stdout
    assert stat.S_IMODE(first.places.sa_key.stat().st_mode) == 0o600


@pytest.mark.rotation("a node joins between phases")
def test_a_node_that_joins_while_a_ca_is_replaced_asks_the_ca_that_signs(tmp_path: Path) -> None:
    """The first of the CA file that it is given, in which the others have both CAs."""
    first, made = NewNode.make(tmp_path / "first"), next_cas.make(tmp_path / "next")["ca"]
    assert first.init().returncode == 0
    place = first.places.pki / "ca.crt"
    place.write_bytes(pem(made.signer.certificate) + place.read_bytes())
    shared = first.run("share", "--worker")
    assert shared.returncode == 0, shared.stderr
    other = NewNode.make(tmp_path / "other", cas=first.cas)
    other.bridge.add("backend.next", {"type": "openssl", "dir": made.table["dir"]})
    other.bridge.add("authority.ca.next", {"backend": "next", "anchor": made.table["anchor"]})
    joined = other.run("join", "--worker", "--shared", "-", *WORKER, given=shared.stdout.encode())
    assert joined.returncode == 0, joined.stderr
    leaf = load_pem_certificates(other.places.kubelet_current.read_bytes())[0]
    assert leaf.issuer == made.signer.certificate.subject
    parsed = kubeconfig.parse((other.places.kubeconfigs / "kubelet.conf").read_bytes())
    assert load_pem_certificates(parsed.ca_data or b"") == load_pem_certificates(place.read_bytes())
