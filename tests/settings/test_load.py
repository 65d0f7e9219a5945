"""The settings file: strict, with file, line, wanted and found for everything that is wrong."""

from __future__ import annotations

import os
import tomllib
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.errors import SettingsError, SettingsProblem
from bridge.pki.expiry import Before, parse_duration
from bridge.settings import Source
from bridge.settings.load import load, parse
from bridge.system.paths import MAX_FILE_BYTES

FILE = Path("/etc/ca-bridge/config.toml")


def problems(text: str) -> list[SettingsProblem]:
    with pytest.raises(SettingsError) as e:
        parse(text, FILE)
    return e.value.problems


def test_an_empty_file_is_all_defaults() -> None:
    """Every key has a default."""
    settings = parse("")
    assert settings.node.pki_dir == Path("/etc/kubernetes/pki")
    assert settings.node.kubeconfig_dir == Path("/etc/kubernetes")
    assert settings.node.state_dir == Path("/var/lib/ca-bridge")
    assert settings.renewal.before == Before(remaining=timedelta(days=30))
    assert settings.renewal.validity == timedelta(days=365)
    assert settings.renewal.key == "same"
    assert settings.restart.method == "none"


def test_all_problems_come_at_once_with_their_lines() -> None:
    """An operator mends the file in one go."""
    text = (
        "[node]\n"
        'pki_dir = "etc"\n'
        "# a comment\n"
        "[renewal]\n"
        'befor = "30d"\n'
        "validity = 365\n"
        'key = "rsa-1024"\n'
        "[authority.ca]\n"
        'backend = "nowhere"\n'
    )
    found = [(p.key, p.line) for p in problems(text)]
    assert found == [
        ("node.pki_dir", 2),
        ("renewal.befor", 5),
        ("renewal.validity", 6),
        ("renewal.key", 7),
        ("authority.ca.backend", 9),
    ]


def test_each_fault_is_reported_in_the_words_of_the_file() -> None:
    """The message names types as TOML does, and not as Python does."""
    assert [p.found for p in problems("[restart]\nprove_for = true\n")] == ["true"]
    [twice] = problems("[restart.commands]\n[restart.commands]\n")
    assert "Cannot declare [restart.commands] twice" in twice.found
    [name] = problems('[certificate.apiserver]\nsans = ["a"]\n')
    assert "kubelet-server, the only one" in name.wanted


def test_a_problem_names_wanted_and_found() -> None:
    """A misspelt key is answered with the right one."""
    [problem] = problems('[renewal]\nbefor = "30d"\n')
    assert problem.file == FILE
    assert "before" in problem.wanted
    assert problem.found == "'befor' (did you mean 'before'?)"


def test_the_line_of_a_value_of_several_lines_is_its_first() -> None:
    """Positions are right after arrays that span lines."""
    text = '[authority.ca]\nbackend = "x"\nallow_extra_subject = [\n  "OU=a",\n]\n\n[backend.x]\ntype = 3\n'
    assert [(p.key, p.line) for p in problems(text)] == [("backend.x.type", 8)]


def test_the_line_of_each_key_is_where_a_person_finds_it() -> None:
    """Headers, dotted and quoted keys, comments, inline tables and texts of several lines."""
    text = (
        "# [a]\u2028x\n"
        'a . "b.c" = """\n'
        "[d]\n"
        '"""\n'
        "\n"
        "  [d]  # ]\n"
        "e = [[1,\n"
        "  2],  # ]\n"
        "  3]\r\n"
        "f = {g = 1, h = [\n"
        "]}\n"
        "[[i]]\n"
        "j = 1\n"
        "[d.k]\n"
        "l = '\u2028'\n"
    )
    tomllib.loads(text)
    wanted = {("a",): 2, ("a", "b.c"): 2, ("d",): 6, ("d", "e"): 7, ("d", "f", "g"): 10, ("d", "f", "h"): 10, ("i",): 12,
              ("i", "j"): 12, ("d", "k", "l"): 15, ("d", "k", "m"): 14, ("n",): None}  # fmt: skip
    source = Source(FILE, text)
    assert {key: source.line(key) for key in wanted} == wanted


def test_the_lines_of_many_problems_are_found_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """An inventory of 1000 nodes with the same mistake in each would hold up a gateway for hours; each statement is read twice."""
    text = "".join(f"[certificate.pair-{number}]\nsan = []\n" for number in range(100))
    read, loads = list[str](), tomllib.loads

    def counted(text: str) -> dict[str, object]:
        read.append(text)
        return loads(text)

    monkeypatch.setattr(tomllib, "loads", counted)
    assert len({p.line for p in problems(text)}) == 200
    assert len("".join(read)) <= 2 * len(text)


def test_a_default_file_that_leads_nowhere_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its disk may not be mounted: with the defaults a night with nothing due would be well; where no file is, it is."""
    file = tmp_path / "config.toml"
    monkeypatch.setattr("bridge.settings.load.DEFAULT_FILE", file)
    assert load(None).source.file is None
    file.symlink_to(tmp_path / "disk/config.toml")
    with pytest.raises(SettingsError, match="there is no such file, and a settings file is needed"):
        load(None)


def test_a_default_file_that_can_not_be_looked_for_is_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory that only root may enter, as here one that leads to itself: `renew` of another user ended with a traceback."""
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setattr("bridge.settings.load.DEFAULT_FILE", tmp_path / "loop/config.toml")
    with pytest.raises(SettingsError, match="wanted a settings file, found Too many levels"):
        load(None)


def test_a_byte_order_mark_is_named() -> None:
    """An editor of Windows writes one, and TOML has none; the same text without it is read."""
    with pytest.raises(SettingsError, match="found a byte order mark"):
        parse("\ufeff[node]\n")
    parse("[node]\n")


@pytest.mark.parametrize(
    "text", ["[node", "a = ", 'x = "unclosed', "[a]\n[a]\n", "a = 1\na = 2\n", f"a = {'9' * 5000}"]
)
def test_broken_toml_is_one_problem(text: str) -> None:
    """The parser's own reason is given."""
    [problem] = problems(text)
    assert problem.wanted == "TOML"


@pytest.mark.parametrize(
    "text",
    [
        "[authority.other]\nbackend = 'b'\n[backend.b]\ntype = 'vault'\n",
        "[backend]\nb = 3\n",
        "[authority]\nca = 3\n",
        "node = 3\n",
        "[nodes]\n",
        "[restart]\nmethod = 'static-pod'\n",
        "[renewal]\nmin_validity = '400d'\n",
        "[renewal]\nbefore = '365d'\n",
        "[renewal]\nbefore = '0%'\n",
        "[renewal]\nbefore = '100%'\n",
        "[node]\nkubernetes_version = '1'\n",
    ],
)
def test_what_makes_no_sense_is_refused(text: str) -> None:
    """Wrong names, types and contradictions are errors."""
    assert len(problems(text)) == 1


@pytest.mark.parametrize("name", ["CP-1", "cp 1", "../cp-1", "cp_1", "-cp", "a" * 254])
def test_a_node_has_a_name_that_kubernetes_gives(name: str) -> None:
    """Another one would be found by the first export alone, whose bundle can't have it; names with dots are good."""
    [problem] = problems(f'[node]\nname = "{name}"\n')
    assert (problem.key, "a node's name" in problem.wanted) == ("node.name", True)
    assert parse('[node]\nname = "cp-1.prod.example"\n').node.node_name == "cp-1.prod.example"


def test_identities_are_never_an_exception() -> None:
    """A CA may be allowed to add OU to a subject, but not O or CN, by which Kubernetes decides."""
    head = '[backend.b]\ntype = "vault"\n[authority.ca]\nbackend = "b"\n'
    settings = parse(f'{head}allow_extra_subject = ["OU=Platform"]\n')
    assert settings.authorities["ca"].extra_subject == {("2.5.4.11", "Platform")}
    for text in ("O=system:masters", "CN=x", "OU"):
        [problem] = problems(f'{head}allow_extra_subject = ["{text}"]\n')
        assert problem.key == "authority.ca.allow_extra_subject"


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("30s", timedelta(seconds=30)),
        ("1h30m", timedelta(minutes=90)),
        ("365d", timedelta(days=365)),
        ("2w", timedelta(days=14)),
    ],
)
def test_durations(text: str, duration: timedelta) -> None:
    """Units are w, d, h, m and s, and may be combined."""
    assert parse_duration(text) == duration


@pytest.mark.parametrize("value", ["", "0s", "30", "d", "-1d", "1y", "1.5h", 30, None, "9999999w", "٣d"])
def test_other_durations_are_refused(value: object) -> None:
    """A duration without a unit is not guessed."""
    with pytest.raises(ValueError):
        parse_duration(value)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs directories of root; run as root")
def test_a_settings_file_that_others_can_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file names programs that root runs."""
    monkeypatch.setattr("os.geteuid", lambda: 0)
    file = tmp_path / "config.toml"
    file.write_text("")
    file.chmod(0o644)
    load(file)
    file.chmod(0o664)
    with pytest.raises(SettingsError):
        load(file)


def test_a_named_settings_file_must_be_there(tmp_path: Path) -> None:
    """Only the default file may be missing."""
    with pytest.raises(SettingsError):
        load(tmp_path / "config.toml")


def test_a_huge_settings_file_is_refused(tmp_path: Path) -> None:
    """The reader's memory is bounded."""
    file = tmp_path / "config.toml"
    file.write_text("#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(SettingsError):
        load(file)
    file.write_text("#" * MAX_FILE_BYTES)
    load(file)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.text(max_size=200))
def test_any_text_is_settings_or_a_settings_error(text: str) -> None:
    """No input ends in another exception."""
    try:
        parse(text, FILE)
    except SettingsError as e:
        assert e.problems


@given(
    st.sampled_from(["node", "renewal", "restart", "backend", "authority"]),
    st.sampled_from(["pki_dir", "before", "validity", "key", "method", "ca", "etcd-ca", "x"]),
    st.sampled_from(
        ["3", "true", "''", "'30d'", "[]", "{}", "{type='x'}", "{backend='x'}", "1979-05-27", "[{a=1}]", "inf"]
    ),
)
def test_any_value_anywhere_is_settings_or_a_settings_error(table: str, key: str, value: str) -> None:
    """Each type of TOML in each place is taken or refused."""
    try:
        parse(f"[{table}]\n{key} = {value}\n", FILE)
    except SettingsError as e:
        assert all(p.line in (1, 2) for p in e.problems)  # 1: a default contradicts it


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://door:s3cret@db/door",
        "postgresql+psycopg://door:a/b?c#d@e@db/door",
        "postgresql://door:@db/door",
        "postgresql://door@db/door?password=s3cret",
        "postgresql://db/door?sslmode=require&sslpassword=s3cret",
        "mysql://door@db/door",
        "sqlite:////var/lib/door.db",
        "s3cret",
    ],
)
def test_the_url_of_a_database_has_no_password(url: str) -> None:
    """It is refused, and not repeated; the same URL without one is taken."""
    found = problems(f'[serve]\ndatabase = "{url}"\n')
    assert [one.key for one in found] == ["serve.database"]
    assert "s3cret" not in f"{found}"
    for good in (
        "postgresql://door@db:5432/door?sslmode=verify-full",
        "postgresql+psycopg:///door?host=/run/postgresql",
    ):
        assert parse(f'[serve]\ndatabase = "{good}"\n').serve.database == good
