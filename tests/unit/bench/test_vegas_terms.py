"""Published terms: numbers of others, predictions, and the table of both."""

from __future__ import annotations

import pytest

from bench.paper.vegas_terms import TERMS, TermsLine, predict, read_published, table, terms_budget
from planner.cost_model import CAPTURED, PUBLISHED, Efficiency, acceptance_for

VEGAS = TERMS["vegas"]


def line(plain: float, drafted: float, keys: str = "window", shape: str = "qwen3-8b") -> TermsLine:
    return TermsLine(
        shape=shape,
        rows=40,
        context=10_000,
        keys=keys,
        tokens_per_round=4.92,
        plain_tokens_per_second=plain,
        tokens_per_second=drafted,
        t_target_ms=1.0,
        t_draft_ms=2.0,
        t_verify_ms=3.0,
    )


def test_what_was_published() -> None:
    published = read_published()
    assert set(VEGAS.shapes) <= set(published)
    assert published["qwen3-8b"] == {"vllm": 940, "magicdec_window": 1576, "vegas": 1893}
    assert published["qwen3-4b"] == {"vllm": 986, "magicdec_window": 2030, "vegas": 2493}


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
    head, *lines = table([line(plain, drafted), line(plain, 2 * plain, "chosen")]).splitlines()
    assert head.split()[-3:] == ["x", "theirs", "goal"]
    assert [each.split("  ")[-1] for each in lines] == [*goals, "-"]
    assert [each.split()[8:12] for each in lines] == [
        [f"{plain}", "1.00", "940", "1.00"],
        [f"{drafted}", f"{drafted / plain:.2f}", "1576", "1.68"],
        [f"{2 * plain}", "2.00", "1893", "2.01"],
    ]


def test_shapes_that_nobody_published() -> None:
    _, plain, window = table([line(100, 150, shape="tiny")]).splitlines()
    assert (plain.split()[-3:], window.split()[-3:]) == (["-"] * 3, ["-"] * 3)


@pytest.mark.parametrize("efficiency", [PUBLISHED, CAPTURED])
def test_predictions(efficiency: Efficiency) -> None:
    lines = predict(VEGAS, "h100", efficiency)
    assert [(each.shape, each.keys) for each in lines] == [
        (shape, keys) for shape in ("qwen3-8b", "qwen3-4b") for keys in ("window", "chosen")
    ]
    for each in lines:
        taken = 6 * each.t_draft_ms + each.t_verify_ms
        assert each.tokens_per_second == pytest.approx(1e3 * each.rows * each.tokens_per_round / taken)
        assert each.plain_tokens_per_second == pytest.approx(1e3 * each.rows / each.t_target_ms)
    # Qwen3-8B: 16.4 GB of weights and 147,456 bytes per token, in 72 GB.
    assert [each.rows for each in lines] == [37, 37, 43, 43]
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
