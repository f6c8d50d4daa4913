"""Text of a model with sliding layers does not depend on drafts, chunks, prefix hits, preemption or lost rounds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.batch.runner import Runner
from engine.config.deployment import ConfigError, EngineConfig
from engine.core import Engine
from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.scheduler.sliding_pages import max_sliding_pages
from engine.worker.resolve import resolve
from kernels.attention.base import AttentionBatch
from kernels.kv.kv_bits import SEALED_GROUP
from models.batch import ForwardBatch, SlidingKV
from models.decoder import DecoderModel
from models.files.rope_config import RopeConfig
from models.model_config import ModelConfig
from tests.support.conversations import Turn, check_answers, check_hits, crowd, play, random_turns
from tests.support.engines import TINY, Scripted, run, tiny_engine, tiny_model, tokens
from tests.support.prefix_engines import VARYING, trouble
from tests.support.profiles import examples, is_all, only_in_all
from tests.support.ranks import DRAFT, write_random_model
from tests.support.workloads import SAMPLING, kv_of, prompt_of

WINDOW, LONGEST = 10, 150
LONG = 1000 if is_all() else 300
SHAPES: dict[str, ModelConfig] = {
    "most layers": replace(
        TINY, num_layers=3, sliding_window=WINDOW, sliding_layers=(0, 2), sliding_rope=RopeConfig(theta=100.0)
    ),
    "all layers": replace(TINY, num_layers=2, sliding_window=WINDOW, sliding_layers=(0, 1)),
}
POLICIES = ["all", "window", "relative", "verified", "quest", "snapkv", "topk"]


@cache
def target(layers: str) -> DecoderModel:
    return tiny_model(config=SHAPES[layers])


def policies_of(layers: str) -> list[str]:
    """Policies that such a model has: see the refusals below."""
    refused = {"most layers": "relative", "all layers": "verified"}
    return [policy for policy in POLICIES if policy != refused[layers]]


def engine_of(
    layers: str, gamma: int, policy: str = "all", page_size: int = 4, drafter: str = "self", **settings: Any
) -> Engine:
    return tiny_engine(
        target(layers),
        gamma=gamma,
        page_size=page_size,
        speculation={"kv": kv_of(policy, page_size, 3), "drafter": drafter},
        cache={"num_pages": 600, "memory_gb": None} | settings.pop("cache", {}),
        scheduler={"max_rows": 6} | settings.pop("scheduler", {}),
        max_model_len=settings.pop("max_model_len", LONGEST),
        **settings,
    )


@cache
def plain(layers: str, kv_format: str = "dense") -> Engine:
    settings: dict[str, Any] = {"max_model_len": 6 * SEALED_GROUP, "scheduler": {"max_batch_tokens": 600}}
    page = SEALED_GROUP if kv_format in ("int8", "int4x2") else 16
    return engine_of(layers, 0, page_size=page, cache={"prefix": False, "format": kv_format}, **settings)


# -- the oracle ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def logprobs_of(model: DecoderModel, text: Sequence[int]) -> Tensor:
    """Compute the log-probabilities of all tokens after each position of a text, in one forward over it."""
    count = len(text)
    position, pages = torch.arange(count), torch.zeros(1, 1, dtype=torch.int64)
    attention = model.ops.attention(count, model.head_dim)
    sliding = None
    if model.num_sliding_layers:
        sliding = SlidingKV(model.make_sliding_pool(1, count), model.ops.attention(count, model.head_dim))
    batch = ForwardBatch(
        torch.tensor(text),
        position,
        position,
        position,
        attention=AttentionBatch([count], [count], pages, window=model.window),
        logit_index=position,
        sliding_attention=AttentionBatch([count], [count], pages, window=model.sliding_window),
    )
    return model.forward(batch, model.make_pool(1, count), attention, sliding).log_softmax(-1)


@pytest.mark.parametrize("layers", SHAPES)
def test_plain_decoding_is_the_model(layers: str) -> None:
    """Each token has the log-probability that one forward over the whole text gives to it, and is the likeliest one
    where it is not sampled."""
    requests = [
        AddRequest(str(i), prompt_of(length, i), SamplingParams(max_tokens=40, seed=i, logprobs=0, **SAMPLING[i % 2]))
        for i, length in enumerate((1, 9, 10, 63))
    ]
    for request, outputs in zip(requests, run(plain(layers), requests).values(), strict=True):
        said = tokens(outputs)
        expected = logprobs_of(target(layers), request.prompt + said)[len(request.prompt) - 1 : -1]
        found = torch.tensor([at.logprob for output in outputs for at in output.logprobs or ()])
        torch.testing.assert_close(found.double(), expected[range(len(said)), said], atol=1e-6, rtol=1e-6)
        if not request.params.temperature:
            assert said == expected.argmax(-1).tolist()


def test_the_window_matters() -> None:
    """The oracle of a model that attends to all tokens differs, so that the tests here show something."""
    text = prompt_of(60, 1)
    for layers, shape in SHAPES.items():
        wide = tiny_model(config=replace(shape, sliding_window=100))
        assert (logprobs_of(target(layers), text) - logprobs_of(wide, text))[WINDOW:].abs().max() > 1e-3


# -- the law ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", SHAPES)
@given(
    data=st.data(),
    drafter=st.sampled_from(["self", "together"]),
    seed=st.integers(0, 2**32),
    page_size=st.sampled_from([1, 3, 4, 16]),
    gamma=st.sampled_from([0, 1, 3]),
    varying=st.booleans(),
    prefix=st.booleans(),
    batch_tokens=st.sampled_from([7, 20, 64]),
    spare=st.none() | st.integers(0, 12),
    cut=st.booleans(),
    count=st.integers(1, 8 if is_all() else 5),
)
@examples(3, 120)
def test_nothing_changes_the_text(
    layers: str,
    data: st.DataObject,
    drafter: str,
    seed: int,
    page_size: int,
    gamma: int,
    varying: bool,
    prefix: bool,
    batch_tokens: int,
    spare: int | None,
    cut: bool,
    count: int,
) -> None:
    engine = engine_of(
        layers,
        gamma,
        data.draw(st.sampled_from(policies_of(layers))),
        page_size,
        drafter,
        cache={"prefix": prefix, "num_pages": 600 if spare is None else -(-LONGEST // page_size) + spare},
        scheduler={"max_batch_tokens": batch_tokens},
    )
    if varying and gamma >= 3:
        engine._scheduler.controller = Scripted(VARYING * 400)
    rng = random.Random(seed)
    if cut:
        trouble(engine, rng)
    played = play(engine, (crowd(3, 60) if spare is not None else []) + random_turns(rng, page_size, count), LONGEST)
    check_answers(played, run(plain(layers), played.requests))
    if not cut and prefix:
        check_hits(engine, played)


@pytest.mark.parametrize("layers", SHAPES)
@pytest.mark.parametrize("gamma", [0, 3])
def test_nor_does_any_policy(layers: str, gamma: int) -> None:
    """Each policy, over rows far longer than window and budget, and prompts that are found in the prefix cache."""
    params = {"max_tokens": 30 if is_all() else 20, "ignore_eos": True}
    turns = [
        Turn("greedy", prompt_of(60, 1), params=params),
        Turn("sampled", prompt_of(50, 2), params=params | {"temperature": 1.0}),
        Turn("again", prompt_of(9, 3), after="greedy", params=params),
        Turn("branch", prompt_of(60, 1)[:49] + prompt_of(9, 4), wait=20, params=params),
    ]
    kept = ("window", "verified", "snapkv") if layers == "most layers" else ("all", "relative", "quest", "topk")
    policies = [policy for policy in policies_of(layers) if is_all() or policy in kept]
    for policy in policies if gamma else ["all"]:
        engine = engine_of(layers, gamma, policy, scheduler={"max_batch_tokens": 33}, max_model_len=200)
        played = play(engine, turns, 200)
        check_answers(played, run(plain(layers), played.requests))
        check_hits(engine, played)
        stats = engine.stats()
        assert stats.prefix_hits >= 2 * 44
        if policy == "all" or (policy == "window" and layers == "all layers"):
            assert stats.rejections == 0, "drafts that read the whole window are all accepted"
        elif layers == "most layers":
            assert min(stats.rejections, stats.accepted_tokens) > 5


def test_rows_are_preempted_and_windows_evicted() -> None:
    engine = engine_of("most layers", 3, "window", cache={"num_pages": 40}, scheduler={"max_batch_tokens": 20})
    played = play(engine, crowd(5, 60) + random_turns(random.Random(2), 4, 12), LONGEST)
    check_answers(played, run(plain("most layers"), played.requests))
    check_hits(engine, played)
    stats, sliding = engine.stats(), engine._kv._sliding
    assert sliding is not None
    assert min(stats.preemptions, stats.prefix_hits, sliding.allocator.evictions) > 0


def test_windows_alone_wait_for_room() -> None:
    """Where all layers slide, rows become long in a pool that none of them would fit into, without preemption."""
    engine = engine_of("all layers", 3, "window", cache={"num_pages": 30}, scheduler={"max_batch_tokens": 20})
    assert engine._kv.total > 30
    played = play(engine, crowd(5, 60) + random_turns(random.Random(2), 4, 12), LONGEST)
    check_answers(played, run(plain("all layers"), played.requests))
    check_hits(engine, played)
    stats = engine.stats()
    assert (stats.pages_total, stats.sliding_pages_total, stats.preemptions) == (30, 0, 0)
    assert stats.pages_free + stats.pages_cached == 30
    assert min(stats.prefix_hits, stats.prefix_evictions, stats.accepted_tokens) > 0


@pytest.mark.parametrize("layers", SHAPES)
def test_drafts_read_less_than_a_window(layers: str) -> None:
    """The first tokens and the most recent ones, while the row has the first ones; then recent ones alone."""
    wide = tiny_model(config=replace(SHAPES[layers], sliding_window=40))
    count, new = (3, 60) if is_all() else (2, 30)
    turns = [
        Turn(str(i), prompt_of(20 + 30 * i, i), params={"max_tokens": new, "ignore_eos": True}) for i in range(count)
    ]
    settings: dict[str, Any] = {"page_size": 4, "max_model_len": LONGEST, "scheduler": {"max_rows": 6}}
    oracle = tiny_engine(wide, gamma=0, **settings)
    for budget, fewer in ((16, True), (40, False)):
        kv = {"policy": "window", "budget": budget, "sink": 4}
        engine = tiny_engine(wide, gamma=3, speculation={"kv": kv}, **settings)
        view = engine._worker._drafter._drafter._runner.view  # type: ignore[attr-defined]
        assert (view.sliding is not engine._worker._state.windows) is fewer
        played = play(engine, turns, LONGEST)
        check_answers(played, run(oracle, played.requests))
        stats = engine.stats()
        assert stats.accepted_tokens > 0
        assert (stats.rejections > 0) is (fewer or layers == "most layers")


@pytest.mark.parametrize(
    ("layers", "kv_format"),
    [
        *(("all layers", "int8"), ("most layers", "int4x2"), ("all layers", "fp8")),
        *(only_in_all(*each) for each in (("most layers", "int8"), ("all layers", "int4x2"), ("most layers", "fp8"))),
    ],
)
def test_nor_the_format_of_the_other_layers(layers: str, kv_format: str) -> None:
    """Sliding layers are dense. Where all layers slide, they have the format, and keep all KV."""
    longest = 3 * SEALED_GROUP
    page = 8 if kv_format == "fp8" else SEALED_GROUP
    rng = random.Random(3)
    ways = [(4, "window"), (3, "quest")]
    for gamma, policy in ways if is_all() else [ways[kv_format == "int8"]]:
        engine = engine_of(
            layers,
            gamma,
            policy,
            page,
            cache={"format": kv_format, "num_pages": 300},
            scheduler={"max_batch_tokens": 100},
            max_model_len=longest,
        )
        played = play(engine, random_turns(rng, page, 5 if is_all() else 3, 100, 50), longest)
        check_answers(played, run(plain(layers, kv_format), played.requests))
        check_hits(engine, played)


def test_sliding_layers_keep_their_window_only() -> None:
    engine = engine_of("most layers", 3, scheduler={"max_batch_tokens": 24}, max_model_len=1200)
    model = engine._worker.model
    pool = engine._worker._target.sliding
    assert pool is not None
    assert pool.pool.num_layers == model.num_sliding_layers == 2
    assert engine._worker._target.pool.num_layers == model.num_kv_layers == 1
    assert pool.pool.num_pages == max_sliding_pages(engine._config, WINDOW) == 6 * (4 + 2) + 6 + 6
    engine.add(AddRequest("long", prompt_of(LONG, 1), SamplingParams(max_tokens=100, ignore_eos=True)))
    owned = []
    while engine.has_work():
        engine.step()
        owned += [len(request.sliding_pages) for request in engine._scheduler.running]
        assert engine.stats().sliding_pages_owned == (owned[-1] if engine._scheduler.running else 0)
    assert max(owned) <= -(-(WINDOW + 3) // 4) + 1
    assert engine.stats().sliding_pages_total == pool.pool.num_pages


def test_so_they_do_where_all_layers_slide() -> None:
    """A request of hundreds of tokens in memory for 60. Drafts that choose and KV of few bits need all KV."""
    settings: dict[str, Any] = {"scheduler": {"max_batch_tokens": 24}, "max_model_len": 1200}
    engine = engine_of("all layers", 3, "window", cache={"num_pages": 15}, **settings)
    target, sliding = engine._worker._target, engine._worker._target.sliding
    assert sliding is not None
    assert (target.pool.nbytes, sliding.pool.num_pages) == (0, 15)
    engine.add(AddRequest("long", prompt_of(LONG, 1), SamplingParams(max_tokens=100, ignore_eos=True)))
    outputs = []
    while engine.has_work():
        outputs += engine.step()
        owned = sum(len(request.sliding_pages) for request in engine._scheduler.running)
        stats = engine.stats()
        assert stats.pages_total - stats.pages_free - stats.pages_cached == owned <= 15
    request = AddRequest("long", prompt_of(LONG, 1), SamplingParams(max_tokens=100, ignore_eos=True))
    oracle = engine_of("all layers", 0, page_size=16, cache={"prefix": False}, max_model_len=1200)
    assert tokens(outputs) == tokens(run(oracle, [request])["long"])
    for policy, kv_format, page in (("quest", "dense", 4), ("window", "fp8", 8)):
        kept = engine_of("all layers", 3, policy, page, cache={"format": kv_format})
        assert kept._worker._target.pool.num_layers == 2


@pytest.mark.parametrize("policy", ["window", "snapkv", "quest", "all"])
def test_a_draft_model_lists_no_sliding_layers(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target's are not listed for it either, while it computes prompts or drafts."""
    through, seen = Runner.forward, set()

    def recorded(runner: Runner, inputs: ForwardBatch) -> Tensor:
        listed = inputs.sliding_attention is not None, inputs.sliding_slots is not None
        seen.add((runner is engine._worker._target, *listed))
        return through(runner, inputs)

    monkeypatch.setattr(Runner, "forward", recorded)
    model = str(write_random_model(tmp_path / "draft", DRAFT))
    speculation = {"kv": kv_of(policy, 4, 3), "drafter": "model", "model": model}
    engine = tiny_engine(target("most layers"), gamma=3, speculation=speculation, max_model_len=LONGEST)
    requests = [AddRequest(str(i), prompt_of(9 + 40 * i, i), SamplingParams(max_tokens=30)) for i in range(3)]
    outputs = run(engine, requests)
    assert seen == {(True, True, True), (False, False, False)}
    oracle = run(plain("most layers"), requests)
    assert [tokens(outputs[each.id]) for each in requests] == [tokens(oracle[each.id]) for each in requests]


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "settings", "message"),
    [
        ("most layers", {"target_kv": {"policy": "quest", "budget": 64}}, r"^engine\.target_kv: .* 2 of the model's 3"),
        (
            "most layers",
            {"speculation": {"gamma": 2, "kv": {"policy": "window", "positions": "relative"}}},
            r"^engine\.speculation\.kv\.positions: relative needs one rotary embedding, but .* have 2$",
        ),
        (
            "all layers",
            {"speculation": {"gamma": 2, "kv": {"policy": "verified"}}},
            r"^engine\.speculation\.kv: verified .* all layers of the model slide$",
        ),
    ],
)
def test_what_is_refused(layers: str, settings: dict[str, Any], message: str) -> None:
    config = EngineConfig.model_validate({"device": "cpu", "max_model_len": 64, **settings})
    with pytest.raises(ConfigError, match=message):
        resolve(config, target(layers))


def test_a_draft_model_with_sliding_layers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.worker.resolve.read_config", lambda path: SHAPES["most layers"])
    settings = {"gamma": 2, "drafter": "model", "model": str(tmp_path)}
    config = EngineConfig.model_validate({"device": "cpu", "max_model_len": 64, "speculation": settings})
    with pytest.raises(ConfigError, match=r"^engine\.speculation\.model: 2 of its 3 layers slide"):
        resolve(config, tiny_model())
