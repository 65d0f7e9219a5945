"""What the administrator of an EST server needs, as a page to read: each label's certificates, and who may ask."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from backends.est.server import operation_url
from bridge.contract import Selector, SetupFile, SetupRequest
from bridge.pki.certificates import name_text, san_entries
from bridge.specs import EKU, SPECS, CertificateSpec
from bridge.words import escaped, one_line

_EXAMPLE_URL = "https://est.corp.example"
_DAY_SECONDS = 86400


def files(wanted: SetupRequest) -> Sequence[SetupFile]:
    """One page for the authority; labels as the settings name them, or else one a usage class."""
    each_usage = f"{wanted.authority.name}-{{usage}}"  # whose label gives its own EKUs
    label = Selector(wanted.settings.get("label") or each_usage, wanted.settings.get("labels") or {}, wanted.node)
    by_label: dict[str, list[CertificateSpec]] = {}
    for name in wanted.certificates:
        by_label.setdefault(label(SPECS[name]), []).append(SPECS[name])
    url = str(wanted.settings.get("url", _EXAMPLE_URL)).rstrip("/")
    parts = [_HEAD.format(authority=wanted.authority.name, node=wanted.node, cluster=wanted.cluster)]
    parts += ["\n".join(_label_lines(name, specs, wanted)) for name, specs in by_label.items()]
    parts.append(_ASKER)
    parts.append("\n".join(_settings_lines(wanted, url, label)))
    parts.append("\n".join(_try_lines(url, list(by_label))))
    text = "\n".join(parts) + "\n"
    return [SetupFile(name=f"est-{wanted.authority.name}.txt", text=text)]


_HEAD = """\
EST for authority {authority} of cluster {cluster}, node {node}

An EST request has neither usages nor validity, so each label below needs its own profile at the CA.
The CA must be the node's trust anchor or below it, and must add nothing to subject or SANs.
"""

_ASKER = """\
Who asks
  One agent (client_cert, or username) sends all of the node's requests, by simpleenroll (never simplereenroll).
  Allow it these subjects and SANs, and no others: the holder of a clientAuth certificate with O=system:masters
  or CN=system:kube-controller-manager controls the cluster.
  Do not require a link between TLS and the CSR (tls-unique, RFC 7030 section 3.5).
  If the server answers 202, the node sends the same CSR again; it must count as the same request.
"""


def _label_lines(label: str, specs: Sequence[CertificateSpec], wanted: SetupRequest) -> Iterator[str]:
    usages = {", ".join(eku.label for eku in EKU if eku in spec.ekus) for spec in specs}
    yield f"Label {label}"
    if len(usages) > 1:
        yield "  CAN'T BE USED: these certificates have different usages and need a label each"
    yield f"  extended key usage  {' / '.join(sorted(usages))}, and no other"
    yield "  key usage           digitalSignature, keyEncipherment"
    yield "  basic constraints   CA:FALSE"
    yield f"  validity            {wanted.validity.total_seconds() / _DAY_SECONDS:g} days"
    for spec in specs:
        yield f"  {spec.name}"
        certificate = wanted.certificates[spec.name]
        yield f"    subject           {one_line(name_text(certificate.subject))}"
        yield from (f"    SAN               {kind} {one_line(name)}" for kind, name in sorted(san_entries(certificate)))
    yield ""


def _settings_lines(wanted: SetupRequest, url: str, label: Selector) -> Iterator[str]:
    yield "In the node's settings"
    yield "  [backend.enrol]"
    yield '  type = "est"'
    yield f"  url = {_toml(url)}"
    yield '  ca_file = "/etc/ca-bridge/est-tls-ca.crt"       # pins the server: no other CA is trusted'
    yield '  client_cert = "/etc/ca-bridge/agent.crt"        # with its intermediates; with clientAuth'
    yield '  client_key = "/etc/ca-bridge/agent.key"'
    yield f"  [authority.{wanted.authority.name}]"
    yield '  backend = "enrol"'
    yield f"  label = {_toml(label.pattern)}"
    if label.exceptions:
        yield f"  [authority.{wanted.authority.name}.labels]"
        yield from (f"  {_toml(name)} = {_toml(text)}" for name, text in label.exceptions.items())
    yield ""


def _try_lines(url: str, labels: Sequence[str]) -> Iterator[str]:
    yield "To see the CA behind each label, from the node"
    for label in labels:
        where = shlex.quote(operation_url(url, label, "cacerts"))
        yield f"  curl -sS --fail --cacert /etc/ca-bridge/est-tls-ca.crt {where} |"
        yield "    tr -d '\\r\\n' | openssl base64 -d -A | openssl pkcs7 -inform DER -print_certs -noout"
    yield "To see whether the server accepts the agent: ca-bridge doctor"


def _toml(value: Any) -> str:
    return escaped(json.dumps(value, ensure_ascii=False))
