"""
The settings file, from the file to `Settings`.

Backends' tables are kept raw here and read by `bridge.ca.registry` into the backend's own dataclass, so that a command
that asks no CA loads no backend.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge.errors import SettingsError, SettingsProblem
from bridge.settings.gateway import GatewaySettings
from bridge.settings.reader import Reader, Source, _found
from bridge.settings.tables import (
    AuditSettings,
    AuthoritySettings,
    BackupSettings,
    CertificateSettings,
    ClusterSettings,
    CopiesSettings,
    HookSettings,
    MetricsSettings,
    NodeSettings,
    RenewalSettings,
    RestartSettings,
    Settings,
    UserSettings,
)
from bridge.specs import AUTHORITIES, KUBELET_SERVER
from bridge.system.paths import assert_ours, own_text
from bridge.words import name_found

DEFAULT_FILE = Path("/etc/ca-bridge/config.toml")


def load(file: Path | None) -> Settings:
    """
    Read the settings.

    Args:
        file: None: the default file if it is there, else the defaults.

    Raises:
        SettingsError: With every problem of the tables that are not a backend's.
    """
    if file is None and not DEFAULT_FILE.exists():
        return Settings(source=Source(None, ""))
    path = file or DEFAULT_FILE
    settings = parse(own_text(path, "a settings file", "`ca-bridge settings init` writes a commented one"), path)
    node = settings.node
    for key, named, whose in (
        ("desk_key", node.desk_key, "the desk's"),
        ("order_key", node.order_key, "the administrator's"),
    ):
        if named is not None:
            _assert_key(settings, key, named, whose)
    return settings


def _assert_key(settings: Settings, key: str, path: Path, whose: str) -> None:
    """Whoever can change the file decides which answers and orders count."""
    try:
        path.stat()
        assert_ours(path)
    except OSError as e:
        problem = settings.source.problem(("node", key), f"{whose} certificate or public key", f"{path}: {e.strerror}")
        raise SettingsError([problem]) from None


def overridden(
    settings: Settings, pki_dir: Path | None, kubeconfig_dir: Path | None, state_dir: Path | None
) -> Settings:
    """The settings with the command line's places over them; relative ones are below the working directory."""
    node = dataclasses.replace(
        settings.node,
        pki_dir=(pki_dir or settings.node.pki_dir).absolute(),
        kubeconfig_dir=(kubeconfig_dir or settings.node.kubeconfig_dir).absolute(),
        state_dir=(state_dir or settings.node.state_dir).absolute(),
    )
    return dataclasses.replace(settings, node=node)


def parse(text: str, file: Path | None = None) -> Settings:
    """
    Settings from TOML text.

    Raises:
        SettingsError: With every problem of the tables that are not a backend's.
    """
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise SettingsError([SettingsProblem("", "TOML", _without_value(e), file)]) from None
    source = Source(file, text)
    reader = Reader(source)
    tables = reader.tables(
        document,
        (
            "node",
            "renewal",
            "restart",
            "hooks",
            "cluster",
            "audit",
            "backups",
            "copies",
            "metrics",
            "gateway",
            "users",
            "backend",
            "authority",
            "certificate",
        ),
    )
    authorities, authority_tables = _authorities(reader, tables["authority"], tables["backend"])
    settings = Settings(
        source=source,
        node=reader.read(NodeSettings, tables["node"], ("node",)) or NodeSettings(),
        renewal=reader.read(RenewalSettings, tables["renewal"], ("renewal",)) or RenewalSettings(),
        restart=reader.read(RestartSettings, tables["restart"], ("restart",)) or RestartSettings(),
        hooks=reader.read(HookSettings, tables["hooks"], ("hooks",)) or HookSettings(),
        cluster=reader.read(ClusterSettings, tables["cluster"], ("cluster",)) or ClusterSettings(),
        audit=reader.read(AuditSettings, tables["audit"], ("audit",)) or AuditSettings(),
        backups=reader.read(BackupSettings, tables["backups"], ("backups",)) or BackupSettings(),
        copies=reader.read(CopiesSettings, tables["copies"], ("copies",)) or CopiesSettings(),
        users=reader.read(UserSettings, tables["users"], ("users",)) or UserSettings(),
        metrics=reader.read(MetricsSettings, tables["metrics"], ("metrics",)) or MetricsSettings(),
        gateway=reader.read(GatewaySettings, tables["gateway"], ("gateway",)) or GatewaySettings(),
        backends=_backends(reader, tables["backend"]),
        authorities=authorities,
        authority_tables=authority_tables,
        certificates=_certificates(reader, tables["certificate"]),
    )
    reader.raise_problems()
    return settings


def _without_value(error: Exception) -> str:
    """The parser's reason; it quotes single characters at most, never a value."""
    if isinstance(error, RecursionError):
        return "nesting without end"
    # it names a table as Python's tuple, such as ('restart', 'commands')
    return re.sub(
        r"\(('[^()]*'),?\)", lambda names: f"[{names[1].replace(chr(39), '').replace(', ', '.')}]", str(error)
    )


def _backends(reader: Reader, table: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    for name, backend in table.items():
        if not isinstance(backend, dict):
            reader.add(("backend", name), "a table", _found(backend))
        elif not isinstance(backend.get("type"), str):
            reader.add(("backend", name, "type"), 'a text such as "vault"', _found(backend.get("type")))
    return {name: backend for name, backend in table.items() if isinstance(backend, dict)}


def _certificates(reader: Reader, table: Mapping[str, Any]) -> dict[str, CertificateSettings]:
    read = {}
    for name, one in table.items():
        key = ("certificate", name)
        if name != KUBELET_SERVER:  # every other one's names are the live certificate's
            wanted = f"{KUBELET_SERVER}, the only one whose names the settings may give"
            reader.add(key, wanted, name_found(name, [KUBELET_SERVER]))
        elif not isinstance(one, dict):
            reader.add(key, "a table", _found(one))
        elif (settings := reader.read(CertificateSettings, one, key)) is not None:
            read[name] = settings
    return read


def _authorities(
    reader: Reader, table: Mapping[str, Any], backends: Mapping[str, Any]
) -> tuple[dict[str, AuthoritySettings], dict[str, Mapping[str, Any]]]:
    ours = {f.name for f in dataclasses.fields(AuthoritySettings)}
    read: dict[str, AuthoritySettings] = {}
    rest: dict[str, Mapping[str, Any]] = {}
    for name, authority in table.items():
        key = ("authority", name)
        if name not in AUTHORITIES:
            reader.add(key, f"one of {', '.join(AUTHORITIES)}", name_found(name, AUTHORITIES))
        elif not isinstance(authority, dict):
            reader.add(key, "a table", _found(authority))
        else:
            own = {k: v for k, v in authority.items() if k in ours}
            settings = reader.read(AuthoritySettings, own, key)
            if settings is not None and settings.backend not in backends:
                known = ", ".join(backends) or "a backend, but there is no [backend.NAME] table"
                reader.add((*key, "backend"), f"the name of a backend: {known}", repr(settings.backend))
            other = settings.rehearsal.get("backend") if settings is not None else None
            if other is not None and other not in backends:
                reader.add((*key, "rehearsal", "backend"), f"the name of a backend: {', '.join(backends)}", repr(other))
            if settings is not None:
                read[name], rest[name] = settings, {k: v for k, v in authority.items() if k not in ours}
    return read, rest
