"""What others wrote costs no more bytes, steps and seconds than a reader may spend."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from bridge.pki.budget import MOST_BYTES, MOST_STEPS, Budget, OverBudgetError, json_of, of_server

pytestmark = pytest.mark.attack("N5")


def test_bytes_steps_and_time_are_spent_together() -> None:
    """Each ends what is read, however much of the others is left; a reader that spends less goes on."""
    now = [0.0]

    def fresh() -> Budget:
        return Budget(10, 3, seconds=5, clock=lambda: now[0])

    budget = fresh()
    budget.spend(10, 3)
    budget.spend()
    with pytest.raises(OverBudgetError, match="at most 10 bytes, found 11"):
        budget.spend(1)
    with pytest.raises(OverBudgetError, match="at most 3 values"):
        fresh().spend(0, 4)
    budget = fresh()
    now[0] = 4.9
    budget.spend(1, 1)
    now[0] = 5.0
    with pytest.raises(OverBudgetError, match="within 5 s"):
        budget.spend()


@pytest.mark.parametrize("value", [[], {}, "a", 1, None, [1, [2, {"a": [3], "b": "[,,{"}]], {"a": {"b": {}}}])
@pytest.mark.parametrize("indent", [None, 1])
def test_json_is_what_it_was(value: object, indent: int | None) -> None:
    """Below the budget."""
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
    tracemalloc.start()
    with pytest.raises(OverBudgetError, match="at most"):
        json_of(data)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert len(json_of(b"[" + b"[]," * (MOST_STEPS // 2 - 2) + b"[]]")) == MOST_STEPS // 2 - 1


@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b'{"a":' * 90_000, b"NaN", b"[Infinity]", b"1" * 5000, b"\xff", b"", b"{", b'{"a": 1} x']
)
def test_what_is_no_json_is_a_value_error(data: bytes) -> None:
    """One kind of error, whatever breaks the reader."""
    with pytest.raises(ValueError, match=r"."):
        json_of(data)
