"""When a CA is asked: as soon as a key is there, or once for all; and when keys are begun."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bridge import entry
from bridge.ca import CA
from bridge.ca.retry import WaitPolicy
from bridge.contract import Backend, Issued, SignRequest
from bridge.errors import BackendError
from bridge.node import inventory
from bridge.renewal import new_keys
from bridge.renewal.issuance import issue_all
from bridge.renewal.prepare import Prepared, prepare
from bridge.renewal.verify_and_install import expectations
from bridge.settings.load import overridden, parse
from bridge.state import Outcome, Store, audit
from bridge.state.open_requests import OpenRequests
from bridge.state.session import Run
from tests.kit.pki import Pki, handmade_pki
from tests.kit.renewing import Quiet, settings_for

SECONDS = 60  # in which a test that waits for nothing has long ended


@dataclass
class OneByOne(Backend):
    """A CA that signs whatever it is given, and says in which order it was asked."""

    key_of_the_next: dict[str, tuple[Future[Prepared | Outcome], Prepared]] = field(default_factory=dict)
    lots: list[list[str]] = field(default_factory=list)

    def sign(self, request: SignRequest) -> Issued:
        """The answer is the old certificate; and only now the next key is there."""
        self.lots.append([request.spec.name])
        if request.spec.name in self.key_of_the_next:
            future, prepared = self.key_of_the_next[request.spec.name]
            future.set_result(prepared)
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
    """Have certificates signed whose keys exist only when the one before was signed; return the answered ones."""
    found = run.read_node()
    items = [item for item in found.items if item.spec.name in names]
    prepared = [one for one in prepare(items, run.settings) if isinstance(one, Prepared)]
    making: list[Future[Prepared | Outcome]] = [Future() for _ in prepared]
    for before, future, one in zip(prepared, making[1:], prepared[1:], strict=False):
        ca.key_of_the_next[before.name] = (future, one)
    making[0].set_result(prepared[0])
    if isinstance(ca, AllAtOnce):
        for future, one in zip(making[1:], prepared[1:], strict=True):
            future.set_result(one)
    reached = {"ca": CA(label="ca", backend=ca, retry=WaitPolicy(timedelta()))}
    expected, _ = expectations(found, run.settings, items, run.now())
    answered: list[str] = []
    thread = threading.Thread(
        target=lambda: answered.extend(one.prepared.name for one in issue_all(run, making, reached, expected)[0]),
        daemon=True,
    )
    thread.start()
    thread.join(SECONDS)
    assert not thread.is_alive(), "waits for all keys"
    return answered


NAMES = ["admin.conf", "apiserver", "scheduler.conf"]


def test_a_ca_is_asked_while_other_keys_are_still_made(run: Run) -> None:
    """Each key here is only there when the certificate before it was signed; the order stays."""
    ca = OneByOne()
    assert issued(run, ca, NAMES) == NAMES
    assert ca.lots == [[name] for name in NAMES]


def test_a_ca_that_takes_many_gets_all_at_once(run: Run) -> None:
    """One process for `openssl ca`, one bundle for a person."""
    ca = AllAtOnce()
    assert issued(run, ca, NAMES) == NAMES
    assert ca.lots == [NAMES]


# --- keys that are begun early ---------------------------------------------------------------------------------------


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The algorithms of keys that were begun."""
    begun: list[str] = []
    monkeypatch.setattr(new_keys, "begin", begun.extend)
    return begun


def config(node: Pki, tmp_path: Path, more: str = "") -> Path:
    """A settings file for that node."""
    settings_for(node, tmp_path)
    places = [
        f'pki_dir = "{node.pki_dir}"',
        f'kubeconfig_dir = "{node.kubeconfig_dir}"',
        f'state_dir = "{tmp_path}/state"',
    ]
    path = tmp_path / "config.toml"
    path.write_text("\n".join(["[node]", *places, more]))
    return path


@pytest.mark.parametrize(
    ("names", "more", "count"),
    [
        pytest.param([], "", 12, id="what is due"),
        pytest.param(["all"], "", 12, id="all"),
        pytest.param(["apiserver", "admin.conf"], "", 2, id="names"),
        pytest.param([], '[renewal]\nbefore = "10d"', 0, id="nothing is due"),
        pytest.param([], '[renewal]\njitter = "1h"', 0, id="it waits first"),
        pytest.param(["no-such"], "", 0, id="a name that is none"),
    ],
)
def test_keys_are_begun_where_something_will_be_renewed(
    node: Pki, tmp_path: Path, begun: list[str], names: list[str], more: str, count: int
) -> None:
    """Before anything is loaded that asks a CA; for a run that will not ask there are none."""
    entry.nothing_to_do(["renew", *names, "--config", str(config(node, tmp_path, more))])
    assert len(begun) == count


def test_no_keys_are_begun_beside_open_requests(node: Pki, tmp_path: Path, begun: list[str]) -> None:
    """The keys of open requests are used again."""
    path = config(node, tmp_path)
    Store(tmp_path / "state").prepare()
    Store(tmp_path / "state").requests.write_text("{}")
    entry.nothing_to_do(["renew", "all", "--config", str(path)])
    assert begun == []


def test_a_key_that_was_begun_is_given_once(node: Pki) -> None:
    """Every certificate has its own, begun or not."""
    new_keys.begin(["ecdsa-p256", "ecdsa-p256"])
    keys = {new_keys.take("ecdsa-p256").public_key().public_numbers() for _ in range(4)}
    assert len(keys) == 4
    items = inventory.read(node.pki_dir, node.kubeconfig_dir).items
    new_keys.begin(["ecdsa-p384"])
    made = prepare(items, parse('[renewal]\nkey = "ecdsa-p384"'))
    assert len({one.key_pem for one in made if isinstance(one, Prepared)}) == 12
