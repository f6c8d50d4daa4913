"""Choice of the sums that go through memory shared by GPUs, with a fake of that memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from parallel import rendezvous
from parallel.group import CollectiveError
from parallel.symm_mem import (
    Algorithm,
    Sum,
    SymmetricGroup,
    SymmetricMemory,
    choose_algorithm,
    largest_sums,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, F32 = torch.bfloat16, torch.float32
KB, MB = 1 << 10, 1 << 20


class Comm:
    """Fake process group of ranks that hold the same data."""

    def __init__(self, size: int = 2) -> None:
        self.sums = 0
        self._size = size

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return self._size

    def allreduce(self, tensors: list[Tensor], options: Any) -> None:
        self.sums += 1
        tensors[0] *= self._size


def group(comm: Comm, *, multicast: bool = False) -> tuple[SymmetricGroup, list[Algorithm]]:
    """Returns a group and a list that receives the algorithm of each sum through its memory."""
    used: list[Algorithm] = []
    memory = torch.zeros(max(largest_sums(comm.size(), multicast).values()), dtype=torch.uint8)

    def sum_of(algorithm: Algorithm) -> Sum:
        def add(part: Tensor, out: Tensor) -> None:
            assert (part.shape, part.dtype, part.data_ptr()) == (out.shape, out.dtype, memory.data_ptr())
            assert out.data_ptr() % 16 == 0
            out.copy_(part * comm.size())
            used.append(algorithm)

        return add

    sums: dict[Algorithm, Sum] = {name: sum_of(name) for name in ("one-shot", "two-shot", "multimem")}
    return SymmetricGroup(comm, memory, sums, multicast=multicast), used  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ranks", "multicast", "dtype", "nbytes", "algorithm"),
    [
        (2, False, BF16, 16, "one-shot"),
        (2, False, F32, 512 * KB, "one-shot"),
        (2, True, BF16, 512 * KB + 16, "two-shot"),
        (4, False, BF16, 512 * KB, "one-shot"),
        (8, False, BF16, 256 * KB, "one-shot"),
        (8, False, BF16, 512 * KB, "two-shot"),  # each GPU would read 3.5 MB
        (8, True, BF16, 256 * KB, "one-shot"),
        (8, True, BF16, 512 * KB, "multimem"),
        (8, True, F32, 512 * KB, "two-shot"),  # in the order of ranks
        (8, False, BF16, 8 * MB, "two-shot"),
        (8, False, BF16, 8 * MB + 16, None),
        (8, True, F32, 8 * MB + 16, None),
        (8, True, BF16, 32 * MB, "multimem"),
        (8, True, BF16, 32 * MB + 16, None),
        (4, True, BF16, 8 * MB, "two-shot"),
        (4, True, BF16, 8 * MB + 16, None),
        (2, True, torch.float16, 1024, None),
        (2, True, torch.int64, 1024, None),
        (2, True, torch.float64, 1024, None),
        (2, True, BF16, 30, None),  # not a multiple of 16 bytes
        (2, True, BF16, 0, None),
    ],
)
def test_algorithm_by_size(
    ranks: int, multicast: bool, dtype: torch.dtype, nbytes: int, algorithm: Algorithm | None
) -> None:
    assert choose_algorithm(nbytes, dtype, ranks, multicast) == algorithm


@given(st.integers(1, 16), st.booleans(), st.sampled_from([BF16, F32]), st.integers(0, 3 * MB).map(lambda n: 16 * n))
def test_every_sum_fits_the_memory(ranks: int, multicast: bool, dtype: torch.dtype, nbytes: int) -> None:
    largest = largest_sums(ranks, multicast)
    for (algorithm, of), size in largest.items():
        assert choose_algorithm(size, of, ranks, multicast) == algorithm
        assert choose_algorithm(size + 16, of, ranks, multicast) != algorithm
    chosen = choose_algorithm(nbytes, dtype, ranks, multicast)
    if chosen is not None:
        assert nbytes <= largest[chosen, dtype]
    assert ("multimem", BF16) in largest or not (multicast and ranks > 4)


@pytest.mark.parametrize(
    ("shape", "dtype", "algorithm"),
    [
        ((3, 64), BF16, "one-shot"),
        ((1, 4), F32, "one-shot"),
        ((1, MB), F32, "two-shot"),
        ((64, 8192), BF16, "multimem"),
        ((3, 64), torch.float16, None),
        ((3, 64), torch.int64, None),
        ((3, 5), BF16, None),
    ],
)
def test_sums_go_through_memory(shape: tuple[int, ...], dtype: torch.dtype, algorithm: str | None) -> None:
    comm = Comm(8)
    of_eight, used = group(comm, multicast=True)
    x = torch.arange(torch.Size(shape).numel()).view(shape).remainder(7).to(dtype)
    expected = 8 * x
    assert of_eight.all_reduce(x) is x
    assert torch.equal(x, expected)
    assert used == ([algorithm] if algorithm else [])
    assert comm.sums == (algorithm is None)


def test_tensors_that_begin_in_the_middle_of_a_line() -> None:
    """They are summed by the same algorithm: on other ranks they may begin elsewhere."""
    comm = Comm()
    of_two, used = group(comm)
    x = torch.ones(12)[1:]
    assert x.data_ptr() % 16
    part = x[:8]
    assert of_two.all_reduce(part) is part
    assert (used, comm.sums) == (["one-shot"], 0)
    assert x.tolist() == [*[2] * 8, 1, 1, 1]


def test_sums_with_nccl() -> None:
    comm = Comm()
    of_two, used = group(comm)
    assert of_two.all_reduce_with_nccl(torch.ones(8)).tolist() == [2] * 8
    assert (used, comm.sums) == ([], 1)


def test_failures_are_those_of_a_collective() -> None:
    def broken(part: Tensor, out: Tensor) -> None:
        raise RuntimeError("a barrier timed out")

    memory = torch.zeros(MB, dtype=torch.uint8)
    of_two = SymmetricGroup(Comm(), memory, {"one-shot": broken}, multicast=False)  # type: ignore[arg-type]
    with pytest.raises(CollectiveError, match="timed out"):
        of_two.all_reduce(torch.ones(4))


def test_where_it_can_be() -> None:
    assert rendezvous.choose(CUDA, "symmetric") == "symmetric"
    assert rendezvous.choose(CUDA, "auto") == "symmetric"
    assert rendezvous.choose(CUDA, "auto", one_machine=False) == "nccl"
    assert rendezvous.choose(CUDA, "nccl") == "nccl"
    with pytest.raises(ValueError, match="symmetric does not support the device cpu"):
        rendezvous.choose(CPU, "symmetric")
    with pytest.raises(ValueError, match="symmetric needs all ranks on one machine"):
        rendezvous.choose(CUDA, "symmetric", one_machine=False)


# -- torch's interface, which is private -------------------------------------------------------------------------------


def own(size: int, device: torch.device = CPU) -> SymmetricMemory:
    return SymmetricMemory(dist.ProcessGroup(HashStore(), 0, size), device, "name")


def test_operators_of_this_torch() -> None:
    for operator, schema in {
        "one_shot_all_reduce_out": "(Tensor input, str reduce_op, str group_name, Tensor(a!) out) -> Tensor(a!)",
        "two_shot_all_reduce_": "(Tensor(a!) input, str reduce_op, str group_name) -> Tensor(a!)",
        "two_shot_all_reduce_out": "(Tensor(a!) input, str reduce_op, str group_name, Tensor(b!) output) -> Tensor(b!)",
        "multimem_all_reduce_": "(Tensor(a!) input, str reduce_op, str group_name) -> Tensor(a!)",
    }.items():
        assert str(getattr(torch.ops.symm_mem, operator).default._schema) == f"symm_mem::{operator}{schema}"


@pytest.mark.parametrize("size", range(2, 9))
def test_operators_that_sum(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def fake(name: str) -> Any:
        def operator(part: Tensor, reduce: str, group: str, out: Tensor | None = None) -> Tensor:
            assert (reduce, group) == ("sum", "name")
            called.append(name)
            return (part if out is None else out).copy_(part * size)

        return operator

    names = ("one_shot_all_reduce_out", "two_shot_all_reduce_", "two_shot_all_reduce_out", "multimem_all_reduce_")
    monkeypatch.setattr(torch.ops, "symm_mem", SimpleNamespace(**{name: fake(name) for name in names}))
    for add in own(size).sums().values():
        out = torch.zeros(4)
        add(torch.ones(4), out)
        assert out.tolist() == [size] * 4
    two_shot = "two_shot_all_reduce_out" if size in (2, 4, 8) else "two_shot_all_reduce_"
    assert called == ["one_shot_all_reduce_out", two_shot, "multimem_all_reduce_"]


def test_gpus_without_nvlink(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [[0, 4, 0, 0], [4, 0, 0, 0], [0, 0, 0, 4], [0, 0, 4, 0]]
    found = SimpleNamespace(matrix=pairs)
    monkeypatch.setattr(torch._C._distributed_c10d, "_detect_dma_connectivity", lambda device, kind: found)
    own(2, torch.device("cuda", 1)).check_links()
    for index, pair in ((0, "0 and 2"), (1, "1 and 2"), (2, "0 and 2"), (3, "0 and 3")):
        with pytest.raises(RuntimeError, match=f"no NVLink between GPUs {pair}"):
            own(4, torch.device("cuda", index)).check_links()


def test_without_a_gpu() -> None:
    with pytest.raises(RuntimeError, match="does not support device type cpu"):
        own(2, torch.device("cpu", 0)).allocate()
