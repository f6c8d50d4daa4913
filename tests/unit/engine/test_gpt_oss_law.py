"""Text of a model like gpt-oss does not depend on drafts: sinks, sliding layers, and experts with biases."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from engine.messages import AddRequest, RequestOutput
from engine.params import SamplingParams
from kernels.ops import Ops
from kernels.reference_ops import REFERENCE
from models.decoder import DecoderModel
from models.files.rope_config import RopeConfig
from models.model_config import ExpertsConfig, ModelConfig
from tests.support.engines import run, tiny_engine, tiny_model, tokens
from tests.support.profiles import is_all, only_in_all
from tests.support.rig import compiled
from tests.support.workloads import kv_of

SHAPE = ModelConfig(
    model_type="gpt_oss",
    vocab_size=211,
    hidden_size=64,
    intermediate_size=40,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    rope=RopeConfig(theta=150000.0, kind="yarn", factor=8.0, original_max_positions=64, truncate=False),
    qkv_bias=True,
    o_bias=True,
    has_sinks=True,
    activation="clamped_silu",
    sliding_window=12,
    sliding_layers=(0, 2),
    experts=ExpertsConfig(count=8, per_token=3, size=40, biased=True),
)
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 1.0, "logprobs": 0},
    {"temperature": 0.8, "top_k": 12, "top_p": 0.9},
    {"temperature": 0.0},
]
KERNELS = [("reference", torch.float64), ("compiled", torch.float32), ("compiled", torch.bfloat16)]
WAYS = [(1, "window", "self"), (2, "verified", "together"), (3, "quest", "together")]
WAYS += [(3, "window", "self"), (3, "snapkv", "together")]
"""Numbers of drafts, policies and drafters. `make test` has the first with the first kernels, and so on."""


def requests() -> list[AddRequest]:
    """Prompts of 1 to 94 tokens, most longer than the window; rows leave at different times."""
    shortest = 30 if is_all() else 14
    return [
        AddRequest(
            str(i),
            [2 + (7 * j + 3 * i) % 209 for j in range(1 + 31 * i)],
            SamplingParams(max_tokens=shortest + 6 * i, seed=i, ignore_eos=True, **sampling),
        )
        for i, sampling in enumerate(SAMPLING)
    ]


@cache
def model(kernels: str, dtype: torch.dtype) -> DecoderModel:
    ops: Ops = REFERENCE if kernels == "reference" else compiled()
    return tiny_model(seed=1, dtype=dtype, config=SHAPE, ops=ops)


def told(outputs: list[RequestOutput]) -> tuple[list[int], list[float]]:
    """Tokens, and their log-probabilities."""
    return tokens(outputs), [at.logprob for output in outputs for at in output.logprobs or ()]


@pytest.mark.parametrize(
    ("kernels", "dtype", "gamma", "policy", "drafter"),
    [(*on, *way) if i == j else only_in_all(*on, *way) for i, on in enumerate(KERNELS) for j, way in enumerate(WAYS)],
    ids=str,
)
def test_speculation_never_changes_text(
    kernels: str, dtype: torch.dtype, gamma: int, policy: str, drafter: str
) -> None:
    """On compiled kernels log-probabilities are the same to the bit, too."""
    served = model(kernels, dtype)
    plain = tiny_engine(served, gamma=0)
    expected = {each.id: told(run(plain, [each])[each.id]) for each in requests()}
    speculation = {"drafter": drafter, "kv": kv_of(policy, 4, 2)}
    engine = tiny_engine(served, gamma=gamma, page_size=4, speculation=speculation)
    found = {id: told(each) for id, each in run(engine, requests()).items()}
    if kernels == "compiled":
        assert found == expected
    assert {id: said for id, (said, _) in found.items()} == {id: said for id, (said, _) in expected.items()}
    stats = engine.stats()
    assert stats.accepted_tokens > 0
    assert stats.rejections > 0, "the draft was never wrong: nothing was shown"
