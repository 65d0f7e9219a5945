"""
The settings: their tables, and how they are read and checked.

A TOML table is read into a dataclass whose fields are the keys: strictly, with types, and with all problems and their
lines. `tables` has the dataclasses of the settings file; a CA's backend, a desk and the gateway have their own.
"""

from __future__ import annotations

import ipaddress
import re
import shlex
import tomllib
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from datetime import timedelta
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

from bridge.errors import SettingsError, SettingsProblem
from bridge.pki.expiry import parse_duration
from bridge.secret import GIVEN, Secret
from bridge.words import has_controls, name_found

T = TypeVar("T")
Key = tuple[str, ...]

_LONGEST_FOUND = 60
_ADDRESS, _LAST_PORT = r"(\[[0-9a-f:.]+\]|[^\s:/\[\]]+):([0-9]{1,5})", 65535
#: The longest text in which keys' lines are found, since a multi-line value is parsed again at each of its lines.
_LONGEST_WITH_LINES = 100_000
#: The last line of a multi-line value has one of them.
_ENDS = ("]", '"""', "'''")
_SECRET_KINDS = ("file", "env", "credential")


#: Field types of a dataclass, cached since an inventory has thousands of tables of one type.
_hints: Callable[[Any], dict[str, Any]] = cache(typing.get_type_hints)


class Source:
    """A TOML text that can find the line of a key."""

    def __init__(self, file: Path | None, text: str) -> None:
        self.file = file
        self._text = text

    def line(self, key: Key) -> int | None:
        """The line (from 1) of a key or table, or of the nearest table above it; of equal ones the first."""
        above = (key[:length] for length in range(len(key), 0, -1))
        return next((self._lines[key] for key in above if key in self._lines), None)

    @cached_property
    def _lines(self) -> Mapping[Key, int]:
        lines: dict[Key, int] = {}
        table: Key | None = ()
        for number, statement, document in _statements(self._text):
            is_header = statement.startswith("[")
            keys = list(_keys(document, () if is_header else table))
            for key in keys:
                lines.setdefault(key, number)
            if is_header:  # tables in a list have no key
                table = None if statement.startswith("[[") else keys[-1]
        return lines

    def problem(self, key: Key, wanted: str, found: str) -> SettingsProblem:
        """A problem with the file's name and the key's line."""
        return SettingsProblem(".".join(key), wanted, found, self.file, self.line(key))


def _statements(text: str) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    """Each statement: its first line, its text, and its values when parsed alone."""
    statement, begin = "", 1
    for number, line in enumerate(text.split("\n"), 1):
        begin = begin if statement else number
        statement = f"{statement}{line}\n".lstrip()
        if number == begin or any(end in line for end in _ENDS):
            try:
                document = tomllib.loads(statement)
            except tomllib.TOMLDecodeError:
                continue  # inside a value of several lines
            yield begin, statement, document
            statement = ""


def _keys(value: Any, above: Key | None) -> Iterator[Key]:
    """All keys in a value that is a table, each after its parent key."""
    if isinstance(value, dict) and above is not None:
        for name, inner in value.items():
            yield (*above, name)
            yield from _keys(inner, (*above, name))


def opened(text: str, file: Path | None) -> tuple[Reader, dict[str, Any]]:
    """A reader for a TOML text, and the text's tables; a SettingsError if it is not TOML."""
    try:
        document = tomllib.loads(text)
    except RecursionError:
        raise SettingsError([SettingsProblem("", "TOML", "nesting without end", file)]) from None
    except ValueError as e:  # also a number with thousands of digits, which Python does not parse
        # it quotes single characters at most, never a value; a table is a tuple, such as ('restart', 'commands')
        found = re.sub(r"\('([^()]*)',?\)", lambda names: "[" + names[1].replace("', '", ".") + "]", str(e))
        if text.startswith("\ufeff"):
            found = "a byte order mark before it: save the file as UTF-8 without BOM"
        raise SettingsError([SettingsProblem("", "TOML", found, file)], hint=_declared_before(text, str(e))) from None
    return Reader(Source(file, text if len(text) < _LONGEST_WITH_LINES else "")), document


def _declared_before(text: str, message: str) -> str:
    """A hint where a duplicate table or key first occurs, which TOML's parser does not say."""
    named = re.search(r"(?:twice|overwrite).*\(at line (\d+), ", message)
    if named is None:
        return ""
    lines = text.splitlines(keepends=True)
    before, statement = lines[: int(named[1]) - 1], lines[int(named[1]) - 1]
    if not statement.lstrip().startswith("["):
        statement = next((line for line in reversed(before) if line.lstrip().startswith("[")), "") + statement
    try:
        table: Any = tomllib.loads(statement)
    except tomllib.TOMLDecodeError:  # inside a value of several lines
        return ""
    key: Key = ()
    while isinstance(table, dict) and len(table) == 1:
        key, table = (*key, *table), next(iter(table.values()))
    line = Source(None, "".join(before)).line(key)
    return f"line {line} has {'.'.join(key)} already: keep one of the two, or merge them"


class Reader:
    """Reads tables into dataclasses and collects all problems."""

    def __init__(self, source: Source, locate: Callable[[Key], Key] = lambda key: key) -> None:
        """`locate` turns a key as read into the key in the file; they differ in merged tables."""
        self.source = source
        self._locate = locate
        self.problems: list[SettingsProblem] = []

    def add(self, key: Key, wanted: str, found: str) -> None:
        """Record a problem once."""
        problem = self.source.problem(self._locate(key), wanted, found)
        if problem not in self.problems:
            self.problems.append(problem)

    def raise_problems(self) -> None:
        """Raise a SettingsError with all problems, if there are any."""
        if self.problems:
            raise SettingsError(self.sorted_problems())

    def sorted_problems(self) -> list[SettingsProblem]:
        """The problems so far, by line."""
        return sorted(self.problems, key=lambda problem: problem.line or 0)

    def tables(self, document: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Mapping[str, Any]]:
        """The top-level tables; a missing table is empty, an unknown one a problem."""
        for name, value in document.items():
            if name not in names:
                self.add((name,), f"one of {', '.join(names)}", name_found(name, names))
            elif not isinstance(value, dict):
                self.add((name,), "a table", found_text(value))
        return {name: value if isinstance(value := document.get(name), dict) else {} for name in names}

    def read(
        self,
        schema: type[T],
        table: Mapping[str, Any],
        prefix: Key,
        *,
        partial: bool = False,
        given: Mapping[str, Any] | None = None,
    ) -> T | None:
        """An instance of `schema`; None: there was a problem, or a required key is missing from a `partial` table."""
        before = len(self.problems)
        values = self.values(schema, table, prefix)
        all_fields, hints = fields(typing.cast(Any, schema)), _hints(schema)
        required = [f.name for f in all_fields if f.default is MISSING and f.default_factory is MISSING]
        missing = [name for name in required if name not in values]
        for name in () if partial else missing:
            self.add((*prefix, _keys_of(name, hints[name])[0]), _wanted(hints[name]), "nothing")
        if missing or len(self.problems) > before:
            return None
        values |= {f.name: given[f.name] for f in all_fields if given and f.name in given and GIVEN in f.metadata}
        instance = schema(**values)
        problems: list[SettingsProblem] = list(getattr(instance, "problems", tuple)())
        for problem in problems:
            self.add((*prefix, *problem.key.split(".")) if problem.key else prefix, problem.wanted, problem.found)
        return None if problems else instance

    def table(self, schema: type[T], value: object, key: Key, *, given: Mapping[str, Any] | None = None) -> T | None:
        """Like `read`, for a value that has to be a table."""
        if isinstance(value, dict):
            return self.read(schema, value, key, given=given)
        self.add(key, "a table", found_text(value))
        return None

    def each(
        self, schema: type[T], tables: Mapping[str, Any], key: Key, is_name: Callable[[str], bool], wanted: str
    ) -> dict[str, T]:
        """The readable tables below a key, by name; an unreadable name is a problem."""
        for name in tables:
            if not is_name(name):
                self.add((*key, name), wanted, repr(name))
        instances = {name: self.table(schema, table, (*key, name)) for name, table in tables.items() if is_name(name)}
        return {name: instance for name, instance in instances.items() if instance is not None}

    def values(self, schema: type[Any], table: Mapping[str, Any], prefix: Key) -> dict[str, Any]:
        """The values of the given keys, by field; an unreadable value is None and a problem."""
        hints, known = _hints(schema), set()
        values: dict[str, Any] = {}
        for f in fields(schema):
            if GIVEN in f.metadata:
                continue
            keys = _keys_of(f.name, hints[f.name])
            known |= set(keys)
            present = [key for key in keys if key in table]
            if _bare(hints[f.name]) is Secret and f.name in table:
                known.add(f.name)
                self.add((*prefix, f.name), f"{' or '.join(keys)}: secrets are never written here", "a value")
                values[f.name] = None
            elif len(present) > 1:
                self.add((*prefix, present[1]), f"one of {', '.join(keys)}", f"{' and '.join(present)}")
                values[f.name] = None
            elif present:
                values[f.name] = self._value(hints[f.name], table[present[0]], (*prefix, present[0]))
        for name in table:
            if name not in known:
                self.add((*prefix, name), f"one of {', '.join(sorted(known))}", name_found(name, known))
        return values

    def _value(self, hint: Any, value: Any, key: Key) -> Any:
        hint = _bare(hint)
        if is_dataclass(hint) and not hasattr(hint, "from_setting") and hint is not Secret:
            return self.table(typing.cast(type[Any], hint), value, key)
        if typing.get_origin(hint) is dict:
            return self._texts(value, key)
        try:
            return _scalar(hint, value, key)
        except ValueError as e:
            # the value may be the secret itself instead of its source
            self.add(key, str(e), "something else" if hint is Secret else found_text(value))
            return None

    def _texts(self, value: Any, key: Key) -> dict[str, str]:
        if not isinstance(value, dict):
            self.add(key, "a table of texts", found_text(value))
            return {}
        for name, text in value.items():
            if not isinstance(text, str):
                self.add((*key, name), "a text", found_text(text))
        return value


def _bare(hint: Any) -> Any:
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    rest = [part for part in typing.get_args(hint) if part is not type(None)]
    return rest[0] if len(rest) == 1 else Literal[tuple(chain(*map(typing.get_args, rest)))]


def _keys_of(name: str, hint: Any) -> list[str]:
    return [f"{name}_{kind}" for kind in _SECRET_KINDS] if _bare(hint) is Secret else [name]


def _wanted(hint: Any) -> str:
    """A description of the wanted value of a missing key."""
    bare = _bare(hint)
    if typing.get_origin(bare) is Literal:
        return f"one of {', '.join(map(repr, typing.get_args(bare)))}"
    return {Path: "an absolute path", timedelta: "a duration", Secret: "where the secret is"}.get(bare, "a value")


def _scalar(hint: Any, value: Any, key: Key) -> Any:
    """Convert a value to this type; a ValueError says what was wanted."""
    if hasattr(hint, "from_setting"):
        return hint.from_setting(value)
    if hint is timedelta:
        return parse_duration(value)
    if hint is bool or hint is int:
        if type(value) is not hint:  # True is an int, too
            raise ValueError("true or false" if hint is bool else "a whole number")
        return value
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError("a list of texts")
        return tuple(value)
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise ValueError(_wanted(hint))
        return value
    return _text(hint, value, key)


def _text(hint: Any, value: Any, key: Key) -> Any:
    if not isinstance(value, str) or not value:
        raise ValueError("a text")
    if hint is Secret:
        kind = key[-1].rpartition("_")[2]
        if kind == "env" and not re.fullmatch(r"[A-Za-z_{][A-Za-z0-9_{}]*", value):  # it may be a pattern with {usage}
            raise ValueError("the name of an environment variable")
        return Secret(kind, str(_absolute(value)) if kind == "file" else value)
    return _absolute(value) if hint is Path else value


def _absolute(value: str) -> Path:
    if not value.startswith("/"):
        raise ValueError("an absolute path")
    if has_controls(value):  # they could become lines in units, crontabs and scripts
        raise ValueError("an absolute path without control characters")
    return Path(value)


def found_text(value: object) -> str:
    """A short description of a found value; `nothing` for a missing key."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a table"
    text = str(value).lower() if isinstance(value, bool) else repr(value)  # as TOML writes it
    return text if len(text) <= _LONGEST_FOUND else f"{text[:_LONGEST_FOUND]}…"


def command_words(command: str) -> list[str]:
    """Split a command into words; empty for a text that no shell accepts."""
    try:
        return shlex.split(command)
    except ValueError:
        return []


def address_of(text: str) -> tuple[str, int] | None:
    """Host and port of a text such as `127.0.0.1:9880`; None: it is another text."""
    match = re.fullmatch(_ADDRESS, text)
    if match is None or int(match[2]) > _LAST_PORT:
        return None
    return match[1].strip("[]"), int(match[2])


def network_of(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    """A network such as `10.0.0.0/8`, or of one address; None: it is another text."""
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        return None
