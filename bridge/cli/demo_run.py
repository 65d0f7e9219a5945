"""
The program, as `demo` starts it, with the arguments COUNT DIRECTORY ARGUMENT….

COUNT is `all`, or how many files below DIRECTORY it may put into their places before SIGKILL ends it.
"""

from __future__ import annotations

import os
import signal
import sys

from bridge.cli.app import app


def _kill_after(count: int, directory: str) -> None:
    left = count

    def look(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event == "os.rename" and str(arguments[1]).startswith(f"{directory}/"):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(look)


if __name__ == "__main__":
    _, may_rename, below, *arguments = sys.argv
    if may_rename != "all":
        _kill_after(int(may_rename), below)
    sys.argv = ["ca-bridge", *arguments]
    app()
