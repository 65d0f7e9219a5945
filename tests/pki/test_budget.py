"""What others wrote costs no more bytes, steps and seconds than a reader may spend."""

from __future__ import annotations

import json

import pytest

from bridge.pki.budget import MOST_BYTES, MOST_OF_SERVER, MOST_STEPS, Budget, OverBudgetError, json_of, of_server
from tests.kit.measured import traced

pytestmark = pytest.mark.attack("N5")


def test_bytes_steps_and_time_are_spent_together() -> None:
    """Each ends what is read, however much of the others is left; a reader that spends less goes on."""
    now = [0.0]

    def fresh() -> Budget:
        return Budget(10, 3, seconds=5, clock=lambda: now[0])

    budget = fresh()
    budget.spend(10, 3)
    budget.spend()
    with pytest.raises(OverBudgetError, match=r"^wanted at most 10 bytes, found 11$") as e:
        budget.spend(1)
    assert (e.value.wanted, e.value.found) == ("at most 10 bytes", "11")
    with pytest.raises(OverBudgetError, match=r"^wanted at most 3 values, found more$"):
        fresh().spend(0, 4)
    budget = fresh()
    now[0] = 4.75
    budget.spend(1, 1)
    assert budget.seconds_left() == 0.25
    now[0] = 5.0
    with pytest.raises(OverBudgetError, match=r"^wanted no more than can be read within 5 s, found more$"):
        budget.spend()


def test_what_may_be_looked_at_is_asked_before() -> None:
    """The last byte is allowed, and the next is not; steps add up; without a limit of time there is always some left."""
    budget = Budget(2, 2)
    assert [budget.allows(1), budget.allows(1), budget.allows(1)] == [True, True, False]
    budget = Budget(2, 2)
    budget.spend()
    budget.spend(steps=2)
    with pytest.raises(OverBudgetError, match="values"):
        budget.spend(steps=1)
    assert budget.seconds_left() == float("inf")


def test_several_documents_share_a_budget() -> None:
    """The second is refused though it is as small as the first; a server's answer may have more values than others."""
    budget = Budget(8, 5)
    assert json_of(b"[1,2]", budget) == [1, 2]
    with pytest.raises(OverBudgetError, match="bytes"):
        json_of(b"[1,2]", budget)
    assert json_of(b'{"a": 1, "a": 2}', pairs=len) == 2
    for text in (b"[1,2]", b'{"a":{}}'):
        json_of(text, Budget(8, 3))
        with pytest.raises(OverBudgetError, match="values"):
            json_of(text, Budget(8, 2))
    many = b"[" + b"0," * MOST_STEPS + b"0]"
    assert len(of_server(many)) == MOST_STEPS + 1
    with pytest.raises(OverBudgetError, match=f"at most {MOST_OF_SERVER} values"):
        of_server(b"[" + b"0," * MOST_OF_SERVER + b"0]")


@pytest.mark.parametrize("value", [[], {}, "a", 1, None, [1, [2, {"a": [3], "b": "[,,{"}]], {"a": {"b": {}}}])
@pytest.mark.parametrize("indent", [None, 1])
def test_json_is_what_it_was(value: object, indent: int | None) -> None:
    """Below the budget the result is the same as the library's."""
    data = json.dumps(value, indent=indent).encode()
    assert json_of(data) == of_server(data) == value


@pytest.mark.parametrize(
    "data",
    [
        b"[" + b"[]," * 200_000 + b"[]]",
        b"[" + b"{}," * 200_000 + b"{}]",
        b"[" + b"1," * 200_000 + b"1]",
        b" " * MOST_BYTES + b"1",
    ],
)
def test_a_megabyte_becomes_no_hundred(data: bytes) -> None:
    """It is refused before any of it is made; the twin has half as many values as there may be."""
    with traced() as memory:
        with pytest.raises(OverBudgetError, match="at most"):
            json_of(data)
        assert memory()[1] < 1 << 20
    assert len(json_of(b"[" + b"[]," * (MOST_STEPS // 2 - 2) + b"[]]")) == MOST_STEPS // 2 - 1


@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b'{"a":' * 90_000, b"NaN", b"[Infinity]", b"1" * 5000, b"\xff", b"", b"{", b'{"a": 1} x']
)
def test_what_is_no_json_is_a_value_error(data: bytes) -> None:
    """One kind of error, whatever breaks the reader."""
    with pytest.raises(ValueError, match=r"."):
        json_of(data)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"[" * 90_000, "wanted JSON, found nesting without end"),
        (b"[NaN]", "wanted numbers, found NaN"),
        (b"-Infinity", "wanted numbers, found -Infinity"),
    ],
)
def test_what_json_has_and_we_do_not_read_is_named(data: bytes, sentence: str) -> None:
    """Python's reader takes NaN and infinite numbers, and stops at its own depth; ours names them."""
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        json_of(data)


def test_what_is_in_texts_counts_for_no_values() -> None:
    """A tenant's text of a million commas is one value; the same commas between values are a million."""
    for text, values in (('"a,[{\\",,"', 1), ('["\\\\",1]', 3), ("[1,2]", 3)):
        assert json_of(text.encode(), Budget(steps=values)) == json.loads(text)
        with pytest.raises(OverBudgetError):
            json_of(text.encode(), Budget(steps=values - 1))
