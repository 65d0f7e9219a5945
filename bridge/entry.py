"""
The `ca-bridge` program.

Most of its runs are cron's `ca-bridge renew` with nothing due, and a monitor's `ca-bridge check-expiration`. Those load
no command line framework, and a renewal with nothing due takes no lock and writes nothing but its metrics: a third of
the time, every night on every node.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from bridge.errors import BridgeError, Exit
from bridge.node.reading import read_node

if TYPE_CHECKING:
    from bridge.settings.tables import Settings
    from bridge.state.credentials import Credential

#: Options that the fast paths understand; `bridge.cli` handles all others.
_PLACES = ("--config", "--pki-dir", "--kubeconfig-dir", "--state-dir")


def main() -> NoReturn:
    """Print that nothing is due, or the table of expirations, or hand over to `bridge.cli.app`."""
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
    table = expirations(sys.argv[1:])
    if table is not None:
        _end(*table)
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
    """Print, and exit at once: an orderly teardown of a few hundred modules takes a tenth of a cron run's time."""
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


def expirations(arguments: Sequence[str]) -> tuple[int, str] | None:
    """Return the exit code and table of a plain `check-expiration`; None: `bridge.cli` must do it, and report problems."""
    plain = _plain("check-expiration", arguments)
    if plain is None or plain.names:
        return None
    try:
        from bridge.cli.expiration_forms import look  # noqa: PLC0415 (see above)

        settings = plain.settings()
        if any(authority.next for authority in settings.authorities.values()):  # `bridge.cli` shows the phases
            return None
        own: Sequence[Credential] | None = ()
        if _may_have_credentials(settings):
            from bridge.state import credentials  # noqa: PLC0415 (only if there is a credential)

            own = credentials.seen(settings)
            if own is None and credentials.may_look(settings):
                return None
        node, now = read_node(settings.node), datetime.now(UTC)
        text, troubles, code = look(node, now, None, "table", renewal=settings.renewal, own=own)
    except Exception:  # noqa: BLE001 (`bridge.cli` meets the same error, and reports it)
        return None
    return (code, text) if not troubles and text.isascii() else None


def nothing_to_do(arguments: Sequence[str]) -> Quiet | None:
    """
    Return the output of a `renew` that has nothing to do and nothing else to say; None in every other case.

    Problems (an argument, the settings, a file, an interrupted installation) are left to `bridge.cli`.
    """
    plain = _plain("renew", arguments)
    if plain is None:
        return None
    names = plain.names
    from bridge.renewal import nothing_due  # noqa: PLC0415
    from bridge.renewal.selection import RunOptions, select  # noqa: PLC0415
    from bridge.state import Store, is_checked  # noqa: PLC0415

    try:
        settings = plain.settings()
        node = read_node(settings.node)
        store, now = Store(settings.node.state_dir), datetime.now(UTC)
        selection = select(node, settings, RunOptions(names=tuple(names)), now)
    except BridgeError:
        return None
    try:
        left = [store.requests, store.hooks, store.unproven, store.postponed, store.pairs, store.revocations]
        left += [store.copies, store.collected, store.attempts]
        is_something_left = store.is_interrupted or any(map(Path.exists, left))
    except OSError:  # this user may not read the state directory
        return None
    if not is_checked(settings, store) or _has_to_warn(settings, now):
        return None
    if names or selection.items or selection.failed or is_something_left:
        return None
    return Quiet(nothing_due(node, settings, now), settings)


def _has_to_warn(settings: Settings, now: datetime) -> bool:
    """Whether one of our own credentials ends soon, or can't be read."""
    if not _may_have_credentials(settings):
        return False
    from bridge.state import credentials  # noqa: PLC0415 (only if there is a credential)

    return bool(credentials.warnings(credentials.seen(settings) or (), settings, now))


def _may_have_credentials(settings: Settings) -> bool:
    """Whether the settings name a credential of ours, a CA has reported a token's end, or no run has looked yet."""
    keys = settings.node.desk_key or settings.node.order_key or settings.gateway.kubeconfig
    if keys or not settings.authorities:
        return bool(keys)
    from bridge.state import Store, checked_credentials  # noqa: PLC0415 (see above)

    store = Store(settings.node.state_dir)
    return bool(checked_credentials(settings, store) != [] or store.credentials.exists())


class _Plain(NamedTuple):
    """A command line of names and the options in `_PLACES` alone."""

    names: list[str]
    places: list[Path | None]  #: Values of `_PLACES`.

    def settings(self) -> Settings:
        """Return the settings as in `bridge.cli`, but without the node's name (BridgeError: they need it)."""
        from bridge.settings.load import Overrides  # noqa: PLC0415

        settings = Overrides(*self.places).settings()
        if settings.node.pairs and not settings.node.name:
            raise BridgeError("names of further pairs may contain the node's")
        return settings


def _plain(command: str, arguments: Sequence[str]) -> _Plain | None:
    """Parse this command's names and `_PLACES`; None for another command, or with other options."""
    if not arguments or arguments[0] != command:
        return None
    names = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments[1:]))
    options = arguments[1 + len(names) :]
    given = dict(zip(options[::2], options[1::2], strict=False))
    if len(options) % 2 or not given.keys() <= set(_PLACES) or not all(given.values()):
        return None
    return _Plain(names, [Path(given[name]) if name in given else None for name in _PLACES])
