"""`export`, `inspect`, `import`, `pending`: the node's side of the air-gapped walk."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding

from bridge.cli.printing import end_text, say, say_json, say_sentence, say_table, under_headings
from bridge.cli.progress import progress_shown
from bridge.cli.results import grouped, report
from bridge.errors import BridgeError, Exit
from bridge.monitoring import metrics
from bridge.pki import bundle_format, bundle_text
from bridge.pki.display import fingerprint_text
from bridge.pki.expiry import residual, rfc3339, seconds_left
from bridge.renewal import airgap
from bridge.renewal.select import ALL, RunOptions, Selection, nothing_due
from bridge.settings.tables import Settings
from bridge.state.requests import OpenRequest, OpenRequests
from bridge.state.store import Store
from bridge.system.console import log, print_error, printable


def import_answers(
    settings: Settings, paths: Sequence[Path], options: RunOptions, now: Callable[[], datetime], *, as_json: bool
) -> int:
    """`import`: what a CA desk has answered; return the exit code."""
    with metrics.kept_current(settings, now), progress_shown() as progress:
        result, node, strange = airgap.import_answers(settings, paths, options, now, progress)
    result = dataclasses.replace(result, errors=(*result.errors, *strange))
    if result.outcomes or result.errors or as_json:
        report(result, node, Selection(), settings, now(), as_json=as_json)
    else:
        say("nothing to import: no answer to a request that waits here")
    return result.exit_code


def export(settings: Settings, path: Path, options: RunOptions, now: Callable[[], datetime]) -> int:
    """`export`: a bundle for a CA desk; return the exit code."""
    with metrics.kept_current(settings, now), progress_shown() as progress:
        done, node = airgap.export(settings, path, options, now, progress)
    for sentence in done.skipped:
        is_by_name = options.names and ALL not in options.names
        log.log(logging.INFO if is_by_name else logging.DEBUG, "%s", sentence)
    _print_exported(done, path, now())
    if done.bundle is None and not done.failed:
        say(nothing_due(node, settings, now()))
    for about, error in grouped(done.failed):
        print_error(error, about)
    return Exit.worst([outcome.exit_code for outcome in done.failed])


#: Where the second column of `bundle_text` begins.
_VALUES_BEGIN = 14


def inspect(settings: Settings, path: Path, now: datetime) -> int:
    """`inspect`: a bundle, for a person who approves it; return the exit code."""
    text, code = airgap.inspect(settings, path, now)
    for line in text.splitlines():
        say_sentence(line or "\n", hanging=_VALUES_BEGIN)
    return code


def pending_cancel(settings: Settings, options: RunOptions, now: Callable[[], datetime]) -> int:
    """`pending cancel`: return the exit code, which is 1 if one that was named is not there."""
    with metrics.kept_current(settings, now), progress_shown() as progress:
        done = airgap.cancel(settings, options, now, progress)
    for one in done.requests:
        say_sentence(f"{one.name}: cancelled; its key is removed, and an answer to it will be refused")
        if one.reference:
            log.warning("%s: %s still has the request, and may sign it", one.name, one.backend)
    hint = "`ca-bridge pending list` shows those that are"
    for name in done.missing:
        print_error(BridgeError("wanted a request that is open, found none", hint=hint), name)
    return Exit.FAILED if done.missing else Exit.DONE


def pending_list(settings: Settings, now: datetime, *, as_json: bool) -> None:
    """Print the open requests: since when, until when there is time, who has them, and what to tell them."""
    requests = sorted(OpenRequests(Store(settings.node.state_dir)), key=lambda one: (one.deadline or now, one.name))
    if as_json:
        entries = [_pending_json(one, now) for one in requests]
        say_json({"pending": entries})
    elif requests:
        rows = [(_whereabouts(one), _pending_row(one, now)) for one in requests]
        say("\n".join(under_headings(rows)))
    else:
        say("nothing is pending")


def _pending_row(one: OpenRequest, now: datetime) -> tuple[str, ...]:
    end = one.deadline
    left = _end(end, now)
    age = f"asked {residual(max(int((now - one.created).total_seconds()), 0))} ago"
    return one.name, age, left, f"fingerprint {_fingerprint(one)}"


def _whereabouts(one: OpenRequest) -> str:
    if one.answer is not None:
        return "answered and proven; the next run installs it"
    if one.reference:
        return printable(f"{one.backend}: {one.note}" if one.note else f"{one.backend} has it")
    return "an operator has it" if one.bundles else "not asked yet; the next run asks"


def _fingerprint(one: OpenRequest) -> str:
    """The short fingerprint of the bundle in which it was carried out last; else the beginning of the CSR's SHA-256."""
    digest = one.bundles[-1] if one.bundles else one.reference
    return fingerprint_text(digest) if _is_digest(digest) else f"{_csr_sha256(one)[:16]}…"


def _is_digest(text: str) -> bool:
    return len(text) == 64 and all(c in "0123456789abcdef" for c in text)  # noqa: PLR2004 (SHA-256 in hex)


def _csr_sha256(one: OpenRequest) -> str:
    return hashlib.sha256(one.request.csr.public_bytes(Encoding.DER)).hexdigest()


def _pending_json(one: OpenRequest, now: datetime) -> dict[str, Any]:
    return {
        "name": one.name,
        "authority": one.request.spec.authority.name,
        "created": rfc3339(one.created),
        "deadline": rfc3339(one.deadline) if one.deadline is not None else None,
        "secondsLeft": seconds_left(one.deadline, now) if one.deadline is not None else None,
        "fingerprint": _fingerprint(one),
        "csrSha256": _csr_sha256(one),
        "backend": one.backend,
        "reference": one.reference,
        "note": one.note,
        "bundles": list(one.bundles),
        "state": "answered" if one.answer is not None else "waiting" if one.is_waiting else "prepared",
    }


def _print_exported(done: airgap.Exported, path: Path, now: datetime) -> None:
    """Print what was asked for, and what to do with the file."""
    if done.bundle is None:
        return
    rows = []
    for request in done.bundle.requests:
        end = request.replaces.not_valid_after_utc if request.replaces is not None else None
        state = _end(end, now)
        again = "as before" if request.name in done.again else "new key"
        proof = "with proof" if request.proof is not None else "WITHOUT PROOF: the old key can't be used"
        rows.append((request.name, f"by {request.authority}", state, again, proof))
    say_table(rows)
    say(
        f"\n{path} holds {bundle_text.count(len(rows), 'request')}; fingerprint {bundle_format.short_fingerprint(done.bundle)}"
    )
    say_sentence("carry it to the CA desk (`ca-bridge sign`), and the answer back (`ca-bridge import ANSWER`)")


def _end(end: datetime | None, now: datetime) -> str:
    if end is None:
        return ""
    return end_text(end, now)
