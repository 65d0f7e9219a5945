"""
The contract with a backend: what it must do, and what it may do.

A backend talks to its CA and does nothing else.
It never gets a private key of the node, writes no file on the node, and need not check the CA's answer:
`bridge.pki.verify` does that for every backend.

A method that asks the CA raises BackendRefusedError if the CA refuses or rejects our credentials, and
BackendUnavailableError if it does not answer; a docstring lists these errors only where they mean more.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from string import Formatter
from typing import Any, ClassVar, Literal, Self

from cryptography import x509

from bridge.errors import BackendError, SettingsProblem, VerificationError, Violation
from bridge.secret import GIVEN as GIVEN  # noqa: PLC0414 (backends import it from here)
from bridge.secret import Secret as Secret  # noqa: PLC0414
from bridge.secret import SecretUnavailableError as SecretUnavailableError  # noqa: PLC0414
from bridge.secret import leaves
from bridge.specs import DEFAULT_CLUSTER as DEFAULT_CLUSTER  # noqa: PLC0414
from bridge.specs import GATEWAY_SPECS, SPECS, USER, Authority, CertificateSpec, KeyAlgorithm

#: Entry-point group; each entry point is a class derived from `Backend`.
ENTRY_POINT_GROUP = "kubeadm_ca_bridge.backends"
USAGES = ("server", "client", "peer")
_PLAIN_NAME, _PLAIN_SAN = re.compile(r"[A-Za-z0-9._-]+"), re.compile(r"(?:[a-z]+://)?[A-Za-z0-9._/-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuity:
    """The node that asks, and its proof that it holds the key of the certificate it renews."""

    batch: str  #: ID that requests sent together share; 32 hex digits.
    node: str
    cluster: str
    proof: bytes | None  #: See `bridge.pki.signatures`; None: the old key can't be read.
    asked: datetime  #: Time of the request, in whole seconds, UTC.


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """The names of a certificate whose CSR carries none, such as a pod's."""

    common_name: str = ""  #: The whole subject is this CN; empty: an empty subject.
    uris: tuple[str, ...] = ()
    dns: tuple[str, ...] = ()

    @property
    def are_plain(self) -> bool:
        """Whether no character has a meaning in an openssl.cnf, or in a subject on openssl's command line."""
        is_plain = all(map(_PLAIN_SAN.fullmatch, (*self.uris, *self.dns)))
        return is_plain and (not self.common_name or _PLAIN_NAME.fullmatch(self.common_name) is not None)

    @property
    def openssl_sans(self) -> str:
        """A line for an openssl.cnf, critical below an empty subject (RFC 5280 §4.2.1.6); empty: there are no SANs."""
        sans = [*(f"URI:{uri}" for uri in self.uris), *(f"DNS:{dns}" for dns in self.dns)]
        critical = [] if self.common_name else ["critical"]
        return f"subjectAltName = {','.join([*critical, *sans])}\n" if sans else ""


@dataclass(frozen=True, kw_only=True)
class SignRequest:
    """A request to a CA for one certificate."""

    spec: CertificateSpec  #: The certificate's name, authority and EKUs; the CSR names no EKU.
    csr_pem: bytes  #: PKCS#10, one PEM block, with the subject and SANs of the new certificate.
    validity: timedelta  #: The validity to ask for; a CA may give less, down to the settings' `min_validity`.
    replaces: x509.Certificate | None = None
    continuity: Continuity | None = None  #: Only for a backend that `carries`.
    #: Only for a backend with `names_beside_csr`: the names to use instead of the CSR's; None: the CSR's.
    names: Names | None = None

    @cached_property
    def csr(self) -> x509.CertificateSigningRequest:
        """The CSR, parsed."""
        return x509.load_pem_x509_csr(self.csr_pem)


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """A CA's answer: the leaf and its intermediates; not verified yet."""

    leaf: x509.Certificate
    #: In the order of RFC 8446 §4.4.2 (each certifies the one before it), without the trust anchor;
    #: further certificates do no harm, since the bridge takes only those that it needs.
    intermediates: tuple[x509.Certificate, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """The CA has the request and will answer later; the backend must have `collect`."""

    reference: str  #: The backend's own reference, by which `collect` finds the request again; no secret.
    note: str = ""  #: For the operator, such as who has to act next.


#: What a CA may be able to do beside signing, by the method of `Backend` for it; see `Backend.can`.
Ability = Literal[
    "sign_many", "collect", "check", "issuers", "issuers_of", "identity", "close", "put_away", "recall",
    "revoke", "revoke_proven", "is_revoked", "revoked", "names_beside_csr", "setup", "candidates", "may_recall",
]  # fmt: skip


class Backend:
    """
    A way to have CSRs signed by one CA: a backend derives from it, and writes `settings_type`, `sign` (or `sign_many`),
    and what else its CA can do. An entry point in `ENTRY_POINT_GROUP` names the class.

    What a backend does not write has the default of this class: the CA can't do that, or doesn't show it.
    """

    #: A frozen dataclass derived from `BackendSettings`; its fields are the keys that the settings may have.
    settings_type: ClassVar[type[BackendSettings]]
    #: The CA gets the requested validity and never gives more; else a profile decides.
    asks_validity: ClassVar[bool] = False
    #: Each request names its node and proves it (`SignRequest.continuity`), since the way to the CA does not.
    #: Authorities with the same table and the same settings share one instance, which gets all their requests at once.
    carries: ClassVar[bool] = False
    #: `collect` and `candidates` return only answers that are proven to be the CA's own, which no other user can write.
    authenticated: bool = True

    @classmethod
    def can(cls, *abilities: Ability) -> bool:
        """Whether the class has one of these itself: an empty answer then means "none", else "this CA can't say"."""
        bases = cls.__mro__[: cls.__mro__.index(Backend)]
        return any(ability in vars(base) for base in bases for ability in abilities)

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        """
        Make the backend, without the network.

        Args:
            settings: An instance of `settings_type` that has no `problems`.

        Raises:
            SettingsError: A file that the settings name can't be used.
        """
        return cls(settings)  # type: ignore[call-arg]  # this class has no settings, each backend has

    # --- signing ------------------------------------------------------------------------------------------------------

    def sign(self, request: SignRequest) -> Issued | Pending:
        """
        Have the CA sign one CSR; by default as a batch of one.

        Several threads may call it at once. It does not retry: the bridge does, with the same CSR
        (a second certificate for one key is harmless, a lost key is not).

        Args:
            request: Its EKUs have to reach the CA by the CA's own means (a parameter, a profile, an
                extension section), because the CSR does not name them.

        Raises:
            BackendRefusedError: The CA refused; trying again cannot help.
            BackendUnavailableError: No answer, or "later"; trying again may help.
        """
        [answer] = self.sign_many([request])
        if isinstance(answer, BackendError):
            raise answer
        return answer

    def sign_many(self, requests: Sequence[SignRequest]) -> Sequence[Issued | Pending | BackendError]:
        """
        Have the CA sign a batch in one round trip or process; one bad CSR does not fail the others.

        Returns:
            One answer for each request, in the same order: a certificate, `Pending`, or a `BackendError`.

        Raises:
            BackendRefusedError: The CA refused the whole batch.
            BackendUnavailableError: The CA answered none of the requests.
        """
        raise NotImplementedError

    @property
    def names_beside_csr(self) -> bool:
        """The CA gets `SignRequest.names` beside the CSR; pods need this, since their CSR is empty."""
        return False

    # --- answers that come later --------------------------------------------------------------------------------------

    def collect(self, request: SignRequest, reference: str) -> Issued | Pending:
        """
        Return the CA's answer to a `Pending` request if there is one, else `Pending` again; in a later process.

        The key is safe on disk before the bridge asks a backend that can do this. After a crash the bridge may ask
        again with the same CSR and `continuity`; the backend should then not ask its CA twice.

        Args:
            request: The request as it was sent.
            reference: The reference of the latest `Pending`.

        Raises:
            BackendRefusedError: The CA refused, or no longer knows the request; the bridge stops asking for it.
            NoVerdictError: The CA can't be asked with this configuration; the request stays open.
            BackendUnavailableError: No answer from the CA itself.
        """
        raise NotImplementedError

    def candidates(self, request: SignRequest, reference: str) -> Sequence[Issued]:  # noqa: ARG002
        """
        Return all certificates that claim to be the answer to this request, the likeliest first, before `collect`.

        For answers that come from a directory that others can write to: a refusal or a wrong certificate ends a
        request only if answers are `authenticated`.

        Raises:
            BackendUnavailableError: The directory can't be read.
        """
        return ()

    def accepted(self, request: SignRequest, reference: str) -> None:
        """Note that a candidate passed verification, so that the request file may be removed. Never raises."""

    def put_away(self, reference: str) -> None:
        """
        Remove the requests of the latest `Pending` and their answers: each is installed, refused or cancelled.

        The bridge calls it after an installation or a cancellation; if that run was killed, the next run does.

        Raises:
            BackendUnavailableError: A file can't be removed; the bridge warns, and does not try again.
        """

    def recall(self, requests: Sequence[SignRequest], since: datetime) -> Sequence[Issued | None]:  # noqa: ARG002
        """
        Find certificates with exactly these keys and usages, signed for a run that was killed before the answer.

        Args:
            requests: The requests as they were sent.
            since: Older certificates are skipped; an aware datetime.

        Returns:
            One answer for each request, in the same order; None: the bridge asks for it again.
        """
        return [None] * len(requests)

    def may_recall(self) -> bool:
        """Whether `recall` finds every certificate that was signed for us; it may need a right at the CA."""
        return self.can("recall")

    # --- what the CA shows, without spending a signature --------------------------------------------------------------

    def check(self, specs: Sequence[CertificateSpec]) -> Mapping[str, Sequence[Violation]]:  # noqa: ARG002
        """
        Ask the CA for the profile, role or section that would sign each certificate: does `sign` give the right usages?

        Returns:
            The violations by certificate name, without names that have none.
            A profile or role that the CA does not show counts as no violation.
        """
        return {}

    def check_whole(self, wanted: Sequence[PlannedCertificate]) -> Mapping[str, Sequence[Violation]]:  # noqa: ARG002
        """
        Compare names, groups, SANs, kinds of keys and lifetimes with the profile, role or section that would sign.

        For `ca-bridge doctor`, after `check`, whose findings it need not repeat.
        """
        return {}

    def advice(self, spec: CertificateSpec) -> str:  # noqa: ARG002
        """
        Name the role, profile or section that signs it, and what it should hold, for an error's hint; asks no CA.

        Example: compare role kubeadm-apiserver of pki with what `ca-bridge setup vault --authority ca` prints.
        """
        return VerificationError.hint

    def issuers(self) -> Sequence[x509.Certificate]:
        """
        Return the CA's signing certificate, then its chain as far as the CA shows it; empty: this CA shows none.

        Raises:
            BackendRefusedError: The CA rejects our credentials, or has no certificate.
        """
        return ()

    def issuers_of(self, authority: str) -> Sequence[x509.Certificate]:  # noqa: ARG002
        """Do as `issuers` for one authority, such as `etcd-ca`, of those that share this backend."""
        return self.issuers()

    def clock_ahead(self) -> timedelta | None:
        """
        Return how far the CA's clock was ahead of ours at its latest answer (RFC 9110 §6.6.1), negative if behind.

        The bridge calls it after another request; it sends none itself. None: no answer had a date.
        """
        return None

    def identity(self) -> str:
        """
        Return our name in the CA's own log, such as that of a role or client certificate; never a credential.

        The bridge calls it after `check`, for the audit log. Empty: the CA does not say.
        """
        return ""

    def spends(self) -> str:
        """Name the credential that `check` and `identity` would use up, such as a wrapping token; empty: none."""
        return ""

    def credential_ends(self) -> Sequence[CredentialEnd]:
        """Return the expiry times that we may read of our tokens and other secrets, but for those renewed elsewhere."""
        return ()

    # --- revoking -----------------------------------------------------------------------------------------------------

    def revoke(self, certificate: x509.Certificate) -> None:
        """
        Have the CA revoke one of its certificates (RFC 5280 §5.3.1, reason `superseded`), if it is not revoked already.

        Raises:
            BackendRefusedError: The CA refused, or does not know the certificate.
        """
        raise NotImplementedError

    def revoke_proven(self, revocation: Revocation) -> None:
        """Do as `revoke` where requests are carried, with a proof of which node asks; a policy may refuse it."""
        raise NotImplementedError

    def is_revoked(self, certificate: x509.Certificate) -> bool:  # noqa: ARG002
        """
        Look a certificate of this CA up by its serial number.

        Returns:
            True if the CA has it as revoked; False also for a certificate that the CA does not know.

        Raises:
            BackendRefusedError: The CA rejects our credentials, or can't say.
        """
        return False

    def revoked(self) -> Collection[int] | None:
        """
        List the serial numbers of all certificates that this CA has revoked.

        Returns:
            None: the CA does not list them for us, so the bridge looks up each one.
        """
        return None

    # --- beginning and end --------------------------------------------------------------------------------------------

    @classmethod
    def setup(cls, wanted: SetupRequest) -> Sequence[SetupFile]:
        """
        Write commented roles, profiles, configuration or commands for the CA's administrator, without the network.

        `ca-bridge setup TYPE` prints them, or writes them into a directory, with the names and paths of the settings.

        Raises:
            BridgeError: Such a CA can't sign a certificate; the message says which and why.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Close connections and release what is held, such as tokens; never raises for a CA that can't be reached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedCertificate:
    """A certificate as a renewal would ask for it, without a key and a CSR."""

    spec: CertificateSpec
    certificate: x509.Certificate  #: The live certificate, whose subject and SANs the renewal asks for again.
    key: KeyAlgorithm  #: Algorithm of the new key.
    validity: timedelta  #: The validity to ask for.
    at_least: timedelta  #: The shortest lifetime that the bridge would accept.
    #: (OID, value) of subject attributes that this CA may add or leave out (`allow_extra_subject`).
    extra_subject: frozenset[tuple[str, str]] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class CredentialEnd:
    """When a credential of a backend expires."""

    key: str  #: The settings key relative to the backend's table, such as `auth.token_file`.
    ends: datetime
    begins: datetime | None = None  #: None: the CA does not say.
    file: Path | None = None  #: The file that holds the credential.


@dataclass(frozen=True, slots=True, kw_only=True)
class Revocation:
    """A superseded certificate to revoke, and the proof that the holder of its successor asks for it."""

    name: str  #: kubeadm's name for the certificate.
    certificate: x509.Certificate
    successor: x509.Certificate  #: Its replacement, live and seen in use.
    proof: bytes  #: Made with the successor's key; see `bridge.pki.node_proofs`.


@dataclass(frozen=True, slots=True, kw_only=True)
class NamePatterns:
    """The names that one kind of certificate may have beside an empty CSR; `*` is any text, `?` any one character."""

    spec: CertificateSpec
    longest: timedelta
    uris: tuple[str, ...] = ()
    dns: tuple[str, ...] = ()
    common_names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SetupRequest:
    """What `ca-bridge setup TYPE` knows about one authority."""

    authority: Authority
    #: The authority's live certificates by kubeadm's name; empty only if there are `patterns`.
    certificates: Mapping[str, x509.Certificate]
    validity: timedelta  #: The validity to ask for (`renewal.validity`).
    node: str  #: `node.name`.
    cluster: str  #: `node.cluster`.
    #: This authority's settings, by field of `settings_type`; required fields may be missing.
    settings: Mapping[str, Any]
    #: For certificates whose names travel beside the CSR; only a backend with `names_beside_csr` gets them.
    patterns: Sequence[NamePatterns] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SetupFile:
    """One text for the CA's administrator."""

    name: str  #: A file name without a directory, such as `ca.cnf`; unique among the authority's files.
    text: str
    executable: bool = False  #: A script.
    alone: bool = False  #: Nothing may follow it in the same stream.
    by_node: bool = False  #: Each node has its own file, and applying one undoes nothing of another node's.


@dataclass(frozen=True, kw_only=True)
class BackendSettings:
    """
    The keys that every backend has; a backend's own settings are a frozen dataclass derived from this one.

    The bridge reads the settings file into it strictly, by the types of its fields: `str`, `bool`, `int`,
    `Path` (absolute), `timedelta` ("30s", "12h", "365d"), `Literal[...]`, `Secret`, `dict[str, str]`, another
    dataclass for a table, and any of these `| None`. A field without a default is required.
    """

    #: `node.name`, which the bridge fills in; no key of the backend's table.
    node: str = field(default="", metadata={GIVEN: True})
    #: The names of the node's further pairs, which the bridge fills in.
    pairs: tuple[str, ...] = field(default=(), metadata={GIVEN: True})
    #: Time limit for one request or process; a process that signs several certificates may take longer.
    timeout: timedelta = timedelta(seconds=30)
    retry_for: timedelta = timedelta(minutes=2)  #: How long to keep trying a CA that is unavailable.

    def writes(self) -> Sequence[Path]:
        """Directories on this machine that the backend writes to, for the sandbox of a systemd unit."""
        return ()

    def programs(self) -> Sequence[str]:
        """Programs that the backend runs, by path or name, for `ca-bridge settings check`."""
        return ()

    def private_files(self) -> Iterator[Path]:
        """
        Files in these settings that only their owner may read, for `ca-bridge doctor`, which opens none of them.

        By default the files of secrets, and paths in fields whose names end with `key`; a backend adds its others.
        """
        for key, value in leaves(self):
            if isinstance(value, Secret) and value.kind == "file" and "{" not in value.where:
                yield Path(value.where)
            elif isinstance(value, Path) and key.endswith("key"):
                yield value

    def credentials(self) -> Iterator[tuple[str, Path]]:
        """
        Certificate files that the backend logs in with, each with its settings key relative to the backend's table.

        By default the paths in fields whose names end with `client_cert`; a backend adds its others. A file may also
        be a kubeconfig. None is opened.
        """
        for key, value in leaves(self):
            if isinstance(value, Path) and key.endswith("client_cert"):
                yield key, value

    def problems(self) -> Iterator[SettingsProblem]:
        """
        Find problems that types alone can't show, such as keys that exclude each other.

        Yields:
            Problems with a key relative to the backend's table, such as `auth.method`.
        """
        yield from ()


@dataclass(frozen=True, slots=True)
class Selector:
    """
    Chooses the role or profile that signs a certificate: a pattern, and exceptions to it.

    The pattern may hold `{name}` (the certificate's name, dots and all), `{usage}` (`server`, `client`
    or `peer`) and `{node}` (`node.name`); an exception is named by certificate, or else by usage class.
    """

    pattern: str
    exceptions: Mapping[str, str] = field(default_factory=dict)
    node: str = ""

    def __call__(self, spec: CertificateSpec) -> str:
        """Return the role's or profile's name."""
        for key in (spec.name, spec.usage):
            if key in self.exceptions:
                return self.exceptions[key]
        return self.pattern.format(name=spec.name, usage=spec.usage, node=self.node)

    def problems(self, key: str, exceptions_key: str, pairs: Sequence[str] = ()) -> Iterator[SettingsProblem]:
        """Problems of the pattern (settings key `key`) and its exceptions (`exceptions_key`; they may name `pairs`)."""
        try:
            fields = {name for _, name, _, _ in Formatter().parse(self.pattern) if name is not None}
        except ValueError:
            fields = {self.pattern}
        if not fields <= {"name", "usage", "node"}:
            yield SettingsProblem(key, "a text that may hold {name}, {usage} and {node}", repr(self.pattern))
        for name in self.exceptions:
            if name not in {*SPECS, *GATEWAY_SPECS, USER.name, *USAGES, *pairs}:
                wanted = f"a certificate's name or one of {', '.join(USAGES)}"
                yield SettingsProblem(f"{exceptions_key}.{name}", wanted, repr(name))
