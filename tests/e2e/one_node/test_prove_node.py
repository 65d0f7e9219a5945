"""`prove` on a node that runs: nothing to find when all is well, and each thing that is not, by name."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from bridge.pki.certificates import load_pem_certificates, serial_hex
from bridge.specs import AUTHORITIES, SPECS, Component
from tests.kit import issuing, nodes, shown
from tests.kit.issuing import Signer
from tests.kit.node import AT_ONCE, Node
from tests.kit.nodes import wait_for
from tests.kit.pki import PKI_SPECS

pytestmark = [pytest.mark.node, pytest.mark.slow]

OTHER_NAME, OTHER_IP = f"other-{os.getpid() % 100_000}", "198.18.77.61"
PROGRAM = Path(sys.executable).with_name("ca-bridge")

CONTROLLERS = {"kube-controller-manager": "controller-manager.conf", "kube-scheduler": "scheduler.conf"}
API_CLIENTS = {"apiserver-etcd-client", "apiserver-kubelet-client", "front-proxy-client"}


@contextlib.contextmanager
def holding_its_ca_keys(node: Node, ca_keys: Path) -> Iterator[None]:
    """The node has the keys of its CAs, so that kubeadm itself can renew."""
    places = [authority.key_file for authority in AUTHORITIES.values()]
    for place in places:
        shutil.copy(ca_keys / place, node.pki_dir / place)
    try:
        yield
    finally:
        for place in places:
            (node.pki_dir / place).unlink()


@pytest.fixture(scope="module", autouse=True)
def _with_ca_keys(node: Node, ca_keys: Path) -> Iterator[None]:
    """Tests leave the node as they found it, but for newer files."""
    with holding_its_ca_keys(node, ca_keys):
        yield


def prove(node: Node, *options: str) -> tuple[int, list[dict[str, Any]], list[str]]:
    """Exit code, findings, and the components that must be restarted."""
    run = node.exec(PROGRAM, "prove", "-o", "json", *options, check=False)
    assert run.stdout, run.stderr
    report = json.loads(run.stdout)
    assert report["exitCode"] == run.returncode
    return run.returncode, report["findings"], report["stale"]


def wrong(findings: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """Which certificates something is wrong with, and what."""
    fine = {"current", "next-connection", "not-ours"}
    return {(finding["certificate"], finding["state"]) for finding in findings if finding["state"] not in fine}


def found(node: Node) -> set[tuple[str, str]]:
    """What is wrong now."""
    return wrong(prove(node)[1])


def proved(node: Node, code: int, stale: list[str], bad: set[tuple[str, str]], *options: str) -> list[dict[str, Any]]:
    """The findings, when they are these: on a busy machine a component may miss one look."""
    deadline = time.monotonic() + 180
    while True:
        found_code, findings, found_stale = prove(node, *options)
        seen = (found_code, found_stale, wrong(findings))
        if seen == (code, stale, bad):
            return findings
        assert time.monotonic() < deadline, seen
        time.sleep(0.5)


def restart(node: Node, component: str) -> None:
    """Manifest out, and back."""
    manifest = f"/etc/kubernetes/manifests/{component}.yaml"
    nodes.restart_static_pod(node, manifest, ("crictl", "pods", "--state", "ready", "--name", component))


@pytest.fixture
def well(node: Node) -> None:
    """All is well before the test."""
    proved(node, 0, [], set(), "--wait", "3m")


@pytest.mark.usefixtures("well")
def test_a_page_shows_what_prove_prints(node: Node) -> None:
    """When all is well, and what other commands print then; `python -m tests.test_docs_shown --node` writes it."""
    printed, names = shown.live(node), set[str]()
    for page in (shown.ROOT / "docs").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        names |= set(shown.names_in(text)) & shown.LIVE.keys()
        assert text == shown.written(text, printed)
    assert names == shown.LIVE.keys()


@contextlib.contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    """Another content, for a while, written in place as kubeadm does."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


@contextlib.contextmanager
def without(node: Node, kind: str, name: str) -> Iterator[None]:
    """One right less, for a while; super-admin.conf does not need any."""

    def kubectl(*args: str) -> subprocess.CompletedProcess[str]:
        return node.exec("kubectl", "--kubeconfig", "/etc/kubernetes/super-admin.conf", *args)

    before = json.loads(kubectl("get", kind, name, "-o", "json").stdout)
    kept = {key: before[key] for key in ("apiVersion", "kind", "roleRef", "subjects")} | {"metadata": {"name": name}}
    kubectl("delete", kind, name)
    try:
        yield
    finally:
        file = node.kubeconfig_dir / "right.json"
        file.write_text(json.dumps(kept))
        kubectl("create", "-f", "/etc/kubernetes/right.json")
        file.unlink()


def test_finds_nothing_on_a_node_that_was_just_made(node: Node) -> None:
    """Every certificate that there is was looked at, and every component; each of them is current."""
    code, findings, stale = prove(node, "--wait", "3m")
    assert (code, stale) == (0, [])
    assert {finding["certificate"] for finding in findings} == {*PKI_SPECS, "(its own)"}
    assert {finding["component"] for finding in findings} == {None, *(component.value for component in Component)}
    assert {finding["state"] for finding in findings} == {"current", "not-ours"}
    served = [finding["what"] for finding in findings if finding["what"].startswith("serves")]
    both = [f"serves {host}:{port}" for port in (2379, 6443) for host in ("127.0.0.1", node.ip)]
    assert set(served) == {*both, f"serves {node.ip}:2380", "serves 127.0.0.1:10257", "serves 127.0.0.1:10259"}


@pytest.mark.usefixtures("well")
def test_after_a_renewal_the_two_that_read_once_are_stale(node: Node) -> None:
    """They are named in order; what others read again by themselves is proven, and needs no restart."""
    node.exec("kubeadm", "certs", "renew", "all")
    served = load_pem_certificates((node.pki_dir / "apiserver.crt").read_bytes())[0]

    findings = proved(node, 7, list(CONTROLLERS), {(name, "stale") for name in CONTROLLERS.values()}, "--wait", "2s")

    assert {f["certificate"] for f in findings if f["state"] == "next-connection"} == API_CLIENTS
    details = {f["detail"] for f in findings if f["certificate"] == "apiserver"}
    assert {detail.split(",")[0] for detail in details} == {f"serial {serial_hex(served)}"}

    for component in CONTROLLERS:
        restart(node, component)
    findings = proved(node, 0, [], set(), "--wait", "3m")
    assert {f["certificate"] for f in findings if f["state"] == "next-connection"} == API_CLIENTS


def test_a_version_that_is_not_known_to_reload_must_be_restarted(node: Node, tmp_path: Path) -> None:
    """After the renewal above, the API server's own client certificates are stale on what says it is 1.33."""
    settings = tmp_path / "config.toml"
    settings.write_text('[node]\nkubernetes_version = "1.33"\n')
    proved(node, 7, ["kube-apiserver"], {(name, "stale") for name in API_CLIENTS}, "--config", str(settings))


@pytest.mark.usefixtures("well")
def test_a_renamed_kubeconfig_is_not_seen_by_a_container(node: Node) -> None:
    """A file that is mounted by itself stays the old one in the container, whatever its times say."""
    path = node.kubeconfig_dir / "scheduler.conf"
    new = path.with_name("new")
    new.write_bytes(path.read_bytes() + b"\n")
    before = path.with_name("before")
    path.rename(before)
    new.rename(path)
    try:
        findings = proved(node, 7, ["kube-scheduler"], {("scheduler.conf", "stale")})
        detail = next(f["detail"] for f in findings if f["what"] == "has read /etc/kubernetes/scheduler.conf")
        assert detail.startswith("still sees what was in /etc/kubernetes/scheduler.conf before")
    finally:
        before.rename(path)
        restart(node, "kube-scheduler")


@pytest.mark.usefixtures("well")
@pytest.mark.parametrize("component", CONTROLLERS)
def test_a_controller_without_its_rights_is_refused(node: Node, component: str) -> None:
    """Its certificate is right and its lease allowed; what it works on is not."""
    with without(node, "clusterrolebinding", f"system:{component}"):
        name = CONTROLLERS[component]
        wait_for("a refusal", lambda: found(node) == {(name, "refused")})


@pytest.mark.usefixtures("well")
def test_an_admin_without_rights_is_refused(node: Node) -> None:
    """super-admin.conf, whose rights come from nowhere, is not."""
    with without(node, "clusterrolebinding", "kubeadm:cluster-admins"):
        wait_for("a refusal", lambda: found(node) == {("admin.conf", "refused")})


@pytest.mark.usefixtures("well")
def test_an_api_server_that_kubelets_refuse_is_seen(node: Node) -> None:
    """The certificate that is new passes every check of its own, and `kubectl logs` would not work any more."""
    with without(node, "clusterrolebinding", "kubeadm:apiserver-kubelet-client"):
        node.exec("kubeadm", "certs", "renew", "apiserver-kubelet-client")
        wait_for("a refusal", lambda: found(node) == {("apiserver-kubelet-client", "refused")})
    wait_for("a kubelet that forgets", lambda: not found(node))


@pytest.mark.usefixtures("well")
def test_a_front_proxy_of_the_wrong_ca_is_refused(node: Node) -> None:
    """The cluster's own CA is not the one that vouches for front proxies."""
    with contextlib.ExitStack() as stack:
        for suffix in (".crt", ".key"):
            other = (node.pki_dir / f"apiserver-kubelet-client{suffix}").read_bytes()
            stack.enter_context(replaced(node.pki_dir / f"front-proxy-client{suffix}", other))
        proved(node, 7, [], {("front-proxy-client", "refused")})


@pytest.mark.usefixtures("well")
@pytest.mark.parametrize("name", ["apiserver-etcd-client", "etcd-healthcheck-client"])
def test_a_client_that_etcd_refuses_is_seen(node: Node, name: str) -> None:
    """A client certificate that etcd refuses, also one of the wrong CA, is reported."""
    with contextlib.ExitStack() as stack:
        for suffix in (".crt", ".key"):
            other = (node.pki_dir / f"apiserver-kubelet-client{suffix}").read_bytes()
            stack.enter_context(replaced(node.pki_dir / f"{SPECS[name].base}{suffix}", other))
        proved(node, 7, [], {(name, "refused")})


@pytest.mark.usefixtures("well")
def test_a_peer_with_a_name_that_peers_refuse_is_seen(node: Node) -> None:
    """It is valid, from the right CA, and in use; but it does not name the address that its owner comes from."""
    path = node.pki_dir / "etcd/peer.crt"
    with replaced(path, signed_again(path, sans=[x509.DNSName("elsewhere.example.com")])):
        wait_for("a refusal", lambda: found(node) == {("etcd-peer", "refused")})
    wait_for("a healthy etcd", lambda: not found(node))


@pytest.mark.usefixtures("well")
def test_an_api_server_with_a_certificate_that_has_expired_is_refused(node: Node) -> None:
    """It shows the file's certificate, and still no client can work with it."""
    path = node.pki_dir / "apiserver.crt"
    with replaced(path, signed_again(path, end=datetime.now(UTC) - timedelta(minutes=1))):
        wait_for("a refusal", lambda: ("apiserver", "refused") in found(node))
    wait_for("a healthy API server", lambda: not found(node))


@pytest.mark.usefixtures("well")
def test_a_server_goes_on_with_its_old_pair_when_the_new_one_does_not_match(node: Node) -> None:
    """It would not survive a restart, so that none is asked for."""
    with replaced(node.pki_dir / "apiserver.key", (node.pki_dir / "front-proxy-client.key").read_bytes()):
        proved(node, 7, [], {("apiserver", "refused")})


@pytest.mark.usefixtures("well")
def test_a_component_that_is_away_is_named(node: Node) -> None:
    """Its manifest was moved away and forgotten."""
    node.exec("mv", "/etc/kubernetes/manifests/kube-scheduler.yaml", "/etc/kubernetes/")
    try:
        proved(node, 7, [], {("scheduler.conf", "no-answer")})
    finally:
        node.exec("mv", "/etc/kubernetes/kube-scheduler.yaml", "/etc/kubernetes/manifests/")


@pytest.mark.usefixtures("well")
def test_a_kubelets_copy_of_its_old_certificate_is_stale(node: Node) -> None:
    """A kubelet takes the copy before kubelet.conf, so that a restart alone would not help."""
    path = node.kubeconfig_dir / "kubelet.conf"
    copy = node.root / "var/lib/kubelet/pki/kubelet-client-current.pem"
    assert copy.is_symlink()  # to a path on the node
    node.exec("kubeadm", "init", "phase", "kubeconfig", "kubelet", "--kubeconfig-dir", "/etc/kubernetes/new",
              "--config", "/etc/kubernetes/kubeadm.yaml")  # fmt: skip
    path.write_bytes((node.kubeconfig_dir / "new/kubelet.conf").read_bytes())
    findings = proved(node, 7, ["kubelet"], {("kubelet.conf", "stale")})
    assert "kubelet-client-current.pem" in next(f["detail"] for f in findings if f["state"] == "stale")

    node.exec("rm", "/var/lib/kubelet/pki/kubelet-client-current.pem")
    nodes.restart_kubelet(node)
    assert prove(node, "--wait", "3m")[0] == 0


@pytest.mark.usefixtures("well")
def test_the_container_runtime_tells_ages_where_no_process_is_to_be_seen(node: Node) -> None:
    """As in a pid namespace of its own; a kubelet is no container, so that of it nothing may be known."""
    environment = {"CRI_CONFIG_FILE": "/etc/kubernetes/crictl.yaml"}
    alone = ("unshare", "--pid", "--fork", "--mount-proc")

    def report() -> dict[str, Any]:
        run = node.exec(*alone, PROGRAM, "prove", "-o", "json", check=False, env=environment)
        found: dict[str, Any] = json.loads(run.stdout)
        return found

    def nothing_wrong() -> list[dict[str, Any]] | None:
        findings: list[dict[str, Any]] = report()["findings"]
        return findings if wrong(findings) <= {("kubelet.conf", "unknown")} else None

    findings = wait_for("nothing wrong but the kubelet's age", nothing_wrong)
    read = {f["certificate"]: f["state"] for f in findings if f["what"].startswith("has read")}
    assert {name: read[name] for name in CONTROLLERS.values()} == dict.fromkeys(CONTROLLERS.values(), "current")
    (node.kubeconfig_dir / "scheduler.conf").touch()
    wait_for("a scheduler that is stale", lambda: report()["stale"] == ["kube-scheduler"])
    restart(node, "kube-scheduler")


@pytest.mark.usefixtures("well")
def test_two_nodes_on_one_machine_are_two(node: Node, ca_keys: Path) -> None:
    """A renewal on one makes nothing stale on the other, though all processes are called the same; etcd is one cluster."""
    with Node.join(OTHER_NAME, OTHER_IP, node, kubelet=AT_ONCE) as other:
        nodes.make_ready(other)
        assert prove(other, "--wait", "3m")[0] == 0
        with holding_its_ca_keys(other, ca_keys):
            other.exec("kubeadm", "certs", "renew", "scheduler.conf")

        proved(other, 7, ["kube-scheduler"], {("scheduler.conf", "stale")})
        findings = proved(node, 0, [], set())
        peers = next(f["detail"] for f in findings if f["what"] == "is accepted by its peers")
        assert {f"https://{ip}:2380" for ip in (node.ip, OTHER_IP)} == set(re.findall(r"https://[^ ,;]+", peers))

        remove = ("etcdctl", *etcdctl_options(), "member", "remove", member_id(node, OTHER_NAME))
        # etcd removes no member until all have been connected for some seconds
        wait_for("a member that may go", lambda: node.exec(*remove, check=False).returncode == 0)
    node.kubectl("delete", "node", OTHER_NAME)
    servers = ("get", "endpointslices", "-l", "kubernetes.io/service-name=kubernetes", "-o", "json")
    wait_for("the end of its API server's address", lambda: OTHER_IP not in node.kubectl(*servers).stdout)


def etcdctl_options() -> list[str]:
    """As kubeadm's own client."""
    pki = "/etc/kubernetes/pki/etcd"
    return ["--command-timeout=120s", "--cacert", f"{pki}/ca.crt", "--cert", f"{pki}/healthcheck-client.crt", "--key",
            f"{pki}/healthcheck-client.key"]  # fmt: skip


def member_id(node: Node, name: str) -> str:
    listed = json.loads(node.exec("etcdctl", *etcdctl_options(), "member", "list", "-w", "json").stdout)
    return next(f"{member['ID']:x}" for member in listed["members"] if member["name"] == name)


def signed_again(path: Path, **changes: Any) -> bytes:
    """The certificate in a file of the PKI, by the CA beside it, with changes as of `issuing.signed_again`."""
    certificate, key = path.with_name("ca.crt").read_bytes(), path.with_name("ca.key").read_bytes()
    signing_key = serialization.load_pem_private_key(key, None)
    assert isinstance(signing_key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey)
    signer = Signer(certificate=load_pem_certificates(certificate)[0], key=signing_key)
    return issuing.signed_again(load_pem_certificates(path.read_bytes())[0], signer, **changes)
