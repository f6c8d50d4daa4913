"""Statistics of one engine request, kept once for its metrics, its trace and its report."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

from engine.messages import RequestOutput
from engine.text import Delta


@dataclass(slots=True)
class RequestStats:
    """Statistics of one request so far. Times are time.monotonic(), 0 until known."""

    arrival: float
    prompt_tokens: int
    cached_tokens: int = 0
    """Prompt tokens that the prefix cache held at the request's first admission."""
    scheduled: float = 0.0
    """Time of the request's first admission."""
    first: float = 0.0
    last: float = 0.0
    """Arrival times of the first and the newest output."""
    tokens: int = 0
    drafted: int = 0
    accepted_from_text: int = 0
    accepted_from_model: int = 0
    """Those of a draft model."""
    held: Counter[int] = field(default_factory=Counter)
    """Number of rounds, by number of accepted drafts."""
    reason: str | None = None
    """Finish reason; None before the end, and for a request that was cut short."""

    @property
    def rounds(self) -> int:
        return self.held.total()

    @property
    def accepted(self) -> int:
        return sum(held * rounds for held, rounds in self.held.items())

    @property
    def per_token(self) -> float | None:
        """Mean seconds per token after the first output; None if there are no such tokens."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else None

    def take(self, output: RequestOutput, delta: Delta) -> float:
        """Add one round. Returns the seconds since the previous output, or since the request's arrival."""
        before, self.last = self.last or self.arrival, time.monotonic()
        self.first = self.first or self.last
        self.scheduled = self.scheduled or output.scheduled
        self.cached_tokens = self.cached_tokens or output.cached_tokens
        self.tokens += len(delta.tokens)
        self.drafted += output.drafted
        from_text = min(output.from_text, delta.accepted)
        self.accepted_from_text += from_text
        if output.by_model:
            self.accepted_from_model += delta.accepted - from_text
        self.held[delta.accepted] += 1
        self.reason = delta.finish_reason
        return self.last - before
