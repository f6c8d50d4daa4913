"""Speculation report of a choice, on request: the origin of each token, and totals at the end."""

from __future__ import annotations

from typing import Any, Literal

from engine.messages import RequestOutput
from engine.text import Delta
from server.observe.request_stats import RequestStats

Origin = Literal["self", "model", "text", "bonus", "plain"]
"""self: drafted by the target with the KV that drafts read, and the target agreed. model: drafted by a draft model,
likewise. text: found in text, likewise. bonus: the target's own, after drafts. plain: of a round without any."""


def round_report(stats: RequestStats, output: RequestOutput, delta: Delta) -> dict[str, Any]:
    """Report one round; the last report adds the totals of all rounds. stats: includes this round. `offsets`: start
    of each of the round's tokens in the generated text of the choice."""
    rest: Origin = "bonus" if output.drafted else "plain"
    from_text = min(output.from_text, delta.accepted)
    origins: list[Origin] = ["text"] * from_text
    origins += ["model" if output.by_model else "self"] * (delta.accepted - from_text)
    origins += [rest] * (len(delta.tokens) - delta.accepted)
    said = {"drafted": output.drafted, "accepted": delta.accepted, "origins": origins, "offsets": delta.offsets}
    return said if delta.finish_reason is None else said | {"total": _total(stats)}


def _total(stats: RequestStats) -> dict[str, Any]:
    return {
        "rounds": stats.rounds,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "accepted_from_text": stats.accepted_from_text,
        "accepted_from_model": stats.accepted_from_model,
        "mean_drafted": stats.drafted / stats.rounds,
        "accepted_per_round": [stats.held[held] for held in range(max(stats.held) + 1)],
        "queue_s": max(0.0, stats.scheduled - stats.arrival) if stats.scheduled else None,
        "first_token_s": stats.first - stats.arrival,
        "per_token_s": stats.per_token,
    }


class SpeculationReports:
    """Reports of all choices of a non-streamed answer, merged from the reports of their rounds."""

    def __init__(self) -> None:
        self._found: dict[int, dict[str, Any]] = {}

    def add(self, index: int, said: dict[str, Any] | None) -> None:
        """Add a round of choice `index`. said: result of `round_report`; None: not requested."""
        if said is None:
            return
        found = self._found.setdefault(index, {"origins": [], "offsets": []})
        found["origins"] += said["origins"]
        found["offsets"] += said["offsets"]
        found |= said.get("total", {})

    def fields(self, index: int) -> dict[str, Any]:
        """Return the fields that the report adds to the choice."""
        return {"speculation": self._found[index]} if index in self._found else {}
