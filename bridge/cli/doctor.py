"""`doctor`: prints what an examination found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from bridge.cli.printing import say, say_json
from bridge.diagnosis import findings
from bridge.diagnosis.examination import examine
from bridge.diagnosis.findings import LEVELS, Cause
from bridge.settings.tables import Settings

_ABOUT_WIDTH = 26  #: As `backend of front-proxy-ca`.


def run(settings: Settings, now: datetime, *, as_json: bool = False) -> int:
    """Print the report; 1 if there is an error, 3 if there is a warning, else 0."""
    causes = findings.causes(examine(settings, now))
    code = findings.exit_code(causes)
    if as_json:
        say_json({"exitCode": code, "findings": [_entry(cause) for cause in causes]})
    else:
        for cause in causes:
            say("\n".join(_lines(cause)))
        say(_count(causes))
    return code


def _entry(cause: Cause) -> dict[str, object]:
    return {
        "level": cause.level,
        "check": cause.check,
        "about": list(cause.about),
        "text": cause.text,
        "hint": cause.hint,
    }


def _lines(cause: Cause) -> Iterator[str]:
    """The sentence stands beside its subject, or below several."""
    level, about = cause.level.ljust(len("warning")), ", ".join(cause.about)
    margin = " " * (len(level) + 2)
    if len(about) > _ABOUT_WIDTH:
        yield f"{level}  {about}:"
        yield f"{margin}{cause.text}"
    else:
        yield f"{level}  {about.ljust(_ABOUT_WIDTH)}  {cause.text}"
    if cause.hint:
        yield f"{margin}hint: {cause.hint}"


def _count(causes: Sequence[Cause]) -> str:
    counts = {level: sum(cause.level == level for cause in causes) for level in LEVELS}
    if not counts["error"] and not counts["warning"]:
        return "nothing is wrong"
    words = [f"{counts[level]} {level}{'' if counts[level] == 1 else 's'}" for level in LEVELS[:2] if counts[level]]
    return ", ".join(words)
