"""Reads the settings file into `Settings`; `bridge.ca.registry` reads the backends' tables when a CA is used."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, cast

from bridge.errors import SettingsError, SettingsProblem
from bridge.settings import Key, Reader, Source, found_text, opened
from bridge.settings.pair_tables import PairFiles, PairSettings, collisions
from bridge.settings.tables import AuthoritySettings, CertificateSettings, NodeSettings, Settings
from bridge.specs import KUBELET_SERVER, SIGNING_AUTHORITIES, SPECS, WANTED_PAIR_NAME, is_pair_name
from bridge.system.paths import assert_ours, own_text
from bridge.words import name_found

DEFAULT_FILE = Path("/etc/ca-bridge/config.toml")


@dataclass(frozen=True, slots=True)
class Overrides:
    """Options of every command that override the settings file; None: the file's value."""

    config: Path | None = None  #: The settings file; else $CA_BRIDGE_CONFIG, else the default file.
    pki_dir: Path | None = None
    kubeconfig_dir: Path | None = None
    state_dir: Path | None = None

    def words(self) -> list[str]:
        """The options for another command; the default settings file needs none."""
        config = self.file()
        places = {
            "--config": None if config == DEFAULT_FILE else config,
            "--pki-dir": self.pki_dir,
            "--kubeconfig-dir": self.kubeconfig_dir,
            "--state-dir": self.state_dir,
        }
        return [word for option, path in places.items() if path for word in (option, str(path.absolute()))]

    def settings(self) -> Settings:
        """The settings file, overridden by the options; relative paths are below the working directory."""
        return overridden(load(self.file()), self.pki_dir, self.kubeconfig_dir, self.state_dir)

    def examined(self) -> tuple[Settings, list[SettingsProblem]]:
        """Like `settings`, as far as they can be read, with all problems instead of an error."""
        settings, problems = examined(self.file())
        return overridden(settings, self.pki_dir, self.kubeconfig_dir, self.state_dir), problems

    def file(self) -> Path | None:
        """The settings file that was named; None: the default file, if it exists."""
        named = os.environ.get("CA_BRIDGE_CONFIG")
        return self.config or (Path(named) if named else None)


def load(file: Path | None) -> Settings:
    """The settings of a file; None: of the default file, or the defaults without it."""
    settings, problems = examined(file)
    if problems:
        raise SettingsError(problems)
    return settings


def examined(file: Path | None) -> tuple[Settings, list[SettingsProblem]]:
    """The settings as far as they can be read, and all problems by line (SettingsError: the file is not TOML)."""
    if file is None and _is_missing(DEFAULT_FILE):
        return Settings(source=Source(None, "")), []
    path = file or DEFAULT_FILE
    hint = "`ca-bridge settings init KIND` writes a commented one (KIND: vault, openssl, cfssl …)"
    settings, problems = _examined(own_text(path, "a settings file", hint), path)
    problems += _key_problems(settings, "desk_key", "the desk's")
    problems += _key_problems(settings, "order_key", "the administrator's")
    return settings, problems


def _is_missing(file: Path) -> bool:
    """Whether the file surely does not exist: a dangling link, or a directory that we may not enter, may hide settings."""
    with contextlib.suppress(OSError):  # reading it reports the reason
        try:
            file.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return True
    return False


def _key_problems(settings: Settings, key: str, whose: str) -> Iterator[SettingsProblem]:
    """Only root and the effective user may change the key, since it decides which answers or orders are accepted."""
    path = getattr(settings.node, key)
    if path is None:
        return
    try:
        path.stat()
        assert_ours(path)
    except OSError as e:
        yield settings.source.problem(("node", key), f"{whose} certificate or public key", f"{path}: {e.strerror}")


def overridden(
    settings: Settings, pki_dir: Path | None, kubeconfig_dir: Path | None, state_dir: Path | None
) -> Settings:
    """The settings with other paths; relative paths are below the working directory."""
    given = {"pki_dir": pki_dir, "kubeconfig_dir": kubeconfig_dir, "state_dir": state_dir}
    paths: dict[str, Any] = {key: (path or getattr(settings.node, key)).absolute() for key, path in given.items()}
    return replace(settings, node=replace(settings.node, **paths))


#: Tables whose keys are fixed.
_TABLES: dict[str, type[Any]] = {
    field.name: cast("type[Any]", field.default_factory)
    for field in fields(Settings)
    if is_dataclass(field.default_factory)
}


def parse(text: str, file: Path | None = None) -> Settings:
    """Parse settings from TOML text; a SettingsError has all problems except those of the backends' tables."""
    settings, problems = _examined(text, file)
    if problems:
        raise SettingsError(problems)
    return settings


def _examined(text: str, file: Path | None) -> tuple[Settings, list[SettingsProblem]]:
    reader, document = opened(text, file)
    tables = reader.tables(document, (*_TABLES, "backend", "authority", "certificate"))
    authorities, authority_tables = _authorities(reader, tables["authority"], tables["backend"])
    read = {name: reader.read(schema, tables[name], (name,)) for name, schema in _TABLES.items() if tables[name]}
    tables_read = {name: table for name, table in read.items() if table is not None}
    node, server = tables_read.pop("node", NodeSettings()), tables["certificate"].get(KUBELET_SERVER)
    key = ("certificate", KUBELET_SERVER)
    settings = Settings(
        source=reader.source,
        node=replace(node, pairs=_pairs(reader, tables["certificate"], node)),
        backends=_backends(reader, tables["backend"]),
        authorities=authorities,
        authority_tables=authority_tables,
        kubelet_server=None if server is None else reader.table(CertificateSettings, server, key),
        **tables_read,
    )
    return settings, reader.sorted_problems()


def _backends(reader: Reader, table: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The tables with a `type`; others are problems."""
    read: dict[str, Mapping[str, Any]] = {}
    for name, backend in table.items():
        if not isinstance(backend, dict):
            reader.add(("backend", name), "a table", found_text(backend))
        elif not isinstance(backend.get("type"), str):
            reader.add(("backend", name, "type"), 'a text such as "vault"', found_text(backend.get("type")))
        else:
            read[name] = backend
    return read


def _pairs(reader: Reader, table: Mapping[str, Any], node: NodeSettings) -> tuple[PairSettings, ...]:
    """The further pairs; a kubeadm certificate's name is never one of theirs, whatever the settings say."""
    pairs = []
    for name, pair_table in table.items():
        key = ("certificate", name)
        if name == KUBELET_SERVER:
            continue
        if name in SPECS:
            wanted = f"{KUBELET_SERVER}, the only one of kubeadm's whose names can be set, or a pair's own name"
            reader.add(key, wanted, name_found(name, [KUBELET_SERVER]))
        elif not is_pair_name(name):
            reader.add(key, f"{KUBELET_SERVER}, or a pair's name: {WANTED_PAIR_NAME}", repr(name))
        elif (pair := _pair(reader, pair_table, key)) is not None:
            pairs.append(pair)
    for name, wanted, file in collisions(pairs, node.taken):
        reader.add(("certificate", name), wanted, file)
    return tuple(pairs)


def _pair(reader: Reader, table: object, key: Key) -> PairSettings | None:
    own = {k: v for k, v in table.items() if k != "copies"} if isinstance(table, dict) else table
    below = table.get("copies", {}) if isinstance(table, dict) else {}
    if not isinstance(below, dict):
        reader.add((*key, "copies"), "tables [certificate.NAME.copies.NAME]", found_text(below))
        below = {}
    read = [reader.table(PairFiles, value, (*key, "copies", name)) for name, value in below.items()]
    copies = tuple(copy for copy in read if copy is not None)
    return reader.table(PairSettings, own, key, given={"name": key[-1], "copies": copies})


def _authorities(
    reader: Reader, table: Mapping[str, Any], backends: Mapping[str, Any]
) -> tuple[dict[str, AuthoritySettings], dict[str, Mapping[str, Any]]]:
    names = {f.name for f in fields(AuthoritySettings)}
    read: dict[str, AuthoritySettings] = {}
    rest: dict[str, Mapping[str, Any]] = {}
    for name, authority in table.items():
        key = ("authority", name)
        if name not in SIGNING_AUTHORITIES:  # its backend's keys are checked all the same
            reader.add(key, f"one of {', '.join(SIGNING_AUTHORITIES)}", name_found(name, SIGNING_AUTHORITIES))
        if not isinstance(authority, dict):
            reader.add(key, "a table", found_text(authority))
            continue
        settings = reader.read(AuthoritySettings, {k: v for k, v in authority.items() if k in names}, key)
        backend = authority.get("backend") if settings is None else settings.backend
        if not isinstance(backend, str):
            continue
        if backend not in backends:
            known = ", ".join(backends) or "a backend, but there is no [backend.NAME] table"
            reader.add((*key, "backend"), f"the name of a backend: {known}", repr(backend))
        read[name] = settings or AuthoritySettings(backend=backend)
        rest[name] = {k: v for k, v in authority.items() if k not in names}
        for place, over in (("rehearsal", read[name].rehearsal), ("next", read[name].next)):
            if (other := over.get("backend")) is not None and other not in backends:
                reader.add((*key, place, "backend"), f"the name of a backend: {', '.join(backends)}", repr(other))
    return read, rest
