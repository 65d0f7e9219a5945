"""
A site's openssl.cnf, as far as it names the files of a CA; nothing else of it is ever used.

The syntax is that of config(5) of OpenSSL. Where a value depends on more than the file and the environment
(quotes, escapes, other files), it is not guessed at: the settings can name the four files themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

_VARIABLE = re.compile(r"\$(?:\{(?P<braces>[^{}]*)\}|\((?P<parentheses>[^()]*)\)|(?P<bare>\w+(?:::\w+)?))", re.ASCII)
_QUOTES = re.compile(r"[\"'`\\]")


class ConfigDoubtError(Exception):
    """A line of an openssl.cnf whose meaning can't be known for sure."""

    def __init__(self, line: int, wanted: str, found: str) -> None:
        self.line, self.wanted, self.found = line, wanted, found
        super().__init__(f"line {line}: wanted {wanted}, found {found}")


@dataclass(frozen=True, slots=True)
class Value:
    """A value with its variables expanded."""

    text: str
    line: int  #: From 1.
    doubt: ConfigDoubtError | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """A parsed file."""

    sections: dict[str, dict[str, Value]] = field(default_factory=lambda: {"default": {}})

    def get(self, section: str, name: str) -> Value | None:
        """
        A value of a section, or else of the part above the first section, which all inherit from.

        Raises:
            ConfigDoubtError: It is there, but what it says is not sure.
        """
        value = self.sections.get(section, {}).get(name) or self.sections["default"].get(name)
        if value and value.doubt:
            raise value.doubt
        return value


def parse_config(text: str, environment: Mapping[str, str]) -> Config:
    """
    Parse a file.

    Raises:
        ConfigDoubtError: Its structure is not sure; a value that is not sure is an error only for who asks for it.
    """
    config, current = Config(), "default"
    for number, line in _logical_lines(text):
        if line.startswith("["):
            name, bracket, rest = line[1:].partition("]")
            if not bracket or rest.strip():
                raise ConfigDoubtError(number, "[section]", repr(line))
            current = name.strip()
            config.sections.setdefault(current, {})
            continue
        if line.startswith((".include", ".pragma")):
            raise ConfigDoubtError(number, "a file that says all by itself, without .include and .pragma", repr(line))
        name, equals, value = map(str.strip, line.partition("="))
        if not equals or not name or re.search(r"\s", name):
            raise ConfigDoubtError(number, "name = value", repr(line))
        section, _, key = name.rpartition("::")
        # a key that is there twice counts from its second line on, as for openssl
        config.sections.setdefault(section or current, {})[key] = _expanded(
            Value(value, number), section or current, config, environment
        )
    return config


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are neither empty nor a comment, with their numbers; a backslash at the end joins the next one."""
    joined, first = "", 0
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        first, line = first or number, line.rstrip("\r")  # noqa: PLW2901
        joined += line
        if line.endswith("\\") and not line.endswith("\\\\"):
            joined = joined[:-1]
            continue
        if content := _without_comment(joined).strip():
            yield first, content
        joined, first = "", 0
    if content := _without_comment(joined).strip():
        yield first, content


def _without_comment(line: str) -> str:
    """A `#` behind a quote or an escape may be part of a value, which then is in doubt anyway."""
    before, _, _ = line.partition("#")
    return line if _QUOTES.search(before) else before


def _expanded(value: Value, section: str, config: Config, environment: Mapping[str, str]) -> Value:
    def lookup(match: re.Match[str]) -> str:
        name = next(filter(None, match.groups()), "")
        where, _, key = name.rpartition("::")
        where = where or section
        known = config.sections.get(where, {}).get(key)
        if not known and where == "ENV" and key in environment:
            return environment[key]
        known = known or config.sections["default"].get(key)
        if not known:
            raise ConfigDoubtError(value.line, f"a value of ${name}", "none")
        if known.doubt:
            raise known.doubt
        return known.text

    doubt = None
    if _QUOTES.search(value.text):
        doubt = ConfigDoubtError(value.line, "a value without quotes and backslashes", repr(value.text))
    elif "$" in _VARIABLE.sub("", value.text):
        doubt = ConfigDoubtError(value.line, "$name, ${name} or $(name)", repr(value.text))
    if doubt:
        return Value(value.text, value.line, doubt)
    try:
        return Value(_VARIABLE.sub(lookup, value.text), value.line)
    except ConfigDoubtError as e:
        return Value(value.text, value.line, e)
