"""
The settings of the backend `exec` and the environment of its program, and what the program's author needs: the requests
that it will get, and a way to try it.

Where the settings name the program `config/exec/step-ca`, its administrator gets a provisioner for each profile, whose
template signs this node's certificates and nothing else. A holder of a provisioner's password chooses subject and SANs, and
every client can fetch the provisioner's encrypted key from the CA: so the template has each subject with its SANs (as
step-ca 0.30 writes both), and refuses any other.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import NameOID

from bridge.contract import BackendSettings, Selector, SetupFile, SetupRequest
from bridge.errors import BridgeError, SettingsError, SettingsProblem
from bridge.pki.certificates import extension, san_entries, san_entry
from bridge.specs import EKU, SPECS, CertificateSpec
from bridge.words import one_line

#: Variables that describe the request.
_OURS = re.compile(
    r"CA_BRIDGE_\w+|CERTMONGER_(?:OPERATION|CSR|CA_PROFILE|CA_NICKNAME|CA_COOKIE|SPKI|KEY_TYPE|REQ_(?:SUBJECT|HOSTNAME|IP_ADDRESS|EMAIL))"
)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
#: Names of variables that hold a secret, not the place of a secret.
_SECRET = re.compile(r"(?:PASSW|PASSPHRASE|SECRET|TOKEN)(?!\w*_(?:FILE|PATH|DIR|URL|URI|ARN)$)", re.IGNORECASE)
#: Bytes of a variable, its name and `=` included (Linux: 32 pages and no more, MAX_ARG_STRLEN, one for the NUL).
LONGEST_VARIABLE = (32 << 12) - 1


@dataclass(frozen=True, kw_only=True)
class ExecSettings(BackendSettings):
    """Keys of a backend of type `exec`."""

    command: tuple[str, ...]  #: The program's path and its arguments; no shell reads them.
    #: A pattern: `{name}` is the certificate, `{usage}` its usage class (server, client, peer), `{node}` the node.
    #: The program gets it as CERTMONGER_CA_PROFILE.
    profile: str = "{usage}"
    profiles: dict[str, str] = field(default_factory=dict)  #: Other profiles, by certificate or usage class.
    #: Further variables for the program; they may say where a secret is, but hold none.
    environment: dict[str, str] = field(default_factory=dict)
    #: Whether the program takes names from CA_BRIDGE_URIS, CA_BRIDGE_DNS and CA_BRIDGE_COMMON_NAME, and none from the
    #: CSR, as pods need it; certmonger's own helpers don't.
    names_beside_csr: bool = False
    user: str = ""  #: The user (with its groups) that runs the program; if empty, the user of ca-bridge.

    def programs(self) -> Sequence[str]:
        """The command's program."""
        return self.command[:1]

    def problems(self) -> Iterator[SettingsProblem]:
        """Find a command without a program, and variables that are ours or would hold a secret."""
        if not self.command or not self.command[0].startswith("/"):
            found = repr(self.command[0]) if self.command else "an empty list"
            yield SettingsProblem("command", "a program's absolute path, then its arguments", found)
        if any("\0" in word for word in self.command):
            yield SettingsProblem("command", "texts without NUL characters", "one")
        yield from Selector(self.profile, self.profiles, self.node).problems("profile", "profiles", self.pairs)
        for name, value in self.environment.items():
            yield from _variable_problems(name, value)


def _variable_problems(name: str, value: str) -> Iterator[SettingsProblem]:
    key = f"environment.{name}"
    if not _VARIABLE.fullmatch(name):
        yield SettingsProblem(key, "letters, digits and underscores", repr(name))
    elif _OURS.fullmatch(name):
        yield SettingsProblem(key, "a variable that ca-bridge does not set itself", name)
    elif _SECRET.search(name):
        wanted = f"no secret in the settings or in an environment: {name}_FILE, say, with the path of a file"
        yield SettingsProblem(key, wanted, "a value")
    if "\0" in value or len(f"{name}={value}".encode()) > LONGEST_VARIABLE:
        yield SettingsProblem(key, f"at most {LONGEST_VARIABLE} bytes, without NUL characters", "something else")


#: A program's environment, beside HOME and the settings' variables; nothing comes from our own environment.
ENVIRONMENT: Mapping[str, str] = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "SHELL": "/bin/sh",
    "TERM": "dumb",
    "LC_ALL": "C.UTF-8",
}


def ekus_text(spec: CertificateSpec) -> str:
    """RFC 5280's names with commas, as openssl takes them: `serverAuth,clientAuth`."""
    return ",".join(sorted((eku.label for eku in spec.ekus), reverse=True))


# --- for the CA's administrator ---------------------------------------------------------------------------------------

_LONGEST_CELL = 4000
#: The program while the settings name none.
PROGRAM = ("/usr/local/libexec/ca-bridge/program",)

_TEXT = """\
#!/bin/sh
# The requests of ca-bridge on {node} (cluster {cluster}) to the program of {authority}:
#
{table}
#
# The CSR has a subject and SANs but no usages: the program must add exactly the EKUS above, with key usage
# digitalSignature and keyEncipherment, for {days} days.
#
#   try-{authority}.sh NAME [OPERATION]
#
# runs the program as ca-bridge does, with a throwaway key, and prints its exit status. The default OPERATION, SUBMIT,
# gets a real certificate.
set -eu
{as_user}case ${{1:-}} in
{cases}
  *) echo "usage: $0 NAME [OPERATION]" >&2; exit 2 ;;
esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$work/key" -out "$work/csr" \\
  -subj "$subject" ${{sans:+-addext "subjectAltName=$sans"}} 2>/dev/null
status=0
env -i {environment} HOME="$HOME" \\
  CERTMONGER_OPERATION="${{2:-SUBMIT}}" CERTMONGER_CSR="$(cat "$work/csr")" CERTMONGER_CA_PROFILE="$profile" \\
  CERTMONGER_CA_NICKNAME={authority} CA_BRIDGE_AUTHORITY={authority} CA_BRIDGE_CERTIFICATE="$1" \\
  CA_BRIDGE_NODE={quoted_node} CA_BRIDGE_USAGE="$usage" CA_BRIDGE_EKUS="$ekus" CA_BRIDGE_DAYS={days} CA_BRIDGE_VALIDITY_SECONDS={seconds} \\
  {command} || status=$?
echo "status $status" >&2
exit "$status"
"""

_AS_USER = """\
[ "$(id -u)" != 0 ] || exec runuser -u {user} -- env HOME="$(getent passwd {user} | cut -d: -f6)" sh "$0" "$@"
"""


def setup_files(wanted: SetupRequest) -> list[SetupFile]:
    """Write a script that tries the authority's program, for step-ca also one with provisioners; for pods a text."""
    if wanted.patterns:
        return [SetupFile(name=f"{wanted.authority.name}.txt", text="".join(_beside(wanted)))]
    settings = ExecSettings(**{"command": PROGRAM, **wanted.settings})
    profile = Selector(settings.profile, settings.profiles, wanted.node)
    if problems := list(profile.problems("profile", "profiles")):
        raise SettingsError(problems)
    rows = [
        (name, profile(SPECS[name]), ekus_text(SPECS[name]), subject_text(certificate), sans_text(certificate))
        for name, certificate in wanted.certificates.items()
    ]
    head = ("NAME", "PROFILE", "EKUS", "SUBJECT", "SANS")
    # a line break in a CA's certificate would end the comment, and the shell would run the rest
    lines = [[one_line(cell, _LONGEST_CELL) for cell in row] for row in (head, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    row = "# " + "  ".join(f"{{:{width}}}" for width in widths)
    table = "\n".join(row.format(*line).rstrip() for line in lines)
    text = _TEXT.format(
        node=one_line(wanted.node),
        cluster=one_line(wanted.cluster),
        quoted_node=shlex.quote(wanted.node),
        authority=wanted.authority.name,
        table=table,
        as_user=_AS_USER.format(user=shlex.quote(settings.user)) if settings.user not in ("", "root") else "",
        cases="\n".join(_case(*row) for row in rows),
        days=-(-wanted.validity // timedelta(days=1)),
        seconds=int(wanted.validity.total_seconds()),
        environment=_assignments({**ENVIRONMENT, **settings.environment}),
        command=shlex.join(settings.command),
    )
    tries = SetupFile(name=f"try-{wanted.authority.name}.sh", text=text, executable=True, by_node=True)
    return [*([provisioners(wanted, profile)] if Path(*settings.command[:1]).name == "step-ca" else []), tries]


def _beside(wanted: SetupRequest) -> Iterator[str]:
    """The variables for a program that gets names beside the CSR, and the certificate that it has to make."""
    yield "The CSR is empty: subject and SANs are those of the variables, one name a line, and no others.\n"
    yield "Below an empty subject the SANs are critical; a certificate begins less than 5 minutes ago.\n"
    for pattern in wanted.patterns:
        yield f"CA_BRIDGE_CERTIFICATE={pattern.spec.name}: CA_BRIDGE_EKUS={ekus_text(pattern.spec)}\n"
        yield f"  CA_BRIDGE_VALIDITY_SECONDS: at most {int(pattern.longest.total_seconds())}\n"
        for name, values in (("URIS", pattern.uris), ("DNS", pattern.dns), ("COMMON_NAME", pattern.common_names)):
            yield f"  CA_BRIDGE_{name}: {one_line(', '.join(values), _LONGEST_CELL) or 'empty'}\n"


def _case(name: str, profile: str, ekus: str, subject: str, sans: str) -> str:
    values = {"profile": profile, "usage": SPECS[name].usage, "ekus": ekus, "subject": subject, "sans": sans}
    return f"  {name}) {_assignments(values)} ;;"


def _assignments(values: Mapping[str, str]) -> str:
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in values.items())


def subject_text(certificate: x509.Certificate) -> str:
    """The subject for `openssl req -subj`: in the certificate's own order, with special characters escaped."""
    special = re.compile(r"[/\\+]")
    values = (
        (attribute.rfc4514_attribute_name, special.sub(r"\\\g<0>", str(attribute.value)))
        for attribute in certificate.subject
    )
    return "".join(f"/{name}={value}" for name, value in values)


def sans_text(certificate: x509.Certificate) -> str:
    """The SANs for `openssl req -addext subjectAltName=`; empty: there are none."""
    entries = map(san_entry, extension(certificate, x509.SubjectAlternativeName) or ())
    return ",".join(f"{kind}:{value}" for kind, value in entries if kind in {"DNS", "IP", "email"})


# --- step-ca ----------------------------------------------------------------------------------------------------------

#: step-ca's fields of a subject, in the order in which it writes them.
_STEP_CA_FIELDS = {
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
#: Characters that Go's JSON encoder escapes, in case the JSON is in HTML.
_ESCAPED = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"})

_STEP_CA_SCRIPT = """\
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

_STEP_CA_TEMPLATE = """\
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
    text = _STEP_CA_SCRIPT.format(
        authority=wanted.authority.name,
        cluster=one_line(wanted.cluster),
        node=one_line(wanted.node),
        name=file,
        provisioners="".join(
            _PROVISIONER.format(
                template=_step_ca_template(names, wanted.certificates),
                name=shlex.quote(provisioner),
                seconds=-(-wanted.validity // timedelta(seconds=1)),
            )
            for provisioner, names in by_profile.items()
        ),
    )
    return SetupFile(name=file, text=text, executable=True, by_node="{node}" in profile.pattern)


def _step_ca_template(names: Iterable[str], certificates: Mapping[str, x509.Certificate]) -> str:
    ekus: set[frozenset[EKU]] = set()
    allowed: dict[str, set[str]] = {}
    for name in names:
        ekus.add(SPECS[name].ekus)
        subject = _quoted_subject(name, certificates[name])
        allowed.setdefault(subject, set()).update(_quoted_sans(name, certificates[name]))
    if len(ekus) != 1:
        text = f"wanted a provisioner for one usage class, found one for {', '.join(names)}"
        raise BridgeError(text, hint="have {usage} in `profile`")
    entries = (
        f"\n  {_quoted(subject)} (list{''.join(f' {_quoted(san)}' for san in sorted(sans))})"
        for subject, sans in allowed.items()
    )
    return _STEP_CA_TEMPLATE.format(allowed="".join(entries), ekus=json.dumps(sorted(eku.label for eku in ekus.pop())))


def _quoted_subject(name: str, certificate: x509.Certificate) -> str:
    """The subject as step-ca's `toJson` writes it."""
    values: dict[str, list[str]] = {field: [] for field in _STEP_CA_FIELDS.values()}
    for attribute in certificate.subject:
        field = _STEP_CA_FIELDS.get(attribute.oid)
        if field is None or not isinstance(attribute.value, str) or (field in _SINGLE and values[field]):
            wanted = "a subject of attributes that step-ca knows"
            text = f"{name}: wanted {wanted}, found {attribute.rfc4514_attribute_name}"
            raise BridgeError(text, hint="have another CA renew this certificate")
        values[field].append(attribute.value)
    fields = {field: values[0] if field in _SINGLE else values for field, values in values.items() if values}
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).translate(_ESCAPED)


def _quoted_sans(name: str, certificate: x509.Certificate) -> Iterable[str]:
    entries = san_entries(certificate)
    if other := sorted(kind for kind, _ in entries if kind not in {"DNS", "IP", "email", "URI"}):
        text = f"{name}: wanted SANs of types DNS, IP, email and URI, found {', '.join(other)}"
        raise BridgeError(text, hint="have another CA renew this certificate")
    return (value for _, value in entries)


def _quoted(text: str) -> str:
    """A string of Go's templates on one line."""
    return json.dumps(text, ensure_ascii=False)
