"""What a check says, and how findings with one cause become one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from bridge.errors import BridgeError, Exit
from bridge.system.console import ROOT_HINT, lacks_rights
from bridge.words import cause

#: A note is in order, and worth knowing; for programs it is "ok".
Level = Literal["error", "warning", "note", "ok"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note", "ok")


_WOULD_SIGN = "what-the-ca-would-sign"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    check: str  #: Its name for programs, such as `key-of-another-certificate`; it stays.
    about: str  #: A certificate, a CA, a file, a setting.
    text: str  #: Without what it is about; untrusted words in it are shown as they may be.
    hint: str = ""

    @classmethod
    def error(cls, check: str, about: str, text: str, hint: str = "") -> Finding:
        """A fault that makes a renewal fail, or a component."""
        return cls(level="error", check=check, about=about, text=text, hint=hint)

    @classmethod
    def warning(cls, check: str, about: str, text: str, hint: str = "") -> Finding:
        """A fault that will do so, or may."""
        return cls(level="warning", check=check, about=about, text=text, hint=hint)

    @classmethod
    def note(cls, check: str, about: str, text: str, hint: str = "") -> Finding:
        """Something that is in order, and worth knowing."""
        return cls(level="note", check=check, about=about, text=text, hint=hint)

    @classmethod
    def ok(cls, check: str, about: str, text: str) -> Finding:
        """Something that is in order."""
        return cls(level="ok", check=check, about=about, text=text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """Findings that say the same of several subjects."""

    level: Level
    check: str
    about: tuple[str, ...]
    text: str
    hint: str


def from_error(check: str, about: str, error: BridgeError) -> Finding:
    """Turn an error into a finding; its text is about one subject already."""
    return Finding(level="error", check=check, about=about, text=error.reason, hint=error.hint)


def causes(findings: Iterable[Finding]) -> list[Cause]:
    """Group by level, check, hint and text; at a CA, the names of roles and profiles make no difference."""
    groups: dict[tuple[Level, str, str, str], list[Finding]] = {}
    for one in findings:
        hint = ROOT_HINT if lacks_rights(one.text) else one.hint
        told = "" if one.check == _WOULD_SIGN else hint
        text = cause(one.text, one.about) if one.check in {_WOULD_SIGN, "backend"} else one.text
        groups.setdefault((one.level, one.check, told, text), []).append(one)
    found = [
        Cause(
            level=ones[0].level,
            check=ones[0].check,
            about=tuple(dict.fromkeys(one.about for one in ones)),
            text=ones[0].text,
            hint=ROOT_HINT if lacks_rights(ones[0].text) else ones[0].hint,
        )
        for ones in groups.values()
    ]
    return sorted(found, key=lambda one: LEVELS.index(one.level))


def exit_code(found: Sequence[Finding] | Sequence[Cause]) -> int:
    """1 if there is an error, 3 if there is a warning, else 0."""
    levels = {one.level for one in found}
    return Exit.FAILED if "error" in levels else Exit.DUE if "warning" in levels else Exit.DONE
