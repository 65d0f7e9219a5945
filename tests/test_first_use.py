"""
What a newcomer stumbled over in a walk by the pages alone: each stumble has a test that fails if it comes back.

A test is marked by the stumble's number in `STUMBLES`; those that concern pages are here. `pytest -m first_use` runs all.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.kit import picture, terminals

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    "the index": (DOCS / "README.md").read_text(encoding="utf-8"),
    **{path.name: path.read_text(encoding="utf-8") for path in (*DOCS.glob("*.md"), ROOT / "README.md")},
}

STUMBLES = {
    "1": "the pages do not travel with the program, and hints name a directory of the clone",
    "2": "a desk's directories belong to root, its job fails, its hints go in a circle, and `doctor` finds nothing",
    "3": "a node whose requests are carried looks for answers once a night",
    "4": "`doctor` finds nothing wrong with a file that can't be replaced, and puts local failures down to the CA",
    "5": "`settings check` says that nothing is wrong with an example's host and with files that are not there",
    "6": "`settings check` names one mistake of three",
    "7": "settings that are pasted collide with what `settings init` wrote",
    "8": "cfssl by its page can't work: address, names, TLS pair",
    "9": "files of a CA that are not there read as a refusal by the CA",
    "10": "a row is three lines at 80 columns, and nothing says that all is well",
    "11": "results have no colour, and an `ok` says wanted and found",
    "12": "the sentence about super-admin.conf is the first thing that each command says; the recorded session is stale",
    "13": "one cause gives twelve errors",
    "14": "`sh roles.sh` prints 705 lines, and ends half way behind `head`",
    "15": "`scripts/test` says for minutes neither how many, nor how long, nor what it leaves out",
    "16": "no page leads to a package of one's own",
    "17": "pages contradict each other and the program",
    "18": "pages are missing, and none shows what a command prints",
    "19": "units are written where no systemd runs, and two jobs do one work",
    "20": "`inspect` has no summary",
    "21": "the page's first command writes no file when nothing is due",
    "22": "`sign --approve` finds no terminal below `su`",
    "23": "a desk's record says three times that it signed what it signed once",
    "24": "the first steps have 39 certificates signed for a test",
    "25": "a person waits two minutes for a port where nothing listens; a secret that is not there has no hint",
    "26": "a broken certificate has no way out, and neither has its rollback",
    "27": "answers stay in the inbox, an upgrade to the same version, `help` unknown, two forms of `error`, a mount unsaid",
    "28": "an expired certificate of a component that can't be restarted stays; the emergency page takes the API away",
    "29": "generated pages speak Python; the change log is about versions that never were",
}


def marked(source: str) -> Iterator[str]:
    """The numbers of `@pytest.mark.first_use` in a module's text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.first_use":
            yield from (str(ast.literal_eval(one)) for one in node.args)


def test_each_stumble_has_a_test() -> None:
    """Each stumble's number is on a test; an unknown number, and a test without a mark, would be seen."""
    files = (ROOT / "tests").rglob("test_*.py")
    assert {number for file in files for number in marked(file.read_text(encoding="utf-8"))} == STUMBLES.keys()
    assert list(marked("@pytest.mark.first_use('7', '99')\ndef test_x(): ...\ndef test_y(): ...")) == ["7", "99"]


@pytest.mark.first_use("12")
def test_the_recorded_session_is_what_the_demo_shows() -> None:
    """Line by line, but for what differs from run to run: times, numbers, a temporary directory."""

    def steady(lines: list[str]) -> list[str]:
        plain = (re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines)
        paths = (re.sub(r"/\S+", "/…", line) for line in plain)
        return [words for line in paths if (words := re.sub(r"[0-9a-f-]*\d[0-9a-f-]*|\b[a-f]{8}\b", "0", line).strip())]

    session = ET.parse(DOCS / "session.svg")  # noqa: S314 (our own file)
    recorded = ["".join(text.itertext()) for text in session.iter() if text.tag.endswith("text")]
    demo = terminals.run([str(Path(sys.executable).with_name("ca-bridge")), "demo"])
    now = picture.steps(demo.terminal)
    assert [line for line in steady(now) if line not in steady(recorded)] == [], "run: python -m tests.kit.picture"
    assert "super-admin.conf is" not in demo.text
    assert "a new line" not in steady(recorded)


@pytest.mark.first_use("15")
def test_a_run_of_tests_says_what_it_runs(tmp_path: Path) -> None:
    """How many, and which kinds this machine leaves out, before the first one; a name that is none is an error."""
    (tmp_path / "test_it.py").write_text('def test_it() -> None:\n    """It."""\n')
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.conftest",
        "-p",
        "no:cacheprovider",
        "--numprocesses=2",
    ]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "KUBE_BIN_DIR": str(tmp_path / "none")}

    def run(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, name], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    there = run("test_it.py")
    assert there.returncode == 0, there.stdout + there.stderr
    before, _, after = there.stdout.partition("left out: tests with real programs: ")
    assert "\n1 tests: a part of all\n" in before
    assert "run tests/kit/binaries.sh (about 12 minutes, once)" in after
    for name in ("test_gone.py", "test_it.py::test_gone"):
        gone = run(name)
        assert gone.returncode == pytest.ExitCode.USAGE_ERROR
        assert f"wanted tests by these names, found none: {name}" in gone.stderr


@pytest.mark.first_use("16")
def test_a_page_leads_to_packages_of_ones_own() -> None:
    """The page names options that the script takes; the tests of releases make their packages with them, too."""
    page = PAGES["install.md"].partition("## As a package")[2].partition("\n## ")[0]
    (line,) = re.findall(r"^scripts/release .*?(?=  #)", page, re.MULTILINE)
    usage = subprocess.run([ROOT / "scripts/release", "--help"], capture_output=True, text=True, check=True).stdout
    assert [word for word in re.findall(r"--\w+", line) if word not in usage] == []
    assert set(re.findall(r"--\w+", line)) == {"--key", "--signers"}


def ratios(page: str) -> Iterator[tuple[float, float, float, bool]]:
    """The ratios of each row: ours divided by theirs, the ratio that is printed, its limit, and whether it says that it is missed."""
    row = r"^\|.*\| ([\d.]+) (?:s|MB) \| ([\d.]+) (?:s|MB) \| ([\d.]+) \| ([\d.]+)(, \*\*missed\*\*)? \|$"
    for ours, theirs, ratio, limit, missed in re.findall(row, page, re.MULTILINE):
        yield float(ours) / float(theirs), float(ratio), float(limit), bool(missed)


@pytest.mark.first_use("17")
def test_the_numbers_do_not_contradict_each_other() -> None:
    """A ratio is about what its row divides to (the page says why not exactly), and one above its limit says so."""
    page = (DOCS / "evidence/numbers.md").read_text(encoding="utf-8")
    rows = list(ratios(page))
    assert len(rows) >= 8
    assert [row for row in rows if abs(row[0] / row[1] - 1) > 0.1 or row[3] != (row[1] > row[2])] == []
    assert "A ratio is the median of the rounds' own ratios" in page
    assert list(ratios("| a | b | 11.2 s | 7.4 s | 1.46 | 1.3 |")) == [(11.2 / 7.4, 1.46, 1.3, False)]


#: A page, what it no longer says, and what it says instead, as the program does.
SAID_INSTEAD = {
    "README.md": ("no file is replaced before", "a certificate that fails a check is never installed"),
    "certificates.md": ("Nothing is replaced while", "the others are, unless `--all-or-nothing`"),
    "trouble.md": ("keys that others can read are refused", "`renew` warns of keys and secrets that others can read"),
    "comparison.md": ("renews no kubelet's rotating certificate", "only `gateway` and `serve` run all the time"),
}


@pytest.mark.first_use("17")
@pytest.mark.parametrize("name", SAID_INSTEAD)
def test_pages_say_the_same_as_the_program(name: str) -> None:
    """Sentences that other pages or the program proved wrong are gone, and those in their place are there."""
    gone, there = SAID_INSTEAD[name]
    assert (gone in PAGES[name], there in PAGES[name]) == (False, True)


@pytest.mark.first_use("17")
def test_paths_are_the_same_on_all_pages() -> None:
    """One layout of CA directories, and the installed program's path in every job."""
    shipped = [path for path in (ROOT / "config").rglob("*") if path.is_file()]
    texts = [*PAGES.values(), *(path.read_text(encoding="utf-8") for path in shipped)]
    directories = {found for text in texts for found in re.findall(r"/srv/ca/([\w.-]+)", text)}
    assert directories == {"ca", "etcd-ca", "front-proxy-ca"}
    programs = {
        found for text in texts for found in re.findall(r"^[\d*/]+ [\d*]+ \* .*?(/\S+/ca-bridge) ", text, re.MULTILINE)
    }
    assert programs == {"/usr/bin/ca-bridge"}


@pytest.mark.first_use("18")
def test_what_was_missing_is_there() -> None:
    """A chapter for each page that newcomers looked for, and a security policy."""
    headings = {heading.lower() for text in PAGES.values() for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    wanted = {
        *("the certificates of a kubeadm node", "symptoms", "many nodes", "network and privileges", "glossary"),
        *("leaving ca-bridge", "which page is for my ca", "kubernetes versions"),
    }
    assert wanted - headings == set()
    assert "## Reporting" in (ROOT / "SECURITY.md").read_text(encoding="utf-8")


@pytest.mark.first_use("18")
def test_there_are_about_two_dozen_pages() -> None:
    """Beside the index and the two that are looked up, and not 43 as there were; lab records are evidence."""
    pages = PAGES.keys() - {"the index", "README.md", "commands.md", "settings.md"}
    assert 20 <= len(pages) <= 26, sorted(pages)
    assert len(list((DOCS / "evidence").glob("*.md"))) >= 6


#: Words of a private English, and what the field says.
PRIVATE = {
    "live one": "the certificate in use",
    "told by": "reported by",
    "spends a signature": "has a certificate signed",
    "asks for an operator": "says that it needs an operator",
    "hoever": "an attacker, an operator, the node",
    "He can't": "the attacker can't",
}


@pytest.mark.first_use("29")
def test_pages_speak_the_fields_english() -> None:
    """No page has a word that a stranger has to decode."""
    found = {(name, word) for name, text in PAGES.items() for word in PRIVATE if word in text}
    assert found == set()


@pytest.mark.first_use("21")
def test_the_air_gaps_page_says_what_to_do_when_nothing_is_due() -> None:
    """The page says so beside its first command."""
    by_hand = PAGES["air-gap.md"].partition("## By hand")[2].partition("### ")[0]
    assert "With nothing due, `export` writes no file and says so; `ca-bridge export FILE all` asks for" in by_hand


@pytest.mark.first_use("24")
def test_the_first_steps_have_nothing_signed_for_a_test() -> None:
    """No block of the README or of the first renewal has it; the page says what it costs."""
    for name in ("README.md", "first-renewal.md"):
        blocks = re.findall(r"```sh\n(.*?)```", PAGES[name], re.DOTALL)
        assert len(blocks) >= 2
        assert [block for block in blocks if "backend test" in block] == []
    assert "Optional, before the first renewal: `ca-bridge backend test ca` has about 40" in PAGES["first-renewal.md"]


@pytest.mark.first_use("28")
def test_an_emergency_restarts_first_what_needs_it() -> None:
    """An emergency restarts first the components that need it, and says what it costs to restart the others."""
    emergency = PAGES["trouble.md"].partition("### Everything has expired")[2].partition("\n### ")[0]
    stale, everything = (emergency.index(f"`ca-bridge restart {words}`") for words in ("--force", "all --force"))
    assert stale < everything < emergency.index("takes the API server away for about a minute")


@pytest.mark.first_use("29")
def test_generated_pages_speak_no_python() -> None:
    """Generated pages show no Python, and the change log lists no faults of unreleased versions."""
    wanted = r"\('|None\b|`[A-Z][a-z]+[A-Z]?\w*`\.|see `[A-Z]|\bdataclass|frozenset|timedelta|\bTrue\b|\bFalse\b"
    found = {name: re.findall(wanted, PAGES[name]) for name in ("settings.md", "commands.md")}
    assert found == {"settings.md": [], "commands.md": []}
    assert re.findall(wanted, "default `('*',)`, see `Selector`, None: all") != []
    log = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^### (Security|Fixed)", log, re.MULTILINE) == []
    assert "It can do this:" in log
    assert PAGES["commands.md"].count("--state-dir <path>") == 1
