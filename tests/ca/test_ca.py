"""One CA at work: what it says of itself is one line, and a backend that fails by itself is unavailable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import pytest
from cryptography import x509

from bridge.ca.ca import CA
from bridge.ca.retry import Outage, Rest
from bridge.contract import Issued, SignRequest
from bridge.errors import BackendError, BackendRefusedError, BackendUnavailableError
from bridge.pki.verify import Expectation
from bridge.specs import SPECS
from bridge.testing import TestCA, sign_request
from tests.kit.issuing import NOW, Signer


@dataclass
class Told:
    """A backend that tells its certificate, and fails with an error when it is asked to sign."""

    issuer: x509.Certificate
    error: Exception | None = None

    def issuers(self) -> list[x509.Certificate]:
        """The one that signs."""
        return [self.issuer]

    def sign_many(self, requests: Sequence[SignRequest]) -> Sequence[Issued | BackendError]:
        """Fail, or answer with that certificate."""
        if self.error is not None:
            raise self.error
        return [Issued(leaf=self.issuer) for _ in requests]

    def sign(self, request: SignRequest) -> Issued:
        """Never asked."""
        raise NotImplementedError


def expected(anchor: x509.Certificate) -> Expectation:
    return Expectation(anchors=(anchor,), anchor_name="ca.crt", now=NOW, min_validity=timedelta())


@pytest.mark.attack("N21")
def test_another_cas_name_draws_no_lines() -> None:
    """An operator of the CA who chooses its CN writes no line of `doctor`; the right CA is no error, whatever its name."""
    ours, other = Signer.make().certificate, Signer.make("kubernetes\nerror: all is well").certificate
    with pytest.raises(BackendRefusedError) as e:
        CA(label="ca", backend=Told(other), retry=Rest()).look([], lambda _: expected(ours))
    assert "\n" not in str(e.value)
    with pytest.raises(BackendRefusedError) as e:
        CA(label="ca", backend=Told(ours), retry=Rest()).look([], lambda _: expected(other))
    assert "\n" not in str(e.value)
    CA(label="ca", backend=Told(other), retry=Rest()).look([], lambda _: expected(other))


def test_a_backend_that_fails_by_itself_is_unavailable() -> None:
    """At once, since no retry gives permission; what is no error of the system's is a bug, and comes through."""
    leaf = TestCA.make().leaf(SPECS["apiserver"])
    request = sign_request(leaf, SPECS["apiserver"], "ecdsa-p256", timedelta(days=1))

    def ask(error: Exception | None) -> object:
        return CA(label="ca", backend=Told(leaf, error), retry=Outage(timedelta(hours=1))).ask([request])[0]

    answer = ask(PermissionError(13, "Permission denied", "/ca"))
    assert isinstance(answer, BackendUnavailableError)
    assert "Permission denied" in str(answer)
    assert ask(None) == Issued(leaf=leaf)
    with pytest.raises(KeyError):
        ask(KeyError("x"))
