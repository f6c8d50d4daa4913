"""The fake of CUDA graphs repeats exactly the recorded tensor operations."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: there are no builds for this platform")

from kernels.gpu import INTERPRETED

if not INTERPRETED:
    pytest.skip("the double is for kernels that Triton interprets", allow_module_level=True)

from kernels.gpu.pointwise import norm
from tests.support.recorded import Recorded


def test_tensors_are_read_anew_and_all_else_is_not() -> None:
    x, y, factor = torch.ones(2, 4), torch.zeros(2, 4), 2.0
    weight = torch.ones(4)

    def work() -> None:
        y.copy_(norm(x, None, weight, 0.0) * factor)

    again = Recorded().capture(work)
    factor = 3.0
    x[1] *= -5
    weight[0] = 0.5
    assert torch.equal(y, torch.full((2, 4), 2.0))
    again()
    assert torch.equal(y, torch.tensor([[1.0, 2, 2, 2], [-1, -2, -2, -2]]))


def test_memory_is_freed_with_the_last_graph() -> None:
    recorded = Recorded()
    first, second = recorded.capture(lambda: None), recorded.capture(lambda: None)
    del first
    third = recorded.capture(lambda: None)
    assert (recorded.captured, recorded.held) == (3, 2)
    del second, third
    assert recorded.held == 0
    with pytest.raises(RuntimeError, match="use_count"):
        recorded.capture(lambda: None)


def test_what_asks_for_values_is_refused() -> None:
    x = torch.ones(3)

    def value() -> None:
        x.sum().item()

    def places() -> None:
        x.nonzero()

    for work in (value, places):
        with pytest.raises(RuntimeError, match="cannot be captured"):
            Recorded().capture(work)
