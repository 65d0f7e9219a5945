"""Looks at a CA before a signature is spent: whether it is the right one, and what it would sign."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

from cryptography import x509
from cryptography.x509.verification import VerificationError as NoPathError

from bridge.contract import Advises, Backend, Checks, ChecksWhole, ListsIssuers, Wanted
from bridge.errors import BackendRefusedError, VerificationError, Violation
from bridge.pki import display, verify
from bridge.pki.certificates import fingerprint
from bridge.specs import CertificateSpec


class RefusedByCheckError(BackendRefusedError):
    """The CA would sign another certificate than we need; it was asked for none."""


def preflight(
    backend: Backend, specs: Sequence[CertificateSpec], expected: verify.Expectation | None
) -> dict[str, RefusedByCheckError]:
    """
    Find before a signature is spent what would be wrong: another CA, or other usages; errors by certificate name.

    Args:
        backend: The CA's.
        specs: The certificates; for none only the CA is looked at.
        expected: What they have to be; None: it is not known which CA it has to be.

    Returns:
        By certificate name, only what would go wrong.

    Raises:
        BackendRefusedError: It is another CA, or does not accept us.
        BackendUnavailableError: No answer.
    """
    if expected is not None and isinstance(backend, ListsIssuers) and (issuers := backend.issuers()):
        assert_right_ca(issuers, expected)
    return usages(backend, specs)


def usages(backend: object, specs: Sequence[CertificateSpec]) -> dict[str, RefusedByCheckError]:
    """Find which certificates the CA would sign with other usages; errors by certificate name."""
    return _errors(backend, specs, backend.check(specs) if specs and isinstance(backend, Checks) else {})


def whole(backend: ChecksWhole, wanted: Sequence[Wanted]) -> dict[str, RefusedByCheckError]:
    """Find what a CA would refuse, or answer in vain, by all that it lets us see of a profile or role; errors by name."""
    return _errors(backend, [one.spec for one in wanted], backend.check_whole(wanted))


def _errors(
    backend: object, specs: Sequence[CertificateSpec], found: Mapping[str, Sequence[Violation]]
) -> dict[str, RefusedByCheckError]:
    by_name = {spec.name: spec for spec in specs}
    return {name: RefusedByCheckError(_violations_text(violations), hint=advice(backend, by_name[name]))
            for name, violations in found.items() if violations}  # fmt: skip


def advice(backend: object, spec: CertificateSpec) -> str:
    """The hint for an error about a certificate that is not what was asked for."""
    return backend.advice(spec) if isinstance(backend, Advises) else VerificationError.hint


def _violations_text(violations: Sequence[Violation]) -> str:
    return "; ".join(map(str, violations))


def assert_right_ca(issuers: Sequence[x509.Certificate], expected: verify.Expectation) -> None:
    """Compare a CA with the node's trust anchor."""
    anchor = expected.anchors[0]
    with contextlib.suppress(NoPathError):
        verify.verified_path(issuers[0], issuers[1:], anchor, expected.now)
        return
    got = f"{display.name(issuers[0])}, SHA-256 {fingerprint(issuers[0])[:16]}…"
    hint = "the mount, label, URL or directory of this authority may be another one's"
    if not verify.is_valid_at(issuers[0], expected.now):
        got += f", valid only {verify.validity_text(issuers[0], expected.now)}"
        hint = "a CA certificate that is not valid now signs nothing of use: have it renewed, or the clock put right"
    raise BackendRefusedError(
        f"wanted the CA of {expected.anchor_name} ({display.name(anchor)}, SHA-256 {fingerprint(anchor)[:16]}…), got {got}",
        hint=hint,
    )
