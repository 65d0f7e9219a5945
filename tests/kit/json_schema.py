"""As much of JSON Schema as our own schemas use; a keyword that it does not know is an error."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_TYPES: dict[str, type | tuple[type, ...]] = {"object": dict, "array": list, "string": str, "integer": int}
_WORDS = {"$schema", "title", "description"}
_KNOWN = _WORDS | {
    "type",
    "required",
    "properties",
    "additionalProperties",
    "enum",
    "pattern",
    "items",
    "minItems",
    "minimum",
}


def violations(value: Any, schema: Mapping[str, Any], place: str = "$") -> Iterator[str]:
    """
    What is wrong with a value.

    Raises:
        ValueError: The schema has a keyword that is not looked at.
    """
    if unknown := schema.keys() - _KNOWN:
        raise ValueError(f"{place}: wanted keywords that are known, found {sorted(unknown)}")
    kind = _TYPES[schema["type"]]
    if not isinstance(value, kind) or isinstance(value, bool):
        yield f"{place}: wanted {schema['type']}, found {value!r}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{place}: wanted one of {schema['enum']}, found {value!r}"
    if "pattern" in schema and not re.search(schema["pattern"], str(value)):
        yield f"{place}: wanted {schema['pattern']}, found {value!r}"
    if value is not None and "minimum" in schema and value < schema["minimum"]:
        yield f"{place}: wanted at least {schema['minimum']}, found {value}"
    if isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            yield f"{place}: wanted at least {schema['minItems']} items, found {len(value)}"
        for number, item in enumerate(value):
            yield from violations(item, schema["items"], f"{place}[{number}]")
    if isinstance(value, dict):
        yield from _of_object(value, schema, place)


def _of_object(value: Mapping[str, Any], schema: Mapping[str, Any], place: str) -> Iterator[str]:
    properties = schema["properties"]
    yield from (f"{place}: wanted {name}, found nothing" for name in schema["required"] if name not in value)
    for name, item in value.items():
        if name in properties:
            yield from violations(item, properties[name], f"{place}.{name}")
        elif not schema.get("additionalProperties", True):
            yield f"{place}: wanted no {name}, found one"
