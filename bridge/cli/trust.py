"""`trust`: the roots that pods trust, for clusters whose pods' certificates come from the settings' CA."""

from __future__ import annotations

from typing import Annotated

import typer

from bridge.cli.options import Common, Output, OutputOption, command, group
from bridge.cli.printing import say_json, say_sentence
from bridge.errors import BridgeError, Exit
from bridge.gateway import trust
from bridge.gateway.trust import Bundle
from bridge.system.console import print_error

commands = typer.Typer()
_trust = group(commands, "trust", "Publish the roots that pods trust.")

#: What a bundle has become, for people; `{name}` is the object's.
_WORDS = {
    "published": "published as {name}",
    "replaced": "published anew: {name} had others",
    "unchanged": "{name} has them already",
    "removed": "removed {name}",
    "absent": "nothing to remove",
    "foreign": "left {name} alone: another client has made it",
}


@command(_trust, "publish")
def publish(
    common: Common,
    signers: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SIGNER…]", help="DOMAIN/NAME. [default: those of the gateway's policy]"),
    ] = None,
    remove: Annotated[
        list[str] | None,
        typer.Option("--remove", metavar="SIGNER", help="Remove the bundle of a signer that the policy does not have."),
    ] = None,
    output: OutputOption = Output.TEXT,
) -> int:
    """
    Make the ClusterTrustBundle of each signer equal to pods.crt, for a cluster without the gateway.

    It needs no CA and no policy if the signers are named. What was made for a signer whose table says `publish = false` is
    removed. Run it from a timer: it puts back what others have changed. Exits with 5 if the API server refuses, and with 6
    if it does not answer.
    """
    found = trust.publish(common.settings(), signers or (), remove or ())
    errors = [(one.signer, one.error) for one in found if one.error is not None]
    for signer, error in errors:
        print_error(BridgeError(f"{signer}: {error}", hint=error.hint))
    code = Exit.worst([error.exit_code for _, error in errors])
    if output is Output.JSON:
        say_json(exitCode=code, bundles=[_entry(one) for one in found])
        return code
    for one in found:
        if one.outcome is not None:
            say_sentence(f"{one.signer}: {_WORDS[one.outcome].format(name=one.name)}")
    return code


def _entry(one: Bundle) -> dict[str, str]:
    error = str(one.error) if one.error is not None else ""
    return {"signer": one.signer, "name": one.name, "outcome": one.outcome or "failed", "error": error}
