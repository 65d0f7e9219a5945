"""
The approver's client: lists, shows and decides the door's requests over HTTPS, with the approver's certificate and key.

It trusts the door no more than a courier: it computes each bundle's digest itself, and signs that digest.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from bridge.desk.approval import Decision, Verdict
from bridge.desk.files import load_signing_key
from bridge.errors import BridgeError, Exit, SettingsError, SettingsProblem
from bridge.pki import signatures
from bridge.pki.budget import OverBudgetError, of_server
from bridge.pki.bundle import RequestBundle
from bridge.pki.bundle_format import digest, loads_request
from bridge.pki.certificates import has_key_of, load_pem_certificates
from bridge.settings.tables import ApproverSettings
from bridge.system.http import Answer, ask, pool
from bridge.system.paths import UnreadableError, read
from bridge.system.tls import Peer, context
from bridge.words import one_line

_SECONDS = 30.0
#: A person's signature does not cover the time.
_UNSIGNED_TIME = datetime.min.replace(tzinfo=UTC)
_LONGEST = 8 << 20
#: The fewest hex digits of a digest that no forged request can share, and all digits of a digest.
FEWEST_DIGITS, _DIGITS = 16, 64


class DoorError(BridgeError):
    """The door's answer is not what the client asked for."""

    hint = "is `approver.url` the door's own (`ca-bridge serve`), of the same version?"


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """A request from the door, with the bundle parsed and the digest computed here."""

    bundle: RequestBundle
    digest: str
    document: Mapping[str, Any]  #: The door's JSON; print its text with `printable` only.
    cas: Mapping[str, list[x509.Certificate]]  #: By authority, as the door sends them.

    def signer_of(self, decision: Mapping[str, Any]) -> x509.Certificate | None:
        """Return the certificate whose key signed one of the document's decisions; None: no signature proves it."""
        try:
            kept = Decision.kept(
                approver="", verdict=str(decision.get("verdict")), reason=str(decision.get("reason")), decided=_UNSIGNED_TIME,
                evidence=json.dumps(decision.get("proof")).encode(),
            )  # fmt: skip
        except ValueError:
            return None
        is_signed = kept.evidence == "signature" and signatures.is_by(
            kept.certificate.public_key(), kept.proof, kept.message(self.digest)
        )
        return kept.certificate if is_signed else None


class Reviewer:
    """An approver's session with the door, over a kept connection."""

    def __init__(self, settings: ApproverSettings, now: datetime) -> None:
        """Read the approver's files (SettingsError)."""
        missing = [key for key in ("url", "ca_file", "certificate", "key") if not getattr(settings, key)]
        if settings.ca_file is None or settings.certificate is None or settings.key is None or missing:
            problems = [SettingsProblem(f"approver.{key}", "a value, for the approver", "none") for key in missing]
            raise SettingsError(problems, hint="`ca-bridge help approvals` has an example")
        self._key: PrivateKeyTypes = load_signing_key(settings.key, "approver.key", "decisions")
        data, key = _read(settings.certificate, "certificate"), _read(settings.key, "key")
        try:
            self._leaf = load_pem_certificates(data)[0]
        except ValueError as e:
            found = f"{settings.certificate}: {e}"
            raise SettingsError([SettingsProblem("approver.certificate", "a certificate in PEM", found)]) from None
        if not has_key_of(key, self._leaf):
            problem = SettingsProblem("approver.key", f"the key of {settings.certificate}", "another one", settings.key)
            raise SettingsError([problem])
        anchors = _read(settings.ca_file, "ca_file")
        peer = Peer.of(settings.url.rstrip("/"), lambda: context(anchors, data, key), alert_seconds=2)
        self._http = pool(peer)
        self._now = now

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def waiting(self, text: str = "") -> Mapping[str, Any]:
        """Return the door's JSON about waiting requests: `approver`, `waiting` (their number) and some `requests`."""
        found = self._ask("GET", f"/v1/approvals?{urlencode({'q': text})}" if text else "/v1/approvals")
        requests = found.get("requests")
        if not isinstance(requests, list) or not all(isinstance(request, dict) for request in requests):
            raise DoorError("the door: wanted a list of requests, found something else")
        return found

    def show(self, start: str, *, is_alone: bool = False) -> Review:
        """
        Return the request whose digest begins with `start`.

        Args:
            start: All digits, or some.
            is_alone: Some digits count only if no other request waits: an attacker can make two requests whose digests begin
                with the same 16 digits, show one, and have the other approved.

        Raises:
            DoorError: The door sent another request.
            SettingsError: There is no such request, or the digits are not enough.
        """
        wanted = start if re.fullmatch(f"[0-9a-f]{{{_DIGITS}}}", start) else self._whole(start, is_alone=is_alone)
        return self._verified(self._ask("GET", f"/v1/approvals/{wanted}"), wanted)

    def of_node(self, node: str) -> list[str]:
        """Return the digests of requests that wait and say that they are of this node; the door may know more of them."""
        return [str(each.get("digest")) for each in self.waiting(node)["requests"] if each.get("node") == node]

    def decide(self, review: Review, verdict: Verdict, reason: str) -> Review:
        """Sign a decision about the reviewed request, and send it."""
        decision = Decision(
            approver="", verdict=verdict, reason=reason.strip(), decided=self._now, certificate=self._leaf,
            evidence="signature", proof=b"",
        )  # fmt: skip
        signature = b64encode(signatures.sign(self._key, decision.message(review.digest))).decode()
        body = {"verdict": verdict, "reason": decision.reason, "signature": signature}
        return self._verified(self._ask("POST", f"/v1/approvals/{review.digest}", body), review.digest)

    def _whole(self, start: str, *, is_alone: bool) -> str:
        waiting = self.waiting("" if is_alone else start)
        digests = [each.get("digest") for each in waiting["requests"]]
        fitting = [each for each in digests if isinstance(each, str) and each.startswith(start)]
        is_one = len(fitting) == 1 and (not is_alone or waiting.get("waiting") == 1)
        if not is_one or len(start) < FEWEST_DIGITS:
            wanted = f"all {_DIGITS} digits of a request, or {FEWEST_DIGITS} or more of the only one that waits"
            hint = f"`ca-bridge approvals show {start}` prints all digits of it" if fitting else ""
            if not is_alone:
                wanted = f"{FEWEST_DIGITS} or more digits of one request that waits, or all {_DIGITS}"
            problem = SettingsProblem("DIGEST", wanted, one_line(start, 100))
            raise SettingsError([problem], hint=hint or "`ca-bridge approvals list` has them")
        return fitting[0]

    def _verified(self, document: Mapping[str, Any], wanted: str) -> Review:
        try:
            bundle = loads_request(json.dumps(document.get("bundle")).encode())
        except BridgeError as e:
            raise DoorError(f"the door: wanted the request bundle, found: {e}") from None
        if digest(bundle) != wanted:
            raise DoorError(f"the door: wanted request {wanted[:16]}, found {digest(bundle)[:16]}")
        cas = found if isinstance(found := document.get("cas"), dict) else {}
        try:
            cas = {name: load_pem_certificates(str(text).encode()) for name, text in cas.items()}
        except ValueError as e:
            raise DoorError(f"the door: wanted CA certificates, found: {one_line(e)}") from None
        return Review(bundle=bundle, digest=wanted, document=document, cas=cas)

    def _ask(self, method: str, target: str, body: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        headers = {"Accept": "application/json"} | ({"Content-Type": "application/json"} if body is not None else {})
        data = None if body is None else json.dumps(body).encode()
        answer = ask(self._http, method, target, headers, data, seconds=_SECONDS, longest=_LONGEST)
        try:
            document = of_server(answer.body)
        except (ValueError, OverBudgetError):
            document = None
        if not isinstance(document, dict):
            raise DoorError(f"the door: HTTP {answer.status}, wanted a JSON object, found something else")
        if answer.status != HTTPStatus.OK:
            raise _error(answer, document)
        return document


def _error(answer: Answer, document: Mapping[str, Any]) -> BridgeError:
    is_busy, hint = answer.status >= HTTPStatus.INTERNAL_SERVER_ERROR, document.get("hint")
    if not isinstance(hint, str):
        hint = "try again later" if is_busy else ""
    text = f"the door: {one_line(document.get('error', f'HTTP {answer.status}'), 2000)}"
    code = Exit.UNAVAILABLE if is_busy else Exit.REFUSED
    return BridgeError(text, hint=one_line(hint, 500), exit_code=code)


def _read(path: Path, key: str) -> bytes:
    try:
        data = read(path)
    except UnreadableError as e:
        raise SettingsError([SettingsProblem(f"approver.{key}", "a file in PEM", str(e), path)]) from None
    if data is None:
        raise SettingsError([SettingsProblem(f"approver.{key}", "a file in PEM", "none", path)])
    return data
