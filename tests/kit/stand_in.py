"""
A stand-in for a company's command line program: it takes exactly the calls that the test announced, in their order.

An argument that is not as announced, a file with other content, or one call more ends with status 99, and `done`
fails: so what the stand-in answers is worth as much as the check of what it was asked.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

_PROGRAM = """\
#!{python}
import json, os, re, sys
os.umask(0o077)
place = {place!r}
with open(place + "/calls.json") as file:
    calls = json.load(file)
count = len(os.listdir(place + "/taken"))


def wrong(text):
    with open(place + "/wrong", "a") as file:
        file.write(text + "\\n")
    sys.stderr.write("stand-in: " + text + "\\n")
    sys.exit(99)


if count == len(calls):
    wrong("called once more: " + repr(sys.argv))
call = calls[count]
asked = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
wanted = [call["program"], *call["arguments"]]
if len(asked) != len(wanted) or not all(re.fullmatch(w, a) for w, a in zip(wanted, asked)):
    wrong("wanted " + repr(wanted) + ", found " + repr(asked))
for index, content in call["reads"].items():
    with open(asked[int(index)].removeprefix("fileb://")) as file:
        if file.read().strip() != content.strip():
            wrong("argument " + index + " is a file with something else in it")
for index, content in call["writes"].items():
    with open(asked[int(index)], "w") as file:
        file.write(content)
open(place + "/taken/" + str(count), "w").close()
sys.stdout.write(call["stdout"])
sys.stderr.write(call["stderr"])
sys.exit(call["status"])
"""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One that is to come, and what it answers."""

    program: str
    arguments: Sequence[str]  #: Each a regular expression for the whole argument.
    stdout: str = ""
    stderr: str = ""
    status: int = 0
    reads: Mapping[int, str] = field(default_factory=dict)  #: By index (1 is the first argument): a file's content.
    writes: Mapping[int, str] = field(default_factory=dict)  #: By index: what is written to the file.


class StandIn:
    """Programs in a directory for `PATH`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "taken").mkdir(parents=True)
        self._names: set[str] = set()
        self._calls: list[Call] = []

    @property
    def path(self) -> str:
        """For `PATH`: these programs first, then the system's."""
        return f"{self.directory}:/usr/bin:/bin"

    def expect(self, *calls: Call) -> None:
        """Calls that are to come next."""
        self._calls += calls
        (self.directory / "calls.json").write_text(json.dumps([asdict(call) for call in self._calls]))
        for name in {call.program for call in calls} - self._names:
            program = self.directory / name
            program.write_text(_PROGRAM.format(python=sys.executable, place=str(self.directory)))
            program.chmod(0o755)
            self._names.add(name)

    def done(self) -> None:
        """All calls came, and no other."""
        wrong = self.directory / "wrong"
        assert not wrong.exists(), wrong.read_text()
        assert len(list((self.directory / "taken").iterdir())) == len(self._calls)
