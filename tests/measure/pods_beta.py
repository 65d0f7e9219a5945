"""
Pods' requests and bundles with a real API server of Kubernetes 1.36, which has them in v1beta1 alone.

`python -m tests.measure.pods_beta [--docs]` starts the `kube-apiserver` and `etcd` that `tests/kit/binaries.sh --older 1.36
kube-apiserver etcd` builds, with the flags of docs/pod-certificates.md, and the gateway with OpenBao. It prints what was
seen; `--docs` writes it into that page.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from bridge.gateway import roots, watch
from bridge.pki.certificates import pem
from tests.kit import cluster_api, gateways, openbao, pods, programs
from tests.kit.gateways import Gateway
from tests.kit.issuing import Signer
from tests.kit.pods import Pod
from tests.measure.__main__ import write_between

PAGE = Path(__file__).parents[2] / "docs/pod-certificates.md"
VERSION = "1.36"
START = "<!-- numbers: written by `python -m tests.measure.pods_beta --docs` -->"


def flags() -> Mapping[str, str]:
    """The API server's, as the page has them."""
    [row] = re.findall(r"^\| kube-apiserver \| (`--.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return dict(re.findall(r"`--([a-z-]+)=([^`]+)`", row))


def seen(directory: Path) -> dict[str, str]:
    """
    Each fact of the table.

    Raises:
        AssertionError: One is otherwise.
    """
    with cluster_api.running(flags=flags()) as cluster, openbao.dev_server() as bao:
        gateways.grant_rights(cluster)
        pods.grant_rights(cluster)
        listed = cluster.client().get(watch.GROUP)["resources"]
        assert not {one["name"] for one in listed} & {watch.PODS, roots.BUNDLES}
        ca = Signer.make("pods", begin=datetime.now(UTC) - timedelta(days=1))
        place = pods.with_vault(pods.place(cluster, directory), bao, ca)
        other = [pods.source(signerName="else.example/spiffe")]
        shop, denied, without = (
            dataclasses.replace(pods.make_pod(cluster, name, sources=sources), group=watch.BETA_GROUP)
            for name, sources in (("shop", ()), ("else", ()), ("bank", other))
        )
        bundle = f"{watch.BETA_GROUP}/{roots.BUNDLES}/{roots.name_of(pods.SIGNER)}"
        with gateways.running(place) as gateway:
            found = _answered(gateway, shop, "Issued")
            leaf = pods.chain(found)[0]
            leaf.verify_directly_issued_by(ca.certificate)
            assert leaf.public_key() == shop.key.public_key()
            for pod in (denied, without):
                _answered(gateway, pod, "Denied")
            gateway.until(lambda: cluster.client().ask("GET", bundle).ok)
            assert cluster.client().get(bundle)["spec"]["trustBundle"] == pem(ca.certificate).decode()
            assert gateway.end() == 0
        uri = f"spiffe://{pods.TRUST_DOMAIN}/ns/shop/sa/web"
        assert f"UniformResourceIdentifier:{uri}" in pods.names(leaf)
        return {
            "kube-apiserver": _version("kube-apiserver"),
            "API version of the objects": found["apiVersion"],
            "a request of a pod that the policy allows": f"issued by OpenBao for `{uri}`",
            "a request from a namespace that is not in the policy": "denied",
            "a request for a signer for which the pod has no volume, which this API server accepts": "denied",
            "the signer's ClusterTrustBundle": "published, equal to `pods.crt`",
        }


def _answered(gateway: Gateway, pod: Pod, wanted: str) -> dict[str, Any]:
    name = pod.ask()
    gateway.until(lambda: pods.outcome(pod.read(name)) == wanted, what=f"wanted {name} to be {wanted}")
    return pod.read(name)


def _version(program: str) -> str:
    said = subprocess.run([programs.require(program), "--version"], capture_output=True, text=True, check=True).stdout
    [found] = re.findall(r"\d+\.\d+\.\d+", said)
    return str(found)


def main() -> None:
    """Look, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.measure.pods_beta", description=__doc__)
    parser.add_argument("--docs", action="store_true", help="write the table into docs/pod-certificates.md")
    given = parser.parse_args()
    os.environ["KUBE_BIN_DIR"] = f"{programs.directory()}-{VERSION}"
    needed = ("kube-apiserver", "etcd")
    if programs.lacking(needed) or not _version("kube-apiserver").startswith(f"{VERSION}."):
        parser.error(f"wanted Kubernetes {VERSION}: run {programs.COMMAND} --older {VERSION} {' '.join(needed)}")
    with tempfile.TemporaryDirectory() as directory:
        facts = seen(Path(directory))
    text = "".join(["| checked | result |\n| --- | --- |\n", *(f"| {what} | {one} |\n" for what, one in facts.items())])
    print(text)
    if given.docs:
        write_between(PAGE, START, text)


if __name__ == "__main__":
    main()
