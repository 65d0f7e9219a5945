"""What an installation leaves to do, on disk before it and until it is done or outdated; each kind has its own file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field
from datetime import datetime

from cryptography import x509

from bridge import dataclass
from bridge.errors import Exit
from bridge.node.inventory import Item, Node
from bridge.pki.certificates import serial_hex
from bridge.specs import SPECS, Component, is_pair_name
from bridge.state import Outcome, Store
from bridge.system.codec import left_out, named
from bridge.system.state_file import OnDamage, StateFile, coded

AFTER_INSTALL, SUCCESS, FAILURE = "after_install", "success", "failure"


def live_serials(node: Node) -> dict[str, str]:
    """The serial numbers of the certificates on the node, in hexadecimal, by kubeadm's name."""
    return {item.spec.name: serial_hex(item.certificates[0]) for item in node.items if item.certificates}


@dataclass(frozen=True, slots=True, kw_only=True)
class Unproven:
    """A certificate that was installed, perhaps by several runs, and was not seen in use yet."""

    name: str  #: kubeadm's.
    runs: Mapping[str, str]  #: The run that installed it, or was about to, by serial.
    backup_of: str  #: The first of these runs, whose backup has the files that were in use.
    before: frozenset[str] = frozenset()  #: Checks that failed before it, as in `Finding.what`.

    def __post_init__(self) -> None:
        _assert_known(self.name)

    @property
    def newest_run(self) -> str:
        """The run whose certificate it is, as far as that is known."""
        return list(self.runs.values())[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class NotProven:
    """Installed certificates that are not proven, and the rollback and restarts that they need."""

    certificates: tuple[Unproven, ...]
    going_back: str = ""  #: Why all of it is rolled back; empty: it is not.
    to_restart: tuple[Component, ...] = ()  #: Components that run on files that were rolled back.
    #: It is not rolled back by itself, whether it works or not, and restarts wait for nothing; None: it is no emergency.
    stays: bool | None = field(default=None, metadata=left_out())

    @property
    def names(self) -> list[str]:
        """The certificates' names."""
        return [one.name for one in self.certificates]

    def with_installed(
        self, outcomes: Iterable[Outcome], run_id: str, failed: Callable[[str], frozenset[str]] = lambda _: frozenset()
    ) -> NotProven:
        """The same with what a run is about to install; one that is unproven keeps its backup, and what had `failed`."""
        every = {one.name: one for one in self.certificates}
        for name, new in ((one.name, one.new) for one in outcomes if one.new is not None):
            one = every.pop(name, None) or Unproven(name=name, runs={}, backup_of=run_id, before=failed(name))
            every[name] = dataclasses.replace(one, runs={**one.runs, serial_hex(new): run_id})
        return dataclasses.replace(self, certificates=tuple(every.values()))

    def live_on(self, node: Node) -> NotProven:
        """The same without outdated ones: those that were not installed, or were replaced by another program."""
        live = live_serials(node)
        unreadable = {item.spec.name for item in self.unreadable_on(node)}
        ours = tuple(one for one in self.certificates if live.get(one.name) in one.runs or one.name in unreadable)
        return dataclasses.replace(self, certificates=ours)

    def unreadable_on(self, node: Node) -> list[Item]:
        """Certificates of these on the node that can't be read now, and may come back."""
        ours = [item for item in node.items if item.spec.name in self.names and item.state != "present"]
        return [item for item in ours if item.state != "missing" or not item.spec.optional]

    def is_new(self, certificate: str | None, what: str) -> bool:
        """Whether a failed check of a certificate held before the installation."""
        return not any(certificate == one.name and what in one.before for one in self.certificates)


def unproven_file(store: Store) -> StateFile[NotProven]:
    """The file with unproven certificates; a damaged one stops a run, since it may ask for a restart or a rollback."""
    return coded(
        NotProven,
        store.unproven,
        "what was installed and not proven",
        OnDamage.REFUSE,
        afterwards="`ca-bridge prove` shows whether all is in use, and `ca-bridge restart` restarts what is not",
        exit_code=Exit.NOT_LIVE,
    )


def postponed_file(store: Store) -> StateFile[NotProven]:
    """The file with certificates of --no-restart, or of `rollback`: no run restarts for them, or rolls them back."""
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
    """A further pair that was installed, and that its program is still to read; each stands for itself."""

    unproven: NotProven = field(metadata=named("owed"))  #: With this one certificate.
    worked: bool  #: Its server showed the old pair before the installation, or nothing can be asked.
    by_hand: bool = False  #: With --no-restart, or by `rollback`: no run has it read again, or rolls it back.
    is_read: bool = False  #: Its program has read it again; what is left is to see that.

    @property
    def name(self) -> str:
        """Its name."""
        return self.unproven.names[0]


def pairs_file(store: Store) -> StateFile[tuple[UnprovenPair, ...]]:
    """The file with such pairs; without it no run knows which programs use old pairs, so that damage is reported."""
    return coded(
        tuple[UnprovenPair, ...],
        store.pairs,
        "which further pairs were installed and not seen in use",
        OnDamage.SET_ASIDE,
        key="pairs",
        version=1,
        afterwards="`ca-bridge prove` shows what the servers show; have the programs read their pairs again",
        exit_code=Exit.NOT_LIVE,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HooksToRun:
    """Hooks of one event that did not all succeed yet."""

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
        """Whether the hooks are about certificates of which none is installed any more."""
        live = live_serials(node)
        return bool(self.serials) and not any(live.get(name) == serial for name, serial in self.serials.items())


def hooks_file(store: Store) -> StateFile[tuple[HooksToRun, ...]]:
    """The hooks to be run again; a damaged file is reported once, and does not stop a renewal."""
    return coded(
        tuple[HooksToRun, ...],
        store.hooks,
        "the hooks that are to be run again",
        OnDamage.SET_ASIDE,
        key="owed",
        version=1,
        afterwards="run by hand what your hooks would have done",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Superseded:
    """A certificate that is to be revoked."""

    name: str  #: kubeadm's.
    certificate: x509.Certificate
    due: datetime  #: Not earlier.

    def __post_init__(self) -> None:
        _assert_known(self.name)

    def authority_on(self, node: Node) -> str:
        """The authority that signed it."""
        return node.spec(self.name).authority.name

    def is_outdated(self, node: Node, now: datetime) -> bool:
        """Whether the certificate is (or is again) in use, or has ended; or it is of a pair that the settings had."""
        if self.name not in SPECS and node.item(self.name) is None:
            return True
        return node.live(self.name) == self.certificate or self.certificate.not_valid_after_utc <= now

    def __str__(self) -> str:
        return f"{self.name}, serial {serial_hex(self.certificate)}"


def revocations_file(store: Store) -> StateFile[tuple[Superseded, ...]]:
    """The certificates that are still to be revoked."""
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
    """A request that its backend may put away, with its answers, once it waits no more."""

    authority: str
    reference: str  #: The backend's, of the request.


def collected_file(store: Store) -> StateFile[tuple[Collected, ...]]:
    """What is to be put away; without the file it stays where it is."""
    return coded(
        tuple[Collected, ...],
        store.collected,
        "which requests and answers are to be put away",
        OnDamage.SET_ASIDE,
        key="collected",
        version=1,
        afterwards="remove answers that are installed from the inbox, and cancelled requests from the outbox",
    )


def copies_file(store: Store) -> StateFile[dict[str, tuple[str, ...]]]:
    """The certificates that copies may still hold: SHA-256, by kubeadm's name of the kubeconfig."""
    return coded(
        dict[str, tuple[str, ...]],
        store.copies,
        "which certificates copies of kubeconfigs may still hold",
        OnDamage.SET_ASIDE,
        key="certificates",
        version=1,
        afterwards="`ca-bridge doctor` says which copies are old",
    )


def _assert_known(name: str) -> None:
    if name not in SPECS and not is_pair_name(name):
        raise ValueError("not written by this program")
