"""What pages show of commands is what these print: `python -m tests.test_docs_shown` writes it, tests compare it."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

from tests.kit import nodes, shown
from tests.kit.node import AT_ONCE, Node

PROGRAM = Path(sys.executable).with_name("ca-bridge")
PAGES = [
    page for page in sorted((shown.ROOT / "docs").glob("*.md")) if shown.names_in(page.read_text(encoding="utf-8"))
]

pytestmark = [
    pytest.mark.kube("kubeadm", "kube-apiserver", "etcd"),
    pytest.mark.skipif(os.geteuid() != 0, reason="run it as root: it mounts directories over /etc"),
]


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of one walk through all commands."""
    return shown.blocks(tmp_path_factory.mktemp("shown"))


def elsewhere(page: Path) -> bool:
    """Whether a running node alone fills a page's blocks."""
    return set(shown.names_in(page.read_text(encoding="utf-8"))) <= shown.LIVE.keys()


@pytest.mark.parametrize("page", [page for page in PAGES if not elsewhere(page)], ids=lambda page: page.stem)
def test_a_page_shows_what_its_commands_print(page: Path, blocks: dict[str, str]) -> None:
    """At 80 columns, on a PKI of the real kubeadm with a real CA; another line would be found."""
    text = page.read_text(encoding="utf-8")
    assert text == shown.written(text, blocks), "run: python -m tests.test_docs_shown"
    name = next(name for name in shown.names_in(text) if name in blocks)
    assert text != shown.written(text, {**blocks, name: "$ another line"})


def test_each_command_is_on_a_page(blocks: dict[str, str]) -> None:
    """And no page has a block that no command fills; none of them ended in a mistake of ours."""
    on_pages = {name for page in PAGES for name in shown.names_in(page.read_text(encoding="utf-8"))}
    assert on_pages == {name for name in blocks if not name.startswith("-")} | shown.LIVE.keys()
    assert [name for name, text in blocks.items() if "Traceback" in text or "rror:" in text] == []


def test_the_same_run_at_another_time_looks_the_same() -> None:
    """Dates move with the clock, and what is drawn by lot is counted; a date that is none of the run's own differs."""
    normal = shown.Normal()
    line = "until {:%Y-%m-%d %H:%M} UTC, serial {}, in backups/{:%Y%m%dT%H%M%SZ}-{}"
    began, later = normal.began, normal.began.replace(year=normal.began.year - 1)
    first = normal.of(line.format(began, "4E07408562BEDB8B", began, "5feceb66"))
    assert first == "until 2027-03-01 03:00 UTC, serial 5FECEB66FFC86F38, in backups/20270301T030000Z-6b86b273"
    assert shown.Normal().of(line.format(began, "2C624232CDD22177", began, "12345678")) == first
    assert shown.Normal().of(line.format(later, "2C624232CDD22177", later, "12345678")) != first


def main() -> None:
    """Write the blocks of all pages; with `--node` those of a node that runs."""
    if "--node" in sys.argv:
        with Node.up(f"shown-{os.getpid() % 100_000}", "198.18.77.62", kubelet=AT_ONCE) as node:
            nodes.make_ready(node)
            node.exec(PROGRAM, "prove", "--wait", "60s")
            found = shown.live(node)
    else:
        with tempfile.TemporaryDirectory() as directory:
            found = shown.blocks(Path(directory))
    for page in PAGES:
        page.write_text(shown.written(page.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    main()
