"""How a CA is asked: once for each certificate, or once for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bridge.ca import CA
from bridge.ca.retry import WaitPolicy
from bridge.contract import Backend, Issued, SignRequest
from bridge.errors import BackendError
from bridge.node import inventory
from bridge.renewal.issuance import issue_all
from bridge.renewal.prepare import prepare
from bridge.renewal.verify_and_install import expectations
from bridge.settings.load import overridden, parse
from bridge.state import Store, audit
from bridge.state.open_requests import OpenRequests
from bridge.state.session import Run
from tests.kit.pki import Pki, handmade_pki
from tests.kit.renewing import Quiet


@dataclass
class OneByOne(Backend):
    """A CA that signs whatever it is given, and says in which order it was asked."""

    lots: list[list[str]] = field(default_factory=list)

    def sign(self, request: SignRequest) -> Issued:
        """The answer is the old certificate."""
        self.lots.append([request.spec.name])
        assert request.replaces is not None
        return Issued(leaf=request.replaces)


class AllAtOnce(OneByOne):
    """The same in one round trip."""

    def sign_many(self, requests: Sequence[SignRequest]) -> Sequence[Issued | BackendError]:
        """One answer each."""
        self.lots.append([request.spec.name for request in requests])
        return [Issued(leaf=request.replaces) for request in requests if request.replaces is not None]


@pytest.fixture
def node(tmp_path: Path) -> Pki:
    """All its certificates are due."""
    return handmade_pki(tmp_path / "node", not_after=datetime.now(UTC) + timedelta(days=20))


@pytest.fixture
def run(node: Pki, tmp_path: Path) -> Run:
    """One run, on its own."""
    store = Store(tmp_path / "state")
    store.prepare()
    settings = overridden(parse(""), node.pki_dir, node.kubeconfig_dir, store.directory)
    return Run(
        settings=settings,
        store=store,
        requests=OpenRequests(store),
        record=audit.Record(store, settings.audit),
        progress=Quiet(),
        now=lambda: datetime.now(UTC),
    )


def issued(run: Run, ca: OneByOne, names: Sequence[str]) -> list[str]:
    """Have certificates signed; return the answered ones."""
    found = run.read_node()
    items = [item for item in found.items if item.spec.name in names]
    prepared, _ = prepare(items, run.settings)
    reached = {"ca": CA(label="ca", backend=ca, retry=WaitPolicy(timedelta()))}
    expected, _ = expectations(found, run.settings, items, run.now())
    return [one.prepared.name for one in issue_all(run, prepared, reached, expected)]


NAMES = ["admin.conf", "apiserver", "scheduler.conf"]


def test_a_ca_gets_each_request_and_the_order_stays(run: Run) -> None:
    """One request for each certificate; the answers come in the order of the items."""
    ca = OneByOne()
    assert issued(run, ca, NAMES) == NAMES
    assert sorted(ca.lots) == [[name] for name in NAMES]


def test_a_ca_that_takes_many_gets_all_at_once(run: Run) -> None:
    """One process for `openssl ca`, one bundle for a person."""
    ca = AllAtOnce()
    assert issued(run, ca, NAMES) == NAMES
    assert ca.lots == [NAMES]


def test_every_certificate_has_its_own_key(node: Pki) -> None:
    """Twelve certificates, twelve keys."""
    items = inventory.read(node.pki_dir, node.kubeconfig_dir).items
    prepared, _ = prepare(items, parse('[renewal]\nkey = "ecdsa-p384"'))
    assert len({one.key_pem for one in prepared}) == 12
