"""Whether a node may have one of its certificates revoked, by what was signed for it here; and the CA's revocation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509

from bridge.ca import CA, registry
from bridge.contract import Revocation
from bridge.desk.desk import at_once
from bridge.desk.policy import Policy, node_problems
from bridge.errors import BackendUnavailableError, BridgeError, Exit
from bridge.pki import node_proofs
from bridge.pki.bundle import BundledRequest, RequestBundle
from bridge.pki.certificates import serial_hex
from bridge.pki.expiry import minute
from bridge.pki.signatures import origin_problem, proof_problem
from bridge.settings.tables import Settings

#: The most successive certificates; a node requests each revocation a day after the renewal.
_MOST_LINKS = 100


class NotRevokedError(BridgeError):
    """A node requested a revocation that it has no right to."""

    exit_code = Exit.REFUSED
    hint = "a node may have those certificates revoked that later ones of its own have replaced, by a continuity proof"


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """A certificate that was signed here."""

    name: str
    node: str
    cluster: str
    authority: str
    is_proven: bool  #: Something proved the node's name.
    #: The request for the certificate and its bundle, if they are kept; read after the node has proven its identity.
    asked: Callable[[], tuple[BundledRequest, RequestBundle] | None]


#: Returns what was signed here for a certificate; None: it was not signed here.
Known = Callable[[x509.Certificate], Signed | None]


def assert_may(
    revocation: Revocation, known: Known, policy: Policy, cas: Mapping[str, Sequence[x509.Certificate]], now: datetime
) -> Signed:
    """
    Identify the successor's holder by its key, and check that the certificate is an earlier one; return what was signed.

    From the successor, each step goes to the replaced certificate whose key proved the request for the next one: the
    holder of an earlier key can't revoke a later certificate.

    Raises:
            NotRevokedError: The facts differ, or the policy does not allow it.
            BackendUnavailableError: No CA certificate to judge by is known yet.
    """
    serial = serial_hex(revocation.successor)
    successor = known(revocation.successor)
    if successor is None or successor.name != revocation.name:
        raise NotRevokedError(f"wanted a successor {revocation.name} that was signed here, found serial {serial}")
    if not node_proofs.is_revocation_proven(revocation, successor.node, successor.cluster):
        raise NotRevokedError(f"wanted a proof by the key of the successor, serial {serial}, found another signature")
    if revocation.successor.not_valid_after_utc <= now:
        ended = minute(revocation.successor.not_valid_after_utc)
        raise NotRevokedError(f"wanted a successor that is valid, found one that ended {ended}")
    if policy.allow.revoke != "superseded":
        hint = "the CA's own means revoke it; or the policy says superseded"
        raise NotRevokedError('allow.revoke: wanted "superseded", found "never"', hint=hint)
    if problems := node_problems(successor.node, successor.cluster, policy):
        raise NotRevokedError("; ".join(problems))
    if not (signers := cas.get(successor.authority)):
        raise BackendUnavailableError(f"the CA of {successor.authority} was not reached yet")
    _assert_replaced(revocation, successor, known, [*signers, *policy.former.get(successor.authority, ())])
    return successor


def _assert_replaced(revocation: Revocation, successor: Signed, known: Known, cas: Sequence[x509.Certificate]) -> None:
    """Walk back from the successor, certificate by certificate, as far as there are proofs."""
    link: Signed | None = successor
    who = (successor.name, successor.node, successor.cluster, successor.authority)
    for _ in range(_MOST_LINKS):
        if link is None or (link.name, link.node, link.cluster, link.authority) != who:
            break
        if (asked := link.asked()) is None:
            break
        request, bundle = asked
        if request.replaces is None or proof_problem(request, bundle) or origin_problem(request, cas):
            break
        if request.replaces == revocation.certificate:
            return
        link = known(request.replaces)
    wanted = f"a certificate {revocation.name} of {successor.node} that was replaced by a continuity proof"
    text = f"wanted {wanted}, as far as requests are kept, found serial {serial_hex(revocation.certificate)}"
    raise NotRevokedError(text)


def revoke(settings: Settings, authority: str, revocation: Revocation) -> None:
    """
    Have the CA revoke the certificate, waiting no longer than one request takes.

    Raises:
            NotRevokedError: The successor itself is revoked, or this CA can't revoke.
            BackendError: Like `bridge.contract.Backend.revoke`.
    """
    configured = at_once(registry.configured(settings, [authority])[authority])
    with contextlib.closing(CA.of(configured)) as ca:
        if not ca.backend.can("revoke"):
            hint = "revoke it by the CA's own means"
            raise NotRevokedError(f"wanted a CA that can revoke, found {ca.label}", hint=hint)
        if ca.is_revoked(revocation.successor):
            found = f"the revoked one with serial {serial_hex(revocation.successor)}"
            raise NotRevokedError(f"wanted a proof by a certificate that is not revoked, found {found}")
        ca.revoke(revocation.certificate)
