"""
Kubelets on real nodes: which certificate counts at a start, what a running kubelet reads again, and what it serves with.

One control plane whose API server verifies its kubelets, one worker whose kubelet.conf refers to the kubelet's own file,
and one whose kubelet.conf holds its certificate, all without a signer in the cluster.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from bridge.node import kubeconfig
from bridge.pki import csr
from bridge.pki.certificates import load_pem_certificates, san_entries
from tests.kit.cas import add_openssl
from tests.kit.issuing import Signer, signed_again
from tests.kit.node import Node
from tests.kit.nodes import LiveBridge, NodePki, wait_for

pytestmark = [pytest.mark.node, pytest.mark.slow]

_NUMBER = os.getpid() % 10_000
CURRENT = "/var/lib/kubelet/pki/kubelet-client-current.pem"
#: Of a certificate that a kubelet is to see the end of: far more than its start and a renewal take, and no wait without need.
_LIFE = timedelta(minutes=3)
#: this API server has no use for kubelets that it can't verify
CLUSTER = "apiServer: {extraArgs: [{name: kubelet-certificate-authority, value: /etc/kubernetes/pki/ca.crt}]}"


@dataclass(frozen=True, kw_only=True)
class Worker:
    """A worker, and ca-bridge on it."""

    node: Node
    bridge: LiveBridge

    @property
    def pki(self) -> Path:
        """The kubelet's own directory, seen from here."""
        return self.node.root / "var/lib/kubelet/pki"

    @property
    def current(self) -> Path:
        """What the symlink leads to, seen from here."""
        return self.pki / (self.pki / "kubelet-client-current.pem").readlink().name

    @property
    def log(self) -> Path:
        """The log of all its kubelets."""
        return self.node.root.parent / "kubelet.log"

    def again(self, data: bytes, end: timedelta) -> tuple[bytes, bytes]:
        """A certificate of the cluster's CA like the first of these (PEM), and their key; it ends so far from now."""
        pem, key = self.bridge.pki.ca_pem("ca")
        signer = Signer(certificate=x509.load_pem_x509_certificate(pem), key=load_pem_private_key(key, None))  # type: ignore[arg-type]
        old = load_pem_certificates(data)[0]
        return signed_again(old, signer, end=datetime.now(UTC) + end), csr.key_block(data)

    def pid(self) -> str:
        """The PID of its kubelet; empty: none runs."""
        path = self.node.root.parent / "kubelet.pid"
        pid = path.read_text().strip() if path.exists() else ""
        return pid if pid and Path(f"/proc/{pid}").exists() else ""

    def is_down(self, since: int) -> bool:
        """Whether a kubelet has ended for want of a certificate; `since` is a size of the log."""
        return b"unable to load bootstrap kubeconfig" in self.log.read_bytes()[since:]

    def table(self) -> list[str]:
        """The first words of each row of `check-expiration`, in order."""
        lines = self.bridge.run("check-expiration").stdout.splitlines()
        return [line.split()[0] for line in lines if line and "EXTERNALLY MANAGED" not in line]


@pytest.fixture(scope="module")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A node in external-CA mode."""
    directory = tmp_path_factory.mktemp("site")
    with Node.up(f"kcp-{_NUMBER}", "198.18.77.34", ca_dir=directory / "ca-keys", cluster=CLUSTER) as node:
        yield _with_bridge(node, directory, directory / "ca-keys")


@pytest.fixture(scope="module")
def worker(control_plane: Worker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """Its kubelet.conf refers to the kubelet's own file."""
    with Node.worker(f"kref-{_NUMBER}", "198.18.77.35", control_plane.node) as node:
        yield _with_bridge(node, tmp_path_factory.mktemp("reference"), control_plane.bridge.pki.ca_dir)


@pytest.fixture(scope="module")
def joined(control_plane: Worker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """Its kubelet.conf holds its certificate, of which the kubelet has a copy."""
    with Node.worker(f"kdat-{_NUMBER}", "198.18.77.36", control_plane.node, form="data") as node:
        one = _with_bridge(node, tmp_path_factory.mktemp("data"), control_plane.bridge.pki.ca_dir)
        wait_for("the kubelet's copy", (one.pki / "kubelet-client-current.pem").is_symlink)
        yield one


def _with_bridge(node: Node, directory: Path, keys: Path) -> Worker:
    pki = NodePki(root=node.root, external=True, keys=keys)
    bridge = LiveBridge(pki=pki, directory=directory / "bridge", node=node)
    add_openssl(bridge, "ca")
    bridge.add("restart", {"method": "static-pods", "min_interval": "1s", "prove_for": "5m"})
    bridge.add("restart.commands", {"kubelet": bridge.kubelet_command()})
    return Worker(node=node, bridge=bridge)


def served(worker: Worker) -> str:
    """The serial number of what its kubelet shows, as soon as it does."""
    return wait_for("a kubelet that serves", lambda: _shown(worker))


def _shown(worker: Worker) -> str:
    address = f"{worker.node.ip}:10250"
    shown = subprocess.run(
        ["openssl", "s_client", "-connect", address], input=b"", capture_output=True, check=False, timeout=180
    )
    text = subprocess.run(
        ["openssl", "x509", "-noout", "-serial"], input=shown.stdout, capture_output=True, check=False, timeout=180
    )
    return text.stdout.decode().strip().lower()


# --- the client certificate ------------------------------------------------------------------------------------------


def test_every_command_works_on_a_worker(worker: Worker, tmp_path: Path) -> None:
    """Nothing of a control plane is missed there, and nothing is wrong with a worker that has just joined."""
    proof = ["prove", "--wait", "3m"]
    for command in (["doctor"], proof, ["plan"], ["check-expiration"], ["setup", "openssl"], ["audit", "show"]):
        run = worker.bridge.run(*command)
        assert run.returncode == 0, f"{command}: {run.stdout}{run.stderr}"
        assert not {"apiserver.crt", "etcd", "MISSING"} & set(run.stdout.replace("!", " ").split())
    bundle = tmp_path / "bundle.json"
    assert worker.bridge.run("export", str(bundle), "kubelet.conf").returncode == 0
    assert [one["name"] for one in json.loads(bundle.read_text())["requests"]] == ["kubelet.conf"]
    assert worker.bridge.run("pending", "cancel", "kubelet.conf").returncode == 0


def test_a_reference_is_renewed_by_a_new_file_and_a_restart(worker: Worker) -> None:
    """`rotateCertificates: true` reads at its start alone, so that the kubelet is another process afterwards."""
    old, before, conf = worker.current, worker.pid(), (worker.node.kubeconfig_dir / "kubelet.conf").read_bytes()
    run = worker.bridge.run("renew", "kubelet.conf")
    assert run.returncode == 0, run.stderr
    assert worker.current != old
    assert old.exists()
    assert (worker.node.kubeconfig_dir / "kubelet.conf").read_bytes() == conf
    assert worker.pid() != before
    assert "has read" in worker.bridge.run("prove", "-v").stdout

    back = worker.bridge.run("rollback")
    assert back.returncode == 0, back.stderr
    assert worker.current == old
    assert worker.bridge.run("renew", "kubelet.conf").returncode == 0


def test_an_expired_one_keeps_a_kubelet_down_until_renew(worker: Worker) -> None:
    """It is first in the table and in doctor's words; `renew` without a name repairs it."""
    certificate, key = worker.again(worker.current.read_bytes(), -timedelta(minutes=1))
    since = worker.log.stat().st_size
    worker.current.write_bytes(certificate + key)
    worker.node.exec("systemctl", "stop", "kubelet")  # a reboot, as far as the kubelet is concerned
    worker.node.exec("systemctl", "start", "kubelet", check=False)
    wait_for("a kubelet that can not start", lambda: worker.is_down(since))

    assert worker.table()[0] == "kubelet.conf"
    doctor = worker.bridge.run("doctor")
    assert doctor.returncode == 1
    assert doctor.stdout.startswith("error    kubelet.conf")
    run = worker.bridge.run("renew")
    assert run.returncode == 0, run.stdout + run.stderr
    assert worker.bridge.run("prove", "--wait", "3m").returncode == 0
    assert worker.pid()


def test_without_rotation_it_is_read_without_a_restart(worker: Worker) -> None:
    """`rotateCertificates: false` takes a new file by itself, at the latest when the old certificate has ended."""
    config = worker.node.root / "var/lib/kubelet/config.yaml"
    before = config.read_text()
    config.write_text(before.replace("rotateCertificates: true", "rotateCertificates: false"))
    certificate, key = worker.again(worker.current.read_bytes(), _LIFE)
    end = time.monotonic() + _LIFE.total_seconds()
    worker.current.write_bytes(certificate + key)
    try:
        worker.node.exec("systemctl", "restart", "kubelet")
        wait_for("a kubelet that works", lambda: worker.bridge.run("prove").returncode == 0)
        pid = worker.pid()
        run = worker.bridge.run("renew")
        assert run.returncode == 0, run.stderr
        assert "restarted" not in run.stdout
        time.sleep(max(0.0, end + 1 - time.monotonic()))
        ended = datetime.now(UTC)
        leases = f"/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/{worker.node.name}"

        def renewed_its_lease() -> bool:
            found = worker.node.exec("kubectl", "--kubeconfig", "/etc/kubernetes/kubelet.conf", "get", "--raw", leases)
            return datetime.fromisoformat(json.loads(found.stdout)["spec"]["renewTime"]) > ended

        wait_for("a lease that is renewed with the new certificate", renewed_its_lease)
        assert worker.pid() == pid
    finally:
        config.write_text(before)
        worker.node.exec("systemctl", "restart", "kubelet")


@pytest.mark.parametrize("what", ["embedded", "copy"])
def test_of_an_embedded_one_and_its_copy_the_first_end_counts(joined: Worker, what: str) -> None:
    """
    Embedded and expired the kubelet does not start, whatever the copy is; the expired copy is due, too.

    After the renewal kubelet.conf refers to the one file that is left.
    """
    path = joined.node.kubeconfig_dir / "kubelet.conf"
    if what == "copy":  # the first case has left a reference
        pair = joined.current.read_bytes()
        path.write_text(_embedding(path.read_text(), pair, csr.key_block(pair)))
    data = path.read_bytes()
    embedded, key = kubeconfig.parse(data).certificate_data or b"", kubeconfig.key_data(data) or b""
    expired, _ = joined.again(embedded, -timedelta(minutes=1))
    since = joined.log.stat().st_size
    if what == "embedded":
        path.write_bytes(kubeconfig.with_credentials(data, expired, key))
        joined.node.exec("systemctl", "restart", "kubelet", check=False)
        wait_for("a kubelet that can not start", lambda: joined.is_down(since))
    else:
        joined.current.write_bytes(expired + key)

    assert joined.table()[0] == "kubelet.conf"
    assert "expired" in joined.bridge.run("plan").stdout
    run = joined.bridge.run("renew")
    assert run.returncode == 0, run.stdout + run.stderr
    found = kubeconfig.parse(path.read_bytes())
    assert (found.certificate_file, found.key_file, found.certificate_data) == (CURRENT, CURRENT, None)
    assert joined.bridge.run("prove", "--wait", "3m").returncode == 0


@pytest.mark.parametrize(("copy", "counts"), [("none", "data"), ("older", "copy"), ("expired", "data")])
def test_which_certificate_counts_at_a_start(control_plane: Worker, joined: Worker, copy: str, counts: str) -> None:
    """
    Embedded and valid: it is copied where there is no valid copy, and is not looked at where there is one, however old.

    `ca-bridge` counts the first end of the two, and leaves one file that is read.
    """
    path, pair = joined.node.kubeconfig_dir / "kubelet.conf", joined.current.read_bytes()
    joined.node.exec("systemctl", "stop", "kubelet")
    certificate, key = joined.again(pair, timedelta(days=200))
    path.write_text(_embedding(path.read_text(), certificate, key))
    if copy == "none":
        (joined.pki / "kubelet-client-current.pem").unlink()
    else:
        left = timedelta(hours=1) if copy == "older" else -timedelta(minutes=1)
        joined.current.write_bytes(joined.again(pair, left)[0] + key)
    joined.node.exec("systemctl", "start", "kubelet")

    limit = timedelta(hours=1).total_seconds()
    ttl = wait_for("a kubelet that tells what it uses", lambda: client_ttl(control_plane, joined))
    assert (ttl > limit) == (counts == "data")
    used = load_pem_certificates(joined.current.read_bytes())[0]
    assert (used == load_pem_certificates(certificate)[0]) == (counts == "data")
    assert joined.bridge.run("plan").returncode == (0 if counts == "data" else 3)

    run = joined.bridge.run("renew", "kubelet.conf")
    assert run.returncode == 0, run.stdout + run.stderr
    assert kubeconfig.parse(path.read_bytes()).certificate_file == CURRENT
    assert joined.bridge.run("prove", "--wait", "3m").returncode == 0
    wait_for("a kubelet that uses the new one", lambda: (client_ttl(control_plane, joined) or 0) > limit)


def client_ttl(control_plane: Worker, worker: Worker) -> float | None:
    """Seconds that the client certificate which a kubelet uses has left, as it says itself; None: it does not answer."""
    pair = control_plane.node.kubeconfig_dir / "pki/apiserver-kubelet-client"
    command = ["curl", "-sk", "--max-time", "60", "--cert", f"{pair}.crt", "--key", f"{pair}.key"]
    run = subprocess.run(
        [*command, f"https://{worker.node.ip}:10250/metrics"], capture_output=True, text=True, check=False
    )
    name = "kubelet_certificate_manager_client_ttl_seconds "
    found = [line.removeprefix(name) for line in run.stdout.splitlines() if line.startswith(name)]
    return float(found[0]) if found and float(found[0]) < 1e15 else None  # +Inf, or as much: not known yet


def test_a_reference_to_nothing_keeps_a_kubelet_down(worker: Worker) -> None:
    """It does not start, and `ca-bridge` says which file is not there; any copy will do, for `renew` to repair it."""
    link, dated, pair = worker.pki / "kubelet-client-current.pem", worker.current, worker.current.read_bytes()
    since = worker.log.stat().st_size
    worker.node.exec("systemctl", "stop", "kubelet")
    link.unlink()
    worker.node.exec("systemctl", "start", "kubelet", check=False)
    wait_for("a kubelet that can not start", lambda: worker.is_down(since))
    assert b"unable to read client-cert" in worker.log.read_bytes()[since:]

    for command in (["doctor"], ["check-expiration"], ["plan"], ["renew"]):
        run = worker.bridge.run(*command)
        assert run.returncode == 1, command
        assert "kubelet-client-current.pem" in run.stdout + run.stderr
    assert worker.bridge.run("doctor").stdout.startswith("error    kubelet.conf")

    dated.write_bytes(worker.again(pair, -timedelta(minutes=1))[0] + csr.key_block(pair))
    link.symlink_to(f"/var/lib/kubelet/pki/{dated.name}")
    run = worker.bridge.run("renew")
    assert run.returncode == 0, run.stdout + run.stderr
    assert worker.bridge.run("prove", "--wait", "3m").returncode == 0


def _embedding(text: str, certificate: bytes, key: bytes) -> str:
    """A kubelet.conf that holds the pair, as it was before."""
    import base64

    for name, data in (("certificate", certificate.partition(b"-----BEGIN EC")[0]), ("key", key)):
        text = text.replace(f'client-{name}: "{CURRENT}"', f"client-{name}-data: {base64.b64encode(data).decode()}")
    return text


# --- the serving certificate -----------------------------------------------------------------------------------------


def test_a_kubelet_is_verified_once_it_has_a_certificate_of_the_ca(control_plane: Worker, worker: Worker) -> None:
    """Its own certificate stays until it is named; then the API server reaches it, without any restart."""

    def reach() -> subprocess.CompletedProcess[str]:
        path = f"/api/v1/nodes/{worker.node.name}/proxy/healthz"
        return control_plane.node.kubectl("get", "--raw", path, check=False)

    wait_for("a refusal", lambda: "x509" in reach().stderr)
    before = served(worker)
    all_of_them = worker.bridge.run("renew", "all")
    assert all_of_them.returncode == 0, all_of_them.stderr
    assert served(worker) == before

    pid = worker.pid()
    run = worker.bridge.run("renew", "kubelet-server", "-o", "json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["restart"] == []
    leaf = load_pem_certificates((worker.pki / "kubelet.crt").read_bytes())[0]
    assert san_entries(leaf) == {("DNS", worker.node.name), ("IP", worker.node.ip)}
    assert (worker.pki / "kubelet.key").stat().st_mode & 0o777 == 0o600
    wait_for("an API server that verifies it", lambda: reach().stdout == "ok")
    assert (worker.pid(), served(worker) != before) == (pid, True)
    assert worker.bridge.run("prove", "--wait", "3m").returncode == 0
    assert worker.bridge.run("doctor").returncode == 0


def test_one_of_the_ca_is_renewed_when_due_and_where_the_kubelet_reads_it(worker: Worker) -> None:
    """`tlsCertFile` of the configuration names other files; the settings' names go before those of the live one."""
    config, before = worker.node.root / "var/lib/kubelet/config.yaml", ""
    certificate, key = worker.again(
        (worker.pki / "kubelet.crt").read_bytes() + (worker.pki / "kubelet.key").read_bytes(), timedelta(days=2)
    )
    (worker.pki / "mine.crt").write_bytes(certificate)
    (worker.pki / "mine.key").write_bytes(key)
    (worker.pki / "mine.key").chmod(0o600)
    before = config.read_text()
    pki = "/var/lib/kubelet/pki"
    config.write_text(f"{before}tlsCertFile: {pki}/mine.crt\ntlsPrivateKeyFile: {pki}/mine.key\n")
    worker.bridge.add("certificate.kubelet-server", {"sans": [worker.node.name, worker.node.ip, "192.0.2.77"]})
    try:
        worker.node.exec("systemctl", "restart", "kubelet")
        old = served(worker)
        assert worker.bridge.run("plan").returncode == 3
        run = worker.bridge.run("renew")
        assert run.returncode == 0, run.stderr
        leaf = load_pem_certificates((worker.pki / "mine.crt").read_bytes())[0]
        assert ("IP", "192.0.2.77") in san_entries(leaf)
        wait_for("the new one", lambda: served(worker) != old)
        assert worker.bridge.run("plan").returncode == 0
    finally:
        config.write_text(before)
        worker.node.exec("systemctl", "restart", "kubelet")
