"""`settings` and `setup`: the settings file, and what a CA's administrator needs."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from cryptography import x509

from bridge.cli.printing import say
from bridge.contract import GIVEN, Secret, SetupFile, SetupRequest
from bridge.errors import BridgeError, SettingsError, SettingsProblem
from bridge.node import inventory
from bridge.pki.durations import duration_text
from bridge.settings.load import DEFAULT_FILE
from bridge.settings.tables import Commands, Components, Settings
from bridge.settings.windows import Windows
from bridge.signing import registry
from bridge.specs import AUTHORITIES


def settings_init(file: Path | None) -> None:
    """
    `settings init`: write a commented settings file.

    Raises:
        BridgeError: There is one.
    """
    path = file or DEFAULT_FILE
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    try:
        with path.open("x", encoding="utf-8") as opened:
            path.chmod(0o644)
            opened.write(example().read_text(encoding="utf-8"))
    except FileExistsError:
        raise BridgeError(f"{path}: wanted no file, found one", hint="edit it, or name another place") from None
    say(f"wrote {path}")


def example() -> Path:
    """The commented example that is installed with the program."""
    name = "config.toml"
    for directory in (Path(sys.prefix, "share", "kubeadm-ca-bridge"), Path(__file__).parents[2] / "config"):
        if (directory / name).is_file():
            return directory / name
    raise BridgeError(
        "wanted the example settings that are installed with the program, found none", hint="reinstall it"
    )


def settings_check(settings: Settings) -> None:
    """
    `settings check`: the whole file, backends' tables included; asks no CA.

    Raises:
        SettingsError: Something is wrong with it, or there is none.
    """
    if settings.source.file is None:
        problem = SettingsProblem("", "a settings file", "none: the defaults are in force", DEFAULT_FILE)
        raise SettingsError([problem], hint="`ca-bridge settings init` writes a commented file")
    registry.configured(settings, settings.authorities)
    say(f"{settings.source.file}: nothing wrong")


def settings_show(settings: Settings) -> None:
    """`settings show`: print the settings in force."""
    say(in_force(settings))


def in_force(settings: Settings) -> str:
    """The settings in force, as TOML that means the same; a backend's keys are in the tables of its authorities."""
    lines = [f"# from {settings.source.file or 'defaults alone: no settings file'}"]
    named = dataclasses.replace(settings, node=dataclasses.replace(settings.node, name=settings.node.node_name))
    for name in ("node", "renewal", "restart", "cluster", "hooks", "audit", "backups"):
        lines += ["", f"[{name}]", *_shown(getattr(named, name))]
    backends = registry.configured(settings, settings.authorities)
    for name, type_name in {one.name: one.type_name for one in backends.values()}.items():
        lines += ["", f"[backend.{json.dumps(name)}]", f"type = {json.dumps(type_name)}"]
    for authority, configured in backends.items():
        lines += ["", f"[authority.{authority}]", *_shown(settings.authorities[authority])]
        lines += _shown(configured.settings)
    return "\n".join(lines) + "\n"


def _shown(values: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(values):
        value, key = getattr(values, field.name), f"{prefix}{field.name}"
        if GIVEN in field.metadata or value in (None, "", timedelta()):  # no key; or as if it were not set
            continue
        if isinstance(value, Secret):
            yield f"{key}_{value.kind} = {json.dumps(value.where)}"
        elif dataclasses.is_dataclass(value) and not hasattr(value, "from_setting"):
            yield from _shown(value, f"{key}.")
        elif isinstance(value, Mapping):
            yield from (f"{key}.{json.dumps(name)} = {json.dumps(text)}" for name, text in value.items())
        else:
            yield f"{key} = {json.dumps(_plain(value))}"


def _plain(value: Any) -> Any:
    """As it may stand in the settings file."""
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


def setup(settings: Settings, type_name: str, authority: str | None) -> None:
    """`setup`: print what the administrator of a CA needs."""
    say("\n".join(file.text for file in files_for(settings, type_name, authority)))


def files_for(settings: Settings, type_name: str, authority: str | None) -> list[SetupFile]:
    """
    What the administrator of a CA needs for this node's certificates.

    Args:
        settings: Where the node's files are, and how its backends are configured so far.
        type_name: A backend's type.
        authority: Only this one; None: all that the node has certificates of.

    Raises:
        SettingsError: No such authority, or no such type that could tell.
        BridgeError: The certificates can't be had from such a CA.
    """
    if authority is not None and authority not in AUTHORITIES:
        problem = SettingsProblem("--authority", f"one of {', '.join(AUTHORITIES)}", repr(authority))
        raise SettingsError([problem])
    backend_type = registry.that_sets_up(type_name)
    node = inventory.read(settings.node.pki_dir, settings.node.kubeconfig_dir)
    files: list[SetupFile] = []
    for name in [authority] if authority else AUTHORITIES:
        items = {i.spec.name: i.certificates[0] for i in node.items
                 if i.spec.authority.name == name and i.managed and i.state == "present"}  # fmt: skip
        if items:
            request = _setup_request(settings, type_name, name, items)
            try:
                files += backend_type.setup(request)
            except SettingsError as e:
                raise registry.located(e, settings, name) from None
    if not files:
        raise BridgeError("wanted live certificates to make it from, found none", hint="--pki-dir tells where they are")
    return files


def _setup_request(
    settings: Settings, type_name: str, authority: str, items: Mapping[str, x509.Certificate]
) -> SetupRequest:
    return SetupRequest(
        authority=AUTHORITIES[authority],
        certificates=items,
        validity=settings.renewal.validity,
        node=settings.node.node_name,
        cluster=settings.node.cluster,
        settings=registry.keys_so_far(settings, authority, type_name),
    )
