"""What a CA desk needs to sign with `openssl ca`: a directory for a CA, and an openssl.cnf for signing by hand."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import PurePath

from cryptography import x509

from backends.openssl import EKUS, SECTION
from bridge.contract import SetupFile, SetupRequest
from bridge.specs import SPECS, Authority, Usage
from bridge.words import escaped

DIRECTORY = PurePath("/srv/ca")  #: Below it a directory an authority.
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9._/+:@-]+")  # else `$`, `#`, quotes and backslashes mean something to openssl

_TEXT = """\
# openssl.cnf for signing by hand with the key of {authority}.
#
# The directory, once:
#   mkdir -p -m 0700 {directory} {directory}/newcerts
#   touch {directory}/index.txt
#   echo 'unique_subject = no' > {directory}/index.txt.attr
# and into it this file as openssl.cnf, the CA's certificate as ca.crt and its key as ca.key (mode 0600).
#
# Each CSR, before it is signed: "verify OK", the subject, and no requested extension but Subject Alternative Name.
#   openssl req -in NAME.csr -noout -verify -text
#
# Signing:
{commands}
#
# openssl ca exits with 0 even if it issued nothing, for instance for a CSR with a bad signature: then NAME.crt is
# empty. It takes no lock, and two runs at a time lose rows of the database; so flock uses the file that ca-bridge
# locks. Never let -out name a certificate in use: openssl empties it before it has issued the new one.
#
# ca-bridge can sign with the same directory; in its settings:
#   [authority.{authority}]
#   backend = "desk"
#   dir = "{directory}"
#   [backend.desk]
#   type = "openssl"
#   passphrase_file = "/etc/ca-bridge/ca-passphrase"     # if ca.key is encrypted

[ca]
default_ca = desk
# openssl reads this only here; without it, it drops and reorders parts of the subject.
preserve = yes

[desk]
database = {directory}/index.txt
new_certs_dir = {directory}/newcerts
certificate = {directory}/ca.crt
private_key = {directory}/ca.key
rand_serial = yes
# With yes no certificate could be renewed while the old one is valid; index.txt.attr must have no as well.
unique_subject = no
default_md = sha256
default_days = {days}
policy = policy
email_in_dn = yes
# Takes the SANs from the CSR; the sections below set everything else, so that a CSR can't.
copy_extensions = copy
# This section does not exist, so that a command without -extensions fails; else a CSR could become a CA.
x509_extensions = extensions_must_be_given

[policy]
organizationName = optional
commonName = supplied
{sections}"""
_COMMAND = """\
#   for {names}:
#     flock {directory}/.ca-bridge.lock openssl ca -config {directory}/openssl.cnf \\
#       -batch -notext -extensions {usage} -in NAME.csr -out NAME.crt"""


_BESIDE = """\
#!/bin/sh
# The directory of a CA whose certificates get their names beside the CSR. ca-bridge writes a section of extensions with
# these names for each run of `openssl ca`, so that no openssl.cnf is needed; and it sets both dates, so that in
# gateway-policy.toml `backdating = "1m"` and `exact_dates = true` fit.
set -eu
mkdir -p -m 0700 {quoted} {quoted}/newcerts
test -e {quoted}/index.txt || : > {quoted}/index.txt
echo 'unique_subject = no' > {quoted}/index.txt.attr
# Put the CA's certificate there as ca.crt, and its key as ca.key (mode 0600). In the gateway's settings:
#   [authority.{authority}]
#   backend = "{authority}"
#   [backend.{authority}]
#   type = "openssl"
#   dir = {text}
"""


def setup(wanted: SetupRequest) -> list[SetupFile]:
    """An openssl.cnf for the authority's directory: the one that the settings name, or else one below `DIRECTORY`."""
    directory = wanted.settings.get("dir")
    if wanted.patterns:
        place = str(directory or DIRECTORY / wanted.authority.name)
        text = _BESIDE.format(
            quoted=shlex.quote(place), text=escaped(json.dumps(place)), authority=wanted.authority.name
        )
        return [SetupFile(name=f"{wanted.authority.name}.sh", text=text, executable=True)]
    text = config_text(wanted.authority, wanted.certificates, wanted.validity, directory)
    return [SetupFile(name=f"{wanted.authority.name}.cnf", text=text, alone=True)]


def config_text(
    authority: Authority,
    certificates: Mapping[str, x509.Certificate],
    validity: timedelta,
    directory: PurePath | None = None,
) -> str:
    """An openssl.cnf with instructions, for signing one authority's CSRs by hand (ValueError: it can't be written)."""
    directory = directory or DIRECTORY / authority.name
    if not _PLAIN_PATH.fullmatch(str(directory)):
        raise ValueError(f"wanted an absolute path of plain characters, found {str(directory)!r}")
    groups = list(_by_usage(authority, certificates))
    if not groups:
        raise ValueError(f"no certificate of {authority.name} to sign again")
    return _TEXT.format(
        authority=authority.name,
        directory=directory,
        days=max(1, validity // timedelta(days=1)),
        commands="\n".join(
            _COMMAND.format(directory=directory, usage=usage, names=", ".join(group)) for usage, group in groups
        ),
        sections="".join(SECTION.format(usage=usage, ekus=EKUS[usage]) for usage, _ in groups),
    )


def _by_usage(authority: Authority, certificates: Mapping[str, x509.Certificate]) -> Iterator[tuple[Usage, list[str]]]:
    specs = [SPECS[name] for name in certificates if SPECS[name].authority == authority]
    for usage in sorted({spec.usage for spec in specs}):
        yield usage, [spec.name for spec in specs if spec.usage == usage]
