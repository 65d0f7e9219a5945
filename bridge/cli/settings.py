"""`settings`: the settings file."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from bridge.ca import registry
from bridge.cli.options import Common, command, group
from bridge.cli.printing import say
from bridge.contract import GIVEN, Secret
from bridge.errors import BridgeError, SettingsError, SettingsProblem
from bridge.pki.expiry import duration_text
from bridge.settings.load import DEFAULT_FILE
from bridge.settings.tables import Commands, Components, Settings, for_rehearsal
from bridge.settings.windows import Windows
from bridge.system.files import shipped

commands = typer.Typer()
settings_group = group(commands, "settings", "Write, show and check the settings file.")


@command(settings_group, "init")
def settings_init(
    common: Common,
    file: Annotated[Path | None, typer.Argument(help="[default: --config, or /etc/ca-bridge/config.toml]")] = None,
) -> None:
    """Write a commented settings file; an older one is never overwritten."""
    path = file or common.config or DEFAULT_FILE
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    try:
        with path.open("x", encoding="utf-8") as opened:
            os.fchmod(opened.fileno(), 0o644)
            opened.write(example().read_text(encoding="utf-8"))
    except FileExistsError:
        raise BridgeError(
            f"{path}: wanted no file, found one", hint="edit it, or write another one: `ca-bridge settings init FILE`"
        ) from None
    say(f"wrote {path}")


@command(settings_group, "show")
def settings_show(common: Common) -> None:
    """Show the settings in force, defaults included; a secret's value is never shown."""
    say(in_force(common.settings()))


@command(settings_group, "check")
def settings_check(common: Common) -> None:
    """Check the whole settings file, backends' tables included; asks no CA."""
    settings = common.settings()
    if settings.source.file is None:
        problem = SettingsProblem("", "a settings file", "none: the defaults are in force", DEFAULT_FILE)
        raise SettingsError([problem], hint="`ca-bridge settings init` writes a commented file")
    registry.configured(settings, settings.authorities)
    if any(ours.rehearsal for ours in settings.authorities.values()):
        registry.configured(for_rehearsal(settings), settings.authorities)
    say(f"{settings.source.file}: well-formed; `ca-bridge doctor` asks the CAs")


def example() -> Path:
    """The commented example that is installed with the program."""
    found = shipped("config.toml")
    if found is not None:
        return found
    raise BridgeError(
        "wanted the example settings that are installed with the program, found none", hint="reinstall it"
    )


def in_force(settings: Settings) -> str:
    """The settings in force, as TOML that means the same; a backend's keys are in the tables of its authorities."""
    lines = [f"# from {settings.source.file or 'defaults alone: no settings file'}"]
    named = dataclasses.replace(settings, node=dataclasses.replace(settings.node, name=settings.node.node_name))
    for name in ("node", "renewal", "restart", "cluster", "hooks", "audit", "backups", "gateway"):
        lines += ["", f"[{name}]", *lines_of(getattr(named, name))]
    backends = registry.configured(settings, settings.authorities)
    for name, type_name in {one.name: one.type_name for one in backends.values()}.items():
        lines += ["", f"[backend.{json.dumps(name)}]", f"type = {json.dumps(type_name)}"]
    for authority, configured in backends.items():
        lines += ["", f"[authority.{authority}]", *lines_of(settings.authorities[authority])]
        lines += lines_of(configured.settings)
    for name, certificate in settings.certificates.items():
        lines += ["", f"[certificate.{name}]", *lines_of(certificate)]
    return "\n".join(lines) + "\n"


def lines_of(values: Any, prefix: str = "") -> Iterator[str]:
    """A table's keys in force, as lines of TOML."""
    for field in dataclasses.fields(values):
        value, key = getattr(values, field.name), f"{prefix}{field.name}"
        if GIVEN in field.metadata or value in (None, "", timedelta()):  # no key; or as if it were not set
            continue
        if isinstance(value, Secret):
            yield f"{key}_{value.kind} = {json.dumps(value.where)}"
        elif dataclasses.is_dataclass(value) and not hasattr(value, "from_setting"):
            yield from lines_of(value, f"{key}.")
        elif isinstance(value, Mapping):
            yield from (f"{key}.{json.dumps(name)} = {json.dumps(text)}" for name, text in value.items())
        else:
            yield f"{key} = {json.dumps(_plain(value))}"


def _plain(value: Any) -> Any:
    """The value as it may stand in the settings file."""
    match value:
        case bool() | int() | tuple():
            return value
        case timedelta():
            return duration_text(value)
        case Windows():
            return list(map(str, value.windows))
        case Commands():
            return value.texts
        case Components(which="listed"):
            return [component.value for component in value.listed]
        case _:
            return str(value)
