"""Tracing spans of requests: their names, times and parents."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from server.observe.tracing import Tracing
from tests.support.app import server

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_spans(directory: Path) -> None:
    exporter = InMemorySpanExporter()

    async def main() -> None:
        async with server(directory) as (http, _, service):
            service.tracing = Tracing("m", exporter)
            body = {"prompt": [10, 11] * 10, "max_tokens": 5, "ignore_eos": True}
            for stream in (False, True):
                answer = await http.post(
                    "/v1/completions", json=body | {"stream": stream}, headers={"traceparent": PARENT}
                )
                assert answer.status_code == 200
            await asyncio.to_thread(service.tracing.close)

    asyncio.run(main())
    spans = exporter.get_finished_spans()
    requests = [span for span in spans if span.name == "request"]
    cached = [span.attributes["gen_ai.usage.cache_read.input_tokens"] for span in requests if span.attributes]
    assert cached == [0, 16]
    for request in requests:
        assert request.attributes is not None
        assert f"{request.context.trace_id:032x}" in PARENT
        assert (request.attributes["gen_ai.usage.input_tokens"], request.attributes["gen_ai.usage.output_tokens"]) == (
            20,
            5,
        )
        mine = [span for span in spans if span.parent and span.parent.span_id == request.context.span_id]
        assert [span.name for span in mine][-1] == "decode"
        for span in mine:
            times = [request.start_time, span.start_time, span.end_time, request.end_time]
            assert times == sorted(times, key=lambda time: time or 0)


def test_none_without_asking(directory: Path) -> None:
    async def main() -> None:
        async with server(directory) as (_, _, service):
            assert service.tracing is None

    asyncio.run(main())


def test_without_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from engine.config.deployment import ConfigError

    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"pip install 'magicdec\[otel\]'"):
        Tracing("m")
