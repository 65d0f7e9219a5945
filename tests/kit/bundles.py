"""Request bundles as a node makes them, without its renewal around them."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from bridge.node import inventory, kubeconfig
from bridge.pki import csr
from bridge.pki.bundle import BundledRequest, RequestBundle
from bridge.pki.csr import PrivateKey
from bridge.pki.signatures import sign_proof
from bridge.specs import SPECS
from tests.kit.pki import NODE, Pki

VALIDITY = timedelta(days=365)


def old_pairs(pki: Pki, names: Sequence[str] | None = None) -> dict[str, tuple[x509.Certificate, PrivateKey]]:
    """The live certificates and their keys by kubeadm's name."""
    items = inventory.read(pki.pki_dir, pki.kubeconfig_dir).items
    return {
        item.spec.name: (item.certificates[0], _key(item.key_path, item.certificate_path))
        for item in items
        if item.state == "present" and (names is None or item.spec.name in names)
    }


def _key(key_path: Path | None, kubeconfig_path: Path) -> PrivateKey:
    data = kubeconfig.key_data(kubeconfig_path.read_bytes()) if key_path is None else key_path.read_bytes()
    key = load_pem_private_key(data or b"", None)
    assert isinstance(key, PrivateKey)
    return key


def new_csr(old: x509.Certificate) -> x509.CertificateSigningRequest:
    """For a new P-256 key."""
    return x509.load_pem_x509_csr(csr.build(old, csr.generate_key("ecdsa-p256")))


def make_bundle(
    pairs: dict[str, tuple[x509.Certificate, PrivateKey]],
    *,
    node: str = NODE,
    cluster: str = "kubernetes",
    build: Callable[[x509.Certificate], x509.CertificateSigningRequest] = new_csr,
    validity: timedelta = VALIDITY,
    created: datetime | None = None,
) -> RequestBundle:
    """The renewal of these certificates, each with its proof."""
    batch, created = secrets.token_hex(16), created or datetime.now(UTC).replace(microsecond=0)
    requests = []
    for name, (old, key) in pairs.items():
        made = build(old)
        spec = SPECS[name]
        request = BundledRequest(
            name=name,
            authority=spec.authority.name,
            ekus=spec.ekus,
            validity=validity,
            csr=made,
            replaces=old,
            proof=sign_proof(
                key,
                made,
                name=name,
                batch=batch,
                node=node,
                cluster=cluster,
                validity=validity,
                created=created,
            ),
        )
        requests.append(request)
    return RequestBundle(batch=batch, node=node, cluster=cluster, created=created, requests=tuple(requests))


def proven(bundle: RequestBundle, which: str, key: PrivateKey, csr: x509.CertificateSigningRequest) -> RequestBundle:
    """The bundle with another CSR in one of its requests, and a proof for it."""
    [request] = [one for one in bundle.requests if one.name == which]
    who = {"name": which, "batch": bundle.batch, "node": bundle.node, "cluster": bundle.cluster}
    proof = sign_proof(key, csr, validity=request.validity, created=bundle.created, **who)
    return changed(bundle, which, csr=csr, proof=proof)


def changed(bundle: RequestBundle, which: str, /, **values: object) -> RequestBundle:
    """The bundle with other values in one of its requests; the digest follows, the proof does not."""
    requests = [replace(one, **values) if one.name == which else one for one in bundle.requests]  # type: ignore[arg-type]
    return replace(bundle, requests=tuple(requests))
