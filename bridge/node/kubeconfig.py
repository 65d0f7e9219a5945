"""Reads kubeconfigs (keys and tokens only by functions of their own), and edits two values without changing other bytes."""

from __future__ import annotations

import binascii
import json
import re
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TypeVar

import yaml

from bridge.errors import BridgeError
from bridge.node.yamltree import YamlError, YamlNode, document, events, split_bom
from bridge.pki.certificates import has_key_of, load_pem_certificates

_CERTIFICATE = "client-certificate-data"
_KEY = "client-key-data"
_CA = "certificate-authority-data"

_Result = TypeVar("_Result")


class KubeconfigError(BridgeError):
    """A kubeconfig that can't be read, or in which an edit would change more than the two values."""

    hint = "`kubectl --kubeconfig FILE config view --raw --flatten` prints the same content in its plain form"

    def of(self, path: Path) -> KubeconfigError:
        """The same error, prefixed with the file's name."""
        return KubeconfigError(f"{path}: {self}", hint=self.hint.replace("FILE", str(path)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Kubeconfig:
    """The user, server and certificates of a kubeconfig's current context; it holds no key and no token."""

    user: str
    cluster: str
    server: str  #: Empty if it has none.
    tls_server_name: str | None
    ca_data: bytes | None  #: PEM; takes precedence over `ca_file`.
    ca_file: str | None  #: As written, relative to the kubeconfig's directory.
    certificate_data: bytes | None  #: PEM; takes precedence over `certificate_file`.
    certificate_file: str | None
    key_present: bool  #: The key is embedded, which takes precedence over `key_file`.
    key_file: str | None
    token_file: str | None = None  #: A token's file, instead of a client certificate.
    unsupported: str | None = None  #: A key that has another program, a password or a proxy lead to the server.
    not_editable: str | None = None  #: Why `with_credentials` would refuse.
    key_fits: bool | None = None  #: The embedded key is the embedded certificate's; None: the key can't be read.
    has_others: bool = False  #: It has clusters, contexts or users beside the current context's.


def parse(data: bytes) -> Kubeconfig:
    """Read a kubeconfig, without checking embedded PEM, the presence of a client certificate, or files."""
    return _reading(lambda: _parse(document(split_bom(data)[1])))


def key_data(data: bytes) -> bytes | None:
    """The private key (PEM) that is embedded for the current context's user."""
    return _reading(lambda: _data(_Entries.of(document(split_bom(data)[1])).user, _KEY))


def token_text(data: bytes) -> str:
    """The token that is embedded for the current context's user; empty: none."""
    return _reading(lambda: _Entries.of(document(split_bom(data)[1])).user.text_of("token").strip())


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedUser:
    """An entry of `users` with an embedded certificate and key."""

    number: int  #: Its index in `users`.
    name: str
    certificate_pem: bytes
    key_pem: bytes = field(repr=False)


def embedded_users(data: bytes) -> list[EmbeddedUser]:
    """Find the users with embedded credentials, whether or not a context refers to them."""
    return _reading(lambda: list(_embedded_users(document(split_bom(data)[1]))))


def with_users(data: bytes, pairs: Mapping[int, tuple[bytes, bytes]]) -> bytes:
    """Replace these users' certificates and keys (PEM), by index in `users`; see `with_credentials`."""
    return _with(data, lambda root: _values_of_users(root, pairs))


def with_credentials(data: bytes, certificate_pem: bytes, key_pem: bytes) -> bytes:
    """Replace the current user's certificate and key; every other byte stays."""
    parse(data)
    pems = {_CERTIFICATE: certificate_pem, _KEY: key_pem}
    return _with(data, lambda root: [(node, pems[key]) for key, node in _editable_values(root).items()])


def with_ca(data: bytes, pem: bytes) -> bytes:
    """Replace the CA data (PEM) of the current context's cluster, or of the only cluster (as in cluster-info)."""
    return _with(data, lambda root: [(_ca_value(root), pem)])


def with_cas(data: bytes, edit: Callable[[bytes], bytes | None]) -> bytes:
    """Replace the CA data (PEM) of each cluster for which `edit` returns some; every other byte stays."""
    return _with(data, lambda root: list(_edits_of_cas(root, edit)))


def _with(data: bytes, edits: Callable[[YamlNode], Sequence[tuple[YamlNode, bytes]]]) -> bytes:
    """Replace the data of each value that `found` returns; every other byte stays."""

    def edited() -> bytes:
        bom, text = split_bom(data)
        return (bom + _edited(text, edits(document(text)))).encode()

    return _reading(edited)


def _edits_of_cas(root: YamlNode, edit: Callable[[bytes], bytes | None]) -> Iterator[tuple[YamlNode, bytes]]:
    for *_, cluster in _own_entries(root, "clusters", "cluster").values():
        node, pem = _own(cluster, _CA), _data(cluster, _CA)
        if node is not None and pem is not None and (new := edit(pem)) is not None:
            yield node, new


def ca_data(data: bytes) -> bytes | None:
    """The CA data (PEM) of the same cluster as in `with_ca`; None: it has none."""
    return _reading(lambda: _data(_cluster(document(split_bom(data)[1])), _CA))


def _cluster(root: YamlNode) -> YamlNode:
    if root.text_of("current-context"):
        return _Entries.of(root).cluster
    sequence = root.get("clusters")
    entries = [] if sequence is None else list(sequence.items())
    found = entries[0].get("cluster") if len(entries) == 1 else None
    if found is None:
        raise YamlError(f"wanted a current-context, or one entry in clusters, found {len(entries)} entries")
    return found


def _ca_value(root: YamlNode) -> YamlNode:
    cluster = _cluster(root)
    found = cluster.get(_CA)
    if found is None or not cluster.text_of(_CA):
        raise YamlError(f"there is no embedded {_CA} to replace")
    _assert_editable(cluster, found)
    return found


def _edited(text: str, values: Sequence[tuple[YamlNode, bytes]]) -> str:
    """The text with these values (YamlError: read again, it would have another value than these and the old ones)."""
    edited = text
    encoded = {node.place.start: _base64(data) for node, data in values}
    for node, _ in sorted(values, key=lambda value: value[0].place.start, reverse=True):
        start, end = _content(text, node)
        edited = edited[:start] + encoded[node.place.start] + edited[end:]
    wanted = [_meaning(event, encoded) for event in events(text)]
    if wanted != [_meaning(event, {}) for event in events(edited)]:
        raise YamlError("wanted two values of the kubeconfig to change, found that others would too")
    return edited


def with_references(data: bytes, path: str) -> bytes:
    """Replace the embedded certificate and key by references to one file for both; every other byte stays."""
    before = parse(data)
    if before.certificate_file or before.key_file:
        raise KubeconfigError("wanted certificate and key as data alone, found files beside them")
    bom, text = _reading(lambda: split_bom(data))
    values = _reading(lambda: _editable_values(document(text)))
    edited = text
    for key, node in sorted(values.items(), key=lambda entry: entry[1].place.start, reverse=True):
        begin = text.rfind(key, 0, node.place.start)
        between = text[begin + len(key) : node.place.start]
        if begin < 0 or not re.fullmatch(r"[\"']?\s*:\s*", between):
            raise KubeconfigError(f"wanted {key} directly before its value, found something else")
        end = node.place.end
        line_end = "\n" if node.style in ("|", ">") and text[:end].endswith("\n") else ""
        edited = edited[: begin + len(key) - len("-data")] + between + json.dumps(path) + line_end + edited[end:]
    result = (bom + edited).encode()
    after = parse(result)
    named = replace(before, certificate_data=None, key_present=False, certificate_file=path, key_file=path)
    is_named = replace(after, not_editable=None) == replace(named, not_editable=None, key_fits=None)
    if not is_named or _others(text) != _others(edited):
        raise KubeconfigError("wanted two entries of the kubeconfig to change, found that others would too")
    return result


def _others(text: str) -> list[str]:
    """Every scalar except those of the two entries that change."""
    scalars = [event.value for event in events(text) if isinstance(event, yaml.ScalarEvent)]
    ours = {_CERTIFICATE, _KEY, _CERTIFICATE.removesuffix("-data"), _KEY.removesuffix("-data")}
    places = [number for number, value in enumerate(scalars) if value in ours]
    return [value for number, value in enumerate(scalars) if number not in places and number - 1 not in places]


def _reading(read: Callable[[], _Result]) -> _Result:
    """Turn the YAML layer's errors into ours, outside of `except`, since a traceback could lead to the text."""
    try:
        return read()
    except YamlError as e:
        problem = str(e)
    raise KubeconfigError(problem)


@dataclass(frozen=True, slots=True)
class _Entries:
    """The nodes that the current context refers to."""

    user_name: str
    cluster_name: str
    cluster: YamlNode
    user: YamlNode
    path: tuple[YamlNode, ...]  #: All nodes from the root to the user's mapping, as written (aliases too).

    @classmethod
    def of(cls, root: YamlNode) -> _Entries:
        context = _named(root, "contexts", root.text_of("current-context"), "context")[-1]
        user_name, cluster_name = context.text_of("user"), context.text_of("cluster")
        path = _named(root, "users", user_name, "user")
        return cls(
            user_name=user_name,
            cluster_name=cluster_name,
            cluster=_named(root, "clusters", cluster_name, "cluster")[-1],
            user=path[-1],
            path=(root, *path),
        )


def _named(root: YamlNode, listing: str, name: str, key: str) -> tuple[YamlNode, YamlNode, YamlNode]:
    """The list, its only entry of that name, and the entry's value below `key`."""
    sequence = root.get(listing)
    entries = [] if sequence is None else [entry for entry in sequence.items() if entry.text_of("name") == name]
    if sequence is None or len(entries) != 1:
        raise YamlError(f"wanted one entry named {name!r} in {listing}, found {len(entries) or 'none'}")
    found = entries[0].get(key)
    if found is None:
        raise YamlError(f"line {entries[0].place.line}: this entry of {listing} has no {key}")
    return sequence, entries[0], found


def _parse(root: YamlNode) -> Kubeconfig:
    entries = _Entries.of(root)
    cluster, user = entries.cluster, entries.user
    return Kubeconfig(
        user=entries.user_name,
        cluster=entries.cluster_name,
        server=cluster.text_of("server"),
        tls_server_name=cluster.text_of("tls-server-name") or None,
        ca_data=_data(cluster, _CA),
        ca_file=cluster.text_of("certificate-authority") or None,
        certificate_data=_data(user, _CERTIFICATE),
        certificate_file=user.text_of("client-certificate") or None,
        key_present=user.text_of(_KEY) != "",
        key_file=user.text_of("client-key") or None,
        token_file=user.text_of("tokenFile") or None,
        unsupported=_unsupported(cluster, user),
        not_editable=_not_editable(root),
        key_fits=_key_fits(user),
        has_others=any(len(node.items()) > 1 for key in ("clusters", "contexts", "users") if (node := root.get(key))),
    )


def _unsupported(cluster: YamlNode, user: YamlNode) -> str | None:
    places = {"exec": user, "auth-provider": user, "username": user, "proxy-url": cluster,
              "insecure-skip-tls-verify": cluster}  # fmt: skip
    for key, mapping in places.items():
        node = mapping.get(key)
        if node is not None and (node.resolved.kind != "scalar" or node.text().lower() not in {"", "false"}):
            return key
    return None


def _key_fits(user: YamlNode) -> bool | None:
    try:
        certificate, key = (_data(user, name) for name in (_CERTIFICATE, _KEY))
        return has_key_of(key, load_pem_certificates(certificate)[0]) if certificate and key else None
    except ValueError:  # YamlError is one: neither is read here
        return None


def _not_editable(root: YamlNode) -> str | None:
    try:
        _editable_values(root)
    except YamlError as e:
        return str(e)
    return None


def _data(mapping: YamlNode, key: str) -> bytes | None:
    """The bytes of a base64 value, None if it is empty or missing."""
    text = mapping.text_of(key)
    try:  # like Go's decoder, ignore line breaks and nothing else
        return b64decode(text.replace("\n", "").replace("\r", ""), validate=True) or None
    except (binascii.Error, ValueError):
        pass
    raise YamlError(f"line {mapping.place.line}: wanted base64 in {key}, found something else")


def _own_entries(root: YamlNode, listing: str, key: str) -> dict[int, tuple[YamlNode, ...]]:
    """
    The entries of a list that have a value below `key`, by index: the nodes from the root to that value. No aliases,
    since thousands may mean one large value.
    """
    sequence = _own(root, listing)
    paths: dict[int, tuple[YamlNode, ...]] = {}
    for number, entry in enumerate(sequence.items() if sequence is not None else ()):
        _assert_own(entry)
        if sequence is not None and (value := _own(entry, key)) is not None:
            paths[number] = (root, sequence, entry, value)
    return paths


def _own(mapping: YamlNode, key: str) -> YamlNode | None:
    found = mapping.get(key)
    if found is not None:
        _assert_own(found)
    return found


def _assert_own(node: YamlNode) -> None:
    if node.kind == "alias":
        raise YamlError(f"line {node.place.line}: wanted a value of its own, found an alias (*)")


def _embedded_users(root: YamlNode) -> Iterator[EmbeddedUser]:
    for number, (_, _, entry, user) in _own_entries(root, "users", "user").items():
        name = entry.text_of("name")
        certificate, private = (_data(user, key) if _own(user, key) else None for key in (_CERTIFICATE, _KEY))
        if certificate and private:
            yield EmbeddedUser(number=number, name=name, certificate_pem=certificate, key_pem=private)


def _values_of_users(root: YamlNode, pairs: Mapping[int, tuple[bytes, bytes]]) -> list[tuple[YamlNode, bytes]]:
    users = _own_entries(root, "users", "user")
    values = [zip(_editable(users[number]).values(), pair, strict=True) for number, pair in pairs.items()]
    return list(chain.from_iterable(values))


def _editable_values(root: YamlNode) -> dict[str, YamlNode]:
    """The nodes of the two values, which no other part of the document depends on."""
    return _editable(_Entries.of(root).path)


def _editable(path: Sequence[YamlNode]) -> dict[str, YamlNode]:
    """The editable nodes of certificate and key for the user at the end of a path."""
    user = path[-1]
    values = {key: user.get(key) for key in (_CERTIFICATE, _KEY)}
    found = {key: node for key, node in values.items() if node is not None and user.text_of(key)}
    missing = [key for key in values if key not in found]
    if missing:
        raise YamlError(f"there is no embedded {' and '.join(missing)} to replace")
    _assert_editable(*path, *found.values())
    return found


def _assert_editable(*nodes: YamlNode) -> None:
    for node in nodes:
        if node.kind == "alias" or node.anchor:
            raise YamlError(f"line {node.place.line}: wanted a value of its own, found an anchor or alias (& or *)")
        if node.tag:
            raise YamlError(f"line {node.place.line}: wanted a value without a tag, found one (!)")


def _content(text: str, node: YamlNode) -> tuple[int, int]:
    """Start and end of a scalar's content, without quotes, block header, indentation and last line break."""
    start, end = node.place.start, node.place.end
    if node.style in ("'", '"'):
        return start + 1, end - 1
    if node.style in ("|", ">"):
        header_end = start + len(text[start:end].splitlines(keepends=True)[0])
        content = text[header_end:end]
        return end - len(content.lstrip()), header_end + len(content.rstrip())
    return start, end


def _meaning(event: yaml.Event, changed: dict[int, str]) -> tuple[object, ...]:
    """A YAML event as comparable values; a scalar at an index in `changed` has that value."""
    how = tuple(getattr(event, name, None) for name in ("anchor", "tag", "style", "flow_style", "implicit"))
    if not isinstance(event, yaml.ScalarEvent):
        return (type(event), *how)
    value = changed.get(event.start_mark.index) if event.start_mark else None
    if value is None:
        return (type(event), *how, event.value)
    # the line breaks around a block's content are not replaced
    old = event.value if event.style in ("|", ">") else ""
    before, after = (len(old) - len(stripped) for stripped in (old.lstrip("\n"), old.rstrip("\n")))
    return (type(event), *how, "\n" * before + value + "\n" * after)


@dataclass(frozen=True, slots=True, kw_only=True)
class FreshKubeconfig:
    """A kubeconfig without the user's certificate and key."""

    server: str  #: URL.
    cluster: str  #: The cluster's name in the file.
    user: str
    ca_pem: bytes

    def text(self, certificate_pem: bytes, key_pem: bytes | None, key_file: str = "") -> bytes:
        """The file's content; without a key, `key_file` names the user's own, relative to the kubeconfig's directory."""
        user = {"client-certificate-data": _base64(certificate_pem)}
        if key_pem is not None:
            user["client-key-data"] = _base64(key_pem)
        elif key_file:
            user["client-key"] = key_file
        return self._dumped(user)

    def referring_text(self, path: str) -> bytes:
        """The content of a kubeconfig that refers to one other file with certificate and key."""
        return self._dumped({"client-certificate": path, "client-key": path})

    def _dumped(self, user: Mapping[str, str]) -> bytes:
        context = f"{self.user}@{self.cluster}"
        cluster = {"certificate-authority-data": _base64(self.ca_pem), "server": self.server}
        document = {
            "apiVersion": "v1",
            "clusters": [{"cluster": cluster, "name": self.cluster}],
            "contexts": [{"context": {"cluster": self.cluster, "user": self.user}, "name": context}],
            "current-context": context,
            "kind": "Config",
            "users": [{"name": self.user, "user": dict(user)}],
        }
        text = yaml.safe_dump(document, width=1 << 20, default_flow_style=False, allow_unicode=True).encode()
        read = parse(text)
        certificate = b64decode(user.get("client-certificate-data", "")) or None
        wanted = (self.user, self.server, self.ca_pem, certificate)
        if (read.user, read.server, read.ca_data, read.certificate_data) != wanted:
            raise KubeconfigError("wanted a kubeconfig that reads back as it was written, found another one")
        return text


def _base64(pem: bytes) -> str:
    return b64encode(pem).decode()
