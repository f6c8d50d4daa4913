"""What became of one request to the engine so far: kept once, for its metrics, its trace and its report."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

from engine.messages import RequestOutput
from engine.text import Delta


@dataclass(slots=True)
class RequestStats:
    """Times are time.monotonic(), and 0 until there is one."""

    arrival: float
    prompt_tokens: int
    scheduled: float = 0.0
    """When it was first admitted."""
    first: float = 0.0
    last: float = 0.0
    """When its first and its newest output came."""
    tokens: int = 0
    drafted: int = 0
    held: Counter[int] = field(default_factory=Counter)
    """By how many drafted tokens were accepted: rounds."""
    reason: str | None = None
    """Why it ended; None before, and where it was broken off."""

    @property
    def rounds(self) -> int:
        return self.held.total()

    @property
    def accepted(self) -> int:
        return sum(held * rounds for held, rounds in self.held.items())

    @property
    def per_token(self) -> float | None:
        """Mean seconds per token after the first output; None where there is none."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else None

    def take(self, output: RequestOutput, delta: Delta) -> float:
        """One round more. Returns the seconds since the output before it, or since the request came."""
        before, self.last = self.last or self.arrival, time.monotonic()
        self.first = self.first or self.last
        self.scheduled = self.scheduled or output.scheduled
        self.tokens += len(delta.tokens)
        self.drafted += output.drafted
        self.held[delta.accepted] += 1
        self.reason = delta.finish_reason
        return self.last - before
