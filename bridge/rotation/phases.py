"""
The phase of a CA's replacement on one node, and what differs from a phase there (pure).

The phase follows from the CA file, the CA data of kubeconfigs and the issuers of the leaves; it is recorded nowhere.
kubeadm and our own checks take the first certificate of a CA file as the CA that signs (measured on 1.37), so that the
order in the file matters; the order in a kubeconfig does not.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cryptography import x509

from bridge.pki.certificates import fingerprint, name_text, spki

Bundle = tuple[x509.Certificate, ...]


class Phase(enum.Enum):
    """A state that a node can stay in; kubeadm's commands work in each of them."""

    OLD = "old"
    TRUSTED = "trusted"  #: Both CAs are trusted, the old one signs.
    ISSUED = "issued"  #: Both CAs are trusted, the new one signs.
    NEW = "new"


class Kind(enum.Enum):
    """The parts of a CA that change; they decide which phases there are."""

    NEW_KEY = "another key"
    SAME_KEY = "the same key, and another certificate"


#: The phases that each kind passes, in their order: leaves of a CA that keeps its key need not be issued anew.
PATHS: Mapping[Kind, tuple[Phase, ...]] = {
    Kind.NEW_KEY: (Phase.OLD, Phase.TRUSTED, Phase.ISSUED, Phase.NEW),
    Kind.SAME_KEY: (Phase.OLD, Phase.NEW),
}


@dataclass(frozen=True, slots=True)
class Change:
    """The old CA and the new one."""

    old: x509.Certificate
    new: x509.Certificate
    cross: x509.Certificate | None = None  #: The new CA's name and key, certified by the old CA.

    @property
    def kind(self) -> Kind:
        """Whether the CA keeps its key."""
        is_same = spki(self.old.public_key()) == spki(self.new.public_key())
        return Kind.SAME_KEY if is_same else Kind.NEW_KEY

    @property
    def path(self) -> tuple[Phase, ...]:
        """The phases from the old CA to the new one."""
        return PATHS[self.kind]

    @property
    def spares(self) -> Phase | None:
        """The phase that a node may leave out: behind a cross certificate the old CA's trust is enough for new leaves."""
        return Phase.TRUSTED if self.cross is not None and self.kind is Kind.NEW_KEY else None

    @property
    def steps(self) -> Iterator[tuple[Phase, Phase]]:
        """The steps that a node can take, from phase to phase."""
        yield from itertools.pairwise(self.path)
        if self.spares is not None:
            yield from itertools.pairwise(one for one in self.path if one is not self.spares)

    def bundle(self, phase: Phase) -> Bundle:
        """The certificates of the CA file in a phase, in their order."""
        return {
            Phase.OLD: (self.old,),
            Phase.TRUSTED: (self.old, self.new),
            Phase.ISSUED: (self.new, self.old),
            Phase.NEW: (self.new,),
        }[phase]

    def signer(self, phase: Phase) -> x509.Certificate:
        """The CA that has issued all leaves in a phase."""
        return self.bundle(phase)[0]

    def before(self, phase: Phase) -> Phase | None:
        """The phase to which `back` leads; None: this is the first."""
        earlier = self.path[: self.path.index(phase)]
        return earlier[-1] if earlier else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The content of a node's files, as far as it concerns one CA."""

    bundle: Bundle  #: The CA file.
    kubeconfigs: Mapping[str, Bundle]  #: The CA data of each kubeconfig that has some, by its path; `ca` alone.
    leaves: Mapping[str, x509.Certificate | None]  #: The CA that each leaf leads to, by name; None: to none of both.


@dataclass(frozen=True, slots=True)
class Difference:
    """One file or leaf that differs from a phase."""

    place: str  #: A path, or kubeadm's name of a leaf.
    want: str
    got: str

    def __str__(self) -> str:
        """For the screen."""
        return f"{self.place}: wanted {self.want}, found {self.got}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """The progress of one CA's replacement on a node."""

    phase: Phase | None  #: The last one that the files have reached; None: they are of no phase.
    next: Phase | None = None  #: The phase that is half done; None: nothing is.
    odd: tuple[Difference, ...] = ()  #: Differences from the nearest phase; empty unless `phase` is None.

    @property
    def text(self) -> str:
        """`trusted`, `trusted → issued`, or `unknown`."""
        if self.phase is None:
            return "unknown"
        return self.phase.value if self.next is None else f"{self.phase.value} → {self.next.value}"


def standing(seen: Seen, change: Change) -> Standing:
    """Find the phase of the files; it is half done if each place has the content of that phase or of the one before."""
    path = change.path
    lacking = {phase: tuple(differences(seen, change, phase)) for phase in path}
    for phase in reversed(path):  # without leaves and kubeconfigs the CA file alone decides
        if not lacking[phase]:
            return Standing(phase=phase)
    for phase, later in change.steps:
        behind, ahead = ({one.place for one in lacking[each]} for each in (phase, later))
        if not behind & ahead:
            return Standing(phase=phase, next=later)
    return Standing(phase=None, odd=min(lacking.values(), key=len))


def differences(seen: Seen, change: Change, phase: Phase) -> Iterator[Difference]:
    """The differences between a node's files and a phase, in the order of installation: trust before leaves."""
    bundle, signer = change.bundle(phase), change.signer(phase)
    if seen.bundle != bundle:
        yield Difference("CA file", texts(bundle), texts(seen.bundle))
    for path, data in seen.kubeconfigs.items():
        if set(data) != set(bundle):
            yield Difference(path, texts(bundle), texts(data))
    if change.kind is Kind.SAME_KEY:  # a leaf leads to both
        return
    for name, found in seen.leaves.items():
        if found != signer:
            of_what = text(found) if found else "neither"
            yield Difference(name, f"a certificate of {text(signer)}", f"one of {of_what}")


def texts(bundle: Sequence[x509.Certificate]) -> str:
    """The CAs of a bundle for the screen."""
    return ", then ".join(map(text, bundle)) or "no CA"


def text(ca: x509.Certificate) -> str:
    """A CA for the screen, with its fingerprint, since two CAs may share a name."""
    return f"{name_text(ca.subject)} ({fingerprint(ca)[:8]})"
