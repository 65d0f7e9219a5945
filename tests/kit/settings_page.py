"""The reference of the settings: keys, types, defaults and meanings as the dataclasses of the tables have them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
import types
from collections.abc import Iterable, Iterator
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from bridge.ca import registry
from bridge.contract import GIVEN, BackendSettings, Secret
from bridge.pki.expiry import duration_text
from bridge.settings.load import parse
from bridge.settings.pair_tables import PairFiles, PairSettings
from bridge.settings.tables import AuthoritySettings, CertificateSettings


def meanings(schema: type[Any]) -> dict[str, str]:
    """By field: what its comment `#:` beside or above it says."""
    found = {}
    for one in reversed([one for one in schema.__mro__ if dataclasses.is_dataclass(one)]):
        text = textwrap.dedent(inspect.getsource(one))
        [tree] = ast.parse(text).body
        assert isinstance(tree, ast.ClassDef)
        for node in tree.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found[node.target.id] = _comment(text.splitlines(), node.lineno - 1)
    return found


def _comment(lines: list[str], number: int) -> str:
    beside = lines[number].partition("  #: ")[2]
    above: list[str] = []
    while not beside and lines[number - 1].strip().startswith("#: "):
        number -= 1
        above.insert(0, lines[number].strip().removeprefix("#: "))
    return beside or " ".join(above)


_SIMPLE = {str: "text", bool: "`true` or `false`", int: "a number", Path: "a path", timedelta: "a duration"}


def takes(kind: Any) -> str:
    """What may be written for a type, in words or as TOML."""
    if isinstance(kind, types.UnionType) or get_origin(kind) is Union:
        return ", ".join(takes(one) for one in get_args(kind) if one is not types.NoneType)
    if get_origin(kind) is Literal:
        return ", ".join(f"`{json.dumps(one)}`" for one in get_args(kind))
    if hasattr(kind, "from_setting"):
        sentence = (inspect.getdoc(kind.from_setting) or "").rstrip(".")
        return f"{sentence[0].lower()}{sentence[1:]}"
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return ", ".join(f"`{json.dumps(str(one))}`" for one in kind)
    return _SIMPLE.get(kind) or {tuple: "a list of texts", dict: "a table of texts"}[get_origin(kind)]


def default(field: dataclasses.Field[Any]) -> str:
    """As TOML; in words where there is none."""
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return "required"
    if isinstance(value, (bool, int)):
        return f"`{json.dumps(value)}`"
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and not any(dataclasses.astuple(value)):
        return "none"  # and not what it becomes on this machine
    if isinstance(value, tuple) and value:
        return f"`{json.dumps(value)}`"
    text = duration_text(value) if isinstance(value, timedelta) else str(value or "")
    return f"`{json.dumps(text)}`" if text else "none"


def rows(schema: type[Any], prefix: str = "", *, without: frozenset[str] = frozenset()) -> Iterator[tuple[str, ...]]:
    """Key, what it takes, its default, and its meaning."""
    hints, said = get_type_hints(schema), meanings(schema)
    for field in dataclasses.fields(schema):
        name, kind = f"{prefix}{field.name}", hints[field.name]
        inner = [one for one in (kind, *get_args(kind)) if dataclasses.is_dataclass(one) and isinstance(one, type)]
        table = next((one for one in inner if not hasattr(one, "from_setting")), None)
        if GIVEN in field.metadata or field.name in without:
            continue
        if table is Secret:
            yield f"`{name}_file`, `…_env`, `…_credential`", "a secret", default(field), said[field.name]
        elif table:
            yield from rows(table, f"{name}.")
        else:
            yield f"`{name}`", takes(kind), default(field), said[field.name]


def _table(found: Iterable[tuple[str, ...]]) -> str:
    lines = [("key", "takes", "default", "meaning"), ("---",) * 4, *found]
    return "\n".join(f"| {' | '.join(cell.replace('|', f'{chr(92)}|') for cell in row)} |" for row in lines)


def tables() -> Iterator[tuple[str, str, list[tuple[str, ...]]]]:
    """Heading, sentences and rows of each table."""
    empty = parse("")
    for field in dataclasses.fields(empty):
        schema = type(getattr(empty, field.name))
        if dataclasses.is_dataclass(schema):
            yield f"`[{field.name}]`", "", list(rows(schema))
    yield "`[authority.NAME]`", _AUTHORITY, list(rows(AuthoritySettings))
    yield "`[certificate.kubelet-server]`", _CERTIFICATE, list(rows(CertificateSettings))
    yield "`[certificate.NAME]`", _PAIR, list(rows(PairSettings))
    yield "`[certificate.NAME.copies.NAME]`", _COPY, list(rows(PairFiles))
    yield "`[backend.NAME]`", _BACKEND, list(rows(BackendSettings))
    common = frozenset(field.name for field in dataclasses.fields(BackendSettings))
    for name, entry in sorted(registry.installed().items()):
        yield f'`type = "{name}"`', "", list(rows(entry.load().settings_type, without=common))


def page() -> str:
    """All of it, in Markdown."""
    parts = ("\n\n".join(filter(None, (f"## {heading}", text, _table(found)))) for heading, text, found in tables())
    return "\n\n".join((_HEAD, *parts)) + "\n"


_HEAD = """\
# Settings

<!-- written by `python -m tests.test_docs` -->

For operators who look up a key of the settings file.
The file is `/etc/ca-bridge/config.toml`, unless `--config` or `CA_BRIDGE_CONFIG` names another.
`ca-bridge settings init` writes a commented file, `ca-bridge settings check` finds every error in it, and `ca-bridge settings show` prints the values in force.
`settings check` also warns about host names from the examples, and about files and programs that this machine does not have; a warning does not change the exit code.
`config/config.toml` and the other files in `config/` are examples that contain every key; `config/desk/desk-policy.toml` is the example of a CA desk's policy.

A duration is a number with a unit, such as `"90s"`, `"12h"` or `"30d"`.
A path is absolute.
ca-bridge splits a command into words as a shell does, and runs it without a shell.
The file never contains a secret itself: `KEY_file` names a file that contains it, `KEY_env` an environment variable, `KEY_credential` a credential that systemd has loaded."""

_AUTHORITY = """\
One table for each of `ca`, `etcd-ca` and `front-proxy-ca`.
Its other keys belong to the backend, and override the keys in the backend's own table."""

_CERTIFICATE = """\
In the settings, you can set the names of this certificate only; every other kubeadm certificate keeps the names of the certificate that it replaces."""

_PAIR = """\
One table for each [further pair](certificates.md#further-pairs) of files on this node, with a name of your choice."""

_COPY = """\
Another place for the same pair; add as many as you like, each under its own name."""

_BACKEND = """\
One table for each CA service, with a name of your choice; `type` is its kind.
These keys apply to every kind."""
