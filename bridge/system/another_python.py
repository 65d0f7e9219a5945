"""Another process with the same Python and the same modules, wherever these came from: an environment or a release's tree."""

from __future__ import annotations

import sys


def command(code: str, *arguments: str) -> list[str]:
    """
    The command that runs some code in it.

    Neither the environment nor the working directory says what it loads (-I); where this process finds its modules is
    handed on, since a release's tree is no place that Python knows by itself.

    Args:
        code: What it runs.
        arguments: Its `sys.argv`, behind the first.
    """
    options = ["-I", "-S"] if sys.flags.no_site else ["-I"]
    places = [place for place in sys.path if place]
    return [sys.executable, *options, "-c", f"import sys; sys.path[:] = {places!r}; {code}", *arguments]
