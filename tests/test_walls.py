"""
The walls between the rooms stand.

`bridge` never imports a backend, a backend sees only the contract, the rules do no I/O and read no clock, and a command
loads nothing heavy that it does not use. Each check is shown a text that breaks its rule, so that it can't pass blindly.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import backends
import bridge

#: The doors on the ground floor, and those that open on the whole house.
DOORS = ("contract", "errors", "secret", "specs", "words")
ROOF = ("entry", "testing")
#: What the package itself has, for all.
DATACLASS = "bridge.dataclass"
_GROUND = {"doors"}
_LOOKS = _GROUND | {"pki", "system", "settings", "node"}
_KEEPS = _LOOKS | {"state"}
#: Which packages each may import, besides itself; the reason for another arrow belongs into `bridge/__init__.py`.
FLOORS: dict[str, set[str]] = {
    "doors": set(),
    "pki": _GROUND,
    "system": _GROUND | {"pki"},
    "settings": _GROUND | {"pki", "system"},
    "node": _GROUND | {"pki", "system", "settings"},
    "state": _LOOKS,
    "cluster": _LOOKS,
    "ca": _KEEPS - {"node"},
    "users": _KEEPS | {"ca"},
    "desk": _KEEPS - {"node"} | {"ca", "users"},
    "control_plane": _KEEPS | {"cluster"},
    "renewal": _KEEPS | {"cluster", "ca", "desk", "control_plane"},
    "rotation": _KEEPS | {"cluster", "ca", "control_plane", "renewal"},
    "monitoring": _KEEPS | {"renewal", "rotation"},
    "diagnosis": _KEEPS | {"cluster", "ca", "desk", "control_plane", "renewal", "rotation"},
    "gateway": _KEEPS | {"cluster", "ca", "desk"},
    "door": _KEEPS - {"node"} | {"desk"},
    "bootstrap": _KEEPS | {"ca", "desk", "renewal"},
    "cli": _KEEPS
    | {
        "ca",
        "desk",
        "control_plane",
        "renewal",
        "rotation",
        "monitoring",
        "diagnosis",
        "gateway",
        "door",
        "bootstrap",
        "users",
    },
}
#: A single file of a package that is otherwise closed: kubeadm's kubeconfigs reach a desk beside their CSRs.
_ONE_FILE = {"desk": "bridge.node.kubeconfig"}
#: No I/O and no clock in these: a package, or a module of another one.
PURE = (
    *("pki", "specs", "words", "settings.windows"),
    *("desk.approval", "gateway.rules"),
)

IMPURE_MODULES = {
    *(
        "asyncio",
        "builtins",
        "fcntl",
        "getpass",
        "glob",
        "http",
        "importlib",
        "io",
        "logging",
        "mmap",
        "multiprocessing",
    ),
    *("os", "pathlib", "platform", "pwd", "random", "runpy", "secrets", "selectors", "shelve", "shutil", "signal"),
    *("socket", "sqlite3", "ssl", "subprocess", "sys", "tempfile", "threading", "time", "urllib", "uuid"),
    *("hvac", "requests", "rich", "tenacity", "typer", "urllib3"),
}
IMPURE_NAMES = {
    *("open", "print", "input", "exec", "eval", "__import__", "breakpoint"),
    *("datetime.datetime.now", "datetime.datetime.utcnow", "datetime.datetime.today", "datetime.date.today"),
}
#: Methods of files and paths that might come in as arguments; nothing pure has such a name.
IMPURE_METHODS = {
    *("read_text", "read_bytes", "write_text", "write_bytes", "open", "unlink", "mkdir", "stat", "exists", "is_file"),
}

HEAVY = {
    "hvac",
    "requests",
    "urllib3",
    "rich",
    "tenacity",
    "pydantic",
    "backends",
    "cheroot",
    "sqlalchemy",
    "alembic",
    "jinja2",
}


def sources() -> dict[str, str]:
    """The text of each of our modules, as installed."""
    texts = {}
    for package in (bridge, backends):
        directory = Path(package.__file__ or "").parent
        for path in directory.rglob("*.py"):
            parts = path.relative_to(directory.parent).with_suffix("").parts
            texts[".".join(parts).removesuffix(".__init__")] = path.read_text()
    return texts


def imports(source: str, module: str) -> set[str]:
    """
    All that the source imports, at any depth of it, by its full name.

    `from a import b` gives `a.b`, which may be a module or something in one.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {f"{origin}.{alias.name}" for alias in node.names}
    return found


def names(source: str) -> set[str]:
    """All names and dotted names that the source uses, with what they were imported from, whatever they are called."""
    tree = ast.parse(source)
    origins: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            origins |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            origins |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return {
        ".".join([origins.get(head, head), *rest]) for node in ast.walk(tree) for head, *rest in [_dotted(node)] if head
    }


def _dotted(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        return [*_dotted(node.value), node.attr]
    return [""]


def within(module: str, package: str) -> bool:
    """The module is the package or lies in it."""
    return module == package or module.startswith(f"{package}.")


def bridge_wall(source: str, module: str) -> Iterator[str]:
    """`bridge` finds backends by entry point only: it imports none, and names none to an importer."""
    yield from (name for name in imports(source, module) if within(name, "backends"))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and re.fullmatch(r"backends(\.\w+)*(:\w+)?", str(node.value)):
            yield str(node.value)


def floor_of(module: str) -> str | None:
    """The package of one of our modules; None for what is above all floors, or no part of `bridge`."""
    first = module.split(".")[1] if module.startswith("bridge.") else ""
    if first in FLOORS:
        return first
    return "doors" if first in DOORS else None


def floor_wall(source: str, module: str) -> Iterator[str]:
    """A package imports only what is below it: the table `FLOORS`."""
    floor = floor_of(module)
    if floor is None:
        return
    for name in imports(source, module) - {DATACLASS}:
        target = floor_of(name) or ("the roof" if within(name, "bridge") else floor)
        if target != floor and target not in FLOORS[floor] and not within(name, _ONE_FILE.get(floor, "none")):
            yield name


#: What a family of backends needs beside the doors, and why.
_ALSO = {
    # a program, with limits and the end of all that it started, and the messages that it leaves
    "backends.cmp": ["bridge.system.run_command", "bridge.pki.der"],
    # a program, which only root and its account may change
    "backends.exec": ["bridge.system.run_command"],
    # a program, and a database of files with a lock like ours
    "backends.openssl": [f"bridge.system.{room}" for room in ("run_command", "files", "locks")],
    # what a node can be called, kubeconfigs, and the pauses between looks at an object
    "backends.kubernetes": ["bridge.pki.kubeadm_names", "bridge.node.kubeconfig", "bridge.system.waiting"],
    # one login for all threads that want one, and a bounded memory of what is hidden
    "backends.vault": ["bridge.system.waiting"],
    # a CA that is reached by files: the bundles' format, and what reads and writes files safely
    "backends.exchange": ["bridge.pki.bundle", "bridge.pki.bundle_format", "bridge.system.files"],
    # the bundles' format, and the pauses between looks at an answer
    "backends.door": [
        "bridge.system.waiting",
        *(f"bridge.pki.{room}" for room in ("bundle", "bundle_format", "node_proofs")),
    ],
}


def backend_wall(source: str, module: str) -> Iterator[str]:
    """Of ours, a backend imports the doors, how HTTP, JSON, files, certificates and dates are read and shown, its family's files, and what `_ALSO` says."""
    family = ".".join(module.split(".")[:2])
    readers = (
        "bridge.system.http",
        "bridge.system.tls",
        "bridge.system.paths",
        "bridge.pki.budget",
        "bridge.pki.certificates",
        "bridge.pki.expiry",
    )
    allowed = [*(f"bridge.{door}" for door in DOORS), *readers, *_ALSO.get(family, ())]
    for name in imports(source, module):
        if within(name, "bridge") and not any(within(name, one) for one in allowed):
            yield name
        shared = (family, "backends.http", "backends.settings")
        if within(name, "backends") and not any(within(name, one) for one in shared):
            yield name


def pure_wall(source: str, module: str) -> Iterator[str]:
    """
    A rule does no I/O, reads no clock, and of ours calls only other rules.

    From other rooms it takes types, which say what it is given: `from bridge.contract import Issued`.
    """
    ours = [f"bridge.{name}" for name in PURE]
    for name in imports(source, module) - {DATACLASS}:
        if name.split(".")[0] in IMPURE_MODULES:
            yield name
        a_type = re.fullmatch(r"bridge(\.\w+)+\.[A-Z]\w*", name)
        if within(name, "bridge") and not a_type and not any(within(name, one) for one in ours):
            yield name
    for name in names(source):
        if name in IMPURE_NAMES or name.rpartition(".")[2] in IMPURE_METHODS:
            yield name
    for node in ast.walk(ast.parse(source)):  # methods of what has no name, such as f().open()
        if isinstance(node, ast.Attribute) and node.attr in IMPURE_METHODS:
            yield f".{node.attr}"


#: What prints on standard output: the program's own end, and one module for all commands.
PRINTERS = ("bridge.cli.printing", "bridge.entry")
#: Modules that print for a person at a terminal; only commands may load them.
_TERMINAL = {"typer", "click", "rich"}


def printing_wall(source: str, module: str) -> Iterator[str]:
    """One place prints; the rooms below the commands know no terminal."""
    if module not in PRINTERS:
        yield from (name for name in names(source) if name in {"print", "typer.echo", "sys.stdout.write"})
    if not within(module, "bridge.cli") and module not in PRINTERS:
        yield from (name for name in imports(source, module) if name.split(".")[0] in _TERMINAL)


#: What makes a pool of its own, whose threads wait for no network: they compute, write files, or are ended by its owner.
POOLS = (
    *("bridge.system.waiting", "bridge.system.files", "bridge.node.sample_pki", "bridge.renewal.prepare"),
    *("bridge.ca.conformance", "bridge.desk.desk", "bridge.desk.workers", "backends.openssl"),
)


def pool_wall(source: str, module: str) -> Iterator[str]:
    """Threads that wait for other machines come from `waiting.workers`, which leaves them behind after Ctrl-C."""
    if module not in POOLS:
        yield from (name for name in imports(source, module) if name.endswith(".ThreadPoolExecutor"))


def logger_wall(source: str, module: str) -> Iterator[str]:
    """`console.set_up` gives its form to the logger `ca-bridge` and those below it, and to no other."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ".".join(_dotted(node.func)).endswith("getLogger"):
            name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            if (module, name) == ("bridge.system.http", "urllib3"):  # which it silences
                continue
            if not within(str(name).replace("ca-bridge", "ca_bridge"), "ca_bridge"):
                yield ast.unparse(node)
    yield from names(source) & {f"logging.{level}" for level in ("debug", "info", "warning", "error", "critical")}


def circles(texts: Mapping[str, str]) -> set[frozenset[str]]:
    """Modules that import each other, directly or through others, at any depth of their source."""
    below = {
        module: {name if name in texts else name.rpartition(".")[0] for name in imports(text, module)} & texts.keys()
        for module, text in texts.items()
    }
    reached = {module: _reached(module, below) for module in below}
    return {
        frozenset({module, *(name for name in reach if module in reached[name])})
        for module, reach in reached.items()
        if module in reach
    }


def _reached(module: str, below: Mapping[str, set[str]]) -> set[str]:
    found, waiting = set[str](), [*below[module]]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += below[name]
    return found


def modules(package: str, *only: str) -> list[str]:
    """Names of our modules in a package; all of them, or these."""
    found = [module for module in sources() if within(module, package)]
    return [module for module in found if not only or any(within(module, f"{package}.{one}") for one in only)]


@pytest.mark.parametrize("module", modules("bridge"))
def test_bridge_imports_no_backend(module: str) -> None:
    """Our own backends come in by the same door as a third party's."""
    assert sorted(bridge_wall(sources()[module], module)) == []


@pytest.mark.parametrize("module", modules("bridge"))
def test_imports_only_point_down(module: str) -> None:
    """A package knows what is below it, and nothing above."""
    assert sorted(floor_wall(sources()[module], module)) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("bridge.pki.verify", "from bridge.node import inventory"),
        ("bridge.pki.verify", "from bridge.system.files import lock"),
        ("bridge.state.session", "def f():\n    from bridge.control_plane import restarts"),
        ("bridge.desk.desk", "import bridge.node.inventory"),
        ("bridge.renewal.renew", "from bridge.cli.app import app"),
        ("bridge.contract", "from bridge import pki"),
        ("bridge.cli.app", "from bridge.entry import main"),
    ],
)
def test_the_walls_between_floors_can_fail(module: str, source: str) -> None:
    """An arrow back up is noticed, however it is written."""
    allowed = "from bridge.errors import BridgeError\nfrom bridge.specs import SPECS\nimport os\n"

    assert list(floor_wall(source, module))
    assert not list(floor_wall(allowed, module))


def unmapped(text: str) -> set[str]:
    """Our packages, doors and single modules that a map does not name, as `name`, `name.py` or `bridge/name/`."""
    found = {module.split(".")[1] for module in modules("bridge") if module != "bridge"}
    return {name for name in found if not re.search(rf"`(bridge/)?{name}(\.py|/)?`", text)}


@pytest.mark.parametrize("page", ["bridge/__init__.py", "CONTRIBUTING.md"])
def test_a_map_names_each_room(page: str) -> None:
    """A newcomer finds each room in both maps."""
    text = (Path(__file__).parents[1] / page).read_text()
    assert unmapped(text) == set()
    assert unmapped(text.replace("rotation", "")) == {"rotation"}


def test_each_room_has_its_floor() -> None:
    """No module of ours is without a wall, but for those that open on the whole house."""
    assert [module for module in modules("bridge") if floor_of(module) is None] == [
        module for module in modules("bridge") if module in {"bridge", *(f"bridge.{name}" for name in ROOF)}
    ]


@pytest.mark.parametrize("module", modules("backends"))
def test_a_backend_sees_only_the_contract(module: str) -> None:
    """A backend can do nothing that a third party's could not."""
    assert sorted(backend_wall(sources()[module], module)) == []


@pytest.mark.parametrize("module", modules("bridge", *PURE))
def test_rules_do_no_io_and_read_no_clock(module: str) -> None:
    """Verification, expiry, CSRs and specs are functions of their arguments."""
    assert sorted(pure_wall(sources()[module], module)) == []


@pytest.mark.parametrize("module", modules("bridge"))
def test_one_place_prints(module: str) -> None:
    """One place decides how a message on standard output looks; rooms return what they found."""
    assert sorted(printing_wall(sources()[module], module)) == []


@pytest.mark.parametrize(
    "source",
    ["print('x')", "import typer\ntyper.echo('x')", "import sys\nsys.stdout.write('x')", "import rich.console"],
)
def test_the_wall_round_printing_can_fail(source: str) -> None:
    """The test finds a module that prints by itself."""
    assert list(printing_wall(source, "bridge.renewal.renew"))
    assert not list(printing_wall("from bridge.cli.printing import say\nsay('x')", "bridge.cli.history"))
    assert not list(printing_wall(source, "bridge.cli.printing"))


@pytest.mark.parametrize("module", sorted(sources()))
def test_no_thread_that_waits_for_a_silent_node_holds_up_the_end(module: str) -> None:
    """A run that is interrupted ends at once, whatever its threads wait for."""
    assert sorted(pool_wall(sources()[module], module)) == []


def test_the_wall_round_pools_can_fail() -> None:
    """The test finds a module that makes a pool of its own."""
    source = "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(8) as pool: ..."
    assert list(pool_wall(source, "bridge.control_plane.neighbours"))
    assert not list(pool_wall(source, "bridge.renewal.prepare"))
    assert not list(pool_wall("from bridge.system.waiting import workers", "bridge.control_plane.neighbours"))


@pytest.mark.parametrize("module", sorted(sources()))
def test_each_warning_has_the_form_of_the_log(module: str) -> None:
    """Another logger's lines are bare text, also under --log-format json."""
    assert sorted(logger_wall(sources()[module], module)) == []


@pytest.mark.parametrize("name", ["__name__", '"backends.door"', '"ca-bridged"', ""])
def test_the_wall_round_loggers_can_fail(name: str) -> None:
    """The test finds a logger of another name, and the functions of the root logger."""
    assert list(logger_wall("import logging\nlogging.warning('x')", "backends.door"))
    assert list(logger_wall(f"import logging\nlog = logging.getLogger({name})", "backends.door"))
    assert not list(logger_wall('import logging\nlog = logging.getLogger("ca-bridge.door")', "backends.door"))


def test_no_files_go_in_a_circle() -> None:
    """A reader of one file need not know another that needs it; imports inside functions and for types count."""
    assert circles(sources()) == set()


def test_the_look_for_circles_can_fail() -> None:
    """The test finds a circle of three, also by an import inside a function."""
    texts = {"a": "from b import x", "b": "def f():\n    import c", "c": "from a import y", "d": "import a"}
    assert circles(texts) == {frozenset("abc")}
    assert circles({**texts, "c": ""}) == set()


def test_all_modules_are_looked_at() -> None:
    """The rules exist under these names, and so does what stands on both sides of the walls."""
    found = sources()

    assert {f"bridge.{name}" for name in (*PURE, *DOORS, *ROOF, *FLOORS.keys() - {"doors"})} <= found.keys()
    ours = {module for module in found if module.startswith("bridge.")}
    assert {module for module in ours if floor_of(module) is None} == {f"bridge.{name}" for name in ROOF}
    assert {
        "bridge",
        "bridge.cli.app",
        "backends",
        "backends.vault",
        "backends.cfssl",
        "backends.openssl",
    } <= found.keys()


@pytest.mark.parametrize(
    "source",
    [
        "import backends",
        "import backends.vault as v",
        "from backends import vault",
        "def f():\n    from backends.vault import VaultBackend",
        "import importlib\nimportlib.import_module('backends.vault')",
    ],
)
def test_the_wall_of_bridge_can_fail(source: str) -> None:
    """The test finds each way to import a backend."""
    assert list(bridge_wall(source, "bridge.deep.renew"))
    assert not list(bridge_wall("import backends_of_others\n'a text about backends.vault'", "bridge.renewal.renew"))


@pytest.mark.parametrize(
    "source",
    [
        "import bridge.pki.verify",
        "from bridge import verify",
        "from bridge.pki.verify import check",
        "from bridge.contractual import x",
        "from backends.vault import VaultBackend",
        "from backends import vault",
        "from . import vault",
    ],
)
def test_the_wall_of_backends_can_fail(source: str) -> None:
    """A backend that reaches for more than the contract, or for another backend, is noticed."""
    allowed = (
        "from bridge.contract import Issued\nfrom bridge import errors\nfrom backends.openssl.index import Index\n"
        "from backends.http import within\nfrom backends.settings import is_loopback\n"
    )

    assert list(backend_wall(source, "backends.openssl"))
    assert not list(backend_wall(allowed, "backends.openssl"))


@pytest.mark.parametrize(
    "source",
    [
        "import os",
        "import os.path as p",
        "from pathlib import Path",
        "from time import time",
        "import random",
        "from bridge import files",
        "from bridge.system.files import write",
        "import bridge.system.files",
        "open('x')",
        "reader = open",
        "def f(path):\n    return path.read_text()",
        "def f(g):\n    return g().read_bytes()",
        "from datetime import datetime\ndatetime.now()",
        "from datetime import datetime as d\nd.now()",
        "import datetime\nx = datetime.datetime.now",
        "import datetime as dt\ndt.datetime.utcnow()",
        "from datetime import date\ndate.today()",
    ],
)
def test_the_wall_of_the_rules_can_fail(source: str) -> None:
    """A file, the network or the clock in a rule is noticed, under any name."""
    allowed = "from datetime import datetime, UTC\nfrom bridge import specs\nfrom bridge.contract import Issued\n"

    assert list(pure_wall(source, "bridge.pki.verify"))
    assert not list(
        pure_wall(f"{allowed}def f(now: datetime) -> bool:\n    return now < datetime(2030, 1, 1, tzinfo=UTC)", "")
    )


def wall_of_tests(source: str, module: str) -> Iterator[str]:
    """A test file imports no other test file: what two share is in the kit."""
    for name in imports(source, module):
        if within(name, "tests") and any(part.startswith("test_") for part in name.split(".")[:-1]):
            yield name


TESTS = Path(__file__).parent


@pytest.mark.parametrize("path", sorted(str(path.relative_to(TESTS)) for path in TESTS.rglob("*.py")))
def test_no_test_imports_another_test_file(path: str) -> None:
    """A room's tests can be read, moved and run by themselves."""
    assert sorted(wall_of_tests((TESTS / path).read_text(), "tests.x")) == []


def test_the_wall_between_test_files_can_fail() -> None:
    """Each way to import is found; the kit and the counts are for all."""
    assert list(wall_of_tests("from tests.renewal.test_renew import settings_for", "tests.x"))
    assert not list(wall_of_tests("from tests.kit.renewing import Quiet\nfrom tests.counts import Tried", "tests.x"))


#: Tests of a room that are about no one file of it, by what they are about.
SCENARIOS = {
    "a command, from its arguments to its files": (
        *("bootstrap/init", "bootstrap/join", "bootstrap/serving_certs", "bootstrap/external_etcd"),
        *("cli/messages", "cli/nagios", "cli/trial", "diagnosis/desk", "desk/user_requests"),
        *(
            "renewal/activation",
            "renewal/install_directory",
            "renewal/missing",
            "renewal/rehearsal",
            "renewal/schedule",
        ),
        *("rotation/adoption", "rotation/cross", "rotation/emergency", "rotation/next_behind", "rotation/walks"),
        "state/requests",
    ),
    "a kind of machine or of file, through all that a renewal does": (
        *("renewal/etcd_host", "renewal/kubelet_files", "renewal/serving_certs", "renewal/worker"),
        *("renewal/allowed", "renewal/ca_rotation", "renewal/shorter", "renewal/signed_answers"),
        "rotation/new_ca",
    ),
    "something that is broken, killed or hostile": (
        *("door/est_hostile", "door/shares", "gateway/floods", "gateway/hostile", "gateway/traps"),
        *("renewal/damage", "renewal/lost_keys", "renewal/readiness", "state/install_links", "system/interruption"),
    ),
    "a real program or server in its place": (
        *("control_plane/etcd_claim", "control_plane/kubelet_trial", "control_plane/proof_etcd"),
        *(
            "door/browser",
            "door/day_zero",
            "door/est_messages",
            "door/own_certificate",
            "door/pages",
            "door/postgresql",
        ),
        *("gateway/trust", "system/http_against_curl"),
    ),
    "a page, manifests or a table that has to be whole": (
        *("ca/documented_backend", "diagnosis/documented", "door/manifests", "gateway/comparison", "gateway/manifests"),
        *("gateway/pods_page", "gateway/setup_kubernetes", "rotation/rows", "state/checked_settings"),
    ),
}


def is_named_rightly(room: str, name: str) -> bool:
    """A test file in a room has the name of one of its modules, or of the room, or is a scenario."""
    is_module = (TESTS.parent / "bridge" / room / f"{name}.py").is_file()
    return is_module or name == room or any(f"{room}/{name}" in names for names in SCENARIOS.values())


def test_files_have_the_names_of_modules() -> None:
    """So that what a change may break is found by its name; no scenario is listed for nothing."""
    rooms = {path.parent.name for path in (TESTS.parent / "bridge").glob("*/__init__.py")}
    files = {(room, path.stem.removeprefix("test_")) for room in rooms for path in (TESTS / room).glob("test_*.py")}
    assert [f"tests/{room}/test_{name}.py" for room, name in sorted(files) if not is_named_rightly(room, name)] == []
    assert {one for names in SCENARIOS.values() for one in names} <= {"/".join(file) for file in files}


def test_the_look_at_names_of_test_files_can_fail() -> None:
    """A name that no module has is noticed."""
    assert is_named_rightly("pki", "verify")
    assert is_named_rightly("users", "users")
    assert not is_named_rightly("gateway", "parts")
    assert not is_named_rightly("renewal", "verify")


#: A private English: sentences without a subject that has a name.
PRIVATE = re.compile(
    r"\bwhom?ever\b|\b(?:no|some|any|every)body(?:'?s)?\b|\b(?:is|are|was|were) told\b|\b(?:it|that|which) is said\b",
    re.IGNORECASE,
)
#: A test's docstring is a sentence of its own, and no second half of the test's name.
SECOND_HALF = re.compile(r"(?:And|Nor|Or|Which|Though) ")


def private_words(source: str, *, messages: bool) -> list[str]:
    """Such words in comments, docstrings and names, and in all other texts if `messages`; `nobody` is an account."""
    if not PRIVATE.search(source.replace("_", " ")) and not re.search("[\"']{3}" + SECOND_HALF.pattern, source):
        return []  # most files, without the time of parsing them
    comments = (
        token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    )
    found = list(comments)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            text = ast.get_docstring(node, clean=False) or ""
            name = getattr(node, "name", "")
            found += [text, name.replace("_", " ")]
            if name.startswith("test_") and SECOND_HALF.match(text):
                found.append(f"it is said: {text}")
        if messages and isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return [text for text in found if PRIVATE.search(text.replace("`nobody`", ""))]


def test_the_program_and_its_tests_speak_plain_english() -> None:
    """Each sentence names who does what: in the program, its tests, pages, templates, configuration and scripts."""
    root = Path(__file__).parents[1]
    found = {module: private_words(source, messages=True) for module, source in sources().items()}
    for path in (root / "tests").rglob("*.py"):
        found[str(path)] = private_words(path.read_text(encoding="utf-8"), messages=False)
    folders = ("bridge/door/templates", "config", "docs", "scripts")
    for path in [*root.glob("*.md"), *(path for folder in folders for path in (root / folder).rglob("*"))]:
        if path.is_file() and path.suffix not in {".png", ".svg"}:
            found[str(path)] = PRIVATE.findall(path.read_text(encoding="utf-8").replace("`nobody`", ""))
    assert {name: words for name, words in found.items() if words} == {}


def test_the_look_at_words_can_fail() -> None:
    """A comment, a docstring, a name and a message with such a word are found; the account `nobody` is none."""
    bad = (
        "# for whoever asks",
        '"""Nobody is asked."""',
        "def test_x_is_told(): ...",
        "def test_x():\n    '''And y.'''",
    )
    assert [len(private_words(source, messages=False)) for source in bad] == [1, 1, 1, 1]
    message = "x = 'that is said once'"
    assert [len(private_words(message, messages=messages)) for messages in (True, False)] == [1, 0]
    good = "# as user `nobody`\nuser = 'somebody'\ndef test_x():\n    '''An attacker asks.'''"
    assert private_words(good, messages=False) == []


#: A screen.
MOST_LINES = 60


def long_functions(source: str) -> list[str]:
    """Functions that do not fit on a screen, decorators apart."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return [one.name for one in functions if (one.end_lineno or 0) - one.lineno >= MOST_LINES]


def test_each_function_fits_on_a_screen() -> None:
    """A longer function does more than one thing."""
    assert {module: found for module, source in sources().items() if (found := long_functions(source))} == {}


def test_the_look_at_long_functions_can_fail() -> None:
    """One of 60 lines is short enough, one of 61 is not."""
    assert [long_functions("def f():\n" + "    x = 1\n" * lines) for lines in (59, 60)] == [[], ["f"]]


def loaded(statement: str) -> set[str]:
    """Top-level names of the modules that a fresh interpreter has after the statement."""
    command = [sys.executable, "-c", f"{statement}\nimport sys\nprint(*sys.modules)"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in run.stdout.split()}


def test_starting_loads_nothing_heavy() -> None:
    """The command line starts without network libraries, tables and backends; only commands that use them load them."""
    assert loaded("import bridge.cli.app") & HEAVY == set()
    assert loaded("import bridge.entry") & {*HEAVY, "typer"} == set()


def test_the_look_at_what_is_loaded_can_fail() -> None:
    """The test finds a heavy module that is loaded."""
    assert loaded("import requests") & HEAVY == {"requests", "urllib3"}
