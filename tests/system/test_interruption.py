"""A signal ends a run, wherever the main thread is."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

#: Another thread is given the signal, and the main thread waits for what never comes: as if it had come just before.
PROGRAM = """
import signal, sys, threading, time
from concurrent.futures import Future
from bridge.system import waiting
{listen}
def waits():
    frame = sys._current_frames()[threading.main_thread().ident]
    return frame.f_code.co_name == "wait" and frame.f_back.f_code.co_name == "result"  # a thread's start waits, too
def hit():
    while not waits():
        time.sleep(0.01)
    time.sleep(0.3)
    signal.pthread_kill(threading.get_ident(), signal.{name})
threading.Thread(target=hit, daemon=True).start()
try:
    Future().result({seconds})
except KeyboardInterrupt as e:
    sys.exit(waiting.exit_code(e))
except TimeoutError:
    sys.exit(1)
"""


def run(name: str, listen: str, seconds: float) -> tuple[int, float]:
    """Exit code, and how long it took."""
    begin = time.monotonic()
    program = PROGRAM.format(listen=listen, name=name, seconds=seconds)
    code = subprocess.run([sys.executable, "-c", program], check=False, timeout=900).returncode
    return code, time.monotonic() - begin


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_that_comes_before_a_wait_ends_it(name: str, code: int) -> None:
    """Within a second or so, and not when what is waited for is there; without us it is seen only then."""
    ended, seconds = run(name, "waiting.listen()", 600)
    assert ended == code
    assert seconds < 300

    late, seconds = run(name, "signal.signal(signal.SIGTERM, waiting._terminated)", 8)
    assert late == code
    assert seconds > 8


def test_a_program_that_is_started_has_no_timer() -> None:
    """It would be killed by it."""
    program = "from bridge.system import waiting; import subprocess, sys; waiting.listen(); sys.exit(subprocess.call(['sleep', '2.5']))"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=300).returncode == 0


#: The parent's own end: what it ignores, the program that takes its place ignores, too.
DEAF = "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
CODES = """
from datetime import timedelta
from bridge.system import waiting
from bridge.system.run_command import Command, run
waiting.listen()
for words in (["sh", "-c", "exit 75"], ["true"]):
    print(run(Command(words=words, environment={"PATH": "/usr/bin:/bin"}, limit=timedelta(minutes=5))).code)
"""


@pytest.mark.parametrize("parent", [(), ("-c", DEAF)], ids=["usual", "deaf"])
def test_no_parent_hides_how_programs_end(parent: tuple[str, ...]) -> None:
    """With SIGCHLD ignored by ours, as some daemons leave it, a hook that fails would count as one that succeeds."""
    words = [sys.executable, *parent, "-c", CODES]
    assert subprocess.run(words, check=True, capture_output=True, text=True, timeout=600).stdout.split() == ["75", "0"]
