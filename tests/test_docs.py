"""Documents and examples say what is true: commands, settings, exit codes, links."""

from __future__ import annotations

import ast
import dataclasses
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any, get_args, get_type_hints
from xml.etree import ElementTree as ET

import pytest

from bridge.ca import registry
from bridge.cli.app import EXAMPLES, TASKS, examples_of
from bridge.cli.pages import sections, topics
from bridge.cli.settings import initial
from bridge.contract import GIVEN, BackendSettings, Secret
from bridge.errors import Exit, SettingsError
from bridge.settings.load import parse
from bridge.settings.pair_tables import PairSettings
from bridge.settings.tables import AuthoritySettings
from bridge.specs import SPECS
from tests.kit import manual, picture, settings_page
from tests.kit.commands import NAME, commands, help_of, lines_in, why_not
from tests.kit.pki import KubeadmVersion
from tests.measure import pictures

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
EXAMPLE = ROOT / "config/config.toml"

#: `python -m tests.test_docs` writes what is generated; tests compare it.
COMMANDS, SETTINGS = ROOT / "docs/commands.md", ROOT / "docs/settings.md"


CERTIFICATES = ROOT / "docs/certificates.md"
TABLE, END = "<!-- certificates: written by `python -m tests.test_docs` -->", "<!-- end of certificates -->"
#: Who reads a certificate that no component of the node does.
READERS = {
    "admin.conf": "administrators, kubeadm",
    "super-admin.conf": "`kubeadm init` alone",
    "etcd-healthcheck-client": "kubeadm, health checks of etcd",
}


def certificates_table() -> str:
    """A row for each certificate: file, CA, subject, usages, who reads it, whether that needs a restart."""
    rows = [
        "| certificate | file | CA | subject | usages | who reads it | restart |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, spec in SPECS.items():
        common_name = spec.common_names[0].replace("{node}", "NODE")
        subject = ", ".join([f"CN={common_name}", *(f"O={group}" for group in sorted(spec.groups[0]))])
        usages = ", ".join(sorted(eku.label for eku in spec.ekus))
        file = "the kubelet's `pki` directory" if spec.kubelets else f"`{spec.base}`"
        reader = spec.component.value if spec.component else READERS[name]
        restart = "no" if spec.reloaded else "yes"
        rows.append(f"| {name} | {file} | {spec.authority.name} | `{subject}` | {usages} | {reader} | {restart} |")
    return "\n".join(rows)


def certificates_page() -> str:
    """The page with today's table in it."""
    before, _, rest = CERTIFICATES.read_text(encoding="utf-8").partition(TABLE)
    return f"{before}{TABLE}\n\n{certificates_table()}\n\n{END}{rest.partition(END)[2]}"


#: The last section of each command's help, before its examples.
COMMON = re.compile(r"\n\nOptions of every command:\n(.*?)(?=\n\n|$)", re.DOTALL)


def commands_page() -> str:
    """Every command's help, and once what all of them have."""
    helps = {" ".join((NAME, *one.words)): help_of(one.words) for one in commands()}
    [common] = {dedent(found) for text in helps.values() for found in COMMON.findall(text)}
    head = (
        "# Commands\n\n<!-- written by `python -m tests.test_docs` -->\n\n"
        "For operators who look up an option: what each command prints with `-h`.\n"
        "[Exit codes](trouble.md#exit-codes) says how each may end."
    )
    parts = [
        head,
        f"## Options of every command\n\n```\n{common}\n```",
        *(f"## {name}\n\n```\n{COMMON.sub('', text)}\n```" for name, text in helps.items()),
    ]
    return "\n\n".join(parts) + "\n"


def test_the_commands_page_is_what_the_program_says() -> None:
    """An option that is not on the page, or no longer in the program, fails here."""
    page = commands_page()
    assert COMMANDS.read_text(encoding="utf-8") == page, "run: python -m tests.test_docs"
    assert [page.count(option) for option in ("--state-dir <path>", "--verbose")] == [1, 1]


def test_the_page_of_certificates_has_all_of_them() -> None:
    """A certificate that is added to the program, or changed, fails here."""
    assert CERTIFICATES.read_text(encoding="utf-8") == certificates_page(), "run: python -m tests.test_docs"
    assert certificates_table().count("\n") == len(SPECS) + 1


def test_the_settings_page_is_what_the_program_reads() -> None:
    """A key that is not on the page, or that says nothing of itself, fails here."""
    assert SETTINGS.read_text(encoding="utf-8") == settings_page.page(), "run: python -m tests.test_docs"
    keys = [row for _, _, rows in settings_page.tables() for row in rows]
    assert len(keys) > 100
    assert [row[0] for row in keys if not row[-1].endswith(".")] == []


def test_the_manual_is_what_the_program_says() -> None:
    """A page for each command, and none of what is gone."""
    there = {path.name: path.read_text(encoding="utf-8") for path in manual.DIRECTORY.glob("*")}
    assert there == manual.pages(), "run: python -m tests.test_docs"


def test_each_command_has_a_task_and_an_example() -> None:
    """`bridge/cli/app.py` has each command and no others; each example can be typed."""
    names = {one.name: hasattr(one.context.command, "commands") for one in commands() if one.words}
    tasks = [name for ours in TASKS.values() for name in ours]
    assert sorted(tasks) == sorted(name for name in names if " " not in name)
    found = {name: examples_of(name) for name, is_group in names.items() if not is_group}
    assert [name for name in found if not found[name]] == []
    shown = sorted(example for examples in found.values() for example in examples)
    assert shown == sorted((f"{NAME} {line}", text) for line, text in EXAMPLES)
    for line, _ in shown:
        assert why_not(line) is None


@pytest.mark.first_use("7")
def test_a_page_of_quick_start_can_be_pasted() -> None:
    """The settings on it are complete, and are what `settings init KIND` puts into force."""
    pages = (ROOT / "docs/first-renewal.md", ROOT / "docs/air-gap.md")
    texts = [found for page in pages for found in re.findall(r"```toml\n(.*?)```", page.read_text(), re.DOTALL)]
    assert len(texts) == 4
    for text in texts:
        settings = parse(text)
        found = registry.configured(settings, settings.authorities)
        assert set(found) == {"ca", "etcd-ca", "front-proxy-ca"}
        written = parse(initial(found["ca"].type_name))
        assert registry.configured(written, written.authorities) == found


KINDS = ("cfssl", "cmp", "desk", "door", "est", "exchange", "exec", "kubernetes", "openssl", "vault")

_TYPES = {"desk": "openssl"}


@pytest.mark.first_use("7")
@pytest.mark.parametrize("kind", KINDS)
def test_a_kinds_settings_load_as_they_are(kind: str) -> None:
    """The files of `ca-bridge settings init KIND` have all three authorities, and each of the program's tables once."""
    settings = parse(initial(kind))
    found = registry.configured(settings, settings.authorities)
    assert set(found) == {"ca", "etcd-ca", "front-proxy-ca"}
    assert {one.type_name for one in found.values()} == {_TYPES.get(kind, kind)}
    for table in ("node", "renewal", "restart", "hooks", "cluster", "audit", "backups", "copies", "users", "metrics"):
        assert initial(kind).count(f"\n[{table}]") == 1 or kind == "desk"


@pytest.mark.first_use("7")
def test_settings_without_a_kind_name_no_ca() -> None:
    """Every kind's example is behind `#`; the word of none that there is is refused."""
    text = initial(None)
    settings = parse(text)
    assert settings == dataclasses.replace(parse(""), source=settings.source)
    for kind in set(KINDS) - {"desk"}:
        assert f'\n# type = "{_TYPES.get(kind, kind)}"' in text
    with pytest.raises(SettingsError, match="did you mean 'vault'"):
        initial("valt")


def _uncommented(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        yield line[2:] if re.match(r"# (\[.*\]|\"?[\w.]+\"? = .*)$", line) else line


def test_every_key_in_the_example_exists_and_shows_its_default() -> None:
    """With all comments taken away it still loads; the tables that are not a CA's then say what an empty file means."""
    text = "\n".join(_uncommented(iter(EXAMPLE.read_text(encoding="utf-8").splitlines())))
    keys = ('desk_key = "/etc/ca-bridge/desk.pem"', 'order_key = "/etc/ca-bridge/admin.pem"')
    for without_default in ('kubernetes_version = "1.37"', 'name = "cp-1"', 'keep_total = "1GiB"', *keys):
        assert without_default in text
        text = text.replace(without_default, "")
    settings = parse(text)
    registry.configured(settings, settings.authorities)
    empty = parse("")
    settings = dataclasses.replace(settings, restart=dataclasses.replace(settings.restart, commands={}))
    settings = dataclasses.replace(settings, node=dataclasses.replace(settings.node, pairs=()))
    for table in ("node", "renewal", "restart", "hooks", "cluster", "audit", "backups"):
        assert getattr(settings, table) == getattr(empty, table)


def _keys(schema: type[Any]) -> Iterator[str]:
    """As they are written in a table, and in the tables within it."""
    hints = get_type_hints(schema)
    for field in (one for one in dataclasses.fields(schema) if GIVEN not in one.metadata):
        types = [hints[field.name], *get_args(hints[field.name])]
        tables = [one for one in types if dataclasses.is_dataclass(one) and not hasattr(one, "from_setting")]
        yield f"{field.name}_file" if Secret in tables else field.name
        for table in tables:
            yield from _keys(table) if table is not Secret and isinstance(table, type) else ()


def test_every_key_is_in_the_example() -> None:
    """The example has the program's tables, uncommented; a backend's keys are in its kind's."""
    tables = tomllib.loads("\n".join(_uncommented(iter(EXAMPLE.read_text(encoding="utf-8").splitlines()))))
    for name in ("node", "renewal", "restart", "hooks", "cluster", "audit", "backups"):
        fields = dataclasses.fields(getattr(parse(""), name))
        assert set(tables[name]) == {field.name for field in fields if GIVEN not in field.metadata}
    others = {"static_pod", "component"}  # of which a pair has one, or a `reload`
    assert set(_keys(PairSettings)) == {*tables["certificate"]["registry"], *others} - {"copies"}
    vault = tomllib.loads("\n".join(_uncommented(iter(initial("vault").splitlines()))))
    assert {field.name for field in dataclasses.fields(AuthoritySettings)} <= set(vault["authority"]["ca"])
    common = set(_keys(BackendSettings))
    for kind in set(KINDS) - {"desk"}:
        words = set(re.findall(r"\w+", (ROOT / f"config/{kind}/config.toml").read_text(encoding="utf-8")))
        if kind == "openssl":
            words |= set(re.findall(r"\w+", (ROOT / "config/openssl/hsm.toml").read_text(encoding="utf-8")))
        keys = set(_keys(registry.installed()[_TYPES.get(kind, kind)].load().settings_type))
        assert len(keys - common) >= 2
        assert keys - common <= words, kind
        assert common <= words or kind == "exchange"  # it looks once a run


def settings_in_sentences(text: str) -> set[str]:
    """Keys in such as `[restart] method = "none"`."""
    return set(re.findall(r"`(?:\[\w+\] )?(\w+) = [^`]+`", text))


def test_a_setting_that_a_sentence_names_is_in_the_examples() -> None:
    """The examples are loaded by tests; a sentence is not."""
    examples = "\n".join(found.read_text(encoding="utf-8") for found in (ROOT / "config").rglob("*.toml"))
    known = set(re.findall(r"^\W*(\w+) = ", examples, re.MULTILINE))
    for path in DOCUMENTS:
        assert settings_in_sentences(path.read_text(encoding="utf-8")) <= known, path
    assert len(settings_in_sentences((ROOT / "docs/after-the-installation.md").read_text(encoding="utf-8"))) >= 4
    assert not settings_in_sentences('say `[backend] kye = "x"`') <= known


def test_a_key_that_is_named_with_its_table_is_there() -> None:
    """A key that a page names with its table, such as `renewal.before`, exists."""
    empty = parse("")
    keys = {field.name: getattr(empty, field.name) for field in dataclasses.fields(empty)}
    tables = {name: value for name, value in keys.items() if dataclasses.is_dataclass(value) and name != "source"}
    files = {"json", "jsonl", "head", "damaged"}  # `audit.jsonl` is no key
    named: set[tuple[str, str]] = set()
    for path in DOCUMENTS:
        found = re.findall(rf"`({'|'.join(tables)})\.([a-z]\w*)`", path.read_text(encoding="utf-8"))
        named |= {(table, key) for table, key in found if key not in files}
    assert len(named) > 8
    assert {(table, key) for table, key in named if not hasattr(tables[table], key)} == set()


def test_the_exit_codes_on_their_page_are_the_programs() -> None:
    """A code is a promise."""
    page = (ROOT / "docs/trouble.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([0-9]) \| ", page, re.MULTILINE)
    promised = {value for name, value in vars(Exit).items() if name.isupper() and isinstance(value, int)}
    assert {int(row) for row in rows} == promised
    order = ", ".join(map(str, Exit.PRECEDENCE))
    assert f"the first of {order} counts" in page


DOCUMENTS = sorted(
    [
        *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "README.md", "SECURITY.md")),
        *(path for folder in ("config", "docs", "tests") for path in (ROOT / folder).rglob("*.md")),
    ]
)


def by_path(path: Path) -> str:
    """A test's name."""
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", DOCUMENTS, ids=by_path)
def test_one_sentence_a_line(path: Path) -> None:
    """Each line of prose has one sentence, so that a change is seen sentence by sentence."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    prose = [line for line in text.splitlines() if not line.startswith(("|", "- ", "#", "<"))]
    assert not [line for line in prose if re.search(r"[a-z]\. [A-Z]", line)]


def names_in(path: Path) -> set[str]:
    """A file's tests, as pytest names them: `test_…`, and `Test…::test_…`."""

    def found(body: list[ast.stmt], within: str) -> Iterator[str]:
        for one in body:
            if isinstance(one, ast.ClassDef):
                yield from found(one.body, f"{within}{one.name}::")
            elif isinstance(one, ast.FunctionDef) and one.name.startswith("test"):
                yield f"{within}{one.name}"

    return set(found(ast.parse(path.read_text(encoding="utf-8")).body, ""))


def named_in_vain(text: str) -> set[str]:
    """What a document names of `tests/….py::…` and is not there."""
    named = set(re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)`", text))
    return {
        f"{path}::{test}" for path, test in named if not (ROOT / path).is_file() or test not in names_in(ROOT / path)
    }


@pytest.mark.parametrize("path", DOCUMENTS, ids=by_path)
def test_each_test_that_a_document_names_exists(path: Path) -> None:
    """A sentence about security is worth as much as the test that shows it."""
    assert named_in_vain(path.read_text(encoding="utf-8")) == set()


def test_a_test_that_is_not_there_is_found() -> None:
    """A missing file, class or test name is found; the security model names many that exist."""
    for gone in ("tests/gone.py::test_x", "tests/test_docs.py::test_gone", "tests/test_docs.py::TestGone::test_x"):
        assert named_in_vain(f"shown by `{gone}`, once") == {gone}
    assert (ROOT / "docs/security.md").read_text(encoding="utf-8").count(".py::test_") > 40


def links_in(text: str) -> set[tuple[str, str]]:
    """Path and anchor of each link that leads to a file of the project."""
    return {(path, anchor) for path, anchor in re.findall(r"\]\(([^)#:]*)#?([^):]*)\)", text) if path or anchor}


def anchors_of(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path, text: str) -> set[tuple[str, str]]:
    """Those that lead to no file, or to no heading of it."""

    def leads(target: str, anchor: str) -> bool:
        file = path.parent / target if target else path
        here = text if not target else file.read_text(encoding="utf-8") if file.is_file() else ""
        return file.exists() and (not anchor or anchor in anchors_of(here))

    return {(target, anchor) for target, anchor in links_in(text) if not leads(target, anchor)}


@pytest.mark.parametrize("path", DOCUMENTS, ids=by_path)
def test_links_lead_somewhere(path: Path) -> None:
    """Each link leads to a file of the project, or to a heading in it; a twin leads nowhere."""
    assert broken_links(path, path.read_text(encoding="utf-8")) == set()
    assert broken_links(path, "# A\n[x](#b), [y](gone.md), [z](#a)") == {("", "b"), ("gone.md", "")}


def open_secrets(text: str) -> list[str]:
    """Lines of shell that write a secret into a file that others can read for an instant, or for good."""
    found = []
    for block in re.findall(r"^ *```sh\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            is_secret = re.search(r"> *\S*(token|password|passphrase|secret|role-id|\.key|\.hex|pin)\b", line)
            if is_secret and "umask 077" not in block:
                found.append(line)
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=by_path)
def test_no_page_writes_a_secret_that_others_can_read(path: Path) -> None:
    """As it is typed, with the usual umask; a twin without one is found."""
    assert open_secrets(path.read_text(encoding="utf-8")) == []
    assert open_secrets("```sh\nopenssl rand -hex 32 > a/password\n```\n") == ["openssl rand -hex 32 > a/password"]


def test_the_index_leads_to_every_page() -> None:
    """The index links every page; the README leads to the index, and to some pages at once."""
    docs = ROOT / "docs"
    index = {target for target, _ in links_in((docs / "README.md").read_text(encoding="utf-8"))}
    assert {str(page.relative_to(docs)) for page in docs.rglob("*.md")} - {"README.md"} <= index
    assert "docs/README.md" in {target for target, _ in links_in(README.read_text(encoding="utf-8"))}


#: The first questions of a reader, by their links in docs/README.md, and words that the answers have.
ANSWERS = {
    "certificates.md#the-certificates-of-a-kubeadm-node": ("etcd-ca", "serverAuth", "who reads it"),
    "first-renewal.md#which-page-is-for-my-ca": ("Microsoft AD CS", "EJBCA", "AWS", "step-ca"),
    "install.md#kubernetes-versions": ("1.37", "1.34", "1.20"),
    "install.md#without-a-network": ("install", ".run"),
    "install.md#verify-a-release": ("ssh-keygen -Y verify",),
    "first-renewal.md#on-the-node": ("ca-bridge doctor", "1 renewed"),
    "run-nightly.md#run-it-every-night": ("setup systemd --enable", "setup cron --enable"),
    "run-nightly.md#the-order": ("one after the other",),
    "after-the-installation.md#restarts": ("static-pods", "the API never stops answering"),
    "after-the-installation.md#what-is-in-use-and-the-way-back": ("prove", "rollback"),
    "backups.md#rollback": ("ca-bridge rollback",),
    "backups.md#where-things-are": ("/etc/ca-bridge/config.toml", "/var/lib/ca-bridge"),
    "backups.md#the-audit-log": ("audit.jsonl", "time, user and host"),
    "doctor.md#before-it-matters-a-rehearsal": ("renew --rehearse",),
    "monitoring.md#monitoring": ("Nagios", "Prometheus"),
    "monitoring.md#its-own-credentials": ("client_cert", "auth.secret_id_file"),
    "trouble.md#5-refused": ("profile or role",),
    "trouble.md#symptoms": ("kubectl logs", "NotReady", "x509"),
    "trouble.md#everything-has-expired": ("ca-bridge renew all",),
    "trouble.md#keys-have-leaked": ("ca-bridge renew all",),
    "replace-the-ca.md#the-phases": ("ca-bridge rotate-ca trust", "ca-bridge rotate-ca drop"),
    "air-gap.md#by-hand": ("ca-bridge export", "ca-bridge import"),
    "door.md#begin": ('type = "door"', "ca-bridge serve"),
    "approvals.md#when-a-request-waits-for-you": ("ca-bridge approvals list", "as before"),
    "air-gap.md#begin": ("desk-policy.toml", "ca-bridge sign"),
    "kubelets.md#the-client-certificate-kubeletconf": ("rotateCertificates",),
    "day-0.md#a-cluster-that-has-its-ca-keys-on-the-nodes": ("shred -u", "doctor --ca-keys /", "EXTERNALLY MANAGED"),
    "gateway.md#in-place-of-kube-controller-managers-signer": ("--controllers=csrsigner", "kubeadm init phase"),
    "kubelets.md#have-kubelets-ask-for-their-serving-certificates": ("ca-bridge kubelets on", "kubectl top nodes"),
    "users.md#a-person": ("ca-bridge kubeconfig request",),
    "changes.md#another-name-or-address": ("--add-san",),
    "changes.md#what-this-node-may-ask-for": ("[policy]", "sans"),
    "changes.md#versions-and-upgrades-of-kubernetes": ("kubeadm upgrade apply", "--certificate-renewal=false"),
    "install.md#connections-of-a-node": ("6443", "2379", "10250"),
    "certificates.md#what-was-asked-for": ("subject", "SANs"),
    "security.md#reporting-and-who-reviewed-this": ("Report a vulnerability", "no outside party has reviewed"),
    "security.md#a-stolen-node": ("key",),
    "#glossary": ("authority", "backend", "bundle", "continuity proof"),
    "install.md#leaving-ca-bridge": ("systemctl disable",),
}


def section(page: Path, anchor: str) -> str:
    """The text below a heading, up to the next one that is no deeper; of a page's first heading, all of it."""
    depth, in_code, found = 0, False, []
    for line in page.read_text(encoding="utf-8").splitlines():
        in_code ^= line.lstrip().startswith("```")
        deep = 0 if in_code else len(line) - len(line.lstrip("#"))
        if deep and anchors_of(line) == {anchor}:
            depth = deep
        elif depth and 0 < deep <= depth:
            break
        elif depth:
            found.append(line)
    return "\n".join(found)


def test_each_question_is_answered_on_one_page() -> None:
    """The list of questions links a heading whose section has the answer's words; a removed heading, or an empty section, has none."""
    docs = ROOT / "docs"
    asked = section(docs / "README.md", "questions")
    rows = re.findall(r"^\| ([^|]+\?) \| \[[^]]+\]\(([^)]+)\) \|$", asked, re.MULTILINE)
    assert [target for _, target in rows] == list(ANSWERS)
    assert len(rows) == asked.count("\n| ") - 2 >= 28
    for target, words in ANSWERS.items():
        path, _, anchor = target.partition("#")
        text = section(docs / (path or "README.md"), anchor)
        assert [word for word in words if word not in text] == [], target
    assert section(docs / "install.md", "gone") == ""


def test_each_answer_is_one_that_help_shows() -> None:
    """Its words are in what `ca-bridge help` has for the link: no answer is in a file that is not installed."""
    parts = sections({path.stem: path for path in (ROOT / "docs").glob("*.md") if path.stem != "README"})
    for target, words in ANSWERS.items():
        found = parts[target.replace(".md", "").removeprefix("#")]
        assert [word for word in words if word not in found] == [], target
    assert "../README#kubernetes-versions" not in parts


def test_what_the_readme_and_the_security_policy_answer_is_in_the_pages_too() -> None:
    """These two files are not installed: the table of versions, and how to report, are the same word for word."""
    docs, policy = ROOT / "docs", ROOT / "SECURITY.md"
    assert section(README, "kubernetes-versions").strip().partition("\n\n")[0] in section(
        docs / "install.md", "kubernetes-versions"
    )
    ours = section(docs / "security.md", "reporting-and-who-reviewed-this")
    assert section(policy, "reporting").strip() in ours
    assert section(policy, "what-was-reviewed-and-by-whom").strip().partition("\n")[0] in ours


def test_the_versions_in_the_readme_are_those_that_were_tried() -> None:
    """The versions are those of the kit's kubeadm in each run, and those that the evidence has."""
    table = re.findall(r"^\| (1\.[\d., ]+) \|", section(README, "kubernetes-versions"), re.MULTILINE)
    tried = re.findall(r"(?<= )1\.\d\d(?=\.\d+ \|)", (ROOT / "docs/evidence/versions.md").read_text(encoding="utf-8"))
    assert {version for row in table for version in row.split(", ")} == {*tried, *get_args(KubeadmVersion)}


def test_each_page_begins_with_its_readers() -> None:
    """Each page says first whom it is for."""
    texts = {page.name: page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")}
    begins = {
        name: re.sub(r"^#.*\n|<!--.*-->\n", "", text, flags=re.MULTILINE).lstrip() for name, text in texts.items()
    }
    assert sorted(name for name, text in begins.items() if not text.startswith("For ")) == ["README.md"]


def test_the_readme_fits_on_three_screens() -> None:
    """As long as it does, people read it."""
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 110


@pytest.mark.parametrize("path", DOCUMENTS, ids=by_path)
def test_each_command_line_can_be_typed(path: Path) -> None:
    """The command is there, and has the options that the document gives it."""
    found = {line: why_not(line) for line in lines_in(path.read_text(encoding="utf-8"))}
    assert {line: why for line, why in found.items() if why} == {}


def typed(text: str, language: str, before: str) -> set[str]:
    """The commands in blocks for a language, without what a reader puts in their place: names, paths, options."""
    blocks = re.findall(rf"^ *```{language}[^\n]*\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    lines = [
        line for block in blocks for line in re.findall(rf"^ *{before}ca-bridge ([a-z][^#\n]*)", block, re.MULTILINE)
    ]
    known = {" ".join(one.words) for one in commands() if one.words}
    firsts = ((" ".join(line.split()[:2]), line.split()[0]) for line in lines)
    return {next(words for words in both if words in known) for both in firsts}


@pytest.mark.first_use("18")
def test_each_command_that_pages_have_typed_is_shown() -> None:
    """Its output is on a page, from a run that tests repeat."""
    texts = [path.read_text(encoding="utf-8") for path in (README, *(ROOT / "docs").glob("*.md"))]
    asked = set().union(*(typed(text, "sh", "") for text in texts))
    seen = set().union(*(typed(text, "console", r"\$ ") for text in texts))
    assert len(asked) > 30
    assert asked - seen == set()
    assert typed("```sh\nca-bridge plan all  # x\n```", "sh", "") == {"plan"}


def wrong_settings(document: str) -> list[str]:
    """What the settings file would not take of a document's TOML blocks; each may be a part of a whole file."""
    tables = {field.name for field in dataclasses.fields(parse(""))} | {"backend", "authority"}
    found = []
    for text in re.findall(r"```toml\n(.*?)```", document, re.DOTALL):
        is_settings = tomllib.loads(text).keys() <= tables  # and no policy, nor a package's file
        try:
            parse(text if is_settings else "")
        except SettingsError as e:
            found += [str(one) for one in e.problems if not re.fullmatch(r"authority\.[\w-]+\.backend", one.key)]
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=by_path)
def test_each_block_of_settings_can_be_pasted(path: Path) -> None:
    """Into a file that names the rest: there are such tables and keys, and they take such values."""
    known = {"docs/gateway.md"}  # its inventory of nodes has a table `cluster`, too
    assert by_path(path) in known or wrong_settings(path.read_text(encoding="utf-8")) == []


def test_a_block_that_can_t_be_pasted_is_found() -> None:
    """A key that is not there, and a value that is none; a part of a whole is right."""
    text = '```toml\n[renewal]\nbefore = "30"\nkye = 1\n```\n```toml\n[authority.ca]\nmount = "x"\n```\n'
    assert len(wrong_settings(text)) == 2
    assert wrong_settings(text.split("```\n", 2)[2]) == []


def test_a_command_line_that_can_t_be_typed_is_found() -> None:
    """It is found in a block for a shell, with a path or without, and within a sentence."""
    text = "Say `ca-bridge rnew`, then:\n```sh\nsudo /opt/x/bin/ca-bridge renew --hurry  # now\nca-bridge plan | cat\n```\n"
    lines = lines_in(text)
    assert len(lines) == 3
    assert [line for line in lines if why_not(line) is None] == ["ca-bridge plan"]
    assert why_not("ca-bridge audit shw") == "no command shw"
    assert why_not("ca-bridge export") is not None or why_not("ca-bridge renew --wait") is not None


def named_by_messages(source: str) -> set[str]:
    """Our commands between backticks in a module's texts, with `X` for what only a run knows; no docstring is one."""
    tree = ast.parse(source)
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = [
        "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
        if isinstance(node, ast.JoinedStr)
        else node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr | ast.Constant) and id(node) not in parts | docs
    ]
    return {line for text in texts if isinstance(text, str) for line in re.findall(r"`(ca-bridge [^`]+)`", text)}


def test_each_command_that_a_message_names_can_be_typed() -> None:
    """A user who follows a hint is in trouble already, so its command has to work."""
    sources = [path for room in ("bridge", "backends", "release") for path in (ROOT / room).rglob("*.py")]
    named = {line for path in sources for line in named_by_messages(path.read_text(encoding="utf-8"))}
    assert len(named) > 40
    patterns = {"ca-bridge COMMAND -h", "ca-bridge bootstrap X --order FILE"}
    assert {line: why for line in named - patterns if (why := why_not(line))} == {}
    assert named_by_messages('"""`ca-bridge a`"""\nx = f"`ca-bridge {y} b` or `ca-bridge rnew`"') == {
        "ca-bridge X b",
        "ca-bridge rnew",
    }
    assert why_not("ca-bridge rnew") == "no command rnew"


@pytest.mark.first_use("12")
def test_the_picture_of_a_session_shows_commands_that_are_there() -> None:
    """It is what the demo really showed: `python -m tests.kit.picture` draws it."""
    session = ET.parse(ROOT / "docs/session.svg")  # noqa: S314 (our own file)
    lines = ["".join(text.itertext()).strip() for text in session.iter()]
    typed = [line.removeprefix("$ ") for line in lines if line.startswith("$ ca-bridge")]
    assert len(typed) > 3
    assert [why for line in typed if (why := why_not(line))] == []
    assert any("refused" in line for line in lines)


@pytest.mark.parametrize("name", picture.SCREENS)
def test_a_screen_shows_what_its_page_shows(name: str) -> None:
    """The picture and the block beside it are of the same command with the same output, which a test compares."""
    screen = ET.parse(ROOT / f"docs/screen-{name}.svg")  # noqa: S314 (our own file)
    lines = ["".join(text.itertext()) for text in screen.iter() if text.tag.endswith("text")]
    (page,) = (page for page in DOCUMENTS if f"(screen-{name}.svg)" in page.read_text(encoding="utf-8"))
    block = re.findall(
        rf"^```console {name}(?: -?\d+)?\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )[0]
    there = [line for line in block.splitlines() if line not in {"", "…"}]
    assert len(there) > 5
    steady = [re.sub(r"-[0-9a-f]{8}$", "", line) for line in lines]  # a run's name counts on
    assert [line for line in there if re.sub(r"-[0-9a-f]{8}$", "", line) not in steady] == []


def test_the_map_leads_to_files_that_are_there() -> None:
    """Each path of the table in CONTRIBUTING.md."""
    named = re.findall(r"`((?:bridge|backends)/[\w/]+\.py)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len(named) > 15
    assert [path for path in named if not (ROOT / path).is_file()] == []


@pytest.mark.first_use("1")
def test_each_page_that_the_program_names_is_one_of_its_help() -> None:
    """Messages and shipped files send readers to what is installed, and not to a directory of the clone."""
    places = [
        *(ROOT / "bridge").rglob("*.py"),
        *(path for path in (ROOT / "config").rglob("*") if path.suffix != ".md"),
    ]
    texts = [path.read_text(encoding="utf-8") for path in places if path.is_file()]
    named = {topic for text in texts for topic in re.findall(r"`ca-bridge help ([a-z0-9-]+)`", text)}
    assert len(named) > 8
    assert named - {*topics(), *sections(topics())} == set()
    shipped = [path for path in places if path.is_file() and path.suffix != ".py"]
    assert [path for path in shipped if "docs/" in path.read_text(encoding="utf-8").replace("/docs/", "")] == []


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_is_what_its_program_draws(name: str) -> None:
    """Each picture is what its program draws, is well-formed, and is on a page."""
    drawn = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert drawn == pictures.PICTURES[name](), "run: python -m tests.measure.pictures"
    assert ET.fromstring(drawn).tag.endswith("svg")  # noqa: S314 (our own file)
    pages = [README, *(ROOT / "docs").glob("*.md")]
    assert any(re.search(rf"\((docs/)?{re.escape(name)}\)", path.read_text(encoding="utf-8")) for path in pages)


def main() -> None:
    """Write what is generated."""
    COMMANDS.write_text(commands_page(), encoding="utf-8")
    SETTINGS.write_text(settings_page.page(), encoding="utf-8")
    CERTIFICATES.write_text(certificates_page(), encoding="utf-8")
    manual.write()


if __name__ == "__main__":
    main()
