"""bench decode: rows with shared pages beside rows with their own, and what is said of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.corpus import BenchError, spread
from bench.offline.decode import DecodeResult, _kv_bytes, comparison, measure, table
from bench.offline.interleave import InterleavedController
from engine.config.deployment import EngineConfig
from engine.messages import EngineStats
from engine.ngram.ngram_drafts import Proposal
from engine.scheduler.controller import ControllerReport, FixedGamma, RowDrafts
from engine.scheduler.request import Request
from tests.support.tiny import write_model

RESULT = DecodeResult(
    batch=16,
    context=6200,
    shared=6000,
    prefix=False,
    speculation=0,
    gamma=0.0,
    policy="none",
    budget=0,
    tokens_per_second=100.0,
    acceptance=None,
    t_target_ms=160.0,
    t_draft_ms=None,
    t_verify_ms=160.0,
    t_host_ms=1.0,
    kv_bytes_per_token=140e6,
    bytes_per_second=14e9,
    speedup=1.0,
    predicted=None,
    rounds=10,
    mean_context=6220.0,
)


@given(st.integers(1, 9), st.integers(0, 30), st.integers(1, 20))
def test_passages_with_a_common_beginning(count: int, shared: int, own: int) -> None:
    text = list(range(60))
    found = spread(text, count=count, length=shared + own, shared=shared)
    assert [len(each) for each in found] == [shared + own] * count
    assert all(each[:shared] == text[:shared] for each in found)
    assert all(each[shared] >= shared for each in found)
    if count > 1:
        assert (found[0][-1], found[-1][-1]) == (shared + own - 1, 59)


def test_passages_that_cannot_be_cut() -> None:
    with pytest.raises(BenchError, match="40 shared tokens leave none of 40 to each row"):
        spread(range(60), count=2, length=40, shared=40)
    with pytest.raises(BenchError, match="fewer than the 61"):
        spread(range(60), count=2, length=61)


def test_rows_with_and_without_shared_pages(tmp_path: Path) -> None:
    """Both kinds of engines have plain rounds of their own, and read the same contexts."""
    model = str(write_model(tmp_path))
    base = {"model": model, "dtype": "float32", "threads": 1, "cache": {"num_pages": 200}, "weights": "int8"}
    speculation = {"gamma": 2, "kv": {"budget": 64}, "weights": "int4"}
    configs = [
        EngineConfig.model_validate({**base, "speculation": speculation, "cache": {"num_pages": 200, "prefix": prefix}})
        for prefix in (True, False)
    ]
    prompts = spread([10 + i % 300 for i in range(300)], count=3, length=120, shared=96)
    found = measure(configs, prompts, [0, 2], new_tokens=8, shared=96)
    assert [(each.prefix, each.speculation, each.shared) for each in found] == [
        (True, 0, 96),
        (True, 2, 96),
        (False, 0, 96),
        (False, 2, 96),
    ]
    once, _, each, _ = found
    # Rows that wait for the common pages begin a round later, with a token more than the others.
    assert once.kv_bytes_per_token < each.kv_bytes_per_token * 136 / 135
    assert (once.speedup, each.speedup) == (1.0, 1.0)
    assert all(120 < result.mean_context < 200 for result in found)
    text = table(found, 1e9)
    assert "weights: int8, drafts int4 and int8" in text.splitlines()
    assert text.count("3 rows of 120 tokens, the first 96 in common") == 2


def test_what_shared_pages_bring() -> None:
    once = replace(RESULT, prefix=True, tokens_per_second=150.0, kv_bytes_per_token=14e6)
    (line,) = comparison([once, RESULT])
    assert "KV per token 14.0 MB counted once, 140.0 for each row (x 0.10)" in line
    assert "tokens/s 150.0 with shared pages, 100.0 without (x 1.50)" in line
    assert "draft off" in line
    assert comparison([once, replace(RESULT, speculation=3)]) == []
    assert comparison([RESULT]) == []


def test_auto_learns_of_shared_tokens() -> None:
    class Auto(FixedGamma):
        told = -1

        def choose(
            self,
            rows: Sequence[Request],
            shared_tokens: int = 0,
            proposals: Sequence[Proposal] = (),
            share: int | None = None,
        ) -> list[RowDrafts]:
            self.told = shared_tokens
            return []

    controller, auto = InterleavedController(3), Auto(3)
    controller.auto, controller.gamma = auto, "auto"
    assert controller.choose([], 512) == []
    assert auto.told == 512
    assert controller.report == ControllerReport()


def test_formats_of_kv_and_temperatures(tmp_path: Path) -> None:
    """Every format has plain rounds of its own. Rows begin anew at each temperature, with the prompts' KV kept, and
    drafts of int4x2 read half as many bytes as those of int8."""
    model = str(write_model(tmp_path))
    base = {"model": model, "dtype": "float32", "threads": 1, "speculation": {"gamma": 2, "kv": {"policy": "all"}}}
    configs = [
        EngineConfig.model_validate({**base, "cache": {"num_pages": 40, "prefix": True, "format": name}})
        for name in ("dense", "int8", "int4x2")
    ]
    prompts = spread([10 + i % 300 for i in range(600)], count=2, length=200)
    found = measure(configs, prompts, [0, 2], new_tokens=12, temperatures=[0.0, 0.8])
    assert [(each.temperature, each.kv_format, each.speculation) for each in found] == [
        (temperature, name, gamma)
        for temperature in (0.0, 0.8)
        for name in ("dense", "int8", "int4x2")
        for gamma in (0, 2)
    ]
    assert all(each.speedup == 1.0 for each in found if not each.speculation)
    assert all(200 < each.mean_context < 260 for each in found)
    dense, int8, int4x2 = (each.kv_bytes_per_token for each in found[:6:2])
    assert int8 == pytest.approx(int4x2, rel=0.1)
    assert dense > 3 * int8
    drafted = {each.kv_format: each for each in found[:6] if each.speculation}
    assert drafted["int4x2"].acceptance is not None
    assert " int4x2 " in table(found, 1e9)


def test_bytes_of_drafts_at_fewer_bits(tmp_path: Path) -> None:
    model = str(write_model(tmp_path))
    read = EngineStats(kv_tokens_read=300, draft_kv_tokens_read=200)
    for name, expected in (("dense", 3000), ("int8", 3000), ("int4x2", 1000 + 2000 * 11 / 20)):
        config = EngineConfig.model_validate({"model": model, "cache": {"format": name}})
        assert _kv_bytes(read, 10, config) == pytest.approx(expected, rel=0.05)
