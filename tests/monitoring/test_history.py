"""How the last runs ended: what counts as a failure, and what a damaged file means."""

from __future__ import annotations

import json
import math
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bridge import monitoring
from bridge.errors import Exit
from bridge.monitoring import History, after, history_file
from bridge.settings.load import parse
from bridge.state import Store, install
from bridge.system.state_file import sealed
from tests.kit.pki import handmade_pki

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
DAY = timedelta(days=1)


def nights(*codes: int) -> History:
    """One run a night."""
    history = None
    for number, code in enumerate(codes):
        history = after(history, code, NOW + number * DAY, 1.5)
    assert history is not None
    return history


@pytest.mark.parametrize(
    ("codes", "failures", "succeeded"),
    [
        ([0], 0, 0),
        ([0, 1, 5, 6], 3, 0),
        ([1, 0, 7], 1, 1),
        ([0, 143, 130], 2, 0),
        ([5, 4, 9, 4], 1, None),
        ([4], 0, None),
        ([0, 1, 9, 0], 0, 3),
        ([2, 8], 2, None),
    ],
)
def test_what_counts(codes: list[int], failures: int, succeeded: int | None) -> None:
    """Waiting, and finding another run at work, are neither success nor failure; an interruption is a failure."""
    history = nights(*codes)
    assert history.failures == failures
    assert history.succeeded == (None if succeeded is None else NOW + succeeded * DAY)
    assert (history.exit_code, history.ended) == (codes[-1], NOW + (len(codes) - 1) * DAY)


def test_every_exit_code_counts_as_something() -> None:
    """None of the codes of the README's table is forgotten: of a night's failure and then this, one is left, or two, or none."""
    left = {code: nights(Exit.FAILED, code).failures for code in (*Exit.PRECEDENCE, Exit.LOCKED, 130, 143)}
    assert left == {8: 2, 7: 2, 1: 2, 2: 2, 5: 2, 6: 2, 4: 1, 0: 0, 9: 1, 130: 2, 143: 2}


def test_it_outlives_a_run(tmp_path: Path) -> None:
    """The next run reads what one has written."""
    file = history_file(Store(tmp_path))
    assert file.read() is None
    file.put(nights(0, 1))
    assert file.read() == nights(0, 1)


def test_no_run_takes_away_a_history_that_another_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends writes it while the next one begins, and looks for what was killed; a killed one's is removed, too."""
    pki, store = handmade_pki(tmp_path / "node"), Store(tmp_path / "state")
    node = (
        f'[node]\npki_dir = "{pki.pki_dir}"\nkubeconfig_dir = "{pki.kubeconfig_dir}"\nstate_dir = "{store.directory}"\n'
    )
    store.prepare()
    left, sync = store.directory / ".history.json.abcdefgh", os.fsync
    left.touch()

    def meanwhile(descriptor: int) -> None:
        install.recover(store)
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", meanwhile)
        monitoring.write(parse(node), tmp_path / "x.prom", lambda _: nights(0), NOW)
    assert history_file(store).read() == nights(0)
    assert not left.exists()


GOOD = {
    "ended": "2026-11-25T00:00:00+00:00", "exitCode": 0, "seconds": 1, "succeeded": None, "rehearsed": None,
    "rehearsalExitCode": 0, "failures": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        json.dumps(GOOD).encode(),
        sealed({}),
        sealed(GOOD | {"ended": "2026-11-25"}),
        sealed(GOOD | {"seconds": math.nan}),
        sealed(GOOD | {"failures": -1}),
    ],
)
def test_a_damaged_one_counts_as_none(tmp_path: Path, content: bytes) -> None:
    """The next run begins to count anew, and says so."""
    store = Store(tmp_path)
    store.history.write_bytes(content)
    assert history_file(store).read() is None
    store.history.write_bytes(sealed(GOOD))
    assert history_file(store).read() is not None
