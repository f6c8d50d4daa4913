"""The speculation report names where each token came from."""

from __future__ import annotations

import pytest

from engine.messages import RequestOutput
from engine.text import Delta
from server.observe.request_stats import RequestStats
from server.observe.speculation_report import round_report


@pytest.mark.parametrize(
    ("drafted", "accepted", "from_text", "origins"),
    [
        (0, 0, 0, ["plain"]),
        (3, 2, 0, ["self", "self", "bonus"]),
        (3, 2, 3, ["text", "text", "bonus"]),
        (4, 3, 2, ["text", "text", "self", "bonus"]),
        (4, 1, 2, ["text", "bonus"]),
        (2, 0, 2, ["bonus"]),
    ],
)
def test_origins(drafted: int, accepted: int, from_text: int, origins: list[str]) -> None:
    tokens = list(range(accepted + 1))
    output = RequestOutput("a", tokens=tokens, drafted=drafted, accepted=accepted, from_text=from_text)
    delta = Delta("", tokens, tokens, None, drafted, accepted, "length", None)
    stats = RequestStats(arrival=0.0, prompt_tokens=3)
    stats.take(output, delta)
    report = round_report(stats, output, delta)
    assert report["origins"] == origins
    assert report["total"]["accepted_from_text"] == origins.count("text")
    assert report["total"]["accepted"] == accepted
