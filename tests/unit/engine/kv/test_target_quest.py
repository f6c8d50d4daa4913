"""A target that reads part of its KV: the law of that target, and the dense one where its budget covers the context."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.config.deployment import ConfigError
from engine.core import Engine
from engine.kv.quest import QuestPolicy
from engine.kv.target_quest import TargetQuestAttention
from engine.messages import AddRequest, RequestOutput
from engine.params import SamplingParams
from engine.scheduler.controller import DraftReads
from engine.speculation.drafters import SelfDrafter
from kernels.attention.base import AttentionBatch
from kernels.kv.kv_pool import LayerKV
from kernels.reference_ops import ReferenceOps
from models.decoder import DecoderModel
from tests.support.engines import TINY, complete, complete_all, run, tiny_engine, tiny_model, tokens
from tests.support.head_files import write_head_shares
from tests.support.prefix_engines import model_on_kernels
from tests.support.profiles import examples, only_in_all
from tests.support.workloads import SAMPLING, prompt_of

PAGE = 4


@cache
def model() -> DecoderModel:
    return tiny_model()


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Shares of which the first KV head of the first layer and the second one of the other are the lowest."""
    return write_head_shares(tmp_path_factory.mktemp("heads"), [[0.1, 0.9], [0.5, 0.2]])


def engine_of(
    gamma: int = 0, budget: int = 8, interval: int = 3, page: int = PAGE, heads: str | None = None, **settings: Any
) -> Engine:
    target = {"policy": "quest", "budget": budget, "interval": interval, "sink": 4, "window": 2 * page, "heads": heads}
    return tiny_engine(model(), gamma=gamma, page_size=page, target_kv=target, **settings)


@given(
    gamma=st.integers(1, 6),
    policy=st.sampled_from(["window", "snapkv", "quest"]),
    interval=st.integers(1, 5),
    budget=st.integers(1, 4),
    batch_tokens=st.sampled_from([20, 64, 200]),
    pages=st.sampled_from([60, 400]),
    prefix=st.booleans(),
    streams=st.booleans(),
    rows=st.lists(
        st.tuples(st.integers(1, 70), st.integers(1, 40), st.sampled_from(SAMPLING[:9]), st.integers(0, 9)),
        min_size=1,
        max_size=5,
    ),
)
@examples(5, 120)
def test_the_law_of_that_target(
    gamma: int,
    policy: str,
    interval: int,
    budget: int,
    batch_tokens: int,
    pages: int,
    prefix: bool,
    streams: bool,
    heads: str,
    rows: list[tuple[int, int, dict[str, Any], int]],
) -> None:
    """With drafts, chunks, other rows, a prefix cache and preemption: the text of plain decoding, row by row."""
    kv = {"policy": policy, "budget": 16} | ({"recent": 8, "queries": 4} if policy == "snapkv" else {"sink": 4})
    cache = {"num_pages": pages, "prefix": prefix}
    settings: dict[str, Any] = {
        "heads": heads if streams else None,
        "max_model_len": 120,
        "scheduler": {"max_batch_tokens": batch_tokens, "max_rows": 4},
    }
    engine = engine_of(gamma, budget * PAGE, interval, cache=cache, speculation={"kv": kv}, **settings)
    alone = engine_of(0, budget * PAGE, interval, heads=settings["heads"], cache={"prefix": False}, max_model_len=120)
    requests = [
        AddRequest(
            str(i), prompt_of(length, i % 2), SamplingParams(max_tokens=new, seed=i, ignore_eos=True, **sampling)
        )
        for i, (length, new, sampling, _) in enumerate(rows)
    ]
    joins = {str(i): join for i, (*_, join) in enumerate(rows)}
    outputs = run(engine, requests, joins=joins, leaves={})
    for request in requests:
        assert tokens(outputs[request.id]) == complete(alone, request.prompt, request.params)


@pytest.mark.parametrize(("gamma", "interval"), [(5, 3), only_in_all(6, 4), only_in_all(8, 3)])
def test_choices_outlive_a_pass_that_rejects_all_drafts(gamma: int, interval: int) -> None:
    """A pass whose first position ends a group may begin two or more groups after the one that the next pass is in."""
    requests = [
        AddRequest(
            str(i), prompt_of(40 + 7 * i, i), SamplingParams(max_tokens=60, temperature=1.0, seed=i, ignore_eos=True)
        )
        for i in range(3)
    ]
    settings: dict[str, Any] = {"budget": 8, "interval": interval, "max_model_len": 200}
    engine = engine_of(gamma, **settings, speculation={"kv": {"budget": 8, "sink": 4}})
    assert complete_all(engine, requests) == complete_all(engine_of(**settings), requests)
    assert engine.stats().rejections > 50


def test_output_in_a_prompt_is_read_as_a_prompt() -> None:
    """The KV of output is another one than a prompt of the same tokens has, so the prefix cache does not keep it."""
    with_cache, without = engine_of(), engine_of(cache={"prefix": False})
    first, params = prompt_of(50, 1), SamplingParams(max_tokens=40, temperature=1.0, seed=2, ignore_eos=True)
    answer = complete(with_cache, first, params)
    assert answer == complete(without, first, params)
    again = SamplingParams(max_tokens=30, temperature=1.0, seed=3, ignore_eos=True)
    follow_up = [*first, *answer, *prompt_of(7, 4)]
    assert complete(with_cache, follow_up, again) == complete(without, follow_up, again)
    assert with_cache.stats().prefix_hits == 48  # the prompt's full pages, without one of the answer's


@pytest.mark.parametrize("page", [4, only_in_all(16)])
def test_a_budget_over_the_context_is_dense(page: int) -> None:
    dense = tiny_engine(model(), gamma=0, page_size=page)
    params = SamplingParams(max_tokens=80, temperature=1.0, seed=5, ignore_eos=True)
    covering = engine_of(budget=160, page=page)
    requests = [AddRequest(str(i), prompt_of(20 + 13 * i, i), params) for i in range(4)]
    assert complete_all(covering, requests) == complete_all(dense, requests)


def test_sinks_of_heads_whose_lists_differ(heads: str) -> None:
    """Heads with lists of their own are rows, to which sinks are added afterwards."""
    with_sinks = tiny_model(config=replace(TINY, has_sinks=True))
    target = {"policy": "quest", "budget": 160, "interval": 3, "sink": 4, "window": 160, "heads": heads}
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=5, ignore_eos=True)
    requests = [AddRequest(str(i), prompt_of(20 + 13 * i, i), params) for i in range(3)]
    covering = complete_all(tiny_engine(with_sinks, gamma=0, target_kv=target), requests)
    assert covering == complete_all(tiny_engine(with_sinks, gamma=0), requests)


def test_a_small_budget_is_lossy() -> None:
    params = SamplingParams(max_tokens=80, temperature=1.0, seed=5, ignore_eos=True)
    text = complete(engine_of(budget=4), prompt_of(100, 2), params)
    assert text != complete(tiny_engine(model(), gamma=0), prompt_of(100, 2), params)


@pytest.mark.parametrize("gamma", [0, 3])
def test_a_choice_scores_the_full_pages_of_rows_and_no_later_ones(gamma: int) -> None:
    engine = engine_of(gamma, max_model_len=200)
    attention = engine._worker._target.attention
    assert isinstance(attention, TargetQuestAttention)
    scores, scored = attention.summaries.scores, []

    def scores_watched(layer: LayerKV, q: Tensor, pages: Tensor, first: int, ends: Tensor) -> Tensor:
        scored.append(pages.shape[1])
        return scores(layer, q, pages, first, ends)

    attention.summaries.scores = scores_watched  # type: ignore[method-assign]
    complete(engine, prompt_of(50, 2), SamplingParams(max_tokens=21, temperature=1.0, seed=1, ignore_eos=True))
    assert 50 // PAGE <= min(scored) <= (50 + gamma) // PAGE
    assert max(scored) <= (50 + 21 + gamma) // PAGE


@pytest.mark.parametrize("gamma", [only_in_all(0), 3])
def test_a_row_whose_kv_is_no_number_fails_alone(gamma: int) -> None:
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=3, ignore_eos=True)
    requests = [AddRequest(str(i), prompt_of(40 + 9 * i, i), params) for i in range(3)]
    expected = complete_all(engine_of(cache={"prefix": False}), requests)
    engine = engine_of(gamma, cache={"prefix": False})
    for request in requests:
        engine.add(request)
    outputs: dict[str, list[RequestOutput]] = {request.id: [] for request in requests}
    for step in range(100):
        if step == 6:
            (victim,) = (each for each in engine._scheduler.running if each.id == "1")
            assert victim.num_output > 0
            engine._worker._target.pool._data[:, :, victim.pages[3:9]] = float("nan")
            attention = engine._worker._target.attention
            assert isinstance(attention, TargetQuestAttention)
            attention.summaries.bounds[:, :, victim.pages[3:9]] = float("nan")
        for output in engine.step():
            outputs[output.id].append(output)
    assert not engine.has_work()
    assert outputs["1"][-1].error is not None
    for id, found in outputs.items():
        assert tokens(found) == expected[id][: len(tokens(found)) if id == "1" else None]


@pytest.mark.parametrize(
    ("gamma", "streams"), [(4, True), only_in_all(0, True), only_in_all(0, False), only_in_all(4, False)]
)
def test_lists_that_are_filled_a_layer_at_a_time(
    monkeypatch: pytest.MonkeyPatch, heads: str, streams: bool, gamma: int
) -> None:
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=3, ignore_eos=True)
    requests = [AddRequest(str(i), prompt_of(40 + 9 * i, i), params) for i in range(3)]
    settings: dict[str, Any] = {"heads": heads if streams else None}
    expected = complete_all(engine_of(gamma, **settings), requests)
    monkeypatch.setattr("engine.kv.target_lists._LIST_BYTES", 1)
    assert complete_all(engine_of(gamma, **settings), requests) == expected


def test_drafts_by_bounds_share_those_of_the_target() -> None:
    engine = engine_of(4, speculation={"kv": {"policy": "quest", "budget": 8, "sink": 4}})
    target, drafter = engine._worker._target, engine._worker._drafter._drafter
    assert isinstance(drafter, SelfDrafter)
    assert isinstance(drafter._policy, QuestPolicy)
    assert drafter._policy.attention._summaries is target.summaries
    assert not target.observers
    complete(engine, prompt_of(60, 1), SamplingParams(max_tokens=40, temperature=1.0, seed=2, ignore_eos=True))
    assert engine.stats().accepted_tokens > 3


def test_drafts_of_the_target_itself_are_accepted() -> None:
    """A draft that reads everything agrees with a target whose budget covers the context."""
    engine = engine_of(3, 160, speculation={"kv": {"policy": "all"}})
    complete(engine, prompt_of(60, 2), SamplingParams(max_tokens=60, temperature=1.0, seed=1, ignore_eos=True))
    assert engine.stats().rejections == 0


def test_rows_with_the_same_pages_share_no_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReferenceOps, "shared_stretch", lambda self, head_dim: 8)

    def read(count: int) -> int:
        engine = engine_of()
        params = SamplingParams(max_tokens=20, ignore_eos=True)
        complete_all(engine, [AddRequest(str(i), prompt_of(60, 1), params) for i in range(count)])
        return engine.stats().kv_tokens_read

    assert read(3) == 3 * read(1)


def test_it_says_so_when_it_starts(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        assert engine_of(budget=16).stats().target_kv["budget"] == 16
    assert caplog.messages == [
        "target_kv: the target reads at most 26 KV tokens in each KV head for a position after a prompt (policy quest, "
        "budget 16, sink 4, interval 3, streaming_window 0); its text differs from the dense model's"
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_kv": {"policy": "quest", "budget": 30}, "speculation": {"gamma": 0}},
            "target_kv.budget .30. must be a multiple",
        ),
        ({"target_kv": {"policy": "window", "budget": 32}}, "target_kv.policy"),
        (
            {"target_kv": {"policy": "quest"}, "speculation": {"kv": {"policy": "verified"}}},
            "only without target_kv",
        ),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        tiny_engine(model(), gamma=2, page_size=16, **settings)


@given(
    gamma=st.integers(0, 6),
    interval=st.integers(1, 5),
    budget=st.integers(1, 4),
    length=st.integers(1, 60),
)
@examples(4, 60)
def test_what_it_reads_is_counted(gamma: int, interval: int, budget: int, length: int) -> None:
    """The lists that attention gets are as long as the statistics say, and never longer than the log says."""
    engine = engine_of(gamma, budget * PAGE, interval, max_model_len=120, speculation={"kv": {"policy": "topk"}})
    engine._stats._draft_reads = {None: DraftReads(lambda context, budget: 0)}
    attention = engine._worker._target.attention
    assert isinstance(attention, TargetQuestAttention)
    (lists,) = attention._patterns
    batches, plan = [], lists._attention.plan

    def watched(batch: AttentionBatch) -> None:
        batches.append(batch)
        plan(batch)

    lists._attention.plan = watched  # type: ignore[method-assign]
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=1, ignore_eos=True)
    complete(engine, prompt_of(length, 1), params)
    assert all(len(batch.pages) == TINY.num_layers for batch in batches)
    assert engine.stats().kv_tokens_read == sum(sum(batch.kv_lengths) for batch in batches)
    target = engine._config.target_kv
    assert target is not None
    assert max(max(batch.kv_lengths) for batch in batches) <= target.most_read(PAGE)


def test_to_the_bit_on_cpu_kernels() -> None:
    """In bfloat16: drafts, other rows and chunks change no bit; nor does a budget that covers the context."""
    bf16 = model_on_kernels(torch.bfloat16)
    params = SamplingParams(max_tokens=50, temperature=1.0, seed=5, ignore_eos=True)
    requests = [AddRequest(str(i), prompt_of(30 + 21 * i, i), params) for i in range(3)]

    def text(gamma: int, budget: int | None, batch_tokens: int) -> dict[str, list[int]]:
        target = None if budget is None else {"policy": "quest", "budget": budget, "sink": 4}
        scheduler = {"max_batch_tokens": batch_tokens}
        engine = tiny_engine(bf16, gamma=gamma, budget=32, page_size=16, target_kv=target, scheduler=scheduler)
        return complete_all(engine, requests)

    assert text(0, 16, 64) == text(4, 16, 200)
    assert text(0, 160, 64) == text(0, None, 200)
