"""Speculation leaves the text of the default model unchanged: in float32, and in bfloat16 on compiled kernels, with
drafts of int4 weights."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import msgspec
import pytest
import torch

from engine.llm import LLM, Completion
from engine.messages import EngineStats
from engine.params import SamplingParams
from engine.scheduler.stats import acceptance_rate
from kernels.reference_ops import REFERENCE
from models.decoder import DecoderModel
from models.loader import load_model
from parallel.group import Group
from parallel.matrix_layer import WeightChoice
from tests.support.profiles import is_all, only_in_all
from tests.support.rig import CPU, compiled

NEW_TOKENS = 120 if is_all() else 14

PROMPTS = (
    "The",
    "Explain in two sentences why the sky is blue.\n",
    topics["assert"][: 900 if is_all() else 350],
    topics["import"][: 6000 if is_all() else 500],
)
KINDS = ["float32 reference", "bfloat16 compiled"]


@pytest.fixture(scope="module")
def model(model_dir: Path, request: pytest.FixtureRequest) -> DecoderModel:
    dtype, ops = (torch.float32, REFERENCE) if "reference" in request.param else (torch.bfloat16, compiled())
    place: dict[str, Any] = {
        "dtype": dtype,
        "device": CPU,
        "ops": ops,
        "weights": WeightChoice(drafts=None if ops is REFERENCE else "int4"),
    }
    return load_model(model_dir, group=Group.single(), progress=False, **place)


@pytest.fixture(scope="module")
def plain(model: DecoderModel, model_dir: Path) -> list[Completion]:
    """Plain completions of the prompts, greedy and sampled."""
    return complete(model, model_dir, {"gamma": 0})[0]


def complete(model: DecoderModel, model_dir: Path, speculation: dict[str, Any]) -> tuple[list[Completion], EngineStats]:
    prompts, params = [], []
    for turn, temperature in enumerate((0.0, 0.8)):
        for prompt in PROMPTS if is_all() else PROMPTS[turn::2]:
            prompts.append(prompt)
            params.append(SamplingParams(max_tokens=NEW_TOKENS, temperature=temperature, seed=7, ignore_eos=True))
    with LLM(str(model_dir), loaded=model, speculation=speculation) as llm:
        return llm.generate(prompts, params), llm.stats


@pytest.mark.parametrize("model", [only_in_all(KINDS[0]), KINDS[1]], indirect=True, scope="module")
@pytest.mark.parametrize("policy", ["window", only_in_all("verified"), only_in_all("quest")])
def test_speculation_never_changes_text(
    model: DecoderModel, model_dir: Path, plain: list[Completion], policy: str
) -> None:
    """A ragged batch, prompts of 1 to 100 tokens or more, most of which outgrow the budget. In `make test`,
    test_policy_law.py has the reference, with small models."""
    drafted, stats = complete(model, model_dir, {"gamma": 4, "kv": {"policy": policy, "budget": 64}})
    for completion, expected in zip(drafted, plain, strict=True):
        assert completion.token_ids == expected.token_ids
        assert completion.text == expected.text
        assert len(completion.token_ids) == NEW_TOKENS
    assert stats.rejections > 0, "the draft was never wrong: nothing was shown"
    assert acceptance_rate(stats) > 0.5


@pytest.mark.parametrize(
    ("model", "threads"),
    [
        ("bfloat16 compiled", 2),
        only_in_all("bfloat16 compiled", 1),
        *(only_in_all("float32 reference", threads) for threads in (1, 2)),
    ],
    indirect=["model"],
    scope="module",
)
def test_speculation_never_changes_what_threads_add_up(model: DecoderModel, model_dir: Path, threads: int) -> None:
    """The cut of this nucleus falls between two tokens of nearly the same probability. Log-probabilities are equal to
    the bit where kernels compute each row by itself."""
    prompt = [3805, 10190, 2235, 277, 5972, 2526, 803, 725, 3723, 288, 253, 1398]
    params = SamplingParams(seed=11, top_p=0.7099913454524601, max_tokens=8, ignore_eos=True, logprobs=5)
    speculation = {"gamma": 3, "kv": {"budget": 128}}
    with LLM(str(model_dir), loaded=model, threads=threads, speculation=speculation, max_model_len=256) as llm:
        (drafted,) = llm.generate(prompt, params)
        (plain,) = llm.generate(prompt, msgspec.structs.replace(params, max_draft_tokens=0))
        batch = llm.generate([prompt, *([9 + i, 77] for i in range(5))], params)
        assert llm.stats.drafts
    assert drafted.token_ids == plain.token_ids == batch[0].token_ids
    if model.ops.kind == "cpu":
        assert drafted.logprobs == plain.logprobs == batch[0].logprobs
