"""Work left by an installation: recorded before it, until it is done or outdated; each kind has its own file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509

from bridge.errors import Exit
from bridge.node.inventory import Item, Node
from bridge.pki.certificates import serial_hex
from bridge.specs import SPECS, Component, is_pair_name
from bridge.state import Outcome, Store
from bridge.system.state_file import OnDamage, StateFile, coded

AFTER_INSTALL, SUCCESS, FAILURE = "after_install", "success", "failure"


def live_serials(node: Node) -> dict[str, str]:
    """The serial numbers (hexadecimal) of the certificates on the node, by kubeadm's name."""
    return {item.spec.name: serial_hex(item.certificates[0]) for item in node.items if item.certificates}


@dataclass(frozen=True, slots=True, kw_only=True)
class Unproven:
    """A certificate that was installed, perhaps by several runs, and not yet seen in use."""

    name: str  #: kubeadm's name of the certificate.
    runs: Mapping[str, str]  #: By serial number, the run that installed it or was about to.
    backup_of: str  #: The first of these runs, whose backup has the files that were in use.
    before: frozenset[str] = frozenset()  #: Checks that failed before the installation, as in `Finding.what`.

    def __post_init__(self) -> None:
        _assert_known(self.name)

    @property
    def newest_run(self) -> str:
        """The run that installed the certificate, as far as it is known."""
        return list(self.runs.values())[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class NotProven:
    """Installed certificates that are not proven yet, and the rollback and restarts that they need."""

    certificates: tuple[Unproven, ...]
    going_back: str = ""  #: Why all of it is rolled back; empty: it is not rolled back.
    to_restart: tuple[Component, ...] = ()  #: Components that run on files that were rolled back.
    #: No automatic rollback, whether it works or not, and restarts do not wait; None: no emergency.
    stays: bool | None = None

    @property
    def names(self) -> list[str]:
        """The certificates' names."""
        return [certificate.name for certificate in self.certificates]

    def with_installed(
        self, outcomes: Iterable[Outcome], run_id: str, failed: Callable[[str], frozenset[str]] = lambda _: frozenset()
    ) -> NotProven:
        """A copy with the certificates that a run is about to install; an unproven one keeps its backup and `before`."""
        every = {certificate.name: certificate for certificate in self.certificates}
        for name, new in ((outcome.name, outcome.new) for outcome in outcomes if outcome.new is not None):
            certificate = every.pop(name, None) or Unproven(name=name, runs={}, backup_of=run_id, before=failed(name))
            every[name] = dataclasses.replace(certificate, runs={**certificate.runs, serial_hex(new): run_id})
        return dataclasses.replace(self, certificates=tuple(every.values()))

    def live_on(self, node: Node) -> NotProven:
        """Return a copy without outdated certificates, which were not installed or were replaced by another program."""
        live = live_serials(node)
        unreadable = {item.spec.name for item in self.unreadable_on(node)}
        certificates = tuple(
            certificate
            for certificate in self.certificates
            if live.get(certificate.name) in certificate.runs or certificate.name in unreadable
        )
        return dataclasses.replace(self, certificates=certificates)

    def unreadable_on(self, node: Node) -> list[Item]:
        """The unproven certificates that can't be read on the node now, and may return."""
        items = [item for item in node.items if item.spec.name in self.names and item.state != "present"]
        return [item for item in items if item.state != "missing" or not item.spec.optional]

    def is_new(self, certificate: str | None, what: str) -> bool:
        """Whether a check that fails now passed before the installation."""
        return not any(certificate == entry.name and what in entry.before for entry in self.certificates)


def unproven_file(store: Store) -> StateFile[NotProven]:
    """The file with unproven certificates; damage stops a run, since the file may demand a restart or a rollback."""
    return coded(
        NotProven,
        store.unproven,
        "what was installed and not proven",
        OnDamage.REFUSE,
        afterwards="`ca-bridge prove` shows whether all is in use, and `ca-bridge restart` restarts what is not",
        exit_code=Exit.NOT_LIVE,
    )


def postponed_file(store: Store) -> StateFile[NotProven]:
    """The file with certificates of --no-restart or `rollback`: no run restarts for them, or rolls them back."""
    return coded(
        NotProven,
        store.postponed,
        "what was installed with --no-restart, or put back, and not seen in use",
        OnDamage.SET_ASIDE,
        afterwards="`ca-bridge prove` shows whether all is in use",
        exit_code=Exit.NOT_LIVE,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class UnprovenPair:
    """A further pair that was installed, and not yet seen in use; each has its own proof and rollback."""

    unproven: NotProven  #: The pair's certificate, and nothing else.
    worked: bool  #: Its server showed the old pair before the installation, or it has no server to check.
    by_hand: bool = False  #: Installed with --no-restart or put back by `rollback`: no run reloads or rolls it back.
    is_read: bool = False  #: Its program has reloaded it; only the check is left.

    @property
    def name(self) -> str:
        """The pair's name."""
        return self.unproven.names[0]


def pairs_file(store: Store) -> StateFile[tuple[UnprovenPair, ...]]:
    """The file with unproven pairs; damage is reported, since no run then knows which programs use old pairs."""
    return coded(
        tuple[UnprovenPair, ...],
        store.pairs,
        "which further pairs were installed and not seen in use",
        OnDamage.SET_ASIDE,
        key="pairs",
        afterwards="`ca-bridge prove` shows what the servers show; have the programs read their pairs again",
        exit_code=Exit.NOT_LIVE,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HooksToRun:
    """Hooks of one event that have not all succeeded yet."""

    event: str
    run_id: str
    environment: Mapping[str, str]
    serials: Mapping[str, str]  #: New certificates; if none of them is installed any more, the hooks are dropped.
    done: tuple[str, ...] = ()  #: Commands that succeeded.
    tries: int = 0

    def __post_init__(self) -> None:
        if self.event not in (AFTER_INSTALL, SUCCESS, FAILURE):
            raise ValueError("not written by this program")

    def is_outdated(self, node: Node) -> bool:
        """Whether none of the hooks' certificates is installed any more."""
        live = live_serials(node)
        return bool(self.serials) and not any(live.get(name) == serial for name, serial in self.serials.items())


def hooks_file(store: Store) -> StateFile[tuple[HooksToRun, ...]]:
    """The file with hooks to run again; a damaged file is reported once, and does not stop a renewal."""
    return coded(
        tuple[HooksToRun, ...],
        store.hooks,
        "the hooks that are to be run again",
        OnDamage.SET_ASIDE,
        key="owed",
        afterwards="run by hand what your hooks would have done",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Superseded:
    """A certificate that is to be revoked."""

    name: str  #: kubeadm's name of the certificate.
    certificate: x509.Certificate
    due: datetime  #: Revoked no earlier than this.

    def __post_init__(self) -> None:
        _assert_known(self.name)

    def authority_on(self, node: Node) -> str:
        """The authority that signed it."""
        return node.spec(self.name).authority.name

    def is_outdated(self, node: Node, now: datetime) -> bool:
        """Whether the certificate is in use (again), has ended, or is a pair that the settings no longer have."""
        if self.name not in SPECS and node.item(self.name) is None:
            return True
        return node.live(self.name) == self.certificate or self.certificate.not_valid_after_utc <= now

    def __str__(self) -> str:
        return f"{self.name}, serial {serial_hex(self.certificate)}"


def revocations_file(store: Store) -> StateFile[tuple[Superseded, ...]]:
    """The file with certificates still to be revoked."""
    return coded(
        tuple[Superseded, ...],
        store.revocations,
        "the certificates that are to be revoked",
        OnDamage.SET_ASIDE,
        key="superseded",
        afterwards="the audit log has the serial numbers of what was replaced: revoke those at the CA",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """A request that its backend may remove, with its answers, once it no longer waits."""

    authority: str
    reference: str  #: The backend's reference of the request.


def collected_file(store: Store) -> StateFile[tuple[Collected, ...]]:
    """The file with requests to remove at backends; if it is lost, they stay there."""
    return coded(
        tuple[Collected, ...],
        store.collected,
        "which requests and answers are to be put away",
        OnDamage.SET_ASIDE,
        key="collected",
        afterwards="remove answers that are installed from the inbox, and cancelled requests from the outbox",
    )


def copies_file(store: Store) -> StateFile[dict[str, tuple[str, ...]]]:
    """The file with certificates that copies may still hold: their SHA-256, by kubeadm's name of the kubeconfig."""
    return coded(
        dict[str, tuple[str, ...]],
        store.copies,
        "which certificates copies of kubeconfigs may still hold",
        OnDamage.SET_ASIDE,
        key="certificates",
        afterwards="`ca-bridge doctor` says which copies are old",
    )


def _assert_known(name: str) -> None:
    if name not in SPECS and not is_pair_name(name):
        raise ValueError("not written by this program")
