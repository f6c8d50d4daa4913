"""The choice of the fastest variant."""

from __future__ import annotations

import pytest

from kernels.fastest import fastest


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([{"a": 1.0}], "a"),
        ([{"a": 1.0, "b": 0.5}], "b"),
        ([{"a": 1.0, "b": 0.95, "c": 0.92}], "a"),  # all nearly equal
        ([{"a": 1.0, "b": 0.85, "c": 0.8}], "b"),  # the first of two that are faster
        ([{"a": 1.0, "b": 0.85, "c": 0.7}], "c"),
        ([{"a": 1.0, "b": 0.5}, {"a": 1.0, "b": 2.0}], "a"),  # the mean is geometric: 1
        ([{"a": 1.0, "b": 0.25}, {"a": 100.0, "b": 200.0}], "b"),  # and no shape counts for its length
        ([{"a": 1.0, "b": 1.0}] * 5, "a"),
    ],
)
def test_the_fastest_of_all_shapes(times: list[dict[str, float]], expected: str) -> None:
    assert fastest(times) == expected
