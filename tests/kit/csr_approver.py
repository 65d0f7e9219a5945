"""
The rules of kubelet-csr-approver 1.2 (postfinance), in Python: its Go module is not on the module proxy.

As its README and its source (internal/controller) have them, in their order, with its defaults but one: names are looked up in a table instead of the DNS.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from cryptography import x509
from cryptography.x509.oid import NameOID

from bridge.pki.certificates import san_entries

SIGNER = "kubernetes.io/kubelet-serving"
_NODE = "system:node:"
_MOST_SECONDS = 367 * 86400


def verdict(spec: Mapping[str, Any], pem: bytes, resolved: Mapping[str, Collection[str]]) -> str | None:
    """
    Why a request is denied; None: it is approved.

    Args:
        spec: Of the object.
        pem: Its request.
        resolved: Addresses by name, as a resolver would tell them.

    Raises:
        ValueError: It can't be read, and would be left alone.
    """
    csr = x509.load_pem_x509_csr(pem)
    sans = san_entries(csr)
    names, addresses = ([value for kind, value in sans if kind == wanted] for wanted in ("DNS", "IP"))
    common = csr.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    node = spec["username"].removeprefix(_NODE)
    reasons = {
        "no SAN": not names and not addresses,
        "no node asks": node == spec["username"],
        "the CN is not the username": not common or common[-1].value != spec["username"],  # Go takes the last
        "more than one DNS name": len(names) > 1,
        "the name does not begin with the node's": not all(name.startswith(node) for name in names),
        "the name can't be looked up": not all(name in resolved for name in names),
        "an address is not the name's": not all(set(addresses) <= set(resolved.get(name, ())) for name in names),
        "for too long": spec.get("expirationSeconds", 0) > _MOST_SECONDS,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)
