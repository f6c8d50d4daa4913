"""Output with speculation equals output without, token for token. Here in float64, on a tiny random model."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.batch.round_batch import RoundBatch
from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.plan import RowStart
from engine.scheduler.stats import acceptance_rate
from engine.speculation.verify import Verdict
from models.decoder import DecoderModel
from tests.support.engines import complete, complete_all, run, tiny_engine, tiny_model, tokens
from tests.support.profiles import examples, is_all, only_in_all
from tests.support.workloads import EDGES, SAMPLING, prompt_of


@cache
def model() -> DecoderModel:
    return tiny_model()


@given(
    gamma=st.integers(1, 6),
    page_size=st.sampled_from([1, 2, 4, 8, 16]),
    budget_pages=st.integers(1, 6),
    batch_tokens=st.sampled_from([64, 80, 200]),
    rows=st.lists(
        st.tuples(
            st.sampled_from(EDGES),  # prompt length
            st.integers(1, 40),  # new tokens
            st.sampled_from(SAMPLING),
            st.integers(-5, 5),  # seed
            st.integers(0, 12),  # joins at this step
            st.sampled_from([None, None, None, 1, 4, 9]),  # aborted at this step
            st.sampled_from([None, None, 0, 2]),  # its own limit on drafts
        ),
        min_size=1,
        max_size=7,
    ),
)
@examples(8, 120)
def test_speculation_never_changes_output(
    gamma: int,
    page_size: int,
    budget_pages: int,
    batch_tokens: int,
    rows: list[tuple[int, int, dict[str, Any], int, int, int | None, int | None]],
) -> None:
    """Ragged batches that rows join and leave, with any page size, budget and gamma, against each row decoded alone and
    plainly."""
    sink_pages = -(-min(4, page_size) // page_size)
    engine = tiny_engine(
        model(),
        gamma=gamma,
        page_size=page_size,
        budget=(sink_pages + budget_pages) * page_size,
        scheduler={"max_batch_tokens": batch_tokens},
    )
    plain = tiny_engine(model(), gamma=0, page_size=16)
    requests: list[AddRequest] = []
    joins: dict[str, int] = {}
    leaves: dict[str, int] = {}
    limits: dict[str, int] = {}
    for i, (length, new, sampling, seed, join, leave, limit) in enumerate(rows):
        params = SamplingParams(max_tokens=new, seed=seed, max_draft_tokens=limit, **sampling)
        requests.append(AddRequest(str(i), prompt_of(length, i), params))
        joins[str(i)] = join
        limits[str(i)] = gamma if limit is None else limit
        if leave is not None:
            leaves[str(i)] = leave
    outputs = run(engine, requests, joins=joins, leaves=leaves)
    oracle = complete_all(plain, requests)
    for request in requests:
        expected, got = oracle[request.id], tokens(outputs[request.id])
        if request.id in leaves:
            assert got == expected[: len(got)]
        else:
            assert got == expected
            assert outputs[request.id][-1].finish_reason is not None
        for output in outputs[request.id]:
            assert output.accepted <= output.drafted <= min(gamma, limits[request.id])
            assert len(output.tokens) <= output.drafted + 1


@pytest.mark.parametrize("temperature", [only_in_all(0.0), 1.0])
def test_hundreds_of_tokens_past_a_small_budget(temperature: float) -> None:
    prompt = prompt_of(100, 1)
    new = 250 if is_all() else 130
    params = SamplingParams(max_tokens=new, temperature=temperature, seed=3, ignore_eos=True)
    plain = complete(tiny_engine(model(), gamma=0), prompt, params)
    engine = tiny_engine(model(), gamma=3, budget=64, page_size=16)
    assert complete(engine, prompt, params) == plain
    assert len(plain) == new
    stats = engine.stats()
    # The draft must be neither always right nor always wrong, or the equality above shows little.
    assert stats.rejections > 10
    assert stats.accepted_tokens > 10


def test_budget_covering_the_context_accepts_everything() -> None:
    """A dense draft with the target's weights equals the target."""
    engine = tiny_engine(model(), gamma=4, budget=256, page_size=8)
    params = SamplingParams(max_tokens=100, temperature=1.0, seed=5, ignore_eos=True)
    complete(engine, prompt_of(100, 2), params)
    stats = engine.stats()
    assert stats.rejections == 0
    assert acceptance_rate(stats) == 1.0
    assert stats.accepted_tokens == sum(stats.accepted_per_position) > 50


@given(pages=st.integers(35, 60), gamma=st.integers(0, 4), seed=st.integers(0, 50))
@examples(3, 50)
def test_preemption_changes_nothing(pages: int, gamma: int, seed: int) -> None:
    """In a pool too small for the batch, rows are preempted and recomputed, and end with the same tokens."""
    cache = {"num_pages": pages, "memory_gb": 1.0}
    engine = tiny_engine(model(), gamma=gamma, cache=cache, max_model_len=140)
    plain = tiny_engine(model(), gamma=0)
    rng, longest = random.Random(seed), 90 if is_all() else 60
    requests = [
        AddRequest(
            str(i),
            prompt_of(rng.randrange(1, 50), seed + i),
            SamplingParams(
                max_tokens=rng.randrange(20, longest),
                ignore_eos=True,
                seed=i,
                **rng.choice(SAMPLING[:9]),
            ),
        )
        for i in range(6)
    ]
    assert complete_all(engine, requests) == complete_all(plain, requests)


def test_a_batch_gives_each_row_what_it_gets_alone() -> None:
    """Without speculation; so the other tests may take a batch for their oracle."""
    engine, new = tiny_engine(model(), gamma=0), 30 if is_all() else 15
    requests = [
        AddRequest(str(i), prompt_of(EDGES[i], i), SamplingParams(max_tokens=new, seed=i, **sampling))
        for i, sampling in enumerate(SAMPLING)
    ]
    alone = {request.id: complete(engine, request.prompt, request.params) for request in requests}
    assert complete_all(engine, requests) == alone


def test_that_pool_does_preempt() -> None:
    engine = tiny_engine(model(), gamma=2, cache={"num_pages": 35}, max_model_len=140)
    params = SamplingParams(max_tokens=80 if is_all() else 40, ignore_eos=True)
    run(engine, [AddRequest(str(i), prompt_of(40, i), params) for i in range(5 if is_all() else 3)])
    assert engine.stats().preemptions > 0


def test_a_row_that_does_not_speculate_drafts_nothing() -> None:
    engine = tiny_engine(model(), gamma=3)
    quiet = SamplingParams(max_tokens=30, max_draft_tokens=0, ignore_eos=True)
    eager = SamplingParams(max_tokens=30, ignore_eos=True)
    outputs = run(engine, [AddRequest("quiet", prompt_of(9, 1), quiet), AddRequest("eager", prompt_of(9, 1), eager)])
    assert tokens(outputs["quiet"]) == tokens(outputs["eager"])
    assert all(output.drafted == 0 for output in outputs["quiet"])
    assert len(outputs["quiet"]) == 30 > len(outputs["eager"])


class Silent:
    """Drafter that proposes no drafts, fewer than requested, or nonsense."""

    def __init__(self, placed: int) -> None:
        self._placed = placed

    def start(self, start: RowStart) -> None:
        pass

    def propose(self, batch: RoundBatch) -> Tensor:
        for step in range(min(self._placed, batch.gamma_max)):
            samples = batch.draft_samples([step])
            batch.place_drafts(samples, torch.full_like(samples.position, 7 + step))
        return batch.gamma_device.clamp(max=self._placed)

    def observe(self, batch: RoundBatch, verdict: Verdict) -> None:
        pass


@pytest.mark.parametrize("placed", [0, 1, 3])
def test_no_drafter_can_change_the_output(placed: int) -> None:
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=9, ignore_eos=True, frequency_penalty=0.5)
    expected = complete(tiny_engine(model(), gamma=0), prompt_of(30, 4), params)
    engine = tiny_engine(model(), gamma=3)
    engine._worker._drafter = Silent(placed)  # type: ignore[assignment]
    assert complete(engine, prompt_of(30, 4), params) == expected
    stats = engine.stats()
    assert (stats.draft_tokens > 0) == (placed > 0)
    assert stats.draft_tokens <= placed * stats.rounds
    assert stats.accepted_tokens <= stats.draft_tokens
