"""
Kubernetes' own tests of pods' certificates and trust bundles (test/e2e/auth), with the gateway in the place of their signer.

`python -m tests.measure.pod_conformance` prints each test with its outcome, and `--docs` writes them into
docs/evidence/pod-conformance.md. The tests are those of Kubernetes, unchanged,
and so is agnhost, their image; their signer alone is replaced at the build (`tests/kit/modules/kubernetes/e2e`), by a
gateway that is started with a policy for the signer's name. One node, with pods in a network of their own, kube-proxy, and
a DNS server for the tests' one service.

Needs root, Debian's `busybox-static` and `nftables`, and the kit's programs with those of `binaries.sh --conformance`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tests.kit import docker_archive, gateways, pods, programs
from tests.kit.cluster_api import ClusterApi
from tests.kit.gateway_cluster import api_of
from tests.kit.issuing import Signer
from tests.kit.node import Node
from tests.kit.nodes import import_image, make_ready

NAME, IP, POD_NETWORK = "podconf", "198.18.77.197", "10.244.77"  # the network is that of `tests/kit/cni.sh`
IMAGE = "registry.k8s.io/e2e-test-images/agnhost:2.66.1"  # of test/utils/image/manifest.go
FOCUS = "PodCertificate|ClusterTrustBundle"
#: Their feature gate (AtomicWriteVolumeUserFields) is off in 1.37.
SKIP = "with user fields"
PAGE = Path(__file__).parents[2] / "docs/evidence/pod-conformance.md"
#: Tests that no signer but Kubernetes' own can pass, by a part of the name, and why ours does not.
CANNOT_PASS = {
    "honor UserAnnotations for SPIFFE URI path": (
        "the test wants the path of the SPIFFE ID from an annotation of the pod, so each pod would choose its own identity; "
        "the gateway denies the request, since names come only from the policy"
    ),
}
KUBELET = f"clusterDNS: [{IP}]\nclusterDomain: cluster.local\n"
PROGRAMS = ("pod-e2e.test", "agnhost", "kube-proxy")
#: As Kubernetes' signer has it: the trust domain, and the names of the one service that its tests have.
POLICY = """\
[allow]
clusters = ["kubernetes"]
nodes = ["*"]
[pod_signer."SIGNER"]
trust_domain = "cluster.local"
namespaces = ["*"]
backdating = "1m"
exact_dates = true
[pod_signer."SIGNER".identity.server]
namespaces = ["*"]
service_accounts = ["default"]
dns = ["server.{namespace}.svc", "server.{namespace}.svc.cluster.local"]
"""
#: Their pods want the image to be pulled each time, from a registry that is not here.
NO_PULLING = {
    "apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingAdmissionPolicy", "metadata": {"name": "no-pulling"},
    "spec": {
        "failurePolicy": "Fail", "reinvocationPolicy": "Never",
        "matchConstraints": {"resourceRules": [
            {"apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"], "operations": ["CREATE"]}]},
        "mutations": [{"patchType": "JSONPatch", "jsonPatch": {"expression": (
            "object.spec.containers.map(c, JSONPatch{op: 'replace', value: 'Never', path: '/spec/containers/' + "
            "string(object.spec.containers.map(d, d.name).indexOf(c.name)) + '/imagePullPolicy'})")}}],
    },
}  # fmt: skip
BINDING = {
    "apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingAdmissionPolicyBinding",
    "metadata": {"name": "no-pulling"}, "spec": {"policyName": "no-pulling"},
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run them; 1 if one of them failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.measure.pod_conformance", description=__doc__)
    parser.add_argument("--focus", default=FOCUS, help="a regular expression for the names of tests")
    parser.add_argument("--keep", type=Path, help="where logs and reports stay")
    parser.add_argument("--docs", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("--sign", nargs=2, metavar=("DIRECTORY", "SIGNER"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.sign:
        return _sign(Path(given.sign[0]), given.sign[1])
    if missing := programs.lacking(PROGRAMS):
        print(f"{missing} --conformance", file=sys.stderr)
        return 2
    with contextlib.ExitStack() as stack:
        place = given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place.mkdir(parents=True, exist_ok=True)
        node = stack.enter_context(Node.up(NAME, IP, ca_dir=place / "ca-keys", kubelet=KUBELET))
        _make_ready(node, place)
        stack.enter_context(_background(node, place / "kube-proxy.log", *_KUBE_PROXY))
        stack.enter_context(_background(node, place / "dns.log", sys.executable, "-c", _DNS))
        _settings(api_of(IP, place / "ca-keys", place / "api"), place)
        _run(node, place, given.focus)
        found = outcomes(place / "report.json")
    for one in found:
        print(f"{one.state}: {one.name}{f'    {one.failure}' if one.failure else ''}")
    if given.docs:
        PAGE.write_text(page(found), encoding="utf-8")
    return 1 if any(one.state != "passed" and not one.reason for one in found) else 0


_KUBE_PROXY = (
    "kube-proxy", "--kubeconfig=/etc/kubernetes/admin.conf", "--proxy-mode=nftables", f"--cluster-cidr={POD_NETWORK}.0/24",
    "--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0", "--conntrack-tcp-timeout-close-wait=0",
    f"--hostname-override={NAME}", "--healthz-bind-address=", "--metrics-bind-address=127.0.0.1:10249",
)  # fmt: skip


def _make_ready(node: Node, place: Path) -> None:
    """The image, the network, and a node that takes pods."""
    archive = place / "agnhost.tar"
    _write_image(archive)
    import_image(node, archive)
    make_ready(node, plugin=programs.KIT / "cni.sh")
    node.exec("sysctl", "-w", "net.ipv4.ip_forward=1")
    node.kubectl("taint", "nodes", "--all", "node-role.kubernetes.io/control-plane-")
    for document in (NO_PULLING, BINDING):
        (node.kubeconfig_dir / "apply.json").write_text(json.dumps(document))
        node.kubectl("apply", "-f", "/etc/kubernetes/apply.json")


def _write_image(out: Path) -> None:
    """Kubernetes' agnhost with a shell, as its Dockerfile has it."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for source, name in ((programs.require("agnhost"), "agnhost"), (Path("/bin/busybox"), "bin/busybox")):
            tar.add(source, name)
        for name in ("sh", "cat", "sleep", "ls", "stat"):
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    blob = raw.getvalue()
    run = {"Env": ["PATH=/bin"], "Entrypoint": ["/agnhost"], "Cmd": ["pause"]}
    rootfs = {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(blob).hexdigest()}"]}
    settings = json.dumps(
        {"architecture": docker_archive.architecture(), "os": "linux", "config": run, "rootfs": rootfs}
    )
    docker_archive.save(out, IMAGE, settings.encode(), blob)


#: The tests have one service, `server`; every other name is left to the pods' search list.
_DNS = f"""\
import socket, struct, subprocess
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("{IP}", 53))
while True:
    data, peer = server.recvfrom(512)
    labels, at = [], 12
    while data[at]:
        labels.append(data[at + 1:at + 1 + data[at]].decode().lower()); at += 1 + data[at]
    kind, question = struct.unpack(">H", data[at + 1:at + 3])[0], data[12:at + 5]
    answer, code = b"", 3
    if len(labels) == 5 and labels[2:] == ["svc", "cluster", "local"]:
        found = subprocess.run(["kubectl", "--kubeconfig", "/etc/kubernetes/admin.conf", "get", "service", "-n", labels[1],
            labels[0], "-o", "jsonpath={{.spec.clusterIP}}"], capture_output=True, text=True).stdout
        if found:
            code = 0
            if kind == 1:
                answer = b"\\xc0\\x0c" + struct.pack(">HHIH", 1, 1, 5, 4) + socket.inet_aton(found)
    head = data[:2] + struct.pack(">HHHHH", 0x8580 | code, 1, 1 if answer else 0, 0, 0)
    server.sendto(head + question + answer, peer)
"""


@contextlib.contextmanager
def _background(node: Node, log: Path, *command: str) -> Iterator[None]:
    """A program on the node, ended afterwards."""
    with log.open("wb") as file:
        process = subprocess.Popen([programs.KIT / "node.sh", "exec", node.name, *command], stdout=file, stderr=file)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def _settings(api: ClusterApi, place: Path) -> None:
    """The settings of the gateway: `openssl ca`, whose dates are exact; a test wants exactly the life that the pod asks for."""
    ca = Signer.make("pods of the tests", begin=datetime.now(UTC) - timedelta(days=1))
    made = pods.with_openssl(pods.place(api, place), ca)
    made.user = "kubernetes-super-admin"
    made.gateway |= {"lease": False, "kubeconfig": str(api.kubeconfig("kubernetes-super-admin", "system:masters"))}
    made.policy = POLICY
    made.write()


def _sign(place: Path, signer: str) -> int:
    """In the place of Kubernetes' signer: a gateway with a policy for this name, until it is ended."""
    own = place / signer.replace("/", ".")
    own.mkdir()
    gateways.written(own / "policy.toml", POLICY.replace("SIGNER", signer))
    text = (place / "gateway/config.toml").read_text().replace(f"{place}/gateway/policy.toml", f"{own}/policy.toml")
    gateways.written(own / "config.toml", text.replace(f"{place}/gateway/state", f"{own}/state"))
    program = Path(sys.executable).with_name("ca-bridge")
    os.execv(program, [str(program), "gateway", "--config", str(own / "config.toml")])  # noqa: S606 (no shell is needed)


def _run(node: Node, place: Path, focus: str) -> None:
    signer = place / "signer"
    gateways.written(signer, f'#!/bin/sh\nexec {sys.executable} -m {__spec__.name} --sign {place} "$1"\n', 0o755)
    kubeconfig = node.kubeconfig_dir / "admin.conf"
    path = f"{programs.directory()}:{os.environ['PATH']}"
    command: list[str | Path] = [
        programs.require("pod-e2e.test"), f"--kubeconfig={kubeconfig}", "--provider=skeleton", f"--ginkgo.focus={focus}",
        f"--ginkgo.skip={SKIP}", f"--ginkgo.json-report={place}/report.json", "--ginkgo.no-color",
    ]  # fmt: skip
    more = {"PATH": path, "POD_SIGNER": str(signer), "PYTHONPATH": str(Path(__file__).parents[2])}
    with (place / "e2e.log").open("wb") as log:
        subprocess.run(command, stdout=log, stderr=log, check=False, cwd=place, env={**os.environ, **more})


# --- what they say ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of one test."""

    name: str
    state: str  #: `passed`, `failed`, `timedout` …
    failure: str  #: Its message.

    @property
    def reason(self) -> str:
        """Why it can't pass; empty: it should."""
        return next((text for part, text in CANNOT_PASS.items() if part in self.name), "")


def outcomes(report: Path) -> list[Outcome]:
    """By ginkgo's report."""
    return [
        Outcome(
            name=re.sub(r"\[(sig|FeatureGate|MinimumKubeletVersion|Privileged)[^]]*\] ?", "", " ".join(texts)).strip(),
            state=one["State"],
            failure=str((one.get("Failure") or {}).get("Message", ""))[:1000],
        )
        for suite in json.loads(report.read_text())
        for one in suite["SpecReports"]
        for texts in [[*one["ContainerHierarchyTexts"], one["LeafNodeText"]]]
        if one["LeafNodeType"] == "It" and one["State"] != "skipped"
    ]


def page(found: Sequence[Outcome]) -> str:
    """A row for each, those of certificates first."""
    order = sorted(found, key=lambda one: ("PodCertificate" not in one.name, one.name))
    rows = "".join(
        f"| {one.name.replace('|', '/')} | {one.state}{f': {one.reason}' if one.reason else ''} |\n" for one in order
    )
    passed = sum(one.state == "passed" for one in found)
    return f"""\
# Kubernetes' own tests of pods' certificates

Written by `python -m tests.measure.pod_conformance --docs` on {datetime.now(UTC):%Y-%m-%d}.

These are Kubernetes 1.37.2's own tests of PodCertificateRequests and ClusterTrustBundles (`test/e2e/auth`), unchanged, on a kubeadm node with a pod network.
All of them ran except those "{SKIP}", whose feature gate is off in 1.37.
Their image, agnhost, is imported on the node, not pulled.
`ca-bridge gateway` takes the place of their signer, with `openssl ca` as the CA: two tests want exactly the lifetime that the pod requests, which a CA that backdates certificates by itself does not give.
The tests of ClusterTrustBundles create their own bundles: they test the cluster, not the gateway.

{passed} of {len(found)} pass.

| test | outcome |
| --- | --- |
{rows}"""


if __name__ == "__main__":
    sys.exit(main())
