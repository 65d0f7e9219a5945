"""What `bootstrap init` and `bootstrap join` have both on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bridge.cli.options import WaitOption

if TYPE_CHECKING:
    from bridge.bootstrap.configuration import ConfigurationFacts

CaDirOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="CA certificates, laid out as below /etc/kubernetes/pki. [default: the backends tell theirs]",
        show_default=False,
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeOptions:
    """One option a field."""

    kubeadm_config: Annotated[
        Path | None,
        typer.Option(
            "--kubeadm-config",
            metavar="FILE",
            help="kubeadm's configuration file; else the facts below.",
            show_default=False,
        ),
    ] = None
    order: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What `bootstrap orders` wrote for this node.", show_default=False),
    ] = None
    name: Annotated[str, typer.Option(help="The node's name in the cluster.", show_default=False)] = ""
    advertise_address: Annotated[str, typer.Option(help="The node's own IP address.", show_default=False)] = ""
    cri_socket: Annotated[
        str, typer.Option(help="The container runtime's. [default: kubeadm's]", show_default=False)
    ] = ""
    ca_dir: CaDirOption = None
    kubeadm: Annotated[str, typer.Option(help="The kubeadm of the version that will run.")] = "kubeadm"
    keep: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Keep copies there, keys included, which survive `kubeadm reset`.", show_default=False
        ),
    ] = None
    request: Annotated[
        Path | None,
        typer.Option(
            metavar="BUNDLE", help="Write the requests there for a CA desk, and ask no CA.", show_default=False
        ),
    ] = None
    answer: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="What a desk has answered; may be repeated.", show_default=False),
    ] = None
    anew: Annotated[bool, typer.Option("--anew", help="Forget keys and requests that an earlier run has made.")] = False
    wait: WaitOption = None

    def facts(self, **of_cluster: Any) -> ConfigurationFacts:
        """The facts of the node itself, beside those of its cluster."""
        from bridge.bootstrap.configuration import ConfigurationFacts  # noqa: PLC0415

        return ConfigurationFacts(name=self.name, address=self.advertise_address, socket=self.cri_socket, **of_cluster)
