"""`setup kubernetes`: manifests for this cluster, and a real gateway that works with the rights and policies in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509

from bridge.gateway.rules import CLIENT, CLIENT_KUBELET, SERVING
from bridge.settings.load import parse
from bridge.system.waiting import wait_until
from tests.kit import gateways, kube_api
from tests.kit.api_client import ApiClient
from tests.kit.gateways import DOMAIN, USAGES, Place, csr_pem, node_subject
from tests.kit.kube_api import ApiServer

SHIPPED = Path(__file__).resolve().parents[2] / "config/kubernetes"
ACCOUNT = "system:serviceaccount:ca-bridge:ca-bridge-gateway"


def setup(config: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """The command."""
    program = str(Path(sys.executable).with_name("ca-bridge"))
    command = [program, "setup", "kubernetes", "--config", str(config), *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "80"})


def documents(text: str) -> dict[tuple[str, str], Any]:
    """By kind and name."""
    return {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(text) if one}


def test_without_settings_it_prints_what_is_shipped(tmp_path: Path) -> None:
    """An administrator who begins sees all of it, and one stream is what `kubectl apply -f -` takes."""
    config = tmp_path / "config.toml"
    config.write_text(f'[gateway]\npolicy = "{tmp_path}/none.toml"\n')
    run = setup(config)
    assert run.returncode == 0, run.stderr
    shipped = [one for path in sorted(SHIPPED.glob("*.yaml")) for one in yaml.safe_load_all(path.read_text()) if one]
    assert [one for one in yaml.safe_load_all(run.stdout) if one] == shipped
    assert setup(config, "-o", str(tmp_path / "out")).returncode == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(p.name for p in SHIPPED.glob("*.yaml"))


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """An API server."""
    with kube_api.serving(tmp_path_factory.mktemp("setup")) as server:
        yield server


@pytest.mark.kube("etcd", "kube-apiserver", "kubectl")
def test_a_gateway_works_with_it(api: ApiServer, tmp_path: Path) -> None:
    """With exactly these rights and policies a node gets its certificates, and no other user can approve or ask."""
    place = Place(
        cluster=api.cluster, directory=tmp_path, user=ACCOUNT, inventory=gateways.INVENTORY + gateways.workers("w1")
    )
    place.with_openssl()
    place.gateway |= {"lease_namespace": "ca-bridge"}
    run = setup(place.write())
    assert run.returncode == 0, run.stderr
    assert "is a directory, which no Secret can hold" in " ".join(run.stderr.split())
    assert "--from-file=ca=" not in run.stdout
    found = documents(run.stdout)
    assert ("Secret", "ca-bridge-gateway") not in found
    signers = found["ClusterRole", "ca-bridge-gateway"]["rules"][3]["resourceNames"]
    assert set(signers) == set(tomllib.loads(place.policy)["signer"])
    api.apply(run.stdout)
    api.apply("{apiVersion: v1, kind: Node, metadata: {name: w1}}")
    with gateways.running(place) as gateway:
        node = api.client("system:node:w1", "system:nodes")
        names = {}
        for signer, sans in ((CLIENT_KUBELET, []), (SERVING, [x509.DNSName("w1.example.com")])):
            reply = node.create_csr(csr_pem(node_subject("w1"), sans), signer, USAGES[signer])
            assert reply.status == 201, reply
            names[signer] = str(reply.document["metadata"]["name"])
        for name in names.values():
            gateway.until(lambda: gateways.read(api.cluster, name)["status"].get("certificate"), what=name)  # noqa: B023
        hostile = node.create_csr(csr_pem(node_subject("w1"), [x509.DNSName("kubernetes")]), SERVING, USAGES[SERVING])
        name = hostile.document["metadata"]["name"]
        gateway.until(lambda: gateways.conditions(gateways.read(api.cluster, name)), what=name)
        assert gateways.state_of(gateways.read(api.cluster, name)) == "denied"
        assert gateway.end() == 0


@pytest.mark.kube("etcd", "kube-apiserver", "kubectl")
def test_who_may_ask_for_signers_of_ones_own(api: ApiServer, tmp_path: Path) -> None:
    """The API server already refuses a user without a grant in the policy, and not its twin with one."""
    place = Place(cluster=api.cluster, directory=tmp_path)
    place.policy = place.policy.replace(f"{DOMAIN}/apiserver", "other.internal/apiserver")
    run = setup(place.write())
    assert run.returncode == 0, run.stderr
    api.apply(run.stdout)
    signer, usages = "other.internal/apiserver", ["digital signature", "server auth"]
    stranger, node = api.client("carol", "system:masters"), api.client("system:node:cp1", "system:nodes")

    def ask(who: ApiClient, **more: int) -> tuple[int, str]:
        reply = who.create_csr(csr_pem(node_subject("cp1")), signer, usages, **more)
        return reply.status, reply.message.rpartition("denied request: ")[2] if reply.status >= 400 else ""

    refused = (403, "this signer is not granted to you")
    assert (
        wait_until(lambda: ask(stranger), lambda one: one == refused, timedelta(seconds=120), pause_seconds=0.2)
        == refused
    )
    assert ask(node) == (201, "")
    # the backend `kubernetes` asks for as long as `renewal.validity` says, and the gateway's policy has the limit
    assert ask(node, expirationSeconds=365 * 86400) == (201, "")


def test_two_domains_signers_of_one_certificate_have_a_policy_each(tmp_path: Path) -> None:
    """With one name for both the last one would be in force alone."""
    config = tmp_path / "config.toml"
    config.write_text(f'[gateway]\npolicy = "{tmp_path}/policy.toml"\ninventory = "{tmp_path}/inventory.toml"\n')
    (tmp_path / "inventory.toml").write_text(gateways.INVENTORY)
    tables = '[allow]\nclusters = ["kubernetes"]\nnodes = ["*"]\nmax_validity = "30d"\n'
    names = ("one.internal/apiserver", "two.internal/apiserver", "two.internal/controller-manager.conf")
    for name in names:
        tables += f'[signer."{name}"]\n[signer."{name}".grant.it]\nusers = ["{name.partition(".")[0]}"]\n'
    (tmp_path / "policy.toml").write_text(tables)
    run = setup(config)
    assert run.returncode == 0, run.stderr
    found = documents(run.stdout)
    for name in names:
        policy = found["ValidatingAdmissionPolicy", f"ca-bridge-gateway-{name.replace('/', '.')}"]
        assert json.dumps(name) in policy["spec"]["matchConditions"][0]["expression"]
        binding = found["ValidatingAdmissionPolicyBinding", policy["metadata"]["name"]]
        assert binding["spec"]["policyName"] == policy["metadata"]["name"]


def test_the_pods_settings_are_this_nodes(tmp_path: Path) -> None:
    """Files that settings name are named by their place in the pod, and the command that brings them is printed."""
    config = tmp_path / "config.toml"
    config.write_text(f"""\
[node]
cluster = "prod"
[gateway]
policy = "{tmp_path}/policy.toml"
inventory = "{tmp_path}/inventory.toml"
kubeconfig = "/etc/ca-bridge/gateway.conf"
node_rate = 20
[backend.corp]
type = "vault"
url = "https://vault.corp.example:8200"
ca_file = "/etc/ca-bridge/vault ca.crt"
[backend.corp.auth]
method = "approle"
role_id_file = "/etc/ca-bridge/role-id"
secret_id_file = "/etc/ca-bridge/secret-id"
[authority.ca]
backend = "corp"
mount = "pki"
[authority.etcd-ca]
backend = "corp"
mount = "etcd"
""")
    (tmp_path / "policy.toml").write_text('[allow]\nclusters = ["prod"]\nnodes = ["*"]\n'
                                          f'[signer."{SERVING}"]\n[signer."{CLIENT}"]\napproval = "required"\n'
                                          f'[signer."{CLIENT}".grant.x]\nusers = ["bob"]\nsubjects = ["CN=bob"]\n')  # fmt: skip
    (tmp_path / "inventory.toml").write_text('[node.cp1]\ncontrol_plane = true\naddresses = ["192.0.2.1"]\n')
    run = setup(config)
    assert run.returncode == 0, run.stderr
    found = documents(run.stdout)
    data = found["ConfigMap", "ca-bridge-gateway"]["data"]
    assert data["gateway-policy.toml"] == (tmp_path / "policy.toml").read_text()
    assert data["inventory.toml"] == (tmp_path / "inventory.toml").read_text()
    settings = parse(data["config.toml"], tmp_path / "pod.toml")
    assert settings.node.cluster == "prod"
    assert settings.gateway.node_rate == 20
    assert settings.gateway.lease_namespace == "ca-bridge"
    assert settings.gateway.kubeconfig is None
    assert 'ca_file = "/etc/ca-bridge/files/vault-ca.crt"' in data["config.toml"]
    assert 'auth.secret_id_file = "/etc/ca-bridge/files/secret-id"' in data["config.toml"]
    command = "create secret generic ca-bridge-gateway '--from-file=vault-ca.crt=/etc/ca-bridge/vault ca.crt'"
    assert command in run.stdout
    assert "--from-file=etcd-ca.crt=/etc/kubernetes/pki/etcd/ca.crt" in run.stdout
    items = found["Deployment", "ca-bridge-gateway"]["spec"]["template"]["spec"]["volumes"][0]["projected"]["sources"][
        1
    ]
    assert {one["key"]: one["path"] for one in items["secret"]["items"]} == {
        "vault-ca.crt": "files/vault-ca.crt", "role-id": "files/role-id", "secret-id": "files/secret-id", "etcd-ca.crt": "trust/etcd/ca.crt"
    }  # fmt: skip
    variables = found["ValidatingAdmissionPolicy", "ca-bridge-gateway-decides"]["spec"]["variables"]
    by_name = {one["name"]: one["expression"] for one in variables}
    assert by_name["approved_here"] == f'object.spec.signerName in ["{SERVING}"]'
    assert by_name["signed_here"] == f'object.spec.signerName in ["{SERVING}", "{CLIENT}"]'


def test_a_secret_that_is_in_no_file_is_refused(tmp_path: Path) -> None:
    """A secret that can't go into the pod is named."""
    config = tmp_path / "config.toml"
    config.write_text(f"""\
[gateway]
policy = "{tmp_path}/none.toml"
[backend.corp]
type = "vault"
url = "https://vault.corp.example:8200"
[backend.corp.auth]
method = "token"
token_env = "VAULT_TOKEN"
[authority.ca]
backend = "corp"
mount = "pki"
""")
    run = setup(config)
    assert run.returncode == 2
    assert "a secret in a file" in run.stderr


@pytest.mark.parametrize("odd", ["\x85", "\u2028", "\u2029", "\x0c", "\r"])
def test_a_comment_of_the_policy_stays_one(tmp_path: Path, odd: str) -> None:
    """YAML ends a line at characters that end none in TOML: what stood behind one would be a setting in the pod."""
    config, policy = tmp_path / "config.toml", tmp_path / "policy.toml"
    config.write_text(f'[gateway]\npolicy = "{policy}"\ninventory = "{tmp_path}/inventory.toml"\n')
    (tmp_path / "inventory.toml").write_text('[node.cp1]\ncontrol_plane = true\naddresses = ["192.0.2.1"]\n')
    text = f'[allow]\nclusters = ["prod"]\nnodes = ["w1"]\n# not yetX masters = ["super-admin.conf"]\n[signer."{SERVING}"]\n'
    policy.write_bytes(text.replace("X", "\tsee").encode())
    twin = setup(config)
    data = documents(twin.stdout)["ConfigMap", "ca-bridge-gateway"]["data"]
    assert tomllib.loads(data["gateway-policy.toml"]) == tomllib.loads(policy.read_text())
    policy.write_bytes(text.replace("X", odd).encode())
    run = setup(config)
    assert (run.returncode != 0, run.stdout) == (True, "")
    assert odd in "\x0c\r" or "gateway-policy.toml, line 4: wanted no control characters" in run.stderr


def test_a_signer_is_no_expression(tmp_path: Path) -> None:
    """Its name goes into the admission policies' expressions: one that the API server could not have is refused."""
    config = tmp_path / "config.toml"
    config.write_text(f'[gateway]\npolicy = "{tmp_path}/policy.toml"\ninventory = "{tmp_path}/inventory.toml"\n')
    (tmp_path / "inventory.toml").write_text('[node.cp1]\ncontrol_plane = true\naddresses = ["192.0.2.1"]\n')
    for domain, is_one in (("a.example", True), ("x' || true || '", False)):
        (tmp_path / "policy.toml").write_text(
            f'[allow]\nclusters = ["prod"]\nnodes = ["*"]\n[signer."{domain}/apiserver"]\n'
        )
        run = setup(config)
        assert (run.returncode == 0, "|| true" in run.stdout) == (is_one, False)
