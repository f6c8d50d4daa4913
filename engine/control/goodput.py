"""What each way to run the next round promises: its time, by profile and corrections, and its tokens, by acceptance.

A way is a number of drafts per row, and a budget that they read with. One is looked at for each largest number of
drafts, the cap: all rows draft that many, or those do of which each draft is worth its time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.control.acceptance import Estimates
from engine.control.calibration import Corrections
from engine.control.step_times import StepTimes
from engine.scheduler.request import Request

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Batch:
    """The rows of one round, as the promises need them; looked at once, however many ways are.

    contexts: committed tokens of each. limits: [rows], most drafts of each.
    """

    def __init__(self, rows: Sequence[Request], limits: Ints) -> None:
        self.rows = rows
        self.contexts = [len(request.tokens) for request in rows]
        self.count, self.total = len(rows), sum(self.contexts)
        self.limits = limits
        self._read: dict[int, float] = {}

    @classmethod
    def of(cls, rows: Sequence[Request], gamma_max: int) -> Batch:
        limits = np.array([request.most_drafts for request in rows], dtype=np.int64)
        return cls(rows, limits.clip(0, gamma_max))

    def limited(self, limits: Ints) -> Batch:
        """The same rows with other limits."""
        return Batch(self.rows, limits)

    def read(self, times: StepTimes, budget: int) -> float:
        """KV tokens of a row that a draft step reads, on average."""
        if budget not in self._read:
            self._read[budget] = times.read(self.contexts, budget)
        return self._read[budget]


@dataclass(frozen=True, slots=True)
class Way:
    """gammas: per row. seconds, tokens: promised, of the whole batch."""

    gammas: list[int]
    budget: int
    seconds: float
    tokens: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Ways:
    """By cap, the best way with at most so many drafts per row; [0] is plain decoding. [caps] each.

    drafts: [caps, rows].
    """

    budget: int
    seconds: Floats
    tokens: Floats
    rates: Floats
    drafts: Ints

    def __len__(self) -> int:
        return len(self.rates)

    def __getitem__(self, cap: int) -> Way:
        return Way(self.drafts[cap].tolist(), self.budget, float(self.seconds[cap]), float(self.tokens[cap]))

    @property
    def best(self) -> int:
        """The cap that promises most."""
        return int(self.rates.argmax())


class Promises:
    """Of one engine. O(rows × gamma_max) for a batch and a budget."""

    def __init__(self, times: StepTimes, corrections: Corrections, estimates: Estimates, gamma_max: int) -> None:
        self._times = times
        self._corrections = corrections
        self._estimates = estimates
        self._gamma_max = gamma_max
        self._steps = np.arange(1, gamma_max + 1)

    def ways(self, batch: Batch, budget: int) -> Ways:
        count = batch.count
        longest = int(batch.limits.max(initial=0))
        verify = self._verify(batch)
        plain = np.array([verify[0]]), np.array([float(count)])
        if not longest:
            nothing = np.zeros((1, count), dtype=np.int64)
            return Ways(budget, *plain, plain[1] / plain[0], nothing)
        one, per_row = self._draft(batch, budget)
        caps = steps = self._steps[:longest]

        def seconds(drafts: Ints, forwards: Ints) -> Floats:
            """Of rounds with so many drafts in all, in so many steps: the first row of each step costs `one`, the
            others `per_row`."""
            verifying = np.interp(drafts / count, np.arange(len(verify)), verify)
            took: Floats = verifying + forwards * one + (drafts - forwards) * per_row
            return took

        alphas = np.array(self._estimates.alphas([row.id for row in batch.rows], batch.contexts, budget))
        allowed = steps <= batch.limits[:, None]
        holds = alphas[:, None] ** steps * allowed  # [rows, steps]: draft s holds with probability alpha^s
        even_tokens = count + holds.sum(0).cumsum()
        even_seconds = seconds(allowed.sum(0).cumsum(), caps)
        even_rates = even_tokens / even_seconds
        # A row's next draft has to bring more than the time it takes would bring elsewhere.
        price = even_rates * (np.diff(verify[: longest + 1]) / count + per_row)
        worth = (holds >= price[:, None, None]) & allowed & (steps <= caps[:, None, None])  # [caps, rows, steps]
        by_step = worth.sum(1)
        drafts = by_step.sum(1)
        tokens = count + (holds * worth).sum((1, 2))
        took = seconds(drafts, (by_step > 0).sum(1))
        better = (drafts > 0) & (tokens / took > even_rates)
        tokens = np.concatenate([plain[1], np.where(better, tokens, even_tokens)])
        took = np.concatenate([plain[0], np.where(better, took, even_seconds)])
        gammas = np.zeros((longest + 1, count), dtype=np.int64)
        gammas[1:] = np.where(better[:, None], worth.sum(2), np.minimum(caps[:, None], batch.limits))
        return Ways(budget, took, tokens, tokens / took, gammas)

    def _verify(self, batch: Batch) -> list[float]:
        """Seconds of the target's pass, by gamma."""
        times = self._times.verify(batch.count, batch.total, range(self._gamma_max + 1))
        kinds = ["plain"] + ["verify"] * self._gamma_max
        return [
            seconds * self._corrections.factor(kind, bucket(batch, gamma))
            for gamma, (kind, seconds) in enumerate(zip(kinds, times, strict=True))
        ]

    def _draft(self, batch: Batch, budget: int) -> tuple[float, float]:
        """Seconds of a draft step: with one row, and what each further row adds."""
        read = batch.read(self._times, budget)
        factor = self._corrections.factor("draft", bucket(batch, budget))
        one = factor * self._times.draft(1, read)
        if batch.count == 1:
            return one, 0.0
        return one, (factor * self._times.draft(batch.count, read) - one) / (batch.count - 1)


def bucket(batch: Batch, detail: int) -> tuple[int, int, int]:
    """Batches of about this size share corrections. detail: gamma, or the drafts' budget."""
    return batch.count.bit_length(), batch.total.bit_length(), detail
