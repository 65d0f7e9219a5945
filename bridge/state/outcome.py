"""The outcome for one certificate in a run."""

from __future__ import annotations

from dataclasses import dataclass

from cryptography import x509

from bridge.errors import BridgeError, Exit


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The outcome for one certificate."""

    name: str
    authority: str
    old: x509.Certificate | None = None
    new: x509.Certificate | None = None  #: Installed.
    backend: str = ""
    error: BridgeError | None = None

    @property
    def exit_code(self) -> int:
        """The exit code of its error."""
        return self.error.exit_code if self.error is not None else Exit.DONE
