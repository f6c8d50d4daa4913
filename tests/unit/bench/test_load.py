"""bench serve: composition of a load, and definitions of its metrics."""

from __future__ import annotations

import random
from itertools import islice, pairwise
from pathlib import Path
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.corpus import BenchError
from bench.serving.load import Lengths, arrival_times, items
from bench.serving.load_client import RequestRecord
from bench.serving.load_report import Slo, Summary, percentiles, plot, table


@pytest.mark.parametrize(
    ("spec", "shortest", "longest"), [("500", 500, 500), ("uniform:3:9", 3, 9), ("lognormal:50:1.5:200", 1, 200)]
)
def test_lengths(spec: str, shortest: int, longest: int) -> None:
    lengths, rng = Lengths.parse(spec), random.Random(0)
    drawn = [lengths.draw(rng) for _ in range(2000)]
    assert shortest <= min(drawn)
    assert max(drawn) == lengths.longest == longest
    if spec.startswith("lognormal"):
        assert sorted(drawn)[1000] == pytest.approx(50, rel=0.2)


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "0",
        "-5",
        "x",
        "uniform:5",
        "uniform:9:3",
        "uniform:0:3",
        "lognormal:5:0:9",
        "normal:5:1",
        "5:6",
        "uniform:a:b",
    ],
)
def test_what_is_no_length(spec: str) -> None:
    with pytest.raises(BenchError, match="is not a length"):
        Lengths.parse(spec)


@given(st.integers(1, 40), st.integers(0, 60), st.integers(1, 5), st.integers(0, 99))
def test_items(count: int, shared: int, groups: int, seed: int) -> None:
    text = list(range(1000))
    lengths = Lengths.parse("uniform:1:50"), Lengths.parse("uniform:2:3")
    load = items(text, count, *lengths, shared=shared, groups=groups, seed=seed)
    assert load == items(text, count, *lengths, shared=shared, groups=groups, seed=seed)
    assert len(load) == count
    assert all(1 <= len(item.prompt) <= 50 and item.output in (2, 3) for item in load)
    for a, b in zip(load, load[groups:], strict=False):
        same = min(shared, len(a.prompt), len(b.prompt))
        assert a.prompt[:same] == b.prompt[:same]


def test_a_text_that_is_too_short() -> None:
    with pytest.raises(BenchError, match="the text has 5 tokens, fewer than the 9"):
        items([1] * 5, 1, Lengths.parse("9"), Lengths.parse("1"))


def test_arrivals() -> None:
    even = list(islice(arrival_times("constant", 4.0, 0), 5))
    assert even == [0, 0.25, 0.5, 0.75, 1.0]
    gaps = [b - a for a, b in pairwise(islice(arrival_times("poisson", 4.0, 1), 4000))]
    assert mean(gaps) == pytest.approx(0.25, rel=0.1)
    # An exponential distribution has 1 - 1/e of its mass below the mean.
    assert sum(gap < 0.25 for gap in gaps) == pytest.approx(0.632 * len(gaps), rel=0.05)
    assert list(islice(arrival_times("poisson", 4.0, 1), 9)) == list(islice(arrival_times("poisson", 4.0, 1), 9))


def answered(due: float, chunks: list[float], tokens: int) -> RequestRecord:
    return RequestRecord(due, due + 0.01, chunks, chunks[-1] + 0.05, 7, tokens, "answered")


def test_what_is_measured() -> None:
    record = answered(1.0, [1.5, 1.7, 2.1], 7)
    assert record.first_s == 0.5
    assert record.per_token_s == pytest.approx(0.1)  # six tokens after the first, in two chunks
    assert record.gaps_s == pytest.approx([0.2, 0.4])
    assert record.whole_s == pytest.approx(1.15)
    assert answered(0, [1.0], 1).per_token_s is None


def test_a_summary_counts_everything() -> None:
    records = [
        answered(0.0, [0.1, 0.4], 4),
        answered(1.0, [1.6, 2.0], 5),
        RequestRecord(2.0, 2.0, ended=2.1, fate="refused", reason="503 full"),
        RequestRecord(3.0, 3.0, ended=4.0, fate="timed out"),
    ]
    found = Summary.from_records(records, 1.0, False, "on", Slo.parse("ttft:500"))
    assert found.fates == {"answered": 2, "refused": 1, "timed out": 1}
    assert found.seconds == 4.0
    assert (found.requests_per_s, found.tokens_per_s, found.goodput) == (0.5, 9 / 4, 0.25)
    assert found.ttft_ms["p50"] == pytest.approx(100)
    assert found.ttft_ms["p99"] == pytest.approx(600)
    assert found.reasons == {"503 full": 1}
    none = Summary.from_records(records[2:], 1.0, True, "off", None)
    assert (none.requests_per_s, none.goodput, none.ttft_ms) == (0, None, {})
    lines = table([found, none]).splitlines()
    assert len(lines) == 6
    assert "1 users" in lines[2]


@given(st.lists(st.floats(0, 100), min_size=1, max_size=300))
def test_percentiles(values: list[float]) -> None:
    found = percentiles(values)
    for p in (50, 90, 95, 99):
        value = found[f"p{p}"] / 1e3
        assert sum(each <= value + 1e-9 for each in values) >= p / 100 * len(values)
        assert any(abs(value - each) < 1e-9 for each in values)


def test_slo() -> None:
    slo = Slo.parse("ttft:500, tpot:150,e2e:2000")
    assert slo.met(answered(0, [0.4, 0.8], 4))
    assert not slo.met(answered(0, [0.6, 0.8], 4))
    assert not slo.met(answered(0, [0.4, 1.8], 4))
    assert not slo.met(answered(0, [0.4, 2.0], 40))
    assert not slo.met(RequestRecord(0, fate="refused"))
    for wrong in ("ttft", "ttft:x", "first:5", "ttft:0", "ttft:5:6"):
        with pytest.raises(BenchError, match="is not an SLO"):
            Slo.parse(wrong)


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    records = [answered(0.0, [0.1, 0.4], 4)]
    nothing = [RequestRecord(0, ended=1)]
    made = [
        Summary.from_records(each, 1.0, False, value, None) for value in ("on", "off") for each in (records, nothing)
    ]
    plot(made, tmp_path / "load.png")
    assert (tmp_path / "load.png").stat().st_size > 1000
