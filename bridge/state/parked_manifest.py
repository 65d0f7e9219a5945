"""A manifest that a restart has moved out of its directory: the journal, and the recovery after a crash."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from bridge.errors import BridgeError, Exit
from bridge.state.install import STAGED_PREFIX, attributes_from, attributes_json
from bridge.state.store import Store, changed_here
from bridge.system.files import Attributes, digest, exchange, sync_directory, write_atomically, write_staged
from bridge.system.state_file import OnDamage, StateFile

#: leaving: the manifest may still be in its place; out: it is away; back: it is there again, and the component was not
#: seen healthy yet.
ParkingState = Literal["leaving", "out", "back"]


class RestartError(BridgeError):
    """A component was not restarted, or did not come back."""

    exit_code: ClassVar[int] = Exit.NOT_LIVE


def aside(manifest: Path) -> Path:
    """The path where a manifest waits: on the same file system, outside the directory in which a kubelet reads all files."""
    return manifest.parent.resolve().parent / f"{STAGED_PREFIX}{manifest.name}"


def recover(store: Store) -> str | None:
    """Put back the manifest that an interrupted restart has moved away, and return a sentence about that."""
    journal = restart_file(store).read()
    if journal is None:
        return None
    done = put_back(store, journal)
    close(store)
    name, state = journal["component"], journal["state"]
    if done is not None:
        return f"{name}: an interrupted restart had moved its manifest away: {done}"
    if state == "leaving":
        return f"{name}: an interrupted restart had not begun; its manifest is in its place"
    return f"{name}: a restart was interrupted before {name} was seen healthy; its manifest is in its place"


def journal_of(name: str, manifest: Path, content: bytes | None = None) -> dict[str, Any]:
    """A journal with the whole manifest that is to be put back (None: as it is), even if the moved file is lost."""
    if content is not None and manifest.is_symlink():
        raise RestartError(f"{manifest}: wanted to change the manifest of {name}, found a symlink")
    try:
        old, attributes = manifest.read_bytes(), Attributes.of(manifest)
    except OSError as e:
        raise RestartError(f"{manifest}: wanted the manifest of {name}, found: {e.strerror}") from e
    return {
        "version": 1,
        "component": name,
        "manifest": str(manifest),
        "aside": str(aside(manifest)),
        "content": base64.b64encode(old if content is None else content).decode(),
        "attributes": attributes_json(attributes),
    }


def replace(manifest: Path, content: bytes) -> None:
    """Give a manifest another text in one step; a kubelet reads each file of its directory, so it is staged outside."""
    exchange(manifest, content, aside(manifest))
    changed_here.append(manifest)
    sync(manifest)


def enter(store: Store, journal: dict[str, Any], state: ParkingState) -> None:
    """Record how far a restart has come."""
    journal["state"] = state
    restart_file(store).replace(journal)


def restart_file(store: Store) -> StateFile[dict[str, Any]]:
    """The journal of a restart: while it is there, a component's manifest may be out of its directory."""
    return StateFile(
        path=store.restart,
        what="our own journal of a restart",
        parse=_journal_of,
        keys=frozenset({"version", "component", "manifest", "aside", "content", "attributes", "state"}),
        on_damage=OnDamage.REFUSE,
        afterwards=f"see that each manifest is in its place: one that is not may be called {STAGED_PREFIX}….yaml, "
        "in the directory above",
        exit_code=Exit.NOT_LIVE,
    )


def _journal_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """Parse a journal; the manifest's name is in it twice, so that damage shows in a journal without a digest, too."""
    base64.b64decode(document["content"], validate=True)
    attributes_from(document["attributes"])
    manifest, waiting = Path(document["manifest"]), Path(document["aside"])
    if not isinstance(document["component"], str) or not document["component"].isprintable():
        raise TypeError("not written by this program")
    if waiting.name != f"{STAGED_PREFIX}{manifest.name}" or document["state"] not in ("leaving", "out", "back"):
        raise ValueError("not written by this program")
    return dict(document)


def put_back(store: Store, journal: dict[str, Any]) -> str | None:
    """Make sure that a manifest is in its place, and say what had to be done; a new one of kubeadm's or an operator's stays."""
    manifest, waiting = Path(journal["manifest"]), Path(journal["aside"])
    content, done = base64.b64decode(journal["content"]), None
    if not is_there(manifest):
        if not _is_whole(waiting, content):
            waiting.unlink(missing_ok=True)
            write_staged(waiting, content, attributes_from(journal["attributes"]))
        waiting.rename(manifest)
        done = f"{manifest} is back"
    elif is_there(waiting):
        if manifest.read_bytes() != content:
            kept = store.directory / f"{manifest.stem}-{digest(content)[:8]}.yaml"
            write_atomically(kept, content)
            done = f"there is a new {manifest}, which stays; the old one is {kept}"
        waiting.unlink()
    sync(manifest)
    return done


def _is_whole(waiting: Path, content: bytes) -> bool:
    """Whether it is complete, and not left by a `recover` that was itself interrupted."""
    if waiting.is_symlink():
        return True
    try:
        return waiting.exists() and waiting.read_bytes() == content
    except OSError:  # a file that can't be read may still be moved
        return True


def is_there(path: Path) -> bool:
    """Whether a file or symlink is there; a symlink may lead nowhere while it is away."""
    return path.exists() or path.is_symlink()


def sync(manifest: Path) -> None:
    """Make a manifest's move outlive a power cut."""
    for directory in (manifest.parent, aside(manifest).parent):
        sync_directory(directory)


def close(store: Store) -> None:
    """Remove the journal: the manifest is in its place."""
    restart_file(store).remove()
