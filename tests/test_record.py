"""A record is a dataclass in all that the program uses of one."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from bridge import record as records
from bridge.record import field, record, replace

Makers = tuple[Callable[..., Any], Callable[..., Any]]


@record
class Point:
    """Positional."""

    x: int
    y: int = 2
    KINDS: ClassVar[tuple[str, ...]] = ("a", "b")


@record(kw_only=True)
class Named:
    """With all that a field may have, by name alone."""

    name: str
    many: list[int] = field(default_factory=list)
    secret: str = field(repr=False)

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class PointTwin:
    """The same by `dataclasses`."""

    x: int
    y: int = 2
    KINDS: ClassVar[tuple[str, ...]] = ("a", "b")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedTwin:
    """The same by `dataclasses`."""

    name: str
    many: list[int] = dataclasses.field(default_factory=list)
    secret: str = dataclasses.field(repr=False)

    def __str__(self) -> str:
        return self.name


BOTH: list[Makers] = [(Point, PointTwin), (Named, NamedTwin)]


@pytest.mark.parametrize(
    ("number", "args", "named"),
    [
        (0, (1,), {}),
        (0, (1, 3), {}),
        (0, (), {"y": 1, "x": 2}),
        (0, (1,), {"y": 5}),
        (1, (), {"name": "n", "secret": "s"}),
        (1, (), {"name": "n", "many": [1], "secret": "s"}),
    ],
)
def test_what_is_made_is_the_same(number: int, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Values, text, equality and hash are those of the dataclass of the same fields."""
    ours, theirs = (kind(*args, **named) for kind in BOTH[number])
    assert repr(ours) == repr(theirs).replace("Twin(", "(")
    assert str(ours) == str(theirs).replace("Twin(", "(")
    assert dataclasses.asdict(ours) == dataclasses.asdict(theirs)
    assert ours == BOTH[number][0](*args, **named)
    assert ours != theirs
    assert "s'" not in repr(ours).replace("many=[", "")
    if number == 0:
        assert hash(ours) == hash(theirs)
    assert ours == copy.copy(ours) == copy.deepcopy(ours) == pickle.loads(pickle.dumps(ours))  # noqa: S301 (made here)


@pytest.mark.parametrize(
    ("number", "args", "named"),
    [
        (0, (), {}),
        (0, (1, 2, 3), {}),
        (0, (1,), {"x": 2}),
        (0, (1,), {"z": 2}),
        (1, ("n",), {"secret": "s"}),
        (1, (), {"name": "n"}),
    ],
)
def test_wrong_arguments(number: int, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Both refuse the same: one missing, one too many, one twice, an unknown one, a positional one by name alone."""
    for kind in BOTH[number]:
        with pytest.raises(TypeError):
            kind(*args, **named)


def test_it_is_frozen() -> None:
    """No field is changed, deleted or added."""
    one: Any = Point(1)
    for name in ("x", "new"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(one, name, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        del one.x
    assert one == Point(1)


def test_each_has_a_default_of_its_own() -> None:
    """A list that a factory makes belongs to one record."""
    first, second = (Named(name="n", secret="s") for _ in range(2))
    first.many.append(1)
    assert second.many == []


def test_others_are_not_hashed() -> None:
    """One with a list in it has no hash, as with `dataclasses`."""
    for kind in BOTH[1]:
        with pytest.raises(TypeError):
            hash(kind(name="n", secret="s"))


@pytest.mark.parametrize("number", [0, 1])
def test_what_dataclasses_see(number: int) -> None:
    """Names, types, defaults and kinds of fields; and `replace`, theirs and ours."""
    ours, theirs = BOTH[number]
    described = [
        [(f.name, f.type, f.default, f.default_factory, f.repr, f.kw_only) for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
        for kind in (ours, theirs)
    ]
    assert described[0] == described[1]
    assert dataclasses.is_dataclass(ours)
    assert records.is_dataclass(ours)
    assert records.is_dataclass(theirs)
    assert not records.is_dataclass(int)
    assert [f.name for f in records.fields(ours)] == [f.name for f in records.fields(theirs)]
    assert [f.is_required for f in records.fields(ours)] == [f.is_required for f in records.fields(theirs)]


def test_replaced() -> None:
    """A copy with other values; an unknown name is refused."""
    assert replace(Point(1), y=3) == dataclasses.replace(Point(1), y=3) == Point(1, 3)
    with pytest.raises(TypeError):
        replace(Point(1), z=3)


def test_matched() -> None:
    """Positional fields can be matched, and the constants of the class are none."""
    match Point(1, 5):
        case Point(x, y):
            assert (x, y) == (1, 5)
    assert Point.KINDS == ("a", "b")
