"""
The `ca-bridge` program.

Most of its runs are cron's `ca-bridge renew` with nothing due. Such a run loads no command line framework, takes no lock
and writes nothing but its metrics (row "`renew` with nothing due" of docs/evidence/numbers.md).
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from bridge.errors import BridgeError, Exit

if TYPE_CHECKING:
    from bridge.settings.tables import Settings

#: Options that the fast path understands; `bridge.cli` handles all others.
_PLACES = ("--config", "--pki-dir", "--kubeconfig-dir", "--state-dir")


def main() -> NoReturn:
    """Print that nothing is due, or hand over to `bridge.cli.app`."""
    _open_standard_streams()
    try:
        _run()
    except KeyboardInterrupt:  # before a command began
        os.write(2, b"error: interrupted, nothing was replaced\n")
        os._exit(130)  # as shells do: 128 plus SIGINT


def _open_standard_streams() -> None:
    """
    Open /dev/null on each closed stream, whose number the next pipe would get else, perhaps with a passphrase; and
    escape characters that the locale lacks, so that none of them ends a run.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # open takes the lowest free number
            setattr(sys, name, open(number, "w" if number else "r", errors="backslashreplace"))  # noqa: PTH123, SIM115


def _run() -> NoReturn:
    quiet = nothing_to_do(sys.argv[1:])
    if quiet is not None and not os.isatty(1):  # for a terminal `bridge.cli` wraps the sentence
        _end_quietly(quiet)
    from bridge.cli.app import app  # noqa: PLC0415 (see above)
    from bridge.system import waiting  # noqa: PLC0415

    waiting.listen()

    try:
        app()
    except SystemExit as e:
        _end(e.code)
    except OSError as e:  # from --version or --help
        _end_unwritten(e)
    raise AssertionError("Typer ends with SystemExit")


def _end(code: str | int | None, text: str = "") -> NoReturn:
    """Print, and exit at once: no thread that waits for a silent host holds up the end."""
    try:
        _print(text)
        print(end="", file=sys.stderr, flush=True)  # noqa: T201
    except OSError as e:
        _end_unwritten(e, code)
    os._exit(code if isinstance(code, int) else 0 if code is None else Exit.FAILED)


def _print(text: str) -> None:
    print(text, end="", flush=True)  # noqa: T201


def _end_unwritten(error: OSError, code: str | int | None = None) -> NoReturn:
    if not code and not isinstance(error, BrokenPipeError):
        with contextlib.suppress(OSError):
            os.write(2, f"error: standard output: {error.strerror}\n".encode())
    codes = [code, Exit.FAILED] if isinstance(code, int) else [Exit.FAILED]
    # a usage error ended the run before it had an outcome
    os._exit(Exit.worst(codes) if codes[0] in Exit.PRECEDENCE and code != Exit.USAGE else codes[0])


class Quiet(NamedTuple):
    """A renewal with nothing due."""

    sentence: str
    settings: Settings


def _end_quietly(quiet: Quiet) -> NoReturn:
    """Print the sentence, and record this run in the metrics file if the settings name one."""
    text = f"{quiet.sentence}\n"
    if quiet.settings.metrics.file is None:
        _end(0, text)
    from bridge import monitoring  # noqa: PLC0415 (only for a metrics file)
    from bridge.system import console  # noqa: PLC0415

    console.set_up(0, console.LogFormat.TEXT)
    try:
        with monitoring.written(quiet.settings, lambda: datetime.now(UTC)) as outcome:
            _print(text)
    except OSError as e:
        _end_unwritten(e)
    _end(outcome.exit_code)


def nothing_to_do(arguments: Sequence[str]) -> Quiet | None:
    """
    Return the output of a plain `renew` that has nothing to do and nothing else to say; None in every other case.

    Problems (an argument, the settings, a file, an interrupted installation) are left to `bridge.cli`.
    """
    places = _places(arguments)
    if places is None:
        return None
    from bridge.node.reading import read_node  # noqa: PLC0415 (see above)
    from bridge.renewal import nothing_due  # noqa: PLC0415
    from bridge.renewal.selection import RunOptions, select  # noqa: PLC0415
    from bridge.settings.load import Overrides  # noqa: PLC0415
    from bridge.state import Store, credentials, is_checked  # noqa: PLC0415

    try:
        settings = Overrides(*places).settings()
        if settings.node.pairs and not settings.node.name:  # a pair's names may contain the node's
            return None
        store, now = Store(settings.node.state_dir), datetime.now(UTC)
        if store.has_work() or not is_checked(settings, store):
            return None
        node = read_node(settings.node)
        selection = select(node, settings, RunOptions(), now)
        if selection.items or selection.failed or credentials.warnings(credentials.seen(settings) or (), settings, now):
            return None
    except (BridgeError, OSError):  # OSError: this user may not read the state directory
        return None
    return Quiet(nothing_due(node, settings, now), settings)


def _places(arguments: Sequence[str]) -> list[Path | None] | None:
    """Parse `renew` and the options in `_PLACES`; None for anything else."""
    if not arguments or arguments[0] != "renew":
        return None
    options = arguments[1:]
    given = dict(zip(options[::2], options[1::2], strict=False))
    if len(options) % 2 or not given.keys() <= set(_PLACES) or not all(given.values()):
        return None
    return [Path(given[name]) if name in given else None for name in _PLACES]
