"""The rules and the dashboard, on files that real runs of `renew` have written: each alert fires, and not on a healthy node."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from bridge.cli import renew as cli_renew
from bridge.cli.options import Output
from bridge.errors import BridgeError
from bridge.node.reading import read_node
from bridge.node.sample_pki import ca_certificate
from bridge.pki.certificates import pem
from bridge.pki.csr import generate_key
from bridge.renewal.selection import RunOptions
from bridge.rotation import Phase, places
from bridge.settings.tables import Settings
from tests.kit import exec_programs, metrics, next_cas, programs, promtool
from tests.kit.pki import Pki, handmade_pki
from tests.kit.promtool import Case
from tests.kit.renewing import settings_for

pytestmark = pytest.mark.kube("promtool")

ROOT = Path(__file__).parents[2]
RULES = ROOT / "config/prometheus/ca-bridge.rules.yml"
DASHBOARD = ROOT / "config/grafana/ca-bridge.json"

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
BEGIN = datetime.now(UTC)


class Node:
    """A node, its CAs, and its nights."""

    def __init__(self, directory: Path, *, days: int = 100, ca_days: int = 3650, more: str = "") -> None:
        end, ca_end = BEGIN + days * DAY, BEGIN + ca_days * DAY
        start = min(BEGIN, end - 365 * DAY)
        self.pki: Pki = handmade_pki(directory / "node", now=start, not_after=end, ca_not_after=ca_end)
        self.directory = directory
        self.file = directory / "ca-bridge.prom"
        self.settings: Settings = settings_for(self.pki, directory, f'[metrics]\nfile = "{self.file}"\n{more}')

    def night(self, number: float, *names: str) -> int:
        """A run of `renew` so many days after the first, and its exit code."""
        try:
            return cli_renew.renew(self.settings, RunOptions(names=names), self.clock(number), Output.TEXT)
        except BridgeError as e:
            print(e)
            return e.exit_code

    def rehearsal(self, *names: str) -> int:
        """Its exit code."""
        return cli_renew.rehearse(self.settings, RunOptions(names=names), self.clock(0), Output.TEXT)

    def clock(self, number: float) -> Callable[[], datetime]:
        """A clock so many days ahead."""
        return lambda: datetime.now(UTC) + number * DAY

    def break_ca(self, name: str) -> Callable[[], None]:
        """Its key is none; call what is returned to mend it."""
        key = self.directory / f"cas/{name}/ca.key"
        good = key.read_bytes()
        key.write_text("not a key\n")
        return lambda: _write(key, good)

    @property
    def text(self) -> str:
        """The text of the metrics file."""
        return self.file.read_text()


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def healthy(directory: Path) -> Iterator[Case]:
    """Nothing is due, and in the next nights neither; when no run comes, an alert says so."""
    node = Node(directory)
    assert node.night(0) == 0
    yield Case(text=node.text, later=HOUR, alerts=())
    yield Case(text=node.text, later=47 * HOUR, alerts=())
    yield Case(text=node.text, later=50 * HOUR, alerts=["CaBridgeRunMissing"])


def renewed(directory: Path) -> Iterator[Case]:
    """A renewal leaves nothing to tell."""
    node = Node(directory, days=20)
    assert node.night(0) == 0
    yield Case(text=node.text, later=HOUR, alerts=())


def failing(directory: Path) -> Iterator[Case]:
    """Two nights are none's business, the third is; due for days; a success ends it."""
    node = Node(directory, days=31)
    assert node.night(0) == 0
    mend = node.break_ca("etcd-ca")
    mend_too = node.break_ca("ca")
    for number in (1, 2):
        assert node.night(number) not in (0, 4)
    yield Case(text=node.text, later=HOUR, alerts=())
    assert node.night(3) not in (0, 4)
    failed = ["CaBridgeRunsFail", "CaBridgeAuthorityFails"]
    yield Case(text=node.text, later=HOUR, alerts=failed)
    assert node.night(8) not in (0, 4)
    late = [*failed, "CaBridgeCertificateOverdue", "CaBridgeNoSuccess"]
    yield Case(text=node.text, later=HOUR, alerts=late)
    mend()
    mend_too()
    assert node.night(9, "all") == 0
    yield Case(text=node.text, later=HOUR, alerts=())


def ending(directory: Path) -> Iterator[Case]:
    """Five days are few; and then it is over."""
    node = Node(directory, days=5)
    node.break_ca("ca")
    assert node.night(0) not in (0, 4)
    yield Case(text=node.text, later=HOUR, alerts=["CaBridgeCertificateEndsSoon", "CaBridgeCertificateOverdue"])
    assert node.night(6, "apiserver") not in (0, 4)
    yield Case(text=node.text, later=HOUR, alerts=["CaBridgeCertificateExpired", "CaBridgeCertificateOverdue"])


def missing(directory: Path) -> Iterator[Case]:
    """A file that is not there, though the others are fine."""
    node = Node(directory)
    (node.pki.pki_dir / "apiserver.crt").unlink()
    assert node.night(0) == 1
    yield Case(text=node.text, later=HOUR, alerts=["CaBridgeCertificateUnusable"])


def old_ca(directory: Path) -> Iterator[Case]:
    """The CA's own end is near."""
    node = Node(directory, days=60, ca_days=80)
    assert node.night(0) == 0
    yield Case(text=node.text, later=HOUR, alerts=["CaBridgeAuthorityEndsSoon"])


def pending(directory: Path) -> Iterator[Case]:
    """A person has the request, for a day, and for four; that is no failure, and after a week no success, either."""
    people = exec_programs.person(directory / "people")
    node = Node(directory, days=40, more=f'[backend.people]\ntype = "exec"\ncommand = ["{people}"]\n')
    assert node.night(0) == 0
    name, ours = "front-proxy-ca", node.settings
    asked = {**ours.authorities, name: dataclasses.replace(ours.authorities[name], backend="people")}
    tables = {**ours.authority_tables, name: {}}
    node.settings = dataclasses.replace(ours, authorities=asked, authority_tables=tables)
    assert node.night(1, "front-proxy-client") == 4
    assert node.night(2) == 4
    yield Case(text=node.text, later=HOUR, alerts=())
    assert node.night(5) == 4
    yield Case(text=node.text, later=HOUR, alerts=["CaBridgeRequestPending"])
    assert node.night(8) == 4
    yield Case(text=node.text, later=HOUR, alerts=["CaBridgeRequestPending", "CaBridgeNoSuccess"])


def not_in_use(directory: Path) -> Iterator[Case]:
    """Installed, and a copy of a kubeconfig still holds the old certificate."""
    copy = directory / "copy.conf"
    os.mkfifo(copy)
    node = Node(directory, days=20, more=f'[copies]\nfiles = ["{copy}"]\n')
    assert node.night(0) == 7
    yield Case(text=node.text, later=HOUR, alerts=["CaBridgeNotInUse"])
    copy.unlink()
    assert node.night(1) == 0
    yield Case(text=node.text, later=HOUR, alerts=())


def credential(directory: Path) -> Iterator[Case]:
    """The gateway's kubeconfig ends in two hours, and nothing is due; then it has ended."""
    now = datetime.now(UTC)  # `BEGIN` may be an hour ago: all tests were collected then
    own = handmade_pki(directory / "gateway", now=now - 30 * DAY, not_after=now + 2 * HOUR)
    node = Node(directory, more=f'[gateway]\nkubeconfig = "{own.kubeconfig_dir / "admin.conf"}"\n')
    assert node.night(0) == 0
    yield Case(text=node.text, later=HOUR, alerts=["CaBridgeCredentialEndsSoon"])
    yield Case(text=node.text, later=3 * HOUR, alerts=["CaBridgeCredentialExpired"])


def rehearsing(directory: Path) -> Iterator[Case]:
    """A rehearsal that fails tells what the renewal would; it is no failed run."""
    node = Node(directory)
    assert node.night(0) == 0
    mend = node.break_ca("front-proxy-ca")
    assert node.rehearsal("front-proxy-client") != 0
    yield Case(text=node.text, later=HOUR, alerts=["CaBridgeRehearsalFailed"])
    mend()
    assert node.rehearsal("front-proxy-client") == 0
    yield Case(text=node.text, later=HOUR, alerts=())


def replaced(directory: Path) -> Iterator[Case]:
    """Half a phase is an hour's business, both CAs are a quarter's; a third CA in the file is of no phase."""
    node, made = Node(directory), next_cas.make(directory / "next")["ca"]
    ours = node.settings.authorities
    node.settings = dataclasses.replace(
        node.settings, authorities={**ours, "ca": dataclasses.replace(ours["ca"], next=made.table)}
    )
    assert node.night(0) == 0
    yield Case(text=node.text, later=3 * HOUR, alerts=())
    ca = node.pki.pki_dir / "ca.crt"
    ca.write_bytes(ca.read_bytes() + pem(made.signer.certificate))
    assert node.night(0) == 0
    yield Case(text=node.text, later=HOUR / 4, alerts=())
    yield Case(text=node.text, later=3 * HOUR, alerts=["CaBridgeReplacementHalfDone"])
    found = places.look(node.settings, read_node(node.settings.node), ["ca"])["ca"]
    for file in found.trust_files(Phase.TRUSTED):
        file.path.write_bytes(file.data or b"")
    assert node.night(0) == 0
    yield Case(text=node.text, later=3 * HOUR, alerts=())
    os.utime(ca, times=(0, (BEGIN - 91 * DAY).timestamp()))
    assert node.night(0) == 0
    yield Case(text=node.text, later=HOUR, alerts=["CaBridgeReplacementOpen"])
    ca.write_bytes(ca.read_bytes() + pem(ca_certificate("third", generate_key("ecdsa-p256"), BEGIN, BEGIN + 900 * DAY)))
    assert node.night(0) == 0
    yield Case(text=node.text, later=3 * HOUR, alerts=["CaBridgeReplacementHalfDone"])


STORIES = (healthy, renewed, failing, ending, missing, old_ca, pending, not_in_use, credential, rehearsing, replaced)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """All of the stories."""
    return [case for story in STORIES for case in story(tmp_path_factory.mktemp(story.__name__))]


def alerts() -> dict[str, Any]:
    document = yaml.safe_load(RULES.read_text())
    return {rule["alert"]: rule for group in document["groups"] for rule in group["rules"]}


def test_prometheus_takes_the_rules_and_the_files(cases: list[Case]) -> None:
    """The rules, and each file as a whole."""
    command = [str(programs.require("promtool")), "check", "rules", str(RULES)]
    subprocess.run(command, check=True, capture_output=True)
    for case in cases:
        metrics.check(case.text)


def test_each_alert_fires_when_it_should_and_only_then(cases: list[Case], tmp_path: Path) -> None:
    """In each story exactly the alerts that it names; every alert is in one, and no story expects another."""
    assert {name for case in cases for name in case.alerts} == alerts().keys()
    found = promtool.run(promtool.unit_tests(cases, RULES), tmp_path / "tests.yml")
    assert found.returncode == 0, found.stdout + found.stderr


def test_that_look_can_fail(cases: list[Case], tmp_path: Path) -> None:
    """Each story without one of its alerts, or with one more, is a failure."""
    for case in (cases[0], next(case for case in cases if case.alerts)):
        for wrong in (
            {*case.alerts, "CaBridgeNotInUse"},
            sorted(case.alerts)[1:] if case.alerts else ["CaBridgeRunsFail"],
        ):
            other = Case(text=case.text, later=case.later, alerts=wrong)
            assert promtool.run(promtool.unit_tests([other], RULES), tmp_path / "tests.yml").returncode != 0


def test_what_an_alert_says(cases: list[Case], tmp_path: Path) -> None:
    """Its node and what it is about, in words; nothing is left unfilled."""
    for name, rule in alerts().items():
        case = next(case for case in cases if name in case.alerts)
        said = promtool.rendered(case.text, case.later, name, RULES, tmp_path / "tests.yml")
        assert 'summary="cp-1: ' in said, said
        assert f'severity="{rule["labels"]["severity"]}"' in said
        assert not re.search(r"<no value>|<error|\{\{|%!", said), said


def test_the_rules_know_all_metrics_of_a_file_or_say_why_not(cases: list[Case]) -> None:
    """A metric that no rule looks at is for people, who are named here; no rule looks at one that is not there."""
    written = {name for case in cases for name in metrics.samples(case.text)}
    looked_at = set(re.findall(r"ca_bridge_\w+", " ".join(rule["expr"] for rule in alerts().values())))
    assert looked_at <= written
    assert written - looked_at == {"ca_bridge_last_run_duration_seconds", "ca_bridge_last_rehearsal_seconds"}


def expressions() -> list[str]:
    """The expressions of the dashboard, for every node."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"].replace("$instance", ".*") for panel in panels for target in panel["targets"]]


def test_the_dashboard_shows_what_is_there(cases: list[Case], tmp_path: Path) -> None:
    """Each panel has a value in a file: those of a healthy node, a pending request, and a rehearsal."""
    assert len(expressions()) >= 10
    of_all = [one for one in expressions() if not re.search("pending|rehearsal", one)]
    found = promtool.run(promtool.unit_tests(cases[:1], RULES, of_all), tmp_path / "tests.yml")
    assert found.returncode == 0, found.stdout + found.stderr
    for word in ("pending", "rehearsal"):
        case = next(case for case in cases if f"ca_bridge_last_{word}" in case.text or f"_{word}_since" in case.text)
        ours = [one for one in expressions() if word in one]
        assert ours
        found = promtool.run(promtool.unit_tests([case], RULES, ours), tmp_path / "tests.yml")
        assert found.returncode == 0, found.stdout + found.stderr
    # a panel without a value is noticed
    assert promtool.run(promtool.unit_tests(cases[:1], RULES, ["ca_bridge_no"]), tmp_path / "tests.yml").returncode


def test_the_dashboard_is_one_for_grafana() -> None:
    """Panels do not lie on each other, have numbers of their own, and ask the data source that is chosen."""
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        ours = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & ours, panel["title"]
        assert max(x for x, _ in ours) < 24
        cells |= ours
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            assert '{instance=~"$instance"}' in target["expr"]
    assert [one["name"] for one in dashboard["templating"]["list"]] == ["datasource", "instance"]
