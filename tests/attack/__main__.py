"""
`python -m tests.attack [--door] [--docs] [PYTEST-ARGUMENT...]`: tries every attack, and prints how many were tried and how many held.

Attacks are the tests below `tests/attack`, the hostile requests and answers of `SUITES`, and each test with the mark
`attack`, which names the finding of a review that it repeats. With `--docs` the table goes into the security page.

With `--door` only the hostile requests to `ca-bridge serve` are tried (`DOOR`), and counted by kind. The modules of
these tests have honest requests beside them, which get what they ask for.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests import counts
from tests.measure.__main__ import write_between

TESTS = Path(__file__).parents[1]
SUITES = ("tests/attack", "tests/gateway/test_hostile.py", "tests/gateway/test_traps.py", "tests/pki/test_verify.py")
#: Tests that send hostile requests to a door, by kind; each of their cases is one.
_DOOR = "tests/door/test_door.py::"
_APPROVALS = "tests/door/test_approvals.py::"
_PAGES = "tests/door/test_pages.py::"
_ENROLMENTS = "tests/door/test_enrolments.py::"
_TLS = "tests/door/test_https.py::"
DOOR = {
    "TLS": (
        f"{_TLS}test_a_certificate_that_is_not_good_ends_the_handshake",
        f"{_TLS}test_a_certificate_of_another_ca_ends_the_handshake",
        f"{_TLS}test_what_tls_lets_through_does_not_count",
        f"{_DOOR}test_there_is_no_renegotiation",
    ),
    "HTTP": (
        f"{_DOOR}test_a_request_has_one_length",
        f"{_DOOR}test_a_head_has_an_end",
        f"{_DOOR}test_silent_clients_keep_no_others_out",
        f"{_DOOR}test_a_slow_client_is_cut_off",
        f"{_DOOR}test_a_half_closed_client_keeps_no_connection",
        f"{_DOOR}test_a_client_that_reads_nothing_is_cut_off",
    ),
    "JSON and policy": (
        f"{_DOOR}test_what_is_no_bundle_is_not_kept",
        f"{_DOOR}test_sql_in_a_field_is_text",
        f"{_DOOR}test_the_policy_and_the_proof_decide",
        f"{_DOOR}test_strangers_fill_nothing_while_a_ca_is_down",
    ),
    "one-time secrets": (
        "tests/pki/test_node_proofs.py::test_another_header_proves_nothing",
        f"{_ENROLMENTS}test_another_nodes_request_is_refused",
        f"{_ENROLMENTS}test_a_proof_for_another_request_is_refused",
        f"{_ENROLMENTS}test_of_two_requests_at_the_same_time_one_wins",
        f"{_ENROLMENTS}test_the_policy_decides_what_a_secret_is_good_for",
        f"{_ENROLMENTS}test_a_withdrawn_secret_lets_no_one_in",
        f"{_ENROLMENTS}test_a_secret_ends_by_itself",
    ),
    "EST": ("tests/door/test_est_hostile.py",),
    "decisions of people": (
        f"{_APPROVALS}test_a_row_in_the_database_approves_nothing",
        f"{_APPROVALS}test_who_may_not_decide",
        f"{_APPROVALS}test_who_brings_a_request_does_not_decide_about_it",
        f"{_APPROVALS}test_a_signature_is_for_one_decision",
        f"{_APPROVALS}test_what_is_no_decision_decides_nothing",
    ),
    "the page": (
        f"{_PAGES}test_a_forged_form_decides_nothing",
        f"{_PAGES}test_no_page_can_be_framed_or_loads_anything",
        f"{_PAGES}test_who_has_no_persons_certificate_sees_nothing",
        f"{_PAGES}test_markup_in_every_field_is_text",
        f"{_PAGES}test_markup_in_a_request_is_text",
    ),
    "revocations": ("tests/door/test_revocations.py::test_nothing_hostile_is_revoked",),
}
PAGE = TESTS.parent / "docs/security.md"
START = "<!-- attacks: written by `python -m tests.attack --docs` -->"
DOOR_START = "<!-- door: written by `python -m tests.attack --door --docs` -->"


class Results:
    """Counts what was tried and what held, by the file of the test, or by the kind of a request to the door."""

    def __init__(self, *, door: bool) -> None:
        self._door = door
        self.tried: Counter[str] = Counter()
        self.held: Counter[str] = Counter()
        self.findings: dict[str, bool] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Each case that a test says it has tried; a test that says nothing is one case."""
        if report.when != "call" and not report.failed:
            return
        file = report.nodeid.partition("::")[0].removeprefix("tests/")
        cases = sum(counts.of([report]).values()) or 1
        key = _kind(report.nodeid) if self._door else f"`{file}`"
        self.tried[key] += cases
        self.held[key] += cases if report.passed else 0
        for name, value in report.user_properties:
            if name == "attack":
                self.findings[str(value)] = report.passed and self.findings.get(str(value), True)

    def table(self) -> str:
        """Markdown: a row a file, and the sum."""
        rows = [f"| {key} | {tried:,} | {self.held[key]:,} |" for key, tried in sorted(self.tried.items())]
        total = f"| **all** | **{self.tried.total():,}** | **{self.held.total():,}** |"
        if self._door:
            return "\n".join(
                ["| hostile requests to the door | tried | held |", "| --- | ---: | ---: |", *rows, total, ""]
            )
        held = sum(self.findings.values())
        return "\n".join(
            [
                f"Findings of the last review that are tried again: {len(self.findings)}, of which {held} hold.",
                "",
                "| where | attacks tried | held |",
                "| --- | ---: | ---: |",
                *rows,
                total,
                "",
            ]
        )


def _kind(nodeid: str) -> str:
    """The kind of request to the door that a test's case is."""
    test = nodeid.partition("[")[0]
    return next(kind for kind, tests in DOOR.items() if test.startswith(tests))


def marked() -> list[str]:
    """The tests with the mark `attack` outside of the suites, by their ids."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "attack", "tests"]
    listed = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if "::" in line and not line.startswith(SUITES)]


def main() -> None:
    """Try, print, write; exits as pytest does."""
    arguments, door = (
        [argument for argument in sys.argv[1:] if argument not in {"--docs", "--door"}],
        "--door" in sys.argv,
    )
    results = Results(door=door)
    tests = [one for some in DOOR.values() for one in some] if door else [*SUITES, *marked()]
    code = pytest.main(["-q", *arguments, *tests], plugins=[results])
    print(f"\n{results.table()}")
    if "--docs" in sys.argv and code == pytest.ExitCode.OK:
        write_between(PAGE, DOOR_START if door else START, results.table())
    raise SystemExit(code)


if __name__ == "__main__":
    main()
