"""A control-plane node, up while the tests of this directory run: those of `prove` first, who find it as it was made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.looking import Audit
from tests.kit.node import AT_ONCE, Node
from tests.kit.nodes import make_ready

NAME, IP = f"one-{os.getpid() % 100_000:05}", "198.18.77.60"


@pytest.fixture(scope="package")
def ca_keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the keys of the node's CAs are."""
    return tmp_path_factory.mktemp("one") / "ca-keys"


@pytest.fixture(scope="package")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    """What the API server writes about its clients."""
    return Audit(directory=tmp_path_factory.mktemp("one") / "audit")


@pytest.fixture(scope="package")
def node(ca_keys: Path, audit: Audit) -> Iterator[Node]:
    """In external-CA mode, whose kubelet starts containers at once."""
    with Node.up(NAME, IP, ca_dir=ca_keys, cluster=audit.cluster(), kubelet=AT_ONCE) as up:
        make_ready(up)
        yield up
