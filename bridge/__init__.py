"""
ca-bridge: renews a kubeadm control plane's certificates through a CA that lives elsewhere.

The map: each package imports only packages above it in this list; `tests/test_walls.py` has the table.

- `contract`, `errors`, `secret`, `specs`, `words`: the doors, which are the public and stable modules; so are `entry` and
  `testing`, which may import every package
- `pki`: certificates, CSRs, bundles and the checks on them; no I/O, no clock
- `system`: files, processes, HTTPS, waiting, messages on standard error
- `settings`: the settings file
- `node`: this machine's certificates, kubeconfigs, manifests and processes, read only
- `state`: the audit log, backups, open requests and other records, and the replacement of files
- `ca`: requests to CAs through their backends
- `users`: kubeconfigs for people and machines, signed through the same backends
- `desk`: the CA desk, which signs request bundles by a policy
- `cluster`: the client for the cluster's Kubernetes API, kubeadm's ConfigMaps, leases
- `control_plane`: checks components and restarts them
- `renewal`: the main job: renews certificates, online and by air gap
- `rotation`: replaces a CA while the cluster runs
- `monitoring`: metrics, and the results of the last runs
- `diagnosis`: the checks of `doctor`: would the next renewal, and a restart, succeed?
- `gateway`: signs requests to the cluster's certificates API
- `door`: `serve`, one door for all nodes: takes their requests over HTTPS, with the desk's functions
- `bootstrap`: day 0: everything that a new node needs before kubeadm adds it
- `cli`: the commands, and everything that they print

All packages use `dataclass`, below.

Backends are not part of `bridge`, which finds them by entry point.
A backend imports the doors and the few other modules that the table names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
else:

    def dataclass(cls: type | None = None, /, *, frozen: bool = False, eq: bool = True, **options: bool) -> Any:
        """
        A class by the standard library's `dataclass`, made in a third of the time: a command makes 60 to 160 of them before
        it begins (`check-expiration` and the quiet night of docs/evidence/numbers.md).

        All of them share their `==`, `hash` and `repr`, which compare and show the same, in the place of compiled ones; and
        a frozen class is frozen for mypy alone.
        """

        def make(cls: type) -> type:
            own = {"__repr__": _repr} | ({"__eq__": _eq, "__hash__": _hash if frozen else None} if eq else {})
            missing = {name: value for name, value in own.items() if name not in vars(cls)}
            made = dataclasses.dataclass(cls, eq=False, repr=False, **options)
            for name, value in missing.items():
                setattr(made, name, value)
            return made

        return make if cls is None else make(cls)


def _eq(self: Any, other: object) -> bool:
    if type(other) is not type(self):
        return cast(bool, NotImplemented)
    of = _of(self)
    return bool(of(self) == of(other))


def _hash(self: Any) -> int:
    return hash(_of(self)(self))


def _repr(self: Any) -> str:
    shown = [f"{one.name}={getattr(self, one.name)!r}" for one in dataclasses.fields(self) if one.repr]
    return f"{self.__class__.__qualname__}({', '.join(shown)})"


def _of(one: Any) -> Callable[[Any], object]:
    """Reads what is compared of an object of this one's class."""
    cls: Any = type(one)
    if (found := _compared.get(cls)) is None:
        names = [each.name for each in dataclasses.fields(cls) if each.compare]
        found = _compared[cls] = attrgetter(*names) if names else lambda _: ()
    return found


_compared: dict[Any, Callable[[Any], object]] = {}
