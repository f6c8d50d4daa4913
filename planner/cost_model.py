"""MagicDec's cost model (arXiv 2408.11049, section 3): the time of a round and its expected tokens. Free of torch.

Times are measured, or predicted by planner.placed_model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from planner.placed_model import PlacedModel

GAMMA_MAX = 16
"""Largest number of tokens a round drafts per row; engine.config allows no larger gamma."""


def expected_tokens(gamma: int, alpha: float) -> float:
    """Compute Ω(γ, α) = 1 + α + … + α^γ, the expected tokens of a row per round (Leviathan et al., arXiv 2211.17192).

    alpha: probability that a draft is accepted, given that those before it are.
    """
    return math.fsum(alpha**i for i in range(gamma + 1))


def acceptance_for(gamma: int, tokens: float) -> float:
    """Compute the acceptance α at which Ω(γ, α) is `tokens`, by bisection: the reverse of `expected_tokens`.

    Raises ValueError for tokens that no acceptance gives: they are from 1 to gamma + 1.
    """
    if not 1 <= tokens <= gamma + 1:
        raise ValueError(f"{tokens:g} tokens per round: rounds of {gamma} drafts give 1 to {gamma + 1}")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(gamma, middle) < tokens else (low, middle)
    return high


def speedup(gamma: int, alpha: float, t_target: float, t_draft: float, t_verify: float) -> float:
    """Compute the speed-up over plain decoding, Ω·T_T / (γ·T_D + T_V). It is exactly 1 for gamma = 0.

    t_target, t_draft, t_verify: seconds of a plain step, of one draft step, and of the verify pass over gamma + 1
    tokens per row.
    """
    if gamma == 0:
        return 1.0
    return expected_tokens(gamma, alpha) * t_target / (gamma * t_draft + t_verify)


def best_gamma(
    alpha: float, t_target: float, t_draft: float, t_verify: Callable[[int], float], gamma_max: int = GAMMA_MAX
) -> tuple[int, float]:
    """Find the gamma from 0 to gamma_max with the largest speed-up. Returns both. Ties go to the smallest gamma.

    t_verify: from gamma to the seconds of a verify pass.
    """
    speeds = [speedup(gamma, alpha, t_target, t_draft, t_verify(gamma)) for gamma in range(gamma_max + 1)]
    best = max(range(gamma_max + 1), key=speeds.__getitem__)
    return best, speeds[best]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choosing:
    """Bytes that choosing what drafts read moves, for each token of each row's context, on one rank. Kernel launches
    and sorting are not in it.

    verify_bytes: in a verify pass. draft_bytes: for each choice while drafting. interval: draft steps that read the
    same choice; the first step of a round chooses.
    """

    verify_bytes: float = 0.0
    draft_bytes: float = 0.0
    interval: int = 1

    def round_bytes(self, gamma: int) -> float:
        """Return the bytes of a round. A plain round chooses nothing."""
        return 0.0 if gamma == 0 else self.verify_bytes + -(-gamma // self.interval) * self.draft_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationCost:
    """Cost of speculation for one pair of target and draft.

    draft: the target itself, or a separate model. budget: KV tokens per row that a draft step reads;
    None: all. shared: number of first tokens of every context that are the same. draft_shares: whether a draft that
    reads whole contexts reads these once, as the target does; drafts with a cache of their own do not. A budget below
    the context leaves drafts little that they could share: the sink. narrows: whether drafts read no more than the
    budget in sliding layers too. choosing: see there.
    """

    target: PlacedModel
    draft: PlacedModel
    budget: int | None
    shared: int = 0
    draft_shares: bool = True
    narrows: bool = False
    choosing: Choosing = Choosing()

    def draft_context(self, context: int) -> int:
        """Return the number of KV tokens of a row that a draft step reads, in layers that do not slide."""
        tokens = self.draft.context_tokens(context)
        return tokens if self.budget is None else min(tokens, self.budget)

    def draft_window(self, context: float) -> float:
        """Return the same in sliding layers."""
        most = math.inf if self.budget is None or not self.narrows else self.budget
        return min(self.draft.window_tokens(context), most)

    def shared_tokens(self, rows: int, context: int) -> int:
        """Return the tokens of the contexts that need no reading, because another row has the same ones."""
        return (rows - 1) * min(self.shared, context)

    def target_seconds(self, rows: int, context: int) -> float:
        """Predict T_T, the seconds of a plain step over rows of `context` tokens each."""
        return self.verify_seconds(rows, context, 0)

    def draft_seconds(self, rows: int, context: int) -> float:
        """Predict T_D, the seconds of one draft step over rows of `context` tokens each, without choosing."""
        return self.draft.forward_seconds(
            rows,
            rows * self.draft_context(context),
            shared_tokens=self._draft_shared(rows, context),
            window_tokens=rows * self.draft_window(context),
        )

    def draft_bytes(self, rows: int, context: int) -> float:
        """Return the bytes of weights and KV that one draft step reads, on the rank with the largest share of KV."""
        tokens = rows * self.draft_context(context) - self._draft_shared(rows, context)
        return self.draft.read_bytes(rows, tokens, rows * self.draft_window(context))

    def draft_row_bytes(self, context: int) -> float:
        """Return the bytes of KV that one draft step reads of one row, on the rank with the largest share."""
        return self.draft.kv_read_bytes(1, self.draft_context(context), self.draft_window(context))

    def verify_seconds(self, rows: int, context: int, gamma: int) -> float:
        """Predict T_V, the seconds of a verify pass, without choosing. With gamma = 0 it is a plain step."""
        target = self.target
        tokens, window = target.context_tokens(context), target.window_tokens(context)
        shared = self.shared_tokens(rows, context) if tokens == context else 0
        return target.forward_seconds(rows, rows * tokens, gamma + 1, shared, rows * window)

    def choosing_seconds(self, rows: int, context: int, gamma: int) -> float:
        """Predict the seconds of a round in which what drafts read is chosen. Rows share none of it."""
        return self.draft.kv_seconds(rows * context * self.choosing.round_bytes(gamma))

    def speedup(self, rows: int, context: int, gamma: int, alpha: float) -> float:
        """Predict the speed-up for rows of `context` tokens each."""
        t_target, t_draft = self.target_seconds(rows, context), self.draft_seconds(rows, context)
        return speedup(gamma, alpha, t_target, t_draft, self._beside_drafts(rows, context, gamma))

    def best_gamma(self, rows: int, context: int, alpha: float) -> tuple[int, float]:
        """Find the best gamma and its predicted speed-up."""
        t_target, t_draft = self.target_seconds(rows, context), self.draft_seconds(rows, context)
        return best_gamma(alpha, t_target, t_draft, lambda gamma: self._beside_drafts(rows, context, gamma))

    def break_even(self, rows: int, alpha: Callable[[int], float], gamma: int | None = None) -> int | None:
        """Find the shortest context at which drafting is faster, by bisection; None: at no supported context.

        alpha: from a context to its acceptance. gamma: None: the best gamma of each context.
        """

        def pays(context: int) -> bool:
            if gamma is None:
                return self.best_gamma(rows, context, alpha(context))[1] > 1
            return self.speedup(rows, context, gamma, alpha(context)) > 1

        low, high = 0, self.target.model.max_model_len
        if not pays(high):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if pays(middle) else (middle, high)
        return high

    def break_even_limit(self, gamma: int, alpha: float) -> float:
        """Compute the break-even context in tokens for large batches, where costs shared by a batch are negligible:

            S* = C + [γ·(a_D + e_D + b_D·K) + (γ + 1 − Ω)·a − e·(Ω − v) + c·C] / [b·(Ω − v) − c]

        a, b: seconds of one token's matrix products, and of reading its KV. e: seconds that a row's exact tokens take
        to read beyond those of others, and those of a window in sliding layers, for which S* is at least that window.
        a_D, b_D, e_D: the same for the draft. K: the budget. v: relative time of
        attention in a verify pass. c: seconds of choosing, for a token of a context. C: shared tokens of a context,
        whose one read is one of the costs shared by a batch. For self-speculation, v = 1, e = 0, c = 0 and C = 0 this
        is [(2γ + 1 − Ω)·a/b + γ·K] / (Ω − 1). Infinite if no context is long enough.
        """
        target, draft = self.target, self.draft
        tokens, choosing = expected_tokens(gamma, alpha), self.choosing_seconds(1, 1, gamma)
        passes = tokens - target.efficiency.verify_attention
        saved = target.kv_token_seconds * passes - choosing
        if self.budget is None or saved <= 0:
            return math.inf
        windows = draft.kv_seconds(draft.window_bytes(1) * self.draft_window(math.inf))
        read, drafted = target.exact_seconds + target.window_seconds, draft.exact_seconds + windows
        drafting = gamma * (draft.token_seconds + drafted + draft.kv_token_seconds * self.budget)
        verifying = (gamma + 1 - tokens) * target.token_seconds
        limit = self.shared + (drafting + verifying - read * passes + choosing * self.shared) / saved
        if limit > target.context_tokens(math.ceil(limit)):
            return math.inf  # all layers slide, so that longer contexts save no more
        return max(limit, target.window)

    def _draft_shared(self, rows: int, context: int) -> int:
        """Return the tokens that a draft step need not read, because it reads them of another row."""
        whole = self.draft_context(context) == context
        return self.shared_tokens(rows, context) if self.draft_shares and whole else 0

    def _beside_drafts(self, rows: int, context: int, gamma: int) -> float:
        """Predict the seconds of a round that are not those of draft steps."""
        return self.verify_seconds(rows, context, gamma) + self.choosing_seconds(rows, context, gamma)
