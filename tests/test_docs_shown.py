"""What pages show of commands is what these print: `python -m tests.test_docs_shown` writes it, tests compare it."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from datetime import timedelta
from difflib import unified_diff
from pathlib import Path

import pytest

from tests.kit import nodes, shown, shown_door
from tests.kit.node import AT_ONCE, Node

PROGRAM = Path(sys.executable).with_name("ca-bridge")
PAGES = [
    page for page in sorted((shown.ROOT / "docs").glob("*.md")) if shown.names_in(page.read_text(encoding="utf-8"))
]

pytestmark = [
    pytest.mark.kube("kubeadm", "kube-apiserver", "etcd", "kubectl", "cmp-ra"),
    pytest.mark.skipif(os.geteuid() != 0, reason="run it as root: it mounts directories over /etc"),
]


def test_pages_show_what_their_commands_print(tmp_path: Path) -> None:
    """At 80 columns, on a PKI of the real kubeadm with a real CA, in one walk; another line would be found."""
    blocks = shown.blocks(tmp_path / "nodes") | shown_door.blocks(tmp_path / "door")
    texts = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
    now = {name: shown.written(text, blocks) for name, text in texts.items()}
    differences = [
        line for name in texts for line in unified_diff(texts[name].split("\n"), now[name].split("\n"), name)
    ]
    assert differences == [], "run: python -m tests.test_docs_shown"
    assert texts["users.md"] != shown.written(texts["users.md"], {**blocks, "user": "$ another line"})

    on_pages = {name for text in texts.values() for name in shown.names_in(text)}
    elsewhere = shown.LIVE.keys() | shown.RUNNING.keys() | shown.BOOTED.keys()
    assert on_pages == {name for name in blocks if not name.startswith("-")} | elsewhere
    shown_now = [block for text in now.values() for block in re.findall(r"^ *```console.*?^ *```$", text, shown.BLOCK)]
    assert len(shown_now) > 40
    assert [block for block in shown_now if "Traceback" in block or "rror:" in block] == []


def test_the_same_run_at_another_time_looks_the_same() -> None:
    """Dates move with the clock, and what is drawn by lot is counted; a date that is none of the run's own differs."""
    normal = shown.Normal()
    line = "until {:%Y-%m-%d %H:%M} UTC, serial {}, in backups/{:%Y%m%dT%H%M%SZ}-{}"
    began, later = normal.began, normal.began - timedelta(days=365)
    first = normal.of(line.format(began, "4E07408562BEDB8B", began, "5feceb66"))
    assert first == "until 2027-03-01 03:00 UTC, serial 5FECEB66FFC86F38, in backups/20270301T030000Z-6b86b273"
    assert shown.Normal().of(line.format(began, "2C624232CDD22177", began, "12345678")) == first
    assert shown.Normal().of(line.format(later, "2C624232CDD22177", later, "12345678")) != first


def test_a_block_within_a_list_stays_there() -> None:
    """It is as far in as its item, whose number is followed by the next one's; a page without the block stays."""
    page = "1. Look:\n\n   ```console plan 1\n   $ old\n   ```\n\n2. Go on.\n"
    now = shown.written(page, {"plan": "$ ca-bridge plan\nnothing\n\nmore"})
    assert now == "1. Look:\n\n   ```console plan 1\n   $ ca-bridge plan\n   …\n   ```\n\n2. Go on.\n"
    assert shown.names_in(page) == ["plan"]
    assert shown.written(page, {"renew": "$ ca-bridge renew"}) == page


def main() -> None:
    """Write the blocks of all pages; with `--node` those of a node that runs."""
    if "--node" in sys.argv:
        with Node.up(f"shown-{os.getpid() % 100_000:05}", "198.18.77.97", kubelet=AT_ONCE) as node:
            nodes.make_ready(node)
            node.exec(PROGRAM, "prove", "--wait", "60s")
            found = shown.live(node)
    else:
        with tempfile.TemporaryDirectory() as directory:
            found = shown.blocks(Path(directory, "nodes")) | shown_door.blocks(Path(directory, "door"))
    for page in PAGES:
        page.write_text(shown.written(page.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    main()
