"""
Frozen dataclasses for what a night with nothing due loads (the row of `renew` with nothing due in docs/evidence/numbers.md).

`dataclasses` compiles six methods for each class and loads `inspect`, which takes a quarter of such a night: a record has
the same methods, written once here. To all others it is a dataclass: `dataclasses.fields`, `replace` and `asdict` take it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, dataclass_transform, overload

if TYPE_CHECKING:
    import dataclasses

T = TypeVar("T")

_MISSING: Any = object()


class Field:
    """One field of a record, or of a dataclass."""

    __slots__ = ("default", "default_factory", "is_shown", "metadata", "name")

    def __init__(self, default: Any, default_factory: Callable[[], Any] | None, *, is_shown: bool = True) -> None:
        self.name = ""
        self.default = default
        self.default_factory = default_factory
        self.is_shown = is_shown  #: In the record's text.
        self.metadata: Mapping[Any, Any] = {}

    @property
    def is_required(self) -> bool:
        """Whether it has no default."""
        return self.default is _MISSING and self.default_factory is None


def field(*, default_factory: Callable[[], Any] | None = None, repr: bool = True) -> Any:  # noqa: A002 (its name there)
    """As `dataclasses.field`."""
    return Field(_MISSING, default_factory, is_shown=repr)


@overload
def record(kind: type[T], /) -> type[T]: ...
@overload
def record(*, kw_only: bool) -> Callable[[type[T]], type[T]]: ...
@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def record(kind: type[T] | None = None, /, *, kw_only: bool = False) -> Any:
    """Make a class a frozen dataclass, as `dataclasses.dataclass` does."""
    return (lambda later: _made(later, kw_only=kw_only)) if kind is None else _made(kind, kw_only=kw_only)


def _made(kind: type[T], *, kw_only: bool) -> type[T]:
    found = []
    for name, text in kind.__annotations__.items():
        if text.startswith("ClassVar"):
            continue
        given = kind.__dict__.get(name, _MISSING)
        one = given if type(given) is Field else Field(given, None)
        if one is given:
            delattr(kind, name)
        one.name = name
        found.append(one)
    methods: dict[str, Any] = {
        "__init__": _initializer(kind.__qualname__, found, () if kw_only else tuple(one.name for one in found)),
        "__repr__": _repr,
        "__eq__": _eq,
    }
    for name, method in methods.items():
        if name not in kind.__dict__:
            setattr(kind, name, method)
    if kind.__dict__.get("__hash__") is None:
        kind.__hash__ = _hash  # type: ignore[method-assign]
    forced: dict[str, Any] = {
        "__setattr__": _frozen,
        "__delattr__": _frozen,
        "__match_args__": () if kw_only else tuple(one.name for one in found),
        "__record__": tuple(found),
        "__dataclass_fields__": _Dataclass("__dataclass_fields__", kw_only=kw_only),
        "__dataclass_params__": _Dataclass("__dataclass_params__", kw_only=kw_only),
    }
    for name, value in forced.items():
        setattr(kind, name, value)
    return kind


def _initializer(owner: str, found: list[Field], positional: tuple[str, ...]) -> Callable[..., None]:
    put = object.__setattr__

    def init(self: Any, /, *args: Any, **given: Any) -> None:
        if len(args) > len(positional):
            raise TypeError(f"{owner}() takes {len(positional)} positional arguments, {len(args)} were given")
        for name, value in zip(positional, args, strict=False):
            if name in given:
                raise TypeError(f"{owner}() got multiple values for argument {name!r}")
            given[name] = value
        for one in found:
            if one.name in given:
                value = given.pop(one.name)
            elif one.default_factory is not None:
                value = one.default_factory()
            elif one.default is _MISSING:
                raise TypeError(f"{owner}() missing a required argument: {one.name!r}")
            else:
                value = one.default
            put(self, one.name, value)
        if given:
            raise TypeError(f"{owner}() got an unexpected keyword argument {next(iter(given))!r}")

    return init


def _repr(self: Any) -> str:
    shown = ", ".join(f"{one.name}={getattr(self, one.name)!r}" for one in self.__record__ if one.is_shown)
    return f"{type(self).__qualname__}({shown})"


def _values(one: Any) -> tuple[Any, ...]:
    return tuple(getattr(one, each.name) for each in one.__record__)


def _eq(self: Any, other: object) -> Any:
    return _values(self) == _values(other) if type(other) is type(self) else NotImplemented


def _hash(self: Any) -> int:
    return hash(_values(self))


def _frozen(_: Any, name: str, *__: object) -> None:
    from dataclasses import FrozenInstanceError  # noqa: PLC0415 (see above)

    raise FrozenInstanceError(f"cannot assign to field {name!r}")


class _Dataclass:
    """What `dataclasses` looks for in a class, made when it looks."""

    def __init__(self, name: str, *, kw_only: bool) -> None:
        self._name = name
        self._kw_only = kw_only

    def __get__(self, instance: object, owner: type[Any]) -> Any:
        import dataclasses  # noqa: PLC0415 (see above)

        kind: Any = next(one for one in owner.__mro__ if "__record__" in one.__dict__)
        twin = dataclasses.make_dataclass(
            kind.__name__,
            [(one.name, kind.__annotations__[one.name], _dataclass_field(one)) for one in kind.__record__],
            frozen=True,
            kw_only=self._kw_only,
        )
        made = getattr(twin, self._name)
        setattr(kind, self._name, made)
        return made


def _dataclass_field(one: Field) -> dataclasses.Field[Any]:
    import dataclasses  # noqa: PLC0415 (see above)

    found: Any = dataclasses.field(repr=one.is_shown)
    if one.default_factory is not None:
        found.default_factory = one.default_factory
    elif one.default is not _MISSING:
        found.default = one.default
    return found  # type: ignore[no-any-return]


def is_dataclass(kind: object) -> bool:
    """Whether it is a dataclass, or a record."""
    return hasattr(kind, "__record__") or hasattr(kind, "__dataclass_fields__")


def fields(kind: Any) -> tuple[Field, ...]:
    """The fields of a dataclass, or a record."""
    if hasattr(kind, "__record__"):
        return kind.__record__  # type: ignore[no-any-return]
    import dataclasses  # noqa: PLC0415 (see above)

    none, found = dataclasses.MISSING, []
    for one in dataclasses.fields(kind):
        factory: Any = None if one.default_factory is none else one.default_factory
        ours = Field(_MISSING if one.default is none else one.default, factory)
        ours.name, ours.metadata = one.name, one.metadata
        found.append(ours)
    return tuple(found)


def replace(one: T, **changes: Any) -> T:
    """As `dataclasses.replace`, of a record."""
    known: Any = one
    values = {each.name: getattr(one, each.name) for each in known.__record__}
    return type(one)(**(values | changes))
