"""
Write a container image of static programs as a `docker save` archive, which `ctr images import` reads.

usage: docker_archive.py OUT REFERENCE FILE...

The files go to /usr/local/bin, but `pause` to / and to the entry point.
Standard library only: `node.sh` runs it with the system's Python.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}  # Go's names, as kubelet and containerd compare them


def layer(files: Sequence[Path]) -> bytes:
    """The image's only layer: a tar with the programs."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for path in files:
            member = tar.gettarinfo(path, path.name if path.name == "pause" else f"usr/local/bin/{path.name}")
            member.uid = member.gid = member.mtime = 0
            member.mode = 0o755
            with path.open("rb") as file:
                tar.addfile(member, file)
    return raw.getvalue()


def config(files: Sequence[Path], blob: bytes) -> bytes:
    """The image's configuration (https://github.com/opencontainers/image-spec/blob/main/config.md)."""
    # GOGC: Go looks for garbage when five times as much is used; with its default a node takes a tenth more processor time.
    run: dict[str, object] = {"Env": ["PATH=/usr/local/bin", "GOGC=400"]}
    if files[0].name == "pause":
        run["Entrypoint"] = ["/pause"]
    return json.dumps(
        {
            "architecture": architecture(),
            "os": "linux",
            "config": run,
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(blob).hexdigest()}"]},
        }
    ).encode()


def architecture() -> str:
    """The architecture of this machine, by Go's name."""
    return _ARCHITECTURES.get(platform.machine(), platform.machine())


def write(out: Path, reference: str, files: Sequence[Path]) -> None:
    """Write the archive."""
    blob = layer(files)
    save(out, reference, config(files, blob), blob)


def save(out: Path, reference: str, settings: bytes, blob: bytes) -> None:
    """Write an archive of one layer, with the image's configuration."""
    name = f"{hashlib.sha256(settings).hexdigest()}.json"
    manifest = [{"Config": name, "RepoTags": [reference], "Layers": ["layer.tar"]}]
    members = {name: settings, "layer.tar": blob, "manifest.json": json.dumps(manifest).encode()}
    with tarfile.open(out, "w") as tar:
        for member, data in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


if __name__ == "__main__":
    _, target, image, *programs = sys.argv
    write(Path(target), image, [Path(program) for program in programs])
