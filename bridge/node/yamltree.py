"""YAML as a tree with positions, for untrusted files: no alias expands, no error quotes the text, size is limited."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import yaml

from bridge.pki.budget import Budget, OverBudgetError

#: kubeadm's files have less than 12 levels; libyaml allows 100 or 1000, the Python parser any number.
MAX_DEPTH = 64
#: A kubeadm configuration file has five kinds of documents.
MAX_DOCUMENTS = 20

_BOM = "\ufeff"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is not in every build
_NULL = ("", "~", "null", "Null", "NULL")
_STR = "tag:yaml.org,2002:str"
_RESOLVER: Any = yaml.resolver.Resolver()
_MADE = yaml.constructor.SafeConstructor()
#: The types of a plain scalar other than text.
_PLAIN: dict[str, Callable[[yaml.ScalarNode], float | bool]] = {
    "tag:yaml.org,2002:bool": _MADE.construct_yaml_bool,
    "tag:yaml.org,2002:int": _MADE.construct_yaml_int,
    "tag:yaml.org,2002:float": _MADE.construct_yaml_float,
}


class YamlError(ValueError):
    """Not the expected YAML; the message has a position, never a value."""


class Position(NamedTuple):
    """A value's position; `start` and `end` count characters of the text without a byte order mark."""

    line: int  #: From 1.
    start: int
    end: int  #: For a mapping or sequence: where its first entry may begin.


@dataclass(slots=True)
class YamlNode:
    """One value of the document."""

    kind: Literal["scalar", "mapping", "sequence", "alias"]
    place: Position
    value: str = field(default="", repr=False)  #: A scalar's value, which may be a private key.
    style: str = ""  #: A scalar's style: empty when plain, else its first character.
    tag: str | None = None
    anchor: str | None = None
    children: list[YamlNode] = field(default_factory=list, repr=False)  #: A mapping's: key, value, key, value, …
    target: YamlNode | None = field(default=None, repr=False)  #: An alias's target.
    #: For each key of a mapping, the indices of its values.
    _places: dict[str, list[int]] | None = field(default=None, repr=False)

    @property
    def resolved(self) -> YamlNode:
        """The node itself, or the target of an alias."""
        return self.target if self.target is not None else self

    @property
    def null(self) -> bool:
        """Whether it is null in YAML."""
        node = self.resolved
        return node.kind == "scalar" and node.style == "" and node.tag is None and node.value in _NULL

    def text(self) -> str:
        """The scalar as text, empty for null."""
        node = self.resolved
        if node.kind != "scalar":
            raise YamlError(f"line {self.place.line}: wanted a text, found a {node.kind}")
        if node.tag not in (None, _STR):
            raise YamlError(f"line {self.place.line}: wanted a text, found a value with a tag")
        return "" if node.null else node.value

    def items(self) -> list[YamlNode]:
        """The entries of a sequence, none for null."""
        node = self.resolved
        if node.null:
            return []
        if node.kind != "sequence":
            raise YamlError(f"line {self.place.line}: wanted a list, found a {node.kind}")
        return node.children

    def get(self, key: str) -> YamlNode | None:
        """The value below `key` (None: missing or null); YamlError: no mapping, a duplicate key, or a merge key (`<<`)."""
        node = self.resolved
        if node.null:
            return None
        if node.kind != "mapping":
            raise YamlError(f"line {self.place.line}: wanted a mapping, found a {node.kind}")
        places = node.index()
        if "<<" in places:
            raise YamlError(f"line {node.place.line}: wanted a mapping of its own, found a merge key (<<)")
        place = places.get(key, [])
        if len(place) > 1:
            raise YamlError(f"line {node.place.line}: wanted {key} once, found it {len(place)} times")
        return node.children[place[0]] if place else None

    def text_of(self, key: str) -> str:
        """The text below `key`, empty if there is none; raises like `get`."""
        node = self.get(key)
        return "" if node is None else node.text()

    def index(self) -> dict[str, list[int]]:
        """The indices of each key's values, computed once: thousands of aliases may refer to one large mapping."""
        if self._places is None:
            self._places = {}
            for number, child in enumerate(self.children[::2]):
                self._places.setdefault(child.resolved.value, []).append(2 * number + 1)
        return self._places

    def plain(self) -> Any:
        """The value in Python's own types; aliases, tags and merge keys are refused."""
        if self.kind == "alias":
            raise YamlError(f"line {self.place.line}: wanted a value, found an alias (*)")
        if self.kind == "scalar":
            return _plain_scalar(self)
        if self.tag is not None:
            raise YamlError(f"line {self.place.line}: wanted a {self.kind}, found a value with a tag")
        if self.kind == "sequence":
            return [child.plain() for child in self.children]
        keys = [key.text() for key in self.children[::2]]
        for key in keys:
            self.get(key)  # refuses duplicate and merge keys
        return dict(zip(keys, [child.plain() for child in self.children[1::2]], strict=True))


def _plain_scalar(node: YamlNode) -> str | float | bool | None:
    """Null, a boolean, or a number if PyYAML and Go agree; `12:30` and dates are texts, as in Go and JSON."""
    text = node.text()
    if node.null:
        return None
    tag = _RESOLVER.resolve(yaml.ScalarNode, text, (True, False)) if not node.style and node.tag is None else _STR
    if tag not in _PLAIN or ":" in text:
        return text
    try:
        return _PLAIN[tag](yaml.ScalarNode(tag, text))
    except (ValueError, OverflowError):  # more digits than Python converts
        raise YamlError(f"line {node.place.line}: wanted a number, found one that is too large") from None


def split_bom(data: bytes) -> tuple[str, str]:
    """The byte order mark (usually empty) and the text after it."""
    try:
        Budget().spend(len(data))
        text = data.decode()
    except OverBudgetError as e:
        raise YamlError(str(e)) from None
    except UnicodeDecodeError as e:
        place = e.start
    else:
        return (_BOM, text[1:]) if text.startswith(_BOM) else ("", text)
    # not raised inside `except`: that error, and so a traceback's context, holds the data
    raise YamlError(f"wanted UTF-8 text, found another byte at offset {place}")


def events(text: str, most: int = 1) -> Iterator[yaml.Event]:
    """PyYAML's events for a text."""
    try:
        yield from _limited(yaml.parse(text, Loader=_LOADER), most)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None) or getattr(e, "context_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    else:
        return
    # not raised inside `except`: PyYAML's errors quote the text around the position
    raise YamlError(f"{place}wanted YAML, found a syntax error")


def _limited(parsed: Iterator[yaml.Event], most: int) -> Iterator[yaml.Event]:
    depth = documents = 0
    budget = Budget()
    for event in parsed:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        documents += isinstance(event, yaml.DocumentStartEvent)
        if depth > MAX_DEPTH:
            raise YamlError(f"line {_position(event).line}: wanted at most {MAX_DEPTH} levels, found more")
        if documents > most:
            wanted = "one document" if most == 1 else f"at most {most} documents"
            raise YamlError(f"line {_position(event).line}: wanted {wanted}, found another")
        try:
            budget.spend(steps=isinstance(event, yaml.NodeEvent))
        except OverBudgetError as e:
            raise YamlError(f"line {_position(event).line}: {e}") from None
        yield event


def document(text: str) -> YamlNode:
    """The root of the only document in a text."""
    return documents(text, most=1)[0]


def documents(text: str, most: int = MAX_DOCUMENTS) -> list[YamlNode]:
    """The roots of all documents in `text`, at least one."""
    root = YamlNode("sequence", Position(1, 0, 0))
    stack = [root]
    anchors: dict[str, YamlNode] = {}
    for event in events(text, most):
        if isinstance(event, yaml.DocumentStartEvent):
            anchors = {}  # an alias refers to its own document (YAML 1.2 §3.2.2.2)
        elif isinstance(event, yaml.CollectionEndEvent):
            stack.pop()
        elif isinstance(event, yaml.NodeEvent):
            node = _node(event, anchors)
            stack[-1].children.append(node)
            if isinstance(event, yaml.CollectionStartEvent):
                stack.append(node)
    if not root.children:
        raise YamlError("there is no YAML document")
    return root.children


def _node(event: yaml.NodeEvent, anchors: dict[str, YamlNode]) -> YamlNode:
    place = _position(event)
    if isinstance(event, yaml.ScalarEvent):
        style = event.style or ""
        node = YamlNode("scalar", place, value=event.value, style=style, tag=event.tag, anchor=event.anchor)
    elif isinstance(event, yaml.CollectionStartEvent):
        kind: Literal["mapping", "sequence"] = "mapping" if isinstance(event, yaml.MappingStartEvent) else "sequence"
        node = YamlNode(kind, place, tag=event.tag, anchor=event.anchor)
    elif event.anchor in anchors:
        return YamlNode("alias", place, target=anchors[event.anchor])
    else:
        raise YamlError(f"line {place.line}: this alias has no anchor above it")
    if event.anchor:
        anchors[event.anchor] = node
    return node


def _position(event: yaml.Event) -> Position:
    start, end = event.start_mark, event.end_mark
    assert start is not None and end is not None  # noqa: S101, PT018 - both parsers set them, the stubs don't know
    return Position(start.line + 1, start.index, end.index)
