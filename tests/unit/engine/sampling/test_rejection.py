"""Speculative sampling changes the text, but not its distribution."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.batch.round_batch import SamplePositions
from engine.config.deployment import EngineConfig
from engine.core import Engine
from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.speculation.rejection import RejectionSampler
from models.decoder import DecoderModel
from tests.support.engines import complete, run, tiny_engine, tiny_model, tokens
from tests.support.profiles import is_all, only_in_all
from tests.support.rig import PagedRows
from tests.support.workloads import kv_of, prompt_of

PROMPT = prompt_of(40, 3)
KEPT, LENGTH = 3, 4
WAYS: list[dict[str, Any]] = [
    {"temperature": 1.0, "top_k": KEPT},
    {"temperature": 2.5, "top_k": KEPT, "frequency_penalty": 1.0},
]


@cache
def model() -> DecoderModel:
    return tiny_model()


def speculating(drafter: str, draft_dir: Path, gamma: int = 2) -> Engine:
    return tiny_engine(
        model(),
        gamma=gamma,
        max_model_len=112,
        scheduler={"max_rows": 150, "max_batch_tokens": 1200, "max_waiting": 4000},
        cache={"prefix": drafter == "self"},  # the model's ring would have to catch up on every prompt that is found
        speculation={
            "drafter": drafter,
            "model": str(draft_dir) if drafter == "model" else None,
            "verification": "rejection",
            "kv": kv_of("window", 4, 1),
        },
    )


def exact(way: dict[str, Any]) -> dict[tuple[int, ...], float]:
    """Compute the probability of every output of LENGTH tokens from the model's logits alone."""

    def after(output: tuple[int, ...]) -> dict[int, float]:
        rows = PagedRows(model(), [len(PROMPT) + LENGTH], 4)
        text = [*PROMPT, *output]
        logits = rows.forward({0: text}, {0: [len(text) - 1]})[0].clone()
        for token, count in Counter(output).items():
            logits[token] -= way.get("frequency_penalty", 0.0) * count
        best = (logits / way["temperature"]).topk(KEPT)
        return dict(zip(best.indices.tolist(), torch.softmax(best.values, 0).tolist(), strict=True))

    outputs: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        outputs = {(*out, token): p * q for out, p in outputs.items() for token, q in after(out).items()}
    return outputs


@pytest.mark.parametrize(("drafter", "way"), [only_in_all("self", WAYS[0]), ("self", WAYS[1]), ("model", WAYS[0])])
def test_outputs_are_distributed_as_without_speculation(
    draft_dir: Path,
    drafter: str,
    way: dict[str, Any],
) -> None:
    """Chi-square test over all outputs of four tokens. A correct sampler fails with probability 1 in 100,000."""
    count = 3000 if is_all() else 900
    engine = speculating(drafter, draft_dir)
    requests = [
        AddRequest(str(seed), PROMPT, SamplingParams(max_tokens=LENGTH, seed=seed, ignore_eos=True, **way))
        for seed in range(count)
    ]
    seen = Counter(tuple(tokens(outputs)) for outputs in run(engine, requests).values())
    stats = engine.stats()
    assert stats.accepted_tokens > count / 30
    assert stats.rejections > count / 30
    expected = exact(way)
    assert set(seen) <= set(expected)
    common = {output: p * count for output, p in expected.items() if p * count >= 5}
    rare = count - sum(common.values())
    square = sum((seen[output] - mean) ** 2 / mean for output, mean in common.items())
    if rare >= 5:
        square += (sum(n for output, n in seen.items() if output not in common) - rare) ** 2 / rare
    freedom = len(common) - (rare < 5)
    # Quantile by Wilson and Hilferty's approximation, at 4.27 standard deviations.
    limit = freedom * (1 - 2 / (9 * freedom) + 4.27 * math.sqrt(2 / (9 * freedom))) ** 3
    assert square < limit


def test_greedy_rows_are_verified_as_always(draft_dir: Path) -> None:
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    engine = speculating("self", draft_dir, gamma=3)
    assert complete(engine, PROMPT, params) == complete(tiny_engine(model(), gamma=0), PROMPT, params)


def test_without_drafts_it_is_plain_sampling(draft_dir: Path) -> None:
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=4, max_draft_tokens=0, ignore_eos=True)
    engine = speculating("self", draft_dir, gamma=3)
    assert complete(engine, PROMPT, params) == complete(tiny_engine(model(), gamma=0), PROMPT, params)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_drafts_that_are_not_finite_change_nothing(
    draft_dir: Path, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that such a draft says of its token is true, so the target samples by itself."""
    requests = [
        AddRequest(str(seed), PROMPT, SamplingParams(max_tokens=20, seed=seed, ignore_eos=True, **WAYS[seed % 2]))
        for seed in range(8)
    ]
    plain = run(tiny_engine(model(), gamma=0), requests)
    draft = RejectionSampler.draft

    def broken(sampler: RejectionSampler, logits: torch.Tensor, samples: SamplePositions) -> torch.Tensor:
        logits[:, 3] = bad
        return draft(sampler, logits, samples)

    monkeypatch.setattr(RejectionSampler, "draft", broken)
    found = run(speculating("self", draft_dir), requests)
    assert {id: tokens(out) for id, out in found.items()} == {id: tokens(out) for id, out in plain.items()}


def test_the_narrowest_nucleus_is_greedy(draft_dir: Path) -> None:
    new = 60 if is_all() else 25
    greedy = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    narrow = SamplingParams(max_tokens=new, temperature=1.0, top_p=0.0, seed=4, ignore_eos=True)
    expected = complete(tiny_engine(model(), gamma=0), PROMPT, greedy)
    for drafter in ("self", "model"):
        engine = speculating(drafter, draft_dir, gamma=3)
        assert complete(engine, PROMPT, narrow) == expected
        assert engine.stats().rejections > 0
    assert complete(tiny_engine(model(), gamma=3), PROMPT, narrow) == expected


def test_a_draft_that_reads_all_is_never_rejected() -> None:
    engine = tiny_engine(
        model(), gamma=3, budget=256, page_size=8, speculation={"verification": "rejection", "kv": {"budget": 256}}
    )
    complete(engine, PROMPT, SamplingParams(max_tokens=100, temperature=1.0, seed=1, ignore_eos=True))
    assert engine.stats().rejections == 0


def test_needs_the_draft_model_on_all_ranks() -> None:
    with pytest.raises(ValueError, match="rejection needs the draft model on all ranks"):
        EngineConfig.model_validate(
            {
                "tensor_parallel_size": 2,
                "speculation": {
                    "drafter": "model",
                    "model": "m",
                    "tensor_parallel_size": 1,
                    "verification": "rejection",
                },
            }
        )


def test_a_round_that_failed_leaves_no_proposals(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a failed round end; rows that reuse their slots are not verified against its proposals."""
    engine = speculating("self", Path())
    model = engine._worker._target.model
    forward, calls = model.forward, [0]

    def fail(*arguments: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 6:  # a prompt, then rounds of two drafts and a target pass: the last draft of the second round
            raise MemoryError
        return forward(*arguments)

    monkeypatch.setattr(model, "forward", fail)
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=4, ignore_eos=True)
    outputs = run(engine, [AddRequest("fails", PROMPT, params)])
    assert outputs["fails"][-1].error
    plain = SamplingParams(max_tokens=1, temperature=1.0, seed=7, ignore_eos=True)
    for prompt in range(1, 30):
        expected = complete(tiny_engine(tiny_model(), gamma=0), prompt_of(prompt, prompt), plain)
        assert complete(engine, prompt_of(prompt, prompt), plain) == expected
