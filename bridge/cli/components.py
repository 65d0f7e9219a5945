"""`restart`, `prove`, `serving-certs` and `kubelets`: which certificates components and kubelets use and serve."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

import typer

from bridge import control_plane, monitoring
from bridge.cli import renew
from bridge.cli.declare import Common, argument, command, duration_option, group
from bridge.cli.options import ForceOption, Output, OutputOption, WaitOption, utc_now
from bridge.cli.printing import say, say_json, say_sentence, say_sentences, say_table, say_verdict
from bridge.control_plane import kubelet_serving, proof, restarts
from bridge.errors import Exit
from bridge.node import pairs
from bridge.node.reading import read_node
from bridge.renewal import serving
from bridge.renewal.selection import RunOptions
from bridge.settings.tables import Settings
from bridge.specs import SERVERS, Component
from bridge.system.console import is_verbose, print_error, printable

commands = typer.Typer()


@command(commands, "restart")
def restart(
    common: Common,
    components: Annotated[
        list[str] | None,
        argument(
            "etcd, kube-apiserver, kube-controller-manager, kube-scheduler, kubelet; all: the first four. "
            "[default: as restart.components says]",
            "[COMPONENT…|all]",
        ),
    ] = None,
    force: ForceOption = False,
    wait: WaitOption = timedelta(),
    output: OutputOption = Output.TEXT,
) -> int:
    """
    Restart what still runs on old certificates, one component at a time, each only while the other nodes are healthy.

    It does so as restart.method in the settings says; with "none" it prints what to do and exits with 7.
    """
    settings = common.settings()
    with monitoring.kept_current(settings, utc_now):
        report = restarts.restart_stale(settings, components or [], utc_now, force=force, wait=wait)
    print_restarts(report, settings, output)
    return report.exit_code


def print_restarts(report: restarts.RestartReport, settings: Settings, output: Output) -> None:
    """Print which components were restarted, or which the operator has to restart."""
    advised = report.components if report.advised else ()
    advice = {component.value: control_plane.how_to_restart(component, settings.node) for component in advised}
    if output is Output.JSON:
        done = [
            {
                "component": restarted.component,
                "seconds": None if restarted.seconds is None else round(restarted.seconds, 1),
                "exitCode": restarted.exit_code,
                "error": restarted.error and restarted.error.reason,
            }
            for restarted in report.done
        ]
        what = {"advice": advice} if report.advised else {"restarted": done}
        say_json(exitCode=report.exit_code, **what, unknown=report.unknown and report.unknown.reason)
    elif advice:
        say('With restart.method = "none" this is yours to do, one at a time:')
        say_sentences(advice.values())
    elif report.done:
        times = [(restarted.component.value, restarted.seconds) for restarted in report.done if restarted.seconds]
        rows = [(component, f"restarted, healthy after {seconds:.1f} s") for component, seconds in times]
        say_table(rows or [["nothing was restarted"]])
    elif report.unknown is None:
        say("nothing to restart: every component runs on the certificates that are installed")
    for error in filter(None, (*(restarted.error for restarted in report.done), report.unknown)):
        print_error(error)


@command(commands, "prove")
def prove(
    common: Common,
    wait: Annotated[
        timedelta, duration_option('How long to wait until everything works, such as "60s".')
    ] = timedelta(),
    output: OutputOption = Output.TEXT,
) -> int:
    """
    Show what each component really serves and uses, and whether its client certificates are accepted.

    Run it on a control-plane node; it writes and restarts nothing. Exits with 7 if a component runs on an old
    certificate, one is refused, or something does not answer.
    """
    report = proof.prove(common.settings(), utc_now, wait)
    print_proof(report, output)
    return report.exit_code


def print_proof(report: proof.ProofReport, output: Output) -> None:
    """Print a line for each component with its faults below it, then the verdict; with `-v` every check."""
    if output is Output.JSON:
        say_json(exitCode=report.exit_code, stale=report.stale, findings=report.findings)
        return
    if is_verbose():
        say_table([("COMPONENT", "CERTIFICATE", "WHAT", "STATE", "DETAIL"), *map(_proof_row, report.findings)])
    else:
        _say_components(report)
    count, wrong = len(report.findings), len(report.wrong)
    well = f"all is well: {count} checks hold"
    say_verdict(f"{wrong} of {count} checks failed" if wrong else well, "error" if wrong else "ok")


def _say_components(report: proof.ProofReport) -> None:
    users: dict[str, list[proof.ProofFinding]] = {}
    for finding in report.findings:
        users.setdefault(_proof_row(finding)[0], []).append(finding)
    for user, findings in users.items():
        wrong = [finding for finding in findings if finding in report.wrong]
        names = ", ".join(dict.fromkeys(finding.certificate for finding in findings))
        level = "error" if wrong else "ok"
        say_table([(level.ljust(len("error")), user.ljust(_WIDEST), printable(names))], (), [level])
        for _, certificate, what, state, detail in map(_proof_row, wrong):
            say_sentence(f"{state}: {certificate}, {what}: {detail}", "       ")


#: The width of `kube-controller-manager`.
_WIDEST = max(len(component.value) for component in Component)


def _proof_row(finding: proof.ProofFinding) -> tuple[str, ...]:
    user = "people" if finding.component is None else finding.component.value
    return tuple(map(printable, (user, finding.certificate, finding.what, finding.state, finding.detail)))


_certs = group(
    commands, "serving-certs", "Have kube-controller-manager and kube-scheduler serve certificates of the cluster's CA."
)


@command(_certs, "on")
def certs_on(common: Common, wait: WaitOption = timedelta()) -> int:
    """
    Make the pairs, put them into the manifests of this node and, when each node has them, into kubeadm-config.

    Run it on one control-plane node after the other; it restarts one component at a time, and checks what that serves.
    From then on, each renewal renews the pairs. Run it again to go on after an error, or when a CA has answered.
    """
    settings = common.settings()
    components = serving.components(read_node(settings.node), settings)
    # a component that an earlier run left half done comes first, since a renewal would complain about it
    for component in sorted(components, key=lambda component: not serving.is_half_done(settings, component)):
        item = pairs.served_item(read_node(settings.node), component)
        if item is not None and item.state == "present" and item.named:
            continue
        if serving.is_half_done(settings, component):
            report = serving.put_in(settings, component, wait)
            print_restarts(report, settings, Output.TEXT)
            code = report.exit_code
        else:
            options = RunOptions(names=(SERVERS[component].name,), wait=wait)
            code = renew.renew(settings, options, utc_now, Output.TEXT)
        if code:
            return code
    serving.assert_named(settings, components)
    say_sentence(serving.keep(settings, components, wait))
    return Exit.DONE


@command(_certs, "off")
def certs_off(common: Common, wait: WaitOption = timedelta()) -> int:
    """
    Take the pairs out of kubeadm-config and of this node's manifests, and remove them, into a backup.

    The components serve with certificates of their own making again. Run it on one control-plane node after the other.
    """
    settings = common.settings()
    components = serving.components(read_node(settings.node), settings)
    if serving.forget(settings, components, wait):
        say("kubeadm-config names no pair any more")
    report = serving.take_out(settings, wait)
    print_restarts(report, settings, Output.TEXT)
    return report.exit_code


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
    serverTLSBootstrap, restarts the kubelet, and waits for the certificate; a control plane also writes kubelet-config
    and, once all kubelets serve signed certificates, kubeadm-config and its API server's manifest. Exits with 4 while
    other nodes come first, and with 8 if the kubelet has its old configuration again.
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
    elif report.left:
        say("Other nodes come first:")
        say_sentences(report.left)
        again = "`ca-bridge kubelets on`" if is_on else "`ca-bridge kubelets off`"
        say(f"Run {again} there, and then here again.")
    elif not report.done:
        say("Nothing to do: this node and the cluster are already set.")
    return report.exit_code
