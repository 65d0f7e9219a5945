"""The CAs behind the signers: send requests, collect answers and verify them, as a renewal does."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.x509.verification import VerificationError as NoPathError

from bridge.ca import CA, Answer, assert_right_ca, registry, unfit
from bridge.ca.registry import Configured, cross_of, is_cross_long_enough
from bridge.ca.retry import NoWaitPolicy
from bridge.contract import Issued, Pending, PlannedCertificate, SignRequest
from bridge.errors import BackendError, SettingsError, SettingsProblem
from bridge.gateway.rules import PodSignerRules, patterns
from bridge.pki import verify
from bridge.pki.certificates import spki
from bridge.pki.csr import Naming
from bridge.pki.kubeadm_names import sample
from bridge.pki.verify import Expectation, Verified
from bridge.settings.tables import NodeSettings, Settings
from bridge.specs import AUTHORITIES, KEY_ALGORITHMS, PODS, SIGNING_AUTHORITIES, Authority, CertificateSpec
from bridge.system.paths import UnreadableError, assert_ours, read_ca_file

log = logging.getLogger("ca-bridge")

_ANCHOR_SECONDS = 60.0


class AuthorityOfSigners:
    """One of the cluster's CAs; any thread may use it."""

    def __init__(self, configured: Configured, settings: Settings, specs: Sequence[CertificateSpec]) -> None:
        self.name = configured.authority
        self._specs = [spec for spec in specs if spec.authority.name == self.name]
        self.rest = NoWaitPolicy()
        self.ca = CA.of(configured, self.rest)
        self._settings = settings
        self._authority = SIGNING_AUTHORITIES[configured.authority]
        self._anchor_file = settings.node.pki_dir / self._authority.certificate_file
        self._mutex = threading.Lock()
        self._anchors, self._read_at = read_anchors(settings.node, self._authority), time.monotonic()
        self._issuer_end: datetime | None = None
        self.identity = ""  #: Our name at the CA as of the last check, if the CA reports it.
        self._min_validity, self._signer = settings.gateway.min_validity, self._anchors[0]
        # pods trust each root in their bundle, so their certificates need no cross-certificate
        self._cross = None if self._each_anchor_counts else cross_of(settings, self.name, self._signer)
        backend = self.ca.backend
        self.asks_validity = backend.asks_validity
        # not a backend with `may_recall`, which would list and read all that the CA stored for each request
        self.recalls = backend.can("recall") and not backend.can("may_recall")

    def sign(self, request: SignRequest) -> Issued | Pending:
        """Have the CA sign one request (BackendError)."""
        [answer] = self.ca.ask([request])
        return _or_raise(answer)

    def recall(self, request: SignRequest, since: datetime) -> Issued | None:
        """Find a certificate that the CA signed for an earlier gateway, which died before it stored it."""
        [answer] = self.ca.recall([request], since)
        return answer

    def anchors(self) -> tuple[x509.Certificate, ...]:
        """Return the CA's certificates from the cluster's own file, which is read again each minute."""
        with self._mutex:
            if time.monotonic() - self._read_at >= _ANCHOR_SECONDS:
                self._read_at = time.monotonic()
                try:
                    self._anchors = read_anchors(self._settings.node, self._authority)
                except SettingsError as e:
                    log.error("%s; the certificates that were read before still count", e)  # noqa: TRY400
            return self._anchors

    def end(self) -> datetime:
        """Return when the issuer's path ends if the CA reports its issuer, else when the first CA certificate expires."""
        ends = [anchor.not_valid_after_utc for anchor in self.anchors()]
        if self._issuer_end is not None or not self._each_anchor_counts:
            return self._issuer_end or ends[0]
        # any that has not expired may be the issuer, and a certificate that outlives its issuer would be refused
        return min((end for end in ends if end > datetime.now(UTC)), default=ends[0])

    def check(self, now: datetime, pods: Collection[PodSignerRules] = ()) -> list[str]:
        """
        Check the CA's identity (BackendRefusedError: another CA) and whether its roles or profiles fit, including what the
        policy lets `pods` have; return a sentence for each problem.
        """
        self.identity = self.ca.ask_identity() or self.identity
        if issuers := self.ca.issuers():
            self._issuer_end = self._end_of_path(issuers, now, self.anchors())
            if self._issuer_end is None:
                assert_right_ca(issuers, self._usual(self.anchors(), now))
        found = [unfit(self.ca.backend, self._specs)]  # first, since a backend finds its roles in it
        for rules in pods if self.name == PODS.name else ():
            found += [unfit(self.ca.backend, (), [wanted]) for wanted in self._wanted_of_pods(rules, now)]
        texts = (f"{self.ca.label}: {name}: {error}" for errors in found for name, error in errors.items())
        return list(dict.fromkeys(texts))

    def _wanted_of_pods(self, rules: PodSignerRules, now: datetime) -> Iterator[PlannedCertificate]:
        """Yield a sample for each key type; its URIs are SPIFFE ID patterns, or none where only labels select namespaces."""
        uris = patterns([rules])[0].uris if rules.namespaces else ()
        names = Naming(subject=x509.Name([]), sans=tuple(map(x509.UniformResourceIdentifier, uris)))
        certificate, least = sample(names, now), max(self._min_validity, rules.least - rules.backdating)
        for key in KEY_ALGORITHMS:
            if key in rules.keys:
                yield PlannedCertificate(
                    spec=rules.spec,
                    certificate=certificate,
                    key=key,
                    validity=rules.max_validity,
                    at_least=least,
                    extra_subject=self._settings.extra_subject(self.name),
                )

    def _end_of_path(
        self, issuers: Sequence[x509.Certificate], now: datetime, anchors: Sequence[x509.Certificate]
    ) -> datetime | None:
        """Return when the path from issuer to anchor ends; a CA may also list old certificates and other roots."""
        ends = []
        for anchor in anchors if self._each_anchor_counts else anchors[:1]:
            with contextlib.suppress(NoPathError):
                path = verify.verified_path(issuers[0], issuers[1:], anchor, now)
                ends.append(min(certificate.not_valid_after_utc for certificate in path))
        return max(ends, default=None)

    @property
    def _each_anchor_counts(self) -> bool:
        """Whether all roots of the file count: pods trust each (two during a rotation), kubeadm reads only the first."""
        return self.name == PODS.name

    def verified(self, answer: Issued, request: SignRequest, longest: timedelta, now: datetime) -> Verified:
        """Verify an answer; `longest` is the policy's limit (VerificationError)."""
        expected = self._expected(request, longest, now)
        if self._each_anchor_counts and len(expected.anchors) > 1:
            by_anchor = [replace(expected, anchors=(anchor,)) for anchor in expected.anchors]
            valid = (each for each in by_anchor[1:] if verify.error_of(answer, request, each) is None)
            chain = (answer.leaf, *answer.intermediates)
            reached = (each for each in by_anchor if self._end_of_path(chain, now, each.anchors))
            expected = next(valid, None) or next(reached, by_anchor[0])  # errors name the anchor that the chain reaches
        return self.ca.verified(answer, request, expected)

    def collect(self, request: SignRequest, reference: str, longest: timedelta, now: datetime) -> Issued | Pending:
        """Fetch the CA's answer to an earlier request, or its word that it still needs time."""
        return _or_raise(self.ca.collect(request, reference, self._expected(request, longest, now)))

    def _expected(self, request: SignRequest, longest: timedelta, now: datetime) -> Expectation:
        cross, anchors = self._cross, self.anchors()
        # the cross-certificate counts while it lasts long enough and still belongs to the CA that signs
        if cross is not None and (
            anchors[0] != self._signer or not is_cross_long_enough(cross, self._settings.renewal, now)
        ):
            cross = None
        return replace(
            self._usual(anchors, now),
            min_validity=min(self._min_validity, request.validity * 0.5),
            longest=request.validity if self.asks_validity else longest,
            cross=cross,
        )

    def _usual(self, anchors: tuple[x509.Certificate, ...], now: datetime) -> Expectation:
        return self._settings.expectation(self.name, anchors, self._anchor_file.name, now)


def _or_raise(answer: Answer) -> Issued | Pending:
    if isinstance(answer, BackendError):
        raise answer
    return answer


def read_anchors(settings: NodeSettings, authority: Authority) -> tuple[x509.Certificate, ...]:
    """
    Read the certificates of a CA's file.

    Raises:
        SettingsError: There are none, other users can write the file, or the CA of pods shares a key with a CA of the cluster.
    """
    path = settings.pki_dir / authority.certificate_file
    anchors = _certificates(path)
    if authority == PODS:
        keys = {spki(anchor.public_key()) for anchor in anchors}
        files = {other.name: settings.pki_dir / other.certificate_file for other in AUTHORITIES.values()}
        cas = {name: _certificates(file) for name, file in files.items() if file.exists()}
        if shared := [name for name, own in cas.items() if any(spki(ca.public_key()) in keys for ca in own)]:
            wanted = f"a CA for pods that has its own key: the API server takes clients' names from {shared[0]}"
            found = f"{path} with the key of {', '.join(shared)}"
            raise SettingsError(
                [SettingsProblem("node.pki_dir", wanted, found)], hint="have a separate CA made for pods"
            )
    return anchors


def _certificates(path: Path) -> tuple[x509.Certificate, ...]:
    try:
        assert_ours(path)
        return read_ca_file(path)
    except (OSError, UnreadableError) as e:
        found = e.strerror if isinstance(e, OSError) else e
        raise SettingsError([SettingsProblem("node.pki_dir", "the CA's certificate", f"{path}: {found}")]) from None


def opened(settings: Settings, specs: Sequence[CertificateSpec]) -> dict[str, AuthorityOfSigners]:
    """Open the CAs of these certificates, by name."""
    names = [name for name in SIGNING_AUTHORITIES if any(spec.authority.name == name for spec in specs)]
    configured = registry.configured(settings, names)
    found = {name: AuthorityOfSigners(each, settings, specs) for name, each in configured.items()}
    ca = found[PODS.name].ca if PODS.name in found else None
    # a pod's CSR is empty: a backend that copies names from the CSR would get certificates without names
    if ca is not None and not ca.backend.names_beside_csr:
        wanted = f"{registry.with_names_beside_csr()} (if its settings let it)"
        raise SettingsError([settings.source.problem(("authority", PODS.name, "backend"), wanted, ca.label)])
    return found
