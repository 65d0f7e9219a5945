"""`serve`: one door for all nodes."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from bridge.cli.options import Common, command, utc_now
from bridge.errors import BridgeError, Exit
from bridge.state.store import Store
from bridge.system.console import log
from bridge.system.locks import lock

commands = typer.Typer()

#: The distributions of the extra `serve`, by the module that is imported.
_NEEDED = {"cheroot": "cheroot", "jinja2": "Jinja2", "sqlalchemy": "SQLAlchemy", "alembic": "alembic"}


class MissingExtraError(BridgeError):
    """The packages that the door's commands alone need are not installed."""

    exit_code = Exit.USAGE
    hint = (
        "install them beside the program: `pip install 'kubeadm-ca-bridge[serve]'`, "
        "or with digests `pip install --require-hashes -r requirements-serve.lock`"
    )


@command(commands, "serve")
def serve(
    common: Common,
    policy: Annotated[
        Path | None, typer.Option(help="What may be signed. [default: desk-policy.toml beside the settings]")
    ] = None,
) -> int:
    """
    Sign what nodes ask for over HTTPS, as far as the desk's policy allows: one door to the CA for all nodes.

    It works until SIGTERM; `ca-bridge help door` has its settings, addresses and metrics.
    """
    assert_installed("ca-bridge serve")
    from bridge.door.service import Service  # noqa: PLC0415 (heavy, and an extra's packages)

    settings = common.settings()
    store = Store(settings.node.state_dir)
    store.prepare()
    with lock(store.door_lock, "ca-bridge serve"):  # two doors of one state directory would be one to the others
        service = Service(settings, policy.absolute() if policy is not None else None, utc_now)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: service.stop())
        service.run(lambda port: log.info("serving at port %d", port))
    return Exit.DONE


def assert_installed(command: str) -> None:
    """Refuse to begin without the packages of the extra `serve` (MissingExtraError)."""
    from importlib.util import find_spec  # noqa: PLC0415 (for this command alone)

    missing = [name for module, name in _NEEDED.items() if find_spec(module) is None]
    if missing:
        raise MissingExtraError(f"{command} needs {', '.join(_NEEDED.values())}, found no {', '.join(missing)}")
