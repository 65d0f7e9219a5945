"""Users' requests that a CA has not answered yet; what is made on this machine has its key here, as in `requests.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from bridge.contract import Continuity, SignRequest
from bridge.specs import USER
from bridge.state.store import Store
from bridge.system.state_file import OnDamage, StateFile

_KEY = "usersV1"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenUser:
    """One request for a user that was not answered, and its key."""

    name: str  #: Kubernetes' user name.
    groups: tuple[str, ...]
    csr_pem: bytes
    key_pem: bytes | None = field(repr=False)  #: None: the user has it.
    validity: timedelta
    created: datetime
    backend: str  #: Label of the backend whose CA is asked.
    reference: str = ""  #: With which it collects the answer; empty: it is not known that the CA has the request.
    carried: Continuity | None = None  #: Who asks, where the request is carried to a desk; there is no proof in it.

    @property
    def request(self) -> SignRequest:
        """The request as it is sent."""
        return SignRequest(spec=USER, csr_pem=self.csr_pem, validity=self.validity, continuity=self.carried)


def waiting_file(store: Store) -> StateFile[dict[str, OpenUser]]:
    """The file with open requests, by the user's name."""
    return StateFile(
        path=store.users,
        what="the requests for users that were not answered, with their keys",
        parse=lambda document: {one.name: one for one in map(_from_json, document[_KEY])},
        keys=frozenset({_KEY}),
        on_damage=OnDamage.REFUSE,
        afterwards="ask again for the users that waited",
    )


def save(store: Store, waiting: Mapping[str, OpenUser]) -> None:
    """
    Raises:
        StateError: It can't be written.
    """
    file = waiting_file(store)
    if waiting:
        file.replace({_KEY: [_to_json(one) for one in waiting.values()]})
    else:
        file.remove()


def _to_json(one: OpenUser) -> dict[str, Any]:
    return {
        "name": one.name,
        "groups": list(one.groups),
        "csr": one.csr_pem.decode(),
        "key": one.key_pem.decode() if one.key_pem is not None else None,
        "validitySeconds": int(one.validity.total_seconds()),
        "created": one.created.isoformat(),
        "backend": one.backend,
        "reference": one.reference,
        **({"carried": _carried_json(one.carried)} if one.carried is not None else {}),
    }


def _from_json(entry: Mapping[str, Any]) -> OpenUser:
    return OpenUser(
        name=entry["name"],
        groups=tuple(entry["groups"]),
        csr_pem=entry["csr"].encode(),
        key_pem=entry["key"].encode() if entry["key"] is not None else None,
        validity=timedelta(seconds=entry["validitySeconds"]),
        created=datetime.fromisoformat(entry["created"]),
        backend=entry["backend"],
        reference=entry["reference"],
        carried=_carried(entry["carried"]) if "carried" in entry else None,
    )


def _carried_json(carried: Continuity) -> dict[str, str]:
    asked = carried.asked.isoformat() if carried.asked is not None else ""
    return {"batch": carried.batch, "node": carried.node, "cluster": carried.cluster, "asked": asked}


def _carried(entry: Mapping[str, str]) -> Continuity:
    asked = datetime.fromisoformat(entry["asked"])
    return Continuity(batch=entry["batch"], node=entry["node"], cluster=entry["cluster"], proof=None, asked=asked)
