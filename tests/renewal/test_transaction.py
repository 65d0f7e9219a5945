"""What surrounds a renewal: is it time, which hooks run, which failures count; and that a run with open hooks is not over at once."""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from bridge.entry import nothing_to_do
from bridge.errors import (
    BackendRefusedError,
    BackendUnavailableError,
    BridgeError,
    Exit,
    SettingsError,
    SettingsProblem,
    WaitingError,
)
from bridge.node import inventory, sample_pki
from bridge.node.inventory import Node
from bridge.renewal import Selection, outcome_of
from bridge.renewal.activate import Activation, RolledBackError
from bridge.renewal.gate import Attempts, HeldOffError, NeedsAPersonError, delay, hold_for_window
from bridge.renewal.hooks import HookError, HookEvent, Hooks, NotNowByHookError
from bridge.renewal.selection import RunOptions, select
from bridge.renewal.transaction import Transaction, by_authority, with_activation
from bridge.renewal.verify_and_install import HeldBackError, Result
from bridge.settings.load import load, overridden, parse
from bridge.settings.tables import AuditSettings, Settings
from bridge.state import Outcome, Store, audit, obligations, remember_checked
from bridge.state.open_requests import OpenRequests
from bridge.state.session import Run
from bridge.system.state_file import StateFile
from tests.kit.renewing import Quiet

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
DEAD = BackendUnavailableError("corp: wanted an answer, found none")
REFUSED = BackendRefusedError("corp: no such role")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A node all of whose certificates have 20 days to live."""
    directory = tmp_path_factory.mktemp("kubernetes")
    sample_pki.make(directory, now=NOW, not_after=NOW + 20 * DAY, key="ecdsa-p256")
    return directory


@pytest.fixture
def node(directory: Path) -> Node:
    return inventory.read(directory / "pki", directory)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty state directory."""
    store = Store(tmp_path / "state")
    store.prepare()
    return store


def settings(store: Store, directory: Path, text: str = "") -> Settings:
    return overridden(parse(text), directory / "pki", directory, store.directory)


def new_record(store: Store) -> audit.Record:
    return audit.Record(store, AuditSettings())


def transaction(
    store: Store, directory: Path, text: str = "", now: datetime = NOW, record: audit.Record | None = None
) -> Transaction:
    """The transaction of one more run."""
    run = Run(
        settings=settings(store, directory, text),
        store=store,
        requests=OpenRequests(store),
        record=record or new_record(store),
        progress=Quiet(),
        now=lambda: now,
    )
    return Transaction(run, RunOptions())


def held(
    store: Store,
    directory: Path,
    selection: Selection,
    text: str = "",
    now: datetime = NOW,
    *,
    is_terminal: bool = False,
) -> Selection:
    """What is left of it at the gate of one more run."""
    left = hold_for_window(selection, settings(store, directory, text).renewal, now)
    return left if is_terminal else Attempts(store).held(left, now)


def concluded(
    one: Transaction, selection: Selection, result: Result, errors: Sequence[BridgeError] = ()
) -> list[BridgeError]:
    """What more there is to say at the end of a run with these errors."""
    return list(one.conclude(selection, dataclasses.replace(result, errors=tuple(errors))).errors)[len(errors) :]


def due(store: Store, directory: Path, node: Node) -> Selection:
    return select(node, settings(store, directory), RunOptions(), NOW)


def all_failed(selection: Selection, error: BridgeError) -> Result:
    return Result(outcomes=tuple(outcome_of(item, error) for item in selection.items))


def events(store: Store) -> list[str]:
    return [json.loads(line)["event"] for line in store.audit.read_text().splitlines()]


# --- is it time ------------------------------------------------------------------------------------------------------

SATURDAY = '[renewal]\nwindow = "Sat 02:00-06:00"\nwindow_zone = "Europe/Berlin"\njitter = "1h"\n'


def test_a_run_waits_for_its_window_on_a_terminal_too(store: Store, directory: Path, node: Node) -> None:
    """A person who wants it now names the certificates, and then the window does not count."""
    left = held(store, directory, due(store, directory, node), SATURDAY, is_terminal=True)
    assert left.items == ()
    assert {outcome.exit_code for outcome in left.failed} == {Exit.WAITING}


def test_the_delay_is_for_runs_that_will_do_something(store: Store, directory: Path) -> None:
    """There is no delay outside the window, on a terminal, or while a CA is left alone."""
    both = settings(store, directory, SATURDAY)
    always = settings(store, directory, '[renewal]\njitter = "1h"\n')
    in_the_window = datetime(2026, 11, 28, 3, tzinfo=UTC)
    assert delay(both, NOW, is_terminal=False) == timedelta()
    assert timedelta() < delay(both, in_the_window, is_terminal=False) < HOUR
    assert delay(both, in_the_window, is_terminal=True) == timedelta()
    assert timedelta() < delay(always, NOW, is_terminal=False) < HOUR
    for _ in range(3):
        Attempts(store).note(
            ["ca", "etcd-ca", "front-proxy-ca"], dict.fromkeys(("ca", "etcd-ca", "front-proxy-ca"), DEAD), NOW
        )
    assert delay(always, NOW, is_terminal=False) == timedelta()


def test_delays_differ(store: Store, directory: Path) -> None:
    """Each node has another delay, so that they do not all come at once."""
    one = settings(store, directory, '[renewal]\njitter = "1h"\n')
    assert len({delay(one, NOW, is_terminal=False) for _ in range(5)}) == 5


# --- failed runs -----------------------------------------------------------------------------------------------------


def test_three_failed_runs_call_a_person_and_leave_the_ca_alone(store: Store, directory: Path, node: Node) -> None:
    """Off a terminal; the record says so, and the exit code stays that of the failure."""
    everything = due(store, directory, node)
    for run in range(3):
        with new_record(store) as record:
            now = NOW + run * HOUR
            assert held(store, directory, everything, now=now) == everything
            one = transaction(store, directory, now=now, record=record)
            errors = concluded(one, everything, all_failed(everything, DEAD))
        assert [type(error) for error in errors] == ([NeedsAPersonError] * 3 if run == 2 else [])
    assert events(store) == [audit.NEEDS_A_PERSON] * 3
    later = NOW + 2 * HOUR + timedelta(minutes=59)
    left = held(store, directory, everything, now=later)
    assert left.items == ()
    assert {type(outcome.error) for outcome in left.failed} == {HeldOffError}
    assert {outcome.exit_code for outcome in left.failed} == {Exit.UNAVAILABLE}
    assert concluded(transaction(store, directory, now=later), left, Result(outcomes=left.failed)) == []
    assert {one.count for one in Attempts(store).authorities.values()} == {3}
    assert held(store, directory, everything, now=later, is_terminal=True) == everything
    assert held(store, directory, everything, now=NOW + 3 * HOUR) == everything


def test_a_run_that_could_not_count_says_so(
    store: Store, directory: Path, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk."""

    def full(path: Path, *_: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("bridge.system.state_file.write_atomically", full)
    everything = due(store, directory, node)
    [error] = concluded(transaction(store, directory), everything, all_failed(everything, DEAD))
    assert "attempts.json" in str(error)
    assert "No space left" in str(error)


def outcomes(selection: Selection, **errors: BridgeError) -> Result:
    """Renewed, but for those named."""
    return Result(
        outcomes=tuple(
            outcome_of(item, errors[name])
            if (name := item.spec.name.replace("-", "_")) in errors
            else Outcome(name=item.spec.name, authority=item.spec.authority.name, new=item.certificates[0])
            for item in selection.items
        )
    )


ALL = ["ca", "etcd-ca", "front-proxy-ca"]


@pytest.mark.parametrize(
    ("errors", "of_the_run", "asked", "failed"),
    [
        pytest.param({}, [], ALL, {}, id="all renewed"),
        pytest.param({"apiserver": DEAD}, [], ALL, {"ca": DEAD}, id="one of many of a CA"),
        pytest.param(
            {"apiserver": DEAD, "apiserver_kubelet_client": REFUSED}, [], ALL, {"ca": REFUSED}, id="the worse counts"
        ),
        pytest.param({"front_proxy_client": WaitingError("later")}, [], ["ca", "etcd-ca"], {}, id="waiting is neither"),
        pytest.param(
            {"front_proxy_client": HeldBackError("x"), "etcd_peer": DEAD},
            [],
            ["ca", "etcd-ca"],
            {"etcd-ca": DEAD},
            id="nor is what another CA holds back",
        ),
    ],
)
def test_authorities_have_failed_succeeded_or_neither(
    errors: dict[str, BridgeError],
    of_the_run: list[BridgeError],
    asked: list[str],
    failed: dict[str, BridgeError],
    store: Store,
    directory: Path,
    node: Node,
) -> None:
    """The result of its certificates decides about an authority."""
    everything = due(store, directory, node)
    found = by_authority(everything, outcomes(everything, **errors), of_the_run)
    assert (sorted(found[0]), found[1]) == (asked, failed)


def test_a_run_that_failed_as_a_whole_failed_for_all(store: Store, directory: Path, node: Node) -> None:
    """A run that did not install, or rolled back, counts for each CA, since another try would restart the components for nothing."""
    everything = due(store, directory, node)
    wrong = BridgeError("rolled back")
    for result in (outcomes(everything), Result(outcomes=())):
        asked, failed = by_authority(everything, result, [wrong])
        assert sorted(asked) == ALL
        assert failed == dict.fromkeys(ALL, wrong)


def test_what_could_not_be_tried_is_not_the_cas_fault(store: Store, directory: Path, node: Node) -> None:
    """A missing certificate file says nothing about a CA."""
    everything = due(store, directory, node)
    missing = Selection(items=(), failed=all_failed(everything, BridgeError("missing")).outcomes, skipped=())
    assert by_authority(missing, Result(outcomes=missing.failed), []) == ([], {})


# --- hooks -----------------------------------------------------------------------------------------------------------


def hook(event: str, script: str) -> str:
    return f"[hooks]\n{event} = {json.dumps(f'sh -c {json.dumps(script)}')}\n"


def test_a_rollback_of_cas_alone_is_an_error_of_the_run(directory: Path) -> None:
    """No certificate was installed that could carry the error; where one was, it carries it, and the run does not repeat it."""
    back = RolledBackError("rolled back, since the kubelet did not come back")
    done = Activation(errors=(back,), rolled_back=back)
    alone = with_activation(Result(outcomes=()), done)
    assert (alone.errors, alone.exit_code) == ((back,), back.exit_code)
    assert back.exit_code != Exit.DONE
    leaf = inventory.read(directory / "pki", directory).items[0].certificates[0]
    carried = with_activation(Result(outcomes=(Outcome(name="apiserver", authority="ca", old=leaf, new=leaf),)), done)
    assert (carried.errors, carried.outcomes[0].error, carried.exit_code) == ((), back, back.exit_code)


def test_a_failed_run_is_reported_to_the_failure_hook(
    store: Store, directory: Path, node: Node, tmp_path: Path
) -> None:
    """With the code of the run and all reasons, those about the run as a whole, too."""
    log = tmp_path / "log"
    text = hook("failure", f"printenv CA_BRIDGE_EXIT_CODE CA_BRIDGE_ERRORS >{log}")
    everything = due(store, directory, node)
    failed = HookError("hook x failed", exit_code=Exit.NOT_LIVE)
    one = transaction(store, directory, text)
    assert concluded(one, everything, outcomes(everything, apiserver=REFUSED), [failed]) == []
    assert log.read_text().splitlines() == ["7", "apiserver: corp: no such role", "hook x failed"]


def test_what_waits_runs_no_hook(store: Store, directory: Path, node: Node, tmp_path: Path) -> None:
    """A run outside its window runs no failure hook."""
    log = tmp_path / "log"
    text = hook("failure", f"touch {log}") + SATURDAY
    left = held(store, directory, due(store, directory, node), text)
    assert concluded(transaction(store, directory, text), left, Result(outcomes=left.failed)) == []
    assert not log.exists()


def test_a_hook_that_says_not_now_is_no_failure(store: Store, directory: Path, node: Node, tmp_path: Path) -> None:
    """No hook runs and no failure counts; a hook that is broken is reported."""
    log = tmp_path / "log"
    text = hook("failure", f"echo x >>{log}")
    everything = due(store, directory, node)
    not_now = NotNowByHookError("hook before: says not now", exit_code=Exit.UNAVAILABLE)
    assert concluded(transaction(store, directory, text), everything, Result(outcomes=()), [not_now]) == []
    assert not log.exists()
    broken = HookError("hook before: broken")
    assert concluded(transaction(store, directory, text), everything, Result(outcomes=()), [broken]) == []
    assert log.read_text() == "x\n"
    assert not store.attempts.exists()


def test_a_mistake_in_the_settings_is_no_failure_of_a_ca(store: Store, directory: Path, node: Node) -> None:
    """The next run after it was mended asks at once."""
    everything = due(store, directory, node)
    mistake = SettingsError([SettingsProblem("backend.corp.url", "a URL", "nothing")])
    for _ in range(3):
        assert concluded(transaction(store, directory), everything, Result(outcomes=()), [mistake]) == []
    assert not store.attempts.exists()


def test_a_hook_that_failed_is_in_the_record(store: Store, directory: Path, node: Node) -> None:
    """A failure is recorded before, after, and when the hook runs again."""
    everything = due(store, directory, node)
    with new_record(store) as record:
        one = transaction(store, directory, hook("before", "exit 1"), record=record)
        with pytest.raises(HookError), one.about(everything):
            pytest.fail("the work began")
    success = hook("success", "exit 1")
    with new_record(store) as record:
        one = transaction(store, directory, success, record=record)
        assert len(concluded(one, everything, outcomes(everything))) == 1
    with new_record(store) as record:
        one = transaction(store, directory, success, record=record)
        one.settle_earlier(node)
        assert len(one.with_earlier(Result(outcomes=())).errors) == 1
    assert events(store) == [audit.FAILED] * 3


@pytest.mark.parametrize("maker", [maker for name, maker in vars(obligations).items() if name.endswith("_file")])
def test_every_kind_of_work_is_found_by_a_night_with_nothing_due(
    store: Store, maker: Callable[[Store], StateFile[Any]]
) -> None:
    """A file of obligations.py that the state directory does not count would wait for the next due certificate."""
    assert not store.has_work()
    maker(store).path.touch()
    assert store.has_work()


def test_a_run_with_hooks_to_run_is_not_over_at_once(store: Store, tmp_path: Path) -> None:
    """Open hooks run though no certificate is due."""
    fresh = tmp_path / "kubernetes"
    now = datetime.now(UTC)
    sample_pki.make(fresh, now=now, not_after=now + 300 * DAY, key="ecdsa-p256")
    config = tmp_path / "config.toml"
    config.write_text('[hooks]\nsuccess = "false"\n')
    places = {"--config": config, "--pki-dir": fresh / "pki", "--kubeconfig-dir": fresh, "--state-dir": store.directory}
    arguments = ["renew", *(str(part) for pair in places.items() for part in pair)]
    remember_checked(load(config), store)
    assert nothing_to_do(arguments) is not None
    item = inventory.read(fresh / "pki", fresh).items[1]
    done = Outcome(name=item.spec.name, authority="ca", new=item.certificates[0])
    Hooks(settings(store, fresh, config.read_text()), store, "a run").finished(
        HookEvent.of([item], [done], exit_code=0)
    )
    assert nothing_to_do(arguments) is None


# --- syslog ----------------------------------------------------------------------------------------------------------


def test_syslog_hears_loudly_that_a_person_is_needed(
    store: Store, directory: Path, node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message is critical, and all others are notices."""
    place = tmp_path / "log"
    monkeypatch.setattr(audit, "SYSLOG", place)
    Attempts(store).note(["ca"], {"ca": DEAD}, NOW)
    Attempts(store).note(["ca"], {"ca": DEAD}, NOW)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(place))
        server.settimeout(5)
        record = audit.Record(store, AuditSettings(syslog=True))
        everything = due(store, directory, node)
        concluded(transaction(store, directory, record=record), everything, outcomes(everything, apiserver=DEAD))
        record.add(audit.FAILED, error=DEAD)
        record.write()
        assert [server.recv(65536).partition(b">")[0] for _ in range(2)] == [b"<82", b"<85"]
