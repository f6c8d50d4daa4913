"""Choice of each row's source of drafts: its text, a model, or its text and then a model.

At a worth of lambda per second, a draft must yield more than its time would yield elsewhere. Let v be the time that one
more draft adds to the verify pass and f what one more row adds to a draft step. A row takes the most valuable of

    text            sum over s <= p of b_s                                     - lambda v p
    model           sum over s <= j of a^s w_s                                 - lambda (v + f) j
    text, model     sum over s <= p of b_s + b_p (sum over s <= j of a^s w_s)  - lambda (v (p + j) + f (p + j))

a is its acceptance probability of a model's drafts and w_s what these are worth (engine.control.text_outlook), b_s =
first * later^(s - 1) the probability that s drafts from the text are accepted (engine.control.text_acceptance), p and j
the largest numbers of drafts that are worth their time. In the last way the model also computes the text's drafts, in
its first step. lambda is the rate that the options of the round have without text, and then the one that this choice
has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from engine.control.text_acceptance import TextAcceptance
from engine.ngram.ngram_drafts import Proposal
from engine.scheduler.request import Request
from kernels.ragged import Ints

Floats = npt.NDArray[np.float64]

_TEXT, _MODEL, _BOTH = range(3)


class ProposedBatch(Protocol):
    """Part of a batch that the choice needs (engine.control.goodput.Batch)."""

    rows: Sequence[Request]
    proposals: Sequence[Proposal]
    limits: Ints


@dataclass(frozen=True, slots=True)
class TextChoice:
    """Choice for each largest number of draft steps. seconds, tokens, worth: [max_gammas], see Options. proposed,
    drafts: [max_gammas, rows], drafts from the text and, after them, of a model."""

    seconds: Floats
    tokens: Floats
    worth: Floats
    proposed: Ints
    drafts: Ints

    @property
    def rates(self) -> Floats:
        """Return the worth per second: [max_gammas]."""
        return self.worth / self.seconds


class TextChooser:
    """Chooser of the ways to draft. O(rows x gamma_max^2) for a batch, in some sixty numpy operations: 1 ms, and 3 for
    128 rows with proposals."""

    def __init__(self, acceptance: TextAcceptance, gamma_max: int, max_model_drafts: int) -> None:
        """gamma_max: largest number of drafts from the text. max_model_drafts: largest number of drafts of a row that a
        model takes part in."""
        self._acceptance = acceptance
        self._steps = np.arange(1, gamma_max + 1)
        self._model_steps = np.arange(1, max_model_drafts + 1)

    def choose(
        self,
        batch: ProposedBatch,
        verify: Sequence[float],
        step_s: tuple[float, float],
        alphas: Floats,
        worth: Floats,
        rates: Floats,
    ) -> TextChoice:
        """Choose for each largest number of draft steps from 0.

        verify: seconds of a verify pass by drafts per row. step_s: seconds of a draft step, with one row and for each
        further row. alphas: [rows], acceptance of a model's drafts. worth: [rows, steps], see TextOutlook. rates:
        [max_gammas], worth per second without text.
        """
        matches = [proposal.match for proposal in batch.proposals]
        betas: Floats = np.array(self._acceptance.alphas([row.id for row in batch.rows], matches))  # [rows, 2]
        lengths = np.array([len(proposal.tokens) for proposal in batch.proposals])
        survival: Floats = betas[:, :1] * betas[:, 1:] ** (self._steps - 1)  # [rows, steps]
        survival = survival * (self._steps <= lengths[:, None])
        after: Floats = alphas[:, None] ** self._model_steps * (self._model_steps <= batch.limits[:, None])
        valued = after * worth[:, : len(self._model_steps)]
        # A verify pass has several slopes over drafts, as kernels and what bounds them change. Three views of it are
        # tried: as if all rows drafted alike, its mean slope, and its first one.
        rises = np.diff(np.array(verify)).clip(min=0) / len(lengths)
        views = np.stack([rises, np.full_like(rises, rises.mean()), np.full_like(rises, rises[0])])
        count = len(rates)
        tried, slope = np.tile(rates, len(views)), np.repeat(views, count, axis=0)
        most = np.minimum(np.tile(np.arange(count), len(views))[:, None], batch.limits)
        best: TextChoice | None = None
        for _ in range(2):
            choice = self._at_rate(tried, slope, survival, after, valued, most, batch.limits, verify, step_s)
            best = _better(best, choice, count)
            tried = np.tile(best.rates, len(views))
        assert best is not None
        return best

    def _at_rate(
        self,
        rates: Floats,
        slope: Floats,
        survival: Floats,
        after: Floats,
        valued: Floats,
        most: Ints,
        limits: Ints,
        verify: Sequence[float],
        step_s: tuple[float, float],
    ) -> TextChoice:
        """Choose where a second is worth `rates`. slope: [options, steps], seconds of one more draft. survival,
        after: [rows, steps], probability that drafts from the text, and a model's alone, are accepted up to a step.
        valued: the latter times what the draft is worth. most: [options, rows], drafts of a model alone. limits:
        [rows], drafts of a row that a model takes part in."""
        first_row_s, further_row_s = step_s
        count, rows = len(survival), np.arange(len(survival))
        text_price = rates[:, None] * slope
        price = (rates * (slope.mean(1) + further_row_s))[:, None]  # of a model's draft
        p = np.zeros((len(rates), count), dtype=np.int64)
        proposes = np.flatnonzero(survival[:, 0])
        p[:, proposes] = _worthwhile(survival[proposes], text_price[:, None])
        reached = np.concatenate([np.ones((count, 1)), survival], 1)[rows, p]
        alone = np.minimum(_worthwhile(valued, price[..., None]), most)
        behind = np.minimum(_worthwhile(valued, (price / reached)[..., None]), np.minimum(most, limits - p).clip(min=0))
        text_tokens, model_tokens, model_worth = _sums(survival), _sums(after), _sums(valued)
        from_text, text_cost = text_tokens[rows, p], np.take_along_axis(_sums(text_price), p, 1)
        both = from_text + reached * model_worth[rows, behind] - text_cost - price * behind
        both -= (rates * further_row_s)[:, None] * p  # the model computes them
        gains = np.stack([from_text - text_cost, model_worth[rows, alone] - price * alone, both])
        way = gains.argmax(0)
        proposed = np.where(way == _MODEL, 0, p)
        drafts = np.where(way == _TEXT, 0, np.where(way == _MODEL, alone, behind))
        of_text, reached = np.where(way == _MODEL, 0.0, from_text), np.where(way == _MODEL, 1.0, reached)
        tokens = count + (of_text + reached * model_tokens[rows, drafts]).sum(1)
        worth = count + (of_text + reached * model_worth[rows, drafts]).sum(1)
        steps = drafts.max(1)
        computed = (drafts + np.where(drafts > 0, proposed, 0)).sum(1)
        seconds = np.interp((proposed + drafts).sum(1) / count, np.arange(len(verify)), verify)
        seconds = seconds + steps * first_row_s + (computed - steps) * further_row_s
        return TextChoice(seconds, tokens, worth, proposed, drafts)


def _better(best: TextChoice | None, choice: TextChoice, count: int) -> TextChoice:
    """Return the better option for each of `count` max_gammas. choice: several for each, one set after another."""
    index = choice.rates.reshape(-1, count).argmax(0) * count + np.arange(count)
    found = TextChoice(*(getattr(choice, name)[index] for name in TextChoice.__slots__))
    if best is None:
        return found
    is_better = found.rates > best.rates

    def pick(name: str) -> npt.NDArray[Any]:
        new, old = getattr(found, name), getattr(best, name)
        chosen: npt.NDArray[Any] = np.where(is_better.reshape(-1, *[1] * (new.ndim - 1)), new, old)
        return chosen

    return TextChoice(*(pick(name) for name in TextChoice.__slots__))


def _worthwhile(values: Floats, least: Floats) -> Ints:
    """Count the leading steps whose value is positive, and at least `least`. values: [rows, steps]. least: [options,
    rows, steps], or a part of it."""
    counts: Ints = ((values > 0) & (values >= least)).cumprod(-1).sum(-1)
    return counts


def _sums(values: Floats) -> Floats:
    """Sum up the first values, by their number: [n, steps + 1]. values: [n, steps]."""
    return np.concatenate([np.zeros((len(values), 1)), values.cumsum(1)], 1)
