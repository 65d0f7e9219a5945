"""Releases as `scripts/offline` and `scripts/release` build them, once for all workers of a run."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLATFORM = os.uname().machine


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Lock `.cache/wheels`, which all builds share, so that no other process changes it meanwhile."""
    with (ROOT / ".cache/release.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def offline(directory: Path, **environment: str) -> Path:
    """
    The offline file for this machine; built if the directory has none yet.

    Args:
        directory: Where it is kept; the same for all who want the same.
        environment: On top of the tests' own.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with alone():
        if not list(directory.glob("*.run")):
            command = [str(ROOT / "scripts/offline"), "--platform", PLATFORM, "--output", str(directory)]
            done = subprocess.run(
                command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=600
            )
            assert done.returncode == 0, done.stderr
        (built,) = directory.glob("*.run")
    return built


def clone(directory: Path) -> Path:
    """A clone whose last commit is this tree as it stands, with what was downloaded for it."""
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run([*git, "clone", "--quiet", str(ROOT), str(directory)], check=True)
    listed = ["ls-files", "--others", "--modified", "--deleted", "--exclude-standard"]
    for path in subprocess.check_output([*git, "-C", str(ROOT), *listed], text=True).split():
        source, target = ROOT / path, directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_file():
            shutil.copy(source, target)
        else:
            target.unlink(missing_ok=True)
    subprocess.run([*git, "-C", str(directory), "add", "--all"], check=True)
    commit = ["commit", "--quiet", "--allow-empty", "--message", "as it stands"]
    subprocess.run([*git, "-C", str(directory), *commit], check=True)
    downloads = ROOT / f".cache/wheels/{PLATFORM}"
    shutil.copytree(downloads, directory / downloads.relative_to(ROOT))
    return directory


def release(directory: Path) -> Path:
    """Everything that `scripts/release` makes, below `dist`, signed by the key `key`; `signers` names its public half."""
    with alone():
        if not (directory / "dist/SHA256SUMS.sig").exists():
            shutil.rmtree(directory, ignore_errors=True)
            here = clone(directory / "clone")
            make_signer(directory / "key", directory / "signers")
            command = ["scripts/release", "--platform", PLATFORM, "--output", str(directory / "dist")]
            keys = ["--key", str(directory / "key"), "--signers", str(directory / "signers")]
            done = subprocess.run([*command, *keys], cwd=here, capture_output=True, text=True, check=False, timeout=900)
            assert done.returncode == 0, done.stderr
    return directory


def make_signer(key: Path, signers: Path) -> None:
    """A throwaway key, and the file that lets it sign."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    public = key.with_suffix(".pub").read_text(encoding="ascii")
    signers.write_text(f'release@ca-bridge namespaces="ca-bridge-release" {public}', encoding="ascii")


def serve_packages(directory: Path) -> Path:
    """The packages of `serve` without PostgreSQL's driver, as `pip install --target` puts them there; the directory."""
    whole, base = (
        set(re.findall(r"^([a-z0-9-]+)==", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE))
        for name in ("requirements-serve.lock", "requirements.lock")
    )
    for name in whole - base - {"psycopg", "psycopg-binary", "tzdata"}:
        for file in distribution(name).files or ():
            if not {"..", "__pycache__"} & set(file.parts):
                (directory / file).parent.mkdir(parents=True, exist_ok=True)
                (directory / file).write_bytes(Path(str(file.locate())).read_bytes())
    return directory
