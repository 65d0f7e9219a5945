"""
All files of a new node in one step, after the whole was judged as it will be; copies of them, if the operator wants any.

The step is that of a renewal: the next run finishes or undoes it after a crash.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from bridge.bootstrap import kept, new_requests
from bridge.bootstrap.kept import Kept
from bridge.bootstrap.places import Places, live, some_of, specs_of
from bridge.bootstrap.whole import look_at
from bridge.bootstrap.wish import LeftoversError, NodeWish, NotWholeError, OtherWishError
from bridge.errors import BridgeError
from bridge.specs import KUBELET_CONF
from bridge.state import audit
from bridge.state.install import CERTIFICATE_MASK, KEY_MASK, Replacement, digest, install
from bridge.state.session import Run
from bridge.system.files import sync_directory
from bridge.system.paths import exposure

_DIRECTORY_MODE = 0o755
_PRIVATE = 0o600


def put_in_place(run: Run, wish: NodeWish, files: Sequence[Replacement], kubelet_pem: Path) -> None:
    """
    Judge the whole as it will be; copy it if that is wished; then put all of it in place in one step.

    Args:
        run: Under whose lock.
        wish: What for.
        files: Those that are new.
        kubelet_pem: The one among them that `kubelet-client-current.pem` is to lead to.

    Raises:
        NotWholeError: Something is wrong with the whole; nothing was put in place.
        BridgeError: A directory can't hold keys.
    """
    places = wish.places
    new: dict[Path, bytes | None] = {file.path: file.data for file in files}
    new[places.kubelet_current] = new[kubelet_pem]

    def overlay(path: Path) -> bytes | None:
        return new[path] if path in new else live(path)

    look = look_at(run.settings, wish, overlay, run.now())
    if problems := look.problems():
        raise NotWholeError("\n".join(problems))
    whole = {path: data for path in look.files() if (data := overlay(path)) is not None}
    whole.update(wish.files)
    whole[kubelet_pem] = whole.pop(places.kubelet_current)
    _keep(run, wish, whole)
    _make_directories(wish)
    _link(places.kubelet_current, kubelet_pem)
    about = {"command": f"bootstrap {wish.role}", **audit.who(), "certificates": []}
    install(run.store, files, run.record.run_id, about)
    new_requests.forget(run)


def keep_what_is_there(run: Run, wish: NodeWish) -> None:
    """Copy a node whose files are all in place: an earlier run may have been cut off after the last step but one."""
    look = look_at(run.settings, wish, live, run.now())
    there = {path: data for path in look.files() if (data := live(path)) is not None}
    _keep(run, wish, {**there, **wish.files})


def put_back(run: Run, wish: NodeWish) -> int:
    """
    Put copies of an earlier run in place again, and tell how many files those are; 0: there are no copies.

    Raises:
        OtherWishError: They are another configuration's, or another role's.
        LeftoversError: There is another file in the place of one.
        NotWholeError: They are of no use any more.
    """
    if wish.keep is None or wish.anew or not (wish.keep / f"{wish.node}.kept.json").exists():
        return 0
    found = kept.kept_file(wish.keep, wish.node).read()
    if found is None or (found.role, found.config) != (wish.role, wish.mark):
        raise OtherWishError(
            f"{wish.keep}: wanted copies of what is asked for now, found those of another configuration or role",
            hint="name another directory, or --anew to have all signed anew",
        )
    files = [_replacement(*one) for one in found.files]
    _assert_free(files, wish.places)
    pem = next(
        file.path for file in files if file.path.parent == wish.places.kubelet_pki and file.path.suffix == ".pem"
    )
    try:
        put_in_place(run, wish, [file for file in files if live(file.path) != file.data], pem)
    except NotWholeError as e:
        e.hint = f"the copies in {wish.keep} are of no use any more: --anew has all signed anew"
        raise
    run.record.add(audit.RECOVERED, result=f"put {len(files)} kept files of {wish.node} back in place")
    run.record.write_or_warn()
    return len(files)


def _assert_free(files: Sequence[Replacement], places: Places) -> None:
    others = [
        file.path for file in files if file.path not in places.serving and live(file.path) not in (None, file.data)
    ]
    if others:
        raise LeftoversError(f"wanted to put copies back, found another file in the place of {some_of(others)}")


def _replacement(name: str, path: Path, mode: int, data: bytes) -> Replacement:
    there = live(path)
    return Replacement(
        certificate=name,
        path=path,
        data=data,
        mode_mask=KEY_MASK if mode == _PRIVATE else CERTIFICATE_MASK,
        was=None if there is None else digest(there),
        attributes=kept.attributes(mode),
    )


def _keep(run: Run, wish: NodeWish, whole: Mapping[Path, bytes]) -> None:
    if wish.keep is None:
        return
    look, current = look_at(run.settings, wish, live, run.now()), wish.places.kubelet_current
    names = {path: spec.name for spec in specs_of(wish.role) for path in look.files_of(spec)}
    files = tuple(
        (
            names.get(path, KUBELET_CONF if path.suffix == ".pem" else "node"),
            Path(os.path.realpath(path)) if path == current else path,
            _mode(path),
            data,
        )
        for path, data in whole.items()
    )
    kept.keep(wish.keep, wish.node, Kept(role=wish.role, config=wish.mark, files=files))


def _mode(path: Path) -> int:
    """The mode that `Composer` gives a file."""
    return 0o644 if path.suffix == ".crt" else _PRIVATE


def _make_directories(wish: NodeWish) -> None:
    """Make kubeadm's directories and the kubelet's; nobody else may write to them."""
    for path in wish.places.directories(wish.role):
        path.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
        if (found := exposure(path)) is not None:
            raise BridgeError(f"{path} can't hold keys: {found}", hint=found.hint)


def _link(link: Path, target: Path) -> None:
    """Make the link as a kubelet does: absolute, and replaced in one step."""
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.rename(link)
    sync_directory(link.parent)
