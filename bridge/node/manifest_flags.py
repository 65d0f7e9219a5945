"""Changes a component's flags and mounts in its static-pod manifest and in kubeadm's ClusterConfiguration (pure)."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from bridge.node import manifests
from bridge.node.manifests import container, pod, words_of
from bridge.node.yamltree import YamlError, YamlNode, document, split_bom
from bridge.specs import Component

#: Each component's part of a ClusterConfiguration.
PARTS = {
    Component.APISERVER: "apiServer",
    Component.CONTROLLER_MANAGER: "controllerManager",
    Component.SCHEDULER: "scheduler",
}
#: Written without quotes; other values are written as JSON, which is valid YAML.
_PLAIN = re.compile(r"[A-Za-z0-9_./=-]+")
_FIRST_WITH_LISTS = "kubeadm.k8s.io/v1beta4"


class Mount(NamedTuple):
    """A host directory that a container sees at the same path, read-only."""

    name: str  #: The volume's name.
    path: str


# --- a manifest ------------------------------------------------------------------------------------------------------


def edited(
    data: bytes, component: Component, flags: Mapping[str, str | None], mount: Mount | None = None, unmount: str = ""
) -> bytes:
    """A manifest with these flags (None: removed), a mount, and without the volume `unmount` (YamlError: not kubeadm's form)."""
    before = manifests.parse(component, data)
    bom, text = split_bom(data)
    for flag, value in flags.items():
        text = _without(text, component, flag) if value is None else _with(text, component, flag, value)
    for key in ("volumeMounts", "volumes") if unmount else ():
        text = _without_entry(text, _listed(text, component, key), unmount)
    if mount is not None and not _is_mounted(text, component, mount.path):
        path = _scalar(mount.path)
        inside = [f"- mountPath: {path}", f"  name: {mount.name}", "  readOnly: true"]
        text = _with_entry(text, _listed(text, component, "volumeMounts"), inside)
        volume = ["- hostPath:", f"    path: {path}", "    type: DirectoryOrCreate", f"  name: {mount.name}"]
        text = _with_entry(text, _listed(text, component, "volumes"), volume)
    done = (bom + text).encode()
    wanted = {flag: value for flag, value in {**before.flags, **flags}.items() if value is not None}
    if manifests.parse(component, done).flags != wanted:
        raise YamlError("wanted a manifest as kubeadm writes it, one flag a line, found another form")
    return done


def _with(text: str, component: Component, flag: str, value: str) -> str:
    found = list(_places(text, component, flag))
    if found:
        word, following = found[-1]
        old, new = (word, f"{flag}={value}") if following is None else (following, value)
        _line(text, old)
        return text[: old.place.start] + _scalar(new) + text[old.place.end :]
    last = _words(text, component)[-1]  # kubeadm appends extra arguments
    begin, end = _line(text, last)
    return f"{text[:end]}{text[begin : last.place.start]}{_scalar(f'{flag}={value}')}\n{text[end:]}"


def _without(text: str, component: Component, flag: str) -> str:
    for word, following in reversed(list(_places(text, component, flag))):
        begin, end = _line(text, word)
        if following is not None:
            _, end = _line(text, following)
        text = text[:begin] + text[end:]
    return text


def _places(text: str, component: Component, flag: str) -> Iterator[tuple[YamlNode, YamlNode | None]]:
    """The words of a flag, each with the following word if that is its value."""
    words = _words(text, component)
    for number, word in enumerate(words):
        name, equals, _ = word.text().partition("=")
        if name == flag:
            following = words[number + 1] if number + 1 < len(words) and not equals else None
            yield word, None if following is None or following.text().startswith("-") else following


def _words(text: str, component: Component) -> list[YamlNode]:
    words = words_of(container(document(text), component.value))
    if not words:
        raise YamlError(f"there is no command of {component.value}")
    return words


def _line(text: str, word: YamlNode) -> tuple[int, int]:
    """Start and end of the line of a list's entry, which must be alone on it, as kubeadm writes it."""
    start, stop = word.place.start, word.place.end
    begin = text.rfind("\n", 0, start) + 1
    end = text.find("\n", stop)
    end = len(text) if end < 0 else end + 1
    rest = text[stop:end].strip()
    is_line = re.fullmatch(r" *- +", text[begin:start]) and text[end - 1 : end] == "\n"
    is_alone = is_line and "\n" not in text[start:stop]
    if not is_alone or (rest and not rest.startswith("#")) or word.kind != "scalar" or word.anchor:
        raise YamlError(f"line {word.place.line}: wanted one word a line, as kubeadm writes it, found another form")
    return begin, end


def _scalar(value: str) -> str:
    return value if _PLAIN.fullmatch(value) else json.dumps(value)


def _listed(text: str, component: Component, key: str) -> list[YamlNode]:
    """A container's mounts, or its pod's volumes."""
    root = document(text)
    listed = (container(root, component.value) if key == "volumeMounts" else pod(root)).get(key)
    return [] if listed is None else listed.items()


def _is_mounted(text: str, component: Component, path: str) -> bool:
    found = [mount.get("mountPath") for mount in _listed(text, component, "volumeMounts")]
    return any(mount is not None and PurePath(path).is_relative_to(mount.text()) for mount in found)


def _with_entry(text: str, entries: Sequence[YamlNode], lines: Sequence[str]) -> str:
    """Append an entry to a list."""
    if not entries:
        raise YamlError("the manifest has no volumes, as kubeadm writes them")
    indent = re.match(r" *(?=- )", text[text.rfind("\n", 0, entries[-1].place.start) + 1 :])
    _, end = _block(text, entries[-1])
    if indent is None:
        raise YamlError(f"line {entries[-1].place.line}: wanted a list as kubeadm writes it, found another form")
    return text[:end] + "".join(f"{indent[0]}{line}\n" for line in lines) + text[end:]


def _without_entry(text: str, entries: Sequence[YamlNode], name: str) -> str:
    for entry in reversed(entries):
        if entry.text_of("name") == name:
            begin, end = _block(text, entry)
            text = text[:begin] + text[end:]
    return text


def _block(text: str, entry: YamlNode) -> tuple[int, int]:
    """Start and end of the lines of a list's entry."""
    begin, last = text.rfind("\n", 0, entry.place.start) + 1, entry
    while last.children:
        last = last.children[-1]
    end = text.find("\n", last.place.end)
    if end < 0 or not re.fullmatch(r" *- +", text[begin : entry.place.start]) or "{" in text[begin:end]:
        raise YamlError(f"line {entry.place.line}: wanted a list as kubeadm writes it, found another form")
    return begin, end + 1


# --- kubeadm's ClusterConfiguration ----------------------------------------------------------------------------------


def arguments(cluster: Mapping[str, Any], component: Component) -> dict[str, str]:
    """A component's extra arguments, without dashes; of equal names the last counts, as for kubeadm's pods."""
    part = cluster.get(PARTS[component])
    listed = part.get("extraArgs") if isinstance(part, Mapping) else None
    if isinstance(listed, Mapping):
        return {str(name): str(value) for name, value in listed.items()}
    entries = [entry for entry in listed if isinstance(entry, Mapping)] if isinstance(listed, list) else []
    return {str(entry.get("name")): str(entry.get("value")) for entry in entries}


def with_arguments(
    cluster: Mapping[str, Any],
    component: Component,
    changes: Mapping[str, str | None],
    mount: Mount | None = None,
    unmount: str = "",
) -> dict[str, Any]:
    """A ClusterConfiguration with a component's arguments (None: removed), and with or without its extra volume."""
    done = copy.deepcopy(dict(cluster))
    part = done.setdefault(PARTS[component], {}) or {}
    listed = part.get("extraArgs")
    if isinstance(listed, Mapping) or (listed is None and str(done.get("apiVersion")) < _FIRST_WITH_LISTS):
        kept: Any = {name: value for name, value in (listed or {}).items() if name not in changes}
        part["extraArgs"] = {**kept, **{name: value for name, value in changes.items() if value is not None}}
    else:
        kept = [argument for argument in listed or [] if argument.get("name") not in changes]
        added = [{"name": name, "value": value} for name, value in changes.items() if value is not None]
        part["extraArgs"] = [*kept, *added]
    names = {unmount, mount.name if mount is not None else ""}
    volumes = [volume for volume in part.get("extraVolumes") or [] if volume.get("name") not in names]
    if mount is not None:
        path = {"hostPath": mount.path, "mountPath": mount.path}
        volumes.append({"name": mount.name, **path, "readOnly": True, "pathType": "DirectoryOrCreate"})
    part["extraVolumes"] = volumes
    done[PARTS[component]] = {key: value for key, value in part.items() if value}
    return done
