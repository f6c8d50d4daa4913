"""Goodput: predicted tokens per second of each option for the next round (the word is SmartSpec's, arXiv 2406.14066).

An option is a number of drafts per row, what they read, and the budget that they read with. Its time comes from the
profile, corrected by calibration; its tokens from acceptance estimates. For each max_gamma, the largest number of
drafts per row, there is one option: all rows draft that many, or each row drafts as many as are worth their time,
whichever has more goodput.

    goodput = (rows + sum over rows of alpha + alpha^2 + ... + alpha^gamma) / (verify + draft steps)

with each row's own gamma and acceptance probability alpha. Section 3 of MagicDec (arXiv 2408.11049) has the same ratio
for one gamma. Where text is searched, rows also choose between its tokens and a model's (engine.control.text_options),
and a model's count for what they are worth (engine.control.text_outlook).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.control.acceptance import Reading
from engine.control.calibration import Calibration
from engine.control.drafting_model import DraftingModel
from engine.control.step_times import StepTimes
from engine.control.text_options import DraftStep, TextChooser
from engine.control.text_outlook import TextOutlook
from engine.ngram.ngram_drafts import Proposal
from engine.plan import DrafterName
from engine.scheduler.controller import RowDrafts, Way
from engine.scheduler.request import Request
from kernels.ragged import Ints

_MARGIN = 0.01
"""Acceptance by which the latest pages must be better than chosen ones."""

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


class Batch:
    """The rows of one round, prepared once for all options.

    contexts: number of committed tokens of each. total: of all. shared: those that need no reading (Controller.choose).
    limits: [rows], largest number of drafts that a model makes of each. proposals: what its text proposes to each;
    empty where none of them proposes anything.
    """

    def __init__(
        self, rows: Sequence[Request], limits: Ints, shared_tokens: int, proposals: Sequence[Proposal] = ()
    ) -> None:
        self.rows = rows
        self.proposals = proposals if any(proposal.tokens for proposal in proposals) else ()
        self.contexts = [len(request.tokens) for request in rows]
        self.count, self.total = len(rows), sum(self.contexts)
        self.shared = shared_tokens
        self.limits = limits
        self._read: dict[tuple[StepTimes, int], tuple[float, float]] = {}

    @classmethod
    def from_requests(
        cls,
        rows: Sequence[Request],
        gamma_max: int,
        shared_tokens: int,
        proposals: Sequence[Proposal] = (),
        share: int | None = None,
    ) -> Batch:
        """gamma_max: largest number of drafts of a row that a model makes. share: see Controller.choose."""
        limits = np.array([request.max_draft_tokens for request in rows], dtype=np.int64)
        return cls(
            rows, limits.clip(0, gamma_max if share is None else min(gamma_max, share)), shared_tokens, proposals
        )

    def limited(self, limits: Ints) -> Batch:
        """Return the same rows with other limits."""
        return Batch(self.rows, limits, self.shared, self.proposals)

    def draft_seconds(self, times: StepTimes, budget: int, rows: int) -> float:
        """Predict the seconds of a draft step of `rows` of these rows, before calibration."""
        if (times, budget) not in self._read:
            shared = times.draft_shared(self.contexts, budget, self.shared)
            self._read[times, budget] = times.read(self.contexts, budget), shared
        read, shared = self._read[times, budget]
        return times.draft(rows, read, shared * (rows - 1) / (self.count - 1) if rows > 1 else 0)

    def verify_seconds(self, times: StepTimes, gammas: Iterable[float]) -> list[float]:
        """Predict the seconds of verify passes by mean number of drafts per row, before calibration."""
        return times.verify(self.count, self.total, gammas, self.shared)


@dataclass(frozen=True, slots=True)
class Option:
    """One option. drafts: per row. seconds, tokens, worth: predicted, of the whole batch; see Options."""

    drafts: list[RowDrafts]
    way: Way
    seconds: float
    tokens: float
    worth: float

    @property
    def rate(self) -> float:
        """Return the worth per second."""
        return self.worth / self.seconds


@dataclass(frozen=True, slots=True)
class Options:
    """Options of each max_gamma from 0: plain decoding, or, where text is searched, drafts from it alone.

    seconds, tokens, worth: [max_gammas]; worth is tokens as they count (engine.control.text_outlook). drafts:
    [max_gammas, rows], a model's. proposed: the same, drafts from the text before them; None: there are none. latest:
    [rows], see RowWork; None: of no row. plain_s: of a plain round.
    """

    way: Way
    seconds: Floats
    tokens: Floats
    worth: Floats
    drafts: Ints
    plain_s: float
    proposed: Ints | None = None
    latest: Flags | None = None

    def __len__(self) -> int:
        return len(self.seconds)

    def __getitem__(self, max_gamma: int) -> Option:
        predicted = [float(each[max_gamma]) for each in (self.seconds, self.tokens, self.worth)]
        drafts = self.drafts[max_gamma].tolist()
        proposed = [0] * len(drafts) if self.proposed is None else self.proposed[max_gamma].tolist()
        latest = [False] * len(drafts) if self.latest is None else self.latest.tolist()
        rows = [
            RowDrafts(text, model, late and model > 0)
            for text, model, late in zip(proposed, drafts, latest, strict=True)
        ]
        return Option(rows, self.way, *predicted)

    @property
    def plain(self) -> Option:
        """Return the option without drafts."""
        count = self.drafts.shape[1]
        return Option([RowDrafts()] * count, self.way, self.plain_s, count, count)

    @property
    def rates(self) -> Floats:
        """Return the predicted worth per second: [max_gammas]."""
        return self.worth / self.seconds

    @property
    def best(self) -> int:
        """Return the max_gamma with the most worth per second."""
        return int(self.rates.argmax())


class Goodput:
    """Predictor of the options that one model's drafts give an engine. O(rows × gamma_max) for a batch and a budget."""

    def __init__(
        self,
        model: DraftingModel,
        calibration: Calibration,
        gamma_max: int,
        text: TextChooser | None = None,
        outlook: TextOutlook | None = None,
    ) -> None:
        """model: the one that drafts. gamma_max: largest number of drafts of a row, whoever makes them. text, outlook:
        drafts from the text, and their outlook, where it is searched."""
        self.model, self._times = model, model.times
        self._calibration = calibration
        self._gamma_max = gamma_max
        self._steps = np.arange(1, gamma_max + 1)
        self._text, self._outlook = text, outlook

    def options(self, batch: Batch, budget: int, *, worse: bool = False) -> Options:
        """Predict all options with one budget. worse: each row reads what is not best for it."""
        count, way = batch.count, Way(budget, self.model.name)
        longest = int(batch.limits.max(initial=0))
        verify = self._verify(batch)
        plain_seconds, plain_tokens = np.array([verify[0]]), np.array([float(count)])
        if not longest:
            no_drafts = np.zeros((1, count), dtype=np.int64)
            options = Options(way, plain_seconds, plain_tokens, plain_tokens, no_drafts, verify[0])
            return self._with_text(options, batch, verify, DraftStep(), np.zeros(count), np.ones((count, 1)))
        step = self._draft(batch, budget, verify)
        max_gammas = steps = self._steps[:longest]

        def seconds(drafts: Ints, forwards: Ints) -> Floats:
            """Predict the time of rounds with `drafts` drafts in all, in `forwards` draft steps."""
            verifying = np.interp(drafts / count, np.arange(len(verify)), verify)
            round_seconds: Floats = verifying + forwards * step.first_row + (drafts - forwards) * step.further_row
            return round_seconds

        alphas, latest = self._alphas(batch, budget, worse)
        allowed = steps <= batch.limits[:, None]
        accepted = alphas[:, None] ** steps * allowed  # [rows, steps]: draft s is accepted with probability alpha^s
        of_drafts = self._worth(batch, verify)
        valued = accepted * of_drafts[:, :longest]
        even_tokens, even_worth = (count + each.sum(0).cumsum() for each in (accepted, valued))
        even_seconds = seconds(allowed.sum(0).cumsum(), max_gammas)
        even_rates = even_worth / even_seconds
        # A row's next draft must be worth more than its time would be elsewhere.
        rises = np.diff(verify[: longest + 1]).clip(min=0)  # measured passes may be faster with more drafts
        min_worth = even_rates * (rises / count + step.further_row)
        pays = ((valued >= min_worth[:, None, None]) & allowed & (steps <= max_gammas[:, None, None])).cumprod(
            2, dtype=bool
        )  # [max_gammas, rows, steps]; a row's drafts are its first ones
        by_step = pays.sum(1)
        drafts = by_step.sum(1)
        tokens, worth = (count + (each * pays).sum((1, 2)) for each in (accepted, valued))
        round_seconds = seconds(drafts, (by_step > 0).sum(1))
        better = (drafts > 0) & (worth / round_seconds > even_rates)
        tokens = np.concatenate([plain_tokens, np.where(better, tokens, even_tokens)])
        worth = np.concatenate([plain_tokens, np.where(better, worth, even_worth)])
        round_seconds = np.concatenate([plain_seconds, np.where(better, round_seconds, even_seconds)])
        gammas = np.zeros((longest + 1, count), dtype=np.int64)
        gammas[1:] = np.where(better[:, None], pays.sum(2), np.minimum(max_gammas[:, None], batch.limits))
        options = Options(way, round_seconds, tokens, worth, gammas, verify[0], None, latest)
        return self._with_text(options, batch, verify, step, alphas, of_drafts)

    def _with_text(
        self,
        options: Options,
        batch: Batch,
        verify: Sequence[float],
        step: DraftStep,
        alphas: Floats,
        of_drafts: Floats,
    ) -> Options:
        """Return the options with drafts from the text, where these are better. alphas: [rows], acceptance of a model's
        drafts. of_drafts: see `_worth`."""
        if self._text is None or not batch.proposals:
            return options
        work = self._text.choose(batch, verify, step, alphas, of_drafts, options.rates)
        better = work.rates > options.rates
        return Options(
            options.way,
            np.where(better, work.seconds, options.seconds),
            np.where(better, work.tokens, options.tokens),
            np.where(better, work.worth, options.worth),
            np.where(better[:, None], work.drafts, options.drafts),
            options.plain_s,
            np.where(better[:, None], work.proposed, 0),
            options.latest,
        )

    def _worth(self, batch: Batch, verify: Sequence[float]) -> Floats:
        """Return what a model's drafts are worth, if they are accepted: [rows, steps]."""
        if self._outlook is None:
            return np.ones((batch.count, len(self._steps)))
        return self._outlook.worth([row.id for row in batch.rows], self._steps, min(1.0, draft_share(verify)))

    def _alphas(self, batch: Batch, budget: int, worse: bool) -> tuple[Floats, Flags | None]:
        """Estimate the acceptance of a model's drafts, [rows], with what each row reads, and whether that is the latest
        pages; None: there is no choice. worse: see `options`."""
        ids = [row.id for row in batch.rows]
        acceptance = self.model.acceptance
        chosen = np.array(acceptance.alphas(ids, batch.contexts, Reading(budget)))
        if not self.model.reads_latest:
            return chosen, None
        latest = np.array(acceptance.alphas(ids, batch.contexts, Reading(budget, latest=True)))
        differ = np.array(batch.contexts) > budget  # others read everything
        reads_latest = ((latest > chosen + _MARGIN) ^ worse) & differ
        return np.where(reads_latest, latest, chosen), reads_latest

    def _verify(self, batch: Batch) -> list[float]:
        """Predict the seconds of a verify pass, by gamma."""
        times = batch.verify_seconds(self._times, range(self._gamma_max + 1))
        kinds = ["plain"] + ["verify"] * self._gamma_max
        return [
            seconds * self._calibration.factor(kind, verify_bucket(batch, self._times, gamma))
            for gamma, (kind, seconds) in enumerate(zip(kinds, times, strict=True))
        ]

    def _draft(self, batch: Batch, budget: int, verify: Sequence[float]) -> DraftStep:
        """Predict a draft step. verify: see `_verify`."""
        factor = self._calibration.factor(draft_kind(self.model.name), draft_bucket(batch, self._times, budget))
        first_row_s = factor * batch.draft_seconds(self._times, budget, 1)
        if batch.count == 1:
            # A further row would read KV of its own, a further query does not: as much more of a step as a draft takes
            # of the verify pass.
            return DraftStep(first_row_s, 0.0, first_row_s * draft_share(verify))
        all_rows_s = factor * batch.draft_seconds(self._times, budget, batch.count)
        further_row_s = (all_rows_s - first_row_s) / (batch.count - 1)
        return DraftStep(first_row_s, further_row_s, further_row_s)


def draft_share(verify: Sequence[float]) -> float:
    """Return the share of a plain round that one more draft takes in a verify pass. verify: seconds by drafts."""
    return max(0.0, verify[-1] / verify[0] - 1) / (len(verify) - 1)


def verify_bucket(batch: Batch, times: StepTimes, gamma: int) -> tuple[int, int, int]:
    """Return a key that verify passes over about as many rows and effective tokens share for calibration; with gamma 0,
    plain steps."""
    tokens = times.effective_tokens(batch.count, batch.total, batch.shared, gamma)
    return batch.count.bit_length(), int(tokens).bit_length(), gamma


def draft_kind(drafter: DrafterName | None) -> str:
    """Return the kind of a model's draft steps for calibration."""
    return f"drafts of {drafter}"


def draft_bucket(batch: Batch, times: StepTimes, budget: int) -> tuple[int, int, int]:
    """Return a key that draft steps of about this size share for calibration: that of a plain step, and the budget."""
    count, tokens, _ = verify_bucket(batch, times, 0)
    return count, tokens, budget
