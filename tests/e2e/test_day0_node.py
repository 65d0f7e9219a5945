"""
Day 0 on real machines: a control plane, a further one and a worker from nothing, with CAs whose keys are in OpenBao.

The full size (three and two) is `python -m tests.measure.day0`; docs/evidence/day-0.md has its figures.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from cryptography import x509

from bridge.node import kubeconfig
from tests.kit.day_zero import Online, walk
from tests.kit.key_watch import KeyWatch
from tests.kit.node import Node
from tests.kit.openbao import OpenBao
from tests.kit.pki import handmade_pki

pytestmark = [pytest.mark.slow]

CONTROL_PLANES = {"d0-cp1": "198.18.77.41", "d0-cp2": "198.18.77.42"}
WORKERS = {"d0-w1": "198.18.77.43"}
NODES = CONTROL_PLANES | WORKERS


@pytest.mark.node
def test_a_cluster_from_nothing(tmp_path: Path, bao: OpenBao) -> None:
    """The documented commands alone make it: no token, no CA key on a node at any moment, no CSR object, all as kubeadm would have it."""
    with ExitStack() as stack:
        done = walk(stack, tmp_path, Online(bao=bao, prefix="d0"), CONTROL_PLANES, WORKERS)
        confs = [(Node(name=name, ip=ip).kubeconfig_dir / "kubelet.conf").read_bytes() for name, ip in NODES.items()]

    assert set(done.nodes) == {*CONTROL_PLANES, *WORKERS}
    assert [name for name, roles in done.nodes.items() if "control-plane" in roles] == list(CONTROL_PLANES)
    assert done.members == len(CONTROL_PLANES)
    assert done.requests == 0
    current = "/var/lib/kubelet/pki/kubelet-client-current.pem"
    assert {(one.certificate_file, one.certificate_data) for one in map(kubeconfig.parse, confs)} == {(current, None)}
    assert done.seen > 100


def test_the_watch_notices_a_ca_key(tmp_path: Path) -> None:
    """A CA key is noticed under any name, in a new directory, and though it is gone at once."""
    pki = handmade_pki(tmp_path / "elsewhere")
    certificate, key = pki.ca_pem("ca")
    leaf = (pki.pki_dir / "apiserver.key").read_bytes()
    place = tmp_path / "node"
    place.mkdir()
    with KeyWatch([place], [x509.load_pem_x509_certificate(certificate)]) as watch:
        (place / "apiserver.key").write_bytes(leaf)
        time.sleep(0.2)
        assert watch.found == []
        (place / "pki").mkdir()
        (place / "pki/notes.txt").write_bytes(key)
        time.sleep(0.2)
        (place / "ca.key").touch()
        (place / "ca.key").unlink()
        time.sleep(0.2)

    assert [text.partition(": ")[2] for text in watch.found][:1] == ["holds a CA's key"]
    assert any("ca.key: named" in text for text in watch.found)
