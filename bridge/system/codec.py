"""
JSON of all state files, to and from dataclasses.

A field's key is its name, with these exceptions: `csr_pem: bytes` is the text `csr`, `validity: timedelta` is the
number `validitySeconds`, and `named("key")` gives another key. Reading is strict: a missing, unknown or mistyped field
is an error that names it and never repeats a value, which may be a key.
"""

from __future__ import annotations

import types
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from dataclasses import Field, fields, is_dataclass
from datetime import datetime, timedelta
from enum import Enum
from functools import cache
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from cryptography import x509

from bridge.contract import Issued
from bridge.pki.certificates import load_pem_certificates, pem
from bridge.specs import EKU, SPECS, USER, CertificateSpec, is_pair_name, pair_spec

T = TypeVar("T")

_KEY, _LEFT_OUT, _PEM = "key", "left out", "_pem"


class CodecError(ValueError):
    """A document does not match its type; the message names the field, and no value."""


def named(key: str) -> Mapping[str, str]:
    """Metadata of a field whose JSON key differs from its name."""
    return {_KEY: key}


def left_out() -> Mapping[str, bool]:
    """Metadata of a field whose key is omitted when it is None."""
    return {_LEFT_OUT: True}


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise ValueError("without a time zone")
    return time


def _certificates(texts: list[str]) -> Issued:
    leaf, *intermediates = load_pem_certificates("".join(texts).encode())
    return Issued(leaf=leaf, intermediates=tuple(intermediates))


def _spec_to_json(spec: CertificateSpec) -> str | dict[str, Any]:
    """The name; for a further pair also its CA and usages, since the settings may have changed when this is read."""
    if not is_pair_name(spec.name):
        return spec.name
    return {"name": spec.name, "authority": spec.authority.name, "ekus": sorted(eku.value for eku in spec.ekus)}


def _spec_from_json(value: Any) -> CertificateSpec:
    if isinstance(value, str):
        return USER if value == USER.name else SPECS[value]
    return pair_spec(value["name"], value["authority"], map(EKU, value["ekus"]))


#: How values of types that JSON lacks are written and read.
_FORMS: Mapping[object, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    datetime: (datetime.isoformat, _time),
    timedelta: (lambda value: int(value.total_seconds()), lambda value: timedelta(seconds=value)),
    bytes: (lambda value: b64encode(value).decode(), lambda value: b64decode(value, validate=True)),
    x509.Certificate: (lambda value: pem(value).decode(), lambda value: _certificates([value]).leaf),
    Issued: (
        lambda value: [pem(certificate).decode() for certificate in (value.leaf, *value.intermediates)],
        _certificates,
    ),
    CertificateSpec: (_spec_to_json, _spec_from_json),
}


def to_json(value: Any, time: Callable[[datetime], str] = datetime.isoformat) -> Any:
    """Turn a value into types that `json.dumps` accepts; `time` says how times are written."""
    if value is None or isinstance(value, Enum | int | float | str):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, datetime):
        return time(value)
    form = next((form for known, form in _FORMS.items() if isinstance(value, cast("type", known))), None)
    if form is not None:
        return form[0](value)
    if isinstance(value, Mapping):
        return {to_json(key): to_json(item, time) for key, item in value.items()}
    if isinstance(value, tuple | list | frozenset):
        return [to_json(item, time) for item in (sorted(value) if isinstance(value, frozenset) else value)]
    document = {}
    for field, key, _ in _fields(value.__class__):
        item = getattr(value, field.name)
        if item is None and _LEFT_OUT in field.metadata:
            continue
        document[key] = item.decode() if item is not None and field.name.endswith(_PEM) else to_json(item, time)
    return document


def from_json(kind: type[T], value: Any, where: str = "") -> T:
    """Read a value of a type; a CodecError names what it found instead."""
    try:
        return cast("T", _read(kind, value, where))
    except CodecError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, x509.InvalidVersion):
        wanted = getattr(kind, "__name__", str(kind))
        raise CodecError(f"{where or 'document'}: wanted {wanted}, found {type(value).__name__}") from None


@cache
def _fields(kind: type) -> tuple[tuple[Field[Any], str, Any], ...]:
    """Each field of a dataclass, with its key and type."""
    hints, found = get_type_hints(kind), []
    for field in fields(kind):
        key = field.name.removesuffix(_PEM) + ("Seconds" if hints[field.name] is timedelta else "")
        found.append((field, field.metadata.get(_KEY, key), hints[field.name]))
    return tuple(found)


def _read(kind: Any, value: Any, where: str) -> Any:
    if get_origin(kind) is not None:
        return _read_generic(get_origin(kind), get_args(kind), value, where)
    if kind in _FORMS:
        return _FORMS[kind][1](value)
    if is_dataclass(kind):
        return _read_fields(cast("type", kind), value, where)
    if issubclass(kind, Enum):
        return kind(value)
    if type(value) is kind or (kind is float and type(value) is int):
        return value
    raise TypeError


def _read_generic(origin: Any, inner: tuple[Any, ...], value: Any, where: str) -> Any:
    if origin is Literal:
        return inner[inner.index(value)]
    if origin is types.UnionType:  # only `X | None` occurs
        return None if value is None else from_json(inner[0], value, where)
    if issubclass(origin, Mapping):
        return {from_json(inner[0], key): from_json(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    if not isinstance(value, list):
        raise TypeError
    return origin(from_json(inner[0], item, f"{where}[{number}]") for number, item in enumerate(value))


def _read_fields(kind: type, document: Any, where: str) -> Any:
    known, values = _fields(kind), {}
    if more := document.keys() - {key for _, key, _ in known}:
        raise CodecError(f"{where or 'document'}: wanted a {kind.__name__}, found {len(more)} unknown keys")
    for field, key, own in known:
        place = f"{where}.{key}".lstrip(".")
        if key not in document and _LEFT_OUT in field.metadata:
            continue
        if key not in document:
            raise CodecError(f"{place}: the value is missing")
        if field.name.endswith(_PEM) and document[key] is not None:
            values[field.name] = from_json(str, document[key], place).encode()
        else:
            values[field.name] = from_json(own, document[key], place)
    return kind(**values)


# --- Prometheus' text format, version 0.0.4 ----------------------------------------------------------------------------
