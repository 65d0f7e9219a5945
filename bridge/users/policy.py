"""Who may have a certificate, in which groups and for how long (pure)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatchcase

from bridge.errors import BridgeError, Exit
from bridge.pki.durations import duration_text
from bridge.settings.tables import UserSettings
from bridge.specs import SPECS
from bridge.words import one_line

#: Kubernetes' own names (`system:masters`, which no RBAC rule can hold back, nodes and components), and kubeadm's.
_RESERVED = ("system:", "kubeadm:")
#: Of kubeadm's own certificates: shared by whoever has the file, so that nobody could tell who did something.
_SHARED = {name for spec in SPECS.values() for name in spec.common_names if "{" not in name}
#: What Kubernetes, RBAC manifests and shells all bear; e-mail addresses are among them.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:/+-]{0,63}")
_SHORTEST = timedelta(minutes=10)


class NotAllowedError(BridgeError):
    """The settings do not allow such a user; nobody was asked."""

    exit_code = Exit.REFUSED
    hint = "[users] in the settings says what may be signed"


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """Who a certificate is for."""

    name: str  #: Kubernetes' user name: the CN.
    groups: tuple[str, ...] = ()  #: The O values, each once.


def assert_allowed(user: User, validity: timedelta, rules: UserSettings) -> None:
    """
    Raises:
        NotAllowedError: With all that speaks against it.
    """
    problems = [
        *_name_problems(user, rules),
        *_group_problems(user.groups, rules),
        *_validity_problems(validity, rules),
    ]
    if problems:
        raise NotAllowedError("; ".join(problems))


def _name_problems(user: User, rules: UserSettings) -> Iterator[str]:
    if not _NAME.fullmatch(user.name):
        yield f"name: wanted at most 64 letters, digits and ._@:/+-, found {one_line(user.name, 80)!r}"
    elif user.name not in rules.allow and (_is_reserved(user.name) or user.name in _SHARED):
        yield f"name: wanted one that is not Kubernetes' or kubeadm's own (users.allow names exceptions), found {user.name}"


def _group_problems(groups: Sequence[str], rules: UserSettings) -> Iterator[str]:
    for group in groups:
        if not _NAME.fullmatch(group):
            yield f"group: wanted at most 64 letters, digits and ._@:/+-, found {one_line(group, 80)!r}"
        elif group in rules.allow:
            continue
        elif _is_reserved(group):
            yield f"group: wanted one that is not Kubernetes' or kubeadm's own (users.allow names exceptions), found {group}"
        elif not any(fnmatchcase(group, pattern) for pattern in rules.groups):
            yield f"group: wanted {' or '.join(rules.groups) or 'none'} (users.groups), found {group}"


def _is_reserved(name: str) -> bool:
    return name.lower().startswith(_RESERVED)


def _validity_problems(validity: timedelta, rules: UserSettings) -> Iterator[str]:
    if validity > rules.max_validity:
        limit = duration_text(rules.max_validity)
        yield f"validity: wanted at most {limit} (users.max_validity), found {duration_text(validity)}"
    elif validity < _SHORTEST:
        yield f"validity: wanted at least {duration_text(_SHORTEST)}, found {duration_text(validity)}"
