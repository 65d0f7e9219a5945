"""
How many small faults in the checks and in the installer the fast tests notice: mutmut over `bridge/pki` and the installer.

`python -m tests.measure.mutation [FILE…] [--docs]` mutates one file after the other in a copy of the project, prints what
survives as a patch, and keeps the counts in `.cache/mutation`; with `--docs` the table of docs/evidence/numbers.md is
written from them. It needs mutmut (requirements-bench.lock) and the project in an environment of its own.
mutmut changes the bodies of functions that have no decorator.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests.measure.__main__ import NUMBERS, write_between

START = "<!-- mutation: written by `python -m tests.measure.mutation --docs` -->"
ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache/mutation"
#: By file the fast tests that are its own; none needs a server, and one the kit's judge.
_CHECKS = (
    *(f"tests/pki/test_{name}.py" for name in ("der", "certificates", "csr", "go_x509", "verify")),
    "tests/attack/test_judge.py::test_what_go_refuses_is_refused",
)
#: But for three that try hundreds of damaged bundles each.
_BUNDLE = ("tests/pki/test_bundle.py", "-knot whatever_is and not changed_byte")
TESTS = {
    "bridge/pki/verify.py": _CHECKS,
    "bridge/pki/go_x509.py": _CHECKS,
    "bridge/pki/der.py": _CHECKS,
    "bridge/pki/certificates.py": _CHECKS,
    "bridge/pki/csr.py": (*_CHECKS, "tests/pki/test_csr.py", "tests/gateway/test_policy.py"),
    "bridge/pki/bundle.py": _BUNDLE,
    "bridge/pki/signatures.py": ("tests/pki/test_signatures.py", *_BUNDLE),
    "bridge/pki/bundle_format.py": _BUNDLE,
    "bridge/pki/node_proofs.py": ("tests/pki/test_node_proofs.py",),
    "bridge/pki/budget.py": ("tests/pki/test_budget.py",),
    "bridge/pki/expiry.py": ("tests/pki/test_expiry.py",),
    "bridge/pki/kubeadm_names.py": ("tests/pki/test_kubeadm_names.py",),
    "bridge/pki/user_rules.py": ("tests/pki/test_user_rules.py",),
    "bridge/state/install.py": ("tests/state/test_install.py", "tests/state/test_install_links.py"),
}
#: Of a file with more mutants so many are drawn, with a fixed seed.
SAMPLE, SEED = 250, 20
_MUTMUT = Path(sys.executable).with_name("mutmut")
_COPIED = ("bridge", "backends", "config", "release", "tests", "docs", "share", "pyproject.toml")
_NAMES = """
import pathlib, sys
from mutmut.mutation.file_mutation import mutate_file_contents
print(*mutate_file_contents(sys.argv[1], pathlib.Path(sys.argv[1]).read_text()).mutant_names)
"""
_SHOW = """
import pathlib, sys
from mutmut.mutation.diff_apply import get_diff_for_mutant
for name in sys.argv[2:]:
    print(name, get_diff_for_mutant(name, path=pathlib.Path(sys.argv[1])), sep="\\n")
"""
_KILLED, _TIMED_OUT = (1, 3), (-24, 24, 36, 152, 255)  # mutmut's own reading of exit codes


def _mutants(file: str, directory: Path) -> list[str]:
    """The names that mutmut gives to a file's mutants; it reads its settings in the current directory."""
    command = [sys.executable, "-P", "-c", _NAMES, file]
    names = subprocess.run(command, cwd=directory, check=True, capture_output=True, text=True).stdout.split()
    return [f"{file.removesuffix('.py').replace('/', '.')}.{name}" for name in names]


def _copy(file: str, directory: Path) -> None:
    """The project, with mutmut's settings for one file."""
    shutil.rmtree(directory, ignore_errors=True)
    for name in _COPIED:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, directory / name)
    settings = {
        "source_paths": ["bridge"],
        "only_mutate": [file],
        "also_copy": [name for name in _COPIED if name != "bridge"],
        "pytest_add_cli_args_test_selection": list(TESTS[file]),
        "pytest_add_cli_args": ["--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist"],
        "timeout_multiplier": 3.0,  # a minute, since other work on the machine counts, too
        "timeout_constant": 20.0,
        "track_dependencies": False,
        "process_isolation": "forkserver",  # what a test run leaves in a process, as the caches of answers, is no mutant's
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    with (directory / "pyproject.toml").open("a", encoding="utf-8") as project:
        project.write("\n".join(["", "[tool.mutmut]", *lines, ""]))


def measure(file: str, sample: int) -> dict[str, object]:
    """Try the mutants of a file, or a sample of them; print those that survive."""
    directory = CACHE / "work" / file.replace("/", "_")
    _copy(file, directory)
    mutants = _mutants(file, directory)
    names = random.Random(SEED).sample(mutants, min(sample, len(mutants)))  # noqa: S311  # not a secret
    subprocess.run([_MUTMUT, "run", "--max-children", "1", *names], cwd=directory, check=True, env=_environment())
    meta = json.loads((directory / f"mutants/{file}.meta").read_text(encoding="utf-8"))
    codes = {name: meta["exit_code_by_key"][name] for name in names}
    survivors = [name for name, code in codes.items() if code not in (*_KILLED, *_TIMED_OUT)]
    subprocess.run([sys.executable, "-P", "-c", _SHOW, file, *survivors], cwd=directory, check=True)
    by_code = Counter(codes.values())
    return {
        "mutants": len(mutants),
        "tried": len(names),
        "killed": sum(by_code[code] for code in _KILLED),
        "timed_out": sum(by_code[code] for code in _TIMED_OUT),
        "survivors": survivors,
    }


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CA_BRIDGE_NO_SKIP")}


def _counts(file: str) -> Path:
    return CACHE / f"{file.replace('/', '_')}.json"


def table(files: Iterable[str]) -> str:
    """Markdown, from the counts that are kept; in the last line each file has the weight of all its mutants."""
    rows = [(file, json.loads(_counts(file).read_text(encoding="utf-8"))) for file in files if _counts(file).exists()]
    lines = [
        "| file | mutants | tried | noticed | of these by timeout | score |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    expected = 0.0
    for file, row in rows:
        noticed = row["killed"] + row["timed_out"]
        share = noticed / row["tried"]
        expected += share * row["mutants"]
        cells = (f"`{file}`", row["mutants"], row["tried"], noticed, row["timed_out"], f"{share:.1%}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    total, tried = (sum(row[key] for _, row in rows) for key in ("mutants", "tried"))
    lines.append(f"| all | {total} | {tried} | | | {expected / max(total, 1):.1%} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(prog="python -m tests.measure.mutation")
    parser.add_argument("files", nargs="*", metavar="FILE", help="all of them, unless some are named")
    parser.add_argument("--sample", type=int, default=SAMPLE, metavar="N", help=f"of a file, at most; {SAMPLE}")
    parser.add_argument("--docs", action="store_true", help="only write the table of what was measured before")
    options = parser.parse_args()
    if options.docs:
        write_between(NUMBERS, START, table(TESTS))
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    for file in options.files or TESTS:
        _counts(file).write_text(json.dumps(measure(file, options.sample), indent=1), encoding="utf-8")
    print(table(options.files or TESTS))


if __name__ == "__main__":
    main()
