"""The choice of the fastest weight format on GPUs, by a clock that is made up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kernels.gpu.products import format_times
from kernels.ops import Linear
from kernels.reference_ops import reference_linear
from kernels.weights.matrix import Matrix


@pytest.mark.parametrize(
    ("seconds", "max_rows", "expected"),
    [
        ({"dense": 4, "int8": 3, "int4": 2, "fp8": 3}, 64, "int4"),
        ({"dense": 2, "int8": 3, "int4": 2, "fp8": 2}, 64, None),
        ({"dense": 2.1, "int8": 2, "int4": 2, "fp8": 2}, 64, None),  # by less than what noise could be
        ({"dense": 4, "int8": 2, "int4": 1.9, "fp8": 3}, 1, "int8"),
    ],
)
def test_the_format_with_the_least_time(
    seconds: dict[str, float], max_rows: int, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(format_times, "_SIZE", 64)
    monkeypatch.setattr(format_times, "_READ_BYTES", 3 * 64 * 64)
    now, ran = [""], []

    class Product:
        def __init__(self, matrix: Matrix) -> None:
            self._name, self._linear = matrix.format, reference_linear(matrix, None, None, False)
            self.nbytes, self.references_weights = self._linear.nbytes, False

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            now[0] = self._name
            ran.append(len(x))
            return self._linear(x)

    def clock(work: Callable[[], object]) -> float:
        work()
        return seconds[now[0]]

    made: Callable[[Matrix], Linear] = Product
    found = format_times.fastest_format(made, max_rows, torch.device("cpu"), clock)
    assert found == expected
    assert max(ran) <= max_rows
