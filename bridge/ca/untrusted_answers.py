"""Answers from a directory that others can write to: which one is genuine, and what the rest are worth."""

from __future__ import annotations

from bridge.contract import Collects, CollectsAll, Issued, Pending, SignRequest
from bridge.errors import BackendRefusedError, VerificationError
from bridge.pki import verify


class UntrustedAnswerError(BackendRefusedError):
    """A refusal, or a certificate that does not pass, which any other user may have put there: it ends no request."""

    hint = (
        "other users may have written that, so the request and its key are kept, and a good answer is still installed; "
        "`ca-bridge pending cancel NAME` gives them up"
    )


def collected(
    backend: Collects, request: SignRequest, reference: str, expected: verify.Expectation
) -> Issued | Pending:
    """The CA's answer; of several candidates, the first that passes. Errors as `Collects`, or an UntrustedAnswerError."""
    if not isinstance(backend, CollectsAll):
        return backend.collect(request, reference)
    wrong: list[VerificationError] = []
    for issued in backend.candidates(request, reference):
        error = verify.error_of(issued, request, expected)
        if error is None:
            backend.accepted(request, reference)
            return issued
        wrong.append(error)
    if wrong:
        more = f" ({len(wrong)} certificates, none of which passes)" if len(wrong) > 1 else ""
        raise UntrustedAnswerError(f"{wrong[0].reason}{more}")
    try:
        return backend.collect(request, reference)
    except BackendRefusedError as e:
        if backend.authenticated:
            raise
        raise UntrustedAnswerError(str(e)) from e
