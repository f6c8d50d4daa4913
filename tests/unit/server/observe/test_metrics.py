"""Metrics under both names."""

from __future__ import annotations

import asyncio
from pathlib import Path

from engine.messages import EngineStats
from server.observe.metrics import Metrics
from tests.support.app import server
from tests.support.fake_engine import REFUSE


def test_metrics_have_both_names(directory: Path) -> None:
    async def main() -> None:
        async with server(directory) as (http, _, _):
            await http.post("/v1/completions", json={"prompt": [10], "max_tokens": 7})
            await http.post("/v1/completions", json={"prompt": [REFUSE]})
            text = (await http.get("/metrics")).text
            label = '{model_name="tiny"}'
            for line in (
                f"vllm:num_requests_running{label} 0.0",
                f"vllm:kv_cache_usage_perc{label} 0.0",
                'magicdec_pages{model_name="tiny",state="free"} 1000.0',
                'vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name="tiny",position="1"} 2.0',
                f"magicdec_gamma_count{label} 5.0",
                f"magicdec_gamma_sum{label} 8.0",
                'magicdec_gamma_bucket{le="0.0",model_name="tiny"} 1.0',
                f"vllm:time_to_first_token_seconds_count{label} 1.0",
                f"magicdec_time_to_first_token_seconds_count{label} 1.0",
                f"vllm:inter_token_latency_seconds_count{label} 4.0",
                f"vllm:request_time_per_output_token_seconds_count{label} 1.0",
                f"vllm:e2e_request_latency_seconds_count{label} 1.0",
                f"vllm:request_queue_time_seconds_count{label} 1.0",
                'vllm:request_success_total{finished_reason="length",model_name="tiny"} 1.0',
                'magicdec_requests_finished_total{finished_reason="abort",model_name="tiny"} 1.0',
            ):
                assert line in text.splitlines()

    asyncio.run(main())


def test_metrics_of_what_drafts_keep_and_gain() -> None:
    stats = EngineStats(
        running=3,
        pages_total=10,
        pages_free=1,
        pages_cached=3,
        policy="snapkv",
        draft_pages_per_row=5,
        sliding_pages_total=20,
        sliding_pages_owned=7,
        alpha=0.75,
        decode_seconds=2.0,
    )
    lines = Metrics("m", lambda: stats).text().decode().splitlines()
    assert 'magicdec_pages_in_use{model_name="m",pool="target"} 6.0' in lines
    assert 'magicdec_pages_in_use{model_name="m",pool="draft"} 15.0' in lines
    assert 'magicdec_pages_in_use{model_name="m",pool="sliding"} 7.0' in lines
    assert 'magicdec_acceptance_estimate{model_name="m",policy="snapkv"} 0.75' in lines
    plain = Metrics("m", lambda: EngineStats(pages_total=10)).text().decode()
    assert 'pool="draft"' not in plain
    assert 'pool="sliding"' not in plain
    assert "acceptance_estimate" not in plain


def test_metrics_of_the_prefix_cache(directory: Path) -> None:
    async def main() -> None:
        async with server(directory) as (http, _, _):
            for _ in range(3):
                await http.post("/v1/completions", json={"prompt": list(range(10, 50)), "max_tokens": 2})
            lines = (await http.get("/metrics")).text.splitlines()
            label = '{model_name="tiny"}'
            for line in (
                f"vllm:prefix_cache_queries_total{label} 120.0",
                f"magicdec_prefix_queries_total{label} 120.0",
                f"vllm:prefix_cache_hits_total{label} 64.0",
                f"magicdec_prefix_hits_total{label} 64.0",
                f"magicdec_prefix_evictions_total{label} 0.0",
            ):
                assert line in lines

    asyncio.run(main())


def test_cached_pages_are_not_in_use() -> None:
    stats = EngineStats(pages_total=10, pages_free=1, pages_cached=5, prefix_evictions=6)
    lines = Metrics("m", lambda: stats).text().decode().splitlines()
    for line in (
        'magicdec_pages{model_name="m",state="owned"} 4.0',
        'magicdec_pages{model_name="m",state="cached"} 5.0',
        'magicdec_pages{model_name="m",state="free"} 1.0',
        'magicdec_pages_in_use{model_name="m",pool="target"} 4.0',
        'magicdec_kv_cache_usage_ratio{model_name="m"} 0.4',
        'vllm:kv_cache_usage_perc{model_name="m"} 0.4',
        'magicdec_prefix_evictions_total{model_name="m"} 6.0',
    ):
        assert line in lines


def test_pages_that_the_load_calls_free_are_all_that_a_request_could_get(directory: Path) -> None:
    async def main() -> None:
        async with server(directory) as (http, _, _):
            await http.post("/v1/completions", json={"prompt": list(range(10, 50)), "max_tokens": 2})
            assert 'magicdec_pages{model_name="tiny",state="cached"} 2.0' in (await http.get("/metrics")).text
            load = (await http.get("/load")).json()
            assert load == {"state": "running", "running": 0, "waiting": 0, "pages_total": 1000, "pages_free": 1000}

    asyncio.run(main())
