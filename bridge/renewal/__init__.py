"""
The renewal of certificates, online and by air gap: select, prepare, issue, verify, install, activate, conclude.

This file has what all of its steps share: what was selected, the names that are wanted, errors, the CA files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from cryptography import x509

from bridge.errors import BridgeError, SettingsError, SettingsProblem
from bridge.node.inventory import Item, Node, other_key
from bridge.node.kubeconfig import FreshKubeconfig
from bridge.node.pairs import lost_copy
from bridge.pki import expiry
from bridge.pki.csr import Naming
from bridge.settings.tables import Settings
from bridge.specs import SPECS, KeyAlgorithm
from bridge.state import Outcome
from bridge.system.files import reasons
from bridge.system.paths import read_ca_file
from bridge.words import name_found

#: As in `kubeadm certs renew all`.
ALL = "all"
#: The hint for a missing or broken file.
RESTORE = "put a good copy back (an expired one will do), then run again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Desired:
    """The names, key and file wanted for one certificate."""

    naming: Naming
    notes: tuple[str, ...]  #: Sentences about each difference and its source.
    key: KeyAlgorithm | None = None  #: The new key's algorithm, where no live certificate shows it.
    kubeconfig: FreshKubeconfig | None = None  #: The whole file, where none exists.


#: By certificate name; an error says why the certificate can't be made.
DesiredByName = Mapping[str, Desired | BridgeError]


class MissingCertificateError(BridgeError):
    """There is no live certificate to renew."""


class NotReadyError(BridgeError):
    """Something on this or another node has to be fixed first; no CA caused it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The certificates that a run has to renew, and those that it can't."""

    items: tuple[Item, ...] = ()  #: The certificates to renew.
    failed: tuple[Outcome, ...] = ()  #: Certificates that should be renewed and can't be.
    skipped: tuple[str, ...] = ()  #: Sentences for the operator.
    waived: tuple[str, ...] = ()  #: Sentences about identities that are renewed as they are.
    powerful: tuple[str, ...] = ()  #: Sentences about a super-admin.conf that nothing on the node needs.
    costs: tuple[str, ...] = ()  #: Sentences about interruptions that users of the cluster notice.
    lost: tuple[str, ...] = ()  #: Sentences about keys that do not match, and pairs that differ from the settings.
    #: By certificate name, where the next certificate's names differ or no live certificate exists.
    desired: Mapping[str, Desired] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the operator before a CA is asked."""
        return (*self.lost, *self.waived, *self.costs, *self._changes())

    def without(self, failing: Mapping[str, BridgeError]) -> Selection:
        """Return the selection with these certificates, by name, among the failed ones, each with its error."""
        failed = [outcome_of(item, failing[item.spec.name]) for item in self.items if item.spec.name in failing]
        items = tuple(item for item in self.items if item.spec.name not in failing)
        return replace(self, items=items, failed=(*self.failed, *failed))

    def _changes(self) -> Iterator[str]:
        """Yield sentences about the next names; a sentence that several certificates share comes once."""
        alike: dict[str, list[str]] = {}
        for name in (item.spec.name for item in self.items if item.spec.name in self.desired):
            for note in self.desired[name].notes:
                words = note.removeprefix(f"{name}: ")
                alike.setdefault(words, []).append("" if words == note else name)
        for words, names in alike.items():
            yield f"{', '.join(names)}: {words}" if names[0] else words


def anchors_of(item: Item) -> tuple[x509.Certificate, ...]:
    """Return all certificates of the CA file that the item must lead to."""
    return anchors_in(item.anchor_path, f"the CA certificate that {item.spec.name} must lead to", "put it back")


def anchors_in(path: Path, what: str, hint: str) -> tuple[x509.Certificate, ...]:
    """Return all certificates of a CA file (MissingCertificateError: it can't be read)."""
    with reasons(MissingCertificateError, f"{path}: wanted {what}, found", hint=hint):
        return read_ca_file(path)


def assert_known(names: Collection[str], node: Node, more: Collection[str] = ()) -> None:
    """Raise a SettingsError for names that are not kubeadm's, not a further pair's on this node, and not in `more`."""
    known = [*SPECS, *(item.spec.name for item in node.items if item.pair is not None)]
    if unknown := list(dict.fromkeys(name for name in names if name not in (ALL, *known, *more))):
        wanted = f"names of certificates ({', '.join(known)}) or {ALL}"
        meant = ", ".join(name_found(name, [*known, ALL]) for name in unknown)
        raise SettingsError([SettingsProblem("", wanted, meant)])


def lost_keys(node: Node) -> dict[str, str]:
    """Return, by certificate name, what is wrong with its key: missing, empty or another certificate's."""
    lost = {item.spec.name: item.key_trouble or other_key(item) for item in node.items if not item.foreign}
    for item in node.items:
        if item.pair is not None and item.pair.copies and lost[item.spec.name] is None:
            lost[item.spec.name] = lost_copy(item)
    return {name: trouble for name, trouble in lost.items() if trouble is not None}


def outcome_of(item: Item, error: BridgeError, backend: str = "") -> Outcome:
    """Return the outcome of a certificate that could not be renewed."""
    old = item.certificates[0] if item.certificates else None
    return Outcome(name=item.spec.name, authority=item.spec.authority.name, old=old, error=error, backend=backend)


def nothing_due(node: Node, settings: Settings, now: datetime) -> str:
    """Return the sentence for a run with nothing to do."""
    left_alone = settings.renewal.left_alone
    items = (item for item in node.items if item.managed and not item.foreign and item.spec.name not in left_alone)
    present = [item for item in items if item.state == "present"]
    if not present:
        return "nothing is due: no certificates here"
    first = min(present, key=lambda item: expiry.first_end(item.ending))
    left = expiry.residual(expiry.seconds_left(expiry.first_end(first.ending), now))
    early = [item.spec.name for item in present if expiry.is_early(item.ending, now)]
    more = f"; not valid yet by this node's clock ({expiry.minute(now)}), see `ca-bridge doctor`: {', '.join(early)}"
    text = f"nothing is due: {first.spec.name} is the first to expire, in {left} (renewal.before = {settings.renewal.before})"
    return text + (more if early else "")
