"""The tree's bill of materials: CycloneDX 1.6, JSON (https://cyclonedx.org/docs/1.6/json/)."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from release.wheels import Wheel, normal

#: For the serial number: builds with the same content have the same number.
_NAMESPACE = uuid.UUID("1f0bb5a3-1d59-5c0c-9a38-2b6a2e6f6a0e")
_LICENCE_WORDS = 60  # a longer text is a whole licence
_CLASSIFIER = "License :: OSI Approved :: "


def of(project: Wheel, wheels: Iterable[Wheel], platform: str, epoch: int) -> bytes:
    """The bill: each distribution's version, licence, dependencies, and the name and digest of each of its wheels."""
    grouped: dict[str, list[Wheel]] = {}
    for wheel in wheels:
        if wheel.name != project.name:
            grouped.setdefault(wheel.name, []).append(wheel)
    known = {name: _reference(group[0]) for name, group in sorted(grouped.items())}
    bill = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": datetime.fromtimestamp(epoch, UTC).isoformat(),
            "component": {**_component([project]), "type": "application"},
            "properties": [{"name": "ca-bridge:platform", "value": f"linux-{platform}"}],
        },
        "components": [_component(group) for _, group in sorted(grouped.items())],
        "dependencies": [
            {"ref": _reference(one), "dependsOn": sorted({known[name] for name in _needs(one) if name in known})}
            for one in (project, *(group[0] for _, group in sorted(grouped.items())))
        ],
    }
    content = json.dumps(bill, sort_keys=True)
    numbered = {**bill, "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, content)}"}
    return json.dumps(numbered, indent=1, sort_keys=True).encode() + b"\n"


def _reference(wheel: Wheel) -> str:
    return f"pkg:pypi/{wheel.name}@{wheel.version}"


def _component(group: Sequence[Wheel]) -> dict[str, Any]:
    first = group[0]
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": _reference(first),
        "name": first.name,
        "version": first.version,
        "purl": _reference(first),
        "licenses": _licences(first),
        "externalReferences": [
            {"type": "distribution", "url": one.path.name, "hashes": [{"alg": "SHA-256", "content": one.sha256}]}
            for one in group
        ],
    }
    if summary := first.metadata["Summary"]:
        component["description"] = str(summary)
    return {key: value for key, value in component.items() if value}


def _licences(wheel: Wheel) -> list[dict[str, Any]]:
    """The wheel's licence: an SPDX expression (PEP 639), else its words, else its classifiers."""
    if expression := wheel.metadata["License-Expression"]:
        return [{"expression": str(expression)}]
    words = str(wheel.metadata["License"] or "").strip()
    if words and len(words) <= _LICENCE_WORDS:
        return [{"license": {"name": words}}]
    classifiers = map(str, wheel.metadata.get_all("Classifier", []))
    names = [one.removeprefix(_CLASSIFIER) for one in classifiers if one.startswith(_CLASSIFIER)]
    return [{"license": {"name": name}} for name in names]


def _needs(wheel: Wheel) -> set[str]:
    """The distributions that the wheel needs without extras."""
    needs = map(str, wheel.metadata.get_all("Requires-Dist", []))
    return {normal(match[0]) for one in needs if "extra ==" not in one and (match := re.match(r"[\w.-]+", one))}
