"""cert-manager's signer for CertificateSigningRequest objects (tests/kit/modules/cert-manager) beside a real API server."""

from __future__ import annotations

import base64
import re
import subprocess
from datetime import timedelta
from pathlib import Path

from cryptography import x509

from bridge.pki.certificates import pem
from bridge.pki.csr import PrivateKey, key_pem
from bridge.system.waiting import wait_until
from tests.kit import programs
from tests.kit.kube_api import ApiServer

_MODULE = "github.com/cert-manager/cert-manager"
#: So that names of objects can be the administrator's: where Secrets of ClusterIssuers are.
NAMESPACE = "cert-manager"


def _sources() -> Path:
    """The module's source tree, which has the CRDs."""
    go_mod = (programs.KIT / "modules/cert-manager/go.mod").read_text()
    version = re.search(rf"{_MODULE} (v\S+)", go_mod)
    assert version is not None
    run = subprocess.run(["go", "mod", "download", "-json", f"{_MODULE}@{version[1]}"], capture_output=True, text=True, check=True, cwd=programs.KIT / "modules/cert-manager")  # fmt: skip
    found = re.search(r'"Dir": "(.*)"', run.stdout)
    assert found is not None, run.stdout
    return Path(found[1])


def start(api: ApiServer, issuer: str, certificate: x509.Certificate, key: PrivateKey) -> None:
    """Its CRDs, a ClusterIssuer with this CA, and its controllers; returns when the issuer is ready."""
    crds = _sources() / "deploy/crds"
    for name in ("clusterissuers", "issuers", "certificaterequests", "certificates"):
        api.kubectl("apply", "--server-side", "-f", str(crds / f"cert-manager.io_{name}.yaml"))
    for name in ("challenges", "orders"):
        api.kubectl("apply", "--server-side", "-f", str(crds / f"acme.cert-manager.io_{name}.yaml"))
    api.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=180s")
    crt, secret = (base64.b64encode(data).decode() for data in (pem(certificate), key_pem(key)))
    api.apply(f"""
apiVersion: v1
kind: Namespace
metadata: {{name: {NAMESPACE}}}
---
apiVersion: v1
kind: Secret
metadata: {{name: {issuer}, namespace: {NAMESPACE}}}
type: kubernetes.io/tls
data: {{tls.crt: {crt}, tls.key: {secret}}}
---
apiVersion: cert-manager.io/v1
kind: ClusterIssuer
metadata: {{name: {issuer}}}
spec: {{ca: {{secretName: {issuer}}}}}
""")
    kubeconfig = api.kubeconfig("cert-manager", "system:masters")
    api.start("cert-manager", [programs.require("cert-manager"), f"--kubeconfig={kubeconfig}"])
    path = f"/apis/cert-manager.io/v1/clusterissuers/{issuer}"

    def ready() -> bool:
        assert api.processes["cert-manager"].poll() is None, api.log("cert-manager")
        conditions = api.admin.ask("GET", path).document.get("status", {}).get("conditions", [])
        return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)

    assert wait_until(ready, bool, timedelta(minutes=3), pause_seconds=0.2), api.log("cert-manager")
