"""
Which signers sign hostile requests: the same requests to our gateway, kubelet-csr-approver's rules and other signers.

usage: python -m tests.measure.comparison [WHERE]      three minutes; writes docs/evidence/gateway-comparison.md
and a table of docs/comparison.md, or WHERE alone

Each has a real API server, and a CA that signs everything it gets.
"""

from __future__ import annotations

import base64
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import requests

from bridge.gateway.rules import CLIENT_KUBELET, SERVING
from tests.kit import cert_manager, csr_approver, gateways, hostile_csrs, kube_api, openbao
from tests.kit.api_client import CSRS
from tests.kit.cluster_api import BOOTSTRAP_GROUP
from tests.kit.gateways import Place, state_of
from tests.kit.hostile_csrs import Asking, Case
from tests.kit.issuing import Signer
from tests.kit.kube_api import ApiServer
from tests.measure.__main__ import write_between

PAGE = Path(__file__).resolve().parents[2] / "docs/evidence/gateway-comparison.md"
START = "<!-- numbers: written by `python -m tests.measure.comparison` -->"
ISSUER = "clusterissuers.cert-manager.io/corp"
#: Long after the last of them has been looked at; each needs milliseconds.
QUIET_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Column:
    """One who judges or signs."""

    name: str
    note: str
    #: By number of the case: what became of it; without an entry the API server itself refused it.
    states: dict[int, str] = field(default_factory=dict)
    twins: dict[str, int] = field(default_factory=dict)  #: How many honest requests were signed, by signer.


def ask(api: ApiServer, asking: Asking, name: str, signer: str | None = None) -> bool:
    """Create the object as its requester; False: the API server itself refuses it."""
    made = gateways.body(
        asking.pem, signer or asking.signer, usages=asking.usages or gateways.USAGES.get(asking.signer), name=name
    )
    headers = {"Impersonate-User": asking.user, "Impersonate-Group": asking.group}
    return api.cluster.client().ask("POST", CSRS, made, **headers).status == 201


def flood(api: ApiServer, cases: Sequence[Case], signer: str | None = None) -> set[int]:
    """All of them; the numbers of those that the API server takes."""
    made = [(number, case.make(case.worker)) for number, case in enumerate(cases)]
    return {number for number, asking in made if ask(api, asking, f"case-{number}", signer)}


def twins(api: ApiServer, cases: Sequence[Case], signer: str | None = None) -> dict[str, str]:
    """What twenty workers may have; signers by the object's name."""
    found = {}
    for case in cases[:20]:
        for kind in (CLIENT_KUBELET, SERVING):
            name = f"twin-{case.worker}-{kind.rpartition('/')[2]}"
            assert ask(api, hostile_csrs.honest(case.worker, kind), name, signer), name
            found[name] = kind
    return found


def settle(api: ApiServer) -> dict[str, str]:
    """States by name, once nothing has changed for a while."""
    last: dict[str, str] = {}
    since = time.monotonic()
    while time.monotonic() - since < QUIET_SECONDS:
        time.sleep(0.5)
        with contextlib.suppress(requests.RequestException):
            items = api.cluster.client().get(CSRS)["items"]
            found: dict[str, str] = {one["metadata"]["name"]: state_of(one) for one in items}
            if found != last:
                last, since = found, time.monotonic()
    return last


def read(column: Column, api: ApiServer, numbers: set[int], honest: Mapping[str, str]) -> Column:
    """What became of all."""
    states = settle(api)
    column.states.update({number: states[f"case-{number}"] for number in numbers})
    for name, signer in honest.items():
        column.twins[signer] = column.twins.get(signer, 0) + (states[name] == "signed")
    return column


def our_gateway(directory: Path, cases: Sequence[Case]) -> Column:
    """With a CA that signs verbatim."""
    column = Column(name="ca-bridge gateway", note="the example policy and an inventory; OpenBao's `sign-verbatim`")
    with kube_api.serving(directory) as api, openbao.dev_server() as bao:
        prepared(api, cases)
        gateways.grant_rights(api.cluster)
        inventory = gateways.INVENTORY + gateways.workers(*(case.worker for case in cases))
        place = Place(
            cluster=api.cluster, directory=directory / "gateway", inventory=inventory,
            gateway={"requester_rate": 100_000, "node_rate": 100_000},
        ).with_vault(bao)  # fmt: skip
        place.tables = [
            text.replace('type = "vault"', 'type = "vault"\nmode = "sign-verbatim"') for text in place.tables
        ]
        numbers, honest = flood(api, cases), twins(api, cases)
        with gateways.running(place):
            return read(column, api, numbers, honest)


def controller_manager(directory: Path, cases: Sequence[Case]) -> tuple[Column, Column]:
    """Its approver and signer for kubelets' clients, and its signer behind kubelet-csr-approver's rules."""
    approver = Column(
        name="kube-controller-manager",
        note="its own approver with kubeadm's two bindings, and its own signer with a CA's key",
    )
    rules = Column(
        name="kubelet-csr-approver's rules",
        note="the rules of version 1.2 with its defaults, written again in Python (the Go module proxy does not have the "
        "original), and kube-controller-manager's signer; it judges only serving certificates",
    )
    with kube_api.serving(directory) as api:
        prepared(api, cases)
        numbers, honest = flood(api, cases), twins(api, cases)
        approve_by_rules(api, cases)
        ca = api.cluster.ca
        api.start_controller_manager(Signer(certificate=ca.certificate, key=ca.key))
        read(approver, api, numbers, honest)
    rules.states.update({n: s for n, s in approver.states.items() if signer_of(cases[n]) == SERVING})
    rules.twins[SERVING] = approver.twins.pop(SERVING)
    for number in rules.states:
        del approver.states[number]
    return approver, rules


def approve_by_rules(api: ApiServer, cases: Sequence[Case]) -> None:
    """Approve or deny each serving request as the rules say; what they can't read they leave alone."""
    resolved: dict[str, list[str]] = {"cp1": ["203.0.113.11"], "cp2": ["203.0.113.12"]}
    for case in cases:
        address = gateways.address_of(case.worker)
        resolved |= {case.worker: [address], f"{case.worker}.example.com": [address]}
    for one in api.admin.csrs():
        if one["spec"]["signerName"] != csr_approver.SIGNER:
            continue
        with contextlib.suppress(ValueError):
            why = csr_approver.verdict(one["spec"], base64.b64decode(one["spec"]["request"]), resolved)
            api.admin.decide(one["metadata"]["name"], "Denied" if why else "Approved")


def certmanager(directory: Path, cases: Sequence[Case]) -> Column:
    """Its signer, once a person has approved: it never approves by itself."""
    column = Column(
        name="cert-manager's signer",
        note="version 1.21 with a CA ClusterIssuer, under its own signer name; the test approves every request first, "
        "since cert-manager leaves approval to others",
    )
    with kube_api.serving(directory) as api:
        prepared(api, cases)
        numbers, honest = flood(api, cases, ISSUER), twins(api, cases, ISSUER)
        for one in api.admin.csrs():
            api.admin.decide(one["metadata"]["name"])
        cert_manager.start(api, "corp", api.cluster.ca.certificate, api.cluster.ca.key)
        return read(column, api, numbers, honest)


def prepared(api: ApiServer, cases: Sequence[Case]) -> None:
    """Node objects, and the rights that kubeadm gives requesters."""
    for name in ("cp1", *dict.fromkeys(case.worker for case in cases)):
        api.cluster.add_node(name)
    groups = {"kubeadm:node-autoapprove-bootstrap": ("nodeclient", BOOTSTRAP_GROUP),
              "kubeadm:node-autoapprove-certificate-rotation": ("selfnodeclient", "system:nodes")}  # fmt: skip
    for name, (role, group) in groups.items():
        api.apply(f"""
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {{name: "{name}"}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: "system:certificates.k8s.io:certificatesigningrequests:{role}"}}
subjects: [{{apiGroup: rbac.authorization.k8s.io, kind: Group, name: "{group}"}}]
""")
    api.apply("""
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: all-users-ask-more}
rules: [{apiGroups: [certificates.k8s.io], resources: [certificatesigningrequests], verbs: [create]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: all-users-ask-more}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: all-users-ask-more}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: Group, name: "system:authenticated"}]
""")


# --- the page ---------------------------------------------------------------------------------------------------------


def signer_of(case: Case) -> str:
    """The signer that it asks."""
    return case.make(case.worker).signer


_WRITTEN = (
    "Written by `python -m tests.measure.comparison` on {day:%Y-%m-%d}, with Kubernetes 1.37.\n"
    "The test sends {count} requests that no signer should sign to a real API server, for each of these to answer:"
)
_TRADES = (
    "They do not all have the same task: kube-controller-manager and cert-manager leave to an approver the decisions that "
    "the gateway's policy makes, and kubelet-csr-approver judges the requests of one signer."
)
_WORDS = (
    "**signed**: the request got a certificate; no: it was denied or failed, or got none; -: it is for another signer, or "
    "the API server itself refuses it."
)


def page(cases: Sequence[Case], columns: Sequence[Column]) -> str:
    """Two tables: how many, and which."""
    lines = [
        "# Which signers sign hostile requests",
        "",
        _WRITTEN.format(day=datetime.now(UTC), count=len(cases)),
        "",
        *(f"- {column.name}: {column.note}." for column in columns),
        "",
        "The CA behind each signer signs everything it gets, so the tables show only the signer's own rules.",
        _TRADES,
        "",
        *table(["", *(column.name for column in columns)], summary(columns)),
        "",
        "## Each request",
        "",
        _WORDS,
        "",
        *table(["request", *(column.name for column in columns)], rows(cases, columns)),
    ]
    return "\n".join(lines) + "\n"


def summary(columns: Sequence[Column]) -> Iterator[list[str]]:
    """Counts."""
    yield ["hostile requests that reached it", *(str(len(column.states)) for column in columns)]
    signed = [sum(state == "signed" for state in column.states.values()) for column in columns]
    yield ["**hostile requests signed**", *(f"**{count}**" for count in signed)]
    for signer in (CLIENT_KUBELET, SERVING):
        name = signer.rpartition("/")[2]
        reported = [f"{column.twins[signer]} of 20" if signer in column.twins else "-" for column in columns]
        yield [f"honest requests signed, {name}", *reported]


def rows(cases: Sequence[Case], columns: Sequence[Column]) -> Iterator[list[str]]:
    """One a case."""
    for number, case in enumerate(cases):
        states = [column.states.get(number) for column in columns]
        words = ["-" if state is None else "**signed**" if state == "signed" else "no" for state in states]
        yield [case.name.replace("|", "\\|").replace("*", "\\*"), *words]


def table(head: Sequence[str], body: Iterator[list[str]]) -> list[str]:
    """In Markdown."""
    return [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *(f"| {' | '.join(row)} |" for row in body)]


def compare(directory: Path, cases: Sequence[Case]) -> list[Column]:
    """All of them, one after the other."""
    makers: list[Callable[[Path, Sequence[Case]], Any]] = [our_gateway, controller_manager, certmanager]
    columns: list[Column] = []
    for maker in makers:
        place = directory / maker.__name__
        place.mkdir(parents=True)
        found = maker(place, cases)
        columns += found if isinstance(found, tuple) else [found]
    return columns


def main() -> int:
    """Write the page; exit 1 if ours signed one."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    cases, began = hostile_csrs.cases(), datetime.now(UTC)
    with tempfile.TemporaryDirectory(prefix="comparison-") as directory:
        columns = compare(Path(directory), cases)
    target.write_text(page(cases, columns), encoding="utf-8")
    if target == PAGE:
        counts = "\n".join(table(["", *(column.name for column in columns)], summary(columns)))
        write_between(PAGE.parents[1] / "comparison.md", START, f"{counts}\n")
    print(f"wrote {target} after {(datetime.now(UTC) - began) // timedelta(seconds=1)} s")
    return int("signed" in columns[0].states.values())


if __name__ == "__main__":
    sys.exit(main())
