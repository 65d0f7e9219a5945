"""Prometheus' text format, and the status pages of our services: `/metrics`, `/healthz`, `/readyz`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from typing import Any

#: A page's status and text; it is asked for by every client.
Page = Callable[[], tuple[int, str]]


def health(troubles: Iterable[str], good: str) -> tuple[int, str]:
    """Return a page with a line for each trouble, empty ones left out; without troubles, the text for a good state."""
    lines = [f"{text}\n" for text in troubles if text]
    return (HTTPStatus.SERVICE_UNAVAILABLE, "".join(lines)) if lines else (HTTPStatus.OK, good)


def metric(name: str, help_text: str, samples: Iterable[tuple[str, object]], kind: str = "gauge") -> str:
    """One metric; each sample is the text after its name, such as labels, and its value; empty without samples."""
    lines = [f"{name}{rest} {value}\n" for rest, value in samples]
    return f"# HELP {name} {help_text}\n# TYPE {name} {kind}\n" + "".join(lines) if lines else ""


def labels(**pairs: str) -> str:
    """Labels in braces; empty if there are none."""
    text = ",".join(f'{name}="{_escaped(value)}"' for name, value in pairs.items())
    return f"{{{text}}}" if text else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def by_label(label: str, values: Mapping[Any, float]) -> list[tuple[str, object]]:
    """Samples of a metric with one label."""
    return sorted((labels(**{label: f"{key}"}), value) for key, value in dict(values).items())
