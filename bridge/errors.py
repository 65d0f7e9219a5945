"""Errors as data: each knows its exit code and what to do next."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, ClassVar


class Exit:
    """Exit codes; a promise to callers (`docs/trouble.md`)."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    DUE = 3
    WAITING = 4
    REFUSED = 5
    UNAVAILABLE = 6
    NOT_LIVE = 7
    ROLLED_BACK = 8
    LOCKED = 9

    #: The first of these counts if one run has several outcomes. Most usage errors end a run before it has any, but not
    #: those of one authority's files.
    PRECEDENCE = (ROLLED_BACK, NOT_LIVE, FAILED, USAGE, REFUSED, UNAVAILABLE, WAITING, DONE)

    @classmethod
    def worst(cls, codes: Sequence[int]) -> int:
        """The exit code of a run with these outcomes; 0 for none."""
        return min(codes, key=cls.PRECEDENCE.index, default=cls.DONE)


class BridgeError(Exception):
    """Base of all expected errors; its text is one sentence, lower case, without a secret in it."""

    exit_code: ClassVar[int] = Exit.FAILED
    hint: str = ""  #: What to do next; may be empty.

    def __init__(self, message: str, *, hint: str | None = None, exit_code: int | None = None) -> None:
        super().__init__(message)
        if hint is not None:
            self.hint = hint
        if exit_code is not None:
            self.exit_code = exit_code  # type: ignore[misc]  # this one's, where others have their class's

    @property
    def reason(self) -> str:
        """The text without the name of a certificate, for messages that name several."""
        return str(self)


@contextlib.contextmanager
def converted(
    caught: type[Exception] | tuple[type[Exception], ...], kind: Callable[..., BridgeError], prefix: str, **more: Any
) -> Iterator[None]:
    """Turn the caught errors into one of another kind: the prefix, then the caught error's text."""
    try:
        yield
    except caught as e:
        raise kind(f"{prefix}{e}", **more) from None


@dataclass(frozen=True, slots=True)
class SettingsProblem:
    """One problem in the settings; its `str()` is a line for the operator."""

    key: str  #: Dotted, such as `backend.corp.auth.method`; empty for the file as a whole.
    wanted: str
    found: str
    file: Path | None = None
    line: int | None = None  #: From 1.

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}: " if self.file and self.line else f"{self.file}: " if self.file else ""
        if self.key and self.found in {"none", "nothing"}:
            return f"{place}{self.key} is missing: {self.wanted}"
        if self.found == "none":
            return f"{place}there is no such file, and {self.wanted} is needed"
        key = f"{self.key}: " if self.key else ""
        return f"{place}{key}wanted {self.wanted}, found {self.found}"


class SettingsError(BridgeError):
    """The settings can't be used; the error has all problems at once."""

    exit_code = Exit.USAGE

    def __init__(self, problems: Sequence[SettingsProblem], *, hint: str | None = None) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(map(str, problems)), hint=hint)


@dataclass(frozen=True, slots=True)
class Violation:
    """One difference between a request and the certificate, or the CA's configuration for it."""

    subject: str  #: What is wrong, such as `EKU` or `SAN`.
    _: KW_ONLY
    want: str
    got: str

    def __str__(self) -> str:
        return f"{self.subject}: wanted {self.want}, got {self.got}"


class VerificationError(BridgeError):
    """The CA signed another certificate than the request asked for."""

    exit_code = Exit.REFUSED
    hint = "the CA's profile, role or extension section for this certificate is the usual cause"

    def __init__(self, name: str, violations: Sequence[Violation]) -> None:
        self.name = name
        self.violations = list(violations)
        super().__init__(f"{name}: {self.reason}")

    @property
    def reason(self) -> str:
        """All violations, on one line."""
        return "; ".join(map(str, self.violations))


class WaitingError(BridgeError):
    """The CA or a person has the request and has not answered yet."""

    exit_code = Exit.WAITING
    hint = "run again later; no request is sent twice"


class PostponedError(BridgeError):
    """The operation was postponed: nothing is wrong with it, but now is not the time."""

    exit_code = Exit.UNAVAILABLE
    hint = "run again later"


class BackendError(BridgeError):
    """A backend could not have a certificate signed."""

    is_for_all = False  #: The whole batch failed, even a batch of one: the cause is the CA, not the request.


class BackendRefusedError(BackendError):
    """The CA refused, or can't be used as it is configured; trying the same again cannot help."""

    exit_code = Exit.REFUSED


class NoVerdictError(BackendRefusedError):
    """The CA can't be asked with this configuration, or something else answered; a pending request stays open."""


class LocalFileError(NoVerdictError):
    """A file on this machine that a backend needs is missing or can't be used; no CA was asked."""

    exit_code = Exit.USAGE


class BackendUnavailableError(BackendError):
    """No answer, or "later"; trying the same again may help."""

    exit_code = Exit.UNAVAILABLE

    def __init__(self, message: str, *, hint: str | None = None, retry_after_seconds: float | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_seconds = retry_after_seconds  #: The wait that the CA asked for, if it did.
