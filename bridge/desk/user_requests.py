"""
A user's request at a CA desk: the policy's table `[users]`, and what speaks against one request (pure).

Nothing can prove who a user is, and a certificate of before proves no right to a group: so the table says what may be,
and a person at the desk says that it is this one's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

from bridge.desk.patterns import CN_OID, LONGEST_SHOWN, MASTERS, O_OID, one_of, some
from bridge.errors import SettingsProblem
from bridge.pki.bundle import BundledRequest
from bridge.pki.certificates import attributes
from bridge.pki.csr import algorithm_name
from bridge.specs import USER
from bridge.users import user_rules
from bridge.users.user_rules import Limits, User
from bridge.words import one_line


@dataclass(frozen=True, kw_only=True)
class UserRules:
    """Table `[users]`: kubeconfigs for people and machines; without it the desk signs none."""

    groups: tuple[str, ...] = ()  #: O values that may be asked for, `*` and `?` as in a shell.
    names: tuple[str, ...] = ("*",)  #: CNs, the same.
    allow: tuple[str, ...] = ()  #: Of Kubernetes' and kubeadm's own (`kubeadm:cluster-admins`), those that may be.
    max_validity: timedelta = timedelta(hours=24)

    def problems(self) -> Iterator[SettingsProblem]:
        """Names and groups that no user may have by a bundle."""
        for key in ("groups", "allow"):
            if MASTERS in getattr(self, key):
                wanted = "no group that no RBAC rule can hold back; kubeadm:cluster-admins is a binding"
                yield SettingsProblem(key, wanted, MASTERS)

    @property
    def limits(self) -> Limits:
        """The limits, as for `kubeconfig user` on a node."""
        return Limits(groups=self.groups, allow=self.allow, max_validity=self.max_validity, names=self.names)


def problems(request: BundledRequest, rules: UserRules | None, keys: Sequence[str], *, waived: bool) -> Iterator[str]:
    """
    Problems of a request whose name is `user`.

    Args:
        request: All parts of its CSR can be read.
        rules: The policy's; None: it has no such table.
        keys: Kinds that the policy allows.
        waived: A person, or the policy, does without a proof.
    """
    if rules is None:
        yield "user: wanted a table [users] in the policy, which says who may be, found none"
        return
    if request.replaces is not None or request.proof is not None:
        yield "proof: wanted none, since nothing proves who a user is, found one"
    elif not waived:
        yield (
            "proof: nothing proves who a user is: after a look at name, groups and fingerprint, "
            f"`ca-bridge sign --without-proof {USER.name}`"
        )
    if request.authority != USER.authority.name:
        yield f"authority: wanted {USER.authority.name} for a user, found {request.authority}"
    if request.ekus != USER.ekus:
        found = ", ".join(sorted(eku.label for eku in request.ekus))
        yield f"EKU: wanted {', '.join(sorted(eku.label for eku in USER.ekus))}, found {found}"
    yield from _csr_problems(request, keys)
    yield from _subject_problems(request, rules)


def _csr_problems(request: BundledRequest, keys: Sequence[str]) -> Iterator[str]:
    csr = request.csr
    if (key := algorithm_name(csr.public_key())) not in keys:
        yield f"key: wanted {one_of(keys)}, found {key}"
    if not csr.is_signature_valid:
        yield "CSR: wanted one that is signed with its own key, found another signature"
    if asked := [one.oid.dotted_string for one in csr.extensions]:
        yield f"CSR: wanted one that asks for no extension, found {', '.join(asked)}"


def _subject_problems(request: BundledRequest, rules: UserRules) -> Iterator[str]:
    found = attributes(request.csr.subject)
    names = [value for oid, value in found if oid == CN_OID]
    groups = [value for oid, value in found if oid == O_OID]
    if others := [f"{oid}={one_line(value, LONGEST_SHOWN)}" for oid, value in found if oid not in (CN_OID, O_OID)]:
        yield f"subject: wanted CN and O alone, found {some(others)}"
    if len(names) != 1 or len(set(groups)) != len(groups):
        yield f"subject: wanted one CN, and each group once, found {some([*names, *groups]) or 'neither'}"
        return
    yield from user_rules.problems(User(name=names[0], groups=tuple(groups)), request.validity, rules.limits)
