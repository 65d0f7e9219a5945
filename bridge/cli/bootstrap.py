"""`bootstrap`: keys and certificates of a new node, before `kubeadm init` or `kubeadm join`."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from bridge.bootstrap import ConfigurationFacts, Places, Role, desired, keys, orders, together, whole
from bridge.bootstrap.make import make
from bridge.cli import setup as ca_setup
from bridge.cli.declare import Common, argument, command, group, option
from bridge.cli.options import WaitOption, utc_now
from bridge.cli.printing import progress_shown, say, say_headed, say_sentence, say_table
from bridge.cli.results import installed_rows, print_errors, whereabouts
from bridge.errors import Exit, SettingsError, SettingsProblem, WaitingError
from bridge.pki.csr import fingerprint_text
from bridge.settings.tables import Settings
from bridge.system.console import log_with_hint

commands = typer.Typer()
bootstrap = group(
    commands,
    "bootstrap",
    "Make all that a new node needs before `kubeadm init` or `kubeadm join`, without a CA key on it.",
)

CaDirOption = Annotated[
    Path | None,
    option("CA certificates, laid out as below /etc/kubernetes/pki. [default: the backends report theirs]", "DIR"),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeOptions:
    """The options that `bootstrap init` and `bootstrap join` share."""

    kubeadm_config: Annotated[
        Path | None, option("kubeadm's configuration file, in place of the facts below.", "FILE")
    ] = None
    order: Annotated[Path | None, option("The order that `bootstrap orders` wrote for this node.", "FILE")] = None
    name: Annotated[str, option("The node's name in the cluster.")] = ""
    advertise_address: Annotated[str, option("The node's own IP address.")] = ""
    cri_socket: Annotated[str, option("The container runtime's socket. [default: kubeadm's]")] = ""
    ca_dir: CaDirOption = None
    kubeadm: Annotated[str, option("The kubeadm program of the version that will run.")] = "kubeadm"
    keep: Annotated[Path | None, option("Keep copies there, keys included, which survive `kubeadm reset`.", "DIR")] = (
        None
    )
    request: Annotated[Path | None, option("Write the requests there for a CA desk, and ask no CA.", "BUNDLE")] = None
    answer: Annotated[list[Path] | None, option("A desk's answer; may be repeated.", "FILE")] = None
    anew: Annotated[bool, option("Forget the keys and requests of an earlier run.")] = False
    wait: WaitOption = timedelta()

    def facts(self, **of_cluster: Any) -> ConfigurationFacts:
        """Return the facts of the node itself, together with these of its cluster."""
        return ConfigurationFacts(name=self.name, address=self.advertise_address, socket=self.cri_socket, **of_cluster)


@command(bootstrap, "init")
def init(
    common: Common,
    options: NodeOptions,
    control_plane_endpoint: Annotated[str, option("HOST[:PORT] of the control plane, for all nodes.")] = "",
    kubernetes_version: Annotated[str, option("Such as v1.37.2.")] = "",
    service_subnet: Annotated[str, option("[default: kubeadm's]")] = "",
    dns_domain: Annotated[str, option("[default: kubeadm's]")] = "",
    cert_san: Annotated[
        list[str] | None, option("One more name or address of the API server; may be repeated.")
    ] = None,
    key: Annotated[str, option("kubeadm's encryptionAlgorithm, such as ECDSA-P256.")] = "",
) -> int:
    """
    Put everything in place for an unattended `kubeadm init` on the first control-plane node.

    kubeadm's own generate-csr makes keys and CSRs; CAs of the settings or a desk sign; the certificates are verified, and
    put in place in one step. Run it again after an interruption, or when a desk has answered. Exits with 4 while it waits.
    """
    facts = options.facts(
        endpoint=control_plane_endpoint,
        version=kubernetes_version,
        service_subnet=service_subnet,
        dns_domain=dns_domain,
        key=key,
        sans=tuple(cert_san or ()),
    )
    if options.kubeadm_config is not None and options.order is not None:
        raise _both("--kubeadm-config", "--order")
    if facts.given() and (options.kubeadm_config or options.order):
        flags = {"address": "advertise-address", "endpoint": "control-plane-endpoint", "version": "kubernetes-version"}
        given = ", ".join(f"--{flags.get(name, name.replace('_', '-'))}" for name in facts.given())
        raise _both("--kubeadm-config or --order", f"the facts themselves ({given})")
    settings = common.settings()
    return _run(settings, desired.of_init(settings, _said(settings, options, facts)), options.wait)


@command(bootstrap, "join")
def join(
    common: Common,
    control_plane: Annotated[bool, option("A further control-plane node.")] = False,
    worker: Annotated[bool, option("A node without a control plane.")] = False,
    shared: Annotated[
        Path | None, option("The output of `bootstrap share` on another node; -: standard input.", "FILE|-")
    ] = None,
    *,
    options: NodeOptions,
) -> int:
    """
    Put everything in place for an unattended `kubeadm join`, without a bootstrap token.

    A control-plane node needs what another one shares, the service account key included; a worker needs the cluster's
    configuration. Prints the command to run next. Exits with 4 while it waits for an answer.
    """
    settings, role = common.settings(), _role(control_plane, worker)
    said = _said(settings, options, options.facts(), shared)
    return _run(settings, desired.of_join(settings, said, role), options.wait)


def _role(control_plane: bool, worker: bool) -> Role | None:
    return "control-plane" if control_plane else "worker" if worker else None


def _both(option: str, other: str) -> SettingsError:
    return SettingsError([SettingsProblem(option, f"either {option} or {other}", "both")])


def _said(
    settings: Settings, options: NodeOptions, facts: ConfigurationFacts, shared: Path | None = None
) -> desired.NodeInputs:
    """Collect the inputs, and read the order and the shared file (OrderError: one of them can't be used)."""
    same: dict[str, Any] = {key: getattr(options, key) for key in ("ca_dir", "kubeadm", "keep", "request", "anew")}
    return desired.NodeInputs(
        facts=facts,
        config=options.kubeadm_config,
        order=orders.read_signed_order(settings, options.order) if options.order is not None else None,
        given=orders.read_order(shared) if shared is not None else None,
        answers=tuple(options.answer or ()),
        **same,
    )


def _run(settings: Settings, node: desired.DesiredNode, wait: timedelta) -> int:
    with progress_shown() as progress:
        done = make(settings, node, utc_now, progress, wait)
    _report(done)
    if done.is_complete:
        if node.inputs.order is not None and settings.node.order_key is None:
            # an attacker who changed an unsigned order decides what this node trusts
            printed = fingerprint_text(orders.digest(node.inputs.order))
            say("\n")
            say_sentence(f"first compare with what `bootstrap orders` printed, by another way: fingerprint {printed}")
        _say_next(node)
    return done.exit_code


@command(bootstrap, "share")
def share(
    common: Common,
    worker: Annotated[bool, option("For a worker: without the service account key.")] = False,
    kubeadm_config: Annotated[Path | None, option("[default: kubeadm.yaml beside the kubeconfigs]", "FILE")] = None,
) -> None:
    """
    Print what a further node needs from this control-plane node: CA certificates, configuration, service account key.

    For a pipe: `ssh cp-1 ca-bridge bootstrap share | ssh cp-2 ca-bridge bootstrap join --control-plane --shared - …`.
    The key is as powerful as a CA: its holder can act as any service account.
    """
    data = orders.share(common.settings(), kubeadm_config, utc_now(), worker=worker)
    output = None if worker else _open_output()
    if output is not None:
        raise orders.OrderError(
            f"wanted a pipe or a file of your own for the service account key, found {output}",
            hint="ssh cp-1 ca-bridge bootstrap share | ssh cp-2 ca-bridge bootstrap join --control-plane --shared - …; "
            "or `umask 077` before it",
        )
    say(data.decode())


def _open_output() -> str | None:
    """Say what exposes standard output to other users; None: nothing does."""
    if sys.stdout.isatty():
        return "a terminal"
    with contextlib.suppress(OSError, ValueError):  # standard output is closed, or no real file
        status = os.fstat(sys.stdout.fileno())
        if stat.S_ISREG(status.st_mode) and (status.st_mode & 0o077 or status.st_uid != os.geteuid()):
            return f"a file of mode {stat.S_IMODE(status.st_mode):04o} of user {status.st_uid}"
    return None


@command(bootstrap, "orders")
def write_orders(
    common: Common,
    nodes: Annotated[Path, option("A list of nodes: `ROLE NAME ADDRESS …` on each line.", "FILE")],
    kubeadm_config: Annotated[Path, option("The file with the ClusterConfiguration.", "FILE")],
    directory: Annotated[Path, option("Where the orders go.", "--output", "-o", "DIR")],
    ca_dir: CaDirOption = None,
    sign_with: Annotated[
        Path | None,
        option("A private key (PEM); nodes with its public key as node.order_key take no other orders.", "KEY"),
    ] = None,
) -> None:
    """
    Prepare a list of nodes on an administrator's machine: an order for each, with nothing secret in it.

    ROLE is init, control-plane or worker; the first ADDRESS is the node's own. Keys are made on the nodes.
    """
    settings = common.settings()
    made = orders.write_orders(settings, nodes, kubeadm_config, ca_dir, directory, sign_with, utc_now())
    digests = [(node, path, fingerprint_text(orders.digest(order))) for node, (path, order) in made.items()]
    say_table([(node.name, node.role, str(path), digest) for node, path, digest in digests])
    first = next((node.name for node in made if node.role == "init"), "a control-plane node")
    say("\ncarry each to its node, and run there (its keys are made there, and stay):")
    commands = {
        "init": "ca-bridge bootstrap init --order NAME.order.json",
        "control-plane": f"ca-bridge bootstrap join --order NAME.order.json --shared - (from {first}: `ca-bridge bootstrap share`)",
        "worker": "ca-bridge bootstrap join --order NAME.order.json",
    }
    for role in dict.fromkeys(node.role for node in made):
        say_sentence(f"{role}: {commands[role]}", "  ")
    if sign_with is None:
        say("\n")
        say_sentence("they are not signed (--sign-with KEY): compare the fingerprint that each node prints")


@command(bootstrap, "setup")
def setup(
    common: Common,
    kind: Annotated[str, argument("vault, cfssl, openssl …", "TYPE")],
    order: Annotated[list[Path], option("An order that `bootstrap orders` wrote; may be repeated.", "FILE")],
    authority: Annotated[str | None, option("Only this one of ca, etcd-ca, front-proxy-ca.")] = None,
    directory: Annotated[Path | None, option("Write files into this directory.", "-o", "--output")] = None,
) -> None:
    """
    Print what a CA's administrator needs for nodes that do not exist yet, as `ca-bridge setup` does for those that do.

    Names are those of kubeadm in the order's version; no node and no kubeadm is needed.
    """
    settings = common.settings()
    nodes = {}
    for path in order:
        signed = orders.read_signed_order(settings, path)
        expected = keys.expected_certificates(signed, utc_now())
        if signed.node is not None:
            nodes[signed.node.name] = {ca: of_ca for ca, of_ca in expected.items() if authority in (None, ca)}
    ca_setup.print_or_write(ca_setup.files_of(settings, kind, nodes), directory)


@command(bootstrap, "check")
def check(
    common: Common,
    control_plane: Annotated[bool, option("A control-plane node that will join.")] = False,
    worker: Annotated[bool, option("A node without a control plane.")] = False,
) -> int:
    """
    Check all files that `kubeadm init` or `kubeadm join` needs, more closely than kubeadm: pairs, names, CAs and dates.

    Changes nothing. Exits with 5 if something is missing or wrong.
    """
    settings, role = common.settings(), _role(control_plane, worker) or "init"
    places = Places.of(settings)
    files = [] if role == "init" else [places.join_config]
    files += [] if role == "worker" else [places.kubeadm_config]
    config = together(files)
    problems = whole.check(settings, Places.of(settings, config), role, files, config, utc_now())
    program = "init" if role == "init" else "join"
    if problems:
        hint = "`ca-bridge bootstrap join` makes the missing files"
        if role == "init":
            joins = "a node that is to join is looked at with --control-plane or --worker"
            hint = f"`ca-bridge bootstrap init` makes the missing files; {joins}"
        raise desired.NotWholeError("\n".join(problems), hint=hint)
    say(f"nothing is missing and nothing wrong: `kubeadm {program}` may start")
    return Exit.DONE


def _report(done: desired.Bootstrapped) -> None:
    say_table([(name, end, by) for name, end, _, _, by in installed_rows(done.outcomes)])
    of_node = f"{done.files} files of {done.node} are in place"
    if done.from_kept:
        say_sentence(f"{of_node} again, from the copies that were kept; no CA was asked")
    elif done.files:
        say_sentence(f"{of_node}, and were looked at as a whole")
    elif done.is_complete:
        say_sentence(f"nothing to do: all files of {done.node} are in place, and nothing is wrong with them")
    waiting = [o for o in done.outcomes if isinstance(o.error, WaitingError)]
    failed = [o for o in done.outcomes if o.error is not None and o not in waiting]
    if waiting:
        say_headed([(whereabouts(request), (request.name, "waits")) for request in waiting])
    if waiting or failed:
        say_sentence("nothing was put in place; certificates that are signed already are kept, and not requested again")
    if waiting:
        say_sentence("run the same command again when there is an answer (one that was carried: --answer FILE)")
    print_errors(failed, done.errors)


_KUBELETS_ROTATE = (
    "kubelets of this cluster will ask a signer for their next certificate, and take no other without a restart"
)
_WITHOUT_A_SIGNER = (
    "without a signer in the cluster: a KubeletConfiguration with rotateCertificates: false in the configuration"
)


def _say_next(node: desired.DesiredNode) -> None:
    """Print the kubeadm command to run next, and advice that is cheap to follow at `init`, but not on many nodes later."""
    if node.role != "init":  # no token and no flag: the file has everything
        say(f"\nnext, on this node:\n  kubeadm join --config {node.places.join_config}")
        return
    say(f"\nnext, on this node, without --upload-certs:\n  kubeadm init --config {node.places.kubeadm_config}")
    say("then, since kubeadm needs it for seconds, and it is beyond all RBAC rules:")
    say(f"  rm {node.places.kubeconfigs / 'super-admin.conf'}")
    if node.config.kubelets_rotate:
        log_with_hint(logging.INFO, _KUBELETS_ROTATE, _WITHOUT_A_SIGNER)
