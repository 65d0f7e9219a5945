"""
Requests whose certificates are not installed yet: new keys, their CSRs, and what the CA has said so far.

All in one file of the state directory, 0600. A key is there before a CA that answers later is asked, and an answer that
passed is there before it is installed, so that no interruption makes a run ask for the same certificate twice.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from bridge.contract import Continuity, Issued, SignRequest
from bridge.node.kubeconfig import FreshKubeconfig
from bridge.pki.certificates import load_pem_certificates, pem
from bridge.specs import SPECS
from bridge.state.store import Store
from bridge.system.state_file import OnDamage, StateFile

#: A later format has another key.
_KEY = "requestsV1"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRequest:
    """One request, and the key that stays here."""

    request: SignRequest
    key_pem: bytes = field(repr=False)
    created: datetime
    run_id: str
    #: Label of the backend whose CA has the request; empty: none has.
    backend: str = ""
    reference: str = ""  #: With which the backend collects the answer.
    note: str = ""  #: The backend's, for the operator.
    answer: Issued | None = None  #: Passed, and is not installed.
    #: SHA-256 of the bundles in which it was carried out of the node.
    bundles: tuple[str, ...] = ()
    kubeconfig: FreshKubeconfig | None = None  #: The file that it belongs in, where there was none.

    @property
    def name(self) -> str:
        """kubeadm's name of the certificate."""
        return self.request.spec.name

    @property
    def is_waiting(self) -> bool:
        """Whether somebody has it who has not answered."""
        return bool(self.reference or self.bundles) and self.answer is None

    @property
    def deadline(self) -> datetime | None:
        """When the certificate that it replaces ends."""
        return self.request.replaces.not_valid_after_utc if self.request.replaces is not None else None


class OpenRequests:
    """The file; its lock is held by whoever changes it."""

    def __init__(self, store: Store) -> None:
        """
        Raises:
            StateError: The file is there and can't be used.
        """
        self._file = requests_file(store)
        self._requests = self._file.read() or {}
        self._saved = dict(self._requests)

    def __iter__(self) -> Iterator[OpenRequest]:
        return iter(list(self._requests.values()))

    def by_name(self) -> dict[str, OpenRequest]:
        """All open requests by certificate name."""
        return dict(self._requests)

    def get(self, name: str) -> OpenRequest | None:
        """The open request for a certificate."""
        return self._requests.get(name)

    def put(self, request: OpenRequest) -> None:
        """Add or replace; on disk after `save`."""
        self._requests[request.name] = request

    def drop(self, name: str) -> OpenRequest | None:
        """Forget a request and its key; on disk after `save`."""
        return self._requests.pop(name, None)

    def save(self) -> None:
        """
        Make it safe on disk, if anything changed.

        A key that was dropped is overwritten by nothing: a journaling file system or an SSD writes elsewhere.

        Raises:
            StateError: It can't be written.
        """
        if self._requests == self._saved:
            return
        if self._requests:
            self._file.replace({_KEY: [_to_json(request) for request in self._requests.values()]})
        else:
            self._file.remove()
        self._saved = dict(self._requests)


class Unkept(OpenRequests):
    """The requests of a run that throws them and their keys away: in memory alone."""

    def __init__(self) -> None:
        self._requests = {}

    def save(self) -> None:
        """Write nothing."""


def requests_file(store: Store) -> StateFile[dict[str, OpenRequest]]:
    """The requests that are not finished, with their keys, by name."""
    return StateFile(
        path=store.requests,
        what="the requests that were made and not finished, with their keys",
        parse=lambda document: {request.name: request for request in map(_from_json, document[_KEY])},
        keys=frozenset({_KEY}),
        on_damage=OnDamage.REFUSE,
        afterwards="new keys are made then; what a CA has signed for the old ones is worth nothing without them",
    )


def _to_json(one: OpenRequest) -> dict[str, Any]:
    request, who = one.request, one.request.continuity
    return {
        "name": request.spec.name,
        "created": one.created.isoformat(),
        "run": one.run_id,
        "key": one.key_pem.decode(),
        "csr": request.csr_pem.decode(),
        "validitySeconds": int(request.validity.total_seconds()),
        "replaces": pem(request.replaces).decode() if request.replaces is not None else None,
        "continuity": None
        if who is None
        else {
            "batch": who.batch,
            "node": who.node,
            "cluster": who.cluster,
            "proof": b64encode(who.proof).decode() if who.proof is not None else None,
            "asked": who.asked.isoformat() if who.asked is not None else None,
        },
        "backend": one.backend,
        "reference": one.reference,
        "note": one.note,
        "answer": [pem(certificate).decode() for certificate in (one.answer.leaf, *one.answer.intermediates)]
        if one.answer is not None
        else None,
        "bundles": list(one.bundles),
        **({"kubeconfig": _kubeconfig_json(one.kubeconfig)} if one.kubeconfig is not None else {}),
    }


def _kubeconfig_json(one: FreshKubeconfig) -> dict[str, str]:
    return {"server": one.server, "cluster": one.cluster, "user": one.user, "ca": one.ca_pem.decode()}


def _kubeconfig(entry: Mapping[str, str]) -> FreshKubeconfig:
    return FreshKubeconfig(
        server=entry["server"], cluster=entry["cluster"], user=entry["user"], ca_pem=entry["ca"].encode()
    )


def _from_json(entry: Mapping[str, Any]) -> OpenRequest:
    who, answer = entry["continuity"], entry["answer"]
    request = SignRequest(
        spec=SPECS[entry["name"]],
        csr_pem=entry["csr"].encode(),
        validity=timedelta(seconds=entry["validitySeconds"]),
        replaces=load_pem_certificates(entry["replaces"].encode())[0] if entry["replaces"] is not None else None,
        continuity=None
        if who is None
        else Continuity(
            batch=who["batch"],
            node=who["node"],
            cluster=who["cluster"],
            proof=b64decode(who["proof"]) if who["proof"] is not None else None,
            # an earlier version of the program has not written it
            asked=datetime.fromisoformat(who["asked"]) if who.get("asked") is not None else None,
        ),
    )
    chain = load_pem_certificates("".join(answer).encode()) if answer is not None else None
    return OpenRequest(
        request=request,
        key_pem=entry["key"].encode(),
        created=datetime.fromisoformat(entry["created"]),
        run_id=entry["run"],
        backend=entry["backend"],
        reference=entry["reference"],
        note=entry["note"],
        answer=Issued(leaf=chain[0], intermediates=tuple(chain[1:])) if chain is not None else None,
        bundles=tuple(entry["bundles"]),
        # only of a kubeconfig that is made anew
        kubeconfig=_kubeconfig(entry["kubeconfig"]) if "kubeconfig" in entry else None,
    )
