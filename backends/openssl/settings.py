"""
The settings of a CA that `openssl ca` runs, and the four places of its files, which a site's openssl.cnf may name.

`setup_files` has what a CA desk needs to sign by hand: a directory for a CA, and an openssl.cnf.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path, PurePath
from typing import Literal

from cryptography import x509

from backends.openssl.program import SCHEME, Pkcs11Settings, key_problems, masked
from bridge.contract import BackendSettings, Secret, SetupFile, SetupRequest
from bridge.errors import SettingsError, SettingsProblem
from bridge.specs import SPECS, Authority, Usage
from bridge.system.paths import open_regular
from bridge.words import escaped

#: The hint of errors about the CA's own files.
CA_PLACE_HINT = "put it back, or set `dir` to the folder of the CA on this machine"
_FILES = {"certificate": "ca.crt", "private_key": "ca.key", "database": "index.txt", "new_certs_dir": "newcerts"}


@dataclass(frozen=True, kw_only=True)
class OpensslSettings(BackendSettings):
    """The places of the CA's files: below `dir`, one by one, or as a site's openssl.cnf has them."""

    #: The CA's directory, with `ca.crt`, `ca.key`, `index.txt` and `newcerts` unless other keys name them.
    dir: Path | None = None
    certificate: Path | None = None  #: The CA's certificate, followed by its chain.
    private_key: str | None = None  #: The CA's key: a file, or a `pkcs11:` URI.
    database: Path | None = None  #: The index of signed certificates, at most 256 MiB.
    new_certs_dir: Path | None = None  #: The directory where openssl puts a copy of each certificate.
    config: Path | None = None  #: An openssl.cnf of your own; only these four places are read from it.
    section: str | None = None  #: The section of `config`; if not set, the one that its `default_ca` names.
    passphrase: Secret | None = None  #: The passphrase of the CA's key.
    pkcs11: Pkcs11Settings | None = None  #: For a key in a token.
    openssl: str = "openssl"  #: The openssl program.
    digest: Literal["sha256", "sha384", "sha512"] = "sha256"  #: The digest of the signature.

    def writes(self) -> Sequence[Path]:
        """The directories of the database and the new certificates; a site's openssl.cnf is not read for them."""
        places = [self.dir, self.database and self.database.parent, self.new_certs_dir]
        return [place for place in places if place is not None]

    def programs(self) -> Sequence[str]:
        """openssl."""
        return (self.openssl,)

    def private_files(self) -> Iterator[Path]:
        """The CA's key, where it is a file."""
        yield from super().private_files()
        with suppress(SettingsError):  # reported when the backend is made
            key = files_of(self).private_key
            if not key.startswith(SCHEME):
                yield Path(key)

    def problems(self) -> Iterator[SettingsProblem]:
        """Find files that are named twice or not at all, and a key that openssl might not find."""
        named = [key for key in ("dir", *_FILES) if getattr(self, key) is not None]
        if self.config and named:
            yield SettingsProblem("config", "either config or the files themselves", f"config, {', '.join(named)}")
        if not self.config and self.dir is None:
            for key in _FILES.keys() - named:
                yield SettingsProblem(key, "a path, or dir with the usual names in it", "none")
        if self.section is not None and not self.config:
            yield SettingsProblem("section", "config beside it", "none")
        if not self.config:
            yield from key_problems(self.private_key, self.pkcs11, self.passphrase)


@dataclass(frozen=True, slots=True, kw_only=True)
class CAFiles:
    """The four places that `openssl ca` works on."""

    certificate: Path
    private_key: str  #: A path or a pkcs11: URI.
    database: Path
    new_certs_dir: Path


def files_of(settings: OpensslSettings) -> CAFiles:
    """The CA's files from the settings, or from the site's openssl.cnf that they name."""
    if settings.config:
        return _site_files(settings)
    folder = settings.dir or Path("/")  # without dir all four are named
    return CAFiles(
        certificate=settings.certificate or folder / _FILES["certificate"],
        private_key=settings.private_key or str(folder / _FILES["private_key"]),
        database=settings.database or folder / _FILES["database"],
        new_certs_dir=settings.new_certs_dir or folder / _FILES["new_certs_dir"],
    )


def _site_files(settings: OpensslSettings) -> CAFiles:
    """The four places that a site's openssl.cnf names."""
    path, section = settings.config or Path(), settings.section
    try:
        with open_regular(path) as file:
            config = parse_config(file.read().decode(errors="surrogateescape"), os.environ)
        section = section or _site_value(config, "ca", "default_ca")
        site_files = {key: _site_value(config, section, key) for key in _FILES}
    except OSError as e:
        problems = [SettingsProblem("config", "an openssl.cnf that can be read", e.strerror or "none", path)]
    except ConfigDoubtError as e:
        problems = [SettingsProblem("config", e.wanted, e.found, path, e.line)]
    else:
        # a relative path is relative to the folder where openssl starts, not to the file's own
        problems = [
            SettingsProblem("config", f"{key} as an absolute path in [{section}]", masked(text), path)
            for key, text in site_files.items()
            if not text.startswith("/") and not (key == "private_key" and text.startswith(SCHEME))
        ]
        in_file = {"private_key": path}
        problems += [
            replace(problem, file=in_file.get(problem.key))
            for problem in key_problems(site_files["private_key"], settings.pkcs11, settings.passphrase)
            if site_files["private_key"].startswith(("/", SCHEME))
        ]
    if problems:
        hint = "instead of config, the settings can name certificate, private_key, database and new_certs_dir"
        raise SettingsError(problems, hint=hint)
    places = {key: Path(site_files[key]) for key in ("certificate", "database", "new_certs_dir")}
    return CAFiles(**places, private_key=site_files["private_key"])


def _site_value(config: Config, section: str, key: str) -> str:
    value = config.get(section, key)
    return value.text if value else ""


# --- a site's openssl.cnf --------------------------------------------------------------------------------------------

_VARIABLE = re.compile(r"\$(?:\{(?P<braces>[^{}]*)\}|\((?P<parentheses>[^()]*)\)|(?P<bare>\w+(?:::\w+)?))", re.ASCII)
_QUOTES = re.compile(r"[\"'`\\]")


class ConfigDoubtError(Exception):
    """A line of an openssl.cnf whose meaning is not certain."""

    def __init__(self, line: int, wanted: str, found: str) -> None:
        self.line, self.wanted, self.found = line, wanted, found
        super().__init__(f"line {line}: wanted {wanted}, found {found}")


@dataclass(frozen=True, slots=True)
class Value:
    """A value with its variables expanded."""

    text: str
    line: int  #: From 1.
    doubt: ConfigDoubtError | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """A parsed openssl.cnf."""

    sections: dict[str, dict[str, Value]] = field(default_factory=lambda: {"default": {}})

    def get(self, section: str, name: str) -> Value | None:
        """A value of a section, or else of the part above the first section, which all inherit from."""
        value = self.sections.get(section, {}).get(name) or self.sections["default"].get(name)
        if value and value.doubt:
            raise value.doubt
        return value


def parse_config(text: str, environment: Mapping[str, str]) -> Config:
    """Parse an openssl.cnf."""
    config, current = Config(), "default"
    for number, line in _logical_lines(text):
        if line.startswith("["):
            name, bracket, rest = line[1:].partition("]")
            if not bracket or rest.strip():
                raise ConfigDoubtError(number, "[section]", repr(line))
            current = name.strip()
            config.sections.setdefault(current, {})
            continue
        if line.startswith((".include", ".pragma")):
            raise ConfigDoubtError(number, "a file that says all by itself, without .include and .pragma", repr(line))
        name, equals, value = map(str.strip, line.partition("="))
        if not equals or not name or re.search(r"\s", name):
            raise ConfigDoubtError(number, "name = value", repr(line))
        section, _, key = name.rpartition("::")
        section = section or current
        expanded = _expanded(Value(value, number), section, config, environment)
        config.sections.setdefault(section, {})[key] = expanded  # a repeated key counts from its second line on
    return config


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are neither empty nor a comment, with their numbers; a backslash at the end joins the next one."""
    joined, first = "", 0
    for number, line in enumerate([*text.removeprefix("\ufeff").split("\n"), ""], 1):
        first, line = first or number, line.rstrip("\r")  # noqa: PLW2901
        joined += line
        if line.endswith("\\") and not line.endswith("\\\\"):
            joined = joined[:-1]
            continue
        before, _, _ = joined.partition("#")
        # a `#` behind a quote or an escape may be part of a value, which then is in doubt anyway
        if content := (joined if _QUOTES.search(before) else before).strip():
            yield first, content
        joined, first = "", 0


def _expanded(value: Value, section: str, config: Config, environment: Mapping[str, str]) -> Value:
    def lookup(match: re.Match[str]) -> str:
        name = next(filter(None, match.groups()), "")
        where, _, key = name.rpartition("::")
        where = where or section
        known = config.sections.get(where, {}).get(key)
        if not known and where == "ENV" and key in environment:
            return environment[key]
        known = known or config.sections["default"].get(key)
        if not known:
            raise ConfigDoubtError(value.line, f"a value of ${name}", "none")
        if known.doubt:
            raise known.doubt
        return known.text

    doubt = None
    if _QUOTES.search(value.text):
        doubt = ConfigDoubtError(value.line, "a value without quotes and backslashes", repr(value.text))
    elif "$" in _VARIABLE.sub("", value.text):
        doubt = ConfigDoubtError(value.line, "$name, ${name} or $(name)", repr(value.text))
    if doubt:
        return Value(value.text, value.line, doubt)
    try:
        return Value(_VARIABLE.sub(lookup, value.text), value.line)
    except ConfigDoubtError as e:
        return Value(value.text, value.line, e)


# --- an openssl.cnf of ours -------------------------------------------------------------------------------------------

# `copy` takes extensions from the CSR that the section does not have; so it has all but the SAN, and we refuse a
# CSR that asks for others. `keyid,issuer` is the key identifier alone; issuer and serial number if the CA has none
# (as kubeadm before 1.19 made them), which is an error with `keyid:always`.
#: The openssl.cnf section of a usage class.
SECTION = """
[{usage}]
basicConstraints = critical,CA:FALSE
keyUsage = critical,digitalSignature,keyEncipherment
extendedKeyUsage = {ekus}
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid,issuer
"""
#: As openssl spells the usages of each class.
EKUS: dict[Usage, str] = {"server": "serverAuth", "client": "clientAuth", "peer": "serverAuth,clientAuth"}
DIRECTORY = PurePath("/srv/ca")  #: Each authority has a directory below it.
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9._/+:@-]+")  # else `$`, `#`, quotes and backslashes mean something to openssl

_TEXT = """\
# openssl.cnf for signing by hand with the key of {authority}.
#
# Make the directory, once:
#   mkdir -p -m 0700 {directory} {directory}/newcerts
#   touch {directory}/index.txt
#   echo 'unique_subject = no' > {directory}/index.txt.attr
# and put into it this file as openssl.cnf, the CA's certificate as ca.crt and its key as ca.key (mode 0600).
#
# Check each CSR before you sign it: "verify OK", the right subject, and no extension but Subject Alternative Name.
#   openssl req -in NAME.csr -noout -verify -text
#
# Sign it:
{commands}
#
# openssl ca exits with 0 even if it issued no certificate, for instance for a CSR with a bad signature: then NAME.crt is
# empty. It takes no lock, and two concurrent runs lose rows of the database; so flock uses the file that ca-bridge
# locks. Never use -out with a certificate in use: openssl empties the file before it issues the new certificate.
#
# ca-bridge can sign with the same directory. In its settings:
#   [authority.{authority}]
#   backend = "desk"
#   dir = "{directory}"
#   [backend.desk]
#   type = "openssl"
#   passphrase_file = "/etc/ca-bridge/ca-passphrase"     # if ca.key is encrypted

[ca]
default_ca = desk
# openssl reads `preserve` only here; without it, openssl drops and reorders parts of the subject.
preserve = yes

[desk]
database = {directory}/index.txt
new_certs_dir = {directory}/newcerts
certificate = {directory}/ca.crt
private_key = {directory}/ca.key
rand_serial = yes
# With `yes`, no certificate could be renewed while the old one is valid; index.txt.attr must also say `no`.
unique_subject = no
default_md = sha256
default_days = {days}
policy = policy
email_in_dn = yes
# Copies the SANs from the CSR; the sections below set all other extensions, so that a CSR can't.
copy_extensions = copy
# This section does not exist, so that a command without -extensions fails; otherwise a CSR could become a CA.
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


def setup_files(wanted: SetupRequest) -> list[SetupFile]:
    """Write an openssl.cnf for the authority's directory: the settings' or else one below `DIRECTORY`."""
    directory, authority = wanted.settings.get("dir"), wanted.authority.name
    if wanted.patterns:
        place = str(directory or DIRECTORY / authority)
        text = _BESIDE.format(quoted=shlex.quote(place), text=escaped(json.dumps(place)), authority=authority)
        return [SetupFile(name=f"{authority}.sh", text=text, executable=True)]
    text = config_text(wanted.authority, wanted.certificates, wanted.validity, directory)
    return [SetupFile(name=f"{authority}.cnf", text=text, alone=True)]


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
    specs = [SPECS[name] for name in certificates if SPECS[name].authority == authority]
    if not specs:
        raise ValueError(f"no certificate of {authority.name} to sign again")
    groups = {usage: [spec.name for spec in specs if spec.usage == usage]
              for usage in sorted({spec.usage for spec in specs})}  # fmt: skip
    return _TEXT.format(
        authority=authority.name,
        directory=directory,
        days=max(1, validity // timedelta(days=1)),
        commands="\n".join(
            _COMMAND.format(directory=directory, usage=usage, names=", ".join(group)) for usage, group in groups.items()
        ),
        sections="".join(SECTION.format(usage=usage, ekus=EKUS[usage]) for usage in groups),
    )
