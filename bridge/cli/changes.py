"""Options by which an operator says what is to be different in the next certificates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from cryptography import x509

from bridge.pki.csr import general_name
from bridge.renewal.select import Changes
from bridge.system.console import log

RekeyOption = Annotated[
    bool, typer.Option("--rekey", help="Make new keys, which every renewal does: it changes nothing.")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeOptions:
    """One option a field."""

    add_san: Annotated[
        list[str] | None,
        typer.Option(
            "--add-san",
            metavar="NAME=SAN",
            help="Add a DNS name or an IP address to the next certificate of apiserver, etcd-server or etcd-peer. "
            "May be given more than once.",
        ),
    ] = None
    drop_san: Annotated[
        list[str] | None,
        typer.Option("--drop-san", metavar="NAME=SAN", help="Leave one out of it, that nobody on this node needs."),
    ] = None
    adopt_defaults: Annotated[
        bool,
        typer.Option(
            "--adopt-defaults",
            help="Give the named certificates the subjects of today's kubeadm; only if their rights are there.",
        ),
    ] = False
    kubeadm_config: Annotated[
        Path | None,
        typer.Option(
            "--kubeadm-config",
            metavar="FILE",
            help="kubeadm's configuration, from which a named certificate that is missing is made. "
            "[default: the cluster's kubeadm-config]",
            show_default=False,
        ),
    ] = None

    def read(self, *, rekey: bool = False) -> Changes:
        """
        The options as one value.

        Raises:
            typer.BadParameter: A SAN that is none.
        """
        if rekey:
            log.info("--rekey: every renewal makes a new key; nothing else is done than without it")
        return Changes(
            add=_sans("--add-san", self.add_san),
            drop=_sans("--drop-san", self.drop_san),
            adopt_defaults=self.adopt_defaults,
            kubeadm_config=self.kubeadm_config,
        )


def names_of(names: Sequence[str] | None, changes: Changes) -> tuple[str, ...]:
    """The names that were given; without any, those whose SANs are to change."""
    return tuple(names or dict.fromkeys([*changes.add, *changes.drop]))


def _sans(option: str, given: Sequence[str] | None) -> dict[str, tuple[x509.GeneralName, ...]]:
    found: dict[str, list[x509.GeneralName]] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        try:
            if not equals or not name:
                raise ValueError(f"wanted NAME=SAN such as apiserver=api.example.com, found {text[:60]!r}")  # noqa: TRY301
            found.setdefault(name, []).append(general_name(value))
        except ValueError as e:
            raise typer.BadParameter(f"{option}: {e}") from None
    return {name: tuple(dict.fromkeys(sans)) for name, sans in found.items()}
