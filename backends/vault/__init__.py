"""
HashiCorp Vault and OpenBao: the PKI secrets engine signs, by roles or (if set) verbatim.

Measured with OpenBao 2.7; the API is https://openbao.org/api-docs/secret/pki/ and, mostly the same,
https://developer.hashicorp.com/vault/api-docs/secret/pki.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from http import HTTPStatus
from threading import Lock
from urllib.parse import quote

from cryptography import x509
from hvac import Client

from backends.http import OverHttp, listed
from backends.vault import setup as vault_setup
from backends.vault.server import Answer, Tokens, identity_text, log, texts
from backends.vault.settings import VaultSettings, role_selector
from bridge.contract import CredentialEnd, Issued, Names, PlannedCertificate, SignRequest
from bridge.errors import BackendRefusedError, LocalFileError, Violation
from bridge.pki import certificates
from bridge.specs import EKU, PODS, USER, CertificateSpec
from bridge.system.waiting import workers
from bridge.words import one_line

#: How many of the server's warnings about one certificate we log; usually there are one or two.
_MOST_WARNINGS = 5
#: The longest list of certificates that we ask for: a longer one would exceed the size limit of an answer.
_MOST_LISTED = 10_000
_NUMBER = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){0,20}")
#: How many certificates to read at the same time, and how long before it was signed a certificate may begin.
_READ_AT_ONCE, _BACKDATED = 4, timedelta(hours=1)
#: How much further back certificates are cached, so that a slightly older request does not read all again.
_FURTHER = timedelta(days=1)
#: What `key_and_usages` returns.
_Kind = tuple[bytes, frozenset[str] | None]


class VaultBackend(OverHttp):
    """Has certificates signed by a PKI secrets engine."""

    settings_type = VaultSettings
    setup = staticmethod(vault_setup.setup)
    asks_validity = True

    def __init__(self, settings: VaultSettings) -> None:
        self._settings = settings
        self._plain_mount = settings.mount.strip("/")
        self._mount = quote(self._plain_mount)  # as the beginning of a path
        self._tokens = Tokens.of(self, settings)
        self._server = self._tokens.server
        self._http = self._server.http
        self._unstored: dict[str, bool] = {}  #: Whether its role has `no_store`, by certificate; `check` fills it.
        #: Stored certificates by number since that time, as `recall` has read them; None: older, or unreadable.
        self._read_since: datetime | None = None
        self._read: dict[str, tuple[_Kind, x509.Certificate] | None] = {}
        self._reading = Lock()  # for both
        self._tells_that_it_may_not = True

    def sign(self, request: SignRequest) -> Issued:
        """Have one CSR signed; see `bridge.contract.Backend.sign`."""
        path, body = self._wanted(request)
        # not by hvac's `sign_certificate`, which always sends a common_name, nor by `sign_verbatim`: neither takes an issuer
        return self._accepted(request, self._ask(lambda client: client.write_data(path, data=body)))

    def _wanted(self, request: SignRequest) -> tuple[str, dict[str, object]]:
        """Path and body, with no more parameters than needed: a policy may list the allowed ones."""
        path = self._sign_path(self._role(request.spec))
        body = {"csr": request.csr_pem.decode("ascii"), "ttl": f"{int(request.validity.total_seconds())}s"}
        if self._settings.mode == "sign":
            # Without it a CN that looks like a host name becomes one more DNS SAN; a role can't forbid that.
            return path, body | {"exclude_cn_from_sans": True} | _beside(request.names)
        # The default is no EKU, and keyAgreement. keyEncipherment also for ECDSA keys, as in kubeadm.
        usages = [_EKU_NAMES[eku] for eku in EKU if eku in request.spec.ekus]
        return path, body | {"key_usage": list(_KEY_USAGE), "ext_key_usage": usages}

    def _accepted(self, request: SignRequest, answer: Answer) -> Issued:
        answer.or_raise()
        for warning in texts(answer.body.get("warnings"))[:_MOST_WARNINGS]:
            # Such as a lifetime that was cut to the mount's maximum, which the server does not call an error.
            log.warning("%s: %s", request.spec.name, self._server.presentable(warning))
        if answer.body.get("lease_id"):
            self._tokens.leased = True
            log.warning(
                "%s: the role has generate_lease: the certificate is revoked when the token that signed it ends",
                request.spec.name,
            )
        return _issued(answer)

    def check(self, specs: Sequence[CertificateSpec]) -> dict[str, list[Violation]]:
        """Log in, check the token's rights on the paths, and check the roles that the token may read."""
        paths = [self._sign_path(self._role(spec)) for spec in specs]
        answer = self._ask(lambda client: client.sys.get_capabilities(sorted(set(paths))))
        rights = {} if answer.forbidden else answer.or_raise().data
        return {spec.name: wrong for spec in specs if (wrong := self._violations(spec, rights))}

    def check_whole(self, wanted: Sequence[PlannedCertificate]) -> dict[str, list[Violation]]:
        """Compare each role that the token may read with its certificate; `sign-verbatim` has no roles."""
        if self._settings.mode != "sign":
            return {}
        return {planned.spec.name: wrong for planned in wanted if (wrong := list(self._unlike(planned)))}

    def _unlike(self, planned: PlannedCertificate) -> Iterator[Violation]:
        role = self._role(planned.spec)
        looked = self._read_role(role)
        for wrong in (*vault_setup.unlike(looked, planned), *self._another_issuer(looked)) if looked else ():
            yield replace(wrong, subject=f"role {role} of {self._plain_mount}: {wrong.subject}")

    def _another_issuer(self, role: Mapping[str, object]) -> Iterator[Violation]:
        """Find a role whose issuer is not the mount's default one, which `issuers` returns."""
        reference = role.get("issuer_ref")
        if self._settings.issuer is not None or not isinstance(reference, str) or reference in {"", "default"}:
            return
        if self._issuers(reference)[:1] != self.issuers()[:1]:
            want = "the mount's default issuer, or the role's in the settings (`issuer`)"
            yield Violation(subject="issuer_ref", want=want, got=one_line(reference))

    def advice(self, spec: CertificateSpec) -> str:
        """Name the role, or in mode `sign-verbatim` the engine."""
        mount = self._plain_mount
        setup = (
            "`ca-bridge help users`" if spec == USER else f"`ca-bridge setup vault --authority {spec.authority.name}`"
        )
        if self._settings.mode != "sign":
            return f"see what sign-verbatim of {mount} makes of it, and the policy that {setup} prints"
        return f"compare role {self._role(spec)} of {mount}, and the token's policy, with what {setup} prints"

    def clock_ahead(self) -> timedelta | None:
        """How far the server's clock is ahead, by the header `Date` of its latest answer."""
        return self._http.clock_ahead

    def issuers(self) -> list[x509.Certificate]:
        """The settings' issuer or the mount's default one, with its chain; needs no token, and reads no role."""
        return self._issuers(self._settings.issuer)

    def _issuers(self, issuer: str | None) -> list[x509.Certificate]:
        # not by hvac's `read_issuer`, whose path needs a token
        path = f"issuer/{quote(issuer, safe='')}/json" if issuer else "cert/ca_chain"
        answer: Answer = self._server.anonymous.read(f"{self._mount}/{path}").or_raise()
        pem = [*texts(answer.data.get("certificate")), *texts(answer.data.get("ca_chain"))]
        return list(dict.fromkeys(_certificates(pem, answer.where)))

    def revoke(self, certificate: x509.Certificate) -> None:
        """Revoke a certificate of this mount's CA, stored or not; the token needs `update` on the mount's `revoke`."""
        # not by hvac's `revoke_certificate`, which sends the number alone: a mount that stores nothing does not know it
        path, body = f"{self._mount}/revoke", {"certificate": certificates.pem(certificate).decode("ascii")}
        self._ask(lambda client: client.write_data(path, data=body)).or_raise()

    def is_revoked(self, certificate: x509.Certificate) -> bool:
        """Look a certificate up by its serial number, without a token; False also if the mount did not store it."""
        number = "-".join(re.findall("..", certificates.serial_hex(certificate).lower()))
        answer = self._certificate(number)
        if answer.status == HTTPStatus.NOT_FOUND and not answer.reasons:
            return False
        return bool(answer.or_raise().data.get("revocation_time"))

    def revoked(self) -> frozenset[int] | None:
        """All revoked serial numbers; None: the token lacks `list` on `certs/revoked`, or there are too many."""
        numbers = self._listed("certs/revoked")
        return None if numbers is None else frozenset(int(number.replace(":", ""), 16) for number in numbers)

    def may_recall(self) -> bool:
        """Whether the token may list `certs`, there are not too many, and no role that `check` read has `no_store`."""
        return not any(self._unstored.values()) and self._listed("certs") is not None

    def recall(self, requests: Sequence[SignRequest], since: datetime) -> list[Issued | None]:
        """Search the certificates that the mount has stored, the newest first, for those of the first of `issuers`."""
        signers, leaves = self.issuers(), dict[_Kind, x509.Certificate]()
        wanted = [certificates.asked_key_and_usages(request.csr_pem, request.spec.ekus) for request in requests]
        for kind, leaf in sorted(self._stored(since), key=lambda entry: entry[1].not_valid_before_utc, reverse=True):
            is_wanted = kind in wanted and kind not in leaves and certificates.is_signed_by(leaf, signers[0])
            if is_wanted and not self.is_revoked(leaf):  # an operator may revoke a certificate that no node got
                leaves[kind] = leaf
        answers = [leaves.get(kind) for kind in wanted]
        return [Issued(leaf=leaf, intermediates=tuple(signers)) if leaf is not None else None for leaf in answers]

    def _stored(self, since: datetime) -> list[tuple[_Kind, x509.Certificate]]:
        """The mount's certificates that are not older than `since`; each is read once."""
        numbers = self._listed("certs")
        if numbers is None:
            text = "a request of a killed run may be signed twice: the token lacks `list` on %s/certs, or there are more than %d"
            level = logging.WARNING if self._tells_that_it_may_not else logging.DEBUG
            log.log(level, text, self._plain_mount, _MOST_LISTED)
            self._tells_that_it_may_not = False
            return []
        oldest = since - _BACKDATED
        with self._reading:
            if self._read_since is None or oldest < self._read_since:
                self._read_since, self._read = oldest - _FURTHER, {}
            limit, known = self._read_since, self._read
            for number in known.keys() - set(numbers):
                del known[number]
            new = [number for number in numbers if number not in known]
            with workers(_READ_AT_ONCE) as pool:  # what was read before an error is not read again
                known.update(zip(new, pool.map(lambda number: self._read_one(number, limit), new), strict=True))
            return [entry for entry in known.values() if entry is not None and entry[1].not_valid_before_utc >= oldest]

    def _read_one(self, number: str, oldest: datetime) -> tuple[_Kind, x509.Certificate] | None:
        answer = self._certificate(number.replace(":", "-"))
        if answer.status == HTTPStatus.NOT_FOUND:  # `tidy` has removed it
            return None
        pem = texts(answer.or_raise().data.get("certificate"))
        if not pem:
            raise BackendRefusedError(f"vault: {answer.where}: the answer has no certificate")
        with contextlib.suppress(*certificates.UNREADABLE):  # one that can't be read is not ours
            [leaf] = certificates.load_pem_certificates("\n".join(pem).encode())
            return (certificates.key_and_usages(leaf), leaf) if leaf.not_valid_before_utc >= oldest else None
        return None

    def _certificate(self, number: str) -> Answer:
        """Read a stored certificate, for which no token is needed."""
        answer: Answer = self._server.anonymous.secrets.pki.read_certificate(number, mount_point=self._plain_mount)
        return answer

    def _listed(self, which: str) -> list[str] | None:
        """The serial numbers of certificates; None: the token may not list them, or there are too many."""
        path, params = f"/v1/{self._mount}/{which}", {"list": "true", "limit": str(_MOST_LISTED + 1)}
        try:
            answer = self._ask(lambda client: client.adapter.get(path, params=params))  # hvac's lists have no limit
            if answer.status == HTTPStatus.NOT_FOUND and not answer.reasons:  # the mount never had one
                return []
            numbers = texts(answer.or_raise().data.get("keys"))
        except LocalFileError:
            raise
        except BackendRefusedError:
            return None
        numbers = [number.replace("-", ":") for number in numbers]
        return numbers if len(numbers) <= _MOST_LISTED and all(map(_NUMBER.fullmatch, numbers)) else None

    def identity(self) -> str:
        """The login's role or user and its entity; for a given token, what it may see of itself."""
        client = self._tokens.get()
        if self._tokens.identity is None:
            answer: Answer = client.auth.token.lookup_self()
            if answer.forbidden:  # the policy `default`, which allows it, may be left out
                return ""
            looked = answer.or_raise().data
            self._tokens.identity = identity_text("token", {"display_name": looked.get("display_name")}, looked)
        return self._server.presentable(self._tokens.identity)

    def credential_ends(self) -> list[CredentialEnd]:
        """Look up the given token or the secret id, as far as its policy allows; a JWT has the time in itself."""
        return self._tokens.ends()

    def close(self) -> None:
        """Leave the login, which other backends may still use; an unreachable server is only logged."""
        self._tokens.leave(self)

    def spends(self) -> str:
        """Name the wrapping token, which opens only once."""
        return f"the wrapping token in {self._settings.auth.secret_id}" if self._settings.auth.wrapped else ""

    def _ask(self, question: Callable[[Client], Answer]) -> Answer:
        """Ask with the token; if the server no longer accepts it, ask once more with another."""
        client = self._tokens.get()
        answer = question(client)
        if not answer.token_rejected:
            return answer
        try:
            other = self._tokens.get(rejected=client)
        except BackendRefusedError as e:
            raise BackendRefusedError(f"{answer.error()}; a new login failed: {e}", hint=e.hint) from e
        return answer if other.token == client.token else question(other)

    def _role(self, spec: CertificateSpec) -> str:
        return role_selector(self._settings.role, self._settings.roles, self._settings.node)(spec)

    def _sign_path(self, role: str) -> str:
        settings = self._settings
        prefix = f"issuer/{quote(settings.issuer, safe='')}/" if settings.issuer else ""
        last = f"/{quote(role, safe='')}" if settings.mode == "sign" else ""
        return f"{self._mount}/{prefix}{settings.mode}{last}"

    @property
    def names_beside_csr(self) -> bool:
        """Mode `sign-verbatim` ignores `uri_sans`, and signs an empty CSR without any names (OpenBao 2.7)."""
        return self._settings.mode == "sign"

    def _violations(self, spec: CertificateSpec, rights: Mapping[str, object]) -> list[Violation]:
        """A missing right, a missing role, or what the role gets wrong."""
        role = self._role(spec)
        path = self._sign_path(role)
        got = texts(rights.get(path, "update"))
        if not {"update", "root"}.intersection(got):
            return [Violation(subject="policy", want=f"update on {path}", got=", ".join(got))]
        looked = self._read_role(role) if self._settings.mode == "sign" else None
        if looked == {}:
            return [Violation(subject="role", want=role, got="no role of this name")]
        self._unstored[spec.name] = looked is not None and looked.get("no_store") is True
        return list(role_violations(looked, spec)) if looked is not None else []

    def _read_role(self, name: str) -> Mapping[str, object] | None:
        """The role; empty: no such role; None: no right to read it."""
        answer = self._ask(lambda client: client.secrets.pki.read_role(name, mount_point=self._plain_mount))
        if answer.forbidden:
            return None
        if answer.status == HTTPStatus.NOT_FOUND and not answer.reasons:
            return {}
        return answer.or_raise().data


#: The engine's names (Go's, without their prefix).
_EKU_NAMES = {EKU.SERVER_AUTH: "ServerAuth", EKU.CLIENT_AUTH: "ClientAuth"}
_KEY_USAGE = ("DigitalSignature", "KeyEncipherment")
_EKU_FLAGS = {
    "server_flag": EKU.SERVER_AUTH.label,
    "client_flag": EKU.CLIENT_AUTH.label,
    "code_signing_flag": "codeSigning",
    "email_protection_flag": "emailProtection",
}


#: Flags of a role about names, the value that a certificate needs, and for which certificates: those of pods, whose
#: CSRs have no names, and others, of which only those of servers have SANs for sure.
_POD_FLAGS = {"use_csr_common_name": False, "use_csr_sans": False, "require_cn": False}
_FLAGS = {"use_csr_common_name": True}
_SERVER_FLAGS = {**_FLAGS, "use_csr_sans": True}


def role_violations(role: Mapping[str, object], spec: CertificateSpec) -> Iterator[Violation]:
    """Usages and SANs that a role, as the server shows it, would get wrong; see `setup.unlike` for the rest."""
    want, got = {eku.label for eku in spec.ekus}, _role_ekus(role)
    if got != want:
        yield Violation(subject="EKU", want=listed(want), got=listed(got))
    usages = {usage.lower() for usage in texts(role.get("key_usage"))}
    needed = {usage.lower() for usage in (_KEY_USAGE[:1] if spec.authority == PODS else _KEY_USAGE)}
    if not needed <= usages or usages & {"certsign", "crlsign"}:
        yield Violation(subject="key_usage", want=listed(_KEY_USAGE), got=listed(texts(role.get("key_usage"))))
    flags = _SERVER_FLAGS if EKU.SERVER_AUTH in spec.ekus else _FLAGS
    because = ""
    if spec.authority == PODS:
        flags, because = _POD_FLAGS, ", since a pod's CSR has no names"
    for key, value in flags.items():
        if role.get(key) is (not value):
            yield Violation(subject=key, want=f"{str(value).lower()}{because}", got=str(not value).lower())


def _role_ekus(role: Mapping[str, object]) -> set[str]:
    """The EKUs of a role, as labels of ours or in its own words; flags and names add up."""
    labels = {name.lower(): eku.label for eku, name in _EKU_NAMES.items()} | {eku.value: eku.label for eku in EKU}
    named = [*texts(role.get("ext_key_usage")), *texts(role.get("ext_key_usage_oids"))]
    flagged = {label for flag, label in _EKU_FLAGS.items() if role.get(flag)}
    return flagged | {labels.get(name.lower(), name) for name in named}


def _beside(names: Names | None) -> dict[str, object]:
    """The parameters for names that the CSR does not have, without empty ones."""
    if names is None:
        return {}
    texts_of = {"common_name": names.common_name, "uri_sans": ",".join(names.uris), "alt_names": ",".join(names.dns)}
    return {key: text for key, text in texts_of.items() if text}


def _issued(answer: Answer) -> Issued:
    """The one leaf of an answer and the issuers' certificates beside it."""
    leaves = _certificates(texts(answer.data.get("certificate")), answer.where)
    if len(leaves) != 1:
        raise BackendRefusedError(f"vault: {answer.where}: wanted one certificate, found {len(leaves)}")
    # Vault leaves the chain out where the issuer is a root.
    chain = texts(answer.data.get("ca_chain")) or texts(answer.data.get("issuing_ca"))
    return Issued(leaf=leaves[0], intermediates=tuple(_certificates(chain, answer.where)) if chain else ())


def _certificates(pem: Sequence[str], where: str) -> list[x509.Certificate]:
    try:
        return certificates.load_pem_certificates("\n".join(pem).encode())
    except ValueError:
        text = f"vault: {where}: wanted a certificate in PEM, found something else"
        raise BackendRefusedError(text, hint="is there a Vault or OpenBao PKI engine behind this URL?") from None
