"""Size of the pool where memory is measured. tests/gpu tests the measuring itself."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.batch.forward_graphs import graph_row_counts
from engine.batch.graph_inputs import _GroupLists
from engine.config.deployment import ConfigError, EngineConfig
from engine.scheduler.sliding_pages import pool_pages
from engine.worker.kv_memory import (
    DeviceMemory,
    allocate,
    captured_bytes,
    captured_list_bytes,
    run_largest_round,
    size_pool,
)
from engine.worker.resolve import Resolved, resolve
from kernels.flashinfer.flashinfer_sizes import Heads, captured_plan, captured_ragged_plan, eager_float_bytes
from models.decoder import DecoderModel
from parallel.group import Group
from tests.support import fake_flashinfer
from tests.support.engines import TINY, tiny_model
from tests.support.rig import CPU, run_ranks

MEGABYTE = 1_000_000
PAGE = 4 * 2 * 2 * 2 * 8 * 8  # bytes: tokens, keys and values, layers, heads, elements, of float64


def sized(model: DecoderModel, **cache: Any) -> tuple[EngineConfig, Resolved]:
    """Settings and sizes on a GPU when the pool's size is not set."""
    settings = {"model": "tiny", "cache": {"page_size": 4}, "max_model_len": 400, "speculation": {"drafter": "self"}}
    sizes = dataclasses.replace(resolve(EngineConfig.model_validate(settings), model), num_pages=None)
    return EngineConfig.model_validate(settings | {"cache": {"page_size": 4, **cache}}), sizes


def test_the_pool_takes_what_is_left() -> None:
    model = tiny_model()
    config, sizes = sized(model)
    memory = DeviceMemory(total=100 * MEGABYTE, used=70 * MEGABYTE, running=15 * MEGABYTE)
    assert size_pool(config, sizes, model, Group.single(), memory).num_pages == 5 * MEGABYTE // PAGE
    config, sizes = sized(model, gpu_memory_utilization=0.88)
    assert size_pool(config, sizes, model, Group.single(), memory).num_pages == 3 * MEGABYTE // PAGE
    plenty = dataclasses.replace(memory, used=0)
    assert size_pool(config, sizes, model, Group.single(), plenty).num_pages == 100 * config.scheduler.max_rows


@pytest.mark.parametrize("said", [{"num_pages": 900}, {"memory_gb": 1}, {}], ids=["num_pages", "memory_gb", "cpu"])
def test_a_share_of_what_does_not_count_is_refused(said: dict[str, Any]) -> None:
    config = EngineConfig.model_validate({"model": "tiny", "cache": {"gpu_memory_utilization": 0.5, **said}})
    with pytest.raises(ConfigError, match=f"{next(iter(said), 'memory_gb')} sets the size of the pool"):
        resolve(config, tiny_model())


def test_too_little_is_an_error() -> None:
    model = tiny_model()
    config, sizes = sized(model)
    memory = DeviceMemory(total=100 * MEGABYTE, used=85 * MEGABYTE, running=9 * MEGABYTE)
    with pytest.raises(ConfigError, match="0 pages of 4 tokens hold less than one request of max_model_len 400"):
        size_pool(config, sizes, model, Group.single(), memory)


def test_the_rank_with_least_decides() -> None:
    model = tiny_model()
    config, sizes = sized(model)

    def fit(group: Group) -> Resolved:
        memory = DeviceMemory(100 * MEGABYTE, (60 + 7 * group.rank) * MEGABYTE, 10 * MEGABYTE)
        return size_pool(config, sizes, model, group, memory)

    found = run_ranks(3, fit)
    assert [(each.num_pages, each.max_model_len) for each in found] == [(6 * MEGABYTE // PAGE, 400)] * 3


def test_without_a_set_length_the_pool_decides(caplog: pytest.LogCaptureFixture) -> None:
    """All ranks agree; one of them warns."""
    model = tiny_model()
    config, sizes = sized(model)
    config = config.model_copy(update={"max_model_len": None})
    sizes = dataclasses.replace(sizes, max_model_len=2048)

    def fit(group: Group) -> Resolved:
        memory = DeviceMemory(MEGABYTE, 0, (6 + group.rank) * MEGABYTE // 10)
        return size_pool(config, sizes, model, group, memory)

    pages = MEGABYTE // 10 // PAGE
    found = run_ranks(3, fit)
    assert [(each.num_pages, each.max_model_len) for each in found] == [(pages, 4 * pages)] * 3
    (record,) = caplog.records
    says = f"max_model_len is {4 * pages} tokens, of the model's 2048: cache.gpu_memory_utilization (0.9) holds no more"
    assert says in record.getMessage()


def test_ranks_leave_the_length_open_where_devices_decide() -> None:
    config, sizes = sized(tiny_model())
    assert sizes.fill_in(config).max_model_len == 400
    config = config.model_copy(update={"max_model_len": None})
    assert sizes.fill_in(config).max_model_len is None
    assert dataclasses.replace(sizes, num_pages=500).fill_in(config).max_model_len == 400


@pytest.mark.parametrize("tokens", [65, 512])
def test_the_largest_round_runs(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    config = EngineConfig.model_validate({"model": "tiny", "scheduler": {"max_batch_tokens": tokens}})
    asked = []
    logits = DecoderModel.logits

    def watched(self: DecoderModel, states: torch.Tensor) -> torch.Tensor:
        asked.append(len(states))
        return logits(self, states)

    monkeypatch.setattr(DecoderModel, "logits", watched)
    run_largest_round(config, tiny_model())
    assert asked == [min(tokens, config.scheduler.max_rows * (config.speculation.max_draft_tokens + 1))]


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device with FlashInfer, as far as memory is counted."""
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)
    found = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)


def llama(heads: int, kv_heads: int, head_dim: int) -> Any:
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "window": 0, "num_kv_layers": 4}
    return SimpleNamespace(**sizes, device=torch.device("cuda"))


@pytest.mark.usefixtures("flashinfer")
def test_captured_attention_is_counted() -> None:
    """Scratch memory once, for the largest forward of target or draft; plans, lists of pages and lengths of each."""
    settings = {"model": "any", "scheduler": {"max_rows": 128}, "speculation": {"gamma": 3}}
    config = EngineConfig.model_validate(settings)
    target, page = Heads(32, 8, 128), config.cache.page_size
    rows, width = graph_row_counts(128), 32_000 // page
    scratch = max(captured_plan(target, 128, 4, 132, uniform=True).floats, eager_float_bytes(target, 132))
    each = [captured_plan(target, count, queries, 132, uniform=True).ints for count in rows for queries in (1, 2, 3, 4)]
    lists = 4 * sum(rows) * width * (8 + 4)  # the caller's page ids and FlashInfer's
    counted = captured_bytes(config, llama(*target), None, 32_000)
    shares = [
        captured_ragged_plan(target, min(count // 2, 8) + 1, count * queries, 132)
        for count in rows[1:]
        for queries in (1, 2, 3, 4)
    ]
    scratch = max(scratch, *(plan.floats for plan in shares))
    # Captures that read shared pages once have the same again, and FlashInfer's plans and lists of prefixes.
    first_lists = 4 * sum(min(count // 2, 8) + 1 for count in rows[1:]) * width * 4 + len(shares) * (128 << 10)
    second = sum(each[4:]) + sum(plan.ints for plan in shares) + 4 * sum(rows[1:]) * width * 12 + first_lists
    own = scratch + (8 << 20) + sum(each) + lists + second
    window = 5 * sum(rows) * (config.speculation.kv.budget // page + 1) * 12  # type: ignore[operator]
    assert own + window < counted < 1.01 * (own + window)
    narrow = llama(4, 1, 128)  # one of eight ranks; a draft model that is not split needs more
    alone = captured_bytes(config, narrow, None, 32_000)
    drafted = EngineConfig.model_validate({**settings, "speculation": {"gamma": 3, "model": "small"}})
    assert captured_bytes(drafted, narrow, llama(64, 8, 128), 32_000) > 1.5 * alone
    # Both draft: the captured forwards of each are kept.
    free = {"gamma_max": 3, "ngram_gamma_max": 3, "kv": {"policy": "all"}}
    by_model, by_both = (
        EngineConfig.model_validate({**settings, "speculation": {**free, "model": "small", "drafter": drafter}})
        for drafter in ("model", "together")
    )
    counted = captured_bytes(by_model, llama(*target), llama(*target), 32_000)
    assert counted + window <= captured_bytes(by_both, llama(*target), llama(*target), 32_000) < counted + 2 * window
    plain = EngineConfig.model_validate({**settings, "speculation": {"gamma": 0}})
    assert captured_bytes(plain, narrow, None, 32_000) < alone - lists * 3 // 4 - window


@pytest.mark.usefixtures("flashinfer")
def test_the_pool_leaves_memory_for_captured_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    config, sizes = sized(model)
    memory = DeviceMemory(total=70 * MEGABYTE, used=0, running=15 * MEGABYTE)
    monkeypatch.setattr(model, "ops", SimpleNamespace(kind="flashinfer", make_graphs=object()))
    left = 63 * MEGABYTE - 2 * memory.running - captured_bytes(config, model, None, sizes.max_model_len)
    assert size_pool(config, sizes, model, Group.single(), memory).num_pages == left // PAGE
    memory = dataclasses.replace(memory, total=40 * MEGABYTE)
    monkeypatch.setattr(model, "ops", SimpleNamespace(kind="triton", make_graphs=object()))
    assert size_pool(config, sizes, model, Group.single(), memory).num_pages == 6 * MEGABYTE // PAGE


SLIDING = replace(TINY, num_layers=3, sliding_window=10, sliding_layers=(0, 2))


@pytest.mark.parametrize("kilobytes", [60, 110, 190, 201, 203, 206, 212, 900])
def test_both_pools_share_what_is_left(kilobytes: int) -> None:
    """And no page more would fit."""
    model = tiny_model(config=SLIDING)
    settings = {"model": "tiny", "max_model_len": 40, "scheduler": {"max_rows": 8, "max_batch_tokens": 40}}
    settings |= {"cache": {"page_size": 4}, "speculation": {"gamma": 3, "kv": {"policy": "all"}}}
    config = EngineConfig.model_validate(settings)
    sizes = dataclasses.replace(resolve(config, model), num_pages=None)
    memory = DeviceMemory(total=1000 * kilobytes, used=0, running=0)
    config = EngineConfig.model_validate(settings | {"cache": {"page_size": 4, "gpu_memory_utilization": 1.0}})
    num_pages = size_pool(config, sizes, model, Group.single(), memory).num_pages
    assert num_pages is not None

    def needed(pages: int) -> int:
        sizes = pool_pages(config, SLIDING, pages, 40)
        return model.make_pool(sizes.full, 4).nbytes + model.make_sliding_pool(sizes.sliding, 4).nbytes

    assert needed(num_pages) <= 1000 * kilobytes
    assert num_pages == 8 * 10 or needed(num_pages + 1) > 1000 * kilobytes


@pytest.mark.parametrize("layers", [(0, 2), (0, 1, 2)])
@pytest.mark.parametrize("prefix", [False, True])
def test_the_pool_leaves_memory_for_lists_of_windows(
    monkeypatch: pytest.MonkeyPatch, layers: tuple[int, ...], prefix: bool
) -> None:
    """As much as inputs of captured forwards take: those of a plain step and verify passes, of single drafts, and of
    the steps of a round."""
    model = tiny_model(config=replace(SLIDING, sliding_layers=layers))
    settings = {"max_model_len": 40, "cache": {"page_size": 4, "prefix": prefix}, "speculation": {"gamma": 3}}
    config = EngineConfig.model_validate(settings | {"scheduler": {"max_rows": 8}})
    sizes = dataclasses.replace(resolve(config, model), num_pages=None)
    pool = model.make_pool(1, 4)
    monkeypatch.setattr(pool, "scratch", 0)
    rows, needed = [1, 2, 4, 8], 0
    target = [1, 2, 3, 4] * 2 if prefix and model.num_sliding_layers else [1, 2, 3, 4]
    for count in rows:
        for queries in [*target, 1, 1, 1, 1]:
            window = _GroupLists(pool, [count], 10, queries, window=10)
            needed += window._pages.nbytes + window._lengths.nbytes
    found = captured_list_bytes(config, model, None, 40)
    assert needed <= found < 2 * needed
    assert captured_list_bytes(config, tiny_model(), None, 40) == 0
    drafted = config.model_copy(update={"speculation": config.speculation.model_copy(update={"model": "small"})})
    assert 0 < captured_list_bytes(drafted, tiny_model(), model, 40) < found
    monkeypatch.setattr(model, "ops", SimpleNamespace(kind="triton", make_graphs=object()))
    memory = DeviceMemory(total=200_000, used=0, running=0)
    eager = config.model_copy(update={"cuda_graphs": False})
    captured, without, less = (
        size_pool(each, sizes, model, Group.single(), left).num_pages
        for each, left in ((config, memory), (eager, memory), (eager, replace(memory, used=found)))
    )
    assert captured == less != without


def test_the_largest_round_of_a_model_with_sliding_layers() -> None:
    for layers in ((0, 2), (0, 1, 2)):
        model = tiny_model(config=replace(SLIDING, sliding_layers=layers))
        run_largest_round(EngineConfig.model_validate({"cache": {"page_size": 4}}), model)


def test_all_ranks_fail_to_allocate_or_none() -> None:
    """A rank that is out of memory leaves no other one waiting in a later collective."""

    def allocated(group: Group, fails: int | None) -> str:
        def make() -> str:
            if group.rank == fails:
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
            return f"made {group.rank}"

        try:
            return allocate(group, CPU, make)
        except MemoryError as error:
            return str(error)

    assert run_ranks(2, lambda group: allocated(group, None)) == ["made 0", "made 1"]
    assert run_ranks(2, lambda group: allocated(group, 1)) == [
        "rank 1 has too little",
        "[enforce fail] DefaultCPUAllocator: can't allocate memory",
    ]

    def fails() -> str:
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        allocate(Group.single(), CPU, fails)
