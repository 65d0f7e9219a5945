"""The CAs of a run: reach each, ask what can be asked before a signature is spent, then for the certificates."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from cryptography import x509
from cryptography.x509.verification import VerificationError as NoPathError

from bridge import plugins, verify
from bridge.certificates import fingerprint, name_text
from bridge.contract import Backend, Checks, Collects, Identifies, Issued, ListsIssuers, Pending
from bridge.errors import BackendError, BackendRefusedError, BridgeError, VerificationError, Violation
from bridge.inventory import Item
from bridge.prepare import Prepared
from bridge.specs import AUTHORITIES, CertificateSpec

Answer = Issued | Pending | BridgeError


class RefusedByCheckError(BackendRefusedError):
    """The CA would sign something else than what we need; nothing was asked of it."""


class Progress(Protocol):
    """Who looks on; called from several threads."""

    def signing(self, backend: str, names: Sequence[str]) -> None:
        """These certificates are being asked for."""

    def signed(self, name: str) -> None:
        """The CA has answered for one, with a certificate or not."""

    def note(self, text: str) -> None:
        """Something that the operator should know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """One authority's CA after its preflight."""

    label: str
    backend: Backend | None  #: None: it can't be opened.
    outage: plugins.Outage
    wrong: Mapping[str, BridgeError]  #: What can't be asked for, by certificate name.
    identity: str | None = None  #: Who we are to it, if it tells.


def reach(
    configured: plugins.Configured,
    items: Sequence[Item],
    expected: verify.Expectation,
    progress: Progress,
    opened: Backend | None = None,
) -> Reached:
    """
    Open a backend, and ask what can be asked before a signature is spent; an error is part of the answer.

    Args:
        configured: The authority's.
        items: Its certificates.
        expected: What they have to be.
        progress: Is told.
        opened: By another authority that has the same one.
    """
    names = [item.spec.name for item in items]
    progress.signing(configured.label, names)
    outage = plugins.Outage(configured.settings.retry_for)
    backend = opened
    wrong: Mapping[str, BridgeError] = {}
    identity = None
    try:
        backend = ours = opened or configured.open()
        wrong = outage.ask(lambda: preflight(ours, [item.spec for item in items], expected))
        identity = _identity(ours)
    except BridgeError as e:
        wrong = dict.fromkeys(names, e)
    return Reached(label=configured.label, backend=backend, outage=outage, wrong=wrong, identity=identity)


def _identity(backend: Backend) -> str | None:
    """For the record; a CA that does not tell it may still sign."""
    with contextlib.suppress(BackendError):
        return (backend.identity() or None) if isinstance(backend, Identifies) else None
    return None


def sign(prepared: Sequence[Prepared], reached: Mapping[str, Reached], progress: Progress) -> dict[str, Answer]:
    """
    Ask each CA for its certificates, or for the answers that it owes, all CAs at the same time.

    Args:
        prepared: What to ask for.
        reached: By authority; a backend that several have is asked once, for all of theirs.
        progress: Is told.

    Returns:
        By certificate name.
    """
    lots: dict[int, list[Prepared]] = defaultdict(list)
    for one in prepared:
        lots[id(reached[one.authority].backend)].append(one)
    answers: dict[str, Answer] = {}
    with ThreadPoolExecutor(len(AUTHORITIES)) as pool:
        for part in pool.map(lambda lot: _ask(reached, lot, progress), lots.values()):
            answers |= part
    return answers


def _ask(reached: Mapping[str, Reached], prepared: Sequence[Prepared], progress: Progress) -> dict[str, Answer]:
    """Those of one backend; none is asked for what its preflight refused."""
    ca = reached[prepared[0].authority]
    owed = [one for one in prepared if ca.backend is not None and owes(ca, one)]
    answers: dict[str, Answer] = {one.name: _collected(ca, one, progress) for one in owed}
    for one in prepared:
        if one.name not in answers and one.name in (wrong := reached[one.authority].wrong):
            answers[one.name] = wrong[one.name]
    requests = [one.request for one in prepared if one.name not in answers]
    if requests and ca.backend is not None:

        def signed(some: Sequence[plugins.Answered]) -> None:
            for request, _ in some:
                progress.signed(request.spec.name)

        given = plugins.sign_all(ca.backend, requests, ca.outage, signed)
        answers |= {request.spec.name: answer for request, answer in zip(requests, given, strict=True)}
    return answers


def owes(reached: Reached, one: Prepared) -> bool:
    """Whether this CA has the request from an earlier run."""
    return one.open is not None and bool(one.open.reference) and one.open.backend == reached.label


def _collected(reached: Reached, one: Prepared, progress: Progress) -> Answer:
    backend, made = reached.backend, one.open
    if made is None or not isinstance(backend, Collects):
        raise BridgeError(f'{reached.label}: answered {one.name} with "later", and can\'t be asked later: a bug in it')
    try:
        return reached.outage.ask(lambda: backend.collect(made.request, made.reference))
    except BackendError as e:
        return e
    finally:
        progress.signed(one.name)


def preflight(
    backend: Backend, specs: Sequence[CertificateSpec], expected: verify.Expectation
) -> dict[str, RefusedByCheckError]:
    """
    What can be known before a signature is spent: the right CA, and the right usages for each certificate.

    Args:
        backend: Is asked.
        specs: The certificates; for none only the CA is looked at.
        expected: What they have to be.

    Returns:
        By certificate name, only what would go wrong.

    Raises:
        BackendRefusedError: It is another CA, or does not accept us.
        BackendUnavailableError: No answer.
    """
    if isinstance(backend, ListsIssuers):
        _assert_right_ca(backend.issuers(), expected)
    found = backend.check(specs) if specs and isinstance(backend, Checks) else {}
    return {name: RefusedByCheckError(_violations_text(violations), hint=VerificationError.hint)
            for name, violations in found.items() if violations}  # fmt: skip


def _violations_text(violations: Sequence[Violation]) -> str:
    return "; ".join(map(str, violations))


def _assert_right_ca(issuers: Sequence[x509.Certificate], expected: verify.Expectation) -> None:
    anchor = expected.anchors[0]
    with contextlib.suppress(NoPathError, IndexError):
        verify.verified_path(issuers[0], issuers[1:], anchor, expected.now)
        return
    got = f"{name_text(issuers[0].subject)}, SHA-256 {fingerprint(issuers[0])[:16]}…" if issuers else "no certificate"
    hint = "the mount, label, URL or directory of this authority may be another one's"
    if issuers and not verify.is_valid_at(issuers[0], expected.now):
        got += f", valid only {verify.validity_text(issuers[0], expected.now)}"
        hint = "a CA certificate that is not valid now signs nothing of use: have it renewed, or the clock put right"
    raise BackendRefusedError(
        f"wanted the CA of {expected.anchor_name} ({name_text(anchor.subject)}, SHA-256 {fingerprint(anchor)[:16]}…), got {got}",
        hint=hint,
    )
