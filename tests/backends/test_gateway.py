"""The backend `gateway`: the conformance suite, by a real door with a real CA behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from backends.gateway import GatewayBackend, GatewaySettings
from bridge.specs import AUTHORITIES
from bridge.testing import BackendConformance, TestCA
from tests.kit.policies import ALL_NAMES
from tests.kit.serving import ServeProgram, make_door, running


@pytest.mark.slow
class TestConformance(BackendConformance):
    """The suite that every backend passes."""

    unsupported = frozenset({"issuers"})
    patience = timedelta(minutes=2)

    @pytest.fixture(scope="class")
    @classmethod
    def door(cls, ca: TestCA, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProgram]:
        """A door at work."""
        place = tmp_path_factory.mktemp("door")
        with running(make_door(place, ca.certificate_pem, ca.key_pem, ALL_NAMES, tuple(AUTHORITIES))) as program:
            yield program

    @pytest.fixture
    def backend(self, door: ServeProgram) -> Iterator[GatewayBackend]:
        """A node's end."""
        settings = GatewaySettings(url=door.url, ca_file=door.ca, node="cp-1", wait=timedelta())
        with closing(GatewayBackend.from_settings(settings)) as backend:
            yield backend

    @pytest.fixture
    def dead_backend(self, tmp_path: Path, door: ServeProgram) -> GatewayBackend:
        """A door that is no more."""
        del tmp_path
        settings = GatewaySettings(url="https://127.0.0.1:9", ca_file=door.ca, timeout=timedelta(seconds=3))
        return GatewayBackend.from_settings(settings)
