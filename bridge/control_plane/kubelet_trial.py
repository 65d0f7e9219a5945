"""Whether a kubelet would start with a configuration: its own validation says so, before the running one is restarted."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from bridge.system.run_command import Account, Command, passed_on, run
from bridge.words import one_line

#: A kubelet gets so far only once its configuration is valid (measured on 1.37; `run` in cmd/kubelet/app/server.go): with
#: `--exit-on-lock-contention` and no lock file it ends there, before it touches the node.
_ENDS = ("--exit-on-lock-contention", "--lock-file=")
_HAS_ENDED = "no lock file specified"
_LIMIT = timedelta(seconds=30)
_MOST_OUTPUT = 4 << 20
#: It may not change the node, whatever it does: `nobody` has no rights there.
_NOBODY = 65534
_ERROR = re.compile(r'err="((?:[^"\\]|\\.)*)"|^panic: (.*)$', re.MULTILINE)


def refusal(program: Path, arguments: Sequence[str], content: bytes) -> str:
    """Why a kubelet's program, with the arguments of the running one, refuses a configuration; empty: it is valid."""
    with tempfile.TemporaryDirectory(prefix="ca-bridge-kubelet-") as made:
        file = Path(made, "config.yaml")
        file.write_bytes(content)
        file.chmod(0o644)
        is_root = os.geteuid() == 0
        if is_root:
            os.chown(made, _NOBODY, _NOBODY)  # it may make a certificate of its own there
        words = [
            str(program),
            *_with_config(arguments, str(file)),
            *_ENDS,
            f"--cert-dir={made}",
        ]
        said = bytearray()
        command = Command(
            words=words,
            environment=passed_on({}),
            limit=_LIMIT,
            account=Account(uid=_NOBODY, gid=_NOBODY, groups=(), home="/") if is_root else None,
            most_output=_MOST_OUTPUT,
        )
        ended = run(command, said.extend, said.extend)
    text = said.decode(errors="replace")
    if _HAS_ENDED in text and ended.code:
        return ""
    errors = [said or panic for said, panic in _ERROR.findall(text)]
    last = text.strip().splitlines()[-1:]
    return one_line((errors or last or [f"it {ended.failure or 'ended'}"])[-1])[:1000]


def _with_config(arguments: Sequence[str], path: str) -> Iterator[str]:
    """The arguments with another configuration file."""
    follows = False
    for word in arguments:
        yield path if follows else f"--config={path}" if word.startswith("--config=") else word
        follows = word == "--config"
