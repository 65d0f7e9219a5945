"""
The contract with a backend: what a way to a CA must do, and what it may do.

A backend talks to its CA and does nothing else.
It is never given a private key of the node, writes no file on the node, and need not check what came
back: `bridge.pki.verify` does that, for all backends alike.

A method that asks the CA raises a BackendRefusedError where the CA says no or does not accept us, and a
BackendUnavailableError where it does not answer; a docstring has these errors only where they mean more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from string import Formatter
from typing import Any, ClassVar, Protocol, runtime_checkable

from cryptography import x509

from bridge.errors import BackendError, SettingsProblem, Violation
from bridge.secret import GIVEN as GIVEN  # noqa: PLC0414 (backends import it from here)
from bridge.secret import Secret as Secret  # noqa: PLC0414
from bridge.secret import SecretUnavailableError as SecretUnavailableError  # noqa: PLC0414
from bridge.secret import leaves
from bridge.specs import DEFAULT_CLUSTER as DEFAULT_CLUSTER  # noqa: PLC0414
from bridge.specs import GATEWAY_SPECS, SPECS, USER, Authority, CertificateSpec, KeyAlgorithm

#: Entry-point group; each entry point is a `BackendType`.
ENTRY_POINT_GROUP = "kubeadm_ca_bridge.backends"
USAGES = ("server", "client", "peer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuity:
    """Who asks, and the proof that it is the holder of the certificate that is being renewed."""

    batch: str  #: Of the requests that are sent together; 32 hex digits.
    node: str
    cluster: str
    proof: bytes | None  #: See `bridge.pki.signatures`; None: the old key can't be read.
    #: When, in whole seconds, UTC; None: an earlier version of the program asked, whose proof covers no time.
    asked: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """The names of a certificate whose CSR has none, as a pod's has."""

    common_name: str = ""  #: The subject is this CN and nothing else; empty: the subject is empty, too.
    uris: tuple[str, ...] = ()
    dns: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SignRequest:
    """One certificate that a CA is asked for."""

    spec: CertificateSpec  #: Its name, authority and EKUs; the CSR names no EKU.
    csr_pem: bytes  #: PKCS#10, one PEM block; subject and SANs are those of the certificate to come.
    validity: timedelta  #: Wanted; a CA may give less, down to the settings' `min_validity`.
    replaces: x509.Certificate | None = None
    continuity: Continuity | None = None  #: Only for a backend that `Carries` requests to people.
    #: Only for a backend with `NamesBesideCsr`: these names, and none of the CSR's; None: those of the CSR.
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
    #: further certificates do no harm, the bridge takes those that it needs.
    intermediates: tuple[x509.Certificate, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """The CA has the request, and answers later; the backend must be able to `collect`."""

    reference: str  #: The backend's own, with which `collect` finds the request again; no secret.
    note: str = ""  #: For the operator, such as whose turn it is.


class Backend(Protocol):
    """A way to have CSRs signed by one CA."""

    def sign(self, request: SignRequest) -> Issued | Pending:
        """
        Have the CA sign one CSR.

        May be called from several threads at once. It does not retry: the bridge does, with the same CSR
        (a second certificate for one key is harmless, a lost key is not).

        Args:
            request: Its EKUs have to reach the CA by the CA's own means (a parameter, a profile, an
                extension section), because the CSR does not name them.

        Raises:
            BackendRefusedError: The CA said no; trying again cannot help.
            BackendUnavailableError: No answer, or "later"; trying again may help.
        """


@runtime_checkable
class SignsMany(Protocol):
    """Optional: sign a batch in one round trip or process."""

    def sign_many(self, requests: Sequence[SignRequest]) -> Sequence[Issued | Pending | BackendError]:
        """
        Have the CA sign all; one bad CSR among them fails alone.

        Returns:
            One answer a request, in their order: a certificate, `Pending`, or the `BackendError` for that one.

        Raises:
            BackendRefusedError: For all of them.
            BackendUnavailableError: For all of them.
        """


@runtime_checkable
class SignsSideBySide(Protocol):
    """Optional: sign several at the same time, each by a request of its own, without a thread for each."""

    def sign_side_by_side(self, requests: Sequence[SignRequest]) -> Sequence[Issued | Pending | BackendError]:
        """
        Have the CA sign all; what goes wrong with one of them is that one's answer.

        Returns:
            One answer a request, in their order, as `sign` has it or raises it.
        """


@runtime_checkable
class Collects(Protocol):
    """
    Optional: ask for the answer to a request that was `Pending`, in a later process.

    The key is safe on disk before such a backend is asked. After a crash it may be asked once more with the same CSR
    and the same `continuity`, and should not ask its CA twice.
    """

    def collect(self, request: SignRequest, reference: str) -> Issued | Pending:
        """
        Look whether the CA has answered.

        Args:
            request: As it was sent.
            reference: Of the latest `Pending`.

        Raises:
            BackendRefusedError: The CA said no, or knows no such request any more; it will not be asked for again.
            NoVerdictError: The CA could not be asked as things are set up; the request stays open.
            BackendUnavailableError: No answer from the CA itself.
        """


@runtime_checkable
class CollectsAll(Protocol):
    """
    Optional, beside `collect`: answers lie where others can put some, too, so that the bridge has to try them all.

    Other users may have written what `collect` of such a backend returns: no refusal and no wrong certificate ends a
    request, unless answers are authenticated.
    """

    authenticated: bool  #: Only the CA's own answers are looked at.

    def candidates(self, request: SignRequest, reference: str) -> Sequence[Issued]:
        """
        All certificates that claim to be the answer to what `collect` would be asked for, the likeliest first.

        Raises:
            BackendUnavailableError: The place can't be looked at.
        """

    def accepted(self, request: SignRequest, reference: str) -> None:
        """Hear that one of the candidates passed: what lies there to ask for it may be put away. Never raises."""


@runtime_checkable
class PutsAway(Protocol):
    """Optional, beside `collect`: requests or answers lie on this node, and are of no use once they are over."""

    def put_away(self, reference: str) -> None:
        """
        Remove the requests of the latest `Pending` and what answers them: each is installed, refused or cancelled.

        Called after an installation or a cancellation, or by the next run if that one was killed.

        Raises:
            BackendUnavailableError: It can't be removed; a warning says so, and it is not tried again.
        """


@runtime_checkable
class AsksValidity(Protocol):
    """Optional: the validity of a request reaches the CA, and none gives more; elsewhere a profile decides."""

    asks_validity: bool


@runtime_checkable
class NamesBesideCsr(Protocol):
    """Optional: `SignRequest.names` reach the CA beside the CSR; a pod's CSR is empty, so that pods need it."""

    names_beside_csr: bool


@runtime_checkable
class Carries(Protocol):
    """
    Optional: requests reach the CA by hand, so that each has to say, and prove, who asks: `SignRequest.continuity`.

    Authorities that name the same table with the same settings share one instance, which gets all their requests at once.
    """

    carries: bool


@runtime_checkable
class Checks(Protocol):
    """Optional: find out, without spending a signature, whether `sign` would give the right usages."""

    def check(self, specs: Sequence[CertificateSpec]) -> dict[str, list[Violation]]:
        """
        Ask the CA for the profile, role or section that each certificate would be signed with.

        Returns:
            The violations by certificate name; a name without any is left out.
            What the CA does not let us see is no violation.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A certificate as a renewal would ask for it, without a key and a CSR."""

    spec: CertificateSpec
    certificate: x509.Certificate  #: The live one: its subject and SANs are asked for again.
    key: KeyAlgorithm  #: Of the key that would be made.
    validity: timedelta  #: That would be asked for.
    at_least: timedelta  #: An answer that lives shorter would be refused.
    #: (OID, value) of subject attributes that this CA may add or leave out (`allow_extra_subject`).
    extra_subject: frozenset[tuple[str, str]] = frozenset()


@runtime_checkable
class ChecksWhole(Protocol):
    """Optional, beside `Checks`: find out, without spending a signature, whether `sign` would refuse, or be refused."""

    def check_whole(self, wanted: Sequence[Wanted]) -> dict[str, list[Violation]]:
        """
        Compare names, groups, SANs, kinds of keys and lifetimes with the profile, role or section that would sign.

        For `ca-bridge doctor`. It returns what `check` returns, whose own findings need not be found again.
        """


@runtime_checkable
class Advises(Protocol):
    """Optional: what to look at where a certificate is, or would be, another one than was asked for."""

    def advice(self, spec: CertificateSpec) -> str:
        """
        Name the role, profile or section that signs it, and how it should be, for an error's hint; asks nothing.

        Such as: compare role kubeadm-apiserver of pki with what `ca-bridge setup vault --authority ca` prints.
        """


@runtime_checkable
class TellsTime(Protocol):
    """Optional: how the CA's clock and ours differ."""

    def clock_ahead(self) -> timedelta | None:
        """
        How far the CA's clock was ahead of this machine's at its latest answer (RFC 9110 §6.6.1), negative if behind.

        Called after another question; it asks nothing itself. None: there was no answer with a date.
        """


@runtime_checkable
class ListsIssuers(Protocol):
    """Optional: the CA's own certificates, for the comparison with the node's trust anchor."""

    def issuers(self) -> list[x509.Certificate]:
        """
        The certificate that signs, then its chain as far as the CA tells; empty: this CA does not tell.

        Raises:
            BackendRefusedError: The CA does not accept us, or has no certificate.
        """


@runtime_checkable
class ListsIssuersOf(Protocol):
    """Optional: as `ListsIssuers`, by a backend that several authorities share."""

    def issuers_of(self, authority: str) -> list[x509.Certificate]:
        """As `ListsIssuers.issuers`, of the authority with this name, such as `etcd-ca`."""


@runtime_checkable
class Identifies(Protocol):
    """Optional: who we are to the CA, for the record."""

    def identity(self) -> str:
        """
        A name that the CA's own log knows us by, such as a role's or a client certificate's; never a credential.

        Called after `check`, if there is one. Empty: the CA does not tell.
        """


@runtime_checkable
class Spends(Protocol):
    """Optional: some credentials are good once; `ca-bridge doctor` leaves them to the renewal."""

    def spends(self) -> str:
        """The thing that `check` and `identity` would use up, such as a wrapping token in a file, in words; empty: nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CredentialEnd:
    """When something ends that a backend logs in with."""

    key: str  #: The settings' key relative to the backend's table, such as `auth.token_file`.
    ends: datetime
    begins: datetime | None = None  #: None: the CA does not tell.
    file: Path | None = None  #: The file that it was read from.


@runtime_checkable
class TellsEnds(Protocol):
    """Optional: when a token or another secret ends, as far as the CA, or the secret itself, tells."""

    def credential_ends(self) -> Sequence[CredentialEnd]:
        """Ask, as far as we may; without those that have no end, or that something else renews."""


@runtime_checkable
class Recalls(Protocol):
    """Optional: find what the CA signed for a run that was killed before it could take the answer."""

    def recall(self, requests: Sequence[SignRequest], since: datetime) -> Sequence[Issued | None]:
        """
        Look for certificates with exactly these keys and usages.

        Args:
            requests: As they were sent.
            since: Nothing older is looked at; aware.

        Returns:
            One answer a request, in their order; None: it will be asked for again.
        """


@runtime_checkable
class RecallsIfAllowed(Recalls, Protocol):
    """Optional: `recall` needs a right that the CA's owner may not have given; without it nothing is found."""

    def may_recall(self) -> bool:
        """Whether `recall` finds all that was signed for us."""


@runtime_checkable
class Revokes(Protocol):
    """Optional: revoke a certificate that was superseded."""

    def revoke(self, certificate: x509.Certificate) -> None:
        """
        Have the CA revoke a certificate of its own (RFC 5280 §5.3.1, reason `superseded`); revoked already is no error.

        Raises:
            BackendRefusedError: The CA said no, or does not know the certificate.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Revocation:
    """A superseded certificate that is to be revoked, and the proof that the holder of its successor asks for that."""

    name: str  #: kubeadm's.
    certificate: x509.Certificate
    successor: x509.Certificate  #: Live, and seen in use.
    proof: bytes  #: By the successor's key; see `bridge.pki.node_proofs`.


@runtime_checkable
class RevokesProven(Protocol):
    """Optional, for a backend that `Carries`: as `Revokes`, where the other side has to find out who asks."""

    def revoke_proven(self, revocation: Revocation) -> None:
        """As `Revokes.revoke`; the other side may refuse it by its policy (BackendRefusedError)."""


@runtime_checkable
class TellsRevoked(Protocol):
    """Optional: say whether a certificate of this CA was revoked."""

    def is_revoked(self, certificate: x509.Certificate) -> bool:
        """
        Look the certificate up by its serial number.

        Returns:
            True if the CA has it as revoked; False also for a certificate that the CA does not know.

        Raises:
            BackendRefusedError: The CA does not accept us, or can't say.
        """


@runtime_checkable
class ListsRevoked(Protocol):
    """Optional, beside `TellsRevoked`, to look many certificates up at once."""

    def revoked(self) -> Collection[int] | None:
        """
        List what this CA has revoked.

        Returns:
            The serial numbers; None: the CA does not list them for us, so that each has to be looked up.

        Raises:
            BackendUnavailableError: No answer.
        """


@runtime_checkable
class Closes(Protocol):
    """Optional: give back at the end what the backend took (sessions, tokens that it made)."""

    def close(self) -> None:
        """End connections and give back what is held; never raises for a CA that can't be reached."""


class BackendType(Protocol):
    """The object that an entry point in `ENTRY_POINT_GROUP` names: usually the backend's class."""

    #: A frozen dataclass below `BackendSettings`; its fields are the keys that the settings may have.
    settings_type: ClassVar[type[BackendSettings]]

    @classmethod
    def from_settings(cls, settings: BackendSettings) -> Backend:
        """
        Make the backend; no network yet.

        Args:
            settings: An instance of `settings_type`, whose `problems` are none.

        Raises:
            SettingsError: A file that the settings name can't be used.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class NamePatterns:
    """The names that certificates of one kind may have beside an empty CSR; `*` stands for any text, `?` for one letter."""

    spec: CertificateSpec
    longest: timedelta
    uris: tuple[str, ...] = ()
    dns: tuple[str, ...] = ()
    common_names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SetupRequest:
    """All that `ca-bridge setup TYPE` knows about one authority, when it asks a backend type for what the CA needs."""

    authority: Authority
    #: The authority's live ones by kubeadm's name; empty only if there are `patterns`.
    certificates: Mapping[str, x509.Certificate]
    validity: timedelta  #: Wanted (`renewal.validity`).
    node: str  #: `node.name`.
    cluster: str  #: `node.cluster`.
    #: By field of `settings_type`, as far as the settings have them for this authority; required ones may be missing.
    settings: Mapping[str, Any]
    #: For certificates whose names travel beside the CSR; asked of a backend type with `NamesBesideCsr` alone.
    patterns: Sequence[NamePatterns] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SetupFile:
    """One text for the CA's administrator."""

    name: str  #: A file name without a directory, such as `ca.cnf`; the only one of its authority's.
    text: str
    executable: bool = False  #: A script.
    alone: bool = False  #: Nothing may follow it in one stream.
    by_node: bool = False  #: The same file for another node stands beside it, and takes nothing of it.


@runtime_checkable
class SetsUp(Protocol):
    """
    Optional, for a backend *type* (a class method): what the CA's administrator needs for exactly these certificates.

    `ca-bridge setup TYPE` prints it, or writes it into a directory; no network, no instance of the backend.
    """

    def setup(self, wanted: SetupRequest) -> Sequence[SetupFile]:
        """
        Make roles, profiles, configuration or commands, commented, with the places that the settings name.

        Raises:
            BridgeError: The certificates can't be had from such a CA; says which and why.
        """


@dataclass(frozen=True, kw_only=True)
class BackendSettings:
    """
    The keys that every backend has; a backend's own settings are a frozen dataclass below this one.

    The settings file is read into the dataclass by the types of its fields, strictly: `str`, `bool`, `int`,
    `Path` (absolute), `timedelta` ("30s", "12h", "365d"), `Literal[...]`, `Secret`, `dict[str, str]`, another
    dataclass for a table, and any of these `| None`. A field without a default is required.
    """

    #: `node.name`, which the bridge fills in; no key of the backend's table.
    node: str = field(default="", metadata={GIVEN: True})
    #: The names of the node's further pairs, which the bridge fills in, too.
    pairs: tuple[str, ...] = field(default=(), metadata={GIVEN: True})
    #: The limit for one request or process; a process that signs several certificates may take longer.
    timeout: timedelta = timedelta(seconds=30)
    retry_for: timedelta = timedelta(minutes=2)  #: How long a CA that is unavailable is asked again.

    def writes(self) -> Sequence[Path]:
        """Directories on this machine that the backend writes into, which a unit's sandbox has to leave open."""
        return ()

    def programs(self) -> Sequence[str]:
        """Programs that the backend runs, by path or name, for `ca-bridge settings check`."""
        return ()

    def private_files(self) -> Iterator[Path]:
        """
        Files of these settings that only their owner may read, for `ca-bridge doctor`, which opens none.

        By default those of secrets, and of paths in a field whose name ends with `key`; a backend adds what it has besides.
        """
        for key, value in leaves(self):
            if isinstance(value, Secret) and value.kind == "file" and "{" not in value.where:
                yield Path(value.where)
            elif isinstance(value, Path) and key.endswith("key"):
                yield value

    def credentials(self) -> Iterator[tuple[str, Path]]:
        """
        Files with certificates that the backend logs in with, each with its key relative to the backend's table.

        By default those in a field whose name ends with `client_cert`; a backend adds what it has besides. A file may
        also be a kubeconfig. None is opened.
        """
        for key, value in leaves(self):
            if isinstance(value, Path) and key.endswith("client_cert"):
                yield key, value

    def problems(self) -> Iterator[SettingsProblem]:
        """
        Problems that types alone can't see, such as keys that exclude each other.

        Yields:
            Problems with a key relative to the backend's table, such as `auth.method`.
        """
        yield from ()


@dataclass(frozen=True, slots=True)
class Selector:
    """
    Which role or profile a certificate is signed with: a pattern, and exceptions to it.

    The pattern may hold `{name}` (the certificate's name, dots and all), `{usage}` (`server`, `client`
    or `peer`) and `{node}` (`node.name`); an exception is named by certificate, or else by usage class.
    """

    pattern: str
    exceptions: Mapping[str, str] = field(default_factory=dict)
    node: str = ""

    def __call__(self, spec: CertificateSpec) -> str:
        """The role's or profile's name."""
        for key in (spec.name, spec.usage):
            if key in self.exceptions:
                return self.exceptions[key]
        return self.pattern.format(name=spec.name, usage=spec.usage, node=self.node)

    def problems(self, key: str, exceptions_key: str, pairs: Sequence[str] = ()) -> Iterator[SettingsProblem]:
        """Problems of the pattern (settings key `key`) and of the exceptions (`exceptions_key`); `pairs` may have some."""
        try:
            fields = {name for _, name, _, _ in Formatter().parse(self.pattern) if name is not None}
        except ValueError:
            fields = {self.pattern}
        if not fields <= {"name", "usage", "node"}:
            yield SettingsProblem(key, "a text that may hold {name}, {usage} and {node}", repr(self.pattern))
        for name in self.exceptions:
            if name not in {*SPECS, *GATEWAY_SPECS, USER.name, *USAGES, *pairs}:
                yield SettingsProblem(
                    f"{exceptions_key}.{name}", f"a certificate's name or one of {', '.join(USAGES)}", repr(name)
                )
