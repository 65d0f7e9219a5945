"""Three control-plane nodes with three etcd members, up while the tests of this directory run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.node import AT_ONCE, Node
from tests.kit.nodes import make_ready

IPS = ("198.18.77.120", "198.18.77.121", "198.18.77.122")


@pytest.fixture(scope="package")
def ca_keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the keys of the nodes' CAs are, which no node has."""
    return tmp_path_factory.mktemp("three") / "ca-keys"


@pytest.fixture(scope="package")
def nodes(ca_keys: Path) -> Iterator[list[Node]]:
    """In external-CA mode; their certificates live for a day."""
    names = [f"three-{os.getpid() % 10_000}-{number}" for number in (1, 2, 3)]
    short = "certificateValidityPeriod: 24h"
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(Node.up(names[0], IPS[0], ca_dir=ca_keys, cluster=short, kubelet=AT_ONCE))
        made = [first]
        for name, ip in zip(names[1:], IPS[1:], strict=True):
            made.append(stack.enter_context(Node.join(name, ip, first, cluster=short, kubelet=AT_ONCE)))
        for node in made:
            make_ready(node)
        yield made
