"""`serving-certs` and `kubelets`: which components and kubelets serve certificates of the cluster's CA."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

import typer

from bridge.cli import components, renew
from bridge.cli.options import (
    ZERO,
    Common,
    ForceOption,
    Output,
    OutputOption,
    WaitOption,
    command,
    duration_option,
    group,
    utc_now,
)
from bridge.cli.printing import say, say_json, say_sentence
from bridge.control_plane import kubelet_serving
from bridge.control_plane.kubelet_serving import Report
from bridge.errors import Exit
from bridge.node import inventory, serving_pair
from bridge.renewal import serving
from bridge.renewal.select import RunOptions
from bridge.specs import SERVERS

commands = typer.Typer()
_certs = group(
    commands, "serving-certs", "Have kube-controller-manager and kube-scheduler serve certificates of the cluster's CA."
)


@command(_certs, "on")
def certs_on(common: Common, wait: WaitOption = ZERO) -> int:
    """
    Make the pairs, put them into the manifests of this node and, when each node has them, into kubeadm-config.

    Run it on one control-plane node after the other; one component at a time is restarted, and checked in use. After that each
    renewal renews them. Run it again to go on after an error, or when a CA has answered.
    """
    settings = common.settings()
    wanted = serving.components(inventory.of(settings.node), settings)
    # what a run left before its restart comes first: a renewal would complain about it
    for component in sorted(wanted, key=lambda one: not serving.is_half_done(settings, one)):
        item = serving_pair.item_of(inventory.of(settings.node), component)
        if item is not None and item.state == "present" and item.named:
            continue
        if serving.is_half_done(settings, component):
            report = serving.put_in(settings, component, wait)
            components.print_restarts(report, settings, Output.TEXT)
            code = report.exit_code
        else:
            options = RunOptions(names=(SERVERS[component].name,), wait=wait)
            code = renew.renew(settings, options, utc_now, Output.TEXT)
        if code:
            return code
    serving.assert_named(settings, wanted)
    say_sentence(serving.keep(settings, wanted, wait))
    return Exit.DONE


@command(_certs, "off")
def certs_off(common: Common, wait: WaitOption = ZERO) -> int:
    """
    Take the pairs out of kubeadm-config and of this node's manifests, and remove them, into a backup.

    The components serve with certificates of their own making again. Run it on one control-plane node after the other.
    """
    settings = common.settings()
    wanted = serving.components(inventory.of(settings.node), settings)
    if serving.forget(settings, wanted, wait):
        say("kubeadm-config names no pair any more")
    report = serving.take_out(settings, wait)
    components.print_restarts(report, settings, Output.TEXT)
    return report.exit_code


# --- kubelets -----------------------------------------------------------------------------------------------------------


_kubelets = group(commands, "kubelets", "Have kubelets ask for serving certificates, or not.")

_WAIT = timedelta(minutes=2)


@command(_kubelets, "on")
def kubelets_on(
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
def kubelets_off(common: Common, force: ForceOption = False, output: OutputOption = Output.TEXT) -> int:
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
        again = "`ca-bridge kubelets on`" if is_on else "`ca-bridge kubelets off`"
        say(f"Run {again} there, and then here again.")
    elif not report.done:
        say("Nothing to do: this node and the cluster are already set.")
