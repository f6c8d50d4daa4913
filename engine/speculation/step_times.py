"""What the parts of a round take, from measurements at a few batches: what a start-up profile knows. Free of torch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence

import msgspec


class StepSample(msgspec.Struct, frozen=True):
    """One batch that was measured: `rows` rows of `context` tokens each, every one with `gamma` drafts."""

    rows: int
    context: int
    gamma: int
    draft_s: float
    """All draft steps."""
    verify_s: float
    """The target's pass; for gamma = 0 a plain step."""


class _Line:
    """Straight pieces between known points, straight on beyond them."""

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        """points: (x, y), distinct x, in rising order; one point is a constant."""
        self._x = [x for x, _ in points]
        self._y = [y for _, y in points]

    def __call__(self, x: float) -> float:
        if len(self._x) == 1:
            return self._y[0]
        i = min(max(bisect_right(self._x, x), 1), len(self._x) - 1)
        x0, x1, y0, y1 = self._x[i - 1], self._x[i], self._y[i - 1], self._y[i]
        return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


class StepTimes:
    """Times of draft steps and target passes at any batch, in seconds.

    For each number of rows (and gamma) that was measured, a base and a cost per KV token read; in between, straight
    lines over rows and over gamma. No time is below a tenth of the least that was measured.
    """

    def __init__(self, samples: Iterable[StepSample], draft_reads: Callable[[int, int], int]) -> None:
        """draft_reads: KV tokens that a draft step reads of a row with so many tokens, and with what budget; 0: with
        the one that was measured.

        Raises ValueError unless plain steps and drafts were both measured.
        """
        listed = list(samples)
        self.gammas = sorted({sample.gamma for sample in listed})
        if not listed or self.gammas[0] != 0 or len(self.gammas) < 2:
            raise ValueError("a profile needs plain steps and at least one gamma")
        self._reads = draft_reads
        self._verify = {
            gamma: _fit((s.rows, s.rows * float(s.context), s.verify_s) for s in listed if s.gamma == gamma)
            for gamma in self.gammas
        }
        self._draft = _fit(
            (s.rows, s.rows * float(draft_reads(s.context, 0)), s.draft_s / s.gamma) for s in listed if s.gamma
        )
        self._least_verify = 0.1 * min(sample.verify_s for sample in listed)
        self._least_draft = 0.1 * min(sample.draft_s / sample.gamma for sample in listed if sample.gamma)

    def verify(self, rows: int, context_tokens: float, gamma: float) -> float:
        """A pass over `rows` rows with `context_tokens` tokens in all, and gamma drafts each on average."""
        i = min(max(bisect_right(self.gammas, gamma), 1), len(self.gammas) - 1)
        low, high = self.gammas[i - 1], self.gammas[i]
        t_low = _at(self._verify[low], rows, context_tokens)
        t_high = _at(self._verify[high], rows, context_tokens)
        return max(self._least_verify, t_low + (t_high - t_low) * (gamma - low) / (high - low))

    def draft(self, rows: int, contexts: Sequence[int], budget: int) -> float:
        """One draft step of `rows` rows, whose contexts are like `contexts`. budget: see draft_reads."""
        read = sum(self._reads(context, budget) for context in contexts) * rows / len(contexts)
        return max(self._least_draft, _at(self._draft, rows, read))


def _fit(points: Iterable[tuple[int, float, float]]) -> list[tuple[int, _Line]]:
    """By rows: seconds as a line over KV tokens read. points: (rows, KV tokens, seconds)."""
    by_rows: dict[int, dict[float, list[float]]] = {}
    for rows, tokens, seconds in points:
        by_rows.setdefault(rows, {}).setdefault(tokens, []).append(seconds)
    return [
        (rows, _Line([(tokens, min(seconds)) for tokens, seconds in sorted(by_tokens.items())]))
        for rows, by_tokens in sorted(by_rows.items())
    ]


def _at(lines: list[tuple[int, _Line]], rows: int, tokens: float) -> float:
    """Between the two measured numbers of rows nearest to `rows`, at the same KV tokens."""
    return _Line([(float(known), line(tokens)) for known, line in lines])(rows)
