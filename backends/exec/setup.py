"""What the author of a program for the backend `exec` needs: what it will be asked for, and a way to try it."""

from __future__ import annotations

import ipaddress
import re
import shlex
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

from cryptography import x509

from backends.exec import step_ca
from backends.exec.helper import ENVIRONMENT, ekus_text
from bridge.contract import Selector, SetupFile, SetupRequest
from bridge.errors import SettingsError, SettingsProblem
from bridge.specs import SPECS
from bridge.words import one_line

_LONGEST_CELL = 4000
#: Where the settings name no program yet.
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
case ${{1:-}} in
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


def setup(wanted: SetupRequest) -> list[SetupFile]:
    """A script for the authority that tries the program, for step-ca also one that makes its provisioners; for pods a text."""
    if wanted.patterns:
        return [SetupFile(name=f"{wanted.authority.name}.txt", text="".join(_beside(wanted)))]
    profile, command = _selector(wanted.settings, wanted.node), _command(wanted.settings)
    rows = [
        (name, profile(SPECS[name]), ekus_text(SPECS[name]), subject_text(certificate), sans_text(certificate))
        for name, certificate in wanted.certificates.items()
    ]
    head = ("NAME", "PROFILE", "EKUS", "SUBJECT", "SANS")
    # a line break in a CA's certificate would end the comment, and what follows it would run
    lines = [[one_line(cell, _LONGEST_CELL) for cell in row] for row in (head, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    table = "\n".join(
        "# " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
    text = _TEXT.format(
        node=one_line(wanted.node),
        cluster=one_line(wanted.cluster),
        quoted_node=shlex.quote(wanted.node),
        authority=wanted.authority.name,
        table=table,
        cases="\n".join(_case(*row) for row in rows),
        days=-(-wanted.validity // timedelta(days=1)),
        seconds=int(wanted.validity.total_seconds()),
        environment=_assignments({**ENVIRONMENT, **_texts(wanted.settings, "environment")}),
        command=shlex.join(command),
    )
    tries = SetupFile(name=f"try-{wanted.authority.name}.sh", text=text, executable=True, by_node=True)
    return [*([step_ca.provisioners(wanted, profile)] if step_ca.is_meant(command) else []), tries]


def _beside(wanted: SetupRequest) -> Iterator[str]:
    """What a program gets for certificates whose names travel beside the CSR, and has to make of it."""
    yield "The CSR is empty: subject and SANs are those of the variables, one name a line, and no others.\n"
    yield "Below an empty subject the SANs are critical; a certificate begins less than 5 minutes ago.\n"
    for one in wanted.patterns:
        yield f"CA_BRIDGE_CERTIFICATE={one.spec.name}: CA_BRIDGE_EKUS={ekus_text(one.spec)}\n"
        yield f"  CA_BRIDGE_VALIDITY_SECONDS: at most {int(one.longest.total_seconds())}\n"
        for name, values in (("URIS", one.uris), ("DNS", one.dns), ("COMMON_NAME", one.common_names)):
            yield f"  CA_BRIDGE_{name}: {one_line(', '.join(values), _LONGEST_CELL) or 'empty'}\n"


def _case(name: str, profile: str, ekus: str, subject: str, sans: str) -> str:
    values = {"profile": profile, "usage": SPECS[name].usage, "ekus": ekus, "subject": subject, "sans": sans}
    return f"  {name}) {_assignments(values)} ;;"


def _assignments(values: Mapping[str, str]) -> str:
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in values.items())


def _selector(settings: Mapping[str, Any], node: str) -> Selector:
    pattern = settings.get("profile", "{usage}")
    selector = Selector(pattern if isinstance(pattern, str) else "{", _texts(settings, "profiles"), node)
    problems = list(selector.problems("profile", "profiles"))
    if problems:
        raise SettingsError(problems)
    return selector


def _texts(settings: Mapping[str, Any], key: str) -> dict[str, str]:
    table = settings.get(key, {})
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise SettingsError([SettingsProblem(key, "a table of texts", "something else")])
    return table


def _command(settings: Mapping[str, Any]) -> list[str]:
    command = settings.get("command", PROGRAM)
    if not isinstance(command, list | tuple) or not all(isinstance(word, str) for word in command):
        raise SettingsError([SettingsProblem("command", "a list of texts", "something else")])
    return list(command)


def subject_text(certificate: x509.Certificate) -> str:
    """The subject for `openssl req -subj`: in the certificate's own order, with special characters escaped."""
    return "".join(f"/{part}" for part in _parts(certificate.subject))


def _parts(subject: x509.Name) -> Iterator[str]:
    for attribute in subject:
        value = re.sub(r"([/\\+])", r"\\\1", str(attribute.value))
        yield f"{attribute.rfc4514_attribute_name}={value}"


def sans_text(certificate: x509.Certificate) -> str:
    """The SANs for `openssl req -addext subjectAltName=`; empty: there are none."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ""
    return ",".join(filter(None, map(_san, names)))


def _san(name: x509.GeneralName) -> str:
    if isinstance(name, x509.DNSName):
        return f"DNS:{name.value}"
    if isinstance(name, x509.IPAddress) and isinstance(name.value, ipaddress.IPv4Address | ipaddress.IPv6Address):
        return f"IP:{name.value}"
    return f"email:{name.value}" if isinstance(name, x509.RFC822Name) else ""
