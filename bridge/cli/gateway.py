"""`gateway`: the service, and its check."""

from __future__ import annotations

import signal
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from bridge.cli.options import Common, command, utc_now
from bridge.cli.printing import say_sentence
from bridge.cli.program import app
from bridge.errors import BridgeError, Exit
from bridge.settings.tables import Settings
from bridge.system.console import log, print_error

if TYPE_CHECKING:
    from bridge.gateway.service import Service

CheckOption = Annotated[
    bool, typer.Option("--check", help="Read settings, policy and inventory, ask the API and the CA, sign nothing.")
]


@command(app, "gateway")
def gateway(common: Common, check: CheckOption = False) -> None:
    """
    Sign what kubelets and users ask for by the certificates API, as far as the policy allows.

    It works until SIGTERM; docs/gateway.md has its settings, policy and metrics.
    """
    raise typer.Exit(run(common.settings(), utc_now, check=check))


def run(settings: Settings, now: Callable[[], datetime], *, check: bool) -> int:
    """
    Run or check the gateway, and return the exit code.

    Raises:
        BridgeError: Nothing could be begun.
    """
    from bridge.gateway.service import Service  # noqa: PLC0415 (all of the gateway's room)

    service = Service(settings, now)
    if check:
        return _check(service)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: service.stop())
    service.run(lambda port: log.info("gateway %s%s", service.identity, f", status at port {port}" if port else ""))
    return Exit.DONE


def _check(service: Service) -> int:
    found = list(service.check())
    for text in found:
        print_error(BridgeError(text, hint="docs/gateway.md says what the CA has to allow"))
    if found:
        return Exit.REFUSED
    signers, nodes = ", ".join(service.signers), len(service.nodes.inventory.nodes)
    say_sentence(f"ready: {signers}; {nodes} nodes in the inventory; API server {service.api.server}")
    return Exit.DONE
