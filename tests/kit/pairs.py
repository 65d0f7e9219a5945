"""Whether what lies on a node belongs together."""

from __future__ import annotations

import base64
import re

from cryptography.hazmat.primitives.serialization import load_pem_private_key

from bridge.node import inventory
from bridge.pki.certificates import load_pem_certificates
from tests.kit.pki import Pki


def assert_pairs(pki: Pki, count: int = 12) -> None:
    """All certificates of the node are there, and each has its key."""
    items = [item for item in inventory.read(pki.pki_dir, pki.kubeconfig_dir).items if item.certificates]
    assert len(items) == count
    for item in items:
        certificate, key = _pair(item)
        public = load_pem_private_key(key, None).public_key()
        assert public == load_pem_certificates(certificate)[0].public_key(), item.spec.name


def _pair(item: inventory.Item) -> tuple[bytes, bytes]:
    if item.key_path is not None:
        return item.certificate_path.read_bytes(), item.key_path.read_bytes()
    text = item.certificate_path.read_text()
    found = [re.search(rf"client-{kind}-data: (\S+)", text) for kind in ("certificate", "key")]
    certificate, key = (base64.b64decode(match[1]) for match in found if match is not None)
    return certificate, key
