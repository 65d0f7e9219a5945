"""Runs that fail again and again: counted by CA, further and further apart, and never past a certificate's end."""

from __future__ import annotations

import math
import stat
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.errors import BackendRefusedError, BackendUnavailableError, BridgeError, Exit
from bridge.node.inventory import Item
from bridge.renewal import Selection
from bridge.renewal.gate import LONGEST_PAUSE, MANY, Attempts, Failures, HeldOffError, next_try
from bridge.specs import SPECS
from bridge.state import Store
from bridge.system.console import LogFormat, set_up
from tests.kit.issuing import NOW, Signer

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
DEAD = BackendUnavailableError("corp: wanted an answer, found none")
REFUSED = BackendRefusedError("corp: no such role")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty state directory."""
    store = Store(tmp_path / "state")
    store.prepare()
    return store


def failures(count: int, last: datetime = NOW) -> Failures:
    return Failures(count=count, since=last - DAY, last=last, exit_code=Exit.UNAVAILABLE, reason="dead")


def item(name: str, end: datetime) -> Item:
    return Item(
        spec=SPECS[name],
        authority_external=True,
        certificate_path=Path(f"/etc/kubernetes/pki/{name}.crt"),
        key_path=None,
        embedded=False,
        anchor_path=Path("/etc/kubernetes/pki/ca.crt"),
        certificates=(Signer.make(end=end).certificate,),
        state="present",
        trouble=None,
        managed=True,
        listed=True,
    )


def selection(**ends: datetime) -> Selection:
    items = tuple(item(name.replace("_", "-"), end) for name, end in ends.items())
    return Selection(items=items, failed=(), skipped=())


def fail(store: Store, times: int, *, authority: str = "ca", error: BridgeError = DEAD, last: datetime = NOW) -> None:
    """As so many runs, an hour apart, each in a process of its own."""
    for run in reversed(range(times)):
        Attempts(store).note([authority], {authority: error}, last - run * HOUR)


@pytest.mark.parametrize(
    ("count", "pause"), [(1, 0), (2, 0), (3, 1), (4, 2), (5, 4), (6, 8), (7, 16), (8, 24), (9, 24), (10**6, 24)]
)
def test_pauses_begin_with_the_third_failure_and_double_up_to_a_day(count: int, pause: int) -> None:
    """The pauses, in hours, begin with the third failure and double up to a day."""
    assert next_try(failures(count), NOW + 365 * DAY) == NOW + pause * HOUR


@given(st.integers(1, 40), st.timedeltas(timedelta(seconds=1), 400 * DAY))
def test_a_try_is_left_before_the_certificate_expires(count: int, left: timedelta) -> None:
    """The next try comes at half of the time left at the latest."""
    assert next_try(failures(count), NOW + left) <= NOW + left / 2


@given(st.timedeltas(MINUTE, 60 * DAY), st.timedeltas(timedelta(seconds=5), 3 * HOUR))
def test_a_dead_ca_is_asked_seldom_and_to_the_end(left: timedelta, period: timedelta) -> None:
    """However often the timer fires, the CA is asked about once a day, and more often as the end comes near."""
    expires, now, tries, step = NOW + left, NOW, 0, max(period, left / 500)
    one: Failures | None = None
    while now < expires:
        if one is None or now >= next_try(one, expires):
            tries += 1
            one = Failures(count=tries, since=NOW, last=now, exit_code=Exit.UNAVAILABLE, reason="dead")
        now += step
    # each of the last ones comes after half of what was left, down to the timer's step
    assert tries <= MANY + 5 + left / LONGEST_PAUSE + math.log2(left / step) + 2
    assert one is not None
    assert next_try(one, expires) + step >= expires


def test_an_expired_certificate_is_tried_again_soon() -> None:
    """The cluster is down until the CA is back."""
    assert next_try(failures(9), NOW - DAY) == NOW + 5 * MINUTE


def test_two_failures_change_nothing(store: Store) -> None:
    """An outage of a night is no state of emergency."""
    fail(store, 2)
    due = selection(apiserver=NOW + 20 * DAY)
    assert Attempts(store).held(due, NOW + MINUTE) == due


@pytest.mark.parametrize(("error", "code"), [(DEAD, Exit.UNAVAILABLE), (REFUSED, Exit.REFUSED), (BridgeError("x"), 1)])
def test_after_three_failures_the_ca_is_left_alone_for_an_hour(store: Store, error: BridgeError, code: int) -> None:
    """The exit code is still that of the failure, and the message tells since when, why, and when next."""
    fail(store, 3, error=error)
    due = selection(apiserver=NOW + 20 * DAY)
    held = Attempts(store).held(due, NOW + 59 * MINUTE)
    assert held.items == ()
    [outcome] = held.failed
    assert outcome.exit_code == code
    assert isinstance(outcome.error, HeldOffError)
    text = str(outcome.error)
    assert error.reason in text
    assert f"{NOW:%Y-%m-%d} 10:00 UTC" in text
    assert f"{NOW:%Y-%m-%d} 13:00 UTC" in text
    assert Attempts(store).held(due, NOW + 60 * MINUTE) == due


def test_one_dead_ca_does_not_stop_the_others(store: Store) -> None:
    """Each is counted by itself."""
    fail(store, 3, authority="etcd-ca")
    both = selection(apiserver=NOW + 20 * DAY, etcd_server=NOW + 20 * DAY)
    held = Attempts(store).held(both, NOW + MINUTE)
    assert [i.spec.name for i in held.items] == ["apiserver"]
    assert [o.name for o in held.failed] == ["etcd-server"]


def test_the_certificate_that_expires_first_sets_the_pace(store: Store) -> None:
    """The first certificate to expire sets the pace, though another one of the same CA has time."""
    fail(store, 8)
    both = selection(apiserver=NOW + 20 * DAY, apiserver_kubelet_client=NOW + 2 * HOUR)
    assert not Attempts(store).held(both, NOW + 59 * MINUTE).items
    assert Attempts(store).held(both, NOW + 60 * MINUTE) == both


def test_success_ends_it(store: Store) -> None:
    """A success removes the file of failed attempts."""
    fail(store, 5)
    assert store.attempts.exists()
    assert Attempts(store).note(["ca"], {}, NOW) == []
    assert not store.attempts.exists()


def test_a_run_that_did_not_ask_a_ca_says_nothing_about_it(store: Store) -> None:
    """The count of its failures stays the same."""
    fail(store, 3)
    before = Attempts(store).authorities
    Attempts(store).note(["etcd-ca"], {}, NOW + HOUR)
    assert Attempts(store).authorities == before


def test_from_the_third_failure_on_a_person_is_called(store: Store) -> None:
    """Each run that failed says so, and those that waited do not."""
    assert Attempts(store).note(["ca"], {"ca": DEAD}, NOW) == []
    assert Attempts(store).note(["ca"], {"ca": DEAD}, NOW) == []
    [error] = Attempts(store).note(["ca"], {"ca": DEAD}, NOW)
    assert str(error).startswith("ca: 3 runs in a row have failed since")
    assert (error.authority, error.exit_code) == ("ca", Exit.UNAVAILABLE)
    assert Attempts(store).note(["etcd-ca"], {}, NOW) == []


def test_a_clock_that_was_put_back_does_not_keep_a_ca_waiting(store: Store) -> None:
    """The last failure lies in the future then."""
    fail(store, 9, last=NOW + 300 * DAY)
    due = selection(apiserver=NOW + 20 * DAY)
    assert Attempts(store).held(due, NOW) == due


def test_the_file_is_ours_alone(store: Store) -> None:
    """A CA's words are in it."""
    fail(store, 1)
    assert stat.S_IMODE(store.attempts.stat().st_mode) == 0o600
    assert Attempts(store).authorities == {
        "ca": Failures(count=1, since=NOW, last=NOW, exit_code=Exit.UNAVAILABLE, reason=DEAD.reason)
    }


def test_long_reasons_are_cut(store: Store) -> None:
    """A CA may say a lot."""
    fail(store, 3, error=BackendRefusedError("x" * 100_000))
    assert store.attempts.stat().st_size < 2000


BROKEN = [
    "",
    "[]",
    "{",
    '{"authorities": []}',
    '{"authorities": {"ca": {"count": 3}}}',
    '{"authorities": {"ca": {"count": 3, "since": "x", "last": "x", "exitCode": 6, "reason": ""}}}',
    '{"authorities": {"ca": {"count": 3, "since": "2026-11-25", "last": "2026-11-25", "exitCode": 6, "reason": ""}}}',
    '{"authorities": {"ca": {"count": 3, "since": "2026-11-25T00Z", "last": "2026-11-25T00Z", "exitCode": 0, "reason": ""}}}',
]


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_file_costs_one_more_try(store: Store, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A message names it, it stops nothing, and no failure ever gets exit code 0 by it."""
    set_up(0, LogFormat.TEXT)
    store.attempts.write_text(text)
    assert Attempts(store).authorities == {}
    assert f"warning: {store.attempts}: " in capsys.readouterr().err
    fail(store, 1)
    assert Attempts(store).authorities["ca"].count == 1


@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_without_a_traceback(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """A disk may do that to it."""
    store = Store(tmp_path_factory.mktemp("state"))
    store.attempts.write_bytes(data)
    assert Attempts(store).authorities == {}
