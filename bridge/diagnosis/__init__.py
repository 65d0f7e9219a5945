"""Whether everything is ready for the next renewal: `ca-bridge doctor`; each check yields findings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from bridge import dataclass
from bridge.errors import BridgeError, Exit
from bridge.system.console import ROOT_HINT, lacks_rights
from bridge.words import cause

#: A note is in order, and worth knowing; for programs it is "ok".
Level = Literal["error", "warning", "note", "ok"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note", "ok")


_WOULD_SIGN, _ANY_PATH = "what-the-ca-would-sign", "…"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    check: str  #: Its name for programs, such as `key-of-another-certificate`; it stays.
    about: str  #: A certificate, a CA, a file, a setting.
    text: str  #: Without what it is about; untrusted words in it are shown as they may be.
    hint: str = ""
    path: str = ""  #: A file in text and hint, which differs between findings with one cause.

    @classmethod
    def error(cls, check: str, about: str, text: str, hint: str = "", path: str = "") -> Finding:
        """A fault that makes a renewal fail, or a component."""
        return cls(level="error", check=check, about=about, text=text, hint=hint, path=path)

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
    """Group by level, check, hint and text, whatever files these name, and whatever roles and profiles at a CA."""
    groups: dict[tuple[Level, str, str, str], list[Finding]] = {}
    for one in findings:
        text, hint = _of_paths(one.text, one, [_ANY_PATH]), _of_paths(one.hint, one, [_ANY_PATH])
        if lacks_rights(one.text):
            hint = ROOT_HINT
        if one.check in {_WOULD_SIGN, "backend"}:
            text = cause(one.text, one.about)
        shared_hint = "" if one.check == _WOULD_SIGN else hint
        groups.setdefault((one.level, one.check, shared_hint, text), []).append(one)
    return sorted(map(_one_of, groups.values()), key=lambda one: LEVELS.index(one.level))


def _one_of(found: Sequence[Finding]) -> Cause:
    first, paths = found[0], list(dict.fromkeys(one.path for one in found))
    return Cause(
        level=first.level,
        check=first.check,
        about=tuple(dict.fromkeys(one.about for one in found)),
        text=_of_paths(first.text, first, paths, ", "),
        hint=ROOT_HINT if lacks_rights(first.text) else _of_paths(first.hint, first, paths),
    )


def _of_paths(text: str, finding: Finding, paths: Sequence[str], separator: str = " ") -> str:
    """The text with these paths in place of the finding's own; in a command they are separated by blanks."""
    return text.replace(finding.path, separator.join(paths)) if finding.path else text


def exit_code(found: Sequence[Finding] | Sequence[Cause]) -> int:
    """1 if there is an error, 3 if there is a warning, else 0."""
    levels = {one.level for one in found}
    return Exit.FAILED if "error" in levels else Exit.DUE if "warning" in levels else Exit.DONE
