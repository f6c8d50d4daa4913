"""Times of the parts of a round, interpolated from the start-up profile. Free of torch.

Rows that list the same pages share one read of them (Ops.shared_stretch). Each row's queries still compute with every
token, so a shared token is not free. Its price relative to a token that is read for its own row is measured, for each
number of rows and each gamma, and a batch takes the time of one that shares nothing and has this many tokens:

    effective tokens = unique tokens + price × shared tokens,      unique + shared = sum of the rows' contexts

The price falls towards 0 where memory bounds attention, and rises to 1 where arithmetic does: on CPUs that takes a few
queries per row. Without a measured price it is 1, no gain: expecting one would start or stop drafting for no reason.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import msgspec

from engine.plan import DrafterName
from engine.scheduler.controller import shared_by_drafts


class StepSample(msgspec.Struct, frozen=True):
    """One measured batch: `rows` rows of `context` tokens each, all with `gamma` drafts, which a model made unless
    `from_text`."""

    rows: int
    context: int
    gamma: int
    draft_s: float
    """Seconds of all draft steps."""
    verify_s: float
    """Seconds of the target's pass; for gamma = 0, of a plain step."""
    shared: int = 0
    """KV tokens of the contexts that needed no reading, because another row listed the same pages."""
    from_text: bool = False
    drafter: DrafterName | None = None
    """See RoundPlan."""


class _Line:
    """Linear interpolation between known points; the outer segments extend beyond them."""

    def __init__(self, points: Sequence[tuple[float, float]], beyond: float | None = None) -> None:
        """points: (x, y), distinct x, in rising order; one point is a constant. beyond: slope after the last of several
        points; None: that of the last segment."""
        self._x = [x for x, _ in points]
        self._y = [y for _, y in points]
        self._beyond = beyond

    def __call__(self, x: float) -> float:
        if len(self._x) == 1:
            return self._y[0]
        if self._beyond is not None and x > self._x[-1]:
            return self._y[-1] + self._beyond * (x - self._x[-1])
        i = min(max(bisect_right(self._x, x), 1), len(self._x) - 1)
        x0, x1, y0, y1 = self._x[i - 1], self._x[i], self._y[i - 1], self._y[i]
        return y0 + (y1 - y0) * (x - x0) / (x1 - x0)

    def clamped(self, x: float) -> float:
        """Interpolate, with the end values beyond the ends."""
        return self(min(max(x, self._x[0]), self._x[-1]))

    @property
    def slope(self) -> float:
        """Return the slope between the ends; 0 for one point."""
        return (self._y[-1] - self._y[0]) / (self._x[-1] - self._x[0]) if len(self._x) > 1 else 0.0


class _Point(NamedTuple):
    """One measured time. tokens: KV tokens of all rows. shared: those of them that needed no reading."""

    rows: int
    tokens: float
    shared: float
    seconds: float


class StepTimes:
    """Times of draft steps and verify passes at any batch, in seconds.

    Each measured number of rows (and gamma) has a base and a cost per effective KV token; in between, times are linear
    in rows and in gamma. No time is below a tenth of the smallest measured one.
    """

    def __init__(
        self,
        samples: Iterable[StepSample],
        tokens_read: Callable[[int, int], int],
        *,
        drafts_share: bool = True,
        drafter: DrafterName | None = None,
    ) -> None:
        """tokens_read: maps a row's tokens and a budget to the KV tokens that a draft step reads; budget 0: the
        measured one. drafts_share: see KVSettings.shares_pages. drafter: the model whose draft steps count, as in
        samples.

        Raises ValueError unless plain steps and drafts were both measured, of rows that share nothing.
        """
        listed = list(samples)
        self.gammas = sorted({sample.gamma for sample in listed if not sample.shared})
        if len(self.gammas) < 2 or self.gammas[0] != 0:
            raise ValueError("a profile needs plain steps and at least one gamma")
        self._tokens_read, self._drafts_share = tokens_read, drafts_share
        self._verify = [
            _Plane(_Point(s.rows, s.rows * s.context, s.shared, s.verify_s) for s in listed if s.gamma == gamma)
            for gamma in self.gammas
        ]
        drafted = [s for s in listed if s.gamma and not s.from_text and s.drafter == drafter]
        # Rows of one length: windows over them coincide where those of real rows would not, so they give no price.
        self._draft = _Plane(
            _Point(s.rows, s.rows * tokens_read(s.context, 0), s.shared, s.draft_s / s.gamma)
            for s in drafted
            if not s.shared or (drafts_share and tokens_read(s.context, 0) >= s.context)
        )
        self._min_verify = 0.1 * min(sample.verify_s for sample in listed)
        self._min_draft = 0.1 * min([s.draft_s / s.gamma for s in drafted], default=0.0)

    def verify(
        self, rows: int, context_tokens: float, gammas: Iterable[float], shared_tokens: float = 0
    ) -> list[float]:
        """Return the times of verify passes over `rows` rows with `context_tokens` tokens in all, by mean number of
        drafts per row. shared_tokens: those of them that need no reading."""
        over_gamma = _Line(
            [
                (gamma, plane(rows, context_tokens, shared_tokens))
                for gamma, plane in zip(self.gammas, self._verify, strict=True)
            ]
        )
        return [max(self._min_verify, over_gamma(gamma)) for gamma in gammas]

    def shared_price(self, rows: int, gamma: float) -> float | None:
        """Return the price of a shared token in a verify pass; None if it was not measured."""
        prices = [plane.price(rows) for plane in self._verify]
        if all(price is None for price in prices):
            return None
        over_gamma = [(each, 1.0 if price is None else price) for each, price in zip(self.gammas, prices, strict=True)]
        return _Line(over_gamma).clamped(gamma)

    def effective_tokens(self, rows: int, context_tokens: float, shared_tokens: float, gamma: float) -> float:
        """Return the effective tokens of a verify pass; with gamma 0, of a plain step."""
        price = self.shared_price(rows, gamma) if shared_tokens else None
        return _effective(context_tokens, shared_tokens, price)

    def read(self, contexts: Sequence[int], budget: int) -> float:
        """Return the mean number of KV tokens that a draft step reads of rows with these contexts. budget: see
        `__init__`."""
        return sum([self._tokens_read(context, budget) for context in contexts]) / len(contexts)

    def draft_shared(self, contexts: Sequence[int], budget: int, shared_tokens: float) -> float:
        """Estimate the shared tokens that a draft step over all these rows need not read. shared_tokens: of their
        contexts."""
        if not shared_tokens or not self._drafts_share:
            return 0.0
        return shared_by_drafts(shared_tokens, contexts, contexts, self._tokens_read, budget)

    def draft(self, rows: int, read: float, shared_tokens: float = 0) -> float:
        """Return the time of one draft step of `rows` rows that reads `read` KV tokens of each, of which a profile of a
        model that drafts is needed. shared_tokens: those of all rows' that need no reading."""
        return max(self._min_draft, self._draft(rows, rows * read, shared_tokens))


def _effective(tokens: float, shared: float, price: float | None) -> float:
    """Compute the effective tokens of a batch; see the head of this module."""
    return tokens if price is None else tokens - (1 - price) * shared


def _common_slope(lines: Iterable[Sequence[tuple[float, float]]]) -> float:
    """Fit one slope, of at least 0, to what each line rises by between its ends. lines: points in rising order."""
    rises = [(line[-1][0] - line[0][0], line[-1][1] - line[0][1]) for line in lines]
    squares = sum([x * x for x, _ in rises])
    return max(0.0, sum([x * y for x, y in rises]) / squares) if squares else 0.0


class _Plane:
    """Seconds over rows and effective KV tokens: a line over tokens for each number of rows, linear in rows between the
    two nearest lines.

    Real batches have many times the measured tokens. A line's own slope, from two noisy points, would be off by far
    there, and the difference between two of them by more. So all lines have one slope beyond their ends: the least
    squares of what was measured, and never below 0.
    """

    def __init__(self, points: Iterable[_Point]) -> None:
        """points: the fastest of those at the same place counts. Those that share tokens give prices only."""
        by_rows: dict[int, dict[float, list[float]]] = {}
        sharing: dict[int, _Point] = {}
        for point in points:
            if not point.shared:
                by_rows.setdefault(point.rows, {}).setdefault(point.tokens, []).append(point.seconds)
            elif point.rows not in sharing or point.shared > sharing[point.rows].shared:
                sharing[point.rows] = point  # noise matters least where most is shared
        fastest = {
            rows: [(tokens, min(seconds)) for tokens, seconds in sorted(by_tokens.items())]
            for rows, by_tokens in sorted(by_rows.items())
        }
        beyond = _common_slope(fastest.values())
        self._lines = {rows: _Line(points, beyond) for rows, points in fastest.items()}
        self._between: dict[int, tuple[_Line, _Line, float]] = {}
        prices = [
            (rows, self._measured_price(self._lines[rows], point))
            for rows, point in sorted(sharing.items())
            if rows in self._lines and self._lines[rows].slope > 0
        ]
        self._price = _Line(prices) if prices else None

    def __call__(self, rows: int, tokens: float, shared: float) -> float:
        """Return the seconds of a batch. shared: those of its tokens that need no reading."""
        if shared:
            tokens = _effective(tokens, shared, self.price(rows))
        if rows not in self._between:
            self._between[rows] = self._neighbours(rows)
        low, high, share = self._between[rows]
        below = low(tokens)
        return below + (high(tokens) - below) * share if share else below

    def price(self, rows: int) -> float | None:
        """Return the price of a shared token; None if it was not measured."""
        return self._price.clamped(rows) if self._price else None

    @staticmethod
    def _measured_price(line: _Line, point: _Point) -> float:
        """Compute the price at which the effective tokens take the measured time. line: over unshared tokens."""
        saved = (line(point.tokens) - point.seconds) / (line.slope * point.shared)
        return min(max(1 - saved, 0.0), 1.0)

    def _neighbours(self, rows: int) -> tuple[_Line, _Line, float]:
        """Return the lines of the two nearest numbers of rows, and the fraction of the way from the first to the second
        at which `rows` is."""
        known = list(self._lines)
        if len(known) == 1:
            return self._lines[known[0]], self._lines[known[0]], 0.0
        i = min(max(bisect_right(known, rows), 1), len(known) - 1)
        low, high = known[i - 1], known[i]
        return self._lines[low], self._lines[high], (rows - low) / (high - low)
