"""A mixture of experts on ranks that are processes: the text of one rank, and no text changed by drafts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.config.deployment import EngineConfig
from engine.core import Engine
from engine.messages import AddRequest
from engine.params import SamplingParams
from tests.support.engines import run, tokens
from tests.support.profiles import is_all, whole_test_only_in_all
from tests.support.ranks import settings
from tests.support.tiny import TOKENS, write_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2-MoE whose experts have an odd number of features."""
    path = tmp_path_factory.mktemp("models") / "experts"
    write_tokenizer(path)
    config = transformers.AutoConfig.for_model(
        "qwen2_moe",
        vocab_size=TOKENS,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=256,
        num_experts=7,
        num_experts_per_tok=3,
        moe_intermediate_size=29,
        shared_expert_intermediate_size=31,
        mlp_only_layers=[1],
    )
    torch.manual_seed(3)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    for weight in model.parameters():
        with torch.no_grad():
            weight.normal_(0, 1.5 * weight.shape[-1] ** -0.5) if weight.dim() > 1 else weight.normal_(1, 0.1)
    model.save_pretrained(path)
    return path


def texts(directory: Path, size: int, gamma: int, dtype: str) -> dict[str, list[int]]:
    chosen = settings(gamma, model=str(directory), dtype=dtype, tensor_parallel_size=size, max_model_len=None)
    engine = Engine(EngineConfig.model_validate(chosen), progress=False)
    ways: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 7}]
    requests = [
        AddRequest(str(i), [3 + 7 * j % 300 for j in range(1 + 33 * i)], SamplingParams(max_tokens=20, seed=i, **way))
        for i, way in enumerate(ways)
    ]
    try:
        found = {id: tokens(outputs) for id, outputs in run(engine, requests).items()}
        assert not gamma or engine.stats().rejections > 0
    finally:
        engine.close()
    return found


def test_ranks_never_change_output(directory: Path) -> None:
    size = 3 if is_all() else 2
    assert texts(directory, size, 2, "float64") == texts(directory, 1, 0, "float64")


@whole_test_only_in_all
def test_drafts_never_change_output_on_kernels(directory: Path) -> None:
    assert texts(directory, 2, 3, "bfloat16") == texts(directory, 2, 0, "bfloat16")
