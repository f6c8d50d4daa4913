"""Parameter counts and memory sizes of models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from models.config import ModelError
from models.known_shapes import SHAPES
from models.shapes import (
    active_parameters,
    find_shape,
    kv_token_bytes,
    parameters,
    rank_kv_token_bytes,
    rank_matrix_bytes,
    rank_weight_bytes,
)
from tests.support.small_shape import SMALL, SMALL_ACTIVE


class TestShapes:
    @pytest.mark.parametrize(
        ("name", "count"),
        [
            # Parameter counts of the published checkpoints.
            ("llama-2-7b-32k", 6_738_415_616),
            ("llama-3.1-8b", 8_030_261_248),
            ("llama-3.1-70b", 70_553_706_496),
            ("llama-3.2-1b", 1_235_814_400),
            ("qwen3-4b", 4_022_468_096),
            ("qwen3-8b", 8_190_735_360),
            ("smollm2-135m", 134_515_008),
            ("tinyllama-1.1b", 1_100_048_384),
            ("qwen3-32b", 32_762_123_264),
            ("qwen3-30b-a3b", 30_532_122_624),
            ("mixtral-8x7b", 46_702_792_704),
            ("gemma-3-27b", 27_009_346_304),  # of 27,432,406,640 with the vision tower and its projection
            ("gpt-oss-20b", 20_914_757_184),
        ],
    )
    def test_parameters(self, name: str, count: int) -> None:
        assert parameters(SHAPES[name]) == count

    @pytest.mark.parametrize(
        ("name", "billions"),
        [("qwen3-30b-a3b", 3.35), ("mixtral-8x7b", 12.88), ("gpt-oss-20b", 3.61 + 0.58)],
    )
    def test_active_parameters(self, name: str, billions: float) -> None:
        """As published: 3.3, 12.9 and, without the embedding, 3.6 billion."""
        shape = SHAPES[name]
        with_embedding = active_parameters(shape) + shape.vocab_size * shape.hidden_size
        assert round(with_embedding / 1e9, 2) == pytest.approx(billions)

    def test_what_a_token_meets(self) -> None:
        assert active_parameters(SMALL) == SMALL_ACTIVE
        assert parameters(SMALL) == SMALL_ACTIVE + 1000 + 3 * 20 + 10  # embedding, norms
        tied = replace(SMALL, tie_word_embeddings=True)
        assert active_parameters(tied) == SMALL_ACTIVE
        assert parameters(tied) == SMALL_ACTIVE + 3 * 20 + 10

    def test_biases_and_head_norms(self) -> None:
        more = replace(SMALL, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm="head")
        assert parameters(more) - parameters(SMALL) == 3 * ((4 + 2 * 2) * 2 + 10 + (20 + 20 + 10) + 2 * 2)

    def test_kv(self) -> None:
        assert kv_token_bytes(SHAPES["llama-3.1-8b"], 2) == 131_072
        assert kv_token_bytes(SHAPES["llama-2-7b-32k"], 2) == 524_288

    def test_kv_of_fewer_bits(self) -> None:
        """Of each of 256 heads, 64 tokens have 2 · 8192 codes, with 2 float16 for 128 channels and 64 tokens."""
        shape = SHAPES["llama-3.1-8b"]
        for name, drafts, token in (
            ("dense", True, 512),
            ("int8", True, (2 * 8192 + 4 * (128 + 64)) / 64),
            ("int4x2", False, (2 * 8192 + 4 * (128 + 64)) / 64),
            ("int4x2", True, (8192 + 4 * (128 + 64)) / 64),
            ("fp8", True, 256),
        ):
            assert rank_kv_token_bytes(shape, 1, 2, name, drafts=drafts) == 256 * token
            assert rank_kv_token_bytes(shape, 16, 2, name, drafts=drafts) == 32 * token
        assert kv_token_bytes(shape, 2, "int4x2") == rank_kv_token_bytes(shape, 1, 4, "int8")

    def test_kv_heads_stop_shrinking(self) -> None:
        shape = SHAPES["llama-3.1-8b"]
        assert [rank_kv_token_bytes(shape, ranks, 2) for ranks in (1, 2, 8, 16, 32)] == [
            131_072, 65_536, 16_384, 16_384, 16_384
        ]  # fmt: skip
        assert rank_kv_token_bytes(shape, 3, 2) == 131_072 * 3 // 8  # three ranks hold 3, 3 and 2 heads

    def test_rank_weights(self) -> None:
        total = parameters(SMALL)
        assert rank_weight_bytes(SMALL, 1, 2) == 2 * total
        assert rank_weight_bytes(SMALL, 2, 2) == total
        assert rank_weight_bytes(SMALL, 4, 2) == 2 * ((total - 240) / 4 + 120)  # each rank has one of two KV heads

    def test_rank_weights_of_fewer_bits(self) -> None:
        """Embedding, norms and biases stay dense; the head of int4 is int8."""
        layers, others = SMALL_ACTIVE - 1000, parameters(SMALL) - SMALL_ACTIVE
        assert rank_matrix_bytes(SMALL, 1, 2, "int4") == layers * 5 / 8 + 1000
        assert rank_weight_bytes(SMALL, 1, 2, "int4") == layers * 5 / 8 + 1000 + 2 * others
        assert rank_weight_bytes(SMALL, 2, 2, "fp8") == (SMALL_ACTIVE + 2 * others) / 2
        assert rank_matrix_bytes(SMALL, 4, 4, "int8") == (SMALL_ACTIVE - 240) / 4 + 120
        tied = replace(SMALL, tie_word_embeddings=True)
        assert rank_weight_bytes(tied, 1, 2) == rank_weight_bytes(SMALL, 1, 2) - 2000
        assert rank_weight_bytes(tied, 1, 2, "int8") == rank_weight_bytes(SMALL, 1, 2, "int8")

    def test_any_directory_will_do(self, tmp_path: Path) -> None:
        config = {"model_type": "llama", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64}
        config |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 512}
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        assert find_shape(str(tmp_path)).num_kv_heads == 2
        with pytest.raises(ModelError, match=r"'gpt-5' is neither .* llama-3.1-8b"):
            find_shape("gpt-5")
