"""
The `ca-bridge` program.

Most of its runs are cron's `ca-bridge renew` with nothing due. Those load no command line framework, take no lock
and write nothing: a third of the time, every night on every node.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from bridge.errors import Exit

if TYPE_CHECKING:
    from bridge.node.inventory import Item
    from bridge.specs import KeyAlgorithm

_INTERRUPTED = 130  # as shells have it: 128 and SIGINT

#: What may stand beside `renew`; anything else is for the command line proper.
_PLACES = ("--config", "--pki-dir", "--kubeconfig-dir", "--state-dir")


def main() -> NoReturn:
    """Say that nothing is due, or hand over to `bridge.cli.app`."""
    gc.disable()  # importing makes many objects and no garbage: looking for it takes a twentieth of a cron run
    try:
        _run()
    except KeyboardInterrupt:  # before a command has begun
        os.write(2, b"error: interrupted, nothing was replaced\n")
        os._exit(_INTERRUPTED)


def _run() -> NoReturn:
    sentence = nothing_to_do(sys.argv[1:])
    if sentence is not None:
        _end(0, f"{sentence}\n")
    from bridge.cli.app import app  # noqa: PLC0415 (see above)
    from bridge.system import interruption  # noqa: PLC0415

    interruption.listen()

    gc.freeze()
    gc.enable()
    try:
        app()
    except SystemExit as e:
        _end(e.code)
    raise AssertionError("Typer ends with SystemExit")


def _end(code: str | int | None, text: str = "") -> NoReturn:
    """Print, and end at once: taking a few hundred modules apart one by one is a tenth of a cron run's time."""
    try:
        print(text, end="", flush=True)  # noqa: T201 (unlike `sys.stdout.write` it bears a closed standard output)
        print(end="", file=sys.stderr, flush=True)  # noqa: T201
    except OSError as e:
        if not code and not isinstance(e, BrokenPipeError):  # else it was told already
            with contextlib.suppress(OSError):
                os.write(2, f"error: standard output: {e.strerror}\n".encode())
        os._exit(Exit.FAILED)
    os._exit(code if isinstance(code, int) else 0 if code is None else Exit.FAILED)


def nothing_to_do(arguments: Sequence[str]) -> str | None:
    """
    What `renew` would print if nothing is due and nothing else is to be said; None in every other case.

    Whatever is odd (an argument, the settings, a file, an interrupted installation) is not judged here. Where something
    will be renewed, its keys are begun.
    """
    plain = _plain_renew(arguments)
    if plain is None:
        return None
    names, places = plain
    from bridge.errors import BridgeError  # noqa: PLC0415
    from bridge.node import inventory  # noqa: PLC0415 (see above)
    from bridge.renewal.selection import nothing_due, select  # noqa: PLC0415
    from bridge.settings.load import load, overridden  # noqa: PLC0415
    from bridge.state.checked_settings import is_checked  # noqa: PLC0415
    from bridge.state.store import Store  # noqa: PLC0415

    named = os.environ.get("CA_BRIDGE_CONFIG")
    try:
        config = places["--config"] or (Path(named) if named else None)
        settings = overridden(load(config), *(places[name] for name in _PLACES[1:]))
        node = inventory.of(settings.node)
        store, now = Store(settings.node.state_dir), datetime.now(UTC)
        selection = select(node, settings, names, now)
    except BridgeError:
        return None
    try:
        is_something_left = store.is_interrupted or any(
            map(Path.exists, (store.requests, store.hooks, store.unproven, store.revocations, store.copies))
        )
        is_held = not names and (
            bool(settings.renewal.window or settings.renewal.jitter.most) or store.attempts.exists()
        )
    except OSError:  # nobody else may look into the state directory
        return None
    if selection.items and not is_something_left and not is_held:
        _begin_keys(selection.items, settings.renewal.key)
    if not is_checked(settings, store):
        return None
    is_told = settings.metrics.file is not None  # each run is
    if names or selection.items or selection.failed or is_something_left or is_told:
        return None
    return nothing_due(node, settings, now)


def _begin_keys(items: Sequence[Item], wanted: KeyAlgorithm | Literal["same"]) -> None:
    from bridge.errors import BridgeError  # noqa: PLC0415
    from bridge.pki.csr import key_algorithm  # noqa: PLC0415 (only where something is renewed)
    from bridge.renewal import new_keys  # noqa: PLC0415

    with contextlib.suppress(BridgeError):  # the renewal says it
        new_keys.begin([key_algorithm(item.certificates[0], wanted) for item in items])


def _plain_renew(arguments: Sequence[str]) -> tuple[list[str], dict[str, Path | None]] | None:
    """The names and options of a plain `renew`; None when it is not one."""
    if not arguments or arguments[0] != "renew":
        return None
    names = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments[1:]))
    options = arguments[1 + len(names) :]
    given = dict(zip(options[::2], options[1::2], strict=False))
    if len(options) % 2 or not given.keys() <= set(_PLACES) or not all(given.values()):
        return None
    return names, {name: Path(given[name]) if name in given else None for name in _PLACES}
