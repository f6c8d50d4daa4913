"""OpenTelemetry spans of engine requests: queue, prefill and decode. Off by default; the usual OTEL_EXPORTER_OTLP_*
variables set the destination."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from engine.config.deployment import ConfigError
from server.observe.request_stats import RequestStats

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter


class Tracing:
    """Exporter of spans, in the background and in batches."""

    def __init__(self, model_id: str, exporter: SpanExporter | None = None) -> None:
        """exporter: replaces OTLP over HTTP. Raises ConfigError if the packages are not installed."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            raise ConfigError("server.tracing needs OpenTelemetry: pip install 'magicdec[otel]'") from None
        self._provider = TracerProvider(resource=Resource.create({"service.name": "magicdec"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("magicdec")
        self._propagator = TraceContextTextMapPropagator()
        self._model_id = model_id

    def close(self) -> None:
        """Send the remaining spans."""
        self._provider.shutdown()

    def send(self, stats: RequestStats, parent: str | None) -> None:
        """Send the spans of a request that has ended. parent: its traceparent header."""
        from opentelemetry.trace import SpanKind, set_span_in_context

        origin = time.time_ns() - int(time.monotonic() * 1e9)  # Unix time of the monotonic clock's zero
        context = self._propagator.extract({"traceparent": parent}) if parent else None
        ended = time.monotonic()
        span = self._tracer.start_span(
            "request",
            context,
            SpanKind.SERVER,
            attributes={
                "gen_ai.request.model": self._model_id,
                "gen_ai.usage.input_tokens": stats.prompt_tokens,
                "gen_ai.usage.cache_read.input_tokens": stats.cached_tokens,
                "gen_ai.usage.output_tokens": stats.tokens,
                "gen_ai.response.finish_reasons": [stats.reason or "abort"],
            },
            start_time=origin + int(stats.arrival * 1e9),
        )
        inside = set_span_in_context(span)
        decode = {"rounds": stats.rounds, "drafted": stats.drafted, "accepted": stats.accepted}
        for name, start, end, attributes in (
            ("queue", stats.arrival, stats.scheduled, {}),
            ("prefill", stats.scheduled, stats.first, {}),
            ("decode", stats.first, stats.last, decode),
        ):
            if start and end:
                child = self._tracer.start_span(
                    name, inside, attributes=attributes, start_time=origin + int(start * 1e9)
                )
                child.end(origin + int(max(start, end) * 1e9))
        span.end(origin + int(ended * 1e9))
