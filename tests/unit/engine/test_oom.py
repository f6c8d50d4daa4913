"""Running out of memory in a round fails the requests of that round and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.batch.runner import Runner
from engine.batch.view import DenseView
from engine.config.deployment import ConfigError
from engine.core import Engine
from engine.kv.quest import QuestPolicy
from engine.kv.snapkv import SnapKVPolicy
from engine.kv.target_quest import TargetQuestAttention
from engine.kv.verified import VerifiedPolicy
from engine.llm import LLM
from engine.messages import RETRY_MEMORY, AddRequest
from engine.oom import OutOfMemory, is_out_of_memory
from engine.params import SamplingParams
from engine.plan import RoundPlan
from models.batch import ForwardBatch
from tests.support.engines import complete, run, tiny_engine, tiny_model, tokens
from tests.support.profiles import only_in_all
from tests.support.ranks import DRAFT, write_random_model
from tests.support.tiny import write_tokenizer


def exhaust() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def starve(monkeypatch: pytest.MonkeyPatch, forward: int) -> None:
    """Make the target's forward of this number fail."""
    through, count = Runner.forward, 0

    def counted(runner: Runner, batch: ForwardBatch) -> torch.Tensor:
        nonlocal count
        if isinstance(runner.view, DenseView):
            count += 1
            if count == forward:
                exhaust()
        return through(runner, batch)

    monkeypatch.setattr(Runner, "forward", counted)


def test_what_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as error:
        exhaust()
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    with pytest.raises(MemoryError) as host:
        bytearray(sys.maxsize)
    assert is_out_of_memory(host.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def requests() -> list[AddRequest]:
    """More requests than there are rows, with prompts of one to several chunks."""
    ways: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.0}, {"repetition_penalty": 1.3}]
    return [
        AddRequest(
            str(i), [2 + j % 60 for j in range(1 + 29 * i)], SamplingParams(max_tokens=20, seed=i, **ways[i % 3])
        )
        for i in range(6)
    ]


@pytest.mark.parametrize("forward", [only_in_all(1), 5, only_in_all(12)])
def test_the_batch_fails_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch, forward: int) -> None:
    engine = tiny_engine(tiny_model(), gamma=3, scheduler={"max_rows": 3})
    expected = {request.id: complete(engine, request.prompt, request.params) for request in requests()}
    starve(monkeypatch, forward)
    outputs = run(engine, requests())  # also checks that no page is missing
    failed = {id for id, mine in outputs.items() if mine[-1].error is not None}
    assert 0 < len(failed) <= 3
    for id, mine in outputs.items():
        if id in failed:
            assert (mine[-1].finish_reason, mine[-1].retry) == ("abort", RETRY_MEMORY)
            assert "out of memory" in (mine[-1].error or "")
            assert tokens(mine) == expected[id][: len(tokens(mine))]
        else:
            assert tokens(mine) == expected[id]
    for request in requests():
        assert complete(engine, request.prompt, request.params) == expected[request.id]


def test_aborts_wait_for_the_round_that_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """An abort during a round keeps the row's pages until the round ends, because the device still writes to them."""
    engine = tiny_engine(tiny_model(), gamma=3)
    engine.overlaps = True
    wanted = requests()
    expected = {request.id: complete(engine, request.prompt, request.params) for request in wanted}
    for request in wanted:
        engine.add(request)
    found: dict[str, list[int]] = {request.id: [] for request in wanted}
    pages = []

    def meanwhile() -> None:
        pages.append(engine.stats().pages_free)
        engine.abort(["1", "nobody"])
        pages.append(engine.stats().pages_free)

    while engine.has_work():
        for output in engine.step(meanwhile):
            found[output.id] += output.tokens
    assert pages[::2] == pages[1::2]
    assert len(found.pop("1")) < 20
    assert all(found[id] == expected[id] for id in found)
    starve(monkeypatch, 1)
    engine.add(wanted[0])
    engine.add(wanted[1])
    calls = len(pages)
    assert [output.retry for output in engine.step(meanwhile)] == [RETRY_MEMORY] * 2
    assert len(pages) == calls + 2
    assert not engine.has_work()
    stats = engine.stats()
    assert stats.pages_free + stats.pages_cached == stats.pages_total


def test_any_other_error_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(tiny_model(), gamma=0)

    def broken(plan: RoundPlan, meanwhile: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(engine._worker, "execute", broken)
    engine.add(requests()[0])
    with pytest.raises(RuntimeError, match="shapes"):
        engine.step()


def test_offline_it_is_an_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exception also reaches a stream whose request failed in a round that another stream ran."""
    write_tokenizer(tmp_path)
    small = {"num_pages": 200, "page_size": 4}
    loaded = tiny_model()
    with LLM(tmp_path, loaded=loaded, cache=small, max_model_len=200, speculation={"gamma": 0}) as llm:
        engine: Engine = llm.engine
        first, second = llm.stream([5, 6, 7]), llm.stream([7, 6])
        next(first)
        next(second)
        starve(monkeypatch, 1)
        with pytest.raises(OutOfMemory, match="out of memory in a batch of 2"):
            list(first)
        with pytest.raises(OutOfMemory, match="out of memory in a batch of 2"):
            list(second)
        assert not engine.has_work()
        assert llm.generate([5, 6, 7], SamplingParams(max_tokens=3))[0].finish_reason == "length"
        starve(monkeypatch, 2)
        with pytest.raises(OutOfMemory):
            llm.generate([5, 6, 7], SamplingParams(max_tokens=9, ignore_eos=True))
        assert not engine.has_work()


KEPT: list[dict[str, Any]] = [
    {"kv": {"policy": "snapkv", "budget": 32, "recent": 8, "queries": 5, "kernel": 3}},
    {"kv": {"policy": "snapkv", "budget": 32, "recent": 8, "queries": 5, "kernel": 3, "reselect": 0}},
    {"drafter": "model", "kv": {"budget": 32, "sink": 4}},
    {"drafter": "model", "kv": {"policy": "snapkv", "budget": 32, "recent": 8, "queries": 5, "kernel": 3}},
    {"drafter": "model", "kv": {"policy": "all"}},
    {"drafter": "model", "kv": {"policy": "quest", "budget": 32, "sink": 4}},
    {"kv": {"policy": "quest", "budget": 32, "sink": 4}},
    {"kv": {"policy": "verified", "budget": 32, "sink": 4}},
    {"kv": {"budget": 32, "sink": 4}},
]


QUEST = {"policy": "quest", "budget": 32, "sink": 4}


@pytest.mark.parametrize(
    ("speculation", "target"),
    # verified needs a target that reads all KV.
    [*((each, None) for each in KEPT), *((each, QUEST) for each in KEPT if each["kv"].get("policy") != "verified")],
)
def test_memory_gb_bounds_all_kv(tmp_path: Path, speculation: dict[str, Any], target: dict[str, Any] | None) -> None:
    """All that drafters and the target keep stays within memory_gb, and not one more page would fit."""
    if speculation.get("drafter") == "model":
        speculation = speculation | {"model": str(write_random_model(tmp_path / "draft", DRAFT))}
    memory = 2_000_000
    engine = tiny_engine(
        tiny_model(), gamma=3, cache={"memory_gb": memory / 1e9}, speculation=speculation, target_kv=target
    )
    drafter: Any = engine._worker._drafter
    proposer = drafter._drafter
    runners = [engine._worker._target, getattr(proposer, "_full", None), proposer._runner]
    pools = {id(runner.pool): runner.pool.nbytes for runner in runners if runner is not None}
    parts: list[torch.Tensor] = []
    if isinstance(policy := proposer._policy, SnapKVPolicy):
        parts = [policy._queries]
    elif isinstance(policy, QuestPolicy):
        parts = [policy.attention._summaries.bounds, policy._choice.pages]
    elif isinstance(policy, VerifiedPolicy):
        parts = [policy._choice.pages]
    attention = engine._worker._target.attention
    if isinstance(attention, TargetQuestAttention):
        parts += [attention.summaries.bounds, attention._chosen]
    kept = sum({part.data_ptr(): part.nbytes for part in parts}.values())
    # A page of 4 tokens, 512 bytes each in the target and 64 in the draft; its summary takes as much as one of them.
    assert memory - 4 * 800 < sum(pools.values()) + kept <= memory


def test_drafts_that_keep_more_than_there_is() -> None:
    speculation = {"kv": {"policy": "snapkv", "budget": 512, "recent": 8}}
    with pytest.raises(
        ConfigError,
        match=r"cache\.memory_gb \(0\.001\) leaves 0\.001 GB, no more than the 0\.00\d+ GB that drafts keep for 8 rows",
    ):
        tiny_engine(tiny_model(), gamma=3, cache={"memory_gb": 0.001}, speculation=speculation)
    engine = tiny_engine(tiny_model(), gamma=0, cache={"memory_gb": 0.001}, max_model_len=1900, speculation=speculation)
    assert engine.stats().pages_total * 4 * 512 > 990_000  # without drafts, nothing is kept for them
