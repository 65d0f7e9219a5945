"""One OpenBao for all end-to-end tests of a process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kit import openbao


@pytest.fixture(scope="session")
def bao() -> Iterator[openbao.OpenBao]:
    """A real server in memory."""
    with openbao.dev_server() as server:
        yield server
