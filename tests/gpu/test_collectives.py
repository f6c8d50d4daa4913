"""Sums between GPUs, through NCCL and through memory that they share. Every rank is a process that runs this file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import FileStore

from parallel import rendezvous
from parallel.group import Group
from parallel.symm_mem import largest_sums
from parallel.symm_start import SymmetricUnavailable
from tests.support.paths import ROOT

RANKS = min(torch.cuda.device_count(), 8)


NOT_HERE = 77
"""Exit status of a rank without symmetric memory."""


def part(rank: int, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(1000 * rank + size)
    return torch.randint(-8, 8, (size,), generator=generator, device=device).to(dtype)  # sums are exact


def sizes(ranks: int, dtype: torch.dtype) -> set[int]:
    """Numbers of elements, among them those around the limit of each algorithm."""
    limits = {
        nbytes // dtype.itemsize
        for multicast in (False, True)
        for (_, of), nbytes in largest_sums(ranks, multicast).items()
        if of == dtype
    }
    return {1, 64, 4096, 1 << 20} | {limit + more for limit in limits for more in (-16, 0, 16)}


def check(group: Group, device: torch.device) -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.int64):
        for size in sorted(sizes(group.size, dtype)):
            total = sum(part(rank, size, dtype, device) for rank in range(group.size))
            assert isinstance(total, torch.Tensor)
            x = part(group.rank, size, dtype, device)
            assert torch.equal(group.all_reduce(x), total), (dtype, size)
            # These sums depend on the order of their terms, yet every rank must end with the same bits.
            noise = torch.randn(size, generator=torch.Generator(device).manual_seed(group.rank), device=device)
            bits = group.all_reduce(noise.to(dtype)).view(torch.uint8)
            assert (group.all_gather(bits) == bits).all(), (dtype, size)
    for dtype, size in ((torch.float32, 4096), (torch.float32, 1 << 20), (torch.bfloat16, 1 << 22)):
        x, given = torch.zeros(2, size, device=device, dtype=dtype)
        given.fill_(group.rank + 1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(2):  # the second uses the memory at once again
                x.copy_(given)
                group.all_reduce(x)
        for factor in (1, 3):
            given.fill_(factor * (group.rank + 1))
            graph.replay()
            assert (x == factor * group.size * (group.size + 1) // 2).all()


def rank_main(rank: int, size: int, transport: rendezvous.Transport, store: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    try:
        group = rendezvous.join(rendezvous.Join(rank, size, transport, 60), device, FileStore(store, size))
    except SymmetricUnavailable as error:
        print(error, file=sys.stderr)
        sys.exit(NOT_HERE)
    check(group, device)


@pytest.mark.skipif(RANKS < 2, reason="fewer than two CUDA devices are present")
@pytest.mark.parametrize("transport", ["nccl", "symmetric"])
def test_sums_between_gpus(tmp_path: Path, transport: str) -> None:
    command = [sys.executable, "-m", "tests.gpu.test_collectives"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(RANKS), transport, str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(RANKS)
    ]
    for process in ranks:
        _, said = process.communicate(timeout=120)
        if process.returncode == NOT_HERE:
            pytest.skip(said.splitlines()[-1])
        assert process.returncode == 0, said


NO_MEMORY = "without symmetric memory:"


def run_alone(transport: rendezvous.Transport, store: str) -> None:
    """Join a group of one rank, and sum in a captured graph. Prints a reason if that rank has no symmetric memory."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    try:
        group = rendezvous.join(rendezvous.Join(0, 1, transport, 60), device, FileStore(store, 1))
    except RuntimeError as error:
        if transport == "nccl":
            raise
        print(NO_MEMORY, error)
        return
    group.size = 2  # a group of one would leave NCCL out
    for size in (4096, 1 << 20):
        x, given = torch.zeros(2, size, device=device)
        group.all_reduce(x)  # loads kernels, which a capture may refuse
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            x.copy_(given)
            group.all_reduce(x)
        for value in (1.0, 3.0):
            given.fill_(value)
            graph.replay()
            assert (x == value).all(), (size, value)


@pytest.mark.skipif(RANKS < 1, reason="no CUDA device is present")
@pytest.mark.parametrize("transport", ["nccl", "symmetric"])
def test_a_group_of_one(tmp_path: Path, transport: str) -> None:
    """What one GPU can show: NCCL starts, and the calls can be captured and replayed."""
    command = [sys.executable, "-m", "tests.gpu.test_collectives", "0", "1", transport, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=90)
    assert done.returncode == 0, done.stderr
    if NO_MEMORY in done.stdout:
        pytest.skip(done.stdout[done.stdout.index(NO_MEMORY) :].splitlines()[0])


if __name__ == "__main__":
    _, rank, size, transport, store = sys.argv
    way: rendezvous.Transport = "symmetric" if transport == "symmetric" else "nccl"
    if size == "1":
        run_alone(way, store)
    else:
        rank_main(int(rank), int(size), way, store)
