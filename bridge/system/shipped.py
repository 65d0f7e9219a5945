"""Where the files are that are installed with the program: example settings, policies, manifests, units."""

from __future__ import annotations

import sys
from pathlib import Path

_SHARE = "share/kubeadm-ca-bridge"


def shipped(name: str) -> Path | None:
    """A file or directory of them; None: the installation lacks it."""
    here = Path(__file__)
    # In the tree of a release, in a virtual environment, in a clone.
    places = (
        here.parents[min(4, len(here.parents) - 1)] / _SHARE,
        Path(sys.prefix, _SHARE),
        here.parents[2] / "config",
    )
    return next((place / name for place in places if (place / name).exists()), None)


def how_to_begin(example: str, place: Path) -> str:
    """
    A hint for a file that is missing: the command that puts the example there.

    Args:
        example: Its path below the examples, such as `desk/desk-policy.toml`.
        place: Where the file was looked for.
    """
    return f"begin with the example: install -m 0644 {shipped(example) or f'config/{example}'} {place}"
