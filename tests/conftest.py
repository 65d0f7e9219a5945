"""
Marks for tests that need real programs, and the rule that a run may forbid skips.

`@pytest.mark.kube` needs kubeadm, `@pytest.mark.kube("cfssl", "kubeadm-1.20")` the programs that it names,
`@pytest.mark.node` all that `tests/kit/node.sh` needs. Without them the test is skipped, and says what brings them.
With `CA_BRIDGE_NO_SKIP=1` in the environment a skip is a failure, whatever its cause.
`@pytest.mark.nightly` is for what takes minutes and is also proven step by step: `--nightly` runs these, and nothing else does.
`--fast` leaves out all that needs root, the kit or much time, without a skip (`scripts/test`).
The fixture `tried` counts cases (see `tests.counts`).
"""

from __future__ import annotations

import functools
import gc
import os
import re
import signal
import ssl
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from bridge.system import console
from bridge.system.tls import TlsSocket
from tests import counts
from tests.kit import fence, plan, programs

NO_SKIP = "CA_BRIDGE_NO_SKIP"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which of all tests: without any of the two all but those of the night."""
    group = parser.getgroup("speeds")
    group.addoption("--fast", action="store_true", help="tests that need neither root nor the kit, and little time")
    group.addoption("--nightly", action="store_true", help="the tests with the mark nightly alone")


def pytest_configure(config: pytest.Config) -> None:
    """
    What does not depend on who starts the tests, how fast the machine is, and what is around it; tests that are named are there.

    A shell that starts them in the background lets them, and all that they start, ignore SIGINT. Hypothesis would
    take a busy machine for a fault; it tries the same examples in each run, so that a change fails by what it changes
    (`python -m tests.fuzz` goes on looking). How wide the tests' own terminal is (xdist tells its workers) is no matter of the
    programs that they run, whose output goes into pipes. A connection that its peer resets before the handshake is closed, also a
    test's own: Python would leave it open, and warn in whatever test runs when it is forgotten. Programs in Go look for
    garbage a quarter as often: a node takes a tenth less processor time, and short runs of kubeadm a fifth.
    """
    fence.hold()
    ssl.SSLContext.sslsocket_class = TlsSocket
    os.environ.setdefault("GOGC", "400")
    for name in ("COLUMNS", "LINES"):
        os.environ.pop(name, None)
    slow = [hypothesis.HealthCheck.too_slow]
    hypothesis.settings.register_profile("any machine", deadline=None, derandomize=True, suppress_health_check=slow)
    hypothesis.settings.load_profile("any machine")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if absent := _not_there(config.args, config.invocation_params.dir):
        raise pytest.UsageError(f"wanted tests by these names, found none: {', '.join(absent)}")


def _not_there(arguments: Sequence[str], directory: Path) -> list[str]:
    """Those that name no file, or no test in their file: with several workers pytest itself runs nothing, and says so."""

    def is_there(argument: str) -> bool:
        path, *names = argument.partition("[")[0].split("::")
        file = directory / path
        if not names or not file.is_file():
            return file.exists() and (not names or file.is_file())
        text = file.read_text(encoding="utf-8")
        return all(re.search(rf"^ *(def|class) {re.escape(name)}\b", text, re.MULTILINE) for name in names)

    return [argument for argument in arguments if not is_there(argument)]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Python looks for garbage neither while the tests are collected, nor in them later: they stay until the end."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """
    A test that starts a node is in a file that says so, by which the workers are chosen (below).

    These come first, since they take longer than all others beside them. What the run's speed leaves out is gone from here.
    """
    for item in items:
        if item.get_closest_marker("node") and not plan.starts_nodes(item.path.name):
            raise pytest.UsageError(f"{item.nodeid}: wanted tests marked node in a file named test_…node….py")
    items.sort(key=lambda item: not plan.starts_nodes(item.path.name))
    left_out = [item for item in items if not _is_chosen(item, config)]
    config.stash[_LEFT_OUT] = len(left_out)
    if left_out:
        items[:] = [item for item in items if _is_chosen(item, config)]
        config.hook.pytest_deselected(items=left_out)


#: How many tests the run's speed has left out.
_LEFT_OUT = pytest.StashKey[int]()


def _is_chosen(item: pytest.Item, config: pytest.Config) -> bool:
    if config.option.nightly or item.get_closest_marker("nightly"):
        return bool(config.option.nightly and item.get_closest_marker("nightly"))
    return not config.option.fast or _is_fast(item)


def _is_fast(item: pytest.Item) -> bool:
    """It needs nothing that a newcomer's machine may lack, and its file little time."""
    if any(item.get_closest_marker(name) for name in ("kube", "node", "slow")):
        return False
    if any(mark.args and mark.args[0] is True for mark in item.iter_markers("skipif")):
        return False
    return plan.is_fast(item.nodeid.partition("::")[0])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker reports how many it has left out."""
    output: dict[str, int] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["left out"] = session.config.stash.get(_LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """All workers have left out the same."""
    output: dict[str, int] = getattr(node, "workeroutput", {})
    node.config.stash[_LEFT_OUT] = output.get("left out", 0)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: list[str]) -> None:
    """How many tests a run of several workers has, once the first worker has counted them, and what it leaves out."""
    reporter: Any = node.config.pluginmanager.getplugin("terminalreporter")
    if reporter is None or getattr(reporter, "has_said_how_many", False):
        return
    reporter.has_said_how_many = True
    reporter.write_line(f"\n{len(ids):,} tests: {_DURATION if _is_all(node.config, len(ids)) else 'a part of all'}")
    for line in () if node.config.option.fast else _left_out():
        reporter.write_line(f"left out: {line}")


def _is_all(config: Any, count: int) -> bool:
    return count > _MANY and not config.option.fast


#: Measured on two cores that do nothing else, with the kit's programs and as root.
_DURATION, _MANY = "about 45 minutes on two cores", 5000


def _left_out() -> Iterator[str]:
    """Which kinds of tests are skipped on this machine, and what brings them."""
    if reason := _no_node_here():
        yield f"tests of real nodes: {reason}"
    if reason := programs.lacking(programs.NODE_PROGRAMS):
        yield f"tests with real programs: {reason} (about 12 minutes, once)"


def _file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """
    With several workers, tests that start nodes run in a few of them, file by file (`tests.kit.plan`); the tests of a file
    that share a slow server run in one of them, and all others anywhere.

    xdist's own `loadgroup` does nothing with pytest 9.2: it renames tests by an attribute that is no longer there
    (xdist 3.8).
    """
    from xdist.scheduler import LoadScopeScheduling  # the workers' controller alone needs it

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]  # no types, see pyproject.toml
        @functools.cached_property
        def groups(self) -> dict[str, int]:
            return plan.groups(map(_file_of, self.collection))

        def _split_scope(self, nodeid: str) -> str:
            file = _file_of(nodeid)
            group = self.groups.get(file)
            if group is not None:
                return f"nodes {group}"
            return file if plan.stays_together(file) else nodeid

    config.option.loadscopereorder = False  # the longest come first by the order above, and not by how many they are
    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose programs are not here."""
    reason = programs.lacking(_needs(item))
    if not reason and item.get_closest_marker("node"):
        reason = _no_node_here()
    if reason:
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _messages_as_before() -> Iterator[None]:
    """
    A command that a test runs in this process sets up its messages for the process's whole life: with `-v` later tests' tables
    would be wider, and later messages would go to a standard error that is closed.
    """
    log = console.log
    level, propagate, handlers = log.level, log.propagate, log.handlers
    yield
    log.setLevel(level)
    log.propagate, log.handlers = propagate, handlers


@pytest.fixture(autouse=True)
def _finding(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """The report of a test with the mark `attack` names its findings."""
    for mark in request.node.iter_markers("attack"):
        for finding in mark.args:
            record_property("attack", finding)


def _needs(item: pytest.Item) -> list[str]:
    names = [name for mark in item.iter_markers("kube") for name in (mark.args or ("kubeadm",))]
    return names + [name for _ in item.iter_markers("node") for name in programs.NODE_PROGRAMS]


def _no_node_here() -> str:
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a node needs root on Linux; run the tests as root"
    return ""


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    # An expected failure is reported as "skipped" too, but it did run.
    if os.environ.get(NO_SKIP) != "1" or report.outcome != "skipped" or hasattr(report, "wasxfail"):
        return
    reason: Any = report.longrepr
    report.outcome = "failed"
    report.longrepr = f"{NO_SKIP}=1, and this was skipped: {reason[2] if isinstance(reason, tuple) else reason}"


# First among the wrappers means last to see the report: after pytest's own has made a skip of it.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A skipped test fails where skips are forbidden."""
    report = yield
    _fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Fail for a module that skips itself, too."""
    report = yield
    _fail_if_skipped(report)
    return report


@pytest.fixture
def tried(record_property: Callable[[str, object], None]) -> counts.Tried:
    """Tell how many cases of a kind a test has tried."""

    def tell(what: str, count: int) -> None:
        record_property(*counts.property_of(what, count))

    return tell


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A component that is away refuses at once in a test; one that this machine holds up for a minute is there."""
    for name in ("TIMEOUT_SECONDS", "api.NODE_TIMEOUT_SECONDS"):
        monkeypatch.setattr(f"bridge.cluster.{name}", 90)


@pytest.fixture
def failure_is_counted(tried: counts.Tried) -> None:
    """Each test with it is a failure of a CA, or in its place, whose message and hint are looked at."""
    tried("failures with the message and hint that an operator reads", 1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One line a kind of cases; a fast run says what it has left out."""
    kinds = counts.of(terminalreporter.getreports("passed"))
    if kinds:
        terminalreporter.section("cases that held")
    for what, count in sorted(kinds.items()):
        terminalreporter.write_line(f"{count:6} {what}")
    if config.option.fast:
        terminalreporter.section("left out")
        count = config.stash.get(_LEFT_OUT, 0)
        terminalreporter.write_line(
            f"{count:,} tests, which need root, real programs and servers, or many seconds each."
        )
        terminalreporter.write_line(f"As root on Linux: {programs.COMMAND}, then: scripts/test --all ({_DURATION})")
