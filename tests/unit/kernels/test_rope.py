from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

from kernels.rope import apply_rope, llama3_frequencies, query_scales, rotary_frequencies, rotary_tables
from models.files.rope_config import parse_rope
from models.parts.rotary import make_rotary, model_frequencies, rotary_factor

CPU = torch.device("cpu")


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1000000.0])
@pytest.mark.parametrize("head_dim", [12, 64, 128])
def test_default_tables_equal_transformers(theta: float, head_dim: int) -> None:
    """Equal to the bit, also for float64: both take the sine of a float32 angle."""
    config = transformers.LlamaConfig(head_dim=head_dim, rope_parameters={"rope_type": "default", "rope_theta": theta})
    frequencies = rotary_frequencies(head_dim, theta)
    assert_same_tables(config, frequencies, 4096)


@pytest.mark.parametrize("original", [64, 8192])
def test_llama3_tables_equal_transformers(original: int) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = transformers.LlamaConfig(
        head_dim=128,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "original_max_position_embeddings": original,
            **scaling,
        },
    )
    plain = rotary_frequencies(128, 500000.0)
    frequencies = llama3_frequencies(plain, original_max_positions=original, **scaling)
    kept, slowed = frequencies == plain, frequencies == plain / 8
    assert kept.any()
    assert slowed.any()
    assert (~kept & ~slowed).any()  # the ramp between them is tested too
    assert_same_tables(config, frequencies, 4096)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1 + i / 100 for i in range(24)],
    "long_factor": [1.5 + 1.7 * i for i in range(24)],
    "original_max_position_embeddings": 512,
    "partial_rotary_factor": 0.75,
}


@pytest.mark.parametrize(
    "parameters",
    [
        YARN,
        {**YARN, "truncate": False, "beta_fast": 20.0, "beta_slow": 2.0},
        {**YARN, "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0},
        {**YARN, "mscale": 0.707},
        {**YARN, "attention_factor": 1.25, "partial_rotary_factor": 0.5},
        {**YARN, "original_max_position_embeddings": 4},  # the slowest pair that is kept is none
        LONGROPE,
        {**LONGROPE, "factor": 2.0},
        {**LONGROPE, "attention_factor": 0.9},
        {"rope_type": "linear", "factor": 3.0, "partial_rotary_factor": 0.25},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
            "partial_rotary_factor": 0.5,
        },
    ],
)
def test_scaled_frequencies_equal_transformers(parameters: dict[str, Any]) -> None:
    """Equal to the bit, from config.json on; so is the factor of cosines and sines."""
    parameters = {"rope_theta": 500000.0, **parameters}
    config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=2048, rope_parameters={**parameters}
    )
    rope = parse_rope({"rope_parameters": parameters}, 2048)
    rotated = rope.num_rotated(64)
    for served in (512, 513):
        expected, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, CPU, seq_len=served)
        assert torch.equal(model_frequencies(rope, rotated, served), expected)
        assert rotary_factor(rope) == factor
        cos, sin = make_rotary(rope, 64, 20, dtype=torch.float32, device=CPU, served=served)
        angles = torch.arange(20)[:, None] * expected
        pairs = rotated // 2
        assert torch.equal(cos[:, :pairs], angles.cos() * factor)
        assert torch.equal(sin[:, :pairs], angles.sin() * factor)
        assert torch.equal(cos[:, pairs:], torch.ones(20, 32 - pairs))
        assert not sin[:, pairs:].any()


def test_query_scales_equal_transformers() -> None:
    positions = torch.tensor([0, 1, 15, 16, 17, 31, 32, 47, 48, 10**6])
    expected = get_llama_4_attn_scale(positions[None], 0.1, 16)[0, 0, :, 0]
    assert torch.equal(query_scales(positions, 0.1, 16), expected)


def assert_same_tables(config: Any, frequencies: torch.Tensor, positions: int) -> None:
    rotary = LlamaRotaryEmbedding(config)
    for dtype in (torch.float32, torch.float64):
        x = torch.empty(0, dtype=dtype)
        expected = rotary(x, torch.arange(positions)[None])
        tables = rotary_tables(frequencies, positions, dtype=dtype, device=CPU)
        for ours, theirs in zip(tables, expected, strict=True):
            assert ours.dtype == dtype
            assert torch.equal(torch.cat([ours, ours], -1), theirs[0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_rotation_equals_transformers(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(1)
    fused = torch.randn(7, 5, 16, generator=generator, dtype=dtype)
    x = fused[:, 1:4]  # a non-contiguous view, like the heads of a fused projection
    cos, sin = rotary_tables(rotary_frequencies(16, 100.0), 50, dtype=dtype, device=CPU)
    positions = torch.tensor([0, 3, 3, 49, 20, 1, 7])
    before = x.clone()
    ours = apply_rope(x, cos[positions], sin[positions])
    assert torch.equal(x, before)
    assert ours.is_contiguous()
    wide = [torch.cat([table[positions]] * 2, -1) for table in (cos, sin)]
    theirs, _ = apply_rotary_pos_emb(x, x, *wide, unsqueeze_dim=1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    assert torch.equal(ours[0], x[0])  # position 0 rotates nothing


def test_sixteen_bits_round_once() -> None:
    x = torch.randn(9, 2, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    cos, sin = rotary_tables(rotary_frequencies(64, 10000.0), 9, dtype=torch.float32, device=CPU)
    rotated = apply_rope(x, cos, sin)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, apply_rope(x.float(), cos, sin).bfloat16())


def test_scores_depend_on_distance_only() -> None:
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 1, 1, 32, generator=generator, dtype=torch.float64).unbind()
    cos, sin = rotary_tables(rotary_frequencies(32, 1000.0), 300, dtype=torch.float64, device=CPU)

    def score(i: int, j: int) -> float:
        return float((apply_rope(q, cos[i, None], sin[i, None]) * apply_rope(k, cos[j, None], sin[j, None])).sum())

    assert score(17, 5) == pytest.approx(score(217, 205), abs=1e-4)
    assert score(17, 5) != pytest.approx(score(17, 6), abs=1e-2)
