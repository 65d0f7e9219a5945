"""`rotate-ca`: replaces a CA with another one, phase by phase, while the cluster runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from bridge import monitoring
from bridge.cli.declare import Common, command, duration_option, group, option
from bridge.cli.options import Output, OutputOption, WaitOption, utc_now
from bridge.cli.printing import progress_shown, say, say_json, say_sentence, say_sentences, say_table, say_verdict
from bridge.cli.results import print_errors, print_restart, say_waiting, warn_of_waiting
from bridge.control_plane import neighbours
from bridge.errors import Exit
from bridge.node.inventory import Node
from bridge.node.reading import read_node
from bridge.pki.certificates import fingerprint, name_text
from bridge.pki.expiry import duration_text, minute
from bridge.rotation import Phase, differences, old_ca_clients, places, planning, steps, text, trust_copies
from bridge.rotation.old_ca_clients import Refusal, Users, Watched
from bridge.rotation.places import Replaced
from bridge.rotation.planning import Step, Verb
from bridge.rotation.readiness import RotationOptions
from bridge.settings.tables import Settings
from bridge.specs import CA
from bridge.state import Store
from bridge.system.console import doing

commands = typer.Typer()
rotate_group = group(commands, "rotate-ca", "Put another CA in the place of this one, while the cluster runs.")

_NOT_REPLACED = "which is not replaced here"
CaOption = Annotated[
    list[str] | None, option("ca, etcd-ca or front-proxy-ca; repeatable. [default: each with a next CA]", "NAME")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class _LogOptions:
    """The options that name sources about clients of the old CA."""

    audit_log: Annotated[
        list[Path] | None, option("An API server's audit log, to find users of the old CA's certificates.", "FILE")
    ] = None
    server_log: Annotated[
        list[Path] | None, option("An API server's own log, to find clients that reject it.", "FILE")
    ] = None
    issued: Annotated[
        list[Path] | None,
        option("With --audit-log and --requests: certificates of the new CA, in a file or directory.", "PATH"),
    ] = None
    requests: Annotated[
        timedelta,
        duration_option(
            'Count requests by the ends of their certificates, in API servers\' metrics, for this long, such as "1m".'
        ),
    ] = timedelta()


@command(rotate_group, "status")
def status(common: Common, logs: _LogOptions, ca: CaOption = None, output: OutputOption = Output.TEXT) -> None:
    """
    Show the phase of each CA on this node, and what is left to do; changes nothing.

    With --audit-log it names users whose certificates are not known to be the new CA's: after `drop` they are refused.
    With --server-log it names clients that did not trust the API server's certificate. With --requests it counts
    requests whose certificates end when no certificate of the new CA does.
    """
    settings = common.settings()
    node = read_node(settings.node)
    found = places.look(settings, node, ca or [])
    users, refusals = _old_ca_clients(settings, node, found, logs)
    watched = _watched(settings, node, found, logs)
    if output is Output.JSON:
        cas = [_json(one, _lagging(settings, node, one)) for one in found.values()]
        seen = {"users": users and users.users, "unreadLines": users and users.unread, "refusals": refusals}
        say_json(cas=cas, **seen, requests=watched)
        return
    if not found:
        say_sentence("no CA is being replaced: no authority of the settings has a table `next`")
        return
    rows = [(one.name, one.standing.text, minute(one.since), text(one.change.old), text(one.change.new))
            for one in found.values()]  # fmt: skip
    say_table([("CA", "PHASE", "SINCE", "OLD", "NEW"), *rows], (3,))
    for one in found.values():
        now = one.standing
        left = differences(one.seen, one.change, now.next).values() if now.next else now.differing
        for sentence in left:
            say_sentence(f"{one.name}: {sentence}", "  ")
        say_sentences(_elsewhere(one), "  ")
        for held in _lagging(settings, node, one):
            say_sentence(f"{one.name}: {held.text}", "  ")
            say(f"    {held.command}" if held.command else "")
    _say_old_ca_clients(users, refusals)
    say_sentences(_of_requests(watched, logs.requests) if watched else ())


def _watched(settings: Settings, node: Node, replaced: Mapping[str, Replaced], logs: _LogOptions) -> Watched | None:
    """Count requests for a while, by the ends of their certificates; None: without --requests."""
    if not logs.requests:
        return None
    if CA.name not in replaced:
        raise typer.BadParameter(f"--requests is about clients of the CA {CA.name}, {_NOT_REPLACED}")
    new = old_ca_clients.leaves_of_the_new_ca(node, replaced[CA.name].change, logs.issued or [])
    with doing("counting requests"):
        return old_ca_clients.watched(node, settings, new, logs.requests, utc_now)


def _of_requests(watched: Watched, period: timedelta) -> Iterator[str]:
    yield from (*watched.troubles, *map(str, watched.requests))
    what = "of clients that do not trust its certificate, of scanners and health checks"
    for server, count in watched.failed.items():
        yield f"{server}: {count} TLS handshakes failed in {duration_text(period)}: {what}"


def _old_ca_clients(
    settings: Settings, node: Node, replaced: Mapping[str, Replaced], logs: _LogOptions
) -> tuple[Users | None, list[Refusal] | None]:
    """Find clients of the old CA in the named logs; None: no log was named."""
    if not (logs.audit_log or logs.server_log):
        return None, None
    if CA.name not in replaced:
        raise typer.BadParameter(f"--audit-log and --server-log are about clients of the CA {CA.name}, {_NOT_REPLACED}")
    with doing("reading the logs"):
        refusals = old_ca_clients.refusals(logs.server_log) if logs.server_log else None
        if not logs.audit_log:
            return None, refusals
        known = old_ca_clients.known(node, Store(settings.node.state_dir), replaced[CA.name].change, logs.issued or [])
        return old_ca_clients.users(logs.audit_log, known), refusals


def _say_old_ca_clients(users: Users | None, refusals: Sequence[Refusal] | None) -> None:
    for user in users.users if users else ():
        say_sentence(f"not known to be of the new CA: {user}", "  ")
    for refusal in refusals or ():
        say_sentence(str(refusal), "  ")
    if users and users.unread:
        unread = f"{users.unread} lines of the audit log could not be read: clients may be in them"
        say_sentence(f"{unread}; {users.read} were read", "  ")
    elif users and not users.users:
        say_sentence(f"every certificate in the audit log is known to be of the new CA: {users.read}", "  ")
    elif users:
        say_sentence(f"the audit log was read: {users.read}", "  ")
    if refusals == []:
        say_sentence("no client in the API server's log turned away, or was turned away", "  ")


def _elsewhere(ca: Replaced) -> list[str]:
    """Return sentences about CA files that ca-bridge does not write, and that do not fit this node's phase."""
    phase = ca.standing.phase
    return [] if phase is None else list(planning.unfit_elsewhere(ca, phase))


def _lagging(settings: Settings, node: Node, ca: Replaced) -> list[trust_copies.Held]:
    """Return the cluster's objects that are behind this node's phase, if this node may read them."""
    phase = ca.standing.phase
    if phase is None or not node.manifests or node.is_etcd_host:
        return []
    return trust_copies.look(neighbours.connect(node, settings), ca.name, ca.change, phase)


def _json(ca: Replaced, lagging: Sequence[trust_copies.Held]) -> dict[str, Any]:
    now = ca.standing
    return {
        "name": ca.name,
        "phase": None if now.phase is None else now.phase.value,
        "halfDone": None if now.next is None else now.next.value,
        "kind": "the same key, and another certificate" if ca.change.keeps_key else "another key",
        "old": {"subject": name_text(ca.change.old.subject), "sha256": fingerprint(ca.change.old)},
        "new": {"subject": name_text(ca.change.new.subject), "sha256": fingerprint(ca.change.new)},
        "since": ca.since,
        "odd": list(now.differing),
        "elsewhere": _elsewhere(ca),
        "objects": [held.text for held in lagging],
        "commands": [held.command for held in lagging if held.command],
    }


@command(rotate_group, "plan")
def plan(common: Common, ca: CaOption = None) -> int:
    """Show what each phase changes and restarts on this node, what it costs, and whether the new CAs can work."""
    settings, now = common.settings(), utc_now()
    places.assert_has_next(settings)
    node = read_node(settings.node)
    found = places.look(settings, node, ca or [])
    if not found:
        say_sentence(_NONE_HERE)
    trouble = 0
    for one in found.values():
        end = minute(one.change.new.not_valid_after_utc)
        say_sentence(f"{one.name}: {text(one.change.old)}, then {text(one.change.new)}, until {end}")
        for violation in planning.violations(one, settings, now):
            say_verdict(f"  {violation}", "error")
            trouble += 1
        for file in one.elsewhere:
            say_sentence(f"by hand, before each phase: {file}", "  ")
        for phase in one.change.path[1:]:
            what = _SPARED if phase is one.change.spares else _effect(node, one, phase)
            say_sentence(f"{planning.VERBS[phase]}: {what}", "  ")
    for sentence in steps.silent_backends(settings, found.values()):
        say_verdict(sentence, "warning")
    return Exit.REFUSED if trouble else Exit.DONE


def _effect(node: Node, ca: Replaced, phase: Phase, *, at_once: bool = False) -> str:
    """Describe a phase of one CA, or all remaining phases `at_once`."""
    names = [item.spec.name for item in ca.items]
    if phase is Phase.ISSUED or (at_once and ca.standing.phase is not Phase.ISSUED):
        what = f"issues {', '.join(names)} from the new CA, in one step with {ca.state.path}"
    else:
        what = f"writes {ca.state.path}" + (f" and the CA data of {len(ca.confs)} kubeconfigs" if ca.confs else "")
    of_trust, of_certificates = _COSTS[ca.name]
    reads_cas = phase is not Phase.ISSUED or (ca.standing.phase is Phase.OLD and ca.change.spares is not None)
    verifies = _VERIFIES if reads_cas and ca.name == CA.name and steps.readers(node, ca) else ""
    ends = f"; {_ENDS}" if phase is Phase.ISSUED and ca.name == CA.name else ""
    return f"{what}; {of_trust if reads_cas else of_certificates}{verifies}{ends}"


_SPARED = (
    "nothing to do: the cross certificate goes behind each new one, so that what trusts the old CA alone accepts it"
)
#: What users of the cluster notice (measured on 1.37) when trust changes, and when certificates change.
_COSTS = {
    "ca": ("restarts the controller manager, the scheduler and the kubelet", "restarts the same"),
    "etcd-ca": ("restarts etcd, then the API server of this node, about a minute", "restarts nothing"),
    "front-proxy-ca": ("restarts nothing", "restarts nothing"),
}
_ENDS = "`kubectl logs -f` and `kubectl exec` end once on this node's API server"


#: An API server with `--kubelet-certificate-authority`; from 1.36 on it reads that file again (kubernetes/kubernetes#132922).
_VERIFIES = ", and the API server, which verifies kubelets by this file and reads it at its start alone before 1.36"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """The options of every phase."""

    ca: CaOption = None
    wait: WaitOption = timedelta()
    output: OutputOption = Output.TEXT


WithoutOption = Annotated[
    list[str] | None, option("Go on without this node, which can't be asked; repeatable.", "NODE")
]
KeysToOption = Annotated[Path | None, option("At the end, move CA keys that kubeadm left on this node to DIR.", "DIR")]


@command(rotate_group, "trust")
def trust(common: Common, options: _Options) -> int:
    """Have this node trust the new CAs beside the old ones: the first step, on every node."""
    return _run(common, Verb.TRUST, options)


@command(rotate_group, "issue")
def issue(common: Common, options: _Options, without: WithoutOption = None, keys_to: KeysToOption = None) -> int:
    """Have this node's certificates issued by the new CAs, once every node trusts these."""
    return _run(common, Verb.ISSUE, options, without, keys_to=keys_to)


@command(rotate_group, "drop")
def drop(
    common: Common,
    options: _Options,
    without: WithoutOption = None,
    keys_to: KeysToOption = None,
    emergency: Annotated[
        bool,
        option("A CA's key has leaked: go from any phase, without asking other nodes; alone it only says the cost."),
    ] = False,
    accept_outage: Annotated[bool, option("Do it, at the cost that --emergency alone says.")] = False,
) -> int:
    """Have this node trust the new CAs alone, once every node's certificates are theirs."""
    if emergency and not accept_outage:
        return _say_what_an_emergency_costs(common.settings(), options)
    return _run(common, Verb.DROP, options, without, keys_to=keys_to, emergency=emergency)


#: What an emergency breaks at once, by CA; no other node was asked, so each may be affected.
_EMERGENCY_COSTS = {
    "ca": "this node's API server refuses every certificate of the old CA at once: kubeconfigs of people and machines, "
    "and the kubelets and components of nodes that are not done; these refuse this API server",
    "etcd-ca": "between the two restarts this API server does not know its etcd",
    "front-proxy-ca": "aggregated API servers refuse what this API server passes on until they have read the new CA",
}


_EVERY_EMERGENCY = (
    "what reads a CA at its start alone (many pods) has to be restarted by its owner",
    (
        "nothing goes back by itself, whether it works or not; `ca-bridge rotate-ca back` can have the old CA trusted again, "
        "and can't bring back its certificates"
    ),
)


def _say_what_an_emergency_costs(settings: Settings, options: _Options) -> int:
    """Print the cost, and do nothing, so that an operator who goes on has seen it."""
    node = read_node(settings.node)
    found = places.look(settings, node, options.ca or [])
    left = [ca for ca in found.values() if not planning.straight_to_the_new_ca(ca).is_there]
    sentences = [f"{ca.name}: {_effect(node, ca, Phase.NEW, at_once=True)}; {_EMERGENCY_COSTS[ca.name]}" for ca in left]
    sentences += [sentence for ca in found.values() for sentence in planning.unfit_elsewhere(ca, Phase.NEW)]
    sentences += _EVERY_EMERGENCY
    if options.output is Output.JSON:
        say_json(exitCode=Exit.USAGE, costs=sentences)
    else:
        say("nothing is done yet; with --accept-outage:")
        say_sentences(sentences)
    return Exit.USAGE


@command(rotate_group, "back")
def back(common: Common, options: _Options, without: WithoutOption = None) -> int:
    """Go back by one phase on this node."""
    return _run(common, Verb.BACK, options, without)


def _run(common: Common, verb: Verb, options: _Options, without: Sequence[str] | None = None, **more: Any) -> int:
    settings = common.settings()
    rotation = RotationOptions(wait=options.wait, without=frozenset(without or ()), **more)
    with monitoring.kept_current(settings, utc_now), progress_shown() as progress:
        done = steps.run(settings, verb, options.ca or [], utc_now, progress, rotation)
    if options.output is Output.JSON:
        say_json(exitCode=done.exit_code, cas=[{"name": name, "phase": text} for name, text in done.phases.items()])
    else:
        _say_done(done, settings)
    warn_of_waiting(done.result.waiting, utc_now())
    print_errors(done.result.failed, done.result.errors)
    return done.exit_code


def _say_done(done: steps.Done, settings: Settings) -> None:
    there = {step.ca.name for step in done.steps if step.is_there}
    for name, phase in done.phases.items():
        say(f"{name}: phase “{phase}”{', as before' if name in there else ''}")
    say_waiting(done.result.waiting, utc_now())
    print_restart("These go on with the CAs of before until they are restarted", done.to_restart, settings)
    if done.result.restarted:
        say(f"restarted: {', '.join(done.result.restarted)}")
    if done.result.proven is not None:
        say(f"proven: {done.result.proven} checks hold")
    if done.exit_code == Exit.DONE:
        say_sentence(f"next: {_next(done.steps)}" if done.steps else _NONE_HERE)


#: A worker has only `ca`, an etcd host only `etcd-ca`.
_NONE_HERE = "nothing to do on this node, which has none of the CAs that are being replaced"


def _next(done: Sequence[Step]) -> str:
    phases = {step.target for step in done}
    if phases == {Phase.OLD} and all(step.is_there and step.ca.change.spares for step in done):
        return "`ca-bridge rotate-ca issue` on each node, since the cross certificate spares `trust`"
    if phases == {Phase.NEW}:
        return "the same on every other node; then take the tables `next` over into the settings"
    if Phase.TRUSTED in phases:
        return "the same on every other node, then `ca-bridge rotate-ca issue` on each"
    if Phase.ISSUED in phases:
        return "the same on every other node; when nothing uses the old CA any more, `ca-bridge rotate-ca drop` on each"
    return "the same on every other node"
