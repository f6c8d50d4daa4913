"""A workload for engines of several ranks, and its reference output from one rank."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from engine.messages import AddRequest, RequestOutput
from engine.params import SamplingParams
from kernels.ops import Ops
from kernels.reference_ops import REFERENCE
from models.config import ModelConfig
from parallel.matrix_layer import AS_STORED, WeightChoice
from tests.support.engines import run
from tests.support.ranks import threaded_engine
from tests.support.rig import compiled


def model(heads: int, kv_heads: int) -> ModelConfig:
    """Model shape with odd sizes in every dimension that ranks split."""
    return ModelConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=31,
        num_layers=2,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=256,
        eos_token_ids=(1,),
    )


SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 1.0, "logprobs": 0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8, "logprobs": 20},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 0.0, "presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"temperature": 1.0, "repetition_penalty": 1.4, "frequency_penalty": -0.3, "top_k": 3},
    {"temperature": 1.0, "logit_bias": {5: 3.0, 9: -100.0, 40: 1.0}},
    {"temperature": 1.0, "min_tokens": 20, "logit_bias": {1: 5.0}},
]


NEW_TOKENS = 14


def requests() -> list[AddRequest]:
    """One request per sampling configuration, with prompts of 1 to 37 tokens."""
    return [
        AddRequest(
            str(i),
            [2 + (7 * j + i) % 59 for j in range(1 + 4 * i)],
            SamplingParams(max_tokens=NEW_TOKENS + i % 3, seed=i, **sampling),
        )
        for i, sampling in enumerate(SAMPLING)
    ]


def ops_of(on_kernels: bool) -> Ops:
    return compiled() if on_kernels else REFERENCE


@cache
def alone(
    shape: tuple[int, int], dtype: torch.dtype, on_kernels: bool = False, weights: WeightChoice = AS_STORED
) -> dict[str, list[RequestOutput]]:
    """Run the requests on one rank without speculation, as the reference."""
    engine, _ = threaded_engine(model(*shape), 1, gamma=0, dtype=dtype, ops=ops_of(on_kernels), weights=weights)
    return run(engine, requests())
