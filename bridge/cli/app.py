"""
The command line: parse, call one function of the command's module, exit with what it returns.

The commands are in the files that are imported here, by what they are for. Each command loads what it needs, since a
cron job waits for it; results go to standard output, everything else to standard error.
"""

from __future__ import annotations

# Whoever is imported adds its commands.
from bridge.cli import (
    bootstrap,
    commands_carried,  # noqa: F401
    commands_looking,  # noqa: F401
    commands_renewal,  # noqa: F401
    commands_setup,  # noqa: F401
    gateway,  # noqa: F401
    pages,  # noqa: F401
    users,
)
from bridge.cli.program import app

__all__ = ["app"]

app.add_typer(bootstrap.app, name="bootstrap")
app.add_typer(users.kubeconfig_app, name="kubeconfig")
