"""`enroll` and `enrolments`: a one-time secret lets a node without certificates ask the door of `serve`."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bridge.cli.options import Common, Output, OutputOption, command, duration_option, group, utc_now
from bridge.cli.printing import say, say_json, say_table
from bridge.cli.serve import assert_installed
from bridge.errors import Exit
from bridge.pki.expiry import minute, rfc3339
from bridge.system.console import log, printable

if TYPE_CHECKING:
    from bridge.door.enrolments import Enrolment

commands = typer.Typer()
enrolments_group = group(commands, "enrolments", "Show and withdraw the secrets of `ca-bridge enroll`.")

_HOUR = timedelta(hours=1)


@command(commands, "enroll")
def enroll(
    common: Common,
    node: Annotated[str, typer.Argument(metavar="NODE", help="The node's name, as kubeadm gets it.")],
    cluster: Annotated[str, typer.Option(help="The node's cluster. [default: node.cluster]", show_default=False)] = "",
    lasts: Annotated[timedelta, duration_option("How long the secret counts. [default: 1h]", "--for")] = _HOUR,
    certificates: Annotated[
        list[str] | None,
        typer.Option(
            "--certificate",
            metavar="NAME",
            help="One that it is for, by kubeadm's name; may be given more than once. [default: all that the policy allows]",
        ),
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="The door's policy. [default: desk-policy.toml beside the settings]")
    ] = None,
) -> int:
    """
    Print a one-time secret with which a node asks the door for its first certificates.

    It runs at the door's host. The secret is for this node and one request, and ends by itself; the door keeps a hash of
    it. Put it into the file that `enrolment_file` of the node's backend names. The policy decides what is signed.
    """
    assert_installed("ca-bridge enroll")
    from bridge.door import enrolments  # noqa: PLC0415 (heavy, and an extra's packages)

    settings = common.settings()
    wanted = enrolments.Wanted(
        node=node,
        cluster=cluster or settings.node.cluster,
        certificates=tuple(dict.fromkeys(certificates or ())),
        lasts=lasts,
    )
    made, secret = enrolments.enroll(settings, policy.absolute() if policy is not None else None, wanted, utc_now())
    say(secret)
    text = "enrolment %d: for %s of cluster %s, for %s, until %s"
    names = ", ".join(made.certificates) or "all certificates that the policy allows"
    log.info(text, made.id, printable(made.node), printable(made.cluster), printable(names), minute(made.ends))
    return Exit.DONE


@command(enrolments_group, "list")
def list_enrolments(common: Common, output: OutputOption = Output.TEXT) -> int:
    """List the enrolments, the newest first: number, state, node, until when, and who made it."""
    assert_installed("ca-bridge enrolments")
    from bridge.door import enrolments  # noqa: PLC0415 (as above)

    found, now = enrolments.listed(common.settings_with_record()), utc_now()
    if output is Output.JSON:
        say_json(enrolments=[_json(one, one.state(now)) for one in found])
    elif found:
        say_table([_row(one, one.state(now)) for one in found], (5, 6))
    else:
        say("no enrolments: `ca-bridge enroll NODE` makes one")
    return Exit.DONE


@command(enrolments_group, "withdraw")
def withdraw(
    common: Common, number: Annotated[int, typer.Argument(metavar="NUMBER", help="As in `ca-bridge enrolments list`.")]
) -> int:
    """Withdraw an enrolment; a request that came with it, and that is not signed yet, is refused."""
    assert_installed("ca-bridge enrolments")
    from bridge.door import enrolments  # noqa: PLC0415 (as above)

    one = enrolments.withdraw(common.settings_with_record(), number, utc_now())
    say(f"enrolment {one.id} of {printable(one.node)} is withdrawn")
    if one.used is not None:
        log.warning("it was used %s: `ca-bridge audit show` has what was signed since", minute(one.used))
    return Exit.DONE


def _row(one: Enrolment, state: str) -> tuple[str, ...]:
    names = ", ".join(one.certificates) or "all"
    found = (str(one.id), state, one.node, one.cluster, f"until {minute(one.ends)}", f"by {one.created_by}", names)
    return tuple(map(printable, found))


def _json(one: Enrolment, state: str) -> dict[str, Any]:
    return {
        "number": one.id,
        "state": state,
        "node": one.node,
        "cluster": one.cluster,
        "certificates": list(one.certificates),
        "created": rfc3339(one.created),
        "createdBy": one.created_by,
        "ends": rfc3339(one.ends),
        "used": rfc3339(one.used) if one.used is not None else None,
        "withdrawn": rfc3339(one.withdrawn) if one.withdrawn is not None else None,
    }
