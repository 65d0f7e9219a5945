"""
Write a directory as an OCI image in one file: an OCI layout in a tar (`oci-archive`).

usage: oci_image.py ROOT OUT REFERENCE EPOCH VERSION

One layer; every file belongs to root and has the same time, so that the same content gives the same bytes.
Standard library only: `scripts/image` runs it with the system's Python.
https://github.com/opencontainers/image-spec
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import platform
import sys
import tarfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}  # Go's names, as container runtimes compare them
_USER = 65532
#: Everything else in ROOT belongs to root.
_OWN = {"var/lib/ca-bridge": 0o700}
_MODES = {"tmp": 0o1777}


def layer(root: Path, epoch: int) -> bytes:
    """A tar of everything below a directory, sorted by name."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(root.rglob("*"), key=lambda one: str(one.relative_to(root)).encode()):
            name = str(path.relative_to(root))
            member = tar.gettarinfo(path, name)
            if member.islnk():  # a hard link would depend on the order
                member.type, member.linkname = tarfile.REGTYPE, ""
                member.size = path.stat().st_size
            member.uid = member.gid = _USER if name in _OWN else 0
            member.uname = member.gname = ""
            member.mtime = epoch
            member.mode = _OWN.get(name, _MODES.get(name, _mode(member)))
            if member.isreg():
                with path.open("rb") as file:
                    tar.addfile(member, file)
            else:
                tar.addfile(member)
    return raw.getvalue()


def _mode(member: tarfile.TarInfo) -> int:
    """A mode that all can read and only the owner can write, whatever the umask was."""
    if member.issym():
        return 0o777
    return 0o755 if member.isdir() or member.mode & 0o100 else 0o644


def documents(blob: bytes, packed: bytes, reference: str, epoch: int, version: str) -> dict[str, bytes]:
    """Return all files of the layout, by name."""
    time = datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    labels = {
        "org.opencontainers.image.title": "ca-bridge",
        "org.opencontainers.image.version": version,
        "org.opencontainers.image.licenses": "Apache-2.0",
    }
    config = _json(
        {
            "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
            "os": "linux",
            "created": time,
            "config": {
                "User": f"{_USER}:{_USER}",
                "Env": ["PATH=/usr/bin", "LANG=C.UTF-8", "HOME=/var/lib/ca-bridge"],
                "Entrypoint": ["/usr/bin/ca-bridge"],
                "WorkingDir": "/",
                "Labels": labels,
            },
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(blob).hexdigest()}"]},
            "history": [{"created": time, "created_by": "scripts/image"}],
        }
    )
    kind = "application/vnd.oci.image"
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": f"{kind}.manifest.v1+json",
            "config": _descriptor(f"{kind}.config.v1+json", config),
            "layers": [_descriptor(f"{kind}.layer.v1.tar+gzip", packed)],
            "annotations": labels,
        }
    )
    names = {"io.containerd.image.name": _whole(reference), "org.opencontainers.image.ref.name": reference}
    entry = {**_descriptor(f"{kind}.manifest.v1+json", manifest), "annotations": names}
    index = {"schemaVersion": 2, "mediaType": f"{kind}.index.v1+json", "manifests": [entry]}
    blobs = {f"blobs/sha256/{hashlib.sha256(one).hexdigest()}": one for one in (config, manifest, packed)}
    return {"oci-layout": _json({"imageLayoutVersion": "1.0.0"}), "index.json": _json(index), **blobs}


def _whole(reference: str) -> str:
    """Complete a name without a registry, as container runtimes do."""
    first, slash, _ = reference.partition("/")
    if not slash:
        return f"docker.io/library/{reference}"
    return reference if "." in first or ":" in first or first == "localhost" else f"docker.io/{reference}"


def _descriptor(kind: str, data: bytes) -> dict[str, Any]:
    return {"mediaType": kind, "digest": f"sha256:{hashlib.sha256(data).hexdigest()}", "size": len(data)}


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def write(root: Path, out: Path, reference: str, epoch: int, version: str) -> str:
    """Write the image; return the layer's digest."""
    blob = layer(root, epoch)
    packed = gzip.compress(blob, compresslevel=6, mtime=0)
    part = out.with_name(f".{out.name}.part")
    with tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in sorted(documents(blob, packed, reference, epoch, version).items()):
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.mode = len(data), epoch, 0o644
            tar.addfile(member, io.BytesIO(data))
    part.replace(out)
    return hashlib.sha256(blob).hexdigest()


if __name__ == "__main__":
    _, source, target, name, seconds, release = sys.argv
    os.umask(0o022)
    digest = write(Path(source), Path(target), name, int(seconds), release)
    print(f"wrote {target}: {name}, {Path(target).stat().st_size / 1e6:.0f} MB, layer sha256:{digest}")
