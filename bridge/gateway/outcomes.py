"""How a job may end besides with a certificate, and what the log says with each line about a request."""

from __future__ import annotations

from bridge.errors import BackendRefusedError, BridgeError
from bridge.gateway.queue import Job
from bridge.words import one_line

#: What a CA has refused, or answered wrongly, is asked for again after this, doubled a few times.
AFTER_REFUSAL_SECONDS = 60.0
_DOUBLINGS = 3


class LeftError(Exception):
    """The job ends here for now, and is looked at again; it was said why."""

    def __init__(self, outcome: str, reason: str, seconds: float | None = None) -> None:
        super().__init__(reason)
        self.outcome = outcome
        self.reason = reason
        self.seconds = seconds  #: None: as often as it was left before says.


class GoneError(Exception):
    """The object is gone, settled by somebody else, or another one by now."""


class NotAllowedError(BridgeError):
    """The policy does not allow it; the audit log has the reason."""

    exit_code = BackendRefusedError.exit_code


def after_refusal(job: Job) -> float:
    """How many seconds it takes until the CA is asked once more."""
    return AFTER_REFUSAL_SECONDS * 2.0 ** min(job.attempts, _DOUBLINGS)


def extra(job: Job, outcome: str | None = None) -> dict[str, str | None]:
    """The fields of the log's lines about a job."""
    request = job.one.request
    return {
        "request": job.one.uid,
        "signer": request.signer,
        "requester": one_line(request.username),
        "outcome": outcome,
    }
