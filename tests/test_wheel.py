"""The wheel holds the program and nothing else, is what the tests run against, and works on its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import backends
import bridge

ROOT = Path(__file__).resolve().parents[1]
NAME = "kubeadm-ca-bridge"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the tree."""
    directory = tmp_path_factory.mktemp("wheel")
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(directory), str(ROOT)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True)
    (built,) = directory.glob("*.whl")
    return built


def contents(wheel: Path) -> dict[str, bytes]:
    """Path and content of each file in the wheel."""
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


def tree(directory: Path, pattern: str) -> dict[str, bytes]:
    """Path below the project and content of each file in a directory."""
    return {
        str(path.relative_to(ROOT)): path.read_bytes()
        for path in directory.rglob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    }


def in_share() -> dict[str, bytes]:
    """What is installed below `share/`, and not in a package."""
    config = {
        f"share/{NAME}/{PurePosixPath(path).relative_to('config')}": content
        for path, content in tree(ROOT / "config", "*").items()
    }
    pages = {
        f"share/doc/{NAME}/{path.partition('/')[2]}": content for path, content in tree(ROOT / "docs", "*").items()
    }
    return config | pages | tree(ROOT / "share", "*")


def test_holds_the_program_and_its_data_and_nothing_else(wheel: Path) -> None:
    """Two packages with the door's pages, what belongs below `share/`, and the metadata; byte for byte what is in the tree."""
    data = f"{NAME.replace('-', '_')}-{metadata.version(NAME)}.data/data"
    shared = {f"{data}/{path}": content for path, content in in_share().items()}
    pages = tree(ROOT / "bridge/door/templates", "*")
    expected = tree(ROOT / "bridge", "*.py") | tree(ROOT / "backends", "*.py") | pages | shared

    found = contents(wheel)
    information = {path for path in found if ".dist-info/" in path}

    assert found.keys() - information == expected.keys()
    assert [path for path, content in expected.items() if found[path] != content] == []
    assert {PurePosixPath(path).parts[0] for path in expected} == {"bridge", "backends", data.partition("/")[0]}
    assert {path.partition("/")[2] for path in information} == {
        *("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    }


def locked(file: str) -> dict[str, Version]:
    """Name and version of each package in a lock file."""
    lines = re.findall(r"^([A-Za-z0-9._-]+)==([^ ;\\]+)", (ROOT / file).read_text(), re.MULTILINE)
    return {canonicalize_name(name): Version(version) for name, version in lines}


def test_the_lock_files_hold_what_is_declared() -> None:
    """Each lock file has a version that pyproject.toml allows for all that it asks for; no two contradict each other."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = project["dependency-groups"]
    for_tests = [line for name, group in groups.items() if name != "bench" for line in group if isinstance(line, str)]
    dependencies, extras = project["project"]["dependencies"], project["project"]["optional-dependencies"]
    everything = locked("requirements-dev.lock")

    for file, lines in {
        "requirements.lock": dependencies,
        "requirements-serve.lock": [*dependencies, *extras["serve"], *extras["postgresql"]],
        "requirements-build.lock": [*groups["build"], *project["build-system"]["requires"]],
        "requirements-dev.lock": [*dependencies, *for_tests],
        "requirements-bench.lock": groups["bench"],
    }.items():
        versions = locked(file)
        wrong = [line for line in lines if not satisfied(Requirement(line), versions)]
        assert not wrong, f"{file}: run scripts/lock"
        assert all(everything.get(name, version) == version for name, version in versions.items())
        assert file == "requirements-bench.lock" or versions.keys() <= everything.keys()
        text = (ROOT / file).read_text()
        assert text.count("--hash=sha256:") >= len(versions)
        assert "://" not in text


def satisfied(requirement: Requirement, versions: Mapping[str, Version]) -> bool:
    """The version is there, and allowed."""
    version = versions.get(canonicalize_name(requirement.name))
    return version is not None and version in requirement.specifier


def test_a_lock_file_that_is_behind_is_noticed() -> None:
    """A version that is too old, too new or not there does not satisfy."""
    versions = {"typer": Version("0.28.1")}

    assert satisfied(Requirement("Typer>=0.26,<0.29"), versions)
    for line in ("typer>=0.29", "typer<0.28", "rich"):
        assert not satisfied(Requirement(line), versions)


def test_is_what_the_tests_run_against(wheel: Path) -> None:
    """`import bridge` gives what was installed from a wheel of this very tree, and not the tree."""
    origin = json.loads(metadata.distribution(NAME).read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        pytest.skip("the project is installed in editable mode here; scripts/test installs the wheel")

    found = contents(wheel)

    for package in (bridge, backends):
        directory = Path(package.__file__ or "").parent
        assert not directory.is_relative_to(ROOT / package.__name__)
        installed = {
            str(path.relative_to(directory.parent)): path.read_bytes()
            for path in directory.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert installed == {path: data for path, data in found.items() if path.startswith(f"{package.__name__}/")}


def dependencies(name: str) -> set[str]:
    """The distributions that pip would install with this one, itself included."""
    found, todo = set(), [Requirement(name)]
    while todo:
        requirement = todo.pop()
        if requirement.name in found:
            continue
        found.add(requirement.name)
        for line in metadata.requires(requirement.name) or ():
            needed = Requirement(line)
            if not needed.marker or any(
                needed.marker.evaluate({"extra": extra}) for extra in (*requirement.extras, "")
            ):
                todo.append(needed)
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    A virtual environment with the wheel and the dependencies that it declares.

    They are links to those of the environment that runs the tests: a test asks no package index for anything.
    """
    venv = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin/python"
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", purelib], check=True, capture_output=True, text=True).stdout.strip())
    for name in dependencies(NAME) - {NAME}:
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    install = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
    return venv


def test_works_on_its_own(environment: Path, tmp_path: Path) -> None:
    """With only the wheel and its declared dependencies installed, the command answers and every module loads."""
    command = environment / "bin/ca-bridge"

    def output(*args: str | Path) -> str:
        run = subprocess.run(args, cwd=tmp_path, check=False, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return run.stdout

    assert metadata.version(NAME) in output(command, "--version")
    assert "renew" in output(command, "--help")
    load_all = (
        "import backends, bridge, importlib, pkgutil\n"
        "for package in (bridge, backends):\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        if module.name == 'bridge.testing': continue  # for authors of backends, who have pytest\n"
        "        if module.name.startswith('bridge.door.'): continue  # for those who have the extra `serve`\n"
        "        print(importlib.import_module(module.name).__file__)"
    )
    origins = [Path(line) for line in output(environment / "bin/python", "-W", "error", "-c", load_all).splitlines()]
    assert len(origins) > len(list((ROOT / "backends").glob("*.py")))
    assert all(origin.is_relative_to(environment) for origin in origins)


@pytest.mark.first_use("1")
def test_brings_its_data(environment: Path) -> None:
    """`config/` and `share/` are below `share/` of the environment: examples, completion, the manual."""
    share = environment / "share"
    installed = {str(path.relative_to(environment)): path.read_bytes() for path in share.rglob("*") if path.is_file()}
    assert {f"share/{NAME}/config.toml", "share/man/man1/ca-bridge.1"} <= installed.keys()
    assert installed == in_share()
