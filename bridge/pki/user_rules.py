"""Names, groups and lifetimes that a user's certificate may have (pure); Kubernetes' own only if they are listed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatchcase

from bridge.pki.expiry import duration_text
from bridge.specs import SPECS
from bridge.words import one_of

#: Kubernetes' own names (`system:masters`, which no RBAC rule can restrict, nodes and components), and kubeadm's.
_RESERVED = ("system:", "kubeadm:")
#: kubeadm's own users: everyone with the file shares them, so audit logs name no person.
_SHARED = {name for spec in SPECS.values() for name in spec.common_names if "{" not in name}
#: Characters that Kubernetes, RBAC manifests and shells all accept; e-mail addresses fit.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:/+-]{0,63}")
NAME_FORM = "at most 64 letters, digits and ._@:/+-, a letter or digit first"
_LONGEST_SHOWN = 80
#: Enough time to install and use the certificate.
SHORTEST = timedelta(minutes=10)


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """The user that a certificate is for."""

    name: str  #: Kubernetes' user name: the CN.
    groups: tuple[str, ...] = ()  #: The O values without duplicates.


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits for users from a table `[users]`."""

    groups: tuple[str, ...]  #: Shell patterns.
    allow: tuple[str, ...]  #: Reserved names and groups that are allowed nevertheless.
    max_validity: timedelta
    names: tuple[str, ...] = ("*",)  #: Shell patterns.


def problems(user: User, validity: timedelta, limits: Limits) -> list[str]:
    """All reasons against a user's certificate."""
    return [*name_problems(user, limits), *_validity_problems(validity, limits)]


def name_problems(user: User, limits: Limits) -> list[str]:
    """The reasons against a user's name and groups."""
    return [
        *(f"{what}: wanted {NAME_FORM}, found {value}" for what, value in misnamed(user)),
        *_problems_of("name", user.name, limits.names, limits),
        *(text for group in user.groups for text in _problems_of("group", group, limits.groups, limits)),
    ]


def misnamed(user: User) -> Iterator[tuple[str, str]]:
    """Names and groups that no settings can allow: name or group, and its text for messages."""
    for what, text in (("name", user.name), *(("group", group) for group in user.groups)):
        if not _NAME.fullmatch(text):
            yield what, repr(text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 1]}…")


def _problems_of(what: str, text: str, patterns: Sequence[str], limits: Limits) -> Iterator[str]:
    """The reasons against a name or a group, except its form, which is already reported."""
    if not _NAME.fullmatch(text) or text in limits.allow:
        return
    if text.lower().startswith(_RESERVED) or (what == "name" and text in _SHARED):
        yield f"{what}: wanted one that is not Kubernetes' or kubeadm's own (users.allow names exceptions), found {text}"
    elif not any(fnmatchcase(text, pattern) for pattern in patterns):
        yield f"{what}: wanted {one_of(patterns)} (users.{what}s), found {text}"


def _validity_problems(validity: timedelta, limits: Limits) -> Iterator[str]:
    if validity > limits.max_validity:
        limit = duration_text(limits.max_validity)
        yield f"validity: wanted at most {limit} (users.max_validity), found {duration_text(validity)}"
    elif validity < SHORTEST:
        yield f"validity: wanted at least {duration_text(SHORTEST)}, found {duration_text(validity)}"
