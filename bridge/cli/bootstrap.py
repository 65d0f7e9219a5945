"""`bootstrap`: the command line of day 0; what it does and prints is in `bridge.cli.new_node`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bridge.cli.help import Group
from bridge.cli.node_options import CaDirOption, NodeOptions
from bridge.cli.options import Common, command, utc_now

if TYPE_CHECKING:
    from bridge.bootstrap.places import Role

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Make all that a new node needs before `kubeadm init` or `kubeadm join`, without a CA key on it.",
)


@command(app, "init")
def init(
    common: Common,
    options: NodeOptions,
    control_plane_endpoint: Annotated[
        str, typer.Option(help="HOST[:PORT] by which all reach the control plane.", show_default=False)
    ] = "",
    kubernetes_version: Annotated[str, typer.Option(help="Such as v1.37.2.", show_default=False)] = "",
    service_subnet: Annotated[str, typer.Option(help="[default: kubeadm's]", show_default=False)] = "",
    dns_domain: Annotated[str, typer.Option(help="[default: kubeadm's]", show_default=False)] = "",
    cert_san: Annotated[
        list[str] | None, typer.Option(help="One more name or address of the API server; may be repeated.")
    ] = None,
    key: Annotated[
        str, typer.Option(help="kubeadm's encryptionAlgorithm, such as ECDSA-P256.", show_default=False)
    ] = "",
) -> None:
    """
    Put everything in place for an unattended `kubeadm init` on the first control-plane node.

    Keys and CSRs by kubeadm's own generate-csr, signed by the CAs of the settings or by a desk, proven, and put in place
    in one step. Run it again after an interruption, or when a desk has answered: exit code 4 says that it waits.
    """
    from bridge.cli import new_node  # noqa: PLC0415

    facts = options.facts(
        endpoint=control_plane_endpoint,
        version=kubernetes_version,
        service_subnet=service_subnet,
        dns_domain=dns_domain,
        key=key,
        sans=tuple(cert_san or ()),
    )
    raise typer.Exit(new_node.init(common.settings(), options, facts, utc_now))


@command(app, "join")
def join(
    common: Common,
    control_plane: Annotated[bool, typer.Option("--control-plane", help="A further control-plane node.")] = False,
    worker: Annotated[bool, typer.Option("--worker", help="A node without a control plane.")] = False,
    shared: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|-",
            help="What `bootstrap share` on another node printed; -: standard input.",
            show_default=False,
        ),
    ] = None,
    *,
    options: NodeOptions,
) -> None:
    """
    Put everything in place for an unattended `kubeadm join`, without a bootstrap token.

    A control-plane node needs what another one shares (its service account key among it); a worker needs the cluster's
    configuration. Prints the command to run next. Exit code 4 says that it waits for an answer.
    """
    from bridge.cli import new_node  # noqa: PLC0415

    role = _role(control_plane, worker)
    raise typer.Exit(new_node.join(common.settings(), options, role, shared, utc_now))


def _role(control_plane: bool, worker: bool) -> Role | None:
    if control_plane and worker:
        raise typer.BadParameter("either --control-plane or --worker")
    return "control-plane" if control_plane else "worker" if worker else None


@command(app, "share")
def share(
    common: Common,
    worker: Annotated[bool, typer.Option("--worker", help="For a worker: without the service account key.")] = False,
    kubeadm_config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="[default: kubeadm.yaml beside the kubeconfigs]", show_default=False),
    ] = None,
) -> None:
    """
    Print what a further node needs from this control-plane node: CA certificates, configuration, service account key.

    For a pipe: `ssh cp-1 ca-bridge bootstrap share | ssh cp-2 ca-bridge bootstrap join --control-plane --shared - …`.
    The key is as powerful as a CA: whoever has it can be any service account.
    """
    from bridge.cli import new_node  # noqa: PLC0415

    new_node.share(common.settings(), kubeadm_config, utc_now(), worker=worker)


@command(app, "orders")
def orders(
    common: Common,
    nodes: Annotated[Path, typer.Option(metavar="FILE", help="`ROLE NAME ADDRESS …` a line.", show_default=False)],
    kubeadm_config: Annotated[
        Path, typer.Option(metavar="FILE", help="With the ClusterConfiguration.", show_default=False)
    ],
    directory: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where they go.", show_default=False)
    ],
    ca_dir: CaDirOption = None,
    sign_with: Annotated[
        Path | None,
        typer.Option(
            "--sign-with",
            metavar="KEY",
            help="A private key (PEM); nodes with its public key as node.order_key take no other orders.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """
    Prepare a list of nodes on an administrator's machine: an order for each, with nothing secret in it.

    ROLE is init, control-plane or worker; the first ADDRESS is the node's own. Keys are made on the nodes.
    """
    from bridge.cli import new_node  # noqa: PLC0415

    new_node.write_orders(common.settings(), nodes, kubeadm_config, ca_dir, directory, sign_with, utc_now())


@command(app, "setup")
def setup(
    common: Common,
    kind: Annotated[str, typer.Argument(metavar="TYPE", help="vault, cfssl, openssl …", show_default=False)],
    order: Annotated[
        list[Path],
        typer.Option(metavar="FILE", help="What `bootstrap orders` wrote; may be repeated.", show_default=False),
    ],
    authority: Annotated[
        str | None, typer.Option(help="Only this one of ca, etcd-ca, front-proxy-ca.", show_default=False)
    ] = None,
    directory: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write files into this directory.", show_default=False)
    ] = None,
) -> None:
    """
    Print what a CA's administrator needs for nodes that are yet to be made, as `ca-bridge setup` does for those that are.

    Names are kubeadm's for the version in the order; no node and no kubeadm is needed.
    """
    from bridge.cli import new_node  # noqa: PLC0415

    new_node.setup(common.settings(), kind, order, authority, directory, utc_now())


@command(app, "check")
def check(
    common: Common,
    control_plane: Annotated[bool, typer.Option("--control-plane", help="A node that is to join one.")] = False,
    worker: Annotated[bool, typer.Option("--worker", help="A node without a control plane.")] = False,
) -> None:
    """
    Look at all files that `kubeadm init` or `kubeadm join` needs, as kubeadm does not: each pair, name, CA and date.

    Changes nothing. Exits with 5 if something is missing or wrong.
    """
    from bridge.cli import new_node  # noqa: PLC0415

    role = _role(control_plane, worker) or "init"
    raise typer.Exit(new_node.check(common.settings(), role, utc_now()))
