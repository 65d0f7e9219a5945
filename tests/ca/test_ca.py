"""One CA at work: what it says of itself is one line, and a backend that fails by itself is unavailable."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509

from bridge.ca import CA
from bridge.ca.registry import Configured
from bridge.ca.retry import NoWaitPolicy, WaitPolicy
from bridge.contract import Backend, BackendSettings, Issued, SignRequest
from bridge.errors import (
    BackendError,
    BackendRefusedError,
    BackendUnavailableError,
    BridgeError,
    LocalFileError,
    NoVerdictError,
)
from bridge.pki.verify import Expectation
from bridge.specs import SPECS
from bridge.testing import TestCA, sign_request
from tests.kit.forged import validity, with_field
from tests.kit.issuing import NOW, Signer


@dataclass
class HasIssuer(Backend):
    """A backend with one issuer, which fails with an error when it is asked to sign."""

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


@dataclass
class HasIssuers(Backend):
    """A backend that several authorities share; it tells nothing of others."""

    by_authority: Mapping[str, x509.Certificate]

    def issuers_of(self, authority: str) -> list[x509.Certificate]:
        """The one that signs for this authority."""
        return [one for name, one in self.by_authority.items() if name == authority]

    def sign(self, request: SignRequest) -> Issued:
        """Never asked."""
        raise NotImplementedError


def test_a_shared_backend_is_asked_for_the_authoritys_own_ca() -> None:
    """`doctor` finds another CA behind a door, as a renewal does; where the door tells none, nothing is compared."""
    ours, other = Signer.make().certificate, Signer.make("other").certificate
    backend = HasIssuers({"ca": ours, "etcd-ca": other})
    found = {
        name: CA(label="door", backend=backend, retry=NoWaitPolicy(), authority=name)
        for name in ("ca", "front-proxy-ca")
    }
    assert [one.preflight([], (), expected(ours)) for one in found.values()] == [{}, {}]
    assert {name: one.certificates for name, one in found.items()} == {"ca": (ours,), "front-proxy-ca": ()}
    with pytest.raises(BackendRefusedError, match=r"wanted the CA of ca\.crt"):
        CA(label="door", backend=backend, retry=NoWaitPolicy(), authority="etcd-ca").preflight([], (), expected(ours))


class OnlySigns(Backend):
    """A backend as a plug-in of twenty lines has it."""

    def sign(self, request: SignRequest) -> Issued:
        """Answer with the certificate that the request replaces."""
        assert request.replaces is not None
        return Issued(leaf=request.replaces)


def test_a_backend_that_only_signs_can_be_asked_everything() -> None:
    """A default says that the CA shows nothing, and is no answer that ends an outage; `can` tells it from "none"."""
    leaf, rest = TestCA.make().leaf(SPECS["apiserver"]), NoWaitPolicy()
    request = sign_request(leaf, SPECS["apiserver"], "ecdsa-p256", timedelta(days=1))
    ca = CA(label="ca", backend=OnlySigns(), retry=rest)
    ca.look([SPECS["apiserver"]], lambda _: expected(leaf))
    assert (ca.trouble, ca.wrong, ca.identity, ca.certificates, ca.ask_ends("backend.x")) == (None, {}, None, (), {})
    with pytest.raises(BackendUnavailableError):
        rest.ask(away)
    assert (ca.issuers(), ca.tells(), ca.revoked(), ca.is_revoked(leaf)) == ((), False, None, False)
    assert (ca.recall([request], NOW), ca.recall([], NOW)) == ([None], ())
    ca.put_away("reference")
    assert rest.seconds_left() > 0
    assert ca.ask([request, request]) == [Issued(leaf=leaf)] * 2
    with pytest.raises(BridgeError, match="can't be asked later: a bug in it"):
        ca.collect(request, "reference", expected(leaf))
    assert (OnlySigns.can("issuers", "revoke"), HasIssuer.can("issuers"), HasIssuer.can("revoke")) == (
        False,
        True,
        False,
    )
    ca.close()


@pytest.mark.attack("N21")
def test_another_cas_name_draws_no_lines() -> None:
    """An operator of the CA who chooses its CN writes no line of `doctor`; the right CA is no error, whatever its name."""
    ours, other = Signer.make().certificate, Signer.make("kubernetes\nerror: all is well").certificate
    with pytest.raises(BackendRefusedError) as e:
        CA(label="ca", backend=HasIssuer(other), retry=NoWaitPolicy()).look([], lambda _: expected(ours))
    assert "\n" not in str(e.value)
    with pytest.raises(BackendRefusedError) as e:
        CA(label="ca", backend=HasIssuer(ours), retry=NoWaitPolicy()).look([], lambda _: expected(other))
    assert "\n" not in str(e.value)
    CA(label="ca", backend=HasIssuer(other), retry=NoWaitPolicy()).look([], lambda _: expected(other))


@pytest.mark.parametrize(
    ("begin", "end"), [(b"00000101000000Z", b"20991231235959Z"), (b"20200101000000Z", b"00001231235959Z")]
)
def test_a_ca_certificate_of_the_year_0_is_another_cas(begin: bytes, end: bytes) -> None:
    """An error about this CA, and no bug that ends the run at all others; one with good dates is refused by them."""
    ours = Signer.make().certificate
    dated = [
        with_field(ours, 4, validity(*dates)) for dates in ((begin, end), (b"20200101000000Z", b"20210101000000Z"))
    ]
    odd, old = (x509.load_pem_x509_certificate(text.encode()) for text in dated)
    with pytest.raises(BackendRefusedError, match="whose dates can't be read"):
        CA(label="ca", backend=HasIssuer(odd), retry=NoWaitPolicy()).look([], lambda _: expected(ours))
    with pytest.raises(BackendRefusedError, match="valid only from 2020-01-01"):
        CA(label="ca", backend=HasIssuer(old), retry=NoWaitPolicy()).look([], lambda _: expected(ours))


def test_a_backend_that_fails_by_itself_is_unavailable() -> None:
    """At once, since no retry gives permission; what is no error of the system's is a bug in it, whose text is not shown."""
    leaf = TestCA.make().leaf(SPECS["apiserver"])
    request = sign_request(leaf, SPECS["apiserver"], "ecdsa-p256", timedelta(days=1))

    def ask(error: Exception | None) -> object:
        return CA(label="ca", backend=HasIssuer(leaf, error), retry=WaitPolicy(timedelta(hours=1))).ask([request])[0]

    answer = ask(PermissionError(13, "Permission denied", "/ca"))
    assert isinstance(answer, BackendUnavailableError)
    assert "Permission denied" in str(answer)
    assert ask(None) == Issued(leaf=leaf)
    bug = ask(KeyError("s3cret"))
    assert isinstance(bug, NoVerdictError)
    assert bug.exit_code == 1
    assert re.search(r"found KeyError at .*/test_ca\.py:\d+$", str(bug))
    with pytest.raises(BridgeError, match=r"^not ours$"):
        ask(BridgeError("not ours"))

    class Broken(HasIssuer):
        """One that can't be opened."""

        settings_type = BackendSettings

        @classmethod
        def from_settings(cls, settings: BackendSettings) -> Broken:
            raise KeyError(settings.node)

    made = Configured(authority="ca", name="x", type_name="x", settings=BackendSettings(), backend_type=Broken)
    assert "found KeyError at" in str(CA.reach(made, [], lambda _: expected(leaf)).trouble)


class BreaksOff(Backend):
    """A backend that ends once in the middle of its work, when it has signed the first request, and can tell so."""

    def __init__(self, leaf: x509.Certificate) -> None:
        self._issued = Issued(leaf=leaf)
        self.signed: list[SignRequest] = []

    def sign_many(self, requests: Sequence[SignRequest]) -> Sequence[Issued]:
        """The first time one, and no answer."""
        if not self.signed:
            self.signed.append(requests[0])
            raise BackendUnavailableError("openssl was ended by signal 9")
        self.signed.extend(requests)
        return [self._issued for _ in requests]

    def recall(self, requests: Sequence[SignRequest], since: datetime) -> list[Issued | None]:
        """What was signed."""
        assert since <= datetime.now(UTC)
        return [self._issued if request in self.signed else None for request in requests]

    def sign(self, request: SignRequest) -> Issued:
        """Never asked."""
        raise NotImplementedError


def test_what_a_ca_has_signed_before_it_broke_off_is_not_signed_again() -> None:
    """Asked once more in the same run, it is asked first what it has signed."""
    leaf = TestCA.make().leaf(SPECS["apiserver"])
    requests = [sign_request(leaf, SPECS["apiserver"], "ecdsa-p256", timedelta(days=1)) for _ in range(3)]
    backend = BreaksOff(leaf)

    answers = CA(label="ca", backend=backend, retry=WaitPolicy(timedelta(hours=1))).ask(requests)

    assert answers == [Issued(leaf=leaf)] * 3
    assert backend.signed == requests


def test_another_threads_success_is_no_reason_to_ask_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is asked twice, an outage that another thread has seen end meanwhile changes nothing."""
    outage, asked = WaitPolicy(timedelta()), []
    once = outage._once

    def seen_to_end(question: Callable[[], object]) -> object:
        try:
            return once(question)
        except BackendUnavailableError:
            once(lambda: None)
            raise

    def question() -> None:
        asked.append(1)
        raise BackendUnavailableError("openssl was ended by signal 9")

    monkeypatch.setattr(outage, "_once", seen_to_end)
    with pytest.raises(BackendUnavailableError):
        outage.ask(question)
    assert asked == [1]


def away() -> None:
    """A CA that is not there."""
    raise BackendUnavailableError("away")


def test_many_questions_that_one_moment_ends_are_one_failure() -> None:
    """A CA that is away for a moment, while 32 ask, is asked again after a second; at each further failure later, up to 30."""
    rest, met = NoWaitPolicy(), threading.Barrier(32)

    def ask(question: Callable[[], object]) -> None:
        with pytest.raises(BackendUnavailableError):
            rest.ask(question)

    def meet() -> None:
        met.wait(180)
        away()

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(ask, [meet] * 32))
    assert rest.seconds_left() <= 2  # and as long as the threads took to meet
    for _ in range(6):
        ask(away)
    assert rest.seconds_left() == pytest.approx(30, abs=1)


def test_a_question_on_which_a_ca_hangs_closes_it_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that came meanwhile shows that the CA is there; its twin without one has the CA rest."""
    clock = [1.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for is_answered in (True, False):
        rest = NoWaitPolicy()

        def hang(rest: NoWaitPolicy = rest, is_answered: bool = is_answered) -> None:
            clock[0] += 10
            if is_answered:
                rest.ask(lambda: None)
            clock[0] += 10
            away()

        with pytest.raises(BackendUnavailableError):
            rest.ask(hang)
        assert (rest.seconds_left() == 0) is is_answered


def refuse() -> None:
    """A CA that says no."""
    raise BackendRefusedError("no")


def miss() -> None:
    """A CA that was not asked."""
    raise LocalFileError("no token")


@pytest.mark.parametrize("answer", [lambda: None, refuse])
def test_few_threads_find_out_whether_a_ca_is_back(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[[], object]
) -> None:
    """
    All 32 of a gateway would be kept by a CA that hangs, and other CAs' requests would wait; once it answers, all ask. A
    refusal is an answer: one bad request at a time would hold up all good ones.
    """
    clock, rest = [0.0], NoWaitPolicy()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def turns() -> int:
        return [rest.turn() for _ in range(32)].count(0.0)

    assert turns() == 32
    with pytest.raises(BackendUnavailableError):
        rest.ask(away)
    found = []
    for seconds in (0.5, 0.5, 4.9, 0.1):
        clock[0] += seconds
        found.append(turns())
    assert found == [0, 1, 0, 1]
    with pytest.raises(LocalFileError):
        rest.ask(miss)
    assert turns() == 0
    with contextlib.suppress(BackendRefusedError):
        rest.ask(answer)
    assert turns() == 32


def test_a_refusal_ends_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CA that said no meanwhile, and is away once more, is asked again for all of `retry_for`."""
    clock, outage, answers = [1.0], WaitPolicy(timedelta(seconds=100)), [away, refuse]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))

    def question() -> None:
        answers.pop(0)()

    with pytest.raises(BackendRefusedError):
        outage.ask(question)
    clock[0] = 90.0
    with pytest.raises(BackendUnavailableError):
        outage.ask(away)
    assert clock[0] > 90 + 80


def test_a_ca_that_keeps_others_waiting_rests_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that hangs for 20 seconds has at most half of the threads' time; one that fails at once is asked again after a second."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for seconds, wanted in ((0.0, 1.0), (20.0, 20.0), (300.0, 30.0)):

        def hang(seconds: float = seconds) -> None:
            clock[0] += seconds
            away()

        rest = NoWaitPolicy()
        with pytest.raises(BackendUnavailableError):
            rest.ask(hang)
        assert rest.seconds_left() == wanted
