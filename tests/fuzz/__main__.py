"""
`python -m tests.fuzz TARGET [libFuzzer's options] [CORPUS]`: inputs guided by coverage, until it is stopped.

Needs `pip install atheris` (CPython 3.11 to 3.13 on Linux; it is in no dependency group, as it pays over hours only).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-untyped]

with atheris.instrument_imports(include=["bridge"]):
    from tests.fuzz.targets import targets


def main() -> None:
    """Fuzz one target."""
    known = targets()
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in known:
        raise SystemExit(f"wanted one of {', '.join(known)}, found {name!r}")
    target = known[name]
    options = [option for option in sys.argv[2:] if option.startswith("-")]
    given = [folder for folder in sys.argv[2:] if not folder.startswith("-")]
    corpus = Path(given[0] if given else tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup([sys.argv[0], *options, str(corpus)], target.holds)
    atheris.Fuzz()


main()
