"""`serving-certs`: certificates of the cluster's CA for kube-controller-manager and kube-scheduler, and without them again."""

from __future__ import annotations

import typer

from bridge.cli import components, renew
from bridge.cli.options import ZERO, Common, Output, WaitOption, command, group, utc_now
from bridge.cli.printing import say, say_sentence
from bridge.errors import Exit
from bridge.node import inventory, serving_pair
from bridge.renewal import serving
from bridge.renewal.select import RunOptions
from bridge.specs import SERVERS

commands = typer.Typer()
serving_certs = group(
    commands, "serving-certs", "Have kube-controller-manager and kube-scheduler serve certificates of the cluster's CA."
)


@command(serving_certs, "on")
def on(common: Common, wait: WaitOption = ZERO) -> int:
    """
    Make the pairs, put them into the manifests of this node and, when each node has them, into kubeadm-config.

    Run it on one control-plane node after the other; one component at a time is restarted, and proven. After that each
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


@command(serving_certs, "off")
def off(common: Common, wait: WaitOption = ZERO) -> int:
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
