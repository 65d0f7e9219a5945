"""The door for all nodes: `serve`, `serve-database`, `fleet`, `enroll`, `enrolments` and `approvals`."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bridge.cli.declare import Common, argument, command, duration_option, group, option
from bridge.cli.options import Output, OutputOption, PolicyOption, utc_now
from bridge.cli.printing import VALUES_BEGIN, say, say_json, say_sentence, say_table, width_here, wrapped
from bridge.cli.results import print_errors
from bridge.desk.approval import Verdict, differences, sentence
from bridge.door.client import Review, Reviewer
from bridge.errors import BridgeError, Exit
from bridge.pki.bundle_format import describe, short_fingerprint
from bridge.pki.csr import fingerprint_text, issuer_line, subject_line
from bridge.pki.expiry import minute
from bridge.pki.signatures import proof_problem
from bridge.state import Store
from bridge.system.console import log, printable
from bridge.system.locks import lock
from bridge.words import counted

with suppress(ModuleNotFoundError):  # without the packages of the extra; `assert_installed` says so
    from bridge.door import doors, enrolments
    from bridge.door import fleet as rules
    from bridge.door.enrolments import Enrolment
    from bridge.door.service import Service
    from bridge.door.store import open_memory

commands = typer.Typer()
#: Distributions of the extra `serve`, by their module.
_NEEDED = {"cheroot": "cheroot", "jinja2": "Jinja2", "sqlalchemy": "SQLAlchemy", "alembic": "alembic"}


class MissingExtraError(BridgeError):
    """The packages that the door's commands alone need are not installed."""

    exit_code = Exit.USAGE
    hint = (
        "install them beside the program: "
        "`pip install --require-hashes --target /opt/ca-bridge/plugins -r requirements-serve.lock`; "
        "or into a clone's environment: `pip install '.[serve]'`"
    )


@command(commands, "serve")
def serve(common: Common, policy: PolicyOption = None) -> None:
    """
    Sign what nodes ask for over HTTPS, as far as the desk's policy allows: one door to the CA for all nodes.

    It runs until SIGTERM, SIGINT or SIGHUP; `ca-bridge help door` has its settings, addresses and metrics.
    """
    assert_installed("ca-bridge serve")
    settings = common.settings()
    store = Store(settings.node.state_dir)
    store.prepare()
    with lock(store.door_lock, "ca-bridge serve"):  # other doors would take two with one state directory for one
        service = Service(settings, policy.absolute() if policy is not None else None, utc_now)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: service.stop())
        service.run(lambda port: log.info("serving at port %d", port))


def assert_installed(command: str) -> None:
    """Check that the packages of the extra `serve` are installed (MissingExtraError)."""
    missing = [name for module, name in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingExtraError(f"{command} needs {', '.join(_NEEDED.values())}, found no {', '.join(missing)}")


@command(commands, "fleet")
def fleet(
    common: Common,
    output: Annotated[Literal["text", "json", "prometheus"], option("Format of the list.", "--output", "-o")] = "text",
) -> int:
    """
    List the nodes that have asked this door, the worst first: what ends next, what failed, who is silent.

    It runs on the door's host, and reads only the database. A node is silent if it should have asked long ago, by
    renewal.before of these settings. Exits with 3 if a node is expired, silent or failed.
    """
    assert_installed("ca-bridge fleet")
    settings = common.settings_with_record()
    with closing(open_memory(settings)) as memory:
        nodes, unnamed = rules.fleet(memory, settings.renewal.before, utc_now()), rules.unnamed(memory)
    if output == "json":
        say_json(nodes=nodes, unnamed=unnamed)
    elif output == "prometheus":
        say(rules.metrics(nodes, unnamed))
    elif nodes:
        rows = []
        for node in nodes:
            ends = f"{node.name} ends {minute(node.ends)}" if node.ends is not None else "no certificate"
            heard = f"asked {minute(node.heard)}" if node.heard is not None else "never asked"
            rows.append([printable(cell) for cell in (node.state, node.node, ends, node.cluster, heard, node.why)])
        say_table(rows, (4, 3), ["error" if node.state in rules.RED else "" for node in nodes])
    else:
        say("no nodes: none has asked this door yet")
    if output == "text" and unnamed:
        say_sentence(
            f"left out: {counted(unnamed, 'request')} of which nothing proves the node (`ca-bridge help door#all-nodes-at-a-glance`)"
        )
    return Exit.DUE if any(node.state in rules.RED for node in nodes) else Exit.DONE


database = group(commands, "serve-database", "Back up and restore the door's database.")


@command(database, "status")
def status(common: Common) -> None:
    """Count the door's requests by their state, and list those that were left to people."""
    assert_installed("ca-bridge serve-database")
    with doors.opened(common.settings()) as (memory, _):
        say_table([("STATE", "REQUESTS"), *((state, str(count)) for state, count in sorted(memory.counts().items()))])
        for row in memory.in_state("left"):
            say_sentence(f"{row.digest[:16]} of {row.node}: {row.note}")


@command(database, "backup")
def backup(common: Common, to: Annotated[Path, argument("The copy, a file that is replaced.")]) -> None:
    """Copy SQLite's file while the door runs; `pg_dump` copies PostgreSQL's."""
    assert_installed("ca-bridge serve-database")
    doors.back_up(common.settings(), to.absolute())
    say(f"the door's database is in {to} now")


@command(database, "restore")
def restore(common: Common, copy: Annotated[Path, argument("A copy that `backup` has made.")]) -> None:
    """
    Replace SQLite's file with a copy, while no door runs.

    From then on, before an older request is signed, the door asks its CA whether it has signed it already.
    """
    assert_installed("ca-bridge serve-database")
    old, withdrawn = doors.restore(common.settings(), copy.absolute(), utc_now)
    say_sentence("the copy is in its place" + (f"; what was there before is in {old}" if old else ""))
    _say_withdrawn(withdrawn)


@command(database, "restored")
def restored(common: Common) -> None:
    """
    Say that the database was restored by other means, such as `pg_restore`; run it on the host of each door.

    From then on, before an older request is signed, the door asks its CA whether it has signed it already.
    """
    assert_installed("ca-bridge serve-database")
    withdrawn = doors.reconcile(common.settings(), utc_now)
    say("recorded: a request from before now is signed only after its CA was asked whether it has signed it")
    _say_withdrawn(withdrawn)


@command(database, "again")
def again(common: Common, request: Annotated[str, argument("The first 16 digits of its digest, or all.")]) -> None:
    """Have a request signed that was left to people, once you know that its CA has not signed it."""
    assert_installed("ca-bridge serve-database")
    doors.again(common.settings(), request)
    say(f"request {request} is signed in the next round")


def _say_withdrawn(count: int) -> None:
    if count:
        text = f"one-time secrets withdrawn, since they may have been used after the copy was made: {count}"
        say_sentence(f"{text}; `ca-bridge enroll NODE` makes new ones")


enrolments_group = group(commands, "enrolments", "Show and withdraw the secrets of `ca-bridge enroll`.")

_HOUR = timedelta(hours=1)


@command(commands, "enroll")
def enroll(
    common: Common,
    node: Annotated[str, argument("The node's name, as kubeadm has it.", "NODE")],
    cluster: Annotated[str, typer.Option(help="The node's cluster. [default: node.cluster]", show_default=False)] = "",
    lasts: Annotated[timedelta, duration_option("How long the secret is valid. [default: 1h]", "--for")] = _HOUR,
    certificates: Annotated[
        list[str] | None,
        option(
            "A certificate that it is for, by kubeadm's name; repeatable. [default: all that the policy allows]",
            "--certificate",
            "NAME",
        ),
    ] = None,
    policy: Annotated[Path | None, option("The door's policy. [default: desk-policy.toml beside the settings]")] = None,
) -> None:
    """
    Print a one-time secret with which a node asks the door for its first certificates.

    It runs on the door's host. The secret is for this node and one request, and expires by itself; the door keeps only
    a hash. Put it into the file that `enrolment_file` of the node's backend names. The policy decides what is signed.
    """
    assert_installed("ca-bridge enroll")
    settings = common.settings()
    wanted = enrolments.Wanted(
        node=node,
        cluster=cluster or settings.node.cluster,
        certificates=tuple(dict.fromkeys(certificates or ())),
        lasts=lasts,
    )
    made, secret = enrolments.enroll(settings, policy.absolute() if policy is not None else None, wanted, utc_now())
    say(secret)
    text = "enrolment %d: for %s of cluster %s, for %s, until %s"
    names = ", ".join(made.certificates) or "all certificates that the policy allows"
    log.info(text, made.id, printable(made.node), printable(made.cluster), printable(names), minute(made.ends))


@command(enrolments_group, "list")
def list_enrolments(common: Common, output: OutputOption = Output.TEXT) -> None:
    """List the enrolments, the newest first: number, state, node, until when, and who made it."""
    assert_installed("ca-bridge enrolments")
    found, now = enrolments.listed(common.settings_with_record()), utc_now()
    if output is Output.JSON:
        say_json(enrolments=[_enrolment_json(enrolment, now) for enrolment in found])
    elif found:
        say_table([_enrolment_row(enrolment, now) for enrolment in found], (5, 6))
    else:
        say("no enrolments: `ca-bridge enroll NODE` makes one")


@command(enrolments_group, "withdraw")
def withdraw(common: Common, number: Annotated[int, argument("As in `ca-bridge enrolments list`.", "NUMBER")]) -> None:
    """Withdraw an enrolment; a request that came with it, and that is not signed yet, is refused."""
    assert_installed("ca-bridge enrolments")
    enrolment = enrolments.withdraw(common.settings_with_record(), number, utc_now())
    say(f"enrolment {enrolment.id} of {printable(enrolment.node)} is withdrawn")
    if enrolment.used is not None:
        log.warning("it was used %s: `ca-bridge audit show` has what was signed since", minute(enrolment.used))


def _enrolment_row(enrolment: Enrolment, now: datetime) -> tuple[str, ...]:
    names = ", ".join(enrolment.certificates) or "all"
    until, by = f"until {minute(enrolment.ends)}", f"by {enrolment.created_by}"
    cells = (enrolment.id, enrolment.state(now), enrolment.node, enrolment.cluster, until, by, names)
    return tuple(map(printable, cells))


def _enrolment_json(enrolment: Enrolment, now: datetime) -> dict[str, Any]:
    keys = {"node": "node", "cluster": "cluster", "certificates": "certificates", "created": "created",
            "createdBy": "created_by", "ends": "ends", "used": "used", "withdrawn": "withdrawn"}  # fmt: skip
    return {
        "number": enrolment.id,
        "state": enrolment.state(now),
        **{key: getattr(enrolment, name) for key, name in keys.items()},
    }


# --- people decide ----------------------------------------------------------------------------------------------------

approvals_group = group(commands, "approvals", "Decide about requests that wait at the door for people.")

_SHORT = 16

DigestArgument = Annotated[
    str, argument("The request's digest, or its first 16 digits: `ca-bridge approvals list`.", "DIGEST")
]
WholeDigestArgument = Annotated[
    str, argument("All 64 digits of the request's digest, or the first 16 of the only one that waits.", "DIGEST")
]


@command(approvals_group, "list")
def list_approvals(
    common: Common,
    text: Annotated[str, argument("Part of a node's name, or the beginning of a digest.", "TEXT")] = "",
    output: OutputOption = Output.TEXT,
) -> None:
    """List the requests that wait for people: digest, node, and what each of their certificates means."""
    with closing(_reviewer(common)) as reviewer:
        request = reviewer.waiting(text)
    if output is Output.JSON:
        say_json(approver=request.get("approver"), waiting=request.get("waiting"), requests=request["requests"])
        return
    for one in request["requests"]:
        digest, approved = str(one.get("digest"))[:_SHORT], f"{one.get('approvals')} approved"
        say_table([tuple(map(printable, (digest, one.get("node"), approved, one.get("received"))))], (3,))
        _say_meanings(one, "  ")
    if not request["requests"]:
        say("no request waits for people")
    elif isinstance(count := request.get("waiting"), int) and count > (shown := len(request["requests"])):
        say_sentence(
            f"{shown} of {count}, of each node in turn: `ca-bridge approvals list TEXT` looks for a node or a digest"
        )


@command(approvals_group, "show")
def show(common: Common, digest: DigestArgument, output: OutputOption = Output.TEXT) -> None:
    """Show a request whole: what it asks for, what that replaces and changes, its proofs, and what people decided."""
    with closing(_reviewer(common)) as reviewer:
        review = reviewer.show(digest)
    if output is Output.JSON:
        say_json(**_json(review))
    else:
        _print(review)


@command(approvals_group, "approve")
def approve(
    common: Common,
    digest: WholeDigestArgument,
    reason: Annotated[str, option("For the record.", "TEXT")] = "",
    output: OutputOption = Output.TEXT,
) -> None:
    """
    Approve a request: sign its digest with your key, and send the signature to the door.

    It first prints what `ca-bridge approvals show` prints, all digits of the digest among it. The door checks its policy once more before the CA signs.
    """
    _decide(common, digest, "approved", reason, output)


@command(approvals_group, "refuse")
def refuse(
    common: Common,
    reason: Annotated[str, option("For the node and the record.", "TEXT")],
    digest: Annotated[str, argument("As for `show`; not with --node.", "[DIGEST]")] = "",
    node: Annotated[str, option("Refuse all requests that wait and say that they are of this node.", "NAME")] = "",
    output: OutputOption = Output.TEXT,
) -> int:
    """Refuse a request, or all of one node; the node gets an answer with your reason and your name."""
    if bool(digest) == bool(node):
        raise typer.BadParameter("wanted a request's digest, or --node, found both or neither")
    if digest:
        _decide(common, digest, "refused", reason, output)
        return Exit.DONE
    return _refuse_all(common, node, reason, output)


def _refuse_all(common: Common, node: str, reason: str, output: Output) -> int:
    refused: list[str] = []
    errors: list[BridgeError] = []
    with closing(_reviewer(common)) as reviewer:
        while left := [
            digest for digest in reviewer.of_node(node) if digest not in refused
        ]:  # the door lists 200 at once
            for digest in left:
                try:
                    reviewer.decide(reviewer.show(digest), "refused", reason)
                except BridgeError as e:  # it was decided meanwhile, or the door has no word for it
                    errors.append(e)
            refused += left
    done = len(refused) - len(errors)
    if output is Output.JSON:
        say_json(node=node, refused=done)
    else:
        say_sentence(printable(f"refused {counted(done, 'request')} of {node}"))
    print_errors((), errors)
    return Exit.worst([error.exit_code for error in errors])


def _reviewer(common: Common) -> Reviewer:
    return Reviewer(common.settings().approver, utc_now())


def _decide(common: Common, digest: str, verdict: Verdict, reason: str, output: Output) -> None:
    with closing(_reviewer(common)) as reviewer:
        review = reviewer.show(digest, is_alone=verdict == "approved")
        if verdict == "approved" and output is Output.TEXT:
            _print(review)
        review = reviewer.decide(review, verdict, reason)
    if output is Output.JSON:
        say_json(**_json(review))
        return
    document, fingerprint = review.document, short_fingerprint(review.bundle)
    text = f"{verdict} {review.digest[:_SHORT]} of {review.bundle.node} (fingerprint {fingerprint})"
    say_sentence(printable(f"{text}: {document.get('approvals')} approvals, the request is {document.get('state')}"))


def _dicts(value: object) -> list[dict[str, Any]]:
    """Return the objects in a list of the door's answer; none if it is no list."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _say_meanings(request: Mapping[str, Any], indent: str) -> None:
    for certificate in _dicts(request.get("certificates")):
        say_sentence(printable(f"{certificate.get('name')}: {certificate.get('means')}"), indent)


def _refusals(document: Mapping[str, Any]) -> list[str]:
    policy = document.get("policy")
    lists = {name: some for name, some in policy.items() if isinstance(some, list)} if isinstance(policy, dict) else {}
    return [f"{name}: the policy refuses it: {reason}" for name, reasons in lists.items() for reason in reasons]


def _print(review: Review) -> None:
    """Print what the bundle itself shows, and then, marked, what only the door says about it."""
    bundle = review.bundle
    for line in describe(bundle, utc_now(), review.cas).splitlines():
        say("\n".join(map(printable, wrapped(line, width_here(), VALUES_BEGIN))))
    say("")
    meanings = {
        request.name: sentence(request, bundle.node, proven=proof_problem(request, bundle) is None, is_named=False)
        for request in bundle.requests
    }
    for request in bundle.requests:
        say_sentence(printable(f"{request.name}: {meanings[request.name]}"))
        for text in differences(request):
            say_sentence(printable(f"{request.name} differs: {text}"))
    unproven = []
    for decision in _dicts(review.document.get("decisions")):
        if (signer := review.signer_of(decision)) is None:
            unproven.append(decision)
            continue
        who = f"the key of {subject_line(signer)} (a certificate of {issuer_line(signer)})"
        say_sentence(printable(f"{decision.get('verdict')} by {who}: {decision.get('reason') or 'without a reason'}"))
    say_sentence(f"digest {review.digest}")
    say("")
    _print_the_doors_words(review, meanings, unproven)


def _print_the_doors_words(review: Review, meanings: Mapping[str, str], unproven: Sequence[Mapping[str, Any]]) -> None:
    say("the door says, and nothing here proves it:")
    if review.cas:
        say_sentence(f"the certificates of these CAs: {', '.join(sorted(review.cas))}", "  ")
    for certificate in _dicts(review.document.get("certificates")):
        name, means = certificate.get("name"), certificate.get("means")
        if means != meanings.get(str(name)):
            say_sentence(printable(f"{name}: {means}"), "  ")
    for text in _refusals(review.document):
        say_sentence(printable(text), "  ")
    for decision in unproven:
        text = f"{decision.get('approver')} {decision.get('verdict')} it {decision.get('decided')} ({decision.get('evidence')})"
        say_sentence(printable(f"{text}: {decision.get('reason')}" if decision.get("reason") else text), "  ")
    state, approvals = review.document.get("state"), review.document.get("approvals")
    say_sentence(printable(f"{state}, {approvals} approved"), "  ")


def _json(review: Review) -> dict[str, Any]:
    kept = {key: value for key, value in review.document.items() if key != "cas"}
    return {**kept, "digest": review.digest, "fingerprint": fingerprint_text(review.digest)}
