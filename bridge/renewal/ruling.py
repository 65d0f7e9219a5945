"""What becomes of an installation: two tables, from what was seen of the new certificates and of the restarts (pure)."""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum

from bridge.control_plane.probes import ProofState


class Meaning(Enum):
    """The meaning of one finding about a certificate for its installation."""

    AS_BEFORE = "it was so before the installation"
    LATER = "its component's restart is postponed"
    LEFT = "its component's restart is left to the operator"
    UNSEEN = "it can't be seen now"
    NOT_IN_USE = "its component runs on the old one"
    BROKEN = "it does not work"


class Ruling(Enum):
    """The decision about the installation as a whole."""

    PROVEN = "it stays, and nothing is owed"
    POSTPONED = "it stays, and the next run goes on"
    LEFT = "it stays, and the operator restarts the rest"
    UNPROVEN = "it stays, and the next run looks again"
    FAILED = "it goes back, or stays, as restart.on_failure says"


_ANY = (True, False)

#: The state that was seen; whether the component's restart is postponed; whether it is ours to restart (the settings
#: list it, or have no list, and there is a way); whether it was not so before. A state in no row is well.
_MEANINGS: tuple[tuple[tuple[ProofState, ...], tuple[bool, ...], tuple[bool, ...], bool, Meaning], ...] = (
    (("stale", "refused", "no-answer", "unknown"), _ANY, _ANY, False, Meaning.AS_BEFORE),
    (("stale",), (True,), _ANY, True, Meaning.LATER),
    (("stale",), (False,), (False,), True, Meaning.LEFT),
    (("stale",), (False,), (True,), True, Meaning.NOT_IN_USE),
    (("refused", "no-answer"), _ANY, _ANY, True, Meaning.BROKEN),
    (("unknown",), _ANY, _ANY, True, Meaning.UNSEEN),
)


def meaning(state: ProofState, *, postponed: bool, ours: bool, new: bool) -> Meaning | None:
    """Read the row of one finding; None: all is well."""
    for states, postponements, owners, news, result in _MEANINGS:
        if state in states and postponed in postponements and ours in owners and new == news:
            return result
    return None


#: The first row of which any meaning was found.
_RULINGS = (
    ({Meaning.BROKEN, Meaning.NOT_IN_USE}, Ruling.FAILED),
    ({Meaning.UNSEEN}, Ruling.UNPROVEN),
    ({Meaning.LEFT}, Ruling.LEFT),
)


def rule(meanings: Collection[Meaning], *, postponed: bool, failed: bool, impossible: bool = False) -> Ruling:
    """
    Decide what becomes of the installation.

    Args:
        meanings: Of all findings about its certificates.
        postponed: A restart is.
        failed: A restart did, otherwise than by being postponed or impossible.
        impossible: There is no way to restart a component from here; that is no proof that its certificates are bad.
    """
    if failed:
        return Ruling.FAILED
    if postponed and Meaning.BROKEN not in meanings:
        return Ruling.POSTPONED
    if impossible and not {Meaning.BROKEN, Meaning.NOT_IN_USE} & set(meanings):
        return Ruling.LEFT
    return next((ruling for found, ruling in _RULINGS if found & set(meanings)), Ruling.PROVEN)
