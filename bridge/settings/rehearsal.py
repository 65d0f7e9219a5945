"""The settings of a rehearsal: those of `[authority.NAME.rehearsal]` over the authority's own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from bridge.settings.tables import Settings

#: Keys of the table that are not the backend's.
_OURS = ("backend", "anchor")


def for_rehearsal(settings: Settings) -> Settings:
    """
    The settings with which a rehearsal asks; unchanged where no authority has a table for it (pure).

    With another backend, the authority's own keys do not count: they belong to the first one.
    """
    authorities, tables = {}, {}
    for name, ours in settings.authorities.items():
        over = {key: value for key, value in ours.rehearsal.items() if key not in _OURS}
        backend = ours.rehearsal.get("backend", ours.backend)
        own = settings.authority_tables.get(name, {}) if backend == ours.backend else {}
        authorities[name] = dataclasses.replace(ours, backend=backend)
        tables[name] = {**own, **over}
    return dataclasses.replace(settings, authorities=authorities, authority_tables=tables)


def anchor(settings: Settings, authority: str) -> Path | None:
    """The CA certificates that a rehearsal's answers must lead to; None: the node's own."""
    ours = settings.authorities.get(authority)
    named = ours.rehearsal.get("anchor") if ours is not None else None
    return Path(named) if named is not None else None


def is_scratch(settings: Settings, authority: str) -> bool:
    """Whether a rehearsal asks somebody or something else than a renewal, which may give less."""
    ours = settings.authorities.get(authority)
    return ours is not None and bool(ours.rehearsal)
