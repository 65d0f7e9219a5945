"""
A Kubernetes cluster as a way to a CA: CertificateSigningRequest objects (certificates.k8s.io/v1).

`spec.signerName` names who signs: another cluster's gateway, kube-controller-manager, cert-manager or any other signer.
The object's name is computed from the request, so that an interrupted run finds its object again; its uid is kept,
since another object may get that name. The API server's checks were measured with 1.37.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import re
import ssl
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding

from backends.http import Http, OverHttp, Wording, json_object, object_of, retry_after_seconds
from backends.kubernetes import setup as kubernetes_setup
from backends.settings import context_of, pair_problems, read_secret, tls_context, token_end, url_problems
from bridge.contract import (
    BackendSettings,
    CredentialEnd,
    Issued,
    Pending,
    PlannedCertificate,
    Secret,
    Selector,
    SignRequest,
)
from bridge.errors import (
    BackendError,
    BackendRefusedError,
    BackendUnavailableError,
    NoVerdictError,
    SettingsError,
    SettingsProblem,
    Violation,
)
from bridge.node import kubeconfig
from bridge.node.kubeconfig import KubeconfigError
from bridge.pki.certificates import O_OID, attributes, is_for, load_pem_certificates
from bridge.specs import EKU, MASTERS, SPECS, CertificateSpec
from bridge.system.paths import open_regular
from bridge.system.waiting import back_off_seconds, wait_until
from bridge.words import one_line

CSRS = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
ACCESS_REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
SUBJECT_REVIEWS = "/apis/authentication.k8s.io/v1/selfsubjectreviews"

#: As the API server has it (pkg/apis/certificates/validation): a domain of at least two labels, and one path segment
#: or more with dots between them.
_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_SIGNER = re.compile(rf"(?=.{{1,253}}/){_LABEL}(\.{_LABEL})+/{_LABEL}(\.{_LABEL})*")
_MAX_BYTES = 1 << 20
_HINT = "`kubectl --kubeconfig FILE config view --raw --flatten` prints a kubeconfig in its plain form"


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """A kubeconfig's server and credentials."""

    url: str
    trust: bytes  #: PEM.
    certificate: bytes | None = None  #: PEM.
    key: bytes | None = field(default=None, repr=False)
    token: Secret | str = field(default="", repr=False)  #: From `tokenFile`, or the embedded one.


@dataclass(frozen=True, kw_only=True)
class KubernetesSettings(BackendSettings):
    """Keys of a backend of type `kubernetes`."""

    #: `spec.signerName`. A pattern: `{name}` is the certificate, `{usage}` its usage class (server, client, peer),
    #: `{node}` the node.
    signer: str
    signers: dict[str, str] = field(default_factory=dict)  #: Other signers, by certificate or usage class.
    kubeconfig: Path | None = None  #: A kubeconfig, instead of the following keys.
    url: str = ""  #: The API server's URL.
    ca_file: Path | None = None  #: CA certificates (PEM) for the API server's certificate; if not set, the system's.
    token: Secret | None = None  #: A service account's token; read again for each request.
    client_cert: Path | None = None  #: A client certificate with its chain.
    client_key: Path | None = None  #: The key of `client_cert`, not encrypted.
    wait: timedelta = timedelta(seconds=5)  #: How long one run waits for an answer; the next run goes on waiting.
    delete: bool = True  #: Delete answered objects, if the account may do that.

    def private_files(self) -> Iterator[Path]:
        """Secret files, among them the kubeconfig, which holds a key or a token."""
        yield from super().private_files()
        if self.kubeconfig is not None:
            yield self.kubeconfig

    def credentials(self) -> Iterator[tuple[str, Path]]:
        """Certificate files, among them the kubeconfig, which may hold a client certificate."""
        yield from super().credentials()
        if self.kubeconfig is not None:
            yield "kubeconfig", self.kubeconfig

    def problems(self) -> Iterator[SettingsProblem]:
        """Find contradictions, and settings that no API server accepts."""
        selector = Selector(self.signer, self.signers, self.node)
        wrong = list(selector.problems("signer", "signers", self.pairs))
        yield from wrong
        if not wrong:
            yield from _signer_problems(selector)
        others = ("url", "ca_file", "token", "client_cert", "client_key")
        given = [key for key in others if getattr(self, key)]
        if self.kubeconfig is not None and given:
            wanted = f"either kubeconfig, or {', '.join(others)}"
            yield SettingsProblem("kubeconfig", wanted, f"both ({', '.join(given)})")
        if self.kubeconfig is None:
            yield from self._direct_problems()

    def _direct_problems(self) -> Iterator[SettingsProblem]:
        yield from url_problems(self.url, "https://HOST[:PORT] of an API server, or kubeconfig")
        yield from pair_problems(self.client_cert, self.client_key)
        if self.token is None and self.client_cert is None:
            yield SettingsProblem("token_file", "a token, a client certificate or kubeconfig: who asks", "none")
        if self.token is not None and self.client_cert is not None:
            # The API server takes the certificate's identity, and never looks at the token.
            yield SettingsProblem("token_file", "a token or a client certificate", "both")

    def tls_context(self) -> ssl.SSLContext:
        """A TLS context for one connection; reads files again each time, since short-lived credentials are replaced."""
        if self.kubeconfig is None:
            return tls_context(self.ca_file, self.client_cert, self.client_key)
        access = self.access()
        try:
            return context_of(access.trust, access.certificate, access.key)
        except ValueError as e:
            raise self._unusable(str(e)) from None

    def bearer(self) -> str | None:
        """The current token; None: a client certificate identifies us."""
        access = self.access() if self.kubeconfig is not None else None
        token = self.token if access is None else access.token
        if isinstance(token, Secret):
            return read_secret(token, "kubernetes: token", "put it there, or fix token_file")
        return token or None

    def access(self) -> Access:
        """The server and credentials that the kubeconfig names now; errors quote nothing of it."""
        assert self.kubeconfig is not None  # noqa: S101 (only where it is set)
        try:
            return parse_kubeconfig(_bounded(self.kubeconfig), self.kubeconfig.parent)
        except OSError as e:
            raise self._unusable(e.strerror or type(e).__name__) from e
        except ValueError as e:
            problem = str(e)
        raise self._unusable(problem)  # outside of `except`: a traceback could lead to the text

    def _unusable(self, found: str) -> SettingsError:
        wanted = "a kubeconfig with a server, its CA, and a client certificate or a token"
        return SettingsError([SettingsProblem("kubeconfig", wanted, f"{self.kubeconfig}: {found}")], hint=_HINT)


def parse_kubeconfig(data: bytes, directory: Path) -> Access:
    """Server and credentials of a kubeconfig's current context (OSError: a file it names; ValueError: all else)."""
    try:
        config, key, token = kubeconfig.parse(data), kubeconfig.key_data(data), kubeconfig.token_text(data)
    except KubeconfigError as e:
        raise ValueError(str(e)) from None
    if unsupported := config.unsupported or (config.tls_server_name and "tls-server-name"):
        raise ValueError(f"{unsupported}, which is not supported")
    if any(url_problems(config.server)):
        raise ValueError("no https:// server")

    def part(embedded: bytes | None, file: str | None) -> bytes | None:
        return embedded or (_bounded(directory / file) if file else None)

    trust, key = part(config.ca_data, config.ca_file), part(key, config.key_file)
    certificate = part(config.certificate_data, config.certificate_file)
    if trust is None:
        raise ValueError("no certificate-authority")
    if (certificate is None) != (key is None):
        raise ValueError("one of client-certificate and client-key, not both")
    if certificate is None and not config.token_file and not token:
        raise ValueError("neither a client certificate nor a token")
    place = Secret("file", str(directory / config.token_file)) if config.token_file else token
    return Access(url=config.server, trust=trust, certificate=certificate, key=key, token=place)


def _bounded(path: Path) -> bytes:
    with open_regular(path) as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"more than {_MAX_BYTES} bytes in {path.name}")
    return data


def _signer_problems(selector: Selector) -> Iterator[SettingsProblem]:
    """Find signer names that the API does not accept, for any certificate."""
    wrong = {name for spec in SPECS.values() if not _SIGNER.fullmatch(name := selector(spec))}
    if wrong:
        wanted = "DOMAIN/NAME, such as ca-bridge.example.com/{name} or clusterissuers.cert-manager.io/corp"
        yield SettingsProblem("signer", wanted, ", ".join(map(repr, sorted(wrong)[:3])))


#: `spec.expirationSeconds` has a lower limit, and is an int32.
SHORTEST = timedelta(minutes=10)
_LONGEST_SECONDS = (1 << 31) - 1
_USAGES = {EKU.SERVER_AUTH: "server auth", EKU.CLIENT_AUTH: "client auth"}
#: What Kubernetes' own signers are for (https://kubernetes.io/docs/reference/access-authn-authz/certificate-signing-requests/).
_KUBERNETES_SIGNERS = {
    "kubernetes.io/kube-apiserver-client": {EKU.CLIENT_AUTH},
    "kubernetes.io/kube-apiserver-client-kubelet": {EKU.CLIENT_AUTH},
    "kubernetes.io/kubelet-serving": {EKU.SERVER_AUTH},
}
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.05, 1.0
#: How many answered objects may be left before a long-running process removes some.
_MOST_ANSWERED = 64


class KubernetesBackend(OverHttp):
    """One cluster, with any signer in it."""

    settings_type = KubernetesSettings
    setup = staticmethod(kubernetes_setup.files)
    asks_validity = True

    def __init__(self, settings: KubernetesSettings) -> None:
        self._settings = settings
        self._signer = Selector(settings.signer, settings.signers, settings.node)
        self._url = (settings.url if settings.kubeconfig is None else settings.access().url).rstrip("/")
        wording = Wording(name="kubernetes", not_ours=_NOT_KUBERNETES, tls=_tls_hint)
        self._http = Http(wording, self._url, settings.timeout, settings.tls_context)
        self._answered: deque[tuple[str, str]] = deque()  #: Name and uid.

    def sign(self, request: SignRequest) -> Issued | Pending:
        """Make the object, or find the one of an earlier try, and wait a little for its answer."""
        if request.validity < SHORTEST:
            found = f"{request.validity.total_seconds():.0f} s"
            text = f"kubernetes: wanted a validity of 10 minutes or more, found {found}"
            raise BackendRefusedError(text, hint="no API server takes a request for less: renewal.validity")
        body = _object(request, self._signer(request.spec))
        name = body["metadata"]["name"]
        answer = self._ask("POST", CSRS, body)
        if answer.status == HTTPStatus.CONFLICT:
            answer = self._ask("GET", path_of(name))
            there = object_of(answer.document, "spec")  # immutable; the server only adds the requester
            if answer.status == HTTPStatus.OK and any(there.get(key) != value for key, value in body["spec"].items()):
                hint = "another client made it; `kubectl describe csr` shows who: spec.username"
                raise BackendRefusedError(f"kubernetes: {name}: wanted our own request there, found another", hint=hint)
        if answer.status not in {HTTPStatus.OK, HTTPStatus.CREATED}:
            raise self._error(answer)
        return self._awaited(request, f"{name} {_metadata(answer.document, 'uid')}", answer)

    def collect(self, request: SignRequest, reference: str) -> Issued | Pending:
        """Look at the object again."""
        return self._awaited(request, reference, self._look(reference))

    def check(self, specs: Sequence[CertificateSpec]) -> dict[str, list[Violation]]:
        """Ask the API server for our rights, and compare usages with Kubernetes' signers; no API shows others."""
        rights = [missing for verb in ("create", "get") if (missing := self._missing_right(verb))]
        return {
            spec.name: wrong for spec in specs if (wrong := [*rights, *_signer_violations(spec, self._signer(spec))])
        }

    def check_whole(self, wanted: Sequence[PlannedCertificate]) -> dict[str, list[Violation]]:
        """Compare the validity with the API's limit, and the groups with those that it never accepts."""
        return {planned.spec.name: wrong for planned in wanted if (wrong := list(self._beyond_limits(planned)))}

    def _beyond_limits(self, planned: PlannedCertificate) -> Iterator[Violation]:
        if planned.validity < SHORTEST:
            yield Violation(subject="validity", want="10m or more", got=f"{planned.validity}")
        is_master = (O_OID, MASTERS) in attributes(planned.certificate.subject)
        if self._signer(planned.spec) == "kubernetes.io/kube-apiserver-client" and is_master:
            got = "it, which no API server takes for kubernetes.io/kube-apiserver-client"
            yield Violation(subject="O", want=f"no {MASTERS}", got=got)

    def advice(self, spec: CertificateSpec) -> str:
        """Name the signer."""
        setup = f"`ca-bridge setup kubernetes --authority {spec.authority.name}`"
        return f"look at who signs for {self._signer(spec)} there, and compare with what {setup} prints"

    def clock_ahead(self) -> timedelta | None:
        """How far the server's clock is ahead, by the header `Date` of its latest answer."""
        return self._http.clock_ahead

    def identity(self) -> str:
        """The user that the API server takes us for."""
        review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
        answer = self._ask("POST", SUBJECT_REVIEWS, review)
        if answer.status != HTTPStatus.CREATED:
            return ""  # older than 1.28, or not allowed
        user = object_of(object_of(answer.document, "status"), "userInfo").get("username")
        return one_line(user) if isinstance(user, str) else ""

    def credential_ends(self) -> list[CredentialEnd]:
        """When our token expires; a service account's token holds that itself."""
        settings, token = self._settings, self._settings.bearer()
        if token is None:
            return []
        if settings.kubeconfig is None:
            return [] if settings.token is None else list(token_end("token", settings.token, token))
        place = settings.access().token
        if not isinstance(place, Secret):
            place = Secret("file", str(settings.kubeconfig))
        return [replace(end, key="kubeconfig") for end in token_end("token", place, token)]

    def close(self) -> None:
        """Remove the objects that were answered, and close the connections."""
        self._remove_answered(most_left=0)
        super().close()

    def _look(self, reference: str) -> Answer:
        name, _, uid = reference.partition(" ")
        answer = self._ask("GET", path_of(name))
        found = _metadata(answer.document, "uid")
        is_removed = answer.status == HTTPStatus.NOT_FOUND and answer.document.get("kind") == "Status"
        if is_removed or found not in {"", uid}:
            hint = "without an answer it is removed after 24 hours, with one after an hour; the next run asks anew"
            raise BackendRefusedError(f"kubernetes: {one_line(name)}: wanted our request, found it removed", hint=hint)
        if answer.status != HTTPStatus.OK or not found:
            raise self._error(answer)
        return answer

    def _awaited(self, request: SignRequest, reference: str, answer: Answer) -> Issued | Pending:
        """Look at the object until it is approved and signed, or refused; pending when `wait` is over."""
        answers = itertools.chain([answer], iter(partial(self._look, reference), None))

        def look() -> Issued | Pending:
            document = next(answers).document
            return self._verdict(request, reference, document) or Pending(reference=reference, note=_note(document))

        pauses = (back_off_seconds(looks, _FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS) for looks in itertools.count())
        return wait_until(
            look, lambda answer: isinstance(answer, Issued), self._settings.wait, pause_seconds=lambda _: next(pauses)
        )

    def _verdict(self, request: SignRequest, reference: str, document: Mapping[str, Any]) -> Issued | None:
        """The certificate; None: not yet. It counts only without Denied and Failed, since the API allows all three."""
        name = reference.partition(" ")[0]
        conditions = _conditions(document)
        for kind in ("Denied", "Failed"):
            if kind in conditions:
                self._is_answered(reference)
                reason, message = (one_line(conditions[kind].get(key) or "") for key in ("reason", "message"))
                said = f": {': '.join(filter(None, [reason, message]))}" if reason or message else ""
                text = one_line(f"kubernetes: {name}: {kind.lower()}{said}")
                who = "the cluster's approver" if kind == "Denied" else "the signer"
                raise BackendRefusedError(text, hint=f"{who} says so; its log may say more")
        certificate = object_of(document, "status").get("certificate")
        if not certificate:
            return None
        self._is_answered(reference)
        return _issued(request, name, certificate)

    def _is_answered(self, reference: str) -> None:
        name, _, uid = reference.partition(" ")
        if self._settings.delete and (name, uid) not in self._answered:
            self._answered.append((name, uid))
            self._remove_answered(_MOST_ANSWERED)

    def _remove_answered(self, most_left: int) -> None:
        """Delete objects, whatever the answer: otherwise kube-controller-manager deletes them an hour later."""
        with contextlib.suppress(BackendError):
            while len(self._answered) > most_left:
                name, uid = self._answered.popleft()
                body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": uid}}
                self._ask("DELETE", path_of(name), body)

    def _missing_right(self, verb: str) -> Violation | None:
        attributes = {"group": "certificates.k8s.io", "resource": "certificatesigningrequests", "verb": verb}
        review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview"}
        answer = self._ask("POST", ACCESS_REVIEWS, {**review, "spec": {"resourceAttributes": attributes}})
        if answer.status != HTTPStatus.CREATED:
            raise self._error(answer)
        if object_of(answer.document, "status").get("allowed") is True:
            return None
        want = f"{verb} certificatesigningrequests"
        return Violation(subject="rights", want=want, got="no such right of the account")

    # --- the server ---------------------------------------------------------------------------------------------------

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Answer:
        """Send one request; any status is an answer, but after 401 read credential files again and send once more."""
        answer = self._send(method, path, body)
        if answer.status == HTTPStatus.UNAUTHORIZED:
            self._http.close()  # open connections keep showing their first client certificate
            answer = self._send(method, path, body)
        if answer.status == HTTPStatus.UNAUTHORIZED:
            raise self._error(answer)
        return answer

    def _error(self, answer: Answer) -> BackendError:
        """The error for an unwanted answer."""
        text = f"kubernetes: {self._url}: HTTP {answer.status}: {answer.text}"
        if "request is too large" in answer.text:  # etcd's word, in a 500
            return BackendRefusedError(text, hint="the CSR is too large for an object: fewer SANs")
        if answer.status in _LATER or answer.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return BackendUnavailableError(text, retry_after_seconds=answer.retry_after_seconds)
        kind = BackendRefusedError if answer.status in _VERDICTS else NoVerdictError
        return kind(text, hint=_HINTS.get(answer.status, "the API server's audit log may say more"))

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> Answer:
        with self._http.errors(self._url):
            token = self._settings.bearer()
        headers = {"Accept": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        answer = self._http.request(method, f"{self._url}{path}", self._url, headers=headers, json=body)
        later = retry_after_seconds(answer)
        document = json_object(answer.content.replace(token.encode(), "…".encode()) if token else answer.content)
        # anything but an object is not quoted: it may come from anywhere
        document = {"message": "no object in JSON"} if document is None else document
        return Answer(status=answer.status_code, document=document, retry_after_seconds=later)


def _object(request: SignRequest, signer: str) -> dict[str, Any]:
    """Build the object; the same request always gets the same name."""
    csr = request.csr
    # Encoded again, without text around the block or a second block.
    pem = csr.public_bytes(Encoding.PEM)
    seconds = min(int(request.validity.total_seconds()), _LONGEST_SECONDS)
    usages = ["digital signature"]
    if isinstance(csr.public_key(), rsa.RSAPublicKey):
        usages.append("key encipherment")
    usages += [_USAGES[eku] for eku in EKU if eku in request.spec.ekus]
    digest = hashlib.sha256("\n".join([signer, *usages, str(seconds)]).encode() + pem).hexdigest()
    return {
        "apiVersion": "certificates.k8s.io/v1",
        "kind": "CertificateSigningRequest",
        "metadata": {
            "name": f"ca-bridge-{request.spec.name}-{digest[:32]}",
            "labels": {"app.kubernetes.io/managed-by": "ca-bridge"},
        },
        "spec": {
            "request": base64.b64encode(pem).decode(),
            "signerName": signer,
            "usages": usages,
            "expirationSeconds": seconds,
        },
    }


def _signer_violations(spec: CertificateSpec, signer: str) -> list[Violation]:
    gives = _KUBERNETES_SIGNERS.get(signer)
    if gives is None or gives == spec.ekus:
        return []
    want, got = (", ".join(sorted(eku.label for eku in ekus)) for ekus in (spec.ekus, gives))
    return [Violation(subject=f"signer {signer}", want=f"one that gives {want}", got=f"one that gives {got}")]


def _issued(request: SignRequest, name: str, text: object) -> Issued:
    """The leaf, found by the CSR's key since the API allows any order, then the signer's other certificates."""
    hint = "the API stores what a signer writes; the signer's log may say more"
    try:
        certificates = load_pem_certificates(base64.b64decode(str(text), validate=True))
    except ValueError:
        text = f"kubernetes: {name}: wanted PEM certificates, found something else"
        raise BackendRefusedError(text, hint=hint) from None
    leaves = [certificate for certificate in certificates if is_for(certificate, request.csr)]
    if not leaves:
        text = f"kubernetes: {name}: wanted a certificate for the CSR's key, found another"
        raise BackendRefusedError(text, hint=hint)
    others = tuple(certificate for certificate in certificates if certificate not in leaves)
    return Issued(leaf=leaves[0], intermediates=others)


def _conditions(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The object's true conditions, by type (the API demands that the three that count here are true)."""
    listed = object_of(document, "status").get("conditions")
    conditions = [condition for condition in listed if isinstance(condition, dict)] if isinstance(listed, list) else []
    return {str(condition.get("type")): condition for condition in conditions if condition.get("status") == "True"}


def _note(document: Mapping[str, Any]) -> str:
    """Tell the operator who has to act next."""
    name, conditions = one_line(_metadata(document, "name")), _conditions(document)
    if "Approved" in conditions:
        signer = one_line(object_of(document, "spec").get("signerName"))
        return f"{name} is approved, and waits for the signer of {signer}"
    return f"waits for approval: kubectl certificate approve {name}"


def _metadata(document: Mapping[str, Any], key: str) -> str:
    return str(object_of(document, "metadata").get(key) or "")


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
            found = [cause for cause in causes if isinstance(cause, dict)]
            return one_line("; ".join(f"{one.get('field')}: {_last_clause(str(one.get('message')))}" for one in found))
        return one_line(_last_clause(str(self.document.get("message") or "no reason given")))


_LONG = 300


def _last_clause(text: str) -> str:
    """A short message as it is; the end of a long one, after the value that it quotes."""
    return text if len(text) <= _LONG else text.rpartition('": ')[2]


def path_of(name: str) -> str:
    """The URL path of one CertificateSigningRequest."""
    return f"{CSRS}/{quote(name, safe='')}"


_NOT_KUBERNETES = "is it a Kubernetes API server that answers at url?"
#: Statuses below 500 that may pass: a conflict, a version that is gone, time and rate.
_LATER = frozenset({408, 409, 410, 425, 429})
#: Statuses about the request itself; others are about our rights, or come from a proxy before the API server.
_VERDICTS = frozenset({413, 422})
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
