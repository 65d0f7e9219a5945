"""`trust publish`: the roots of the settings' CA in ClusterTrustBundles, without a gateway, on a real API server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from bridge.errors import Exit
from bridge.gateway.roots import BUNDLES, name_of
from bridge.gateway.watch import GROUP
from bridge.pki.budget import MOST_OF_SERVER
from bridge.pki.certificates import pem
from tests.kit import cluster_api, gateways, pods
from tests.kit.cluster_api import ClusterApi
from tests.kit.gateways import Place
from tests.kit.issuing import Signer
from tests.kit.loopback import free_port
from tests.kit.nodes import wait_for
from tests.kit.pods import SIGNER

pytestmark = pytest.mark.kube("kube-apiserver", "etcd")

USER = "publisher"
OTHER = "corp.example/other"
NAME = name_of(SIGNER)
COLLECTION = f"{GROUP}/{BUNDLES}"
BY_HAND = "corp.example:spiffe:by-hand"


def ca() -> Signer:
    """A root."""
    return Signer.make("pods", begin=datetime.now(UTC) - timedelta(days=1))


def text(*cas: Signer) -> str:
    """Certificates as a bundle has them."""
    return pem(*(one.certificate for one in cas)).decode()


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterApi]:
    """With the rights that docs/pod-certificates.md names for two signers, and no others."""
    group = "certificates.k8s.io"
    names = [name_of(SIGNER), name_of(OTHER)]
    rights = [
        {"apiGroups": [group], "resources": ["signers"], "verbs": ["attest"], "resourceNames": [SIGNER, OTHER]},
        {"apiGroups": [group], "resources": ["clustertrustbundles"], "verbs": ["create"]},
        {
            "apiGroups": [group], "resources": ["clustertrustbundles"], "verbs": ["get", "patch", "delete"],
            "resourceNames": [*names, name_of("corp.example/unattested")],
        },
    ]  # fmt: skip
    with cluster_api.running() as found:
        gateways.add_role(found.client(), "publisher", rights, {"kind": "User", "name": USER})
        wait_for("rights that count", lambda: found.client(USER).ask("GET", f"{COLLECTION}/{NAME}").status == 404)
        yield found


@pytest.fixture
def place(cluster: ClusterApi, tmp_path: Path) -> Iterator[Place]:
    """Settings without a CA, and a cluster without bundles."""
    found = pods.place(cluster, tmp_path)
    found.user = USER
    yield found
    for one in cluster.client().get(COLLECTION)["items"]:
        cluster.client().ask("DELETE", f"{COLLECTION}/{one['metadata']['name']}")


def run(place: Place, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The program."""
    command = [str(Path(sys.executable).with_name("ca-bridge")), "trust", "publish", "--config", str(place.write())]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


def outcomes(place: Place, *arguments: str, code: int = Exit.DONE) -> dict[str, str]:
    """What it says of each signer, by JSON."""
    done = run(place, "-o", "json", *arguments)
    assert done.returncode == code, done.stderr
    found = json.loads(done.stdout)
    assert (found["schemaVersion"], found["exitCode"]) == (1, code)
    assert all(one["name"] == name_of(one["signer"]) for one in found["bundles"])
    return {one["signer"]: one["outcome"] for one in found["bundles"]}


def published(cluster: ClusterApi, name: str = NAME) -> str | None:
    """The text of a bundle; None: there is no such object."""
    reply = cluster.client().ask("GET", f"{COLLECTION}/{name}")
    return str(reply.document["spec"]["trustBundle"]) if reply.ok else None


def bundle(name: str, roots: str, **metadata: Any) -> dict[str, Any]:
    """An object as another client makes it."""
    return {"metadata": {"name": name, **metadata}, "spec": {"signerName": SIGNER, "trustBundle": roots}}


def test_the_bundle_is_what_the_file_says(cluster: ClusterApi, place: Place) -> None:
    """Made, left alone, put back after another client changed or deleted it, and with two roots while one is replaced."""
    old, new = ca(), ca()
    pods.trust(place, old)
    assert outcomes(place) == {SIGNER: "published"}
    assert published(cluster) == text(old)
    version = cluster.client().get(f"{COLLECTION}/{NAME}")["metadata"]["resourceVersion"]
    assert outcomes(place) == {SIGNER: "unchanged"}
    assert cluster.client().get(f"{COLLECTION}/{NAME}")["metadata"]["resourceVersion"] == version
    assert cluster.client().patch(f"{COLLECTION}/{NAME}", {"spec": {"trustBundle": text(new)}}).ok
    done = run(place)
    assert (done.returncode, done.stdout.split()) == (0, f"{SIGNER}: published anew: {NAME} had others".split())
    assert published(cluster) == text(old)
    pods.trust(place, old, new, old)
    assert outcomes(place) == {SIGNER: "replaced"}
    assert published(cluster) == text(old, new)
    assert cluster.client().ask("DELETE", f"{COLLECTION}/{NAME}").ok
    assert outcomes(place) == {SIGNER: "published"}


def test_it_removes_what_it_has_made_and_nothing_else(cluster: ClusterApi, place: Place) -> None:
    """`publish = false` and --remove take its own object away; other objects of the signer stay, also one of that name."""
    root, admin = ca(), cluster.client()
    pods.trust(place, root)
    admin.create(COLLECTION, bundle(BY_HAND, text(root)))
    assert outcomes(place, SIGNER, OTHER) == {SIGNER: "published", OTHER: "published"}
    assert outcomes(place, "--remove", OTHER) == {SIGNER: "unchanged", OTHER: "removed"}
    place.policy = place.policy.replace("namespaces", "publish = false\nnamespaces", 1)
    assert outcomes(place) == {SIGNER: "removed"}
    assert outcomes(place) == {SIGNER: "absent"}
    admin.create(COLLECTION, bundle(NAME, text(root)))
    assert outcomes(place) == {SIGNER: "foreign"}
    assert (published(cluster), published(cluster, BY_HAND)) == (text(root), text(root))


def test_signers_may_be_named_without_a_policy(cluster: ClusterApi, place: Place) -> None:
    """Neither policy nor inventory nor CA is needed then; without names the policy is missed."""
    pods.trust(place, ca())
    config = place.write()
    (place.directory / "policy.toml").unlink()
    (place.directory / "inventory.toml").unlink()
    command = [str(Path(sys.executable).with_name("ca-bridge")), "trust", "publish", "--config", str(config)]
    done = subprocess.run([*command, OTHER], capture_output=True, text=True, check=False)
    assert (done.returncode, published(cluster, name_of(OTHER)) is not None) == (Exit.DONE, True), done.stderr
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "policy.toml" in done.stderr) == (Exit.USAGE, True), done.stderr


def test_what_is_refused_is_reported_for_each_signer(cluster: ClusterApi, place: Place) -> None:
    """A signer that we may not attest for, and roots that are none: exit 5, and the others are published all the same."""
    pods.trust(place, ca())
    unattested = "corp.example/unattested"
    assert outcomes(place, SIGNER, unattested, code=Exit.REFUSED) == {SIGNER: "published", unattested: "failed"}
    assert published(cluster, name_of(unattested)) is None
    assert place.trust is not None
    leaf = cluster.credentials(USER)[0]
    (place.trust / "pods.crt").write_bytes(leaf.read_bytes())
    before = published(cluster)
    done = run(place)
    assert (done.returncode, "CA bit" in done.stderr) == (Exit.REFUSED, True), done.stderr
    assert published(cluster) == before


def test_a_bundle_of_a_megabyte_keeps_no_signer_waiting(cluster: ClusterApi, place: Place) -> None:
    """A megabyte of commas, by another client that may attest, is read; both signers' bundles are as they should be."""
    root = ca()
    pods.trust(place, root)
    large = bundle(name_of(OTHER), text(root) + "," * MOST_OF_SERVER)
    large["spec"]["signerName"] = OTHER
    cluster.client().create(COLLECTION, large)
    done = run(place, SIGNER, OTHER)
    assert done.returncode == Exit.DONE, done.stderr
    assert published(cluster) == published(cluster, name_of(OTHER)) == text(root)


def test_without_an_answer_or_roots(cluster: ClusterApi, place: Place) -> None:
    """Exit 6 for an API server that is not there, 2 for a file of roots that is not there, or that others can change."""
    assert run(place).returncode == Exit.USAGE
    pods.trust(place, ca())
    assert place.trust is not None
    (place.trust / "pods.crt").chmod(0o666)
    refused = run(place)
    assert (refused.returncode, "mode 0666" in refused.stderr) == (Exit.USAGE, True), refused.stderr
    (place.trust / "pods.crt").chmod(0o644)
    nowhere = place.directory / "nowhere.conf"
    content = cluster.kubeconfig(USER).read_text().replace(f":{cluster.port}", f":{free_port()}")
    gateways.written(nowhere, content, 0o600)
    place.gateway = {"kubeconfig": str(nowhere)}
    assert outcomes(place, code=Exit.UNAVAILABLE) == {SIGNER: "failed"}
    place.gateway = {}
    assert outcomes(place) == {SIGNER: "published"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["kubernetes.io/kubelet-serving"], "SIGNER"),
        (["corp"], "SIGNER"),
        (["--remove", "x"], "--remove"),
        (["--remove", SIGNER], "--remove"),
        ([OTHER, "--remove", OTHER], "--remove"),
    ],
)
def test_signers_that_can_not_be_meant(place: Place, arguments: list[str], named: str) -> None:
    """Kubernetes' own, no name at all, and one that is to be published as well: exit 2, and nothing is asked."""
    pods.trust(place, ca())
    done = run(place, *arguments)
    assert (done.returncode, named in done.stderr) == (Exit.USAGE, True), done.stderr
