"""Prometheus' text format, version 0.0.4."""

from __future__ import annotations

from collections.abc import Iterable


def metric(name: str, help_text: str, samples: Iterable[str], kind: str = "gauge") -> str:
    """One metric with its samples; empty without any."""
    lines = [f"{sample}\n" for sample in samples]
    return f"# HELP {name} {help_text}\n# TYPE {name} {kind}\n" + "".join(lines) if lines else ""


def labels(**pairs: str) -> str:
    """Labels in their braces; empty without any."""
    text = ",".join(f'{name}="{_escaped(value)}"' for name, value in pairs.items())
    return f"{{{text}}}" if text else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
