"""The measurements can be made: each once, in the smallest size. What they measure is not looked at."""

from __future__ import annotations

import json
import ssl
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kit import exec_programs
from tests.measure import __main__ as bench
from tests.measure import (
    backends,
    curves,
    desk_profile,
    door,
    fleet,
    gateway,
    mutation,
    rotation,
    rotation_clients,
    start_up,
    tested_cas,
)
from tests.measure.rotation_clients import Answer, Asked


def test_the_desks_rows(tmp_path: Path) -> None:
    """A fleet of two nodes is signed by the desk and by one bare openssl, and makes three rows of the table."""
    rows = list(bench.measure_desk(tmp_path, rounds=1, nodes=2))
    assert [row.limit for row in rows] == [2.0, 11.0, 1.0]
    assert all(min(*row.ours, *row.theirs) > 0 for row in rows)
    assert bench.table(rows).count("\n| ") == 4


def test_a_row_above_its_limit_says_so() -> None:
    """The ratio is the median of the rounds' ratios, and a limit that it is above is marked."""
    row = bench.Row(work="a", against="b", ours=[1.0, 6.0, 2.0], theirs=[1.0, 1.0, 1.0], limit=2.0)
    assert row.cells()[-2:] == ("2.00", "2.0")
    assert replace(row, limit=1.9).cells()[-2:] == ("2.00", "1.9, **missed**")
    assert replace(row, ours=[2.003] * 3).cells()[-2:] == ("2.00", "2.0")  # what is printed is judged
    assert replace(row, ours=[2.006] * 3).cells()[-2:] == ("2.01", "2.0, **missed**")


def test_where_the_desks_time_goes(tmp_path: Path) -> None:
    """The steps and the rest are together a whole run."""
    rows = desk_profile.measure(tmp_path, 2)
    *steps, _, (_, _, total) = rows  # the rest may be less than nothing here, with so few bundles
    assert abs(sum(value for _, _, value in rows[:-1]) - total) < 0.001
    assert all(value > 0 for _, _, value in steps)
    assert desk_profile.table(rows).count("\n| ") == len(rows) + 1


def test_what_a_command_with_nothing_due_loads(tmp_path: Path) -> None:
    """A quiet night loads a part of the program, and no more than half as much again as this page said at its writing."""
    bridge = start_up.bridge_with_nothing_due(tmp_path)
    modules, lines, others = start_up.loaded(bridge)
    assert 20 < modules < 45
    assert 3000 < lines < 10_000
    assert others > 0


def test_a_door_that_is_killed_while_nodes_ask(tmp_path: Path) -> None:
    """Two nodes get their certificates from a door that is killed once, and all that must not be is looked for."""
    run = door.measure_chaos(tmp_path, fleet.make_fleet(2, door.NAMES), kills=1, seed=1)
    assert len(run.history.delivered) == len(set(run.history.signed)) == 22
    good = run.history
    for changed, said in (
        ({"delivered": good.delivered[1:]}, "wanted 22 certificates"),
        ({"signed": [*good.signed, "AB"]}, "signed, and not recorded: AB"),
        ({"signed": [*good.signed, good.signed[0]]}, "signed more than once"),
        ({"remembered": good.remembered[1:]}, "delivered, and not remembered"),
        ({"wrong": ["cp-1: another key"]}, "another key"),
    ):
        assert said in "\n".join(replace(good, **changed).troubles())  # type: ignore[arg-type]
    assert not list(good.troubles())


def test_a_desk_that_does_not_sign_all_is_no_measurement(tmp_path: Path) -> None:
    """One bundle that the policy refuses ends the measurement."""
    made = fleet.make_fleet(2)
    made.bundles[1] = made.bundles[1].replace(b'"cluster": "bench"', b'"cluster": "other"')
    with pytest.raises(SystemExit):
        fleet.sign_inbox(tmp_path / "desk", made, 2)


@pytest.mark.kube("cfssl")
def test_the_curves(tmp_path: Path) -> None:
    """Both tables, and the values of which the plot is drawn."""
    curves.main(["--sizes", "1,3", "--rows", "0,5", "--concurrency", "2", "--requests", "4"], tmp_path)
    values = json.loads(tmp_path.joinpath("curves.json").read_text())
    assert [(one["rows"], one["csrs"]) for one in values["openssl"]] == [(0, 1), (0, 3), (5, 1), (5, 3)]
    assert [one["server"] for one in values["servers"]] == ["cfssl", "OpenBao"]
    assert tmp_path.joinpath("curves.md").read_text().count("\n| ") == 9


def test_the_scores_of_mutants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with many mutants weighs more in the score, and a mutant that timed out counts as noticed."""
    monkeypatch.setattr(mutation, "CACHE", tmp_path)
    large, small, absent = list(mutation.TESTS)[:3]
    for file, mutants, killed, timed_out in ((large, 300, 8, 1), (small, 10, 4, 0)):
        counts = {"mutants": mutants, "tried": 10, "killed": killed, "timed_out": timed_out, "survivors": []}
        tmp_path.joinpath(f"{file.replace('/', '_')}.json").write_text(json.dumps(counts))
    lines = mutation.table((large, small, absent)).splitlines()
    assert lines[2:] == [
        f"| `{large}` | 300 | 10 | 9 | 1 | 90.0% |",
        f"| `{small}` | 10 | 10 | 4 | 0 | 40.0% |",
        "| all | 310 | 20 | | | 88.4% |",
    ]


def test_each_file_of_the_checks_is_mutated() -> None:
    """Each file is mutated, with tests that exist."""
    checks = {str(path.relative_to(mutation.ROOT)) for path in mutation.ROOT.glob("bridge/pki/[!_]*.py")}
    assert set(mutation.TESTS) == {*checks, "bridge/state/install.py"}
    selected = {each.partition("::")[0] for tests in mutation.TESTS.values() for each in tests if each[0] != "-"}
    assert all((mutation.ROOT / test).exists() for test in selected)


@pytest.mark.skipif(exec_programs.helper("local-submit") is None, reason="install the Debian package certmonger")
@pytest.mark.kube("cmp-ra", "estserver")
def test_the_backends(tmp_path: Path) -> None:
    """Each beside the bare request, printed and written into its page between the marks alone."""
    page = tmp_path / "numbers.md"
    before = bench.NUMBERS.read_text()
    page.write_text(before)
    for name in backends.MEASURES:
        backends.main([name, "--requests", "2", "--rounds", "1", "--docs"], page)
    head, *written = page.read_text().split("<!-- numbers: written by `python -m tests.measure.backends")
    assert before.startswith(head)
    assert [(part.count("\n| 2 P-256 certificates"), bench.END in part) for part in written] == [(1, True)] * 3


@pytest.mark.kube("kube-apiserver", "etcd")
def test_the_gateway(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A burst is signed, all of it is in the record, and the table has a line for it."""
    page = tmp_path / "gateway.md"
    page.write_text((gateway.DOCS / "gateway.md").read_text())
    [found] = gateway.main(["--requests", "12", "--ca", "openssl", "--rounds", "1", "--docs"], tmp_path)
    assert found.audited == 12
    assert 20 < found.memory_mb < gateway.MOST_MEMORY_MB
    assert min(found.ca_alone.rate, found.api_alone.rate, found.gateway.rate) > 0
    assert set(found.gateway.cpu_ms) == {"gateway", "kube-apiserver", "etcd"}
    tables = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(tables) == 8
    assert "\n".join(tables[-3:]) in page.read_text()
    assert found.where() in page.read_text()


@pytest.mark.kube("cfssl", "step-ca", "kubeadm")
def test_the_page_of_tested_cas_has_the_kits_versions() -> None:
    """Where the machine has no say in them; the rows of the others are there, and a wrong cell is put right."""
    text = tested_cas.DOCUMENT.read_text(encoding="utf-8")
    found = tested_cas.in_page(text)
    pinned = {one.row: one.version() for one in tested_cas.TESTED if one.is_pinned}
    assert {row: found[row] for row in pinned} == pinned
    assert all(found[one.row] for one in tested_cas.TESTED)
    wrong = text.replace(f"| OpenBao | {pinned['OpenBao']} |", "| OpenBao | 1.0 |")
    assert tested_cas.in_page(wrong)["OpenBao"] == "1.0"
    assert tested_cas.written(wrong, pinned) == text


@pytest.mark.parametrize(
    ("away", "seconds"),
    [
        ({"one": [(1, 5)], "two": [(4, 8)], "three": [(3, 4.5)]}, 0.5),
        ({"one": [(1, 5)], "two": [(5, 8)], "three": [(0, 9)]}, 0),
        ({"one": [(1, 5), (6, 9)], "two": [(0, 10)], "three": [(2, 8)]}, 3),
    ],
)
def test_the_longest_time_without_any_server(away: dict[str, list[tuple[float, float]]], seconds: float) -> None:
    """Only where all are away at once, and from the first request without an answer to the first one with an answer."""
    record = rotation_clients.Record()
    for server, spans in away.items():
        for begin, end in spans:
            for at, answer in ((begin, Answer.AWAY), ((begin + end) / 2, Answer.SLOW), (end, Answer.SERVED)):
                record.asked.append(Asked(client="c", server=server, begin=at, end=at + 0.1, answer=answer))
    assert record.dark("c", list(away)) == pytest.approx(seconds)
    assert record.dark("c", list(away), but=[Answer.SLOW, Answer.AWAY]) == 0


def test_a_refusal_differs_from_a_server_that_is_away() -> None:
    """The exception, the status, or the words of kubectl show the difference."""
    errors = [ssl.SSLCertVerificationError("x"), ssl.SSLEOFError("x"), ConnectionRefusedError(), TimeoutError()]
    assert [rotation_clients.of_error(one) for one in errors] == [Answer.TLS, Answer.AWAY, Answer.AWAY, Answer.SLOW]
    statuses = [rotation_clients.of_status(one) for one in (200, 404, 401, 403, 503)]
    assert statuses == [Answer.SERVED, Answer.SERVED, Answer.UNKNOWN, Answer.LOADING, Answer.AWAY]
    words = ["error: You must be logged in to the server (Unauthorized)", "tls: failed to verify certificate: x509: a"]
    words += ["net/http: TLS handshake timeout", "dial tcp 198.18.77.61:6443: connect: connection refused"]
    found = [rotation_clients.of_words(one) for one in words]
    assert found == [Answer.UNKNOWN, Answer.TLS, Answer.SLOW, Answer.AWAY]


def test_each_kill_is_a_row() -> None:
    """It says in which phase each CA's files were; a command that had ended says so, and without kills there is no table."""
    killed = [
        rotation.Kill(node="cp1", seconds=7.4, is_over=False, phases={"ca": "trusted → issued", "etcd-ca": "trusted"}),
        rotation.Kill(node="w1", seconds=2.0, is_over=True, phases={"ca": "issued"}),
    ]
    step = rotation.Step(verb="issue", phase="issued", valid=[], killed=killed)
    assert rotation.kills([step]).splitlines()[2:4] == [
        "| `issue` | cp1 | 7 | trusted → issued | trusted |  | yes |",
        "| `issue`, already ended | w1 | 2 | issued |  |  | yes |",
    ]
    assert rotation.kills([rotation.Step(verb="issue", phase="issued", valid=[])]) == ""
