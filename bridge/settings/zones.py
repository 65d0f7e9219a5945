"""The time zone that windows are in: the one named, or the machine's."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, tzinfo
from pathlib import Path

from bridge.errors import SettingsError, SettingsProblem

LOCALTIME = Path("/etc/localtime")
_WANTED = 'the name of a time zone that this machine knows, such as "Europe/Berlin", or "" for the machine\'s own'


@dataclass(frozen=True, slots=True)
class Zone:
    """A name of the IANA database; empty: the machine's own zone."""

    name: str = ""

    @classmethod
    def from_setting(cls, value: object) -> Zone:
        """
        Such as `"Europe/Berlin"`.

        Raises:
            ValueError: Its text is what was wanted.
        """
        if not isinstance(value, str) or (value and _named(value) is None):
            raise ValueError(_WANTED)
        return cls(value)

    def __str__(self) -> str:
        return str(self.resolve())

    def resolve(self) -> tzinfo:
        """
        The zone itself; its `str` is its name.

        Raises:
            SettingsError: The machine's own zone is one that it does not know.
        """
        zone = _named(self.name) if self.name else _of_the_machine()
        if zone is None:
            wanted = "the name of a time zone, since the machine's own is not in its database"
            found = f"TZ={os.environ['TZ']!r}" if "TZ" in os.environ else str(LOCALTIME)
            raise SettingsError([SettingsProblem("renewal.window_zone", wanted, found)])
        return zone


def _of_the_machine() -> tzinfo | None:
    """The machine's time zone as the C library finds it: TZ, then /etc/localtime, then UTC (tzset(3))."""
    text = os.environ.get("TZ")
    if text is None:
        return _of_file(LOCALTIME) if LOCALTIME.exists() else UTC
    name = text.removeprefix(":")
    if not name:
        return UTC
    return _of_file(Path(name)) if name.startswith("/") else _named(name)


def _of_file(path: Path) -> tzinfo | None:
    from zoneinfo import ZoneInfo  # noqa: PLC0415 (only where a window is set)

    try:
        real = path.resolve()
        _, found, name = str(real).partition("/zoneinfo/")
        named = _named(name.removeprefix("posix/")) if found else None
        if named is not None:
            return named
        with real.open("rb") as file:
            return ZoneInfo.from_file(file, key=str(path))  # a copy, as in some containers
    except (OSError, ValueError):
        return None


def _named(name: str) -> tzinfo | None:
    from zoneinfo import ZoneInfo  # noqa: PLC0415 (only where a window is set)

    try:
        return ZoneInfo(name)
    except (OSError, ValueError, KeyError):  # a directory, not a zone's file, not there
        return None
