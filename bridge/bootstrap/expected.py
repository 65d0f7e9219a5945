"""
The certificates that a new node will ask for, before any exists: for reading, so that a CA's administrator can prepare.

Names are kubeadm's by version (`bridge.pki.kubeadm_names`); the keys and the signatures are worth nothing.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from bridge.bootstrap.configuration import naming_facts
from bridge.bootstrap.orders import Order, OrderError
from bridge.bootstrap.places import specs_of
from bridge.node.kubeadm_config import KubeadmConfigError
from bridge.pki.csr import Naming, general_name, generate_key, subject_of
from bridge.pki.kubeadm_names import NoFactError, naming
from bridge.specs import KUBELET_CONF, KUBELET_SERVER, CertificateSpec

_LIFETIME = timedelta(days=1)


def certificates(order: Order, now: datetime) -> dict[str, dict[str, x509.Certificate]]:
    """
    The certificates that a new node will have, by authority and name, for their names and usages; no CA has signed them.

    Args:
        order: With a node.
        now: Aware, UTC.

    Raises:
        OrderError: It has no node, or not what the names are made of.
    """
    node = order.node
    if node is None:
        raise OrderError("wanted an order for a node, found one without")
    found: dict[str, dict[str, x509.Certificate]] = {}
    for spec in specs_of(node.role):
        try:
            ours = _naming(spec, order)
        except (NoFactError, KubeadmConfigError) as e:
            raise OrderError(f"{node.name}: {e}", hint=e.hint) from None
        found.setdefault(spec.authority.name, {})[spec.name] = _certificate(ours, now)
    return found


def _naming(spec: CertificateSpec, order: Order) -> Naming:
    node = order.node
    if node is None:
        raise AssertionError("looked at before")
    subject = subject_of(f"system:node:{node.name}", ("system:nodes",))
    if spec.name == KUBELET_CONF:
        return Naming(subject=subject)
    if spec.name == KUBELET_SERVER:
        return Naming(subject=subject, sans=tuple(map(general_name, (node.name, *node.addresses))))
    return naming(spec, naming_facts(order.cluster, node.name, node.addresses[0]))


def _certificate(ours: Naming, now: datetime) -> x509.Certificate:
    key = generate_key("ecdsa-p256")
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "nobody")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(ours.subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + _LIFETIME)
    )
    if ours.sans:
        builder = builder.add_extension(x509.SubjectAlternativeName(ours.sans), critical=False)
    return builder.sign(key, hashes.SHA256())
