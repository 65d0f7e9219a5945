"""The step of a verb on one CA, by the phase of this node's files, and whether the new CA can take the old one's place (pure)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import ClassVar

from bridge.ca import registry
from bridge.errors import BridgeError, Exit, Violation
from bridge.pki.certificates import name_text, spki
from bridge.pki.expiry import minute
from bridge.rotation import Phase, new_ca_violations, stops_openssl, text, texts, untimely
from bridge.rotation.places import Replaced
from bridge.settings.tables import Settings
from bridge.specs import CA
from bridge.system.paths import UnreadableError


class Verb(Enum):
    """The verbs of `rotate-ca`, each of which brings a node to a phase."""

    TRUST = "trust"
    ISSUE = "issue"
    DROP = "drop"
    BACK = "back"


class NewCaError(BridgeError):
    """The new CA can't replace the old one."""

    exit_code: ClassVar[int] = Exit.REFUSED
    hint = "have its owner make another one; nothing was replaced"


class OrderError(BridgeError):
    """The verb is not the next one on this node."""

    exit_code: ClassVar[int] = Exit.USAGE


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The effect of a verb on one CA of this node."""

    ca: Replaced
    target: Phase
    is_there: bool  #: Whether the files are in the phase already.


class ElsewhereError(BridgeError):
    """A component reads the CA from a file that no phase writes, and that does not fit the phase."""

    exit_code: ClassVar[int] = Exit.USAGE
    hint = (
        "ca-bridge writes kubeadm's files alone: change these by hand, restart the components that read them, then the same "
        "command again; no file of this phase was replaced"
    )


class NoWayBackError(BridgeError):
    """The old CA's certificates are in no backup."""

    exit_code: ClassVar[int] = Exit.FAILED
    hint = "`ca-bridge backups` lists what there is; while both CAs are trusted nothing has to go back"


def planned(verb: Verb, ca: Replaced, going_back: Phase | None) -> Step:
    """Plan the step of a verb, or of an interrupted `back` to `going_back` (OrderError: it is not the next step)."""
    now, path = ca.standing, ca.change.path
    if now.phase is None:
        raise _of_no_phase(ca)
    if verb is Verb.BACK:
        if ca.change.old == ca.change.new:
            raise NoWayBackError(
                f"{ca.name}: no backup has the CA before {text(ca.change.new)}",
                hint=f"append its certificate to {ca.state.path}, then this command again; nothing was replaced",
            )
        before = now.phase if now.next is not None else ca.change.before(now.phase) or now.phase
        target = going_back or before
        return Step(ca=ca, target=target, is_there=now.next is None and now.phase is target)
    goal = {Verb.TRUST: Phase.TRUSTED, Verb.ISSUE: Phase.ISSUED, Verb.DROP: Phase.NEW}[verb]
    target = goal if goal in path else path[-1]
    here, wanted = path.index(now.phase), path.index(target)
    if verb is Verb.TRUST and ca.change.spares is target and now.phase is Phase.OLD and now.next is None:
        return Step(ca=ca, target=now.phase, is_there=True)
    if here < wanted - 1 and (now.phase, target) not in ca.change.steps:
        before = path[wanted - 1]
        raise OrderError(
            f"{ca.name}: wanted the phase “{before.value}” on this node before `{verb.value}`, found “{now.text}”",
            hint="one phase comes after the other, each on every node: `ca-bridge rotate-ca plan` shows them",
        )
    if path.index(now.next or now.phase) > wanted:
        raise OrderError(
            f"{ca.name}: wanted a node that is not further than “{target.value}”, found “{now.text}”",
            hint="`ca-bridge rotate-ca back` goes back by one phase",
        )
    return Step(ca=ca, target=target, is_there=here == wanted)


def straight_to_the_new_ca(ca: Replaced) -> Step:
    """Plan the step of an emergency, from any phase (OrderError: it would not help)."""
    now = ca.standing
    if now.phase is None:
        raise _of_no_phase(ca)
    if ca.change.keeps_key and ca.change.old != ca.change.new:
        raise OrderError(
            f"{ca.name}: wanted a CA with another key, found {text(ca.change.new)} with the old one's",
            hint="a thief of the key has the next CA's, too; nothing was replaced",
        )
    return Step(ca=ca, target=Phase.NEW, is_there=now.phase is Phase.NEW)


def _of_no_phase(ca: Replaced) -> OrderError:
    return OrderError(
        f"{ca.name}: wanted the files of a phase, found {'; '.join(ca.standing.differing)}",
        hint="a replacement by other means may be under way: finish it by these; nothing was replaced",
    )


VERBS = {Phase.TRUSTED: "trust", Phase.ISSUED: "issue", Phase.NEW: "drop"}


def assert_possible(steps: Sequence[Step], settings: Settings, now: datetime, *, emergency: bool = False) -> None:
    """Refuse a new CA that can't work (NewCaError); `drop` ignores its cross certificate, since it makes no leaves."""
    for step in steps:
        ca = step.ca
        if step.target is Phase.NEW and not emergency:
            ca = dataclasses.replace(ca, change=dataclasses.replace(ca.change, cross=None))
        if problems := list(violations(ca, settings, now, emergency=emergency)):
            raise NewCaError(f"{ca.name}: {text(ca.change.new)} can't take its place: {'; '.join(map(str, problems))}")


def assert_fits_elsewhere(steps: Sequence[Step]) -> None:
    """Refuse a phase that other CA files of this node would not follow (ElsewhereError)."""
    if problems := [problem for step in steps for problem in unfit_elsewhere(step.ca, step.target)]:
        raise ElsewhereError("; ".join(problems))


def unfit_elsewhere(ca: Replaced, phase: Phase) -> Iterator[str]:
    """Yield a sentence about each other CA file without a CA of this phase, or with the old CA's key after it."""
    change, wanted = ca.change, ca.change.bundle(phase)
    old_key, wanted_keys = spki(change.old.public_key()), {spki(each.public_key()): each for each in wanted}
    for file, held in ca.elsewhere.items():
        if isinstance(held, UnreadableError):
            yield f"{ca.name}: wanted {texts(wanted)} in {file}, found: {held}"
            continue
        keys = {spki(each.public_key()) for each in held}
        if lacking := [each for key, each in wanted_keys.items() if key not in keys]:
            yield f"{ca.name}: wanted {texts(lacking)} in {file}, found {texts(held) or 'no certificate'}"
        if old_key in keys and old_key not in wanted_keys:
            yield f"{ca.name}: wanted no {text(change.old)} any more in {file}, found it"


def violations(ca: Replaced, settings: Settings, now: datetime, *, emergency: bool = False) -> Iterator[Violation]:
    """Yield why the new CA can't replace the old one here, or not yet; in an emergency its age does not count."""
    chains = {item.spec.name: item.certificates for item in ca.items}
    if ca.change.old != ca.change.new:
        yield from new_ca_violations(ca.change, ca.state.authority, chains, ca.others, now)
        if not emergency and _stops_pods(ca, settings):
            want = (
                "a self-signed certificate for this name and key, without which pods' programs with OpenSSL's usual rules "
                'refuse the API server; if there are none, next.not_self_signed = "allowed"'
            )
            yield Violation(subject="issuer", want=want, got=name_text(ca.change.new.issuer))
        if ca.change.cross is not None and not registry.is_cross_long_enough(ca.change.cross, settings.renewal, now):
            want = f"later than renewal.before ({settings.renewal.before}) from now on, or no certificate gets it"
            got = minute(ca.change.cross.not_valid_after_utc)
            yield Violation(subject="cross certificate's notAfter", want=want, got=got)
        if ca.standing.phase is Phase.OLD and not emergency:
            is_adoption = ca.state.key == "local" or settings.authorities[ca.name].names_next_alone
            yield from untimely(ca.change, now, outlasts=not is_adoption)


def _stops_pods(ca: Replaced, settings: Settings) -> bool:
    """Whether programs in pods, which trust this CA alone, would refuse new certificates, and the settings forbid that."""
    is_ahead = ca.standing.phase in (Phase.OLD, Phase.TRUSTED)
    is_allowed = settings.authorities[ca.name].next.get("not_self_signed") == "allowed"
    return ca.state.authority == CA and is_ahead and not is_allowed and stops_openssl(ca.change)
