"""Published terms: numbers of others, predictions, and the table of both."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.paper.vegas_terms import TERMS, TermsLine, predict, read_published, table, terms_budget
from planner.cost_model import CAPTURED, PUBLISHED, Efficiency, acceptance_for

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
    assert head.split()[-3:] == ["x", "theirs", "goal"]
    assert [each.split("  ")[-1] for each in lines] == [*goals, "-"]
    assert [each.split()[9:13] for each in lines] == [
        [f"{plain}", "1.00", "940", "1.00"],
        [f"{drafted}", f"{drafted / plain:.2f}", "1576", "1.68"],
        [f"{2 * plain}", "2.00", "1893", "2.01"],
    ]


def test_what_a_table_notes() -> None:
    """Measured times include choosing. Numbers of rows differ where a policy takes memory: each has a plain line."""
    lines = [line(940, 1580, t_choose_ms=None), line(940, 1900, "verified"), replace(line(900, 1500, "quest"), rows=35)]
    _, *shown, note = table(lines).splitlines()
    assert [each.split()[3] for each in shown] == ["plain", "window", "verified", "plain", "quest"]
    assert [each.split()[8] for each in shown] == ["-", "-", "0.00", "-", "0.00"]
    assert shown[-1].split()[-4:-1] == ["1.67", "1247", "1.33"]
    assert note.startswith("quest: its engine replays no forward from CUDA graphs")
    assert "quest:" not in table(lines[:2])


def test_shapes_that_nobody_published() -> None:
    _, plain, window = table([line(100, 150, shape="tiny")]).splitlines()
    assert (plain.split()[-3:], window.split()[-3:]) == (["-"] * 3, ["-"] * 3)


@pytest.mark.parametrize("efficiency", [PUBLISHED, CAPTURED])
def test_predictions(efficiency: Efficiency) -> None:
    lines = predict(VEGAS, "h100", efficiency)
    assert [(each.shape, each.policy) for each in lines] == [
        (shape, policy) for shape in ("qwen3-8b", "qwen3-4b") for policy in ("window", "verified", "quest")
    ]
    for each in lines:
        assert each.t_choose_ms is not None
        assert (each.t_choose_ms > 0) == (each.policy != "window")
        taken = 6 * each.t_draft_ms + each.t_verify_ms + each.t_choose_ms
        assert each.tokens_per_second == pytest.approx(1e3 * each.rows * each.tokens_per_round / taken)
        assert each.plain_tokens_per_second == pytest.approx(1e3 * each.rows / each.t_target_ms)
    # Qwen3-8B: 16.4 GB of weights and 147,456 bytes per token, in 72 GB; with quest a 16th more per token.
    assert [each.rows for each in lines] == [37, 37, 35, 43, 43, 40]
    # 36 layers, 152 float32 per page; a 16th of the KV, twice in 6 steps. At 80 % of 3.35 TB/s.
    _, verified, quest, *_ = lines
    assert verified.t_choose_ms == pytest.approx(37 * 10_000 / 16 * 36 * 152 * 4 / 2.68e9)
    assert quest.t_choose_ms == pytest.approx(35 * 10_000 / 16 * 2 * 147_456 / 2.68e9)
    assert {each.rows for each in predict(VEGAS, "h100", CAPTURED, rows=16)} == {16}


def test_captured_forwards_have_less_overhead() -> None:
    """36 layers, at 0.135 and 0.02 ms each."""
    fitted, captured = (predict(VEGAS, "h100", each)[0] for each in (PUBLISHED, CAPTURED))
    assert fitted.t_target_ms - captured.t_target_ms == pytest.approx(36 * 0.115)
    assert fitted.t_draft_ms - captured.t_draft_ms == pytest.approx(36 * 0.115)
    assert captured.speedup > fitted.speedup


def test_tokens_per_round_are_within_reach() -> None:
    for tokens in VEGAS.tokens.values():
        assert 0 < acceptance_for(VEGAS.gamma, tokens) < 1
