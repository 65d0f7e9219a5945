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
