"""`bootstrap`: from options to a node that kubeadm can be run on, and what the operator is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from bridge.bootstrap import make as day_zero
from bridge.bootstrap.kubeadm_config import Configuration, Facts, KubeadmConfigError, from_facts, parse
from bridge.bootstrap.make import Bootstrapped, NotWholeError, Wish
from bridge.bootstrap.places import ETCD_DIRECTORY, Places, Role
from bridge.cli.printing import say, say_table
from bridge.cli.progress import progress_shown
from bridge.cli.results import grouped
from bridge.errors import Exit, SettingsError, SettingsProblem, WaitingError
from bridge.pki.expiry import minute
from bridge.settings.tables import Settings
from bridge.system.console import print_error
from bridge.system.safe_read import UnreadableError, read


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    facts: Facts
    config: Path | None
    ca_dir: Path | None
    kubeadm: str
    kubelet: Path
    keep: Path | None
    request: Path | None
    answers: tuple[Path, ...]
    anew: bool
    wait: timedelta


def init(settings: Settings, options: Options, now: Callable[[], datetime]) -> int:
    """`bootstrap init`: return the exit code."""
    config, data = _configuration(options)
    places = _places(settings, options, config)
    given = options.config is not None and options.config.absolute() == places.kubeadm_config
    wish = Wish(
        role="init",
        places=places,
        config=config,
        kubeadm=options.kubeadm,
        files={} if given else {places.kubeadm_config: data},
        addresses=(config.address,),
        ca_dir=options.ca_dir,
        keep=options.keep,
        request=options.request,
        answers=options.answers,
        anew=options.anew,
    )
    with progress_shown() as progress:
        done = day_zero.make(settings, wish, now, progress, options.wait)
    _report(done)
    if done.is_complete:
        _next_of_init(wish)
    return done.exit_code


def check(settings: Settings, role: Role, kubelet: Path, now: datetime) -> int:
    """`bootstrap check`: return the exit code."""
    places = Places(pki=settings.node.pki_dir, kubeconfigs=settings.node.kubeconfig_dir, kubelet=kubelet)
    is_there = role != "worker" and places.kubeadm_config.exists()
    config = read_configuration(places.kubeadm_config)[0] if is_there else None
    node = config.name if config is not None else settings.node.name
    problems = day_zero.check(settings, places, role, node, config, now)
    if problems:
        raise NotWholeError("\n".join(problems))
    program = "init" if role == "init" else "join"
    say(f"nothing is missing and nothing wrong: `kubeadm {program}` may start")
    return Exit.DONE


def _configuration(options: Options) -> tuple[Configuration, bytes]:
    """The file, or one made from the facts."""
    if options.config is None:
        made = from_facts(options.facts)
        return made, made.text().encode()
    if given := options.facts.given():
        flags = {"address": "advertise-address", "endpoint": "control-plane-endpoint", "version": "kubernetes-version"}
        names = ", ".join(f"--{flags.get(name, name.replace('_', '-'))}" for name in given)
        raise SettingsError(
            [SettingsProblem("--kubeadm-config", "either a file or the facts themselves", f"{names}, too")]
        )
    return read_configuration(options.config)


def read_configuration(path: Path) -> tuple[Configuration, bytes]:
    """
    Read kubeadm's configuration file.

    Raises:
        KubeadmConfigError: It can't be read, or is none.
    """
    try:
        data = read(path)
    except UnreadableError as e:
        raise KubeadmConfigError(f"{path}: wanted kubeadm's configuration, found: {e}") from None
    if data is None:
        raise KubeadmConfigError(f"{path}: wanted kubeadm's configuration, found no file")
    try:
        return parse(data), data
    except KubeadmConfigError as e:
        raise KubeadmConfigError(f"{path}: {e}", hint=e.hint) from None


def _places(settings: Settings, options: Options, config: Configuration) -> Places:
    return Places(
        pki=settings.node.pki_dir,
        kubeconfigs=settings.node.kubeconfig_dir,
        kubelet=options.kubelet,
        etcd=Path(config.etcd_directory or ETCD_DIRECTORY),
    )


def _report(done: Bootstrapped) -> None:
    """What was signed, waits or failed."""
    rows = [
        (o.name, f"until {minute(o.new.not_valid_after_utc)}", f"by {o.backend}")
        for o in done.outcomes
        if o.new is not None
    ]
    say_table(rows)
    if done.from_kept:
        say(f"{done.files} files of {done.node} are in place again, from the copies that were kept; no CA was asked")
    elif done.files:
        say(f"{done.files} files of {done.node} are in place, and were looked at as a whole")
    elif done.is_complete:
        say(f"nothing to do: all files of {done.node} are in place, and nothing is wrong with them")
    failed = [o for o in done.outcomes if o.error is not None]
    waiting = [o for o in failed if isinstance(o.error, WaitingError)]
    if failed:
        held = "nothing was put in place; what was signed is kept, and is not asked for again"
        say(f"{len(waiting)} of {done.node}'s certificates wait for an answer; {held}" if waiting else held)
    for about, error in grouped(failed):
        print_error(error, about)
    for error in done.strange:
        print_error(error)


def _next_of_init(wish: Wish) -> None:
    config, super_admin = wish.places.kubeadm_config, wish.places.kubeconfigs / "super-admin.conf"
    say(
        f"\nnext, on this node, without --upload-certs:\n"
        f"  kubeadm init --config {config}\n"
        f"then, since kubeadm needs it for seconds, and it is beyond all RBAC rules:\n"
        f"  rm {super_admin}"
    )
