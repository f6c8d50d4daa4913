"""What a round takes and what it yields: MagicDec's cost model (arXiv 2408.11049, section 3). Free of torch.

Two halves. The first knows times only, whoever measured or predicted them: expected tokens, speed-up, best gamma. The
second predicts the time of one forward from shapes and data sheets:

    T(rows, Σcontext, n) = T_lin + T_att + T_comm + T_0
    T_lin  = max(2·P·rows·n / (N·F·u_f), W / (N·M·u_m))
    T_att  = max(4·L·h·d_h·Σcontext·n / (N·F·u_f), k·Σcontext / (N'·M·u_kv)), times v where n > 1
    T_comm = 2·L·(t_ar + 2(N−1)/N·rows·n·d·bytes / link), none for N = 1
    T_0    = L·t_layer

n query tokens per row, N ranks of F FLOP/s and M bytes/s; P parameters that a token meets, W their bytes; L layers of
h query heads and width d; k KV bytes per token, of which the fullest rank reads 1/N'.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from models.config import ModelConfig
from models.shapes import active_parameters, rank_kv_token_bytes
from planner.hardware import Device

GAMMA_MAX = 16
"""The most tokens a round drafts; engine.config allows no more."""


def expected_tokens(gamma: int, alpha: float) -> float:
    """Ω(γ, α) = 1 + α + … + α^γ: tokens that a round yields if each draft holds with probability alpha, given that
    those before it do (Leviathan et al., arXiv 2211.17192)."""
    return math.fsum(alpha**i for i in range(gamma + 1))


def speedup(gamma: int, alpha: float, t_target: float, t_draft: float, t_verify: float) -> float:
    """Over plain decoding: Ω·T_T / (γ·T_D + T_V). Times in seconds, of a plain step, one draft step and the verify
    pass of gamma + 1 tokens per row. Plain decoding, gamma = 0, is exactly 1."""
    if gamma == 0:
        return 1.0
    return expected_tokens(gamma, alpha) * t_target / (gamma * t_draft + t_verify)


def best_gamma(
    alpha: float, t_target: float, t_draft: float, t_verify: Callable[[int], float], gamma_max: int = GAMMA_MAX
) -> tuple[int, float]:
    """The gamma from 0 to gamma_max with the largest speed-up, and that speed-up; of equals the smallest.

    t_verify: seconds of a verify pass, by gamma.
    """
    speeds = [speedup(gamma, alpha, t_target, t_draft, t_verify(gamma)) for gamma in range(gamma_max + 1)]
    best = max(range(gamma_max + 1), key=speeds.__getitem__)
    return best, speeds[best]


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """What of a device is reached. Of the defaults, which are for GPUs, only `layer_s` is fitted
    (bench/paper/published.py); the others are usual values, kept fixed because the published ratios hardly tell them
    from `layer_s`."""

    flops: float = 0.6
    """u_f, of the peak, in matrix products and attention."""
    weights: float = 0.8
    """u_m, of the memory's peak, reading weights."""
    kv: float = 0.8
    """u_kv, of the memory's peak, reading KV."""
    verify_attention: float = 1.4
    """Attention for several queries per row takes so much longer than for one, though it reads the same."""
    layer_s: float = 0.135e-3
    """t_layer: launches and synchronisation of one layer, seconds, whatever it computes."""


PUBLISHED = Efficiency()
REFERENCE_ON_CPU = Efficiency(flops=1.0, weights=0.8, kv=0.04, verify_attention=1.1, layer_s=1e-3)
"""The reference attention, read off the batches of 1 and 8 on two cores in docs/benchmarks.md. flops: of float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedModel:
    """One model on `ranks` devices. element_bytes: of weights, KV and activations alike."""

    model: ModelConfig
    device: Device
    ranks: int
    element_bytes: int = 2
    efficiency: Efficiency = PUBLISHED

    def forward_seconds(self, rows: int, context_tokens: float, queries: int = 1) -> float:
        """T: a forward of `queries` tokens in each of `rows` rows.

        context_tokens: KV tokens that are read, summed over rows (each once, however many queries read it).
        """
        model, reached = self.model, self.efficiency
        weights = active_parameters(model) * self.element_bytes
        linear = max(
            self.token_seconds * rows * queries,
            weights / (self.ranks * self.device.bandwidth * reached.weights),
        )
        products = 4 * model.num_layers * model.num_heads * model.head_dim * context_tokens * queries
        attention = max(products / self._flops, self.kv_token_seconds * context_tokens)
        if queries > 1:
            attention *= reached.verify_attention
        return linear + attention + self._communication(rows * queries) + model.num_layers * reached.layer_s

    @property
    def _flops(self) -> float:
        """Of all ranks, per second, as far as they are reached."""
        return self.ranks * self.device.flops * self.efficiency.flops

    @property
    def kv_token_seconds(self) -> float:
        """Reading one token's KV, on the rank that holds most of it."""
        share = rank_kv_token_bytes(self.model, self.ranks, self.element_bytes)
        return share / (self.device.bandwidth * self.efficiency.kv)

    @property
    def token_seconds(self) -> float:
        """One more token in a forward whose products are bound by arithmetic."""
        return 2 * active_parameters(self.model) / self._flops

    def _communication(self, tokens: int) -> float:
        """Two all-reduces per layer, of one hidden state per token."""
        if self.ranks == 1:
            return 0.0
        moved = 2 * (self.ranks - 1) / self.ranks * tokens * self.model.hidden_size * self.element_bytes
        return 2 * self.model.num_layers * (self.device.all_reduce_s + moved / self.device.link)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationCost:
    """Who drafts for whom. draft: the target itself (the same object), or a model of its own.

    budget: KV tokens per row that a draft step reads; None: all.
    """

    target: PlacedModel
    draft: PlacedModel
    budget: int | None

    def draft_context(self, context: int) -> int:
        """KV tokens that a draft step reads of a row."""
        return context if self.budget is None else min(context, self.budget)

    def target_seconds(self, rows: int, context: int) -> float:
        """T_T: a plain step of rows of `context` tokens each."""
        return self.target.forward_seconds(rows, rows * context)

    def draft_seconds(self, rows: int, context: int) -> float:
        """T_D."""
        return self.draft.forward_seconds(rows, rows * self.draft_context(context))

    def verify_seconds(self, rows: int, context: int, gamma: int) -> float:
        """T_V; without drafts it is a plain step."""
        return self.target.forward_seconds(rows, rows * context, gamma + 1)

    def speedup(self, rows: int, context: int, gamma: int, alpha: float) -> float:
        """Predicted, for rows of `context` tokens each."""
        t_target, t_draft = self.target_seconds(rows, context), self.draft_seconds(rows, context)
        return speedup(gamma, alpha, t_target, t_draft, self.verify_seconds(rows, context, gamma))

    def best_gamma(self, rows: int, context: int, alpha: float) -> tuple[int, float]:
        """The best gamma and its predicted speed-up."""
        t_target, t_draft = self.target_seconds(rows, context), self.draft_seconds(rows, context)
        return best_gamma(alpha, t_target, t_draft, lambda gamma: self.verify_seconds(rows, context, gamma))

    def break_even(self, rows: int, alpha: Callable[[int], float], gamma: int | None = None) -> int | None:
        """The shortest context at which drafting pays, by bisection; None: at none that the target is made for.

        alpha: by context. gamma: None lets each context have its best.
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
        """The context from which drafting pays as the batch grows and what a batch shares is forgotten, in tokens:

            S* = [γ·(a_D + b_D·K) + (γ + 1 − Ω)·a] / [b·(Ω − v)]

        a, b: seconds of one token's products, and of reading its KV; a_D, b_D: the draft's. K the budget, v by how
        much longer attention takes to verify. For self-speculation and v = 1 it is
        [(2γ + 1 − Ω)·a/b + γ·K] / (Ω − 1). Infinite if no context is long enough.
        """
        target, draft = self.target, self.draft
        tokens, longer = expected_tokens(gamma, alpha), target.efficiency.verify_attention
        if self.budget is None or tokens <= longer:
            return math.inf
        drafting = gamma * (draft.token_seconds + draft.kv_token_seconds * self.budget)
        verifying = (gamma + 1 - tokens) * target.token_seconds
        return (drafting + verifying) / (target.kv_token_seconds * (tokens - longer))
