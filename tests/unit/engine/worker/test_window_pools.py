"""Sizes of the pools of models whose layers all slide: memory holds windows, whatever the length of requests."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest

from engine.config.deployment import ConfigError, EngineConfig
from engine.scheduler.sliding_pages import pool_pages, window_room
from engine.worker.resolve import resolve
from models.decoder import DecoderModel
from tests.support.engines import TINY, tiny_model

WINDOW, PAGE = 40, 4


def model() -> DecoderModel:
    layers: dict[str, Any] = {
        "num_layers": 2,
        "sliding_window": WINDOW,
        "sliding_layers": (0, 1),
        "max_position_embeddings": 2048,
    }
    return tiny_model(config=replace(TINY, **layers))


def config(**cache: Any) -> EngineConfig:
    settings: dict[str, Any] = {"device": "cpu", "cache": {"page_size": PAGE, **cache}}
    settings |= {"scheduler": {"max_rows": 3, "max_batch_tokens": 64}, "speculation": {"gamma": 3}}
    return EngineConfig.model_validate(settings)


def test_memory_is_for_windows() -> None:
    """Of one pool; the other names the tokens of all rows at their longest."""
    loaded = model()
    page_bytes = PAGE * 2 * 2 * loaded.kv_heads * loaded.head_dim * loaded.dtype.itemsize
    one = window_room(config(), WINDOW).pages(1, 2048 // PAGE)
    assert one == -(-(WINDOW + 3) // PAGE) + 3 + 64 // PAGE
    for pages in (one, one + 7, 10**6):
        resolved = resolve(config(memory_gb=(pages + 0.5) * page_bytes / 1e9), loaded)
        assert resolved.num_pages == min(pages, 3 * 2048 // PAGE)
        assert (resolved.max_model_len, resolved.token_bytes) == (2048, 0)
        assert PAGE * resolved.kv_token_bytes == page_bytes
        assert pool_pages(config(), resolved.shape, pages, 2048) == (3 * (2048 // PAGE + 1), pages)


def test_memory_for_less_than_a_window_and_a_round(caplog: pytest.LogCaptureFixture) -> None:
    one = window_room(config(), WINDOW).pages(1, 2048 // PAGE)
    with caplog.at_level(logging.WARNING):
        assert resolve(config(num_pages=one - 1), model()).max_model_len == (one - 1) * PAGE
    assert "raise it or lower scheduler.max_batch_tokens to serve longer requests" in caplog.text
    given = config(num_pages=one - 1).model_copy(update={"max_model_len": 2048})
    message = rf"one request of max_model_len 2048 \({one} pages\); .* or lower scheduler\.max_batch_tokens$"
    with pytest.raises(ConfigError, match=message):
        resolve(given, model())


@pytest.mark.parametrize(
    ("settings", "keeps"),
    [
        ({}, False),
        ({"speculation": {"gamma": 3, "kv": {"policy": "all"}}}, False),
        ({"speculation": {"gamma": 0, "kv": {"policy": "quest"}}}, False),
        ({"speculation": {"gamma": 3, "drafter": "ngram", "kv": {"policy": "quest"}}}, False),
        ({"speculation": {"gamma": 3, "kv": {"policy": "snapkv"}}}, True),
        ({"speculation": {"gamma": 3, "kv": {"policy": "window", "positions": "relative"}}}, True),
        ({"cache": {"format": "int8"}}, True),
        ({"cache": {"format": "fp8"}}, True),
    ],
)
def test_what_needs_all_kv(settings: dict[str, Any], keeps: bool) -> None:
    resolved = resolve(EngineConfig.model_validate({"device": "cpu", "max_model_len": 512, **settings}), model())
    assert resolved.shape.keeps_all_kv is keeps
    assert bool(resolved.shape.attention_groups[0]) is keeps


def test_one_loaded_model_serves_both_ways() -> None:
    """Sharing its weights, and back again."""
    loaded = model()
    kept = loaded.keeping_all_kv()
    assert (loaded.num_kv_layers, loaded.num_sliding_layers, loaded.window, loaded.sliding_window) == (0, 2, 0, WINDOW)
    assert (kept.num_kv_layers, kept.num_sliding_layers, kept.window, kept.sliding_window) == (2, 0, WINDOW, 0)
    assert kept.keeping_all_kv() is kept
    again = kept.keeping_all_kv(False)
    assert (again.num_kv_layers, again.num_sliding_layers) == (0, 2)
    assert [layer.index for layer in again._layers] == [0, 1]
    assert again._layers[1]._attention is loaded._layers[1]._attention
    mixed = tiny_model(config=replace(TINY, num_layers=2, sliding_window=9, sliding_layers=(1,)))
    assert mixed.keeping_all_kv() is mixed
