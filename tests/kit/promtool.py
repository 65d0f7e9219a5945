"""`promtool test rules` on metrics files that runs have written: which alerts fire, and when."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from tests.kit import metrics, programs

#: What node_exporter's target adds.
TARGET = 'instance="cp-1",job="node"'
_HOUR = timedelta(hours=1)
#: Metrics that are no time.
_NO_TIME = ("duration_seconds",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A metrics file, so long after it was written, and what is to be seen then."""

    text: str
    later: timedelta
    alerts: Collection[str]


def unit_tests(cases: Sequence[Case], rules: Path, expressions: Sequence[str] = ()) -> dict[str, Any]:
    """
    The unit tests, for `promtool`.

    Its clock begins at 0, so that all times of a file are taken relative to the end of its last run.

    Args:
        cases: Each a test.
        rules: The file with the rules.
        expressions: Must have a value in each case, too.
    """
    return {
        "rule_files": [str(rules)],
        "evaluation_interval": "1h",
        "tests": [_test(case, expressions) for case in cases],
    }


def _test(case: Case, expressions: Sequence[str]) -> dict[str, Any]:
    hours = case.later // _HOUR
    return {
        "interval": "1h",
        "input_series": [{"series": name, "values": f"{value}+0x{hours}"} for name, value in _series(case.text)],
        "promql_expr_test": [
            {
                "expr": '(count by (alertname) (ALERTS{alertstate="firing"})) > bool 0',
                "eval_time": f"{hours}h",
                "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(case.alerts)],
            },
            *(
                {
                    "expr": f"(count({one})) > bool 0",
                    "eval_time": f"{hours}h",
                    "exp_samples": [{"labels": "{}", "value": 1}],
                }
                for one in expressions
            ),
        ],
    }


def _series(text: str) -> list[tuple[str, float]]:
    found = metrics.samples(text)
    zero = found["ca_bridge_last_run_seconds"][""]
    return [
        (f"{name}{{{','.join(filter(None, (labels, TARGET)))}}}", value - zero if _is_time(name) else value)
        for name, samples in found.items()
        for labels, value in samples.items()
    ]


def _is_time(name: str) -> bool:
    return name.endswith("_seconds") and not name.endswith(_NO_TIME)


def run(document: dict[str, Any], place: Path) -> subprocess.CompletedProcess[str]:
    """
    Run `promtool test rules`.

    Args:
        document: As of `unit_tests`.
        place: For the file.
    """
    place.write_text(yaml.safe_dump(document, width=10_000))
    command = [str(programs.require("promtool")), "test", "rules", str(place)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def rendered(text: str, later: timedelta, alert: str, rules: Path, place: Path) -> str:
    """The labels and annotations of an alert that fires, as `promtool` prints them where it expected none."""
    document = unit_tests([Case(text=text, later=later, alerts=())], rules)
    [test] = document["tests"]
    del test["promql_expr_test"]
    test["alert_rule_test"] = [{"eval_time": f"{later // _HOUR}h", "alertname": alert, "exp_alerts": []}]
    found = run(document, place)
    assert found.returncode != 0
    return re.sub(r"\s+", " ", found.stdout + found.stderr).partition("got:")[2]
