"""Times of the parts of a round, interpolated from the start-up profile. Free of torch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence

import msgspec


class StepSample(msgspec.Struct, frozen=True):
    """One measured batch: `rows` rows of `context` tokens each, all with `gamma` drafts."""

    rows: int
    context: int
    gamma: int
    draft_s: float
    """Seconds of all draft steps."""
    verify_s: float
    """Seconds of the target's pass; for gamma = 0, of a plain step."""


class _Line:
    """Linear interpolation between known points; the outer segments extend beyond them."""

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
    """Times of draft steps and verify passes at any batch, in seconds.

    Each measured number of rows (and gamma) has a base and a cost per KV token read; in between, times are linear in
    rows and in gamma. No time is below a tenth of the smallest measured one.
    """

    def __init__(self, samples: Iterable[StepSample], tokens_read: Callable[[int, int], int]) -> None:
        """tokens_read: maps a row's tokens and a budget to the KV tokens that a draft step reads; budget 0: the
        measured one.

        Raises ValueError unless plain steps and drafts were both measured.
        """
        listed = list(samples)
        self.gammas = sorted({sample.gamma for sample in listed})
        if not listed or self.gammas[0] != 0 or len(self.gammas) < 2:
            raise ValueError("a profile needs plain steps and at least one gamma")
        self._tokens_read = tokens_read
        self._verify = [
            _Plane((s.rows, s.rows * float(s.context), s.verify_s) for s in listed if s.gamma == gamma)
            for gamma in self.gammas
        ]
        self._draft = _Plane(
            (s.rows, s.rows * float(tokens_read(s.context, 0)), s.draft_s / s.gamma) for s in listed if s.gamma
        )
        self._min_verify = 0.1 * min(sample.verify_s for sample in listed)
        self._min_draft = 0.1 * min(sample.draft_s / sample.gamma for sample in listed if sample.gamma)

    def verify(self, rows: int, context_tokens: float, gammas: Iterable[float]) -> list[float]:
        """Return the times of verify passes over `rows` rows with `context_tokens` tokens in all, by mean number of
        drafts per row."""
        measured = [plane(rows, context_tokens) for plane in self._verify]
        found = []
        for gamma in gammas:
            i = min(max(bisect_right(self.gammas, gamma), 1), len(self.gammas) - 1)
            share = (gamma - self.gammas[i - 1]) / (self.gammas[i] - self.gammas[i - 1])
            found.append(max(self._min_verify, measured[i - 1] + (measured[i] - measured[i - 1]) * share))
        return found

    def read(self, contexts: Sequence[int], budget: int) -> float:
        """Return the mean number of KV tokens that a draft step reads of rows with these contexts. budget: see
        `__init__`."""
        return sum([self._tokens_read(context, budget) for context in contexts]) / len(contexts)

    def draft(self, rows: int, read: float) -> float:
        """Return the time of one draft step of `rows` rows that reads `read` KV tokens of each."""
        return max(self._min_draft, self._draft(rows, rows * read))


class _Plane:
    """Seconds over rows and KV tokens: a line over tokens for each number of rows, linear in rows between the two
    nearest lines."""

    def __init__(self, points: Iterable[tuple[int, float, float]]) -> None:
        """points: (rows, KV tokens, seconds); the fastest of those at the same place counts."""
        by_rows: dict[int, dict[float, list[float]]] = {}
        for rows, tokens, seconds in points:
            by_rows.setdefault(rows, {}).setdefault(tokens, []).append(seconds)
        self._lines = {
            rows: _Line([(tokens, min(seconds)) for tokens, seconds in sorted(by_tokens.items())])
            for rows, by_tokens in sorted(by_rows.items())
        }
        self._between: dict[int, tuple[_Line, _Line, float]] = {}

    def __call__(self, rows: int, tokens: float) -> float:
        if rows not in self._between:
            self._between[rows] = self._neighbours(rows)
        low, high, share = self._between[rows]
        below = low(tokens)
        return below + (high(tokens) - below) * share if share else below

    def _neighbours(self, rows: int) -> tuple[_Line, _Line, float]:
        """Return the lines of the two nearest numbers of rows, and the fraction of the way from the first to the second
        at which `rows` is."""
        known = list(self._lines)
        if len(known) == 1:
            return self._lines[known[0]], self._lines[known[0]], 0.0
        i = min(max(bisect_right(known, rows), 1), len(known) - 1)
        low, high = known[i - 1], known[i]
        return self._lines[low], self._lines[high], (rows - low) / (high - low)
