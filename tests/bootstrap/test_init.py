"""`bootstrap init` with the real kubeadm and `openssl ca`: what is made, and what kubeadm says to it."""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import stat
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from bridge.bootstrap import ROLES, desired, keys, make, specs_of
from bridge.bootstrap.whole import NodeLook
from bridge.node import kubeconfig
from bridge.pki.bundle_format import loads_request
from bridge.pki.certificates import load_pem_certificates, san_entries
from bridge.pki.csr import generate_key, key_pem
from bridge.settings.load import load, parse
from bridge.specs import AUTHORITIES
from bridge.state import Store
from tests.kit import programs
from tests.kit.desks import make_desk
from tests.kit.new_node import ADDRESS, CONFIG, ENDPOINT, NAME, NewNode
from tests.kit.pki import handmade_pki
from tests.kit.renewing import Quiet

pytestmark = pytest.mark.kube

POLICY = f"""\
[allow]
clusters = ["kubernetes"]
nodes = ["{NAME}"]
masters = ["super-admin.conf"]
proof = "optional"

[certificate.apiserver]
sans = ["{{node}}", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local",
  "10.96.0.1", "{ADDRESS}", ".example.com", "203.0.113.7"]
[certificate.etcd-server]
sans = ["{{node}}", "localhost", "127.0.0.1", "::1", "{ADDRESS}"]
[certificate.etcd-peer]
sans = ["{{node}}", "localhost", "127.0.0.1", "::1", "{ADDRESS}"]
[certificate.kubelet-server]
sans = ["{{node}}", "{ADDRESS}"]
"""


@pytest.fixture
def node(tmp_path: Path) -> NewNode:
    """A machine and its CAs."""
    return NewNode.make(tmp_path)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> NewNode:
    """A node that is ready for `kubeadm init`; no test changes it."""
    node = NewNode.make(tmp_path_factory.mktemp("ready"))
    run = node.init()
    assert run.returncode == 0, run.stderr
    return node


@pytest.fixture
def copy(ready: NewNode, tmp_path: Path) -> NewNode:
    """Another machine with the same files, whose CAs are away."""
    node = NewNode.make(tmp_path, cas=ready.cas, backend=False)
    shutil.rmtree(node.root)
    shutil.copytree(ready.root, node.root, symlinks=True)
    link = node.places.kubelet_current
    target = link.parent / link.readlink().name
    link.unlink()
    link.symlink_to(target)
    conf = node.places.kubeconfigs / "kubelet.conf"
    conf.write_text(conf.read_text().replace(str(ready.root), str(node.root)))
    return node


def put_cas(node: NewNode) -> None:
    """Put the CAs' certificates in place."""
    for name, authority in AUTHORITIES.items():
        path = node.places.pki / authority.certificate_file
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(node.cas.ca_files(name)[0], path)


def look(node: NewNode) -> NodeLook:
    def read(path: Path) -> bytes | None:
        return path.read_bytes() if path.exists() else None

    return NodeLook(places=node.places, role="init", read=read, now=datetime.now(UTC), node=NAME, settings=parse(""))


def test_all_is_there_and_kubeadm_makes_nothing(ready: NewNode) -> None:
    """kubeadm's two phases that make certificates and kubeconfigs find all 24 files, and write none."""
    before = ready.files()
    phases = [ready.phase("certs", "all"), ready.phase("kubeconfig", "all")]

    assert [run.returncode for run in phases] == [0, 0], phases[0].stderr + phases[1].stderr
    said = "".join(run.stdout for run in phases)
    assert "Generating" not in said
    assert said.count("Using existing") == 3 + 7 + 1  # CAs, pairs, the service account key
    assert said.count("Using user provided") == 5
    assert ready.files() == before
    kubernetes = [path for path in before if path.startswith("etc/kubernetes/") and not path.endswith("kubeadm.yaml")]
    assert len(kubernetes) == 24
    assert not list(ready.root.rglob("ca.key"))


def test_that_kubeadm_makes_nothing_can_fail(copy: NewNode) -> None:
    """Without a CA's certificate kubeadm makes a CA of its own, key and all."""
    (copy.places.pki / "ca.crt").unlink()
    run = copy.phase("certs", "all")

    assert 'Generating "ca" certificate and key' in run.stdout
    assert (copy.places.pki / "ca.key").exists()


def test_keys_are_for_their_owner_alone(ready: NewNode) -> None:
    """A file with a private key has mode 0600, and the key is nowhere else."""
    secret = [path for path in ready.root.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()]
    secret += ready.places.kubeconfigs.glob("*.conf")
    secret.append(ready.places.kubeadm_config)  # an operator's may hold a bootstrap token
    modes = {stat.S_IMODE(path.stat().st_mode) for path in secret}

    assert len(secret) >= 7 + 1 + 1 + 5
    assert modes == {0o600}
    left = [path for path in ready.state.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()]
    assert left == []


def test_servers_are_the_right_ones(ready: NewNode) -> None:
    """Local components speak to their own API server, the kubelet too; people to the control plane's endpoint."""
    local, everywhere = f"https://{ADDRESS}:6443", f"https://{ENDPOINT}"
    wanted = {
        "admin.conf": everywhere,
        "super-admin.conf": everywhere,
        "kubelet.conf": local,
        "controller-manager.conf": local,
        "scheduler.conf": local,
    }
    found = {name: kubeconfig.parse((ready.places.kubeconfigs / name).read_bytes()).server for name in wanted}

    assert found == wanted


def test_the_kubelet_has_one_certificate_by_reference(ready: NewNode) -> None:
    """kubelet.conf refers to the .pem behind an absolute link, in the layout that a kubelet keeps itself."""
    parsed = kubeconfig.parse((ready.places.kubeconfigs / "kubelet.conf").read_bytes())
    current = ready.places.kubelet_current

    assert parsed.certificate_data is None
    assert parsed.certificate_file == parsed.key_file == str(current)
    target = current.readlink()
    assert target.is_absolute()
    assert re.fullmatch(r"kubelet-client-\d{4}(-\d\d){5}\.pem", target.name)
    data = current.read_bytes()
    key = load_pem_private_key(data[data.index(b"-----BEGIN EC") :], None)
    assert key.public_key() == load_pem_certificates(data)[0].public_key()


def test_the_kubelets_own_port_has_a_certificate(ready: NewNode) -> None:
    """Placed before the first start it is kept; with the node's address in it the API server can verify the kubelet."""
    key, certificate = ready.places.serving
    leaf = load_pem_certificates(certificate.read_bytes())[0]

    assert san_entries(leaf) == {("DNS", NAME), ("IP", ADDRESS)}
    assert load_pem_private_key(key.read_bytes(), None).public_key() == leaf.public_key()


@pytest.mark.parametrize("by", ["settings", "kubelet"])
def test_its_names_are_what_a_renewal_would_ask_for(node: NewNode, by: str) -> None:
    """Those of the settings alone, or else the addresses that the kubelet's flags give the node, too; a check wants them."""
    names, config = {("DNS", NAME), ("IP", "192.0.2.99")}, CONFIG
    if by == "settings":
        node.bridge.add("certificate.kubelet-server", {"sans": [NAME, "192.0.2.99"]})
    else:
        flags = '[{name: node-ip, value: "192.0.2.99,2001:db8::9"}]'
        names |= {("IP", ADDRESS), ("IP", "2001:db8::9")}
        config = CONFIG.replace(f"name: {NAME}", f"name: {NAME}, kubeletExtraArgs: {flags}")
    run = node.init(config=config)
    assert run.returncode == 0, run.stderr
    assert san_entries(load_pem_certificates(node.places.serving[1].read_bytes())[0]) == names
    assert node.run("check").returncode == 0
    if by == "settings":
        node.bridge.config.write_text(node.bridge.config.read_text().replace("192.0.2.99", "192.0.2.98"))
        run = node.run("check")
        assert "wanted IP:192.0.2.98 among the SANs" in run.stdout + run.stderr


def test_super_admin_is_short_lived(ready: NewNode) -> None:
    """It is needed for seconds, and is beyond RBAC: about the shortest lifetime that the settings take is asked for."""
    data = kubeconfig.parse((ready.places.kubeconfigs / "super-admin.conf").read_bytes()).certificate_data
    end = load_pem_certificates(data or b"")[0].not_valid_after_utc

    assert end - datetime.now(UTC) < timedelta(days=8, hours=1)


def test_names_are_those_of_the_configuration(ready: NewNode) -> None:
    """SANs come from kubeadm's own reading of its configuration."""
    leaf = load_pem_certificates((ready.places.pki / "apiserver.crt").read_bytes())[0]

    assert {("DNS", "spare.example.com"), ("IP", "203.0.113.7"), ("IP", ADDRESS), ("DNS", NAME)} <= san_entries(leaf)


@pytest.mark.parametrize(
    "change", [(f"name: {NAME}", f"name: {NAME}-{'a' * 60}"), ("spare.example.com", "Spare.Example.com")]
)
def test_names_that_kubeadm_takes(node: NewNode, change: tuple[str, str]) -> None:
    """A kubelet's CN may be longer than 64 characters, as Go writes it; kubeadm writes `certSANs` in small letters."""
    run = node.init(config=CONFIG.replace(*change))
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system; run as root")
def test_a_full_disk_is_found_before_keys_are_made(node: NewNode) -> None:
    """It is named, and not kubeadm, which would be the first to fail."""
    node.state.mkdir(mode=0o700, parents=True)
    command = shlex.join(node.command("init", "--kubeadm-config", node.config()))
    script = f"mount -t tmpfs -o mode=0700,size=64k tmpfs {shlex.quote(str(node.state))} && exec {command}"
    environment = {**os.environ, "PATH": f"{programs.directory()}:{os.environ['PATH']}"}
    words = ["unshare", "--mount", "sh", "-c", script]
    run = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)

    assert run.returncode == 1, run.stderr
    assert "make room there" in run.stderr
    assert "kubeadm" not in run.stderr
    assert node.files() == {}


def test_what_is_in_place_is_not_of_another_configuration(copy: NewNode) -> None:
    """No option makes it so, hence none is recommended; what would do it is."""
    before = copy.files()
    other = CONFIG.replace("spare.example.com", "spare2.example.com")
    runs = [copy.init(config=other), copy.init("--anew", config=other)]

    assert [run.returncode for run in runs] == [2, 2]
    assert all("kubeadm reset" in run.stderr and "--anew" not in run.stderr for run in runs)
    assert copy.files() == before


def test_a_second_run_changes_nothing(ready: NewNode) -> None:
    """It looks at the whole, and says so."""
    before = ready.files()
    run = ready.init()

    assert run.returncode == 0, run.stderr
    assert "nothing to do" in run.stdout
    assert "rotateCertificates: false" in run.stderr  # kubeadm's default is for clusters with a signer
    assert ready.files() == before


@pytest.mark.parametrize("is_lost", [True, False])
def test_lines_that_the_audit_log_lacks_are_an_error(
    node: NewNode, monkeypatch: pytest.MonkeyPatch, *, is_lost: bool
) -> None:
    """All files are in place by then: the exit code says that the log lacks who put them there."""
    head, put_in_place = Store(node.state).audit_head, make.put_in_place

    def and_damage_the_log(*args: Any) -> None:
        put_in_place(*args)
        if is_lost:
            head.unlink()
            head.mkdir()

    monkeypatch.setattr(make, "put_in_place", and_damage_the_log)
    settings, program = load(node.bridge.config), str(programs.require("kubeadm"))
    wanted = desired.of_init(settings, desired.NodeInputs(config=node.config(), kubeadm=program))
    done = make.make(settings, wanted, lambda: datetime.now(UTC), Quiet(), timedelta())

    assert done.is_complete
    assert [str(e).count("the audit log lacks") for e in done.errors] == [1] * is_lost
    assert done.exit_code == (1 if is_lost else 0)


# --- what kubeadm does not look for -----------------------------------------------------------------------------------


def drop(name: str) -> Callable[[NewNode], None]:
    return lambda node: (node.places.kubeconfigs / name).unlink()


def foreign_key(node: NewNode) -> None:
    path = node.places.pki / "etcd/server.key"
    path.write_bytes(key_pem(generate_key("ecdsa-p256")))


def foreign_sa(node: NewNode) -> None:
    node.places.sa_key.write_bytes(key_pem(generate_key("ecdsa-p256")))


def old_style_kubelet(node: NewNode) -> None:
    """Data in kubelet.conf, beside the .pem: both would have to be renewed."""
    path = node.places.kubeconfigs / "kubelet.conf"
    document = yaml.safe_load(path.read_text())
    admin = yaml.safe_load((node.places.kubeconfigs / "admin.conf").read_text())
    document["users"][0]["user"] = admin["users"][0]["user"]
    path.write_text(yaml.safe_dump(document))


def no_pem(node: NewNode) -> None:
    node.places.kubelet_current.readlink().unlink()


TRAPS: dict[str, tuple[Callable[[NewNode], None], str]] = {
    "sa.key": (drop("pki/sa.key"), "sa.key: the service account key is missing"),
    "sa.pub": (drop("pki/sa.pub"), "sa.pub: the service account key is missing"),
    "etcd/server.key": (drop("pki/etcd/server.key"), "etcd/server.key: there is no such file"),
    "ca.crt": (drop("pki/ca.crt"), "ca.crt: the CA's certificate is missing (kubeadm would make a CA of its own)"),
    "front-proxy-ca.crt": (drop("pki/front-proxy-ca.crt"), "front-proxy-ca.crt: the CA's certificate is missing"),
    "etcd/ca.crt": (drop("pki/etcd/ca.crt"), "etcd/ca.crt: the CA's certificate is missing"),
    "kubelet.conf": (drop("kubelet.conf"), "kubelet.conf: there is no such file"),
    "the kubelet's .pem": (no_pem, "kubelet-client-current.pem: there is no such file"),
    "a foreign key": (foreign_key, "etcd/server.key: wanted the key of its certificate"),
    "a foreign sa.key": (foreign_sa, "sa.pub: wanted the public key of sa.key"),
    "kubelet.conf with data": (old_style_kubelet, "kubelet.conf: wanted "),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_what_kubeadm_would_find_too_late_is_found(copy: NewNode, trap: str) -> None:
    """`bootstrap check` names what is missing or wrong, and `init` does not go on over it."""
    before = copy.run("check")
    spring, wanted = TRAPS[trap]
    spring(copy)
    check, init = copy.run("check"), copy.init()

    assert before.returncode == 0, before.stderr
    assert check.returncode == 5, check.stdout
    assert wanted in check.stderr
    assert init.returncode == 5
    assert wanted in init.stderr


def other_configuration(old: str, new: str) -> Callable[[NewNode], None]:
    def spring(node: NewNode) -> None:
        path = node.places.kubeadm_config
        path.write_text(path.read_text().replace(old, new))

    return spring


def etcd_data(node: NewNode) -> None:
    other_configuration(
        "controlPlaneEndpoint", f"etcd: {{local: {{dataDir: {node.places.etcd}}}}}\ncontrolPlaneEndpoint"
    )(node)
    (node.places.etcd / "member").mkdir(parents=True)


#: What kubeadm says nothing of, or aborts over, by what is to be looked for in what `bootstrap check` says.
NOT_AS_SAID: dict[str, Callable[[NewNode], object]] = {
    "wanted DNS:api.example.org among": other_configuration(ENDPOINT, "api.example.org:6443"),
    "wanted DNS:more.example.com among": other_configuration("spare.example.com", "more.example.com"),
    "wanted IP:203.0.113.8 among": other_configuration("203.0.113.7", "203.0.113.8"),
    "wanted DNS:kubernetes.default.svc.corp.example among": other_configuration(
        "controlPlaneEndpoint", "networking: {dnsDomain: corp.example}\ncontrolPlaneEndpoint"
    ),
    "kubeadm.yaml: kubeadm's configuration is missing": lambda node: node.places.kubeadm_config.unlink(),
    "member: wanted a node without a cluster": etcd_data,
}


@pytest.mark.parametrize("wanted", NOT_AS_SAID)
def test_nothing_counts_as_right_that_was_not_compared(copy: NewNode, wanted: str) -> None:
    """`bootstrap check` looks for each name of kubeadm.yaml, wants that file, and knows a cluster's data."""
    NOT_AS_SAID[wanted](copy)
    run = copy.run("check")

    assert run.returncode == 5, run.stdout
    assert wanted in run.stderr


@pytest.mark.parametrize("name", ["sa.key", "etcd/server.key"])
def test_kubeadm_does_not_notice(copy: NewNode, name: str) -> None:
    """kubeadm's own checks and phases pass without these files, which is why we check them."""
    (copy.places.pki / name).unlink()

    assert copy.phase("certs", "all").returncode == 0
    assert copy.phase("kubeconfig", "all").returncode == 0


def test_a_ca_key_on_the_node_is_refused(node: NewNode) -> None:
    """kubeadm would sign with it."""
    node.places.pki.mkdir()
    shutil.copy(node.cas.ca_files("ca")[1], node.places.pki / "ca.key")
    run = node.init()

    assert run.returncode == 5
    assert "wanted no CA's private key on a node" in run.stderr


def test_a_ca_key_beside_its_certificate_is_not_copied(node: NewNode) -> None:
    """A file of `--ca-dir` that holds a private key is refused, and nothing of it gets onto the node."""
    place = node.directory / "given"
    (place / "etcd").mkdir(parents=True)
    for name, authority in AUTHORITIES.items():
        (place / authority.certificate_file).write_bytes(b"".join(node.cas.ca_pem(name)))
    run = node.init("--ca-dir", place)

    assert run.returncode == 5
    assert "found a private key beside it" in run.stderr
    assert node.files() == {}


def test_one_ca_for_two_authorities_is_refused(node: NewNode) -> None:
    """The holder of any client certificate of the cluster could otherwise name any user, or read etcd."""
    place = node.directory / "given"
    (place / "etcd").mkdir(parents=True)
    for authority in AUTHORITIES.values():
        shutil.copy(node.cas.ca_files("ca")[0], place / authority.certificate_file)
    run = node.init("--ca-dir", place)

    assert run.returncode == 2
    assert "wanted a CA each" in run.stderr
    assert node.files() == {}


def test_another_clusters_ca_in_place_is_refused(node: NewNode) -> None:
    """The CA that signs has to be the one whose certificate lies there; otherwise it gets no request."""
    node.places.pki.mkdir()
    other = handmade_pki(node.directory / "other")
    shutil.copy(other.ca_files("ca")[0], node.places.pki / "ca.crt")
    run = node.init()

    assert run.returncode == 5, run.stderr
    assert "wanted the CA of" in run.stderr
    assert not (node.places.kubeconfigs / "admin.conf").exists()


@pytest.mark.parametrize(
    "trace", ["etc/kubernetes/manifests/etcd.yaml", "var/lib/etcd/member/snap", "var/lib/kubelet/config.yaml"]
)
def test_a_node_of_a_cluster_is_refused(node: NewNode, trace: str) -> None:
    """Where a cluster is, or was, nothing is made."""
    path = node.root / trace
    path.parent.mkdir(parents=True)
    path.touch()
    run = node.init(config=f"{CONFIG}etcd: {{local: {{dataDir: {node.places.etcd}}}}}\n")

    assert run.returncode == 1, run.stdout
    assert "wanted a node without a cluster" in run.stderr
    assert len(node.files()) == 1


def test_single_leftovers_are_refused(node: NewNode) -> None:
    """One file that another program left is no complete set."""
    path = node.places.kubeconfigs / "admin.conf"
    path.touch()
    run = node.init()

    assert run.returncode == 2
    assert "admin.conf" in run.stderr
    assert list(node.files()) == ["etc/kubernetes/admin.conf"]


BAD_CONFIGS = {
    "no version": (CONFIG.replace("kubernetesVersion: v1.37.2\n", ""), "kubernetesVersion: wanted a version"),
    "another version's kubeadm": (
        CONFIG.replace("v1.37.2", "v1.36.0"),
        "wanted the kubeadm of kubernetesVersion v1.36.0",
    ),
    "no name": (CONFIG.replace(f"name: {NAME}, ", ""), "nodeRegistration.name"),
    "a name of digits alone": (
        CONFIG.replace(f"name: {NAME}", 'name: "123"'),
        "a DNS name such as api.example.com, found '123'",
    ),
    "no address": (CONFIG.replace(ADDRESS, "192.0.2.256"), "advertiseAddress"),
    "another directory": (CONFIG + "certificatesDir: /srv/pki\n", "certificatesDir"),
    "an external etcd without a key": (
        CONFIG + "etcd: {external: {endpoints: [https://192.0.2.1:2379], caFile: /a, certFile: /b}}\n",
        "etcd.external.keyFile: wanted a file of its own by its absolute path, found none",
    ),
    "an external etcd's file that is not absolute": (
        CONFIG + "etcd: {external: {endpoints: [https://192.0.2.1:2379], caFile: a, certFile: /b, keyFile: /c}}\n",
        "etcd.external.caFile",
    ),
    "one file for two": (
        CONFIG
        + "etcd: {external: {endpoints: [https://192.0.2.1:2379], caFile: /a, certFile: /b, keyFile: /x/../b}}\n",
        "found that of etcd.external.certFile, /x/../b",
    ),
    "no YAML": ("{", "syntax error"),
    "an alias": (f"{CONFIG}x: &x {{y: 1}}\nz: *x\n", "an alias"),
    "something else": ("a: 1", "apiVersion"),
    "no kind of key": (CONFIG.replace("ECDSA-P256", "DSA-1"), "encryptionAlgorithm: wanted one of RSA-2048"),
    "what kubeadm refuses": (f"{CONFIG}networking: {{dnsDomain: A}}\n", "wanted a configuration that kubeadm takes"),
    "a mistyped key, of which kubeadm only warns": (
        CONFIG.replace("certSANs", "certSAN"),
        'ClusterConfiguration: unknown field "apiServer.certSAN"',
    ),
    "one of the kubelet's": (
        f"{CONFIG}---\napiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nrotateCertificate: false\n",
        'KubeletConfiguration: unknown field "rotateCertificate"',
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_configuration_that_can_not_be_used(node: NewNode, case: str) -> None:
    """The error comes before any CA gets a request, and nothing is put in place."""
    text, wanted = BAD_CONFIGS[case]
    run = node.init(config=text)

    assert run.returncode in (1, 2), run.stderr
    assert wanted in run.stderr
    assert "internal error" not in run.stderr
    assert node.files() == {}


def test_the_few_facts_are_enough(node: NewNode) -> None:
    """Without a file one is made of the flags, and kubeadm takes it."""
    run = node.run(
        *("init", "--name", NAME, "--advertise-address", ADDRESS, "--control-plane-endpoint", "api.example.com"),
        *("--kubernetes-version", "v1.37.2", "--key", "ECDSA-P256", "--cert-san", "more.example.com"),
        *("--cri-socket", "unix:///run/none.sock"),
    )

    assert run.returncode == 0, run.stderr
    phases = [node.phase("certs", "all"), node.phase("kubeconfig", "all")]
    assert [one.returncode for one in phases] == [0, 0], phases
    documents = list(yaml.safe_load_all((node.places.kubeconfigs / "kubeadm.yaml").read_text()))
    kubelet = next(one for one in documents if one["kind"] == "KubeletConfiguration")
    assert kubelet["rotateCertificates"] is False
    assert "rotateCertificates" not in run.stderr
    leaf = load_pem_certificates((node.places.pki / "apiserver.crt").read_bytes())[0]
    assert ("DNS", "more.example.com") in san_entries(leaf)


# --- interruptions, desks, copies -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_goes_on_after_kill_9(node: NewNode) -> None:
    """Whenever it is killed, the node has nothing or all of it after the next run begins; the last run ends well."""
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    dice = random.Random(seed)  # noqa: S311 (times to kill at)
    killed = number = 0
    while number < 12 or killed <= 6:  # a run may have ended before it is killed
        number += 1
        node_dir = node.directory / f"n{number}"
        one = NewNode.make(node_dir, cas=node.cas)
        killed += interrupted(one, dice)
        again = one.init()
        assert again.returncode == 0, (number, again.stderr)
        assert look(one).problems() == [], number
        assert not [
            path for path in one.state.iterdir() if path.name.startswith(("generate-csr-", "requests", "bootstrap"))
        ]


def interrupted(node: NewNode, dice: random.Random) -> bool:
    environment = {**os.environ, "PATH": f"{programs.directory()}:{os.environ['PATH']}"}
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(
        node.command("init", "--kubeadm-config", node.config()),
        stdin=quiet,
        stdout=quiet,
        stderr=quiet,
        env=environment,
    )
    awaited = dice.choice(["", "bootstrap.json", "staging.json", "journal.json"])
    while awaited and not (node.state / awaited).exists() and process.poll() is None:
        time.sleep(0.0002)
    time.sleep(dice.uniform(0, 1.0 if not awaited else 0.02))
    process.kill()
    return process.wait() < 0


def test_copies_survive_a_reset(node: NewNode) -> None:
    """After `kubeadm reset` has deleted all, keys included, the same files are put back, and no CA is asked."""
    keep = node.directory / "kept"
    keep.touch()
    refused = node.init("--keep", keep)
    keep.unlink()
    first = node.init("--keep", keep)
    before = node.files()
    node.wipe()
    shutil.rmtree(node.directory / "signers")
    again = node.init("--keep", keep)
    back = node.bridge.run("rollback", "--force")

    assert (back.returncode, "those of `bootstrap init`, which can't be undone" in back.stderr) == (1, True), (
        back.stderr
    )
    assert "certificate.sa" not in back.stderr
    assert "kept: can't make a directory for copies (--keep): File exists" in refused.stderr
    assert "name another one" in refused.stderr
    assert first.returncode == 0, first.stderr
    assert again.returncode == 0, again.stderr
    assert "from the copies that were kept" in again.stdout
    assert node.files() == before
    assert stat.S_IMODE(next(keep.iterdir()).stat().st_mode) == 0o600
    assert look(node).problems() == []


def test_copies_replace_no_other_file(node: NewNode) -> None:
    """Another CA's certificate where ours was is an operator's decision and stays; all can be signed anew."""
    keep = node.directory / "kept"
    assert node.init("--keep", keep).returncode == 0
    node.wipe()
    node.places.pki.mkdir()
    other = handmade_pki(node.directory / "other")
    shutil.copy(other.ca_files("front-proxy-ca")[0], node.places.pki / "front-proxy-ca.crt")
    before = node.files()
    run = node.init("--keep", keep)
    (node.places.pki / "front-proxy-ca.crt").unlink()
    anew = node.init("--keep", keep, "--anew")

    assert run.returncode == 2
    assert "front-proxy-ca.crt" in run.stderr
    assert "etc/kubernetes/admin.conf" not in before
    assert anew.returncode == 0, anew.stderr
    assert look(node).problems() == []


def test_copies_of_another_configuration_are_not_used(node: NewNode) -> None:
    """Such copies would have other names."""
    keep = node.directory / "kept"
    assert node.init("--keep", keep).returncode == 0
    node.wipe()
    (node.places.kubeconfigs / "kubeadm.yaml").unlink()
    run = node.init("--keep", keep, config=CONFIG.replace("spare", "other"))

    assert run.returncode == 2
    assert "found copies for another" in run.stderr


def test_through_a_desk_by_hand(tmp_path: Path) -> None:
    """A bundle out, an answer in: it waits with 4, asks for the same again, and goes on with the answer; no other command does."""
    node = NewNode.make(tmp_path / "node", backend=False)
    desk = make_desk(tmp_path / "desk", node.cas, policy=POLICY)
    certificates = tmp_path / "certificates"
    (certificates / "etcd").mkdir(parents=True)
    for name, authority in AUTHORITIES.items():
        shutil.copy(node.cas.ca_files(name)[0], certificates / authority.certificate_file)
    given = ("--ca-dir", str(certificates))
    request, answer = tmp_path / "request.json", tmp_path / "answer.json"
    waits = node.init(*given, "--request", request)
    still = node.init(*given)
    between = node.files()
    signed = desk.run("sign", request, "-o", answer)
    shutil.copytree(certificates, node.places.pki)
    brought = node.files()
    alone = [node.bridge.run(*args) for args in (("import", str(answer)), ("renew",), ("renew", "apiserver"))]
    assert node.files() == brought
    done = node.init(*given, "--answer", answer)

    assert {run.returncode for run in alone} == {1}, [run.stderr for run in alone]
    assert all("--answer FILE" in run.stderr for run in alone)
    assert waits.returncode == 4, waits.stderr
    assert still.returncode == 4, still.stderr
    assert between == {}
    assert signed.returncode == 0, signed.stderr
    assert done.returncode == 0, done.stderr
    assert look(node).problems() == []
    assert node.phase("certs", "all").returncode == 0
    assert node.phase("kubeconfig", "all").returncode == 0


def test_what_the_page_says_of_an_air_gap(tmp_path: Path) -> None:
    """The policy of docs/day-0.md signs all that the configuration of docs/day-0.md asks for."""
    page = (Path(__file__).parents[2] / "docs/day-0.md").read_text()
    config, policy = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL)[0] for kind in ("yaml", "toml"))
    node = NewNode.make(tmp_path / "node")
    desk = make_desk(tmp_path / "desk", node.cas, policy=policy)
    request, answer = tmp_path / "request.json", tmp_path / "answer.json"
    assert node.init("--request", request, config=config).returncode == 4
    signed = desk.run("sign", request, "-o", answer)
    done = node.init("--answer", answer, config=config)

    assert signed.returncode == 0, signed.stderr
    assert done.returncode == 0, done.stderr


def test_a_desk_that_asks_for_proof_refuses(tmp_path: Path) -> None:
    """There is no replaced certificate on day 0: a policy has to say that it does without, and for which nodes."""
    node = NewNode.make(tmp_path / "node")
    desk = make_desk(tmp_path / "desk", node.cas, policy=POLICY.replace('proof = "optional"\n', ""))
    others = make_desk(tmp_path / "others", node.cas, policy=POLICY.replace(NAME, "cp-9"))
    request = tmp_path / "request.json"
    assert node.init("--request", request).returncode == 4

    assert desk.run("sign", request, "-o", tmp_path / "a1").returncode == 5
    assert others.run("sign", request, "-o", tmp_path / "a2").returncode == 5
    done = node.init("--answer", tmp_path / "a1")
    assert done.returncode == 5, done.stdout
    assert not (node.places.kubeconfigs / "admin.conf").exists()


def test_through_an_exchange(tmp_path: Path) -> None:
    """The same from cron: an outbox and an inbox, the same command until it ends with 0."""
    node = NewNode.make(tmp_path / "node", backend=False)
    desk = make_desk(tmp_path / "desk", node.cas, policy=POLICY)
    node.bridge.add("backend.door", {"type": "exchange", "outbox": str(desk.inbox), "inbox": str(desk.outbox)})
    for name in AUTHORITIES:
        node.bridge.add(f"authority.{name}", {"backend": "door"})
    put_cas(node)
    waits = node.init()
    bundles = sorted(desk.inbox.iterdir())
    still = node.init()
    assert sorted(desk.inbox.iterdir()) == bundles
    assert len(bundles) == 1
    signed = desk.run("sign", desk.inbox, "-o", desk.outbox)
    nightly = node.bridge.run("renew")
    assert nightly.returncode == 1, nightly.stdout
    assert "bootstrap init" in nightly.stderr
    done = node.init()

    assert (waits.returncode, still.returncode) == (4, 4), waits.stderr + still.stderr
    assert signed.returncode == 0, signed.stderr
    assert done.returncode == 0, done.stderr
    assert look(node).problems() == []


@pytest.mark.parametrize("how", ["refused", "cancelled"])
def test_only_what_lacks_is_made_anew(tmp_path: Path, how: str) -> None:
    """After a signed refusal of one, or its cancellation, the next run asks for that one alone; the others stay."""
    node = NewNode.make(tmp_path / "node", backend=False)
    key = generate_key("ecdsa-p256")
    secret, public = node.bridge.secret("answer.key", key_pem(key).decode()), tmp_path / "answer.pub"
    public.write_bytes(keys.sa_public_pem(key))
    good = f'[desk]\nanswer_key = "{secret}"\n\n{POLICY}'
    first = good.replace('masters = ["super-admin.conf"]', "masters = []") if how == "refused" else good
    desk = make_desk(tmp_path / "desk", node.cas, policy=first)
    node.bridge.tables[0] += f'desk_key = "{public}"\n'
    node.bridge.add("backend.door", {"type": "exchange", "outbox": str(desk.inbox), "inbox": str(desk.outbox)})
    for name in AUTHORITIES:
        node.bridge.add(f"authority.{name}", {"backend": "door"})
    put_cas(node)
    assert node.init().returncode == 4
    desk.run("sign", desk.inbox, "-o", desk.outbox)
    signed = desk.issued()
    if how == "refused":
        assert node.init().returncode == 5
    else:
        assert node.bridge.run("pending", "cancel", "super-admin.conf").returncode == 0
    desk.policy.write_text(good)
    waits = node.init()
    assert (waits.returncode, "made anew" in waits.stderr) == (4, False)
    desk.run("sign", desk.inbox, "-o", desk.outbox)
    done = node.init()

    assert done.returncode == 0, done.stderr
    assert len(desk.issued()) == 13 + (how == "cancelled")
    assert set(signed) <= set(desk.issued())
    assert look(node).problems() == []


def test_nothing_is_given_up_before_a_desk_or_a_ca_is_known(tmp_path: Path) -> None:
    """A run that can ask neither keeps all keys and requests; with --request it asks for the cancelled one alone."""
    node = NewNode.make(tmp_path / "node", backend=False)
    desk = make_desk(tmp_path / "desk", node.cas, policy=POLICY)
    put_cas(node)
    one, two, answer, other = (tmp_path / f"{name}.json" for name in ("one", "two", "answer", "other"))
    assert node.init("--request", one).returncode == 4
    assert desk.run("sign", one, "-o", answer).returncode == 0
    before = (node.state / "requests.json").read_bytes()
    anew = node.init("--anew", "--answer", answer)
    assert (anew.returncode, (node.state / "requests.json").read_bytes()) == (2, before)
    assert node.bridge.run("pending", "cancel", "super-admin.conf").returncode == 0
    lacks = node.init("--answer", answer)
    assert (lacks.returncode, "super-admin.conf: there is no CA and no desk for ca" in lacks.stderr) == (2, True)
    asks = node.init("--answer", answer, "--request", two)
    assert asks.returncode == 4, asks.stderr
    assert [request.name for request in loads_request(two.read_bytes()).requests] == ["super-admin.conf"]
    assert desk.run("sign", two, "-o", other).returncode == 0
    done = node.init("--answer", other)
    assert done.returncode == 0, done.stderr


def test_another_request_does_not_throw_away_what_waits(tmp_path: Path) -> None:
    """A desk may be about to sign; only --anew forgets its request."""
    node = NewNode.make(tmp_path / "node")
    assert node.init("--request", tmp_path / "one.json").returncode == 4
    other = CONFIG.replace("spare", "other")
    run = node.init(config=other)
    anew = node.init("--anew", config=other)

    assert run.returncode == 2
    assert "--anew" in run.stderr
    assert anew.returncode == 0, anew.stderr


def test_each_role_has_its_certificates() -> None:
    """super-admin.conf is the first node's alone, and a worker has its kubelet's."""
    names = {role: {spec.name for spec in specs_of(role)} for role in ROLES}

    assert names["init"] - names["control-plane"] == {"super-admin.conf"}
    assert "kubelet.conf" in names["worker"]
    assert names["worker"] <= names["control-plane"]
