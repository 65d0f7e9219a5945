"""What a check says, and how findings with one cause become one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from bridge.errors import BridgeError, Exit
from bridge.system.console import ROOT_HINT, lacks_rights

Level = Literal["error", "warning", "ok"]
LEVELS: tuple[Level, ...] = ("error", "warning", "ok")

#: Where a message names a place of one CA, so that two of them are the same but for that.
_URL = re.compile(r"https?://\S+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    check: str  #: Its name for programs, such as `key-of-another-certificate`; it stays.
    about: str  #: A certificate, a CA, a file, a setting.
    text: str  #: Without what it is about; untrusted words in it are shown as they may be.
    hint: str = ""


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
    """Group by level (the worst first), check, hint and text; URLs in a text make no difference."""
    groups: dict[tuple[Level, str, str, str], list[Finding]] = {}
    for one in findings:
        hint = ROOT_HINT if lacks_rights(one.text) else one.hint
        groups.setdefault((one.level, one.check, hint, _URL.sub("URL", one.text)), []).append(one)
    found = [
        Cause(
            level=ones[0].level,
            check=ones[0].check,
            about=tuple(dict.fromkeys(one.about for one in ones)),
            text=ones[0].text,
            hint=hint,
        )
        for (_, _, hint, _), ones in groups.items()
    ]
    return sorted(found, key=lambda one: LEVELS.index(one.level))


def exit_code(found: Sequence[Finding] | Sequence[Cause]) -> int:
    """1 if there is an error, 3 if there is a warning, else 0."""
    levels = {one.level for one in found}
    return Exit.FAILED if "error" in levels else Exit.DUE if "warning" in levels else Exit.DONE
