"""
Answers in files that somebody has carried here: bundles of a desk, or loose certificates.

Each is matched to an open request: a bundle by the request's digest, a loose certificate by its public key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from bridge.contract import Issued
from bridge.errors import BackendRefusedError, BridgeError, Exit, VerificationError
from bridge.pki import bundle_format, signatures, verify
from bridge.pki.bundle import AnswerBundle, BundleError, Refusal
from bridge.pki.certificates import UNREADABLE, certificates_in, fingerprint, is_ca, is_for, name_text, serial_hex
from bridge.pki.display import fingerprint_text
from bridge.renewal.issuance import Answered
from bridge.renewal.prepare import Prepared
from bridge.state import audit
from bridge.state.open_requests import OpenRequests
from bridge.state.session import Run
from bridge.system.console import log, printable
from bridge.system.paths import UnreadableError, read


class NotAskedForError(BridgeError):
    """An answer to nothing that is asked here."""

    exit_code: ClassVar[int] = Exit.REFUSED


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One file's answer to one request."""

    answer: Issued | BridgeError
    source: str  #: The file.

    @property
    def begin(self) -> datetime:
        """When the certificate becomes valid; the earliest time there is for a refusal."""
        if isinstance(self.answer, Issued):
            return self.answer.leaf.not_valid_before_utc
        return datetime.min.replace(tzinfo=UTC)


@dataclass(kw_only=True)
class Found:
    """The answers in carried files to requests that are open."""

    candidates: dict[str, list[Candidate]] = field(default_factory=dict)  #: By certificate name.
    strange: list[BridgeError] = field(default_factory=list)  #: Answers to something else.
    loose: dict[Path, list[x509.Certificate]] = field(default_factory=dict)

    def take(self, name: str, answer: Issued | BridgeError, path: Path) -> None:
        """Keep an answer; which of several counts is decided when all are there."""
        self.candidates.setdefault(name, []).append(Candidate(answer=answer, source=printable(path)))

    def best(self, one: Prepared, expected: verify.Expectation) -> Candidate:
        """
        The latest certificate that passes; else the latest, which says what is wrong; else a refusal.

        Whoever can add a file to those that are carried may try to hide the genuine answer behind a decoy.
        """
        latest = sorted(self.candidates[one.name], key=lambda candidate: candidate.begin, reverse=True)
        return next((candidate for candidate in latest if _passes(candidate, one, expected)), latest[0])


def _passes(candidate: Candidate, one: Prepared, expected: verify.Expectation) -> bool:
    if not isinstance(candidate.answer, Issued):
        return False
    try:
        verify.check(candidate.answer, one.request, expected)
    except VerificationError:
        return False
    return True


def answers_in(run: Run, paths: Sequence[Path]) -> Found:
    """
    Read the answers in carried files to requests that are open; what answers none of them is recorded.

    Raises:
        BridgeError: A file that was named can't be read, or holds no certificate.
    """
    found = Found()
    for path in paths:
        is_directory = path.is_dir()
        for file in _files_in(path) if is_directory else [path]:
            _read_answer(run, file, found, skip=is_directory)
    _match_loose(run.requests, found)
    for error in found.strange:
        run.record.add(audit.REFUSED, error=error)
    return found


def _files_in(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if path.is_file() and not path.name.startswith("."))
    except OSError as e:
        raise BridgeError(f"{directory}: wanted to look for answers there, found: {e.strerror}") from None


def _read_answer(run: Run, path: Path, found: Found, *, skip: bool) -> None:
    """
    Args:
        run: Its open requests are what answers may be for.
        path: A file.
        found: Gets what is in it.
        skip: A file that is no answer is only mentioned, since nobody named it; not one that was changed.
    """
    try:
        data = read(path)
        if data is None:
            raise UnreadableError("no such file")  # noqa: TRY301 (as what can't be read)
        if data.lstrip().startswith(b"{"):
            answer = bundle_format.loads_answer(data)
            if _is_authentic(run, answer):
                _take_bundle(run, path, answer, found)
            else:
                found.strange.append(
                    UnsignedError(f"{path}: wanted an answer that the desk has signed, found none of its signature")
                )
        elif run.settings.node.desk_key is not None:
            found.strange.append(
                UnsignedError(f"{path}: wanted an answer that the desk has signed, found loose certificates")
            )
        else:
            found.loose[path] = [one for one in certificates_in(data) if _has_dates(one, path, found)]
    except BundleError as e:
        error = NotAskedForError(f"{path}: {e}", hint=e.hint)
        if not skip:
            raise error from None
        if e.found == bundle_format.REQUEST_SCHEMA:
            log.info("%s: passed over: it is the request", path)
        else:
            found.strange.append(error)
    except (UnreadableError, ValueError) as e:
        if not skip:
            raise BridgeError(
                f"{path}: wanted an answer bundle, or certificates in PEM, DER or PKCS#7, found: {e}"
            ) from None
        log.info("%s: passed over: %s", path, e)


class UnsignedError(BridgeError):
    """The settings name the desk's key, and somebody else made the answer."""

    exit_code = Exit.REFUSED
    hint = "have the desk sign its answers (answer_key in its policy); node.desk_key in the settings names whose signature counts"


def _is_authentic(run: Run, answer: AnswerBundle) -> bool:
    """
    Whether the desk has signed it, where the settings name its key.

    Raises:
        UnreadableError, ValueError: That key can't be read.
    """
    path = run.settings.node.desk_key
    if path is None:
        return True
    key = signatures.public_key(read(path) or b"")
    return answer.signature is not None and signatures.is_by(
        key, answer.signature, bundle_format.answer_message(answer)
    )


def _has_dates(certificate: x509.Certificate, path: Path, found: Found) -> bool:
    """The library reads them when they are asked for; a date in year 0 is none."""
    try:
        _ = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    except UNREADABLE as e:
        found.strange.append(NotAskedForError(f"{path}: wanted a certificate with dates, found: {e}"))
        return False
    return True


def _take_bundle(run: Run, path: Path, answer: AnswerBundle, found: Found) -> None:
    node = run.settings.node
    if (answer.node, answer.cluster) != (node.node_name, node.cluster):
        found.strange.append(
            NotAskedForError(
                f"{path}: wanted an answer to node {node.node_name} of cluster {node.cluster}, "
                f"found one to node {answer.node} of cluster {answer.cluster}"
            )
        )
        return
    asked = [one for one in run.requests if answer.request_digest in (*one.bundles, one.reference)]
    if not asked:
        found.strange.append(
            NotAskedForError(
                f"{path}: wanted an answer to a request that waits here, found one to the bundle with the fingerprint "
                f"{fingerprint_text(answer.request_digest)}, which was cancelled, is done, or is older",
                hint="`ca-bridge pending list` shows what waits; export again if that is nothing",
            )
        )
    for one in asked:
        given = answer.answers.get(one.name)
        if isinstance(given, Refusal):
            refused = BackendRefusedError(f"refused by {answer.signer}: {given.reason}", hint=_after_refusal(run))
            found.take(one.name, refused, path)
        elif given is not None:
            found.take(one.name, given, path)


def _after_refusal(run: Run) -> str:
    if run.settings.node.desk_key is not None:  # a signed refusal ends the request
        return "once the desk's policy allows it, `ca-bridge export` makes a new request"
    return (
        "once the desk's policy allows it, carry the same request there again; `ca-bridge pending cancel` gives it up"
    )


def _match_loose(requests: OpenRequests, found: Found) -> None:
    """Match loose certificates by public key; one that is neither a CA's nor for an open request is refused by name."""
    everything = [(path, certificate) for path, ones in found.loose.items() for certificate in ones]
    matched: set[bytes] = set()
    for one in requests:
        matching = [(path, certificate) for path, certificate in everything if is_for(certificate, one.request.csr)]
        others = [certificate for _, certificate in everything if is_ca(certificate)]
        for path, certificate in matching:
            found.take(one.name, Issued(leaf=certificate, intermediates=tuple(others)), path)
        matched |= {certificate.fingerprint(_SHA256) for _, certificate in matching}
    for path, certificate in everything:
        if certificate.fingerprint(_SHA256) not in matched and not is_ca(certificate):
            found.strange.append(
                NotAskedForError(
                    f"{path}: wanted the certificate of a request that waits here, found {_about(certificate)} for another key",
                    hint="it answers a cancelled or older request, or another node's",
                )
            )


_SHA256 = hashes.SHA256()


def _about(certificate: x509.Certificate) -> str:
    try:
        return f"{name_text(certificate.subject)}, serial {serial_hex(certificate)},"
    except UNREADABLE:
        return f"SHA-256 {fingerprint(certificate)[:16]}…"


def answered_by(run: Run, one: Prepared, best: Candidate, expected: verify.Expectation) -> Answered:
    """The best of what was said to a request, as if its CA had said it."""
    label = _label(best.source)
    run.record.know(one.name, one.request, label, None)
    if isinstance(best.answer, Issued):
        run.record.add(audit.ISSUED, one.name, authority=one.authority, new=best.answer.leaf)
    return Answered(prepared=one, expected=expected, label=label, answer=best.answer)


def _label(source: str) -> str:
    return f"import of {source}"
