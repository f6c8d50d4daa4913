"""Results of bench.peers.compare: how much of a text is repetition, and the table of a run without any."""

from __future__ import annotations

from bench.peers.compare_report import ComparisonReport, repeated_grams, table


def test_repeated_grams() -> None:
    """Of the 13 sequences of 8 tokens in 20 tokens with a period of 5, those after the fifth were there before."""
    assert repeated_grams([list(range(20))]) == 0
    assert repeated_grams([[1, 2, 3, 4, 5] * 4]) == 1 - 5 / 13
    assert repeated_grams([[1, 2, 3, 4, 5] * 4, list(range(20)), [1]]) == 1 - 18 / 26
    assert repeated_grams([list(range(8)), list(range(8))]) == 0
    assert repeated_grams([[1] * 7, []]) is None


def test_an_empty_table() -> None:
    report = ComparisonReport(threads=2, new_tokens=1, rounds=1, temperatures=[0])
    assert "2 threads; temperature 0 (greedy)" in table(report)
    assert "the prompts" not in table(report)
    report.quota = 1.5
    assert "a quota of 1.5 CPUs for each" in table(report)
