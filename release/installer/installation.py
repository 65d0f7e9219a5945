"""
Install or upgrade: unpack a new tree beside the old one, verify it, then replace one link.

A process of the old program continues with the old tree, which stays until the next upgrade. The new program checks the
settings before the switch; an installation writes neither settings nor state.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from pathlib import Path

from release.installer import machine, places, units
from release.installer.payload import Manifest, Payload, changed, version
from release.installer.places import InstallError

#: Imports every module that the program may ever import, so that a missing one is noticed now and not at night.
_PROOF = """
import importlib, pkgutil, sys
sys.path[:0] = sys.argv[1:]
import backends, bridge, cryptography, hvac, requests, rich, tenacity, typer, yaml
for package in (bridge, backends):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if module.name in ("bridge.testing", "bridge.__main__"):  # the first needs pytest, the second would start the program
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as e:  # this file does not have the packages that only `ca-bridge serve` needs
            if not module.name.startswith("bridge.door.") or e.name not in ("alembic", "cheroot", "jinja2", "sqlalchemy"):
                raise
"""
#: Hundreds of modules that colour source code, which ca-bridge does not do.
_NOT_COMPILED = r"/pygments/(lexers|styles|formatters)/"


def install(payload: Payload, *, enable: bool, despite_settings: bool) -> None:
    """
    Install or upgrade.

    Args:
        payload: The archive with the tree.
        enable: Enable the nightly timer.
        despite_settings: Install even if the new program refuses the settings.

    Raises:
        InstallError: The installation failed; the program that was there is still in use.
    """
    machine.assert_fits(payload.manifest)
    machine.assert_root()
    for place in (places.TOP, places.VERSIONS, places.COMMAND.parent, places.UNITS):
        machine.assert_roots_own(place)
    _assert_command_is_free()
    os.umask(0o022)
    places.VERSIONS.mkdir(parents=True, exist_ok=True)
    with locked():
        before, others = current(), set(places.VERSIONS.iterdir())
        tree = _unpacked(payload)
        try:
            _assert_settings_load(tree, despite_settings=despite_settings)
            _switch(tree)
        except BaseException:
            remove_trees({*others, current()})
            raise
        _install_units(tree, payload.manifest)
        _adopt_environment()
        if tree != before:  # otherwise the previous version stays, to go back to
            units.restart_services()
            remove_trees({tree, before})
    if enable:
        units.enable()
    _tell(payload.manifest, before, enabled=enable)


def current() -> Path | None:
    """The tree that is in use."""
    return places.CURRENT.resolve() if places.CURRENT.exists() else None


@contextmanager
def locked() -> Iterator[None]:
    """Keep other installers from installing or removing at the same time."""
    descriptor = os.open(places.VERSIONS, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as e:
        raise InstallError("wanted to be the only installer at work, found another", "wait until it ends") from e
    finally:
        os.close(descriptor)


def _assert_command_is_free() -> None:
    command = places.COMMAND
    if places.is_ours(command) or not os.path.lexists(command):
        return
    found = f"a link to {command.readlink()}" if command.is_symlink() else "another program"
    raise InstallError(
        f"{command}: wanted nothing or our own link, found {found}",
        "if it is from a package, remove the package first (apt remove ca-bridge, dnf remove ca-bridge): settings and state stay",
    )


def _unpacked(payload: Payload) -> Path:
    """Unpack and test the new tree; remove trees that an interrupted installation left."""
    target = places.VERSIONS / payload.manifest.directory
    for left in places.VERSIONS.glob(".new-*"):
        shutil.rmtree(left)
    if target.is_dir() and not changed(target, payload.manifest) and _is_proven(target):
        return target
    made = Path(tempfile.mkdtemp(prefix=".new-", dir=places.VERSIONS))
    try:
        payload.unpack(made)
        _compile(made, target)
        (made / "python").write_text(f"{sys.executable}\n", encoding="utf-8")
        _prove(made)
        made.chmod(0o755)
        os.sync()  # before the rename: a power cut could keep the name and lose the content
        if target.exists():  # it is damaged; a process that runs it keeps the modules that it has loaded
            shutil.rmtree(target)
        made.rename(target)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return target


def _is_proven(tree: Path) -> bool:
    """Whether the tree starts with this Python; otherwise it is made again, since its bytecode may be damaged."""
    try:
        _prove(tree)
        return (tree / "python").read_text(encoding="utf-8") == f"{sys.executable}\n"
    except (InstallError, OSError):
        return False


def _libraries(tree: Path) -> list[str]:
    return [str(tree / "lib/any"), str(tree / f"lib/cp{sys.version_info.major}{sys.version_info.minor}")]


def _compile(made: Path, target: Path) -> None:
    """Compile bytecode for this Python, with the final paths: without it each run takes seconds."""
    options = ["-q", "-j", "0", "-x", _NOT_COMPILED, "-s", str(made), "-p", str(target)]
    command = [sys.executable, "-I", "-S", "-m", "compileall", *options, *_libraries(made)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise InstallError(f"compiling: {done.stdout.strip()[-500:]}{done.stderr.strip()[-500:]}")


def _prove(tree: Path) -> None:
    """Assert that the program starts, and finds every module of Python's own library that it may need."""
    command = [sys.executable, "-I", "-S", "-c", _PROOF, *_libraries(tree)]
    imported = subprocess.run(command, check=False, capture_output=True, text=True)
    for done in (imported, run(tree, "--version")):
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            hint = "" if "Module" not in said else "Python's own library is incomplete; on Debian: apt install python3"
            raise InstallError(f"wanted the new program to start, found: {said}", hint)


def _assert_settings_load(tree: Path, *, despite_settings: bool) -> None:
    if not places.SETTINGS.exists():
        return
    done = run(tree, "settings", "check")
    if done.returncode:
        said = done.stderr.strip()
        if not despite_settings:
            raise InstallError(
                f"{places.SETTINGS}: wanted settings that the new version accepts, found:\n{said}",
                "correct them (plug-ins go into /opt/ca-bridge/plugins), or use --despite-settings",
            )
        print(f"warning: the new version refuses the settings:\n{said}", file=sys.stderr)


def run(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the program of a tree."""
    environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "HOME": "/"}
    program = str(tree / "bin/ca-bridge")
    return subprocess.run([program, *arguments], env=environment, check=False, capture_output=True, text=True)


def _switch(tree: Path) -> None:
    places.replace_link(places.COMMAND, str(places.CURRENT / "bin/ca-bridge"))  # first: /usr may be read-only
    places.replace_link(places.UNINSTALL, "current/bin/uninstall")
    places.replace_link(places.CURRENT, f"versions/{tree.name}")  # from here on the new version is in use


def _install_units(tree: Path, manifest: Manifest) -> None:
    try:
        units.install(tree)
    except OSError as e:
        raise InstallError(
            f"{places.UNITS}: wanted to write the units, found: {e.strerror or e}",
            f"ca-bridge {manifest.version} is in use already; install it again to get its units",
        ) from e


def _adopt_environment() -> None:
    """
    Link the program of an earlier version's virtual environment to the new one, for jobs that name it.

    The rest of the environment stays, because the operator may have added packages.
    """
    if (places.TOP / "pyvenv.cfg").is_file():
        places.replace_link(places.TOP / "bin/ca-bridge", "../current/bin/ca-bridge")


def remove_trees(keep: AbstractSet[Path | None]) -> None:
    """Remove trees that this installer made, and no other directory."""
    for tree in places.VERSIONS.iterdir():
        if tree not in keep and not tree.is_symlink() and (tree / "bin/ca-bridge").is_file():
            shutil.rmtree(tree)


def _tell(manifest: Manifest, before: Path | None, *, enabled: bool) -> None:
    was = version(before) if before else ""
    if not was:
        done = f"installed ca-bridge {manifest.version}"
    elif before == current():
        done = f"ca-bridge {manifest.version} is installed already"
    elif was == manifest.version:
        done = f"replaced ca-bridge {was} with another build of it"
    else:
        done = f"upgraded ca-bridge from {was} to {manifest.version}"
    print(done, f"in {places.TOP}")
    print(f"command:  {places.COMMAND}")
    print(f"units:    {places.UNITS}/ca-bridge*")
    if (places.TOP / "pyvenv.cfg").is_file():
        print(
            f"kept:     the virtual environment in {places.TOP}; {places.TOP}/bin/ca-bridge now leads to the new program"
        )
    for path, program in units.hidden():
        print(f"note:     systemd uses {path} instead of the installed unit; it starts {program}")
    _tell_others()
    if not places.SETTINGS.exists():
        print("pages:    ca-bridge help; ca-bridge help first-renewal")
        print("next:     ca-bridge settings init KIND (vault, openssl, cfssl …); ca-bridge doctor")
    if not enabled and not (places.OWN_UNITS / "timers.target.wants/ca-bridge.timer").is_symlink():
        print(f"next:     systemctl enable --now {' '.join(units.NIGHTLY)}")


def _tell_others() -> None:
    """Name other programs called ca-bridge that a shell may find first."""
    for directory in ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/root/.local/bin"):
        other = Path(directory, "ca-bridge")
        if other.exists() and not places.is_ours(other) and not places.COMMAND.samefile(other):
            print(f"note:     {other} is another installation, and a shell may find it first")
