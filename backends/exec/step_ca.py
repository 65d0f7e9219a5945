"""
What the administrator of a step-ca needs, where the settings name the program `config/exec/step-ca`: a provisioner for
each profile, whose template signs this node's certificates and nothing else.

A holder of a provisioner's password chooses subject and SANs, and every client can fetch the provisioner's encrypted key
from the CA: so the template has each subject with its SANs (as step-ca 0.30 writes both), and refuses any other.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import NameOID

from bridge.contract import Selector, SetupFile, SetupRequest
from bridge.errors import BridgeError
from bridge.pki.certificates import san_entries
from bridge.specs import EKU, SPECS
from bridge.words import one_line

#: The name of the program by which it is known in `command`.
NAME = "step-ca"

#: step-ca's fields of a subject, in the order in which it writes them.
_FIELDS = {
    NameOID.COUNTRY_NAME: "country",
    NameOID.ORGANIZATION_NAME: "organization",
    NameOID.ORGANIZATIONAL_UNIT_NAME: "organizationalUnit",
    NameOID.LOCALITY_NAME: "locality",
    NameOID.STATE_OR_PROVINCE_NAME: "province",
    NameOID.STREET_ADDRESS: "streetAddress",
    NameOID.POSTAL_CODE: "postalCode",
    NameOID.SERIAL_NUMBER: "serialNumber",
    NameOID.COMMON_NAME: "commonName",
}
_SINGLE = ("serialNumber", "commonName")
#: What Go's encoder escapes, since JSON may stand in HTML.
_ESCAPED = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"})

_SCRIPT = """\
#!/bin/sh
# The provisioners of step-ca for {authority} of cluster {cluster}, for the certificates of {node}.
# Run it as step-ca's user on the CA's host, or by its admin API from elsewhere:
#
#   {name} PASSWORD_FILE [FLAG …]
#
# PASSWORD_FILE is to protect the new provisioners' keys. Every client of the CA can fetch these keys and try
# passwords: make it by `openssl rand -hex 32`, and give this node a copy (mode 0600), which `command` names.
# The flags go to `step ca provisioner` as they are, such as --ca-config, --ca-url and --root.
#
# Each template signs the subjects in it, each with its SANs or fewer, and has no other usages: a default template adds
# both usages, and the CN as a SAN. Certificates can't be renewed at the CA by their own key.
# Where the provisioner is there already, its template and claims are replaced, and its key stays.
set -eu
[ $# -ge 1 ] || {{ echo "usage: $0 PASSWORD_FILE [FLAG …]" >&2; exit 2; }}
password=$1
shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
provisioner() {{
  name=$1
  shift
  step ca provisioner add "$name" --type JWK --create --password-file "$password" "$@" 2>"$work/err" ||
    step ca provisioner update "$name" "$@" || {{ cat "$work/err" >&2; exit 1; }}
}}
{provisioners}"""

_PROVISIONER = """
cat >"$work/template" <<'TEMPLATE'
{template}TEMPLATE
provisioner {name} --x509-template "$work/template" --x509-default-dur {seconds}s --x509-max-dur {seconds}s \\
  --disable-renewal "$@"
"""

_TEMPLATE = """\
{{{{- $allowed := dict{allowed} -}}}}
{{{{- $subject := toJson .Insecure.CR.Subject -}}}}
{{{{- if not (hasKey $allowed $subject) -}}}}
{{{{- fail (printf "this provisioner has no certificate for %s" $subject) -}}}}
{{{{- end -}}}}
{{{{- $csr := .Insecure.CR -}}}}
{{{{- $names := or $csr.DNSNames $csr.IPAddresses $csr.EmailAddresses $csr.URIs -}}}}
{{{{- if $names -}}}}
{{{{- range .SANs -}}}}
{{{{- if not (has .Value (get $allowed $subject)) -}}}}
{{{{- fail (printf "this provisioner gives %s no SAN %s" $subject .Value) -}}}}
{{{{- end -}}}}
{{{{- end -}}}}
{{{{- end -}}}}
{{
  "subject": {{{{ $subject }}}},
{{{{- if $names }}}}
  "sans": {{{{ toJson .SANs }}}},
{{{{- end }}}}
  "keyUsage": ["digitalSignature", "keyEncipherment"],
  "extKeyUsage": {ekus}
}}
"""


def provisioners(wanted: SetupRequest, profile: Selector) -> SetupFile:
    """Make a script with a provisioner for each profile of the authority's certificates (BridgeError: none can sign one)."""
    by_profile: dict[str, list[str]] = {}
    for name in wanted.certificates:
        by_profile.setdefault(profile(SPECS[name]), []).append(name)
    file = f"step-ca-{wanted.authority.name}.sh"
    text = _SCRIPT.format(
        authority=wanted.authority.name,
        cluster=one_line(wanted.cluster),
        node=one_line(wanted.node),
        name=file,
        provisioners="".join(
            _PROVISIONER.format(
                template=_template(names, wanted.certificates),
                name=shlex.quote(found),
                seconds=-(-wanted.validity // timedelta(seconds=1)),
            )
            for found, names in by_profile.items()
        ),
    )
    return SetupFile(name=file, text=text, executable=True, by_node="{node}" in profile.pattern)


def is_meant(command: Iterable[str]) -> bool:
    """Whether the settings name the shipped program for step-ca."""
    return Path(next(iter(command), "")).name == NAME


def _template(names: Iterable[str], certificates: Mapping[str, x509.Certificate]) -> str:
    ekus: set[frozenset[EKU]] = set()
    allowed: dict[str, set[str]] = {}
    for name in names:
        ekus.add(SPECS[name].ekus)
        allowed.setdefault(_subject(name, certificates[name]), set()).update(_sans(name, certificates[name]))
    if len(ekus) != 1:
        text = f"wanted a provisioner for one usage class, found one for {', '.join(names)}"
        raise BridgeError(text, hint="have {usage} in `profile`")
    entries = (
        f"\n  {_quoted(one)} (list{''.join(f' {_quoted(san)}' for san in sorted(sans))})"
        for one, sans in allowed.items()
    )
    return _TEMPLATE.format(allowed="".join(entries), ekus=json.dumps(sorted(one.label for one in ekus.pop())))


def _subject(name: str, certificate: x509.Certificate) -> str:
    """The subject as step-ca's `toJson` writes it."""
    found: dict[str, list[str]] = {field: [] for field in _FIELDS.values()}
    for attribute in certificate.subject:
        field = _FIELDS.get(attribute.oid)
        if field is None or not isinstance(attribute.value, str) or (field in _SINGLE and found[field]):
            text = (
                f"{name}: wanted a subject of attributes that step-ca knows, found {attribute.rfc4514_attribute_name}"
            )
            raise BridgeError(text, hint="have another CA renew this certificate")
        found[field].append(attribute.value)
    fields = {field: values[0] if field in _SINGLE else values for field, values in found.items() if values}
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).translate(_ESCAPED)


def _sans(name: str, certificate: x509.Certificate) -> Iterable[str]:
    entries = san_entries(certificate)
    if other := sorted(kind for kind, _ in entries if kind not in {"DNS", "IP", "email", "URI"}):
        text = f"{name}: wanted SANs of types DNS, IP, email and URI, found {', '.join(other)}"
        raise BridgeError(text, hint="have another CA renew this certificate")
    return (value for _, value in entries)


def _quoted(text: str) -> str:
    """A string of Go's templates on one line."""
    return json.dumps(text, ensure_ascii=False)
