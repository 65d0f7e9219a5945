"""The CAs behind the signers: asked, collected from, and their answers proven, as for a renewal."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509

from bridge.ca import registry
from bridge.ca.registry import Configured
from bridge.contract import (
    AsksValidity,
    Backend,
    Checks,
    Collects,
    CollectsAll,
    Identifies,
    Issued,
    ListsIssuers,
    Pending,
    Recalls,
    SignRequest,
    SignsMany,
)
from bridge.errors import (
    BackendError,
    BackendUnavailableError,
    BridgeError,
    SettingsError,
    SettingsProblem,
    VerificationError,
    Violation,
)
from bridge.pki import verify
from bridge.pki.certificates import load_pem_certificates
from bridge.pki.expiry import duration_text
from bridge.pki.verify import Expectation, Verified
from bridge.settings.tables import Settings
from bridge.specs import AUTHORITIES, CertificateSpec
from bridge.system import safe_read
from bridge.system.combining import Combined
from bridge.system.safe_read import UnreadableError

log = logging.getLogger("ca-bridge")

#: Requests that a CA gets in one round trip or process, where it can have many.
_MOST_TOGETHER = 64
_ANCHOR_SECONDS = 60.0
#: After a failure nobody asks the CA for this long, doubled with each failure in a row.
_FIRST_REST_SECONDS, _LONGEST_REST_SECONDS = 1.0, 30.0
#: CAs count from a beginning that they backdate, and round.
_LONGER = timedelta(minutes=10)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Anchors:
    certificates: tuple[x509.Certificate, ...]
    read_at: float


class AuthorityOfSigners:
    """One of the cluster's CAs, from any thread."""

    def __init__(self, configured: Configured, settings: Settings) -> None:
        """
        Raises:
            SettingsError: A file that the backend's settings name can't be used, or the CA's certificate can't.
        """
        self.name = configured.authority
        self.label = configured.label
        self._backend: Backend = configured.open()
        self._extra_subject = settings.extra_subject(configured.authority)
        self._anchor_file = settings.node.pki_dir / AUTHORITIES[configured.authority].certificate_file
        self._mutex = threading.Lock()
        self._anchors = _Anchors(certificates=_read_anchors(self._anchor_file), read_at=time.monotonic())
        self._issuer_end: datetime | None = None
        self._rests_until = 0.0
        self._failures = 0
        self.asks_validity = isinstance(self._backend, AsksValidity) and self._backend.asks_validity
        self.signs_many = isinstance(self._backend, SignsMany)
        self.recalls = isinstance(self._backend, Recalls)
        self._together: Combined[SignRequest, Issued | Pending | BackendError] = Combined(self._many, _MOST_TOGETHER)
        self._recalled: Combined[tuple[SignRequest, datetime], Issued | None] = Combined(
            self._recall_many, _MOST_TOGETHER
        )

    def anchors(self) -> tuple[x509.Certificate, ...]:
        """The CA's certificates, from the cluster's own file; read again each minute."""
        anchors = self._anchors
        if time.monotonic() - anchors.read_at < _ANCHOR_SECONDS:
            return anchors.certificates
        with self._mutex:
            if time.monotonic() - self._anchors.read_at >= _ANCHOR_SECONDS:
                try:
                    certificates = _read_anchors(self._anchor_file)
                except SettingsError as e:
                    log.error("%s; what was read before goes on counting", e)  # noqa: TRY400
                    certificates = self._anchors.certificates
                self._anchors = _Anchors(certificates=certificates, read_at=time.monotonic())
            return self._anchors.certificates

    def end(self) -> datetime:
        """When the CA's certificate ends, or one before it that signs."""
        end = self.anchors()[0].not_valid_after_utc
        return min(end, self._issuer_end) if self._issuer_end is not None else end

    def check(self, specs: Sequence[CertificateSpec]) -> list[str]:
        """
        Ask who it is and whether its roles or profiles fit; what is wrong, in sentences.

        Raises:
            BackendError: It does not answer, or not us.
        """
        found: list[str] = []
        if isinstance(self._backend, ListsIssuers) and (issuers := self._backend.issuers()):
            self._issuer_end = min(one.not_valid_after_utc for one in issuers)
        if isinstance(self._backend, Checks):
            for name, violations in self._backend.check(specs).items():
                found += [f"{self.label}: {name}: {violation}" for violation in violations]
        return found

    def identity(self) -> str:
        """Who we are to the CA; empty: it does not tell."""
        if not isinstance(self._backend, Identifies):
            return ""
        try:
            return self._backend.identity()
        except BackendError:
            return ""

    def rest_seconds(self) -> float:
        """How long it is not to be asked, since it was not there."""
        return max(0.0, self._rests_until - time.monotonic())

    def sign(self, request: SignRequest) -> Issued | Pending:
        """
        Have one signed; several at the same time are one round trip where the CA can do that.

        Raises:
            BackendRefusedError, BackendUnavailableError: As `bridge.contract.Backend.sign`.
        """
        return self._counted(lambda: self._signed(request))

    def _signed(self, request: SignRequest) -> Issued | Pending:
        if not self.signs_many:
            return self._backend.sign(request)
        answer = self._together(request)
        if isinstance(answer, BackendError):
            raise answer
        return answer

    def _many(self, requests: Sequence[SignRequest]) -> Sequence[Issued | Pending | BackendError]:
        if not isinstance(self._backend, SignsMany):
            raise TypeError
        return self._backend.sign_many(requests)

    def recall(self, request: SignRequest, since: datetime) -> Issued | None:
        """
        Find what the CA has signed for this CSR before somebody could take the answer; for several at a time it is one look.

        Args:
            request: As it would be sent.
            since: Nothing older counts.

        Raises:
            BackendRefusedError, BackendUnavailableError: As `bridge.contract.Recalls.recall`.
        """
        return self._counted(lambda: self._recalled((request, since)))

    def _recall_many(self, wanted: Sequence[tuple[SignRequest, datetime]]) -> Sequence[Issued | None]:
        if not isinstance(self._backend, Recalls):
            raise TypeError
        return self._backend.recall([request for request, _ in wanted], min(since for _, since in wanted))

    def collect(self, request: SignRequest, reference: str) -> Sequence[Issued] | Pending:
        """
        The CA's answer by now; several where anybody may have answered.

        Raises:
            BackendRefusedError, BackendUnavailableError: As `bridge.contract.Collects.collect`.
        """
        backend = self._backend
        if isinstance(backend, CollectsAll):
            return self._counted(lambda: backend.candidates(request, reference)) or Pending(reference=reference)
        if not isinstance(backend, Collects):
            raise BridgeError(f"{self.label}: wanted a backend that can collect, found none: a bug in it")
        answer = self._counted(lambda: backend.collect(request, reference))
        return answer if isinstance(answer, Pending) else [answer]

    def accepted(self, request: SignRequest, reference: str) -> None:
        """One of several candidates passed."""
        if isinstance(self._backend, CollectsAll):
            self._backend.accepted(request, reference)

    def _counted(self, ask: Callable[[], registry.T]) -> registry.T:
        try:
            answer = ask()
        except BackendUnavailableError as e:
            with self._mutex:
                wish = e.retry_after_seconds or 0.0
                rest = min(_FIRST_REST_SECONDS * 2.0**self._failures, _LONGEST_REST_SECONDS)
                self._failures += 1
                self._rests_until = time.monotonic() + max(rest, min(wish, _LONGEST_REST_SECONDS))
            raise
        with self._mutex:
            self._failures = 0
        return answer

    def verified(
        self,
        answers: Sequence[Issued],
        request: SignRequest,
        longest: timedelta,
        min_validity: timedelta,
        now: datetime,
    ) -> Verified:
        """
        The first answer that is exactly what was asked for.

        Args:
            answers: One, or several candidates.
            request: As the CA got it.
            longest: What the policy allows.
            min_validity: Shorter ones are of no use.
            now: The time.

        Raises:
            VerificationError: None is; about the first.
        """
        expected = Expectation(
            anchors=self.anchors(),
            anchor_name=self._anchor_file.name,
            now=now,
            min_validity=min(min_validity, request.validity * 0.5),
            extra_subject=self._extra_subject,
        )
        limit = request.validity if self.asks_validity else longest
        first: VerificationError | None = None
        for answer in answers:
            try:
                return _checked(answer, request, expected, limit)
            except VerificationError as e:
                first = first or e
        raise first or VerificationError(request.spec.name, [])

    def close(self) -> None:
        """Give back what the backend took."""
        registry.close(self._backend)


def _checked(answer: Issued, request: SignRequest, expected: Expectation, limit: timedelta) -> Verified:
    """
    Exactly what was asked for, and no longer.

    Raises:
        VerificationError: It is not.
    """
    found = verify.check(answer, request, expected)
    end = found.leaf.not_valid_after_utc
    if end - expected.now > limit + _LONGER:
        got = f"until {end:%Y-%m-%d %H:%M}"
        violation = Violation(subject="notAfter", want=f"at most {duration_text(limit)}", got=got)
        raise VerificationError(request.spec.name, [violation])
    return found


def _read_anchors(path: Path) -> tuple[x509.Certificate, ...]:
    """
    Raises:
        SettingsError: There is none that can be read.
    """
    try:
        data = safe_read.read(path)
        return tuple(load_pem_certificates(data or b""))
    except (UnreadableError, ValueError) as e:
        raise SettingsError([SettingsProblem("node.pki_dir", "the CA's certificate", f"{path}: {e}")]) from None


def opened(settings: Settings, specs: Sequence[CertificateSpec]) -> dict[str, AuthorityOfSigners]:
    """
    The CAs of these certificates, by name.

    Raises:
        SettingsError: One has no backend, or it can't be used.
    """
    names = [name for name in AUTHORITIES if any(spec.authority.name == name for spec in specs)]
    return {name: AuthorityOfSigners(one, settings) for name, one in registry.configured(settings, names).items()}
