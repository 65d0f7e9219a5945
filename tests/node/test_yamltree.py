"""A YAML document as values: what PyYAML's safe loader makes of it, and nothing that two readers take differently."""

from __future__ import annotations

import time
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bridge.node.yamltree import YamlError, document
from bridge.pki.budget import MOST_STEPS

_TEXTS = st.text(st.characters(exclude_categories=["C"]), max_size=8)
_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _TEXTS,
    lambda one: st.lists(one, max_size=3) | st.dictionaries(_TEXTS.filter(lambda key: key != "<<"), one, max_size=3),
)


@given(_VALUES)
def test_what_was_written_is_read(value: object) -> None:
    """All that PyYAML writes is read back unchanged."""
    assert document(yaml.safe_dump(value)).plain() == value


@pytest.mark.parametrize(
    "text",
    [
        "yes",
        "0x1F",
        "010",
        "1_000",
        "-1.5e+3",
        "~",
        "'1'",
        '"true"',
        "|\n text\n",
        "[a, {b: c}]",
        "",
        "1e3",
        "a b",
    ],
)
def test_values_are_those_of_the_safe_loader(text: str) -> None:
    """Where Go, and so kubeadm, reads the same."""
    assert document(f"key: {text}").plain() == yaml.safe_load(f"key: {text}")


@pytest.mark.parametrize("text", ["12:30", "190:20:30.15", "2026-01-02", "2026-01-02T03:04:05Z"])
def test_what_go_takes_for_a_text_stays_one(text: str) -> None:
    """PyYAML alone reads numbers to base 60 and dates; written again, it is still a text."""
    assert document(text).plain() == text
    assert yaml.safe_load(yaml.safe_dump(document(text).plain())) == text


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a: &a [1]\nb: *a", "alias"),
        ("a: &a {b: 1}\nc: {<<: *a}", "merge key"),
        ("a: 1\nb: {c: 1, c: 2}", "2 times"),
        ("!!binary aGk=", "tag"),
        ("!!python/object:os.system {}", "tag"),
        ("{[a]: b}", "sequence"),
        (f"a: {'9' * 5000}", "too large"),
    ],
)
def test_what_two_readers_take_differently_is_refused(text: str, found: str) -> None:
    """An alias, a merge key, a key twice, a tag, a key that is no text, a number without end."""
    with pytest.raises(YamlError, match=found):
        document(text).plain()


@pytest.mark.attack("N1")
def test_a_document_of_too_many_values_is_refused() -> None:
    """Below the limit of bytes, and each of them short: a budget of values ends it; one less is read."""
    many = "- 1\n" * (MOST_STEPS - 1)

    assert len(document(many).items()) == MOST_STEPS - 1
    with pytest.raises(YamlError, match="values, found more"):
        document(many + "- 1\n")


@pytest.mark.attack("N1")
def test_a_mapping_that_thousands_of_aliases_lead_to_is_looked_through_once() -> None:
    """40,000 keys and 10,000 aliases: looked through for each alias, this would take minutes."""
    root = document("a: &a\n" + "".join(f"  k{n}: {n}\n" for n in range(40_000)) + "b:\n" + "- *a\n" * 10_000)
    entries = root.get("b")
    assert entries is not None

    started = time.process_time()
    values = {value.text() for one in entries.items() if (value := one.get("k39999")) is not None}

    assert values == {"39999"}
    assert time.process_time() - started < 10
