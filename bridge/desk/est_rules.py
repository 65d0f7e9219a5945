"""A policy's rules for EST: the table `[est.LABEL]`, who may request its certificate, and for which names (pure)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509

from bridge.errors import SettingsProblem
from bridge.pki.bundle import BundledRequest
from bridge.pki.certificates import UNREADABLE, attributes, san_counts, subject_pattern
from bridge.pki.csr import sans_line, subject_line
from bridge.pki.kubeadm_names import is_node_name
from bridge.pki.verify import client_problem
from bridge.words import one_line, one_of

NODE = "{node}"  #: Stands for a node's name in a pattern.
_LABEL = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")
#: The label of URLs without a label.
DEFAULT = "default"
#: The operations (RFC 7030 §3.2.2), whose names no label may have.
_OPERATIONS = ("cacerts", "csrattrs", "simpleenroll", "simplereenroll", "serverkeygen", "fullcmc")


@dataclass(frozen=True, kw_only=True)
class EstRules:
    """Table `[est.LABEL]`: the label's certificate, and its clients; `{node}` stands for the node's name."""

    cluster: str  #: The certificate's cluster, which `allow.clusters` has to allow.
    certificate: str = ""  #: kubeadm's name, or that of a table `[certificate.NAME]`; empty: the label's own.
    #: Subjects of client certificates that may make requests, each with `{node}`, which identifies the requesting node.
    clients: tuple[str, ...] = ()
    clients_ca: Path | None = None  #: The CA certificates that sign them; without it, the CA of the label's.
    secrets: bool = False  #: Also accept the one-time secret of an enrolment, by HTTP Basic.
    validity: timedelta | None = None  #: Without it, the longest that the policy allows.

    def problems(self) -> Iterator[SettingsProblem]:
        """Refuse a label that allows no client, and subjects that name no node."""
        if not self.clients and not self.secrets:
            yield SettingsProblem("clients", "subjects such as CN={node}, or secrets = true", "neither")
        for text in self.clients:
            if text.count(NODE) != 1 or subject_pattern(text, "x") is None:
                yield SettingsProblem("clients", "subjects such as O=agents,CN={node}, with {node} once", repr(text))


def is_label(text: str) -> bool:
    """Whether a label may have this name: one segment of a URL that is not an operation."""
    return _LABEL.fullmatch(text) is not None and text not in _OPERATIONS and ".." not in text


@dataclass(frozen=True, slots=True, kw_only=True)
class Asker:
    """The sender of an EST request, as proven when the request came."""

    label: str
    certificate: x509.Certificate | None  #: The client's, proven in TLS; None: the client has a secret.
    renews: bool  #: The client used `simplereenroll`, which replaces the certificate.
    received: datetime

    @property
    def text(self) -> str:
        """A description for the audit log."""
        operation = "simplereenroll" if self.renews else "simpleenroll"
        by = f"in TLS as {subject_line(self.certificate)}" if self.certificate is not None else "with a one-time secret"
        return f"by EST's {operation} of label {self.label}, {by}"


def node_of(subject: x509.Name, patterns: Sequence[str]) -> str:
    """The node whose subject this is, by one of the patterns; empty: no node's."""
    found = attributes(subject)
    for pattern in patterns:
        for oid, text in subject_pattern(pattern, NODE) or ():
            before, is_there, after = text.partition(NODE)
            for value in [value for other, value in found if other == oid and is_there]:
                node = value.removeprefix(before).removesuffix(after)
                if is_node_name(node) and subject_pattern(pattern, node) == sorted(found):
                    return node
    return ""


def asker_problem(
    asker: Asker, request: BundledRequest, node: str, rules: EstRules | None, anchors: Sequence[x509.Certificate]
) -> str:
    """
    Why today's policy does not let this client ask for this node; empty: it does, and TLS has proven the client.

    `anchors` are the CA certificates that sign the label's clients. The request is judged like any other.
    """
    if rules is None or (rules.certificate or asker.label) != request.name:
        return f"label: wanted one that the policy has for {request.name}, found {asker.label}"
    if asker.certificate is None:
        return "" if rules.secrets else f"label: wanted one for one-time secrets, found {asker.label}"
    try:
        if problem := client_problem(asker.certificate, anchors, asker.received):
            return f"client: {problem}"
        if not node or node_of(asker.certificate.subject, rules.clients) != node:
            return f"client: wanted {one_of(rules.clients)}, found {subject_line(asker.certificate)}"
    except UNREADABLE:
        return "client: wanted a certificate that can be read, found another one"
    return other_names(request.csr, asker.certificate) if asker.renews else ""


def other_names(csr: x509.CertificateSigningRequest, certificate: x509.Certificate) -> str:
    """Why a CSR does not renew a certificate, by subject and SANs (RFC 7030 §4.2.2); empty: it does."""
    text = "wanted that of the certificate which is replaced"
    try:
        if attributes(certificate.subject) != attributes(csr.subject):
            return f"subject: {text} ({subject_line(certificate)}), found {subject_line(csr)}"
        if san_counts(certificate) != san_counts(csr):
            return f"SAN: {text} ({sans_line(certificate)}), found {sans_line(csr)}"
    except UNREADABLE as e:
        return f"wanted names that can be read, found: {one_line(e)}"
    return ""
