"""Bundles for people: what a desk's operator has to know before a signature, and a node's operator after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

from cryptography import x509

from bridge.pki import display
from bridge.pki.bundle import LONGEST_TEXT, AnswerBundle, Bundle, BundledRequest, Refusal, RequestBundle
from bridge.pki.bundle_format import short_fingerprint
from bridge.pki.certificates import fingerprint, serial_hex
from bridge.pki.expiry import duration_text, minute
from bridge.pki.signatures import origin_problem, proof_problem, usages_problem
from bridge.words import one_line


def describe(bundle: Bundle, now: datetime, cas: Mapping[str, Sequence[x509.Certificate]]) -> str:
    """All that a person must know who approves a bundle or gets one back; `cas` tell the origins of their authorities."""
    lines = list(_request_lines(bundle, now, cas) if isinstance(bundle, RequestBundle) else _answer_lines(bundle))
    return "\n".join([*lines, "", f"fingerprint  {short_fingerprint(bundle)}", ""])


def _request_lines(
    bundle: RequestBundle, now: datetime, cas: Mapping[str, Sequence[x509.Certificate]]
) -> Iterator[str]:
    yield f"request of node {bundle.node}, cluster {one_line(bundle.cluster)}, made {minute(bundle.created)}"
    yield f"batch {bundle.batch}, {count(len(bundle.requests), 'certificate')}"
    for request in bundle.requests:
        usages = ", ".join(sorted(eku.label for eku in request.ekus))
        yield ""
        yield f"{request.name} by {request.authority}"
        yield f"  asks for    {display.name(request.csr)}"
        yield f"  SANs        {display.sans(request.csr)}"
        yield f"  usages      {usages}, for {duration_text(request.validity)}"
        yield f"  key         {display.key(request.csr)}"
        yield f"  replaces    {_replaced(request, now)}"
        yield from _changes(request)
        proof = proof_problem(request, bundle) or usages_problem(request)
        yield f"  proof       {proof or 'holds: made with the key of the replaced certificate'}"
        yield f"  origin      {_origin(request, cas)}"


def _origin(request: BundledRequest, cas: Mapping[str, Sequence[x509.Certificate]]) -> str:
    if request.authority not in cas:
        return f"NOT CHECKED: no certificate of {request.authority} is here, so the proof may be another CA's"
    return origin_problem(request, cas[request.authority]) or "signed by this CA"


def _changes(request: BundledRequest) -> Iterator[str]:
    """Lines about changes that make this more than a renewal."""
    if request.replaces is None:
        return
    if display.name(request.csr) != display.name(request.replaces):
        yield f"  CHANGED     another subject than the replaced {display.name(request.replaces)}"
    if display.sans(request.csr) != display.sans(request.replaces):
        yield f"  CHANGED     other SANs than the replaced {display.sans(request.replaces)}"


def _replaced(request: BundledRequest, now: datetime) -> str:
    old = request.replaces
    if old is None:
        return "nothing"
    end = old.not_valid_after_utc
    state = "expired" if end <= now else "valid until"
    return f"serial {serial_hex(old)}, SHA-256 {fingerprint(old)[:16]}…, {state} {minute(end)}"


def _answer_lines(bundle: AnswerBundle) -> Iterator[str]:
    yield f"answer to node {bundle.node}, cluster {one_line(bundle.cluster)}, signed {minute(bundle.signed)} by {one_line(bundle.signer)}"
    yield f"batch {bundle.batch}, to the request with the digest {bundle.request_digest[:16]}…"
    for name, answer in bundle.answers.items():
        yield ""
        yield name
        if isinstance(answer, Refusal):
            yield f"  refused     {one_line(answer.reason, LONGEST_TEXT)}"
            continue
        yield f"  certificate {display.name(answer.leaf)}, serial {serial_hex(answer.leaf)}"
        yield f"  valid       {minute(answer.leaf.not_valid_before_utc)} to {minute(answer.leaf.not_valid_after_utc)}"
        yield f"  issuer      {display.issuer(answer.leaf)}, {count(len(answer.intermediates), 'intermediate')}"


def count(number: int, what: str) -> str:
    """A number with its noun, such as `1 certificate`."""
    return f"{number} {what}{'' if number == 1 else 's'}"
