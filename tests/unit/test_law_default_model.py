"""The law on the default model and real text, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from engine.llm import LLM
from engine.params import SamplingParams
from engine.stats import acceptance
from models.llama import Llama
from models.loader import load_model
from parallel.group import Group

NEW_TOKENS = 100


@pytest.fixture(scope="module")
def model(model_dir: Path) -> Llama:
    return load_model(
        model_dir, dtype=torch.float32, device=torch.device("cpu"), group=Group.single(), progress=False
    )


@pytest.fixture(scope="module")
def plain(model: Llama, model_dir: Path) -> Iterator[LLM]:
    with LLM(str(model_dir), dtype="float32", loaded=model, speculation={"gamma": 0}) as llm:
        yield llm


PROMPTS = {
    "one token": "The",
    "a question": "Explain in two sentences why the sky is blue.\n",
    "a page": topics["assert"][:900],
    "a document": topics["import"][:6000],
}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_speculation_never_changes_text(model: Llama, model_dir: Path, plain: LLM, temperature: float) -> None:
    """A ragged batch, decoded together with speculation, against each prompt decoded alone without."""
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=temperature, seed=7, ignore_eos=True)
    alone = [plain.generate(prompt, params)[0] for prompt in PROMPTS.values()]
    for gamma, budget in ((3, 64), (1, 256), (5, 128)):
        settings = {"gamma": gamma, "kv": {"budget": budget}}
        with LLM(str(model_dir), dtype="float32", loaded=model, speculation=settings) as llm:
            together = llm.generate(list(PROMPTS.values()), params)
            stats = llm.stats
        for expected, completion in zip(alone, together, strict=True):
            assert completion.token_ids == expected.token_ids
            assert completion.text == expected.text
        assert stats.rejections > 0, "the draft was never wrong: nothing was shown"
        assert acceptance(stats) > 0.5


def test_generation_far_past_the_budget(model: Llama, model_dir: Path, plain: LLM) -> None:
    """A thousand new tokens behind a short prompt, with a draft that reads 64."""
    params = SamplingParams(max_tokens=1000, temperature=1.0, seed=1, ignore_eos=True)
    settings = {"gamma": 3, "kv": {"budget": 64}}
    prompts = ["Once upon a time", "def main():"]
    with LLM(str(model_dir), dtype="float32", loaded=model, speculation=settings) as llm:
        drafted = llm.generate(prompts, params)
    for completion, expected in zip(drafted, plain.generate(prompts, params), strict=True):
        assert completion.token_ids == expected.token_ids
        assert len(completion.token_ids) == 1000
