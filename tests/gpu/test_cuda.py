"""The CPU tests' properties on a CUDA device: kernels against the CPU, and unchanged output on a tiny model."""

from __future__ import annotations

import pytest
import torch

from engine.messages import AddRequest
from engine.params import SamplingParams
from kernels.attention.base import AttentionBatch
from kernels.attention.reference_attention import ReferenceAttention
from kernels.kv.kv_pool import LayerKV
from kernels.noise import gumbel_noise, noise_bits
from models.loader import random_model
from parallel.group import Group
from tests.support.engines import TINY, run, tiny_engine, tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is present")

CUDA = torch.device("cuda")


def test_noise_has_the_same_integers_as_on_the_cpu() -> None:
    seeds = torch.tensor([0, 7, -(2**63), 2**63 - 1])
    positions = torch.tensor([0, 1, 4096, 100_000])
    bits = noise_bits(seeds.to(CUDA), positions.to(CUDA), 0, 50_000)
    assert torch.equal(bits.cpu(), noise_bits(seeds, positions, 0, 50_000))
    noise = gumbel_noise(seeds.to(CUDA), positions.to(CUDA), 0, 50_000)
    torch.testing.assert_close(noise.cpu(), gumbel_noise(seeds, positions, 0, 50_000), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_equals_the_cpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shape = (80, 2, 16, 64)
    layer = LayerKV(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype))
    q = torch.randn(1 + 4 + 200, 8, 64).to(dtype)
    pages = torch.randperm(80)[:75].view(3, 25)
    backend = ReferenceAttention(16)
    backend.plan(AttentionBatch([1, 4, 200], [30, 400, 333], pages))
    expected, _ = backend.run(layer, q, 0.125)
    backend.plan(AttentionBatch([1, 4, 200], [30, 400, 333], pages.to(CUDA)))
    out, _ = backend.run(LayerKV(layer.k.to(CUDA), layer.v.to(CUDA)), q.to(CUDA), 0.125)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2  # both sides compute in float32
    torch.testing.assert_close(out.cpu(), expected, rtol=tolerance, atol=tolerance / 10)


def test_speculation_never_changes_output() -> None:
    """The law in float64, so that batch shapes cannot tip a near tie. Only plain torch has float64."""
    model = random_model(TINY, seed=0, dtype=torch.float64, device=CUDA, group=Group.single())
    requests = [
        AddRequest(
            str(i),
            [2 + (i * 7 + j) % 60 for j in range(1 + 17 * i)],
            SamplingParams(max_tokens=60, temperature=i % 2, seed=i, ignore_eos=True, frequency_penalty=0.1 * i),
        )
        for i in range(6)
    ]
    plain = run(tiny_engine(model, gamma=0), requests)
    engine = tiny_engine(model, gamma=3, budget=32)
    drafted = run(engine, requests)
    assert {name: tokens(out) for name, out in drafted.items()} == {name: tokens(out) for name, out in plain.items()}
    stats = engine.stats()
    assert stats.rejections > 0
    assert stats.draft_seconds > 0
