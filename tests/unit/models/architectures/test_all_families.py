"""Every architecture against transformers: float32 logits and greedy texts of its variants, on one to three ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.architectures import ARCHITECTURES
from models.config import read_config
from parallel.split import split_heads
from tests.support.architecture_variants import ORIGINAL, VARIANTS, WINDOW, transformers_config, write_variant
from tests.support.oracle_models import check_served
from tests.support.profiles import is_all, only_in_all
from tests.support.rig import compiled

LENGTH = 90
RANKS = (1, 2, 3)
KERNELS = (
    *("llama-3.2", "mistral-0.1", "ministral-all-slide", "ministral3", "gemma3-4b", "gemma3-biases", "olmo3-7b"),
    *("smollm3", "phi4-mini", "glm4-yarn", "ernie4_5", "mixtral", "mixtral-window", "qwen3_moe"),
    *("qwen3_moe-plain-layers", "qwen2_moe-grouped", "olmoe-grouped"),
)
"""Variants that are compared on kernels for CPUs, too: all ways to rotate, to slide, and to choose experts."""
RANKED = (
    *("llama-2", "llama-biases", "ministral-8b", "ministral3", "qwen2.5", "qwen2-window", "qwen3", "qwen3-yarn"),
    *("seed_oss-biases", "internlm3-biases", "gemma3-untied", "gemma3-wide-window", "olmo2-grouped"),
    *("olmo3-layer-types", "smollm3-list", "phi3-old", "glm-grouped", "glm4-yarn", "granite-biases"),
    *("ernie4_5-biases", "exaone4-32b", "mixtral", "qwen3_moe-sparse-step", "qwen2_moe-grouped", "olmoe-grouped"),
)
"""Variants that `make test` compares on ranks: of each architecture, most of them not in KERNELS. What is special in
others is in another variant, too. test_gpt_oss.py has gpt-oss."""


@pytest.mark.parametrize("name", [name if name in RANKED else only_in_all(name) for name in VARIANTS])
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    """On texts longer than windows and than the original positions of RoPE. `make test` has two
    ranks for one variant, three for the next."""
    assert max(WINDOW, ORIGINAL) < LENGTH
    ranks, new_tokens = (RANKS, 32) if is_all() else (RANKS[1 + RANKED.index(name) % 2 :][:1], 6)
    check_served(tmp_path, write_variant(VARIANTS[name], tmp_path), ranks=ranks, length=LENGTH, new_tokens=new_tokens)


@pytest.mark.parametrize("name", KERNELS)
def test_equals_transformers_on_cpu_kernels(name: str, tmp_path: Path) -> None:
    theirs = write_variant(VARIANTS[name], tmp_path)
    assert read_config(tmp_path).head_dim % 16 == 0, "plain torch attends with such heads"
    check_served(tmp_path, theirs, ops=compiled(), length=LENGTH)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_variants_split_in_all_ways(model_type: str) -> None:
    """Each architecture has variants whose ranks hold different numbers of heads, and the same KV head."""
    variants = [variant for variant in VARIANTS.values() if variant.model_type == model_type]
    assert variants, f"tests/support/architecture_variants.py has no {model_type}"
    uneven, shared = [], []
    for config in map(transformers_config, variants):
        assert config.vocab_size % 2
        assert config.vocab_size % 3
        for ranks in RANKS[1:]:
            parts = split_heads(config.num_attention_heads, config.num_key_value_heads, ranks)
            uneven.append(len({part.heads.size for part in parts}) > 1)
            shared.append(len({part.kv_heads for part in parts}) < ranks)
    assert any(uneven)
    assert any(shared)


def test_variants_are_of_served_architectures() -> None:
    assert {variant.model_type for variant in VARIANTS.values()} <= ARCHITECTURES.keys()
