"""What a new node's open requests are for, so that a run after an interruption, or after a desk's answer, goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bridge.bootstrap.places import Role
from bridge.state.store import Store
from bridge.system.state_file import OnDamage, StateFile

_KEY = "bootstrapV1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """One node's bootstrap that has begun; its keys are among the open requests."""

    role: Role
    config: str  #: kubeadm's, from which the CSRs were made.
    servers: Mapping[str, str]  #: By kubeconfig.
    names: tuple[str, ...]  #: Of the certificates.
    sa_key: str = field(default="", repr=False)  #: PEM; empty where it comes from elsewhere.
    sa_public: str = ""

    def is_for(self, role: Role, config: str) -> bool:
        """Whether the same would be made now."""
        return (self.role, self.config) == (role, config)


def unfinished_file(store: Store) -> StateFile[Unfinished]:
    """The file in the state directory; a damaged one costs new keys and requests, and nothing else."""
    return StateFile(
        path=store.bootstrap,
        what="what the requests of a new node are for",
        parse=_from_json,
        keys=frozenset({_KEY}),
        on_damage=OnDamage.START_OVER,
    )


def remember(store: Store, one: Unfinished) -> None:
    """
    Write it.

    Raises:
        StateError: It can't be written.
    """
    unfinished_file(store).replace({_KEY: {**dataclasses.asdict(one), "names": list(one.names)}})


def _from_json(document: Mapping[str, Any]) -> Unfinished:
    entry = document[_KEY]
    return Unfinished(**{**entry, "names": tuple(entry["names"])})
