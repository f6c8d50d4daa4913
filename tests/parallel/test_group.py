"""Groups over gloo and over shared memory. Every rank is a process that runs this file as a script."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._C._distributed_c10d import FileStore

from models.config import ModelConfig
from models.loader import random_model
from parallel import rendezvous, shm
from parallel.group import CollectiveError, Group
from tests.support.paths import ROOT
from tests.support.profiles import only_in_all
from tests.support.rig import CPU, PagedRows

CONFIG = ModelConfig(
    vocab_size=53,
    hidden_size=40,
    intermediate_size=31,
    num_layers=2,
    num_heads=9,
    num_kv_heads=3,
    head_dim=8,
    max_position_embeddings=64,
    o_bias=True,
)
TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64)


def rank_main(rank: int, size: int, directory: Path, memory: int, *memories: int) -> None:
    """Compute the results of one rank and save them in `directory` as safetensors; then run first_ranks for each count
    of ranks up to all of them. memory: file descriptor of the shared group. memories: one per count."""
    store = FileStore(f"{directory}/store", size)
    gloo = Group(rendezvous.connect(store, rank, size, CPU, timedelta(seconds=60)))
    for name, group in (("gloo", gloo), ("shared", shm.ShmGroup(memory, rank, size, 60))):
        assert (group.rank, group.size) == (rank, size)
        save_file(exercise(group), directory / f"{name}.{rank}.safetensors")
    for count, other in enumerate(memories, 1):
        first_ranks(rank, size, count, directory / str(count), other)


def first_ranks(rank: int, size: int, count: int, directory: Path, memory: int) -> None:
    """Run collectives in the group of all ranks and in that of the first `count`, alternating, over both transports."""
    store = FileStore(f"{directory}/store", -1)
    results = {}
    for name in ("gloo", "shared"):
        how = rendezvous.Join(rank, size, name, 60, fd=memory)
        group = rendezvous.join(how, CPU, store)
        first = rendezvous.join_first(count, how, CPU, store)
        assert (first is not None) == (rank < count)
        for turn in range(3):
            results[f"{name}.all.{turn}"] = group.all_reduce(torch.tensor([10.0**rank + turn]))
            if first is not None:
                assert (first.rank, first.size) == (rank, count)
                results[f"{name}.first.{turn}"] = first.all_gather(torch.tensor([rank + turn]))
    save_file(results, directory / f"{rank}.safetensors")


def exercise(group: Group) -> dict[str, torch.Tensor]:
    rank = group.rank
    results = {}
    for dtype in DTYPES:
        x = torch.tensor([[1, 10], [100, 1000]], dtype=dtype) * (rank + 1)
        results[f"gathered.{dtype}"] = group.all_gather(x)
        assert group.all_reduce(x) is x
        results[f"reduced.{dtype}"] = x
    # These sums depend on the order of their terms, yet every rank must end with the same bits.
    results["noise"] = group.all_reduce(torch.randn(1000, generator=torch.Generator().manual_seed(rank)))
    # More elements than shared memory takes at once, and an odd number of them; then an empty tensor.
    results["large"] = group.all_gather(torch.arange(700_001.0) + rank)
    results["large sum"] = group.all_reduce(torch.arange(700_001, dtype=torch.float64) + rank)
    assert group.all_gather(torch.empty(0, 3)).shape == (group.size, 0, 3)
    model = random_model(CONFIG, 1, torch.float64, CPU, group)
    results["logits"] = PagedRows(model, [len(TEXT)], 4).forward({0: TEXT}, {0: range(len(TEXT))})
    return results


@pytest.fixture(scope="module", params=[only_in_all(2), 3, only_in_all(4)])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """Run rank_main in one process per rank. Returns the number of ranks, and the directory of what they saved."""
    size: int = request.param
    directory = tmp_path_factory.mktemp("ranks")
    for count in range(1, size + 1):
        (directory / str(count)).mkdir()
    command = [sys.executable, "-m", "tests.parallel.test_group"]
    memories = [shm.create(size) for _ in range(1 + size)]
    ranks = [
        subprocess.Popen(
            [*command, *map(str, (rank, size, directory, *memories))],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=memories,
        )
        for rank in range(size)
    ]
    for memory in memories:
        os.close(memory)
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0] * size, "\n".join(errors)
    return size, directory


def test_ranks_in_processes(saved: tuple[int, Path]) -> None:
    """Sums and gathers of every dtype, and a model over as many ranks as it has KV heads, over fewer and over more."""
    size, directory = saved
    for name in ("gloo", "shared"):
        check([load_file(directory / f"{name}.{rank}.safetensors") for rank in range(size)])


def test_a_group_of_the_first_ranks(saved: tuple[int, Path]) -> None:
    size, directory = saved
    for count, rank in product(range(1, size + 1), range(size)):
        results = load_file(directory / str(count) / f"{rank}.safetensors")
        for name in ("gloo", "shared"):
            for turn in range(3):
                assert results[f"{name}.all.{turn}"].tolist() == [sum(10**r for r in range(size)) + size * turn]
                if rank < count:
                    assert results[f"{name}.first.{turn}"].tolist() == [[other + turn] for other in range(count)]


def test_a_group_of_more_ranks_than_there_are() -> None:
    how = rendezvous.Join(0, 2, "gloo", 60)
    for count in (0, 3):
        with pytest.raises(ValueError, match=f"a group of {count} ranks out of 2"):
            rendezvous.join_first(count, how, CPU)


def check(results: list[dict[str, torch.Tensor]]) -> None:
    """results: by rank."""
    size = len(results)
    x = torch.tensor([[1, 10], [100, 1000]])
    for result in results:
        for dtype in DTYPES:
            terms = torch.stack([x.to(dtype) * (rank + 1) for rank in range(size)])
            assert torch.equal(result[f"gathered.{dtype}"], terms)
            torch.testing.assert_close(result[f"reduced.{dtype}"], terms.sum(0))
        assert torch.equal(result["noise"], results[0]["noise"])
        for rank in range(size):
            assert torch.equal(result["large"][rank], torch.arange(700_001.0) + rank)
        assert torch.equal(result["large sum"], result["large"].double().sum(0))

    single = random_model(CONFIG, 1, torch.float64, CPU, Group.single())
    expected = PagedRows(single, [len(TEXT)], 4).forward({0: TEXT}, {0: range(len(TEXT))})
    logits = torch.cat([result["logits"] for result in results], 1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


def test_group_of_one_does_nothing() -> None:
    group = Group.single()
    assert (group.rank, group.size) == (0, 1)
    x = torch.tensor([1.0, 2.0])
    assert group.all_reduce(x) is x
    gathered = group.all_gather(x)
    assert gathered.shape == (1, 2)
    assert gathered.data_ptr() == x.data_ptr()


def test_shared_memory_names_the_rank_that_does_not_come() -> None:
    memory = shm.create(3)
    first, second = (shm.ShmGroup(memory, rank, 3, timeout_s=0.2) for rank in (0, 1))
    os.close(memory)
    waited: list[None] = []
    first.while_waiting = lambda: waited.append(None)
    with pytest.raises(CollectiveError, match=r"rank 1 did not answer within 0\.2 s"):
        first.all_reduce(torch.ones(3))
    with pytest.raises(CollectiveError, match="rank 2 did not answer"):  # rank 0 arrived and has left since
        second.all_reduce(torch.ones(3))
    assert waited


def test_ranks_wait_longer_for_each_other_until_they_have_loaded(tmp_path: Path) -> None:
    joined = threading.Barrier(2)
    waited: list[float] = []

    def run(rank: int) -> None:
        how = rendezvous.Join(rank, 2, "gloo", 0.5, start_timeout_s=60)
        group = rendezvous.join(how, CPU, FileStore(str(tmp_path / "store"), 2))
        joined.wait(60)
        if rank:
            time.sleep(1.5)  # it loads
        began = time.monotonic()
        group.settle()
        if not rank:
            waited.append(time.monotonic() - began)
            with pytest.raises(CollectiveError):
                group.all_reduce(torch.zeros(1))
        joined.wait(60)

    with ThreadPoolExecutor(2) as pool:
        for each in [pool.submit(run, rank) for rank in range(2)]:
            each.result()
    assert waited[0] > 1


if __name__ == "__main__":
    own_rank, ranks, place, *descriptors = sys.argv[1:]
    rank_main(int(own_rank), int(ranks), Path(place), *map(int, descriptors))
