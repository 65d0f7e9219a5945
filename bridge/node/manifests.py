"""Static-pod manifests: the flags and the version of each component."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from bridge.node.yamltree import YamlError, YamlNode, document, split_bom
from bridge.specs import Component
from bridge.system.paths import UnreadableError, read

#: kubeadm's components, in the order in which its documentation restarts them.
COMPONENTS = (Component.ETCD, Component.APISERVER, Component.CONTROLLER_MANAGER, Component.SCHEDULER)

#: The flags that name a Kubernetes component's serving pair.
TLS_CERTIFICATE, TLS_KEY = "--tls-cert-file", "--tls-private-key-file"

_TAG = re.compile(r":(v?(\d{1,4})\.(\d{1,4})(?!\d)[^:/]*)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One static pod; only the component's container counts."""

    flags: Mapping[str, str]  #: Names with two dashes; "true" for a flag without a value; the last value counts.
    version: tuple[int, int] | None  #: By the image's tag (etcd has its own numbers); None without such a tag.
    tag: str = ""  #: The image's tag; empty without one.
    words: tuple[str, ...] = ()  #: The program and its arguments.

    def every(self, flag: str) -> list[str]:
        """All values of a repeated flag, in order."""
        return _values(self.words).get(flag, [])


def path_of(component: Component, kubeconfig_dir: Path) -> Path:
    """The path of a component's manifest in kubeadm's layout."""
    return kubeconfig_dir / "manifests" / f"{component.value}.yaml"


def load(component: Component, kubeconfig_dir: Path) -> Manifest | None:
    """Read a component's manifest, None if there is none; ValueError says why it is unusable."""
    path = path_of(component, kubeconfig_dir)
    try:
        data = read(path)
        return None if data is None else parse(component, data)
    except UnreadableError as e:
        raise ValueError(f"wanted the manifest {path}, found: {e}") from e
    except YamlError as e:
        raise ValueError(f"{path}: {e}") from None


def pod_name(path: Path) -> str | None:
    """The pod's name in a file of the manifests' directory; None: no kubelet makes a pod of it."""
    try:
        metadata = document(split_bom(read(path) or b"")[1]).get("metadata")
        return None if metadata is None else metadata.text_of("name")
    except (UnreadableError, YamlError):
        return None


def parse(component: Component, data: bytes) -> Manifest:
    """Read a manifest."""
    own = container(document(split_bom(data)[1]), component.value)
    words = tuple(word.text() for word in words_of(own))
    tag, version = tag_of(own.text_of("image"))
    return Manifest(flags=flags_of(words), version=version, tag=tag, words=words)


def words_of(container: YamlNode) -> list[YamlNode]:
    """The words of `command` and `args`; a flag may be in either."""
    return [word for key in ("command", "args") if (listed := container.get(key)) for word in listed.items()]


def tag_of(image: str) -> tuple[str, tuple[int, int] | None]:
    """An image's tag, which a digest may follow, and its version; empty and None if the tag begins with no version."""
    match = _TAG.search(image.partition("@")[0])
    return ("", None) if match is None else (match[1], (int(match[2]), int(match[3])))


def pod(root: YamlNode) -> YamlNode:
    """The pod's `spec`."""
    spec = root.get("spec")
    if spec is None:
        raise YamlError("there is no pod with a container")
    return spec


def container(root: YamlNode, name: str) -> YamlNode:
    """The container with the component's name, or else the first."""
    listed = pod(root).get("containers")
    containers = [] if listed is None else listed.items()
    if not containers:
        raise YamlError("there is no pod with a container")
    return next((container for container in containers if container.text_of("name") == name), containers[0])


def flags_of(words: Sequence[str]) -> dict[str, str]:
    """Parse `--name=value` and `--name value`; etcd also takes one dash, except before a single letter."""
    return {name: values[-1] for name, values in _values(words).items()}


def _values(words: Sequence[str]) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    for word, following in zip_longest(words, words[1:], fillvalue="-"):
        name, equals, value = word.lstrip("-").partition("=")
        if word.startswith("--" if len(name) == 1 else "-") and name:
            values.setdefault(f"--{name}", []).append(
                value if equals else "true" if following.startswith("-") else following
            )
    return values
