"""Choice of the sums that go through memory shared by GPUs, with a fake of that memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, _resolve_process_group

from parallel import rendezvous, symm_mem
from parallel.group import CollectiveError
from parallel.symm_mem import MAX_BYTES, SymmetricGroup

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Comm:
    """Fake process group of two ranks that hold the same data."""

    def __init__(self) -> None:
        self.sums = 0

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2

    def allreduce(self, tensors: list[Tensor], options: Any) -> None:
        self.sums += 1
        tensors[0] *= 2


def group(comm: Comm) -> SymmetricGroup:
    memory = torch.zeros(MAX_BYTES, dtype=torch.uint8)

    def total(part: Tensor, x: Tensor) -> Tensor:
        assert (part.shape, part.dtype, part.data_ptr()) == (x.shape, x.dtype, memory.data_ptr())
        return x + part.copy_(x)

    return SymmetricGroup(comm, memory, total)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "dtype", "through_memory"),
    [
        ((3, 64), torch.bfloat16, True),
        ((1, 4), torch.float32, True),
        ((MAX_BYTES // 4,), torch.float32, True),
        ((MAX_BYTES // 4 + 4,), torch.float32, False),
        ((3, 64), torch.float16, False),
        ((3, 64), torch.int64, False),
        ((3, 5), torch.bfloat16, False),  # not a multiple of 16 bytes
    ],
)
def test_small_sums_go_through_memory(shape: tuple[int, ...], dtype: torch.dtype, through_memory: bool) -> None:
    comm = Comm()
    x = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
    expected = 2 * x
    result = group(comm).all_reduce(x)
    assert result is x
    assert torch.equal(x, expected)
    assert comm.sums == (not through_memory)


def test_what_begins_in_the_middle_of_a_line_does_not() -> None:
    comm = Comm()
    x = torch.ones(12)
    group(comm).all_reduce(x[1:9])
    assert comm.sums == 1
    assert x.tolist() == [1, *[2] * 8, 1, 1, 1]


def test_failures_are_those_of_a_collective() -> None:
    def broken(part: Tensor, x: Tensor) -> Tensor:
        raise RuntimeError("a barrier timed out")

    of_two = SymmetricGroup(Comm(), torch.zeros(MAX_BYTES, dtype=torch.uint8), broken)  # type: ignore[arg-type]
    with pytest.raises(CollectiveError, match="timed out"):
        of_two.all_reduce(torch.ones(4))


def test_where_it_can_be() -> None:
    assert rendezvous.choose(CUDA, "symmetric") == "symmetric"
    assert rendezvous.choose(CUDA, "auto") == "nccl"
    with pytest.raises(ValueError, match="symmetric does not support the device cpu"):
        rendezvous.choose(CPU, "symmetric")
    with pytest.raises(ValueError, match="symmetric needs all ranks on one machine"):
        rendezvous.choose(CUDA, "symmetric", one_machine=False)
    for _ in range(2):  # a process can have several groups
        store = HashStore()
        comm = dist.ProcessGroup(store, 0, 1)
        with pytest.raises(CollectiveError, match="the GPUs share no memory"):
            symm_mem.join(comm, store, CPU)
        name = store.get("symmetric").decode()
        assert _resolve_process_group(name).rank() == 0  # type: ignore[arg-type]  # where torch's operators look for it
