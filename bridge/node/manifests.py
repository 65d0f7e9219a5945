"""
Static-pod manifests: the flags and the version of each component, read and changed (pure but for `load` and `pod_name`).

A change keeps a manifest's text but for the lines of flags and mounts, which become what kubeadm renders; the same flags
change in the ClusterConfiguration from which kubeadm renders the manifest.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from bridge.node.yamltree import YamlError, YamlNode, document, split_bom
from bridge.specs import Component
from bridge.system.paths import UnreadableError, read

#: By component, its part of a ClusterConfiguration.
PARTS = {
    Component.APISERVER: "apiServer",
    Component.CONTROLLER_MANAGER: "controllerManager",
    Component.SCHEDULER: "scheduler",
}
#: Written without quotes; everything else as JSON, which is YAML, too.
_PLAIN = re.compile(r"[A-Za-z0-9_./=-]+")
_FIRST_WITH_LISTS = "kubeadm.k8s.io/v1beta4"

#: kubeadm's; in the order in which its documentation restarts them.
COMPONENTS = (Component.ETCD, Component.APISERVER, Component.CONTROLLER_MANAGER, Component.SCHEDULER)

#: By which a Kubernetes component names the pair that it serves with.
TLS_CERTIFICATE, TLS_KEY = "--tls-cert-file", "--tls-private-key-file"

_TAG = re.compile(r":(v?(\d{1,4})\.(\d{1,4})(?!\d)[^:/]*)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One static pod, of which the component's container counts."""

    flags: Mapping[str, str]  #: Names with two dashes; "true" for a flag without a value; the last one counts.
    #: By the image's tag (etcd has its own numbers); None when there is no such tag.
    version: tuple[int, int] | None
    tag: str = ""  #: The image's; empty when it has none.


def path_of(component: Component, kubeconfig_dir: Path) -> Path:
    """The path of the component's manifest in kubeadm's layout."""
    return kubeconfig_dir / "manifests" / f"{component.value}.yaml"


def load(component: Component, kubeconfig_dir: Path) -> Manifest | None:
    """The component's manifest, None when there is none; ValueError says why it can't be used."""
    path = path_of(component, kubeconfig_dir)
    try:
        data = read(path)
        return None if data is None else parse(component, data)
    except UnreadableError as e:
        raise ValueError(f"wanted the manifest {path}, found: {e}") from e
    except YamlError as e:
        raise ValueError(f"{path}: {e}") from None


def pod_name(path: Path) -> str | None:
    """The name of the pod in a file of the manifests' directory; None: no kubelet makes a pod from it."""
    try:
        metadata = document(split_bom(read(path) or b"")[1]).get("metadata")
        return None if metadata is None else _text(metadata.get("name"))
    except (UnreadableError, YamlError):
        return None


def parse(component: Component, data: bytes) -> Manifest:
    """Read a manifest."""
    own = container(document(split_bom(data)[1]), component.value)
    words = [word.text() for key in ("command", "args") if (listed := own.get(key)) for word in listed.items()]
    tag, version = tag_of(_text(own.get("image")))
    return Manifest(flags=flags_of(words), version=version, tag=tag)


def tag_of(image: str) -> tuple[str, tuple[int, int] | None]:
    """The tag of an image, which a digest may follow, and its version; empty and None where the tag begins with none."""
    found = _TAG.search(image.partition("@")[0])
    return ("", None) if found is None else (found[1], (int(found[2]), int(found[3])))


def pod(root: YamlNode) -> YamlNode:
    """The pod's `spec`."""
    spec = root.get("spec")
    if spec is None:
        raise YamlError("wanted a pod with a container, found none")
    return spec


def container(root: YamlNode, name: str) -> YamlNode:
    """The container with the component's name, else the first."""
    listed = pod(root).get("containers")
    containers = [] if listed is None else listed.items()
    if not containers:
        raise YamlError("wanted a pod with a container, found none")
    return next((one for one in containers if _text(one.get("name")) == name), containers[0])


def _text(node: YamlNode | None) -> str:
    return "" if node is None else node.text()


def flags_of(words: Sequence[str]) -> dict[str, str]:
    """Flags as `--name=value` and `--name value`; etcd takes one dash as well, except before a single letter."""
    flags = {}
    for word, following in zip_longest(words, words[1:], fillvalue="-"):
        name, equals, value = word.lstrip("-").partition("=")
        if word.startswith("--" if len(name) == 1 else "-") and name:
            flags[f"--{name}"] = value if equals else "true" if following.startswith("-") else following
    return flags


class Mount(NamedTuple):
    """A directory of the host that a container sees at the same path, read-only."""

    name: str  #: Of the volume.
    path: str


# --- a manifest ------------------------------------------------------------------------------------------------------


def edited(
    data: bytes, component: Component, flags: Mapping[str, str | None], mount: Mount | None = None, unmount: str = ""
) -> bytes:
    """
    A manifest with these flags (names with two dashes; None: without it), with a mount unless the directory is mounted
    already, and without the volume called `unmount` (YamlError: it is not written as kubeadm writes it).
    """
    before = parse(component, data)
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
    wanted = {**before.flags, **{flag: value for flag, value in flags.items() if value is not None}}
    wanted = {flag: value for flag, value in wanted.items() if flags.get(flag, "") is not None}
    if parse(component, done).flags != wanted:
        raise YamlError("wanted a manifest as kubeadm writes it, one flag a line, found another form")
    return done


def _with(text: str, component: Component, flag: str, value: str) -> str:
    found = list(_places(text, component, flag))
    if found:
        word, following = found[-1]
        old, new = (word, f"{flag}={value}") if following is None else (following, value)
        _line(text, old)
        return text[: old.place.start] + _scalar(new) + text[old.place.end :]
    last = _words(text, component)[-1]  # where kubeadm has extra arguments
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
    """The words of a flag; with the following one where that is its value."""
    words = _words(text, component)
    for number, word in enumerate(words):
        name, equals, _ = word.text().partition("=")
        if name == flag:
            following = words[number + 1] if number + 1 < len(words) and not equals else None
            yield word, None if following is None or following.text().startswith("-") else following


def _words(text: str, component: Component) -> list[YamlNode]:
    """The words of `command` and `args`; a flag may be in both."""
    root = container(document(text), component.value)
    words = [word for key in ("command", "args") if (listed := root.get(key)) for word in listed.items()]
    if not words:
        raise YamlError(f"wanted the command of {component.value}, found none")
    return words


def _line(text: str, word: YamlNode) -> tuple[int, int]:
    """Begin and end of the line of a list's entry that has it to itself, as kubeadm writes it."""
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


def _listed(text: str, component: Component, key: str) -> YamlNode | None:
    """The list of a container's mounts, or of its pod's volumes."""
    root = document(text)
    return container(root, component.value).get(key) if key == "volumeMounts" else pod(root).get(key)


def _is_mounted(text: str, component: Component, path: str) -> bool:
    listed = _listed(text, component, "volumeMounts")
    found = [one.get("mountPath") for one in listed.items()] if listed is not None else []
    return any(one is not None and PurePath(path).is_relative_to(one.text()) for one in found)


def _with_entry(text: str, listed: YamlNode | None, lines: Sequence[str]) -> str:
    """The text with one more entry at the end of a list."""
    entries = listed.items() if listed is not None else []
    if not entries:
        raise YamlError("wanted volumes in the manifest, as kubeadm writes them, found none")
    indent = re.match(r" *(?=- )", text[text.rfind("\n", 0, entries[-1].place.start) + 1 :])
    _, end = _block(text, entries[-1])
    if indent is None:
        raise YamlError(f"line {entries[-1].place.line}: wanted a list as kubeadm writes it, found another form")
    return text[:end] + "".join(f"{indent[0]}{line}\n" for line in lines) + text[end:]


def _without_entry(text: str, listed: YamlNode | None, name: str) -> str:
    for entry in reversed(listed.items() if listed is not None else []):
        found = entry.get("name")
        if found is not None and found.text() == name:
            begin, end = _block(text, entry)
            text = text[:begin] + text[end:]
    return text


def _block(text: str, entry: YamlNode) -> tuple[int, int]:
    """Begin and end of the lines of a list's entry."""
    begin, last = text.rfind("\n", 0, entry.place.start) + 1, entry
    while last.children:
        last = last.children[-1]
    end = text.find("\n", last.place.end)
    if end < 0 or not re.fullmatch(r" *- +", text[begin : entry.place.start]) or "{" in text[begin:end]:
        raise YamlError(f"line {entry.place.line}: wanted a list as kubeadm writes it, found another form")
    return begin, end + 1


# --- kubeadm's ClusterConfiguration ----------------------------------------------------------------------------------


def arguments(cluster: Mapping[str, Any], component: Component) -> dict[str, str]:
    """A component's extra arguments, without dashes; the last of a name counts, as for kubeadm's pods."""
    part = cluster.get(PARTS[component])
    listed = part.get("extraArgs") if isinstance(part, Mapping) else None
    if isinstance(listed, Mapping):
        return {str(name): str(value) for name, value in listed.items()}
    entries = [one for one in listed if isinstance(one, Mapping)] if isinstance(listed, list) else []
    return {str(one.get("name")): str(one.get("value")) for one in entries}


def with_arguments(
    cluster: Mapping[str, Any],
    component: Component,
    changes: Mapping[str, str | None],
    mount: Mount | None = None,
    unmount: str = "",
) -> dict[str, Any]:
    """A ClusterConfiguration with a component's arguments (None: without it), and its extra volume or without it."""
    done = copy.deepcopy(dict(cluster))
    part = done.setdefault(PARTS[component], {}) or {}
    listed = part.get("extraArgs")
    if isinstance(listed, Mapping) or (listed is None and str(done.get("apiVersion")) < _FIRST_WITH_LISTS):
        kept: Any = {name: value for name, value in (listed or {}).items() if name not in changes}
        part["extraArgs"] = {**kept, **{name: value for name, value in changes.items() if value is not None}}
    else:
        kept = [one for one in listed or [] if one.get("name") not in changes]
        added = [{"name": name, "value": value} for name, value in changes.items() if value is not None]
        part["extraArgs"] = [*kept, *added]
    names = {unmount, mount.name if mount is not None else ""}
    volumes = [one for one in part.get("extraVolumes") or [] if one.get("name") not in names]
    if mount is not None:
        path = {"hostPath": mount.path, "mountPath": mount.path}
        volumes.append({"name": mount.name, **path, "readOnly": True, "pathType": "DirectoryOrCreate"})
    part["extraVolumes"] = volumes
    done[PARTS[component]] = {key: value for key, value in part.items() if value}
    return done
