"""Requests to an API server, and the one place where its errors become ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from backends.http import Http, Wording, retry_after_seconds, without
from bridge.errors import BackendError, BackendRefusedError, BackendUnavailableError
from bridge.pki.budget import of_server
from bridge.words import one_line

if TYPE_CHECKING:
    from backends.kubernetes import KubernetesSettings

CSRS = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
ACCESS_REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
SUBJECT_REVIEWS = "/apis/authentication.k8s.io/v1/selfsubjectreviews"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Any answer in JSON."""

    status: int
    document: Mapping[str, Any]
    retry_after_seconds: float | None

    @property
    def text(self) -> str:
        """The message of a `Status` on one line, without a field that it quotes as a whole."""
        details = self.document.get("details")
        causes = details.get("causes") if isinstance(details, dict) else None
        if self.status == HTTPStatus.UNPROCESSABLE_ENTITY and isinstance(causes, list):
            found = [one for one in causes if isinstance(one, dict)]
            return one_line("; ".join(f"{one.get('field')}: {_last_clause(str(one.get('message')))}" for one in found))
        return one_line(_last_clause(str(self.document.get("message") or "no reason given")))


_QUOTED = '": '
_LONG = 300


def _last_clause(text: str) -> str:
    """A short message as it is; of a long one what stands behind the value that it quotes."""
    return text if len(text) <= _LONG else text.rpartition(_QUOTED)[2]


def path_of(name: str) -> str:
    """The URL path of one CertificateSigningRequest."""
    return f"{CSRS}/{quote(name, safe='')}"


class Api:
    """An API server; for several threads."""

    def __init__(self, settings: KubernetesSettings) -> None:
        self._settings = settings
        self._url = settings.server_url()
        wording = Wording(name="kubernetes", not_ours=_NOT_KUBERNETES, tls=_tls_hint)
        self.http = Http(wording, self._url, settings.timeout, settings.tls_context)

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Answer:
        """Send one request; any status is an answer, except that after 401 credential files are read again, once."""
        answer = self._send(method, path, body)
        if answer.status == HTTPStatus.UNAUTHORIZED:
            self.http.close()  # they show the client certificate that they began with
            answer = self._send(method, path, body)
        if answer.status == HTTPStatus.UNAUTHORIZED:
            raise self.error(answer)
        return answer

    def error(self, answer: Answer) -> BackendError:
        """The error for an unwanted answer."""
        text = f"kubernetes: {self._url}: HTTP {answer.status}: {answer.text}"
        if "request is too large" in answer.text:  # etcd's word, in a 500
            return BackendRefusedError(text, hint="the CSR is too large for an object: fewer SANs")
        if answer.status in _LATER or answer.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return BackendUnavailableError(text, retry_after_seconds=answer.retry_after_seconds)
        return BackendRefusedError(text, hint=_HINTS.get(answer.status, "the API server's audit log may say more"))

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> Answer:
        token = self._settings.bearer()
        headers = {"Accept": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        answer = self.http.request(method, f"{self._url}{path}", self._url, headers=headers, json=body)
        later = retry_after_seconds(answer, datetime.now(UTC))
        return Answer(status=answer.status, document=_document(answer.body, token), retry_after_seconds=later)


def _document(data: bytes, token: str | None) -> Mapping[str, Any]:
    """An object in JSON; anything else is not quoted: it may come from anywhere."""
    try:
        found = of_server(without(data.decode(), [token]).encode())
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"message": "no object in JSON"}


_NOT_KUBERNETES = "is it a Kubernetes API server that answers at url?"
#: Statuses below 500 that may pass: a conflict, a version that is gone, time and rate.
_LATER = frozenset({408, 409, 410, 425, 429})
_HINTS: Mapping[int, str] = {
    HTTPStatus.BAD_REQUEST: _NOT_KUBERNETES,
    HTTPStatus.UNAUTHORIZED: "the API server does not know the token or client certificate: expired, deleted, or another "
    "cluster's? its clock and ours may differ, too",
    HTTPStatus.FORBIDDEN: "the account lacks a right, or a policy of the cluster is against it: compare with what "
    "`ca-bridge setup kubernetes --authority NAME` prints",
    HTTPStatus.NOT_FOUND: _NOT_KUBERNETES,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "the CSR is too large for an object: fewer SANs",
    HTTPStatus.UNPROCESSABLE_ENTITY: "is signer right, and the validity 10 minutes or more?",
}


def _tls_hint(reason: str) -> str:
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        return (
            "ca_file (or the kubeconfig) must hold the CA of the API server's certificate, and its SANs the host in url"
        )
    if "WRONG_VERSION_NUMBER" in reason or "RECORD_LAYER_FAILURE" in reason:
        return "does the server speak TLS at this port?"
    return "the server does not accept the client certificate: is it valid, and of the cluster's client CA?"
