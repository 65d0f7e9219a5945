"""What a night's `renew` with nothing due loads: `python -m tests.measure --start-up`; as root, as the cron job runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tests.kit.cas import Bridge
from tests.kit.pki import handmade_pki

#: Runs the quiet path of `renew` in a process of its own, and prints what that has loaded.
_LOADS = """
import json, sys
before = set(sys.modules)
from bridge import entry
assert entry.nothing_to_do(sys.argv[1:]) is not None, "wanted the quiet path"
files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items() if name not in before}
print(json.dumps(files))
"""


def loaded(bridge: Bridge) -> tuple[int, int, int]:
    """Our modules, their lines, and the modules of others that a renewal with nothing due loads."""
    command = [sys.executable, "-P", "-c", _LOADS, "renew", "--config", str(bridge.config)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    ours = [path for name, path in found.items() if name.split(".")[0] == "bridge"]
    lines = sum(len(Path(path).read_text(encoding="utf-8").splitlines()) for path in ours)
    return len(ours), lines, len(found) - len(ours)


def bridge_with_nothing_due(directory: Path) -> Bridge:
    """A control-plane node whose settings a run has checked before."""
    node = handmade_pki(directory / "node", not_after=datetime.now(UTC) + timedelta(days=300))
    bridge = Bridge(pki=node, directory=directory / "bridge")
    if (run := bridge.run("renew")).returncode:
        raise SystemExit(f"ca-bridge renew: exit {run.returncode}\n{run.stderr}")
    return bridge


def table(directory: Path) -> str:
    """Markdown."""
    cells_of_renew = map("{:,}".format, loaded(bridge_with_nothing_due(directory)))
    head = ("command with nothing due", "ca-bridge's modules", "their lines", "other modules")
    row = ("`renew`", *cells_of_renew)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), row))
