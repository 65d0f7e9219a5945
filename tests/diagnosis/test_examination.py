"""Planted faults of a node: `doctor` finds each by name, and none on a healthy one that the real kubeadm made."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP224R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509 import load_pem_x509_certificate

from bridge import diagnosis
from bridge.bootstrap.keys import sa_public_pem
from bridge.diagnosis import Finding, machine
from bridge.diagnosis.examination import examine
from bridge.node import kubeconfig, sample_pki
from bridge.node.reading import read_node
from bridge.pki.certificates import pem
from bridge.pki.csr import generate_key
from bridge.settings.load import load
from bridge.state import Store
from bridge.state.session import Tree, tree_file
from bridge.system.console import READ_ONLY_HINT
from bridge.system.locks import lock
from bridge.system.state_file import sealed
from tests.kit import apiserver, dead_fs
from tests.kit.cas import Bridge, add_openssl
from tests.kit.issuing import Signer, signed_again
from tests.kit.members import Place
from tests.kit.pki import NODE, Pki, kubeadm_pki

pytestmark = pytest.mark.kube


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A control plane of the real kubeadm: certificates, kubeconfigs, manifests."""
    pki = kubeadm_pki(tmp_path_factory.mktemp("made"), algorithm="ECDSA-P256")
    pki.run_kubeadm("init", "phase", "control-plane", "all")
    pki.run_kubeadm("init", "phase", "etcd", "local")
    return pki.root


@dataclass(kw_only=True)
class Site:
    """A copy of it, on which each test plants a fault of its own."""

    pki: Pki
    home: Path
    bridge: Bridge
    later: timedelta = field(default=timedelta())

    @property
    def kubernetes(self) -> Path:
        """What is /etc/kubernetes on a node."""
        return self.pki.kubeconfig_dir

    def manifest(self, component: str) -> Path:
        """A static pod's."""
        return self.kubernetes / "manifests" / f"{component}.yaml"

    def edit(self, path: Path, old: str, new: str) -> None:
        """Change a file."""
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def look(self) -> list[Finding]:
        """All findings."""
        return list(examine(load(self.bridge.config), datetime.now(UTC) + self.later))

    def wrong(self) -> set[tuple[str, str, str]]:
        """What is not in order: level, name of the check, subject."""
        return {(one.level, one.check, one.about) for one in self.look() if one.level not in ("ok", "note")}


@pytest.fixture
def site(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    root = tmp_path / "node"
    shutil.copytree(made, root, symlinks=True)
    pki = Pki(root=root, external=True)
    for path in pki.kubeconfig_dir.glob("manifests/*.yaml"):
        path.write_text(path.read_text().replace("/etc/kubernetes", str(pki.kubeconfig_dir)))
    home = tmp_path / "home"
    (home / ".kube").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge", tables=[])
    bridge.tables[0] += f'name = "{NODE}"\n'
    bridge.add("audit", {"syslog": False})
    return Site(pki=pki, home=home, bridge=bridge)


def with_cas(site: Site) -> None:
    """Three `openssl ca` directories."""
    for authority in ("ca", "etcd-ca", "front-proxy-ca"):
        add_openssl(site.bridge, authority)


def test_nothing_is_wrong_with_a_healthy_node(site: Site) -> None:
    """Before the first renewal; the program says so, and exits with 0. After it there is only what is to be restarted."""
    with_cas(site)
    shutil.copy(site.kubernetes / "admin.conf", site.home / ".kube/config")

    assert site.wrong() == set()
    first = site.bridge.run("doctor")
    assert (first.returncode, first.stdout.splitlines()[-1]) == (0, "nothing is wrong"), first.stdout
    (site.home / ".kube/config").unlink()
    assert site.bridge.run("renew", "all").returncode == 0
    assert site.wrong() == {("warning", "not-in-use", f"{name}.conf") for name in ("controller-manager", "scheduler")}


@pytest.mark.first_use("12")
def test_super_admin_conf_is_reported_as_long_as_it_is_there(site: Site) -> None:
    """`doctor` and `plan` report it without calling it a fault; a renewal, a named one or a missing file does not."""
    with_cas(site)
    path = site.kubernetes / "super-admin.conf"
    text = f"rm {path}"
    along, named = site.bridge.run("plan", "all"), site.bridge.run("plan", "super-admin.conf")
    renewed = site.bridge.run("renew", "all", "--no-restart")
    there = [(one.level, one.about) for one in site.look() if one.check == "super-admin"]
    path.unlink()
    gone = site.bridge.run("plan", "all")

    assert (along.returncode, text in along.stderr) == (3, True), along.stderr
    assert (named.returncode, text in named.stderr) == (3, False), named.stderr
    assert (renewed.returncode, text in renewed.stderr) == (0, False), renewed.stderr
    assert there == [("note", "super-admin.conf")]
    assert text not in gone.stderr
    assert not [one for one in site.look() if one.check == "super-admin"]


# --- what is installed -----------------------------------------------------------------------------------------------


def other_key(site: Site) -> None:
    shutil.copy(site.pki.pki_dir / "apiserver-etcd-client.key", site.pki.pki_dir / "apiserver.key")


def other_embedded_key(site: Site) -> None:
    path, other = site.kubernetes / "admin.conf", (site.kubernetes / "scheduler.conf").read_bytes()
    mine, key = kubeconfig.parse(path.read_bytes()).certificate_data, kubeconfig.key_data(other)
    path.write_bytes(kubeconfig.with_credentials(path.read_bytes(), mine or b"", key or b""))


def no_key(site: Site) -> None:
    (site.pki.pki_dir / "etcd/peer.key").unlink()


def garbled_key(site: Site) -> None:
    (site.pki.pki_dir / "etcd/peer.key").write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")


def open_key(site: Site) -> None:
    (site.pki.pki_dir / "apiserver.key").chmod(0o644)


def foreign_owner(site: Site) -> None:
    os.chown(site.kubernetes / "admin.conf", 12345, 0)


def foreign_owner_of_a_key(site: Site) -> None:
    os.chown(site.pki.pki_dir / "etcd/server.key", 12345, 0)


def open_directory(site: Site) -> None:
    site.pki.pki_dir.chmod(0o777)


def pair_of_another_cluster(site: Site) -> None:
    other = site.pki.root.parent / "other"
    sample_pki.make(other, now=datetime.now(UTC), not_after=datetime.now(UTC) + timedelta(days=300), key="ecdsa-p256")
    for name in ("apiserver.crt", "apiserver.key"):
        shutil.copy(other / "pki" / name, site.pki.pki_dir / name)


def pair_of_another_ca(site: Site) -> None:
    for suffix in (".crt", ".key"):
        shutil.copy(
            site.pki.pki_dir / f"front-proxy-client{suffix}", site.pki.pki_dir / f"apiserver-kubelet-client{suffix}"
        )


def ca_with_a_key_of_224_bits(site: Site) -> None:
    signer, pki = Signer.make("front-proxy-ca", key=generate_private_key(SECP224R1())), site.pki.pki_dir
    live = load_pem_x509_certificate((pki / "front-proxy-client.crt").read_bytes())
    (pki / "front-proxy-client.crt").write_bytes(signed_again(live, signer))
    (pki / "front-proxy-ca.crt").write_bytes(pem(signer.certificate))


def no_intermediate(site: Site) -> None:
    """A root takes the CA's place, and the CA becomes an intermediate that is in no file."""
    now = datetime.now(UTC)
    root = sample_pki.ca_certificate(
        "company root", generate_key("ecdsa-p256"), now - timedelta(1), now + timedelta(4000)
    )
    (site.pki.pki_dir / "front-proxy-ca.crt").write_bytes(pem(root))


def ca_of_another_cluster_in_a_kubeconfig(site: Site) -> None:
    path = site.kubernetes / "scheduler.conf"
    parsed = kubeconfig.parse(path.read_bytes())
    mine = base64.b64encode(parsed.ca_data or b"").decode()
    other = base64.b64encode((site.pki.pki_dir / "etcd/ca.crt").read_bytes()).decode()
    site.edit(path, mine, other)


def another_server_in_a_kubeconfig(site: Site) -> None:
    path = site.kubernetes / "controller-manager.conf"
    site.edit(path, kubeconfig.parse(path.read_bytes()).server, "https://api.elsewhere.example:6443")


def garbled_certificate(site: Site) -> None:
    (site.pki.pki_dir / "front-proxy-client.crt").write_bytes(b"garbage")


def no_certificate(site: Site) -> None:
    (site.pki.pki_dir / "front-proxy-client.crt").unlink()


def shared_file(site: Site) -> None:
    path = site.kubernetes / "super-admin.conf"
    path.unlink()
    path.symlink_to("admin.conf")


def everything_expired(site: Site) -> None:
    site.later = timedelta(days=400)


def no_job_renews(site: Site) -> None:
    site.later = timedelta(days=355)


def ca_ends(site: Site) -> None:
    site.later = timedelta(days=3300)


def ca_has_ended(site: Site) -> None:
    site.later = timedelta(days=4000)


def clock_behind(site: Site) -> None:
    site.later = -timedelta(days=2)


def ca_key_on_the_disk(site: Site) -> None:
    (site.pki.pki_dir / "front-proxy-ca.key").write_text("x")


def no_ca(site: Site) -> None:
    (site.pki.pki_dir / "front-proxy-ca.crt").unlink()


def node_by_another_name(site: Site) -> None:
    site.edit(site.bridge.config, f'"{NODE}"', '"cp-7"')


def no_service_account_key(site: Site) -> None:
    (site.pki.pki_dir / "sa.key").unlink()


def empty_public_key_of_service_accounts(site: Site) -> None:
    (site.pki.pki_dir / "sa.pub").write_bytes(b"")


def another_pair_of_service_accounts(site: Site) -> None:
    key = generate_key("ecdsa-p256")
    (site.pki.pki_dir / "sa.pub").write_bytes(sa_public_pem(key))


def below_a_ca_that_has_ended(site: Site) -> None:
    """The certificates are young, and the CA that they lead to, which is no longer the first, ended yesterday."""
    new, old = site.pki.root.parent / "new", site.pki.root.parent / "old"
    now = datetime.now(UTC)
    sample_pki.make(
        old, now=now - timedelta(9), not_after=now + timedelta(90), ca_not_after=now - timedelta(1), key="ecdsa-p256"
    )
    sample_pki.make(new, now=now - timedelta(1), not_after=now + timedelta(90), key="ecdsa-p256")
    for base in ("front-proxy-client.crt", "front-proxy-client.key"):
        shutil.copy(old / "pki" / base, site.pki.pki_dir / base)
    both = [(one / "pki/front-proxy-ca.crt").read_bytes() for one in (new, old)]
    (site.pki.pki_dir / "front-proxy-ca.crt").write_bytes(b"".join(both))


def open_manifests_directory(site: Site) -> None:
    (site.kubernetes / "manifests").chmod(0o777)


def second_manifest(site: Site) -> None:
    shutil.copy(site.manifest("kube-apiserver"), site.kubernetes / "manifests/kube-apiserver.yaml.bak")


def manifest_of_another_user(site: Site) -> None:
    there = site.pki.root.parent / "kube-apiserver.yaml"
    shutil.copy(site.manifest("kube-apiserver"), there)
    os.chown(there, 12345, 12345)
    site.manifest("kube-apiserver").unlink()
    site.manifest("kube-apiserver").symlink_to(there)


def manifests_that_no_kubelet_reads(site: Site) -> None:
    kubelet = site.bridge.directory / "kubelet"
    kubelet.mkdir()
    (kubelet / "config.yaml").write_text("kind: KubeletConfiguration\nstaticPodPath: /etc/kubelet.d\n")
    site.edit(site.bridge.config, f'name = "{NODE}"\n', f'name = "{NODE}"\nkubelet_dir = "{kubelet}"\n')


# --- who uses it -----------------------------------------------------------------------------------------------------


def manifest_names_another_file(site: Site) -> None:
    site.edit(site.manifest("kube-apiserver"), f"{site.pki.pki_dir}/apiserver.crt", "/etc/other/apiserver.crt")


def manifest_names_another_key(site: Site) -> None:
    site.edit(
        site.manifest("etcd"), f"--key-file={site.pki.pki_dir}/etcd/server.key", "--key-file=/etc/other/server.key"
    )


def manifest_trusts_another_ca(site: Site) -> None:
    manifest = site.manifest("kube-apiserver")
    site.edit(
        manifest, f"--client-ca-file={site.pki.pki_dir}/ca.crt", f"--client-ca-file={site.pki.pki_dir}/etcd/ca.crt"
    )


def kubelet_trusts_another_ca(site: Site) -> None:
    kubelet = site.bridge.directory / "kubelet"
    kubelet.mkdir()
    other = site.pki.pki_dir / "etcd/ca.crt"
    text = f"kind: KubeletConfiguration\nauthentication:\n  x509:\n    clientCAFile: {other}\n"
    (kubelet / "config.yaml").write_text(text)
    site.edit(site.bridge.config, f'name = "{NODE}"\n', f'name = "{NODE}"\nkubelet_dir = "{kubelet}"\n')


def new_address(site: Site) -> None:
    site.edit(site.manifest("kube-apiserver"), "--advertise-address=192.0.2.10", "--advertise-address=192.0.2.77")


def new_address_of_etcd(site: Site) -> None:
    site.edit(
        site.manifest("etcd"),
        "--initial-advertise-peer-urls=https://192.0.2.10",
        "--initial-advertise-peer-urls=https://192.0.2.77",
    )


def no_command_for_the_kubelet(site: Site) -> None:
    site.bridge.add("restart", {"method": "static-pods", "components": "all"})


def restart_command_that_is_not_there(site: Site) -> None:
    site.bridge.add("restart", {"method": "static-pods", "components": "all"})
    site.bridge.add("restart.commands", {"kubelet": "/nowhere/restart kubelet"})


def restart_command_of_another_user(site: Site) -> None:
    program = site.bridge.directory / "restart"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    os.chown(program, 65534, 65534)
    site.bridge.add("restart", {"method": "static-pods", "components": "all"})
    site.bridge.add("restart.commands", {"kubelet": str(program)})


def hook_that_is_not_there(site: Site) -> None:
    site.bridge.add("hooks", {"success": "/nowhere/tell"})


# --- the machine -----------------------------------------------------------------------------------------------------


def interrupted(site: Site) -> None:
    store = Store(site.bridge.directory / "state")
    store.prepare()
    store.journal.write_text("{}")


def damaged_requests(site: Site) -> None:
    store = Store(site.bridge.directory / "state")
    store.prepare()
    store.requests.write_text("{")


def unreadable_debt(site: Site) -> None:
    store = Store(site.bridge.directory / "state")
    store.prepare()
    store.unproven.mkdir()


def open_state_directory(site: Site) -> None:
    (site.bridge.directory / "state").mkdir(mode=0o755)


def state_of_another_cluster(site: Site) -> None:
    store = Store(site.bridge.directory / "state")
    store.prepare()
    tree_file(store).put(Tree(pki_dir="/srv/other/pki", kubeconfig_dir="/srv/other"))


def old_copy_of_admin_conf(site: Site) -> None:
    shutil.copy(site.kubernetes / "admin.conf", site.home / ".kube/config")
    with_cas(site)
    assert site.bridge.run("renew", "admin.conf").returncode == 0


def failed_runs(site: Site) -> None:
    with_cas(site)
    (site.bridge.directory / "desk/etcd-ca/ca.key").rename(site.bridge.directory / "aside")
    assert site.bridge.run("renew", "etcd-peer").returncode == 2
    (site.bridge.directory / "aside").rename(site.bridge.directory / "desk/etcd-ca/ca.key")


def open_passphrase(site: Site) -> None:
    with_cas(site)
    (site.bridge.directory / "ca.passphrase").chmod(0o644)


def open_ca_key(site: Site) -> None:
    with_cas(site)
    (site.bridge.directory / "desk/ca/ca.key").chmod(0o644)


def another_ca(site: Site) -> None:
    with_cas(site)
    site.edit(site.bridge.config, "desk/front-proxy-ca", "desk/etcd-ca")


def settings_with_a_typo(site: Site) -> None:
    with_cas(site)
    site.edit(site.bridge.config, "passphrase_file", "passfrase_file")


#: The fault, and what is found: level, check and subject.
FAULTS: list[tuple[Callable[[Site], None], str, str, str]] = [
    (other_key, "error", "key-of-another-certificate", "apiserver"),
    (other_embedded_key, "error", "key-of-another-certificate", "admin.conf"),
    (no_key, "error", "key-missing", "etcd-peer"),
    (garbled_key, "error", "key-unreadable", "etcd-peer"),
    (open_key, "error", "open-secret", "apiserver"),
    (foreign_owner, "error", "owner", "admin.conf"),
    (foreign_owner_of_a_key, "error", "owner", "etcd-server"),
    (open_directory, "error", "open-directory", "{pki}"),
    (pair_of_another_cluster, "error", "pair-of-another-ca", "apiserver"),
    (pair_of_another_ca, "error", "pair-of-another-ca", "apiserver-kubelet-client"),
    (ca_with_a_key_of_224_bits, "error", "ca-unsupported", "front-proxy-client"),
    (no_intermediate, "error", "missing-intermediate", "front-proxy-client"),
    (ca_of_another_cluster_in_a_kubeconfig, "error", "kubeconfig-ca", "scheduler.conf"),
    (another_server_in_a_kubeconfig, "warning", "kubeconfig-server", "controller-manager.conf"),
    (garbled_certificate, "error", "certificate-broken", "front-proxy-client"),
    (no_certificate, "error", "certificate-missing", "front-proxy-client"),
    (shared_file, "error", "not-replaceable", "super-admin.conf"),
    (everything_expired, "error", "expired", "etcd-server"),
    (no_job_renews, "warning", "overdue", "apiserver"),
    (ca_ends, "warning", "ca-ends-soon", "CA ca"),
    (ca_has_ended, "error", "ca-expired", "CA etcd-ca"),
    (clock_behind, "error", "clock", "apiserver"),
    (clock_behind, "error", "clock", "CA etcd-ca"),
    (ca_key_on_the_disk, "warning", "ca-key-on-disk", "CA front-proxy-ca"),
    (no_ca, "error", "ca-missing", "CA front-proxy-ca"),
    (no_service_account_key, "error", "service-account-key", "sa.key"),
    (empty_public_key_of_service_accounts, "error", "service-account-key", "sa.pub"),
    (another_pair_of_service_accounts, "error", "service-account-key", "sa.pub"),
    (below_a_ca_that_has_ended, "error", "expired", "front-proxy-client"),
    (below_a_ca_that_has_ended, "error", "ca-expired", "CA front-proxy-ca, number 2 in its file"),
    (open_manifests_directory, "error", "open-directory", "{kubernetes}/manifests"),
    (second_manifest, "error", "second-manifest", "{kubernetes}/manifests/kube-apiserver.yaml.bak"),
    (manifest_of_another_user, "error", "owner", "{there}/kube-apiserver.yaml"),
    (manifests_that_no_kubelet_reads, "error", "static-pod-path", "kubelet"),
    (node_by_another_name, "warning", "node-name", "node.name"),
    (manifest_names_another_file, "error", "manifest-names-another-file", "apiserver"),
    (manifest_names_another_key, "error", "manifest-names-another-file", "etcd-server"),
    (manifest_trusts_another_ca, "error", "manifest-ca", "kube-apiserver"),
    (kubelet_trusts_another_ca, "error", "manifest-ca", "kubelet"),
    (new_address, "warning", "sans-of-manifest", "apiserver"),
    (new_address_of_etcd, "warning", "sans-of-manifest", "etcd-peer"),
    (no_command_for_the_kubelet, "error", "restart-command", "restart.commands.kubelet"),
    (restart_command_that_is_not_there, "error", "restart-command", "restart.commands.kubelet"),
    (restart_command_of_another_user, "error", "restart-command", "restart.commands.kubelet"),
    (hook_that_is_not_there, "warning", "hook", "hook success"),
    (interrupted, "warning", "interrupted", "state directory"),
    (damaged_requests, "error", "state-file", "{bridge}/state/requests.json"),
    (unreadable_debt, "error", "state-file", "{bridge}/state/unproven.json"),
    (open_state_directory, "error", "state-directory", "state directory"),
    (state_of_another_cluster, "error", "state-directory", "state directory"),
    (old_copy_of_admin_conf, "warning", "admin-copy-old", "{home}/.kube/config"),
    (failed_runs, "warning", "failed-runs", "backend of etcd-ca"),
    (open_passphrase, "error", "open-secret", "{bridge}/ca.passphrase"),
    (open_ca_key, "error", "open-secret", "{bridge}/desk/ca/ca.key"),
    (another_ca, "error", "backend", "backend of front-proxy-ca"),
    (settings_with_a_typo, "error", "settings", "settings"),
]


#: Those that the second review planted.
ATTACKS = {
    below_a_ca_that_has_ended: "N4",
    restart_command_of_another_user: "N12",
    open_manifests_directory: "N13",
    second_manifest: "N13",
    manifest_of_another_user: "N13",
    manifests_that_no_kubelet_reads: "N13",
    no_service_account_key: "N32",
    empty_public_key_of_service_accounts: "N32",
}


@pytest.mark.parametrize(
    ("plant", "level", "check", "about"),
    [
        pytest.param(
            *fault,
            id=fault[0].__name__,
            marks=[pytest.mark.attack(ATTACKS[fault[0]])] if fault[0] in ATTACKS else [],
        )
        for fault in FAULTS
    ],
)
def test_finds_a_planted_fault_by_name(
    site: Site, plant: Callable[[Site], None], level: str, check: str, about: str
) -> None:
    """A healthy node becomes one with exactly this fault, or with what follows from it."""
    assert site.wrong() == set()

    plant(site)

    places = {
        "kubernetes": site.kubernetes,
        "pki": site.pki.pki_dir,
        "home": site.home,
        "bridge": site.bridge.directory,
        "there": site.pki.root.parent,
    }
    assert (level, check, about.format_map(places)) in site.wrong()


def test_an_older_public_key_of_service_accounts_may_be_beside_the_new_one(site: Site) -> None:
    """Tokens of the older one are good until they end: in a file of its own, or in the same; the new one has to be there."""
    other = sa_public_pem(generate_key("ecdsa-p256"))
    older, ours = site.pki.pki_dir / "older.pub", site.pki.pki_dir / "sa.pub"
    older.write_bytes(other)
    line = f"    - --service-account-key-file={ours}\n"
    site.edit(site.manifest("kube-apiserver"), line, f"{line}    - --service-account-key-file={older}\n")
    assert site.wrong() == set()
    right = ours.read_bytes()
    ours.write_bytes(other + right)
    assert site.wrong() == set()
    ours.write_bytes(other)
    assert site.wrong() == {("error", "service-account-key", "sa.pub")}
    ours.write_bytes(right)
    older.unlink()
    assert site.wrong() == {("error", "service-account-key", "sa.pub")}


def test_a_certificate_that_lives_shorter_than_it_is_due_is_not_overdue_at_once(site: Site) -> None:
    """super-admin.conf of `bootstrap init` lives eight days, and no night has passed it over on the first."""
    with_cas(site)
    short = {"validity": "8d", "before": "7d", "min_validity": "1d", "shorter": "allow"}
    site.bridge.add("renewal", short)
    assert site.bridge.run("renew", "super-admin.conf").returncode == 0
    site.edit(site.bridge.config, 'validity = "8d"\nbefore = "7d"', 'validity = "365d"\nbefore = "30d"')

    assert site.wrong() == set()
    site.later = timedelta(days=5)
    assert site.wrong() == {("warning", "overdue", "super-admin.conf")}


def test_a_certificate_that_ended_before_its_cas_new_one_began_is_of_that_ca(site: Site) -> None:
    """The CA was renewed with its key when all had expired; only dates speak against the certificates."""
    certificate, key = site.pki.ca_pem("etcd-ca")
    begin = datetime.now(UTC) + timedelta(days=380)
    old = load_pem_x509_certificate(certificate)
    private = load_pem_private_key(key, None)
    assert isinstance(private, RSAPrivateKey | EllipticCurvePrivateKey)
    new = sample_pki.ca_certificate("etcd-ca", private, begin, begin + timedelta(days=3650))
    assert new.subject == old.subject
    (site.pki.pki_dir / "etcd/ca.crt").write_bytes(pem(new))
    site.later = timedelta(days=400)

    found = {(check, about) for _, check, about in site.wrong()}
    assert ("expired", "etcd-peer") in found
    assert not {one for one in found if one[0] == "pair-of-another-ca"}
    stranger = sample_pki.ca_certificate("etcd-ca", generate_key("ecdsa-p256"), begin, begin + timedelta(days=3650))
    (site.pki.pki_dir / "etcd/ca.crt").write_bytes(pem(stranger))
    assert ("error", "pair-of-another-ca", "etcd-peer") in site.wrong()


# --- what takes more than a file ---------------------------------------------------------------------------------------


def test_finds_a_run_that_hangs(site: Site) -> None:
    """One that holds the lock for hours; a run that has just begun is none, and who is gone holds nothing."""
    store = Store(site.bridge.directory / "state")
    store.prepare()
    with lock(store.lock, "ca-bridge renew"):
        assert site.wrong() == set()
        assert "a run is under way" in site.bridge.run("doctor").stdout
        holder = json.loads(store.lock.read_text()) | {"since": "2026-01-01T00:00:00+00:00"}
        store.lock.write_text(json.dumps(holder))
        assert site.wrong() == {("warning", "hung-run", "lock")}
    assert site.wrong() == set()


@pytest.mark.parametrize(("options", "check"), [("size=512k", "disk-space"), ("size=64m,nr_inodes=30", "inodes")])
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system; run as root")
def test_finds_a_full_file_system(site: Site, options: str, check: str) -> None:
    """`doctor` finds it before a CA is asked, not after it has signed."""
    state = site.bridge.directory / "state"
    state.mkdir(mode=0o700)
    program = Path(sys.executable).with_name("ca-bridge")
    script = f"mount -t tmpfs -o mode=0700,{options} tmpfs {state} && exec {program} doctor -o json --config {site.bridge.config}"
    run = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False)
    found = json.loads(run.stdout)
    assert (run.returncode, found["exitCode"]) == (1, 1), run.stderr
    assert [(one["level"], one["check"], one["about"]) for one in found["findings"] if one["level"] != "ok"] == [
        ("error", check, [f"file system of {state}"])
    ]


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("state", "apiserver"),
        ("etc/kubernetes/pki", "apiserver"),
        ("etc/kubernetes/pki/etcd", "etcd-server"),
        ("disk", "apiserver"),
    ],
)
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system; run as root")
def test_a_read_only_file_system_is_found_before_a_ca_is_asked(site: Site, place: str, name: str) -> None:
    """`doctor` and `renew` find it, below a directory or a link, too; `renew` asks no CA and says what to do."""
    state = site.bridge.directory / "state"
    state.mkdir(mode=0o700)
    (state / "backups").mkdir(mode=0o700)
    indexes = [add_openssl(site.bridge, name) / "index.txt" for name in ("ca", "etcd-ca", "front-proxy-ca")]
    directory = state if place == "state" else site.pki.root / place
    if place == "disk":
        directory.mkdir()
        certificate = site.pki.pki_dir / "apiserver.crt"
        certificate.rename(directory / "apiserver.crt")
        certificate.symlink_to(directory / "apiserver.crt")
    program = Path(sys.executable).with_name("ca-bridge")

    def run(mount: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = " ".join((str(program), *arguments, "--config", str(site.bridge.config)))
        script = f"mount --bind {directory} {directory} && mount -o remount,bind,{mount} {directory} && exec {command}"
        return subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False)

    found = json.loads(run("ro", "doctor", "-o", "json").stdout)
    wrong = [(one["level"], one["check"], one["about"]) for one in found["findings"] if one["level"] != "ok"]
    assert wrong == [("error", "read-only", [f"file system of {directory}"])]
    renewed = run("ro", "renew", name)
    assert renewed.returncode == 1
    assert READ_ONLY_HINT in renewed.stderr
    assert [index.read_text() for index in indexes] == [""] * 3
    assert run("rw", "renew", name).returncode == 0
    assert any(index.read_text() for index in indexes)


@pytest.mark.parametrize("san", ["new.example.com", "zz.example.com"])
def test_compares_the_sans_with_kubeadm_config(site: Site, san: str) -> None:
    """The cluster's own configuration gives the expected SANs; where no API server answers, the report says so."""
    assert "not compared" in site.bridge.run("doctor").stdout
    place = Place(name=NODE, address="127.0.0.1", directory=site.pki.root / "etc", cas={})
    config = "apiVersion: kubeadm.k8s.io/v1beta4\nkind: ClusterConfiguration\nkubernetesVersion: v1.37.2\n"
    config += f"apiServer:\n  certSANs: [{san}]\ncontrolPlaneEndpoint: api.example.com:6443\n"
    state = apiserver.State(config=config)
    with apiserver.serving(place, state):
        site.edit(site.manifest("kube-apiserver"), "--secure-port=6443", f"--secure-port={state.port}")
        wrong = site.wrong()
    assert wrong == ({("warning", "sans-of-kubeadm-config", "apiserver")} if san == "new.example.com" else set())


@pytest.mark.parametrize("directory", ["{pki}", "{pki}/", "{link}", "/srv/pki", ""])
def test_compares_the_directory_with_kubeadm_config(site: Site, tmp_path: Path, directory: str) -> None:
    """kubeadm's `certificatesDir` is `node.pki_dir`, by whatever way, or else a warning names both."""
    (tmp_path / "link").symlink_to(site.pki.pki_dir)
    named = directory.format(pki=site.pki.pki_dir, link=tmp_path / "link")
    place = Place(name=NODE, address="127.0.0.1", directory=site.pki.root / "etc", cas={})
    config = "apiVersion: kubeadm.k8s.io/v1beta4\nkind: ClusterConfiguration\nkubernetesVersion: v1.37.2\n"
    config += f"certificatesDir: {named}\ncontrolPlaneEndpoint: api.example.com:6443\n"
    state = apiserver.State(config=config)
    with apiserver.serving(place, state):
        site.edit(site.manifest("kube-apiserver"), "--secure-port=6443", f"--secure-port={state.port}")
        found = [one for one in site.look() if one.check == "certificates-dir"]
    if named != "/srv/pki":
        assert found == []
        return
    assert [(one.level, one.about) for one in found] == [("warning", "node.pki_dir")]
    assert found[0].text.startswith(f"wanted kubeadm-config's certificatesDir, /srv/pki, found {site.pki.pki_dir}")


def test_one_cause_is_reported_once(site: Site) -> None:
    """For all certificates and CAs that it concerns; exit 3 for warnings, 1 for an error, as text and as JSON."""
    for path in site.pki.pki_dir.glob("*.key"):
        path.chmod(0o640)
        os.chown(path, -1, 12345)
    site.bridge.add("hooks", {"success": "/nowhere/tell", "failure": "/nowhere/tell"})
    run = site.bridge.run("doctor", "-o", "json")
    reported = json.loads(run.stdout)
    assert (run.returncode, reported["schemaVersion"], reported["exitCode"]) == (1, 1, 1)
    wrong = {one["check"]: one for one in reported["findings"] if one["level"] != "ok"}
    assert wrong["hook"]["about"] == ["hook success", "hook failure"]
    assert [one["level"] for one in reported["findings"]] == sorted(
        (one["level"] for one in reported["findings"]), key=diagnosis.LEVELS.index
    )
    text = site.bridge.run("doctor")
    assert text.stdout.count("/nowhere/tell") == 1
    for path in site.pki.pki_dir.glob("*.key"):
        path.chmod(0o600)
    assert site.bridge.run("doctor").returncode == 3


@pytest.mark.first_use("11")
def test_a_note_is_no_warning(site: Site) -> None:
    """It is called so on a screen, says nothing about what was wanted, and is "ok" for programs."""
    shown, reported = site.bridge.run("doctor").stdout, json.loads(site.bridge.run("doctor", "-o", "json").stdout)
    assert re.search(r"(?m)^note +super-admin.conf ", shown), shown
    assert [line for line in shown.splitlines() if line.startswith(("ok", "note")) and "wanted" in line] == []
    assert {one["level"] for one in reported["findings"]} <= {"error", "warning", "ok"}


@pytest.mark.first_use("26")
def test_a_broken_certificate_can_be_made_anew(site: Site) -> None:
    """As the hint says, the operator moves the file away and renews it by name."""
    with_cas(site)
    garbled_certificate(site)
    [found] = [one for one in site.look() if one.check == "certificate-broken"]
    path = site.pki.pki_dir / "front-proxy-client.crt"
    assert f"mv {path} /root, and `ca-bridge renew front-proxy-client` makes it anew" in found.hint
    path.rename(site.home / path.name)
    config = site.pki.root / "kubeadm.yaml"
    config.write_text("apiVersion: kubeadm.k8s.io/v1beta4\nkind: ClusterConfiguration\nkubernetesVersion: v1.37.2\n")
    made = site.bridge.run("renew", "front-proxy-client", "--kubeadm-config", str(config))
    assert made.returncode == 0, made.stderr


@pytest.mark.first_use("4")
def test_an_immutable_file_is_found(site: Site) -> None:
    """`doctor` reports a file that not even root can replace, because a renewal would stop at it each night."""
    path = site.pki.pki_dir / "etcd/server.crt"
    if subprocess.run(["chattr", "+i", str(path)], capture_output=True, check=False).returncode:
        pytest.skip("this file system has no immutable files; run the tests on ext4, xfs or btrfs")
    try:
        assert ("error", "immutable", "etcd-server") in site.wrong()
    finally:
        subprocess.run(["chattr", "-i", str(path)], check=True)


@pytest.mark.first_use("4")
@pytest.mark.parametrize(("code", "about"), [(1, "this node"), (5, "backend of ca")])
def test_a_local_failure_is_not_put_down_to_the_ca(site: Site, code: int, about: str) -> None:
    """A run that could not install, or could not get the certificate."""
    times = {"since": "2026-11-01T00:00:00+00:00", "last": "2026-11-02T00:00:00+00:00"}
    store = Store(load(site.bridge.config).node.state_dir)
    store.directory.mkdir(mode=0o700, exist_ok=True)
    store.attempts.write_bytes(sealed({"authorities": {"ca": {"count": 2, "exitCode": code, "reason": "no", **times}}}))
    assert ("warning", "failed-runs", about) in site.wrong()


def test_without_a_backend_no_ca_was_asked(site: Site) -> None:
    """Without any backend requests are carried by hand, which is no fault; with one table the others are missing."""
    run = site.bridge.run("doctor")
    assert (run.returncode, "by hand" in run.stdout, "no CA was asked" in run.stdout) == (0, True, True)
    assert run.stdout.splitlines()[-1] == "nothing is wrong on this node; no CA was asked"
    add_openssl(site.bridge, "ca")
    assert ("error", "settings", "settings") in site.wrong()


def test_an_exchange_does_not_count_as_the_right_ca(site: Site) -> None:
    """Its directories are there; what a CA makes of it is known when it has answered."""
    boxes = {name: site.bridge.directory / name for name in ("outbox", "inbox")}
    site.bridge.add("backend.door", {"type": "exchange", **{name: str(path) for name, path in boxes.items()}})
    for authority in ("ca", "etcd-ca", "front-proxy-ca"):
        site.bridge.add(f"authority.{authority}", {"backend": "door"})
    missing = site.bridge.run("doctor")
    assert missing.returncode == 1
    assert missing.stdout.count("there is no such directory") == 1
    for path in boxes.values():
        path.mkdir()
    run = site.bridge.run("doctor")
    assert run.returncode == 0, run.stdout
    assert run.stdout.count("door (exchange) can be used; no CA was asked") == 1
    assert "the right CA" not in run.stdout


def test_on_a_machine_that_is_no_node_one_sentence_is_enough(tmp_path: Path) -> None:
    """Not one for each certificate that is not there."""
    bridge = Bridge(pki=Pki(root=tmp_path / "empty", external=True), directory=tmp_path / "bridge")
    run = bridge.run("doctor")
    assert run.returncode == 1
    assert run.stdout.count("wanted") == 1
    assert "no control plane here" in run.stdout
    assert "--pki-dir" in run.stdout


@pytest.mark.attack("N8")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a home away")
def test_a_users_link_in_a_home_is_not_followed(site: Site) -> None:
    """It may lead to a device or to another's file; a copy there is found, as is root's own link."""
    with_cas(site)
    copy, elsewhere = site.home / ".kube/config", site.home / "elsewhere"
    shutil.copy(site.kubernetes / "admin.conf", elsewhere)

    def reported() -> list[str]:
        return [one.about for one in site.look() if one.check == "admin-copy"]

    copy.symlink_to(elsewhere)
    assert reported() == [str(copy)]
    os.chown(copy, 12345, 12345, follow_symlinks=False)
    os.chown(site.home / ".kube", 12345, 12345)
    assert reported() == []
    copy.unlink()
    elsewhere.rename(copy)
    assert reported() == [str(copy)]


@dead_fs.needs_mount
def test_homes_that_do_not_answer_are_given_up(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each after its time, and the rest after the time of all; a home that answers is looked at."""
    (site.home / ".kube/config").write_bytes((site.kubernetes / "admin.conf").read_bytes())
    node = read_node(load(site.bridge.config).node)
    with dead_fs.mounted(site.home.parent / "dead") as dead:

        def looked(one: float, together: float, *homes: Path) -> list[tuple[str, str, str]]:
            monkeypatch.setattr(machine, "_HOME_SECONDS", one)
            monkeypatch.setattr(machine, "_ALL_HOMES_SECONDS", together)
            return [(found.check, found.about, found.text) for found in machine._copies(node, homes)]

        first, answers = looked(3, 600, dead / "1", site.home)
        second, left = looked(0.2, 0.3, dead / "2", dead / "3")
    assert first[:2] == ("admin-copy-unseen", f"{dead}/1/.kube/config")
    assert "within 3 s" in first[2]
    assert answers[:2] == ("admin-copy", f"{site.home}/.kube/config")
    assert second[:2] == ("admin-copy-unseen", f"{dead}/2/.kube/config")
    assert left[:2] == ("admin-copy-unseen", f"{dead}/3/.kube/config")
    assert ("before this one" in second[2], "before this one" in left[2]) == (False, True)


@pytest.mark.attack("N12")
def test_a_hook_that_others_can_change_is_reported(site: Site) -> None:
    """`doctor` reports the hook before a renewal refuses to run it; with its mode put right it is in order."""
    hook = site.bridge.directory / "hook"
    hook.write_text("#!/bin/sh\n")
    hook.chmod(0o777)
    site.bridge.add("hooks", {"success": str(hook)})
    found = [one for one in site.look() if one.check == "hook"]
    assert [(one.level, "mode 0777" in one.text) for one in found] == [("error", True)]
    hook.chmod(0o755)
    assert [one.level for one in site.look() if one.check == "hook"] == ["ok"]


@pytest.mark.attack("N12")
def test_a_restart_command_that_others_can_change_is_reported(site: Site) -> None:
    """Before a certificate is spent on it; with its mode put right it is in order."""
    command = site.bridge.directory / "restart"
    command.write_text("#!/bin/sh\n")
    command.chmod(0o777)
    names = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet")
    site.bridge.add("restart", {"method": "command"})
    site.bridge.add("restart.commands", dict.fromkeys(names, str(command)))
    found = [one for one in site.look() if one.check == "restart-command"]
    assert found
    assert all(one.level == "error" and "mode 0777" in one.text for one in found)
    command.chmod(0o755)
    assert not [one for one in site.look() if one.check == "restart-command"]
