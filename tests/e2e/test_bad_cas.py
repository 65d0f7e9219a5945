"""CAs that sign something else, or do not answer: nothing on disk moves, and exit code and message say what to do."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bridge.specs import AUTHORITIES
from bridge.testing import TestCA
from tests.kit import openbao
from tests.kit.cas import Bridge, add_cfssl, add_openssl, add_vault, live_certificates
from tests.kit.loopback import free_port
from tests.kit.openbao import OpenBao
from tests.kit.pki import Pki, handmade_pki

#: Requests end after this, and retries.
TIMEOUT, RETRY_FOR = 2, 3
LIMITS = {"timeout": f"{TIMEOUT}s", "retry_for": f"{RETRY_FOR}s"}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """A node whose certificates are all due."""
    soon = datetime.now(UTC) + timedelta(days=20)
    return handmade_pki(tmp_path_factory.mktemp("template") / "node", not_after=soon)


@pytest.fixture
def bridge(template: Pki, tmp_path: Path) -> Bridge:
    """A copy of that node, with settings that name no CA yet."""
    pki = Pki(root=tmp_path / "node", external=True)
    shutil.copytree(template.root, pki.root)
    return Bridge(pki=pki, directory=tmp_path / "bridge")


def files(bridge: Bridge) -> dict[str, str]:
    """Digests of all files on the node."""
    paths = [path for path in bridge.pki.kubeconfig_dir.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def assert_nothing_left(bridge: Bridge, *also: str) -> None:
    """No staged file, no journal, no backup; only the record, the count of failed runs, and what else is named."""
    assert not list(bridge.pki.root.rglob(".ca-bridge*"))
    state = bridge.directory / "state"
    usual = {"attempts.json", "audit.head", "audit.jsonl", "backups", "lock", "settings.checked", "tree.json"}
    assert {path.name for path in state.iterdir()} <= {*usual, *also}
    assert not list((state / "backups").iterdir())


def renew(bridge: Bridge, code: int, *args: str, leaves: str = "") -> str:
    """Run a renewal that must fail with this code and move nothing; what it said on standard error."""
    before = files(bridge)
    run = bridge.run("renew", *args)
    assert run.returncode == code, run.stdout + run.stderr
    assert files(bridge) == before
    assert_nothing_left(bridge, leaves)
    assert "Traceback" not in run.stderr
    return run.stderr


ROLES: dict[str, tuple[str, dict[str, object], str]] = {
    "an EKU to spare": ("apiserver", {"client_flag": True}, "EKU: wanted serverAuth, got clientAuth, serverAuth"),
    "no SANs": ("apiserver", {"use_csr_sans": False}, "SAN: wanted DNS:"),
    "O dropped": (
        "admin.conf",
        {"organization": []},
        "subject: wanted CN=kubernetes-admin,O=kubeadm:cluster-admins, got",
    ),
    "keyCertSign": (
        "apiserver",
        {"key_usage": ["DigitalSignature", "KeyEncipherment", "CertSign"]},
        "KeyUsage: wanted",
    ),
    "a month at most": ("apiserver", {"ttl": "24h", "max_ttl": "24h"}, "notAfter: wanted at least 7d of validity"),
}


@pytest.mark.parametrize("may_read_roles", [True, False], ids=["checked", "signed"])
@pytest.mark.parametrize("fault", ROLES)
def test_a_role_that_gives_something_else_is_refused(
    bridge: Bridge, bao: OpenBao, fault: str, may_read_roles: bool, tmp_path: Path
) -> None:
    """The exit code is 5, with wanted and got; with the right role the same command renews."""
    name, change, message = ROLES[fault]
    mount = f"{tmp_path.name}-ca"
    add_vault(bridge, bao, "ca", tmp_path.name)
    if not may_read_roles:
        add_policy_without_reading(bao, mount, f"kubeadm-{name}")
    role = bao.read(f"{mount}/roles/kubeadm-{name}")["data"]
    bao.write(f"{mount}/roles/kubeadm-{name}", **(role | change))
    said = renew(bridge, 5, name)
    assert f"error: {name}: {mount} (vault): " in said
    assert "hint: " in said
    if not may_read_roles:
        assert message in said
    bao.write(f"{mount}/roles/kubeadm-{name}", **role)
    run = bridge.run("renew", name)
    assert run.returncode == 0, run.stderr


def add_policy_without_reading(bao: OpenBao, mount: str, role: str) -> None:
    """The policy of the mount, without the right to look at roles."""
    from backends.vault import setup as vault_setup

    bao.add_policy(mount, vault_setup.policy(mount, [role], read_roles=False))


def test_another_ca_is_refused_before_it_signs(bridge: Bridge, bao: OpenBao, tmp_path: Path) -> None:
    """A mount that holds another CA than ca.crt: exit 5, both CAs are named, no certificate is made."""
    mount, other = f"{tmp_path.name}-ca", TestCA.make("kubernetes")
    add_vault(bridge, bao, "ca", tmp_path.name)
    bao.write(f"sys/mounts/{mount}-other", type="pki", config={"max_lease_ttl": "87600h"})
    bao.write(f"{mount}-other/config/ca", pem_bundle=(other.certificate_pem + other.key_pem).decode())
    bridge.add("renewal", {})
    text = bridge.config.read_text()
    bridge.config.write_text(text.replace(f'\nmount = "{mount}"', f'\nmount = "{mount}-other"'))
    said = renew(bridge, 5, "apiserver")
    assert "wanted the CA of" in said
    assert bao.request("LIST", f"{mount}-other/certs").status_code == 404  # none was made
    bridge.config.write_text(text)
    assert bridge.run("renew", "apiserver").returncode == 0
    assert bao.request("LIST", f"{mount}/certs").status_code == 200


@pytest.mark.kube("cfssl")
def test_a_cfssl_profile_with_other_usages_is_refused(bridge: Bridge) -> None:
    """A client profile for a serving certificate: exit 5; with the right profile the same command renews."""
    with add_cfssl(bridge, "ca"):
        text = bridge.config.read_text()
        bridge.config.write_text(text + '\n[backend.ca-signer.profiles]\napiserver = "client"\n')
        said = renew(bridge, 5, "apiserver")
        assert "server" in said
        bridge.config.write_text(text)
        assert bridge.run("renew", "apiserver").returncode == 0


def test_the_good_ones_are_installed_beside_a_bad_one(bridge: Bridge, bao: OpenBao, tmp_path: Path) -> None:
    """Exit 5 for the run; with --all-or-nothing none is installed, and the good answer is kept for the next run."""
    add_vault(bridge, bao, "ca", tmp_path.name)
    mount = f"{tmp_path.name}-ca"
    role = bao.read(f"{mount}/roles/kubeadm-admin.conf")["data"]
    bao.write(f"{mount}/roles/kubeadm-admin.conf", **(role | {"organization": []}))
    before = live_certificates(bridge.pki)
    said = renew(bridge, 5, "--all-or-nothing", "apiserver", "admin.conf", leaves="requests.json")
    assert "--all-or-nothing" in said
    run = bridge.run("renew", "apiserver", "admin.conf", "-o", "json")
    assert run.returncode == 5
    result = json.loads(run.stdout)
    assert [entry["name"] for entry in result["renewed"]] == ["apiserver"]
    assert [(entry["name"], entry["exitCode"]) for entry in result["failed"]] == [("admin.conf", 5)]
    after = live_certificates(bridge.pki)
    assert {name for name in after if after[name] != before[name]} == {"apiserver"}


def impatient(bridge: Bridge) -> None:
    """Short limits for the only authority."""
    text = bridge.config.read_text()
    kept = "\n".join(line for line in text.splitlines() if not line.startswith(("timeout", "retry_for")))
    limits = "\n".join(f'{key} = "{value}"' for key, value in LIMITS.items())
    bridge.config.write_text(kept.replace("[authority.ca]\n", f"[authority.ca]\n{limits}\n"))


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed() -> int:
    """A port that no process listens on."""
    return free_port()


def _vault(bridge: Bridge, url: str) -> None:
    token = bridge.secret("token", "hvs.planted-token")
    bridge.add("backend.corp", {"type": "vault", "url": url})
    bridge.add("backend.corp.auth", {"method": "token", "token_file": token})


def _cfssl(bridge: Bridge, url: str) -> None:
    bridge.add("backend.corp", {"type": "cfssl", "url": url, "auth_key_file": bridge.secret("key", "0f" * 32)})


@pytest.mark.parametrize("add", [_vault, _cfssl], ids=["vault", "cfssl"])
@pytest.mark.parametrize("port", ["silent", "closed"])
def test_a_dead_or_slow_ca_is_unavailable_within_the_set_time(
    bridge: Bridge, add: Callable[[Bridge, str], None], port: str, request: pytest.FixtureRequest
) -> None:
    """All twelve certificates together end with exit 6 within the time limit of one."""
    add(bridge, f"http://127.0.0.1:{request.getfixturevalue(port)}")
    for name in AUTHORITIES:
        bridge.add(f"authority.{name}", {"backend": "corp"} | LIMITS)
    begin = time.monotonic()
    said = renew(bridge, 6)
    assert time.monotonic() - begin < 11 * (TIMEOUT + RETRY_FOR)
    assert "planted" not in said
    assert "0f" * 32 not in said


def test_a_sealed_server_is_unavailable(bridge: Bridge, tmp_path: Path) -> None:
    """The exit code is 6 while it is sealed; the same command renews when it is open again."""
    from tests.kit import cfssl

    tls = cfssl.make_tls(tmp_path / "tls")
    with openbao.tls_server(tls.server_cert, tls.server_key, tls.ca) as bao:
        add_vault(bridge, bao, "ca", "sealed")
        text = bridge.config.read_text().replace('type = "vault"', f'type = "vault"\nca_file = "{tls.ca}"')
        bridge.config.write_text(text)
        bao.seal()
        said = renew(bridge, 6, "apiserver")
        assert "seal" in said
        bao.unseal()
        assert bridge.run("renew", "apiserver").returncode == 0


def test_a_slow_openssl_is_unavailable(bridge: Bridge, tmp_path: Path) -> None:
    """The exit code is 6 within the set time; with the real program the same command renews."""
    add_openssl(bridge, "ca")
    slow = tmp_path / "slow-openssl"
    slow.write_text('#!/bin/sh\n[ "$1" = ca ] && sleep 900\nexec openssl "$@"\n')
    slow.chmod(0o755)
    text = bridge.config.read_text()
    bridge.config.write_text(text.replace('type = "openssl"', f'type = "openssl"\nopenssl = "{slow}"'))
    impatient(bridge)
    begin = time.monotonic()
    renew(bridge, 6, "apiserver")
    assert time.monotonic() - begin < 300  # the program would take fifteen minutes
    bridge.config.write_text(text)
    assert bridge.run("renew", "apiserver").returncode == 0


def test_a_wrong_passphrase_is_refused(bridge: Bridge) -> None:
    """The exit code is 2, and the error names the file and shows no passphrase."""
    add_openssl(bridge, "ca")
    path = bridge.directory / "ca.passphrase"
    right = path.read_text()
    path.write_text("planted wrong phrase\n")
    said = renew(bridge, 2, "apiserver")
    assert str(path) in said
    assert "planted" not in said
    path.write_text(right)
    assert bridge.run("renew", "apiserver").returncode == 0


def test_a_wrong_token_is_refused(bridge: Bridge, bao: OpenBao, tmp_path: Path) -> None:
    """The exit code is 5, and no message shows the token, however verbose."""
    add_vault(bridge, bao, "ca", tmp_path.name)
    _vault(bridge, bao.url)
    text = bridge.config.read_text()
    bridge.config.write_text(text.replace(f'backend = "{tmp_path.name}-ca"', 'backend = "corp"'))
    said = renew(bridge, 5, "apiserver", "-v")
    assert "planted" not in said
