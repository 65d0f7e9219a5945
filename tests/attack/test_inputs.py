"""Files from outside that no sane program wrote: no traceback, bounded time, and the file is named."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bridge.specs import AUTHORITIES
from tests.counts import Tried
from tests.kit import opensslca
from tests.kit.cas import Bridge
from tests.kit.measured import MOST_MEGABYTES, run_measured
from tests.kit.pki import handmade_pki

LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))

#: Name of the certificate, its file below `/etc/kubernetes`, and what is put there.
HOSTILE: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "random bytes": ("pki/apiserver.crt", lambda _: os.urandom(5000)),
    "truncated PEM": ("pki/apiserver.crt", lambda data: data[: len(data) // 2]),
    "10 MB": ("pki/apiserver.crt", lambda _: b"x" * 10_000_000),
    "10 MB after a certificate": ("pki/etcd/peer.crt", lambda data: data + b"-----BEGIN CERTIFICATE-----\n" * 400_000),
    "a kubeconfig of random bytes": ("admin.conf", lambda _: os.urandom(5000)),
    "billion laughs": ("admin.conf", lambda data: LAUGHS.encode() + data.replace(b"users:", b"users: *a11\nothers:")),
    "a kubeconfig of 10 MB": ("admin.conf", lambda _: b"x: y\n" * 2_000_000),
    "deep nesting": ("admin.conf", lambda _: b"[" * 100_000),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_named(case: str, tmp_path: Path, tried: Tried) -> None:
    """`check-expiration` and `renew` end soon, with an error about this file."""
    pki = handmade_pki(tmp_path / "node", not_after=datetime.now(UTC) + timedelta(days=20))
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    for authority in AUTHORITIES:
        directory = opensslca.make_ca_directory(tmp_path / "cas" / authority, *pki.ca_pem(authority))
        bridge.add(f"backend.{authority}-desk", {"type": "openssl", "dir": str(directory)})
        bridge.add(f"authority.{authority}", {"backend": f"{authority}-desk"})
    file, spoil = HOSTILE[case]
    path = pki.kubeconfig_dir / file
    hostile = spoil(path.read_bytes())
    path.write_bytes(hostile)
    name = "etcd-peer" if path.parent.name == "etcd" else path.name.removesuffix(".crt")
    for command in (("check-expiration",), ("renew", "scheduler.conf", name)):
        code, said, seconds, megabytes = run_measured(bridge, *command)
        assert "Traceback" not in said
        assert code != 0
        assert str(path) in said
        assert len(said) < 20_000
        assert seconds < 300
        assert megabytes < MOST_MEGABYTES
    assert path.read_bytes() == hostile
    tried("hostile files through the program", 1)
