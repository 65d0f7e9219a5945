"""`bootstrap`: from options to a node that kubeadm can be run on, and what the operator is told."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path

from bridge.bootstrap import orders, sharing, whole, wishes
from bridge.bootstrap.configuration import ConfigurationFacts
from bridge.bootstrap.make import make
from bridge.bootstrap.places import Role
from bridge.bootstrap.sharing import read_order, read_signed_order
from bridge.bootstrap.wish import Bootstrapped, NodeWish, NotWholeError
from bridge.bootstrap.wishes import Said
from bridge.cli.node_options import NodeOptions
from bridge.cli.printing import say, say_sentence, say_table, under_headings
from bridge.cli.progress import progress_shown
from bridge.cli.results import grouped
from bridge.errors import Exit, SettingsError, SettingsProblem, WaitingError
from bridge.pki.display import fingerprint_text
from bridge.pki.expiry import minute
from bridge.settings.tables import Settings
from bridge.state.outcome import Outcome
from bridge.system.console import log, print_error, printable


def _both(one: str, other: str) -> SettingsError:
    return SettingsError([SettingsProblem(one, f"either {one} or {other}", "both")])


def _said(settings: Settings, options: NodeOptions, facts: ConfigurationFacts, shared: Path | None = None) -> Said:
    """
    Read the files that are carried.

    Raises:
        OrderError, UnsignedOrderError: One can't be read, or is not who's it should be.
    """
    return Said(
        facts=facts,
        config=options.kubeadm_config,
        order=read_signed_order(settings, options.order) if options.order is not None else None,
        given=read_order(shared) if shared is not None else None,
        ca_dir=options.ca_dir,
        kubeadm=options.kubeadm,
        keep=options.keep,
        request=options.request,
        answers=tuple(options.answer or ()),
        anew=options.anew,
    )


def init(settings: Settings, options: NodeOptions, facts: ConfigurationFacts, now: Callable[[], datetime]) -> int:
    """`bootstrap init`: return the exit code."""
    if options.kubeadm_config is not None and options.order is not None:
        raise _both("--kubeadm-config", "--order")
    if facts.given() and (options.kubeadm_config or options.order):
        raise _both("--kubeadm-config or --order", f"the facts themselves ({_flags(facts)})")
    said = _said(settings, options, facts)
    wish = wishes.of_init(settings, said)
    done = _made(settings, wish, now, options.wait)
    if done.is_complete:
        _compare(settings, said)
        _next_of_init(wish)
        _advise(wish)
    return done.exit_code


def join(
    settings: Settings, options: NodeOptions, role: Role | None, shared: Path | None, now: Callable[[], datetime]
) -> int:
    """`bootstrap join`: return the exit code."""
    said = _said(settings, options, options.facts(), shared)
    wish = wishes.of_join(settings, said, role)
    done = _made(settings, wish, now, options.wait)
    if done.is_complete:
        _compare(settings, said)
        _next_of_join(wish)
    return done.exit_code


def _made(settings: Settings, wish: NodeWish, now: Callable[[], datetime], wait: timedelta | None) -> Bootstrapped:
    with progress_shown() as progress:
        done = make(settings, wish, now, progress, wait or timedelta())
    _report(done)
    return done


def share(settings: Settings, config: Path | None, now: datetime, *, worker: bool) -> None:
    """`bootstrap share`: what a further node needs, on standard output, which must be no terminal."""
    places = wishes.places_of(settings)
    data = sharing.share(settings, places, config or places.kubeadm_config, now, worker=worker)
    if sys.stdout.isatty() and not worker:
        raise sharing.SharingError(
            "wanted a pipe or a file of your own for the service account key, found a terminal",
            hint="ssh cp-1 ca-bridge bootstrap share | ssh cp-2 ca-bridge bootstrap join --control-plane --shared - …",
        )
    say(data.decode())


def write_orders(
    settings: Settings,
    nodes: Path,
    config: Path,
    ca_dir: Path | None,
    directory: Path,
    sign_with: Path | None,
    now: datetime,
) -> None:
    """`bootstrap orders`: one a node, and what is to be done with each."""
    places = wishes.places_of(settings)
    made = sharing.write_orders(settings, places, nodes, config, ca_dir, directory, sign_with, now)
    say_table([(one.node.name, one.node.role, str(one.path), one.fingerprint) for one in made])
    first = next((one.node.name for one in made if one.node.role == "init"), "a control-plane node")
    say("\ncarry each to its node, and run there (its keys are made there, and stay):")
    commands = {
        "init": "ca-bridge bootstrap init --order NAME.order.json",
        "control-plane": f"ca-bridge bootstrap join --order NAME.order.json --shared - (from {first}: `ca-bridge bootstrap share`)",
        "worker": "ca-bridge bootstrap join --order NAME.order.json",
    }
    for role in dict.fromkeys(one.node.role for one in made):
        say_sentence(f"{role}: {commands[role]}", "  ")
    if sign_with is None:
        say("\n")
        say_sentence("they are not signed (--sign-with KEY): compare the fingerprint that each node prints")


def setup(
    settings: Settings, kind: str, paths: Sequence[Path], authority: str | None, directory: Path | None, now: datetime
) -> None:
    """`bootstrap setup`: what a CA's administrator needs for nodes that are yet to be made."""
    from bridge.bootstrap import expected  # noqa: PLC0415
    from bridge.cli import setup as module  # noqa: PLC0415

    nodes = {}
    for path in paths:
        order = read_signed_order(settings, path)
        found = expected.certificates(order, now)
        if order.node is not None:
            nodes[order.node.name] = {name: ones for name, ones in found.items() if authority in (None, name)}
    files = module.files_of(settings, kind, nodes)
    if directory is not None:
        module.say_written(module.write_files(files, directory))
    else:
        say("\n".join(file.text for file in files))


#: What to do next, by kubeadm's command.
_CHECK_HINTS = {
    "init": "`ca-bridge bootstrap init` makes what is missing; a node that is to join is looked at with "
    "--control-plane or --worker",
    "join": "`ca-bridge bootstrap join` makes what is missing",
}


def check(settings: Settings, role: Role, now: datetime) -> int:
    """`bootstrap check`: return the exit code."""
    places = wishes.places_of(settings)
    files = [places.kubeadm_config] if role == "init" else [places.join_config]
    files += [places.kubeadm_config] if role == "control-plane" else []
    if (config := wishes.together(files)) is not None:
        places = wishes.places_in(settings, config)
    problems = whole.check(settings, places, role, files, config, now)
    if problems:
        raise NotWholeError("\n".join(problems), hint=_CHECK_HINTS["init" if role == "init" else "join"])
    program = "init" if role == "init" else "join"
    say(f"nothing is missing and nothing wrong: `kubeadm {program}` may start")
    return Exit.DONE


def _flags(facts: ConfigurationFacts) -> str:
    flags = {"address": "advertise-address", "endpoint": "control-plane-endpoint", "version": "kubernetes-version"}
    return ", ".join(f"--{flags.get(name, name.replace('_', '-'))}" for name in facts.given())


def _report(done: Bootstrapped) -> None:
    """Print what was signed, waits or failed."""
    rows = [
        (o.name, f"until {minute(o.new.not_valid_after_utc)}", f"by {o.backend}")
        for o in done.outcomes
        if o.new is not None
    ]
    say_table(rows)
    if done.from_kept:
        say_sentence(
            f"{done.files} files of {done.node} are in place again, from the copies that were kept; no CA was asked"
        )
    elif done.files:
        say_sentence(f"{done.files} files of {done.node} are in place, and were looked at as a whole")
    elif done.is_complete:
        say_sentence(f"nothing to do: all files of {done.node} are in place, and nothing is wrong with them")
    waiting = [o for o in done.outcomes if isinstance(o.error, WaitingError)]
    failed = [o for o in done.outcomes if o.error is not None and o not in waiting]
    if waiting:
        say("\n".join(under_headings([(_whom(outcome), (outcome.name, "waits")) for outcome in waiting])))
    if waiting or failed:
        say_sentence("nothing was put in place; what was signed is kept, and not asked for again")
    if waiting:
        say_sentence("run the same command again when there is an answer (one that was carried: --answer FILE)")
    for about, error in grouped(failed):
        print_error(error, about)
    for error in done.strange:
        print_error(error)


def _whom(outcome: Outcome) -> str:
    """Who has a request, or what is to be done with it."""
    reason = printable(outcome.error.reason if outcome.error is not None else "")
    return f"{outcome.backend}: {reason}" if outcome.backend else reason


def _compare(settings: Settings, said: Said) -> None:
    """Whoever could change an order on its way decides what this node runs, and whom it trusts."""
    if said.order is not None and settings.node.order_key is None:
        printed = fingerprint_text(orders.digest(said.order))
        say("\n")
        say_sentence(f"first compare with what `bootstrap orders` printed, by another way: fingerprint {printed}")


def _next_of_init(wish: NodeWish) -> None:
    config, super_admin = wish.places.kubeadm_config, wish.places.kubeconfigs / "super-admin.conf"
    say(
        f"\nnext, on this node, without --upload-certs:\n"
        f"  kubeadm init --config {config}\n"
        f"then, since kubeadm needs it for seconds, and it is beyond all RBAC rules:\n"
        f"  rm {super_admin}"
    )


def _advise(wish: NodeWish) -> None:
    """Advise settings that are cheap now, and need a change on each node later."""
    if wish.config.kubelets_rotate:
        log.info(
            "kubelets of this cluster will ask a signer for their next certificate, and take no other without a restart"
        )
        log.info(
            "without a signer in the cluster: a KubeletConfiguration with rotateCertificates: false in the configuration",
            extra={"is_hint": True},
        )


def _next_of_join(wish: NodeWish) -> None:
    """Tell the next command: a join that needs no token and no flag, since both are in the file."""
    say(f"\nnext, on this node:\n  kubeadm join --config {wish.places.join_config}")
