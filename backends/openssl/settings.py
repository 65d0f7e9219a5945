"""The settings of a CA that is run by `openssl ca`, and the four places of its files, which a site's openssl.cnf may name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from backends.openssl.program import SCHEME, KeyFile, Pkcs11Settings, PrivateKey, TokenKey, key_problems, masked
from bridge.contract import BackendSettings, Secret
from bridge.errors import SettingsError, SettingsProblem

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
    database: Path | None = None  #: The index of signed certificates.
    new_certs_dir: Path | None = None  #: The directory where openssl puts a copy of each certificate.
    config: Path | None = None  #: An openssl.cnf of your own; only these four places are read from it.
    section: str | None = None  #: The section of `config`; if not set, the one that its `default_ca` names.
    passphrase: Secret | None = None  #: The passphrase of the CA's key.
    pkcs11: Pkcs11Settings | None = None  #: For a key in a token.
    openssl: str = "openssl"  #: The openssl program.
    digest: Literal["sha256", "sha384", "sha512"] = "sha256"  #: The digest of the signature.

    def writes(self) -> Sequence[Path]:
        """Where the database and the new certificates are; a site's openssl.cnf is not read for it."""
        places = [self.dir, self.database and self.database.parent, self.new_certs_dir]
        return [place for place in places if place is not None]

    def private_files(self) -> Iterator[Path]:
        """The CA's key, where it is a file."""
        yield from super().private_files()
        with suppress(SettingsError):  # reported when the backend is made
            key = files_of(self).private_key
            if not key.startswith(SCHEME):
                yield Path(key)

    def problems(self) -> Iterator[SettingsProblem]:
        """Files that are named twice or not at all, and a key that openssl could not find for sure."""
        yield from super().problems()
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
    """The CA's files by the settings, or by the site's openssl.cnf that they name."""
    if settings.config:
        return _site_files(settings)
    folder = settings.dir or Path("/")  # without dir all four are named
    return CAFiles(
        certificate=settings.certificate or folder / _FILES["certificate"],
        private_key=settings.private_key or str(folder / _FILES["private_key"]),
        database=settings.database or folder / _FILES["database"],
        new_certs_dir=settings.new_certs_dir or folder / _FILES["new_certs_dir"],
    )


def private_key_of(files: CAFiles, settings: OpensslSettings) -> PrivateKey:
    """The CA's key, in a file or in a token."""
    where = files.private_key
    if where.startswith(SCHEME) and settings.pkcs11:
        return TokenKey(where, settings.pkcs11)
    return KeyFile(Path(where), settings.passphrase)


def _site_files(settings: OpensslSettings) -> CAFiles:
    """The four places that a site's openssl.cnf names."""
    path, section = settings.config or Path(), settings.section
    try:
        config = parse_config(path.read_text(encoding="utf-8", errors="surrogateescape"), os.environ)
        section = section or _site_value(config, "ca", "default_ca")
        found = {key: _site_value(config, section, key) for key in _FILES}
    except OSError as e:
        problems = [SettingsProblem("config", "an openssl.cnf that can be read", e.strerror or "none", path)]
    except ConfigDoubtError as e:
        problems = [SettingsProblem("config", e.wanted, e.found, path, e.line)]
    else:
        # a relative path means wherever openssl is started, not the file's own folder
        problems = [
            SettingsProblem("config", f"{key} as an absolute path in [{section}]", masked(text), path)
            for key, text in found.items()
            if not text.startswith("/") and not (key == "private_key" and text.startswith(SCHEME))
        ]
        in_file = {"private_key": path}
        problems += [
            replace(problem, file=in_file.get(problem.key))
            for problem in key_problems(found["private_key"], settings.pkcs11, settings.passphrase)
            if found["private_key"].startswith(("/", SCHEME))
        ]
    if problems:
        hint = "instead of config, the settings can name certificate, private_key, database and new_certs_dir"
        raise SettingsError(problems, hint=hint)
    places = {key: Path(found[key]) for key in ("certificate", "database", "new_certs_dir")}
    return CAFiles(**places, private_key=found["private_key"])


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
    """A parsed file."""

    sections: dict[str, dict[str, Value]] = field(default_factory=lambda: {"default": {}})

    def get(self, section: str, name: str) -> Value | None:
        """A value of a section, or else of the part above the first section, which all inherit from."""
        value = self.sections.get(section, {}).get(name) or self.sections["default"].get(name)
        if value and value.doubt:
            raise value.doubt
        return value


def parse_config(text: str, environment: Mapping[str, str]) -> Config:
    """Parse a file."""
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
        # a key that is there twice counts from its second line on, as for openssl
        config.sections.setdefault(section or current, {})[key] = _expanded(
            Value(value, number), section or current, config, environment
        )
    return config


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are neither empty nor a comment, with their numbers; a backslash at the end joins the next one."""
    joined, first = "", 0
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        first, line = first or number, line.rstrip("\r")  # noqa: PLW2901
        joined += line
        if line.endswith("\\") and not line.endswith("\\\\"):
            joined = joined[:-1]
            continue
        if content := _without_comment(joined).strip():
            yield first, content
        joined, first = "", 0
    if content := _without_comment(joined).strip():
        yield first, content


def _without_comment(line: str) -> str:
    """A `#` behind a quote or an escape may be part of a value, which then is in doubt anyway."""
    before, _, _ = line.partition("#")
    return line if _QUOTES.search(before) else before


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
