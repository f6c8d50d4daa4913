"""Groups over gloo: every rank is a process of its own, running this file as a script."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from models.config import ModelConfig
from models.loader import random_model
from parallel.group import Group
from tests.rig import CPU, PagedRows

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


def rank_main(rank: int, size: int, directory: Path) -> None:
    """What one rank computes, left in `directory` as safetensors."""
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=size)
    comm = dist.group.WORLD
    assert comm is not None
    group = Group(comm)
    assert (group.rank, group.size) == (rank, size)
    results = {}
    for dtype in DTYPES:
        x = torch.tensor([[1, 10], [100, 1000]], dtype=dtype) * (rank + 1)
        results[f"gathered.{dtype}"] = group.all_gather(x)
        assert group.all_reduce(x) is x
        results[f"reduced.{dtype}"] = x
    # Sums that depend on the order of their terms: every rank must still end with the same bits.
    results["noise"] = group.all_reduce(torch.randn(1000, generator=torch.Generator().manual_seed(rank)))
    model = random_model(CONFIG, 1, torch.float64, CPU, group)
    results["logits"] = PagedRows(model, [len(TEXT)], 4).forward({0: TEXT}, {0: range(len(TEXT))})
    save_file(results, directory / f"{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_in_processes(size: int, tmp_path: Path) -> None:
    """Sums and gathers of every dtype, and a model over fewer and over more ranks than it has KV heads."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.parallel.test_group"]
    ranks = [
        subprocess.Popen([*command, str(rank), str(size), str(tmp_path)], cwd=root, stderr=subprocess.PIPE, text=True)
        for rank in range(size)
    ]
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0] * size, "\n".join(errors)

    results = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(size)]
    x = torch.tensor([[1, 10], [100, 1000]])
    for result in results:
        for dtype in DTYPES:
            terms = torch.stack([x.to(dtype) * (rank + 1) for rank in range(size)])
            assert torch.equal(result[f"gathered.{dtype}"], terms)
            torch.testing.assert_close(result[f"reduced.{dtype}"], terms.sum(0))
        assert torch.equal(result["noise"], results[0]["noise"])

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


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
