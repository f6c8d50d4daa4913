"""Prometheus metrics of the engine and of requests, under magicdec_* and under vLLM's names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from engine.messages import EngineState, EngineStats
from server.observe.request_stats import RequestStats

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_MODEL = ("model_name",)


def _owned(stats: EngineStats) -> int:
    """Return the number of pages of the target's KV pool that belong to requests."""
    return stats.pages_total - stats.pages_cached - stats.pages_free


_GAUGES: tuple[tuple[str, str | None, str, Callable[[EngineStats], float]], ...] = (
    ("requests_running", "num_requests_running", "Requests running.", lambda s: s.running),
    ("requests_waiting", "num_requests_waiting", "Requests waiting.", lambda s: s.waiting),
    ("pages_total", None, "Pages of the target's KV pool, without that of sliding layers.", lambda s: s.pages_total),
    (
        "kv_cache_usage_ratio",
        "kv_cache_usage_perc",
        "Fraction of the target's KV pool that belongs to requests; cached pages do not.",
        lambda s: _owned(s) / s.pages_total if s.pages_total else 0.0,
    ),
    ("paused", None, "1 while no round begins, paused or asleep.", lambda s: s.state is not EngineState.RUNNING),
    (
        "kv_token_bytes",
        None,
        "Bytes of KV cache per token, all heads, and all layers that keep the KV of all tokens.",
        lambda s: s.kv_token_bytes,
    ),
)
_COUNTERS: tuple[tuple[str, str | None, str, Callable[[EngineStats], float]], ...] = (
    ("rounds", None, "Rounds run.", lambda s: s.rounds),
    (
        "prompt_tokens",
        "prompt_tokens",
        "Prompt tokens, computed or found in the prefix cache.",
        lambda s: s.prompt_tokens,
    ),
    ("generated_tokens", "generation_tokens", "Tokens generated.", lambda s: s.generated_tokens),
    ("preemptions", "num_preemptions", "Requests preempted.", lambda s: s.preemptions),
    (
        "prefix_queries",
        "prefix_cache_queries",
        "Prompt tokens looked up in the prefix cache.",
        lambda s: s.prefix_queries,
    ),
    ("prefix_hits", "prefix_cache_hits", "Prompt tokens found in the prefix cache.", lambda s: s.prefix_hits),
    ("prefix_evictions", None, "Cached pages given to other requests.", lambda s: s.prefix_evictions),
    (
        "drafts",
        "spec_decode_num_drafts",
        "Drafts verified: rows with drafted tokens, summed over rounds.",
        lambda s: s.drafts,
    ),
    ("draft_tokens", "spec_decode_num_draft_tokens", "Tokens drafted.", lambda s: s.draft_tokens),
    (
        "accepted_tokens",
        "spec_decode_num_accepted_tokens",
        "Drafted tokens accepted.",
        lambda s: s.accepted_tokens,
    ),
    ("text_draft_tokens", None, "Drafted tokens found in text.", lambda s: s.text_draft_tokens),
    ("text_accepted_tokens", None, "Drafted tokens found in text and accepted.", lambda s: s.text_accepted_tokens),
    ("model_draft_tokens", None, "Tokens drafted by a draft model.", lambda s: s.model_draft_tokens),
    ("model_accepted_tokens", None, "Tokens drafted by a draft model and accepted.", lambda s: s.model_accepted_tokens),
    ("kv_tokens_read", None, "KV tokens read by draft and verify passes.", lambda s: s.kv_tokens_read),
    ("engine_restarts", None, "Engines restarted after one died.", lambda s: s.engine_restarts),
    ("requests_retried", None, "Requests retried after an engine died.", lambda s: s.requests_retried),
)


class Metrics:
    """Metrics in their own registry, updated by the routes and read from `stats` (None while the engine loads)."""

    def __init__(self, model_id: str, stats: Callable[[], EngineStats | None]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(model_id, stats))
        registry, self._model_id = self._registry, model_id

        def histogram(own: str, vllm: str, text: str) -> _DualHistogram:
            return _DualHistogram(
                Histogram(f"magicdec_{own}", text, _MODEL, registry=registry, buckets=_SECONDS),
                Histogram(f"vllm:{vllm}", text, _MODEL, registry=registry, buckets=_SECONDS),
                model_id,
            )

        self.first_token = histogram(
            "time_to_first_token_seconds",
            "time_to_first_token_seconds",
            "Time from a request's arrival to its first token.",
        )
        self.between_tokens = histogram(
            "inter_token_latency_seconds",
            "inter_token_latency_seconds",
            "Time between tokens; tokens of one round share its time evenly.",
        )
        self.per_token = histogram(
            "time_per_output_token_seconds",
            "request_time_per_output_token_seconds",
            "Mean time per token of a request after its first token.",
        )
        self.whole = histogram(
            "request_seconds", "e2e_request_latency_seconds", "Time from a request's arrival to its last token."
        )
        self.queued = histogram(
            "queue_seconds", "request_queue_time_seconds", "Time from a request's arrival to its first round."
        )
        labels = (*_MODEL, "finished_reason")
        self._finished = [
            Counter(name, "Finished requests by finish reason.", labels, registry=registry)
            for name in ("magicdec_requests_finished", "vllm:request_success")
        ]

    def finished(self, reason: str) -> None:
        for counter in self._finished:
            counter.labels(self._model_id, reason).inc()

    def round(self, stats: RequestStats, tokens: int, seconds: float) -> None:
        """Record one output. tokens: their number. seconds: since the previous one, or since the request's arrival."""
        if stats.rounds == 1 and stats.scheduled:
            self.queued.observe(max(0.0, stats.scheduled - stats.arrival))
        if tokens and tokens == stats.tokens:
            self.first_token.observe(seconds)
        else:
            for _ in range(tokens):
                self.between_tokens.observe(seconds / tokens)
        if stats.reason is not None:
            self.whole.observe(stats.last - stats.arrival)
            if stats.per_token is not None:
                self.per_token.observe(stats.per_token)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _DualHistogram:
    """One histogram under two names."""

    def __init__(self, own: Histogram, vllm: Histogram, model_id: str) -> None:
        self._histograms = (own.labels(model_id), vllm.labels(model_id))

    def observe(self, seconds: float) -> None:
        for histogram in self._histograms:
            histogram.observe(seconds)


class _EngineCollector(Collector):
    def __init__(self, model_id: str, stats: Callable[[], EngineStats | None]) -> None:
        self._model_id = model_id
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        if stats is None:
            return
        model = [self._model_id]
        for own, vllm, text, value in _GAUGES:
            for name in _names(own, vllm):
                gauge = GaugeMetricFamily(name, text, labels=_MODEL)
                gauge.add_metric(model, value(stats))
                yield gauge
        for own, vllm, text, value in _COUNTERS:
            for name in _names(own, vllm):
                counter = CounterMetricFamily(name, text, labels=_MODEL)
                counter.add_metric(model, value(stats))
                yield counter
        yield from self._pools(stats)
        yield from self._positions(stats)
        yield from self._rounds(stats)
        if stats.weights:
            yield self._weights(stats.weights)
        yield self._kv_format(stats.kv_format)
        if stats.target_kv:
            yield self._target_kv(stats.target_kv)
        if stats.decode_seconds:
            yield from self._speedup(stats)

    def _pools(self, stats: EngineStats) -> Iterator[Metric]:
        pages = GaugeMetricFamily(
            "magicdec_pages",
            "Pages of the target's KV pool: owned by requests, cached for later prompts, or free. Requests can get "
            "cached and free ones.",
            labels=(*_MODEL, "state"),
        )
        for state, count in (("owned", _owned(stats)), ("cached", stats.pages_cached), ("free", stats.pages_free)):
            pages.add_metric([self._model_id, state], count)
        yield pages
        used = GaugeMetricFamily(
            "magicdec_pages_in_use", "Pages of KV that belong to running requests.", labels=(*_MODEL, "pool")
        )
        used.add_metric([self._model_id, "target"], _owned(stats))
        if stats.draft_pages_per_row:
            used.add_metric([self._model_id, "draft"], stats.running * stats.draft_pages_per_row)
        if stats.sliding_pages_total:
            used.add_metric([self._model_id, "sliding"], stats.sliding_pages_owned)
        yield used

    def _positions(self, stats: EngineStats) -> Iterator[Metric]:
        for name in _names("accepted_tokens_per_position", "spec_decode_num_accepted_tokens_per_pos"):
            counter = CounterMetricFamily(
                name, "Accepted draft tokens by place in the draft.", labels=(*_MODEL, "position")
            )
            for position, count in enumerate(stats.accepted_per_position):
                counter.add_metric([self._model_id, str(position)], count)
            yield counter

    def _rounds(self, stats: EngineStats) -> Iterator[Metric]:
        gamma = HistogramMetricFamily(
            "magicdec_gamma", "Drafted tokens with which a row entered a round.", labels=_MODEL
        )
        buckets, total = [], 0
        for tokens, count in enumerate(stats.gamma_chosen):
            total += count
            buckets.append((f"{tokens}.0", float(total)))
        gamma.add_metric(
            [self._model_id],
            [*buckets, ("+Inf", float(total))],
            float(sum(tokens * count for tokens, count in enumerate(stats.gamma_chosen))),
        )
        yield gamma
        busy = CounterMetricFamily(
            "magicdec_round_seconds", "Busy time of the engine by part of a round.", labels=(*_MODEL, "part")
        )
        busy.add_metric([self._model_id, "draft"], stats.draft_seconds)
        busy.add_metric([self._model_id, "verify"], stats.verify_seconds)
        busy.add_metric([self._model_id, "host"], stats.host_seconds)
        yield busy

    def _weights(self, formats: dict[str, str]) -> Metric:
        info = GaugeMetricFamily(
            "magicdec_weights_info",
            "1: the target and drafts multiply by weights of these formats.",
            labels=(*_MODEL, *formats),
        )
        info.add_metric([self._model_id, *formats.values()], 1)
        return info

    def _kv_format(self, name: str) -> Metric:
        info = GaugeMetricFamily(
            "magicdec_kv_format_info",
            "1: computed pages of the target's KV have this format; with any but dense, its text is not the dense "
            "model's.",
            labels=(*_MODEL, "format"),
        )
        info.add_metric([self._model_id, name], 1)
        return info

    def _target_kv(self, settings: dict[str, str | int]) -> Metric:
        """Return the mark of a target whose text is not the dense model's."""
        info = GaugeMetricFamily(
            "magicdec_target_kv_info",
            "1: the target reads only part of its KV, with these settings, and its text is not the dense model's.",
            labels=(*_MODEL, *settings),
        )
        info.add_metric([self._model_id, *map(str, settings.values())], 1)
        return info

    def _speedup(self, stats: EngineStats) -> Iterator[Metric]:
        """Yield the gain of speculation, for a controller that tracks it."""
        decode = CounterMetricFamily(
            "magicdec_decode_seconds",
            "Rounds that only decoded: what they took, what the same tokens would have taken without drafts, and what "
            "was predicted.",
            labels=(*_MODEL, "of"),
        )
        decode.add_metric([self._model_id, "measured"], stats.decode_seconds)
        decode.add_metric([self._model_id, "plain"], stats.plain_seconds)
        decode.add_metric([self._model_id, "predicted"], stats.forecast_seconds)
        yield decode
        alpha = GaugeMetricFamily(
            "magicdec_acceptance_estimate",
            "Probability that a drafted token holds, as estimated now.",
            labels=(*_MODEL, "policy"),
        )
        alpha.add_metric([self._model_id, stats.policy], stats.alpha)
        yield alpha


def _names(own: str, vllm: str | None) -> Iterator[str]:
    yield f"magicdec_{own}"
    if vllm is not None:
        yield f"vllm:{vllm}"
