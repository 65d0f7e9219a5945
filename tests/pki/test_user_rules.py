"""Names, groups and lifetimes of users' certificates: which pass, and what is said of the others."""

from __future__ import annotations

from datetime import timedelta

import pytest

from bridge.pki.user_rules import SHORTEST, Limits, User, problems
from bridge.words import one_line

_DAY = timedelta(days=1)
_LIMITS = Limits(groups=("dev-*", "ops"), allow=("system:masters", "kubeadm:x"), max_validity=_DAY, names=("a*", "b*"))


@pytest.mark.parametrize(
    ("user", "validity"),
    [
        (User(name="alice"), _DAY),
        (User(name="a" * 64, groups=("dev-a", "ops", "dev-b")), SHORTEST),
        (User(name="bob@corp.example", groups=("system:masters",)), timedelta(hours=1)),
        (User(name="kubeadm:x"), _DAY),
        (User(name="a._@:/+-9"), _DAY),
    ],
)
def test_what_the_limits_allow_passes(user: User, validity: timedelta) -> None:
    """There is no reason against a user within the limits; a reserved name or group passes if it is listed."""
    assert problems(user, validity, _LIMITS) == []


_FORM = "wanted at most 64 letters, digits and ._@:/+-, a letter or digit first, found"
_OWN = "wanted one that is not Kubernetes' or kubeadm's own (users.allow names exceptions), found"


@pytest.mark.parametrize(
    ("name", "groups", "validity", "reason"),
    [
        ("", (), _DAY, f"name: {_FORM} ''"),
        ("a" * 65, (), _DAY, f"name: {_FORM} '{'a' * 65}'"),
        ("a" * 90, (), _DAY, f"name: {_FORM} {one_line('a' * 90, 80)!r}"),
        ("alice", ("b" * 90,), _DAY, f"group: {_FORM} {one_line('b' * 90, 80)!r}"),
        ("-alice", (), _DAY, f"name: {_FORM} '-alice'"),
        ("al ice", (), _DAY, f"name: {_FORM} 'al ice'"),
        ("a\n", (), _DAY, f"name: {_FORM} 'a\\n'"),
        ("alice", ("ops ",), _DAY, f"group: {_FORM} 'ops '"),
        ("älice", (), _DAY, f"name: {_FORM} 'älice'"),
        ("system:node:x", (), _DAY, f"name: {_OWN} system:node:x"),
        ("System:admin", (), _DAY, f"name: {_OWN} System:admin"),
        ("kubeadm:y", (), _DAY, f"name: {_OWN} kubeadm:y"),
        ("kubernetes-admin", (), _DAY, f"name: {_OWN} kubernetes-admin"),
        ("carol", (), _DAY, "name: wanted a* or b* (users.names), found carol"),
        ("alice", ("x y",), _DAY, f"group: {_FORM} 'x y'"),
        ("alice", ("ops", "system:nodes"), _DAY, f"group: {_OWN} system:nodes"),
        ("alice", ("dev-a", "DEV-a"), _DAY, "group: wanted dev-* or ops (users.groups), found DEV-a"),
        ("alice", (), _DAY + timedelta(seconds=1), "validity: wanted at most 1d (users.max_validity), found"),
        ("alice", (), SHORTEST - timedelta(seconds=1), "validity: wanted at least 10m, found"),
    ],
)  # fmt: skip
def test_each_rule_has_its_reason(name: str, groups: tuple[str, ...], validity: timedelta, reason: str) -> None:
    """What is against a user is said once, with what was wanted and found."""
    found = problems(User(name=name, groups=groups), validity, _LIMITS)
    assert len(found) == 1
    assert found[0].startswith(reason), found


def test_all_reasons_are_said() -> None:
    """Name, each group, and lifetime have a reason of their own; where nothing is allowed the reason says none."""
    none = Limits(groups=(), allow=(), max_validity=_DAY, names=())
    found = problems(User(name="alice", groups=("x", "y")), 2 * _DAY, none)
    assert [one.partition(":")[0] for one in found] == ["name", "group", "group", "validity"]
    assert found[0] == "name: wanted none (users.names), found alice"
    assert found[2] == "group: wanted none (users.groups), found y"


def test_a_name_that_can_t_be_a_group_is_no_exception_for_one() -> None:
    """kubeadm's own users are no groups: as a group such a name is judged by the patterns."""
    limits = Limits(groups=("kubernetes-*",), allow=(), max_validity=_DAY)
    assert problems(User(name="alice", groups=("kubernetes-admin",)), _DAY, limits) == []
