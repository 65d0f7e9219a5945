"""The package's own `dataclass` beside the standard library's: the same classes, which compare, hash and show alike."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import bridge

Maker = Callable[..., Any]
VALUES = st.one_of(st.integers(0, 2), st.sampled_from(["", "x"]), st.tuples(st.integers(0, 1)))


class Plain:
    """Becomes a dataclass."""

    a: object
    b: object = dataclasses.field(default=0, compare=False)
    c: object = dataclasses.field(default=0, repr=False)


class Empty:
    """Without a field."""


class Own:
    """With texts and hashes of its own."""

    a: object

    def __repr__(self) -> str:
        return "own"

    def __hash__(self) -> int:
        return 7


def both(cls: type, **options: bool) -> list[Any]:
    """The class, made by the library and by us."""
    content = {name: value for name, value in vars(cls).items() if name not in {"__dict__", "__weakref__"}}
    copies = [type(cls.__name__, (), {**content, "__qualname__": cls.__qualname__}) for _ in range(2)]
    return [make(one, **options) for make, one in zip((dataclasses.dataclass, bridge.dataclass), copies, strict=True)]


@pytest.mark.parametrize("options", [{}, {"frozen": True}, {"frozen": True, "kw_only": True}, {"eq": False}])
@given(first=st.tuples(VALUES, VALUES, VALUES), second=st.tuples(VALUES, VALUES, VALUES))
def test_objects_compare_hash_and_show_as_the_librarys(
    options: dict[str, bool], first: tuple[Any, ...], second: tuple[Any, ...]
) -> None:
    """Field by field, those left out that do not count."""
    theirs, ours = (
        [made(**dict(zip("abc", one, strict=True))) for one in (first, second)] for made in both(Plain, **options)
    )
    assert (theirs[0] == theirs[1]) is (ours[0] == ours[1])
    assert ours[0] != theirs[0]  # of another class
    assert [*map(repr, ours)] == [*map(repr, theirs)]
    if options.get("frozen"):
        assert len(set(ours)) == len(set(theirs))
    elif not options:
        with pytest.raises(TypeError, match="unhashable"):
            hash(ours[0])


@pytest.mark.parametrize("cls", [Empty, Own])
def test_what_a_class_has_stays(cls: type) -> None:
    """Its own methods, and no fields at all."""
    theirs, ours = (made(**dict.fromkeys(made.__match_args__, 1)) for made in both(cls, frozen=True))
    assert (repr(ours), hash(ours)) == (repr(theirs), hash(theirs))
    assert ours == copy.copy(ours)


@bridge.dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What a worker process of the desk is sent."""

    a: int
    b: tuple[str, ...] = ()


def test_it_is_a_dataclass_of_the_library() -> None:
    """With slots, pickled, copied and replaced."""
    one = Sent(a=1, b=("x",))
    assert pickle.loads(pickle.dumps(one)) == one == copy.deepcopy(one)  # noqa: S301 (ours)
    assert dataclasses.replace(one, a=2) == Sent(a=2, b=("x",)) != one
    assert [each.name for each in dataclasses.fields(one)] == ["a", "b"]
    assert not hasattr(one, "__dict__")
