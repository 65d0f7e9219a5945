"""`ca-bridge doctor`: checks, each of which yields findings, that everything is ready for the next renewal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from bridge.errors import BridgeError, Exit
from bridge.system.console import ROOT_HINT, lacks_rights
from bridge.words import cause

#: A note is about something in order that the operator should know; JSON calls it "ok".
Level = Literal["error", "warning", "note", "ok"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note", "ok")

_WOULD_SIGN, _ANY_PATH = "what-the-ca-would-sign", "…"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check of one subject."""

    level: Level
    check: str  #: The check's name for programs, such as `key-of-another-certificate`; it never changes.
    about: str  #: A certificate, a CA, a file, a setting.
    text: str  #: The sentence without its subject; untrusted words in it are already safe to print.
    hint: str = ""
    path: str = ""  #: A file in text and hint that differs between findings with the same cause.

    @classmethod
    def error(cls, check: str, about: str, text: str, hint: str = "", path: str = "") -> Finding:
        """Return a fault that breaks a renewal or a component."""
        return cls("error", check, about, text, hint, path)

    @classmethod
    def warning(cls, check: str, about: str, text: str, hint: str = "") -> Finding:
        """Return a fault that will, or may, break a renewal or a component."""
        return cls("warning", check, about, text, hint)

    @classmethod
    def note(cls, check: str, about: str, text: str, hint: str = "") -> Finding:
        """Return something in order that the operator should know."""
        return cls("note", check, about, text, hint)

    @classmethod
    def ok(cls, check: str, about: str, text: str) -> Finding:
        """Return something in order."""
        return cls("ok", check, about, text)


@dataclass(frozen=True, slots=True)
class Cause:
    """Findings that say the same about several subjects."""

    level: Level
    check: str
    about: tuple[str, ...]
    text: str
    hint: str


def from_error(check: str, about: str, error: BridgeError) -> Finding:
    """Turn an error into a finding; the error's reason does not name the subject."""
    return Finding.error(check, about, error.reason, error.hint)


def causes(findings: Iterable[Finding]) -> list[Cause]:
    """Group findings by level, check, hint and text, ignoring the files, roles and profiles that these name."""
    groups: dict[tuple[Level, str, str, str], list[Finding]] = {}
    for finding in findings:
        text, hint = _with_paths(finding.text, finding, [_ANY_PATH]), _with_paths(finding.hint, finding, [_ANY_PATH])
        if lacks_rights(finding.text):
            hint = ROOT_HINT
        if finding.check in {_WOULD_SIGN, "backend"}:
            text = cause(finding.text, finding.about)
        shared_hint = "" if finding.check == _WOULD_SIGN else hint
        groups.setdefault((finding.level, finding.check, shared_hint, text), []).append(finding)
    return sorted(map(_merged, groups.values()), key=lambda finding: LEVELS.index(finding.level))


def _merged(findings: Sequence[Finding]) -> Cause:
    first, paths = findings[0], list(dict.fromkeys(finding.path for finding in findings))
    about = tuple(dict.fromkeys(finding.about for finding in findings))
    hint = ROOT_HINT if lacks_rights(first.text) else _with_paths(first.hint, first, paths)
    return Cause(first.level, first.check, about, _with_paths(first.text, first, paths, ", "), hint)


def _with_paths(text: str, finding: Finding, paths: Sequence[str], separator: str = " ") -> str:
    """Return the text with these paths in place of the finding's own path; a command separates them with blanks."""
    return text.replace(finding.path, separator.join(paths)) if finding.path else text


def exit_code(findings: Sequence[Finding] | Sequence[Cause]) -> int:
    """Return 1 if there is an error, 3 if there is a warning, else 0."""
    levels = {finding.level for finding in findings}
    return Exit.FAILED if "error" in levels else Exit.DUE if "warning" in levels else Exit.DONE
