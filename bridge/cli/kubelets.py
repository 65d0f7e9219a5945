"""`kubelets on` and `kubelets off`: whether kubelets ask the cluster for their serving certificates."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

import typer

from bridge.cli.options import Common, Output, OutputOption, command, duration_option, group
from bridge.cli.printing import say, say_json, say_sentence
from bridge.control_plane import kubelet_serving
from bridge.control_plane.kubelet_serving import Report

commands = typer.Typer()
_kubelets = group(commands, "kubelets", "Have kubelets ask for serving certificates, or not.")

_WAIT = timedelta(minutes=2)

ForceOption = Annotated[
    bool, typer.Option("--force", help="Also while another node is unhealthy, or shortly after another restart.")
]


@command(_kubelets, "on")
def on(
    common: Common,
    wait: Annotated[
        timedelta,
        duration_option(
            "How long to wait for the kubelet's certificate before its old configuration comes back. [default: 2m]"
        ),
    ] = _WAIT,
    force: ForceOption = False,
    output: OutputOption = Output.TEXT,
) -> int:
    """
    Have this node's kubelet ask for its serving certificate; after the last one, the API servers verify kubelets.

    Run it on a control-plane node, on each other node, and then on the control-plane nodes again. It sets
    serverTLSBootstrap, restarts the kubelet, and waits for the certificate; a control plane also writes kubelet-config and,
    once all kubelets serve rightly, kubeadm-config and its API server's manifest. Exits with 4 while other nodes come first,
    and with 8 if the kubelet has its old configuration again.
    """
    return _switch(common, is_on=True, force=force, wait=wait, output=output)


@command(_kubelets, "off")
def off(common: Common, force: ForceOption = False, output: OutputOption = Output.TEXT) -> int:
    """
    Go back: the API servers verify no kubelet, and kubelets make their serving certificates themselves.

    Run it on each control-plane node, then on the first one again, then on the workers. Exits with 4 while other nodes come
    first.
    """
    return _switch(common, is_on=False, force=force, wait=_WAIT, output=output)


def _switch(common: Common, *, is_on: bool, force: bool, wait: timedelta, output: Output) -> int:
    settings = common.settings()

    def tell(text: str) -> None:
        if output is not Output.JSON:
            say_sentence(text)

    report = kubelet_serving.switch(settings, on=is_on, force=force, wait=wait, tell=tell)
    if output is Output.JSON:
        say_json(exitCode=report.exit_code, done=report.done, left=report.left)
    else:
        _say(report, is_on=is_on)
    return report.exit_code


def _say(report: Report, *, is_on: bool) -> None:
    if report.left:
        say("Other nodes come first:")
        for text in report.left:
            say_sentence(text, "  ")
        say(f"Run `ca-bridge kubelets {'on' if is_on else 'off'}` there, and then here again.")
    elif not report.done:
        say("Nothing to do: all of it is so already.")
