"""Settings in force as lines of TOML."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

from bridge.contract import GIVEN, Secret
from bridge.pki.expiry import duration_text
from bridge.settings.tables import Commands, Components
from bridge.settings.windows import Windows


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
