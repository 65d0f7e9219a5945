"""`kubeconfig`: kubeconfigs for people and machines."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from bridge import users
from bridge.cli.declare import Common, argument, command, duration_option, group, option
from bridge.cli.options import WaitOption, utc_now
from bridge.cli.printing import progress_shown, say, say_sentence
from bridge.errors import SettingsError, SettingsProblem
from bridge.pki.expiry import minute
from bridge.pki.user_rules import User
from bridge.specs import KEY_ALGORITHMS, KeyAlgorithm

commands = typer.Typer()
kubeconfig = group(commands, "kubeconfig", "Make kubeconfigs for people and machines.")

_Name = Annotated[str, argument("Kubernetes' user name (CN).", "NAME")]
_Groups = Annotated[list[str] | None, option("A group (O); may be given more than once.", "--group")]
_Key = Annotated[str, option(f"Kind of the new key: {', '.join(KEY_ALGORITHMS)}.", "KIND")]


@command(kubeconfig, "request")
def request(
    _: Common,
    name: _Name,
    groups: _Groups = None,
    directory: Annotated[Path, option("Where NAME.key and NAME.csr go.", "--output", "-o", "DIR")] = Path(),
    key: _Key = "ecdsa-p256",
) -> None:
    """
    Make a private key and a CSR, on the person's own machine.

    The key (NAME.key, for its owner alone) stays there; NAME.csr goes to the operator, who runs `ca-bridge kubeconfig
    user`. It needs no settings, no root and no cluster.
    """
    key_path, csr_path = users.write_request(_user(name, groups), directory.absolute(), _algorithm(key))
    say_sentence(f"{key_path}  the private key: it stays yours alone")
    say_sentence(f"{csr_path}  the request: hand it in; the kubeconfig that comes back goes beside the key")


@command(kubeconfig, "user")
def user(
    common: Common,
    name: _Name,
    groups: _Groups = None,
    out: Annotated[Path | None, option("The kubeconfig. [default: NAME.conf]", "--output", "-o", "FILE")] = None,
    csr: Annotated[
        Path | None, option("The person's CSR. [default: a key is made here, for a machine]", "FILE")
    ] = None,
    key_file: Annotated[
        str,
        option(
            "With --csr: the person's key file, seen from the kubeconfig. [default: beside it, named like the CSR]",
            "FILE",
        ),
    ] = "",
    validity: Annotated[timedelta | None, duration_option('Such as "4h". [default: users.validity, 8h]')] = None,
    server: Annotated[str, option("The API server. [default: as in admin.conf]", "URL")] = "",
    ca: Annotated[Path | None, option("The cluster's CA. [default: ca.crt of node.pki_dir]", "FILE")] = None,
    key: _Key = "ecdsa-p256",
    wait: WaitOption = timedelta(),
) -> None:
    """
    Have a short-lived client certificate signed, and write a kubeconfig with it.

    With --csr the private key stays with the person, and the kubeconfig names its file. Without, a new key is put into
    the kubeconfig, which is for its owner alone. [users] in the settings says which names, groups and lifetimes are
    allowed. Exits with 4 if the CA answers later; the same command takes the answer.
    """
    order = users.UserOrder(
        user=_user(name, groups),
        out=(out or Path(f"{users.stem_of(name)}.conf")).absolute(),
        csr=csr.absolute() if csr is not None else None,
        key_file=key_file,
        key=_algorithm(key),
        validity=validity,
        server=server,
        ca_file=ca.absolute() if ca is not None else None,
    )
    with progress_shown() as progress:
        done = users.issue(common.settings(), order, utc_now, progress, wait)
    of_groups = ", ".join(order.user.groups) or "no group"
    say(f"{order.out}  {name} in {of_groups}, until {minute(done.leaf.not_valid_after_utc)}")
    say(f"  for {done.server}, signed by {done.backend}")
    if done.key_file:
        say(f"  the private key belongs beside it: {done.key_file}")


def _user(name: str, groups: Sequence[str] | None) -> User:
    return User(name=name, groups=tuple(dict.fromkeys(groups or ())))


def _algorithm(text: str) -> KeyAlgorithm:
    if text not in KEY_ALGORITHMS:
        raise SettingsError([SettingsProblem("--key", f"one of {', '.join(KEY_ALGORITHMS)}", repr(text))])
    return text
