"""HTTP to a cfssl server: its answers, and what its messages mean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from backends.http import Http, Wording, retry_after_seconds, without
from bridge.system.http import Answer
from bridge.words import one_line

if TYPE_CHECKING:
    from backends.cfssl import CfsslSettings

API = "/api/v1/cfssl"
#: Statuses and codes that may pass: from a proxy in front (RFC 9110 §15.6, RFC 6585 §4), the certificate database is
#: locked (the server signed, but keeps it), the server's own upstream failed. The last two come with status 400.
LATER_STATUSES = frozenset({429, 502, 503, 504})
LATER_CODES = frozenset({11000, 7400})

#: Messages that say, before the CSR is looked at, that nothing will be signed with this profile and key.
NO_ENTRY = frozenset(
    {"invalid token", "no authentication provider", "authentication required", "authorisation required"}
    | {"invalid profile", "bad label", "not authorised", "404 page not found"}
)

NOT_FOUND = "404 page not found"
_UNKNOWN_PROFILE = "does the server have profile {profile}? for an unknown one it uses its default profile"
NOT_CFSSL = "wanted an answer of cfssl, found something else"
_WHICH_LABEL = "is {label} a label in the server's roots file? the reason is in its log, never in its answers"
#: What to do next, by message where that tells more than the code.
HINTS: Mapping[str | int | None, str] = {
    "invalid token": "either the HMAC key is not that of profile {profile}, or the server has no such profile: both "
    "look alike; compare auth_key and profile with the server's configuration",
    "no authentication provider": "profile {profile} is unknown to the server, or has no auth_key there",
    "authentication required": 'the server wants an HMAC for profile {profile}: endpoint = "authsign", auth_key_file',
    "authorisation required": "profile {profile} has no auth_key in the server's configuration, and needs one",
    "invalid profile": "the server has no profile {profile}",
    "bad label": _WHICH_LABEL,
    "bad request": _WHICH_LABEL,
    "not authorised": "this machine's address is in none of the `nets` of the server's roots file",
    "Invalid CN": "the server's -mutual-tls-cn does not match the CN of client_cert",
    NOT_FOUND: "is the url right, are `info` and the signing endpoint enabled, and is the CA loaded? "
    "`cfssl serve` runs on without its CA or key, without /sign where every profile has an auth_key, and without /authsign where none has",
    "Client sent an HTTP request to an HTTPS server.": "url must begin with https://",
    NOT_CFSSL: "is it a cfssl server that answers at this url?",
    1000: "the server's CA key does not fit its CA certificate, or its profile has a lint_error_level",
    5100: _UNKNOWN_PROFILE,
    5300: "the CSR asks for what profile {profile} never gives, such as a CA certificate",
    5400: _UNKNOWN_PROFILE,
    11200: "the server's database knows no such certificate",
    5500: "the CN or a SAN does not match the name_whitelist of profile {profile}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer of the server, whatever it says."""

    status: int
    result: Mapping[str, Any] | None = None  #: Of a success.
    code: int | None = None  #: Of cfssl's error.
    message: str = ""
    retry_after_seconds: float | None = None


#: Answers that are no JSON, but cfssl's own all the same. Others are not quoted: they may hold anything.
_PLAIN = frozenset({"404 page not found", "Invalid CN", "Client sent an HTTP request to an HTTPS server."})


def _parse(answer: Answer, sent: Mapping[str, str]) -> Reply:
    """
    Read status and envelope; the Content-Type says nothing (errors are labelled text/plain).

    Should the answer quote the request that was sent, we do not: anyone could send it again.
    """
    later = retry_after_seconds(answer, datetime.now(UTC))
    try:
        envelope = json.loads(answer.body)
    except (ValueError, RecursionError):
        envelope = None
    if not isinstance(envelope, dict) or "success" not in envelope:
        text = answer.body.decode("utf-8", "replace").strip()
        message = text if text in _PLAIN else NOT_CFSSL
        return Reply(status=answer.status, message=message, retry_after_seconds=later)
    result = envelope.get("result")
    if answer.status == HTTPStatus.OK and envelope["success"] is True and isinstance(result, dict):
        return Reply(status=answer.status, result=result)
    errors = envelope.get("errors")
    first = errors[0] if isinstance(errors, list) and errors and isinstance(errors[0], dict) else {}
    code = first.get("code")
    return Reply(
        status=answer.status,
        code=code if isinstance(code, int) else None,
        message=one_line(
            without(str(first.get("message", "no reason given")), [sent.get("token"), sent.get("request")])
        ),
        retry_after_seconds=later,
    )


class Server:
    """HTTP to the server."""

    def __init__(self, settings: CfsslSettings) -> None:
        silent = "" if settings.tls else "does the server speak TLS? url says http://"
        wording = Wording(name="cfssl", not_ours=HINTS[NOT_CFSSL], tls=_tls_hint, silent=silent)
        self.http = Http(wording, settings.url, settings.timeout, settings.tls_context)
        self._url = f"{settings.url.rstrip('/')}{API}"

    def post(self, endpoint: str, body: Mapping[str, str]) -> Reply:
        """The server's answer; errors are those of `Http.request`."""
        return _parse(self.http.request("POST", f"{self._url}/{endpoint}", json=body), body)


def _tls_hint(reason: str) -> str:
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        return "ca_file must hold the CA of the server's TLS certificate, and its SANs the name in url"
    if "WRONG_VERSION_NUMBER" in reason or "RECORD_LAYER_FAILURE" in reason:
        return "does the server speak plain HTTP? cfssl does when one of -tls-cert and -tls-key is missing"
    return (
        "the server may want a client certificate, or another one (client_cert and client_key: from the CA of its "
        "-mutual-tls-ca, good for clientAuth), or may not speak TLS 1.2"
    )
