"""Published terms: numbers of others, predictions, and the table of both."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.paper.vegas_terms import TERMS, TermsLine, predict, read_published, table, terms_budget
from planner.cost_model import acceptance_for
from planner.placed_model import CAPTURED, PUBLISHED, Efficiency

VEGAS = TERMS["vegas"]


def line(
    plain: float, drafted: float, policy: str = "window", shape: str = "qwen3-8b", t_choose_ms: float | None = 0.0
) -> TermsLine:
    return TermsLine(
        shape=shape,
        rows=40,
        context=10_000,
        policy=policy,
        tokens_per_round=4.92,
        plain_tokens_per_second=plain,
        tokens_per_second=drafted,
        t_target_ms=1.0,
        t_draft_ms=2.0,
        t_verify_ms=3.0,
        t_choose_ms=t_choose_ms,
    )


def test_what_was_published() -> None:
    published = read_published()
    assert set(VEGAS.shapes) <= set(published)
    assert published["qwen3-8b"] == {"vllm": 940, "magicdec_window": 1576, "quest": 1247, "vegas": 1893}
    assert published["qwen3-4b"] == {"vllm": 986, "magicdec_window": 2030, "quest": 1665, "vegas": 2493}
    assert set(VEGAS.forecasts) == set(published)
    long = read_published(TERMS["vegas-long"].setting)
    assert set(TERMS["vegas-long"].forecasts) == set(long)
    assert long["gpt-oss-20b"] == {"vllm": 512.8, "magicdec_window": 961.2, "vegas": 1130.4}


def test_budget() -> None:
    """7 % of the context, at least 256, in whole pages."""
    assert [terms_budget(context) for context in (100, 3657, 3658, 10_000)] == [256, 256, 272, 704]


@pytest.mark.parametrize(
    ("plain", "drafted", "goals"),
    [
        (940, 1580, [">= 940: reached", ">= 1.68: reached"]),
        (939, 1570, [">= 940: not reached", ">= 1.68: not reached"]),
    ],
)
def test_goals(plain: float, drafted: float, goals: list[str]) -> None:
    head, *lines = table([line(plain, drafted), line(plain, 2 * plain, "verified")]).splitlines()
    assert head.split()[-4:] == ["x", "theirs", "error", "goal"]
    assert [each.split("  ")[-1] for each in lines] == [*goals, "-"]
    errors = [f"{each:+.0%}" for each in (plain / 940 - 1, drafted / plain * 940 / 1576 - 1, 2 * 940 / 1893 - 1)]
    assert [each.split()[9:14] for each in lines] == [
        [f"{plain}", "1.00", "940", "1.00", errors[0]],
        [f"{drafted}", f"{drafted / plain:.2f}", "1576", "1.68", errors[1]],
        [f"{2 * plain}", "2.00", "1893", "2.01", errors[2]],
    ]


def test_what_a_table_notes() -> None:
    """Measured times include choosing. Numbers of rows differ where a policy takes memory: each has a plain line."""
    lines = [line(940, 1580, t_choose_ms=None), line(940, 1900, "verified"), replace(line(900, 1500, "quest"), rows=35)]
    _, *shown, note = table(lines).splitlines()
    assert [each.split()[3] for each in shown] == ["plain", "window", "verified", "plain", "quest"]
    assert [each.split()[8] for each in shown] == ["-", "-", "0.00", "-", "0.00"]
    assert shown[-1].split()[-5:-1] == ["1.67", "1247", "1.33", "+26%"]
    assert note.startswith("quest: its engine replays no forward from CUDA graphs")
    assert "quest:" not in table(lines[:2])


def test_shapes_that_nobody_published() -> None:
    _, plain, window = table([line(100, 150, shape="tiny")]).splitlines()
    assert (plain.split()[-4:], window.split()[-4:]) == (["-"] * 4, ["-"] * 4)


@pytest.mark.parametrize("efficiency", [PUBLISHED, CAPTURED])
def test_predictions(efficiency: Efficiency) -> None:
    lines = predict(VEGAS, "h100", efficiency)
    assert [(each.shape, each.policy) for each in lines] == [
        (shape, policy) for shape in VEGAS.forecasts for policy in ("window", "verified", "quest")
    ]
    for each in lines:
        assert each.t_choose_ms is not None
        assert (each.t_choose_ms > 0) == (each.policy != "window")
        taken = 6 * each.t_draft_ms + each.t_verify_ms + each.t_choose_ms
        assert each.tokens_per_second == pytest.approx(1e3 * each.rows * each.tokens_per_round / taken)
        assert each.plain_tokens_per_second == pytest.approx(1e3 * each.rows / each.t_target_ms)
    # Qwen3-8B: 16.4 GB of weights and 147,456 bytes per token, in 72 GB; with quest a 16th more per token.
    # Qwen3-30B-A3B: 61.1 GB and 98,304. gpt-oss: 13.8 GB, and 128 rows at most.
    assert [each.rows for each in lines] == [37, 37, 35, 43, 43, 40, 11, 11, 10, 128, 128, 128]
    # 36 layers, 152 float32 per page; a 16th of the KV, twice in 6 steps. At 80 % of 3.35 TB/s.
    _, verified, quest, *_ = lines
    assert verified.t_choose_ms == pytest.approx(37 * 10_000 / 16 * 36 * 152 * 4 / 2.68e9)
    assert quest.t_choose_ms == pytest.approx(35 * 10_000 / 16 * 2 * 147_456 / 2.68e9)
    assert {each.rows for each in predict(VEGAS, "h100", CAPTURED, rows=16)} == {16}


def test_contexts_beyond_what_a_model_states() -> None:
    lines = predict(TERMS["vegas-long"], "h100", CAPTURED)
    assert {each.policy for each in lines} == {"window", "verified"}
    assert {each.context for each in lines} == {100_000}
    # 14.7 and 14.7 GB of KV per row beside 16.4 and 8.0 of weights; gpt-oss has 2.5 GB per row in 12 of 24 layers.
    assert [each.rows for each in lines[::2]] == [3, 4, 1, 23]


def test_captured_forwards_have_less_overhead() -> None:
    """36 layers, at 0.135 and 0.02 ms each."""
    fitted, captured = (predict(VEGAS, "h100", each)[0] for each in (PUBLISHED, CAPTURED))
    assert fitted.t_target_ms - captured.t_target_ms == pytest.approx(36 * 0.115)
    assert fitted.t_draft_ms - captured.t_draft_ms == pytest.approx(36 * 0.115)
    assert captured.speedup > fitted.speedup


def test_tokens_per_round_are_within_reach() -> None:
    for tokens in VEGAS.tokens.values():
        assert 0 < acceptance_for(VEGAS.gamma, tokens) < 1
