"""What the kit and the suite's own rules promise."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest

from bridge.errors import Exit
from bridge.node.processes import running
from bridge.specs import AUTHORITIES
from bridge.system.waiting import wait_until
from tests import conftest
from tests.kit import looking, node, plan, programs, watching
from tests.kit.cas import Bridge
from tests.kit.loopback import alone, free_port
from tests.kit.pki import KubeadmAlgorithm, KubeadmVersion, handmade_pki, kubeadm_pki
from tests.kit.warm import shared
from tests.kit.watching import Seen

ROOT = Path(__file__).resolve().parents[1]

SKIPPED_BY_ITSELF = """
import pytest

def test_skips() -> None:
    pytest.skip("no reason")
"""
SKIPPED_BY_A_MARK = """
import pytest

@pytest.mark.kube("a-program-that-is-missing")
def test_needs_it() -> None:
    raise AssertionError("ran without its program")
"""
SKIPPED_MODULE = """
import pytest

pytest.importorskip("a_module_that_is_missing")

def test_never_collected() -> None: ...
"""
FOUR_TESTS = """
import os
import time
import pytest

@pytest.mark.parametrize("number", range(4))
def test_it(number: int) -> None:
    time.sleep(0.2)  # or one worker is done with all before the other has begun
    print("worker", os.environ["PYTEST_XDIST_WORKER"], "of", os.path.basename(__file__))
"""
A_NODE_TEST = """
import pytest

@pytest.mark.node
def test_node() -> None: ...
"""
NOT_SKIPPED = """
import pytest

@pytest.mark.kube("sh")
def test_passes() -> None: ...

@pytest.mark.xfail(reason="known", strict=True)
def test_fails_as_expected() -> None:
    raise AssertionError
"""


def _pytest(
    directory: Path, source: str, *more: str, no_skip: bool, files: Sequence[str] = ("test_it.py",)
) -> subprocess.CompletedProcess[str]:
    """Run `source` as these test modules under our conftest, in a process of its own."""
    for file in directory.rglob("test_*.py"):
        file.unlink()
    for name in files:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(source)
    (directory / "pytest.ini").write_text("[pytest]\nmarkers =\n    kube: x\n    node: x\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment.pop(conftest.NO_SKIP, None)
    if no_skip:
        environment[conftest.NO_SKIP] = "1"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.conftest",
        "-q",
        "-rs",
        "--import-mode=importlib",
        *more,
        ".",
    ]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("source", [SKIPPED_BY_ITSELF, SKIPPED_BY_A_MARK, SKIPPED_MODULE])
def test_a_skip_is_a_failure_where_skips_are_forbidden(tmp_path: Path, source: str) -> None:
    """A skip passes in an ordinary run and fails one with CA_BRIDGE_NO_SKIP=1, whatever skipped it."""
    ordinary = _pytest(tmp_path, source, no_skip=False)
    strict = _pytest(tmp_path, source, no_skip=True)

    # A run whose only module skips itself has collected no test.
    assert ordinary.returncode in {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}
    assert "1 skipped" in ordinary.stdout
    assert strict.returncode in {pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED}
    assert "1 skipped" not in strict.stdout


def test_what_is_not_skipped_passes_where_skips_are_forbidden(tmp_path: Path) -> None:
    """A test that has its program runs, and an expected failure is no skip."""
    run = _pytest(tmp_path, NOT_SKIPPED, no_skip=True)

    assert run.returncode == pytest.ExitCode.OK, run.stdout
    assert "1 passed, 1 xfailed" in run.stdout


def test_nodes_are_started_by_a_few_workers_file_by_file(tmp_path: Path) -> None:
    """All tests of a file that starts nodes, or shares a slow server, run in the same one of several workers; others are spread."""
    several = ("-p", "xdist", f"--numprocesses={plan.NODE_WORKERS + 1}", "-rP")

    def workers(*files: str) -> dict[str, set[str]]:
        run = _pytest(tmp_path, FOUR_TESTS, *several, no_skip=True, files=files)
        assert run.returncode == pytest.ExitCode.OK, run.stdout
        found = re.findall("^worker (.*) of (.*)$", run.stdout, re.MULTILINE)
        assert len(found) == 4 * len(files)
        return {name: {worker for worker, of in found if of == name} for name in (Path(file).name for file in files)}

    found = workers(*(f"test_{number}_node.py" for number in range(plan.NODE_WORKERS + 1)))
    assert {len(one) for one in found.values()} == {1}
    assert len(set.union(*found.values())) == plan.NODE_WORKERS
    assert len(workers("test_it.py")["test_it.py"]) > 1
    shared = min(plan.TOGETHER)
    assert len(workers(f"any/{shared}")[Path(shared).name]) == 1
    assert len(workers(f"any/other/{shared}")[Path(shared).name]) > 1


def test_workers_get_as_much_to_do_and_no_two_the_same_address() -> None:
    """The plan's times share the work evenly, and files that may run at the same time name different addresses."""
    files = [path.relative_to(ROOT) for path in ROOT.glob("tests/**/test_*.py") if plan.starts_nodes(path.name)]
    assert not [end for end in (*plan.SECONDS, *plan.TOGETHER, *plan.SLOW) if not (ROOT / "tests" / end).exists()]
    groups = plan.groups(map(str, files))
    busy = [sum(plan.seconds(path) for path, one in groups.items() if one == number) for number in set(groups.values())]
    assert max(busy) < 1.2 * min(busy)
    owners: dict[str, set[str]] = {}
    for path in (*files, *(path.relative_to(ROOT) for path in ROOT.glob("tests/e2e/*/conftest.py"))):
        for address in re.findall(r"198\.18\.77\.\d+", (ROOT / path).read_text()):
            owners.setdefault(address, set()).add(plan.unit(str(path)))
    assert len(owners) > 10
    assert not {address: paths for address, paths in owners.items() if len(paths) > 1}


SPEEDS = """
import pytest
def test_plain(): pass
@pytest.mark.slow
def test_slow(): pass
@pytest.mark.kube
def test_kube(): pass
@pytest.mark.skipif(True, reason="needs root")
def test_root(): pass
@pytest.mark.skipif(False, reason="needs root")
def test_rooted(): pass
@pytest.mark.nightly
def test_night(): pass
"""


def test_a_run_has_one_of_three_speeds(tmp_path: Path) -> None:
    """The fast one skips nothing and says what it leaves out; what is nightly runs at no other time."""

    def names(*options: str, file: str = "test_it.py") -> list[str]:
        run = _pytest(tmp_path, SPEEDS, *options, "--collect-only", no_skip=True, files=[file])
        return re.findall(r"::test_(\w+)$", run.stdout, re.MULTILINE)

    assert names() == ["plain", "slow", "kube", "root", "rooted"]
    assert names("--fast") == ["plain", "rooted"]
    assert names("--fast", file=f"tests/{min(plan.SLOW)}") == []
    assert names("--nightly") == ["night"]
    for several in ((), ("-p", "xdist", "--numprocesses=2")):
        run = _pytest(tmp_path, SPEEDS, "--fast", *several, no_skip=True)
        assert run.returncode == pytest.ExitCode.OK, run.stdout
        assert "4 tests, which need root" in run.stdout
        assert "scripts/test --all" in run.stdout


def test_nodes_of_a_directory_are_one_worker_s() -> None:
    """Files below a directory of their own share its nodes; all others have their own."""
    shared = [f"tests/e2e/three_nodes/test_{name}_node.py" for name in ("a", "b", "c")]
    groups = plan.groups([*shared, *(f"tests/e2e/test_{number}_node.py" for number in range(9))])
    assert len({groups[path] for path in shared}) == 1
    assert set(groups.values()) == set(range(plan.NODE_WORKERS))


def test_a_file_that_starts_nodes_says_so(tmp_path: Path) -> None:
    """A test marked node in a file that is not named so is an error, since the name decides which worker runs it."""
    wrong = _pytest(tmp_path, A_NODE_TEST, "--collect-only", no_skip=False)
    right = _pytest(tmp_path, A_NODE_TEST, "--collect-only", no_skip=False, files=["test_a_node.py"])

    assert wrong.returncode == pytest.ExitCode.USAGE_ERROR
    assert right.returncode == pytest.ExitCode.OK


def test_a_skip_names_the_command_that_brings_the_program(tmp_path: Path) -> None:
    """The message of a skipped test says how to have it run."""
    run = _pytest(tmp_path, SKIPPED_BY_A_MARK, no_skip=False)

    assert programs.COMMAND in run.stdout
    assert os.access(ROOT / programs.COMMAND, os.X_OK)


def test_finds_a_program_in_the_kit_before_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """$KUBE_BIN_DIR comes first, then $PATH; a name that is in neither is not found."""
    kit, path = tmp_path / "kit", tmp_path / "path"
    for directory, names in ((kit, ["both"]), (path, ["both", "only-path"])):
        directory.mkdir()
        for name in names:
            (directory / name).touch(mode=0o755)
    monkeypatch.setenv("KUBE_BIN_DIR", str(kit))
    monkeypatch.setenv("PATH", str(path))

    found = [programs.find(name) for name in ("both", "only-path", "neither")]

    assert found == [kit / "both", path / "only-path", None]
    assert programs.lacking(["both", "neither", "nor-this"]).startswith("neither, nor-this not found")
    assert not programs.lacking(["both", "only-path"])


@pytest.mark.kube("kubeadm", "kubeadm-1.20")
@pytest.mark.parametrize(
    ("version", "algorithm"),
    [("1.37", "RSA-2048"), ("1.37", "ECDSA-P384"), ("1.20", "RSA-2048"), ("1.20", "ECDSA-P256")],
)
def test_the_real_kubeadm_makes_a_pki_without_ca_keys(
    tmp_path: Path, version: KubeadmVersion, algorithm: KubeadmAlgorithm
) -> None:
    """kubeadm 1.37 and 1.20 see an external CA in what they made, and what they made is complete."""
    pki = kubeadm_pki(tmp_path, version=version, algorithm=algorithm)

    assert not any((pki.pki_dir / authority.key_file).exists() for authority in AUTHORITIES.values())
    assert all(file.exists() for name in AUTHORITIES for file in pki.ca_files(name))
    assert pki.run_kubeadm("init", "phase", "certs", "all").stdout.count("keyless") == len(AUTHORITIES)
    assert "External CA mode" in pki.run_kubeadm("init", "phase", "kubeconfig", "all").stdout


def test_refuses_what_an_old_kubeadm_can_not_make(tmp_path: Path) -> None:
    """A certificate that an old kubeadm can not make is an error before it runs."""
    with pytest.raises(ValueError, match="ECDSA-P384"):
        kubeadm_pki(tmp_path, version="1.20", algorithm="ECDSA-P384")


@pytest.mark.kube
def test_kubeadm_tells_why_it_failed(tmp_path: Path) -> None:
    """A run that fails raises with kubeadm's own words, unless the test wants to look at it itself."""
    pki = kubeadm_pki(tmp_path, algorithm="ECDSA-P256")

    with pytest.raises(AssertionError, match="unknown command"):
        pki.run_kubeadm("certs", "no-such-command", config=False)

    assert pki.run_kubeadm("certs", "no-such-command", config=False, check=False).returncode == 1


def test_a_free_port_is_one_processs() -> None:
    """While both run no other process gets it, and no connection: one that was free a moment before may be another's by now."""
    ours, code = {free_port() for _ in range(200)}, "print(*(free_port() for _ in range(200)))"
    command = [sys.executable, "-c", f"from tests.kit.loopback import free_port; {code}"]
    others = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not ours & {int(port) for port in others.split()}
    assert max(ours) < int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        assert taken.getsockname()[1] not in {free_port() for _ in range(200)}


@pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace needs root; run the tests as root")
def test_a_stand_in_that_is_alone_is_seen_by_no_test_beside_it() -> None:
    """A process of a component's name counts as the node's own in the network alone in which it was started."""
    name = f"kubelet-{os.getpid()}"
    with subprocess.Popen(["bash", "-c", 'exec -a "$0" cat', name], stdin=subprocess.PIPE) as outside:
        assert wait_until(lambda: running(name), bool, timedelta(seconds=120), pause_seconds=0.02)[0].pid == outside.pid
        with alone():
            assert running(name) == []
        outside.kill()


def test_a_warm_run_is_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork of the loaded program has a process, an environment, a directory, streams and an exit code of its own."""
    pki = handmade_pki(tmp_path / "node")
    cold, warm = (Bridge(pki=pki, directory=tmp_path / "bridge", warm=one) for one in (False, True))
    monkeypatch.chdir(tmp_path)
    for width in ("60", "90"):
        monkeypatch.setenv("COLUMNS", width)
        ours, theirs = (one.run("renew", "--help") for one in (warm, cold))
        assert (ours.returncode, ours.stdout, ours.stderr) == (0, theirs.stdout, "")
    ours, theirs = (one.run("renew", "no-such") for one in (warm, cold))
    said, run = zip(*(one.stderr.rsplit(" [run ", 1) for one in (ours, theirs)), strict=True)
    assert (ours.returncode, ours.stdout, said[0]) == (theirs.returncode, "", said[1])
    assert run[0] != run[1]
    assert warm.run("renew", "--csr-only", "--csr-dir", "here", "admin.conf").returncode == 0
    assert (tmp_path / "here/admin.conf.csr").is_file()
    os.kill(shared()._process.pid, signal.SIGSTOP)  # or it may have answered before we look
    with pytest.raises(subprocess.TimeoutExpired):
        warm.run("renew", "--help", timeout=0.001)
    assert warm.run("renew", "--help").returncode == 0
    (tmp_path / "sitecustomize.py").write_text("print('a new process')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # counts when a process starts
    assert warm.run("--version").stdout.startswith("a new process\n")


def test_no_test_reaches_outside_of_this_machine(tmp_path: Path) -> None:
    """Neither this process nor a warm run of the program: an address of documentation is refused at once, a name is unknown."""
    for host, found in {"192.0.2.10": "Network is unreachable", "api.example.com": "not known"}.items():
        with pytest.raises(OSError, match=found):
            socket.create_connection((host, 6443), timeout=0.001)
        bridge = Bridge(pki=handmade_pki(tmp_path / host), directory=tmp_path / f"{host}-bridge")
        bridge.add("authority.ca", {"backend": "away"})
        bridge.add("backend.away", {"type": "door", "url": f"https://{host}:9443", "retry_for": "1s"})
        run = bridge.run("renew", "admin.conf")
        assert run.returncode == Exit.UNAVAILABLE, run.stderr
        assert found.lower() in run.stderr
    for look, asked in ((socket.gethostbyname, "api.example.com"), (socket.gethostbyaddr, "192.0.2.10")):
        with pytest.raises(socket.gaierror, match="not known"):
            look(asked)
    with socket.socket(type=socket.SOCK_DGRAM) as datagrams, pytest.raises(OSError, match="Network is unreachable"):
        datagrams.sendto(b"", ("192.0.2.10", 53))


def test_a_quorum_is_lost_while_two_members_are_away_or_without_a_leader() -> None:
    """One that is away alone loses none, however long; of overlaps the longest counts, also where a third joins it."""
    down, leaderless = [(0.0, 10.0, "a"), (5.0, 8.0, "b"), (20.0, 90.0, "a")], [(7.0, 9.0, "c"), (48.0, 49.0, "b")]
    assert Seen(down=down, leaderless=leaderless).longest_without_quorum() == 4.0
    assert Seen(down=down[-1:], leaderless=leaderless[-1:]).longest_without_quorum() == 1.0
    assert Seen(down=down[-1:]).longest_without_quorum() == 0.0


KUBECTL = """#!/bin/sh
read -r said <{place}/said
sed -i 1d {place}/said
[ "$said" = ok ] || {{ echo "Error from server: $said" >&2; exit 1; }}
"""
STALLED = "etcdserver: request timed out"


@pytest.mark.parametrize(
    ("said", "verb", "is_done"),
    [
        ((STALLED, "ok"), "get", True),
        (("The connection to the server 192.0.2.1:6443 was refused - did you specify the right host or port?", "ok"), "get", True),
        ((STALLED, '(AlreadyExists): configmaps "x" already exists'), "create", True),
        (('(AlreadyExists): configmaps "x" already exists',), "create", False),
        (("(Forbidden): no", "ok"), "get", False),
        ((STALLED, "(Forbidden): no", "ok"), "get", False),
    ],
)  # fmt: skip
def test_kubectl_on_a_node_waits_for_a_server_that_answers_in_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Sequence[str], verb: str, is_done: bool
) -> None:
    """A write whose answer was lost is done, a refusal is an error at once, and who looks for failures sees the first answer."""
    script = tmp_path / "node.sh"
    script.write_text(KUBECTL.format(place=tmp_path))
    script.chmod(0o755)
    monkeypatch.setattr(node, "_SCRIPT", script)
    one = node.Node(name="n", ip="192.0.2.1")
    (tmp_path / "said").write_text("\n".join([*said, ""]))
    with contextlib.nullcontext() if is_done else pytest.raises(AssertionError, match="Error from server"):
        one.kubectl(verb, "configmap", "x")
    (tmp_path / "said").write_text("\n".join([*said, ""]))
    assert one.kubectl(verb, "configmap", "x", check=False).returncode == 1


def test_a_manifest_that_leaves_while_the_watch_stalls_is_seen(tmp_path: Path) -> None:
    """It was away and back between two looks."""

    class Stall(threading.Event):
        """The machine stands still in the first pause, which is the last."""

        def wait(self, timeout: float | None = None) -> bool:
            del timeout
            (directory / "etcd.yaml").rename(directory.parent / "etcd.yaml")
            (directory.parent / "etcd.yaml").rename(directory / "etcd.yaml")
            return True

    one, seen = node.Node(name="n", ip="192.0.2.1"), Seen()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBE_NODE_DIR", str(tmp_path))
        directory = one.kubeconfig_dir / "manifests"
        directory.mkdir(parents=True)
        (directory / "etcd.yaml").touch()
        watching._watch_manifests([one], seen, Stall())
    assert [(name, component) for _, name, component in seen.away] == [("n", "etcd")]


@pytest.mark.parametrize(
    ("said", "error"), [("etcdserver: request timed out", TimeoutError), ("configmaps is forbidden", ValueError)]
)
def test_an_answer_for_an_etcd_that_is_slow_is_a_late_one(
    monkeypatch: pytest.MonkeyPatch, said: str, error: type[Exception]
) -> None:
    """An API server says so before its client's own limit of time is over."""
    answer = looking.Answer(certificate=mock.Mock(), status=500, body=said.encode())
    monkeypatch.setattr(watching, "ask", lambda *_, **__: answer)
    with pytest.raises(error, match=said):
        watching._write_and_read(mock.Mock(), "1")


@pytest.mark.parametrize(
    ("answers", "failed"),
    [([TimeoutError, TimeoutError, None], False), ([TimeoutError, ConnectionRefusedError, None], False),
     ([ConnectionRefusedError, ConnectionRefusedError, None], True)],
)  # fmt: skip
def test_a_client_goes_on_while_a_server_is_slow_and_not_when_all_refuse(
    monkeypatch: pytest.MonkeyPatch, answers: Sequence[type[OSError] | None], failed: bool
) -> None:
    """Two API servers, which are asked one after the other until one takes it."""
    left, stop = list(answers), threading.Event()

    def answer(*_: object) -> None:
        error = left.pop(0)
        if not left:
            stop.set()
        if error is not None:
            raise error

    monkeypatch.setattr(watching, "_write_and_read", answer)
    monkeypatch.setattr(watching, "client", lambda *_: None)
    seen, nodes = Seen(), [node.Node(name=name, ip=f"192.0.2.{name}") for name in ("1", "2")]
    watching._work(nodes, seen, stop)
    assert (bool(seen.failed), seen.elsewhere) == (failed, 2)
