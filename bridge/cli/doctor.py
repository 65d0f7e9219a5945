"""`doctor`: the check that the next renewal will succeed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from bridge import diagnosis
from bridge.cli.declare import Common, command, option
from bridge.cli.options import Output, OutputOption, utc_now
from bridge.cli.printing import say_json, say_sentence, say_verdict, width_here
from bridge.diagnosis.examination import before_upgrade, examine, for_ca_keys, of_kubelets
from bridge.system.console import ROOT_HINT, doing
from bridge.words import counted

commands = typer.Typer()

_ABOUT_WIDTH = 26  #: The width of `backend of front-proxy-ca`.


@command(commands, "doctor")
def doctor(
    common: Common,
    upgrade: Annotated[
        bool,
        option(
            "Say instead what `kubeadm upgrade` will do to certificates here, and where it would abort.",
            "--before-upgrade",
        ),
    ] = False,
    kubelets: Annotated[
        bool, option("Show instead every kubelet's serving certificate, and which API servers verify it.")
    ] = False,
    ca_keys: Annotated[
        Path | None,
        option(
            "Look instead for the CAs' private keys in every file below DIR (/ is all of this node), by content.", "DIR"
        ),
    ] = None,
    output: OutputOption = Output.TEXT,
) -> int:
    """
    Check that everything is ready for the next renewal.

    It checks files, keys, owners, manifests, clock, disk space and secrets, whether what is installed would survive a
    restart, and for each authority whether its backend answers, is the right CA, and would sign exactly this. At a CA
    desk it checks policy, CAs and keys. It asks the CAs, has nothing signed and writes nothing. Exits with 1 for an
    error, with 3 for a warning.
    """
    settings = common.settings()
    look = before_upgrade if upgrade else of_kubelets if kubelets else examine
    step = "looking at this node, and asking the CAs"
    if ca_keys is not None:
        look, step = partial(for_ca_keys, ca_keys.absolute()), f"reading the files below {ca_keys}"
    with doing(step, is_plain=False):
        causes = diagnosis.causes(look(settings, utc_now()))
    code = diagnosis.exit_code(causes)
    if output is Output.JSON:
        as_ok = [replace(cause, level="ok") if cause.level == "note" else cause for cause in causes]
        say_json(exitCode=code, findings=as_ok)
    else:
        for cause in _rights_first(causes):
            _say_cause(cause)
        counts = {level: sum(cause.level == level for cause in causes) for level in diagnosis.LEVELS[:2]}
        words = [counted(count, level) for level, count in counts.items() if count]
        unasked = "" if all(cause.check != "by-hand" for cause in causes) else " on this node; no CA was asked"
        worst = next((level for level, count in counts.items() if count), "ok")
        say_verdict(", ".join(words) or f"nothing is wrong{unasked}", worst)
    return code


def _rights_first(causes: Sequence[diagnosis.Cause]) -> list[diagnosis.Cause]:
    """Merge all causes that only root may look at into one, and put it first."""
    closed = [cause for cause in causes if cause.hint == ROOT_HINT]
    if not closed:
        return list(causes)
    names = ", ".join(dict.fromkeys(about for cause in closed for about in cause.about))
    text = f"only root may look at: {names}"
    first = diagnosis.Cause("error", "rights", ("this user",), text, ROOT_HINT)
    return [first, *(cause for cause in causes if cause.hint != ROOT_HINT)]


def _say_cause(cause: diagnosis.Cause) -> None:
    """Print a cause beside its subject; below it, if there are several subjects or the line is too long."""
    level, about = cause.level.ljust(len("warning")), ", ".join(cause.about)
    margin = " " * (len(level) + 2)
    is_long, width = len(about) > _ABOUT_WIDTH, width_here()
    line = f"{level}  {about.ljust(_ABOUT_WIDTH)}  {cause.text}"
    if is_long or (width is not None and len(line) > width):
        colon = ":" if is_long else ""
        say_sentence(f"{level}  {about}{colon}", hanging=len(margin), style=cause.level)
        say_sentence(cause.text, margin)
    else:
        say_sentence(line, style=cause.level)
    if cause.hint:
        say_sentence(f"hint: {cause.hint}", margin)
