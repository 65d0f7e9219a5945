"""`restart` and `prove`: what the components of the control plane run on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from bridge.cli.printing import say, say_json, say_sentence, say_table
from bridge.control_plane import proof, restart_plan, restarts
from bridge.settings.tables import Settings
from bridge.specs import Component
from bridge.system.console import print_error, printable


def restart(
    settings: Settings,
    names: Sequence[str],
    now: Callable[[], datetime],
    *,
    force: bool,
    wait: timedelta,
    as_json: bool,
) -> int:
    """`restart`: print what came of it, and return the exit code."""
    report = restarts.restart_stale(settings, names, now, force=force, wait=wait)
    if report.advised:
        _print_advice(report, settings, as_json=as_json)
    else:
        _print_restarted(report, as_json=as_json)
    if report.unknown is not None:
        print_error(report.unknown)
    return report.exit_code


_NOTHING = "nothing to restart: every component runs on the certificates that are installed"


def _print_advice(report: restarts.RestartReport, settings: Settings, *, as_json: bool) -> None:
    directory = settings.node.kubeconfig_dir / "manifests"
    advice = {component.value: restart_plan.how(component, directory) for component in report.components}
    if as_json:
        say_json({"exitCode": report.exit_code, "advice": advice, **_unknown(report)})
    elif advice:
        say('With restart.method = "none" this is yours to do, one at a time:')
        for sentence in advice.values():
            say_sentence(sentence, "  ")
    elif report.unknown is None:
        say(_NOTHING)


def _print_restarted(report: restarts.RestartReport, *, as_json: bool) -> None:
    if as_json:
        say_json({"exitCode": report.exit_code, "restarted": [_entry(one) for one in report.done], **_unknown(report)})
    elif report.done:
        rows = [
            (one.component.value, f"restarted, healthy after {one.seconds:.1f} s") for one in report.done if one.seconds
        ]
        say_table(rows or [["nothing was restarted"]])
    elif report.unknown is None:
        say(_NOTHING)
    for one in report.done:
        if one.error is not None:
            print_error(one.error)


def _unknown(report: restarts.RestartReport) -> dict[str, object]:
    return {"unknown": None if report.unknown is None else report.unknown.reason}


def _entry(one: restarts.Restarted) -> dict[str, object]:
    return {
        "component": one.component.value,
        "seconds": None if one.seconds is None else round(one.seconds, 1),
        "exitCode": one.exit_code,
        "error": one.error.reason if one.error is not None else None,
    }


def prove(settings: Settings, now: Callable[[], datetime], wait: timedelta, *, as_json: bool) -> int:
    """`prove`: print what was found, and return the exit code."""
    found = proof.prove(settings, now, wait)
    print_proof(found, as_json=as_json)
    return found.exit_code


def print_proof(found: proof.ProofReport, *, as_json: bool) -> None:
    """Print all findings, for people or for programs."""
    if as_json:
        say_json(_proof_json(found))
    else:
        header = ("COMPONENT", "CERTIFICATE", "WHAT", "STATE", "DETAIL")
        say_table([header, *map(_proof_row, found.findings)])


def _proof_row(found: proof.ProofFinding) -> tuple[str, ...]:
    texts = (_user(found.component), found.certificate, found.what, found.state, found.detail)
    return tuple(map(printable, texts))


def _user(component: Component | None) -> str:
    return "people" if component is None else component.value


def _proof_json(found: proof.ProofReport) -> dict[str, object]:
    return {
        "exitCode": found.exit_code,
        "stale": [component.value for component in found.stale],
        "findings": [
            {
                "component": None if one.component is None else one.component.value,
                "certificate": one.certificate,
                "what": one.what,
                "state": one.state,
                "detail": one.detail,
            }
            for one in found.findings
        ],
    }
