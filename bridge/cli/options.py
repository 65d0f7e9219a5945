"""Options that commands share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from cryptography import x509

from bridge.cli.declare import argument, duration_option, option
from bridge.pki.csr import general_name
from bridge.renewal.selection import Changes, RunOptions


def utc_now() -> datetime:
    """Return the time by the node's clock."""
    return datetime.now(UTC)


class Output(StrEnum):
    """Formats of a run's result."""

    TEXT = "text"
    JSON = "json"


Names = Annotated[list[str] | None, argument("kubeadm's names, or all. [default: what is due]", "[NAME…|all]")]
AnyIdentityOption = Annotated[
    list[str] | None,
    option(
        "Renew the named certificate even if the current one has another CA or an unexpected name. "
        "May be given more than once.",
        "NAME",
    ),
]
PolicyOption = Annotated[Path | None, option("What may be signed. [default: desk-policy.toml beside the settings]")]
WaitOption = Annotated[timedelta, duration_option('How long to wait for another run to end, such as "60s".')]
OutputOption = Annotated[Output, option("Format of the result.", "--output", "-o")]
AllOrNothingOption = Annotated[bool, option("Install nothing if one certificate fails.")]
ForceOption = Annotated[bool, option("Also while another node is unhealthy, or shortly after another restart.")]
NoRestartOption = Annotated[bool, option("Restart nothing, whatever the settings say; list what to restart.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeOptions:
    """The options that change the next certificates; one option a field."""

    add_san: Annotated[
        list[str] | None,
        option(
            "Add a DNS name or an IP address to the next certificate of apiserver, etcd-server or etcd-peer. "
            "May be given more than once.",
            "NAME=SAN",
        ),
    ] = None
    drop_san: Annotated[list[str] | None, option("Remove a SAN that nothing on this node uses.", "NAME=SAN")] = None
    adopt_defaults: Annotated[
        bool,
        option("Give the named certificates the subjects of today's kubeadm, if the cluster grants them their rights."),
    ] = False
    kubeadm_config: Annotated[
        Path | None,
        option(
            "kubeadm's configuration, from which a named certificate that is missing is made. "
            "[default: the cluster's kubeadm-config]",
            "FILE",
        ),
    ] = None
    any_identity: AnyIdentityOption = None

    def read(self, names: Sequence[str] | None, **more: Any) -> RunOptions:
        """Return the options of a run; without names, the run is about the certificates whose SANs change."""
        changes = Changes(
            add=_sans("--add-san", self.add_san),
            drop=_sans("--drop-san", self.drop_san),
            adopt_defaults=self.adopt_defaults,
            kubeadm_config=self.kubeadm_config,
        )
        return RunOptions(
            names=tuple(names or dict.fromkeys([*changes.add, *changes.drop])),
            any_identity=tuple(self.any_identity or ()),
            changes=changes,
            **more,
        )


def _sans(option: str, given: Sequence[str] | None) -> dict[str, tuple[x509.GeneralName, ...]]:
    names: dict[str, list[x509.GeneralName]] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        try:
            if not equals or not name:
                raise ValueError(f"wanted NAME=SAN such as apiserver=api.example.com, found {text[:60]!r}")  # noqa: TRY301
            names.setdefault(name, []).append(general_name(value))
        except ValueError as e:
            raise typer.BadParameter(f"{option}: {e}") from None
    return {name: tuple(dict.fromkeys(sans)) for name, sans in names.items()}
