"""The CAs of a run: reach each, ask what can be asked before a signature is spent, then for the certificates."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from bridge.contract import Backend, Collects, Identifies, Issued, Pending
from bridge.errors import BackendError, BridgeError
from bridge.node.inventory import Item
from bridge.pki import verify
from bridge.renewal.prepare import Prepared
from bridge.signing import registry
from bridge.signing.preflight import preflight
from bridge.specs import AUTHORITIES
from bridge.system.console import Progress

Answer = Issued | Pending | BridgeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """One authority's CA after its preflight."""

    label: str
    backend: Backend | None  #: None: it can't be opened.
    outage: registry.Outage
    wrong: Mapping[str, BridgeError]  #: What can't be asked for, by certificate name.
    identity: str | None = None  #: Who we are to it, if it tells.


def reach(
    configured: registry.Configured,
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
    outage = registry.Outage(configured.settings.retry_for)
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

        def signed(some: Sequence[registry.Answered]) -> None:
            for request, _ in some:
                progress.signed(request.spec.name)

        given = registry.sign_all(ca.backend, requests, ca.outage, signed)
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
