"""Who asked by EST: as it is remembered beside the request, and as it counts when the desk judges."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from cryptography import x509

from bridge.desk.desk import Job, Origin
from bridge.desk.est_rules import Asker, asker_problem
from bridge.desk.policy import Policy
from bridge.door.store import Kept
from bridge.pki.bundle import BundledRequest
from bridge.pki.certificates import is_signed_by, pem

Cas = Mapping[str, Sequence[x509.Certificate]]


def dumps(asker: Asker) -> bytes:
    """For the database, which has the time of receipt in a column of its own."""
    shown = pem(asker.certificate).decode() if asker.certificate is not None else None
    return json.dumps({"label": asker.label, "renews": asker.renews, "certificate": shown}).encode()


def _loads(kept: Kept) -> Asker:
    found = json.loads(kept.origin or b"{}")
    shown = found["certificate"]
    certificate = None if shown is None else x509.load_pem_x509_certificate(shown.encode())
    return Asker(label=found["label"], renews=found["renews"], certificate=certificate, received=kept.received)


def anchors(label: str, authority: str, policy: Policy, cas: Cas, *, renews: bool) -> Sequence[x509.Certificate]:
    """The CA certificates that sign a label's clients; the one that is replaced is always by the CA that signs again."""
    return cas.get(authority, ()) if renews else policy.est_cas.get(label) or cas.get(authority, ())


def problem(asker: Asker, request: BundledRequest, node: str, policy: Policy, cas: Cas) -> str:
    """Why the policy of now does not let this client ask for this node; see `asker_problem`."""
    known = anchors(asker.label, request.authority, policy, cas, renews=asker.renews)
    return asker_problem(asker, request, node, policy.est.get(asker.label), known)


def prove(job: Job, kept: Kept, policy: Policy, cas: Cas) -> None:
    """Give the desk's job of a remembered request its origin, by the policy and the CAs of now."""
    asker, [request] = _loads(kept), job.bundle.requests
    shown, signers = asker.certificate, cas.get(request.authority, ())
    if shown is not None and not any(is_signed_by(shown, ca) for ca in signers):
        shown = None
    reason = problem(asker, request, job.bundle.node, policy, cas)
    job.origin = Origin(problem=reason, held=asker.renews, shown=shown)
    if asker.certificate is not None:
        job.vouched = {request.name: asker.text}
