"""Results and report of a mixed load, and the load itself."""

from __future__ import annotations

import pytest

from bench.offline.mixed import Outcome, Result, arrivals, report


def outcome(seconds: float, chat: list[float], document: list[float]) -> Outcome:
    first = {"chat": [0.5, 1.5] if chat else [], "document": [4.0] if document else []}
    return Outcome(seconds, 100, [3, 0, 7], first=first, per_token={"chat": chat, "document": document})


def test_runs_of_one_way() -> None:
    found = Result.from_outcomes("auto", [outcome(9.0, [0.1, 0.2], []), outcome(11.0, [0.6], [])])
    assert (found.load_s, found.runs_s, found.tokens_per_second) == (10.0, [9.0, 11.0], 10.0)
    assert (found.chat_first_s, found.chat_slowest_s, found.chat_token_s) == (1.0, 1.5, 0.2)
    assert (found.document_first_s, found.document_slowest_s, found.document_token_s) == (None, None, None)
    assert found.gamma_chosen == [6, 0, 14]


def test_the_best_way_is_named_for_each_measure() -> None:
    off = Result.from_outcomes("off", [outcome(10.0, [0.1], [0.4])])
    auto = Result.from_outcomes("auto", [outcome(12.0, [0.1], [0.2])])
    text = report([off, auto])
    assert "best for the load: off (auto x 1.20)" in text
    assert "best for document, per token: auto (off x 2.00)" in text
    assert "best for document" not in report([Result.from_outcomes("off", [outcome(10.0, [0.1], [])])])


def test_a_load_is_what_was_asked_for() -> None:
    load = arrivals(400, rate=2.0, documents=0.25, longest=1000, text=5000, seed=1)
    assert [one.at for one in load] == sorted(one.at for one in load)
    assert load[-1].at == pytest.approx(200, rel=0.2)
    documents = [one for one in load if one.kind == "document"]
    assert len(documents) == pytest.approx(100, rel=0.3)
    assert all(500 <= one.prompt <= 1000 for one in documents)
    assert all(one.first + one.prompt <= 5000 for one in load)
