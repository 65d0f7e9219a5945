"""A worker: a kubelet and nothing of a control plane, laid out below a directory of its own, and a CA elsewhere."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID

from bridge.node import inventory, kubeconfig
from bridge.pki import csr
from bridge.pki.certificates import load_pem_certificates, pem, san_entries
from tests.kit import cfssl, openbao
from tests.kit.cas import Bridge, add_openssl
from tests.kit.desks import make_desk
from tests.kit.issuing import Signer, signed_again
from tests.kit.pki import ADDRESS, NODE, finalize, handmade_pki

FLAGS = f'KUBELET_KUBEADM_ARGS="--hostname-override={NODE} --node-ip={ADDRESS}"\n'


@dataclass(frozen=True, kw_only=True)
class Worker:
    """Its files, and ca-bridge for them."""

    bridge: Bridge

    @property
    def kubelet_dir(self) -> Path:
        """Takes the place of `/var/lib/kubelet`."""
        return self.bridge.pki.root / "var/lib/kubelet"

    @property
    def pki_dir(self) -> Path:
        """The kubelet's own."""
        return self.kubelet_dir / "pki"

    @property
    def conf(self) -> Path:
        """Its kubeconfig."""
        return self.bridge.pki.kubeconfig_dir / "kubelet.conf"

    def node(self) -> inventory.Node:
        """What the program sees."""
        pki = self.bridge.pki
        return inventory.read(pki.pki_dir, pki.kubeconfig_dir, self.kubelet_dir)

    def configure(self, text: str) -> None:
        """The kubelet's configuration."""
        (self.kubelet_dir / "config.yaml").write_text(f"kind: KubeletConfiguration\n{text}")

    def serve(self, name: str, *, end: timedelta | None, sans: tuple[x509.GeneralName, ...] = ()) -> x509.Certificate:
        """Give it a serving certificate; without an end one that it made itself."""
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = _self_made(name, key)
        if end is not None:
            leaf = load_pem_certificates(signed_again(leaf, self._signer(), sans=sans, end=datetime.now(UTC) + end))[0]
        (self.pki_dir / "kubelet.crt").write_bytes(pem(leaf))
        (self.pki_dir / "kubelet.key").touch(mode=0o600)
        (self.pki_dir / "kubelet.key").write_bytes(csr.key_pem(key))
        return leaf

    def served(self) -> x509.Certificate:
        """What its kubelet would show."""
        return load_pem_certificates((self.pki_dir / "kubelet.crt").read_bytes())[0]

    def _signer(self) -> Signer:
        certificate, key = self.bridge.pki.ca_pem("ca")
        return Signer(certificate=x509.load_pem_x509_certificate(certificate), key=load_pem_private_key(key, None))  # type: ignore[arg-type]


def _self_made(name: str, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """As a kubelet makes one, in this name."""
    now = datetime.now(UTC)
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "system:nodes"),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name}-ca@1795000000")])
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    builder = (
        builder.serial_number(7).not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=300))
    )
    sans = x509.SubjectAlternativeName([x509.DNSName(NODE)])
    return builder.add_extension(sans, critical=False).sign(key, hashes.SHA256())


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Worker]:
    """A worker whose client certificate was made so long ago, for a year."""

    def made(*, days_ago: int = 0, refer: bool = True, ca: bool = True) -> Worker:
        pki = handmade_pki(tmp_path / "node", external=True, now=datetime.now(UTC) - timedelta(days=days_ago))
        bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
        text = bridge.config.read_text()
        bridge.tables[0] = text + f'kubelet_dir = "{pki.root}/var/lib/kubelet"\n'
        bridge.config.write_text(bridge.tables[0])
        if ca:
            add_openssl(bridge, "ca")
        for path in pki.kubeconfig_dir.iterdir():
            if path.name not in ("pki", "kubelet.conf"):
                path.unlink()
        for path in pki.pki_dir.iterdir():
            if path.name != "ca.crt":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        worker = Worker(bridge=bridge)
        worker.pki_dir.mkdir(parents=True)
        worker.configure("rotateCertificates: true\n")
        if refer:
            finalize(pki)
        return worker

    return made


Make = Callable[..., Worker]


def test_a_worker_differs_from_a_control_plane_by_its_files(make: Make) -> None:
    """An administrator's kubeconfig makes no difference; one file of a control plane does."""
    worker = make()
    assert worker.node().role == "worker"
    assert [item.spec.name for item in worker.node().items] == ["kubelet.conf"]
    assert [state.authority.name for state in worker.node().authorities] == ["ca"]
    assert worker.node().troubles == ()
    conf = worker.bridge.pki.kubeconfig_dir
    (conf / "admin.conf").write_text("")
    assert [item.spec.name for item in worker.node().items] == ["admin.conf", "kubelet.conf"]
    for trace in ("pki/apiserver.key", "controller-manager.conf", "manifests/etcd.yaml"):
        (conf / trace).parent.mkdir(exist_ok=True)
        (conf / trace).write_text("")
        assert worker.node().role == "control plane"
        (conf / trace).unlink()
    worker.conf.unlink()
    assert worker.node().role == "control plane"


def test_every_command_is_content_with_a_worker(make: Make, tmp_path: Path) -> None:
    """No command misses a part of a control plane, and nothing is due."""
    worker = make()
    for command in (["doctor"], ["plan"], ["renew"], ["check-expiration"], ["check-expiration", "-o", "nagios"]):
        run = worker.bridge.run(*command)
        assert run.returncode == 0, f"{command}: {run.stdout}{run.stderr}"
        assert "apiserver" not in run.stdout + run.stderr
    assert worker.bridge.run("export", str(tmp_path / "b.json"), "kubelet.conf").returncode == 0
    asked = worker.bridge.run("renew", "apiserver", "kubelet-server")
    assert asked.returncode == 1
    assert "apiserver: there is no certificate to renew: this node is a worker" in asked.stderr
    assert "kubelet-server: there is no certificate to renew: the kubelet makes its first one" in asked.stderr


def test_without_kubelet_rotation_it_is_due_as_every_other_is(make: Make) -> None:
    """With `rotateCertificates: true` a signer has until a tenth of the lifetime is left; with false there is none."""
    worker = make(days_ago=320)
    worker.bridge.add("renewal", {"before": "60d"})
    assert worker.bridge.run("plan").returncode == 0
    worker.configure("rotateCertificates: false\n")
    assert worker.bridge.run("plan").returncode == 3


@pytest.mark.parametrize("days_ago", [364, 370])
def test_a_client_certificate_that_ends_is_first_everywhere(make: Make, days_ago: int) -> None:
    """The table, doctor, the plan, nagios' line and prometheus' metrics have it first; only `renew` mends it."""
    worker = make(days_ago=days_ago)
    worker.serve(f"system:node:{NODE}", end=timedelta(days=2), sans=(x509.DNSName(NODE),))
    rows = [line for line in worker.bridge.run("check-expiration").stdout.splitlines() if "EXTERNALLY" not in line]
    assert rows[0].startswith("kubelet.conf")
    assert worker.bridge.run("plan").stdout.startswith("kubelet.conf")
    said = worker.bridge.run("check-expiration", "-o", "nagios")
    assert said.stdout.startswith("CERTIFICATES CRITICAL - kubelet.conf")
    findings = json.loads(worker.bridge.run("doctor", "-o", "json").stdout)["findings"]
    assert findings[0]["about"][0] == "kubelet.conf"
    run = worker.bridge.run("renew", "-o", "json")
    assert run.returncode == 0, run.stderr
    assert next(one["name"] for one in json.loads(run.stdout)["renewed"]) == "kubelet.conf"
    rows = [line for line in worker.bridge.run("check-expiration").stdout.splitlines() if "EXTERNALLY" not in line]
    assert rows[0].startswith("ca ")


def test_an_embedded_one_becomes_a_reference(make: Make) -> None:
    """Where the kubelet has a directory of its own; the rollback brings the data back, and takes the new files away."""
    worker = make(days_ago=364, refer=False)
    before = worker.conf.read_bytes()
    run = worker.bridge.run("renew")
    assert run.returncode == 0, run.stderr
    current = worker.pki_dir / "kubelet-client-current.pem"
    found = kubeconfig.parse(worker.conf.read_bytes())
    assert (found.certificate_file, found.certificate_data) == (str(current), None)
    assert current.resolve().stat().st_mode & 0o777 == 0o600
    back = worker.bridge.run("rollback", "--force")
    assert back.returncode == 0, back.stderr
    assert worker.conf.read_bytes() == before
    assert list(worker.pki_dir.iterdir()) == []


@pytest.mark.parametrize("lost", ["symlink", "file"])
def test_a_reference_to_nothing_says_what_brings_it_back(make: Make, lost: str) -> None:
    """Where older files are left, the command in the message is enough for `renew`, though the file has expired."""
    worker = make(days_ago=370)
    current = worker.pki_dir / "kubelet-client-current.pem"
    if lost == "symlink":
        current.unlink()
    else:
        older = worker.pki_dir / "kubelet-client-2026-01-01-00-00-00.pem"
        current.resolve().rename(older)
    run = worker.bridge.run("renew")
    assert run.returncode == 1
    found = re.search("`(ln -sfn .*?)`", run.stderr)
    assert found is not None, run.stderr
    assert found[1] in worker.bridge.run("doctor").stdout.replace("\n", "")
    subprocess.run(shlex.split(found[1]), check=True)
    run = worker.bridge.run("renew")
    assert run.returncode == 0, run.stderr
    assert current.resolve().name > "kubelet-client-2026-01-02"


def test_nothing_beside_it_is_proposed(make: Make) -> None:
    """Only a kubelet's dated files count."""
    worker = make()
    current = worker.pki_dir / "kubelet-client-current.pem"
    current.resolve().rename(worker.pki_dir / "kubelet-client-x;reboot.pem")
    run = worker.bridge.run("renew")
    assert run.returncode == 1
    assert "there is no certificate" in run.stderr
    assert "ln -sfn" not in run.stderr


# --- what it serves with ---------------------------------------------------------------------------------------------


def test_one_that_the_kubelet_made_is_replaced_only_when_asked(make: Make) -> None:
    """`renew all` shows it and leaves it alone; named, it gets the names of the node's own configuration."""
    worker = make()
    own = worker.serve(NODE, end=None)
    (worker.kubelet_dir / "kubeadm-flags.env").write_text(FLAGS)
    assert "kubelet-server" in worker.bridge.run("check-expiration").stdout
    assert "made by the kubelet itself" in worker.bridge.run("doctor").stdout
    assert worker.bridge.run("renew", "all").returncode == 0
    assert worker.served() == own

    run = worker.bridge.run("renew", "kubelet-server")
    assert run.returncode == 0, run.stderr
    leaf = worker.served()
    assert san_entries(leaf) == {("DNS", NODE), ("IP", ADDRESS)}
    assert leaf.subject.rfc4514_string() == f"CN=system:node:{NODE},O=system:nodes"
    assert worker.bridge.run("rollback", "--force").returncode == 0
    assert worker.served() == own


def test_without_an_address_nothing_is_asked_for(make: Make) -> None:
    """The message says what to set; with the names in the settings `renew` alone replaces it."""
    worker = make()
    own = worker.serve(NODE, end=None)
    run = worker.bridge.run("renew", "kubelet-server")
    assert run.returncode == 1
    assert "[certificate.kubelet-server] sans" in run.stderr
    assert worker.served() == own
    worker.bridge.add("certificate.kubelet-server", {"sans": ["w.example.com", "192.0.2.50"]})
    run = worker.bridge.run("renew")
    assert run.returncode == 0, run.stderr
    assert san_entries(worker.served()) == {("DNS", "w.example.com"), ("IP", "192.0.2.50")}
    assert "nothing is due" in worker.bridge.run("renew").stdout


def test_one_of_the_ca_keeps_its_names(make: Make) -> None:
    """It is renewed when due, in its own name."""
    worker = make()
    old = worker.serve(f"system:node:{NODE}", end=timedelta(days=3), sans=(x509.DNSName(NODE), x509.DNSName("w.lan")))
    assert worker.bridge.run("plan").returncode == 3
    run = worker.bridge.run("renew")
    assert run.returncode == 0, run.stderr
    assert (san_entries(worker.served()), worker.served() != old) == (san_entries(old), True)


def test_one_in_another_name_is_not_renewed(make: Make) -> None:
    """An administrator's certificate from the cluster's CA is refused as the model of a kubelet's."""
    worker = make()
    worker.serve("kubernetes-admin", end=timedelta(days=3), sans=(x509.DNSName(NODE),))
    run = worker.bridge.run("renew")
    assert run.returncode != 0
    assert "kubelet-server" in run.stderr


@pytest.mark.parametrize(
    "san", ["kubernetes", "kubernetes.default.svc", "x.y.svc.cluster.local", "localhost", "*.x.org", "a b"]
)
def test_names_of_services_are_refused_in_the_settings(make: Make, san: str) -> None:
    """A kubelet that answers to them could be taken for the API server."""
    worker = make()
    worker.bridge.add("certificate.kubelet-server", {"sans": [NODE, san]})
    run = worker.bridge.run("settings", "check")
    assert run.returncode == 2
    assert repr(san) in run.stderr


def test_one_from_a_signer_goes_into_a_new_file(make: Make) -> None:
    """`serverTLSBootstrap` without a signer: past nine tenths of its time we renew it, like the client certificate."""
    worker = make()
    leaf = worker.serve(f"system:node:{NODE}", end=timedelta(minutes=3), sans=(x509.DNSName(NODE),))
    dated = worker.pki_dir / "kubelet-server-2026-01-02-03-04-05.pem"
    dated.touch(mode=0o600)
    dated.write_bytes((worker.pki_dir / "kubelet.crt").read_bytes() + (worker.pki_dir / "kubelet.key").read_bytes())
    current = worker.pki_dir / "kubelet-server-current.pem"
    current.symlink_to(dated)
    worker.configure("rotateCertificates: true\nserverTLSBootstrap: true\n")
    run = worker.bridge.run("renew")
    assert run.returncode == 0, run.stderr
    new = load_pem_certificates(current.read_bytes())[0]
    assert (new != leaf, current.resolve() != dated, dated.exists()) == (True, True, True)
    assert san_entries(new) == san_entries(leaf)


# --- at its CA -------------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(make: Make) -> Worker:
    """One that knows no CA yet: its client certificate is due, and its kubelet has made the serving one itself."""
    worker = make(days_ago=364, ca=False)
    worker.serve(NODE, end=None)
    (worker.kubelet_dir / "kubeadm-flags.env").write_text(FLAGS)
    return worker


def assert_renews_both(worker: Worker) -> None:
    """By the CA that the settings have by now."""
    for command in (["doctor"], ["plan"]):
        assert worker.bridge.run(*command).returncode == 3, command
    client = load_pem_certificates((worker.pki_dir / "kubelet-client-current.pem").read_bytes())[0]
    for command in (["renew"], ["renew", "kubelet-server"], ["renew", "all"]):
        run = worker.bridge.run(*command)
        assert run.returncode == 0, f"{command}: {run.stdout}{run.stderr}"
    new = load_pem_certificates((worker.pki_dir / "kubelet-client-current.pem").read_bytes())[0]
    assert (new.subject, new != client) == (client.subject, True)
    assert san_entries(worker.served()) == {("DNS", NODE), ("IP", ADDRESS)}
    doctor = worker.bridge.run("doctor")
    assert doctor.returncode == 0, doctor.stdout


def test_what_setup_vault_prints_is_enough(bare: Worker, tmp_path: Path) -> None:
    """The script is run by an administrator as it is; with its policy alone both certificates are renewed, and no other."""
    assert bare.bridge.run("setup", "vault", "-o", str(tmp_path / "out")).returncode == 0
    script = tmp_path / "out/ca.sh"
    with openbao.dev_server() as bao:
        bao.add_ca("pki", *bare.bridge.pki.ca_pem("ca"))
        program = openbao.program()
        assert program is not None
        environment = {
            "PATH": f"{program.parent}:{os.environ['PATH']}",
            "BAO_ADDR": bao.url,
            "BAO_TOKEN": bao.root_token,
        }
        run = subprocess.run(
            ["sh", script], env={**environment, "HOME": str(tmp_path)}, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        token = bare.bridge.secret("token", bao.token(f"ca-bridge-{NODE}_ca"))
        bare.bridge.add("backend.corp", {"type": "vault", "url": bao.url, "timeout": "1m", "retry_for": "1s"})
        bare.bridge.add("backend.corp.auth", {"token_file": token})
        bare.bridge.add("authority.ca", {"backend": "corp", "mount": "pki"})
        assert_renews_both(bare)
        bare.bridge.add("certificate.kubelet-server", {"sans": [NODE, "192.0.2.99"]})
        other = bare.bridge.run("renew")
        assert other.returncode == 5, other.stdout + other.stderr
    assert san_entries(bare.served()) == {("DNS", NODE), ("IP", ADDRESS)}


@pytest.mark.kube("cfssl")
def test_what_setup_cfssl_prints_is_enough(bare: Worker, tmp_path: Path) -> None:
    """With the configuration of the script, and its two keys, both certificates are renewed."""
    assert bare.bridge.run("setup", "cfssl", "-o", str(tmp_path / "out")).returncode == 0
    found = re.search(r"<<'END'\n(.*?)\nEND\n", (tmp_path / "out/ca.sh").read_text(), re.DOTALL)
    assert found is not None
    config = json.loads(found[1].replace("/etc/cfssl", str(tmp_path)))
    cfssl.write_hmac_keys(config)
    with cfssl.serve(tmp_path / "server", *bare.bridge.pki.ca_pem("ca"), config) as url:
        bare.bridge.add("backend.cfssl", {"type": "cfssl", "timeout": "1m", "retry_for": "1s"})
        bare.bridge.add(
            "authority.ca", {"backend": "cfssl", "url": url, "auth_key_file": f"{tmp_path}/keys/ca-{{usage}}.hex"}
        )
        assert_renews_both(bare)


@pytest.mark.parametrize("ca", ["vault", "cfssl", "openssl"])
def test_setup_says_what_it_leaves_out(bare: Worker, ca: str) -> None:
    """Without an address `kubelet-server` is none of what is printed; an authority of others is not a worker's."""
    whole = bare.bridge.run("setup", ca)
    assert whole.returncode == 0
    warnings = [line for line in whole.stderr.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1
    assert "ca: the settings have no backend for it" in warnings[0]
    (bare.kubelet_dir / "kubeadm-flags.env").unlink()
    part = bare.bridge.run("setup", ca)
    assert part.returncode == 0
    assert (
        "it is left out: list each name and address by which clients reach it: [certificate.kubelet-server] sans"
        in part.stderr
    )
    assert ca == "openssl" or len(part.stdout) < len(whole.stdout)
    other = bare.bridge.run("setup", ca, "--authority", "etcd-ca")
    assert other.returncode == 1
    assert "this node is a worker, whose certificates are all of ca" in other.stderr


def test_over_the_air_gap(bare: Worker, tmp_path: Path) -> None:
    """
    The first serving certificate needs a person and a rule, and each refusal says which; the next proves itself.

    What a kubelet made itself is no proof, and none is sent.
    """
    desk = make_desk(tmp_path / "desk", bare.bridge.pki, authorities=["ca"])
    bare.bridge.add("backups", {"keep": 3})

    def carried(*options: str, names: tuple[str, ...] = ("kubelet.conf", "kubelet-server")) -> tuple[str, int]:
        """What the desk says; and the exit code of the import."""
        request, answer = (
            str(tmp_path / f"{len(list(tmp_path.iterdir()))}-{kind}.json") for kind in ("asked", "answer")
        )
        exported = bare.bridge.run("export", request, *names)
        assert exported.returncode == 0, exported.stderr
        signed = desk.run("sign", request, "-o", answer, *options)
        return signed.stderr, bare.bridge.run("import", answer).returncode

    own = bare.served()
    said, code = carried()
    assert "proof: the certificate that is replaced is missing" in said
    words = "the policy's [certificate.kubelet-server] sans, or desk.inventory, says what else"
    assert f"SAN: wanted {NODE} ({words}), found IP:{ADDRESS}" in said
    assert (code, bare.served() == own) == (5, True)

    said, code = carried("--without-proof", "kubelet-server", names=("kubelet-server",))
    assert "proof:" not in said
    assert "[certificate.kubelet-server] sans" in said
    assert code == 5

    desk.policy.write_text(
        desk.policy.read_text() + '[certificate.kubelet-server]\nsans = ["{node}", "192.0.2.0/24"]\n'
    )
    assert carried(names=("kubelet-server",))[1] == 5
    said, code = carried("--without-proof", "kubelet-server", names=("kubelet-server",))
    assert (said, code) == ("", 0)
    first = bare.served()
    assert san_entries(first) == {("DNS", NODE), ("IP", ADDRESS)}

    said, code = carried()
    assert (said, code, bare.served() != first) == ("", 0, True)
    inventory = tmp_path / "desk/inventory.toml"
    policy = desk.policy.read_text().replace("[desk]\n", f'[desk]\ninventory = "{inventory}"\n')
    desk.policy.write_text(policy.partition("[certificate.kubelet-server]")[0])
    for entry, wrong in (
        (f'[node.w9]\naddresses = ["{ADDRESS}"]\n', "node: wanted one that the inventory"),
        (f'[node.{NODE}]\naddresses = ["{ADDRESS}"]\nblocked = true\n', "node: wanted one that the inventory"),
        (f'[node.{NODE}]\naddresses = ["192.0.2.11"]\n', f"found IP:{ADDRESS}"),
        (f'[node.{NODE}]\naddresses = ["{ADDRESS}"]\n', ""),
    ):
        inventory.write_text(entry)
        said, code = carried(names=("kubelet-server",))
        assert (wrong in said, code) == (True, 5 if wrong else 0), (entry, said)
        assert said or not wrong
    assert san_entries(bare.served()) == san_entries(first)
    inventory.unlink()
    (tmp_path / "none.json").write_text("{}")
    refused = desk.run("sign", str(tmp_path / "none.json"), "-o", str(tmp_path / "none-answer.json"))
    assert refused.returncode == 2
    assert "desk.inventory" in refused.stderr
