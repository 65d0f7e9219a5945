"""`bootstrap`: the command line of day 0; what it does and prints is in `bridge.cli.new_node`."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from bridge.bootstrap.places import Role
from bridge.cli.help import Group
from bridge.cli.options import Common, WaitOption, command, utc_now

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Make all that a new node needs before `kubeadm init` or `kubeadm join`, without a CA key on it.",
)

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--kubeadm-config",
        metavar="FILE",
        help="kubeadm's configuration file; else the facts below.",
        show_default=False,
    ),
]
NameOption = Annotated[str, typer.Option(help="The node's name in the cluster.", show_default=False)]
AddressOption = Annotated[str, typer.Option(help="The node's own IP address.", show_default=False)]
EndpointOption = Annotated[
    str, typer.Option(help="HOST[:PORT] by which all reach the control plane.", show_default=False)
]
VersionOption = Annotated[str, typer.Option(help="Such as v1.37.2.", show_default=False)]
SocketOption = Annotated[str, typer.Option(help="The container runtime's. [default: kubeadm's]", show_default=False)]
CaDirOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="CA certificates, laid out as below /etc/kubernetes/pki. [default: the backends tell theirs]",
        show_default=False,
    ),
]
KubeadmOption = Annotated[str, typer.Option(help="The kubeadm of the version that will run.")]
KeepOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Keep copies there, keys included, which survive `kubeadm reset`.", show_default=False
    ),
]
RequestOption = Annotated[
    Path | None,
    typer.Option(metavar="BUNDLE", help="Write the requests there for a CA desk, and ask no CA.", show_default=False),
]
AnswerOption = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="What a desk has answered; may be repeated.", show_default=False),
]
AnewOption = Annotated[bool, typer.Option("--anew", help="Forget keys and requests that an earlier run has made.")]
OrderOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="What `bootstrap orders` wrote for this node.", show_default=False),
]


@command(app, "init")
def init(
    common: Common,
    kubeadm_config: ConfigOption = None,
    order: OrderOption = None,
    name: NameOption = "",
    advertise_address: AddressOption = "",
    control_plane_endpoint: EndpointOption = "",
    kubernetes_version: VersionOption = "",
    service_subnet: Annotated[str, typer.Option(help="[default: kubeadm's]", show_default=False)] = "",
    dns_domain: Annotated[str, typer.Option(help="[default: kubeadm's]", show_default=False)] = "",
    cert_san: Annotated[
        list[str] | None, typer.Option(help="One more name or address of the API server; may be repeated.")
    ] = None,
    key: Annotated[
        str, typer.Option(help="kubeadm's encryptionAlgorithm, such as ECDSA-P256.", show_default=False)
    ] = "",
    cri_socket: SocketOption = "",
    ca_dir: CaDirOption = None,
    kubeadm: KubeadmOption = "kubeadm",
    keep: KeepOption = None,
    request: RequestOption = None,
    answer: AnswerOption = None,
    anew: AnewOption = False,
    wait: WaitOption = None,
) -> None:
    """
    Put everything in place for an unattended `kubeadm init` on the first control-plane node.

    Keys and CSRs by kubeadm's own generate-csr, signed by the CAs of the settings or by a desk, proven, and put in place
    in one step. Run it again after an interruption, or when a desk has answered: exit code 4 says that it waits.
    """
    from bridge.bootstrap.configuration import Facts  # noqa: PLC0415
    from bridge.cli import new_node  # noqa: PLC0415

    facts = Facts(
        name=name,
        address=advertise_address,
        endpoint=control_plane_endpoint,
        version=kubernetes_version,
        socket=cri_socket,
        service_subnet=service_subnet,
        dns_domain=dns_domain,
        key=key,
        sans=tuple(cert_san or ()),
    )
    options = new_node.Options(
        facts=facts,
        config=kubeadm_config,
        order=order,
        ca_dir=ca_dir,
        kubeadm=kubeadm,
        keep=keep,
        request=request,
        answers=tuple(answer or ()),
        anew=anew,
        wait=wait or timedelta(),
    )
    raise typer.Exit(new_node.init(common.settings(), options, utc_now))


@command(app, "join")
def join(
    common: Common,
    control_plane: Annotated[bool, typer.Option("--control-plane", help="A further control-plane node.")] = False,
    worker: Annotated[bool, typer.Option("--worker", help="A node without a control plane.")] = False,
    order: OrderOption = None,
    shared: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|-",
            help="What `bootstrap share` on another node printed; -: standard input.",
            show_default=False,
        ),
    ] = None,
    kubeadm_config: ConfigOption = None,
    name: NameOption = "",
    advertise_address: AddressOption = "",
    cri_socket: SocketOption = "",
    ca_dir: CaDirOption = None,
    kubeadm: KubeadmOption = "kubeadm",
    keep: KeepOption = None,
    request: RequestOption = None,
    answer: AnswerOption = None,
    anew: AnewOption = False,
    wait: WaitOption = None,
) -> None:
    """
    Put everything in place for an unattended `kubeadm join`, without a bootstrap token.

    A control-plane node needs what another one shares (its service account key among it); a worker needs the cluster's
    configuration. Prints the command to run next. Exit code 4 says that it waits for an answer.
    """
    from bridge.bootstrap.configuration import Facts  # noqa: PLC0415
    from bridge.cli import new_node  # noqa: PLC0415

    options = new_node.Options(
        facts=Facts(name=name, address=advertise_address, socket=cri_socket),
        config=kubeadm_config,
        order=order,
        given=shared,
        ca_dir=ca_dir,
        kubeadm=kubeadm,
        keep=keep,
        request=request,
        answers=tuple(answer or ()),
        anew=anew,
        wait=wait or timedelta(),
    )
    raise typer.Exit(new_node.join(common.settings(), options, _role(control_plane, worker), utc_now))


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
) -> None:
    """
    Prepare a list of nodes on an administrator's machine: an order for each, with nothing secret in it.

    ROLE is init, control-plane or worker; the first ADDRESS is the node's own. Keys are made on the nodes.
    """
    from bridge.cli import new_node  # noqa: PLC0415

    new_node.write_orders(common.settings(), nodes, kubeadm_config, ca_dir, directory, utc_now())


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
