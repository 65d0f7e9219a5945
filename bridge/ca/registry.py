"""Backends, found by entry point and configured by the settings; and the cross certificates that the settings name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from cryptography import x509

from bridge.contract import ENTRY_POINT_GROUP, Backend, BackendSettings
from bridge.errors import BridgeError, Exit, SettingsError, SettingsProblem
from bridge.pki.certificates import load_pem_certificates, name_text, spki
from bridge.settings import Key, Reader
from bridge.settings.tables import RenewalSettings, Settings
from bridge.state.credentials import CredentialFile, own_places
from bridge.system.paths import own_text
from bridge.words import name_found


class DuplicatePluginError(BridgeError):
    """Two installed distributions provide a backend of the same name."""

    exit_code = Exit.USAGE


class BrokenPluginError(BridgeError):
    """An installed distribution names a backend that can't be imported."""

    hint = "reinstall the distribution with all that it needs, for the Python that runs ca-bridge"


@dataclass(frozen=True, slots=True, kw_only=True)
class Configured:
    """A backend as one authority uses it, not opened yet."""

    authority: str
    name: str  #: NAME of its `[backend.NAME]` table.
    type_name: str
    settings: BackendSettings
    backend_type: type[Backend]

    @property
    def label(self) -> str:
        """The name for messages, such as `corp (vault)`."""
        return f"{self.name} ({self.type_name})"

    def open(self) -> Backend:
        """Make the backend (SettingsError: a file that its settings name can't be used)."""
        return self.backend_type.from_settings(self.settings)


def installed() -> dict[str, EntryPoint]:
    """The installed backend types by name."""
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        other = found.setdefault(entry.name, entry)
        if other is not entry and (_distribution(other) != _distribution(entry) or other.value != entry.value):
            raise DuplicatePluginError(
                f"backend type {entry.name}: wanted it from one distribution, "
                f"found it in {_distribution(other)} and {_distribution(entry)}",
                hint="uninstall one of the two",
            )
    return found


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "an unknown distribution"


def configured(settings: Settings, authorities: Iterable[str]) -> dict[str, Configured]:
    """
    The backends of these authorities, by authority; the tables of unused backends are checked, too.

    A SettingsError has all problems of all tables. DuplicatePluginError, BrokenPluginError: a backend can't be loaded.
    """
    (types, problems), result = _types(settings), {}
    for authority, chosen in settings.authorities.items():
        if chosen.backend not in types:
            continue
        keys, reader = merged(settings, authority)
        backend_type = types[chosen.backend]
        read = reader.read(backend_type.settings_type, keys, ("authority", authority), given=_given(settings))
        problems += [problem for problem in reader.problems if problem not in problems]
        if read is not None:
            type_name = str(settings.backends[chosen.backend]["type"])
            result[authority] = Configured(
                authority=authority, name=chosen.backend, type_name=type_name, settings=read, backend_type=backend_type
            )
    problems += _unused(settings, types)
    missing = [settings.source.problem(("authority", a), "a table with the CA's backend", "none")
               for a in authorities if a not in settings.authorities]  # fmt: skip
    if problems or missing:
        hint = "`ca-bridge settings init` writes a commented file" if settings.source.file is None else ""
        raise SettingsError(sorted(problems, key=lambda one: one.line or 0) + missing, hint=hint)
    return {authority: result[authority] for authority in authorities}


def credentials(settings: Settings, backends: Mapping[str, Configured]) -> list[CredentialFile]:
    """The files of all our credentials; `backends`, by authority, are not opened."""
    places = list(own_places(settings))
    for authority, backend in backends.items():
        over = settings.authority_tables.get(authority, {})
        for key, path in backend.settings.credentials():
            table = f"authority.{authority}" if key.partition(".")[0] in over else f"backend.{backend.name}"
            places.append(CredentialFile(f"{table}.{key}", path))
    return list(dict.fromkeys(places))


def _given(settings: Settings) -> dict[str, Any]:
    """The values that the bridge fills into every backend's settings."""
    pairs = tuple(pair.name for pair in settings.node.pairs)
    return {"node": settings.node.node_name, "signed_by": settings.node.desk_key, "pairs": pairs}


def _types(settings: Settings) -> tuple[dict[str, type[Backend]], list[SettingsProblem]]:
    """The type of each `[backend.NAME]` table, and the problems of tables without a known type."""
    entry_points, types, reader = installed(), {}, Reader(settings.source)
    for name, table in settings.backends.items():
        type_name = str(table["type"])
        if type_name in entry_points:
            types[name] = _loaded(entry_points[type_name])
        else:
            wanted = f"an installed backend type: {', '.join(sorted(entry_points)) or 'none is'}"
            reader.add(("backend", name, "type"), wanted, name_found(type_name, entry_points))
    return types, reader.problems


def _loaded(entry: EntryPoint) -> type[Backend]:
    text = f"backend type {entry.name}: wanted to import {entry.value} of {_distribution(entry)}"
    try:
        backend_type = entry.load()
    except Exception as e:
        raise BrokenPluginError(f"{text}, found {type(e).__name__}: {e}") from e
    if not (isinstance(backend_type, type) and issubclass(backend_type, Backend)):
        hint = "`bridge.contract.Backend` is the base class of every backend; tell the plug-in's author"
        raise BrokenPluginError(f"{text}, a class derived from Backend, found {backend_type!r}", hint=hint)
    return backend_type


def that_sets_up(type_name: str) -> type[Backend]:
    """The installed backend type with this name, which must have `setup`."""
    entries = installed()
    if type_name in entries and (backend_type := _loaded(entries[type_name])).can("setup"):
        return backend_type
    able = [name for name, entry in sorted(entries.items()) if _loaded(entry).can("setup")]
    raise SettingsError([SettingsProblem("TYPE", f"one of {', '.join(able)}", repr(type_name))])


def with_names_beside_csr() -> str:
    """The installed backend types that can carry names beside a CSR, for messages."""
    able = [name for name, entry in sorted(installed().items()) if _loaded(entry).can("names_beside_csr")]
    return f"a backend that gives the CA names beside the CSR: {', '.join(able)}"


def keys_so_far(settings: Settings, authority: str, type_name: str) -> dict[str, Any]:
    """The settings of an authority's backend, by field; empty if its backend is not of this type."""
    keys = settings.authorities.get(authority)
    if keys is None or settings.backends[keys.backend].get("type") != type_name:
        return {}
    table, reader = merged(settings, authority)
    values = reader.values(_loaded(installed()[type_name]).settings_type, table, ("authority", authority))
    reader.raise_problems()
    return values


def located(error: SettingsError, settings: Settings, authority: str) -> SettingsError:
    """Add the file and the lines of its keys to a backend's error about its settings."""
    if authority not in settings.authorities:
        return error
    _, reader = merged(settings, authority)
    for problem in error.problems:
        reader.add(("authority", authority, *problem.key.split(".")), problem.wanted, problem.found)
    return SettingsError(reader.problems)


def _unused(settings: Settings, types: Mapping[str, type[Backend]]) -> list[Any]:
    """Problems of backends that no authority uses; keys may be missing, since an authority may add them."""
    used, reader = {a.backend for a in settings.authorities.values()}, Reader(settings.source)
    for name in types.keys() - used:
        table = {k: v for k, v in settings.backends[name].items() if k != "type"}
        reader.read(types[name].settings_type, table, ("backend", name), partial=True, given=_given(settings))
    return reader.problems


def merged(settings: Settings, authority: str) -> tuple[dict[str, Any], Reader]:
    """The keys of an authority's backend as the settings file has them, and a reader that knows their lines."""
    backend, over = settings.authorities[authority].backend, settings.authority_tables[authority]
    table = {key: value for key, value in settings.backends[backend].items() if key != "type"}
    return merge(table, over), Reader(settings.source, _locator(authority, backend, over))


def merge(table: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `table` with the keys of `over` added or replaced, recursively."""
    merged = dict(table)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _locator(authority: str, backend: str, over: Mapping[str, Any]) -> Callable[[Key], Key]:
    """Find a key of the merged table in the file: in the authority's table if it is there, else in the backend's."""

    def locate(key: Key) -> Key:
        below: Any = over
        for part in key[2:]:
            if not isinstance(below, dict) or part not in below:
                return ("backend", backend, *key[2:])
            below = below[part]
        return ("authority", authority, *key[2:])

    return locate


# --- cross certificates: an earlier CA certifies the one that signs now, and each new chain has that certificate ------


def load_cross(path: Path) -> x509.Certificate:
    """Read a cross certificate (SettingsError: no such file, others can change it, or not exactly one certificate)."""
    what = "a cross certificate: the CA's name and key, certified by the CA before it"
    hint = "the administrator of the earlier CA makes it; without it take `cross` out of the settings"
    text = own_text(path, what, hint)
    try:
        certificates = load_pem_certificates(text.encode())
    except ValueError as e:
        raise SettingsError([SettingsProblem("", what, str(e), path)]) from None
    if len(certificates) != 1:
        raise SettingsError([SettingsProblem("", what, f"{len(certificates)} certificates", path)])
    return certificates[0]


def is_cross_long_enough(cross: x509.Certificate, renewal: RenewalSettings, now: datetime) -> bool:
    """Whether a new certificate with this cross certificate behind it would not be due for renewal at once."""
    return cross.not_valid_after_utc - now > renewal.before.of(renewal.validity)


def cross_behind(
    settings: Settings, authority: str, anchor: x509.Certificate, now: datetime
) -> x509.Certificate | None:
    """Return what `cross_of` does; None also if it expires so soon that new certificates would be due at once."""
    cross = cross_of(settings, authority, anchor)
    return cross if cross is not None and is_cross_long_enough(cross, settings.renewal, now) else None


def cross_of(settings: Settings, authority: str, anchor: x509.Certificate) -> x509.Certificate | None:
    """The cross certificate of the CA that signs for an authority; None: the settings name none (SettingsError: a wrong one)."""
    keys = settings.authorities.get(authority)
    if keys is None or keys.cross is None:
        return None
    cross = load_cross(keys.cross)
    if cross.subject != anchor.subject or spki(cross.public_key()) != spki(anchor.public_key()):
        want = f"a cross certificate for {name_text(anchor.subject)} and its key, which signs now"
        raise SettingsError([SettingsProblem("", want, f"one for {name_text(cross.subject)}", keys.cross)])
    return cross
