"""`approvals`: a person decides at the door of `serve`."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bridge.cli.options import Common, Output, OutputOption, command, group, utc_now
from bridge.cli.printing import VALUES_BEGIN, say, say_json, say_sentence, say_table, width_here, wrapped
from bridge.desk.approval import differences
from bridge.errors import Exit
from bridge.pki.bundle_format import short_fingerprint
from bridge.pki.display import fingerprint_text
from bridge.system.console import printable
from bridge.words import counted

if TYPE_CHECKING:
    from bridge.desk.approval import Verdict
    from bridge.door.client import Reviewer, Shown

commands = typer.Typer()
approvals_group = group(commands, "approvals", "Decide about requests that wait at the door for people.")

_SHORT = 16

DigestArgument = Annotated[
    str,
    typer.Argument(metavar="DIGEST", help="The request's digest, or its first 16 digits: `ca-bridge approvals list`."),
]


@command(approvals_group, "list")
def list_approvals(common: Common, output: OutputOption = Output.TEXT) -> int:
    """List the requests that wait for people: digest, node, and what each certificate of them means."""
    with closing(_reviewer(common)) as reviewer:
        found = reviewer.waiting()
    if output is Output.JSON:
        say_json(approver=found.get("approver"), requests=found["requests"])
        return Exit.DONE
    for one in found["requests"]:
        row = (
            str(one.get("digest"))[:_SHORT],
            one.get("node"),
            f"{one.get('approvals')} approved",
            one.get("received"),
        )
        say_table([tuple(map(printable, row))], (3,))
        for certificate in _certificates(one):
            say_sentence(printable(f"{certificate.get('name')}: {certificate.get('means')}"), "  ")
    if not found["requests"]:
        say("no request waits for people")
    return Exit.DONE


@command(approvals_group, "show")
def show(common: Common, digest: DigestArgument, output: OutputOption = Output.TEXT) -> int:
    """Show a request whole: what it asks for, what that replaces and changes, its proofs, and what people decided."""
    with closing(_reviewer(common)) as reviewer:
        shown = reviewer.show(digest)
    if output is Output.JSON:
        say_json(**_json(shown))
    else:
        _print(shown)
    return Exit.DONE


@command(approvals_group, "approve")
def approve(
    common: Common,
    digest: DigestArgument,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="For the record.")] = "",
    output: OutputOption = Output.TEXT,
) -> int:
    """
    Approve a request: sign its digest with your key, and send the signature to the door.

    `ca-bridge approvals show` has what you sign. The door asks its policy once more before the CA signs.
    """
    return _decide(common, digest, "approved", reason, output)


@command(approvals_group, "refuse")
def refuse(
    common: Common,
    digest: DigestArgument,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="For the node and the record.")],
    output: OutputOption = Output.TEXT,
) -> int:
    """Refuse a request; the node gets an answer with your reason and your name."""
    return _decide(common, digest, "refused", reason, output)


def _reviewer(common: Common) -> Reviewer:
    from bridge.door.client import Reviewer  # noqa: PLC0415 (for these commands alone)

    return Reviewer(common.settings().approver, utc_now())


def _decide(common: Common, digest: str, verdict: Verdict, reason: str, output: Output) -> int:
    with closing(_reviewer(common)) as reviewer:
        shown = reviewer.decide(reviewer.show(digest), verdict, reason)
    if output is Output.JSON:
        say_json(**_json(shown))
        return Exit.DONE
    document = shown.document
    text = f"{verdict} {shown.digest[:_SHORT]} of {shown.bundle.node} (fingerprint {short_fingerprint(shown.bundle)})"
    say_sentence(printable(f"{text}: {document.get('approvals')} approvals, the request is {document.get('state')}"))
    return Exit.DONE


def _certificates(one: dict[str, Any]) -> list[dict[str, Any]]:
    found = one.get("certificates")
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _print(shown: Shown) -> None:
    for line in shown.text(utc_now()).splitlines():
        say("\n".join(map(printable, wrapped(line, width_here(), VALUES_BEGIN))))
    say("")
    for certificate in _certificates(dict(shown.document)):
        say_sentence(printable(f"{certificate.get('name')}: {certificate.get('means')}"))
    for request in shown.bundle.requests:
        for text in differences(request):
            say_sentence(printable(f"{request.name} differs: {text}"))
    decisions = shown.document.get("decisions")
    for one in decisions if isinstance(decisions, list) else ():
        if isinstance(one, dict):
            text = f"{one.get('approver')} {one.get('verdict')} it {one.get('decided')} ({one.get('evidence')})"
            say_sentence(printable(f"{text}: {one.get('reason')}" if one.get("reason") else text))
    state, approvals = shown.document.get("state"), shown.document.get("approvals")
    about = counted(len(shown.bundle.requests), "certificate")
    say_sentence(printable(f"{shown.digest}: {about}, {state}, {approvals} approved"))


def _json(shown: Shown) -> dict[str, Any]:
    kept = {key: value for key, value in shown.document.items() if key != "cas"}
    return {**kept, "digest": shown.digest, "fingerprint": fingerprint_text(shown.digest)}
