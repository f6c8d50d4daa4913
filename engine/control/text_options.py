"""Choice of each row's source of drafts: its text, a model, or its text and then a model.

At a worth of lambda per second, a draft must yield more than its time would yield elsewhere. Let v be the time that one
more draft adds to the verify pass and f what one more row adds to a draft step. A row takes the most valuable of

    text            sum over s <= p of b_s                                     - lambda v p
    model           sum over s <= j of a^s w_s                                 - lambda (v + f) j
    text, model     sum over s <= p of b_s + b_p (sum over s <= j of a^s w_s)  - lambda (v (p + j) + f j + q p)

a is its acceptance probability of a model's drafts and w_s what these are worth (engine.control.text_outlook), b_s =
first * later^(s - 1) the probability that s drafts from the text are accepted (engine.control.text_acceptance), p and j
the largest numbers of drafts that are worth their time. In the last way the model also computes the text's drafts, in
its first step. q is the time that each adds to it: f, and where there is one row alone, as large a share of the step as
v is of the verify pass. lambda is the rate that the options of the round have without text, and then the one that this
choice has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

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


class DraftStep(NamedTuple):
    """Seconds of a model's draft step. first_row: with one row. further_row: more for each further row. query: more for
    each draft from the text that it also computes."""

    first_row: float = 0.0
    further_row: float = 0.0
    query: float = 0.0


@dataclass(frozen=True, slots=True)
class _Rows:
    """Estimates of the rows. survival, after: [rows, steps], probability that drafts from the text, and a model's
    alone, are accepted up to a step. valued: the latter times what the draft is worth. limits: [rows], drafts of a row
    that a model takes part in."""

    survival: Floats
    after: Floats
    valued: Floats
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
        step: DraftStep,
        alphas: Floats,
        worth: Floats,
        rates: Floats,
    ) -> TextChoice:
        """Choose for each largest number of draft steps from 0.

        verify: seconds of a verify pass by drafts per row. step: of the model that drafts. alphas: [rows], its drafts'
        acceptance. worth: [rows, steps], see TextOutlook. rates: [max_gammas], worth per second without text.
        """
        matches = [proposal.match for proposal in batch.proposals]
        betas: Floats = np.array(self._acceptance.alphas([row.id for row in batch.rows], matches))  # [rows, 2]
        lengths = np.array([len(proposal.tokens) for proposal in batch.proposals])
        survival: Floats = betas[:, :1] * betas[:, 1:] ** (self._steps - 1)  # [rows, steps]
        survival = survival * (self._steps <= lengths[:, None])
        after: Floats = alphas[:, None] ** self._model_steps * (self._model_steps <= batch.limits[:, None])
        of_rows = _Rows(survival, after, after * worth[:, : len(self._model_steps)], batch.limits)
        # A verify pass has several slopes over drafts, as kernels and what bounds them change. Three views of it are
        # tried: as if all rows drafted alike, its mean slope, and its first one.
        rises = np.diff(np.array(verify)).clip(min=0) / len(lengths)
        views = np.stack([rises, np.full_like(rises, rises.mean()), np.full_like(rises, rises[0])])
        count = len(rates)
        tried, slope = np.tile(rates, len(views)), np.repeat(views, count, axis=0)
        most = np.minimum(np.tile(np.arange(count), len(views))[:, None], batch.limits)
        best: TextChoice | None = None
        for _ in range(2):
            choice = _at_rate(tried, slope, most, of_rows, verify, step)
            best = _better(best, choice, count)
            tried = np.tile(best.rates, len(views))
        assert best is not None
        return best


def _at_rate(
    rates: Floats, slope: Floats, most: Ints, of_rows: _Rows, verify: Sequence[float], step: DraftStep
) -> TextChoice:
    """Choose where a second is worth `rates`. slope: [options, steps], seconds of one more draft in a verify pass.
    most: [options, rows], drafts of a model alone."""
    survival, limits = of_rows.survival, of_rows.limits
    count, rows = len(survival), np.arange(len(survival))
    text_price = rates[:, None] * slope
    price = (rates * (slope.mean(1) + step.further_row))[:, None]  # of a model's draft
    p = np.zeros((len(rates), count), dtype=np.int64)
    proposes = np.flatnonzero(survival[:, 0])
    p[:, proposes] = _worthwhile(survival[proposes], text_price[:, None])
    reached = np.concatenate([np.ones((count, 1)), survival], 1)[rows, p]
    alone = np.minimum(_worthwhile(of_rows.valued, price[..., None]), most)
    behind = _worthwhile(of_rows.valued, (price / reached)[..., None])
    behind = np.minimum(behind, np.minimum(most, limits - p).clip(min=0))
    text_tokens, model_tokens, model_worth = (_sums(each) for each in (survival, of_rows.after, of_rows.valued))
    from_text, text_cost = text_tokens[rows, p], np.take_along_axis(_sums(text_price), p, 1)
    both = from_text + reached * model_worth[rows, behind] - text_cost - price * behind
    both -= (rates * step.query)[:, None] * p  # the model computes them
    gains = np.stack([from_text - text_cost, model_worth[rows, alone] - price * alone, both])
    way = gains.argmax(0)
    proposed = np.where(way == _MODEL, 0, p)
    drafts = np.where(way == _TEXT, 0, np.where(way == _MODEL, alone, behind))
    of_text, of_model = np.where(way == _MODEL, 0.0, from_text), np.where(way == _MODEL, 1.0, reached)
    tokens = count + (of_text + of_model * model_tokens[rows, drafts]).sum(1)
    worth = count + (of_text + of_model * model_worth[rows, drafts]).sum(1)
    steps, queries = drafts.max(1), np.where(drafts > 0, proposed, 0).sum(1)
    seconds = np.interp((proposed + drafts).sum(1) / count, np.arange(len(verify)), verify)
    seconds += steps * step.first_row + (drafts.sum(1) - steps) * step.further_row + queries * step.query
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
