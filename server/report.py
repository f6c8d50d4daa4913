"""What speculation did for one choice: of each token how it came, and sums at the end. For requests that ask."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any, Literal

from engine.messages import RequestOutput
from engine.text import Delta

Origin = Literal["accepted", "bonus", "plain"]
"""accepted: drafted, and the target agreed; bonus: the target's own, behind drafts; plain: of a round without any."""


class Report:
    """Of one choice."""

    def __init__(self, arrival: float) -> None:
        """arrival: time.monotonic() when the request came."""
        self._arrival = arrival
        self._scheduled = self._first = self._last = 0.0
        self._tokens = self._drafted = 0
        self._accepted: Counter[int] = Counter()  # by how many held: rounds

    def take(self, output: RequestOutput, delta: Delta) -> dict[str, Any]:
        """What is said of one round, and of all with the last one. `offsets`: where in the choice's text, from the
        first token that was generated on, each of the round's tokens begins."""
        now = time.monotonic()
        self._scheduled = self._scheduled or output.scheduled
        self._first = self._first or now
        self._last = now
        self._tokens += len(delta.tokens)
        self._drafted += output.drafted
        self._accepted[delta.accepted] += 1
        rest: Origin = "bonus" if output.drafted else "plain"
        origins: list[Origin] = ["accepted"] * delta.accepted
        origins += [rest] * (len(delta.tokens) - delta.accepted)
        said = {"drafted": output.drafted, "accepted": delta.accepted, "origins": origins, "offsets": delta.offsets}
        return said if delta.finish_reason is None else said | {"total": self._total()}

    def _total(self) -> dict[str, Any]:
        rounds = self._accepted.total()
        accepted = sum(held * count for held, count in self._accepted.items())
        return {
            "rounds": rounds,
            "drafted": self._drafted,
            "accepted": accepted,
            "mean_drafted": self._drafted / rounds,
            "accepted_per_round": [self._accepted[held] for held in range(max(self._accepted) + 1)],
            "queue_s": max(0.0, self._scheduled - self._arrival) if self._scheduled else None,
            "first_token_s": self._first - self._arrival,
            "per_token_s": (self._last - self._first) / (self._tokens - 1) if self._tokens > 1 else None,
        }


class Reports:
    """Of all choices of an answer in one piece, from what is said of their rounds."""

    def __init__(self) -> None:
        self._found: dict[int, dict[str, Any]] = {}

    def add(self, index: int, said: dict[str, Any] | None) -> None:
        """said: by `Report.take`, of choice `index`; None: it does not ask."""
        if said is None:
            return
        found = self._found.setdefault(index, {"origins": [], "offsets": []})
        found["origins"] += said["origins"]
        found["offsets"] += said["offsets"]
        found |= said.get("total", {})

    def of(self, index: int) -> dict[str, Any]:
        """Fields of the choice."""
        return {"speculation": self._found[index]} if index in self._found else {}
