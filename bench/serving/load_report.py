"""Summarise a load: latency percentiles, throughput and goodput, as a table and as plots of latency over throughput."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean

import msgspec

from bench.corpus import BenchError
from bench.paper.forecast_report import check_plotting
from bench.serving.load_client import RequestRecord

PERCENTILES = (50, 90, 95, 99)


class Slo(msgspec.Struct, frozen=True):
    """Latency limits of a request, in seconds: time to first token, time per further token, total. None: no limit."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    @classmethod
    def parse(cls, text: str) -> Slo:
        """Parse an SLO like `ttft:500,tpot:50`, in milliseconds. Raises BenchError."""
        try:
            parts = dict(part.strip().split(":") for part in text.split(",") if part.strip())
            limits = {name: float(value) / 1e3 for name, value in parts.items()}
            if any(limit <= 0 for limit in limits.values()):
                raise ValueError
            return cls(**limits)
        except (TypeError, ValueError):
            raise BenchError(
                f"{text!r} is not an SLO: expected milliseconds for any of ttft, tpot and e2e, like ttft:500,tpot:50"
            ) from None

    def met(self, record: RequestRecord) -> bool:
        """Check whether a request met all limits. Only an answered one can."""
        if record.fate != "answered" or not record.chunks:
            return False
        each = (self.ttft, record.first_s), (self.tpot, record.per_token_s), (self.e2e, record.whole_s)
        return all(limit is None or taken is None or taken <= limit for limit, taken in each)


class TurnSummary(msgspec.Struct):
    """Answered requests of one turn of conversations. prompt_tokens, cached_tokens: means; cached_tokens is None where
    the server does not say. ttft_ms: time to first token, by percentile."""

    turn: int
    requests: int
    prompt_tokens: float
    cached_tokens: float | None
    ttft_ms: dict[str, float]

    @classmethod
    def from_records(cls, turn: int, records: Sequence[RequestRecord]) -> TurnSummary:
        cached = [record.cached_tokens for record in records if record.cached_tokens is not None]
        return cls(
            turn=turn,
            requests=len(records),
            prompt_tokens=mean(record.prompt_tokens for record in records),
            cached_tokens=mean(cached) if cached else None,
            ttft_ms=percentiles(record.first_s for record in records),
        )


class RequestLine(msgspec.Struct):
    """One request. cached_tokens: None where the server does not say. ttft_ms: None without a first token."""

    turn: int
    fate: str
    prompt_tokens: int
    cached_tokens: int | None
    tokens: int
    ttft_ms: float | None

    @classmethod
    def from_record(cls, record: RequestRecord) -> RequestLine:
        return cls(
            turn=record.turn,
            fate=record.fate,
            prompt_tokens=record.prompt_tokens,
            cached_tokens=record.cached_tokens,
            tokens=record.tokens,
            ttft_ms=1e3 * record.first_s if record.chunks else None,
        )


class Summary(msgspec.Struct):
    """Results of one load level with one value of --speculation. Times in milliseconds, by percentile.

    level: requests or conversations per second; in a closed loop, those in flight. closed: whether the loop is closed.
    fates: number of requests by outcome. seconds: from the first due time to the last end. requests_per_s,
    tokens_per_s: answered requests and their output tokens. goodput: answered requests per second that met the SLO;
    None without one.
    reasons: the five most frequent error messages, with their counts. hit_rate: share of prompt tokens found in the
    server's prefix cache, by its metrics; None if they do not say. cached: the same by the usage of answered requests.
    turns: answered requests by turn. requests: every request.

    Of answered requests, ttft_ms: from the due time to the first text. tpot_ms: per token after it, by the server's
    count. itl_ms: between chunks. e2e_ms: from the due time to the end. Of all requests, late_ms: from the due time to
    the send.
    """

    level: float
    closed: bool
    speculation: str
    fates: dict[str, int]
    seconds: float
    requests_per_s: float
    tokens_per_s: float
    goodput: float | None
    ttft_ms: dict[str, float]
    tpot_ms: dict[str, float]
    itl_ms: dict[str, float]
    e2e_ms: dict[str, float]
    late_ms: dict[str, float]
    reasons: dict[str, int]
    hit_rate: float | None
    cached: float | None
    turns: list[TurnSummary]
    requests: list[RequestLine]

    @classmethod
    def from_records(
        cls,
        records: Sequence[RequestRecord],
        level: float,
        closed: bool,
        speculation: str,
        slo: Slo | None,
        hit_rate: float | None = None,
    ) -> Summary:
        """Summarise the records of one run. hit_rate: of the server's prefix cache, by its metrics."""
        answered = [record for record in records if record.fate == "answered" and record.chunks]
        seconds = max(record.ended for record in records) - min(record.due for record in records)
        counted = [(record.prompt_tokens, record.cached_tokens) for record in answered]
        known = [(prompt, cached) for prompt, cached in counted if cached is not None and prompt]
        by_turn: dict[int, list[RequestRecord]] = {}
        for record in answered:
            by_turn.setdefault(record.turn, []).append(record)
        good = None if slo is None else sum(map(slo.met, records)) / seconds
        return cls(
            level=level,
            closed=closed,
            speculation=speculation,
            fates=dict(Counter(record.fate for record in records)),
            seconds=seconds,
            requests_per_s=len(answered) / seconds,
            tokens_per_s=sum(record.tokens for record in answered) / seconds,
            goodput=good,
            ttft_ms=percentiles(record.first_s for record in answered),
            tpot_ms=percentiles(each for record in answered if (each := record.per_token_s) is not None),
            itl_ms=percentiles(gap for record in answered for gap in record.gaps_s),
            e2e_ms=percentiles(record.whole_s for record in answered),
            late_ms=percentiles(record.sent - record.due for record in records),
            reasons=dict(Counter(record.reason for record in records if record.reason).most_common(5)),
            hit_rate=hit_rate,
            cached=sum(cached for _, cached in known) / sum(prompt for prompt, _ in known) if known else None,
            turns=[TurnSummary.from_records(turn, by_turn[turn]) for turn in sorted(by_turn)],
            requests=[RequestLine.from_record(record) for record in records],
        )


def percentiles(seconds: Iterable[float]) -> dict[str, float]:
    """Compute p50 … p99 by nearest rank, and the mean, in milliseconds. Empty without values."""
    ordered = sorted(seconds)
    if not ordered:
        return {}
    found = {f"p{p}": 1e3 * ordered[max(0, -(-len(ordered) * p // 100) - 1)] for p in PERCENTILES}
    return found | {"mean": 1e3 * sum(ordered) / len(ordered)}


def table(summaries: Sequence[Summary]) -> str:
    head = (
        "load",
        "drafts",
        "ok",
        "other",
        "req/s",
        "tok/s",
        "goodput",
        "ttft50",
        "ttft95",
        "tpot50",
        "tpot95",
        "e2e50",
        "e2e95",
        "hits",
        "cached",
    )
    lines = ["".join(f"{name:>10}" for name in head)]
    for each in summaries:
        ok = each.fates.get("answered", 0)
        cells = (
            f"{each.level:g} {'users' if each.closed else '/s'}",
            each.speculation,
            ok,
            sum(each.fates.values()) - ok,
            f"{each.requests_per_s:.2f}",
            f"{each.tokens_per_s:.1f}",
            "-" if each.goodput is None else f"{each.goodput:.2f}",
            *(_ms(times, p) for times in (each.ttft_ms, each.tpot_ms, each.e2e_ms) for p in ("p50", "p95")),
            _percent(each.hit_rate),
            _percent(each.cached),
        )
        lines.append("".join(f"{cell!s:>10}" for cell in cells))
    if any(len(each.turns) > 1 for each in summaries):
        lines += _turn_table(summaries)
    for each in summaries:
        for reason, count in each.reasons.items():
            lines.append(f"{each.level:g}, {each.speculation}: {count} x {reason}")
    lines.append(
        "times in ms; from when a request was due; tpot: per token after the first, by the server's count; hits, "
        "cached: share of prompt tokens in the prefix cache, by the server's metrics and by the usage of its answers"
    )
    return "\n".join(lines)


def _turn_table(summaries: Sequence[Summary]) -> list[str]:
    """Format time to first token by turn of the conversations."""
    head = ("load", "drafts", "turn", "requests", "prompt", "cached", "ttft50", "ttft90")
    lines = ["", "".join(f"{name:>10}" for name in head)]
    for each in summaries:
        for turn in each.turns:
            cells = (
                f"{each.level:g} {'users' if each.closed else '/s'}",
                each.speculation,
                turn.turn,
                turn.requests,
                f"{turn.prompt_tokens:.0f}",
                "-" if turn.cached_tokens is None else f"{turn.cached_tokens:.0f}",
                _ms(turn.ttft_ms, "p50"),
                _ms(turn.ttft_ms, "p90"),
            )
            lines.append("".join(f"{cell!s:>10}" for cell in cells))
    return lines


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _ms(times: dict[str, float], percentile: str) -> str:
    return f"{times[percentile]:.0f}" if times else "-"


def plot(summaries: Sequence[Summary], path: Path) -> None:
    """Plot time to first token and time per token over throughput to a PNG, as medians and 95th percentiles.

    Raises PlotError without matplotlib, OSError if the file cannot be written.
    """
    check_plotting()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4))
    for speculation in dict.fromkeys(each.speculation for each in summaries):
        mine = [each for each in summaries if each.speculation == speculation and each.ttft_ms and each.tpot_ms]
        for panel, name, times in (
            (panels[0], "time to first token", [each.ttft_ms for each in mine]),
            (panels[1], "time per output token", [each.tpot_ms for each in mine]),
        ):
            across = [each.tokens_per_s for each in mine]
            (line,) = panel.plot(across, [t["p50"] for t in times], marker="o", label=f"speculation {speculation}")
            panel.plot(across, [t["p95"] for t in times], marker=".", linestyle=":", color=line.get_color())
            panel.set(xlabel="output tokens per second", ylabel=f"{name}, ms (dotted: p95)")
    for panel in panels:
        panel.set_ylim(bottom=0)
        panel.legend()
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
