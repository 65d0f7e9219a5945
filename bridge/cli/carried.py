"""`export`, `inspect`, `import` and `pending`: the node's side of an air gap."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from bridge import monitoring
from bridge.cli.declare import Common, argument, command, group
from bridge.cli.options import AllOrNothingOption, ChangeOptions, Names, Output, OutputOption, WaitOption, utc_now
from bridge.cli.printing import (
    VALUES_BEGIN,
    end_text,
    progress_shown,
    say,
    say_headed,
    say_json,
    say_sentence,
    say_table,
)
from bridge.cli.results import log_skipped, print_errors, report
from bridge.errors import BridgeError, Exit
from bridge.pki import bundle_format
from bridge.pki.certificates import csr_fingerprint
from bridge.pki.csr import fingerprint_text
from bridge.pki.expiry import DAY, residual, seconds_left
from bridge.renewal import Selection, airgap, nothing_due
from bridge.renewal.selection import RunOptions
from bridge.state import Store
from bridge.state.open_requests import OpenRequest, OpenRequests
from bridge.system.console import log, print_error, printable
from bridge.words import counted

commands = typer.Typer()
pending = group(commands, "pending", "Show and cancel requests that a CA has not answered yet.")


@command(commands, "export")
def export(
    common: Common,
    path: Annotated[Path, argument("The file to write.", "BUNDLE")],
    names: Names = None,
    *,
    options: ChangeOptions,
    wait: WaitOption = timedelta(),
) -> int:
    """
    Write requests for what is due into one file for a CA desk; the new keys stay on this node.

    While a request waits, exporting it again gives the same key and CSR. It also renews expired certificates, and asks
    for a named one that is missing; the desk's policy decides about that, and about changes.
    """
    settings, wanted = common.settings(), options.read(names, wait=wait)
    with monitoring.kept_current(settings, utc_now), progress_shown() as progress:
        done, node = airgap.export(settings, path, wanted, utc_now, progress)
    log_skipped(done.skipped, wanted)
    _print_exported(done, path, utc_now())
    if done.bundle is None and not done.failed:
        say_sentence(nothing_due(node, settings, utc_now()))
    print_errors(done.failed)
    return Exit.worst([outcome.exit_code for outcome in done.failed])


def _print_exported(done: airgap.Exported, path: Path, now: datetime) -> None:
    if done.bundle is None:
        return
    rows, styles = [], []
    for request in done.bundle.requests:
        end = request.replaces.not_valid_after_utc if request.replaces is not None else None
        again = "as before" if request.name in done.again else "new key"
        proof = "with proof" if request.proof is not None else "WITHOUT PROOF: the old key can't be used"
        rows.append((request.name, end_text(end, now), proof, again, f"by {request.authority}"))
        styles.append("ok" if request.proof is not None else "warning")
    say_table(rows, None if "warning" in styles else (4, 3), styles)
    held, fingerprint = counted(len(rows), "request"), bundle_format.short_fingerprint(done.bundle)
    say(f"\n{path} holds {held}; fingerprint {fingerprint}")
    say_sentence("carry it to the CA desk (`ca-bridge sign`), and the answer back (`ca-bridge import ANSWER`)")


@command(commands, "import")
def import_answers(
    common: Common,
    paths: Annotated[
        list[Path], argument("Answer bundles, or certificates in PEM, DER or PKCS#7, under any file name.", "FILE|DIR…")
    ],
    all_or_nothing: AllOrNothingOption = False,
    wait: WaitOption = timedelta(),
    output: OutputOption = Output.TEXT,
) -> int:
    """
    Install a CA desk's answers: match each by its public key, prove it, and install it as `renew` does.

    Exits with 4 while other requests still wait.
    """
    settings, options = common.settings(), RunOptions(all_or_nothing=all_or_nothing, wait=wait)
    with monitoring.kept_current(settings, utc_now), progress_shown() as progress:
        result, node = airgap.import_answers(settings, paths, options, utc_now, progress)
    if result.outcomes or result.errors or output is Output.JSON:
        report(result, node, Selection(), settings, utc_now(), output)
    else:
        say("nothing to import: no answer to a request that waits here")
    return result.exit_code


@command(commands, "inspect")
def inspect_bundle(common: Common, path: Annotated[Path, argument("A request or an answer.", "BUNDLE")]) -> int:
    """
    Show a bundle to the operator who approves it: what it asks for, what that replaces, and what proof it has.

    Compare the fingerprint over the phone: both sides see the same one unless the bundle was changed on its way.
    """
    text, code = airgap.inspect(common.settings(), path, utc_now())
    for line in text.splitlines():
        say_sentence(line or "\n", hanging=VALUES_BEGIN)
    return code


@command(pending, "list")
def pending_list(common: Common, output: OutputOption = Output.TEXT) -> None:
    """Show the open requests: their age, the time left, who has them, and their fingerprints."""
    settings, now = common.settings_with_record(), utc_now()
    requests = sorted(OpenRequests(Store(settings.node.state_dir)), key=lambda request: _order(request, now))
    if output is Output.JSON:
        say_json(pending=[_pending_json(request, now) for request in requests])
    elif requests:
        say_headed([(_whereabouts(request), _pending_row(request, now)) for request in requests])
    else:
        say("nothing is pending")


@command(pending, "cancel")
def pending_cancel(
    common: Common,
    names: Annotated[list[str], argument("kubeadm's names.", "NAME…|all")],
    wait: WaitOption = timedelta(),
) -> int:
    """Forget requests and remove their keys; a later answer to them is refused."""
    settings, options = common.settings(), RunOptions(names=tuple(names), wait=wait)
    with monitoring.kept_current(settings, utc_now), progress_shown() as progress:
        cancelled, missing = airgap.cancel(settings, options, utc_now, progress)
    for request in cancelled:
        say_sentence(f"{request.name}: cancelled; its key is removed, and an answer to it will be refused")
        if request.reference:
            log.warning("%s: %s may have the request, and sign it", request.name, request.backend)
    hint = "`ca-bridge pending list` shows those that are"
    for name in missing:
        print_error(BridgeError("there is no open request", hint=hint), name)
    return Exit.FAILED if missing else Exit.DONE


def _order(request: OpenRequest, now: datetime) -> tuple[int, str]:
    """Order by whole days, then names: certificates of one `kubeadm init` end seconds apart, in no useful order."""
    return seconds_left(request.deadline or now, now) // DAY, request.name


def _pending_row(request: OpenRequest, now: datetime) -> tuple[str, ...]:
    age = f"asked {residual(max(int((now - request.created).total_seconds()), 0))} ago"
    shown = _fingerprint(request)
    # the heading may show it already, for all requests of a bundle
    fingerprint = f"fingerprint {shown}" if shown not in _whereabouts(request) else ""
    return request.name, age, end_text(request.deadline, now), fingerprint


def _whereabouts(request: OpenRequest) -> str:
    if request.answer is not None:
        return "answered and verified; the next run installs it"
    if request.reference:
        return printable(f"{request.backend}: {request.note}" if request.note else f"{request.backend} has it")
    if request.bundles:
        return f"an operator has it; fingerprint {_fingerprint(request)}"
    return "not asked yet; the next run asks"


def _fingerprint(request: OpenRequest) -> str:
    """Return the short fingerprint of the last bundle with the request; else the beginning of the CSR's SHA-256."""
    digest = request.bundles[-1] if request.bundles else request.reference
    is_sha256 = re.fullmatch("[0-9a-f]{64}", digest) is not None
    return fingerprint_text(digest) if is_sha256 else f"{csr_fingerprint(request.request.csr)[:16]}…"


def _pending_json(request: OpenRequest, now: datetime) -> dict[str, Any]:
    return {
        "name": request.name,
        "authority": request.request.spec.authority.name,
        "created": request.created,
        "deadline": request.deadline,
        "secondsLeft": seconds_left(request.deadline, now) if request.deadline is not None else None,
        "fingerprint": _fingerprint(request),
        "csrSha256": csr_fingerprint(request.request.csr),
        **{key: getattr(request, key) for key in ("backend", "reference", "note", "bundles")},
        "state": "answered" if request.answer is not None else "waiting" if request.is_waiting else "prepared",
    }
