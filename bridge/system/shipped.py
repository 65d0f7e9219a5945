"""Where the files are that are installed with the program: example settings, policies, manifests, units, pages."""

from __future__ import annotations

import sys
from pathlib import Path

_SHARE, _PAGES = "share/kubeadm-ca-bridge", "share/doc/kubeadm-ca-bridge"


def shipped(name: str) -> Path | None:
    """An example, policy, manifest or unit by its path below `config/`; None: the installation lacks it."""
    return next((place / name for place in _places(_SHARE, "config") if (place / name).exists()), None)


def pages() -> Path | None:
    """The directory of the documents; None: the installation lacks it."""
    return next((place for place in _places(_PAGES, "docs") if (place / "README.md").exists()), None)


def _places(installed: str, in_clone: str) -> tuple[Path, ...]:
    """In the tree of a release, in a virtual environment, in a clone."""
    here = Path(__file__)
    return (
        here.parents[min(4, len(here.parents) - 1)] / installed,
        Path(sys.prefix, installed),
        here.parents[2] / in_clone,
    )


def how_to_begin(example: str, place: Path) -> str:
    """
    A hint for a file that is missing: the command that puts the example there.

    Args:
        example: Its path below the examples, such as `desk/desk-policy.toml`.
        place: Where the file was looked for.
    """
    return f"begin with the example: install -m 0644 {shipped(example) or f'config/{example}'} {place}"
