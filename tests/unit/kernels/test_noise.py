"""Sampling noise: pinned integers, one value per (seed, position, token), Gumbel distributed."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.noise import gumbel_noise, noise_bits
from tests.support.profiles import examples

INT64 = st.integers(-(2**63), 2**63 - 1)


def written_out(seed: int, position: int, token: int) -> int:
    """Compute the definition in Python's unbounded integers."""
    m64, m32 = 2**64 - 1, 2**32 - 1

    def mix64(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & m64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & m64
        return x ^ (x >> 31)

    def mix32(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D & m32
        x ^= x >> 15
        x = x * 0x846CA68B & m32
        return x ^ (x >> 16)

    key = mix64(mix64(position + 0x9E3779B97F4A7C15 & m64) + seed & m64)
    return mix32(mix32(token * 0x9E3779B1 & m32 ^ key & m32) + (key >> 32) & m32)


@given(seed=INT64, position=st.integers(0, 2**31), token=st.integers(0, 2**20))
@examples(100, 400)
def test_integers_equal_their_definition(seed: int, position: int, token: int) -> None:
    bits = noise_bits(torch.tensor([seed]), torch.tensor([position]), token, token + 1)
    assert int(bits[0, 0]) & 0xFFFFFFFF == written_out(seed, position, token)


@given(
    start=st.integers(0, 5000),
    count=st.integers(1, 5000),
    rows=st.lists(st.integers(0, 6), min_size=1, max_size=6),
)
@examples(25, 100)
def test_a_tokens_noise_does_not_depend_on_batch_or_shard(start: int, count: int, rows: list[int]) -> None:
    seeds = torch.tensor([3, -9, 2**40, 0, 3, 5, 2**62])
    positions = torch.tensor([0, 7, 7, 12, 1, 100_000, 3])
    whole = gumbel_noise(seeds, positions, 0, 10_000)
    part = gumbel_noise(seeds[rows], positions[rows], start, start + count)
    assert torch.equal(part, whole[rows, start : start + count])


def test_blocks_of_rows_equal_single_rows() -> None:
    seeds, positions = torch.arange(9), torch.arange(9) * 3
    whole = gumbel_noise(seeds, positions, 0, 60_000)
    for row in range(9):
        assert torch.equal(
            whole[row : row + 1], gumbel_noise(seeds[row : row + 1], positions[row : row + 1], 0, 60_000)
        )


def test_distribution_is_gumbel() -> None:
    """Kolmogorov-Smirnov test against exp(-exp(-x)), over tokens, over positions and over seeds."""
    n = 100_000
    samples = {
        "tokens": gumbel_noise(torch.tensor([11]), torch.tensor([5]), 0, n)[0],
        "positions": gumbel_noise(torch.full((n,), 11), torch.arange(n), 17, 18)[:, 0],
        "seeds": gumbel_noise(torch.arange(n), torch.full((n,), 5), 17, 18)[:, 0],
    }
    for over, sample in samples.items():
        assert torch.isfinite(sample).all()
        ordered = sample.double().sort().values
        cdf = torch.exp(-torch.exp(-ordered))
        empirical = (torch.arange(n) + 0.5) / n
        distance = float((cdf - empirical).abs().max())
        assert distance < 1.95 / math.sqrt(n), over  # p = 0.001


def test_neighbours_are_uncorrelated() -> None:
    noise = gumbel_noise(torch.arange(200), torch.zeros(200, dtype=torch.int64), 0, 500).double()
    noise -= noise.mean()
    limit = 4.5 * float(noise.var()) / math.sqrt(noise.numel())
    assert abs(float((noise[1:] * noise[:-1]).mean())) < limit
    assert abs(float((noise[:, 1:] * noise[:, :-1]).mean())) < limit
